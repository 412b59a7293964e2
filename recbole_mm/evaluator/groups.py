"""Metrics on cold and on warm items.

Cold is an item without any training interaction (for sequential models: neither target nor part of a training sequence). The ranked lists are those of
the whole evaluation, with all candidates; only the right answers are restricted to the group, and users without one in the group are left
out. So cold and warm can be compared with each other and over models, and a model that cannot score cold items shows zeros.
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


def group_metrics(ranking, evaluator, train_dataset) -> dict[str, dict[str, float]]:
    """``{"cold": {...}, "warm": {...}}`` with the top-k metrics of `evaluator`, "users" and "targets" (how many there are).

    A group without targets has only those two entries, both 0.
    """
    warm = warm_items(train_dataset)
    result = {}
    for name, member in (("cold", ~warm), ("warm", warm)):
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
