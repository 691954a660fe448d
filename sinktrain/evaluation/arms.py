"""One model, measured: its losses under every setting on every text, and what else is asked of it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sinktrain import __version__
from sinktrain.errors import ModelError, StreamError
from sinktrain.evaluation.harness_tasks import HarnessTasks, harness_rows
from sinktrain.evaluation.latency import latency
from sinktrain.evaluation.perplexity import Measured, Setting, dense_bytes, measure, settings_for
from sinktrain.evaluation.quantized import Quantization
from sinktrain.evaluation.quantizers import SCHEMES
from sinktrain.evaluation.removal import removal_rows
from sinktrain.evaluation.store import Store
from sinktrain.evaluation.streameval import streameval
from sinktrain.evaluation.telemetry import telemetry
from sinktrain.evaluation.texts import TokenizedText
from sinktrain.evaluation.timing import free_bytes
from sinktrain.evaluation.verify import verify
from sinktrain.model.checkpoints import ModelSource, load_model
from sinktrain.model.devices import dtype_name
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.progress import progress_bar
from sinktrain.streaming.decoder import fingerprint
from sinktrain.streaming.layout import VANILLA_SINKS, Layout
from sinktrain.training.metrics_table import MetricsTable, curves
from sinktrain.training.run import RunFolder

TASKS = ("telemetry", "removal", "latency", "streameval", "access")
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What every model of a comparison is measured for.

    Args:
        layouts: of the table; all models' rows score the tokens from the longest's N on.
        policies: of ``streaming``, ``dense``, ``recompute``.
        tasks: of ``TASKS``.
        recompute_tokens: that ``recompute`` scores.
        verify_tokens: that the decoder is stepped over to check the blockwise evaluation; 0 for none.
        device, dtype: where and in what the models run.
        out: measurements are kept in its folder ``measured``.
        schemes: of ``quantizers.SCHEMES``.
        harness: tasks of lm-evaluation-harness.
    """

    layouts: list[Layout]
    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    recompute_tokens: int
    verify_tokens: int
    device: str
    dtype: torch.dtype
    out: Path
    schemes: tuple[str, ...] = ()
    harness: HarnessTasks = field(default_factory=HarnessTasks)

    @property
    def first_scored(self) -> int:
        return max(layout.num_slots for layout in self.layouts)


@dataclass(frozen=True)
class Streams:
    """A text as one model's tokens, cut into parallel streams: int64[stream, token]."""

    name: str
    text: TokenizedText
    tokens: NDArray[np.int64]

    @cached_property
    def digest(self) -> str:
        """What tells these streams from others."""
        shape = np.array(self.tokens.shape, dtype="<i8")
        data = shape.tobytes() + self.tokens.astype("<i8").tobytes()
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Arm:
    """A measured model.

    Args:
        facts: its row of ``models[]``.
        texts: what it was measured on.
        measured: by text, under each setting, in the table's order.
        rows: of the other lists of ``results.json``, by list.
    """

    facts: Row
    texts: list[Streams]
    measured: list[list[Measured]]
    rows: dict[str, list[Row]]

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def tokenizer(self) -> str:
        return self.texts[0].text.tokenizer.sha256

    @property
    def needed_sinks(self) -> int:
        """The fewest slots that the model should keep: its own sinks, or one."""
        return max(1, int(self.facts["sink"]["count"]))

    @property
    def usual_sinks(self) -> int:
        """Slots that a stream of it keeps unless told otherwise: its own sinks, or the paper's four."""
        return int(self.facts["sink"]["count"]) or VANILLA_SINKS


def measure_arm(source: ModelSource, texts: list[Streams], plan: Plan) -> Arm:
    """Measure a model, or find what was measured before by the same plan.

    Raises:
        SinktrainError: the model cannot be loaded or measured.
    """
    model = load_model(source.source, plan.device, plan.dtype)
    store = Store(plan.out / "measured", _identity(model, plan))
    measured = [_losses(model, source, text, plan, store) for text in texts]
    rows = _probed(model, source, texts, plan, store)
    return Arm(_facts(source, model, texts[0]), texts, measured, rows)


def _identity(model: GPTNeoX, plan: Plan) -> Row:
    return {
        "sinktrain": __version__,
        "model": fingerprint(model).numpy().tobytes().hex(),
        "device": plan.device,
        "dtype": dtype_name(plan.dtype),
    }


def _facts(source: ModelSource, model: GPTNeoX, text: Streams) -> Row:
    return {
        "name": source.name,
        "source": source.source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sink": model.config.sink.to_dict(),
        "sink_about": KINDS[model.config.sink.kind].about,
        "tokens_seen": source.tokens_seen,
        "seed": source.seed,
        "arm": source.arm,
        "tokenizer": text.text.tokenizer.sha256,
        "trained_length": model.config.network.max_position_embeddings,
    }


# -- losses ---------------------------------------------------------------------------------------


def _losses(model: GPTNeoX, source: ModelSource, text: Streams, plan: Plan, store: Store) -> list[Measured]:
    stream_len = text.tokens.shape[1] + len(model.sink_ids)
    settings = settings_for(plan.policies, plan.layouts, stream_len, len(model.sink_ids))
    settings = _affordable(settings, model, len(text.tokens), stream_len, source.name)
    found = []
    with progress_bar(total=len(settings), desc=f"{source.name} on {text.name}", unit="row") as bar:
        for setting in settings:
            losses = store.losses(_name(setting, text, plan), _measuring(model, source, text, setting, plan))
            found.append(Measured(setting, losses, plan.first_scored, len(model.sink_ids)))
            bar.update()
    return found


