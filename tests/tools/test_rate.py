"""Turns of hosts."""

from __future__ import annotations

import asyncio
import time

import pytest

from tools.rate import HostRate, retry_after


async def test_turns_of_a_host_are_spaced() -> None:
    rate = HostRate({"a.org": 600})
    began = time.monotonic()
    await asyncio.gather(*(rate.turn("a.org") for _ in range(4)))
    assert 0.29 < time.monotonic() - began < 1.0
    assert rate.seconds_between("eutils.ncbi.nlm.nih.gov") == pytest.approx(1 / 3)
    rate.space("a.org", 2.0)
    assert rate.seconds_between("a.org") == 2.0


async def test_who_gave_up_waiting_leaves_the_turn_to_the_next() -> None:
    rate = HostRate({"a.test": 600.0})
    await rate.turn("a.test")
    for _ in range(50):  # fifty turns a tenth of a second apart would be five seconds
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rate.turn("a.test"), 0.001)
    began = time.monotonic()
    await rate.turn("a.test")
    assert time.monotonic() - began < 1.0


async def test_a_wish_to_be_left_alone_holds_for_those_who_wait() -> None:
    rate = HostRate({"a.test": 600.0})
    await rate.turn("a.test")
    began = time.monotonic()
    waiting = asyncio.ensure_future(rate.turn("a.test"))
    await asyncio.sleep(0)
    rate.hold("a.test", 0.5)
    await waiting
    assert time.monotonic() - began >= 0.45


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), ("-5", 0.0), ("1e999", None), ("nan", None), ("soon", None), ("", None),
     ("x" * 9000, None), ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
     ("Mon, 32 Jan 2020 00:00:00 GMT", None), ("\ufffd", None)],
)  # fmt: skip
def test_what_a_host_asks_for(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds
