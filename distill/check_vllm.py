"""Checks of vLLM servers: were they started with what a run needs of them?

Each asks every address of an endpoint and has no side effect. What a server does not tell is reported as not known,
never as good. Facts about vLLM are those of 0.32.0; its source is named where it decides.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from agent_loop.transport import Transport, TransportError
from distill.findings import Finding, error, ok, warning

if TYPE_CHECKING:
    from distill.build import Parts
    from distill.endpoints import Endpoint

Who = Literal["student", "teacher"]

WEIGHT_ROUTES = ("/collective_rpc", "/pause", "/resume", "/weight_info")
"""What publishing full weights needs (vllm/entrypoints/rl/online and serve/dev/rpc)."""
LORA_ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
OLDEST_VLLM = "0.32"
"""First version whose weight routes, weight versions and scoring by ids are those that this code speaks."""
CACHE_PROMPT = 300
"""Tokens: more than two blocks of the CPU backend, which are of 128."""
SMALLEST_CACHE_PROMPT = 140
"""Below this no whole block may be there to be found again."""
ASK_S, COMPLETE_S = 5.0, 120.0
"""Seconds for a question about the server, and for a completion of one that may have to warm up."""


@dataclass(frozen=True, slots=True)
class Address:
    """One server of an endpoint."""

    name: str
    transport: Transport
    base_url: str
    """Empty where the server is in this process."""


def addresses(endpoint: Endpoint, who: Who) -> list[Address]:
    """All servers behind an endpoint: those of a fleet that are up, or the engine in this process."""
    if endpoint.fleet is None:
        return [Address(who, endpoint.transport, "")]
    return [Address(r.name, r.transport, r.base_url) for r in endpoint.fleet.replicas if r.up]


async def has_route(transport: Transport, path: str) -> bool:
    """A GET has no side effect: a route that only takes POST answers 405, one that is not there 404.

    Raises:
        TransportError: the server did not answer.
    """
    try:
        await transport.get_json(path, timeout_s=ASK_S)
    except TransportError as failure:
        if failure.kind == "unavailable":
            raise
        return failure.status != 404
    return True


async def weight_routes(parts: Parts) -> list[Finding]:
    """Can new weights be given to the student's servers?"""
    name, lora = "weight_routes", parts.config.student.lora is not None
    wanted = LORA_ROUTES if lora else WEIGHT_ROUTES
    variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if lora else "VLLM_SERVER_DEV_MODE"
    also = " and --enable-lora" if lora else ", reachable from this machine alone"
    findings = []
    for server in addresses(parts.student_endpoint, "student"):
        missing = [path for path in wanted if not await has_route(server.transport, path)]
        if missing:
            findings.append(
                error(
                    name,
                    f"{server.name} {server.base_url} has no {', '.join(missing)}: its weights cannot be changed",
                    f"start vLLM >= {OLDEST_VLLM} with {variable}=1 in its environment{also}, or let the run start "
                    "it with [student.server]",
                )
            )
    return findings or [ok(name, f"{', '.join(wanted)} are there")]


async def exposure(parts: Parts) -> list[Finding]:
    """Can others than this machine reach the routes that run methods in the server? vLLM asks for no key there: its
    --api-key guards /v1 and /inference alone (vllm/entrypoints/serve/middleware/authenticate.py)."""
    name = "exposure"
    findings = []
    for _, server in both_sides(parts):
        reached_by = await asyncio.to_thread(reach, server.base_url)
        if reached_by == "this machine" or not await has_route(server.transport, "/collective_rpc"):
            continue
        finding = error if reached_by == "the internet" else warning
        findings.append(
            finding(
                name,
                f"anybody on {reached_by} who reaches {server.base_url} can change {server.name}'s weights and run "
                "methods in it: /collective_rpc answers there and takes no API key",
                "start it with --host 127.0.0.1 and reach it through an SSH tunnel, or close its port to all but "
                "the trainer",
            )
        )
    return findings or [ok(name, "no route that changes a server is open to other machines")]


