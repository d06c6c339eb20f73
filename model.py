"""GPT-2 with low-rank adapters, its sizes, its loss and its decoding cache.

Radford et al. 2019 (GPT-2) and Hu et al. 2021 (LoRA, arXiv 2106.09685, section 4.2).

    B  batch     T  tokens    C  width (n_embd)    H  heads    D  head width, C / H
    V  vocabulary    K  beams    P  prompt tokens    G  generated tokens    r  rank

Every linear map is a LoRA layer: with rank 0 it is a plain frozen one. Weights are stored as
GPT-2's published files store them, (in, out), so nothing is transposed on loading.
"""

from dataclasses import InitVar, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import loralib
from loralib import LoraConfig
from loss import smoothed_cross_entropy

MODEL_CARDS: dict[str, dict[str, int]] = {
    "gpt2.nano": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "n_positions": 512,
        "vocab_size": 2048,
    },
    "gpt2.mini": {
        "n_layer": 5,
        "n_head": 4,
        "n_embd": 256,
        "n_positions": 512,
        "vocab_size": 4096,
    },
    "gpt2.sm": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2.md": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2.lg": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2.xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


ALL_TARGETS = ("q", "k", "v", "o", "fc", "proj")  # what `--lora_targets all` means
LORA_TARGETS = {
    "q": "attn.c_attn",
    "k": "attn.c_attn",
    "v": "attn.c_attn",
    "c_attn": "attn.c_attn",  # query, key and value by one adapter, as PEFT does it
    "o": "attn.c_proj",
    "fc": "mlp.c_fc",
    "proj": "mlp.c_proj",
    "wte": "wte",
}


@dataclass
class GPT2Config:
    """Shape of the model, and the settings of its adapter, whose targets are keys of LORA_TARGETS.

    The original's arguments `lora_attn_dim` (the rank r, 0 for no adapter), `lora_attn_alpha` and
    `lora_dropout` make a `LoraConfig` where `lora` is not given; they are no attributes.

    Raises:
        ValueError: a size or a target makes no sense.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    lora_attn_dim: InitVar[int] = 0
    lora_attn_alpha: InitVar[float] = 128
    lora_dropout: InitVar[float] = 0.0
    lora: LoraConfig | None = None

    def __post_init__(self, rank: int, alpha: float, dropout: float) -> None:
        if rank and self.lora is not None:
            raise ValueError(f"give lora or lora_attn_dim, not both: {self.lora} and {rank}")
        if rank:
            self.lora = LoraConfig(rank, alpha, dropout)
        if unknown := [target for target in self.targets if target not in LORA_TARGETS]:
            raise ValueError(f"target {unknown[0]} is not one of {', '.join(LORA_TARGETS)}")
        if "c_attn" in self.targets and set("qkv") & set(self.targets):
            raise ValueError("target c_attn is q, k and v at once; name it or them, not both")
        if self.lora is not None and "wte" in self.targets and self.lora.kind != "lora":
            raise ValueError(f"{self.lora.kind} is for linear layers, target wte is an embedding")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted layers, none without an adapter."""
        return self.lora.targets if self.lora is not None else ()

    def linear(self, target: str, inputs: int, outputs: int) -> loralib.Linear:
        """A linear layer, with the adapter if `target` is one of the config's targets."""
        settings = self._adapter() if target in self.targets else {}
        return loralib.Linear(inputs, outputs, fan_in_fan_out=True, **settings)

    def fused_linear(self) -> loralib.Linear:
        """The projection to query, key and value, each of which may have an adapter."""
        sizes = self.n_embd, 3 * self.n_embd
        if "c_attn" in self.targets:
            return self.linear("c_attn", *sizes)
        enabled = [part in self.targets for part in "qkv"]
        return loralib.MergedLinear(
            *sizes, enable_lora=enabled, fan_in_fan_out=True, **self._adapter()
        )

    def token_embedding(self) -> nn.Embedding:
        if "wte" not in self.targets:
            return nn.Embedding(self.vocab_size, self.n_embd)
        settings = self._adapter()
        del settings["lora_dropout"], settings["kind"]
        return loralib.Embedding(self.vocab_size, self.n_embd, **settings)

    def _adapter(self) -> dict:
        settings = self.lora
        if settings is None:
            return {"merge_weights": False}
        return {
            "r": settings.r,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "merge_weights": False,
            "use_rslora": settings.rslora,
            "kind": settings.kind,
        }


