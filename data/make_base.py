"""Make a base anew: `python -m data.make_base nano` or `mini`.

nano  what the repository ships, 3.8 M parameters on generated text, into data/nano (15 to 20
      minutes on one CPU core)
mini  for experiments, 5.1 M parameters on WebNLG and DART without E2E, into runs/mini (about 35
      minutes on two cores); it is not to be passed on: WebNLG's licence is for non-commercial use

Makes the text, trains the vocabulary on it, trains the model from random weights with the
repository's own trainer, and stores it as fp16 under Hugging Face's names. Text and vocabulary come
out byte for byte; the weights do on the same kind of processor, where OMP_NUM_THREADS=1, the
default for nano, keeps the order of every sum. Stopped and started again, it goes on.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch

from checkpoints import find_adapter, read_tensors
from common.errors import run
from common.files import replacing

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "init_checkpoint": "none",
    "lora_dim": 0,
    "obj": "jlm",
    "valid_batch_size": 16,
    "lr": 1e-3,
    "label_smooth": 0,
    "clip": 1,
    "eval_interval": 500,
    "save_interval": 500,
    "random_seed": 1,
}
# Of each base: the command for its text, its folder, its vocabulary, what its training adds.
BASES = {
    "nano": {
        "text": ["-m", "data.generate", "--base"],
        "folder": "data/nano",
        "entries": 2048,
        "recipe": {"seq_len": 128, "train_batch_size": 8, "max_step": 3000, "warmup_step": 200},
    },
    "mini": {
        "text": ["-m", "data.triples"],
        "folder": "runs/mini",
        "entries": 4096,
        "recipe": {"seq_len": 256, "train_batch_size": 16, "max_epoch": 3, "warmup_step": 300},
    },
}


def export(source: Path, target: Path) -> None:
    """Write the trained weights as fp16, under the names of Hugging Face's GPT-2."""
    weights = {
        name.removeprefix("transformer."): tensor.to(torch.float16)
        for name, tensor in sorted(read_tensors(source).items())
    }
    with replacing(target, "wb") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))


def commands(name: str) -> list[list[str]]:
    """What to run, in order: text, vocabulary, training."""
    base, work = BASES[name], f"runs/{name}"
    text, folder, entries = f"{work}/text", base["folder"], str(base["entries"])
    settings = COMMON | base["recipe"] | {
        "train_data": f"{text}/train.jsonl", "valid_data": f"{text}/valid.jsonl", "vocab": folder,
        "model_card": f"gpt2.{name}", "work_dir": f"{work}/train", "resume": "auto",
    }  # fmt: skip
    return [
        [*base["text"], text],
        ["-m", "data.train_bpe", f"{text}/train.jsonl", "--out", folder, "--entries", entries],
        ["gpt2_ft.py", *(f"--{flag}={value}" for flag, value in settings.items())],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BASES)
    name = parser.parse_args().name
    threads = {"OMP_NUM_THREADS": "1"} if name == "nano" else {}
    for command in commands(name):
        subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **threads}, check=True
        )
    target = ROOT / BASES[name]["folder"] / "model.safetensors"
    export(find_adapter(f"{ROOT / 'runs' / name / 'train'}:last").path, target)
    print(target)


if __name__ == "__main__":
    run(main)
