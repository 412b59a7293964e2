r"""VLMo, a unified image-text transformer with one feed-forward expert per modality: the network, its files, its resizing.

Source: Bao et al., "VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts", NeurIPS 2022, and the released
checkpoints (repository microsoft/unilm, folder vlmo, commit 768a3c87). Written from a description of architecture, names and shapes.

Block, with e = imag, text or vl:
:math:`a = x + \gamma_1 \mathrm{Att}(\mathrm{LN}_1 x)`, :math:`y = a + \gamma_2 \mathrm{MLP}_e(\mathrm{LN}_{2,e}\, a)`.
Two families: base and large have relative position biases and layer scale; base_plus has absolute positions and neither of both.

Shapes: B batch, D width, H heads, n blocks, F first block with a vision-language expert, g patches per side, Nv = g*g + 1 image tokens,
L text tokens, T text length that the bias table was made for (196 in all released files), V vocabulary.

Differences from the official code: runs on any device and in one process; text may be trimmed in the text-only path of both families (in
the joint path it is padded to L, because the split between the experts is at L); a table or position map is resized without SciPy's removed
``interp2d`` (``RectBivariateSpline`` gives the same numbers).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_mm.distributed import rand_rows
from recbole_mm.errors import UserError

BLOCK_EPS = 1e-6
BERT_EPS = 1e-12
START_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class VLMoSizes:
    """Everything that shapes the network. The text table length (`table_text_length`, T) stays 196 for released files whatever L is."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    first_vl_block: int = 10
    relative_positions: bool = True
    layer_scale: bool = True
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    mlp_ratio: float = 4.0
    vocab_size: int = 30522
    text_length: int = 40
    table_text_length: int = 196
    drop_path: float = 0.0

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        return self.grid**2 + 1


VARIANTS = {
    "base": VLMoSizes(),
    "base_plus": VLMoSizes(width=544, depth=24, heads=16, first_vl_block=21, relative_positions=False, layer_scale=False),
    "large": VLMoSizes(width=1024, depth=24, heads=16, first_vl_block=21),
    # not published: small enough to be trained from random weights on a processor in minutes
    "tiny": VLMoSizes(width=128, depth=4, heads=4, first_vl_block=2, relative_positions=False, layer_scale=False, image_size=64),
}


# --- relative positions ---------------------------------------------------------------------------------------------------------


def image_index(grid: int) -> Tensor:
    """Rows of the bias table for image tokens, [Nv, Nv] as [query, key]: query minus key; last three rows serve the class token."""
    w = 2 * grid - 1
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    index = torch.empty(grid * grid + 1, grid * grid + 1, dtype=torch.long)
    index[1:, 1:] = (rows[:, None] - rows[None, :] + grid - 1) * w + (columns[:, None] - columns[None, :] + grid - 1)
    index[0, :], index[:, 0], index[0, 0] = w * w, w * w + 1, w * w + 2
    return index


def text_index(grid: int, length: int, table_length: int) -> Tensor:
    """Rows of the bias table for text tokens, [L, L]: key minus query (the opposite sign to the image); the last three serve [CLS]."""
    start = (2 * grid - 1) ** 2 + 3
    position = torch.arange(length)
    index = start + table_length + position[None, :] - position[:, None]
    last = start + 2 * table_length + 2
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def joint_index(grid: int, length: int, table_length: int) -> Tensor:
    """Rows of the bias table for text followed by image, [L + Nv, L + Nv]; two constants where a text token meets an image token."""
    tokens, start = grid * grid + 1, (2 * grid - 1) ** 2 + 3
    upper = torch.full((length, tokens), start)
    lower = torch.full((tokens, length), start + 1)
    text = torch.cat([text_index(grid, length, table_length), upper], dim=1)
    return torch.cat([text, torch.cat([lower, image_index(grid)], dim=1)])


def table_rows(grid: int, table_length: int) -> int:
    """Number of rows R of the bias table."""
    return (2 * grid - 1) ** 2 + 3 + 2 * table_length + 2


