"""The invented medical registry: entities, redrawn for every seed, and the pages that show them.

Nothing in it is real. A registry holds a few chains

    trial -> ingredient -> applicant (company)
                        -> Orange Book entry (patent, exclusivity)
                        -> market day of the approval (opening price)

whose trials compare each other's ingredients, so that a question can be answered only by reading: names, numbers and
page addresses are drawn anew. Names and trial numbers of the splits `train` and `test` are disjoint.

Inside a registry no first syllable, no two-digit group and no page address stands for two things, which keeps the
registry readable for a very small model; `num_chains` makes it larger and the search for a page harder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from envs.medbrowse.layout import Layout, RegistryPage, layouts

Split = Literal["train", "test"]

SITE = "https://registry.example/"
"""Address of every page is `SITE` and a page id (`p10` to `p99`)."""
MIN_CHAINS, MAX_CHAINS = 2, 6

CONSONANTS = "bdfgklmnprstvzh"
VOWELS = "aeiou"
SYLLABLES = tuple(c + v for c, v in product(CONSONANTS, VOWELS))
STEMS = ("mab", "nib", "tide", "stat", "zole", "vir", "pril", "cillin")
COMPANY_SUFFIXES = (" Pharma Inc", " Labs Ltd", " Biotech Corp", " US Inc")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
NOT_LISTED = "NA"
"""What stands in place of the date of an ingredient without exclusivity, as in MedBrowseComp."""
NO_EXCLUSIVITY_RATE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    page: str
    """Page id."""
    name: str
    """Full name of the applicant."""

    @property
    def ticker(self) -> str:
        return self.name[:4].upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketDay:
    """A company's share on one day, US dollars."""

    page: str
    open: str
    close: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrangeBookEntry:
    page: str
    patent_expires: str
    exclusivity: str
    """A date, or "NA"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    page: str
    name: str
    approved: str
    """Date of the latest approval, `Mar 12, 2015`."""
    applicant: Company
    orange_book: OrangeBookEntry
    market_day: MarketDay
    """Of the applicant, on the day of the approval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    page: str
    nct_id: str
    """`NCT` and eight digits."""
    more_effective: Ingredient
    less_effective: Ingredient
    news_page: str
    """Page id of a note that names the trial but holds nothing of use."""


@dataclass(frozen=True, kw_only=True)
class Registry:
    seed: str
    split: Split
    trials: tuple[Trial, ...]

    @classmethod
    def generate(cls, seed: str | int, *, split: Split = "train", num_chains: int = 2) -> Registry:
        """The registry of a seed.

        Raises:
            ValueError: another split than `train` and `test`, or a number of chains outside 2 to 6.
        """
        if split not in ("train", "test"):
            raise ValueError(f"registry split must be train or test, got {split!r}")
        if not MIN_CHAINS <= num_chains <= MAX_CHAINS:
            raise ValueError(f"num_chains must be {MIN_CHAINS} to {MAX_CHAINS}, got {num_chains}")
        draw = _Draw(random.Random(f"medbrowse/{split}/{seed}"), split)
        ingredients = [draw.ingredient() for _ in range(num_chains)]
        trials = []
        for i, ingredient in enumerate(ingredients):
            rival = ingredients[(i + 1 + draw.rng.randrange(num_chains - 1)) % num_chains]
            trials.append(
                Trial(
                    page=draw.page(),
                    nct_id=draw.nct_id(),
                    more_effective=ingredient,
                    less_effective=rival,
                    news_page=draw.page(),
                )
            )
        draw.rng.shuffle(trials)
        return cls(seed=str(seed), split=split, trials=tuple(trials))

    @cached_property
    def pages(self) -> dict[str, RegistryPage]:
        """Every page by its address."""
        return {
            SITE + page_id: RegistryPage(SITE + page_id, layout, values) for page_id, layout, values in self._pages()
        }

    def _pages(self) -> Iterator[tuple[str, Layout, tuple[str, ...]]]:
        kinds = layouts()
        for trial in self.trials:
            more, less = trial.more_effective, trial.less_effective
            company, entry, day = more.applicant, more.orange_book, more.market_day
            yield trial.page, kinds["trial"], (trial.nct_id, more.name, less.name, more.page, less.page)
            yield trial.news_page, kinds["news"], (trial.nct_id, company.name, company.page)
            values = (more.name, company.name, more.approved, company.page, entry.page, day.page)
            yield more.page, kinds["ingredient"], values
            yield company.page, kinds["company"], (company.name, company.ticker, more.page)
            yield entry.page, kinds["orange_book"], (more.name, entry.patent_expires, entry.exclusivity)
            yield day.page, kinds["market_day"], (company.name, more.approved, day.open, day.close)


class _Draw:
    """Draws without replacement, within one split."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.test = split == "test"
        self._pages = rng.sample(range(10, 100), 6 * MAX_CHAINS)
        self._numbers = rng.sample(range(100), 100)
        self._first = rng.sample(range(len(SYLLABLES)), len(SYLLABLES))
        self._second = rng.sample(range(len(SYLLABLES)), len(SYLLABLES))
        self._months = rng.sample(MONTHS, len(MONTHS)) * 2

    def page(self) -> str:
        return f"p{self._pages.pop()}"

    def _number(self, allowed: Callable[[int], bool] = lambda n: True) -> str:
        for i, number in enumerate(self._numbers):
            if allowed(number):
                return f"{self._numbers.pop(i):02d}"
        # Registries of many chains run out of unused groups of a range: then one is used twice.
        return f"{self.rng.choice([n for n in range(100) if allowed(n)]):02d}"

    def _name(self) -> str:
        first = self._first.pop()
        for i, second in enumerate(self._second):
            if self._of_split(first + second):
                del self._second[i]
                return SYLLABLES[first].capitalize() + SYLLABLES[second]
        raise AssertionError("75 second syllables leave one of each residue")

    def _of_split(self, number: int) -> bool:
        """A fifth of all names and numbers belongs to the test split."""
        return (number % 5 == 0) == self.test

    def _date(self, first_year: int, last_year: int) -> str:
        day = self._number(lambda n: 1 <= n <= 28)
        year = self._number(lambda n: first_year <= n <= last_year)
        return f"{self._months.pop()} {day}, 20{year}"

    def nct_id(self) -> str:
        head = "".join(self._number() for _ in range(3))
        return f"NCT{head}{self._number(self._of_split)}"

    def ingredient(self) -> Ingredient:
        has_exclusivity = self.rng.random() >= NO_EXCLUSIVITY_RATE
        return Ingredient(
            page=self.page(),
            name=self._name() + self.rng.choice(STEMS),
            approved=self._date(2, 24),
            applicant=Company(page=self.page(), name=self._name() + self.rng.choice(COMPANY_SUFFIXES)),
            orange_book=OrangeBookEntry(
                page=self.page(),
                patent_expires=self._date(27, 45),
                exclusivity=self._date(25, 35) if has_exclusivity else NOT_LISTED,
            ),
            market_day=MarketDay(
                page=self.page(),
                open=f"{self._number(lambda n: n >= 10)}.{self._number()}",
                close=f"{self._number(lambda n: n >= 10)}.{self._number()}",
            ),
        )
