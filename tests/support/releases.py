"""Releases of vLLM that are at hand and not installed.

SOKA_VLLM_SOURCES names wheels of vLLM or folders with a `vllm` in them, separated by `:`; `pip download --no-deps
vllm==0.34.0` fetches one. They are read, and not installed.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from soka_vllm.sources import Sources, folder_sources, wheel_sources

VARIABLE = "SOKA_VLLM_SOURCES"
AT_HAND = [Path(place) for place in os.environ.get(VARIABLE, "").split(os.pathsep) if place]


def of_each(test: Any) -> Any:
    """Mark a test that takes a `place`: it is run with each release at hand."""
    reason = f"{VARIABLE} names no wheel of vLLM: no release was compared by its sources"
    each = pytest.mark.parametrize("place", AT_HAND, ids=lambda place: place.name)
    return pytest.mark.skipif(not AT_HAND, reason=reason)(each(test))


def sources_of(place: Path) -> Sources:
    """What a release's functions look like."""
    return wheel_sources(place) if place.suffix == ".whl" else folder_sources(place)


def unpacked(place: Path, folder: Path) -> Path:
    """Where a release's Python files are: in `folder`, where it is a wheel."""
    if place.suffix != ".whl":
        return place.absolute()
    with zipfile.ZipFile(place) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    return folder
