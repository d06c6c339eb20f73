"""A folder that one process at a time has to itself."""

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it says of a system without locks is said below
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOCK_SECONDS = 5.0
LOCK_FILE, OWNER_FILE = ".lock", ".lock.owner"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: Path, name: str, user: str) -> Iterator[None]:
    """Hold the lock of a folder until the block or this process ends, however it ends.

    A process that was killed may take a moment to end, and is waited for. Where there are no locks
    a file that names its owner stands for one, and is taken over from an owner that is dead.

    Args:
        name: the folder in the words of a message, such as "--work_dir runs/a".
        user: who else may have it, such as "run".

    Raises:
        InputError: another has it, or it cannot be locked.
    """
    lock = _system_lock(folder, name, user)
    if lock is None:
        lock = SoftFileLock(folder / OWNER_FILE, thread_local=False)
        _acquire(lock, name, user)
        print(
            f"warning: there are no file locks here, so {lock.lock_file} stands for one; delete it "
            f"if a {user} on another machine was killed",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        lock.release()


def _system_lock(folder: Path, name: str, user: str) -> BaseFileLock | None:
    """The lock that the system keeps and frees when its owner ends; None where it has none."""
    if FileLock is SoftFileLock:
        return None
    lock = FileLock(folder / LOCK_FILE, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, name, user)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise InputError(f"{name} cannot be used: {error.strerror or error}") from error
    return lock


def _acquire(lock: BaseFileLock, name: str, user: str) -> None:
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        advice = "give another"
        if isinstance(lock, SoftFileLock):
            advice += f", or delete {lock.lock_file} if there is none"
        raise InputError(f"{name} is in use by another {user}; {advice}") from error
