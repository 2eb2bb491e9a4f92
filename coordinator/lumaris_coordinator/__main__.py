"""`python -m lumaris_coordinator`."""

import sys

from lumaris_coordinator.cli import main

sys.exit(main(sys.argv[1:]))
