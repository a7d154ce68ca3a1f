"""The sources of a run, each a data set with its environment and its teacher; a run without `[sources]` has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill.config import OneTeacherConfig, RunConfig, SourceConfig
from distill.config_rules import teacher_key
from distill.endpoints import Endpoint
from distill.environment import make_env
from distill.tasks import TaskMixture
from distill.teacher import HttpTeacher
from envs.dataset import read_tasks
from envs.types import Task
from tools.types import ToolSpec


class SourceError(Exception):
    """A source cannot be trained on; the message says which key and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is played."""

    name: str
    """Of `[sources.NAME]`; "" is that of a run without the table."""
    config: SourceConfig
    """Of `RunConfig.all_sources`."""
    train_tasks: Sequence[Task]
    """Empty where its share is 0. Of several sources, tasks say theirs (`Task.source`), and their ids begin with it."""
    eval_tasks: Sequence[Task]
    tool_specs: Sequence[ToolSpec]

    @property
    def teacher(self) -> str:
        """The name of its teacher in `Parts.teachers`."""
        return self.config.teacher or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Who scores."""

    name: str
    """Of `[teachers.NAME]`; "" is `[teacher]`."""
    config: OneTeacherConfig
    endpoint: Endpoint
    """May be another teacher's too, or the student's."""
    scorer: HttpTeacher
    extra_tokens: int = 0
    """Tokens that it reads in front of an episode more than the student, at most."""

    @property
    def key(self) -> str:
        """Its table in the configuration."""
        return teacher_key(self.name)


def load_sources(config: RunConfig) -> dict[str, Source]:
    """Training and held-out tasks of each source: from the files that the configuration names, else the environment's
    own.

    Raises:
        TaskError: a row that is not a task, with file and line.
        SourceError: no tasks to train on.
    """
    return {name: _load(config, name, source) for name, source in config.all_sources.items()}


def _load(config: RunConfig, name: str, source: SourceConfig) -> Source:
    env = make_env(config, name, verify=False)
    splits: dict[str, list[Task]] = {"train": [], "eval": []}
    for split, path, count in (
        ("train", source.tasks, config.tasks.num_train),
        ("eval", source.eval_tasks, config.tasks.num_eval),
    ):
        if split == "train" and not source.share:
            continue
        rows = read_tasks(path, limit=count) if path else list(env.default_tasks(split=split, num_tasks=count))
        if not rows and split == "train":
            whose = f"sources.{name}: " if name else ""
            raise SourceError(
                f"{whose}no tasks to train on: {path or f'environment {source.env!r} has none of its own'}"
            )
        splits[split] = [of_source(task, name) for task in rows]
    return Source(
        name=name,
        config=source,
        train_tasks=splits["train"],
        eval_tasks=splits["eval"],
        tool_specs=env.tool_specs,
    )


def of_source(task: Task, name: str) -> Task:
    """The task as one of a source's: two sources may have the same file, and ids are unique in a run."""
    return replace(task, id=f"{name}/{task.id}", source=name) if name else task


def mixture(sources: Mapping[str, Source], *, seed: int, cursor: int = 0) -> TaskMixture:
    """The order in which their tasks are trained on."""
    tasks = {name: source.train_tasks for name, source in sources.items()}
    shares = {name: source.config.share for name, source in sources.items()}
    return TaskMixture(tasks, shares, seed=seed, cursor=cursor)
