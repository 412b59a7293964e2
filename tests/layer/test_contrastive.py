"""In-batch losses over distinct rows against the same over all pairs."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from recbole_mm.layer.contrastive import bpr, info_nce, log_sum_exp_product


def pairs(seed=0):
    torch.manual_seed(seed)
    users, items = torch.randint(5, (30,)), torch.randint(7, (30,))
    return users.unique(return_inverse=True)[1], items.unique(return_inverse=True)[1]


@pytest.mark.parametrize("hard", [False, True])
def test_distinct_rows_give_the_value_and_gradient_of_all_pairs(hard):
    user_of, item_of = pairs()
    u = torch.randn(int(user_of.max()) + 1, 4, requires_grad=True)
    i = torch.randn(int(item_of.max()) + 1, 4, requires_grad=True)
    extra = torch.randn(30, requires_grad=True)
    logits = u[user_of] @ i[item_of].T / 0.3
    inputs = (u, i, extra) if hard else (u, i)
    if hard:
        logits = torch.cat([logits, extra[:, None] / 0.3], 1)
    plain = cross_entropy(logits, torch.arange(30))
    ours = info_nce(u, i, 0.3, user_of, item_of, extra if hard else None)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs)):
        torch.testing.assert_close(a, b)


def test_distinct_counts_each_key_once():
    user_of, item_of = pairs()
    u, i = torch.randn(int(user_of.max()) + 1, 4), torch.randn(int(item_of.max()) + 1, 4)
    torch.testing.assert_close(info_nce(u, i, 0.3, user_of, item_of, distinct=True), cross_entropy(u[user_of] @ i.T / 0.3, item_of))


def test_log_sum_exp_of_large_logits_is_finite():
    a = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    out = log_sum_exp_product(a, torch.tensor([[1.0], [0.5]]))
    assert out.isfinite().all()
    out.sum().backward()
    assert a.grad.isfinite().all()


def test_bpr_with_and_without_epsilon():
    p, n = torch.randn(20), torch.randn(20)
    torch.testing.assert_close(bpr(p, n), -(p - n).sigmoid().log().mean())
    torch.testing.assert_close(bpr(p, n, 1e-5), -(1e-5 + (p - n).sigmoid()).log().mean())
    assert bpr(torch.tensor([-1e6]), torch.tensor([1e6])).isfinite()


def test_unit_vectors_stay_stable_at_small_temperatures():
    user_of, item_of = pairs()
    u, i = normalize(torch.randn(5, 4), dim=1), normalize(torch.randn(7, 4), dim=1)
    assert info_nce(u, i, 0.001, user_of, item_of).isfinite()
