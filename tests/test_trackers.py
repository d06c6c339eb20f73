"""A run's records in a CSV table, and in Weights & Biases by a stand-in for its client."""

import csv
import json
import sys
from pathlib import Path

import pytest
from conftest import Tiny, refusal

import gpt2_ft


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_records_of_the_log_also_after_a_resume(tiny: Tiny) -> None:
    folder = tiny.folder / "run"
    gpt2_ft.main(tiny.argv("run", "--csv", "--max_step", 12))
    undisturbed = [line for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    whole = table(folder / "log.csv")
    assert len(whole) == len(undisturbed)
    for row, line in zip(whole, undisturbed, strict=True):
        record = json.loads(line)
        assert {name: value for name, value in row.items() if value} == {
            name: str(value) for name, value in record.items()
        }
    assert list(whole[0])[:3] == ["kind", "step", "loss"]
    gpt2_ft.main(tiny.argv("run", "--csv", "--max_step", 12, "--resume", "auto"))
    assert len(table(folder / "log.csv")) == len(whole)


CLIENT = """
import json, os

class Run:
    def log(self, values, step):
        write({"step": step, **values})

    def finish(self):
        write("finish")

def write(entry):
    with open(os.environ["STAND_IN"], "a") as file:
        file.write(json.dumps(entry) + "\\n")

def init(**settings):
    write({key: settings[key] for key in ("project", "name", "id", "resume", "config")})
    return Run()
"""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "wandb.py").write_text(CLIENT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "client")
    monkeypatch.setenv("STAND_IN", str(tmp_path / "sent.jsonl"))
    yield tmp_path / "sent.jsonl"
    sys.modules.pop("wandb", None)


def test_wandb_gets_settings_and_records_and_a_resumed_run_goes_into_the_same_one(
    tiny: Tiny, client: Path
) -> None:
    gpt2_ft.main(tiny.argv("run", "--wandb", "mine", "--max_step", 6, "--save_interval", 3))
    first, *records, last = map(json.loads, client.read_text("utf-8").splitlines())
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert first["config"]["lora_dim"] == 2
    log = (tiny.folder / "run" / "log.jsonl").read_text("utf-8").splitlines()
    assert len(records) == len(log) and last == "finish"
    for sent, record in zip(records, map(json.loads, log), strict=True):
        assert sent["step"] == record["step"]
        assert sent[f"{record['kind']}/loss"] == record["loss"]
    gpt2_ft.main(tiny.argv("run", "--wandb", "mine", "--max_step", 6, "--resume", "auto"))
    again = json.loads(client.read_text("utf-8").splitlines()[len(log) + 2])
    assert again["id"] == first["id"]


def test_without_the_client_one_sentence_says_how_to_get_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(tiny.argv("run", "--wandb", "mine"), capsys)
    assert not (tiny.folder / "run").exists()
