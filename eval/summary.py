"""Several results of evaluate.py side by side, as a table and as one JSON file.

python eval/summary.py --json result.json scores=adapter.json base_scores=base.json
"""

import argparse
import json
import sys
from pathlib import Path

# Run as a script from anywhere: the repository's packages are found beside this folder, not in it.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from errors import InputError, run
from files import write_json


def read_scores(path: str) -> dict[str, float | None]:
    """The `scores` of a result file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no result of evaluate.py: {error}") from error


def table(results: dict[str, dict[str, float | None]]) -> str:
    """One row per result, one column per metric; what could not be scored is n/a."""
    metrics = list(dict.fromkeys(metric for scores in results.values() for metric in scores))
    width = max(map(len, results))
    lines = [" " * width + "".join(f"{metric:>10}" for metric in metrics)]
    for name, scores in results.items():
        values = [scores.get(metric) for metric in metrics]
        cells = ["n/a" if value is None else f"{value:.4f}" for value in values]
        lines.append(name.ljust(width) + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--json", required=True, help="file to write")
    args = parser.parse_args()
    pairs = [entry.partition("=") for entry in args.results]
    results = {name: read_scores(path) for name, _, path in pairs}
    write_json(args.json, results)
    print(table(results))


if __name__ == "__main__":
    run(main)
