"""Every check before training, on what it exists to find and on what it must let through."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent_loop.renderer import load_renderer
from agent_loop.transport import AsgiTransport, HttpTransport, Transport
from distill import check, check_servers, check_versions, check_vllm
from distill.build import Parts, build
from distill.check_servers import Probe
from distill.config import RunConfig
from distill.console import Console
from distill.endpoints import Endpoint
from distill.findings import Finding
from distill.serving.embedded import EmbeddedEngine
from distill.serving.fleet import Fleet
from distill.teacher_context import context_of, read_examples
from tests.fakes.fake_vllm import FakeVllm, InventedModel
from tests.runs.conftest import ROOT, TEMPLATE, TOOLS, save_model, save_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_model(path / "student", seed=1)
    save_model(path / "teacher", seed=2)
    save_tokenizer(path / "stranger", extra_tokens=("<|other|>",))
    return path


@pytest.fixture
async def parts(tmp_path: Path, models: Path) -> AsyncIterator[Parts]:
    """What a run is made of: two embedded engines, float32."""
    env = tmp_path / "adding"
    env.mkdir()
    (env / "tools.py").write_text(TOOLS)
    row = {"id": "t1", "messages": [{"role": "user", "content": "add the numbers 1 and 4"}], "metadata": {}}
    (env / "train.jsonl").write_text(json.dumps(row) + "\n")
    config = RunConfig.model_validate(
        {
            "env": str(env),
            "rollout": {"max_turn_tokens": 12},
            "student": {"model": str(models / "student"), "dtype": "float32"},
            "teacher": {"model": str(models / "teacher"), "dtype": "float32"},
        }
    )
    parts = build(config, Console(quiet=True), tmp_path / "run")
    await parts.publish(0)
    yield parts
    await parts.aclose()


def having(parts: Parts, **changes: Any) -> Parts:
    """The same parts under another configuration: `having(parts, rollout__temperature=0.5)`."""
    values = parts.config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    config = RunConfig.model_validate(values)
    teacher = dataclasses.replace(parts.teachers[""], config=config.teacher)
    return dataclasses.replace(parts, config=config, teachers={"": teacher})


def with_student(parts: Parts, transport: Transport, model: str = "student") -> Parts:
    """The same parts with a student that a server of its own serves."""
    fleet = transport if isinstance(transport, Fleet) else None
    endpoint = Endpoint(transport=transport, model=model, path=parts.student_endpoint.path, fleet=fleet)
    return dataclasses.replace(parts, student_endpoint=endpoint)


def with_teacher(parts: Parts, transport: Transport, model: str = "teacher") -> Parts:
    fleet = transport if isinstance(transport, Fleet) else None
    endpoint = Endpoint(transport=transport, model=model, path=parts.teachers[""].endpoint.path, fleet=fleet)
    return scored_by(parts, endpoint)


def scored_by(parts: Parts, endpoint: Endpoint) -> Parts:
    return dataclasses.replace(parts, teachers={"": dataclasses.replace(parts.teachers[""], endpoint=endpoint)})


def served(endpoint: Endpoint) -> Transport:
    """An embedded engine, seen as any server."""
    assert endpoint.engine is not None
    return AsgiTransport(endpoint.engine.app)


@asynccontextmanager
async def serving(
    routes: Mapping[str, Any], *, host: str = "127.0.0.1", status: int = 200
) -> AsyncIterator[HttpTransport]:
    """A real server: `{"GET /version": {"version": "0.32.0"}}`. A value that can be called gets the request's body."""
    app = web.Application()

    def handler(answer: Any) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            value = answer(await request.json()) if callable(answer) else answer
            return web.json_response(value, status=status)

        return handle

    for route, answer in routes.items():
        method, path = route.split()
        app.router.add_route(method, path, handler(answer))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    transport = HttpTransport(f"http://{host}:{runner.addresses[0][1]}/v1", retry_deadline_s=0.1)
    try:
        yield transport
    finally:
        await transport.aclose()
        await runner.cleanup()


