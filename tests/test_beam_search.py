"""The search against the original's outputs, transformers, brute force and a plain loop."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import checkpoints
from decoding.beam_search import (
    Hypothesis,
    SearchSettings,
    beam_search,
    largest,
)
from decoding.cache import SUMMED_IN_ONE, VECTOR, DecodeCache
from decoding.generate import complete
from decoding.packed import pack
from decoding.rules import ban_repeated_ngrams
from decoding.sampling import SamplingSettings
from loralib import LoraConfig
from model import GPT2Config, GPT2LMModel

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)


@dataclass
class TableModel:
    """Logits from a random table (steps, states, V); the state is a function of the whole text.

    The cache holds as keys the states that the tokens of its slots have led to, and as values the
    numbers of generated tokens up to there, so a wrong reordering shows.
    """

    table: Tensor
    steps: int = field(default=0, init=False)

    def next(self, states: Tensor, tokens: Tensor) -> Tensor:
        return (states * 31 + tokens + 1) % self.table.size(1)

    def prefill(self, prompts: Sequence[Tensor], cache: DecodeCache) -> Tensor:
        states = [self.read(prompt) for prompt in prompts]
        keys = torch.tensor(states).repeat_interleave(cache.positions)[:, None, None]
        cache.add_layer(keys, torch.zeros_like(keys))
        return self.table[0, states].clone()

    def read(self, prompt: Tensor) -> int:
        state = torch.tensor(0)
        for token in prompt:
            state = self.next(state, token)
        return int(state)

    def decode_step(self, input_ids: Tensor, cache: DecodeCache) -> Tensor:
        self.steps += 1
        states, counts = (held[:, :, 0, 0] for held in cache.layers[0])  # (B, S)
        newest = torch.where(cache.visible, counts[:, None], -1).argmax(dim=2)  # (B, K)
        states, counts = states.gather(1, newest), counts.gather(1, newest)
        states, counts = self.next(states, input_ids), counts + 1
        cache.add_slots(input_ids.size(1))
        for held, new in zip(cache.layers[0], (states, counts), strict=True):
            held[cache.new] = new[..., None, None]
        return self.table[counts, states].clone()

    def logits(self, prompt: Tensor, tokens: list[int]) -> Tensor:
        """Logits (V,) behind a prompt and what was generated."""
        state = self.read(torch.cat((prompt, torch.tensor(tokens, dtype=torch.int64))))
        return self.table[len(tokens), state].clone()


def table_model(seed: int, vocabulary: int, steps: int, scale: float = 2) -> TableModel:
    generator = torch.Generator().manual_seed(seed)
    return TableModel(scale * torch.randn(steps, 23, vocabulary, generator=generator))


def constant_model(*logits: float, steps: int = 64) -> TableModel:
    return TableModel(torch.tensor(logits).expand(steps, 23, -1))


def log_probs(model: TableModel, prompt: Tensor, tokens: list[int], s: SearchSettings) -> Tensor:
    """The rules of the original, token by token: (V,), all -inf where all is banned."""
    logits = model.logits(prompt, tokens)
    if s.repetition_penalty != 1:
        for token in set(tokens):
            penalty = s.repetition_penalty
            logits[token] = logits[token] * (penalty if logits[token] < 0 else 1 / penalty)
    if len(tokens) < s.min_length:
        for token in s.end_ids:
            logits[token] = -math.inf
    n = s.no_repeat_ngram_size
    ngrams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} if n else set()
    for token in range(len(logits)):
        if n and len(tokens) >= n and (*tokens[len(tokens) - n + 1 :], token) in ngrams:
            logits[token] = -math.inf
    return logits if logits.max() == -math.inf else logits.log_softmax(0)


def score(total: Tensor, tokens: list[int], s: SearchSettings) -> float:
    return float(total / max(len(tokens), 1) ** s.length_penalty)


def enumerate_all(model: TableModel, prompt: Tensor, s: SearchSettings) -> list[Hypothesis]:
    """Every text there is, best first."""
    found, open_texts = [], [([], torch.tensor(0.0))]
    while open_texts:
        tokens, total = open_texts.pop()
        ended = bool(tokens) and tokens[-1] in s.end_ids
        following = log_probs(model, prompt, tokens, s) if len(tokens) < s.eval_len else None
        if ended or following is None or following.max() == -math.inf:
            found.append(Hypothesis(tokens, score(total, tokens, s), ended))
        else:
            open_texts += [
                ([*tokens, token], total + value)
                for token, value in enumerate(following)
                if value > -math.inf
            ]
    return sorted(found, key=lambda h: -h.score)


def search_by_loops(model: TableModel, prompt: Tensor, s: SearchSettings) -> list[Hypothesis]:
    """The original's algorithm without batch, tensors or early stop: all it found, best first."""
    beams, found = [([], torch.tensor(0.0))], []
    for step in range(s.eval_len):
        candidates = []
        for tokens, total in beams:
            following = log_probs(model, prompt, tokens, s)
            if following.max() == -math.inf:
                found.append(Hypothesis(tokens, score(total, tokens, s), False))
            candidates += [
                ([*tokens, t], total + p) for t, p in enumerate(following) if p > -math.inf
            ]
        candidates.sort(key=lambda c: -c[1])
        beams = []
        for tokens, total in candidates[: s.beam]:
            ended = tokens[-1] in s.end_ids
            if ended or step == s.eval_len - 1:
                found.append(Hypothesis(tokens, score(total, tokens, s), ended))
            else:
                beams.append((tokens, total))
    return sorted(found, key=lambda h: -h.score)


