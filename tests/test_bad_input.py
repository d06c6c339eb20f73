"""Whatever is wrong with input: one sentence, exit code 2, nothing half-written, no code run."""

import json
import re
from pathlib import Path

import pytest
from conftest import (
    FUZZ,
    VOCABULARY,
    Tiny,
    finish,
    nothing_half_written,
    refusal,
    start,
    write_rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2_ft
from common import errors
from common.errors import InputError
from data_utils import FT_Dataset, load_tokenizer

FUZZED = settings(
    max_examples=150 * FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


GOOD = b'{"context": [1, 2], "completion": [3]}'
BAD_LINES = {
    "not JSON": (b"hello", "not JSON"),
    "cut short": (GOOD[:-5], "not JSON"),
    "NUL": (b"\0" + GOOD, "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "huge number": (b'{"context": [' + b"1" * 5000 + b'], "completion": [3]}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "not UTF-8": (b'{"context": "\xff", "completion": [3]}', "not UTF-8"),
    "a list": (b"[1, 2]", "expected an object"),
    "a number": (b"NaN", "expected an object"),
    "no context": (b'{"completion": [3]}', "context is missing"),
    "null": (b'{"context": [1], "completion": null}', "completion is missing"),
    "empty context": (b'{"context": [], "completion": [3]}', "context is an empty list"),
    "empty completion": (b'{"context": [1], "completion": []}', "completion is an empty list"),
    "text without vocabulary": (b'{"context": "a", "completion": [3]}', "needs --vocab"),
    "number": (b'{"context": 5, "completion": [3]}', "must be text or a list"),
    "object": (b'{"context": {"a": 1}, "completion": [3]}', "must be text or a list"),
    "beyond": (b'{"context": [1, 64], "completion": [3]}', "has 64, which is not a token id"),
    "negative": (b'{"context": [1], "completion": [-1]}', "has -1, which is not a token id"),
    "fraction": (b'{"context": [1.0], "completion": [3]}', "has 1.0, which is not a token id"),
    "truth": (b'{"context": [true], "completion": [3]}', "has True, which is not a token id"),
    "nested": (b'{"context": [[1]], "completion": [3]}', "which is not a token id"),
    "text in list": (b'{"context": ["a"], "completion": [3]}', "which is not a token id"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_by_file_number_and_reason(
    kind: str, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    line, reason = BAD_LINES[kind]
    path = tiny.folder / "train.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    err = refusal(tiny.argv("run"), capsys)
    assert f"{path}, line 3: " in err and reason in err
    assert len(err) < 400
    nothing_half_written(tiny.folder / "run")


def test_a_lone_surrogate_is_no_text(tmp_path: Path, nano_tokenizer_folder: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"context": "a\\ud800", "completion": "b"}')
    with pytest.raises(InputError, match="line 1: context holds a lone surrogate"):
        FT_Dataset(path, 8, tokenizer=load_tokenizer(nano_tokenizer_folder), vocab_size=300)


@pytest.fixture(scope="session")
def nano_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary without merges: every text can be encoded."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("vocab")
    entries = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    entries["<|endoftext|>"] = len(entries)
    (folder / "vocab.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def test_byte_order_mark_crlf_and_separators_inside_texts_do_not_matter(
    tmp_path: Path, nano_tokenizer_folder: Path
) -> None:
    odd = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\x00j\r\nk\rl"
    lines = [json.dumps({"context": odd, "completion": "x"}, ensure_ascii=False) for _ in range(3)]
    assert "\u2028" in lines[0] and "\u0085" in lines[0]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = FT_Dataset(path, 99, tokenizer=load_tokenizer(nano_tokenizer_folder), vocab_size=257)
    assert len(data) == 3
    assert all(len(row.context) == len(odd.encode()) + 1 for row in data.rows)


def test_a_row_of_a_million_characters_is_read_and_cut_and_a_longer_one_refused(
    tmp_path: Path, nano_tokenizer_folder: Path
) -> None:
    rows = [{"context": list(range(60)) * 4_000, "completion": [1]}]
    rows.append({"context": "name : x y " * 90_000, "completion": "b"})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(nano_tokenizer_folder)
    data = FT_Dataset(path, 32, tokenizer=tokenizer, vocab_size=257)
    assert data.contexts_cut == 2
    assert [len(data[i]["input"]) for i in (0, 1)] == [32, 32]
    rows.append({"context": "name : x y " * 100_000, "completion": "b"})
    write_rows(path, rows)
    with pytest.raises(InputError, match="line 3: longer than 1,048,576 characters"):
        FT_Dataset(path, 32, tokenizer=tokenizer, vocab_size=257)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ROWS = st.fixed_dictionaries({}, optional={"context": JSON, "completion": JSON, "other": JSON})


@FUZZED
@given(
    rows=st.lists(ROWS | JSON, max_size=4),
    separator=st.sampled_from([b"\n", b"\r\n", b"\n\n", b" ", b"\x0b"]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"]),
    spoil=st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=3)),
)
def test_any_file_gives_good_rows_or_one_sentence_with_its_name(
    rows: list, separator: bytes, start: bytes, spoil: tuple | None, tmp_path: Path
) -> None:
    content = start + separator.join(json.dumps(row).encode() for row in rows)
    if spoil is not None:
        place, junk = spoil
        content = content[:place] + junk + content[place + 1 :]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    try:
        data = FT_Dataset(path, 16, vocab_size=VOCABULARY)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert len(data) > 0
    for i in range(len(data)):
        assert data[i]["input"].max() < VOCABULARY and data[i]["mask"].any()


FLAGS = sorted(
    action.option_strings[0].removeprefix("--")
    for action in gpt2_ft.build_parser()._actions
    if action.type in (int, float)
)
ODD = ["-1", "0", "nan", "inf", "-inf", "1e400", "x", "", "1.5", str(2**63), str(2**80), "9" * 5000]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_number_out_of_range_is_refused_or_works(
    flag: str, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    refused = 0
    for i, value in enumerate(ODD):
        argv = tiny.argv(f"run{i}", "--max_step", 3, f"--{flag}={value}")
        try:
            with pytest.MonkeyPatch.context() as patch:
                # What trains is of no interest here: parsing and setting up is.
                patch.setattr(gpt2_ft, "train_validate", stop_training)
                errors.run(lambda argv=argv: gpt2_ft.main(argv))
        except Trained:
            continue
        except SystemExit as ended:
            assert ended.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and flag in err.lower(), err
        refused += 1
    assert refused >= 2


class Trained(Exception):
    """The program got as far as training."""


def stop_training(*_: object) -> None:
    raise Trained


@pytest.mark.parametrize(
    "more, message",
    [
        (["--train_data", "absent.jsonl"], "absent.jsonl cannot be read: No such file"),
        (["--train_data", "."], "cannot be read: Is a directory"),
        (["--init_checkpoint", "absent.pt"], "absent.pt does not exist"),
        (["--init_checkpoint", "."], "holds neither model.safetensors"),
        (["--vocab", "absent"], "--vocab absent does not exist; give the folder"),
        (["--vocab", "."], "holds neither vocab.json"),
        (["--model_card", "gpt2.huge"], "gpt2.huge is unknown; give one of gpt2.nano"),
        (["--model_card", "gpt2.nano"], "contradicts.*these weights are gpt2.tiny's"),
        (["--seq_len", "33"], "--seq_len 33 is above the model's 32"),
        (["--lora_dim", "17"], "--lora_dim 17 is above the model's width 16"),
        (["--warmup_step", "12"], "--warmup_step 12 .*below the 12 steps"),
        (["--scheduler", "dev_perf"], "dev_perf was never defined"),
        (["--optimizer", "apex"], "apex needs a CUDA device"),
        (["--obj", "mlm"], "mlm"),
        (["--platform", "azure"], "azure.*torchrun"),
        (["--roll_lr", "1"], "--roll_lr never had an effect"),
        (["--eval_epoch", "1"], "--eval_epoch never had an effect"),
        (["--no_such_flag"], "--no_such_flag; --help lists"),
        (["--lora_dims", "4"], r"--lora_dims 4 \(did you mean --lora_dim\?\); --help lists"),
        (["--fp16"], "--fp16 needs a CUDA device"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    more: list[str], message: str, tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    err = refusal(tiny.argv("run", *more), capsys)
    assert re.search(message, err), err


def test_data_without_base_and_base_without_data_are_refused(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    data, base = tiny.folder / "train.jsonl", tiny.base
    assert "--init_checkpoint is missing" in refusal(["--train_data", str(data)], capsys)
    assert "--train_data is missing" in refusal(["--init_checkpoint", str(base)], capsys)


def test_a_vocabulary_of_another_base_is_refused(
    tiny: Tiny, nano_tokenizer_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    err = refusal(tiny.argv("run", "--vocab", nano_tokenizer_folder), capsys)
    assert "has 257 entries" in err and "64" in err


def test_a_process_says_its_sentence_and_exits_2_and_other_errors_keep_their_traceback(
    nano: Tiny, capsys: pytest.CaptureFixture
) -> None:
    (nano.folder / "train.jsonl").write_bytes(GOOD + b"\n{")
    code, _, err = finish(start(["gpt2_ft.py", *nano.argv("run")]))
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: ")
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 // 0)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: None)
    assert ended.value.code is None
