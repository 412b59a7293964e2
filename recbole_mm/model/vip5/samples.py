"""Samples of VIP5: which prompt about which user and item, drawn in arrays for a whole epoch, rendered batch by batch.

Sampling follows the release unless said otherwise (positions in a user's sequence counted from 0, training part of m items):

* sequential: target uniform over the last three training items (`sequential_targets`; the others are never asked for, which starves a model
  from scratch), history from one of the first three to the item before it;
* direct: target uniform over the training items; yes/no prompts show it or a random item, lists show it among 99 others;
* explanation: every training record once;
* the prompt is drawn uniformly from the training prompts of its task.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recbole_mm.model.vip5.network import TASKS
from recbole_mm.model.vip5.prompts import Prompt, Renderer, Slots, unpack

#: mean and spread of the rating written into training targets of C-7 and C-8, by true rating
_RATING_NOISE = {1: (1.2, 0.1), 2: (1.95, 0.225), 3: (2.95, 0.225), 4: (3.95, 0.225), 5: (4.75, 0.125)}
_BUCKET = 50  # batches that are sorted by length together


@dataclass
class Records:
    """Reviews that explain a purchase, one entry each; `part` is 0 train, 1 validation, 2 test."""

    user: np.ndarray
    item: np.ndarray
    explanation: list[str]
    feature: list[str]
    headline: list[str]
    rating: np.ndarray
    part: np.ndarray

    def of(self, part: int) -> np.ndarray:
        """Row numbers of a part."""
        return np.flatnonzero(self.part == part)


@dataclass
class Sequences:
    """Items of every user in order of time: those of user u are ``items[begin[u]:begin[u + 1]]``, the first ``train[u]`` for training."""

    items: np.ndarray
    begin: np.ndarray
    train: np.ndarray

    def of(self, user: int) -> np.ndarray:
        """The whole sequence of a user."""
        return self.items[self.begin[user] : self.begin[user + 1]]


@dataclass
class PromptBatch:
    """One batch for the network. ``visual_index`` counts rows of the visual tokens of ``items``; labels are -100 where padded."""

    input_ids: Tensor
    whole_word_ids: Tensor
    visual_index: Tensor
    items: Tensor
    tasks: Tensor
    labels: Tensor | None = None

    def to(self, device) -> "PromptBatch":
        """The batch on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PromptBatch(**{n: None if v is None else v.to(device, non_blocking=True) for n, v in values.items()})

    def part(self, share) -> "PromptBatch":
        """The rows of one of several processes (a ``distributed.Share``), as wide as the batch; the items stay, rows point into them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return PromptBatch(**{n: v if n == "items" or v is None else share.take(v) for n, v in own.items()})

    def __len__(self) -> int:
        return len(self.input_ids)


def make_batch(rows: Sequence[np.ndarray], targets: Sequence[np.ndarray] | None, tasks: Sequence[int], visual_tokens: int) -> PromptBatch:
    """Pad rendered samples; `visual_tokens` is k."""
    ids, words, visual = unpack(rows)
    items = np.zeros(0, dtype=np.int64)
    if visual_tokens:
        shown = visual >= 0
        owner = visual[shown] // visual_tokens
        items, where = np.unique(owner, return_inverse=True)
        visual[shown] = where * visual_tokens + visual[shown] % visual_tokens
    labels = None
    if targets is not None:
        labels = np.full((len(targets), max(map(len, targets))), -100, dtype=np.int64)
        for row, target in zip(labels, targets):
            row[: len(target)] = target
    return PromptBatch(
        *(torch.from_numpy(x) for x in (ids, words, visual, items, np.asarray(tasks, dtype=np.int64))),
        None if labels is None else torch.from_numpy(labels),
    )


def draw_others(rng: np.random.Generator, pool: np.ndarray, taken: np.ndarray, count: int) -> np.ndarray:
    """`count` different items of `pool` that are not among `taken` (fewer if there are no more), in random order."""
    if len(pool) < 20 * count:
        return rng.permutation(pool[~np.isin(pool, taken)])[:count]
    drawn = pool[rng.integers(0, len(pool), 2 * count + len(taken) + 8)]
    drawn = drawn[~np.isin(drawn, taken)]
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)][:count]


@dataclass
class SamplingSettings:
    """How many samples an epoch has and what negatives may be."""

    sequential: int = 10
    sequential_targets: int | None = 3  # the last so many training items are targets; None: all
    direct: int = 10
    explanation: int | None = None  # samples per user; None: every training record once
    candidates: int = 99  # other items in a training list
    shuffled_numbers: float = 0.0  # share of the training lists that show their items under other items' numbers
    n_items: int = 0  # I, needed for that
    published: bool = False
    max_history: int = 50
    batch_size: int = 36
    workers: int = 0
    seed: int = 0


class EpochLoader:
    """The training batches of one epoch, of all tasks, in an order that depends on seed and epoch alone.

    Batches hold samples of similar length: lists of 100 candidates would otherwise pad every short prompt tenfold.

    Args:
        sequences, records: the data; `records` may be None.
        prompts: task -> training prompts.
        renderer: makes tokens of samples.
        pool: items that may be drawn as negatives in training.
        settings: see :class:`SamplingSettings`.
        epoch: number of the epoch.
    """

    def __init__(
        self,
        sequences: Sequences,
        records: Records | None,
        prompts: Mapping[str, Sequence[Prompt]],
        renderer: Renderer,
        pool: np.ndarray,
        settings: SamplingSettings,
        epoch: int,
    ):
        self.sequences, self.records, self.renderer = sequences, records, renderer
        self.pool, self.settings, self.epoch = pool, settings, epoch
        self.prompts = [p for task in TASKS for p in prompts.get(task, ())]
        rng = np.random.default_rng([settings.seed, epoch])
        self.task, self.prompt, self.row, self.start, self.stop = self._draw(rng, prompts)
        self.batches = self._bucket(rng)

    def _draw(self, rng, prompts) -> tuple[np.ndarray, ...]:
        """Task, prompt, user (or record), and begin and end of the history of every sample; the target stands at the end."""
        seq, settings = self.sequences, self.settings
        task, prompt, row, start, stop = ([] for _ in range(5))
        begin_prompt = 0
        for number, name in enumerate(TASKS):
            group = prompts.get(name, ())
            if not group:
                continue
            if name == "explanation":
                rows = self.records.of(0)
                if settings.explanation is not None:
                    users = len(np.unique(self.records.user[rows]))
                    rows = np.sort(rng.permutation(rows)[: settings.explanation * users])
                first = last = np.zeros(len(rows), dtype=np.int64)
            else:
                least = 2 if name == "sequential" else 1
                users = np.flatnonzero(seq.train >= least)
                rows = np.repeat(users, settings.sequential if name == "sequential" else settings.direct)
                m = seq.train[rows]
                if name == "sequential":
                    window = m if settings.sequential_targets is None else settings.sequential_targets
                    last = rng.integers(np.maximum(np.minimum(2, m - 1), m - window), m)
                    first = rng.integers(0, np.maximum(np.minimum(3, last - 1), 1))
                    first = first if settings.published else np.maximum(first, last - settings.max_history)
                else:
                    last = rng.integers(0, m)
                    first = last
            task.append(np.full(len(rows), number))
            prompt.append(begin_prompt + rng.integers(0, len(group), len(rows)))
            row.append(rows)
            start.append(first)
            stop.append(last)
            begin_prompt += len(group)
        return tuple(np.concatenate(x) if x else np.zeros(0, dtype=np.int64) for x in (task, prompt, row, start, stop))

    def _bucket(self, rng) -> list[np.ndarray]:
        size = self.settings.batch_size
        per_item = float(self.renderer.list_length(self.sequences.items[:1000]).mean()) if len(self.sequences.items) else 1.0
        base = np.array([self.renderer.base_length(p) for p in self.prompts] or [0])
        lists = np.array([(self.settings.candidates + 1) * (p.kind == "choice") for p in self.prompts] or [0])
        length = base[self.prompt] + per_item * (lists[self.prompt] + (self.stop - self.start))
        order = rng.permutation(len(length))
        batches = []
        for begin in range(0, len(order), size * _BUCKET):
            chunk = order[begin : begin + size * _BUCKET]
            chunk = chunk[np.argsort(length[chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        yield from DataLoader(_Rendered(self), batch_size=None, shuffle=False, num_workers=self.settings.workers)

    def samples(self, batch: int) -> list[tuple[Prompt, Slots]]:
        """The samples of a batch, with negatives drawn from a generator of the batch's own, so that workers do not matter."""
        chosen = self.batches[batch]
        rng = np.random.default_rng([self.settings.seed, self.epoch, int(chosen[0])])
        return [self._slots(self.prompts[self.prompt[i]], i, rng) for i in chosen]

    def _slots(self, prompt: Prompt, i: int, rng: np.random.Generator) -> tuple[Prompt, Slots]:
        if prompt.task == "explanation":
            return prompt, explanation_slots(self.records, int(self.row[i]), rng)
        user = int(self.row[i])
        whole = self.sequences.of(user)
        item = int(whole[self.stop[i]])
        # the release excludes the user's validation and test items too, which tells the model something about them
        taken = whole if self.settings.published else whole[: self.sequences.train[user]]
        slots = Slots(user=user, item=item, separator=int(rng.integers(2)) if prompt.task == "sequential" else 0)
        if prompt.task == "sequential":
            slots.items = whole[self.start[i] : self.stop[i]]
        if prompt.kind == "yes_no":
            slots.yes = bool(rng.integers(2))
            others = draw_others(rng, self.pool, taken, 1) if not slots.yes else ()
            slots.item = int(others[0]) if len(others) else item
            slots.yes = slots.item == item
        elif prompt.kind == "choice":
            slots.items = rng.permutation(np.append(draw_others(rng, self.pool, taken, self.settings.candidates), item))
            if self.settings.shuffled_numbers and rng.random() < self.settings.shuffled_numbers:
                self._shuffle_numbers(slots, rng)
        return prompt, slots

    def _shuffle_numbers(self, slots: Slots, rng: np.random.Generator) -> None:
        """Show the items of a list under numbers of others, drawn from the whole catalogue, so that only pictures tell what fits.

        It is what a list looks like to whom the items are new. A model that has always known every number chooses by numbers alone.
        """
        free = np.setdiff1d(np.arange(1, self.settings.n_items), slots.items)
        count = min(len(free), len(slots.items))
        slots.shown_as = slots.items.copy()
        slots.shown_as[rng.permutation(len(slots.items))[:count]] = rng.choice(free, count, replace=False)
        slots.answer = int(slots.shown_as[np.flatnonzero(slots.items == slots.item)[0]])


