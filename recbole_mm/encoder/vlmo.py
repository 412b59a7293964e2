"""The VLMo encoder: one transformer for pictures, texts and both together; the network itself is in vlmo_module.py.

Feature (recorded in meta.json): ``cls`` the class token after the final norm, ``raw`` before it, ``projected`` through the contrastive
head with unit length. With ``encoder_joint`` a third modality ``joint`` comes from picture and text in one sequence: its text class token
(``cls``, ``raw``) or the tanh-pooled vector of the matching head (``projected``).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from recbole_mm.encoder.clip import warn_random
from recbole_mm.encoder.image import ImageTransform
from recbole_mm.encoder.trainable import TrainableEncoder
from recbole_mm.encoder.vlmo_module import VLMo, VLMoSizes, load_vlmo, sizes_for
from recbole_mm.encoder.weights import find_weights, missing_weights, read_tensors
from recbole_mm.encoder.wordpiece import WordPieces, trim_padding
from recbole_mm.errors import UserError
from recbole_mm.files import write_json

SOURCE = "https://github.com/microsoft/unilm/tree/master/vlmo (section Pre-trained models)"
OWN_CONFIG = "vlmo_config.json"


class VLMoEncoder(TrainableEncoder):
    """VLMo base, base_plus, large, or tiny (ours, for training from random weights).

    Settings: ``encoder_variant``, ``pretrained`` (released file by name or path, a folder written by `save`, or null), ``feature``,
    ``encoder_joint``, ``encoder_image_size``, ``encoder_text_length``, ``encoder_tokenizer`` (published name or vocab.txt; null: learned
    from the catalogue, with ``encoder_vocab_size``), ``encoder_drop_path``.
    """

    name = "vlmo"

    def __init__(self, settings: Mapping):
        super().__init__(settings)
        pretrained = settings.get("pretrained")
        path = find_weights(pretrained)
        own = path is not None and (path / OWN_CONFIG).is_file()
        tokenizer = settings.get("encoder_tokenizer")
        self.vocab_limit = settings.get("encoder_vocab_size") or 30522
        if own:
            sizes = VLMoSizes(**json.loads((path / OWN_CONFIG).read_text(encoding="utf-8")))
            tokenizer = str(path / "vocab.txt")
        else:
            sizes = sizes_for(
                settings.get("encoder_variant") or "base_plus",
                image_size=settings.get("encoder_image_size"),
                text_length=settings.get("encoder_text_length"),
                drop_path=settings.get("encoder_drop_path"),
                vocab_size=self.vocab_limit if tokenizer is None else None,
            )
        if pretrained and path is None:
            raise missing_weights(f"VLMo {settings.get('encoder_variant') or 'base_plus'}", SOURCE, str(pretrained))
        self.network = VLMo(sizes)
        self.sizes = sizes
        self.pieces = None if tokenizer is None else WordPieces.load(tokenizer)
        self.joint = bool(settings.get("encoder_joint"))
        self.pretrained = pretrained
        self.missing: list[str] = []
        if path is not None:
            file = path / "model.safetensors" if own else path
            self.missing = load_vlmo(self.network, read_tensors(file), str(file))
        else:
            warn_random("vlmo")
        self._check_heads()
        self.modalities = ("textual", "visual", "joint") if self.joint else ("textual", "visual")
        self.feature_dims = dict.fromkeys(self.modalities, sizes.width)
        self.transform = ImageTransform(sizes.image_size, (0.5,) * 3, (0.5,) * 3, mode="squash")

    def _check_heads(self) -> None:
        """A file without the head or experts that the chosen feature reads would give random features: stop."""
        needed = ()
        if self.feature == "projected":
            needed = ("itc_text_proj.", "itc_image_proj.", "pooler.") if self.joint else ("itc_text_proj.", "itc_image_proj.")
        absent = [k for k in self.missing if k.startswith(needed)] if needed else []
        absent += [k for k in self.missing if ".mlp_vl." in k or ".norm2_vl." in k] if self.joint else []
        if absent:
            raise UserError(
                f"{self.pretrained} holds no {absent[0]}, which feature={self.feature}{' with encoder_joint' if self.joint else ''} reads. "
                "Take a file of the image-text stage (vlmo_*_patch16_224.pt), or set feature: cls and encoder_joint: false."
            )

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.network.logit_scale

    def fit(self, content) -> None:
        """Learn the vocabulary from the catalogue's texts when none was named."""
        if self.pieces is None:
            self.pieces = WordPieces.learn(content.texts(range(1, len(content.tokens))), self.vocab_limit)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids [B, L], padded."""
        if self.pieces is None:
            raise UserError("vlmo: encoder_tokenizer is null and no vocabulary was learned yet; call fit(content), or name a vocabulary.")
        return self.pieces(texts, self.sizes.text_length)

    def encode(self, images: Tensor | None = None, texts: Tensor | None = None) -> dict[str, Tensor]:
        """Pictures [B, 3, S, S] and ids [B, L] -> features [B, D]; both together also give ``joint`` when it is switched on."""
        out = {}
        if texts is not None:
            texts = trim_padding(texts, self.pieces.pad)
            mask = (texts != self.pieces.pad).long()
            out["textual"] = self._pick(self.network.text(texts, mask))
        if images is not None:
            images = images.to(self.weight_dtype)
            out["visual"] = self._pick(self.network.image(images))
        if self.joint and images is not None and texts is not None:
            both = self.network.joint(images, texts, mask)
            out["joint"] = {"cls": both["raw_cls_feats"], "raw": both["hidden"][-1][:, 0], "projected": both["cls_feats"]}[self.feature]
        return out

    def _pick(self, out: dict) -> Tensor:
        return {"cls": out["feats"][:, 0], "raw": out["raw_cls_feats"], "projected": out["cls_feats"]}[self.feature]

    def pair_features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        texts = trim_padding(texts, self.pieces.pad)
        text = self.network.text(texts, (texts != self.pieces.pad).long())["cls_feats"]
        return self.network.image(images.to(self.weight_dtype))["cls_feats"], text

    @property
    def blank(self) -> int:
        return self.pieces.mask

    def is_word(self, ids: Tensor) -> Tensor:
        return (ids != self.pieces.pad) & (ids != self.pieces.cls) & (ids != self.pieces.sep)

    def towers(self) -> list[list[nn.Module]]:
        network = self.network
        stem = nn.Module()  # a view on what precedes the first block, only to list its parameters
        stem.patches, stem.token, stem.positions = (
            network.transformer.patch_embed,
            network.transformer.cls_token,
            network.transformer.pos_embed,
        )
        stem.words, stem.types = network.text_embeddings, network.token_type_embeddings
        return [[stem, *network.transformer.blocks]]

    def set_checkpointing(self, on: bool) -> None:
        self.network.checkpointing = on

    def save(self, folder: Path) -> None:
        """Weights under the official names, sizes and vocabulary."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.network.state_dict().items()}, folder / "model.safetensors")
        self.pieces.save(folder / "vocab.txt")
        write_json(folder / OWN_CONFIG, asdict(self.sizes))

    def fingerprint(self) -> dict:
        return {
            "encoder": self.name,
            "sizes": asdict(self.sizes),
            "pretrained": self.pretrained,
            "feature": self.feature,
            "joint": self.joint,
            "vocabulary": None if self.pieces is None else len(self.pieces),
            "image": self.transform.describe(),
        }

    def mask_for_training(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whole-word masking of ids [B, L]: masked ids and labels, on the device of `ids`."""
        from recbole_mm.encoder.vlmo_losses import mask_words

        p = self.pieces
        specials = {"cls": p.cls, "sep": p.sep, "pad": p.pad, "mask": p.mask}
        masked, labels = mask_words(ids.cpu(), p.continues(self.sizes.vocab_size)[: len(p)], self.sizes.text_length, specials)
        return masked.to(ids.device), labels.to(ids.device)
