"""Sparse operators against dense algebra, dropout, neighbours with ties and zero rows."""

import numpy as np
import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.layer import graph as module
from recbole_mm.layer.graph import (
    ADJACENCIES,
    BipartiteGraph,
    SparsePattern,
    approximate_cosine_neighbours,
    cosine_neighbours,
    lightgcn,
    lightgcn_shared_users,
    neighbour_similarities,
    spread,
    symmetric_scaling,
    unit_rows,
)

N, M = 9, 12  # with padding; user 8 and item 11 have no edge


def example(seed=0) -> BipartiteGraph:
    draw = np.random.default_rng(seed)
    user, item = torch.from_numpy(draw.integers(1, N - 1, 40)), torch.from_numpy(draw.integers(1, M - 1, 40))
    return BipartiteGraph(user, item, N, M)


def dense_adjacency(graph, keep=None) -> torch.Tensor:
    a = torch.zeros(N + M, N + M)
    user, item = (graph.user, graph.item) if keep is None else (graph.user[keep], graph.item[keep])
    a[user, item + N] = 1
    return a + a.T


def dense_operator(kind: str, a: torch.Tensor) -> torch.Tensor:
    """The definitions, word by word."""
    eye = torch.eye(len(a))

    def inverse(d, p):
        return torch.where(d > 0, d.clamp_min(1).pow(p), 0.0)

    if kind == "plain":
        return a
    if kind == "sym":
        s = inverse(a.sum(1), -0.5)
        return s[:, None] * a * s
    if kind == "row_loop":
        return (a + eye) / (a + eye).sum(1, keepdim=True)
    row = inverse(a.sum(1), -1)[:, None] * a
    return row if kind == "row" else row + eye


def split(x):
    return x[:N], x[N:]


@pytest.mark.parametrize("kind", ADJACENCIES)
@pytest.mark.parametrize("dropped", [False, True])
def test_operator_and_its_gradient_are_the_dense_ones(kind, dropped):
    graph = example()
    torch.manual_seed(1)
    keep = graph.keep_edges(0.4) if dropped else None
    a = dense_operator(kind, dense_adjacency(graph, keep))
    operator = graph.operator(kind, keep)
    x = torch.randn(N + M, 5, requires_grad=True)
    weight = torch.randn(N + M, 5)
    out = torch.cat(operator(*split(x)))
    torch.testing.assert_close(out, a @ x)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(gradient, a.T @ weight)
    index, value = operator.to_coo()
    torch.testing.assert_close(torch.zeros_like(a).index_put_(tuple(index), value, accumulate=True), a)


def test_repeated_interactions_count_once_and_unknown_adjacency_is_named():
    graph = BipartiteGraph(torch.tensor([1, 1, 2]), torch.tensor([3, 3, 1]), 3, 4)
    assert len(graph) == 2
    assert graph.interacted_items.tolist() == [False, True, False, True]
    with pytest.raises(UserError, match="Did you mean sym"):
        graph.operator("symm")


@pytest.mark.parametrize("kind", ["sym", "row", "row_loop"])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("some", [False, True])
def test_pooling_of_all_or_some_rows_is_the_mean_of_powers(kind, layers, some):
    torch.manual_seed(0)
    graph = example()
    operator, a = graph.operator(kind), dense_operator(kind, dense_adjacency(graph))
    rows = (torch.tensor([1, 4, 8]), torch.tensor([0, 2, 11])) if some else (None, None)
    users, items = torch.randn(N, 2, requires_grad=True), torch.randn(M, 6, requires_grad=True)  # three channels of width 2

    def expected(u, i):
        power = mean = torch.cat([u, i])
        for _ in range(layers):
            power = a @ power
            mean = mean + power
        return [part if r is None else part[r] for part, r in zip(split(mean / (layers + 1)), rows)]

    channels = [expected(users, items[:, c : c + 2]) for c in (0, 2, 4)]
    wanted = [torch.cat(side, 1) for side in zip(*channels)]
    shared = lightgcn_shared_users(operator, users, items, layers, *rows)
    plain = lightgcn(operator, users.repeat(1, 3), items, layers, *rows)
    from_users = spread(operator, users, layers, True, *rows)
    weights = [torch.randn_like(x) for x in wanted]

    def gradients(out):
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), (users, items), retain_graph=True)

    for out in (shared, plain):
        for x, w in zip(out, wanted):
            torch.testing.assert_close(x, w)
        for x, w in zip(gradients(out), gradients(wanted)):
            torch.testing.assert_close(x, w)
    for x, w in zip(from_users, expected(users, torch.zeros(M, 2))):
        torch.testing.assert_close(x, w)


@pytest.mark.parametrize("index", [[3], [0, 2, 5, 7], list(range(N))])
def test_chosen_rows_of_an_operator(index):
    """Few rows are sorted, many are filtered from the stored transpose; both give the rows and their gradient."""
    graph = example()
    operator = graph.operator("row").to_users
    index = torch.tensor(index)
    x = torch.randn(M, 3, requires_grad=True)
    some, every = operator.rows(index)(x), operator(x)[index]
    torch.testing.assert_close(some, every)
    weight = torch.randn_like(every)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (some, every)))


def test_products_inside_autocast_stay_in_single_precision():
    operator = example().operator("sym").to_users
    x = torch.randn(M, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(x), operator(x.float()))


