"""Rebuild every table and figure of README and docs from results/.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of a page is left alone.
With `--check` nothing is written, and what differs from results/ is named. Figures need matplotlib
(requirements-dev.txt).
"""

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import tables as benchmarks
from benchmarks.tables import grid
from common.errors import run
from common.files import replacing
from experiments import chinese, compare, figures
from experiments.compare import mean_sd
from experiments.e2e import GROUPS
from experiments.figures import ALL_ROWS, NAMES, TARGETS
from experiments.methods import parse_methods

ROOT = Path(__file__).resolve().parents[1]

PAGES = (
    "README.md", "README.zh-CN.md", "docs/experiments.md", "docs/lora.md", "docs/performance.md",
)  # fmt: skip
RESULTS, FIGURES = ROOT / "results", ROOT / "docs" / "figures"
# Name, factor and digits of each score, on the scales of the paper's Table 3.
SCORES = {
    "BLEU": (100, 1), "NIST": (1, 2), "METEOR": (100, 1), "ROUGE_L": (100, 1), "CIDEr": (1, 2),
}  # fmt: skip
SEEDS = 3
WITHOUT_RANK = ("full", "top2", "bitfit")
SCORE_HEADS = ["BLEU", "NIST", "MET", "ROUGE-L", "CIDEr", "valid loss", "seeds"]


class Setting(NamedTuple):
    """What the runs of a row share, all but the seed; the rank is 0 where no adapter is trained."""

    kind: str = "lora"
    rank: int = 4
    rows: int = ALL_ROWS
    targets: str = TARGETS[0]


