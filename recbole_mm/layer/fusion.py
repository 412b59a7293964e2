"""Item channels: the id embedding and one linear map per modality, side by side, with one user table."""

import torch
from torch import Tensor, nn

from recbole_mm.layer.graph import BipartiteOperator, lightgcn_shared_users, pick, spread, unit_rows


class OfTable:
    """A function of a feature table, computed again only when the table has changed (or is being learned)."""

    def __init__(self, table_of, function):
        self._table_of, self._function = table_of, function  # table_of: a function, so that a bank whose tables are replaced is followed
        self._cached: tuple[Tensor, int, object] | None = None

    def __call__(self):
        table = self._table_of()
        if table.requires_grad:
            return self._function(table)
        if self._cached is None or self._cached[0] is not table or self._cached[1] != table._version:
            with torch.no_grad():
                self._cached = (table, table._version, self._function(table))
        return self._cached[2]


def unit_features(table_of) -> OfTable:
    """Rows of a feature table scaled to unit length."""
    return OfTable(table_of, unit_rows)


class ChannelEncoder(nn.Module):
    """User table [U, d], item table [I, d] and a map to d of each modality's unit-length features, propagated as channels of one matrix.

    Args:
        n_users, n_items: sizes with padding. features: mapping modality -> [I, F_m] in channel order. dim: width d.
    """

    def __init__(self, n_users: int, n_items: int, features, dim: int):
        super().__init__()
        self.user_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_users, dim)))
        self.item_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_items, dim)))
        self.project = nn.ModuleList(nn.Linear(width, dim) for width in features.dims.values())
        self.names = ["id", *features.keys()]
        self._tables = [lambda name=name: features[name] for name in features.keys()]
        self._unit = [unit_features(table) for table in self._tables]

    def items(self) -> list[Tensor]:
        """Item inputs of the channels, each [I, d], the id channel first."""
        return [self.item_embedding, *(project(unit()) for project, unit in zip(self.project, self._unit))]

    def unit_features(self) -> list[Tensor]:
        """The scaled feature tables, one for each modality."""
        return [unit() for unit in self._unit]

    def forward(
        self,
        operator: BipartiteOperator,
        n_layers: int,
        items: list[Tensor] | None = None,
        user_rows: Tensor | None = None,
        item_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """LightGCN vectors of every channel side by side: users [U, C d], items [I, C d].

        Args:
            items: replaces the channels' inputs.
            user_rows, item_rows: distinct ids; only these rows are computed and returned.
        """
        inputs = torch.cat(self.items() if items is None else items, 1)
        return lightgcn_shared_users(operator, self.user_embedding, inputs, n_layers, user_rows, item_rows)


class FixedGraphEncoder:
    r"""The same vectors on a graph that never changes, with the features propagated once and for all.

    The pass is linear: :math:`\mathrm{LightGCN}([0; XW^\top + b]) = \mathrm{LightGCN}([0; X])\,W^\top + \mathrm{LightGCN}([0; 1])\,b`. As long as a feature table is constant
    and no wider than `limit` times d, and its propagated form (U + I rows) no larger than `most_bytes`, that form is kept and a batch maps only the rows it needs; other
    tables are mapped first and propagated.
    """

    def __init__(self, encoder: ChannelEncoder, operator: BipartiteOperator, n_layers: int, limit: int = 16, most_bytes: int = 1 << 29):
        self.encoder, self.operator, self.n_layers = encoder, operator, n_layers
        self.limit, self.most_bytes = limit, most_bytes
        self._propagated = [OfTable(table, self._propagate) for table in encoder._tables]
        start = encoder.item_embedding.new_ones(len(encoder.item_embedding), 1).detach()
        self._ones = spread(operator, start, n_layers, from_users=False)

    def _propagate(self, table: Tensor) -> tuple[Tensor, Tensor]:
        return spread(self.operator, unit_rows(table), self.n_layers, from_users=False)

    def __call__(self, user_rows: Tensor | None = None, item_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Users [P, C d] and items [Q, C d] of the given distinct rows, or of all."""
        e, rows = self.encoder, (user_rows, item_rows)
        shared = spread(self.operator, e.user_embedding, self.n_layers, True, *rows)
        channels = [spread(self.operator, e.item_embedding, self.n_layers, False, *rows)]
        for project, propagated, table in zip(e.project, self._propagated, e._tables):
            raw = table()
            size = 4 * raw.shape[1] * (len(e.user_embedding) + len(e.item_embedding))
            if raw.requires_grad or raw.shape[1] > self.limit * project.out_features or size > self.most_bytes:
                mapped = project(unit_rows(raw))
                channels.append(spread(self.operator, mapped, self.n_layers, False, *rows))
            else:
                weight, bias = project.weight.T, project.bias
                channels.append([pick(x, r) @ weight + pick(one, r) * bias for x, one, r in zip(propagated(), self._ones, rows)])
        return tuple(torch.cat([x + own for x in side], 1) for own, side in zip(shared, zip(*channels)))
