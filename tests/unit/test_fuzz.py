"""A few spoilt manifests and adapters, the same every time; eval/fuzz.py does thousands, and others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import check_adapter, check_plan, copy_of, run, spoil_adapter, spoilt_manifests, write_good_adapter


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(spoilt_manifests())
def test_any_manifest_is_planned_or_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_plan(text, Path(folder))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    write_good_adapter(folder)
    assert check_adapter(folder)
    return folder


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_adapter_is_read_or_refused(good: Path, data: st.DataObject) -> None:
    with copy_of(good) as folder:
        spoil_adapter(data.draw, folder)
        check_adapter(folder)


def test_a_crash_would_be_seen(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object, **options: object) -> None:
        raise RuntimeError("crashed")

    monkeypatch.setattr("soka_serve.inspection.inspect", crash, raising=True)
    with pytest.raises((RuntimeError, AssertionError)):
        run("inspect", str(good))
