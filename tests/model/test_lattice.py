"""LATTICE against the numbers of the reference code, and what those cannot show."""

import numpy as np
import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.model.lattice import LATTICE
from tests.model import golden_graph as g
from tests.support import golden_params, load_golden

NAMES = {"v": "image", "t": "text"}
BLOCKS = [("", "vt"), ("tuned/", "vt"), ("v_only/", "v"), ("t_only/", "t")]


def weights(model, modalities) -> dict:
    """Reference name -> (our parameter, has a padding row)."""
    named = {"user_embedding.weight": (model.user_embedding, True), "item_id_embedding.weight": (model.item_embedding, True)}
    if model.modal_weight is not None:
        named["modal_weight"] = (model.modal_weight, False)
    for m, copy, project in zip(modalities, model.feature_copies, model.project):
        named[f"{NAMES[m]}_embedding.weight"] = (copy, True)
        named |= {f"{NAMES[m]}_trs.weight": (project.weight, False), f"{NAMES[m]}_trs.bias": (project.bias, False)}
    return named


def golden_model(z, modalities="vt", prefix="", **settings):
    c = g.reference_config(z)
    same = ("embedding_size", "feat_embed_dim", "knn_k", "lambda_coeff", "n_layers", "reg_weight", "train_batch_size")
    chosen = {**{key: c[key] for key in same}, "cf_model": c["cf_model"], "n_ui_layers": len(c["weight_size"]), **settings}
    model = g.build(LATTICE, g.dataset_of(z, modalities), **chosen)
    for name, (parameter, pad) in weights(model, modalities).items():
        g.put(parameter, z.get(f"{prefix}w/{name}", z[f"w/{name}"]), pad)
    return model


def as_dense(model, neighbours, values) -> np.ndarray:
    full = torch.zeros(model.n_items - 1, model.n_items - 1)
    return full.scatter_(1, neighbours, values.detach()).numpy()


@pytest.mark.parametrize("path", golden_params("lattice"))
@pytest.mark.parametrize("prefix, modalities", BLOCKS)
def test_golden_graphs_and_vectors(path, prefix, modalities):
    z = load_golden(path)
    model = golden_model(z, modalities, prefix)
    learned = model.learned_graphs()
    for i, m in enumerate(modalities):
        if f"{prefix}out/{NAMES[m]}_original_adj/val" in z:
            np.testing.assert_allclose(as_dense(model, *model._original[i]), g.dense(z, f"{prefix}out/{NAMES[m]}_original_adj"), atol=1e-5)
        if f"{prefix}out/{NAMES[m]}_learned_knn/val" in z:
            expected = g.dense(z, f"{prefix}out/{NAMES[m]}_learned_knn")
            np.testing.assert_allclose(as_dense(model, learned[0][i], learned[1][i]), expected, atol=1e-5)
    if f"{prefix}out/norm_adj/val" in z:
        np.testing.assert_allclose(g.operator_dense(model.operator), g.dense(z, f"{prefix}out/norm_adj"), atol=1e-6)
    pattern, values = model.item_graph()
    graph = pattern.matrix(values.detach()).to_dense()
    assert not graph[0].any() and not graph[:, 0].any()
    np.testing.assert_allclose(graph[1:, 1:], g.dense(z, f"{prefix}out/item_adj"), atol=1e-5)
    users, items = model.forward()
    g.close(users[1:], z[f"{prefix}out/user_emb"], "user_emb")
    g.close(items[1:], z[f"{prefix}out/item_emb"], "item_emb")
    g.close(users[1:] @ items[1:].T, z[f"{prefix}out/scores"], "scores")
    if f"{prefix}out/item_graph_h" in z:
        g.close(model.item_part(lambda h: pattern.product(values, h))[1:], z[f"{prefix}out/item_graph_h"], "item_graph_h")


