"""Loaders: the batches are RecBole's, the order is repeatable, masks are what the settings say."""

from collections import Counter

import pytest
import torch
from recbole.data import create_dataset
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader, TrainDataLoader, UserDataLoader
from recbole.data.utils import data_preparation as recbole_preparation
from recbole.utils import init_seed

from recbole_mm.data.loader import FullSortLoader, TrainLoader, data_preparation, loader_state, restore_loader_state
from recbole_mm.errors import UserError
from tests.data.small import small_config, write_small

WITH_FEATURES = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "color", "words"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data"))


def loaders(folder, model="BPR", prepare=data_preparation, **settings):
    config = small_config(folder, model, **settings)
    init_seed(config["seed"], True)
    return prepare(config, create_dataset(config))


def negatives(number=1, **more):
    return {"distribution": "uniform", "sample_num": number, "alpha": 1.0, "dynamic": False, "candidate_num": 0, **more}


def rows_of(batches, columns) -> Counter:
    """Multiset of the rows of all batches, restricted to `columns`."""
    return Counter(
        tuple(tuple(torch.as_tensor(v).flatten().tolist()) for v in row) for b in batches for row in zip(*(b[c] for c in columns))
    )


def used_pairs(dataset) -> set:
    return set(zip(dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["item_id"].tolist()))


def test_a_pass_holds_every_interaction_once_in_a_new_order(folder):
    train, _, _ = loaders(folder)
    first, second = list(train), list(train)
    assert len(first) == len(train) == -(-len(train.dataset) // 64)
    assert [len(b) for b in first[:-1]] == [64] * (len(first) - 1)
    everything = rows_of([train.dataset.inter_feat], ["user_id", "item_id", "timestamp"])
    assert rows_of(first, ["user_id", "item_id", "timestamp"]) == rows_of(second, ["user_id", "item_id", "timestamp"]) == everything
    assert not torch.equal(first[0]["item_id"], second[0]["item_id"])


@pytest.mark.parametrize("number", [1, 3])
def test_pairwise_batches_are_recboles_but_for_the_draw(folder, number):
    settings = {**WITH_FEATURES, "train_neg_sample_args": negatives(number), "shuffle": False}
    ours, theirs = (list(loaders(folder, prepare=p, **settings)[0]) for p in (data_preparation, recbole_preparation))
    assert [len(b) for b in ours] == [len(b) for b in theirs]
    for mine, other in zip(ours, theirs):
        assert set(mine.columns) == set(other.columns)
        for column in other.columns:
            assert mine[column].dtype == other[column].dtype and mine[column].shape == other[column].shape
            if not column.startswith("neg_"):
                assert torch.equal(mine[column], other[column])
    train = loaders(folder, **settings)[0]
    seen, feat = used_pairs(train.dataset), train.dataset.item_feat
    for batch in train:
        drawn = batch["neg_item_id"]
        assert not set(zip(batch["user_id"].tolist(), drawn.tolist())) & seen
        assert torch.equal(batch["neg_color"], feat["color"][drawn]) and torch.equal(batch["neg_words"], feat["words"][drawn])


def test_pointwise_batches_are_recboles_but_for_the_draw(folder):
    settings = {**WITH_FEATURES, "train_neg_sample_args": negatives(2), "shuffle": False}
    ours, theirs = (loaders(folder, "NeuMF", p, **settings)[0] for p in (data_preparation, recbole_preparation))
    assert isinstance(ours, TrainLoader) and ours.times == 3
    seen, feat = used_pairs(ours.dataset), ours.dataset.item_feat
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine.columns) == set(other.columns)
        assert torch.equal(mine["label"], other["label"]) and torch.equal(mine["user_id"], other["user_id"])
        right = mine["label"] == 1
        assert torch.equal(mine["item_id"][right], other["item_id"][right])
        assert torch.equal(mine["color"], feat["color"][mine["item_id"]])
        assert not set(zip(mine["user_id"][~right].tolist(), mine["item_id"][~right].tolist())) & seen


