"""The keys and values of a decoding batch, which its beams share."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class DecodeCache:
    """Keys and values of a decoding batch, per layer (B, S, H, D): S slots per context, of which
    `visible` (B, K, S) says which beam attends to which.

    The prompt's slots come first and every beam sees them; a decoded token adds K slots, one to
    each beam. So reordering beams moves rows of booleans and never a key, and beams share what they
    have in common. Slots that no beam sees any more (padding, lost beams) are dropped now and then.
    """

    STEPS_OF_ROOM = 8

    def __init__(self, lengths: Tensor, width: int) -> None:
        """Make the cache of prompts of true `lengths` (B,) int64, padded to `width`."""
        self.positions = lengths  # of each context's next token, (B,)
        self.visible = (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
        self.layers: list[tuple[Tensor, Tensor]] = []

    def add_layer(self, key: Tensor, value: Tensor) -> None:
        """Keep the prompts' keys and values of the next layer, (B, S, H, D) each."""
        self.layers.append((key, value))

    def add_slots(self, beams: int) -> Tensor:
        """Make room for one token of each beam: what each may attend to, (B, 1, K, S) bool."""
        batch, _, slots = self.visible.shape
        if slots + beams > self.layers[0][0].size(1):
            self._gather(torch.arange(batch, device=self.visible.device))
        own = torch.eye(beams, dtype=torch.bool, device=self.visible.device)
        self.visible = torch.cat((self.visible, own.expand(batch, -1, -1)), dim=2)
        self.positions = self.positions + 1
        return self.visible[:, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the slots added last, (B, K, H, D) each: all keys and values of that layer."""
        beams, slots = key.size(1), self.visible.size(2)
        keys, values = self.layers[layer]
        keys[:, slots - beams : slots] = key
        values[:, slots - beams : slots] = value
        return keys[:, :slots], values[:, :slots]

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each context continue beam `parents[b, k]`, (B, K) int64."""
        rows = torch.arange(parents.size(0), device=parents.device)[:, None]
        self.visible = self.visible[rows, parents]

    def keep(self, contexts: Tensor) -> None:
        """Drop every context but those of the given indices, (B',) int64."""
        self.positions = self.positions[contexts]
        self._gather(contexts)

    def _gather(self, contexts: Tensor) -> None:
        """Move the given contexts' slots in use into new buffers with room for some steps."""
        visible = self.visible[contexts]
        beams = visible.size(1)
        used = visible.any(dim=1)  # (B', S)
        count = int(used.sum(dim=1).max())
        slots = used.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        self.visible = visible.gather(2, slots[:, None].expand(-1, beams, -1))

        def moved(tensor: Tensor) -> Tensor:
            room = count + self.STEPS_OF_ROOM * beams
            buffer = tensor.new_empty((len(contexts), room, *tensor.shape[2:]))
            buffer[:, :count] = tensor[contexts[:, None], slots]
            return buffer

        self.layers = [(moved(keys), moved(values)) for keys, values in self.layers]


class CachedModel(Protocol):
    """What decoding needs of a model; `model.GPT2LMModel` says what the methods do."""

    def prefill(self, input_ids: Tensor, cache: DecodeCache) -> Tensor: ...
    def decode_step(self, input_ids: Tensor, cache: DecodeCache) -> Tensor: ...


def prefill(model: CachedModel, prompts: Sequence[Tensor]) -> tuple[Tensor, DecodeCache]:
    """Read prompts, (P,) int64 each, into a new cache; return the logits (B, V) that follow them
    and the cache.

    Raises:
        ValueError: the logits are NaN.
    """
    padded = pad_sequence(list(prompts), batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=padded.device)
    cache = DecodeCache(lengths, padded.size(1))
    logits = model.prefill(padded, cache)
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN; are its weights damaged?")
    return logits, cache


def batches_by_length(prompts: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of the prompts, longest first, `batch_size` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
