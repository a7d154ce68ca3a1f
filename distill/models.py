"""Where a model is. The only place that knows the `builtin:` scheme.

    resolve("Qwen/Qwen3-8B")                          "Qwen/Qwen3-8B"      (a hub name, as it stands)
    resolve("models/mine")                            Path("models/mine")  (a folder)
    resolve("builtin:medbrowse-teacher")              a folder in the user's cache, made on first use
    resolve("builtin:medbrowse-student@1")            the same recipe with seed 1

A built-in model is kept in the cache under a name that hashes what made it: the source text of generator, tokenizer and
recipe, the seed, the versions of torch and transformers. Change any of them and it is made again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "builtin:"
Progress = Callable[[str], None]


class ModelNameError(ValueError):
    """No such built-in model; the message lists those there are."""


def resolve(name: str | Path, progress: Progress = print) -> Path | str:
    """The folder of a local or built-in model, or the hub name as it stands.

    Args:
        name: folder, hub name, or `builtin:NAME` with an optional `@SEED`.
        progress: told, line by line, what a model that has to be made is doing.

    Raises:
        ModelNameError: a `builtin:` name that is not there, or a seed that is no number.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return _builtin(text, progress)
    path = Path(text).expanduser()
    return path if path.is_dir() else text


def builtin_names() -> tuple[str, ...]:
    """The built-in models, with their prefix."""
    from distill.tiny.recipes import RECIPES

    return tuple(PREFIX + name for name in RECIPES)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/distill-gym`, or the platform's place for caches."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "distill-gym"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "distill-gym"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "distill-gym" / "cache"
    return Path.home() / ".cache" / "distill-gym"


def _builtin(text: str, progress: Progress) -> Path:
    from distill.tiny.recipes import RECIPES

    name, at, seed_text = text.removeprefix(PREFIX).partition("@")
    if name not in RECIPES:
        raise ModelNameError(f"no built-in model {text!r}; there are: {', '.join(builtin_names())}")
    if at and not seed_text.isdecimal():
        raise ModelNameError(f"{text!r}: the seed after @ must be a whole number, got {seed_text!r}")
    seed = int(seed_text or 0)
    folder = cache_folder() / "models" / f"{name}-{seed}-{fingerprint()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), progress):
            if not folder.is_dir():
                _make(name, seed, folder, progress)
    return folder


def _make(name: str, seed: int, folder: Path, progress: Progress) -> None:
    """Makes the model in a temporary folder beside its place and moves it there whole."""
    from distill.tiny.recipes import RECIPES, make

    started = time.monotonic()
    recipe = RECIPES[name]
    parent = None
    if recipe.parent is not None:
        parent = _builtin(f"{PREFIX}{recipe.parent}@{seed}", progress)
    progress(f"{PREFIX}{name}@{seed}: made on first use, kept in {folder.parent}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "model"
        make(recipe, made, parent=parent, seed=seed, progress=progress)
        made.rename(folder)
    progress(f"{PREFIX}{name}@{seed}: done in {time.monotonic() - started:.0f} s")


def fingerprint() -> str:
    """Hash of what makes the built-in models, except their seed: twelve hex digits."""
    import torch
    import transformers

    import distill.tiny
    import envs.medbrowse

    digest = hashlib.sha256(f"torch {torch.__version__} transformers {transformers.__version__}\n".encode())
    generator = ("layout.py", "registry.py", "tasks.py", "expert.py", "demos.py")
    sources = [Path(envs.medbrowse.__path__[0]) / file for file in generator]
    sources += sorted(Path(distill.tiny.__path__[0]).glob("*.py"))
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process at a time, by the operating system's lock on a file: it is freed however its holder ends."""
    with path.open("a+b") as file:
        if not _try_lock(file.fileno()):
            progress(f"waiting for another process that makes {path.stem}")
            while not _try_lock(file.fileno()):
                time.sleep(0.5)
        yield


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
