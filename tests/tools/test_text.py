"""Bodies as text, by the real crawl4ai and pypdf in their process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tools.text import Converter, decode
from tools.types import ToolErrorKind, ToolFailure

URL = "http://site.example.com/a/p"


@pytest.fixture
async def converter() -> AsyncIterator[Converter]:
    made = Converter(workers=1)
    yield made
    await made.aclose()


async def test_html_becomes_markdown_with_absolute_links(converter: Converter) -> None:
    html = """<title>A &amp; B</title><base href=/b/><h1>Head</h1><p>a <b>bold</b> <a href="y?q=(1)">link</a>
    <script>no()</script><table><tr><th>Arm</th><th>N</th></tr><tr><td>1</td><td>20</td></tr></table>"""
    content = await converter.convert(html, "text/html", charset=None, url=URL)
    assert content.title == "A & B"
    assert content.text == (
        "# Head\na **bold** [link](http://site.example.com/b/y?q=%281%29)\n| Arm  | N  |\n| --- | --- |\n| 1  | 20  |"
    )


async def test_broken_and_deep_documents_are_answered_and_cost_no_process(converter: Converter) -> None:
    for html in ("", "   ", "<", "<div>" * 100_000 + "deep", "<table>" * 5000, "\x00\ufffe", "<p>\ud800"):
        content = await converter.convert(html, "text/html", charset=None, url=URL)
        assert "Error" not in content.text
    for body in (b"%PDF-1.4 nothing", b"%PDF-", b"%PDF-1.7\n" + b"\xff" * 1000):
        with pytest.raises(ToolFailure) as caught:
            await converter.convert(body, "application/pdf", charset=None, url=URL)
        assert caught.value.kind is ToolErrorKind.EXECUTION
    assert converter.starts == 1


async def test_what_takes_too_long_is_ended_and_the_next_page_is_read(converter: Converter) -> None:
    await converter.convert("<p>warm", "text/html", charset=None, url=URL)
    converter.timeout_s = 0.3
    with pytest.raises(ToolFailure) as caught:
        await converter.convert("<p>x <a href=y>z</a></p>" * 100_000, "text/html", charset=None, url=URL)
    assert caught.value.kind is ToolErrorKind.TIMEOUT
    converter.timeout_s = 20.0
    reading = asyncio.create_task(
        converter.convert("<p>x <a href=y>z</a></p>" * 100_000, "text/html", charset=None, url=URL)
    )
    await asyncio.sleep(0.1)
    reading.cancel()
    assert (await converter.convert("<p>fine", "text/html", charset=None, url=URL)).text == "fine"


async def test_json_and_plain_text_are_as_they_are(converter: Converter) -> None:
    for kind in ("application/json", "text/plain", "application/ld+json", ""):
        content = await converter.convert(b' {"a": "\xc3\xa9"}\n', kind, charset=None, url=URL)
        assert content.text == '{"a": "é"}'
    with pytest.raises(ToolFailure) as caught:
        await converter.convert(b"GIF89a", "image/gif", charset=None, url=URL)
    assert caught.value.kind is ToolErrorKind.BLOCKED
    assert converter.starts == 0


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        ("é".encode(), None, "é"),
        (b"\xe9\x80", None, "é€"),
        (b"\xe9", "latin1", "é"),
        ("é".encode("utf-16"), None, "é"),
        ("日本".encode("shift_jis"), "Shift_JIS", "日本"),
        (b'<meta charset="windows-1251">\xc6', None, '<meta charset="windows-1251">Ж'),
        (b"a", "punycode", "a"),
        (b"a", "no-such-charset", "a"),
        (b"\xff", "utf-8", "\ufffd"),
    ],
)
def test_charsets(body: bytes, charset: str | None, text: str) -> None:
    assert decode(body, charset, html=True) == text
