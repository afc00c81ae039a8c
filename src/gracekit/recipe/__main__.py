"""``python -m gracekit.recipe``."""

import sys

from gracekit.recipe.cli import main

raise SystemExit(main(["recipe", *sys.argv[1:]]))