for _name in ("lora_attn_dim", "lora_attn_alpha", "lora_dropout"):
    delattr(GPT2Config, _name)  # InitVars leave their defaults there, where reading one would lie


class DecodeCache:
    """Keys and values of a decoding batch, per layer (B, S, H, D): S slots per context, of which
    `visible` (B, K, S) says which beam attends to which.

    The prompt's slots come first and every beam sees them; a step adds K slots, one to each beam.
    So reordering beams moves rows of booleans and never a key, and beams share what they have in
    common. Slots that no beam sees any more (padding, lost beams) are dropped now and then.
    """

    STEPS_OF_ROOM = 8

    def __init__(self, lengths: Tensor, width: int) -> None:
        self.positions = lengths  # of each context's next token, (B,) int64
        self.visible = (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
        self.layers: list[tuple[Tensor, Tensor]] = []

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
        for layer, pair in enumerate(self.layers):
            shape = (len(contexts), count + self.STEPS_OF_ROOM * beams, *pair[0].shape[2:])
            self.layers[layer] = tuple(tensor.new_empty(shape) for tensor in pair)
            for buffer, tensor in zip(self.layers[layer], pair, strict=True):
                buffer[:, :count] = tensor[contexts[:, None], slots]


class PackedLinear(nn.Module):
    """A linear map on a CPU, its weight laid out once the way oneDNN's kernels read it.

    Up to twice as fast as F.linear on the few rows of a decoding step; for inference only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is (out, in), fp32, on the CPU."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Attention(nn.Module):
    """Causal self-attention; by default its fused q, k, v projection adapts q and v (LoRA, 4.2)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = config.fused_linear()
        self.c_proj = config.linear("o", config.n_embd, config.n_embd)

    def mix(self, x: Tensor, lengths: list[int], cache: DecodeCache | None = None) -> Tensor:
        """Values mixed by attention, (N, C) to (N, C), N = Σ lengths: the sequences of a batch, one
        behind the other.

        A cache, if given, receives keys and values; the lengths must then be equal.
        """
        fused = self.c_attn(x)
        if len(set(lengths)) == 1:
            return self.attend(fused.view(len(lengths), -1, fused.size(-1)), cache).flatten(0, 1)
        if fused.is_cuda:
            return self.attend_padded(fused, lengths)
        return torch.cat([self.attend(part[None])[0] for part in fused.split(lengths)])

    def attend_padded(self, fused: Tensor, lengths: list[int]) -> Tensor:
        """`attend` of sequences (N, 3C) to (N, C) by one large kernel, though a part is padding."""
        padded = self.attend(pad_sequence(fused.split(lengths), batch_first=True))
        return torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])

    def attend(self, fused: Tensor, cache: DecodeCache | None = None) -> Tensor:
        """Causal attention of each sequence to itself, (B, T, 3C) to (B, T, C)."""
        batch, tokens, _ = fused.shape
        heads = fused.view(batch, tokens, 3, self.n_head, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            cache.layers.append((key.transpose(1, 2), value.transpose(1, 2)))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def step(self, x: Tensor, cache: DecodeCache, layer: int, visible: Tensor) -> Tensor:
        """One new token per beam, (B, K, C) to (B, K, C); `visible` as `cache.add_slots` gives."""
        batch, beams, width = x.shape
        query, key, value = self.c_attn(x).view(batch, beams, 3, self.n_head, -1).unbind(2)
        keys, values = cache.append(layer, key, value)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), visible
        )
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, beams, width))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = config.linear("fc", config.n_embd, 4 * config.n_embd)
        self.c_proj = config.linear("proj", 4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        lengths: list[int],
        cache: DecodeCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(N, C) to (N, C), or of the positions that `wanted`, a mask or indices, picks."""
        mixed = self.attn.mix(self.ln_1(x), lengths, cache)
        if wanted is not None:
            x, mixed = x[wanted], mixed[wanted]
        x = x + self.attn.c_proj(mixed)
        return x + self.mlp(self.ln_2(x))

    def step(self, x: Tensor, cache: DecodeCache, layer: int, visible: Tensor) -> Tensor:
        x = x + self.attn.step(self.ln_1(x), cache, layer, visible)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """The blocks. With `gradient_checkpointing` a training step keeps the input of each block but
    the last and computes the rest again in its backward pass: the same gradients, less memory."""

    gradient_checkpointing = False

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = config.token_embedding()
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        real: Tensor | None = None,
        lengths: list[int] | None = None,
        cache: DecodeCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (N, C) of the N positions that `real` (B, T) marks, row by row: the first
        `lengths[b]` of row b, or all of them. Nothing is computed for the others.

        `wanted`, a mask or indices over the N, picks those whose hidden states are returned: the
        others leave the last block as soon as their keys and values are there.
        """
        batch, tokens = input_ids.shape
        if real is None:
            real, lengths = torch.ones_like(input_ids, dtype=torch.bool), [tokens] * batch
        positions = torch.arange(tokens, device=input_ids.device).expand_as(input_ids)
        x = self.wte(input_ids[real]) + self.wpe(positions[real])
        *blocks, last = self.h
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, lengths, use_reentrant=False)
            else:
                x = block(x, lengths, cache)
        return self.ln_f(last(x, lengths, cache, wanted))

    def step(self, input_ids: Tensor, cache: DecodeCache) -> Tensor:
        """Hidden states (B, K, C) of one new token per beam, `input_ids` (B, K)."""
        x = self.wte(input_ids) + self.wpe(cache.positions)[:, None]
        visible = cache.add_slots(input_ids.size(1))
        for layer, block in enumerate(self.h):
            x = block.step(x, cache, layer, visible)
        return self.ln_f(x)


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, whose weight is the token embedding, without adapter."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.packed_head: PackedLinear | None = None
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the token embedding's own weight: an adapter of it does not reach the head."""
        wte = self.transformer.wte
        return wte.base_weight if isinstance(wte, loralib.Embedding) else wte.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), by the tied embedding."""
        if self.packed_head is not None:
            return self.packed_head(hidden)
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        lm_labels: Tensor | None = None,
        lm_mask: Tensor | None = None,
        label_smooth: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(logits, None)` without labels, logits (B, T, V); `(None, loss)` with them.

        `input_ids`, `lm_labels` are (B, T) int64, right-padded; the label of a position is the
        token that follows it. `lm_mask` (B, T) weighs each position, everything counts without it.
        loss = Σ mask · ((1 - e) · nll + e · mean over V of -log p) / Σ mask, e = `label_smooth`,
        and 0 where nothing counts. Padding is left out of all layers, and only counted positions
        pass the head, which is why no logits come back.
        """
        if lm_labels is None:
            return self.head(self.transformer(input_ids)).view(*input_ids.shape, -1), None
        mask = torch.ones(lm_labels.shape, device=lm_labels.device) if lm_mask is None else lm_mask
        counted = mask > 0
        # What stands behind the last counted position of a row has no part in the loss. A first
        # position is kept always: a rank without rows must still have gradients, of zero.
        places = torch.arange(1, mask.size(1) + 1, device=mask.device)
        ends = (counted * places).amax(dim=1).clamp(min=1)
        real = places <= ends[:, None]
        loss = smoothed_cross_entropy(
            self.transformer(input_ids, real, ends.tolist(), wanted=counted[real]),
            self.head_weight,
            lm_labels[counted],
            mask[counted],
            label_smooth,
        )
        return None, loss

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, DecodeCache]:
        """Read right-padded prompts (B, P) of true `lengths` (B,): the logits (B, V) behind each
        prompt's last token, and the cache from which `step` goes on."""
        cache = DecodeCache(lengths, input_ids.size(1))
        batch, tokens = input_ids.shape
        ends = torch.arange(batch, device=lengths.device) * tokens + lengths - 1
        return self.head(self.transformer(input_ids, cache=cache, wanted=ends)), cache

    def step(self, input_ids: Tensor, cache: DecodeCache) -> Tensor:
        """Logits (B, K, V) behind one new token per beam, `input_ids` (B, K)."""
        return self.head(self.transformer.step(input_ids, cache))

    @torch.no_grad()
    def pack(self) -> "GPT2LMModel":
        """Merge the adapter and lay all weights out for fast decoding; returns the model itself.

        From then on it can only be run: there is nothing left to train, save or load into. Does
        nothing but merge where there is no oneDNN for it (GPU, other precisions).
        """
        linears = [(n, m) for n, m in self.named_modules() if isinstance(m, loralib.Linear)]
        for _, layer in linears:
            layer.merge()
        embedding = self.transformer.wte.weight
        fits = embedding.device.type == "cpu" and embedding.dtype == torch.float32
        if fits and torch.backends.mkldnn.is_available():
            for name, layer in linears:
                weight = layer.weight.T if layer.fan_in_fan_out else layer.weight
                self.set_submodule(name, PackedLinear(weight, layer.bias))
            self.packed_head = PackedLinear(self.head_weight, None)
        return self
