r"""Where the weights of a small VIP5 without a language model behind it begin.

Numbers drawn at random mean nothing, and a small network that must find out by its own loss which of them go together first learns how
popular each is, then stays there for tens of thousands of steps. Both starts here put a factorisation of the training interactions into the
numbers' embeddings; `start_matching` also sets the maps that compare a user with each item of a list. Nothing is frozen.

Shapes: U users and I items (row 0 is padding), R rank of the factorisation, D d_model, F width of a feature row.
"""

import numpy as np
import torch
from torch import Tensor

from recbole_mm.errors import UserError
from recbole_mm.model.vip5.network import VIP5Network

_CONTROL = 3  # directions that say: a user's number, an item's number, the decoder's first token


def _basis(width: int, seed: int) -> np.ndarray:
    """A random orthonormal basis, [D, D]."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


@torch.no_grad()
def start_numbers(network: VIP5Network, vectors: tuple[np.ndarray, np.ndarray], tokens: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """Embeddings of numbers: the unit vectors of users and items, [U, R] and [I, R], plus as much noise; zero vectors stay noise.

    Args:
        network: changed in place.
        vectors: of users and items.
        tokens: piece of each number, without padding, [U - 1] and [I - 1].
        seed: of basis and noise.
    """
    table = network.shared.weight
    basis, noise = _basis(table.shape[1], seed), torch.Generator().manual_seed(seed)
    std = network.settings.embedding_std or 1.0
    for vector, rows in zip(vectors, tokens):
        start = vector[1:] @ basis[: vector.shape[1]] * table.shape[1] ** 0.5  # as long as a random row
        start = torch.from_numpy(start).to(table.dtype)
        table[rows] = std * (start + torch.randn(start.shape, generator=noise))


@torch.no_grad()
def start_matching(
    network: VIP5Network,
    vectors: tuple[np.ndarray, np.ndarray],
    tokens: tuple[np.ndarray, np.ndarray],
    features: Tensor | None,
    seed: int,
) -> None:
    """A network that begins by choosing: it finds the user, compares the user's taste with every item, and writes the number of the best.

    The width is divided into orthogonal parts: what interactions say of a number (R), what a picture says (R), the user's taste as the
    decoder carries it (R), what kind of token it is (3), and the rest, which tells numbers apart. Then

    * the first head of the first encoder block reads the next token, an item's picture, into the picture's part of its number;
    * the decoder's first cross-attention finds the user's number and carries its taste over;
    * the last one compares that with the picture's part of every number (without pictures: with the number's own) and hands the
      number's identity to the output layer;
    * the map of pictures begins with a ridge regression from features to the items' vectors.

    Without it a small network did not find these steps within 40,000 lists of the shop: it chose by the numbers alone, which say nothing of
    an item without training interaction (benchmarks/quality/vip5.notes.md).

    Args:
        network, vectors, tokens, seed: as in `start_numbers`.
        features: of all items [I, F], for the visual tokens; None without.

    Raises:
        UserError: when the network is too narrow or its decoder too shallow.
    """
    settings, table = network.settings, network.shared.weight
    width, rank, head = settings.d_model, vectors[0].shape[1], settings.d_kv
    spare = width - 3 * rank - _CONTROL
    if head <= rank or spare < rank or len(network.decoder.block) < 2:
        raise UserError(
            f"matching_start: {rank} needs network sizes d_kv > {rank}, d_model >= {4 * rank + _CONTROL} and num_decoder_layers >= 2, got "
            f"d_kv {head}, d_model {width} and num_decoder_layers {len(network.decoder.block)}. Lower matching_start or widen the network."
        )
    number, picture, taste, control, identity = (
        torch.from_numpy(_basis(width, seed)).float().split((rank, rank, rank, _CONTROL, spare), dim=1)
    )
    is_user, is_item, is_start = control.T
    std, length = settings.embedding_std or 1.0, width**0.5

    def without_control(x: Tensor) -> Tensor:
        return x - x @ control @ control.T

    table.copy_(without_control(table))
    noise = torch.Generator().manual_seed(seed)
    for vector, rows, kind in zip(vectors, tokens, (is_user, is_item)):
        known = torch.from_numpy(vector[1:]).float() @ number.T * length
        own = torch.randn(len(rows), spare, generator=noise)
        own = own / own.norm(dim=1, keepdim=True) * length
        new = known.norm(dim=1, keepdim=True) < 1e-6  # as long as the others: norms before attention would otherwise favour it
        table[rows] = std * (known + torch.where(new, 2**0.5, 1.0) * own @ identity.T + 0.5 * length * kind)
    table[settings.decoder_start_token_id] = std * length * is_start
    network.encoder.category_embeddings.weight.zero_()

    first = network.encoder.block[0].layer[0].SelfAttention
    first.relative_attention_bias.weight[settings.relative_attention_num_buckets // 2 + 1, 0] = 10.0  # lists are 300 tokens long
    first.v.weight[:rank] = picture.T
    first.o.weight[:, :head] = 0.0
    first.o.weight[:, :rank] = 0.8 * picture

    find, match = (network.decoder.block[place].layer[1].EncDecAttention for place in (0, -1))
    for attention in (find, match):
        attention.q.weight.mul_(0.2)
        attention.k.weight.mul_(0.2)
    seen = picture if features is not None else number
    for begin in range(0, settings.num_heads * head, head):
        find.q.weight[begin], find.k.weight[begin] = 2.0 * is_start, 2.0 * is_user
        match.q.weight[begin : begin + rank], match.k.weight[begin : begin + rank] = 0.45 * taste.T, 0.45 * seen.T
        match.q.weight[begin + head - 1], match.k.weight[begin + head - 1] = is_start, is_item
    for attention in (find, match):
        attention.v.weight.zero_()
        attention.o.weight.zero_()
    find.v.weight[:rank] = number.T
    find.o.weight[:, :rank] = taste + 0.5 * number  # half of it also meets the numbers in the output layer: the next item is found by that
    rest = torch.cat((picture, identity), dim=1)[:, : find.v.weight.shape[0] - rank]  # for words: titles and pictures pass at half strength
    find.v.weight[rank : rank + rest.shape[1]], find.o.weight[:, rank : rank + rest.shape[1]] = rest.T, 0.5 * rest
    passed = min(spare, match.v.weight.shape[0])
    match.v.weight[:passed], match.o.weight[:, :passed] = identity[:, :passed].T, 2.0 * identity[:, :passed]
    if features is not None:
        _start_pictures(network, features, vectors[1], picture, control)


def _start_pictures(network: VIP5Network, features: Tensor, vectors: np.ndarray, picture: Tensor, control: Tensor) -> None:
    """The map of pictures begins with a ridge regression to `vectors`, fitted on items that have one; the rest of it says other things."""
    x = features.double().cpu().numpy()
    known = np.flatnonzero(np.linalg.norm(vectors, axis=1) > 1e-6)
    mean = x[known].mean(0)
    centred = x[known] - mean
    weights = np.linalg.solve(centred.T @ centred + 10.0 * np.eye(x.shape[1]), centred.T @ (vectors[known] - vectors[known].mean(0)))
    inner, _, outer = network.encoder.visual_embedding.feat_embedding[0].model
    rank = min(picture.shape[1], inner.out_features)
    scale = 0.5 / max((centred @ weights).std(), 1e-6)  # where tanh is nearly linear
    inner.weight[:rank] = torch.from_numpy(scale * weights.T[:rank]).float()
    inner.bias[:rank] = torch.from_numpy(-scale * (mean @ weights)[:rank]).float()
    outer.bias.zero_()
    blocks = outer.weight.view(network.settings.n_vis_tokens, -1, outer.in_features)  # of each visual token
    taken = torch.cat((picture, control), dim=1)
    for block in blocks:
        block.copy_(2.0 * (block - taken @ (taken.T @ block)))  # explanations need it, so it must not vanish beside the regression
        block[:, :rank] = picture[:, :rank] * picture.shape[0] ** 0.5 / scale
