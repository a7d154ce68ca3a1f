"""Typed tools over public interfaces of medicine: `trial`, `trials`, `pubmed` and `drug`.

    tools = medical_tools(("trial", "pubmed"), store=store, client=client, contact="you@example.org")

Keys, NCBI_API_KEY and OPENFDA_API_KEY, only make the services answer more often. What they answer is research
material, not medical advice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.api import Api, Client
from tools.medical.drugs import DrugTools
from tools.medical.orange_book import OrangeBookSource
from tools.medical.pubmed import PubMedTools
from tools.medical.show import Sheets
from tools.medical.trials import TrialTools
from tools.store import PageStore
from tools.tool import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the services are; mirrors and tests have others."""

    clinicaltrials: str = "https://clinicaltrials.gov/api/v2"
    eutils: str = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
    openfda: str = "https://api.fda.gov"
    orange_book: str = "https://www.fda.gov/media/76860/download"
    """The zip of the Orange Book's data files."""


def medical_tools(
    names: Sequence[str],
    *,
    store: PageStore,
    client: Client | None,
    contact: str = "",
    page_tokens: int = 1500,
    max_chars: int = 8000,
    orange_book: str | Path | None = None,
    environment: Mapping[str, str] = os.environ,
    endpoints: Endpoints = Endpoints(),
    timeout_s: float = 45.0,
) -> list[Tool]:
    """The tools of these names, in their order.

    Args:
        client: None if the store only replays. Make it with `robots=False`: these interfaces are published for
            programs, and robots.txt is for crawlers.
        contact: mail address that NCBI asks for.
        page_tokens: of one output, about.
        max_chars: of one output; at most the toolbox's limit.
        orange_book: the FDA's zip, or a folder of its three files; an older copy answers questions as of its date.
            None: downloaded once a process, when it is first asked for.
        timeout_s: seconds one answer of a service may take.

    Raises:
        ValueError: no such tool, or no such path of the Orange Book.
    """
    ncbi_key, fda_key = (environment.get(name, "").strip() for name in ("NCBI_API_KEY", "OPENFDA_API_KEY"))
    secrets = [key for key in (ncbi_key, fda_key) if key]
    sheets = Sheets(page_tokens=page_tokens, max_chars=max_chars)

    def api(name: str) -> Api:
        return Api(name, store, client, secrets=secrets, timeout_s=timeout_s)

    book = OrangeBookSource(api("The Orange Book"), orange_book or endpoints.orange_book)
    trials = TrialTools(api("ClinicalTrials.gov"), endpoints.clinicaltrials, sheets)
    pubmed = PubMedTools(api("PubMed"), endpoints.eutils, sheets, contact=contact, key=ncbi_key)
    drugs = DrugTools(api("openFDA"), endpoints.openfda, book, sheets, key=fda_key)
    tools = {tool.name: tool for tool in (trials.trial, trials.trials, pubmed.pubmed, drugs.drug)}
    unknown = [name for name in names if name not in tools]
    if unknown:
        raise ValueError(f"no typed tool {unknown[0]!r}; there are: {', '.join(tools)}")
    # Longer than the two requests of a call, which are to end by their own deadlines: those are recorded.
    return [replace(tools[name], timeout_s=2 * timeout_s + 30) for name in names]


__all__ = ["Endpoints", "medical_tools"]
