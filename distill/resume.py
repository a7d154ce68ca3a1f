"""`--resume`: where a run goes on, and whether it is still the same run. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import RunConfig
from distill.config_keys import general
from distill.config_load import Change, ConfigError, LoadedConfig, leaves, load_config
from envs.dataset import task_to_row
from envs.types import Message, Task

if TYPE_CHECKING:
    from distill.sources import Source

FREE_KEYS = (
    "steps",
    "output_dir",
    "max_outage_s",
    "cost",
    "checkpoint",
    "eval",
    "check",
    "tracking",
    "alarms",
    "rollout.max_concurrent",
    "rollout.executor",
    "rollout.ray",
    "student.base_url",
    "student.server",
    "student.weight_sync",
    "student.weights_dir",
    "student.api_key_env",
    "student.gradient_checkpointing",
    "teacher.base_url",
    "teacher.server",
    "teacher.api_key_env",
    "teacher.timeout_s",
    "teacher.max_tokens_in_flight",
    "teacher.max_dropped_fraction",
    "teachers.NAME.base_url",
    "teachers.NAME.server",
    "teachers.NAME.api_key_env",
    "teachers.NAME.timeout_s",
    "teachers.NAME.max_tokens_in_flight",
    "optim.micro_batch_tokens",
)
"""Keys and tables that a resumed run may change: they say where and how fast it runs, when it stops, what it saves and
measures, and not what is learnt from an episode (docs/reliability.md)."""


def point_of(path: Path) -> tuple[Path, Path | None]:
    """The run directory, and the one checkpoint if `--resume` names one (`RUN/checkpoints/step_000010`)."""
    if re.fullmatch(r"step_\d+", path.name) and path.parent.name == "checkpoints":
        return path.parent.parent, path
    return path, None


# The configuration


def load_resumed(
    resume: Path,
    paths: Sequence[str | Path],
    flags: Sequence[str],
    *,
    allowed: Collection[str],
    say: Callable[[str], None],
) -> LoadedConfig:
    """The configuration of an earlier attempt, with the files and flags of this one over it.

    Args:
        resume: a run directory, or a checkpoint in one.
        allowed: keys and tables that may change although they are not in `FREE_KEYS`.
        say: gets a line for each change.

    Raises:
        ConfigError: a file or a flag is wrong, or keys that may not change did: all of them, old -> new.
    """
    base = point_of(resume)[0] / "config.json"
    earlier = load_config([base])
    loaded = load_config([base, *paths], flags)
    changes = changes_between(earlier.config, loaded.config)
    refused = [change for change in changes if not _covered(change.key, (*FREE_KEYS, *allowed))]
    if refused:
        listed = [f"{loaded.provenance.get(c.key, base)}: {c}" for c in refused]
        keys = ",".join(c.key for c in refused)
        raise ConfigError(
            [
                *listed,
                f"a resumed run keeps its configuration. Start a new run, or let this pass with --allow-change {keys} "
                "(it is recorded in run.json)",
            ]
        )
    for change in changes:
        say(f"changed for the rest of the run: {change}")
    return LoadedConfig(config=loaded.config, provenance=loaded.provenance, changes=tuple(changes))


def changes_between(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every key that differs, in the order of the models."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = [*after, *(key for key in before if key not in after)]
    return [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _covered(key: str, by: Iterable[str]) -> bool:
    spellings = {key, ".".join(general(tuple(key.split("."))))}
    return any(spelt == name or spelt.startswith(f"{name}.") for name in by for spelt in spellings)


# The tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """What the tasks of one split are, so that another attempt can tell whether they still are."""

    key: str
    """Of the configuration: `tasks.train`, `tasks.eval`, `sources.NAME.tasks`, `sources.NAME.eval_tasks`, `episodes`,
    `teacher.examples` ..."""
    source: str
    """The file, or the environment whose own tasks they are."""
    num_tasks: int
    sha256: str
    """Of all tasks in their order."""
    sha256_sorted: str
    """Of the same tasks in the order of their hashes."""
    size: int | None = None
    """Of the file, in bytes; None where there is no file."""
    mtime_ns: int | None = None
    noun: str = "tasks"

    def difference(self, now: TaskSet) -> str | None:
        """What has become of these tasks, in words; None if they are the same in the same order."""
        if self.sha256 == now.sha256:
            return None
        if self.sha256_sorted == now.sha256_sorted:
            what = f"has the same {now.num_tasks} {now.noun} in another order"
        elif self.num_tasks != now.num_tasks:
            what = f"has {now.num_tasks} {now.noun}, it had {self.num_tasks}"
        else:
            what = f"has {now.num_tasks} {now.noun} as before, but other ones"
        size = f" ({self.size} -> {now.size} bytes)" if self.size != now.size else ""
        return f"{now.source} {what}{size}"

    def file_changed(self) -> bool:
        """Whether the file is not the one that was read: another size, another time, or gone."""
        if self.size is None:
            return False
        return (self.size, self.mtime_ns) != stat_of(Path(self.source))


def task_sets(source: Source) -> list[TaskSet]:
    """The identity of both splits of a source."""
    keys = (f"sources.{source.name}.tasks", f"sources.{source.name}.eval_tasks") if source.name else TASK_KEYS
    env = source.config.env or ""
    return [
        _task_set(keys[0], source.config.tasks, Path(env) / "train.jsonl", env, source.train_tasks),
        _task_set(keys[1], source.config.eval_tasks, Path(env) / "eval.jsonl", env, source.eval_tasks),
    ]


def examples_set(key: str, file: str, messages: Sequence[Message]) -> TaskSet:
    """The identity of what a teacher is shown.

    Args:
        key: of the configuration: `teacher.examples`, `teachers.NAME.examples`.
    """
    hashes = [hashlib.sha256(json.dumps(message, sort_keys=True).encode()).digest() for message in messages]
    return _set_of(key, str(Path(file).resolve()), hashes, Path(file), noun="messages")


TASK_KEYS = ("tasks.train", "tasks.eval")
"""Of a run without `[sources]`."""


def _task_set(key: str, file: str | None, own_file: Path, env: str, tasks: Sequence[Task]) -> TaskSet:
    path = Path(file) if file is not None else own_file if own_file.is_file() else None
    hashes = [hashlib.sha256(json.dumps(task_to_row(task), sort_keys=True).encode()).digest() for task in tasks]
    return _set_of(key, f"environment {env!r}" if path is None else str(path.resolve()), hashes, path, noun="tasks")


def _set_of(key: str, source: str, hashes: Sequence[bytes], path: Path | None, *, noun: str) -> TaskSet:
    size, mtime_ns = (None, None) if path is None else stat_of(path)
    return TaskSet(
        key=key,
        source=source,
        num_tasks=len(hashes),
        sha256=hashlib.sha256(b"".join(hashes)).hexdigest(),
        sha256_sorted=hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
        size=size,
        mtime_ns=mtime_ns,
        noun=noun,
    )


def stat_of(path: Path) -> tuple[int | None, int | None]:
    """Size in bytes and time of the last change in ns; None where it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None, None
    return found.st_size, found.st_mtime_ns


