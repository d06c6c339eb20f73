"""Text in, text out: prompts from texts, their search, and the texts of what it finds.

The prompt is what training has shown to the model: BPE(context) and the id of `<|endoftext|>`,
after which it writes BPE(" " + completion) and an end id.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from data_utils import END_OF_TEXT, default_end_ids
from decoding.beam_search import Hypothesis, SearchSettings, beam_search
from model import GPT2LMModel


def generate(
    model: GPT2LMModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    num_return_sequences: int = 1,
    **settings: Any,
) -> list[list[Hypothesis]]:
    """Return for each context the best completions, best first; `text_of` gives their texts.

    A context that leaves no room for `eval_len` tokens in the model's window loses its head, as in
    training. The model computes in eval mode, on the device that it is on.

    Args:
        batch_size: contexts searched at once; no effect on the result.
        num_return_sequences: how many completions to return, at most `beam`.
        settings: fields of `SearchSettings`, with its defaults; `end_ids` default to
            `<|endoftext|>` and, where it is one token, the blank line.

    Raises:
        ValueError: a context is empty, the tokenizer is not the model's, or a setting is out of
            range.
    """
    window, device = model.config.n_positions, next(model.parameters()).device
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, more than the model's "
            f"{model.config.vocab_size}; give the vocabulary of its base"
        )
    if "" in texts:
        raise ValueError(f"context {list(texts).index('')} is empty")
    search = SearchSettings(**{"end_ids": tuple(default_end_ids(tokenizer))} | settings)
    if search.eval_len >= window:
        raise ValueError(f"eval_len {search.eval_len} leaves no room in a window of {window}")
    end = tokenizer.token_to_id(END_OF_TEXT)
    prompts = [
        torch.tensor([*encoded.ids, end][search.eval_len - window :], device=device)
        for encoded in tokenizer.encode_batch_fast(list(texts))
    ]
    training = model.training
    try:
        return beam_search(model.eval(), prompts, search, batch_size, num_return_sequences)
    finally:
        model.train(training)


def text_of(hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    """Return the text of a completion, without its end id and the space before it."""
    words = hypothesis.tokens[:-1] if hypothesis.finished else hypothesis.tokens
    return tokenizer.decode(words, skip_special_tokens=False).strip()
