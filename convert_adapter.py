"""Convert an adapter of GPT-2 into another format.

    python convert_adapter.py --adapter runs/e2e --to peft --output e2e-peft
                                                      a folder for PEFT and what builds on it
    python convert_adapter.py --adapter runs/e2e --to merged --output e2e-merged
                                                      GPT2LMHeadModel.from_pretrained loads it
    python convert_adapter.py --adapter e2e-peft --init_checkpoint gpt2-medium \\
        --to safetensors --output e2e.safetensors     this repository's own format
    python convert_adapter.py --adapter runs/e2e --to pt --output e2e.pt
                                                      the original code's format
    python convert_adapter.py --adapter gpt2_md_lora_e2e.pt --lora_alpha 32 \\
        --init_checkpoint gpt2-medium --to peft --output e2e-peft

    python convert_adapter.py --average runs/a runs/b runs/c --to safetensors \\
        --output mean.safetensors                     the mean of several adapters
    python convert_adapter.py ... --to peft --push_to_hub OWNER/NAME    onto the hub, with its card

Reads all of these: a work_dir, a .safetensors file made here, a .pt file of the original code or
of the package loralib (neither says its alpha), a PEFT folder. Base and vocabulary are those of the
run, of which a file elsewhere knows nothing. What an adapter computes with its
base stays the same; merged weights are summed in fp32. Files hold tensors only: nothing is
unpickled that could run.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import checkpoints
from checkpoints import FoundAdapter, card, hub
from checkpoints.base import weight_files
from checkpoints.export import WRITERS, load_average, load_for_export, write_card
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import check_output, check_output_folder
from model import MODEL_CARDS


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", help="adapter file, a run's work_dir, or a PEFT folder")
    source.add_argument("--average", nargs="+", metavar="ADAPTER", help="write the mean of these")
    add("--init_checkpoint", help="the adapter's base: name, file or folder (default: the run's)")
    add("--to", required=True, choices=sorted(WRITERS), help="the format to write")
    add("--output", required=True, help="file (safetensors, pt) or folder (peft, merged) to write")
    add(
        "--vocab",
        help="its vocabulary, for the tokenizer files of --to merged (default: the run's)",
    )
    add("--model_card", help=f"{', '.join(MODEL_CARDS)} (default: the adapter's, or the base's)")
    add("--lora_dim", type=int, help="default: the adapter's")
    add("--lora_alpha", type=float, help="default: the adapter's; .pt files do not say it")
    add(
        "--base_name",
        help="the base as PEFT finds it (default: its name on the hub, or path)",
    )
    add("--scores", help="result of eval.evaluate --json, for the model card")
    add("--push_to_hub", metavar="OWNER/NAME", help="upload the export and its card there")
    add("--private", action="store_true", help="make the repository on the hub a private one")
    add("--allow_other_base", action="store_true", help="than the adapter was trained on")
    return parser


def choose_base(
    args: argparse.Namespace, adapters: Iterable[FoundAdapter]
) -> tuple[str, str | None]:
    """Return base and vocabulary: those given, or those of the first adapter's run."""
    run = checkpoints.run_paths(adapters)
    base = args.init_checkpoint or run.get("init_checkpoint")
    if not base:
        raise InputError("--init_checkpoint is missing: an adapter means nothing without its base")
    return base, args.vocab or run.get("vocab")


def check_paths(
    args: argparse.Namespace, adapters: list[Path], base: str, vocab: str | None
) -> None:
    """Refuse an output that would replace what is read."""
    inputs: dict[str, str | Path | None] = {f"--adapter {path}": path for path in adapters}
    inputs |= {f"--init_checkpoint {path}": path for path in weight_files(base)}
    inputs |= {"--vocab": vocab, "--scores": args.scores}
    check = check_output if args.to in ("safetensors", "pt") else check_output_folder
    check("--output", Path(args.output), inputs)


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    args = build_parser().parse_args(argv)
    if args.push_to_hub:
        hub.check_push(args.push_to_hub)
    names = args.average or [args.adapter]
    found = {name: checkpoints.find_adapter(name) for name in names}
    init_checkpoint, vocab = choose_base(args, found.values())
    check_paths(args, [place.path for place in found.values()], init_checkpoint, vocab)
    for place in found.values():
        print(f"Adapter {place.path}: {place.reason}")
    origin = card.Origin()
    if args.adapter:
        origin = card.read_origin(found[args.adapter].path, args.scores)
    base = checkpoints.read_base(init_checkpoint)
    if args.average:
        adapter = load_average(base, args.average, vocab)
    else:
        adapter = load_for_export(
            base,
            str(found[args.adapter].path),
            vocab,
            allow_other_base=args.allow_other_base,
            lora_dim=args.lora_dim,
            lora_alpha=args.lora_alpha,
            model_card=args.model_card,
        )
    output = Path(args.output)
    written = WRITERS[args.to](replace(adapter, base_name=args.base_name), output)
    name = args.push_to_hub or output.name
    text = card.model_card(adapter.header, args.to, name, origin, args.base_name)
    card_path = write_card(output, text)
    rank = f", r {adapter.header.lora.r}" if adapter.header.lora else ""
    source = args.adapter or f"The mean of {len(args.average)} adapters"
    print(f"{source} ({adapter.header.kind}{rank}) written to {output}; model card: {card_path}")
    if args.push_to_hub:
        files = {path.name: path for path in written} | {"README.md": card_path}
        print(f"Pushed to {hub.push(files, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    run_program(main)
