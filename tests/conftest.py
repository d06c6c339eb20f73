"""What the tests share: one thread, a tiny base with tiny data, and the folder of outside data."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

import checkpoints
import gpt2_ft
import model
from common import errors
from training import resume

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FUZZ = int(os.environ.get("FUZZ", "1"))  # how many times as many damaged inputs to try
VOCABULARY, POSITIONS = 64, 32
# Every method but LoRA, small enough for any card.
METHODS = {
    "adapter_l": ["--method", "adapter_l", "--adapter_dim", "3"],
    "adapter_h": ["--method", "adapter_h", "--adapter_dim", "3"],
    # A prefix takes positions from the window.
    "prefix": ["--method", "prefix", "--prefix_length", "3", "--prefix_hidden", "8",
               "--seq_len", "29"],
    "full": ["--method", "full"],
    "top2": ["--method", "top2"],
    "bitfit": ["--method", "bitfit"],
}  # fmt: skip
TINY_CARD = {"n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture(autouse=True)
def _one_thread_and_the_signals_of_the_test_runner():
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of outside data and oracles beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: nothing outside to compare with")
    return SHARED


def random_base(card: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a base large enough to tell inputs apart, under canonical names."""
    torch.manual_seed(seed)
    shape = card | {"vocab_size": VOCABULARY, "n_positions": POSITIONS}
    base = model.GPT2LMModel(model.GPT2Config(**shape))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.state_dict().items()
    }


def random_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Encoded rows of unequal lengths."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(least, most))]

    return [{"context": ids(2, 8), "completion": ids(1, 9)} for _ in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def through_a_pipe(path: Path) -> Path:
    """A FIFO to which a thread writes a file's content, once."""
    pipe = path.with_name(f"{path.name}.pipe")
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),)).start()
    return pipe


@dataclass
class Tiny:
    """Files of a tiny training run, and its command line."""

    folder: Path
    base: Path
    card: str

    def argv(self, work_dir: str | Path, *more: object) -> list[str]:
        """Arguments of a LoRA run of 12 steps, 6 an epoch, into a folder; `more` rules."""
        own = ("--lora_dim", "2", "--lora_alpha", "8", "--lora_dropout", "0.2")
        return self.argv_of(own, work_dir, *more)

    def argv_of(self, method: Sequence[str], work_dir: str | Path, *more: object) -> list[str]:
        """Arguments of the same run of a method, which the given flags name."""
        settings = {
            "train_data": self.folder / "train.jsonl", "valid_data": self.folder / "valid.jsonl",
            "init_checkpoint": self.base, "model_card": self.card, "device": "cpu",
            "lr": 0.01, "warmup_step": 2,
            "train_batch_size": 2, "grad_acc": 2, "seq_len": POSITIONS, "max_epoch": 2,
            "log_interval": 1, "eval_interval": 4, "save_interval": 3,
        }  # fmt: skip
        pairs = [(f"--{name}", str(value)) for name, value in settings.items()]
        flat = [part for pair in pairs for part in pair]
        # A method may need another window; tests that give no work_dir cut the last pair off.
        return [*flat, *method, "--work_dir", str(self.folder / work_dir), *map(str, more)]


def _write_tiny(folder: Path, card: str) -> Tiny:
    base = folder / "base.safetensors"
    safetensors.torch.save_file(random_base(model.MODEL_CARDS[card]), base)
    write_rows(folder / "train.jsonl", random_rows(21))
    write_rows(folder / "valid.jsonl", random_rows(7, seed=1))
    return Tiny(folder, base, card)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A run of a two-layer model, for calls within this process."""
    monkeypatch.setitem(model.MODEL_CARDS, "gpt2.tiny", TINY_CARD)
    return _write_tiny(tmp_path, "gpt2.tiny")


@pytest.fixture
def nano(tmp_path: Path) -> Tiny:
    """The same with a card that other processes know too; random weights."""
    return _write_tiny(tmp_path, "gpt2.nano")


LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(command: list[object], **options) -> subprocess.Popen:
    """A program of this repository in another process with one thread; pipes of text."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=options.pop("cwd", ROOT),
        env=environment | {"OMP_NUM_THREADS": "1"} | options.pop("env", {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a started program."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def refusal(
    argv: list[str],
    capsys: pytest.CaptureFixture,
    main: Callable[[list[str]], int | None] = gpt2_ft.main,
) -> str:
    """The one sentence with which the program refuses its input, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: main(argv))
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob("*.tmp"))
    for path in folder.glob("model.*.safetensors"):
        checkpoints.read_adapter(path)
    if (folder / "state.pt").exists():
        resume.State.read(folder / "state.pt")
