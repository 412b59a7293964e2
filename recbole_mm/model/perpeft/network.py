r"""The arithmetic of PerPEFT-SASRec, free of settings and data sets: items as each group sees them, sequences, loss, scores.

Shapes: I items (row 0 is padding), B users, T positions, D width, F width of the encoder's features, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recbole_mm import distributed
from recbole_mm.layer.adapter import Projector
from recbole_mm.layer.sasrec import SequenceEncoder, xavier_normal_matrices


class GroupedSASRec(nn.Module):
    r"""SASRec over item vectors :math:`r_i^{(g)} = w\, P_g(f_g(i)) + E_i` that depend on the user's group g.

    f_g is the encoder with the adapter of group g, P_g the group's projector, E the item table that all groups share; the padding item
    has the zero vector as its feature, in training and in evaluation.

    Args:
        encoder: ``encoder(items [n], group) -> [n, F]`` for distinct real items, with ``out_features`` = F.
        n_items: I.
        n_groups: G.
        max_length: T.
        dim, n_layers, n_heads, hidden_dropout, attention_dropout, mask_padding: see `SequenceEncoder`.
        weight: w.
        l2_emb: weight of the Euclidean norm (not squared) of E in the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_items: int,
        n_groups: int,
        max_length: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        hidden_dropout: float,
        attention_dropout: float,
        weight: float = 0.5,
        l2_emb: float = 0.0,
        mask_padding: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        self.weight, self.l2_emb = weight, l2_emb
        self.item_embedding = nn.Embedding(n_items, dim, padding_idx=0)
        self.sequence = SequenceEncoder(max_length, dim, n_layers, n_heads, hidden_dropout, attention_dropout, mask_padding)
        xavier_normal_matrices(self.item_embedding)
        xavier_normal_matrices(self.sequence)
        self.projectors = nn.ModuleList(Projector(encoder.out_features, dim) for _ in range(n_groups))
        self.register_buffer("centre", None)
        self.register_buffer("spread", None)

    @torch.no_grad()
    def standardise(self) -> None:
        """From now on the projectors see every feature less its mean over the items, divided by its deviation, as the encoder gives it today.

        The features of a contrastive encoder lie in a narrow cone: what all items share is many times larger than what tells them apart, and
        the projector's norms, which work within an item, keep it so.
        """
        self.encoder.eval()
        items = torch.arange(1, self.item_embedding.num_embeddings, device=self.item_embedding.weight.device)
        features = self.encoder(items, 0)
        self.centre, self.spread = features.mean(0), features.std(0).clamp(min=1e-6)
        self.encoder.train(self.training)

    def project(self, features: Tensor, group: int) -> Tensor:
        """Features [n, F] of real items -> their projections below that of padding, [1 + n, D]."""
        if self.centre is not None:
            features = (features - self.centre) / self.spread
        return self.projectors[group](torch.cat((features.new_zeros(1, features.shape[1]), features)))

    def item_vectors(self, items: Tensor, group: int) -> Tensor:
        """Vectors of any ids, padding and repetitions included: [...] -> [..., D]; each distinct item is encoded once."""
        distinct, place = torch.cat((items.new_zeros(1), items.flatten())).unique(return_inverse=True)
        projected = self.project(self.encoder(distinct[1:], group), group)
        vectors = self.weight * projected + self.item_embedding(distinct)
        return vectors[place[1:]].unflatten(0, items.shape)

    @torch.no_grad()
    def item_table(self, group: int, together: bool = False) -> Tensor:
        """Every item as group `group` sees it, [I, D], the catalogue encoded once; `together`, each process encodes a part of it."""
        items = torch.arange(1, self.item_embedding.num_embeddings, device=self.item_embedding.weight.device)
        if together and len(items) >= distributed.world()[1] ** 2:  # nobody's part is empty
            features = distributed.gather(self.encoder(items[distributed.own_part(len(items))], group))
        else:
            features = self.encoder(items, group)
        return self.weight * self.project(features, group) + self.item_embedding.weight

    def loss_terms(self, sequence: Tensor, positive: Tensor, negative: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Binary cross entropies of positives and of negatives, summed over the positions that have a positive (0 is none)."""
        length = sequence.shape[1]
        vectors = self.item_vectors(torch.cat((sequence, positive, negative), dim=1), group)
        state = self.sequence(vectors[:, :length], sequence == 0)
        real = positive > 0
        return tuple(
            nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="sum")
            for target, logits in (
                (1.0, (state * vectors[:, length : 2 * length]).sum(-1)[real]),
                (0.0, (state * vectors[:, 2 * length :]).sum(-1)[real]),
            )
        )

    def loss(self, sequence: Tensor, positive: Tensor, negative: Tensor, groups: Tensor) -> Tensor:
        r"""Mean over positions of both cross entropies plus :math:`\lambda \lVert E \rVert_F`; rows [B, T] may be of several `groups` [B]."""
        total = 0.0
        for group in groups.unique().tolist():
            rows = groups == group
            total = total + sum(self.loss_terms(sequence[rows], positive[rows], negative[rows], group))
        count = distributed.count_rows((positive > 0).sum())
        return distributed.sum_rows(total) / count.clamp(min=1) + self.l2_emb * self.item_embedding.weight.norm()

    def user_vectors(self, sequence: Tensor, groups: Tensor, table: Callable[[int], Tensor]) -> Tensor:
        """State at the last position [B, D]; ``table(group)`` gives the group's items [I, D]."""
        out = sequence.new_empty(len(sequence), self.item_embedding.embedding_dim, dtype=self.item_embedding.weight.dtype)
        for group in groups.unique().tolist():
            rows = groups == group
            out[rows] = self.sequence(table(group)[sequence[rows]], sequence[rows] == 0)[:, -1]
        return out

    @torch.no_grad()
    def copy_group(self, source: int, targets: list[int]) -> None:
        """Give the groups `targets` the adapter and the projector of group `source`."""
        for target in targets:
            self.projectors[target].load_state_dict(self.projectors[source].state_dict())
            self.encoder.copy_group(source, target)


def left_padded(sequence: Tensor) -> Tensor:
    """Move the zeros of each row [B, T] to its front, whichever side they are on; the order of the items stays."""
    order = (sequence != 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return sequence.gather(1, order)
