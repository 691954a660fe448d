"""The sections of the page, in order; one without rows is left out."""

from __future__ import annotations

from sinktrain.report import findings, training_tables, wording
from sinktrain.report.arm_tables import (
    ARM_NOTE,
    ROUNDING_NOTE,
    SEED_NOTE,
    arm_table,
    has_arms,
    rounding_table,
    seed_table,
)
from sinktrain.report.contests import main_pairs
from sinktrain.report.figures import differences, heat, inside, losses, quantized, streams, training
from sinktrain.report.figures.source import all_texts, drawn_models
from sinktrain.report.figures.spec import Figure
from sinktrain.report.glossary import WORDS
from sinktrain.report.loss_tables import (
    bits_cell,
    difference_table,
    measurement_table,
    pair_table,
    perplexity_cell,
    perplexity_cells,
    removal_table,
)
from sinktrain.report.markup import bullets, closed, html_text, plots, soft, table_html
from sinktrain.report.paper import CITATION, paper_table
from sinktrain.report.probe_tables import (
    PROXY_NOTE,
    is_null,
    is_proxy,
    latency_table,
    norms_table,
    sink_table,
    streameval_table,
    verified_table,
)
from sinktrain.report.quantized_tables import (
    NOTE,
    quantized_measurement_table,
    quantized_table,
    quantized_texts,
)
from sinktrain.report.setting_tables import environment_table, model_table
from sinktrain.report.wording import Results, Row
from sinktrain.report.zero_shot_tables import ABOUT, zero_shot_pair_table, zero_shot_table

Section = tuple[str, str]  # heading, HTML


def sections(results: Results) -> list[Section]:
    """What the page says below the verdict."""
    texts = all_texts(results)
    found = [
        *(_arm_section(results, text) for text in texts),
        *(_perplexity_section(results, text) for text in texts),
        *(_difference_section(results, text) for text in texts),
        *(_position_section(results, text) for text in texts),
        *(_gap_section(results, text) for text in texts),
        _removal_section(results),
        _quantized_section(results),
        _inside_section(results),
        _recall_section(results),
        _zero_shot_section(results),
        _cost_section(results),
        _training_section(results),
        ("How to read it", _reading(results)),
        ("How it was measured", _settings(results)),
    ]
    return [section for section in found if section is not None]


def _arm_section(results: Results, text: str) -> Section | None:
    if not has_arms(results):
        return None
    content = soft(ARM_NOTE) + table_html(arm_table(results, text), f"Arms on {text}")
    over_seeds = seed_table(results, text)
    if over_seeds.rows:
        table = table_html(over_seeds, f"Arms over seeds on {text}")
        content += closed("Over seeds", soft(SEED_NOTE), table)
    return f"Arms on {text}", content


# -- losses -----------------------------------------------------------------------------------------


def _perplexity_section(results: Results, text: str) -> Section | None:
    scored = [row for row in results["perplexity"] if row["text"] == text]
    if not scored:
        return None
    has_intervals = findings.has_one_tokenizer(results)
    below = "the 95% interval of the loss in nats" if has_intervals else "bits per byte, as tokenizers differ"
    parts = [soft(f"{findings.tokens_scored(scored)}. Below each perplexity, {below}.")]
    lengths = {wording.num_slots(row) for row in scored if row["policy"] != "dense"} or {0}
    parts += [_perplexity_table(results, text, length) for length in sorted(lengths, reverse=True)]
    parts += [
        closed(
            "The paper's own figures, for reference",
            soft(f"{CITATION}."),
            table_html(paper_table(), "Perplexities in the paper"),
            is_open=text == findings.texts(results)[0],
        ),
        plots(losses.loss_figures(results, text)),
        closed("All measurements", table_html(measurement_table(results, text), f"Measured on {text}")),
    ]
    return f"Perplexity on {text}", "".join(parts)


