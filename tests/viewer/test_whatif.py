"""The one route that changes anything: who may use it, what it does, and the model that samples on."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop.view.__main__ import main
from agent_loop.view.engine import engine
from agent_loop.view.fork import ForkError
from agent_loop.view.whatif import WhatIf
from tests.runs.conftest import save_model
from tests.viewer.conftest import HOSTILE, SITE, Played, Server, call
from tests.viewer.test_server import ask, keys, value_of


@pytest.fixture
def forking(played: Played) -> Iterator[Server]:
    found = Server(str(played.path), "--what-if", "--cache", str(played.path.parent / "cache"))
    yield found
    found.stop()


def post(server: Server, body: Any, path: str = "/api/what-if", **headers: str | None) -> tuple[int, Any]:
    """As the page posts; a header that is None is left out."""
    given: dict[str, str | None] = {
        "Host": f"127.0.0.1:{server.port}",
        "Origin": server.url,
        "Content-Type": "application/json",
        "X-What-If": server.token,
    }
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.putrequest("POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in {**given, "Content-Length": str(len(data))}.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders()
    connection.send(data)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def test_a_fork_by_the_route(forking: Server, played: Played) -> None:
    [key] = keys(forking)
    assert len(forking.token) >= 40
    assert value_of(forking, "/api/run")["what_if"] == {"model": None}
    status, made = post(forking, {"key": key, "turn": 3, "text": call("submit_answer", answer=HOSTILE)})
    assert (status, made["id"]) == (200, "1/t/0#fork-1")
    page = value_of(forking, f"/api/episode/{made['key']}")
    assert page["episode"]["metadata"]["fork"] == {"of": "1/t/0", "turn": 3, "how": "edited"}
    assert page["episode"]["turns"][3]["message"]["tool_calls"][0]["arguments"] == {"answer": HOSTILE}
    assert [other["id"] for other in page["siblings"]] == ["1/t/0"]
    run = value_of(forking, "/api/run")["runs"][0]
    assert (run["episodes"], run["forks"], run["stops"]) == (1, 1, {"answered": 1})  # forks are no part of its figures
    assert set(keys(forking)) == {key, made["key"]}
    assert len(played.forks.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X_What_If": None}, 403),
        ({"X_What_If": ""}, 403),
        ({"X_What_If": "A" * 43}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Host": "evil.example"}, 400),
        ({"Host": None}, 400),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
    ],
)
def test_who_may_not(forking: Server, played: Played, headers: dict[str, str | None], status: int) -> None:
    body = {"key": keys(forking)[0], "turn": 1, "text": "x"}
    assert post(forking, body, **headers)[0] == status
    assert not played.forks.exists()


def test_what_is_no_request(forking: Server, played: Played) -> None:
    [key] = keys(forking)
    whole = {"key": key, "turn": 1, "text": "x"}
    changes: tuple[dict[str, Any], ...] = ({"turn": "1"}, {"turn": True}, {"text": 7}, {"key": 3}, {"text": "\ud800"})
    wrong = [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, {"key": key}, *(whole | change for change in changes)]
    for body in wrong:
        assert post(forking, body)[0] == 400
    assert post(forking, {"key": key, "turn": 1, "text": "x" * 1_000_001})[0] == 413
    for other in ("0" * 16, "../../config.json", "x"):
        assert post(forking, {"key": other, "turn": 1, "text": "x"}) == (404, {"error": "there is no such episode"})
    status, said = post(forking, {"key": key, "turn": 9, "text": "x"})
    assert (status, said["error"]) == (422, "there is no turn 9: the episode has 4")
    status, said = post(forking, {"key": key, "turn": 1, "text": None})
    assert (status, said["error"]) == (422, "there is neither an edited text nor a model")
    assert post(forking, {}, path="/api/run")[0] == 405
    assert not played.forks.exists()


def test_nothing_of_it_without_the_flag(played: Played) -> None:
    server = Server(str(played.path), "--cache", str(played.path.parent / "cache"))
    assert server.token == ""
    body = {"key": keys(server)[0], "turn": 1, "text": "x"}
    assert post(server, body)[0] == 405
    assert post(server, body, X_What_If="anything")[0] == 405
    assert ask(server, "/api/what-if")[0] == 404
    assert value_of(server, "/api/run")["what_if"] is None
    server.stop()
    assert not played.forks.exists()


# The model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_model(path / "student", seed=1)


def test_the_embedded_engine_samples_on_and_ends(played: Played, model_folder: Path) -> None:
    with engine(model_folder) as model:
        port = urllib.parse.urlsplit(model.base_url).port
        assert port is not None
        what_if = WhatIf(played.path, played.tokenizer, model=model)
        made = what_if.fork(played.episode(), 2, played.forks.parent)
    assert made.metadata["fork"]["how"] == f"sampled by {model.name}"
    turn = made.turns[2]
    assert turn.start is not None
    assert turn.start == played.episode().turns[2].start
    sampled = made.traces[0].sampling_logprobs[turn.start : turn.end]
    assert sampled
    assert all(value is not None and value <= 0 for value in sampled)
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ForkError, match=r"(?s)the embedded engine of .* ended with code 1:.*Error"), engine(tmp_path):
        raise AssertionError("it started")


@pytest.mark.slow
def test_the_command_starts_the_engine_and_takes_it_along(played: Played, model_folder: Path) -> None:
    server = Server(
        str(played.path), "--what-if", "--model", str(model_folder), "--cache", str(played.path.parent / "c")
    )
    [key] = keys(server)
    assert value_of(server, "/api/run")["what_if"] == {"model": f"{model_folder.parent.name}/student"}
    status, made = post(server, {"key": key, "turn": 3, "text": None})
    assert (status, made["id"]) == (200, "1/t/0#fork-1")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert children
    server.process.send_signal(signal.SIGKILL)
    server.process.communicate(timeout=20)
    end = time.monotonic() + 30
    while any(alive(int(pid)) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "x"], "are for --what-if"),
        (["--env", "x"], "are for --what-if"),
        (["--what-if", "--base-url", "http://127.0.0.1:1/v1"], "--base-url wants --model"),
        (["--what-if", "--model", "nowhere"], "--model nowhere: no model folder"),
        (["--what-if", "--export", "x.html"], "only the pages play forks"),
        (["--what-if", "--tui"], "only the pages play forks"),
        (
            ["--what-if", "--model", "m", "--base-url", "http://127.0.0.1:1/v1", "--api-key-env", "NO_SUCH_VARIABLE"],
            "no variable NO_SUCH_VARIABLE",
        ),
    ],
)
def test_commands_that_make_no_sense(
    played: Played, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(played.path), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_model_of_other_ids_and_a_run_without_a_configuration(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = save_model(tmp_path / "stranger", seed=3, extra_tokens=("<|other|>",))
    cache = ["--cache", str(tmp_path / "cache")]
    assert main([str(played.path), "--what-if", "--model", str(stranger), *cache]) == 2
    assert "has another vocabulary than" in capsys.readouterr().err
    (played.path / "config.json").unlink()
    assert main([str(played.path), "--what-if", *cache]) == 2
    assert "does not say how the episodes were played" in capsys.readouterr().err


# Pages of the store


def test_stored_pages(forking: Server, played: Played) -> None:
    [key] = keys(forking)
    page = value_of(forking, f"/api/episode/{key}")
    assert page["pages"] is True
    read = page["episode"]["turns"][1]["tool_results"][0]["metadata"]

    def stored(url: str, episode: str = key) -> Any:
        return value_of(forking, f"/api/page/{episode}?{urllib.parse.urlencode({'page': url})}")

    found = stored(read["asked"])
    assert (found["sha256"], found["url"], found["status"]) == (read["sha256"], f"{SITE}/drug", 200)
    assert "Made by Acme" in found["text"]
    assert found["length"] == len(found["text"])
    for url in (f"{SITE}/other", "http://127.0.0.1:1/", "file:///etc/passwd", "../config.json", "", "tool:x?{}"):
        assert stored(url) == {"problem": "this page is not in the store"}
    assert ask(forking, f"/api/page/{'0' * 16}?page=x")[0] == 404
    played.store.unlink()
    assert "No such file" in stored(read["asked"])["problem"]


def test_runs_without_a_page_store(played: Played) -> None:
    browse: list[Any] = [{"mode": "live"}, 3, {"store": str(played.path / "episodes")}]
    pages = ["/nowhere.jsonl", "/etc/passwd"]
    for arguments in ({}, None, *({"browse": value} for value in browse), *({"pages": path} for path in pages)):
        played.configure(env_args=arguments)
        server = Server(str(played.path), "--cache", str(played.path.parent / "cache"))
        [key] = keys(server)
        assert value_of(server, f"/api/episode/{key}")["pages"] is False
        assert "no page store" in value_of(server, f"/api/page/{key}?page=x")["problem"]
        server.stop()


def test_pages_are_not_in_an_exported_file(played: Played, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main([str(played.path), "--export", str(out), "--cache", str(tmp_path / "cache")]) == 0
    assert '"pages":true' not in out.read_text()
