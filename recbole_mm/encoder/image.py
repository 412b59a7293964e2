"""From a picture to the network's input: resize, crop, scale, normalise; the same steps as open_clip, transformers and timm in evaluation."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from recbole_mm.errors import UserError

MODES = ("crop", "squash", "pad")


class ImageTransform:
    """PIL picture -> uint8 [3, S, S] -> float [3, S, S].

    Args:
        size: S.
        mean, std: per channel, of values in [0, 1].
        interpolation: bicubic or bilinear (PIL's, antialiased).
        mode: crop (shorter edge to S / crop_share, then the middle), squash (ignore the aspect ratio) or pad (longer edge to S).
        crop_share: timm's crop_pct.
        fill: value of the margin in mode pad.
        tensors: resize uint8 tensors as transformers does, instead of PIL pictures; the results differ by a grey level here and there.
    """

    def __init__(
        self,
        size: int,
        mean,
        std,
        interpolation: str = "bicubic",
        mode: str = "crop",
        crop_share: float = 1.0,
        fill: int = 0,
        tensors: bool = False,
    ):
        if mode not in MODES:
            raise UserError(f"image mode: expected one of {', '.join(MODES)}, got {mode!r}.")
        self.size, self.mode, self.crop_share, self.fill, self.tensors = size, mode, crop_share, fill, tensors
        self.interpolation = interpolation
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def resize(self, image: Image.Image) -> Tensor:
        """A picture as the network sees it, before normalisation: uint8 [3, S, S]."""
        how = InterpolationMode(self.interpolation)
        image = image.convert("RGB")
        if self.tensors:
            image = transforms.pil_to_tensor(image)
        if self.mode == "crop":
            image = transforms.resize(image, int(self.size / self.crop_share), interpolation=how, antialias=True)
            if self.tensors:  # transformers rounds the margin down, torchvision to the nearest even number
                top, left = (edge - self.size for edge in image.shape[-2:])
                return transforms.crop(image, top // 2, left // 2, self.size, self.size).contiguous()
            image = transforms.center_crop(image, self.size)
        elif self.mode == "squash":
            image = transforms.resize(image, [self.size, self.size], interpolation=how, antialias=True)
        else:
            width, height = image.size if not self.tensors else image.shape[:0:-1]
            scale = self.size / max(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            image = transforms.resize(image, [height, width], interpolation=how, antialias=True)
            left, top = (self.size - width) // 2, (self.size - height) // 2
            image = transforms.pad(image, [left, top, self.size - width - left, self.size - height - top], fill=self.fill)
        return image if self.tensors else torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] -> float32, on the same device."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.to(torch.float32).div_(255)).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalize(self.resize(image))

    def describe(self) -> dict:
        """Plain values for ``meta.json`` and cache names."""
        return {
            "size": self.size,
            "mode": self.mode,
            "interpolation": self.interpolation,
            "crop_share": self.crop_share,
            "tensors": self.tensors,
            "mean": list(self.mean),
            "std": list(self.std),
        }
