"""Several results of evaluate.py side by side, as a table and as one JSON file.

    python -m eval.summary --json result.json scores=adapter.json base_scores=base.json
    python -m eval.summary --json result.json --run runs/e2e/train "lp 0.8=beam.0.8.json"
    python -m eval.summary --json mean.json --mean seed-110/result.json seed-111/result.json

The first writes the scores by name; the second a run's settings and losses with them; the third
the mean and the standard deviation over files that the second wrote.
"""

import argparse
import json
import statistics
from pathlib import Path

from common.errors import InputError, run
from common.files import read_json_lines, write_json

Scores = dict[str, float | None]


def read_json(path: str | Path, field: str) -> dict:
    """The object in a JSON file that has `field`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        value[field]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no {field} to sum up: {error}") from error
    return value


def read_scores(name: str, path: str) -> dict[str, Scores]:
    """The `scores` of a result file under `name`, and of its subsets under `name, subset`."""
    result = read_json(path, "scores")
    subsets = result.get("subsets", {}).items()
    return {name: result["scores"]} | {f"{name}, {own}": part["scores"] for own, part in subsets}


def read_run(folder: str | Path) -> dict:
    """What a run's work_dir says of it: settings, code, and its validation losses in nats."""
    described = read_json(Path(folder) / "run.json", "settings")
    records = read_json_lines(Path(folder) / "log.jsonl")
    valid = [record for record in records if record["kind"] == "valid"]
    best = min(valid, key=lambda record: record["loss"], default=None)
    return {name: described[name] for name in ("settings", "git_commit", "python", "torch")} | {
        "steps": max(record["step"] for record in records),
        "valid_loss": valid[-1]["loss"] if valid else None,
        "best_valid_loss": best and best["loss"],
        "best_step": best and best["step"],
    }


def over_runs(paths: list[str]) -> dict[str, dict[str, Scores]]:
    """`mean` and `sd` (n - 1 in its denominator) of the scores that several results have in common,
    None where one of them has none."""
    scores = [read_json(path, "scores")["scores"] for path in paths]
    mean: dict[str, Scores] = {}
    sd: dict[str, Scores] = {}
    for name in scores[0]:
        for metric in scores[0][name]:
            values = [of_run.get(name, {}).get(metric) for of_run in scores]
            whole = None not in values
            mean.setdefault(name, {})[metric] = statistics.mean(values) if whole else None
            spread = statistics.stdev(values) if whole and len(values) > 1 else None
            sd.setdefault(name, {})[metric] = spread
    return {"mean": mean, "sd": sd}


def published_scores(text: str) -> dict[str, Scores]:
    """`"NAME: BLEU=.704 NIST=8.85"` as a row of the table."""
    name, _, pairs = text.partition(": ")
    try:
        values = dict(pair.split("=") for pair in pairs.split())
        return {name: {metric: float(value) for metric, value in values.items()}}
    except ValueError as error:
        raise InputError(f"--published {text!r} is not NAME: METRIC=VALUE ...") from error


def table(results: dict[str, Scores], sd: dict[str, Scores] | None = None) -> str:
    """One row per result, one column per metric; what could not be scored is n/a."""
    metrics = list(dict.fromkeys(metric for scores in results.values() for metric in scores))
    width, column = max(map(len, results)), 18 if sd else 10
    lines = [" " * width + "".join(f"{metric:>{column}}" for metric in metrics)]
    for name, scores in results.items():
        cells = []
        for metric in metrics:
            value, spread = scores.get(metric), (sd or {}).get(name, {}).get(metric)
            number = "n/a" if value is None else f"{value:.4f}"
            cells.append(number if spread is None else f"{number} +- {spread:.4f}")
        lines.append(name.ljust(width) + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def headline(result: dict) -> str:
    """What was trained and for how long, in a line."""
    settings = result["settings"]
    seconds = ", ".join(f"{name} {value:g} s" for name, value in result["seconds"].items())
    loss = result["best_valid_loss"]
    best = "" if loss is None else f", best valid loss {loss:.4f} behind step {result['best_step']}"
    return (
        f"{settings['model_card']}, r {settings['lora_dim']}, {settings['trained_parameters']:,} "
        f"trained, seed {settings['random_seed']}, {result['steps']:,} steps{best}; {seconds}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", nargs="+", metavar="NAME=FILE", help="with --mean: files of --run")
    add("--json", required=True, help="file to write")
    add("--run", metavar="FOLDER", help="work_dir of the training that the results are of")
    add("--seconds", nargs="*", default=[], metavar="NAME=N", help="of the run, for its JSON")
    add("--mean", action="store_true", help="over the results of several runs")
    add("--published", nargs="*", default=[], metavar="ROW", help='"NAME: BLEU=.7", for the table')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sd = None
    if args.mean:
        result = over_runs(args.results) | {"runs": args.results}
        scores, sd = result["mean"], result["sd"]
    else:
        pairs = [entry.partition("=") for entry in args.results]
        scores = {}
        for name, _, path in pairs:
            scores |= read_scores(name, path)
        result = scores
    if args.run:
        seconds = {name: float(n) for name, _, n in (s.partition("=") for s in args.seconds)}
        result = read_run(args.run) | {"seconds": seconds, "scores": scores}
        print(headline(result))
    write_json(args.json, result)
    for text in args.published:
        scores = scores | published_scores(text)
    print(table(scores, sd))


if __name__ == "__main__":
    run(main)
