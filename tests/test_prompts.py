"""Prompts by flag and at a terminal: what stands on stdout, what the commands do, what is said."""

import builtins
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import decoding
import gpt2_beam
import gpt2_ft
import gpu
from common import errors
from common.errors import InputError
from data_utils import load_tokenizer
from decoding import SamplingSettings, SearchSettings
from decoding.generate import SAMPLING, SEARCH
from decoding.prompts import Choices, one_line

NANO = ROOT / "data" / "nano"
PUB, BISTRO = "name : The Vaults | Type : pub", "name : The Green Owl | Type : bistro"
SHORT = ("--beam", "3", "--eval_len", "10", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two short runs on the shipped sample."""
    folder = tmp_path_factory.mktemp("runs")
    rows = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[:40]) + "\n", encoding="utf-8")
    for name, lr in (("one", 0.02), ("two", 0.05)):
        flags = ["--train_data", folder / "train.jsonl", "--vocab", NANO, "--valid_samples", 0]
        flags += ["--init_checkpoint", NANO, "--model_card", "gpt2.nano", "--seq_len", 128]
        flags += ["--max_step", 4, "--warmup_step", 0, "--lr", lr, "--lora_alpha", 32]
        gpt2_ft.main([str(f) for f in [*flags, "--device", "cpu", "--work_dir", folder / name]])
    return {name: folder / name for name in ("one", "two")}


def best(adapter: Path | None, text: str, **more: object) -> list[str]:
    """The lines that stand for the best texts of a model, by the Python entry."""
    model, _ = checkpoints.load(NANO, adapter)
    tokenizer = load_tokenizer(NANO)
    chosen = {"beam": 3, "eval_len": 10} if not more.get("do_sample") else {"eval_len": 10}
    [found] = decoding.generate(model, tokenizer, [text], **chosen | more)
    return [f"{h.score:.4f}\t{one_line(decoding.text_of(h, tokenizer))}" for h in found]


def answer(capsys: pytest.CaptureFixture, *argv: object) -> tuple[list[str], str]:
    """Lines of stdout, and stderr, of the program in this process."""
    capsys.readouterr()
    gpt2_beam.main([*SHORT, *map(str, argv)])
    out, err = capsys.readouterr()
    return out.splitlines(), err


def same(lines: list[str], expected: list[str]) -> bool:
    """Whether lines are equal but for the last digit of a score."""
    if len(lines) != len(expected):
        return False
    for line, other in zip(lines, expected, strict=True):
        (*labels, score, text), (*others, number, words) = line.split("\t"), other.split("\t")
        if (labels, text) != (others, words) or abs(float(score) - float(number)) > 1e-3:
            return False
    return True


def test_the_texts_of_a_prompt_are_all_that_stands_on_stdout(
    runs: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    argv = ("--adapter", runs["one"], "--prompt", PUB, "--num_return_sequences", 2)
    lines, err = answer(capsys, *argv)
    assert same(lines, best(runs["one"], PUB, num_return_sequences=2))
    assert f"Adapter {runs['one']}" in err and PUB not in err
    lines, err = answer(capsys, *argv, "--prompt", BISTRO)
    both = [
        line for text in (PUB, BISTRO) for line in best(runs["one"], text, num_return_sequences=2)
    ]
    assert same(lines, both)
    assert err.index(PUB) < err.index(BISTRO)


def test_base_and_several_adapters_answer_side_by_side(
    runs: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    lines, _ = answer(capsys, "--adapter", runs["one"], "--with_base", "--prompt", PUB)
    expected = [
        f"{name}\t{best(path, PUB)[0]}"
        for name, path in ((runs["one"], runs["one"]), ("base", None))
    ]
    assert same(lines, expected)
    named = [flag for name in runs for flag in ("--adapter", f"{name}={runs[name]}")]
    lines, _ = answer(capsys, *named, "--prompt", PUB)
    assert same(lines, [f"{name}\t{best(path, PUB)[0]}" for name, path in runs.items()])
    lines, err = answer(capsys, "--prompt", PUB)
    assert same(lines, best(None, PUB)) and "the base alone" in err


def test_a_lone_adapter_file_answers_with_base_and_vocabulary_given(
    runs: dict[str, Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(runs["two"] / "model.4.safetensors", tmp_path / "alone.safetensors")
    files = ("--init_checkpoint", NANO, "--vocab", NANO)
    lines, _ = answer(capsys, "--adapter", tmp_path / "alone.safetensors", *files, "--prompt", PUB)
    assert same(lines, best(runs["two"], PUB))
    gpt2_ft.main(tiny.argv("ids"))
    shutil.copy(tiny.folder / "ids" / "model.12.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is not the base that the adapter was trained on"):
        answer(capsys, "--adapter", tmp_path / "other.safetensors", *files, "--prompt", PUB)
    with pytest.raises(InputError, match="--vocab is missing; a prompt is text"):
        answer(capsys, "--init_checkpoint", tiny.base, "--prompt", PUB)


WRONG = [
    (("--prompt", ""), "the prompt is empty; give a context as in the data"),
    (("--prompt", PUB, "--prompt", " "), "the prompt is empty"),
    (("--prompt", "name : " * 300), "is too long: its 603 tokens and eval_len 10 exceed"),
    (("--prompt", "a b c d e f", "--seq_len", 12), "exceed the window of 12"),
    (("--prompt", "a\udcff"), "is not UTF-8"),
    (("--prompt", PUB, "--seq_len", 513), "--seq_len 513 is above the model's 512"),
    (("--prompt", PUB, "--adapter", "nowhere"), "--adapter nowhere does not exist"),
    (("--prompt", PUB, "--with_base"), "--with_base sets the base beside an adapter"),
    (("--prompt", PUB, "--data", "x.jsonl"), "--data is for data, which --prompt"),
    (("--prompt", PUB, "--output_file", "x"), "--output_file is for data"),
    (("--with_base", "--adapter", "x", "--data", "x.jsonl"), "--with_base is for prompts"),
    (("--prompt", PUB, "--num_return_sequences", 4), "--num_return_sequences 4 must be from 1"),
]


@pytest.mark.parametrize("argv, sentence", WRONG)
def test_what_cannot_be_answered_is_said_in_a_sentence_on_stderr(
    argv: tuple, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: gpt2_beam.main([*SHORT, *map(str, argv)]))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.search(rf"^error: .*{re.escape(sentence)}.*\n\Z", err, re.MULTILINE)


def test_one_process_answers_and_a_terminal_without_data_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = (gpu.Runtime(torch.device("cpu"), world_size=n) for n in (1, 2))

    def takes(runtime: gpu.Runtime, *argv: str) -> bool:
        return gpt2_beam.takes_prompts(gpt2_beam.parse_args(list(argv)), runtime)

    monkeypatch.setattr(sys, "stdin", None)
    assert takes(one, "--prompt", PUB) and not takes(one)
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stdin", type("", (), {"isatty": lambda self, t=terminal: t})())
        assert takes(one, "--adapter", "x") == terminal
        assert not takes(two, "--adapter", "x")
        for flags in (["--data", "x"], ["--output_file", "x"], ["--work_dir", "x"], ["--resume"]):
            assert not takes(one, *flags)
    with pytest.raises(InputError, match="--prompt is answered by one process"):
        takes(two, "--prompt", PUB)


def test_every_model_is_loaded_once_on_one_copy_of_the_weights(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    read, loaded = [], []
    load, read_base = checkpoints.load, checkpoints.read_base
    monkeypatch.setattr(
        checkpoints, "read_base", lambda path: read.append(read_base(path)) or read[-1]
    )
    monkeypatch.setattr(
        checkpoints,
        "load",
        lambda *given, **more: loaded.append(load(*given, **more)) or loaded[-1],
    )
    named = [flag for name in runs for flag in ("--adapter", f"{name}={runs[name]}")]
    script(monkeypatch, PUB, ":adapter one", PUB, ":both", ":base", ":adapter two", PUB)
    lines, _ = answer(capsys, *named, "--with_base")
    assert len(read) == 1 and len(loaded) == 3 and len(lines) == 5
    parameters = [dict(model.named_parameters()) for model, _ in loaded]
    for name in read[0].tensors:
        assert len({own[name].data_ptr() for own in parameters}) == 1


def script(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Type these lines, then the end of the input, at a terminal that is not there."""
    left: Iterator = iter(lines)

    def typed(prompt: str = "") -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(gpt2_beam, "takes_prompts", lambda args, runtime: True)


def test_commands_choose_who_answers_and_what_is_wrong_ends_nothing(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    one, two = (best(path, PUB)[0] for path in runs.values())
    base = best(None, PUB)[0]
    script(
        monkeypatch, PUB, ":base", PUB, "", ":both", PUB, f":adapter {runs['two']}", PUB,
        ":adapter", ":adapter nowhere", ":shout", ":set", ":help", "name " * 600, KeyboardInterrupt,
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, ""), PUB,
    )  # fmt: skip
    lines, err = answer(capsys, "--adapter", f"one={runs['one']}")
    assert same(lines, [one, base, f"one\t{one}", f"base\t{base}", two, two])
    said = err.split("> ")
    assert "answering: one (beam 3); :help lists the commands" in said[0]
    assert said[5] == "answering: one and the base (beam 3)\n"
    assert said[8].startswith("1 of 1 texts did not end within eval_len 10") or said[8] == ""
    assert said[9] == f"one, {runs['two']}\n"
    assert said[10].startswith("error: --adapter nowhere does not exist; give a file, or a run's")
    assert said[11] == "error: :shout is no command; :help lists them\n"
    assert said[12].startswith("do_sample off, num_return_sequences 1, beam 3, eval_len 10, length")
    assert ":adapter NAME" in said[13]
    assert said[14].startswith("error: prompt 'name name") and "is too long" in said[14]
    assert said[15] == "stopped; :quit ends the program\n"
    assert said[16] == "error: the line is not UTF-8\n"


def test_settings_change_between_prompts(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script(
        monkeypatch, ":set beam 5", ":set num_return_sequences 4", PUB,
        ":set num_return_sequences 1", ":set top_k 7", ":set do_sample on",
        ":set seed 4", BISTRO, PUB, ":set seed 4", BISTRO, ":set beam 0", ":set beam x",
        ":set tune 1", ":set do_sample yes", ":quit", PUB,
    )  # fmt: skip
    lines, err = answer(capsys, "--adapter", runs["one"])
    assert same(lines[:4], best(runs["one"], PUB, beam=5, num_return_sequences=4))
    drawn = {"do_sample": True, "top_k": 7, "seed": 4}
    assert same(lines[4:5], best(runs["one"], BISTRO, **drawn))
    assert lines[6] == lines[4] and len(lines) == 7
    flags = ("--do_sample", "--top_k", 7, "--seed", 4, "--prompt", BISTRO, "--prompt", PUB)
    capsys.readouterr()
    gpt2_beam.main(["--eval_len", "10", "--adapter", str(runs["one"]), *map(str, flags)])
    assert capsys.readouterr().out.splitlines() == lines[4:6]
    assert "top_k has an effect once do_sample is on" in err
    for sentence in (
        "beam 0 must be from 1 to 1000", "beam is a whole number, not 'x'", "'tune' is no setting",
        "do_sample is on or off, not 'yes'",
    ):  # fmt: skip
        assert f"error: {sentence}" in err


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sampled=st.booleans(),
    changes=st.lists(
        st.tuples(
            st.sampled_from(sorted(SEARCH | SAMPLING | {"do_sample", "num_return_sequences", "x"})),
            st.one_of(
                st.sampled_from(["on", "off", "hf", "nan", "-1", "0", "1", "7", ".5", ""]),
                st.text(max_size=4),
            ),
        ),
        max_size=6,
    ),
)
def test_a_change_gives_settings_that_can_be_used_or_one_sentence(
    sampled: bool, changes: list[tuple[str, str]]
) -> None:
    choices = Choices.of(SamplingSettings() if sampled else SearchSettings(), 1)
    for name, text in changes:
        try:
            changed = choices.change(name, text)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        shown = changed.values().get(name)
        assert shown is None or str(shown) == text or float(shown) == float(text)
        assert changed.settings.end_ids == choices.settings.end_ids
        choices = changed


def test_a_text_that_would_move_the_cursor_is_shown_in_one_line() -> None:
    assert one_line("a\nb\tc\x1b[2Jd\u2028é　✓") == "a\\nb\\tc\\x1b[2Jd\\u2028é　✓"


class Terminal:
    """The program at a pseudo-terminal; its stdout too, unless it is to be a pipe."""

    def __init__(self, *argv: object, pipe: bool = False) -> None:
        pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
        fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "gpt2_beam.py", *map(str, argv)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=theirs,
            stdout=subprocess.PIPE if pipe else theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: (
                fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                # Tests that a shell runs in the background would pass on that it is ignored.
                signal.signal(signal.SIGINT, signal.SIG_DFL),
            ),
        )
        os.close(theirs)
        self.read()

    def read(self, until: str = "> ", seconds: float = 120) -> str:
        """What appears up to the next prompt, or whatever the end is."""
        select = pytest.importorskip("select")
        shown, end = b"", time.monotonic() + seconds
        while not shown.endswith(until.encode()):
            assert time.monotonic() < end, shown
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    shown += os.read(self.ours, 4096)
                except OSError:  # the program has ended
                    break
        return shown.decode().replace("\r\n", "\n")

    def type(self, keys: str) -> str:
        """What the terminal shows from these keys to the next prompt."""
        os.write(self.ours, keys.encode())
        return self.read()

    def end(self) -> int:
        os.close(self.ours)
        return self.process.wait(timeout=60)


