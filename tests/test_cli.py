"""The command line, in-process: what it prints, what it leaves, how it says no."""

import json
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import pytest

from recbole_mm import cli


@pytest.fixture
def words(tastes):
    return [f"--{key}={value}" for key, value in tastes.items()]


def test_train_prints_a_table_and_says_where_everything_is(words, capsys):
    assert cli.main(["--model=VBPR", *words]) == 0
    out = capsys.readouterr().out
    assert "VBPR on tastes (textual, visual), seed 2020" in out
    assert "recall@5" in out and "test, cold items" in out
    run_dir = Path(out.rstrip().rsplit(" ", 1)[-1])
    assert {"best.pt", "last.pt", "result.json", "settings.yaml", "per_user.npz", "run.log"} <= {p.name for p in run_dir.iterdir()}


def test_both_forms_and_the_word_train_are_the_same(words, capsys):
    assert cli.main(["train", "--model", "BPR", *[part for word in words for part in word.split("=", 1)]]) == 0
    assert "BPR on tastes (no item features)" in capsys.readouterr().out


def test_config_files(words, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: BPR\nseed: 5\n", encoding="utf-8")
    assert cli.main([*words, "--config_files", "mine.yaml"]) == 0
    assert "BPR on tastes (no item features), seed 5" in capsys.readouterr().out


def test_resume(words, capsys):
    assert cli.main(["--model=BPR", *words, "--run_name=a"]) == 0
    first = json.loads(Path("saved/a/result.json").read_text())
    assert cli.main(["--resume=saved/a"]) == 0
    assert json.loads(Path("saved/a/result.json").read_text())["test"] == first["test"]
    assert cli.main(["--resume=saved/a", "--epochs=9"]) == 2
    assert "its own settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--modle=VBPR"], "Unknown key 'modle'"),
        (["--model=VBRP"], "Did you mean VBPR"),
        (["--dataset=shpo"], "Unknown dataset 'shpo'"),
        (["--epochs=three"], "whole number"),
        (["trian"], "Unknown command 'trian'. Did you mean train"),
        (["--config_files=none.yaml"], "none.yaml does not exist"),
        (["--resume=nowhere"], "no run directory"),
        (["--resume"], "needs the run directory"),
        (["--list=modles"], "models, datasets or encoders"),
        (["recommend"], "needs --run"),
        (["recommend", "--ruin=x"], "unknown option --ruin. Did you mean run"),
        (["recommend", "--run=nowhere"], "no run directory"),
    ],
)
def test_wrong_input_is_one_paragraph_and_exit_code_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "saved").exists(), "nothing is left of a run that never began"


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["--debug", "--model=VBRP"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train", "--help"]])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS) and "--resume" in out


def test_every_command_helps(capsys):
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0, command
        assert len(capsys.readouterr().out) > 20, command


def test_lists(capsys):
    for kind, expected in (
        ("models", ["VBPR", "LATTICE", "LightGCN", "SASRec"]),
        ("datasets", ["shop", "tiktok", "ml-100k"]),
        ("encoders", ["classic", "clip"]),
    ):
        assert cli.main(["--list", kind]) == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert set(expected) <= set(names)
        assert cli.main([f"--list={kind}"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize("model", ["VBPR", "BPR", "SASRec"])
def test_recommend(words, capsys, model):
    small = ["--hidden_size=8", "--inner_size=8", "--MAX_ITEM_LIST_LENGTH=10"] if model == "SASRec" else []
    assert cli.main([f"--model={model}", *words, *small, "--run_name=r"]) == 0
    capsys.readouterr()
    assert cli.main(["recommend", "--run=saved/r", "--users=u1,u2", "--topk=7", "--out=top.csv"]) == 0
    table = pd.read_csv("top.csv")
    assert list(table.columns) == ["user", "rank", "item", "title", "score"]
    assert table.groupby("user")["rank"].apply(list).to_dict() == {"u1": [1, 2, 3, 4, 5, 6, 7], "u2": [1, 2, 3, 4, 5, 6, 7]}
    assert (table["title"] == "item number " + table["item"].str[1:]).all()
    inter = pd.read_csv("dataset/tastes/tastes.inter", sep="\t")
    seen = inter[inter["user_id:token"] == "u1"]["item_id:token"]
    assert not set(table[table["user"] == "u1"]["item"]) & set(seen), "the history is no recommendation"
    assert table.groupby("user")["score"].apply(lambda s: s.is_monotonic_decreasing).all()

    assert cli.main(["recommend", "--run=saved/r", "--users=u1", "--topk=1000", "--exclude_history=false", "--out=all.parquet"]) == 0
    everything = pd.read_parquet("all.parquet")
    assert set(seen) <= set(everything["item"]) and everything["item"].is_unique and len(everything) == inter["item_id:token"].nunique()
    assert cli.main(["recommend", "--run=saved/r", "--users=u1,nobody"]) == 2
    assert "Unknown user 'nobody'" in capsys.readouterr().err
    assert cli.main(["recommend", "--run=saved/r", "--out=x.xlsx"]) == 2


def test_recommend_prints_when_no_file_is_named(words, capsys):
    assert cli.main(["--model=BPR", *words, "--run_name=r"]) == 0
    capsys.readouterr()
    Path("users.txt").write_text("u3\nu4\n", encoding="utf-8")
    assert cli.main(["recommend", "--run=saved/r", "--users=users.txt", "--topk=1"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["user", "u3", "u4"]


def test_a_download_without_network_says_what_was_wanted(monkeypatch, capsys):
    def offline(arguments):
        raise URLError("Name or service not known")

    monkeypatch.setattr("recbole_mm.cli._dispatch", offline)
    assert cli.main(["--dataset=amazon-beauty"]) == 2
    assert "could be downloaded (Name or service not known)" in (err := capsys.readouterr().err) and "--data_path" in err
