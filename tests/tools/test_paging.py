"""Pages by tokens and numbered links."""

from __future__ import annotations

import base64
import json
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.paging import Document, approximate_tokens, paginate

BASE = "https://registry.test/trial/1"


def cut(text: str, page_tokens: int = 200, page_chars: int = 2000) -> Document:
    return paginate(text, BASE, page_tokens=page_tokens, page_chars=page_chars)


def test_links_are_numbered_and_listed() -> None:
    document = cut(
        'See [The *trial*](/t "Title") and [again](https://REGISTRY.test/t#part), [a [b] c](../x_(1)), [[1]](<y>).\n'
        "Not: ![picture](p.png) [mail](mailto:a@b.c) [top](#top) [self](/trial/1#x) [](/empty) [js](javascript:x()) "
        "[user](https://a@b.test/) [![logo](l.png)](/home) text [3] and [no](link\n"
    )
    (page,) = document.pages
    assert page.text == (
        "See The *trial* [1] and again [1], a [b] c [2], [1] [3].\n"
        "Not: picture mail top self  js user logo [4] text [3] and [no](link"
    )
    assert document.links == (
        "https://registry.test/t",
        "https://registry.test/x_(1)",
        "https://registry.test/trial/y",
        "https://registry.test/home",
    )
    assert document.listing(1).splitlines()[3] == "[4] https://registry.test/home"


def test_each_page_lists_its_own_links() -> None:
    text = "".join(f"Line {i} with [link {i}](/{i}).\n" for i in range(60))
    document = cut(text)
    assert len(document.links) == 60
    assert len(document.pages) > 3
    assert [n for page in document.pages for n in page.links] == list(range(1, 61))
    for number, page in enumerate(document.pages, start=1):
        shown = f"{page.text}\n{document.listing(number)}"
        assert approximate_tokens(shown) <= 200
        assert [f"[{n}]" for n in page.links] == re.findall(r"\[\d+\]", page.text)
        assert all(line.endswith(".") for line in page.text.splitlines())  # cut between lines


def test_a_number_is_that_of_a_link_even_where_a_page_writes_numbers_itself() -> None:
    document = cut("As shown [2], [2] \ue0007\ue001 and [real](/r)")
    assert document.pages[0].text == "As shown [2], [2] 7 and real [1]"
    assert document.pages[0].links == (1,)


def test_a_very_long_url_has_a_number_but_is_not_spelt_out() -> None:
    document = cut(f"[a](/{'x' * 1500})")
    assert document.links[0].endswith("x" * 1500)
    assert len(document.listing(1)) < 400


def test_an_empty_text_is_one_page() -> None:
    assert cut("") == cut("\n\n\n".strip()) == Document(cut("").pages, ())
    assert cut("").pages[0].text == ""


@pytest.mark.parametrize(
    "text",
    ["[", "[a](", "![a](", "[a](b", "[[a]", "[a](http://x ", "[a]((b)", "[x](<", "a", "é", "\n", " ", "[a](/b)", "1"],
)
def test_hostile_markdown_takes_linear_time(text: str) -> None:
    whole = text * (1_000_000 // len(text))
    began = time.process_time()
    document = cut(whole, 1500, 8000)
    assert time.process_time() - began < 10
    assert all(len(page.text) <= 8000 for page in document.pages)


@given(st.text("ab \n[](/)x1\u00e4", max_size=600), st.integers(200, 300), st.integers(300, 500))
def test_pages_hold_the_whole_text_within_their_limits(text: str, page_tokens: int, page_chars: int) -> None:
    document = cut(text, page_tokens, page_chars)
    for number, page in enumerate(document.pages, start=1):
        assert approximate_tokens(page.text) + approximate_tokens(document.listing(number)) <= page_tokens + 2
        assert len(page.text) + len(document.listing(number)) <= page_chars
    whole = cut(text, 100_000, 1_000_000)
    assert len(whole.pages) == 1
    assert "".join("".join(page.text.split()) for page in document.pages) == "".join(whole.pages[0].text.split())


@given(st.text(max_size=200), st.text(max_size=200))
def test_tokens_of_two_texts_are_about_those_of_both(one: str, two: str) -> None:
    apart = approximate_tokens(one) + approximate_tokens(two)
    assert abs(approximate_tokens(f"{one}\n{two}") - apart) <= 6


@pytest.mark.shared_data
def test_tokens_against_the_tokenizer_of_qwen3(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers" / "qwen3" / "tokenizer.json"))

    def ratio(text: str) -> float:
        return approximate_tokens(text) / len(tokenizer.encode(text, add_special_tokens=False).ids)

    papers = list(json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text()).values())
    rng = random.Random(0)
    abstracts = [ratio("\n".join(paper["CONTEXTS"])) for paper in papers]
    assert 0.95 < sum(abstracts) / len(abstracts) < 1.15
    assert min(abstracts) > 0.75
    assert max(abstracts) < 1.3
    usual = {
        "json": "\n".join(json.dumps(paper) for paper in papers[:20]),
        "table": "".join(f"| Placebo | {rng.random():.4f} | Aug {rng.randrange(28)}, 2031 |\n" for _ in range(50)),
        "urls": "".join(f"[{i}] https://clinicaltrials.gov/study/NCT{rng.randrange(10**8):08d}\n" for i in range(30)),
        "code": Path(__file__).read_text(),
        "capitals": "ASTELLAS PHARMA US INC, BRISTOL MYERS SQUIBB CO, DAPAGLIFLOZIN PROPANEDIOL; METFORMIN. " * 5,
        "hexadecimal": "".join(f"{rng.getrandbits(256):064x}\n" for _ in range(20)),
    }
    for name, text in usual.items():
        assert 0.75 < ratio(text) < 1.25, name
    scripts = {
        "German": "Die klinische Prüfung wurde gemäß den Richtlinien durchgeführt; Überlebensraten blieben gleich. "
        * 5,
        "Chinese": "临床试验是在人体上进行的医学研究，旨在评估新药或治疗方法的安全性和有效性。" * 5,
        "Japanese": "臨床試験は新しい薬の有効性と安全性を確かめるために行われます。" * 5,
        "Russian": "Клиническое исследование показало, что препарат снижает смертность у пациентов. " * 5,
        "Arabic": "أظهرت الدراسة السريرية أن الدواء الجديد يقلل معدل الوفيات مقارنة بالدواء الوهمي. " * 5,
    }
    for name, text in scripts.items():
        assert 0.8 < ratio(text) < 1.35, name
    assert ratio(base64.b64encode(rng.randbytes(2000)).decode()) > 0.7
