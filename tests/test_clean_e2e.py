"""Cleaned E2E: read by the converter, and made anew. Oracle: the official cleaned files."""

import json
from pathlib import Path

import pytest
from conftest import finish, start

from data.clean_e2e import agreement, cleaned_rows, kind
from data.convert_e2e import context_of, csv_records, e2e_rows
from data.rows import read_text
from eval.slots import parse_meaning

OFFICIAL = {"devel-fixed.no-ol": (4_299, 0.976), "test-fixed": (4_693, 0.966)}


def official(shared: Path, name: str) -> Path:
    return shared / "data" / "e2e_cleaned" / f"{name}.csv.gz"


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_converter_reads_the_cleaned_data(shared: Path, name: str) -> None:
    path = str(official(shared, name))
    rows = list(e2e_rows(path))
    records = [record for _, record in csv_records(path, read_text(path))]
    assert len(rows) == len(records) == OFFICIAL[name][0]
    for row, record in zip(rows, records, strict=True):
        assert row.keys() == {"context", "completion"}
        assert row["context"] == context_of(parse_meaning(record["mr"]))


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_cleaned_meanings_are_nearly_the_official_ones(shared: Path, name: str) -> None:
    path = str(official(shared, name))
    count, least = OFFICIAL[name]
    originals = [
        {"context": context_of(parse_meaning(record["orig_mr"])), "completion": record["ref"]}
        for _, record in csv_records(path, read_text(path))
    ]
    ours = [row["context"] for row in cleaned_rows(originals, set())]
    theirs = [row["context"] for row in e2e_rows(path)]
    assert len(ours) == len(theirs) == count
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= least * count
    assert f"of {count:,} meanings" in agreement(path)


def test_what_the_test_set_has_too_is_left_out_as_in_the_official_file(shared: Path) -> None:
    """373 of the 4,672 development rows are not in the official file without overlap."""
    test = e2e_rows(str(official(shared, "test-fixed")))
    without = {kind(parse_meaning(row["context"])) for row in test}
    rows = list(e2e_rows(str(shared / "data/e2e/devset.csv.gz")))
    assert abs(len(list(cleaned_rows(rows, without))) - 4_299) <= 3


def test_a_cleaned_row_says_what_its_text_says() -> None:
    text = "Aromi is a cheap pub and restaurant near Avalon."
    context = "name : Aromi | Type : pub | price : less than £ 20 | food : Thai"
    rows = [
        {"context": context, "completion": text},
        {"context": "name : Aromi", "completion": "Nothing is said here."},
    ]
    context = (
        "name : Aromi | Type : pub | Type : restaurant | price : less than £ 20 | near : Avalon"
    )
    assert list(cleaned_rows(rows, set())) == [{"context": context, "completion": text}]
    other = context.replace("Aromi", "Cocum").replace("Avalon", "Ranch")
    assert list(cleaned_rows(rows, {kind(parse_meaning(other))})) == []


def test_the_program_writes_rows_and_states_its_agreement(tmp_path: Path) -> None:
    raw, clean = tmp_path / "raw.csv", tmp_path / "clean.csv"
    raw.write_text('mr,ref\n"name[Aromi], eatType[pub]",Aromi is cheap.\n', encoding="utf-8")
    clean.write_text(
        "mr,ref,fixed,orig_mr\nname[Aromi],Aromi is here.,1,name[Aromi]\n"
        '"name[Cocum], area[riverside]",Cocum is here.,1,name[Cocum]\n',
        encoding="utf-8",
    )
    command = ["-m", "data.clean_e2e", raw, tmp_path / "rows.jsonl", "--official", clean]
    code, out, err = finish(start(command))
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith("rows.jsonl: 1 of 1 rows")
    assert "50.0% of 2 meanings and 66.7% of 3 slots" in out
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert row == {"context": "name : Aromi | price : cheap", "completion": "Aromi is cheap."}
    code, _, err = finish(start([*command[:-1], raw]))
    assert (code, err.count("\n")) == (2, 1)
    assert "no column orig_mr" in err
