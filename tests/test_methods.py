"""The methods of the paper's table 3 besides LoRA: their counts, flags, files and resuming."""

from pathlib import Path

import pytest
import torch
from conftest import METHODS, Tiny, random_rows, refusal, write_rows

import checkpoints
import gpt2_beam
import gpt2_ft
from checkpoints import AdapterHeader
from common.errors import InputError
from methods import TABLE_3, BottleneckConfig, is_added
from methods.paper import Row
from model import MODEL_CARDS, GPT2Config, GPT2LMModel
from training import setup
from training.flags import METHODS as ALL_METHODS
from training.resume import State

SPELLINGS = {"full": ["--lora_dim", "0"], "bitfit": ["--lora_dim", "0", "--train_bias", "all"]}


@pytest.mark.parametrize(
    "card, flags, count",
    [
        ("gpt2.md", "--method adapter_l", 368_784),
        ("gpt2.md", "--method adapter_l --adapter_dim 6", 368_784),
        ("gpt2.md", "--method adapter_l --adapter_dim 224", 11_089_152),
        ("gpt2.lg", "--method adapter_l --adapter_dim 8", 875_808),
        ("gpt2.lg", "--method adapter_l --adapter_dim 248", 23_002_848),
        ("gpt2.md", "--method adapter_h", 11_064_576),
        ("gpt2.md", "--method full", 354_823_168),
        ("gpt2.md", "--method top2", 25_194_496),
        ("gpt2.md", "--lora_dim 0 --train_top 2", 25_192_448),
        ("gpt2.md", "--method bitfit", 271_360),
        ("gpt2.md", "--method lora --lora_dim 4", 393_216),
        ("gpt2.lg", "--method lora", 737_280),
    ],
)
def test_as_many_numbers_are_trained_as_the_paper_counts(card: str, flags: str, count: int) -> None:
    given = ["--train_data", "x", "--init_checkpoint", "none", "--model_card", card]
    args = gpt2_ft.parse_args([*given, *flags.split()])
    with torch.device("meta"):
        model = setup.build_model(args, None, None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method full --lora_dim 4", "--lora_dim 4 contradicts --method full"),
        ("--method lora --lora_dim 0", "--lora_dim 0 contradicts --method lora"),
        ("--method lora --train_top 1", "--train_top 1 contradicts --method lora"),
        ("--method full --train_bias all", "--train_bias all contradicts --method full"),
        ("--method bitfit --train_bias none", "--train_bias none contradicts --method bitfit"),
        ("--method top2 --train_top 1", "--train_top 1 contradicts --method top2"),
        ("--method adapter_l --lora_kind dora", "--lora_kind is for --method lora"),
        ("--method top2 --lora_alpha 8", "--lora_alpha is for --method lora"),
        ("--method full --adapter_dim 4", "is for --method adapter_l and adapter_h"),
        ("--adapter_dim 4", "--adapter_dim is for --method adapter_l and adapter_h"),
        ("--lora_dim 0 --adapter_dim 4", "--adapter_dim is for --method adapter_l and adapter_h"),
        ("--method adapter_l --adapter_dim 0", "--adapter_dim 0 must be at least 1"),
        ("--method adapter_l --adapter_dim 17", "--adapter_dim 17 is above the model's width 16"),
        ("--method prefix --prefix_hidden 65537", "--prefix_hidden 65537 must be at most 65536"),
        ("--method lora --prefix_length 4", "--prefix_length is for --method prefix"),
        ("--lora_dim 0 --prefix_hidden 4", "--prefix_hidden is for --method prefix"),
        ("--method prefix --adapter_dim 4", "is for --method adapter_l and adapter_h"),
        ("--method prefix --lora_dim 4", "--lora_dim 4 contradicts --method prefix"),
        ("--method prefix --prefix_length 0", "--prefix_length 0 must be at least 1"),
        ("--method prefix", "with a prefix of 5 is above the model's 32; give at most 27"),
        (
            "--method prefix --prefix_length 32",
            "--prefix_length or the adapter's header: a prefix of 32 leaves no room",
        ),
        ("--method prefix --prefix_length 31", "a prefix of 31 leaves no room in 32 positions"),
        ("--method lora_l", "invalid choice: 'lora_l'"),
    ],
)
def test_flags_that_contradict_the_method_are_refused(
    tiny: Tiny, capsys: pytest.CaptureFixture, flags: str, message: str
) -> None:
    assert message in refusal(tiny.argv_of(flags.split(), "run"), capsys)
    assert not (tiny.folder / "run").exists()


@pytest.mark.parametrize(
    "row",
    [row for row in TABLE_3 if row.method in ALL_METHODS],
    ids=lambda row: f"{row.card} {row.name} {row.printed}",
)
def test_a_dry_run_of_a_row_of_table_3_prints_the_papers_count_and_ours(
    row: Row, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"lora": "--lora_dim", "prefix": "--prefix_length"}
    size = [sizes.get(row.method, "--adapter_dim"), str(row.size)] if row.size else []
    published = {"gpt2.md": "gpt2-medium", "gpt2.lg": "gpt2-large"}[row.card]
    write_rows(tiny.folder / "train.jsonl", random_rows(5))
    argv = ["--train_data", str(tiny.folder / "train.jsonl"), "--init_checkpoint", published]
    gpt2_ft.main([*argv, "--method", row.method, *size, "--dry_run"])
    out = capsys.readouterr().out
    assert f"The LoRA paper's table 3, {row.name}: {row.printed}" in out
    assert f"; here {row.count:,}\n" in out
    if row.name != "PreLayer":
        assert f"{row.card}: {row.count:,} trainable parameters of" in out


