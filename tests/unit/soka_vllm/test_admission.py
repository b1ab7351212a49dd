"""What the API process does before it asks the engine to load an adapter."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_vllm.admission import read_ahead
from soka_vllm.limits import ModelLimits

PAGES = 300


def resident(file: Path) -> int:
    """How many pages of a file the kernel has in memory."""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * PAGES)()
        start = ctypes.c_char.from_buffer(mapped)
        try:
            address = ctypes.c_void_p(ctypes.addressof(start))
            assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), found) == 0
        finally:
            del start
    return sum(page & 1 for page in found)


def ahead(folder: Path, values: int = 1 << 24) -> None:
    read_ahead(SimpleNamespace(lora_path=str(folder), base_model_name=None), ModelLimits(1, values, values))


@pytest.mark.parametrize("values", [1 << 24, 1 << 17])
def test_weights_are_in_memory_before_the_engine_asks(tmp_path: Path, values: int) -> None:
    file = tmp_path / WEIGHTS_FILE
    (tmp_path / CONFIG_FILE).write_text("{}")
    with file.open("wb") as stream:
        stream.write(os.urandom(PAGES * mmap.PAGESIZE))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(file):
        pytest.skip("the file system of the temporary folder keeps its files in memory")
    ahead(tmp_path, values)
    assert resident(file) == PAGES if 8 * values > file.stat().st_size else resident(file) > 0


def test_what_is_no_file_is_left_to_the_engine(tmp_path: Path) -> None:
    """A pipe would be waited for, for good."""
    ahead(tmp_path / "none")
    (tmp_path / CONFIG_FILE).write_text("{}")
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    ahead(tmp_path)
