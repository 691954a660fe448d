"""Every form of MODEL loads, and what is no model says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    edit_json,
    random_tokens,
    tiny_model,
    write_checkpoint,
    write_run,
)

from sinktrain.errors import ModelError
from sinktrain.model.checkpoints import (
    ModelSource,
    checkpoint_facts,
    describe,
    empty_model,
    find_tokenizer,
    load_model,
    require_tokenizer,
)
from sinktrain.model.config import PYTHIA, ModelConfig, SinkConfig
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.model.transformers_format import (
    from_transformers_config,
    to_transformers_config,
    to_transformers_weights,
)

Weights = dict[str, torch.Tensor]
SINKS = [SinkConfig(kind, 1, (90,) if KINDS[kind].has_tokens else ()) for kind in sorted(KINDS)]
PREFIX_SINKS = [sink for sink in SINKS if KINDS[sink.kind].loads_as == "prefix"]


def kind_and_count(sink: SinkConfig) -> str:
    return f"{sink.kind} {sink.count}"


def write_folder(model: GPTNeoX, folder: Path, rename: Callable[[str], str] = str) -> Path:
    """A transformers folder, written without transformers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_transformers_config(model.config, None, 0)))
    for file, weights in to_transformers_weights(model).items():
        save_file({rename(name): weight for name, weight in weights.items()}, folder / file)
    return folder


def split_weights(folder: Path, weights: Weights, name: str, save: Callable[[Weights, Path], Any]) -> None:
    """Spread weights over two files and an index, as large checkpoints are."""
    stem, ending = name.split(".")
    parts = {f"{stem}-0000{part + 1}-of-00002.{ending}": sorted(weights)[part::2] for part in (0, 1)}
    for file, names in parts.items():
        save({weight: weights[weight] for weight in names}, folder / file)
    weight_map = {weight: file for file, names in parts.items() for weight in names}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_weights(model: GPTNeoX, expected: GPTNeoX) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight.to(ours[name].dtype)), name


@pytest.mark.parametrize("sink", [*SINKS, SinkConfig("token", 2, (90, 91))], ids=kind_and_count)
def test_run_checkpoint_and_folder_give_the_same_model(tmp_path: Path, sink: SinkConfig) -> None:
    model = tiny_model(sink=sink, rotary_pct=1.0, use_parallel_residual=False, attention_bias=False)
    run = write_run(model, tmp_path / "run")
    sources = [run, str(run), run / "checkpoints" / "last.ckpt", write_folder(model, tmp_path / "folder")]
    tokens = random_tokens(97)
    for source in sources:
        loaded = load_model(source)
        assert loaded.config == model.config
        assert loaded.sink_ids == list(sink.token_ids)
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("sink", SINKS, ids=kind_and_count)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_kind_starts_with_survives_a_checkpoint(
    tmp_path: Path, sink: SinkConfig, dtype: torch.dtype
) -> None:
    model = tiny_model(sink=sink).to(dtype)
    initialize(model, seed=3)
    loaded = load_model(write_run(model, tmp_path / "run"), dtype=dtype)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(random_tokens(97)), model(random_tokens(97)))


@pytest.mark.parametrize("sink", PREFIX_SINKS, ids=kind_and_count)
def test_folder_that_lost_its_prefix_cache_says_what_it_lacks(tmp_path: Path, sink: SinkConfig) -> None:
    """As transformers leaves it that saves such a model again."""
    folder = write_folder(tiny_model(sink=sink), tmp_path / "folder")
    (folder / "prefix_cache.safetensors").unlink()
    told = f'{folder} lacks prefix_cache.safetensors, where the sink of kind "{sink.kind}" is; copy it from'
    with pytest.raises(ModelError, match=f"^{told} the export$"):
        load_model(folder)


