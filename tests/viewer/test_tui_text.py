"""Nothing that a file holds steers the terminal or styles itself (B16); what `--tui` asks of where it is started."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from agent_loop.view.index import Index
from agent_loop.view.tui_parts import folded, line_of
from tests.viewer.conftest import HOSTILE, ROOT, hostile, line
from tests.viewer.terminal import drawn, open_episode, playing, query, until

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


async def test_markup_is_text(tmp_path: Path) -> None:
    markup = "[@click=app.quit]x[/] [red]y[/red] \\[b] :smile:"

    def everywhere(value: dict[str, Any]) -> None:
        hostile(value)
        text = json.dumps(value)
        value |= json.loads(text.replace(json.dumps(HOSTILE)[1:-1], json.dumps(markup)[1:-1]))

    path = tmp_path / "[bold]x.jsonl"
    path.write_bytes(line(1, everywhere) + b"[red]torn[/red]\n")
    index = Index([path], tmp_path / "cache")
    async with playing(index, size=(200, 50)) as (app, pilot):
        assert f"7/{markup}/0" in drawn(app)
        assert "tool: [@click=" in drawn(app)
        assert "! [bold]x.jsonl:2: " in drawn(app)
        await query(pilot, "[red]:1")
        await until(pilot, lambda: "0 of 2 episodes" in drawn(app))
        await open_episode(app, pilot, "is:failed")
        assert drawn(app).count(markup) >= 6
        assert f"{markup}  10.0 ms  timeout: {markup}" in drawn(app)
        assert f"{markup}: 1" in drawn(app)
        await pilot.press("escape")
        await open_episode(app, pilot, "is:problem")
        assert "[red]torn[/red]" in drawn(app)
    index.close()


async def test_hostile_text_is_spelled_out(run: Path, tmp_path: Path) -> None:
    index = Index([run], tmp_path / "cache")
    async with playing(index) as (app, pilot):
        await query(pilot, "is:failed")
        await until(pilot, lambda: app.screen.count == 1)  # type: ignore[attr-defined]
        assert not STEERING.search(drawn(app))
        page = await open_episode(app, pilot, "is:failed")
        await pilot.press("o")
        text = "".join(segment.text for one in page.lines for segment in one)
        assert "\\x1b[31m" in text
        assert "\\u202eevil\\u2066\\u200b" in text
        for _ in range(12):
            assert not STEERING.search(drawn(app))
            await pilot.press("space")
    index.close()


def test_text_is_never_markup_and_never_too_wide() -> None:
    assert line_of("[red]x[/red] [link=file:///]y") == "[red]x[/red] [link=file:///]y"
    assert line_of("a\ud800\x9b31m\n b", 40) == "a\\ud800\\x9b31m b"
    for text in ("漢" * 50, "a" * 99, " " * 30, "\t\x1b" * 9, ""):
        assert all(cell_len(part) <= 10 for part in folded(text, 10))


def test_in_a_terminal_nothing_is_sent_raw(tmp_path: Path) -> None:
    """A terminal of 120 columns reads all bytes of a visit to the hostile episode, its tokens, and the keys."""
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(line(1, hostile) + b"\x1b]0;owned\x07 torn \xe2\x80\xae\n")
    mine, its = pty.openpty()
    os.set_blocking(mine, False)
    command = [sys.executable, "-m", "agent_loop.view", str(path), "--tui", "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment, close_fds=True)
    os.close(its)
    sent = b""

    def read(until: bytes, limit_s: float = 30) -> None:
        nonlocal sent
        start, end = len(sent), time.monotonic() + limit_s
        while until not in sent[start:]:
            assert time.monotonic() < end, sent[-2000:]
            if select.select([mine], [], [], 0.1)[0]:
                sent += os.read(mine, 65536)

    read(b"2 of 2 episodes")
    os.write(mine, b"\r")
    read("── turn 0".encode())
    os.write(mine, b"oG")
    read(b"stopped:")
    os.write(mine, b"t")
    read(b"KL sample")
    os.write(mine, b"bn")
    read(b"no episode")
    os.write(mine, b"q")
    code = process.wait(timeout=20)
    os.close(mine)
    assert code == 0
    sent = re.sub(rb"\x1b\]22;[a-z]+\x07", b"", sent)  # Textual's own: the pointer's shape
    assert b"\\x1b[31m" in sent
    for order in (
        b"\x1b]8;;",
        b"\x1b]0;owned",
        b"\x9b",
        "\u202e".encode(),
        "\u2066".encode(),
        "\u200b".encode(),
        b"\x07",
    ):
        assert order not in sent
    assert HOSTILE[:30].encode() in sent


def test_without_a_terminal_it_says_so(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent_loop.view", str(run), "--tui", "--cache", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: --tui needs a terminal; --text writes to a pipe as well\n")


def test_help_does_not_import_textual() -> None:
    code = "import sys; sys.modules['textual'] = None; from agent_loop.view.__main__ import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--tui" in done.stdout


def test_without_textual_it_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['textual'] = None; from agent_loop.view.__main__ import main;"
        f"sys.exit(main([{str(run)!r}, '--tui', '--cache', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install -e '.[tui]'" in done.stderr
