"""Score outputs as the official programs of E2E, WebNLG and DART do, or those of your own data.

    python -m eval.evaluate --data test.jsonl --predictions predictions.jsonl
    python -m eval.evaluate --task e2e --data test.jsonl --predictions predictions.jsonl
    python -m eval.evaluate --task e2e --references refs.txt --hypotheses hyp.txt --json out.json
    python -m eval.evaluate --task webnlg --references STEM --hypotheses hyp.txt

Exit code 0; 1 if a metric named with --metrics has no score; 2 for an input that needs mending.
docs/metrics.md says how each number arises.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from common.errors import InputError, Parser, run
from common.files import check_output, replacing, write_json
from data.fields import add_fields_flag
from eval import bootstrap, coco, official, tables, texts
from eval.coverage import variety
from eval.measure import Measure
from eval.metrics import METRICS, OF_INPUTS, Measured, measure, metrics_of, sacrebleu_scores
from eval.slots import counts_of
from eval.texts import Item, warn
from eval.tokens import TOKENIZERS


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is scored, and how."""
    add = parser.add_argument
    add("--task", choices=METRICS, default="own", help="whose scores (default: own, any data)")
    add("--vocab", help="folder of the vocabulary, if the data hold token ids")
    add_fields_flag(add)
    add("--ref_num", type=int, help="use the first N references of an item (default: all)")
    add("--metrics", help="comma-separated, as bleu,nist,ter (default: all of the task)")
    add(
        "--tokenize",
        choices=TOKENIZERS,
        help="tokens of BLEU and NIST and words of chrF++ (default: those of the task); zh or char "
        "for texts without blanks",
    )


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="FILE", help="data that were decoded: JSONL, JSON, CSV or TSV")
    add("--predictions", metavar="FILE", help="JSONL of gpt2_beam.py for them")
    add(
        "--references",
        metavar="PATH",
        help="in place of --data: a file with a blank line after the references of each item; "
        "webnlg, dart: STEM of STEM0, STEM1, ...",
    )
    add("--hypotheses", metavar="FILE", help="in place of --predictions: outputs, one per line")
    add("--inputs", metavar="FILE", help="inputs, one per line, for SER, coverage and the report")
    add_scoring_flags(parser)
    add("--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals from N samples")
    add("--compare", metavar="FILE", help="outputs of a second system, like the first's file")
    add("--report", metavar="FILE", help="write the worst and best items, side by side")
    add("--report_items", type=int, default=10, help="how many of each (default: 10)")
    add("--json", metavar="FILE", help="write the result")
    add("--write_references", metavar="PATH", help="write the references in the official form")
    add("--write_hypotheses", metavar="PATH", help="write the outputs, one per line")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments.

    Raises:
        InputError: one is unknown, out of its range, or does not go with another.
    """
    args = _parser().parse_args(argv)
    from_files = args.references and args.hypotheses and not (args.data or args.predictions)
    from_data = args.data and args.predictions and not (args.references or args.hypotheses)
    if not from_files and not from_data:
        raise InputError(
            "give either --references and --hypotheses, or --data and --predictions, not a mix"
        )
    for flag in ("ref_num", "bootstrap", "report_items"):
        value = getattr(args, flag)
        if value is not None and value < (0 if flag == "bootstrap" else 1):
            raise InputError(f"--{flag} {value} is too small; give a positive number")
    named_metrics(args.task, args.metrics)
    return args


def named_metrics(task: str, given: str | None) -> tuple[str, ...]:
    """The official names of comma-separated `given` ones, all of the task for None.

    Raises:
        InputError: the task has no metric of such a name.
    """
    official = {name.lower(): name for name in metrics_of(task)}
    asked = (given or ",".join(METRICS[task])).lower().replace("-", "_").split(",")
    if unknown := [name for name in asked if name not in official]:
        raise InputError(f"--metrics {', '.join(unknown)}: task {task} has {', '.join(official)}")
    return tuple(name for low, name in official.items() if low in asked)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse an output file that is a folder or one of the inputs, before anything is computed."""
    outputs: dict[str, str] = {}
    numbered = "" if args.task not in ("webnlg", "dart") else "0"  # the first of several files
    inputs = {
        f"--{flag}": getattr(args, flag)
        for flag in ("data", "predictions", "hypotheses", "inputs", "compare")
    } | {"--references": args.references and args.references + numbered}
    for flag in ("json", "report", "write_hypotheses", "write_references"):
        if path := getattr(args, flag):
            path += numbered * (flag == "write_references")
            if path in outputs:
                raise InputError(f"--{flag} {path} is also {outputs[path]}; name two files")
            check_output(f"--{flag}", path, inputs)
            outputs[path] = f"--{flag}"


