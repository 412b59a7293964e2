r"""MMGCL: contrastive views of the multimodal user-item graph by dropping edges and by masking a modality.

Source: Z. Yi, X. Wang, I. Ounis, C. Macdonald, "Multi-modal Graph Contrastive Learning for Micro-video Recommendation", SIGIR 2022; official code zxy-ml84/MMGCL at c867f4a
(only its path for two modalities can run).

Differences from the official code; ``published: True`` gives its losses back:

- Both views enter the loss: CE(u1 i1') + CE(u2 i2'). There the second term repeats the first view, so that modality masking and challenging negatives change no gradient.
- Each user's own challenging negative is one more column of the softmax. There its loss is computed and left out of the sum.
- Masking a modality encodes that channel on a graph without some nodes; when *textual* is drawn the official code also swaps the visual and the textual channel. Not so here.
- The part of a challenging negative that comes from the other item is drawn at random for the edge view; there it is always the last modality.
- Any set of modalities: the official code needs exactly visual and textual. A modality is drawn with the weights ``mask_weights`` of those present.
- Scores for all items (there is no such method there) are dot products.
- ``resample: epoch`` draws the perturbed graphs once per epoch (as SGL does) instead of for every batch.

Shapes: B batch, U users, I items (row 0 padding), d embedding_size, C = 1 + number of modalities, F_m raw width of modality m.
"""

import torch
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_mm.errors import UserError, nearest
from recbole_mm.layer.contrastive import bpr, info_nce
from recbole_mm.layer.fusion import ChannelEncoder, FixedGraphEncoder
from recbole_mm.layer.graph import BipartiteGraph, BipartiteOperator, unit_rows
from recbole_mm.model.base import MultimodalRecommender

TASKS = ("ED", "MM", "ED+MM", "ED+MM+CN")
RESAMPLE = ("batch", "epoch")


