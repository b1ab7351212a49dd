"""Teaches PEFT the type "SOKA" in programs that are not ours, such as plain `lm_eval --model hf --model_args peft=...`.

torch calls `install` when it is imported (entry point "torch.backends", the one hook that every program with PEFT
passes); the adapter type is registered when PEFT is imported after that, or, where PEFT is what imports torch, when
PEFT is done. `SOKA_AUTOLOAD=0` turns it off.

It runs in every program of an environment that imports torch: it imports nothing of ours until PEFT is imported, and
whatever goes wrong is logged at most, for an exception here would be torch's. It is a package of its own, since
soka_serve may be gone.
"""

from __future__ import annotations

import _thread
import os
import sys

TYPE_CHECKING = False  # what typing's is when the program runs
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def install() -> None:
    """Register the type once PEFT is imported."""
    try:
        if os.environ.get("SOKA_AUTOLOAD") == "0":
            return
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        if "peft" in sys.modules:
            _register_at_the_end(sys.modules["peft"].__spec__)
        else:
            sys.meta_path.insert(0, _Finder())
    except Exception:  # noqa: BLE001 - torch would raise it
        pass


class _Finder:
    """Import finder for `peft` whose loader registers the adapter type after the module has run.

    It stays until the program ends: libraries look for PEFT without importing it, and taking it away would disturb
    other threads that go through the list of finders.
    """

    def __init__(self) -> None:
        self._searching: set[int] = set()  # threads: another finder may go through the list in its turn

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        thread = _thread.get_ident()
        if fullname != "peft" or thread in self._searching:
            return None
        self._searching.add(thread)
        try:
            for finder in list(sys.meta_path):
                if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                    continue
                spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
                if spec is not None:
                    _register_after(spec.loader)
                    return spec
            return None
        finally:
            self._searching.discard(thread)


def _register_after(loader: Any) -> None:
    """Have this very loader, which others ask for data and types, register the type when it has run the module."""
    try:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            run(module)
            _register()

        loader.exec_module = exec_module
    except Exception:  # noqa: BLE001 - a loader that takes no attributes: PEFT is imported without us
        pass


def _register_at_the_end(spec: Any) -> None:
    """Register the type when an import that is going on, of PEFT, is done: Python then notes it in the spec.

    Does nothing where there is no such import, or where another program has a spec of its own kind.
    """
    kind = type(spec)
    if kind.__name__ != "ModuleSpec" or not getattr(spec, "_initializing", False):
        return

    class WatchedSpec(kind):  # type: ignore[misc, valid-type]
        @property
        def _initializing(self) -> bool:
            return bool(self.__dict__["_initializing"])

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__["_initializing"] = value
            if not value:
                self.__class__ = kind
                if "peft" in sys.modules:  # an import that failed has taken it away
                    _register()

    spec.__class__ = WatchedSpec


def _register() -> None:
    try:
        import soka_serve.peft  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a program that uses PEFT for something else must go on
        _say(f"soka-serve could not register its adapter type with PEFT: {type(error).__name__}: {error}")


def _say(text: str) -> None:
    try:
        import logging

        logging.getLogger("soka_serve.autoload").warning(text)
    except Exception:  # noqa: BLE001 - a handler of the program's
        pass
