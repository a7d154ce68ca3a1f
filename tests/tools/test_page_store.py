"""The page store: replay is closed, record is append-only and replays to the byte."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tools.pages import Page, PageStore, PageStoreError, canonical_url, read_pages, write_pages
from tools.types import ToolErrorKind, ToolFailure

A = Page(url="https://registry.test/a", body="<p>ä\n\u2028 A</p>", fetched_at="2026-01-01T00:00:00Z")
B = Page(url="https://registry.test/b?x=1", body="B", final_url="https://registry.test/B", content_type="text/plain")


class Web:
    """A fetcher that answers from memory and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, url: str) -> Page:
        self.asked.append(url)
        await asyncio.sleep(0.001)
        if url.endswith("/missing"):
            raise ToolFailure("status 404", ToolErrorKind.NOT_FOUND)
        return Page(url=url, body=f"{len(self.asked)} {url} ü")


async def test_replay_from_memory_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pages.jsonl"
    assert write_pages(path, [A, B]) == 2
    for store in (PageStore([A, B]), PageStore(path), PageStore(str(path))):
        assert len(store) == 2
        assert await store.get("HTTPS://Registry.test:443/a#part") == A
        assert await store.get("https://registry.test/B") == B  # where a redirect ended
        assert list(store) == [A, B]
    assert list(path.parent.iterdir()) == [path]


async def test_a_miss_in_replay_is_not_found() -> None:
    with pytest.raises(ToolFailure, match="no page at https://") as caught:
        await PageStore([A]).get("https://registry.test/zzz")
    assert caught.value.kind is ToolErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    "url",
    [
        "", "/a", "a", "file:///etc/passwd", "data:text/html,x", "javascript:alert(1)", "ftp://host/x", "gopher://host/",
        "view-source:https://registry.test/a", "blob:https://registry.test/a", "about:blank", "raw:x", "chrome://version",
        "https://", "https:///a", "https://user@registry.test/a", "https://user:pw@registry.test/a",
        "https://registry.test/a\\@127.0.0.1/", "https://registry.test/\x00", "https://registry.test/a\r\nX: y",
        "https://registry.test/a b", "https://registry.test:99999/", "https://registry.test:x/", "https://[bad/",
        "https://registry.test/" + "x" * 1_000_000,
    ],
    ids=lambda url: url[:30],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["live", "record", "replay"])
async def test_what_is_no_web_url_is_refused_before_anything_is_asked(url: str, mode: str) -> None:
    web = Web()
    with pytest.raises(ToolFailure) as caught:
        await PageStore([A], mode, web).get(url)  # type: ignore[arg-type]
    assert caught.value.kind is ToolErrorKind.INVALID_ARGUMENTS
    assert len(str(caught.value)) < 200
    assert web.asked == []


def test_canonical_urls() -> None:
    assert canonical_url(" HTTP://Host:80 ") == "http://host/"
    assert canonical_url("https://host:8443/A?q=1&r=#f") == "https://host:8443/A?q=1&r="
    assert canonical_url("https://[::1]/") == "https://[::1]/"
    assert canonical_url(canonical_url("https://H/x")) == canonical_url("https://H/x")


async def test_record_then_replay_to_the_byte(tmp_path: Path) -> None:
    path, web = tmp_path / "pages.jsonl", Web()
    store = PageStore(path, "record", web)
    empty = store.manifest_hash
    urls = [f"https://registry.test/{i % 5}" for i in range(20)]
    recorded = await asyncio.gather(*(store.get(url) for url in urls))
    assert len(web.asked) == 5  # one fetch a page, however many ask
    with pytest.raises(ToolFailure, match="404"):
        await store.get("https://registry.test/missing")
    written = path.read_bytes()
    assert store.manifest_hash != empty

    again = PageStore(path, "record", web)
    assert [await again.get(url) for url in urls] == recorded
    assert (path.read_bytes(), len(web.asked)) == (written, 6)

    replay = PageStore(path)
    assert [await replay.get(url) for url in urls] == recorded
    assert replay.manifest_hash == store.manifest_hash == again.manifest_hash


async def test_live_fetches_every_time() -> None:
    web = Web()
    store = PageStore([A], "live", web)
    assert (await store.get(A.url)).body != (await store.get(A.url)).body
    assert len(web.asked) == 2


def test_modes_that_fetch_need_a_fetcher() -> None:
    with pytest.raises(ValueError, match="needs fetch="):
        PageStore([], "live")
    with pytest.raises(ValueError, match="mode must be"):
        PageStore([], "offline")  # type: ignore[arg-type]


def test_replay_of_no_file() -> None:
    with pytest.raises(FileNotFoundError):
        PageStore("/nowhere/pages.jsonl")


def test_the_manifest_hash_is_of_what_pages_answer() -> None:
    later = Page(url=A.url, body=A.body, fetched_at="2027-01-01T00:00:00Z")
    assert PageStore([A, B]).manifest_hash == PageStore([B, later]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([A, B]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body="other")]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body=A.body, status=404)]).manifest_hash


async def test_a_torn_last_line_is_dropped_and_mended(tmp_path: Path) -> None:
    path, web = tmp_path / "pages.jsonl", Web()
    write_pages(path, [A, B])
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = list(PageStore(path))
        store = PageStore(path, "record", web)
        assert list(store) == kept
        await store.get("https://registry.test/new")
        assert [page.url for page in read_pages(path)] == [*(page.url for page in kept), "https://registry.test/new"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[]", "at least url and body"),
        ('{"url": "https://a.test/"}', "at least url and body"),
        ('{"url": "https://a.test/", "body": 3}', "body must be str, found int"),
        ('{"url": "https://a.test/", "body": "", "status": true}', "status must be int, found bool"),
        ('{"url": "https://a.test/", "body": "", "extra": 1}', "unknown key 'extra'"),
        ('{"url": "/a", "body": ""}', "only http and https"),
        ('{"url": "https://a.test/", "body": "x", "sha256": "00"}', "sha256 is 00"),
        ('{"url": "https://a.test/", "body": "\\ud800"}', "no Unicode"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "pages.jsonl"
    good = json.dumps({"url": A.url, "body": A.body})
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(PageStoreError, match=words) as caught:
        PageStore(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    write_pages(path, [A])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_pages(path, [B, "no page"])  # type: ignore[list-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
