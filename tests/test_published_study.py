"""From one command to the Hub and back: a study trains, compares and publishes; others load it by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer, hub  # noqa: F401

from sinktrain.model.checkpoints import load_model

STUDY = {
    "text": "data/shakespeare.txt.xz",
    "prepare": {"vocab_size": 512, "max_tokens": 300_000, "val_fraction": 0.3},
    "base": ["quickstart"],
    "settings": {
        "model": {"network": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}},
        "trainer": {"max_steps": 40, "val_check_interval": 20},
        "checkpoint": {"every_n_steps": 20},
        "streaming": {"every_n_steps": 20},
    },
    "arms": {"vanilla": {}, "sink": {"config": "sink"}},
    "compare": {"layouts": 16, "max_tokens": 4000, "tasks": "telemetry"},
    "publish": {"repo_id": "lab/tiny", "license": "apache-2.0"},
}

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, out = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(name)("To be, or not to be", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save((ids, AutoModelForCausalLM.from_pretrained(name)(ids).logits), out)
"""


def fresh(*command: str) -> str:
    """What a process of its own prints, which knows of the Hub by its environment alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # ten processes that import torch, most of them Lightning or transformers too
def test_a_study_is_published_and_comes_back_by_name_into_plain_transformers_and_a_stream(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    study, out = tmp_path / "tiny.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    carry_out = ("-m", "sinktrain", "study", str(study), "--out", str(out), "--device", "cpu")
    assert "collection: " in fresh(*carry_out)
    commits = {name: repo.commits("main") for name, repo in hub.repos.items()}
    for arm in ("vanilla", "sink"):
        name, files = f"lab/tiny-{arm}", hub.repos[f"lab/tiny-{arm}"].branches["main"]
        assert {"README.md", "model.safetensors", "tokenizer.json", "comparison/report.html"} <= files.keys()
        fresh("-c", PLAIN, name, str(tmp_path / "logits.pt"))
        ids, logits = torch.load(tmp_path / "logits.pt")
        ours = load_model(out / arm)
        assert ids[0, : len(ours.sink_ids)].tolist() == ours.sink_ids
        torch.testing.assert_close(logits, ours(ids), rtol=1e-5, atol=1e-4)
        typed = ("--prompt", "To be", "--max-tokens", "40", "--seed", "1")
        by_name, by_folder = (
            fresh("-m", "sinktrain", "stream", model, *typed) for model in (name, str(out / arm))
        )
        assert by_name == by_folder
    assert fresh(*carry_out).count("already there, unchanged") == 2
    assert {name: repo.commits("main") for name, repo in hub.repos.items()} == commits
