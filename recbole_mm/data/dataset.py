"""RecBole's datasets with item features and item contents."""

import logging
from pathlib import Path

import numpy as np
import recbole
import torch
from recbole.data.dataset import Dataset, SequentialDataset

from recbole_mm.data import features as feature_files
from recbole_mm.data.checks import check_interactions
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError


class _Shared:
    """What all parts of one dataset have in common: RecBole copies a dataset for each split, and this must not be loaded again."""

    def __init__(self):
        self.features: dict[str, torch.Tensor] | None = None
        self.fingerprint: str | None = None
        self.content: ItemContent | None = None

    def __deepcopy__(self, memo):
        return self  # features are data, not state

    def __getstate__(self):
        return {"features": None, "fingerprint": None, "content": None}  # a pickled dataset reads its files again


def features_for(config, dataset) -> dict[str, torch.Tensor]:
    """Item features of a run: modality -> float tensor [item_num, F], row 0 zero, in the order of ``modalities``.

    They come from the feature set that ``feature_set`` or ``encoder`` names, else from the dataset's folder. Modalities that are asked for
    by name and that the set does not have (acoustic, as a rule) are taken from the dataset's folder as well. In end-to-end training the
    encoder makes its own, and only what lies in the dataset's folder is read. A dataset without features gives an empty dict.

    Raises:
        UserError: when they do not fit; see :mod:`recbole_mm.data.features`.
    """
    root, folder = Path(config["data_path"]), feature_files.set_folder(config)
    tokens, missing = dataset.field2id_token[dataset.iid_field], config["missing_modality"] or "mean"
    wanted = list(config["modalities"] or [])
    of_set, of_root = feature_files.feature_files(folder), feature_files.feature_files(root)
    if config["encoder_training"] == "end2end":
        of_set, folder, wanted = of_root, root, [name for name in wanted if name in of_root]
        if not wanted:
            return {}
    if not of_set and folder != root:
        verb = "finetune" if config["encoder_training"] == "finetuned" else "extract"
        raise UserError(
            f"There is no feature set {folder}. There are {', '.join(feature_files.set_names(config)) or 'none'}; "
            f"`recbole-mm {verb} --dataset={config['dataset']} --encoder={config['encoder'] or 'classic'}` makes one."
        )
    if not of_set:
        if wanted:
            raise UserError(f"modalities: {', '.join(wanted)} asked for, but {folder} has no feature files.")
        return {}
    beside = [name for name in wanted if name not in of_set and name in of_root]
    chosen = [name for name in wanted if name not in beside] or (None if not beside else [])
    tables = feature_files.load_feature_set(folder, tokens, chosen, missing) if chosen != [] else {}
    if beside:
        tables.update(feature_files.load_feature_set(root, tokens, beside, missing))
        logging.getLogger().info(f"{', '.join(beside)} from {root}, as {folder} has no such features")
    return {name: torch.from_numpy(tables[name]) for name in (wanted or tables)}