@pytest.mark.parametrize("model, loss", [("SASRec", "CE"), ("SASRec", "BPR"), ("GRU4Rec", "CE")])
def test_sequential_batches_are_recboles(folder, model, loss):
    settings = {"loss_type": loss, "train_neg_sample_args": None if loss == "CE" else negatives(1), "shuffle": False}
    ours, theirs = (loaders(folder, model, p, **settings)[0] for p in (data_preparation, recbole_preparation))
    assert isinstance(ours, TrainLoader)
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine.columns) == set(other.columns)
        assert all(torch.equal(mine[c], other[c]) for c in other.columns if not c.startswith("neg_"))
        if loss == "BPR":
            assert not bool((mine["neg_item_id"] == mine["item_id"]).any()) and mine["neg_item_id"].min() > 0
    shuffled = loaders(folder, model, **{**settings, "shuffle": True})[0]
    columns = ["user_id", "item_id", "item_id_list", "item_length"]
    assert rows_of(shuffled, columns) == rows_of(theirs, columns)


def test_a_batch_transform_runs_on_the_cpu_as_in_recbole(folder):
    train, valid, _ = loaders(folder, "BERT4Rec", train_neg_sample_args=None)
    batch = next(iter(train))
    assert {"Mask_item_id_list", "Pos_item_id", "MASK_INDEX"} <= set(batch.columns)
    assert len(batch["Mask_item_id_list"]) == len(batch["item_id"])
    assert "Mask_item_id_list" in valid.rows(0, 5).columns


class Preference:
    """Scores an item by its id, and notes the modes it is put into."""

    device = "cpu"

    def __init__(self):
        self.modes = []

    def eval(self):
        self.modes.append("eval")

    def train(self):
        self.modes.append("train")

    def predict(self, interaction):
        return interaction["item_id"].float()


@pytest.mark.parametrize("number", [1, 2])
def test_dynamic_negatives_are_those_the_model_likes_best(folder, number):
    train, _, _ = loaders(folder, train_neg_sample_args=negatives(number, dynamic=True, candidate_num=20))
    plain, _, _ = loaders(folder, train_neg_sample_args=negatives(number))
    train.get_model(model := Preference())
    batches = list(train)
    hard, easy = (torch.cat([b["neg_item_id"] for b in x]).float().mean() for x in (batches, plain))
    assert hard > 70 > 50 > easy  # the best of 20 out of 80 against the mean of all
    assert model.modes[-1] == "train" and model.modes[0] == "eval"
    seen = used_pairs(train.dataset)
    assert not any(set(zip(b["user_id"].tolist(), b["neg_item_id"].tolist())) & seen for b in batches)


def test_state_repeats_the_passes_that_follow_and_nothing_else_moves_it(folder):
    train, _, _ = loaders(folder)
    list(train)
    state = loader_state(train)
    torch.manual_seed(0)
    first = [b["neg_item_id"] for b in train]
    torch.manual_seed(99)
    restore_loader_state(train, state)
    again = [b["neg_item_id"] for b in train]
    assert all(map(torch.equal, first, again))
    other, _, _ = loaders(folder)
    restore_loader_state(other, state)
    assert all(map(torch.equal, first, [b["neg_item_id"] for b in other]))


def test_state_of_recboles_own_loader(folder):
    train, _, _ = loaders(folder, "MultiVAE", train_neg_sample_args=None)
    assert isinstance(train, UserDataLoader)
    state = loader_state(train)
    first = [b["user_id"] for b in train]
    restore_loader_state(train, state)
    assert all(map(torch.equal, first, [b["user_id"] for b in train]))


def test_blocks_of_batches_change_nothing_but_the_draw(folder, monkeypatch):
    monkeypatch.setattr("recbole_mm.data.loader._BLOCK_ROWS", 128)
    train, _, _ = loaders(folder, train_neg_sample_args=negatives(2))
    assert rows_of(train, ["user_id", "item_id"]) == Counter(
        {k: 2 * v for k, v in rows_of([train.dataset.inter_feat], ["user_id", "item_id"]).items()}
    )


def test_data_larger_than_the_limit_stay_in_host_memory(folder):
    from recbole_mm.data.sampler import storage_device

    config = small_config(folder)
    dataset = create_dataset(config)
    dataset.build()
    config["device"] = "cuda"
    assert storage_device(config, dataset).type == "cuda"
    config["device_data_mb"] = 0
    assert storage_device(config, dataset).type == "cpu"
    config["device_data_mb"], config["transform"] = None, "mask_itemseq"
    assert storage_device(config, dataset).type == "cpu"


