"""Checks that ask the servers: are the models there, do they sample and score as a run needs it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent_loop.transport import TransportError
from agent_loop.types import SamplingParams
from distill.check_vllm import ASK_S, Address, Who, addresses
from distill.findings import Finding, error, ok, warning

if TYPE_CHECKING:
    from agent_loop.scoring import ScoringError
    from distill.build import Parts
    from distill.sources import Teacher

PROBE_TOKENS = 16
"""Sampled tokens that the numeric probes look at."""

PROPRIETARY_HOSTS = ("openai.com", "anthropic.com", "googleapis.com", "x.ai", "mistral.ai", "openrouter.ai")
"""APIs that sample but never score given tokens; matched by suffix of the host."""


ALIKE = 1e-3
"""Nats. Two models that score each of the probe's tokens this much alike are taken for one."""


@dataclass(slots=True, kw_only=True)
class Probe:
    """One completion of the student's server."""

    prompt_ids: list[int]
    token_ids: list[int]
    sampled: list[float]
    """[N] log-probabilities as the student's server reported them at sampling."""
    scored: list[float] | None = None
    """[N] as it scores them when they are given: by the arithmetic that a teacher's scores are made by, while decoding
    rounds otherwise (in bfloat16 by up to half a nat)."""


async def server(parts: Parts, teacher: Teacher | None = None) -> list[Finding]:
    """Is the model there on every address, and is its context long enough for the budgets?

    Args:
        teacher: whose; None: the student's.
    """
    endpoint = parts.student_endpoint if teacher is None else teacher.endpoint
    who: Who = "student" if teacher is None else "teacher"
    return [await one_server(parts, address, endpoint.model, teacher) for address in addresses(endpoint, who)]


async def one_server(parts: Parts, address: Address, model: str, teacher: Teacher | None) -> Finding:
    who, table = ("student", "student") if teacher is None else ("teacher", teacher.key)
    name = f"{who}_server"
    try:
        reply = await address.transport.get_json("/v1/models", timeout_s=ASK_S)
    except TransportError as failure:
        remedy = f"start the {who}'s server, or correct {table}.base_url"
        if failure.status in (401, 403):
            remedy = f"put its key into an environment variable and name that in {table}.api_key_env"
        return error(name, str(failure)[:500], is_proprietary(teacher) or remedy)
    cards = reply.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        return error(
            name,
            "GET /v1/models lists no models: this is no OpenAI-compatible server",
            f"correct {table}.base_url; it ends in /v1",
        )
    served = {str(card.get("id")): card for card in cards}
    if model not in served:
        return error(
            name,
            f"{address.name} does not serve {model!r}; it serves {', '.join(map(repr, served)) or 'nothing'}",
            f"set {table}.model to a served name, or start the server with --served-model-name",
        )
    has = served[model].get("max_model_len")
    if type(has) is not int:
        return ok(name, f"{address.name} serves {model!r}; it does not say how long its context is")
    return context(parts, teacher, has) or ok(name, f"{address.name} serves {model!r} with {has} tokens of context")


def context(parts: Parts, teacher: Teacher | None, has: int) -> Finding | None:
    """What is wrong with a server's context of `has` tokens, if anything."""
    who, extra = ("student", 0) if teacher is None else ("teacher", teacher.extra_tokens)
    budget = parts.config.rollout.max_episode_tokens
    if budget is not None:
        wanted = budget + extra + 1  # a scoring request samples one token
        if has >= wanted:
            return None
        also = f", and the teacher's system prompt and examples {extra}" if extra else ""
        return error(
            f"{who}_server",
            f"its context is {has} tokens, episodes may have {budget}{also}",
            f"serve the {who} with --max-model-len {wanted} or more, or lower rollout.max_episode_tokens",
        )
    if teacher is not None and parts.max_context is not None and has < parts.max_context + extra:
        return warning(
            "teacher_server",
            f"its context is {has} tokens, the student's {parts.max_context}: longer episodes get no score",
            f"serve it with --max-model-len {parts.max_context + extra + 1}, or set rollout.max_episode_tokens",
        )
    return None


