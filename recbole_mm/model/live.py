"""Rows of a feature table that carry gradient, without a copy of the table and without a gradient of its size.

In end-to-end training a step encodes the items of its batch; all other rows of the table are constants. :class:`LiveTable` looks like the
table to a model. Indexing and linear maps of it send gradient to the fresh rows alone, and scaling rows to unit length or leaving out the
padding row gives a table of the same kind; any other operation sees an ordinary tensor whose gradient is computed whole and then reduced
to the fresh rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map


class _Rows(torch.autograd.Function):
    """``table[index]`` with gradient to the fresh rows."""

    @staticmethod
    def forward(ctx, fresh: Tensor, table: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(items, index)
        ctx.rows = fresh.shape
        return table[index]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        items, index = ctx.saved_tensors
        flat = index.reshape(-1)
        place = torch.searchsorted(items, flat).clamp(max=len(items) - 1)
        own = items[place] == flat
        out = gradient.new_zeros(ctx.rows)
        out.index_add_(0, place[own], gradient.reshape(len(flat), -1)[own])
        return out, None, None, None


class _Linear(torch.autograd.Function):
    """``table @ weight`` with gradient to the weight and to the fresh rows."""

    @staticmethod
    def forward(ctx, fresh: Tensor, table: Tensor, items: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(table, items, weight)
        return table @ weight

    @staticmethod
    def backward(ctx, gradient: Tensor):
        table, items, weight = ctx.saved_tensors
        to_fresh = gradient[items] @ weight.t() if ctx.needs_input_grad[0] else None
        to_weight = table.t() @ gradient if ctx.needs_input_grad[3] else None
        return to_fresh, None, None, to_weight


class _Whole(torch.autograd.Function):
    """The table itself, for operations that have no sparse form."""

    @staticmethod
    def forward(ctx, fresh: Tensor, table: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(items)
        return table.view_as(table)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (items,) = ctx.saved_tensors
        return gradient[items], None, None


class LiveTable(torch.Tensor):
    """A feature table [I, F] of which the rows `items` (sorted) are the values of `fresh` [b, F], a leaf that collects their gradient.

    The caller has written the values of `fresh` into the table.
    """

    @staticmethod
    def __new__(cls, table: Tensor, items: Tensor, fresh: Tensor):
        self = torch.Tensor._make_subclass(cls, table)
        self.table, self.rows, self.fresh = table, items, fresh
        return self

    def whole(self) -> Tensor:
        """An ordinary tensor with gradient."""
        return _Whole.apply(self.fresh, self.table, self.rows)

    def pick(self, index: Tensor) -> Tensor:
        """Rows by number, of any shape."""
        return _Rows.apply(self.fresh, self.table, self.rows, index)

    def times(self, weight: Tensor) -> Tensor:
        """Product with an ordinary matrix [F, d]."""
        return _Linear.apply(self.fresh, self.table, self.rows, weight)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if torch.is_grad_enabled():
            if isinstance(first, LiveTable) and (sparse := _SPARSE.get(func)):
                out = sparse(first, *args[1:], **kwargs)
                if out is not None:
                    return out
            if func is F.embedding and isinstance(args[1], LiveTable):
                return args[1].pick(first)
            if func is torch.addmm and isinstance(args[1], LiveTable) and not kwargs:
                return args[1].times(args[2]) + first
        plain = tree_map(lambda x: expand(x) if isinstance(x, LiveTable) else x, (args, kwargs))
        return func(*plain[0], **plain[1])


def _getitem(live: LiveTable, index):
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        return live.pick(index)
    if isinstance(index, slice) and index.stop is None and index.step in (None, 1) and index.start in (0, 1):
        return LiveTable(live.table[index], live.rows - index.start, live.fresh)  # row 0 is padding and never fresh
    return None


def _index_select(live: LiveTable, dim: int, index: Tensor):
    return live.pick(index) if dim == 0 else None


def _matmul(live: LiveTable, weight):
    ordinary = isinstance(weight, Tensor) and not isinstance(weight, LiveTable)
    return live.times(weight) if ordinary and weight.dim() == 2 else None


def _linear(live: LiveTable, weight: Tensor, bias: Tensor | None = None):
    out = live.times(weight.t())
    return out if bias is None else out + bias


def _normalize(live: LiveTable, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out=None):
    if out is not None or dim not in (1, -1):
        return None
    return LiveTable(F.normalize(live.table, p, dim, eps), live.rows, F.normalize(live.fresh, p, dim, eps))


#: operations on a table that have a form without a gradient of its size; they return None for arguments that have none
_SPARSE = {
    torch.Tensor.__getitem__: _getitem,
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    F.linear: _linear,
    F.normalize: _normalize,
}


def expand(live: LiveTable) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return live.whole() if torch.is_grad_enabled() else live.table
