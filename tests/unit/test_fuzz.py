"""A few spoilt adapters, manifests, folders, caches and frames, always the same; `eval.checks.fuzz` does thousands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import cases, limits
from tests.fuzzing.adapters import check_adapter, write_good_adapter
from tests.fuzzing.limits import OverLimitError, bounded, run

EXAMPLES = {
    "adapters": 40,
    "lokr": 60,
    "manifests": 30,
    "bases": 60,
    "outputs": 30,
    "caches": 60,
    "frames": 60,
    "launches": 100,
    "tokenizers": 60,
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_any_case_is_done_or_refused(kind: str, tmp_path: Path) -> None:
    prepare, check = cases.CASES[kind]
    prepare(tmp_path)

    @settings(max_examples=EXAMPLES[kind], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def each(data: st.DataObject) -> None:
        check(data.draw, tmp_path)

    each()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    write_good_adapter(folder)
    assert check_adapter(folder)
    return folder


def test_a_crash_would_be_seen(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object, **options: object) -> None:
        raise RuntimeError("crashed")

    monkeypatch.setattr("soka_serve.adapter.inspect.inspect", crash, raising=True)
    with pytest.raises((RuntimeError, AssertionError)):
        run("inspect", str(good))


@pytest.mark.parametrize("kind", ["computing", "waiting", "caught"])
def test_a_hang_would_be_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANG_S", 0.2)
    monkeypatch.setattr(limits, "WAIT_S", 60 if kind == "computing" else 0.2)
    with pytest.raises(OverLimitError, match=r"0\.2 s of"), bounded():
        _hang(kind)


def _hang(kind: str) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if kind != "computing":
                time.sleep(20)
        except OverLimitError:
            if kind == "caught":
                return  # as by `except Exception` in what is called
            raise


def test_memory_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError), bounded():
        bytearray(2 * limits.MEMORY)
    monkeypatch.setattr(limits.Peak, "resident", 0)
    with bounded():
        assert len(b"x" * (300 << 20))
    if Path("/proc/self/clear_refs").exists():
        assert limits.Peak.resident >= 200 << 20  # some of it may lie where the process had memory already
