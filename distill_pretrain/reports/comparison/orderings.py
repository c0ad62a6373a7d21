"""Which orderings that the paper (arXiv 2503.16870) found hold in a comparison, computed from its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distill_pretrain.reports.comparison.results import CellResults, Comparison, Mean

_T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_NORMAL_QUANTILE = 2.0


def decided_at(num_seeds: int) -> float:
    """Return the standard errors from which a difference counts as resolved.

    That is Student's t, two-sided 95 %, of num_seeds - 1 degrees of freedom.
    """
    row = num_seeds - 2
    return _T_QUANTILES[row] if row < len(_T_QUANTILES) else _NORMAL_QUANTILE


_FIELD_NAMES = {"ce": "held-out CE", "ece": "ECE", "kl": "KL", "acceptance": "acceptance"}
_IN_PERCENT = ("ece", "acceptance")


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A claim that one cell's figure is below another's.

    Attributes:
        claim: in words.
        field: the figure.
        low: name of the cell that should be lower.
        high: name of the other.
        gap: high minus low, over seeds.
    """

    claim: str
    field: str
    low: str
    high: str
    gap: Mean

    @property
    def verdict(self) -> str:
        """`yes`, `no`, or `not resolved` where the difference is within its error."""
        error = self.gap.error
        if error is not None and abs(self.gap.value) < decided_at(self.gap.n) * error:
            return "not resolved"
        return "yes" if self.gap.value > 0 else "no"

    def line(self) -> str:
        """Write the claim, the verdict and the figures behind it."""
        scale, unit, digits = (100, " points", 2) if self.field in _IN_PERCENT else (1, "", 4)
        error = self.gap.error
        margin = (
            " (one seed: no error)"
            if error is None
            else f" ± {scale * error:.{digits}f} (n={self.gap.n})"
        )
        figures = (
            f"{_FIELD_NAMES[self.field]} of `{self.high}` minus `{self.low}`: "
            f"{scale * self.gap.value:+.{digits}f}{unit}{margin}"
        )
        return f"{self.claim}: **{self.verdict}**; {figures}"


def orderings(comparison: Comparison) -> list[Ordering]:
    """Judge every ordering of the paper whose two sides are in the comparison."""
    return [ordering for ordering in _all(comparison) if ordering is not None]


def _all(c: Comparison) -> Iterator[Ordering | None]:
    ce, full = c.text_only, c.full
    heads = c.family("topk", "renormalise")
    smallest = heads[0] if heads else None
    yield _order("FullKD is better than CE", full, ce)
    yield _order("the smallest Top-K is worse than CE", ce, smallest)
    for cell in c.sampled:
        yield _order(f"{cell.name} is better than CE", cell, ce)
    for head in heads:
        rival = _at_most(c.sampled, head.unique_ids)
        yield _order("a sample with at most as many unique ids is better than Top-K", rival, head)
    for cells in c.fixes().values():
        by_residual = {cell.spec.residual: cell for cell in cells}
        plain = by_residual.get("renormalise")
        for fix, words in (("label", "the label fix"), ("ghost", "the ghost token")):
            fixed = by_residual.get(fix)
            yield _order(f"{words} is better than plain Top-K", fixed, plain)
            yield _order(f"{words} is better than CE", fixed, ce)
            yield _order(f"FullKD is better than {words}", full, fixed)
            rival = _at_most(c.sampled, fixed.unique_ids) if fixed else None
            yield _order(
                f"a sample with at most as many unique ids is better than {words}", rival, fixed
            )
        yield _order(
            "spreading the missing mass uniformly is worse than CE", ce, by_residual.get("uniform")
        )
    for cell in c.sampled:
        yield _order(
            f"{cell.name} is better calibrated than the smallest Top-K", cell, smallest, "ece"
        )
    yield _order("FullKD is better calibrated than the smallest Top-K", full, smallest, "ece")
    for cell in c.sampled:
        yield _order(f"{cell.name} is accepted more often than CE", ce, cell, "acceptance")
    yield _order("FullKD is accepted more often than CE", ce, full, "acceptance")


def own_orderings(comparison: Comparison) -> list[Ordering]:
    """Judge this project's claim: at equal draws, systematic sampling leaves less noise than multinomial."""
    theirs = {cell.spec.num_draws: cell for cell in comparison.family("multinomial")}
    found = [
        _order(
            f"systematic sampling is closer to the teacher than multinomial at N = {cell.spec.num_draws}",
            cell,
            theirs.get(cell.spec.num_draws),
            "kl",
        )
        for cell in comparison.family("systematic")
    ]
    return [ordering for ordering in found if ordering is not None]


def _at_most(cells: list[CellResults], unique_ids: float | None) -> CellResults | None:
    """The cell with the most unique ids, but no more than these."""
    fitting = [c for c in cells if unique_ids is not None and (c.unique_ids or 0) <= unique_ids]
    return fitting[-1] if fitting else None


def _order(
    claim: str, low: CellResults | None, high: CellResults | None, field: str = "ce"
) -> Ordering | None:
    if low is None or high is None:
        return None
    gap = high.minus(low, field)
    if gap is None:
        return None
    return Ordering(claim=claim, field=field, low=low.name, high=high.name, gap=gap)
