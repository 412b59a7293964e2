"""CLIP: two transformers trained so that a picture and its text point the same way.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. The networks are those of
open_clip and of transformers' ``CLIPModel``; this file chooses the vector, prepares the inputs and finds the weights.

Feature (recorded in meta.json): ``cls`` the class token (text: the end token) after the final norm, ``raw`` before it, ``projected`` in
the joint space with unit length. Shapes: B batch, L text length, S picture edge, F feature width.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.encoder.image import ImageTransform
from recbole_mm.encoder.trainable import TrainableEncoder
from recbole_mm.encoder.weights import find_weights, hub_file, hub_or_path, missing_weights, read_tensors
from recbole_mm.errors import UserError, nearest
from recbole_mm.files import write_json

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCABULARY = 49408  # of the byte-pair tokenizer that OpenAI published with CLIP
OWN_CONFIG = "open_clip_config.json"


class CLIPEncoder(TrainableEncoder):
    """CLIP from open_clip (default) or transformers.

    Settings: ``encoder_library`` open_clip or transformers; ``encoder_model`` a model name of open_clip, or the name or folder of a
    ``CLIPModel``; ``pretrained`` a tag, a file, a folder or null (random); ``encoder_sizes`` a mapping that builds a model of one's own;
    ``encoder_image_size``, ``encoder_text_length``, ``encoder_quick_gelu``, ``feature``.
    """

    name = "clip"
    modalities = ("textual", "visual")

    def __init__(self, settings: Mapping):
        super().__init__(settings)
        library = settings.get("encoder_library") or "open_clip"
        networks = {"open_clip": OpenClipNetwork, "transformers": TransformersNetwork}
        if library not in networks:
            raise UserError(f"encoder_library: expected open_clip or transformers, got {library!r}.")
        self.network = networks[library](settings)
        self.library = library
        self.transform = self.network.transform
        self.text_length = min(settings.get("encoder_text_length") or self.network.context, self.network.context)
        self.pretrained = settings.get("pretrained")
        self.feature_dims = self.network.widths(self.feature)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.network.logit_scale

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids [B, L], padded with zeros; long texts are cut, keeping the end token."""
        return self.network.tokenizer(list(texts), context_length=self.text_length)

    def encode(self, images: Tensor | None = None, texts: Tensor | None = None) -> dict[str, Tensor]:
        """Normalised pictures [B, 3, S, S] and ids [B, L] -> features [B, F] of the modalities given."""
        out = {}
        if texts is not None:
            out["textual"] = self.network.text(trim(texts, self.network.end_token), self.feature)
        if images is not None:
            out["visual"] = self.network.image(images.to(self.weight_dtype), self.feature)
        return out

    def pair_features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        texts = trim(texts, self.network.end_token)
        return self.network.image(images.to(self.weight_dtype), "projected"), self.network.text(texts, "projected")

    def is_word(self, ids: Tensor) -> Tensor:
        return (ids > 0) & (ids < self.network.tokenizer.all_special_ids[0])

    def towers(self) -> list[list[nn.Module]]:
        return self.network.towers()

    def set_checkpointing(self, on: bool) -> None:
        self.network.set_checkpointing(on)

    def save(self, folder: Path) -> None:
        self.network.save(Path(folder))

    def fingerprint(self) -> dict:
        return {
            "encoder": self.name,
            "library": self.library,
            "model": self.network.description,
            "pretrained": self.pretrained,
            "feature": self.feature,
            "text_length": self.text_length,
            "image": self.transform.describe(),
        }


