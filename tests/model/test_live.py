"""Rows that carry gradient: every operation gives the values and the gradients of an ordinary tensor, most without a gradient of its size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recbole_mm.model import live as live_module
from recbole_mm.model.live import LiveTable

ROWS, WIDTH = 12, 4
LINEAR = nn.Linear(WIDTH, 3)
MATRIX = torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
INDEX = torch.tensor([[2, 3], [7, 7]])
GRAPH = torch.eye(ROWS).roll(1, 0).to_sparse()

SPARSE = {
    "rows": lambda x: x[INDEX],
    "row numbers in 32 bits": lambda x: x[INDEX[0].int()],
    "index_select": lambda x: x.index_select(0, INDEX[1]),
    "embedding": lambda x: F.embedding(INDEX, x),
    "linear": LINEAR,
    "matmul": lambda x: x @ MATRIX,
    "mm": lambda x: torch.mm(x, MATRIX),
    "addmm": lambda x: torch.addmm(MATRIX[0], x, MATRIX),
    "unit rows": lambda x: F.normalize(x, dim=1)[INDEX],
    "unit rows, linear": lambda x: LINEAR(F.normalize(x, dim=-1)),
    "without padding": lambda x: x[1:][INDEX - 1],
    "without padding, unit": lambda x: F.normalize(x[1:], dim=-1) @ MATRIX,
}
WHOLE = {
    "slice": lambda x: x[3:8],
    "concatenation": lambda x: torch.cat([x, x], dim=-1)[5],
    "graph": lambda x: torch.sparse.mm(GRAPH, x),
    "arithmetic": lambda x: (2 * x - x.mean(0)).pow(2),
    "left factor": lambda x: MATRIX.t() @ x.t(),
    "own product": lambda x: x @ x.t(),
}


def tables():
    torch.manual_seed(0)
    table = torch.randn(ROWS, WIDTH)
    table[0] = 0
    rows = torch.tensor([2, 5, 7])
    fresh = table[rows].clone().requires_grad_()
    return LiveTable(table, rows, fresh), rows, fresh, table.clone().requires_grad_()


@pytest.mark.parametrize("name", [*SPARSE, *WHOLE])
def test_values_and_gradients_are_those_of_an_ordinary_tensor(name):
    function = {**SPARSE, **WHOLE}[name]
    live, rows, fresh, ordinary = tables()
    gradients = []
    for x in (live, ordinary):
        LINEAR.zero_grad()
        MATRIX.grad = None
        out = function(x)
        out.pow(2).sum().backward()
        gradients.append([out.detach()] + [None if p.grad is None else p.grad.clone() for p in (*LINEAR.parameters(), MATRIX)])
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(fresh.grad, ordinary.grad[rows])


@pytest.mark.parametrize("name", SPARSE)
def test_no_gradient_of_the_size_of_the_table(name, monkeypatch):
    """The dense way is never taken by what models do with large tables."""
    monkeypatch.setattr(LiveTable, "whole", lambda self: pytest.fail("dense"))
    live, _, fresh, _ = tables()
    SPARSE[name](live).sum().backward()
    assert fresh.grad is not None


def test_without_gradient_it_is_the_table():
    live, *_ = tables()
    with torch.no_grad():
        assert type(live[INDEX]) is torch.Tensor and not (live @ MATRIX).requires_grad
        assert live_module.expand(live) is live.table


def test_it_looks_like_a_tensor_that_learns():
    live, *_ = tables()
    assert isinstance(live, torch.Tensor) and live.shape == (ROWS, WIDTH) and len(live) == ROWS and live.requires_grad
