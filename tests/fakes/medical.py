"""The typed medical tools over a site of ours, and answers in the shape of the real services. All entities are
invented."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from tests.fakes.api_site import ApiSite, Reply
from tools.medical import Endpoints, medical_tools
from tools.store import PageStore
from tools.toolbox import Toolbox
from tools.types import ToolCall, ToolResult

NCT = "NCT99900001"
STUDY = f"/api/v2/studies/{NCT}"
NCBI_KEY, FDA_KEY = "ncbi+key/0123456789", "fda-key-0123456789"
KEYS = {"NCBI_API_KEY": NCBI_KEY, "OPENFDA_API_KEY": FDA_KEY}
NAMES = ("trial", "trials", "pubmed", "drug")


class Played:
    """The tools over a site, called as in an episode."""

    def __init__(self, site: ApiSite, store: PageStore | None = None, **options: Any) -> None:
        self.state: dict[str, Any] = {}
        self.store = PageStore([], "live") if store is None else store
        endpoints = Endpoints(
            clinicaltrials=f"{site.url}/api/v2",
            eutils=f"{site.url}/eutils",
            openfda=site.url,
            orange_book=f"{site.url}/book.zip?{site.name}",
        )
        settings = {"client": site.client, "environment": KEYS, "contact": "me@example.org", "timeout_s": 5.0}
        self.toolbox = Toolbox(
            medical_tools(NAMES, store=self.store, endpoints=endpoints, **settings | options), max_output_chars=8000
        )

    async def __call__(self, tool: str, /, **arguments: Any) -> ToolResult:
        call = ToolCall(id="c", name=tool, arguments=arguments, raw="")
        (result,) = await self.toolbox.run([call], metadata={}, state=self.state)
        return result


def study(**modules: Any) -> dict[str, Any]:
    """A record of ClinicalTrials.gov."""
    protocol: dict[str, Any] = {
        "identificationModule": {
            "nctId": NCT,
            "orgStudyIdInfo": {"id": "ZX-301"},
            "briefTitle": "Zorvexamab Against Bilumide in Grellin Disease",
            "officialTitle": "A Randomized Trial of Zorvexamab",
            "acronym": "BRIGHTWELL",
        },
        "statusModule": {
            "overallStatus": "COMPLETED",
            "startDateStruct": {"date": "2014-03-02", "type": "ACTUAL"},
            "completionDateStruct": {"date": "2029-11", "type": "ESTIMATED"},
        },
        "sponsorCollaboratorsModule": {
            "leadSponsor": {"name": "Ostrava Labs", "class": "INDUSTRY"},
            "collaborators": [{"name": "Peninsula Trust"}, {"class": "OTHER"}],
        },
        "descriptionModule": {"briefSummary": "Is zorvexamab better?\n\nSee [this](https://evil.test/x)."},
        "conditionsModule": {"conditions": ["Grellin Disease"], "keywords": ["grellin"]},
        "designModule": {
            "studyType": "INTERVENTIONAL",
            "phases": ["PHASE2", "PHASE3"],
            "designInfo": {
                "allocation": "RANDOMIZED",
                "maskingInfo": {"masking": "NONE"},
                "primaryPurpose": "TREATMENT",
            },
            "enrollmentInfo": {"count": 412, "type": "ACTUAL"},
        },
        "armsInterventionsModule": {
            "armGroups": [
                {"label": "Zorvexamab arm", "type": "EXPERIMENTAL", "interventionNames": ["Drug: Zorvexamab"]},
                {"label": "Control", "type": "ACTIVE_COMPARATOR", "description": "as usual"},
            ],
            "interventions": [{"type": "DRUG", "name": "Zorvexamab", "otherNames": ["ZX-1"], "armGroupLabels": []}],
        },
        "outcomesModule": {
            "primaryOutcomes": [{"measure": "Survival", "timeFrame": "5 years"}],
            "secondaryOutcomes": [{"measure": f"Second {i}"} for i in range(12)],
        },
        "referencesModule": {
            "references": [
                {"pmid": "99000001", "type": "RESULT", "citation": "Aro B. J Inv. 2019."},
                {"type": "DERIVED"},
            ]
        },
    }
    return {"protocolSection": protocol | modules, "hasResults": True, "derivedSection": {"miscInfoModule": {}}}


RESULTS = {
    "outcomeMeasuresModule": {
        "outcomeMeasures": [
            {"type": "SECONDARY", "title": "Response"},
            {
                "type": "PRIMARY",
                "title": "Overall survival",
                "timeFrame": "5 years",
                "paramType": "MEDIAN",
                "unitOfMeasure": "months",
                "groups": [{"id": "OG000", "title": "Zorvexamab"}, {"id": "OG001", "title": "Bilumide"}],
                "classes": [
                    {
                        "categories": [
                            {
                                "measurements": [
                                    {"groupId": "OG000", "value": "31.5", "lowerLimit": "28.0", "upperLimit": "35.1"},
                                    {"groupId": "OG001", "value": "20.2", "spread": "1.1"},
                                    {"groupId": "OG009"},
                                ]
                            }
                        ]
                    }
                ],
                "analyses": [
                    {
                        "groupIds": ["OG000", "OG001"],
                        "paramType": "Hazard Ratio (HR)",
                        "paramValue": "0.61",
                        "ciPctValue": "95",
                        "ciLowerLimit": "0.50",
                        "ciUpperLimit": "0.74",
                        "pValue": "<0.001",
                        "statisticalMethod": "Log Rank",
                    }
                ],
            },
        ]
    }
}


SUMMARY = {
    "uid": "99000001",
    "pubdate": "2019 May 3",
    "source": "J Inv Med",
    "authors": [{"name": f"Author {letter}", "authtype": "Author"} for letter in "ABCDE"],
    "title": "Zorvexamab in grellin disease.",
}
ARTICLE = """<?xml version="1.0" ?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" "https://dtd.test/pubmed.dtd">
<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID Version="1">99000001</PMID><Article>
<Journal><JournalIssue><Volume>7</Volume><Issue>2</Issue><PubDate><Year>2019</Year><Month>May</Month></PubDate>
</JournalIssue><Title>Journal of Inventions</Title></Journal>
<ArticleTitle>Zorvexamab in <i>grellin</i> disease &amp; others.</ArticleTitle>
<Pagination><MedlinePgn>11-19</MedlinePgn></Pagination>
<Abstract><AbstractText Label="BACKGROUND">It was <b>unknown</b>.</AbstractText>
<AbstractText>Then not.</AbstractText></Abstract>
<AuthorList><Author><LastName>Aro</LastName><ForeName>Bela</ForeName></Author><Author><LastName>Cid</LastName>
<Initials>D</Initials></Author><Author><CollectiveName>The Group</CollectiveName></Author><Author/></AuthorList>
<DataBankList><DataBank><AccessionNumberList><AccessionNumber>NCT99900001</AccessionNumber></AccessionNumberList></DataBank>
</DataBankList><PublicationTypeList><PublicationType>Clinical Trial</PublicationType></PublicationTypeList></Article>
</MedlineCitation><PubmedData><ArticleIdList><ArticleId IdType="doi">10.9999/inv.1</ArticleId></ArticleIdList>
<ReferenceList><Reference><ArticleIdList><ArticleId IdType="doi">10.9999/other</ArticleId></ArticleIdList></Reference>
</ReferenceList></PubmedData></PubmedArticle></PubmedArticleSet>"""


def zipped(products: str = "", patents: str = "", exclusivities: str = "", **options: Any) -> bytes:
    """The Orange Book's zip; rows are added to the ones of Zorvex."""
    products = (
        "Ingredient~DF;Route~Trade_Name~Applicant~Strength~Appl_Type~Appl_No~Product_No~TE_Code~Approval_Date~RLD~RS"
        "~Type~Applicant_Full_Name\n"
        "ZORVEXAMAB~CAPSULE;ORAL~ZORVEX~OSTRAVA~40MG~N~299001~001~~Aug 31, 2012~Yes~Yes~RX~OSTRAVA LABS INC\n"
        "ZORVEXAMAB~TABLET;ORAL~ZORVEX~OSTRAVA~40MG~N~299001~002~~Aug 4, 2020~Yes~No~RX~OSTRAVA LABS INC\n"
        "ZORVEXAMAB~TABLET;ORAL~ZORVEX~OSTRAVA~80MG~N~299001~003~~Aug 4, 2020~Yes~Yes~RX~OSTRAVA LABS INC\n"
        "ZORVEXAMAB SODIUM~TABLET;ORAL~ZORVEXAMAB~GENCO~40MG~A~299900~001~AB~Jan 9, 2023~No~No~RX~GENCO LTD\n"
        "BILUMIDE~TABLET;ORAL~BILU~OLDCO~5MG~N~200002~001~~Approved Prior to Jan 1, 1982~Yes~Yes~DISCN~OLDCO\n"
        "BILUMIDE; ZORVEXAMAB~TABLET;ORAL~BILUZOR~COMBI~5MG;40MG~N~299003~001~~May 5, 2021~Yes~Yes~RX~COMBI SA\n"
        f"{products}"
    )
    patents = (
        "Appl_Type~Appl_No~Product_No~Patent_No~Patent_Expire_Date_Text~Drug_Substance_Flag~Drug_Product_Flag"
        "~Patent_Use_Code~Delist_Flag~Submission_Date\n"
        "N~299001~001~9900001~Aug 13, 2027~Y~Y~~~\nN~299001~002~9900001~Aug 13, 2027~Y~Y~~~\n"
        f"N~299001~002~9900002*PED~Mar 1, 2028~~~U-1~~\nN~299001~002~9900003~~~~~~\n{patents}"
    )
    exclusivities = (
        "Appl_Type~Appl_No~Product_No~Exclusivity_Code~Exclusivity_Date\n"
        f"N~299001~002~ODE-9~Nov 17, 2026\n{exclusivities}"
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("products", products), ("patent", patents), ("exclusivity", exclusivities)):
            if name not in options.get("without", ()):
                info = zipfile.ZipInfo(f"EOB/{name}.txt", date_time=(2025, 3, 17, 0, 0, 0))
                archive.writestr(info, text.encode("cp1252"), compress_type=zipfile.ZIP_DEFLATED)
    return file.getvalue()


def book(**options: Any) -> Reply:
    return Reply(body=zipped(**options), content_type="application/zip")


APPLICATIONS = {
    "meta": {"results": {"skip": 0, "limit": 50, "total": 71}},
    "results": [
        {"application_number": "ANDA299900", "sponsor_name": "GENCO", "submissions": [
            {"submission_type": "ORIG", "submission_status": "AP", "submission_status_date": "20230109"}]},
        {"application_number": "NDA299001", "sponsor_name": "OSTRAVA", "openfda": {},
         "submissions": [{"submission_type": "SUPPL", "submission_status": "AP", "submission_status_date": "20210101"},
                         {"submission_type": "ORIG", "submission_status": "AP", "submission_status_date": "20120831",
                          "submission_class_code_description": "Type 1 - New Molecular Entity",
                          "review_priority": "PRIORITY"}],
         "products": [{"brand_name": "ZORVEX", "active_ingredients": [{"name": "ZORVEXAMAB", "strength": "40MG"}],
                       "dosage_form": "CAPSULE", "route": "ORAL", "marketing_status": "Prescription"}, {}]},
        {"application_number": "BLA799001", "submissions": None},
        {},
    ],
}  # fmt: skip
