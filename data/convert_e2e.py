"""E2E to text JSONL: `python -m data.convert_e2e SRC DST`.

Reads the lines `context||completion` of the LoRA release, the data set's own CSV (mr, ref) or the
CSV of cleaned E2E (mr, ref, fixed, orig_mr), whose meanings say what the texts say.
"""

import csv
import io
import re
from collections.abc import Iterator

from common.errors import InputError, run
from data.rows import Row, convert_main, read_text
from eval.slots import Meaning, parse_meaning

COLUMNS = ("mr", "ref"), ("mr", "ref", "fixed", "orig_mr")
SHORT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_rows(path: str) -> Iterator[Row]:
    """Rows {"context", "completion"} in the file's order; the form is told by the first line."""
    text = read_text(path)
    is_csv = re.match(r'"?mr"?\s*(,|$)', text, re.IGNORECASE | re.MULTILINE)
    yield from (csv_rows if is_csv else pair_rows)(path, text)


def pair_rows(path: str, text: str) -> Iterator[Row]:
    """One row per line `context||completion`."""
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        context, bar, completion = line.strip().partition("||")
        if not bar:
            raise InputError(f"{path}, line {number}: no '||' between context and completion")
        yield {"context": context, "completion": completion}


def csv_rows(path: str, text: str) -> Iterator[Row]:
    """One row per record; the references keep their spelling (the other form is tokenised)."""
    for line, record in csv_records(path, text):
        try:
            context = context_of(parse_meaning(record["mr"]))
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        yield {"context": context, "completion": record["ref"].strip()}


def csv_records(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The records by column, each with the line on which it ends."""
    reader = csv.reader(io.StringIO(text, newline=""))
    header = tuple(next(reader))
    if header not in COLUMNS:
        forms = " or ".join(",".join(columns) for columns in COLUMNS)
        raise InputError(f"{path}, line 1: expected the columns {forms}, got {','.join(header)}")
    try:
        for record in reader:
            if len(record) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {','.join(header)}, got {record}"
                )
            yield reader.line_num, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def context_of(meaning: Meaning) -> str:
    """The meaning as the LoRA release writes it: `name : Aromi | price : £ 20 - 25`."""
    pairs = [(SHORT_NAMES.get(slot, slot), value) for slot, value in meaning]
    return " | ".join(f"{slot} : {tokenised(value)}" for slot, value in pairs)


def tokenised(value: str) -> str:
    """The value as the LoRA release spells it: £20-25 as £ 20 - 25."""
    return re.sub(r"\s*([£-])\s*", r" \1 ", value).strip()


if __name__ == "__main__":
    run(lambda: convert_main(e2e_rows, __doc__))
