"""vLLM's functions read from its sources: made-up ones, those that are installed, and those of a wheel at hand.

SOKA_VLLM_SOURCES names wheels of vLLM or folders with a `vllm` in them, separated by `:`; `pip download --no-deps
vllm==0.33.0` fetches one. They are read, and not installed.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from soka_vllm import checks, sources
from soka_vllm.checks import LORA_LAYERS, Signature
from soka_vllm.hooks import SIGNATURES
from soka_vllm.sources import Sources, folder_sources, imported_names, installed_sources, source_problems, wheel_sources
from tests.conftest import NEEDS_VLLM, ROOT

VARIABLE = "SOKA_VLLM_SOURCES"
AT_HAND = [Path(place) for place in os.environ.get(VARIABLE, "").split(os.pathsep) if place]

FILES = {
    "vllm/__init__.py": "",
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
    ]
    problems = source_problems(Sources(FILES.get), wanted)
    assert problems[:2] == [
        "vllm.a.f (a b rest c more); expected (a)",
        "vllm.a.h (does not exist); expected (b)",
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


@NEEDS_VLLM
def test_the_installed_vllm_fits() -> None:
    assert source_problems(installed_sources(), SIGNATURES) == []


@pytest.mark.skipif(not AT_HAND, reason=f"{VARIABLE} names no wheel of vLLM: no release was compared by its sources")
@pytest.mark.parametrize("place", AT_HAND, ids=lambda place: place.name)
def test_a_release_at_hand_fits(place: Path) -> None:
    found = wheel_sources(place) if place.suffix == ".whl" else folder_sources(place)
    assert source_problems(found, SIGNATURES) == []
    commands = imported_names(ROOT / "soka_serve" / "serving")
    assert commands
    assert [name for name in commands if not found.has(*name)] == []
    answer = ("vllm.v1.engine.core", "EngineCoreProc._send_finish_outputs_to_client")
    if "error" in (found.parameters(*answer) or ""):  # then a request that is refused is told why
        assert found.parameters(*answer) == "self req_ids client_index finish_reason error"
        assert found.fields("vllm.outputs", "RequestError") == ["code", "message", "retryable"]


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
    checks.check_version(SIGNATURES)
    assert f"installed is {name}" in caplog.text
    assert "nothing was run with it" in caplog.text


def test_an_unknown_version_that_differs_is_refused(version: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "installed_sources", lambda: Sources(FILES.get))
    with pytest.raises(RuntimeError, match=r"installed is 0\.99\.0, which differs") as raised:
        checks.check_version(SIGNATURES)
    said = str(raised.value)
    assert "AsyncLLM.add_lora (does not exist); expected (self lora_request)" in said
    assert "EngineCore.add_request (does not exist)" in said  # all, not the first


def test_an_old_version_is_refused(version: SimpleNamespace) -> None:
    version.__version__ = "0.28.0"
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.29 .*installed is 0\.28\.0"):
        checks.check_version(SIGNATURES)