def _name(setting: Setting, text: Streams, plan: Plan) -> str:
    """What tells a measurement from others of the same model: text, setting, and what is scored."""
    name = f"{setting.policy}-{setting.layout}-{text.digest}"
    return f"{name}-{plan.first_scored}-{plan.recompute_tokens}" if setting.policy == "recompute" else name


def _measuring(
    model: GPTNeoX, source: ModelSource, text: Streams, setting: Setting, plan: Plan
) -> Callable[[], NDArray[np.float64]]:
    def losses() -> NDArray[np.float64]:
        [measured] = measure(model, text.tokens, [setting], plan.first_scored, plan.recompute_tokens)
        if not np.isfinite(measured.losses[:, 1:]).all() and setting.policy != "recompute":
            raise ModelError(
                f"{source.source} gives losses that are not finite: its weights are damaged, its "
                "training diverged, or the text holds its sink"
            )
        return measured.losses

    return losses


def _affordable(
    settings: list[Setting], model: GPTNeoX, num_streams: int, stream_len: int, name: str
) -> list[Setting]:
    """Leave out the dense row where its cache does not fit into the device's memory, and say so."""
    affordable = [setting for setting in settings if setting.policy != "dense"]
    needed, free = dense_bytes(model, num_streams, stream_len), free_bytes(model.device)
    if needed < 0.5 * free or affordable == settings:
        return settings
    problem = (
        f"{num_streams} streams of {stream_len} tokens need {needed / 2**30:.1f} GiB "
        f"of {free / 2**30:.1f}; use a smaller --max-tokens to see it"
    )
    if not affordable:
        raise StreamError(f"{name}: dense does not fit: {problem}")
    print(f"{name}: dense left out: {problem}", file=sys.stderr)
    return affordable


# -- everything else ------------------------------------------------------------------------------


def _probed(
    model: GPTNeoX, source: ModelSource, texts: list[Streams], plan: Plan, store: Store
) -> dict[str, list[Row]]:
    """Rows of the lists beside the losses; telemetry is taken on the first text."""
    layouts = ",".join(map(str, plan.layouts))
    rows: dict[str, list[Row]] = {"training": _course(Path(source.source))}
    if "telemetry" in plan.tasks:
        rows |= store.rows(f"telemetry-{texts[0].digest}", lambda: _telemetry(model, source, texts[0]))
    if "removal" in plan.tasks:
        rows["removal"] = [
            {"text": text.name} | row
            for text in texts
            for row in store.rows(f"removal-{layouts}-{text.digest}", _removing(model, text, plan))
        ]
    questions = tuple(task for task in plan.tasks if task in ("streameval", "access"))
    if questions:
        tokenizer = texts[0].text.tokenizer
        rows["streameval"] = store.rows(
            f"{'-'.join(questions)}-{layouts}-{tokenizer.sha256[:16]}",
            lambda: streameval(model, tokenizer, plan.layouts, questions),
        )
    if plan.harness.loaded:
        rows |= harness_rows(model, source.source, texts[0].text.tokenizer, plan.harness, store)
    if plan.schemes:
        rows["quantized"] = [row for text in texts for row in _quantized(source, text, plan, store)]
    if "latency" in plan.tasks:  # of this machine, now: never taken from another time
        rows["latency"] = latency(model, plan.layouts, plan.policies)
    if plan.verify_tokens:
        rows["verified"] = [
            {"text": texts[0].name} | row
            for row in verify(model, texts[0].tokens, plan.layouts, plan.verify_tokens)
        ]
    return {name: [{"model": source.name} | row for row in some] for name, some in rows.items()}


def _course(run: Path) -> list[Row]:
    """How training went, of a run's folder; of another MODEL nothing is known."""
    found = curves(MetricsTable(run / "metrics.csv").rows())
    return [{"hardware": RunFolder(run).read_hardware()} | curve for curve in found]


def _telemetry(model: GPTNeoX, source: ModelSource, text: Streams) -> dict[str, list[Row]]:
    trained_length = model.config.network.max_position_embeddings
    return asdict(telemetry(model, text.tokens, trained_length, source.seed or 0))


def _quantized(source: ModelSource, text: Streams, plan: Plan, store: Store) -> list[Row]:
    """One scheme after the other, in float32 where the plan has half precision."""
    dtype = plan.dtype if plan.dtype == torch.float64 else torch.float32
    num_slots = plan.first_scored
    study = Quantization(lambda: load_model(source.source, plan.device, dtype), text.tokens, num_slots)
    rows: list[Row] = []
    with progress_bar(total=len(plan.schemes), desc=f"{source.name} quantised", unit="scheme") as bar:
        for name in plan.schemes:
            measured = partial(study.rows, SCHEMES[name])
            kept = store.rows(f"quantized-{name}-{num_slots}-{text.digest}", measured)
            rows += [{"text": text.name} | row for row in kept]
            bar.update()
    return rows


def _removing(model: GPTNeoX, text: Streams, plan: Plan) -> Callable[[], list[Row]]:
    newline_ids = text.text.tokenizer.encode("\n")
    return lambda: removal_rows(model, text.tokens, plan.layouts, newline_ids)
