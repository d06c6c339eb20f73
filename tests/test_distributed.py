"""Launchers, devices and process groups: gloo on this machine, one thread a process."""

import argparse
import json
import os
import types
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, Tiny, finish, random_rows, start, write_rows

import gpt2_ft
import gpu
from checkpoints import read_adapter
from common import process_group
from common.errors import InputError

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
PROBE = '''
"""A run that also tells what the ranks see, as one JSON line a rank."""
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, ROOT)
import gpt2_ft

real_prepare, real_step = gpt2_ft.prepare, gpt2_ft.optimizer_step
seen = {"reductions": []}

def count(state, bucket):
    seen["reductions"][-1] += 1
    done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda f: f.value()[0] / dist.get_world_size())

def prepare(args, runtime, *rest):
    run = real_prepare(args, runtime, *rest)
    seen.update(rank=runtime.rank, device=str(runtime.device), random=torch.rand(1).item())
    seen["start"] = {n: p.detach().double().sum().item() for n, p in run.trained.items()}
    run.model.register_comm_hook(None, count)
    return run

def step(run, rows):
    seen["reductions"].append(0)
    seen.setdefault("rows", []).append(rows)
    return real_step(run, rows)

gpt2_ft.prepare, gpt2_ft.optimizer_step = prepare, step
gpt2_ft.main()
with open(f"{OUT}/{seen['rank']}.json", "w", encoding="utf-8") as file:
    json.dump(seen, file)
'''


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def launch(count: int, arguments: list[str]) -> tuple[int, str, str]:
    return finish(start([*TORCHRUN, "--nproc_per_node", count, *arguments]))


