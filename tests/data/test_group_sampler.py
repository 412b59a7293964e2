"""Negatives of groups: exactly the group's items less the user's own, each equally often."""

import torch

from recbole_mm.data.group_sampler import GroupSampler
from recbole_mm.data.sampler import pair_keys

USERS, ITEMS = 7, 12  # ids 1..6, 1..11
BOUGHT = {1: [1, 2, 3], 2: [3, 4, 5], 3: [1, 5], 4: [7, 8], 5: [9, 11], 6: [10]}
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2])


def pairs():
    users = torch.tensor([u for u, items in BOUGHT.items() for _ in items])
    items = torch.tensor([i for items in BOUGHT.values() for i in items])
    return pair_keys(users, items, ITEMS)


def counts(sampler, user, draws=12_000):
    torch.manual_seed(0)
    return torch.bincount(sampler.sample(torch.full((3,), user), draws // 3).flatten(), minlength=ITEMS)


def test_negatives_are_the_groups_items_less_the_users_own_in_equal_shares():
    sampler = GroupSampler(pairs(), USERS, ITEMS, GROUPS)
    for user, expected in {1: [4, 5], 2: [1, 2], 3: [2, 3, 4], 4: [9, 11], 5: [7, 8]}.items():
        found = counts(sampler, user)
        assert found.nonzero().flatten().tolist() == expected, user
        assert (found[expected] / found.sum() - 1 / len(expected)).abs().max() < 0.02


def test_a_user_who_has_all_of_the_group_draws_from_the_whole_catalogue():
    sampler = GroupSampler(pairs(), USERS, ITEMS, GROUPS)
    assert counts(sampler, 6).nonzero().flatten().tolist() == [i for i in range(1, ITEMS) if i != 10]


def test_without_groups_the_pool_is_the_catalogue():
    sampler = GroupSampler(pairs(), USERS, ITEMS)
    assert counts(sampler, 2).nonzero().flatten().tolist() == [i for i in range(1, ITEMS) if i not in BOUGHT[2]]


def test_a_batch_of_several_groups_keeps_its_rows_apart():
    sampler = GroupSampler(pairs(), USERS, ITEMS, GROUPS)
    torch.manual_seed(0)
    users = torch.tensor([4, 1, 6, 5, 2, 3])
    drawn = sampler.sample(users, 200)
    assert drawn.shape == (6, 200)
    allowed = {1: {4, 5}, 2: {1, 2}, 3: {2, 3, 4}, 4: {9, 11}, 5: {7, 8}, 6: set(range(1, ITEMS)) - {10}}
    for user, row in zip(users.tolist(), drawn.tolist()):
        assert set(row) == allowed[user]
