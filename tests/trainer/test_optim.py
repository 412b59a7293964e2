"""Optimizers: what `learner` names, with every group's own values."""

import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.trainer.optim import LEARNERS, build_optimizer


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3))]


def stepped(optimizer, values, steps=3):
    for step in range(steps):
        for value in values:
            value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return [v.detach().clone() for v in values]


@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "sparse_adam"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_the_plain_optimizer(learner, decay):
    kind = LEARNERS[learner][0]
    plain, ours = parameters(), parameters()
    expected = stepped(kind(plain, lr=0.1, weight_decay=decay, foreach=False), plain)
    got = stepped(build_optimizer(learner.upper(), iter(ours), 0.1, decay), ours)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "sparse_adam"])
def test_a_step_is_seen_by_those_who_keep_what_they_computed(learner):
    """LATTICE chooses its neighbours anew when a weight's version has moved; PyTorch's fused steps alone do not move it."""
    values = parameters()
    before = [value._version for value in values]
    values[0].grad = torch.ones_like(values[0])
    build_optimizer(learner, values, 0.1).step()
    assert values[0]._version > before[0] and values[1]._version == before[1]


def test_dense_optimizers_are_fused():
    assert build_optimizer("adam", parameters(), 0.1).defaults["fused"]


def test_sparse_adam_takes_sparse_gradients_and_no_decay():
    table = torch.nn.Embedding(10, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = build_optimizer("sparse_adam", table.parameters(), 0.1)
    table(torch.tensor([3])).sum().backward()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [3]
    with pytest.raises(UserError, match="takes no weight_decay, got 0.1"):
        build_optimizer("sparse_adam", table.parameters(), 0.1, 0.1)


def test_groups_keep_their_own_values():
    a, b = parameters()
    groups = [{"params": iter([a]), "lr": 0.5}, {"params": [b], "weight_decay": 0.2}]
    optimizer = build_optimizer("adam", groups, 0.1, 0.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.2]


def test_an_unknown_learner_names_the_nearest():
    with pytest.raises(UserError, match="learner.*got 'adm'. Did you mean adam"):
        build_optimizer("adm", parameters(), 0.1)
