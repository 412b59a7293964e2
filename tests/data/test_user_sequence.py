"""One sequence per user: who is trained on what, who is evaluated with which history."""

import pandas as pd
import pytest
import torch

from recbole_mm.config import Config
from recbole_mm.data.loader import data_preparation
from recbole_mm.data.user_sequence import UserSequenceDataset
from recbole_mm.errors import UserError

HISTORY = {"a": "123456", "b": "321", "c": "45", "d": "6", "e": "65432"}


def write(folder, **files):
    (folder / "toy").mkdir()
    for name, history in files.items():
        rows = [(user, item, time) for user, items in history.items() for time, item in items]
        table = pd.DataFrame(rows, columns=["user_id:token", "item_id:token", "timestamp:float"]).sample(frac=1, random_state=1)
        table.to_csv(folder / "toy" / f"{name}.inter", sep="\t", index=False)


def prepare(folder, **settings):
    given = {"data_path": str(folder), "use_gpu": False, "MAX_ITEM_LIST_LENGTH": 3, **settings}
    config = Config("PerPEFTSASRec", "toy", config_dict=given)
    return [loader for loader in data_preparation(config, UserSequenceDataset(config))]


def words(dataset, users, rows):
    """user -> items of each row as a string, zeros as dots."""
    names = dataset.id2token("user_id", users)
    return {name: "".join("." if i == 0 else dataset.id2token("item_id", i) for i in row) for name, row in zip(names, rows.tolist())}


def evaluated(loader):
    part = loader._dataset
    feat = part.inter_feat
    lists = words(part, feat["user_id"], feat["item_id_list"])
    targets = words(part, feat["user_id"], feat["item_id"][:, None])
    assert feat["item_length"].tolist() == [(row > 0).sum().item() for row in feat["item_id_list"]]
    return {user: (lists[user], targets[user]) for user in lists}


def test_leave_one_out(tmp_path):
    write(tmp_path, toy={user: list(enumerate(items)) for user, items in HISTORY.items()})
    train, valid, test = prepare(tmp_path)
    part = train._dataset
    users = torch.arange(1, part.user_num)
    assert words(part, users, part.user_sequences(4)[1:]) == {"a": "1234", "b": "...3", "c": "..45", "d": "...6", "e": ".654"}
    assert words(part, users, part.user_sequences(3, with_valid=True)[1:]) == {"a": "345", "b": ".32", "c": ".45", "d": "..6", "e": "543"}
    assert evaluated(valid) == {"a": ("234", "5"), "b": ("3..", "2"), "e": ("654", "3")}
    assert evaluated(test) == {"a": ("345", "6"), "b": ("32.", "1"), "e": ("543", "2")}
    assert len(part.inter_feat) == 4 + 1 + 2 + 1 + 3
    assert part.inter_matrix().nnz == len(part.inter_feat)


def test_what_comes_next_is_predicted_from_everything(tmp_path):
    write(tmp_path, toy={user: list(enumerate(items)) for user, items in HISTORY.items()})
    part = prepare(tmp_path)[0]._dataset
    users = torch.arange(1, part.user_num)
    latest = part.latest_sequences(users)
    assert words(part, users, latest["item_id_list"]) == {"a": "456", "b": "321", "c": "45.", "d": "6..", "e": "432"}
    with pytest.raises(UserError, match="no interaction"):
        part.latest_sequences([0])


def test_the_whole_history_is_masked_and_the_answer_is_not(tmp_path):
    write(tmp_path, toy={"a": list(enumerate("1234561")), "b": list(enumerate("651"))})
    _, _, test = prepare(tmp_path, mask_history=True)
    part = test._dataset
    rows, items = test.pairs("history", 0, len(part))
    names = part.id2token("user_id", part.inter_feat["user_id"])
    masked = {str(name): {str(t) for t in part.id2token("item_id", items[rows == i])} for i, name in enumerate(names)}
    assert masked == {"a": set("23456"), "b": set("65")}  # a bought 1 first and again last: it stays a candidate


def test_ready_splits(tmp_path):
    write(
        tmp_path,
        **{
            "toy.train": {"a": [(0, "1"), (1, "2")], "b": [(0, "3")]},
            "toy.valid": {"a": [(5, "3"), (6, "4")], "c": [(1, "1")]},
            "toy.test": {"a": [(9, "5")], "c": [(2, "2")]},
        },
    )
    train, valid, test = prepare(tmp_path, benchmark_filename=["train", "valid", "test"])
    part = train._dataset
    assert words(part, torch.arange(1, part.user_num), part.user_sequences(3)[1:]) == {"a": ".12", "b": "..3", "c": "..."}
    assert words(valid._dataset, [1], torch.tensor([[0]])) and len(valid._dataset) == 2  # c has no history to start from
    assert evaluated(test) == {"a": ("234", "5"), "c": ("1..", "2")}


def test_missing_times_are_explained(tmp_path):
    write(tmp_path, toy={user: list(enumerate(items)) for user, items in HISTORY.items()})
    with pytest.raises(UserError, match="load_col"):
        prepare(tmp_path, load_col={"inter": ["user_id", "item_id"]})
