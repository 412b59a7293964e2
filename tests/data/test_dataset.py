"""RecBole's datasets with item features and contents."""

import copy
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm import run
from recbole_mm.config import Config
from recbole_mm.data.content import ItemContent
from recbole_mm.data.dataset import MultimodalDataset, MultimodalSequentialDataset
from recbole_mm.data.features import write_feature_set
from recbole_mm.errors import UserError
from recbole_mm.quick_start import _prepare, create_dataset
from tests.support import DATA, needs_data


def build(settings, model="VBPR", **more):
    return create_dataset(Config(model, config_dict={**settings, **more}))


def test_features_follow_recboles_ids(tastes):
    dataset = build(tastes)
    assert isinstance(dataset, MultimodalDataset) and list(dataset.features) == ["textual", "visual"]
    raw = np.load("dataset/tastes/visual.npy")
    tokens = dataset.field2id_token["item_id"]
    assert not dataset.features["visual"][0].any()
    for item in range(1, dataset.item_num):
        np.testing.assert_array_equal(dataset.features["visual"][item], raw[int(tokens[item][1:]) - 1])


def test_all_splits_share_one_copy(tastes):
    config = Config("VBPR", config_dict=tastes)
    dataset, train, valid, test = _prepare(config)
    tables = [part.features["visual"] for part in (dataset, train._dataset, valid._dataset, test._dataset)]
    assert all(table.data_ptr() == tables[0].data_ptr() for table in tables)
    assert train._dataset.content is test._dataset.content


def test_sequential_models_get_them_too(tastes):
    dataset = build(tastes, "SASRec")
    assert isinstance(dataset, MultimodalSequentialDataset) and dataset.features["textual"].shape[0] == dataset.item_num
    assert dataset.content.title(1).startswith("item number")


def test_modalities_select(tastes):
    assert list(build(tastes, modalities=["visual"]).features) == ["visual"]
    with pytest.raises(UserError, match="Unknown modality 'acoustic'"):
        _ = build(tastes, modalities=["acoustic"]).features


def test_a_model_of_features_without_features(tastes):
    for path in [*Path("dataset/tastes").glob("*.npy"), Path("dataset/tastes/tastes.item")]:
        path.unlink()  # with the texts of the .item file there, features would be made from them
    with pytest.raises(UserError, match="VBPR needs item features.*extract"):
        run("VBPR", config_dict=tastes)
    with pytest.raises(UserError, match="visual asked for, but .* has no feature files"):
        run("VBPR", config_dict={**tastes, "modalities": ["visual"]})
    assert run("BPR", config_dict={**tastes, "epochs": 1})["test_result"], "others run all the same"


def test_missing_feature_set(tastes):
    with pytest.raises(UserError, match="no feature set .*features/mine.*recbole-mm extract"):
        run("VBPR", config_dict={**tastes, "feature_set": "mine"})
    with pytest.raises(UserError, match="expected the name of a folder"):
        run("VBPR", config_dict={**tastes, "feature_set": "../mine"})


@pytest.mark.parametrize(
    "settings, says", [({"benchmark_filename": ["train", "valid", "test"]}, "needs tastes.train.inter"), ({}, "needs tastes.inter")]
)
def test_missing_interactions(tastes, settings, says):
    Path("dataset/tastes/tastes.inter").rename("dataset/tastes/other.inter")
    with pytest.raises(UserError, match=says):
        build(tastes, **settings)


def test_a_filter_that_leaves_nothing(tastes):
    with pytest.raises(UserError, match="tastes.*Some feat is empty, please check the filtering"):
        build(tastes, user_inter_num_interval="[1000,inf)", item_inter_num_interval="[0,inf)")


def test_content_for_recboles_own_datasets(tastes):
    from recbole.data.dataset import Dataset

    config = Config("BPR", config_dict=tastes)
    assert ItemContent.from_config(config, Dataset(config)).title(3).startswith("item number")


def test_pickled_datasets_are_not_read(tastes):
    for key in ("save_dataset", "dataset_save_path"):
        with pytest.raises(UserError, match="reading a pickle runs code"):
            build(tastes, **{key: True if key == "save_dataset" else "x.pth"})


@needs_data("tiktok")
def test_tiktok_comes_by_name():
    config = Config("VBPR", "tiktok", config_dict={"data_path": str(DATA), "use_gpu": False})
    dataset, train, valid, test = _prepare(config)
    assert (dataset.user_num - 1, dataset.item_num - 1, dataset.inter_num) == (9308, 6710, 59541 + 3051 + 6130)
    assert [len(part._dataset.inter_feat) for part in (train, valid, test)] == [59541, 3051, 6130]
    assert {name: tuple(table.shape) for name, table in dataset.features.items()} == {"visual": (6711, 128), "acoustic": (6711, 128)}
    raw, ids = np.load(DATA / "tiktok" / "visual.npy"), (DATA / "tiktok" / "item_ids.txt").read_text().split()
    item = dataset.token2id("item_id", "885")
    torch.testing.assert_close(dataset.features["visual"][item], torch.from_numpy(raw[ids.index("885")].astype(np.float32)))


