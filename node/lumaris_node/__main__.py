"""`python -m lumaris_node`: runs a node in the foreground."""

from lumaris_node.cli import main

raise SystemExit(main())
