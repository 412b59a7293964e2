r"""classic: features that need no downloaded weights, made of word statistics and of colours and edges.

Texts: TF-IDF, then truncated SVD (latent semantic analysis: S. Deerwester et al., JASIS 1990). Pictures: a histogram of hues weighted by
saturation, histograms of brightness, of edge directions on a grid (N. Dalal, B. Triggs, CVPR 2005) and of fine texture, then a projection
on the principal components of the catalogue, whitened. Both are scaled to length :math:`\sqrt F` (a column then has about unit variance):
beside id embeddings trained by the same optimizer, rows of unit length would hardly be learned from.

Shapes: B batch, D width of the raw picture description, F width of a feature.
"""

import json

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional

from recbole_mm.encoder.base import Encoder
from recbole_mm.errors import UserError

_SIDE = 64  # pixels to which a picture is brought; the histograms are made for it
_HUES, _LEVELS, _DIRECTIONS, _CELLS = 18, 8, 12, 4


def describe_picture(picture: Image.Image) -> np.ndarray:
    """Raw description of a picture, float32 [D]: square roots of the histograms named above."""
    picture = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    hsv = np.asarray(picture.convert("HSV"), np.float32) / 255
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    colours = np.bincount((hue.ravel() * _HUES).astype(int) % _HUES, (saturation * value).ravel(), _HUES)
    levels = np.concatenate([np.histogram(channel, _LEVELS, (0, 1))[0] for channel in (saturation, value)])
    grey = np.asarray(picture.convert("L"), np.float32) / 255
    dy, dx = np.gradient(grey)
    strength = np.hypot(dx, dy)
    direction = ((np.arctan2(dy, dx) % np.pi) / np.pi * _DIRECTIONS).astype(int) % _DIRECTIONS
    cell = np.arange(_SIDE) * _CELLS // _SIDE
    place = (cell[:, None] * _CELLS + cell[None, :]) * _DIRECTIONS + direction
    edges = np.bincount(place.ravel(), strength.ravel(), _CELLS * _CELLS * _DIRECTIONS)
    overall = edges.reshape(-1, _DIRECTIONS).sum(0)
    texture = np.abs(np.fft.rfft2(grey - grey.mean()))[: _SIDE // 2, : _SIDE // 2]  # place does not matter to its magnitude
    texture = texture.reshape(8, _SIDE // 16, 8, _SIDE // 16).sum((1, 3)).ravel()
    outline = np.abs(saturation * value).reshape(8, _SIDE // 8, 8, _SIDE // 8).mean((1, 3)).ravel()  # where the coloured object is
    parts = [colours, levels, edges, overall, texture, outline]
    return np.concatenate([np.sqrt(part / (part.sum() + 1e-6)) for part in parts]).astype(np.float32)


class ClassicEncoder(Encoder):
    """See the top of this file. :meth:`fit` learns vocabulary and projections from the catalogue; the seed is fixed, signs are too."""

    name = "classic"

    def __init__(self, settings):
        super().__init__(settings)
        self.text_dim = int(settings.get("encoder_text_dim") or 64)
        self.image_dim = int(settings.get("encoder_image_dim") or 64)
        self.max_vocabulary = int(settings.get("encoder_max_vocabulary") or 20_000)
        if min(self.text_dim, self.image_dim, self.max_vocabulary) < 1:
            raise UserError("classic: encoder_text_dim, encoder_image_dim and encoder_max_vocabulary must be at least 1.")
        self.feature_dims = {}
        self._words: TfidfVectorizer | None = None
        self._svd: TruncatedSVD | None = None

    def fit(self, content) -> None:
        """Learn from the texts and pictures of `content` (items 1 ..); items without one are left out, broken pictures too."""
        items = range(1, len(content.tokens))
        texts = sorted({text for text in content.texts(items) if text}) if content.has_texts else []
        self._fit_texts(texts)
        self._fit_pictures([content.image_path(item) for item in items if content.image_path(item) is not None])
        self.modalities = tuple(self.feature_dims)

    def _fit_texts(self, texts: list[str]) -> None:
        if not texts:
            return
        words = TfidfVectorizer(
            sublinear_tf=True, max_features=self.max_vocabulary, strip_accents="unicode", token_pattern=r"(?u)\b\w\w+\b"
        )
        try:
            table = words.fit_transform(texts)
        except ValueError:  # not one word of two letters in all texts
            return
        width = max(min(self.text_dim, min(table.shape) - 1), 1)
        self._words, self._svd = words, TruncatedSVD(width, random_state=0).fit(table)
        self.feature_dims["textual"] = width

    def _fit_pictures(self, paths) -> None:
        from recbole_mm.data.content import open_picture

        rows = []
        for path in paths:
            try:
                rows.append(describe_picture(open_picture(path)))
            except UserError:
                continue  # extract lists it in meta.json
        if not rows:
            return
        table = np.stack(rows).astype(np.float64)
        mean, spread = table.mean(0), table.std(0)
        spread[spread < 1e-6] = 1.0
        scaled = (table - mean) / spread
        values, vectors = np.linalg.eigh(scaled.T @ scaled / max(len(scaled) - 1, 1))
        order = np.argsort(values)[::-1][: max(min(self.image_dim, len(rows) - 1), 1)]
        vectors = vectors[:, order]
        vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])  # eigh leaves the sign open
        whiten = vectors / np.sqrt(np.maximum(values[order], 0) + 1e-2 * max(values[order[0]], 1e-6))
        self.register_buffer("_mean", torch.from_numpy(mean), persistent=False)
        self.register_buffer("_project", torch.from_numpy(whiten / spread[:, None]), persistent=False)
        self.feature_dims["visual"] = whiten.shape[1]

    def preprocess(self, image: Image.Image) -> Tensor:
        """One picture -> its raw description [D]."""
        return torch.from_numpy(describe_picture(image))

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts -> their coordinates in the latent space, float32 [B, F]."""
        if self._words is None:
            raise UserError("classic: no vocabulary was learned; the catalogue has no texts.")
        return torch.from_numpy(self._svd.transform(self._words.transform(texts)).astype(np.float32))

    def encode(self, images: Tensor | None = None, texts: Tensor | None = None) -> dict[str, Tensor]:
        out = {}
        if texts is not None:
            out["textual"] = functional.normalize(texts, dim=-1) * texts.shape[-1] ** 0.5
        if images is not None:
            rows = (images.double() - self._mean) @ self._project
            out["visual"] = (functional.normalize(rows, dim=-1) * rows.shape[-1] ** 0.5).float()
        return out

    def fingerprint(self) -> dict:
        return {
            "encoder": self.name,
            "version": 1,
            "text_dim": self.text_dim,
            "image_dim": self.image_dim,
            "max_vocabulary": self.max_vocabulary,
            "picture_side": _SIDE,
            "bins": json.dumps([_HUES, _LEVELS, _DIRECTIONS, _CELLS]),
        }
