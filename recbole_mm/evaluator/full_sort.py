r"""Evaluation: RecBole's metrics from score matrices in batches of users, without a dense matrix of right answers.

`evaluate` scores batches of rows within a memory budget, takes the top k of each, notes which of them are right and how many there are, and hands that to
RecBole's own metric classes in RecBole's own data structure (``rec.topk``, ``rec.items``). What a metric needs beyond the top k
(``rec.meanrank``, ``rec.score``, ``data.*``) comes from RecBole's Collector. So the values are RecBole's; the exceptions are deliberate:

* equal scores are ordered by the smaller item id, whatever the batch size and the device (``torch.topk`` leaves the order open);
* a NaN score is an error (RecBole ranks it first);
* several processes gather their rows before the metrics are computed (RecBole averages averages).

Shapes: B rows of a batch, U rows in all, I items (column 0 is padding), K the largest ``topk``.
"""

import contextlib
import copy
import math
import random
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.utils import EvaluatorType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from recbole_mm import distributed
from recbole_mm.data.loader import FullSortLoader
from recbole_mm.errors import UserError
from recbole_mm.evaluator.groups import group_metrics
from recbole_mm.evaluator.per_user import PerUser, row_values

DEFAULT_MEMORY_MB = 512
# CPU: the allocator reuses a score matrix of this size (see memory.py), and much of it stays in the cache; 4, 8 and 24 MiB are slower
_CACHE_BYTES = 16 << 20
_FOLD = 8  # columns folded into one by `top_k` before it searches


