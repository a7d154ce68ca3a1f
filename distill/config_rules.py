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
    in_process = teacher.base_url is None and teacher.server is None and not teacher.on_student_server
    asks = config.episodes is None or loss.type == "full"
    if asks and teacher.model is None and teacher.system_prompt is None and in_process and loss.teacher_tau:
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
    if loss.type == "full" and not in_process:
        yield Problem(
            ("loss.type", "teacher.base_url"),
            '"full" needs the whole distribution of a teacher in this process, but teacher.base_url, teacher.server or '
            'teacher.on_student_server names a server; take "topk", or drop it',
        )
    if loss.candidates == "student" and loss.type != "topk":
        yield Problem(("loss.candidates", "loss.type"), f'is "student", but loss.type "{loss.type}" has no candidates')
    if loss.kl_estimator == "k3":
        yield Problem(
            ("loss.kl_estimator",),
            'is "k3", whose gradient is that of the forward KL, with a large variance (docs/loss.md); it is always a '
            'metric, teacher_kl/k3. Take "k1" or "k2"',
        )
    for option, value, default in (
        ("kl_estimator", loss.kl_estimator, "k1"),
        ("surrogate", loss.surrogate, "importance_sampling"),
    ):
        if loss.type != "sampled" and value != default:
            yield Problem(
                (f"loss.{option}", "loss.type"),
                f'is "{value}", which is for the type "sampled"; loss.type is "{loss.type}"',
            )
    if loss.kl_estimator == "k2" and loss.surrogate == "ppo":
        yield Problem(("loss.kl_estimator", "loss.surrogate"), 'is "k2", which is no advantage that "ppo" could clip')
    if loss.kl_estimator == "k2" and loss.advantage_clip is not None:
        yield Problem(("loss.advantage_clip", "loss.kl_estimator"), 'bounds the advantage of "k1"; "k2" has none')
    if loss.advantage_clip is not None and loss.type == "full":
        yield Problem(
            ("loss.advantage_clip", "loss.type"),
            'cuts single log-ratios, but loss.type "full" is the exact sum of them; take "sampled" or "topk"',
        )
    if rollout.curriculum is not None and rollout.curriculum.start > rollout.max_turns:
        yield Problem(
            ("rollout.curriculum.start", "rollout.max_turns"),
            f"is {rollout.curriculum.start}, more than rollout.max_turns ({rollout.max_turns})",
        )
    yield from _server_problems(config)
    if config.episodes is not None and loss.adv_tau > 0:
        yield Problem(
            ("loss.adv_tau", "episodes"),
            f"is {loss.adv_tau}, but an advantage compares the episodes of a task in one step, and stored episodes are "
            "taken one by one; take 0",
        )
    if config.episodes is None and loss.adv_tau > 0 and config.skip_verification:
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
    for name, base_url, gpus in (
        ("student", student.base_url, config.cost.student_gpus),
        ("teacher", teacher.base_url, config.cost.teacher_gpus),
    ):
        if gpus is not None and base_url is None:
            yield Problem(
                (f"cost.{name}_gpus", f"{name}.base_url"),
                f"counts the GPUs of given servers, but there is no {name}.base_url; those of the run count themselves",
            )
    if config.checkpoint.keep_best and not config.eval.every:
        yield Problem(
            ("checkpoint.keep_best", "eval.every"),
            "needs evaluations to choose by, but eval.every is 0: nothing is evaluated during training",
        )
    if config.checkpoint.keep_every % config.checkpoint.every:
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.every"),
            f"is {config.checkpoint.keep_every}, no multiple of checkpoint.every ({config.checkpoint.every}): most of "
            "those steps are never saved",
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