# Everything together


class DataChanged(Exception):
    """The tasks or the tokenizer of a resumed run are not those that it was started with."""


def compare(record: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Collection[str]) -> tuple[list[Change], str]:
    """What else is not as it was: the tasks, the tokenizer, the versions.

    Args:
        record: `run.json` of the earlier attempts.
        now: what this one would write there (`Core.metadata`).
        allowed: keys of the configuration whose contents may change.

    Returns:
        The changes that were allowed, and a note on differences that only cost the last bits ("" if there are none).

    Raises:
        DataChanged: tasks or tokenizer differ and nobody said that they may.
    """
    found = []
    before = {entry["key"]: TaskSet(**entry) for entry in record.get("task_sets", ())}
    for entry in now["task_sets"]:
        then = before.get(entry["key"])
        if then is not None and (text := then.difference(TaskSet(**entry))) is not None:
            found.append((Change(entry["key"], then.sha256, entry["sha256"]), text))
    if record.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        change = Change("student.model", record["tokenizer"], now["tokenizer"])
        found.append((change, "the tokenizer and chat template of student.model are not those of the run"))
    if refused := [(c, text) for c, text in found if not _covered(c.key, allowed)]:
        keys = ",".join(c.key for c, _ in refused)
        raise DataChanged(
            "\n".join(f"{c.key}: {text}" for c, text in refused)
            + "\na resumed run keeps its data. Put it back, start a new run, or let this pass with "
            f"--allow-change {keys} (it is recorded in run.json)"
        )
    other = [
        f"{name} {record[name]} -> {now[name]}"
        for name in ("torch", "transformers", "device", "ranks")
        if record.get(name, now[name]) != now[name]
    ]
    note = f"not bit for bit the run that it would have been: {', '.join(other)}" if other else ""
    return [change for change, _ in found], note


def as_records(sets: Iterable[TaskSet]) -> list[dict[str, Any]]:
    """Task sets as JSON values, for `run.json`."""
    return [asdict(entry) for entry in sets]
