"""What a run comes to before it starts: defaults that follow from others, disk, early errors."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Tiny, random_rows, refusal, write_rows

import gpt2_ft
import model as gpt2
from checkpoints import hub, read_adapter
from common.errors import InputError

BASE = ROOT / "data" / "nano" / "model.safetensors"
SAMPLE = ROOT / "data" / "sample" / "train.jsonl"


def without(argv: list[str], flag: str) -> list[str]:
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


@pytest.mark.parametrize("steps, warmup", [(9, 0), (10, 1), (240, 24), (4999, 499), (26290, 500)])
def test_the_warm_up_is_the_recipes_or_a_tenth_of_the_steps(
    steps: int, warmup: int, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    argv = without(tiny.argv("run", "--max_step", steps, "--dry_run"), "--warmup_step")
    gpt2_ft.main(argv)
    assert f"{steps:,} in all, {warmup:,} of them warm-up" in capsys.readouterr().out


def test_defaults_that_follow_from_others_stand_in_the_header_and_in_run_json(tiny: Tiny) -> None:
    argv = tiny.argv("run")
    for flag in ("--warmup_step", "--log_interval", "--model_card"):
        argv = without(argv, flag)
    gpt2_ft.main(argv)
    header, _ = read_adapter(tiny.folder / "run")
    assert (header.settings["warmup_step"], header.settings["max_step"]) == (1, 12)
    assert header.model_card == "gpt2.tiny"
    flags = json.loads((tiny.folder / "run" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert (flags["warmup_step"], flags["log_interval"], flags["keep_last"]) == (1, 1, 0)
    assert flags["model_card"] == "gpt2.tiny"


def test_training_all_weights_keeps_the_last_two_adapters_and_the_best(tiny: Tiny) -> None:
    def kept(work_dir: str, *more: object) -> list[str]:
        gpt2_ft.main(tiny.argv(work_dir, "--save_interval", 1, *more))
        names = [path.name for path in (tiny.folder / work_dir).glob("model.*.safetensors")]
        return sorted(name.split(".")[1] for name in names)

    assert kept("full", "--lora_dim", 0) == ["11", "12", "best"]
    assert len(kept("all", "--lora_dim", 0, "--keep_last", 0)) == 13
    assert len(kept("lora")) == 13


def test_the_card_follows_from_the_base_and_a_contradiction_names_the_right_one(
    capsys: pytest.CaptureFixture,
) -> None:
    argv = ["--train_data", SAMPLE, "--vocab", ROOT / "data" / "nano", "--init_checkpoint", BASE]
    argv = [*map(str, argv), "--dry_run"]
    gpt2_ft.main(argv)
    assert "gpt2.nano: 16,384 trainable parameters of 3,831,296" in capsys.readouterr().out
    for more in (["--dry_run"], []):
        err = refusal([*argv[:-1], "--model_card", "gpt2.md", *more], capsys)
        assert "these weights are gpt2.nano's" in err


@pytest.mark.parametrize("more", [["--dry_run"], []], ids=["dry", "real"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--scheduler", "noam"], "--scheduler noam is unknown"),
        (["--scheduler", "cycle", "--i_steps", "1", "--i_lrs", "1"], "--i_steps 1"),
        (["--scheduler", "cycle", "--i_steps", "0,5"], "--scheduler cycle needs --i_lrs"),
        (["--i_lrs", "1e-3"], "--i_lrs is for --scheduler cycle"),
        (["--i_steps", "0", "--scheduler", "linear"], "--i_steps is for --scheduler cycle"),
        (["--optimizer", "apex"], "--optimizer apex needs a CUDA device"),
        (["--no_correct_bias", "--optimizer", "torch"], "--no_correct_bias goes with"),
        (["--max_step", "5", "--warmup_step", "5"], "--warmup_step 5 .*below the 5 steps"),
        (["--lora_targets", "x"], "--lora_targets 'x'"),
        (["--init_checkpoint", "absent.pt"], "absent.pt does not exist"),
        (["--model_card", "gpt2.huge"], "gpt2.huge is unknown"),
        (["--vocab", "absent"], "absent"),
        (["--seq_len", "5000"], "--seq_len 5000 is above"),
    ],
)
def test_what_can_be_refused_before_data_are_read_is(
    flags: list[str], message: str, more: list[str], tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    (tiny.folder / "train.jsonl").unlink()
    err = refusal(tiny.argv("run", *flags, *more), capsys)
    assert re.search(message, err), err
    assert not (tiny.folder / "run").exists()


def test_a_dry_run_says_how_much_disk_the_run_takes(
    tiny: Tiny, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work_dir, more in (("lora", ["--lora_dim", 16]), ("full", ["--lora_dim", 0])):
        argv = tiny.argv(work_dir, *more, "--save_interval", 2)
        capsys.readouterr()
        gpt2_ft.main([*argv, "--dry_run"])
        sizes = re.search(
            r"Disk: up to (\S+ \wB), (\d+) adapters of (\S+ \wB) and the best one, and a state of "
            r"(\S+ \wB)\n", capsys.readouterr().out,
        )  # fmt: skip
        total, adapter, state = (in_bytes(sizes[i]) for i in (1, 3, 4))
        gpt2_ft.main(argv)
        files = list((tiny.folder / work_dir).glob("model.*.safetensors"))
        assert files[0].stat().st_size == pytest.approx(adapter, rel=0.3, abs=5000)
        assert (tiny.folder / work_dir / "state.pt").stat().st_size == pytest.approx(
            state, rel=0.3, abs=60_000
        )
        assert len(files) - 1 in (int(sizes[2]), int(sizes[2]) - 1)
        assert sum(path.stat().st_size for path in files) < total + 60_000
    usage = gpt2_ft.show_plan.__globals__["print_disk"].__globals__["shutil"]
    monkeypatch.setattr(usage, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    gpt2_ft.main([*argv, "--work_dir", str(tiny.folder / "new"), "--dry_run"])
    assert "only 1 kB are free, see --keep_last" in capsys.readouterr().out


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]


def test_a_dry_run_of_a_published_base_downloads_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hub, "_download", None)
    monkeypatch.setattr(hub, "FOLDER", tiny.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    write_rows(tiny.folder / "train.jsonl", random_rows(5))
    argv = ["--train_data", str(tiny.folder / "train.jsonl"), "--dry_run", "--init_checkpoint"]
    for name, card in hub.CARDS.items():
        gpt2_ft.main([*argv, name])
        assert f"{card}: " in capsys.readouterr().out
    assert hub.CARDS.keys() == hub.REPOSITORIES.keys()
    assert set(hub.CARDS.values()) <= gpt2.MODEL_CARDS.keys()


def test_settings_are_shown_where_they_are_not_the_recipes(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3, "--label_smooth", 0.25))
    out = capsys.readouterr().out
    table = re.search(r"Settings other than .*run\.json has all\):\n((?:  .*\n)+)", out)[1]
    shown = dict(line.split() for line in table.splitlines())
    assert shown["label_smooth"] == "0.25" and shown["lora_dim"] == "2"
    assert not {"weight_decay", "obj", "uses_sample", "train_data", "work_dir"} & shown.keys()
    assert max(map(len, out.splitlines())) < 400


def test_every_help_text_is_a_sentence() -> None:
    for action in gpt2_ft.build_parser()._actions[1:]:
        text = action.help
        if text != "==SUPPRESS==":
            assert text and text.endswith(".") and "None" not in text, action.option_strings
            assert text[0].isupper() or text.startswith("auto, or"), text


def test_the_sample_without_a_number_of_steps_keeps_its_own_warm_up() -> None:
    assert gpt2_ft.parse_args([]).warmup_step == 50
    assert gpt2_ft.parse_args(["--max_step", "30"]).warmup_step is None
    assert gpt2_ft.parse_args(["--max_step", "30", "--warmup_step", "3"]).warmup_step == 3


@pytest.mark.parametrize("path", ["absent", "x/absent.safetensors"])
def test_shapes_of_a_base_that_is_not_there_are_refused(path: str) -> None:
    from checkpoints import read_shapes

    with pytest.raises(InputError, match="does not exist"):
        read_shapes(Path(path))
