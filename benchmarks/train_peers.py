"""The peers of benchmarks/train.py: each takes steps on given rows and says losses and seconds.

All train the same adapter on the same base: q and v of c_attn, rank r each.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import gpt2_ft
import gpu
from benchmarks import common
from data_utils import FT_Dataset
from model import GPT2LMModel
from training.run import Run
from training.setup import prepare

Work = Callable[[list[list[int]]], dict]
PADDED = 512  # the original's sequences


def timed(step: Callable[[list[int]], float]) -> Work:
    """A peer that takes one step on each list of row numbers."""

    def work(batches: list[list[int]]) -> dict:
        losses, seconds = [], []
        for rows in batches:
            started = perf_counter()
            losses.append(step(rows))
            seconds.append(perf_counter() - started)
        return {"losses": losses, "seconds": seconds}

    return work


def start_run(folder: Path, **flags: object) -> Run:
    """A run of gpt2_ft.py on the CPU, with these of its flags, ready for its first step."""
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    args = gpt2_ft.parse_args([*argv, "--device", "cpu"])
    return prepare(args, gpu.parse_gpu(args), folder, None)


def ours(settings: dict) -> Work:
    """This repository's own training step, with its data, clipping test and schedule."""
    run = start_run(
        Path(settings["adapter"]).parent,
        train_data=settings["data"],
        init_checkpoint=settings["base"],
        model_card=settings["card"],
        lora_dim=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        train_batch_size=settings["batch"],
        label_smooth=settings["label_smooth"],
        lr=settings["lr"],
        optimizer="torch",
        scheduler="constant",
        warmup_step=0,
        max_step=10**6,
    )
    model = cast(GPT2LMModel, run.model)  # in one process nothing wraps it
    checkpoints.apply_trained(model, load_file(settings["adapter"]), "adapter")
    return timed(lambda rows: gpt2_ft.optimizer_step(run, [rows]).smoothed_loss)


def peft(attention: str, select: bool = False) -> Callable[[dict], Work]:
    """transformers + peft, each batch padded to its longest row. The loss as their users write it,
    with the label -100 where nothing counts; or of selected logits, which is faster."""

    def make(settings: dict) -> Work:
        model = adapted(settings, attention)
        smoothing = settings["label_smooth"]

        def loss(ids: Tensor, labels: Tensor, mask: Tensor, real: Tensor) -> Tensor:
            counted = mask > 0
            logits = model(input_ids=ids, attention_mask=real).logits
            if select:
                return F.cross_entropy(logits[counted], labels[counted], label_smoothing=smoothing)
            targets = labels.where(counted, -100).flatten()
            return F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=smoothing)

        return timed(plain_step(settings, model, loss))

    return make


def adapted(settings: dict, attention: str) -> nn.Module:
    """transformers' GPT-2 with peft's adapter, both of the settings' files."""
    import transformers
    from peft import LoraConfig, get_peft_model

    own = {
        "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False,
        "attn_implementation": attention,
    }  # fmt: skip
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings["shape"] | own))
    base.load_state_dict(load_file(settings["base"]), strict=False)
    config = LoraConfig(
        r=2 * settings["rank"],
        lora_alpha=2 * settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    model = get_peft_model(base, config).train()
    copy_adapter(model, settings)
    return model


def copy_adapter(model: nn.Module, settings: dict) -> None:
    """Make peft's adapter of c_attn the one of q and v: rank 2r, A stacked, B in two blocks, whose
    surroundings stay zero because their gradient is."""
    rank, width = settings["rank"], settings["shape"]["n_embd"]
    block = torch.zeros(3 * width, 2 * rank)
    block[:width, :rank] = block[2 * width :, rank:] = 1
    start = load_file(settings["adapter"])
    transformer = cast(Any, model).base_model.model.transformer
    for i, layer in enumerate(transformer.h):
        name = f"transformer.h.{i}.attn.c_attn.lora_"
        a, b = (
            layer.attn.c_attn.lora_A["default"].weight,
            layer.attn.c_attn.lora_B["default"].weight,
        )
        with torch.no_grad():
            a.copy_(start[name + "A"])
            b.zero_()
            b[:width, :rank], b[2 * width :, rank:] = start[name + "B"].split(width)
        b.register_hook(lambda gradient: gradient * block)


def original(settings: dict) -> Work:
    """The original's model, padded to 512; `LORA_ORIGINAL` names its folder examples/NLG/src."""
    sys.path = [path for path in sys.path if path not in (str(common.ROOT), "")]
    for name in [key for key in sys.modules if key == "model" or key.startswith("loralib")]:
        del sys.modules[name]
    sys.path.insert(0, os.environ["LORA_ORIGINAL"])
    theirs, lora = importlib.import_module("model"), importlib.import_module("loralib")
    shape = {key: value for key, value in settings["shape"].items() if key != "vocab_size"}
    config = theirs.GPT2Config(
        **shape,
        lora_attn_dim=settings["rank"],
        lora_attn_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
    )
    model = theirs.GPT2LMModel(config)
    model.load_state_dict(
        load_file(settings["base"]) | load_file(settings["adapter"]), strict=False
    )
    model.set_tied()
    lora.mark_only_lora_as_trainable(model)

    def loss(ids: Tensor, labels: Tensor, mask: Tensor, _real: Tensor) -> Tensor:
        room = (0, PADDED - ids.size(1))
        ids, labels, mask = (F.pad(tensor, room) for tensor in (ids, labels, mask))
        smoothing = settings["label_smooth"]
        return model(ids, lm_labels=labels, lm_mask=mask, label_smooth=smoothing)[1]

    return timed(plain_step(settings, model.train(), loss))


def padded(data: FT_Dataset, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels, what counts and what is no padding of the rows, (B, T) each, T up to the last
    position that counts in any of them."""
    items = [data[row] for row in rows]
    width = max(int(item["mask"].nonzero()[0][-1]) + 1 for item in items)
    ids, labels, mask = (
        pad_sequence([torch.from_numpy(array[:width]) for array in arrays], batch_first=True)
        for arrays in zip(*(item.values() for item in items), strict=True)
    )
    ends = torch.tensor([len(item["input"]) for item in items])
    return ids, labels, mask, (torch.arange(width) < ends[:, None]).long()


def plain_step(
    settings: dict, model: nn.Module, loss_of: Callable[..., Tensor]
) -> Callable[[list[int]], float]:
    """A step as a user writes it."""
    data = FT_Dataset(settings["data"], PADDED)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], eps=1e-6, weight_decay=0.01)

    def step(rows: list[int]) -> float:
        loss = loss_of(*padded(data, rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    common.serve(
        {
            "ours": ours,
            "peft-sdpa": peft("sdpa"),
            "peft-eager": peft("eager"),
            "peft-select": peft("sdpa", select=True),
            "original": original,
            "gemm": common.gemm,
        }
    )
