"""Full-text search over a set of documents in memory: BM25, with exact matches first.

Scores follow Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), eq. 3.15, with
the idf of Lucene, log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

K1 = 1.2
B = 0.75
TITLE_WEIGHT = 3
"""A word in the title counts as this many in the text."""
SNIPPET_CHARS = 160

_WORD = re.compile(r"\w+")


class Document(NamedTuple):
    url: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    url: str
    title: str
    snippet: str
    """Text around the first word found, in one line, at most `SNIPPET_CHARS` characters."""
    score: float
    """BM25; hits that match exactly stand before others whatever their score. Of a search service: 1 / its rank."""


@dataclass(frozen=True, slots=True)
class _Entry:
    document: Document
    title: str
    """Normalised words, one space between them."""
    text: str
    """Likewise."""
    identifiers: frozenset[str]
    """Words with a digit in title and URL, and the URL's last part."""
    length: int
    """Words, the title's counted `TITLE_WEIGHT` times."""


def words(text: str) -> list[str]:
    """Words in lower case without accents; underscores part words."""
    if not text.isascii():
        text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return _WORD.findall(text.casefold().replace("_", " "))


class SearchIndex:
    """Built once, then read only. 1,000 documents of 300 words take about 0.2 s to build and 1 ms to search."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._entries: list[_Entry] = []
        self._postings: dict[str, list[tuple[int, int]]] = {}
        for document in documents:
            title, text = words(document.title), words(document.text)
            counts = Counter(text)
            for word in title:
                counts[word] += TITLE_WEIGHT
            for word, count in counts.items():
                self._postings.setdefault(word, []).append((len(self._entries), count))
            path = unquote(urlsplit(document.url).path)
            last = " ".join(words(path.rstrip("/").rpartition("/")[2]))
            named = {word for word in (*title, *words(path)) if _is_identifier(word)}
            self._entries.append(
                _Entry(document, " ".join(title), " ".join(text), frozenset(named | {last} - {""}), counts.total())
            )
        total = sum(entry.length for entry in self._entries)
        self._mean_length = total / len(self._entries) if total else 1.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def documents(self) -> tuple[Document, ...]:
        return tuple(entry.document for entry in self._entries)

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The `k` best documents that hold a word of the query. Order: title or identifier equal to the query, an
        identifier of the query in title or URL, the query as a phrase in the title, then in the text, then BM25;
        equal ones by URL."""
        wanted = words(query)
        scores: dict[int, float] = {}
        for word in dict.fromkeys(wanted):
            postings = self._postings.get(word, ())
            idf = math.log(1 + (len(self._entries) - len(postings) + 0.5) / (len(postings) + 0.5))
            for index, count in postings:
                norm = K1 * (1 - B + B * self._entries[index].length / self._mean_length)
                scores[index] = scores.get(index, 0.0) + idf * count * (K1 + 1) / (count + norm)
        phrase = " ".join(wanted)
        identifiers = {word for word in wanted if _is_identifier(word)}
        for index, entry in enumerate(self._entries if phrase else ()):
            # An identifier may stand in the URL only, where BM25 does not look.
            if index not in scores and (phrase in entry.identifiers or identifiers & entry.identifiers):
                scores[index] = 0.0
        ranked = sorted(
            scores,
            key=lambda index: (
                -_exactness(phrase, identifiers, self._entries[index]),
                -scores[index],
                self._entries[index].document.url,
            ),
        )
        return [self._hit(index, scores[index], wanted) for index in ranked[: max(k, 0)]]

    def _hit(self, index: int, score: float, wanted: list[str]) -> Hit:
        document = self._entries[index].document
        return Hit(document.url, document.title, _snippet(document.text, wanted), score)


def _is_identifier(word: str) -> bool:
    """A word such as `nct01234567` or `17054321`: a digit in it and at least five characters (no year, no dose)."""
    return len(word) >= 5 and any(char.isdigit() for char in word)


def _exactness(phrase: str, identifiers: set[str], entry: _Entry) -> int:
    if phrase == entry.title or phrase in entry.identifiers:
        return 4
    if identifiers & entry.identifiers:
        return 3
    if " " in phrase:
        if f" {phrase} " in f" {entry.title} ":
            return 2
        if f" {phrase} " in f" {entry.text} ":
            return 1
    return 0


def _snippet(text: str, wanted: list[str]) -> str:
    lowered = text.casefold()
    found = [match.start() for word in wanted if (match := re.search(rf"\b{re.escape(word)}\b", lowered))]
    # Case folding may change lengths, so the place is only about right; a snippet need not be more.
    start = max(0, min(found, default=0) - SNIPPET_CHARS // 4)
    piece = " ".join(text[start : start + 2 * SNIPPET_CHARS].split())
    return piece if len(piece) <= SNIPPET_CHARS else piece[: SNIPPET_CHARS - 3] + "..."
