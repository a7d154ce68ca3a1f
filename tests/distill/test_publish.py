"""Weights that reach servers over real HTTP, and servers that do not take them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from peft import PeftModel
from training_cases import run_config, tiny_model
from transformers import AutoModelForCausalLM

from agent_loop.transport import AsgiTransport, TransportError
from distill.config import LoraConfig
from distill.publish import Canary, DiskPublisher, EmbeddedPublisher, PublishError
from distill.publish_nccl import NcclPublisher
from distill.serving.embedded import EmbeddedEngine
from distill.serving.fleet import Fleet
from distill.student import Student
from tests.conformance.models import token_logprobs

CANARY = [3, 14, 15, 9, 26, 5, 35]
FULL = ["/pause", "reload_weights", "distill_repack_head", "/update_weight_version", "/resume"]


class WeightServer:
    """What a trainer sees of a vLLM server: it reads the folders that it is given, and scores by what it read.

    Attributes:
        calls: paths, or methods of `/collective_rpc`, in the order in which they came.
        folders: that it was told to read.
        broken: path or method -> status that it answers with instead of doing it.
        deaf: it says yes to new weights and keeps the old ones.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.folders: list[Path] = []
        self.broken: dict[str, int] = {}
        self.deaf = False
        self.version = ""
        self.models: dict[str, Any] = {"student": tiny_model()}
        self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def start(self) -> None:
        """Under the address that it had, if it ran before."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._names)
        app.router.add_post("/v1/completions", self._score)
        app.router.add_post("/{path:.*}", self._control)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _names(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _score(self, request: web.Request) -> web.Response:
        payload = await request.json()
        ids = payload["prompt"]
        if payload["model"] not in self.models:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        found = token_logprobs(self.models[payload["model"]], ids)
        rows = [None, *({str(i): {"logprob": p}} for i, p in zip(ids[1:], found, strict=True))]
        return web.json_response({"choices": [{"text": "", "prompt_logprobs": rows}]})

    async def _control(self, request: web.Request) -> web.Response:
        payload = await request.json()
        call = payload.get("method", request.path)
        self.calls.append(call)
        if call in self.broken:
            return web.json_response({"error": {"message": "I will not"}}, status=self.broken[call])
        match call:
            case "/pause":
                assert dict(request.query) == {"mode": "keep", "clear_cache": "true"}
            case "reload_weights":
                self.folders.append(Path(payload["kwargs"]["weights_path"]))
                if not self.deaf:
                    self.models["student"] = AutoModelForCausalLM.from_pretrained(self.folders[-1])
            case "/update_weight_version":
                self.version = payload["new_version"]
            case "/v1/load_lora_adapter":
                assert payload["lora_name"] not in self.models, "vLLM refuses a second adapter of the same name"
                self.folders.append(Path(payload["lora_path"]))
                base = copy.deepcopy(self.models["student"])
                self.models[payload["lora_name"]] = PeftModel.from_pretrained(base, str(self.folders[-1]))
                return web.Response(text="Success: LoRA adapter added")
            case "/v1/unload_lora_adapter":
                del self.models[payload["lora_name"]]
                return web.Response(text="Success: LoRA adapter removed")
        return web.json_response({})


@pytest.fixture
async def servers() -> AsyncIterator[list[WeightServer]]:
    """Two that run."""
    servers = [WeightServer(), WeightServer()]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()


Served = Callable[..., Awaitable[DiskPublisher]]


@pytest.fixture
async def fleets() -> AsyncIterator[list[Fleet]]:
    fleets: list[Fleet] = []
    yield fleets
    for fleet in fleets:
        await fleet.aclose()


@pytest.fixture
def served(fleets: list[Fleet], tmp_path: Path) -> Served:
    """A publisher to some servers."""

    async def served(*servers: WeightServer, lora: bool = False) -> DiskPublisher:
        fleet = Fleet.given("student", [server.base_url for server in servers], None, max_outage_s=30.0)
        fleets.append(fleet)
        await fleet.start()
        return DiskPublisher(fleet, tmp_path / "weights", "student", Canary(CANARY, 1e-3), lora=lora)

    return served


def make_student(*, lora: bool = False) -> Student:
    return Student(tiny_model(), run_config(lora=LoraConfig(rank=4, alpha=8.0) if lora else None))


def train(student: Student) -> None:
    """As a step would, but far enough for the canary to see it."""
    with torch.no_grad():
        for tensor in student.parameters.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)


async def test_each_version_has_a_folder_of_its_own(
    servers: list[WeightServer], served: Served, tmp_path: Path
) -> None:
    publisher, student = await served(*servers), make_student()
    for version in (0, 1):
        train(student)
        assert await publisher.publish(student, version) < 1e-4
    for server in servers:
        assert server.calls == FULL * 2
        assert server.version == "1"
        first, second = server.folders
        assert first != second
        assert not first.exists()
        assert (second / "config.json").exists()
    assert publisher.model == "student"
    await publisher.aclose()
    assert list((tmp_path / "weights").iterdir()) == []


async def test_a_server_with_old_weights_is_found_out(servers: list[WeightServer], served: Served) -> None:
    publisher, student = await served(*servers), make_student()
    servers[1].deaf = True
    train(student)
    with pytest.raises(PublishError, match=r"disagree by \d.* nats on a fixed sequence \(allowed: 0.001\)"):
        await publisher.publish(student, 1)


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("call", ["reload_weights", "distill_repack_head", "/update_weight_version"])
async def test_a_server_that_refuses_is_resumed(
    servers: list[WeightServer], served: Served, call: str, status: int
) -> None:
    publisher, student = await served(servers[0]), make_student()
    servers[0].broken[call] = status
    with pytest.raises(PublishError, match=f"answered {status}: I will not.*VLLM_SERVER_DEV_MODE"):
        await publisher.publish(student, 1)
    assert servers[0].calls[-1] == "/resume"


async def test_a_server_that_comes_back_gets_what_was_published_last(
    servers: list[WeightServer], served: Served, fleets: list[Fleet]
) -> None:
    publisher, student = await served(*servers), make_student()
    train(student)
    await publisher.publish(student, 1)
    await servers[1].stop()
    train(student)
    assert await publisher.publish(student, 2) < 1e-4, "one is left"
    published = token_logprobs(student.model, CANARY)
    train(student)  # the trainer is in the middle of the next step
    servers[1].models["student"] = tiny_model()  # started anew, from the folder of the untrained model
    await servers[1].start()
    lost = fleets[0].lost
    for _ in range(100):
        if fleets[0].replicas[1].up or lost.done():
            break
        await asyncio.sleep(0.1)
    assert not lost.done()
    assert fleets[0].replicas[1].up
    assert servers[1].version == "2"
    assert token_logprobs(servers[1].models["student"], CANARY) == pytest.approx(published, abs=1e-4)


async def test_a_server_that_is_gone_is_no_refusal(servers: list[WeightServer], served: Served) -> None:
    publisher, student = await served(servers[0]), make_student()
    await publisher.publish(student, 1)
    await servers[0].stop()
    replica = publisher._fleet.replicas[0]
    with pytest.raises(TransportError, match="cannot be reached"):  # the fleet waits for it
        await publisher.push_to(replica)


async def test_each_adapter_has_a_name_of_its_own(servers: list[WeightServer], served: Served, tmp_path: Path) -> None:
    publisher, student = await served(*servers, lora=True), make_student(lora=True)
    names = []
    for version in (11, 12):
        train(student)
        assert await publisher.publish(student, version) < 1e-4
        names.append(publisher.model)
        assert names[-1].endswith(f"-v{version:06}")
    for server in servers:
        assert list(server.models) == ["student", names[1]]
        assert [folder.exists() for folder in server.folders] == [False, True]
    base = token_logprobs(servers[0].models["student"], CANARY)
    assert base == pytest.approx(token_logprobs(tiny_model(), CANARY), abs=1e-6), "the base is as it was"
    assert max(abs(a - b) for a, b in zip(base, student.logprobs(CANARY)[1:], strict=True)) > 0.01  # type: ignore[operator]

    other, servers[0].calls[:] = await served(*servers, lora=True), []
    await other.publish(student, 12)
    assert len(servers[0].models) == 3, "two runs on one server keep out of each other's way"
    await other.push_to(other._fleet.replicas[0])
    assert servers[0].calls == ["/v1/load_lora_adapter"], "it was only out of reach: the adapter is still there"
    for one in (publisher, other):
        await one.aclose()
    assert [list(server.models) for server in servers] == [["student"]] * 2
    assert list((tmp_path / "weights").iterdir()) == []


async def test_older_adapters_stay_as_long_as_a_turn_may_end_on_them(
    servers: list[WeightServer], fleets: list[Fleet], tmp_path: Path
) -> None:
    fleet = Fleet.given("student", [servers[0].base_url], None, max_outage_s=30.0)
    fleets.append(fleet)
    await fleet.start()
    publisher = DiskPublisher(fleet, tmp_path / "weights", "student", Canary(CANARY, 1e-3), lora=True, num_older=1)
    student, names = make_student(lora=True), []
    for version in (1, 2, 3):
        train(student)
        await publisher.publish(student, version)
        names.append(publisher.model)
    assert list(servers[0].models) == ["student", names[1], names[2]]
    assert [folder.exists() for folder in servers[0].folders] == [False, True, True]
    for name in names[1:]:
        del servers[0].models[name]  # started anew
    await publisher.push_to(fleet.replicas[0])
    assert list(servers[0].models) == ["student", names[1], names[2]], "a turn that is sent again finds its adapter"
    await publisher.aclose()
    assert list(servers[0].models) == ["student"]
    assert list((tmp_path / "weights").iterdir()) == []


async def test_the_embedded_engine(tmp_path: Path) -> None:
    student = make_student()
    engine = EmbeddedEngine(student.serving_copy(), None, name="student")
    transport = AsgiTransport(engine.app)
    publisher = EmbeddedPublisher(engine, transport, Canary(CANARY, 1e-3))
    train(student)
    assert await publisher.publish(student, 1) < 1e-4
    canary = Canary(CANARY, 1e-3)
    train(student)
    await canary.measure(student)
    with pytest.raises(PublishError, match="disagree"):
        await canary.verify(transport, "student")
    await engine.aclose()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot be used without a GPU")
async def test_nccl_needs_a_gpu() -> None:
    fleet = Fleet.given("student", ["http://127.0.0.1:1/v1"], None, max_outage_s=1.0)
    with pytest.raises(PublishError, match='"nccl" needs the trainer on a GPU; take "disk"'):
        NcclPublisher(fleet, "student", Canary(CANARY, 1e-3))
    await fleet.aclose()
