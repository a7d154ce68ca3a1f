"""Rules between settings: what cannot hold together, what is seldom meant, and no secret in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.config import OneTeacherConfig, RunConfig, ServerConfig, StudentConfig

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
    problems = list(source_problems(config))
    if problems:  # what follows reads the sources' teachers
        yield from problems
        return
    student, teacher, rollout, loss = config.student, config.teacher, config.rollout, config.loss
    asks = config.episodes is None or loss.type == "full"
    for key, one in teachers_of(config):
        if asks and one.model is None and not one.sees_more and one.in_process and loss.uses_teacher:
            yield Problem(
                (f"{key}.model", f"{key}.system_prompt", f"{key}.base_url", key),
                "not given, so the teacher would be the student itself and teach nothing; name a model, or give "
                f"{key}.system_prompt",
            )
        for name in one.prompt_fields:
            if f"{{{name}}}" not in (one.system_prompt or ""):
                yield Problem(
                    (f"{key}.prompt_fields", f"{key}.system_prompt"),
                    f"names {name!r}, but {key}.system_prompt has no {{{name}}} that its value could take the place of",
                )
    if loss.type == "topk" and teacher.top_k < 1:
        yield Problem(
            ("teacher.top_k", "loss.type"),
            f'is {teacher.top_k}, but loss.type "topk" needs the teacher\'s candidates; try 20',
        )
    if loss.type == "full" and not teacher.in_process:
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
    if loss.adv_tau == 0 and not loss.uses_teacher:
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
    for role, given, gpus in (
        ("student", student.base_url is not None, config.cost.student_gpus),
        ("teacher", any(one.base_url for _, one in teachers_of(config)), config.cost.teacher_gpus),
    ):
        if gpus is not None and not given:
            yield Problem(
                (f"cost.{role}_gpus", f"{role}.base_url"),
                f"counts the GPUs of given servers, but there is no {role}.base_url; those of the run count themselves",
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
    for name, section in served_models(config):
        if section.api_key_env is not None and section.base_url is None:
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


def teachers_of(config: RunConfig) -> list[tuple[str, OneTeacherConfig]]:
    """The teachers that are used, each with its table: `teacher`, `teachers.math`."""
    return [(teacher_key(name), teacher) for name, teacher in config.all_teachers.items()]


def teacher_key(name: str) -> str:
    """The table of a teacher of `RunConfig.all_teachers`."""
    return f"teachers.{name}" if name else "teacher"


def served_models(config: RunConfig) -> list[tuple[str, StudentConfig | OneTeacherConfig]]:
    """Student and teachers, each with its table."""
    return [("student", config.student), *teachers_of(config)]


OWN_NUMBERS = re.compile(r"p\d+|max|above_5|k[23]|think|call|answer|turn_\d+|dataset_.*")
"""What stands behind `teacher_kl/` already (docs/metrics.md)."""


def source_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with `[sources]` and `[teachers]` themselves."""
    sources, teachers = config.sources, config.teachers
    used = {source.teacher for source in sources.values()}
    if config.episodes is not None and sources:
        yield Problem(
            ("sources", "episodes"), "are played, but a run on stored episodes plays nothing; drop the tables"
        )
    for name in teachers:
        if name not in used:
            yield Problem(
                (f"teachers.{name}",), f'is the teacher of no source: no [sources.NAME] has teacher = "{name}"'
            )
    if config.loss.type == "full" and teachers:
        yield Problem(
            ("loss.type", "teachers"), '"full" takes one teacher, [teacher]; with several, take "topk" or "sampled"'
        )
    if config.loss.source_balance and not sources:
        yield Problem(("loss.source_balance",), "weighs sources against one another, but there is no [sources.NAME]")
    if not sources:
        return
    for name, source in sources.items():
        if source.teacher is not None and source.teacher not in teachers:
            there = f"there are {', '.join(teachers)}" if teachers else "there are none"
            yield Problem(
                (f"sources.{name}.teacher",),
                f"is {source.teacher!r}, but there is no [teachers.{source.teacher}]; {there}",
            )
        if OWN_NUMBERS.fullmatch(name):
            yield Problem(
                (f"sources.{name}",), f"would be the metric teacher_kl/{name}, which is another number already"
            )
    if not any(source.share for source in sources.values()):
        yield Problem((f"sources.{next(iter(sources))}.share", "sources"), "is 0 in all sources: nothing is trained on")
    for key in ("train", "eval"):
        if getattr(config.tasks, key) is not None:
            ours = "tasks" if key == "train" else "eval_tasks"
            yield Problem((f"tasks.{key}", "sources"), f"is for a run without [sources]; give sources.NAME.{ours}")
    if None not in used:
        given = [k for k in ("model", "base_url", "server", "system_prompt", "examples") if getattr(config.teacher, k)]
        if given or config.teacher.on_student_server:
            key = f"teacher.{(*given, 'on_student_server')[0]}"
            yield Problem((key, "sources"), "is about [teacher], which no source has: each names another")