def trim(ids: Tensor, end_token: int | None) -> Tensor:
    """Cut the columns behind the last end token of the batch: they are padding, which a causal text tower never looks at."""
    if end_token is None:
        return ids
    ends = (ids == end_token).int().argmax(dim=1)
    return ids[:, : int(ends.max()) + 1]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def reads_class_token_only(visual: nn.Module) -> bool:
    """Whether the feature of open_clip's picture tower comes from the class token alone: a plain transformer, no average, no attention pooling."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.pool_type != "tok" or visual.output_tokens:
        return False
    blocks = visual.transformer.resblocks
    return visual.transformer.batch_first and len(blocks) > 0 and type(blocks[-1]) is ResidualAttentionBlock


def class_token(visual: nn.Module, images: Tensor) -> Tensor:
    """The class token [B, 1, F] after the last block, which is computed for this token only.

    The last block's keys and values need all patches, but its queries, output projection and MLP only the one row that is read: the same
    value as open_clip's own forward, for some 7 % fewer multiplications with 12 blocks.
    """
    *lower, last = visual.transformer.resblocks
    tokens = visual._embeds(images)
    for block in lower:
        tokens = block(tokens)
    normed = last.ln_1(tokens)
    token = tokens[:, :1] + last.ls_1(last.attention(normed[:, :1], normed, normed))
    return token + last.ls_2(last.mlp(last.ln_2(token)))


class OpenClipNetwork(nn.Module):
    """A model of open_clip behind the few calls that the encoder needs."""

    def __init__(self, settings: Mapping):
        super().__init__()
        import open_clip

        name, pretrained, sizes = settings.get("encoder_model"), settings.get("pretrained"), settings.get("encoder_sizes")
        image_size, quick = settings.get("encoder_image_size"), settings.get("encoder_quick_gelu")
        folder = find_weights(pretrained)
        own = folder is not None and (folder / OWN_CONFIG).is_file()
        if own:  # written by `save`: the architecture stands beside the weights
            import json

            described = json.loads((folder / OWN_CONFIG).read_text(encoding="utf-8"))
            name, sizes = described["model"], described["sizes"]
            image_size, quick = described["image_size"], described["quick_gelu"]
        self.saved = {"model": name, "sizes": sizes}
        tag = {}
        if sizes is None:
            if name not in open_clip.list_models():
                known = open_clip.list_models()
                raise UserError(
                    f"encoder_model: open_clip has no model {name!r}.{nearest(str(name), known)} "
                    "For a CLIPModel folder or repository of Hugging Face set encoder_library: transformers."
                )
            tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained and folder is None else {}
            if pretrained and folder is None and not tag:
                tags = open_clip.list_pretrained_tags_by_model(name)
                raise UserError(
                    f"pretrained: open_clip knows no weights {pretrained!r} for {name}, and there is no such file.{nearest(pretrained, tags)} "
                    f"There are {', '.join(tags) or 'none'}."
                )
            quick = bool(tag.get("quick_gelu", False)) if quick is None and tag else quick
            config = open_clip.get_model_config(name)
            if quick is not None:  # weights of OpenAI were trained with another activation than the plain model name builds
                config["quick_gelu"] = bool(quick)
            if image_size:
                config["vision_cfg"]["image_size"] = image_size
        else:
            config = build_sizes(sizes, image_size)
        custom = config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {})
        config.pop("multimodal_cfg", None)
        kwargs = {k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale")}
        if "init_logit_bias" in config:
            kwargs["init_logit_bias"] = config["init_logit_bias"]
        self.model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**kwargs)
        self.saved |= {"image_size": config["vision_cfg"].get("image_size"), "quick_gelu": bool(config.get("quick_gelu", False))}
        self.description = name if sizes is None else dict(sizes)
        if tag:
            self.load(download(name, pretrained, tag), pretrained)
        elif own:
            self.load(folder / "model.safetensors", str(folder))
        elif folder is not None and folder.is_dir():
            raise UserError(
                f"pretrained: {folder} is a folder without {OWN_CONFIG}. For a CLIPModel of Hugging Face set encoder_library: transformers; "
                "else give the weight file."
            )
        elif folder is not None:
            self.load(folder, str(folder))
        else:
            warn_random("clip")
        self.tokenizer = open_clip.get_tokenizer(name) if sizes is None else open_clip.SimpleTokenizer()
        self.context = getattr(self.model, "context_length", None) or self.tokenizer.context_length
        simple = not custom and getattr(self.model, "text_pool_type", None) == "argmax"
        self.end_token = self.tokenizer.eot_token_id if simple and hasattr(self.tokenizer, "eot_token_id") else None
        size = self.model.visual.image_size
        stored = described["image"] if own else {}
        self.transform = ImageTransform(
            size[0] if isinstance(size, (tuple, list)) else size,
            stored.get("mean") or tag.get("mean") or MEAN,
            stored.get("std") or tag.get("std") or STD,
            stored.get("interpolation") or tag.get("interpolation") or "bicubic",
            stored.get("mode") or {"shortest": "crop", "longest": "pad", "squash": "squash"}[tag.get("resize_mode") or "shortest"],
        )
        self.saved["image"] = self.transform.describe()
        self.plain = isinstance(self.model.visual, open_clip.transformer.VisionTransformer) and self.end_token is not None

    def load(self, path: Path, source: str) -> None:
        """Load released or own weights; open_clip resizes positions to the picture size and rewrites older layouts."""
        import open_clip

        state = read_tensors(path)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state.get(key), dict) else state
        state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
        for key in ("input_resolution", "context_length", "vocab_size"):  # numbers that OpenAI's archives store beside the weights
            state.pop(key, None)
        if "positional_embedding" in state and not hasattr(self.model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        open_clip.model.resize_pos_embed(state, self.model)
        state.pop("attn_mask", None)
        own = self.model.state_dict()
        missing = [k for k in own if k not in state]
        wrong = [
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in state and own[k].shape != state[k].shape
        ]
        if missing or wrong:
            what = f"{len(missing)} of {len(own)} entries are missing (first: {missing[0]})" if missing else wrong[0]
            raise UserError(f"{source}: not weights of open_clip's {self.saved['model'] or 'model of encoder_sizes'}: {what}.")
        self.model.load_state_dict({k: v for k, v in state.items() if k in own})

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def widths(self, feature: str) -> dict[str, int]:
        if feature != "projected" and not self.plain:
            raise UserError(
                f"feature: {feature} is the token of a plain vision and text transformer, which {self.description} is not. Set --feature=projected."
            )
        if feature == "projected":
            with torch.no_grad():
                width = self.text(self.tokenizer([""], context_length=self.context), feature).shape[-1]
            return {"textual": width, "visual": width}
        return {"textual": self.model.ln_final.normalized_shape[0], "visual": self.model.visual.ln_post.normalized_shape[0]}

    def image(self, images: Tensor, feature: str) -> Tensor:
        visual = self.model.visual
        if not torch.is_grad_enabled() and reads_class_token_only(visual):
            token = class_token(visual, images)
            if feature == "raw":
                return token[:, 0]
            pooled = visual._pool(token)[0]
            if feature == "cls":
                return pooled
            return unit(pooled if visual.proj is None else pooled @ visual.proj)
        if feature == "projected":
            return unit(self.model.encode_image(images))
        tokens = visual.transformer(visual._embeds(images))
        return tokens[:, 0] if feature == "raw" else visual._pool(tokens)[0]

    def text(self, ids: Tensor, feature: str) -> Tensor:
        model = self.model
        if not self.plain:
            return unit(model.encode_text(ids))
        length = ids.shape[1]
        x = model.token_embedding(ids)
        x = x + model.positional_embedding[:length].to(x.dtype)
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]  # the end token has the largest id
        if feature == "raw":
            return x
        x = model.ln_final(x)
        if feature == "cls":
            return x
        projection = model.text_projection
        return unit(projection(x) if isinstance(projection, nn.Linear) else x if projection is None else x @ projection)

    def towers(self) -> list[list[nn.Module]]:
        if not self.plain:
            raise UserError(f"Freezing blocks needs a plain vision and text transformer, which {self.description} is not.")
        visual, model = self.model.visual, self.model
        stem = nn.Module()  # a view on what precedes the first block, only to list its parameters
        stem.conv, stem.norm, stem.token, stem.positions = visual.conv1, visual.ln_pre, visual.class_embedding, visual.positional_embedding
        words = nn.Module()
        words.tokens, words.positions = model.token_embedding, model.positional_embedding
        return [[stem, *visual.transformer.resblocks], [words, *model.transformer.resblocks]]

    def set_checkpointing(self, on: bool) -> None:
        self.model.set_grad_checkpointing(on)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")
        write_json(folder / OWN_CONFIG, self.saved)


def build_sizes(sizes: Mapping, image_size: int | None) -> dict:
    """open_clip configuration from our short names: width, layers, heads, patch_size, image_size, text_width, ..., joint_width."""
    known = {"joint_width", "width", "layers", "heads", "patch_size", "image_size", "text_width", "text_layers", "text_heads", "context"}
    unknown = [k for k in sizes if k not in known]
    if unknown:
        raise UserError(f"encoder_sizes: unknown entry {unknown[0]!r}.{nearest(unknown[0], known)} There are {', '.join(sorted(known))}.")
    absent = sorted(known - set(sizes) - {"context", "image_size"})
    if absent:
        raise UserError(f"encoder_sizes: expected also {', '.join(absent)}.")
    return {
        "embed_dim": sizes["joint_width"],
        "vision_cfg": {
            "image_size": image_size or sizes.get("image_size", 224),
            "layers": sizes["layers"],
            "width": sizes["width"],
            "head_width": sizes["width"] // sizes["heads"],
            "patch_size": sizes["patch_size"],
        },
        "text_cfg": {
            "context_length": sizes.get("context", 77),
            "vocab_size": VOCABULARY,
            "width": sizes["text_width"],
            "heads": sizes["text_heads"],
            "layers": sizes["text_layers"],
        },
    }


def download(name: str, pretrained: str, tag: Mapping) -> Path:
    """Weights of an open_clip tag: the weights folder, the cache or the network; else one sentence on where to get them."""
    from open_clip.constants import HF_WEIGHTS_NAME

    file = f"{name}-{pretrained}.safetensors"
    for candidate in (file, f"{name}-{pretrained}.pt", f"{name}-{pretrained}.bin"):
        if (path := find_weights(candidate)) is not None:
            return path
    repository = (tag.get("hf_hub") or "").rstrip("/")
    if repository:
        for candidate in ("open_clip_model.safetensors", HF_WEIGHTS_NAME):
            if (path := hub_file(repository, candidate)) is not None:
                return path
        source = f"https://huggingface.co/{repository}/resolve/main/open_clip_model.safetensors"
    else:
        source = tag.get("url") or "https://github.com/mlfoundations/open_clip"
        file = f"{name}-{pretrained}.pt"
    raise missing_weights(f"CLIP {name} / {pretrained}", source, file)


def warn_random(encoder: str) -> None:
    """Say that there are no learned weights: features are then random projections of the input."""
    warnings.warn(f"{encoder}: pretrained is null, the network starts from random weights.", UserWarning, stacklevel=3)


class TransformersNetwork(nn.Module):
    """transformers' ``CLIPModel`` behind the same calls; ``encoder_sizes`` uses the same short names as with open_clip."""

    def __init__(self, settings: Mapping):
        super().__init__()
        import open_clip
        from transformers import CLIPConfig, CLIPModel

        name, pretrained, sizes = settings.get("encoder_model"), settings.get("pretrained"), settings.get("encoder_sizes")
        image_size = settings.get("encoder_image_size")
        if pretrained is None:
            if sizes is not None:
                config = transformers_sizes(sizes, image_size)
            else:
                source = hub_or_path(name) if name else None
                config = CLIPConfig.from_pretrained(source) if source else CLIPConfig(text_config={"eos_token_id": VOCABULARY - 1})
                if image_size:
                    config.vision_config.image_size = image_size
            warn_random("clip")
            self.model = CLIPModel(config)
            self.description = dict(sizes) if sizes is not None else name or "CLIPConfig()"
        else:
            wanted = name if pretrained is True else pretrained
            source = hub_or_path(wanted)
            if source is None:
                raise missing_weights(f"CLIP {wanted}", f"https://huggingface.co/{wanted}", str(wanted))
            self.model = CLIPModel.from_pretrained(source)
            self.description = str(wanted)
            stored = self.model.config.vision_config.image_size
            if image_size and image_size != stored:
                raise UserError(f"encoder_image_size: {wanted} was trained with pictures of {stored}, got {image_size}; leave it null.")
        text = self.model.config.text_config
        if text.vocab_size < VOCABULARY:
            raise UserError(f"{self.description}: expected CLIP's byte-pair vocabulary of {VOCABULARY}, got one of {text.vocab_size}.")
        self.tokenizer = open_clip.SimpleTokenizer()
        self.context = text.max_position_embeddings
        self.end_token = self.tokenizer.eot_token_id
        self.transform = ImageTransform(self.model.config.vision_config.image_size, MEAN, STD, tensors=True)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def widths(self, feature: str) -> dict[str, int]:
        config = self.model.config
        if feature == "projected":
            return {"textual": config.projection_dim, "visual": config.projection_dim}
        return {"textual": config.text_config.hidden_size, "visual": config.vision_config.hidden_size}

    def image(self, images: Tensor, feature: str) -> Tensor:
        output = self.model.vision_model(pixel_values=images)
        if feature == "raw":
            return output.last_hidden_state[:, 0]
        return output.pooler_output if feature == "cls" else unit(self.model.visual_projection(output.pooler_output))

    def text(self, ids: Tensor, feature: str) -> Tensor:
        model = self.model.text_model
        if feature == "raw":  # the tower returns tokens after the final norm only
            kept = []
            handle = model.final_layer_norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
            try:
                model(input_ids=ids)
            finally:
                handle.remove()
            return kept[0][torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        output = model(input_ids=ids).pooler_output
        return output if feature == "cls" else unit(self.model.text_projection(output))

    def towers(self) -> list[list[nn.Module]]:
        vision, text = self.model.vision_model, self.model.text_model
        stem = nn.Module()
        stem.embeddings, stem.norm = vision.embeddings, vision.pre_layrnorm
        return [[stem, *vision.encoder.layers], [text.embeddings, *text.encoder.layers]]

    def set_checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def save(self, folder: Path) -> None:
        """Hugging Face layout: ``CLIPModel.from_pretrained(folder)`` loads it."""
        self.model.save_pretrained(folder)


def transformers_sizes(sizes: Mapping, image_size: int | None):
    """``CLIPConfig`` from the short names of :func:`build_sizes`."""
    from transformers import CLIPConfig

    plain = build_sizes(sizes, image_size)
    vision, text = plain["vision_cfg"], plain["text_cfg"]
    return CLIPConfig(
        projection_dim=plain["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": sizes["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": plain["embed_dim"],
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "projection_dim": plain["embed_dim"],
            "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": 0,
        },
    )
