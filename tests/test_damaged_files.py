"""Damaged checkpoints and full disks: one sentence, exit code 2, and nothing half-written."""

import json
import pickle
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import FUZZ, TINY_CARD, VOCABULARY, Tiny, nothing_half_written, random_base, refusal

import checkpoints
import gpt2_ft
from common.errors import InputError
from common.files import replacing
from model import GPT2Config, GPT2LMModel
from training import resume


def mutated(data: bytes, seed: int) -> bytes:
    """Cut, or with some bytes changed, most of them at the front where headers are."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 4, 16])):
        content[draw.randrange(draw.choice([16, 300, len(data)]))] = draw.randrange(256)
    return bytes(content)


def load_base(path: Path) -> None:
    model = GPT2LMModel(GPT2Config(VOCABULARY, 32, **TINY_CARD))
    checkpoints.load_base(model, checkpoints.read_base(path))


READERS = {
    "a.safetensors": load_base, "a.pt": load_base, "legacy.bin": load_base,
    "model.3.safetensors": checkpoints.read_adapter, "state.pt": resume.State.read,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_damaged_checkpoints_are_refused_by_name_or_read_without_a_crash(
    name: str, tiny: Tiny
) -> None:
    state, path = random_base(TINY_CARD), tiny.folder / name
    if name in ("model.3.safetensors", "state.pt"):
        gpt2_ft.main(tiny.argv("run", "--max_step", 3))
        path = tiny.folder / "run" / name
    elif name.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "legacy.bin")
    data, refused = path.read_bytes(), 0
    count = 250 * FUZZ
    for seed in range(count):
        path.write_bytes(mutated(data, seed))
        try:
            READERS[name](path)
        except InputError as error:
            assert name in str(error) and "\n" not in str(error)
            refused += 1
    print(f"{name}: {count} damaged files, {refused} refused, the others read as they are")
    assert refused > count / 5


def test_a_damaged_state_gives_the_undisturbed_run_or_a_refusal(tiny: Tiny) -> None:
    """Wherever a byte changed: what torch.load lets pass would be another run."""
    flags = ("--max_step", 4, "--valid_samples", 0)
    gpt2_ft.main(tiny.argv("run", "--max_step", 3, "--valid_samples", 0))
    gpt2_ft.main(tiny.argv("whole", "--max_step", 3, "--valid_samples", 0))
    gpt2_ft.main(tiny.argv("whole", *flags, "--resume", "auto", "--resume_anyway"))
    expected = (tiny.folder / "whole" / "model.4.safetensors").read_bytes()
    data, outcomes = (tiny.folder / "run" / "state.pt").read_bytes(), []
    for seed in range(60 * FUZZ):
        folder = tiny.folder / "copy"
        shutil.copytree(tiny.folder / "run", folder)
        (folder / "state.pt").write_bytes(mutated(data, seed))
        try:
            gpt2_ft.main(tiny.argv("copy", *flags, "--resume", "auto", "--resume_anyway"))
            assert (folder / "model.4.safetensors").read_bytes() == expected
            outcomes.append("same")
        except InputError as error:
            assert "state.pt" in str(error)
            outcomes.append("refused")
        shutil.rmtree(folder)
    print(f"state.pt: {len(outcomes)} resumed, {outcomes.count('refused')} refused, others equal")
    assert set(outcomes) == {"same", "refused"}


def test_a_damaged_adapter_is_refused_or_is_what_was_saved(tiny: Tiny) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    path = tiny.folder / "run" / "model.3.safetensors"
    data, (header, tensors) = path.read_bytes(), checkpoints.read_adapter(path)
    places = range(0, len(data), max(1, len(data) // (400 * FUZZ)))
    refused = 0
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found_header, found = checkpoints.read_adapter(path)
        except InputError as error:
            assert path.name in str(error)
            refused += 1
            continue
        assert found_header == header and found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    print(f"{path.name}: {len(places)} changed bits, {refused} refused, the others change nothing")
    assert refused > 0.95 * len(places)


@pytest.mark.parametrize("lie", ["length", "offsets", "dtype", "shape", "huge"])
def test_lying_safetensors_headers_are_refused(lie: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    entry |= {
        "offsets": {"data_offsets": [0, 64]},
        "dtype": {"dtype": "F99"},
        "shape": {"shape": [4, 4]},
        "huge": {"shape": [2**40, 2**40]},
    }.get(lie, {})
    header = json.dumps({"wte.weight": entry}).encode()
    length = 2**60 if lie == "length" else len(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(16))
    for folder_or_file in (path, tmp_path):
        with pytest.raises(InputError, match="model.safetensors is damaged"):
            checkpoints.read_base(folder_or_file)


def test_a_scalar_for_an_embedding_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    state = random_base(TINY_CARD) | {"transformer.wte.weight": torch.tensor(1.0)}
    safetensors.torch.save_file(state, tiny.base)
    assert "transformer.wte.weight has shape []" in refusal(tiny.argv("run"), capsys)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"format": 1}, protocol=2)])
def test_a_damaged_state_is_refused_and_left_alone(
    content: bytes, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    path = tiny.folder / "run" / "state.pt"
    path.write_bytes(content)
    assert "state.pt" in refusal(tiny.argv("run", "--max_step", 3, "--resume", "auto"), capsys)
    assert path.read_bytes() == content


@pytest.mark.parametrize("below", ["train.jsonl", "train.jsonl/deeper/run"])
def test_a_work_dir_below_a_file_is_refused(
    below: str, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    before = (tiny.folder / "train.jsonl").read_bytes()
    assert f"{below} cannot be used" in refusal(tiny.argv(below), capsys)
    assert (tiny.folder / "train.jsonl").read_bytes() == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_at_any_point_and_the_run_goes_on_from_its_last_save(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv("whole"))
    whole = tiny.folder / "whole"
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    assert len(sizes) > 4
    for size in (size - 1 for size in sizes if size):
        argv = tiny.argv(f"run{size}", "--resume", "auto")
        with largest_file(size):
            assert "cannot be written: File too large" in refusal(argv, capsys)
        folder = tiny.folder / f"run{size}"
        nothing_half_written(folder)
        gpt2_ft.main(argv)
        for path in whole.glob("model.*"):
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    refused = pytest.raises(InputError, match="file cannot be written")
    with largest_file(10), refused, replacing(path, "wb") as file:
        file.write(bytes(100))
    with pytest.raises(KeyError), replacing(path) as file:
        file.write("new")
        raise KeyError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
