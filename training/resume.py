"""How a run resumes after a stop: the state that it saves, and what may not change since."""

import io
import math
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import checkpoints
import gpu
from checkpoints import AdapterHeader
from checkpoints.base import read_pickle
from common.errors import InputError
from common.files import replacing
from eval.choice import LOSS
from gpu import Runtime
from model import GPT2LMModel
from training.run import Interval, Run, write_adapter
from training.scores import Scoring

# Fields of `Run` by their names in the state.
PROGRESS = {
    "step": "step", "window": "batches_taken", "best_loss": "best_loss", "best_step": "best_step",
    "no_better": "no_better", "bad_steps": "bad_steps", "validated_step": "validated_step",
}  # fmt: skip
FORM_FIELDS = (
    "optimizer", "lora_dim", "lora_targets", "lora_kind", "train_bias", "train_top",
    "no_decay_bias", "lora_plus_ratio", "kind", "dim", "prefix_length", "prefix_hidden",
)  # fmt: skip
OF_SCORES = ("choice", "best_scores")  # fields of a state that is chosen by a score
# What the optimizers keep of a parameter: the original's formula, PyTorch's, and apex's.
APEX = {"exp_avg", "exp_avg_sq"}
OPTIMIZER_STATES = ({"step", "m", "v"}, APEX | {"step"}, APEX)


