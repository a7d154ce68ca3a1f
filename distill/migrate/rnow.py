"""ReinforceNow: `config.yml`, and `train.jsonl`, `tools.py` and `rewards.py` beside it."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

from distill.config_files import shown as shown_path
from distill.migrate.draft import (
    Draft,
    Rule,
    apply,
    drop,
    integer,
    later,
    number,
    one_of,
    only,
    refuse,
    shown,
    text,
    to,
)
from distill.migrate.source import Entry

NAME = "rnow"
CHARS_A_TOKEN = 4
"""About, in English text; tool results are cut by characters here and by tokens there."""
MAX_BAD_ROWS = 5
"""Bad rows of a task file that the report names."""

_HOSTED = "belongs to the hosted service"


def _thinking(value: Any) -> bool:
    return one_of(disabled=False, low=True, medium=True, high=True)(value) is True


def _model(draft: Draft, entry: Entry) -> None:
    name = text(entry.value)
    if len(name) == 36 and name.count("-") == 4:
        draft.refuse(entry, "a model on ReinforceNow's servers; download it, and name its folder with --student")
    else:
        draft.map(entry, "student.model", name)


RULES: dict[str, Rule] = {
    "dataset_type": later,
    "project_id": drop(_HOSTED),
    "project_name": drop(_HOSTED),
    "description": drop(_HOSTED),
    "organization_id": drop(_HOSTED),
    "data.train_file": later,
    "data.batch_size": to("rollout.batch_size", integer, "tasks a step"),
    "data.group_size": to("rollout.group_size", integer, "episodes of each task"),
    "data.val_split": refuse("no rows are held out by themselves; move some to eval.jsonl in the folder"),
    "model.path": _model,
    "model.qlora_rank": to("student.lora.rank", integer),
    "model.qlora_alpha": to("student.lora.alpha", number),
    "model.name": drop("a run is named by --run-id"),
    "model.description": drop(_HOSTED),
    "teacher.path": to("teacher.model", text),
    "teacher.agentic": drop("whether there are turns follows from the environment's tools"),
    "algorithm.loss_fn": later,
    "algorithm.adv_estimator": later,
    "algorithm.kl_penalty_coef": to("loss.teacher_tau", number),
    "algorithm.kl_discount_factor": only(0, "0 is how it is here", "no such setting: a token bears its own KL alone"),
    "rollout.max_turns": to("rollout.max_turns", integer),
    "rollout.max_tokens": to("rollout.max_turn_tokens", integer, "a turn"),
    "rollout.max_context_window": to("rollout.max_episode_tokens", integer, "an episode"),
    "rollout.termination_policy": to(
        "rollout.termination_policy", one_of(last_tool="last_tool", max_turns="max_turns"), "the same names"
    ),
    "rollout.reasoning_mode": to("student.enable_thinking", _thinking, "on or off; there are no degrees"),
    "rollout.temperature": to("rollout.temperature", number),
    "rollout.mcp_url": refuse("no MCP servers; write the tools in tools.py"),
    "rollout.tool_timeout": refuse("it is a tool's own: @tool(timeout_s=...) in tools.py, 60 s by default"),
    "rollout.max_tool_response": to(
        "rollout.max_tool_output_chars",
        lambda value: CHARS_A_TOKEN * integer(value),
        f"characters, {CHARS_A_TOKEN} a token",
    ),
    "rollout.include_thinking": drop("graders see the messages with their reasoning_content"),
    "rollout.rollout_timeout": to("rollout.timeout_s", number),
    "trainer.num_epochs": later,
    "trainer.learning_rate": to("optim.lr", number),
    "trainer.save_step": later,
    "trainer.max_billing": drop(_HOSTED),
    "evals": refuse("held-out tasks: eval.jsonl in the folder, and [eval] every"),
}


def convert(draft: Draft, folder: Path | None) -> None:
    """All keys to settings and rows.

    Args:
        folder: where the file lies; None for standard input: nothing is beside it.
    """
    apply(draft, RULES)
    _kind(draft)
    train_file = _folder(draft, folder)
    _steps(draft, train_file)
    draft.add("loss.teacher_tau", 1.0, "rnow's coefficient where none is given")
    draft.add("loss.adv_tau", 0.0, "dataset_type: distill never trains on rewards")
    draft.add("rollout.group_size", 4, "rnow's default")
    draft.add("rollout.max_turns", 1, "rnow's default")
    draft.add("optim.lr", 1e-4, "rnow's default learning_rate")
    rank = draft.value("student.lora.rank")
    draft.add("student.lora.rank", 32, "rnow's default qlora_rank")
    draft.add("student.lora.alpha", float(2 * (rank or 32)), "rnow's default qlora_alpha: twice the rank")
    draft.add("student.lora.quantization", "nf4", "QLoRA: 4-bit weights under the adapters, on a GPU")
    draft.add("student.server.gpus", [0], "rnow is hosted; here the trainer and the student's vLLM server share a GPU")
    draft.add("student.server.memory", 0.4, "room for the trainer beside it")
    draft.add(
        "teacher.server.gpus", [1], "rnow is hosted; here a vLLM server serves the teacher; teacher.base_url: yours"
    )


def _kind(draft: Draft) -> None:
    kind = draft.entries.get("dataset_type")
    distils = kind is None or kind.value == "distill"
    for key in ("algorithm.loss_fn", "algorithm.adv_estimator"):
        entry = draft.entries.get(key)
        if entry is None:
            continue
        if key.endswith("adv_estimator"):
            draft.drop(entry, "rewards are never trained on in distill mode: loss.adv_tau is 0")
        elif entry.value == "importance_sampling":
            draft.map(entry, "loss.type", "sampled", "the ratio is capped at loss.rho")
        elif entry.value == "ppo":
            draft.map(entry, "loss.surrogate", "ppo", "on policy, with one update a batch, the clip cuts nothing")
        else:
            draft.refuse(entry, "there are ppo and importance_sampling")
    if kind is None:
        return
    if distils:
        draft.drop(kind, "distillation is what this does")
    elif kind.value == "rl":
        draft.refuse(
            kind, "no teacher stands in it; name one with teacher.model, or set loss.adv_tau and loss.teacher_tau"
        )
    elif kind.value == "sft":
        draft.refuse(kind, _supervised(draft))
    else:
        draft.refuse(kind, f"{shown(kind.value)} is no on-policy distillation; only `distill` is imported")


def _supervised(draft: Draft) -> str:
    """What does off-policy distillation here: commands with the values of the file."""
    words = ["--student", draft.value("student.model") or "MODEL"]
    for flag, value in (
        ("--batch-size", draft.value("rollout.batch_size")),
        ("--epochs", _number(draft, "trainer.num_epochs")),
        ("--lr", draft.value("optim.lr") or 1e-4),
        ("--student.lora.rank", draft.value("student.lora.rank")),
    ):
        words += [flag, str(value)] if value is not None else []
    return (
        "it is not a configuration here but two commands (docs/episodes.md). The teacher plays: python -m "
        "distill.collect --env ENV --model TEACHER --base-url URL --out collected. The student imitates: python -m "
        f"distill.sft --episodes collected {' '.join(words)} --out runs/sft. What is written is for on-policy steps "
        "after them"
    )


def _number(draft: Draft, key: str) -> int | None:
    entry = draft.entries.get(key)
    return entry.value if entry is not None and type(entry.value) is int else None


def _folder(draft: Draft, folder: Path | None) -> Path | None:
    """The environment is the folder, if it has tools or tasks. Gives the file of the tasks, if it is there."""
    entry = draft.entries.get("data.train_file")
    name = entry.value if entry is not None and isinstance(entry.value, str) else "train.jsonl"
    if folder is None:
        if entry is not None:
            draft.refuse(entry, "files beside standard input are not looked for; import the file by its name")
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        assert entry is not None
        draft.refuse(entry, "wanted a file in the folder of config.yml; give yours as tasks.train")
        entry, name = None, "train.jsonl"
    tasks = folder / name
    found = [file for file in ("tools.py", "train.jsonl") if (folder / file).is_file()]
    if found:
        draft.add("env", _as_env(folder), f"the folder of config.yml: {', '.join(found)}")
    if entry is not None:
        if not tasks.is_file():
            draft.refuse(
                entry, f"there is no {shown_path(tasks)}; without it give --env, and tasks.train for your tasks"
            )
        elif name == "train.jsonl":
            draft.drop(entry, "the folder's train.jsonl is read by itself")
        else:
            draft.map(entry, "tasks.train", shown_path(tasks))
    for source in ("tools.py", "rewards.py"):
        if (folder / source).is_file():
            _code(draft, folder / source)
    if (folder / "rewards.py").is_file():
        draft.add("skip_verification", False, "rewards are tracked in distill mode")
    if tasks.is_file():
        _rows(draft, tasks)
        return tasks
    return None


def _as_env(folder: Path) -> str:
    """A path that is taken for one: with ./ or from the root."""
    relative = shown_path(folder)
    return relative if Path(relative).is_absolute() else "." if relative == "." else f"./{relative}"


_IMPORTS = {
    "tools.py": "write `from tools.tool import Metadata, tool` in its place (docs/write_an_env.md)",
    "rewards.py": "write `from envs.rewards import RewardArgs, reward` in its place (docs/write_an_env.md)",
}


def _code(draft: Draft, file: Path) -> None:
    """What in rnow's tools.py or rewards.py does not run here. The file is parsed, not run."""
    place = shown_path(file)

    def refuse_line(line: int, words: str) -> None:
        draft.say(f"{place}:{line}", file.name, "impossible", words)

    try:
        tree = ast.parse(file.read_bytes(), filename=place)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        refuse_line(getattr(error, "lineno", None) or 1, f"cannot be parsed: {type(error).__name__}")
        return
    before = len(draft.rows)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rnow":
            gone = [name.name for name in node.names if name.name in ("get_response", "llm_judge")]
            also = f"; there is no {', '.join(gone)}: read messages[-1]" if gone else ""
            refuse_line(node.lineno, _IMPORTS[file.name] + also)
        elif isinstance(node, ast.Import) and any(name.name.partition(".")[0] == "rnow" for name in node.names):
            refuse_line(node.lineno, _IMPORTS[file.name])
        elif isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id == "ToolArgs":
            refuse_line(node.lineno, f"`{node.arg}: ToolArgs`: write `metadata: Metadata`, a dict of the task's")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tool", "reward"):
            for keyword in node.keywords:
                if keyword.arg == "sandbox":
                    refuse_line(keyword.lineno, "no sandbox: it runs in the run's own process")
                elif keyword.arg == "timeout":
                    refuse_line(keyword.lineno, "write timeout_s=" if file.name == "tools.py" else "no such setting")
    if len(draft.rows) == before:
        draft.say(place, file.name, "mapped", "read as it is: the folder is the environment")