def assert_same(got: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [(h.tokens, h.finished) for h in got] == [(h.tokens, h.finished) for h in expected]
    scores = torch.tensor([[a.score, b.score] for a, b in zip(got, expected, strict=True)])
    assert scores[:, 0].allclose(scores[:, 1], atol=1e-4)


@st.composite
def toy_searches(draw: st.DrawFn, vocabulary: st.SearchStrategy, length: st.SearchStrategy):
    """A table model, prompts of unequal lengths, and settings over all the rules."""
    size, steps = draw(vocabulary), draw(length)
    ends = draw(st.sets(st.integers(0, size - 1), max_size=min(3, size - 1)))
    chosen = SearchSettings(
        beam=draw(st.integers(1, 5)),
        length_penalty=draw(st.sampled_from([0.0, 0.8, 1.0, 2.0, -0.5])),
        no_repeat_ngram_size=draw(st.integers(0, 3)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        min_length=draw(st.integers(0, steps)),
        eval_len=steps,
        end_ids=tuple(sorted(ends)),
    )
    token = st.integers(0, size - 1)
    lists = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=4))
    # The larger the scale the surer the model, and the more often a longer text wins in the end.
    scale = draw(st.sampled_from([1, 2, 8]))
    model = table_model(draw(st.integers(0, 2**20)), size, steps, scale)
    return model, [torch.tensor(tokens) for tokens in lists], chosen


@PROPERTY
@given(toy_searches(st.integers(2, 4), st.integers(1, 4)))
def test_a_beam_that_holds_everything_finds_what_enumeration_finds(search) -> None:
    model, prompts, chosen = search
    wide = SearchSettings(**vars(chosen) | {"beam": model.table.size(2) ** chosen.eval_len})
    wanted = min(4, wide.beam)
    for prompt, got in zip(prompts, beam_search(model, prompts, wide, 3, wanted), strict=True):
        assert_same(got, enumerate_all(model, prompt, wide)[:wanted])


@PROPERTY
@given(toy_searches(st.integers(2, 9), st.integers(1, 8)), st.integers(1, 5), st.randoms())
def test_a_narrow_beam_finds_what_a_plain_loop_finds_in_any_batch_and_order(
    search, batch_size: int, shuffler: random.Random
) -> None:
    model, prompts, chosen = search
    shuffler.shuffle(prompts)
    wanted = shuffler.randint(1, chosen.beam)
    for prompt, got in zip(
        prompts, beam_search(model, prompts, chosen, batch_size, wanted), strict=True
    ):
        assert_same(got, search_by_loops(model, prompt, chosen)[:wanted])


