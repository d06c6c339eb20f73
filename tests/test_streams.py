"""What is printed never ends a run: streams that are closed, broken, full or without a letter."""

import io
import subprocess
import sys

import pytest
from conftest import ROOT, Tiny, finish, start

from common import errors
from common.streams import LastingStream, make_lasting


class Broken(io.StringIO):
    """A pipe whose reader left, or a disk that is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


GONE = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed file")]


@pytest.mark.parametrize("error", GONE)
def test_text_for_a_reader_that_left_is_dropped(error: Exception) -> None:
    stream = LastingStream(Broken(error))
    assert stream.write("abc") == 3
    stream.flush()
    print("more", file=stream, flush=True)


def test_letters_that_an_encoding_lacks_are_written_as_escapes() -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("é → 王", file=stream, flush=True)
    assert raw.getvalue() == b"\\xe9 \\u2192 \\u738b\n"
    assert stream.encoding == "ascii" and not stream.isatty()


def test_a_stream_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    make_lasting()
    first = sys.stdout
    make_lasting()
    assert sys.stdout is first
    print("nothing", file=sys.stderr, flush=True)


def test_an_interrupt_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(interrupted)
    assert (ended.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


def test_files_never_get_the_numbers_of_closed_streams() -> None:
    code = "from common.streams import make_lasting; make_lasting(); print('lost'); "
    code += "import os; file = open(os.devnull); os._exit(file.fileno())"
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, check=False).returncode > 2


def test_a_run_outlives_its_readers(nano: Tiny) -> None:
    """Closed streams, `| head -1`, and an ASCII terminal with a folder whose name it lacks."""
    last = "model.3.safetensors"
    more = ["--max_step", 3, "--valid_samples", 0]
    argv = [sys.executable, "gpt2_ft.py", *map(str, nano.argv("closed", *more))]
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *argv]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0

    process = start(["gpt2_ft.py", *nano.argv("headed", *more)])
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == ""

    plain = {"PYTHONIOENCODING": "ascii"}
    code, out, err = finish(start(["gpt2_ft.py", *nano.argv("é", *more)], env=plain))
    assert (code, err) == (0, "")
    assert "\\xe9" in out.splitlines()[-1]
    files = [(nano.folder / name / last).read_bytes() for name in ("closed", "headed", "é")]
    assert files[0] == files[1] == files[2]


def test_an_error_for_a_reader_that_left_still_has_its_exit_code(nano: Tiny) -> None:
    process = start(["gpt2_ft.py", *nano.argv("run", "--lora_dim", "x")])
    process.stderr.close()
    assert process.wait(60) == 2