class MMGCL(MultimodalRecommender):
    r"""Channels :math:`H^c = \mathrm{LightGCN}([E_u; X_c])`, :math:`u = W_U [H^{id}_u, H^v_u, \ldots]`, :math:`i = W_I [\ldots]`, trained with

    .. math:: \mathcal L = \mathrm{BPR} + \alpha \big(\mathrm{CE}(u_1 i_1^\top / \tau) + \mathrm{CE}(u_2 i_2^\top / \tau)\big)

    View 1 encodes all channels on a graph with dropped edges, view 2 one drawn modality on a graph with dropped nodes and the others on the full one; their vectors have unit length.
    A challenging negative of (i, j) mixes channels of both items before :math:`W_I`.
    """

    input_type = InputType.PAIRWISE
    modality_order = ("visual", "acoustic", "textual")
    parallel = "rows"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        dim = config["embedding_size"]
        self.n_layers = config["n_layers"]
        self.ssl_temperature = config["ssl_temperature"]
        self.ssl_weight = config["ssl_weight"]
        self.dropout_rate = config["dropout_rate"]
        self.task = _choice("ssl_task", config["ssl_task"], TASKS)
        self.resample = _choice("resample", config["resample"], RESAMPLE)
        self.published = config["published"]
        if self.published and self.task == "MM":
            raise UserError(
                "ssl_task: MM has no published form (the official code returns nothing for it); set published: False or another task."
            )
        names = self.features.keys()
        given = config["mask_weights"] or {}
        weights = torch.tensor([float(given.get(name, 1.0)) for name in names])
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise UserError(f"mask_weights: expected weights >= 0, at least one above 0 among {', '.join(names)}, got {given}.")
        self.register_buffer("mask_weights", weights, persistent=False)

        self.graph = BipartiteGraph.from_matrix(dataset.inter_matrix(form="coo"), self.device)
        self.operator = self.graph.operator("sym")
        self.channels = ChannelEncoder(self.n_users, self.n_items, self.features, dim).to(self.device)
        self.encode = FixedGraphEncoder(self.channels, self.operator, self.n_layers)
        width = dim * (1 + len(names))
        self.read_user = nn.Linear(width, dim)
        self.read_item = nn.Linear(width, dim)
        self._drawn: dict | None = None

    def before_epoch(self, epoch: int) -> None:
        """With ``resample: epoch``, the first batch draws the perturbed graphs for all."""
        self._drawn = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, d] and every item vector [I, d]."""
        users, items = self.encode()
        return self.read_user(users), self.read_item(items)

    def calculate_loss(self, interaction) -> Tensor:
        """BPR over (user, positive, sampled negative) plus the weighted contrastive loss; a scalar."""
        user, user_of = interaction[self.USER_ID].unique(return_inverse=True)
        item, item_of = torch.cat([interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]]).unique(return_inverse=True)
        pos_of, neg_of = item_of.chunk(2)
        full = self.encode(user, item)
        u = self.read_user(full[0])[user_of]
        i, j = self.read_item(full[1])[item_of].chunk(2)
        ranking = bpr((u * i).sum(1), (u * j).sum(1), 1e-5)
        if self.resample == "batch" or self._drawn is None:
            self._drawn = self.draw()
        views = self.views(full, self._drawn, user, item)
        return ranking + self.ssl_weight * self.contrastive_loss(views, user_of, pos_of, neg_of)

    # the perturbed graphs

    def draw(self) -> dict:
        """Perturbed operators and, for masking, the modality (its position among the modalities)."""
        edges, drawn = self.graph.keep_edges, {}
        if "ED" in self.task:
            drawn["ED"] = self.graph.operator("sym", edges(self.dropout_rate))
        if self.published:  # masking never reaches the published loss; its task ED contrasts two edge-dropout graphs
            if self.task == "ED":
                drawn["ED2"] = self.graph.operator("sym", edges(self.dropout_rate))
        elif "MM" in self.task:
            drawn["MM"] = self.graph.operator("sym", self.graph.keep_nodes(self.dropout_rate))
            drawn["modality"] = int(torch.multinomial(self.mask_weights, 1))
        return drawn

    def views(
        self, full: tuple[Tensor, Tensor], drawn: dict, user_rows: Tensor | None = None, item_rows: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Channels (users [P, C d], items [Q, C d]) of every drawn graph, for the given distinct rows or all; `full` are those of the full graph."""
        inputs, rows = self.channels.items(), (user_rows, item_rows)
        views = {name: self.channels(drawn[name], self.n_layers, inputs, *rows) for name in ("ED", "ED2") if name in drawn}
        if "MM" in drawn:
            views["MM"] = self.masked_channels(inputs, full, drawn["MM"], drawn["modality"], *rows)
        return views

    def masked_channels(
        self,
        inputs: list[Tensor],
        full,
        operator: BipartiteOperator,
        modality: int,
        user_rows: Tensor | None = None,
        item_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Channels with one modality encoded on the perturbed graph, the others as on the full one."""
        names, channel = self.features.keys(), modality + 1
        source = channel
        users, items = ([*side.chunk(len(inputs), 1)] for side in full)
        if self.published and names[modality] == "textual" and "visual" in names:
            source = names.index("visual") + 1  # the published swap: visual features fill the textual slot, textual ones the visual slot
            users[source], items[source] = users[channel], items[channel]
        users[channel], items[channel] = self.channels(operator, self.n_layers, [inputs[source]], user_rows, item_rows)
        return torch.cat(users, 1), torch.cat(items, 1)

    # the contrastive loss

    def composite(self, own: Tensor, other: Tensor, replaced: list[int]) -> Tensor:
        """Channels [P, C d] of challenging negatives: `own` with the channels in `replaced` from `other`."""
        parts = [*own.chunk(1 + len(self.features), 1)]
        foreign = other.chunk(len(parts), 1)
        for channel in replaced:
            parts[channel] = foreign[channel]
        return torch.cat(parts, 1)

    def view_loss(self, view: tuple[Tensor, Tensor], user: Tensor, pos: Tensor, neg: Tensor, replaced: list[int] | None) -> Tensor:
        """CE(u i' / tau) of one view over its batch rows, with challenging negatives if `replaced` says from which channels."""
        users, items = view
        user, user_of = user.unique(return_inverse=True)
        item, item_of = pos.unique(return_inverse=True)
        u = unit_rows(self.read_user(users[user]))
        i = unit_rows(self.read_item(items[item]))
        extra = None
        if replaced is not None:
            n = unit_rows(self.read_item(self.composite(items[pos], items[neg], replaced)))
            extra = (u[user_of] * n).sum(1)
        return info_nce(u, i, self.ssl_temperature, user_of, item_of, extra)

    def contrastive_loss(self, views: dict[str, tuple[Tensor, Tensor]], user: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """Sum over the views of the task; in the published form twice the edge view, or two edge views. `user`, `pos`, `neg` [B] are rows of the views."""
        if self.published:
            first = self.view_loss(views["ED"], user, pos, neg, None)
            return first + self.view_loss(views["ED2"], user, pos, neg, None) if "ED2" in views else 2 * first
        modalities, challenge, total = len(self.features), "CN" in self.task, 0.0
        if "ED" in views:
            replaced = [1 + int(torch.randint(modalities, (1,)))] if challenge else None
            total = self.view_loss(views["ED"], user, pos, neg, replaced)
        if "MM" in views:
            total = total + self.view_loss(views["MM"], user, pos, neg, [*range(1, 1 + modalities)] if challenge else None)
        return total


def _choice(key: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UserError(f"{key}: expected one of {', '.join(known)}, got {value!r}.{nearest(value, known)}")
    return value
