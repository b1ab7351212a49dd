"""vLLM's Triton kernels for LoRA without vLLM: read from a wheel, or from a folder with a part of one.

A machine with a GPU need not have vLLM installed for its kernels to be timed: they import six small things of it, which
this module puts in their place. The part of a wheel that is needed, 15 kB instead of hundreds of MB:

    python -m eval.vllm_lora vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl --out vllm_lora.zip
"""

from __future__ import annotations

import argparse
import importlib
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

KERNELS = "vllm/lora/ops/triton_ops"
_SOURCE = "SOURCE"  # in what `pack` writes: the name of the wheel
_FILES = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "kernel_utils", "utils")
# vLLM's defaults. Without the dual stream its kernels make no programmatic dependent launches.
_ENVIRONMENT = {
    "VLLM_BATCH_INVARIANT": False,
    "VLLM_TUNED_CONFIG_FOLDER": None,
    "VLLM_LORA_DISABLE_PDL": False,
    "VLLM_LORA_ENABLE_DUAL_STREAM": False,
}


def pack(wheel: Path, out: Path) -> None:
    """Write the kernels of a wheel to a zip file, which `load` takes as it takes the wheel.

    Raises:
        KeyError: the wheel has no such files.
    """
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr(_SOURCE, wheel.name)
        for name in _FILES:
            target.writestr(f"{KERNELS}/{name}.py", source.read(f"{KERNELS}/{name}.py"))


def source_name(source: Path) -> str:
    """What the kernels of `load` are of: the name of the wheel, or of the folder."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as file:
            if _SOURCE in file.namelist():
                return file.read(_SOURCE).decode()
    return source.name


def load(source: Path) -> SimpleNamespace:
    """vLLM's `lora_shrink`, `lora_expand`, `LoRAKernelMeta` and `utils`.

    Args:
        source: a wheel of vLLM, what `pack` has written, or a folder that holds `vllm/lora/ops/triton_ops`.

    Raises:
        RuntimeError: vLLM is imported already.
        ImportError: the kernels are not there, or want more of vLLM than is put in its place.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM is imported; its kernels can be taken from there")
    made = _stand_ins(source)
    sys.modules.update(made)
    try:
        found = {name: importlib.import_module(f"{KERNELS.replace('/', '.')}.{name}") for name in _FILES}
    finally:
        for name in made:
            sys.modules.pop(name, None)
    return SimpleNamespace(
        lora_shrink=found["lora_shrink_op"].lora_shrink,
        lora_expand=found["lora_expand_op"].lora_expand,
        LoRAKernelMeta=found["lora_kernel_metadata"].LoRAKernelMeta,
        utils=found["utils"],
    )


def _stand_ins(source: Path) -> dict[str, ModuleType]:
    """What the kernels import of vLLM."""
    import triton
    import triton.language

    made = {}

    def module(name: str, **content: Any) -> None:
        made[name] = ModuleType(name)
        vars(made[name]).update(content)

    parts = KERNELS.split("/")
    for depth in range(1, len(parts) + 1):  # packages whose own __init__ is not run
        module(".".join(parts[:depth]), __path__=[str(source.joinpath(*parts[:depth]))])
    module("vllm.envs", **_ENVIRONMENT)
    made["vllm"].envs = made["vllm.envs"]  # type: ignore[attr-defined]
    module("vllm.logger", init_logger=lambda name: SimpleNamespace(info_once=_quiet, warning_once=_quiet))
    cuda = torch.cuda.is_available()
    platform = SimpleNamespace(
        is_cuda=lambda: cuda,
        has_device_capability=lambda least: torch.cuda.get_device_capability() >= divmod(least, 10),
    )
    module("vllm.platforms", current_platform=platform)
    module("vllm.triton_utils", triton=triton, tl=triton.language)
    module("vllm.utils", __path__=[])
    module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    module("vllm.utils.torch_utils", direct_register_custom_op=_call_directly, async_tensor_h2d=_to_device)
    return made


def _quiet(*_: object) -> None:
    """Of the logger: that the default configuration is used."""


def _call_directly(**_: object) -> None:
    """In the place of the registration as an operator of torch; the kernels then call their functions themselves."""
    raise AttributeError("no operators of vLLM here")


def _to_device(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


def main() -> None:
    """Pack a wheel's kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pack(options.wheel, options.out)


if __name__ == "__main__":
    main()
