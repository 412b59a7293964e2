"""Texts through a sentence encoder: mean of the token vectors of a transformers model, the textual half of the modality-specific baseline.

Source: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019; the default is the MiniLM that sentence-transformers publishes (width 384).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.encoder.clip import warn_random
from recbole_mm.encoder.trainable import TrainableEncoder
from recbole_mm.encoder.weights import hub_or_path, missing_weights
from recbole_mm.encoder.wordpiece import WordPieces
from recbole_mm.errors import UserError


class SentenceEncoder(TrainableEncoder):
    """Mean pooling over real tokens, unit length unless ``encoder_normalize`` is off.

    Settings: ``pretrained`` name or folder of a Hugging Face model, or null (a random BERT of ``encoder_sizes`` with a vocabulary learned
    from the catalogue); ``encoder_text_length`` tokens including the two special ones; ``encoder_normalize``.
    """

    name = "sentence"
    modalities = ("textual",)

    def __init__(self, settings: Mapping):
        super().__init__(settings)
        if self.feature != "cls":
            raise UserError(f"feature: the sentence encoder has one vector, cls (the pooled one), got {self.feature!r}.")
        from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

        self.pretrained = settings.get("pretrained")
        self.normalize = bool(settings.get("encoder_normalize", True))
        self.tokenizer, self.pieces, self.vocab_limit = None, None, settings.get("encoder_vocab_size") or 8192
        if self.pretrained:
            source = hub_or_path(self.pretrained)
            if source is None:
                url = f"https://huggingface.co/{self.pretrained} (config.json, model.safetensors, tokenizer files)"
                raise missing_weights(f"sentence {self.pretrained}", url, str(self.pretrained))
            self.network = AutoModel.from_pretrained(source)
            if (Path(source) / "vocab.txt").is_file() and not (Path(source) / "tokenizer_config.json").is_file():
                self.pieces = WordPieces.load(str(Path(source) / "vocab.txt"))  # written by `save`
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(source)
        else:
            warn_random("sentence")
            sizes = dict(settings.get("encoder_sizes") or {"width": 384, "layers": 6, "heads": 12})
            config = BertConfig(
                vocab_size=self.vocab_limit,
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                intermediate_size=4 * sizes["width"],
            )
            self.network = BertModel(config, add_pooling_layer=False)
        limit = getattr(self.network.config, "max_position_embeddings", None) or 512
        self.text_length = min(settings.get("encoder_text_length") or 256, limit)
        self.feature_dims = {"textual": self.network.config.hidden_size}

    @property
    def pad(self) -> int:
        return self.pieces.pad if self.tokenizer is None else self.tokenizer.pad_token_id

    def fit(self, content) -> None:
        """Learn the vocabulary from the catalogue's texts for a network with random weights."""
        if self.tokenizer is None and self.pieces is None:
            self.pieces = WordPieces.learn(content.texts(range(1, len(content.tokens))), self.vocab_limit)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids [B, L], padded on the right."""
        if self.tokenizer is None:
            if self.pieces is None:
                raise UserError("sentence: no vocabulary was learned yet; call fit(content), or set pretrained.")
            return self.pieces(texts, self.text_length)
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_length, "return_tensors": "pt"}
        return self.tokenizer(list(texts), padding_side="right", **options)["input_ids"]

    def encode(self, images=None, texts: Tensor | None = None) -> dict[str, Tensor]:
        """Ids [B, L] -> {textual: [B, F]}."""
        mask = texts != self.pad
        length = max(int(mask.sum(dim=1).max()), 1)
        texts, mask = texts[:, :length], mask[:, :length]
        tokens = self.network(input_ids=texts, attention_mask=mask.long()).last_hidden_state
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return {"textual": F.normalize(pooled, dim=-1) if self.normalize else pooled}

    def towers(self) -> list[list[nn.Module]]:
        return [[self.network.embeddings, *self.network.encoder.layer]]

    def set_checkpointing(self, on: bool) -> None:
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.network.gradient_checkpointing_disable()

    def save(self, folder: Path) -> None:
        """Hugging Face layout."""
        folder = Path(folder)
        self.network.save_pretrained(folder)
        if self.tokenizer is None:
            self.pieces.save(folder / "vocab.txt")
        else:
            self.tokenizer.save_pretrained(folder)

    def fingerprint(self) -> dict:
        config = self.network.config.to_dict()
        return {
            "encoder": self.name,
            "pretrained": self.pretrained,
            "sizes": json.loads(json.dumps({k: config.get(k) for k in ("hidden_size", "num_hidden_layers", "vocab_size")})),
            "text_length": self.text_length,
            "normalize": self.normalize,
        }
