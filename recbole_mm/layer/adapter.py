r"""Small trainable modules on top of a frozen multimodal encoder: the PerPEFT projector and the IISAN side network.

Sources: PerPEFT ("Personalized Parameter-Efficient Fine-Tuning of Foundation Models for Multimodal Recommendation", WWW 2026,
https://github.com/kswoo97/PerPEFT) for both as computed here; IISAN ("IISAN: Efficiently Adapting Multimodal Representation for
Sequential Recommendation with Decoupled PEFT", SIGIR 2024, https://github.com/GAIR-Lab/IISAN) for the idea of the side network.

Shapes: n items, L cached hidden states per tower, V / T width of the image / text tower, H bottleneck width, D model width.
"""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Two-layer map from an encoder's item features [..., F] to the recommender's width [..., D], normalised at the end."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.inner = nn.Linear(in_features, 2 * out_features)
        self.inner_norm = nn.LayerNorm(2 * out_features, eps=1e-8)
        self.outer = nn.Linear(2 * out_features, out_features)
        self.outer_norm = nn.LayerNorm(out_features, eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))


class Bottleneck(nn.Module):
    r"""Residual bottleneck :math:`z + W_{up}\,\mathrm{GELU}(W_{down} z)`, started near the identity (weights and biases N(0, 1e-4))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1e-4)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.up(nn.functional.gelu(self.down(z)))


class IISAN(nn.Module):
    r"""Three gated streams (text t, image v, both c) through the cached hidden states T_l, V_l of two frozen towers.

    .. math::
        t_0 &= B^t_0(T_0), \quad v_0 = B^v_0(V_0), \quad c_0 = B^c_0(\mu^c_0 T_0 + (1-\mu^c_0) C_0 V_0) \\
        t_l &= B^t_l(\mu^t_l t_{l-1} + (1-\mu^t_l) T_l), \quad v_l \text{ likewise with } V_l \\
        c_l &= B^c_l(c_{l-1} + \mu^c_l T_l + (1-\mu^c_l) C_l V_l)

    B are residual bottlenecks, :math:`\mu = \sigma(g)` with g [3, L] started at zero (rows text, image, both; the first gates of text and image
    are unused, as in the reference), and C_l is affine V -> T. Nothing goes back through the towers themselves.
    Forward: image states [n, L, V] and text states [n, L, T] -> [n, T + V + T], the last text, image and joint state side by side.
    """

    def __init__(self, image_dim: int, text_dim: int, n_states: int = 7, hidden: int = 32):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3, n_states))
        self.text_blocks = nn.ModuleList(Bottleneck(text_dim, hidden) for _ in range(n_states))
        self.image_blocks = nn.ModuleList(Bottleneck(image_dim, hidden) for _ in range(n_states))
        self.joint_blocks = nn.ModuleList(Bottleneck(text_dim, hidden) for _ in range(n_states))
        self.image_to_text = nn.ModuleList(nn.Linear(image_dim, text_dim) for _ in range(n_states))
        self.out_features = 2 * text_dim + image_dim

    def forward(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        gate = self.gate.sigmoid()
        text, image, joint = text_states[:, 0], image_states[:, 0], 0.0
        for layer in range(self.gate.shape[1]):
            t, v = text_states[:, layer], image_states[:, layer]
            mu_text, mu_image, mu_joint = gate[:, layer]
            if layer:
                text = mu_text * text + (1 - mu_text) * t
                image = mu_image * image + (1 - mu_image) * v
            joint = joint + mu_joint * t + (1 - mu_joint) * self.image_to_text[layer](v)
            text, image, joint = self.text_blocks[layer](text), self.image_blocks[layer](image), self.joint_blocks[layer](joint)
        return torch.cat((text, image, joint), dim=-1)
