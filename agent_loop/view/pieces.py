"""Token ids -> text, without transformers: the `tokenizer.json` of the run's model is read by `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Pieces:
    """The text of single tokens. `name` says by which tokenizer."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.name = f"{path.parent.parent.name}/{path.parent.name}" if path.parent.name == "model" else path.parent.name
        self.folder = path.parent
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = set(added)
        self._known: dict[int, str] = {}

    def of(self, ids: Iterable[int]) -> dict[int, str]:
        """Text of each id; the name in angle brackets of a byte that is no character; "" for an id past the end."""
        return {token: self._one(token) for token in set(ids)}

    def special(self, ids: Iterable[int]) -> list[int]:
        """Those of the ids that are added tokens: no text can spell them."""
        return sorted(set(ids) & self._added)

    def whole(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i < 2**32], skip_special_tokens=False))

    def same_ids(self, other: Pieces) -> bool:
        """Whether both have the same pieces under the same ids."""
        return bool(self._tokenizer.get_vocab() == other._tokenizer.get_vocab())

    def _one(self, token: int) -> str:
        if token not in self._known:
            name = self._tokenizer.id_to_token(token) if token < 2**32 else None
            text = self._tokenizer.decode([token], skip_special_tokens=False) if name is not None else ""
            self._known[token] = f"⟨{name}⟩" if "\ufffd" in text and name is not None else text
        return self._known[token]


def pieces_of(run: Path, tokenizer: Path | None) -> Pieces | None:
    """By the tokenizer that was named, or that of the run's newest checkpoint or of the model that it names; None
    where there is none: the viewer then shows ids.

    Raises:
        FileNotFoundError: the one that was named is not there.
    """
    if tokenizer is not None:
        path = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {tokenizer}")
        return Pieces(path)
    if run.is_file():
        return None
    found = sorted(run.glob("checkpoints/step_*/model/tokenizer.json")) + sorted(
        run.glob("checkpoints/*/tokenizer.json")
    )
    if found:
        return Pieces(found[-1])
    try:
        config = json.loads((run / "config.json").read_bytes())
        model = Path(config["student"]["model"]) / "tokenizer.json"
        return Pieces(model) if model.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
