"""PerPEFT-SASRec from files to result: three parts in one run, resume, checkpoints, groups, scopes."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm.config import Config
from recbole_mm.data.synthetic import make_shop, write_shop
from recbole_mm.encoder.clip import TransformersNetwork
from recbole_mm.errors import UserError
from recbole_mm.quick_start import _build_model, _prepare, load_model, run
from recbole_mm.recommend import recommend
from recbole_mm.trainer.perpeft import GroupBatches, PerPEFTTrainer
from tests.model.test_perpeft_encoder import SIZES

pytestmark = pytest.mark.filterwarnings("ignore:clip. pretrained is null")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A shop of 60 users and items with pictures, and a CLIP for it that is a folder of weights."""
    folder = tmp_path_factory.mktemp("perpeft")
    write_shop(make_shop(60, 60, 480, seed=3, reviews=False), folder / "data" / "small")
    torch.manual_seed(0)
    TransformersNetwork({"encoder_sizes": SIZES}).save(folder / "clip")
    return folder


@pytest.fixture
def settings(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "model": "PerPEFTSASRec", "dataset": "small", "data_path": str(shop / "data"), "pretrained": str(shop / "clip"),
        "use_gpu": False, "show_progress": False, "tensorboard": False, "checkpoint_seconds": 0, "encoder_precision": "fp32",
        "n_groups": 3, "epochs": 4, "global_epochs": 2, "peft_rank": 2, "MAX_ITEM_LIST_LENGTH": 5, "hidden_size": 8, "n_heads": 2,
        "n_layers": 1, "learning_rate": 0.01, "metrics": ["Hit", "NDCG"], "topk": [10, 20], "valid_metric": "NDCG@20",
        "metric_decimal_place": 9, "encoder_text_length": 8,
    }  # fmt: skip


def prepared(settings, **more):
    config = Config(config_dict={**settings, **more})
    dataset, train, valid, test = _prepare(config)
    return config, _build_model(config, train), train, valid, test


def curve(record):
    return [(e["epoch"], e["train_loss"], e["valid"]) for e in record["epochs"]]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last_epoch", [1, 2])  # the groups are made at the start of epoch 2
