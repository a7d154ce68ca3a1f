"""The key/value cache of the embedded engine: one buffer, many sequences, each in a slot of its own.

A forward covers some rows (slots) at once, each at its own position, so that sequences join and leave between
steps and keep their prefix after they end. `transformers` models see it through the ordinary `Cache.update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

ATTENTION = "distill_slots"


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa` without the copy of every key and value that `transformers` makes for grouped-query attention under a
    mask; for a long cache that copy costs ten times the attention itself (bench/README.md). A step of decoding takes
    the heads of a group as queries of one head, which they are: torch's kernel reads keys and values once for all of
    them, and is three times as fast in bfloat16 on a CPU."""
    for name in ("s_aux", "softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the embedded engine's attention has no {name!r}, which this model needs")
    batch, heads, num_queries, dim = query.shape
    if num_queries == 1:
        query = query.reshape(batch, key.shape[1], -1, dim)
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and num_queries > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if num_queries == 1:
        out = out.reshape(batch, heads, 1, dim)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, slot_attention)


class SlotCache(Cache):
    """Keys and values of `num_slots` sequences of up to `num_tokens` tokens; grown by `resize`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        """One a layer, [num_slots, num_tokens + 1, heads, head_dim]; the last position takes writes that nobody
        reads (padding, idle rows). Allocated in the first forward: only the model knows its shapes."""
        self.values: list[Tensor] = []
        self.num_slots = 0
        self.num_tokens = 0
        self.device = device
        self._rows: slice | Tensor = slice(0, 0)
        self._writes = torch.empty(0, dtype=torch.int64, device=device)
        self._span = 0

    @property
    def bytes_per_token(self) -> int:
        """Of one slot, all layers; 0 before the first forward."""
        buffers = (*self.keys, *self.values)
        return sum(b.shape[2] * b.shape[3] * b.element_size() for b in buffers)

    def resize(self, num_slots: int, num_tokens: int, keep: Sequence[int] = ()) -> None:
        """Make room; slot i of the new buffer is slot `keep[i]` of the old one, what else there was is gone."""
        rows = torch.tensor(keep, dtype=torch.int64, device=self.device)
        span = min(num_tokens, self.num_tokens)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                # Zeros, not garbage: see `wipe`.
                new = old.new_zeros((num_slots, num_tokens + 1, *old.shape[2:]))
                if len(keep):
                    new[: len(keep), :span] = old[:, :span].index_select(0, rows)
                buffers[layer] = new
        self.num_slots, self.num_tokens = num_slots, num_tokens

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for buffer in (*self.keys, *self.values):
            buffer[target, :length] = buffer[source, :length]

    def wipe(self, slot: int) -> None:
        """Zero a slot. What it holds may not be finite, and would reach the next sequence through its masked
        positions: 0 times NaN is NaN."""
        for buffer in (*self.keys, *self.values):
            buffer[slot].zero_()

    def clear(self) -> None:
        for buffer in (*self.keys, *self.values):
            buffer.zero_()

    def aim(self, rows: Tensor, positions: Tensor, real: Tensor, *, leading: bool) -> Tensor:
        """Say where the next forward reads and writes.

        Args:
            rows: [B] slots.
            positions: [B, Q] of the tokens fed.
            real: [B, Q] False where a token is padding: its key and value go nowhere.
            leading: rows are 0..B-1, so that the buffer is read in place instead of gathered.

        Returns:
            [B, 1, Q, span] True where a query may look.
        """
        self._rows = slice(0, len(rows)) if leading else rows
        self._span = int(positions.max()) + 1
        places = torch.where(real, positions, self.num_tokens) + (rows * (self.num_tokens + 1))[:, None]
        self._writes = places.flatten()
        return (torch.arange(self._span, device=self.device) <= positions[..., None])[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, heads, Q, dim] at the aimed places; all keys and values of the rows, [B, heads, span, dim]."""
        return (
            self._update(self.keys, key_states, layer_idx),
            self._update(self.values, value_states, layer_idx),
        )

    def _update(self, buffers: list[Tensor], states: Tensor, layer_idx: int) -> Tensor:
        states = states.transpose(1, 2)
        if layer_idx == len(buffers):
            buffers.append(states.new_zeros((self.num_slots, self.num_tokens + 1, *states.shape[2:])))
        buffer = buffers[layer_idx]
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self._writes, states.flatten(0, 1))
        if isinstance(self._rows, slice):
            return buffer[self._rows, : self._span].transpose(1, 2)
        return buffer[:, : self._span].index_select(0, self._rows).transpose(1, 2)


