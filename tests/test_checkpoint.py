"""Checkpoints hold tensors and plain values, and refuse everything else."""

import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from recbole_mm import checkpoint
from recbole_mm.errors import UserError


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/recbole_mm_evil", "w"))


def test_round_trip(tmp_path):
    path = tmp_path / "a.pt"
    matrix = scipy.sparse.random(5, 7, 0.3, format="csr", random_state=0)
    state = {
        "x": torch.arange(3),
        "n": {"a": [1, 2.5, None, True, "s"], 3: (1, 2)},
        "np": np.arange(4.0),
        "sp": matrix,
        "f": np.float64(0.5),
    }
    checkpoint.save(path, state)
    back = checkpoint.load(path)
    assert torch.equal(back["x"], state["x"]) and back["n"] == state["n"] and back["f"] == 0.5
    assert np.array_equal(back["np"], state["np"]) and (back["sp"] != matrix).nnz == 0


def test_objects_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"x\.a is a .*Evil"):
        checkpoint.save(tmp_path / "a.pt", {"x": {"a": Evil()}})
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04" + b"0" * 100])
def test_foreign_files(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint of recbole_mm"):
        checkpoint.load(tmp_path / "a.pt")


def test_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="expected format"):
        checkpoint.load(path)


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"x": torch.arange(1000)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged|no checkpoint"):
        checkpoint.load(path)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(UserError, match="only a part"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_weights_of_another_shape(tmp_path):
    class Model(nn.Linear):
        def load_other_parameter(self, other): ...

    with pytest.raises(UserError, match="does not fit the model"):
        checkpoint.load_weights(Model(3, 4), {"state_dict": nn.Linear(2, 4).state_dict()}, "best.pt")


def test_random_state_covers_every_generator(tmp_path):
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), np.random.normal()

    np.random.normal()  # leaves a second normal number waiting
    checkpoint.save(tmp_path / "r.pt", {"random": checkpoint.random_state()})
    first = draw()
    checkpoint.set_random_state(checkpoint.load(tmp_path / "r.pt")["random"])
    assert draw() == first
