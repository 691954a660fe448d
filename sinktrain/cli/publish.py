"""``sinktrain publish``: models to the Hugging Face Hub, each with its card, in one commit."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sinktrain.cli.parsing import Parser, add_rounding_option, make_parser
from sinktrain.cli.printing import print_json

if TYPE_CHECKING:
    from sinktrain.publishing.plan import Publication
    from sinktrain.publishing.publish import Draft, Published

ABOUT = """\
Publish models on the Hugging Face Hub: exported, their logits checked, each with a card, in one commit.

One MODEL goes to ORG/NAME; several go to ORG/NAME-<model> each, and into one collection. A branch moves only
to a complete commit. Cut off, the same command continues; what is there already is not sent again. The token
is that of hf auth login, or HF_TOKEN. Nothing is asked: --dry-run shows it all first, without the network."""


def publish(arguments: list[str]) -> int:
    from sinktrain.publishing import publish as publishing
    from sinktrain.publishing.plan import Publication

    options = vars(_parser().parse_args(arguments))
    as_json, is_dry = options.pop("json"), options.pop("dry_run")
    asked = Publication(**options | {"all_checkpoints": options.pop("all_checkpoints") == "all"})
    if is_dry:
        _show_drafts(asked, as_json)
        return 0
    published, collection = publishing.publish(asked, _say)
    if as_json:
        print_json({"published": [asdict(branch) for branch in published], "collection": collection})
        return 0
    for branch in published:
        print(_line(branch))
    if collection:
        print(f"collection: {collection}")
    return 0


def _parser() -> Parser:
    parser = make_parser(
        "publish",
        ABOUT,
        "sinktrain publish runs/sink --repo-id ORG/NAME --dry-run\n"
        "  sinktrain publish runs/sink --repo-id ORG/NAME --license apache-2.0 --tag v1.0\n"
        "  sinktrain publish runs/vanilla runs/sink --repo-id ORG/NAME --results runs/compare\n"
        "  sinktrain publish runs/sink --repo-id ORG/NAME --checkpoints all --private",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--repo-id", required=True, metavar="ORG/NAME", help="your user or organization, and a name"
    )
    parser.add_argument(
        "--results", type=Path, metavar="PATH", help="results.json of a comparison, or its folder: goes along"
    )
    parser.add_argument(
        "--private", action="store_true", dest="is_private", help="make new repositories private"
    )
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="publish there (default: main)")
    parser.add_argument("--tag", metavar="TAG", help="name the commit for good")
    parser.add_argument(
        "--checkpoints",
        choices=["last", "all"],
        default="last",
        dest="all_checkpoints",
        help="all: each kept checkpoint too, as branch step<N> (default: last)",
    )
    parser.add_argument("--license", dest="licence", metavar="SPDX", help="for the card, such as apache-2.0")
    add_rounding_option(parser)
    parser.add_argument(
        "--collection", metavar="TITLE", help="put it there (default: NAME for several models, none for one)"
    )
    parser.add_argument(
        "--replace", action="store_true", dest="may_replace", help="put it in the place of another model"
    )
    parser.add_argument("--without-tokenizer", action="store_true", help="publish a model that has none")
    parser.add_argument("--endpoint", metavar="URL", help="of the Hub (default: HF_ENDPOINT, or the Hub's)")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; print the files and the card")
    return parser


def _say(line: str) -> None:
    print(f"sinktrain publish: {line}", file=sys.stderr, flush=True)


def _line(branch: Published) -> str:
    what = f"{branch.num_files} files, {branch.num_bytes:,} bytes, commit {branch.commit[:8]}"
    return f"{branch.url}: {what}" + ("" if branch.is_new else ", already there, unchanged")


def _show_drafts(asked: Publication, as_json: bool) -> None:
    from sinktrain.publishing.publish import draft

    drafts = draft(asked, _say)
    if as_json:
        print_json([asdict(one) for one in drafts])
        return
    for one in drafts:
        _show(one, has_card=one.branch == asked.revision)


def _show(draft: Draft, has_card: bool) -> None:
    num_bytes = sum(draft.files.values())
    print(f"{draft.repo_id}, branch {draft.branch}: {len(draft.files)} files, {num_bytes:,} bytes")
    for name, size in draft.files.items():
        print(f"{size:>15,}  {name}")
    if has_card:
        print(f"\n{draft.card}")
