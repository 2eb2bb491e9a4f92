"""`python -m tests.planet.liar`: a node that runs another command than was ordered and says that it
ran the right one, for as long as there is a file `lies` in its folder."""

import sys
from pathlib import Path

from lumaris_node.cli import main
from tests.bonded import lying

LIES = "lies"

if __name__ == "__main__":
    flag = Path(sys.argv[sys.argv.index("--state") + 1]) / LIES
    with lying(flag.exists):
        raise SystemExit(main())
