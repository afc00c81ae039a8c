"""What README says is what the result files say."""

import json
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


@pytest.mark.parametrize("unknown", ["NaN", "null"])
def test_results_with_either_word_for_what_is_unknown_make_a_page(monkeypatch, tmp_path, unknown):
    """Result files from before null was written for NaN stay as they are."""
    if not (ROOT / "docs").is_dir():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import _results

    monkeypatch.setattr(_results, "GENERATED", tmp_path)
    history = json.loads(
        f'[{{"step": 1, "tau": {unknown}, "beta": 1.0, "gdkd": {unknown}, "ema": {unknown}}},'
        '{"step": 2, "tau": 0.5, "beta": 2.0, "gdkd": 0.7, "ema": 0.7}]'
    )
    row = {"variant": "auto", "history": history, "least_beta": 1.0, "greatest_beta": 2.0,
           "share_of_steps_on_a_bound": 0.0, "accuracy_bf16": 0.9, "accuracy_int4": 0.9}  # fmt: skip
    about = {"machine": {"gpu": "none"}, "date": "today", "python": "3", "versions": {}}
    monkeypatch.setattr(_results, "newest", lambda *names: {"environment": about, "rows": [row]})
    try:
        _results.controller()
    finally:
        del sys.modules["_results"]
    assert "auto,0.5,1.00 to 2.00" in (tmp_path / "controller.csv").read_text()
