r"""MMGCN: one graph network per modality on the user-item graph, averaged.

Source: Y. Wei, X. Wang, L. Nie, X. He, R. Hong, T.-S. Chua, "MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video",
ACM MM 2019; official code weiyinwei/MMGCN at a643673, toolbox port MMRec at e775373 (identical but for the modalities and the evaluation).

Differences from the official code:

- Id embeddings and user preferences are trained, as the paper intends; there they are plain tensors that no optimizer sees and no checkpoint holds.
  ``frozen_id: True`` keeps them at their random start (saved with the checkpoint, which theirs are not).
- Evaluation uses vectors of the current weights; theirs are those of the last training batch, before the optimizer step.
- ``n_layers`` and ``combination`` are obeyed; there three layers and concatenation always happen (an option that is the *string* 'False' counts as true).
- Any set of modalities. Which of them get a linear map to ``latent_dim`` before the graph, and the penalty on their preference table, is a setting
  (``latent_modalities``; there: visual, width 256).
- log sigmoid instead of the logarithm of a sigmoid, which overflows. Modalities are averaged as in the code (the paper sums them).

Shapes: B batch, U users, I items (row 0 padding), d embedding_size, w width of a branch (latent_dim or F_m), F_m raw width of modality m.
"""

import torch
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn.functional import leaky_relu_, linear

from recbole_mm.layer.contrastive import bpr
from recbole_mm.layer.fusion import unit_features
from recbole_mm.layer.graph import BipartiteGraph, BipartiteOperator, SparseOperator, pick, unit_rows
from recbole_mm.model.base import MultimodalRecommender