def _server_problems(config: RunConfig) -> Iterator[Problem]:
    """Who serves what: one way each, and one that can."""
    student, teacher = config.student, config.teacher
    for name, section in (("student", student), ("teacher", teacher)):
        if section.base_url is not None and section.server is not None:
            yield Problem(
                (f"{name}.server", f"{name}.base_url"),
                f"starts a server, but {name}.base_url names one that is there; keep one of the two",
            )
        server = section.server
        if server is not None and server.gpus and len(server.gpus) != server.tensor_parallel * server.data_parallel:
            yield Problem(
                (f"{name}.server.gpus", f"{name}.server.tensor_parallel", f"{name}.server.data_parallel"),
                f"has {len(server.gpus)} GPUs, but tensor_parallel x data_parallel is "
                f"{server.tensor_parallel * server.data_parallel}",
            )
        if server is not None and len(set(server.gpus)) != len(server.gpus):
            yield Problem((f"{name}.server.gpus",), f"names a GPU twice: {list(server.gpus)}")
    if student.server is not None and teacher.server is not None:
        both = sorted(set(student.server.gpus) & set(teacher.server.gpus))
        if both:
            yield Problem(
                ("teacher.server.gpus", "student.server.gpus"), f"shares GPU {both[0]} with student.server.gpus"
            )
    on_vllm = student.base_url is not None or student.server is not None
    if student.weight_sync == "nccl" and not on_vllm:
        yield Problem(
            ("student.weight_sync", "student.server"), 'is "nccl", but the student is served by the embedded engine'
        )
    if student.weight_sync == "nccl" and student.lora is not None:
        yield Problem(
            ("student.weight_sync", "student.lora"), 'is "nccl", which carries full weights; adapters go by disk'
        )
    served = config.episodes is None
    if served and student.lora is not None and student.lora.quantization != "none" and not on_vllm:
        yield Problem(
            ("student.lora.quantization", "student.server"),
            f'is "{student.lora.quantization}", but the embedded engine serves whole weights; publish the adapter to a '
            "vLLM server (student.server or student.base_url)",
        )
    if teacher.on_student_server:
        if teacher.base_url is not None or teacher.server is not None:
            yield Problem(
                ("teacher.on_student_server", "teacher.base_url", "teacher.server"),
                "takes the student's server, but teacher.base_url or teacher.server names another",
            )
        if student.lora is None or not on_vllm:
            yield Problem(
                ("teacher.on_student_server", "student.lora", "student.server"),
                "needs the student as a LoRA adapter (student.lora) on a vLLM server (student.server or "
                "student.base_url): with full weights the base model would be overwritten",
            )
        if teacher.model is not None and teacher.model != student.model:
            yield Problem(
                ("teacher.model", "teacher.on_student_server"),
                f"is {teacher.model!r}, but the base model on the student's server is {student.model!r}",
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
    if rollout.executor == "ray" and rollout.ray.workers * rollout.ray.episodes_per_worker < rollout.max_concurrent:
        yield (
            f"rollout.ray has room for {rollout.ray.workers} x {rollout.ray.episodes_per_worker} episodes at once, "
            f"rollout.max_concurrent is {rollout.max_concurrent}: the smaller number holds"
        )
    if config.loss.type != "topk" and config.teacher.top_k:
        yield f'teacher.top_k is {config.teacher.top_k}, but loss.type "{config.loss.type}" does not use the candidates'
    if config.optim.epochs > 1 and config.loss.surrogate == "importance_sampling" and config.loss.rho > 5:
        yield f"optim.epochs is {config.optim.epochs} with loss.rho {config.loss.rho}: ratios grow with each epoch"
    if config.loss.adv_tau > 0 and rollout.group_size == 1:
        yield "loss.adv_tau is above 0 with rollout.group_size 1: an advantage within a group of one is always 0"
    own = config.teacher.model == config.student.model or (config.teacher.model is None and not config.teacher.base_url)
    if config.episodes is None and own and config.teacher.system_prompt is None and config.loss.teacher_tau:
        yield "teacher.model is the student's own and has no system_prompt: the KL is 0 and nothing is learnt"
    lora, server = config.student.lora, config.student.server
    if (
        lora is not None
        and lora.quantization != "none"
        and server is not None
        and "--quantization" not in (server.extra_args)
    ):
        yield (
            f"student.lora.quantization is {lora.quantization}, but the server samples from unquantised weights under "
            'the same adapter; student.server.extra_args = ["--quantization", "bitsandbytes"] makes both the same'
        )
    for name, urls in (("student", config.student.base_url), ("teacher", config.teacher.base_url)):
        if any(not url.endswith("/v1") for url in urls or ()):
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
