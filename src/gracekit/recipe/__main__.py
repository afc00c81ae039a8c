"""``python -m gracekit.recipe``."""

from gracekit.recipe.cli import recipe

raise SystemExit(recipe())
