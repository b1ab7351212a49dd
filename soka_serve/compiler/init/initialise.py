"""Stage `init`: where the factors start, and how many terms each module gets.

Reads one weight at a time from safetensors, decomposes it, puts the terms that the rank policy can use into a scratch
folder, and lets go of the weight: what lies in memory is one decomposition, then the chosen terms.
Initialisations (`[[adapt]] init`):

- `weights`: principal Kronecker components of W. The base is never rewritten: the adapter is K(theta) - K(theta0), so
  it is zero at step 0 in every dtype. Differs from the paper, which freezes W - K(theta0): same function and gradients.
- `delta`: Kronecker components of (fine-tuned W) - W; nothing is subtracted, the adapter starts as that delta.
- `gradient`: components of the first full gradient, scaled to the weight's own terms; K(theta) - K(theta0) again.
- `zero`: left random, right zero (the KronA baseline).
- `random`: both random, of the size of the weight's own terms; K(theta) - K(theta0) again.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from soka_serve.base.checkpoint import Checkpoint, check_finite
from soka_serve.base.read_modules import weights_of
from soka_serve.compiler.init.rank import choose_rank, spread_budget
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.io.files import disk_errors
from soka_serve.io.progress import track
from soka_serve.kron import Factors, kpsvd
from soka_serve.kron.decompose import energy_of
from soka_serve.kron.shapes import FactorShape, candidate_shapes, parallel_of
from soka_serve.manifest.schema import RankBudget, RankFixed

if TYPE_CHECKING:
    from soka_serve.base.targets import Target
    from soka_serve.base.weight_map import WeightMap
    from soka_serve.kron.weighting import InputMoments

logger = logging.getLogger(__name__)

# Terms computed for a fixed rank, so that the report can show what was cut off.
FIXED_POOL = 32

INITIAL_KINDS = ("weights", "gradient", "random")


@dataclass(frozen=True)
class ModuleInit:
    """What was decided for one module.

    `sigma` is the candidate pool's spectrum, descending; `total_energy` the squared Frobenius norm of what was
    decomposed (the weight, the delta or the gradient; in the weighted norm where activations weigh it).
    """

    module: str
    layer: int | None
    out_features: int
    in_features: int
    factor_shape: FactorShape
    init: str
    policy: str
    rank: int
    sigma: tuple[float, ...]
    total_energy: float

    @property
    def parameters(self) -> int:
        """Trainable parameters: r(mn + pq + 1), arXiv:2506.15251."""
        return self.factor_shape.parameters(self.rank)

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` reads back."""
        return {**asdict(self), "factor_shape": list(self.factor_shape), "sigma": list(self.sigma)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModuleInit:
        """The reverse of `to_json`."""
        shape = FactorShape(*value["factor_shape"])
        return cls(**{**value, "factor_shape": shape, "sigma": tuple(value["sigma"])})


@dataclass(frozen=True)
class Initialisation:
    """Factors at step 0 (theta) for every adapted module; modules of rank 0 are left out of `factors`."""

    modules: tuple[ModuleInit, ...]
    factors: dict[str, Factors]
    initial_modules: frozenset[str] = field(default_factory=frozenset)
    """Modules whose theta0 is subtracted (init = weights, gradient or random)."""

    def write(self, directory: Path) -> None:
        """Write `init.safetensors` and `init.json` into an existing directory."""
        tensors: dict[str, torch.Tensor] = {}
        for name, factors in self.factors.items():
            for part in ("left", "right", "sigma"):
                tensors[f"{name}.{part}"] = getattr(factors, part).contiguous()
        save_file(tensors, directory / "init.safetensors", metadata={"format": "pt"})
        listing = {"modules": [m.to_json() for m in self.modules], "initial": sorted(self.initial_modules)}
        (directory / "init.json").write_text(json.dumps(listing))

    @classmethod
    def read(cls, directory: Path) -> Initialisation:
        """Read what `write` wrote."""
        listing = json.loads((directory / "init.json").read_text())
        modules = tuple(ModuleInit.from_json(m) for m in listing["modules"])
        factors: dict[str, Factors] = {}
        with safe_open(directory / "init.safetensors", framework="pt") as file:
            for module in modules:
                if module.rank:
                    parts = [file.get_tensor(f"{module.module}.{part}") for part in ("left", "right", "sigma")]
                    factors[module.module] = Factors(*parts)
        return cls(modules, factors, frozenset(listing["initial"]))


@dataclass(frozen=True)
class _Candidate:
    """A module's decomposition. Its terms, no more than its policy can take, lie in a file: many would fill memory."""

    target: Target
    shape: FactorShape
    sigma: tuple[float, ...]
    total_energy: float
    most: int
    """Most terms it may get: the policy's, or as many as cost the same where `auto` chose a costlier shape."""
    file: Path

    def read(self, rank: int) -> Factors:
        """The leading `rank` terms, in float32 on the CPU."""
        with safe_open(self.file, framework="pt") as file:
            # Cloned: a slice may be a view of the mapped file.
            return Factors(*(file.get_slice(part)[:rank].clone() for part in ("left", "right", "sigma")))


def pool_size(target: Target, shape: FactorShape) -> int:
    """Number of candidate terms to compute for a target, capped by its shape."""
    policy = target.rule.rank
    if not isinstance(policy, RankFixed):
        wanted = policy.pool
    elif target.rule.init != "gradient" and target.rule.batches:
        wanted = policy.rank  # every further term costs least squares on the whole moment
    else:
        wanted = max(policy.rank, FIXED_POOL)
    return min(wanted, shape.max_rank)


def _most_terms(target: Target) -> int:
    policy = target.rule.rank
    return policy.rank if isinstance(policy, RankFixed) else policy.max


def decompose(
    target: Target,
    weights: WeightMap,
    file: Path,
    *,
    finetuned: WeightMap | None = None,
    gradient: torch.Tensor | None = None,
    moments: InputMoments | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> _Candidate:
    """Kronecker-decompose one target.

    Args:
        target: the module, its rule and its factor shape (None: `shape = "auto"` is searched here).
        weights: of the base; the weight (out, in) is read and let go of.
        file: where the terms are written (safetensors: left, right, sigma, in float32).
        finetuned: of the checkpoint whose delta is decomposed; needed for `init = "delta"`.
        gradient: (out, in) mean gradient of the loss; needed for `init = "gradient"`.
        moments: second moments of the module's inputs, which weigh the decomposition.
        seed: of the randomised range finder, and of the `zero` and `random` initialisations.
        device: where the decomposition runs; None is the CPU.

    Raises:
        CheckpointError: the weight is missing, not finite, or of another shape in the fine-tuned checkpoint.
    """
    from soka_serve.kron.shape_search import search_shape
    from soka_serve.kron.weighting import OutputError, refine_terms, weighted_kpsvd

    name, rule = target.module.name, target.rule
    weight = check_finite(weights.read(name), f"{name}.weight").to(device)
    # Root mean square of all the terms of the weight, but for their number: the size that its terms typically have.
    norm = energy_of(weight) ** 0.5
    if rule.init == "delta":
        assert finetuned is not None
        other = check_finite(finetuned.read(name), f"{name}.weight").to(device)
        if other.shape != weight.shape:
            raise CheckpointError(
                f"{finetuned.source}: {name}.weight is {tuple(other.shape)}; the base's is {tuple(weight.shape)}",
                hint="`finetuned` must be a fine-tuned version of the same base.",
            )
        matrix = other.float().sub_(weight)
        del other
    elif rule.init == "gradient":
        assert gradient is not None
        matrix = gradient.to(device)
    else:
        matrix = weight
    del weight
    shape, most = target.shape, _most_terms(target)
    if shape is None:
        candidates = candidate_shapes(
            target.module.out_features, target.module.in_features, tp=rule.tp, parallel=parallel_of(name)
        )
        shape = search_shape(matrix, candidates, most, seed=seed)
        most = max(1, candidates[0].parameters(most) // shape.parameters(1))
        logger.info("%s: auto shape %s", name, tuple(shape))
    pool = pool_size(target, shape)
    problem = None if moments is None else OutputError(matrix, shape, moments)
    if problem is not None:
        decomposition = weighted_kpsvd(problem, pool, seed=seed)
    else:
        decomposition = kpsvd(matrix, shape, pool, seed=seed)
    sigma = tuple(decomposition.factors.sigma.tolist())
    factors = decomposition.factors.terms(slice(0, min(most, shape.max_rank))).to(
        dtype=torch.float32, device=torch.device("cpu")
    )
    policy = rule.rank
    if problem is not None and not isinstance(policy, RankBudget):
        # The greedy terms stand alone; with the rank known, fitting them together lowers the output error further.
        rank = min(choose_rank(sigma, decomposition.total_energy, policy), most)
        refined = refine_terms(problem, decomposition.factors.terms(slice(0, rank)))
        factors = refined.to(dtype=torch.float32, device=torch.device("cpu"))
    typical = norm / shape.max_rank**0.5
    if rule.init == "gradient":
        if not sigma or sigma[0] == 0.0:
            raise PlanError(
                f"{name}: the gradient over the calibration batches is zero",
                hint="Check that the completions are not empty (an expert may get no token), or use init = 'weights'.",
            )
        factors = Factors(factors.left, factors.right, factors.sigma * (typical / sigma[0]))
    elif rule.init in ("zero", "random"):
        generator = torch.Generator().manual_seed(seed)
        left = _random_units(factors.left.shape, generator)
        zero = torch.zeros_like(factors.right)
        right = zero if rule.init == "zero" else _random_units(factors.right.shape, generator)
        factors = Factors(left, right, torch.full_like(factors.sigma, typical))
    parts = {part: getattr(factors, part).contiguous() for part in ("left", "right", "sigma")}
    with disk_errors(file):
        save_file(parts, file, metadata={"format": "pt"})
    return _Candidate(target, shape, sigma, decomposition.total_energy, most, file)


def _random_units(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random factors (r, x, y), each of norm 1."""
    factors: torch.Tensor = torch.randn(shape, generator=generator)
    norms: torch.Tensor = factors.flatten(1).norm(dim=1)
    return factors / norms[:, None, None]


def choose_ranks(candidates: Sequence[_Candidate], budgets: Mapping[str, int] | None = None) -> dict[str, int]:
    """Rank of every module; a budget is spread over the modules with the same number in `budgets`.

    Raises:
        PlanError: a budget too small for its policy's `min`.
    """
    ranks: dict[str, int] = {}
    groups: dict[tuple[RankBudget, int], list[_Candidate]] = {}
    for candidate in candidates:
        policy = candidate.target.rule.rank
        name = candidate.target.module.name
        if isinstance(policy, RankBudget):
            groups.setdefault((policy, (budgets or {}).get(name, 0)), []).append(candidate)
        else:
            chosen = choose_rank(candidate.sigma, candidate.total_energy, policy)
            ranks[name] = min(chosen, candidate.most)
    for (policy, _), members in groups.items():
        spectra = {c.target.module.name: c.sigma[: c.most] for c in members}
        costs = {c.target.module.name: c.shape.parameters(1) for c in members}
        ranks.update(spread_budget(spectra, costs, policy))
    return ranks


def assemble(
    candidates: Sequence[_Candidate], ranks: Mapping[str, int], factors: Mapping[str, Factors]
) -> Initialisation:
    """The result, from every module's candidate, rank and, where that is not 0, factors.

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
            init=candidate.target.rule.init,
            policy=candidate.target.rule.rank.policy,
            rank=ranks[candidate.target.module.name],
            sigma=candidate.sigma,
            total_energy=candidate.total_energy,
        )
        for candidate in candidates
    ]
    kept = {m.module: factors[m.module] for m in modules if m.rank}
    return Initialisation(
        tuple(modules), kept, frozenset(m.module for m in modules if m.rank and m.init in INITIAL_KINDS)
    )


def share_of(targets: Sequence[Target], process: int, processes: int) -> list[Target]:
    """The targets that one process decomposes: largest first, dealt round, so that the shares are alike."""
    by_size = sorted(targets, key=lambda t: (-t.module.out_features * t.module.in_features, t.module.name))
    return by_size[process::processes]


def initialise(
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    *,
    finetuned: Mapping[str, Checkpoint] | None = None,
    statistics: Callable[[Sequence[Target]], Iterable[tuple[Target, torch.Tensor | None, InputMoments | None]]]
    | None = None,
    budgets: Mapping[str, int] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    exchange: Callable[[list[Any]], list[Any]] | None = None,
    process: int = 0,
    processes: int = 1,
    scratch: Path | None = None,
    progress: bool = True,
) -> Initialisation:
    """Decompose every target and choose the ranks.

    Args:
        targets: what `resolve_targets` returned.
        checkpoint: the base, read one tensor at a time.
        finetuned: by `[[adapt]] finetuned`, the opened checkpoints of `delta` rules.
        statistics: yields, for the targets whose rule needs a pass over data, each with its gradient and input
            moments (see `soka_serve.compiler.init.probe`), few at a time, so that they never lie in memory together.
        budgets: by module, the number of the budget that it shares (see `targets.budget_groups`); None: modules with
            equal budget policies share one.
        seed: every module gets its own seed from this and its position, whichever process decomposes it.
        device: where decompositions run.
        exchange: gathers picklable objects from all processes (None with a single one).
        process, processes: this process's number and how many there are.
        scratch: an empty folder of this process for the candidate terms, about 4 (mn + pq) bytes each; None: one in
            the system's temporary folder, for as long as this takes.
        progress: show a progress bar, or plain lines when the output is not a terminal.

    Raises:
        CheckpointError: a weight is missing, not finite, or of the wrong shape.
        PlanError: a budget cannot be met.

    Memory: above the base, less than 6 times the largest weight in float32, at LLaMA-2-7B's shapes and rank 8 also
    with `calibration_batches`, whose moments have in_features^2 values; eval/bench/init.py measures it.
    """
    if scratch is None:
        with tempfile.TemporaryDirectory(prefix="soka-init-") as folder:
            return initialise(
                targets, checkpoint, finetuned=finetuned, statistics=statistics, budgets=budgets, seed=seed,
                device=device, exchange=exchange, process=process, processes=processes, scratch=Path(folder),
                progress=progress,
            )  # fmt: skip
    seeds = {t.module.name: seed * 1_000_003 + i for i, t in enumerate(targets)}
    mine = share_of(targets, process, processes)
    needs_data = [t for t in mine if t.rule.batches]
    weights = weights_of(checkpoint)
    tuned = {name: weights_of(other) for name, other in (finetuned or {}).items()}
    candidates: list[_Candidate] = []
    with track(len(mine), "KPSVD", unit="module", enabled=progress and process == 0) as step:

        def add(target: Target, gradient: torch.Tensor | None = None, moments: InputMoments | None = None) -> None:
            name = target.module.name
            candidates.append(
                decompose(
                    target,
                    weights,
                    scratch / f"{len(candidates)}.safetensors",
                    finetuned=tuned.get(target.rule.finetuned or ""),
                    gradient=gradient,
                    moments=moments,
                    seed=seeds[name],
                    device=device,
                )
            )
            step(name)

        for target in mine:
            if target not in needs_data:
                add(target)
        if needs_data:
            assert statistics is not None
            for target, gradient, moments in statistics(needs_data):
                add(target, gradient, moments)
                del gradient, moments  # else they would lie beside the next ones
    order = {t.module.name: i for i, t in enumerate(targets)}
    everybodys = exchange(candidates) if exchange is not None else candidates
    everybodys = sorted(everybodys, key=lambda c: order[c.target.module.name])
    ranks = choose_ranks(everybodys, budgets)
    terms = [(c.target.module.name, c.read(ranks[c.target.module.name])) for c in candidates]
    terms = [(name, factors) for name, factors in terms if factors.rank]
    return assemble(everybodys, ranks, dict(exchange(terms) if exchange is not None else terms))
