"""Questions for the web: what the environment asks where it is given no task file.

They have the shape of MedBrowseComp's later hops (arXiv:2505.14963): from an ingredient to its company, its patent, its
exclusivity, its label, its trials. None of them is one of its questions: that benchmark is drawn from oncology, and no
ingredient here is. There are no golden answers: pure distillation needs none, and live pages move.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from envs.types import Task

SYSTEM = (
    "You answer questions about medicines from pages of the web.\n"
    "Find sources with the tools, read them, then call submit_answer once. Answer NA where there is nothing to find.\n"
)

_NAMES = """
abatacept acamprosate acyclovir adalimumab albuterol alendronate alirocumab allopurinol almotriptan alogliptin
amlodipine apixaban apremilast aripiprazole atenolol atogepant atomoxetine atorvastatin azilsartan baclofen
baricitinib benazepril bictegravir bimatoprost brexpiprazole brivaracetam budesonide bupropion buspirone
canagliflozin cariprazine carvedilol cefdinir celecoxib certolizumab cetirizine chlorthalidone clonidine clopidogrel
colesevelam cyclobenzaprine dabigatran dapsone darunavir desvenlafaxine dexlansoprazole diclofenac digoxin diltiazem
dolutegravir donepezil doravirine doxycycline dulaglutide duloxetine dupilumab edoxaban efinaconazole eletriptan
eluxadoline empagliflozin entecavir eplerenone eprosartan erenumab ertugliflozin escitalopram eslicarbazepine
esomeprazole eszopiclone etanercept evolocumab exenatide ezetimibe famciclovir febuxostat felodipine fenofibrate
fesoterodine fidaxomicin finerenone fluoxetine fluticasone fosinopril fremanezumab gabapentin galcanezumab
glecaprevir glimepiride glipizide golimumab guanfacine guselkumab hydroxychloroquine ibandronate icosapent
inclisiran indacaterol insulin-degludec irbesartan isavuconazonium ivabradine ixekizumab lacosamide lamotrigine
lansoprazole lasmiditan latanoprost ledipasvir leflunomide lemborexant levetiracetam levocetirizine levothyroxine
linaclotide linagliptin linezolid liraglutide lisinopril lofexidine losartan lubiprostone lumateperone lurasidone
macitentan maraviroc memantine mepolizumab metformin methylphenidate metoprolol mirabegron mirtazapine modafinil
montelukast naloxegol naltrexone naproxen nebivolol netarsudil niacin nifedipine nirmatrelvir
nitrofurantoin obeticholic-acid olmesartan omadacycline omeprazole oseltamivir ospemifene oxcarbazepine ozanimod
paliperidone pantoprazole paroxetine perampanel pitavastatin posaconazole prasugrel pravastatin pregabalin
prucalopride quetiapine quinapril rabeprazole raloxifene raltegravir ramelteon ranolazine rasagiline rifaximin
rilpivirine rimegepant riociguat risankizumab risedronate risperidone rivaroxaban rivastigmine roflumilast
ropinirole rosuvastatin sacubitril safinamide sarilumab saxagliptin secukinumab semaglutide sertraline sildenafil
silodosin sitagliptin sofosbuvir solifenacin solriamfetol sumatriptan suvorexant tadalafil tafluprost tapentadol
tasimelteon tedizolid telmisartan tenapanor tenofovir-alafenamide teriflunomide teriparatide ticagrelor timolol
tiotropium tirzepatide tofacitinib tolterodine tolvaptan topiramate torsemide trazodone treprostinil ubrogepant
umeclidinium upadacitinib ustekinumab valacyclovir valbenazine valsartan vardenafil varenicline vedolizumab
venlafaxine verapamil vericiguat vibegron vilanterol vilazodone voriconazole vortioxetine zolmitriptan zonisamide
"""
INGREDIENTS = tuple(_NAMES.split())
"""Generic names of medicines approved in the United States, outside oncology."""


@dataclass(frozen=True, slots=True)
class WebQuestion:
    name: str
    ask: str


QUESTIONS = (
    WebQuestion(
        "Applicant_Full_Name",
        "Which company had the latest FDA approval of a product with {name}? Answer with its full name.",
    ),
    WebQuestion(
        "Patent_Expire_Date_Text",
        "When does the last of the patents expire that the FDA's Orange Book lists for products with {name}? "
        "Answer with the date, such as Aug 13, 2027, or NA.",
    ),
    WebQuestion(
        "Exclusivity_Date",
        "When does the last exclusivity end that the FDA's Orange Book lists for products with {name}? Answer with the "
        "date, such as Nov 17, 2026, or NA.",
    ),
    WebQuestion(
        "Boxed_Warning",
        "Which risk does the boxed warning in the FDA label of {name} name first? "
        "Answer with a few words, or NA if the label has none.",
    ),
    WebQuestion(
        "Trial_Sponsor",
        "Which sponsor has registered the completed phase 3 trial of {name} with the most participants at "
        "ClinicalTrials.gov? Answer with the trial's number and the sponsor's name.",
    ),
)
EVAL_SHARE = 5
"""Every fifth ingredient is asked for in the split `test` only."""


def web_tasks(seed: int, num_tasks: int | None = None, *, split: str = "train") -> list[Task]:
    """Tasks of one split in an order drawn from the seed: no task comes twice, so there are at most as many as there
    are. Ingredients of the splits are disjoint.

    Args:
        num_tasks: the first so many; None: all.
        split: `train` or `test`.
    """
    names = [name for i, name in enumerate(INGREDIENTS) if (i % EVAL_SHARE == 0) == (split == "test")]
    pairs = [(name, question) for name in names for question in QUESTIONS]
    random.Random(f"medbrowse/web/{split}/{seed}").shuffle(pairs)
    return [_task(name.replace("-", " "), question, split) for name, question in pairs[:num_tasks]]


def _task(name: str, question: WebQuestion, split: str) -> Task:
    return Task(
        messages=(
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question.ask.format(name=name)},
        ),
        metadata={"dataset": "medbrowse_web", "question_type": question.name, "ingredient": name, "answer": None},
        id=f"medbrowse_web/{split}/{name.replace(' ', '-')}/{question.name}",
    )
