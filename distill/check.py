"""Pre-flight: refuse to train wrong.

    python -m distill.check --env medbrowse [--json]

Each check asks one question of the real parts and answers with a `Finding`: what was found and how to mend it. The same
checks run by themselves at the start of every training run. Exit code 3 where one found an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.check_servers import Probe, mismatch, self_score, server, student_sampling, teacher_scorer, teacher_scores
from distill.check_versions import installed, server_versions
from distill.check_vllm import (
    addresses,
    both_sides,
    exposure,
    logprobs_mode,
    lora_rank,
    max_logprobs,
    prefix_cache,
    server_config,
    weight_routes,
)
from distill.findings import CheckFailed, Finding, error, ok, warning
from distill.follow import leave

if TYPE_CHECKING:
    from agent_loop.renderer import Renderer
    from distill.build import Parts
    from distill.sources import Teacher

__all__ = ["CHECKS", "CheckFailed", "Finding", "check_parts", "main"]

ROOT = Path(__file__).resolve().parent.parent

CHECKS = (
    "packages",
    "installed",
    "vocabulary",
    "template",
    "sampling",
    "student_server",
    "teacher_server",
    "server_versions",
    "exposure",
    "weight_routes",
    "lora_rank",
    "generation_config",
    "prefix_cache",
    "logprobs_mode",
    "max_logprobs",
    "publish",
    "student_sampling",
    "self_score",
    "mismatch",
    "teacher_scores",
    "teacher_scorer",
)
"""All of them, in their order: the names that `check.skip` takes."""

OFF_POLICY_DEFAULTS = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Keys of a generation_config.json that vLLM takes as request defaults unless it was started with
`--generation-config vllm`, beside temperature, top_p and top_k, which every request of ours sets itself."""


