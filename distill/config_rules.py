"""Rules between settings: what cannot hold together, what is seldom meant, and no secret in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.config import RunConfig

_SECRET = re.compile(
    r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[opsru]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\bnvapi-[A-Za-z0-9_-]{20,}"
    r"|\bglpat-[A-Za-z0-9_-]{16,}|\bgsk_[A-Za-z0-9]{20,}|\bBearer\s+\S{8,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
)


def looks_secret(text: str) -> bool:
    """Whether the text holds something of the shape of a well-known kind of API key or token."""
    return _SECRET.search(text) is not None


@dataclass(frozen=True, slots=True)
class Problem:
    """Two or more settings that cannot hold together."""

    keys: tuple[str, ...]
    """Dotted keys, the one to blame first."""
    message: str


class InconsistentConfig(ValueError):
    """Every field is valid by itself, but not with the others."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{p.keys[0]}: {p.message}" for p in problems))
        self.problems = problems


def problems_of(config: RunConfig) -> Iterator[Problem]:
    """What cannot hold together."""
    student, teacher, rollout, loss = config.student, config.teacher, config.rollout, config.loss
    if teacher.model is None and teacher.system_prompt is None and teacher.base_url is None:
        yield Problem(
            ("teacher.model", "teacher.system_prompt", "teacher.base_url"),
            "not given, so the teacher would be the student itself and teach nothing; name a model, or give "
            "teacher.system_prompt",
        )
    if loss.type == "topk" and teacher.top_k < 1:
        yield Problem(
            ("teacher.top_k", "loss.type"),
            f'is {teacher.top_k}, but loss.type "topk" needs the teacher\'s candidates; try 20',
        )
    if loss.type == "full" and teacher.base_url is not None:
        yield Problem(
            ("loss.type", "teacher.base_url"),
            '"full" needs the whole distribution of a teacher in this process, but teacher.base_url names a server; '
            'take "topk", or drop teacher.base_url',
        )
    if loss.adv_tau > 0 and config.skip_verification:
        yield Problem(
            ("loss.adv_tau", "skip_verification"),
            f"is {loss.adv_tau}, but skip_verification is true: there is no reward to take an advantage from; "
            "set skip_verification = false, or loss.adv_tau = 0",
        )
    if loss.adv_tau == 0 and loss.teacher_tau == 0:
        yield Problem(("loss.teacher_tau", "loss.adv_tau"), "and loss.adv_tau are both 0: nothing would be learnt")
    if student.max_context is not None:
        limit = rollout.max_episode_tokens
        if limit is not None and limit > student.max_context:
            yield Problem(
                ("rollout.max_episode_tokens", "student.max_context"),
                f"is {limit}, more than student.max_context ({student.max_context}) holds",
            )
        if rollout.max_turn_tokens >= student.max_context:
            yield Problem(
                ("rollout.max_turn_tokens", "student.max_context"),
                f"is {rollout.max_turn_tokens}: with student.max_context {student.max_context} no room is left for a "
                "prompt",
            )
    if rollout.max_episode_tokens is not None and rollout.max_turn_tokens > rollout.max_episode_tokens:
        yield Problem(
            ("rollout.max_turn_tokens", "rollout.max_episode_tokens"),
            f"is {rollout.max_turn_tokens}, more than rollout.max_episode_tokens ({rollout.max_episode_tokens})",
        )
    if config.optim.warmup_steps > config.steps:
        yield Problem(
            ("optim.warmup_steps", "steps"),
            f"is {config.optim.warmup_steps}, more than the run has steps ({config.steps})",
        )
    for name, base_url, key in (
        ("student", student.base_url, student.api_key_env),
        ("teacher", teacher.base_url, teacher.api_key_env),
    ):
        if key is not None and base_url is None:
            yield Problem(
                (f"{name}.api_key_env", f"{name}.base_url"),
                f"names a key, but there is no {name}.base_url to send it to",
            )
    for key, text in _strings(config.model_dump(), ""):
        if re.fullmatch(r"\$(\w+|\{[^}]*\})", text):
            yield Problem((key,), f"is {text!r}, but environment variables are not expanded; write the value")
        if looks_secret(text):
            yield Problem(
                (key,),
                "looks like a key or a token; put it into an environment variable and name that in api_key_env",
            )


def notes_of(config: RunConfig) -> Iterator[str]:
    """What is allowed and seldom meant."""
    rollout = config.rollout
    if rollout.temperature != 1:
        yield (
            f"rollout.temperature is {rollout.temperature}: episodes are not sampled from the policy that is trained; "
            "the importance ratio corrects it only up to loss.rho"
        )
    if rollout.top_p != 1 or rollout.top_k:
        yield "rollout.top_p/top_k cut the distribution: the loss never sees the tokens that they leave out"
    if config.loss.type != "topk" and config.teacher.top_k:
        yield f'teacher.top_k is {config.teacher.top_k}, but loss.type "{config.loss.type}" does not use the candidates'
    if config.loss.adv_tau > 0 and rollout.group_size == 1:
        yield "loss.adv_tau is above 0 with rollout.group_size 1: an advantage within a group of one is always 0"
    if config.teacher.model == config.student.model and config.teacher.system_prompt is None:
        yield "teacher.model is the student's own and has no system_prompt: the KL is 0 and nothing is learnt"
    for name, url in (("student", config.student.base_url), ("teacher", config.teacher.base_url)):
        if url is not None and not url.endswith("/v1"):
            yield f"{name}.base_url does not end in /v1, as vLLM's address does"


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string in a tree, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)
