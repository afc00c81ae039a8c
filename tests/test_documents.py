"""What README says is what the result files say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_readme_has_the_table_of_the_newest_recipe_runs(monkeypatch):
    if not (ROOT / "docs").is_dir():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import _results

    try:
        assert (ROOT / "README.md").read_text() == _results.readme(), "run python docs/_results.py"
    finally:
        del sys.modules["_results"]