def read_results(folder: Path) -> list[dict]:
    """The JSON files of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def runs_of(results: list[dict], setting: Setting) -> list[dict]:
    """The runs that differ from `setting` in nothing but their seed."""
    return [r for r in results if (r["kind"], r["rank"], r["rows"], r["targets"]) == setting]


def score_cells(runs: list[dict]) -> list[str]:
    """The columns `SCORE_HEADS`; empty where nothing was run."""
    cells = [
        mean_sd([r["scores"][name] for r in runs], factor, digits)
        for name, (factor, digits) in SCORES.items()
    ]
    loss = mean_sd([r["valid_loss"]["last"] for r in runs], 1, 3)
    return [*cells, loss, f"{len(runs)} of {SEEDS}" if runs else ""]


def trained(runs: list[dict]) -> str:
    return f"{runs[0]['trainable']:,}" if runs else ""


def kinds_table(results: list[dict]) -> str:
    rows = []
    for kind in NAMES:
        runs = runs_of(results, Setting(kind, 0 if kind in WITHOUT_RANK else 4))
        lr = f"{runs[0]['lr']:g}" if runs else ""
        rows.append([NAMES[kind], trained(runs), lr, *score_cells(runs)])
    return grid(["method", "trained", "lr", *SCORE_HEADS], rows)


def ranks_table(results: list[dict]) -> str:
    rows = []
    for rank, (kind, scaling) in itertools.product((1, 4, 16, 64), figures.SCALINGS.items()):
        runs = runs_of(results, Setting(kind, rank))
        rows.append([str(rank), scaling, trained(runs), *score_cells(runs)])
    return grid(["r", "scaling", "trained", *SCORE_HEADS], rows)


def data_table(results: list[dict]) -> str:
    rows = []
    for count in (100, 500, 4000, ALL_ROWS):
        runs = runs_of(results, Setting(rows=count))
        epochs = f"{runs[0]['steps'] * runs[0]['batch'] / count:.1f}" if runs else ""
        best = mean_sd([r["valid_loss"]["best"] for r in runs], 1, 3)
        rows.append([f"{count:,}", epochs, *score_cells(runs), best])
    return grid(["training rows", "epochs", *SCORE_HEADS, "best valid loss"], rows)


def targets_table(results: list[dict]) -> str:
    rows = []
    for targets in TARGETS:
        runs = runs_of(results, Setting(targets=targets))
        rows.append([targets, trained(runs), *score_cells(runs)])
    return grid(["`--lora_targets`", "trained", *SCORE_HEADS], rows)


def budget_table(results: list[dict]) -> str:
    """What a run cost, over all runs."""
    rows = []
    for name in ("training", "decoding", "scoring"):
        seconds = [r["seconds"][name] for r in results if r["seconds"][name] is not None]
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        rows.append([name, f"{middle:.0f} ({low:.0f} to {high:.0f})"])
    return grid(["part of a run", "seconds, one thread"], rows)


def e2e_groups(name: str, results: list[dict]) -> list[compare.Group]:
    """The rows of a group of runs of experiments/e2e.py, with the results that there are."""
    group = GROUPS[name]
    own = [r for r in results if r["steps"] == group.steps]
    rows = itertools.product(group.variants, group.rows, parse_methods(list(group.methods)))
    found = []
    for variant, count, method in rows:
        same = (method.name, variant, count)
        done = [r for r in own if (r["method"], r["variant"], r.get("subset", 0)) == same]
        chosen = tuple(r for r in done if r["seed"] <= group.seeds)
        found.append(compare.Group(method, variant, count, group.seeds, chosen))
    return found


def make_tables() -> dict[str, str]:
    """Every table by its name; `e2e_NAME` is that of a group of experiments/e2e.py."""
    e2e = read_results(RESULTS / "e2e")
    of_groups = {f"e2e_{name}": compare.table(e2e_groups(name, e2e)) for name in GROUPS}
    sweep, bench = read_results(RESULTS / "e2e-mini"), read_results(RESULTS / "bench")
    makers: dict[str, Callable[[list[dict]], str]] = {
        "kinds": kinds_table, "ranks": ranks_table, "data": data_table,
        "targets": targets_table, "budget": budget_table,
    }  # fmt: skip
    return (
        {name: make(sweep) for name, make in makers.items()}
        | of_groups
        | {name: benchmarks.table(name, bench) for name in benchmarks.HEADS}
        | {"speed": benchmarks.speed(bench)}
    )


def tables_of(page: Path, tables: dict[str, str]) -> dict[str, str]:
    """Return the tables in the language of a page."""
    if page.name.endswith(".zh-CN.md"):
        return {name: chinese.translated(table) for name, table in tables.items()}
    return tables


def filled(page: str, tables: dict[str, str]) -> str:
    """The text of a page with its tables in their places.

    Raises:
        KeyError: the page has a place for a table that nobody makes.
    """
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: m[1] + tables[m[2]] + m[3], page, flags=re.DOTALL)


def differing(tables: dict[str, str], results: list[dict]) -> list[str]:
    """The pages and figures that are not what results/ says."""
    pages = [ROOT / name for name in PAGES if (ROOT / name).exists()]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    stale = [page for page, text in texts.items() if filled(text, tables_of(page, tables)) != text]
    for name in figures.FIGURES:
        path = FIGURES / f"{name}.png"
        if figures.source_of(path) != figures.digest(name, results):
            stale.append(path)
    e2e = read_results(RESULTS / "e2e")
    for name in GROUPS:
        path, groups = FIGURES / f"e2e_{name}.png", e2e_groups(name, e2e)
        if any(g.results for g in groups) and figures.source_of(path) != compare.digest(groups):
            stale.append(path)
    return [str(path.relative_to(ROOT)) for path in stale]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    args = parser.parse_args()
    tables, results = make_tables(), read_results(RESULTS / "e2e-mini")
    stale = differing(tables, results)
    if args.check:
        for name in stale:
            print(f"{name} differs from results/; run python -m experiments.tables")
        return 1 if stale else 0
    for name in stale:
        path = ROOT / name
        if path.stem in figures.FIGURES:
            figures.draw(path, results)
        elif path.suffix == ".png":
            own = path.stem.removeprefix("e2e_")
            compare.draw(path, e2e_groups(own, read_results(RESULTS / "e2e")))
        else:
            text = filled(path.read_text(encoding="utf-8"), tables_of(path, tables))
            with replacing(path) as file:
                file.write(text)
        print(f"{name}: written")
    return 0


if __name__ == "__main__":
    run(main)