def test_loaded_model_is_in_eval_mode_without_gradients(tmp_path: Path) -> None:
    loaded = load_model(write_run(tiny_model(), tmp_path / "run"))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loaded_weights_outlive_their_file(tmp_path: Path) -> None:
    model = tiny_model()
    path = write_checkpoint(model, tmp_path / "model.ckpt")
    loaded = load_model(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_cast_to_the_asked_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    loaded = load_model(write_folder(model, tmp_path / "folder"), dtype=dtype)
    assert loaded.dtype == dtype
    assert_same_weights(loaded, model.to(dtype))


def test_float64_weights_survive_exactly(tmp_path: Path) -> None:
    model = tiny_model().to(torch.float64)
    model.embed_out.weight.add_(1e-12)
    loaded = load_model(write_run(model, tmp_path / "run"), dtype=torch.float64)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("form", ["one pickle", "two safetensors", "two pickles"])
def test_weights_in_other_files_load_alike(tmp_path: Path, form: str) -> None:
    model = tiny_model()
    folder = write_folder(model, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    if form == "one pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif form == "two safetensors":
        split_weights(folder, model.state_dict(), "model.safetensors", save_file)
    else:
        split_weights(folder, model.state_dict(), "pytorch_model.bin", torch.save)
    assert_same_weights(load_model(folder), model)


def test_head_may_bear_its_newer_name(tmp_path: Path) -> None:
    model = tiny_model()
    folder = write_folder(model, tmp_path / "folder", lambda name: name.replace("embed_out", "lm_head"))
    assert_same_weights(load_model(folder), model)


def test_folder_as_old_hub_repositories_have_it_loads(tmp_path: Path) -> None:
    """Pythia's on the Hub: float16, rotary settings at the top, buffers among the weights, pickled."""
    model = tiny_model(rotary_pct=0.5, rotary_emb_base=5000).to(torch.float16)
    folder = write_folder(model, tmp_path / "folder")
    edit_json(folder / "config.json", remove=("rope_parameters", "dtype", "sink", "attention_bias"))
    (folder / "model.safetensors").unlink()
    buffers = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    weights = model.state_dict() | buffers
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert_same_weights(loaded, model.to(torch.float32))


@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
@pytest.mark.parametrize("use_parallel_residual", [True, False])
@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_fast"])
def test_folder_saved_by_transformers_gives_its_logits(
    tmp_path: Path, rotary_pct: float, use_parallel_residual: bool, attention_bias: bool, hidden_act: str
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    changes = {
        "rotary_pct": rotary_pct,
        "use_parallel_residual": use_parallel_residual,
        "attention_bias": attention_bias,
        "hidden_act": hidden_act,
    }
    model = tiny_model(**changes)
    fields = to_transformers_config(model.config, None, 0)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**{key: fields[key] for key in fields if key != "sink"})).eval()
    weights = {name.replace("embed_out", "lm_head"): weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict(weights)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "rotary_pct" not in config or config["rotary_pct"] == rotary_pct
    loaded, tokens = load_model(tmp_path), random_tokens(97)
    assert loaded.config == model.config
    with torch.no_grad():
        assert (loaded(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_what_a_config_leaves_out_is_what_transformers_assumes() -> None:
    from transformers import GPTNeoXConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sparse = {"model_type": "gpt_neox", "vocab_size": 97, **sizes}
    full = GPTNeoXConfig(vocab_size=97, **sizes).to_dict()
    assert from_transformers_config(sparse, "config.json") == from_transformers_config(full, "config.json")


@pytest.mark.parametrize(("name", "said"), [("pythia-14m", 512), ("pythia-31m", 1024), ("pythia-70m", 2048)])
def test_pythia_was_trained_on_2048_whatever_its_hub_config_says(name: str, said: int) -> None:
    config = to_transformers_config(ModelConfig(replace(PYTHIA[name], max_position_embeddings=said)), 0, 0)
    del config["sink"]
    assert from_transformers_config(config, "config.json").network == PYTHIA[name]


def test_own_model_of_pythia_sizes_keeps_its_trained_length() -> None:
    own = ModelConfig(replace(PYTHIA["pythia-14m"], max_position_embeddings=512))
    assert from_transformers_config(to_transformers_config(own, None, 0), "config.json") == own


def test_describe_tells_what_the_checkpoint_knows(tmp_path: Path) -> None:
    run = write_run(tiny_model(), tmp_path / "sink")
    loose = write_checkpoint(tiny_model(), tmp_path / "step=3.ckpt")
    folder = write_folder(tiny_model(), tmp_path / "folder")
    facts = {"tokens_seen": 6400, "seed": 7, "arm": "sink"}
    assert describe(run) == ModelSource("sink", str(run), **facts)
    last = run / "checkpoints" / "last.ckpt"
    assert describe(last) == ModelSource("sink/last", str(last), **facts)
    assert describe(loose) == ModelSource("step=3", str(loose), **facts)
    assert describe(str(folder)) == ModelSource("folder", str(folder))


def test_checkpoint_facts_are_what_training_wrote(tmp_path: Path) -> None:
    model = tiny_model()
    facts = checkpoint_facts(write_checkpoint(model, tmp_path / "model.ckpt"))
    assert facts.items() >= {"tokens_seen": 6400, "seed": 7, "arm": "sink"}.items()
    assert ModelConfig.from_dict(facts["model"]) == model.config


def test_empty_model_has_the_shapes_and_no_weights() -> None:
    model = tiny_model()
    empty = empty_model(model.config)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())


def test_tokenizer_is_found_beside_every_form(tmp_path: Path) -> None:
    run = write_run(tiny_model(), tmp_path / "run")
    folder = write_folder(tiny_model(), tmp_path / "folder")
    assert find_tokenizer(run) is None
    for owner in (run, folder):
        (owner / "tokenizer.json").touch()
    assert find_tokenizer(run) == run
    assert find_tokenizer(run / "checkpoints" / "last.ckpt") == run
    assert require_tokenizer(folder) == folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Stands in for the Hub's client: gives a folder or raises, and tells what it was asked for."""

    def install(answer: Path | Exception) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def snapshot_download(repo_id: str, **options: Any) -> str:
            asked.append({"repo_id": repo_id, **options})
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    monkeypatch.chdir(tmp_path)
    return install


def test_hub_id_loads_safetensors_once_and_nothing_else(tmp_path: Path, hub: Callable[..., Any]) -> None:
    model = tiny_model(sink=PREFIX_SINKS[0])
    folder = write_folder(model, tmp_path / "snapshot")
    (folder / "tokenizer.json").touch()
    asked = hub(folder)
    assert_same_weights(load_model("org/safe-1.4b", revision="step1000"), model)
    assert describe("org/safe-1.4b", revision="step1000").name == "org/safe-1.4b"
    assert require_tokenizer("org/safe-1.4b", revision="step1000") == folder
    assert [(call["repo_id"], call["revision"]) for call in asked] == [("org/safe-1.4b", "step1000")]
    assert {"model.safetensors", "prefix_cache.safetensors"} <= set(asked[0]["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0]["allow_patterns"])


def test_hub_id_without_safetensors_loads_pickled_weights(tmp_path: Path, hub: Callable[..., Any]) -> None:
    model = tiny_model()
    folder = write_folder(model, tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    asked = hub(folder)
    assert_same_weights(load_model("org/pickled"), model)
    assert "pytorch_model.bin" in asked[1]["allow_patterns"]


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # httpx or, from hub 2 on, httpx2
    response = http.Response(404, request=http.Request("GET", "http://localhost"))
    kind = getattr(errors, name)
    return kind("404 Client Error\nlong story", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "is neither here nor on the Hub; mend the name"),
        ("GatedRepoError", "is gated; ask for access"),
        ("RevisionNotFoundError", "has no revision step7 on the Hub; use one of its branches"),
        ("HfHubHTTPError", "is not here, and the Hub does not give it: 404 Client Error"),
        (ConnectionError(), "is not here, and the Hub does not give it: ConnectionError"),
    ],
)
def test_hub_error_is_one_line(hub: Callable[..., Any], error: str | Exception, message: str) -> None:
    hub(hub_error(error) if isinstance(error, str) else error)
    with pytest.raises(ModelError, match=message) as caught:
        load_model("org/absent", revision="step7")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("org/absent ")


def test_hub_id_that_is_not_cached_is_one_line_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^org/uncached is not here, .* offline mode .*$"):
        load_model("org/uncached")


@pytest.mark.parametrize(
    "source",
    ["runs/sink", "./org/name", "../name", "folder/snik", "a/b/c", "name", "org/last.ckpt", Path("org/name")],
)
def test_mistyped_path_is_never_sent_to_the_hub(
    tmp_path: Path, hub: Callable[..., Any], source: str | Path
) -> None:
    (tmp_path / "folder").mkdir()
    asked = hub(RuntimeError("the Hub was asked"))
    with pytest.raises(ModelError, match=r"does not exist"):
        load_model(source)
    assert asked == []


def test_missing_path_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "vanilla").mkdir()
    with pytest.raises(ModelError, match=r'vanila does not exist; did you mean "vanilla"[?]; give'):
        load_model(tmp_path / "vanila")


def test_revision_of_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"revision step1 is for Hub ids and .* is a path; leave it out"):
        load_model(tmp_path, revision="step1")


def test_missing_tokenizer_says_where_it_belongs(tmp_path: Path) -> None:
    run = write_run(tiny_model(), tmp_path / "run")
    with pytest.raises(ModelError, match=rf"^{run} has no tokenizer; put the tokenizer.json .* into {run}$"):
        require_tokenizer(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, 'is of model_type "llama"; use a GPT-NeoX model'),
        ({"tie_word_embeddings": True}, "ties head and embedding"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, 'scales its rotary positions [(]"yarn"[)]'),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 'scales its rotary positions [(]"linear"[)]'),
        ({"hidden_act": "gelo"}, 'hidden_act "gelo" is not one of'),
        ({"num_attention_heads": 3}, "hidden_size 32 does not divide into 3 heads"),
        ({"hidden_size": "wide"}, "config.json: "),
        ({"sink": {"kind": "token", "count": 1, "token_ids": [97]}}, "sink token id 97 is outside"),
        ({"sink": {"kind": "token"}}, "config.json: "),
        ({"sink": {"kind": "zeros", "count": 1, "token_ids": []}}, 'sink.kind "zeros" is not'),
    ],
)
def test_unusable_config_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_folder(tiny_model(), tmp_path / "folder")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))


