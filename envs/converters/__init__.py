"""Named converters: every module here with a function `convert` is one, called by its module's name.

    def convert(source: str, *, on_bad_row=raise_error, <options>) -> Iterator[Task]

Keyword-only parameters are the flags that `convert_dataset.py NAME` takes (`test_size` is `--test-size`); a module may
also have `pages(source, ...) -> Iterator[Page]`, written by `--pages`. To add a data set, add a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from envs.dataset import suggest


class OptionError(ValueError):
    """An option that does not fit the source: an unknown column, split or converter."""


def names() -> list[str]:
    """Names of all converters."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "convert")]


def find(name: str) -> ModuleType:
    """The converter's module.

    Raises:
        OptionError: there is none of that name.
    """
    known = names()
    if name not in known:
        raise OptionError(f"no converter {name!r}{suggest(name, known)}; there are {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")
