r"""VLMo's three pre-training losses: image-text contrast, image-text matching with hard negatives, masked words.

Source: Bao et al., NeurIPS 2022, and the released training code (microsoft/unilm, folder vlmo, commit 768a3c87), as formulas. In several
processes each puts its own features first, with gradient, and those of the others behind, without.

Differences from the official code: a row of matching weights that underflows to zero draws uniformly from the other pairs instead of
failing, a batch without a masked word gives loss 0 instead of NaN, and the contrast uses one process as well as many.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.encoder.vlmo_module import VLMo

MLM_WEIGHT = 0.25
MASK_RATE = 0.15
IGNORE = -100


def similarities(images: Tensor, texts: Tensor, log_scale: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scaled similarities [K, K], rows are pictures; `others` holds the other processes' pictures and texts, used without gradient."""
    if others is not None:
        images = torch.cat([images, others[0].detach()])
        texts = torch.cat([texts, others[1].detach()])
    return log_scale.exp() * images @ texts.t()


def contrast(logits: Tensor) -> Tensor:
    """Mean of the cross entropies of the rows and of the columns, the pair on the diagonal being the right answer."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.float().t(), target)) / 2


def matching_weights(logits: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Sampling weights (picture -> texts, text -> pictures), each [own, K]: softmax of the similarities with the own pair set to 0."""
    with torch.no_grad():
        weights = []
        for rows in (logits[:own], logits.t()[:own]):
            w = rows.float().softmax(dim=1)
            w[torch.arange(own), torch.arange(own)] = 0
            weights.append(w)
    return weights[0], weights[1]


def draw(weights: Tensor) -> Tensor:
    """One column per row, with probability proportional to the weights; a row of zeros draws uniformly from all but its own pair."""
    empty = weights.sum(dim=1) <= 0
    if empty.any():
        uniform = 1 - torch.eye(*weights.shape, device=weights.device, dtype=weights.dtype)
        weights = torch.where(empty[:, None], uniform, weights)
    return torch.multinomial(weights, 1).squeeze(1)


def matching(model: VLMo, images: Tensor, ids: Tensor, mask: Tensor, drawn_images: Tensor, drawn_texts: tuple[Tensor, Tensor]):
    """Matching loss, its logits [3B, 2] and labels: own pairs, (drawn picture, own text), (own picture, drawn text)."""
    all_images = torch.cat([images, drawn_images, images])
    all_ids = torch.cat([ids, ids, drawn_texts[0]])
    all_mask = torch.cat([mask, mask, drawn_texts[1]])
    logits = model.itm_score(model.joint(all_images, all_ids, all_mask)["cls_feats"])
    labels = torch.cat([torch.ones(len(ids)), torch.zeros(2 * len(ids))]).long().to(ids.device)
    return F.cross_entropy(logits.float(), labels), logits, labels


def masked_words(model: VLMo, images: Tensor, masked_ids: Tensor, mask: Tensor, labels: Tensor):
    """Masked-word loss through the joint path, with its published weight of 0.25, and the logits [B, L, V]."""
    missing = model.sizes.text_length - labels.shape[1]
    labels = F.pad(labels, (0, missing), value=IGNORE)
    logits = model.mlm_score(model.joint(images, masked_ids, mask)["text_feats"])
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return MLM_WEIGHT * total / (labels != IGNORE).sum().clamp(min=1), logits


def mask_words(ids: Tensor, continues: Tensor, length: int, specials: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Whole-word masking: (masked ids, labels), both of the shape of `ids` [B, l].

    Per text, whole words are taken in random order until round(0.15 * length) tokens are reached; `length` counts the padding and padding
    tokens are candidates like words, so that about 15 % of the real tokens are masked whatever the length. [CLS] and [SEP] are never taken.
    Of the tokens taken, 80 % become [MASK], 10 % a random id, 10 % stay.

    `continues` [V] marks word pieces that continue a word; `specials` holds the ids under ``cls``, ``sep``, ``pad`` and ``mask``.
    """
    budget = max(1, round(MASK_RATE * length))
    taken = torch.zeros_like(ids, dtype=torch.bool)
    follows = continues[ids].tolist()
    for row, (text, joined) in enumerate(zip(ids.tolist(), follows)):
        words: list[list[int]] = []
        for i, token in enumerate(text):
            if token in (specials["cls"], specials["sep"], specials["pad"]):
                continue
            if joined[i] and words and words[-1][-1] == i - 1:
                words[-1].append(i)
            else:
                words.append([i])
        real = sum(token != specials["pad"] for token in text)
        words += [[]] * (length - real)  # a padding token drawn uses up one token of the budget
        count = 0
        for w in torch.randperm(len(words)).tolist():
            if count >= budget:
                break
            size = max(len(words[w]), 1)
            if count + size > budget:
                continue
            count += size
            taken[row, words[w]] = True
    labels = torch.where(taken, ids, IGNORE)
    dice = torch.rand(ids.shape)
    masked = torch.where(taken & (dice < 0.8), specials["mask"], ids)
    return torch.where(taken & (dice >= 0.9), torch.randint(len(continues), ids.shape), masked), labels