# --- layers ---------------------------------------------------------------------------------------------------------------------


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero the branch of whole samples with probability `rate` and scale the others up, so that the mean stays."""
    if not training or rate == 0:
        return x
    keep = rand_rows(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


class Attention(nn.Module):
    """Multi-head attention: one bias-free projection to q, k, v with separate q and v biases (a key bias cannot change a softmax)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`bias` is added to the scaled scores; broadcastable to [B, H, query, key], minus infinity hides a key."""
        b, n, width = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, qkv_bias).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(b, n, width))


class Expert(nn.Module):
    """Feed-forward network with the exact GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with an image and a text expert, and in the upper blocks a vision-language expert."""

    def __init__(self, sizes: VLMoSizes, i: int):
        super().__init__()
        width, hidden = sizes.width, int(sizes.width * sizes.mlp_ratio)
        self.split = sizes.text_length
        self.rate = sizes.drop_path * i / max(sizes.depth - 1, 1)
        self.norm1 = nn.LayerNorm(width, eps=BLOCK_EPS)
        self.attn = Attention(width, sizes.heads)
        for e in ("text", "imag") + (("vl",) if i >= sizes.first_vl_block else ()):
            self.add_module(f"norm2_{e}", nn.LayerNorm(width, eps=BLOCK_EPS))
            self.add_module(f"mlp_{e}", Expert(width, hidden))
        self.has_vl = i >= sizes.first_vl_block
        self.gamma_1 = nn.Parameter(torch.full((width,), 0.1)) if sizes.layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), 0.1)) if sizes.layer_scale else None

    def feed_forward(self, x: Tensor, expert: str) -> Tensor:
        y = getattr(self, f"mlp_{expert}")(getattr(self, f"norm2_{expert}")(x))
        return x + drop_path(y if self.gamma_2 is None else self.gamma_2 * y, self.rate, self.training)

    def forward(self, x: Tensor, mode: str, bias: Tensor | None) -> Tensor:
        """`mode`: imag, text or vl; below the vision-language blocks, vl sends each part of the joint sequence to its own expert."""
        y = self.attn(self.norm1(x), bias)
        x = x + drop_path(y if self.gamma_1 is None else self.gamma_1 * y, self.rate, self.training)
        if mode == "vl" and not self.has_vl:
            return torch.cat([self.feed_forward(x[:, : self.split], "text"), self.feed_forward(x[:, self.split :], "imag")], dim=1)
        return self.feed_forward(x, mode)


class PatchEmbedding(nn.Module):
    def __init__(self, sizes: VLMoSizes):
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.width, sizes.patch_size, sizes.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, g*g, D], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """Patch embedding, class token, blocks and final norm; the names are those of the released files."""

    def __init__(self, sizes: VLMoSizes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.pos_embed = None if sizes.relative_positions else nn.Parameter(torch.empty(1, sizes.image_tokens, sizes.width))
        self.patch_embed = PatchEmbedding(sizes)
        self.blocks = nn.ModuleList(Block(sizes, i) for i in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=BLOCK_EPS)


class TextEmbeddings(nn.Module):
    """BERT's embedding module. In the relative family the position table exists in the files but is not used."""

    def __init__(self, sizes: VLMoSizes):
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab_size, sizes.width)
        self.position_embeddings = nn.Embedding(sizes.text_length, sizes.width)
        self.token_type_embeddings = nn.Embedding(2, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=BERT_EPS)
        self.dropout = nn.Dropout(sizes.drop_path)  # the official code ties it to the drop-path rate
        self.use_positions = not sizes.relative_positions
        self.register_buffer("position_ids", torch.arange(sizes.text_length)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """[B, l] -> [B, l, D]."""
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        if self.use_positions:
            x = x + self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(x))


