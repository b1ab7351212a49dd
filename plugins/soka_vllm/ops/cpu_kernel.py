"""The operator as compiled code (cpu_kernel.cpp), for CPUs with a C++ compiler.

It is compiled for this CPU once, in a second or two, and kept in the user's cache folder. It computes what
`torch_ops.add_kron` does, which stands in for it where there is no compiler, with SOKA_COMPILE=0, and for float64.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soka_serve.io.files import is_own, is_own_file
from soka_serve.io.own_cache import own_folder
from soka_vllm.settings import COMPILE_VARIABLE, compiles

_logger = logging.getLogger("vllm.soka")

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
_COMPILERS = ("c++", "g++", "clang++")
_SLOWER = "Kronecker adapters run in torch's operators, which take 1.2 to 5 times as long"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_ARGUMENTS: list[Any] = [
    *(_POINTER, _INT, _LONG),  # out, its dtype, its stride
    *(_POINTER, _INT, _LONG, _LONG),  # x likewise, and its features
    *(_POINTER, _LONG),  # slots of the tokens
    *(_POINTER, _INT),  # values
    *(_POINTER, _LONG, _LONG),  # the table: slices, slots
    _INT,  # threads
]


class Kernel(NamedTuple):
    """The compiled operator.

    Args:
        call: soka_add_kron.
        types: numbers of the dtypes that it takes.
    """

    call: Callable[..., None]
    types: dict[torch.dtype, int]

    def add_kron(self, out: Tensor, x: Tensor, token_slots: Tensor, values: Tensor, table: Tensor) -> bool:
        """Do what `torch_ops.add_kron` does; False, with nothing done, for tensors that it cannot take."""
        types = self.types
        if out.dtype not in types or x.dtype not in types or values.dtype not in types:
            return False
        if out.stride(-1) != 1 or x.stride(-1) != 1 or table.stride(-1) != 1:
            return False
        if token_slots.dtype != torch.int64 or token_slots.stride(0) != 1:
            token_slots = token_slots.to(torch.int64).contiguous()
        self.call(
            *(out.data_ptr(), types[out.dtype], out.stride(0)),
            *(x.data_ptr(), types[x.dtype], x.stride(0), x.shape[1]),
            *(token_slots.data_ptr(), x.shape[0]),
            *(values.data_ptr(), types[values.dtype]),
            *(table.data_ptr(), table.shape[0], table.shape[1]),
            torch.get_num_threads(),
        )
        return True


@cache
def load() -> Kernel | None:
    """The operator, compiled if need be; None, with a line in the log, where that does not go."""
    if not compiles():
        _logger.warning("%s=0: %s", COMPILE_VARIABLE, _SLOWER)
        return None
    try:
        return compiled(SOURCE.read_bytes(), _FLAGS)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _logger.warning("No compiled operator (%s): %s", _reason(error), _SLOWER)
        return None


def compiled(source: bytes, flags: tuple[str, ...]) -> Kernel:
    """The operator of a source, from the cache if it was compiled with this compiler, on this CPU, before.

    Raises:
        OSError: there is no compiler, the cache folder cannot be written, or others may write there.
        ValueError: $CXX is no command.
        subprocess.SubprocessError: the compiler fails, or takes more than two minutes.
    """
    compiler = _compiler()
    command = [*compiler, *flags]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    facts = [source, version, shlex.join(command).encode(), _cpu()]
    folder = own_folder() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_own(folder.lstat()):  # what is loaded from there runs as this user
        raise OSError(f"{folder}: other users may write there, or it is a link; remove it")
    library = folder / f"add_kron-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:24]}.so"
    if os.path.lexists(library) and is_own_file(library):
        with suppress(OSError, AttributeError):  # damaged: compiled again
            return _open(library)
    # Of several processes that come here at once each compiles its own, and the last one's stays.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        code, result = Path(work, "kernel.cpp"), Path(work, "kernel.so")
        code.write_bytes(source)
        subprocess.run(
            [*command, str(code), "-o", str(result)], capture_output=True, check=True, timeout=120, text=True
        )
        result.chmod(0o700)
        kernel = _open(result)  # by a name that was never opened: by an old name the linker gives what it had then
        result.replace(library)
    return kernel


def _compiler() -> list[str]:
    """Raises FileNotFoundError where there is none, ValueError where $CXX is no command."""
    given = os.environ.get("CXX", "").strip()
    if given:
        return shlex.split(given)
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler: neither $CXX nor {', '.join(_COMPILERS)}")
    return [found]


def _cpu() -> bytes:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        first = ""
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join([*(line for line in first.splitlines() if line.startswith(names)), os.uname().machine]).encode()


def _open(library: Path) -> Kernel:
    """Raises OSError where the library cannot be loaded, AttributeError where it is another one."""
    opened = ctypes.CDLL(str(library))
    call = opened.soka_add_kron
    call.argtypes, call.restype = _ARGUMENTS, None
    return Kernel(call, {dtype: number for dtype, number in _TYPES.items() if opened.soka_takes(number)})


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):
        return f"$CXX is {os.environ.get('CXX')!r}: {error}"
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr or "").splitlines() if "error" in line] or [str(error)]
        return lines[0]
    return str(error)
