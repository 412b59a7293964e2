r"""VBPR: matrix factorisation whose item vectors carry a linear map of the item's features.

Source: R. He, J. McAuley, "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback", AAAI 2016. The default is the form that
multimodal comparisons publish under this name (MMRec toolbox): every modality concatenated, one shared user table for both halves.

Differences from the paper: no item bias and no visual bias unless ``use_bias``; the map has a bias; several modalities instead of
pictures alone; the regulariser is the sum of un-squared Frobenius norms of the batch's vectors over the batch size (MMRec) and includes
the projected half. Difference from MMRec: the loss is a scalar (there a one-element vector), and only the items of the batch are projected.

Shapes: B batch, U users, I items (row 0 padding), d embedding_size, F sum of all feature widths.
"""

import torch
from recbole.model.init import xavier_normal_initialization
from recbole.model.loss import BPRLoss, EmbLoss
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional

from recbole_mm.model.base import MultimodalRecommender


class VBPR(MultimodalRecommender):
    r"""BPR on :math:`s_{ui} = \gamma_u^\top p_i + \theta_u^\top (E f_i + b)` with :math:`f_i` the concatenation of all feature rows.

    With ``use_bias`` the item bias :math:`\beta_i` and the feature bias :math:`{\beta'}^\top f_i` of the paper are added.
    """

    input_type = InputType.PAIRWISE
    modality_order = ("textual", "visual", "acoustic")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        dim = config["embedding_size"]
        self.reg_weight = config["reg_weight"]
        self.use_bias = config["use_bias"]
        self.normalize_features = config["normalize_features"]

        width = sum(self.features.dims.values())
        self.user_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.n_users, 2 * dim)))
        self.item_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.n_items, dim)))
        self.project = nn.Linear(width, dim)
        self.project.apply(xavier_normal_initialization)
        if self.use_bias:
            self.item_bias = nn.Parameter(torch.zeros(self.n_items))
            self.feature_bias = nn.Parameter(torch.zeros(width))
        self.bpr_loss = BPRLoss()
        self.reg_loss = EmbLoss()

    def _raw(self, items: Tensor | None) -> Tensor:
        """Concatenated features of `items` [n], or of all, [n, F]."""
        tables = [table if items is None else table[items] for table in self.features.values()]
        if self.normalize_features:
            tables = [functional.normalize(table, dim=-1) for table in tables]
        return torch.cat(tables, dim=-1)

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Vectors of `items` [n], or of all, [n, 2d] (with ``use_bias`` [n, 2d + 1])."""
        raw = self._raw(items)
        ids = self.item_embedding if items is None else self.item_embedding[items]
        parts = [ids, self.project(raw)]
        if self.use_bias:
            bias = self.item_bias if items is None else self.item_bias[items]
            parts.append((bias + raw @ self.feature_bias).unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def user_vectors(self, users: Tensor | None = None) -> Tensor:
        """Vectors of `users` [n], or of all, [n, 2d] (with ``use_bias`` a column of ones that picks the item's bias up)."""
        vectors = self.user_embedding if users is None else self.user_embedding[users]
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=-1) if self.use_bias else vectors

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, 2d] and every item vector [I, 2d]."""
        return self.user_vectors(), self.item_vectors()

    def calculate_loss(self, interaction) -> Tensor:
        """BPR over (user, positive, sampled negative) plus the regulariser; a scalar."""
        pos, neg = interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]
        user = self.user_vectors(interaction[self.USER_ID])
        positive, negative = self.item_vectors(torch.cat([pos, neg])).split([len(pos), len(neg)])
        ranking = self.bpr_loss((user * positive).sum(-1), (user * negative).sum(-1))
        own = slice(None, 2 * self.item_embedding.shape[1])  # biases and the column of ones stay out of the regulariser
        return ranking + self.reg_weight * self.reg_loss(user[:, own], positive[:, own], negative[:, own]).squeeze()
