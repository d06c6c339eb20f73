"""Draw runs side by side: loss, perplexity, learning rate, and scores where there are any, those of
validations as curves and those of the test data as bars.

    python -m experiments.plot_run runs/a runs/b --output runs.png

The curves come from each run's log.jsonl, the bars from a scores.json or result.json in the run's
folder or the one above it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError, Parser, run
from common.files import check_output, read_json_lines, replacing
from eval.choice import SCORES
from eval.summary import Scores, checked_scores, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("scores.json", "result.json")
CURVES = {"loss": "loss, nats per token", "ppl": "perplexity", "lr": "learning rate"}


def read_scores(folder: Path) -> Scores:
    """The scores of a run by metric; of a file with several results the first; none if unscored."""
    for path in (where / name for where in (folder, folder.parent) for name in FILES):
        if path.is_file():
            scores = read_json(path, "scores")["scores"]
            several = isinstance(scores, dict) and [
                v for v in scores.values() if isinstance(v, dict)
            ]
            found = checked_scores(several[0] if several else scores, path)
            return {name: value for name, value in found.items() if value is not None}
    return {}


def titles_of(runs: list[list[dict]]) -> dict[str, str]:
    """What is drawn of the records of these runs, by field, with the label of its axis."""
    fields = {field for records in runs for record in records for field in record}
    return CURVES | {n: f"{label} on validation" for n, label in SCORES.items() if n in fields}


def draw_curves(axes: dict[str, "Axes"], color: str, name: str, records: list[dict]) -> None:
    """One run's curves on the axes of their fields: training as a line, validation as dots."""
    for field, own in axes.items():
        for kind, label, style in (("train", name, "-"), ("valid", None, "o:")):
            mine = [record for record in records if record.get("kind") == kind]
            pairs = [(record.get("step"), record.get(field)) for record in mine]
            points = [pair for pair in pairs if all(isinstance(n, int | float) for n in pair)]
            if points:
                own.plot(*zip(*points, strict=True), style, label=label, color=color)


def draw_scores(axes: "Axes", scores: list[Scores]) -> None:
    """A group of bars per metric, one bar per run, in the colours of their curves; NIST and CIDEr
    are shown in tenths."""
    metrics = list(dict.fromkeys(metric for own in scores for metric in own))
    width = 0.8 / max(len(scores), 1)
    for i, own in enumerate(scores):
        bars = [(m + i * width, own.get(metric), metric) for m, metric in enumerate(metrics)]
        for place, value, metric in bars:
            if value is not None:
                height = value / (10 if metric in ("NIST", "CIDEr") else 1)
                axes.bar(place, height, width, color=f"C{i}")
    labels = [f"{m}/10" if m in ("NIST", "CIDEr") else m for m in metrics]
    axes.set_xticks([m + 0.4 - width / 2 for m in range(len(metrics))], labels, fontsize=8)
    axes.set(title="Scores", ylabel="score")
    axes.grid(alpha=0.3, axis="y")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="work_dir of a run")
    parser.add_argument("--output", type=Path, default="runs.png", help="default: %(default)s")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not (folder / "log.jsonl").is_file():
            raise InputError(f"{folder} holds no log.jsonl; name the work_dir of a run")
        check_output("--output", args.output, {"log.jsonl": folder / "log.jsonl"})
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [read_json_lines(folder / "log.jsonl") for folder in args.runs]
    titles, scores = titles_of(runs), [read_scores(folder) for folder in args.runs]
    rows = (len(titles) + 2) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), layout="constrained")
    places = list(grid.flat)
    curves = dict(zip(titles, places, strict=False))
    for field, axes in curves.items():
        axes.set(title=titles[field].split(",")[0], xlabel="step", ylabel=titles[field])
        axes.grid(alpha=0.3)
    curves["ppl"].set_yscale("log")
    for i, (folder, records) in enumerate(zip(args.runs, runs, strict=True)):
        draw_curves(curves, f"C{i}", str(folder), records)
    left = places[len(titles) :]
    if any(scores):
        draw_scores(left.pop(0), scores)
    for axes in left:
        axes.remove()
    curves["loss"].legend(fontsize=8, title="line: training, dots: validation", title_fontsize=8)
    with replacing(args.output, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    print(f"{args.output}: {len(args.runs)} runs")


if __name__ == "__main__":
    run(main)
