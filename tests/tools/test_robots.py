"""robots.txt: asked once, obeyed, and no weapon against us."""

from __future__ import annotations

import time

import pytest

from tests.fakes.raw_site import raw_site, reply
from tests.tools.test_fetch import client_of
from tools.rate import HostRate
from tools.robots import MAX_HOSTS, Robots
from tools.types import ToolErrorKind, ToolFailure


async def test_robots_are_asked_once_and_obeyed() -> None:
    rules = b"User-agent: *\nDisallow: /private\nUser-agent: distill-gym\nDisallow: /ours\n"
    pages = {"/robots.txt": reply(body=rules, content_type="text/plain")}
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        await client.get(site.url("/private"))
        with pytest.raises(ToolFailure, match="does not want robots") as raised:
            await client.get(site.url("/ours/x"))
    assert raised.value.kind is ToolErrorKind.BLOCKED
    assert [head.split(" ")[1] for head in site.heads] == ["/robots.txt", "/private"]


@pytest.mark.parametrize(
    ("status", "allowed"), [("404 No", True), ("403 No", True), ("500 No", False), ("429 No", False)]
)
async def test_robots_that_cannot_be_had(status: str, allowed: bool) -> None:
    async with raw_site({"/robots.txt": reply(status)}) as site, client_of(site, robots=True) as client:
        if allowed:
            assert (await client.get(site.url("/a"))).status == 200
        else:
            with pytest.raises(ToolFailure, match="left alone"):
                await client.get(site.url("/a"))


@pytest.mark.parametrize(
    "rules",
    [b"", b"\xff\xfe\x00 no text", b"Disallow /x\n:::\n" * 1000, b"User-agent: *\nAllow: /\n" + b"#" * 600_000,
     b"User-agent: *\nCrawl-delay: 1e9\n", b"User-agent: *\nCrawl-delay: -5\nDisallow: /*/*/*/*/*/*/*$\n"],
)  # fmt: skip
async def test_robots_that_are_strange_stop_nobody(rules: bytes) -> None:
    pages = {"/robots.txt": reply(body=rules, content_type="text/plain")}
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        assert (await client.get(site.url("/a"))).status == 200


async def test_a_redirect_is_asked_about_too() -> None:
    pages = {
        "/robots.txt": reply(body=b"User-agent: *\nDisallow: /b", content_type="text/plain"),
        "/a": reply("302 Found", location="/b"),
    }
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        with pytest.raises(ToolFailure, match="does not want robots"):
            await client.get(site.url("/a"))


async def test_rules_of_hosts_without_end_are_not_all_kept() -> None:
    asked: list[str] = []

    async def get_rules(url: str) -> tuple[int, bytes]:
        asked.append(url)
        return 404, b""

    robots = Robots(get_rules, HostRate(), "distill-gym")
    for number in range(MAX_HOSTS + 10):
        await robots.check(f"https://h{number}.test/")
        await robots.check("https://often.test/")
    assert len(asked) == MAX_HOSTS + 11, "the one that is used often was asked once"
    await robots.check("https://h0.test/")
    assert asked[-1] == "https://h0.test/robots.txt", "the oldest was forgotten"


async def test_rules_that_are_made_to_be_slow() -> None:
    rules = b"User-agent: *\n" + b"".join(b"Disallow: /*%sb%d$\n" % (b"a*" * 20, i) for i in range(7000))
    pages = {"/robots.txt": reply(body=rules, content_type="text/plain")}
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        began = time.monotonic()
        assert (await client.get(site.url("/" + "a" * 1800))).status == 200
        assert time.monotonic() - began < 3.0


async def test_a_robots_txt_that_is_too_long_is_read_as_far_as_it_must_be() -> None:
    rules = b"User-agent: *\nDisallow: /private\n" + b"#" * 5_000_000 + b"\nDisallow: /\n"
    pages = {"/robots.txt": reply(body=rules, content_type="text/plain")}
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        assert (await client.get(site.url("/a"))).status == 200
        with pytest.raises(ToolFailure, match="does not want robots"):
            await client.get(site.url("/private"))
