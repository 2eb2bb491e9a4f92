"""`python -m lumaris.cli`."""

from lumaris.cli import main

main()
