"""What a comparison came to: a table, a figure, and which differences chance could explain."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.tables import grid
from common.files import replacing, write_json
from eval import bootstrap, coco
from eval.evaluate import load_data
from eval.measure import Measure
from eval.metrics import LOWER_IS_BETTER, measure
from experiments.methods import Method
from experiments.runs import Run, is_done, read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Title, factor and digits of each score, on the scales of the papers' tables.
SCORES = {
    "BLEU": ("BLEU", 100, 1), "NIST": ("NIST", 1, 2), "METEOR": ("MET", 100, 1),
    "ROUGE_L": ("ROUGE-L", 100, 1), "CIDEr": ("CIDEr", 1, 2), "TER": ("TER", 1, 2),
    "chrF++": ("chrF++", 100, 1), "SER": ("SER", 100, 1), "coverage": ("coverage", 100, 1),
}  # fmt: skip
# What is tested of each task: scores that need no Java and add up over items.
TESTED = {"e2e": ("BLEU", "SER")}
TESTED_ELSEWHERE = ("BLEU", "chrF++")
SAMPLES = 1000
SOURCE = "Source"  # the PNG's text chunk that holds the digest
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed: their method, the variant of the data, the number
    of training rows (0 for all), how many runs are asked for, and the results that there are."""

    method: Method
    variant: str
    rows: int
    asked: int
    results: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        """The method, and the variant of the data if it is not the usual one."""
        return self.method.title + (f", {self.variant} rows" if self.variant else "")

    @property
    def trained(self) -> str:
        """The number of trained parameters."""
        return f"{self.results[0]['trainable']:,}" if self.results else ""

    def scores(self, name: str) -> list[float | None]:
        """A score of each seed's texts."""
        return [result["scores"].get(name) for result in self.results]


