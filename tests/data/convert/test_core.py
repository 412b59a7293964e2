import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mm.data.convert import core
from recbole_mm.data.convert.core import TEST, TRAIN, VALID, Row, select


def records(pairs):
    return lambda: (Row(u, i) if u else Row(dropped="broken") for u, i in pairs)


def naive_core(pairs, k):
    """The definition: drop repeated pairs, then users and items below k until nothing changes; indices that stay."""
    stay, seen = [], set()
    for n, pair in enumerate(pairs):
        if pair[0] and pair not in seen:
            seen.add(pair)
            stay.append(n)
    while True:
        users = [pairs[n][0] for n in stay]
        items = [pairs[n][1] for n in stay]
        fewer = [n for n in stay if users.count(pairs[n][0]) >= k and items.count(pairs[n][1]) >= k]
        if fewer == stay:
            return stay
        stay = fewer


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.sampled_from("wxyz")), max_size=40), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_the_k_core_is_the_definitions(tmp_path_factory, pairs, k):
    chosen = select(records(pairs), tmp_path_factory.mktemp("scratch"), k)
    assert list(np.flatnonzero(chosen.keep)) == naive_core(pairs, k)
    assert chosen.read == len(pairs) == chosen.keep.sum() + sum(chosen.dropped.values())


def test_counting_in_buckets_first_changes_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [(f"u{a}", f"i{b}") for a, b in zip((rng.pareto(0.8, 4000) * 20).astype(int), (rng.pareto(0.8, 4000) * 20).astype(int))]
    plain = select(records(pairs), tmp_path, 5)
    monkeypatch.setattr(core, "EXACT_ROWS", 10)
    monkeypatch.setattr(core, "CHUNK", 300)
    bucketed = select(records(pairs), tmp_path, 5)
    np.testing.assert_array_equal(plain.keep, bucketed.keep)
    assert plain.dropped.total() == bucketed.dropped.total() == 4000 - plain.keep.sum() and 0 < plain.keep.sum() < 4000


def test_bucket_filter_drops_most_of_what_cannot_stay(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = np.zeros(30_000, core.PAIR)
    pairs["user"], pairs["item"] = rng.integers(0, 2**63, (2, 30_000))  # everybody once ...
    pairs["user"][:3000], pairs["item"][:3000] = np.repeat(np.arange(100), 30), np.tile(np.arange(30), 100)  # ... but these
    monkeypatch.setattr(core, "EXACT_ROWS", 1000)
    stay = core._prefilter(pairs, 5)
    assert stay[:3000].all() and stay.sum() < 4000


@pytest.mark.parametrize("n, sizes", [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (10, (8, 1, 1)), (30, (24, 3, 3))])
def test_split_8_1_1_per_user(tmp_path, n, sizes):
    chosen = select(records([("u", f"i{k}") for k in range(n)] + [("v", f"i{k}") for k in range(20)]), tmp_path, split="8:1:1")
    mine = chosen.split[:n]
    assert tuple((mine == part).sum() for part in (TRAIN, VALID, TEST)) == sizes
    again = select(records([("u", f"i{k}") for k in range(n)] + [("v", f"i{k}") for k in range(20)]), tmp_path, split="8:1:1")
    np.testing.assert_array_equal(chosen.split, again.split)
