"""``python -m sinktrain`` is ``sinktrain``."""

import sys

from sinktrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