@PROPERTY
@given(toy_searches(st.integers(2, 5), st.integers(3, 12)), st.sampled_from(["original", "hf"]))
def test_no_ngram_occurs_twice_and_nothing_ends_too_soon(search, kind: str) -> None:
    model, prompts, chosen = search
    chosen = SearchSettings(**vars(chosen) | {"search": kind})
    n = chosen.no_repeat_ngram_size
    for prompt, hypotheses in zip(
        prompts, beam_search(model, prompts, chosen, 4, chosen.beam), strict=True
    ):
        for h in hypotheses:
            text = h.tokens if kind == "original" else prompt.tolist() + h.tokens
            ngrams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)] if n else []
            new = ngrams[max(0, len(ngrams) - len(h.tokens)) :]
            assert all(ngrams.count(ngram) == 1 for ngram in new)
            assert h.finished == (bool(h.tokens) and h.tokens[-1] in chosen.end_ids)
            assert not h.finished or len(h.tokens) > chosen.min_length
            assert not set(h.tokens[:-1]) & set(chosen.end_ids)
            assert not math.isnan(h.score)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 9), st.integers(0, 4), st.data())
def test_ngram_bans_are_those_of_a_plain_loop_and_padding_bans_nothing(
    batch: int, size: int, length: int, padding: int, data: st.DataObject
) -> None:
    vocabulary, beams = 3, 2
    length = max(length, size - padding, 1)
    row = st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length)
    rows = [data.draw(row) for _ in range(batch * beams)]
    history = torch.tensor([[-1] * padding + tokens for tokens in rows]).view(batch, beams, -1)
    scores = torch.zeros(batch, beams, vocabulary)
    ban_repeated_ngrams(scores, history, size)
    for tokens, got in zip(rows, scores.view(-1, vocabulary), strict=True):
        seen = {tuple(tokens[i : i + size]) for i in range(length - size + 1)}
        suffix = tokens[length - size + 1 :] if size > 1 else []
        expected = [
            -math.inf if length >= size - 1 and (*suffix, token) in seen else 0.0
            for token in range(vocabulary)
        ]
        assert got.tolist() == expected


def search_one(model: TableModel, wanted: int = 1, **chosen) -> list[Hypothesis]:
    return beam_search(model, [torch.tensor([0])], SearchSettings(**chosen), 1, wanted)[0]


def test_very_unlikely_tokens_keep_their_log_probability() -> None:
    best, second = search_one(
        constant_model(0.0, -120.0), 2, beam=2, eval_len=1, end_ids=(1,), no_repeat_ngram_size=0
    )
    assert (best.score, second.score) == (0.0, -120.0)


