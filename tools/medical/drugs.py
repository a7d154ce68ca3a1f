"""What the FDA says of a drug: patents and exclusivity (the Orange Book), approvals and label (openFDA).

Formats: open.fda.gov/apis/drug/drugsfda and open.fda.gov/apis/drug/label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from tools.api import Answer, Api, Request, at, read_json, rows_at, text_at, texts_at
from tools.medical.orange_book import PRODUCT_COLUMNS, OrangeBookSource, Row, day_of, iso_date, latest, product_key
from tools.medical.show import Sheets, few, joined, line, section
from tools.pages import tool_key
from tools.tool import State, ToolOutput, tool
from tools.types import ToolErrorKind, ToolFailure

Part = Literal["patents", "approvals", "label"]
MAX_NAME_CHARS = 200
NUM_APPLICATIONS = 50
"""Applications that are asked for at most."""
SECTION_CHARS = 3000
_URLS: dict[Part, str] = {
    "patents": "https://www.accessdata.fda.gov/scripts/cder/ob/",
    "approvals": "https://www.accessdata.fda.gov/scripts/cder/daf/",
    "label": "https://open.fda.gov/apis/drug/label/",
}
_APPROVAL_FIELDS = ("openfda.generic_name", "openfda.brand_name", "products.active_ingredients.name",
                    "products.brand_name")  # fmt: skip
_LABEL_FIELDS = ("openfda.generic_name", "openfda.brand_name", "openfda.substance_name")
_LABEL_NAMES = {
    "Brand": "brand_name",
    "Ingredient": "generic_name",
    "Company": "manufacturer_name",
    "Application": "application_number",
    "Route": "route",
    "Class": "pharm_class_epc",
}
_LABEL_SECTIONS = (
    "boxed_warning",
    "indications_and_usage",
    "dosage_and_administration",
    "dosage_forms_and_strengths",
    "contraindications",
    "warnings_and_cautions",
    "warnings",
    "adverse_reactions",
    "drug_interactions",
    "use_in_specific_populations",
    "mechanism_of_action",
    "clinical_studies",
)
_NO_NAME_CHARS = re.compile(r"[^\w\s.,'/()+-]|_")
"""What a drug's name has not; quotes and backslashes would be syntax of the query."""


class DrugTools:
    """`drug`."""

    def __init__(self, api: Api, url: str, book: OrangeBookSource, sheets: Sheets, *, key: str) -> None:
        self._api = api
        self._url = url
        self._book = book
        self._sheets = sheets
        self._key = key

    @tool(parallel_safe=True, idempotent=True)
    async def drug(
        self,
        name: Annotated[str, "ingredient or brand name"],
        part: Annotated[Part, "patents: companies, approval, patent and exclusivity dates"] = "patents",
        page: Annotated[int, "page number", Field(ge=1)] = 1,
        *,
        state: State,
    ) -> ToolOutput:
        """Look up a drug at the FDA: patents (Orange Book), approvals (Drugs@FDA) or label."""
        asked = " ".join(_NO_NAME_CHARS.sub(" ", name).split()).upper()
        if not asked or len(asked) > MAX_NAME_CHARS:
            raise ToolFailure("give the name of one drug", ToolErrorKind.INVALID_ARGUMENTS)
        if part == "patents":
            entry, stored = await self._book.find(asked)
            lines = _patents(entry, asked)
        elif part == "approvals":
            answer = await self._ask("drugsfda", asked, _APPROVAL_FIELDS, NUM_APPLICATIONS)
            lines, stored = list(_approvals(answer.value, asked)), answer.page
        else:
            answer = await self._ask("label", asked, _LABEL_FIELDS, 1)
            lines, stored = list(_label(answer.value, asked)), answer.page
        return self._sheets.output(lines, url=_URLS[part], page=page, state=state, answers=[stored])

    async def _ask(self, name: str, asked: str, fields: tuple[str, ...], count: int) -> Answer[dict[str, Any]]:
        """Raises ToolFailure: also where nothing was found."""
        search = " OR ".join(f'{field}:"{asked}"' for field in fields)
        params = {"search": search, "limit": str(count), "api_key": self._key}
        request = Request(url=f"{self._url}/drug/{name}.json", params=params)
        key = tool_key(f"drug.{name}", {"name": asked, "count": count})
        answer = await self._api.ask(key, request, read=read_json, empty=(404,))
        if not rows_at(answer.value, "results"):
            raise ToolFailure(f"openFDA has nothing on {asked}; try its ingredient's name", ToolErrorKind.NOT_FOUND)
        return answer


