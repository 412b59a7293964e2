r"""LATTICE: item-item graphs mined from features, learned with the recommender, on top of user-item propagation.

Source: J. Zhang, Y. Zhu, Q. Liu, S. Wu, S. Wang, L. Wang, "Mining Latent Structures for Multimedia Recommendation", ACM MM 2021; official code CRIPAC-DIG/LATTICE at
1b72fe7, toolbox port MMRec at e775373 (same forward pass; batches by interaction as here, by user in the official code).

Differences from the official code:

- Sparse throughout: the k neighbours of each item are selected blockwise without gradient, only their similarities are computed with it. Same values and gradients as the
  dense code, memory linear in items. Above ``knn_exact_limit`` items the selection goes through an approximate index (faiss).
- Initial graphs are computed from the features at hand; there they are cached on disk under dataset and k, so that exchanged features keep the old graph.
- Zero feature rows give no edges (there: NaN in every item vector); the padding item is not part of the graph; ties go to the smaller item id; rows whose similarities sum to
  nothing positive get no edges.
- Both codes were written for torch < 2, where ``zero_grad`` left zeros, so that Adam kept moving the graph's parameters by momentum through the epoch although only the first
  batch gives them a gradient. ``graph_momentum`` keeps that; without it they learn about six times slower.
- Feature copies are trained as there unless ``freeze_features``; they give way to the feature bank when an encoder is trained end to end.
- Any number of modalities, with weights that start equal (one modality has no weight). ``cf_model: ngcf`` keeps d in all layers.
- ``weight_size`` is ``n_ui_layers``: only its length mattered.

Shapes: B batch, U users, I items (row 0 padding), d embedding_size, k neighbours, M modalities, F_m raw width of modality m.
"""

import torch
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn.functional import dropout, leaky_relu

from recbole_mm.distributed import sum_rows
from recbole_mm.errors import UserError, nearest
from recbole_mm.layer.contrastive import bpr
from recbole_mm.layer.graph import (
    BipartiteGraph,
    SparsePattern,
    approximate_cosine_neighbours,
    cosine_neighbours,
    lightgcn,
    neighbour_similarities,
    pick,
    symmetric_scaling,
    unit_rows,
)
from recbole_mm.model.base import MultimodalRecommender

CF_MODELS = ("lightgcn", "mf", "ngcf")


