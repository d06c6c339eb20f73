"""Compute tests/oracles/ anew with a checkout of the original code:

    LORA_ORIGINAL=LoRA/examples/NLG/src python -m tests.oracles.make FOLDER

The checkout's own modules train and decode, unmodified; this script only gives them the shipped
base, sample and starting adapter, and writes down what they compute.
"""

import argparse
import importlib
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 50


def original(name: str) -> ModuleType:
    """A module of the checkout that `LORA_ORIGINAL` names."""
    return importlib.import_module(name)


def prefer_the_checkout() -> None:
    """Let `import model` and the like find the checkout's modules, not this repository's."""
    folder = os.environ.get("LORA_ORIGINAL", "")
    if not folder or not (Path(folder) / "gpt2_beam.py").is_file():
        sys.exit(
            "error: set LORA_ORIGINAL to the folder examples/NLG/src of a microsoft/LoRA checkout"
        )
    sys.path[:] = [str(Path(folder).resolve())] + [
        path for path in sys.path if Path(path or ".").resolve() != ROOT
    ]


def encode_sample(folder: Path) -> Path:
    """The sample's training rows as the original's data sets hold them: JSONL of token ids."""
    vocabulary = json.loads((ROOT / "data/nano/vocab.json").read_text(encoding="utf-8"))
    merges = (ROOT / "data/nano/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = Tokenizer(BPE(vocabulary, [tuple(line.split()) for line in merges]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    end = [vocabulary["<|endoftext|>"]]
    encoded = folder / "train.jsonl"
    with encoded.open("w", encoding="utf-8") as file:
        for line in (ROOT / "data/sample/train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            context = tokenizer.encode(row["context"]).ids + end
            completion = tokenizer.encode(" " + row["completion"]).ids + end
            file.write(json.dumps({"context": context, "completion": completion}) + "\n")
    return encoded


def build_model(settings: dict, adapter: dict[str, Tensor]) -> nn.Module:
    """The original's GPT-2 with the shipped base and an adapter, in fp32."""
    base = load_file(ROOT / settings["base"])
    lora = settings["lora"]
    theirs = original("model")
    config = theirs.GPT2Config(
        settings["vocab"],
        n_positions=base["wpe.weight"].size(0),
        n_ctx=base["wpe.weight"].size(0),
        n_embd=settings["n_embd"],
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        lora_attn_dim=lora["r"],
        lora_attn_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
    )
    model = theirs.GPT2LMModel(config)
    model.load_weight({name: tensor.float() for name, tensor in base.items()})
    missing = set(adapter) - set(model.state_dict())
    if missing:
        sys.exit(f"error: the checkout's model has no tensor {min(missing)}")
    model.load_state_dict(adapter, strict=False)
    return model


def adapter_at(moment: str, file: Path) -> dict[str, Tensor]:
    tensors = load_file(file)
    return {
        name.removeprefix(moment): tensor
        for name, tensor in tensors.items()
        if name.startswith(moment)
    }


def train(settings: dict, folder: Path, encoded: Path) -> None:
    """Take 50 of the original's training steps; write train.json and adapter.safetensors."""
    start = adapter_at("init.", HERE / "adapter.safetensors")
    model = build_model(settings, start)
    original("loralib").mark_only_lora_as_trainable(model)
    given = dict(settings["optimizer"])
    given["adam_epislon"] = given.pop("adam_epsilon")  # the original's spelling
    args = argparse.Namespace(**given)
    optimizers = original("optimizer")
    optimizer = optimizers.create_adam_optimizer_from_args(model, args)
    scheduler = optimizers.create_optimizer_scheduler(optimizer, args)
    data = original("data_utils").FT_Dataset(
        str(encoded), settings["batch"], settings["seq_len"], joint_lm=False
    )
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=110)
    sampler.set_epoch(1)
    loader = DataLoader(data, batch_size=settings["batch"], sampler=sampler)
    record: dict[str, list] = {"ids": [], "losses": [], "grad_norms": [], "mask_sums": []}
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        _, loss = model(
            batch["input"],
            lm_labels=batch["target"],
            lm_mask=batch["mask"],
            label_smooth=settings["label_smooth"],
        )
        loss = loss.mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        record["ids"].append(batch["id"].tolist())
        record["losses"].append(loss.item())
        record["grad_norms"].append(nn.utils.get_total_norm(gradients).item())
        record["mask_sums"].append(batch["mask"].sum().item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    final = {name: model.state_dict()[name] for name in start}
    both = {f"init.{name}": tensor for name, tensor in start.items()}
    both |= {f"final.{name}": tensor.contiguous() for name, tensor in final.items()}
    save_file(both, folder / "adapter.safetensors")
    write_json(folder / "train.json", settings | record | {"torch": torch.__version__}, ["ids"])


def decode(settings: dict, decodes: dict, folder: Path) -> None:
    """Run the original's beam search on the contexts of decode.json; write what it finds."""
    model = build_model(settings, adapter_at("final.", folder / "adapter.safetensors"))
    beam = original("gpt2_beam")
    for chosen in decodes["sets"]:
        contexts = [context for context, _ in chosen["texts"]]
        outputs = search(beam, model, contexts, chosen["settings"], settings["seq_len"])
        chosen["texts"] = [list(pair) for pair in zip(contexts, outputs, strict=True)]
    write_json(folder / "decode.json", decodes, ["sets"])


def search(
    beam: ModuleType, model: nn.Module, contexts: list[list[int]], chosen: dict, seq_len: int
) -> list[list[int]]:
    """The original's output for each context, searched one at a time, cut after its end token."""
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(json.dumps({"context": c, "completion": []}) + "\n" for c in contexts)
        (Path(folder) / "data.jsonl").write_text(rows, encoding="utf-8")
        args = argparse.Namespace(
            **chosen, device=torch.device("cpu"), rank=0, world_size=1, work_dir=folder,
            output_file="predictions.jsonl",
        )  # fmt: skip
        beam.args = args  # the original reads its arguments as a global, too
        data = beam.FT_Dataset(f"{folder}/data.jsonl", 1, seq_len, args.eval_len)
        beam.beam(model, DataLoader(data, batch_size=1), args)
        lines = (Path(folder) / args.output_file).read_text(encoding="utf-8").splitlines()
    found = {row["id"]: row["predict"] for row in map(json.loads, lines)}
    return [cut(found[number], chosen["eos_token_id"]) for number in range(len(contexts))]


def cut(tokens: list[int], end_ids: list[int]) -> list[int]:
    """A sequence up to its first end token, which it keeps."""
    ends = [place for place, token in enumerate(tokens) if token in end_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def write_json(path: Path, content: dict, by_line: list[str]) -> None:
    """Write JSON with a line for each entry, and for each element of the entries in `by_line`."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if key in by_line:
            text = "[\n" + ",\n".join(f"  {json.dumps(element)}" for element in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def join_a_group_of_one() -> None:
    """The original gathers its outputs over a process group, even those of a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, world_size=1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the three files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    prefer_the_checkout()
    torch.set_num_threads(1)
    recorded = json.loads((HERE / "train.json").read_text(encoding="utf-8"))
    computed = ("ids", "losses", "grad_norms", "mask_sums", "torch")
    settings = {key: value for key, value in recorded.items() if key not in computed}
    decodes = json.loads((HERE / "decode.json").read_text(encoding="utf-8"))
    join_a_group_of_one()
    with tempfile.TemporaryDirectory() as temporary:
        train(settings, folder, encode_sample(Path(temporary)))
    decode(settings, decodes, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
