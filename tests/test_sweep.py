"""The experiment's sweep: which runs there are, what they are told, and what it does with them."""

import argparse
import json
from pathlib import Path

import pytest
from conftest import ROOT

import gpt2_ft
from experiments import sweep
from experiments.sweep import Setting

ARGS = argparse.Namespace(threads=1)


@pytest.fixture
def tiny_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of two steps on a few rows of the sample, from the base that the repository ships."""
    data = tmp_path / "e2e"
    data.mkdir()
    for name in ("train", "valid", "test"):
        lines = (ROOT / "data" / "sample" / f"{name}.jsonl").read_text(encoding="utf-8")
        first = "".join(lines.splitlines(keepends=True)[:6])
        (data / f"{name}.jsonl").write_text(first, encoding="utf-8")
    base = {
        "model_card": "gpt2.nano",
        "init_checkpoint": "data/nano/model.safetensors",
        "vocab": "data/nano",
    }
    monkeypatch.setattr(sweep, "BASE", base)
    small = {"seq_len": 128, "warmup_step": 1, "log_interval": 1}
    monkeypatch.setattr(sweep, "TRAINING", sweep.TRAINING | small)
    monkeypatch.setattr(sweep, "STEPS", 2)
    monkeypatch.setattr(sweep, "DATASET", data)
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sweep, "RESULTS", tmp_path / "results")
    return tmp_path


@pytest.mark.parametrize(
    ("group", "count"), [("kinds", 27), ("ranks", 24), ("data", 12), ("targets", 12)]
)
def test_a_group_has_its_runs_each_under_a_name_of_its_own(group: str, count: int) -> None:
    names = [setting.name for setting in sweep.settings_of(group)]
    assert len(set(names)) == len(names) == count


@pytest.mark.parametrize("kind", sweep.KINDS)
def test_the_flags_of_a_kind_are_known(kind: str) -> None:
    flags, rate = sweep.KINDS[kind]
    args = gpt2_ft.build_parser().parse_args([*flags, f"--lr={rate}"])
    assert (args.lora_dim == 0) == (Setting(kind).adapter_rank == 0)


def test_a_run_ends_with_its_result_and_is_not_run_again(tiny_sweep: Path) -> None:
    sweep.write_splits()
    setting = Setting("lora", rank=2, rows=100, targets="fc,proj")
    assert sweep.attempt(setting, ARGS)
    result = json.loads(setting.result.read_text(encoding="utf-8"))
    assert setting.result.name == "lora-r2-fcproj-100rows-seed1.json"
    said = {name: result[name] for name in ("kind", "rank", "seed", "rows", "targets", "steps")}
    assert said == {
        "kind": "lora", "rank": 2, "seed": 1, "rows": 100, "targets": "fc,proj", "steps": 2,
    }  # fmt: skip
    assert result["trainable"] == 2 * 4 * 2 * (256 + 1024)  # r, blocks, layers, in + out
    assert [step for step, _ in result["curves"]["train"]] == [1, 2]
    assert result["seconds"]["training"] > 0 and result["scores"]["BLEU"] is not None


def test_a_run_that_fails_is_said_and_leaves_no_result(
    tiny_sweep: Path, capsys: pytest.CaptureFixture
) -> None:
    assert not sweep.attempt(Setting(), ARGS)  # its training rows were never written
    assert "lora-r4-seed1 failed" in capsys.readouterr().out
    log = (tiny_sweep / "runs" / "lora-r4-seed1" / "log.txt").read_text(encoding="utf-8")
    assert "train.42061.jsonl" in log
    assert not Setting().result.exists()
