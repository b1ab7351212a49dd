"""Stage `init`: where the factors start, and how many terms each module gets.

Reads one weight at a time from safetensors, decomposes it, puts the terms that the rank policy can use into a scratch
folder, and lets go of the weight: what lies in memory is one decomposition, then the chosen terms. What is decomposed
and what becomes of its terms is up to the rule's start (`soka_serve.starts`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.compiler.init.candidate import Candidate, TargetStatistics, decompose, read_matrix
from soka_serve.compiler.init.rank import choose_rank, spread_budget
from soka_serve.compiler.init.result import Initialisation, ModuleInit
from soka_serve.compiler.processes import Processes
from soka_serve.errors import PlanError
from soka_serve.io.progress import track
from soka_serve.kron import Factors
from soka_serve.manifest.rules import RankBudget, RankFixed, RankPolicy
from soka_serve.starts import ROWS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from soka_serve.base.base import Base
    from soka_serve.base.target_modules import TargetModule

logger = logging.getLogger(__name__)


def choose_ranks(candidates: Sequence[Candidate], budgets: Mapping[str, int]) -> dict[str, int]:
    """Rank of every module; a budget is spread over the modules with the same number in `budgets`.

    Raises:
        PlanError: a budget too small for its policy's `min`.
    """
    ranks: dict[str, int] = {}
    groups: dict[tuple[RankBudget, int], list[Candidate]] = {}
    for candidate in candidates:
        policy = candidate.target.rule.rank
        name = candidate.target.module.name
        if isinstance(policy, RankBudget):
            groups.setdefault((policy, budgets.get(name, 0)), []).append(candidate)
        else:
            if isinstance(policy, RankFixed) and not candidate.sigma:  # nothing was decomposed
                chosen = policy.rank
            else:
                chosen = choose_rank(candidate.sigma, candidate.total_energy, policy)
            ranks[name] = min(chosen, candidate.most)
    for (policy, _), members in groups.items():
        spectra = {c.target.module.name: c.sigma[: c.most] for c in members}
        costs = {c.target.module.name: c.target.rule.form.parameters(1, c.shape) for c in members}
        ranks.update(spread_budget(spectra, costs, policy))
    return ranks


def warn_of_maxima(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> None:
    """Warn of rank policies that gave each of several modules the most terms they may: they selected nothing."""
    members: dict[RankPolicy, list[Candidate]] = {}
    for candidate in candidates:
        members.setdefault(candidate.target.rule.rank, []).append(candidate)
    for policy, group in members.items():
        if isinstance(policy, RankFixed) or len(group) < 2 or policy.min == policy.max:
            continue
        if all(ranks[c.target.module.name] == min(c.most, c.shape.max_rank) for c in group):
            logger.warning(
                "rank policy %r gave each of its %d modules the most terms that it may, %d: it selected nothing; "
                "lower its threshold or budget, or say rank = { policy = 'fixed', rank = %d }",
                policy.policy,
                len(group),
                policy.max,
                policy.max,
            )


def assemble(
    candidates: Sequence[Candidate],
    ranks: Mapping[str, int],
    factors: Mapping[str, Factors],
    cut: Mapping[str, Factors] | None = None,
) -> Initialisation:
    """The result, from every module's candidate, rank and, where that is not 0, factors and what they cut.

    Raises:
        PlanError: every module came out with rank 0.
    """
    if not factors:
        raise PlanError("every module has rank 0", hint="Raise the budget's `parameters` or its `min`.")
    modules = [
        ModuleInit(
            module=candidate.target.module.name,
            layer=candidate.target.module.layer,
            out_features=candidate.target.module.out_features,
            in_features=candidate.target.module.in_features,
            factor_shape=candidate.shape,
            init=candidate.target.rule.start.name,
            policy=candidate.target.rule.rank.policy,
            rank=ranks[candidate.target.module.name],
            sigma=candidate.sigma,
            total_energy=candidate.total_energy,
            trained=candidate.target.rule.form.choices,
        )
        for candidate in candidates
    ]
    kept = {m.module: factors[m.module] for m in modules if m.rank}
    subtracted = frozenset(m.module for m in modules if m.rank and ROWS[m.init].subtracted)
    return Initialisation(tuple(modules), kept, subtracted, dict(cut or {}))


def _with_rank(candidate: Candidate, rank: int) -> TargetModule:
    """The candidate's target, asking for this number of terms of the shape that was found."""
    rule = candidate.target.rule.model_copy(update={"rank": RankFixed(rank=rank)})
    return replace(candidate.target, rule=rule, shape=candidate.shape)


