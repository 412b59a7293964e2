"""MMGCL against the numbers of the reference code, and what those cannot show."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from recbole_mm.errors import UserError
from recbole_mm.model.mmgcl import MMGCL
from tests.model import golden_graph as g
from tests.support import golden_params, load_golden

MODALITY = {"image": 0, "text": 1}
TASKS = ["ED", "ED+MM", "ED+MM+CN"]


def weights(model) -> dict:
    """Reference name -> (our parameter, has a padding row)."""
    linear = {"v_dense": model.channels.project[0], "t_dense": model.channels.project[1]}
    linear |= {"read_user": model.read_user, "read_item": model.read_item}
    named = {f"{name}.{part}": (getattr(layer, part), False) for name, layer in linear.items() for part in ("weight", "bias")}
    return named | {
        "embedding_user.weight": (model.channels.user_embedding, True),
        "embedding_item.weight": (model.channels.item_embedding, True),
    }


def golden_model(z, **settings):
    c = g.reference_config(z)
    names = {"embedding_size": "latent_dim", "n_layers": "layer_num", "ssl_temperature": "ssl_temp", "ssl_weight": "ssl_alpha"}
    chosen = {ours: c[theirs] for ours, theirs in names.items()} | {"dropout_rate": c["dropout_rate"], "ssl_task": c["ssl_task"]}
    model = g.build(MMGCL, g.dataset_of(z), **chosen, published=settings.pop("published", True), **settings)
    for name, (parameter, pad) in weights(model).items():
        g.put(parameter, z[f"w/{name}"], pad)
    return model


def kept(model, z, key) -> torch.Tensor:
    """The stored surviving pairs as a mask over the model's edges."""
    pairs = torch.from_numpy(z[key]).long() + 1
    keys = pairs[:, 0] * model.n_items + pairs[:, 1]
    return torch.isin(model.graph.user * model.n_items + model.graph.item, keys)


def graphs(model, z, case) -> dict:
    """Operators of the three draws; identity: the unperturbed graph."""
    if case == "identity":
        return dict.fromkeys(("ed", "ed2", "mm"), model.operator)
    return {name: model.graph.operator("sym", kept(model, z, f"aug/{name}_keep")) for name in ("ed", "ed2", "mm")}


def view(model, channels, batch, replaced):
    """Unit-length users, items, composite negatives of the batch's rows."""
    users, items = channels
    pos, neg = items[batch["item_id"]], items[batch["neg_item_id"]]
    parts = model.read_user(users[batch["user_id"]]), model.read_item(pos), model.read_item(model.composite(pos, neg, replaced))
    return [torch.nn.functional.normalize(x, dim=1) for x in parts]


def check_view(parts, z, prefix):
    for x, name in zip(parts, ("users", "items", "neg_items")):
        g.close(x, z[f"{prefix}/{name}"], f"{prefix}/{name}")


def ce(logits):
    return cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize("path", golden_params("mmgcl"))
def test_golden_intermediates(path):
    z = load_golden(path)
    model, batch = golden_model(z), g.batch_of(z)
    np.testing.assert_allclose(g.operator_dense(model.operator), g.dense(z, "out/adj"), atol=1e-6)
    for name, operator in graphs(model, z, "drop").items():
        np.testing.assert_allclose(g.operator_dense(operator), g.dense(z, f"aug/{name}_adj"), atol=1e-6)
    users, items = g.check_channels(model, z)
    g.close(users[1:] @ items[1:].T, z["out/scores"], "scores")
    model.ssl_weight = 0
    g.close(model.calculate_loss(batch), z["out/loss_bpr"], "loss_bpr")


@pytest.mark.parametrize("path", golden_params("mmgcl"))
@pytest.mark.parametrize("case", ["identity", "drop"])
@pytest.mark.parametrize("modality", MODALITY)
def test_golden_views_and_losses(path, case, modality):
    z = load_golden(path)
    model, batch = golden_model(z), g.batch_of(z)
    user, pos, neg = batch["user_id"], batch["item_id"], batch["neg_item_id"]
    tau = g.reference_config(z)["ssl_temp"]
    inputs = model.channels.items()
    full = model.channels(model.operator, model.n_layers, inputs)
    operators = graphs(model, z, case)
    both = f"{case}_{modality}"
    first = model.channels(operators["ed"], model.n_layers, inputs)
    second = model.channels(operators["ed2"], model.n_layers, inputs)
    masked = model.masked_channels(inputs, full, operators["mm"], MODALITY[modality])

    one, two = view(model, first, batch, [2]), view(model, masked, batch, [1, 2])
    check_view(one, z, f"{case}/out/view_ed")
    check_view(two, z, f"{both}/out/view_mm")
    g.close(one[0] @ one[1].T / tau, z[f"{case}/out/logits1"], "logits1")
    g.close(one[0] @ one[2].T / tau, z[f"{case}/out/logits3"], "logits3")
    for task in TASKS:
        repeated = view(model, second, batch, [2]) if task == "ED" else one
        g.close(model.view_loss(first, user, pos, neg, None), z[f"{both}/out/ce1[{task}]"], "ce1")
        g.close(ce(repeated[0] @ repeated[1].T / tau), z[f"{both}/out/ce2[{task}]"], "ce2")
        if f"{both}/out/ce3[{task}]" in z:
            g.close(ce(one[0] @ one[2].T / tau), z[f"{both}/out/ce3[{task}]"], "ce3")
        model.task = task
        views = {"ED": first} | ({"ED2": second} if task == "ED" else {})
        g.close(model.contrastive_loss(views, user, pos, neg), z[f"{both}/out/ssl[{task}]"], f"ssl[{task}]")
    g.close(model.view_loss(masked, user, pos, neg, None), z[f"{both}/alt/ce_users2_items2"], "ce_users2_items2")
    g.close(ce(one[0] @ two[0].T / tau), z[f"{both}/alt/ce_users1_users2"], "ce_users1_users2")
    g.close(ce(one[1] @ two[1].T / tau), z[f"{both}/alt/ce_items1_items2"], "ce_items1_items2")


