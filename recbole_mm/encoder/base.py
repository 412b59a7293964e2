"""What every encoder offers: pictures and texts of items in, one feature row per item and modality out."""

from collections.abc import Mapping

from PIL import Image
from torch import Tensor, nn


class Encoder(nn.Module):
    """Base of the encoders.

    Args:
        settings: the keys of ``properties/encoder/<name>.yaml``.

    Attributes:
        name: as in ``--encoder``.
        modalities: what it can give: textual, visual, joint.
        feature_dims: modality -> width F.
    """

    name: str = "encoder"
    modalities: tuple[str, ...] = ()
    feature_dims: dict[str, int] = {}

    def __init__(self, settings: Mapping):
        super().__init__()
        self.settings = dict(settings)

    def fit(self, content) -> None:
        """Learn from the whole catalogue what is needed before the first item: a vocabulary, a projection. Nothing by default."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """One picture -> input tensor."""
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts -> input tensor [B, ...]."""
        raise NotImplementedError

    def encode(self, images: Tensor | None = None, texts: Tensor | None = None) -> dict[str, Tensor]:
        """Prepared pictures and texts [B, ...] -> {modality: [B, F]} for the modalities given."""
        raise NotImplementedError

    def fingerprint(self) -> dict:
        """Plain values that name weights, preprocessing and choice of feature; they stand in ``meta.json``."""
        return {"encoder": self.name}
