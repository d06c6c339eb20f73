"""The peers of benchmarks/gpu.py, as their users run them: transformers + peft in a loop of one's
own, trl's SFTTrainer, and transformers' generate. What is not installed raises ImportError."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import gpu
from benchmarks.train_peers import padded
from common.files import read_json_lines
from data_utils import FT_Dataset

RANK, ALPHA, DROPOUT = 8, 32, 0.1
LONGEST = 512
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Settings:
    """What a training peer is given: `shape` holds fields of its config, `data` is JSONL of ids."""

    device: torch.device
    folder: Path
    data: Path
    shape: dict[str, Any]
    precision: str
    batch: int
    warm_up: int
    steps: int

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def result(self, seconds: float, tokens: int) -> dict[str, float]:
        """The figures of all measured steps."""
        memory = gpu.Runtime(self.device).peak_memory_gb()
        return {
            "ms/step": round(1e3 * seconds / self.steps, 2),
            "tokens/s": round(tokens / seconds),
            "peak GB": round(memory, 2),
        }


def adapted(settings: Settings) -> nn.Module:
    """transformers' GPT-2 with random weights and peft's adapter of c_attn."""
    transformers: Any = import_module("transformers")
    peft: Any = import_module("peft")
    as_torch_is(settings.device)
    own = settings.shape | WITHOUT_DROPOUT | {"attn_implementation": "sdpa"}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**own))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["c_attn"],
        fan_in_fan_out=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(base, config).to(settings.device).train()


def as_torch_is(device: torch.device) -> None:
    """Leave the choice of attention to torch again, and the memory to the next."""
    reset_memory(device)
    torch.backends.cuda.enable_cudnn_sdp(True)


def reset_memory(device: torch.device) -> None:
    """Let a GPU's peak memory be counted anew, without what others have left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peft(settings: Settings) -> dict[str, float]:
    """Rows padded to the longest of their batch, in a plain loop."""
    model = adapted(settings)
    data = FT_Dataset(settings.data, LONGEST)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=settings.on_cuda)
    half = gpu.AUTOCAST.get(settings.precision)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.precision == "fp16")

    def step(rows: list[int]) -> None:
        batch = (t.to(settings.device, non_blocking=True) for t in padded(data, rows))
        ids, labels, mask, real = batch
        with torch.autocast(settings.device.type, half) if half else nullcontext():
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
            targets = labels.where(mask > 0, -100).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    order, seconds, tokens = itertools.cycle(range(len(data))), 0.0, 0
    for count in (settings.warm_up, settings.steps):
        chosen = [[next(order) for _ in range(settings.batch)] for _ in range(count)]
        tokens = int(sum(data.lengths[rows].sum() for rows in chosen))
        settings.synchronize()
        started = perf_counter()
        for rows in chosen:
            step(rows)
        settings.synchronize()
        seconds = perf_counter() - started
    return settings.result(seconds, tokens)


def sft(settings: Settings) -> dict[str, float]:
    """trl's trainer, as `sft_trainer` makes it, by its own loop."""
    import_module("trl")  # before a model is made for it
    needed = settings.batch * (settings.warm_up + settings.steps)
    rows = list(itertools.islice(itertools.cycle(read_json_lines(settings.data)), needed))
    clock = Clock(settings)
    trainer = sft_trainer(
        adapted(settings), rows, clock.tick, output_dir=str(settings.folder / "sft"),
        per_device_train_batch_size=settings.batch, learning_rate=2e-4,
        max_steps=settings.warm_up + settings.steps, use_cpu=not settings.on_cuda,
        bf16=settings.precision == "bf16", fp16=settings.precision == "fp16",
    )  # fmt: skip
    trainer.train()
    timed = rows[settings.batch * settings.warm_up :]
    tokens = sum(len(row["context"]) + len(row["completion"]) for row in timed)
    return settings.result(clock.seconds, tokens)


def sft_trainer(
    model: nn.Module, rows: list[dict], on_step: Callable[[int], None], **settings: Any
) -> Any:
    """trl's trainer with its default loss, on rows of token ids in their order, of which the
    completion counts. `on_step` hears the number of each step that is done, and 0 before the
    first; `settings` are those of `SFTConfig`."""
    trl, datasets, transformers = map(import_module, ("trl", "datasets", "transformers"))
    items = [
        {
            "input_ids": row["context"] + row["completion"],
            # Releases of trl read the one or the other.
            "completion_mask": [0] * len(row["context"]) + [1] * len(row["completion"]),
            "labels": [-100] * len(row["context"]) + row["completion"],
        }
        for row in rows
    ]
    table = datasets.table.InMemoryTable.from_pylist(items)

    class Timer(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(state.global_step)

    own = {
        "max_length": LONGEST, "gradient_checkpointing": False, "completion_only_loss": True,
        "train_sampling_strategy": "sequential", "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**own | settings),
        train_dataset=datasets.Dataset(table, fingerprint="rows"),
        processing_class=any_tokenizer(transformers),
        callbacks=[Timer()],
    )


class Clock:
    """The seconds from the last step that warms up to the last of all."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.started, self.seconds = settings, 0.0, 0.0

    def tick(self, step: int) -> None:
        """Hear that a step is done."""
        if step == self.settings.warm_up:
            self.settings.synchronize()
            self.started = perf_counter()
        elif step == self.settings.warm_up + self.settings.steps:
            self.settings.synchronize()
            self.seconds = perf_counter() - self.started


def any_tokenizer(transformers: Any) -> Any:
    """A tokenizer that is asked for the id of padding alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    own = Tokenizer(WordLevel({"<|endoftext|>": 50256}, unk_token="<|endoftext|>"))
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **end)


def generate(
    device: torch.device,
    shape: dict[str, Any],
    precision: str,
    contexts: list[list[int]],
    rules: dict[str, Any],
) -> dict[str, float]:
    """transformers' beam search of random weights in the precision, after a warm-up."""
    transformers: Any = import_module("transformers")
    as_torch_is(device)
    config = transformers.GPT2Config(**shape, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(config).to(device, gpu.AUTOCAST.get(precision)).eval()
    rows = [torch.tensor(context) for context in contexts]
    end = rules["end_ids"][0]
    ids = pad_sequence(rows, True, end, padding_side="left").to(device)
    real = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    options = {
        "num_beams": rules["beam"], "length_penalty": rules["length_penalty"],
        "no_repeat_ngram_size": rules["no_repeat_ngram_size"], "pad_token_id": end,
        "eos_token_id": list(rules["end_ids"]), "do_sample": False,
    }  # fmt: skip

    @torch.inference_mode()
    def search(most: int) -> Tensor:
        mask = real.to(device)
        return model.generate(ids, attention_mask=mask, max_new_tokens=most, **options).cpu()

    search(1)
    started = perf_counter()
    search(rules["eval_len"])
    seconds = (perf_counter() - started) / len(contexts)
    memory = gpu.Runtime(device).peak_memory_gb()
    return {"s/context": round(seconds, 4), "peak GB": round(memory, 2)}


TRAINING: dict[str, Callable[[Settings], dict[str, float]]] = {"peft": peft, "SFTTrainer": sft}
