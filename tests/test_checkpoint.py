"""Adapter files, base files and training state: what is written, read and refused."""

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import TINY_CARD, Tiny, random_base
from torch import Tensor

import checkpoints
import gpt2_ft
import loralib as lora
from common.errors import InputError
from model import GPT2Config, GPT2LMModel
from training import resume

PAIR = "transformer.h.0.attn.c_attn.lora_A"


def write_base(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def loaded(tiny: Tiny, adapter: Path | None = None, **given: object) -> GPT2LMModel:
    """The tiny base with an adapter, merged."""
    return checkpoints.merge(checkpoints.load(tiny.base, adapter, **given)[0])


def train(tiny: Tiny, work_dir: str, *more: object) -> Path:
    gpt2_ft.main(tiny.argv(work_dir, *more))
    return tiny.folder / work_dir


def test_equal_weights_have_one_fingerprint_in_every_format_name_and_width(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in random_base(TINY_CARD).items()}
    wide = {name: tensor.float() for name, tensor in state.items()}
    short = {name.removeprefix("transformer."): tensor for name, tensor in wide.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in wide.items()}
    files = [
        write_base(tmp_path / "model.safetensors", state),
        write_base(tmp_path / "a.pt", {"model_state_dict": wrapped}),
        write_base(tmp_path / "a.bin", short | {"lm_head.weight": short["wte.weight"]}),
        write_base(tmp_path / "b.bin", short | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}),
        write_base(tmp_path / "c.bin", wide | {PAIR: torch.zeros(4, 16)}),
        tmp_path,
    ]  # fmt: skip
    prints = {checkpoints.read_base(path).fingerprint for path in files}
    assert len(prints) == 1
    changed = write_base(tmp_path / "d.pt", wide | {"transformer.ln_f.bias": torch.ones(16)})
    assert checkpoints.read_base(changed).fingerprint not in prints


def test_a_training_run_saves_exactly_what_it_trains_under_lora_state_dicts_names(
    tiny: Tiny,
) -> None:
    folder = train(tiny, "run", "--max_step", 6)
    shape = {"vocab_size": 64, "n_positions": 32, **TINY_CARD}
    adapted = GPT2LMModel(GPT2Config(**shape, lora_attn_dim=2))
    names = set(lora.lora_state_dict(adapted))
    files = sorted(folder.glob("model.*.safetensors"))
    assert [file.name for file in files] == [
        "model.3.safetensors",
        "model.6.safetensors",
        "model.best.safetensors",
    ]
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            assert set(opened.keys()) == names
            assert list(opened.metadata()) == ["adapter"]
    assert len({file.stat().st_size for file in files}) == 1


def test_full_fine_tuning_saves_all_weights_and_no_others(tiny: Tiny) -> None:
    folder = train(tiny, "run", "--lora_dim", 0, "--max_step", 3)
    header, tensors = checkpoints.read_adapter(folder)
    base = checkpoints.read_base(tiny.base).tensors
    assert header.kind == "full"
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in base.items()}
    assert all(not torch.equal(tensor, base[name]) for name, tensor in tensors.items())


