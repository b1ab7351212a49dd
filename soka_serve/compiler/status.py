"""`soka-serve plan`: what a build would do, with what is cached of it.

The embedded model makes the example run anywhere:

>>> import soka_serve
>>> made = soka_serve.plan("manifests/math.toml")
>>> made.name
'math'
"""

from __future__ import annotations

from pathlib import Path

from soka_serve.adapter.remote.problems import FetchError
from soka_serve.base.base import Base
from soka_serve.base.resolve import resolve_base
from soka_serve.compiler.context import is_whole, prepare, previous_keys
from soka_serve.compiler.plan.plan import STOPS, Plan, StageStatus, make_plan
from soka_serve.errors import SokaError
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command
from soka_serve.io.workspace import HashCache, Workspace
from soka_serve.manifest.read import LoadedManifest, read_manifest

# Hashing more than this would make a plan wait.
_QUICK_BYTES = 500_000_000


@one_command()
def plan(manifest: str | Path, *, out: str | Path | None = None, policies: int | None = None) -> Plan:
    """What a build of this manifest would do. Loads no weights and no torch.

    Args:
        manifest: path of the TOML file.
        out: folder of builds, where caches are looked for; default: `[output] dir`.
        policies: also list rank policies with about so many trainable parameters.

    Raises:
        SokaError: a manifest that is wrong, or does not fit its base or data.
    """
    given = None if out is None else given_path(out, "out")
    loaded = read_manifest(Path(manifest))
    root = given or Path(loaded.manifest.output.dir)
    base = resolve_base(loaded.manifest.base, manifest_dir=loaded.directory, weights=False, name_key=loaded.name_key)
    stages = stage_statuses(loaded, base, root)
    return make_plan(loaded, base=base, policies=policies).with_stages(stages)


def stage_statuses(loaded: LoadedManifest, base: Base, root: Path) -> list[StageStatus] | str:
    """Each stage with its key; or, in words, why the keys can't be known.

    Args:
        loaded: the manifest.
        base: its base, with or without weights.
        root: the folder of builds.

    Raises:
        FetchError: an adapter that targets start from cannot be fetched, which a plan needs as well.
    """
    workspace = Workspace(root, str(loaded.manifest.name))
    if not base.has_weights:
        return "the base's weights are not here"
    hashes = HashCache(workspace.hashes)
    unknown = [f for f in base.checkpoint.files if not hashes.knows(f)]
    if sum(f.stat().st_size for f in unknown) > _QUICK_BYTES:
        return "the base's weights have not been hashed yet; the first build does that"
    try:
        context = prepare(loaded, workspace, base=base, save_hashes=False)
    except FetchError:
        raise
    except SokaError as error:  # data or a fine-tuned checkpoint that can't be reached
        return f"{STOPS}{error.message}"
    previous = previous_keys(workspace.directory) if is_whole(workspace.directory) else {}
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
