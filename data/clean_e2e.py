"""E2E with meanings that say what the texts say (Dušek, Howcroft and Rieser 2019, section 3).

    python -m data.clean_e2e e2e/train.txt.gz train.jsonl --official devel-fixed.no-ol.csv.gz \\
        --without devel-fixed.no-ol.csv.gz test-fixed.csv.gz

Many of the crowd's texts leave slots out, change or add some. Each meaning of SRC, in any form that
data.convert_e2e reads, becomes what its text states by the phrases of eval/slots.py.
"""

import argparse
from collections.abc import Container, Iterator
from pathlib import Path

from common.errors import InputError, Parser, run
from common.files import check_output
from data.convert_e2e import context_of, csv_records, e2e_rows
from data.rows import Row, read_text, write_jsonl
from eval.slots import Meaning, parse_meaning, stated_meaning

Kind = tuple[tuple[str, str], ...]


def kind(meaning: Meaning) -> Kind:
    """What the meaning has in common with those of other names and places."""
    return tuple((slot, "" if slot in ("name", "near") else value) for slot, value in meaning)


def cleaned_rows(rows: list[Row], without: Container[Kind]) -> Iterator[Row]:
    """The rows with contexts that state what their texts state, but for rows whose text states
    nothing and rows whose cleaned meaning is of a kind in `without`."""
    for row in rows:
        meaning = stated_meaning(parse_meaning(row["context"]), row["completion"])
        if meaning and kind(meaning) not in without:
            yield {"context": context_of(meaning), "completion": row["completion"]}


def agreement(path: str) -> str:
    """How often our meanings are those of an official cleaned file.

    Raises:
        InputError: the file has no column orig_mr to clean anew.
    """
    equal = meanings = equal_slots = slots = 0
    for _, record in csv_records(path, read_text(path)):
        if "orig_mr" not in record:
            raise InputError(f"{path} has no column orig_mr; name a file of cleaned E2E")
        theirs = set(parse_meaning(record["mr"]))
        ours = set(stated_meaning(parse_meaning(record["orig_mr"]), record["ref"]))
        meanings, equal = meanings + 1, equal + (ours == theirs)
        slots, equal_slots = slots + len(theirs), equal_slots + len(ours & theirs)
    return (
        f"{Path(path).name}: {equal / max(meanings, 1):.1%} of {meanings:,} meanings and "
        f"{equal_slots / max(slots, 1):.1%} of {slots:,} slots are as in this file"
    )


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("src", help="raw E2E file, plain or .gz")
    add("dst", help="JSONL file to write")
    add("--official", metavar="FILE", help="cleaned CSV file to state the agreement with")
    add("--without", nargs="+", default=[], metavar="FILE",
        help="leave out meanings that these files have too, name and place aside")  # fmt: skip
    args = parser.parse_args()
    check_output("dst", args.dst, {"src": args.src} | {f"--without {f}": f for f in args.without})
    other = [row for path in args.without for row in e2e_rows(path)]
    without = {kind(parse_meaning(row["context"])) for row in other}
    rows = list(e2e_rows(args.src))
    count = write_jsonl(args.dst, cleaned_rows(rows, without))
    print(f"{args.dst}: {count:,} of {len(rows):,} rows")
    if args.official:
        print(agreement(args.official))


if __name__ == "__main__":
    run(main)
