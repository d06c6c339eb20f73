"""Measures what the programs make of the shipped sample, through their command lines alone.

Every number that `pins.json` holds comes from here, both when it is renewed and when it is tested.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

import gpt2_beam
import gpt2_ft

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
PINS = FOLDER / "pins.json"

STEPS = 6
SAMPLES = 3  # values of each tensor that are stored, evenly spaced, after its norm

# The flags of each kind. They differ in more than the kind, so that few runs reach many paths.
RUNS = {
    "lora": "",
    "rslora": "--use_rslora --lora_targets c_attn",
    "lora_plus": "--lora_plus_ratio 16 --train_bias lora_only --grad_acc 2 --clip 0.5",
    "dora": "--lora_kind dora --lora_targets all",
    "pissa": "--lora_kind pissa --lora_targets q,o",
    "lora_fa": "--lora_kind lora_fa --lora_targets q,v,fc,proj --obj jlm",
    "full": "--lora_dim 0",
    "prefix": "--method prefix --prefix_hidden 64 --seq_len 500",
    "top": "--lora_dim 0 --train_top 1 --optimizer torch --lr 0.0005",
    "bias": "--lora_dim 0 --train_bias all --scheduler cosine",
    "adapter_l": "--method adapter_l --clip 0.5",
    "adapter_h": "--method adapter_h --adapter_dim 8 --optimizer torch --lr 0.0005 --grad_acc 2",
    "top2": "--method top2 --no_decay_bias",
}
WITH_DROPOUT = [
    kind for kind, flags in RUNS.items() if not re.search("--lora_dim 0|--method", flags)
]

# Adapters with the first form of the header, and the texts that they decode to. They stay as they
# are, whatever later code writes. Made with --max_step 30 --warmup_step 3 --lr 0.01 and
# lora: --lora_dim 4 --lora_targets q,v
# dora: --lora_dim 2 --lora_targets o,fc --lora_kind dora
OLD_ADAPTERS = {kind: FOLDER / f"old_{kind}.safetensors" for kind in ("lora", "dora")}
OLD_TEXTS = FOLDER / "old_texts.json"


def train(kind: str, work_dir: Path) -> Path:
    """Train a few steps of a kind on the shipped sample, with one thread; returns its adapter."""
    torch.set_num_threads(1)
    argv = f"--device cpu --train_batch_size 4 --max_step {STEPS} --warmup_step 2 --lr 0.001"
    gpt2_ft.main([*f"{argv} {RUNS[kind]}".split(), "--work_dir", str(work_dir)])
    return work_dir / f"model.{STEPS}.safetensors"


def decode(adapter: Path, folder: Path) -> Path:
    """Decode the first 12 contexts of the sample's test file; returns the predictions file."""
    torch.set_num_threads(1)
    lines = (ROOT / "data/sample/test.jsonl").read_text(encoding="utf-8").splitlines()
    first = {json.loads(line)["context"]: line for line in reversed(lines)}
    chosen = [line for line in lines if first[json.loads(line)["context"]] is line][:12]
    data, output = folder / "test.jsonl", folder / "predictions.jsonl"
    data.write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
    argv = ["--device", "cpu", "--data", data, "--vocab", ROOT / "data/nano", "--beam", 4]
    argv += ["--init_checkpoint", ROOT / "data/nano/model.safetensors", "--adapter", adapter]
    gpt2_beam.main([str(part) for part in [*argv, "--eval_len", 48, "--output_file", output]])
    return output


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, dtypes, shapes and raw bytes of tensors, whatever their order."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def sampled(tensor: Tensor) -> list[float]:
    """The norm of a tensor and `SAMPLES` of its values, evenly spaced from first to last."""
    flat = tensor.double().flatten()
    places = torch.linspace(0, len(flat) - 1, SAMPLES).long()
    return [float(f"{value:.9g}") for value in (flat.norm(), *flat[places])]


def pin_of(tensors: Mapping[str, Tensor]) -> dict:
    """What is held of tensors: the hash for the same processor, values for all others."""
    values = {name: sampled(tensor) for name, tensor in sorted(tensors.items())}
    return {"sha256": digest(tensors), "values": values}


def header_of(adapter: Path) -> dict:
    """The header of an adapter file, without the checksum, which depends on the tensors' bytes."""
    with safetensors.safe_open(adapter, framework="pt") as file:
        header = json.loads(file.metadata()["adapter"])
    del header["sha256"]
    return header


def tensors_within(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries and lists, each with the path to it.

    The state of a GPU's random generator is left out: whether there is one depends on the machine.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            if key != "cuda":
                yield from tensors_within(inner, f"{path}/{key}")


def measure_run(adapter: Path) -> dict:
    """The pin of a training run: its adapter's header and tensors, and those of its state.pt."""
    state = torch.load(adapter.with_name("state.pt"), map_location="cpu", weights_only=True)
    return {
        "header": header_of(adapter),
        "tensors": pin_of(load_file(adapter)),
        "state": pin_of(dict(tensors_within(state))),
    }


def measure_decode(predictions: Path) -> dict:
    """The pin of a predictions file: the hash of its bytes, and its rows."""
    content = predictions.read_bytes()
    rows = [json.loads(line) for line in content.decode().splitlines()]
    return {"sha256": hashlib.sha256(content).hexdigest(), "rows": rows}


def measure_all(folder: Path) -> dict:
    """Every pin, made anew in an empty folder."""
    adapters = {kind: train(kind, folder / kind) for kind in RUNS}
    runs = {kind: measure_run(adapter) for kind, adapter in adapters.items()}
    return {
        "made_on": this_processor(),
        "dropout": dropout_draws(),
        "runs": runs,
        "decode": measure_decode(decode(adapters["lora"], folder)),
    }


def dropout_draws() -> str:
    """Which of 64 values dropout keeps from seed 0: builds of torch differ in how they draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = torch.nn.functional.dropout(torch.ones(64), 0.5)
    return "".join(str(int(value > 0)) for value in kept)


def this_processor() -> dict[str, str]:
    """What the bytes of a result depend on: the processor, its vector instructions, and torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    # Where processors differ, the first is described; all lines are alike otherwise.
    fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    flags = fields.get("flags", fields.get("Features", "")).split()
    named = ("vendor_id", "cpu family", "model", "model name", "stepping")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": ", ".join(fields.get(name, "unknown") for name in named),
        "vectors": " ".join(sorted(flag for flag in flags if re.match("avx|amx|fma|f16c", flag))),
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def furthest(then: dict[str, list[float]], now: dict[str, list[float]]) -> float:
    """The largest difference between values stored and made now, relative for those above 1."""
    pairs = [pair for name in then for pair in zip(then[name], now[name], strict=True)]
    return max((abs(a - b) / max(1.0, abs(a)) for a, b in pairs), default=0.0)
