"""The server refuses what its pages would not send (B17, B18), and one file holds it all."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agent_loop.view.__main__ import main
from agent_loop.view.export import MODULES, one_script, static_files
from tests.viewer.conftest import HOSTILE, Server, line


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    found = response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
    connection.close()
    return found


def value_of(server: Server, path: str) -> Any:
    status, body, _ = ask(server, path)
    assert status == 200, body
    return json.loads(body)


def keys(server: Server, query: str = "") -> list[str]:
    return [row["key"] for row in value_of(server, f"/api/episodes?q={query}")["rows"]]


def test_pages_and_policy(server: Server) -> None:
    status, body, headers = ask(server, "/")
    assert status == 200
    assert b"<script type" in body
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in static_files():
        assert ask(server, f"/static/{name}")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:80", ""])
def test_another_host(server: Server, host: str) -> None:
    assert ask(server, "/api/run", host=host)[0] == 400


def test_two_hosts_and_a_right_one(server: Server) -> None:
    assert ask(server, "/api/run", host=f"localhost:{server.port}")[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f"GET /api/run HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil\r\n\r\n".encode())
        assert b" 400 " in raw.recv(1000).splitlines()[0]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_another_site(server: Server, headers: dict[str, str]) -> None:
    assert ask(server, "/api/run", **headers)[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "HACK"])
def test_only_reading(server: Server, method: str) -> None:
    assert ask(server, "/api/run", method)[0] in (400, 405)
    assert ask(server, "/api/what-if", method)[0] in (400, 405)


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/static/../server.py", "/static/%2e%2e%2fserver.py", "/static/%00", "/static//etc/passwd",
     "/static/", "/api/episode/../run", "/api/episode/%2e%2e", "/api/raw/" + "0" * 16, "/api/raw/..%2f..%2fconfig.json",
     "/docs"],
)  # fmt: skip
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    assert ask(server, path)[0] in (400, 404)


def test_too_long_and_bad_numbers(server: Server) -> None:
    assert ask(server, "/api/episodes?q=" + "a" * 9000)[0] == 414
    for query in ("offset=x", "offset=-1", "limit=-1", "q=colour:red", "sort=__class__"):
        assert ask(server, f"/api/episodes?{query}")[0] == 400


def test_the_server_stays_up_under_slow_and_many_requests(server: Server) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"GET /api/run HT")

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"GET /api/changes HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer.split(b" ", 2)[1]

    async def many() -> list[bytes]:
        return await asyncio.gather(*(one() for _ in range(300)))

    assert set(asyncio.run(many())) == {b"200"}
    for connection in slow:
        connection.close()


def test_an_episode(server: Server) -> None:
    [marked] = keys(server, "unusable>0")
    page = value_of(server, f"/api/episode/{marked}")
    [trace] = page["traces"]
    assert set(trace["marks"]) == {0, 1, 2, 3}
    assert page["tokenizer"] is not None
    assert len(trace["texts"]) == len(set(trace["ids"]))
    raw = ask(server, f"/api/raw/{marked}")[1]
    assert json.loads(raw)["traces"][0]["token_ids"] == trace["ids"]
    first, second = page["episode"]["turns"][:2]
    prompts = [value_of(server, f"/api/prompt/{marked}?turn={turn}") for turn in (0, 1)]
    assert [prompt["tokens"] for prompt in prompts] == [first["start"], second["start"]]
    assert prompts[1]["text"].startswith(prompts[0]["text"][:-10])
    assert ask(server, f"/api/prompt/{marked}?turn=99")[0] == 404
    assert ask(server, f"/api/prompt/{marked}?turn=x")[0] == 400
    assert value_of(server, "/api/run")["runs"][0]["metrics"]["bad"] == 1


def test_follow_shows_an_episode_within_two_seconds_of_a_hundred_a_second(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(line(0))
    server = Server(str(path), "--follow", "--cache", str(tmp_path / "cache"))
    made = [line(i) for i in range(1, 400)]

    def write() -> None:
        with path.open("ab") as file:
            for one in made:
                file.write(one[:100])
                file.flush()
                time.sleep(0.008)
                file.write(one[100:])
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    worst = 0.0
    while writer.is_alive():
        written = path.stat().st_size
        start = time.monotonic()
        while True:
            found = value_of(server, "/api/episodes?limit=1000")["rows"]
            if sum(row["length"] for row in found) >= written:
                break
            time.sleep(0.05)
        worst = max(worst, time.monotonic() - start)
    writer.join()
    assert worst < 2
    time.sleep(0.6)
    found = value_of(server, "/api/episodes?limit=1000")
    assert (found["total"], sum("problem" in row for row in found["rows"])) == (400, 0)
    server.stop()


def test_modules_fit_into_one(run: Path) -> None:
    assert set(MODULES) == {name for name in static_files() if name.endswith(".js")}
    script = one_script()
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", script, re.MULTILINE)
    assert len(names) == len(set(names))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        'setAttribute("style',
    ):
        assert word not in script


def test_one_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main([str(run), "--export", str(out), "--query", "is:failed", "--cache", str(tmp_path)]) == 0
    text = out.read_text()
    assert text.count("</script>") == 2
    assert HOSTILE[:20] not in text.split('id="data">')[1].split("</script>")[0]
    assert main([str(run), "--export", str(out), "--query", "id:nowhere", "--cache", str(tmp_path)]) == 2


def test_refusals_of_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert main([str(run), "--host", host]) == 2
    assert main([str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "loopback only" in said
    assert f"there is no run at {tmp_path / 'none'}: wanted is a run's folder" in said
    assert main([str(tmp_path), "--cache", str(tmp_path / "cache")]) == 2
    assert f"no episodes in {tmp_path}: wanted is" in capsys.readouterr().err


def test_nothing_heavy_is_loaded(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from agent_loop.view.__main__ import main;"
        f"main([{str(run)!r}, '--export', {str(tmp_path / 'x.html')!r}, '--cache', {str(tmp_path)!r}]);"
        "assert not {'torch', 'transformers', 'renderers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
