"""Full weights from the trainer's GPU to vLLM's, by vLLM's own trainer-side engine (vllm/distributed/weight_transfer,
0.32). Written from its source; it needs GPUs and has not been run yet.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Iterator
from typing import Any

import torch

from distill.publish import CONTROL_S, Canary, Control, PublishError
from distill.serving.fleet import Fleet, Replica
from distill.student import Student


class NcclPublisher:
    """A `Publisher` over one NCCL group for each server.

    Raises:
        PublishError: no GPU here, or no vLLM beside the trainer.
    """

    def __init__(self, fleet: Fleet, base_model: str, canary: Canary) -> None:
        if not torch.cuda.is_available():
            raise PublishError('student.weight_sync: "nccl" needs the trainer on a GPU; take "disk"')
        if importlib.util.find_spec("vllm") is None:
            raise PublishError(
                'student.weight_sync: "nccl" uses vLLM\'s own sender, so vLLM must be installed beside the trainer: '
                "pip install -e '.[vllm]', or take \"disk\""
            )
        self.model = base_model
        self._fleet = fleet
        self._canary = canary
        self._engines: dict[str, Any] = {}
        self._student: Student | None = None
        self._version = 0
        self._lock = asyncio.Lock()
        fleet.on_return = self.push_to

    async def publish(self, student: Student, version: int) -> float:
        async with self._lock:
            await self._canary.measure(student)
            self._student, self._version = student, version
        return max(await self._fleet.each(self._push))

    async def push_to(self, replica: Replica) -> None:
        """A server that came back gets what the trainer has now: the trainer is waiting for it."""
        async with self._lock:
            self._engines.pop(replica.name, None)
            await self._push(replica)

    async def aclose(self) -> None:
        for engine in self._engines.values():
            await asyncio.to_thread(engine.shutdown)

    async def _push(self, replica: Replica) -> float:
        assert self._student is not None
        control = Control(replica.transport)
        await control.post("/pause?mode=keep&clear_cache=true", {})
        try:
            if replica.name not in self._engines:
                self._engines[replica.name] = await self._open(replica, self._student)
            await asyncio.to_thread(self._engines[replica.name].send_weights)
            await control.post("/update_weight_version", {"new_version": str(self._version)})
        finally:
            await control.post("/resume", {})
        return await self._canary.verify(replica.transport, self.model)

    async def _open(self, replica: Replica, student: Student) -> Any:
        """The trainer is rank 0 of the group, the server's workers are the others."""
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        workers = (await replica.transport.get_json("/get_world_size", timeout_s=30.0))["world_size"]
        root = replica.base_url.removesuffix("/v1")
        info = NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=_free_port(), world_size=1 + workers)
        client = HTTPVLLMWeightSyncClient(root, timeout=CONTROL_S)
        return await asyncio.to_thread(
            NCCLTrainerWeightTransferEngine.trainer_init, info, client=client, source=_source(student)
        )


def _source(student: Student) -> Any:
    """The student's present weights, as vLLM's sender reads them: a fresh pass each round."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            weights = student.state_dict_for_serving()  # of several ranks: on the CPU
            return ((name, tensor.to(student.device)) for name, tensor in weights.items())

    return Weights()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
