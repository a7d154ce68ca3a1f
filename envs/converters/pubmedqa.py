"""PubMedQA's expert-labelled part (Jin et al. 2019, arXiv:1909.06146): a question about a paper, answered yes, no or
maybe from its abstract without the conclusion.

`convert` gives the tasks, `pages` the abstracts as web pages: find the paper, read it, answer. The pages hold neither
the decision nor the conclusion (`LONG_ANSWER`). A question is close to the title of its paper, which the data set does
not have, so it stands as the page's title.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.converters import OptionError
from envs.converters.rows import KEY_COLUMN, OnBadRow, Row, iter_file
from envs.dataset import raise_error, task_from_row
from envs.jsonl import TaskError, parse_json
from envs.types import Task

if TYPE_CHECKING:
    from tools.pages import Page

PAPERS_FILE = "ori_pqal.json"
TEST_FILE = "test_ground_truth.json"
DECISIONS = ("yes", "no", "maybe")
SYSTEM = (
    "You answer questions of biomedical research from the paper that studied them. Find the paper with search, open it "
    "with browse, read it, then call submit_answer with one word: yes, no or maybe."
)


def convert(
    source: str, *, split: str | None = None, system: str = SYSTEM, on_bad_row: OnBadRow = raise_error
) -> Iterator[Task]:
    """One task a question; metadata: `answer`, `question_type`, `pmid`, `year` (null where unknown), `dataset`.

    Args:
        source: `ori_pqal.json`, or the folder that holds it.
        split: `test`: the 500 questions of the official test split, listed in `test_ground_truth.json` beside the
            source. `train`: the other 500. None: all.

    Raises:
        TaskError: a file is missing or damaged; a bad row.
        OptionError: another split.
    """
    if split not in (None, "train", "test"):
        raise OptionError(f"PubMedQA has the splits train and test, not {split!r}")
    chosen = None if split is None else test_ids(source)
    return _tasks(source, chosen, split, system, on_bad_row)


def _tasks(
    source: str, chosen: frozenset[str] | None, split: str | None, system: str, on_bad_row: OnBadRow
) -> Iterator[Task]:
    for row in papers(source):
        pmid = row.values[KEY_COLUMN]
        if chosen is not None and (pmid in chosen) != (split == "test"):
            continue
        try:
            task = _task(row, system)
        except TaskError as error:
            on_bad_row(error)
            continue
        yield task


def _task(row: Row, system: str) -> Task:
    check_paper(row)
    paper = row.values
    question = (
        f"Find the paper that asks: {paper['QUESTION']}\n"
        "Read its abstract and answer the question with yes, no or maybe by submit_answer."
    )
    metadata = {
        "answer": paper["final_decision"],
        "question_type": "pubmedqa",
        "pmid": paper[KEY_COLUMN],
        "year": paper.get("YEAR"),
        "dataset": "pubmedqa",
    }
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return task_from_row({"messages": messages, "metadata": metadata, "id": f"pubmedqa/{paper[KEY_COLUMN]}"}, row.where)


def check_paper(row: Row) -> None:
    """
    Raises:
        TaskError: a field is missing, or of another type.
    """
    paper = row.values
    if not isinstance(paper.get("QUESTION"), str) or not paper["QUESTION"].strip():
        raise TaskError(row.where, "QUESTION is missing or empty")
    if paper.get("final_decision") not in DECISIONS:
        raise TaskError(
            row.where, f"final_decision must be one of {', '.join(DECISIONS)}, found {paper.get('final_decision')!r}"
        )
    for name in ("CONTEXTS", "LABELS"):
        if not isinstance(paper.get(name), list) or not all(isinstance(item, str) for item in paper[name]):
            raise TaskError(row.where, f"{name} must be a list of texts")
    if len(paper["CONTEXTS"]) != len(paper["LABELS"]):
        raise TaskError(row.where, f"{len(paper['CONTEXTS'])} CONTEXTS, but {len(paper['LABELS'])} LABELS")


def papers(source: str) -> Iterator[Row]:
    """The papers of the data set, with their PubMed ids in the column `_key`."""
    for row in iter_file(_papers_file(source)):
        if KEY_COLUMN not in row.values:
            raise TaskError(row.where, f"wanted {PAPERS_FILE}: one object with the papers by PubMed id")
        yield row


def test_ids(source: str) -> frozenset[str]:
    """PubMed ids of the official test split.

    Raises:
        TaskError: `test_ground_truth.json` does not stand beside the source, or is damaged.
    """
    path = _papers_file(source).with_name(TEST_FILE)
    if not path.is_file():
        raise TaskError(str(path), "there is no such file, and --split needs it: it lists the test questions")
    try:
        listed: Any = parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TaskError(str(path), f"not JSON: {error}") from None
    if not isinstance(listed, dict):
        raise TaskError(str(path), "wanted an object of decisions by PubMed id")
    return frozenset(listed)


def _papers_file(source: str) -> Path:
    path = Path(source)
    return path / PAPERS_FILE if path.is_dir() else path


def pages(source: str, *, on_bad_row: OnBadRow = raise_error) -> Iterator[Page]:
    """The abstracts of all splits as HTML pages, in the shape that PubMed gives them."""
    from tools.pages import Page

    for row in papers(source):
        try:
            check_paper(row)
        except TaskError as error:
            on_bad_row(error)
            continue
        yield Page(url=page_url(row.values[KEY_COLUMN]), body=page_html(row.values))


def page_url(pmid: str) -> str:
    return f"https://pubmed.ncbi.nlm.nih.gov/{pmid}/"


def page_html(paper: dict[str, Any]) -> str:
    """One abstract with its labels, MeSH terms and year, between a site's navigation; without its conclusion."""
    title = escape(paper["QUESTION"].strip())
    pmid = escape(paper[KEY_COLUMN])
    year = escape(str(paper.get("YEAR") or "year not given"))
    sections = "\n".join(
        f"<h3>{escape(label.strip().capitalize())}</h3>\n<p>{escape(text.strip())}</p>"
        for label, text in zip(paper["LABELS"], paper["CONTEXTS"], strict=True)
    )
    terms = "\n".join(f"<li>{escape(str(term))}</li>" for term in paper.get("MESHES") or [])
    mesh = f"<h2>MeSH terms</h2>\n<ul>\n{terms}\n</ul>\n" if terms else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title} - PubMed</title>
<script>window.ncbi = {json.dumps({"pmid": pmid}).replace("<", "")};</script></head>
<body>
<header><a href="/">PubMed</a> <a href="/advanced/">Advanced</a> <a href="/clipboard/">Clipboard</a>
<form action="/"><input name="term"><button>Search</button></form></header>
<nav><a href="/help/">Help</a> <a href="/trending/">Trending</a> <a href="/account/">Log in</a></nav>
<main>
<h1>{title}</h1>
<p>PMID: {pmid}. Published: {year}.</p>
<h2>Abstract</h2>
{sections}
{mesh}</main>
<aside><h2>Similar articles</h2><a href="/?linkname=pubmed_pubmed&amp;from_uid={pmid}">See all</a></aside>
<footer><a href="/about/">About</a> <a href="/policies/">Policies</a> National Library of Medicine</footer>
</body>
</html>
"""