def load_data(
    task: str,
    data: str,
    predictions: Iterable[str],
    vocab: str | None = None,
    fields: str | None = None,
) -> tuple[list[Item], list[list[str]]]:
    """The items of a data file, and the outputs of each predictions file for them.

    Raises:
        InputError: names the file, and the line or ids that do not fit.
    """
    rows = texts.read_data(data, vocab, fields)
    texts.warn_of_cuts(rows, task)
    items = texts.group(rows, task)
    systems = [texts.outputs(items, texts.read_predictions(p, rows), task) for p in predictions]
    return items, systems


def _load_files(args: argparse.Namespace) -> tuple[list[Item], list[list[str]]]:
    paths = list(filter(None, (args.hypotheses, args.compare)))
    systems = [official.read_hypotheses(path) for path in paths]
    if args.task in ("webnlg", "dart"):
        items = official.read_webnlg_references(args.references)
    else:
        items = official.read_e2e_references(args.references, len(systems[0]))
    for path, hypotheses in zip(paths, systems, strict=True):
        official.check_counts(items, hypotheses, args.references, path)
    if args.inputs:
        inputs = official.read_hypotheses(args.inputs)
        official.check_counts(items, inputs, args.references, args.inputs)
        items = [replace(item, context=text) for item, text in zip(items, inputs, strict=True)]
    return items, systems


def _scores(
    measured: Measured, system: int, metrics: tuple[str, ...], chosen: list[int] | None = None
) -> dict[str, float | None]:
    """The scores of a system on all items, or on the `chosen` ones."""
    measures, items = measured.systems[system], slice(None) if chosen is None else chosen
    return {name: measures[name].score(items) if name in measures else None for name in metrics}


def _of_texts(items: list[Item], outputs: list[str], measures: dict[str, Measure]) -> dict:
    """What is said of a system's texts in addition to their scores."""
    said: dict = {"texts": variety([item.references for item in items], outputs)}
    return said | ({"slots": counts_of(measures["SER"])} if "SER" in measures else {})


def _subsets(items: list[Item], measured: Measured, metrics: tuple[str, ...]) -> dict:
    parts = {}
    for name, flag in (("seen", True), ("unseen", False)):
        chosen = [i for i, item in enumerate(items) if item.seen is flag]
        if chosen:
            references = sum(len(items[i].references) for i in chosen)
            scores = _scores(measured, 0, metrics, chosen)
            parts[name] = {"items": len(chosen), "references": references, "scores": scores}
    return parts


def _resample(result: dict, measured: Measured, samples: int) -> None:
    """Add the intervals, and the p-values if there is a second system."""
    intervals = {}
    for name, own in measured.systems[0].items():
        scores = bootstrap.resampled_scores(own, samples)
        intervals[name] = bootstrap.interval(scores)
        if "compare" in result:
            theirs = bootstrap.resampled_scores(measured.systems[1][name], samples)
            difference = result["compare"]["differences"][name]
            p = bootstrap.p_value(scores, theirs, difference)
            result["compare"].setdefault("p_values", {})[name] = p
            result["compare"].setdefault("intervals", {})[name] = bootstrap.interval(theirs)
            of_difference = bootstrap.interval(scores - theirs)
            result["compare"].setdefault("difference_intervals", {})[name] = of_difference
    result["bootstrap"] = {"samples": samples, "seed": bootstrap.SEED, "intervals": intervals}


