"""The house: which room may look into which, and what a bare import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gracekit

ROOT = Path(gracekit.__file__).parent
# Room: level, third-party packages it may import (the standard library and torch always).
ROOMS = {
    "helpers": (0, set()),
    "capture": (0, set()),
    "losses": (1, {"einops", "triton"}),
    "control": (1, set()),
    "quant": (1, {"torchao", "safetensors", "triton"}),
    "vlm": (1, {"transformers"}),
    "objective": (2, set()),
    "inference": (2, {"transformers"}),
    "recipe": (3, None),  # None: anything
    "package": (3, {"einops"}),
}
# Rooms the level-2 rooms may look into, besides level 0.
BELOW = {
    "objective": {"losses", "control"},
    "inference": {"quant", "vlm"},
    "package": {"losses", "control", "objective"},
}
EXTRA = {"quant/formats/hf.py": {"transformers"}}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(parts):
    if not parts:
        return "package"
    name = parts[0].removesuffix(".py")
    if name.startswith("_"):
        return "helpers"
    return name if name in ROOMS else "package"


def room_of_file(path):
    parts = path.relative_to(ROOT).parts
    return "package" if parts == ("__init__.py",) else room_of(parts)


def imports(path):
    """Every module a file imports, wherever in it, as dotted names."""
    package = ["gracekit", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "gracekit" else [module]


def complaints(path):
    room = room_of_file(path)
    level, allowed = ROOMS[room]
    relative = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "gracekit":
            other = room_of(rest)
            if other == room or (other == "package" and room == "recipe"):
                continue
            if ROOMS[other][0] >= level:
                yield f"{relative} (level {level}) imports {name} (level {ROOMS[other][0]})"
            elif room in BELOW and ROOMS[other][0] > 0 and other not in BELOW[room]:
                yield f"{relative} may look into {sorted(BELOW[room])}, not {name}"
        elif allowed is not None and top not in {*sys.stdlib_module_names, "torch", *allowed, *EXTRA.get(relative, ())}:
            yield f"{relative} imports {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down_only(path):
    assert list(complaints(path)) == []


def test_the_rule_finds_an_upward_and_a_foreign_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "quant").mkdir()
    bad = tmp_path / "quant" / "lsq.py"
    bad.write_text("def f():\n    from gracekit.vlm import x\n    import transformers\n    from gracekit import cka\n")
    assert len(list(complaints(bad))) == 3


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_bare_import_loads_nothing_heavy():
    loaded = run("import gracekit, sys; print(*sys.modules)").split()
    assert not {"torchao", "transformers", "accelerate", "matplotlib", "triton.language"} & set(loaded)


def test_every_public_name_is_there_and_documented():
    for name in gracekit.__all__:
        assert getattr(gracekit, name).__doc__
