"""Look at outputs in a browser: scores, and every item with what one or two systems made of it.

    python -m eval.report --task e2e --data test.jsonl --predictions lora.jsonl --html report.html
    python -m eval.report --task e2e --data test.jsonl --predictions full.jsonl lora.jsonl ...
    python -m eval.report ... --predictions "rank 1=a.jsonl" "rank 4=b.jsonl"

The page is one file that needs no network. Of two systems, the second is compared with the first.
"""

import argparse
import base64
import hashlib
import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from common.errors import InputError, Parser, run
from common.files import check_output, replacing
from eval import coco, evaluate, tables, texts
from eval.coverage import missing_values, values
from eval.metrics import LOWER_IS_BETTER, Measured, measure
from eval.slots import parse_meaning, slot_errors
from eval.texts import EMPTY_OUTPUT, Item

PAGE = Path(__file__).with_name("page")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
KINDS = ("missing", "wrong", "added", "repeated")

Runs = list[str]  # a text in pieces, in turn common to both systems and different
Fault = tuple[str, str]  # one of KINDS, and the slot or value


def differing_words(one: str, other: str) -> tuple[Runs, Runs]:
    """Both texts in pieces, every second of which holds words that the other text does not have at
    this place; joined, the pieces of a text are the text."""
    words = [list(WORD.finditer(text)) for text in (one, other)]
    sequences = [[match.group() for match in of_text] for of_text in words]
    changes = SequenceMatcher(None, sequences[0], sequences[1], autojunk=False).get_opcodes()
    pieces: tuple[Runs, Runs] = [], []
    for side, text in enumerate((one, other)):
        end = 0
        for tag, *bounds in changes:
            first, last = bounds[2 * side : 2 * side + 2]
            if tag != "equal" and first < last:
                start = words[side][first].start()
                pieces[side].append(text[end:start])
                end = words[side][last - 1].end()
                pieces[side].append(text[start:end])
        pieces[side].append(text[end:])
    return pieces


def _slot_faults(context: str, outputs: Sequence[str]) -> list[list[Fault]]:
    """The slot errors of each output for one context; see `slot_errors`."""
    meaning = dict(parse_meaning(context))
    return [
        [
            (kind, f"{slot}: {meaning[slot]}" if slot in meaning else slot)
            for kind in KINDS
            for slot in getattr(errors, f"{kind}_slots")
        ]
        for errors in slot_errors([context] * len(outputs), outputs)
    ]


def faults(
    task: str, items: Sequence[Item], systems: Sequence[Sequence[str]]
) -> tuple[str | None, list[list[list[Fault]]]]:
    """What the outputs are checked for, and what was found by item and system: "slot errors" where
    the contexts have E2E's form, else "missing values" of the contexts, or None where these have no
    values."""
    outputs = list(zip(*systems, strict=True))
    if task == "e2e":
        try:
            pairs = zip(items, outputs, strict=True)
            return "slot errors", [_slot_faults(item.context, of_item) for item, of_item in pairs]
        except InputError:
            pass  # contexts of another form
    name = "missing values" if any(values(item.context) for item in items) else None
    return name, [
        [[("missing", value) for value in missing_values(item.context, text)] for text in of_item]
        for item, of_item in zip(items, outputs, strict=True)
    ]


def _pieces(outputs: Sequence[str]) -> list[Runs]:
    """The outputs of one item in pieces; an output without text has none."""
    shown = ["" if text == EMPTY_OUTPUT else text for text in outputs]
    pieces = differing_words(*shown) if len(shown) == 2 else [[text] for text in shown]
    return [runs if text else [] for runs, text in zip(pieces, shown, strict=True)]


