"""What TensorBoard shows of a run beside its records: its settings with its best loss, how far each
layer has moved, and what the model writes for a few validation rows.

Watching draws no random number and changes no tensor of the run.
"""

from collections.abc import Sequence
from itertools import islice
from typing import cast

import torch
from torch import nn

import gpu
import loralib as lora
from data_utils import Row
from decoding.beam_search import SearchSettings, beam_search
from eval.choice import LOSS
from model import GPT2LMModel
from training.log import BEST_LOSS, BEST_SCORE, TAGS, UPDATE_NORM
from training.run import Run

SAMPLE_TOKENS, SAMPLE_REFERENCES = 64, 3

# The settings that runs are compared by; run.json has all.
SHOWN_SETTINGS = (
    "model_card", "lora_dim", "lora_alpha", "lora_targets", "lora_dropout", "use_rslora",
    "lora_plus_ratio", "lr", "scheduler", "warmup_step", "weight_decay", "label_smooth",
    "global_batch", "max_step", "random_seed", "trained_parameters",
)  # fmt: skip
SIZES = ("adapter_dim", "prefix_length")  # of the methods that have one


def show_settings(run: Run) -> None:
    """Put the settings of a run on the page of hyper-parameters, beside its best validation by the
    metric that decides, or the last training loss where nothing is validated."""
    own = {name: run.flags[name] for name in SHOWN_SETTINGS} | {"kind": run.header.kind}
    own |= {name: run.flags[name] for name in SIZES if run.flags[name]}
    best = BEST_LOSS if run.scoring.decider == LOSS else BEST_SCORE
    run.log.show_settings(own, best if run.valid else TAGS["loss"])


def show_validation(run: Run) -> None:
    """Show, on rank 0, the loss of the best validation and its score, where that decides, the norms
    of the updates and the samples at `run.step`."""
    if run.runtime.rank:
        return
    norms = update_norms(gpu.unwrap(run.model))
    numbers = {f"{UPDATE_NORM}/{name}": norm for name, norm in norms.items()}
    numbers[BEST_LOSS] = run.best_loss
    if run.scoring.decider != LOSS and run.best_value is not None:
        numbers[BEST_SCORE] = run.best_value
    run.log.show(run.step, numbers, sample_texts(run))


def update_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norm of what each adapted layer adds to its W0, by the layer's name."""
    return {
        name.removeprefix("transformer."): layer.update_norm()
        for name, layer in model.named_modules()
        if isinstance(layer, lora.LoRALayer) and layer.adapted
    }


def sample_texts(run: Run) -> dict[str, str]:
    """What the model writes, greedily, for the first `--valid_samples` distinct contexts of the
    validation rows, each with its context and some of its references, in Markdown."""
    assert run.valid
    references: dict[tuple[int, ...], list[Row]] = {}
    for row in run.valid.rows:
        references.setdefault(tuple(row.context.tolist()), []).append(row)
    chosen = dict(islice(references.items(), run.settings.valid_samples))
    ends = {int(row.completion[-1]) for rows in chosen.values() for row in rows}
    outputs = greedy(run, list(chosen), ends)
    texts = {}
    for number, (context, output) in enumerate(zip(chosen, outputs, strict=True), start=1):
        lines: list[tuple[str, Sequence[int]]] = [("context", context), ("output", output)]
        lines += [
            ("reference", row.completion.tolist()) for row in chosen[context][:SAMPLE_REFERENCES]
        ]
        shown = (f"- **{name}** ``` {_words(run, ids, ends)} ```" for name, ids in lines)
        texts[f"samples/{number}"] = "\n".join(shown)
    return texts


def greedy(run: Run, contexts: list[tuple[int, ...]], ends: set[int]) -> list[list[int]]:
    """The token ids that the model writes after each context, up to one of `ends`; none where its
    logits are not finite."""
    window = run.train.max_seq_length
    room = min(SAMPLE_TOKENS, window // 2)
    settings = SearchSettings(
        beam=1, no_repeat_ngram_size=0, eval_len=room, end_ids=tuple(sorted(ends))
    )
    width = window - room
    prompts = [torch.tensor(c[-width:], device=run.runtime.device) for c in contexts]
    model = cast(GPT2LMModel, gpu.unwrap(run.model)).eval()
    try:
        with run.runtime.autocast():
            return [found[0].tokens for found in beam_search(model, prompts, settings)]
    except ValueError:
        return [[] for _ in contexts]
    finally:
        model.train()


def _words(run: Run, ids: Sequence[int], ends: set[int]) -> str:
    """Ids without a last one that ends them, as text in one line, or as they are."""
    ids = list(ids[:-1] if ids and ids[-1] in ends else ids)
    if run.tokenizer is None:
        return " ".join(map(str, ids))
    return run.tokenizer.decode(ids, skip_special_tokens=False).strip().replace("\n", "⏎")