def is_proprietary(teacher: Teacher | None) -> str:
    """What to do instead, where the teacher is an API that only samples; empty where it is not known as one."""
    urls = teacher.config.base_url if teacher is not None else None
    host = urlsplit((urls or ("",))[0]).hostname or ""
    if not any(host == known or host.endswith("." + known) for known in PROPRIETARY_HOSTS):
        return ""
    return (
        f"{host} is a proprietary API: it samples, but gives no log-probabilities of given tokens, so it cannot be an "
        "on-policy teacher; collect its episodes and fine-tune on them (off-policy distillation)"
    )


async def student_sampling(parts: Parts, probe: list[Probe]) -> list[Finding]:
    """Does the student's server give ids and log-probabilities of what it sampled?"""
    source = parts.probe_source
    messages = parts.renderer.clean(source.train_tasks[0].messages)
    prompt = parts.renderer.render_prompt(messages, source.tool_specs)
    completion = await parts.policy.sample(prompt, SamplingParams(max_tokens=PROBE_TOKENS, seed=parts.config.seed))
    probe.append(Probe(prompt_ids=prompt, token_ids=list(completion.token_ids), sampled=list(completion.logprobs)))
    return [ok("student_sampling", "token ids and log-probabilities of sampled tokens")]


async def self_score(parts: Parts, probe: Probe) -> list[Finding]:
    """Does the student, asked as a teacher, agree with itself? KL of a model to itself must be about 0."""
    model = parts.student_endpoint.model
    worst = 0.0
    for address in addresses(parts.student_endpoint, "student"):
        probe.scored = await score(address, model, probe)
        worst = max([worst, *(abs(a - b) for a, b in zip(probe.sampled, probe.scored, strict=True))])
    found = f"sampled and scored log-probabilities of the same tokens differ by at most {worst:.2g} nats"
    if worst <= parts.config.check.max_self_difference:
        return [ok("self_score", found)]
    remedy = "--logprobs-mode processed_logprobs, and the same weights on every server"
    return [error("self_score", found, f"serve with {remedy}")]


def mismatch(parts: Parts, probe: Probe) -> list[Finding]:
    """Do trainer and server compute the same model?"""
    ids = [*probe.prompt_ids, *probe.token_ids]
    trained = parts.student.logprobs(ids)[len(probe.prompt_ids) :]
    gaps = [b - s for s, b in zip(trained, probe.sampled, strict=True) if s is not None]
    mean = abs(sum(gaps) / len(gaps))
    worst = max(map(abs, gaps))
    found = f"trainer and student's server differ by {mean:.2g} nats a token (at most {worst:.2g})"
    if mean <= parts.config.check.max_mismatch_kl:
        return [ok("mismatch", found)]
    return [error("mismatch", found, "serve the weights and dtype of student.model; about 1e-3 is healthy in bfloat16")]


async def teacher_scores(parts: Parts, teacher: Teacher, probe: Probe) -> list[Finding]:
    """Does the teacher give log-probabilities of given tokens, the same each time, with K candidates if asked?"""
    from agent_loop.scoring import ScoringError

    name = "teacher_scores"
    top_k = parts.config.teacher.top_k if parts.config.loss.type == "topk" else 0
    try:
        runs = [
            await score(address, teacher.endpoint.model, probe, top_k=top_k)
            for address in addresses(teacher.endpoint, "teacher")
            for _ in range(3)
        ]
    except ScoringError as failure:
        return [unscored(teacher, failure)]
    findings = []
    spread = max(max(values) - min(values) for values in zip(*runs, strict=True))
    if spread > parts.config.check.max_self_difference:
        findings.append(
            error(
                name,
                f"the same tokens scored three times a server differ by up to {spread:.2g} nats",
                "servers with other weights, kernels or quantisation? Name one, or raise check.max_self_difference",
            )
        )
    kl = sum(s - t for s, t in zip(probe.sampled, runs[0], strict=True)) / len(probe.sampled)
    if not math.isfinite(kl):
        findings.append(error(name, f"the teacher's scores are not finite: {kl}"))
    same = all(abs(s - t) < ALIKE for s, t in zip(probe.scored or probe.sampled, runs[0], strict=True))
    if same and not teacher.config.sees_more:
        findings.append(
            warning(
                name,
                "teacher and student give the same log-probabilities: there is nothing to learn",
                f"set {teacher.key}.model, {teacher.key}.base_url or {teacher.key}.system_prompt",
            )
        )
    good = ok(name, f"scores of given tokens, the same three times; first sample's KL {kl:.3f} nats a token")
    return findings or [good]


