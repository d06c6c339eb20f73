"""What every decoding method holds a text to: where it ends, and which tokens may not come next."""

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
MOST_TEXTS = 1000  # of one context: all are held at once, with a cache each


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """Rules for the text. `min_length` and `eval_len` count generated tokens, the end token too;
    `no_repeat_ngram_size` 0 and `repetition_penalty` 1 switch a rule off."""

    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    min_length: int = 0
    eval_len: int = 64
    end_ids: tuple[int, ...] = (50256, 628)

    def __post_init__(self) -> None:
        if self.eval_len < 1:
            raise ValueError(f"eval_len {self.eval_len} must be at least 1")
        for name in ("no_repeat_ngram_size", "min_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be above 0")

    def check_count(self, num_return_sequences: int) -> None:
        """Raise ValueError unless this many texts of a context can be asked for."""
        if not 1 <= num_return_sequences <= MOST_TEXTS:
            raise ValueError(
                f"num_return_sequences {num_return_sequences} must be from 1 to {MOST_TEXTS}"
            )

    def restrict(self, scores: Tensor, history: Tensor, generated: int) -> Tensor:
        """Apply penalty and bans, in place, to scores (B, K, V) of the token that follows history
        (B, K, T) int64, where negative entries are padding; `generated` tokens precede it."""
        if self.repetition_penalty != 1 and history.size(2):
            # A padding's place is taken by a token that is penalised anyhow.
            seen = torch.where(history < 0, history[..., -1:], history)
            old, penalty = scores.gather(2, seen), self.repetition_penalty
            scores.scatter_(2, seen, torch.where(old < 0, old * penalty, old / penalty))
        if generated < self.min_length:
            for end in self.end_ids:
                scores[..., end].fill_(NEVER)
        if 0 < self.no_repeat_ngram_size <= history.size(2):
            ban_repeated_ngrams(scores, history, self.no_repeat_ngram_size)
        return scores


def ban_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> None:
    """Set scores (B, K, V) to -inf, in place, for each token that would complete an n-gram of
    `size` that history (B, K, T), T >= size, has already; entries below 0 are padding."""
    ngrams = history.unfold(2, size, 1)  # (B, K, T - size + 1, size)
    started = history[..., history.size(2) - size + 1 :].unsqueeze(2)
    repeats = (ngrams[..., :-1] == started).all(-1) & (ngrams[..., -1] >= 0)
    # The smaller of a score and this; where the repeats are, a GPU would have to be asked.
    bounds = torch.where(repeats, NEVER, -NEVER).to(scores.dtype)
    scores.scatter_reduce_(2, ngrams[..., -1].clamp(min=0), bounds, "amin")
