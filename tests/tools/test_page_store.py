"""The page store: replay is closed, record is append-only and replays to the byte."""

from __future__ import annotations

import asyncio
import gzip
import json
import multiprocessing
from pathlib import Path

import pytest

from tools.pages import Page, PageError, PageStoreError, canonical_url, kept_headers, read_pages, tool_key, write_pages
from tools.pages_cli import main
from tools.store import Mode, PageStore
from tools.tool import ToolContractError
from tools.types import ToolErrorKind, ToolFailure

A = Page(url="https://registry.test/a", body="<p>ä\n\u2028 A</p>", fetched_at="2026-01-01T00:00:00Z")
B = Page(url="https://registry.test/b?x=1", body="B", final_url="https://registry.test/B", content_type="text/plain")


REDIRECTED = Page(
    url="https://registry.test/old", body="<p>moved</p>", final_url="https://registry.test/new", text="moved",
    title="New", headers={"etag": "x"}, hops=("https://registry.test/old",), fetched_at="2026-01-02T00:00:00Z",
)  # fmt: skip
FAILED = Page(
    url="https://registry.test/slow", body="", status=0, error=PageError(kind="timeout", message="no answer in 20 s")
)
SEARCHED = Page(url=tool_key("search", {"query": "ü", "num": 5}), body='["hit"]', content_type="application/json")
EVERY = [A, B, REDIRECTED, FAILED, SEARCHED]


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
async def test_what_is_no_web_url_is_refused_before_anything_is_asked(url: str, mode: Mode) -> None:
    web = Web()
    with pytest.raises(ToolFailure) as caught:
        await PageStore([A], mode).get(url, web)
    assert caught.value.kind is ToolErrorKind.INVALID_ARGUMENTS
    assert len(str(caught.value)) < 200
    assert web.asked == []


def test_canonical_urls() -> None:
    assert canonical_url(" HTTP://Host:80 ") == "http://host/"
    assert canonical_url("https://host:8443/A?q=1&r=#f") == "https://host:8443/A?q=1&r="
    assert canonical_url("https://[::1]/") == "https://[::1]/"
    assert canonical_url(canonical_url("https://H/x")) == canonical_url("https://H/x")


@pytest.mark.parametrize("name", ["pages.jsonl", "pages"])
async def test_record_then_replay_to_the_byte(tmp_path: Path, name: str) -> None:
    path, web = tmp_path / name, Web()
    store = PageStore(path, "record")
    empty = store.manifest_hash
    urls = [f"https://registry.test/{i % 5}" for i in range(20)]
    recorded = await asyncio.gather(*(store.get(url, web) for url in urls))
    assert len(web.asked) == 5  # one fetch a page, however many ask
    for _ in range(2):
        with pytest.raises(ToolFailure, match="404"):
            await store.get("https://registry.test/missing", web)
    assert len(web.asked) == 6  # a failure is stored too
    written = contents(path)
    assert store.manifest_hash != empty

    again = PageStore(path, "record")
    assert [await again.get(url, web) for url in urls] == recorded
    assert (contents(path), len(web.asked)) == (written, 6)

    replay = PageStore(path)
    assert [await replay.get(url) for url in urls] == recorded
    with pytest.raises(ToolFailure, match="404") as caught:
        await replay.get("https://registry.test/missing")
    assert caught.value.kind is ToolErrorKind.NOT_FOUND
    assert replay.manifest_hash == store.manifest_hash == again.manifest_hash
    assert contents(path) == written


