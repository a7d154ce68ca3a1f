"""All rows of some runs, in memory and in a cache file.

The cache lies under the user's cache folder, never in the run. It may be deleted at any time: a row is a line's byte
offset and what the list shows of it, and is read again from the line. Files only grow, so what was read stays read;
a file that became shorter, or was changed without growing, is read from its start.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent_loop.view.rows import Row, key_of, read_row

VERSION = 1
"""Of the cache: goes up with `Row` and with what its fields mean."""

MAX_LINE = 256 * 1024 * 1024
"""Bytes of a line that are read; a longer one is a row with a problem."""

NOT_EPISODES = ("metrics.jsonl", "evals.jsonl")

_TABLES = """
CREATE TABLE IF NOT EXISTS file (
    run TEXT, name TEXT, size INT, mtime INT, scanned INT, lines INT, PRIMARY KEY (run, name)
);
CREATE TABLE IF NOT EXISTS row (run TEXT, name TEXT, line INT, body BLOB);
CREATE INDEX IF NOT EXISTS row_of ON row (run, name);
"""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/distill-gym/view`, or that under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "distill-gym" / "view"


@dataclass(slots=True)
class _File:
    """What was read of one episode file."""

    size: int = 0
    mtime: int = 0
    scanned: int = 0
    """Bytes up to the last complete line."""
    lines: int = 0


class Index:
    """The rows of the runs, in the order of their files.

    Args:
        runs: run directories, folders of episode files or single files.
        cache: folder of the cache file.

    Raises:
        FileNotFoundError: a run is not there.
    """

    def __init__(self, runs: list[Path], cache: Path) -> None:
        self.roots = [run.resolve(strict=True) for run in runs]
        self.version = 0
        """Goes up whenever rows changed."""
        self._complete: dict[tuple[int, str], list[Row]] = {}
        self._torn: dict[tuple[int, str], Row] = {}
        self._files: dict[tuple[int, str], _File] = {}
        self._by_key: dict[str, Row] = {}
        self._rows: list[Row] = []
        self._lock = threading.Lock()
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = hashlib.sha256("\0".join([str(VERSION), *map(str, self.roots)]).encode()).hexdigest()[:24]
        self._database = _open(cache / f"{name}.sqlite")
        self._load()
        self.refresh()

    def rows(self) -> list[Row]:
        """All rows; the list is never changed, a refresh makes another."""
        return self._rows

    def row(self, key: str) -> Row | None:
        return self._by_key.get(key)

    def raw(self, row: Row) -> bytes:
        """The line's bytes.

        Raises:
            FileNotFoundError: the file is gone, or is no file of the run any more.
        """
        path = dict(self._paths(row.run)).get(row.file)
        if path is None:
            raise FileNotFoundError(f"{row.file} is no episode file of the run any more")
        with path.open("rb") as file:
            file.seek(row.offset)
            return file.read(row.length)

    def path(self, row: Row) -> Path:
        """The row's file, for reading at its offset."""
        root = self.roots[row.run]
        return root if root.is_file() else _folder(root) / row.file

    def refresh(self) -> bool:
        """Read what was appended since; True if rows changed."""
        with self._lock:
            changed = False
            for run in range(len(self.roots)):
                for name, path in self._paths(run):
                    changed |= self._read_file(run, name, path)
            if changed:
                self._database.commit()
                self._gather()
            return changed

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _paths(self, run: int) -> Iterator[tuple[str, Path]]:
        root = self.roots[run]
        if root.is_file():
            yield root.name, root
            return
        for path in sorted(_folder(root).glob("*.jsonl")):
            # a link that leads out of the run is no file of it
            if path.name not in NOT_EPISODES and path.is_file() and path.resolve().is_relative_to(root):
                yield path.name, path

    def _read_file(self, run: int, name: str, path: Path) -> bool:
        known = self._files.setdefault((run, name), _File())
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (known.size, known.mtime):
            return False
        where = (str(self.roots[run]), name)
        if stat.st_size < known.scanned or stat.st_size == known.size:
            known.scanned = known.lines = 0
            self._complete.pop((run, name), None)
            self._database.execute("DELETE FROM row WHERE run = ? AND name = ?", where)
        rows = self._complete.setdefault((run, name), [])
        torn = None
        with path.open("rb") as file:
            file.seek(known.scanned)
            while raw := file.readline(MAX_LINE):
                row = self._row_of(raw, run=run, name=name, known=known)
                if not raw.endswith(b"\n") and len(raw) == MAX_LINE:
                    row.length += _skip_line(file)
                    row.problem = f"the line is longer than {MAX_LINE // 1024**2} MiB"
                elif not raw.endswith(b"\n"):
                    torn = row if raw.strip() else None
                    break
                known.scanned, known.lines = known.scanned + row.length, known.lines + 1
                if raw.strip():
                    rows.append(row)
                    self._database.execute("INSERT INTO row VALUES (?, ?, ?, ?)", (*where, row.line, _pack(row)))
        if torn is None:
            self._torn.pop((run, name), None)
        else:
            self._torn[run, name] = torn
        known.size, known.mtime = stat.st_size, stat.st_mtime_ns
        self._database.execute(
            "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)",
            (*where, known.size, known.mtime, known.scanned, known.lines),
        )
        return True

    def _row_of(self, raw: bytes, *, run: int, name: str, known: _File) -> Row:
        key = key_of(str(self.roots[run]), name, known.scanned)
        return read_row(raw, key=key, run=run, file=name, line=known.lines + 1, offset=known.scanned)

    def _gather(self) -> None:
        rows: list[Row] = []
        for where in sorted(self._files):
            rows += self._complete.get(where, [])
            if where in self._torn:
                rows.append(self._torn[where])
        self._by_key = {row.key: row for row in rows}
        self._rows = rows
        self.version += 1

    def _load(self) -> None:
        numbers = {str(root): run for run, root in enumerate(self.roots)}
        decoder = msgspec.msgpack.Decoder(Row)
        for run, name, size, mtime, scanned, lines in self._database.execute("SELECT * FROM file"):
            present = dict(self._paths(numbers[run]))
            if name in present:
                # a torn end is no row of the cache: it is read again
                known = _File(size=size, mtime=mtime if size == scanned else 0, scanned=scanned, lines=lines)
                self._files[numbers[run], name] = known
                if size != scanned:
                    known.size = scanned - 1
        for run, name, body in self._database.execute("SELECT run, name, body FROM row ORDER BY run, name, line"):
            if (numbers[run], name) in self._files:
                self._complete.setdefault((numbers[run], name), []).append(decoder.decode(body))
        self._gather()


_PACK = msgspec.msgpack.Encoder()


def _pack(row: Row) -> bytes:
    return _PACK.encode(row)


def _folder(root: Path) -> Path:
    return root / "episodes" if (root / "episodes").is_dir() else root


def _skip_line(file: object) -> int:
    """Read to the end of the line; how many bytes that was."""
    skipped = 0
    while part := file.readline(1024 * 1024):  # type: ignore[attr-defined]
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _open(path: Path) -> sqlite3.Connection:
    """The cache file; one that cannot be read is made anew."""
    for attempt in (1, 2):
        database = sqlite3.connect(path, check_same_thread=False)
        try:
            database.executescript(_TABLES)
            database.execute("PRAGMA quick_check(1)")
            return database
        except sqlite3.DatabaseError:
            database.close()
            if attempt == 2:
                raise
            path.unlink()
    raise AssertionError("not reached")
