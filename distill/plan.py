"""`--dry-run`: what a run would do, from the configuration and the tasks alone."""

from __future__ import annotations

import itertools

import envs
from distill.config import RunConfig, StudentConfig, TeacherConfig
from distill.ray_cluster import check_installed, players
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
    env = envs.make(config.env, limits=limits, skip_verification=config.skip_verification, **config.env_args)
    for path in (config.tasks.train, config.tasks.eval):
        if path:
            list(itertools.islice(iter_tasks(path), 100))
    episodes = config.rollout.batch_size * config.rollout.group_size
    student, teacher = served_by(config.student), served_by(config.teacher)
    if config.teacher.on_student_server:
        teacher = "the student's server"
    context = " with a system prompt of its own" if config.teacher.system_prompt else ""
    reward = "skipped" if config.skip_verification else "tracked"
    names = ", ".join(spec.name for spec in env.tool_specs) or "none"
    lines = [
        f"environment   {config.env}: {len(env.tool_specs)} tools ({names})",
        f"student       {config.student.model} on {student}"
        + (f", LoRA rank {config.student.lora.rank}" if config.student.lora else ""),
        f"teacher       {config.teacher.model or config.student.model} on {teacher}{context}",
        f"each step     {config.rollout.batch_size} tasks x {config.rollout.group_size} = {episodes} episodes, "
        f"at most {limits.max_turns} turns of {limits.max_turn_tokens} tokens; rewards {reward}",
        f"played        by {players(config)}",
        f"loss          {config.loss.type}, teacher_tau {config.loss.teacher_tau:g}, adv_tau {config.loss.adv_tau:g}",
        f"run           {config.steps} steps, lr {config.optim.lr:g}, a checkpoint every {config.checkpoint.every}",
    ]
    return "\n".join(lines)


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
        f"loss          {config.loss.type}, teacher_tau {config.loss.teacher_tau:g}, rho {config.loss.rho:g}",
        f"run           {config.steps} steps, lr {config.optim.lr:g}, a checkpoint every {config.checkpoint.every}",
    ]
    return "\n".join(lines)


def served_by(section: StudentConfig | TeacherConfig) -> str:
    """Where a model is served, in words."""
    if section.server is not None:
        where = f"GPU {', '.join(map(str, section.server.gpus))}" if section.server.gpus else "this machine"
        return f"{section.server.data_parallel} vLLM server(s) of this run on {where}"
    return ", ".join(section.base_url) if section.base_url else "embedded engine"
