"""SLMRec against the numbers of the reference code, and what those cannot show."""

import numpy as np
import pytest
import torch

from recbole_mm.model.slmrec import SLMRec
from tests.model import golden_graph as g
from tests.support import golden_params, load_golden

ADJACENCY = {"pre": "sym", "plain": "plain", "norm": "row_loop", "gcmc": "row", "mean": "row_plus_loop"}


def weights(model) -> dict:
    """Reference name -> (our parameter, has a padding row)."""
    linear = {
        "v_dense": model.channels.project[0],
        "t_dense": model.channels.project[1],
        "embedding_item_after_GCN": model.read_item,
        "embedding_user_after_GCN": model.read_user,
        "g_i_iv": model.query[0],
        "g_iv_iva": model.query[1][0],
        "g_iva_ivat": model.query[1][1],
        "g_v_iv": model.key[0],
        "g_t_ivat": model.key[1],
    }
    named = {f"{name}.{part}": (getattr(layer, part), False) for name, layer in linear.items() for part in ("weight", "bias")}
    named["embedding_user.weight"] = (model.channels.user_embedding, True)
    named["embedding_item.weight"] = (model.channels.item_embedding, True)
    return named


def golden_model(z, adjacency=None):
    c = g.reference_config(z)
    settings = dict(
        embedding_size=c["recdim"], n_layers=c["layer_num"], temperature=c["temp"], ssl_temperature=c["ssl_temp"], ssl_weight=c["ssl_alpha"]
    )
    model = g.build(SLMRec, g.dataset_of(z), adjacency=ADJACENCY[adjacency or c["adj_type"]], **settings)
    for name, (parameter, pad) in weights(model).items():
        g.put(parameter, z[f"w/{name}"], pad)
    return model


@pytest.mark.parametrize("path", golden_params("slmrec"))
def test_golden_intermediates(path):
    z = load_golden(path)
    model = golden_model(z)
    np.testing.assert_allclose(g.operator_dense(model.operator), g.dense(z, "out/adj"), atol=1e-6)
    users, items = g.check_channels(model, z)
    g.close(users[1:] @ items[1:].T, z["out/raw_scores"], "raw_scores")
    g.close((users[1:] @ items[1:].T).sigmoid(), z["out/scores"], "scores")
    model.eval()
    every = torch.arange(1, model.n_users)
    scores = model.full_sort_predict({"user_id": every}).view(len(every), -1)
    g.close(scores[:, 1:], z["out/raw_scores"], "full_sort_predict")


@pytest.mark.parametrize("path", golden_params("slmrec"))
@pytest.mark.parametrize("adjacency", ["plain", "norm", "gcmc", "mean"])
def test_golden_adjacencies(path, adjacency):
    z = load_golden(path)
    if f"adj_{adjacency}/out/user_emb" not in z:
        pytest.skip(f"{path.name} has no adj_{adjacency}")
    model = golden_model(z, adjacency)
    np.testing.assert_allclose(g.operator_dense(model.operator), g.dense(z, f"adj_{adjacency}/out/adj"), atol=1e-6)
    users, items = model.forward()
    g.close(users[1:], z[f"adj_{adjacency}/out/user_emb"], "user_emb")
    g.close(items[1:], z[f"adj_{adjacency}/out/item_emb"], "item_emb")


@pytest.mark.parametrize("path", golden_params("slmrec"))
def test_golden_losses_and_gradients(path):
    z = load_golden(path)
    model, batch = golden_model(z), g.batch_of(z)
    model.train()
    loss = model.calculate_loss(batch)
    g.close(loss, z["out/loss"], "loss")
    loss.backward()
    unused = {name for name in z["grad/__unused__"].tolist() if name}
    named = weights(model)
    assert unused == set(z["trainable"].tolist()) - set(named)  # what the port defines and never uses does not exist here
    for name, (parameter, pad) in named.items():
        g.close_gradient(parameter, z[f"grad/{name}"], name, pad)

    # the parts, and the matrices fed to the softmax, row by row of the batch
    c = g.reference_config(z)
    users, items = model.channels(model.operator, model.n_layers)
    users, items = users[batch["user_id"]], items[batch["item_id"]]
    each = torch.arange(len(users))
    g.close(model.main_loss(model.read_user(users), model.read_item(items), each, each), z["out/loss_main"], "loss_main")
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (model.read_user(users), model.read_item(items))]
    g.close(unit[0] @ unit[1].T / c["temp"], z["out/logits_main"], "logits_main")
    losses = model.chain_losses(items, each)
    g.close(losses[0], z["out/loss_ssl_v"], "loss_ssl_v")
    g.close(losses[1], z["out/loss_ssl_t"], "loss_ssl_t")
    g.close(sum(losses), z["out/loss_ssl"], "loss_ssl")
    ids, visual, textual = items.chunk(3, 1)
    query = model.query[0](ids)
    g.close(query @ model.key[0](visual).T / c["ssl_temp"], z["out/logits_ssl_v"], "logits_ssl_v")
    g.close(model.query[1](query) @ model.key[1](textual).T / c["ssl_temp"], z["out/logits_ssl_t"], "logits_ssl_t")


def toy(modalities, seed=0, **settings):
    generator = np.random.default_rng(seed)
    inter = np.unique(generator.integers(0, (12, 17), (60, 2)), axis=0)
    features = {name: generator.normal(size=(18, 3 + i)) for i, name in enumerate(modalities)}  # item 18 has no interaction
    torch.manual_seed(seed)
    model = g.build(SLMRec, g.ArrayDataset(inter, 12, 18, features), embedding_size=6, **settings)
    picked = torch.from_numpy(inter[generator.permutation(len(inter))[:20]]) + 1
    return model, {"user_id": picked[:, 0], "item_id": picked[:, 1]}


@pytest.mark.parametrize(
    "modalities", [["smell"], ["visual", "acoustic"], ["textual", "acoustic", "visual"], ["a", "b", "c", "d", "textual"]]
)
def test_any_modalities_and_every_parameter_learns(modalities):
    model, batch = toy(modalities)
    assert len(model.chain_losses(model.channels(model.operator, 2)[1][1:], torch.arange(18))) == len(modalities)
    model.calculate_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    order = [n for n in ("visual", "acoustic", "textual") if n in modalities] + [n for n in modalities if len(n) < 6 and n != "visual"]
    assert model.channels.names == ["id", *order]


def test_chain_with_three_modalities_is_the_official_one():
    model, _ = toy(["visual", "acoustic", "textual"])
    shapes = [tuple(step.weight.shape) for step in model.query], [tuple(key.weight.shape) for key in model.key]
    assert shapes == ([(6, 6), (6, 6), (3, 6)], [(6, 6), (6, 6), (3, 6)])


def test_distinct_items_count_once():
    model, batch = toy(["visual"], distinct_items=True)
    repeated = {key: torch.cat([value, value]) for key, value in batch.items()}
    torch.testing.assert_close(model.calculate_loss(batch), model.calculate_loss(repeated))
    model.distinct_items = False
    assert model.calculate_loss(repeated) > model.calculate_loss(batch)


def test_isolated_items_are_scored_by_their_features():
    model, _ = toy(["visual", "acoustic"])
    users, items = model.forward()
    assert users.isfinite().all() and items.isfinite().all()
    assert items[18].abs().sum() > 0
