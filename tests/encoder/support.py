"""A catalogue in memory and a tiny encoder, for tests of encoders, fine-tuning and end-to-end training."""

import warnings

import numpy as np
import torch
from PIL import Image

WORDS = ["red", "green", "blue", "shirt", "mug", "lamp", "cotton", "steel", "wood"]
TINY_CLIP = {
    "encoder_library": "open_clip",
    "encoder_sizes": {
        "joint_width": 16, "width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 16,
        "text_width": 16, "text_layers": 2, "text_heads": 2, "context": 12,
    },
    "pretrained": None,
    "feature": "cls",
}  # fmt: skip
TINY_VLMO = {
    "encoder_variant": "tiny", "encoder_image_size": 32, "encoder_text_length": 10, "encoder_tokenizer": None,
    "encoder_vocab_size": 200, "pretrained": None, "feature": "cls",
}  # fmt: skip


class Catalogue:
    """Stands in for ItemContent: item i has the colour of taste i % 3 as picture and as word.

    Args:
        items: number of items.
        without_picture, without_text: ids of items that lack it.
        edge: edge of the pictures.
    """

    has_images, has_texts = True, True

    def __init__(self, items: int = 24, without_picture=(), without_text=(), edge: int = 16, seed: int = 0):
        self.tokens = ["[PAD]", *(f"item{i}" for i in range(1, items + 1))]
        self.without_picture, self.without_text = set(without_picture), set(without_text)
        draw = np.random.default_rng(seed)
        self.pixels = draw.integers(0, 60, (items + 1, edge, edge, 3)).astype(np.uint8)
        for i in range(items + 1):
            self.pixels[i, :, :, i % 3] += 150

    def text(self, i: int) -> str:
        return "" if i in self.without_text else f"{WORDS[i % 3]} {WORDS[3 + i % 2]} {WORDS[6 + i % 3]}"

    def texts(self, ids) -> list[str]:
        return [self.text(int(i)) for i in ids]

    def image_path(self, i: int):
        return None if i in self.without_picture else f"{self.tokens[i]}.png"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[int(i)])

    def image_tensor(self, items, transform) -> torch.Tensor:
        return torch.stack([transform.resize(self.image(i)) for i in items])


def quiet(function, *args, **kwargs):
    """Call without the warnings about random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args, **kwargs)


def encode_catalogue(encoder, content, modality: str) -> torch.Tensor:
    """Features of every item that has the content, one at a time, in evaluation mode: the slow, certain way."""
    encoder.eval()
    rows = []
    with torch.no_grad():
        for i in range(1, len(content.tokens)):
            images = encoder.preprocess(content.image(i))[None]
            texts = encoder.tokenize([content.text(i)])
            rows.append(encoder.encode(images if modality != "textual" else None, texts if modality != "visual" else None)[modality][0])
    return torch.stack(rows)
