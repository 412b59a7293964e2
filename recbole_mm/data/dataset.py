"""RecBole's datasets with item features and item contents."""

import logging
from pathlib import Path

import recbole
import torch
from recbole.data.dataset import Dataset, SequentialDataset

from recbole_mm.data import features as feature_files
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError


class _Shared:
    """What all parts of one dataset have in common: RecBole copies a dataset for each split, and this must not be loaded again."""

    def __init__(self):
        self.features: dict[str, torch.Tensor] | None = None
        self.fingerprint: str | None = None
        self.content: ItemContent | None = None


def features_for(config, dataset) -> dict[str, torch.Tensor]:
    """Item features of a run: modality -> float tensor [item_num, F], row 0 zero, in the order of ``modalities``.

    They come from the feature set that ``feature_set`` or ``encoder`` names, else from the dataset's folder. A named encoder's set that
    does not exist yet is made from pictures and texts first. A dataset without features gives an empty dict.

    Raises:
        UserError: when they do not fit; see :mod:`recbole_mm.data.features`.
    """
    folder = feature_files.set_folder(config)
    tokens = dataset.field2id_token[dataset.iid_field]
    modalities = config["modalities"]
    if not feature_files.feature_files(folder) and folder != Path(config["data_path"]):
        beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise UserError(
            f"There is no feature set {folder}. There are {', '.join(beside) or 'none'}; "
            f"`recbole-mm {'finetune' if config['encoder_training'] == 'finetuned' else 'extract'} --dataset={config['dataset']} --encoder={config['encoder'] or 'classic'}` makes one."
        )
    if not feature_files.feature_files(folder):
        if modalities:
            raise UserError(f"modalities: {', '.join(modalities)} asked for, but {folder} has no feature files.")
        return {}
    tables = feature_files.load_feature_set(folder, tokens, modalities, config["missing_modality"] or "mean")
    return {name: torch.from_numpy(table) for name, table in tables.items()}


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
        """RecBole reports a missing file by its class name and a traceback."""
        folder, name = Path(config["data_path"]), config["dataset"]
        if not folder.is_dir():
            return  # RecBole knows where to download some
        if config["inter_from"] is None:
            wanted = (
                [f"{name}.{part}.inter" for part in config["benchmark_filename"]] if config["benchmark_filename"] else [f"{name}.inter"]
            )
            absent = [file for file in wanted if not (folder / file).is_file()]
            if absent:
                there = sorted(p.name for p in folder.iterdir() if p.suffix == ".inter")
                raise UserError(
                    f"The dataset {name!r} needs {absent[0]} in {folder}; there is {', '.join(there) or 'no .inter file'}. "
                    "Ready splits <name>.train.inter etc. are named by benchmark_filename: [train, valid, test]."
                )

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
    """RecBole's SequentialDataset with item features and contents."""
