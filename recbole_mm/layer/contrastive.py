r"""In-batch contrastive losses, without the work that repeated rows cost.

A batch of (user, item) pairs repeats users and, above all, popular items. Row b of an in-batch softmax depends on its anchor only, and equal keys contribute
equal terms, so the B x B matrix of

.. math:: \frac1B \sum_b \Big[\log \sum_{b'} e^{a_b^\top k_{b'} / \tau} - a_b^\top k_b / \tau\Big]

shrinks to distinct anchors x distinct keys, a key that occurs c times entering as :math:`e^{\cdot + \log c}`. Same value, same gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recbole_mm import distributed


class _LogSumExpProduct(torch.autograd.Function):
    """log sum_q exp(a_p . k_q) for every row p of a [P, D] over the rows q of k [Q, D]; the softmax is never normalised in memory."""

    @staticmethod
    def forward(ctx, anchors, keys):
        with torch.autocast(anchors.device.type, enabled=False):
            weights = anchors.float() @ keys.float().T
        largest = weights.amax(1, keepdim=True)
        weights.sub_(largest).exp_()
        total = weights.sum(1, keepdim=True)
        ctx.save_for_backward(anchors, keys, weights, total)
        return (total.log() + largest).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        anchors, keys, weights, total = ctx.saved_tensors
        scale = grad[:, None] / total
        return (weights @ keys.float()) * scale, weights.T @ (anchors.float() * scale)


def log_sum_exp_product(anchors: Tensor, keys: Tensor, log_counts: Tensor | None = None) -> Tensor:
    """log sum_q c_q exp(a_p . k_q), [P]; the counts ride along as one more column of the product."""
    if log_counts is not None:
        anchors = torch.cat([anchors, anchors.new_ones(len(anchors), 1)], 1)
        keys = torch.cat([keys, log_counts[:, None]], 1)
    return _LogSumExpProduct.apply(anchors, keys)


def info_nce(
    anchors: Tensor,
    keys: Tensor,
    temperature: float,
    anchor_of: Tensor,
    key_of: Tensor,
    extra: Tensor | None = None,
    distinct: bool = False,
    key_ids: Tensor | None = None,
) -> Tensor:
    """In-batch InfoNCE of B pairs (anchors[anchor_of[b]], keys[key_of[b]]); a scalar.

    Args:
        anchors: [P, D] distinct anchors. keys: [Q, D] distinct keys, each of which occurs in `key_of`.
        anchor_of, key_of: [B] rows of the pairs.
        extra: [B] similarities (before the temperature) of one more negative for each pair.
        distinct: count a key once however often it occurs in the batch, so that the same item never is its own negative.
        key_ids: [Q] what tells equal keys of several processes; needed for `distinct` only.

    Where several processes share the batch, the keys are those of all of them.
    """
    counts = None if distinct else torch.bincount(key_of, minlength=len(keys)).to(keys.dtype).log()
    scaled = anchors / temperature
    if distributed.active() is None:
        total = log_sum_exp_product(scaled, keys, counts)[anchor_of]
    else:
        total = log_sum_exp_product(scaled, *_keys_of_all(keys, counts, key_ids))[anchor_of]
    if extra is not None:
        total = torch.logaddexp(total, extra / temperature)
    return (total - (scaled[anchor_of] * keys[key_of]).sum(1)).mean()


def _keys_of_all(keys: Tensor, log_counts: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys of all processes and the logarithms of their counts. A key that several have is there several times, which is the same as a larger count."""
    if log_counts is not None:
        return tuple(distributed.gather_rows(keys, log_counts))
    if key_ids is None:
        raise ValueError("info_nce: distinct keys of several processes need key_ids")
    keys, ids = distributed.gather_rows(keys, key_ids)
    first = torch.full((int(ids.max()) + 1,), len(ids), device=ids.device).scatter_reduce(
        0, ids, torch.arange(len(ids), device=ids.device), "amin"
    )
    again = first[ids] != torch.arange(len(ids), device=ids.device)
    return keys[~again], keys.new_zeros(int((~again).sum()))


def bpr(positive: Tensor, negative: Tensor, epsilon: float = 0.0) -> Tensor:
    """Mean of -log(epsilon + sigmoid(positive - negative)); without epsilon by logsigmoid, which never overflows."""
    difference = positive - negative
    return -(logsigmoid(difference) if epsilon == 0 else (epsilon + difference.sigmoid()).log()).mean()