class Head(nn.Module):
    """A single linear map under the name ``fc``."""

    def __init__(self, width: int, out: int, bias: bool):
        super().__init__()
        self.fc = nn.Linear(width, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Pooler(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class MLMTransform(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=BERT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """Vocabulary logits; the decoder is not tied to the word embeddings."""

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.transform = MLMTransform(width)
        self.decoder = nn.Linear(width, vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x)) + self.bias


# --- the network ----------------------------------------------------------------------------------------------------------------


class VLMo(nn.Module):
    """Image, text and joint paths with all pre-training heads. Parameter names are those of the released files."""

    def __init__(self, sizes: VLMoSizes):
        super().__init__()
        if sizes.image_size % sizes.patch_size or sizes.width % sizes.heads:
            raise UserError(
                f"VLMo: image size {sizes.image_size} must be a multiple of the patch size {sizes.patch_size}, "
                f"and width {sizes.width} a multiple of the {sizes.heads} heads."
            )
        self.sizes = sizes
        self.checkpointing = False
        width = sizes.width
        self.transformer = Transformer(sizes)
        self.text_embeddings = TextEmbeddings(sizes)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.pooler = Pooler(width)
        self.itc_text_proj = Head(width, width, bias=False)
        self.itc_image_proj = Head(width, width, bias=False)
        self.itc_vl_text_proj = Head(width, width, bias=False)
        self.itc_vl_image_proj = Head(width, width, bias=False)
        self.itm_score = Head(width, 2, bias=True)
        self.mlm_score = MLMHead(width, sizes.vocab_size)
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))
        self.logit_vl_scale = nn.Parameter(torch.tensor(START_SCALE))
        if sizes.relative_positions:
            rows = table_rows(sizes.grid, sizes.table_text_length)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, sizes.heads * sizes.depth))
            for name, index in (
                ("imag", image_index(sizes.grid)),
                ("text", text_index(sizes.grid, sizes.text_length, sizes.table_text_length)),
                ("vl", joint_index(sizes.grid, sizes.text_length, sizes.table_text_length)),
            ):
                self.register_buffer(f"index_{name}", index, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal 0.02 inside the transformer, normal 0.02 in embeddings and heads, zero biases; convolution as in PyTorch."""
        for name, p in self.named_parameters():
            if p.dim() >= 2 and "patch_embed" not in name and name != "relative_position_bias_table":
                (nn.init.trunc_normal_ if name.startswith("transformer.") else nn.init.normal_)(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # --- embeddings -------------------------------------------------------------------------------------------------------------

    def embed_image(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, Nv, D], class token first, absolute positions added in that family."""
        size = self.sizes.image_size
        if images.shape[-2:] != (size, size):
            raise UserError(f"VLMo was built for pictures of {size} x {size}, got {tuple(images.shape[-2:])}: set encoder_image_size.")
        x = self.transformer.patch_embed(images)
        x = torch.cat([self.transformer.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return x if self.transformer.pos_embed is None else x + self.transformer.pos_embed

    def embed_text(self, ids: Tensor) -> Tensor:
        """[B, l] -> [B, l, D]."""
        if ids.shape[1] > self.sizes.text_length:
            raise UserError(f"VLMo was built for {self.sizes.text_length} text tokens, got {ids.shape[1]}: raise encoder_text_length.")
        return self.text_embeddings(ids)

    # --- blocks -----------------------------------------------------------------------------------------------------------------

    def scores_bias(self, mode: str, length: int, mask: Tensor | None) -> list[Tensor | None]:
        """What each block adds to its scores: relative biases [1, H, l, l] and minus infinity for masked keys [B, 1, 1, l], l = length."""
        hidden_keys = None
        if mask is not None:
            hidden_keys = torch.zeros(mask.shape, dtype=self.transformer.cls_token.dtype, device=mask.device)
            hidden_keys = hidden_keys.masked_fill(mask == 0, float("-inf"))[:, None, None, :]
        if not self.sizes.relative_positions:
            return [hidden_keys] * self.sizes.depth
        index = getattr(self, f"index_{mode}")[:length, :length]
        bias = F.embedding(index, self.relative_position_bias_table)  # [length, length, n*H], layer-major columns
        bias = bias.permute(2, 0, 1).view(self.sizes.depth, 1, self.sizes.heads, length, length)
        return [b if hidden_keys is None else b + hidden_keys for b in bias]

    def run(self, x: Tensor, mode: str, biases: list[Tensor | None], first: int = 0) -> list[Tensor]:
        """Outputs of the blocks first..n-1, in order."""
        hidden = []
        for i in range(first, self.sizes.depth):
            block = self.transformer.blocks[i]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mode, biases[i], use_reentrant=False)
            else:
                x = block(x, mode, biases[i])
            hidden.append(x)
        return hidden

    def single(self, x: Tensor, mode: str, mask: Tensor | None, vl_branch: bool) -> dict:
        """Image-only or text-only path from embedded tokens [B, l, D]; keys as in `image`."""
        projection, vl_projection = (
            (self.itc_image_proj, self.itc_vl_image_proj) if mode == "imag" else (self.itc_text_proj, self.itc_vl_text_proj)
        )
        biases = self.scores_bias(mode, x.shape[1], mask)
        hidden = self.run(x, mode, biases)
        feats = self.transformer.norm(hidden[-1])
        out = {"hidden": hidden, "feats": feats, "raw_cls_feats": hidden[-1][:, 0], "cls_feats": unit(projection(feats[:, 0]))}
        if vl_branch:  # starts from the last block without a vision-language expert
            first = self.sizes.first_vl_block
            start = hidden[first - 1] if first > 0 else x
            out["vl_hidden"] = self.run(start, "vl", biases, first) if first < self.sizes.depth else [start]
            out["vl_cls_normed"] = self.transformer.norm(out["vl_hidden"][-1][:, 0])
            out["cls_vlffn_feats"] = unit(vl_projection(out["vl_cls_normed"]))
        return out

    def image(self, images: Tensor, vl_branch: bool = False) -> dict:
        """Image-only path.

        Keys: ``feats`` [B, Nv, D] after the final norm, ``raw_cls_feats`` [B, D] before it, ``cls_feats`` projected and unit, ``hidden``;
        with `vl_branch` also ``vl_hidden``, ``vl_cls_normed`` and ``cls_vlffn_feats``.
        """
        return self.single(self.embed_image(images) + self.token_type_embeddings.weight[1], "imag", None, vl_branch)

    def text(self, ids: Tensor, mask: Tensor, vl_branch: bool = False) -> dict:
        """Text-only path; ids and mask [B, l], l at most L. Keys as in `image`."""
        return self.single(self.embed_text(ids) + self.token_type_embeddings.weight[0], "text", mask, vl_branch)

    def joint(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict:
        """Joint path, text first.

        Keys: ``text_feats`` [B, L, D], ``image_feats`` [B, Nv, D], ``raw_cls_feats`` (normed text [CLS]), ``cls_feats`` (tanh-pooled), ``hidden``.
        """
        length = self.sizes.text_length
        ids, mask = F.pad(ids, (0, length - ids.shape[1])), F.pad(mask, (0, length - mask.shape[1]))
        text = self.embed_text(ids) + self.token_type_embeddings.weight[0]
        image = self.embed_image(images) + self.token_type_embeddings.weight[1]
        mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        x = torch.cat([text, image.to(text.dtype)], dim=1)
        hidden = self.run(x, "vl", self.scores_bias("vl", x.shape[1], mask))
        feats = self.transformer.norm(hidden[-1])
        return {
            "hidden": hidden,
            "text_feats": feats[:, :length],
            "image_feats": feats[:, length:],
            "raw_cls_feats": feats[:, 0],
            "cls_feats": self.pooler(feats[:, 0]),
        }


def unit(x: Tensor) -> Tensor:
    """Divide by the Euclidean norm of the last axis, as the official code does: without an epsilon."""
    return x / x.norm(dim=-1, keepdim=True)


# --- files ----------------------------------------------------------------------------------------------------------------------

HEADS = ("pooler.", "itc_", "itm_score.", "mlm_score.", "logit_scale", "logit_vl_scale")
IGNORED = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index", "text_embeddings.position_ids")


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, g0*g0 + 1, D] -> [1, g*g + 1, D]: the class token's row is kept; bicubic, corners not aligned, no antialiasing."""
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    maps = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def resize_table(table: Tensor, grid: int, table_length: int) -> Tensor:
    """Bias table [R0, H*n] for another image size.

    The trailing 2T+5 rows (class token and text) are kept. Column by column, the w0 x w0 map of patch distances is read as a function on a
    grid whose steps grow by a factor q, chosen so that it spans the new distances -M..M, and interpolated there by a bicubic spline.
    """
    from scipy.interpolate import RectBivariateSpline

    extra = 2 * table_length + 5
    old, new = math.isqrt(max(len(table) - extra, 0)), 2 * grid - 1
    if old**2 != len(table) - extra or old % 2 == 0:
        raise UserError(
            f"VLMo: a relative position table of {len(table)} rows does not fit a text table length of {table_length} "
            "(rows - 2*length - 5 must be the square of an odd number). All released files have 196."
        )
    if old == new:
        return table
    m, reach = (old - 1) // 2, (new - 1) // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**m) / (1 - q) > reach:
            high = q
        else:
            low = q
    steps = np.cumsum(q ** np.arange(m))
    source = np.concatenate([-steps[::-1], [0.0], steps])
    target = np.clip(np.arange(-reach, reach + 1, dtype=np.float64), source[0], source[-1])
    columns = table[: old * old].double().numpy().reshape(old, old, -1)
    resized = [RectBivariateSpline(source, source, columns[..., c], kx=3, ky=3, s=0)(target, target) for c in range(columns.shape[2])]
    resized = torch.from_numpy(np.stack(resized, axis=-1).reshape(new * new, -1)).to(table.dtype)
    return torch.cat([resized, table[old * old :]])


def unwrap(content: dict) -> dict[str, Tensor]:
    """The mapping name -> tensor of a checkpoint: below ``state_dict``, ``module`` or ``model``, or the file itself; in float32."""
    for key in ("state_dict", "module", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if state and all(k.startswith("module.") for k in state):  # written by DeepSpeed or DataParallel
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def adapt(state: dict[str, Tensor], sizes: VLMoSizes) -> dict[str, Tensor]:
    """Fit a released mapping to the image size and text length of `sizes`, and drop what is derived."""
    state = {k: v for k, v in state.items() if k not in IGNORED}
    name = "text_embeddings.position_embeddings.weight"
    if name in state:
        if len(state[name]) < sizes.text_length:
            raise UserError(f"VLMo: the file holds {len(state[name])} text positions, encoder_text_length is {sizes.text_length}.")
        state[name] = state[name][: sizes.text_length]
    if "transformer.pos_embed" in state:
        state["transformer.pos_embed"] = resize_positions(state["transformer.pos_embed"], sizes.grid)
    if "relative_position_bias_table" in state:
        state["relative_position_bias_table"] = resize_table(state["relative_position_bias_table"], sizes.grid, sizes.table_text_length)
    if "token_type_embeddings.weight" in state:  # NLVR2 files have a third row, for a second picture
        state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"][:2]
    return state


def load_vlmo(model: VLMo, content: dict, source: str | Path) -> list[str]:
    """Load a released or own checkpoint; returns the names that the file lacks and that keep their random start.

    Pre-training heads and vision-language experts may be missing (text-only stage, retrieval files), other heads may be surplus
    (VQA, NLVR2); anything else that is missing or has another shape is an error.
    """
    state = adapt(unwrap(content), model.sizes)
    own = model.state_dict()
    own.pop("text_embeddings.position_ids")
    wrong = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state]
    vital = [k for k in missing if not k.startswith(HEADS) and ".mlp_vl." not in k and ".norm2_vl." not in k]
    if wrong or vital:
        what = f"{len(vital)} of {len(own)} entries are missing (first: {vital[0]})" if vital else "; ".join(wrong[:3])
        raise UserError(f"{source}: not a checkpoint of this VLMo: {what}.{fitting_variant(state)}")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return missing


def fitting_variant(state: dict[str, Tensor]) -> str:
    """Which published variant a mapping comes from, as a hint for an error text."""
    token = state.get("transformer.cls_token")
    if token is None:
        found = ", ".join(list(state)[:3]) or "no tensors"
        return f" It has no transformer.cls_token (found: {found}); expected one of the released files of microsoft/unilm, folder vlmo."
    depth = len({k.split(".")[2] for k in state if k.startswith("transformer.blocks.")})
    relative = "relative_position_bias_table" in state
    fits = [n for n, s in VARIANTS.items() if (s.width, s.depth, s.relative_positions) == (token.shape[-1], depth, relative)]
    return f" It looks like encoder_variant={fits[0]}." if fits else f" It has width {token.shape[-1]} and {depth} blocks."


def sizes_for(variant: str, **changes) -> VLMoSizes:
    """Sizes of a named variant with the given fields changed (None keeps the variant's value)."""
    if variant not in VARIANTS:
        raise UserError(f"encoder_variant: expected one of {', '.join(VARIANTS)}, got {variant!r}.")
    return replace(VARIANTS[variant], **{k: v for k, v in changes.items() if v is not None})
