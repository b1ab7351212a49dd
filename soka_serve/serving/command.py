"""The vLLM command line and environment for a set of targets; what the user gives after `--` wins."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from soka_serve.adapter.remote.address import Address, is_url, local_path, parse_folder
from soka_serve.adapter.remote.store import check_scheme
from soka_serve.base.folder import ModelFolder
from soka_serve.base.foreign_code import check_no_code
from soka_serve.errors import SokaError
from soka_serve.serving.base import ServedBase
from soka_serve.serving.client import DEFAULT_HOST, DEFAULT_PORT, Endpoint
from soka_serve.serving.doctor import PLUGIN, find_engine
from soka_serve.serving.slots import slot_values
from soka_serve.serving.targets import Target, find_adapter

# Sizes that vLLM takes for --max-lora-rank.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Where adapters may come later: room for LoRA of vLLM's default rank, and a few slots.
_LATER_RANK, _LATER_SLOTS = 16, 8
# The layers that Kronecker adapters can change. Without this vLLM also wraps the embedding and lm_head, and log-
# probabilities of prompts then end its CPU engine.
_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_COMPILATION = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "--optimization-level", "-cc", "-O")
_MOST_KV_GIB = 4
_RUNTIME_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))

# Options of vLLM that would make what was checked untrue.
_TAKEN = {
    "--model": "the base comes from the adapters; --base (before the --) replaces it",
    "--lora-modules": "give adapters before the --, as TARGETs: they are checked and probed",
    "--no-enable-lora": "the adapters need LoRA enabled; serve a merged model instead",
    "--config": "give its options on the command line",
    "--trust-remote-code": "code that comes with a checkpoint is never run",
    "--uds": "the server is probed over TCP",
    "--headless": "the server is probed over HTTP",
    "--grpc": "the server is probed over HTTP",
    "--data-parallel-multi-port-external-lb": "it starts servers on several ports, and one is probed",
    "-dpm": "it starts servers on several ports, and one is probed",
    "--skip-tokenizer-init": "the probe asks for completions of a text",
    "--tokens-only": "the probe asks for completions of a text",
    "--checkpoint-prepare-on-startup": "the server starts paused, and the probe asks for completions",
}
# Only where adapters are served.
_TAKEN_WITH_ADAPTERS = {"--enable-sleep-mode": "what adapters hold in slots may be gone after a sleep"}
# Values of vLLM's options that would, by the names that vLLM has for the option.
_TAKEN_VALUES = (
    (("--load-format",), lambda value: value.lower() == "dummy", "the base would have random weights"),
    (("--runner",), lambda value: value not in ("auto", "generate"), "the probe asks for completions"),
    (("--convert",), lambda value: value not in ("auto", "none"), "the probe asks for completions"),
    (("--ssl-cert-reqs",), lambda value: value == "2", "the probe has no certificate to show"),
    (
        ("--node-rank", "-r"),
        lambda value: value != "0",
        "the first node has the HTTP server; start vLLM itself on the others (vllm serve --headless)",
    ),
)
# What else is read of vLLM's options.
_READ = (
    *("--api-key", "--dtype", "--enable-lora", "--host", "--kv-cache-memory-bytes", "--lora-target-modules"),
    *("--max-cpu-loras", "--max-lora-rank", "--max-loras", "--max-model-len", "--port", "--served-model-name"),
    *("--shutdown-timeout", "--ssl-certfile", "--tensor-parallel-size", "--tokenizer", "--tokenizer-mode"),
)
_API_PROCESSES = ("--api-server-count", "-asc")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the command line; None where one is not given."""

    host: str | None = None
    port: int | None = None
    runtime_loading: bool | None = None
    builds: Path | Address | None = None
    vllm: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch(Endpoint):
    """How vLLM is started, and how it is reached.

    Args:
        command: the command line.
        environment: what is added to the environment.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def drain_s(self) -> float:
        """Seconds in which requests may end when the server is asked to: vLLM's --shutdown-timeout."""
        options = itertools.dropwhile(lambda part: not part.startswith("-"), self.command)
        given = parse_options(tuple(options)).get("--shutdown-timeout") or [""]
        return float(given[-1]) if given[-1].isdigit() else 0.0

    def to_text(self) -> str:
        """The command as a shell takes it."""
        added = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*added, *map(shlex.quote, self.command)])


