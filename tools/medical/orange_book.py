"""The Orange Book: approved drugs with their companies, patents and exclusivity, from the FDA's data files.

A zip (or a folder) of products.txt, patent.txt and exclusivity.txt, `~` between fields, names of columns in the first
line: www.fda.gov/drugs/drug-approvals-and-databases/orange-book-data-files. It is read once a process; what is
recorded is what it says of a name.
"""

from __future__ import annotations

import asyncio
import difflib
import io
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tools.api import Api, Request, read_json
from tools.pages import Page, tool_key
from tools.tool import ToolContractError
from tools.types import ToolFailure

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 30_000_000
"""Of one file, unpacked; the largest, products.txt, has about 8 MB."""
MAX_PRODUCTS = 500
"""Of one name."""

Row = dict[str, str]
PRODUCT_COLUMNS = (
    "ingredient",
    "df;route",
    "trade_name",
    "applicant_full_name",
    "applicant",
    "strength",
    "appl_type",
    "appl_no",
    "product_no",
    "approval_date",
    "type",
)
_PRODUCT = ("appl_type", "appl_no", "product_no")
_COLUMNS = {
    "products.txt": PRODUCT_COLUMNS,
    "patent.txt": (*_PRODUCT, "patent_no", "patent_expire_date_text"),
    "exclusivity.txt": (*_PRODUCT, "exclusivity_code", "exclusivity_date"),
}
"""Columns that are read; files may have them in any order, and others too."""
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATE = re.compile(r"([A-Za-z]{3})[a-z]*\.? (\d{1,2}), (\d{4})")
_ISO = re.compile(r"(\d{4})(\d\d)(\d\d)")
_BETWEEN = re.compile(r"\s*(?:;|,|/|\+|\band\b)\s*", re.IGNORECASE)


class OrangeBookError(ValueError):
    """The files are broken; names file and fault."""


def day_of(text: str) -> date | None:
    """The day of `Aug 13, 2027`; None for what is no such date (`Approved Prior to Jan 1, 1982`)."""
    match = _DATE.fullmatch(text.strip())
    if match is None or match[1].lower() not in _MONTHS:
        return None
    try:
        return date(int(match[3]), _MONTHS.index(match[1].lower()) + 1, int(match[2]))
    except ValueError:
        return None


def latest(dates: Iterable[str]) -> str:
    """The latest of some dates, as it is written; "" if none of them is one."""
    days = [(day, text.strip()) for text in dates if (day := day_of(text)) is not None]
    return max(days)[1] if days else ""


def iso_date(text: str) -> str:
    """`20270813` as `2027-08-13`; anything else as it is."""
    match = _ISO.fullmatch(text)
    return "-".join(match.groups()) if match else text


@dataclass(frozen=True, slots=True)
class OrangeBook:
    """The files in memory: about 60 MB."""

    made: str
    """Day of products.txt, ISO 8601; "" if it is not known."""
    products: tuple[Row, ...]
    patents: Mapping[tuple[str, ...], list[Row]]
    """By application type, application and product."""
    exclusivities: Mapping[tuple[str, ...], list[Row]]
    """Likewise."""

    def entry(self, name: str) -> dict[str, Any]:
        """What the book says of an ingredient or a brand, in upper case: the products that fit best, with patents and
        exclusivity; if there are none, similar names. JSON values only."""
        groups: dict[int, list[Row]] = {}
        for product in self.products:
            rank = _rank(name, product)
            if rank is not None:
                groups.setdefault(rank, []).append(product)
        found = groups[min(groups)][:MAX_PRODUCTS] if groups else []
        keys = dict.fromkeys(map(product_key, found))
        return {
            "made": self.made,
            "products": found,
            "patents": [row for key in keys for row in self.patents.get(key, ())],
            "exclusivities": [row for key in keys for row in self.exclusivities.get(key, ())],
            "similar": [] if found else self._similar(name),
        }

    def _similar(self, name: str) -> list[str]:
        names = {_ingredient(row) for row in self.products} | {row["trade_name"].upper() for row in self.products}
        holding = sorted((each for each in names if name in each), key=lambda each: (len(each), each))[:5]
        return holding or difflib.get_close_matches(name, sorted(names), n=5, cutoff=0.75)


def _rank(name: str, product: Row) -> int | None:
    """How a product fits a name: 0 its ingredient, or a salt of it; 1 its brand; 2 one of its ingredients; 3 the
    first words of its brand. None: not at all."""
    ingredient, brand = _ingredient(product), product["trade_name"].upper()
    parts = ingredient.split("; ")
    if name == ingredient or (len(parts) == 1 and ingredient.startswith(f"{name} ")):
        return 0
    asked = _BETWEEN.split(name)
    if len(asked) == len(parts) > 1 and all(_is_of(a, b) for a, b in zip(sorted(asked), sorted(parts), strict=True)):
        return 0
    if name == brand:
        return 1
    if any(_is_of(name, part) for part in parts):
        return 2
    return 3 if brand.startswith(f"{name} ") else None