@needs_data("ml-100k-text")
def test_ml_100k_text_takes_interactions_from_recbole(tmp_path):
    shutil.copytree(DATA / "ml-100k-text", tmp_path / "ml-100k-text", ignore=shutil.ignore_patterns("features"))
    config = Config("BPR", "ml-100k-text", config_dict={"data_path": str(tmp_path), "use_gpu": False})
    dataset = create_dataset(config)
    assert dataset.inter_num == 100_000 and dataset.item_num == 1683
    star_wars = dataset.token2id("item_id", "50")
    assert dataset.content.title(star_wars).startswith("Star Wars") and "George Lucas" in dataset.content.text(star_wars)


def test_copies_do_not_copy_the_features(tastes):
    dataset = build(tastes)
    table = dataset.features["visual"]
    assert copy.deepcopy(dataset).features["visual"].data_ptr() == table.data_ptr()
    assert dataset.copy(dataset.inter_feat).features["visual"] is table
    state = pickle.dumps(dataset._shared)
    assert len(state) < 500, "a pickle holds no features"


def test_acoustic_files_beside_an_encoders_set(tastes):
    folder = Path("dataset/tastes")
    ids = (folder / "item_ids.txt").read_text().split()
    write_feature_set(folder / "features" / "mine", {"visual": np.ones((len(ids), 3), np.float32)}, ids, {})
    np.save(folder / "acoustic.npy", np.full((len(ids), 2), 7, np.float32))
    mixed = build(tastes, feature_set="mine", modalities=["acoustic", "visual"]).features
    assert list(mixed) == ["acoustic", "visual"] and mixed["visual"].shape[1] == 3 and mixed["acoustic"][1:].eq(7).all()
    assert list(build(tastes, feature_set="mine").features) == ["visual"], "only what is asked for by name"
    assert list(build(tastes, feature_set="mine", modalities=["acoustic"]).features) == ["acoustic"]
    with pytest.raises(UserError, match="Unknown modality 'smell'"):
        _ = build(tastes, feature_set="mine", modalities=["visual", "smell"]).features


def ready(rows_of_parts, columns="user_id:token\titem_id:token\ttimestamp:float"):
    """Write ready splits of the dataset ``tastes``; rows are (user, item, time)."""
    for part, rows in zip(("train", "valid", "test"), rows_of_parts):
        lines = ["\t".join(map(str, row[: columns.count("\t") + 1])) for row in rows]
        Path(f"dataset/tastes/tastes.{part}.inter").write_text("\n".join([columns, *lines]) + "\n")


def test_sequences_from_ready_splits(tastes):
    """Histories hold what was before, in time and in parts: a training row never sees a later part, whatever the times say."""
    parts = [
        [("u1", "i3", 30), ("u1", "i1", 10), ("u2", "i5", 5), ("u1", "i2", 20), ("u2", "i6", 6)],
        [("u1", "i4", 15)],  # earlier than training items 2 and 3
        [("u2", "i7", 7), ("u1", "i6", 40), ("u1", "i7", 50)],
    ]
    ready(parts)
    dataset = build(tastes, "SASRec", benchmark_filename=["train", "valid", "test"])
    found = []
    for part in dataset.build():
        rows = part.inter_feat
        names = [dataset.id2token(field, rows[field].numpy()) for field in ("user_id", "item_id")]
        histories = [
            [str(t) for t in dataset.id2token("item_id", h[:n].numpy())] for h, n in zip(rows["item_id_list"], rows["item_length"])
        ]
        times = [h[:n].tolist() for h, n in zip(rows["timestamp_list"], rows["item_length"])]
        found.append([(str(u), str(i), t, *h) for u, i, t, h in zip(*names, rows["timestamp"].tolist(), zip(histories, times))])
    assert found == [
        [("u1", "i2", 20, ["i1"], [10]), ("u1", "i3", 30, ["i1", "i2"], [10, 20]), ("u2", "i6", 6, ["i5"], [5])],
        [("u1", "i4", 15, ["i1", "i2", "i3"], [10, 20, 30])],
        [
            ("u1", "i6", 40, ["i1", "i2", "i3", "i4"], [10, 20, 30, 15]),
            ("u1", "i7", 50, ["i1", "i2", "i3", "i4", "i6"], [10, 20, 30, 15, 40]),
            ("u2", "i7", 7, ["i5", "i6"], [5, 6]),
        ],
    ]


def test_a_sequential_model_runs_on_ready_splits(tastes):
    world = Path("dataset/tastes/tastes.inter").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in world]
    last = {user: max(float(row[2]) for row in rows if row[0] == user) for user in {row[0] for row in rows}}

    def split(row):
        return 2 if float(row[2]) == last[row[0]] else 1 if float(row[2]) == last[row[0]] - 1 else 0

    ready([[row for row in rows if split(row) == part] for part in range(3)])
    common = {**tastes, "epochs": 1, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "train_neg_sample_args": None}
    from_files = run("SASRec", config_dict={**common, "benchmark_filename": ["train", "valid", "test"]})
    from_one = run("SASRec", config_dict=common)
    assert from_files["test_result"].keys() == from_one["test_result"].keys() and from_files["test_result"]["recall@5"] > 0


def test_ready_splits_without_time_are_no_sequences(tastes):
    ready([[("u1", "i1")], [("u1", "i2")], [("u1", "i3")]], "user_id:token\titem_id:token")
    with pytest.raises(UserError, match="sequential models need the time.*'timestamp'"):
        build(tastes, "SASRec", benchmark_filename=["train", "valid", "test"], load_col={"inter": ["user_id", "item_id"]})
