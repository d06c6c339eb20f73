"""The figures of docs/experiments.md, drawn from results/e2e-mini/.

Every point is a mean over seeds; its bar reaches from the lowest to the highest seed. Each PNG
carries a digest of the numbers that it shows, so that a test can tell whether it is still that of
the results; the pixels themselves differ between versions of matplotlib.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.files import replacing
from experiments.compare import SOURCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

ALL_ROWS = 42_061  # of E2E's training file
TARGETS = ("q,v", "all", "fc,proj", "q,k,v,o")

Point = tuple[float, float, float, float]  # x, mean, least, greatest
Series = dict[str, list[Point]]
Results = list[dict]

NAMES = {
    "lora": "LoRA", "rslora": "rsLoRA", "lora_plus": "LoRA+", "dora": "DoRA", "pissa": "PiSSA",
    "lora_fa": "LoRA-FA", "full": "full fine-tuning", "top2": "FT-Top2", "bitfit": "BitFit",
}  # fmt: skip
SCALINGS = {"lora": "alpha/r", "rslora": "alpha/√r"}
CLOSE = ("LoRA", "rsLoRA", "LoRA+", "DoRA", "PiSSA")  # learning curves that only a close-up parts
# The colours of Okabe and Ito, which most colour-blind readers can tell apart, and grey.
COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999",
    "#B8A800",
)  # fmt: skip
MARKERS = "osD^vPX*p"
GAP = 0.055  # least distance of two labels, as a share of the axes' height
DODGE = 0.012  # sideways shift between series whose bars would cover each other, as a share of x
FEW = 6  # values of x that each get a tick


class Figure(NamedTuple):
    """What a figure shows, how it is drawn, and what is written on it."""

    series_of: Callable[[Results], Series]
    draw_on: Callable[["Canvas", Series, "Figure"], None]
    title: str
    x_label: str
    y_label: str = ""


def points(pairs: list[tuple[float, float]]) -> list[Point]:
    """Mean, least and greatest y of each x, over its seeds."""
    groups = defaultdict(list)
    for x, y in pairs:
        groups[x].append(y)
    return [(x, statistics.mean(ys), min(ys), max(ys)) for x, ys in sorted(groups.items())]


def bleu(result: dict) -> float:
    return 100 * result["scores"]["BLEU"]


def of_all_rows(results: Results) -> Results:
    """Runs on all rows that adapt query and value, or no layer in particular."""
    return [r for r in results if r["rows"] == ALL_ROWS and r["targets"] == TARGETS[0]]


def learning_curves(results: Results) -> Series:
    """Validation loss against the step for each method, adapters at r 4."""
    own = [r for r in of_all_rows(results) if r["rank"] in (0, 4)]
    return {
        name: points([(step, loss) for r in own if r["kind"] == kind
                      for step, loss in r["curves"]["valid"]])
        for kind, name in NAMES.items()
    }  # fmt: skip


def bleu_by_rank(results: Results) -> Series:
    """BLEU against the rank for each scaling."""
    own = of_all_rows(results)
    return {
        name: points([(r["rank"], bleu(r)) for r in own if r["kind"] == kind])
        for kind, name in SCALINGS.items()
    }


def bleu_by_trained(results: Results) -> Series:
    """BLEU of each method and rank, by the number of trained parameters."""
    runs = defaultdict(list)
    for r in of_all_rows(results):
        rank = f", r {r['rank']}" if r["rank"] else ""
        runs[NAMES[r["kind"]] + rank].append((r["trainable"], bleu(r)))
    order = sorted(runs, key=lambda name: (runs[name][0][0], name))
    return {name: points(runs[name]) for name in order}


def low_data(results: Results) -> Series:
    """BLEU of LoRA of rank 4 against the number of training rows."""
    plain = ("lora", 4, TARGETS[0])
    own = [r for r in results if (r["kind"], r["rank"], r["targets"]) == plain]
    return {"LoRA, r 4": points([(r["rows"], bleu(r)) for r in own])}


def spread(places: list[float], gap: float) -> list[float]:
    """The places moved apart to at least `gap`, in their order, as little as that allows.

    Places that come too near form a group, spaced evenly around their mean.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[float]] = []  # of places still to be spaced
    for i in order:
        groups.append([places[i]])
        while len(groups) > 1 and _lowest(groups[-1], gap) - _highest(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1] += last
    moved = [_lowest(group, gap) + i * gap for group in groups for i in range(len(group))]
    return [place for _, place in sorted(zip(order, moved, strict=True))]


def _lowest(group: list[float], gap: float) -> float:
    return statistics.mean(group) - gap * (len(group) - 1) / 2


def _highest(group: list[float], gap: float) -> float:
    return statistics.mean(group) + gap * (len(group) - 1) / 2


def look(name: str) -> dict:
    """The colour and marker of a series, the same in every figure."""
    names = [*NAMES.values()]
    key = name.split(",")[0]
    by_scaling = {scaling: NAMES[kind] for kind, scaling in SCALINGS.items()}
    i = names.index(by_scaling.get(key, key))
    return {"color": COLORS[i], "marker": MARKERS[i]}


