"""Every kind of case: what is prepared once, and one case, drawn and checked."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from soka_serve.builtin import base_directory
from tests.fuzzing.adapters import KINDS, check_adapter, write_good_adapter
from tests.fuzzing.bases import check_base, check_tokenizer, spoil_base, spoil_tokenizer
from tests.fuzzing.caches import check_cache, spoil_cache
from tests.fuzzing.frames import check_frame, frames
from tests.fuzzing.launches import check_launch, check_log
from tests.fuzzing.lokr import check_lokr, spoil_lokr, write_good_lokr
from tests.fuzzing.manifests import check_plan, check_planned, hostile_manifests, lay_out, spoilt_manifests
from tests.fuzzing.outputs import check_output, fill, write_outputs
from tests.fuzzing.spoil import copy_of, spoil_files

Check = Callable[[st.DrawFn, Path], bool]


def _spoilt(name: str, spoil: Callable[[st.DrawFn, Path], None], check: Callable[[Path], bool]) -> Check:
    """A copy of what was prepared under a name, spoilt and checked; with no name an empty folder."""

    def case(draw: st.DrawFn, good: Path) -> bool:
        with copy_of(good / name) if name else tempfile.TemporaryDirectory() as place:
            spoil(draw, Path(place))
            return check(Path(place))

    return case


def _lokr(draw: st.DrawFn, good: Path) -> bool:
    kind = draw(st.sampled_from(["peft", "lycoris"]))
    with copy_of(good / kind) as folder:
        spoil_lokr(draw, folder)
        return check_lokr(folder, kind)


def _manifest(draw: st.DrawFn, good: Path) -> bool:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        kind = draw(st.sampled_from(["spoilt", "spoilt", "hostile", "laid out"]))
        if kind == "laid out":
            lay_out(draw, folder)
            return check_planned(folder)
        return check_plan(draw(spoilt_manifests() if kind == "spoilt" else hostile_manifests()), folder)


def _output(draw: st.DrawFn, good: Path) -> bool:
    with tempfile.TemporaryDirectory() as place:
        fill(draw, good, Path(place))
        return check_output(draw, good, Path(place))


def _nothing(folder: Path) -> None:
    """What needs no preparation."""


CASES: dict[str, tuple[Callable[[Path], object], Check]] = {
    "adapters": (
        lambda place: write_good_adapter(place / "adapter"),
        _spoilt("adapter", lambda draw, folder: spoil_files(draw, folder, KINDS), check_adapter),
    ),
    "lokr": (write_good_lokr, _lokr),
    "manifests": (_nothing, _manifest),
    "bases": (lambda place: shutil.copytree(base_directory(), place / "base"), _spoilt("base", spoil_base, check_base)),
    "outputs": (write_outputs, _output),
    "caches": (_nothing, _spoilt("", spoil_cache, check_cache)),
    "frames": (_nothing, lambda draw, _: check_frame(draw(frames()))),
    "launches": (_nothing, lambda draw, _: check_launch(draw) if draw(st.booleans()) else check_log(draw)),
    "tokenizers": (_nothing, _spoilt("", spoil_tokenizer, check_tokenizer)),
}
"""By name: a function that prepares an empty folder, and one that draws and checks a case with what was prepared;
it returns whether what was drawn was still good."""
