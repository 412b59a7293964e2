import collections
import os
import pickle

import numpy as np
import pytest
from scipy import sparse

from recbole_mm.data.convert.pickles import read_pickle
from recbole_mm.errors import UserError


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_arrays_and_sparse_matrices_are_read(tmp_path, protocol):
    matrix = sparse.coo_matrix(([1.0, 2.0], ([0, 1], [2, 0])), shape=(2, 3))
    value = {
        "a": [1, 2.5, "x", None, True, {3}], "n": np.arange(3), "s": np.float64(2), "m": matrix, "o": collections.OrderedDict(a=1),
        "d": collections.defaultdict(int, b=2), "csr": matrix.tocsr(),
    }  # fmt: skip
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    read = read_pickle(path)
    assert read["a"] == value["a"] and read["s"] == 2 and read["o"] == {"a": 1} and read["d"] == {"b": 2}
    np.testing.assert_array_equal(read["n"], value["n"])
    np.testing.assert_array_equal(read["m"].toarray(), matrix.toarray())
    np.testing.assert_array_equal(read["csr"].toarray(), matrix.toarray())


def test_module_names_of_older_numpy_and_scipy_are_read(tmp_path):
    new = pickle.dumps((np.arange(3), sparse.coo_matrix(np.eye(2))), 2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(b"scipy.sparse._coo", b"scipy.sparse.coo")
    assert old != new
    path = tmp_path / "old.pkl"
    path.write_bytes(old)
    array, matrix = read_pickle(path)
    assert list(array) == [0, 1, 2] and matrix.nnz == 2


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        Evil(os.system, "touch /tmp/owned"),
        Evil(eval, "1"),
        Evil(getattr, 1, "real"),
        Evil(__import__, "os"),
        Evil(np.load, "x"),
        UserError("x"),
    ],
    ids=["system", "eval", "getattr", "import", "np.load", "a class of ours"],
)
def test_anything_else_is_refused_before_it_runs(tmp_path, payload):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"trnMat": payload}))
    with pytest.raises(UserError, match="refused: it asks for"):
        read_pickle(path)


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.")
    with pytest.raises(UserError, match="refused"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(list(range(100)))[:-20]])
def test_what_is_no_whole_pickle_is_named(tmp_path, content):
    path = tmp_path / "cut.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected a whole pickle file"):
        read_pickle(path)
