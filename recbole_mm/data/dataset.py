"""RecBole's datasets with item features. (First version; DATA replaces it.)"""

from recbole.data.dataset import Dataset, SequentialDataset

from recbole_mm.data.features import load_features


class _Multimodal:
    _features = None

    @property
    def features(self):
        if self._features is None:
            self._features = load_features(self.config, self)
        return self._features


class MultimodalDataset(_Multimodal, Dataset):
    pass


class MultimodalSequentialDataset(_Multimodal, SequentialDataset):
    pass
