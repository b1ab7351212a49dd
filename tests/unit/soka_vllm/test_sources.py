"""vLLM's functions read from its sources: made-up ones, those that are installed, and those of releases at hand."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from soka_vllm import checks, sources
from soka_vllm.checks import LORA_LAYERS, Signature
from soka_vllm.hooks import HOOKS, Hook, modules, rows, signatures
from soka_vllm.sources import (
    Sources,
    folder_sources,
    imported_names,
    installed_sources,
    source_problems,
    version_of,
    wheel_sources,
)
from soka_vllm.turns import QUEUES
from soka_vllm.versions import SUPPORTED, is_before
from tests.conftest import NEEDS_VLLM, ROOT
from tests.support.releases import of_each, sources_of

FILES = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "version: str\n__version__ = version = '0.99.0'",
    "vllm/a/__init__.py": """
from .b import C as D, f
from vllm.a.loop import g
from vllm.base import *

def __getattr__(name):
    if name == "late": ...
""",
    "vllm/a/loop.py": "from vllm.a import g",
    "vllm/a/b.py": """
from vllm.base import Base, Generic

if TYPE_CHECKING:
    def f(wrong): ...
else:
    def f(a, /, b, *rest, c=1, **more): ...

class C(Generic[int], Base):
    alias = Base.method
    async def own(self, x): ...
    @classmethod
    def made(cls, y): ...
    try:
        def tried(self): ...
    except ImportError:
        pass
""",
    "vllm/base.py": """
class Generic: ...
class Root:
    def method(self, deep): ...
class Base(Root):
    def __init__(self):
        self.held = 1
pair: tuple = (Root, Base)
import json, os.path
import sys as system
class Record:
    one: int
    two: int = 2
