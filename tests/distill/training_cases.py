"""Small models, episodes and configurations for the tests of the trainer."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from agent_loop.types import ClassSpan, Episode, Segment, SegmentSource, TokenClass, TokenTrace, TopK, Turn
from distill.config import LossConfig, OptimConfig, RunConfig, SourceConfig, StudentConfig, TeacherConfig
from distill.student import Student
from envs.types import AssistantMessage, StopReason, Task

VOCAB = 61
P, A, T = SegmentSource.PROMPT, SegmentSource.ASSISTANT, SegmentSource.TOOL


def tiny_model(seed: int = 0, *, tied: bool = True, vocab_size: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def run_config(*, loss: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **student: Any) -> RunConfig:
    loss = {"type": "sampled"} | (loss or {})
    balanced = "source_balance" in loss
    return RunConfig(
        env="none",
        sources={"a": SourceConfig(share=3.0), "b": SourceConfig()} if balanced else {},
        steps=10,
        skip_verification="adv_tau" not in loss,
        student=StudentConfig(model="student", **student),
        teacher=TeacherConfig(model="teacher", top_k=4),
        loss=LossConfig(**loss),
        optim=OptimConfig(**({"lr": 1e-3, "max_grad_norm": 1e9} | (optim or {}))),
    )


def make_episode(
    index: int, *, rng: random.Random, first: int | None = None, tail: int | None = None, top_k: int = 0
) -> Episode:
    """Prompt, a turn, a tool result, a second turn, a last tool result; scores are drawn at random."""
    lengths = [first or rng.randint(3, 20), rng.randint(1, 9), rng.randint(1, 12), rng.randint(1, 9)]
    lengths.append(rng.randint(1, 8) if tail is None else tail)
    segments, start = [], 0
    for source, turn, length in zip((P, A, T, A, T), (-1, 0, 0, 1, 1), lengths, strict=True):
        if length:
            segments.append(Segment(start=start, end=start + length, source=source, turn=turn))
            start += length
    mask = [s.source is A for s in segments for _ in range(s.start, s.end)]
    candidates = [rng.sample(range(VOCAB), top_k) if m else None for m in mask]
    trace = TokenTrace(
        token_ids=[rng.randrange(VOCAB) for _ in mask],
        loss_mask=mask,
        sampling_logprobs=[-rng.uniform(1, 6) if m else None for m in mask],
        segments=segments,
        teacher_logprobs=[-rng.uniform(1, 6) if m else None for m in mask],
        teacher_topk=TopK(
            token_ids=candidates,
            logprobs=[None if c is None else [-rng.uniform(3, 6) for _ in c] for c in candidates],
        )
        if top_k
        else None,
    )
    turns = [
        Turn(
            index=s.turn,
            message=AssistantMessage(content=""),
            text="",
            trace=0,
            start=s.start,
            end=s.end,
            token_classes=(ClassSpan(token_class=(TokenClass.THINK, TokenClass.CALL)[s.turn], start=0, end=1),),
        )
        for s in segments
        if s.source is A
    ]
    return Episode(
        id=f"1/task{index}/0",
        env_id="toy",
        task=Task(messages=({"role": "user", "content": "?"},), id=f"task{index}"),
        turns=turns,
        traces=[trace],
        stop_reason=StopReason.LAST_TOOL,
    )


def make_episodes(count: int, seed: int = 0, **options: Any) -> list[Episode]:
    rng = random.Random(seed)
    return [make_episode(i, rng=rng, **options) for i in range(count)]


def of_sources(episodes: list[Episode], *names: str) -> list[Episode]:
    """The same episodes, in turns of these sources."""
    for index, episode in enumerate(episodes):
        episode.task = replace(episode.task, source=names[index % len(names)])
    return episodes


def gradients_of(student: Student) -> dict[str, torch.Tensor]:
    """Of the first step: Adam's first moment is then (1 - beta1) times the gradient."""
    beta1 = student.config.optim.betas[0]
    return {
        name.removesuffix("/exp_avg"): tensor / (1 - beta1)
        for name, tensor in student.optimizer.state().items()
        if name.endswith("/exp_avg")
    }


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict_for_serving().items()}