def _server_problems(config: RunConfig) -> Iterator[Problem]:
    """Who serves what: one way each, and one that can."""
    student = config.student
    place = {key: config.place_of(teacher) for key, teacher in teachers_of(config)}
    launched: dict[str, ServerConfig] = {}
    for name, section in served_models(config):
        if section.base_url is not None and section.server is not None:
            yield Problem(
                (f"{name}.server", f"{name}.base_url"),
                f"starts a server, but {name}.base_url names one that is there; keep one of the two",
            )
        server = section.server
        if server is None:
            continue
        if server.gpus and len(server.gpus) != server.tensor_parallel * server.data_parallel:
            yield Problem(
                (f"{name}.server.gpus", f"{name}.server.tensor_parallel", f"{name}.server.data_parallel"),
                f"has {len(server.gpus)} GPUs, but tensor_parallel x data_parallel is "
                f"{server.tensor_parallel * server.data_parallel}",
            )
        if len(set(server.gpus)) != len(server.gpus):
            yield Problem((f"{name}.server.gpus",), f"names a GPU twice: {list(server.gpus)}")
        for before, others in launched.items():
            both = sorted(set(others.gpus) & set(server.gpus))
            if both and not (before in place and place[before] == place[name]):
                yield Problem(
                    (f"{name}.server.gpus", f"{before}.server.gpus"), f"shares GPU {both[0]} with {before}.server.gpus"
                )
        launched[name] = server
    for key, teacher in teachers_of(config):
        yield from _on_student_server_problems(config, key, teacher)
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


def _on_student_server_problems(config: RunConfig, key: str, teacher: OneTeacherConfig) -> Iterator[Problem]:
    if not teacher.on_student_server:
        return
    student = config.student
    if teacher.base_url is not None or teacher.server is not None:
        yield Problem(
            (f"{key}.on_student_server", f"{key}.base_url", f"{key}.server"),
            f"takes the student's server, but {key}.base_url or {key}.server names another",
        )
    if student.lora is None or (student.base_url is None and student.server is None):
        yield Problem(
            (f"{key}.on_student_server", "student.lora", "student.server"),
            "needs the student as a LoRA adapter (student.lora) on a vLLM server (student.server or "
            "student.base_url): with full weights the base model would be overwritten",
        )
    if teacher.model is not None and teacher.model != student.model:
        yield Problem(
            (f"{key}.model", f"{key}.on_student_server"),
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
    for key, teacher in teachers_of(config):
        own = teacher.model == config.student.model or (teacher.model is None and not teacher.base_url)
        if config.episodes is None and own and not teacher.sees_more and config.loss.uses_teacher:
            told = "nothing is learnt" if len(config.all_teachers) == 1 else "it holds the student where it began"
            yield f"{key}.model is the student's own and has no system_prompt: the KL is 0, {told}"
    schedule = config.loss.teacher_tau_schedule
    if schedule is not None and schedule.over > config.steps:
        yield f"loss.teacher_tau_schedule.over is {schedule.over}: the run ends before, after {config.steps} steps"
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
    for name, section in served_models(config):
        if any(not url.endswith("/v1") for url in section.base_url or ()):
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
