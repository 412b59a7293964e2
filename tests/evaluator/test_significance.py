"""Significance against scipy and statsmodels' published procedure, on known cases."""

import numpy as np
import pytest
from scipy import stats

from recbole_mm.errors import UserError
from recbole_mm.evaluator.significance import compare, holm, mean_over_runs, read_values


@pytest.mark.parametrize("seed", range(5))
def test_holm_agrees_with_statsmodels(seed):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(seed).random(12) ** 3
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, float("nan"), 0.6])[::2] == pytest.approx([1.0, 1.0]) and np.isnan(holm([0.9, float("nan")])[1])


def named(*rows, users=None, targets="x"):
    users = np.array([f"u{i}" for i in range(len(rows[0]))]) if users is None else users
    return [(users, np.asarray(row, float), targets) for row in rows]


def test_paired_t_test_agrees_with_scipy():
    draw = np.random.default_rng(0)
    a, b, c = draw.random(50), draw.random(50), draw.random(50)
    values = dict(zip("abc", named(a, b, c)))
    result = compare(values, [("a", "b"), ("a", "c")])
    expected = [stats.ttest_rel(a, b), stats.ttest_rel(a, c)]
    assert [r.p for r in result] == pytest.approx([e.pvalue for e in expected])
    assert [r.t for r in result] == pytest.approx([e.statistic for e in expected])
    assert [r.p_holm for r in result] == pytest.approx(holm([e.pvalue for e in expected]))
    assert result[0].effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1)) and result[0].users == 50


def test_equal_values_are_not_significant():
    (result,) = compare(dict(zip("ab", named([1, 0, 1], [1, 0, 1]))), [("a", "b")])
    assert result.p == 1.0 and result.difference == 0.0


def test_users_without_a_value_are_left_out_of_both():
    (result,) = compare(dict(zip("ab", named([1, np.nan, 0, 1], [0, 5, np.nan, 0.5]))), [("a", "b")])
    assert result.users == 2 and result.difference == pytest.approx(0.75)


def test_other_users_or_targets_are_refused():
    a, b = named([1, 2, 3], [1, 2, 4])
    with pytest.raises(UserError, match="cannot be compared user by user"):
        compare({"a": a, "b": (b[0], b[1], "other")}, [("a", "b")])
    with pytest.raises(UserError, match="3 and 2 users"):
        compare({"a": a, "b": (b[0][:2], b[1][:2], "x")}, [("a", "b")])


def test_files_of_several_seeds(tmp_path):
    for seed, order in ((1, [0, 1, 2]), (2, [2, 0, 1])):
        users, values = np.array(["a", "b", "c"])[order], np.array([1.0, 2.0, 3.0])[order] * seed
        np.savez(tmp_path / f"{seed}.npz", users=users, targets_hash=np.array("h"), **{"recall@5": values})
    users, values, targets = mean_over_runs([tmp_path / "1.npz", tmp_path / "2.npz"], "recall@5")
    assert users.tolist() == ["a", "b", "c"] and values.tolist() == [1.5, 3.0, 4.5] and targets == "h"
    with pytest.raises(UserError, match="no metric 'recall@7'. It has recall@5"):
        read_values(tmp_path / "1.npz", "recall@7")
    with pytest.raises(UserError, match="does not exist"):
        read_values(tmp_path / "3.npz", "recall@5")