@pytest.mark.parametrize("path", golden_params("lattice"))
@pytest.mark.parametrize("prefix, modalities", BLOCKS)
def test_golden_losses_and_gradients(path, prefix, modalities):
    z = load_golden(path)
    model, batch = golden_model(z, modalities, prefix, graph_momentum=False), g.batch_of(z)
    model.train()
    model.before_epoch(0)
    named = weights(model, modalities)

    def check(kind):
        recorded = {key.removeprefix(f"{prefix}{kind}/") for key in z if key.startswith(f"{prefix}{kind}/")} - {"__unused__"}
        for name in recorded:
            g.close_gradient(named[name][0], z[f"{prefix}{kind}/{name}"], f"{kind}/{name}", named[name][1])
        for name in z.get(f"{prefix}{kind}/__unused__", np.array([])).tolist():
            assert not name or named[name][0].grad is None, f"{kind}: {name} has a gradient"

    loss = model.calculate_loss(batch)
    g.close(loss, z[f"{prefix}out/loss"], "loss")
    loss.backward()
    check("grad_build")
    reg, model.reg_weight = model.reg_weight, 0.0
    ranking = model.calculate_loss(batch)
    g.close(ranking, z[f"{prefix}out/loss_mf"], "loss_mf")
    g.close(loss - ranking, z[f"{prefix}out/loss_emb"], "loss_emb")
    model.reg_weight = reg
    model.zero_grad()
    loss = model.calculate_loss(batch)
    g.close(
        loss, z.get(f"{prefix}out/loss_detached", z["out/loss_detached"]) if prefix != "tuned/" else z["tuned/out/loss_detached"], "loss"
    )
    loss.backward()
    check("grad_detached")


@pytest.mark.parametrize("path", golden_params("lattice"))
def test_golden_mf(path):
    z = load_golden(path)
    users, items = golden_model(z, cf_model="mf").forward()
    g.close(users[1:], z["cf_mf/out/user_emb"], "user_emb")
    g.close(items[1:], z["cf_mf/out/item_emb"], "item_emb")
    g.close(users[1:] @ items[1:].T, z["cf_mf/out/scores"], "scores")


def toy(modalities, seed=0, change=None, **settings):
    generator = np.random.default_rng(seed)
    inter = np.unique(generator.integers(0, (12, 17), (60, 2)), axis=0)
    features = {name: generator.normal(size=(18, 4 + i)) for i, name in enumerate(modalities)}
    if change:
        change(features)
    torch.manual_seed(seed)
    model = g.build(LATTICE, g.ArrayDataset(inter, 12, 18, features), **{"embedding_size": 6, "feat_embed_dim": 5, "knn_k": 4, **settings})
    picked = torch.from_numpy(inter[generator.permutation(len(inter))[:20]]) + 1
    return model, {"user_id": picked[:, 0], "item_id": picked[:, 1], "neg_item_id": picked[:, 1].roll(1)}


@pytest.mark.parametrize("modalities", [["smell"], ["visual", "acoustic"], ["a", "b", "c", "d", "textual"]])
@pytest.mark.parametrize("cf_model", ["lightgcn", "mf", "ngcf"])
def test_any_modalities_and_every_parameter_learns(modalities, cf_model):
    model, batch = toy(modalities, cf_model=cf_model, lambda_coeff=0.5)
    model.calculate_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_zero_and_equal_feature_rows_give_finite_vectors():
    def change(features):
        features["visual"][3] = 0
        features["visual"][5:12] = features["visual"][5]
        features["acoustic"][:] = 0

    model, batch = toy(["visual", "acoustic"], change=change)
    loss = model.calculate_loss(batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert all(x.isfinite().all() for x in model.forward())


def test_graph_is_built_with_gradient_once_per_epoch_and_momentum_goes_on():
    model, batch = toy(["visual", "acoustic"], lambda_coeff=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    moved = []
    model.before_epoch(0)
    for _ in range(3):
        before = model.feature_copies[0].detach().clone()
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
        moved.append(float((model.feature_copies[0].detach() - before).abs().max()))
    assert min(moved) > 1e-3
    assert not model.feature_copies[0].grad.any()
    model.before_epoch(1)
    optimizer.zero_grad()
    model.calculate_loss(batch).backward()
    assert model.feature_copies[0].grad.any()


def test_evaluation_uses_the_graph_of_the_current_weights():
    model, batch = toy(["visual", "acoustic"], lambda_coeff=0.0)
    before = model.forward()[1]
    with torch.no_grad():
        model.project[0].weight.copy_(torch.randn(5, 4))
    after = model.forward()[1]
    assert not torch.allclose(before, after)
    again, _ = toy(["visual", "acoustic"], lambda_coeff=0.0)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.forward()[1], after)


def test_frozen_features_have_no_copies():
    model, batch = toy(["visual", "acoustic"], freeze_features=True)
    assert model.feature_copies is None
    model.calculate_loss(batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unknown_cf_model_is_named():
    with pytest.raises(UserError, match="lightgcn"):
        toy(["visual"], cf_model="lightgc")
