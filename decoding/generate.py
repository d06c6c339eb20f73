"""Text in, text out: prompts from texts, their completions, and the texts of these.

The prompt is what training has shown to the model: BPE(context) and the id of `<|endoftext|>`,
after which it writes BPE(" " + completion) and an end id.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_utils import default_end_ids
from decoding.beam_search import Hypothesis, SearchSettings, beam_search
from decoding.cache import CachedModel
from decoding.sampling import SamplingSettings, sample
from model import GPT2LMModel

Settings = SearchSettings | SamplingSettings
SEARCH = {field.name for field in fields(SearchSettings)}
SAMPLING = {field.name for field in fields(SamplingSettings)}


def generate(
    model: GPT2LMModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    **settings: Any,
) -> list[list[Hypothesis]]:
    """Return for each context its completions; `text_of` gives their texts.

    They are the best that beam search finds, best first, or with `do_sample` as many random ones. A
    context that leaves no room for `eval_len` tokens in the model's window loses its head, as in
    training. The model computes in eval mode, on the device that it is on.

    Args:
        batch_size: contexts decoded at once; no effect on the result.
        num_return_sequences: how many completions to return, for beam search at most `beam`.
        settings: fields of `SearchSettings` or, with `do_sample`, of `SamplingSettings`, with their
            defaults; `end_ids` default to `<|endoftext|>` and, where it is one token, the blank
            line.

    Raises:
        ValueError: a context is empty, the tokenizer is not the model's, or a setting is out of
            range or does not go with `do_sample`.
    """
    window, device = model.config.window, next(model.parameters()).device
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, more than the model's "
            f"{model.config.vocab_size}; give the vocabulary of its base"
        )
    if "" in texts:
        raise ValueError(f"context {list(texts).index('')} is empty")
    chosen = make_settings(do_sample, **{"end_ids": tuple(default_end_ids(tokenizer))} | settings)
    if chosen.eval_len >= window:
        raise ValueError(f"eval_len {chosen.eval_len} leaves no room in a window of {window}")
    prompts = [
        torch.tensor(ids[chosen.eval_len - window :], device=device)
        for ids in encode_contexts(tokenizer, texts)
    ]
    training = model.training
    try:
        return complete(model.eval(), prompts, chosen, batch_size, num_return_sequences)
    finally:
        model.train(training)


def encode_contexts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the prompt that each context makes, as token ids."""
    end, *_ = default_end_ids(tokenizer)
    return [[*encoded.ids, end] for encoded in tokenizer.encode_batch_fast(list(texts))]


def make_settings(do_sample: bool, **given: Any) -> Settings:
    """Return the settings of beam search or, with `do_sample`, of sampling.

    Raises:
        ValueError: a value is out of range, or a setting belongs to the other of the two.
    """
    if do_sample and given.get("beam") == 1:
        del given["beam"]  # contradicts nothing
    own, other = (SAMPLING, SEARCH) if do_sample else (SEARCH, SAMPLING)
    if foreign := [name for name in given if name in other - own]:
        setting = f"{foreign[0]} {given[foreign[0]]}"
        if do_sample:
            raise ValueError(f"{setting} is for beam search, do_sample for drawing; give only one")
        raise ValueError(f"{setting} is for drawing at random; give do_sample with it")
    return SamplingSettings(**given) if do_sample else SearchSettings(**given)


def complete(
    model: CachedModel,
    prompts: Sequence[Tensor],
    settings: Settings,
    batch_size: int = 16,
    num_return_sequences: int = 1,
    on_done: Callable[[int], object] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Return the completions of each prompt, found or drawn as the settings say; the arguments are
    those of `beam_search` and `sample`."""
    arguments = batch_size, num_return_sequences, on_done
    if isinstance(settings, SamplingSettings):
        return sample(model, prompts, settings, *arguments, numbers)
    return beam_search(model, prompts, settings, *arguments)


def text_of(hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    """Return the text of a completion, without its end id and the space before it."""
    words = hypothesis.tokens[:-1] if hypothesis.finished else hypothesis.tokens
    return tokenizer.decode(words, skip_special_tokens=False).strip()
