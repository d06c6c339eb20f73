"""Convert an adapter of GPT-2 into another format.

    python convert_adapter.py --adapter runs/e2e --init_checkpoint gpt2-medium \\
        --to peft --output e2e-peft                   a folder for PEFT and what builds on it
    python convert_adapter.py --adapter runs/e2e --init_checkpoint gpt2-medium \\
        --vocab vocab --to merged --output e2e-merged GPT2LMHeadModel.from_pretrained loads it
    python convert_adapter.py --adapter e2e-peft --init_checkpoint gpt2-medium \\
        --to safetensors --output e2e.safetensors     this repository's own format
    python convert_adapter.py --adapter runs/e2e --init_checkpoint gpt2-medium \\
        --to pt --output e2e.pt                       the original code's format
    python convert_adapter.py --adapter gpt2_md_lora_e2e.pt --lora_alpha 32 \\
        --init_checkpoint gpt2-medium --to peft --output e2e-peft

Reads all of these: a work_dir, a .safetensors file made here, a .pt file of the original code or
of the package loralib (neither says its alpha), a PEFT folder. What an adapter computes with its
base stays the same; merged weights are summed in fp32. Files hold tensors only: nothing is
unpickled that could run.
"""

import argparse
from pathlib import Path

import checkpoints
from checkpoints.export import WRITERS, load_for_export
from common.errors import Parser
from common.errors import run as run_program
from model import MODEL_CARDS


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", required=True, help="adapter file, a run's work_dir, or a PEFT folder")
    add("--init_checkpoint", required=True, help="the adapter's base: name, file or folder")
    add("--to", required=True, choices=sorted(WRITERS), help="the format to write")
    add("--output", required=True, help="file (safetensors, pt) or folder (peft, merged) to write")
    add("--vocab", help="folder of the vocabulary, for the tokenizer files of --to merged")
    add("--model_card", help=f"{', '.join(MODEL_CARDS)} (default: the adapter's, or the base's)")
    add("--lora_dim", type=int, help="default: the adapter's")
    add("--lora_alpha", type=float, help="default: the adapter's; .pt files do not say it")
    add("--allow_other_base", action="store_true", help="than the adapter was trained on")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    args = build_parser().parse_args(argv)
    adapter = load_for_export(
        checkpoints.read_base(args.init_checkpoint),
        args.adapter,
        args.vocab,
        allow_other_base=args.allow_other_base,
        lora_dim=args.lora_dim,
        lora_alpha=args.lora_alpha,
        model_card=args.model_card,
    )
    WRITERS[args.to](adapter, Path(args.output))
    rank = f", r {adapter.header.lora.r}" if adapter.header.lora else ""
    print(f"{args.adapter} ({adapter.header.kind}{rank}) written to {args.output}")


if __name__ == "__main__":
    run_program(main)
