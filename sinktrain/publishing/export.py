"""A model as a Hugging Face folder, checked with plain transformers before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sinktrain.data.tokenizer import Tokenizer, load_tokenizer, sink_token_name
from sinktrain.errors import ExportError, first_line
from sinktrain.files import atomic_path, write_json, write_text
from sinktrain.model.checkpoints import CHECKPOINT_KEY, ModelSource, describe, find_tokenizer, load_model
from sinktrain.model.devices import dtype_name
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS, Loading
from sinktrain.model.transformers_format import CODE_FILE, to_transformers_config, to_transformers_weights
from sinktrain.publishing.card import CardOptions, model_card
from sinktrain.publishing.card_compared import read_compared
from sinktrain.publishing.card_metadata import licence_id
from sinktrain.publishing.card_results import PICTURE_FILE
from sinktrain.publishing.card_run import read_training
from sinktrain.publishing.prefix_cache import behind_sink, sink_cache

CHECKED_LENGTHS = (1, 2, 33, 256)
CHECKED_STEPS = 8
ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5  # of the largest logit: float32 keeps no more of logits beyond 10
CHECKED_TEXTS = ("A first line.", "A second one, longer, so that the first is padded.")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        folder: where it is.
        loads_as: how transformers loads it.
        max_logit_diff: largest difference between transformers' logits and ours, float32 on the CPU.
        has_tokenizer: whether tokenizer files are in it; a model without a tokenizer has none to give.
    """

    folder: Path
    loads_as: Loading
    max_logit_diff: float
    has_tokenizer: bool


def export(
    source: str | Path,
    out: str | Path,
    card: CardOptions | None = None,
    revision: str | None = None,
    dtype: str = "float32",
) -> Exported:
    """Write ``source``, any form of MODEL, to the new folder ``out`` in transformers' format.

    The folder appears complete and checked, or not at all.

    Args:
        card: what its README.md says besides what the model itself tells.
        revision: branch, tag or commit of a Hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``, which the weights are rounded to; logits are checked
            in float32, from the rounded weights.

    Raises:
        ModelError, DataError: the model or its tokenizer cannot be read.
        ConfigError: the results for the card cannot be read.
        ExportError: ``out`` is taken or cannot be written, the tokenizer is another model's, there is no way
            to load the sink, transformers does not give our logits and tokens, or what the card is to say is
            not so: results of other models, a licence that is none.
    """
    out, card = Path(out).expanduser().resolve(), card or CardOptions()
    _check_free(out)
    if card.licence is not None:
        licence_id(card.licence)
    written: torch.dtype = getattr(torch, dtype)
    model = _rounded(load_model(source, revision=revision), written, source)
    loads_as = _way_to_load(model.config.sink.kind)
    tokenizer_folder = find_tokenizer(source, revision)
    tokenizer = load_tokenizer(str(tokenizer_folder)) if tokenizer_folder else None
    if tokenizer:
        _check_belongs(tokenizer, model, source)
    origin, training = describe(source, revision), read_training(source, revision)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    compared = read_compared(card.results, origin, model.config, num_parameters) if card.results else None
    made = model_card(out.name, model.config, num_parameters, origin, card, training, compared)
    with _folder_in_making(out) as folder:
        _write_model(folder, model, tokenizer, origin, training.facts, written)
        if tokenizer:
            _write_tokenizer(folder, model, tokenizer)
        write_text(folder / "README.md", made.text)
        if made.picture:
            write_text(folder / PICTURE_FILE, made.picture)
        with _quiet_transformers():
            max_logit_diff = _check_logits(folder, model, loads_as)
            if tokenizer:
                _check_tokenizer(folder, model, tokenizer)
    return Exported(out, loads_as, max_logit_diff, tokenizer is not None)


def _rounded(model: GPTNeoX, dtype: torch.dtype, source: str | Path) -> GPTNeoX:
    """The float32 model with weights that ``dtype`` holds exactly."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ExportError(
                f"{source} is damaged: {name} holds what is no finite number; use another checkpoint"
            )
        weight.data = weight.data.to(dtype).float()
        if not weight.isfinite().all():
            raise ExportError(
                f"--dtype {dtype_name(dtype)} is too narrow for {name} of {source}; use float32 or bfloat16"
            )
    return model


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ExportError(f"{out} is there already and stays as it is; name a new folder or remove that one")


def _way_to_load(kind: str) -> Loading:
    """How transformers loads a sink of this kind."""
    loads_as = KINDS[kind].loads_as
    if loads_as == "code":
        from sinktrain.publishing import modeling_sinktrain

        if kind not in modeling_sinktrain.SINKS:
            raise ExportError(
                f'sink.kind "{kind}" loads by {CODE_FILE}, which does not know it; '
                f"add it to SINKS in {modeling_sinktrain.__file__}"
            )
    return loads_as


def _check_belongs(tokenizer: Tokenizer, model: GPTNeoX, source: str | Path) -> None:
    remedy = "put there the tokenizer that it was trained with"
    num_rows = model.config.vocab_size
    if tokenizer.vocab_size > num_rows:
        raise ExportError(
            f"{source} has a tokenizer of {tokenizer.vocab_size} ids but {num_rows} rows for them; {remedy}"
        )
    reserved = list(tokenizer.sink_token_ids[: len(model.sink_ids)])
    if model.sink_ids != reserved:
        raise ExportError(
            f"{source} has the sinks {model.sink_ids} but its tokenizer keeps {reserved} for them; {remedy}"
        )


@contextmanager
def _folder_in_making(out: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes ``out`` on success and is gone otherwise."""
    home = next(parent for parent in out.parents if parent.exists())
    folder = home / f".{out.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir()
        yield folder
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(out)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise ExportError(f"{out} cannot be written: {reason}; name another folder") from error
    except SafetensorError as error:  # so it says of a full disk
        raise ExportError(f"{out} cannot be written: {first_line(error)}; name another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_model(
    folder: Path,
    model: GPTNeoX,
    tokenizer: Tokenizer | None,
    origin: ModelSource,
    more_facts: dict[str, str],
    dtype: torch.dtype,
) -> None:
    bos = model.sink_ids[-1] if model.sink_ids else None
    eos = tokenizer.eos_token_id if tokenizer else None
    config = to_transformers_config(model.config, bos, eos, dtype)
    facts = {key: value for key, value in asdict(origin).items() if key not in ("name", "source")}
    write_json(folder / "config.json", config | {CHECKPOINT_KEY: facts | more_facts})
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
        | {"suppress_tokens": _never_generated(model, tokenizer)},
    )
    for name, weights in to_transformers_weights(model).items():
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        _write_weights(folder / name, weights, mode=(folder / "config.json").stat().st_mode)
    if KINDS[model.config.sink.kind].loads_as == "code":
        write_text(folder / CODE_FILE, Path(__file__).with_name(CODE_FILE).read_text(encoding="utf-8"))


