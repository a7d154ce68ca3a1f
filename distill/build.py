"""From a configuration to the parts of a run. Heavy imports live here, behind the parsed arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import envs
from agent_loop.policy import VllmPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.transport import AsgiTransport, HttpTransport, Transport
from distill import models
from distill.config import RunConfig
from distill.console import Console
from distill.publish import EmbeddedPublisher, Publisher
from distill.serving.embedded import EmbeddedEngine
from distill.student import Student
from distill.teacher import HttpTeacher
from envs.dataset import read_tasks
from envs.tool_env import ToolEnv
from envs.types import Task
from tools.types import ToolSpec


class BuildError(Exception):
    """A part of the run cannot be made from the configuration; the message says which key and why."""


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """One served model."""

    transport: Transport
    model: str
    """The name that the server knows it by."""
    path: str | Path
    """Where its tokenizer and weights are: a folder or a hub id."""
    engine: EmbeddedEngine | None = None
    """Set where this process serves it."""

    async def aclose(self) -> None:
        await self.transport.aclose()
        if self.engine is not None:
            await self.engine.aclose()


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything that a run is made of."""

    config: RunConfig
    renderer: Renderer
    student: Student
    student_endpoint: Endpoint
    teacher_endpoint: Endpoint
    policy: VllmPolicy
    teacher: HttpTeacher
    publisher: Publisher
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    tool_specs: Sequence[ToolSpec]
    max_context: int | None
    """Tokens that the student's server takes; None where only the server knows."""

    def make_env(self, *, verify: bool) -> ToolEnv:
        """A fresh environment; a grader is built only with `verify`."""
        return make_env(self.config, verify=verify)

    async def aclose(self) -> None:
        await self.policy.aclose()
        await self.teacher.aclose()
        await self.student_endpoint.aclose()
        await self.teacher_endpoint.aclose()


def make_env(config: RunConfig, *, verify: bool) -> ToolEnv:
    return envs.make(config.env, limits=config.rollout.limits(), skip_verification=not verify, **config.env_args)


def load_tasks(config: RunConfig) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks: from the files that the configuration names, else the environment's own.

    Raises:
        TaskError: a row that is not a task, with file and line.
        BuildError: a split without tasks.
    """
    env = make_env(config, verify=False)
    tasks = []
    for split, path, count in (
        ("train", config.tasks.train, config.tasks.num_train),
        ("eval", config.tasks.eval, config.tasks.num_eval),
    ):
        rows = read_tasks(path, limit=count) if path else list(env.default_tasks(split=split, num_tasks=count))
        if not rows and split == "train":
            raise BuildError(f"no tasks to train on: {path or f'environment {config.env!r} has none of its own'}")
        tasks.append(rows)
    return tasks[0], tasks[1]


def build(config: RunConfig, console: Console) -> Parts:
    """Load models, start engines, connect servers.

    Raises:
        BuildError, ConfigError, TaskError: what is wrong, before anything is trained.
    """
    torch.manual_seed(config.seed)
    transformers.utils.logging.disable_progress_bar()
    train_tasks, eval_tasks = load_tasks(config)
    student_path = models.resolve(config.student.model, progress=console.say)
    teacher_config = config.teacher
    teacher_path = models.resolve(teacher_config.model or config.student.model, progress=console.say)
    renderer = load_renderer(student_path, enable_thinking=config.student.enable_thinking)
    try:
        student = Student.load(student_path, config)
    except ValueError as error:
        raise BuildError(f"student: {error}") from error
    if config.loss.type == "full":
        if teacher_config.system_prompt is not None:
            raise BuildError(
                'loss.type: "full" scores the student\'s own inputs and cannot show the teacher teacher.system_prompt; '
                'take "sampled" or "topk"'
            )
        try:
            student.load_teacher(teacher_path)
        except ValueError as error:
            raise BuildError(f"teacher: {error}") from error
    student_endpoint = _student_endpoint(config, student, student_path, renderer)
    teacher_endpoint = _teacher_endpoint(config, teacher_path)
    env = make_env(config, verify=False)
    if student_endpoint.engine is None:
        raise BuildError(
            "student.base_url: this version publishes weights only to the embedded engine, so a run that trains needs "
            "student.base_url unset. To evaluate a model that a server serves: python -m agent_loop.rollout"
        )
    return Parts(
        config=config,
        renderer=renderer,
        student=student,
        student_endpoint=student_endpoint,
        teacher_endpoint=teacher_endpoint,
        policy=VllmPolicy(student_endpoint.transport, student_endpoint.model),
        teacher=HttpTeacher(
            teacher_endpoint.transport,
            teacher_endpoint.model,
            top_k=teacher_config.top_k if config.loss.type == "topk" else 0,
            max_tokens_in_flight=teacher_config.max_tokens_in_flight,
            timeout_s=teacher_config.timeout_s,
            renderer=renderer,
            system_prompt=teacher_config.system_prompt,
            tool_specs=env.tool_specs,
        ),
        publisher=EmbeddedPublisher(student_endpoint.engine),
        train_tasks=train_tasks,
        eval_tasks=eval_tasks,
        tool_specs=env.tool_specs,
        max_context=config.student.max_context or student_endpoint.engine.limits.max_model_len,
    )


def _student_endpoint(config: RunConfig, student: Student, path: str | Path, renderer: Renderer) -> Endpoint:
    if config.student.base_url is not None:
        transport = HttpTransport(config.student.base_url[0], api_key=_api_key(config.student.api_key_env))
        return Endpoint(transport=transport, model=str(config.student.model), path=path)
    engine = EmbeddedEngine(
        student.serving_copy(), renderer.tokenizer, name="student", max_model_len=config.student.max_context
    )
    return Endpoint(transport=AsgiTransport(engine.app), model="student", path=path, engine=engine)


def _teacher_endpoint(config: RunConfig, path: str | Path) -> Endpoint:
    teacher = config.teacher
    if teacher.base_url is not None:
        transport = HttpTransport(
            teacher.base_url[0], api_key=_api_key(teacher.api_key_env), retry_deadline_s=teacher.timeout_s
        )
        return Endpoint(transport=transport, model=config.teacher_model, path=path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = teacher.dtype if teacher.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    engine = EmbeddedEngine.from_pretrained(
        path, name="teacher", dtype=dtype, device=device, max_logprobs=max(20, teacher.top_k)
    )
    return Endpoint(transport=AsgiTransport(engine.app), model="teacher", path=path, engine=engine)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise BuildError(f"api_key_env: the environment variable {variable} is not set")
    return key


def metadata_of(parts: Parts) -> dict[str, Any]:
    """What `run.json` says of the parts: enough to know what was trained on what."""
    return {
        "student": str(parts.config.student.model),
        "teacher": str(parts.config.teacher.model or parts.config.student.model),
        "tokenizer": parts.renderer.fingerprint,
        "torch": torch.__version__,
        "num_train_tasks": len(parts.train_tasks),
        "num_eval_tasks": len(parts.eval_tasks),
    }
