"""Pre-flight: refuse to train wrong.

    python -m distill.check --env medbrowse [--json]

Each check asks one question of the real parts and answers with a `Finding`: what was found and how to mend it. The same
checks run by themselves at the start of every training run. Exit code 3 where one found an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from agent_loop.types import SamplingParams

if TYPE_CHECKING:
    from agent_loop.renderer import Renderer
    from distill.build import Endpoint, Parts

ROOT = Path(__file__).resolve().parent.parent

PROBE_TOKENS = 16
"""Sampled tokens that the numeric probes look at."""

PROPRIETARY_HOSTS = ("openai.com", "anthropic.com", "googleapis.com", "x.ai", "mistral.ai", "openrouter.ai")
"""APIs that sample but never score given tokens; matched by suffix of the host."""

OFF_POLICY_DEFAULTS = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Keys of a generation_config.json that vLLM takes as request defaults unless it was started with
`--generation-config vllm`, beside temperature, top_p and top_k, which every request of ours sets itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one check."""

    name: str
    level: Literal["ok", "warning", "error"]
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:7} {self.name}: {self.message}" + (f"\n        -> {self.remedy}" if self.remedy else "")


class CheckFailed(Exception):
    """At least one check found an error."""

    def __init__(self, errors: Sequence[Finding]) -> None:
        super().__init__("the checks before the first step failed; nothing was trained\n" + "\n".join(map(str, errors)))
        self.errors = list(errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One completion of the student's server, and what the three scorers say of it."""

    prompt_ids: list[int]
    token_ids: list[int]
    sampled: list[float]
    """[N] log-probabilities as the student's server reported them at sampling."""


async def check_parts(parts: Parts) -> list[Finding]:
    """Run every check that is not in `check.skip`. A check that cannot be made because a server does not answer is an
    error of its own, not a crash of the others."""
    findings: list[Finding] = []
    skip = set(parts.config.check.skip)

    async def run(name: str, question: Callable[[], Awaitable[list[Finding]]]) -> bool:
        if name in skip:
            findings.append(Finding(name=name, level="warning", message="skipped, as check.skip asks"))
            return True
        try:
            answers = await question()
        except Exception as error:
            answers = [Finding(name=name, level="error", message=f"{type(error).__name__}: {error}"[:500])]
        findings.extend(answers)
        return all(answer.level != "error" for answer in answers)

    await run("packages", lambda: done(packages()))
    await run("vocabulary", lambda: done(vocabulary(parts)))
    await run("template", lambda: done(template(parts.renderer, parts)))
    await run("generation_config", lambda: done(generation_config(parts)))
    await run("sampling", lambda: done(sampling(parts)))
    reachable = await run("student_server", lambda: server(parts, parts.student_endpoint, "student"))
    teacher_ok = await run("teacher_server", lambda: server(parts, parts.teacher_endpoint, "teacher"))
    if reachable:
        probe: list[Probe] = []
        if await run("student_sampling", lambda: student_sampling(parts, probe)) and probe:
            await run("self_score", lambda: self_score(parts, probe[0]))
            await run("mismatch", lambda: done(mismatch(parts, probe[0])))
            if teacher_ok:
                await run("teacher_scores", lambda: teacher_scores(parts, probe[0]))
    return findings


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
            Finding(
                name="packages",
                level="error",
                message="; ".join(wrong),
                remedy="run from the checkout, or uninstall the distribution that owns that folder (pip list, pip uninstall)",
            )
        ]
    return [Finding(name="packages", level="ok", message="all from this checkout")]


def vocabulary(parts: Parts) -> list[Finding]:
    """Do student and teacher mean the same by every id? One wrong id and the teacher scores another token."""
    from agent_loop.renderer import load_renderer

    name = "vocabulary"
    if parts.teacher_endpoint.path == parts.student_endpoint.path:
        return [Finding(name=name, level="ok", message="student and teacher have the same tokenizer files")]
    try:
        teacher = load_renderer(parts.teacher_endpoint.path)
    except Exception as error:
        return [
            Finding(
                name=name,
                level="error",
                message=f"the teacher's tokenizer cannot be loaded from {parts.teacher_endpoint.path}: {error}"[:500],
                remedy="set teacher.model to the folder or hub id of the model that the server serves; its tokenizer is compared id by id",
            )
        ]
    return compare_vocabularies(parts.renderer, teacher)


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
            Finding(
                name="vocabulary",
                level="error",
                message=f"{len(differing)} of {len(ours)} ids mean another token to the teacher ({shown})",
                remedy="choose a teacher of the student's family; log-probabilities of other tokens cannot be distilled",
            )
        )
    if set(student.stop_token_ids) - set(teacher.stop_token_ids) and not differing:
        findings.append(
            Finding(
                name="vocabulary",
                level="warning",
                message=f"the student ends a turn with ids {sorted(student.stop_token_ids)}, the teacher with {sorted(teacher.stop_token_ids)}",
                remedy="watch teacher_kl at the close token: a base model against a chat model teaches never to stop",
            )
        )
    return findings or [
        Finding(name="vocabulary", level="ok", message=f"{len(ours)} ids are the same, end-of-turn ids too")
    ]


