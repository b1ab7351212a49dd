"""The plugin's loader as the simulation of a fleet calls it (eval/fleet)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import NEEDS_VLLM

pytestmark = [NEEDS_VLLM, pytest.mark.filterwarnings("ignore")]  # of vLLM's imports


def test_the_plugins_loader_keeps_what_is_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.fleet import memory
    from soka_vllm.settings import LORA_VARIABLE, SLOT_VARIABLE

    monkeypatch.setenv(SLOT_VARIABLE, str(10**6))
    monkeypatch.setenv(LORA_VARIABLE, "0")
    model = memory.models()["embedded"]
    adapter = memory.write_soka(tmp_path, model, 1)
    values = {ranks: memory.gpu_slot(model, memory.METHODS[0], ranks)["slot_values"] for ranks in (1, 2)}
    checked = memory.check_loader("embedded", model, adapter, values)
    assert checked == {"host_bytes": 2 * (8796 - 28), "refused_by_default": {1: False, 2: False}}
