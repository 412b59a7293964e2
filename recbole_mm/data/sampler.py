r"""Negative sampling on the training device, without loops over users or items.

RecBole 1.2.1 draws ids with NumPy and looks each one up in a Python set. Here the same distributions come from sorted arrays:

* A (user, item) pair is the number ``user * item_num + item``; the pairs a user has used are a sorted vector of such numbers.
* **uniform**: every user has :math:`f_u` free items (not padding, not used). One integer :math:`r` below :math:`f_u` names the item exactly: with the
  used items :math:`i_0 < i_1 < \dots` of the user, the r-th free item is :math:`r + 1 + |\{k : i_k - 1 - k \le r\}|`. As
  :math:`i_k - 1 - k` never falls with k, the count is one ``searchsorted``. No draw is ever rejected.
* **popularity**: :math:`P(i) \propto c_i^\alpha` by inversion of the cumulative weights; used items are drawn again. A user who has used nearly all the
  popular items would need many draws: after some rounds the rest is drawn exactly from that user's remaining weights.

The semantics are RecBole's: item 0 is never drawn; what counts as used grows with the phase (train; train + valid; all);
popularity counts the interactions of all phases; a repeatable dataset only forbids the positive item of the same row; k negatives for B
rows come as k blocks of length B. A user with nothing left to draw is an error where RecBole would loop for ever (or stop for the test phase only).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recbole_mm.errors import UserError

DISTRIBUTIONS = ("uniform", "popularity")
_REJECTION_ROUNDS = 12  # with half of the weight used, one row in 4096 is left for the exact draw
_EXACT_ELEMENTS = 1 << 22  # weights held at a time by the exact draw


def pair_keys(users: Tensor, items: Tensor, item_num: int) -> Tensor:
    """Sorted, distinct ``user * item_num + item`` of the given pairs, int64 [P]."""
    return torch.unique(users.long() * item_num + items.long())


def phase_pairs(datasets: Sequence, item_num: int) -> list[Tensor]:
    """What is used in each phase: entry p holds the sorted keys of the interactions of ``datasets[0..p]``."""
    keys, seen = [], None
    for dataset in datasets:
        feat = dataset.inter_feat
        new = pair_keys(feat[dataset.uid_field], feat[dataset.iid_field], item_num)
        seen = new if seen is None else torch.unique(torch.cat([seen, new]))
        keys.append(seen)
    return keys


def popularity(datasets: Sequence, item_num: int) -> Tensor:
    """Number of interactions of each item over all given datasets, int64 [item_num]."""
    return sum(torch.bincount(d.inter_feat[d.iid_field].cpu(), minlength=item_num) for d in datasets)


class NegativeSampler:
    """Draws items that a user has not used.

    Args:
        user_num: number of users, padding included.
        item_num: number of items, padding included.
        used: sorted keys of the used pairs (see `pair_keys`), or None for a repeatable dataset, where only the positive item of the row is forbidden.
        distribution: "uniform" or "popularity".
        alpha: exponent of the popularity.
        counts: [item_num] interactions of each item; only for "popularity".
        device: where the sampler's arrays live and the draws are made.
        tokens: called with a user id, gives the user's name for error messages.
    """

    def __init__(self, user_num, item_num, used=None, distribution="uniform", alpha=1.0, counts=None, device="cpu", tokens=str):
        if distribution not in DISTRIBUTIONS:
            raise UserError(
                f"train_neg_sample_args: distribution must be one of {', '.join(DISTRIBUTIONS)} (or none for a loss without negatives), got {distribution!r}."
            )
        self.user_num, self.item_num, self.distribution = user_num, item_num, distribution
        self.device = torch.device(device)
        self.repeatable = used is None
        if item_num < 2 + self.repeatable:
            raise UserError(f"Negative sampling needs at least {1 + self.repeatable} items, the dataset has {item_num - 1}.")
        weights = None
        if distribution == "popularity":
            weights = counts.to(torch.float64).cpu()
            weights = torch.where(weights > 0, weights.pow(alpha), weights)  # an item nobody has is never drawn, whatever alpha is
            weights[0] = 0
            self._weights = weights.to(self.device)
            self._cumulative = self._weights.cumsum(0)
        if self.repeatable:
            if weights is not None and int((weights > 0).sum()) < 2:
                raise UserError("Negative sampling by popularity needs at least two items with interactions.")
            return
        used = used[(used % item_num) > 0].cpu()
        users = used // item_num
        counts_of_user = torch.bincount(users, minlength=user_num)
        start = counts_of_user.cumsum(0) - counts_of_user
        rank = torch.arange(len(used)) - start[users]
        free = item_num - 1 - counts_of_user
        self._check_free(free if weights is None else self._free_weight(weights, used), tokens)
        self._used = used.to(self.device)
        self._start, self._free = start.to(self.device), free.to(self.device)
        self._shifted = (used - 1 - rank).to(self.device)  # user * item_num + (i_k - 1 - k), sorted because both parts are

    def _free_weight(self, weights: Tensor, used: Tensor) -> Tensor:
        """Number of items with weight that each user has left."""
        weighted = weights > 0
        taken = torch.bincount((used // self.item_num)[weighted[used % self.item_num]], minlength=self.user_num)
        return int(weighted.sum()) - taken

    def _check_free(self, free: Tensor, tokens) -> None:
        full = (free <= 0).nonzero().flatten().tolist()
        if full:
            names = ", ".join(str(tokens(u)) for u in full[:3])
            raise UserError(
                f"Negative sampling ({self.distribution}): {len(full)} user(s) have interacted with all items and leave nothing to draw (first: {names}). "
                "Filter them with user_inter_num_interval, or choose a loss without negatives (train_neg_sample_args: null)."
            )

    def sample(self, users: Tensor, positives: Tensor, num: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw `num` items for each of the B rows.

        Args:
            users: [B] user ids on the sampler's device.
            positives: [B] the positive item of each row (read by repeatable datasets only).
            num: negatives per row.
            generator: source of randomness on the sampler's device; None is torch's global one.

        Returns:
            int64 [num * B]; entries b, B + b, 2 B + b, ... belong to row b.
        """
        forbidden = positives if self.repeatable else users
        if num > 1:
            forbidden = forbidden.repeat(num)
        if self.distribution == "uniform":
            return self._uniform(forbidden, generator)
        return self._popular(forbidden, generator)

    def _uniform(self, rows: Tensor, generator) -> Tensor:
        fraction = torch.rand(len(rows), dtype=torch.float64, device=self.device, generator=generator)
        if self.repeatable:
            drawn = (fraction * (self.item_num - 2)).long() + 1
            return drawn + (drawn >= rows)
        drawn = (fraction * self._free[rows]).long()  # rounding down keeps it below the count: fraction <= 1 - 2^-53
        below = torch.searchsorted(self._shifted, rows * self.item_num + drawn, right=True) - self._start[rows]
        return drawn.add_(below).add_(1)

    def _invert(self, number: int, generator) -> Tensor:
        fraction = torch.rand(number, dtype=torch.float64, device=self.device, generator=generator)
        return torch.searchsorted(self._cumulative, fraction * self._cumulative[-1], right=True).clamp_(max=self.item_num - 1)

    def is_used(self, rows: Tensor, items: Tensor) -> Tensor:
        """Whether each row (a user, or the positive item where the dataset is repeatable) forbids the item beside it, bool [B]."""
        if self.repeatable:
            return rows == items
        if not len(self._used):
            return torch.zeros_like(items, dtype=torch.bool)
        keys = rows * self.item_num + items
        at = torch.searchsorted(self._used, keys).clamp_(max=len(self._used) - 1)
        return self._used[at] == keys

    def _popular(self, rows: Tensor, generator) -> Tensor:
        drawn = self._invert(len(rows), generator)
        open_rows = self.is_used(rows, drawn).nonzero().flatten()
        for _ in range(_REJECTION_ROUNDS):
            if not len(open_rows):
                return drawn
            new = self._invert(len(open_rows), generator)
            drawn[open_rows] = new
            open_rows = open_rows[self.is_used(rows[open_rows], new)]
        for chunk in open_rows.split(max(1, _EXACT_ELEMENTS // self.item_num)):
            drawn[chunk] = self._exact(rows[chunk], generator)
        return drawn

    def _exact(self, rows: Tensor, generator) -> Tensor:
        """Draw from the weights that are left to each row, [R] from a matrix [R, item_num]."""
        every = torch.arange(self.item_num, device=self.device)
        used = self.is_used(rows.repeat_interleave(self.item_num), every.repeat(len(rows))).view(-1, self.item_num)
        weights = self._weights.masked_fill(used, 0.0)
        cumulative = weights.cumsum(1)
        fraction = torch.rand(len(rows), 1, dtype=torch.float64, device=self.device, generator=generator)
        # The last item with weight closes the row: rounding of the sum must not lead past it.
        last = ((weights > 0) * every).amax(1)
        at = torch.searchsorted(cumulative, fraction * cumulative[:, -1:], right=True).squeeze(1)
        return torch.minimum(at, last)

    def sample_by_user_ids(self, user_ids, item_ids, num: int) -> Tensor:
        """RecBole's interface (arrays or lists in, CPU tensor out), drawn from torch's global generator."""
        users = torch.as_tensor(np.asarray(user_ids), device=self.device)
        items = torch.as_tensor(np.asarray(item_ids), device=self.device)
        outside = (users < 0) | (users >= self.user_num)
        if bool(outside.any()):
            raise ValueError(f"user_id [{int(users[outside][0])}] not exist.")
        return self.sample(users, items, num).cpu()


class CandidateSampler(NegativeSampler):
    """A :class:`NegativeSampler` that draws from some items only: it works on their numbers 1 .. C and translates.

    Args:
        candidates: sorted ids of the C items, without padding.
        used, counts: as for :class:`NegativeSampler`, in item ids; pairs with other items are left out.
    """

    def __init__(
        self, user_num, item_num, candidates: Tensor, used=None, distribution="uniform", alpha=1.0, counts=None, device="cpu", tokens=str
    ):
        size = len(candidates) + 1
        number = torch.zeros(item_num, dtype=torch.int64)
        number[candidates] = torch.arange(1, size)
        if used is not None:
            items = number[used % item_num]
            used = (used // item_num * size + items)[items > 0]  # still sorted: the numbers keep the order of the ids
        if counts is not None:
            counts = torch.cat([counts.new_zeros(1), counts[candidates]])
        super().__init__(user_num, size, used, distribution, alpha, counts, device, tokens)
        self._number = number.to(self.device)
        self._id = torch.cat([candidates.new_zeros(1), candidates]).to(self.device)

    def sample(self, users: Tensor, positives: Tensor, num: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self._id[super().sample(users, self._number[positives], num, generator)]


def storage_device(config, dataset) -> torch.device:
    """Where the training data of this run are kept.

    The training device, unless a batch transform is set (RecBole's transforms are loops on the CPU) or the data take more than ``device_data_mb``.
    """
    device = torch.device(config["device"])
    feats = [feat for feat in (dataset.inter_feat, dataset.user_feat, dataset.item_feat) if feat is not None]
    size = sum(column.numel() * column.element_size() for feat in feats for column in feat.interaction.values())
    limit = config["device_data_mb"]
    if config["transform"] is not None or (limit is not None and device.type != "cpu" and size > limit * 2**20):
        return torch.device("cpu")
    return device


def build_sampler(config, dataset, built_datasets: Sequence, phase: str = "train") -> NegativeSampler | None:
    """The sampler that ``train_neg_sample_args`` asks for, on the `storage_device`, or None where the loss takes no negatives.

    Args:
        config: the run's settings.
        dataset: the whole dataset, which a repeatable sampler counts popularity on.
        built_datasets: the train, valid and test parts in this order; fewer are fine.
        phase: what counts as used: "train" only the training part, "valid" that and validation, "test" all three.
    """
    args = config["train_neg_sample_args"]
    if args["distribution"] == "none" or args["sample_num"] == "none":
        return None
    train = built_datasets[0]
    counts = used = None
    if args["distribution"] == "popularity":
        counts = popularity([dataset] if config["repeatable"] else built_datasets, train.item_num)
    if not config["repeatable"]:
        phases = ("train", "valid", "test").index(phase)
        used = phase_pairs(built_datasets[: phases + 1], train.item_num)[-1]
    alpha = args.get("alpha", 1.0)
    shared = {
        "used": used,
        "distribution": args["distribution"],
        "alpha": 1.0 if alpha in (None, "none") else float(alpha),
        "counts": counts,
        "device": storage_device(config, train),
        "tokens": lambda u: train.id2token(train.uid_field, u),
    }
    if config["negative_items"] == "train":
        items = torch.unique(train.inter_feat[train.iid_field].cpu())
        return CandidateSampler(train.user_num, train.item_num, items[items > 0], **shared)
    return NegativeSampler(train.user_num, train.item_num, **shared)
