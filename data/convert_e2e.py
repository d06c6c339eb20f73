"""E2E to text JSONL: `python -m data.convert_e2e SRC DST`.

Reads the lines `context||completion` of the LoRA release, or the data set's own CSV (mr, ref).
"""

import csv
import io
import re
from collections.abc import Iterator

from common.errors import InputError, run
from data.rows import Row, convert_main, read_text

SLOT = re.compile(r"([^\[\],][^\[\]]*)\[([^\]]*)\]")
SHORT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def e2e_rows(path: str) -> Iterator[Row]:
    """Rows {"context", "completion"} in the file's order; the form is told by the first line."""
    text = read_text(path)
    is_csv = re.match(r'"?mr"?\s*(,|$)', text, re.IGNORECASE | re.MULTILINE)
    yield from (csv_rows if is_csv else pair_rows)(path, text)


def pair_rows(path: str, text: str) -> Iterator[Row]:
    """One row a line `context||completion`."""
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        context, bar, completion = line.strip().partition("||")
        if not bar:
            raise InputError(f"{path}, line {number}: no '||' between context and completion")
        yield {"context": context, "completion": completion}


def csv_rows(path: str, text: str) -> Iterator[Row]:
    """One row a record; the references keep their spelling (the other form is tokenised)."""
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader)
    if header != ["mr", "ref"]:
        raise InputError(f"{path}, line 1: expected the columns mr,ref, got {','.join(header)}")
    for record in reader:
        slots = SLOT.findall(record[0]) if len(record) == 2 else []
        if not slots:
            raise InputError(
                f"{path}, line {reader.line_num}: expected 'name[value], ...' and a reference, "
                f"got {record}"
            )
        context = " | ".join(f"{slot_name(key)} : {tokenised(value)}" for key, value in slots)
        yield {"context": context, "completion": record[1].strip()}


def slot_name(key: str) -> str:
    """The key as the LoRA release spells it."""
    key = key.strip()
    return SHORT_NAMES.get(key, key)


def tokenised(value: str) -> str:
    """The value as the LoRA release spells it: £20-25 as £ 20 - 25."""
    return re.sub(r"\s*([£-])\s*", r" \1 ", value).strip()


if __name__ == "__main__":
    run(lambda: convert_main(e2e_rows, __doc__))