def _patents(entry: Mapping[str, Any], name: str) -> list[str]:
    """What `OrangeBook.entry` gave, in lines: new drugs first, each kind with the latest approval first.

    Raises:
        ToolFailure: it has no product.
    """
    applications: dict[tuple[str, ...], list[Row]] = {}
    for product in rows_at(entry, "products"):
        row = {column: text_at(product, column, max_chars=300) for column in PRODUCT_COLUMNS}
        same = (row["appl_type"], row["appl_no"], row["trade_name"], row["df;route"], row["approval_date"])
        applications.setdefault(same, []).append(row)
    if not applications:
        similar = "; ".join(texts_at(entry, "similar", max_chars=100))
        hint = f"similar names: {similar}" if similar else "biologics are not in it: try part approvals"
        raise ToolFailure(f"the Orange Book has no {name}; {hint}", ToolErrorKind.NOT_FOUND)
    ordered = sorted(applications.values(), key=lambda rows: _day(rows[0]), reverse=True)
    new = [rows for rows in ordered if rows[0]["appl_type"] != "A"]
    generic = [rows for rows in ordered if rows[0]["appl_type"] == "A"]
    made = text_at(entry, "made")
    lines = [f"Orange Book on {name}" + (f", files of {made}" if made else "")]
    for title, kind in (("Latest approval of a new drug", new), ("Latest approval of a generic", generic)):
        if kind and day_of(kind[0][0]["approval_date"]):
            lines.append(f"{title}: {joined(kind[0][0]['approval_date'], _company(kind[0][0]), between=', ')}")
    return lines + [line for rows in (*new, *generic) for line in _application(rows, entry)]


def _day(row: Row) -> date:
    return day_of(row["approval_date"]) or date.min


def _company(row: Row) -> str:
    return row["applicant_full_name"] or row["applicant"]


def _application(rows: list[Row], entry: Mapping[str, Any]) -> Iterator[str]:
    first = rows[0]
    number = f"{'ANDA' if first['appl_type'] == 'A' else 'NDA'}{first['appl_no']}"
    form = joined(first["df;route"].replace(";", ", "), *dict.fromkeys(row["strength"] for row in rows))
    what = joined(first["trade_name"], f"({form})" if form else "", between=" ")
    kind = {"DISCN": "discontinued", "OTC": "over the counter"}.get(first["type"], "")
    approved = f"approved {first['approval_date']}" if day_of(first["approval_date"]) else first["approval_date"]
    yield f"- {number} " + joined(what, first["ingredient"], _company(first), approved, kind)
    keys = {product_key(row) for row in rows}
    patents = _dated(entry, "patents", keys, "patent_no", "patent_expire_date_text")
    rights = _dated(entry, "exclusivities", keys, "exclusivity_code", "exclusivity_date")
    for title, found in (("patents", patents), ("exclusivity", rights)):
        if found:
            listed = "; ".join(f"{number} to {until or 'no date'}" for number, until in found)
            last = latest(until for _, until in found) if len(found) > 1 else ""
            yield f"  {title}: {listed}" + (f"; latest: {last}" if last else "")
        elif first["appl_type"] != "A":
            yield f"  {title}: none listed"


def _dated(
    entry: Mapping[str, Any], table: str, keys: set[tuple[str, ...]], number: str, until: str
) -> list[tuple[str, str]]:
    """Numbers and last days, each once, of the rows of some products."""
    rows = rows_at(entry, table)
    mine = (row for row in rows if product_key(row) in keys)
    return list(dict.fromkeys((text_at(row, number), text_at(row, until)) for row in mine))


def _approvals(answer: Any, asked: str) -> Iterator[str]:
    rows = rows_at(answer, "results")
    total = text_at(answer, "meta", "results", "total")
    more = f", {len(rows)} of {total} are listed" if total.isdecimal() and int(total) > len(rows) else ""
    yield f"Applications at the FDA for {asked}, new drugs first, the latest approval first{more}:"
    dated = sorted(((_approved(row), row) for row in rows), key=lambda pair: pair[0][0], reverse=True)
    for (day, kind), row in sorted(dated, key=lambda pair: text_at(pair[1], "application_number").startswith("ANDA")):
        head = joined(text_at(row, "application_number"), text_at(row, "sponsor_name", max_chars=200), between=" ")
        yield f"- {joined(head or 'application without a number', f'approved {day}' if day else '', kind)}"
        for product in rows_at(row, "products")[:20]:
            ingredients = [
                joined(text_at(each, "name", max_chars=100), text_at(each, "strength", max_chars=60), between=" ")
                for each in rows_at(product, "active_ingredients")
            ]
            brand = text_at(product, "brand_name", max_chars=100)
            facts = joined(
                few(ingredients, 5), *(text_at(product, key) for key in ("dosage_form", "route", "marketing_status"))
            )
            yield f"  {joined(brand, facts, between=': ')}"


def _approved(row: Any) -> tuple[str, str]:
    """Date of the original approval, and what kind it was; "" where it is not said."""
    for submission in rows_at(row, "submissions"):
        if text_at(submission, "submission_type") == "ORIG" and text_at(submission, "submission_status") in ("AP", ""):
            kind = joined(
                text_at(submission, "submission_class_code_description", max_chars=100),
                text_at(submission, "review_priority", max_chars=40).lower(),
            )
            return iso_date(text_at(submission, "submission_status_date")), kind
    return "", ""


def _label(answer: Any, asked: str) -> Iterator[str]:
    label = rows_at(answer, "results")[0]
    names = at(label, "openfda")
    total = text_at(answer, "meta", "results", "total")
    yield f"Label of {asked}" + (f", one of {total}" if total.isdecimal() and int(total) > 1 else "")
    for title, key in _LABEL_NAMES.items():
        yield line(title, few(texts_at(names, key, max_chars=200), 5))
    yield line("Effective", iso_date(text_at(label, "effective_time")))
    for key in _LABEL_SECTIONS:
        yield from section(key.replace("_", " ").capitalize(), texts_at(label, key, max_chars=SECTION_CHARS))