def top_k(scores: Tensor, k: int) -> Tensor:
    """Item ids of the `k` largest scores of each row, best first, equal scores by smaller id; int64 [B, k].

    On the CPU the columns are first folded to the maximum of every `_FOLD`: the k best lie in columns of the k best maxima, so only those are searched.

    Raises:
        ValueError: a row contains NaN.
    """
    width = scores.shape[1]
    if k >= width:
        values, items = scores.sort(dim=1, descending=True, stable=True)
        values, items = values[:, :k], items[:, :k]
        tied = torch.zeros(0, dtype=torch.int64)
    else:
        values, items = _candidates(scores, k + 1)
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        values, items = values[:, :k], items[:, :k]
    if bool(values[:, 0].isnan().any()):  # NaN counts as the largest value in topk and sort
        raise ValueError("NaN score")
    if k < width:
        same = values[:, 1:] == values[:, :-1]
        if bool(same.any()):
            items, order = items.sort(dim=1)
            order = values.gather(1, order).sort(dim=1, descending=True, stable=True).indices
            items = items.gather(1, order)
        for rows in tied.split(max(1, (1 << 24) // width)):  # more equal scores at the boundary than places: choose by id
            items[rows] = _smallest_ids(scores[rows], k)
    return items


def _candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, sorted, with their columns."""
    rows, width = scores.shape
    fold = width // _FOLD
    if scores.device.type != "cpu" or fold < 4 * k:
        return scores.topk(k, dim=1)
    folded = scores[:, : fold * _FOLD].unflatten(1, (_FOLD, fold)).amax(1)  # column c holds the maximum of c, c + fold, ...; NaN stays NaN
    best = folded.topk(k, dim=1, sorted=False).indices
    columns = (best.unsqueeze(2) + torch.arange(_FOLD) * fold).flatten(1)
    rest = torch.arange(fold * _FOLD, width).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, at = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, at)


def _smallest_ids(scores: Tensor, k: int) -> Tensor:
    """Top k of rows whose k-th and (k+1)-th values are equal: everything above that value, then its smallest ids."""
    bound = scores.topk(k, dim=1, sorted=True).values[:, -1:]
    above, equal = scores > bound, scores == bound
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    items = keep.nonzero()[:, 1].view(len(scores), k)
    return items.gather(1, scores.gather(1, items).sort(dim=1, descending=True, stable=True).indices)


class _LargestTensor(TorchDispatchMode):
    """Size in bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(value, Tensor) and value.layout == torch.strided
            ):  # a sparse graph has no storage and does not grow with the batch
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return out


@contextlib.contextmanager
def _random_state_kept():
    """Leave every random generator as it was: what is drawn inside must not shift what a resumed run draws later."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


_probed: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def bytes_per_row(model, rows, total: int, item_num: int) -> int | None:
    """Bytes of the largest tensor that scoring one more row makes, at least one row of scores; None for a model without ``full_sort_predict``.

    Some models build [B, I, D] to score a batch, some only [B, I]; RecBole never notices, because its default is one user at a time. Two small batches are scored
    under a dispatch mode that watches sizes; the growth between them is what a row costs. Done once per model.

    Args:
        rows: gives the interaction of rows 0..n on the model's device.
        total: number of rows there are.
    """
    known = _probed.setdefault(model, {})
    if item_num not in known:
        small, large = min(8, total), min(32, total)
        sizes = []
        try:
            with _random_state_kept():
                for count in (small, large):
                    with _LargestTensor() as watch:
                        model.full_sort_predict(rows(count))
                    sizes.append(watch.bytes)
        except NotImplementedError:
            known[item_num] = None
        else:
            known[item_num] = max(4 * item_num, math.ceil((sizes[1] - sizes[0]) / max(large - small, 1)))
    return known[item_num]


@dataclass
class Ranking:
    """What the metrics are computed from, one row per evaluated user (or per interaction of a sequential model).

    Attributes:
        users: [U] user ids.
        items: [U, K] recommended items, best first.
        hits: [U, K] whether each is right.
        lengths: [U] number of right items.
        rows, targets: [P] the right items as pairs, sorted by row.
    """

    users: Tensor
    items: Tensor
    hits: Tensor
    lengths: Tensor
    rows: Tensor
    targets: Tensor


@dataclass
class EvaluationResult:
    """Result of `evaluate`.

    Attributes:
        metrics: RecBole's result, rounded to ``metric_decimal_place``.
        raw: the same values unrounded.
        users: number of evaluated rows.
    """

    metrics: OrderedDict
    raw: dict[str, float]
    users: int
    _ranking: Ranking | None = field(default=None, repr=False)
    _values: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _evaluator: object = field(default=None, repr=False)
    _dataset: object = field(default=None, repr=False)
    _train_dataset: object = field(default=None, repr=False)

    @property
    def per_user(self) -> PerUser | None:
        """One value per evaluated user and metric (see `recbole_mm.evaluator.per_user`); None for value metrics such as AUC."""
        return None if self._ranking is None else PerUser.build(self._ranking, self._values, self._dataset)

    @property
    def groups(self) -> dict[str, dict[str, float]]:
        """Metrics on cold and on warm targets (see `recbole_mm.evaluator.groups`); empty where the training part is unknown."""
        if self._ranking is None or self._train_dataset is None:
            return {}
        return group_metrics(self._ranking, self._evaluator, self._train_dataset)


def batch_rows(config, device: torch.device, row_bytes: int, item_num: int, sequential: bool) -> int:
    """Rows per batch: within ``eval_memory_mb``, of a cache-friendly size on the CPU, and for sequential models at most ``eval_batch_size``."""
    budget = (config["eval_memory_mb"] or DEFAULT_MEMORY_MB) * 2**20
    rows = budget // (2 * row_bytes + 5 * item_num)  # the tensor, one temporary like it, and the search for the top k
    if device.type == "cpu":
        rows = min(rows, max(_CACHE_BYTES // row_bytes, 64))
    if sequential:
        rows = min(rows, config["eval_batch_size"])
    return max(1, int(rows))


@torch.no_grad()
def evaluate(model, eval_data, config, collector, evaluator, show_progress=False) -> EvaluationResult:
    """Evaluate `model`, which is put into evaluation mode, on a loader of `recbole_mm.data.loader.data_preparation`.

    Args:
        model: any of RecBole's or our models, already holding the weights to be evaluated.
        eval_data: a `FullSortLoader`, or one of RecBole's evaluation loaders.
        config: the run's settings.
        collector, evaluator: RecBole's ``Collector`` and ``Evaluator`` of the same settings.
        show_progress: draw a progress bar.

    Raises:
        UserError: a score is NaN, or a ``topk`` exceeds the number of items.
    """
    model.eval()
    device = torch.device(config["device"])
    full = isinstance(eval_data, FullSortLoader)
    dataset = eval_data._dataset
    train_dataset = getattr(eval_data, "train_dataset", None)
    values_only = config["eval_type"] == EvaluatorType.VALUE
    most = None if values_only else max(config["topk"])
    if most is not None and most > dataset.item_num:
        raise UserError(f"topk: {most} places cannot be filled from {dataset.item_num - 1} items. Choose a smaller topk.")
    rest = _without(collector, ("rec.topk", "rec.items"))
    batches = _full_batches(model, eval_data, config, device) if full else _recbole_batches(model, eval_data, config, device)
    total = eval_data.sample_size if full else len(eval_data)
    bar = tqdm(total=total, ncols=100, desc="Evaluate", delay=2, leave=False, disable=not show_progress)
    parts, count = [], 0
    for scores, interaction, users, positive_rows, positive_items in batches:
        bar.update(len(users) if full else 1)
        if values_only:
            rest.eval_batch_collect(scores, interaction, positive_rows, positive_items)
            count += len(scores)
            continue
        try:
            items = top_k(scores, most)
        except ValueError:
            row = int(scores.isnan().any(1).nonzero()[0])
            name = dataset.id2token(dataset.uid_field, int(users[row]))
            raise UserError(
                f"{type(model).__name__} gives NaN as score for user {name!r}. The training has diverged or the item features hold NaN: "
                "lower learning_rate, set clip_grad_norm, or train without enable_amp."
            ) from None
        if _collects_scores(rest):
            rest.eval_batch_collect(scores, interaction, positive_rows, positive_items)
        # P x K comparisons instead of a matrix [B, I]: P is the number of right items of the batch.
        hits = torch.zeros_like(items, dtype=torch.bool)
        for begin in range(0, len(positive_rows), 1 << 16):
            rows, targets = positive_rows[begin : begin + (1 << 16)], positive_items[begin : begin + (1 << 16)]
            at, place = (items[rows] == targets.unsqueeze(1)).nonzero(as_tuple=True)
            hits[rows[at], place] = True
        lengths = torch.bincount(positive_rows, minlength=len(items))
        parts.append([v.cpu() for v in (users, items, hits, lengths, positive_rows + count, positive_items)])
        count += len(items)
    bar.close()
    ranking = None
    if not values_only:
        none = torch.zeros(0, dtype=torch.int64)
        parts.insert(0, [none, none.view(0, most), none.view(0, most).bool(), none, none, none])  # a process may have no rows
        ranking = _ranking([torch.cat(column) for column in zip(*parts)], shared=full)
        collector.data_struct.set("rec.topk", torch.cat([ranking.hits.int(), ranking.lengths.int().unsqueeze(1)], dim=1))
        if collector.register.need("rec.items"):
            collector.data_struct.set("rec.items", ranking.items)
    if full:
        _gather_collected(collector)
    _training_facts(collector, train_dataset)
    metrics, raw, values = _metrics(evaluator, _take(collector))
    return EvaluationResult(
        metrics, raw, count if ranking is None else len(ranking.users), ranking, values, evaluator, dataset, train_dataset
    )


def _full_batches(model, loader: FullSortLoader, config, device):
    """Yield scores [B, I] with masked items at -inf, interaction, user ids [B], and the right items as pairs on the device."""
    item_num, total = loader._dataset.item_num, loader.sample_size
    own = distributed.own_part(total)
    first, last = own.start, own.stop
    if not total:
        return
    row_bytes = bytes_per_row(model, lambda n: loader.rows(0, n).to(device), total, item_num)
    score = model.full_sort_predict if row_bytes else _pair_scorer(model, loader, config, device)
    row_bytes = row_bytes or 4 * item_num
    step = batch_rows(config, device, row_bytes, item_num, loader.is_sequential)
    batches = math.ceil((last - first) / step)
    step = math.ceil((last - first) / max(batches, 1))  # equal batches: none is left with two rows
    for start in range(first, last, max(step, 1)):
        stop = min(start + step, last)
        interaction = loader.rows(start, stop).to(device)
        scores = score(interaction).view(-1, item_num)
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        scores = scores.contiguous()  # a broadcast result has rows that share memory
        scores[:, 0] = -math.inf
        if loader.masks_history:
            rows, items = loader.pairs("history", start, stop, device)
            scores.view(-1).index_fill_(0, rows * item_num + items, -math.inf)
        yield scores, interaction, loader.row_users[start:stop], *loader.pairs("positive", start, stop, device)


def _pair_scorer(model, loader, config, device):
    """Stand-in for ``full_sort_predict``: predicts every (row, item) pair, in pieces of ``eval_batch_size``."""
    every_item = loader._dataset.get_item_feature().to(device)

    def score(interaction):
        scores = []
        items, size = len(every_item), max(1, config["eval_batch_size"] // len(every_item))
        for start in range(0, len(interaction), size):
            part = interaction[slice(start, start + size)]
            pairs = part.repeat_interleave(items)
            pairs.update(every_item.repeat(len(part)))
            pieces = range(0, len(pairs), config["eval_batch_size"])
            scores += [model.predict(pairs[slice(p, p + config["eval_batch_size"])]).view(-1) for p in pieces]
        return torch.cat(scores)

    return score


def _recbole_batches(model, loader, config, device):
    """The same from one of RecBole's loaders; for labeled evaluation (value metrics) scores are [B] and the rest is None."""
    size = config["eval_batch_size"]
    item_num, uid, iid = loader._dataset.item_num, config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
    for interaction, row_index, positive_rows, positive_items in loader:
        interaction = interaction.to(device)
        if isinstance(loader, FullSortEvalDataLoader):  # RecBole's own: someone built the loaders by RecBole's data_preparation
            scores = model.full_sort_predict(interaction).view(-1, item_num).float().contiguous()
            scores[:, 0] = -math.inf
            if row_index is not None:
                scores[row_index] = -math.inf
            yield scores, interaction, interaction[uid], positive_rows.to(device), positive_items.to(device)
            continue
        pieces = [interaction[slice(start, start + size)] for start in range(0, len(interaction), size)]
        predicted = torch.cat([model.predict(piece).view(-1) for piece in pieces])
        if config["eval_type"] == EvaluatorType.VALUE:
            yield predicted, interaction, interaction[uid] if uid in interaction else predicted, positive_rows, positive_items
            continue
        row_index, positive_rows, positive_items = row_index.to(device), positive_rows.to(device), positive_items.to(device)
        scores = torch.full((int(positive_rows[-1]) + 1, item_num), -math.inf, device=device)
        scores[row_index, interaction[iid]] = predicted.float()
        users = torch.zeros(len(scores), dtype=torch.int64, device=device)
        users[row_index] = interaction[uid]
        pairs = torch.unique(positive_rows * item_num + positive_items)
        yield scores, interaction, users, pairs // item_num, pairs % item_num


def _without(collector, names):
    """The same collector (it shares the data structure), collecting nothing of `names`."""
    rest = copy.copy(collector)
    rest.register = copy.copy(collector.register)
    for name in names:
        if collector.register.need(name):
            setattr(rest.register, name, False)
    return rest


def _collects_scores(collector) -> bool:
    return any(collector.register.need(name) for name in ("rec.meanrank", "rec.score", "data.label"))


def _ranking(columns: list[Tensor], shared: bool) -> Ranking:
    """The rows of all processes where they shared them out (RecBole's own loaders go through all rows in every process)."""
    if shared:
        before = sum(distributed.gather_values(len(columns[0]))[: distributed.world()[0]])
        columns[4] = columns[4] + before
        columns = [distributed.gather(column) for column in columns]
    return Ranking(*columns)


def _gather_collected(collector) -> None:
    for name in ("rec.meanrank", "rec.score", "data.label"):
        if name in collector.data_struct:
            collector.data_struct.set(name, distributed.gather(collector.data_struct.get(name)))


def _training_facts(collector, train_dataset) -> None:
    """Let the collector note the ``data.*`` that metrics need, where no training has done so (a loaded model)."""
    needed = [n for n in ("data.num_items", "data.num_users", "data.count_items", "data.count_users") if collector.register.need(n)]
    if train_dataset is not None and any(name not in collector.data_struct for name in needed):
        collector.data_collect(SimpleNamespace(dataset=train_dataset))


def _take(collector):
    """RecBole's ``get_data_struct``, which also clears what was collected, kept from tripping over the entries that are not tensors."""
    struct = copy.copy(collector.data_struct)
    struct._data_dict = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in collector.data_struct._data_dict.items()}
    for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
        if key in collector.data_struct:
            del collector.data_struct[key]
    return struct


def _metrics(evaluator, struct) -> tuple[OrderedDict, dict[str, float], dict[str, np.ndarray]]:
    """Rounded and unrounded metrics, and values per row of those that have them."""
    metrics, raw, values = OrderedDict(), {}, {}
    for name in evaluator.metrics:
        metric = evaluator.metric_class[name]
        table = row_values(metric, struct)
        if table is not None and table.ndim == 2:
            metrics.update(metric.topk_result(name, table))
            mean = table.mean(axis=0)
            for k in metric.topk:
                raw[f"{name}@{k}"], values[f"{name}@{k}"] = float(mean[k - 1]), table[:, k - 1]
            continue
        if table is not None:
            values[name] = table
        metrics.update(metric.calculate_metric(struct))
        exact = copy.copy(metric)
        exact.decimal_place = 15
        raw.update({k: float(v) for k, v in exact.calculate_metric(struct).items()})
    return metrics, raw, values
