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
import io
import shutil
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import checkpoints
import loralib as lora
from checkpoints import AdapterHeader
from checkpoints import peft as peft_adapter
from common.errors import InputError, Parser
from common.errors import run as run_program
from common.files import replacing, write_json
from data_utils import END_OF_TEXT, load_tokenizer, vocabulary_files
from model import MODEL_CARDS, GPT2LMModel


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


def describe(
    args: argparse.Namespace,
    model: GPT2LMModel,
    header: AdapterHeader | None,
    base: dict[str, Tensor],
) -> AdapterHeader:
    """The adapter's header, completed with what the model and the base say."""
    known = header or AdapterHeader(
        lora=model.config.lora,
        base=checkpoints.Base(None),
        method="lora" if model.config.lora else "full",
    )
    if not known.model_card:
        card = args.model_card or checkpoints.card_of(model.state_dict())
        known = replace(known, model_card=card)
    if not known.base.fingerprint:
        name, print_ = Path(args.init_checkpoint).name, checkpoints.base_fingerprint(base)
        known = replace(known, base=checkpoints.Base(name, print_))
    return known


def adapter_tensors(args: argparse.Namespace, model: GPT2LMModel) -> dict[str, Tensor]:
    """What the adapter's file holds, in the model's names and ranks."""
    _, read = checkpoints.read_adapter(args.adapter)
    own = dict(model.named_parameters())
    names = {name for name in read if name in own} | lora.lora_state_dict(model).keys()
    return {name: own[name].detach() for name in sorted(names)}


def write_safetensors(args: argparse.Namespace, model: GPT2LMModel, header: AdapterHeader) -> None:
    checkpoints.save_adapter(args.output, adapter_tensors(args, model), header)


def write_pt(args: argparse.Namespace, model: GPT2LMModel, header: AdapterHeader) -> None:
    """The original's file: adapters of q and v by name, without their alpha."""
    tensors = adapter_tensors(args, model)
    if header.kind not in ("lora", "lora_fa") or header.lora.targets != ("q", "v"):
        targets = ",".join(model.config.targets) or "no layer"
        raise InputError(
            f"--to pt: the original code knows LoRA on q and v only, this is {header.kind} on "
            f"{targets}; give --to peft or --to merged"
        )
    rank, alpha = header.lora.r, header.lora.scaling * header.lora.r
    data = io.BytesIO()
    torch.save({"model_state_dict": tensors}, data)
    with replacing(args.output, "wb") as file:
        file.write(data.getbuffer())
    print(f"Decode it with --lora_dim {rank} --lora_alpha {alpha:g}: the file says neither")


def write_peft(args: argparse.Namespace, model: GPT2LMModel, header: AdapterHeader) -> None:
    if header.lora is None:
        raise InputError(f"--to peft: {header.kind} training has no adapter; give --to merged")
    biases = any(name.endswith("bias") for name in adapter_tensors(args, model))
    config, tensors, metadata = peft_adapter.write(model, header, biases)
    config_name, tensors_name = checkpoints.PEFT_FILES
    write_tensors(Path(args.output) / tensors_name, tensors, metadata)
    write_json(Path(args.output) / config_name, config)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    state = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    with replacing(path, "wb") as file:
        file.write(safetensors.torch.save(state, metadata))


def merged_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """The weights with every adapter summed into its layer, in fp32, under Hugging Face's names;
    the head only where an adapter of the embedding has parted the two."""
    state = {name: t.float() for name, t in model.state_dict().items() if "lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALayer) and layer.adapted:
            layer.merge()
            state[f"{name}.weight"] = layer.weight.float()
    if "wte" in model.config.targets:
        state["lm_head.weight"] = model.head_weight.float()
    return state


def write_merged(args: argparse.Namespace, model: GPT2LMModel, header: AdapterHeader) -> None:
    folder, config = Path(args.output), model.config
    end_of_text = None
    if args.vocab:
        tokenizer = load_tokenizer(args.vocab)
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        if tokenizer.get_vocab_size() != config.vocab_size:
            raise InputError(
                f"--vocab {args.vocab} has {tokenizer.get_vocab_size()} entries but the base "
                f"{config.vocab_size}; give the vocabulary of that base"
            )
    elif config.vocab_size == 50257:
        end_of_text = 50256
    state = merged_weights(model)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "activation_function": "gelu_new",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": "lm_head.weight" not in state,
        "dtype": "float32",
    }
    write_json(folder / "config.json", settings)
    if args.vocab:
        write_tokenizer(args.vocab, folder, config.n_positions)
    else:
        print(f"Without --vocab {folder} has no tokenizer files")


def write_tokenizer(vocab: str, folder: Path, window: int) -> None:
    """The vocabulary under transformers' names, and as one tokenizer.json."""
    for path, name in zip(vocabulary_files(vocab), ("vocab.json", "merges.txt"), strict=True):
        with path.open("rb") as source, replacing(folder / name, "wb") as target:
            shutil.copyfileobj(source, target)
    tokenizer = load_tokenizer(vocab)
    tokenizer.add_special_tokens([END_OF_TEXT])
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str())
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": window}
    write_json(folder / "tokenizer_config.json", settings | {"add_prefix_space": False} | special)


WRITERS = {
    "safetensors": write_safetensors,
    "pt": write_pt,
    "peft": write_peft,
    "merged": write_merged,
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with the given or the command line's arguments."""
    args = build_parser().parse_args(argv)
    base = checkpoints.read_base(args.init_checkpoint)
    model, header = checkpoints.load_with_adapter(args, base)
    header = describe(args, model, header, base)
    WRITERS[args.to](args, model.eval(), header)
    rank = f", r {header.lora.r}" if header.lora else ""
    print(f"{args.adapter} ({header.kind}{rank}) written to {args.output}")


if __name__ == "__main__":
    run_program(main)
