"""Which URLs and addresses may be reached."""

from __future__ import annotations

import asyncio
import ipaddress
import random
from collections.abc import Sequence

import pytest
from yarl import URL

from tools.guard import Guard, is_ours
from tools.types import ToolErrorKind, ToolFailure

PUBLIC = ("93.184.216.34", "1.1.1.1", "8.8.8.8", "2606:4700::1111", "2001:4860:4860::8888", "64:ff9b::808:808",
          "::ffff:8.8.8.8", "168.63.129.15", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1")  # fmt: skip
NOT_PUBLIC = (
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::a9fe:a9fe", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1",
    "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::", "2002:808:808::", "2001::1", "2001:db8::1", "3fff::1", "fc00::1",
    "fd12::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1", "100::1",
)  # fmt: skip


def answering(*addresses: str) -> Guard:
    async def resolver(host: str) -> Sequence[str]:
        return addresses

    return Guard(resolver=resolver)


@pytest.mark.parametrize("address", PUBLIC)
async def test_public_addresses_are_open(address: str) -> None:
    guard = answering(address)
    assert await guard.resolve(guard.check_url("https://example.org/")) == (address,)


@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_no_other_address_is_behind_whatever_name(address: str) -> None:
    guard = answering(address)
    with pytest.raises(ToolFailure, match=r"example\.org is not on the public web") as raised:
        await guard.resolve(guard.check_url("https://example.org/"))
    assert raised.value.kind is ToolErrorKind.BLOCKED
    assert address not in str(raised.value)


@pytest.mark.parametrize("address", [address for address in NOT_PUBLIC if "%" not in address])
async def test_nor_in_a_url(address: str) -> None:
    guard = Guard()
    target = guard.check_url(f"http://[{address}]/" if ":" in address else f"http://{address}/")
    with pytest.raises(ToolFailure, match="not on the public web"):
        await guard.resolve(target)


async def test_one_bad_answer_among_good_ones_is_enough() -> None:
    guard = answering("8.8.8.8", "127.0.0.1")
    with pytest.raises(ToolFailure, match="not on the public web"):
        await guard.resolve(guard.check_url("https://example.org/"))


async def test_a_name_is_asked_for_once_and_what_was_answered_is_what_is_dialled() -> None:
    answers = iter([("8.8.8.8",), ("127.0.0.1",)])

    async def rebinding(host: str) -> Sequence[str]:
        return next(answers)

    guard = Guard(resolver=rebinding)
    assert await guard.resolve(guard.check_url("https://example.org/")) == ("8.8.8.8",)


async def test_names_that_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(host: str) -> Sequence[str]:
        raise OSError("no such name")

    async def slow(host: str) -> Sequence[str]:
        await asyncio.sleep(30)
        return ()

    monkeypatch.setattr("tools.guard.RESOLVE_S", 0.05)
    for resolver, kind in ((nobody, ToolErrorKind.NOT_FOUND), (slow, ToolErrorKind.TIMEOUT)):
        guard = Guard(resolver=resolver)
        with pytest.raises(ToolFailure) as raised:
            await guard.resolve(guard.check_url("https://example.org/"))
        assert raised.value.kind is kind


@pytest.mark.parametrize(
    "url",
    [
        "", "file:///etc/passwd", "data:text/html,x", "javascript:alert(1)", "ftp://example.org/", "gopher://example.org/",
        "view-source:https://example.org/", "blob:https://example.org/x", "about:blank", "raw:<html>", "chrome://version",
        "//example.org/", "example.org", "https:///x", "https://", "http://example.org\\@127.0.0.1/", "http://a b.org/",
        "https://example.org/\x00", "https://example.org/\r\nHost: x", "https://user@example.org/", "https://u:p@example.org/",
        "https://example.org:99999/", "https://example.org:x/", "http://[fe80::1%25eth0]/", "http://[::1", "http://0x7f.1/",
        "http://2130706433/", "http://127.1/", "http://017700000001/", "http://0x7f000001/", "http://127.0.0.0x1/",
        "http://0177.0.0.1/", "http://127.0.0.1.1/", "http://a..org/", "http://-a.org/", "http://localhost/",
        "http://metadata/", f"http://{'a' * 64}.org/", f"http://example.org/{'a' * 1_000_000}",
    ],
)  # fmt: skip
def test_what_is_no_url_of_the_web_is_refused_before_anything_is_resolved(url: str) -> None:
    async def resolver(host: str) -> Sequence[str]:
        raise AssertionError("resolved")

    with pytest.raises(ToolFailure) as raised:
        Guard(resolver=resolver).check_url(url)
    assert raised.value.kind is ToolErrorKind.INVALID_ARGUMENTS
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("port", [0, 22, 25, 6379, 8080, 65535])
def test_other_ports_are_refused(port: int) -> None:
    with pytest.raises(ToolFailure, match=f"port {port} may not be reached"):
        Guard().check_url(f"http://example.org:{port}/")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("HTTPS://EXAMPLE.org./a", "example.org"),
        ("https://b\u00fccher.example/", "xn--bcher-kva.example"),
        ("http://\u2460\u2461\u2466.0.0.1/", "127.0.0.1"),
        ("http://\uff11\uff12\uff17.0.0.1/", "127.0.0.1"),
        ("http://[::FFFF:8.8.8.8]/", "::ffff:808:808"),
    ],
)
async def test_a_host_is_read_as_a_browser_reads_it(url: str, host: str) -> None:
    guard = Guard()
    target = guard.check_url(url)
    assert target.host == host
    if host == "127.0.0.1":
        with pytest.raises(ToolFailure, match="not on the public web"):
            await guard.resolve(target)


