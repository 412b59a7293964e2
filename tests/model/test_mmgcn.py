"""MMGCN against the numbers of the reference code, and what those cannot show."""

import numpy as np
import pytest
import torch

from recbole_mm.model.mmgcn import MMGCN
from tests.model import golden_graph as g
from tests.support import golden_params, load_golden


def weights(model, modalities="vt") -> dict:
    """Reference name -> (our parameter, transformation to the reference's layout, has a padding row)."""
    named = {}
    for m, branch in zip(modalities, model.branches):
        named[f"{m}_gcn.preference"] = (branch.preference, True)
        if branch.mlp is not None:
            named |= {f"{m}_gcn.MLP.weight": (branch.mlp.weight, False), f"{m}_gcn.MLP.bias": (branch.mlp.bias, False)}
        for k in range(3):
            named[f"{m}_gcn.conv_embed_{k + 1}.weight"] = (branch.conv[k], False)
            for part in ("weight", "bias"):
                named[f"{m}_gcn.linear_layer{k + 1}.{part}"] = (getattr(branch.self_map[k], part), False)
                named[f"{m}_gcn.g_layer{k + 1}.{part}"] = (getattr(branch.combine[k], part), False)
    return named


def golden_model(z, modalities="vt", **settings):
    c = g.reference_config(z)
    settings = {"reg_weight": c["reg_weight"], "embedding_size": c["embedding_size"], **settings}
    latent = z["w/v_gcn.MLP.weight"].shape[0]
    model = g.build(MMGCN, g.dataset_of(z, modalities), latent_dim=latent, **settings)
    for name, (parameter, pad) in weights(model, modalities).items():
        g.put(parameter, z[f"w/{name}"], pad)
    n = int(z["n_users"])
    g.put(model.user_embedding, z["w/id_embedding"][:n], True)
    g.put(model.item_embedding, z["w/id_embedding"][n:], True)
    return model


def nodes(pair) -> torch.Tensor:
    """Users and items without padding, one below the other, as the reference keeps them."""
    return torch.cat([pair[0][1:], pair[1][1:]])


def check_outputs(model, z, prefix=""):
    users, items = model.forward()
    g.close(users[1:], z[f"{prefix}out/user_emb"], "user_emb")
    g.close(items[1:], z[f"{prefix}out/item_emb"], "item_emb")
    g.close(users[1:] @ items[1:].T, z[f"{prefix}out/scores"], "scores")
    b = g.batch_of(z)
    loss, reg = model.calculate_loss(b), model.regulariser(b["user_id"], b["item_id"], b["neg_item_id"])
    g.close(loss, z[f"{prefix}out/loss"], "loss")
    g.close(reg, z[f"{prefix}out/loss_reg_raw"], "loss_reg_raw")
    g.close(loss - model.reg_weight * reg, z[f"{prefix}out/loss_main"], "loss_main")


@pytest.mark.parametrize("path", golden_params("mmgcn"))
def test_golden_intermediates(path):
    z = load_golden(path)
    model = golden_model(z)
    np.testing.assert_allclose(g.operator_dense(model.operator), g.dense(z, "out/adj"), atol=1e-6)
    adjacency = torch.from_numpy(g.dense(z, "out/adj")).float()
    assert {tuple(e) for e in z["edge_index"].T.tolist()} == {tuple(e) for e in np.argwhere(g.dense(z, "out/adj").T > 0).tolist()}
    for m, branch in zip("vt", model.branches):
        outputs = branch(model.operator, model.user_embedding, model.item_embedding)
        for k in range(3):
            g.close(nodes(outputs[k]), z[f"out/{m}/x{k + 1}"], f"{m}/x{k + 1}")
            if f"out/{m}/conv{k + 1}" in z:  # what the operator makes of the mapped input of the layer
                before = (
                    nodes(outputs[k - 1]) if k else torch.nn.functional.normalize(nodes((branch.preference, model.features["textual"])))
                )
                g.close(adjacency @ before @ branch.conv[k], z[f"out/{m}/conv{k + 1}"], f"{m}/conv{k + 1}")
        g.close(nodes(outputs[-1]), z[f"out/{m}/rep"], f"{m}/rep")


