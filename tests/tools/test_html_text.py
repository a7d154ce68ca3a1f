"""Pages as a model reads them."""

from __future__ import annotations

import time

import pytest

from tools.html import CACHE_PAGES, Link, _cache, html_to_text, short_url

BASE = "https://registry.test/trial/NCT1"


def text_of(body: str, base: str = BASE) -> str:
    return html_to_text(f"<html><head><title>T</title></head><body>{body}</body></html>", base).text


def test_a_whole_page() -> None:
    page = html_to_text(
        """<!doctype html><html><head><title> Trial
        NCT1 </title><style>p {color: red}</style></head><body>
        <header><h1>The registry</h1></header><nav><a href="/">Home</a></nav>
        <main><header><h1>Trial NCT1</h1></header>
          <p>A <b>phase 2</b> study of <a href="/drug/abc#top">Abc</a> by <a href="https://other.test/x">Co</a>.</p>
          <table><tr><th>Sponsor</th><td><a href="../company/acme">Acme</a></td></tr>
            <tr><th>Phase:</th><td>2</td></tr></table>
          <table><tr><th>Year</th><th>Price</th><th>Unit</th></tr><tr><td>2020</td><td>3</td><td>mg</td></tr></table>
          <dl><dt>Start</dt><dd>May 2020</dd><dt>End</dt><dd>June 2021</dd></dl>
          <ul><li>one</li><li>two<ul><li>three</li></ul></li></ul>
          <script>track()</script><aside>Buy now</aside>
        </main><footer>Imprint</footer></body></html>""",
        BASE,
    )
    assert page.title == "Trial NCT1"
    assert page.text == (
        "# Trial NCT1\n\n"
        "A **phase 2** study of [Abc](/drug/abc) by [Co](https://other.test/x).\n\n"
        "Sponsor: [Acme](/company/acme)\nPhase: 2\n\n"
        "| Year | Price | Unit |\n| --- | --- | --- |\n| 2020 | 3 | mg |\n\n"
        "Start: May 2020\nEnd: June 2021\n\n"
        "- one\n- two\n  - three"
    )
    assert page.links == (Link("Abc", "/drug/abc"), Link("Co", "https://other.test/x"), Link("Acme", "/company/acme"))


@pytest.mark.parametrize(
    ("url", "short"),
    [
        ("/a?b=c#d", "/a?b=c"),
        ("b", "/trial/b"),
        ("?page=2", "/trial/NCT1?page=2"),
        ("https://registry.test/x", "/x"),
        ("http://registry.test/x", "http://registry.test/x"),
        ("https://registry.test:8443/x", "https://registry.test:8443/x"),
        ("//other.test/x", "https://other.test/x"),
        ("https://registry.test//x", "https://registry.test//x"),
        ("/a b(c)", "/a%20b%28c%29"),
        ("/%C3%A4/ä", "/%C3%A4/%C3%A4"),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ("mailto:a@b", None),
        ("file:///etc/passwd", None),
        ("https://user:pw@host/x", None),
        ("http://[bad", None),
    ],
)
def test_links_are_short_and_unambiguous(url: str, short: str | None) -> None:
    assert short_url(url, BASE) == short


def test_links_that_lead_nowhere_are_text() -> None:
    assert (
        text_of('<p><a href="javascript:x()">run</a> <a href="#top">up</a> <a>none</a> <a href="">x</a></p>')
        == "run up none x"
    )


def test_a_base_element_counts() -> None:
    assert html_to_text('<base href="/deep/er/"><a href="x">x</a>', BASE).text == "[x](/deep/er/x)"


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>evil</p>",
        '<p aria-hidden="true">evil</p>',
        '<p style="display: none">evil</p>',
        '<p style="VISIBILITY:hidden">evil</p>',
        '<p style="font-size:0">evil</p>',
        "<!-- evil -->",
        "<template>evil</template>",
        "<noscript>evil</noscript>",
        "<div role=navigation>evil</div>",
        "<form>evil</form>",
    ],
)
def test_what_a_reader_does_not_see_is_dropped(hidden: str) -> None:
    assert text_of(f"<p>good</p>{hidden}") == "good"


def test_hidden_characters_are_cleaned_also_as_entities() -> None:
    body = "<p>a&#8203;b\u200bc\u202ed&#x202e;e\x00&#27;[31m \u2066f</p><a href='/x\u200by'>l&#8203;k</a>"
    page = html_to_text(f"<title>t&#8203;\u200bt</title>{body}", BASE)
    assert page.title == "tt"
    assert not set(page.text + page.links[0].text) & set("\u200b\u202e\x00\x1b\u2066")
    assert page.text.startswith("abcde")
    assert "[lk](/xy)" in page.text


def test_no_runs_of_blank_lines() -> None:
    text = text_of("<p>a</p>" + "<br>" * 20 + "<div></div>" * 20 + "<p>b   c</p>\n\n\n\n<p> </p><p>d</p>")
    assert text.replace("\n\n", "\n") == "a\nb c\nd"
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    "html",
    [
        "",
        "   ",
        "plain",
        "https://a.test/",
        "a.html",
        "<?xml version='1.0'?><feed><x/></feed>",
        "<![CDATA[x]]>",
        "<?php x ?>",
        "<",
        "<a href='http://[bad'>z</a>",
        "<a href=x><a href=y>n</a></a>",
        "<div>" * 50_000 + "x",
        "<table>" * 3000 + "x",
        "<ul><li>" * 3000,
        "\x00\ud800",
        "<td>x</td><tr><dd>y",
        "<p>" + "x" * 3_000_000,
    ],
    ids=lambda html: html[:20] or "empty",
)
def test_broken_pages_are_read_in_bounded_time(html: str) -> None:
    started = time.perf_counter()
    page = html_to_text(html, BASE)
    assert time.perf_counter() - started < 15
    assert len(page.text) <= 2_000_000
    page.text.encode()


def test_title_from_the_heading_where_there_is_none() -> None:
    assert html_to_text("<h1>Head <i>line</i></h1>", BASE).title == "Head line"


def test_the_cache_is_keyed_by_content_and_base() -> None:
    html = "<main><a href='x'>x</a></main>"
    first = html_to_text(html, BASE)
    assert html_to_text(html, BASE) is first
    assert html_to_text(html, "https://registry.test/a/b/").text == "[x](/a/b/x)"
    assert len(_cache) <= CACHE_PAGES


def test_ten_kilobytes_take_milliseconds() -> None:
    html = "<main>" + "".join(f"<p>Paragraph {i} with <a href='/d/{i}'>link {i}</a> and words.</p>" for i in range(150))
    html_to_text(html, BASE)
    took = []
    for i in range(5):
        started = time.process_time()
        html_to_text(html + str(i), BASE)
        took.append(time.process_time() - started)
    assert min(took) < 0.05  # 7 ms here; room for slow machines


def test_a_page_without_a_body_tag_is_read() -> None:
    page = html_to_text("<title>T</title><nav>n</nav><main><h1>H</h1><p>words</p></main>", "https://a.example/")
    assert page.title == "T"
    assert page.text == "# H\n\nwords"
