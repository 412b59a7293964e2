"""PerPEFT-SASRec against the published code, and what its parts promise beyond it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from recbole_mm.config import Config
from recbole_mm.data.group_sampler import GroupSampler
from recbole_mm.data.loader import data_preparation
from recbole_mm.data.user_sequence import UserSequenceDataset
from recbole_mm.model.perpeft import PerPEFTSASRec
from recbole_mm.model.perpeft import model as perpeft
from recbole_mm.model.perpeft.encoder import FrozenEncoder, IISANEncoder
from recbole_mm.model.perpeft.network import GroupedSASRec, left_padded
from recbole_mm.trainer.perpeft import GroupBatches, PerPEFTTrainer
from tests.layer.test_adapter import assert_gradients, iisan_names, projector_names, tensors
from tests.support import golden_params, load_golden

VALUES = {"rtol": 1e-4, "atol": 1e-5}
GOLDEN = golden_params("perpeft") + golden_params("iisan")


def sasrec_names(reference: dict) -> dict:
    """The reference's names of SASRec's tensors -> ours."""
    ours = {
        "item_emb": "item_embedding",
        "pos_emb": "sequence.position_embedding",
        "last_layernorm": "sequence.norm",
        "attention_layernorms": "attention_norm",
        "forward_layernorms": "feed_norm",
        "conv1": "inner",
        "conv2": "outer",
    }
    named = {}
    for name, value in reference.items():
        parts = name.split(".")
        if len(parts) == 2:
            named[f"{ours[parts[0]]}.{parts[1]}"] = value
            continue
        block = f"sequence.blocks.{parts[1]}"
        if parts[0] == "attention_layers":
            tail = {"in_proj_weight": "project.weight", "in_proj_bias": "project.bias"}.get(parts[2]) or f"out.{parts[3]}"
            named[f"{block}.attention.{tail}"] = value
        elif parts[0] == "forward_layers":
            named[f"{block}.{ours[parts[2]]}.{parts[3]}"] = value.squeeze(-1) if value.dim() == 3 else value
        else:
            named[f"{block}.{ours[parts[0]]}.{parts[2]}"] = value
    return named


def reference_weights(z: dict, prefix: str = "w/") -> dict:
    named = sasrec_names(tensors(z, f"{prefix}sasrec."))
    return named | {f"projectors.0.{k}": v for k, v in projector_names(tensors(z, f"{prefix}projector.")).items()}


def item_features(z: dict) -> torch.Tensor:
    """Encoder output of every item below a zero row for padding."""
    if "out/encoder" in z:
        table = torch.from_numpy(z["out/encoder"])
    else:
        table = torch.cat((torch.from_numpy(z["feat/v"]), torch.from_numpy(z["feat/t"])), dim=1)
    return torch.cat((torch.zeros(1, table.shape[1]), table))


def load_network(z: dict, encoder=None) -> GroupedSASRec:
    c = json.loads(str(z["config"]))
    network = GroupedSASRec(
        encoder or FrozenEncoder(item_features(z)),
        int(z["n_items"]) + 1,
        1,
        c["maxlen"],
        c["hidden_units"],
        c["num_blocks"],
        c["num_heads"],
        c["dropout_rate"],
        c["dropout_rate"],
        weight=c["weight_scalar"],
        l2_emb=c["l2_emb"],
    )
    missing, unexpected = network.load_state_dict(reference_weights(z), strict=False)
    assert not unexpected and all(name.startswith("encoder.") for name in missing)
    return network.eval()


def batch(z: dict) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(z[f"batch/{name}"]) for name in ("seq", "pos", "neg"))


@pytest.mark.parametrize("path", GOLDEN)
def test_golden_items_blocks_logits_and_states(path):
    z = load_golden(path)
    network = load_network(z)
    sequence, positive, negative = batch(z)
    everything = torch.arange(int(z["n_items"]) + 1)
    assert_close(network.project(network.encoder(everything[1:], 0), 0), torch.from_numpy(z["out/mm_proj"]), **VALUES)
    assert_close(network.item_table(0), torch.from_numpy(z["out/item_repr"]), **VALUES)
    assert_close(network.item_vectors(everything, 0), torch.from_numpy(z["out/item_repr"]), **VALUES)

    seen = {}
    for k, block in enumerate(network.sequence.blocks):
        for key, module in (("query", block.attention_norm), ("attn", block.attention), ("ffn_in", block.feed_norm), ("ffn_out", block)):
            module.register_forward_hook(lambda _m, _i, out, key=f"block{k}/{key}": seen.__setitem__(key, out))
    items = network.item_vectors(sequence, 0)
    assert_close(network.sequence.embed(items, sequence == 0), torch.from_numpy(z["out/input_emb"]), **VALUES)
    state = network.sequence(items, sequence == 0)
    for key, value in seen.items():
        assert_close(value, torch.from_numpy(z[f"out/{key}"]), msg=lambda m, key=key: f"{key}: {m}", **VALUES)
    assert_close(state, torch.from_numpy(z["out/seq_output"]), **VALUES)
    assert_close(state[:, -1], torch.from_numpy(z["out/last"]), **VALUES)
    for name, ids in (("pos", positive), ("neg", negative)):
        assert_close((state * network.item_vectors(ids, 0)).sum(-1), torch.from_numpy(z[f"out/{name}_logits"]), **VALUES)


@pytest.mark.parametrize("path", GOLDEN)
def test_golden_losses_and_gradients(path):
    z = load_golden(path)
    network = load_network(z)
    sequence, positive, negative = batch(z)
    count = (positive > 0).sum()
    terms = network.loss_terms(sequence, positive, negative, 0)
    assert_close(terms[0] / count, torch.tensor(float(z["out/loss_bce_pos"])), **VALUES)
    assert_close(terms[1] / count, torch.tensor(float(z["out/loss_bce_neg"])), **VALUES)
    assert_close(network.l2_emb * network.item_embedding.weight.norm(), torch.tensor(float(z["out/loss_l2"])), **VALUES)
    loss = network.loss(sequence, positive, negative, torch.zeros(len(sequence), dtype=torch.int64))
    assert_close(loss, torch.tensor(float(z["out/loss"])), **VALUES)
    loss.backward()
    assert_gradients(network, reference_weights(z, "grad/"))


@pytest.mark.parametrize("path", golden_params("iisan"))
def test_golden_iisan_gradients_through_the_sequence(path):
    """The file's training-time padding (id 0 encoded from zero states) is put in by hand; the rest is the model's own way."""
    z = load_golden(path)
    c = json.loads(str(z["config"]))
    states = [torch.from_numpy(np.concatenate([np.zeros_like(z[key][:1]), z[key]])) for key in ("feat/img_hidden", "feat/text_hidden")]
    encoder = IISANEncoder(*states, 1, c["iisan_hid_dim"])
    encoder.sides[0].load_state_dict(iisan_names(tensors(z, "w/iisan.")))
    network = load_network(z, encoder)
    sequence, positive, negative = batch(z)
    groups = torch.zeros(len(sequence), dtype=torch.int64)
    assert_close(network.loss(sequence, positive, negative, groups), torch.tensor(float(z["out/loss"])), **VALUES)

    network.project = lambda features, group: network.projectors[group](
        torch.cat((encoder.sides[0](states[0][:1], states[1][:1]), features))
    )
    loss = network.loss(sequence, positive, negative, groups)
    assert_close(loss, torch.tensor(float(z["train_pad/out/loss"])), **VALUES)
    loss.backward()
    expected = iisan_names(tensors(z, "train_pad/grad/iisan."))
    assert_gradients(encoder.sides[0], expected)


def golden_run(z: dict, folder, monkeypatch, **settings):
    """A data set with the file's interactions, and the model with its weights, on our loaders and evaluator."""
    c = json.loads(str(z["config"]))
    n_items = int(z["n_items"])
    (folder / "toy").mkdir()
    inter = pd.DataFrame(
        {"user_id:token": z["inter"][:, 0] + 1, "item_id:token": z["inter"][:, 1] + 1, "timestamp:float": range(len(z["inter"]))}
    )
    inter.to_csv(folder / "toy" / "toy.inter", sep="\t", index=False)
    titles = pd.DataFrame({"item_id:token": range(1, n_items + 1), "title:token_seq": "a"})
    titles.to_csv(folder / "toy" / "toy.item", sep="\t", index=False)
    given = {
        "data_path": str(folder), "use_gpu": False, "tensorboard": False, "show_progress": False, "checkpoint_dir": str(folder / "saved"),
        "MAX_ITEM_LIST_LENGTH": c["maxlen"], "hidden_size": c["hidden_units"], "n_layers": c["num_blocks"], "n_heads": c["num_heads"],
        "hidden_dropout_prob": c["dropout_rate"], "attn_dropout_prob": c["dropout_rate"], "l2_emb": c["l2_emb"],
        "weight_scalar": c["weight_scalar"], "peft_scope": "global", "metrics": ["NDCG", "Hit"], "topk": [10, 20, 30], "epochs": 2,
        "metric_decimal_place": 7, "load_col": None, **settings,
    }  # fmt: skip
    config = Config("PerPEFTSASRec", "toy", config_dict=given)
    dataset = UserSequenceDataset(config)
    loaders = data_preparation(config, dataset)
    train = loaders[0]._dataset
    original = np.array(
        [int(token) for token in dataset.id2token("item_id", range(1, n_items + 1))]
    )  # our id i is the file's original[i - 1]
    table = item_features(z)[np.concatenate([[0], original])]

    def frozen(*_):
        encoder = FrozenEncoder(table)
        encoder.fingerprint = "golden"
        return encoder

    monkeypatch.setattr(perpeft, "build_encoder", frozen)
    model = PerPEFTSASRec(config, train)
    weights = reference_weights(z)
    weights["item_embedding.weight"] = weights["item_embedding.weight"][np.concatenate([[0], original])]
    for group in range(1, model.n_groups):
        weights |= {f"projectors.{group}.{k}": v for k, v in projector_names(tensors(z, "w/projector.")).items()}
    model.network.load_state_dict(weights)
    return config, dataset, loaders, model, original


