"""Whether the installed vLLM has what the plugin calls and rebinds. Imports no vLLM: it looks at modules that are."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from soka_vllm.versions import is_supported, is_unknown, supported_text

# vLLM's layers that take Kronecker adapters: qkv_proj and gate_up_proj, packed or one module, o_proj and down_proj.
# Names with "Sharded" are what vLLM takes under --fully-sharded-loras.
LORA_LAYERS = tuple(
    f"{kind}ParallelLinearWith{sharded}LoRA"
    for kind in ("Column", "MergedColumn", "MergedQKV", "QKV", "Row")
    for sharded in ("", "Sharded")
)


class Signature(NamedTuple):
    """A function of vLLM, or a value.

    Args:
        module: its module.
        name: function or Class.method.
        parameters: names of the parameters that it must have, in order; None: it must be there.
    """

    module: str
    name: str
    parameters: str | None


# What the plugin calls or overrides; what it rebinds is in `hooks.HOOKS`.
CALLED = (
    *(
        Signature("vllm.lora.layers", f"{layer}.{name}", parameters)
        for layer in LORA_LAYERS
        for name, parameters in (
            ("create_lora_weights", "self max_loras lora_config model_config"),
            ("reset_lora", "self index"),
            ("set_lora", "self index lora_a lora_b"),
            ("apply", "self x bias"),
        )
    ),
    Signature("vllm.v1.engine.core_client", "AsyncMPClient.call_utility_async", "self method args"),
    *(
        Signature("vllm.v1.core.sched.request_queue", f"{queue}RequestQueue.{name}", parameters)
        for queue in ("FCFS", "Priority")
        for name, parameters in (("add_request", "self request"), ("remove_requests", "self requests"))
    ),
)
# By module: a class and what its constructor must set.
ATTRIBUTES = {
    "vllm.lora.model_manager": ("LoRAModelManager", ("packed_modules", "modules")),
    "vllm.lora.punica_wrapper.punica_base": ("PunicaWrapperBase", ("_token_lora_indices",)),
    "vllm.v1.core.sched.scheduler": ("Scheduler", ("lora_config", "policy", "requests", "running", "waiting")),
    "vllm.v1.request": ("Request", ("arrival_time", "lora_request", "num_preemptions", "priority")),
}
CLASSES = ("vllm.lora.utils", "_all_lora_classes")  # where vLLM looks for the layers

_logger = logging.getLogger("vllm.soka")


def check_version(signatures: Iterable[Signature]) -> None:
    """Refuse a version of vLLM that is older than the plugin, or later and different; warn of one that is later.

    Raises:
        RuntimeError: why; of a later version all that differs, as its sources have it.
    """
    version = vllm_version()
    if is_supported(version):
        return
    if not is_unknown(version):
        raise RuntimeError(f"{_here()}: {_ADVICE}")
    from soka_vllm.sources import installed_sources, source_problems

    _refuse(source_problems(installed_sources(), signatures))
    _logger.warning("%s. %s", _here(), UNKNOWN_FITS)


def check_modules(modules: Iterable[str], signatures: Iterable[Signature]) -> None:
    """Check imported modules of vLLM.

    Raises:
        RuntimeError: functions that have other parameters than expected, or that are not there, all of them.
    """
    names = set(modules)
    problems = [problem for signature in signatures if signature.module in names for problem in _problems(signature)]
    for name in names & ATTRIBUTES.keys():
        cls, attributes = ATTRIBUTES[name]
        constructor: Any = inspect.unwrap(getattr(sys.modules[name], cls).__init__)
        missing = set(attributes) - set(constructor.__code__.co_names)
        problems += [f"{cls} has no {attribute}" for attribute in sorted(missing)]
    if "vllm.lora.utils" in names:
        problems += _layer_problems(getattr(sys.modules["vllm.lora.utils"], "_all_lora_classes", None))
    _refuse(problems)


def differs(signature: Signature, parameters: str | None) -> list[str]:
    """What is wrong with a function that has these parameters; None: that is not there."""
    if parameters is not None and signature.parameters in (None, parameters):
        return []
    name = signature.name if "." in signature.name else f"{signature.module}.{signature.name}"
    expected = "" if signature.parameters is None else f"; expected ({signature.parameters})"
    return [f"{name} ({'does not exist' if parameters is None else parameters or 'no parameters'}){expected}"]


UNKNOWN_FITS = "It is not known to this plugin; its functions are as the plugin expects, and nothing was run with it"
_ADVICE = "install a supported version, or set VLLM_PLUGINS= to run without Kronecker adapters"


def vllm_version() -> str:
    """The version of vLLM in this process."""
    import vllm

    return str(vllm.__version__)


def _here() -> str:
    return f"soka_vllm supports vLLM {supported_text()}; installed is {vllm_version()}"


def _problems(signature: Signature) -> list[str]:
    found: Any = sys.modules[signature.module]
    for name in signature.name.split("."):
        found = getattr(found, name, None)
    if found is None or signature.parameters is None:
        return differs(signature, None if found is None else "")
    return differs(signature, " ".join(inspect.signature(found).parameters))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RuntimeError("\n".join([f"{_here()}, which differs from what was tested: {_ADVICE}", *problems]))


def _layer_problems(classes: Any) -> list[str]:
    if not isinstance(classes, tuple):
        return ["vllm.lora.utils._all_lora_classes is not a tuple of classes"]
    names = {cls.__name__ for cls in classes}
    return [f"{name} is not in vllm.lora.utils._all_lora_classes" for name in LORA_LAYERS if name not in names]