def draw_lines(axes: "Axes", series: Series) -> None:
    """A line with bars for each series, its name at its last point."""
    drawn = {name: line for name, line in series.items() if line}
    for i, (name, line) in enumerate(drawn.items()):
        x, mean, least, greatest = (list(values) for values in zip(*line, strict=True))
        shift = DODGE * (i - (len(drawn) - 1) / 2)
        if axes.get_xscale() == "log":
            x = [place * (max(x) / min(x)) ** shift for place in x]
        else:
            x = [place + (max(x) - min(x)) * shift for place in x]
        bars = [
            [m - low for m, low in zip(mean, least, strict=True)],
            [high - m for m, high in zip(mean, greatest, strict=True)],
        ]
        axes.errorbar(x, mean, bars, markersize=5, linewidth=1.2, elinewidth=1, **look(name))
    low, high = axes.get_ylim()
    heights = [(line[-1][1] - low) / (high - low) for line in drawn.values()]
    for (name, line), height in zip(drawn.items(), spread(heights, GAP), strict=True):
        color = look(name)["color"]
        axes.annotate(
            name, xy=line[-1][:2], xytext=(1.04, height), textcoords="axes fraction", va="center",
            color=color, fontsize=8,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkB": 5},
        )  # fmt: skip
    axes.grid(alpha=0.3)


def draw_curves(canvas: "Canvas", series: Series, figure: Figure) -> None:
    """All learning curves, and a close-up of those that lie on one another."""
    whole, near = canvas.subplots(1, 2)
    others = {name: line for name, line in series.items() if name not in CLOSE[1:]}
    draw_lines(whole, others)
    draw_lines(near, {name: line for name, line in series.items() if name in CLOSE})
    whole.set_title("every method (of LoRA's kinds, LoRA)", fontsize=9)
    near.set_title("close-up: LoRA and its kinds", fontsize=9)
    for axes in (whole, near):
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)


def draw_by_count(canvas: "Canvas", series: Series, figure: Figure) -> None:
    """Scores from zero up against a count, which gets a tick for each of its few values."""
    axes = canvas.subplots()
    places = sorted({point[0] for line in series.values() for point in line})
    axes.set_xscale("log")
    if len(places) <= FEW:
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
    greatest = max((point[3] for line in series.values() for point in line), default=1)
    axes.set_ylim(0, 1.1 * greatest)
    draw_lines(axes, series)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)


def draw_rows(canvas: "Canvas", series: Series, figure: Figure) -> None:
    """A row for each name, with its count, its mean and its bar."""
    axes = canvas.subplots()
    for row, (name, [(_, mean, least, greatest)]) in enumerate(series.items()):
        bars = [[mean - least], [greatest - mean]]
        axes.errorbar([mean], [row], xerr=bars, markersize=6, linewidth=1.2, **look(name))
    labels = [f"{name}  ·  {line[0][0]:,}" for name, line in series.items()]
    axes.set_yticks(range(len(series)), labels, fontsize=8)
    axes.set_xlim(left=0)
    axes.set(xlabel=figure.x_label)
    axes.grid(alpha=0.3)


FIGURES = {
    "learning_curves": Figure(
        learning_curves, draw_curves, "Validation loss by method, adapters of rank 4", "step",
        "validation loss, nats per token",
    ),
    "bleu_by_rank": Figure(
        bleu_by_rank, draw_by_count, "BLEU by rank, under both scalings", "rank r", "BLEU",
    ),
    "bleu_by_trained": Figure(
        bleu_by_trained, draw_rows, "BLEU by method, in the order of trained parameters", "BLEU",
    ),
    "low_data": Figure(
        low_data, draw_by_count, "BLEU by number of training rows, 1,000 steps each",
        "training rows", "BLEU",
    ),
}  # fmt: skip


def digest(name: str, results: Results) -> str:
    """The digest of the numbers that the figure shows."""
    series = FIGURES[name].series_of(results)
    return hashlib.sha256(json.dumps([name, series]).encode()).hexdigest()


def source_of(path: Path) -> str | None:
    """The digest that a figure carries, None where there is no such figure."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(SOURCE)


def draw(path: Path, results: Results) -> None:
    """Draw the figure that the file's name says."""
    import matplotlib.pyplot as plt

    figure = FIGURES[path.stem]
    size = (10.0, 4.2) if figure.draw_on is draw_curves else (7.2, 4.2)
    canvas = plt.figure(figsize=size, layout="constrained")
    figure.draw_on(canvas, figure.series_of(results), figure)
    canvas.suptitle(figure.title, fontsize=11)
    with replacing(path, "wb") as file:
        metadata = {SOURCE: digest(path.stem, results)}
        canvas.savefig(file, format="png", dpi=120, metadata=metadata)
    plt.close(canvas)
