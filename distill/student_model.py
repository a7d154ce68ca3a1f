"""The model under a student: its number format, its adapters, no dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dtype_of(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def nf4(dtype: torch.dtype, device: str) -> Any:
    """4-bit normal floats with doubly quantised scales: QLoRA, arXiv 2305.14314, section 3.

    Raises:
        ValueError: it cannot be had here.
    """
    import importlib.util

    from transformers import BitsAndBytesConfig

    if device != "cuda":  # there, bitsandbytes packs the weights for inference, and gradients stop at them
        raise ValueError('student.lora.quantization "nf4" needs a GPU; "none" trains the same adapters')
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("student.lora.quantization \"nf4\" needs bitsandbytes: pip install -e '.[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def with_lora(model: PreTrainedModel, lora: LoraConfig) -> Any:
    """PEFT's wrapper around the model, with adapters that change nothing yet.

    Raises:
        ValueError: a name of `target_modules` fits nothing.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    everywhere = lora.target_modules == ("all-linear",)
    return get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules="all-linear" if everywhere else list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )


def refuse_adapted_ties(model: PreTrainedModel) -> None:
    """Input and output embedding are one tensor: an adapter on one of them cannot be merged without the other.

    Raises:
        ValueError: naming the module.
    """
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        return
    for name, module in model.named_modules():
        if module in (model.get_input_embeddings(), model.get_output_embeddings()) and hasattr(
            module, "get_delta_weight"
        ):
            raise ValueError(
                f"student.lora.target_modules: {name!r} shares its weight with the other embedding of this model, so "
                "an adapter on it cannot be served; leave it out"
            )


def switch_off_dropout(model: nn.Module) -> None:
    """In training mode too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - the type checker knows modules only
