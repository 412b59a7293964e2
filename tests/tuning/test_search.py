"""Searches on a dataset of a few hundred interactions."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import yaml
from optuna.trial import TrialState

import recbole_mm.tuning.search as module
from recbole_mm import cli, run
from recbole_mm.errors import UserError
from recbole_mm.tuning.search import Search, open_storage, quiet
from recbole_mm.tuning.space import Parameter

LR = Parameter("learning_rate", choices=(0.001, 0.01, 0.05))
DIM = Parameter("embedding_size", choices=(2, 4))


def search(settings, space=(LR, DIM), folder="s", **more):
    return Search("BPR", "tastes", list(space), folder, settings={**settings, "model": "BPR", "epochs": 2}, **more)


def rows(folder="s"):
    with open(Path(folder) / "trials.csv") as stream:
        return list(csv.DictReader(stream))


def test_grid_runs_every_point_once_after_the_defaults(tastes):
    s = search(tastes, strategy="grid")
    s.work()
    result = s.finish()
    table = rows()
    assert [r["kind"] for r in table] == ["defaults", *["grid"] * 6]
    assert sorted((float(r["learning_rate"]), int(r["embedding_size"])) for r in table[1:]) == [
        (lr, d) for lr in LR.choices for d in DIM.choices
    ]
    assert result["best_value"] == max(float(r["value"]) for r in table)
    assert len(list(Path("s/trials").glob("*/best.pt"))) == 1, "only the best trial keeps its weights"
    best = yaml.safe_load(Path("s/best.yaml").read_text())
    again = run(config_file_list=["s/best.yaml"])
    assert again["best_valid_score"] == pytest.approx(result["best_value"]) and best["model"] == "BPR"
    assert result["test"] == {k: pytest.approx(v) for k, v in again["record"]["test"].items()}


@pytest.mark.parametrize("bigger", [True, False])
def test_of_equal_trials_the_winner_does_not_depend_on_when_they_ran(tastes, bigger):
    """A killed trial runs again under a later number; the winner must not change with it."""
    s = search(tastes, strategy="grid")
    s.bigger = bigger

    def trial(value, number, **attrs):
        made = optuna.trial.create_trial(value=value, user_attrs=attrs)
        made.number = number
        return made

    good, bad = (2.0, 1.0) if bigger else (1.0, 2.0)
    first, second = trial(good, 9, kind="grid", point=0), trial(good, 3, kind="grid", point=1)
    assert s._winner([second, first, trial(bad, 0, kind="defaults")]) is first
    defaults = trial(good, 11, kind="defaults")
    assert s._winner([second, first, defaults]) is defaults
    assert s._winner([trial(good, 7), early := trial(good, 5)]) is early


def test_trials_know_no_test_values(tastes):
    s = search(tastes, strategy="random", trials=3)
    s.work()
    for path in Path("s/trials").glob("*/result.json"):
        assert json.loads(path.read_text())["test"] == {}
    s.finish()
    tested = [p for p in Path("s/trials").glob("*/result.json") if json.loads(p.read_text())["test"]]
    assert len(tested) == 1


def test_a_finished_search_does_nothing_more(tastes, monkeypatch):
    s = search(tastes, strategy="grid")
    s.work()
    first = s.finish()
    monkeypatch.setattr(module, "run", lambda *a, **k: pytest.fail("a trial was run again"))
    again = search(tastes, strategy="grid")
    again.work()
    assert again.finish() == first
    with pytest.raises(UserError, match="another search space"):
        search(tastes, space=[LR], strategy="grid")


@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_search_killed_while_it_wrote_its_grid_is_completed(tastes, monkeypatch, written):
    """The next start used to ask the user to remove the study."""
    real, count = optuna.Study.enqueue_trial, iter(range(100))

    def killed(study, *args, **more):
        if next(count) == written:
            raise KeyboardInterrupt
        real(study, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        search(tastes, strategy="grid")
    monkeypatch.setattr(module, "_SILENCE", 0.3)
    with pytest.raises(UserError, match="another search space"):
        search(tastes, space=[LR], strategy="grid")
    s = search(tastes, strategy="grid")
    assert len(s.study.trials) == 7
    monkeypatch.setattr(module, "run", lambda *a, **k: pytest.fail("not in this test"))
    assert len(search(tastes, strategy="grid").study.trials) == 7, "a full study is left as it is"


def test_a_grid_that_two_processes_have_written_runs_once(tastes):
    """The one that fell silent while it wrote wakes up when another one has done it."""
    s = search(tastes, space=[DIM], strategy="grid")
    s.study.enqueue_trial({}, user_attrs={"kind": "defaults"})
    for number, dim in enumerate(DIM.choices):
        s.study.enqueue_trial({DIM.name: DIM.stored(dim)}, user_attrs={"kind": "grid", "point": number})
    s.work()
    result = s.finish()
    assert result["trials"]["complete"] == 3 and result["trials"]["waiting"] == 0
    assert [r["kind"] for r in rows()] == ["defaults", "grid", "grid"]


def test_a_failed_trial_is_recorded_and_stops_nothing(tastes):
    s = search(tastes, space=[Parameter("learning_rate", choices=(0.01, -1.0))], strategy="grid")
    s.work()
    result = s.finish()
    assert result["trials"]["complete"] == 2 and "learning_rate: expected a number above 0" in result["failed"][0]["error"]


def test_what_a_killed_trial_was_writing_is_gone_in_the_end(tastes, monkeypatch):
    """Its repeat runs in another folder, so nobody else would remove it."""
    real = module.run

    def first_dies(*args, config_dict, **kwargs):
        if config_dict["run_name"] == "trial-00001":
            folder = Path(config_dict["checkpoint_dir"], "trial-00001")
            folder.mkdir(parents=True)
            for name in (".best.l9cykvo2.pt", "run.log"):
                (folder / name).write_text("half")
            raise RuntimeError("killed")
        return real(*args, config_dict=config_dict, **kwargs)

    monkeypatch.setattr(module, "run", first_dies)
    s = search(tastes, space=(LR,), strategy="grid")
    s.work()
    s.finish()
    assert [f.name for f in Path("s/trials/trial-00001").iterdir()] == ["run.log"]


def test_a_typo_stops_the_search_not_each_trial(tastes):
    with pytest.raises(UserError, match="Unknown key 'lerning_rate'"):
        search(tastes, space=[Parameter("lerning_rate", choices=(0.1,))])
    for wrong in (
        {"strategy": "gird"},
        {"pruner": "medain"},
        {"trials": 0},
        {"storage": "postgresql://nobody@127.0.0.1:1/x"},
        {"storage": "nonsense"},
    ):
        with pytest.raises(UserError):
            search(tastes, folder=f"x{len(str(wrong))}", **wrong)


def test_pruning_stops_a_trial_that_falls_behind(tastes, monkeypatch):
    class Cut(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number > 0

    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **options: Cut())
    s = search(tastes, strategy="random", trials=3)
    s.work()
    assert [t.state.name for t in s.study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert s.finish()["best_trial"] == 0


def test_the_command(tastes, capsys):
    Path("p.hyper").write_text("learning_rate loguniform -7,-3\nembedding_size choice [2,4]\n")
    words = [f"--{k}={v}" for k, v in {**tastes, "epochs": 1}.items()]
    assert cli.main(["search", "--model=BPR", "--params-file=p.hyper", "--trials=3", "--out=o", *words]) == 0
    out = capsys.readouterr().out
    assert "3 complete" in out and "o/best.yaml" in out and "recall@5" in out
    assert cli.main(["search", "--model=BPR", "--params-file=none", *words]) == 2
    assert cli.main(["search", "--model=BPR", "--params-file=p.hyper", "--trials=x", *words]) == 2
    assert "whole number" in capsys.readouterr().err


def test_what_a_new_user_types_wrong(tastes, capsys):
    """One paragraph that says what to do, exit code 2, and nothing is left behind."""
    Path("p.hyper").write_text("learning_rate choice [0.01,0.02]\n")
    Path("broken.hyper").write_text("learning_rate chioce [0.01]\n")
    Path("broken.yaml").write_text("learning_rate: {type: float, low: 1}\n")
    Path("folder").mkdir()
    words = [f"--{k}={v}" for k, v in tastes.items()]
    for own, says in (
        (["--params-flie=p.hyper"], "unknown flag --params-flie. Did you mean params-file"),
        (["--params-file=p.hyper", "--trial=3"], "Did you mean trials"),
        (["--params-file=p.hyper", "--modle=BPR"], "Did you mean model"),
        (["--params-file=p.hyper", "--model=BRP"], "Did you mean BPR"),
        (["--params-file=p.hyper", "--strategy=gird"], "Did you mean grid"),
        (["--params-file=p.hyper", "--pruner=medain"], "Did you mean median"),
        (["--params-file=p.hyper", "--jobs=0"], "--jobs: expected at least 1"),
        (["--params-file=p.hyper", "--heartbeat=0"], "--heartbeat: expected at least 1"),
        (["--params-file=p.hyper", "--search-seed=x"], "--search-seed: expected a whole number"),
        (["--params-file=p.hyper", "--out"], "--out needs one value"),
        (["--params-file=p.hyper", "--storage"], "--storage needs one value"),
        (["--params-file=p.hyper", "--storage=postgres://x"], "cannot be opened"),
        (["--params-file=p.hyper", "--learning_rate=fast"], "learning_rate"),
        (["--params-file=broken.hyper"], "Did you mean choice"),
        (["--params-file=broken.yaml"], "expected numbers low < high"),
        (["--params-file=folder"], "cannot be read"),
        (["--params-file=none"], "does not exist"),
        (["--model=SASRec"], "search needs --params-file"),
        (["p.hyper"], "Expected --key=value"),
    ):
        model = [] if any(w.startswith(("--model", "--modle")) for w in own) else ["--model=BPR"]
        assert cli.main(["search", *own, *model, *words]) == 2, own
        said = capsys.readouterr().err
        assert says in said and said.strip().count("\n") == 0, (own, said)


def worker_words(settings, storage, heartbeat=30):
    Path("p.hyper").write_text("learning_rate choice [0.001,0.003,0.01,0.03]\nembedding_size choice [2,4]\n")
    words = [f"--{k}={v}" for k, v in {**settings, "epochs": 2}.items()]
    return [
        "search",
        "--model=BPR",
        "--params-file=p.hyper",
        "--strategy=grid",
        "--out=o",
        f"--storage={storage}",
        f"--heartbeat={heartbeat}",
        *words,
    ]


def check_shared_storage(settings, storage):
    """Two processes on one storage: every grid point once, whoever ran it."""
    program = [sys.executable, "-m", "recbole_mm.cli", *worker_words(settings, storage), "--worker=true"]
    processes = [subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    assert cli.main(worker_words(settings, storage)) == 0
    points = [(r["learning_rate"], r["embedding_size"]) for r in rows("o") if r["kind"] == "grid"]
    assert len(points) == 8 == len(set(points))


def test_a_waiting_trial_is_taken_once(tmp_path):
    """Two processes read "waiting" before either writes "running": on SQLite both used to get the trial (1 of 20 in a race of two)."""
    quiet()
    url = f"sqlite:///{tmp_path / 's.db'}"
    one, other = open_storage(url), open_storage(url)
    study = optuna.create_study(storage=one)
    study.enqueue_trial({})
    number, taken = study.trials[0]._trial_id, {}
    thread = threading.Thread(target=lambda: taken.update(other=other.set_trial_state_values(number, TrialState.RUNNING)))

    @sqlalchemy.event.listens_for(one.engine, "after_cursor_execute")
    def between_reading_and_writing(connection, cursor, statement, *rest):
        if "FROM trials" in statement and not thread.ident:
            thread.start()
            thread.join(1)

    taken["one"] = one.set_trial_state_values(number, TrialState.RUNNING)
    thread.join()
    assert taken == {"one": True, "other": False}


def points_done(folder="s"):
    return sorted((r["learning_rate"], r["embedding_size"]) for r in rows(folder) if (r["kind"], r["state"]) == ("grid", "complete"))


def test_a_trial_killed_before_its_first_sign_of_life_is_put_back(tastes):
    s = search(tastes, strategy="grid", heartbeat=1)
    assert s.study.ask().number == 0  # a process takes the defaults and is killed at once
    s.work(wait=True)
    s.finish()
    assert [r["state"] for r in rows()] == ["fail", *["complete"] * 7] and [r["kind"] for r in rows()].count("defaults") == 2
    assert len(set(points_done())) == 6


def test_a_trial_that_keeps_killing_its_process_is_given_up(tastes):
    s = search(tastes, space=[LR], strategy="grid")
    s.work()
    number = s.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs={"kind": "grid"})) or 4
    for _ in range(4):
        trial = s.study.ask()
        assert trial.number == number
        number += 1
        s.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        module._retry_callback()(s.study, s.storage.get_trial(trial._trial_id))
    assert not s.study.get_trials(states=(TrialState.WAITING,))
    assert "killed, 4 times" in s.finish()["failed"][0]["error"]


def test_a_process_that_slept_drops_its_trial_and_goes_on(tastes, monkeypatch, caplog):
    caplog.set_level("INFO")  # whatever level earlier tests left
    s, real, calls = search(tastes, strategy="grid"), module.run, []

    def slow(*args, **more):
        calls.append(1)
        if len(calls) == 3:  # others take it for dead
            s.storage.set_trial_state_values(s._current, TrialState.FAIL)
            module._retry_callback()(s.study, s.storage.get_trial(s._current))
        return real(*args, **more)

    monkeypatch.setattr(module, "run", slow)
    s.work()
    s.finish()
    assert "no sign of life" in caplog.text and len(calls) == 8
    assert len(points_done()) == 6 == len(set(points_done()))


def test_an_interrupted_trial_is_put_back(tastes, monkeypatch):
    s, real, calls = search(tastes, strategy="grid"), module.run, []

    def stop(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(module, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        s.work()
    again = search(tastes, strategy="grid")
    again.work()
    again.finish()
    assert len(points_done()) == 6 == len(set(points_done()))


def test_no_more_trials_than_wanted(tastes):
    s = search(tastes, strategy="random", trials=3)
    s.work()
    s.study.optimize(s._objective, n_trials=1)  # another process saw the last place too
    assert s.finish()["trials"]["complete"] == 3 and len(rows()) == 3


def test_two_processes_share_a_sqlite_study(tastes):
    check_shared_storage(tastes, "sqlite:///o.db")


@pytest.mark.slow
def test_two_processes_share_a_postgresql_study(tastes, tmp_path):
    """A real server on loopback, started here from Debian's package (.ci/extra installs it) as the user postgres."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (.ci/extra installs it)")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (.ci/extra installs it)")
    binaries = programs[-1].parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(home, "postgres")
        as_user = {"user": "postgres"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": home, **as_user}
    subprocess.run([binaries / "initdb", "-D", home / "data", "-A", "trust", "-U", "tester", "--no-sync"], check=True, **quiet)
    server = subprocess.Popen([binaries / "postgres", "-D", home / "data", "-p", str(port), "-h", "127.0.0.1", "-k", home], **quiet)
    try:
        deadline = time.monotonic() + 60
        while (
            subprocess.run([binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], **quiet).returncode
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        check_shared_storage(tastes, f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres")
    finally:
        server.send_signal(signal.SIGINT)  # at once; a polite stop waits for the pool of this process
        server.wait(30)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_kill_9_loses_at_most_the_running_trial(tastes):
    words = worker_words(tastes, "sqlite:///o.db", heartbeat=2)
    process = subprocess.Popen([sys.executable, "-m", "recbole_mm.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(Path("o/trials").glob("*/result.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.parent.name for p in Path("o/trials").glob("*/result.json") if json.loads(p.read_text())["status"] == "finished"}
    assert done
    stamps = {name: (Path("o/trials") / name / "result.json").stat().st_mtime_ns for name in done}
    time.sleep(7)  # three heartbeats: the dead trial is put back
    assert cli.main(words) == 0
    complete = [r for r in rows("o") if r["state"] == "complete"]
    assert len({(r["kind"], r["learning_rate"], r["embedding_size"]) for r in complete}) == 9 == len(complete)
    best = json.loads(Path("o/result.json").read_text())["best_run"].rsplit("/", 1)[-1]
    assert all((Path("o/trials") / n / "result.json").stat().st_mtime_ns == t for n, t in stamps.items() if n != best), (
        "finished trials are not repeated"
    )