@dataclass(frozen=True)
class State:
    """What state.pt holds: tensors and plain values. `ranks` has, for each rank, the states of its
    random generators and what it has not logged yet; `choice` and `best_scores`, which the file
    lacks where the loss decides, how the best adapter is chosen and what it scores."""

    header: AdapterHeader
    progress: dict[str, int | float]
    trained: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    ranks: list[dict[str, Any]]
    choice: dict[str, Any] = field(default_factory=dict)
    best_scores: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(self.progress["step"])

    def write(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        names = [own.name for own in fields(self) if own.name != "header"]
        if not self.choice:
            names = [name for name in names if name not in OF_SCORES]
        content = {"format": checkpoints.FORMAT_VERSION, "header": self.header.to_fields()}
        # Written in memory first: on a full disk torch's own writer fails without an OSError.
        data = io.BytesIO()
        torch.save(content | {name: getattr(self, name) for name in names}, data)
        with replacing(path, "wb") as file:
            file.write(data.getbuffer())

    @classmethod
    def read(cls, path: Path) -> "State":
        """Return what `write` wrote, every byte of it.

        Raises:
            InputError: the file is damaged, or is not a training state.
        """
        content = read_pickle(path)
        if not _has_its_checksums(path):
            raise InputError(
                f"--resume {path} is damaged; put a copy there, or start anew in another --work_dir"
            )
        types = {own.name: dict for own in fields(cls)} | {"format": int, "ranks": list}
        found: dict[str, Any] = dict(content) if isinstance(content, dict) else {}
        found = dict.fromkeys(OF_SCORES, {}) | found
        wrong = [name for name, kind in types.items() if not isinstance(found.get(name), kind)]
        if wrong or found["format"] != checkpoints.FORMAT_VERSION:
            raise InputError(f"--resume {path} is not a training state of this program")
        header = AdapterHeader.from_fields(found["header"], f"--resume {path}")
        _check_progress(found["progress"], path)
        decider = found["choice"].get("valid_metric")
        best = found["best_scores"].get(decider)
        if decider and found["progress"]["best_step"] and type(best) is not float:
            raise InputError(f"--resume {path} has no good best_scores, but {best!r:.40}")
        rest = {name: found[name] for name in types if name not in ("format", "header")}
        return cls(header, **rest)


def _check_progress(progress: dict, path: Path) -> None:
    for name in PROGRESS:
        value = progress.get(name)
        kinds = (int, float) if name == "best_loss" else (int,)
        if value is None or type(value) not in kinds or math.isnan(value) or not value >= -1:
            raise InputError(f"--resume {path} has no good {name}, but {value!r:.40}")


def _has_its_checksums(path: Path) -> bool:
    """Whether all parts of one of torch's archives have the checksums that were stored with them;
    torch.load does not look at these."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive fails in a dozen ways, and any is an answer
        return False


def state_path(work_dir: str | Path) -> Path:
    """Return where a run saves its state."""
    return Path(work_dir) / "state.pt"


def save(run: Run) -> None:
    """Write the adapter of this step, then the state from which the run resumes; once per step.

    Raises:
        InputError: a tensor is not finite, or the disk refuses; what was saved before stays.
    """
    if run.last_save == (run.step, run.validated_step):
        return
    _check_finite(run)
    mine = {"generators": gpu.generator_states(), "interval": asdict(run.interval)}
    ranks = run.runtime.gather(mine)
    write_adapter(run, run.step)
    if run.runtime.rank == 0:
        run.log.sync()  # records are not written again by a run that resumes from this state
        state = State(
            header=run.header,
            progress={name: getattr(run, own) for name, own in PROGRESS.items()},
            trained={name: p.detach() for name, p in run.in_state.items()},
            optimizer=run.optimizer.state_dict(),
            scheduler=run.scheduler.state_dict(),
            scaler=run.scaler.state_dict(),
            ranks=ranks,
            choice=run.scoring.choice,
            best_scores=run.best_scores,
        )
        state.write(state_path(run.settings.work_dir))
        run.replaced_best_path.unlink(missing_ok=True)  # this state names the new one
        delete_old_adapters(run)
    run.last_save, run.saved_at = (run.step, run.validated_step), time.monotonic()


def _check_finite(run: Run) -> None:
    moments = {
        f"the optimizer's {key} of {name}": tensor
        for name, p in run.trained.items()
        for key, tensor in run.optimizer.state.get(p, {}).items()
        if isinstance(tensor, Tensor)
    }
    for name, tensor in (run.trained | moments).items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"after step {run.step} {name} holds values that are not finite, so it was not "
                f"saved; lower --lr. {last_good(run)}"
            )


def last_good(run: Run) -> str:
    """Return a sentence that names the last saved adapter that a finite step followed."""
    if run.last_save[0] < 0:
        return "Nothing was saved yet"
    if run.good_step < 0:
        return "No adapter that was saved is known to be good"
    return f"The last good file is {run.adapter_path(run.good_step)}"


def confirm_save(run: Run) -> None:
    """Count the last saved adapter as good: a finite step followed it, or the run is finished."""
    if run.good_step != run.last_save[0]:
        run.good_step = run.last_save[0]
        delete_old_adapters(run)


def delete_old_adapters(run: Run) -> None:
    """Delete numbered adapters but the `--keep_last` newest up to this step, and never the last
    good one or a newer."""
    if not run.settings.keep_last or run.runtime.rank:
        return
    names = [path.name for path in run.settings.work_dir.glob("model.*.safetensors")]
    numbered = [re.fullmatch(r"model\.(\d+)\.safetensors", name) for name in names]
    done = sorted(step for match in numbered if match and (step := int(match[1])) <= run.step)
    for step in done[: -run.settings.keep_last]:
        if step < run.good_step:
            run.adapter_path(step).unlink(missing_ok=True)


def find_state(work_dir: Path, resume: str | None) -> State | None:
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
    return State.read(path) if resume and path.is_file() else None


def check_equal_states(runtime: Runtime, work_dir: Path, state: State | None) -> None:
    """Refuse to resume where the ranks found different states, or some none."""
    steps = runtime.gather(state.step if state else 0)
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise InputError(
                f"--work_dir {work_dir} holds a state of step {steps[0]} for rank 0 and of step "
                f"{step} for rank {rank}; it must be a folder that all machines share"
            )


def check_equal_ranks(runtime: Runtime, settings: dict[str, object]) -> None:
    """Refuse to train where a rank was started with other settings or other data than rank 0."""
    first, *others = runtime.gather(settings)
    for rank, own in enumerate(others, start=1):
        for name in sorted(first.keys() | own.keys()):
            if own.get(name) != first.get(name):
                raise InputError(
                    f"rank {rank} was started with {name} {own.get(name)} and rank 0 with "
                    f"{first.get(name)}; give all processes the same flags and the same data"
                )


def check_settings(state: State, header: AdapterHeader, scoring: Scoring) -> None:
    """Refuse to resume a run under settings, data or a base that would change its result."""
    by_loss = {"valid_metric": LOSS}
    then = by_loss | state.choice | flat(state.header)
    now = by_loss | scoring.choice | flat(header)
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    changed.sort(key=lambda key: key != "valid_metric")  # from which the others of it follow
    if changed:
        first = changed[0]
        raise InputError(
            f"--resume: {', '.join(changed)} changed since the run was started ({first} was "
            f"{then.get(first)}, is {now.get(first)}); repeat its command, whose flags are in its "
            "run.json, or give --resume_anyway"
        )


def flat(header: AdapterHeader) -> dict[str, object]:
    """Return the fields of a header on one level, all but the step."""
    content = header.to_fields()
    nested = {key: value for key, value in content.items() if isinstance(value, dict)}
    result = {key: value for key, value in content.items() if key not in (*nested, "step")}
    for key, value in nested.items():
        names = {name: name if key == "settings" else f"{key} {name}" for name in value}
        result |= {names[name]: inner for name, inner in value.items()}
    return result


def restore(run: Run, state: State, source: Path) -> None:
    """Put a run back to where `save` left it, under the settings of its own flags.

    `source` is the folder that the state was found in.
    """
    _check_form(flat(state.header), flat(run.header))
    if state.step > run.plan.max_step:
        raise InputError(
            f"--resume: the run in {source} has taken {state.step} steps, which is more than "
            f"--max_step {run.plan.max_step}; give at least {state.step}"
        )
    for name, own in PROGRESS.items():
        setattr(run, own, state.progress[name])
    run.last_save = run.step, run.validated_step
    with _refusing_bad_content(source):
        _restore_tensors(run, state)
    if not run.adapter_path(run.step).is_file():
        write_adapter(run, run.step)
    _restore_best(run, state, source)


@contextmanager
def _refusing_bad_content(source: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch checks little of what it is given, in many ways
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"--resume {state_path(source)} does not fit this run: {reason:.200}"
        ) from error


def _restore_tensors(run: Run, state: State) -> None:
    if missing := sorted(run.in_state.keys() - state.trained.keys()):
        raise ValueError(f"it lacks {missing[0]}")
    model = cast(GPT2LMModel, gpu.unwrap(run.model))
    checkpoints.apply_trained(model, state.trained, "state.pt")
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({**state.optimizer, "param_groups": groups})
    for name, p in run.trained.items():
        own = run.optimizer.state.get(p, {})
        fitting = [t.shape in ((), p.shape) for t in own.values() if isinstance(t, Tensor)]
        if own and not (own.keys() in OPTIMIZER_STATES and all(fitting)):
            raise ValueError(f"the optimizer's state of {name} is of another form")
    _restore_schedule(run, state.scheduler)
    if state.scaler:
        run.scaler.load_state_dict(state.scaler)
    if len(state.ranks) == run.runtime.world_size:
        mine = state.ranks[run.runtime.rank]
        gpu.set_generator_states(mine["generators"])
        run.interval = Interval.restored(mine)


def _check_form(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what even `--resume_anyway` cannot do: the saved tensors are laid out for these."""
    flags = {"kind": "method", "dim": "adapter_dim"}
    for name in FORM_FIELDS:
        if then.get(name) != now.get(name):
            raise InputError(
                f"--resume: --{flags.get(name, name)} was {then.get(name)} and is {now.get(name)}, "
                "which the saved state does not fit; put it back, or start anew in another "
                "--work_dir"
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


def _restore_best(run: Run, state: State, source: Path) -> None:
    """Let model.best be the adapter that the state names as the best, or forget that there is one.

    A life that was killed may have found a better one since; its predecessor then stands aside.
    """
    if not run.best_step:
        return
    problem = f"is not in {source}"
    if state.choice != run.scoring.choice:
        problem = "was chosen under other flags"
    elif run.runtime.from_first(lambda: _find_best(run, source)):
        run.best_scores = state.best_scores
        return
    if run.runtime.rank == 0:
        print(
            f"The best adapter so far, of step {run.best_step}, {problem}: the next validation "
            "counts as the best"
        )
    run.forget_best()


def _find_best(run: Run, source: Path) -> bool:
    best, replaced = run.adapter_path("best"), run.replaced_best_path
    for path in (best, replaced, source / best.name, source / replaced.name):
        if _step_of(path) == run.best_step:
            if path != best:
                with replacing(best, "wb") as file:
                    file.write(path.read_bytes())
            replaced.unlink(missing_ok=True)
            return True
    return False


def _step_of(path: Path) -> int | None:
    """The step of an adapter file; None where there is no good one."""
    try:
        header, _ = checkpoints.read_adapter(path)
    except InputError:
        return None
    return header.step if header else None
