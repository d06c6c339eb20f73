"""Published weights by name, through the real client against a small hub on this machine."""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY_CARD, finish, random_base, start

import checkpoints
from checkpoints import hub as weights_hub
from model import MODEL_CARDS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = (
    "import sys; from checkpoints import hub; from common import errors; "
    "errors.run(lambda: print(hub.find(sys.argv[1])))"
)


class Hub(ThreadingHTTPServer):
    """Serves one file as the hub does: checksum and commit in headers, parts on request."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.data, self.etag = data, hashlib.sha256(data).hexdigest()
        self.breaks_at: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        hub = self.server
        asked = self.headers.get("Range")
        hub.requests.append((self.command, self.path, asked))
        if not re.fullmatch(
            r"/openai-community/gpt2/resolve/(main|v2)/model\.safetensors", self.path
        ):
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        body = hub.data[begin:]
        self.send_response(206 if asked else 200)
        if asked:
            end = len(hub.data)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{end}")
        for name, value in {
            "ETag": f'"{hub.etag}"', "X-Linked-Etag": f'"{hub.etag}"', "X-Repo-Commit": COMMIT,
            "X-Linked-Size": len(hub.data), "Content-Length": len(body), "Accept-Ranges": "bytes",
        }.items():  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()
        if with_body and hub.breaks_at is not None:
            self.wfile.write(body[: hub.breaks_at])
            hub.breaks_at = None
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    card = {**MODEL_CARDS["gpt2.nano"], "n_layer": 1, "n_embd": 16}
    data = safetensors.torch.save(random_base(card), {"format": "pt"})
    server = Hub(data)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load(name: str, endpoint: str, home: Path) -> tuple[int, str, str]:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return finish(start(["-c", LOAD, name], env=environment | {"HF_HUB_DISABLE_XET": "1"}))


def test_a_name_is_downloaded_once_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    code, first, err = load("gpt2", hub.address, tmp_path)
    assert code == 0, err
    assert Path(first.strip()).read_bytes() == hub.data
    bodies = [r for r in hub.requests if r[0] == "GET"]
    assert [path for _, path, _ in bodies] == [
        "/openai-community/gpt2/resolve/main/model.safetensors"
    ]
    code, second, _ = load("gpt2", "http://127.0.0.1:9", tmp_path)
    assert (code, second) == (0, first)


def test_a_revision_may_be_named_and_an_unknown_one_is_one_sentence(
    hub: Hub, tmp_path: Path
) -> None:
    code, _, err = load("gpt2@v2", hub.address, tmp_path)
    assert code == 0, err
    revisions = {path.split("/")[4] for _, path, _ in hub.requests if "resolve" in path}
    assert revisions == {"v2"}
    code, _, err = load("gpt2@v3", hub.address, tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1 and "resolve/v3/model.safetensors" in err


def test_a_broken_transfer_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    chunk = 10 * 2**20  # what the client writes at once
    hub.data = safetensors.torch.save({"x": torch.zeros(2 * chunk // 4)})
    hub.etag = hashlib.sha256(hub.data).hexdigest()
    hub.breaks_at = chunk + 1000
    code, _, err = load("gpt2", hub.address, tmp_path)
    if code:  # the client may leave the second try to the next call
        code, _, err = load("gpt2", hub.address, tmp_path)
    assert code == 0, err
    ranges = [asked for method, _, asked in hub.requests if method == "GET"]
    assert ranges == [None, f"bytes={chunk}-"]


def test_a_file_with_another_checksum_than_the_hubs_is_refused_and_removed(
    hub: Hub, tmp_path: Path
) -> None:
    hub.etag = "0" * 64
    code, _, err = load("gpt2", hub.address, tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1 and "another checksum than the hub's" in err
    hub.etag = hashlib.sha256(hub.data).hexdigest()
    code, _, err = load("gpt2", hub.address, tmp_path)
    assert code == 0, err


def test_offline_one_sentence_says_what_to_put_where(tmp_path: Path) -> None:
    code, out, err = load("gpt2-medium", "http://127.0.0.1:9", tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "http://127.0.0.1:9/openai-community/gpt2-medium/resolve/main/model.safetensors" in err
    assert str(weights_hub.FOLDER / "gpt2-medium" / "model.safetensors") in err


def test_what_lies_in_pretrained_checkpoints_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_hub, "FOLDER", tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    file = tmp_path / "gpt2-xl" / "model.safetensors"
    file.parent.mkdir()
    base = random_base(TINY_CARD)
    safetensors.torch.save_file(base, file)
    assert weights_hub.find("gpt2-xl") == file
    assert checkpoints.read_base("gpt2-xl").fingerprint == checkpoints.base_fingerprint(base)


def test_a_path_that_exists_and_a_name_that_is_not_published_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    for name in ("gpt2", "gpt2-smal", "./gpt2-xl", "runs/gpt2"):
        assert weights_hub.find(name) == Path(name)


def test_the_client_is_imported_only_when_a_name_is_to_be_found() -> None:
    code = "import sys, gpt2_ft, gpt2_beam; print('huggingface_hub' in sys.modules)"
    assert finish(start(["-c", code]))[1] == "False\n"


def test_the_command_downloads_each_name_and_says_where_it_is(hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    code, out, err = finish(start(["-m", "data.download_weights", "gpt2"], env=environment))
    assert code == 0, err
    name, _, path = out.strip().partition(": ")
    assert name == "gpt2" and Path(path).read_bytes() == hub.data
    code, _, err = finish(start(["-m", "data.download_weights", "gpt3"], env=environment))
    assert code == 2 and err.startswith("error: argument NAME: invalid choice: 'gpt3'")
