"""Whatever bytes they get, the parsers and aligners give a value or a UserError; what they write, they read back."""

import copy
import io
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from recbole_mm import checkpoint
from recbole_mm.benchmark.plan import read_plan
from recbole_mm.data.checks import atomic_fields, check_lines
from recbole_mm.data.content import open_picture
from recbole_mm.data.convert.amazon import item_values, parse, picture_url, review
from recbole_mm.data.convert.core import hash_token
from recbole_mm.data.convert.output import READ_AS_MISSING, clean, number, token_problem
from recbole_mm.data.convert.pickles import read_pickle
from recbole_mm.data.features import align, load_feature_set, read_ids, write_feature_set
from recbole_mm.errors import UserError
from recbole_mm.parsing import coerce, load_yaml, parse_arguments, parse_value
from recbole_mm.tuning.space import read_space

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
#: text files with something like YAML in them: words that mean something, put together anyhow
yamlish = st.lists(
    st.sampled_from(["a", "b: 1", "\n", "  ", "- ", "[", "]", "{", "}", "&x ", "*x", "<<: ", "!!python/name:os.system ", "'", '"', "\t", "#", "|", ">", ":", "1e-3", "%", "\x00", "é"]),
    max_size=25,
).map("".join)  # fmt: skip


def or_user_error(function, *arguments):
    """The value, or None for a UserError whose text is one readable paragraph; anything else fails the test."""
    try:
        return function(*arguments)
    except UserError as error:
        assert 10 < len(str(error)) < 3000
        return None


@quick
@given(st.binary(max_size=200) | yamlish.map(lambda text: text.encode()))
@example(b"\xef\xbb\xbfa: 1")
@example(b"a: &a [*a]\n")
@example(b"? [1]\n: 2\n")
def test_any_settings_file(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    value = or_user_error(load_yaml, tmp_path / "x.yaml")
    assert value is None or all(isinstance(key, str) for key in value)


@quick
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--a", "--a=1", "--", "--a=[1", "-1", "--b_c", "--b-c=2"]), max_size=6))
def test_any_command_line(words):
    value = or_user_error(parse_arguments, words)
    assert value is None or all(isinstance(key, str) and "-" not in key for key in value)


@quick
@given(plain, st.sampled_from([1, 0.5, True, "x", [1], {"a": 1}, None]))
def test_any_value_for_any_type(value, default):
    """The value has the default's type afterwards, or there is an error."""
    got = or_user_error(coerce, "key", value, default, "a test")
    if got is not None and default is not None:
        assert isinstance(got, type(default)) and not (isinstance(got, bool) and not isinstance(default, bool))


@quick
@given(plain)
def test_a_value_written_as_json_is_read_back(value):
    """JSON is YAML: what --key='{...}' says on the command line arrives as it was meant."""
    if isinstance(value, (dict, list)) and value:
        text = json.dumps(value)
        if not any(mark in text for mark in ("\\u", "\\/", "None", "E", "e+", "e-")):
            assert parse_value(text) == value


@quick
@given(st.binary(max_size=300), st.sampled_from(["\t", ","]))
@example(b"a:token\tb:float\n1\t2\n", "\t")
@example(b"\xef\xbb\xbfa:token\n", "\t")
def test_any_atomic_file(tmp_path, content, separator):
    path = tmp_path / "x.inter"
    path.write_bytes(content)
    fields = or_user_error(atomic_fields, path, separator)
    if fields:
        rows = or_user_error(check_lines, path, len(fields), separator)
        assert rows is None or rows <= content.count(b"\n") + 1


tokens = st.text(min_size=1, max_size=8)


@quick
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=8))
@example([("a", "1"), ("a", "1.0"), ("NA", "b"), (" a", "b"), ("x\u2028y", "b"), ('"', "b")])
def test_tokens_that_are_let_through_come_back(tmp_path, pairs):
    """Every token that token_problem passes is the same token after RecBole's reader (pandas' Python engine) has had it."""
    good = [(user, item) for user, item in pairs if not token_problem(user) and not token_problem(item)]
    path = tmp_path / "x.inter"
    with open(path, "w", encoding="utf-8", newline="") as stream:
        stream.write("user_id:token\titem_id:token\n" + "".join(f"{user}\t{item}\n" for user, item in good))
    assert check_lines(path, 2) == len(good)
    table = pd.read_csv(path, delimiter="\t", dtype=str, engine="python", encoding="utf-8")
    assert list(map(tuple, table.to_numpy().tolist())) == good


@quick
@given(st.text(max_size=40) | st.lists(st.text(max_size=5), max_size=3) | st.none() | st.integers())
def test_clean_is_one_line_and_stays(value):
    text = clean(value)
    assert clean(text) == text and not set(text) & set('\t\n\r"\x00\u2028')
    text.encode("utf-8")


@quick
@given(st.floats() | st.integers() | st.text(max_size=10) | st.none() | st.sampled_from(["1e400", "nan", "0x10", "1_0", "٣", " 1 ", "-0"]))
def test_numbers_are_finite_or_none(value):
    text = number(value)
    assert text is None or np.isfinite(float(text)) and float(text) == float(value)


@quick
@given(st.binary(max_size=120))
def test_any_ids_file(tmp_path, content):
    (tmp_path / "item_ids.txt").write_bytes(content)
    ids = or_user_error(read_ids, tmp_path)
    assert ids is None or len(set(ids)) == len(ids)


