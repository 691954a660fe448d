"""A model card's measurements: what a comparison says of this model, and of some others for context."""

from __future__ import annotations

from sinktrain.publishing.card_compared import Compared
from sinktrain.report import findings
from sinktrain.report.contests import main_pairs
from sinktrain.report.loss_tables import bits_table, pair_table, perplexity_table
from sinktrain.report.markdown import escaped, table_markdown
from sinktrain.report.table import Table
from sinktrain.report.wording import printable

PICTURE_FILE = "streaming.svg"
COMPARISON_FOLDER = "comparison"


def results_parts(compared: Compared, has_picture: bool, has_folder: bool) -> list[str]:
    """The section of the card, in Markdown.

    Args:
        has_picture: ``PICTURE_FILE`` lies beside the card.
        has_folder: the whole comparison lies beside the card.
    """
    results, name = compared.results, escaped(compared.name)
    this = f"This model is **{name}** here. " if len(results["models"]) > 1 else ""
    parts = [
        "## Streaming",
        f"{this}A layout S+W keeps the first S tokens of a stream and the newest W. Lower is better; "
        "compare by the differences, whose intervals are far narrower than those of losses.",
        *map(escaped, findings.verdict_sentences(results)),
    ]
    for text in findings.texts(compared.shown):
        parts += _text_parts(compared, text)
    parts += [f"![Loss by model and layout, with 95% intervals over text]({PICTURE_FILE})"] * has_picture
    parts += _more_parts(compared, has_folder)
    return parts


def _text_parts(compared: Compared, text: str) -> list[str]:
    shown = compared.shown
    scored = [row for row in shown["perplexity"] if row["text"] == text]
    parts = [
        f"### Perplexity on {escaped(text)}",
        f"{findings.tokens_scored(scored)}; in brackets the 95% interval of the loss in nats, over text.",
        table_markdown(turned(perplexity_table(shown, text))),
    ]
    if not findings.has_one_tokenizer(shown):
        words = "Bits per byte, as the models' tokenizers differ and their perplexities can't be compared:"
        parts += [words, table_markdown(turned(bits_table(shown, text)))]
    own = {compared.name, compared.model["arm"]}
    pairs = pair_table(pair for pair in main_pairs(compared.results, text) if own & {pair["a"], pair["b"]})
    if pairs.rows:
        words = "Token by token on the same text; below zero, the first is better."
        opened = "<details><summary>Differences in loss</summary>"
        parts += [opened, words, table_markdown(pairs), "</details>"]
    return parts


def turned(table: Table) -> Table:
    """A row for each layout and a column for each model: cards are narrow, and layouts are many."""
    return Table(
        ["layout", *(row[0] for row in table.rows)],
        [[layout, *(row[at] for row in table.rows)] for at, layout in enumerate(table.header) if at],
    )


def _more_parts(compared: Compared, has_folder: bool) -> list[str]:
    parts = []
    more = len(compared.results["models"]) - len(compared.shown["models"])
    if more:
        parts.append(f"{more} more models were compared.")
    if has_folder:
        report, numbers = (f"{COMPARISON_FOLDER}/{file}" for file in ("report.html", "results.json"))
        parts.append(
            f"All of the comparison: [report.html]({report}), one page to download and open, and every "
            f"number in [results.json]({numbers})."
        )
    if command := compared.results["environment"]["command"]:
        parts += ["Measured by:", f"```\n{printable(command)}\n```"]
    return parts