def test_a_target_is_ascii() -> None:
    assert Guard().check_url("https://example.org/\u00e9?q=\u00fc#x").url == "https://example.org/%C3%A9?q=%C3%BC"


def test_domain_lists() -> None:
    guard = Guard(allow=("gov", "Example.org"), deny=("bad.gov", "example.org/Secret/of"))
    for url in ("https://clinicaltrials.gov/", "https://example.org/", "https://www.example.org/public"):
        guard.check_url(url)
    for url in ("https://example.com/", "https://notexample.org/", "https://gov.example.com/"):
        with pytest.raises(ToolFailure, match="not among the sites"):
            guard.check_url(url)
    for url in ("https://bad.gov/", "https://a.bad.gov/x", "https://example.org/secret/OF/x", "https://example.org//secret/./of",
                "https://example.org/%73ecret/of", "https://example.org/%2573ecret/x/../of"):  # fmt: skip
        with pytest.raises(ToolFailure, match="may not be opened") as raised:
            guard.check_url(url)
        assert raised.value.kind is ToolErrorKind.BLOCKED


@pytest.mark.parametrize(
    "url",
    ["https://huggingface.co/datasets/AIM-Harvard/MedBrowseComp/viewer", "https://github.com/shan23chen/MedBrowseComp",
     "https://arxiv.org/pdf/2505.14963v2", "https://moreirap12.github.io/mbc-browse-app/"],
)  # fmt: skip
def test_pages_with_the_answers_of_the_benchmark_are_denied(url: str) -> None:
    with pytest.raises(ToolFailure, match="may not be opened"):
        Guard().check_url(url)
    Guard(deny=()).check_url(url)


async def test_addresses_that_are_opened() -> None:
    guard = Guard(open_addresses=("127.0.0.1:8000", "[::1]:8001", "10.1.0.0/16"))
    for url in ("http://127.0.0.1:8000/", "http://[::1]:8001/", "http://10.1.2.3/"):
        target = guard.check_url(url)
        assert await guard.resolve(target) == (target.host,)
    for url in ("http://127.0.0.1:8001/", "http://127.0.0.1/", "http://[::1]:8000/", "http://10.2.0.1/", "http://10.1.2.3:8000/",
                "http://8.8.8.8:8000/"):  # fmt: skip
        with pytest.raises(ToolFailure, match="not on the public web"):
            await guard.resolve(guard.check_url(url))
    with pytest.raises(ToolFailure, match="port 8002"):
        guard.check_url("http://127.0.0.1:8002/")


@pytest.mark.parametrize("text", ["localhost:8000", "127.0.0.1:0", "127.0.0.1:70000", "10.0.0.0/40", "", "a.b"])
def test_what_is_no_address_cannot_be_opened(text: str) -> None:
    with pytest.raises(ValueError, match=r"open_addresses: .* is no address"):
        Guard(open_addresses=(text,))


@pytest.mark.parametrize("url", ["https://example.org/\ud800", "https://example.org/?q=\udcff"])
def test_what_is_no_unicode_is_no_url(url: str) -> None:
    with pytest.raises(ToolFailure, match="no Unicode text") as raised:
        Guard().check_url(url)
    assert raised.value.kind is ToolErrorKind.INVALID_ARGUMENTS


@pytest.mark.parametrize(("address", "ours"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False)])
def test_own_addresses_are_known(address: str, ours: bool) -> None:
    """By the routing table; nothing is sent. That a public one is refused too cannot be shown without having one."""
    assert is_ours(ipaddress.ip_address(address), 80) is ours


@pytest.mark.parametrize(
    "url",
    [
        "https://archive.example/web/2026/https://github.com/shan23chen/x",
        "https://reader.example/http%3A%2F%2Fgithub.com%2FShan23chen",
        "https://translate.example/?u=https%253A%252F%252Fgithub.com/shan23chen",
        "https://archive.example/https://shan23chen.github.io",
    ],
)
def test_nor_through_a_site_that_shows_others(url: str) -> None:
    with pytest.raises(ToolFailure, match="may not be opened"):
        Guard().check_url(url)
    assert Guard(deny=("github.com",)).check_url(url), "a whole domain may be named"


def test_what_is_checked_is_what_the_client_dials() -> None:
    """aiohttp has a parser of its own: whatever gets through ours must be the same host and port to it."""
    pieces = [
        *"a1.@:/\\?#[]%{}|^`~!$&'()*+,;=_-。①ⅷß\u200d\u00ad／＠：．\t ",
        "%2f",
        "%40",
        "%00",
        "127.0.0.1",
        "a.org",
    ]
    random_ = random.Random(1)
    accepted = 0
    for _ in range(20_000):
        host = "".join(random_.choices(pieces, k=random_.randint(1, 10)))
        try:
            target = Guard().check_url(f"http://{random_.choice(['', 'a.org', '127.0.0.1'])}{host}")
        except ToolFailure:
            continue
        accepted += 1
        dialled = URL(target.url)
        assert (dialled.scheme, dialled.raw_host, dialled.port) == (target.scheme, target.host, target.port)
        assert Guard().check_url(target.url) == target
    assert accepted > 500
