"""Both programs where parts of a POSIX system are missing, as on Windows or in a bare container."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Tiny, finish, start, write_rows

import gpu
from common import locks
from common.errors import InputError
from training import work_dir

# What Windows, WASM or a sandbox lack. Folders cannot be opened there, and there is no /proc.
BARE_SYSTEM = """
import ctypes, importlib.abc, os, pathlib, signal, sys

MISSING = {"fcntl", "resource", "termios", "pwd", "grp"}

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in MISSING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())

def refuse(what, *refused):
    original = what
    def call(first, *rest, **more):
        if first is None or (isinstance(first, (str, os.PathLike)) and os.path.isdir(first)):
            raise PermissionError(13, "Permission denied")
        return original(first, *rest, **more)
    return call

loaded = ctypes.CDLL
def load(name, *rest, **more):
    if name is None and "use_errno" not in more:  # filelock asks like this, and on Linux alone
        raise TypeError("argument of type 'NoneType' is not iterable")
    return loaded(name, *rest, **more)

def no_symlink(*arguments, **more):
    raise OSError(1314, "A required privilege is not held by the client")

ctypes.CDLL = load
os.open = refuse(os.open)
os.symlink = no_symlink
for name in ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGQUIT", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
real_text = pathlib.Path.read_text
def read_text(self, *rest, **more):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory")
    return real_text(self, *rest, **more)
pathlib.Path.read_text = read_text

sys.path.insert(0, ROOT)
program = __import__(sys.argv[1])
from common import errors
errors.run(lambda: program.main(sys.argv[2:]))
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A script that runs a program on such a system."""
    script = tmp_path / "bare.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{BARE_SYSTEM}", encoding="utf-8")
    return script


def run_bare(bare: Path, program: str, argv: list[object]) -> tuple[str, str]:
    code, out, err = finish(start([bare, program, *argv]))
    assert code == 0, err
    assert "Traceback" not in err and "Warning" not in err, err
    return out, err


def test_both_programs_run_where_parts_of_posix_are_missing(bare: Path, nano: Tiny) -> None:
    out, err = run_bare(bare, "gpt2_ft", nano.argv("bare", "--resume", "auto"))
    assert "Last adapter: " in out
    assert err.count("\n") == 1
    assert err.startswith("warning: there are no file locks here, so ")
    code, *_ = finish(start(["gpt2_ft.py", *nano.argv("usual")]))
    assert code == 0
    last = "model.12.safetensors"
    bare_bytes, usual = ((nano.folder / n / last).read_bytes() for n in ("bare", "usual"))
    assert bare_bytes == usual

    data = write_rows(nano.folder / "test.jsonl", [{"context": [1, 2, 3]}, {"context": [4, 5]}])
    output = nano.folder / "predictions.jsonl"
    argv = ["--data", data, "--init_checkpoint", nano.base, "--adapter", nano.folder / "bare"]
    argv += ["--beam", 2, "--eval_len", 4, "--eos_token_id", 0, "--output_file", output]
    out, _ = run_bare(bare, "gpt2_beam", argv)
    assert "2 rows" in out and output.is_file()


def test_the_lock_of_a_dead_process_does_not_block_a_resume_where_there_are_no_locks(
    bare: Path, nano: Tiny
) -> None:
    argv = nano.argv("run", "--resume", "auto", "--max_step", 400, "--max_epoch", 99)
    process = start([bare, "gpt2_ft", *argv])
    log, owner = (nano.folder / "run" / name for name in ("log.jsonl", ".lock.owner"))
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > 500):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert owner.is_file()
    other = nano.argv("run", "--resume", "auto", "--max_step", 400, "--max_epoch", 99)
    _, err = run_bare(bare, "gpt2_ft", [*other])
    assert "in use" not in err
    assert (nano.folder / "run" / "model.400.safetensors").is_file()
    assert not owner.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gets_a_file_that_names_its_owner(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Lustre is mounted by default, and some file systems in user space are."""
    import fcntl

    def no_lock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    with work_dir.claimed(str(tmp_path / "run"), None) as folder:
        assert str(os.getpid()) in (folder / ".lock.owner").read_text(encoding="utf-8")
        with (
            pytest.raises(InputError, match="in use by another run.*delete .*lock.owner"),
            work_dir.claimed(str(folder), None),
        ):
            raise AssertionError("two runs are in one folder")
    assert "no file locks here" in capsys.readouterr().err
    assert not (tmp_path / "run" / ".lock.owner").exists()


def test_a_folder_that_cannot_be_locked_for_another_reason_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    claim = work_dir.claimed(str(tmp_path / "run"), None)
    with pytest.raises(InputError, match="run cannot be used: Input/output error"), claim:
        raise AssertionError("the folder is not locked")


@pytest.mark.parametrize("status", ["", "Name:\tpython\nVmRSS:\t  100 kB\n"])
def test_a_system_that_does_not_say_its_peak_memory_ends_nothing(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gVisor leaves VmHWM out; elsewhere there is neither /proc nor getrusage."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: status)
    assert gpu.peak_resident_bytes() > 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert gpu.peak_resident_bytes() == 0
