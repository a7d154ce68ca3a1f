"""Rows of any table, one at a time and in constant memory: CSV, TSV, JSON, JSONL, Parquet, or a Hub data set.

Nothing is interpreted on the way: in CSV and TSV every value is the string that stands there, so "NA" stays "NA".
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from envs.converters import OptionError
from envs.dataset import kind_of, raise_error
from envs.jsonl import DECODER, MAX_ROW_BYTES, TaskError, iter_json_lines, open_checked

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
KEY_COLUMN = "_key"
"""Column of the keys of a JSON document of the shape `{key: {column: value}}`."""
_CHUNK = 2**16
_BATCH_ROWS = 256

OnBadRow = Callable[[TaskError], None]


@dataclass(frozen=True, slots=True)
class Row:
    values: dict[str, Any]
    where: str
    """Its place, for messages: `data.csv:12`, `data.parquet: row 12`."""


def iter_rows(
    source: str, *, split: str | None = None, subset: str | None = None, on_bad_row: OnBadRow = raise_error
) -> Iterator[Row]:
    """Rows of a local file, of the one data file in a folder, or of a Hub data set.

    Args:
        source: a path, or a Hub name (`openai/gsm8k`).
        split: the Hub's split (default `train`); of a folder the file with that name in its own; of a file with a
            column `split` the rows that have that value there.
        subset: the Hub's configuration (`main`).
        on_bad_row: gets rows that cannot be read; returns to skip them.

    Raises:
        TaskError: the source cannot be read at all, or is damaged beyond finding the next row.
        OptionError: no such split.
    """
    path = Path(source)
    if not path.exists() and not path.suffix and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return hub_rows(source, split=split, subset=subset)
    if subset is not None:
        raise OptionError("--subset is for data sets of the Hub, and the source is a local file")
    if path.is_dir():
        return iter_file(data_file(path, split), on_bad_row)
    rows = iter_file(path, on_bad_row)
    return rows if split is None else _of_split(rows, split, path)


def data_file(folder: Path, split: str | None = None) -> Path:
    """The data file in a folder; with a split, the one that has it as a word of its name.

    Raises:
        TaskError: there is none.
        OptionError: there are several, or none of that split.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in FORMATS)
    if not files:
        raise TaskError(str(folder), f"holds no data file ({', '.join(FORMATS)})")
    listed = ", ".join(f.name for f in files)
    if split is None:
        if len(files) > 1:
            raise OptionError(f"{folder} holds several data files; name one, or give --split: {listed}")
        return files[0]
    fitting = [f for f in files if split in re.split(r"[\W_]+", f.stem)]
    if len(fitting) != 1:
        raise OptionError(f"{folder}: {'no file' if not fitting else 'several files'} of split {split!r} in {listed}")
    return fitting[0]


def iter_file(path: Path, on_bad_row: OnBadRow = raise_error) -> Iterator[Row]:
    """Rows of one local file; its format by its ending, and by its first bytes where that says too little."""
    kind = FORMATS.get(path.suffix.lower())
    if path.is_file() and kind != "parquet":
        with open(path, "rb") as file:
            head = file.read(_CHUNK)
        if head.startswith(b"PAR1"):
            kind = "parquet"
        elif kind not in ("csv", "tsv"):
            kind = _sniff_json(head.removeprefix(b"\xef\xbb\xbf").lstrip()) or kind
    if kind == "parquet":
        return _parquet(path)
    open_checked(path).close()
    if kind is None:
        raise TaskError(str(path), f"unknown kind of file; wanted {', '.join(FORMATS)}")
    if kind == "jsonl":
        return _jsonl(path, on_bad_row)
    return _json(path) if kind == "json" else _csv(path, "\t" if kind == "tsv" else ",", on_bad_row)


def _sniff_json(head: bytes) -> str | None:
    """json or jsonl where the first bytes leave no doubt, whatever the file's name says; else None."""
    if head.startswith(b"["):
        return "json"
    first, _, rest = head.partition(b"\n")
    if first.strip() == b"{":
        return "json"
    try:
        whole = isinstance(json.loads(first), dict)
    except ValueError:
        return None
    return "jsonl" if whole and rest.strip() else None


def _of_split(rows: Iterator[Row], split: str, path: Path) -> Iterator[Row]:
    found = False
    for row in rows:
        if "split" not in row.values:
            raise OptionError(f"--split {split}: {path} has no column 'split' to choose rows by")
        if row.values["split"] == split:
            found = True
            yield row
    if not found:
        raise OptionError(f"--split {split}: no row of {path} has that in its column 'split'")


