"""FeatureBank: the item features a model works with, one matrix per modality, row 0 zero for RecBole's padding item."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class FeatureBank(nn.Module):
    """A read-only mapping modality -> features [n_items, F_m], on the model's device and in the model's canonical order.

    The matrices are buffers that no checkpoint holds (a fingerprint of them stands there instead): they can be gigabytes, and come back
    from the feature files. Models use ``bank[m]``, ``bank.items()``, ``bank.keys()``, ``bank.dims[m]``, ``len(bank)``.
    """

    def __init__(self, features: Mapping[str, Tensor]):
        super().__init__()
        self._names = list(features)
        for name, table in features.items():
            self.register_buffer(self._slot(name), torch.as_tensor(table, dtype=torch.float32), persistent=False)
        self.dims = {name: self[name].shape[1] for name in self._names}

    def _slot(self, name: str) -> str:
        return f"table_{self._names.index(name)}"  # a modality may be named by the user with dots, which buffers may not have

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self, self._slot(name))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> list[str]:
        return list(self._names)

    def values(self) -> list[Tensor]:
        return [self[name] for name in self._names]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self[name]) for name in self._names]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(table.shape)}" for name, table in self.items())
