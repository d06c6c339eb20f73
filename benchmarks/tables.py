"""The tables of results/bench/, which experiments/tables.py puts into docs and README."""

from collections.abc import Callable


def spread(values: dict[str, float], digits: int = 2, sign: str = "") -> str:
    """`median (smallest to largest)`, or the median alone where it is derived."""
    text = f"{values['median']:.{digits}f}{sign}"
    if "min" not in values:
        return text
    return f"{text} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def train_rows(result: dict) -> list[list[str]]:
    """One row per peer."""
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
    """One row per peer."""
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


def end_to_end_rows(result: dict) -> list[list[str]]:
    """One row per path: seconds of its parts, and its scores."""
    rows = []
    for name, path in result["paths"].items():
        seconds, scores = path["seconds"], path["scores"]
        parts = [f"{seconds[name]['median']:.1f}" for name in PARTS]
        texts = [spread(scores[name]) if name in scores else "" for name in OF_E2E]
        rows.append(
            [
                result["size"], name, *parts, spread(seconds["all"], 1), spread(seconds["CPU"], 1),
                *texts, ratio_to(result, name),
            ]
        )  # fmt: skip
    return rows


def ratio_to(result: dict, name: str) -> str:
    return spread(result["ours_faster"][name], 2, "×") if name in result["ours_faster"] else ""


def derived_rows(result: dict, blanks: int) -> list[list[str]]:
    """Rows of peers that were not run here."""
    return [
        [result["size"], name, *[""] * blanks, spread(ratio, 1, "×")]
        for name, ratio in result["ours_faster"].items()
        if name.endswith("derived")
    ]


def grouped_conv_rows(result: dict) -> list[list[str]]:
    """One row per width and rank."""
    return [
        [f"gpt2.{case['size']}", str(case["rank"]), *map(spread, case["milliseconds"].values())]
        for case in result["cases"]
    ]


def scaling_rows(result: dict) -> list[list[str]]:
    """One row per varied quantity: its values, milliseconds of each, and of each per unit."""
    rows = []
    for kind, what in dict.fromkeys((case["kind"], case["what"]) for case in result["cases"]):
        own = [c for c in result["cases"] if (c["kind"], c["what"]) == (kind, what)]
        times = [(c["value"], 1e3 * c["seconds"]["median"]) for c in own]
        rows.append(
            [
                f"{kind}: {what}",
                ", ".join(str(value) for value, _ in times),
                ", ".join(f"{ms:.0f}" for _, ms in times) + " ms",
                ", ".join(f"{ms / value:.2f}" for value, ms in times) + " ms",
            ]
        )
    speeds = {n: values["median"] for n, values in result["processes"].items()}
    rows.append(
        [
            "training: processes of one thread",
            ", ".join(speeds),
            ", ".join(f"{speed:.0f}" for speed in speeds.values()) + " tokens/s",
            ", ".join(f"{speed / speeds['1']:.2f}" for speed in speeds.values()) + " times as fast",
        ]
    )
    return rows


PARTS = ("data", "training", "decoding", "scoring")
OF_E2E = ("BLEU", "NIST", "CIDEr", "SER")
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
    "end_to_end": (
        ["data", "path", *(f"{part}, s" for part in (*PARTS, "all", "CPU")), *OF_E2E,
         "ours is faster by"],
        end_to_end_rows,
    ),
    "grouped_conv": (
        ["model", "r", "grouped convolution, ms", "block-diagonal matrix, ms",
         "products apart, ms"],
        grouped_conv_rows,
    ),
    "scaling": (
        ["what is varied", "values", "cost", "cost by value"],
        scaling_rows,
    ),
}  # fmt: skip


def table(benchmark: str, results: list[dict]) -> str:
    """The Markdown table of one benchmark, with what it was measured on."""
    head, rows_of = HEADS[benchmark]
    mine = [result for result in results if result["benchmark"] == benchmark]
    rows = [row for result in mine for row in rows_of(result)]
    return grid(head, rows) + "\n" + "".join(f"- {note(result)}\n" for result in mine)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def note(result: dict) -> str:
    """What a result was measured on."""
    machine = result["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    text = (
        f"{threads} of {machine['cpu']}, torch {machine['torch']}, "
        f"load average {machine['load_average']:.1f}"
    )
    if "gemm_gflops" in result:
        text += f", GEMM {spread(result['gemm_gflops'], 0)} GFLOP/s"
    if "rows" in result:
        text = f"{result['size']}: {result['rows']}, batch {result['batch']}, {text}"
    if "versions" in result:
        text += ", " + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return text


ORIGINALS = {
    "original, derived": "",
    "original at batch 1, derived": "per context (it takes one at a time)",
    "original, the whole file, derived": "for the whole file",
}


TASKS = {"train": "training", "decode": "decoding", "end_to_end": "raw files to scores"}


def speed(results: list[dict]) -> str:
    """What README says of speed: ours over the fastest peer and over the original, in one row a
    benchmark."""
    rows = []
    for result in results:
        if "ours_faster" not in result:
            continue
        faster = result["ours_faster"]
        of_peers = [faster[name] for name in faster if name.startswith(("peft", "sft"))]
        best = min(of_peers, key=lambda ratio: ratio["median"], default=faster.get("transformers"))
        peers = spread(best, 1, "×")
        if hf := faster.get("transformers, --search hf"):
            peers += f"; by transformers' rules {spread(hf, 1, '×')}"
        derived = [
            f"{spread(faster[name], 0, '×')} {what}".strip()
            for name, what in ORIGINALS.items()
            if name in faster
        ]
        task = TASKS[result["benchmark"]]
        name = f"{task}, {result['size']}, batch {result['batch']}"
        rows.append([name, peers, "; ".join(derived)])
    return grid(["", "over transformers (+ peft, trl)", "over the original (derived)"], rows)
