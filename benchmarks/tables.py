"""Write the tables of docs/performance.md from results/bench/: `python benchmarks/tables.py`.

A table stands between `<!-- table: BENCHMARK -->` and `<!-- end -->`; the rest is left alone.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import replacing  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"


def spread(values: dict[str, float], digits: int = 2, sign: str = "") -> str:
    """`median (smallest to largest)`, or the median alone where it is derived."""
    text = f"{values['median']:.{digits}f}{sign}"
    if "min" not in values:
        return text
    return f"{text} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def train_rows(result: dict) -> list[list[str]]:
    """One row a peer."""
    rows = []
    for name, peer in result["peers"].items():
        error = result["gate"]["errors"].get(name)
        rows.append(
            [
                result["size"], name, spread(peer["seconds"]),
                f"{peer['samples_per_second']:.2f}", f"{peer['tokens_per_second']:.0f}",
                f"{peer['percent_of_gemm_peak']:.0f} %", f"{peer['rss_mb']:.0f}",
                "" if error is None else f"{error:.0e}",
                ratio_to(result, name),
            ]
        )  # fmt: skip
    return rows + derived_rows(result, 6)


def decode_rows(result: dict) -> list[list[str]]:
    """One row a peer."""
    rows = []
    for name, peer in result["peers"].items():
        faster = result["ours_faster"].get(name)
        if name == "ours-hf":
            name, faster = "ours, --search hf", None
        rows.append(
            [
                f"{result['size']}, batch {result['batch']}", name, spread(peer["seconds"]),
                f"{peer['rss_mb']:.0f}", spread(faster, 2, "×") if faster else "",
            ]
        )  # fmt: skip
    hf = result["ours_faster"]["transformers, --search hf"]
    rows[-1][-1] += f"; --search hf {spread(hf, 2, '×')}"
    return rows + derived_rows(result, 2)


def ratio_to(result: dict, name: str) -> str:
    return spread(result["ours_faster"][name], 2, "×") if name in result["ours_faster"] else ""


def derived_rows(result: dict, blanks: int) -> list[list[str]]:
    """Rows of peers that were not run here."""
    return [
        [result["size"], name, *[""] * blanks, spread(ratio, 1, "×")]
        for name, ratio in result["ours_faster"].items()
        if name.endswith("derived")
    ]


HEADS: dict[str, tuple[list[str], Callable[[dict], list[list[str]]]]] = {
    "train": (
        ["model", "peer", "s/step", "samples/s", "real tokens/s", "of GEMM peak", "peak RSS MB",
         "loss difference", "ours is faster by"],
        train_rows,
    ),
    "decode": (
        ["model", "peer", "s/context", "peak RSS MB", "ours is faster by"],
        decode_rows,
    ),
}  # fmt: skip


def table(benchmark: str, results: list[dict]) -> str:
    """The Markdown table of one benchmark, with what it was measured on."""
    head, rows_of = HEADS[benchmark]
    mine = [result for result in results if result["benchmark"] == benchmark]
    lines = [head, ["---"] * len(head)] + [row for result in mine for row in rows_of(result)]
    notes = {
        f"{r['size']}: {r['rows']}, batch {r['batch']}, {r['machine']['threads']} threads of "
        f"{r['machine']['cpu']}, torch {r['machine']['torch']}, GEMM "
        f"{spread(r['gemm_gflops'], 0)} GFLOP/s, load average {r['machine']['load_average']:.1f}"
        for r in mine
    }
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return grid + "\n\n" + "\n".join(f"- {note}" for note in sorted(notes)) + "\n"


def main() -> None:
    """Fill every table whose results are there."""
    paths = sorted((ROOT / "results" / "bench").glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    page = PAGE.read_text(encoding="utf-8")
    for benchmark in HEADS:
        text = table(benchmark, results)
        pattern = rf"(<!-- table: {benchmark} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda m, text=text: m[1] + text + m[2], page, flags=re.DOTALL)
    with replacing(PAGE) as file:
        file.write(page)


if __name__ == "__main__":
    main()
