"""Tiny random models, a tokenizer for them, and what a plain `transformers` forward says of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 512
EOS = 0

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    # Random weights of the usual 0.02 give a flat distribution, in which an error would not show.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}


def tiny_qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


def tiny_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Grouped-query attention and an `lm_head` of its own, unlike `tiny_qwen3`."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def tiny_mistral(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """All layers look 16 tokens back."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16, **changes}
    return MistralForCausalLM(MistralConfig(**shape)).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`w7` is token 7."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w0", unk_token="w1")


def save(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def reference(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """[T, V] log-probabilities of the token after each position."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """[T - 1] log-probability of ids[1:]."""
    return reference(model, ids)[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0].tolist()
