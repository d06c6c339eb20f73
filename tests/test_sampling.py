"""Sampling against transformers' processors and every text there is; what decides a draw."""

import itertools
import math
from functools import cache

import pytest
import torch
from conftest import ROOT, Tiny, finish, start, write_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_beam_search import constant_model, ragged_prompts, small_gpt2
from test_gpt2_beam import beam_argv, read, rows_with_repeats
from torch import Tensor

import checkpoints
import decoding
import gpt2_beam
from common.errors import InputError
from data_utils import load_tokenizer
from decoding import Hypothesis, SamplingSettings, SearchSettings, beam_search, sample
from model import GPT2Config, GPT2LMModel

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
NARROWED = {
    "plain": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 2.5": {"temperature": 2.5},
    "the 3 likeliest": {"top_k": 3},
    "the likeliest 0.7": {"top_p": 0.7},
    "all at once": {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
}


def transformers_probabilities(logits: Tensor, s: SamplingSettings) -> Tensor:
    """What transformers draws from, by its own processors in its own order; logits (N, V)."""
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = process.TemperatureLogitsWarper(s.temperature)(None, logits)
    if s.top_k:
        scores = process.TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = process.TopPLogitsWarper(s.top_p)(None, scores)
    return scores.softmax(-1)


@PROPERTY
@given(
    seed=st.integers(0, 2**32),
    scale=st.floats(0.1, 20),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 50),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
)
def test_probabilities_are_those_of_transformers_processors(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    logits[0, :5] = -math.inf  # as bans leave them
    logits[1] = logits[1].round()  # many that are equal
    chosen = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    before = transformers_probabilities(
        logits, SamplingSettings(temperature=temperature, top_k=top_k)
    )
    reached = before.sort(descending=True).values.cumsum(-1)
    assume(((reached - top_p).abs() > 1e-9).all() or top_p == 1)  # rounding would decide
    expected = transformers_probabilities(logits, chosen)
    if top_p < 1:  # which of equal ones are cut is the order of a sort
        found, expected = chosen.probabilities(logits).sort().values, expected.sort().values
    else:
        found = chosen.probabilities(logits)
    assert (found - expected).abs().max() < 1e-6
    assert torch.allclose(found.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(logits.isinf().sum(-1), torch.tensor([5, 0, 0]))


END, VOCABULARY, LENGTH = 0, 6, 3
PROMPT = torch.tensor([1, 4, 2])


@cache
def toy() -> tuple[GPT2LMModel, torch.nn.Module]:
    """A tiny model of ours, and the same of transformers'."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(4)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, initializer_range=0.6)
    ).eval()
    model = GPT2LMModel(GPT2Config(**shape)).eval()
    checkpoints.load_weights(model, peer.state_dict())
    return model, peer


@torch.inference_mode()
def every_text(s: SamplingSettings) -> dict[tuple[int, ...], float]:
    """The probability of each text there is, by transformers' model and processors."""
    _, peer = toy()
    found, unfinished = {}, {(): 1.0}
    while unfinished:
        text, so_far = unfinished.popitem()
        logits = peer(torch.cat((PROMPT, torch.tensor(text, dtype=torch.int64)))[None]).logits
        for token, p in enumerate(transformers_probabilities(logits[:, -1], s)[0].tolist()):
            longer = (*text, token)
            done = token == END or len(longer) == LENGTH
            (found if done else unfinished)[longer] = so_far * p
    return found


def chance(expected: dict[tuple[int, ...], float], drawn: list[tuple[int, ...]]) -> float:
    """Pearson's test: how probable draws are that fit no better; rare texts count as one."""
    cells = [(p * len(drawn), drawn.count(text)) for text, p in expected.items()]
    rare = [cell for cell in cells if cell[0] < 5]
    cells = [cell for cell in cells if cell[0] >= 5] + [tuple(map(sum, zip(*rare, strict=True)))]
    statistic = sum((seen - mean) ** 2 / max(mean, 1e-9) for mean, seen in cells)
    halves = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(halves[0], halves[1]))


@pytest.mark.parametrize("name", NARROWED)
def test_every_text_is_drawn_as_often_as_transformers_model_and_processors_make_it(
    name: str,
) -> None:
    model, _ = toy()
    chosen = SamplingSettings(**NARROWED[name], seed=7, eval_len=LENGTH, end_ids=(END,))
    found = sample(model, [PROMPT] * 100, chosen, 50, 80)
    drawn = [tuple(h.tokens) for hypotheses in found for h in hypotheses]
    expected = every_text(chosen)
    assert set(drawn) <= {text for text, p in expected.items() if p > 0}
    assert chance(expected, drawn) > 1e-3
    for other in NARROWED.keys() - {name}:
        assert chance(every_text(SamplingSettings(**NARROWED[other])), drawn) < 1e-6


LONG = {"eval_len": 12, "end_ids": (0, 3), "temperature": 1.3, "seed": 5}


def tokens_of(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[h.tokens for h in hypotheses] for hypotheses in found]


def test_a_text_depends_on_seed_and_numbers_and_on_nothing_beside_it() -> None:
    model, prompts = small_gpt2(), ragged_prompts(9)
    chosen = SamplingSettings(**LONG)
    whole = tokens_of(sample(model, prompts, chosen, 16, 3))
    for size in (1, 2, 4):
        assert tokens_of(sample(model, prompts, chosen, size, 3)) == whole
    first = [texts[:1] for texts in whole]
    assert tokens_of(sample(model, prompts, chosen)) == first
    order = [4, 8, 1]
    found = sample(model, [prompts[i] for i in order], chosen, numbers=order)
    assert tokens_of(found) == [first[i] for i in order]
    assert tokens_of(sample(model, prompts, SamplingSettings(**LONG | {"seed": 6}))) != first
    same_prompt = tokens_of(sample(model, prompts[:1] * 4, chosen, 16, 3))
    texts = [tuple(text) for texts in same_prompt for text in texts]
    assert len(set(texts)) == len(texts) and same_prompt[0] == whole[0]


@torch.inference_mode()
def test_scores_are_the_models_own_log_probabilities_whatever_narrows_the_draw() -> None:
    model, prompts = small_gpt2(), ragged_prompts(6)
    chosen = SamplingSettings(**LONG, top_k=40, repetition_penalty=1.4, no_repeat_ngram_size=2)
    found = sample(model, prompts, chosen, 4, 2)
    for prompt, h in ((p, h) for p, texts in zip(prompts, found, strict=True) for h in texts):
        tokens = torch.tensor(h.tokens)
        logits, _ = model(torch.cat((prompt, tokens))[None])
        log_probs = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert abs(float(log_probs.gather(1, tokens[:, None]).sum()) - h.score) < 1e-4
        assert h.finished == (h.tokens[-1] in (0, 3))
        assert h.finished or len(h.tokens) == 12
        assert not set(h.tokens[:-1]) & {0, 3}
        assert len(set(itertools.pairwise(h.tokens))) == len(h.tokens) - 1


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}])
def test_a_draw_narrowed_to_one_token_is_greedy_search(narrow: dict) -> None:
    model, prompts = small_gpt2(), ragged_prompts(8)
    rules = {"eval_len": 12, "end_ids": (0, 3), "min_length": 3}
    greedy = SearchSettings(beam=1, no_repeat_ngram_size=0, **rules)
    expected = tokens_of(beam_search(model, prompts, greedy))
    assert tokens_of(sample(model, prompts, SamplingSettings(**rules, **narrow))) == expected


