"""The hosted checks: what they call exists, and the tiny run of other systems works on this one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the packages that the tests compare")
JOBS = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_linux_runs_the_whole_check() -> None:
    assert commands("linux") == ["bash .ci/run"]
    assert (ROOT / ".ci/run").is_file()


def test_macos_and_windows_import_everything_and_finish_a_tiny_run(tmp_path: Path) -> None:
    assert JOBS["smoke"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    install, *steps = map(shlex.split, commands("smoke"))
    assert install == ["pip", "install", "-r", "requirements.txt"]
    assert [step[0] for step in steps] == ["python"] * 4
    for step in steps:
        done = subprocess.run(
            [sys.executable, *step[1:]], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "BLEU" in done.stdout
