"""A folder of pages: an index that only grows, and one compressed file for each different body or text.

    index.jsonl           one page a line: its row without body and text, with their hashes
    objects/ab/abcd...gz  what hashes to abcd... (SHA-256 of the UTF-8), gzip

Several processes may record into one folder at once: lines are appended under a lock of the index, and who has lost
the race for a key takes what the winner stored. Objects are written first and whole, so that an index never names what
is not there.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import logging
import os
import tempfile
import threading
import zlib
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tools.pages import Page, PageStoreError, answer_hash, checked_key, checked_row, index_row, page_of_index

logger = logging.getLogger(__name__)

INDEX, OBJECTS = "index.jsonl", "objects"
MAX_OBJECT_BYTES = 64 * 2**20
"""Uncompressed. More is not read: a folder may come from somebody else."""
CACHED_PAGES = 256


class _Entry(NamedTuple):
    row: dict[str, Any]
    where: str
    """File and line, for messages."""


class PageFolder:
    """The index in memory, bodies and texts on the disk. `tools.store.Pages` says what the methods do."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """
        Args:
            write: the folder need not be there; the first page makes it. A torn last line is mended then.

        Raises:
            PageStoreError: a broken line of the index, or an object that is missing.
            FileNotFoundError: no such folder, and `write` is false.
        """
        self.path = path
        self.answers: list[bytes] = []
        self._write = write
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._by_final_url: dict[str, str] = {}
        self._cache: OrderedDict[str, Page] = OrderedDict()
        self._read_bytes, self._num_lines = 0, 0
        index = path / INDEX
        if index.is_file():
            with open(index, "rb") as file:
                if self._take_lines(file):
                    logger.warning("%s: the last line is torn and was dropped", index)
            self._check_objects()
        elif not write:
            raise FileNotFoundError(f"no page store at {path}: a folder with {INDEX} or a file NAME.jsonl is wanted")

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Page]:
        for entry in list(self._entries.values()):
            yield page_of_index(entry.row, entry.where, self.load)

    def find(self, key: str) -> Page | None:
        with self._lock:
            if self._write and key not in self._entries:
                self._take_others()
            if key not in self._entries:
                key = self._by_final_url.get(key, "")
            entry = self._entries.get(key)
            if entry is None:
                return None
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            page = page_of_index(entry.row, entry.where, self.load)
            self._cache[key] = page
            if len(self._cache) > CACHED_PAGES:
                self._cache.popitem(last=False)
            return page

    def add(self, page: Page) -> Page:
        key = checked_key(page.url)
        self._put(page.sha256, page.body)
        row = index_row(page)
        if page.text is not None:
            self._put(row["text_sha256"], page.text)
        with self._lock, open(os.open(self.path / INDEX, os.O_RDWR | os.O_CREAT, 0o644), "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_bytes)
            torn = self._take_lines(file)
            if torn:
                self._mend(file, torn)
            if key not in self._entries:
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                file.seek(self._read_bytes)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                self._keep(line)
        found = self.find(key)
        assert found is not None
        return found

    def load(self, digest: str) -> str:
        """The text that has this hash.

        Raises:
            PageStoreError: its object is missing, broken, too large, or another text.
        """
        path = self.object_path(digest)
        try:
            packed = path.read_bytes()
        except FileNotFoundError:
            raise PageStoreError(f"{path}: missing, though the index names it") from None
        unpack = zlib.decompressobj(wbits=31)
        try:
            data = unpack.decompress(packed, MAX_OBJECT_BYTES + 1)
            if len(data) > MAX_OBJECT_BYTES:
                raise PageStoreError(f"{path}: more than {MAX_OBJECT_BYTES:,} bytes")
            if not unpack.eof:
                raise PageStoreError(f"{path}: cut off")
            text = data.decode("utf-8")
        except (zlib.error, UnicodeDecodeError) as error:
            raise PageStoreError(f"{path}: {error}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise PageStoreError(f"{path}: its content has another hash")
        return text

    def object_path(self, digest: str) -> Path:
        return self.path / OBJECTS / digest[:2] / f"{digest}.gz"

    def object_names(self) -> set[str]:
        """Hashes of all objects that are there."""
        return {path.name.removesuffix(".gz") for path in (self.path / OBJECTS).glob("??/*.gz")}

    def named_objects(self) -> dict[str, str]:
        """Hashes that the index names, and the line that names them first."""
        named: dict[str, str] = {}
        for entry in self._entries.values():
            for key in ("sha256", "text_sha256"):
                if key in entry.row:
                    named.setdefault(entry.row[key], entry.where)
        return named

    def _take_lines(self, file: IO[bytes]) -> bytes:
        """Reads whole lines from where reading ended; returns what follows the last of them."""
        for line in file:
            if not line.endswith(b"\n"):
                return line
            self._keep(line)
        return b""

    def _take_others(self) -> None:
        """What other processes have appended."""
        index = self.path / INDEX
        if index.is_file() and index.stat().st_size > self._read_bytes:
            with open(index, "rb") as file:
                file.seek(self._read_bytes)
                self._take_lines(file)

    def _keep(self, line: bytes) -> None:
        self._num_lines += 1
        self._read_bytes += len(line)
        if not line.strip():
            return
        where = f"{self.path / INDEX}:{self._num_lines}"
        try:
            row = checked_row(json.loads(line), where, index=True)
            key, final_key = checked_key(row["url"]), checked_key(row.get("final_url") or row["url"])
        except PageStoreError:
            raise
        except ValueError as error:
            raise PageStoreError(f"{where}: no entry of an index: {error}") from None
        for name in ("sha256", "text_sha256"):
            if name in row and not _is_hash(row[name]):
                raise PageStoreError(f"{where}: {name} must be 64 hexadecimal digits, found {row[name][:80]!r}")
        if key in self._entries:
            logger.warning("%s: %s is there already; its first entry counts", where, key)
            return
        self._entries[key] = _Entry(row, where)
        insort(self.answers, answer_hash(row))
        if "error" not in row:
            self._by_final_url.setdefault(final_key, key)

    def _mend(self, file: IO[bytes], torn: bytes) -> None:
        """A line whose writer died: kept if only its end is missing, else cut off. Needs the lock."""
        try:
            json.loads(torn)
        except ValueError:
            file.truncate(self._read_bytes)
            return
        file.seek(self._read_bytes + len(torn))
        file.write(b"\n")
        self._keep(torn + b"\n")

    def _check_objects(self) -> None:
        there = self.object_names()
        for digest, where in self.named_objects().items():
            if digest not in there:
                raise PageStoreError(f"{where}: names the object {digest}, which is missing: copy the whole folder")

    def _put(self, digest: str, text: str) -> None:
        """Writes an object in one go, if it is not there."""
        path = self.object_path(digest)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with open(handle, "wb") as file:
                file.write(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _is_hash(text: str) -> bool:
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text)