def test_a_text_cut_off_at_eval_len_is_flagged_unfinished() -> None:
    chosen = {"beam": 3, "eval_len": 5, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
    (cut,) = search_one(constant_model(1.0, 0.0, -9.0), end_ids=(2,), **chosen)
    assert cut == Hypothesis([0] * 5, cut.score, False)
    (ended,) = search_one(constant_model(1.0, 0.0, -9.0), end_ids=(0,), **chosen)
    assert ended.tokens == [0]
    assert ended.finished


@pytest.mark.parametrize("kind", ["original", "hf"])
def test_a_beam_whose_every_token_is_banned_ends_unfinished(kind: str) -> None:
    (best,) = search_one(
        constant_model(1.0, 0.5, 0.0), beam=2, eval_len=10, end_ids=(), no_repeat_ngram_size=1,
        search=kind,
    )  # fmt: skip
    expected = [0, 1, 2] if kind == "original" else [1, 2]  # hf counts the prompt, which is 0
    assert best.tokens == expected
    assert not best.finished
    assert math.isfinite(best.score)


def test_where_every_first_token_is_banned_the_text_is_empty() -> None:
    (best,) = search_one(constant_model(0.0, 1.0), beam=2, min_length=1, end_ids=(0, 1))
    assert (best.tokens, best.finished) == ([], False)


def test_the_earlier_of_two_equal_hypotheses_wins() -> None:
    chosen = {"beam": 3, "eval_len": 2, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
    first, second, third = search_one(constant_model(0.0, 0.0), 3, end_ids=(1,), **chosen)
    assert first.score == second.score == third.score
    assert [first.tokens, second.tokens, third.tokens] == [[1], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("penalty", "at_once", "longer", "winner"),
    [
        (0.8, 0.6, 10, 10),
        (2.0, 0.9, 10, 10),
        (-1.0, 0.2, 2, 2),
        (0.0, 0.6, 10, 1),
        (-1.0, 0.6, 2, 1),
    ],
)
def test_a_search_goes_on_just_as_long_as_a_longer_text_can_win(
    penalty: float, at_once: float, longer: int, winner: int
) -> None:
    """Token 1 ends the text at once with the given probability; otherwise tokens 0 follow surely
    until one of the longer length has ended. Scores are log p / length ** penalty of these two."""
    table = torch.full((10, 23, 2), -30.0)
    table[: longer - 1, :, 0] = 0.0
    table[longer - 1 :, :, 1] = 0.0
    table[0] = torch.tensor([1 - at_once, at_once]).log()
    (best,) = search_one(
        TableModel(table), beam=2, eval_len=10, end_ids=(1,), length_penalty=penalty,
        no_repeat_ngram_size=0,
    )  # fmt: skip
    assert best.tokens == [0] * (winner - 1) + [1]
    chance = at_once if winner == 1 else 1 - at_once
    assert best.score == pytest.approx(math.log(chance) / winner**penalty, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.8, 2.0, -1.0])
def test_time_does_not_grow_with_eval_len_once_nothing_can_win(penalty: float) -> None:
    table = torch.zeros(1000, 23, 4)
    table[:5, :, 3] = -30  # nothing ends before the fifth token, then everything does
    table[5:, :, 3] = 30
    steps = set()
    for eval_len in (20, 1000):
        model = TableModel(table)
        (best,) = search_one(
            model, beam=3, eval_len=eval_len, end_ids=(3,), length_penalty=penalty,
            no_repeat_ngram_size=0,
        )  # fmt: skip
        assert best.finished
        steps.add(model.steps)
    assert len(steps) == 1
    assert steps.pop() <= 8


def test_prompts_that_are_done_leave_the_batch_and_are_reported() -> None:
    done: list[int] = []
    model = table_model(1, 6, 30)
    model.table[:, ::2, 5] += 9  # some prompts lead to an early end, some do not
    prompts = [torch.tensor([i, i]) for i in range(5)]
    chosen = SearchSettings(beam=2, eval_len=30, end_ids=(5,))
    found = beam_search(model, prompts, chosen, 3, on_done=done.append)
    assert sum(done) == len(found) == 5
    assert found == [beam_search(model, [prompt], chosen)[0] for prompt in prompts]


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0}, {"eval_len": 0}, {"no_repeat_ngram_size": -1}, {"min_length": -1},
        {"repetition_penalty": 0.0}, {"search": "greedy"}, {"length_penalty": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SearchSettings(**wrong)


def test_more_hypotheses_than_beams_and_nan_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="num_return_sequences 3"):
        search_one(constant_model(0.0, 1.0), 3, beam=2, end_ids=(1,))
    with pytest.raises(ValueError, match="NaN"):
        search_one(constant_model(math.nan, 1.0), beam=2, end_ids=(1,))


