"""What workers are told to keep of the adapters that were loaded."""

from __future__ import annotations

import pytest

from soka_vllm.engine import Adapters
from soka_vllm.settings import KEEP_VARIABLE, keep_limit


def kept(limit: int, **sizes: int) -> Adapters:
    adapters = Adapters(limit)
    for name, size in sizes.items():
        adapters.nbytes[int(name.removeprefix("a"))] = size
    return adapters


def test_the_oldest_make_room() -> None:
    adapters = kept(100, a1=40, a2=40, a3=20)
    assert adapters.to_drop(0, set()) == []
    assert adapters.to_drop(30, set()) == [1]
    assert adapters.to_drop(60, set()) == [1, 2]
    adapters.nbytes.move_to_end(1)
    assert adapters.to_drop(30, set()) == [2]


def test_what_a_request_needs_stays() -> None:
    """Even above the limit: dropping it would fail the request in the middle of a step."""
    adapters = kept(100, a1=40, a2=40, a3=20)
    assert adapters.to_drop(30, {1}) == [2]
    assert adapters.to_drop(500, {1, 2, 3}) == []
    assert kept(0, a1=1).to_drop(5, {7}) == [1]


def test_the_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEEP_VARIABLE, raising=False)
    assert keep_limit() == 4 * 2**30
    monkeypatch.setenv(KEEP_VARIABLE, "0.5")
    assert keep_limit() == 2**29
    for wrong in ("-1", "much", "inf", "nan", ""):
        monkeypatch.setenv(KEEP_VARIABLE, wrong)
        with pytest.raises(ValueError, match=KEEP_VARIABLE):
            keep_limit()
