"""A model without a neural network: every prefix of ids has one distribution over the vocabulary."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence


def step(state: int, token_id: int) -> int:
    """The number of a prefix that is one token longer."""
    return (state * 6364136223846793005 + token_id + 1442695040888963407) % 2**64


class InventedModel:
    """log p(token | prefix) = table[(a * token + hash of the prefix) mod V]: a fixed list of log-probabilities, dealt
    out anew after every prefix.

    Args:
        vocab_size: V.
        decay: how much likelier each rank is than the next, in nats.
    """

    def __init__(self, vocab_size: int, decay: float = 0.5) -> None:
        weights = [math.exp(-decay * min(rank, 40)) for rank in range(vocab_size)]
        total = sum(weights)
        self.vocab_size = vocab_size
        self._cumulative = list(itertools.accumulate(weight / total for weight in weights))
        self._table = [math.log(weight / total) for weight in weights]
        self._factor = next(a for a in itertools.count(max(1, vocab_size // 3)) if math.gcd(a, vocab_size) == 1)
        self._inverse = pow(self._factor, -1, vocab_size)

    def states(self, ids: Sequence[int]) -> list[int]:
        """[len(ids) + 1] a number for each prefix, the empty one first."""
        state, states = 1, [1]
        for token_id in ids:
            state = step(state, token_id)
            states.append(state)
        return states

    def logprob(self, state: int, token_id: int) -> float:
        return self._table[self.rank(state, token_id)]

    def rank(self, state: int, token_id: int) -> int:
        """0 is the likeliest."""
        return (self._factor * token_id + (state >> 20)) % self.vocab_size

    def at_rank(self, state: int, rank: int) -> int:
        return (rank - (state >> 20)) * self._inverse % self.vocab_size

    def draw(self, state: int, seed: int | None, *, top_k: int = 0) -> int:
        """A token; the same one for the same prefix and seed."""
        rng = random.Random(None if seed is None else f"{seed}/{state}")
        kept = min(top_k, self.vocab_size) if top_k > 0 else self.vocab_size
        return self.at_rank(state, rng.choices(range(kept), cum_weights=self._cumulative[:kept])[0])