def reach(base_url: str) -> Literal["this machine", "its network", "the internet"]:
    """Who can send packets to a URL's host, going by its addresses; a name that is not known is nobody's."""
    host = urlsplit(base_url).hostname or ""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return "this machine"
    known = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if any(address.is_global for address in known):
        return "the internet"
    return "this machine" if all(address.is_loopback for address in known) else "its network"


def both_sides(parts: Parts) -> list[tuple[Who, Address]]:
    """Every vLLM server of the run, those that both sides use once, as the student's."""
    pairs: list[tuple[Who, Address]] = []
    for endpoint in parts.endpoints:
        who: Who = "student" if endpoint.transport is parts.student_endpoint.transport else "teacher"
        if endpoint.engine is None:
            pairs += [(who, server) for server in addresses(endpoint, who)]
    return pairs


async def max_logprobs(parts: Parts) -> list[Finding]:
    """Do the servers give as many candidates a token as the loss wants?"""
    name, top_k = "max_logprobs", parts.config.teacher.top_k
    if parts.config.loss.type != "topk":
        return [ok(name, "the loss wants no candidates")]
    given = parts.config.loss.candidates == "student"
    # Given candidates stand in one row with the sampled token, which may not be among them.
    asked: list[tuple[Endpoint, Who, str, int]] = []
    for teacher in parts.teachers.values():
        asked.append((teacher.endpoint, "teacher", "prompt_logprobs", top_k + given))
    if given:
        asked.append((parts.student_endpoint, "student", "logprobs", top_k + (parts.policy.api == "generate")))
    findings = []
    for endpoint, who, field, count in asked:
        for server in addresses(endpoint, who):
            try:
                await complete(server, endpoint.model, probe_ids(parts, 3), **{field: count})
            except TransportError as failure:
                remedy = f"start it with --max-logprobs {count} or more, or lower teacher.top_k"
                findings.append(error(name, f"{server.name} refuses {count} candidates: {failure}"[:500], remedy))
    return findings or [ok(name, f"{top_k} candidates a token")]


async def lora_rank(parts: Parts) -> list[Finding]:
    """Is there room for the student's adapter?"""
    name, lora = "lora_rank", parts.config.student.lora
    if lora is None:
        return [ok(name, "all weights are trained, no adapter")]
    findings = []
    unknown = 0
    for server in addresses(parts.student_endpoint, "student"):
        config = await server_config(server)
        if config is None:
            unknown += 1
            continue
        room = (config.get("lora_config") or {}).get("max_lora_rank", 0)
        if room < lora.rank:
            findings.append(
                error(
                    name,
                    f"{server.name} takes adapters of rank {room}, student.lora.rank is {lora.rank}"
                    if room
                    else f"{server.name} takes no adapters",
                    f"start it with --enable-lora --max-lora-rank {allowed_rank(lora.rank)}",
                )
            )
    if unknown and not findings:
        return [ok(name, "not known: the server has no /server_info; the first adapter will tell")]
    return findings or [ok(name, f"rank {lora.rank} fits")]


