"""What the stages of one build share: the manifest, the base, the targets, and the key of every stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.base.base import Base
from soka_serve.base.resolve import resolve_base
from soka_serve.base.target_modules import TargetModule, describe_not_adapted, resolve_targets
from soka_serve.base.tokenizer_class import TOKENIZER_FILES, check_tokenizer_files
from soka_serve.compiler.keys import InputHashes, stage_keys
from soka_serve.compiler.methods import METHODS, Method
from soka_serve.compiler.plan.given import check_base, settle_targets, sources_of
from soka_serve.compiler.processes import Processes
from soka_serve.compiler.unread import unread_keys
from soka_serve.data.rows import resolve
from soka_serve.data.sources import file_digest, mixture_sha256
from soka_serve.errors import CheckpointError
from soka_serve.io.file_names import ADAPTER_FILES, CARD_FILE, LOCK_FILE
from soka_serve.io.files import sha256_text
from soka_serve.io.lockfile import read_lock
from soka_serve.io.outputs import Lock, OutputKind
from soka_serve.io.warn_once import warn
from soka_serve.io.workspace import HashCache, Workspace
from soka_serve.manifest import schema
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.read import LoadedManifest

if TYPE_CHECKING:
    from soka_serve.adapter.given import GivenAdapter

logger = logging.getLogger(__name__)

# Files of the base, beside its weights and its tokenizer's, that a result depends on.
CONFIG_FILES = ("config.json", "generation_config.json")

_PAPERS = ("manifest.toml", "history.jsonl", "init.json", "check.json", "measured.json", CARD_FILE, "report.html")


def _build_files(directory: Path, lock: Lock | None) -> list[str]:
    """What a build's lock says that it wrote; where the lock is damaged, every name that a build may have written."""
    if lock is not None:
        return list(lock["files"])
    from soka_serve.compiler.merge.papers import model_files

    adapter = [f"adapter/{name}" for name in ADAPTER_FILES]
    return [*_PAPERS, *adapter, *(f"merged/{name}" for name in model_files(directory / "merged"))]


BUILD = OutputKind(
    what="a build",
    is_marked=lambda lock: lock is None or (isinstance(lock.get("files"), dict) and "stages" in lock),
    files=_build_files,
)


@dataclass(frozen=True)
class Sources:
    """Fine-tuned checkpoints and adapters that rules start from, each by what the manifest calls it."""

    finetuned: dict[str, Base]
    adapters: dict[str, GivenAdapter]

    def sha256(self, hashes: HashCache) -> dict[str, str]:
        """The hash of each."""
        found = {name: base.checkpoint.sha256(hashes.file) for name, base in self.finetuned.items()}
        return found | {name: adapter.sha256(hashes.file) for name, adapter in self.adapters.items()}


@dataclass
class Context:
    """Everything the stages of one build share; `finetuned` and `adapters` have what rules start from, by its name."""

    loaded: LoadedManifest
    workspace: Workspace
    base: Base
    finetuned: dict[str, Base]
    adapters: dict[str, GivenAdapter]
    targets: list[TargetModule]
    inputs: InputHashes
    keys: dict[str, str]
    processes: Processes
    progress: bool
    hashes: HashCache
    timings_s: dict[str, float] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    dropped_energy_frac: float = 0.0
    _started: float = 0.0

    @property
    def method(self) -> Method:
        """What the manifest trains."""
        return METHODS[self.loaded.manifest.train.method]

    @property
    def quantize(self) -> str | None:
        """The bits of the base that the adapter adds to, where it is right on a base in these alone; else None."""
        starts = any(target.rule.start.on_quantised for target in self.targets)
        marked = starts or any(adapter.quantize for adapter in self.adapters.values())
        return self.loaded.manifest.base.quantize if marked and self.method.kronecker else None

    def seconds_so_far(self) -> float:
        """Seconds since the running stage began."""
        return time.monotonic() - self._started

    @contextmanager
    def stage(self, name: str, why: str) -> Iterator[None]:
        """Log a stage's start and end, and time it."""
        if self.processes.is_main:
            logger.info("%s: %s", name, why)
        self._started = time.monotonic()
        yield
        self.timings_s[name] = self.seconds_so_far()
        self.ran.append(name)


def prepare(
    loaded: LoadedManifest,
    workspace: Workspace,
    *,
    base: Base | None = None,
    processes: Processes | None = None,
    progress: bool = True,
    save_hashes: bool = True,
) -> Context:
    """Read and check everything that a build needs, and work out its stages.

    Nothing is written but what was learned about file hashes, and not even that with `save_hashes=False`.

    Args:
        loaded: the manifest.
        workspace: of the build.
        base: its base, where the caller has opened it already.
        processes: of this run.
        progress: show progress.
        save_hashes: remember what was hashed.
    """
    manifest = loaded.manifest
    base = base or resolve_base(manifest.base, manifest_dir=loaded.directory, name_key=loaded.name_key)
    base.checkpoint.check_loadable()
    base.check_adaptable()
    targets = resolve_targets(manifest, base.layout.modules, base.layout.left_out, loaded.name_key)
    check_tokenizer_files(base.folder)  # before they are hashed
    targets, sources = open_sources(targets, manifest, loaded.directory, loaded.name_key)
    hashes = HashCache(workspace.hashes)
    hash_data = partial(mixture_sha256, manifest.train, manifest_dir=loaded.directory, digest_of=cache(file_digest))
    evaluated = any(data.eval_jsonl or data.eval_split for data in manifest.train.datasets)
    inputs = InputHashes(
        base=base.checkpoint.sha256(hashes.file),
        config=sha256_of(base.directory, CONFIG_FILES, hashes),
        tokenizer=sha256_of(base.tokenizer_folder.directory, TOKENIZER_FILES, hashes),
        data=hash_data(),
        finetuned=sources.sha256(hashes),
        base_name=base.name,
        manifest=loaded.sha256,
        dtype=base.layout.size.dtype,
        training=hash_data(evaluation=False) if evaluated else None,
    )
    check_base(sources.adapters, inputs.base, manifest, loaded.name_key)
    processes = processes or Processes()
    if processes.is_main and save_hashes:
        hashes.save()
    keys = stage_keys(manifest, inputs, [t.module.name for t in targets], {t.rule.start for t in targets})
    return Context(
        loaded=loaded,
        workspace=workspace,
        base=base,
        finetuned=sources.finetuned,
        adapters=sources.adapters,
        targets=targets,
        inputs=inputs,
        keys=keys,
        processes=processes,
        progress=progress,
        hashes=hashes,
    )