def content(
    items: Sequence[Item],
    systems: Sequence[Sequence[str]],
    measured: Measured,
    result: dict,
    about: dict,
) -> dict:
    """All that the page shows, as JSON: `result` is that of `evaluate.result_of`, `about` names the
    data and the systems."""
    segments = tables.segment_scores(measured.systems)
    order = [name for name in tables.ORDERED_BY if name in segments[0]]
    checked_for, of_items = faults(result["task"], items, systems)
    return about | {
        "result": result,
        "metrics": order + [name for name in segments[0] if name not in order],
        "lower_is_better": sorted(LOWER_IS_BETTER),
        "segments": [
            {name: [round(score, 4) for score in scores] for name, scores in of_system.items()}
            for of_system in segments
        ],
        "faults": checked_for,
        "items": [
            {
                "context": item.context,
                "references": item.references,
                "outputs": _pieces(outputs),
                "faults": of_item,
                "seen": item.seen,
            }
            for item, of_item, *outputs in zip(items, of_items, *systems, strict=True)
        ],
    }


def embedded_json(value: object) -> str:
    """JSON for a script element: ASCII without "<", so that no text can end the element, and null
    in place of NaN and infinity, which JSON does not have."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def page(shown: dict) -> str:
    """The HTML that shows `content`. Its security policy lets the browser run this page's own
    script and no other, and fetch nothing."""
    template, css, js = (
        (PAGE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    parts = {"css": css, "js": js, "data": embedded_json(shown)}
    parts |= {"css_hash": _hash(css), "js_hash": _hash(js)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def named_files(given: Sequence[str]) -> dict[str, str]:
    """Name → file of `NAME=FILE`, or of `FILE`, which has its file's name for one, or, where both
    files have the same, its path.

    Raises:
        InputError: both systems have one name.
    """
    pairs = [
        (name, file) if equals and not Path(text).exists() else ("", text)
        for text in given
        for name, equals, file in [text.partition("=")]
    ]
    names = [name or Path(file).stem for name, file in pairs]
    if len(set(names)) < len(names):
        names = [name or str(Path(file).with_suffix("")) for name, file in pairs]
    if len(set(names)) < len(names):
        raise InputError(
            f"--predictions: both are {names[0]!r}; give each a name of its own, as NAME=FILE"
        )
    return {name: file for name, (_, file) in zip(names, pairs, strict=True)}


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="data that were decoded: JSONL, JSON, CSV or TSV")
    add(
        "--predictions",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="JSONL of gpt2_beam.py, of one system or of two (default name: that of the file)",
    )
    add("--html", required=True, metavar="FILE", help="page to write")
    evaluate.add_scoring_flags(parser)
    add(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="95 %% intervals from N samples, 0 for none (default: %(default)s)",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments.

    Raises:
        InputError: one is unknown or out of its range.
    """
    args = build_parser().parse_args(argv)
    for flag, least in (("ref_num", 1), ("bootstrap", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise InputError(f"--{flag} {value} is too small; give at least {least}")
    if len(args.predictions) > 2:
        raise InputError(
            f"--predictions names {len(args.predictions)} files; the page shows one or two systems"
        )
    named_files(args.predictions)
    evaluate.named_metrics(args.task, args.metrics)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    files = named_files(args.predictions)
    metrics = evaluate.named_metrics(args.task, args.metrics)
    check_output("--html", args.html, {"--data": args.data} | files)
    items, systems = evaluate.load_data(
        args.task, args.data, files.values(), args.vocab, args.fields
    )
    if args.ref_num:
        items = texts.limit_references(items, args.ref_num)
    about = {
        "data": args.data,
        "systems": [{"name": name, "file": file} for name, file in files.items()],
    }
    references = [item.references for item in items]
    contexts = [item.context for item in items]
    texts.warn_of_unspaced(references, args.tokenize)
    with coco.Meteor() as meteor:
        measured = measure(args.task, references, systems, metrics, meteor, contexts, args.tokenize)
        result = evaluate.result_of(
            args.task, metrics, items, systems, measured,
            samples=args.bootstrap, tokenize=args.tokenize,
        )  # fmt: skip
        shown = content(items, systems, measured, result, about)
    with replacing(args.html) as file:
        file.write(page(shown))
    print(f"{args.html}: {len(items)} items, {' and '.join(files)}")


if __name__ == "__main__":
    run(main)
