"""``python -m fluxloom`` is the command ``fluxloom``."""

from __future__ import annotations

import sys

from fluxloom.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