def make_launch(targets: Sequence[Target], base: ServedBase | None, settings: ServeOptions) -> Launch:
    """Make vLLM's command line and environment.

    Args:
        targets: adapters on one base, or one merged model; none with `settings.builds`.
        base: the adapters' base; None for a merged model.
        settings: the command line's options.

    Raises:
        CheckpointError: a model that needs code of its own.
        SokaError: manifests that disagree, an option of vLLM that conflicts with ours, a name that is taken.
    """
    model = base.directory if base else targets[0].path
    check_no_code(ModelFolder(model))
    theirs = parse_options(settings.vllm)
    _check_taken(theirs, merged=base is None)
    _check_api_processes(theirs, settings)
    if base is not None:
        _check_engine(base)
    ours = _ours(targets, base, settings, theirs)
    if "--max-loras" in theirs and "--max-cpu-loras" in ours:  # the one may not be larger than the other
        ours["--max-cpu-loras"] = [str(max(_number(theirs, "--max-loras"), int(ours["--max-cpu-loras"][0])))]
    options = [item for name, values in ours.items() if name not in theirs for item in (name, *values)]
    values = {**ours, **theirs}
    names = values["--served-model-name"]
    taken = [t.given for t in targets if base is not None and t.name in names]
    if taken:
        raise SokaError(
            f"{taken[0]}: its name is the base's, {names[0]!r}",
            hint="Name it otherwise (NAME=TARGET), or the base: -- --served-model-name NAME",
        )
    keys = values.get("--api-key") or os.environ.get("VLLM_API_KEY", "").split()
    return Launch(
        command=(sys.executable, "-m", "soka_serve.serving.vllm_command", str(model), *options, *settings.vllm),
        environment=_environment(theirs, targets, base, settings),
        host=_one(values, "--host"),
        port=_number(values, "--port"),
        scheme="https" if "--ssl-certfile" in theirs else "http",
        base_model=names[0],
        api_key=keys[0] if keys else "",
    )


def parse_options(arguments: Sequence[str]) -> dict[str, list[str]]:
    """vLLM's options as written -> name (with dashes, and whole where it is one that is read here) and values.

    >>> parse_options(["--max_model_len=512", "--enforce-eager", "-tp", "2", "-r0"])
    {'--max-model-len': ['512'], '--enforce-eager': [], '-tp': ['2'], '-r': ['0']}

    Raises:
        SokaError: something before the first option.
    """
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        if argument.startswith("-") and not argument[1:2].isdigit() and argument != "-":
            name, separator, value = argument.partition("=")
            if re.fullmatch(r"-[a-z]\d+", name):  # a value that is written to a letter, as argparse takes it
                name, separator, value = name[:2], "=", name[2:]
            current = found.setdefault(_whole(name.replace("_", "-")), [])
            current[:] = [value] if separator else []  # the last one counts, as in argparse
        elif current is None:
            raise SokaError(f"{argument!r} after --: vLLM's options begin with --", hint="TARGETs go before the --.")
        else:
            current.append(argument)
    return found


def _check_taken(theirs: Mapping[str, list[str]], *, merged: bool) -> None:
    taken = _TAKEN if merged else _TAKEN | _TAKEN_WITH_ADAPTERS
    problems = [f"{given} after --: {why}" for name, why in taken.items() for given in theirs if _means(given, name)]
    problems += [
        f"{given} {value} after --: {why}"
        for names, is_refused, why in _TAKEN_VALUES
        for given, values in theirs.items()
        for value in values
        if any(_means(given, name) for name in names) and is_refused(value)
    ]
    if merged and "--enable-lora" in theirs:
        problems.append("--enable-lora after --: a merged model is served without adapters")
    if problems:
        raise SokaError("\n".join(problems), hint="Leave it out, or run vLLM itself.")


def _means(given: str, name: str) -> bool:
    """Whether vLLM takes what was given for the option `name`: the beginning of a long one is enough."""
    return given == name or (given.startswith("--") and len(given) > 3 and name.startswith(given))


def _whole(given: str) -> str:
    names = [name for name in _READ if _means(given, name)]
    return names[0] if len(names) == 1 and given not in _READ else given


def _check_api_processes(theirs: Mapping[str, list[str]], settings: ServeOptions) -> None:
    """Refuse several API processes where adapters may come later: vLLM tells only one of them."""
    for given in theirs:
        # vLLM takes the beginning of an option for the option.
        if len(given) > 1 + given.startswith("--") and any(name.startswith(given) for name in _API_PROCESSES):
            processes = _number(theirs, given)
            if processes > 1 and _loads_later(settings):
                raise SokaError(
                    f"{given} {processes} after --: adapters that are loaded later are known to one of the processes",
                    hint="Leave it out; or give all adapters as TARGETs, without --builds and --runtime-loading.",
                )


