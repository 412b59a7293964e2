"""What encoders with learned weights have in common: their choice of feature, freezing, gradient checkpointing, saving."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from recbole_mm.encoder.base import Encoder
from recbole_mm.encoder.image import ImageTransform
from recbole_mm.errors import UserError

FEATURES = ("cls", "raw", "projected")
#: parts of parameter names that weight decay leaves alone
NO_DECAY = ("bias", "norm", "ln_", "logit_scale", "logit_vl_scale", "gamma_", "cls_token", "class_embedding", "position", "pos_embed")


class TrainableEncoder(Encoder):
    """An encoder whose network can be fine-tuned.

    Attributes:
        transform: how a picture becomes an input; None for text-only encoders.
        feature: cls (after the final norm), raw (before it) or projected (into the joint space, unit length).
    """

    transform: ImageTransform | None = None
    feature: str = "cls"

    def __init__(self, settings: Mapping):
        super().__init__(settings)
        self.feature = settings.get("feature") or "cls"
        if self.feature not in FEATURES:
            raise UserError(f"feature: expected one of {', '.join(FEATURES)}, got {self.feature!r}.")

    def preprocess(self, image: Image.Image) -> Tensor:
        """One picture -> float [3, S, S]."""
        return self.transform(image)

    def towers(self) -> list[list[nn.Module]]:
        """The network from below: for each tower its embedding, then its blocks."""
        raise NotImplementedError

    def freeze(self, blocks: int) -> None:
        """Keep the embedding and the lowest `blocks` blocks of every tower as they are; 0 keeps nothing."""
        if blocks <= 0:
            return
        for tower in self.towers():
            for module in tower[: blocks + 1]:
                for p in module.parameters():
                    p.requires_grad_(False)

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory: keep only the inputs of the blocks and run them again in the backward pass."""
        raise NotImplementedError

    def pair_features(self, images: Tensor, texts) -> tuple[Tensor, Tensor]:
        """Unit vectors of the joint space, pictures and texts, [B, E] each; what a contrastive loss compares."""
        raise UserError(f"{self.name} has no joint space of pictures and texts; `finetune` works with clip and vlmo.")

    #: id that stands for a word left out of a text in training
    blank = 0

    def is_word(self, ids: Tensor) -> Tensor:
        """Marks the ids that are word pieces, neither special nor padding."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the weights so that `pretrained: <folder>` loads them."""
        raise NotImplementedError

    def train(self, mode: bool = True):
        """Batch normalisation stays in evaluation mode: micro-batches of an encoder in training are too small for statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


def decay_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Two optimiser groups of what is trainable: matrices with weight decay; biases, norms, scales, positions without."""
    decayed, plain = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            exempt = p.dim() < 2 or any(part in name.lower() for part in NO_DECAY)
            (plain if exempt else decayed).append(p)
    groups = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