def _perplexity_table(results: Results, text: str, length: int) -> str:
    """Models by the layouts of one length, and dense; two lines in each cell."""
    rows = [
        row for row in results["perplexity"] if row["policy"] == "dense" or wording.num_slots(row) == length
    ]
    chosen = {**results, "perplexity": rows}
    second = _interval_cell if findings.has_one_tokenizer(results) else bits_cell
    upper = perplexity_cells(chosen, text, perplexity_cell)
    lower = perplexity_cells(chosen, text, second)
    cells = [
        [html_text(above[0]), *(f"{a}<small>{b}</small>" for a, b in zip(above[1:], below[1:], strict=True))]
        for above, below in zip(upper.rows, lower.rows, strict=True)
    ]
    return table_html(upper, f"Perplexity on {text} by model and layout, N = {length}", cells)


def _interval_cell(row: Row) -> str:
    return wording.loss_interval_text(row, joiner="\N{EN DASH}")


def _difference_section(results: Results, text: str) -> Section | None:
    every = difference_table(results, text)
    if not every.rows:
        return None
    figures = [
        *differences.seed_figures(results, text),
        *differences.model_figures(results, text),
        *differences.policy_figures(results, text),
    ]
    parts = [
        soft("Token by token on the same text; below zero, the first is better."),
        table_html(pair_table(main_pairs(results, text)), f"Main differences in loss on {text}"),
        plots(figures),
        closed(f"All {len(every.rows)} differences", table_html(every, f"All differences in loss on {text}")),
    ]
    return f"Differences on {text}", "".join(parts)


def _position_section(results: Results, text: str) -> Section | None:
    words = (
        "Means over bins of positions that grow by a constant factor; all panels on the same scale. What "
        "all lines share is the difficulty of the text; what tells is the distance between lines. The dotted "
        "line marks the first eviction."
    )
    figures = losses.position_figures(results, text)
    return _plotted(f"Loss by position on {text}", words + _one_seed(results), figures)


def _gap_section(results: Results, text: str) -> Section | None:
    words = "What each model gains by spending x of its N places on the first tokens of the stream."
    figures = differences.gap_figures(results, text)
    return _plotted(f"First tokens kept, on {text}", words + _one_seed(results), figures)


def _removal_section(results: Results) -> Section | None:
    words = (
        "What it costs to take a model's first tokens away, and to put line breaks in the place of those "
        "that it keeps. Where the one costs much and the other little, position makes the sink, not meaning."
    )
    parts = []
    for text in all_texts(results):
        figures = streams.removal_figures(results, text)
        if not figures:
            continue
        table = table_html(removal_table(results, text), f"Removal and replacement on {text}")
        parts += [plots(figures), closed(f"Removal and replacement on {text} in numbers", table)]
    return ("Removal and replacement", soft(words) + "".join(parts)) if parts else None


def _quantized_section(results: Results) -> Section | None:
    parts = []
    for text in quantized_texts(results):
        rows = [row for row in results["quantized"] if row["text"] == text]
        label = f"Loss added by quantisation on {text}"
        if has_arms(results):
            table = soft(ROUNDING_NOTE) + table_html(rounding_table(results, text), label)
        else:
            table = table_html(quantized_table(results, text), label)
        every = table_html(quantized_measurement_table(rows), f"Losses with and without it, on {text}")
        figures = plots(quantized.quantized_figures(results, text))
        parts += [table, figures, closed(f"Quantisation on {text} in numbers", every)]
    return ("Quantisation", soft(NOTE + _one_seed(results)) + "".join(parts)) if parts else None


# -- what happens inside, what a stream can do, what it costs ---------------------------------------


