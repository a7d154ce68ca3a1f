"""The process in which `tools.text` converts HTML and PDF. Started as a program, with descriptors 3 (in) and 4 (out).

In: a line of JSON `{"kind": "html" | "pdf", "url", "bytes"}` and so many bytes. Out: `{"text", "title"}` or
`{"error"}`, in words for a model. Imports nothing of ours, so that it starts from anywhere.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import sys
import warnings
from typing import Any

MAX_PDF_PAGES = 300
FAILED = ("Error converting HTML to markdown", "Error in markdown generation")
"""How crawl4ai's text begins when it is an error."""

_TARGET = re.compile(r"\]\((<?)((?:\\[()]|[^()\s\\]|\\(?![()]))+)")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


class Unreadable(Exception):
    """In words for a model."""


def main() -> None:
    memory, max_chars = int(sys.argv[1]), int(sys.argv[2])
    source, sink = os.fdopen(3, "rb"), os.fdopen(4, "wb")
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(5000)
    from crawl4ai.content_scraping_strategy import LXMLWebScrapingStrategy
    from crawl4ai.markdown_generation_strategy import DefaultMarkdownGenerator

    scraper = LXMLWebScrapingStrategy()
    markdown = DefaultMarkdownGenerator(
        options={"ignore_images": True, "body_width": 0, "single_line_break": True, "mark_code": True}
    )
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _say(sink, {"ready": True})
    while line := source.readline():
        job = json.loads(line)
        body = source.read(job["bytes"])
        try:
            text, title = (
                pdf(body, max_chars) if job["kind"] == "pdf" else html(body.decode(), job["url"], scraper, markdown)
            )
            answer = {"text": text[:max_chars], "title": " ".join(title.split())[:500]}
        except Unreadable as error:
            answer = {"error": str(error)}
        except MemoryError:
            return  # whatever is left is not to be trusted
        except RecursionError:
            answer = {"error": "the page cannot be read: it is nested too deeply"}
        except Exception as error:  # a parser's fault on this page, which the next page does not share
            answer = {"error": f"the page cannot be read ({type(error).__name__})"}
        _say(sink, answer)


def _say(sink: io.BufferedWriter, answer: dict[str, Any]) -> None:
    sink.write(json.dumps(answer).encode() + b"\n")
    sink.flush()


def html(document: str, url: str, scraper: Any, markdown: Any) -> tuple[str, str]:
    """Markdown and title, by crawl4ai's scraping strategy and markdown generator."""
    if not document.strip():
        return "", ""
    scraped = scraper.scrap(url, document)
    if not scraped.success:
        raise Unreadable("the page cannot be read: its HTML is broken")
    text = markdown.generate_markdown(scraped.cleaned_html, base_url=_base(document, url), citations=False).raw_markdown
    if text.startswith(FAILED):
        raise Unreadable("the page cannot be read: its HTML is broken")
    text = _TARGET.sub(lambda found: found[0].replace("\\(", "%28").replace("\\)", "%29"), text)
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)).strip(), str((scraped.metadata or {}).get("title") or "")


def _base(document: str, url: str) -> str:
    """What links are relative to."""
    from urllib.parse import urljoin

    found = re.search(r"<base\s[^>]{0,500}?href\s*=\s*[\"']?([^\"'\s>]{1,2000})", document[:200_000], re.IGNORECASE)
    base = urljoin(url, found[1]) if found else url
    return base if base.startswith(("http://", "https://")) else url


def pdf(body: bytes, max_chars: int) -> tuple[str, str]:
    """Text and title of a PDF, its pages apart by a blank line."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(body))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("the PDF is locked with a password")
        pages: list[str] = []
        length = 0
        for page in reader.pages[:MAX_PDF_PAGES]:
            pages.append(page.extract_text().strip())
            length += len(pages[-1])
            if length > max_chars:
                break
        title = str((reader.metadata and reader.metadata.title) or "")
    except PyPdfError:
        raise Unreadable("the PDF is broken") from None
    text = "\n\n".join(page for page in pages if page)
    if len(reader.pages) > MAX_PDF_PAGES:
        text += f"\n\n(the first {MAX_PDF_PAGES} of {len(reader.pages)} pages)"
    return text or "(the PDF holds no text: it may be a scan)", title


if __name__ == "__main__":
    main()
