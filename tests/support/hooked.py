"""Run by test_serve_layers.py: what of vLLM the plugin rebinds and imports; assertions fail where it is not as stated.

Argument: "all" (all of vLLM's modules that the table names are imported first), or the modules to import.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import soka_vllm
from soka_vllm.checks import vllm_version
from soka_vllm.hooks import modules, rows


def attributes() -> dict[str, int]:
    """Identities of all values in imported modules of vLLM and of the table, and their classes, by "module:name"."""
    found, names = {}, modules(vllm_version())
    for place, module in list(sys.modules.items()):
        if place.partition(".")[0] == "vllm" or place in names:
            for name, value in list(vars(module).items()):
                found[f"{place}:{name}"] = id(value)
                if isinstance(value, type) and value.__module__ == place:
                    found |= {f"{place}:{value.__qualname__}.{key}": id(held) for key, held in vars(value).items()}
    return found


def value_of(module: str, name: str) -> Any:
    value: Any = sys.modules[module]
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def check_all() -> None:
    """What is rebound is the table, and twice is once."""
    names = modules(vllm_version())
    for module in names:
        importlib.import_module(module)
    hooks = rows(vllm_version())
    wanted = {f"{h.module}:{h.name}" for h in hooks}
    before = attributes()
    soka_vllm.register()
    after = attributes()
    changed = {name for name, value in after.items() if before.get(name) != value and name.partition(":")[0] in names}
    assert changed == wanted, changed ^ wanted
    elsewhere = {name for name, value in before.items() if after.get(name) != value} - wanted
    assert not elsewhere, elsewhere
    soka_vllm.register()
    assert attributes() == after


def check_late(later: list[str]) -> None:
    """What vLLM imports after the plugin is rebound all the same, and the plugin imports nothing of vLLM."""
    importlib.import_module("vllm.plugins")
    before = {name for name in sys.modules if name.partition(".")[0] == "vllm"}
    soka_vllm.register()
    more = {name for name in sys.modules if name.partition(".")[0] == "vllm"} - before
    assert not more, more
    for module in later:
        importlib.import_module(module)
    bound = [hook for hook in rows(vllm_version()) if hook.module in sys.modules]
    assert bound
    for hook in bound:
        value = value_of(hook.module, hook.name)
        names = " ".join(part.__name__ for part in value) if isinstance(value, tuple) else repr(value.__code__)
        assert "Kronecker" in names or "hooks.py" in names, hook
    assert "vllm.lora.layers" not in sys.modules


if __name__ == "__main__":
    check_all() if sys.argv[1:] == ["all"] else check_late(sys.argv[1:])
