"""Weights from the trainer to the student's servers, and the proof that they arrived.

After every publication a fixed token sequence, the canary, is scored by each server and by the trainer. If the two
disagree, the server samples from something that is not the student, and the run stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agent_loop.scoring import ScoringError, prompt_logprobs
from agent_loop.transport import Transport, TransportError
from distill.serving.embedded import EmbeddedEngine
from distill.serving.fleet import Fleet, Replica
from distill.student import Student

CONTROL_S = 600.0
"""For one control call: reading tens of gigabytes takes minutes."""
HEALTH_S = 30.0
"""For a question that needs no computation."""


class PublishError(Exception):
    """The student's server does not serve the weights that were sent to it."""


class Publisher(Protocol):
    model: str
    """The name under which the servers serve the student now."""

    async def publish(self, student: Student, version: int) -> float:
        """Make every server sample from the student's present weights, as `version`. Returns when every later request
        is answered by them.

        Returns:
            The canary's largest difference between server and trainer, in nats.

        Raises:
            PublishError: a server does not take the weights, or serves others.
        """
        ...

    async def aclose(self) -> None:
        """Remove what was published."""
        ...


class Canary:
    """A fixed token sequence and what the trainer says of it.

    Args:
        ids: at least two tokens.
        tolerance: largest difference of a log-probability that is still agreement, in nats. float32 against float32
            is below 1e-3; bfloat16 kernels differ by up to 0.5 on single tokens (docs/serving.md).
    """

    def __init__(self, ids: Sequence[int], tolerance: float) -> None:
        self._ids = list(ids)
        self._tolerance = tolerance
        self._expected: list[float | None] = []

    async def measure(self, student: Student) -> None:
        """Take the trainer's numbers, from the weights that are about to be published."""
        self._expected = await asyncio.to_thread(student.logprobs, self._ids)

    async def verify(self, transport: Transport, model: str) -> float:
        """Compare a server's numbers with the trainer's.

        Returns:
            The largest absolute difference, in nats.

        Raises:
            PublishError: if it is above the tolerance, or the server gives no score.
        """
        try:
            served = (await prompt_logprobs(transport, model, self._ids, top_k=0, timeout_s=CONTROL_S)).logprobs
        except ScoringError as error:
            if isinstance(error.__cause__, TransportError) and error.kind == "unavailable":
                raise error.__cause__ from None  # it is gone: whoever looks after it has to know that
            raise PublishError(f"the student's server did not score the canary after an update: {error}") from error
        pairs = zip(served[1:], self._expected[1:], strict=True)
        worst = max(abs(a - b) for a, b in pairs if a is not None and b is not None)
        if not worst <= self._tolerance:
            raise PublishError(
                f"after an update the student's server and the trainer disagree by {worst:.3g} nats on a fixed "
                f"sequence (allowed: {self._tolerance:g}). The server has other weights; nothing more is sampled there."
            )
        return worst


class EmbeddedPublisher:
    """Hands the weights to an engine in this process."""

    def __init__(self, engine: EmbeddedEngine, transport: Transport, canary: Canary, *, model: str = "student") -> None:
        self.model = model
        self._engine = engine
        self._transport = transport
        self._canary = canary

    async def publish(self, student: Student, version: int) -> float:
        await self._canary.measure(student)
        await self._engine.load_weights(student.state_dict_for_serving(), version)
        return await self._canary.verify(self._transport, self.model)

    async def aclose(self) -> None:
        """Nothing was written."""


