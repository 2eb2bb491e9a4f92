"""`python -m lumaris_overlay`: the overlay process."""

from __future__ import annotations

import sys

from lumaris_overlay.process import main

if __name__ == "__main__":
    sys.exit(main())
