"""Numbers, sizes, times and texts as plans, reports and model cards show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime

_VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)},
    127: 0x2421,
    **{code: f"[U+{code:04X}]" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


def plain(value: float) -> str:
    """A tick label: at most three significant digits, thousands separated."""
    if value != 0 and (abs(value) >= 1e7 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage with at most three significant digits: 0.0213 -> '2.13%'."""
    value = 100 * share
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}%".replace("e-0", "e-")
    return f"{value:.3g}%" if abs(value) < 1000 else f"{value:,.0f}%"


def count(number: float) -> str:
    """12345 -> '12,345'."""
    return f"{number:,.0f}"


def size(size_bytes: float) -> str:
    """Bytes in decimal units: 52416 -> '52.4 kB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 92 -> '1 min 32 s'."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(iso: str) -> str:
    """An ISO time to the minute: '2026-01-31T12:30:05+00:00' -> '2026-01-31 12:30 UTC'; other texts stay."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


def times(ratio: float) -> str:
    """A ratio for people: 0.711 -> '0.71×'."""
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def dims(shape: Iterable[int]) -> str:
    """(128, 64) -> '128×64'."""
    return "×".join(str(d) for d in shape)


def visible(text: str) -> str:
    """Characters that HTML forbids or that reorder the text around them, made visible; line ends and tabs stay.

    Control characters become their pictures (␀, ␛), the others their code points ([U+202E]).
    """
    return text.translate(_VISIBLE)


def value_text(value: object) -> str:
    """A value of the data summary or the lock."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return plain(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def words(name: str) -> str:
    """A key as people read it: 'eval_examples' -> 'eval examples'."""
    return name.replace("_", " ")


def span(values: Sequence[float], text: Callable[[float], str] = plain) -> str:
    """The range of some values: '2', or '2–8'. The unit of `text` stands once: '1.2–4%'."""
    if not values:
        return "–"
    low, high = text(min(values)), text(max(values))
    if low == high:
        return low
    return f"{low.removesuffix('%')}–{high}"


def flatten(mapping: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of every leaf of nested mappings."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value_text(value)))
    return rows


def accuracy_interval(accuracy: tuple[int, int]) -> tuple[float, float]:
    """The 95% Wilson score interval of (correct, total); total must be positive."""
    correct, total = accuracy
    z = 1.959964
    share, shrink = correct / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """The lines of a table whose columns are aligned: those in `right` at their ends, the others at their starts."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