@pytest.fixture
def fake(parts: Parts) -> Iterator[Callable[..., FakeVllm]]:
    servers: list[FakeVllm] = []

    def start(model: str = "student", **options: Any) -> FakeVllm:
        servers.append(FakeVllm(model, vocab_size=len(parts.renderer.vocab()), **options))
        return servers[-1].__enter__()

    yield start
    for server in servers:
        server.__exit__()


def only(findings: list[Finding], level: str, *words: str) -> Finding:
    """The one finding there is, of that level, with these words in what it says."""
    assert [f.level for f in findings] == [level], list(map(str, findings))
    text = f"{findings[0].message} {findings[0].remedy}"
    for word in words:
        assert word in text
    assert findings[0].level != "error" or findings[0].remedy, "an error says how to mend it"
    return findings[0]


# What is on this machine


def test_packages_of_this_checkout() -> None:
    only(check.packages(), "ok")


def test_a_foreign_package_that_shadows_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    script = "from distill.check import packages\nprint(packages()[0])"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("error   packages: configs is imported from"), done.stderr
    assert str(tmp_path / "configs") in done.stdout


def test_installed_versions_fit() -> None:
    only(check_versions.installed(), "ok", "torch", "transformers")


def test_a_version_out_of_range_is_an_error(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["torch>=2,<2.1", "transformers>=5", "numpy<1"]\n')
    only(check_versions.installed(project), "error", "torch", "<2.1", "pip install")


# Vocabulary and template


def test_the_same_vocabulary_passes(parts: Parts) -> None:
    only(check.vocabulary(parts, parts.teachers[""]), "ok", "ids are the same")


def test_a_shifted_vocabulary_is_an_error(parts: Parts, models: Path) -> None:
    endpoint = dataclasses.replace(parts.teachers[""].endpoint, path=models / "stranger")
    only(check.vocabulary(parts, scored_by(parts, endpoint).teachers[""]), "error", "another token", "family")


def test_a_teacher_without_tokenizer_is_an_error(parts: Parts, tmp_path: Path) -> None:
    endpoint = dataclasses.replace(parts.teachers[""].endpoint, path=tmp_path)
    only(check.vocabulary(parts, scored_by(parts, endpoint).teachers[""]), "error", "cannot be loaded")


def test_another_end_of_turn_is_a_warning(parts: Parts, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "base")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE.replace(
        "<|im_end|>\n{% endif %}{% endfor %}", "<|endoftext|>\n{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    teacher = load_renderer(tmp_path / "base")
    only(check.compare_vocabularies(parts.renderer, teacher), "warning", "never to stop")


def test_a_template_that_keeps_calls_passes(parts: Parts) -> None:
    only(check.template(parts.renderer, parts), "ok")


def test_a_template_that_drops_tool_results_is_an_error(parts: Parts, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "deaf")
    tokenizer.chat_template = TEMPLATE.replace(
        "\n{{ m.content }}", "\n{% if loop.first or m.role == 'assistant' %}{{ m.content }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "deaf")
    only(check.template(load_renderer(tmp_path / "deaf"), parts), "error", "tool result")


# Sampling


def test_the_models_own_distribution_passes(parts: Parts) -> None:
    only(check.sampling(parts), "ok")


@pytest.mark.parametrize("changes", [{"rollout__top_p": 0.9}, {"rollout__top_k": 20}, {"rollout__temperature": 0.7}])
def test_another_distribution_is_a_warning(parts: Parts, changes: dict[str, Any]) -> None:
    only(check.sampling(having(parts, **changes)), "warning")


async def test_defaults_that_every_request_overrides_pass(parts: Parts, models: Path) -> None:
    async with serving({}) as transport:
        only(await check.generation_config(with_student(parts, transport)), "ok")


async def test_a_penalty_by_default_is_an_error_unless_the_server_ignores_it(
    parts: Parts, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "student", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"repetition_penalty": 1.1, "temperature": 0.6}')
    told = {"vllm_config": {"model_config": {"generation_config": "vllm"}}}
    async with serving({}) as silent, serving({"GET /server_info": told}) as good:
        for transport, level in ((silent, "error"), (good, "ok")):
            there = with_student(parts, transport)
            there.student_endpoint.path = tmp_path / "model"
            only(await check.generation_config(there), level)
        started = having(there, student__server={})
        only(await check.generation_config(started), "ok", "the run starts")


async def test_of_several_teachers_each_is_checked_and_findings_say_whose_they_are(
    parts: Parts, models: Path, tmp_path: Path
) -> None:
    values = parts.config.model_dump()
    values["sources"] = {"a": {}, "b": {"teacher": "told"}}
    values["teachers"] = {"told": values["teacher"] | {"system_prompt": "add the numbers"}}
    for key in ("top_k", "max_dropped_fraction"):
        del values["teachers"]["told"][key]
    two = build(RunConfig.model_validate(values), Console(quiet=True), tmp_path / "two")
    told, plain = two.teachers["told"], two.teachers[""]
    assert told.endpoint is plain.endpoint  # the same model: loaded once
    assert two.endpoints == [two.student_endpoint, plain.endpoint]
    assert told.extra_tokens > plain.extra_tokens == 0
    assert two.teacher_of(two.sources["b"].train_tasks[0]) is told
    stranger = dataclasses.replace(told, endpoint=dataclasses.replace(told.endpoint, path=models / "stranger"))
    spoiled = dataclasses.replace(two, teachers={"": plain, "told": stranger})
    findings = await check.check_parts(spoiled, lambda: spoiled.publish(0))
    of_teachers = [f for f in findings if f.name in ("vocabulary", "teacher_server", "teacher_scores")]
    assert [(f.name, f.level, f.message.partition(": ")[0]) for f in of_teachers] == [
        ("vocabulary", "ok", "teacher"),
        ("vocabulary", "error", "teachers.told"),
        ("teacher_server", "ok", "teacher"),
        ("teacher_server", "warning", "teachers.told"),  # what it is told does not fit beside the longest episode
        ("teacher_scores", "ok", "teacher"),
        ("teacher_scores", "ok", "teachers.told"),
    ]
    await two.aclose()


# The servers themselves


async def test_servers_that_are_there_pass(parts: Parts) -> None:
    only(await check_servers.server(parts), "ok", "1024")
    only(await check_servers.server(parts, parts.teachers[""]), "ok", "1024")


async def test_a_name_that_is_not_served_is_an_error(parts: Parts) -> None:
    other = with_student(parts, served(parts.student_endpoint), model="other")
    finding = only(await check_servers.server(other), "error", "--served-model-name")
    assert "it serves 'student'" in finding.message


async def test_a_context_shorter_than_an_episode_is_an_error(parts: Parts) -> None:
    exact, long = having(parts, rollout__max_episode_tokens=1023), having(parts, rollout__max_episode_tokens=1024)
    only(await check_servers.server(exact), "ok")
    only(await check_servers.server(long), "error", "--max-model-len 1025")


async def test_the_teachers_own_words_take_context_too(parts: Parts, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    dialogue = [{"role": "user", "content": "add 1 and 4"}, {"role": "assistant", "content": "the number 5"}]
    examples.write_text(json.dumps({"messages": dialogue}) + "\n")
    values = having(
        parts, rollout__max_episode_tokens=900, teacher__system_prompt="add the numbers"
    ).config.model_dump()
    values["teacher"]["examples"] = str(examples)
    prompted = build(RunConfig.model_validate(values), Console(quiet=True), tmp_path / "prompted")
    teacher = prompted.teachers[""]
    task = prompted.sources[""].train_tasks[0]
    context = context_of(teacher.config, read_examples(examples), prompted.renderer, prompted.sources[""].tool_specs)
    assert context is not None
    longer = len(prompted.renderer.render_prompt(context.messages(task), prompted.sources[""].tool_specs))
    own = len(prompted.renderer.render_prompt(task.messages, prompted.sources[""].tool_specs))
    assert teacher.extra_tokens == longer - own > 10
    only(await check_servers.server(prompted, teacher), "ok")
    fits = having(prompted, rollout__max_episode_tokens=1023 - teacher.extra_tokens)
    only(await check_servers.server(fits, fits.teachers[""]), "ok")
    long = having(prompted, rollout__max_episode_tokens=1024 - teacher.extra_tokens)
    only(await check_servers.server(long, long.teachers[""]), "error", "system prompt", "--max-model-len 1025")
    await prompted.aclose()


async def test_a_teacher_with_less_context_than_the_student_is_a_warning(
    parts: Parts, fake: Callable[..., FakeVllm]
) -> None:
    server = fake("teacher", max_model_len=512)
    short = with_teacher(parts, HttpTransport(server.base_url))
    only(await check_servers.server(short, short.teachers[""]), "warning", "512", "1024")
    await short.teachers[""].endpoint.aclose()


async def test_a_server_that_is_away_is_an_error(parts: Parts) -> None:
    away = with_student(parts, HttpTransport("http://127.0.0.1:9/v1", retry_deadline_s=0.1))
    only(await check_servers.server(away), "error", "student.base_url")
    await away.student_endpoint.aclose()


async def test_a_missing_key_is_an_error_that_says_where_keys_go(parts: Parts, models: Path) -> None:
    engine = EmbeddedEngine.from_pretrained(models / "student", name="student", dtype="float32", api_key="secret")
    locked = with_student(parts, AsgiTransport(engine.app))
    only(await check_servers.server(locked), "error", "student.api_key_env")
    await engine.aclose()


@pytest.mark.parametrize("reply", [{"hello": 1}, {"data": "none"}, {"data": ["student"]}])
async def test_a_server_of_another_kind_is_an_error(parts: Parts, reply: Any) -> None:
    async with serving({"GET /v1/models": reply}) as transport:
        other = with_student(parts, transport)
        only(await check_servers.server(other), "error", "OpenAI-compatible")


@asynccontextmanager
async def fleet_of(name: str, *base_urls: str) -> AsyncIterator[Fleet]:
    """Servers that are there, as a run sees them."""
    fleet = Fleet.given(name, base_urls, None, max_outage_s=1)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.aclose()


async def test_every_address_is_asked(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    async with fleet_of("student", fake("student").base_url, fake("other").base_url) as fleet:
        both = with_student(parts, fleet)
        findings = await check_servers.server(both)
    assert [f.level for f in findings] == ["ok", "error"]
    assert "student-1" in findings[1].message


# How vLLM was started

WEIGHTS = {"POST /collective_rpc": {}, "POST /pause": {}, "POST /resume": {}, "GET /weight_info": {}}
LORA = {"POST /v1/load_lora_adapter": {}, "POST /v1/unload_lora_adapter": {}}


async def test_versions_that_are_new_enough_pass(parts: Parts) -> None:
    async with serving({"GET /version": {"version": "0.33.0rc1"}}) as transport:
        only(await check_versions.server_versions(with_student(parts, transport)), "ok", "0.33.0rc1")


async def test_an_old_server_is_an_error_for_the_student_and_slow_for_the_teacher(parts: Parts) -> None:
    async with serving({"GET /version": {"version": "0.28.1"}}) as old:
        only(await check_versions.server_versions(with_student(parts, old)), "error", "0.28.1", "upgrade")
        only(await check_versions.server_versions(with_teacher(parts, old)), "warning", "slower")


async def test_servers_of_different_versions_are_a_warning(parts: Parts) -> None:
    there = {"GET /v1/models": {"data": []}}
    versions = [there | {"GET /version": {"version": version}} for version in ("0.32.0", "0.33.0")]
    async with (
        serving(versions[0]) as one,
        serving(versions[1]) as other,
        fleet_of("student", one.base_url, other.base_url) as fleet,
    ):
        only(await check_versions.server_versions(with_student(parts, fleet)), "warning", "0.32.0, 0.33.0")


async def test_a_server_without_version_is_not_called_good(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    unknown = with_teacher(parts, HttpTransport(fake("teacher").base_url))
    only(await check_versions.server_versions(unknown), "warning", "not known")
    await unknown.teachers[""].endpoint.aclose()


async def test_routes_for_new_weights(parts: Parts) -> None:
    async with serving(WEIGHTS) as good, serving({}) as bad:
        only(await check_vllm.weight_routes(with_student(parts, good)), "ok")
        only(await check_vllm.weight_routes(with_student(parts, bad)), "error", "VLLM_SERVER_DEV_MODE=1", "/pause")


async def test_routes_for_new_adapters(parts: Parts) -> None:
    parts = having(parts, student__lora={"rank": 8})
    async with serving(LORA) as good, serving(WEIGHTS) as bad:
        only(await check_vllm.weight_routes(with_student(parts, good)), "ok")
        only(await check_vllm.weight_routes(with_student(parts, bad)), "error", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")


async def test_open_routes_are_only_a_danger_beyond_this_machine(parts: Parts) -> None:
    there = {"GET /v1/models": {"data": []}}
    async with serving(there | WEIGHTS) as local, fleet_of("student", local.base_url) as fleet:
        only(await check_vllm.exposure(with_student(parts, fleet)), "ok")
    own = own_address()
    if own is None:
        pytest.skip("this machine has no address but loopback")
    async with serving(there | WEIGHTS, host=own) as open_, fleet_of("student", open_.base_url) as fleet:
        only(await check_vllm.exposure(with_student(parts, fleet)), "warning", "no API key", "--host 127.0.0.1")
    async with serving(there, host=own) as closed, fleet_of("teacher", closed.base_url) as fleet:
        only(await check_vllm.exposure(with_teacher(parts, fleet)), "ok")


def own_address() -> str | None:
    """An address of this machine that is no loopback; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


@pytest.mark.parametrize(
    ("url", "reached_by"),
    [
        ("http://127.0.0.1:8000/v1", "this machine"),
        ("http://[::1]:8000/v1", "this machine"),
        ("http://localhost:8000/v1", "this machine"),
        ("http://10.1.2.3:8000/v1", "its network"),
        ("http://192.168.0.7:8000/v1", "its network"),
        ("http://[fe80::1]:8000/v1", "its network"),
        ("http://8.8.8.8:8000/v1", "the internet"),
        ("http://[2001:4860:4860::8888]:8000/v1", "the internet"),
        ("", "this machine"),
    ],
)
def test_who_reaches_an_address(url: str, reached_by: str) -> None:
    assert check_vllm.reach(url) == reached_by


def info(**config: Any) -> dict[str, Any]:
    return {"GET /server_info": {"vllm_config": config}}


async def test_room_for_the_adapter(parts: Parts) -> None:
    parts = having(parts, student__lora={"rank": 20})
    routes = [
        info(lora_config={"max_lora_rank": 32}),
        info(lora_config={"max_lora_rank": 16}),
        info(lora_config=None),
        {},
    ]
    said = []
    for answers in routes:
        async with serving(answers) as transport:
            said += await check_vllm.lora_rank(with_student(parts, transport))
    assert [f.level for f in said] == ["ok", "error", "error", "ok"]
    assert "--max-lora-rank 32" in said[1].remedy
    assert "no adapters" in said[2].message
    assert "not known" in said[3].message


async def test_full_training_needs_no_room_for_adapters(parts: Parts) -> None:
    only(await check_vllm.lora_rank(parts), "ok", "no adapter")


async def test_a_prefix_cache_that_works_passes(parts: Parts) -> None:
    only(await check_vllm.prefix_cache(with_student(parts, served(parts.student_endpoint))), "ok", "on")


def caching(cached: int | None, context: int = 1024) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {
        "GET /v1/models": {"data": [{"id": "student", "max_model_len": context}]},
        "POST /v1/completions": {"usage": {"prompt_tokens": 300, "prompt_tokens_details": details}},
    }


@pytest.mark.parametrize(
    ("routes", "level", "words"),
    [
        (caching(0), "warning", "--no-enable-prefix-caching"),
        (caching(None) | info(cache_config={"enable_prefix_caching": False}), "warning", "--no-enable-prefix-caching"),
        (caching(None) | info(cache_config={"enable_prefix_caching": True}), "ok", "on"),
        (caching(None), "ok", "not known"),
        (caching(0, context=128), "ok", "not known"),
    ],
)
async def test_a_prefix_cache_that_is_off_is_a_warning(
    parts: Parts, routes: dict[str, Any], level: str, words: str
) -> None:
    async with serving(routes) as transport:
        only(await check_vllm.prefix_cache(with_student(parts, transport)), level, words)


class Raw(AsgiTransport):
    """A server that draws at a temperature and reports log-probabilities of temperature 1: vLLM's default."""

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        return await super().post_json(path, {**payload, "temperature": 1.0}, timeout_s=timeout_s, key=key)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.3, 2.0])
async def test_log_probabilities_of_the_sampled_distribution(parts: Parts, temperature: float) -> None:
    parts = having(parts, rollout__temperature=temperature)
    assert parts.student_endpoint.engine is not None
    processed = with_student(parts, served(parts.student_endpoint))
    raw = with_student(parts, Raw(parts.student_endpoint.engine.app))
    only(await check_vllm.logprobs_mode(processed), "ok", "those of temperature")
    only(await check_vllm.logprobs_mode(raw), "error", "--logprobs-mode processed_logprobs")


async def test_at_temperature_1_there_is_nothing_to_ask(parts: Parts) -> None:
    only(await check_vllm.logprobs_mode(parts), "ok", "the same")


async def test_candidates_that_the_servers_give(parts: Parts) -> None:
    only(await check_vllm.max_logprobs(parts), "ok", "no candidates")
    few, many = (having(parts, loss__type="topk", teacher__top_k=k) for k in (20, 21))
    only(await check_vllm.max_logprobs(few), "ok", "20")
    only(await check_vllm.max_logprobs(many), "error", "--max-logprobs 21", "max allowed: 20")


async def test_given_candidates_stand_beside_the_sampled_token(parts: Parts) -> None:
    given = having(parts, loss__type="topk", loss__candidates="student", teacher__top_k=20)
    only(await check_vllm.max_logprobs(given), "error", "teacher refuses 21", "--max-logprobs 21")


# Numbers


async def probe_of(parts: Parts) -> Probe:
    probes: list[Probe] = []
    only(await check_servers.student_sampling(parts, probes), "ok")
    return probes[0]


async def test_a_server_that_returns_no_ids_cannot_be_sampled_from(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    from agent_loop.policy import VllmPolicy

    transport = HttpTransport(fake(returns_ids=False).base_url)
    parts = dataclasses.replace(with_student(parts, transport), policy=VllmPolicy(transport, "student"))
    parts = having(parts, check__skip=["server_versions", "weight_routes"])
    by_name = {f.name: f for f in await check.check_parts(parts)}
    assert by_name["student_sampling"].level == "error"
    assert "return_token_ids" in by_name["student_sampling"].message
    assert by_name["self_score"].message == "not made: it needs student_sampling"
    await transport.aclose()


async def test_a_student_agrees_with_itself(parts: Parts) -> None:
    only(await check_servers.self_score(parts, await probe_of(parts)), "ok")


async def test_two_servers_with_different_weights_disagree(parts: Parts) -> None:
    probe = await probe_of(parts)
    other = having(
        with_student(parts, served(parts.teachers[""].endpoint), model="teacher"), check__max_self_difference=0.01
    )
    only(await check_servers.self_score(other, probe), "error", "same weights")


async def test_trainer_and_server_are_the_same_model(parts: Parts) -> None:
    only(check_servers.mismatch(parts, await probe_of(parts)), "ok")


async def test_a_server_with_other_weights_is_a_mismatch(parts: Parts) -> None:
    from agent_loop.policy import VllmPolicy

    other = dataclasses.replace(parts, policy=VllmPolicy(served(parts.teachers[""].endpoint), "teacher"))
    only(check_servers.mismatch(other, await probe_of(other)), "error", "student.model")


async def test_a_teacher_that_scores_passes(parts: Parts) -> None:
    only(await check_servers.teacher_scores(parts, parts.teachers[""], await probe_of(parts)), "ok", "KL")


async def test_a_teacher_with_candidates_passes(parts: Parts) -> None:
    asked = having(parts, loss__type="topk", teacher__top_k=5)
    only(await check_servers.teacher_scores(asked, asked.teachers[""], await probe_of(asked)), "ok")


async def test_a_teacher_that_is_the_student_teaches_nothing(parts: Parts) -> None:
    same = with_teacher(parts, served(parts.student_endpoint), model="student")
    probe = await probe_of(same)
    only(await check_servers.teacher_scores(same, same.teachers[""], probe), "warning", "nothing to learn")


async def test_teachers_with_different_weights_are_an_error(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    servers = fake("teacher"), fake("teacher")
    servers[1].invented = InventedModel(servers[1].invented.vocab_size, decay=0.1)
    probe = await probe_of(parts)
    async with fleet_of("teacher", *(server.base_url for server in servers)) as fleet:
        only(
            await check_servers.teacher_scores(parts, with_teacher(parts, fleet).teachers[""], probe),
            "error",
            "other weights",
        )


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("minus_9999", "cannot be used"),
        ("nan", "cannot be used"),
        ("null", "gives no log-probabilities"),
        ("short", "gives no log-probabilities"),
        ("wrong_ids", "gives no log-probabilities"),
        ("html", "gives no log-probabilities"),
        ("http_500", "did not answer"),
    ],
)
async def test_scores_that_cannot_be_used_are_an_error(
    parts: Parts, fake: Callable[..., FakeVllm], fault: str, words: str
) -> None:
    server = fake("teacher")
    server.fault_after(0, fault)
    broken = with_teacher(parts, HttpTransport(server.base_url, retry_deadline_s=0.2))
    only(await check_servers.teacher_scores(broken, broken.teachers[""], await probe_of(parts)), "error", words)
    await broken.teachers[""].endpoint.aclose()


async def test_a_teacher_with_too_little_context_for_a_turn_is_an_error(
    parts: Parts, fake: Callable[..., FakeVllm]
) -> None:
    short = with_teacher(parts, HttpTransport(fake("teacher", max_model_len=8).base_url))
    only(
        await check_servers.teacher_scores(short, short.teachers[""], await probe_of(parts)), "error", "--max-model-len"
    )
    await short.teachers[""].endpoint.aclose()


@pytest.mark.parametrize(
    ("base_url", "words"),
    [("https://api.openai.com/v1", "api.openai.com is a proprietary API"), ("http://notopenai.com/v1", "such as vLLM")],
)
async def test_a_teacher_that_only_samples_is_an_error(
    parts: Parts, fake: Callable[..., FakeVllm], base_url: str, words: str
) -> None:
    silent = with_teacher(parts, HttpTransport(fake("teacher", scores=False).base_url))
    silent = having(silent, teacher__base_url=[base_url])
    only(
        await check_servers.teacher_scores(silent, silent.teachers[""], await probe_of(parts)),
        "error",
        words,
        "off-policy distillation",
    )
    await silent.teachers[""].endpoint.aclose()


class Split(HttpTransport):
    """Behind one address, `/inference` goes to another server than the rest."""

    def __init__(self, base_url: str, other: HttpTransport) -> None:
        super().__init__(base_url)
        self._other = other

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        if path.startswith("/inference"):
            return await self._other.post_json(path, payload, timeout_s=timeout_s, key=key)
        return await super().post_json(path, payload, timeout_s=timeout_s, key=key)


async def test_fast_scores_are_compared_with_plain_ones(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    right, wrong = (fake("teacher", generates=True, scores_given_ids=True) for _ in range(2))
    wrong.invented = InventedModel(wrong.invented.vocab_size, decay=0.1)
    probe = await probe_of(parts)
    good = with_teacher(parts, HttpTransport(right.base_url))
    only(await check_servers.teacher_scorer(good, good.teachers[""], probe), "ok", "fast")
    split = with_teacher(parts, Split(right.base_url, HttpTransport(wrong.base_url)))
    only(await check_servers.teacher_scorer(split, split.teachers[""], probe), "error", "fast", "other numbers")
    for endpoint in (good.teachers[""].endpoint, split.teachers[""].endpoint):
        await endpoint.aclose()
    await split.teachers[""].endpoint.transport._other.aclose()  # type: ignore[attr-defined]


async def test_a_server_without_fast_scoring_is_asked_plainly(parts: Parts, fake: Callable[..., FakeVllm]) -> None:
    plain = with_teacher(parts, HttpTransport(fake("teacher").base_url))
    probe = await probe_of(parts)
    only(await check_servers.teacher_scorer(plain, plain.teachers[""], probe), "ok", "plain")
    given = having(plain, loss__type="topk", loss__candidates="student", teacher__top_k=4)
    only(
        await check_servers.teacher_scorer(given, given.teachers[""], probe),
        "error",
        "needs a teacher that scores given ids",
    )
    await plain.teachers[""].endpoint.aclose()


# All of them


async def test_a_good_run_has_nothing_but_ok(parts: Parts) -> None:
    findings = await check.check_parts(parts)
    assert {f.level for f in findings} == {"ok"}, list(map(str, findings))
    assert [f.name for f in findings] == [name for name in check.CHECKS if name in {f.name for f in findings}], (
        "in the order in which they are listed"
    )


async def test_what_is_skipped_or_not_known_is_reported(parts: Parts) -> None:
    findings = await check.check_parts(having(parts, check__skip=["mismatch", "mismach"]))
    by_name = {f.name: f for f in findings}
    assert by_name["mismatch"].level == "warning"
    assert "skipped" in by_name["mismatch"].message
    assert "there is no check 'mismach'" in by_name["check.skip"].message


async def test_a_dead_server_costs_only_the_checks_that_need_it(parts: Parts) -> None:
    away = with_teacher(parts, HttpTransport("http://127.0.0.1:9/v1", retry_deadline_s=0.1))
    by_name = {f.name: f for f in await check.check_parts(away)}
    assert [name for name, f in by_name.items() if f.level == "error"] == ["teacher_server"]
    assert by_name["teacher_scores"].message == "not made: it needs teacher_server"
    assert by_name["mismatch"].level == "ok"
    await away.teachers[""].endpoint.aclose()


async def test_weights_are_published_once_the_server_can_take_them(parts: Parts) -> None:
    published = []

    async def publish() -> None:
        published.append(0)

    assert {f.level for f in await check.check_parts(parts, publish)} == {"ok"}
    assert published == [0]
    async with serving({"GET /v1/models": {"data": [{"id": "student"}]}}) as bare:
        by_name = {f.name: f for f in await check.check_parts(with_student(parts, bare), publish)}
    assert by_name["weight_routes"].level == "error"
    assert by_name["publish"].message == "not made: it needs weight_routes"
    assert published == [0]


async def test_a_publication_that_fails_is_an_error_of_its_own(parts: Parts) -> None:
    async def publish() -> None:
        raise RuntimeError("the folder is full")

    by_name = {f.name: f for f in await check.check_parts(parts, publish)}
    assert by_name["publish"].level == "error"
    assert "the folder is full" in by_name["publish"].message
    assert by_name["student_sampling"].message == "not made: it needs publish"
