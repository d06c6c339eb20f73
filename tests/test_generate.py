"""Text in, text out from Python: the lines of the README, and equal to the decoding program."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, VOCABULARY

import checkpoints
import convert_adapter
import decoding
import gpt2_beam
import gpt2_ft
from data_utils import END_OF_TEXT, load_tokenizer

NANO = ROOT / "data" / "nano"
CONTEXTS = [
    "name : The Green Owl | Type : bistro | area : garden district",
    "name : The Vaults",
    "name : The Vaults | Type : pub | near : the Clock Gate",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the shipped sample."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--work_dir", folder / "run", "--max_step", 3, "--warmup_step", 0, "--lr", 0.002]
    flags += ["--lora_alpha", 32, "--device", "cpu", "--valid_samples", 0]
    rows = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[:40]) + "\n", encoding="utf-8")
    flags += ["--train_data", folder / "train.jsonl", "--vocab", NANO, "--init_checkpoint", NANO]
    gpt2_ft.main([str(flag) for flag in [*flags, "--model_card", "gpt2.nano", "--seq_len", 128]])
    return folder / "run"


def test_the_lines_of_both_readmes_run_and_are_at_most_six(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    found = []
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        found += re.findall(r"```python\n(import checkpoints.*?)```", text, re.DOTALL)
    english, translated = ([line.split("#")[0].rstrip() for line in b.splitlines()] for b in found)
    assert english == translated
    assert len([line for line in found[0].splitlines() if line]) <= 6
    exec(found[0].replace("runs/quickstart/train", str(run)), {})
    text, step = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert len(text) > 10 and step == "3"


def test_the_blocks_of_the_python_page_run_in_their_order(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block.replace("runs/quickstart/train", str(run)), names)
    assert names["loss"].item() < 10 and 0 < names["scores"]["BLEU"] <= 1
    assert names["errors"][0].wrong == 1
    model, _ = checkpoints.load(NANO, "adapter.pt", lora_alpha=32)
    assert model.config.lora.targets == ("q", "v")


def test_generate_gives_what_the_decoding_program_writes(run: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"context": text}) + "\n" for text in CONTEXTS)
    (tmp_path / "data.jsonl").write_text(rows, encoding="utf-8")
    argv = ["--data", tmp_path / "data.jsonl", "--vocab", NANO, "--init_checkpoint", NANO]
    argv += ["--adapter", run, "--output_file", tmp_path / "out.jsonl", "--device", "cpu"]
    argv += ["--beam", 4, "--eval_len", 24, "--num_return_sequences", 2]
    gpt2_beam.main([str(part) for part in argv])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    model, _ = checkpoints.load(NANO, run)
    tokenizer = load_tokenizer(NANO)
    found = decoding.generate(
        model, tokenizer, CONTEXTS, beam=4, eval_len=24, num_return_sequences=2
    )
    for row, hypotheses in zip(written, found, strict=True):
        for there, here in zip(row["n_best"], hypotheses, strict=True):
            assert here.tokens == there["prediction"]
            assert decoding.text_of(here, tokenizer) == there["text"]
            assert abs(here.score - there["score"]) < 1e-3


def test_a_prompt_ends_with_the_end_token_and_keeps_its_tail_where_it_is_too_long() -> None:
    tokenizer = load_tokenizer(NANO)
    model, header = checkpoints.load(NANO)
    asked = []
    model.prefill = lambda ids, cache: asked.extend(ids) or type(model).prefill(model, ids, cache)
    text = " ".join(["name : The Green Owl |"] * 200)
    decoding.generate(model.train(), tokenizer, [text], beam=1, eval_len=2)
    whole = tokenizer.encode(text).ids
    assert header is None and model.training
    assert asked[0].tolist() == [*whole[-509:], tokenizer.token_to_id(END_OF_TEXT)]
    assert len(whole) > model.config.n_positions


@pytest.mark.parametrize(
    "texts, settings, message",
    [
        (["a", ""], {}, "context 1 is empty"),
        (["a"], {"eval_len": 512}, "eval_len 512 leaves no room in a window of 512"),
        (["a"], {"beam": 0}, "beam 0"),
        (["a"], {"num_return_sequences": 11}, "num_return_sequences 11"),
    ],
)
def test_what_cannot_be_generated_is_said(texts: list, settings: dict, message: str) -> None:
    model, _ = checkpoints.load(NANO)
    with pytest.raises(ValueError, match=message):
        decoding.generate(model, load_tokenizer(NANO), texts, **settings)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model, _ = checkpoints.load(NANO)
    model.config.vocab_size = VOCABULARY
    with pytest.raises(ValueError, match="2048 entries, more than the model's 64"):
        decoding.generate(model, load_tokenizer(NANO), ["a"])
    assert decoding.generate(checkpoints.load(NANO)[0], load_tokenizer(NANO), []) == []


@pytest.mark.filterwarnings("ignore")
def test_a_merged_export_answers_in_a_pipeline_what_generate_does_to_the_prompt_it_states(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    argv = ["--adapter", run, "--init_checkpoint", NANO, "--vocab", NANO, "--to", "merged"]
    convert_adapter.main([str(part) for part in [*argv, "--output", tmp_path / "merged"]])
    assert "context + <|endoftext|>" in capsys.readouterr().out
    answer = transformers.pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")
    model, _ = checkpoints.load(NANO, run)
    tokenizer = load_tokenizer(NANO)
    end = tokenizer.token_to_id(END_OF_TEXT)
    greedy = {"beam": 1, "no_repeat_ngram_size": 0, "end_ids": (end,), "search": "hf"}
    for text in CONTEXTS:
        [[best]] = decoding.generate(model, tokenizer, [text], eval_len=24, **greedy)
        (said,) = answer(
            text + END_OF_TEXT, return_full_text=False, max_new_tokens=24, do_sample=False
        )
        assert said["generated_text"].strip() == decoding.text_of(best, tokenizer)
        (other,) = answer(text, return_full_text=False, max_new_tokens=24, do_sample=False)
        assert other["generated_text"] != said["generated_text"]