def test_who_serves_what(folder):
    kinds = [type(x) for x in loaders(folder)]
    assert kinds == [TrainLoader, FullSortLoader, FullSortLoader]
    assert issubclass(TrainLoader, TrainDataLoader) and issubclass(FullSortLoader, FullSortEvalDataLoader)
    sampled = loaders(
        folder, eval_args={"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "user", "order": "RO", "mode": {"valid": "full", "test": "uni20"}}
    )
    assert [type(x) for x in sampled] == [TrainLoader, FullSortLoader, NegSampleEvalDataLoader]
    assert sampled[2].train_dataset is sampled[0].dataset
    assert [type(x) for x in loaders(folder, "MultiVAE", train_neg_sample_args=None)] == [UserDataLoader, FullSortLoader, FullSortLoader]


@pytest.mark.parametrize("setting", [{"save_dataloaders": True}, {"dataloaders_save_path": "x.pth"}])
def test_pickled_loaders_are_refused(folder, setting):
    with pytest.raises(UserError, match="reading a pickle runs code"):
        loaders(folder, **setting)


def masks(loader) -> dict[int, set]:
    """User id -> items that are not candidates."""
    rows = loader.row_users[loader.history_rows].tolist()
    found = {user: set() for user in loader.row_users.tolist()}
    for user, item in zip(rows, loader.history_items.tolist()):
        found[user].add(item)
    return found


@pytest.mark.parametrize("phase", [1, 2], ids=["valid", "test"])
def test_full_sort_rows_are_recboles(folder, phase):
    ours, theirs = loaders(folder)[phase], loaders(folder, prepare=recbole_preparation)[phase]
    assert ours.row_users.tolist() == theirs.uid_list.tolist() and len(ours) == len(theirs)
    for user in ours.row_users.tolist():
        for mine, other in ((ours.uid2history_item, theirs.uid2history_item), (ours.uid2positive_item, theirs.uid2positive_item)):
            assert sorted(mine[user].tolist()) == sorted(other[user].tolist())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0]["user_id"], other[0]["user_id"])
        for a, b in ((mine[1], other[1]), (mine[2:], other[2:])):
            assert set(zip(*(x.tolist() for x in a))) == set(zip(*(x.tolist() for x in b)))


def test_eval_mask_train_leaves_validation_items_in_at_test(folder):
    train, valid, test = loaders(folder, eval_mask="train")
    everything = loaders(folder)
    of_user = {user: set() for user in range(train.dataset.user_num)}
    for user, item in used_pairs(train.dataset):
        of_user[user].add(item)
    assert masks(test) == {user: of_user[user] for user in test.row_users.tolist()}
    assert masks(valid) == masks(everything[1])
    assert sum(map(len, masks(everything[2]).values())) == sum(map(len, masks(test).values())) + len(valid.dataset)


def test_repeatable_datasets_mask_nothing_unless_told(folder):
    assert not loaders(folder, repeatable=True)[2].masks_history
    assert len(loaders(folder, repeatable=True, mask_history=True)[2].history_items)
    assert not loaders(folder, mask_history=False)[2].masks_history


def test_sequential_models_mask_their_history_only_when_told(folder):
    _, _, test = loaders(folder, "SASRec", train_neg_sample_args=None)
    assert not test.masks_history and next(iter(test))[1] is None
    train, valid, test = loaders(folder, "SASRec", train_neg_sample_args=None, mask_history=True)
    for user, masked in masks(test).items():
        row = test.row_users.tolist().index(user)
        sequence = set(test.dataset.inter_feat["item_id_list"][row].tolist()) - {0}
        before = {item for part in (train, valid) for owner, item in used_pairs(part.dataset) if owner == user}
        assert masked == (sequence | before) - {int(test.dataset.inter_feat["item_id"][row])}


@pytest.mark.parametrize("setting, message", [({"eval_mask": "none"}, "eval_mask"), ({"mask_history": "yes please"}, "mask_history")])
def test_wrong_masks_are_refused(folder, setting, message):
    with pytest.raises(UserError, match=message):
        loaders(folder, **setting)
