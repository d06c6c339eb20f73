"""Rebuild every table and figure of README and docs from results/.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, with the figures of its runs; the
rest of a page is left alone. With `--check` nothing is written, and what differs from results/ is
named. Figures need matplotlib (requirements-dev.txt).
"""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables as benchmarks
from benchmarks.tables import grid
from common.errors import Parser, run
from common.files import replacing
from experiments import chinese, figures
from experiments.compare import SCORES, Group, mean_sd
from experiments.e2e import GRID_STEPS, GROUPS
from experiments.methods import parse_methods
from experiments.sweep import chosen_rate

ROOT = Path(__file__).resolve().parents[1]

PAGES = (
    "README.md", "README.zh-CN.md", "docs/experiments.md", "docs/lora.md", "docs/performance.md",
)  # fmt: skip
RESULTS, FIGURES = ROOT / "results", ROOT / "docs" / "figures"
WEIGHTS = 5_128_960  # of the mini base; a test counts them
OF_E2E = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "SER")
OF_README = ("BLEU", "SER")
SHARE = "% of the weights"


def read_results(folder: Path) -> list[dict]:
    """The JSON files of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def e2e_groups(name: str, results: list[dict]) -> list[Group]:
    """The rows of a group of runs of experiments/e2e.py, with the results that there are."""
    group = GROUPS[name]
    own = [r for r in results if r["steps"] == group.steps]
    rows = itertools.product(group.variants, group.rows, parse_methods(list(group.methods)))
    found = []
    for variant, count, method in rows:
        same = (method.name, variant, count)
        done = [r for r in own if (r["method"], r["variant"], r.get("subset", 0)) == same]
        chosen = tuple(r for r in done if r["seed"] <= group.seeds)
        found.append(Group(method, variant, count, group.seeds, chosen))
    return found


def e2e_table(groups: Sequence[Group], loss: str = "last") -> str:
    """What was trained, every score, and the validation loss of the adapter that was decoded: the
    last or the best. What was not run is an empty cell."""
    has_rows = len({group.rows for group in groups}) > 1
    heads = ["method", *(["rows"] if has_rows else []), "trained", SHARE, "lr"]
    heads += [*(SCORES[name][0] for name in OF_E2E), "valid loss", "seeds"]
    lines = []
    for group in groups:
        rates = sorted({f"{result['lr']:g}" for result in group.results})
        losses = [result["valid_loss"][loss] for result in group.results]
        lines.append(
            [
                group.title, *([f"{group.rows:,}"] if has_rows else []), group.trained,
                share(group), " / ".join(rates), *score_cells(group, OF_E2E),
                mean_sd(losses, 1, 3), seeds(group),
            ]
        )  # fmt: skip
    return grid(heads, lines)


def readme_table(groups: Sequence[Group]) -> str:
    """What was trained, and the two scores that matter most."""
    heads = ["method", "trained", SHARE, *(SCORES[name][0] for name in OF_README), "seeds"]
    return grid(
        heads,
        [
            [group.title, group.trained, share(group), *score_cells(group, OF_README), seeds(group)]
            for group in groups
        ],
    )


def share(group: Group) -> str:
    """The trained parameters in percent of the base's."""
    return f"{100 * group.results[0]['trainable'] / WEIGHTS:.2f}" if group.results else ""


def score_cells(group: Group, names: Sequence[str]) -> list[str]:
    return [mean_sd(group.scores(name), *SCORES[name][1:]) for name in names]


def seeds(group: Group) -> str:
    return f"{len(group.results)} of {group.asked}" if group.results else ""


def rates_table(results: list[dict]) -> str:
    """Validation loss of each method at each learning rate that was tried, the chosen in bold."""
    titles = {
        (method.name, variant): Group(method, variant, 0, 1, ()).title
        for group in GROUPS.values()
        for variant, method in itertools.product(group.variants, parse_methods([*group.methods]))
    }
    tried = {title: grid_losses(results, *key) for key, title in titles.items()}
    rates = sorted({rate for losses in tried.values() for rate in losses})
    lines = []
    for title, losses in tried.items():
        if losses:
            chosen = chosen_rate(losses)
            lines.append([title, *(loss_cell(losses, rate, rate == chosen) for rate in rates)])
    return grid(["method", *(f"{rate:g}" for rate in rates)], lines)


