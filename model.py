"""GPT-2 with low-rank adapters: its sizes, its layers, its loss, and how it decodes a token.

Radford et al. 2019 (GPT-2) and Hu et al. 2021 (LoRA, arXiv 2106.09685, section 4.2).

    B  batch         T  tokens    C  width (n_embd)      H  heads    D  head width, C / H
    V  vocabulary    K  beams     P  prompt tokens       r  rank
    N  tokens of a batch, its sequences one after the other without padding
    M  positions of these whose outputs are needed

Every linear map is a LoRA layer: with rank 0 it is a plain frozen one. Weights are stored as
GPT-2's published files store them, (in, out), so nothing is transposed on loading.
"""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loralib
from common import packed_attention
from common.batch import Batch, Spans
from loralib import LoraConfig
from loss import smoothed_cross_entropy
from methods import Bottleneck, BottleneckConfig, Prefix, PrefixConfig, bottleneck
from methods.prefix import drop_first, prepend


@dataclass
class GPT2Config:
    """Shape of the model, and the settings of its adapter: LoRA, whose targets are keys of
    LORA_TARGETS, or one of the methods that have modules of their own in `methods`.

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
    bottleneck: BottleneckConfig | None = None
    prefix: PrefixConfig | None = None

    def __post_init__(self, rank: int, alpha: float, dropout: float) -> None:
        if rank and self.lora is not None:
            raise ValueError(f"give lora or lora_attn_dim, not both: {self.lora} and {rank}")
        if rank:
            self.lora = LoraConfig(rank, alpha, dropout)
        given = [own for own in (self.lora, self.bottleneck, self.prefix) if own is not None]
        if len(given) > 1:
            raise ValueError(f"give one adapter, not both {given[0]} and {given[1]}")
        if unknown := [target for target in self.targets if target not in LORA_TARGETS]:
            raise ValueError(f"target {unknown[0]} is not one of {', '.join(LORA_TARGETS)}")
        if "c_attn" in self.targets and set("qkv") & set(self.targets):
            raise ValueError("target c_attn is q, k and v at once; name it or them, not both")
        if self.lora is not None and "wte" in self.targets and self.lora.kind != "lora":
            raise ValueError(f"{self.lora.kind} is for linear layers, target wte is an embedding")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.prefix is not None and self.window < 2:
            length, positions = self.prefix.length, self.n_positions
            raise ValueError(f"a prefix of {length} leaves no room in {positions} positions")

    @property
    def window(self) -> int:
        """The most tokens that a text can have: each takes a position, and so does a prefix's."""
        return self.n_positions - (self.prefix.length if self.prefix else 0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted layers, none without an adapter."""
        return self.lora.targets if self.lora is not None else ()


for _name in ("lora_attn_dim", "lora_attn_alpha", "lora_dropout"):
    delattr(GPT2Config, _name)  # InitVars leave their defaults there, where reading one would lie

MODEL_CARDS: dict[str, dict[str, int]] = {
    "gpt2.nano": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 512, "vocab_size": 2048},
    "gpt2.mini": {"n_layer": 5, "n_head": 4, "n_embd": 256, "n_positions": 512, "vocab_size": 4096},
    "gpt2.sm": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2.md": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2.lg": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2.xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


class Cache(Protocol):
    """What the model needs of a decoding cache; `decoding.cache.DecodeCache` is one."""

    positions: Tensor  # of each context's next token, (B,) int64

    def add_prefix(self, length: int) -> None: ...
    def add_layer(self, key: Tensor, value: Tensor) -> None: ...
    def add_slots(self, beams: int) -> None: ...
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Causal self-attention. Its block calls the projections: c_attn, to queries, keys and values,
    in which q and v are adapted by default (LoRA, 4.2), and c_proj."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = fused_projection(config)
        self.c_proj = linear(config, "o", config.n_embd, config.n_embd)

    def forward(self, fused: Tensor, spans: Spans, cache: Cache | None = None) -> Tensor:
        """What each sequence attends to, (N, C), from its queries, keys and values, (N, 3C). A
        cache, if given, receives keys and values."""
        lengths = spans.lengths
        if cache is not None:
            cache.add_layer(*fused.view(len(fused), 3, self.n_head, -1).unbind(1)[1:])
        if packed_attention.is_possible(fused, fused.size(-1) // (3 * self.n_head)):
            return self.attend_packed(fused, spans)
        if len(set(lengths)) == 1:
            return self.attend(fused.view(len(lengths), -1, fused.size(-1))).flatten(0, 1)
        if fused.is_cuda:
            return self.attend_padded(fused, spans)
        return torch.cat([self.attend(part[None])[0] for part in fused.split(lengths)])

    def attend_packed(self, fused: Tensor, spans: Spans) -> Tensor:
        """`attend` of sequences (N, 3C) to (N, C) by one kernel, which sees where they start."""
        query, key, value = fused.view(len(fused), 3, self.n_head, -1).unbind(1)  # each (N, H, D)
        starts, longest = spans.starts, spans.longest
        return packed_attention.attend(query, key, value, starts, longest).flatten(1)

    def attend_padded(self, fused: Tensor, spans: Spans) -> Tensor:
        """`attend` of sequences (N, 3C) to (N, C) by one large kernel. What pads a sequence comes
        after it, where nothing of it attends."""
        rows, places = spans.padded
        padded = fused.index_select(0, rows).view(len(spans.lengths), -1, fused.size(-1))
        return self.attend(padded).flatten(0, 1).index_select(0, places)

    def attend(self, fused: Tensor) -> Tensor:
        """Causal attention of each sequence to itself, (B, T, 3C) to (B, T, C)."""
        batch, tokens, _ = fused.shape
        heads = fused.view(batch, tokens, 3, self.n_head, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def decode_step(self, fused: Tensor, cache: Cache, layer: int) -> Tensor:
        """The same for one new token per beam, (B, K, 3C) to (B, K, C)."""
        heads = fused.view(*fused.shape[:2], 3, self.n_head, -1)
        return cache.attend(layer, *heads.unbind(2)).flatten(2)


class MLP(nn.Module):
    """The position-wise network, four times as wide inside; GELU by the tanh formula."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = linear(config, "fc", config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = linear(config, "proj", 4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """One layer of the transformer, normalised before attention and before the MLP. All but the
    attention itself treats tokens alike, in the two pieces that `compile_blocks` compiles."""

    compiled: tuple[Callable, Callable] | None = None  # project and finish, for training

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        # Nothing, unless a method puts a bottleneck there.
        settings = config.bottleneck, config.n_embd, config.layer_norm_epsilon
        self.attn_adapter = bottleneck("attn", *settings)
        self.mlp_adapter = bottleneck("mlp", *settings)
        self.block_adapter = bottleneck("block", *settings)

    def forward(
        self,
        x: Tensor,
        spans: Spans,
        cache: Cache | None = None,
        needed: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """(N, C) to (N, C), or to (M, C) of the positions `needed`, (M,) int64. Each sequence
        attends to the rows of a prefix, (n, 3C), before itself."""
        compiled = self.compiled if torch.is_grad_enabled() else None
        project, finish = compiled or (Block.project, Block.finish)
        fused = project(self, x)
        if prefix is None:
            mixed = self.attn(fused, spans, cache)
        else:
            longer = spans.after(len(prefix))
            mixed = self.attn(prepend(prefix, fused, spans), longer, cache)
            mixed = drop_first(len(prefix), mixed, longer)
        if needed is not None:
            x, mixed = x.index_select(0, needed), mixed.index_select(0, needed)
        return finish(self, x, mixed)

    def decode_step(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        """One new token per beam, (B, K, C) to (B, K, C)."""
        return self.finish(x, self.attn.decode_step(self.project(x), cache, layer))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (..., 3C) of x (..., C)."""
        return self.attn.c_attn(self.ln_1(x))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add what attention gives, then what the MLP makes of the sum, to x (..., C)."""
        x = x + self.attn_adapter(self.attn.c_proj(mixed))
        return self.block_adapter(x + self.mlp_adapter(self.mlp(self.ln_2(x))))


class GPT2Model(nn.Module):
    """The blocks. With `gradient_checkpointing` a training step keeps the input of each block but
    the last and computes the rest again in its backward pass: the same gradients, less memory."""

    gradient_checkpointing = False

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = token_embedding(config)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.prefix: Prefix | None = None
        if config.prefix is not None:
            self.prefix = Prefix(config.prefix, config.n_layer, config.n_embd)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        spans: Spans,
        cache: Cache | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (N, C) of sequences that lie as `spans` says; `input_ids` and
        `positions` are (N,) int64.

        `needed` (M,) int64 picks those whose hidden states are returned, (M, C): the others leave
        the last block as soon as their keys and values are there.
        """
        prefixes: Sequence[Tensor | None] = [None] * len(self.h)
        if self.prefix is not None:
            positions, prefixes = positions + self.prefix.length, self.prefix()
            if cache is not None:
                cache.add_prefix(self.prefix.length)
        x = self.wte(input_ids) + self.wpe(positions)
        *blocks, last = self.h
        for block, prefix in zip(blocks, prefixes[:-1], strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, spans, None, None, prefix, use_reentrant=False)
            else:
                x = block(x, spans, cache, None, prefix)
        return self.ln_f(last(x, spans, cache, needed, prefixes[-1]))

    def compile_blocks(self) -> None:
        """Compile what blocks do in training, once for all of them and any number of tokens. The
        first stays as it is: its input has no gradient, so it would need code of its own."""
        pieces = Block.project, Block.finish
        project, finish = (torch.compile(piece, dynamic=True) for piece in pieces)
        for block in self.h[1:]:
            cast(Block, block).compiled = project, finish

    def decode_step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states (B, K, C) of one new token per beam, `input_ids` (B, K)."""
        x = self.wte(input_ids) + self.wpe(cache.positions)[:, None]
        cache.add_slots(input_ids.size(1))
        for layer, block in enumerate(self.h):
            x = cast(Block, block).decode_step(x, cache, layer)
        return self.ln_f(x)


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, whose weight is the token embedding, without adapter."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.packed_head: nn.Module | None = None  # set by decoding.packed
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Bottleneck):  # after its own layers
            module.start_near_identity()
        if isinstance(module, Prefix):
            module.start()

    @property
    def head_weight(self) -> Tensor:
        """(V, C), the token embedding's own weight: an adapter of it does not reach the head."""
        wte = self.transformer.wte
        return wte.base_weight if isinstance(wte, loralib.Embedding) else wte.weight

    def hold_base_in(self, dtype: torch.dtype) -> None:
        """Round the frozen matrices of the base and the token embedding to a dtype that the model
        is then to be run in by autocast. Positions, biases and LayerNorms stay in fp32, and so do
        the sums that run through the blocks."""
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in (*layers, self.transformer.wte):
            if not layer.weight.requires_grad:
                layer.weight.data = layer.weight.data.to(dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), by the tied embedding."""
        if self.packed_head is not None:
            return self.packed_head(hidden)
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor | Batch,
        lm_labels: Tensor | None = None,
        lm_mask: Tensor | None = None,
        label_smooth: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(logits, None)` without labels, logits (B, T, V); `(None, loss)` with them.

        `input_ids`, `lm_labels` are (B, T) int64, right-padded; the label of a position is the
        token that follows it. `lm_mask` (B, T) weighs each position, everything counts without it.
        Training gives a `Batch` in their place and gets `(plain, loss)`, where plain is the loss
        without smoothing and has no gradient.

        loss = Σ mask · ((1 - e) · nll + e · mean over V of -log p) / Σ mask, e = `label_smooth`; 0
        where nothing counts. Padding is left out of all layers, and only counted positions pass
        the head, which is why no logits come back.
        """
        if isinstance(input_ids, Batch):
            loss, plain = self.losses(input_ids, label_smooth)
            return plain, loss
        if lm_labels is not None:
            batch = Batch.from_padded(input_ids, lm_labels, lm_mask)
            return None, self.losses(batch, label_smooth)[0]
        rows, tokens = input_ids.shape
        positions = torch.arange(tokens, device=input_ids.device).repeat(rows)
        spans = Spans.of([tokens] * rows).to(input_ids.device)
        hidden = self.transformer(input_ids.flatten(), positions, spans)
        return self.head(hidden).view(rows, tokens, -1), None

    def losses(self, batch: Batch, label_smooth: float) -> tuple[Tensor, Tensor]:
        """Weighted means over the positions that count, of the smoothed loss and of the plain."""
        hidden = self.transformer(
            batch.input_ids, batch.positions, batch.spans, needed=batch.counted
        )
        weight = self.head_weight
        return smoothed_cross_entropy(hidden, weight, batch.targets, batch.weights, label_smooth)

    def prefill(self, prompts: Sequence[Tensor], cache: Cache) -> Tensor:
        """Read prompts, (P,) int64 each, into a new cache: the logits (B, V) that follow them."""
        lengths, device = [len(prompt) for prompt in prompts], prompts[0].device
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        spans = Spans.of(lengths).to(device)
        ends = spans.starts[1:].long() - 1
        return self.head(self.transformer(torch.cat([*prompts]), positions, spans, cache, ends))

    def decode_step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Logits (B, K, V) that follow one new token per beam, `input_ids` (B, K)."""
        return self.head(self.transformer.decode_step(input_ids, cache))


# Where adapters sit.

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


def linear(config: GPT2Config, target: str, inputs: int, outputs: int) -> loralib.Linear:
    """A linear layer, with the adapter if `target` is one of the config's targets."""
    settings = config.lora.layer_settings() if config.lora and target in config.targets else {}
    return loralib.Linear(inputs, outputs, fan_in_fan_out=True, merge_weights=False, **settings)


def fused_projection(config: GPT2Config) -> loralib.Linear:
    """The projection to query, key and value, each of which may have an adapter."""
    sizes = config.n_embd, 3 * config.n_embd
    if "c_attn" in config.targets:
        return linear(config, "c_attn", *sizes)
    settings = config.lora.layer_settings() if config.lora else {}
    settings |= {"enable_lora": [part in config.targets for part in "qkv"]}
    return loralib.MergedLinear(*sizes, fan_in_fan_out=True, merge_weights=False, **settings)


def token_embedding(config: GPT2Config) -> nn.Embedding:
    """The token embedding, with the adapter if `wte` is one of the config's targets."""
    sizes = config.vocab_size, config.n_embd
    if config.lora is None or "wte" not in config.targets:
        return nn.Embedding(*sizes)
    r, alpha, rslora = config.lora.r, config.lora.alpha, config.lora.rslora
    return loralib.Embedding(*sizes, r, alpha, merge_weights=False, use_rslora=rslora)
