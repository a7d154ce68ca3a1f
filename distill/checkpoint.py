"""What a run needs to go on, on disk, whole or not at all.

    checkpoints/step_000012/
        model/                  opens with `from_pretrained` (weights, configuration, tokenizer; LoRA merged)
        adapter.safetensors     with LoRA: the adapters unmerged
        optimizer.safetensors   moments, and float32 masters of narrower weights
        state.json              step, cursor into the tasks, steps that are played and not trained on, states of the
                                random number generators of each rank
        MANIFEST.json           size and SHA-256 of every other file; written last

A checkpoint is built under another name, synced to the disk and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

if TYPE_CHECKING:
    from distill.student import Student

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step_(\d{6,})")
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


class CheckpointError(Exception):
    """A checkpoint cannot be written, or none of those there can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint: every file is there and is what was written."""

    path: Path
    step: int
    """Optimiser steps made; the step of metrics and trackers goes on from it."""
    cursor: int
    """Tasks taken by these steps."""
    pending: tuple[int, ...] = ()
    """Later steps whose episodes are all played and scored, in their episode files, and not yet trained on."""
    rng: list[dict[str, Any]]
    """`rng_state` of each rank that saved it."""

    def restore_rng(self, rank: int = 0) -> None:
        """Put back the states of torch's, numpy's and Python's global generators; a rank that was not there when this
        was saved keeps its own."""
        if rank < len(self.rng):
            set_rng_state(self.rng[rank])


def save_checkpoint(
    folder: Path,
    step: int,
    student: Student,
    *,
    cursor: int,
    keep_last: int,
    keep_every: int = 0,
    keep: Collection[int] = (),
    pending: Sequence[int] = (),
) -> Path:
    """Write `folder/step_<step>`, then delete all but the last `keep_last` checkpoints up to it.

    Args:
        keep_every: those whose step is a multiple of it are never deleted; 0: none is kept for that.
        keep: steps that are not deleted this time.
        pending: `Checkpoint.pending`.

    Raises:
        CheckpointError: the disk refused; older checkpoints are as they were.
    """
    final = folder / f"step_{step:06d}"
    building = folder / f".building_{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".building_*"), *folder.glob(".replaced_*")):
            shutil.rmtree(leftover)
        building.mkdir()
        student.save(building)
        state = {"step": step, "cursor": cursor, "pending": list(pending), "rng": student.rng_states()}
        (building / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {path.relative_to(building).as_posix(): _digest(path) for path in _files(building)}
        for path in _files(building):
            _sync(path)
        manifest = building / MANIFEST
        manifest.write_text(json.dumps({"version": 1, "step": step, "files": files}, indent=1), encoding="utf-8")
        _sync(manifest)
        for path in (*(p for p in building.rglob("*") if p.is_dir()), building):
            _sync(path)
        if final.exists():  # damaged, or of a future that was rewound
            final.rename(folder / f".replaced_{step:06d}")
        building.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is called by safetensors
        shutil.rmtree(building, ignore_errors=True)
        room = _room(folder, student)
        raise CheckpointError(
            f"{final}: cannot be written: {error}{room}. Older checkpoints are as they were."
        ) from error
    _prune(folder, step, keep_last, keep_every, keep)
    return final


def _room(folder: Path, student: Student) -> str:
    """What a checkpoint needs and what there is."""
    tensors = (*student.model.parameters(), *student.optimizer.state().values())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" (a checkpoint needs about {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free there)"


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step`, so that none of them is taken for a future of it.

    Returns:
        Their new places, `rewound_<step>` in the same folder.
    """
    moved = []
    for later, path in sorted(_checkpoints(folder)):
        if later > step:
            aside = folder / f"rewound_{later:06d}"
            if aside.exists():
                shutil.rmtree(aside)
            moved.append(path.rename(aside))
    if moved:
        _sync(folder)
    return moved


def find_latest(folder: Path, report: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint; None if there are none at all.

    Args:
        report: told of each damaged checkpoint that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, all of them damaged. Starting over would throw the run away, which is
            not for this function to decide.
    """
    found = sorted(_checkpoints(folder), reverse=True)
    for _, path in found:
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            report(f"passed over: {error}")
    if found:
        raise CheckpointError(f"{folder}: none of the {len(found)} checkpoints is whole; remove them to start over")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Check every file of one checkpoint against its manifest.

    Raises:
        CheckpointError: naming the file that is missing, not what was written, or not ours.
    """
    manifest = _read_json(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"state.json", "optimizer.safetensors"} <= files.keys():
        raise CheckpointError(f"{path / MANIFEST}: does not list the files of a checkpoint")
    for name, wanted in files.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{path / MANIFEST}: names {name!r}, which is outside of the checkpoint")
        try:
            size = (path / name).stat().st_size
            if size != wanted["size"]:
                raise CheckpointError(f"{path / name}: has {size} bytes, {wanted['size']} were written")
            if _digest(path / name)["sha256"] != wanted["sha256"]:
                raise CheckpointError(f"{path / name}: is not what was written (SHA-256 differs)")
        except FileNotFoundError:
            raise CheckpointError(f"{path / name}: is missing") from None
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / name}: cannot be checked: {error}") from error
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        if file.suffix in _PICKLES:
            raise CheckpointError(f"{file}: may hold pickled code, which is never read; a checkpoint has no such file")
        if name != MANIFEST and name not in files and not file.name.startswith("."):
            raise CheckpointError(f"{file}: is not of this checkpoint (the manifest does not list it)")
    state = _read_json(path / "state.json")
    try:
        pending = tuple(state.get("pending", ()))  # absent in checkpoints of before these were recorded
        found = Checkpoint(path=path, step=state["step"], cursor=state["cursor"], pending=pending, rng=state["rng"])
    except KeyError as error:
        raise CheckpointError(f"{path / 'state.json'}: has no {error}; was it written by another version?") from None
    if not isinstance(found.rng, list):
        raise CheckpointError(f"{path / 'state.json'}: 'rng' is no list of ranks; was it written by another version?")
    return found


def rng_state() -> dict[str, Any]:
    """The global random number generators, as JSON values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [name, np.asarray(keys).astype("<u4").tobytes().hex(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = [s.numpy().tobytes().hex() for s in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take what `rng_state` gave. GPU generators only where the number of GPUs is the same."""
    torch.set_rng_state(_byte_tensor(state["torch"]))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), dtype="<u4"), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_byte_tensor(s) for s in state["cuda"]])


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), dtype=np.uint8).copy())


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_dir():
                yield int(match[1]), path


def _prune(folder: Path, step: int, keep_last: int, keep_every: int, keep: Collection[int]) -> None:
    """Damaged ones (no manifest) do not count as kept. A folder that will not go away does not stop the run."""
    older = sorted((s, p) for s, p in _checkpoints(folder) if s <= step)
    whole = [p for _, p in older if (p / MANIFEST).exists()]
    kept = set(whole[-keep_last:]) | {p for s, p in older if (keep_every and s % keep_every == 0) or s in keep}
    for path in (*(p for _, p in older if p not in kept), *folder.glob(".replaced_*")):
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
