"""Text to pretrain on: nothing of E2E is in it, however it is spelt."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from data.convert_e2e import e2e_rows
from data.triples import normalised, without_e2e

E2E = [{"context": "name : Aromi | area : riverside", "completion": "Aromi is by the river ."}]


def test_e2e_is_left_out_in_any_spelling() -> None:
    rows = [
        {"context": "Name : AROMI | Area : Riverside", "completion": "Other words."},
        {"context": "a : b : c", "completion": "Aromi is by the river."},
        {"context": "a : b : c", "completion": "..."},
        {"context": "a : b : c", "completion": "Aromi is by the sea.", "source": "x"},
        {"context": "a : b : c", "completion": "Aromi is by the sea.", "source": "y"},
    ]
    assert list(without_e2e(rows, E2E)) == [
        {"context": "a : b : c", "completion": "Aromi is by the sea."}
    ]


def test_no_text_of_e2e_is_in_the_text_to_pretrain_on(tmp_path: Path, shared: Path) -> None:
    data = shared / "data"
    subprocess.run(
        [sys.executable, "-m", "data.triples", tmp_path],
        cwd=ROOT, env=os.environ | {"DATA_DIR": str(data)}, check=True,
    )  # fmt: skip
    lines = [line for path in tmp_path.iterdir() for line in path.open(encoding="utf-8")]
    assert len(lines) > 20_000
    texts = {normalised(text) for line in lines for text in json.loads(line).values()}
    names = ("train.txt.gz", "valid.txt", "test.txt")
    e2e = [row for name in names for row in e2e_rows(str(data / "e2e" / name))]
    assert len(e2e) == 42_061 + 4_672 + 4_693
    assert not texts & {normalised(row[side]) for row in e2e for side in row}
