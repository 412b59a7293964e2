"""Search spaces in RecBole's text format and in YAML."""

import math

import optuna
import pytest

from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir
from recbole_mm.tuning.space import Parameter, grid_points, read_space


def write(tmp_path, text, name="x.hyper"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_recboles_format(tmp_path):
    space = read_space(
        write(
            tmp_path,
            "# a comment\nlr loguniform -8,0\nlayers quniform 1,4,1\n\ndrop uniform 0.1,0.9\nsizes choice ['[64, 64]', '[32]']\nreg choice [1e-4,0.1]\n",
        )
    )
    lr, layers, drop, sizes, reg = space
    assert lr.log and lr.low == math.exp(-8) and lr.high == 1.0
    assert layers.grid() == [1, 2, 3, 4] and layers.whole and (drop.low, drop.high) == (0.1, 0.9)
    assert sizes.choices == ([64, 64], [32]) and reg.choices == (1e-4, 0.1)


def test_yaml(tmp_path):
    space = read_space(
        write(tmp_path, "lr: {type: float, low: 1e-6, high: 1e-2, scale: log}\nn: {type: int, low: 1, high: 3}\nk: [5, 10]\n", "x.yaml")
    )
    assert space == [
        Parameter("lr", low=1e-6, high=1e-2, log=True),
        Parameter("n", low=1, high=3, whole=True),
        Parameter("k", choices=(5, 10)),
    ]


def test_grid_and_draws():
    space = [Parameter("a", choices=(1, 2)), Parameter("b", choices=([64, 64], [32])), Parameter("c", low=0, high=0.5, step=0.25)]
    points = list(grid_points(space))
    assert len(points) == 12 and points[0] == {"a": 1, "b": [64, 64], "c": 0} and points[-1] == {"a": 2, "b": [32], "c": 0.5}
    study = optuna.create_study()
    drawn = [p.suggest(study.ask()) for p in (space[1],) for _ in range(8)]
    assert {tuple(v) for v in drawn} <= {(64, 64), (32,)}
    with pytest.raises(UserError, match="continuous"):
        Parameter("x", low=0, high=1).grid()


@pytest.mark.parametrize(
    "text, name, says",
    [
        ("lr choise [1]", "x.hyper", "line 1: unknown kind 'choise'. Did you mean choice"),
        ("lr choice", "x.hyper", "line 1: expected `name kind values`"),
        ("\nlr choice 5", "x.hyper", "line 2: choice expects a list"),
        ("lr uniform 1", "x.hyper", "expects low,high"),
        ("lr uniform 2,1", "x.hyper", "low < high"),
        ("lr uniform a,b", "x.hyper", "low < high"),
        ("lr quniform 1,2,-1", "x.hyper", "step must be above 0"),
        ("", "x.hyper", "at least one parameter"),
        ("a choice [1]\na choice [2]", "x.hyper", "stands twice"),
        ("lr: {type: flaot}", "x.yaml", "expected {type"),
        ("lr: {type: float, low: 1, hgih: 2}", "x.yaml", "Did you mean high"),
        ("lr: {type: float, low: 0, high: 1, scale: log}", "x.yaml", "log needs low above 0"),
        ("lr: {type: categorical}", "x.yaml", "list under choices"),
    ],
)
def test_wrong_spaces(tmp_path, text, name, says):
    with pytest.raises(UserError, match=says) as caught:
        read_space(write(tmp_path, text, name))
    assert name in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_space(tmp_path / "none.hyper")


def test_every_shipped_space_can_be_read_and_names_known_keys():
    from recbole_mm.config import is_known

    files = sorted((properties_dir() / "tuning").glob("*.*"))
    assert files
    for file in files:
        for parameter in read_space(file):
            assert is_known(parameter.name), f"{file.name}: {parameter.name}"
