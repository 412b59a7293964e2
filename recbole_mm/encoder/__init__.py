"""Encoders: name -> class, imported on demand; open_clip, transformers and timm are only imported by those who use them."""

import importlib
from collections.abc import Mapping

from recbole_mm.errors import UserError, nearest

#: what the key `encoder_class` of a property file may name
ENCODERS = {
    "classic": ("recbole_mm.encoder.classic", "ClassicEncoder"),
    "clip": ("recbole_mm.encoder.clip", "CLIPEncoder"),
    "cnn": ("recbole_mm.encoder.cnn", "CNNEncoder"),
    "sentence": ("recbole_mm.encoder.sentence", "SentenceEncoder"),
    "vlmo": ("recbole_mm.encoder.vlmo", "VLMoEncoder"),
}


def build_encoder(name: str, settings: Mapping):
    """Build the encoder `name` (a file in ``properties/encoder/``) from its settings.

    Args:
        name: as in ``--encoder``; `settings` may name the class under ``encoder_class`` when the file has a name of its own.
        settings: keys of the property file.

    Raises:
        UserError: for an unknown name.
    """
    kind = settings.get("encoder_class") or name
    if kind not in ENCODERS:
        raise UserError(f"Unknown encoder {kind!r}.{nearest(kind, ENCODERS)} There are {', '.join(ENCODERS)}.")
    module, class_name = ENCODERS[kind]
    return getattr(importlib.import_module(module), class_name)(settings)
