"""Make a base anew: `python -m data.make_base nano` or `mini`, each as it is shipped.

nano  3.8 M parameters on generated text, into data/nano (15 to 20 minutes on one CPU core): what
      the sample and the tests start from
mini  5.1 M parameters on Schema-Guided Dialogue, RNNLG and DART, without E2E and WebNLG, into
      data/mini (90 minutes on one CPU core; docs/base.md): what the experiments on E2E start from

Makes the text, trains the vocabulary on it, trains the model from random weights with the
repository's own trainer, and stores it as fp16 under Hugging Face's names. Text and vocabulary come
out byte for byte; the weights do on the same kind of processor, as OMP_NUM_THREADS=1 keeps the
order of every sum (the shipped mini base came from rates that differ in the fifth digit). Stopped
and started again, it resumes. `--out FOLDER --max_step 20` goes the whole way in minutes, to a base
that has learned next to nothing.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from checkpoints import find_adapter, model_config, read_base, read_tensors
from checkpoints.config import transformers_config
from common.errors import InputError, Parser, run
from common.files import replacing, write_json
from data_utils import END_OF_TEXT, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "init_checkpoint": "none",
    "lora_dim": 0,
    "obj": "jlm",
    "train_batch_size": 8,
    "valid_batch_size": 16,
    "label_smooth": 0,
    "clip": 1,
    "eval_interval": 500,
    "save_interval": 500,
    "random_seed": 1,
}
# Of each base: the command for its text, its vocabulary, how long packed rows are (0: a row is one
# pair), what its training adds.
BASES: dict[str, dict[str, Any]] = {
    "nano": {
        "text": ["-m", "data.generate", "--base"],
        "entries": 2048,
        "packed": 0,
        "recipe": {"seq_len": 128, "lr": 1e-3, "max_step": 3000, "warmup_step": 200},
        "flags": [],
    },
    "mini": {
        "text": ["-m", "data.pretraining_text"],
        "entries": 4096,
        "packed": 160,
        "recipe": {
            "seq_len": 160,
            "lr": 1.5e-3,
            "adam_beta2": 0.99,
            "scheduler": "cycle",
            "i_steps": "0,300,3000,3706,3996,4350,4550,7500,12000",
            "i_lrs": "0,0.0015,0.0015,0.001108,0.00086,0,0.0015,0.0015,0",
            "max_step": 12000,
            "valid_samples": 0,
            "keep_last": 2,
        },
        "flags": ["--bf16"],
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


def write_config(folder: Path) -> None:
    """Write the config.json by which transformers and PEFT load the base in a folder."""
    config = model_config(None, read_base(folder))
    end_of_text = load_tokenizer(folder).token_to_id(END_OF_TEXT)
    write_json(folder / "config.json", transformers_config(config, end_of_text))


def commands(name: str, folder: Path, work: Path, max_step: int | None) -> list[list[str]]:
    """What to run, in order: text, vocabulary, packing where the base has it, training.

    Args:
        folder: where the base comes to be.
        work: where its text and its training are.
        max_step: of the training; None for the recipe's.
    """
    base, text = BASES[name], f"{work}/text"
    rows, packed = f"{text}/train.jsonl", f"{text}/packed.jsonl"
    length, entries = str(base["packed"]), str(base["entries"])
    settings = COMMON | base["recipe"] | {
        "train_data": packed if base["packed"] else rows, "valid_data": f"{text}/valid.jsonl",
        "vocab": folder, "model_card": f"gpt2.{name}", "work_dir": f"{work}/train",
        "resume": "auto",
    }  # fmt: skip
    if max_step is not None:
        settings |= {"max_step": max_step, "warmup_step": 0}
    packing = ["-m", "data.pack", rows, packed, "--vocab", str(folder), "--length", length]
    return [
        [*base["text"], text],
        ["-m", "data.train_bpe", rows, "--out", str(folder), "--entries", entries],
        *([packing] if base["packed"] else []),
        ["gpt2_ft.py", *(f"--{flag}={value}" for flag, value in settings.items()), *base["flags"]],
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code of the part that failed, or 0."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("name", choices=BASES)
    add("--out", type=Path, help="folder of the base (default: data/NAME, the shipped one)")
    add("--max_step", type=int, help="steps of the training, to try the way with --out")
    args = parser.parse_args(argv)
    if args.max_step is not None and args.out is None:
        raise InputError("--max_step makes a base of little use; give --out FOLDER with it")
    folder, work = ROOT / "data" / args.name, ROOT / "runs" / args.name
    if args.out is not None:
        folder, work = args.out.resolve(), args.out.resolve() / "work"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in commands(args.name, folder, work, args.max_step):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False)
        if done.returncode:  # it has said why
            return done.returncode
    target = folder / "model.safetensors"
    export(find_adapter(f"{work / 'train'}:last").path, target)
    write_config(folder)
    print(target)
    return 0


if __name__ == "__main__":
    run(main)
