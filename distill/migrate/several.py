"""Several data sets and teachers: prime-rl's environments with an algorithm each, verl's teachers by `data_source`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from distill.config_rules import OWN_NUMBERS
from distill.migrate.draft import Draft, Setting, integer, number, shown, text, texts
from distill.migrate.source import Entry

VERL = "distillation.teacher_models."
_INFERENCE = {
    "inference.tensor_model_parallel_size": ("server.tensor_parallel", integer),
    "inference.gpu_memory_utilization": ("server.memory", number),
    "inference.max_model_len": ("server.max_context", integer),
    "num_replicas": ("server.data_parallel", integer),
}


def table_name(name: str, taken: Sequence[str] = ()) -> str:
    """What a data set or a teacher of theirs is called here: letters, digits and `_`, once."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", name.rpartition("/")[2]).strip("_")[:50]
    if not plain[:1].isalpha() or OWN_NUMBERS.fullmatch(plain):
        plain = f"set_{plain}".rstrip("_")
    number = 1
    while (found := plain if number == 1 else f"{plain}_{number}") in taken:
        number += 1
    return found


def put(draft: Draft, key: str, value: Any, comment: str) -> None:
    """A setting whose row somebody else writes."""
    draft.settings[key] = Setting(value, comment)


# prime-rl


def environment_id(item: dict[str, Any]) -> str:
    """Of an entry of `orchestrator.train.env` (`id`), or of the newer `orchestrator.train.source`
    (`env.taskset.id`, `env.id`)."""
    env = item.get("env")
    taskset = env.get("taskset") if isinstance(env, dict) else None
    places = (item, taskset, env)
    return next((str(found["id"]) for found in places if isinstance(found, dict) and "id" in found), "?")


def environments(draft: Draft, entry: Entry, listed: Sequence[dict[str, Any]]) -> None:
    """A source for each environment: its share of a batch, and its own teacher where it has one."""
    names: list[str] = []
    shares = all("ratio" in item for item in listed)
    for place, item in enumerate(listed):
        name = table_name(str(item.get("name") or environment_id(item)), names)
        names.append(name)
        key = f"{entry.key}[{place}]"
        put(draft, f"sources.{name}", {}, key)
        words = [f"[sources.{name}]"]
        try:
            if shares:
                put(draft, f"sources.{name}.share", float(number(item["ratio"])), f"{key}.ratio")
                words.append(f"share {shown(item['ratio'])}")
            if (teacher := _teacher_of(draft, item, name, key)) is not None:
                words.append(teacher)
        except ValueError as error:
            draft.say(entry.origin, key, "impossible", str(error))
            continue
        draft.say(entry.origin, key, "mapped", ", ".join(words))
        odd = sorted(set(item) - {"id", "name", "ratio", "algo", "env"})
        if odd:
            draft.say(
                entry.origin, key, "impossible", f"{', '.join(odd)}: give the environment's as sources.{name}.env_args"
            )


def _teacher_of(draft: Draft, item: dict[str, Any], name: str, key: str) -> str | None:
    """
    Raises:
        ValueError: an algorithm without a teacher, or a teacher that cannot be read.
    """
    algo = item.get("algo")
    if algo is None:
        return None
    if not isinstance(algo, dict) or algo.get("type") != "opd":
        found = algo.get("type") if isinstance(algo, dict) else algo
        raise ValueError(
            f"algo {shown(found)} for one environment alone: every source here is distilled from its teacher"
        )
    draft.add("loss.teacher_tau", 1.0, f'{key}.algo.type = "opd"')
    draft.add("loss.adv_tau", 0.0, f'{key}.algo.type = "opd"')
    draft.add("skip_verification", True, f'{key}.algo.type = "opd" trains on no reward; false tracks them')
    teacher = algo.get("teacher")
    if not isinstance(teacher, dict):
        raise ValueError('algo "opd" without a table `teacher`: name one as sources.NAME.teacher')
    values: dict[str, Any] = {"model": text(teacher.get("name"))}
    for theirs, ours, value_of in (("base_url", "base_url", texts), ("api_key_var", "api_key_env", text)):
        if theirs in teacher:
            values[ours] = value_of(teacher[theirs])
    for ours, value in values.items():
        put(draft, f"teachers.{name}.{ours}", value, f"{key}.algo.teacher")
    put(draft, f"sources.{name}.teacher", name, f"{key}.algo.teacher")
    return f"teacher {shown(values['model'])} as [teachers.{name}]"


# verl


def teachers(draft: Draft) -> None:
    """`distillation.teacher_models.NAME`: one is the teacher; of several each has the rows whose `data_source` is its
    `key`."""
    found: dict[str, list[Entry]] = {}
    for key, entry in draft.entries.items():
        if key.startswith(VERL):
            found.setdefault(key.removeprefix(VERL).partition(".")[0], []).append(entry)
    if len(found) > 1 and "teacher_model" in found:
        for entry in found.pop("teacher_model"):
            draft.refuse(entry, "verl itself leaves out the teacher called teacher_model where there are others")
    routing = draft.entries.get("distillation.teacher_key")
    if routing is not None:
        draft.drop(routing, "a source's tasks are a file of their own" if len(found) > 1 else "there is one teacher")
    names: list[str] = []
    for theirs, entries in found.items():
        name = table_name(theirs, names)
        names.append(name)
        alone = len(found) == 1
        if not alone:
            put(draft, f"sources.{name}.teacher", name, f"{VERL}{theirs}")
        for entry in entries:
            try:
                _teacher_key(draft, entry, theirs, "teacher" if alone else f"teachers.{name}", name)
            except ValueError as error:
                draft.refuse(entry, str(error))


def _teacher_key(draft: Draft, entry: Entry, theirs: str, table: str, name: str) -> None:
    """
    Raises:
        ValueError: the value cannot be read.
    """
    last = entry.key.removeprefix(f"{VERL}{theirs}.")
    if last == "model_path":
        draft.map(entry, f"{table}.model", text(entry.value))
    elif last == "key" and table == "teacher":
        draft.drop(entry, "there is one teacher, for all rows")
    elif last == "key":
        draft.refuse(
            entry,
            f"rows are not sorted by data_source: write those of {shown(entry.value)} into a task file of their own "
            f"(docs/formats.md) and name it as sources.{name}.tasks",
        )
    elif last == "inference.name" and entry.value == "vllm":
        draft.map(entry, f"{table}.server", {}, f"a vLLM server that the run starts; its GPUs: {table}.server.gpus")
    elif last == "inference.name":
        draft.refuse(entry, f"teachers are served by vLLM or by the embedded engine: {table}.server, {table}.base_url")
    elif last in _INFERENCE:
        ours, value_of = _INFERENCE[last]
        draft.map(entry, f"{table}.{ours}", value_of(entry.value))
    else:
        draft.drop(entry, f"vLLM's own arguments: {table}.server.extra_args")