def _is_of(name: str, ingredient: str) -> bool:
    return ingredient == name or ingredient.startswith(f"{name} ")


def _ingredient(product: Row) -> str:
    return "; ".join(" ".join(part.split()) for part in product["ingredient"].upper().split(";") if part.strip())


def product_key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(column, "") for column in _PRODUCT)


def read_orange_book(source: bytes | Path) -> OrangeBook:
    """The book of a zip's bytes, of a zip, or of a folder of its files.

    Raises:
        OrangeBookError: no zip, a file is missing, too large, or lacks a column.
        OSError: the path cannot be read.
    """
    if isinstance(source, Path) and source.is_dir():
        made = ""
        texts = {name: _file_of_folder(source, name) for name in _COLUMNS}
    else:
        made, texts = _unzipped(source if isinstance(source, bytes) else source.read_bytes())
    tables = {name: list(_rows(name, texts.pop(name))) for name in _COLUMNS}
    return OrangeBook(
        made, tuple(tables["products.txt"]), _by_product(tables["patent.txt"]), _by_product(tables["exclusivity.txt"])
    )


def _file_of_folder(folder: Path, name: str) -> str:
    paths = [path for path in folder.iterdir() if path.name.lower() == name]
    if not paths:
        raise OrangeBookError(f"{folder}: no {name} in it")
    if paths[0].stat().st_size > MAX_FILE_BYTES:
        raise OrangeBookError(f"{paths[0]}: larger than {MAX_FILE_BYTES} bytes")
    return _decoded(paths[0].read_bytes())


def _unzipped(data: bytes) -> tuple[str, dict[str, str]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.rpartition("/")[2].lower(): info for info in archive.infolist()}
            texts = {name: _member(archive, members.get(name), name) for name in _COLUMNS}
            year, month, day = members["products.txt"].date_time[:3]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise OrangeBookError(f"the Orange Book's zip is broken: {type(error).__name__}") from None
    return f"{year:04}-{month:02}-{day:02}", texts


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, name: str) -> str:
    if info is None:
        raise OrangeBookError(f"the Orange Book's zip has no {name}")
    with archive.open(info) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OrangeBookError(f"{name} in the Orange Book's zip is larger than {MAX_FILE_BYTES} bytes")
    return _decoded(data)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _rows(name: str, text: str) -> Iterator[Row]:
    """The rows with the columns that are read; those that are too short are left out."""
    lines = text.splitlines()
    header = [column.strip().lower() for column in lines[0].split("~")] if lines else []
    missing = [column for column in _COLUMNS[name] if column not in header]
    if missing:
        raise OrangeBookError(f"{name} of the Orange Book has no column {missing[0]!r}; its first line names them")
    places = {column: header.index(column) for column in _COLUMNS[name]}
    for each in lines[1:]:
        values = each.split("~")
        if len(values) > max(places.values()):
            yield {column: " ".join(values[place].split()) for column, place in places.items()}


def _by_product(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(product_key(row), []).append(row)
    return found


class OrangeBookSource:
    """The book, from a path or downloaded, and what was recorded of it.

    Raises:
        OrangeBookError: no such path, and the store does not only replay.
    """

    def __init__(self, api: Api, source: str | Path) -> None:
        self._api = api
        self._source: str | Path = source
        if not str(source).startswith(("http://", "https://")):
            self._source = Path(source)
            if api.store.mode != "replay" and not self._source.exists():
                raise OrangeBookError(f"orange_book: there is no {source}; name the FDA's zip, or its folder")

    async def find(self, name: str) -> tuple[dict[str, Any], Page]:
        """The entry of a name in upper case (`OrangeBook.entry`), and the page it is stored as.

        Raises:
            ToolFailure: the files cannot be had.
            ToolContractError: those at the path are broken.
        """
        key = tool_key("drug.orange_book", {"name": name})

        async def fetch() -> Page:
            entry = await asyncio.to_thread((await self._book()).entry, name)
            fetched_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            body = json.dumps(entry, ensure_ascii=False)
            return Page(url=key, body=body, content_type="application/json", fetched_at=fetched_at)

        page = await self._api.store.recall(key, fetch)
        return read_json(page.body), page

    async def _book(self) -> OrangeBook:
        where = str(self._source)
        lock = _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:  # one download, however many episodes ask at once
            if where not in _books:
                _books[where] = await self._read()
        return _books[where]

    async def _read(self) -> OrangeBook:
        if isinstance(self._source, Path):
            try:
                return await asyncio.to_thread(read_orange_book, self._source)
            except (OrangeBookError, OSError) as error:
                raise ToolContractError(f"{self._source}: {error}") from None
        fetched = await self._api.fetch(Request(url=self._source))
        try:
            return await asyncio.to_thread(read_orange_book, fetched.body)
        except OrangeBookError as error:
            logger.warning("%s; give the path of a copy of your own", error)
            raise ToolFailure("the Orange Book's files cannot be read; try part approvals") from None


_books: dict[str, OrangeBook] = {}
"""By address or path."""
_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
