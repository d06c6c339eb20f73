"""Files appear complete under their name or not at all; nothing is left of a writer that died."""

import os
import re
import stat
import threading
from pathlib import Path

import pytest

from common import files
from common.errors import InputError
from common.files import check_output, check_output_folder, delete_leftovers, replacing


def temporary_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_file_is_written_beside_its_name_and_then_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as file:
        file.write("é\n")
        assert not path.exists() and len(temporary_names(path.parent)) == 1
    assert path.read_bytes() == "é\n".encode()
    assert temporary_names(path.parent) == []


def test_writers_with_equal_process_ids_have_temporary_names_of_their_own(tmp_path: Path) -> None:
    """As the two of two containers on one volume."""
    path = tmp_path / "state.pt"
    with replacing(path, "wb") as one, replacing(path, "wb") as other:
        one.write(b"one")
        other.write(b"other")
        names = temporary_names(tmp_path)
        assert len(set(names)) == 2
        assert not any(str(os.getpid()) == part for name in names for part in name.split("."))
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("length", [2, 200, 254])
@pytest.mark.parametrize("letter", ["a", "é"])
def test_any_name_that_the_system_takes_can_be_written(
    letter: str, length: int, tmp_path: Path
) -> None:
    path = tmp_path / (letter * (length // len(letter.encode())))
    with replacing(path) as file:
        file.write("x")
    assert path.read_text(encoding="utf-8") == "x"


def test_a_link_stays_a_link_and_its_target_gets_the_content(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    with replacing(link) as file:
        file.write("new")
    assert link.is_symlink() and target.read_text(encoding="utf-8") == "new"


def test_a_pipe_and_a_device_are_written_through_and_stay_what_they_are(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    with replacing(pipe) as file:
        file.write("through")
    reader.join()
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    with replacing("/dev/null") as file:
        file.write("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    message = f"{re.escape(str(tmp_path))} cannot be written: Is a directory"
    with pytest.raises(InputError, match=message), replacing(tmp_path):
        raise AssertionError("the block was entered")
    assert temporary_names(tmp_path.parent) == []


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        synced(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with replacing(tmp_path / "file") as file:
        file.write("x")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


def test_what_dead_writers_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    left = [".state.pt.12345.tmp", ".state.pt.0123456789abcdef.tmp"]
    mine = ["state.pt", ".lock", "notes.tmp", ".notes.tmp", ".a.0123456789ABCDEF.tmp", "x.12.tmp"]
    for name in left + mine:
        (tmp_path / name).write_bytes(b"")
    delete_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_a_full_device_is_said(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    refused = pytest.raises(InputError, match="/dev/full cannot be written: No space left")
    with refused, replacing(full) as file:
        file.write("x" * 100_000)


def test_an_output_that_is_an_input_under_any_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "hard")
    for name in ("in", "link", "hard", "../" + tmp_path.name + "/in"):
        with pytest.raises(InputError, match="^--out .* is also --in and would replace it"):
            check_output("--out", tmp_path / name, {"--no": None, "--in": tmp_path / "in"})
    check_output("--out", tmp_path / "out", {"--in": tmp_path / "in", "--no": tmp_path / "none"})
    check_output("--out", os.devnull, {"--in": os.devnull})  # nothing is lost there
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_output("--out", tmp_path, {})


def test_an_output_folder_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "in").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("a")
    for folder in ("a", "link", "a/../a"):
        for given in ("a/in", "a"):
            with pytest.raises(InputError, match="^--out .* is the folder of --in"):
                check_output_folder("--out", tmp_path / folder, {"--in": tmp_path / given})
    for folder in ("", "b", "a/in/c"):
        check_output_folder("--out", tmp_path / folder, {"--in": tmp_path / "a" / "in"})
