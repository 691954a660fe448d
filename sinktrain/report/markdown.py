"""``results.md``: the verdict, the tables, what was measured and how to read it, for a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from sinktrain.report import findings, training_tables
from sinktrain.report.arm_tables import (
    ARM_NOTE,
    ROUNDING_NOTE,
    SEED_NOTE,
    arm_table,
    has_arms,
    rounding_table,
    seed_table,
)
from sinktrain.report.contests import main_pairs, own_rows
from sinktrain.report.loss_tables import (
    bits_table,
    difference_table,
    measurement_table,
    pair_table,
    perplexity_table,
    removal_table,
)
from sinktrain.report.paper import CITATION, paper_table
from sinktrain.report.probe_tables import (
    PROXY_NOTE,
    is_proxy,
    latency_table,
    norms_table,
    sink_table,
    streameval_table,
    verified_table,
)
from sinktrain.report.quantized_tables import NOTE, quantized_table, quantized_texts
from sinktrain.report.setting_tables import environment_table, model_table
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, printable
from sinktrain.report.zero_shot_tables import ABOUT, zero_shot_pair_table, zero_shot_table

MOST_ROWS = 60
"""Of one table: a pull request takes 65,536 characters."""


def results_markdown(results: Results) -> str:
    """The report as Markdown; what is long is folded away."""
    parts = ["# Streaming comparison", *map(escaped, findings.verdict_sentences(results))]
    if results["failed"]:
        parts += ["## Not measured", _bullets(findings.failures(results))]
    for text in findings.texts(results):
        parts += _arm_parts(results, text)
        parts += _text_parts(results, text)
    parts += [_folded("The paper's own figures", f"{escaped(CITATION)}.", table_markdown(paper_table()))]
    parts += _quantized_parts(results)
    parts += _probe_parts(results)
    parts += _training_parts(results)
    parts += ["## How to read it", " ".join(findings.READING)]
    if findings.limits(results):
        parts += ["## Limits", _bullets(findings.limits(results))]
    parts += ["## Models", table_markdown(model_table(results))]
    if results["environment"]:
        parts += [_folded("Environment", table_markdown(environment_table(results)))]
    return "\n\n".join(parts) + "\n"


def _arm_parts(results: Results, text: str) -> list[str]:
    if not has_arms(results):
        return []
    parts = [f"## Arms on {escaped(text)}", ARM_NOTE, table_markdown(arm_table(results, text))]
    over_seeds = seed_table(results, text)
    return [*parts, *[_folded("Over seeds", SEED_NOTE, table_markdown(over_seeds))] * bool(over_seeds.rows)]


def _text_parts(results: Results, text: str) -> list[str]:
    scored = [row for row in results["perplexity"] if row["text"] == text]
    parts = [
        f"## Perplexity on {escaped(text)}",
        f"{findings.tokens_scored(scored)}; in brackets the 95% interval of the loss in nats, over text.",
        table_markdown(perplexity_table(results, text)),
    ]
    if not findings.has_one_tokenizer(results):
        words = "Bits per byte, as the models' tokenizers differ and their perplexities can't be compared:"
        parts += [words, table_markdown(bits_table(results, text))]
    main, every = pair_table(main_pairs(results, text)), difference_table(results, text)
    if every.rows:
        parts += [
            "### Differences in loss",
            "Token by token on the same text; below zero, the first is better.",
            table_markdown(main),
        ]
        if len(main.rows) < len(every.rows) <= MOST_ROWS:
            parts.append(_folded(f"All {len(every.rows)} differences", table_markdown(every)))
    removals = removal_table(results, text)
    if removals.rows:
        words = "What the loss gains when first tokens are taken away, or made line breaks where they stand."
        parts += ["### Without the first tokens", words, table_markdown(removals)]
    return [*parts, _folded("All measurements", table_markdown(measurement_table(results, text)))]


def _quantized_parts(results: Results) -> list[str]:
    parts = []
    for text in quantized_texts(results):
        parts += [f"## Quantisation on {escaped(text)}", NOTE]
        every = table_markdown(quantized_table(results, text))
        if has_arms(results):
            parts += [ROUNDING_NOTE, table_markdown(rounding_table(results, text))]
            parts.append(_folded("Every model", every))
        else:
            parts.append(every)
    return parts


def _probe_parts(results: Results) -> list[str]:
    parts = []
    if sink_table(results).rows:
        bounds = ", ".join(f"{eps:g}" for eps in sorted({row["eps"] for row in results["sink_metric"]}))
        words = (
            "Sink metric: the share of heads that give a position more than "
            f"{bounds} of their attention, on average over the rows that see it. Null mass: the mean "
            "attention that no token gets. Untrained: the same network freshly initialised."
        )
        parts += ["## Sinks inside the models", words, table_markdown(sink_table(results))]
        parts += [escaped(PROXY_NOTE)] * any(map(is_proxy, results["sink_attention"]))
    if norms_table(results).rows:
        words = "Untrained values in brackets; layer 0 is the embedding."
        parts += [_folded("Norms and outliers by layer", words, table_markdown(norms_table(results)))]
    main, every = (
        streameval_table({**results, "streameval": rows})
        for rows in (own_rows(results, results["streameval"]), results["streameval"])
    )
    if every.rows:
        words = "Accuracy by the lines between an answer and its question, with 95% intervals."
        parts += ["## Answers from the stream", words, table_markdown(main)]
        if len(main.rows) < len(every.rows) <= MOST_ROWS:
            parts.append(_folded("Answers under all layouts", table_markdown(every)))
    parts += _zero_shot_parts(results)
    if latency_table(results).rows:
        words = "Milliseconds a token, median and 95th percentile, by stream position."
        parts += ["## Time and memory", words, table_markdown(latency_table(results))]
    if verified_table(results).rows:
        words = "Blockwise evaluation checked against stepping token by token"
        parts += [_folded(words, table_markdown(verified_table(results)))]
    return parts


def _training_parts(results: Results) -> list[str]:
    table = training_tables.training_table(results)
    parts = ["## Training", training_tables.NOTE, table_markdown(table)] if table.rows else []
    for metric in training_tables.EMERGING:
        table = training_tables.emergence_table(results, metric)
        if table.rows:
            parts += [f"{training_tables.CAPTIONS[metric]} (by tokens seen)", table_markdown(table)]
    return parts


def _zero_shot_parts(results: Results) -> list[str]:
    table, differences = zero_shot_table(results), zero_shot_pair_table(results)
    parts = ["## Tasks of lm-evaluation-harness", ABOUT, table_markdown(table)] if table.rows else []
    return [*parts, *[table_markdown(differences)] * bool(differences.rows)]


def _folded(summary: str, *parts: str) -> str:
    return "\n\n".join([f"<details><summary>{escaped(summary)}</summary>", *parts, "</details>"])


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def table_markdown(table: Table) -> str:
    """A table of at most ``MOST_ROWS`` rows, and how many more there are."""
    rule = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.header))]
    rows = (table.header, rule, *table.rows[:MOST_ROWS])
    more = len(table.rows) - MOST_ROWS
    return "\n".join(f"| {' | '.join(map(escaped, row))} |" for row in rows) + (
        f"\n\n{more} more in results.json." if more > 0 else ""
    )


def escaped(text: str) -> str:
    """Plain text that Markdown shows as it stands."""
    text = printable(text)
    for mark in "\\`*_[]|~<&":
        text = text.replace(mark, "\\" + mark)
    return text
