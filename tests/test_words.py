"""The words of messages, docstrings and pages: plain English, and the field's names."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT
from test_structure import SOURCES, TREES, module_of

PAGES = [path for path in ROOT.glob("*.md") if "zh-CN" not in path.name]
FILES = [*SOURCES, *(ROOT / "scripts").glob("*.sh"), *(ROOT / "docs").glob("*.md"), *PAGES]
PHRASES = (r"behind", r"so many", r"go(es)? on\b(?! a\b)", r"not to be had", r"what is wanted")
# Words of texts that are data: the sample's sentences, and phrases of E2E.
DATA = {"data/domains.py", "eval/slots.py"}
NAMES = {"thin", "plus", "folded", "eject", "watch"}
FREE = {"eval/webnlg.py": {"plus"}}  # Myers' vectors of plus and minus one


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_of_no_native_speaker_stands_nowhere(phrase: str) -> None:
    pattern = re.compile(rf"\b{phrase}\b")
    found = [
        f"{name}:{number}"
        for path in FILES
        if (name := str(path.relative_to(ROOT))) not in DATA
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def names_of(path: Path) -> set[str]:
    """Everything that a module gives a name to."""
    found = set()
    for node in ast.walk(TREES[module_of(path)]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.arg | ast.Attribute):
            found.add(getattr(node, "id", None) or getattr(node, "arg", None) or node.attr)
    return found


def test_names_of_a_private_language_are_given_to_nothing() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        assert names_of(path) & NAMES <= FREE.get(name, set()), name
