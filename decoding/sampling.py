"""Sampling: a model and prompts in, texts drawn at random out. Knows no files and no arguments.

A token is drawn from the softmax of the logits after the rules that hold for every text, then, in
this order and as transformers' generate does it:

    temperature    divides the logits
    top_k          leaves the k likeliest tokens
    top_p          leaves the likeliest tokens until their probabilities reach p (Holtzman et al.
                   2020, arXiv 1904.09751, section 3.1)

Every text has its own stream of random numbers, seeded by the seed, its prompt's number and its
own number among that prompt's texts, and takes V of them a token: exponential variables e_i, and
the token drawn is the one with the largest p_i / e_i, which is token i with probability p_i. So
a text does not depend on the other texts, and another batch size, which rounds p otherwise, changes
a token only where the two largest quotients agree to the last digits. Drawing is done on the CPU,
whatever the model's device. Shapes: B contexts, K texts of each, V vocabulary, T generated tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoding.beam_search import Hypothesis
from decoding.cache import CachedModel, batches_by_length, prefill, without_plans
from decoding.rules import NEVER, TextRules


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(TextRules):
    """Settings of a draw; as they stand, it is from the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0:
            raise ValueError(
                "temperature 0 leaves nothing to draw; beam 1 without do_sample takes the "
                "likeliest token each time"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be above 0, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1, for all tokens")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what a token is drawn from, (..., V) float64, for logits (..., V) float64; zeros
        where all logits are -inf."""
        # The largest is 0, so that no temperature, however low, makes an infinite one.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.size(-1):
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, NEVER)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            falling, order = probabilities.sort(descending=True, stable=True)
            beyond = falling.cumsum(-1) - falling >= self.top_p
            kept = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0)
            probabilities = kept / kept.sum(-1, keepdim=True)
        return probabilities.nan_to_num(0)


Stream = np.random.Generator


@torch.inference_mode()
@without_plans
def sample(
    model: CachedModel,
    prompts: Sequence[Tensor],
    settings: SamplingSettings,
    batch_size: int = 16,
    num_return_sequences: int = 1,
    on_done: Callable[[int], object] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Draw texts for every prompt, (P,) int64 each, in the order of the prompts and as drawn.

    A text's score is Σ log p of its tokens under the model itself, without temperature, limits and
    rules. A text ends unfinished, and may be empty, where every token is banned.

    Args:
        on_done: is called with the number of prompts that have just been completed.
        numbers: of the prompts, which with `settings.seed` decide what is drawn; 0, 1, … by
            default.

    Raises:
        ValueError: fewer than one text or too many are asked for, or the model's logits are NaN.
    """
    settings.check_count(num_return_sequences)
    numbers = range(len(prompts)) if numbers is None else numbers
    texts = range(num_return_sequences)
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    for rows in batches_by_length(prompts, batch_size):
        streams = [
            [np.random.default_rng([settings.seed, numbers[row], text]) for text in texts]
            for row in rows
        ]
        batch = _Draw([prompts[row] for row in rows], rows, settings, streams)
        for row, hypotheses in batch.run(model):
            found[row] = hypotheses
            if on_done:
                on_done(1)
    return found


class _Draw:
    """The contexts of one batch with texts still to be ended; `rows` are their numbers."""

    def __init__(
        self,
        prompts: list[Tensor],
        rows: list[int],
        settings: SamplingSettings,
        streams: list[list[Stream]],
    ) -> None:
        shape = len(prompts), len(streams[0])  # (B, K)
        self.prompts, self.rows, self.settings, self.streams = prompts, rows, settings, streams
        self.end_ids = torch.tensor(settings.end_ids, dtype=torch.int64)
        self.tokens = torch.empty(*shape, 0, dtype=torch.int64)  # (B, K, T)
        self.lengths = torch.zeros(shape, dtype=torch.int64)  # of each text in these
        self.scores = torch.zeros(shape, dtype=torch.float64)
        self.live, self.finished = torch.ones(shape).bool(), torch.zeros(shape).bool()

    def run(self, model: CachedModel) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Yield each context's row and texts as soon as all of them have ended."""
        logits, cache = prefill(model, self.prompts)
        logits = logits.unsqueeze(1).repeat(1, self.live.size(1), 1)
        cache.reorder(torch.zeros_like(self.lengths, device=logits.device))
        while True:
            self.advance(logits.cpu().double())
            done = ~self.live.any(dim=1)
            if done.any():
                yield from ((self.rows[i], self.texts(i)) for i in done.nonzero()[:, 0].tolist())
                remaining = (~done).nonzero()[:, 0]
                if not len(remaining):
                    return
                self.keep(remaining)
                cache.keep(remaining.to(logits.device))
            logits = model.decode_step(self.tokens[..., -1].to(logits.device), cache)

    def advance(self, logits: Tensor) -> None:
        """Lengthen the live texts by one token, given logits (B, K, V), which are overwritten."""
        length = self.tokens.size(2)
        log_probs = logits.log_softmax(-1)
        allowed = self.settings.restrict(logits, self.tokens, length)
        probabilities = self.settings.probabilities(allowed)
        chosen = draw(probabilities, self.streams)
        self.live &= probabilities.any(-1)
        self.tokens = torch.cat((self.tokens, chosen.unsqueeze(2)), dim=2)
        self.lengths += self.live
        self.scores += log_probs.gather(2, chosen.unsqueeze(2)).squeeze(2).where(self.live, 0)
        self.finished |= self.live & torch.isin(chosen, self.end_ids)
        self.live &= ~self.finished & (length + 1 < self.settings.eval_len)

    def texts(self, context: int) -> list[Hypothesis]:
        """Return a context's texts in the order of their streams."""
        columns = (c[context].tolist() for c in (self.tokens, self.lengths, self.scores))
        fields = zip(*columns, self.finished[context].tolist(), strict=True)
        return [Hypothesis(tokens[:n], score, finished) for tokens, n, score, finished in fields]

    def keep(self, contexts: Tensor) -> None:
        """Drop every context but those of the given indices."""
        for name in ("rows", "streams"):
            setattr(self, name, [getattr(self, name)[i] for i in contexts.tolist()])
        for name in ("tokens", "lengths", "scores", "live", "finished"):
            setattr(self, name, getattr(self, name)[contexts])


def draw(probabilities: Tensor, streams: Sequence[Sequence[Stream]]) -> Tensor:
    """Return a token for each distribution (B, K, V) by its own stream, (B, K) int64."""
    size = probabilities.size(-1)
    races = np.array([[own.standard_exponential(size) for own in row] for row in streams])
    return (probabilities / torch.from_numpy(races)).argmax(-1)