def template(renderer: Renderer, parts: Parts) -> list[Finding]:
    """Does a tool call survive template and parser, and does the prompt only ever grow?"""
    findings = []
    for problem in renderer.self_test(parts.tool_specs):
        findings.append(
            Finding(
                name="template", level="error", message=problem, remedy="use a chat template that renders tool calls"
            )
        )
    if not renderer.is_prefix_preserving:
        findings.append(
            Finding(
                name="template",
                level="warning",
                message="the template rewrites earlier turns; such prompts open a new trace (rollout/extra_traces counts them)",
            )
        )
    return findings or [
        Finding(name="template", level="ok", message="a tool call survives template and parser; prompts only grow")
    ]


def generation_config(parts: Parts) -> list[Finding]:
    """Would the server draw from something else than the model's own distribution?"""
    name = "generation_config"
    file = Path(parts.student_endpoint.path) / "generation_config.json"
    if parts.student_endpoint.engine is not None or not file.is_file():
        return [Finding(name=name, level="ok", message="no server defaults apply")]
    values = json.loads(file.read_text())
    off = {k: values[k] for k, neutral in OFF_POLICY_DEFAULTS.items() if values.get(k, neutral) not in (None, neutral)}
    if off:
        return [
            Finding(
                name=name,
                level="error",
                message=f"{file.name} sets {off}, which vLLM takes as defaults: sampling would be off-policy",
                remedy="start the server with --generation-config vllm",
            )
        ]
    return [Finding(name=name, level="ok", message="its defaults are overridden by every request")]


def sampling(parts: Parts) -> list[Finding]:
    """Is the sampling distribution the one that the loss assumes?"""
    rollout = parts.config.rollout
    if rollout.top_p != 1.0 or rollout.top_k != 0:
        return [
            Finding(
                name="sampling",
                level="warning",
                message=f"top_p {rollout.top_p:g}, top_k {rollout.top_k}: tokens outside the kept set can never be sampled, the gradient is biased",
                remedy="rollout.top_p = 1.0 and rollout.top_k = 0",
            )
        ]
    if rollout.temperature != 1.0:
        return [
            Finding(
                name="sampling",
                level="warning",
                message=f"temperature {rollout.temperature:g}: states are visited by another policy than the one that is trained",
                remedy="rollout.temperature = 1.0; or serve with --logprobs-mode processed_logprobs and watch ratio",
            )
        ]
    return [Finding(name="sampling", level="ok", message="temperature 1, nothing cut off: on-policy")]


async def server(parts: Parts, endpoint: Endpoint, who: Literal["student", "teacher"]) -> list[Finding]:
    """Is the model there, and is its context long enough for the budgets?"""
    name = f"{who}_server"
    reply = await endpoint.transport.get_json("/v1/models", timeout_s=5.0)
    served = {entry["id"]: entry for entry in reply.get("data", [])}
    if endpoint.model not in served:
        return [
            Finding(
                name=name,
                level="error",
                message=f"the server does not serve {endpoint.model!r}; it serves {', '.join(map(repr, served)) or 'nothing'}",
                remedy=f"set {who}.model to a served name, or start the server with --served-model-name",
            )
        ]
    wanted = parts.config.rollout.max_episode_tokens
    has = served[endpoint.model].get("max_model_len")
    if has is None or wanted is None:
        return [Finding(name=name, level="ok", message=f"serves {endpoint.model!r}; its context length is not checked")]
    if who == "teacher" and parts.config.teacher.system_prompt:
        wanted += len(parts.renderer.tokenizer.encode(parts.config.teacher.system_prompt, add_special_tokens=False))
    if has < wanted + 1:  # a scoring request samples one token
        return [
            Finding(
                name=name,
                level="error",
                message=f"its context is {has} tokens, episodes may have {wanted}",
                remedy=f"serve the {who} with --max-model-len {wanted + 1} or more, or lower rollout.max_episode_tokens",
            )
        ]
    return [Finding(name=name, level="ok", message=f"serves {endpoint.model!r} with {has} tokens of context")]


async def student_sampling(parts: Parts, probe: list[Probe]) -> list[Finding]:
    """Does the student's server give ids and log-probabilities of what it sampled?"""
    messages = parts.renderer.clean(parts.train_tasks[0].messages)
    prompt = parts.renderer.render_prompt(messages, parts.tool_specs)
    completion = await parts.policy.sample(prompt, SamplingParams(max_tokens=PROBE_TOKENS, seed=parts.config.seed))
    probe.append(Probe(prompt_ids=prompt, token_ids=list(completion.token_ids), sampled=list(completion.logprobs)))
    return [Finding(name="student_sampling", level="ok", message="token ids and log-probabilities of sampled tokens")]


async def self_score(parts: Parts, probe: Probe) -> list[Finding]:
    """Does the student, asked as a teacher, agree with itself? KL of a model to itself must be about 0."""
    scored = await score(parts.student_endpoint, probe)
    worst = max(abs(a - b) for a, b in zip(probe.sampled, scored, strict=True))
    level: Literal["ok", "error"] = "ok" if worst <= parts.config.check.max_self_difference else "error"
    return [
        Finding(
            name="self_score",
            level=level,
            message=f"sampled and scored log-probabilities of the same tokens differ by at most {worst:.2g} nats",
            remedy=""
            if level == "ok"
            else "serve with --logprobs-mode processed_logprobs and temperature 1, and the same weights on every replica",
        )
    ]


