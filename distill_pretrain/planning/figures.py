"""A figure with what it rests on, and how a plan made of them reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Basis = Literal["exact", "measured", "pilot", "given", "estimate", "assumption"]
BASES: dict[Basis, str] = {
    "exact": "follows from the recipe and the code",
    "measured": "read off runs or caches that the recipe names",
    "pilot": "scaled up from the pilot",
    "given": "stated in the recipe",
    "estimate": "a formula with simplifications; not measured",
    "assumption": "a default that nothing here supports",
}

_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a plan.

    Attributes:
        name: what it is.
        value: in `unit`; None where it cannot be said.
        unit: "B" and "B/s" are scaled when shown, as are large counts.
        basis: see `BASES`.
        how: the formula in words.
    """

    name: str
    value: float | str | None
    unit: str = ""
    basis: Basis
    how: str

    @property
    def shown(self) -> str:
        """The value as a reader wants it."""
        return "unknown" if self.value is None else quantity(self.value, self.unit)


def quantity(value: float | str, unit: str) -> str:
    """Write a value with its unit, such as 36.5 GB, 1.2 M tokens or 12.3 GPU-hours."""
    if isinstance(value, str):
        return value
    if unit in ("B", "B/s", "tokens", "tokens/s", "parameters"):
        gap = "" if unit.startswith("B") else " "
        for scale, letter in _SCALES:
            if abs(value) >= scale:
                return f"{value / scale:.2f} {letter}{gap}{unit}"
    number = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows beside each other, such as layouts or samplers.

    Attributes:
        columns: their heads.
        rows: texts.
        how: what the columns are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    how: str

    def lines(self) -> Iterator[str]:
        """Write the table as aligned text."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        for row in (self.columns, *self.rows):
            first, *others = (cell for cell in row)
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            yield "  ".join(cells).rstrip()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A heading with figures and tables."""

    title: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class PlanReport:
    """All parts of a plan."""

    parts: list[Part] = field(default_factory=list)

    def figure(self, name: str) -> Figure:
        """Return the figure of that name."""
        return next(f for part in self.parts for f in part.figures if f.name == name)

    def text(self) -> str:
        """Write the plan as a person reads it; every line says its basis."""
        lines = [
            "Figures marked exact, measured or given are that; pilot, estimate and assumption are not measurements.",
        ]
        for part in self.parts:
            lines += ["", part.title]
            name_width = max((len(f.name) for f in part.figures), default=0)
            value_width = max((len(f.shown) for f in part.figures), default=0)
            lines += [
                f"  {f.name:<{name_width}}  {f.shown:>{value_width}}  {f.basis:<10}  {f.how}".rstrip()
                for f in part.figures
            ]
            for table in part.tables:
                lines += ["", *(f"  {line}" for line in table.lines()), f"  ({table.how})"]
            lines += [f"  {note}" for note in part.notes]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the same as JSON values, with what every basis means."""
        return {"bases": BASES, "parts": [asdict(part) for part in self.parts]}


def derived(basis: Basis) -> Basis:
    """Return the basis of what follows from a figure of this basis."""
    return "estimate" if basis in ("given", "measured") else basis