@pytest.mark.parametrize("size", [1, 63, 64, 500, 4096, 50257])
@pytest.mark.parametrize("count", [1, 10, 30])
def test_the_largest_are_those_of_topk(size: int, count: int) -> None:
    count = min(count, size)
    values = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))
    values[0, :, ::3] = -math.inf
    values[0, 0, count - 1 :] = -math.inf  # fewer than are asked for
    best, places = largest(values, count)
    torch.testing.assert_close(best, values.topk(count)[0], rtol=0, atol=0)
    torch.testing.assert_close(values.gather(-1, places), best, rtol=0, atol=0)
    assert all(len(set(row)) == count for row in places.flatten(0, 1).tolist())


@PROPERTY
@given(
    size=st.sampled_from([1, 40, 200, 700]),
    count=st.integers(1, 12),
    values=st.lists(st.sampled_from([-math.inf, -2.5, -1e-40, -0.0, 0.0, 3.0]), min_size=1),
    seed=st.integers(0, 1000),
)
def test_of_equal_values_the_first_are_the_largest(
    size: int, count: int, values: list[float], seed: int
) -> None:
    chosen = torch.randint(len(values), (2, size), generator=torch.Generator().manual_seed(seed))
    table, count = torch.tensor(values)[chosen], min(count, size)
    expected, order = table.sort(dim=-1, descending=True, stable=True)
    best, places = largest(table, count)
    assert torch.equal(places, order[:, :count]) and torch.equal(best, expected[:, :count])


# GPT-2 itself: its cache, the original's outputs, and transformers.


def small_gpt2(vocabulary: int = 97, seed: int = 0) -> GPT2LMModel:
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMModel(GPT2Config(vocab_size=vocabulary, initializer_range=0.3, **shape))
    return model.eval()


def to_tuple(key: object) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def ragged_prompts(count: int, vocabulary: int = 97, seed: int = 0) -> list[Tensor]:
    draw = random.Random(seed)
    return [
        torch.tensor([draw.randrange(3, vocabulary) for _ in range(draw.randint(1, 19))])
        for _ in range(count)
    ]