@pytest.mark.parametrize("path", golden_params("mmgcl"))
@pytest.mark.parametrize("case", ["identity", "drop"])
def test_golden_total_loss_and_gradients(path, case, monkeypatch):
    z = load_golden(path)
    model, batch = golden_model(z), g.batch_of(z)
    operators = graphs(model, z, case)
    drawn = {"ED": operators["ed"]} | ({"ED2": operators["ed2"]} if model.task == "ED" else {})
    monkeypatch.setattr(model, "draw", lambda: drawn)
    model.train()
    loss = model.calculate_loss(batch)
    for modality in MODALITY:  # masking does not reach the published loss
        g.close(loss, z[f"{case}_{modality}/out/loss"], "loss")
    loss.backward()
    if case == "drop":
        assert {name for name in z["drop_image/grad/__unused__"].tolist() if name} == set()
        for name, (parameter, pad) in weights(model).items():
            g.close_gradient(parameter, z[f"drop_image/grad/{name}"], name, pad)


@pytest.mark.parametrize("path", golden_params("mmgcl"))
def test_golden_fixed_loss_is_both_views_with_challenging_negatives(path, monkeypatch):
    """The default form on the stored graphs, from the reference's own views where nothing was swapped (image drawn)."""
    z = load_golden(path)
    model, batch = golden_model(z, published=False), g.batch_of(z)
    tau = g.reference_config(z)["ssl_temp"]
    operators = graphs(model, z, "drop")
    drawn = {"ED": operators["ed"], "MM": operators["mm"], "modality": 0}
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.tensor([high - 1]))  # the last modality, as published
    full = model.channels(model.operator, model.n_layers)
    expected = 0.0
    for name in ("drop/out/view_ed", "drop_image/out/view_mm"):
        u, i, n = (torch.from_numpy(z[f"{name}/{part}"]) for part in ("users", "items", "neg_items"))
        expected += ce(torch.cat([u @ i.T, (u * n).sum(1, keepdim=True)], 1) / tau)
    model.task = "ED+MM+CN"
    actual = model.contrastive_loss(model.views(full, drawn), batch["user_id"], batch["item_id"], batch["neg_item_id"])
    g.close(actual, expected.numpy(), "fixed ssl")


def toy(modalities, seed=0, **settings):
    generator = np.random.default_rng(seed)
    inter = np.unique(generator.integers(0, (12, 17), (60, 2)), axis=0)
    features = {name: generator.normal(size=(18, 3 + i)) for i, name in enumerate(modalities)}
    torch.manual_seed(seed)
    model = g.build(MMGCL, g.ArrayDataset(inter, 12, 18, features), embedding_size=6, **settings)
    picked = torch.from_numpy(inter[generator.permutation(len(inter))[:20]]) + 1
    return model, {"user_id": picked[:, 0], "item_id": picked[:, 1], "neg_item_id": picked[:, 1].roll(1)}


@pytest.mark.parametrize("modalities", [["smell"], ["visual", "acoustic"], ["a", "b", "c", "d", "textual"]])
@pytest.mark.parametrize(
    "settings", [{}, {"published": True}, {"ssl_task": "MM"}, {"ssl_task": "ED", "published": True}, {"resample": "epoch"}]
)
def test_any_modalities_and_every_parameter_learns(modalities, settings):
    model, batch = toy(modalities, dropout_rate=0.2, **settings)
    for _ in range(2):
        model.zero_grad()
        model.calculate_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("published, changes", [(False, True), (True, False)])
def test_masking_and_challenges_reach_the_loss_only_when_not_published(published, changes):
    def loss(task):
        torch.manual_seed(0)
        model, batch = toy(["visual", "acoustic"], ssl_task=task, published=published, dropout_rate=0.0)
        return float(model.calculate_loss(batch).detach())

    assert (abs(loss("ED+MM+CN") - loss("ED+MM")) > 1e-4) == changes


def test_graphs_are_drawn_per_batch_or_per_epoch():
    for resample, same in (("batch", False), ("epoch", True)):
        model, batch = toy(["visual", "acoustic"], resample=resample, dropout_rate=0.3)
        model.before_epoch(0)
        model.calculate_loss(batch)
        first = model._drawn
        model.calculate_loss(batch)
        assert (model._drawn is first) == same
        model.before_epoch(1)
        model.calculate_loss(batch)
        assert model._drawn is not first


def test_masked_modalities_follow_their_weights():
    model, _ = toy(["visual", "acoustic"], mask_weights={"visual": 0.0, "acoustic": 1.0})
    assert {model.draw()["modality"] for _ in range(20)} == {1}
    with pytest.raises(UserError, match="mask_weights"):
        toy(["visual"], mask_weights={"visual": 0.0})


@pytest.mark.parametrize("settings", [{"ssl_task": "EM"}, {"resample": "step"}, {"ssl_task": "MM", "published": True}])
def test_wrong_choices_are_named(settings):
    with pytest.raises(UserError):
        toy(["visual"], **settings)
