"""Which slot of the cache holds what, and which one the next prompt gets.

A slot keeps its tokens after its sequence has ended. The next turn of the same episode continues them, takes the
slot over and computes only what is new; a prompt that shares just a beginning copies that part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.serving.slots import SlotCache


class SlotTable:
    """The tokens behind every slot of a `SlotCache`.

    Args:
        max_slots: sequences that run at once.
        max_tokens: bound of slots times tokens of a slot.
    """

    def __init__(self, cache: SlotCache, *, max_slots: int, max_tokens: int) -> None:
        self._cache = cache
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._ids = np.zeros((cache.num_slots, cache.num_tokens), dtype=np.int32)
        self._lengths = np.zeros(cache.num_slots, dtype=np.int64)
        """The first `_lengths[s]` of `_ids[s]` are in the cache."""
        self._last_used = np.zeros(cache.num_slots, dtype=np.int64)
        self._clock = 0
        self._most_busy = 0

    def make_room(self, reserved: int, busy: Sequence[int], busy_reserved: int) -> list[int] | None:
        """Have a free slot of at least `reserved` tokens, growing the cache where that is allowed.

        Args:
            busy: slots of the sequences that run.
            busy_reserved: tokens that the longest of them may come to need.

        Returns:
            Where the busy slots are now, in order; None if the sequence must wait for one of them.
        """
        cache = self._cache
        self._most_busy = max(self._most_busy, len(busy) + 1)
        tight = min(-(-max(reserved, busy_reserved) // 64) * 64, self._max_tokens)
        num_tokens = cache.num_tokens
        if reserved > num_tokens:
            num_tokens = min(max(tight, int(1.25 * num_tokens)), self._max_tokens)
        limit = min(self._max_slots, self._max_tokens // num_tokens)
        if limit <= len(busy):
            num_tokens = tight
            limit = min(self._max_slots, self._max_tokens // num_tokens)
            if limit <= len(busy):
                return None
        num_slots = min(cache.num_slots, limit)
        # Twice what ever ran at once: episodes whose tools are at work keep their prefix.
        wanted = min(limit, max(8, 2 * self._most_busy))
        if len(busy) >= num_slots or (num_slots < wanted and self._lengths.all()):
            num_slots = wanted
        if (num_slots, num_tokens) == (cache.num_slots, cache.num_tokens):
            return list(busy)
        return self._resize(num_slots, num_tokens, busy)

    def longest_prefix(self, prompt: np.ndarray) -> tuple[int, int]:
        """The slot that shares the most with the prompt, and how much; (-1, 0) if none does. The last token is left
        out: it is computed in any case, for its logits."""
        most = min(len(prompt) - 1, self._ids.shape[1])
        if most < 1:
            return -1, 0
        slots = np.flatnonzero((self._lengths > 0) & (self._ids[:, 0] == prompt[0]))
        # First those that hold a beginning of the prompt and nothing else of it: the common case, and quick.
        ends = np.minimum(self._lengths[slots], most)
        whole = slots[self._ids[slots, ends - 1] == prompt[ends - 1]]
        slot, shared = self._compare(whole, prompt, most)
        if shared < most // 2:
            slot, shared = self._compare(slots, prompt, most)
        return slot, shared

    def _compare(self, slots: np.ndarray, prompt: np.ndarray, most: int) -> tuple[int, int]:
        if not len(slots):
            return -1, 0
        differs = self._ids[slots, :most] != prompt[:most]
        shared = np.where(differs.any(1), differs.argmax(1), most)
        shared = np.minimum(shared, self._lengths[slots])
        best = int(shared.argmax())
        return int(slots[best]), int(shared[best])

    def place(self, prompt: np.ndarray, source: int, shared: int, busy: Sequence[int]) -> int:
        """The slot for a prompt whose first `shared` tokens are in `source`, with those tokens in it.

        It is `source` itself if the prompt continues all that it holds; otherwise `source` is left to whoever comes
        back to it, and the least recently used free slot gets a copy.
        """
        if shared and source not in busy and shared >= self._lengths[source] - 1:
            slot = source
        else:
            age = np.where(self._lengths > 0, self._last_used, -1)
            age[list(busy)] = np.iinfo(np.int64).max
            slot = int(age.argmin())
            if shared and slot != source:
                self._cache.copy_prefix(source, slot, shared)
        self.hold(slot, prompt, shared)
        return slot

    def hold(self, slot: int, ids: np.ndarray | Sequence[int], length: int) -> None:
        """Note that the first `length` of `ids` are in the slot."""
        self._clock += 1
        self._ids[slot, :length] = ids[:length]
        self._lengths[slot] = length
        self._last_used[slot] = self._clock

    def wipe(self, slot: int) -> None:
        """Forget a slot whose sequence failed."""
        self._lengths[slot] = 0
        self._cache.wipe(slot)

    def clear(self) -> None:
        self._lengths[:] = 0
        self._cache.clear()

    def _resize(self, num_slots: int, num_tokens: int, busy: Sequence[int]) -> list[int]:
        """Where the busy slots are now. A larger table leaves every slot where it is: else which rows share a forward
        pass, and with it the last bits of a sample, would hang on how large the cache had become before."""
        keep = list(range(self._cache.num_slots))
        if num_slots < len(keep):
            idle = [s for s in np.argsort(-self._last_used).tolist() if s not in set(busy) and self._lengths[s]]
            keep = sorted([*busy, *idle][:num_slots])
        self._cache.resize(num_slots, num_tokens, keep)
        span = min(num_tokens, self._ids.shape[1])
        ids = np.zeros((num_slots, num_tokens), dtype=np.int32)
        lengths, last_used = np.zeros((2, num_slots), dtype=np.int64)
        ids[: len(keep), :span] = self._ids[keep, :span]
        lengths[: len(keep)] = np.minimum(self._lengths[keep], span)
        last_used[: len(keep)] = self._last_used[keep]
        self._ids, self._lengths, self._last_used = ids, lengths, last_used
        return [keep.index(slot) for slot in busy]
