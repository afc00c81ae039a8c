"""``pytest tests/test_vlm_conformance*.py --support-table docs/guide/vlm_support.json``: what the conformance suite found.

A test with the mark ``support(title)`` and a parameter ``name``, the family, fills one cell of the table: "yes" where all
its cases passed (or what the test recorded as its property "support"), "no" where one failed, else why it was skipped.
"""

import datetime
import json
import os
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PACKAGES = ("gracekit", "torch", "transformers", "accelerate", "peft")


class SupportTable:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.marked: dict[str, tuple[str, str]] = {}
        self.found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark, call = item.get_closest_marker("support"), getattr(item, "callspec", None)
            if mark and call:
                self.marked[item.nodeid] = (call.params["name"], mark.args[0])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.marked and (report.when == "call" or report.outcome != "passed"):
            said = dict(report.user_properties).get("support", "yes")
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else said
            self.found[self.marked[report.nodeid]].append((report.outcome, str(reason)))

    def pytest_sessionfinish(self) -> None:
        record = {"date": datetime.date.today().isoformat(), "versions": versions(), "columns": [], "families": {}}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            record |= before if before["versions"] == record["versions"] else {}
            record["date"] = datetime.date.today().isoformat()
        for (name, title), results in self.found.items():
            record["families"].setdefault(name, {})[title] = cell(results)
            if title not in record["columns"]:
                record["columns"].append(title)
        self.path.write_text(json.dumps(record, indent=1) + "\n")


def cell(results: list[tuple[str, str]]) -> str:
    for outcome in ("failed", "skipped"):
        for got, reason in results:
            if got == outcome:
                return "no" if outcome == "failed" else f"not run: {reason}"
    return results[0][1]


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", type=Path, metavar="PATH", help="write what the conformance suite finds there")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--support-table")
    if path is not None:
        config.pluginmanager.register(SupportTable(Path(os.fspath(path))), "support-table")
