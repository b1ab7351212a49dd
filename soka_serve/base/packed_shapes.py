"""What the headers of a quantised checkpoint still tell of a weight's shape."""

from __future__ import annotations

from collections.abc import Mapping

from soka_serve.base.quantisation import Quantisation
from soka_serve.io.safetensors import TensorInfo, bits_of
from soka_serve.kron.shapes import FactorShape

# Dtypes of a quantised weight that has an element of its own for each value.
_WHOLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "I8"})


def check_packed(
    factors: Mapping[str, FactorShape], tensors: Mapping[str, TensorInfo], quantisation: Quantisation
) -> list[str]:
    """What is wrong with adapting these modules of a quantised base, a line each.

    A packed weight gives away its number of values where the config names the bits, and often one dimension; the rest
    is for the engine to check.

    Args:
        factors: by module, the factor shape of the delta.
        tensors: the base's headers.
        quantisation: what its config says.
    """
    modules = {name[:end] for name in tensors for end in range(len(name)) if name[end] == "."}
    problems = []
    for module, shape in factors.items():
        if module not in modules:
            problems.append(f"{module}: the base has no such module")
        elif (other := _misfit(module, shape, tensors, quantisation)) is not None:
            size = (shape.out_features, shape.in_features)
            problems.append(f"{module}: the adapter's factors {list(shape)} make a {size} delta, {other}")
    return problems


def _misfit(
    module: str, shape: FactorShape, tensors: Mapping[str, TensorInfo], quantisation: Quantisation
) -> str | None:
    """What the base has instead of a weight of that shape; None where it has one, or hides it."""
    weight = tensors.get(f"{module}.weight")
    if weight is not None and weight.dtype in _WHOLE:
        fits = weight.shape == (shape.out_features, shape.in_features)
        return None if fits else f"the base's weight is {weight.shape}"
    packed = next((t for n in ("qweight", "weight_packed") if (t := tensors.get(f"{module}.{n}"))), weight)
    if packed is None or len(packed.shape) != 2:
        return None
    rows, columns = packed.shape
    other = f"the base's weight is packed as {packed.name.rpartition('.')[2]} of shape {packed.shape}"
    # The dimension that is not packed.
    kept = {
        "gptq": (columns, shape.out_features),
        "awq": (rows, shape.in_features),
        "compressed-tensors": (rows, shape.out_features),
    }.get(quantisation.method)
    if kept is not None and packed is not weight and kept[0] != kept[1]:
        return other
    if quantisation.bits is None:
        return None
    stored, needed = packed.numel * bits_of(packed.dtype), shape.out_features * shape.in_features * quantisation.bits
    # Each row, or the whole where it is one column, is filled up to the elements it is packed into.
    spare = bits_of(packed.dtype) * (max(rows, columns) if columns > 1 else 1)
    return None if needed <= stored < needed + spare else other