def grid_losses(results: list[dict], name: str, variant: str) -> dict[float, float | None]:
    """The validation loss of a method at each learning rate; None where training diverged."""
    own = [r for r in results if (r["method"], r.get("variant", "")) == (name, variant)]
    return {r["settings"]["lr"]: r["valid_loss"]["last"] for r in own}


def loss_cell(losses: dict[float, float | None], rate: float, is_chosen: bool) -> str:
    if rate not in losses:
        return ""
    loss = losses[rate]
    if loss is None:
        return "diverged"
    return f"**{loss:.3f}**" if is_chosen else f"{loss:.3f}"


def seconds_table(short: list[dict], results: list[dict]) -> str:
    """What the parts of a run cost. Those that were done in pieces have no seconds."""
    parts = {f"training, {GRID_STEPS:,} steps": [r for r in short if "seconds" in r]}
    for steps in sorted({group.steps for group in GROUPS.values()}):
        parts[f"training, {steps:,} steps"] = [r for r in results if r["steps"] == steps]
    parts |= {"decoding": results, "scoring": results}
    lines = []
    for title, own in parts.items():
        part = title.split(",")[0]
        known = [s for r in own if (s := r["seconds"][part]) is not None]
        lines.append([title, middle(known), str(len(known) or "")])
    return grid(["part of a run", "seconds, one thread", "runs"], lines)


def middle(seconds: Sequence[float]) -> str:
    """`median (least to greatest)`, or nothing."""
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"


def e2e_section(name: str, groups: Sequence[Group]) -> str:
    """Table and figures of a group of runs; where there is no result yet, how to get them."""
    if not any(group.results for group in groups):
        runs = sum(group.asked for group in groups)
        return f"Not run yet: `python -m experiments.e2e {name}`, {runs} runs.\n"
    return e2e_table(groups, GROUPS[name].choose) + pictures(name)


def pictures(name: str) -> str:
    """The figures of a group of runs as its page in docs/ shows them."""
    lines = [f"![{text}](figures/{own}.png)\n" for own, text in figures.of_group(name).items()]
    return "\n" + "".join(lines)


def make_tables() -> dict[str, str]:
    """Every table by its name; `e2e_NAME` is that of a group of experiments/e2e.py."""
    e2e, short = read_results(RESULTS / "e2e"), read_results(RESULTS / "e2e" / "grid")
    bench = read_results(RESULTS / "bench")
    groups = {name: e2e_groups(name, e2e) for name in GROUPS}
    of_groups = {f"e2e_{name}": e2e_section(name, own) for name, own in groups.items()}
    return (
        of_groups
        | {"e2e": readme_table(groups["must"]), "e2e_rates": rates_table(short)}
        | {"e2e_seconds": seconds_table(short, e2e)}
        | {name: benchmarks.table(name, bench) for name in benchmarks.HEADS}
        | {"speed": benchmarks.speed(bench)}
    )


def make_figures() -> dict[Path, list[Group]]:
    """Every figure's file, with the groups that it shows."""
    e2e = read_results(RESULTS / "e2e")
    groups = {name: e2e_groups(name, e2e) for name in GROUPS}
    return {
        FIGURES / f"{figure}.png": own
        for name, own in groups.items()
        if any(group.results for group in own)
        for figure in figures.of_group(name)
    }


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


def differing(tables: dict[str, str], drawn: dict[Path, list[Group]]) -> list[Path]:
    """The pages and figures that are not what results/ says."""
    pages = [ROOT / name for name in PAGES if (ROOT / name).exists()]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    stale = [page for page, text in texts.items() if filled(text, tables_of(page, tables)) != text]
    for path, groups in drawn.items():
        if figures.source_of(path) != figures.digest(path.stem, groups):
            stale.append(path)
    return stale


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    args = parser.parse_args()
    tables, drawn = make_tables(), make_figures()
    for path in (stale := differing(tables, drawn)):
        name = path.relative_to(ROOT)
        if args.check:
            print(f"{name} differs from results/; run python -m experiments.tables")
            continue
        if path in drawn:
            figures.draw(path, drawn[path])
        else:
            text = filled(path.read_text(encoding="utf-8"), tables_of(path, tables))
            with replacing(path) as file:
                file.write(text)
        print(f"{name}: written")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    run(main)