def test_incomplete_config_names_what_it_lacks(tmp_path: Path) -> None:
    folder = write_folder(tiny_model(), tmp_path / "folder")
    edit_json(folder / "config.json", remove=("hidden_size", "vocab_size"))
    with pytest.raises(ModelError, match=r"config.json lacks hidden_size, vocab_size; use a complete"):
        load_model(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_config_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config.json {message}"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = write_folder(
        tiny_model(), tmp_path / "folder", lambda name: name.replace("final_layer", "last_layer")
    )
    edit_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing: gpt_neox.final_layer_norm.weight, gpt_neox.final_layer_norm.bias; " in message
    assert "unexpected: gpt_neox.last_layer_norm.bias, gpt_neox.last_layer_norm.weight; " in message
    assert "mlp.dense_h_to_4h.weight is [128, 32], not [64, 32], " in message
    assert message.endswith(" and 3 more")


def test_shard_that_its_index_lists_must_be_there(tmp_path: Path) -> None:
    folder = write_folder(tiny_model(), tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights: neither model.safetensors nor"):
        load_model(folder)
    split_weights(folder, tiny_model().state_dict(), "model.safetensors", save_file)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lists model-00002-of-00002.safetensors, which is not there"):
        load_model(folder)


@pytest.mark.parametrize("listed", [{"a": "../outside.safetensors"}, {"a": 3}, {"a": ""}, ["a"], None])
def test_index_lists_files_of_its_own_folder_alone(tmp_path: Path, listed: Any) -> None:
    folder = write_folder(tiny_model(), tmp_path / "folder")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(
        ModelError, match=r"does not list files of its own folder|lists 3, which is not there"
    ):
        load_model(folder)


def test_damaged_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tiny_model(), tmp_path / "folder")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged: "):
        load_model(folder)


