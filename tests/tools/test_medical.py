"""What the typed medical tools have in common: failures, odd answers, records and keys."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.api_site import ApiSite, Reply, api_site, bytes_of
from tests.fakes.medical import (
    APPLICATIONS,
    ARTICLE,
    FDA_KEY,
    NCBI_KEY,
    NCT,
    RESULTS,
    STUDY,
    SUMMARY,
    Played,
    book,
    study,
)
from tools.medical import medical_tools
from tools.store import PageStore


@pytest.fixture
async def site() -> AsyncIterator[ApiSite]:
    async with api_site() as site:
        yield site


CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("trial", {"nct": NCT}),
    ("trials", {"query": "zorvexamab"}),
    ("pubmed", {"query": "zorvexamab"}),
    ("pubmed", {"query": "99000001"}),
    ("drug", {"name": "zorvexamab"}),
    ("drug", {"name": "zorvexamab", "part": "approvals"}),
    ("drug", {"name": "zorvexamab", "part": "label"}),
)
PATHS = (STUDY, "/api/v2/studies", "/eutils/esearch.fcgi", "/eutils/esummary.fcgi", "/eutils/efetch.fcgi", "/book.zip",
         "/drug/drugsfda.json", "/drug/label.json")  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(body="<html>Blocked</html>", content_type="text/html"), "execution: "),
        (Reply(body='{"a":'), "execution: "),
        (Reply(status=429, headers={"Retry-After": "999"}), "too many requests"),
        (Reply(status=500, body=f"<html>{NCBI_KEY} {FDA_KEY}</html>", content_type="text/html"), "out of order"),
        (Reply(status=403, body={"error": {"code": "API_KEY_INVALID", "message": FDA_KEY}}), "refuses the request"),
        (Reply(body="{" + " " * 6_000_000 + "}"), "execution: "),
        (Reply(delay_s=2.5), "timeout: no answer from"),
    ],
)
async def test_failures_of_services_are_told_in_words(
    site: ApiSite, reply: Reply, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in PATHS:
        site.says(path, reply)
    played = Played(site, timeout_s=1.0)
    with caplog.at_level(logging.DEBUG, logger="tools"):
        results = await asyncio.gather(*(Played(site, timeout_s=1.0)(name, **call) for name, call in CALLS))
    assert played.state == {}
    for result in results:
        assert result.error is not None
        assert said in result.content
        for key in (NCBI_KEY, FDA_KEY, "127.0.0.1"):
            assert key not in result.content
            assert key not in caplog.text


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=302, headers={"Location": "http://10.9.8.7/internal"}),
        Reply(status=302, headers={"Location": "/loop"}),
        Reply(status=302, headers={"Location": "http://[broken"}),
        Reply(body=b"no gzip", headers={"Content-Encoding": "gzip"}),
        Reply(body=b"x", content_type="video/mp4"),
    ],
)
async def test_keys_in_urls_do_not_come_back_in_errors(
    site: ApiSite, reply: Reply, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in PATHS:
        site.says(path, reply)
    site.says("/loop", Reply(status=302, headers={"Location": "/loop"}))
    played = Played(site, PageStore(tmp_path / "pages", "record"))
    with caplog.at_level(logging.DEBUG, logger="tools"):
        results = [await played(name, **call) for name, call in CALLS]
    assert all(result.error is not None for result in results)
    told = "".join(result.content for result in results) + bytes_of(tmp_path).decode()
    assert "openFDA" in told
    for address in ("10.9.8.7", "127.0.0.1"):
        assert address not in told
    for key in (NCBI_KEY, FDA_KEY, "ncbi%2Bkey"):
        assert key not in told + caplog.text
    assert any("api_key" in asked.query for asked in site.asked)


@pytest.mark.parametrize("value", [None, 7, "text", [], {}, [None, 3, "x", [], {"": None}], True, 1e400])
async def test_any_field_may_be_missing_or_of_another_type(site: ApiSite, value: Any) -> None:
    """Each field of each answer in turn is replaced: no call breaks."""

    def variants(answer: Any) -> list[Any]:
        found = []
        if isinstance(answer, dict):
            for key in answer:
                found += [answer | {key: value}] + [answer | {key: each} for each in variants(answer[key])]
        elif isinstance(answer, list) and answer:
            found += [[each, *answer[1:]] for each in [value, *variants(answer[0])]]
        return found

    cases = [
        (STUDY, study() | {"resultsSection": RESULTS}, ("trial", {"nct": NCT})),
        (STUDY, {"resultsSection": RESULTS}, ("trial", {"nct": NCT, "part": "results"})),
        ("/api/v2/studies", {"totalCount": 1, "studies": [study()]}, ("trials", {"query": "z"})),
        ("/drug/drugsfda.json", APPLICATIONS, ("drug", {"name": "z", "part": "approvals"})),
        ("/eutils/esummary.fcgi", {"result": {"99000001": SUMMARY}}, ("pubmed", {"query": "z"})),
    ]
    site.says("/eutils/esearch.fcgi", {"esearchresult": {"count": "1", "idlist": ["99000001"]}})
    played, count = Played(site), 0
    for path, answer, (name, call) in cases:
        for variant in variants(answer):
            site.says(path, variant)
            result = await played(name, **call)
            count += 1
            assert result.error is None or result.error.kind.value in ("not_found", "execution"), result.content
            assert "exception" not in result.content.lower(), result.content
            assert "Error" not in result.content, result.content
    assert count > 150


async def test_a_recording_replays_in_the_same_words_and_holds_no_key(site: ApiSite, tmp_path: Path) -> None:
    echo = {"api-key": NCBI_KEY, "said": FDA_KEY}
    site.says(STUDY, study() | echo)
    site.says("/api/v2/studies", {"studies": [study()]} | echo)
    site.says("/eutils/esearch.fcgi", {"esearchresult": {"count": "1", "idlist": ["99000001"]}} | echo)
    site.says("/eutils/esummary.fcgi", {"result": {"99000001": SUMMARY | {"title": f"On {NCBI_KEY}"}}})
    site.says("/eutils/efetch.fcgi", Reply(body=ARTICLE, content_type="text/xml"))
    site.says("/book.zip", book())
    site.says("/drug/drugsfda.json", APPLICATIONS | echo)
    site.says("/drug/label.json", Reply(status=401, body=echo))
    recorder = Played(site, PageStore(tmp_path / "pages", "record"))
    recorded = [await recorder(name, **call) for name, call in CALLS]
    assert [result.error is None for result in recorded] == [True] * 6 + [False]
    again = [await recorder(name, **call) for name, call in CALLS]
    num_asked = len(site.asked)
    player = Played(site, PageStore(tmp_path / "pages"), client=None, environment={}, orange_book=tmp_path / "gone")
    replayed = [await player(name, **call) for name, call in CALLS]
    assert recorded == again == replayed
    missing = await player("trial", nct="NCT99900009")
    assert missing.content == "not_found: this was not recorded"
    assert (await player("drug", name="other")).content == "not_found: this was not recorded"
    assert len(site.asked) == num_asked
    stored = bytes_of(tmp_path)
    assert b"Zorvexamab" in stored
    for key in (NCBI_KEY, FDA_KEY, "ncbi%2Bkey%2F0123456789"):
        assert key.encode() not in stored
        assert key not in json.dumps([result.metadata for result in recorded])
        assert all(key not in result.content for result in recorded)


def test_only_known_tools() -> None:
    store = PageStore([], "live")
    assert [tool.name for tool in medical_tools(("pubmed", "trial"), store=store, client=None)] == ["pubmed", "trial"]
    with pytest.raises(ValueError, match="there are: trial, trials, pubmed, drug"):
        medical_tools(("doctor",), store=store, client=None)
