"""Lines of JSON read strictly, and files written whole: what task files, page files and converters share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is refused: it is a file without line breaks, not a row."""
_BOM = b"\xef\xbb\xbf"
_FOREIGN = (
    (b"\x1f\x8b", "gzip-compressed; unpack it first (gunzip FILE)"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"PAR1", "a Parquet file; make tasks of it with convert_dataset.py"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)


class TaskError(ValueError):
    """A task file or a row of one that cannot be used. The text begins with the place: `tasks.jsonl:12: ...`."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where
        self.message = message


def iter_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """`(line number, value)` of each line that is not blank; the value is a `TaskError` where the line is bad.

    Raises:
        TaskError: the file as a whole cannot be read.
    """
    with open_checked(path) as file:
        line = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_BYTES)
                yield line, TaskError(f"{path}:{line}", f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
            elif raw.strip():
                yield line, _parse_line(raw, f"{path}:{line}")


def open_checked(path: str | Path) -> BinaryIO:
    """Open a text file for reading as bytes, after its byte-order mark.

    Raises:
        TaskError: missing, a directory, empty, compressed or in another encoding.
    """
    where = str(path)
    try:
        if os.path.isdir(path):
            raise TaskError(where, "is a directory; name a file in it")
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        raise TaskError(where, "there is no such file") from None
    except OSError as error:
        raise TaskError(where, f"cannot be read: {error.strerror}") from None
    head = file.read(4)
    foreign = [f"is {why}" for magic, why in _FOREIGN if head.startswith(magic)]
    if foreign or not head:
        file.close()
        raise TaskError(where, foreign[0] if foreign else "the file is empty")
    file.seek(len(_BOM) if head.startswith(_BOM) else 0)
    return file


def _parse_line(raw: bytes, where: str) -> Any:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return TaskError(f"{where}:{error.start + 1}", f"not UTF-8: byte 0x{raw[error.start]:02x}")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        hint = ""
        if not raw.endswith(b"\n"):
            hint = " (the file ends here without a line end: was its writer stopped?)"
        elif text.lstrip().startswith("["):
            hint = " (one JSON document over many lines? convert_dataset.py reads those)"
        return TaskError(f"{where}:{error.colno}", f"not JSON: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return TaskError(where, f"not JSON: {message}")


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice in an object.

    Raises:
        ValueError: what is wrong; `json.JSONDecodeError` where a position is known.
    """
    return DECODER.decode(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; write null or a string")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return values


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when the block ends without an exception, and leaves nothing otherwise.

    Raises:
        OSError: `path` is something other than a plain file, or the disk's own.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} exists and is not a plain file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