def _inside_section(results: Results) -> Section | None:
    parts = []
    if metric := inside.metric_figures(results):
        words = "Filled: trained. Open: the same network before training. Stars: the model's own sinks."
        if any(map(is_null, results["sink_metric"])):
            words += " At -1, the null slot of a model that has one."
        has_proxy = any(map(is_proxy, results["sink_attention"]))
        summary = closed(
            "Sinks in numbers",
            table_html(sink_table(results), "Sinks inside the models"),
            *[soft(PROXY_NOTE)] * has_proxy,
        )
        parts += ["<h3>The sink metric</h3>", soft(words), plots(metric), summary]
    heats = [
        plots(heat.heat_figures(results, model))
        for model in results["models"]
        if model["name"] in drawn_models(results)
    ]
    if any(heats):
        words = "One cell a head; the trained model and, beside it, the same network before training."
        parts += ["<h3>Attention by layer and head</h3>", soft(words + _one_seed(results)), *heats]
    if norms := inside.norm_figures(results):
        words = "Outliers sit where the sink is: sizes with the first position and without it."
        summary = closed("Sizes in numbers", table_html(norms_table(results), "Norms and outliers"))
        parts += ["<h3>Sizes by layer</h3>", soft(words + _one_seed(results)), plots(norms), summary]
    return ("Inside the models", "".join(parts)) if parts else None


def _recall_section(results: Results) -> Section | None:
    words = (
        "Questions about a line some way back in the stream. What the window has dropped cannot be known: "
        "past it, accuracy is chance. A sink keeps a stream stable; it is no memory."
    )
    summary = closed("Accuracies by line", table_html(streameval_table(results), "Accuracy by distance"))
    words += _one_seed(results)
    return _plotted("What a stream remembers", words, streams.recall_figures(results), after=summary)


def _zero_shot_section(results: Results) -> Section | None:
    table, differences = zero_shot_table(results), zero_shot_pair_table(results)
    if not table.rows:
        return None
    parts = [soft(ABOUT), table_html(table, "Scores by task and model")]
    parts += [table_html(differences, "Differences, example by example")] * bool(differences.rows)
    return "Tasks of lm-evaluation-harness", "".join(parts)


def _cost_section(results: Results) -> Section | None:
    words = "One token at a time, after as many tokens as the axis says." + _one_seed(results)
    summary = closed("Time and memory in numbers", table_html(latency_table(results), "Time and memory"))
    return _plotted("Time and memory", words, streams.cost_figures(results), after=summary)


def _training_section(results: Results) -> Section | None:
    words = "What the runs measured as they went; a sink shows itself long before the end, or not at all."
    tables = [
        soft(words) + table_html(table, words)
        for table, words in (
            (training_tables.training_table(results), "Time to a held-out loss."),
            *(
                (training_tables.emergence_table(results, metric), training_tables.CAPTIONS[metric])
                for metric in training_tables.EMERGING
            ),
        )
        if table.rows
    ]
    after = closed("Training in numbers", soft(training_tables.NOTE), *tables) if tables else ""
    return _plotted("Training", words, training.training_figures(results), after)


def _plotted(heading: str, words: str, figures: list[Figure], after: str = "") -> Section | None:
    return (heading, soft(words) + plots(figures) + after) if figures else None


def _one_seed(results: Results) -> str:
    is_less = len(drawn_models(results)) < len(results["models"])
    return " One seed of each arm; all are in results.json." if is_less else ""


# -- words ------------------------------------------------------------------------------------------


def _reading(results: Results) -> str:
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS.items())
    limits = findings.limits(results)
    return (
        "".join(f"<p>{html_text(sentence)}</p>" for sentence in findings.READING)
        + (f"<h3>Limits</h3>{bullets(limits)}" if limits else "")
        + f"<h3>Words</h3><dl>{words}</dl>"
    )


def _settings(results: Results) -> str:
    parts = [table_html(model_table(results), "Models")]
    if results["failed"]:
        parts += ["<h3>Not measured</h3>", bullets(findings.failures(results))]
    if command := results["environment"].get("command"):
        parts += [
            "<h3>To measure it again</h3>",
            f'<pre tabindex="0"><code>{html_text(command)}</code></pre>',
        ]
    rest = {name: value for name, value in results["environment"].items() if name != "command"}
    if rest:
        environment = environment_table({**results, "environment": rest})
        parts += ["<h3>Environment</h3>", table_html(environment, "Environment")]
    verified = verified_table(results)
    if verified.rows:
        words = "Blockwise evaluation against stepping token by token"
        parts.append(closed(words, table_html(verified, words)))
    return "".join(parts)