def result_of(
    task: str,
    metrics: tuple[str, ...],
    items: list[Item],
    systems: list[list[str]],
    measured: Measured,
    *,
    left_out: int = 0,
    samples: int = 0,
    tokenize: str | None = None,
) -> dict:
    """Scores, counts and, for `samples` > 0, intervals of the first system as JSON, and what
    compares a second one with it; docs/metrics.md says what the fields hold."""
    references = [item.references for item in items]
    counts = [len(texts) for texts in references]
    result: dict[str, Any] = {
        "scores": _scores(measured, 0, metrics),
        "task": task,
        "items": len(items),
        "references": sum(counts),
        "references_per_item": [min(counts), max(counts)],
        "references_left_out": left_out,
        "reasons": measured.reasons,
        "sacrebleu": sacrebleu_scores(references, systems[0], metrics, tokenize),
    }
    if tokenize:
        result["tokenize"] = tokenize
    if "METEOR" in measured.systems[0]:
        result["meteor"] = {"version": coco.METEOR_VERSION, "flags": coco.METEOR_FLAGS}
    result |= _of_texts(items, systems[0], measured.systems[0])
    if parts := _subsets(items, measured, metrics):
        result["subsets"] = parts
    if len(systems) > 1:
        other = _scores(measured, 1, metrics)
        differences = {name: result["scores"][name] - other[name] for name in measured.systems[0]}
        result["compare"] = {"scores": other, "differences": differences}
        result["compare"] |= _of_texts(items, systems[1], measured.systems[1])
    if samples:
        _resample(result, measured, samples)
    return result


def evaluate(args: argparse.Namespace) -> dict:
    """Score what the arguments name and write the files they ask for; return the result, which is
    JSON with `scores` first: fractions, but NIST and CIDEr raw, None with a reason in `reasons`."""
    _check_outputs(args)
    if args.data:
        predictions = filter(None, (args.predictions, args.compare))
        items, systems = load_data(args.task, args.data, predictions, args.vocab, args.fields)
    else:
        items, systems = _load_files(args)
    given = sum(len(item.references) for item in items)
    if args.ref_num:
        items = texts.limit_references(items, args.ref_num)
    references = [item.references for item in items]
    contexts = [item.context for item in items]
    metrics = named_metrics(args.task, args.metrics)
    if args.metrics is None and not any(contexts):
        metrics = tuple(name for name in metrics if name not in OF_INPUTS)
    texts.warn_of_unspaced(references, args.tokenize)
    if "CIDEr" in metrics and len(items) < 2:
        warn("CIDEr of fewer than two items is 0, however good they are")
    if args.write_references:
        official.write_references(args.write_references, items, args.task)
    if args.write_hypotheses:
        official.write_hypotheses(args.write_hypotheses, systems[0])
    with coco.Meteor() as meteor:
        measured = measure(args.task, references, systems, metrics, meteor, contexts, args.tokenize)
        result = result_of(
            args.task,
            metrics,
            items,
            systems,
            measured,
            left_out=given - sum(map(len, references)),
            samples=args.bootstrap,
            tokenize=args.tokenize,
        )
        if args.report:
            text = tables.segments_text(items, systems, measured.systems, args.report_items)
            with replacing(args.report) as file:
                file.write(text)
    if args.json:
        write_json(args.json, result)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_args(argv)
    start = time.perf_counter()
    result = evaluate(args)
    print(tables.table(result))
    print(f"{time.perf_counter() - start:.1f} s")
    return 1 if args.metrics is not None and result["reasons"] else 0


if __name__ == "__main__":
    run(main)
