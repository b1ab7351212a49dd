"""What the runs of a suite depend on besides the suite, read on the machine that this runs on."""

from __future__ import annotations

from collections.abc import Collection

from soka_serve.adapter.remote.address import is_url, parse_address
from soka_serve.base.base import Base
from soka_serve.base.resolve import resolve_base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.base.tokenizer_class import TOKENIZER_FILES, check_tokenizer_files
from soka_serve.comparison.plan import RunInputs, packages_of
from soka_serve.comparison.read import LoadedSuite
from soka_serve.comparison.settings import manifest_of
from soka_serve.comparison.suite import Contender, Suite
from soka_serve.compiler.context import CONFIG_FILES, open_sources, sha256_of
from soka_serve.compiler.plan.given import check_base
from soka_serve.compiler.train.installed import package_missing
from soka_serve.data.sources import data_sha256
from soka_serve.errors import BuildError, printable
from soka_serve.io.files import sha256_text
from soka_serve.io.hardware import has_nvidia_gpu
from soka_serve.io.versions import installed, versions
from soka_serve.io.workspace import HashCache
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.optimisers import OPTIMISERS
from soka_serve.manifest.schema import Manifest


def read_inputs(loaded: LoadedSuite, hashes: HashCache) -> RunInputs:
    """Everything that all runs depend on, other than the suite: hashes of base and data, versions, kind of device.

    Args:
        loaded: the suite.
        hashes: where hashes of large files are remembered; it is saved.

    Raises:
        CheckpointError, DataError: base, data, or what a method starts from, that cannot be read.
        PlanError: an adapter that a method starts from does not fit the base.
        BuildError: the URL of one does not say which it is.
    """
    base = resolve_base(loaded.suite.base, manifest_dir=loaded.directory, name_key=loaded.name_key)
    base.check_adaptable()
    check_tokenizer_files(base.folder)  # before they are hashed
    digest = base.checkpoint.sha256(hashes.file)
    papers = sha256_of(base.directory, CONFIG_FILES, hashes)
    papers = sha256_text(papers + sha256_of(base.tokenizer_folder.directory, TOKENIZER_FILES, hashes))
    sources = _sources(loaded, base, digest, hashes)
    hashes.save()
    data, other = (
        {item.name: data_sha256(item.data, manifest_dir=loaded.directory) for item in items}
        for items in (loaded.suite.dataset, loaded.suite.other)
    )
    named = {package for contender in loaded.suite.method for package in packages_of(_first(loaded.suite, contender))}
    return RunInputs(
        digest,
        papers,
        data,
        other,
        versions(),
        _device(loaded.suite, base),
        sources,
        packages={package: installed(package) or "not installed" for package in sorted(named)},
    )


def check_able(loaded: LoadedSuite, inputs: RunInputs, methods: Collection[str]) -> None:
    """Refuse, before any run, methods none of whose runs could be made here.

    Args:
        loaded: the suite.
        inputs: of this machine.
        methods: names of those that have runs left.

    Raises:
        BuildError: an optimiser whose package is not installed, or one for GPUs without a GPU.
    """
    for i, contender in enumerate(loaded.suite.method):
        if contender.name not in methods:
            continue
        name = _first(loaded.suite, contender).train.optimiser
        path: TomlPath = ("method", i, "train") if "optimiser" in contender.words else ("train",)
        place, optimiser = loaded.name_key((*path, "optimiser")), OPTIMISERS[name]
        if optimiser.pip and inputs.packages[optimiser.pip] == "not installed":
            raise package_missing(place, name)
        if optimiser.needs_gpu and inputs.device != "cuda":
            raise BuildError(f'{place}: "{name}" needs a GPU, and there is none', hint="take another optimiser")


def _first(suite: Suite, contender: Contender) -> Manifest:
    """A manifest of one of the method's runs."""
    return manifest_of(suite, contender, suite.datasets_of(contender)[0], setting=contender.first, seed=0)


def _sources(loaded: LoadedSuite, base: Base, digest: str, hashes: HashCache) -> dict[str, str]:
    """Hashes of the fine-tuned checkpoints and adapters that methods start from, by what the suite calls them."""
    suite, found = loaded.suite, dict[str, str]()
    for number, contender in enumerate(suite.method):
        if contender.adapt.source is None:
            continue

        def name_key(path: TomlPath, number: int = number) -> str:
            return loaded.name_key(("method", number, "adapt", *path[2:]))  # a manifest's path is adapt, rule, key

        source, of_adapter = contender.adapt.source, contender.adapt.start.source == "adapter"
        if of_adapter and is_url(source) and not ((address := parse_address(source)) and address.is_fixed):
            raise BuildError(
                f"{name_key(('adapt', 0, 'adapter'))}: {printable(source)} may be another adapter at the next run",
                hint="Say which it is: put @sha256: and the hash of its weights at the end, or on a hub name a commit.",
            )
        manifest = _first(suite, contender)
        targets = resolve_targets(manifest, base.layout.modules, base.layout.left_out, name_key)
        _, sources = open_sources(targets, manifest, loaded.directory, name_key)
        check_base(sources.adapters, digest, manifest, name_key)
        found |= sources.sha256(hashes)
    return found


def _device(suite: Suite, base: Base) -> str:
    """The kind of device, which says in what dtype a base is held."""
    if has_nvidia_gpu():
        return "cuda"
    stored = {info.dtype for info in base.checkpoint.tensors.values()}
    if suite.base.dtype != "auto" or suite.base.quantize != "none" or stored.isdisjoint(("F16", "BF16")):
        return "cpu"
    from soka_serve.kron.cpu import has_amx

    return "cpu with AMX" if has_amx() else "cpu without AMX"