@pytest.mark.parametrize("path", GOLDEN)
def test_golden_sequences_scores_and_metrics_through_our_evaluator(path, tmp_path, monkeypatch):
    """The data set's sequences, the scores and the sums of HR and NDCG are the reference's, by RecBole's metrics on our loaders."""
    z = load_golden(path)
    config, dataset, (_, valid_data, test_data), model, original = golden_run(z, tmp_path, monkeypatch)
    trainer = PerPEFTTrainer(config, model)
    file_id = np.concatenate([[0], original])
    for phase, loader in (("valid", valid_data), ("test", test_data)):
        rows = loader._dataset.inter_feat
        users = np.array([int(t) for t in dataset.id2token("user_id", rows["user_id"])]) - 1
        assert_close(torch.from_numpy(file_id[left_padded(rows["item_id_list"])]), torch.from_numpy(z[f"eval/{phase}_seq"][users]))
        assert (file_id[rows["item_id"]] == z[f"eval/{phase}_target"][users]).all()
        model.eval()
        scores = model.full_sort_predict(rows).view(len(rows), -1)[:, 1:]
        assert_close(scores, torch.from_numpy(z[f"out/scores_{phase}"])[users][:, original - 1], **VALUES)

        result = trainer.evaluate(loader, load_best_model=False)
        n = int(z[f"out/eval_{phase}_n"])
        assert len(rows) == n
        names = [f"ndcg@{k}" for k in (10, 20, 30)] + [f"hit@{k}" for k in (10, 20, 30)]
        assert_close(
            torch.tensor([result[name] * n for name in names], dtype=torch.float32),
            torch.from_numpy(z[f"out/eval_{phase}_sums"]),
            atol=1e-4,
            rtol=1e-5,
        )

    sequences = model.dataset.user_sequences(config["MAX_ITEM_LIST_LENGTH"], with_valid=True)
    user_file_id = np.array([int(t) for t in dataset.id2token("user_id", range(1, dataset.user_num))])
    vectors = model.user_vectors(sequences)[1:]
    expected = torch.from_numpy(z["out/group_user_emb"])[user_file_id]
    evaluated = expected.abs().sum(1) > 0
    assert_close(vectors[evaluated], expected[evaluated], **VALUES)


