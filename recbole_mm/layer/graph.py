r"""Graphs as sparse operators: user-item propagation, dropout of edges and nodes, item-item neighbours.

Everything is CSR with a fixed structure. A product and its gradient are two CSR products (the operator and its transpose, both stored;
a symmetric operator stores one). Dropping edges or nodes changes values, never the structure. Measured against torch.sparse COO, CSR with autograd's own backward and
torch-geometric's EdgeIndex in benchmarks/graph_speed.py.

Notation: n users, m items (row 0 of both is padding and has no edge), E edges, D width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from recbole_mm.errors import UserError, nearest

ADJACENCIES = ("sym", "row", "row_loop", "row_plus_loop", "plain")


def csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A torch CSR tensor from parts known to be valid."""
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def dense_product(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix` [r, c] sparse times `x` [c, D] in float32, also inside an autocast region (sparse kernels know no half precision).

    ``matrix @ x`` fills its result with zeros and copies it before the product; MKL needs neither
    (1.3 to 1.8 times faster on a random graph of tiktok's size, 64 to 256 columns).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().contiguous()
        if x.device.type != "cpu" or not torch.backends.mkl.is_available() or not matrix._nnz():
            return matrix @ x
        out = torch.empty(matrix.shape[0], x.shape[1])
        return torch.addmm(out, matrix, x, beta=0, out=out)


class _FixedProduct(torch.autograd.Function):
    """matrix @ x whose gradient is transposed @ g, with both matrices given."""

    @staticmethod
    def forward(ctx, x, matrix, transposed):
        ctx.transposed = transposed
        return dense_product(matrix, x)

    @staticmethod
    def backward(ctx, grad):
        return dense_product(ctx.transposed, grad), None, None


class _ValuedProduct(torch.autograd.Function):
    """The same with a gradient for the values: entry (i, j) receives g_i . x_j, computed for the stored entries only."""

    @staticmethod
    def forward(ctx, values, x, pattern):
        ctx.pattern = pattern
        ctx.save_for_backward(values, x)
        return dense_product(pattern.matrix(values), x)

    @staticmethod
    def backward(ctx, grad):
        values, x = ctx.saved_tensors
        pattern = ctx.pattern
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_values = pair_dots(grad, x, pattern.row, pattern.col)
        if ctx.needs_input_grad[1]:
            grad_x = dense_product(pattern.transposed(values), grad)
        return grad_values, grad_x, None


def pair_dots(a: Tensor, b: Tensor, row: Tensor, col: Tensor, block: int = 1 << 18) -> Tensor:
    """a[row_e] . b[col_e] for every pair e, [E], a block of pairs at a time so that memory does not grow with E x D."""
    out = a.new_empty(len(row))
    for start in range(0, len(row), block):
        part = slice(start, start + block)
        torch.sum(a[row[part]] * b[col[part]], dim=1, out=out[part])
    return out


class SparsePattern:
    """Where a sparse matrix [rows, cols] may be non-zero: CSR and the order that turns its values into those of the transpose.

    Args:
        row, col: [E] coordinates without duplicates, in any order; `order` maps the entries as given to the stored (row-major) ones.
    """

    def __init__(self, row: Tensor, col: Tensor, shape: tuple[int, int]):
        self.shape = tuple(shape)
        self.order = torch.argsort(row * shape[1] + col)
        self.row, self.col = row[self.order], col[self.order]
        self.crow = _offsets(self.row, shape[0])
        self.transpose_order = torch.argsort(self.col * shape[0] + self.row)
        self.transpose_crow = _offsets(self.col, shape[1])
        self.transpose_col = self.row[self.transpose_order]

    def __len__(self) -> int:
        return len(self.col)

    def matrix(self, values: Tensor) -> Tensor:
        """CSR tensor with `values` [E] in stored order."""
        return csr(self.crow, self.col, values, self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        """CSR tensor of the transpose, `values` [E] in the stored order of the matrix itself."""
        return csr(self.transpose_crow, self.transpose_col, values[self.transpose_order], self.shape[::-1])

    def product(self, values: Tensor, x: Tensor) -> Tensor:
        """Matrix [r, c] with `values` times `x` [c, D], differentiable in both."""
        return _ValuedProduct.apply(values, x, self)

    def operator(self, values: Tensor) -> SparseOperator:
        """The constant operator with these values."""
        values = values.detach().float()
        return SparseOperator(self.matrix(values), self.transposed(values))


def _offsets(sorted_index: Tensor, n: int) -> Tensor:
    """Row offsets [n + 1] of a sorted index."""
    counts = torch.bincount(sorted_index, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class SparseOperator:
    """A constant sparse matrix with its transpose: `op(x)` is differentiable in x."""

    def __init__(self, matrix: Tensor, transposed: Tensor):
        self.matrix = matrix
        self.transposed = transposed

    def __call__(self, x: Tensor) -> Tensor:
        return _FixedProduct.apply(x, self.matrix, self.transposed)

    def rows(self, index: Tensor) -> SparseOperator:
        """The operator with only the rows `index` [P] (distinct), for a product of which a batch needs no more."""
        shape = (len(index), self.matrix.shape[1])
        crow, col, values = self.matrix.crow_indices(), self.matrix.col_indices(), self.matrix.values()
        counts = crow[index + 1] - crow[index]
        new_crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        total = int(new_crow[-1])
        place = torch.arange(total, device=col.device) + (crow[index] - new_crow[:-1]).repeat_interleave(counts, output_size=total)
        new_col, new_values = col[place], values[place]
        if total * 8 < len(col):  # few rows: sort what is left, else filter the stored transpose, which is in order already
            order = new_col.argsort(stable=True)
            row = torch.arange(len(index), device=col.device).repeat_interleave(counts, output_size=total)
            transposed = csr(_offsets(new_col[order], shape[1]), row[order], new_values[order], shape[::-1])
        else:
            position = crow.new_full((self.matrix.shape[0],), -1)
            position[index] = torch.arange(len(index), device=col.device)
            position = position[self.transposed.col_indices()]
            kept = position >= 0
            passed = torch.cat([crow.new_zeros(1), kept.cumsum(0)])
            transposed = csr(passed[self.transposed.crow_indices()], position[kept], self.transposed.values()[kept], shape[::-1])
        return SparseOperator(csr(new_crow, new_col, new_values, shape), transposed)


class BipartiteOperator:
    r"""A normalised adjacency of users and items, split in its blocks.

    .. math::
        \hat A = \begin{pmatrix} \mathrm{diag}(l_u) & \hat R \\ \hat R' & \mathrm{diag}(l_i) \end{pmatrix}

    `to_users` is :math:`\hat R` [n, m], `to_items` :math:`\hat R'` [m, n]; `loops` holds the diagonal parts ([n, 1], [m, 1]) or is None.
    """

    def __init__(self, to_users: SparseOperator, to_items: SparseOperator, loops: tuple[Tensor, Tensor] | None = None):
        self.to_users = to_users
        self.to_items = to_items
        self.loops = loops

    def __call__(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """One step: users [n, D] and items [m, D] after the product with the operator."""
        new_users, new_items = self.to_users(items), self.to_items(users)
        if self.loops is not None:
            new_users = torch.addcmul(new_users, self.loops[0], users)
            new_items = torch.addcmul(new_items, self.loops[1], items)
        return new_users, new_items

    def some_rows(self, users: Tensor, items: Tensor, user_rows: Tensor, item_rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `user_rows` [P] and `item_rows` [Q] of one step, nothing else computed."""
        new_users, new_items = self.to_users.rows(user_rows)(items), self.to_items.rows(item_rows)(users)
        if self.loops is not None:
            new_users = torch.addcmul(new_users, self.loops[0][user_rows], pick(users, user_rows))
            new_items = torch.addcmul(new_items, self.loops[1][item_rows], pick(items, item_rows))
        return new_users, new_items

    def to_coo(self) -> tuple[Tensor, Tensor]:
        """Coordinates [2, E'] of the whole square operator, users first, sorted by row then column, and values [E']."""
        n = self.to_users.matrix.shape[0]
        rows, cols, values = [], [], []
        for matrix, row_shift, col_shift in ((self.to_users.matrix, 0, n), (self.to_items.matrix, n, 0)):
            coo = matrix.to_sparse_coo().coalesce()
            rows.append(coo.indices()[0] + row_shift)
            cols.append(coo.indices()[1] + col_shift)
            values.append(coo.values())
        if self.loops is not None:
            diagonal = torch.cat([part.flatten() for part in self.loops])
            index = torch.arange(len(diagonal), device=diagonal.device)
            rows.append(index)
            cols.append(index)
            values.append(diagonal)
        row, col, value = torch.cat(rows), torch.cat(cols), torch.cat(values)
        order = torch.argsort(row * (int(max(row.max(), col.max())) + 1) + col)
        return torch.stack([row[order], col[order]]), value[order]


class BipartiteGraph:
    """Training interactions as a graph of users and items.

    Args:
        user, item: [E] ids; a pair that occurs several times counts once (the adjacency is binary).
        n_users, n_items: sizes including the padding rows.
    """

    def __init__(self, user: Tensor, item: Tensor, n_users: int, n_items: int):
        key = torch.unique(user.long() * n_items + item.long())
        self.n_users, self.n_items = n_users, n_items
        self.user = torch.div(key, n_items, rounding_mode="floor")
        self.item = key - self.user * n_items
        self.pattern = SparsePattern(self.user, self.item, (n_users, n_items))

    @classmethod
    def from_matrix(cls, matrix, device=None) -> BipartiteGraph:
        """From a scipy COO matrix users x items, as RecBole's `dataset.inter_matrix(form="coo")` gives it."""
        user = torch.as_tensor(matrix.row, dtype=torch.long, device=device)
        item = torch.as_tensor(matrix.col, dtype=torch.long, device=device)
        return cls(user, item, *matrix.shape)

    def __len__(self) -> int:
        return len(self.pattern)

    @cached_property
    def interacted_items(self) -> Tensor:
        """[m] bool: the item has an edge."""
        return torch.bincount(self.item, minlength=self.n_items) > 0

    def operator(self, adjacency: str = "sym", keep: Tensor | None = None) -> BipartiteOperator:
        r"""The normalised adjacency :math:`\hat A` of the edges in `keep` ([E] bool, None: all). Isolated nodes get zero rows (but for loops).

        ``sym``: :math:`D^{-1/2} A D^{-1/2}`; ``row``: :math:`D^{-1}A`; ``row_loop``: :math:`(D+I)^{-1}(A+I)`;
        ``row_plus_loop``: :math:`D^{-1}A + I`; ``plain``: :math:`A`.
        """
        if adjacency not in ADJACENCIES:
            raise UserError(f"adjacency: expected one of {', '.join(ADJACENCIES)}, got '{adjacency}'.{nearest(adjacency, ADJACENCIES)}")
        edge = torch.ones(len(self), device=self.user.device) if keep is None else keep.float()
        users = torch.zeros(self.n_users, device=edge.device).index_add_(0, self.user, edge)
        items = torch.zeros(self.n_items, device=edge.device).index_add_(0, self.item, edge)
        p, ones = self.pattern, torch.ones_like
        if adjacency in ("sym", "plain"):
            scale_u, scale_i = (_power(users, -0.5), _power(items, -0.5)) if adjacency == "sym" else (ones(users), ones(items))
            values = edge * scale_u[self.user] * scale_i[self.item]
            forward, backward = p.matrix(values), p.transposed(values)
            return BipartiteOperator(SparseOperator(forward, backward), SparseOperator(backward, forward))
        loops = None
        if adjacency == "row_loop":
            users, items = users + 1, items + 1
            loops = (1 / users[:, None], 1 / items[:, None])
        elif adjacency == "row_plus_loop":
            loops = (ones(users)[:, None], ones(items)[:, None])
        by_user, by_item = edge * _power(users, -1)[self.user], edge * _power(items, -1)[self.item]
        to_users = SparseOperator(p.matrix(by_user), p.transposed(by_user))
        to_items = SparseOperator(p.transposed(by_item), p.matrix(by_item))
        return BipartiteOperator(to_users, to_items, loops)

    def keep_edges(self, rate: float) -> Tensor:
        """[E] bool: floor(E (1 - rate)) edges drawn without replacement."""
        keep = torch.zeros(len(self), dtype=torch.bool, device=self.user.device)
        drawn = torch.randperm(len(self), device=self.user.device)[: int(len(self) * (1 - rate))]
        keep[drawn] = True
        return keep

    def keep_nodes(self, rate: float) -> Tensor:
        """[E] bool: edges left when floor(n rate) users and floor(m rate) items (padding never counts) are dropped."""
        keep = []
        for index, size in ((self.user, self.n_users), (self.item, self.n_items)):
            alive = torch.ones(size, dtype=torch.bool, device=index.device)
            alive[1 + torch.randperm(size - 1, device=index.device)[: int((size - 1) * rate)]] = False
            keep.append(alive[index])
        return keep[0] & keep[1]


def _power(degree: Tensor, exponent: float) -> Tensor:
    """degree ** exponent, 0 where the degree is 0 (or negative, as sums of cosines can be), with gradient 0 there."""
    positive = degree > 0
    return torch.where(positive, torch.where(positive, degree, 1.0).pow(exponent), 0.0)


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """x[rows], or all of x for None."""
    return x if rows is None else x.index_select(0, rows)


def lightgcn(
    operator: BipartiteOperator,
    users: Tensor,
    items: Tensor,
    n_layers: int,
    user_rows: Tensor | None = None,
    item_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""LightGCN pooling :math:`\frac{1}{L+1}\sum_{k=0}^{L} \hat A^k [U; I]` of users [n, D] and items [m, D]; D may hold several channels.

    With `user_rows` [P] and `item_rows` [Q] (distinct ids) only those rows are returned, and the last layer computes no others.
    """
    sum_users, sum_items = pick(users, user_rows), pick(items, item_rows)
    for k in range(1, n_layers + 1):
        if k < n_layers or (user_rows is None and item_rows is None):
            users, items = operator(users, items)
            sum_users, sum_items = sum_users + pick(users, user_rows), sum_items + pick(items, item_rows)
        else:
            last_users, last_items = operator.some_rows(users, items, user_rows, item_rows)
            sum_users, sum_items = sum_users + last_users, sum_items + last_items
    return sum_users / (n_layers + 1), sum_items / (n_layers + 1)


def spread(
    operator: BipartiteOperator,
    start: Tensor,
    n_layers: int,
    from_users: bool,
    user_rows: Tensor | None = None,
    item_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""LightGCN pooling of [U; 0] (`from_users`) or [0; I]: what one side contributes to users and to items. Rows as in :func:`lightgcn`.

    The pass is linear, so pooling of [U; I] is the sum of both. Without loops the blocks of the operator alternate: what starts at the users ends at users after
    an even number of steps and at items after an odd one, so that each step costs half.
    """
    n, m = operator.to_users.matrix.shape
    if operator.loops is not None:
        other = start.new_zeros(m if from_users else n, start.shape[1])
        return lightgcn(operator, *((start, other) if from_users else (other, start)), n_layers, user_rows, item_rows)
    here, there = (user_rows, item_rows) if from_users else (item_rows, user_rows)
    away, home = (operator.to_items, operator.to_users) if from_users else (operator.to_users, operator.to_items)
    sums: list[Tensor | None] = [pick(start, here), None]  # at the side of the start, at the other side
    state = start
    for k in range(1, n_layers + 1):
        step, rows = (away, there) if k % 2 else (home, here)
        if k == n_layers and rows is not None:
            arrived = step.rows(rows)(state)
        else:
            state = step(state)
            arrived = pick(state, rows)
        sums[k % 2] = arrived if sums[k % 2] is None else sums[k % 2] + arrived
    if sums[1] is None:
        size = (m if from_users else n) if there is None else len(there)
        sums[1] = start.new_zeros(size, start.shape[1])
    at_start, at_other = (x / (n_layers + 1) for x in sums)
    return (at_start, at_other) if from_users else (at_other, at_start)


def lightgcn_shared_users(
    operator: BipartiteOperator,
    users: Tensor,
    items: Tensor,
    n_layers: int,
    user_rows: Tensor | None = None,
    item_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""LightGCN pooling of C item channels that share one user table, as one product.

    users [n, d], items [m, C d] -> users [n, C d], items [m, C d], column block c being ``lightgcn(operator, users, items_c)``. What starts at the users is
    propagated once (width d) and added to every channel. Rows as in :func:`lightgcn`.
    """
    shared = spread(operator, users, n_layers, True, user_rows, item_rows)
    own = spread(operator, items, n_layers, False, user_rows, item_rows)
    return tuple(add_to_channels(wide, narrow) for wide, narrow in zip(own, shared))


def add_to_channels(wide: Tensor, narrow: Tensor) -> Tensor:
    """`wide` [P, C d] plus `narrow` [P, d] in each of its channels."""
    return (wide.view(len(wide), -1, narrow.shape[1]) + narrow[:, None]).view(wide.shape)


# Item-item neighbours -----------------------------------------------------------------------------------------------------------------


class _UnitRows(torch.autograd.Function):
    """Rows over their length in three passes each way (torch's normalize takes about eight in its gradient)."""

    @staticmethod
    def forward(ctx, x):
        length = x.norm(dim=1, keepdim=True)
        inverse = torch.where(length > 1e-12, 1 / length, 0.0)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx, grad):
        unit, inverse = ctx.saved_tensors
        along = (grad * unit).sum(1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(inverse)


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their length; zero rows stay zero and get no gradient."""
    if type(x) not in (
        Tensor,
        torch.nn.Parameter,
    ):  # a tensor class with rules of its own, such as a table of which few rows carry gradient
        return torch.nn.functional.normalize(x, dim=1)
    return _UnitRows.apply(x)


@torch.no_grad()
def cosine_neighbours(x: Tensor, k: int, block_bytes: int = 1 << 24) -> Tensor:
    """Indices [n, k] of the k rows of `x` [n, F] most similar by cosine to each row (itself included), ascending; ties go to the smaller index.

    Exact, without an n x n matrix: similarities are computed for a block of rows, in float32. Columns are dealt into groups; the k best entries of
    a row lie in the k groups with the largest maxima, so only those are searched (7 times faster than `topk` over the row at n = 6,710).
    Rows where a tie at the border could make this ambiguous are decided by counting.
    """
    n = len(x)
    k = min(k, n)
    unit = unit_rows(x.float())
    per_group = max(1, int((n / k) ** 0.5))
    groups = -(-n // per_group)
    padded = torch.cat([unit, unit.new_zeros(groups * per_group - n, unit.shape[1])]).T.contiguous()
    out = torch.empty(n, k, dtype=torch.long, device=x.device)
    rows = max(1, block_bytes // (4 * padded.shape[1]))
    for start in range(0, n, rows):
        similarity = unit[start : start + rows] @ padded
        similarity[:, n:] = -torch.inf
        out[start : start + rows] = _best_columns(similarity, k, per_group, groups)
    return out


def _best_columns(similarity: Tensor, k: int, per_group: int, groups: int) -> Tensor:
    """Ascending column indices [b, k] of the k largest entries of each row of [b, per_group * groups]; ties to the smaller index."""
    rows = len(similarity)
    if groups <= k:
        values = similarity.topk(k, dim=1).values
        return _by_counting(similarity, values[:, -1:], k)
    grouped = similarity.view(rows, per_group, groups)  # column c is in group c % groups
    maxima = grouped.amax(1)
    best = maxima.topk(k, dim=1)
    candidates = grouped.gather(2, best.indices[:, None].expand(-1, per_group, -1)).reshape(rows, -1)
    top = candidates.topk(k, dim=1)
    border = top.values[:, -1:]
    step, place = torch.div(top.indices, k, rounding_mode="floor"), top.indices % k
    columns = (step * groups + best.indices.gather(1, place)).sort(1).values
    ambiguous = ((maxima >= border).sum(1) > k) | ((candidates >= border).sum(1) > k)
    if ambiguous.any():
        columns[ambiguous] = _by_counting(similarity[ambiguous], border[ambiguous], k)
    return columns


def _by_counting(similarity: Tensor, border: Tensor, k: int) -> Tensor:
    """The same from the k-th largest value [b, 1]: everything above it, then the first columns equal to it until k are found."""
    above, equal = similarity > border, similarity == border
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(len(similarity), k)


@torch.no_grad()
def approximate_cosine_neighbours(x: Tensor, k: int, links: int = 32, search: int = 128) -> Tensor:
    """The same through faiss's HNSW index: not exact (recall in benchmarks/graph_memory.md), for item counts where n^2 products are too many.

    Args:
        links: neighbours per node of the index. search: candidates kept while searching; more is slower and more exact.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "An approximate neighbour search was asked for (knn_exact_limit below the number of items), but faiss is not installed: "
            "`pip install faiss-cpu`, or raise knn_exact_limit to search exactly."
        ) from error
    unit = unit_rows(x.float()).cpu().numpy()
    k = min(k, len(unit))
    index = faiss.IndexHNSWFlat(unit.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = max(search, k)
    index.add(unit)
    found = torch.from_numpy(index.search(unit, k)[1])
    # HNSW may return fewer than k hits (-1), above all between duplicates; the row itself is always a valid neighbour, its repeats are merged later.
    found = torch.where(found < 0, torch.arange(len(unit))[:, None], found)
    return found.sort(1).values.to(x.device)


def neighbour_similarities(x: Tensor, neighbours: Tensor) -> Tensor:
    """Cosine similarities [n, k] of each row of `x` [n, F] to its neighbours [n, k], differentiable in x."""
    unit = unit_rows(x)
    return _NeighbourDots.apply(unit, neighbours)


class _NeighbourDots(torch.autograd.Function):
    """unit_i . unit_{neighbours_ij}; the gradient is two sparse products instead of a scatter of [n, k, F]."""

    @staticmethod
    def forward(ctx, unit, neighbours):
        ctx.save_for_backward(unit, neighbours)
        row = torch.arange(len(unit), device=unit.device).repeat_interleave(neighbours.shape[1])
        return pair_dots(unit, unit, row, neighbours.reshape(-1)).view(neighbours.shape)

    @staticmethod
    def backward(ctx, grad):
        unit, neighbours = ctx.saved_tensors
        n, k = neighbours.shape
        crow = torch.arange(0, n * k + 1, k, device=unit.device)
        matrix = csr(crow, neighbours.reshape(-1), grad.reshape(-1), (n, n))
        order = torch.argsort(neighbours.reshape(-1), stable=True)
        transposed = csr(
            _offsets(neighbours.reshape(-1)[order], n), torch.div(order, k, rounding_mode="floor"), grad.reshape(-1)[order], (n, n)
        )
        return dense_product(matrix, unit) + dense_product(transposed, unit), None


def symmetric_scaling(neighbours: Tensor, values: Tensor) -> Tensor:
    r"""Values [n, k] of :math:`D^{-1/2} K D^{-1/2}` with D the row sums of K on both sides (K need not be symmetric); rows without a positive sum become 0."""
    scale = _power(values.sum(1), -0.5)
    return values * scale[:, None] * scale[neighbours]
