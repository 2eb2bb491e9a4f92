"""`python -m lumaris.cli`."""

import sys

from lumaris.cli import main

sys.exit(main())