def allowed_rank(rank: int) -> int:
    """The smallest that vLLM's --max-lora-rank takes (vllm/config/lora.py)."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), 512)


async def server_config(server: Address) -> dict[str, Any] | None:
    """What the server was started with; None where it does not tell (/server_info is a route of the dev mode)."""
    try:
        reply = await server.transport.get_json("/server_info?config_format=json", timeout_s=60.0)
    except TransportError:
        return None
    config = reply.get("vllm_config")
    return config if isinstance(config, dict) else None


async def prefix_cache(parts: Parts) -> list[Finding]:
    """Does the student's server compute a turn's prompt anew each turn? The same prompt is sent twice."""
    name = "prefix_cache"
    findings = []
    for server in addresses(parts.student_endpoint, "student"):
        length = min(CACHE_PROMPT, (await context_of(server, parts.student_endpoint.model) or CACHE_PROMPT + 1) - 1)
        if length < SMALLEST_CACHE_PROMPT:
            findings.append(ok(name, f"not known: {server.name}'s context of {length + 1} tokens is too short to tell"))
            continue
        ids = probe_ids(parts, length)
        replies = [await complete(server, parts.student_endpoint.model, ids) for _ in range(2)]
        details = (replies[1].get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        if type(cached) is int and cached > 0:
            continue
        config = await server_config(server) if cached is None else None
        on = None if config is None else (config.get("cache_config") or {}).get("enable_prefix_caching")
        if cached == 0 or on is False:
            findings.append(
                warning(
                    name,
                    f"{server.name} found nothing of a prompt of {length} tokens that it had just computed: every "
                    "turn is paid for from its first token on",
                    "start it without --no-enable-prefix-caching",
                )
            )
        elif on is None:
            findings.append(
                ok(name, f"not known: {server.name} does not count cached tokens (--enable-prompt-tokens-details)")
            )
    return findings or [ok(name, "on")]


async def logprobs_mode(parts: Parts) -> list[Finding]:
    """Where the temperature is not 1: are the log-probabilities those of the distribution that was sampled from?

    Between two candidates of one position, scaled log-probabilities differ by 1/temperature of what they differ at
    temperature 1; raw ones (vLLM's default) by the same.
    """
    name, temperature = "logprobs_mode", parts.config.rollout.temperature
    if temperature == 1.0:
        return [ok(name, "temperature 1: raw and processed log-probabilities are the same")]
    findings = []
    for server in addresses(parts.student_endpoint, "student"):
        plain = await candidates(server, parts, 1.0)
        scaled = await candidates(server, parts, temperature)
        shared = sorted(set(plain) & set(scaled), key=lambda token: plain[token])
        gap = plain[shared[-1]] - plain[shared[0]] if shared else 0.0
        if gap * abs(1 - 1 / temperature) < 0.02:
            findings.append(ok(name, f"not known: {server.name}'s candidates are too alike to tell"))
            continue
        ratio = (scaled[shared[-1]] - scaled[shared[0]]) / gap
        if abs(ratio - 1 / temperature) > abs(ratio - 1):
            findings.append(
                error(
                    name,
                    f"{server.name} samples at temperature {temperature:g} and gives the log-probabilities of 1",
                    "start it with --logprobs-mode processed_logprobs",
                )
            )
    return findings or [ok(name, f"log-probabilities are those of temperature {temperature:g}")]


async def candidates(server: Address, parts: Parts, temperature: float) -> dict[str, float]:
    """Log-probabilities of the likeliest tokens after a fixed prompt, by their names."""
    ids = probe_ids(parts, 16)
    reply = await complete(server, parts.student_endpoint.model, ids, logprobs=5, temperature=temperature, seed=1)
    try:
        return {str(k): float(v) for k, v in reply["choices"][0]["logprobs"]["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransportError(f"{server.name} gives no candidates of a sampled token", "protocol") from None


async def complete(server: Address, model: str, ids: Sequence[int], **fields: Any) -> dict[str, Any]:
    """One sampled token after `ids`."""
    payload = {"model": model, "prompt": list(ids), "max_tokens": 1, "return_tokens_as_token_ids": True, **fields}
    return await server.transport.post_json("/v1/completions", payload, timeout_s=COMPLETE_S)


async def context_of(server: Address, model: str) -> int | None:
    """Tokens of context of a served model; None where the server does not tell."""
    reply = await server.transport.get_json("/v1/models", timeout_s=ASK_S)
    for card in reply.get("data") or ():
        if isinstance(card, dict) and card.get("id") == model and type(card.get("max_model_len")) is int:
            return int(card["max_model_len"])
    return None


def probe_ids(parts: Parts, length: int) -> list[int]:
    """The first task's prompt, repeated to `length` tokens."""
    source = parts.probe_source
    messages = parts.renderer.clean(source.train_tasks[0].messages)
    ids = parts.renderer.render_prompt(messages, source.tool_specs)
    return (ids * (length // len(ids) + 1))[:length]