@quick
@given(st.lists(tokens, min_size=1, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_a_feature_set_comes_back_by_token(tmp_path, names, draw):
    """Whatever the items are called and however the rows are ordered, each item gets its own row; or writing says why not."""
    table = np.arange(3.0 * len(names), dtype=np.float32).reshape(len(names), 3)
    order = list(range(len(names)))
    draw.shuffle(order)
    folder = tmp_path / "set"
    try:
        write_feature_set(folder, {"visual": table[order]}, [names[row] for row in order], {})
    except UserError:
        assert any(name != name.strip() or "\n" in name for name in names)
        return
    got = load_feature_set(folder, ["[PAD]", *names], None, "error")["visual"]
    np.testing.assert_array_equal(got[1:], table)
    assert not got[0].any()


@quick
@given(
    st.integers(0, 6), st.integers(1, 3), st.lists(st.sampled_from("abcdefg"), max_size=7), st.lists(st.sampled_from("abcdefgh"), max_size=7, unique=True),
    st.sampled_from(["error", "zero", "mean"]), st.sampled_from([0.0, np.nan, np.inf, 1e300]), st.integers(0, 5),
)  # fmt: skip
def test_align_gives_finite_rows_or_says_why(rows, width, ids, names, missing, bad, place):
    table = np.ones((rows, width))
    if rows:
        table[place % rows, 0] = bad
    got = or_user_error(align, table, list(dict.fromkeys(ids)), ["[PAD]", *names], missing, "x.npy") if names else None
    if got is not None:
        assert got.shape == (len(names) + 1, width) and np.isfinite(got).all() and not got[0].any()


@quick
@given(st.binary(max_size=80))
@example(b"{'a': 1}")
@example(b"[" * 5000)
@example(b"(" * 5000)
def test_any_line_of_metadata(line):
    assert parse(line) is None or isinstance(parse(line), dict)


keys = st.sampled_from("reviewerID asin overall unixReviewTime user_id parent_asin rating timestamp title text images imUrl imageURL categories category brand store price description".split())  # fmt: skip


@quick
@given(st.dictionaries(keys, plain, max_size=8))
@example({"timestamp": float("inf"), "user_id": 3})
@example({"images": [{"large": None, "thumb": 7}], "categories": [[1], None], "imageURL": []})
def test_any_record_of_reviews_and_metadata(record):
    row = review(record)
    assert isinstance(row.user, str) and isinstance(row.item, str)
    assert all(isinstance(value, str) for value in [*item_values(record), picture_url(record)])


@quick
@given(st.text(max_size=20))
def test_tokens_hash(token):
    assert 0 <= hash_token(token) < 2**64


@pytest.fixture(scope="module")
def good_files():
    """A pickle, a checkpoint and a picture to damage."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(stream, "PNG")
    return {"pickle": pickle.dumps({"a": [1, 2.5, "x"], "n": np.arange(4)}, 2), "png": stream.getvalue()}


def damaged(content: bytes, place: int, byte: int, length: int) -> bytes:
    changed = bytearray(content)
    changed[place % len(content)] = byte
    return bytes(changed)[: max(1, length % (len(content) + 1)) or len(content)]


damage = st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))


@quick
@given(damage)
def test_any_damaged_pickle(tmp_path, good_files, where):
    path = tmp_path / "x.pkl"
    path.write_bytes(damaged(good_files["pickle"], *where))
    or_user_error(read_pickle, path)


@quick
@given(damage)
def test_any_damaged_picture(tmp_path, good_files, where):
    path = tmp_path / "x.png"
    path.write_bytes(damaged(good_files["png"], *where))
    picture = or_user_error(open_picture, path)
    assert picture is None or picture.mode == "RGB"


@quick
@given(damage)
def test_any_damaged_checkpoint(tmp_path, where):
    """Never other weights: a damaged file is refused or, where the damage is in a gap, gives the same tensors."""
    path = tmp_path / "x.pt"
    state = {"state_dict": {"w": torch.arange(12.0).view(3, 4)}, "epoch": 3}
    checkpoint.save(path, state)
    path.write_bytes(damaged(path.read_bytes(), *where))
    got = or_user_error(checkpoint.load, path)
    assert got is None or got["epoch"] == 3 and torch.equal(got["state_dict"]["w"], state["state_dict"]["w"])


@quick
@given(
    st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda key: key not in ("format", "__numpy__", "__scipy__")), plain, max_size=4)
)
def test_a_checkpoint_comes_back(tmp_path, state):
    keep = copy.deepcopy(state)
    path = tmp_path / "x.pt"
    checkpoint.save(path, state)
    assert checkpoint.load(path) == keep


@quick
@given(st.dictionaries(st.sampled_from(["learning_rate", "n_layers", "x"]), plain, max_size=3))
@example({"learning_rate": {"type": "float", "low": 1, "high": 0}})
@example({"learning_rate": {"type": "float", "low": -1, "high": 1, "scale": "log"}})
@example({"learning_rate": {"type": "int", "low": "a", "high": []}})
@example({"learning_rate": []})
def test_any_search_space(tmp_path, space):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(space))
    or_user_error(read_space, path)


@quick
@given(
    st.dictionaries(
        st.sampled_from("name models datasets encoders paradigms modalities seeds metric baseline settings protocol".split()),
        plain,
        max_size=5,
    )
)
@example({"models": ["BPR"], "datasets": ["shop"], "seeds": ["a"]})
@example({"models": [["BPR"]], "datasets": [{}]})
def test_any_benchmark_file(body):
    or_user_error(read_plan, body)


def test_missing_words_are_those_of_pandas():
    """The list of words that read as missing is pandas' own."""
    from pandas._libs.parsers import STR_NA_VALUES

    assert STR_NA_VALUES == READ_AS_MISSING