@pytest.mark.parametrize(
    "flags",
    ["--lora_dim 8", "--lora_targets q,k", "--train_bias all", "--lora_kind dora",
     "--method adapter_l --adapter_dim 7", "--lora_dim 0 --train_top 2", "--method bitfit"],
)  # fmt: skip
def test_a_dry_run_of_another_setting_prints_no_count_of_the_paper(
    flags: str, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--train_data", str(tiny.folder / "train.jsonl"), "--init_checkpoint", "none"]
    gpt2_ft.main([*argv, "--model_card", "gpt2.md", *flags.split(), "--dry_run"])
    assert "table 3" not in capsys.readouterr().out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model.*.safetensors"))}


@pytest.mark.parametrize("method", SPELLINGS)
def test_an_older_spelling_gives_the_same_bytes(tiny: Tiny, method: str) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[method], "new", "--max_step", 3))
    gpt2_ft.main(tiny.argv_of(SPELLINGS[method], "old", "--max_step", 3))
    assert files(tiny.folder / "new") == files(tiny.folder / "old") != {}


# The numbers of a prefix are not trained: they are made by what is.
@pytest.mark.parametrize("method", [method for method in METHODS if method != "prefix"])
def test_what_is_saved_is_what_is_trained_and_it_changed(tiny: Tiny, method: str) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[method], "run"))
    header, tensors = checkpoints.read_adapter(tiny.folder / "run:last")
    model, _ = checkpoints.load(tiny.base, tiny.folder / "run:last")
    own, base = model.state_dict(), checkpoints.read_base(tiny.base).tensors
    state = State.read(tiny.folder / "run" / "state.pt").trained
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor) and torch.equal(state[name], tensor)
        assert name not in base or not torch.equal(base[name], tensor), name
    for name in base.keys() - tensors.keys():
        assert torch.equal(own[name], base[name])
    assert header and header.method == {"bitfit": "bias"}.get(method, method)


@pytest.mark.parametrize("kind", ["adapter_l", "adapter_h"])
def test_a_resume_under_another_width_or_method_is_refused(
    tiny: Tiny, capsys: pytest.CaptureFixture, kind: str
) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[kind], "run", "--max_step", 3))
    again = ["run", "--resume", "auto", "--max_step", 3]
    wider = tiny.argv_of(["--method", kind, "--adapter_dim", "4"], *again)
    assert "dim changed since the run was started (dim was 3, is 4)" in refusal(wider, capsys)
    message = refusal([*wider, "--resume_anyway"], capsys)
    assert "--adapter_dim was 3 and is 4, which the saved state does not fit" in message
    full = tiny.argv_of(["--method", "full"], *again, "--resume_anyway")
    assert f"--method was {kind} and is full" in refusal(full, capsys)


@pytest.mark.parametrize("kind", ["adapter_l", "adapter_h"])
def test_an_adapter_that_lacks_a_tensor_or_has_another_shape_is_refused(
    tiny: Tiny, kind: str
) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[kind], "run", "--max_step", 3))
    base = checkpoints.read_base(tiny.base)
    header, tensors = checkpoints.read_adapter(tiny.folder / "run:last")
    assert isinstance(header, AdapterHeader) and header.bottleneck == BottleneckConfig(3, kind)
    assert tensors and all(is_added(name) for name in tensors)
    name, tensor = tensors.popitem()
    with pytest.raises(InputError, match=f"lacks 1 tensors, first {name}"):
        checkpoints.assemble(base, header, tensors, "a")
    with pytest.raises(InputError, match=f"tensor {name} of shape .* does not fit"):
        checkpoints.assemble(base, header, tensors | {name: tensor[None]}, "a")


def test_a_model_has_one_adapter() -> None:
    with pytest.raises(ValueError, match="give one adapter, not both"):
        GPT2Config(**MODEL_CARDS["gpt2.nano"], lora_attn_dim=2, bottleneck=BottleneckConfig(2))
    for dim, kind in ((0, "adapter_l"), (True, "adapter_l"), (2, "adapter"), (2.0, "adapter_h")):
        with pytest.raises(ValueError, match="dim above 0|kind must be one of"):
            BottleneckConfig(dim, kind)


@pytest.mark.parametrize("method", METHODS)
def test_the_predictions_of_a_run_come_from_its_adapter(
    tiny: Tiny, method: str, tmp_path: Path
) -> None:
    gpt2_ft.main(tiny.argv_of(METHODS[method], "run", "--lr", 0.1))
    argv = ["--data", tiny.folder / "valid.jsonl", "--adapter", tiny.folder / "run", "--beam", 2]
    argv += ["--init_checkpoint", tiny.base, "--eos_token_id", 1, "--eval_len", 6]
    texts = {}
    for name, own in {
        "one": argv, "again": [*argv, "--batch_size", 1], "base": [*argv[:2], *argv[4:]],
    }.items():  # fmt: skip
        output = tmp_path / f"{name}.jsonl"
        gpt2_beam.main([*map(str, own), "--output_file", str(output), "--device", "cpu"])
        texts[name] = output.read_text(encoding="utf-8")
    assert texts["one"] == texts["again"] != texts["base"]


def test_a_model_of_another_kind_of_bottleneck_has_other_tensors() -> None:
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 8, "n_positions": 8}
    plain = GPT2LMModel(GPT2Config(**shape)).state_dict().keys()
    found = {}
    for kind in ("adapter_l", "adapter_h"):
        model = GPT2LMModel(GPT2Config(**shape, bottleneck=BottleneckConfig(2, kind)))
        found[kind] = model.state_dict().keys() - plain
        assert all(is_added(name) for name in found[kind])
        assert not any(is_added(name) for name in plain)
    assert not found["adapter_l"] & found["adapter_h"]
