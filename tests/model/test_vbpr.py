"""VBPR: the authors' numbers and the known answer; what holds for every model is in test_contract.py."""

import json

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mm.testing import TwoTastes, auc, fit, make_model
from tests.support import golden_params, load_golden


def golden_model(z, prefix: str, modalities: dict[str, str]):
    """Our VBPR with the reference's weights, ids moved by one for the padding row."""
    cfg = json.loads(str(z["config"]))
    n_users, n_items = int(z["n_users"]) + 1, int(z["n_items"]) + 1
    features = {name: np.vstack([np.zeros_like(z[key][:1]), z[key]]) for name, key in modalities.items()}
    dim = z[f"{prefix}w/i_embedding"].shape[1] if f"{prefix}w/i_embedding" in z else cfg["embedding_size"]
    model = make_model("VBPR", z["inter"] + 1, n_users, n_items, features, embedding_size=int(dim), reg_weight=float(cfg["reg_weight"]))
    return model, cfg


NAMES = {
    "u_embedding": "user_embedding",
    "i_embedding": "item_embedding",
    "item_linear.weight": "project.weight",
    "item_linear.bias": "project.bias",
}
CASES = [("", {"visual": "feat/v", "textual": "feat/t"}), ("v_only/", {"visual": "feat/v"}), ("t_only/", {"textual": "feat/t"})]


@pytest.mark.parametrize("path", golden_params("vbpr"))
@pytest.mark.parametrize("prefix, modalities", CASES, ids=["both", "visual", "textual"])
def test_golden(path, prefix, modalities):
    z = load_golden(path)
    model, cfg = golden_model(z, prefix, modalities)
    padded = {"user_embedding", "item_embedding"}
    state = {}
    for theirs, ours in NAMES.items():
        value = torch.from_numpy(z[f"{prefix}w/{theirs}"])
        state[ours] = torch.cat([torch.zeros(1, value.shape[1]), value]) if ours in padded else value
    model.load_state_dict(state)

    users, items = model.forward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    for key, value in (("user_emb", users), ("item_emb", items)):
        if f"{prefix}out/{key}" in z:
            np.testing.assert_allclose(value[1:].detach(), z[f"{prefix}out/{key}"], **close)
    np.testing.assert_allclose((users @ items.T)[1:, 1:].detach(), z[f"{prefix}out/scores"], **close)

    batch = {"user_id": z["batch/user"] + 1, "item_id": z["batch/pos"] + 1, "neg_item_id": z["batch/neg"] + 1}
    loss = model.calculate_loss(Interaction({key: torch.from_numpy(value) for key, value in batch.items()}))
    np.testing.assert_allclose(loss.item(), z[f"{prefix}out/loss"].item(), **close)
    user, pos, neg = (torch.from_numpy(value) for value in batch.values())
    for key, item in (("pos_score", pos), ("neg_score", neg)):
        if f"{prefix}out/{key}" in z:
            np.testing.assert_allclose((users[user] * items[item]).sum(-1).detach(), z[f"{prefix}out/{key}"].ravel(), **close)
    if f"{prefix}out/loss_bpr" in z:
        expected = z[f"{prefix}out/loss_bpr"].item() + float(cfg["reg_weight"]) * z[f"{prefix}out/loss_reg"].item()
        np.testing.assert_allclose(loss.item(), expected, **close)
    loss.backward()
    for theirs, ours in NAMES.items():
        gradient = model.get_parameter(ours).grad
        gradient = gradient[1:] if ours in padded else gradient
        expected = z[f"{prefix}grad/{theirs}"]
        assert np.abs(gradient.numpy() - expected).max() <= 1e-4 * np.abs(expected).max(), theirs


@pytest.mark.parametrize("shift, low, high", [(0, 0.95, 1.0), (1, 0.0, 0.9)])
def test_unseen_items_are_ranked_by_their_own_features(shift, low, high):
    """Rows shifted by one are the classic padding bug: the score must then fall to chance."""
    world = TwoTastes(shift)
    model = fit("VBPR", world, steps=100)
    assert low <= auc(model, world.users, world.unseen, world.likes) <= high


def test_bias_is_part_of_the_score():
    world = TwoTastes()
    model = world.model("VBPR", use_bias=True).eval()
    before = model.full_sort_predict(Interaction({"user_id": torch.tensor([1])}))
    with torch.no_grad():
        model.item_bias[7] += 2.0
        model.feature_bias += 0.5
    model.train().eval()
    after = model.full_sort_predict(Interaction({"user_id": torch.tensor([1])}))
    raw = torch.cat(model._raw(None), dim=-1)
    torch.testing.assert_close(after - before, 0.5 * raw.sum(-1) + 2.0 * (torch.arange(model.n_items) == 7))


def test_normalised_features_ignore_their_scale():
    world = TwoTastes()
    first = world.model("VBPR", normalize_features=True).forward()[1]
    world.features["visual"] *= 100
    torch.testing.assert_close(world.model("VBPR", normalize_features=True).forward()[1], first)
