"""The decoding program: what its predictions file holds, and what it says when it cannot go on."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    POSITIONS,
    ROOT,
    VOCABULARY,
    Tiny,
    finish,
    random_rows,
    start,
    through_a_pipe,
    write_rows,
)

import checkpoints
import gpt2_beam
import gpt2_ft
import gpu
from checkpoints import read_adapter, read_base
from common.errors import InputError
from data_utils import load_tokenizer
from decoding import SearchSettings, batches, sources
from decoding.journal import kept_files
from model import GPT2Config, GPT2LMModel

NANO_VOCAB = ROOT / "data" / "nano"


def rows_with_repeats(count: int = 20, distinct: int = 7) -> list[dict]:
    contexts = [row["context"] for row in random_rows(distinct, seed=3)]
    draw = random.Random(0)
    picked = [*range(distinct), *(draw.randrange(distinct) for _ in range(count - distinct))]
    draw.shuffle(picked)
    return [{"context": contexts[i]} for i in picked]


def beam_argv(tiny: Tiny, *more: object) -> list[str]:
    """Arguments of a short search over `test.jsonl`; `more` rules."""
    given = {
        "data": tiny.folder / "test.jsonl", "init_checkpoint": tiny.base, "model_card": tiny.card,
        "device": "cpu", "beam": 3, "eval_len": 8, "eos_token_id": 5,
        "output_file": tiny.folder / "predictions.jsonl",
    }  # fmt: skip
    given = {name: value for name, value in given.items() if f"--{name}" not in more}
    pairs = [(f"--{name}", str(value)) for name, value in given.items()]
    return [part for pair in pairs for part in pair] + [str(part) for part in more]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decode(tiny: Tiny, *more: object, rows: list[dict] | None = None) -> list[dict]:
    write_rows(tiny.folder / "test.jsonl", rows or rows_with_repeats())
    gpt2_beam.main(beam_argv(tiny, *more))
    return read(tiny.folder / "predictions.jsonl")


def test_every_row_is_predicted_once_in_order_and_each_distinct_context_searched_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    searched: list[tuple] = []
    search = batches.complete

    def spy(model, prompts, *rest):
        searched.extend(tuple(prompt.tolist()) for prompt in prompts)
        return search(model, prompts, *rest)

    monkeypatch.setattr(batches, "complete", spy)
    rows = rows_with_repeats()
    predictions = decode(tiny, rows=rows)
    assert [p["id"] for p in predictions] == list(range(20))
    assert [p["context"] for p in predictions] == [row["context"] for row in rows]
    assert len(searched) == len(set(searched)) == 7
    outputs = {tuple(p["context"]): set() for p in predictions}
    for p in predictions:
        outputs[tuple(p["context"])].add((tuple(p["prediction"]), p["score"], p["finished"]))
        assert p.keys() == {"id", "context", "prediction", "score", "length", "finished"}
        assert p["length"] == len(p["prediction"]) <= 8
        assert p["finished"] == (p["prediction"][-1] == 5)
        assert 5 not in p["prediction"][:-1]
    assert all(len(found) == 1 for found in outputs.values())
    unfinished = sum(not p["finished"] for p in predictions)
    printed = capsys.readouterr().out
    assert "20 rows, 7 distinct contexts" in printed
    assert f"{unfinished} unfinished" in printed


@pytest.mark.parametrize("more", [("--batch_size", 1), ("--batch_size", 3), ("--seq_len", 20)])
def test_batch_size_and_room_to_spare_change_no_prediction(tiny: Tiny, more: tuple) -> None:
    expected = [p["prediction"] for p in decode(tiny)]
    assert [p["prediction"] for p in decode(tiny, *more)] == expected


def test_the_file_is_the_same_to_the_byte_by_one_two_and_three_processes(nano: Tiny) -> None:
    write_rows(nano.folder / "test.jsonl", rows_with_repeats())
    written = []
    for count in (1, 2, 3):
        path = nano.folder / f"by_{count}.jsonl"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        launcher = torchrun if count > 1 else []
        argv = beam_argv(nano, "--batch_size", 3, "--output_file", path)
        code, out, err = finish(start([*launcher, ROOT / "gpt2_beam.py", *argv]))
        assert code == 0, err
        assert out.count("20 rows, 7 distinct contexts") == 1
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_the_adapter_takes_its_settings_from_its_header_and_scores_are_its_own(
    tiny: Tiny,
) -> None:
    gpt2_ft.main(tiny.argv("run", "--lr", 0.05))
    adapter = tiny.folder / "run"
    base_texts = [p["prediction"] for p in decode(tiny)]
    argv = ("--adapter", adapter, "--length_penalty", 0, "--no_repeat_ngram_size", 0)
    predictions = decode(tiny, *argv)
    assert [p["prediction"] for p in predictions] != base_texts

    header, tensors = read_adapter(adapter)
    assert header is not None
    shape = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "lora_attn_alpha": 8}
    card = gpt2_beam.MODEL_CARDS[tiny.card]
    model = GPT2LMModel(GPT2Config(**card | shape, lora_attn_dim=2)).eval()
    checkpoints.load_weights(model, read_base(tiny.base).tensors | tensors)
    for p in predictions:
        text = torch.tensor([p["context"] + p["prediction"]])
        with torch.no_grad():
            logits = model(text)[0][0, len(p["context"]) - 1 : -1]
        steps = logits.log_softmax(-1).gather(1, text[0, len(p["context"]) :, None])
        assert p["score"] == pytest.approx(float(steps.sum()), abs=2e-4)


def test_n_best_lists_distinct_hypotheses_best_first(tiny: Tiny) -> None:
    for p in decode(tiny, "--num_return_sequences", 3):
        assert len(p["n_best"]) == 3
        assert {key: p[key] for key in p["n_best"][0]} == p["n_best"][0]
        scores = [h["score"] for h in p["n_best"]]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h["prediction"]) for h in p["n_best"]}) == 3


def text_model(tiny: Tiny) -> tuple[str, ...]:
    """Flags of a random base over the shipped vocabulary."""
    path = tiny.folder / "text.pt"
    card = gpt2_beam.MODEL_CARDS[tiny.card]
    vocabulary = load_tokenizer(NANO_VOCAB).get_vocab_size()
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(vocab_size=vocabulary, n_positions=POSITIONS, **card))
    torch.save({name: 9 * tensor for name, tensor in model.state_dict().items()}, path)
    return "--init_checkpoint", str(path), "--vocab", str(NANO_VOCAB)


def test_text_is_decoded_and_cut_before_whichever_end_id_was_given(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(NANO_VOCAB)
    ends = [flag for i in range(300, 700) for flag in ("--eos_token_id", i)]
    rows = [{"context": f"name : The Owl | area : {place}"} for place in ("city", "park", "lake")]
    model = text_model(tiny)
    predictions = decode(tiny, *model, *ends, rows=rows)
    assert any(p["finished"] for p in predictions)
    for p, row in zip(predictions, rows, strict=True):
        words = p["prediction"][:-1] if p["finished"] else p["prediction"]
        assert p["context"] == row["context"]
        assert p["text"] == tokenizer.decode(words).strip()
        assert p["finished"] == (p["prediction"][-1] in range(300, 700))


def chosen_ends(tiny: Tiny, vocab_size: int, *more: object, vocab: Path | None = None) -> tuple:
    argv = beam_argv(tiny)
    at = argv.index("--eos_token_id")
    args = gpt2_beam.parse_args([*argv[:at], *argv[at + 2 :], *map(str, more)])
    tokenizer = load_tokenizer(vocab) if vocab else None
    runtime = gpu.parse_gpu(args)
    return gpt2_beam.choose_end_ids(args, runtime, tokenizer, vocab_size)


def test_given_end_ids_replace_the_default_and_a_missing_trained_one_is_named(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    end = load_tokenizer(NANO_VOCAB).token_to_id("<|endoftext|>")
    assert chosen_ends(tiny, 50257) == (50256, 628)
    assert chosen_ends(tiny, 2048, vocab=NANO_VOCAB)[0] == end
    both = ("--eos_token_id", 50256, "--eos_token_id", 628)
    assert chosen_ends(tiny, 50257, *both) == (50256, 628)
    assert capsys.readouterr().err == ""
    assert chosen_ends(tiny, 50257, "--eos_token_id", 628) == (628,)
    warning = capsys.readouterr().err
    assert "--eos_token_id 50256 --eos_token_id 628" in warning
    assert warning.count("\n") == 1


def test_the_defaults_are_the_published_settings(tiny: Tiny) -> None:
    args = gpt2_beam.parse_args(["--data", "x", "--init_checkpoint", "y"])
    published = SearchSettings(
        beam=10, length_penalty=0.8, no_repeat_ngram_size=4, eval_len=64, min_length=0,
        repetition_penalty=1.0, search="original",
    )  # fmt: skip
    assert gpt2_beam.given_settings(args) == published


def test_without_data_and_base_the_sample_is_decoded() -> None:
    found = sources.choose_sources(None, None, None, None)
    assert found.is_sample
    assert Path(found.data).name == "test.jsonl" and Path(found.data).is_file()
    assert load_tokenizer(found.vocab).get_vocab_size() == 2048
    assert read_base(found.init_checkpoint).vocab_size == 2048


def test_contexts_longer_than_the_window_lose_their_head_and_are_counted(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    tail = [7, 8, 9, 10] * 6
    rows = [{"context": [1] * 20 + tail}, {"context": tail}, {"context": [4]}]
    long, short, _ = decode(tiny, rows=rows)
    assert long["context"] == rows[0]["context"]
    assert long["prediction"] == short["prediction"]
    assert "1 of 3 contexts are longer" in capsys.readouterr().out


WRONG_FLAGS = [
    (("--beam", 0), "--beam 0"),
    (("--beam", 1001), "--beam 1001 must be from 1 to 1000"),
    (("--batch_size", 0), "--batch_size 0"),
    (("--eval_len", POSITIONS), "--eval_len 32 leaves no room"),
    (("--seq_len", 99), "--seq_len 99 is above"),
    (("--num_return_sequences", 4), "--num_return_sequences 4 must be from 1 to 3, the number"),
    (("--num_return_sequences", 0), "--num_return_sequences 0 must be from 1 to 3, the number"),
    (("--length_penalty", "nan"), "--length_penalty nan"),
    (("--repetition_penalty", 0), "--repetition_penalty 0"),
    (("--eos_token_id", VOCABULARY), "--eos_token_id 64"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    (("--adapter", "nowhere.safetensors"), "nowhere.safetensors"),
    (("--vocab", str(NANO_VOCAB)), "--vocab"),
    (("--model_card", "gpt2.xxl"), "gpt2.xxl"),
]


@pytest.mark.parametrize(("more", "named"), WRONG_FLAGS, ids=[named for _, named in WRONG_FLAGS])
def test_what_is_wrong_is_named_in_one_line_and_nothing_is_written(
    tiny: Tiny, more: tuple, named: str
) -> None:
    with pytest.raises(InputError) as raised:
        decode(tiny, *more)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tiny.folder / "predictions.jsonl").exists()


def test_a_vocabulary_without_known_end_and_broken_rows_are_refused(tiny: Tiny) -> None:
    argv = beam_argv(tiny)
    at = argv.index("--eos_token_id")
    write_rows(tiny.folder / "test.jsonl", rows_with_repeats())
    with pytest.raises(InputError, match="--vocab, or --eos_token_id"):
        gpt2_beam.main([*argv[:at], *argv[at + 2 :]])
    with pytest.raises(InputError, match=r"test.jsonl, line 2: context"):
        decode(tiny, rows=[{"context": [1]}, {"context": [VOCABULARY]}])


def test_damaged_weights_are_reported_as_such(tiny: Tiny) -> None:
    state = {name: tensor * float("nan") for name, tensor in read_base(tiny.base).tensors.items()}
    torch.save(state, tiny.folder / "damaged.pt")
    with pytest.raises(InputError, match="NaN"):
        decode(tiny, "--init_checkpoint", tiny.folder / "damaged.pt")


def test_a_repetition_penalty_prints_nothing_of_its_own(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    decode(tiny)
    plain = capsys.readouterr()
    decode(tiny, "--repetition_penalty", 1.3)
    penalised = capsys.readouterr()
    assert penalised.out.count("\n") == plain.out.count("\n") == 3
    assert penalised.err == plain.err == ""


def test_the_hf_search_is_another_and_counts_the_prompt(tiny: Tiny) -> None:
    rows = [{"context": [i, i]} for i in range(6, 12)]
    argv = ("--no_repeat_ngram_size", 1, "--search")
    texts = [p["prediction"] for p in decode(tiny, *argv, "hf", rows=rows)]
    assert not any(row["context"][0] in text for row, text in zip(rows, texts, strict=True))
    assert [p["prediction"] for p in decode(tiny, *argv, "original", rows=rows)] != texts


def test_the_command_line_prints_one_line_and_exits_2_where_it_cannot_go_on(nano: Tiny) -> None:
    write_rows(nano.folder / "test.jsonl", rows_with_repeats(8, 4))
    argv = beam_argv(nano, "--eval_len", 4)
    code, out, err = finish(start(["-W", "error", ROOT / "gpt2_beam.py", *argv]))
    assert (code, err) == (0, "")
    first, second, last = out.splitlines()
    assert first == f"No --adapter: decoding with the base alone, {nano.base}"
    assert second.startswith(f"{nano.folder / 'test.jsonl'}: 8 rows (JSONL")
    assert last.startswith("8 rows, 4 distinct contexts")
    code, out, err = finish(start([ROOT / "gpt2_beam.py", *argv, "--beam", 0]))
    assert (code, out) == (2, "")
    assert err.startswith("error: --beam 0")
    assert err.count("\n") == 1


def test_data_may_come_through_a_pipe_for_they_are_read_once(tiny: Tiny) -> None:
    rows = rows_with_repeats()
    expected = decode(tiny, rows=rows)
    pipe = through_a_pipe(tiny.folder / "test.jsonl")
    gpt2_beam.main(beam_argv(tiny, "--data", pipe))
    assert read(tiny.folder / "predictions.jsonl") == expected


def test_completions_that_the_default_ban_cannot_write_give_a_warning(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"context": [1, 2], "completion": [1, 2, 3, 4, 5, 1, 2, 3, 4]},
        {"context": [1, 2], "completion": [1, 2, 3, 4, 1, 2, 3]},
        {"context": [7, 7, 7, 7, 7]},
    ]
    decode(tiny, rows=rows)
    warning = "warning: 1 completions of the data repeat 4 tokens in a row"
    assert warning in capsys.readouterr().err
    decode(tiny, "--no_repeat_ngram_size", 4, rows=rows)
    assert "repeat" not in capsys.readouterr().err


def test_other_columns_of_other_forms_give_the_same_predictions(tiny: Tiny) -> None:
    rows = rows_with_repeats()
    expected = decode(tiny, rows=rows)
    renamed = [{"id": 5, "question": row["context"], "prompt": "x"} for row in rows]
    path = tiny.folder / "test.json"
    path.write_text(json.dumps(renamed), encoding="utf-8")
    gpt2_beam.main(beam_argv(tiny, "--data", path, "--fields", "question"))
    assert read(tiny.folder / "predictions.jsonl") == expected


def ends_after(count: int, search: Callable) -> Callable:
    """The search, which is interrupted in place of a further one."""
    left = iter(range(count))

    def counted(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return search(*given)

    return counted


def test_a_decode_that_was_killed_is_resumed_to_the_same_bytes(
    nano: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_rows(nano.folder / "test.jsonl", rows_with_repeats(30, 12))
    argv = beam_argv(nano, "--batch_size", 2, "--num_return_sequences", 2)
    gpt2_beam.main(argv)
    output = nano.folder / "predictions.jsonl"
    whole, search = output.read_bytes(), batches.complete
    for lives in range(1, 6):
        output.unlink(missing_ok=True)
        monkeypatch.setattr(batches, "complete", ends_after(lives, search))
        with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
            gpt2_beam.main(argv)
        kept = next(iter(kept_files(output)))
        kept.write_bytes(kept.read_bytes() + b"[5, [[[[1, 2")  # as a kill within a write leaves it
        assert not output.exists()
        # One search more would end it: what is kept is not searched again.
        monkeypatch.setattr(batches, "complete", ends_after(6 - lives, search))
        gpt2_beam.main([*argv, "--resume"])
        assert output.read_bytes() == whole
        assert f"{2 * lives} of them kept from before" in capsys.readouterr().out
        assert kept_files(output) == []


def test_processes_that_are_killed_leave_batches_for_any_number_of_others(nano: Tiny) -> None:
    write_rows(nano.folder / "test.jsonl", rows_with_repeats(40, 20))
    argv = [ROOT / "gpt2_beam.py", *beam_argv(nano, "--batch_size", 2, "--eval_len", 16)]
    output = nano.folder / "predictions.jsonl"
    assert finish(start(argv))[0] == 0
    whole = output.read_bytes()
    output.unlink()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    process = start(torchrun)
    while (
        process.poll() is None
        and sum(file.read_bytes().count(b"\n") > 1 for file in kept_files(output)) < 2
    ):
        time.sleep(0.01)
    process.terminate()
    finish(process)
    assert kept_files(output) and not output.exists()
    code, out, err = finish(start([*argv, "--resume"]))
    assert code == 0, err
    assert "kept from before" in out
    assert output.read_bytes() == whole


def test_a_resumed_decode_must_be_the_one_that_was_stopped(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given):
        raise KeyboardInterrupt

    write_rows(tiny.folder / "test.jsonl", rows_with_repeats())
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(batches, "complete", stop)
        gpt2_beam.main(beam_argv(tiny))
    other = tiny.folder / "other.jsonl"
    write_rows(other, rows_with_repeats(9, 3))
    for more, named in (
        (("--beam", 2), "setting of the decoding"),
        (("--data", other), "--data, --seq_len or --batch_size"),
        (("--bf16",), "precision or device"),
    ):
        with pytest.raises(InputError, match=f"with another {named}; put it back"):
            gpt2_beam.main(beam_argv(tiny, *more, "--resume"))
    gpt2_beam.main(beam_argv(tiny, "--beam", 2))  # anew
    assert kept_files(tiny.folder / "predictions.jsonl") == []


@pytest.mark.parametrize("name", ["--data", "--init_checkpoint", "--adapter"])
def test_an_output_that_is_also_an_input_is_refused_before_anything_is_computed(
    name: str, tiny: Tiny
) -> None:
    gpt2_ft.main(tiny.argv("run", "--max_step", 3))
    adapter = tiny.folder / "run" / "model.3.safetensors"
    files = {
        "--data": tiny.folder / "test.jsonl", "--init_checkpoint": tiny.base, "--adapter": adapter,
    }  # fmt: skip
    write_rows(tiny.folder / "test.jsonl", rows_with_repeats())
    link = tiny.folder / "link.jsonl"
    link.symlink_to(files[name])
    before = files[name].read_bytes()
    for output in (files[name], link, tiny.folder / "run" / ".." / files[name].name):
        if not output.exists():
            continue
        with pytest.raises(InputError, match=f"--output_file .* is also .*{name}"):
            gpt2_beam.main(beam_argv(tiny, "--adapter", adapter, "--output_file", output))
    assert files[name].read_bytes() == before


def test_a_folder_as_output_is_refused_before_anything_is_read(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="is a folder; name a file to write"):
        gpt2_beam.main(beam_argv(tiny, "--output_file", tiny.folder, "--init_checkpoint", "x"))


def test_base_and_vocabulary_default_to_those_of_the_adapters_run(
    run_on_text: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = run_on_text.parent
    output = folder / "out.jsonl"
    argv = ["--data", folder / "train.jsonl", "--output_file", output, "--beam", 2]
    argv += ["--eval_len", 4, "--device", "cpu"]
    gpt2_beam.main([str(part) for part in [*argv, "--adapter", run_on_text]])
    printed = capsys.readouterr().out
    assert f"Adapter {run_on_text}/model.best.safetensors: the best on validation" in printed
    assert "text" in read(output)[0]
    best = output.read_bytes()
    gpt2_beam.main([str(part) for part in [*argv, "--adapter", f"{run_on_text}:last"]])
    assert "model.4.safetensors: the last, step 4" in capsys.readouterr().out
    gpt2_beam.main(
        [str(part) for part in [*argv, "--adapter", run_on_text / "model.best.safetensors"]]
    )
    assert output.read_bytes() == best
    (run_on_text / "run.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match="run.json is no record of a run"):
        gpt2_beam.main([str(part) for part in [*argv, "--adapter", run_on_text]])


@pytest.fixture
def run_on_text(tmp_path: Path) -> Path:
    """The work_dir of a short run on text, with validation."""
    lines = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    data = tmp_path / "train.jsonl"
    flags = {
        "train_data": data, "valid_data": data, "vocab": NANO_VOCAB, "init_checkpoint": NANO_VOCAB,
        "model_card": "gpt2.nano", "seq_len": 128, "max_step": 4, "warmup_step": 0, "lr": 0.01,
        "device": "cpu", "valid_samples": 0, "work_dir": tmp_path / "run",
        "eval_interval": 1, "train_batch_size": 2,
    }  # fmt: skip
    gpt2_ft.main([f"--{name}={value}" for name, value in flags.items()])
    return tmp_path / "run"


def test_completions_that_go_on_after_an_end_id_give_a_warning(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"context": [1], "completion": [3, 5, 4, 5]},
        {"context": [2], "completion": [3, 4, 5]},
        {"context": [2]},
    ]
    decode(tiny, rows=rows)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: 1 of 3 completions in the data hold an end id before")
    assert "--eos_token_id 5 alone" in warning
    decode(tiny, rows=rows[1:])
    assert capsys.readouterr().err == ""
