"""For `pip install -e`: the hook in torch's import is copied, not linked to the checkout.

The metadata names the hook, and outlives a checkout that is deleted or moved: torch would then fail at every import.
setuptools takes this class from pyproject.toml; nothing else imports this file.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):  # type: ignore[misc]  # setuptools has no types
    """setuptools' command, with a copy of soka_autoload in the wheel beside the links to the checkout."""

    def _select_strategy(self, *arguments: Any) -> Any:
        # Where setuptools has no such method any more, all is linked, as without this class.
        return _HookStrategy(super()._select_strategy(*arguments))


class _HookStrategy:
    """A way of linking (setuptools' EditableStrategy) that also writes the hook's file."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __enter__(self) -> _HookStrategy:
        self._own.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        return self._own.__exit__(kind, error, traceback)

    def __call__(self, wheel: Any, files: list[str], mapping: dict[str, str]) -> None:
        self._own(wheel, files, mapping)
        # Found before the links, which setuptools puts at the end of sys.meta_path.
        wheel.write(str(Path(__file__).with_name("__init__.py")), "soka_autoload/__init__.py")