def _jsonl(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    for line, value in iter_json_lines(path):
        where = f"{path}:{line}"
        if isinstance(value, TaskError):
            on_bad_row(value)
        elif not isinstance(value, dict):
            on_bad_row(TaskError(where, f"a row must be an object, found {kind_of(value)}"))
        else:
            yield Row(value, where)


def _csv(path: Path, delimiter: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, so that one bad row does not end the file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if columns is None:
                    raise TaskError(where, f"the header cannot be read: {error}") from None
                on_bad_row(TaskError(where, f"not {'TSV' if delimiter != ',' else 'CSV'}: {error}"))
                continue
            if not cells:
                continue
            if columns is None:
                columns = _header(cells, where)
            elif len(cells) != len(columns):
                on_bad_row(TaskError(where, f"has {len(cells)} fields, but the header has {len(columns)}"))
            elif bad := next((c for c, v in zip(columns, cells, strict=True) if not _is_text(v)), None):
                on_bad_row(TaskError(where, f"the text in column {bad!r} is not UTF-8"))
            else:
                yield Row(dict(zip(columns, cells, strict=True)), where)


def _header(cells: list[str], where: str) -> list[str]:
    for name in cells:
        if not _is_text(name):
            raise TaskError(where, "the header is not UTF-8 text")
        if cells.count(name) > 1:
            raise TaskError(where, f"the column {name!r} stands twice in the header")
    return cells


def _is_text(value: str) -> bool:
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def _json(path: Path) -> Iterator[Row]:
    """Elements of a JSON array of objects, or of an object of objects, without reading the whole document."""
    with open(path, encoding="utf-8-sig") as file:
        document = _Document(file, path)
        opening = document.next_character()
        if opening not in "[{":
            raise TaskError(document.where(), "wanted an array of objects, or an object of objects")
        closing = "]" if opening == "[" else "}"
        if document.peek() != closing:
            while True:
                key = None
                if opening == "{":
                    where = document.where()
                    key = document.value()
                    if not isinstance(key, str) or document.next_character() != ":":
                        raise TaskError(where, 'not JSON: wanted "key": value')
                document.peek()
                where = document.where()
                value = document.value()
                if not isinstance(value, dict):
                    raise TaskError(where, f"a row must be an object, found {kind_of(value)}")
                yield Row(value if key is None else {KEY_COLUMN: key, **value}, where)
                mark = document.next_character()
                if mark == closing:
                    break
                if mark != ",":
                    raise TaskError(document.where(), f"not JSON: wanted ',' or {closing!r}, found {mark!r}")
        if opening == closing or document.peek():
            return


class _Document:
    """A window on a JSON text that grows only until one value is in it."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._lines = 1
        """Line of `_text[0]`."""

    def where(self) -> str:
        return f"{self._path}:{self._lines + self._text.count(chr(10), 0, self._at)}"

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._grow(_CHUNK):
                return ""

    def next_character(self) -> str:
        character = self.peek()
        if not character:
            raise TaskError(self.where(), "not JSON: the file ends in the middle")
        self._at += 1
        return character

    def value(self) -> Any:
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at < MAX_ROW_BYTES and self._grow(size):
                    size *= 2
                    continue
                line = self._lines + error.lineno - 1
                message = error.msg if error.pos < len(self._text) else "the file ends in the middle"
                raise TaskError(f"{self._path}:{line}:{error.colno}", f"not JSON: {message}") from None
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise TaskError(self.where(), f"not JSON: {why}") from None
            if end == len(self._text) and self._grow(size):  # a number may go on behind the window
                continue
            self._at = end
            return value

    def _grow(self, size: int) -> bool:
        """Drop what was read, and read `size` characters more. False at the end of the file."""
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise TaskError(self.where(), f"not UTF-8 near here: {error.reason}") from None
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TaskError(str(path), "reading Parquet needs pyarrow: pip install pyarrow") from None
    if not path.is_file():
        raise TaskError(str(path), "there is no such file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(str(path), f"not a Parquet file that can be read: {error}") from None


def hub_rows(name: str, *, split: str | None = None, subset: str | None = None) -> Iterator[Row]:
    """Rows of a Hub data set, streamed. CSV data sets are read with "NA" kept as text.

    Raises:
        TaskError: it cannot be had, for a reason that the Hub's library names.
    """
    try:
        import datasets
    except ImportError:
        raise TaskError(name, "is no local file, and Hub data sets need `datasets`: pip install datasets") from None
    split = split or "train"
    try:
        builder = datasets.load_dataset_builder(name, subset)
        # pandas reads "NA", "null" and "None" as missing unless it is told not to.
        keep = {"keep_default_na": False} if hasattr(builder.config, "keep_default_na") else {}
        rows = datasets.load_dataset(name, subset, split=split, streaming=True, **keep)
        for number, values in enumerate(rows, start=1):
            yield Row(dict(values), f"{name} ({split}): row {number}")
    except Exception as error:  # the library raises a dozen kinds: network, missing, gated, split, script, format
        first = (str(error).splitlines() or [""])[0]
        raise TaskError(
            name, f"is no local file, and as a Hub data set it cannot be read: {type(error).__name__}: {first[:300]}"
        ) from error
