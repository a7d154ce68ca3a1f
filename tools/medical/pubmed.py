"""PubMed through the E-utilities of NCBI: a search (esearch, esummary), or one article with its abstract (efetch).

Parameters and formats: www.ncbi.nlm.nih.gov/books/NBK25499/. NCBI asks for `tool` and `email`, and for at most three
requests a second without a key.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from tools.api import Api, Request, at, one_line, read_json, rows_at, text_at, texts_at
from tools.medical.show import Sheets, few, joined, line
from tools.pages import tool_key
from tools.tool import State, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure

ARTICLE_URL = "https://pubmed.ncbi.nlm.nih.gov/"
TOOL_NAME = "distill-gym"
NUM_FOUND = 10
"""Articles on one page of a search."""
MAX_FOUND = 9990
"""esearch gives no more of them."""
MAX_QUERY_CHARS = 1000

_PMID = re.compile(r"(?:PMID:?\s*|https?://pubmed\.ncbi\.nlm\.nih\.gov/)?([1-9]\d{0,8})/?", re.IGNORECASE)


class PubMedTools:
    """`pubmed`."""

    def __init__(self, api: Api, url: str, sheets: Sheets, *, contact: str, key: str) -> None:
        self._api = api
        self._url = url
        self._sheets = sheets
        # `email` wants a mail address; a contact may be a page.
        self._said = {"db": "pubmed", "tool": TOOL_NAME, "email": contact if "@" in contact else "", "api_key": key}

    @tool(parallel_safe=True, idempotent=True)
    async def pubmed(
        self,
        query: Annotated[str, "words to look for, a trial's number, or a PubMed id"],
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Search PubMed, or read the article of a PubMed id with its authors and abstract."""
        query = " ".join(query.split())
        if not query:
            raise ToolFailure("the query is empty", ToolErrorKind.INVALID_ARGUMENTS)
        if len(query) > MAX_QUERY_CHARS:
            raise ToolFailure(
                f"the query has {len(query)} characters; at most {MAX_QUERY_CHARS} can be searched for",
                ToolErrorKind.INVALID_ARGUMENTS,
            )
        number = _PMID.fullmatch(query)
        return await (self._article(number[1], page, state) if number else self._search(query, page, state))

    async def _article(self, pmid: str, page: int, state: dict[str, Any]) -> ToolOutput:
        request = self._request("efetch", id=pmid, rettype="abstract", retmode="xml")
        answer = await self._api.ask(tool_key("pubmed.article", {"id": pmid}), request, read=read_xml, empty=(400, 404))
        article = None if answer.value is None else _found(answer.value)
        if article is None:
            raise ToolFailure(f"PubMed has no article {pmid}", ToolErrorKind.NOT_FOUND)
        url = f"{ARTICLE_URL}{pmid}/"
        return self._sheets.output(_article(article, pmid), url=url, page=page, state=state, answers=[answer.page])

    async def _search(self, query: str, page: int, state: dict[str, Any]) -> ToolOutput:
        start = (page - 1) * NUM_FOUND
        if start > MAX_FOUND:
            raise ToolFailure("PubMed lists no more than this; use more words", ToolErrorKind.INVALID_ARGUMENTS)
        request = self._request(
            "esearch", term=query, retstart=str(start), retmax=str(NUM_FOUND), retmode="json", sort="relevance"
        )
        key = tool_key("pubmed.search", {"term": query, "start": start, "count": NUM_FOUND})
        found = await self._api.ask(key, request, read=self._read_found)
        pmids = [pmid for pmid in texts_at(found.value, "esearchresult", "idlist") if pmid.isdecimal()][:NUM_FOUND]
        total = text_at(found.value, "esearchresult", "count")
        if not pmids:
            if page > 1:
                raise ToolFailure(f"no page {page}: {total or 'no'} articles found", ToolErrorKind.INVALID_ARGUMENTS)
            return self._shown(["no articles found; try fewer or other words"], state, [found.page], [])
        ids = ",".join(pmids)
        request = self._request("esummary", id=ids, retmode="json")
        summaries = await self._api.ask(tool_key("pubmed.summaries", {"ids": ids}), request, read=read_json)
        last = start + len(pmids)
        head = f"{total or 'some'} articles found; {start + 1} to {last}:"
        rows = [_row(at(summaries.value, "result", pmid), pmid) for pmid in pmids]
        more = f"[more: page {page + 1}]" if total.isdecimal() and int(total) > last else ""
        pages = [found.page, summaries.page]
        return self._shown([head, *rows, more], state, pages, [f"{ARTICLE_URL}{pmid}/" for pmid in pmids])

    def _shown(self, lines: list[str], state: dict[str, Any], answers: list[Any], links: list[str]) -> ToolOutput:
        # A search has pages of its own: what is listed is short enough to be shown whole.
        return self._sheets.output(lines, url=ARTICLE_URL, page=1, state=state, answers=answers, links=links)

    def _read_found(self, text: str) -> dict[str, Any]:
        """What esearch found; its errors come with status 200."""
        answer = read_json(text)
        if "esearchresult" not in answer or at(answer, "esearchresult", "ERROR") is not None:
            raise ToolFailure("PubMed does not take this query; ask it in other words")
        return answer

    def _request(self, name: str, **params: str) -> Request:
        return Request(url=f"{self._url}/{name}.fcgi", params=self._said | params)


