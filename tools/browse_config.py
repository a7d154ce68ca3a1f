"""`[env_args.browse]`: how an environment reaches the web, or its recording.

    [env_args.browse]
    mode = "record"
    store = "pages"
    contact = "you@example.org"

API keys are in no configuration: SERPER_API_KEY, BRAVE_API_KEY, TAVILY_API_KEY, NCBI_API_KEY and OPENFDA_API_KEY come
from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from tools.store import Mode

TypedTool = Literal["trial", "trials", "pubmed", "drug"]
_CONTACT = re.compile(r"[\x21-\x7e]{3,200}")


class BrowseConfigError(ValueError):
    """What is wrong in `[env_args.browse]`, a line a mistake."""


def _contact(text: str) -> str:
    if text and (not _CONTACT.fullmatch(text) or not ("@" in text or text.startswith("https://"))):
        raise ValueError("wanted a mail address or an https:// page, without blanks; sites see it in the User-Agent")
    return text


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]


class BrowseConfig(BaseModel):
    """How the web is reached, recorded and shown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True
    )

    mode: Mode = "record"
    """record: fetch what is not stored, and store it. replay: stored pages only, no network. live: fetch always."""
    store: str | None = None
    """Folder of the recorded pages (docs/formats.md), relative to the working directory, or a page file NAME.jsonl.
    Needed to record and replay."""
    engine: Literal["auto", "browser", "http"] = "auto"
    """browser: pages are rendered in Chromium. http: they are not; no JavaScript runs. auto: browser where one is
    installed."""
    executable: str | None = None
    """Path of Chromium or Chrome. none: an installed one is found."""
    search: Literal["none", "searxng", "serper", "brave", "tavily"] = "none"
    """Whose results the tool `search` shows. none: there is no such tool."""
    search_url: str | None = None
    """Address of the search service. none: SEARXNG_URL, or the provider's own."""
    tools: Annotated[tuple[TypedTool, ...], Strict(False)] = ("trial", "trials", "pubmed", "drug")
    """Typed tools over public interfaces: ClinicalTrials.gov, PubMed, openFDA and the Orange Book."""
    orange_book: str | None = None
    """The FDA's zip of the Orange Book's data files, or a folder of the three. none: downloaded when it is first asked
    for."""
    contact: Annotated[str, AfterValidator(_contact)] = ""
    """A mail address or page of yours, which sites see in the User-Agent. Good manners, and PubMed asks for it."""
    allow: Texts = ()
    """Domains, with their subdomains, that may be reached. Empty: all public ones."""
    deny: Texts | None = None
    """Domains, or domain/path prefixes, that may not be. none: pages that hold the answers of MedBrowseComp."""
    ports: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Strict(False), Field(min_length=1)] = (80, 443)
    """Ports that may be reached."""
    open_addresses: Texts = ()
    """Addresses that are not public and may be reached all the same: "10.1.0.0/16", "127.0.0.1:8000"."""
    robots: bool = True
    """Obey robots.txt."""
    timeout_s: Annotated[float, Strict(False), Field(gt=0, le=600)] = 45.0
    """Seconds until a page must be there, waiting for its host's turn included."""
    max_bytes: Annotated[int, Field(ge=1000, le=10**9)] = 5_000_000
    """Of one answer, after decompression."""
    requests_per_minute: Annotated[dict[str, Annotated[float, Strict(False), Field(gt=0, le=6000)]], Strict(False)] = {}
    """By host, such as {"clinicaltrials.gov" = 30}; over what is polite by default."""
    page_tokens: Annotated[int, Field(ge=200, le=100_000)] = 1500
    """Tokens that `browse` shows at once, about (`tools.paging.approximate_tokens`)."""
    num_hits: Annotated[int, Field(ge=1, le=20)] = 5
    """Hits that a search lists."""
    only_seen_urls: bool = False
    """`browse` opens only URLs that the task, a search or a page that was read has named: nothing can be smuggled out
    in a URL that a page has told the model to make up."""

    @model_validator(mode="after")
    def _has_a_store(self) -> BrowseConfig:
        if self.mode != "live" and self.store is None:
            raise ValueError(f'mode "{self.mode}" needs store, the folder of the pages: store = "pages"')
        if self.search_url is not None and self.search == "none":
            raise ValueError("search_url is set but search is none: name the service that is there")
        return self


def browse_config(values: Mapping[str, Any]) -> BrowseConfig:
    """The configuration of a table.

    Raises:
        BrowseConfigError: all mistakes at once.
    """
    try:
        return BrowseConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for mistake in error.errors(include_url=False, include_context=False):
            where = ".".join(map(str, ("browse", *mistake["loc"])))
            said = mistake["msg"].removeprefix("Value error, ")
            if mistake["type"] == "extra_forbidden":
                said = f"there is no such key; there are: {', '.join(BrowseConfig.model_fields)}"
            lines.append(f"{where}: {said}")
        raise BrowseConfigError("\n".join(lines)) from None