def mismatch(parts: Parts, probe: Probe) -> list[Finding]:
    """Do trainer and server compute the same model?"""
    ids = [*probe.prompt_ids, *probe.token_ids]
    trained = parts.student.logprobs(ids)[len(probe.prompt_ids) :]
    gaps = [b - s for s, b in zip(trained, probe.sampled, strict=True) if s is not None]
    mean = abs(sum(gaps) / len(gaps))
    allowed = parts.config.check.max_mismatch_kl
    level: Literal["ok", "error"] = "ok" if mean <= allowed else "error"
    return [
        Finding(
            name="mismatch",
            level=level,
            message=f"trainer and student's server differ by {mean:.2g} nats a token (at most {max(map(abs, gaps)):.2g})",
            remedy=""
            if level == "ok"
            else "serve the same weights and dtype as student.model; about 1e-3 is healthy in bfloat16",
        )
    ]


async def teacher_scores(parts: Parts, probe: Probe) -> list[Finding]:
    """Does the teacher give log-probabilities of given tokens, the same each time, with K candidates if asked?"""
    from agent_loop.scoring import ScoringError

    name = "teacher_scores"
    top_k = parts.config.teacher.top_k if parts.config.loss.type == "topk" else 0
    try:
        runs = [await score(parts.teacher_endpoint, probe, top_k=top_k) for _ in range(3)]
    except ScoringError as error:
        host = urlsplit((parts.config.teacher.base_url or ("",))[0]).hostname or ""
        proprietary = any(host == h or host.endswith("." + h) for h in PROPRIETARY_HOSTS)
        return [
            Finding(
                name=name,
                level="error",
                message=f"the teacher gives no log-probabilities of given tokens: {error}",
                remedy="a proprietary API cannot be an on-policy teacher; collect its episodes and fine-tune on them (off-policy distillation)"
                if proprietary
                else "the teacher must be a server that answers prompt_logprobs, such as vLLM; for an API that only samples, "
                "collect its episodes and fine-tune on them (off-policy distillation)",
            )
        ]
    findings = []
    spread = max(max(values) - min(values) for values in zip(*runs, strict=True))
    if spread > parts.config.check.max_self_difference:
        findings.append(
            Finding(
                name=name,
                level="error",
                message=f"the same tokens scored three times differ by up to {spread:.2g} nats",
                remedy="replicas with other kernels or quantisation behind one address? Name one server, or raise check.max_self_difference",
            )
        )
    kl = sum(s - t for s, t in zip(probe.sampled, runs[0], strict=True)) / len(probe.sampled)
    if not math.isfinite(kl):
        findings.append(Finding(name=name, level="error", message=f"the teacher's scores are not finite: {kl}"))
    same = all(abs(s - t) < 1e-6 for s, t in zip(probe.sampled, runs[0], strict=True))
    if same and not parts.config.teacher.system_prompt:
        findings.append(
            Finding(
                name=name,
                level="warning",
                message="teacher and student give the same log-probabilities: there is nothing to learn",
                remedy="set teacher.model, teacher.base_url or teacher.system_prompt",
            )
        )
    ok = Finding(
        name=name,
        level="ok",
        message=f"scores of given tokens, the same three times; first sample's KL {kl:.3f} nats a token",
    )
    return findings or [ok]


async def score(endpoint: Endpoint, probe: Probe, *, top_k: int = 0) -> list[float]:
    """[N] log-probabilities of the probe's sampled tokens, by a served model."""
    from agent_loop.scoring import ScoringError, prompt_logprobs

    ids = [*probe.prompt_ids, *probe.token_ids]
    scores = await prompt_logprobs(endpoint.transport, endpoint.model, ids, top_k=top_k, timeout_s=120.0)
    values = scores.logprobs[len(probe.prompt_ids) :]
    if any(value is None for value in values):
        raise ScoringError("the reply has no number for some tokens", "protocol")
    return [value for value in values if value is not None]


def main(argv: list[str] | None = None) -> int:
    """The command: build the parts, ask every question, print the answers."""
    from distill.config_load import ConfigError, add_config_arguments, load_from_arguments
    from distill.console import Console, fail
    from distill.failures import EXIT_CHECK, EXIT_USAGE, guarded

    parser = argparse.ArgumentParser(prog="python -m distill.check", description=(__doc__ or "").split("\n\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments, rest = parser.parse_known_args(argv)
    console = Console(quiet=arguments.json)
    try:
        loaded = load_from_arguments(arguments, rest, console.say)
    except ConfigError as error:
        fail(str(error))
        return EXIT_USAGE
    findings: list[Finding] = []

    async def ask() -> None:
        from distill.build import build

        parts = build(loaded.config, console)
        try:
            await parts.publisher.publish(parts.student, version=0)
            findings.extend(await check_parts(parts))
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
    sys.exit(main())
