"""Where a run's records go besides log.jsonl and TensorBoard: a CSV table, Weights & Biases."""

import csv
import hashlib
import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import InputError
from common.files import replacing


def write_csv(log: Path, table: Path) -> None:
    """Write the records of a log.jsonl as a table, a row for each and a column for each name, in
    the order in which they appear; empty where a record has no such value."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    columns = dict.fromkeys(name for record in records for name in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    with replacing(table) as file:
        file.write(text.getvalue())


def import_wandb() -> ModuleType:
    """The client of Weights & Biases.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            "--wandb needs the package wandb; run pip install wandb, or leave the flag out"
        ) from error


def start_wandb(project: str, work_dir: Path, flags: dict[str, object]) -> Any:
    """A run of that project for this work_dir, the same one each time that the run is resumed."""
    place = work_dir.resolve()
    return import_wandb().init(
        project=project,
        name=work_dir.name,
        id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(place),
        config={key: value for key, value in flags.items() if value is not None},
    )