@pytest.mark.parametrize("path", golden_params("perpeft"))
def test_golden_groups_pools_batches_and_metrics(path, tmp_path, monkeypatch):
    """With the file's labels as groups: the negative pools, the number of batches and the sums per group."""
    z = load_golden(path)
    labels = torch.from_numpy(z["group/labels"])
    n_groups = int(labels.max()) + 1
    config, dataset, (train_data, valid_data, test_data), model, original = golden_run(
        z, tmp_path, monkeypatch, peft_scope="personalized", n_groups=n_groups, global_epochs=1
    )
    file_user = np.array([0] + [int(t) for t in dataset.id2token("user_id", range(1, dataset.user_num))])
    model.user_group.copy_(labels[file_user])
    model.grouped.fill_(True)
    sampler = GroupSampler(model.pairs, model.n_users, model.n_items, model.user_group)
    members = torch.arange(1, model.n_users)
    for group in range(n_groups):
        assert sorted(original[sampler.pools[group]._id[1:] - 1].tolist()) == z[f"group/{group}/neg_pool"].tolist()
        inside = members[model.user_group[members] == group]
        assert len(inside) == int(z[f"group/{group}/n_users"])
        assert len(GroupBatches(inside, model.user_group, 4, "user_id")) == int(z[f"group/{group}/n_batches_bs4"])
    trainer = PerPEFTTrainer(config, model)
    for phase, loader in (("valid", valid_data), ("test", test_data)):
        trainer.evaluate(loader, load_best_model=False)
        values = trainer.last_evaluation.per_user
        group = model.user_group[loader._dataset.inter_feat["user_id"]].numpy()
        names = [f"ndcg@{k}" for k in (10, 20, 30)] + [f"hit@{k}" for k in (10, 20, 30)]
        for g in range(n_groups):
            if int(z[f"group/{g}/n_items"]) != int(z["n_items"]):
                continue  # the reference cuts this group's catalogue at its largest id, on purpose not followed
            sums = [float(values.values[name][group == g].sum()) for name in names]
            assert_close(torch.tensor(sums), torch.from_numpy(z[f"group/{g}/eval_{phase}_sums"]), atol=1e-4, rtol=1e-5)


def test_standardised_features_show_what_tells_items_apart():
    """Features in a narrow cone, as a contrastive encoder gives them: without the setting all items are projected to nearly one point."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(10 + torch.randn(40, 16, generator=generator), dim=1)
    encoder = FrozenEncoder(torch.cat((torch.zeros(1, 16), features)))
    spread = {}
    for standardised in (False, True):
        torch.manual_seed(0)
        network = GroupedSASRec(encoder, 41, 2, 5, 8, 1, 2, 0.0, 0.0, weight=1.0)
        if standardised:
            network.standardise()
        with torch.no_grad():
            vectors = network.project(encoder(torch.arange(1, 41), 1), 1)
        assert_close(vectors[0], network.projectors[1](torch.zeros(1, 16))[0].detach())  # padding stays the zero feature
        spread[standardised] = float((vectors[1:] - vectors[1:].mean(0)).norm(dim=1).mean())
    assert spread[True] > 3 * spread[False]
    other = GroupedSASRec(encoder, 41, 2, 5, 8, 1, 2, 0.0, 0.0, weight=1.0)
    other.standardise()
    other.centre.add_(1.0)
    other.load_state_dict(network.state_dict())  # a checkpoint brings its own mean and deviation
    assert torch.equal(other.centre, network.centre)