async def check_parts(parts: Parts, publish: Callable[[], Awaitable[object]] | None = None) -> list[Finding]:
    """Run every check that is not in `check.skip`. A check that cannot be made because a server does not answer is an
    error of its own, not a crash of the others; what is not made is reported.

    Args:
        publish: gives the student's weights to its servers, once the checks that this needs have passed. None: they
            have them.
    """
    findings = [
        warning("check.skip", f"there is no check {name!r}", f"there are {', '.join(CHECKS)}")
        for name in parts.config.check.skip
        if name not in CHECKS
    ]
    probe: list[Probe] = []

    async def run(name: str, question: Callable[[], Awaitable[list[Finding]]], *, needs: str = "") -> bool:
        """Whether the check found no error, or was not wanted."""
        if name in parts.config.check.skip:
            findings.append(warning(name, "skipped, as check.skip asks"))
            return True
        if needs:
            findings.append(warning(name, f"not made: it needs {needs}"))
            return False
        answers = await asked(name, question)
        findings.extend(answers)
        return all(answer.level != "error" for answer in answers)

    async def asked(name: str, question: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
        try:
            return await question()
        except Exception as failure:
            return [error(name, f"{type(failure).__name__}: {failure}"[:500])]

    async def of_teachers(name: str, question: Callable[[Teacher], Awaitable[list[Finding]]]) -> list[Finding]:
        """The same question about each; of several, the answers say about whom."""
        answers = [(t, f) for t in parts.teachers.values() for f in await asked(name, partial(question, t))]
        several = len(parts.teachers) > 1
        return [replace(f, message=f"{t.key}: {f.message}") if several else f for t, f in answers]

    def failed(*names: str) -> str:
        """The first of these checks that found an error; empty where none did."""
        return next((f.name for f in findings if f.level == "error" and f.name in names), "")

    await run("packages", lambda: done(packages()))
    await run("installed", lambda: done(installed()))
    await run("vocabulary", lambda: of_teachers("vocabulary", lambda t: done(vocabulary(parts, t))))
    await run("template", lambda: done(template(parts.renderer, parts)))
    await run("sampling", lambda: done(sampling(parts)))
    await run("student_server", lambda: server(parts))
    await run("teacher_server", lambda: of_teachers("teacher_server", lambda t: server(parts, t)))
    gone = failed("student_server")
    if both_sides(parts):
        await run("server_versions", lambda: server_versions(parts), needs=gone or failed("teacher_server"))
        await run("exposure", lambda: exposure(parts), needs=gone or failed("teacher_server"))
    if parts.student_endpoint.engine is None:
        await run("weight_routes", lambda: weight_routes(parts), needs=gone)
        await run("lora_rank", lambda: lora_rank(parts), needs=gone)
        await run("generation_config", lambda: generation_config(parts), needs=gone)
        await run("prefix_cache", lambda: prefix_cache(parts), needs=gone)
        await run("logprobs_mode", lambda: logprobs_mode(parts), needs=gone)
    await run("max_logprobs", lambda: max_logprobs(parts), needs=gone or failed("teacher_server"))
    if publish is not None:
        unready = gone or failed("server_versions", "weight_routes", "lora_rank")
        await run("publish", lambda: published(publish), needs=unready)
    unready = gone or failed("publish", "weight_routes", "lora_rank")
    await run("student_sampling", lambda: student_sampling(parts, probe), needs=unready)
    sample = "" if probe else "student_sampling"
    await run("self_score", lambda: self_score(parts, probe[0]), needs=sample)
    await run("mismatch", lambda: done(mismatch(parts, probe[0])), needs=sample)
    unasked = failed("teacher_server", "max_logprobs") or sample
    scores = await run(
        "teacher_scores",
        lambda: of_teachers("teacher_scores", lambda t: teacher_scores(parts, t, probe[0])),
        needs=unasked,
    )
    if any(teacher.endpoint.engine is None for teacher in parts.teachers.values()):
        await run(
            "teacher_scorer",
            lambda: of_teachers("teacher_scorer", lambda t: teacher_scorer(parts, t, probe[0])),
            needs=sample if scores else "teacher_scores",
        )
    return findings


async def published(publish: Callable[[], Awaitable[object]]) -> list[Finding]:
    """Do the student's weights reach its servers?"""
    await publish()
    return [ok("publish", "the student's server has the trainer's weights")]


async def done(findings: list[Finding]) -> list[Finding]:
    return findings


def packages() -> list[Finding]:
    """Do `envs`, `tools` and `configs` come from this checkout? Other distributions own these names."""
    import importlib

    wrong = []
    for name in ("tools", "envs", "agent_loop", "configs"):
        module = importlib.import_module(name)
        origin = Path(module.__file__ or "").resolve()
        if ROOT not in origin.parents:
            wrong.append(f"{name} is imported from {origin.parent}")
    if wrong:
        return [
            error(
                "packages",
                "; ".join(wrong),
                "run from the checkout, or uninstall the distribution that owns that folder (pip list, pip uninstall)",
            )
        ]
    return [ok("packages", "all from this checkout")]


def vocabulary(parts: Parts, teacher: Teacher) -> list[Finding]:
    """Do student and teacher mean the same by every id? One wrong id and the teacher scores another token."""
    from agent_loop.renderer import load_renderer

    name = "vocabulary"
    path = teacher.endpoint.path
    if path == parts.student_endpoint.path:
        return [ok(name, "student and teacher have the same tokenizer files")]
    try:
        renderer = load_renderer(path)
    except Exception as failure:
        return [
            error(
                name,
                f"the teacher's tokenizer cannot be loaded from {path}: {failure}"[:500],
                f"set {teacher.key}.model to the folder or hub id of the model that the server serves; its tokenizer is compared id by id",
            )
        ]
    return compare_vocabularies(parts.renderer, renderer)


def compare_vocabularies(student: Renderer, teacher: Renderer) -> list[Finding]:
    """Id by id, added tokens and end-of-turn ids included. Ids that only the teacher has are harmless: the student
    cannot sample them."""
    ours, theirs = student.vocab(), teacher.vocab()
    by_id = {token_id: token for token, token_id in theirs.items()}
    differing = sorted(
        (token_id, token, by_id.get(token_id)) for token, token_id in ours.items() if by_id.get(token_id) != token
    )
    findings = []
    if differing:
        shown = ", ".join(f"{i}: student {s!r}, teacher {t!r}" for i, s, t in differing[:5])
        findings.append(
            error(
                "vocabulary",
                f"{len(differing)} of {len(ours)} ids mean another token to the teacher ({shown})",
                "choose a teacher of the student's family; log-probabilities of other tokens cannot be distilled",
            )
        )
    if set(student.stop_token_ids) - set(teacher.stop_token_ids) and not differing:
        findings.append(
            warning(
                "vocabulary",
                f"the student ends a turn with ids {sorted(student.stop_token_ids)}, the teacher with {sorted(teacher.stop_token_ids)}",
                "watch teacher_kl at the close token: a base model against a chat model teaches never to stop",
            )
        )
    return findings or [ok("vocabulary", f"{len(ours)} ids are the same, end-of-turn ids too")]


def template(renderer: Renderer, parts: Parts) -> list[Finding]:
    """Does a tool call survive template and parser, and does the prompt only ever grow?"""
    problems = [p for source in parts.sources.values() for p in renderer.self_test(source.tool_specs)]
    findings = [
        error("template", problem, "use a chat template that renders tool calls") for problem in dict.fromkeys(problems)
    ]
    if not renderer.is_prefix_preserving:
        findings.append(
            warning(
                "template",
                "the template rewrites earlier turns; such prompts open a new trace (rollout/extra_traces counts them)",
            )
        )
    return findings or [ok("template", "a tool call survives template and parser; prompts only grow")]


async def generation_config(parts: Parts) -> list[Finding]:
    """Would the server draw from something else than the model's own distribution?"""
    name = "generation_config"
    if parts.config.student.server is not None:
        return [ok(name, "the run starts its servers with --generation-config vllm")]
    off = off_policy_defaults(str(parts.student_endpoint.path), parts.config.student.revision)
    if not off:
        return [ok(name, "its defaults are overridden by every request")]
    for address in addresses(parts.student_endpoint, "student"):
        config = await server_config(address)
        if config is None or (config.get("model_config") or {}).get("generation_config") != "vllm":
            return [
                error(
                    name,
                    f"generation_config.json sets {off}, which vLLM takes as defaults: sampling would be off-policy",
                    "start the server with --generation-config vllm; if it was and does not tell (no dev mode): "
                    f'check.skip = ["{name}"]',
                )
            ]
    return [ok(name, "the server ignores it")]


def off_policy_defaults(model: str, revision: str | None) -> dict[str, float]:
    """What a model's generation_config.json changes in the distribution that tokens are drawn from."""
    from transformers.utils import cached_file

    file = cached_file(
        model,
        "generation_config.json",
        revision=None if Path(model).is_dir() else revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return {}
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    return {k: values[k] for k, neutral in OFF_POLICY_DEFAULTS.items() if values.get(k, neutral) not in (None, neutral)}


def sampling(parts: Parts) -> list[Finding]:
    """Is the sampling distribution the one that the loss assumes?"""
    rollout = parts.config.rollout
    if rollout.top_p != 1.0 or rollout.top_k != 0:
        return [
            warning(
                "sampling",
                f"top_p {rollout.top_p:g}, top_k {rollout.top_k}: tokens outside the kept set can never be sampled, the gradient is biased",
                "rollout.top_p = 1.0 and rollout.top_k = 0",
            )
        ]
    if rollout.temperature != 1.0:
        return [
            warning(
                "sampling",
                f"temperature {rollout.temperature:g}: states are visited by another policy than the one that is trained",
                "rollout.temperature = 1.0; or serve with --logprobs-mode processed_logprobs and watch ratio",
            )
        ]
    return [ok("sampling", "temperature 1, nothing cut off: on-policy")]


def main(argv: list[str] | None = None) -> int:
    """The command: build the parts, ask every question, print the answers."""
    from distill.config_load import ConfigError, add_config_arguments, load_from_arguments
    from distill.console import Console, fail
    from distill.failures import EXIT_CHECK, EXIT_USAGE, guarded
    from distill.follow import follow, is_follower

    parser = argparse.ArgumentParser(prog="python -m distill.check", description=(__doc__ or "").split("\n\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments, rest = parser.parse_known_args(argv)
    if is_follower():
        return follow()
    console = Console(quiet=arguments.json)
    try:
        loaded = load_from_arguments(arguments, rest, console.say)
    except ConfigError as problem:
        fail(str(problem))
        return EXIT_USAGE
    if loaded.config.episodes is not None:
        fail(
            "stored episodes are checked by distill.run before its first step; its --dry-run checks all but the vocabulary"
        )
        return EXIT_USAGE
    findings: list[Finding] = []

    async def ask() -> None:
        from distill.build import build

        with tempfile.TemporaryDirectory(prefix="distill-check-") as folder:
            parts = build(loaded.config, console, Path(folder))
            try:
                await parts.start(console)
                findings.extend(await check_parts(parts, lambda: parts.publish(0)))
            finally:
                await parts.aclose()

    code = guarded(lambda: asyncio.run(ask()))
    if arguments.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            print(finding)
    return code or (EXIT_CHECK if any(f.level == "error" for f in findings) else 0)


if __name__ == "__main__":
    leave(main())