def test_a_resumed_run_ends_where_the_unbroken_one_does(settings, last_epoch):
    whole = run(config_dict=settings)

    def kill(epoch, score):
        if epoch == last_epoch:
            raise Killed

    with pytest.raises(Killed):
        run(config_dict={**settings, "run_name": "broken"}, callback=kill)
    resumed = run(resume="saved/broken")
    assert curve(resumed["record"]) == curve(whole["record"])
    assert resumed["test_result"] == whole["test_result"]
    first, second = (torch.load(Path(r["run_dir"]) / "best.pt", weights_only=True)["state_dict"] for r in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    groups = [(Path(r["run_dir"]) / "groups.csv").read_text() for r in (whole, resumed)]
    assert groups[0] == groups[1]


def test_a_run_keeps_its_groups_and_its_best_epoch_is_a_personalised_one(settings):
    result = run(config_dict=settings)
    assert result["record"]["best_epoch"] >= 2
    loaded = load_model(result["run_dir"])
    model = loaded.model
    with open(Path(result["run_dir"]) / "groups.csv", newline="") as file:
        stored = {row["user"]: int(row["group"]) for row in csv.DictReader(file)}
    tokens = loaded.dataset.id2token("user_id", range(1, loaded.dataset.user_num))
    assert [stored[str(token)] for token in tokens] == model.user_group[1:].tolist()
    assert sorted(set(stored.values())) == [0, 1, 2]
    again = PerPEFTTrainer(loaded.config, model).evaluate(loaded.test_data, load_best_model=False)
    assert again == result["test_result"]
    lists = recommend(loaded, topk=3)
    assert len(lists) == 3 * (loaded.dataset.user_num - 1)


def test_checkpoints_hold_what_is_learned_and_refuse_another_clip(settings, shop):
    result = run(config_dict={**settings, "epochs": 1, "peft_scope": "global"})
    state = torch.load(Path(result["run_dir"]) / "best.pt", weights_only=True)
    trained = result["record"]["parameters"]
    stored = sum(value.numel() for name, value in state["state_dict"].items() if name not in ("user_group", "grouped"))
    assert stored == trained
    with torch.random.fork_rng():
        torch.manual_seed(5)
        TransformersNetwork({"encoder_sizes": SIZES}).save(shop / "other")
    _, model, *_ = prepared(settings, peft_scope="global", pretrained=str(shop / "other"))
    model.load_state_dict(state["state_dict"])
    with pytest.raises(UserError, match="another CLIP"):
        model.load_other_parameter(state["other_parameter"])


def test_a_random_clip_is_stored_with_the_run(settings):
    result = run(config_dict={**settings, "epochs": 1, "peft_scope": "global", "pretrained": None, "encoder_sizes": SIZES})
    loaded = load_model(result["run_dir"])
    again = PerPEFTTrainer(loaded.config, loaded.model).evaluate(loaded.test_data, load_best_model=False)
    assert again == result["test_result"]


@pytest.mark.parametrize("kind", ["ia3", "iisan", "lokr"])
def test_every_kind_trains_and_its_groups_part(settings, kind):
    config, model, train, valid, _ = prepared(settings, peft_kind=kind, iisan_states=4, group_with_valid=True)
    trainer = PerPEFTTrainer(config, model)
    trainer.fit(train, valid, saved=False)
    for a, b in zip(model.network.encoder.group_parameters(0), model.network.encoder.group_parameters(1)):
        assert a.shape == b.shape and torch.isfinite(a).all()
    one, two = (torch.cat([p.flatten() for p in model.network.encoder.group_parameters(g)]) for g in (0, 1))
    assert not torch.equal(one, two)


def test_scopes(settings):
    sizes = {}
    for scope in ("none", "global", "personalized"):
        _, model, *_ = prepared(settings, peft_scope=scope)
        sizes[scope] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    projector = sum(p.numel() for p in model.network.projectors[0].parameters())
    adapter = sum(p.numel() for p in model.network.encoder.group_parameters(0))
    assert adapter == 2 * 2 * 2 * 3 * (16 + 12)  # rank x (in + out) x modules x layers x (width of both towers)
    assert sizes["global"] == sizes["none"] + adapter
    assert sizes["personalized"] == sizes["global"] + 2 * (adapter + projector)


def test_users_are_grouped_by_seed_and_everyone_has_a_group(settings):
    _, model, *_ = prepared(settings, group_min_items=5)
    model.pairs = model.pairs[model.pairs // model.n_items != 1]  # a user without training items
    first = model.assign_groups().clone()
    second = model.assign_groups()
    assert torch.equal(first, second)
    fitted = (model.pairs // model.n_items).bincount(minlength=model.n_users) >= 5
    assert not fitted[1] and first[1] == first[fitted].bincount().argmax()
    assert set(first.tolist()) <= {0, 1, 2}
    for group in (1, 2):
        assert torch.equal(model.network.projectors[group].inner.weight, model.network.projectors[0].inner.weight)
    with pytest.raises(UserError, match="n_groups"):
        model.group_min_items = 10_000
        model.assign_groups()


def test_batches_are_of_one_group_and_hold_every_user_once():
    torch.manual_seed(0)
    groups = torch.tensor([0, 2, 1, 2, 2, 0, 2, 1, 2, 2])
    batches = GroupBatches(torch.arange(1, 10), groups, 2, "user_id")
    passes = [[batch["user_id"] for batch in batches] for _ in range(2)]
    for one in passes:
        assert len(one) == len(batches) == 1 + 1 + 3
        assert torch.cat(one).sort().values.tolist() == list(range(1, 10))
        assert all(groups[batch].unique().numel() == 1 for batch in one)
    assert torch.cat(passes[0]).tolist() != torch.cat(passes[1]).tolist()


def test_group_negatives_and_global_negatives(settings):
    _, model, *_ = prepared(settings)
    model.assign_groups()
    users = model.training_users()
    members = [set(users[model.user_group[users] == g].tolist()) for g in range(3)]
    bought = {u: set((model.pairs[model.pairs // model.n_items == u] % model.n_items).tolist()) for u in users.tolist()}
    pools = [set().union(*(bought[u] for u in group)) for group in members]
    torch.manual_seed(0)
    for user, row in zip(users.tolist(), model.sample_negatives(users, 300).tolist()):
        pool = pools[int(model.user_group[user])] - bought[user]
        assert set(row) <= pool
    model.group_negatives, model._negatives = False, None
    everything = {item for row in model.sample_negatives(users, 300).tolist() for item in row}
    assert everything == set(range(1, model.n_items))
    model.negative_items, model._negatives = "train", None
    trained = {item for row in model.sample_negatives(users, 300).tolist() for item in row}
    assert trained == set().union(*bought.values()) < everything


def test_each_user_is_scored_by_the_table_of_the_own_group(settings):
    _, model, _, _, test_data = prepared(settings)
    model.assign_groups()
    with torch.no_grad():
        for group, projector in enumerate(model.network.projectors):
            projector.outer.bias += torch.randn(8) * (group + 1)
    model.eval()
    rows = test_data._dataset.inter_feat
    calls = []
    forward = model.network.encoder.items.forward
    model.network.encoder.items.forward = lambda items: calls.append(len(items)) or forward(items)
    model.before_evaluation()
    together = model.full_sort_predict(rows).view(len(rows), -1)
    assert calls == [model.n_items - 1] * 3  # the catalogue once for each group, and not again for the scores
    for row in range(len(rows)):
        table = model._table(int(model.user_group[rows["user_id"][row]]))
        alone = model.full_sort_predict(rows[row : row + 1]).view(-1)
        np.testing.assert_allclose(together[row], alone, rtol=1e-4, atol=1e-5)
        assert alone.shape == (len(table),)
    np.testing.assert_allclose(model.predict(rows), together.gather(1, rows["item_id"][:, None])[:, 0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"peft_scope": "some"}, "peft_scope"),
        ({"n_groups": 0}, "n_groups"),
        ({"global_epochs": 4}, "global_epochs"),
        ({"peft_kind": "lorra"}, "Did you mean"),
        ({"encoder_library": "open_clip"}, "transformers"),
        ({"peft_kind": "iisan", "iisan_states": 9}, "iisan_states"),
        ({"peft_arguments": {"rr": 1}}, "no argument"),
    ],
)
def test_wrong_settings_are_explained(settings, wrong, message):
    with pytest.raises(UserError, match=message):
        config, model, *_ = prepared(settings, **wrong)
        PerPEFTTrainer(config, model)


def test_attention_of_a_run_is_drawn(settings):
    from PIL import Image

    from recbole_mm.report.perpeft_analysis import main

    result = run(config_dict={**settings, "epochs": 2, "global_epochs": 1})
    main(["attention", f"--run={result['run_dir']}", "--items=2"])
    pictures = list((Path(result["run_dir"]) / "figures").glob("perpeft_attention_*.png"))
    assert len(pictures) == 2 and all(Image.open(p).size[0] > 4 * 168 for p in pictures)
    main(["parameters", f"--run={result['run_dir']}", "--kinds=lora", "--groups=3"])
    assert (Path(result["run_dir"]) / "figures" / "perpeft_parameters.png").is_file()