def read_xml(text: str) -> ET.Element:
    """The root of an XML text. Entities cannot be declared in it, so that it cannot grow; none is fetched.

    Raises:
        ValueError: it is no such XML.
    """
    if "<!ENTITY" in text:
        raise ValueError("XML with entity declarations")
    try:
        root = ET.fromstring(text)  # noqa: S314 - no entity is declared
    except ET.ParseError as error:
        raise ValueError(f"broken XML: {error}") from None
    if root.tag != "PubmedArticleSet":
        raise ValueError(f"wanted a PubmedArticleSet, found {root.tag}")
    return root


def _found(root: ET.Element) -> ET.Element | None:
    """The article or book of an answer."""
    article = root.find("PubmedArticle")
    return root.find("PubmedBookArticle") if article is None else article


def _row(summary: Any, pmid: str) -> str:
    """An article of a search in two lines."""
    authors = [text_at(author, "name", max_chars=80) for author in rows_at(summary, "authors")]
    where = joined(text_at(summary, "source", max_chars=100), text_at(summary, "pubdate", max_chars=40), between=" ")
    title = text_at(summary, "title", max_chars=300) or "(no title)"
    facts = joined(few([author for author in authors if author], 3), where, between=". ")
    return f"- PMID {pmid}: {title}\n  {facts}" if facts else f"- PMID {pmid}: {title}"


def _article(article: ET.Element, pmid: str) -> Iterator[str]:
    title = _text(article, ".//ArticleTitle", 500) or _text(article, ".//BookTitle", 500)
    yield f"PMID {pmid}: {title or '(no title)'}"
    authors = [_author(author) for author in article.iterfind(".//AuthorList/Author")]
    yield line("Authors", few([author for author in authors if author], 40))
    journal = _text(article, ".//Journal/Title", 200) or _text(article, ".//Book/BookTitle", 200)
    yield line("Journal", joined(journal, _date(article), _pages(article)))
    ids = {each.get("IdType", ""): _of(each, 100) for each in article.iterfind("./PubmedData/ArticleIdList/ArticleId")}
    yield line("DOI", ids.get("doi", ""))
    yield line("PMC", ids.get("pmc", ""))
    yield line("Trial numbers", *(_of(each, 40) for each in article.iterfind(".//DataBank//AccessionNumber")))
    yield line("Type", *(_of(each, 60) for each in article.iterfind(".//PublicationType")))
    parts = list(article.iterfind(".//Abstract/AbstractText"))
    yield "Abstract:" if parts else "(no abstract)"
    for part in parts:
        label = one_line(part.get("Label", ""), 100).capitalize()
        yield joined(label, _of(part, 8000), between=": ")


def _author(author: ET.Element) -> str:
    name = joined(_text(author, "ForeName", 60) or _text(author, "Initials", 20), _text(author, "LastName", 60),
                  between=" ")  # fmt: skip
    return name or _text(author, "CollectiveName", 120)


def _date(article: ET.Element) -> str:
    date = article.find(".//JournalIssue/PubDate")
    if date is None:
        return ""
    return joined(*(_text(date, key, 20) for key in ("Year", "Month", "Day", "MedlineDate")), between=" ")


def _pages(article: ET.Element) -> str:
    volume, issue = (_text(article, f".//JournalIssue/{key}", 20) for key in ("Volume", "Issue"))
    pages = _text(article, ".//Pagination/MedlinePgn", 40)
    return joined(f"{volume}({issue})" if volume and issue else volume, pages, between=":")


def _text(element: ET.Element, path: str, max_chars: int) -> str:
    found = element.find(path)
    return "" if found is None else _of(found, max_chars)


def _of(element: ET.Element, max_chars: int) -> str:
    return one_line("".join(element.itertext()), max_chars)
