"""A run that is stopped, or killed, goes on to the bytes of one that never was."""

import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, Tiny, finish, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import gpt2_ft
from checkpoints import read_adapter
from common import locks
from common.errors import InputError
from data_utils import load_tokenizer, vocabulary_fingerprint
from training import work_dir
from training.updates import Arriving, StepResult

# Names of event files that are made in one second are ordered by a count, as text.
event_file_writer._global_uid._value = 10**6
TIMES = ("tokens_per_second", "peak_memory_gb")


class Killed(BaseException):
    """Ends a run as nothing that a program could expect does."""


def adapters(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model.*.safetensors")}


def log_records(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar that TensorBoard shows, times apart."""
    shown = {}
    for name in ("", "-valid"):
        events = EventAccumulator(str(folder / "tensorboard" / (folder.name + name)))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.split("/")[1] not in TIMES:
                points = [(event.step, event.value) for event in events.Scalars(tag)]
                shown[f"{tag}{name}"] = points
    return shown


def same_runs(one: Path, other: Path) -> None:
    """Everything that tells the two runs' courses is equal."""
    assert adapters(one).keys() >= adapters(other).keys() >= {"model.12.safetensors"}
    assert all(adapters(one)[name] == content for name, content in adapters(other).items())
    assert log_records(one) == log_records(other)
    shown = scalars(one)
    assert shown == scalars(other)
    for points in shown.values():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))


