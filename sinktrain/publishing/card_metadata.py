"""The metadata on top of a model card, as huggingface_hub writes and checks it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sinktrain.errors import ExportError
from sinktrain.model.config import SinkConfig
from sinktrain.model.sinks.base import KINDS
from sinktrain.publishing.card_compared import Compared
from sinktrain.publishing.card_run import Training
from sinktrain.report.wording import layout_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def licence_id(licence: str) -> str:
    """The Hub's spelling of an SPDX id: ``apache-2.0``.

    Raises:
        ExportError: it has not the form of one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", licence):
        raise ExportError(
            f'--license "{licence}" is no SPDX id; use one such as apache-2.0, mit or cc-by-4.0'
        )
    return licence.lower()


def metadata(
    name: str, sink: SinkConfig, licence: str | None, training: Training, compared: Compared | None
) -> str:
    """The YAML block, its fences included; what is not known is not in it.

    Args:
        name: of the model in ``model-index``.
    """
    from huggingface_hub import ModelCardData

    tags = ["gpt_neox", "sinktrain"]
    tags += ["attention-sink"] * (sink.kind != "none")
    tags += ["custom_code"] * (KINDS[sink.kind].loads_as == "code")
    corpus = training.corpus
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        license=None if licence is None else licence_id(licence),
        base_model=training.base_model,
        datasets=[corpus.name] if corpus and corpus.is_dataset else None,
        model_name=name,
        eval_results=_eval_results(compared) if compared else None,
    )
    if not data.eval_results:
        data.pop("model_name")
        data.pop("eval_results")
        data["eval_results"] = None
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(compared: Compared) -> list[EvalResult]:
    """Perplexities of the streaming layouts, each with the loss behind it and its interval."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name=f"Streaming language modelling, {row['tokens_scored']:,} tokens",
            dataset_type=re.sub(r"[^\w./-]+", "-", row["text"]),
            dataset_name=row["text"],
            metric_type="perplexity",
            metric_name=f"perplexity, {layout_name(row)}",
            metric_value=row["perplexity"],
            metric_args={
                "sinks": row["sinks"],
                "window": row["window"],
                "loss_nats": row["loss_nats"],
                "loss_ci95_nats": list(row["ci95"]),
            },
        )
        for row in compared.rows
        if row["policy"] == "streaming"
    ]
