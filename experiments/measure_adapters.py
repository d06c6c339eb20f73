"""Print the tables of docs/checkpoints.md: `python -m experiments.measure_adapters`.

Random adapters on the shipped nano base; the largest difference of a logit, in fp32 on the CPU,
between this repository and PEFT or transformers.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import checkpoints
import convert_adapter
import loralib as lora
from checkpoints.export import complete
from common.errors import Parser, run
from model import GPT2LMModel

ROOT = Path(__file__).resolve().parents[1]

BASE = ROOT / "data" / "nano" / "model.safetensors"
IDS = torch.randint(2048, (4, 60), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "LoRA, q,v": {},
    "LoRA, all": {"targets": ("q", "k", "v", "o", "fc", "proj")},
    "LoRA, q,v,wte": {"targets": ("q", "v", "wte")},
    "LoRA, c_attn": {"targets": ("c_attn",)},
    "rsLoRA, q,v": {"rslora": True},
    "DoRA, q,v": {"kind": "dora"},
    "PiSSA, q,v": {"kind": "pissa"},
    "LoRA-FA, q,v": {"kind": "lora_fa"},
}
NATIVE: dict[str, dict[str, Any]] = {
    "c_attn": {},
    "c_attn,c_proj,c_fc": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "c_attn, rsLoRA": {"use_rslora": True},
    "c_attn, DoRA": {"use_dora": True},
}


@torch.no_grad()
def shaken(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "lora_" in name and not name.endswith("0"):
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)


@torch.no_grad()
def our_logits(adapter: Path, alpha: float | None = None) -> Tensor:
    model, _ = checkpoints.load(BASE, adapter, lora_alpha=alpha)
    return checkpoints.merge(model)(IDS)[0]


def hf_base(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.no_grad()
def peft_logits(base: Path, folder: Path) -> Tensor:
    return peft.PeftModel.from_pretrained(hf_base(base), folder).eval()(IDS).logits


def convert(source: Path, to: str, target: Path, *more: object) -> Path:
    argv = ["--adapter", source, "--init_checkpoint", BASE, "--to", to, "--output", target, *more]
    convert_adapter.main([str(part) for part in argv])
    return target


def difference(a: Tensor, b: Tensor) -> str:
    return f"{float((a - b).abs().max()):.1e}"


@torch.no_grad()
def our_adapter(folder: Path, settings: dict) -> tuple[Path, Tensor]:
    base = checkpoints.read_base(BASE)
    config = lora.LoraConfig(r=4, alpha=32, **settings)
    model = GPT2LMModel(checkpoints.model_config("gpt2.nano", base, lora=config))
    checkpoints.load_base(model, base)
    lora.start_from_base(model)
    tensors = lora.lora_state_dict(model)
    shaken(tensors)
    header = complete(None, model, base, "gpt2.nano")
    path = folder / "adapter.safetensors"
    checkpoints.save_adapter(path, tensors, header)
    return path, model.eval()(IDS)[0]


def exports(work: Path, base: Path) -> list[list[str]]:
    rows = []
    for name, settings in KINDS.items():
        adapter, expected = our_adapter(work, settings)
        with torch.no_grad():
            merged = hf_base(convert(adapter, "merged", work / "merged"))(IDS).logits
        folder = convert(adapter, "peft", work / "peft")
        there = difference(peft_logits(base, folder), expected)
        back = convert(folder, "safetensors", work / "back.safetensors")
        same = "equal bytes" if back.read_bytes() == adapter.read_bytes() else "another rank"
        row = [name, difference(our_logits(adapter), expected), there]
        row += [f"{difference(our_logits(back), expected)}, {same}", difference(merged, expected)]
        pt = "no place for it"
        if adapter_fits_pt(settings):
            file = convert(adapter, "pt", work / "a.pt")
            pt = difference(our_logits(file, 32), expected)
        rows.append([*row, pt])
    return rows


def adapter_fits_pt(settings: dict) -> bool:
    return settings in ({}, {"kind": "lora_fa"})


def imports(work: Path, base: Path) -> list[list[str]]:
    rows = []
    for name, settings in NATIVE.items():
        given: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True} | settings
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **given)
        model = peft.get_peft_model(hf_base(base), config).eval()
        shaken({n: p for n, p in model.named_parameters() if p.requires_grad})
        with torch.no_grad():
            expected = model(IDS).logits
        model.save_pretrained(str(work / "native"))
        merged = convert(work / "native", "merged", work / "merged")
        with torch.no_grad():
            whole = difference(hf_base(merged)(IDS).logits, expected)
        rows.append([name, difference(our_logits(work / "native"), expected), whole])
    return rows


def counts() -> list[list[str]]:
    rows = []
    for targets in ("q,v", "q,k,v", "c_attn", "o", "fc", "proj", "all", "q,v,wte"):
        row = [targets]
        for card in ("gpt2.sm", "gpt2.md", "gpt2.lg", "gpt2.xl"):
            names = checkpoints.parse_targets(targets)
            with torch.device("meta"):
                config = checkpoints.model_config(card, None, lora=lora.LoraConfig(targets=names))
                model = GPT2LMModel(config)
            row.append(f"{sum(t.numel() for t in lora.lora_state_dict(model).values()):,}")
        rows.append(row)
    return rows


def show(head: list[str], rows: list[list[str]]) -> None:
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    Parser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        work = Path(name)
        base = work / "base"  # a merged export of an adapter that adds nothing
        adapter, _ = our_adapter(work, {})
        header, tensors = checkpoints.read_adapter(adapter)
        assert header
        nothing = {key: torch.zeros_like(t) for key, t in tensors.items()}
        checkpoints.save_adapter(adapter, nothing, header)
        convert(adapter, "merged", base)
        tables = exports(work, base), imports(work, base)
    head = ["adapter trained here", "our file", "→ PEFT", "→ PEFT → here", "→ merged", "→ .pt"]
    show(head, tables[0])
    show(["adapter trained by PEFT, r 8", "→ here", "→ merged"], tables[1])
    show(["targets, r 4", "gpt2.sm", "gpt2.md", "gpt2.lg", "gpt2.xl"], counts())


if __name__ == "__main__":
    run(main)
