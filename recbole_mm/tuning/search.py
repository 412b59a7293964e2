"""Hyperparameter search: Optuna draws, our run() trains; selection on validation, the test once, for the winner.

A study lives in a storage that several processes and machines may share. Exhaustive search puts every grid point into the storage as a
waiting trial when the study is made; a process takes one in a transaction that locks it (see `_lock_before_reading`), so no point is run
twice. A trial whose process died is noticed by its missing heartbeat and put back.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import yaml
from optuna.trial import FrozenTrial, TrialState

from recbole_mm.config import Config
from recbole_mm.errors import UserError, nearest
from recbole_mm.files import clear_leftovers, write_json, write_text
from recbole_mm.quick_start import run, test_run
from recbole_mm.tuning.space import Parameter, grid_points

STRATEGIES = ("grid", "random", "tpe")
RECBOLE_NAMES = {"exhaustive": "grid", "bayes": "tpe"}  # what RecBole's HyperTuning calls them
PRUNERS = ("none", "median", "hyperband")
_HEARTBEAT = 30  # seconds
_SILENCE = 10  # seconds without a new trial after which the process that was filling a study is taken for dead
_RETRIES = 3  # of a trial whose process was killed


class Search:
    """One search.

    Args:
        model, dataset: names.
        space: what to vary.
        folder: where the study, the trials and the result go.
        strategy: grid, random or tpe.
        trials: how many, defaults included; None: the whole grid, 20 otherwise.
        pruner: none, median or hyperband; they stop a trial that falls behind on validation.
        storage: an Optuna storage URL (``sqlite:///...``, ``postgresql+psycopg://...``, ``journal:file``); None: SQLite in `folder`.
        settings: further settings of every trial.
        config_files: YAML files of every trial.
        seed: of the sampler; each trial trains with the run's own ``seed``.
        heartbeat: seconds between signs of life of a running trial.

    Raises:
        UserError: for an unknown strategy, pruner or parameter.
    """

    def __init__(
        self, model: str, dataset: str, space: list[Parameter], folder: str | Path, strategy: str = "tpe", trials: int | None = None,
        pruner: str = "median", storage: str | None = None, settings: dict[str, Any] | None = None, config_files: list[str] | None = None,
        seed: int = 0, heartbeat: int = _HEARTBEAT,
    ):  # fmt: skip
        strategy = RECBOLE_NAMES.get(strategy, strategy)
        if strategy not in STRATEGIES:
            raise UserError(f"--strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}.{nearest(strategy, STRATEGIES)}")
        if pruner not in PRUNERS:
            raise UserError(f"--pruner: expected one of {', '.join(PRUNERS)}, got {pruner!r}.{nearest(pruner, PRUNERS)}")
        for name, value in (("trials", trials), ("heartbeat", heartbeat)):
            if value is not None and value < 1:
                raise UserError(f"--{name}: expected at least 1, got {value}.")
        self.space, self.strategy, self.seed = space, strategy, seed
        self.settings, self.config_files = dict(settings or {}), config_files
        self.folder = Path(folder)
        config = self._config({})  # a typo must stop the search, not each of its trials
        self.model, self.dataset = config["model"], config["dataset"]
        self.bigger = bool(config["valid_metric_bigger"]) and config["stop_on"] == "metric"
        self.metric = config["valid_metric"] if config["stop_on"] == "metric" else "validation loss"
        self._config({p.name: (p.choices[0] if p.choices else p.low if not p.whole else int(p.low)) for p in space})
        points = list(grid_points(space)) if strategy == "grid" else None
        self.trials = trials or (len(points) + 1 if points is not None else 20)
        self.points = points
        self.heartbeat = heartbeat
        self.study = self._open(storage, pruner, heartbeat)
        self._watched = isinstance(self.storage, optuna.storages.RDBStorage)  # Optuna's journal file keeps no signs of life
        self._current: int | None = None

    def _config(self, values: dict[str, Any]) -> Config:
        return Config(config_file_list=self.config_files, config_dict={**self.settings, **values})

    def _open(self, url: str | None, pruner: str, heartbeat: int) -> optuna.Study:
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = self.storage = open_storage(url or f"sqlite:///{self.folder / 'study.db'}", heartbeat)
        sampler = optuna.samplers.TPESampler(seed=self.seed) if self.strategy == "tpe" else optuna.samplers.RandomSampler(seed=self.seed)
        made = {
            "none": optuna.pruners.NopPruner(),
            "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5),
            "hyperband": optuna.pruners.HyperbandPruner(),
        }[pruner]
        name = f"{self.model}-{self.dataset}"
        described = json.dumps([[p.name, p.grid() if p.choices else [p.low, p.high, p.step, p.log]] for p in self.space], default=str)
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, sampler=sampler, pruner=made, direction="maximize" if self.bigger else "minimize"
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=made)
            ready, attrs = _wait_until_filled(study), study.user_attrs
            if attrs.get("space", described) != described or attrs.get("strategy", self.strategy) != self.strategy:
                raise UserError(
                    f"There is a study {name} with another search space or strategy. Choose another --out or --storage, or remove it."
                ) from None
            if ready:
                return study
        self._fill(study, described)
        return study

    def _fill(self, study: optuna.Study, described: str) -> None:
        """Put the defaults and every grid point into the storage, but for those that a process which was killed meanwhile has put there."""
        there = {_place(t) for t in study.get_trials(deepcopy=False)}
        study.set_user_attr("space", described)
        study.set_user_attr("strategy", self.strategy)
        if ("defaults", None) not in there:
            study.enqueue_trial({}, user_attrs={"kind": "defaults"})
        for number, point in enumerate(self.points or ()):
            if ("grid", number) not in there:
                stored = {p.name: p.stored(point[p.name]) for p in self.space}
                study.enqueue_trial(stored, user_attrs={"kind": "grid", "point": number})
        study.set_user_attr("ready", True)

    # running

    def _counted(self) -> list[FrozenTrial]:
        """Trials that use up one of `trials`: all but those waiting, surplus, or put back because their process was killed."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING and t.user_attrs.get("kind") != "surplus" and not _died(t)]

    def _others(self) -> int:
        """How many trials run in other processes, as far as signs of life can tell; 0 for a storage without them."""
        if not self._watched:
            return 0
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def work(self, wait: bool = False) -> None:
        """Run trials until as many as wanted are done or taken by others.

        Args:
            wait: also wait for the trials of others; one whose process was killed is put back after three heartbeats and run here.
        """
        told = False
        while True:
            self._put_back()
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if (waiting or self.points is None) and len(self._counted()) < self.trials:
                self._one()
            elif wait and (others := self._others()):
                if not told:
                    say = f"Waiting for {others} trials of other processes; one that was killed is put back after {3 * self.heartbeat} s."
                    logging.getLogger().warning(say)
                told = True
                time.sleep(min(1.0, self.heartbeat))
            else:
                return

    def _put_back(self) -> None:
        """Put trials without signs of life back into the queue. Optuna overlooks those killed before their first one; we give it for them."""
        if not self._watched:
            return
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not running:
            return
        with self.storage.engine.connect() as connection:
            alive = {row[0] for row in connection.execute(sqlalchemy.text("SELECT trial_id FROM trial_heartbeats"))}
        for trial in running:
            if trial._trial_id not in alive:
                self.storage.record_heartbeat(trial._trial_id)
        optuna.storages.fail_stale_trials(self.study)

    def _one(self) -> None:
        """Run one trial. If this process was silent for so long that others took its trial for dead, the result is dropped: they repeat it."""
        self._current = None
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(Exception,))
        except KeyboardInterrupt:
            if self._current is not None:
                _retry_callback()(self.study, self.storage.get_trial(self._current))
            raise
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            taken = None if self._current is None else self.storage.get_trial(self._current)
            if taken is None or not taken.state.is_finished():
                raise
            logging.getLogger().warning(
                f"Trial {taken.number} gave no sign of life for {3 * self.heartbeat} s (was this machine asleep?); it was put back and will be repeated."
            )

    def _objective(self, trial: optuna.Trial) -> float:
        self._current = trial._trial_id
        kind = trial.user_attrs.get("kind")
        # two processes saw the last waiting point, or the last place, and another one has it; or two have filled the study
        late = kind is None and (self.points is not None or sum(t.number < trial.number for t in self._counted()) >= self.trials)
        if late or trial.number in _repeats(self.study.get_trials(deepcopy=False)):
            trial.set_user_attr("kind", "surplus")
            raise optuna.TrialPruned
        values = {} if kind == "defaults" else {p.name: p.suggest(trial) for p in self.space}
        trial.set_user_attr("settings", json.dumps(values))
        name = _run_name(trial)
        shutil.rmtree(self.folder / "trials" / name, ignore_errors=True)

        def report(epoch: int, score: float) -> None:
            trial.report(float(score), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        fixed = {
            "checkpoint_dir": str(self.folder / "trials"),
            "run_name": name,
            "save_last": False,
            "checkpoint_seconds": 3600,
            "tensorboard": False,
        }
        begin = time.perf_counter()
        try:
            outcome = run(config_file_list=self.config_files, config_dict={**self.settings, **values, **fixed}, callback=report, test=False)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        finally:
            trial.set_user_attr("train_s", round(time.perf_counter() - begin, 3))
        score = float(outcome["best_valid_score"])
        if math.isnan(score):
            trial.set_user_attr("error", f"{self.metric} on validation is NaN")
            raise ValueError("NaN on validation")
        trial.set_user_attr("run_dir", outcome["run_dir"])
        trial.set_user_attr("best_epoch", outcome["record"]["best_epoch"])
        self._drop_losers(trial, score)
        return score

    def _drop_losers(self, trial: optuna.Trial, score: float) -> None:
        """Keep the weights of the best trial only."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not done:
            return
        best = self._winner(done)
        better = self._rank(trial, score) < self._rank(best, best.value)
        loser = best.user_attrs.get("run_dir") if better else trial.user_attrs["run_dir"]
        if loser:
            Path(loser, "best.pt").unlink(missing_ok=True)

    # the result

    def _winner(self, done: list[optuna.trial.FrozenTrial]) -> optuna.trial.FrozenTrial:
        """The best finished trial; of equal ones the defaults, then the first point of the grid, whatever a killed process had to do again."""
        return min(done, key=lambda t: self._rank(t, t.value))

    def _rank(self, trial, value: float) -> tuple[float, int, int]:
        return (-value if self.bigger else value, *_order(trial))

    def finish(self) -> dict[str, Any]:
        """Write best.yaml, trials.csv and result.json; test the winner, once.

        Raises:
            UserError: when every trial failed.
        """
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if (
                trial.state == TrialState.FAIL
            ):  # its process may have been killed while it wrote a file, and the repeat has a folder of its own
                clear_leftovers(self.folder / "trials" / _run_name(trial))
        repeats = _repeats(trials)
        trials = [t for t in trials if t.user_attrs.get("kind") != "surplus" and t.number not in repeats]
        write_text(self.folder / "trials.csv", _table(trials, self.space))
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        if not done:
            reasons = [_reason(t) for t in trials if _reason(t)]
            raise UserError(
                f"No trial of {self.model} on {self.dataset} finished. {len(trials)} failed{', first: ' + reasons[0] if reasons else ''}."
            )
        best = self._winner(done)
        values = json.loads(best.user_attrs["settings"])
        run_dir = Path(best.user_attrs["run_dir"])
        file = run_dir / "result.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not record.get("test"):
            if not (run_dir / "best.pt").is_file():  # it was found on another machine, or two winners came at the same time
                shutil.rmtree(run_dir, ignore_errors=True)
                fixed = {"checkpoint_dir": str(run_dir.parent), "run_name": run_dir.name, "tensorboard": False}
                run(config_file_list=self.config_files, config_dict={**self.settings, **values, **fixed}, test=False)
            record = test_run(run_dir)
        head = f"# {self.model} on {self.dataset}: best of {len(done)} finished trials by {self.metric} on validation ({best.value:.4f}).\n"
        write_text(
            self.folder / "best.yaml",
            head + yaml.safe_dump({**self.settings, **values, "model": self.model, "dataset": self.dataset}, sort_keys=False),
        )
        result = {
            "schema": 1, "kind": "search", "model": self.model, "dataset": self.dataset, "strategy": self.strategy, "metric": self.metric,
            "best_value": best.value, "best_trial": best.number, "best_settings": values, "best_run": str(run_dir), "valid": record["valid"],
            "test": record["test"], "trials": {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
            "failed": [{"trial": t.number, "settings": json.loads(t.user_attrs.get("settings", "{}")), "error": _reason(t)} for t in trials if _reason(t)],
        }  # fmt: skip
        write_json(self.folder / "result.json", result)
        return result


def _wait_until_filled(study: optuna.Study) -> bool:
    """Whether the process that made the study fills it. It is waited for as long as trials appear; a silent one was killed."""
    seen, since = -1, time.monotonic()
    while "ready" not in study.user_attrs:
        count = len(study.get_trials(deepcopy=False))
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > _SILENCE:
            return False
        time.sleep(0.1)
    return True


def _place(trial) -> tuple[str | None, int | None]:
    """What an enqueued trial stands for: the defaults, or a point of the grid."""
    return trial.user_attrs.get("kind"), trial.user_attrs.get("point")


def _run_name(trial) -> str:
    """Folder of a trial's run below ``trials/``."""
    return f"trial-{trial.number:05d}"


def _order(trial) -> tuple[int, int]:
    """Rank among trials of equal value; the number of an enqueued trial says when it ran, which depends on what was killed."""
    kind, point = _place(trial)
    return (0, 0) if kind == "defaults" else (1, point) if kind == "grid" else (2, trial.number)


def _repeats(trials) -> set[int]:
    """Numbers of trials that stand for what an earlier one stands for, unless that one's process was killed.

    There are none unless a process fell silent while it filled the study, another one filled it instead, and the first one woke up.
    """
    taken, found = set(), set()
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.user_attrs.get("kind") not in ("defaults", "grid") or _died(trial):
            continue
        if _place(trial) in taken:
            found.add(trial.number)
        taken.add(_place(trial))
    return found


def _died(trial) -> bool:
    """A failed trial without a reason of its own: its process was killed, and the storage has put a copy back."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def _reason(trial) -> str:
    """Why a trial failed for good; empty for one that did not."""
    if _died(trial) and len(trial.system_attrs.get("retry_history", [])) >= _RETRIES:
        return f"its process was killed, {_RETRIES + 1} times in all; most likely memory ran out"
    return trial.user_attrs.get("error", "")


def _table(trials, space: list[Parameter]) -> str:
    """All trials as CSV."""
    out = io.StringIO()
    names = [p.name for p in space]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "kind", "value", "best_epoch", "train_s", *names, "error", "run_dir"])
    for t in trials:
        values = json.loads(t.user_attrs.get("settings", "{}"))
        attrs = [t.user_attrs.get(key, "") for key in ("best_epoch", "train_s")]
        value = "" if t.value is None else t.value
        row = [t.number, t.state.name.lower(), t.user_attrs.get("kind", "drawn"), value, *attrs, *(values.get(n, "") for n in names)]
        writer.writerow([*row, _reason(t), t.user_attrs.get("run_dir", "")])
    return out.getvalue()


def open_storage(url: str, heartbeat: int = _HEARTBEAT):
    """An Optuna storage whose dead trials are put back.

    Raises:
        UserError: when it cannot be reached.
    """
    for attempt in range(5):
        try:
            return _storage(url, heartbeat)
        except Exception as error:  # SQLAlchemy and the drivers have no common class, and a missing driver is an ImportError
            last = error
            if type(error).__name__ not in ("IntegrityError", "OperationalError", "ProgrammingError") or not _reachable(error):
                break
            time.sleep(0.2 * 2**attempt)  # two processes made the tables at the same time; one of them has to look again
    raise UserError(f"--storage={url} cannot be opened: {' '.join(str(last).split())[:300]}") from None


def _reachable(error: Exception) -> bool:
    return "connect" not in str(error).lower()


def _storage(url: str, heartbeat: int):
    if url.startswith("journal:"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    options = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    renamed = hasattr(optuna.storages, "RetryHeartbeatStaleTrialCallback")  # since optuna 4.9
    retry = {"heartbeat_stale_trial_callback" if renamed else "failed_trial_callback": _retry_callback()}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=options, heartbeat_interval=heartbeat, grace_period=3 * heartbeat, **retry)
    if storage.engine.dialect.name == "sqlite":
        _lock_before_reading(storage.engine)
    return storage


def _retry_callback():
    """Puts a copy of a trial whose process was killed into the queue, but not for ever: it may be what kills its process."""
    stages = optuna.storages
    callback = getattr(stages, "RetryHeartbeatStaleTrialCallback", None) or stages.RetryFailedTrialCallback
    return callback(max_retry=_RETRIES)


def _lock_before_reading(engine) -> None:
    """Make each SQLite transaction take the write lock when it begins.

    Optuna takes a waiting trial by reading its state and then writing "running". Python's sqlite3 begins a transaction only at the write, so
    two processes could read "waiting" and both take the trial. SQLite has no SELECT ... FOR UPDATE, which is what does this elsewhere.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _(connection, _record):
        connection.isolation_level = None  # sqlite3 begins nothing on its own
        # suppressed: another process is switching just now, or the file system has no shared memory; then it stays as before
        with contextlib.suppress(sqlite3.OperationalError):
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            # A trial writes some twelve times. In this mode a write waits for the disk only now and then, and nothing is lost when a process is killed.
            connection.execute(f"PRAGMA synchronous={'NORMAL' if mode == 'wal' else 'FULL'}")

    @sqlalchemy.event.listens_for(engine, "begin")
    def _(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made while the tables were checked do not know of this


def start_jobs(jobs: int, arguments: list[str]) -> int:
    """Run this command in `jobs` processes that share the study; the first exit code that is not 0."""
    program = [sys.executable, "-m", "recbole_mm.cli", "search", *arguments, "--worker=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))}
    processes = [subprocess.Popen(program, env=environment) for _ in range(jobs)]
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def quiet() -> None:
    """Optuna's own lines repeat ours, and the heartbeat has been "experimental" since its version 2.9."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("sqlalchemy").setLevel(logging.WARNING)
