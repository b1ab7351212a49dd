"""What each stage of a build depends on, as hashes.

A stage runs again when its key changes, and its key holds what the result depends on and nothing else: changing
`merged_dtype` reruns only the merge of an adapter, and a comment only the report, which goes with the copies of the
manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soka_serve.compiler.methods import METHODS, Method
from soka_serve.compiler.quiz import kept_apart
from soka_serve.manifest.rules import EVERY_MODULE, LLAMA_PROJECTIONS, Adapt
from soka_serve.manifest.schema import Manifest, Train
from soka_serve.starts.start import Start

# Raised when a stage's result changes for the same inputs, so that old caches are not taken for new ones.
STAGE_VERSIONS = {"init": 3, "tune": 2, "export": 1, "merge": 1, "check": 1, "measure": 1, "report": 1}

# The same for builds that train Kronecker factors: all of them, and those that set a key of [train].
_KRONECKER_VERSION = 3  # rates over the root of a shape's spread
_TRAIN_VERSIONS = {"weight_decay": 1, "prune": 1}

# Keys of [train] that change neither the weights nor when they are looked at; the data counts by its contents.
_TRAIN_COSMETIC = {"log_every", "save_every", "report_to", "data"}


@dataclass(frozen=True)
class InputHashes:
    """Hashes of what a build reads.

    `base` is the sha256 of the base's weights, `config` of its configuration, `tokenizer` of its tokenizer's files,
    the chat template among them, `data` of the training and evaluation data with their templates, `training` the same
    without evaluation sets (None: there are none); `finetuned` has
    one hash per `[[adapt]] finetuned` or `adapter`. `base_name` is what the adapter calls its base, and `manifest`
    the hash of the manifest's text, a copy of which the artefact holds. Where base, data and fine-tuned checkpoints
    lie counts for these two only: what was moved is the same. `dtype` is that of the base's weights, in torch's
    spelling.
    """

    base: str
    config: str
    tokenizer: str
    data: str
    finetuned: Mapping[str, str]
    base_name: str
    manifest: str
    dtype: str = "float32"
    training: str | None = None


def _hash(stage: str, *parts: Any) -> str:
    text = json.dumps([stage, STAGE_VERSIONS[stage], *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def needs_data(manifest: Manifest) -> bool:
    """Whether the initialisation looks at training batches."""
    return any(rule.batches for rule in manifest.adapt)


def _rule(rule: Adapt, modules: Sequence[str]) -> dict[str, Any]:
    """A rule as the key takes it. On a LLaMA-like base '*' and the list of its projections are the same rule."""
    values = rule.model_dump(mode="json")
    if rule.modules == EVERY_MODULE and all(name.rpartition(".")[2] in LLAMA_PROJECTIONS for name in modules):
        values["modules"] = list(LLAMA_PROJECTIONS)
    return values


def training_versions(method: Method, train: Train, starts: Collection[Start] = ()) -> list[Any]:
    """What a key holds besides where Kronecker factors are trained; nothing elsewhere.

    Args:
        method: what is trained.
        train: its table.
        starts: of the targets; needed where they are of several kinds.
    """
    if not method.kronecker:
        return []
    versions = dict(_TRAIN_VERSIONS)
    if len({start.stores_frozen for start in starts}) > 1:
        versions["weight_decay"] = 2  # each module is pulled to a delta of zero; all were pulled to their starts
    found = (part for item in versions.items() if getattr(train, item[0]) for part in item)
    return ["factors", _KRONECKER_VERSION, *found]


def keyed_precision(manifest: Manifest, stored: str) -> str:
    """The precision as keys hold it: 'auto' is float32 wherever the base is held in float32.

    Args:
        manifest: [base] and [train] are read.
        stored: the dtype of the base's weights, in torch's spelling.
    """
    base, said = manifest.base, manifest.train.precision
    held = stored if base.dtype == "auto" else base.dtype
    whole = METHODS[manifest.train.method].whole_model
    return "float32" if said == "auto" and (whole or held == "float32") and base.quantize == "none" else said


def keyed_recipe(manifest: Manifest, method: Method, stored: str) -> dict[str, Any]:
    """What of [train] a training run depends on; keys that the method does not read have their defaults.

    Args:
        manifest: [base] and [train] are read, but for the method's name.
        method: what is trained.
        stored: the dtype of the base's weights, in torch's spelling.
    """
    train, fields = manifest.train, type(manifest.train).model_fields
    reads = {"method_rank": method.ranked, "method_scale": method.scaled, "sigma_lr": method.kronecker}
    found = train.model_dump(mode="json", exclude=_TRAIN_COSMETIC)
    found |= {key: fields[key].default for key, read in reads.items() if not read}
    return found | {"learning_rate": train.rate, "precision": keyed_precision(manifest, stored)}


def stage_keys(
    manifest: Manifest, inputs: InputHashes, modules: Sequence[str], starts: Collection[Start] = ()
) -> dict[str, str]:
    """The key of every stage that this manifest has, in the order in which they run.

    Args:
        manifest: the manifest.
        inputs: hashes of the files that it names.
        modules: full names of the targets, in order.
        starts: theirs.
    """
    train, output = manifest.train, manifest.output
    method = METHODS[train.method]
    keys: dict[str, str] = {}
    examples = [inputs.data, inputs.tokenizer, train.max_length, train.overlong, train.completion_only]
    learned = [inputs.training or inputs.data, *examples[1:]]
    if method.kronecker:
        rules = [
            {**_rule(rule, modules), "finetuned": inputs.finetuned.get(str(rule.finetuned))}
            | ({"adapter": inputs.finetuned.get(rule.adapter)} if rule.adapter else {})
            for rule in manifest.adapt
        ]
        batches = [*learned, inputs.config, train.batch_size, manifest.base.dtype] if needs_data(manifest) else []
        on_quantised = any(rule.start.on_quantised for rule in manifest.adapt)
        held = [manifest.base.quantize, manifest.base.dtype] if on_quantised else []
        # The empty table stands where keys had the fine-tuned checkpoints: caches without any are still taken.
        keys["init"] = _hash("init", inputs.base, {}, rules, list(modules), train.seed, batches, *held)
    recipe = keyed_recipe(manifest, method, inputs.dtype)
    if not method.scaled:
        del recipe["method_scale"]
    if not method.kronecker:
        recipe["sigma_lr"] = 1.0  # the default when these keys began
    # Problems of builtin families were asked without the templates before.
    judged = train.judged
    asked = ["templates", 1] if judged and judged.asks_by_template else []
    start = keys.get("init", [inputs.base, list(modules)])
    keys["tune"] = _hash(
        "tune",
        start,
        inputs.config,
        recipe,
        learned if train.eval_every is None and not train.answered else examples,
        manifest.base.dtype,
        manifest.base.quantize,
        *training_versions(method, train, starts),
        *([manifest.eval.max_new_tokens, kept_apart(manifest), *asked] if train.answered else []),
    )
    terms = [output.adapter_terms] if output.adapter_terms != "all" else []
    keys["export"] = _hash("export", keys["tune"], output.adapter_dtype if method.kronecker else None, *terms)
    if "merged" in output.write or method.whole_model:
        keys["merge"] = _hash("merge", keys["export"], output.merged_dtype)
    made = keys["merge" if method.whole_model else "export"]  # what is loaded to be checked
    keys["check"] = _hash("check", made, manifest.eval.limit, manifest.eval.max_new_tokens, examples, *asked)
    if output.measure:
        keys["measure"] = _hash("measure", made, list(output.measure), learned)
    keys["report"] = _hash("report", *keys.values(), inputs.manifest, inputs.base_name)
    return keys