def contents(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("name", ["pages.jsonl", "pages"])
async def test_what_a_tool_asked_is_recalled_by_its_key(tmp_path: Path, name: str) -> None:
    asked = []

    async def ask() -> Page:
        asked.append(1)
        return Page(url="https://search.test/?key=secret", body="[1]", content_type="application/json")

    key = tool_key("search", {"query": "a b", "num": 5})
    assert key == tool_key("search", {"num": 5, "query": "a b"}) == 'tool:search?{"num":5,"query":"a b"}'
    store = PageStore(tmp_path / name, "record")
    pages = [await store.recall(key, ask) for _ in range(3)]
    replayed = await PageStore(tmp_path / name).recall(key, ask)
    assert asked == [1]
    assert [*pages, replayed] == [Page(url=key, body="[1]", content_type="application/json")] * 4
    with pytest.raises(ToolFailure, match="not recorded") as caught:
        await PageStore(tmp_path / name).recall(tool_key("search", {"query": "c"}), ask)
    assert caught.value.kind is ToolErrorKind.NOT_FOUND
    with pytest.raises(ToolFailure):  # a model's URL cannot reach what tools asked
        await store.get(key)


async def test_no_secret_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "sk-very-secret-1234")

    async def echo(url: str) -> Page:
        if url.endswith("/fail"):
            raise ToolFailure("bad key sk-very-secret-1234")
        return Page(url=url, body="you sent sk-very-secret-1234", text="sk-very-secret-1234")

    store = PageStore(tmp_path / "pages", "record")
    assert (await store.get("https://a.test/", echo)).body == "you sent [redacted]"
    with pytest.raises(ToolFailure, match=r"bad key \[redacted\]"):
        await store.get("https://a.test/fail", echo)
    for data in contents(tmp_path / "pages").values():
        assert b"very-secret" not in (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)


async def test_a_cancelled_episode_leaves_no_entry_and_no_lock(tmp_path: Path) -> None:
    started = asyncio.Event()

    async def hang(url: str) -> Page:
        started.set()
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    store, web = PageStore(tmp_path / "pages", "record"), Web()
    assert not (tmp_path / "pages").exists()  # the first page makes it
    task = asyncio.create_task(store.get(A.url, hang))
    await started.wait()
    waiting = asyncio.create_task(store.get(A.url, web))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await waiting).url == A.url
    assert len(PageStore(tmp_path / "pages")) == 1


async def test_live_fetches_every_time() -> None:
    web = Web()
    store = PageStore([A], "live")
    assert (await store.get(A.url, web)).body != (await store.get(A.url, web)).body
    assert len(web.asked) == 2


async def test_modes_that_fetch_need_a_fetcher() -> None:
    with pytest.raises(ToolContractError, match="nothing to fetch with"):
        await PageStore([], "live").get(A.url)
    with pytest.raises(ValueError, match="mode must be"):
        PageStore([], "offline")  # type: ignore[arg-type]


async def test_a_bug_in_a_fetcher_is_not_recorded(tmp_path: Path) -> None:
    async def broken(url: str) -> Page:
        raise KeyError(url)

    store = PageStore(tmp_path / "pages", "record")
    with pytest.raises(KeyError):
        await store.get(A.url, broken)
    assert not (tmp_path / "pages").exists()


def test_replay_of_no_file() -> None:
    for path in ("/nowhere/pages.jsonl", "/nowhere/pages"):
        with pytest.raises(FileNotFoundError):
            PageStore(path)


def test_the_manifest_hash_is_of_what_pages_answer() -> None:
    later = Page(url=A.url, body=A.body, fetched_at="2027-01-01T00:00:00Z")
    assert PageStore([A, B]).manifest_hash == PageStore([B, later]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([A, B]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body="other")]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body=A.body, status=404)]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body=A.body, text="A")]).manifest_hash
    assert PageStore([A]).manifest_hash != PageStore([Page(url=A.url, body=A.body, title="A")]).manifest_hash
    assert (
        PageStore([A]).manifest_hash == PageStore([Page(url=A.url, body=A.body, headers={"etag": "1"})]).manifest_hash
    )


async def test_a_torn_last_line_is_dropped_and_mended(tmp_path: Path) -> None:
    path, web = tmp_path / "pages.jsonl", Web()
    write_pages(path, [A, B])
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = list(PageStore(path))
        store = PageStore(path, "record")
        assert list(store) == kept
        await store.get("https://registry.test/new", web)
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
        ('{"url": "https://a.test/", "body": "", "text": null}', "text must be str, found NoneType"),
        ('{"url": "https://a.test/", "body": "", "headers": {"etag": 1}}', "headers must hold strings"),
        ('{"url": "https://a.test/", "body": "", "headers": {"set-cookie": "a"}}', "'set-cookie' is not kept"),
        ('{"url": "https://a.test/", "body": "", "hops": [1]}', "hops must hold strings"),
        ('{"url": "https://a.test/", "body": "", "error": {"kind": "odd", "message": ""}}', "unknown kind 'odd'"),
        ('{"url": "https://a.test/", "body": "", "error": {"kind": "timeout"}}', "message"),
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


