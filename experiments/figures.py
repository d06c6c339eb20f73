"""The figures of docs/experiments.md, drawn from results/e2e/.

The first question has two of its own; every other group of runs has that of `experiments.compare`.
Each PNG carries a digest of the numbers that it shows, so that a test can tell whether it is still
that of the results; the pixels themselves differ between versions of matplotlib.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.files import replacing
from experiments import compare
from experiments.compare import COLORS, SOURCE, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 0.95  # of full fine-tuning's BLEU: a line to compare with
Point = tuple[float, float, float, float]  # x, mean, least, greatest

# The figures of each group of runs, with what is said of them where they cannot be seen.
OF_GROUP = {
    "must": {
        "e2e_trained": "BLEU against the number of trained parameters, a dot for each seed",
        "e2e_curves": "Validation loss against the step, by method",
    }
}


def of_group(name: str) -> dict[str, str]:
    """The names of a group's figures, each with its description."""
    usual = {f"e2e_{name}": f"Scores of the group {name}, a dot for each seed"}
    return OF_GROUP.get(name, usual)


class Shown(NamedTuple):
    """What a figure shows of the runs that differ in nothing but their seed."""

    title: str
    trained: int
    bleus: list[float]
    curve: list[Point]


def shown(group: Group) -> Shown:
    """The numbers of a group that has results."""
    curve = [pair for result in group.results for pair in result["curves"]["valid"]]
    bleus = [100 * bleu for bleu in group.scores("BLEU") if bleu is not None]
    return Shown(group.title, group.results[0]["trainable"], bleus, points(curve))


def points(pairs: Sequence[Sequence[float]]) -> list[Point]:
    """Mean, least and greatest y of each x, over its seeds."""
    found = defaultdict(list)
    for x, y in pairs:
        found[x].append(y)
    return [(x, statistics.mean(ys), min(ys), max(ys)) for x, ys in sorted(found.items())]


def draw_trained(axes: "Axes", methods: Sequence[Shown]) -> None:
    """BLEU against trained parameters, with lines at full fine-tuning's mean and close to it."""
    axes.set_xscale("log")
    for color, method in zip(COLORS, methods, strict=False):
        mean, x = statistics.mean(method.bleus), method.trained
        label = f"{method.title}: {mean:.1f} with {x:,}"
        axes.plot([x] * len(method.bleus), method.bleus, "o", color=color, alpha=0.5)
        axes.plot([x], [mean], "_", color=color, markersize=18, label=label)
        if method.title == "full fine-tuning":
            axes.axhline(mean, color="grey", linewidth=0.8)
            axes.axhline(CLOSE * mean, color="grey", linewidth=0.8, linestyle=":",
                         label=f"{CLOSE:.0%} of full fine-tuning")  # fmt: skip
    axes.set(title="BLEU by size", xlabel="trained parameters", ylabel="BLEU")


def draw_curves(axes: "Axes", methods: Sequence[Shown]) -> None:
    """Mean validation loss of each method, its band from the lowest to the highest seed."""
    for color, method in zip(COLORS, methods, strict=False):
        x, mean, least, greatest = zip(*method.curve, strict=True)
        axes.plot(x, mean, "o-", color=color, markersize=4, linewidth=1.2, label=method.title)
        axes.fill_between(x, least, greatest, color=color, alpha=0.2, linewidth=0)
    axes.set(title="Learning curves", xlabel="step", ylabel="validation loss, nats per token")


DRAWN = {"e2e_trained": draw_trained, "e2e_curves": draw_curves}


def digest(name: str, groups: Sequence[Group]) -> str:
    """The digest of the numbers that a figure of these groups shows."""
    if name not in DRAWN:
        return compare.digest(groups)
    numbers = [shown(group) for group in groups if group.results]
    return hashlib.sha256(json.dumps([name, numbers]).encode()).hexdigest()


def source_of(path: Path) -> str | None:
    """The digest that a figure carries, None where there is no such figure."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(SOURCE)


def draw(path: Path, groups: Sequence[Group]) -> None:
    """Draw the figure that the file's name says, of groups of which one has results."""
    if path.stem not in DRAWN:
        compare.draw(path, groups)
        return
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    DRAWN[path.stem](axes, [shown(group) for group in groups if group.results])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with replacing(path, "wb") as file:
        metadata = {SOURCE: digest(path.stem, groups)}
        canvas.savefig(file, format="png", dpi=120, metadata=metadata)
    plt.close(canvas)
