"""MMRec, DiffMM, PerPEFT, VIP5 and RecBole's own files."""

import gzip
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from recbole_mm.data.card import describe
from recbole_mm.errors import UserError
from tests.data.convert.support import balanced, counts, pairs, rows, run

PARTS = ("train", "valid", "test")


def picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


# MMRec


@pytest.fixture
def mmrec(tmp_path):
    folder = tmp_path / "baby"
    folder.mkdir()
    lines = ["userID\titemID\trating\ttimestamp\tx_label", "0\t0\t5.0\t1\t0", "0\t1\t4.0\t2\t1", "0\t2\t4.0\t3\t2", "1\t0\t3.0\t1\t0"]
    lines += ["1\t0\t3.0\t1\t2", "1\t2\t3.0\t1\t7", "1\t2", "1\t2\tbad\t1\t0"]
    (folder / "baby.inter").write_text("\n".join(lines) + "\n")
    (folder / "i_id_mapping.csv").write_text("asin\titemID\nB00\t0\nB01\t1\nB02\t2\nB03\t3\n")
    np.save(folder / "image_feat.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    np.save(folder / "text_feat.npy", np.ones((3, 2), np.float32))
    return folder


def test_mmrec(tmp_path, mmrec):
    run("mmrec", "--src", mmrec, "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert [pairs(out / f"out.{part}.inter") for part in PARTS] == [[("0", "0"), ("1", "0")], [("0", "1")], [("0", "2")]]
    assert balanced(out, 4) and len(counts(out)["dropped"]["interactions"]) == 4
    assert {r["item_id"]: r["raw_id"] for r in rows(out / "out.item")} == {"0": "B00", "1": "B01", "2": "B02"}
    np.testing.assert_array_equal(np.load(out / "features" / "published" / "visual.npy")[2], [8, 9, 10, 11])
    assert (out / "features" / "published" / "item_ids.txt").read_text().split() == ["0", "1", "2"]
    assert describe(out)["features"]["published"]["textual"]["items"] == 3


def test_mmrec_feature_files_of_different_length(tmp_path, mmrec):
    np.save(mmrec / "text_feat.npy", np.ones((4, 2)))
    with pytest.raises(UserError, match="differ in rows"):
        run("mmrec", "--src", mmrec, "--out", tmp_path / "out")


def test_mmrec_without_labels(tmp_path, mmrec):
    (mmrec / "baby.inter").write_text("userID\titemID\n0\t1\n")
    with pytest.raises(UserError, match="x_label missing"):
        run("mmrec", "--src", mmrec, "--out", tmp_path / "out")


# DiffMM


@pytest.fixture
def diffmm(tmp_path):
    folder = tmp_path / "tiktok"
    folder.mkdir()
    for name, entries in (("trn", [(0, 0), (1, 2)]), ("val", [(0, 1)]), ("tst", [(0, 2), (0, 0)])):
        users, items = zip(*entries)
        matrix = sparse.coo_matrix((np.ones(len(entries)), (users, items)), shape=(2, 4))
        (folder / f"{name}Mat.pkl").write_bytes(pickle.dumps(matrix))
    np.save(folder / "audio_feat.npy", np.ones((4, 3)))
    return folder


def test_diffmm(tmp_path, diffmm):
    run("diffmm", "--src", diffmm, "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert [pairs(out / f"out.{part}.inter") for part in PARTS] == [[("0", "0"), ("1", "2")], [("0", "1")], [("0", "2")]]
    assert counts(out)["dropped"]["interactions"] == {"test: the same user and item again": 1} and balanced(out, 4)
    assert np.load(out / "features" / "published" / "acoustic.npy").shape == (4, 3)


def test_diffmm_refuses_another_pickle(tmp_path, diffmm):
    (diffmm / "trnMat.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="refused: it asks for os.system"):
        run("diffmm", "--src", diffmm, "--out", tmp_path / "out")
    (diffmm / "trnMat.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="expected a scipy sparse matrix"):
        run("diffmm", "--src", diffmm, "--out", tmp_path / "out")
    damaged = sparse.coo_matrix(np.eye(3))
    damaged.coords = (np.array([0, 1, 99]), np.array([0, 1, 2]))
    (diffmm / "trnMat.pkl").write_bytes(pickle.dumps(damaged))
    with pytest.raises(UserError, match="damaged"):
        run("diffmm", "--src", diffmm, "--out", tmp_path / "out")


# PerPEFT


@pytest.fixture
def perpeft(tmp_path):
    folder = tmp_path / "arts"
    folder.mkdir()
    (folder / "arts_final.txt").write_text("1 2\n1 1\n2 3\n2 3\n2 9\nx y\n")
    (folder / "arts_item2id_final.pickle").write_bytes(pickle.dumps({1: "B1", 2: "B2", 3: "B3", 4: "B4"}))
    (folder / "arts_texts_final.pickle").write_bytes(pickle.dumps({"B1": "Paint\tbrush", "B2": "Ink"}))
    picture(folder / "arts_images" / "B2.jpg")
    return folder


def test_perpeft(tmp_path, perpeft):
    run("perpeft", "--src", perpeft, "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert [tuple(r.values()) for r in rows(out / "out.inter")] == [("1", "B2", "0"), ("1", "B1", "1"), ("2", "B3", "0")]
    assert {r["item_id"]: r["title"] for r in rows(out / "out.item")} == {"B2": "Ink", "B1": "Paint brush", "B3": ""}
    dropped = counts(out)["dropped"]
    assert len(dropped["interactions"]) == 3 and balanced(out, 3)
    assert dropped["pictures"] == {"item without a picture file": 2} and dropped["items"] == {"item without interactions": 1}
    assert [p.name for p in (out / "images").iterdir()] == ["B2.jpg"]


def test_perpeft_item_keys_must_be_names(tmp_path, perpeft):
    (perpeft / "arts_item2id_final.pickle").write_bytes(pickle.dumps({1: "B\n1"}))
    with pytest.raises(UserError, match="item key"):
        run("perpeft", "--src", perpeft, "--out", tmp_path / "out")


# VIP5


@pytest.fixture
def vip5(tmp_path):
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "sequential_data.txt").write_text("1 1 2 3\n2 2 1 9 2\n2 1\n")
    maps = {"user2id": {"A1": "1", "A2": "2"}, "item2id": {"B1": "1", "B2": "2", "B3": "3"}, "id2item": {"1": "B1", "2": "B2", "3": "B3"}}
    (folder / "datamaps.json").write_text(json.dumps(maps))
    record = {"reviewerID": "A1", "asin": "B2", "overall": 4.0, "summary": "Nice", "explanation": "the wheels turn", "feature": "wheels"}
    others = [{**record, "asin": "B9"}, {**record, "reviewerID": "A2", "asin": "B3"}]
    (folder / "exp_splits.pkl").write_bytes(pickle.dumps({"train": [record, *others], "val": [], "test": [{**record, "asin": "B3"}]}))
    everything = [{"reviewerID": u, "asin": i, "overall": 3.0} for u in ("A1", "A2") for i in ("B1", "B2", "B3")]
    (folder / "review_splits.pkl").write_bytes(pickle.dumps({"train": everything, "val": [], "test": []}))
    (folder / "user_id2name.pkl").write_bytes(pickle.dumps({"1": "Ann", "2": "A2", "7": "Nobody"}))
    with gzip.open(folder / "meta.json.gz", "wt") as stream:
        stream.write(repr({"asin": "B1", "title": "Car"}) + "\n" + repr({"asin": "B8", "title": "x"}) + "\n" + "exit()\n")
    (folder / "item2img_dict.pkl").write_bytes(pickle.dumps({"B1": "pics/one.jpg"}))
    picture(folder / "images" / "one.jpg")
    features = tmp_path / "vitb32"
    features.mkdir()
    for key, value in (("B1", 1.0), ("B3", 3.0)):
        np.save(features / f"{key}.npy", np.full((1, 4), value, np.float32))
    return folder


def test_vip5(tmp_path, vip5):
    run("vip5", "--src", vip5, "--out", tmp_path / "out", "--features", tmp_path / "vitb32", "--pictures", vip5 / "images")
    out = tmp_path / "out"
    read = {(r["user_id"], r["item_id"]): r for r in rows(out / "out.inter")}
    assert list(read) == [("1", "1"), ("1", "2"), ("1", "3"), ("2", "2"), ("2", "1")]
    assert read["1", "2"] | {"timestamp": "1"} == {
        "user_id": "1", "item_id": "2", "timestamp": "1", "rating": "4", "feature_word": "wheels", "summary": "Nice",
        "review": "the wheels turn", "review_split": "train",
    }  # fmt: skip
    assert read["1", "3"]["review_split"] == "test" and read["1", "1"]["rating"] == "3" and read["1", "1"]["review"] == ""
    assert {r["user_id"]: r["name"] for r in rows(out / "out.user")} == {"1": "Ann", "2": "A2"}
    assert {r["item_id"]: (r["raw_id"], r["title"]) for r in rows(out / "out.item")} == {
        "1": ("B1", "Car"),
        "2": ("B2", ""),
        "3": ("B3", ""),
    }
    np.testing.assert_array_equal(np.load(out / "features" / "vip5" / "visual.npy"), [[1] * 4, [3] * 4])
    assert (out / "features" / "vip5" / "item_ids.txt").read_text().split() == ["1", "3"]
    assert [p.name for p in (out / "images").iterdir()] == ["1.jpg"]
    dropped = counts(out)["dropped"]
    assert dropped["interactions"] == {
        "an item that datamaps.json does not have": 1, "the same user and item again": 1, "a second line of the same user": 1,
    }  # fmt: skip
    assert balanced(out, 5)
    assert dropped["reviews"]["exp_splits.pkl: no record of a known user and item"] == 1
    assert dropped["reviews"]["review of a pair that is not in sequential_data.txt"] == 1


def test_vip5_sequences_alone_are_enough(tmp_path, vip5):
    for name in ("exp_splits.pkl", "review_splits.pkl", "user_id2name.pkl", "meta.json.gz"):
        (vip5 / name).unlink()
    run("vip5", "--src", vip5, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "out.inter").read_text().splitlines()[0] == "user_id:token\titem_id:token\ttimestamp:float"
    assert len(counts(tmp_path / "out")["notes"]) >= 4


# RecBole


@pytest.fixture
def atomic(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    lines = [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        "a\tx\t5\t1",
        "a\ty\t4\t2",
        "b\tx\tnan\t3",
        "b\ty\t1",
        "b\ty\t2\t4",
    ]
    (folder / "src.inter").write_text("\n".join(lines) + "\n")
    (folder / "src.item").write_text("item_id:token\ttitle:token_seq\tyear:float\nx\tA tall hat\t1999\ny\tB\tsoon\nz\tC\t1\nx\tD\t2\n")
    picture(tmp_path / "pics" / "x.png")
    return folder


def test_recbole_files_with_pictures(tmp_path, atomic):
    run("recbole", "--src", atomic, "--out", tmp_path / "out", "--pictures", tmp_path / "pics")
    out = tmp_path / "out"
    assert [tuple(r.values()) for r in rows(out / "out.inter")] == [("a", "x", "5", "1"), ("a", "y", "4", "2"), ("b", "y", "2", "4")]
    assert balanced(out, 3)
    assert rows(out / "out.item") == [{"item_id": "x", "title": "A tall hat", "year": "1999"}]
    assert len(counts(out)["dropped"]["items"]) == 3 and (out / "images" / "x.png").is_file()


def test_recbole_files_need_types(tmp_path, atomic):
    (atomic / "src.inter").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(UserError, match="fields name:type"):
        run("recbole", "--src", atomic, "--out", tmp_path / "out")


def test_text_that_is_not_utf8_is_named(tmp_path, atomic):
    (atomic / "src.inter").write_bytes("user_id:token\titem_id:token\nä\tx\n".encode("latin1"))
    with pytest.raises(UserError, match="expected UTF-8 text"):
        run("recbole", "--src", atomic, "--out", tmp_path / "out")


def test_a_converted_dataset_trains_with_the_settings_it_brought(tmp_path, monkeypatch):
    """Config reads the dataset's own file: the split and the feature set need no flag."""
    from recbole_mm.config import Config

    folder = tmp_path / "baby"
    folder.mkdir()
    (folder / "baby.inter").write_text("userID\titemID\tx_label\n" + "".join(f"{u}\t{i}\t{i % 3}\n" for u in range(4) for i in range(6)))
    np.save(folder / "image_feat.npy", np.ones((6, 4), np.float32))
    run("mmrec", "--src", folder, "--out", tmp_path / "data" / "baby")
    config = Config("VBPR", "baby", config_dict={"data_path": str(tmp_path / "data")})
    assert config["benchmark_filename"] == ["train", "valid", "test"]
    assert config["feature_set"] == "published" and config["negative_items"] == "train"
    (tmp_path / "data" / "baby" / "baby.yaml").write_text("feature_sett: x\n")
    with pytest.raises(UserError, match="Unknown key 'feature_sett'.*baby.yaml.*Did you mean feature_set"):
        Config("VBPR", "baby", config_dict={"data_path": str(tmp_path / "data")})