def _check_engine(base: ServedBase) -> None:
    """Refuse what the installed vLLM cannot do with adapters, before minutes are spent on its start."""
    engine = find_engine()
    if engine is not None and engine.is_cpu and base.has_experts:
        raise SokaError(
            f"{base.directory}: a mixture of experts; with adapters, {engine.distribution} {engine.version} computes "
            "experts by Triton's kernels only, and nothing was tested with a Triton for CPUs",
            hint="Serve it on a GPU; or merge the adapter (`soka-serve merge`), and serve the merged model.",
        )
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip().lower() in ("1", "true"):
        raise SokaError(
            "VLLM_USE_RUST_FRONTEND is set: the plugin checks adapters in vLLM's Python front end", hint="Unset it."
        )
    if os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "0").strip().lower() in ("1", "true"):
        raise SokaError(
            "VLLM_ENABLE_STARTUP_PLAN is set: vLLM would size the KV cache by a start without this memory for adapters",
            hint="Unset it.",
        )


def _ours(
    targets: Sequence[Target], base: ServedBase | None, settings: ServeOptions, theirs: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The options that targets, manifests and command line give."""
    options: dict[str, list[str]] = {
        "--served-model-name": [base.name if base else targets[0].name],
        **_tokenizer_mode(base.directory if base else targets[0].path),
    }
    given = {"--host": settings.host, "--port": settings.port, "--dtype": None, "--max-model-len": None}
    defaults = {"--host": DEFAULT_HOST, "--port": DEFAULT_PORT}
    for option, chosen in given.items():
        if option not in theirs:
            value = chosen or _agreed(targets, option) or defaults.get(option)
            options |= {option: [str(value)]} if value else {}
    if base is None:
        return options
    if base.tokenizer is not None:
        options["--tokenizer"] = [str(base.tokenizer)]
    later = _loads_later(settings)
    adapters = {t.path for t in targets}
    if isinstance(settings.builds, Path):
        adapters |= {path.resolve() for path in list_builds(settings.builds)}
    slots = max(len(targets), len(adapters), _LATER_SLOTS if later else 1)
    options |= {
        "--enable-lora": [],
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(slots)],
        # Of LoRA's slots only: Kronecker adapters take what they need.
        "--max-lora-rank": [str(_lora_rank(targets, later))],
        "--lora-target-modules": list(_LAYERS),
    }
    if later:
        options[_API_PROCESSES[0]] = ["1"]  # vLLM would start one for each data-parallel engine
    engine = find_engine()
    if engine is not None and engine.is_cpu and not any(name.startswith(_COMPILATION) for name in theirs):
        # With adapters vLLM compiles nothing on a CPU, but unless told so it leaves out its own operators as well.
        options["--enforce-eager"] = []
    if targets:
        options["--lora-modules"] = [_lora_module(t) for t in targets]
    return options


def _tokenizer_mode(model: Path) -> dict[str, list[str]]:
    """For a model with files of Mistral's own format beside those of transformers: the latter's tokenizer, which
    training and evaluation use. vLLM would take the former's."""
    own = any(model.glob("consolidated*.safetensors"))
    files = (model / "tekken.json").exists() or any(model.glob("tokenizer.model.v*"))
    return {"--tokenizer-mode": ["hf"]} if own and files else {}


def parse_builds(given: str) -> Path | Address:
    """A folder of builds, or the URL of one, which is not asked.

    Raises:
        SokaError: no such URL, or of a kind that nothing here can open.
    """
    if not is_url(given):
        return Path(given)
    if given.startswith("file:"):
        return local_path(given)
    folder = parse_folder(given)
    check_scheme(folder)
    return folder


def list_builds(folder: Path) -> list[Path]:
    """The adapters in a folder of builds: NAME/adapter, or NAME itself.

    Raises:
        SokaError: no such folder.
    """
    if not folder.is_dir():
        raise SokaError(f"--builds {folder}: no such directory", hint="Give the folder that holds build/NAME.")
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [adapter for child in inside if (adapter := find_adapter(child)) is not None]


def _agreed(targets: Sequence[Target], option: str) -> str | int | None:
    """The value of an option in the manifests' [serve] tables; None where none has it."""
    key = option.removeprefix("--").replace("-", "_")
    tables = {t.given: t.settings for t in targets if t.settings is not None}
    said = {given: getattr(table, key) for given, table in tables.items() if key in table.model_fields_set}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{value} ({given})" for given, value in said.items())
        hint = f"Choose one: {option if option in ('--host', '--port') else f'-- {option}'} VALUE"
        raise SokaError(f"[serve] {key} differs between the manifests: {listed}", hint=hint)
    value = next(iter(said.values()), None)
    return value if isinstance(value, str | int) else None


def _lora_rank(targets: Sequence[Target], later: bool) -> int:
    needed = max([t.rank for t in targets] + [_LATER_RANK if later else 1])
    for size in _LORA_RANKS:
        if size >= needed:
            return size
    worst = max(targets, key=lambda t: t.rank)
    raise SokaError(f"{worst.given}: a LoRA of rank {worst.rank}; vLLM serves up to {_LORA_RANKS[-1]}")


def _lora_module(target: Target) -> str:
    path = str(target.path)
    if "=" in path or "," in path:  # vLLM splits the short form there
        return json.dumps({"name": target.name, "path": path})
    return f"{target.name}={path}"


def _loads_later(settings: ServeOptions) -> bool:
    """Whether adapters may be loaded while the server runs."""
    allowed = settings.runtime_loading
    if allowed is None:
        allowed = os.environ.get(_RUNTIME_VARIABLE, "0").strip().lower() in ("1", "true")
    return allowed or settings.builds is not None


def _environment(
    theirs: Mapping[str, list[str]], targets: Sequence[Target], base: ServedBase | None, settings: ServeOptions
) -> dict[str, str]:
    added: dict[str, str] = {}
    engine = find_engine()
    sized = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "--kv-cache-memory-bytes" in theirs
    if engine is not None and engine.is_cpu and not sized:
        added["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_gib())
    if base is None:
        # The plugin has no part in a merged model: any version of vLLM will do.
        found = [entry.name for group in _PLUGIN_GROUPS for entry in metadata.entry_points(group=group)]
        if "VLLM_PLUGINS" not in os.environ:
            added["VLLM_PLUGINS"] = ",".join(sorted(set(found) - {PLUGIN}))
        return added
    if settings.builds is not None:
        folder = str(settings.builds.resolve()) if isinstance(settings.builds, Path) else settings.builds.url
        added["SOKA_BUILDS"] = folder
        added[_RUNTIME_VARIABLE] = "1"
        if not settings.runtime_loading and "SOKA_ADAPTER_ROOTS" not in os.environ:
            # vLLM opens its load endpoint with it, which would read any folder: the folder of builds is enough.
            added["SOKA_ADAPTER_ROOTS"] = folder if isinstance(settings.builds, Path) else ""
    elif settings.runtime_loading is not None:
        added[_RUNTIME_VARIABLE] = "1" if settings.runtime_loading else "0"
    if not _loads_later(settings) and not any(t.peft_type == "LORA" for t in targets) and "SOKA_LORA" not in os.environ:
        added["SOKA_LORA"] = "0"  # no buffers for LoRA in the slots
    sizes_known = not _loads_later(settings) and all(t.factors for t in targets)
    if engine is not None and not engine.is_cpu and sizes_known and "SOKA_SLOT_PARAMETERS" not in os.environ:
        # On a GPU slots are reserved before the first adapter comes.
        ranks = _tensor_parallel(theirs)
        added["SOKA_SLOT_PARAMETERS"] = str(
            max(slot_values(t.factors, ranks, base.kv_heads, base.heads) for t in targets)
        )
    return added


def _tensor_parallel(theirs: Mapping[str, list[str]]) -> int:
    """Over how many GPUs each layer is cut. 1, for which there is room in any case, where two options disagree."""
    said = {_number(theirs, name) for name in ("--tensor-parallel-size", "-tp") if name in theirs}
    return said.pop() if len(said) == 1 else 1


def _kv_gib() -> int:
    """GiB for the KV cache on a CPU: a quarter of what is free, 1 to 4."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(_MOST_KV_GIB, free // (4 * 1024**3)))


def _one(values: Mapping[str, list[str]], name: str) -> str:
    if len(values[name]) != 1:
        raise SokaError(f"{name} after --: expected one value, got {values[name]}")
    return values[name][0]


def _number(values: Mapping[str, list[str]], name: str) -> int:
    text = _one(values, name)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SokaError(f"{name} {text}: expected a number from 1 to 65535")
    return int(text)
