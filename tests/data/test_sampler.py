"""Negative sampling: the right items with the right frequencies, at every border."""

import numpy as np
import pytest
import torch
from recbole.data import create_dataset
from recbole.sampler import RepeatableSampler, Sampler
from recbole.utils import init_seed

from recbole_mm.data.sampler import NegativeSampler, build_sampler, pair_keys, phase_pairs
from recbole_mm.errors import UserError
from tests.data.small import small_config, write_small

ITEMS = 12  # padding and 11 items


def used_keys(used: dict[int, list[int]]) -> torch.Tensor:
    pairs = [(user, item) for user, items in used.items() for item in items]
    users, items = torch.tensor(pairs).T if pairs else torch.zeros(2, 0, dtype=torch.int64)
    return pair_keys(users, items, ITEMS)


def frequencies(sampler, user: int, draws: int = 40000, positive: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = sampler.sample(torch.full((draws,), user), torch.full((draws,), positive), 1, generator)
    return torch.bincount(drawn, minlength=ITEMS) / draws


HISTORIES = {1: [], 2: [1], 3: [11], 4: [1, 2, 3], 5: [9, 10, 11], 6: [2, 4, 6, 8, 10], 7: [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]}


@pytest.mark.parametrize("user", HISTORIES)
def test_uniform_draws_every_free_item_equally_often_and_no_other(user):
    sampler = NegativeSampler(8, ITEMS, used_keys(HISTORIES))
    free = torch.ones(ITEMS)
    free[[0, *HISTORIES[user]]] = 0
    torch.testing.assert_close(frequencies(sampler, user), free / free.sum(), atol=0.012, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("user", HISTORIES)
def test_popularity_draws_free_items_by_their_weight(user, alpha):
    counts = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 10, 11])
    histories = {**HISTORIES, 7: [1, 2, 3, 4, 5, 8, 9, 10, 11]}  # 6 and 7 are left; user 7 goes through the exact draw
    sampler = NegativeSampler(8, ITEMS, used_keys(histories), "popularity", alpha, counts)
    weight = torch.where(counts > 0, counts.double() ** alpha, 0.0)
    weight[[0, *histories[user]]] = 0
    torch.testing.assert_close(frequencies(sampler, user), (weight / weight.sum()).float(), atol=0.012, rtol=0)


def test_the_exact_draw_finds_the_one_item_left_however_rare():
    counts = torch.tensor([0, *[10**9] * 10, 1])
    sampler = NegativeSampler(2, ITEMS, used_keys({1: list(range(1, 11))}), "popularity", 1.0, counts)
    assert sampler.sample(torch.ones(500, dtype=torch.int64), torch.ones(500, dtype=torch.int64)).eq(11).all()


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_come_as_blocks_and_row_b_of_each_belongs_to_row_b(distribution):
    counts = torch.ones(ITEMS, dtype=torch.int64)
    sampler = NegativeSampler(3, ITEMS, used_keys({1: [1, 2, 3, 4, 5], 2: [6, 7, 8, 9, 10, 11]}), distribution, 1.0, counts)
    users = torch.tensor([1, 2, 1, 2, 2])
    drawn = sampler.sample(users, users, 200).view(200, 5)
    assert drawn[:, users == 1].unique().tolist() == [6, 7, 8, 9, 10, 11]
    assert drawn[:, users == 2].unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.parametrize("positive", [1, 5, 11])
def test_repeatable_forbids_only_the_positive_of_the_row(distribution, positive):
    counts = torch.tensor([0, *[2] * 11])
    sampler = NegativeSampler(3, ITEMS, None, distribution, 1.0, counts)
    expected = torch.full((ITEMS,), 0.1)
    expected[[0, positive]] = 0
    torch.testing.assert_close(frequencies(sampler, 1, positive=positive), expected, atol=0.012, rtol=0)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_a_user_with_nothing_left_is_named(distribution):
    counts = torch.tensor([0, *[2] * 10, 0])
    used = used_keys({1: [1], 2: list(range(1, 12))})
    with pytest.raises(UserError, match="interacted with all items.*first: u-2.*user_inter_num_interval"):
        NegativeSampler(3, ITEMS, used, distribution, 1.0, counts, tokens=lambda u: f"u-{u}")


def test_popularity_counts_an_item_nobody_has_as_nothing_left():
    counts = torch.tensor([0, *[2] * 10, 0])
    NegativeSampler(2, ITEMS, used_keys({1: list(range(1, 11))}))  # item 11 is free for uniform
    with pytest.raises(UserError, match="interacted with all items"):
        NegativeSampler(2, ITEMS, used_keys({1: list(range(1, 11))}), "popularity", 1.0, counts)


def test_an_unknown_distribution_is_refused():
    with pytest.raises(UserError, match="uniform, popularity.*'gaussian'"):
        NegativeSampler(3, ITEMS, used_keys({}), "gaussian")


