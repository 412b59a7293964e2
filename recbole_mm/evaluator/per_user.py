"""Metric values of every evaluated user, for significance tests between runs on the same data."""

import hashlib
import inspect
from dataclasses import dataclass

import numpy as np
from recbole.evaluator import metrics as recbole_metrics
from recbole.evaluator.base_metric import TopkMetric


@dataclass
class PerUser:
    """Values per evaluated row of one evaluation.

    Attributes:
        users: [U] user tokens (a sequential model with several test interactions of a user has several rows of that user).
        targets_hash: SHA-256 over users and their right items by token; two runs may be compared row by row if it is the same.
        values: metric -> [U], the same names as in the metrics ("recall@10"); NaN where a metric is not defined for the row.
    """

    users: np.ndarray
    targets_hash: str
    values: dict[str, np.ndarray]

    @classmethod
    def build(cls, ranking, values, dataset) -> "PerUser":
        """From a `Ranking`, the values of the metrics, and the dataset that knows the tokens."""
        users = np.asarray(dataset.id2token(dataset.uid_field, ranking.users.numpy()), dtype=str)
        targets = np.asarray(dataset.id2token(dataset.iid_field, ranking.targets.numpy()), dtype=str)
        # The order of rows and of ids depends on how the dataset was read; the hash must not.
        pairs = sorted(zip(users[ranking.rows.numpy()].tolist(), targets.tolist()))
        digest = hashlib.sha256("\n".join(f"{user}\t{item}" for user, item in pairs).encode()).hexdigest()
        return cls(users, digest, dict(values))

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into ``per_user.npz``: users, targets_hash and one array per metric; readable without pickle."""
        return {"users": self.users, "targets_hash": np.array(self.targets_hash), **self.values}


def row_values(metric, struct) -> np.ndarray | None:
    """Values of one of RecBole's own metrics for each row: [U, K] for places 1..K, [U] for GAUC, None where it has none."""
    if type(metric).__module__ != recbole_metrics.__name__:
        return None
    if isinstance(metric, TopkMetric):
        return topk_values(metric, *metric.used_info(struct))
    if isinstance(metric, recbole_metrics.AveragePopularity):
        items, counts = metric.used_info(struct)
        return metric.metric_info(_per_item(metric.get_pop, items, counts))
    if isinstance(metric, recbole_metrics.TailPercentage):
        items, counts = metric.used_info(struct)
        return metric.metric_info(_per_item(metric.get_tail, items, counts))
    if isinstance(metric, recbole_metrics.GAUC):
        rank_sum, candidates, right = struct.get("rec.meanrank").double().numpy().T
        with np.errstate(divide="ignore", invalid="ignore"):
            pairs = (candidates + 1) * right - right * (right + 1) / 2 - rank_sum
            return np.where((right > 0) & (candidates > right), pairs / ((candidates - right) * right), np.nan)
    return None


def topk_values(metric, hits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``metric_info`` of a top-k metric, which takes the number of right items or does not; [U, K]."""
    takes_lengths = len(inspect.signature(metric.metric_info).parameters) > 1
    return metric.metric_info(hits, lengths) if takes_lengths else metric.metric_info(hits)


def _per_item(value_of, items: np.ndarray, counts: dict) -> np.ndarray:
    """RecBole looks every cell of [U, K] up in Python; its function sees each distinct item once here."""
    distinct, at = np.unique(items, return_inverse=True)
    return value_of(distinct[None, :], counts)[0][at.reshape(items.shape)]
