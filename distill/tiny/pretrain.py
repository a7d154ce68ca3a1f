"""Trains tiny Qwen3-architecture models from scripted demonstrations, on a CPU, in about a minute.

Two layers of width 64, about 160 thousand parameters. What makes it that quick: short episodes whose copies are
unambiguous token by token (tokenizer.py), Muon, a learning rate that falls to zero over the last part, the loss on the
assistant's tokens only. Padded on the right and causal, so no attention mask is needed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from distill.tiny.muon import Muon
from distill.tiny.tokenizer import END, START
from envs.medbrowse.demos import demonstrations
from envs.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

Progress = Callable[[str], None]

EMBEDDING_STD = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of supervised training."""

    name: str
    data_seed: str
    num_steps: int
    num_episodes: int
    """Distinct demonstrations; passed over as often as the steps need."""
    error_rate: float = 0.0
    """Of the demonstrations' decisions."""
    batch_size: int = 16
    muon_lr: float = 6e-3
    adam_lr: float = 5e-3
    warmup_steps: int = 20
    decay_share: float = 0.35
    """Last part of the steps, over which the learning rate falls linearly to 0."""


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration."""

    ids: list[int]
    trained: list[int]
    """Positions of the assistant's tokens, its close tokens included."""


def build_model(vocab_size: int, *, pad_id: int, eos_id: int, seed: int) -> Qwen3ForCausalLM:
    """A random model of the tiny architecture."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        bos_token_id=None,
        attn_implementation="sdpa",
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        # Wider than the architecture's 0.02: copying, the job's one skill, is learnt in a third of the steps.
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    return model


def render(messages: Sequence[Message], tool_names: Sequence[str]) -> str:
    """The chat template of the tiny tokenizer, without Jinja's cost; `pretrain` compares the two before it starts."""
    from json import dumps

    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    parts = [f"{START}system\n{system}Tools:", *(f" {name}" for name in tool_names), END]
    for message in messages[1:] if system else messages:
        parts += (START, message["role"], "\n", message.get("content") or "")
        for call in message.get("tool_calls", ()):
            function = call["function"]
            body = dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
            parts += ("<tool_call>", body, "</tool_call>")
        parts.append(END)
    return "".join(parts)


def examples(
    phase: Phase, tokenizer: PreTrainedTokenizerFast, tools: Sequence[dict[str, Any]], *, seed: int
) -> list[Example]:
    """The phase's demonstrations as ids.

    Raises:
        RuntimeError: `render` and the tokenizer's chat template differ.
    """
    names = [tool["function"]["name"] for tool in tools]
    stream = demonstrations(f"{phase.data_seed}-{seed}", error_rate=phase.error_rate)
    dialogues = list(itertools.islice(stream, phase.num_episodes))
    texts = [render(messages, names) for messages in dialogues]
    for messages, text in itertools.islice(zip(dialogues, texts, strict=True), 8):
        if tokenizer.apply_chat_template(messages, tools=list(tools), tokenize=False) != text:
            raise RuntimeError("the tiny tokenizer's chat template and distill.tiny.pretrain.render differ")
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    assistant = tokenizer.encode("assistant\n", add_special_tokens=False)
    return [
        Example(ids, list(_trained(ids, [start, *assistant], end)))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def _trained(ids: list[int], opening: list[int], end: int) -> Iterator[int]:
    position, width = 0, len(opening)
    while position < len(ids):
        if ids[position] == opening[0] and ids[position : position + width] == opening:
            position += width
            while ids[position] != end:
                yield position
                position += 1
            yield position
        position += 1


def train(
    model: Qwen3ForCausalLM,
    data: Sequence[Example],
    phase: Phase,
    *,
    pad_id: int,
    seed: int,
    progress: Progress,
) -> None:
    """Runs one phase in place. Deterministic for the same arguments, torch version and number of threads."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=phase.muon_lr)
    adam = torch.optim.AdamW(others, lr=phase.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = _batches(len(data), phase.batch_size, generator)
    model.train()
    started, tokens = time.monotonic(), 0
    for step in range(phase.num_steps):
        batch = [data[i] for i in next(order)]
        tokens += sum(len(e.ids) for e in batch)
        loss = _loss(model, batch, pad_id)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = _factor(step, phase)
        muon.step(factor)
        for group in adam.param_groups:
            group["lr"] = phase.adam_lr * factor
        adam.step()
        if (step + 1) % 100 == 0 or step + 1 == phase.num_steps:
            speed = tokens / (time.monotonic() - started)
            progress(
                f"{phase.name}: step {step + 1}/{phase.num_steps}, loss {loss.item():.4f}, {speed / 1e3:.0f}k tok/s"
            )
    model.eval()


def _loss(model: Qwen3ForCausalLM, batch: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens; the output layer runs at their positions only."""
    length = max(len(e.ids) for e in batch)
    ids_BT = torch.full((len(batch), length), pad_id)
    for row, example in enumerate(batch):
        ids_BT[row, : len(example.ids)] = torch.tensor(example.ids)
    rows = torch.tensor([row for row, e in enumerate(batch) for _ in e.trained])
    positions = torch.tensor([p for e in batch for p in e.trained])
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD[rows, positions - 1])
    return F.cross_entropy(logits_NV, ids_BT[rows, positions])


def _batches(num_items: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(num_items, generator=generator).tolist()
        for start in range(0, num_items - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _factor(step: int, phase: Phase) -> float:
    warmup = min(1.0, (step + 1) / phase.warmup_steps)
    left = (phase.num_steps - step) / max(1, math.ceil(phase.num_steps * phase.decay_share))
    return min(warmup, 1.0, left)
