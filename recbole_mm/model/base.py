"""What every general multimodal model has in common."""

from collections.abc import Iterable, Sequence

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from torch import Tensor

from recbole_mm.model.bank import build_bank


def order_modalities(names: Iterable[str], canonical: Sequence[str] | None) -> list[str]:
    """Put `names` into a model's canonical order; names it does not know follow in the order given.

    >>> order_modalities(["acoustic", "smell", "visual"], ("visual", "acoustic", "textual"))
    ['visual', 'acoustic', 'smell']
    """
    names = list(names)
    first = [name for name in canonical or () if name in names]
    return first + [name for name in names if name not in first]


class MultimodalRecommender(GeneralRecommender):
    """Base of the general models: gives ``self.features`` and derives every prediction from :meth:`forward`.

    A model writes ``__init__``, ``forward() -> (users [U, D], items [I, D])`` and ``calculate_loss``; if it needs them ``before_epoch``
    and ``parameter_groups``. Scores are dot products. Vectors used at evaluation are computed once and dropped by ``train()``, so they
    are never older than the weights.

    Args:
        config: the run's settings.
        dataset: the training part; its ``features`` is a mapping modality -> tensor [n_items, F_m] with a zero row 0.

    Raises:
        UserError: when the dataset has no item features.
    """

    #: canonical order of modalities (the order of concatenations and chains); the user's list only selects
    modality_order: tuple[str, ...] | None = None
    #: a run makes the feature set of its encoder first when it is missing
    uses_features = True
    #: a model that needs its own dataset class or trainer names it here
    dataset_class: type | None = None
    trainer_class: type | str | None = None
    #: how several processes share a batch (see `recbole_mm.trainer.parallel`). "rows" says that the loss is a mean over the rows of the batch,
    #: with terms that are not written with the functions of `recbole_mm.distributed`; None lets every process compute whole batches
    parallel: str | None = None

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.features = build_bank(config, dataset, lambda names: order_modalities(names, self.modality_order)).to(self.device)
        self._evaluation_vectors: tuple[Tensor, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return every user vector [U, D] and every item vector [I, D], padding rows included."""
        raise NotImplementedError

    def before_epoch(self, epoch: int) -> None:
        """Called before each training epoch (first epoch: 0), after a resume too; nothing by default."""

    def parameter_groups(self) -> list[dict]:
        """Optimizer groups; a group may set its own ``lr`` and ``weight_decay``. One group with everything trainable by default."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def train(self, mode: bool = True):
        self._evaluation_vectors = None
        return super().train(mode)

    def evaluation_vectors(self) -> tuple[Tensor, Tensor]:
        """:meth:`forward` without gradient, computed once per evaluation."""
        if self.training:
            with torch.no_grad():
                return self.forward()
        if self._evaluation_vectors is None:
            with torch.no_grad():
                self._evaluation_vectors = self.forward()
        return self._evaluation_vectors

    def load_state_dict(self, *args, **kwargs):
        self._evaluation_vectors = None
        return super().load_state_dict(*args, **kwargs)

    def predict(self, interaction) -> Tensor:
        """Scores of the given (user, item) pairs, [B]."""
        users, items = self.evaluation_vectors()
        return (users[interaction[self.USER_ID]] * items[interaction[self.ITEM_ID]]).sum(-1)

    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of the given users with every item, flattened to [B * I] as RecBole wants them."""
        users, items = self.evaluation_vectors()
        return (users[interaction[self.USER_ID]] @ items.T).view(-1)