def test_equal_training_gives_equal_bytes_and_the_header_names_neither_path_nor_time(
    tiny: Tiny,
) -> None:
    first = train(tiny, "first", "--max_step", 4, "--warmup_step", 0, "--lora_alpha", 32)
    argv = tiny.argv("second", "--max_step", 4, "--warmup_step", 0)
    at = argv.index("--lora_alpha")
    gpt2_ft.main(argv[:at] + argv[at + 2 :])  # 32 is the default
    second = tiny.folder / "second"
    for name in ("model.4.safetensors", "model.best.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    header, _ = checkpoints.read_adapter(first / "model.4.safetensors")
    with safetensors.safe_open(first / "model.4.safetensors", "pt") as opened:
        text = opened.metadata()["adapter"]
    seal, fields = json.loads(text)["sha256"], header.to_fields()
    assert len(seal) == 64 and text == json.dumps(fields | {"sha256": seal}, sort_keys=True)
    assert str(tiny.folder) not in text
    assert not {"work_dir", "resume", "world_size", "host"} & set(header.settings)
    kept = {"format", "model_card", "r", "alpha", "dropout", "targets", "kind", "step", "seed"}
    assert kept | {"vocabulary", "base", "settings"} <= set(fields)
    assert (header.step, header.lora.r, header.lora.alpha) == (4, 2, 32)
    run = json.loads((first / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["work_dir"] == str(first)


def test_every_file_of_a_run_is_read_without_unpickling_objects(tiny: Tiny) -> None:
    folder = train(tiny, "run", "--max_step", 3)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    assert state["progress"]["step"] == 3
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        ".lock", "log.jsonl", "model.3.safetensors", "model.best.safetensors", "run.json",
        "state.pt",
    ]  # fmt: skip


def test_base_and_adapter_give_the_trained_models_logits_merged_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    real = gpt2_ft.prepare
    monkeypatch.setattr(gpt2_ft, "prepare", lambda *a: runs.append(real(*a)) or runs[-1])
    folder = train(tiny, "run", "--max_step", 6)
    trained = runs[0].model.eval()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained(ids)[0]
        model, header = checkpoints.load(tiny.base, folder)
        plain, no_header = checkpoints.load(tiny.base)
        assert torch.equal(model(ids)[0], expected)
        assert (checkpoints.merge(model)(ids)[0] - expected).abs().max() < 1e-5
        assert (plain(ids)[0] - expected).abs().max() > 1e-3
    assert (header.step, no_header) == (6, None)
    assert all(m.merged for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lora_alpha": 128}, "lora_alpha 128 contradicts.*8.0"),
        ({"lora_dim": 0}, "lora_dim 0 contradicts.*2"),
        ({"model_card": "gpt2.sm"}, "model_card gpt2.sm contradicts.*gpt2.tiny"),
    ],
)
def test_flags_that_contradict_the_adapter_are_refused(
    given: dict, message: str, tiny: Tiny
) -> None:
    folder = train(tiny, "run", "--max_step", 3)
    with pytest.raises(InputError, match=message):
        checkpoints.load(tiny.base, folder, **given)
    checkpoints.load(tiny.base, folder, lora_alpha=8, lora_dim=2, model_card="gpt2.tiny")


def test_another_base_than_the_adapters_is_refused_unless_allowed(tiny: Tiny) -> None:
    folder = train(tiny, "run", "--max_step", 3)
    other = write_base(tiny.folder / "other.safetensors", random_base(TINY_CARD, seed=9))
    with pytest.raises(InputError, match="other.safetensors is not the base.*allow_other_base"):
        checkpoints.load(other, folder)
    checkpoints.load(other, folder, allow_other_base=True)


def test_the_originals_files_decode_once_alpha_is_given(tiny: Tiny) -> None:
    """Its full checkpoints hold base and adapter, others the adapter alone; none holds alpha."""
    folder = train(tiny, "run", "--max_step", 6)
    _, pairs = checkpoints.read_adapter(folder)
    base = checkpoints.read_base(tiny.base).tensors
    whole = write_base(tiny.folder / "full.pt", {"model_state_dict": {**base, **pairs}})
    alone = write_base(tiny.folder / "adapter.pt", {"model_state_dict": pairs})
    ids = torch.arange(9)[None]
    expected = checkpoints.load(tiny.base, folder)[0](ids)[0]
    for given in ((whole, None), (tiny.base, alone)):
        with pytest.raises(InputError, match="--lora_alpha"):
            checkpoints.load(*given)
        assert torch.equal(checkpoints.load(*given, lora_alpha=8)[0](ids)[0], expected)
        with pytest.raises(InputError, match="lora_dim 7 contradicts.*rank 2"):
            checkpoints.load(*given, lora_alpha=8, lora_dim=7)


def test_an_adapter_given_as_base_is_explained(tiny: Tiny) -> None:
    folder = train(tiny, "run", "--max_step", 3)
    with pytest.raises(InputError, match="adapter without its base"):
        checkpoints.read_base(folder / "model.3.safetensors")


def test_adapter_tensors_that_do_not_fit_are_named(tiny: Tiny) -> None:
    folder = train(tiny, "run", "--max_step", 3)
    header, pairs = checkpoints.read_adapter(folder)
    for spoilt, message in (
        (pairs | {"foo": torch.zeros(1)}, "foo"),
        (pairs | {PAIR: torch.zeros(8, 16)}, rf"{PAIR} of shape \[8, 16\].*\[4, 16\]"),
        ({n: t for n, t in pairs.items() if n != PAIR}, f"lacks 1 tensors, first {PAIR}"),
    ):
        path = folder / "spoilt.safetensors"
        checkpoints.save_adapter(path, spoilt, header)
        with pytest.raises(InputError, match=message):
            checkpoints.load(tiny.base, path)


def test_a_runs_folder_means_its_best_adapter_or_without_validation_its_last(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"no model.STEP.safetensors; is it a run's folder"):
        checkpoints.find_adapter(tmp_path)
    for name in ("model.9", "model.10", "model.99.old", ".model.11"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="the run validated nothing; give .*:last"):
        checkpoints.find_adapter(f"{tmp_path}:best")
    path, reason = checkpoints.find_adapter(tmp_path)
    assert (path.name, reason) == ("model.10.safetensors", "the last, step 10")
    (tmp_path / "model.best.safetensors").write_bytes(b"")
    path, reason = checkpoints.find_adapter(tmp_path)
    assert path.name == "model.best.safetensors"
    assert reason == f"the best on validation; {tmp_path}:last is the last"
    for which in ("best", "10", "9"):
        assert checkpoints.find_adapter(f"{tmp_path}:{which}").path.name.split(".")[1] == which
    assert checkpoints.find_adapter(f"{tmp_path}:last").path.name == "model.10.safetensors"
    with pytest.raises(InputError, match=":8: step 8 was not saved; give one of 9, 10"):
        checkpoints.find_adapter(f"{tmp_path}:8")


def test_a_name_that_is_no_run_takes_no_choice_of_a_step(tmp_path: Path) -> None:
    file = tmp_path / "a:3"
    file.write_bytes(b"")
    assert checkpoints.find_adapter(file).path == file
    with pytest.raises(InputError, match="is no work_dir of a run, so leave :last out"):
        checkpoints.find_adapter(f"{file}:last")
    with pytest.raises(InputError, match="nowhere does not exist; give a file"):
        checkpoints.find_adapter(tmp_path / "nowhere")


class MakesFolder:
    """Its unpickling would run code that leaves a trace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    content = {"wte.weight": MakesFolder(tmp_path / "trace")}
    torch.save(content, tmp_path / "a.pt")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("a.pt", "b.bin"):
        for read in (checkpoints.read_tensors, resume.State.read):
            with pytest.raises(InputError, match=f"{name}.*refused.*nothing in it was run"):
                read(tmp_path / name)
    assert not (tmp_path / "trace").exists()
    pickle.loads((tmp_path / "b.bin").read_bytes())
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, {"a": [torch.zeros(1)]}, {5: torch.zeros(1)}, torch.zeros(1), None],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not a file of named tensors"):
        checkpoints.read_tensors(tmp_path / "a.pt")
    with pytest.raises(InputError, match="not a training state"):
        resume.State.read(tmp_path / "a.pt")
