"""Several results of evaluate.py side by side, as a table and as one JSON file.

    python -m eval.summary --json result.json scores=adapter.json base_scores=base.json
    python -m eval.summary --json result.json --run runs/e2e/train "lp 0.8=beam.0.8.json"
    python -m eval.summary --json mean.json --mean seed-110/result.json seed-111/result.json

The first writes the scores by name; the second a run's settings and losses with them; the third
the mean and the standard deviation over files that the second wrote.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any, cast

from common.errors import InputError, Parser, run
from common.files import check_output, read_json_lines, write_json
from common.json_text import parse_json
from common.text_files import TextFile
from eval.choice import LOSS, SCORES, deciding, in_words, is_better

Scores = dict[str, float | None]


def read_json(path: str | Path, *fields: str) -> dict[str, Any]:
    """The object in a JSON file that has these fields.

    Raises:
        InputError: the file cannot be read, or holds no such object.
    """
    with TextFile(path) as text:
        content = text.read()
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; name a file that this repository wrote") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no object; name a file that this repository wrote")
    if missing := [name for name in fields if name not in value]:
        raise InputError(f"{path} has no {missing[0]!r} to sum up; name a file that has it")
    return value


def checked_scores(value: object, path: str | Path) -> Scores:
    """The value, if it is numbers (or null) by metric; InputError otherwise."""
    if are_scores(value):
        return cast(Scores, value)
    raise InputError(f"{path}: {value!r:.60} is not scores, numbers or null by metric")


def are_scores(value: object) -> bool:
    """Whether a value is numbers (or null) by name."""
    return isinstance(value, dict) and all(map(_is_score, value.values()))


def _is_score(value: object) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(cast(float, value)))


def read_scores(name: str, path: str) -> dict[str, Scores]:
    """The `scores` of a result file under `name`, and of its subsets under `name, subset`."""
    result = read_json(path, "scores")
    subsets = result.get("subsets", {})
    if not isinstance(subsets, dict) or not all(isinstance(p, dict) for p in subsets.values()):
        raise InputError(f"{path}: its subsets are not objects by name")
    parts = {f"{name}, {own}": part.get("scores") for own, part in subsets.items()}
    found = {name: result["scores"]} | parts
    return {own: checked_scores(scores, path) for own, scores in found.items()}


def read_rules(path: str) -> dict[str, Scores]:
    """The scores by rule of a file that --run made."""
    scores = read_json(path, "scores")["scores"]
    if not isinstance(scores, dict):
        raise InputError(f"{path}: {scores!r:.60} is not scores by rule, as --run writes them")
    return {name: checked_scores(own, path) for name, own in scores.items()}


def read_run(folder: str | Path) -> dict[str, Any]:
    """What a run's work_dir says of it: settings, code, its validation losses in nats, and the
    scores, if any, of the best validation, by the metric that chose model.best."""
    described = read_json(Path(folder) / "run.json", "settings", "git_commit", "python", "torch")
    log = Path(folder) / "log.jsonl"
    records = read_json_lines(log)
    try:
        steps = max(record["step"] for record in records)
        valid = [record for record in records if record["kind"] == "valid"]
        losses = [record["loss"] for record in valid]
        best = best_record(valid, deciding(described["settings"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{log} is no log of a run: a record lacks {error}") from error
    scores = {name: best[name] for name in SCORES if best and name in best}
    found = {name: described[name] for name in ("settings", "git_commit", "python", "torch")} | {
        "steps": steps,
        "valid_loss": losses[-1] if losses else None,
        "best_valid_loss": best and best["loss"],
        "best_step": best and best["step"],
    }
    return found | ({"best_valid_scores": scores} if scores else {})


def best_record(records: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The first of the best records of validations by a metric, None for none. A record without it
    is of a time when the run was to choose by another."""
    best: dict[str, Any] | None = None
    for record in records if metric == LOSS else [r for r in records if metric in r]:
        if is_better(metric, record[metric], best[metric] if best else None):
            best = record
    return best


def over_runs(paths: list[str]) -> dict[str, dict[str, Scores]]:
    """`mean` and `sd` (n - 1 in its denominator) of the scores that several results have in common,
    None where one of them has none."""
    scores = [read_rules(path) for path in paths]
    mean: dict[str, Scores] = {}
    sd: dict[str, Scores] = {}
    for name in scores[0]:
        for metric in scores[0][name]:
            found = [of_run.get(name, {}).get(metric) for of_run in scores]
            values = [value for value in found if value is not None]
            whole = len(values) == len(found)
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
    method = settings.get("method", "lora")
    size = settings.get("adapter_dim") or settings.get("prefix_length") or ""
    what = f"r {settings['lora_dim']}" if method == "lora" else f"{method} {size}".rstrip()
    count = f"{settings['trained_parameters']:,} trained"
    if method == "prefix":  # what is trained makes these
        count = f"{settings['saved_parameters']:,} saved"
    metric, best = deciding(settings), ""
    values = {LOSS: result["best_valid_loss"]} | result.get("best_valid_scores", {})
    if values[LOSS] is not None:
        best = f", best valid {in_words(metric, values[metric])} at step {result['best_step']}"
    return (
        f"{settings['model_card']}, {what}, {count}, "
        f"seed {settings['random_seed']}, {result['steps']:,} steps{best}; {seconds}"
    )


def named_values(entries: list[str], flag: str) -> dict[str, str]:
    """`NAME=VALUE` entries by name."""
    pairs = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise InputError(f"{flag} {entry!r} is not NAME=VALUE")
        pairs[name] = value
    return pairs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", metavar="NAME=FILE", help="with --mean: files of --run")
    add("--json", required=True, help="file to write")
    add("--run", metavar="FOLDER", help="work_dir of the training that the results are of")
    add("--seconds", nargs="*", default=[], metavar="NAME=N", help="of the run, for its JSON")
    add("--mean", action="store_true", help="over the results of several runs")
    add("--published", nargs="*", default=[], metavar="ROW", help='"NAME: BLEU=.7", for the table')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    sd = None
    files = {} if args.mean else named_values(args.results, "result")
    inputs = args.results if args.mean else files.values()
    check_output("--json", args.json, {path: path for path in inputs})
    published = [published_scores(text) for text in args.published]
    if args.mean:
        result: dict[str, Any] = over_runs(args.results) | {"runs": args.results}
        scores, sd = result["mean"], result["sd"]
    else:
        scores = {}
        for name, path in files.items():
            scores |= read_scores(name, path)
        result = scores
    if args.run:
        result = read_run(args.run) | {"seconds": _seconds(args.seconds), "scores": scores}
        print(headline(result))
    write_json(args.json, result)
    for rows in published:
        scores = scores | rows
    print(table(scores, sd))


def _seconds(entries: list[str]) -> dict[str, float]:
    try:
        return {name: float(n) for name, n in named_values(entries, "--seconds").items()}
    except ValueError as error:
        raise InputError(f"--seconds: {error}; give NAME=NUMBER") from error


if __name__ == "__main__":
    run(main)