class MultimodalMixin:
    """Adds ``features``, ``content`` and ``feature_fingerprint`` to a dataset of RecBole's."""

    def __init__(self, config):
        self._shared = _Shared()
        self._check_files(config)
        try:
            super().__init__(config)
        except ValueError as error:  # RecBole's own word on columns, types and filters
            raise (
                error if isinstance(error, UserError) else UserError(f"The dataset {config['dataset']!r} in {config['data_path']}: {error}")
            ) from None

    @staticmethod
    def _check_files(config) -> None:
        """RecBole reports a missing file by its class name and a traceback, and says nothing of rows that are too short."""
        folder, name = Path(config["data_path"]), config["dataset"]
        parts = config["benchmark_filename"]
        if parts and (not isinstance(parts, list) or len(parts) != 3):
            raise UserError(f"benchmark_filename: expected three parts such as [train, valid, test], got {parts!r}.")
        if not folder.is_dir():
            return  # RecBole knows where to download some
        if config["inter_from"] is None:
            wanted = [f"{name}.{part}.inter" for part in parts] if parts else [f"{name}.inter"]
            absent = [file for file in wanted if not (folder / file).is_file()]
            if absent:
                there = sorted(p.name for p in folder.iterdir() if p.suffix == ".inter")
                raise UserError(
                    f"The dataset {name!r} needs {absent[0]} in {folder}; there is {', '.join(there) or 'no .inter file'}. "
                    "Ready splits <name>.train.inter etc. are named by benchmark_filename: [train, valid, test]."
                )
            columns = (config["load_col"] or {}).get("inter", "*") if isinstance(config["load_col"], dict) else "*"
            columns = None if columns == "*" or not columns else columns if isinstance(columns, list) else [columns]
            fields = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
            if None not in fields and not any(
                [
                    check_interactions(folder / file, *fields, columns, config["field_separator"], config["encoding"] or "utf-8")
                    for file in wanted
                ]
            ):
                raise UserError(f"{folder / wanted[0]}: there is no interaction below the first line.")

    def _parse_intervals_str(self, intervals_str):
        """RecBole goes on without a filter that it does not understand."""
        intervals = super()._parse_intervals_str(intervals_str)
        if (
            intervals is not None
            and len(intervals) < len(str(intervals_str).split(";"))
            or any(low > high for _, low, high, _ in intervals or ())
        ):
            raise UserError(
                f"Expected an interval such as [5,inf) or (0,1];[3,4), got {intervals_str!r}. See user_inter_num_interval and val_interval."
            )
        return intervals

    def _load_data(self, token, dataset_path):
        source = self.config["inter_from"]
        if source is None:
            super()._load_data(token, dataset_path)
            return
        if source != "recbole:ml-100k":
            raise UserError(f"inter_from: expected recbole:ml-100k, the only dataset that comes with RecBole, got {source!r}.")
        folder = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
        super()._load_data("ml-100k", str(folder))

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """Modality -> float tensor [item_num, F], row 0 zero; read on first use and shared by all splits."""
        if self._shared.features is None:
            self._shared.features = features_for(self.config, self)
            shapes = ", ".join(f"{name} {tuple(table.shape)}" for name, table in self._shared.features.items())
            logging.getLogger().info(f"Item features: {shapes or 'none'}")
        return self._shared.features

    @property
    def feature_fingerprint(self) -> str | None:
        """SHA-256 of the features if anybody has read them, else None."""
        if self._shared.features is None:
            return None
        if self._shared.fingerprint is None:
            self._shared.fingerprint = feature_files.fingerprint({name: table.numpy() for name, table in self._shared.features.items()})
        return self._shared.fingerprint

    @property
    def content(self) -> ItemContent:
        """Pictures and texts of the items."""
        if self._shared.content is None:
            self._shared.content = ItemContent.from_config(self.config, self)
        return self._shared.content


class MultimodalDataset(MultimodalMixin, Dataset):
    """RecBole's Dataset with item features and contents; for general models."""


class MultimodalSequentialDataset(MultimodalMixin, SequentialDataset):
    """RecBole's SequentialDataset with item features and contents.

    Ready splits (``benchmark_filename``) may hold plain interactions: RecBole wants each row to come with the list of items before it.
    Here the sequences are made from the rows, those of a user in the order training, validation, test and by time within each, so that
    no training row sees a later part. Files that already have ``item_id_list`` are taken as they are.
    """

    _plain_ready_splits = False

    def _benchmark_presets(self):
        if self.iid_field + self.config["LIST_SUFFIX"] in self.inter_feat:
            super()._benchmark_presets()
            return
        if self.time_field is None or self.time_field not in self.inter_feat:
            raise UserError(
                f"{self.dataset_name}: sequential models need the time of each interaction, but the ready splits were loaded without the column "
                f"{self.time_field!r}. Name it in load_col, e.g. {{inter: [user_id, item_id, timestamp]}}; where the files have none, use a general model."
            )
        self._plain_ready_splits = True

    def _change_feat_format(self):
        super()._change_feat_format()
        if not self._plain_ready_splits:
            return
        user, time = self.inter_feat[self.uid_field].numpy(), self.inter_feat[self.time_field]
        part = np.repeat(np.arange(len(self.file_size_list)), self.file_size_list)
        order = np.lexsort((time.numpy(), part, user))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(1, len(order) + 1)
        self.inter_feat[self.time_field] = torch.from_numpy(place)  # RecBole sorts by this; 0 stays for padding
        self.data_augmentation()
        times = torch.cat([time.new_zeros(1), time[torch.from_numpy(order)]])
        targets = self.inter_feat[self.time_field].long()
        for field in (self.time_field, self.time_field + self.config["LIST_SUFFIX"]):
            self.inter_feat[field] = times[self.inter_feat[field].long()]
        part_of_row = torch.from_numpy(part[order])[targets - 1]
        self.inter_feat = self.inter_feat[torch.argsort(part_of_row, stable=True)]
        self.file_size_list = torch.bincount(part_of_row, minlength=len(self.file_size_list)).tolist()
