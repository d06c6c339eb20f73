"""What TensorBoard shows of a run beside its records: its settings with its best loss, how far each
layer has moved, and what the model writes for a few validation rows.

Watching draws no random number and changes no tensor of the run.
"""

import math
from itertools import islice

import torch
from torch import Tensor, nn

import gpu
import loralib as lora
from beam_search import SearchSettings, beam_search
from data_utils import Row
from run_state import Run

SAMPLE_TOKENS, SAMPLE_REFERENCES = 64, 3

# The settings that runs are compared by; run.json has all.
SHOWN_SETTINGS = (
    "model_card", "lora_dim", "lora_alpha", "lora_targets", "lora_dropout", "use_rslora",
    "lora_plus_ratio", "lr", "scheduler", "warmup_step", "weight_decay", "label_smooth",
    "global_batch", "max_step", "random_seed", "trained_parameters",
)  # fmt: skip


def show_settings(run: Run) -> None:
    """Put the settings of a run on the page of hyper-parameters, beside its best validation loss,
    or the last training loss where nothing is validated."""
    own = {name: getattr(run.args, name) for name in SHOWN_SETTINGS} | {"kind": run.header["kind"]}
    run.log.show_settings(own, "valid/best_loss" if run.valid else "train/loss")


def show_validation(run: Run) -> None:
    """Show, on rank 0, the best loss, the norms of the updates and the samples at `run.step`."""
    if run.args.rank:
        return
    norms = update_norms(gpu.unwrap(run.model))
    numbers = {f"update_norm/{name}": norm for name, norm in norms.items()}
    run.log.show(run.step, numbers | {"valid/best_loss": run.best_loss}, sample_texts(run))


def update_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norm of what each adapted layer adds to its W0, by the layer's name."""
    return {
        name.removeprefix("transformer."): update_norm(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, lora.LoRALayer) and layer.adapted
    }


@torch.no_grad()
def update_norm(layer: lora.LoRALayer) -> float:
    """‖ΔW‖, Frobenius, of one layer, in float64, without making ΔW.

    Row i of s·BA, for row b of B, has the squared norm s² b (AAᵀ) bᵀ; over all rows that is
    s² Σ (BᵀB) ∘ (AAᵀ). PiSSA's ΔW = s (BA - B₀A₀) is one product of rank 2r, written so that
    nothing cancels: [B - B₀, B₀] [A; A - A₀].
    """
    a, b = layer.lora_A.double(), layer.lora_B.double()
    parts = list(zip(a.split(layer.lora_B.size(1)), b.chunk(len(a) // b.size(1)), strict=True))
    if layer.kind == "pissa":
        a0, b0 = layer.lora_A0.double(), layer.lora_B0.double()
        starts = zip(a0.split(layer.r), b0.chunk(len(parts)), strict=True)
        parts = [
            (torch.cat((a_i, a_i - a0_i)), torch.cat((b_i - b0_i, b0_i), dim=1))
            for (a_i, b_i), (a0_i, b0_i) in zip(parts, starts, strict=True)
        ]
    squares = [layer.scaling**2 * ((b_i @ (a_i @ a_i.T)) * b_i).sum(dim=1) for a_i, b_i in parts]
    if layer.kind == "dora":
        squares = _stretched(layer, parts, squares)
    return math.sqrt(sum(float(rows.sum()) for rows in squares))


def _stretched(
    layer: lora.Linear, parts: list[tuple[Tensor, Tensor]], updates: list[Tensor]
) -> list[Tensor]:
    """Squared norms of DoRA's rows: ΔW's row is (g - 1) w + g u, with w the row of W0, u that of
    s·BA, of squared norm `updates`, and g = magnitude / ‖w + u‖."""
    weight = layer.base_weight.T if layer.fan_in_fan_out else layer.base_weight
    enabled = zip(layer.enable_lora, weight.double().split(layer.part), strict=True)
    adapted = [rows for is_enabled, rows in enabled if is_enabled]
    magnitudes = layer.lora_magnitude.double().split(layer.part)
    squares = []
    for rows, (a, b), u, magnitude in zip(adapted, parts, updates, magnitudes, strict=True):
        w, wu = rows.square().sum(dim=1), layer.scaling * ((rows @ a.T) * b).sum(dim=1)
        g = magnitude / (w + 2 * wu + u).sqrt()
        squares.append((g - 1) ** 2 * w + 2 * g * (g - 1) * wu + g**2 * u)
    return squares


def sample_texts(run: Run) -> dict[str, str]:
    """What the model writes, greedily, for the first `--valid_samples` distinct contexts of the
    validation rows, each with its context and some of its references, in Markdown."""
    references: dict[tuple[int, ...], list[Row]] = {}
    for row in run.valid.rows:
        references.setdefault(tuple(row.context.tolist()), []).append(row)
    chosen = dict(islice(references.items(), run.args.valid_samples))
    ends = {int(row.completion[-1]) for rows in chosen.values() for row in rows}
    outputs = greedy(run, list(chosen), ends)
    texts = {}
    for number, (context, output) in enumerate(zip(chosen, outputs, strict=True), start=1):
        lines = [("context", context), ("output", output)]
        lines += [
            ("reference", row.completion.tolist()) for row in chosen[context][:SAMPLE_REFERENCES]
        ]
        shown = (f"- **{name}** ``` {_words(run, ids, ends)} ```" for name, ids in lines)
        texts[f"samples/{number}"] = "\n".join(shown)
    return texts


def greedy(run: Run, contexts: list[tuple[int, ...]], ends: set[int]) -> list[list[int]]:
    """The token ids that the model writes behind each context, up to one of `ends`; none where its
    logits are not finite."""
    room = min(SAMPLE_TOKENS, run.args.seq_len // 2)
    settings = SearchSettings(
        beam=1, no_repeat_ngram_size=0, eval_len=room, end_ids=tuple(sorted(ends))
    )
    width, device = run.args.seq_len - room, run.args.device
    prompts = [torch.tensor(context[-width:], device=device) for context in contexts]
    model = gpu.unwrap(run.model).eval()
    try:
        with gpu.autocast(run.args):
            return [found[0].tokens for found in beam_search(model, prompts, settings)]
    except ValueError:
        return [[] for _ in contexts]
    finally:
        model.train()


def _words(run: Run, ids: list[int] | tuple[int, ...], ends: set[int]) -> str:
    """Ids without a last one that ends them, as text in one line, or as they are."""
    ids = list(ids[:-1] if ids and ids[-1] in ends else ids)
    if run.tokenizer is None:
        return " ".join(map(str, ids))
    return run.tokenizer.decode(ids, skip_special_tokens=False).strip().replace("\n", "⏎")
