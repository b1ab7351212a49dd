"""Read the targets of `soka-serve serve` (manifests, adapters, merged models): what is served, under which name. No
torch but for SoKA adapters, which are read and checked as a whole."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from soka_serve.adapter.remote.address import is_url
from soka_serve.adapter.remote.fetch import local_adapter
from soka_serve.compiler.context import prepare, previous_keys
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.status import stage_statuses
from soka_serve.errors import CheckpointError, SokaError, joined, printable
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json
from soka_serve.io.lockfile import lock_of, read_lock
from soka_serve.io.names import MODEL_NAME_RULE, is_model_name
from soka_serve.io.safetensors import read_header
from soka_serve.io.workspace import Workspace
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.read import LoadedManifest, read_manifest
from soka_serve.manifest.rules import SERVED_PROJECTIONS
from soka_serve.manifest.schema import Base, Manifest, Serve

if TYPE_CHECKING:
    from soka_serve.base.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Kind = Literal["adapter", "merged"]

_FACTOR = re.compile(r"\.(?:lora|lokr)_")
PEFT_TYPES = ("SOKA", "LOKR", "LORA")


@dataclass(frozen=True)
class Target:
    """One thing to serve.

    Args:
        given: what the user wrote.
        name: its model name in the API.
        kind: an adapter, or a merged model.
        path: absolute directory of the adapter or model.
        peft_type: SOKA, LOKR or LORA; empty for a merged model.
        rank: of a LoRA; 0 for the others, whose slots need none.
        factors: number of terms and factor shape of a SoKA adapter's modules, as served; empty for the others.
        base: the base that it names; None for a merged model, and for an adapter that names none.
        base_sha256: hash of the base's weights in its soka.lock; empty where there is none.
        settings: the manifest's [serve] table; None without a manifest.
        prompt: something to ask it, from the build's accuracy check.
        quantize: the bits of the base that a SoKA adapter adds to, where it is right on that alone.
    """

    given: str
    name: str
    kind: Kind
    path: Path
    peft_type: str = ""
    rank: int = 0
    factors: Mapping[str, tuple[int, FactorShape]] = field(default_factory=dict)
    base: Base | None = None
    base_sha256: str = ""
    settings: Serve | None = None
    prompt: str | None = None
    quantize: str | None = None

    def to_text(self) -> str:
        """One line for the terminal."""
        what = "merged model" if self.kind == "merged" else f"{self.peft_type} adapter"
        return f"{self.name}: {what}, {printable(self.path)}"


def read_targets(given: Sequence[str], *, out: Path | None = None) -> list[Target]:
    """Find and check what the command line names: '[NAME=]TARGET' each.

    Args:
        given: manifests (files), adapter directories, build directories (build/NAME), hub ids and URLs of adapters,
            which are fetched; merged models.
        out: folder of builds, where a manifest's build is looked for; default: its [output] dir.

    Raises:
        SokaError: everything that is wrong with any of them: no such thing, not built, not up to date, damaged, one
            name twice, more than one merged model or one beside adapters.
    """
    found: list[Target] = []
    problems: list[SokaError] = []
    for text in given:
        try:
            found.append(_read_target(text, out))
        except SokaError as error:
            problems.append(error)
    if not problems:
        problems = [*_check_names(found), *_check_merged(found)]
    if problems:
        message, hint = joined(problems)
        raise SokaError(message, hint=hint)
    return found


def split_name(text: str) -> tuple[str | None, str]:
    """'NAME=TARGET' or 'TARGET' -> the name, if any, and the target.

    >>> split_name("sums=build/math"), split_name("s3://bucket/date=1")
    (('sums', 'build/math'), (None, 's3://bucket/date=1'))
    """
    name, separator, target = text.partition("=")
    if not separator or is_url(text) or os.path.lexists(text):  # which takes names of any length
        return None, text
    if not name or not target:
        raise SokaError(f"{text}: expected TARGET or NAME=TARGET", hint="For example: sums=build/math/adapter")
    return name, target


def find_adapter(folder: Path) -> Path | None:
    """The adapter in a directory: the directory itself, or the one that a build put into it."""
    return next((place for place in (folder, folder / "adapter") if (place / CONFIG_FILE).is_file()), None)


def _read_target(text: str, out: Path | None) -> Target:
    name, given = split_name(text)
    path = local_adapter(given)
    if path.suffix == ".toml" or path.is_file():
        return _from_manifest(text, name, read_manifest(path), out)
    if not path.exists():
        hint = (
            "Give manifests (math.toml), adapter or build directories (build/math), hub ids (owner/name) or URLs "
            "(s3://bucket/math) of adapters, or one merged model."
        )
        raise SokaError(f"{text}: no such file or directory", hint=hint)
    adapter = find_adapter(path)
    if adapter is not None:
        return _from_adapter(text, name or _name_of(adapter), adapter)
    for place in (path, path / "merged"):
        if (place / "config.json").is_file():
            return _from_merged(text, name or _name_of(place), place)
    raise SokaError(
        f"{text}: neither an adapter ({CONFIG_FILE}), nor a build, nor a model (config.json)",
        hint="Give a manifest, or a directory such as build/math or build/math/adapter.",
    )


def _from_manifest(text: str, name: str | None, loaded: LoadedManifest, out: Path | None) -> Target:
    manifest = loaded.manifest
    root = out if out is not None else Path(manifest.output.dir)
    build_directory = Workspace(root, str(manifest.name)).directory
    method = METHODS[manifest.train.method]
    kind: Kind = "adapter" if "adapter" in manifest.output.write and not method.whole_model else "merged"
    line = f"soka-serve build {loaded.path}" + (f" --out {out}" if out is not None else "")
    _check_built(loaded, root, build_directory, kind, line)
    name = name or manifest.serve.name or str(manifest.name)
    read = _from_adapter if kind == "adapter" else _from_merged
    try:
        made = read(text, name, build_directory / kind)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=f"Build it again: {line} --force") from error
    # The manifest's own words on the base: its path is right here and now, the adapter's was when it was built.
    base = manifest.base
    if base.path is not None:
        base = base.model_copy(update={"path": str((loaded.directory / Path(base.path).expanduser()).resolve())})
    return replace(made, base=base if kind == "adapter" else None, settings=manifest.serve)


def _check_built(loaded: LoadedManifest, root: Path, build_directory: Path, kind: Kind, line: str) -> None:
    """Check that the build is there and up to date with its manifest. Its report and card may be older."""
    from soka_serve.base.resolve import resolve_base

    built = previous_keys(build_directory)
    if not built or not (build_directory / kind).is_dir():
        where = f"; there is no {kind} in {build_directory}" if built else f"; there is no build in {build_directory}"
        raise SokaError(f"{loaded.path}: not built{where}", hint=f"Build it first: {line}")
    base = resolve_base(loaded.manifest.base, manifest_dir=loaded.directory, weights=False, name_key=loaded.name_key)
    statuses = stage_statuses(loaded, base, root)
    if isinstance(statuses, str):  # its keys cannot be known here; a manifest that asks the same is good enough then
        changed = _asks_otherwise(loaded, build_directory)
        logger.warning("%s: whether the build is up to date cannot be told: %s", loaded.path, statuses)
    else:
        stage = "export" if kind == "adapter" else "merge"
        changed = built.get(stage) != next((s.key for s in statuses if s.name == stage), None)
    if changed:
        what = " and of ".join(_what_changed(loaded, build_directory, root))
        raise SokaError(f"{loaded.path}: the build in {build_directory} is of {what}", hint=f"Build again: {line}")


def _asks_otherwise(loaded: LoadedManifest, build_directory: Path) -> bool:
    """Whether a build's copy of its manifest differs in more than paths and how it is served."""
    lock = read_lock(build_directory / LOCK_FILE)
    if lock.get("manifest", {}).get("sha256") == loaded.sha256:
        return False
    try:
        before = read_manifest(build_directory / "manifest.toml").manifest
    except SokaError:
        return True
    return _asked(before) != _asked(loaded.manifest)


