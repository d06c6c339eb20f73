"""Data rows and predictions -> items with references, and one output text for each item.

The original's decode step (microsoft/LoRA, gpt2_decode.py) sets the rules: references are grouped
by context in order of first appearance; a text ends at `<|endoftext|>` or at a blank line;
WebNLG and DART texts are lower-cased and get spaces around every character that is no word's.
"""

import re
import sys
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from common.errors import InputError
from common.files import read_json_lines

END_OF_TEXT = "<|endoftext|>"
# Stands for an output without text, where a blank line could be taken for no item at all. It is one
# token to every tokenizer used here, as an empty line is to BLEU and NIST, and in no reference.
EMPTY_OUTPUT = "emptyoutput"


@dataclass(frozen=True)
class Item:
    """One input: its context, all its references, the first data row that holds it, and whether
    its category was seen in training (None: the data do not say)."""

    context: str
    references: list[str]
    row: int = 0
    seen: bool | None = None


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def named(numbers: list, most: int = 5) -> str:
    """The first few of many, for a message."""
    rest = len(numbers) - most
    return ", ".join(map(str, numbers[:most])) + (f" and {rest} more" if rest > 0 else "")


def clean(text: str) -> str:
    """The text up to its end mark or a blank line, on one line."""
    text = text.split(END_OF_TEXT)[0].split("\n\n")[0]
    return " ".join(line for part in text.splitlines() if (line := part.strip()))


def fold(text: str) -> str:
    """The text in lower case and without accents."""
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def prepare(text: str, task: str) -> str:
    """The text as the task's scorers read it."""
    text = clean(text)
    if task == "e2e":
        return text
    return " ".join(re.sub(r"(\W)", r" \1 ", text.lower()).split())


def _rows(path: str | Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, each with the `needed` keys."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in needed if name not in row]:
            raise InputError(f"{path}, line {number}: there is no {missing[0]!r} in this object")
    return rows


@cache
def _decode(ids: tuple[int, ...], vocab: str) -> str:
    tokenizer = _tokenizer(vocab)
    size = tokenizer.get_vocab_size()
    if unknown := [token for token in ids if not 0 <= token < size]:
        raise InputError(f"token id {unknown[0]} is not among the {size} of vocabulary {vocab}")
    return tokenizer.decode(list(ids))


@cache
def _tokenizer(vocab: str):
    from data_utils import load_tokenizer

    return load_tokenizer(vocab)


def _text(field: object, vocab: str | None, where: str) -> str:
    if isinstance(field, str):
        return field
    if not isinstance(field, list) or not all(isinstance(token, int) for token in field):
        raise InputError(f"{where} is neither a text nor a list of token ids")
    if vocab is None:
        raise InputError(f"{where} holds token ids; name their vocabulary with --vocab DIR")
    return _decode(tuple(field), vocab)


def read_data(path: str | Path, vocab: str | None = None) -> list[dict]:
    """Data rows (text or encoded JSONL) with `context` and `completion` as texts."""
    rows = _rows(path, ("context", "completion"))
    for number, row in enumerate(rows):
        for name in ("context", "completion"):
            row[name] = _text(row[name], vocab, f"{path}, line {number + 1}: {name}")
    return rows


def _context(text: str) -> str:
    return text.split(END_OF_TEXT)[0].strip()


def group(rows: list[dict], task: str) -> list[Item]:
    """One item per distinct context, in order of first appearance, with all its references.

    Empty references are left out, and so are items that have no other; both with a warning.
    """
    items: dict[str, Item] = {}
    empty = []
    for number, row in enumerate(rows):
        context = _context(row["context"])
        item = items.setdefault(context, Item(context, [], number, row.get("seen")))
        if reference := prepare(row["completion"], task):
            item.references.append(reference)
        else:
            empty.append(number)
    if empty:
        warn(f"{len(empty)} empty references left out (rows {named(empty)})")
    bare = [item.row for item in items.values() if not item.references]
    if bare:
        warn(f"{len(bare)} items without any reference left out (rows {named(bare)})")
    return [item for item in items.values() if item.references]


def read_predictions(path: str | Path, rows: list[dict]) -> list[dict]:
    """The predictions of the data rows, in their order; each must be there exactly once."""
    predictions: dict[int, dict] = {}
    for prediction in _rows(path, ("id", "text")):
        number = prediction["id"]
        if number in predictions:
            raise InputError(f"{path}: id {number} occurs twice; keep one prediction of it")
        predictions[number] = prediction
    missing = [number for number in range(len(rows)) if number not in predictions]
    if missing:
        raise InputError(f"{path}: no prediction for ids {named(missing)}; decode the data again")
    other = [number for number in predictions if number not in range(len(rows))]
    other += [n for n, row in enumerate(rows) if _is_of_another(predictions[n], row)]
    if other:
        raise InputError(
            f"{path}: the predictions of ids {named(other)} are not of these data "
            f"({len(rows)} rows); name the file that was decoded"
        )
    return [predictions[number] for number in range(len(rows))]


def _is_of_another(prediction: dict, row: dict) -> bool:
    context = prediction.get("context")
    return isinstance(context, str) and _context(context) != _context(row["context"])


def outputs(items: list[Item], predictions: list[dict], task: str) -> list[str]:
    """The output of each item: the prediction of its first row, with a stand-in for no text."""
    texts = [prepare(predictions[item.row]["text"], task) for item in items]
    if empty := [item.row for item, text in zip(items, texts, strict=True) if not text]:
        warn(f'{len(empty)} empty outputs count as "{EMPTY_OUTPUT}" (ids {named(empty)})')
    return [text or EMPTY_OUTPUT for text in texts]


def limit_references(items: list[Item], most: int) -> list[Item]:
    """Items with their first `most` references."""
    return [replace(item, references=item.references[:most]) for item in items]