@torch.inference_mode()
def test_weights_that_are_rounded_once_give_the_bits_of_those_rounded_for_each_token() -> None:
    found, prompts = [], ragged_prompts(4)
    lora = LoraConfig(2, 8, targets=("q", "v", "fc"))
    for rounded_once in (False, True):
        torch.manual_seed(0)
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMModel(GPT2Config(97, initializer_range=0.3, lora=lora, **shape)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
        model = pack(model, "bf16") if rounded_once else checkpoints.merge(model)
        with torch.autocast("cpu", torch.bfloat16):
            cache = DecodeCache([len(prompt) for prompt in prompts])
            found.append([model.prefill(prompts, cache)])
            for _ in range(3):
                cache.reorder(torch.zeros(4, 2, dtype=torch.int64))
                found[-1].append(model.decode_step(torch.ones(4, 2, dtype=torch.int64), cache))
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that know bounds of what they use, as on a GPU."""
    monkeypatch.setattr(DecodeCache, "bounded", True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cache_of", ["cpu", "gpu"])
@torch.inference_mode()
def test_cached_steps_give_the_logits_of_whole_texts_through_reordering_and_leaving(
    packed: bool, cache_of: str, request: pytest.FixtureRequest
) -> None:
    if cache_of == "gpu":
        request.getfixturevalue("bounded")
    model, beams, draw = small_gpt2(), 3, torch.Generator().manual_seed(0)
    prompts = ragged_prompts(4)
    texts = [[prompt] * beams for prompt in prompts]
    runner = pack(small_gpt2()) if packed else model
    cache = DecodeCache([len(prompt) for prompt in prompts])
    logits = runner.prefill(prompts, cache)
    for row, prompt in zip(logits, prompts, strict=True):
        torch.testing.assert_close(row, model(prompt[None])[0][0, -1], atol=1e-4, rtol=0)
    parents = torch.zeros(len(prompts), beams, dtype=torch.int64)
    for step in range(30):  # long enough for unused slots to be dropped several times
        cache.reorder(parents)
        tokens = torch.randint(97, parents.shape, generator=draw)
        texts = [
            [torch.cat((text[k], token[None])) for k, token in zip(order, row, strict=True)]
            for text, order, row in zip(texts, parents.tolist(), tokens, strict=True)
        ]
        logits = runner.decode_step(tokens, cache)
        for text, rows in zip(texts, logits, strict=True):
            whole = model(torch.stack(text))[0][:, -1]
            torch.testing.assert_close(rows, whole, atol=1e-4, rtol=0)
        parents = torch.randint(beams, parents.shape, generator=draw)
        if step in (5, 11):
            live = torch.tensor([0, 2, 3]) if step == 5 else torch.tensor([1])
            texts, parents = [texts[i] for i in live], parents[live]
            cache.keep(live)


def test_the_cache_keeps_only_what_some_beam_still_sees() -> None:
    model, beams = small_gpt2(), 4
    with torch.inference_mode():
        cache = DecodeCache([6])
        model.prefill([torch.ones(6, dtype=torch.int64)], cache)
        cache.reorder(torch.zeros(1, beams, dtype=torch.int64))
        for _ in range(50):
            model.decode_step(torch.ones(1, beams, dtype=torch.int64), cache)
            cache.reorder(torch.zeros(1, beams, dtype=torch.int64))
    assert cache.used[0] <= 6 + 50 + beams
    room = cache.STEPS_OF_ROOM * beams + VECTOR
    assert cache.layers[0][0].size(1) < 6 + 50 + room


@pytest.mark.usefixtures("bounded")
def test_a_cache_that_knows_bounds_alone_takes_little_more_room() -> None:
    model, beams = small_gpt2(), 4
    with torch.inference_mode():
        cache = DecodeCache([6])
        model.prefill([torch.ones(6, dtype=torch.int64)], cache)
        for _ in range(51):
            cache.reorder(torch.zeros(1, beams, dtype=torch.int64))
            model.decode_step(torch.ones(1, beams, dtype=torch.int64), cache)
    assert cache.layers[0][0].size(1) < 6 + 50 + 2 * cache.STEPS_OF_ROOM * beams


@pytest.mark.parametrize("settings", [SearchSettings(eval_len=2), SamplingSettings(eval_len=2)])
def test_decoding_leaves_out_the_attention_that_plans_each_length_and_puts_it_back(
    settings: SearchSettings | SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = small_gpt2(), []
    real = model.decode_step

    def decode_step(*inputs: object) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*inputs)

    monkeypatch.setattr(model, "decode_step", decode_step)
    for _ in range(2):
        torch.backends.cuda.enable_cudnn_sdp(True)
        complete(model, ragged_prompts(2), replace(settings, end_ids=(3,)))
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("search", ["original", "hf"])
def test_a_token_takes_one_answer_of_the_device(
    search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And now and then another, of how much of the cache is in use."""
    reads: list[str] = []

    def counted(name: str) -> Callable:
        real = getattr(Tensor, name)
        return lambda self, *rest, **named: (reads.append(name), real(self, *rest, **named))[1]

    def getitem(self: Tensor, key: object) -> Tensor:
        if any(getattr(part, "dtype", None) == torch.bool for part in to_tuple(key)):
            reads.append("a boolean index")
        return real_getitem(self, key)

    def setitem(self: Tensor, key: object, value: object) -> None:
        if not isinstance(value, Tensor):
            reads.append("a number sent")
        real_setitem(self, key, value)

    real_getitem, real_setitem = Tensor.__getitem__, Tensor.__setitem__
    beam = import_module("decoding.beam_search")  # the package's name for it is the function
    real_largest, model, length = beam._first_largest, small_gpt2(), 40

    def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
        before = len(reads)  # where it asks a CPU, it does not ask a GPU
        found = real_largest(values, count)
        del reads[before:]
        return found

    monkeypatch.setattr(beam, "_first_largest", largest)
    for name in READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    monkeypatch.setattr(Tensor, "__getitem__", getitem)
    monkeypatch.setattr(Tensor, "__setitem__", setitem)
    counts = []
    for eval_len in (length // 2, length):
        reads.clear()
        chosen = SearchSettings(
            beam=4, eval_len=eval_len, min_length=eval_len, end_ids=(3, 5), search=search
        )
        beam_search(model, ragged_prompts(3), chosen, 3)
        counts.append(len(reads))
    assert counts[1] - counts[0] <= 1.25 * (length // 2), reads


@pytest.mark.parametrize("longest", [19, 3 * SUMMED_IN_ONE])
@torch.inference_mode()
def test_a_context_has_the_same_logits_bit_for_bit_in_any_batch(longest: int) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": longest + 20}
    model = pack(GPT2LMModel(GPT2Config(97, initializer_range=0.3, **shape)).eval())
    draw = torch.Generator().manual_seed(1)
    lengths = [longest, 7, longest // 2, 1, longest - 1]
    prompts = [torch.randint(97, (n,), generator=draw) for n in lengths]
    choices = torch.randint(4, (20, 5, 4), generator=draw)  # parents of each step
    tokens = torch.randint(97, (20, 5, 4), generator=draw)

    def logits(contexts: list[int]) -> list[Tensor]:
        cache = DecodeCache([lengths[i] for i in contexts])
        found = [model.prefill([prompts[i] for i in contexts], cache)]
        cache.reorder(torch.zeros(len(contexts), 4, dtype=torch.int64))
        for parents, new in zip(choices[:, contexts], tokens[:, contexts], strict=True):
            found.append(model.decode_step(new, cache))
            cache.reorder(parents)
        return found

    together = logits([0, 1, 2, 3, 4])
    for context in range(5):
        for alone, rows in zip(logits([context]), together, strict=True):
            assert torch.equal(alone[0], rows[context])


@pytest.mark.parametrize("search", ["original", "hf"])
@pytest.mark.parametrize("vocabulary", [64, 2048])
def test_twin_tokens_give_the_same_texts_whatever_the_batch(search: str, vocabulary: int) -> None:
    """Tokens i and i + V / 2 have one embedding, so whatever is found has an equal rival."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMModel(GPT2Config(vocabulary, initializer_range=0.3, **shape)).eval()
    twin = vocabulary // 2
    with torch.no_grad():
        model.transformer.wte.weight[twin:] = model.transformer.wte.weight[:twin]
    pack(model)
    chosen = SearchSettings(beam=5, eval_len=15, end_ids=(0, twin), search=search)
    prompts = ragged_prompts(60, vocabulary)
    alone = beam_search(model, prompts, chosen, 1, 3)
    assert any(found[0].score == found[1].score for found in alone)
    for batch_size in (2, 7, 60):
        assert beam_search(model, prompts, chosen, batch_size, 3) == alone


@torch.inference_mode()
def test_a_score_is_the_sum_of_the_texts_log_probabilities() -> None:
    model, prompts = small_gpt2(), ragged_prompts(4)
    chosen = SearchSettings(
        beam=4, eval_len=12, end_ids=(0, 1, 2), length_penalty=0.8, no_repeat_ngram_size=0
    )
    for prompt, hypotheses in zip(prompts, beam_search(model, prompts, chosen, 4, 3), strict=True):
        for h in hypotheses:
            tokens = torch.tensor(h.tokens)
            logits = model(torch.cat((prompt, tokens))[None])[0][0, len(prompt) - 1 : -1]
            steps = logits.log_softmax(-1).gather(1, tokens[:, None])
            assert h.score == pytest.approx(float(steps.sum()) / len(tokens) ** 0.8, abs=1e-4)


@pytest.fixture(scope="module")
def oracle() -> tuple[GPT2LMModel, dict[str, dict]]:
    """The trained model and the decodes of the original code, by name of their settings."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "oracle"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: no outputs of the original to compare with")
    decodes = json.loads((folder / "decode.json").read_text(encoding="utf-8"))
    state = load_file(folder / decodes["base"])
    shape = {name: decodes[name] for name in ("n_layer", "n_embd", "n_head")}
    positions = state["wpe.weight"].size(0)
    model = GPT2LMModel(GPT2Config(vocab_size=decodes["vocab"], n_positions=positions, **shape))
    checkpoints.load_weights(model, state)
    return pack(model.eval()), {decode["name"]: decode for decode in decodes["sets"]}


ORACLE_RUNS = [
    *((name, 32) for name in ("published", "paper_penalty", "penalty_2", "no_ban")),
    *((name, 32) for name in ("beam_4", "min_length_20", "short")),
    *(("short", size) for size in (1, 2, 7)),
    *(("beam_4", size) for size in (1, 2, 7)),
]


@pytest.mark.parametrize(("name", "batch_size"), ORACLE_RUNS)
def test_outputs_equal_the_originals_whatever_the_batch_and_the_order(
    oracle, name: str, batch_size: int
) -> None:
    model, sets = oracle
    given = dict(sets[name]["settings"])
    chosen = SearchSettings(end_ids=tuple(given.pop("eos_token_id")), **given)
    rows = list(zip(sets[name]["contexts"], sets[name]["outputs"], strict=True))
    random.Random(batch_size).shuffle(rows)
    found = beam_search(model, [torch.tensor(context) for context, _ in rows], chosen, batch_size)
    for (_, expected), (best, *_) in zip(rows, found, strict=True):
        assert best.tokens + [0] * (chosen.eval_len - len(best.tokens)) == expected
        assert best.finished == (best.tokens[-1] in chosen.end_ids)


MANY_ENDS = tuple(range(0, 97, 2))  # so that often more than K of the best candidates end at once
TRANSFORMERS_RUNS = {
    "penalty 0.8": {},
    "penalty 0.8, two ends": {"end_ids": (0, 2)},
    "penalty 0": {"length_penalty": 0.0},
    "penalty 2, many ends": {"length_penalty": 2.0, "end_ids": MANY_ENDS},
    "penalty -1, many ends": {"length_penalty": -1.0, "end_ids": MANY_ENDS},
    "no bigram twice": {"no_repeat_ngram_size": 2, "end_ids": (0, 2)},
    "repetition 1.3": {"repetition_penalty": 1.3},
    "all rules, three best": {
        "beam": 6, "repetition_penalty": 1.2, "no_repeat_ngram_size": 1, "min_length": 3,
        "end_ids": MANY_ENDS, "num_return_sequences": 3,
    },
    "one beam": {"beam": 1, "length_penalty": 2.0, "end_ids": MANY_ENDS},
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS_RUNS)
def test_the_hf_search_gives_what_transformers_generates_for_40_ragged_prompts(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {
        "beam": 4, "eval_len": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 0,
        "min_length": 0, "repetition_penalty": 1.0, "end_ids": (0,),
    } | TRANSFORMERS_RUNS[name]  # fmt: skip
    wanted = given.pop("num_return_sequences", 1)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(config).eval()
    model = small_gpt2()
    checkpoints.load_weights(model, peer.state_dict())
    prompts = ragged_prompts(40)
    found = beam_search(model, prompts, SearchSettings(search="hf", **given), 16, wanted)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        generated = peer.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], num_beams=given["beam"],
            do_sample=False, max_new_tokens=given["eval_len"], min_new_tokens=given["min_length"],
            eos_token_id=list(given["end_ids"]), pad_token_id=96, num_return_sequences=wanted,
            length_penalty=given["length_penalty"],
            no_repeat_ngram_size=given["no_repeat_ngram_size"],
            repetition_penalty=given["repetition_penalty"],
        )  # fmt: skip
        for tokens, h in zip(generated[:, len(prompt) :].tolist(), hypotheses, strict=True):
            length = next(
                (i + 1 for i, token in enumerate(tokens) if token in given["end_ids"]), len(tokens)
            )
            assert h.tokens == tokens[:length]