@pytest.mark.parametrize("path", golden_params("mmgcn"))
def test_golden_losses_and_gradients(path):
    z = load_golden(path)
    model = golden_model(z)
    check_outputs(model, z)
    model.train()
    model.calculate_loss(g.batch_of(z)).backward()
    named = weights(model)
    assert {name for name in z["grad/__unused__"].tolist() if name} == set()
    assert set(named) | {"id_embedding"} == {key.removeprefix("grad/") for key in z if key.startswith("grad/") and "__" not in key}
    for name, (parameter, pad) in named.items():
        g.close_gradient(parameter, z[f"grad/{name}"], name, pad)
    n = int(z["n_users"])
    g.close_gradient(model.user_embedding, z["grad/id_embedding"][:n], "id_embedding, users", True)
    g.close_gradient(model.item_embedding, z["grad/id_embedding"][n:], "id_embedding, items", True)


@pytest.mark.parametrize("path", golden_params("mmgcn"))
@pytest.mark.parametrize("modality", ["v", "t"])
def test_golden_single_modality(path, modality):
    z = load_golden(path)
    model = golden_model(z, modality)
    check_outputs(model, z, f"{modality}_only/")
    outputs = model.branches[0](model.operator, model.user_embedding, model.item_embedding)
    g.close(nodes(outputs[-1]), z[f"{modality}_only/out/{modality}/rep"], "rep")


@pytest.mark.parametrize("path", golden_params("mmgcn"))
def test_golden_frozen_id_trains_exactly_the_published_parameters(path):
    z = load_golden(path)
    model = golden_model(z, frozen_id=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(parameter) for name, (parameter, _) in weights(model).items() if name in set(z["trainable"].tolist())}
    assert "user_embedding" in model.state_dict()


def toy(modalities, seed=0, width=3, **settings):
    generator = np.random.default_rng(seed)
    inter = np.unique(generator.integers(0, (12, 17), (60, 2)), axis=0)
    features = {name: generator.normal(size=(18, width + i)) for i, name in enumerate(modalities)}
    torch.manual_seed(seed)
    model = g.build(MMGCN, g.ArrayDataset(inter, 12, 18, features), embedding_size=6, **settings)
    picked = torch.from_numpy(inter[generator.permutation(len(inter))[:20]]) + 1
    return model, {"user_id": picked[:, 0], "item_id": picked[:, 1], "neg_item_id": picked[:, 1].roll(1)}


@pytest.mark.parametrize("modalities", [["smell"], ["visual", "acoustic"], ["a", "b", "c", "d", "textual"]])
@pytest.mark.parametrize("settings", [{}, {"n_layers": 1}, {"n_layers": 2, "combination": "add"}])
def test_any_modalities_and_every_parameter_learns(modalities, settings):
    model, batch = toy(modalities, latent_dim=8, latent_modalities=[modalities[-1]], **settings)
    model.calculate_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("latent", [2, 8])
def test_maps_multiplied_first_or_last_give_the_same(latent):
    """The raw width 3 is above or below latent_dim, which takes the two ways through the input."""
    model, _ = toy(["visual"], latent_dim=latent)
    branch = model.branches[0]
    x = torch.nn.functional.normalize(branch.mlp(model.features["visual"]), dim=1)
    message, own = branch._item_input()
    torch.testing.assert_close(message, x @ branch.conv[0])
    torch.testing.assert_close(own, branch.self_map[0](x))


def test_batch_rows_are_the_rows_of_all():
    model, batch = toy(["visual", "acoustic"])
    users, items = model.forward()
    some_users, some_items = model.vectors(batch["user_id"], batch["item_id"])
    torch.testing.assert_close(some_users, users[batch["user_id"]])
    torch.testing.assert_close(some_items, items[batch["item_id"]])


def test_large_differences_stay_finite():
    model, batch = toy(["visual"])
    with torch.no_grad():
        model.branches[0].combine[-1].weight.mul_(1e4)
    loss = model.calculate_loss(batch)
    assert loss.isfinite()