def test_two_processes_train_as_one_does_and_reduce_once_a_step(nano: Tiny) -> None:
    """19 rows: the last window has 3, of which the second rank has 1, less than a micro-batch."""
    write_rows(nano.folder / "train.jsonl", random_rows(19))
    probe = nano.folder / "probe.py"
    head = f"ROOT, OUT = {str(ROOT)!r}, {str(nano.folder)!r}\n"
    probe.write_text(head + PROBE, encoding="utf-8")
    more = ["--lora_dropout", 0, "--max_epoch", 1, "--lr", 0.001, "--max_epoch", 1]
    two = nano.argv("two", *more, "--grad_acc", 2, "--train_batch_size", 2)
    code, _, err = launch(2, [str(probe), *two])
    assert code == 0, err
    gpt2_ft.main(nano.argv("one", *more, "--grad_acc", 2, "--train_batch_size", 4))

    for kind in ("train", "valid"):
        ours, theirs = (records(nano.folder / name, kind) for name in ("one", "two"))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        for key in ("loss", "grad_norm") if kind == "train" else ("loss",):
            expected = [r[key] for r in ours]
            assert [r[key] for r in theirs] == pytest.approx(expected, abs=1e-6, rel=1e-5)
    (_, one), (_, other) = (read_adapter(nano.folder / name) for name in ("one", "two"))
    assert all(torch.allclose(other[name], t, atol=1e-5) for name, t in one.items())

    first, second = (
        json.loads((nano.folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    )
    assert first["start"] == second["start"]
    assert first["random"] != second["random"]
    assert first["reductions"] == second["reductions"] == [1, 1, 1]
    sizes = [[[len(micro) for micro in rows] for rows in seen["rows"]] for seen in (first, second)]
    assert sizes == [[[2, 2], [2, 2], [2]], [[2, 2], [2, 2], [1]]]
    rows = [i for seen in (first, second) for step in seen["rows"] for m in step for i in m]
    assert sorted(rows) == list(range(19))


@pytest.mark.parametrize("method", ["adapter_l", "adapter_h", "prefix", "top2"])
def test_two_processes_train_every_method_as_one_does(method: str, nano: Tiny) -> None:
    more = ["--max_step", 3, "--lr", 0.001]
    two = nano.argv_of(METHODS[method], "two", *more, "--grad_acc", 1)
    code, _, err = launch(2, ["gpt2_ft.py", *two])
    assert code == 0, err
    gpt2_ft.main(nano.argv_of(METHODS[method], "one", *more, "--grad_acc", 2))
    for key in ("loss", "grad_norm"):
        one, other = ([r[key] for r in records(nano.folder / n, "train")] for n in ("one", "two"))
        assert other == pytest.approx(one, abs=1e-6, rel=1e-5) and len(one) == 3
    (_, own), (_, theirs) = (read_adapter(nano.folder / name) for name in ("one", "two"))
    assert own and all(torch.allclose(theirs[name], t, atol=1e-5) for name, t in own.items())


def test_a_rank_without_a_row_in_the_last_window_and_another_world_size_on_resume(
    nano: Tiny,
) -> None:
    """17 rows, 8 a step: the third step has one row. Then one process goes on for two."""
    write_rows(nano.folder / "train.jsonl", random_rows(17))
    more = ["--lora_dropout", 0, "--max_epoch", 3]
    two = nano.argv("two", *more, "--grad_acc", 2)
    code, _, err = launch(2, ["gpt2_ft.py", *two, "--max_step", 9])
    assert code == 0, err
    gpt2_ft.main(nano.argv("one", *more, "--grad_acc", 4, "--max_step", 9))
    expected = [r["loss"] for r in records(nano.folder / "one", "train")]
    got = [r["loss"] for r in records(nano.folder / "two", "train")]
    assert len(got) == 9
    assert got == pytest.approx(expected, abs=1e-5)

    with pytest.raises(InputError, match="global batch of 8, which 1 processes.*3 cannot make"):
        gpt2_ft.main([*two, "--max_step", "9", "--resume", "auto", "--train_batch_size", "3"])
    resumed = [*two, "--max_step", "12", "--max_epoch", "4", "--resume", "auto", "--resume_anyway"]
    gpt2_ft.main(resumed)
    run = json.loads((nano.folder / "two" / "run.json").read_text(encoding="utf-8"))
    assert (run["settings"]["grad_acc"], run["settings"]["global_batch"]) == (4, 8)
    assert [r["step"] for r in records(nano.folder / "two", "train")] == list(range(1, 13))


def test_the_older_launcher_starts_training_too(nano: Tiny) -> None:
    launcher = ["-m", "torch.distributed.launch", "--standalone"]
    code, out, err = finish(start([*launcher, "gpt2_ft.py", *nano.argv("run", "--max_step", 3)]))
    assert code == 0, err
    assert "fp32 on cpu, 1 process;" in out
    assert (nano.folder / "run" / "model.3.safetensors").is_file()


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_the_launchers_flag_for_the_local_rank_is_known(flag: str) -> None:
    args = gpt2_ft.build_parser().parse_args([f"{flag}=3"])
    assert args.local_rank == 3


def gpu_arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_gpu_params(parser)
    return parser.parse_args(argv)


def set_launcher(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Let this process seem to have been started by torchrun."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in (where | variables).items():
        monkeypatch.setenv(name, str(value))


def fake_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let this machine seem to have GPUs; returns the list of devices chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "set_device": chosen.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return chosen


def test_attention_that_plans_each_shape_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 1)
    chosen: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    gpu.parse_gpu(gpu_arguments())
    assert chosen == [False]


def test_the_device_is_the_local_rank_on_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two GPUs each: global rank 2 is GPU 0 of the second."""
    chosen = fake_cuda(monkeypatch, 2)
    joined = []
    monkeypatch.setattr(process_group, "join", lambda *arguments: joined.append(arguments[1]))
    devices = []
    for rank in range(4):
        set_launcher(monkeypatch, RANK=rank, LOCAL_RANK=rank % 2, WORLD_SIZE=4)
        runtime = gpu.parse_gpu(gpu_arguments())
        devices.append((runtime.rank, runtime.device.index, runtime.world_size))
    assert devices == [(0, 0, 4), (1, 1, 4), (2, 0, 4), (3, 1, 4)]
    assert chosen == [0, 1, 0, 1]
    assert joined == ["nccl"] * 4
    wrapped = []
    monkeypatch.setattr(gpu.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        gpu, "DistributedDataParallel", lambda m, device_ids: wrapped.append(device_ids)
    )
    gpu.distributed_opt(runtime, types.SimpleNamespace())
    assert wrapped == [[1]]


def test_deterministic_lets_no_operation_run_that_gives_other_bits_each_time(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        gpt2_ft.main(tiny.argv("run", "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    gpt2_ft.main(tiny.argv("plain"))
    assert not torch.are_deterministic_algorithms_enabled()
    one, other = (tiny.folder / name / "model.12.safetensors" for name in ("run", "plain"))
    assert one.read_bytes() == other.read_bytes()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 1)
    set_launcher(monkeypatch, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2)
    with pytest.raises(InputError, match="local rank 1 has no GPU: this machine has 1"):
        gpu.parse_gpu(gpu_arguments())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--platform", "azure"], "azure.*torchrun"),
        (["--platform", "philly"], "philly.*torchrun"),
        (["--platform", "k8s"], "k8s.*torchrun"),
        (["--platform", "moon"], "moon is unknown"),
        (["--device", "tpu"], "tpu is unknown"),
        (["--device", "mps"], "--device mps: PyTorch sees no Apple GPU"),
        (["--fp16", "--device", "cpu"], "--fp16 needs a CUDA device"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--dist_timeout", "0"], "dist_timeout 0"),
        (["--dist_timeout", "inf"], "dist_timeout inf"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_in_a_sentence(
    argv: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        gpu.parse_gpu(gpu_arguments(*argv))


def test_one_process_needs_no_group() -> None:
    runtime = gpu.parse_gpu(gpu_arguments("--device", "cpu"))
    assert runtime == gpu.Runtime(torch.device("cpu"), 0, 1, 0, "fp32")
    assert gpu.distributed_gather(runtime, {"a": 1}) == [{"a": 1}] == runtime.gather({"a": 1})
    assert runtime.sum(1, 2.5) == [1, 2.5]
    gpu.distributed_sync(runtime)
    layer = torch.nn.Linear(1, 1)
    assert gpu.distributed_opt(runtime, layer) is gpu.unwrap(layer) is layer
    gpu.cleanup(runtime)


def test_generators_come_back_where_they_were() -> None:
    import random

    import numpy as np

    gpu.seed_everything(3)
    states = gpu.generator_states()
    draws = [random.random(), np.random.rand(), torch.rand(1).item()]
    gpu.set_generator_states(states)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == draws
    gpu.seed_everything(3)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == draws


def test_the_readmes_command_trains_the_shipped_base_on_the_shipped_sample(tmp_path: Path) -> None:
    if not (ROOT / "data" / "nano" / "model.safetensors").is_file():
        pytest.skip(
            "data/nano/model.safetensors is not there: the shipped base is still to be made"
        )
    own_words = ["--nproc_per_node", 1, ROOT / "gpt2_ft.py", "--lora_dim", 4, "--lora_alpha", 32]
    command = [*TORCHRUN, *own_words, "--max_step", 3, "--warmup_step", 1]
    code, out, err = finish(start(command, cwd=tmp_path))
    assert code == 0, err
    assert out.startswith("Neither --train_data nor --init_checkpoint given")
    header, _ = read_adapter(tmp_path / "runs" / "001")
    assert (header.model_card, header.lora.r, header.step) == ("gpt2.nano", 4, 3)


GROUP = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": ""},
     {"LOCAL_RANK": "0"}, {"MASTER_ADDR": "here", "MASTER_PORT": "x"}],
)  # fmt: skip
def test_variables_of_one_process_are_one_process(variables: dict[str, str]) -> None:
    assert process_group.read_place(environment=variables) == process_group.Place(0, 1, 0)


def test_the_launchers_variables_and_its_flag_say_which_process_this_is() -> None:
    assert process_group.read_place(environment=GROUP) == process_group.Place(1, 2, 1)
    without = {name: value for name, value in GROUP.items() if name != "LOCAL_RANK"}
    assert process_group.read_place(0, without) == process_group.Place(1, 2, 0)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_variable_that_the_launcher_left_out_is_named(missing: str, how: str) -> None:
    variables = GROUP | {missing: ""} if how == "empty" else dict(GROUP)
    if how == "absent":
        del variables[missing]
    with pytest.raises(InputError, match=f"^the variable {missing} is missing though .*torchrun"):
        process_group.read_place(environment=variables)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "-1", "1.0", "٣", " 1", "9" * 5000, "1e3"])
def test_a_launchers_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"^the variable {name} is ") as refused:
        process_group.read_place(environment=GROUP | {name: value})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("changed", [{"RANK": "2"}, {"LOCAL_RANK": "5"}, {"WORLD_SIZE": "0"}])
def test_launchers_variables_that_contradict_each_other_are_refused(changed: dict) -> None:
    with pytest.raises(InputError, match="contradict each other"):
        process_group.read_place(environment=GROUP | changed)


def test_a_rank_without_its_world_trains_nothing(nano: Tiny) -> None:
    """It would train on a part of each batch and leave no file."""
    process = start(["gpt2_ft.py", *nano.argv("run")], env={"RANK": "1"})
    code, out, err = finish(process)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: the variable WORLD_SIZE is missing though RANK is 1;")
    assert not (nano.folder / "run").exists()


DIFFERENT = """
import os, sys
sys.path.insert(0, ROOT)
import gpt2_ft
from common import errors

other = sys.argv[1:3] if os.environ["RANK"] == "1" else []
errors.run(lambda: gpt2_ft.main([*sys.argv[3:], *other]))
"""


@pytest.mark.parametrize(
    "flag, value, name", [("--lr", "0.5", "lr"), ("--train_data", "other.jsonl", "train_data")]
)
def test_a_rank_with_other_settings_or_data_is_named_with_them(
    flag: str, value: str, name: str, nano: Tiny
) -> None:
    if flag == "--train_data":
        value = str(write_rows(nano.folder / value, random_rows(21, seed=9)))
    script = nano.folder / "different.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{DIFFERENT}", encoding="utf-8")
    code, _, err = launch(2, [str(script), flag, value, *nano.argv("run")])
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(said) == 1
    assert said[0].startswith(f"error: rank 1 was started with {name} ")
    assert not (nano.folder / "run").exists()


OWN_SENTENCES = """
import os, sys
sys.path.insert(0, ROOT)
from common import errors, process_group
from common.errors import InputError

def main():
    with process_group.speaking_once():
        raise InputError(f"mistake {min(int(os.environ['RANK']), 1)}")

errors.run(main)
"""


def test_a_sentence_that_all_ranks_meet_is_said_once_and_another_by_its_rank(nano: Tiny) -> None:
    """Before the ranks have met, after it, and where ranks differ."""
    absent = nano.argv("run", "--train_data", "absent.jsonl")
    for argv in (nano.argv("run", "--lora_dim", "x"), absent):
        code, _, err = launch(2, ["gpt2_ft.py", *argv])
        assert code == 1 and err.count("error: ") == 1, err
    assert not (nano.folder / "run").exists()
    script = nano.folder / "own.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{OWN_SENTENCES}", encoding="utf-8")
    _, _, err = launch(3, [str(script)])
    assert sorted(line for line in err.splitlines() if line.startswith("error: ")) == [
        "error: mistake 0", "error: mistake 1", "error: mistake 1",
    ]  # fmt: skip
