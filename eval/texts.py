"""Data rows and predictions -> items with references, and one output text for each item.

The original's decode step (microsoft/LoRA, gpt2_decode.py) sets the rules of the benchmarks: a text
ends at `<|endoftext|>` or at a blank line; WebNLG and DART texts are lower-cased and get spaces
around every character that is not part of a word. Texts of other data (task `own`) are kept whole.
In every task references are grouped by context, in order of first appearance.
"""

import re
import sys
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from common.errors import InputError
from common.files import numbered_json_lines
from data.readers import DataFile

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "\n\n")  # where the texts of the benchmarks end
BENCHMARKS = ("e2e", "webnlg", "dart")
# Stands for an output without text, where a blank line could be taken for no item at all. It is one
# token to every tokenizer used here, as an empty line is to BLEU and NIST, and in no reference.
EMPTY_OUTPUT = "emptyoutput"
# Thai and Lao, Burmese, Khmer, kana, Chinese characters: scripts without blanks between words.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)
LONGEST_UNSPACED_WORD = 5  # characters of a word, on average, where such a text has been segmented


@dataclass(frozen=True)
class Row:
    """A data row: its texts, and its context as the file has it, a text or token ids."""

    context: str
    completion: str
    key: str | tuple[int, ...]
    seen: bool | None = None


@dataclass(frozen=True)
class Prediction:
    """An output text, and the context that its file gives for it, if any."""

    text: str
    context: str | tuple[int, ...] | None = None


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


def without_mark(text: str) -> str:
    """The text without the end mark that may close it; a mark within it is a part of it."""
    return text.strip().removesuffix(END_OF_TEXT).strip()


def clean(text: str, task: str) -> str:
    """The text on one line: up to its first end in the benchmarks, whole in other tasks."""
    if task in BENCHMARKS:
        for end in ENDS:
            text = text.split(end)[0]
    else:
        text = without_mark(text)
    return " ".join(line for part in text.splitlines() if (line := part.strip()))


def fold(text: str) -> str:
    """The text in lower case and without accents."""
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def prepare(text: str, task: str) -> str:
    """The text as the task's scorers read it."""
    text = clean(text, task)
    if task in ("webnlg", "dart"):
        return " ".join(re.sub(r"(\W)", r" \1 ", text.lower()).split())
    return text


@cache
def _tokenizer(vocab: str) -> Tokenizer:
    from data_utils import load_tokenizer

    return load_tokenizer(vocab)


@cache
def _decode(ids: tuple[int, ...], vocab: str) -> str:
    tokenizer = _tokenizer(vocab)
    size = tokenizer.get_vocab_size()
    if unknown := [token for token in ids if not 0 <= token < size]:
        raise InputError(f"token id {unknown[0]} is not among the {size} of vocabulary {vocab}")
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _checked(field: object, where: str) -> str | tuple[int, ...]:
    """The field, a text or token ids."""
    if isinstance(field, list) and all(type(token) is int for token in field):
        return tuple(field)
    if not isinstance(field, str):
        raise InputError(f"{where} is neither a text nor a list of token ids")
    try:
        field.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds a lone surrogate, which is not a character") from error
    return field


def _text(field: str | tuple[int, ...], vocab: str | None, where: str) -> str:
    if isinstance(field, str):
        return field
    if vocab is None:
        raise InputError(f"{where} holds token ids; name their vocabulary with --vocab DIR")
    try:
        return _decode(field, vocab)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _seen(value: object, where: str) -> bool | None:
    """The flag `seen` of a row; a table has it as text."""
    flags = {None: None, "": None, "true": True, "false": False}
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, bool):
        return key
    if isinstance(key, list | dict) or key not in flags:
        raise InputError(f"{where} is {value!r:.60}; it must be true or false")
    return flags[key]


def read_data(path: str | Path, vocab: str | None = None, fields: str | None = None) -> list[Row]:
    """The rows of a data file, texts or token ids of the vocabulary; `fields` as `--fields`.

    Raises:
        InputError: names file and line of a field that is not what it should be.
    """
    rows = []
    for record in DataFile(path, fields, also=("seen",)):
        where = f"{path}, line {record.line}: "
        context = _checked(record.context, f"{where}context")
        completion = _checked(record.completion, f"{where}completion")
        text = _text(context, vocab, f"{where}context")
        reference = _text(completion, vocab, f"{where}completion")
        rows.append(Row(text, reference, context, _seen(record.also.get("seen"), f"{where}seen")))
    return rows


