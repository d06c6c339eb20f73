"""Downloads from a web server of the test's own: the right bytes or one sentence, no wrong file."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.errors import InputError
from common.locks import LOCK_FILE, locked
from data import download
from data.download import MANIFEST, checksum, fetch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CONTENT = bytes(range(256)) * 4096
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves CONTENT under every name; `breaks` connections end after 100,000 bytes."""

    breaks = 0
    resumable = True
    length: str | None = ""  # what Content-Length says; "" for the truth, None for nothing
    endless = False  # sends more and more
    pause = 0.0  # seconds between two bytes, of which only a hundred are sent
    asked: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.endswith("/gone.bin"):
            return self.send_error(404)
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.server.resumable else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        length = self.server.length
        if length is not None:
            self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.server.endless or self.server.pause:
            return self.send_on(body)
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[:100_000]
        with suppress(OSError):  # the client may have had enough
            self.wfile.write(body)
        return None

    def send_on(self, body: bytes) -> None:
        with suppress(OSError):
            for place in range(100):
                time.sleep(self.server.pause)
                self.wfile.write(body if self.server.endless else body[place : place + 1])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("DATA_DIR", "MIRROR", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def entry(*urls: str, expected: str = SHA256, most_bytes: int = len(CONTENT)) -> dict:
    return {"checksum": expected, "most_bytes": most_bytes, "urls": list(urls)}


def files_in(folder: Path) -> list[str]:
    """What a download left in a folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE)


def test_a_file_is_saved_once_and_then_only_checked(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
        assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert files_in(tmp_path) == ["a.bin"]


def test_a_wrong_checksum_leaves_no_file_behind(server: Server, tmp_path: Path) -> None:
    wrong = entry(f"{server.url}/a.bin", expected="sha256:" + "0" * 64)
    with pytest.raises(InputError, match="checksum differs"):
        fetch("g", "a.bin", wrong, tmp_path)
    assert files_in(tmp_path) == []


def test_the_next_address_is_tried_when_one_has_nothing(server: Server, tmp_path: Path) -> None:
    urls = f"{server.url}/gone.bin", f"{server.url}/a.bin"
    assert fetch("g", "a.bin", entry(*urls), tmp_path).read_bytes() == CONTENT


def test_a_missing_file_names_itself_its_place_and_the_reason(
    server: Server, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        fetch("g", "gone.bin", entry(f"{server.url}/gone.bin"), tmp_path)
    message = str(caught.value)
    assert "g/gone.bin" in message and str(tmp_path / "gone.bin") in message
    assert "HTTP 404" in message and "\n" not in message


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_the_next_run_goes_on_where_the_last_gave_up(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    with pytest.raises(InputError, match="connection broke after 300,000 bytes"):
        fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    assert fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=300000-"


def test_a_server_that_cannot_resume_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.resumable, server.breaks = False, 1
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert target.read_bytes() == CONTENT


def test_a_part_that_was_complete_is_taken_as_it_is(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert target.read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_body_without_end_is_cut_off_at_the_size_of_the_file(
    server: Server, tmp_path: Path
) -> None:
    server.length, server.endless = None, True
    with pytest.raises(InputError, match=f"another file, it is larger than {len(CONTENT):,} bytes"):
        fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert files_in(tmp_path) == []


def test_a_larger_file_is_refused_before_it_is_received(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"another file, it has {len(CONTENT):,} bytes"):
        fetch("g", "a.bin", entry(f"{server.url}/a.bin", most_bytes=1000), tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "9" * 5000])
def test_a_length_that_is_no_number_is_one_sentence(
    length: str, server: Server, tmp_path: Path
) -> None:
    server.length = length
    with pytest.raises(InputError) as caught:
        fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.bin").exists()


def test_a_server_that_trickles_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SECONDS", 0.2)
    monkeypatch.setattr(download, "LEAST_SPEED", 10**9)
    server.pause = 0.02
    with pytest.raises(InputError, match=r"too slow, [\d]+ bytes in 0 s"):
        fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert len(server.asked) == 1


def test_a_file_is_on_disk_before_it_has_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))[1]
        )
    fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path)
    assert calls == ["fsync", "replace", "fsync"]  # the file's, then the folder's


@pytest.mark.parametrize("packed", [False, True])
def test_the_local_mirror_comes_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    mirror = tmp_path / "mirror" / "g"
    mirror.mkdir(parents=True)
    name = "a.bin.gz" if packed else "a.bin"
    (mirror / name).write_bytes(gzip.compress(CONTENT) if packed else CONTENT)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "mirror"))
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path / "out")
    assert target.read_bytes() == CONTENT
    assert server.asked == []


def test_a_packed_mirror_larger_than_the_file_is_not_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.bin.gz").write_bytes(gzip.compress(CONTENT * 9))
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path / "out")
    assert target.read_bytes() == CONTENT and len(server.asked) == 1


def test_a_mirror_on_the_web_comes_before_the_public_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIRROR", f"{server.url}/mirror/")
    target = fetch("g", "a.bin", entry("http://127.0.0.1:1/never"), tmp_path)
    assert target.read_bytes() == CONTENT


def test_a_truncated_local_copy_is_named_and_the_web_is_tried(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "g"
    mirror.mkdir()
    (mirror / "a.bin.gz").write_bytes(gzip.compress(CONTENT)[:-20])
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="a.bin: .*end-of-stream"):
        fetch("g", "a.bin", entry(), tmp_path / "out")
    target = fetch("g", "a.bin", entry(f"{server.url}/a.bin"), tmp_path / "out")
    assert target.read_bytes() == CONTENT


def test_offline_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    blocked = {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
    environment = {**os.environ, **blocked, "DATA_DIR": "", "MIRROR": "", "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, "-m", "data.download", "gpt2_vocab", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot get gpt2_vocab/encoder.json; put it at ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_checksum_of_kind_git_is_the_one_git_computes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    done = subprocess.run(["git", "hash-object", path], capture_output=True, check=True)
    assert checksum(path, "git") == done.stdout.decode().strip()


def manifest_entries() -> list[tuple[str, str, dict]]:
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return [(group, name, e) for group, files in manifest.items() for name, e in files.items()]


def test_every_public_file_has_https_addresses_a_size_and_a_well_formed_checksum() -> None:
    lengths = {"sha256": 64, "git": 40}
    for _, name, e in manifest_entries():
        assert e["urls"] and all(url.startswith("https://") for url in e["urls"]), name
        kind, digest = e["checksum"].split(":")
        assert len(bytes.fromhex(digest)) * 2 == lengths[kind], name
        assert 0 < e["most_bytes"] <= 2e8, name


def test_listed_checksums_are_those_of_the_public_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} with the public files is not here")
    monkeypatch.setenv("DATA_DIR", str(SHARED))
    monkeypatch.delenv("MIRROR", raising=False)
    checked = 0
    for group, name, e in manifest_entries():
        found = [SHARED / group / name, SHARED / group / f"{name}.gz"]
        if any(path.is_file() for path in found):
            fetch(group, name, {**e, "urls": []}, tmp_path)
            checked += 1
    assert checked == 159


def test_a_folder_into_which_another_download_writes_is_left_to_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.locks.LOCK_SECONDS", 0.1)
    wanted = entry(f"{server.url}/a.bin")
    with (
        locked(tmp_path, str(tmp_path), "download"),
        pytest.raises(InputError, match="is in use by another download"),
    ):
        fetch("g", "a.bin", wanted, tmp_path)
    assert server.asked == [] and not (tmp_path / "a.bin.part").exists()
    assert fetch("g", "a.bin", wanted, tmp_path).read_bytes() == CONTENT
