"""Attention of several traces that lie end to end in one row, each seeing itself alone.

No mask of the row is ever built: the boundaries say all. On a GPU in 16 bits it is one call of torch's variable-length
kernel, elsewhere one `scaled_dot_product_attention` a trace. The function is known to `transformers` as `PACKED`; its
decoders hand it the boundaries under the names that they have for flash attention (`cu_seq_lens_q` ...), also when
a layer is computed a second time under gradient checkpointing.

It serves plain causal attention and refuses everything else, so that a model cannot lose a sliding window, a soft cap
or a sink without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKED = "distill_packed"
"""Name of the function among those of `transformers`."""

_INERT = frozenset({"position_ids", "cache_position", "cu_seq_lens_k", "max_length_k"})
"""What decoders pass on and causal attention does not need. (Keys end where queries end.)"""

_FLASH_HEAD_DIM = 256
"""Widest head of the variable-length kernel."""


class NotPlainCausal(NotImplementedError):
    """A model asks for attention that is more than causal; the message names it."""


def use_packed(model: Any) -> None:
    """Make `PACKED` the attention of a `transformers` model.

    Raises:
        NotPlainCausal: the model does not let its attention be chosen.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask)
    model.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise NotPlainCausal("its attention cannot be replaced")


def row_arguments(boundaries: Tensor, device: torch.device) -> dict[str, Any]:
    """What a decoder is given beside the ids of one row of traces.

    Args:
        boundaries: [S + 1] trace s is [boundaries[s], boundaries[s + 1]) of the row; on the CPU.

    Returns:
        `position_ids`, 0 at the start of each trace; a mask that hides nothing, without which `transformers` would
        build a [T, T] one from the positions; the boundaries.
    """
    lengths = boundaries.diff()
    positions = torch.arange(int(boundaries[-1])) - boundaries[:-1].repeat_interleave(lengths)
    ends = boundaries.to(device, torch.int32)
    longest = int(lengths.max())
    return {
        "position_ids": positions[None].to(device),
        "attention_mask": torch.ones_like(positions, dtype=torch.bool)[None].to(device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each trace of a row; without boundaries that of `transformers`, unchanged.

    Args:
        query: [1, heads, T, D]
        key: [1, key heads, T, D]; a divisor of `heads`.
        value: [1, key heads, T, E]
        cu_seq_lens_q: [S + 1] boundaries of the S traces.
        max_length_q: tokens of the longest.

    Returns:
        [1, T, heads, E], and no attention weights.

    Raises:
        NotPlainCausal: an option that changes what a token sees or how much.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # A call from outside the trainer, one trace alone, or a padded batch.
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output
    odd = {name for name, value in options.items() if name not in _INERT and value is not None and value is not False}
    odd |= {"attention_mask"} if attention_mask is not None else set()
    odd |= {"dropout"} if dropout else set()
    odd |= {"is_causal"} if is_causal is False or not getattr(module, "is_causal", True) else set()
    if odd:
        raise NotPlainCausal(f"its attention has {', '.join(sorted(odd))}")
    if _has_kernel(query, value):
        assert max_length_q is not None
        return by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    return _trace_by_trace(query, key, value, cu_seq_lens_q, scaling), None


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """`packed_attention` in one call of torch's variable-length kernel (GPU, 16 bits)."""
    from torch.nn.attention.varlen import varlen_attn

    query_THD, key_THD, value_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _trace_by_trace(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None) -> Tensor:
    lengths = boundaries.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    traces = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat([trace.transpose(1, 2) for trace in traces], 1)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _FLASH_HEAD_DIM
    )


def _mask(*, mask_function: Any, **arguments: Any) -> Tensor | None:
    """The mask of layers under `PACKED`: that of `sdpa`, which is None where nothing but the future is hidden.

    Asked for by each kind of layer in each forward pass. A kind that hides more (a sliding window, chunks, blocks of
    images) brings a function of its own, and is refused however short the row is: it would hide nothing yet.

    Raises:
        NotPlainCausal
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is not causal_mask_function:
        raise NotPlainCausal("some of its layers do not see all that came before")
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, **arguments)
    return mask
