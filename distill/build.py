"""From a configuration to the parts of a run. Heavy imports live here, behind the parsed arguments."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from agent_loop.policy import VllmPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.transport import TransportError
from agent_loop.types import Episode
from distill import models
from distill.config import OneTeacherConfig, RunConfig
from distill.config_rules import teacher_key
from distill.console import Console
from distill.cost import Activity, gpus_of
from distill.endpoints import Endpoint, Place, publisher_for
from distill.metrics import Metrics
from distill.publish import Publisher
from distill.ranks import Ranks, join
from distill.ray_cluster import check_installed, players
from distill.ray_workers import RayWorkers
from distill.resume import TaskSet, as_records, examples_set, task_sets
from distill.serving.fleet import Fleet
from distill.serving.vllm import Machine
from distill.sources import Source, SourceError, Teacher, load_sources
from distill.student import Student
from distill.teacher import HttpTeacher
from distill.teacher_context import ContextError, TeacherContext, context_of, read_examples
from envs.types import Message, Task

T = TypeVar("T")

CANARY_TOKENS = 64
ROUTES = {"completions": "/v1/completions", "generate": "/inference/v1/generate"}


SMALL = 20_000_000
"""Parameters of a student whose products are too small to be worth dividing: on two cores the CPU default's step takes
1.6 s with one thread each for trainer, student's and teacher's engine, and 2.2 s with two (`python -m bench.step`)."""


class BuildError(Exception):
    """A part of the run cannot be made from the configuration; the message says which key and why."""


@dataclass(slots=True, kw_only=True)
class Core:
    """What every run has, whether it plays episodes or trains on stored ones."""

    config: RunConfig
    student: Student
    task_sets: Sequence[TaskSet] = ()
    """What the data were when they were read."""
    lost: list[asyncio.Future[None]] = field(default_factory=list)
    """Futures that get an exception when work must not be waited for any longer, beside those of the fleets."""
    trainer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "trainer"))
    """One thread for all steps: the C library keeps what a thread has freed for that thread, so that a training step in
    each thread of a pool holds its memory once for each of them."""

    async def train_step(self, episodes: Sequence[Episode], *, step: int) -> Metrics:
        """`Student.train_step` beside the event loop."""
        work = partial(self.student.train_step, episodes, step=step)
        return await asyncio.get_running_loop().run_in_executor(self.trainer, work)

    def metadata(self) -> dict[str, Any]:
        """What `run.json` says of the parts: enough to know what was trained on what."""
        return {
            "student": self.config.student.model,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.student.device.type,
            "ranks": self.student.ranks.size,
            "task_sets": as_records(self.task_sets),
        }


@dataclass(slots=True, kw_only=True)
class Parts(Core):
    """Everything that a run which plays its episodes is made of."""

    renderer: Renderer
    student_endpoint: Endpoint
    policy: VllmPolicy
    publisher: Publisher
    sources: Mapping[str, Source]
    """By name, in the order of the configuration; a run without `[sources]` has one, named ""."""
    teachers: Mapping[str, Teacher]
    """Those that a source has, by name; `[teacher]` is named ""."""
    canary: Sequence[int]
    """A fixed token sequence that server and trainer must agree on after each publication."""
    max_context: int | None
    """Tokens that the student's server takes; None where only the server knows."""
    slots: asyncio.Semaphore
    """`rollout.max_concurrent`, over the episodes of all steps and evaluations that are in play at once."""
    activity: Activity = field(default_factory=Activity)
    """Seconds in which rollouts and teacher were at work."""
    workers: RayWorkers | None = None
    """Where episodes are played; None: in this process."""

    @property
    def fleets(self) -> list[Fleet]:
        """The servers that may go away."""
        return [endpoint.fleet for endpoint in self.endpoints if endpoint.fleet is not None]

    @property
    def endpoints(self) -> list[Endpoint]:
        """Of student and teachers; those that share a transport, once."""
        found: dict[int, Endpoint] = {}
        for endpoint in (self.student_endpoint, *(teacher.endpoint for teacher in self.teachers.values())):
            found.setdefault(id(endpoint.transport), endpoint)
        return list(found.values())

    def teacher_of(self, task: Task) -> Teacher:
        """Who scores the episodes of a task."""
        return self.teachers[self.sources[task.source].teacher]

    @property
    def probe_source(self) -> Source:
        """Whose first task the checks and the canary take."""
        return next(source for source in self.sources.values() if source.train_tasks)

    def gpus(self) -> dict[str, int | None]:
        """GPUs by role, for the estimate of what a step costs."""
        on_gpu = self.student.device.type == "cuda"
        trainer = self.student.ranks.size if on_gpu else 0
        return gpus_of(self.config, machine_has_gpu=Machine.this().has_gpu, trainer_gpus=trainer)

    def metadata(self) -> dict[str, Any]:
        return Core.metadata(self) | {
            "teacher": ", ".join(t.config.model or self.config.student.model for t in self.teachers.values()),
            "tokenizer": self.renderer.fingerprint,
            "num_train_tasks": sum(len(source.train_tasks) for source in self.sources.values()),
            "num_eval_tasks": sum(len(source.eval_tasks) for source in self.sources.values()),
        }

    async def start(self, console: Console) -> None:
        """Start the workers and the servers, and find out how these are best asked.

        Raises:
            WorkersError: a worker cannot play the run's environment.
            LaunchError: a server did not start; with the end of its log.
            PolicyError: the student's does not answer.
        """
        if self.workers is not None:
            console.say(f"episodes are played by {players(self.config)}")
            await self.workers.start()
        for fleet in self.fleets:
            console.say(f"{fleet.name}: {fleet.plan()}")
        await asyncio.gather(*(fleet.start() for fleet in self.fleets))
        if self.max_context is None:
            self.max_context = await served_context(self.student_endpoint)
        api = await self.policy.probe()
        if self.fleets:
            console.say(f"servers are ready; rollouts by {ROUTES[api]}")

    async def publish(self, version: int) -> float:
        """Make the student's servers sample from its present weights; returns the canary's largest difference, nats."""
        difference = await self.publisher.publish(self.student, version)
        self.student_endpoint.model = self.policy.model = self.publisher.model
        self.policy.policy_version = version
        return difference

    async def forget(self) -> None:
        """Drop what an embedded student engine has cached, so that the next step does not depend on what was asked
        before it: a resumed run has other requests behind it than one that was never interrupted."""
        if self.student_endpoint.engine is not None:
            await self.student_endpoint.engine.forget()

    async def while_served(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` as long as its servers can be had.

        Raises:
            ServerLost: one stayed away for longer than `max_outage_s`; `work` is cancelled.
            Interrupted: the user wants the run to stop, and has waited long enough; `work` is cancelled.
        """
        task = asyncio.ensure_future(work)
        lost: list[asyncio.Future[None]] = [*self.lost, *(fleet.lost for fleet in self.fleets)]
        try:
            waiting: list[asyncio.Future[Any]] = [task, *lost]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for future in lost:
            if future.done() and (task.cancelled() or task.exception() is not None):
                future.result()  # an outage is the cause of whatever else failed
        return task.result()

    async def aclose(self) -> None:
        if self.workers is not None:
            await self.workers.aclose()
        await self.publisher.aclose()
        await self.policy.aclose()
        for teacher in self.teachers.values():
            await teacher.scorer.aclose()
        for endpoint in self.endpoints:
            await endpoint.aclose()
        await asyncio.to_thread(self.student.ranks.close)


def load_student(config: RunConfig, path: str | Path, teacher_path: str | Path, ranks: Ranks) -> Student:
    """The student, or one rank's part of it, with the teacher of `loss.type = "full"` beside it.

    Raises:
        BuildError: it is not what the configuration asks for.
    """
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    random.seed(config.seed)
    transformers.utils.logging.disable_progress_bar()
    if config.loss.type == "full" and config.teacher.sees_more:
        key = "system_prompt" if config.teacher.system_prompt is not None else "examples"
        raise BuildError(
            f'loss.type: "full" scores the student\'s own inputs and cannot show the teacher teacher.{key}; '
            'take "sampled" or "topk"'
        )
    try:
        student = Student.load(path, config, ranks)
    except ValueError as error:
        raise BuildError(f"student: {error}") from error
    if student.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        size = sum(parameter.numel() for parameter in student.model.parameters())
        if size <= SMALL:
            torch.set_num_threads(1)
    if config.loss.type == "full":
        try:
            student.load_teacher(teacher_path)
        except ValueError as error:
            raise BuildError(f"teacher: {error}") from error
    return student


def build(config: RunConfig, console: Console, folder: Path) -> Parts:
    """Load models and lay out the servers; `Parts.start` starts them.

    Args:
        folder: of the run: servers' logs and published weights go there.

    Raises:
        BuildError, ConfigError, TaskError, WorkersError: what is wrong, before anything is trained.
    """
    check_installed(config)
    try:
        sources = load_sources(config)
    except SourceError as error:
        raise BuildError(str(error)) from error
    examples = {
        name: () if teacher.examples is None else read_examples(teacher.examples)
        for name, teacher in config.all_teachers.items()
    }
    student_path = models.resolve(config.student.model, progress=console.say)
    teacher_paths = {
        name: models.resolve(teacher.model or config.student.model, progress=console.say)
        for name, teacher in config.all_teachers.items()
    }
    renderer = load_renderer(student_path, enable_thinking=config.student.enable_thinking)
    ranks = join()
    with ranks.call("build", config=config.model_dump(mode="json")):
        student = load_student(config, student_path, teacher_paths.get("", student_path), ranks)
    if ranks.size > 1:
        console.say(f"the student is split over {ranks.size} processes (FSDP2)")
    if student.padded_because is not None:
        console.say(f"micro-batches are padded, not packed: {student.padded_because}")
    place = Place(config=config, folder=folder, lora_modules=student.adapted_modules)
    student_endpoint = place.student(student, student_path, renderer)
    teachers = build_teachers(config, place, sources, teacher_paths, examples, renderer, student_endpoint)
    probe = next(source for source in sources.values() if source.train_tasks)
    messages = renderer.clean(probe.train_tasks[0].messages)
    canary = renderer.render_prompt(messages, probe.tool_specs)[:CANARY_TOKENS]
    return Parts(
        config=config,
        renderer=renderer,
        student=student,
        student_endpoint=student_endpoint,
        policy=VllmPolicy(student_endpoint.transport, student_endpoint.model),
        sources=sources,
        teachers=teachers,
        publisher=publisher_for(config, student_endpoint, folder, canary),
        canary=canary,
        task_sets=[
            *(found for source in sources.values() for found in task_sets(source)),
            *(
                examples_set(f"{teacher_key(name)}.examples", teacher.examples, examples[name])
                for name, teacher in config.all_teachers.items()
                if teacher.examples is not None
            ),
        ],
        workers=RayWorkers(config, student_path, renderer.fingerprint, logs=folder / "logs" / "ray")
        if config.rollout.executor == "ray"
        else None,
        max_context=config.student.max_context
        or (student_endpoint.engine.limits.max_model_len if student_endpoint.engine else None),
        slots=asyncio.Semaphore(config.rollout.max_concurrent),
    )


def build_teachers(
    config: RunConfig,
    place: Place,
    sources: Mapping[str, Source],
    paths: Mapping[str, str | Path],
    examples: Mapping[str, Sequence[Message]],
    renderer: Renderer,
    student: Endpoint,
) -> dict[str, Teacher]:
    """The teachers that the sources have, those that are served alike on one endpoint.

    Args:
        paths, examples: of each teacher, by its name.

    Raises:
        BuildError: a task lacks what its teacher's prompt wants to say of it.
        EndpointError: the environment variable of a key is not set.
    """
    contexts: dict[str, TeacherContext | None] = {}
    extra = dict.fromkeys(config.all_teachers, 0)
    for source in sources.values():
        contexts[source.name] = context = context_of(
            config.all_teachers[source.teacher], examples[source.teacher], renderer, source.tool_specs
        )
        if context is not None:
            try:
                extra[source.teacher] = max(extra[source.teacher], context.extra_tokens(source.train_tasks))
            except ContextError as error:
                raise BuildError(f"{teacher_key(source.teacher)}.prompt_fields: {error}") from error
    rooms: dict[OneTeacherConfig, int] = {}
    for name, teacher in config.all_teachers.items():
        where = config.place_of(teacher)
        rooms[where] = max(rooms.get(where, 0), extra[name])
    endpoints: dict[OneTeacherConfig, Endpoint] = {}
    teachers = {}
    for name, teacher in config.all_teachers.items():
        where = config.place_of(teacher)
        if where not in endpoints:
            endpoints[where] = place.teacher(name, paths[name], student, extra_tokens=rooms[where])
        teachers[name] = Teacher(
            name=name,
            config=teacher,
            endpoint=endpoints[where],
            scorer=HttpTeacher(
                endpoints[where].transport,
                endpoints[where].model,
                top_k=config.teacher.top_k if config.loss.type == "topk" else 0,
                candidates=config.loss.candidates,
                max_tokens_in_flight=teacher.max_tokens_in_flight,
                timeout_s=teacher.timeout_s,
                context_of=lambda task: contexts[task.source],
            ),
            extra_tokens=extra[name],
        )
    return teachers


async def served_context(endpoint: Endpoint) -> int | None:
    """Tokens of context that a server says its model has; None where it does not say: the checks ask why."""
    try:
        cards = (await endpoint.transport.get_json("/v1/models", timeout_s=30.0)).get("data", [])
    except TransportError as error:
        if error.kind == "unavailable":
            raise
        return None
    return next((card.get("max_model_len") for card in cards if card.get("max_model_len")), None)
