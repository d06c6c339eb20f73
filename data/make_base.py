"""Make the nano base anew: `python data/make_base.py` (15 to 20 minutes on one CPU core).

Generates the base domains' text, trains the vocabulary on it, trains gpt2.nano from random weights
with the repository's own trainer, and stores the result as fp16 under Hugging Face's names in
data/nano/model.safetensors. Text and vocabulary come out byte for byte; the weights do on the same
kind of processor, where one thread keeps the order of every sum.
"""

import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from checkpoint import newest_adapter, read_tensors
from errors import run
from files import replacing

ROOT = Path(__file__).resolve().parents[1]
TEXT, WORK = "runs/nano/text", "runs/nano/train"
RECIPE = {
    "train_data": f"{TEXT}/train.jsonl",
    "valid_data": f"{TEXT}/valid.jsonl",
    "vocab": "data/nano",
    "model_card": "gpt2.nano",
    "init_checkpoint": "none",
    "work_dir": WORK,
    "lora_dim": 0,
    "obj": "jlm",
    "seq_len": 128,
    "train_batch_size": 8,
    "valid_batch_size": 16,
    "max_step": 3000,
    "lr": 1e-3,
    "warmup_step": 200,
    "label_smooth": 0,
    "clip": 1,
    "eval_interval": 500,
    "save_interval": 500,
    "random_seed": 1,
}


def export(source: Path, target: Path) -> None:
    """Write the trained weights as fp16, under the names of Hugging Face's GPT-2."""
    weights = {
        name.removeprefix("transformer."): tensor.to(torch.float16)
        for name, tensor in sorted(read_tensors(source).items())
    }
    with replacing(target, "wb") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))


def main() -> None:
    recipe = [f"--{flag}={value}" for flag, value in RECIPE.items()]
    for command in (
        ["data/generate.py", "--base", TEXT],
        ["data/train_bpe.py", f"{TEXT}/train.jsonl"],
        ["gpt2_ft.py", *recipe, "--resume=auto"],
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    export(newest_adapter(ROOT / WORK), ROOT / "data/nano/model.safetensors")


if __name__ == "__main__":
    run(main)