class DiskPublisher:
    """Writes each version into a new folder, from which every vLLM server reads it: whole weights, or a LoRA adapter.

    Nothing is overwritten in place: a server may still read the folder of the version before (vLLM issue 32718).

    Args:
        fleet: the student's servers. A server that comes back gets the present version before it is used.
        folder: readable by the servers under the same path.
        base_model: the name under which the servers know the model that they were started with.
        lora: publish the adapter, under a new name each version, instead of the whole weights.
        num_older: adapters before the present one that stay loaded: turns that are being sampled end on theirs.
    """

    def __init__(
        self, fleet: Fleet, folder: Path, base_model: str, canary: Canary, *, lora: bool, num_older: int = 0
    ) -> None:
        self.model = base_model
        self._fleet = fleet
        self._folder = folder
        self._canary = canary
        self._lora = lora
        self._num_kept = 1 + (num_older if lora else 0)
        self._version = 0
        self._published: list[tuple[str, Path]] = []
        """Name and folder of what servers may be asked for, the present version last."""
        self._adapters = f"student-{uuid.uuid4().hex[:8]}-"  # a given server may still have those of an earlier run
        self._lock = asyncio.Lock()
        fleet.on_return = self.push_to

    async def publish(self, student: Student, version: int) -> float:
        async with self._lock:
            await self._canary.measure(student)
            path = self._folder / f"v{version:06}-{uuid.uuid4().hex[:8]}"
            await asyncio.to_thread(self._write, student, path)
            self._version = version
            if self._lora:
                self.model = f"{self._adapters}v{version:06}"
            published = [*self._published, (self.model, path)]
            old, self._published = published[: -self._num_kept], published[-self._num_kept :]
        try:
            differences = await self._fleet.each(self._push_or_leave)
        finally:
            await self._remove(old)
        found = [difference for difference in differences if difference is not None]
        # None: the server died meanwhile, and gets the version when it is back.
        return max(found) if found else max(await self._fleet.each(self._verify))

    async def push_to(self, replica: Replica) -> None:
        """Give a server that came back the present version, and verify it."""
        async with self._lock:
            if self._published:
                await self._push(replica)

    async def aclose(self) -> None:
        if self._lora:
            for replica in self._fleet.replicas:
                if replica.up and replica.launch is None:  # ours end with the run
                    with contextlib.suppress(PublishError, TransportError):
                        await self._unload(replica, keep=[])
        await self._remove(self._published)

    async def _remove(self, published: Sequence[tuple[str, Path]]) -> None:
        for _, path in published:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def _push_or_leave(self, replica: Replica) -> float | None:
        try:
            return await self._push(replica)
        except TransportError as error:
            if error.kind != "unavailable":
                raise PublishError(f"{replica.name} did not take version {self._version}: {error}") from error
            await self._fleet.doubt(replica, str(error))
            return None

    async def _verify(self, replica: Replica) -> float:
        return await self._canary.verify(replica.transport, self.model)

    async def _push(self, replica: Replica) -> float:
        control = Control(replica.transport)
        if self._lora:
            await self._load_adapter(replica)
        else:
            await reload_weights(control, str(self._published[-1][1]), self._version)
        return await self._canary.verify(replica.transport, self.model)

    async def _load_adapter(self, replica: Replica) -> None:
        """New name, new path; never `load_inplace`, which vLLM keeps and reads from disk at every step.

        Asks what is there: a server that was only out of reach still has its adapters, and refuses a second one of
        the same name; one that was started anew has none, and may be asked for an older one again.
        """
        served = await served_names(replica.transport)
        for name, path in self._published:
            if name not in served:
                adapter = {"lora_name": name, "lora_path": str(path)}
                await Control(replica.transport).post("/v1/load_lora_adapter", adapter)
        await self._unload(replica, keep=[name for name, _ in self._published])

    async def _unload(self, replica: Replica, *, keep: Sequence[str]) -> None:
        for name in await served_names(replica.transport):
            if name.startswith(self._adapters) and name not in keep:
                await Control(replica.transport).post("/v1/unload_lora_adapter", {"lora_name": name})

    def _write(self, student: Student, path: Path) -> None:
        """All or nothing: a folder is there under its name only when it is complete."""
        unfinished = path.with_name(f".{path.name}")
        unfinished.mkdir(parents=True)
        try:
            if self._lora:
                student.save_adapter(unfinished)
            else:
                student.save_weights(unfinished)
            unfinished.rename(path)
        except BaseException:  # a full disk is not made fuller
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


class Control:
    """Calls that control a vLLM server. Their replies are not always JSON objects: only the status counts."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def post(self, path: str, payload: Mapping[str, Any]) -> None:
        """
        Raises:
            TransportError: `unavailable` where the server is gone.
            PublishError: it refuses, or fails and lives: to start it again would not help.
        """
        try:
            await self._transport.post_json(path, payload, timeout_s=CONTROL_S)
        except TransportError as error:
            if error.kind == "protocol" and error.status == 200:  # load_lora_adapter answers in plain words
                return
            if error.kind == "unavailable" and not (error.status and await self._lives()):
                raise
            raise PublishError(
                f"the student's server refuses to be controlled: {error}. Full weights need VLLM_SERVER_DEV_MODE=1, "
                "LoRA needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora (docs/serving.md)"
            ) from error

    async def _lives(self) -> bool:
        """Its engine too: without it /health answers 503."""
        try:
            await self._transport.get_json("/health", timeout_s=HEALTH_S)
        except TransportError as error:
            return error.status == 200  # the body is empty
        return True


async def served_names(transport: Transport) -> list[str]:
    """Of the model and all adapters."""
    return [card["id"] for card in (await transport.get_json("/v1/models", timeout_s=HEALTH_S))["data"]]


async def reload_weights(control: Control, path: str, version: int) -> None:
    """Whole weights from a folder, as vLLM 0.32 takes them: running requests are kept, their cache is computed again
    under the new weights, and each of their tokens knows its version."""
    await control.post("/pause?mode=keep&clear_cache=true", {})
    try:
        await control.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        await control.post("/collective_rpc", {"method": "distill_repack_head"})
        await control.post("/update_weight_version", {"new_version": str(version)})
    finally:
        await control.post("/resume", {})
