"""Handing an adapter on: its card, the push to a hub on this machine, and the mean of several."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Tiny, finish, start
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel

import checkpoints
import convert_adapter
import gpt2_ft
from checkpoints.card import Origin, model_card, read_origin
from checkpoints.header import AdapterHeader, Base
from common.errors import InputError
from data_utils import load_tokenizer
from loralib import LoraConfig

RESULT = {
    "scores": {"BLEU": 0.6512, "NIST": 8.41, "METEOR": None},
    "task": "e2e", "items": 630, "references": 4693,
    "bootstrap": {"intervals": {"BLEU": {"ci": 0.0123}}},
}  # fmt: skip


def header(**more: object) -> AdapterHeader:
    settings = {"model_card": "gpt2.md", "step": 12, "seed": 7, "train_data": "ab" * 32}
    return AdapterHeader(LoraConfig(), Base("openai-community/gpt2", "cd" * 32), **settings | more)


def metadata(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.mark.parametrize("form", ("peft", "merged", "safetensors", "pt"))
def test_a_card_has_the_hubs_metadata_scores_with_intervals_and_the_prompt_form(form: str) -> None:
    text = model_card(header(), form, "me/mine", Origin("python gpt2_ft.py", "c0ffee", "2", RESULT))
    front = metadata(text)
    assert front["base_model"] == "openai-community/gpt2"
    assert front["base_model_relation"] == ("finetune" if form == "merged" else "adapter")
    library = {"peft": "peft", "merged": "transformers"}.get(form)
    assert front.get("library_name") == library
    assert (
        ModelCard(text).data.base_model == "openai-community/gpt2"
    )  # as the hub's client reads it
    assert "| BLEU | 65.1 | ± 1.2 |" in text and "| NIST | 8.41 |  |" in text
    assert "METEOR" not in text  # there is no number
    assert "`<|endoftext|>`" in text and "ab" * 32 in text and "python gpt2_ft.py" in text
    assert ("vLLM does not serve" in text) == (form == "peft")
    assert "rank 4, alpha 32, on q, v" in text


def test_a_card_leaves_out_what_is_not_known_and_any_name_is_safe_in_it() -> None:
    name = 'a: "b" # c\u2028'
    bare = AdapterHeader(None, Base(name), method="full")
    text = model_card(bare, "merged", "mine", Origin(), base_name=name)
    assert metadata(text)["base_model"] == name
    assert "## Scores" not in text and "## Training" not in text and "None" not in text


def test_a_base_of_this_machine_alone_is_no_base_on_the_hub() -> None:
    local = AdapterHeader(LoraConfig(), Base("nano", "cd" * 32))
    text = model_card(local, "peft", "mine", Origin())
    assert "base_model" not in metadata(text) and "A LoRA adapter of `nano`" in text
    assert "GPT2LMHeadModel.from_pretrained('BASE')" in text and "`BASE` stands for" in text
    named = model_card(local, "peft", "mine", Origin(), base_name="me/nano")
    assert metadata(named)["base_model"] == "me/nano" and "BASE" not in named


def test_scores_come_only_from_a_result_of_scoring(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content in ("[]", "{", '{"scores": 3}', "{}"):
        bad.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="is not a result of scoring"):
            read_origin(tmp_path, bad)
    (tmp_path / "run.json").write_text('{"command": 3, "torch": []}', encoding="utf-8")
    assert read_origin(tmp_path) == Origin()


@pytest.fixture
def run(tiny: Tiny) -> Path:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    return tiny.folder / "run"


@pytest.mark.parametrize(("to", "name"), [("peft", "README.md"), ("safetensors", "x.md")])
def test_every_export_writes_its_card(tiny: Tiny, run: Path, to: str, name: str) -> None:
    output = tiny.folder / ("x.safetensors" if to == "safetensors" else "out")
    argv = ["--adapter", run, "--init_checkpoint", tiny.base, "--to", to, "--output", output]
    convert_adapter.main([str(part) for part in argv])
    card = (output if to == "peft" else tiny.folder) / name
    text = card.read_text(encoding="utf-8")
    assert "rank 2, alpha 8" in text and torch.__version__ in text


def test_a_run_is_exported_with_the_base_and_vocabulary_that_it_was_trained_on(
    tmp_path: Path,
) -> None:
    run, output, shipped = tmp_path / "run", tmp_path / "merged", ROOT / "data" / "nano"
    gpt2_ft.main(["--max_step", "2", "--valid_samples", "0", "--work_dir", str(run)])
    convert_adapter.main(["--adapter", str(run), "--to", "merged", "--output", str(output)])
    assert load_tokenizer(output).get_vocab() == load_tokenizer(shipped).get_vocab()
    theirs = GPT2LMHeadModel.from_pretrained(output).eval()
    ours = checkpoints.load(shipped, run)[0].eval()
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() < 1e-5


def test_an_adapter_apart_from_its_run_must_be_told_its_base(tiny: Tiny, run: Path) -> None:
    alone = (run / "model.3.safetensors").rename(tiny.folder / "alone.safetensors")
    argv = ["--adapter", str(alone), "--to", "merged", "--output", str(tiny.folder / "out")]
    with pytest.raises(InputError, match="--init_checkpoint is missing"):
        convert_adapter.main(argv)


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a push uses; large files go by LFS, small ones inline."""

    protocol_version = "HTTP/1.1"
    server: "Hub"

    def do_HEAD(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self.answer({"error": "You do not own this name"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{self.server.address}/me/mine"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")]} for n in names]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [{"upload": {"href": f"{self.server.address}/put/{o['oid']}"}} for o in objects]
            both = zip(objects, links, strict=True)
            self.answer({"transfer": "basic", "objects": [o | {"actions": a} for o, a in both]})
        elif "/commit/main" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            address = f"{self.server.address}/me/mine/commit/{'0' * 40}"
            self.answer({"success": True, "commitUrl": address, "commitOid": "0" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        self.server.put[self.path.removeprefix("/put/")] = self.rfile.read(
            int(self.headers["Content-Length"])
        )
        self.answer({})

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.tokens: set[str] = set()
        self.created: dict = {}
        self.commit: list[dict] = []
        self.put: dict[str, bytes] = {}
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(tiny: Tiny, run: Path, hub: Hub, repository: str, **more: str) -> tuple[int, str, str]:
    environment = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(tiny.folder / "home"), "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    argv = ["convert_adapter.py", "--adapter", run, "--init_checkpoint", tiny.base, "--to", "peft"]
    argv += ["--output", tiny.folder / "out", "--push_to_hub", repository, "--private"]
    argv += ["--model_card", "gpt2.nano"]
    return finish(start(argv, env=environment | more))


@pytest.fixture
def nano_run(nano: Tiny) -> Path:
    gpt2_ft.main(nano.argv("run", "--max_step", 3))
    return nano.folder / "run"


def test_a_push_makes_the_repository_and_uploads_adapter_and_card(
    nano: Tiny, nano_run: Path, hub: Hub
) -> None:
    code, out, err = push(nano, nano_run, hub, "me/mine")
    assert code == 0, err
    assert out.splitlines()[-1] == f"Pushed to {hub.address}/me/mine"
    assert hub.created["name"] == "mine" and hub.created["organization"] == "me"
    assert hub.tokens == {"Bearer hf_secret"}
    inline = {
        entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
        for entry in hub.commit
        if entry["key"] == "file"
    }
    folder = nano.folder / "out"
    for name in ("README.md", "adapter_config.json"):
        assert inline[name] == (folder / name).read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert hub.put == {hashlib.sha256(weights).hexdigest(): weights}
    assert "PeftModel.from_pretrained(base, 'me/mine')" in inline["README.md"].decode()


def test_what_cannot_be_pushed_is_one_sentence_and_known_before_anything_is_written(
    nano: Tiny, nano_run: Path, hub: Hub
) -> None:
    for repository, more, sentence in (
        ("mine", {}, "name the owner"),
        ("me/mine/too", {}, "is not OWNER/NAME"),
        ("me/mine", {"HF_TOKEN": ""}, "nobody is logged in"),
    ):
        code, out, err = push(nano, nano_run, hub, repository, **more)
        assert (code, out) == (2, "") and err.startswith("error: --push_to_hub")
        assert sentence in err and err.count("\n") == 1
        assert not (nano.folder / "out").exists()
    hub.refuses = True
    code, _, err = push(nano, nano_run, hub, "me/mine")
    assert code == 2 and err.count("\n") == 1 and "the files are written" in err
    assert (nano.folder / "out" / "README.md").is_file()


def averaged(tiny: Tiny, *adapters: Path) -> Path:
    output = tiny.folder / "mean.safetensors"
    argv = ["--average", *adapters, "--init_checkpoint", tiny.base, "--to", "safetensors"]
    convert_adapter.main([str(part) for part in [*argv, "--output", output]])
    return output


def merged_weights(tiny: Tiny, adapter: Path) -> dict[str, torch.Tensor]:
    argv = ["--adapter", adapter, "--init_checkpoint", tiny.base, "--to", "merged"]
    output = tiny.folder / f"{adapter.name}-merged"
    convert_adapter.main([str(part) for part in [*argv, "--output", output]])
    return checkpoints.read_tensors(output)


def test_the_mean_of_adapters_has_the_mean_of_their_weights(tiny: Tiny) -> None:
    runs = []
    for seed, more in enumerate((["--lora_dim", 3], ["--lora_alpha", 5], ["--use_rslora"])):
        gpt2_ft.main(tiny.argv(f"run{seed}", "--max_step", 3, "--random_seed", seed, *more))
        runs.append(tiny.folder / f"run{seed}")
    mean = averaged(tiny, *runs)
    written, _ = checkpoints.read_adapter(mean)
    assert written is not None and written.lora is not None
    assert (written.lora.r, written.lora.scaling) == (3 + 2 + 2, 1.0)
    single = [merged_weights(tiny, run) for run in runs]
    for name, tensor in merged_weights(tiny, mean).items():
        expected = torch.stack([weights[name] for weights in single]).double().mean(0)
        assert (tensor - expected).abs().max() < 1e-6, name


def test_what_has_no_mean_is_refused(tiny: Tiny, run: Path) -> None:
    gpt2_ft.main(tiny.argv("dora", "--max_step", 3, "--lora_kind", "dora"))
    gpt2_ft.main(tiny.argv("all", "--max_step", 3, "--lora_targets", "all"))
    for others, sentence in (
        ([], "at least two"),
        ([tiny.folder / "dora"], "is dora"),
        ([tiny.folder / "all"], "must be on the same layers"),
    ):
        with pytest.raises(InputError, match=sentence):
            averaged(tiny, run, *others)