async def teacher_scorer(parts: Parts, teacher: Teacher, probe: Probe) -> list[Finding]:
    """Does the way in which a server scores fastest give the numbers of the plain way?"""
    from agent_loop.scorers import choose_scorer
    from agent_loop.scoring import ScoringError

    name, model, config = "teacher_scorer", teacher.endpoint.model, parts.config
    if teacher.endpoint.engine is not None:
        return []
    given = config.loss.type == "topk" and config.loss.candidates == "student"
    top_k = config.teacher.top_k if config.loss.type == "topk" else 0
    ids = [*probe.prompt_ids, *probe.token_ids]
    rows = range(len(probe.prompt_ids), len(ids))
    candidates = [list(range(top_k))] * len(rows) if given else None
    findings = []
    for address in addresses(teacher.endpoint, "teacher"):
        try:
            scorer = await choose_scorer(address.transport, model, top_k=top_k, given_ids=given)
            scores = await scorer.score(
                address.transport, model, ids, rows, top_k=0 if given else top_k, timeout_s=120.0, candidates=candidates
            )
        except ScoringError as failure:
            findings.append(error(name, f"{address.name}: {failure}"[:500], "see the log of the teacher's server"))
            continue
        plain = await score(address, model, probe)
        worst = max(abs((scores.logprobs[row] or 0.0) - p) for row, p in zip(rows, plain, strict=True))
        if worst > config.check.max_self_difference:
            findings.append(
                error(
                    name,
                    f"{address.name} gives other numbers by {scorer.name} scoring than by plain: {worst:.2g} nats",
                    "do not train with it; serve the teacher with a vLLM that was tested (docs/serving.md)",
                )
            )
        else:
            findings.append(ok(name, f"{address.name}: {scorer.name} scoring, the numbers of plain scoring"))
    return findings


def unscored(teacher: Teacher, failure: ScoringError) -> Finding:
    """Why there are no scores, in the user's words."""
    message = {
        "unavailable": "the teacher did not answer",
        "context_overflow": "the teacher's context is too short for a first turn",
        "not_finite": "the teacher's scores cannot be used",
    }.get(failure.kind, "the teacher gives no log-probabilities of given tokens")
    remedy = {
        "unavailable": "look into the log of the teacher's server",
        "context_overflow": "serve the teacher with a larger --max-model-len",
        "not_finite": "serve the teacher in bfloat16 or float32; NaN and -9999 come of broken weights or kernels",
    }.get(
        failure.kind,
        "the teacher must be a server that answers prompt_logprobs, such as vLLM; for an API that only samples, "
        "collect its episodes and fine-tune on them (off-policy distillation)",
    )
    return error("teacher_scores", f"{message}: {failure}"[:500], is_proprietary(teacher) or remedy)


async def score(address: Address, model: str, probe: Probe, *, top_k: int = 0) -> list[float]:
    """[N] log-probabilities of the probe's sampled tokens, by a served model."""
    from agent_loop.scoring import ScoringError, prompt_logprobs

    ids = [*probe.prompt_ids, *probe.token_ids]
    scores = await prompt_logprobs(address.transport, model, ids, top_k=top_k, timeout_s=120.0)
    fewest = min((len(row or ()) for row in (scores.topk or [])[len(probe.prompt_ids) :]), default=top_k)
    if fewest < top_k:
        raise ScoringError(f"of {top_k} candidates a token that were asked for, {fewest} came back", "protocol")
    values = scores.logprobs[len(probe.prompt_ids) :]
    if any(value is None for value in values):
        raise ScoringError("the reply has no number for some tokens", "protocol")
    return [value for value in values if value is not None]
