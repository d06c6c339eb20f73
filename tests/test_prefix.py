"""Prefix tuning: PEFT's numbers, loop-written attention, decoding, files, resumption."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import (
    FUZZ,
    METHODS,
    ROOT,
    TINY_CARD,
    Tiny,
    finish,
    random_base,
    random_rows,
    refusal,
    start,
    write_rows,
)
from test_adapter_formats import IDS, SHAPE, convert, error, hf_base
from test_adapter_header import mutated
from test_resume import Killed, die_in_call, same_runs
from torch import Tensor

import checkpoints
import convert_adapter
import gpt2_beam
import gpt2_ft
import loralib
from common.batch import Spans
from common.errors import InputError
from data_utils import load_tokenizer
from decoding import SearchSettings, beam_search
from decoding.generate import generate, text_of
from decoding.sampling import SamplingSettings, sample
from methods.prefix import KEY_VALUES, Prefix, PrefixConfig, drop_first, prepend
from model import GPT2Config, GPT2LMModel
from training.resume import State

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LENGTH, HIDDEN = 3, 8
NANO = ROOT / "data" / "nano"
NEVER_ENDS = 63


def ours(length: int = LENGTH, hidden: int = HIDDEN) -> GPT2LMModel:
    """A model of the tiny base with a prefix as training starts it."""
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(**SHAPE, prefix=PrefixConfig(length, hidden)))
    model.load_state_dict(random_base(TINY_CARD), strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".prefix." in name
    return model


def prefix_of(model: GPT2LMModel) -> Prefix:
    assert model.transformer.prefix is not None
    return model.transformer.prefix


def pefts(tiny: Tiny, model: GPT2LMModel) -> peft.PeftModel:
    """PEFT's model of the same base, whose generator starts from the same numbers."""
    prefix = prefix_of(model)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=prefix.length,
        prefix_projection=hasattr(prefix, "generator"),
        encoder_hidden_size=HIDDEN,
    )
    theirs = peft.get_peft_model(hf_base(tiny), config)
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        if hasattr(prefix, "generator"):
            encoder.transform.load_state_dict(prefix.generator.state_dict())
            encoder.embedding.weight.copy_(prefix.embedding)
        else:
            encoder.embedding.weight.copy_(prefix.numbers().flatten(1))
    return theirs


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, labels and the mask of rows of unequal lengths."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(64, (4, 12), generator=draw)
    lengths = torch.randint(3, 12, (4,), generator=draw)
    mask = (torch.arange(11) < lengths[:, None] - 1).float()
    mask[:, :2] = 0  # a context, which is not counted
    mask[0, 2] = 1
    return ids[:, :-1], ids[:, 1:], mask