def test_a_terminal_edits_lines_stops_an_answer_by_ctrl_c_and_ends_by_ctrl_d(
    runs: dict[str, Path],
) -> None:
    terminal = Terminal(*SHORT, "--adapter", f"one={runs['one']}")
    one, base = best(runs["one"], PUB)[0], best(None, PUB)[0]
    backspace, up = "\x7f", "\x1b[A"
    assert one in terminal.type(f"{PUB}x{backspace}\n")
    terminal.type(":base\n")
    assert base in terminal.type(f"{up}{up}\n")
    for setting in ("beam 400", "eval_len 400", "min_length 400"):
        terminal.type(f":set {setting}\n")
    os.write(terminal.ours, f"{BISTRO}\n".encode())
    time.sleep(2)
    started = time.monotonic()
    assert "stopped; :quit ends the program" in terminal.type("\x03")
    assert time.monotonic() - started < 30
    for setting in ("beam 3", "eval_len 10", "min_length 0"):
        terminal.type(f":set {setting}\n")
    assert base in terminal.type(f"{PUB}\n")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_what_is_typed_and_said_at_a_terminal_stays_out_of_a_pipe(runs: dict[str, Path]) -> None:
    terminal = Terminal(*SHORT, "--adapter", runs["one"], pipe=True)
    terminal.type(f"{PUB}\n")
    terminal.type(":set beam 2\n")
    terminal.type(f"{BISTRO}\n")
    os.write(terminal.ours, b":quit\n")
    out, _ = terminal.process.communicate(timeout=60)
    assert same(
        out.decode().splitlines(), best(runs["one"], PUB) + best(runs["one"], BISTRO, beam=2)
    )
    assert terminal.end() == 0
