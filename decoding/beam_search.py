"""Beam search: a model and prompts in, hypotheses out. Knows no files and no arguments.

Two searches share one loop, `--search original` and `--search hf`:

                          original (Hu et al. 2021)        hf (transformers' generate)
    candidates a step     K                                max(2, 1 + number of end ids) * K
    an ended beam         leaves a hole for that step      is replaced by the next candidate
    bans and penalties    on logits, before the softmax    on log-probabilities, after it
    n-grams and penalty   see the generated tokens         see the prompt too
    a context is done     when nothing better can come     when K hypotheses have ended and the best
                                                           live beam, were it to end here, is worse

In both, a hypothesis scores Σ log p / length ** length_penalty, where length counts its generated
tokens with the end token; live beams compete as unfinished ones after the last step; the earlier
one wins a tie. Shapes: B contexts, K beams, V vocabulary, M candidates, T generated tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from decoding.cache import CachedModel, batches_by_length, prefill, without_plans
from decoding.rules import MOST_TEXTS, NEVER, TextRules

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TextRules):
    """Settings of a search. A `length_penalty` of 0 is none."""

    no_repeat_ngram_size: int = 4
    beam: int = 10
    length_penalty: float = 0.8
    search: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.beam <= MOST_TEXTS:
            raise ValueError(f"beam {self.beam} must be from 1 to {MOST_TEXTS}")
        if not -100 <= self.length_penalty <= 100:
            raise ValueError(f"length_penalty {self.length_penalty} must be from -100 to 100")
        if self.search not in ("original", "hf"):
            raise ValueError(f"search {self.search!r} must be original or hf")

    @property
    def candidates(self) -> int:
        """Continuations looked at per step, M."""
        ends = len(self.end_ids)
        return self.beam if self.search == "original" else max(2, 1 + ends) * self.beam

    def check_count(self, num_return_sequences: int) -> None:
        """Raise ValueError unless there are beams for this many texts."""
        if not 1 <= num_return_sequences <= self.beam:
            raise ValueError(
                f"num_return_sequences {num_return_sequences} must be from 1 to {self.beam}, the "
                "number of beams"
            )


@dataclass(frozen=True)
class Hypothesis:
    """Generated token ids, the end id included where `finished`, and their score."""

    tokens: list[int]
    score: float
    finished: bool


@torch.inference_mode()
@without_plans
def beam_search(
    model: CachedModel,
    prompts: Sequence[Tensor],
    settings: SearchSettings,
    batch_size: int = 16,
    num_return_sequences: int = 1,
    on_done: Callable[[int], object] | None = None,
) -> list[list[Hypothesis]]:
    """Search every prompt, (P,) int64 each: its best hypotheses, best first, in the order given.

    Prompts are searched longest first, `batch_size` at a time; a prompt's hypotheses do not depend
    on the others. There are fewer than `num_return_sequences` only where fewer exist, and one
    empty hypothesis of score -inf where every first token is banned.

    Args:
        on_done: is called with the number of prompts that have just been completed.

    Raises:
        ValueError: more sequences are wanted than there are beams, or the model's logits are NaN.
    """
    settings.check_count(num_return_sequences)
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    for rows in batches_by_length(prompts, batch_size):
        search = _Search([prompts[row] for row in rows], rows, settings, num_return_sequences)
        for row, hypotheses in search.run(model):
            found[row] = hypotheses[:num_return_sequences] or [Hypothesis([], NEVER, False)]
            if on_done:
                on_done(1)
    return found


class _Search:
    """The contexts of one batch that are still searched; `rows` are their numbers."""

    def __init__(
        self, prompts: list[Tensor], rows: list[int], settings: SearchSettings, wanted: int
    ) -> None:
        batch, device = len(prompts), prompts[0].device
        self.settings, self.rows = settings, rows
        self.end_ids = torch.tensor(settings.end_ids, dtype=torch.int64, device=device)
        self.prompts = prompts
        # (B, P) with -1 on the left, which equals no token, so that ends stand in one column
        self.history = pad_sequence(prompts, True, padding_value=-1, padding_side="left")
        self.tokens = torch.empty(batch, 1, 0, dtype=torch.int64, device=device)  # (B, K, T)
        self.scores = torch.zeros(batch, 1, device=device)  # (B, K) Σ log p, best first
        # Per context the best hypotheses so far, best first, and what a better one must exceed.
        self.places = settings.beam if settings.search == "hf" else wanted
        self.best: list[list[Hypothesis]] = [[] for _ in prompts]
        self.threshold = torch.full((batch,), NEVER, device=device)
        # What competes for a place since `settle`: whether it is better than the threshold, its
        # tokens (B, M, T), its score, and whether it has ended, all others (B, M).
        self.offers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def run(self, model: CachedModel) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Yield each context's row and hypotheses as soon as it is done."""
        logits, cache = prefill(model, self.prompts)
        logits = logits.unsqueeze(1)
        while True:
            parents = self.advance(logits.float())
            done = self.settle()
            if done is not None:
                yield from ((self.rows[i], self.best[i]) for i in done.nonzero()[:, 0].tolist())
                live = (~done).nonzero()[:, 0]
                if not len(live):
                    return
                self.keep(live)
                cache.keep(live)
                parents = parents[live]
            cache.reorder(parents)
            logits = model.decode_step(self.tokens[..., -1], cache)

    def keep(self, contexts: Tensor) -> None:
        """Drop every context but those of the given indices."""
        for name in ("rows", "best"):
            setattr(self, name, [getattr(self, name)[i] for i in contexts.tolist()])
        for name in ("history", "tokens", "scores", "threshold"):
            setattr(self, name, getattr(self, name)[contexts])

    def advance(self, logits: Tensor) -> Tensor:
        """Lengthen all beams by one token, given logits (B, K, V), which are overwritten; which
        beam each continues, (B, K)."""
        beams = self.settings.beam
        sums, parents, chosen = self.continuations(logits)
        tokens = torch.cat((_select(self.tokens, parents), chosen.unsqueeze(2)), dim=2)
        ended = torch.isin(chosen, self.end_ids)
        stops = ended | (tokens.size(2) == self.settings.eval_len)
        self.offer(tokens[:, :beams], sums[:, :beams], stops[:, :beams], ended[:, :beams])
        sums, order = sums.masked_fill(ended, NEVER).sort(dim=1, descending=True, stable=True)
        order = order[:, :beams]
        self.scores, self.tokens = sums[:, :beams], _select(tokens, order)
        return parents.gather(1, order)

    def continuations(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of all beams, best first: Σ log p, beam and token, (B, M) each.
        Where there are fewer than M, the rest has -inf."""
        count, generated = self.settings.candidates, self.tokens.size(2)
        if self.settings.search == "original":
            log_probs = _log_softmax(self.settings.restrict(logits, self.tokens, generated))
        else:
            prompts = self.history.unsqueeze(1).expand(-1, logits.size(1), -1)
            history = torch.cat((prompts, self.tokens), dim=2)
            log_probs = self.settings.restrict(_log_softmax(logits), history, generated)
        best, tokens = largest(log_probs, min(count, logits.size(2)))
        best = best.masked_fill(best.isnan(), NEVER)  # the softmax of a beam with all banned

        stuck = best[..., 0] == NEVER
        self.offer(self.tokens, self.scores, stuck, torch.zeros_like(stuck))
        sums = (self.scores.unsqueeze(2) + best).flatten(1)
        missing = max(0, count - sums.size(1))
        sums, order = F.pad(sums, (0, missing), value=NEVER).sort(
            dim=1, descending=True, stable=True
        )
        sums, order = sums[:, :count], order[:, :count]
        parents = (order // best.size(2)).clamp(max=logits.size(1) - 1)
        return sums, parents, F.pad(tokens.flatten(1), (0, missing)).gather(1, order)

    def offer(self, tokens: Tensor, sums: Tensor, stops: Tensor, ended: Tensor) -> None:
        """Let beams (B, M) that stop here compete for a place among the best hypotheses."""
        scores = sums / max(tokens.size(2), 1) ** self.settings.length_penalty
        better = stops & (scores > self.threshold.unsqueeze(1))
        self.offers.append((better, tokens, scores, ended))

    def settle(self) -> Tensor | None:
        """Give what was offered its places; which contexts are done, (B,) bool, or None if none is.

        Mostly nothing has a place and none is done: one answer of the device then says all that.
        """
        offers, self.offers = self.offers, []
        done = self.done()
        *news, any_done = torch.stack(
            [*(better.any() for better, *_ in offers), done.any()]
        ).tolist()
        if any(news):
            for offer, has_place in zip(offers, news, strict=True):
                if has_place:
                    self.place(*(column.cpu() for column in offer))
            done = self.done()
            any_done = bool(done.any())
        return done if any_done else None

    def place(self, better: Tensor, *columns: Tensor) -> None:
        """Put hypotheses among the best: those of columns (B, M, …) that are better."""
        contexts = better.nonzero()[:, 0].tolist()
        chosen = (column[better].tolist() for column in columns)
        for context, *hypothesis in zip(contexts, *chosen, strict=True):
            best = self.best[context]
            best.append(Hypothesis(*hypothesis))
            best.sort(key=lambda h: -h.score)
            del best[self.places :]
            if len(best) == self.places:
                self.threshold[context].fill_(best[-1].score)

    def done(self) -> Tensor:
        """Which contexts are, (B,) bool.

        original: those where no live beam can win any more, which changes no result. A log p is
        never positive, so whatever a live beam of sum s <= 0 and length t grows into has a sum
        <= s and a length l from t + 1 to eval_len, hence a score <= s / l ** length_penalty. That
        is largest at l = eval_len for a penalty >= 0 and at l = t + 1 for a negative one, and the
        beam of the largest s bounds all. Bound and scores are rounded alike, and what only equals
        the last hypothesis wanted does not replace it.

        hf: transformers' own rule (early_stopping=False), l = t, which bounds nothing.
        """
        settings, length = self.settings, self.tokens.size(2)
        bound_length = length
        if settings.search == "original":
            bound_length = settings.eval_len if settings.length_penalty >= 0 else length + 1
        bound = self.scores[:, 0] / bound_length**settings.length_penalty
        return (bound <= self.threshold) | (length == settings.eval_len)


def _log_softmax(logits: Tensor) -> Tensor:
    """`logits.log_softmax(-1)`, on a CPU in place: a quarter faster, as the caches hold them."""
    return torch.log_softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` of fp32 values (..., V) and their places: largest first, equal ones in
    their order.

    Far faster than a stable sort for a vocabulary: the largest are in the chunks that come first
    when chunks are ordered in the same way by their largest values.
    """
    width = values.size(-1) // CHUNK * CHUNK
    if width < 2 * count * CHUNK:
        return _first_largest(values, count)
    _, chunks = _first_largest(values[..., :width].unflatten(-1, (-1, CHUNK)).amax(-1), count)
    within = torch.arange(CHUNK, device=values.device)
    rest = torch.arange(width, values.size(-1), device=values.device)
    chosen = (CHUNK * chunks.sort()[0].unsqueeze(-1) + within).flatten(-2)
    places = torch.cat((chosen, rest.expand(*values.shape[:-1], -1)), dim=-1)
    best, order = _first_largest(values.gather(-1, places), count)
    return best, places.gather(-1, order)


def _first_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` of fp32 values, with equal ones in their order."""
    best, order = values.topk(min(count + 1, values.size(-1)))
    # Asking a GPU whether there are equal ones would take longer than ordering them.
    if values.is_cuda or (best[..., 1:] == best[..., :-1]).any():
        # Integers that are ordered as the values are, and where these are equal by their places;
        # adding 0 makes -0.0 the 0.0 that it is equal to.
        bits = (values + 0.0).view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        order = ((ordered << 32) - torch.arange(values.size(-1), device=values.device)).topk(count)[
            1
        ]
    return best[..., :count], order[..., :count]


def _select(tokens: Tensor, beams: Tensor) -> Tensor:
    """Rows (B, M, T) of tokens (B, K, T) that beams (B, M) name."""
    return tokens.gather(1, beams.unsqueeze(2).expand(-1, -1, tokens.size(2)))
