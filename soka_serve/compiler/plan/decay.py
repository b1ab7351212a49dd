"""Weight decay that would step past the values that it pulls factors to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from soka_serve.base.target_modules import TargetModule
from soka_serve.compiler.methods import METHODS
from soka_serve.errors import PlanError
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.problems import dotted
from soka_serve.manifest.rules import SMALL, RankFixed
from soka_serve.manifest.schema import Manifest


def check_decay(
    manifest: Manifest, targets: Sequence[TargetModule], name_key: Callable[[TomlPath], str] = dotted
) -> None:
    """Refuse a weight decay that takes a factor past its initial value, or past zero, at the peak rate.

    A factor goes the share `weight_decay` times its rate of the way at a step (`soka_serve.peft.optimizer`); with more
    than all of it deltas swing from side to side, and with twice as much they grow without end.

    Args:
        manifest: [train] is read.
        targets: what the rules adapt.
        name_key: what messages call a key of the manifest.

    Raises:
        PlanError: names the key, the share, and the largest value that does not.
    """
    train = manifest.train
    if not train.weight_decay or not targets or not METHODS[train.method].kronecker:
        return
    rates = {target.module.name: _rate(manifest, target, len(targets)) for target in targets}
    module = max(rates, key=rates.__getitem__)
    share = rates[module] * train.weight_decay
    if share > 1:
        raise PlanError(
            f"{name_key(('train', 'weight_decay'))} = {train.weight_decay:g} goes {share:.3g} times the way back to "
            f"the start at each step of {module}, and so past it, at learning_rate = {train.rate:g}",
            hint=f"at most {train.weight_decay / share:.2g} here; 0.01 is a usual value",
        )


def _rate(manifest: Manifest, target: TargetModule, modules: int) -> float:
    """The largest peak rate of Left or Right, whose entries have a root mean square of 1 at the start."""
    train, rule = manifest.train, target.rule
    shape = target.shape or balanced_shape(target.module.out_features, target.module.in_features)
    most = rule.rank.rank if isinstance(rule.rank, RankFixed) else rule.rank.max
    terms = rule.form.served(min(most, shape.max_rank), subtracted=False)
    # Terms that mend a quantised base move by their size, at most as fast as small ones.
    pace = math.sqrt(SMALL) if rule.start.changes and not rule.start.on_quantised else 1.0
    moving = [rate for part, rate in (("left", train.left_lr), ("right", train.right_lr)) if part in rule.form.rates]
    return train.rate * pace * max(moving, default=0.0) / math.sqrt(shape.spread * terms * math.sqrt(modules))