class Intruder:
    """A class that a checkpoint from elsewhere could smuggle in."""


@pytest.mark.parametrize(
    "content",
    ["", "not a checkpoint", "the text", "home made", "Gone", "cut off", "an object"],
)
def test_checkpoint_that_cannot_be_read_safely_is_refused(tmp_path: Path, content: str) -> None:
    """Texts begin with letters that the unpickler takes for commands; each fails in its own way."""
    path = write_checkpoint(tiny_model(), tmp_path / "model.ckpt")
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "an object":
        torch.save({"state_dict": Intruder()}, path)
    else:
        path.write_text(content)
    with pytest.raises(ModelError, match=r"model.ckpt is damaged, or holds more than tensors") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def write_steps(run: Path, *steps: int) -> Path:
    """A run folder with these checkpoints, and ``last.ckpt`` naming the newest, as training leaves it."""
    for step in steps:
        write_checkpoint(tiny_model(), run / "checkpoints" / f"step-{step:08d}.ckpt")
    (run / "checkpoints" / "last.ckpt").symlink_to(f"step-{max(steps):08d}.ckpt")
    return run


def cut_off(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("load", [load_model, describe])
@pytest.mark.parametrize(("damaged", "whole"), [([20], 10), ([20, 10], 5)])
def test_a_run_whose_newest_checkpoint_is_damaged_names_the_newest_one_that_is_not(
    load: Callable[[Path], object], damaged: list[int], whole: int, tmp_path: Path
) -> None:
    """It said to give a run folder, and was given one."""
    run = write_steps(tmp_path / "run", 5, 10, 20)
    for step in damaged:
        cut_off(run, step)
    with pytest.raises(ModelError) as caught:
        load(run)
    place = f"{run}/checkpoints"
    told = f"{place}/step-00000020.ckpt is damaged, or holds more than tensors and plain values; use "
    assert str(caught.value) == f"{told}{place}/step-{whole:08d}.ckpt"
    load(Path(str(caught.value).rpartition("; use ")[2]))


def test_a_damaged_checkpoint_is_not_replaced_by_a_later_one(tmp_path: Path) -> None:
    run = write_steps(tmp_path / "run", 5, 10, 20)
    cut_off(run, 10)
    with pytest.raises(ModelError, match=r"step-00000010.ckpt is damaged, .*; use .*/step-00000005.ckpt$"):
        load_model(run / "checkpoints" / "step-00000010.ckpt")
    cut_off(run, 5)
    with pytest.raises(ModelError, match=r"step-00000005.ckpt is damaged, .*; give a run folder, "):
        load_model(run / "checkpoints" / "step-00000005.ckpt")


def test_a_run_copied_without_links_names_a_whole_checkpoint_too(tmp_path: Path) -> None:
    run = write_steps(tmp_path / "run", 10, 20)
    last = run / "checkpoints" / "last.ckpt"
    last.unlink()
    last.write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"last.ckpt is damaged, .*; use .*/step-00000020.ckpt$"):
        load_model(run)