def share_of(targets: Sequence[TargetModule], process: int, processes: int) -> list[TargetModule]:
    """The targets that one process decomposes: largest first, dealt round, so that the shares are alike."""
    by_size = sorted(targets, key=lambda t: (-t.module.out_features * t.module.in_features, t.module.name))
    return by_size[process::processes]


@dataclass(frozen=True)
class InitRun:
    """One initialisation: which modules are decomposed, from what, and where.

    Args:
        targets: what `resolve_targets` returned.
        base: read one tensor at a time.
        scratch: an empty folder of this process for the candidate terms, about 4 (mn + pq) bytes each.
        finetuned: by `[[adapt]] finetuned`, the checkpoints that rules start from.
        adapters: by `[[adapt]] adapter`, the terms that rules start from, by module.
        statistics: yields, for the targets whose rule needs a pass over data, each with its gradient and input
            moments (see `soka_serve.compiler.init.probe`), few at a time, so that they never lie in memory together.
        budgets: by module, the number of the budget that it shares (see `budget_groups`); without it, modules
            with equal budget policies share one.
        held: makes of a weight what the quantised base computes with (`held_weight`), for starts `on_quantised`.
        seed: every module gets its own seed from this and its position, whichever process decomposes it.
        device: where decompositions run.
        processes: share the modules among them; default: this one alone.
        progress: show a progress bar, or plain lines when the output is not a terminal.
    """

    targets: Sequence[TargetModule]
    base: Base
    scratch: Path
    finetuned: Mapping[str, Base] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    statistics: Callable[[Sequence[TargetModule]], Iterable[TargetStatistics]] | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    held: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    device: torch.device | None = None
    processes: Processes = field(default_factory=lambda: Processes(1))
    progress: bool = True

    def initialise(self) -> Initialisation:
        """Decompose every target and choose the ranks.

        Raises:
            CheckpointError: a weight is missing, not finite, or of the wrong shape.
            PlanError: a budget cannot be met.

        Memory: above the base, less than 6 times the largest weight in float32, at LLaMA-2-7B's shapes and rank 8 also
        with `calibration_batches`, whose moments have in_features^2 values; eval/bench/init.py measures it.
        """
        mine = list(self._decompose(share_of(self.targets, self.processes.index, self.processes.count)))
        order = {t.module.name: i for i, t in enumerate(self.targets)}
        everybodys = sorted(self.processes.gather(mine), key=lambda c: order[c.target.module.name])
        ranks = choose_ranks(everybodys, self.budgets)
        if self.processes.is_main:
            warn_of_maxima(everybodys, ranks)
        # A budget decides the ranks when all modules are known: its terms are then fitted together in a second pass.
        settled = [_with_rank(c, rank) for c in mine if c.is_greedy and (rank := ranks[c.target.module.name])]
        again = {c.target.module.name: c for c in self._decompose(settled)}
        last = [again.get(c.target.module.name, c) for c in mine]
        terms = [(c.target.module.name, c.read(ranks[c.target.module.name])) for c in last]
        terms = [(name, factors) for name, factors in terms if factors.rank]
        cut = [(c.target.module.name, found) for c in last if (found := c.cut(ranks[c.target.module.name])) is not None]
        return assemble(everybodys, ranks, dict(self.processes.gather(terms)), dict(self.processes.gather(cut)))

    def _decompose(self, mine: Sequence[TargetModule]) -> Iterator[Candidate]:
        """Decompose targets of this process, each into a file of its own in the scratch folder."""
        order = {t.module.name: i for i, t in enumerate(self.targets)}
        enabled = self.progress and self.processes.is_main and bool(mine)
        with track(len(mine), "KPSVD", unit="module", enabled=enabled) as step:
            for known in self._with_statistics(mine):
                name, source = known.target.module.name, known.target.rule.source or ""
                tuned = self.finetuned.get(source)
                matrix = read_matrix(
                    known.target,
                    self.base.weights,
                    finetuned=None if tuned is None else tuned.weights,
                    gradient=known.gradient,
                    held=self.held,
                    device=self.device,
                )
                file = self.scratch / f"{order[name]}.safetensors"
                matrix = replace(matrix, terms=self.adapters.get(source, {}).get(name))
                yield decompose(known, matrix, file, seed=self.seed * 1_000_003 + order[name])
                step(name)
                del matrix, known  # else they would lie beside the next ones

    def _with_statistics(self, targets: Sequence[TargetModule]) -> Iterator[TargetStatistics]:
        """The targets with what their rules need: first those that need no data."""
        yield from (TargetStatistics(target) for target in targets if not target.rule.batches)
        if needing := [target for target in targets if target.rule.batches]:
            assert self.statistics is not None
            yield from self.statistics(needing)