def _rows(draft: Draft, tasks: Path) -> None:
    from envs.dataset import iter_tasks
    from envs.jsonl import TaskError

    bad: list[TaskError] = []
    try:
        count = sum(1 for _ in iter_tasks(tasks, on_bad_row=bad.append))
    except TaskError as error:
        draft.say(shown_path(tasks), tasks.name, "impossible", str(error))
        return
    for row in bad[:MAX_BAD_ROWS]:
        draft.say(str(row).partition(": ")[0], tasks.name, "impossible", row.message)
    more = f", {len(bad)} rows are bad" if bad else ""
    draft.say(shown_path(tasks), tasks.name, "mapped", f"{count} tasks{more}")


def _steps(draft: Draft, tasks: Path | None) -> None:
    """Epochs are steps once it is known how many tasks there are."""
    entry = draft.entries.get("trainer.num_epochs")
    batch = draft.value("rollout.batch_size")
    if entry is not None:
        try:
            epochs = integer(entry.value)
            count = _count(tasks) if tasks is not None else 0
            if not count or not batch:
                raise ValueError("steps = epochs x tasks / data.batch_size; the tasks are not at hand: set steps")
            steps = max(1, math.ceil(epochs * count / batch))
            draft.map(entry, "steps", steps, f"{epochs} epochs of {count} tasks, {batch} a step")
        except ValueError as error:
            draft.refuse(entry, str(error))
    save = draft.entries.get("trainer.save_step")
    if save is not None:
        if save.value == -1:
            draft.drop(save, "the last step is always saved")
        else:
            try:
                draft.map(save, "checkpoint.every", integer(save.value))
            except ValueError as error:
                draft.refuse(save, str(error))


def _count(tasks: Path) -> int:
    with tasks.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