def tell_left_out(context: Context) -> None:
    """Log what of the base a build leaves alone although no rule says so, and what of files is not used."""
    for note in unread_keys(context.loaded.manifest):
        logger.warning("%s", note)
    layout = context.base.layout
    if (unused := layout.describe_unused()) is not None:
        logger.warning("%s: %s", context.base.directory, unused)
    if not context.method.whole_model:
        for entry in describe_not_adapted(layout, ()):
            logger.warning("not adapted: %s", entry)


def sha256_of(directory: Path, names: Sequence[str], hashes: HashCache) -> str:
    """One hash over those of the named files that are there."""
    found = [(name, directory / name) for name in names if (directory / name).is_file()]
    return sha256_text("".join(f"{hashes.file(file)}  {name}\n" for name, file in found))


def open_sources(
    targets: Sequence[TargetModule], manifest: schema.Manifest, directory: Path, name_key: Callable[[TomlPath], str]
) -> tuple[list[TargetModule], Sources]:
    """Open what targets start from besides the base.

    Args:
        targets: what `resolve_targets` returned.
        manifest: theirs.
        directory: where its relative paths start.
        name_key: what messages call a key of it.

    Returns:
        The targets as `settle_targets` returns them, and what was opened.

    Raises:
        CheckpointError: a source that is missing, damaged or quantised.
        PlanError: an adapter that does not fit the targets.
    """
    finetuned = {s: _open_finetuned(s, manifest, directory, name_key) for s in sources_of(targets, "finetuned")}
    settled, adapters = settle_targets(targets, manifest, directory, name_key)
    for other in finetuned.values():
        other.check_plain()
    return settled, Sources(finetuned, adapters)


def _open_finetuned(
    source: str, manifest: schema.Manifest, directory: Path, name_key: Callable[[TomlPath], str]
) -> Base:
    """A fine-tuned checkpoint is a directory when there is one of that name, else a hub id."""
    rule = next(i for i, rule in enumerate(manifest.adapt) if rule.finetuned == source)
    is_path = (directory / Path(source).expanduser()).exists() or source.startswith((".", "/", "~"))
    table = schema.Base(path=source) if is_path else schema.Base(hub=source)
    key = name_key(("adapt", rule, "finetuned"))
    return resolve_base(table, manifest_dir=directory, name_key=lambda _: key)


def previous_keys(directory: Path) -> dict[str, str]:
    """Stage keys of the artefact that is there; empty when there is none, or it was not made by a build."""
    return dict(_previous_lock(directory).get("stages", {}))


def _previous_lock(directory: Path) -> dict[str, Any]:
    """The lock of the artefact that is there; empty when there is none, or it cannot be read."""
    if not (directory / LOCK_FILE).exists():
        return {}
    try:
        lock = read_lock(directory / LOCK_FILE)
    except CheckpointError as error:
        warn(logger, "%s; everything runs again", error.message)
        return {}
    wrong = [name for name in ("files", "stages", "manifest") if not isinstance(lock.get(name, {}), dict)]
    if wrong:
        warn(logger, "%s: %s: not a table; everything runs again", directory / LOCK_FILE, ", ".join(wrong))
        return {}
    return lock


def is_whole(directory: Path) -> bool:
    """Whether every file that the lock lists is there with its size; False where there is no build."""
    lock = _previous_lock(directory)
    for name, size in lock.get("files", {}).items():
        path = directory / name
        if not path.exists() or path.stat().st_size != size:
            warn(logger, "%s is missing or was changed; building again", path)
            return False
    return bool(lock)


def check_output(context: Context) -> None:
    """Refuse to replace a folder that is no build, or one that holds what the build reads or did not write.

    Raises:
        BuildError: names what would be lost.
    """
    directory, loaded = context.workspace.directory, context.loaded
    data = loaded.manifest.train.datasets
    places = [text for part in data for text in (part.jsonl, part.eval_jsonl, part.hub) if text]
    named = [resolve(loaded.directory, text) for text in places]
    bases = [context.base, *context.finetuned.values()]
    named += [adapter.directory for adapter in context.adapters.values()]
    BUILD.check(directory, keep=[loaded.path, *(base.directory for base in bases), *named])
    if lock := _previous_lock(directory):
        maker = lock.get("manifest", {}).get("file")
        if maker not in (None, loaded.path.name):
            warn(logger, "%s was built from %s; this build of %s replaces it", directory, maker, loaded.path.name)
