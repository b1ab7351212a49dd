"""The processes of an `accelerate launch` agree: none goes on, or waits, where another cannot."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from soka_serve.base import model
from soka_serve.compiler.build import _check_dtypes
from soka_serve.compiler.processes import Processes
from soka_serve.errors import DataError, SokaError
from tests.support.ranks import as_processes
from tests.support.training import make_manifest

OTHER = (
    'process 1: "auto" is another dtype than process 0: '
    "Machines hold and compute in other dtypes (AMX, GPUs): set base.dtype and train.precision."
)


def test_what_one_cannot_do_none_does() -> None:
    def act(processes: Processes) -> str:
        def read() -> int:
            if processes.index == 1:
                raise DataError("d.jsonl: no such file", hint="Copy it")
            return processes.index

        try:
            return str(processes.together(read))
        except SokaError as error:
            return f"{type(error).__name__}: {error.message}"

    first, second, third = as_processes(3, act)
    assert first == third
    assert first.startswith("BuildError: process 1 (")
    assert first.endswith("): d.jsonl: no such file")
    assert second == "DataError: d.jsonl: no such file"
    assert as_processes(2, lambda processes: processes.together(lambda: processes.index)) == [0, 1]


def test_they_compare_what_they_read() -> None:
    def act(values: str) -> list[str]:
        def compare(processes: Processes) -> str:
            try:
                processes.check_same("other files", values[processes.index])
            except SokaError as error:
                return error.message
            return ""

        return as_processes(3, compare)

    assert act("aaa") == [""] * 3
    assert act("aba") == ["process 1: other files than process 0"] * 3


@pytest.mark.parametrize(("amx", "said"), [(True, ""), (False, OTHER)])
def test_they_compute_in_one_dtype(monkeypatch: pytest.MonkeyPatch, amx: bool, said: str) -> None:
    """A machine with AMX trains on a base in bfloat16 as it is, one without holds it in float32."""
    here = threading.local()
    monkeypatch.setattr(model, "has_amx", lambda: here.amx)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    base = SimpleNamespace(layout=SimpleNamespace(size=SimpleNamespace(dtype="bfloat16")))

    def compare(processes: Processes) -> str:
        here.amx = amx or processes.index == 0
        loaded = SimpleNamespace(manifest=make_manifest())
        try:
            _check_dtypes(cast(Any, SimpleNamespace(processes=processes, loaded=loaded, base=base)))
        except SokaError as error:
            return f"{error.message}: {error.hint}"
        return ""

    assert as_processes(2, compare) == [said] * 2


def test_they_see_one_folder(tmp_path: Path) -> None:
    def act(folders: list[Path]) -> list[str]:
        def look(processes: Processes) -> str:
            try:
                processes.check_shared(folders[processes.index])
            except SokaError as error:
                return error.message
            return ""

        return as_processes(len(folders), look)

    one, other = tmp_path / "one", tmp_path / "other"
    assert act([one, one]) == ["", ""]
    first, second = act([one, other])
    assert first == second
    assert first.startswith(f"{one}: not the same folder on all machines; not seen by process 1 (")
    assert list(one.iterdir()) == []
    assert not other.exists()
