"""Where student and teacher are served: the embedded engine, servers of this run, or servers that are there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agent_loop.renderer import Renderer
from agent_loop.transport import AsgiTransport, Transport
from distill.config import RunConfig, ServerConfig
from distill.publish import Canary, DiskPublisher, EmbeddedPublisher, Publisher
from distill.serving.embedded import EmbeddedEngine
from distill.serving.fleet import Fleet
from distill.serving.vllm import Machine, check_installed, launches
from distill.student import Student

PROMPT_GLUE = 64
"""Tokens by which the template's frame around a longer prompt may differ between tasks."""


class EndpointError(Exception):
    """A model cannot be served as the configuration asks; the message says which key and why."""


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """One served model."""

    transport: Transport
    model: str
    """The name that the server knows it by now; the student's changes with each version where it is an adapter."""
    path: str | Path
    """Where its tokenizer and weights are: a folder or a hub id."""
    engine: EmbeddedEngine | None = None
    """Set where this process serves it."""
    fleet: Fleet | None = None
    """Set where servers do, ours or given ones; it is the transport then."""

    def away_s(self) -> float:
        """Seconds so far in which no server of it was up: no episode's time."""
        return self.fleet.away_s if self.fleet is not None else 0.0

    async def aclose(self) -> None:
        await self.transport.aclose()
        if self.engine is not None:
            await self.engine.aclose()


@dataclass(frozen=True, slots=True)
class Place:
    """Makes the endpoints of one run."""

    config: RunConfig
    folder: Path
    """Of the run; the servers' logs go to `logs/`."""
    lora_modules: Sequence[str] = ()
    """Names of the modules that the student's adapter is on."""

    def student(self, student: Student, path: str | Path, renderer: Renderer) -> Endpoint:
        """Where the student samples.

        Raises:
            EndpointError: the environment variable of its key is not set.
        """
        config = self.config.student
        if config.base_url is not None:
            fleet = Fleet.given(
                "student", config.base_url, api_key(config.api_key_env), max_outage_s=self.config.max_outage_s
            )
            return Endpoint(transport=fleet, model=str(config.model), path=path, fleet=fleet)
        if config.server is not None:
            return self._launched("student", path, config.server, config.server.max_context or config.max_context)
        engine = EmbeddedEngine(
            student.serving_copy(), renderer.tokenizer, name="student", max_model_len=config.max_context
        )
        return Endpoint(transport=AsgiTransport(engine.app), model="student", path=path, engine=engine)

    def teacher(self, name: str, path: str | Path, student: Endpoint, *, extra_tokens: int = 0) -> Endpoint:
        """Where a teacher scores.

        Args:
            name: of `[teachers.NAME]`, or "" for `[teacher]`.
            extra_tokens: that it reads in front of an episode, more than the student.

        Raises:
            EndpointError: the environment variable of its key is not set.
        """
        config = self.config.all_teachers[name]
        role = role_of(name)
        if config.on_student_server:
            return Endpoint(transport=student.transport, model=student.model, path=path, fleet=student.fleet)
        if config.base_url is not None:
            fleet = Fleet.given(
                role, config.base_url, api_key(config.api_key_env), max_outage_s=self.config.max_outage_s
            )
            return Endpoint(transport=fleet, model=config.model or self.config.student.model, path=path, fleet=fleet)
        if config.server is not None:
            room = config.server.max_context or self._longest_scored(extra_tokens)
            return self._launched(role, path, config.server, room)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
        engine = EmbeddedEngine.from_pretrained(
            path, name=role, dtype=dtype, device=device, max_logprobs=max(20, self.config.teacher.top_k)
        )
        return Endpoint(transport=AsgiTransport(engine.app), model=role, path=path, engine=engine)

    def _launched(self, role: str, path: str | Path, server: ServerConfig, room: int | None) -> Endpoint:
        check_installed(server)
        student, lora = self.config.student, self.config.student.lora
        copies = {"student": student.server.data_parallel if student.server is not None else 0}
        for name, teacher in self.config.places_of_teachers.items():
            copies[role_of(name)] = teacher.server.data_parallel if teacher.server is not None else 0
        before = itertools.takewhile(lambda item: item[0] != role, copies.items())
        is_student = role == "student"
        top_k = self.config.teacher.top_k
        fleet = Fleet.launched(
            role,
            launches(
                role,
                path,
                server,
                log_dir=self.folder / "logs",
                machine=Machine.this(),
                first_share=sum(count for _, count in before),
                num_shares=sum(copies.values()),
                max_model_len=room,
                max_logprobs=top_k + 1,  # given candidates, and the sampled token in the same row
                lora_rank=lora.rank if is_student and lora is not None else None,
                lora_modules=self.lora_modules if is_student else (),
                num_adapters=2 + self.config.rollout.max_staleness,  # the kept ones, and the next while it is loaded
                trainable=is_student and lora is None,
                nccl=is_student and student.weight_sync == "nccl",
            ),
            max_outage_s=self.config.max_outage_s,
            max_restarts=server.max_restarts,
        )
        return Endpoint(transport=fleet, model=role, path=path, fleet=fleet)

    def _longest_scored(self, extra_tokens: int) -> int | None:
        """Tokens of the longest scoring request, the one token that it has to sample included; None: not bounded."""
        longest = self.config.rollout.max_episode_tokens or self.config.student.max_context
        return None if longest is None else longest + extra_tokens + PROMPT_GLUE + 1


def role_of(name: str) -> str:
    """What a teacher's servers, their logs and its metrics are called."""
    return f"teacher_{name}" if name else "teacher"


def publisher_for(config: RunConfig, endpoint: Endpoint, folder: Path, canary: Sequence[int]) -> Publisher:
    """How trained weights reach the student's server."""
    check = Canary(canary, config.check.max_canary_difference)
    if endpoint.fleet is None:
        assert endpoint.engine is not None
        return EmbeddedPublisher(endpoint.engine, endpoint.transport, check, model=endpoint.model)
    if config.student.weight_sync == "nccl":
        from distill.publish_nccl import NcclPublisher

        return NcclPublisher(endpoint.fleet, endpoint.model, check)
    weights = Path(config.student.weights_dir or folder / "weights").resolve()
    lora, num_older = config.student.lora is not None, config.rollout.max_staleness
    return DiskPublisher(endpoint.fleet, weights, endpoint.model, check, lora=lora, num_older=num_older)


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable.

    Raises:
        EndpointError: it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise EndpointError(f"api_key_env: the environment variable {variable} is not set")
    return key