class _Rendered(Dataset):
    """Batches of an epoch as a map-style dataset, for the workers of a DataLoader."""

    def __init__(self, loader: EpochLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, index: int) -> PromptBatch:
        return render(self.loader.renderer, self.loader.samples(index))


def render(renderer: Renderer, samples: Sequence[tuple[Prompt, Slots]], with_targets: bool = True) -> PromptBatch:
    """One padded batch of the given samples."""
    return make_batch(
        [renderer.source(prompt, slots) for prompt, slots in samples],
        [renderer.target(prompt, slots) for prompt, slots in samples] if with_targets else None,
        [TASKS.index(prompt.task) for prompt, _ in samples],
        renderer.k,
    )


def explanation_slots(records: Records, row: int, rng: np.random.Generator | None = None) -> Slots:
    """Arguments of an explanation prompt; `rng` blurs the rating in the target, as in training."""
    rating = float(records.rating[row])
    stars = "" if np.isnan(rating) else str(int(rating))
    written = stars
    if rng is not None and stars and int(rating) in _RATING_NOISE:
        written = str(round(float(np.clip(rng.normal(*_RATING_NOISE[int(rating)]), 1.0, 5.0)), 1))
    return Slots(
        user=int(records.user[row]),
        item=int(records.item[row]),
        stars=stars,
        rating=written,
        feature=records.feature[row],
        headline=records.headline[row],
        explanation=records.explanation[row],
    )


def sequential_sample(prompt: Prompt, user: int, history: np.ndarray, separator: int = 0) -> tuple[Prompt, Slots]:
    """A next-item question about a history."""
    return prompt, Slots(user=user, items=np.asarray(history), separator=separator)


def candidate_lists(sequences: Sequences, users: Sequence[int], targets: Sequence[int], n_items: int, count: int, seed: int) -> np.ndarray:
    """For each user the target and `count` items the user has never had, shuffled: [U, count + 1], 0 where the catalogue is too small.

    Every user's list depends on the seed and the user alone, so all models and both prompts see the same ones.
    """
    everything = np.arange(1, n_items)
    lists = np.zeros((len(users), count + 1), dtype=np.int64)
    for row, user, target in zip(lists, users, targets):
        rng = np.random.default_rng([seed, int(user)])
        chosen = rng.permutation(np.append(draw_others(rng, everything, sequences.of(user), count), target))
        row[: len(chosen)] = chosen
    return lists


def by_length(rows: Sequence[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of similar length, longest first."""
    order = np.argsort([-len(row) for row in rows], kind="stable")
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]