def test_headers_that_are_kept() -> None:
    sent = {"Content-Type": "text/html; charset=x", "Set-Cookie": "id=1", "ETag": "e", "Server": "s"}
    assert kept_headers(sent) == {"content-type": "text/html; charset=x", "etag": "e"}
    with pytest.raises(PageStoreError, match="'set-cookie' is not kept"):
        Page(url=A.url, body="", headers={"set-cookie": "id=1"})


# The folder


def folder_of(path: Path, pages: list[Page]) -> Path:
    write_pages(path.with_suffix(".jsonl"), pages)
    assert main(["export", str(path.with_suffix(".jsonl")), "--out", str(path)]) == 0
    return path


def test_a_folder_and_a_file_hold_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pages", EVERY)
    assert list(PageStore(folder)) == list(PageStore(tmp_path / "pages.jsonl")) == EVERY
    assert main(["export", str(folder), "--out", str(tmp_path / "back.jsonl")]) == 0
    assert (tmp_path / "back.jsonl").read_bytes() == (tmp_path / "pages.jsonl").read_bytes()
    hashes = {PageStore(path).manifest_hash for path in (folder, tmp_path / "pages.jsonl", tmp_path / "back.jsonl")}
    assert len(hashes) == 1
    twin = folder_of(tmp_path / "twin", EVERY)
    assert contents(twin) == contents(folder)


async def test_a_folder_answers_as_a_file_does(tmp_path: Path) -> None:
    store = PageStore(folder_of(tmp_path / "pages", EVERY))
    assert await store.get("https://registry.test/new") == REDIRECTED
    assert await store.get("https://registry.test/old#x") == REDIRECTED
    with pytest.raises(ToolFailure, match="no answer in 20 s") as caught:
        await store.get(FAILED.url)
    assert caught.value.kind is ToolErrorKind.TIMEOUT


async def test_the_first_entry_of_a_key_stands_for_all_processes(tmp_path: Path) -> None:
    one, two = PageStore(tmp_path / "pages", "record"), PageStore(tmp_path / "pages", "record")

    async def first(url: str) -> Page:
        return Page(url=url, body="first")

    async def second(url: str) -> Page:
        if url.endswith("/race"):  # the other process was faster
            await one.get(url, first)
        return Page(url=url, body="second")

    await one.get("https://a.test/known", first)
    assert (await two.get("https://a.test/known", second)).body == "first"
    assert (await two.get("https://a.test/race", second)).body == "first"
    assert (await two.get("https://a.test/new", second)).body == "second"
    assert (await one.get("https://a.test/new", first)).body == "second"
    assert one.manifest_hash == two.manifest_hash == PageStore(tmp_path / "pages").manifest_hash


def _record(path: str, name: str) -> None:
    async def fetch(url: str) -> Page:
        return Page(url=url, body=f"{name} {url} " * 200)

    async def work() -> None:
        store = PageStore(path, "record")
        await asyncio.gather(*(store.get(f"https://a.test/{i}", fetch) for i in range(60)))

    asyncio.run(work())