def test_no_history_at_all():
    sampler = NegativeSampler(3, ITEMS, used_keys({}), "popularity", 1.0, torch.ones(ITEMS, dtype=torch.int64))
    assert set(sampler.sample(torch.ones(500, dtype=torch.int64), None).tolist()) == set(range(1, ITEMS))


def test_a_generator_makes_the_draws_repeatable():
    sampler = NegativeSampler(8, ITEMS, used_keys(HISTORIES))
    users = torch.arange(1, 8).repeat(10)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    first = sampler.sample(users, users, 3, generator)
    generator.set_state(state)
    assert torch.equal(first, sampler.sample(users, users, 3, generator))
    assert not torch.equal(first, sampler.sample(users, users, 3, generator))


def test_recbole_interface_takes_arrays_and_checks_users():
    sampler = NegativeSampler(8, ITEMS, used_keys(HISTORIES))
    drawn = sampler.sample_by_user_ids(np.array([7, 7]), np.array([1, 1]), 2)
    assert drawn.tolist() == [6, 6, 6, 6]
    with pytest.raises(ValueError, match="user_id .9. not exist"):
        sampler.sample_by_user_ids([1, 9], [1, 1], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data"))


def parts(folder, **settings):
    """Config, whole dataset, and its train, valid and test parts."""
    config = small_config(folder, **settings)
    init_seed(1, True)
    dataset = create_dataset(config)
    return config, dataset, dataset.build()


def test_used_grows_with_the_phase(folder):
    config, dataset, built = parts(folder)
    theirs = Sampler(["train", "valid", "test"], built)
    for phase, keys in zip(("train", "valid", "test"), phase_pairs(built, dataset.item_num)):
        expected = {user * dataset.item_num + item for user, items in enumerate(theirs.used_ids[phase]) for item in items}
        assert set(keys.tolist()) == expected
        sampler = build_sampler(config, dataset, built, phase)
        every = torch.arange(1, dataset.user_num)
        drawn = sampler.sample(every, every, 300)
        assert not (set((every.repeat(300) * dataset.item_num + drawn).tolist()) & expected)


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("distribution, alpha", [("uniform", 1.0), ("popularity", 1.0), ("popularity", 0.3)])
def test_frequencies_are_recboles(folder, distribution, alpha, repeatable):
    args = {"distribution": distribution, "alpha": alpha, "sample_num": 1, "dynamic": False, "candidate_num": 0}
    config, dataset, built = parts(folder, train_neg_sample_args=args, repeatable=repeatable)
    phases = ["train", "valid", "test"]
    theirs = (
        RepeatableSampler(phases, dataset, distribution, alpha) if repeatable else Sampler(phases, built, distribution, alpha)
    ).set_phase("train")
    users = np.full(60000, 3)
    items = np.full(60000, int(built[0].inter_feat["item_id"][0]))
    expected = torch.bincount(theirs.sample_by_user_ids(users, items, 1), minlength=dataset.item_num) / 60000
    drawn = build_sampler(config, dataset, built).sample(torch.tensor(users), torch.tensor(items))
    got = torch.bincount(drawn, minlength=dataset.item_num) / 60000
    assert torch.equal(expected > 0, got > 0)
    torch.testing.assert_close(got, expected, atol=0.006, rtol=0)


def test_no_negatives_no_sampler(folder):
    assert build_sampler(*parts(folder, model="SASRec", train_neg_sample_args=None)) is None


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_of_the_training_items_only(distribution):
    """Only candidates are drawn, never a used one, with the same frequencies as a sampler that knows no other items."""
    from recbole_mm.data.sampler import CandidateSampler, NegativeSampler, pair_keys

    users, items = torch.tensor([1, 1, 2, 3]), torch.tensor([2, 5, 5, 9])
    candidates = torch.tensor([2, 4, 5, 7, 9])
    used = pair_keys(users, torch.cat([items[:3], torch.tensor([8])]), 12)  # item 8 is no candidate
    counts = torch.tensor([0, 9, 1, 9, 2, 3, 9, 4, 9, 5, 9, 9])
    sampler = CandidateSampler(4, 12, candidates, used, distribution, 1.0, counts)
    plain = NegativeSampler(4, 6, pair_keys(users[:3], torch.tensor([1, 3, 3]), 6), distribution, 1.0, torch.tensor([0, 1, 2, 3, 4, 5]))
    who = torch.tensor([1, 2, 3]).repeat(4000)
    torch.manual_seed(0)
    drawn = sampler.sample(who, torch.full_like(who, 2))
    torch.manual_seed(0)
    expected = plain.sample(who, torch.full_like(who, 1))
    assert torch.equal(drawn, torch.tensor([0, 2, 4, 5, 7, 9])[expected])
    assert set(drawn[who == 1].tolist()) == {4, 7, 9} and set(drawn[who == 3].tolist()) == {2, 4, 5, 7, 9}