def group(rows: list[Row], task: str) -> list[Item]:
    """One item per distinct context, in order of first appearance, with all its references.

    Empty references are left out, and so are items that have no other; both with a warning.
    """
    items: dict[str | tuple[int, ...], Item] = {}
    empty = []
    for number, row in enumerate(rows):
        new = Item(without_mark(row.context), [], number, row.seen)
        item = items.setdefault(row.key, new)
        if reference := prepare(row.completion, task):
            item.references.append(reference)
        else:
            empty.append(number)
    if empty:
        warn(f"{len(empty)} empty references left out (rows {named(empty)})")
    bare = [item.row for item in items.values() if not item.references]
    if bare:
        warn(f"{len(bare)} items without any reference left out (rows {named(bare)})")
    return [item for item in items.values() if item.references]


def warn_of_cuts(rows: list[Row], task: str) -> None:
    """Warn where the task's rule cuts references within."""
    if task not in BENCHMARKS:
        return
    bodies = (without_mark(row.completion) for row in rows)
    cut = [number for number, text in enumerate(bodies) if any(end in text for end in ENDS)]
    if cut:
        warn(
            f"{len(cut)} references hold a blank line or {END_OF_TEXT} and are scored up to there, "
            f"by the rule of task {task} (rows {named(cut)}); --task own scores whole texts"
        )


def warn_of_unspaced(references: list[list[str]], tokenize: str | None) -> None:
    """Warn where words are not set apart by blanks and would count as one token each."""
    if tokenize in ("zh", "char"):
        return
    words = [word for texts in references for text in texts for word in text.split()]
    unspaced = [word for word in words if UNSPACED.search(word)]
    if len(unspaced) > len(words) / 2 and (
        sum(map(len, unspaced)) > LONGEST_UNSPACED_WORD * len(unspaced)
    ):
        warn(
            "the references set no blanks between words, so that a sentence counts as one token; "
            "give --tokenize zh or --tokenize char, which BLEU, NIST and chrF++ obey (METEOR, "
            "ROUGE_L and CIDEr are made for English)"
        )


def read_predictions(path: str | Path, rows: list[Row]) -> list[Prediction]:
    """The predictions of the data rows, in their order; each must be there exactly once.

    Raises:
        InputError: names file and line of a prediction without id and text, or the ids of those
            that are missing, occur twice, or belong to other data.
    """
    predictions: dict[int, Prediction] = {}
    for line, found in numbered_json_lines(path):
        where, row, context = f"{path}, line {line}: ", found.get("id"), found.get("context")
        if type(row) is not int:
            raise InputError(f"{where}id is {row!r:.60}; it must be a row's number, from 0")
        if row in predictions:
            raise InputError(f"{path}: id {row} occurs twice; keep one prediction of it")
        if not isinstance(found.get("text"), str):
            text = repr(found["text"])[:60] if "text" in found else "missing"
            raise InputError(f"{where}text is {text}; it must be text, as gpt2_beam.py writes it")
        text = str(_checked(found["text"], f"{where}text"))
        checked = None if context is None else _checked(context, f"{where}context")
        predictions[row] = Prediction(text, checked)
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


def _is_of_another(prediction: Prediction, row: Row) -> bool:
    if prediction.context is None or prediction.context == row.key:
        return False
    if isinstance(prediction.context, tuple):
        return isinstance(row.key, tuple)
    return without_mark(prediction.context) != without_mark(row.context)


def outputs(items: list[Item], predictions: list[Prediction], task: str) -> list[str]:
    """The output of each item: the prediction of its first row, with a stand-in for no text."""
    texts = [prepare(predictions[item.row].text, task) for item in items]
    if empty := [item.row for item, text in zip(items, texts, strict=True) if not text]:
        warn(f'{len(empty)} empty outputs count as "{EMPTY_OUTPUT}" (ids {named(empty)})')
    return [text or EMPTY_OUTPUT for text in texts]


def limit_references(items: list[Item], most: int) -> list[Item]:
    """Items with their first `most` references."""
    return [replace(item, references=item.references[:most]) for item in items]
