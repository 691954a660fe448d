"""The run folder: what it holds, and whom it refuses, with nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, write_checkpoint
from tiny_shards import tiny_run, write_shards

from sinktrain.cli import main
from sinktrain.training.run import RunFolder, differences


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, others, a finished run, and several things that are no run."""
    folder = tmp_path_factory.mktemp("place")
    write_shards(folder / "shards")
    write_shards(folder / "other", seed=1)
    write_shards(folder / "short", val_tokens=20)
    assert main(["fit", *tiny_run(folder / "shards", folder / "run")]) == 0
    whole = (folder / "run" / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    write_checkpoint(tiny_model(), folder / "model.ckpt")
    (folder / "file").write_text("a file")
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.tex").write_text("years of work")
    shutil.copytree(folder / "run", folder / "dangling", symlinks=True)
    for checkpoint in (folder / "dangling" / "checkpoints").glob("step-*"):
        checkpoint.unlink()
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text('{"format_version": ')
    (folder / "unknown.yaml").write_text("model: {learning_rat: 1}\n")
    (folder / "nested.yaml").write_text("model: {network: {hidden_sise: 32}}\n")
    (folder / "torn.yaml").write_text("model: [\n")
    parallel = "lightning.pytorch.strategies.ModelParallelStrategy"
    (folder / "parallel.yaml").write_text(f"trainer: {{strategy: {{class_path: {parallel}}}}}\n")
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


RUN, NEW, LAST = "{p}/run", "{p}/new", "{p}/run/checkpoints/last.ckpt"

REFUSALS = {
    # a run folder that was made with something else
    "network": (
        RUN,
        "--model.network.hidden_size 64",
        "--run {p}/run was made with model.network.hidden_size 32, not 64",
    ),
    "sink": (
        RUN,
        "--config sink",
        "was made with model.sink.kind none, not token; model.sink.count 0, not 1",
    ),
    "corpus": (
        RUN,
        "--data.path {p}/other",
        "--run {p}/run was made with another corpus (data.path); choose another --run",
    ),
    "seed": (RUN, "--seed_everything 5", "was made with seed_everything 1234, not 5; choose another --run"),
    "score_sink": (
        RUN,
        "--data.score_sink false",
        "was made with score_sink True, not False; choose another --run",
    ),
    "seq_len": (RUN, "--data.seq_len 16", "was made with model.network.max_position_embeddings 32, not 16"),
    "all at once": (
        RUN,
        "--seed_everything 5 --data.path {p}/other",
        "another corpus (data.path); seed_everything 1234, not 5; choose another --run",
    ),
    # a folder that holds something else
    "papers": ("{p}/papers", "", "--run {p}/papers holds something that is not a run; choose another folder"),
    "file": ("{p}/file", "", "--run {p}/file is a file; choose another folder"),
    "broken": ("{p}/broken", "", "{p}/broken/manifest.json is not readable"),
    "dangling": ("{p}/dangling", "", "last.ckpt names step-00000012.ckpt, which is gone; pass --resume PATH"),
    # --resume
    "afresh": (RUN, "--resume none", "holds a run; choose another folder, or continue it (--resume auto)"),
    "no such": (
        NEW,
        "--resume no.ckpt",
        "--resume no.ckpt: there is no such checkpoint; use auto, none or a",
    ),
    "a folder": (
        NEW,
        "--resume {p}/run",
        "--resume {p}/run is a folder; name one of its checkpoints, such as {p}/run/checkpoints/last.ckpt",
    ),
    "torn": (NEW, "--resume {p}/torn.ckpt", "{p}/torn.ckpt is damaged, or holds more than tensors"),
    "foreign": (NEW, "--resume {p}/foreign.ckpt", "{p}/foreign.ckpt is not a checkpoint of sinktrain fit"),
    "other model": (
        NEW,
        "--resume {p}/model.ckpt",
        "--resume {p}/model.ckpt was made with model.network.vocab_size 97",
    ),
    "other arm": (
        NEW,
        f"--config sink --resume {LAST}",
        "was made with model.sink.kind none, not token; model.sink.count 0, not 1; "
        "model.sink.token_ids [], not [265]; "
        "to start anew from its weights, use --model.init_from instead",
    ),
    "other corpus": (
        NEW,
        f"--data.path {{p}}/other --resume {LAST}",
        "was made with another corpus (data.path); to start",
    ),
    "other seed": (
        NEW,
        f"--seed_everything 5 --resume {LAST}",
        "was made with seed_everything 1234, not 5; to start",
    ),
    # settings
    "unknown": (
        NEW,
        "--model.warmup_step 3",
        'unknown setting "model.warmup_step"; did you mean "model.warmup_steps"?',
    ),
    "unknown=": (
        NEW,
        "--trainer.max_step=3",
        'unknown setting "trainer.max_step"; did you mean "trainer.max_steps"?',
    ),
    "unknown group": (NEW, "--modl.eps 3", 'unknown setting "modl.eps"; did you mean "model.eps"?'),
    "unknown in yaml": (
        NEW,
        "--config {p}/unknown.yaml",
        'unknown setting "model.learning_rat"; did you mean "model.learning_rate"?',
    ),
    "unknown deep in yaml": (
        NEW,
        "--config {p}/nested.yaml",
        'unknown setting "model.network.hidden_sise"; did you mean "model.network.hidden_size"?',
    ),
    "torn yaml": (NEW, "--config {p}/torn.yaml", "Problems parsing config"),
    "stray word": (NEW, "sink", 'unknown setting "sink"'),
    "float": (NEW, "--model.learning_rate fast", 'setting "model.learning_rate": expected float, found fast'),
    "int": (NEW, "--trainer.max_steps many", 'setting "trainer.max_steps": expected int, found many'),
    "choice": (
        NEW,
        "--model.schedule cosin",
        'model.schedule "cosin" is not one of cosine, wsd; did you mean "cosine"?',
    ),
    "union": (NEW, "--data.val_windows ten", 'setting "data.val_windows": expected int, null, found ten'),
    "config name": (
        NEW,
        "--config pythia-160n",
        "--config pythia-160n: no such file, and no shipped config of that name; did you mean",
    ),
    "config value": (NEW, "--config", "argument -c/--config: expected one argument"),
    "no shards": (NEW, "--data.path {p}/void", "{p}/void: no prepared shards here"),
    "short text": (
        NEW,
        "--data.path {p}/short",
        "{p}/short: the val split holds 20 tokens, less than one sample",
    ),
    "fp16": (
        NEW,
        "--trainer.precision 16-mixed",
        "trainer.precision 16-mixed is not supported; use bf16-mixed or 32-true",
    ),
    "accumulation": (
        NEW,
        "--trainer.accumulate_grad_batches 2",
        "trainer.accumulate_grad_batches 2 is not supported; use data.micro_batch",
    ),
    "clipping": (
        NEW,
        "--trainer.gradient_clip_val 1",
        "trainer.gradient_clip_val 1 is not supported; use model.clip_norm",
    ),
    "strategy": (
        NEW,
        "--trainer.strategy ddpp",
        "trainer.strategy ddpp is not supported; use auto or ddp, or --config fsdp, deepspeed-zero1, -zero2 "
        'or -zero3; did you mean "ddp"?',
    ),
    "sharding of Lightning's": (
        NEW,
        "--config {p}/parallel.yaml",
        "trainer.strategy ModelParallelStrategy is not supported; use --config ddp, fsdp, deepspeed-zero1",
    ),
    "a graph without a GPU": (
        NEW,
        "--model.cuda_graph true",
        "model.cuda_graph true needs one CUDA device, without --config ddp, and model.recompute_activations",
    ),
    "spawning": (
        NEW,
        "--trainer.strategy ddp_spawn --trainer.devices 2",
        "trainer.strategy ddp_spawn is not supported; use ddp",
    ),
    "interval": (
        NEW,
        "--trainer.val_check_interval 0.5",
        "trainer.val_check_interval 0.5 is not supported; use a number of steps, or",
    ),
    "no interval": (
        NEW,
        "--trainer.val_check_interval 0",
        "trainer.val_check_interval 0 is not supported; use a number of steps, or trainer.limit_val_batches",
    ),
    "interval of time": (
        NEW,
        "--trainer.val_check_interval 00:01:00:00 --dry_run",
        "trainer.val_check_interval 00:01:00:00 is not supported; use a number of steps, or",
    ),
    "no rows": (
        NEW,
        "--trainer.log_every_n_steps 0",
        "trainer.log_every_n_steps 0 is not supported; use 1 or more",
    ),
    "the same batches again": (
        NEW,
        "--trainer.limit_train_batches 3",
        "trainer.limit_train_batches 3 is not supported; use trainer.max_steps",
    ),
    "overfitting": (
        NEW,
        "--trainer.overfit_batches 2",
        "trainer.overfit_batches 2 is not supported; use a smaller corpus",
    ),
    "steps": (
        NEW,
        "--trainer.max_steps -1",
        "trainer.max_steps is -1; say how many optimizer steps to train",
    ),
    "warm-up": (
        NEW,
        "--model.warmup_steps 12",
        "model.warmup_steps is 12 of trainer.max_steps 12; use fewer",
    ),
    "micro-batch": (
        NEW,
        "--data.micro_batch 3",
        "data.global_batch 8 does not divide into 1 devices x micro-batches of 3",
    ),
    "devices": (
        NEW,
        "--trainer.devices 3 --trainer.strategy ddp",
        "data.global_batch 8 does not divide into 3 devices x micro-batches of 1; use a multiple of 3",
    ),
    "saving": (
        NEW,
        "--checkpoint.every_n_steps 0",
        "checkpoint.every_n_steps 0 and checkpoint.keep 2 must be 1 or more",
    ),
    "keeping": (
        NEW,
        "--checkpoint.keep 0",
        "checkpoint.every_n_steps 4 and checkpoint.keep 0 must be 1 or more",
    ),
    "vocabulary": (
        NEW,
        "--model.network.vocab_size 100",
        "model.network.vocab_size is 100 but the shards need 384 rows",
    ),
    "heads": (NEW, "--model.network.num_attention_heads 3", "hidden_size 32 does not divide into 3 heads"),
    "count": (NEW, "--model.sink.kind token --model.sink.count 9", "model.sink.count is 9; use 1 to 8"),
    "start": (NEW, "--model.init_from {p}/nothing", "{p}/nothing does not exist"),
    "negative seed": (NEW, "--seed_everything -5", "seed_everything is -5; use 0 to 4294967295"),
    "recipe": (
        NEW,
        "--model.learning_rate -1 --model.betas [1.5,0.9] --model.clip_norm 0",
        "model.learning_rate is -1.0; use more than 0; model.betas are [1.5, 0.9]; "
        "use two of 0 or more, below 1; "
        "model.clip_norm is 0.0; use more than 0",
    ),
    "more recipe": (
        NEW,
        "--model.min_lr_ratio 2 --model.weight_decay -1 --model.eps -1",
        "model.min_lr_ratio is 2.0; use 0 to 1; model.weight_decay is -1.0; use 0 or more; "
        "model.eps is -1.0; use 0 or more",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line_with_nothing_written(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, options, message = (text.replace("{p}", str(place)) for text in REFUSALS[case])
    arguments = ["fit", *tiny_run(place / "shards", Path(run), *options.split())]
    before = _hashes(place)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("sinktrain fit: ")
    assert message in told
    assert told.count("\n") == 1
    assert _hashes(place) == before
    assert not (place / "new").exists()


def test_missing_data_path_is_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(place / "tiny.yaml"), "--run", str(place / "new")]) == 2
    told = capsys.readouterr().err
    assert told == "sinktrain fit: data.path is missing; pass --data.path SHARDS, made by sinktrain prepare\n"


VALIDATION_REFUSALS = {
    "": "sinktrain validate: --ckpt_path is missing; pass one of a run's checkpoints/",
    "--ckpt_path {p}/no.ckpt": "--ckpt_path {p}/no.ckpt: there is no such checkpoint; pass one of",
    "--ckpt_path {p}/torn.ckpt": "{p}/torn.ckpt is damaged, or holds more than tensors",
    f"--config sink --ckpt_path {LAST}": "was made with model.sink.kind none, not token; model.sink.count 0",
    f"--data.path {{p}}/other --ckpt_path {LAST}": "was made with another corpus (data.path); pass",
}


@pytest.mark.parametrize("options", VALIDATION_REFUSALS)
def test_validate_refuses_in_one_line(options: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(place / "tiny.yaml"), "--data.path", str(place / "shards")]
    assert main(["validate", *arguments, *options.format(p=place).split()]) == 2
    told = capsys.readouterr().err
    assert VALIDATION_REFUSALS[options].format(p=place) in told
    assert told.count("\n") == 1


def test_validate_gives_the_held_out_loss_of_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the run's own config.yaml, and with nothing written."""
    before = _hashes(place)
    arguments = ["--config", str(place / "run" / "config.yaml"), "--ckpt_path", LAST.format(p=place)]
    assert main(["validate", *arguments, "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)["val/loss"]
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert held_out == pytest.approx(manifest["val_loss_nats"], abs=1e-6)
    assert _hashes(place) == before


def test_a_run_folder_holds_what_the_interface_says(place: Path) -> None:
    run = place / "run"
    names = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert names == {
        "checkpoints",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000008.ckpt",
        "checkpoints/step-00000012.ckpt",
        "config.yaml",
        "manifest.json",
        "metrics.csv",
        "tokenizer.json",
    }
    assert (run / "tokenizer.json").read_bytes() == (place / "shards" / "tokenizer.json").read_bytes()
    assert os.readlink(run / "checkpoints" / "last.ckpt") == "step-00000012.ckpt"  # relative: movable
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["is_finished"]
    assert (manifest["arm"], manifest["global_step"], manifest["tokens_seen"]) == ("vanilla", 12, 12 * 8 * 32)


def test_a_moved_run_continues(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "moved", symlinks=True)
    arguments = ["fit", *tiny_run(place / "shards", tmp_path / "moved", "--trainer.max_steps", "14")]
    assert main(arguments) == 0
    assert RunFolder(tmp_path / "moved").is_finished(14)


def test_a_finished_run_that_lost_its_last_name_gets_it_again(place: Path, tmp_path: Path) -> None:
    """As copies without links lose it: such a run trained nothing, and stayed without one."""
    run = tmp_path / "copied"
    shutil.copytree(place / "run", run, symlinks=True)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert main(["fit", *tiny_run(place / "shards", run)]) == 0
    assert os.readlink(run / "checkpoints" / "last.ckpt") == "step-00000012.ckpt"


def test_a_run_killed_before_its_first_checkpoint_starts_again(place: Path, tmp_path: Path) -> None:
    """The manifest is the first file written, so that a folder is a run from its first moment on."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(place / "run" / "manifest.json", run)
    manifest = json.loads((run / "manifest.json").read_text()) | {"is_finished": False}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["fit", *tiny_run(place / "shards", run)]) == 0
    assert RunFolder(run).is_finished(12)


def test_differences_name_every_key_that_differs() -> None:
    old = {"model": {"a": 1, "b": {"c": 2}}, "seed": 3}
    assert differences(old, old) == ""
    assert (
        differences(old, {"model": {"a": 1, "b": {"c": 5}}, "seed": 4}) == "model.b.c 2, not 5; seed 3, not 4"
    )
    assert differences({}, {"seed": 4}) == "seed None, not 4"


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    RunFolder(tmp_path).check_is_ours("auto", {})
    RunFolder(tmp_path / "new").check_is_ours("none", {})


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (None, None),
        ("{broken", None),
        ("[1, 2]", None),
        ('{"hardware": "H100"}', None),
        ('{"hardware": {"device": "H100"}}', None),
        (
            '{"hardware": {"device": "H100", "num_devices": 2, "train_seconds": 9.5}}',
            {"device": "H100", "num_devices": 2, "train_seconds": 9.5},
        ),
    ],
)
def test_hardware_is_told_or_not_and_never_in_the_way(
    manifest: str | None, told: dict[str, Any] | None, tmp_path: Path
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert RunFolder(tmp_path).read_hardware() == told
