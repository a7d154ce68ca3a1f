"""Bodies as text for a model: HTML as crawl4ai's markdown, PDF as its text, JSON and plain text as they are.

HTML and PDF are hostile input to large libraries: a small file can keep a parser busy for hours or fill the memory.
They are converted in a process of their own that has limits of time and memory, holds none of our environment, and is
replaced when it breaks them. So the event loop is never stopped either.
"""

from __future__ import annotations

import asyncio
import codecs
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import keeper
from tools.types import ToolErrorKind, ToolFailure

HTML_TYPES = ("text/html", "application/xhtml+xml")
PDF_TYPES = ("application/pdf", "application/x-pdf")
MAX_CHARS = 2_000_000
"""Of a page's text."""
TIMEOUT_S = 20.0
START_TIMEOUT_S = 60.0
MEMORY_BYTES = 3 * 2**30
"""Address space of the converting process."""
WORKER = Path(__file__).with_name("text_worker.py")

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_WEB_CODECS = re.compile(
    r"utf-8|utf-16(-[lb]e)?|ascii|iso8859-\d+|cp(125\d|866|874|932|949|950|1006)|gbk|gb2312|gb18030|big5|euc_(jp|kr)|"
    r"shift_jis|iso2022_jp|koi8-[ru]|mac-roman"
)


class ConverterMissing(Exception):
    """A package that conversion needs is not installed; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class PageContent:
    text: str
    """Markdown with absolute links, or plain text."""
    title: str = ""


def is_text(content_type: str) -> bool:
    """Whether a body of this type is text as it is."""
    return (
        content_type.startswith("text/")
        or content_type in ("application/json", "application/xml", "application/javascript", "")
        or content_type.endswith(("+json", "+xml"))
    )


def decode(body: bytes, charset: str | None, *, html: bool = False) -> str:
    """A body as text: by its byte order mark, the charset of its header, that of an HTML `<meta>`, as UTF-8, or else as
    Windows-1252. Never fails; only charsets of the web are obeyed."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    found = _META_CHARSET.search(body[:4096]) if html else None
    for declared in (charset, found and found.group(1).decode("ascii")):
        with suppress(LookupError, ValueError):
            codec = codecs.lookup(declared or "").name
            if codec == "iso8859-1":  # the web means Windows-1252 by it
                codec = "cp1252"
            if _WEB_CODECS.fullmatch(codec):
                return body.decode(codec, "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")


class Converter:
    """Turns bodies into text; `workers` processes at most, started when needed. Belongs to one event loop."""

    def __init__(self, *, workers: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        """
        Raises:
            ConverterMissing: crawl4ai or pypdf is not installed.
        """
        for name in ("crawl4ai", "pypdf"):
            if importlib.util.find_spec(name) is None:
                raise ConverterMissing(f"{name} is not installed: pip install -e '.[browse]'")
        self.timeout_s = timeout_s
        self.starts = 0
        """Processes started so far."""
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._slots = asyncio.Semaphore(workers)
        self._ends: set[asyncio.Task[None]] = set()

    async def convert(self, body: bytes | str, content_type: str, *, charset: str | None, url: str) -> PageContent:
        """The text of a body that came from `url` (to which its links are relative).

        Args:
            body: as it was sent, without transfer and content encoding; or a document that is text already.
            content_type: lower case, without parameters.

        Raises:
            ToolFailure: `execution` if it cannot be converted, `timeout` if that takes too long, `blocked` for a type
                that has no text.
        """
        kind = content_type
        if kind in PDF_TYPES or (isinstance(body, bytes) and body[:5] == b"%PDF-"):
            assert isinstance(body, bytes)
            return await self._in_worker({"kind": "pdf", "url": url}, body)
        if kind in HTML_TYPES:
            text = body if isinstance(body, str) else decode(body, charset, html=True)
            return await self._in_worker({"kind": "html", "url": url}, text.encode("utf-8", "replace"))
        if is_text(kind):
            text = body if isinstance(body, str) else decode(body, charset)
            return PageContent(text[:MAX_CHARS].strip())
        raise ToolFailure(f"the page is no text but {kind}", ToolErrorKind.BLOCKED)

    async def _in_worker(self, job: dict[str, str], body: bytes) -> PageContent:
        async with self._slots:
            worker = self._idle.pop() if self._idle else None
            if worker is None or not worker.alive:
                if worker is not None:
                    self._end(worker)
                self.starts += 1
                worker = _Worker()
            self._busy.add(worker)
            fit = False
            try:
                if not worker.ready:
                    await asyncio.wait_for(worker.start(), START_TIMEOUT_S)
                answer = await asyncio.wait_for(worker.ask(job, body), self.timeout_s)
                fit = True
            except TimeoutError:
                raise ToolFailure("the page takes too long to read", ToolErrorKind.TIMEOUT) from None
            except (OSError, EOFError, ValueError):
                raise ToolFailure("the page cannot be read: it is too large or broken") from None
            finally:
                self._busy.discard(worker)
                if fit:
                    self._idle.append(worker)
                else:  # a deadline, a cancellation or a crash: it may still be at work
                    self._end(worker)
        if "error" in answer:
            raise ToolFailure(str(answer["error"]))
        return PageContent(str(answer["text"]), str(answer["title"]))

    def _end(self, worker: _Worker) -> None:
        task = asyncio.create_task(worker.aclose())
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def aclose(self) -> None:
        """Ends all processes. Idempotent."""
        for worker in [*self._idle, *self._busy]:
            self._end(worker)
        self._idle.clear()
        while self._ends:
            await asyncio.wait(self._ends)


class _Worker:
    """One process of `tools/text_worker.py`: a line of JSON and a body in, a line of JSON out."""

    def __init__(self) -> None:
        self.ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._transports: list[asyncio.BaseTransport] = []

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        to_worker, from_us = os.pipe()
        to_us, from_worker = os.pipe()
        folder = tempfile.mkdtemp(prefix="distill-gym-text-")
        try:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own program; it starts at once
                [
                    *keeper.COMMAND,
                    "--grace=0.01",
                    f"--remove={folder}",
                    f"--pipes={to_worker},{from_worker}",
                    *(sys.executable, "-P", str(WORKER), str(MEMORY_BYTES), str(MAX_CHARS)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(to_worker, from_worker),
                env={name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
                | {"HOME": folder, "TMPDIR": folder, "CRAWL4_AI_BASE_DIRECTORY": folder, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            for fd in (from_us, to_us):
                os.close(fd)
            raise
        finally:
            os.close(to_worker)
            os.close(from_worker)
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(limit=8 * MAX_CHARS)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(to_us, "rb", buffering=0)
        )
        self._transports.append(reading)
        writing, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop), os.fdopen(from_us, "wb", buffering=0)
        )
        self._transports.append(writing)
        self._writer = asyncio.StreamWriter(writing, protocol, None, loop)
        await self._line()  # it says that it is ready
        self.ready = True

    async def ask(self, job: dict[str, str], body: bytes) -> dict[str, Any]:
        self._writer.write(json.dumps(job | {"bytes": len(body)}).encode() + b"\n" + body)
        await self._writer.drain()
        return await self._line()

    async def _line(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def aclose(self) -> None:
        for transport in self._transports:
            if isinstance(transport, asyncio.WriteTransport) and not transport.is_closing():
                transport.abort()
            transport.close()
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.to_thread(process.wait)
