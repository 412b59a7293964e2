"""Metrics on cold and on warm items, and on warm ones by popularity.

Cold is an item without any training interaction (for sequential models: neither target nor part of a training sequence). The ranked lists are those of
the whole evaluation, with all candidates; only the right answers are restricted to the group, and users without one in the group are left
out. So cold and warm can be compared with each other and over models, and a model that cannot score cold items shows zeros.

Popular, middling and rare items have a third of the training interactions each: few items are popular, many are rare.
"""

import numpy as np
import torch
from recbole.evaluator import metrics as recbole_metrics
from recbole.evaluator.base_metric import TopkMetric
from torch import Tensor

from recbole_mm.evaluator.per_user import topk_values


def warm_items(train_dataset) -> Tensor:
    """Whether each item occurs in training, bool [item_num]; padding does not."""
    feat = train_dataset.inter_feat
    warm = torch.zeros(train_dataset.item_num, dtype=torch.bool)
    warm[feat[train_dataset.iid_field].cpu()] = True
    sequence = getattr(train_dataset, f"{train_dataset.iid_field}_list_field", None)
    if sequence is not None and sequence in feat:
        warm[feat[sequence].cpu().flatten()] = True
    warm[0] = False
    return warm


def popularity(train_dataset) -> Tensor:
    """Training interactions of each item, int64 [item_num]; at least 1 for a warm item."""
    feat, field = train_dataset.inter_feat, train_dataset.iid_field
    counts = torch.bincount(feat[field].cpu(), minlength=train_dataset.item_num)
    sequence, length = (getattr(train_dataset, f"{field}_list_field", None), getattr(train_dataset, "item_list_length_field", None))
    if sequence in feat and length in feat:  # rows are (what came before, what comes next): a user's first item is nobody's next one
        first = feat[sequence].cpu()[feat[length].cpu() == 1]
        counts = counts + torch.bincount(first[:, 0] if first.dim() > 1 else first, minlength=train_dataset.item_num)
    counts = torch.maximum(counts, warm_items(train_dataset).long())
    counts[0] = 0
    return counts


def popularity_bands(train_dataset) -> dict[str, Tensor]:
    """Which items are popular, middling and rare, bool [item_num] each; cold items and padding are none of them."""
    counts = popularity(train_dataset)
    order = counts.argsort(descending=True, stable=True)  # equal counts by id
    before = counts[order].cumsum(0) - counts[order]
    band = torch.full_like(counts, -1)
    band[order] = torch.div(before * 3, max(int(counts.sum()), 1), rounding_mode="floor")
    band[counts == 0] = -1
    return {name: band == number for number, name in enumerate(("popular", "middling", "rare"))}


def group_metrics(ranking, evaluator, train_dataset) -> dict[str, dict[str, float]]:
    """Cold, warm, popular, middling, rare -> the top-k metrics of `evaluator`, "users" and "targets" (how many there are).

    A group without targets has only those two entries, both 0.
    """
    warm = warm_items(train_dataset)
    result = {}
    for name, member in {"cold": ~warm, "warm": warm, **popularity_bands(train_dataset)}.items():
        inside = member[ranking.targets]
        lengths = torch.bincount(ranking.rows[inside], minlength=len(ranking.users))
        chosen = lengths > 0
        group = {"users": int(chosen.sum()), "targets": int(inside.sum())}
        if group["users"]:
            hits = (ranking.hits & member[ranking.items])[chosen].numpy()
            for metric_name in evaluator.metrics:
                metric = evaluator.metric_class[metric_name]
                if isinstance(metric, TopkMetric) and type(metric).__module__ == recbole_metrics.__name__:
                    mean = np.mean(topk_values(metric, hits, lengths[chosen].numpy()), axis=0)
                    group.update({f"{metric_name}@{k}": float(mean[k - 1]) for k in metric.topk})
        result[name] = group
    return result
