"""A catalogue as input of an encoder in training: pictures and token ids of given items, on the training device."""

import numpy as np
import torch
from torch import Tensor

from recbole_mm.encoder.trainable import TrainableEncoder


class CatalogueInputs:
    """Pictures and texts of items by id, prepared for one encoder.

    Pictures come resized from the content's uint8 cache on disk and are normalised on the device; texts are tokenised once. Memory that
    grows with the catalogue: the token ids, in 32 bits.

    Args:
        encoder: says how to resize, normalise and tokenise; its ``fit`` has been called.
        content: pictures and texts of the catalogue (``ItemContent``).
        device: where batches go.
    """

    def __init__(self, encoder: TrainableEncoder, content, device: torch.device | str = "cpu"):
        self.encoder, self.content, self.device = encoder, content, torch.device(device)
        n = len(content.tokens)
        self.has_image = torch.zeros(n, dtype=torch.bool)
        self.has_text = torch.zeros(n, dtype=torch.bool)
        if "visual" in encoder.modalities and content.has_images:
            self.has_image[1:] = torch.tensor([content.image_path(i) is not None for i in range(1, n)], dtype=torch.bool)
        self._tokens: Tensor | None = None
        if "textual" in encoder.modalities and content.has_texts:
            texts = content.texts(range(1, n))
            self.has_text[1:] = torch.tensor([bool(t.strip()) for t in texts], dtype=torch.bool)
            self._tokens = self._tokenize(texts)

    def _tokenize(self, texts: list[str]) -> Tensor:
        """Ids [n, L] in 32 bits, row 0 for the padding item."""
        rows = [self.encoder.tokenize([""])]
        rows += [self.encoder.tokenize(texts[i : i + 1024]) for i in range(0, len(texts), 1024)]
        return torch.cat(rows).to(torch.int32)

    def has(self, modality: str) -> Tensor:
        """Marks the items whose content `modality` needs, bool [n]."""
        return {"visual": self.has_image, "textual": self.has_text}.get(modality, self.has_image & self.has_text)

    def images(self, items: Tensor) -> Tensor:
        """Normalised pictures, [b, 3, S, S]."""
        pixels = self.content.image_tensor(items.tolist(), self.encoder.transform)
        pixels = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        return self.encoder.transform.normalize(pixels.to(self.device))

    def texts(self, items: Tensor) -> Tensor:
        """Token ids, int64 [b, L]."""
        return self._tokens[items.cpu()].to(self.device, torch.long)