def _write_weights(file: Path, weights: dict[str, Tensor], mode: int) -> None:
    from safetensors.torch import save_file

    with atomic_path(file) as path:
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets the owner alone read it


def _never_generated(model: GPTNeoX, tokenizer: Tokenizer | None) -> list[int] | None:
    """Ids without a text: the sinks and the rows of padding; null stands for none."""
    ids = list(range(tokenizer.vocab_size, model.config.vocab_size)) if tokenizer else model.sink_ids
    return ids or None


def _write_tokenizer(folder: Path, model: GPTNeoX, tokenizer: Tokenizer) -> None:
    num_sinks = len(model.sink_ids)
    write_text(folder / "tokenizer.json", tokenizer.with_sinks(num_sinks).to_str(pretty=True))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # 4.57 does not know the name that 5 writes
            "bos_token": sink_token_name(num_sinks - 1) if num_sinks else None,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.eos_token,
            "padding_side": "left",
            "model_max_length": model.config.network.max_position_embeddings,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
    )


def _check_logits(folder: Path, model: GPTNeoX, loads_as: Loading) -> float:
    """Largest difference of logits on random tokens; ExportError if it is more than rounding."""
    theirs = _load_in_transformers(folder, loads_as)
    generator = torch.Generator().manual_seed(0)
    largest, tolerance = 0.0, ABSOLUTE_TOLERANCE
    for length in CHECKED_LENGTHS:
        seq = min(length, model.config.network.max_position_embeddings)
        tokens = torch.randint(model.config.vocab_size, (2, seq), generator=generator)
        with torch.inference_mode():
            continued, found = _their_logits(theirs, tokens, loads_as)
            ours = model(continued)[:, :-1]
        largest = max(largest, (found - ours).abs().max().nan_to_num(torch.inf).item())
        tolerance = max(tolerance, RELATIVE_TOLERANCE * ours.abs().max().item())
    if largest > tolerance:
        raise ExportError(
            f"transformers' logits differ from ours by {largest:.2g}, more than {tolerance:.2g}; "
            "nothing was written: please report it, with the model's config"
        )
    return largest


def _load_in_transformers(folder: Path, loads_as: Loading) -> Any:
    options = {"dtype": torch.float32, "local_files_only": True}
    if loads_as == "code":
        # The file that the folder has a copy of: trust_remote_code would leave one more in the user's cache.
        from sinktrain.publishing.modeling_sinktrain import SinktrainForCausalLM

        return SinktrainForCausalLM.from_pretrained(folder, **options)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _their_logits(theirs: Any, tokens: Tensor, loads_as: Loading) -> tuple[Tensor, Tensor]:
    """Logits of all tokens at once, and then of each that is generated from them, but the last.

    Args:
        tokens: int64[batch, seq].

    Returns:
        The tokens with those generated, int64[batch, seq + steps], and the logits, one position less.
    """

    def sink() -> dict[str, Any]:
        return {"past_key_values": sink_cache(theirs, len(tokens))} if loads_as == "prefix" else {}

    at_once = theirs(tokens, **sink()).logits
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    generated = theirs.generate(
        **(behind_sink(prompt) if loads_as == "prefix" else prompt),
        **sink(),
        max_new_tokens=CHECKED_STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    continued = generated.sequences[:, -tokens.shape[1] - len(generated.logits) :]
    return continued, torch.cat((at_once, *(logits[:, None] for logits in generated.logits[1:])), dim=1)


def _check_tokenizer(folder: Path, model: GPTNeoX, tokenizer: Tokenizer) -> None:
    """ExportError unless a text, a pair and a padded batch each start with the sinks, and hold them once."""
    from transformers import AutoTokenizer

    # Unless told no, it asks at the terminal whether to run a model's code, which no tokenizer needs.
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    first, second = tokenizer.encode_batch(list(CHECKED_TEXTS))
    batch = theirs(list(CHECKED_TEXTS), padding=True)
    rows = [
        [token for token, is_seen in zip(ids, mask, strict=True) if is_seen]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    pair = theirs(*CHECKED_TEXTS)["input_ids"]
    expected = [model.sink_ids + ids for ids in (first, second, first + second)]
    if [*rows, pair] != expected:
        raise ExportError(
            f"transformers' tokens differ from ours: {[*rows, pair]}, not {expected}; "
            "nothing was written: please report it, with the tokenizer's name"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice while our own folder is read back."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
