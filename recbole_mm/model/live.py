"""Rows of a feature table that carry gradient, without a copy of the table and without a gradient of its size.

In end-to-end training a step encodes the items of its batch; all other rows of the table are constants. :class:`LiveTable` looks like the
table to a model. Indexing and linear maps of it send gradient to the fresh rows alone; any other operation sees an ordinary tensor whose
gradient is computed whole and then reduced to the fresh rows.
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

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LiveTable) and torch.is_grad_enabled():
            if func is torch.Tensor.__getitem__ and is_index(args[1]):
                return _Rows.apply(first.fresh, first.table, first.rows, args[1])
            if func in (F.linear, torch.nn.functional.linear) and not isinstance(args[1], LiveTable):
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                out = _Linear.apply(first.fresh, first.table, first.rows, args[1].t())
                return out if bias is None else out + bias
            if func in MATMUL and len(args) == 2 and type(args[1]) is not LiveTable and args[1].dim() == 2:
                return _Linear.apply(first.fresh, first.table, first.rows, args[1])
            if func is torch.index_select or func is torch.Tensor.index_select:
                if args[1] == 0:
                    return _Rows.apply(first.fresh, first.table, first.rows, args[2])
        if func is F.embedding and isinstance(args[1], LiveTable) and torch.is_grad_enabled():
            live = args[1]
            return _Rows.apply(live.fresh, live.table, live.rows, first)
        plain = tree_map(lambda x: expand(x) if isinstance(x, LiveTable) else x, (args, kwargs))
        return func(*plain[0], **plain[1])


MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


def is_index(index) -> bool:
    """Whether `index` is a tensor of row numbers."""
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


def expand(live: LiveTable) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return live.whole() if torch.is_grad_enabled() else live.table
