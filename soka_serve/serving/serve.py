"""`soka-serve serve`: targets -> one vLLM server on their base, watched, probed and ended in order."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from soka_serve.adapter.remote.address import Address
from soka_serve.errors import BuildError, SokaError
from soka_serve.io.files import disk_errors
from soka_serve.io.own_cache import own_folder
from soka_serve.serving.base import ServedBase, find_base
from soka_serve.serving.command import Launch, ServeOptions, list_builds, make_launch
from soka_serve.serving.doctor import quick_checks
from soka_serve.serving.probe import examples, probe
from soka_serve.serving.process import StopSignal, check_port, started
from soka_serve.serving.targets import Target, read_targets

logger = logging.getLogger(__name__)


def plan_launch(
    given: Sequence[str], settings: ServeOptions, *, base: str | None = None, out: Path | None = None
) -> tuple[list[Target], Launch]:
    """Everything that can be checked before vLLM is started, and how it would be started.

    Args:
        given: '[NAME=]TARGET' each: manifests, adapter or build directories, or one merged model.
        settings: options of the command line.
        base: replaces the base that the adapters name.
        out: folder of builds of the manifests.

    Raises:
        SokaError: everything that is wrong with the targets; else the first thing that is wrong with the rest.
    """
    targets = read_targets(given, out=out)
    if not targets and settings.builds is None:
        raise SokaError("nothing to serve", hint="Give TARGETs, or a folder of builds: --builds build")
    merged = bool(targets) and targets[0].kind == "merged"
    if merged and (settings.builds is not None or settings.runtime_loading):
        raise SokaError("a merged model is served without adapters: --builds and --runtime-loading have no place there")
    _check_installation(merged=merged)
    served: ServedBase | None = None
    if not merged:
        served = find_base(targets or _some_build(settings.builds, base), base)
    return targets, make_launch(targets, served, settings)


def serve(
    targets: Sequence[Target], launch: Launch, *, verbose: bool, timeout_s: float, say: Callable[[str], None]
) -> int:
    """Run the server until it is told to stop.

    Args:
        targets: what `plan_launch` returned.
        launch: likewise.
        verbose: vLLM writes to the terminal instead of a file.
        timeout_s: how long it may take to start.
        say: prints a line.

    Returns:
        Exit code: 0 when a signal ended it while it served; 128 + the signal's number before that.

    Raises:
        SokaError: the port is taken, vLLM does not start or dies, an adapter has no effect.
    """
    check_port(launch.host, launch.port)
    ready = False
    try:
        with started(launch, None if verbose else log_file(launch.port), timeout_s) as server:
            with server.explaining():
                effects = probe(launch, targets) if targets and targets[0].kind == "adapter" else {}
            for target in targets:
                effect = f"; moves log-probabilities by up to {effects[target.name]:.3g}" if effects else ""
                logger.info("serving %s%s", target.to_text(), effect)
            ready = True
            for line in _ready_lines(targets, launch, server.ready_s):
                say(line)
            server.wait()
    except StopSignal as stopped:
        return 0 if ready else 128 + stopped.number
    raise AssertionError("Server.wait returns by raising")


def _ready_lines(targets: Sequence[Target], launch: Launch, seconds: float) -> list[str]:
    lines = [f"ready after {seconds:.0f} s: {launch.url}/v1, base model {launch.base_model!r}; Ctrl-C ends it"]
    for target in targets:
        curl, python = examples(launch, target)
        lines += ["", f"# {target.name}", curl, f"python -c {shlex.quote(python)}"]
    return lines


def _check_installation(*, merged: bool) -> None:
    """What `soka-serve doctor` can tell at once; a merged model needs vLLM only."""
    checks = quick_checks()
    problems = [check for check in checks if check.state == "problem"]
    for check in checks:
        if check.name == "vllm" and check.state == "warning" and not merged:
            logger.warning("%s", check.detail)
    if merged:
        needed = ("python", "torch", "device")
        problems = [c for c in problems if c.name in needed or (c.name == "vllm" and "installed" in c.detail)]
    if problems:
        raise SokaError(
            "\n".join(f"{check.name}: {check.detail}; {check.remedy}" for check in problems),
            hint="`soka-serve doctor` looks at everything.",
        )


def _some_build(folder: Path | Address | None, base: str | None) -> list[Target]:
    """The adapters of a folder of builds, whose base is the one to serve."""
    assert folder is not None
    if isinstance(folder, Address):  # whose adapters are not listed
        if base is None:
            raise SokaError(f"--builds {folder}: which base is served is not said", hint="Give --base, or a TARGET.")
        return []
    adapters = list_builds(folder)
    if not adapters:
        raise SokaError(f"--builds {folder}: no adapter in it", hint="Build one, or give --base and TARGETs.")
    # Each under a name of its own: they are asked for their base only.
    return [target for i, path in enumerate(adapters) for target in read_targets([f"build{i}={path}"])]


def log_file(port: int) -> Path:
    """A fresh log in the user's cache, one per port; not in a build, whose folder is replaced as a whole."""
    folder = own_folder() / "logs"
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except (BuildError, OSError):
        folder = Path(tempfile.mkdtemp(prefix="soka-serve-"))
    path = folder / f"vllm-{port}.log"
    path.unlink(missing_ok=True)
    return path
