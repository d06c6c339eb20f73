"""Rules of the code that ruff does not know: short functions, typed public ones."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = (".", "loralib", "common", "checkpoints", "training", "decoding", "data", "eval")
FOLDERS += ("experiments", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
LONGEST = {"build_parser": 100}  # a list of flags


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_public_ones_are_typed(path: Path) -> None:
    for function in functions(path):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= LONGEST.get(function.name, 60), f"{function.name} has {lines} lines"
        if function.name.startswith("_"):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [
            a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
        ]
        assert (untyped, function.returns is None) == ([], False), function.name


def test_every_module_is_seen() -> None:
    assert len(SOURCES) > 40 and ROOT / "gpt2_ft.py" in SOURCES