""",
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("f", "a b rest c more"),
        ("D.own", "self x"),
        ("D.made", "y"),
        ("D.method", "self deep"),
        ("D.alias", "self deep"),
        ("D.tried", "self"),
        ("D.__init__", "self"),
        ("D", None),
        ("D.none", None),
        ("f.none", None),
        ("g", None),
        ("Root.method", "self deep"),
    ],
)
def test_parameters(name: str, parameters: str | None) -> None:
    assert Sources(FILES.get).parameters("vllm.a", name) == parameters


def test_names_attributes_and_tuples() -> None:
    found = Sources(FILES.get)
    assert all(found.has("vllm.a", name) for name in ("D", "late", "b", ""))
    assert not any(found.has(*name) for name in (("vllm.a", "C"), ("vllm.c", ""), ("vllm.c", "d")))
    assert all(found.has("vllm.base", name) for name in ("json", "os", "system"))
    assert not any(found.has("vllm.base", name) for name in ("os.path", "path", "sys"))
    assert found.attributes("vllm.a.b", "C.__init__") == {"held"}
    assert found.elements("vllm.base", "pair") == ["Root", "Base"]
    assert found.elements("vllm.base", "Base") is None
    assert found.fields("vllm.base", "Record") == ["one", "two"]


def test_a_wheel_reads_as_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    zipfile.ZipFile(tmp_path / "vllm.whl").extractall(tmp_path)
    for found in (wheel_sources(tmp_path / "vllm.whl"), folder_sources(tmp_path)):
        assert found.parameters("vllm.a", "D.method") == "self deep"
        assert not found.has("vllm.other", "")


def test_all_that_differs_is_listed() -> None:
    wanted = [
        Signature("vllm.a", "D.method", "self deep"),
        Signature("vllm.a", "f", "a"),
        Signature("vllm.a", "h", "b"),
        Signature("vllm.a", "D.tried", None),
        Signature("vllm.a", "D.untried", None),
    ]
    problems = source_problems(Sources(FILES.get), wanted)
    assert problems[:3] == [
        "vllm.a.f (a b rest c more); expected (a)",
        "vllm.a.h (does not exist); expected (b)",
        "D.untried (does not exist)",
    ]
    assert "LoRAModelManager has no modules" in problems
    assert "vllm.lora.utils._all_lora_classes is not a tuple of classes" in problems
    assert "vllm.platforms has no current_platform" in problems  # which the plugin imports


def test_missing_layers_are_listed() -> None:
    files = FILES | {
        "vllm/lora/__init__.py": "",
        "vllm/lora/utils.py": f"_all_lora_classes = ({LORA_LAYERS[0]}, other)",
    }
    problems = source_problems(Sources(files.get), [])
    assert f"{LORA_LAYERS[1]} is not in vllm.lora.utils._all_lora_classes" in problems
    assert f"{LORA_LAYERS[0]} is not in vllm.lora.utils._all_lora_classes" not in problems


def test_the_version_that_sources_name() -> None:
    assert version_of(Sources(FILES.get)) == "0.99.0"
    with pytest.raises(RuntimeError, match="names no version"):
        version_of(Sources({"vllm/_version.py": "version = None"}.get))


@NEEDS_VLLM
def test_the_installed_vllm_fits() -> None:
    found = installed_sources()
    assert source_problems(found, signatures(version_of(found))) == []


# --- rows that some releases need -------------------------------------------------------------------------------------

BEFORE = [hook for hook in HOOKS if hook.until is not None]


@pytest.mark.parametrize("hook", BEFORE, ids=lambda hook: hook.name)
def test_a_row_is_needed_before_its_release_and_not_from_it_on(hook: Hook) -> None:
    assert hook.until is not None
    first = ".".join(map(str, hook.until))
    wanted = Signature(hook.module, hook.name, hook.parameters)
    for version in (f"{first}.0", f"{first}.1+cpu", "0.99.0", "dev"):
        assert hook not in rows(version)
        assert wanted not in signatures(version)
    last = f"{hook.until[0]}.{hook.until[1] - 1}.9"
    assert hook in rows(last)
    assert hook.module in modules(last)
    assert f"{hook.name} (does not exist); expected ({hook.parameters})" in source_problems(
        Sources(FILES.get), signatures(last)
    )


AFTER = [hook for hook in HOOKS if hook.since is not None]


@pytest.mark.parametrize("hook", AFTER, ids=lambda hook: hook.name)
def test_a_row_is_needed_from_its_release_on_and_not_before(hook: Hook) -> None:
    assert hook.since is not None
    assert hook not in rows(f"{hook.since[0]}.{hook.since[1] - 1}.9")
    for version in (".".join(map(str, hook.since)) + ".0", "0.99.0", "dev"):
        assert hook in rows(version)
        assert Signature(hook.module, hook.name, hook.parameters) in signatures(version)


def test_no_row_is_of_releases_that_are_not_supported() -> None:
    assert BEFORE
    assert AFTER
    named = [release for hook in HOOKS for release in (hook.since, hook.until) if release is not None]
    assert all(SUPPORTED[0] < release < SUPPORTED[1] for release in named)


def test_all_that_is_rebound_must_be_there_but_for_the_plugin_s_own() -> None:
    signed = {(signature.module, signature.name) for signature in signatures("0.33.0")}
    left = {hook.name for hook in rows("0.33.0") if (hook.module, hook.name) not in signed}
    assert left == {"EngineCore.soka_limits"}


# --- releases that are not installed ----------------------------------------------------------------------------------


@of_each
def test_a_release_at_hand_fits(place: Path) -> None:
    found = sources_of(place)
    assert source_problems(found, signatures(version_of(found))) == []
    commands = imported_names(ROOT / "soka_serve" / "serving")
    assert commands
    assert [name for name in commands if not found.has(*name)] == []
    answer = ("vllm.v1.engine.core", "EngineCoreProc._send_finish_outputs_to_client")
    if "error" in (found.parameters(*answer) or ""):  # then a request that is refused is told why
        assert found.parameters(*answer) == "self req_ids client_index finish_reason error"
        assert found.fields("vllm.outputs", "RequestError") == ["code", "message", "retryable"]


RUNNERS = (
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner"),  # of processors with Triton
    ("vllm.v1.worker.cpu.standalone_model_runner", "StandaloneCPUModelRunner"),
)


@of_each
def test_a_later_stage_of_a_pipeline_has_its_buffers(place: Path) -> None:
    """By the plugin's row, or by vLLM: each of its runners makes them where it makes the layers that take adapters."""
    found = sources_of(place)
    if is_before(version_of(found), (0, 34)):
        assert found.parameters("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model") is not None
        return
    for module, runner in RUNNERS:
        made = found.attributes(module, f"{runner}.load_model")
        assert {"load_lora_model", "make_empty_intermediate_tensors", "intermediate_tensors"} <= made, runner
        assert found.has(module, f"{runner}._set_active_loras")
        assert "_set_active_loras" in found.attributes(module, f"{runner}.execute_model")
    assert not found.has("vllm.v1.worker.gpu_model_runner", "")


@of_each
def test_the_plugin_knows_where_requests_wait(place: Path) -> None:
    """Of the scheduler's queues, all but the one of requests that have blocks already."""
    queues = sources_of(place).assigned("vllm.v1.core.sched.scheduler", "Scheduler.__init__", "create_request_queue")
    assert "waiting" in queues
    assert queues - {"kv_holding_waiting"} <= set(QUEUES)


# --- a version that is not known --------------------------------------------------------------------------------------


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's module, of which only the version is looked at."""
    vllm = SimpleNamespace(__version__="0.99.0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    return vllm


@pytest.mark.parametrize("name", ["0.99.0", "dev"])
def test_an_unknown_version_that_fits_is_warned_of(
    version: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version.__version__ = name
    monkeypatch.setattr(sources, "installed_sources", lambda: None)
    monkeypatch.setattr(sources, "source_problems", lambda found, signatures: [])
    checks.check_version(signatures(name))
    assert f"installed is {name}" in caplog.text
    assert "nothing was run with it" in caplog.text


def test_an_unknown_version_that_differs_is_refused(version: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "installed_sources", lambda: Sources(FILES.get))
    with pytest.raises(RuntimeError, match=r"installed is 0\.99\.0, which differs") as raised:
        checks.check_version(signatures("0.99.0"))
    said = str(raised.value)
    assert "AsyncLLM.add_lora (does not exist); expected (self lora_request)" in said
    assert "EngineCore.add_request (does not exist)" in said  # all, not the first


def test_an_old_version_is_refused(version: SimpleNamespace) -> None:
    version.__version__ = "0.28.0"
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.29 .*installed is 0\.28\.0"):
        checks.check_version(signatures("0.28.0"))
