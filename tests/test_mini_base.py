"""The shipped mini base: its size, its weights in transformers, its recipe, and that it writes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoints
import gpt2_ft
from common.errors import InputError
from data import make_base
from data.make_base import BASES, commands
from data.vocabulary import load_tokenizer
from decoding.generate import generate, text_of
from model import MODEL_CARDS

MINI = ROOT / "data/mini"
WEIGHTS = MINI / "model.safetensors"


def test_the_mini_base_is_small_half_precision_and_equals_itself_in_transformers() -> None:
    assert WEIGHTS.stat().st_size <= 16_000_000
    weights = safetensors.torch.load_file(WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    end = MODEL_CARDS["gpt2.mini"]["vocab_size"] - 1
    peer = GPT2LMHeadModel(
        GPT2Config(**MODEL_CARDS["gpt2.mini"], bos_token_id=end, eos_token_id=end)
    ).eval()
    assert peer.transformer.load_state_dict(weights, strict=False) == ([], [])
    model, tokenizer = checkpoints.load(MINI)[0].eval(), load_tokenizer(MINI)
    tokens = torch.tensor([[*tokenizer.encode("name : Blue Door | food : Thai").ids, end]])
    with torch.no_grad():
        ours, theirs = model(tokens)[0], peer(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_mini_base_writes_the_facts_it_is_given() -> None:
    model, tokenizer = checkpoints.load(MINI)[0], load_tokenizer(MINI)
    facts = {
        "name : Lucky Star | Type : restaurant | food : Chinese": ("Lucky Star", "Chinese"),
        "name : Park Inn | Type : hotel | price : moderate": ("Park Inn", "moderate"),
        "offer | domain : restaurants | name : Kawa Sushi | city : Oakland": ("Kawa", "Oakland"),
    }
    found = generate(model, tokenizer, list(facts), beam=4, eval_len=40)
    for (best, *_), values in zip(found, facts.values(), strict=True):
        text = text_of(best, tokenizer)
        assert best.finished and all(value in text for value in values), text


def test_the_recipes_of_both_bases_are_ones_the_trainer_takes() -> None:
    for name in BASES:
        program, *flags = commands(name, Path("base"), Path("work"), None)[-1]
        args = gpt2_ft.parse_args(flags)
        assert (program, args.model_card) == ("gpt2_ft.py", f"gpt2.{name}")
        assert args.seq_len <= MODEL_CARDS[args.model_card]["n_positions"]
        if args.scheduler == "cycle":  # it ends where the rate reaches 0
            assert args.i_steps.split(",")[-1] == str(args.max_step)
            assert args.i_lrs.split(",")[-1] == "0"


TEXT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name in ("train", "valid"):
    with (folder / f"{name}.jsonl").open("w") as file:
        for number in range(40):
            row = {"context": f"name : Pub {number}", "completion": f"Pub {number} is a pub ."}
            file.write(json.dumps(row) + chr(10))
"""


def test_the_way_to_a_base_is_tried_in_few_steps_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--max_step .*give --out"):
        make_base.main(["mini", "--max_step", "1"])
    monkeypatch.setitem(BASES, "mini", BASES["mini"] | {"text": ["-c", TEXT], "entries": 300})
    before = WEIGHTS.stat().st_mtime_ns
    assert make_base.main(["mini", "--out", str(tmp_path / "base"), "--max_step", "2"]) == 0
    assert WEIGHTS.stat().st_mtime_ns == before
    model, tokenizer = checkpoints.load(tmp_path / "base")[0], load_tokenizer(tmp_path / "base")
    assert model.config.vocab_size == tokenizer.get_vocab_size() == 300
    assert generate(model, tokenizer, ["name : Pub 1"], beam=2, eval_len=4)
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert (config["n_head"], config["vocab_size"]) == (model.config.n_head, 300)


def test_a_part_that_fails_ends_the_making_of_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = ["-c", "raise SystemExit(2)"]
    monkeypatch.setitem(BASES, "nano", BASES["nano"] | {"text": failing})
    assert make_base.main(["nano", "--out", str(tmp_path / "base")]) == 2
    assert not (tmp_path / "base").exists()


def test_its_licence_names_what_it_was_trained_on() -> None:
    text = (MINI / "LICENSE.md").read_text(encoding="utf-8")
    for name in ("Schema-Guided Dialogue", "RNNLG", "DART", "CC BY-SA 4.0", "Apache-2.0", "MIT"):
        assert name in text
