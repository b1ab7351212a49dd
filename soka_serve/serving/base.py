"""Find the base that all adapters of a server share, and check its weights against their soka.lock."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soka_serve.adapter.served_base import served_sha256
from soka_serve.base.base import Base
from soka_serve.base.modules import text_config
from soka_serve.base.packed_shapes import check_packed
from soka_serve.base.resolve import open_base, resolve_base
from soka_serve.base.tokenizer_class import tokenizer_directory
from soka_serve.errors import CheckpointError, SokaError, joined
from soka_serve.io.files import is_own, is_own_file
from soka_serve.io.own_cache import HASHES_FILE
from soka_serve.io.workspace import HashCache
from soka_serve.manifest import schema
from soka_serve.serving.targets import Target, check_served_layout

logger = logging.getLogger(__name__)

# In the names of tensors: routed experts, one by one or stacked. Granite's have no "experts" in them. "shared_experts"
# alone are layers like others.
_EXPERTS = re.compile(r"\.(?:experts|block_sparse_moe)\.")


@dataclass(frozen=True)
class ServedBase:
    """The base that is served.

    Args:
        directory, name: where it is, and its name in the API.
        tokenizer: where its tokenizer is opened, see `tokenizer_class.tokenizer_directory`; None: in `directory`.
        context: length of its context; None: not known.
        kv_heads: number of its key/value heads; None: not known.
        has_experts: whether it is a mixture of experts.
        heads: number of its query heads; None: not known.
    """

    directory: Path
    name: str
    context: int | None
    kv_heads: int | None = None
    has_experts: bool = False
    tokenizer: Path | None = None
    heads: int | None = None


def find_base(targets: Sequence[Target], given: str | None = None) -> ServedBase:
    """The base that the adapters share.

    Args:
        targets: adapters.
        given: a directory, hub id or 'tiny', taken instead of what the adapters name.

    Raises:
        SokaError: they name different bases, none, or one that is not here; or weights that are not those in the
            adapters' soka.lock.
    """
    if given is not None:
        base = open_base(given)
        name = base.hub or base.directory.resolve().name
    else:
        shared = _shared(targets)
        base, name = resolve_base(shared, manifest_dir=Path.cwd()), _short(shared)
    check_served_layout(base.checkpoint)
    _check_bits(targets)
    _check_hashes(targets, base)
    _check_shapes(targets, base)
    config = text_config(base.config)
    said = [config.get(key) for key in ("max_position_embeddings", "num_key_value_heads", "num_attention_heads")]
    context, kv_heads, heads = (value if isinstance(value, int) else None for value in said)
    has_experts = any(_EXPERTS.search(tensor) for tensor in base.checkpoint.tensors)
    # An adapter was trained on what its base's hub id stands for, also where a directory is given in its place.
    hubs = [name, *(t.base.hub for t in targets if t.base is not None and t.base.hub is not None)]
    tokenizers = [place for hub in hubs if (place := tokenizer_directory(base.folder, hub)) != base.directory]
    tokenizer = tokenizers[0] if tokenizers else None
    return ServedBase(base.directory.resolve(), name, context, kv_heads, has_experts, tokenizer, heads)


def _shared(targets: Sequence[Target]) -> schema.Base:
    """The base that all name; two names for weights of one hash are one base."""
    named = {_key(t.base): t for t in targets if t.base is not None}
    if not named:
        raise SokaError("no adapter names its base", hint="Give it: --base DIRECTORY, a hub id, or 'tiny'.")
    hashes = {t.base_sha256 for t in named.values()}
    if len(named) > 1 and (len(hashes) > 1 or "" in hashes):
        # One line per target: which of them is the odd one is for the user to see.
        lines = [f"  {t.given}: {_show(t)}" for t in targets if t.base is not None]
        raise SokaError(
            "\n".join(["the adapters are for different bases, and one server has one base:", *lines]),
            hint="Serve them apart, on two ports; or give --base if these are names of one model.",
        )
    bases = [t.base for t in named.values() if t.base is not None]
    here = [base for base in bases if base.path is None or Path(base.path).is_dir()]
    if not here:
        first = next(iter(named.values()))
        raise CheckpointError(
            f"{first.given}: its base, {_show(first)}, is not here", hint="Give its place: --base DIRECTORY."
        )
    return here[0]


def _key(base: schema.Base | None) -> tuple[str, str, str]:
    if base is None:
        return ("", "", "")
    if base.path is not None:
        return ("path", str(Path(base.path).resolve()), "")
    if base.hub is not None:
        return ("hub", base.hub, base.revision or "")
    # The embedded model is a directory, too, which PEFT's own adapters name.
    from soka_serve.builtin import base_directory

    return ("path", str(base_directory().resolve()), "")


def _show(target: Target) -> str:
    kind, name, revision = _key(target.base)
    text = f"{kind} {name}" + (f" at {revision}" if revision else "")
    return text + (f" (weights {target.base_sha256[:12]})" if target.base_sha256 else "")


def _short(base: schema.Base) -> str:
    if base.path is not None:
        return Path(base.path).resolve().name
    return base.builtin or str(base.hub)


def _check_bits(targets: Sequence[Target]) -> None:
    """Refuse adapters of a base that bitsandbytes holds in bits: no base that vLLM serves adapters on is held so."""
    wrong = [t for t in targets if t.quantize is not None]
    if not wrong:
        return
    lines = [f"  {t.given}: adds to its base in {t.quantize} (bitsandbytes)" for t in wrong]
    if os.environ.get("SOKA_ALLOW_OTHER_BASE") == "1":
        logger.warning("%s", "\n".join(["served all the same, on weights that the adapters do not add to:", *lines]))
        return
    merged = wrong[0].path.parent / "merged"
    made = f"serve what `soka-serve merge {wrong[0].path} --base BASE --out merged` makes of it"
    if (merged / "config.json").is_file():
        made = f"serve {merged}, which the build made of it"
    raise SokaError(
        "\n".join(["adapters that are right on a quantised base alone, which is not what is served:", *lines]),
        hint=f"A merged model holds what such a base computes with: {made}. `soka-serve eval --backend transformers` "
        "measures the adapter on its own base. SOKA_ALLOW_OTHER_BASE=1 serves it all the same.",
    )


def _check_hashes(targets: Sequence[Target], base: Base) -> None:
    checkpoint, quantised = base.checkpoint, base.quantisation
    expected = {t.base_sha256 for t in targets if t.base_sha256}
    for target in targets:
        if not target.base_sha256:
            logger.warning("%s has no soka.lock: whether it was made for this base cannot be checked", target.given)
    if not expected:
        return
    actual = served_sha256(checkpoint.directory, logger, _build_hashes(targets))
    others = [t for t in targets if t.base_sha256 not in ("", actual)]
    if others and quantised is not None:
        logger.warning(
            "%s is quantised (%s): it cannot be compared with the weights in soka.lock",
            checkpoint.directory,
            quantised.to_text(),
        )
    elif others and os.environ.get("SOKA_ALLOW_OTHER_BASE") == "1":
        logger.warning("%s has other weights than adapters were made for; served all the same", checkpoint.directory)
    elif others:
        lines = [f"  {t.given}: made for weights {t.base_sha256[:12]}" for t in others]
        raise SokaError(
            "\n".join([f"the base in {checkpoint.directory} has weights {actual[:12]}, other than needed:", *lines]),
            hint="Give the base that they were made on (--base), build them again on this one, or set "
            "SOKA_ALLOW_OTHER_BASE=1 if the difference is intended.",
        )


def _build_hashes(targets: Sequence[Target]) -> list[HashCache]:
    """Hashes that the builds of the targets recorded, if only this user can have written them."""
    found = []
    for folder in sorted({target.path.parent.parent / ".cache" for target in targets}):
        file = folder / HASHES_FILE
        try:
            if is_own_file(file) and all(is_own(place.lstat()) for place in (folder.parent, folder)):
                found.append(HashCache(file))
        except OSError:
            continue  # no build, or one that has no cache
    return found


def _check_shapes(targets: Sequence[Target], base: Base) -> None:
    if not any(target.peft_type == "SOKA" for target in targets):
        return
    from soka_serve.adapter.format import check_against, read_adapter, refusal

    problems: list[SokaError] = []
    for target in targets:
        if target.peft_type == "SOKA":
            try:
                if base.quantisation is None:
                    check_against(read_adapter(target.path), base.weights)
                    continue
                shapes = {module: shape for module, (_, shape) in target.factors.items()}
                if wrong := check_packed(shapes, base.checkpoint.tensors, base.quantisation):
                    raise refusal(target.path, wrong, "it was made for another base")
            except CheckpointError as error:
                problems.append(error)
    if problems:
        raise CheckpointError(joined(problems)[0], hint=f"the base is {base.directory}")
