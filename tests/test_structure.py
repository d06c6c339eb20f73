"""Rules of the code that ruff does not know: which package imports which, short and typed
functions, and what is done nowhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# Each imports from its own level and those above it in this list, never from one below it; in one
# level there is no circle.
LEVELS = (
    {"loralib", "loss", "common"},
    {"model", "methods", "data", "data_utils", "gpu", "optimizer"},
    {"checkpoints", "decoding", "training", "eval"},
    {"gpt2_ft", "gpt2_beam", "convert_adapter", "experiments", "benchmarks"},
)
TOP = {
    "gpt2_ft", "gpt2_beam", "convert_adapter", "model", "loss", "optimizer", "gpu", "data_utils",
}  # fmt: skip
FOLDERS = sorted(
    path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"
)
SOURCES = sorted(path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
LONGEST = {"build_parser": 100}  # a list of flags


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in SOURCES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
# Modules that are run, wherever they are: above everything that is imported.
PROGRAMS = {
    name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text("utf-8")
}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from statements(node)


def imported(name: str) -> set[str]:
    """The project's modules that a module imports."""
    package = name.partition(".")[0]
    found = set()
    for node in statements(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, [package] * node.level + [node.module or ""]))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {own if own in MODULES else source for own in names}
    return {module for module in found if module in MODULES and module != name}


IMPORTS = {name: imported(name) for name in MODULES}


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module.partition(".")[0] in names)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The nodes that lie on a circle or lead to one; none where there is an order."""
    left = dict(arrows)
    while done := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in done:
            del left[node]
    return sorted(left)


def test_every_module_has_a_level() -> None:
    known = set().union(*LEVELS)
    assert {name.partition(".")[0] for name in MODULES} <= known
    assert {name for name in MODULES if "." not in name and name not in FOLDERS} == TOP


def test_imports_lead_up_the_list_of_levels_alone() -> None:
    for name in MODULES.keys() - PROGRAMS:
        wrong = [other for other in IMPORTS[name] if level(other) > level(name)]
        assert wrong == [], name


def test_no_module_of_a_library_imports_a_program() -> None:
    for name in MODULES.keys() - PROGRAMS:
        if level(name) < len(LEVELS) - 1:
            assert IMPORTS[name] & PROGRAMS == set(), name


def test_neither_modules_nor_packages_import_in_a_circle() -> None:
    assert circle(IMPORTS) == []
    arrows: dict[str, set[str]] = {}
    for name in MODULES.keys() - PROGRAMS:
        package = name.partition(".")[0]
        targets = {other.partition(".")[0] for other in IMPORTS[name]} - {package}
        arrows.setdefault(package, set()).update(targets)
    assert circle(arrows) == []


def test_the_layers_import_nothing_of_the_project() -> None:
    for name in MODULES:
        if name.partition(".")[0] == "loralib":
            assert {other.partition(".")[0] for other in IMPORTS[name]} <= {"loralib"}, name


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = TREES[module_of(path)]
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
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


def test_every_program_that_a_user_starts_answers_help() -> None:
    started_by_others = {
        "benchmarks.decode_peers", "benchmarks.end_to_end_peer", "benchmarks.sft_peers",
        "experiments.slurm",
    }  # fmt: skip
    parses = re.compile(r"parse_args|convert_main")
    assert {n for n in PROGRAMS if not parses.search(MODULES[n].read_text("utf-8"))} == (
        started_by_others
    )


def test_every_module_is_seen() -> None:
    assert len(SOURCES) > 40 and ROOT / "gpt2_ft.py" in SOURCES


# What stands nowhere in the product: a pattern, and the files that are free to have it.
NOWHERE = {
    r"sys\.path\b": {"benchmarks/train_peers.py"},  # the original's modules have our names
    r"\.\./shared": set(),
    r"\bArgumentParser\(": set(),  # all programs have its Parser
    r"\bargs\.\w+ = ": set(),
}


@pytest.mark.parametrize("pattern", NOWHERE)
def test_the_product_does_without(pattern: str) -> None:
    files = [*SOURCES, *(ROOT / "scripts").glob("*.sh")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found <= NOWHERE[pattern]