def mean_sd(values: Sequence[float | None], factor: float = 1, digits: int = 2) -> str:
    """`mean ± sd` (n - 1 in its denominator), the value alone where it is one, or nothing."""
    known = [factor * value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


Key = tuple[str, str, int]  # what the runs of a group have in common


def key_of(run: Run) -> Key:
    """Return what a run has in common with those of other seeds."""
    return run.method.name, run.setup.variant, run.rows


def by_key(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Return the runs by what they have in common."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        found.setdefault(key_of(run), []).append(run)
    return found


def group_of(runs: Sequence[Run]) -> Group:
    """Return the group of runs that differ in their seed."""
    _, variant, rows = key_of(runs[0])
    results = tuple(read_result(run) for run in runs if is_done(run))
    return Group(runs[0].method, variant, rows, len(runs), results)


def scored(groups: Sequence[Group]) -> list[str]:
    """The scores that every run has; the coverage of values only where slots are not counted."""
    results = [result["scores"] for group in groups for result in group.results]
    names = [n for n in SCORES if results and all(own.get(n) is not None for own in results)]
    return [name for name in names if name != "coverage" or "SER" not in names]


def table(groups: Sequence[Group]) -> str:
    """A Markdown table of the groups: what was trained, scores, and cost. What was not run is an
    empty cell."""
    names = scored(groups)
    has_rows = len({group.rows for group in groups}) > 1
    heads = ["method", *(["rows"] if has_rows else []), "trained", "lr"]
    heads += [SCORES[name][0] for name in names]
    heads += ["valid loss", "training, s", "peak GB", "seeds"]
    lines = []
    for group in groups:
        cells = [group.title, *([f"{group.rows:,}" if group.rows else "all"] if has_rows else [])]
        cells += [group.trained, " / ".join(sorted({f"{r['lr']:g}" for r in group.results}))]
        cells += [mean_sd(group.scores(name), *SCORES[name][1:]) for name in names]
        lines.append([*cells, *costs(group)])
    return grid(heads, lines)


def costs(group: Group) -> list[str]:
    """The last columns: validation loss, seconds of training without interruption, the peak of the
    memory, and the number of runs."""
    results = group.results
    if not results:
        return [""] * 4
    seconds = [s for r in results if (s := r["seconds"].get("training")) is not None]
    return [
        mean_sd([r["valid_loss"].get("last") for r in results], 1, 3), mean_sd(seconds, 1, 0),
        f"{max(r['peak_memory_gb'] for r in results):.2f}", f"{len(results)} of {group.asked}",
    ]  # fmt: skip


def pooled(measures: Sequence[Measure]) -> Measure:
    """One measure over the texts of several runs on the same items: an item has all their texts."""
    statistics_of_items = np.sum([measure.statistics for measure in measures], axis=0)
    return Measure(statistics_of_items, measures[0].of_sums)


def differences(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What parts each method from the first one with as many rows, over the seeds that both have:
    for each tested score the difference and its p-value by the paired bootstrap. Runs whose texts
    are not here are left out."""
    here = by_key(run for run in runs if (run.folder / "predictions.jsonl").is_file())
    first: dict[int, list[Run]] = {}
    found = []
    for (_, _, rows), theirs in here.items():
        ours = first.setdefault(rows, theirs)
        seeds = {run.seed for run in ours} & {run.seed for run in theirs}
        if ours is theirs or not seeds:
            continue
        row = {"against": group_of(ours).title, "method": group_of(theirs).title, "rows": rows}
        pairs = [[run for run in own if run.seed in seeds] for own in (ours, theirs)]
        found.append(row | {"seeds": sorted(seeds)} | difference(*pairs))
    return found


def difference(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """The pooled scores of two methods' runs, with differences (theirs less ours) and p-values."""
    setup = ours[0].setup
    paths = [str(run.folder / "predictions.jsonl") for run in (*ours, *theirs)]
    items, systems = load_data(setup.task, setup.test_data, paths, setup.vocab, setup.fields)
    names = TESTED.get(setup.task, TESTED_ELSEWHERE)
    contexts = [item.context for item in items]
    with coco.Meteor() as meteor:
        measured = measure(
            setup.task, [item.references for item in items], systems, names, meteor, contexts
        )
    scores = {}
    for name in (name for name in names if name in measured.systems[0]):
        of_runs = [system[name] for system in measured.systems]
        first, second = pooled(of_runs[: len(ours)]), pooled(of_runs[len(ours) :])
        change = second.score() - first.score()
        samples = [bootstrap.resampled_scores(each, SAMPLES) for each in (first, second)]
        p = bootstrap.p_value(samples[0], samples[1], change)
        scores[name] = {"difference": round(change, 4), "p": round(p, 4)}
    return {"items": len(items), "scores": scores}


def significance_table(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the differences."""
    names = list(dict.fromkeys(name for row in found for name in row["scores"]))
    has_rows = len({row["rows"] for row in found}) > 1
    heads = [f"against {found[0]['against']}", *(["rows"] if has_rows else [])]
    for name in names:
        heads += [SCORES[name][0], "p"]
    lines = []
    for row in found:
        cells = [row["method"], *([str(row["rows"] or "all")] if has_rows else [])]
        for name in names:
            own, (_, factor, digits) = row["scores"][name], SCORES[name]
            cells += [f"{factor * own['difference']:+.{digits}f}", f"{own['p']:.3f}"]
        lines.append(cells)
    return grid(heads, lines)


def write_report(title: str, out: Path, runs: Sequence[Run]) -> str:
    """Write `TITLE.md`, `TITLE.png` and the differences as JSON; return the text without its
    picture, which is empty where nothing is done."""
    done = [run for run in runs if is_done(run)]
    if not done:
        return ""
    groups = [group_of(own) for own in by_key(runs).values()]
    parts = [table(groups)]
    if found := differences(done):
        write_json(out / "significance" / f"{title}.json", found)
        parts.append(
            f"Differences of the scores pooled over seeds, on {found[0]['items']:,} test items; p "
            f"by the paired bootstrap, {SAMPLES:,} samples.\n\n{significance_table(found)}"
        )
    text = "\n".join(parts)
    picture = draw(out / f"{title}.png", groups)
    with replacing(out / f"{title}.md") as file:
        file.write(text + (f"\n![{title}]({title}.png)\n" if picture else ""))
    return text


def draw(path: Path, groups: Sequence[Group]) -> bool:
    """Draw two scores of the groups that have results; return False where matplotlib is
    missing."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [group for group in groups if group.results]
    names = drawn(known)
    has_rows = len({group.rows for group in known}) > 1
    height = 4.2 if has_rows else 1.4 + 0.38 * len(known)
    figure, all_axes = plt.subplots(
        1, max(len(names), 1), figsize=(10, height), layout="constrained", sharey=not has_rows,
        squeeze=False,
    )  # fmt: skip
    for axes, name in zip(all_axes[0], names, strict=False):
        (draw_by_rows if has_rows else draw_methods)(axes, known, name)
    with replacing(path, "wb") as file:
        metadata = {SOURCE: digest(groups)}
        figure.savefig(file, format="png", dpi=120, metadata=metadata)
    plt.close(figure)
    return True


def drawn(groups: Sequence[Group]) -> list[str]:
    """The two scores that a figure shows: BLEU, and slot errors or the next best there is."""
    best = ("BLEU", "SER", "chrF++", "coverage")
    return sorted(set(scored(groups)).intersection(best), key=best.index)[:2]


def digest(groups: Sequence[Group]) -> str:
    """The digest of the numbers that the figure of these groups shows, which its file carries."""
    known = [group for group in groups if group.results]
    shown = [[g.title, g.rows, g.trained, [g.scores(n) for n in drawn(known)]] for g in known]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def label_of(name: str) -> str:
    """The label of a score's axis."""
    return SCORES[name][0] + (", lower is better" if name in LOWER_IS_BETTER else "")


def draw_methods(axes: "Axes", groups: Sequence[Group], name: str) -> None:
    """A row for each method and its trained parameters: a dot for each seed, a bar at the mean."""
    factor = SCORES[name][1]
    for place, group in enumerate(groups):
        values = [factor * value for value in group.scores(name) if value is not None]
        color = COLORS[place % len(COLORS)]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
        axes.plot([statistics.mean(values)], [place], "|", color=color, markersize=18)
    labels = [f"{group.title}  ·  {group.trained}" for group in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    axes.set(xlabel=label_of(name))
    axes.grid(alpha=0.3)


def draw_by_rows(axes: "Axes", groups: Sequence[Group], name: str) -> None:
    """A line for each method over the number of training rows; dots are seeds."""
    factor = SCORES[name][1]
    for place, title in enumerate(dict.fromkeys(group.title for group in groups)):
        color = COLORS[place % len(COLORS)]
        own = sorted(
            (group.results[0]["rows"], [factor * (value or 0) for value in group.scores(name)])
            for group in groups
            if group.title == title
        )
        axes.plot([x for x, _ in own], [statistics.mean(ys) for _, ys in own], color=color,
                  label=title)  # fmt: skip
        for x, values in own:
            axes.plot([x] * len(values), values, "o", color=color, alpha=0.5)
    places = sorted({group.results[0]["rows"] for group in groups})
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="training rows", ylabel=label_of(name))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
