"""ClinicalTrials.gov, version 2 of its interface: one trial by its number, or a search.

Structure of a record: clinicaltrials.gov/data-api/about-api/study-data-structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from tools.api import Api, Request, at, read_json, rows_at, text_at, texts_at
from tools.clean import clean_text
from tools.medical.show import Sheets, few, joined, line, section
from tools.pages import tool_key
from tools.tool import State, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure

Part = Literal["summary", "results", "eligibility", "references", "locations"]
STUDY_URL = "https://clinicaltrials.gov/study/"
NUM_FOUND = 100
"""Trials that a search lists at most."""

_NCT = re.compile(r"NCT\d{8}")
_FIELDS: dict[Part, str] = {
    "summary": "IdentificationModule|StatusModule|SponsorCollaboratorsModule|DescriptionModule|ConditionsModule"
    "|DesignModule|ArmsInterventionsModule|OutcomesModule|ReferencesModule|HasResults",
    "results": "IdentificationModule|OutcomeMeasuresModule|HasResults",
    "eligibility": "IdentificationModule|EligibilityModule",
    "references": "IdentificationModule|ReferencesModule",
    "locations": "IdentificationModule|ContactsLocationsModule",
}
"""What is asked for: whole records have up to tens of megabytes."""
_FOUND_FIELDS = (
    "NCTId|BriefTitle|OverallStatus|Phase|StartDate|CompletionDate|LeadSponsorName|Condition|InterventionName"
    "|HasResults"
)


class TrialTools:
    """`trial` and `trials`."""

    def __init__(self, api: Api, url: str, sheets: Sheets) -> None:
        self._api = api
        self._url = url
        self._sheets = sheets

    @tool(parallel_safe=True, idempotent=True)
    async def trial(
        self,
        nct: Annotated[str, "number of the trial, such as NCT00000000"],
        part: Annotated[Part, "what to read of it"] = "summary",
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Read a clinical trial at ClinicalTrials.gov.
        Its summary has status, dates, sponsor, arms, drugs, outcomes and PubMed ids."""
        number = nct.strip().rstrip("/").rpartition("/")[2].upper()
        if not _NCT.fullmatch(number):
            raise ToolFailure(
                "a trial's number is NCT and 8 digits; to look for words use trials", ToolErrorKind.INVALID_ARGUMENTS
            )
        request = Request(url=f"{self._url}/studies/{number}", params={"format": "json", "fields": _FIELDS[part]})
        key = tool_key("trial", {"nct": number, "part": part})
        answer = await self._api.ask(key, request, read=read_json, empty=(404,))
        if answer.value is None:
            raise ToolFailure(f"ClinicalTrials.gov has no trial {number}", ToolErrorKind.NOT_FOUND)
        lines = [_title(answer.value, number), *filter(None, _PARTS[part](answer.value))]
        if len(lines) == 1:
            lines.append(f"ClinicalTrials.gov has no {part} of this trial.")
        return self._sheets.output(lines, url=f"{STUDY_URL}{number}", page=page, state=state, answers=[answer.page])

    @tool(parallel_safe=True, idempotent=True)
    async def trials(
        self,
        query: Annotated[str, "any words: title, acronym, sponsor"] = "",
        condition: Annotated[str, "disease"] = "",
        drug: Annotated[str, "drug or other intervention"] = "",
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Search clinical trials at ClinicalTrials.gov. Give at least one of query, condition and drug."""
        asked = {"term": query, "cond": condition, "intr": drug}
        asked = {name: " ".join(text.split()) for name, text in asked.items() if text.strip()}
        if not asked:
            raise ToolFailure("give a query, a condition or a drug to look for", ToolErrorKind.INVALID_ARGUMENTS)
        if sum(map(len, asked.values())) > 1000:
            raise ToolFailure("the search is too long: at most 1000 characters", ToolErrorKind.INVALID_ARGUMENTS)
        params = {f"query.{name}": text for name, text in asked.items()}
        params |= {"fields": _FOUND_FIELDS, "format": "json", "countTotal": "true", "pageSize": str(NUM_FOUND)}
        request = Request(url=f"{self._url}/studies", params=params)
        answer = await self._api.ask(tool_key("trials", asked), request, read=read_json)
        rows = rows_at(answer.value, "studies")
        numbers = [text_at(row, *_IDENTIFICATION, "nctId") for row in rows]
        lines = [_found(answer.value, len(rows)), *map(_row, rows)]
        return self._sheets.output(
            lines,
            url="https://clinicaltrials.gov/",
            page=page,
            state=state,
            answers=[answer.page],
            links=[f"{STUDY_URL}{number}" for number in numbers if _NCT.fullmatch(number)],
        )


_PROTOCOL = "protocolSection"
_IDENTIFICATION = (_PROTOCOL, "identificationModule")


def _found(answer: Any, num_rows: int) -> str:
    if not num_rows:
        return "no trials found; try fewer or other words"
    total = text_at(answer, "totalCount")
    if total.isdecimal() and int(total) > num_rows:
        return f"{total} trials found, the first {num_rows} are listed; more words find fewer"
    return f"{num_rows} trial{'s' if num_rows > 1 else ''} found"


def _row(study: Any) -> str:
    protocol = at(study, _PROTOCOL)
    status = at(protocol, "statusModule")
    dates = joined(
        text_at(status, "startDateStruct", "date"), text_at(status, "completionDateStruct", "date"), between=" to "
    )
    interventions = rows_at(protocol, "armsInterventionsModule", "interventions")
    drugs = few([name for row in interventions if (name := text_at(row, "name", max_chars=80))], 6)
    facts = joined(
        text_at(status, "overallStatus"),
        "/".join(texts_at(protocol, "designModule", "phases")),
        dates,
        text_at(protocol, "sponsorCollaboratorsModule", "leadSponsor", "name", max_chars=80),
        few(texts_at(protocol, "conditionsModule", "conditions", max_chars=80), 3),
        "has results" if at(study, "hasResults") is True else "",
        between="; ",
    )
    head = f"- {_title(study, 'trial without a number', max_chars=200)}"
    return joined(head, facts, line("drugs", drugs), between="\n  ")


def _title(study: Any, number: str, *, max_chars: int = 400) -> str:
    module = at(study, *_IDENTIFICATION)
    acronym = text_at(module, "acronym", max_chars=60)
    title = text_at(module, "briefTitle", max_chars=max_chars) or text_at(module, "officialTitle", max_chars=max_chars)
    number = text_at(module, "nctId") or number
    return joined(number, joined(title, f"({acronym})" if acronym else "", between=" "), between=": ")


def _summary(study: Any) -> Iterator[str]:
    protocol = at(study, _PROTOCOL)
    yield line("Official title", text_at(protocol, "identificationModule", "officialTitle"))
    status = at(protocol, "statusModule")
    yield line("Status", text_at(status, "overallStatus"), text_at(status, "whyStopped"))
    dates = {
        "start": "startDateStruct",
        "primary completion": "primaryCompletionDateStruct",
        "completion": "completionDateStruct",
        "first posted": "studyFirstPostDateStruct",
        "results posted": "resultsFirstPostDateStruct",
        "last update": "lastUpdatePostDateStruct",
    }
    shown = {name: _date(at(status, key)) for name, key in dates.items()}
    yield line("Dates", *(f"{name} {date}" for name, date in shown.items() if date))
    design = at(protocol, "designModule")
    info = at(design, "designInfo")
    yield line(
        "Design",
        text_at(design, "studyType"),
        "/".join(texts_at(design, "phases")),
        text_at(info, "allocation"),
        text_at(info, "interventionModel"),
        line("masking", text_at(info, "maskingInfo", "masking")),
        line("purpose", text_at(info, "primaryPurpose")),
    )
    enrollment = at(design, "enrollmentInfo")
    yield line("Enrollment", joined(text_at(enrollment, "count"), text_at(enrollment, "type"), between=" "))
    sponsors = at(protocol, "sponsorCollaboratorsModule")
    yield line("Sponsor", text_at(sponsors, "leadSponsor", "name"))
    yield line("Collaborators", *(text_at(row, "name") for row in rows_at(sponsors, "collaborators")))
    yield line("Conditions", *texts_at(protocol, "conditionsModule", "conditions"))
    arms = at(protocol, "armsInterventionsModule")
    yield from section("Arms", map(_arm, rows_at(arms, "armGroups")))
    yield from section("Interventions", map(_intervention, rows_at(arms, "interventions")))
    outcomes = at(protocol, "outcomesModule")
    yield from section("Primary outcomes", map(_outcome, rows_at(outcomes, "primaryOutcomes")))
    secondary = rows_at(outcomes, "secondaryOutcomes")
    yield from section("Secondary outcomes", (_outcome(row) for row in secondary[:10]))
    yield f"- and {len(secondary) - 10} more" if len(secondary) > 10 else ""
    yield line("Summary", text_at(protocol, "descriptionModule", "briefSummary", max_chars=1500))
    yield line("PubMed ids", *map(_pubmed_id, rows_at(protocol, "referencesModule", "references")))
    has_results = at(study, "hasResults")
    if isinstance(has_results, bool):
        yield 'Results: yes, read part "results"' if has_results else "Results: none posted"


def _date(struct: Any) -> str:
    estimated = text_at(struct, "type") == "ESTIMATED"
    return joined(text_at(struct, "date"), "(estimated)" if estimated else "", between=" ")


def _arm(arm: Any) -> str:
    drugs = "; ".join(texts_at(arm, "interventionNames"))
    head = joined(text_at(arm, "type"), text_at(arm, "label", max_chars=200), between=" ")
    return joined(head, drugs, text_at(arm, "description", max_chars=300), between=" | ")


def _intervention(row: Any) -> str:
    others = few(texts_at(row, "otherNames", max_chars=80), 5)
    name = joined(text_at(row, "type"), text_at(row, "name", max_chars=200), between=" ")
    return joined(name, f"also {others}" if others else "", text_at(row, "description", max_chars=200), between=" | ")


def _outcome(row: Any) -> str:
    frame = text_at(row, "timeFrame", max_chars=150)
    return joined(text_at(row, "measure", max_chars=300), f"[{frame}]" if frame else "", between=" ")


def _pubmed_id(row: Any) -> str:
    number, kind = text_at(row, "pmid"), text_at(row, "type")
    return joined(number, f"({kind.lower()})" if kind else "", between=" ") if number else ""


def _references(study: Any) -> Iterator[str]:
    module = at(study, _PROTOCOL, "referencesModule")
    yield from section(
        "References",
        (
            joined(line("PMID", _pubmed_id(row)), text_at(row, "citation", max_chars=500), between=" | ")
            for row in rows_at(module, "references")
        ),
    )
    yield from section(
        "Links", (joined(text_at(row, "label"), text_at(row, "url")) for row in rows_at(module, "seeAlsoLinks"))
    )


def _eligibility(study: Any) -> Iterator[str]:
    module = at(study, _PROTOCOL, "eligibilityModule")
    yield line("Sex", text_at(module, "sex"))
    ages = joined(text_at(module, "minimumAge"), text_at(module, "maximumAge"), between=" to ")
    yield line("Age", ages, "/".join(texts_at(module, "stdAges")))
    healthy = at(module, "healthyVolunteers")
    yield f"Healthy volunteers: {'yes' if healthy else 'no'}" if isinstance(healthy, bool) else ""
    criteria = at(module, "eligibilityCriteria")
    yield from clean_text(criteria).splitlines() if isinstance(criteria, str) else []


def _locations(study: Any) -> Iterator[str]:
    module = at(study, _PROTOCOL, "contactsLocationsModule")
    yield from section(
        "Officials",
        (
            joined(*(text_at(row, key, max_chars=200) for key in ("name", "role", "affiliation")))
            for row in rows_at(module, "overallOfficials")
        ),
    )
    rows = rows_at(module, "locations")
    if len(rows) > 1:
        yield f"{len(rows)} locations"
    yield from section(
        "Locations",
        (
            joined(*(text_at(row, key, max_chars=200) for key in ("facility", "city", "state", "country", "status")))
            for row in rows
        ),
    )


def _results(study: Any) -> Iterator[str]:
    outcomes = rows_at(study, "resultsSection", "outcomeMeasuresModule", "outcomeMeasures")
    order = {"PRIMARY": 0, "SECONDARY": 1}
    for row in sorted(outcomes, key=lambda row: order.get(text_at(row, "type"), 2)):
        yield from _measured(row)


def _measured(outcome: Any) -> Iterator[str]:
    """An outcome with what was measured in each group."""
    names = {text_at(row, "id"): text_at(row, "title", max_chars=100) for row in rows_at(outcome, "groups")}
    frame = text_at(outcome, "timeFrame", max_chars=150)
    kind = text_at(outcome, "type") or "OUTCOME"
    unit = text_at(outcome, "unitOfMeasure", max_chars=80)
    yield joined(f"{kind}: {text_at(outcome, 'title', max_chars=300)}", f"[{frame}]" if frame else "", between=" ")
    yield line("  measured as", joined(text_at(outcome, "paramType"), unit))
    for group in rows_at(outcome, "classes"):
        for category in rows_at(group, "categories"):
            where = joined(text_at(group, "title", max_chars=100), text_at(category, "title", max_chars=100))
            values = (_measurement(row, names) for row in rows_at(category, "measurements"))
            yield joined("  -", f"{where}:" if where else "", joined(*values, between="; "), between=" ")
    for analysis in rows_at(outcome, "analyses"):
        groups = " vs ".join(names.get(name, name) for name in texts_at(analysis, "groupIds"))
        low, high = text_at(analysis, "ciLowerLimit"), text_at(analysis, "ciUpperLimit")
        level = text_at(analysis, "ciPctValue")
        yield line(
            "  analysis",
            groups,
            joined(text_at(analysis, "paramType"), text_at(analysis, "paramValue"), between=" "),
            f"{level or '?'}% CI {low or '?'} to {high or '?'}" if low or high else "",
            line("p", text_at(analysis, "pValue")),
            text_at(analysis, "statisticalMethod"),
        )


def _measurement(row: Any, names: dict[str, str]) -> str:
    group = text_at(row, "groupId")
    low, high, spread = (text_at(row, key) for key in ("lowerLimit", "upperLimit", "spread"))
    around = f"({low} to {high})" if low and high else f"(spread {spread})" if spread else ""
    value = text_at(row, "value")
    return joined(f"{names.get(group) or group or 'all'} =", value or "not given", around, between=" ")


_PARTS = {
    "summary": _summary,
    "results": _results,
    "eligibility": _eligibility,
    "references": _references,
    "locations": _locations,
}
