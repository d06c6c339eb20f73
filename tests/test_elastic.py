"""Workers that die or hang: torchrun starts all anew and the adapter comes out the same; the others
never wait longer than stated, and name who is missing."""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Tiny, _write_tiny, finish, start

import gpt2_ft
import gpu
from common import process_group
from common.errors import InputError
from common.process_group import Place
from training.resume import check_equal_states

FORK = multiprocessing.get_context("fork")
DYING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, ROOT)
import gpt2_ft

real = gpt2_ft.optimizer_step
died = Path(OUT)

def step(run, rows):
    if run.step == 7 and run.runtime.rank == 1 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, rows)

gpt2_ft.optimizer_step = step
gpt2_ft.main()
"""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def agents(count: int, script: str | Path, argv: list[str]) -> list:
    """As many torchrun agents as asked for, with two processes between them."""
    place = ["--nnodes", count, "--nproc_per_node", 2 // count, "--max-restarts", 3]
    if count == 1:
        place.append("--standalone")
    else:
        place += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        place += ["--rdzv-id", "run", "--local-addr", "127.0.0.1"]
    command = ["-m", "torch.distributed.run", *place, script, *argv, "--resume", "auto"]
    return [start(command) for _ in range(count)]


def last_adapter(folder: Path) -> bytes:
    return (folder / "model.12.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, bytes]:
    """A tiny run, and the adapter that two processes end with when nothing happens to them."""
    nano = _write_tiny(tmp_path_factory.mktemp("elastic"), "gpt2.nano")
    port, argv = free_port(), nano.argv("whole", "--max_epoch", 4)
    ranks = [FORK.Process(target=_train, args=(rank, port, argv)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return nano, last_adapter(nano.folder / "whole")


def _train(rank: int, port: int, argv: list[str]) -> None:
    _become_rank(rank, 2, port)
    gpt2_ft.main(argv)


def _become_rank(rank: int, world_size: int, port: int) -> None:
    """Set what a launcher would; forked processes need none, and start at once."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in where.items()})


@pytest.mark.parametrize("machines", [1, 2])
def test_a_worker_killed_by_9_is_started_anew_and_the_adapter_is_the_same(
    machines: int, undisturbed: tuple[Tiny, bytes]
) -> None:
    """Between two saves, under one launcher and under two that know of each other by a port."""
    nano, expected = undisturbed
    script, died = (nano.folder / f"{name}{machines}" for name in ("dying.py", "died"))
    script.write_text(f"ROOT, OUT = {str(ROOT)!r}, {str(died)!r}\n{DYING}", encoding="utf-8")
    argv = nano.argv(f"on{machines}", "--max_epoch", 4)
    done = [finish(process) for process in agents(machines, script, argv)]
    assert [code for code, _, _ in done] == [0] * machines, done
    told = "".join(out + err for _, out, err in done)
    assert died.exists()
    assert "error: rank 0 cannot continue: rank 1 ended or hangs" in told
    assert "Resuming after step 6" in told
    assert told.count("Resuming after") == 1, "it took more than one restart"
    assert last_adapter(nano.folder / f"on{machines}") == expected


def _rank(rank: int, port: int, lost: int, how: str, folder: Path) -> None:
    """Sum with the others until the lost rank ends or sleeps."""
    _become_rank(rank, 3, port)
    sys.stderr = (folder / f"{rank}.txt").open("w", encoding="utf-8")
    parser = argparse.ArgumentParser()
    gpu.add_gpu_params(parser)
    args = parser.parse_args(["--device", "cpu", "--dist_timeout", "3"])
    if how == "never starts" and rank == lost:
        return
    runtime = gpu.parse_gpu(args)
    with process_group.naming_lost_ranks("try again"):
        for i in range(10**6):
            if i == 5 and rank == lost:
                os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
            runtime.sum(1.0)


@pytest.mark.parametrize(
    "lost, how, seconds", [(1, "dies", 3), (0, "dies", 3), (2, "hangs", 9), (2, "never starts", 9)]
)
def test_a_rank_that_is_lost_is_named_in_a_sentence_within_the_stated_time(
    lost: int, how: str, seconds: float, tmp_path: Path
) -> None:
    port, started = free_port(), time.monotonic()
    ranks = [
        FORK.Process(target=_rank, args=(rank, port, lost, how, tmp_path)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    others = [rank for rank in range(3) if rank != lost]
    for rank in others:
        ranks[rank].join(30)
    took = time.monotonic() - started
    ranks[lost].kill()
    told = {rank: (tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in others}
    assert [ranks[rank].exitcode for rank in others] == [1, 1], told
    assert took < seconds + 2
    for rank, text in told.items():
        if how == "never starts":
            assert f"error: rank {rank} could not join the 3 processes within" in text
            assert text.count("\n") == 1
            continue
        assert text == (
            f"error: rank {rank} cannot continue: rank {lost} ended or hangs (ranks wait 3 seconds "
            "for each other, --dist_timeout); try again\n"
        )


class StoreThatGoes:
    """Says that ranks 0 and 1 are alone, if they are told to, and is then gone."""

    def __init__(self, alone: set[int]) -> None:
        self.alone, self.asked = alone, 0

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        if self.asked > 3:
            raise RuntimeError("Broken pipe")
        return int(keys[0].split()[0]) in self.alone


@pytest.mark.parametrize("alone, absent", [({0, 1}, {2}), ({1}, {0})])
def test_a_store_that_goes_with_rank_0_does_not_hide_who_was_lost_before(
    alone: set[int], absent: set[int]
) -> None:
    group = process_group.Group(Place(1, 3, 1), StoreThatGoes(alone), 9)
    assert process_group._absent_ranks(group) == absent


def test_each_start_of_the_group_has_a_name_of_its_own_in_one_store() -> None:
    store, names = dist.HashStore(), []
    for _ in range(3):
        ranks = [process_group.Group(Place(rank, 3, rank), store, 9) for rank in range(3)]
        with ThreadPoolExecutor(3) as pool:
            (name,) = set(pool.map(process_group._agree_on_name, ranks))
        names.append(name)
    assert len(set(names)) == 3
    alone = process_group.Group(Place(0, 3, 0), store, 0.1)
    with pytest.raises(SystemExit, match="error: ranks 1, 2 did not start within"):
        process_group._agree_on_name(alone)


def test_an_error_of_the_program_itself_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = process_group.Group(Place(0, 2, 0), dist.HashStore(), 9)
    monkeypatch.setattr(process_group, "_group", group)
    with pytest.raises(RuntimeError, match="shape"), process_group.naming_lost_ranks("no"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_ranks_that_find_different_states_are_told_to_share_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu.Runtime, "gather", lambda self, value: [6, value])
    runtime = gpu.Runtime(torch.device("cpu"), 1, 2, 1)
    with pytest.raises(InputError, match="step 6 for rank 0 and of step 0 for rank 1.*share"):
        check_equal_states(runtime, Path("runs/x"), None)
