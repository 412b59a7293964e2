"""Item channels: the id embedding and one linear map per modality, side by side, with one user table."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from recbole_mm.layer.graph import BipartiteOperator, lightgcn_shared_users


class UnitFeatures:
    """Rows of a feature table scaled to unit length, computed again only when the table has changed (or is being learned)."""

    def __init__(self, table_of):
        self._table_of = table_of  # a function, so that a bank whose tables are replaced is followed
        self._cached: tuple[Tensor, int, Tensor] | None = None

    def __call__(self) -> Tensor:
        table = self._table_of()
        if table.requires_grad:
            return normalize(table, dim=1)
        if self._cached is None or self._cached[0] is not table or self._cached[1] != table._version:
            self._cached = (table, table._version, normalize(table, dim=1))
        return self._cached[2]


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
        self._unit = [UnitFeatures(lambda name=name: features[name]) for name in features.keys()]

    def items(self) -> list[Tensor]:
        """Item inputs of the channels, each [I, d], the id channel first."""
        return [self.item_embedding, *(project(unit()) for project, unit in zip(self.project, self._unit))]

    def unit_features(self) -> list[Tensor]:
        """The scaled feature tables, one for each modality."""
        return [unit() for unit in self._unit]

    def forward(self, operator: BipartiteOperator, n_layers: int, items: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """LightGCN vectors of every channel side by side: users [U, C d], items [I, C d]; `items` replaces the channels' inputs."""
        inputs = torch.cat(self.items() if items is None else items, 1)
        return lightgcn_shared_users(operator, self.user_embedding, inputs, n_layers)
