"""What people read: the table of scores and the side-by-side text of single items."""

from collections.abc import Sequence

from eval.measure import Measure
from eval.metrics import LOWER_IS_BETTER
from eval.texts import Item

# The first of these that was measured orders the items, worst to best.
ORDERED_BY = ("METEOR", "chrF++", "BLEU", "ROUGE_L", "CIDEr", "TER")
NO_SEGMENTS = {"NIST"}


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def _cells(result: dict, name: str) -> dict[str, str]:
    """The table's cells of one metric by column title."""
    cells = {"metric": name, "score": _number(result["scores"][name])}
    if interval := result.get("bootstrap", {}).get("intervals", {}).get(name):
        cells["95 % interval"] = f"{interval['low']:.4f} to {interval['high']:.4f}"
    for subset, part in result.get("subsets", {}).items():
        cells[subset] = _number(part["scores"][name])
    if reference := result["sacrebleu"].get(name):
        cells["sacreBLEU"] = _number(reference["score"])
    if (other := result.get("compare")) and name in other["differences"]:
        cells["other"] = _number(other["scores"][name])
        cells["difference"] = f"{other['differences'][name]:+.4f}"
        if name in other.get("p_values", {}):
            cells["p"] = _number(other["p_values"][name])
    return cells


def _of_texts(whose: str, part: dict) -> list[str]:
    """What `result_of` says of a system's texts in addition to their scores, in lines."""
    said = part["texts"]
    lines = [
        f"{whose}texts: distinct-1 {said['distinct_1']:.4f}, distinct-2 {said['distinct_2']:.4f}, "
        f"{said['length_ratio']:.3f} times the references' words"
    ]
    if slots := part.get("slots"):
        kinds = ", ".join(f"{slots[k]} {k}" for k in ("added", "missing", "wrong", "repeated"))
        lines.append(f"{whose}slots: {kinds} of {slots['slots']}; {slots['correct']} texts correct")
    return lines


def table(result: dict) -> str:
    """The result (as `evaluate.score` returns it) as text."""
    rows = [_cells(result, name) for name in result["scores"]]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    fewest, most = result["references_per_item"]
    lines = [
        f"{result['task']}: {result['items']} items, {result['references']} references "
        f"({fewest} to {most} an item), {result['references_left_out']} left out",
        "",
        columns([titles, *([row.get(title, "") for title in titles] for row in rows)]),
        "",
    ]
    lines += _of_texts("", result)
    if "compare" in result:
        lines += _of_texts("other ", result["compare"])
    lines += [f"{name} is null: {reason}" for name, reason in result["reasons"].items()]
    lines += [
        f"subset {name}: {part['items']} items, {part['references']} references"
        for name, part in result.get("subsets", {}).items()
    ]
    if "meteor" in result:
        lines.append(f"METEOR {result['meteor']['version']}, flags {result['meteor']['flags']}")
    for name, reference in result["sacrebleu"].items():
        lines.append(f"sacreBLEU {name}: {reference['signature']}")
    return "\n".join(lines)


def _item_text(
    number: int, item: Item, systems: list[list[str]], segments: list[dict[str, list[float]]]
) -> str:
    lines = [f"item {number + 1}"]
    if item.context:
        lines.append(f"  input      {item.context}")
    for title, texts, of_system in zip(("output", "other"), systems, segments, strict=False):
        scores = "  ".join(f"{name} {values[number]:.4f}" for name, values in of_system.items())
        lines += [f"  {title:<9}  {texts[number]}", f"{'':11}  ({scores})"]
    for title, text in zip(["references"], item.references, strict=False):
        lines.append(f"  {title} {text}")
    lines += [f"{'':12} {text}" for text in item.references[1:]]
    return "\n".join(lines)


def segment_scores(measures: list[dict[str, Measure]]) -> list[dict[str, list[float]]]:
    """Of each system, each metric's scores of single items; metrics without such are left out."""
    return [
        {name: measure.segments() for name, measure in of_system.items() if name not in NO_SEGMENTS}
        for of_system in measures
    ]


def segments_text(
    items: list[Item], systems: list[list[str]], measures: list[dict[str, Measure]], most: int
) -> str:
    """The `most` worst and the `most` best items, each with its input, the outputs of the systems
    with their segment scores, and the references; "" if no metric has scores for single items."""
    segments = segment_scores(measures)
    key = next((name for name in ORDERED_BY if name in segments[0]), None)
    if key is None:
        return ""
    sign = -1 if key in LOWER_IS_BETTER else 1
    order = sorted(range(len(items)), key=lambda i: (sign * segments[0][key][i], i))
    parts = []
    for title, chosen in (("worst", order[:most]), ("best", order[::-1][:most])):
        parts.append(f"The {len(chosen)} {title} of {len(items)} items by {key}\n{'=' * 60}")
        parts += [_item_text(i, items[i], systems, segments) for i in chosen]
    return "\n\n".join(parts) + "\n"
