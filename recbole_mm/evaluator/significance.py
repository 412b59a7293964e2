"""Paired tests over users, corrected for many comparisons, with effect sizes.

Source: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979; J. Cohen, "Statistical
Power Analysis for the Behavioral Sciences", 1988 (:math:`d_z`, the mean of the differences over their standard deviation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from recbole_mm.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """One paired test: `difference` is the mean of first minus second over `users` users; `p_holm` is corrected, `effect` is d_z."""

    first: str
    second: str
    difference: float
    t: float
    p: float
    p_holm: float
    effect: float
    users: int


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-Bonferroni adjusted p-values, in the order given; NaN stays NaN and does not count."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()


def read_values(path: str | Path, metric: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Users, values and targets hash of one metric in a run's per_user.npz, sorted by user.

    Raises:
        UserError: when the file or the metric is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run wrote no per-user values, so it cannot be tested for significance.")
    with np.load(path, allow_pickle=False) as arrays:
        if metric not in arrays.files:
            known = ", ".join(name for name in arrays.files if name not in ("users", "targets_hash"))
            raise UserError(f"{path} has no metric {metric!r}. It has {known}.")
        users, values, targets = arrays["users"], arrays[metric], str(arrays["targets_hash"])
    order = np.argsort(users, kind="stable")
    return users[order], values[order].astype(float), targets


def mean_over_runs(paths: Sequence[str | Path], metric: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Users and their values averaged over runs (seeds) of one model.

    Raises:
        UserError: when users or targets of the runs differ.
    """
    users, total, targets = read_values(paths[0], metric)
    for path in paths[1:]:
        other_users, values, other_targets = read_values(path, metric)
        _same(users, targets, other_users, other_targets, str(paths[0]), str(path))
        total = total + values
    return users, total / len(paths), targets


def _same(users, targets, other_users, other_targets, first: str, second: str) -> None:
    if targets != other_targets or not np.array_equal(users, other_users):
        raise UserError(
            f"{first} and {second} cannot be compared user by user: they were tested on other users or other target items "
            f"({len(users)} and {len(other_users)} users). Use the same split, filters and protocol for both."
        )


def compare(values: Mapping[str, tuple[np.ndarray, np.ndarray, str]], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Paired t-tests between named models, Holm-corrected over all pairs.

    Args:
        values: name -> what :func:`mean_over_runs` gives.
        pairs: which names to compare.

    Raises:
        UserError: when two models were tested on other users or targets.
    """
    raw = []
    for first, second in pairs:
        users, a, targets = values[first]
        other_users, b, other_targets = values[second]
        _same(users, targets, other_users, other_targets, first, second)
        known = ~(np.isnan(a) | np.isnan(b))
        difference = a[known] - b[known]
        spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
        if spread == 0:  # equal on every user, or shifted by a constant: no test says more than the difference itself
            t, p, effect = 0.0, 1.0 if not difference.any() else 0.0, 0.0
        else:
            t, p = stats.ttest_rel(a[known], b[known])
            effect = difference.mean() / spread
        raw.append(
            (first, second, float(difference.mean()) if len(difference) else 0.0, float(t), float(p), float(effect), len(difference))
        )
    adjusted = holm([row[4] for row in raw])
    return [Comparison(a, b, d, t, p, corrected, effect, n) for (a, b, d, t, p, effect, n), corrected in zip(raw, adjusted)]