def test_pattern_has_gradients_for_values_and_matrix():
    row, col = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 3, 0, 1])
    pattern = SparsePattern(row, col, (3, 4))
    values = torch.randn(4, requires_grad=True, dtype=torch.float32)
    x = torch.randn(4, 5, requires_grad=True)
    dense = torch.zeros(3, 4).index_put((pattern.row, pattern.col), values)
    torch.testing.assert_close(pattern.product(values, x), dense @ x)
    ours = torch.autograd.grad(pattern.product(values, x).pow(2).sum(), (values, x))
    theirs = torch.autograd.grad((dense @ x).pow(2).sum(), (values, x))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(pattern.operator(values)(x), dense @ x)
    torch.testing.assert_close(pattern.transposed(values.detach()).to_dense(), dense.T.detach())


def test_edges_and_nodes_are_dropped_by_count_without_padding():
    graph = example()
    torch.manual_seed(0)
    assert int(graph.keep_edges(0.3).sum()) == int(len(graph) * 0.7)
    seen = set()
    for _ in range(30):
        keep = graph.keep_nodes(0.25)
        gone_users = set(graph.user.tolist()) - set(graph.user[keep].tolist())
        seen |= gone_users
        assert all(not keep[graph.user == u].any() for u in gone_users)
    assert len(seen) > 4
    assert graph.keep_nodes(0.0).all() and graph.keep_edges(0.0).all()


# neighbours


def brute_force(x, k):
    unit = torch.nn.functional.normalize(x.double(), dim=1).float()
    similarity = (unit @ unit.T).numpy()
    order = np.lexsort((np.broadcast_to(np.arange(len(x)), similarity.shape), -similarity), axis=1)
    return np.sort(order[:, :k], axis=1)


@pytest.mark.parametrize("n, k, bytes_", [(300, 5, 1 << 24), (300, 5, 4000), (37, 10, 1 << 24), (6, 10, 1 << 24), (50, 1, 1 << 24)])
def test_neighbours_are_those_of_the_full_matrix(n, k, bytes_):
    torch.manual_seed(n)
    x = torch.randn(n, 8)
    found = cosine_neighbours(x, k, block_bytes=bytes_).numpy()
    np.testing.assert_array_equal(found, brute_force(x, min(k, n)))


def test_ties_go_to_the_smaller_index():
    """Rows of exact directions, so that equal similarities are equal to the last bit."""
    x = torch.eye(4)[torch.arange(200) % 4]
    found = cosine_neighbours(x, 6)
    for i in range(200):
        assert found[i].tolist() == [i % 4 + 4 * j for j in range(6)]
    zero = torch.zeros(50, 4)
    assert cosine_neighbours(zero, 3).tolist() == [[0, 1, 2]] * 50
    assert not neighbour_similarities(zero, cosine_neighbours(zero, 3)).any()


def test_memory_of_the_search_is_one_block(monkeypatch):
    widest = 0
    best = module._best_columns

    def watch(similarity, *args):
        nonlocal widest
        widest = max(widest, similarity.numel() * 4)
        return best(similarity, *args)

    monkeypatch.setattr(module, "_best_columns", watch)
    cosine_neighbours(torch.randn(1000, 4), 5, block_bytes=100_000)
    assert 0 < widest <= 100_000


def test_similarities_have_the_gradient_of_the_dense_graph():
    torch.manual_seed(0)
    x = torch.randn(15, 4, requires_grad=True)
    neighbours = cosine_neighbours(x, 4)
    unit = torch.nn.functional.normalize(x, dim=1)
    dense = (unit @ unit.T).gather(1, neighbours)
    scale = torch.where(dense.sum(1) > 0, dense.sum(1).clamp_min(1e-9).pow(-0.5), 0.0)
    dense = dense * scale[:, None] * scale[neighbours]
    ours = symmetric_scaling(neighbours, neighbour_similarities(x, neighbours))
    torch.testing.assert_close(ours, dense)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, dense)))


def test_negative_row_sums_give_no_edges_instead_of_nan():
    values = torch.tensor([[1.0, -2.0], [1.0, 0.5]], requires_grad=True)
    scaled = symmetric_scaling(torch.tensor([[0, 1], [0, 1]]), values)
    assert scaled.isfinite().all() and not scaled[0].any()
    scaled.sum().backward()
    assert values.grad.isfinite().all()


def test_unit_rows_and_their_gradient():
    x = torch.randn(6, 5)
    x[2] = 0
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(6, 5)
    (unit_rows(a) * weight).sum().backward()
    (torch.nn.functional.normalize(b, dim=1) * weight).sum().backward()
    torch.testing.assert_close(unit_rows(x), torch.nn.functional.normalize(x, dim=1))
    real = [0, 1, 3, 4, 5]
    torch.testing.assert_close(a.grad[real], b.grad[real])
    assert not a.grad[2].any()


def test_approximate_neighbours_find_most():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    x = torch.randn(500, 16)
    exact, found = cosine_neighbours(x, 10), approximate_cosine_neighbours(x, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist())])
    assert recall > 0.95
    assert found.shape == (500, 10)


def test_missing_faiss_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        approximate_cosine_neighbours(torch.randn(5, 2), 2)
