"""Pictures through a network of timm trained for classification: the visual half of the modality-specific baseline (ResNet-50 default).

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (default network); weights of timm.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from recbole_mm.encoder.clip import warn_random
from recbole_mm.encoder.image import ImageTransform
from recbole_mm.encoder.trainable import TrainableEncoder
from recbole_mm.encoder.weights import find_weights, hub_file, missing_weights, read_tensors
from recbole_mm.errors import UserError, nearest
from recbole_mm.files import write_json

OWN_CONFIG = "cnn_config.json"


class CNNEncoder(TrainableEncoder):
    """Globally pooled activations of a timm model.

    Settings: ``encoder_model`` a timm name with or without a weight tag; ``pretrained`` timm (the published weights), a file, a folder
    written by `save`, or null; ``encoder_layer`` null for the vector before the classifier, or the number of a stage (0 is the lowest,
    -1 the last), whose map is averaged; ``encoder_image_size``.
    """

    name = "cnn"
    modalities = ("visual",)

    def __init__(self, settings: Mapping):
        super().__init__(settings)
        import timm

        if self.feature != "cls":
            raise UserError(
                f"feature: the cnn encoder has one vector per layer, cls; choose the layer with encoder_layer, got {self.feature!r}."
            )
        name, pretrained = settings.get("encoder_model") or "resnet50", settings.get("pretrained")
        if not timm.is_model(name.split(".")[0]):
            raise UserError(f"encoder_model: timm has no model {name!r}.{nearest(name, timm.list_models())}")
        self.network = timm.create_model(name, pretrained=False, num_classes=0)
        self.description, self.pretrained, self.layer = name, pretrained, settings.get("encoder_layer")
        defaults = self.network.pretrained_cfg
        if pretrained == "timm":
            self._load(published(name, defaults), name)
        elif pretrained:
            path = find_weights(pretrained)
            if path is None:
                raise missing_weights(f"cnn {name}", f"https://huggingface.co/{defaults.get('hf_hub_id') or 'timm'}", str(pretrained))
            self._load(path / "model.safetensors" if path.is_dir() else path, str(pretrained))
        else:
            warn_random("cnn")
        size = settings.get("encoder_image_size") or defaults["input_size"][-1]
        self.transform = ImageTransform(size, defaults["mean"], defaults["std"], defaults["interpolation"], "crop", defaults["crop_pct"])
        self._check_layer()
        self.feature_dims = {"visual": self._width()}

    def _load(self, path: Path, source: str) -> None:
        state = read_tensors(path)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state.get(key), dict) else state
        own = self.network.state_dict()
        missing = [k for k in own if k not in state or state[k].shape != own[k].shape]
        if missing:
            raise UserError(
                f"{source}: not weights of timm's {self.description}: {len(missing)} of {len(own)} entries are missing or of another "
                f"shape (first: {missing[0]})."
            )
        self.network.load_state_dict({k: state[k] for k in own})

    def _check_layer(self) -> None:
        if self.layer is None:
            return
        stages = len(self.network.feature_info)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or not -stages <= self.layer < stages:
            raise UserError(f"encoder_layer: expected null or a stage from 0 to {stages - 1} of {self.description}, got {self.layer!r}.")

    def _width(self) -> int:
        return self.network.num_features if self.layer is None else self.network.feature_info[self.layer]["num_chs"]

    def encode(self, images: Tensor | None = None, texts=None) -> dict[str, Tensor]:
        """Pictures [B, 3, S, S] -> {visual: [B, F]}."""
        images = images.to(self.weight_dtype)
        if self.layer is None:
            return {"visual": self.network(images)}
        stage = self.layer % len(self.network.feature_info)
        maps = self.network.forward_intermediates(images, indices=[stage], intermediates_only=True, stop_early=True)[0]
        return {"visual": maps.mean(dim=(2, 3))}

    def towers(self) -> list[list[nn.Module]]:
        """Stem and stages, as timm groups them."""
        stages = [getattr(self.network, f"layer{i}", None) for i in range(1, 5)]
        if None in stages:
            raise UserError(f"encoder_freeze_blocks: {self.description} has no stages layer1 to layer4; set it to 0.")
        stem = nn.ModuleList([self.network.conv1, self.network.bn1])
        return [[stem, *stages]]

    def set_checkpointing(self, on: bool) -> None:
        self.network.set_grad_checkpointing(on)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.network.state_dict().items()}, folder / "model.safetensors")
        write_json(folder / OWN_CONFIG, {"model": self.description, "layer": self.layer})

    def fingerprint(self) -> dict:
        return {
            "encoder": self.name,
            "model": self.description,
            "pretrained": self.pretrained,
            "layer": self.layer,
            "image": self.transform.describe(),
        }


def published(name: str, config: Mapping) -> Path:
    """timm's weights of a model: weights folder, cache or network."""
    tag = config.get("tag")
    file = f"{name}{'' if '.' in name or not tag else '.' + tag}.safetensors"
    path = find_weights(file)
    repository = config.get("hf_hub_id")
    if path is None and repository:
        path = hub_file(repository, "model.safetensors") or hub_file(repository, "pytorch_model.bin")
    if path is None:
        source = f"https://huggingface.co/{repository}/resolve/main/model.safetensors" if repository else config.get("url") or "timm"
        raise missing_weights(f"cnn {name}", source, file)
    return path