class MMGCN(MultimodalRecommender):
    r"""BPR on the mean of the branches' vectors, with E_id shared by all branches and layers.

    .. math::
        x_0 = [\hat Q; \hat F], \quad c_k = D^{-1}A\, x_{k-1} W_k, \quad h_k = \rho(c_k), \quad
        \hat x_k = \rho(G_k x_{k-1}) + E_{id}, \quad x_k = \rho(g_k [h_k, \hat x_k])

    with :math:`\rho` the leaky ReLU; with ``combination: add``, :math:`x_k = \rho(g_k h_k + \hat x_k)`.
    """

    input_type = InputType.PAIRWISE
    modality_order = ("visual", "acoustic", "textual")
    parallel = "rows"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.dim = config["embedding_size"]
        self.reg_weight = config["reg_weight"]
        frozen = config["frozen_id"]
        latent = set(config["latent_modalities"] or ())

        graph = BipartiteGraph.from_matrix(dataset.inter_matrix(form="coo"), self.device)
        self.operator = graph.operator("row")
        start = nn.init.xavier_normal_(torch.empty(self.n_users + self.n_items, self.dim))
        self.user_embedding = nn.Parameter(start[: self.n_users].clone(), requires_grad=not frozen)
        self.item_embedding = nn.Parameter(start[self.n_users :].clone(), requires_grad=not frozen)
        self.branches = nn.ModuleList(
            Branch(
                self.n_users,
                width,
                self.dim,
                config["n_layers"],
                config["latent_dim"] if name in latent else None,
                config["combination"] == "concat",
                frozen,
                unit_features(lambda name=name: self.features[name]),
                lambda name=name: self.features[name],
            )
            for name, width in self.features.dims.items()
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, d] and every item vector [I, d]."""
        return self.vectors()

    def vectors(self, users: Tensor | None = None, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors of the given users [P] and items [Q], or of all; the last layer is computed for those only."""
        ids = self.user_embedding, self.item_embedding
        last = None
        if users is not None:
            last = BipartiteOperator(self.operator.to_users.rows(users), self.operator.to_items.rows(items))
        outputs = [branch(self.operator, *ids, last, users, items)[-1] for branch in self.branches]
        return tuple(torch.stack(side).mean(0) for side in zip(*outputs))

    def calculate_loss(self, interaction) -> Tensor:
        """BPR over (user, positive, sampled negative) plus the regulariser; a scalar."""
        user, pos, neg = interaction[self.USER_ID], interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]
        users, user_of = user.unique(return_inverse=True)
        items, item_of = torch.cat([pos, neg]).unique(return_inverse=True)
        users, items = self.vectors(users, items)
        u, (i, j) = users[user_of], items[item_of].chunk(2)
        return bpr((u * i).sum(1), (u * j).sum(1)) + self.reg_weight * self.regulariser(user, pos, neg)

    def regulariser(self, user: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        r""":math:`[2\sum\|E_u\|^2 + \sum\|E_i\|^2 + \sum\|E_j\|^2] / (2 B d)` plus the mean square of each mapped branch's preferences."""
        squares = 2 * self.user_embedding[user].pow(2).sum() + self.item_embedding[torch.cat([pos, neg])].pow(2).sum()
        preferences = [_MeanSquare.apply(branch.preference) for branch in self.branches if branch.mlp is not None]
        return squares / (2 * len(user) * self.dim) + sum(preferences)


class _MeanSquare(torch.autograd.Function):
    """Mean of the squared entries without row 0, the padding; one pass over the table each way, where autograd takes six."""

    @staticmethod
    def forward(ctx, table):
        ctx.save_for_backward(table)
        return torch.linalg.vector_norm(table[1:]).square() / table[1:].numel()

    @staticmethod
    def backward(ctx, grad):
        (table,) = ctx.saved_tensors
        out = table * (2 * grad / table[1:].numel())
        out[0] = 0
        return out


class Branch(nn.Module):
    """The graph network of one modality.

    Args:
        n_users: with padding. width: raw width F. dim: d. n_layers: at least 1. latent_dim: width of the linear map before the graph, None for none.
        concat: combine by concatenation. frozen: the preference table is not trained.
        unit_features, features: functions that give the scaled and the raw table [I, F].
    """

    def __init__(self, n_users, width, dim, n_layers, latent_dim, concat, frozen, unit_features, features):
        super().__init__()
        self._unit_features, self._features = unit_features, features
        self.mlp = None if latent_dim is None else nn.Linear(width, latent_dim)
        first = width if latent_dim is None else latent_dim
        widths = [first] + [dim] * (n_layers - 1)
        self.concat = concat
        self.preference = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_users, first)), requires_grad=not frozen)
        self.conv = nn.ParameterList(nn.init.xavier_normal_(torch.empty(w, w)) for w in widths)
        self.self_map = nn.ModuleList(nn.Linear(w, dim) for w in widths)
        self.combine = nn.ModuleList(nn.Linear(w + dim if concat else w, dim) for w in widths)
        for layer in [*self.self_map, self.combine[0]]:
            nn.init.xavier_normal_(layer.weight)

    def forward(
        self,
        operator: BipartiteOperator,
        id_users: Tensor,
        id_items: Tensor,
        last: BipartiteOperator | None = None,
        users: Tensor | None = None,
        items: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """(users, items) after each layer; the last one only for the rows `users` and `items`, those of the operator `last`, if given."""
        outputs = []
        for k in range(len(self.conv)):
            limited = last is not None and k == len(self.conv) - 1
            step, rows = (last, (users, items)) if limited else (operator, (None, None))
            if k == 0:
                x_users, (message_users, own_items) = unit_rows(self.preference), self._item_input()
                to_users, own_items = step.to_users(message_users), pick(own_items, rows[1])
            else:
                x_users, x_items = outputs[-1]
                to_users, own_items = self._messages(step.to_users, x_items, k), self.self_map[k](pick(x_items, rows[1]))
            to_items, own_users = self._messages(step.to_items, x_users, k), self.self_map[k](pick(x_users, rows[0]))
            outputs.append(
                (
                    self._combined(k, to_users, own_users, pick(id_users, rows[0])),
                    self._combined(k, to_items, own_items, pick(id_items, rows[1])),
                )
            )
        return outputs

    def _messages(self, operator: SparseOperator, x: Tensor, k: int) -> Tensor:
        """D^-1 A x W_k, the map on the side with fewer rows."""
        return operator(x) @ self.conv[k] if operator.matrix.shape[0] < len(x) else operator(x @ self.conv[k])

    def _item_input(self) -> tuple[Tensor, Tensor]:
        """x_0 W_1 [I, w] and G_1 x_0 [I, d] of the items.

        With the linear map before the graph, x_0 = (X M' + b) / |X M' + b|: the maps that follow are multiplied into M first, so that the
        raw features, which are narrower and need no gradient, are what the large products see.
        """
        maps = self.conv[0], self.self_map[0].weight.T
        if self.mlp is None:
            unit = self._unit_features()
            message, own = (unit @ after for after in maps)
        else:
            raw, weight, bias = self._features(), self.mlp.weight, self.mlp.bias
            if raw.shape[1] < len(weight):
                # |X M' + b|^2 = x' M'M x + 2 x' M'b + b'b, without the wide product
                square = (raw @ (weight.T @ weight) * raw).sum(1, keepdim=True) + raw @ (2 * weight.T @ bias)[:, None] + bias @ bias
                inverse = square.clamp_min(1e-24).rsqrt()
                message, own = (torch.addmm(bias @ after, raw, weight.T @ after) * inverse for after in maps)
            else:
                latent = self.mlp(raw)
                inverse = 1 / latent.norm(dim=1, keepdim=True).clamp_min(1e-12)
                message, own = (latent @ after * inverse for after in maps)
        return message, own + self.self_map[0].bias

    def _combined(self, k: int, aggregated: Tensor, own: Tensor, ids: Tensor) -> Tensor:
        """x_k from the aggregated messages c_k, G_k x_{k-1} and the ids; the product with [h, x] is split instead of concatenating."""
        h, own, layer = leaky_relu_(aggregated), leaky_relu_(own) + ids, self.combine[k]
        if not self.concat:
            return leaky_relu_(layer(h) + own)
        weight_h, weight_own = layer.weight.split([h.shape[1], own.shape[1]], 1)
        return leaky_relu_(torch.addmm(linear(h, weight_h, layer.bias), own, weight_own.T))
