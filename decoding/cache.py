"""The keys and values of a decoding batch, which its beams share."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# What makes a context's attention on a CPU the same, bit for bit, in any batch: its slots come in
# whole vectors, and contexts with more than this, whose sums are split by their length, come alone.
VECTOR, SUMMED_IN_ONE = 16, 192

# For functions that decode: any attention but cuDNN's, which torch prefers on new GPUs and which
# takes tens of milliseconds to plan a new number of slots; every few tokens have one.
without_plans = sdpa_kernel(
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
)


class DecodeCache:
    """Keys and values of a decoding batch, per layer (B, S, H, D): S slots per context, of which
    `visible` (B, K, S) says which beam attends to which.

    A context's prompt comes first and all its beams see it; a decoded token takes K slots, one for
    each beam: the first that no beam sees, which may have held tokens of beams that are gone. So
    reordering beams moves rows of booleans and never a key, and beams share what they have in
    common. Where a context's slots are depends on that context alone, so candidates that are equal
    stay equal whatever else is in the batch.
    """

    STEPS_OF_ROOM = 8

    def __init__(self, lengths: Sequence[int], device: torch.device | None = None) -> None:
        """Make the cache of prompts of these lengths."""
        # Slots of each context up to the last that a beam sees, or, if `bounded`, more.
        self.used = list(lengths)
        self.positions = torch.tensor(self.used, device=device)  # of the next tokens, (B,)
        self.visible = torch.arange(max(self.used), device=device) < self.positions[:, None, None]
        self.new: tuple[Tensor, Tensor]  # rows (B, 1) and slots (B, K) of the tokens decoded now
        self.mask: Tensor  # of their attention: 0 where visible, else -inf
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def bounded(self) -> bool:
        """Whether `used` has upper bounds: on a GPU, where the host would have to wait for more."""
        return self.visible.is_cuda

    def add_prefix(self, length: int) -> None:
        """Give each context, before its prompt, slots for a prefix, which all its beams see."""
        self.used = [length + used for used in self.used]
        self.positions = self.positions + length
        self.visible = F.pad(self.visible, (length, 0), value=True)

    def add_layer(self, key: Tensor, value: Tensor) -> None:
        """Keep the next layer's keys and values of the prompts, one after the other, (N, H, D);
        where there is a prefix, each prompt's after those of the prefix."""
        real = self.visible[:, 0]
        keys, values = (t.new_zeros(*real.shape, *t.shape[1:]) for t in (key, value))
        keys[real], values[real] = key, value
        self.layers.append((keys, values))

    def add_slots(self, beams: int) -> None:
        """Give each beam a slot for the token that is decoded now."""
        if max(self.used) + beams > self.visible.size(2):
            self._make_room(beams)
        seen = self.visible.any(dim=1)  # (B, S)
        slots = seen.int().argsort(dim=1, stable=True)[:, :beams]  # unseen ones come first
        self.new = torch.arange(len(seen), device=seen.device)[:, None], slots
        self.visible = self.visible.scatter(2, slots.unsqueeze(2), True)
        self.mask = torch.where(self.visible, 0.0, float("-inf"))
        self.used = [n + beams for n in self.used] if self.bounded else self._read_used()
        self.positions = self.positions + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep keys and values of the tokens decoded now, and mix for each beam what it sees: all
        are (B, K, H, D)."""
        keys, values = self.layers[layer]
        keys[self.new], values[self.new] = key, value
        self.mask = self.mask.to(query.dtype)  # once for all layers
        width = _whole_vectors(max(self.used))
        if width <= SUMMED_IN_ONE or self.bounded:
            return _attend(query, keys, values, self.mask, width)
        alone = [slice(context, context + 1) for context in range(len(self.used))]
        return torch.cat(
            [
                _attend(query[i], keys[i], values[i], self.mask[i], _whole_vectors(n))
                for i, n in zip(alone, self.used, strict=True)
            ]
        )

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each context continue beam `parents[b, k]`, (B, K) int64."""
        rows = torch.arange(parents.size(0), device=parents.device)[:, None]
        self.visible = self.visible[rows, parents]

    def keep(self, contexts: Tensor) -> None:
        """Drop every context but those of the given indices, (B',) int64."""
        self.used = [self.used[i] for i in contexts.tolist()]
        self.positions, self.visible = self.positions[contexts], self.visible[contexts]
        self.layers = [(keys[contexts], values[contexts]) for keys, values in self.layers]

    def _read_used(self) -> list[int]:
        """The slots of each context up to the last that a beam sees."""
        numbers = torch.arange(1, self.visible.size(2) + 1, device=self.visible.device)
        return (numbers * self.visible.any(dim=1)).amax(dim=1).tolist()

    def _make_room(self, beams: int) -> None:
        """Make room for the next tokens of this many beams, unless more is free than was known."""
        if self.bounded:
            self.used = self._read_used()
        if max(self.used) + self.STEPS_OF_ROOM // 2 * beams > self.visible.size(2):
            self._grow(self.STEPS_OF_ROOM * beams)

    def _grow(self, slots: int) -> None:
        """Make room for at least as many slots more, in whole vectors."""
        more = _whole_vectors(self.visible.size(2) + slots) - self.visible.size(2)
        self.visible = F.pad(self.visible, (0, more))
        room = 0, 0, 0, 0, 0, more  # of F.pad, which starts at the last dimension
        self.layers = [(F.pad(keys, room), F.pad(values, room)) for keys, values in self.layers]


def _whole_vectors(slots: int) -> int:
    return -(-slots // VECTOR) * VECTOR


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, slots: int) -> Tensor:
    """Attention of (B, K, H, D) to the first `slots`, masked by (B, K, S)."""
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys[:, :slots].transpose(1, 2),
        values[:, :slots].transpose(1, 2),
        mask[:, None, :, :slots],
    )
    return mixed.transpose(1, 2)


class CachedModel(Protocol):
    """What decoding needs of a model; `model.GPT2LMModel` says what the methods do."""

    def prefill(self, prompts: Sequence[Tensor], cache: DecodeCache) -> Tensor: ...
    def decode_step(self, input_ids: Tensor, cache: DecodeCache) -> Tensor: ...


def prefill(model: CachedModel, prompts: Sequence[Tensor]) -> tuple[Tensor, DecodeCache]:
    """Read prompts, (P,) int64 each, into a new cache; return the logits (B, V) that follow them
    and the cache.

    Raises:
        ValueError: the logits are NaN.
    """
    cache = DecodeCache([len(prompt) for prompt in prompts], prompts[0].device)
    logits = model.prefill(prompts, cache)
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN; are its weights damaged?")
    return logits, cache


def batches_by_length(prompts: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of the prompts, longest first, `batch_size` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
