"""What a written adapter does not hold of a delta: shares of its energy, the squared Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from soka_serve.kron import Factors, recompress, stack_terms

Energies = Mapping[str, tuple[float, float]]  # by module: the delta's energy, and what is lost of it


def lost_energy(delta: Factors, written: Factors) -> tuple[float, float]:
    """The energy of a delta, and that of its difference from what was written, both in float64.

    Orthonormal terms' energies add up: the dense delta is never built.
    """
    exact, _ = recompress(delta.to(torch.float64))
    rest, _ = recompress(stack_terms(exact, written.to(torch.float64), signs=(1, -1)))
    energy, lost = (float(terms.sigma.square().sum()) for terms in (exact, rest))
    return energy, min(lost, energy)


def shares(energies: Energies) -> tuple[float, dict[str, float]]:
    """The lost share of all modules' energy together, and that of each module."""
    total = math.fsum(energy for energy, _ in energies.values())
    whole = math.fsum(lost for _, lost in energies.values()) / total if total else 0.0
    return whole, {name: lost / energy if energy else 0.0 for name, (energy, lost) in energies.items()}


def summary_lines(
    modules: int, ranks: tuple[int, int], parameters: int, whole: float, by_module: Mapping[str, float]
) -> list[str]:
    """What a written adapter holds and what it does not, for people."""
    low, high = ranks
    rank = low if low == high else f"{low} to {high}"
    return [f"modules     {modules}, rank {rank}, {parameters:,} parameters", *loss_lines(whole, by_module)]


def loss_lines(whole: float, by_module: Mapping[str, float]) -> list[str]:
    """The loss for people: over all modules, and in the three that lose most."""
    lines = [f"lost        {percent(whole)} of the deltas' energy"]
    if whole >= 1e-9:
        worst = sorted(by_module.items(), key=lambda item: -item[1])[:3]
        lines += [f"            {percent(frac):>8}  {name}" for name, frac in worst]
    return lines


def percent(frac: float) -> str:
    """A share of lost energy as text: 0% up to rounding errors, and never 0% for more than that.

    >>> percent(3e-15), percent(2e-6), percent(0.123456)
    ('0%', '0.0002%', '12.35%')
    """
    if frac < 1e-12:
        return "0%"
    return f"{frac:.2%}" if frac >= 1e-4 else f"{frac * 100:.1g}%"
