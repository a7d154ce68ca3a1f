"""A scripted expert: solves every task of the invented registry from what it reads, one action at a time.

It sees only messages. With an `error_rate` each of its decisions goes wrong with that probability: a mistyped search,
a wrong link, an answer too early, a wrong value. Such demonstrations make weak students (distill/tiny).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps

from envs.medbrowse.tasks import QUESTION_TYPES
from envs.types import AssistantMessage, Message
from tools.types import ToolCall

_TRIAL = re.compile(r"NCT\d{8}")
_FACT = re.compile(r"^- ([^:\[\n]+): (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]\n]+)\]\((\S+)\)")
_HIT = re.compile(r"^(.+) (/\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Route:
    """Link texts to follow from the trial's page on, and the key of the answer on the last page."""

    links: tuple[str, ...]
    key: str


_ROUTES = {
    "Ingredient": _Route((), "more effective"),
    "Applicant_Full_Name": _Route(("more effective",), "applicant"),
    "Patent_Expire_Date_Text": _Route(("more effective", "Orange Book"), "patent expires"),
    "Exclusivity_Date": _Route(("more effective", "Orange Book"), "exclusivity"),
    "Open_on_Approval": _Route(("more effective", "market on approval"), "open"),
}


class ScriptedExpert:
    """One episode's expert.

    Example:
        expert = ScriptedExpert(messages)
        action = expert.act(messages)               # the first action
        action = expert.act(outcome.observation)    # and so on, until the episode has ended

    Args:
        messages: the dialogue that the task starts with.
        error_rate: probability that a decision goes wrong.
        rng: decides which do; needed where `error_rate` is not 0.

    Raises:
        ValueError: the question is not one of the registry's.
    """

    def __init__(
        self, messages: Sequence[Message], *, error_rate: float = 0.0, rng: random.Random | None = None
    ) -> None:
        if error_rate > 0 and rng is None:
            raise ValueError("ScriptedExpert: an error_rate needs an rng")
        text = messages[-1]["content"]
        trial = _TRIAL.search(text)
        kinds = [kind for kind in QUESTION_TYPES if text.endswith(kind.ask)]
        if trial is None or not kinds:
            raise ValueError(f"ScriptedExpert: not a question of the invented registry: {text!r}")
        self._nct_id = trial.group()
        route = _ROUTES[kinds[0].name]
        self._links, self._key = list(route.links), route.key
        self._error_rate = error_rate
        self._rng = rng or random.Random(0)
        self._num_actions = 0

    def act(self, observation: Sequence[Message]) -> AssistantMessage:
        """The next action, from the newest messages only."""
        self._num_actions += 1
        if self._num_actions == 1:
            return self._search()
        page = observation[-1]["content"]
        if self._errs():
            return self._blunder(page)
        if self._num_actions == 2:
            url = dict(_HIT.findall(page)).get(self._nct_id)
            return self._call("browse", url=url) if url else self._guess(page)
        if self._links:
            url = dict(_LINK.findall(page)).get(self._links.pop(0))
            return self._call("browse", url=url) if url else self._guess(page)
        value = dict(_FACT.findall(page)).get(self._key)
        return self._call("submit_answer", answer=value) if value else self._guess(page)

    def _search(self) -> AssistantMessage:
        query = self._nct_id
        if self._errs():
            pairs = [query[i : i + 2] for i in range(3, 11, 2)]
            self._rng.shuffle(pairs)
            query = "NCT" + "".join(pairs)
        return self._call("search", query=query)

    def _errs(self) -> bool:
        return self._error_rate > 0 and self._rng.random() < self._error_rate

    def _blunder(self, page: str) -> AssistantMessage:
        """A link out of those in sight, or a value out of those in sight."""
        urls = [url for _, url in _LINK.findall(page)] or [url for _, url in _HIT.findall(page)]
        if urls and self._rng.random() < 0.6:
            if self._num_actions > 2:
                self._links = self._links[1:]
            return self._call("browse", url=self._rng.choice(urls))
        return self._guess(page)

    def _guess(self, page: str) -> AssistantMessage:
        values = [value for _, value in _FACT.findall(page)]
        return self._call("submit_answer", answer=self._rng.choice(values) if values else "NA")

    def _call(self, name: str, **arguments: str) -> AssistantMessage:
        raw = dumps({"name": name, "arguments": arguments})
        call = ToolCall(id=f"call_{self._num_actions - 1}_0", name=name, arguments=dict(arguments), raw=raw)
        return AssistantMessage(content="", tool_calls=(call,))