def loss_of(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("hidden", [HIDDEN, 0])
def test_twenty_steps_have_pefts_losses_and_end_with_its_logits(tiny: Tiny, hidden: int) -> None:
    model = ours(hidden=hidden)
    theirs = pefts(tiny, model).eval()
    with torch.no_grad():
        first = model(IDS)[0]
        assert error(hf_base(tiny)(IDS).logits, first) > 1e-2
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        for m in (model, theirs)
    ]
    losses: list[tuple[float, float]] = []
    for step in range(20):
        ids, labels, mask = batch_of(step)
        loss = model(ids, labels, mask)[1]
        assert loss is not None
        their_loss = loss_of(theirs(ids).logits, labels, mask)
        losses.append((loss.item(), their_loss.item()))
        for optimizer, value in zip(optimizers, (loss, their_loss), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert max(abs(a - b) for a, b in losses) < 1e-5
    with torch.no_grad():
        assert error(model(IDS)[0], first) > 0.05
        assert error(model(IDS)[0], theirs(IDS).logits) < 1e-5
    saved = theirs.get_prompt_embedding_to_save("default")
    assert error(prefix_of(model).numbers().flatten(1), saved) < 1e-5


def test_every_sequence_of_a_packed_batch_attends_to_the_prefix_and_causally_to_itself() -> None:
    model = ours()
    attention = model.transformer.h[0].attn
    numbers = prefix_of(model).numbers()[:, 0].detach().unflatten(-1, (2, -1))  # (n, 2, H, D)
    prefix = numbers.permute(1, 2, 0, 3)
    rows = prefix_of(model)()[0].detach()
    x = torch.randn(9, TINY_CARD["n_embd"], generator=torch.Generator().manual_seed(2))
    for lengths in ([9], [3, 3, 3], [5, 1, 3]):
        with torch.no_grad():
            fused = attention.c_attn(x)
            spans = Spans.of(lengths)
            longer = spans.after(LENGTH)
            assert longer.starts.tolist() == Spans.of(longer.lengths).starts.tolist()
            found = drop_first(LENGTH, attention(prepend(rows, fused, spans), longer), longer)
            query, key, value = fused.view(9, 3, 2, -1).unbind(1)
            mixed, start = torch.empty(9, 2, query.size(-1)), 0
            for length in lengths:
                for i in range(start, start + length):
                    for head in range(2):
                        keys = torch.cat((prefix[0, head], key[start : i + 1, head]))
                        values = torch.cat((prefix[1, head], value[start : i + 1, head]))
                        scores = keys @ query[i, head] / query.size(-1) ** 0.5
                        mixed[i, head] = scores.softmax(0) @ values
                start += length
            assert error(found, mixed.flatten(1)) < 1e-6


def test_gradients_with_checkpointing_are_the_same_bits() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ours()
        model.transformer.gradient_checkpointing = checkpointing
        loss = model(*batch_of(0))[1]
        assert loss is not None
        loss.backward()
        gradients.append([p.grad for p in prefix_of(model).parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other) and one.any()


PROMPTS = [IDS[0, :6], IDS[1, :3], IDS[2, :6], IDS[0, :9]]


def generated(theirs: peft.PeftModel, prompt: Tensor, **settings: object) -> list[int]:
    """What transformers' generate makes of a prompt, without the prompt; without a cache, for PEFT
    0.21 gives the cache of transformers 5 nothing but the prefix in every step."""
    out = theirs.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=8,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=NEVER_ENDS,
        **settings,
    )
    return out[0, len(prompt) :].tolist()


def searched(model: GPT2LMModel, prompts: Sequence[Tensor], **settings: object) -> list[list[int]]:
    given = {"end_ids": (NEVER_ENDS,), "eval_len": 8, "no_repeat_ngram_size": 0} | settings
    found = beam_search(model.eval(), prompts, SearchSettings(**given))
    return [best[0].tokens for best in found]


@pytest.mark.parametrize("beam", [1, 4])
def test_search_finds_what_generate_finds_with_pefts_prefix(tiny: Tiny, beam: int) -> None:
    model = ours()
    theirs = pefts(tiny, model).eval()
    found = searched(model, PROMPTS, beam=beam, search="hf", length_penalty=1.0)
    assert found == [generated(theirs, prompt, num_beams=beam) for prompt in PROMPTS]
    base = GPT2LMModel(GPT2Config(**SHAPE))
    base.load_state_dict(random_base(TINY_CARD))
    assert found != searched(base, PROMPTS, beam=beam, search="hf", length_penalty=1.0)


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text() -> None:
    model = ours().eval()
    settings = SamplingSettings(end_ids=(NEVER_ENDS,), eval_len=10, seed=3)
    for prompt, (drawn,) in zip(PROMPTS, sample(model, PROMPTS, settings), strict=True):
        text = torch.cat((prompt, torch.tensor(drawn.tokens)))
        log_probs = model(text[None])[0][0].log_softmax(-1)
        places = range(len(prompt) - 1, len(text) - 1)
        total = sum(float(log_probs[i, text[i + 1]]) for i in places)
        assert drawn.score == pytest.approx(total, abs=1e-4)


def test_texts_are_the_same_in_any_batch() -> None:
    model = ours()
    alone = [searched(model, [prompt])[0] for prompt in PROMPTS]
    assert searched(model, PROMPTS) == alone


def test_a_prefix_takes_positions_from_the_window() -> None:
    model = ours().eval()
    assert model.config.window == 32 - LENGTH
    model(torch.zeros(1, 32 - LENGTH, dtype=torch.int64))
    with pytest.raises(ValueError, match="prefix of 32 leaves no room in 32 positions"):
        GPT2Config(**SHAPE, prefix=PrefixConfig(32))
    for settings in ({"length": 0}, {"length": 2.0}, {"length": 1, "hidden": -1}):
        with pytest.raises(ValueError, match="a prefix needs a whole"):
            PrefixConfig(**settings)


def test_parameters_of_gpt2_medium_are_the_papers() -> None:
    with torch.device("meta"):
        shape = checkpoints.model_config("gpt2.md", None, prefix=PrefixConfig(5, 512))
        prefix = prefix_of(GPT2LMModel(shape))
        assert prefix.count == 245_760
        made_by = sum(p.numel() for p in prefix.parameters())
        assert made_by == 5 * 1024 + (1024 + 1) * 512 + (512 + 1) * 2 * 24 * 1024


def argv(tiny: Tiny, work_dir: str, *more: object) -> list[str]:
    """Arguments of a run with a prefix as `ours`."""
    return tiny.argv_of(METHODS["prefix"], work_dir, *more)


@pytest.fixture
def run(tiny: Tiny) -> Path:
    gpt2_ft.main(argv(tiny, "run", "--max_step", 6))
    return tiny.folder / "run"


def test_an_adapter_file_holds_the_final_numbers_alone_and_state_what_makes_them(
    tiny: Tiny, run: Path
) -> None:
    header, tensors = checkpoints.read_adapter(f"{run}:last")
    assert header is not None and header.kind == "prefix"
    assert header.prefix == PrefixConfig(LENGTH) and header.to_fields()["prefix_length"] == LENGTH
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        KEY_VALUES: [LENGTH, TINY_CARD["n_layer"], 2, TINY_CARD["n_embd"]]
    }
    state = State.read(run / "state.pt")
    assert KEY_VALUES not in state.trained and all(".prefix." in name for name in state.trained)
    model = ours()
    checkpoints.apply_trained(model, state.trained, "state.pt")
    assert torch.equal(prefix_of(model).numbers(), tensors[KEY_VALUES])
    decoder, _ = checkpoints.load(tiny.base, f"{run}:last", model_card=tiny.card)
    with torch.no_grad():
        assert torch.equal(decoder(IDS)[0], model.eval()(IDS)[0])