def test_processes_that_record_into_one_folder_do_not_harm_it(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_record, args=(str(tmp_path / "pages"), name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    lines = (tmp_path / "pages" / "index.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["url"] for line in lines) == sorted(f"https://a.test/{i}" for i in range(60))
    assert main(["verify", str(tmp_path / "pages")]) == 0


@pytest.mark.parametrize("cut", [1, 40, -1])
async def test_a_torn_line_of_an_index_is_dropped_and_mended(tmp_path: Path, cut: int) -> None:
    folder = folder_of(tmp_path / "pages", [A, B])
    index = folder / "index.jsonl"
    whole = index.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    index.write_bytes(whole[: -len(last)] + last[:cut])
    kept = list(PageStore(folder))
    assert kept == [A]
    store = PageStore(folder, "record")
    await store.get("https://a.test/new", Web())
    urls = [page.url for page in PageStore(folder)]
    assert urls == [A.url, *([B.url] if cut == -1 else []), "https://a.test/new"]
    assert list(store) == list(PageStore(folder))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "no entry of an index"),
        (b"[]", "at least url and sha256"),
        (b'{"url": "https://a.test/", "sha256": "../../etc/passwd"}', "64 hexadecimal digits"),
        (b'{"url": "ftp://a.test/", "sha256": "00"}', "only http and https"),
        (b'{"url": "https://a.test/", "sha256": "00", "body": ""}', "unknown key 'body'"),
        (b'{"url": "https://a.test/", "sha256": "' + b"0" * 64 + b'"}', "which is missing"),
        (b"\xff\xfe", "no entry of an index"),
    ],
)
def test_a_broken_line_of_an_index_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    folder = folder_of(tmp_path / "pages", [A])
    with open(folder / "index.jsonl", "ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(PageStoreError, match=words) as caught:
        PageStore(folder)
    assert f"{folder / 'index.jsonl'}:3: " in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"plain", "incorrect header"),
        (gzip.compress(b"other"), "another hash"),
        (gzip.compress(b"x" * 1000)[:-12], "cut off"),
        (gzip.compress(b"\xff"), "codec can't decode"),
        (gzip.compress(gzip.compress(bytes(80 * 2**20))), "codec can't decode"),
        (gzip.compress(bytes(80 * 2**20)), "more than 67,108,864 bytes"),
    ],
    ids=["plain", "other", "cut", "no text", "twice", "bomb"],
)
async def test_a_broken_object_is_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, words: str
) -> None:
    folder = folder_of(tmp_path / "pages", [A])
    (path,) = (folder / "objects").glob("??/*.gz")
    path.write_bytes(data)
    with pytest.raises(ToolContractError, match=words):
        await PageStore(folder).get(A.url)
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 4
    assert str(path) in capsys.readouterr().err


# The command line


def test_verify_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "pages", EVERY)
    stray = folder / "objects" / "00" / f"{'0' * 64}.gz"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"")
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    assert "note: 1 objects" in (printed := capsys.readouterr().out)
    assert f"5 pages, all as they were stored; manifest {PageStore(folder).manifest_hash}" in printed
    assert main(["stats", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pages"] == 5
    assert summary["statuses"] == {"200": 4, "timeout": 1}
    assert summary["hosts"] == {"registry.test": 4, "tool:search": 1}
    assert (summary["first_fetched"], summary["last_fetched"]) == (A.fetched_at, REDIRECTED.fetched_at)
    assert main(["stats", str(folder)]) == 0
    assert "registry.test 4, tool:search 1" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "none")]) == 4
    assert "no page store at" in capsys.readouterr().err


def test_export_without_failures(tmp_path: Path) -> None:
    folder_of(tmp_path / "pages", EVERY)
    out = str(tmp_path / "good.jsonl")
    assert main(["export", str(tmp_path / "pages"), "--without-failures", "--out", out]) == 0
    assert list(PageStore(out)) == [A, B, REDIRECTED, SEARCHED]
    assert main(["export", str(tmp_path / "pages"), "--out", out]) == 4  # nothing is overwritten


def test_merge_tells_conflicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_b = Page(url=B.url, body="another B")
    later_a = Page(url=A.url, body=A.body, fetched_at="2027-01-01T00:00:00Z")
    folder_of(tmp_path / "one", [A, B])
    write_pages(tmp_path / "two.jsonl", [later_a, other_b, FAILED])
    capsys.readouterr()
    for name in ("all", "all.jsonl"):
        assert main(["merge", str(tmp_path / "one"), str(tmp_path / "two.jsonl"), "--out", str(tmp_path / name)]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("conflict: ") == 1
        assert f"conflict: {B.url}: {tmp_path / 'two.jsonl'} answers otherwise" in printed.err
        assert "3 pages, 1 conflicts" in printed.out
        assert list(PageStore(tmp_path / name)) == [A, B, FAILED]


def test_an_empty_store_is_one_too() -> None:
    assert PageStore(())
    assert len(PageStore(())) == 0
