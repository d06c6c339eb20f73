"""trl's SFTTrainer as a peer of benchmarks/train.py; runs in the environment `.venv-peers`."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import common
from benchmarks.gpu_peers import sft_trainer
from benchmarks.train_peers import Work, adapted
from common.files import read_json_lines


def sft(**own: Any) -> Callable[[dict], Work]:
    """trl's trainer in its own loop. Each request is a training of its own, which starts from the
    weights of the last with a new optimizer."""

    def make(settings: dict) -> Work:
        model = adapted(settings, "sdpa")
        rows = list(read_json_lines(settings["data"]))
        fixed = {
            "output_dir": str(Path(settings["base"]).parent / "sft"), "use_cpu": True,
            "bf16": False, "per_device_train_batch_size": settings["batch"],
            "learning_rate": settings["lr"], "lr_scheduler_type": "constant",
            "adam_epsilon": 1e-6, "weight_decay": 0.01, "max_grad_norm": 0,
        }  # fmt: skip

        def work(batches: list[list[int]]) -> dict:
            ends: list[float] = []
            trainer = sft_trainer(
                model, [rows[number] for batch in batches for number in batch],
                lambda step: ends.append(perf_counter()), max_steps=len(batches), **fixed | own,
            )  # fmt: skip
            losses = recorded_losses(trainer)
            trainer.train()
            return {"losses": losses, "seconds": [b - a for a, b in pairwise(ends)]}

        return work

    return make


def recorded_losses(trainer: Any) -> list[float]:
    """The list that each step's loss will be added to; the trainer's own log rounds them."""
    losses, step = [], trainer.training_step

    def training_step(*args: Any) -> Any:
        loss = step(*args)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    return losses


if __name__ == "__main__":
    common.serve({"sft": sft(), "sft-padding-free": sft(padding_free=True, max_length=None)})
