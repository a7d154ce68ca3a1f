"""The MedBrowse environment: find the answer in web pages and submit it.

env = envs.make("medbrowse")                                                # an invented registry a task
env = envs.make("medbrowse", pages="pubmedqa/pages.jsonl")                  # any stored pages, with tasks of your own
env = envs.make("medbrowse", browse={"mode": "record", "store": "pages"})   # the web (docs/medbrowse.md), likewise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from envs.medbrowse import comp_graders, graders
from envs.medbrowse.registry import SITE, Registry
from envs.medbrowse.tasks import MAX_HOPS, make_tasks
from envs.medbrowse.web_tasks import web_tasks
from envs.tool_env import OPEN_LIMITS, EnvSetupError, Grader, ToolEnv
from envs.types import Limits, Message, Task
from tools.pages import Page
from tools.search import Document, SearchIndex
from tools.store import PageStore
from tools.tool import State, Tool, tool
from tools.web import WebTools, documents_of

if TYPE_CHECKING:
    from envs.medbrowse.live import LiveWeb

ANSWER_KEY = "answer"
"""Key of the episode's state: what was submitted."""
NUM_TASKS = 2000
SPLITS = {"train": "train", "eval": "test", "test": "test"}
"""Splits of the gym, and the registry's: names and numbers of the two are disjoint."""