def test_a_text_ends_unfinished_where_every_token_is_banned() -> None:
    model, never = constant_model(0.0, 1.0, 2.0, 0.5), (9,)
    chosen = SamplingSettings(no_repeat_ngram_size=1, end_ids=never)
    [[h]] = sample(model, [torch.tensor([0])], chosen)
    assert sorted(h.tokens) == [0, 1, 2, 3] and not h.finished
    nothing = SamplingSettings(min_length=1, end_ids=(0, 1, 2, 3))
    assert sample(model, [torch.tensor([0])], nothing) == [[Hypothesis([], 0.0, False)]]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": 0}, "temperature 0 leaves nothing to draw.*beam 1 without do_sample"),
        ({"temperature": -0.5}, "temperature -0.5 must be above 0"),
        ({"temperature": math.inf}, "temperature inf must be above 0, and finite"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k -1 must be at least 1, or 0"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"seed": -1}, "seed -1 must not be negative"),
        ({"eval_len": 0}, "eval_len 0"),
    ],
)
def test_settings_that_make_no_draw_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**wrong)


@pytest.mark.parametrize("count", [0, 1001])
def test_a_draw_is_of_one_text_to_a_thousand(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_return_sequences {count} must be from 1 to 1000"):
        SamplingSettings().check_count(count)


def test_generate_draws_with_do_sample_and_refuses_what_contradicts_it() -> None:
    model, tokenizer = checkpoints.load("data/nano")[0], load_tokenizer("data/nano")
    texts = ["name : The Vaults", "name : The Green Owl | Type : bistro"]
    drawn = {"do_sample": True, "eval_len": 12, "top_p": 0.9, "seed": 1}
    found = decoding.generate(model, tokenizer, texts, **drawn, num_return_sequences=2, beam=1)
    assert [len(hypotheses) for hypotheses in found] == [2, 2]
    assert tokens_of(decoding.generate(model, tokenizer, texts, **drawn)) == [
        texts[:1] for texts in tokens_of(found)
    ]
    for more, message in [
        ({"do_sample": True, "beam": 4}, "beam 4 is for beam search, do_sample for drawing"),
        ({"do_sample": True, "length_penalty": 1.0}, "length_penalty 1.0 is for beam search"),
        ({"top_k": 5}, "top_k 5 is for drawing at random; give do_sample with it"),
        ({"do_sample": True, "num_return_sequences": 0}, "num_return_sequences 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoding.generate(model, tokenizer, texts, **more)


def drawing_argv(tiny: Tiny, *more: object) -> list[str]:
    argv = beam_argv(tiny, "--do_sample", "--seed", 3, *more)
    at = argv.index("--beam")
    return argv[:at] + argv[at + 2 :]


def drawn_file(tiny: Tiny, *more: object) -> list[dict]:
    """The predictions of the program's draws, for rows of which some have the same context."""
    write_rows(tiny.folder / "test.jsonl", rows_with_repeats())
    gpt2_beam.main(drawing_argv(tiny, *more))
    return read(tiny.folder / "predictions.jsonl")


def test_the_program_draws_by_the_seed_and_the_first_row_of_a_context(tiny: Tiny) -> None:
    predictions = drawn_file(tiny, "--num_return_sequences", 2, "--top_k", 30)
    contexts = [tuple(p["context"]) for p in predictions]
    first = {context: contexts.index(context) for context in contexts}
    model, _ = checkpoints.load(tiny.base, model_card=tiny.card)
    chosen = SamplingSettings(top_k=30, seed=3, eval_len=8, end_ids=(5,))
    prompts = [torch.tensor(context) for context in first]
    found = sample(model, prompts, chosen, 16, 2, numbers=list(first.values()))
    texts = dict(zip(first, tokens_of(found), strict=True))
    assert len(texts) < len(predictions)
    for p in predictions:
        assert [best["prediction"] for best in p["n_best"]] == texts[tuple(p["context"])]
        assert p["prediction"] == p["n_best"][0]["prediction"]


def test_the_program_draws_the_same_whatever_batch_size_and_number_of_processes(
    nano: Tiny,
) -> None:
    expected = [p["prediction"] for p in drawn_file(nano)]
    for more in (("--batch_size", 1), ("--batch_size", 3), ("--random_seed", 3)):
        assert [p["prediction"] for p in drawn_file(nano, *more)] == expected
    assert [p["prediction"] for p in drawn_file(nano, "--seed", 4)] != expected
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = drawing_argv(nano, "--batch_size", 3)
    code, _, err = finish(start([*torchrun, ROOT / "gpt2_beam.py", *argv]))
    assert code == 0, err
    assert [p["prediction"] for p in read(nano.folder / "predictions.jsonl")] == expected


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--do_sample", "--beam", 4), "--beam 4 is for beam search"),
        (("--do_sample", "--search", "hf"), "--search hf is for beam search"),
        (("--top_p", 0.9), "--top_p 0.9 is for drawing at random; give do_sample with it"),
        (("--do_sample", "--temperature", 0), "--temperature 0 leaves nothing to draw"),
        (("--do_sample", "--top_p", 2), "--top_p 2.0 must be"),
        (("--do_sample", "--seed", -1), "--seed -1 must not be negative"),
    ],
)
def test_flags_that_contradict_the_draw_are_refused_in_a_sentence(
    flags: tuple, sentence: str
) -> None:
    with pytest.raises(InputError, match=f"^{sentence}[^\n]*$"):
        gpt2_beam.parse_args([str(flag) for flag in flags])
