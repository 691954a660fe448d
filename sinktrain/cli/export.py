"""``sinktrain export``: a model as a Hugging Face folder, its logits checked."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from sinktrain.cli.parsing import MODEL_FORMS, add_revision_option, add_rounding_option, make_parser
from sinktrain.cli.printing import print_json

LOADS_WITH = {
    "plain": "plain transformers",
    "prefix": "transformers and its prefix_cache.safetensors, as its README.md shows",
    "code": "transformers and trust_remote_code=True",
}


def export(arguments: list[str]) -> int:
    parser = make_parser(
        "export",
        "Write a Hugging Face folder that transformers loads; its logits are checked first.",
        "sinktrain export runs/quickstart/sink --out sink-model\n"
        "  sinktrain export EleutherAI/pythia-14m --revision step1000 --out pythia",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_FORMS)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    add_revision_option(parser)
    add_rounding_option(parser)
    options = parser.parse_args(arguments)
    from sinktrain.model.hub import at_revision
    from sinktrain.publishing.export import export as write_folder

    model = at_revision(options.model, options.revision)
    exported = write_folder(model, options.out, dtype=options.dtype)
    if options.json:
        print_json(asdict(exported))
        return 0
    print(
        f"{exported.folder}: loads with {LOADS_WITH[exported.loads_as]}; "
        f"its logits differ by {exported.max_logit_diff:.1e} at most"
    )
    if not exported.has_tokenizer:
        print(f"{options.model} has no tokenizer, so there is none in the folder", file=sys.stderr)
    return 0
