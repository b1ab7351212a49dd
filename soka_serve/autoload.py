"""Teaches PEFT the type "SOKA" in programs that are not ours, such as plain `lm_eval --model hf --model_args peft=...`.

torch calls `install` when it is imported (entry point "torch.backends", the one hook that every program with PEFT
passes); the adapter type is registered when PEFT is imported after that. Standard library only: it runs in programs
that never use an adapter. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns it off.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def install() -> None:
    """Register the type once PEFT is imported. A program that imports PEFT before torch must register it itself."""
    if "peft" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds `peft` as the other finders do, and has its loader register the type afterwards.

    It stays until PEFT is really imported: libraries look for PEFT without importing it.
    """

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own  # its resources are looked up there
        module.__loader__ = self._own
        self._own.exec_module(module)
        try:
            import_module("soka_serve.peft")
        except Exception as error:  # noqa: BLE001 - a program that uses PEFT for something else must go on
            warnings.warn(f"soka-serve could not register its adapter type with PEFT: {error}", stacklevel=2)
