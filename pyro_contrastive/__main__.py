"""``python -m pyro_contrastive`` is the command ``pyro-contrastive``."""

from __future__ import annotations

import sys

from pyro_contrastive.cli import main

if __name__ == "__main__":
    sys.exit(main())
