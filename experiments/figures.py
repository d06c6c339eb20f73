"""The figures of docs/experiments.md, drawn from the results of experiments/sweep.py.

Each PNG carries a digest of the numbers that it shows, so that a test can tell whether it is still
that of the results; the pixels themselves differ between versions of matplotlib.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from common.files import replacing
from experiments.sweep import ALL_ROWS, TARGETS

Series = dict[str, list[tuple[float, float, float, float]]]  # name: x, mean, least, greatest
Results = list[dict]

NAMES = {
    "lora": "LoRA r 4", "rslora": "rsLoRA r 4", "lora_plus": "LoRA+ r 4", "dora": "DoRA r 4",
    "pissa": "PiSSA r 4", "lora_fa": "LoRA-FA r 4", "full": "full", "top2": "FT-Top2",
    "bitfit": "BitFit",
}  # fmt: skip
FEW = 6  # values of x that each get a tick
SOURCE = "Source"  # the PNG's text chunk that holds the digest


def points(pairs: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
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


def valid_of(result: dict) -> list[list[float]]:
    """Pairs of step and loss."""
    return result["curves"]["valid"]


def learning_curves(results: Results) -> Series:
    """Validation loss against the step, one line a kind."""
    own = [r for r in of_all_rows(results) if r["rank"] in (0, 4)]
    return {
        name: points([tuple(point) for r in own if r["kind"] == kind for point in valid_of(r)])
        for kind, name in NAMES.items()
    }


def bleu_by_rank(results: Results) -> Series:
    """BLEU against the rank, one line a scaling."""
    own = of_all_rows(results)
    return {
        name: points([(r["rank"], bleu(r)) for r in own if r["kind"] == kind])
        for kind, name in (("lora", "alpha/r"), ("rslora", "alpha/√r"))
    }


def bleu_by_trained(results: Results) -> Series:
    """BLEU against the count of trained parameters, one line a kind."""
    own = of_all_rows(results)
    return {
        name.removesuffix(" r 4"): points(
            [(r["trainable"], bleu(r)) for r in own if r["kind"] == kind]
        )
        for kind, name in NAMES.items()
    }


def low_data(results: Results) -> Series:
    """BLEU of LoRA of rank 4 against the count of training rows."""
    plain = ("lora", 4, TARGETS[0])
    own = [r for r in results if (r["kind"], r["rank"], r["targets"]) == plain]
    return {"LoRA r 4": points([(r["rows"], bleu(r)) for r in own])}


# By name: the series, the labels of the axes, and whether x is logarithmic.
FIGURES: dict[str, tuple[Callable[[Results], Series], str, str, bool]] = {
    "learning_curves": (learning_curves, "step", "validation loss, nats a token", False),
    "bleu_by_rank": (bleu_by_rank, "rank r", "BLEU", True),
    "bleu_by_trained": (bleu_by_trained, "trained parameters", "BLEU", True),
    "low_data": (low_data, "training rows", "BLEU", True),
}


def digest(name: str, results: Results) -> str:
    """Of the numbers that the figure shows."""
    series = FIGURES[name][0](results)
    return hashlib.sha256(json.dumps([name, series]).encode()).hexdigest()


def source_of(path: Path) -> str | None:
    """The digest that a figure carries, None where there is no such figure."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.text.get(SOURCE)


def draw(path: Path, results: Results) -> None:
    """Draw the figure that the file's name says."""
    import matplotlib.pyplot as plt

    series_of, x_label, y_label, is_logarithmic = FIGURES[path.stem]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    series = series_of(results)
    for name, line in series.items():
        if not line:
            continue
        x, mean, least, greatest = zip(*line, strict=True)
        (drawn,) = axes.plot(x, mean, marker="o", markersize=4, label=name)
        if len(x) > 1:
            axes.fill_between(x, least, greatest, alpha=0.15, color=drawn.get_color())
        else:
            axes.vlines(x, least, greatest, color=drawn.get_color(), alpha=0.5)
    places = sorted({point[0] for line in series.values() for point in line})
    if is_logarithmic:
        axes.set_xscale("log")
        if len(places) <= FEW:
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    with replacing(path, "wb") as file:
        metadata = {SOURCE: digest(path.stem, results)}
        figure.savefig(file, format="png", dpi=120, metadata=metadata)
    plt.close(figure)
