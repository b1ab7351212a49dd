"""What is cached of a build and what would run, for `soka-serve plan`."""

from __future__ import annotations

from pathlib import Path

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.context import is_whole, prepare, previous_keys
from soka_serve.compiler.plan.plan import StageStatus
from soka_serve.errors import SokaError
from soka_serve.io.workspace import HashCache, Workspace
from soka_serve.manifest.read import LoadedManifest

# Hashing more than this would make a plan wait.
_QUICK_BYTES = 500_000_000


def stage_statuses(loaded: LoadedManifest, base_dir: Path, root: Path) -> list[StageStatus] | str:
    """Each stage with its key; or, in words, why the keys can't be known.

    Args:
        loaded: the manifest.
        base_dir: the base's directory, with or without weights.
        root: the folder of builds.
    """
    workspace = Workspace(root, str(loaded.manifest.name))
    if not any(base_dir.glob("*.safetensors")):
        return "the base's weights are not here"
    hashes = HashCache(workspace.hashes)
    unknown = [f for f in Checkpoint.open(base_dir).files if not hashes.knows(f)]
    if sum(f.stat().st_size for f in unknown) > _QUICK_BYTES:
        return "the base's weights have not been hashed yet; the first build does that"
    try:
        context = prepare(loaded, workspace, save_hashes=False)
    except SokaError as error:  # data or a fine-tuned checkpoint that can't be reached
        return f"a build would stop: {error.message}"
    previous = previous_keys(workspace.target) if is_whole(workspace.target) else {}
    found = []
    for stage, key in context.keys.items():
        if previous.get(stage) == key:
            found.append(StageStatus(stage, key, True, "unchanged since the last build"))
        elif stage in ("init", "tune") and workspace.is_cached(stage, key):
            found.append(StageStatus(stage, key, True, "from an interrupted or earlier build"))
        elif stage == "tune" and workspace.stage(stage, key).exists():
            found.append(StageStatus(stage, key, False, "goes on from its last resume point"))
        elif previous:
            found.append(StageStatus(stage, key, False, "what it depends on has changed"))
        else:
            found.append(StageStatus(stage, key, False, "not built yet"))
    return found