class CausalLM:
    """A `transformers` causal language model, as the engine uses it: cached steps and whole-sequence scoring.

    Raises:
        ValueError: the model keeps state that is not keys and values, or does not give the same numbers with this
            cache as without it; the first is read from its config, the second measured.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.vocab_size = int(self.config.vocab_size)
        layer_types = set(getattr(self.config, "layer_types", None) or ())
        if not layer_types <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"the embedded engine cannot serve {self.config.model_type!r}: it has layers of type "
                f"{', '.join(sorted(layer_types - {'full_attention', 'sliding_attention'}))}. Serve it with vLLM."
            )
        self._window = getattr(self.config, "sliding_window", None)
        if layer_types and "sliding_attention" not in layer_types:
            self._window = None
        self._mask_by_layer_type = "sliding_attention" in layer_types
        self.cache = SlotCache(self.device)
        self._check()

    def step(self, rows: Tensor, ids: Tensor, positions: Tensor, real: Tensor, *, leading: bool = False) -> Tensor:
        """Feed [B, Q] ids into the slots `rows`; the logits after the last column, [B, V] float32."""
        positions = positions.clamp(min=0)
        mask = self.cache.aim(rows, positions, real, leading=leading)
        out = self.model(
            input_ids=ids,
            attention_mask=self._masks(mask, positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, T] right-padded ids to last hidden states, [B, T, H], without the cache."""
        masks = None
        if self._window is not None:
            positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape)
            masks = self._masks((positions[0] <= positions[..., None])[:, None], positions)
        return self.model.base_model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """[N, H] to logits [N, V] float32."""
        return self.model.get_output_embeddings()(hidden).float()

    def _masks(self, allowed: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        # Additive: a boolean mask would be converted again in every layer.
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        full = torch.where(allowed, zero, float("-inf"))
        if self._window is None:
            return full
        near = torch.arange(allowed.shape[-1], device=self.device) > (positions - self._window)[..., None]
        sliding = torch.where(allowed & near[:, None], zero, float("-inf"))
        return {"full_attention": full, "sliding_attention": sliding} if self._mask_by_layer_type else sliding

    @torch.inference_mode()
    def _check(self) -> None:
        """The same 12 tokens three ways: plain forward, prefill and steps through the cache, hidden state and head.

        In 16 bits it is the mean over the vocabulary that must agree: of 50,000 roundings one or the other is above
        half a nat in a sound model, while a wrong cache moves the distribution as a whole. SmolLM2 in bfloat16: 0.05 to
        0.16 nats as it is, 0.55 to 1.0 with one wrong token among the cached ones."""
        ids = (torch.arange(12, device=self.device) * 7919 + 3)[None] % self.vocab_size
        plain = self.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        self.model.set_attn_implementation(ATTENTION)
        self.cache.resize(2, 16)
        row = torch.tensor([1], device=self.device)
        worst, exact = 0.0, self.dtype == torch.float32
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
            positions = torch.arange(start, end, device=self.device)[None]
            logits = self.step(row, ids[:, start:end], positions, torch.ones_like(positions, dtype=torch.bool))
            difference = (logits[0].log_softmax(-1) - plain[end - 1]).abs()
            worst = max(worst, float(difference.max() if exact else difference.mean()))
        difference = (self.head(self.hidden(ids)[0]).log_softmax(-1) - plain).abs()
        worst = max(worst, float(difference.max() if exact else difference.mean(-1).max()))
        # Written so that NaN passes: broken weights are a request's error, not an unsupported model.
        if worst > (1e-3 if exact else 0.3):
            raise ValueError(
                f"the embedded engine cannot serve {self.config.model_type!r}: with its cache the log-probabilities "
                f"are off by {worst:.3g} nats. Serve it with vLLM."
            )
        self.cache.clear()
