"""Benchmarks on a dataset of a few hundred interactions."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recbole_mm.benchmark.runner as runner
from recbole_mm import cli
from recbole_mm.benchmark.plan import read_plan
from recbole_mm.benchmark.tables import collect, markdown, significance
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir


@pytest.fixture
def body(tastes):
    small = {key: tastes[key] for key in ("use_gpu", "train_batch_size", "embedding_size", "learning_rate", "load_col")}
    small |= {"epochs": 2, "topk": [5], "metrics": ["Recall", "NDCG"], "valid_metric": "NDCG@5"}
    sasrec = {"hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 10}
    return {
        "name": "small",
        "models": ["BPR", "VBPR", "SASRec"],
        "datasets": ["tastes"],
        "seeds": [1, 2],
        "metric": "NDCG@5",
        "settings": small,
        "model_settings": {"SASRec": sasrec},
    }


def run(body, folder="b", **more):
    plan, lines = read_plan(body), []
    return plan, runner.run_benchmark(plan, Path(folder), 1, lines.append, **more), lines


def test_every_cell_once_and_nothing_twice(body):
    plan, failed, lines = run(body)
    assert not failed and len(plan.cells) == 6 and sum(line.startswith("finished") for line in lines) == 6
    stamps = {path: path.stat().st_mtime_ns for path in Path("b/cells").iterdir()}
    _, failed, lines = run(body)
    assert lines == ["6 cells, 6 done before, 0 to run"] and not failed
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("b/cells").iterdir()}


def test_a_changed_setting_runs_only_its_cells_again(body):
    run(body)
    body["model_settings"]["BPR"] = {"weight_decay": 0.1}
    _, _, lines = run(body)
    assert lines[0] == "6 cells, 4 done before, 2 to run" and all("BPR" in line for line in lines[1:])


def test_an_interrupted_benchmark_repeats_nothing(body, monkeypatch):
    plan, _, _ = run(body, "whole")
    real, calls = runner._run_cell, []

    def stop(cell, key, folder):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(cell.slug)
        return real(cell, key, folder)

    monkeypatch.setattr(runner, "_run_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        run(body)
    monkeypatch.setattr(runner, "_run_cell", lambda cell, key, folder: calls.append(cell.slug) or real(cell, key, folder))
    run(body)
    assert sorted(calls) == sorted(cell.slug for cell in plan.cells)
    first, second = (collect(plan, Path(f)) for f in ("whole", "b"))
    assert [row.metrics for row in first["tastes"]] == [row.metrics for row in second["tastes"]]


@pytest.mark.slow
def test_kill_9_and_restart_give_the_same_table(body):
    """The program is killed in the middle; started again it repeats nothing that was done, and every number and test is as without the kill."""
    import yaml

    Path("mine.yaml").write_text(yaml.safe_dump({**body, "models": ["BPR", "VBPR"], "seeds": [1, 2, 3]}))
    words = ["benchmark", "mine.yaml", "--jobs=1"]
    assert cli.main([*words, "--out=whole"]) == 0
    program = [sys.executable, "-m", "recbole_mm.cli", *words, "--out=b"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(Path("b/cells").glob("*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in Path("b/cells").glob("*.json")}
    assert 2 <= len(stamps) < 6
    assert cli.main([*words, "--out=b"]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    tables = []
    for folder in ("whole", "b"):
        with open(f"{folder}/table.csv") as stream:
            numbers = [[r[k] for k in ("dataset", "row", "metric", "mean", "std", "seeds", "values")] for r in csv.DictReader(stream)]
        text = Path(folder, "table.md").read_text()
        tables.append((numbers, text[text.index("Paired t-tests") :]))
    assert tables[0] == tables[1]


def test_one_protocol_makes_models_comparable_user_by_user(body):
    plan, _, _ = run(body)
    rows = collect(plan, Path("b"))["tastes"]
    comparisons = significance(rows, "NDCG@5", "BPR")
    assert [c.first for c in comparisons] == ["VBPR", "SASRec"] and all(c.users == 40 for c in comparisons)
    for row in rows:
        record = json.loads((Path(row.runs[0]) / "result.json").read_text())
        assert record["protocol"]["history_masked"] is True and record["protocol"]["eval_args"]["split"] == {"LS": "valid_and_test"}


def test_other_targets_are_refused(body):
    body["model_settings"]["VBPR"] = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "mode": "full"}}
    plan, _, _ = run(body)
    with pytest.raises(UserError, match="cannot be compared user by user"):
        significance(collect(plan, Path("b"))["tastes"], "NDCG@5", None)


def test_a_failed_cell_is_recorded_and_stops_nothing(body):
    body["model_settings"]["VBPR"] = {"topk": [5, 1000], "valid_metric": "NDCG@1000"}
    plan, failed, _ = run(body)
    assert {cell.model for cell in failed} == {"VBPR"}
    tables = collect(plan, Path("b"))
    text = markdown(tables, plan, {"tastes": significance(tables["tastes"], "NDCG@5", None)})
    assert "1000 places cannot be filled" in text and "| BPR | " in text and "**" in text


def test_parallel_cells_give_the_same_numbers(body):
    body["models"] = ["BPR", "VBPR"]
    plan, _, _ = run(body)
    assert not runner.run_benchmark(plan, Path("p"), 2, lambda line: None)
    for dataset, rows in collect(plan, Path("b")).items():
        assert [row.metrics for row in rows] == [row.metrics for row in collect(plan, Path("p"))[dataset]]


def test_features_multiply_only_models_that_use_them(body):
    body |= {"encoders": ["classic", "clip"], "modalities": [None, "visual"], "seeds": [1]}
    groups = [cell.group for cell in read_plan(body).cells]
    assert groups == ["BPR", "VBPR, classic", "VBPR, classic, visual", "VBPR, clip", "VBPR, clip, visual", "SASRec"]


def test_the_command_writes_three_tables(body, capsys):
    import yaml

    Path("mine.yaml").write_text(yaml.safe_dump({**body, "models": ["BPR", "VBPR"], "seeds": [1]}))
    assert cli.main(["benchmark", "mine.yaml", "--jobs=1", "--out=o", "--seeds=1,2"]) == 0
    assert "Paired t-tests over users" in capsys.readouterr().out
    assert "± " in Path("o/table.md").read_text() and r"\toprule" in Path("o/table.tex").read_text()
    with open("o/table.csv") as stream:
        assert {(r["row"], r["seeds"]) for r in csv.DictReader(stream)} == {("BPR", "2"), ("VBPR", "2")}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"modles": ["BPR"]}, "unknown key 'modles'. Did you mean models"),
        ({"models": ["VBRP"]}, "Did you mean VBPR"),
        ({"models": []}, "at least one entry"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"baseline": "PBR"}, "baseline: expected one of the rows"),
    ],
)
def test_wrong_plans(body, change, says):
    with pytest.raises(UserError, match=says):
        read_plan({**body, **change})


def test_wrong_commands(body, capsys):
    """What a new user types wrong: one paragraph that says what to do, and exit code 2, before anything is trained."""
    Path("broken.yaml").write_text("models: [BPR\ndatasets: {")
    Path("list.yaml").write_text("- BPR\n- VBPR\n")
    Path("blocks.yaml").write_text("models: [BPR]\ndatasets: [tastes]\nblocks: [a, b]\n")
    Path("settings.yaml").write_text("models: [BPR]\ndatasets: [tastes]\nsettings: 3\n")
    Path("search.yaml").write_text("models: [BPR]\ndatasets: [tastes]\nsearch: {trails: 3}\n")
    for words, says in (
        (["benchmark", "shpo"], "Did you mean shop"),
        (["benchmark", "shop", "--jobs=0"], "above 0"),
        (["benchmark", "shop", "--jobs=two"], "whole number above 0, got 'two'"),
        (["benchmark", "shop", "--job=2"], "unknown flag --job. Did you mean jobs"),
        (["benchmark", "shop", "--model=BPR"], "--models=BPR"),
        (["benchmark", "shop", "--models=BRP"], "Did you mean BPR"),
        (["benchmark", "shop", "--encoders=clpi"], "Did you mean clip"),
        (["benchmark", "shop", "--datasets="], "datasets: expected"),
        (["benchmark", "shop", "--seeds=one"], "seeds: expected whole numbers"),
        (["benchmark", "shop", "--paradigms=frozn"], "Did you mean frozen"),
        (["benchmark", "shop", "--metric=NDGC@10"], "Did you mean NDCG"),
        (["benchmark", "shop", "--metric=NDCG@7"], "metric"),
        (["benchmark", "shop", "--out"], "--out: expected a folder"),
        (["benchmark", "shop", "--check=perhaps"], "--check takes no value"),
        (["benchmark", "shop", "extra"], "extra"),
        (["benchmark", "broken.yaml"], "not valid YAML"),
        (["benchmark", "list.yaml"], "expected lines of the form"),
        (["benchmark", "blocks.yaml"], "blocks: expected a mapping"),
        (["benchmark", "settings.yaml"], "settings: expected a mapping"),
        (["benchmark", "search.yaml"], "search"),
        (["benchmark"], "models: expected a list"),
    ):
        assert cli.main(words) == 2, words
        said = capsys.readouterr().err
        assert says in said and said.strip().count("\n") == 0, (words, said)
    assert not Path("saved").exists()


def test_shipped_benchmarks_can_be_read():
    for path in (properties_dir() / "benchmark").glob("*.yaml"):
        assert read_plan(path).cells, path
