"""What commands print on stdout, where several print alike."""

from __future__ import annotations

import json
from typing import Any


def print_json(value: Any) -> None:
    """What ``--json`` asks for: one value, indented like the files that commands write.

    In ASCII, whatever a terminal or a pipe can show; paths become strings.
    """
    print(json.dumps(value, indent=2, default=str))