@pytest.mark.parametrize(
    "more", [("--prefix_hidden", 0), ("--gradient_checkpointing", "--bf16"), ("--keep_last", 1)]
)
def test_a_killed_run_resumes_to_the_same_bytes(
    more: tuple, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2_ft.main(argv(tiny, "whole", *more))
    arguments = argv(tiny, "killed", "--resume", "auto", *more)
    for call in (5, 2, 4):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_call(patch, "optimizer_step", call)
            gpt2_ft.main(arguments)
    gpt2_ft.main(arguments)
    same_runs(tiny.folder / "whole", tiny.folder / "killed")


def peft_logits(tiny: Tiny, folder: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(hf_base(tiny), folder).eval()(IDS).logits


def our_logits(tiny: Tiny, adapter: Path | str) -> Tensor:
    with torch.no_grad():
        return checkpoints.load(tiny.base, adapter, model_card=tiny.card)[0](IDS)[0]


def test_peft_computes_what_we_do_from_our_export_and_gives_it_back_whole(
    tiny: Tiny, run: Path
) -> None:
    adapter = run / "model.6.safetensors"
    expected = our_logits(tiny, adapter)
    hf_base(tiny).save_pretrained(tiny.folder / "hf")
    named = ("--base_name", tiny.folder / "hf")
    folder = convert(tiny, adapter, "peft", "peft", *named)
    with torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert error(theirs(IDS).logits, expected) < 1e-5
    assert error(peft_logits(tiny, folder), expected) < 1e-5
    assert "merge_and_unload" not in (folder / "README.md").read_text(encoding="utf-8")
    back = convert(tiny, folder, "safetensors", "back.safetensors")
    assert back.read_bytes() == adapter.read_bytes()
    assert torch.equal(our_logits(tiny, folder), expected)
    theirs.save_pretrained(tiny.folder / "theirs")
    assert torch.equal(our_logits(tiny, tiny.folder / "theirs"), expected)


@pytest.mark.parametrize("hidden", [HIDDEN, 0])
def test_a_prefix_that_peft_trained_gives_its_logits_here(tiny: Tiny, hidden: int) -> None:
    theirs = pefts(tiny, ours(hidden=hidden)).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    theirs.save_pretrained(tiny.folder / "peft")
    assert error(our_logits(tiny, tiny.folder / "peft"), expected) < 1e-5
    own = convert(tiny, tiny.folder / "peft", "safetensors", "own.safetensors")
    assert error(our_logits(tiny, own), expected) < 1e-5
    header, _ = checkpoints.read_adapter(own)
    assert header is not None and header.base.fingerprint and header.prefix == PrefixConfig(LENGTH)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set, which has no counterpart"),
        ({"a_new_setting": 3}, "a_new_setting is set, which has no counterpart"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is not 1"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, the base has 2"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \[3, 64\], by its .* \[4, 64\]"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, not a number from 1 to 65536"),
        ({"num_layers": 4, "token_dim": 8}, "key_values of shape .* does not fit the model"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
        ({"token_dim": None}, "token_dim is None"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; only LORA and PRE"),
    ],
    ids=str,
)
def test_a_setting_of_pefts_that_cannot_be_honoured_is_refused_by_name(
    change: dict, message: str, tiny: Tiny
) -> None:
    folder = tiny.folder / "peft"
    pefts(tiny, ours()).save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        checkpoints.load(tiny.base, folder, model_card=tiny.card)


def test_whatever_a_configuration_holds_it_is_read_or_refused_in_one_sentence(tiny: Tiny) -> None:
    folder = tiny.folder / "peft"
    pefts(tiny, ours()).save_pretrained(folder)
    path, refused = folder / "adapter_config.json", 0
    config = json.loads(path.read_text(encoding="utf-8"))
    for seed in range(150 * FUZZ):
        path.write_text(json.dumps(mutated(config, random.Random(seed))), encoding="utf-8")
        try:
            checkpoints.load(tiny.base, folder, model_card=tiny.card)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
    assert 50 * FUZZ < refused < 150 * FUZZ


def test_a_folder_with_other_tensors_than_the_numbers_is_refused(tiny: Tiny) -> None:
    folder = tiny.folder / "peft"
    pefts(tiny, ours()).save_pretrained(folder)
    for tensors, message in (
        ({}, "its tensors are none"),
        ({"base_model.x": torch.zeros(1)}, "its tensors are base_model.x"),
        ({"prompt_embeddings": torch.zeros(3, 64, dtype=torch.int32)}, "holds torch.int32"),
        ({"prompt_embeddings": torch.zeros(3)}, r"prompt_embeddings is \[3\]"),
    ):
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            checkpoints.load(tiny.base, folder, model_card=tiny.card)


@pytest.mark.parametrize(
    "to, message", [("merged", "changes no weight"), ("pt", "the original code does not have it")]
)
def test_formats_that_cannot_hold_a_prefix_are_refused(
    to: str, message: str, tiny: Tiny, run: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--adapter", run, "--init_checkpoint", tiny.base, "--to", to]
    arguments += ["--output", tiny.folder / "out", "--model_card", tiny.card]
    assert message in refusal([str(a) for a in arguments], capsys, convert_adapter.main)
    assert not (tiny.folder / "out").exists()


def beam(tiny: Tiny, name: str, rows: list[dict], *more: object) -> list[dict]:
    data, out = write_rows(tiny.folder / f"{name}.jsonl", rows), tiny.folder / f"{name}.out"
    arguments = ["--data", data, "--init_checkpoint", tiny.base, "--output_file", out]
    arguments += ["--model_card", tiny.card, "--device", "cpu", "--beam", 3, "--eval_len", 8]
    gpt2_beam.main([str(a) for a in [*arguments, "--eos_token_id", 5, *more]])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_prefix_and_lora_answer_their_own_rows_as_they_do_alone(tiny: Tiny, run: Path) -> None:
    gpt2_ft.main(tiny.argv("lora", "--max_step", 6))
    adapters = {"prefix": run, "lora": tiny.folder / "lora"}
    rows = random_rows(9, seed=3)
    rows[0]["context"] = rows[1]["context"] = rows[2]["context"] = list(range(30))  # too long
    alone = {name: beam(tiny, name, rows, "--adapter", path) for name, path in adapters.items()}
    alone[None] = beam(tiny, "base", rows)
    tasks = ["prefix", "lora", None] * 3
    named = [part for n, path in adapters.items() for part in ("--adapter", f"{n}={path}")]
    mixed = [row | {"task": task} for row, task in zip(rows, tasks, strict=True)]
    found = beam(tiny, "mixed", mixed, *named)
    assert found == [alone[task][i] for i, task in enumerate(tasks)]
    assert len({str(found[i]["prediction"]) for i in range(3)}) > 1
    drawn = [beam(tiny, "drawn", rows, "--adapter", run, *more) for more in SAMPLED]
    assert drawn[0] == drawn[1] != alone["prefix"]


SAMPLED = [("--do_sample", "--seed", 3, "--beam", 1, "--batch_size", size) for size in (16, 2)]


def test_what_is_decoded_must_leave_the_prefix_its_positions(tiny: Tiny, run: Path) -> None:
    arguments = ["--data", tiny.folder / "valid.jsonl", "--init_checkpoint", tiny.base]
    arguments += ["--eos_token_id", 5, "--adapter", run, "--device", "cpu"]
    arguments += ["--output_file", tiny.folder / "out.jsonl"]
    for more, message in (
        (["--eval_len", 29], "--eval_len 29 leaves no room for a context in a window of 29"),
        (["--eval_len", 8, "--seq_len", 30], "--seq_len 30 with a prefix of 3 is above the model"),
    ):
        with pytest.raises(InputError, match=message):
            gpt2_beam.main([str(a) for a in [*arguments, *more]])


def test_a_prompt_is_answered_as_by_generate_within_the_window_that_the_prefix_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    flags = ["--train_data", tmp_path / "train.jsonl", "--vocab", NANO, "--init_checkpoint", NANO]
    flags += ["--method", "prefix", "--seq_len", 128, "--max_step", 4, "--warmup_step", 0]
    flags += ["--lr", 0.05, "--device", "cpu", "--work_dir", tmp_path / "run"]
    gpt2_ft.main([str(flag) for flag in flags])
    capsys.readouterr()
    base = ["--adapter", str(tmp_path / "run"), "--device", "cpu", "--eval_len", "10", "--prompt"]
    text = "name : The Vaults | Type : pub"
    gpt2_beam.main([*base, text, "--beam", "3"])
    model, tokenizer = checkpoints.load(NANO, tmp_path / "run")[0], load_tokenizer(NANO)
    [[best]] = generate(model, tokenizer, [text], beam=3, eval_len=10)
    assert capsys.readouterr().out == f"{best.score:.4f}\t{text_of(best, tokenizer)}\n"
    message = "its 501 tokens and eval_len 10 exceed the window of 507"
    with pytest.raises(InputError, match=message):
        gpt2_beam.main([*base, "name : " * 249])


def test_the_default_window_leaves_a_prefix_its_positions() -> None:
    given = ["--train_data=x", "--init_checkpoint=x"]
    for flags, seq_len in (
        (["--prefix_length", "20"], 492),
        (["--prefix_length", "20", "--seq_len", "99"], 99),
        ([], 507),
    ):
        args = gpt2_ft.parse_args(["--method=prefix", *given, *flags])
        assert args.seq_len == seq_len
    assert gpt2_ft.parse_args(given).seq_len == 512


def test_a_dry_run_counts_what_is_saved_and_what_makes_it(
    tiny: Tiny, capsys: pytest.CaptureFixture
) -> None:
    gpt2_ft.main(argv(tiny, "run", "--dry_run"))
    out = capsys.readouterr().out
    made_by = 3 * 16 + (16 + 1) * 8 + (8 + 1) * 2 * 2 * 16
    assert f"{made_by} trainable parameters of" in out and "(they make the 192 that are" in out
    assert "4 adapters of 768 bytes" in out and not (tiny.folder / "run").exists()


def test_two_processes_train_a_prefix_as_one_does(nano: Tiny) -> None:
    more = ["--max_step", 6, "--lr", 0.001]
    two = nano.argv_of(METHODS["prefix"], "two", *more, "--grad_acc", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    code, _, err = finish(start([*launcher, "gpt2_ft.py", *two]))
    assert code == 0, err
    gpt2_ft.main(nano.argv_of(METHODS["prefix"], "one", *more))
    one, other = (checkpoints.read_adapter(nano.folder / f"{n}:last")[1] for n in ("one", "two"))
    assert error(one[KEY_VALUES], other[KEY_VALUES]) < 1e-5
    more[1] = 9  # and one process takes over from two
    for name in ("one", "two"):
        again = nano.argv_of(METHODS["prefix"], name, *more, "--resume", "auto")
        gpt2_ft.main([*again, "--resume_anyway"])
    one, other = (checkpoints.read_adapter(nano.folder / f"{n}:last")[1] for n in ("one", "two"))
    assert error(one[KEY_VALUES], other[KEY_VALUES]) < 1e-5


def test_rows_of_one_batch_cannot_have_a_prefix_each(tiny: Tiny, run: Path) -> None:
    base, models = checkpoints.load_adapters(tiny.base, {"p": run})
    with torch.no_grad():
        assert error(models["p"](IDS)[0], base(IDS)[0]) > 1e-3
    with (
        pytest.raises(ValueError, match="'p' has transformer.prefix.key_values, which no row can"),
        loralib.adapters_by_row(base, models, ["p", None, None]),
    ):
        pass
