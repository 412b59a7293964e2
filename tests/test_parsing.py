"""Words and files to typed values; nothing is evaluated."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mm.errors import UserError
from recbole_mm.parsing import coerce, load_yaml, parse_arguments, parse_options, parse_value


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4), ("1.0e-4", 1e-4), ("-3", -3), (".5", 0.5), ("2", 2), ("1_000", 1000), ("true", True), ("False", False),
        ("None", None), ("null", None), ("[10, 20]", [10, 20]), ("['Recall','NDCG']", ["Recall", "NDCG"]), ("[1e-3]", [1e-3]),
        ("{'LS': 'valid_and_test'}", {"LS": "valid_and_test"}), ("{'RS':[0.8,0.1,0.1]}", {"RS": [0.8, 0.1, 0.1]}), ("(1, 2)", [1, 2]),
        ("a b", "a b"), ("a: b", "a: b"), ("", ""), ("[0,inf)", "[0,inf)"), ("[5,", "[5,"), ("__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("2020-01-01", "2020-01-01"), ("!!python/object/apply:os.getcwd []", "!!python/object/apply:os.getcwd []"), ("(__import__('os'))", "(__import__('os'))"),
    ],
)  # fmt: skip
def test_value(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_parser(text):
    parse_value(text)


@given(
    st.recursive(
        st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False), lambda v: st.lists(v, max_size=3), max_leaves=5
    )
)
@settings(max_examples=200, deadline=None)
def test_python_literals_come_back(value):
    assert parse_value(repr(value)) == value


def test_arguments():
    words = ["--epochs=3", "--modalities", "visual", "textual", "--flag", "--eval-mask=train", "--reg", "-1", "--x=a=b"]
    expected = {"epochs": "3", "modalities": ["visual", "textual"], "flag": True, "eval_mask": "train", "reg": "-1", "x": "a=b"}
    assert parse_arguments(words) == expected


@pytest.mark.parametrize("words, says", [(["epochs=3"], "--key=value"), (["--a=1", "--a=2"], "twice"), (["--"], "--key=value")])
def test_wrong_arguments(words, says):
    with pytest.raises(UserError, match=says):
        parse_arguments(words)


@pytest.mark.parametrize(
    "value, default, expected",
    [
        ("3", 1, 3), (3.0, 1, 3), ("1e-4", 0.1, 1e-4), (1, 0.5, 1.0), ("visual,textual", [], ["visual", "textual"]), ("visual", [], ["visual"]),
        (["1", "2"], [], [1, 2]), ("x", "y", "x"), (3, "0", "3"), ("None", 5, None), ("None", "adam", None), ("{'a': 1}", {}, {"a": 1}),
    ],
)  # fmt: skip
def test_coerce(value, default, expected):
    assert coerce("key", value, default, "a test") == expected


@pytest.mark.parametrize(
    "value, default", [("x", 1), (1.5, 1), (True, 1), ("x", 0.5), (1, True), ("x", True), ({}, []), ("x", {}), ([1], "x")]
)
def test_coerce_refuses(value, default):
    with pytest.raises(UserError, match="key: expected .* from a test"):
        coerce("key", value, default, "a test")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"a: [1", "not valid YAML"), (b"- 1\n- 2\n", "expected lines"), (b"\xff\xfe\x00", "UTF-8"), (b"a: 1\na: 2\n", "stands twice"),
        (b"3: 1\n", "expected lines"), (b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML"), (b"[" * 5000, "not valid YAML"),
    ],
)  # fmt: skip
def test_broken_yaml(tmp_path, content, says):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_yaml(tmp_path / "x.yaml")
    assert "x.yaml" in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)


def test_yaml_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1e-4\nb: None\nc: ~\nd: [1e3, 2]\n", encoding="utf-8")
    assert load_yaml(tmp_path / "x.yaml") == {"a": 1e-4, "b": None, "c": None, "d": [1e3, 2]}


def test_options():
    assert parse_options(["--topk", "5"], {"run": "", "topk": 10}, "recommend") == {"run": "", "topk": 5}
    with pytest.raises(UserError, match=r"unknown option --topq. Did you mean topk"):
        parse_options(["--topq=5"], {"topk": 10}, "recommend")
    with pytest.raises(UserError, match="needs --run"):
        parse_options([], {"run": ""}, "recommend", required=("run",))
