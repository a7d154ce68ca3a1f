"""`--dry-run`: what a run would do, from the configuration and the tasks alone."""

from __future__ import annotations

import itertools

from distill.config import OneTeacherConfig, RunConfig, SourceConfig, StudentConfig
from distill.environment import make_env
from distill.ray_cluster import check_installed, players
from distill.teacher_context import read_examples
from envs.dataset import iter_tasks


def plan(config: RunConfig) -> str:
    """Validate the environment and the first tasks, and describe the run in words.

    Raises:
        RegistryError: an environment that is not there.
        TaskError: a row that is not a task.
        StoredError: stored episodes cannot be trained on.
        WorkersError: Ray is wanted and not installed.
    """
    if config.episodes is not None:
        return _plan_of_stored(config)
    check_installed(config)
    limits = config.rollout.limits()
    episodes = config.rollout.batch_size * config.rollout.group_size
    reward = "skipped" if config.skip_verification else "tracked"
    lines = [
        *(_source(config, name, source) for name, source in config.all_sources.items()),
        f"student       {config.student.model} on {served_by(config.student)}"
        + (f", LoRA rank {config.student.lora.rank}" if config.student.lora else ""),
        *(_teacher(config, name, teacher) for name, teacher in config.all_teachers.items()),
        f"each step     {config.rollout.batch_size} tasks x {config.rollout.group_size} = {episodes} episodes, "
        f"at most {limits.max_turns} turns of {limits.max_turn_tokens} tokens; rewards {reward}",
        f"played        by {players(config)}",
        f"loss          {config.loss.type}, teacher_tau {_tau(config)}, adv_tau {config.loss.adv_tau:g}",
        f"run           {config.steps} steps, lr {config.optim.lr:g}, a checkpoint every {config.checkpoint.every}",
    ]
    return "\n".join(lines)


def _source(config: RunConfig, name: str, source: SourceConfig) -> str:
    """One line: what is played."""
    env = make_env(config, name, verify=not config.skip_verification)
    for path in (source.tasks, source.eval_tasks):
        if path:
            list(itertools.islice(iter_tasks(path), 100))
    tools = f"{source.env}: {len(env.tool_specs)} tools ({', '.join(s.name for s in env.tool_specs) or 'none'})"
    if not name:
        return f"environment   {tools}"
    share = source.share / sum(other.share for other in config.sources.values())
    return f"source        {name}, {share:.0%} of the tasks: {tools}, teacher {source.teacher or '[teacher]'}"


def _teacher(config: RunConfig, name: str, teacher: OneTeacherConfig) -> str:
    """One line: who scores."""
    where = "the student's server" if teacher.on_student_server else served_by(teacher)
    own = ["a system prompt"] * (teacher.system_prompt is not None)
    if teacher.examples is not None:
        own.append(f"{sum(message['role'] == 'user' for message in read_examples(teacher.examples))} examples")
    context = f" with {' and '.join(own)} of its own" if own else ""
    return f"teacher       {f'{name}: ' if name else ''}{teacher.model or config.student.model} on {where}{context}"


def _tau(config: RunConfig) -> str:
    schedule = config.loss.teacher_tau_schedule
    to = f" to {schedule.end:g} over {schedule.over} steps ({schedule.shape})" if schedule is not None else ""
    return f"{config.loss.teacher_tau:g}{to}"


def _plan_of_stored(config: RunConfig) -> str:
    """A run on stored episodes; all of them are read.

    Raises:
        StoredError: they cannot be trained on.
    """
    from distill.stored import scan_for, summary

    count = config.rollout.batch_size * config.rollout.group_size
    lines = [
        f"episodes      {summary(scan_for(config))}",
        f"student       {config.student.model}"
        + (f", LoRA rank {config.student.lora.rank}" if config.student.lora else ""),
        f"each step     {count} of them, in an order of seed and epoch; nothing is played, asked or published",
        f"loss          {config.loss.type}, teacher_tau {_tau(config)}, rho {config.loss.rho:g}",
        f"run           {config.steps} steps, lr {config.optim.lr:g}, a checkpoint every {config.checkpoint.every}",
    ]
    return "\n".join(lines)


def served_by(section: StudentConfig | OneTeacherConfig) -> str:
    """Where a model is served, in words."""
    if section.server is not None:
        where = f"GPU {', '.join(map(str, section.server.gpus))}" if section.server.gpus else "this machine"
        return f"{section.server.data_parallel} vLLM server(s) of this run on {where}"
    return ", ".join(section.base_url) if section.base_url else "embedded engine"
