"""`drug` as a model calls it, on an invented Orange Book and openFDA."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.api_site import ApiSite, Reply, api_site
from tests.fakes.medical import APPLICATIONS, FDA_KEY, Played, book, zipped
from tools.medical.orange_book import OrangeBookError, day_of, latest, read_orange_book


@pytest.fixture
async def site() -> AsyncIterator[ApiSite]:
    async with api_site() as site:
        yield site


async def test_patents_of_a_drug(site: ApiSite) -> None:
    site.says("/book.zip", book())
    played = Played(site)
    result = await played("drug", name="zorvexamab")
    assert result.content.splitlines()[1:-1] == [
        "Orange Book on ZORVEXAMAB, files of 2025-03-17",
        "Latest approval of a new drug: Aug 4, 2020, OSTRAVA LABS INC",
        "Latest approval of a generic: Jan 9, 2023, GENCO LTD",
        "- NDA299001 ZORVEX (TABLET, ORAL, 40MG, 80MG), ZORVEXAMAB, OSTRAVA LABS INC, approved Aug 4, 2020",
        "  patents: 9900001 to Aug 13, 2027; 9900002*PED to Mar 1, 2028; 9900003 to no date; latest: Mar 1, 2028",
        "  exclusivity: ODE-9 to Nov 17, 2026",
        "- NDA299001 ZORVEX (CAPSULE, ORAL, 40MG), ZORVEXAMAB, OSTRAVA LABS INC, approved Aug 31, 2012",
        "  patents: 9900001 to Aug 13, 2027",
        "  exclusivity: none listed",
        "- ANDA299900 ZORVEXAMAB (TABLET, ORAL, 40MG), ZORVEXAMAB SODIUM, GENCO LTD, approved Jan 9, 2023",
    ]
    brand = await played("drug", name='"Zorvex"')
    assert "Orange Book on ZORVEX," in brand.content
    assert "ANDA299900" not in brand.content
    old = await played("drug", name="bilumide")
    assert "approved Approved Prior" not in old.content
    assert "OLDCO, Approved Prior to Jan 1, 1982, discontinued" in old.content
    assert "BILUZOR" not in old.content
    both = await played("drug", name="zorvexamab and bilumide")
    assert "NDA299003 BILUZOR" in both.content
    assert "NDA299001" not in both.content
    close = await played("drug", name="zorvexamib")
    assert close.content.startswith("not_found: the Orange Book has no ZORVEXAMIB; similar names: ZORVEXAMAB")
    nothing = await played("drug", name="qqqqq")
    assert nothing.content.endswith("biologics are not in it: try part approvals")
    assert (await played("drug", name='"*"')).content == "invalid_arguments: give the name of one drug"
    assert len(site.asked) == 1, "the files are downloaded once"


async def test_the_book_is_downloaded_once_by_many_episodes(site: ApiSite) -> None:
    site.says("/book.zip", Reply(body=zipped(), content_type="application/zip", delay_s=0.2))
    results = await asyncio.gather(*(Played(site)("drug", name="zorvexamab") for _ in range(8)))
    assert {result.error for result in results} == {None}
    assert len(site.asked) == 1


async def test_a_book_of_ones_own(site: ApiSite, tmp_path: Path) -> None:
    (tmp_path / "book.zip").write_bytes(zipped())
    folder = tmp_path / "folder"
    with zipfile.ZipFile(io.BytesIO(zipped())) as archive:
        for info in archive.infolist():
            path = folder / Path(info.filename).name
            folder.mkdir(exist_ok=True)
            path.write_bytes(archive.read(info))
    texts = []
    for path in (tmp_path / "book.zip", folder):
        result = await Played(site, orange_book=path)("drug", name="zorvex")
        texts.append(result.content.splitlines()[2:-1])
    assert texts[0] == texts[1]
    assert site.asked == []
    with pytest.raises(OrangeBookError, match=r"there is no .*; name the FDA's zip"):
        Played(site, orange_book=tmp_path / "none.zip")


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("products.txt", "w") as member:
        for _ in range(40):
            member.write(bytes(1_000_000))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "BadZipFile"),
        (b"<html>Apology</html>", "BadZipFile"),
        (zipped()[:-30], "BadZipFile"),
        (zipped(without=("patent",)), "no patent.txt"),
        (bomb(), "larger than 30000000 bytes"),
        (zipped().replace(b"EOB/products.txt", b"EOB/productx.txt"), "no products.txt"),
    ],
)
async def test_broken_books(site: ApiSite, data: bytes, said: str) -> None:
    with pytest.raises(OrangeBookError, match=said):
        read_orange_book(data)
    site.says("/book.zip", Reply(body=data, content_type="application/zip"))
    result = await Played(site)("drug", name="zorvex")
    assert result.content == "execution: the Orange Book's files cannot be read; try part approvals"


def test_odd_rows_of_a_book() -> None:
    data = zipped(
        products="SHORT~ROW\n\nMÉL~X;Y~Mél~C~1~N~1~1~~soon~~~RX~\n", patents="N~1~1~77~Feb 30, 2030~~~~~\nshort\n"
    )
    entry = read_orange_book(data).entry("MÉL")
    assert [row["appl_no"] for row in entry["products"]] == ["1"]
    assert [row["patent_no"] for row in entry["patents"]] == ["77"]
    json.dumps(entry)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("products.txt", "Ingredient~DF;Route\nA~B\n")
        archive.writestr("patent.txt", "")
        archive.writestr("exclusivity.txt", "")
    with pytest.raises(OrangeBookError, match="has no column 'trade_name'"):
        read_orange_book(file.getvalue())


def test_latest_of_dates() -> None:
    assert latest(["Aug 13, 2027", "Mar 1, 2028", "Dec 31, 2026", "", "soon"]) == "Mar 1, 2028"
    assert latest(["Approved Prior to Jan 1, 1982"]) == ""
    assert day_of("Feb 30, 2030") is None


async def test_approvals_of_a_drug(site: ApiSite) -> None:
    site.says("/drug/drugsfda.json", APPLICATIONS)
    result = await Played(site)("drug", name='zor\\vex"amab', part="approvals")
    lines = result.content.splitlines()[1:-1]
    assert lines[0] == (
        "Applications at the FDA for ZOR VEX AMAB, new drugs first, the latest approval first, 4 of 71 are listed:"
    )
    assert lines[1:3] == [
        "- NDA299001 OSTRAVA, approved 2012-08-31, Type 1 - New Molecular Entity, priority",
        "  ZORVEX: ZORVEXAMAB 40MG, CAPSULE, ORAL, Prescription",
    ]
    assert lines[-1] == "- ANDA299900 GENCO, approved 2023-01-09"
    assert site.asked[0].query["api_key"] == FDA_KEY
    assert 'products.brand_name:"ZOR VEX AMAB"' in site.asked[0].query["search"]


async def test_the_label_of_a_drug(site: ApiSite) -> None:
    label = {
        "openfda": {"brand_name": ["Zorvex"], "manufacturer_name": ["Ostrava Labs"], "route": "ORAL"},
        "effective_time": "20240115",
        "indications_and_usage": ["1 INDICATIONS\nZorvex is for grellin disease."],
        "boxed_warning": ["WARNING: " + "long " * 2000],
        "spl_product_data_elements": ["noise"],
    }
    site.says("/drug/label.json", {"meta": {"results": {"total": 3}}, "results": [label]}, {"results": [{}]})
    played = Played(site)
    result = await played("drug", name="zorvex", part="label")
    assert result.content.splitlines()[1:5] == [
        "Label of ZORVEX, one of 3",
        "Brand: Zorvex",
        "Company: Ostrava Labs",
        "Effective: 2024-01-15",
    ]
    assert "Indications and usage:\n- 1 INDICATIONS Zorvex is for grellin disease." in result.content
    assert "noise" not in result.content
    assert "Label of ZORVEX" in (await played("drug", name="zorvex", part="label")).content


async def test_drugs_that_openfda_does_not_have(site: ApiSite) -> None:
    missing = {"error": {"code": "NOT_FOUND", "message": "No matches found!"}}
    for path in ("/drug/drugsfda.json", "/drug/label.json"):
        site.says(path, Reply(body=missing, status=404), {"results": []}, {})
    played = Played(site)
    for part in ("approvals", "label") * 3:
        result = await played("drug", name="qqq", part=part)
        assert result.content == "not_found: openFDA has nothing on QQQ; try its ingredient's name"