class LATTICE(MultimodalRecommender):
    r"""BPR on :math:`s_{ui} = z_u^\top (z_i + h_i / \|h_i\|)` with z from the user-item graph :math:`(D+I)^{-1}(A+I)` and h from the item graph:

    .. math::
        h = S^{L} E_i, \qquad S = (1-\lambda)\,\mathrm{sym}\Big(\sum_m w_m K_m\Big) + \lambda \sum_m w_m O_m, \qquad w = \mathrm{softmax}(\omega)

    :math:`K_m` holds the k largest cosine similarities per row of the mapped features, :math:`O_m` the same of the raw ones, normalised by row sums on both sides. S is
    rebuilt with gradient on the first batch of an epoch and constant after it; evaluation rebuilds it.
    """

    input_type = InputType.PAIRWISE
    modality_order = ("visual", "textual", "acoustic")
    parallel = "rows"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        dim = config["embedding_size"]
        self.n_layers = config["n_layers"]
        self.n_ui_layers = config["n_ui_layers"]
        self.k = config["knn_k"]
        self.original_share = config["lambda_coeff"]
        self.reg_weight = config["reg_weight"]
        self.batch_size = config["train_batch_size"]
        self.exact_limit = config["knn_exact_limit"]
        self.graph_momentum = config["graph_momentum"]
        self.message_dropout = config["message_dropout"]
        self.cf_model = config["cf_model"]
        if self.cf_model not in CF_MODELS:
            raise UserError(f"cf_model: expected one of {', '.join(CF_MODELS)}, got {self.cf_model!r}.{nearest(self.cf_model, CF_MODELS)}")
        learned = not config["freeze_features"] and config["encoder_training"] != "end2end"

        graph = BipartiteGraph.from_matrix(dataset.inter_matrix(form="coo"), self.device)
        self.operator = graph.operator("row_loop")
        self.user_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.n_users, dim)))
        self.item_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.n_items, dim)))
        self.feature_copies = nn.ParameterList(table.clone() for table in self.features.values()) if learned else None
        self.project = nn.ModuleList(nn.Linear(width, config["feat_embed_dim"]) for width in self.features.dims.values())
        self.modal_weight = nn.Parameter(torch.full((len(self.features),), 1 / len(self.features))) if len(self.features) > 1 else None
        if self.cf_model == "ngcf":
            self.message = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.n_ui_layers))
            self.interaction = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.n_ui_layers))

        self._original = [self._graph(table[1:], self._neighbours(table[1:].detach())) for table in self.features.values()]
        self._pattern: tuple[tuple, list[Tensor], SparsePattern, Tensor] | None = None  # of the weights in its first entry
        self._constant = None  # item operator for the rest of the epoch

    def before_epoch(self, epoch: int) -> None:
        """The next batch rebuilds the item graph with gradient."""
        self._constant = None

    # the item graph

    def _neighbours(self, x: Tensor) -> Tensor:
        """k nearest rows [I - 1, k] of the real items' features x [I - 1, F]; indices count from the first real item."""
        if len(x) > self.exact_limit:
            return approximate_cosine_neighbours(x, self.k)
        return cosine_neighbours(x, self.k)

    @staticmethod
    def _graph(x: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised graph of the raw features: neighbours and values, both [I - 1, k]."""
        return neighbours, symmetric_scaling(neighbours, neighbour_similarities(x.detach(), neighbours))

    def mapped_features(self) -> list[Tensor]:
        """Features of the real items after the learned maps, each [I - 1, feat_embed_dim]."""
        tables = self.feature_copies if self.feature_copies is not None else self.features.values()
        return [project(table[1:]) for project, table in zip(self.project, tables)]

    def _weights_state(self) -> tuple:
        """Changes whenever a tensor changes on which the choice of neighbours depends."""
        tables = self.feature_copies if self.feature_copies is not None else self.features.values()
        return tuple((id(t), t.data_ptr(), t._version) for t in (*tables, *self.project.parameters()))

    def learned_graphs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Neighbours and similarities [I - 1, k] of each modality's learned graph, before normalisation; selected anew only when the weights have moved."""
        mapped = self.mapped_features()
        state = self._weights_state()
        if self._pattern is None or self._pattern[0] != state:
            neighbours = [self._neighbours(x.detach()) for x in mapped]
            self._pattern = (state, neighbours, *self._merged_pattern(neighbours))
        neighbours = self._pattern[1]
        return neighbours, [neighbour_similarities(x, n) for x, n in zip(mapped, neighbours)]

    def _merged_pattern(self, neighbours: list[Tensor]) -> tuple[SparsePattern, Tensor]:
        """Union of all learned and original graphs in item ids, and for each of their entries (graph by graph) its place in it."""
        every = torch.cat([*neighbours, *(n for n, _ in self._original)], 1) + 1
        row = torch.arange(1, self.n_items, device=every.device)[:, None].expand_as(every)
        keys, place = (row * self.n_items + every).flatten().unique(return_inverse=True)
        row = torch.div(keys, self.n_items, rounding_mode="floor")
        return SparsePattern(row, keys - row * self.n_items, (self.n_items, self.n_items)), place

    def item_graph(self) -> tuple[SparsePattern, Tensor]:
        """S as a pattern over item ids (the padding item has no entry) and its values, with gradient."""
        neighbours, similarities = self.learned_graphs()
        pattern, place = self._pattern[2:]
        weights = [1.0] if self.modal_weight is None else self.modal_weight.softmax(0).unbind()
        weighted = torch.cat([w * s for w, s in zip(weights, similarities)], 1)
        learned = symmetric_scaling(torch.cat(neighbours, 1), weighted)
        original = [w * values for w, (_, values) in zip(weights, self._original)]
        values = torch.cat([(1 - self.original_share) * learned, *(self.original_share * o for o in original)], 1)
        return pattern, values.new_zeros(len(pattern)).index_add(0, place, values.flatten())

    # vectors and loss

    def propagate(self, user_rows: Tensor | None = None, item_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: vectors of the user-item part for the given distinct users and items, or all."""
        users, items = self.user_embedding, self.item_embedding
        if self.cf_model == "mf":
            return pick(users, user_rows), pick(items, item_rows)
        if self.cf_model == "lightgcn":
            return lightgcn(self.operator, users, items, self.n_ui_layers, user_rows, item_rows)
        layers = [(users, items)]
        for message, interaction in zip(self.message, self.interaction):
            sides = zip((users, items), self.operator(users, items))
            new = [leaky_relu(message(side)) + leaky_relu(interaction(ego * side)) for ego, side in sides]
            users, items = (dropout(x, self.message_dropout, self.training) for x in new)
            layers.append((unit_rows(users), unit_rows(items)))
        means = (torch.stack(side).mean(0) for side in zip(*layers))
        return tuple(pick(x, rows) for x, rows in zip(means, (user_rows, item_rows)))

    def item_part(self, product, item_rows: Tensor | None = None) -> Tensor:
        """h of all items, `product` being the multiplication with S, or of the rows `item_rows` where `product` is a SparseOperator."""
        h = self.item_embedding
        for step in range(self.n_layers):
            if step == self.n_layers - 1 and item_rows is not None:
                return product.rows(item_rows)(h)
            h = product(h)
        return pick(h, item_rows)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, d] and every item vector [I, d] from the item graph of the current weights."""
        pattern, values = self.item_graph()
        users, items = self.propagate()
        return users, items + unit_rows(self.item_part(lambda h: pattern.product(values, h)))

    def calculate_loss(self, interaction) -> Tensor:
        """BPR over (user, positive, sampled negative) plus L2 on the vectors used, over the configured batch size; a scalar."""
        user, user_of = interaction[self.USER_ID].unique(return_inverse=True)
        item, item_of = torch.cat([interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]]).unique(return_inverse=True)
        if self._constant is None:
            pattern, values = self.item_graph()
            h = pick(self.item_part(lambda x: pattern.product(values, x)), item)
            self._constant = pattern.operator(values)
        else:
            h = self.item_part(self._constant, item)
            self._keep_momentum()
        users, items = self.propagate(user, item)
        users, items = users[user_of], (items + unit_rows(h))[item_of]
        pos, neg = items.chunk(2)
        ranking = bpr((users * pos).sum(1), (users * neg).sum(1))
        return ranking + self.reg_weight * 0.5 * sum_rows(users.pow(2).sum() + items.pow(2).sum()) / self.batch_size

    def _keep_momentum(self) -> None:
        """Give the graph's parameters a zero gradient on batches that have none for them, so that the optimizer's momentum goes on."""
        if self.graph_momentum and self.training:
            for parameter in (
                *(self.feature_copies or ()),
                *self.project.parameters(),
                *([] if self.modal_weight is None else [self.modal_weight]),
            ):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