def _asked(manifest: Manifest) -> dict[str, Any]:
    places: dict[str, Any] = {"base": {"path"}, "train": {"data": {"jsonl", "eval_jsonl"}}, "output": {"dir", "report"}}
    return manifest.model_dump(mode="json", exclude={"name": True, "description": True, "serve": True, **places})


def _what_changed(loaded: LoadedManifest, build_directory: Path, root: Path) -> list[str]:
    """Name what has changed since the build: manifest, base, data, fine-tuned checkpoint or program."""
    lock = read_lock(build_directory / LOCK_FILE)
    found = ["an earlier manifest"] if _asks_otherwise(loaded, build_directory) else []
    try:
        now = prepare(loaded, Workspace(root, str(loaded.manifest.name)), save_hashes=False).inputs
    except SokaError:
        return found or ["an earlier manifest, base or data"]
    base = lock.get("base", {})
    if base.get("sha256") != now.base:
        moved = "" if base.get("name") == now.base_name else f" (it was {base.get('name')}, and is {now.base_name})"
        found.append(f"other weights of the base{moved}")
    if lock.get("data", {}).get("sha256") != now.data:
        found.append("other data")
    if sorted(lock.get("finetuned", {}).values()) != sorted(now.finetuned.values()):
        found.append("another fine-tuned checkpoint")
    return found or ["another config or tokenizer of the base, or an earlier soka-serve"]