def die_in_call(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the program die in the given call of one of its functions."""
    real, calls = getattr(gpt2_ft, name), iter(range(1, 10**6))

    def function(*arguments: object) -> object:
        if next(calls) == call:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(gpt2_ft, name, function)


@pytest.mark.parametrize(
    "place, call, more",
    [
        ("optimizer_step", 2, []),  # nothing saved yet
        ("optimizer_step", 6, []),  # between two saves, in the middle of an epoch
        ("optimizer_step", 9, ["--obj", "jlm", "--clip", 0.1, "--scheduler", "cosine"]),
        ("optimizer_step", 7, ["--optimizer", "torch", "--log_interval", 5]),
        ("optimizer_step", 8, ["--lora_dim", 0, "--no_decay_bias"]),
        ("validate", 2, []),  # after the last step of an epoch
        ("save", 2, []),  # after its validation
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes_and_logs(
    place: str, call: int, more: list, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tiny.argv("killed", "--resume", "auto", *more)
    kill_and_compare(tiny, monkeypatch, tiny.argv("whole", *more), killed, place, call)


def kill_and_compare(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    whole: list[str],
    killed: list[str],
    place: str,
    call: int,
) -> None:
    """Let one run end, kill another in a call and resume it, and compare what the two left."""
    gpt2_ft.main(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_call(patch, place, call)
        gpt2_ft.main(killed)
    assert "model.12.safetensors" not in adapters(tiny.folder / "killed")
    gpt2_ft.main(killed)
    same_runs(tiny.folder / "whole", tiny.folder / "killed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "place, call, more",
    [("optimizer_step", 6, ["--optimizer", "torch"]), ("validate", 2, []), ("save", 3, [])],
)
def test_a_killed_run_of_every_method_resumes_to_the_same_bytes_and_logs(
    method: str, place: str, call: int, more: list, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.argv_of(METHODS[method], "whole", *more)
    killed = tiny.argv_of(METHODS[method], "killed", "--resume", "auto", *more)
    kill_and_compare(tiny, monkeypatch, whole, killed, place, call)


def test_a_run_killed_again_and_again_still_ends_the_same(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2_ft.main(tiny.argv("whole"))
    argv = tiny.argv("killed", "--resume", "auto", "--save_interval", 1)
    for call in (3, 1, 2, 4, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_call(patch, "optimizer_step", call)
            gpt2_ft.main(argv)
    gpt2_ft.main(argv)
    gpt2_ft.main(argv)  # a finished run has nothing left to do
    monkeypatch.setattr(gpt2_ft, "optimizer_step", None)
    gpt2_ft.main(argv)
    whole, killed = tiny.folder / "whole", tiny.folder / "killed"
    assert all(adapters(killed)[name] == content for name, content in adapters(whole).items())
    assert log_records(whole) == log_records(killed)
    assert scalars(whole) == scalars(killed)


def test_a_log_line_cut_short_and_steps_past_the_last_save_are_dropped(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("whole"))
    gpt2_ft.main(tiny.argv("run", "--max_epoch", 2))
    path = tiny.folder / "run" / "log.jsonl"
    kept = path.read_bytes()
    junk = b'{"kind": "valid", "step": 13, "loss": 1}\n\0\0\xff\n{"kind": "train", "st'
    path.write_bytes(kept + junk)
    gpt2_ft.main(tiny.argv("run", "--resume", "auto"))
    assert path.read_bytes() == kept


def test_signal_handlers_are_put_back_and_another_thread_may_train(tiny: Tiny) -> None:
    """In a notebook, an interrupt after training must still interrupt."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    thread = threading.Thread(target=gpt2_ft.main, args=(tiny.argv("other", "--max_step", 3),))
    thread.start()
    thread.join()
    last = "model.3.safetensors"
    assert (tiny.folder / "other" / last).read_bytes() == (tiny.folder / "run" / last).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_saves_it(
    number: int, code: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2_ft.main(tiny.argv("whole"))
    real, calls = gpt2_ft.optimizer_step, iter(range(1, 100))

    def signalled(*arguments: object) -> tuple:
        if next(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*arguments)

    argv = tiny.argv("run", "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(gpt2_ft, "optimizer_step", signalled)
        gpt2_ft.main(argv)
    assert ended.value.code == code
    assert read_adapter(f"{tiny.folder / 'run'}:last")[0].step == 5
    gpt2_ft.main(argv)
    whole, stopped = adapters(tiny.folder / "whole"), adapters(tiny.folder / "run")
    assert all(stopped[name] == content for name, content in whole.items())
    assert scalars(tiny.folder / "whole") == scalars(tiny.folder / "run")


def test_a_terminated_process_exits_143_and_its_run_resumes_to_the_same_bytes(nano: Tiny) -> None:
    more = ["--max_epoch", 5, "--max_step", 26, "--save_interval", 99, "--eval_interval", 9]
    argv = nano.argv("stopped", *more, "--resume", "auto")
    process = start(["gpt2_ft.py", *argv])
    log = nano.folder / "stopped" / "log.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size > 500, process)
    process.terminate()
    status, out, err = finish(process)
    assert (status, err) == (143, "")
    stopped_at = torch.load(log.with_name("state.pt"), weights_only=True)["progress"]["step"]
    assert 1 < stopped_at < 26
    assert read_adapter(f"{log.parent}:last")[0].step == stopped_at

    gpt2_ft.main(argv)
    gpt2_ft.main(nano.argv("whole", *more))
    last = "model.26.safetensors"
    whole, stopped = nano.folder / "whole", nano.folder / "stopped"
    assert adapters(whole)[last] == adapters(stopped)[last]
    assert log_records(whole) == log_records(stopped)


def wait_until(condition: object, process: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_signal_ends_the_process_at_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit_now(code: int) -> None:
        raise Killed(code)

    def signalled(*arguments: object) -> tuple:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as a shell and a launcher both pass it on
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not end the process")

    monkeypatch.setattr(gpt2_ft, "ONE_SIGNAL_SECONDS", 0.01)

    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(gpt2_ft, "optimizer_step", signalled)
    with pytest.raises(Killed, match="130"):
        gpt2_ft.main(tiny.argv("run"))


def test_a_run_of_steps_that_are_not_finite_still_obeys_a_signal(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def bad_step(run: gpt2_ft.Run, rows: list) -> tuple:
        calls.append(rows)
        run.signal = signal.SIGTERM
        numbers = torch.tensor([float("nan"), 0, 0, run.signal, 0])
        return StepResult(1.0, 1, Arriving(numbers))

    monkeypatch.setattr(gpt2_ft, "optimizer_step", bad_step)
    with pytest.raises(SystemExit) as ended:
        gpt2_ft.main(tiny.argv("run"))
    assert (ended.value.code, len(calls)) == (143, 1)


def start_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_call(patch, "optimizer_step", 5)
        gpt2_ft.main(tiny.argv("run"))


@pytest.mark.parametrize(
    "more",
    [["--lr", 0.02], ["--lora_alpha", 9], ["--grad_acc", 1], ["--random_seed", 5], ["--clip", 1],
     ["--label_smooth", 0.2], ["--max_epoch", 3], ["--scheduler", "constant"], ["--bf16"]],
)  # fmt: skip
def test_a_changed_setting_is_named_and_refused(
    more: list, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    state = (tiny.folder / "run" / "state.pt").read_bytes()
    name = {"grad_acc": "global_batch", "lora_alpha": "alpha", "random_seed": "random_seed"}
    flag = more[0].removeprefix("--")
    with pytest.raises(InputError, match=f"--resume.*{name.get(flag, flag)}.*--resume_anyway"):
        gpt2_ft.main(tiny.argv("run", "--resume", "auto", *more))
    assert (tiny.folder / "run" / "state.pt").read_bytes() == state


def test_changed_data_and_another_base_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    data = tiny.folder / "train.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(reversed(lines)), encoding="utf-8")
    with pytest.raises(InputError, match="train_data"):
        gpt2_ft.main(tiny.argv("run", "--resume", "auto"))


def test_resume_anyway_goes_on_under_the_new_settings(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    changed = ["--lr", 0.5, "--weight_decay", 0.3, "--scheduler", "constant"]
    runs = []
    real = gpt2_ft.prepare
    monkeypatch.setattr(gpt2_ft, "prepare", lambda *a: runs.append(real(*a)) or runs[-1])
    gpt2_ft.main(tiny.argv("run", "--resume", "auto", "--resume_anyway", *changed))
    records = log_records(tiny.folder / "run")
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "train"}
    assert rates[3] < 0.01
    assert [rates[step] for step in range(4, 13)] == [0.5] * 9
    assert runs[0].optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    "more", [["--optimizer", "torch"], ["--lora_dim", 4], ["--lora_dim", 0], ["--no_decay_bias"]]
)
def test_what_the_saved_state_cannot_fit_is_refused_even_with_resume_anyway(
    more: list, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    with pytest.raises(InputError, match=f"{more[0]} was .*the saved state does not fit"):
        gpt2_ft.main(tiny.argv("run", "--resume", "auto", "--resume_anyway", *more))


def test_a_work_dir_with_a_run_needs_resume_or_another_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    both = "holds a run already.*--resume auto.*another --work_dir"
    with pytest.raises(InputError, match=both):
        gpt2_ft.main(tiny.argv("run"))
    (tiny.folder / "run" / "state.pt").unlink()
    with pytest.raises(InputError, match=both):
        gpt2_ft.main(tiny.argv("run"))
    with pytest.raises(InputError, match="holds no state.pt"):
        gpt2_ft.main(tiny.argv("other", "--resume", tiny.folder / "run"))
    with pytest.raises(InputError, match="needs --work_dir"):
        gpt2_ft.main([*tiny.argv("other")[:-2], "--resume", "auto"])


def test_resume_by_path_goes_on_there_or_in_an_empty_folder_and_in_no_other_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    gpt2_ft.main(tiny.argv("whole"))
    run = tiny.folder / "run"
    with pytest.raises(InputError, match="whole holds a run already"):
        gpt2_ft.main(tiny.argv("whole", "--resume", run))
    gpt2_ft.main(tiny.argv("branch", "--resume", run))
    gpt2_ft.main([*tiny.argv("run")[:-2], "--resume", str(run)])
    last = adapters(tiny.folder / "whole")["model.12.safetensors"]
    for name in ("branch", "run"):
        assert adapters(tiny.folder / name)["model.12.safetensors"] == last


def test_two_runs_do_not_share_a_work_dir(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    folder = tiny.folder / "run"
    with (
        work_dir.claimed(str(folder), None),
        pytest.raises(InputError, match="in use by another run"),
    ):
        gpt2_ft.main(tiny.argv("run"))
    assert adapters(folder) == {}
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))


def test_fewer_steps_than_were_taken_are_refused_with_both_numbers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny, monkeypatch)
    argv = tiny.argv("run", "--warmup_step", 1, "--resume", "auto", "--resume_anyway", "--max_step")
    with pytest.raises(InputError, match="has taken 3 steps.*more than --max_step 2; give at"):
        gpt2_ft.main([*argv, "2"])
    gpt2_ft.main([*argv, "3"])
    assert numbered(tiny.folder / "run") == [3]


def test_a_best_adapter_found_after_the_last_save_gives_way_to_the_one_that_the_state_names(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best at 2 and saved at 3; best at 4, then killed; resumed under settings that end otherwise.
    The log names step 2, so the file must be that of step 2."""
    argv = tiny.argv("run", "--eval_interval", 2, "--resume", "auto")
    best = tiny.folder / "run" / "model.best.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        validation_losses(patch, [5, 4])
        die_in_call(patch, "optimizer_step", 5)
        gpt2_ft.main(argv)
    assert read_adapter(best)[0].step == 4
    with monkeypatch.context() as patch:
        validation_losses(patch, [7] * 5)
        gpt2_ft.main([*argv, "--resume_anyway", "--lr", "0.02"])
    assert read_adapter(best)[0].step == 2
    assert sorted(path.name for path in best.parent.iterdir() if path.name[0] == ".") == [".lock"]

    with monkeypatch.context() as patch:
        validation_losses(patch, [7])
        gpt2_ft.main(tiny.argv("branch", "--resume", best.parent, "--resume_anyway"))
    assert (tiny.folder / "branch" / best.name).read_bytes() == best.read_bytes()


def test_a_best_adapter_that_is_gone_is_named_no_more(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv("run"))
    folder = tiny.folder / "run"
    (folder / "model.best.safetensors").unlink()
    (folder / "model.12.safetensors").unlink()
    whole = (folder / "model.9.safetensors").read_bytes()
    capsys.readouterr()
    gpt2_ft.main(tiny.argv("run", "--resume", "auto"))
    out = capsys.readouterr().out
    assert "is not in" in out and "model.best" not in out
    assert read_adapter(folder / "model.12.safetensors")[0].step == 12, "what is named is there"
    assert (folder / "model.9.safetensors").read_bytes() == whole


def test_records_are_on_disk_before_the_state_that_lets_a_run_forget_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    synced = os.fsync

    def fsync(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    names = [name for name in order if name == "log.jsonl" or name.startswith(".state.pt")]
    assert names[-2] == "log.jsonl" and names[-1].startswith(".state.pt")


@pytest.mark.parametrize(
    "spoil",
    [{"progress": {}}, {"progress": []}, {"ranks": {}}, {"trained": {"x": 1}}, {"ranks": [1]},
     {"optimizer": {"state": {0: 5}}}, {"scheduler": {"last_epoch": "x"}}, {"header": {"r": -1}},
     {"trained": {}}, {"ranks": [{"generators": {}, "interval": {}}]}, {"format": 99}],
)  # fmt: skip
def test_a_state_with_other_content_is_refused_in_a_sentence(spoil: dict, tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    path = tiny.folder / "run" / "state.pt"
    torch.save(torch.load(path, weights_only=True) | spoil, path)
    with pytest.raises(InputError, match="state.pt") as refused:
        gpt2_ft.main(tiny.argv("run", "--max_step", 3, "--resume", "auto"))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_run_waits_for_a_process_that_is_still_ending(tiny: Tiny) -> None:
    ending = work_dir.claimed(str(tiny.folder / "run"), None)
    ending.__enter__()
    threading.Timer(0.3, ending.__exit__, (None, None, None)).start()
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    assert adapters(tiny.folder / "run").keys() >= {"model.3.safetensors"}


def test_best_on_validation_and_last_are_both_kept_and_named(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv("run"))
    folder = tiny.folder / "run"
    losses = {r["step"]: r["loss"] for r in log_records(folder) if r["kind"] == "valid"}
    assert set(losses) == {4, 6, 8, 12}
    header, _ = read_adapter(folder / "model.best.safetensors")
    assert header.step == min(losses, key=losses.get)
    *_, last_line = capsys.readouterr().out.splitlines()
    assert "model.12.safetensors" in last_line and "model.best.safetensors" in last_line


def numbered(folder: Path) -> list[int]:
    names = [name.split(".")[1] for name in adapters(folder)]
    return sorted(int(name) for name in names if name.isdigit())


def test_the_last_adapters_and_the_best_are_kept_and_still_resume_to_the_same_bytes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2_ft.main(tiny.argv("whole"))
    assert numbered(tiny.folder / "whole") == [3, 6, 9, 12]
    gpt2_ft.main(tiny.argv("two", "--keep_last", 2))
    assert numbered(tiny.folder / "two") == [9, 12]
    argv = tiny.argv("one", "--keep_last", 1, "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_call(patch, "optimizer_step", 8)
        gpt2_ft.main(argv)
    assert numbered(tiny.folder / "one") == [6]
    gpt2_ft.main(argv)
    whole = adapters(tiny.folder / "whole")
    kept = {name: whole[name] for name in ("model.12.safetensors", "model.best.safetensors")}
    assert adapters(tiny.folder / "one") == kept


def validation_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the validations of this process give these losses, one after the other."""
    following = iter(losses)
    monkeypatch.setattr(gpt2_ft, "evaluate", lambda *_: (next(following), 1.0))


@pytest.mark.parametrize(
    "losses, last", [([5, 4, 4, 4.5], 8), ([5, 5, 4, 4, 4], 10), ([math.nan, math.nan], 4)]
)
def test_a_run_without_a_better_validation_stops_early_and_says_so(
    losses: list[float], last: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    validation_losses(monkeypatch, losses)
    gpt2_ft.main(tiny.argv("run", "--patience", 2, "--eval_interval", 2))
    assert numbered(tiny.folder / "run")[-1] == last
    assert f"Stopped early after step {last}: 2 validations" in capsys.readouterr().out


def test_patience_goes_on_behind_a_stop_and_ends_for_good(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = tiny.argv("run", "--patience", 2, "--eval_interval", 2, "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        validation_losses(patch, [4, 5])
        die_in_call(patch, "optimizer_step", 6)
        gpt2_ft.main([*argv, "--save_interval", "1"])
    with monkeypatch.context() as patch:
        validation_losses(patch, [6])
        gpt2_ft.main(argv)
    assert numbered(tiny.folder / "run")[-1] == 6
    with monkeypatch.context() as patch:
        patch.setattr(gpt2_ft, "optimizer_step", None)
        gpt2_ft.main(argv)  # nothing left to do
    gpt2_ft.main([*argv, "--patience", "0"])
    gpt2_ft.main(tiny.argv("whole"))
    last = "model.12.safetensors"
    assert adapters(tiny.folder / "run")[last] == adapters(tiny.folder / "whole")[last]


def test_patience_without_validation_data_is_refused(tiny: Tiny) -> None:
    argv = tiny.argv("run", "--patience", 2)
    del argv[argv.index("--valid_data") : argv.index("--valid_data") + 2]
    with pytest.raises(InputError, match="--patience.*--valid_data"):
        gpt2_ft.main(argv)


def test_a_run_is_saved_after_so_many_minutes_and_ends_the_same(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = ["--save_interval", 99, "--max_epoch", 1, "--max_step", 6]
    gpt2_ft.main(tiny.argv("whole", *rare))
    assert numbered(tiny.folder / "whole") == [6]
    real, now = gpt2_ft.optimizer_step, [time.monotonic()]

    def slow(*arguments: object) -> tuple:
        now[0] += 30.0
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        patch.setattr(gpt2_ft, "optimizer_step", slow)
        gpt2_ft.main(tiny.argv("timed", *rare, "--save_minutes", 0.9))
    assert numbered(tiny.folder / "timed") == [2, 4, 6]
    last = "model.6.safetensors"
    assert adapters(tiny.folder / "timed")[last] == adapters(tiny.folder / "whole")[last]


def test_without_work_dir_the_first_free_folder_is_taken(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.folder)
    argv = tiny.argv("x", "--max_step", 3)
    at = argv.index("--work_dir")
    argv = argv[:at] + argv[at + 2 :]
    for _ in range(2):
        gpt2_ft.main(argv)
    names = ["001", "002"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    with pytest.raises(InputError, match="absent.jsonl"):
        gpt2_ft.main([*argv, "--train_data", "absent.jsonl"])
    assert sorted(path.name for path in Path("runs").iterdir()) == names, "a failed start is left"
    Path("runs/0999").mkdir()
    gpt2_ft.main(argv)
    gpt2_ft.main(argv)
    assert {"1000", "1001"} <= {path.name for path in Path("runs").iterdir()}


def test_two_starts_at_once_get_a_folder_each(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: work_dir._next_folder(runs), range(40)))
    assert sorted(folder.name for folder in folders) == [f"{n:03}" for n in range(1, 41)]


def test_what_a_killed_run_left_half_written_is_deleted_at_the_next_start(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    left = tiny.folder / "run" / ".state.pt.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    gpt2_ft.main(tiny.argv("run", "--max_step", 3, "--resume", "auto"))
    assert not left.exists()


def test_a_state_with_the_older_fingerprint_of_its_vocabulary_is_resumed(tmp_path: Path) -> None:
    nano, run = ROOT / "data" / "nano", tmp_path / "run"
    lines = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    argv = [f"--train_data={tmp_path / 'train.jsonl'}", f"--vocab={nano}", "--seq_len=128"]
    argv += [f"--init_checkpoint={nano}", f"--work_dir={run}", "--warmup_step=0", "--device=cpu"]
    gpt2_ft.main([*argv, "--max_epoch=2", "--max_step=2", "--train_batch_size=4"])
    state = torch.load(run / "state.pt", weights_only=True)
    old = vocabulary_fingerprint(load_tokenizer(nano), with_merges=False)
    assert state["header"]["vocabulary"]["sha256"] != old
    state["header"]["vocabulary"]["sha256"] = old
    state["progress"]["step"] = 2
    torch.save(state, run / "state.pt")
    resumed = [*argv, "--max_epoch=2", "--max_step=3", "--train_batch_size=4", "--resume=auto"]
    with pytest.raises(InputError, match="--resume: max_step changed"):
        gpt2_ft.main(resumed)
    gpt2_ft.main([*resumed, "--resume_anyway"])
    header, _ = read_adapter(run / "model.3.safetensors")
    assert header is not None and header.vocabulary.sha256 == old
