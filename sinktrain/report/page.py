"""The report as one page of HTML that opens offline: the verdict first, then tables and plots."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from sinktrain.report import findings
from sinktrain.report.contests import subjects_of
from sinktrain.report.figures.look import TEMPLATE
from sinktrain.report.markup import data_script, html_text
from sinktrain.report.sections import Section, sections
from sinktrain.report.style import STYLE
from sinktrain.report.wording import Results

NO_SCRIPT = "Without scripts the plots stay empty; all their numbers stand in the tables below them."


def report_page(results: Results) -> str:
    """The page for the dict of ``results.json``: self-contained, without addresses, below 6 MB.

    Lists that are empty draw nothing. Every name from the results is escaped, and the page's policy lets no
    script run but plotly and page.js, by their hashes, and nothing be fetched.
    """
    title = f"Streaming: {', '.join(subject.name for subject in subjects_of(results))}"
    found = sections(results)
    scripts = _scripts() if any("data-figure=" in html for _, html in found) else []
    policy = "; ".join(
        [
            "default-src 'none'",
            "style-src 'unsafe-inline'",  # plotly writes its own
            "img-src data: blob:",  # heat maps, and plots saved as pictures
            "base-uri 'none'",
            "form-action 'none'",
            *([f"script-src {' '.join(map(_hash, scripts))}"] if scripts else []),
        ]
    )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html_text(title)}</title>\n<style>{STYLE}</style>"
    )
    parts = [
        _header(title, results, found, bool(scripts)),
        *(
            f'<section id="{_anchor(at)}"><h2>{html_text(name)}</h2>{html}</section>'
            for at, (name, html) in enumerate(found)
        ),
    ]
    body = "\n".join(parts)
    ending = data_script("data-template", "", TEMPLATE) if scripts else ""
    ending += "".join(f"\n<script>{script}</script>" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n{ending}\n</body>\n</html>\n"
    )


def _header(title: str, results: Results, found: list[Section], has_plots: bool) -> str:
    verdict = "".join(
        f'<p class="finding">{html_text(words)}</p>' for words in findings.verdict_sentences(results)
    )
    links = "".join(f'<a href="#{_anchor(at)}">{html_text(name)}</a>' for at, (name, _) in enumerate(found))
    no_script = f'<noscript><p class="soft">{NO_SCRIPT}</p></noscript>' if has_plots else ""
    return f"<header><h1>{html_text(title)}</h1>{verdict}{no_script}<nav>{links}</nav></header>"


def _anchor(number: int) -> str:
    return f"section-{number + 1}"


def _scripts() -> list[str]:
    """Plotly and our page.js; slow to read, so only where there is something to draw."""
    from plotly.offline import get_plotlyjs

    own = files("sinktrain.report").joinpath("page.js").read_text(encoding="utf-8")
    return [get_plotlyjs(), own]


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
