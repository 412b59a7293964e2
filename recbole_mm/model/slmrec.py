r"""SLMRec: one LightGCN pass per modality, tied together by a chain of contrastive tasks.

Source: Z. Tao, X. Liu, Y. Xia, X. Wang, L. Yang, X. Huang, T.-S. Chua, "Self-supervised Learning for Multimedia Recommendation", IEEE TMM 2022;
official code zltao/SLMRec at 0c05a1d, toolbox port MMRec at e775373 (the form that multimodal tables publish).

Differences from the official code and the port:

- Evaluation uses vectors of the current weights; theirs are those before the last optimizer step, and prediction before the first batch fails.
- Scores are dot products, not their sigmoid: the same ranking without the ties that saturation makes.
- Any ordered list of modalities: the chain id -> first -> ... -> last runs over those present; the last step has width d // 2. The official code has exactly
  three, the port exactly two. With one modality the chain is that last step alone, from the id channel.
- No ``reg``: nobody reads it there. Decay of weights (1e-4) is the optimizer's ``weight_decay``.
- No negatives are drawn; the loss never used them. Batches are (user, item) pairs.
- The port's maps that no loss uses (``g_a_iva``) do not exist.
- Tasks FD and FM and the fusion by mean do not run in the port, and are not offered. The degree's 1e-8 is not added (invisible in float32).
- ``distinct_items`` (off) counts an item once in a batch's softmax, however often it occurs.

Shapes: B batch, U users, I items (row 0 padding), d embedding_size, C = 1 + number of modalities, F_m raw width of modality m.
"""

from recbole.utils import InputType
from torch import Tensor, nn

from recbole_mm.layer.contrastive import info_nce
from recbole_mm.layer.fusion import ChannelEncoder, FixedGraphEncoder
from recbole_mm.layer.graph import BipartiteGraph, unit_rows
from recbole_mm.model.base import MultimodalRecommender


class SLMRec(MultimodalRecommender):
    r"""Channels :math:`H^c = \mathrm{LightGCN}([E_u; X_c])` for ids and modalities, :math:`u = W_U [H^{id}_u, H^v_u, \ldots]`, :math:`i = W_I [\ldots]`.

    .. math::
        \mathcal L = \mathrm{CE}(\hat u \hat i^\top / \tau) + \alpha \sum_{s} \mathrm{CE}(q_s k_s^\top / \tau_s)

    The chain: queries :math:`q_0 = H^{id}_i, q_s = G_s q_{s-1}` against keys :math:`k_s = K_s H^{m_s}_i` over the items of the batch, all maps affine, nothing scaled
    to unit length.
    """

    input_type = InputType.POINTWISE
    modality_order = ("visual", "acoustic", "textual")
    parallel = "rows"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        dim = config["embedding_size"]
        self.n_layers = config["n_layers"]
        self.temperature = config["temperature"]
        self.ssl_temperature = config["ssl_temperature"]
        self.ssl_weight = config["ssl_weight"]
        self.distinct_items = config["distinct_items"]

        graph = BipartiteGraph.from_matrix(dataset.inter_matrix(form="coo"), self.device)
        self.operator = graph.operator(config["adjacency"])
        self.channels = ChannelEncoder(self.n_users, self.n_items, self.features, dim).to(self.device)
        self.encode = FixedGraphEncoder(self.channels, self.operator, self.n_layers)
        width = dim * (1 + len(self.features))
        self.read_user = nn.Linear(width, dim)
        self.read_item = nn.Linear(width, dim)
        self.query, self.key = _chain(len(self.features), dim)
        # a key's bias shifts a whole row of the softmax, so its gradient is zero by mathematics
        self.parameters_without_gradient = tuple(f"key.{s}.bias" for s in range(len(self.features)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, d] and every item vector [I, d]."""
        users, items = self.encode()
        return self.read_user(users), self.read_item(items)

    def calculate_loss(self, interaction) -> Tensor:
        """Main plus weighted chain loss of the batch's (user, item) pairs; a scalar. Everything after the propagation is done once per distinct user and item."""
        user, user_of = interaction[self.USER_ID].unique(return_inverse=True)
        item, item_of = interaction[self.ITEM_ID].unique(return_inverse=True)
        users, items = self.encode(user, item)
        main = self.main_loss(self.read_user(users), self.read_item(items), user_of, item_of, item)
        return main + self.ssl_weight * sum(self.chain_losses(items, item_of, item))

    def main_loss(self, users: Tensor, items: Tensor, user_of: Tensor, item_of: Tensor, ids: Tensor | None = None) -> Tensor:
        """InfoNCE from each pair's user to the items of the batch, on unit-length final vectors; `ids` are those of the distinct items."""
        vectors = unit_rows(users), unit_rows(items)
        return info_nce(*vectors, self.temperature, user_of, item_of, distinct=self.distinct_items, key_ids=ids)

    def chain_losses(self, items: Tensor, item_of: Tensor, ids: Tensor | None = None) -> list[Tensor]:
        """One InfoNCE for each modality, between the query passed on along the chain and that modality's key, from channels [P, C d] of distinct items."""
        first, *others = items.chunk(1 + len(self.features), dim=1)
        query, losses = first, []
        for step, key, channel in zip(self.query, self.key, others):
            query = step(query)
            losses.append(info_nce(query, key(channel), self.ssl_temperature, item_of, item_of, distinct=self.distinct_items, key_ids=ids))
        return losses


def _chain(steps: int, dim: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Query and key maps of a chain over `steps` modalities, all d -> d but for the last step, which ends in d // 2 (a chain of one step keeps d).

    The official chain has three places (visual, acoustic, textual); with two modalities the port leaves the middle place's query map in, so the last step is two maps.
    """
    half = dim // 2 if steps > 1 else dim
    last = nn.Sequential(nn.Linear(dim, dim), nn.Linear(dim, half)) if steps == 2 else nn.Linear(dim, half)
    query = nn.ModuleList([*(nn.Linear(dim, dim) for _ in range(steps - 1)), last])
    key = nn.ModuleList([*(nn.Linear(dim, dim) for _ in range(steps - 1)), nn.Linear(dim, half)])
    return query, key
