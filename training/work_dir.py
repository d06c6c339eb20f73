"""The folder of a run: which one it is, and that no other run is in it."""

import errno
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from common.errors import InputError
from common.files import delete_leftovers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it says of a system without locks is said below
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOCK_SECONDS = 5.0
LOCK_FILE, OWNER_FILE = ".lock", ".lock.owner"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def claimed(work_dir: str | None, resume: str | None) -> Iterator[Path]:
    """The folder of a run, made if need be, out of which other runs are kept until the block or
    this process ends, however it ends.

    Without `--work_dir` it is the one to resume, or the next `runs/NNN`. What killed writers left
    in it is deleted; so is a new folder if the start fails before anything is written to it.

    Raises:
        InputError: another run is in there, or the folder cannot be made.
    """
    if resume == "auto" and not work_dir:
        raise InputError("--resume auto needs --work_dir, the folder of the run to resume")
    name = work_dir or resume
    try:
        is_new = not name or not Path(name).exists()
        folder = Path(name) if name else _next_folder(Path("runs"))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--work_dir {name or 'runs'} cannot be used: {error.strerror}") from error
    try:
        with _locked(folder):
            delete_leftovers(folder)
            yield folder
    except BaseException:
        if is_new:
            _delete_if_unused(folder)
        raise


def _next_folder(runs: Path) -> Path:
    """Make the folder that follows those of `runs` by number; two starts at once get two."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in runs.iterdir() if re.fullmatch(r"[0-9]{3,9}", path.name)]
    for number in count(max(taken, default=0) + 1):
        folder = runs / f"{number:03}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("numbers do not end")


def _delete_if_unused(folder: Path) -> None:
    try:
        if {path.name for path in folder.iterdir()} <= {LOCK_FILE, OWNER_FILE}:
            (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # it holds a run, or somebody else deleted it
        return


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. A process that was killed may take a moment to end, and is waited
    for. Where there are no locks a file that names its owner stands for one, and is taken over
    from an owner that is dead."""
    lock = _system_lock(folder)
    if lock is None:
        lock = SoftFileLock(folder / OWNER_FILE, thread_local=False)
        _acquire(lock, folder)
        print(
            f"warning: there are no file locks here, so {lock.lock_file} stands for one; delete it "
            "if a run on another machine was killed",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        lock.release()


def _system_lock(folder: Path) -> BaseFileLock | None:
    """The lock that the system keeps and frees when its owner ends; None where it has none."""
    if FileLock is SoftFileLock:
        return None
    lock = FileLock(folder / LOCK_FILE, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, folder)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        reason = error.strerror or error
        raise InputError(f"--work_dir {folder} cannot be used: {reason}") from error
    return lock


def _acquire(lock: BaseFileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        advice = "give another"
        if isinstance(lock, SoftFileLock):
            advice += f", or delete {lock.lock_file} if there is none"
        raise InputError(f"--work_dir {folder} is in use by another run; {advice}") from error
