"""Contradictions between the tables of a manifest: each with the key that it blames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from soka_serve.manifest.rules import Adapt, default_conflicts
from soka_serve.manifest.table import Key, TableKeys, value_of
from soka_serve.regularisers import REGULARISERS
from soka_serve.starts import STARTS, Start
from soka_serve.trained import PARTS, TRAINED


def conflicts_across(keys: TableKeys) -> Iterator[tuple[Key, str]]:
    """Yield (key, message) for each."""
    if keys.knows("base", "train") and value_of(keys.values["train"], "method") == "full":
        bits = value_of(keys.values["base"], "quantize")
        if bits not in (None, "none"):
            yield ("base", "quantize"), f"a base in {bits} cannot be trained whole: method = 'full' needs 'none'"
    if keys.knows("output", "train") and value_of(keys.values["output"], "adapter_terms") not in (None, "all"):
        method = value_of(keys.values["train"], "method")
        if method not in (None, "soka"):
            yield ("output", "adapter_terms"), f"adapter_terms belongs to method = 'soka'; the method is {method!r}"
    if keys.knows("adapt", "train"):
        if value_of(keys.values["train"], "method") in (None, "soka"):
            for i, key, message in default_conflicts(_made(keys.values["adapt"])):
                yield ("adapt", i, key), message
        yield from _trained_conflicts(keys.values["adapt"], keys.values["train"])
        yield from _start_conflicts(keys.values["adapt"], value_of(keys.values["train"], "regularise"))
    if keys.knows("adapt", "base") and value_of(keys.values["base"], "quantize") in (None, "none"):
        for i, rule in enumerate(keys.values["adapt"]):
            if (start := STARTS[value_of(rule, "init") or Adapt().init]).on_quantised:
                message = "needs base.quantize = '4bit' or '8bit': it starts from what that loses of the weights"
                yield ("adapt", i, "init"), f"{start.written} {message}"
    if keys.knows("adapt"):
        rules = list(enumerate(keys.values["adapt"]))
        for start in STARTS.values():
            if start.source is None:
                continue
            users = [i for i, rule in rules if value_of(rule, "init") == start.name]
            sources = [i for i, rule in rules if value_of(rule, start.source) is not None]
            for i in users if not sources else ():
                yield ("adapt", i, "init"), f"init = {start.name!r} needs {start.source}, {start.source_is}"
            for i in sources if not users else ():
                yield (
                    ("adapt", i, start.source),
                    f"{start.source} belongs to init = {start.name!r}, which no rule sets",
                )


def _made(rules: Sequence[object]) -> list[Adapt]:
    return [rule if isinstance(rule, Adapt) else Adapt.model_validate(rule) for rule in rules]


def _trained_conflicts(rules: Sequence[object], train: object) -> Iterator[tuple[Key, str]]:
    """Keys of rules about what is trained that [train] makes meaningless, and the other way round."""
    made = _made(rules)
    said = [(i, key) for i, rule in enumerate(made) for key in rule.form.choices if key in rule.model_fields_set]
    method = value_of(train, "method")
    for i, key in said if method not in (None, "soka") else ():
        yield ("adapt", i, key), f"{key} belongs to method = 'soka'; the method is {method!r}"
    for i, key in said if value_of(train, "prune") else ():
        if TRAINED[key].tensors:
            yield ("train", "prune"), f"prune does not go with {key} of adapt[{i}], which belongs to all terms together"
    for part in PARTS:
        if value_of(train, f"{part}_lr") not in (None, 1.0) and all(part not in rule.form.rates for rule in made):
            yield ("train", f"{part}_lr"), f"{part}_lr would be ignored: no rule trains {part}"
    regularise = value_of(train, "regularise")
    needing = any(row.needs_sigma and value_of(regularise, name) for name, row in REGULARISERS.items())
    for i, rule in enumerate(made) if value_of(train, "sigma_lr") is None and method in (None, "soka") else ():
        if (
            "train_factors" in rule.model_fields_set
            and set(rule.train_factors) == set(PARTS)
            and not (rule.start.changes or rule.start.frozen or needing)
        ):
            message = (
                "train_factors names sigma, which is trained beside left and right where sigma_lr in [train] says so"
            )
            yield ("adapt", i, "train_factors"), f"{message}: set sigma_lr = 1, or leave sigma out"
    still = {part for part in PARTS if value_of(train, f"{part}_lr") == 0}
    idle = still == set(PARTS) and method in (None, "soka") and value_of(train, "steps") != 0
    if idle and not all(rule.form.choices for rule in made):  # of those that choose, the rule is named below
        yield ("train", "left_lr"), "nothing would be trained: left_lr, right_lr and sigma_lr are all 0"
    only = _only_start(made)
    for i, rule in enumerate(made) if method in (None, "soka") else ():
        # A rule without an init of its own has that of a rule before it.
        said_here = "init" in rule.model_fields_set or all("init" not in other.model_fields_set for other in made)
        zeros = [(rule.start.needs_trained, rule.start.written)] if said_here and rule.start == only else []
        zeros += [(TRAINED[key].needs_trained, key) for key in rule.form.choices]
        for zero, whose in zeros:
            yield from _stays_zero(zero, f"{whose} of adapt[{i}]", train)
        if rule.form.choices and rule.form.rates <= still:
            place = ("train", f"{min(rule.form.rates)}_lr")
            yield place, f"nothing of adapt[{i}] would be trained: its rates are all 0"


def _only_start(rules: Sequence[Adapt]) -> Start | None:
    """The start of all modules; None where rules say several: which module has which, the plan sees."""
    starts = {rule.start for rule in rules if rule.enabled and "init" in rule.model_fields_set} or {Adapt().start}
    return starts.pop() if len(starts) == 1 else None


def _stays_zero(part: str, whose: str, train: object) -> Iterator[tuple[Key, str]]:
    if part and value_of(train, f"{part}_lr") == 0:
        starts = f"does not go with {whose}, which starts {part} at zero: nothing would ever change"
        yield ("train", f"{part}_lr"), f"{part}_lr = 0 {starts}; raise it, or choose another start"


def _unregularised(start: Start, whose: str, table: object) -> Iterator[tuple[Key, str]]:
    for row in REGULARISERS.values():
        if value_of(table, row.name):
            place, message = ("train", "regularise", row.name), f"{row.name} does not go with {whose}"
            if row.unit_factors and start.starts_at_zero:
                message += ", one of whose factors starts at zero: it holds factors at the size of their start"
                yield place, message
            elif row.own_delta and start.subtracted:
                yield place, f"{message}, whose terms are subtracted again: the delta is not the sum of the factors"


def training_misfits(rule: Adapt, train: object) -> Iterator[tuple[Key, str]]:
    """What [train] says that does not go with the start of a module.

    Args:
        rule: what holds for the module.
        train: the table, checked or not.

    Yields:
        (key, message) for each.
    """
    whose = rule.start.written if "init" in rule.model_fields_set else f"{rule.start.written}, the default"
    yield from _stays_zero(rule.start.needs_trained, whose, train)
    yield from _unregularised(rule.start, whose, value_of(train, "regularise"))
    if rule.start.cuts and value_of(train, "prune"):
        yield ("train", "prune"), f"prune does not go with {whose}: a dropped term would bring a cut one back"


def _start_conflicts(rules: Sequence[object], table: object) -> Iterator[tuple[Key, str]]:
    """Regularisers that need another start than a rule has, or all of the factors trained and nothing beside them."""
    made = _made(rules)
    forms = {key for rule in made for key in rule.form.choices}
    if (start := _only_start(made)) is not None:
        yield from _unregularised(start, start.written, table)
    for row in REGULARISERS.values():
        for key in sorted(forms) if row.kronecker and value_of(table, row.name) else ():
            what = f"{key} in [[adapt]]: it acts on terms that are trained whole, with nothing beside them"
            yield ("train", "regularise", row.name), f"{row.name} does not go with {what}"