class MedBrowseEnv(ToolEnv):
    """Tools: `search(query)`, `browse(url, page=1)`, `find(text)`, `submit_answer(answer)`, which ends the episode; on
    the web further ones.

    Args:
        pages: a JSONL page store (docs/formats.md), which all tasks search. None: each task has an invented registry,
            drawn from the seed in its metadata.
        browse: the table `[env_args.browse]`: the web or a recording of it (docs/medbrowse.md).
        registry_seed: of the environment's own tasks.
        split: `train` or `test`, the split that `reset` draws from when it is given no task.
        max_hops: 1 to 5: the question types up to this one (envs/medbrowse/README.md).
        num_chains: 2 to 6: the size of each registry.
        page_chars: characters of a page that `browse` shows at once.
        limits, tasks, skip_verification: as in `ToolEnv`.

    Raises:
        EnvSetupError: an option out of its range.
        PageStoreError, FileNotFoundError: the page store cannot be read.
    """

    def __init__(
        self,
        *,
        pages: str | Path | None = None,
        browse: Mapping[str, Any] | None = None,
        registry_seed: int = 0,
        split: str = "train",
        max_hops: int = MAX_HOPS,
        num_chains: int = 2,
        page_chars: int | None = None,
        limits: Limits = OPEN_LIMITS,
        tasks: Sequence[Task] | str | Path | None = None,
        skip_verification: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise EnvSetupError(f"medbrowse: split must be train or test, got {split!r}")
        if not 1 <= max_hops <= MAX_HOPS:
            raise EnvSetupError(f"medbrowse: max_hops must be 1 to {MAX_HOPS}, got {max_hops}")
        if pages is not None and browse is not None:
            raise EnvSetupError("medbrowse: give either pages, which are searched, or browse, which is the web")
        self._live: LiveWeb | None = None
        if browse is not None:
            from envs.medbrowse.live import LiveWeb

            self._live = LiveWeb(browse, max_chars=limits.max_tool_output_chars)
        self._registry_seed, self._split, self._max_hops, self._num_chains = registry_seed, split, max_hops, num_chains
        self._stored = pages is not None
        store, index = (
            _stored_pages(str(pages), _stamp(pages)) if pages is not None else (PageStore(()), SearchIndex(()))
        )
        page_chars = page_chars if page_chars is not None else limits.max_tool_output_chars
        # A corpus of many sites shows absolute URLs; the invented registry shows paths.
        self._web = WebTools(store, index, page_chars=page_chars, base_url=None if self._stored else SITE)
        super().__init__(limits=limits, tasks=tasks, skip_verification=skip_verification)

    def tools(self) -> Sequence[Tool]:
        if self._live is not None:
            return (*self._live.tools(), self.submit_answer)
        return (self._web.search, self._web.browse, self._web.find, self.submit_answer)

    @tool(ends_episode=True)
    async def submit_answer(self, answer: Annotated[str, "the answer"], *, state: State) -> str:
        """Submit the answer. This ends the task."""
        state[ANSWER_KEY] = answer
        return "submitted"

    def default_tasks(self, split: str = "", num_tasks: int | None = None) -> Sequence[Task]:
        """The invented registry's tasks: `num_tasks` of them, question types in turn; on the web those of
        `envs.medbrowse.web_tasks`, as many as there are. With `pages`, none."""
        if self._stored:
            return ()
        chosen = split or self._split
        if chosen not in SPLITS:
            raise ValueError(f"medbrowse: split must be train or eval, got {chosen!r}")
        if self._live is not None:
            return web_tasks(self._registry_seed, num_tasks, split=SPLITS[chosen])
        return make_tasks(
            self._registry_seed,
            num_tasks if num_tasks is not None else NUM_TASKS,
            split="test" if SPLITS[chosen] == "test" else "train",
            max_hops=self._max_hops,
            num_chains=self._num_chains,
        )

    async def on_reset(self, task: Task) -> None:
        if self._live is not None:
            await self._live.begin(self.state, task)
        if self._stored or self._live is not None:
            return
        self._web.store, self._web.index = registry_pages(registry_of(task))

    def on_no_call(self, action: Any) -> Message:
        return {"role": "user", "content": "Call a tool; when you know the answer, submit_answer."}

    def episode_metadata(self) -> dict[str, Any]:
        if self._live is None and not self._stored:
            return {}
        store = self._live.store if self._live is not None else self._web.store
        return {"pages": {"mode": store.mode, "manifest": store.manifest_hash}}

    async def aclose(self) -> None:
        if self._live is not None:
            await self._live.aclose()

    def grader(self) -> Grader:
        return _grade


def registry_of(task: Task) -> Registry:
    """The registry that a task is asked of.

    Raises:
        ValueError: the task names none.
    """
    origin = task.metadata.get("registry")
    if not isinstance(origin, dict) or not {"seed", "split", "num_chains"} <= origin.keys():
        raise ValueError(
            f"medbrowse: task {task.id!r} names no invented registry in its metadata (registry = seed, split, "
            "num_chains). Tasks over stored pages need the environment's pages: env_args.pages = 'pages.jsonl'"
        )
    return Registry.generate(origin["seed"], split=origin["split"], num_chains=origin["num_chains"])


def registry_pages(registry: Registry) -> tuple[PageStore, SearchIndex]:
    """A registry as pages to open and an index to search them."""
    pages = registry.pages.values()
    store = PageStore(Page(url=page.url, body=page.html) for page in pages)
    return store, SearchIndex(Document(page.url, page.title, page.text) for page in pages)


def _grade(task: Task, state: dict[str, Any], messages: Sequence[Message]) -> dict[str, float]:
    answer = state.get(ANSWER_KEY)
    if "answer" not in task.metadata:
        raise ValueError(f"medbrowse: task {task.id!r} has no metadata.answer to grade by")
    expected = task.metadata["answer"]
    if expected is None:  # nobody knows it: not graded
        return {}
    kind = str(task.metadata.get("question_type", ""))
    grade = comp_graders.grade if kind in comp_graders.COMP_GRADERS else graders.grade
    accepted = task.metadata.get("accepted")
    golds = accepted if isinstance(accepted, list) and accepted else [expected]
    right = any(grade(kind, answer, str(gold)) for gold in golds)
    return {"success": float(right), "answered": float(answer is not None)}


@lru_cache(maxsize=2)
def _stored_pages(path: str, stamp: tuple[int, int]) -> tuple[PageStore, SearchIndex]:
    """Shared by the environments of concurrent episodes: both are only read. `stamp` tells a changed file."""
    store = PageStore(path)
    return store, SearchIndex(documents_of(store))


def _stamp(path: str | Path) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_size
