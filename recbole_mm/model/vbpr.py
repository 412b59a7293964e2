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
    parallel = "rows"

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

    def _raw(self, items: Tensor | None) -> list[Tensor]:
        """Features of `items` [n], or of all, one [n, F_m] per modality."""
        tables = [table if items is None else table.index_select(0, items) for table in self.features.values()]
        return [functional.normalize(table, dim=-1) for table in tables] if self.normalize_features else tables

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Vectors of `items` [n], or of all, [n, 2d] (with ``use_bias`` [n, 2d + 1])."""
        ids = self.item_embedding if items is None else self.item_embedding.index_select(0, items)
        weight, projected = self.project.weight, self.project.bias
        if self.use_bias:  # the bias is one more column of the map
            bias = self.item_bias if items is None else self.item_bias[items]
            weight = torch.cat([weight, self.feature_bias.unsqueeze(0)])
            projected = torch.cat([projected.expand(len(ids), -1), bias.unsqueeze(-1)], dim=-1)
        # The map of the concatenated features is the sum of one map for each modality; nothing is concatenated.
        for raw, part in zip(self._raw(items), weight.split(list(self.features.dims.values()), dim=1)):
            projected = projected + functional.linear(raw, part)
        return torch.cat([ids, projected], dim=-1)

    def user_vectors(self, users: Tensor | None = None) -> Tensor:
        """Vectors of `users` [n], or of all, [n, 2d] (with ``use_bias`` a column of ones that picks the item's bias up)."""
        vectors = self.user_embedding if users is None else self.user_embedding.index_select(0, users)
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=-1) if self.use_bias else vectors

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, 2d] and every item vector [I, 2d]."""
        return self.user_vectors(), self.item_vectors()

    def calculate_loss(self, interaction) -> Tensor:
        """BPR over (user, positive, sampled negative) plus the regulariser; a scalar."""
        user = self.user_vectors(interaction[self.USER_ID])
        # A batch names many items twice; each is projected once.
        distinct, place = torch.unique(torch.cat([interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]]), return_inverse=True)
        positive, negative = self.item_vectors(distinct).index_select(0, place).chunk(2)
        difference = (user * (positive - negative)).sum(-1)
        ranking = self.bpr_loss(difference, torch.zeros_like(difference))
        if self.use_bias:  # biases and the column of ones stay out of the regulariser
            user, positive, negative = user[:, :-1], positive[:, :-1], negative[:, :-1]
        return ranking + self.reg_weight * self.reg_loss(user, positive, negative).squeeze()
