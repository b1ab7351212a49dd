"""The part of `soka-serve doctor` that imports heavy packages: a program of its own, which an import may end.

    python -m soka_serve.serving.doctor_imports torch peft vllm

prints a JSON object per line: {"what": "torch", "started": true} before each, and after it {"what", "ok", "detail"}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def _torch() -> str:
    import torch

    if torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}"
    return "no CUDA device"


def _peft() -> str:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import soka_serve.peft  # noqa: F401  registers

    names = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if "SOKA" not in names:
        raise RuntimeError("soka_serve.peft was imported, and PEFT does not know the method SOKA")
    return "SOKA is registered"


def _vllm() -> str:
    from vllm.platforms import current_platform

    from soka_vllm.hooks import check_vllm

    check_vllm()
    return f"the plugin fits; runs on {'CPU' if current_platform.is_cpu() else 'GPU'}"


_CHECKS = {"torch": _torch, "peft": _peft, "vllm": _vllm}


def main(names: list[str]) -> None:
    """Run the checks of these names in this order; a name that is none of them is imported."""
    out = os.fdopen(os.dup(1), "w")  # packages print while they are imported: what they say goes elsewhere
    os.dup2(2, 1)
    for name in names:
        print(json.dumps({"what": name, "started": True}), file=out, flush=True)
        try:
            detail, ok = (_CHECKS[name]() if name in _CHECKS else _import(name)), True
        except Exception as error:  # noqa: BLE001  whatever an import raises is the finding
            detail, ok = f"{type(error).__name__}: {error}", False
        print(json.dumps({"what": name, "ok": ok, "detail": detail}), file=out, flush=True)


def _import(name: str) -> str:
    importlib.import_module(name)
    return "can be imported"


if __name__ == "__main__":
    main(sys.argv[1:])
