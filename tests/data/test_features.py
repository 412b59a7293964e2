"""Feature files: alignment by item token, and every way in which they can be wrong."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_mm.data.features import (
    align,
    feature_files,
    fingerprint,
    load_feature_set,
    open_table,
    read_ids,
    set_folder,
    write_feature_set,
)
from recbole_mm.errors import UserError

TOKENS = ["[PAD]", "c", "a", "b"]
TABLE = np.array([[1, 10], [2, 20], [3, 30]], np.float32)  # rows of a, b, c


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "visual.npy", TABLE)
    (tmp_path / "item_ids.txt").write_text("a\nb\nc\n", encoding="utf-8")
    return tmp_path


def test_rows_go_where_their_tokens_are(folder):
    table = load_feature_set(folder, TOKENS)["visual"]
    assert table.tolist() == [[0, 0], [3, 30], [1, 10], [2, 20]] and table.dtype == np.float32


@given(st.permutations(list("abcdefgh")), st.permutations(list("abcdefgh")), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_alignment_is_by_token_whatever_the_orders(file_order, dataset_order, present):
    """The value of each row is its token: every item gets its own row, the padding zero, the missing ones the mean."""
    ids = file_order[: present + 1]
    table = np.array([[ord(token)] for token in ids], np.float32)
    aligned = align(table, ids, ["[PAD]", *dataset_order])
    assert aligned[0] == 0
    for token, row in zip(dataset_order, aligned[1:]):
        assert row == pytest.approx(ord(token) if token in ids else np.mean([ord(t) for t in ids]))


def test_standard_modalities_come_first_and_mmrec_names_are_understood(tmp_path):
    for name in ("zebra", "text_feat", "image_feat", "acoustic"):
        np.save(tmp_path / f"{name}.npy", TABLE)
    assert list(feature_files(tmp_path)) == ["textual", "visual", "acoustic", "zebra"]
    loaded = load_feature_set(tmp_path, ["[PAD]", "2", "0", "1"], ["acoustic", "visual"])
    assert list(loaded) == ["acoustic", "visual"]
    assert loaded["visual"][:, 0].tolist() == [0, 3, 1, 2], "without item_ids.txt row r is the item called r"


def test_names_that_are_no_numbers_need_item_ids(folder):
    (folder / "item_ids.txt").unlink()
    with pytest.raises(UserError, match="has no item_ids.txt"):
        load_feature_set(folder, TOKENS)


def test_float16_is_read_memory_mapped(tmp_path):
    np.save(tmp_path / "visual.npy", TABLE.astype(np.float16))
    assert isinstance(open_table(tmp_path / "visual.npy"), np.memmap)
    assert load_feature_set(tmp_path, ["[PAD]", "0", "1", "2"])["visual"].dtype == np.float32


@pytest.mark.parametrize("missing, expected", [("zero", [0, 0]), ("mean", [1.5, 15])])
def test_missing_rows(folder, missing, expected, caplog):
    (folder / "item_ids.txt").write_text("a\nb\nx\n", encoding="utf-8")
    np.save(folder / "visual.npy", TABLE)
    with caplog.at_level("WARNING"):
        table = load_feature_set(folder, TOKENS, missing=missing)["visual"]
    assert table[1].tolist() == expected
    assert "1 of 3 items have no row (e.g. 'c')" in caplog.text


def test_missing_rows_may_be_an_error(folder):
    (folder / "item_ids.txt").write_text("a\nb\nx\n", encoding="utf-8")
    with pytest.raises(UserError, match="1 of 3 items have no row, e.g. 'c'.*missing_modality"):
        load_feature_set(folder, TOKENS, missing="error")
    with pytest.raises(UserError, match="expected one of error, zero, mean"):
        load_feature_set(folder, TOKENS, missing="drop")


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda f: np.save(f / "visual.npy", TABLE[:2]), "expected 3 feature rows, .* got 2"),
        (lambda f: np.save(f / "visual.npy", np.vstack([TABLE[:1], TABLE])), "got 4.*padding row"),
        (lambda f: np.save(f / "visual.npy", np.where(TABLE == 20, np.nan, TABLE)), r"visual.npy: row 1 \(item 'b'\) holds NaN"),
        (lambda f: np.save(f / "visual.npy", np.where(TABLE == 3, np.inf, TABLE)), r"row 2 \(item 'c'\)"),
        (lambda f: np.save(f / "visual.npy", TABLE[:, 0]), "expected a matrix"),
        (lambda f: np.save(f / "visual.npy", np.array([["a"], ["b"], ["c"]])), "expected a matrix of numbers"),
        (lambda f: np.save(f / "visual.npy", np.array([[{}], [1], [2]], dtype=object), allow_pickle=True), "expected a whole .npy file"),
        (lambda f: (f / "visual.npy").write_bytes(b"\x93NUMPY garbage"), "expected a whole .npy file"),
        (lambda f: (f / "visual.npy").write_bytes((f / "visual.npy").read_bytes()[:-8]), "only a part"),
        (lambda f: (f / "visual.npy").write_bytes(b""), "0 bytes"),
        (lambda f: np.savez(open(f / "visual.npy", "wb"), TABLE), "npz archive"),
        (lambda f: np.save(f / "visual.npy", np.where(TABLE == 3, 1e300, TABLE.astype(np.float64))), r"row 2 \(item 'c'\)"),
        (lambda f: np.save(f / "visual.npy", np.where(TABLE > 9, np.nan, TABLE)), r"row 0 \(item 'a'\) .* as do 2 more rows"),
        (lambda f: np.save(f / "image_feat.npy", TABLE), "image_feat.npy and visual.npy both hold visual"),
        (lambda f: (f / "item_ids.txt").write_text("a\nb\na\n"), "'a' stands twice, in lines 1 and 3"),
        (lambda f: (f / "item_ids.txt").write_text("x\ny\nz\n"), "not one of the dataset's 3 items"),
        (lambda f: (f / "item_ids.txt").write_bytes(b"\xff\xfe"), "UTF-8"),
        (lambda f: (f / "meta.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "meta.json").write_text(json.dumps({"outputs": {"visual": {"sha256": "0"}}})), "not the file that meta.json"),
    ],
)
def test_wrong_files(folder, break_it, says):
    break_it(folder)
    with pytest.raises(UserError, match=says):
        load_feature_set(folder, TOKENS)


def test_unknown_modality(folder):
    with pytest.raises(UserError, match="Unknown modality 'visaul'. Did you mean visual"):
        load_feature_set(folder, TOKENS, ["visaul"])
    with pytest.raises(UserError, match="names one twice"):
        load_feature_set(folder, TOKENS, ["visual", "visual"])


def test_what_is_written_comes_back(tmp_path):
    write_feature_set(tmp_path, {"visual": TABLE, "smell": TABLE[:, :1]}, ["a", "b", "c"], {"encoder": "x", "missing": {"visual": ["b"]}})
    assert read_ids(tmp_path) == ["a", "b", "c"]
    loaded = load_feature_set(tmp_path, TOKENS, missing="zero")
    assert loaded["visual"][3].tolist() == [0, 0], "a row listed as missing counts as missing"
    assert loaded["smell"].ravel().tolist() == [0, 3, 1, 2]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["outputs"]["visual"]["rows"] == 3 and len(meta["outputs"]["visual"]["sha256"]) == 64
    with pytest.raises(UserError, match="expected 2 rows"):
        write_feature_set(tmp_path, {"visual": TABLE}, ["a", "b"], {})


def test_fingerprint_sees_values_names_and_order():
    first = {"a": TABLE, "b": TABLE}
    assert fingerprint(first) == fingerprint({"a": TABLE.copy(), "b": TABLE.copy()})
    others = [{"b": TABLE, "a": TABLE}, {"a": TABLE, "b": TABLE + 1}, {"a": TABLE}, {"a": TABLE, "c": TABLE}]
    assert len({fingerprint(features) for features in (first, *others)}) == 5


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 160))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_an_error_or_numbers(folder, changes, cut):
    """Whatever bytes of a file are changed or lost: a matrix of numbers comes back, or the one error that names the file."""
    np.save(folder / "visual.npy", TABLE)
    data = bytearray((folder / "visual.npy").read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (folder / "visual.npy").write_bytes(data[: len(data) - cut])
    try:
        table = open_table(folder / "visual.npy")
    except UserError as error:
        assert "visual.npy" in str(error)
    else:
        assert table.ndim == 2 and table.dtype.kind in "fiu"


def test_numbers_from_one_are_not_guessed(tmp_path):
    """Items 1 to 3 and three rows: row 0 may be item 1, and item 3 may have been filtered out."""
    np.save(tmp_path / "visual.npy", TABLE)
    for tokens in (["[PAD]", "1", "2"], ["[PAD]", "0", "01"], ["[PAD]", "0", "\u00b2"]):
        with pytest.raises(UserError, match="has no item_ids.txt"):
            load_feature_set(tmp_path, tokens)


def test_a_set_is_replaced_as_a_whole(tmp_path, monkeypatch):
    target = tmp_path / "features" / "x"
    write_feature_set(target, {"visual": TABLE, "textual": TABLE}, ["a", "b", "c"], {"try": 1})
    real = np.save

    def full_disk(path, table):
        real(path, table)
        if len(table) == 2 and "textual" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError):
        write_feature_set(target, {"visual": TABLE[:2], "textual": TABLE[:2]}, ["a", "b"], {"try": 2})
    assert read_ids(target) == ["a", "b", "c"] and len(np.load(target / "visual.npy")) == 3, "the old set is untouched"
    monkeypatch.setattr(np, "save", real)
    write_feature_set(target, {"visual": TABLE[:2]}, ["a", "b"], {"try": 2})
    assert list(feature_files(target)) == ["visual"] and read_ids(target) == ["a", "b"], "nothing is left of the old one"
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    if os.name == "posix":
        assert target.stat().st_mode & 0o777 == (tmp_path / "features").stat().st_mode & 0o777


def test_a_set_written_into_the_datasets_folder_leaves_its_files(tmp_path):
    (tmp_path / "shop.inter").write_text("x")
    write_feature_set(tmp_path, {"visual": TABLE}, ["a", "b", "c"], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["item_ids.txt", "meta.json", "shop.inter", "visual.npy"]


@pytest.mark.parametrize("token", ["", " a", "a\nb", "a\r"])
def test_tokens_that_a_line_cannot_hold(tmp_path, token):
    with pytest.raises(UserError, match="item token"):
        write_feature_set(tmp_path / "x", {"visual": TABLE[:1]}, [token], {})


def test_sets_of_a_dataset_that_cannot_be_written_go_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(("own", "readonly", "site-packages/installed")):
        data = tmp_path / name
        data.mkdir(parents=True)
        config = {"data_path": str(data), "feature_set": "x", "encoder": None, "encoder_training": "frozen"}
        if name == "readonly":
            data.chmod(0o555)
        target = set_folder(config)
        assert target.is_relative_to(data if number == 0 else tmp_path / "cache"), name
        data.chmod(0o755)
        (data / "features" / "x").mkdir(parents=True)
        np.save(data / "features" / "x" / "visual.npy", TABLE)
        assert set_folder(config) == data / "features" / "x", "what lies beside the data comes first"
