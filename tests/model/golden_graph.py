"""Golden files of the graph models as arrays: stand-in dataset and config, id shift by the padding row, comparisons at the stated tolerances."""

import json

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recbole_mm.parsing import load_yaml
from recbole_mm.paths import properties_dir

NAMES = {"v": "visual", "t": "textual"}


class ArrayDataset:
    """What a general model reads from a dataset, from 0-based arrays: ids shift by one, row 0 is padding."""

    def __init__(self, inter: np.ndarray, n_users: int, n_items: int, features: dict[str, np.ndarray]):
        self._sizes = {"user_id": n_users + 1, "item_id": n_items + 1}
        self._inter = np.asarray(inter) + 1
        self.features = {name: torch.from_numpy(np.vstack([np.zeros((1, x.shape[1])), x])).float() for name, x in features.items()}

    def num(self, field: str) -> int:
        return self._sizes[field]

    def inter_matrix(self, form: str = "coo"):
        shape = (self._sizes["user_id"], self._sizes["item_id"])
        return sp.coo_matrix((np.ones(len(self._inter)), self._inter.T), shape=shape)


def build(model_class, dataset, **settings):
    """A model with its shipped defaults and `settings` on top."""
    defaults = load_yaml(properties_dir() / "model" / f"{model_class.__name__}.yaml")
    defaults.pop("per_dataset", None)
    assert not set(settings) - set(defaults) - {"train_batch_size"}
    base = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "NEG_PREFIX": "neg_",
        "device": torch.device("cpu"),
        "dataset": "golden",
        "data_path": "-",
        "encoder_training": "frozen",
    }
    return model_class({"train_batch_size": 2048, **base, **defaults, **settings}, dataset)


def dataset_of(z: dict, modalities: str = "vt") -> ArrayDataset:
    features = {NAMES[m]: z[f"feat/{m}"] for m in modalities}
    return ArrayDataset(z["inter"], int(z["n_users"]), int(z["n_items"]), features)


def reference_config(z: dict) -> dict:
    return json.loads(str(z["config"]))


def batch_of(z: dict) -> dict[str, Tensor]:
    """The golden batch in RecBole's ids and field names."""
    keys = {"user_id": "batch/user", "item_id": "batch/pos", "neg_item_id": "batch/neg"}
    return {name: torch.from_numpy(z[key]).long() + 1 for name, key in keys.items()}


def put(parameter: Tensor, value: np.ndarray, pad: bool = False) -> None:
    """Write `value` into a parameter; with `pad` behind its padding row, which gets numbers that must not matter."""
    value = torch.from_numpy(np.asarray(value)).float()
    with torch.no_grad():
        target = parameter[1:] if pad else parameter
        assert target.shape == value.shape, (target.shape, value.shape)
        target.copy_(value)


def close(actual: Tensor, expected: np.ndarray, what: str) -> None:
    """|a - b| <= 1e-5 + 1e-4 |b|."""
    expected = torch.from_numpy(np.asarray(expected)).to(torch.float32)
    torch.testing.assert_close(actual.detach().float(), expected, atol=1e-5, rtol=1e-4, msg=lambda text: f"{what}: {text}")


def close_gradient(parameter: Tensor, expected: np.ndarray, what: str, pad: bool = False) -> None:
    """Gradients: 1e-4 of the tensor's largest magnitude; the padding row gets none."""
    actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if pad:
        assert not actual[0].any(), f"{what}: gradient at the padding row"
        actual = actual[1:]
    expected = torch.from_numpy(np.asarray(expected)).float()
    # gradients that are zero by mathematics are rounding noise on both sides
    limit = max(1e-4 * float(expected.abs().max()), 2e-7)
    assert actual.shape == expected.shape, what
    difference = float((actual - expected).abs().max())
    assert difference <= limit, f"{what}: {difference:.2e} > {limit:.2e}"


def dense(z: dict, key: str) -> np.ndarray:
    """A stored COO matrix as a dense one."""
    return sp.coo_matrix((z[f"{key}/val"], (z[f"{key}/row"], z[f"{key}/col"])), shape=tuple(z[f"{key}/shape"])).toarray()


def operator_dense(operator) -> np.ndarray:
    """A BipartiteOperator as a dense matrix without the padding rows, users first."""
    n, m = operator.to_users.matrix.shape
    index, value = operator.to_coo()
    full = torch.zeros(n + m, n + m).index_put_(tuple(index), value, accumulate=True)
    real = [*range(1, n), *range(n + 1, n + m)]
    return full[real][:, real].numpy()


def check_channels(model, z: dict) -> tuple[Tensor, Tensor]:
    """Features, every channel and the final vectors of a model on SLMRec's skeleton; returns the final vectors of users and items."""
    for i, m in enumerate("vt"):
        close(model.channels.unit_features()[i][1:], z[f"out/feat_norm/{m}"], f"feat_norm/{m}")
        close(model.channels.items()[i + 1][1:], z[f"out/{m}_dense_emb"], f"{m}_dense_emb")
    users, items = (side.chunk(3, 1) for side in model.channels(model.operator, model.n_layers))
    for channel, name in enumerate("ivt"):
        close(users[channel][1:], z[f"out/{name}_emb_u"], f"{name}_emb_u")
        close(items[channel][1:], z[f"out/{name}_emb_i"], f"{name}_emb_i")
    users, items = model.forward()
    close(users[1:], z["out/user_emb"], "user_emb")
    close(items[1:], z["out/item_emb"], "item_emb")
    return users, items
