"""The soak: it stops runs for real, and its verdict is NO where they end otherwise."""

import json
import random
import sys
from pathlib import Path

import pytest
from conftest import ROOT, finish, start

from experiments import soak


def cells(output: str) -> dict[str, list[str]]:
    """The soak's table, by the name of the run."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if "process" in line]
    return {name: rest for name, *rest in lines}


def test_a_run_that_is_killed_at_random_instants_ends_with_the_same_bytes() -> None:
    if not (ROOT / "data" / "nano" / "model.safetensors").is_file():
        pytest.skip("data/nano/model.safetensors is not there: the shipped base is to be made")
    few = ["--steps", 40, "--kills", 2, "--processes", 1, "--no_disk", "--seed", 3]
    code, out, err = finish(start(["-m", "experiments.soak", *few]))
    assert (code, err) == (0, "")
    table = cells(out)
    assert table["one process, left alone"][:4] == ["40", "0", "1", "reference"]
    steps, stops, starts, equal, *_ = table["one process, killed"]
    assert (steps, equal) == ("40", "yes")
    assert 1 <= int(stops) <= 2 and int(starts) >= 1


@pytest.mark.parametrize("spoiled", ["model.9.safetensors", "model.best.safetensors", None])
def test_one_other_byte_is_seen_and_gives_exit_code_1(
    spoiled: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def train(run: soak.Soak, *_: object) -> tuple[float, float]:
        run.folder.mkdir()
        run.output.write_text("Settings: \n", encoding="utf-8")
        log = [{"kind": "train", "step": i, "peak_memory_gb": 1 + i / 1e5} for i in range(9)]
        (run.folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
        for name in ("model.9.safetensors", "model.best.safetensors"):
            changed = name == spoiled and run.folder.name.startswith("killed")
            (run.folder / name).write_bytes(b"other" if changed else b"same")
        return 0.0, 0.0

    monkeypatch.setattr(soak, "undisturbed", train)
    monkeypatch.setattr(soak, "disturbed", train)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--steps", "9", "--no_disk", "--processes", "2"])
    assert soak.main() == (1 if spoiled else 0)
    table = cells(capsys.readouterr().out)
    assert table["two processes, killed"][3] == ("NO" if spoiled else "yes")
    assert table["two processes, left alone"][-1] == "10.00"  # 1e-5 GB a step


def test_a_run_that_hangs_is_ended_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "LONGEST_SILENCE", 0.2)
    run = soak.Soak(tmp_path / "run", tmp_path / "run.txt", tmp_path / "rows.jsonl", 1, 9)
    run.output.write_text("the last words\n", encoding="utf-8")
    process = start(["-c", "import time; time.sleep(60)"])
    with pytest.raises(SystemExit, match="(?s)hangs.*the last words"):
        run.wait(process)
    assert process.poll() == -9
    process.communicate()


def test_a_run_that_fails_is_no_kill_survived(tmp_path: Path) -> None:
    """The training data are missing: exit code 2."""
    run = soak.Soak(tmp_path / "run", tmp_path / "run.txt", tmp_path / "absent.jsonl", 1, 9)
    with pytest.raises(SystemExit, match="exit code 2(?s:.*)absent.jsonl cannot be read"):
        soak.disturbed(run, 1, 1e6, random.Random(0))