def test_a_run_whose_newest_checkpoint_is_gone_names_the_one_before(tmp_path: Path) -> None:
    run = write_steps(tmp_path / "run", 10, 20)
    (run / "checkpoints" / "step-00000020.ckpt").unlink()
    with pytest.raises(ModelError, match=r"/last.ckpt is gone; use .*/step-00000010.ckpt$"):
        load_model(run)


def test_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "global_step": 1}, path)
    with pytest.raises(ModelError, match=r"is not a checkpoint of sinktrain fit; give a run folder"):
        load_model(path)


def test_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tiny_model(), tmp_path / "later.ckpt", facts={"format_version": 2})
    with pytest.raises(ModelError, match=r"has checkpoint format 2, and this sinktrain reads format 1"):
        load_model(path)


@pytest.mark.parametrize(
    "value", [{}, {"network": {"novelty": 1}, "sink": {"kind": "none", "count": 0, "token_ids": []}}]
)
def test_checkpoint_of_an_unknown_network_is_refused(tmp_path: Path, value: dict[str, Any]) -> None:
    path = write_checkpoint(tiny_model(), tmp_path / "odd.ckpt", facts={"model": value})
    with pytest.raises(ModelError, match=r"odd.ckpt describes a model that this sinktrain cannot build: "):
        load_model(path)


def test_folder_and_file_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model: neither checkpoints/last.ckpt nor config.json"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"notes.txt is a file of another kind; give a run folder"):
        load_model(tmp_path / "notes.txt")