def _from_adapter(text: str, name: str, path: Path) -> Target:
    budget = ReadingBudget()
    config = read_json(path / CONFIG_FILE, budget)
    kind = str(config.get("peft_type"))
    if kind not in PEFT_TYPES:
        raise CheckpointError(f"{path / CONFIG_FILE}: peft_type is {kind!r:.80}; served are {', '.join(PEFT_TYPES)}")
    factors: dict[str, tuple[int, FactorShape]] = {}
    quantize = None
    if kind == "SOKA":
        from soka_serve.adapter.format import read_adapter

        adapter = read_adapter(path, budget)
        modules, quantize = list(adapter.factors), adapter.quantize
        for module in modules:
            delta = adapter.delta_factors(module)
            factors[module] = (delta.rank, delta.shape)
    else:
        modules = sorted({_FACTOR.split(key)[0] for key in read_header(path / WEIGHTS_FILE, budget)})
    foreign = sorted(module for module in modules if module.rpartition(".")[2] not in SERVED_PROJECTIONS)
    if foreign:
        raise CheckpointError(
            f"{path}: {len(foreign)} of its modules cannot be served, {foreign[0]} for one",
            hint=f"Served are {', '.join(SERVED_PROJECTIONS)}; train without the others, or serve the merged model.",
        )
    lock = lock_of(path)
    return Target(
        given=text,
        name=name,
        kind="adapter",
        path=path.resolve(),
        peft_type=kind,
        factors=factors,
        rank=_lora_rank(path, config) if kind == "LORA" else 0,
        base=_named_base(config, lock),
        base_sha256=str(lock.get("base", {}).get("sha256", "")),
        prompt=_prompt(path.parent),
        quantize=quantize,
    )


def _from_merged(text: str, name: str, path: Path) -> Target:
    from soka_serve.base.checkpoint import Checkpoint

    check_served_layout(Checkpoint.open(path))
    return Target(given=text, name=name, kind="merged", path=path.resolve(), prompt=_prompt(path.parent))


def check_served_layout(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a bare model, which transformers loads as a causal language model and vLLM does not.

    Raises:
        CheckpointError: its tensors have no 'model.' in front, or its config names the bare model's class.
    """
    said = checkpoint.config.get("architectures")
    bare = next((name for name in checkpoint.tensors if name.startswith("layers.")), None)
    reason = f"with tensors such as {bare!r}" if bare is not None else None
    if isinstance(said, list) and said and all(str(name).endswith("Model") for name in said):
        reason = f"architectures = {said!r:.80} in its config.json"
    if reason is not None:
        raise CheckpointError(
            f"{checkpoint.directory}: a bare model ({reason}), which vLLM takes for an embedder",
            hint="Save it once as a causal language model: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR), and build on that.",
        )


def _lora_rank(path: Path, config: dict[str, Any]) -> int:
    said = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    ranks = [rank for rank in said if isinstance(rank, int) and rank > 0]
    if len(ranks) < len(said):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: r and rank_pattern must be whole numbers above 0, not {said!r:.200}"
        )
    return max(ranks)


def _named_base(config: dict[str, Any], lock: dict[str, Any]) -> Base | None:
    recorded = lock.get("base", {})
    if recorded.get("name") == "builtin:tiny":
        return Base(builtin="tiny")
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    if Path(name).is_absolute() or Path(name).is_dir() or name.count("/") != 1:
        return Base(path=name)
    return Base(hub=name, revision=recorded.get("revision") or config.get("revision") or None)


def _name_of(path: Path) -> str:
    """What an adapter or model is called without a manifest: by its lock, else by its folder."""
    named = lock_of(path).get("name") if path.name != "merged" else None
    return str(named or (path.resolve().parent.name if path.name in ("adapter", "merged") else path.resolve().name))


def _prompt(build: Path) -> str | None:
    """A held-out prompt of the build's accuracy check, if it is this user's build. For the printed example."""
    file = build / "check.json"
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_size > 1 << 20:
            return None
        prompts = read_json(file)["prompts"]
        return str(prompts[0]) if prompts else None
    except (OSError, SokaError, KeyError, TypeError, IndexError):
        return None


def _check_names(targets: Sequence[Target]) -> list[SokaError]:
    by_name: dict[str, list[Target]] = {}
    for target in targets:
        by_name.setdefault(target.name, []).append(target)
    hint = "Name one of them otherwise: NAME=TARGET on the command line, or [serve] name in its manifest."
    problems = [
        SokaError(f"{' and '.join(t.given for t in same)} would all be served as {name!r}", hint=hint)
        for name, same in by_name.items()
        if len(same) > 1
    ]
    wrong = [t for t in targets if not is_model_name(t.name)]
    problems += [
        SokaError(f"{t.given}: '{printable(t.name)}' cannot name a model: {MODEL_NAME_RULE}", hint=hint) for t in wrong
    ]
    return problems


def _check_merged(targets: Sequence[Target]) -> list[SokaError]:
    merged = [t for t in targets if t.kind == "merged"]
    if not merged or len(targets) == 1:
        return []
    others = ", ".join(t.given for t in targets if t is not merged[0])
    hint = "Serve it alone, or serve the adapters on their base."
    return [SokaError(f"{merged[0].given} is a merged model, which is served alone; also given: {others}", hint=hint)]
