"""Loaders: training batches that live on the training device, and full-sort evaluation data as sorted arrays.

`TrainLoader` stands in for RecBole's ``TrainDataLoader`` and `FullSortLoader` for its ``FullSortEvalDataLoader`` (both are subclasses, so RecBole's
trainers take them); `data_preparation` chooses, and leaves to RecBole what these two do not serve: knowledge graphs, auto-encoder
training, datasets with a ``join`` of their own, sampled (``uni100``) and labeled evaluation.

Where they differ from RecBole, besides speed: no worker processes (``worker`` has no effect; there is nothing left for a worker to do), and loaders are
never pickled, because reading a pickle runs code.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.data.transform import Equal
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler
from recbole.utils import InputType, ModelType
from torch import Tensor

from recbole_mm.data.checks import check_parts, check_split
from recbole_mm.data.sampler import build_sampler, phase_pairs, storage_device
from recbole_mm.errors import UserError

_BLOCK_ROWS = 1 << 21  # rows shuffled into place and given negatives at a time


class TrainLoader(TrainDataLoader):
    """Training batches by ``index_select`` from columns that were copied to the device once.

    Each pass over the loader shuffles by ``randperm`` and draws the negatives of a whole block of batches in one vectorised call, both on the device
    and from :attr:`generator`, which is seeded with ``seed`` and nothing else touches: the order of the data does not depend on the model.
    `get_state` and `set_state` make a pass repeatable after a restart.

    Batches are RecBole's: every positive with its negatives, k negatives as k blocks below each other, ``train_batch_size`` counting the expanded rows;
    pairwise models get the negative's features under ``NEG_PREFIX``, pointwise models the label column. Of several processes each makes the same
    batches; the trainer takes its share of their rows.

    Args:
        config: the run's settings.
        dataset: the training part (sequential datasets after augmentation).
        sampler: a `NegativeSampler`, on whose device the data are kept too, or None (then on `storage_device`).
        shuffle: whether to shuffle before every pass.
    """

    def __init__(self, config, dataset, sampler, shuffle=True):
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self.storage = storage_device(config, dataset) if sampler is None else sampler.device
        self.target = torch.device(config["device"])
        self.generator = torch.Generator(self.storage)
        self.generator.manual_seed(config["seed"])
        self._columns = {k: v.to(self.storage) for k, v in dataset.inter_feat.interaction.items()}
        self._user_feat = self._stored(dataset.user_feat, self.uid_field)
        self._item_feat = self._stored(dataset.item_feat, self.iid_field)

    def _stored(self, feat: Interaction | None, key: str | None) -> dict[str, Tensor]:
        return {} if feat is None else {k: v.to(self.storage) for k, v in feat.interaction.items() if k != key}

    def get_state(self) -> Tensor:
        """State of the shuffle and of the negatives; `set_state` with it repeats the passes that follow."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def __len__(self) -> int:
        return math.ceil(self.sample_size / self.step)

    def __iter__(self) -> Iterator[Interaction]:
        rows = self.sample_size
        order = (
            torch.randperm(rows, generator=self.generator, device=self.storage) if self.shuffle else torch.arange(rows, device=self.storage)
        )
        step = self.step
        dynamic = bool(self.neg_sample_args.get("dynamic", False))
        with_negatives = self._sampler is not None and not dynamic
        narrow = {k for k, v in self._columns.items() if v.dim() == 1}
        for block in order.split(max(1, _BLOCK_ROWS // (step * self.times)) * step):
            negatives = None
            if with_negatives:
                users = self._columns[self.uid_field].index_select(0, block)
                items = self._columns[self.iid_field].index_select(0, block)
                negatives = self._sampler.sample(users, items, self.neg_sample_num, self.generator)
                negatives = negatives.view(self.neg_sample_num, -1)
            columns = {k: self._columns[k].index_select(0, block) for k in narrow}
            for start in range(0, len(block), step):
                part = slice(start, start + step)
                batch = {k: columns[k][part] if k in narrow else v.index_select(0, block[part]) for k, v in self._columns.items()}
                yield self._batch(batch, None if negatives is None else negatives[:, part].reshape(-1), dynamic)

    def _batch(self, batch: dict[str, Tensor], negatives: Tensor | None, dynamic: bool) -> Interaction:
        if not isinstance(self.transform, Equal):
            batch = self.transform(self._dataset, Interaction(self._join(batch))).interaction
        if dynamic:
            negatives = self._hardest(batch)
        if negatives is None:
            return Interaction(self._join(batch)).to(self.target)
        if self.dl_format == InputType.PAIRWISE:
            batch = self._join(_repeat(batch, self.times))
            batch[self.neg_item_id] = negatives
            for name, column in self._item_feat.items():
                batch[self.neg_prefix + name] = column.index_select(0, negatives)
        else:
            positives = len(batch[self.iid_field])
            batch = _repeat(batch, self.times)
            batch[self.iid_field] = torch.cat([batch[self.iid_field][:positives], negatives])
            batch = self._join(batch)
            labels = torch.zeros(len(negatives) + positives, device=self.storage)
            labels[:positives] = 1.0
            batch[self.label_field] = labels
        return Interaction(batch).to(self.target)

    def _join(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the features of the users and items of the rows."""
        for key, feat in ((self.uid_field, self._user_feat), (self.iid_field, self._item_feat)):
            for name, column in feat.items():
                batch[name] = column.index_select(0, batch[key])
        return batch

    @torch.no_grad()
    def _hardest(self, batch: dict[str, Tensor]) -> Tensor:
        """Dynamic negative sampling: of ``candidate_num`` draws for each negative, the one that the model scores highest, [neg_sample_num * B]."""
        candidates = self.neg_sample_args["candidate_num"]
        drawn = self._sampler.sample(batch[self.uid_field], batch[self.iid_field], self.neg_sample_num * candidates, self.generator)
        repeated = _repeat(batch, self.neg_sample_num * candidates)
        repeated[self.iid_field] = drawn
        self.model.eval()
        scores = self.model.predict(Interaction(self._join(repeated)).to(self.target)).view(candidates, -1)
        self.model.train()
        best = scores.argmax(0, keepdim=True).to(self.storage)
        return drawn.view(candidates, -1).gather(0, best).squeeze(0)


def _repeat(batch: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Every column `times` times below itself."""
    if times == 1:
        return dict(batch)
    return {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in batch.items()}


class FullSortLoader(FullSortEvalDataLoader):
    """Full-sort evaluation data: who is evaluated, which items are right, which are not candidates.

    One row is a user (general models) or an interaction with its sequence (sequential models). ``positive_rows, positive_items`` and
    ``history_rows, history_items`` are sorted pairs, so the pairs of a range of rows are a slice.

    What is masked (all of it documented in docs/evaluation.md):

    * ``mask_history``: null is RecBole's convention (general models mask, sequential models and ``repeatable`` datasets do not), true and false say it outright.
    * ``eval_mask``: ``all`` masks at test what the user has in training and validation (RecBole); ``train`` masks training only, so validation
      items stay candidates at test (MMRec and the papers that follow it).
    * A right answer is never masked. With ``mask_history: true`` a sequential model also masks the items of the input sequence.

    Args:
        config: the run's settings.
        dataset: the part that is evaluated.
        built_datasets: train, valid, test.
        phase: "valid" or "test".
    """

    def __init__(self, config, dataset, built_datasets, phase):
        self.phase = phase
        self.train_dataset = built_datasets[0]
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        self.is_sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        item_num = dataset.item_num
        users, items = dataset.inter_feat[self.uid_field].cpu(), dataset.inter_feat[self.iid_field].cpu()
        if self.is_sequential:
            self.row_users = users
            self.positive_rows, self.positive_items = torch.arange(len(users)), items
            self.user_df = None
        else:
            self.row_users = torch.unique(users)
            keys = torch.unique(torch.searchsorted(self.row_users, users) * item_num + items)
            self.positive_rows, self.positive_items = keys // item_num, keys % item_num
            self.uid_list = self.row_users
            self.user_df = dataset.join(Interaction({self.uid_field: self.row_users}))
        self.sample_size = len(self.row_users)
        self.masks_history = self._masks_history(config)
        self.history_rows, self.history_items = self._history(config, dataset, built_datasets)
        self._moved: dict = {}
        AbstractDataLoader.__init__(self, config, dataset, None, shuffle=False)

    def _masks_history(self, config) -> bool:
        setting = config["mask_history"]
        if setting is None:
            return not self.is_sequential and not config["repeatable"]
        if not isinstance(setting, bool):
            raise UserError(f"mask_history must be null, true or false, got {setting!r}.")
        return setting

    def _history(self, config, dataset, built_datasets) -> tuple[Tensor, Tensor]:
        """Pairs (row, item) that are not candidates, sorted."""
        mask = config["eval_mask"] or "all"
        if mask not in ("all", "train"):
            raise UserError(f"eval_mask must be all (training and validation, RecBole) or train (MMRec), got {mask!r}.")
        empty = torch.zeros(0, dtype=torch.int64)
        if not self.masks_history or not self.sample_size:
            return empty, empty
        item_num = dataset.item_num
        parts = 1 if mask == "train" or self.phase == "valid" else 2
        used = phase_pairs(built_datasets[:parts], item_num)[-1].cpu()
        # Pairs of each evaluated row: the pairs of its user are one slice of the sorted keys.
        begin, end = torch.searchsorted(used, torch.stack([self.row_users, self.row_users + 1]) * item_num)
        length = end - begin
        rows = torch.arange(self.sample_size).repeat_interleave(length)
        at = torch.arange(len(rows)) - (length.cumsum(0) - length).repeat_interleave(length) + begin.repeat_interleave(length)
        keys = rows * item_num + used[at] % item_num
        if self.is_sequential:
            sequence = dataset.inter_feat[self.iid_field + config["LIST_SUFFIX"]].cpu()
            keys = torch.cat([keys, (torch.arange(self.sample_size).unsqueeze(1) * item_num + sequence).flatten()])
        keys = torch.unique(keys[keys % item_num > 0])
        keys = keys[~torch.isin(keys, self.positive_rows * item_num + self.positive_items)]
        return keys // item_num, keys % item_num

    def rows(self, start: int, stop: int) -> Interaction:
        """What the model gets to see of rows start..stop: the users with their features, or the interactions with their sequences."""
        if self.is_sequential:
            return self.transform(self._dataset, self._dataset[slice(start, stop)])
        return Interaction({k: v[start:stop] for k, v in self.user_df.interaction.items()})

    def pairs(self, kind: str, start: int, stop: int, device="cpu") -> tuple[Tensor, Tensor]:
        """Pairs (row - start, item) of `kind` ("positive" or "history") in rows start..stop, on `device`."""
        device = torch.device(device)
        if (kind, device) not in self._moved:
            rows, items = getattr(self, f"{kind}_rows"), getattr(self, f"{kind}_items")
            self._moved[kind, device] = rows, rows.to(device), items.to(device)
        host, rows, items = self._moved[kind, device]
        low, high = torch.searchsorted(host, torch.tensor([start, stop])).tolist()
        return rows[low:high] - start, items[low:high]

    def __len__(self) -> int:
        return math.ceil(self.sample_size / self.step)

    def __iter__(self):
        """RecBole's batches (interaction, history index, positive rows, positive items), for its own trainers."""
        for start in range(0, self.sample_size, self.step):
            stop = min(start + self.step, self.sample_size)
            history = self.pairs("history", start, stop) if self.masks_history else None
            yield (self.rows(start, stop), history, *self.pairs("positive", start, stop))

    def _lists(self, kind: str) -> np.ndarray:
        """The pairs as RecBole's case study reads them: index user id, element tensor of item ids."""
        lists = np.full(self._dataset.user_num, None, dtype=object)
        rows, items = getattr(self, f"{kind}_rows"), getattr(self, f"{kind}_items")
        length = torch.bincount(rows, minlength=self.sample_size).tolist()
        for user, part in zip(self.row_users.tolist(), items.split(length)):
            lists[user] = part
        return lists

    @property
    def uid2history_item(self) -> np.ndarray:
        return self._lists("history")

    @property
    def uid2positive_item(self) -> np.ndarray:
        return self._lists("positive")


def loader_state(loader) -> dict[str, Tensor]:
    """Random state of a training loader, ours or one of RecBole's (shuffle by its generator, negatives from the global generators)."""
    state = {}
    if isinstance(getattr(loader, "generator", None), torch.Generator):
        state["generator"] = loader.generator.get_state()
    for name in ("general_dataloader", "kg_dataloader"):  # RecBole's knowledge loader wraps two others
        if hasattr(loader, name):
            state.update({f"{name}.{k}": v for k, v in loader_state(getattr(loader, name)).items()})
    return state


def restore_loader_state(loader, state: dict[str, Tensor]) -> None:
    """Put the state of `loader_state` back."""
    for name, value in state.items():
        part, _, rest = name.rpartition(".")
        owner = loader
        for attribute in filter(None, part.split(".")):
            owner = getattr(owner, attribute)
        getattr(owner, rest).set_state(value.cpu())


def data_preparation(config, dataset):
    """Split `dataset` and return its (train, valid, test) loaders; evaluation loaders know the training part as ``train_dataset``."""
    for key in ("save_dataloaders", "dataloaders_save_path"):
        if config[key]:
            raise UserError(
                f"{key}: pickled loaders are neither written nor read, because reading a pickle runs code. Remove the setting; building them takes seconds."
            )
    check_split(config, dataset)
    try:
        built = dataset.build()
    except (ValueError, NotImplementedError) as error:
        raise error if isinstance(error, UserError) else UserError(f"eval_args {config['eval_args']}: {error}") from None
    check_parts(config, built)
    classes = {phase: get_dataloader(config, phase) for phase in ("train", "valid", "test")}
    plain = type(built[0]).join is Dataset.join and type(built[0]).__getitem__ is Dataset.__getitem__
    ours = {
        phase: cls is TrainDataLoader and plain if phase == "train" else cls is FullSortEvalDataLoader for phase, cls in classes.items()
    }
    samplers = dict.fromkeys(classes)
    if not all(ours.values()):
        samplers = dict(zip(classes, create_samplers(config, dataset, built)))

    if ours["train"]:
        train = TrainLoader(config, built[0], build_sampler(config, dataset, built), shuffle=config["shuffle"])
    elif config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        args = config["train_neg_sample_args"]
        graph_sampler = KGSampler(dataset, args["distribution"], args["alpha"])
        train = classes["train"](config, built[0], samplers["train"], graph_sampler, shuffle=True)
    else:
        train = classes["train"](config, built[0], samplers["train"], shuffle=config["shuffle"])

    evaluation = []
    for phase, part in zip(("valid", "test"), built[1:]):
        if ours[phase]:
            loader = FullSortLoader(config, part, built, phase)
        else:
            loader = classes[phase](config, part, samplers[phase], shuffle=False)
            loader.train_dataset = built[0]
        evaluation.append(loader)
    return (train, *evaluation)
