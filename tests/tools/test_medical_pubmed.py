"""`pubmed` as a model calls it, on invented E-utilities."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.api_site import ApiSite, Reply, api_site
from tests.fakes.medical import ARTICLE, NCBI_KEY, SUMMARY, Played
from tools.open_web import SEEN_KEY


@pytest.fixture
async def site() -> AsyncIterator[ApiSite]:
    async with api_site() as site:
        yield site


async def test_search_of_pubmed(site: ApiSite) -> None:
    found = {"header": {}, "esearchresult": {"count": "12", "retstart": "0", "idlist": ["99000001", "99000002", "x&y"]}}
    site.says("/eutils/esearch.fcgi", found)
    result = {"uids": ["99000001"], "99000001": SUMMARY, "99000002": {"error": "cannot get document summary"}}
    site.says("/eutils/esummary.fcgi", {"result": result})
    played = Played(site)
    shown = await played("pubmed", query="zorvexamab  grellin")
    assert shown.content.splitlines()[1:-1] == [
        "12 articles found; 1 to 2:",
        "- PMID 99000001: Zorvexamab in grellin disease.",
        "  Author A, Author B, Author C and 2 more. J Inv Med 2019 May 3",
        "- PMID 99000002: (no title)",
        "[more: page 2]",
    ]
    search, summary = site.asked
    assert search.query["term"] == "zorvexamab grellin"
    assert summary.query["id"] == "99000001,99000002"
    for asked in (search, summary):
        assert (asked.query["tool"], asked.query["email"], asked.query["api_key"]) == (
            "distill-gym",
            "me@example.org",
            NCBI_KEY,
        )
    await played("pubmed", query="zorvexamab", page=3)
    assert site.asked[-2].query["retstart"] == "20"
    assert "https://pubmed.ncbi.nlm.nih.gov/99000002/" in played.state[SEEN_KEY]
    without = Played(site, environment={}, contact="https://example.org/about")
    await without("pubmed", query="zorvexamab")
    assert not {"api_key", "email"} & set(site.asked[-1].query)


@pytest.mark.parametrize("query", ["99000001", "PMID: 99000001", "https://pubmed.ncbi.nlm.nih.gov/99000001/"])
async def test_an_article_of_pubmed(site: ApiSite, query: str) -> None:
    site.says("/eutils/efetch.fcgi", Reply(body=ARTICLE, content_type="text/xml"))
    result = await Played(site)("pubmed", query=query)
    assert result.content.splitlines()[1:-1] == [
        "PMID 99000001: Zorvexamab in grellin disease & others.",
        "Authors: Bela Aro, D Cid, The Group",
        "Journal: Journal of Inventions, 2019 May, 7(2):11-19",
        "DOI: 10.9999/inv.1",
        "Trial numbers: NCT99900001",
        "Type: Clinical Trial",
        "Abstract:",
        "Background: It was unknown.",
        "Then not.",
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<PubmedArticleSet></PubmedArticleSet>", "not_found: PubMed has no article 99000009"),
        ("<PubmedArticleSet><DeleteCitation/></PubmedArticleSet>", "not_found: PubMed has no article 99000009"),
        (
            "<PubmedArticleSet><PubmedBookArticle><BookDocument><Book><BookTitle>On Grellin</BookTitle></Book>"
            "<Abstract><AbstractText>All of it.</AbstractText></Abstract></BookDocument></PubmedBookArticle>"
            "</PubmedArticleSet>",
            "PMID 99000009: On Grellin\nJournal: On Grellin\nAbstract:\nAll of it.",
        ),
        ("<html><body>Down</body></html>", "execution: PubMed answered with a web page in place of data"),
        ("<PubmedArticleSet><PubmedArticle>", "execution: PubMed answered with a web page in place of data"),
        ('<!DOCTYPE x [<!ENTITY a "b"><!ENTITY c "&a;&a;">]><PubmedArticleSet>&c;</PubmedArticleSet>', "execution: "),
        ("", "execution: PubMed answered with no readable data"),
        ("<PubmedArticleSet><PubmedArticle/></PubmedArticleSet>", "PMID 99000009: (no title)\n(no abstract)"),
    ],
)
async def test_articles_that_are_not_there_or_broken(site: ApiSite, body: str, said: str) -> None:
    site.says("/eutils/efetch.fcgi", Reply(body=body, content_type="text/xml"))
    assert said in (await Played(site)("pubmed", query="99000009")).content


async def test_searches_of_pubmed_that_find_nothing_or_fail(site: ApiSite) -> None:
    site.says(
        "/eutils/esearch.fcgi",
        {"esearchresult": {"count": "0", "idlist": [], "warninglist": {"outputmessages": ["No items found."]}}},
        {"esearchresult": {"ERROR": "Search Backend failed"}},
        {"error": "API key invalid", "api-key": NCBI_KEY},
        {"esearchresult": {"count": "3", "idlist": []}},
        {"esearchresult": None},
    )
    played = Played(site)
    assert "no articles found" in (await played("pubmed", query="qqq")).content
    for _ in range(2):
        assert (await played("pubmed", query="qqq")).content.startswith("execution: PubMed does not take this query")
    assert (await played("pubmed", query="qqq", page=2)).content == "invalid_arguments: no page 2: 3 articles found"
    assert "no articles found" in (await played("pubmed", query="qqq")).content
    assert (await played("pubmed", query="qqq", page=5000)).content.startswith(
        "invalid_arguments: PubMed lists no more"
    )
    assert (await played("pubmed", query=" ")).content == "invalid_arguments: the query is empty"
