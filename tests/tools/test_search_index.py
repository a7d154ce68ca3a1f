"""Search: exact matches first, then BM25, always in the same order."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.search import K1, SNIPPET_CHARS, B, Document, SearchIndex, words


def doc(name: str, title: str, text: str = "") -> Document:
    return Document(f"https://registry.test/{name}", title, text)


def names(index: SearchIndex, query: str, k: int = 5) -> list[str]:
    return [hit.url.rpartition("/")[2] for hit in index.search(query, k)]


def test_bm25_by_hand() -> None:
    index = SearchIndex([doc("a", "", "cat cat dog"), doc("b", "", "dog bird")])
    (hit,) = index.search("cat")
    idf = math.log(1 + (2 - 1 + 0.5) / 1.5)
    assert hit.score == pytest.approx(idf * 2 * (K1 + 1) / (2 + K1 * (1 - B + B * 3 / 2.5)))


def test_rare_words_and_short_texts_score_higher() -> None:
    index = SearchIndex(
        [doc("long", "", "drug " + "filler " * 50), doc("short", "", "drug trial"), doc("c", "", "trial")]
    )
    assert names(index, "drug") == ["short", "long"]
    assert names(index, "drug trial")[0] == "short"


def test_exact_matches_stand_first() -> None:
    index = SearchIndex(
        [
            doc("x1", "Review of aspirin, aspirin and aspirin", "aspirin " * 20),
            doc("x2", "Aspirin"),
            doc("x3", "Low dose aspirin trial", "other"),
            doc("x4", "Something", "a low dose aspirin trial was low"),
        ]
    )
    assert names(index, "aspirin")[0] == "x2"
    assert names(index, "low dose aspirin trial")[:2] == ["x3", "x4"]


def test_identifiers_are_found_in_title_and_url() -> None:
    index = SearchIndex(
        [
            doc("other", "Mentions", "NCT00000001 " * 10),
            doc("NCT00000001", "A trial of something"),
            doc("z", "Trial NCT00000001"),
        ]
    )
    assert names(index, "nct00000001") == ["z", "NCT00000001", "other"]
    assert names(index, "who sponsors NCT00000001?")[:2] == ["z", "NCT00000001"]


def test_nothing_found() -> None:
    index = SearchIndex([doc("a", "Alpha", "text")])
    assert index.search("omega") == index.search("") == index.search("?!") == index.search("alpha", 0) == []
    assert SearchIndex([]).search("alpha") == []
    assert SearchIndex([doc("a", "")]).search("alpha") == []


def test_accents_case_and_underscores_do_not_matter() -> None:
    assert words("Crème_BRÛLÉE, Straße") == ["creme", "brulee", "strasse"]
    assert names(SearchIndex([doc("a", "Sjögren's")]), "SJOGREN") == ["a"]


def test_snippets_are_short_and_show_the_word() -> None:
    (hit,) = SearchIndex([doc("a", "T", "filler\n" * 200 + "the needle is here " + "more " * 200)]).search("needle")
    assert "needle" in hit.snippet
    assert len(hit.snippet) <= SNIPPET_CHARS
    assert "\n" not in hit.snippet


@given(st.lists(st.text("ab 1", max_size=12), max_size=12), st.text("ab 1", max_size=6), st.randoms())
def test_order_does_not_depend_on_the_order_of_documents(texts: list[str], query: str, rng: random.Random) -> None:
    documents = [doc(str(i), text[:4], text) for i, text in enumerate(texts)]
    first = SearchIndex(documents).search(query, 20)
    rng.shuffle(documents)
    second = SearchIndex(documents).search(query, 20)
    assert [hit.url for hit in first] == [hit.url for hit in second]


def test_small_and_large_indices_are_fast() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(3000)]
    documents = [
        doc(str(i), " ".join(rng.sample(vocabulary, 6)), " ".join(rng.choices(vocabulary, k=250))) for i in range(1000)
    ]
    started = time.process_time()
    index = SearchIndex(documents)
    built_s = time.process_time() - started
    started = time.process_time()
    for _ in range(50):
        index.search("word1 word20 word300 word77", 5)
    searched_s = (time.process_time() - started) / 50
    small = [doc(str(i), f"Trial {i}", "one two three four five six " * 5) for i in range(10)]
    started = time.process_time()
    for _ in range(20):
        SearchIndex(small)
    small_s = (time.process_time() - started) / 20
    print(f"build {built_s:.3f} s, search {searched_s * 1e3:.2f} ms, 10 pages {small_s * 1e3:.2f} ms")
    assert built_s < 2
    assert searched_s < 0.02
    assert small_s < 0.005
