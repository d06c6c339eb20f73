"""The folder of a run: which one it is, and that no other run is in it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from common.errors import InputError
from common.files import delete_leftovers
from common.locks import LOCK_FILE, OWNER_FILE, locked


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
        with locked(folder, f"--work_dir {folder}", "run"):
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
