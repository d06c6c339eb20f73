"""How a run resumes after a stop: the state that it saves, and what may not change since."""

import io
import re
import time
import zipfile
from pathlib import Path

import torch

import checkpoints
import gpu
from checkpoints import AdapterHeader
from checkpoints.base import read_pickle
from common.errors import InputError
from common.files import replacing
from gpu import Runtime
from training.run import Run, write_adapter

# Fields of `Run` by their names in the state.
PROGRESS = {
    "step": "step", "window": "batches_taken", "best_loss": "best_loss", "best_step": "best_step",
    "no_better": "no_better", "bad_steps": "bad_steps", "validated_step": "validated_step",
}  # fmt: skip


FORM_SETTINGS = (
    "optimizer", "lora_dim", "lora_targets", "lora_kind", "train_bias", "train_top",
    "no_decay_bias", "lora_plus_ratio",
)  # fmt: skip


def save(run: Run) -> None:
    """Write the adapter of this step, then the state from which the run can go on."""
    if run.last_save == (run.step, run.validated_step):
        return
    run.last_save, run.saved_at = (run.step, run.validated_step), time.monotonic()
    mine = {
        "generators": gpu.generator_states(),
        "meter": {"sum": run.average.sum, "count": run.average.count},
    }
    ranks = run.runtime.gather(mine)
    write_adapter(run, run.step)
    if run.runtime.rank == 0:
        state = {
            "format": checkpoints.FORMAT_VERSION,
            "header": run.header.to_fields(),
            "progress": {name: getattr(run, own) for name, own in PROGRESS.items()},
            "trained": {name: p.detach() for name, p in run.saved.items()},
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": run.scaler.state_dict(),
            "ranks": ranks,
        }
        save_training_state(state_path(run.settings.work_dir), state)
        _drop_old(run)


def _drop_old(run: Run) -> None:
    """Delete numbered adapters but the `--keep_last` newest up to this step."""
    if not run.settings.keep_last:
        return
    names = [path.name for path in run.settings.work_dir.glob("model.*.safetensors")]
    numbered = [re.fullmatch(r"model\.(\d+)\.safetensors", name) for name in names]
    steps = sorted(int(match[1]) for match in numbered if match)
    done = [step for step in steps if step <= run.step]
    for step in done[: -run.settings.keep_last]:
        run.adapter_path(step).unlink(missing_ok=True)


def state_path(work_dir: str | Path) -> Path:
    return Path(work_dir) / "state.pt"


def save_training_state(path: str | Path, state: dict) -> None:
    """Write all that a run needs to go on; tensors and plain values only."""
    # Written in memory first: on a full disk torch's own writer fails without an OSError.
    data = io.BytesIO()
    torch.save(state, data)
    with replacing(path, "wb") as file:
        file.write(data.getbuffer())


def read_training_state(path: str | Path) -> dict:
    """What `save_training_state` wrote, every byte of it."""
    state = read_pickle(Path(path))
    if not _has_its_checksums(path):
        raise InputError(
            f"--resume {path} is damaged; put a copy there, or start anew in another --work_dir"
        )
    if not isinstance(state, dict) or state.get("format") != checkpoints.FORMAT_VERSION:
        raise InputError(f"--resume {path} is not a training state of this program")
    return state


def _has_its_checksums(path: str | Path) -> bool:
    """Whether all parts of one of torch's archives have the checksums that were stored with them;
    torch.load does not look at these."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive fails in a dozen ways, and any is an answer
        return False


def find_state(work_dir: Path, resume: str | None) -> dict | None:
    """Return the training state to resume from, None for a fresh start.

    Raises:
        InputError: there is a run and no `--resume`, or `--resume` and no run.
    """
    own = state_path(work_dir)
    path = own if resume in (None, "auto") else state_path(resume)
    if resume not in (None, "auto") and not path.is_file():
        raise InputError(f"--resume {resume} holds no state.pt; is it a run's work_dir?")
    resumes_here = resume and path.resolve() == own.resolve()
    if not resumes_here and (own.is_file() or own.with_name("run.json").is_file()):
        raise InputError(
            f"--work_dir {work_dir} holds a run already; give --resume auto to resume it, or "
            "another --work_dir to start anew"
        )
    return read_training_state(path) if resume and path.is_file() else None


def check_equal_states(runtime: Runtime, work_dir: Path, state: dict | None) -> None:
    """Refuse to resume where the ranks found different states, or some none."""
    steps = runtime.gather(state["progress"]["step"] if state else 0)
    if len(set(steps)) > 1:
        raise InputError(
            f"--work_dir {work_dir} holds a state of step {steps[0]} for rank 0 and of step "
            f"{steps[runtime.rank]} for rank {runtime.rank}; it must be a folder that all machines "
            "share"
        )


def check_settings(state: dict, header: AdapterHeader) -> None:
    """Refuse to go on with a run under settings, data or a base that would change its result."""
    then, now = _flat(state["header"]), _flat(header.to_fields())
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        first = changed[0]
        raise InputError(
            f"--resume: {', '.join(changed)} changed since the run was started ({first} was "
            f"{then.get(first)}, is {now.get(first)}); put it back, or give --resume_anyway"
        )


def _flat(header: dict) -> dict:
    nested = {key: value for key, value in header.items() if isinstance(value, dict)}
    flat = {key: value for key, value in header.items() if key not in (*nested, "step")}
    for key, value in nested.items():
        names = {name: name if key == "settings" else f"{key} {name}" for name in value}
        flat |= {names[name]: inner for name, inner in value.items()}
    return flat


def restore(run: Run, state: dict) -> None:
    """Put a run back to where `save` left it, under the settings of its own arguments."""
    _check_form(state["header"]["settings"], run.header.settings or {})
    for name, own in PROGRESS.items():
        setattr(run, own, state["progress"][name])
    run.last_save = run.step, run.validated_step
    checkpoints.apply_trained(gpu.unwrap(run.model), state["trained"], "state.pt")
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
    _restore_schedule(run, state["scheduler"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    if len(state["ranks"]) == run.runtime.world_size:
        mine = state["ranks"][run.runtime.rank]
        gpu.set_generator_states(mine["generators"])
        run.average.sum, run.average.count = mine["meter"]["sum"], mine["meter"]["count"]


def _check_form(then: dict, now: dict) -> None:
    """Refuse what even `--resume_anyway` cannot do: the saved tensors are laid out for these."""
    for name in FORM_SETTINGS:
        if then.get(name) != now[name]:
            raise InputError(
                f"--resume: --{name} was {then.get(name)} and is {now[name]}, which the saved "
                "state does not fit; put it back, or start anew in another --work_dir"
            )


def _restore_schedule(run: Run, saved: dict) -> None:
    """Put the schedule where it was, at the rate that the settings of this run give there."""
    scheduler = run.scheduler
    factors = [factor(run.step) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    now = {"base_lrs": scheduler.base_lrs, "_last_lr": rates}
    scheduler.load_state_dict(saved | now)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
