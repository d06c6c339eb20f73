"""Text of triples without E2E, to pretrain on: `python -m data.triples FOLDER`.

WebNLG's training rows and those rows of DART's dev and test sets whose annotation names another
source than E2E, into FOLDER/{train,valid}.jsonl; whatever equals a text or an input of E2E but for
case and punctuation is left out. Raw files as in scripts/create_datasets.sh.
"""

import argparse
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import InputError, run
from data.convert_dart import dart_rows
from data.convert_e2e import e2e_rows
from data.convert_webnlg import webnlg_rows
from data.rows import Row, write_jsonl

VALID_ROWS = 400
DART = [f"dart-v1.1.1-full-{split}.json" for split in ("dev", "test")]
E2E = [f"{split}.txt" for split in ("train", "valid", "test")]


def normalised(text: str) -> str:
    """The text's letters and digits alone, in lower case, words apart by one blank."""
    return " ".join(re.findall(r"\w+", text.lower()))


def without_e2e(rows: Iterable[Row], e2e: Iterable[Row]) -> Iterator[Row]:
    """Those rows, once each, that have words on both sides and none of E2E's sides."""
    seen = {normalised(row[side]) for row in e2e for side in ("context", "completion")} | {""}
    for row in rows:
        sides = {normalised(row["context"]), normalised(row["completion"])}
        text = f"{row['context']}\n{row['completion']}"
        if not sides & seen and text not in seen:
            seen.add(text)
            yield {"context": row["context"], "completion": row["completion"]}


def raw_file(task: str, name: str) -> Path:
    """The file, plain or gzipped, in `$DATA_DIR/TASK`, else in data_raw/TASK.

    Raises InputError where neither is there.
    """
    roots = [Path(root) for root in (os.environ.get("DATA_DIR"), "data_raw") if root]
    for path in (root / task / own for root in roots for own in (name, f"{name}.gz")):
        if path.is_file():
            return path
    raise InputError(
        f"{roots[0] / task / name} is missing; run bash scripts/download_data.sh {task}, or "
        "name by DATA_DIR a folder that holds it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = list(webnlg_rows(str(raw_file("webnlg", "train.json"))))
    for name in DART:
        rows += (r for r in dart_rows(str(raw_file("dart", name))) if r["source"] != "e2e")
    e2e = [row for name in E2E for row in e2e_rows(str(raw_file("e2e", name)))]
    kept = list(without_e2e(rows, e2e))
    random.Random(0).shuffle(kept)
    for split, part in (("valid", kept[:VALID_ROWS]), ("train", kept[VALID_ROWS:])):
        print(f"{folder / split}.jsonl: {write_jsonl(folder / f'{split}.jsonl', part):,} rows")


if __name__ == "__main__":
    run(main)
