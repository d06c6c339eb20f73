"""What both benchmarks share: data, peers in processes of their own, statistics, the result file.

A peer is `python -m benchmarks.NAME_peers PEER SETTINGS.json`. It reads one JSON request per line
and answers each with one JSON line: `losses` or `outputs`, `seconds`, `rss` (peak, MB). Only one
peer works at a time, in rounds, so that whatever else the machine does falls on all of them alike.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

from common.errors import InputError
from common.files import write_json
from data.convert_e2e import e2e_rows
from data.rows import write_jsonl
from data_utils import END_OF_TEXT, load_tokenizer, read_rows
from gpu import peak_resident_bytes
from model import MODEL_CARDS, GPT2Config, GPT2LMModel

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "data" / "nano"
SIZES = {"sm": "gpt2.sm", "small": "gpt2.nano"}  # small: with the vocabulary of GPT-2
RESULTS = ROOT / "results" / "bench"
REQUIREMENTS = "requirements-peers.txt"


class Peer:
    """A peer that has been started and waits for requests."""

    def __init__(
        self, module: str, name: str, settings: Path, threads: int, python: str = sys.executable
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module, name, str(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(threads),
            encoding="utf-8",
        )

    def ask(self, request: object) -> dict:
        """Send a request and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def environment(threads: int) -> dict[str, str]:
    """The variables of a measured process: its threads, no network, no bars of progress."""
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    return os.environ | own | quiet


@cache
def peers_python() -> str:
    """The Python of `.venv-peers`, which is made or brought up to its requirements first.

    Raises:
        InputError: pip could not install them.
    """
    script = f"source scripts/venv.sh {REQUIREMENTS} .venv-peers >&2; command -v python"
    made = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE, encoding="utf-8", check=False,
    )  # fmt: skip
    if made.returncode:
        raise InputError(f"{REQUIREMENTS} could not be installed; what pip printed says why")
    return made.stdout.strip()


def peers_versions() -> dict[str, str]:
    """What is installed in `.venv-peers` of the packages that its requirements name."""
    lines = (ROOT / REQUIREMENTS).read_text(encoding="utf-8")
    names = re.findall(r"^(\S+)==", lines, re.MULTILINE)
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.check_output([peers_python(), "-c", code, *names], encoding="utf-8")
    return dict(zip(names, found.split(), strict=True))


def serve(peers: Mapping[str, Callable[[dict], Callable[[list], dict]]]) -> None:
    """The peer's side: make the peer that the command line names, then answer until the end."""
    name, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the peer itself prints goes to stderr
    work = peers[name](json.loads(Path(settings).read_text(encoding="utf-8")))
    for line in sys.stdin:
        answer = work(json.loads(line)) | {"rss": peak_resident_bytes() / 1e6}
        print(json.dumps(answer), file=answers, flush=True)


def gemm(_settings: dict) -> Callable[[list], dict]:
    """The peer that only multiplies matrices: what the machine can do now, in GFLOP/s."""
    side = 2048
    square = torch.rand(side, side)

    def work(_request: list) -> dict:
        seconds = []
        for _ in range(6):
            started = perf_counter()
            square @ square
            seconds.append(perf_counter() - started)
        return {"gflops": 2e-9 * side**3 / statistics.median(seconds)}

    return work


def read_samples(name: str, folder: Path) -> tuple[str, Path]:
    """E2E's rows and GPT-2's vocabulary from `$DATA_DIR`, else those of the shipped sample: what
    they are, and a JSONL of token ids in `folder`."""
    data = Path(os.environ["DATA_DIR"]) if os.environ.get("DATA_DIR") else None
    if data is None:
        source, tokenizer = "the shipped sample", load_tokenizer(NANO)
        text = ROOT / "data" / "sample" / f"{name}.jsonl"
    else:
        source, tokenizer = "E2E", load_tokenizer(data / "gpt2_vocab")
        text = folder / f"{name}.text.jsonl"
        write_jsonl(text, e2e_rows(str(data / "e2e" / f"{name}.txt")))
    path = folder / f"{name}.jsonl"
    rows = read_rows(text, tokenizer, tokenizer.get_vocab_size())
    end = {tokenizer.token_to_id(END_OF_TEXT): 50256}  # the peers' models have GPT-2's
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            ids = {
                field: [end.get(token, token) for token in getattr(row, field).tolist()]
                for field in ("context", "completion")
            }
            file.write(json.dumps(ids) + "\n")
    return source, path


def model_shape(size: str) -> dict[str, Any]:
    """Fields of `GPT2Config` for a size; always with GPT-2's vocabulary."""
    return MODEL_CARDS[SIZES[size]] | {"vocab_size": 50257}


def write_random_base(size: str, path: Path) -> None:
    """Random weights of a size, under the names that HF's files use."""
    torch.manual_seed(0)
    save_file(GPT2LMModel(GPT2Config(**model_shape(size))).state_dict(), path)


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the smallest and largest ratio of one round."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    middle = statistics.median(slow) / statistics.median(fast)
    return {"median": middle, "min": min(rounds), "max": max(rounds)}


def machine(threads: int) -> dict:
    """What the figures depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def write_result(name: str, result: dict) -> Path:
    """Keep a result as results/bench/NAME.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    return path
