"""Factor shapes: how an (out, in) weight splits into Left (m, n) and Right (p, q), m*p = out and n*q = in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from soka_serve.errors import PlanError

Parallel = Literal["column", "row", "none"]

_COLUMN_PARALLEL = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj"})
_ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


class FactorShape(NamedTuple):
    """The factor shape (m, n, p, q) of one weight: Left is (m, n), Right is (p, q)."""

    m: int
    n: int
    p: int
    q: int

    @property
    def out_features(self) -> int:
        """Rows of the weight, m*p."""
        return self.m * self.p

    @property
    def in_features(self) -> int:
        """Columns of the weight, n*q."""
        return self.n * self.q

    @property
    def max_rank(self) -> int:
        """The most terms a decomposition can have: the smaller side of the rearranged weight."""
        return min(self.m * self.n, self.p * self.q)

    @property
    def spread(self) -> float:
        """A quarter of the largest singular value of Left ⊗ Right with random entries of variance 1.

        A random matrix (m, n) has about sqrt(m) + sqrt(n) (Bai and Yin, 1993), a Kronecker product the product of both.

        >>> round(FactorShape(24, 24, 24, 24).spread), round(FactorShape(576, 1, 1, 576).spread)
        (24, 156)
        """
        return (math.sqrt(self.m) + math.sqrt(self.n)) * (math.sqrt(self.p) + math.sqrt(self.q)) / 4

    def parameters(self, rank: int) -> int:
        """Trainable parameters at `rank` terms, rank * (m*n + p*q + 1) (arXiv:2506.15251, section 3)."""
        return rank * (self.m * self.n + self.p * self.q + 1)


def parallel_of(module_name: str) -> Parallel:
    """How tensor parallelism cuts a module, by the last part of its name.

    >>> parallel_of("model.layers.0.self_attn.q_proj"), parallel_of("model.layers.0.mlp.down_proj"), parallel_of("lm")
    ('column', 'row', 'none')
    """
    projection = module_name.rpartition(".")[2]
    if projection in _COLUMN_PARALLEL:
        return "column"
    return "row" if projection in _ROW_PARALLEL else "none"


def candidate_shapes(
    out_features: int, in_features: int, *, tp: int = 1, parallel: Parallel = "none"
) -> tuple[FactorShape, ...]:
    """All factor shapes of an (out_features, in_features) weight, the most balanced first.

    Every divisor m of `out_features` is paired with every divisor n of `in_features`, the two degenerate shapes
    included: (1, 1, out, in) is one full matrix, and (1, in, out, 1) is a rank-1 LoRA. With tensor parallelism over
    `tp` workers, a column-parallel weight keeps the shapes with m divisible by `tp` (each worker then holds whole
    rows of Left), a row-parallel one those with n divisible by `tp`.

    The order is total, so the first element is the same everywhere: fewest parameters per term m*n + p*q; then the
    smallest longest side and the largest shortest side (factors near square: m near n near p near q, hence also m*n
    near p*q); then the larger m, then the larger n, because those are the dimensions that tensor parallelism cuts.

    Raises:
        PlanError: a dimension is below 1, or no shape can be cut over `tp` workers.
    """
    if out_features < 1 or in_features < 1 or tp < 1:
        raise PlanError(f"expected dimensions and tp of at least 1; got out={out_features}, in={in_features}, tp={tp}")
    _check_divisible(out_features, in_features, tp, parallel)
    shapes = [
        FactorShape(m, n, out_features // m, in_features // n)
        for m in _divisors(out_features)
        if parallel != "column" or m % tp == 0
        for n in _divisors(in_features)
        if parallel != "row" or n % tp == 0
    ]
    return tuple(sorted(shapes, key=_balance))


def balanced_shape(out_features: int, in_features: int, *, tp: int = 1, parallel: Parallel = "none") -> FactorShape:
    """The factor shape with the fewest parameters per term; ties as in `candidate_shapes`.

    Any dimension works. A prime one only splits as 1 x itself, so the shape degrades towards an outer product: two
    primes give a term with as many parameters as a rank-1 LoRA.

    >>> balanced_shape(4096, 4096)
    FactorShape(m=64, n=64, p=64, q=64)
    >>> balanced_shape(11008, 4096)
    FactorShape(m=128, n=64, p=86, q=64)
    >>> balanced_shape(1024, 4096, tp=8, parallel="column")
    FactorShape(m=32, n=64, p=32, q=64)
    >>> balanced_shape(7, 11)
    FactorShape(m=7, n=1, p=1, q=11)

    Raises:
        PlanError: a dimension is below 1, or no shape can be cut over `tp` workers.
    """
    return candidate_shapes(out_features, in_features, tp=tp, parallel=parallel)[0]


def check_shape(
    shape: Sequence[int], out_features: int, in_features: int, *, module: str, tp: int = 1, parallel: Parallel = "none"
) -> FactorShape:
    """The explicit factor shape [m, n, p, q] as a `FactorShape`, checked against the weight of `module`.

    Raises:
        PlanError: names the module and everything in the shape that does not fit (out, in) or `tp`.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise PlanError(f"{module}: expected a factor shape of four numbers from 1, [m, n, p, q]; got {list(shape)}")
    m, n, p, q = shape
    wrong = []
    if m * p != out_features:
        wrong.append(f"m*p = {m}*{p} = {m * p}, but the weight has {out_features} rows")
    if n * q != in_features:
        wrong.append(f"n*q = {n}*{q} = {n * q}, but the weight has {in_features} columns")
    if parallel == "column" and m % tp:
        wrong.append(f"m = {m} does not divide over tp = {tp} (the module is column-parallel)")
    if parallel == "row" and n % tp:
        wrong.append(f"n = {n} does not divide over tp = {tp} (the module is row-parallel)")
    if wrong:
        raise PlanError(f"{module}: factor shape [{m}, {n}, {p}, {q}] does not fit: {'; '.join(wrong)}", hint=_HINT)
    return FactorShape(m, n, p, q)


_HINT = "leave `shape` out for the balanced shape, or give [m, n, p, q] with m*p = rows and n*q = columns"


def _check_divisible(out_features: int, in_features: int, tp: int, parallel: Parallel) -> None:
    side, size = {"column": ("rows", out_features), "row": ("columns", in_features), "none": ("", tp)}[parallel]
    if size % tp:
        raise PlanError(
            f"no factor shape of a {out_features}x{in_features} weight can be cut over tp = {tp}: it is "
            f"{parallel}-parallel and {tp} does not divide its {size} {side}",
            hint=f"choose a tp that divides {size}, or take the module out of the rule",
        )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _balance(shape: FactorShape) -> tuple[int, ...]:
    m, n, p, q = shape
    return (m * n + p * q, max(shape), -min(shape), -m, -n)
