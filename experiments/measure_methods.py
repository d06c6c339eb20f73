"""Print the parity table of docs/methods.md: `python -m experiments.measure_methods`.

Each method against transformers' GPT-2: a bottleneck is added to it by forward hooks, written here
in plain matrices; a prefix is PEFT's; of a subset the same parameters are trained. Both start from
the shipped nano base, see the same batches, and take steps of torch.optim.AdamW, in fp32 on the
CPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import loralib as lora
from common.errors import Parser, run
from data_utils import FT_Dataset, Item, load_tokenizer
from methods import Bottleneck, BottleneckConfig, PrefixConfig, train_added, train_only
from model import GPT2Config, GPT2LMModel

ROOT = Path(__file__).resolve().parents[1]
BASE, SAMPLE = ROOT / "data/nano/model.safetensors", ROOT / "data/sample/train.jsonl"
RATE = 1e-4
PaddedBatch = tuple[Tensor, Tensor, Tensor]  # ids (B, T), the tokens that follow, and the mask
METHODS: dict[str, Callable[[GPT2LMModel], object]] = {
    "adapter_l": train_added,
    "adapter_h": train_added,
    "prefix": train_added,
    "full": lambda model: None,
    "top2": lambda model: train_only(model, *model.transformer.h[-2:], model.transformer.ln_f),
    "bitfit": lambda model: lora.mark_only_lora_as_trainable(model, "all"),
}


class Reference(nn.Module):
    """A bottleneck in plain matrices, with the values of one of ours."""

    def __init__(self, own: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.tensors = nn.ParameterDict(
            {name.replace(".", "_"): t.detach().clone() for name, t in own.named_parameters()}
        )

    def forward(self, x: Tensor) -> Tensor:
        t, inner = self.tensors, x
        if "ln_weight" in t:
            centred = x - x.mean(-1, keepdim=True)
            normal = centred / (centred.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
            inner = normal * t["ln_weight"] + t["ln_bias"]
        down = inner @ t["down_weight"].T + t["down_bias"]
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (down + 0.044715 * down**3))
        bent = down.clamp(min=0) if "ln_weight" in t else 0.5 * down * (1 + tanh)
        return x + bent @ t["up_weight"].T + t["up_bias"]


def adding(reference: Reference) -> Callable[..., Any]:
    """A forward hook that puts the reference after a module of transformers' GPT-2."""

    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return reference(output[0]), *output[1:]
        return reference(output)

    return hook


def peer(config: GPT2Config) -> nn.Module:
    """Transformers' GPT-2 of the same shape, without dropout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.n_positions, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip


def pair(
    method: str, base: Mapping[str, Tensor], config: GPT2Config, seed: int = 0
) -> tuple[GPT2LMModel, nn.Module, dict[str, nn.Parameter]]:
    """Our model, transformers', and the trained parameters of these by our names. Bottlenecks are
    moved away from where they start, by random numbers of the seed."""
    ours = GPT2LMModel(config)
    checkpoints.load_weights(ours, base)
    METHODS[method](ours)
    theirs = peer(config)
    theirs.load_state_dict(dict(base), strict=False)
    theirs.requires_grad_(False)
    if config.prefix:
        return ours, *with_prefix(theirs, ours, config.prefix)
    known, found = dict(theirs.named_parameters()), {}
    generator = torch.Generator().manual_seed(seed)
    for path, module in ours.named_modules():
        if isinstance(module, Bottleneck):
            with torch.no_grad():
                for tensor in module.parameters():
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            reference = Reference(module, config.layer_norm_epsilon)
            block, place = path.removesuffix("_adapter").rsplit(".", 1)
            sublayer = block if place == "block" else f"{block}.{place}"
            theirs.get_submodule(sublayer).register_forward_hook(adding(reference))
            for name, parameter in reference.tensors.items():
                found[f"{path}.{name.replace('_', '.')}"] = parameter
    for name, own in ours.named_parameters():
        if own.requires_grad and name not in found:
            found[name] = known[name].requires_grad_()
    return ours, theirs, found


def with_prefix(
    theirs: nn.Module, ours: GPT2LMModel, config: PrefixConfig
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Transformers' model with PEFT's prefix, whose generator starts where ours does, and its
    parameters by our names."""
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=config.length, prefix_projection=True,
        encoder_hidden_size=config.hidden,
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, settings)
    encoder: Any = theirs.prompt_encoder["default"]
    parameters = {"embedding": encoder.embedding.weight}
    parameters |= {f"generator.{name}": p for name, p in encoder.transform.named_parameters()}
    found = {f"transformer.prefix.{name}": parameter for name, parameter in parameters.items()}
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(own[name])
    return theirs.eval(), found


def padded(items: Sequence[Item]) -> PaddedBatch:
    """Rows of a data set, filled up on the right."""
    columns = zip(*((item["input"], item["target"], item["mask"]) for item in items), strict=True)
    filled = (pad_sequence([*map(torch.from_numpy, rows)], batch_first=True) for rows in columns)
    ids, targets, mask = filled
    return ids, targets, mask


def their_loss(theirs: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The mean over what the mask counts; padding is on the right, where no position sees it."""
    losses = F.cross_entropy(theirs(ids).logits.transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum() / mask.sum()


def differences(
    method: str, base: Mapping[str, Tensor], config: GPT2Config, batches: Sequence[PaddedBatch]
) -> dict[str, float]:
    """The largest difference of a logit, of a number in a gradient, and of the losses of as many
    steps as there are batches."""
    ours, theirs, parameters = pair(method, base, config)
    own = dict(ours.named_parameters())
    ids, _, mask = batches[0]
    with torch.no_grad():
        logits = (ours(ids)[0] - theirs(ids).logits)[mask > 0].abs().max()
    groups = [[own[name] for name in parameters], [*parameters.values()]]
    optimizers = [torch.optim.AdamW(group, lr=RATE) for group in groups]
    ours.train()
    gradient = worst = 0.0
    for step, given in enumerate(batches):
        losses: list[Tensor] = [ours(*given)[1], their_loss(theirs, *given)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            grads = [
                torch.cat([p.grad.flatten() for p in group if p.grad is not None])
                for group in groups
            ]
            gradient = float((grads[0] - grads[1]).abs().max())
        for optimizer in optimizers:
            optimizer.step()
        worst = max(worst, abs(losses[0].item() - losses[1].item()))
    return {"logits": float(logits), "gradients": gradient, "losses": worst}


def main() -> None:
    Parser(description=__doc__).parse_args()
    base, tokenizer = checkpoints.read_base(BASE), load_tokenizer(BASE.parent)
    rows = FT_Dataset(SAMPLE, 128, tokenizer=tokenizer, vocab_size=base.vocab_size)
    batches = [padded([rows[4 * step + i] for i in range(4)]) for step in range(20)]
    print("| method | logits | gradients | losses of 20 steps |\n|---|---|---|---|")
    for method in METHODS:
        kind: dict[str, Any] = {}
        if "adapter" in method:
            kind = {"bottleneck": BottleneckConfig(8, method)}
        elif method == "prefix":
            kind = {"prefix": PrefixConfig(5, 512)}
        config = checkpoints.model_config(None, base, **kind)
        found = differences(method, base.tensors, config, batches)
        print(f"| {method} | {' | '.join(f'{value:.1e}' for value in found.values())} |")


if __name__ == "__main__":
    run(main)
