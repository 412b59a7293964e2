"""The training loop: resume, schedules, accumulation, stopping; on a dataset of a few hundred interactions."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm import load_model, run
from recbole_mm.config import Config
from recbole_mm.errors import UserError
from recbole_mm.quick_start import _build_model, _prepare
from recbole_mm.trainer import Trainer, trainer_class_for
from recbole_mm.trainer.trainer import learning_rate_factor


def trainer_for(settings, model="VBPR", **more):
    config = Config(model, config_dict={**settings, **more})
    dataset, train, valid, test = _prepare(config)
    built = _build_model(config, train)
    return trainer_class_for(type(built), config)(config, built), train, valid, test


def curve(record):
    return [(e["epoch"], e["train_loss"], e["valid"]) for e in record["epochs"]]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("model", ["VBPR", "LightGCN", "SASRec", "LATTICE", "MMGCL"])
@pytest.mark.parametrize("seconds", [0, 1000])
def test_a_resumed_run_ends_where_the_unbroken_one_does(tastes, model, seconds):
    settings = {**tastes, "checkpoint_seconds": seconds, "weight_decay": 0.01}
    if model == "SASRec":
        settings |= {"hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 10}
    whole = run(model, config_dict=settings)

    def kill(epoch, score):
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        run(model, config_dict={**settings, "run_name": "broken"}, callback=kill)
    assert json.loads(Path("saved/broken/result.json").read_text())["status"] == "failed"
    assert (Path("saved/broken") / "last.pt").is_file() == (seconds == 0)
    resumed = run(resume="saved/broken")
    assert curve(resumed["record"]) == curve(whole["record"])
    assert resumed["test_result"] == whole["test_result"]
    assert resumed["best_valid_score"] == whole["best_valid_score"]
    first, second = (torch.load(Path(r["run_dir"]) / "best.pt", weights_only=True)["state_dict"] for r in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_after_training_only_tests(tastes):
    whole = run("VBPR", config_dict={**tastes, "run_name": "a", "stopping_step": 0, "learning_rate": 0.5, "epochs": 30})
    assert len(whole["record"]["epochs"]) < 30, "the run should stop early"
    again = run(resume="saved/a")
    assert again["test_result"] == whole["test_result"] and curve(again["record"]) == curve(whole["record"])


def test_kill_9_of_the_real_program(tastes):
    """The program is killed by the system in the middle of training; what it left is enough."""
    settings = {**tastes, "epochs": 60, "stopping_step": 60, "checkpoint_seconds": 0}
    words = [f"--{key}={value}" for key, value in settings.items()]
    whole = run("VBPR", config_dict=settings)
    program = [sys.executable, str(Path(__file__).parents[2] / "run_recbole_mm.py"), "--model=VBPR", *words, "--run_name=broken"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = Path("saved/broken/last.pt")
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9, "the program ended before it could be killed"
    resumed = run(resume="saved/broken")
    assert curve(resumed["record"]) == curve(whole["record"]) and resumed["test_result"] == whole["test_result"]


def test_resume_refuses_other_data(tastes):
    run("VBPR", config_dict={**tastes, "run_name": "a"})
    inter = Path("dataset/tastes/tastes.inter")
    inter.write_text("\n".join(inter.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="has changed"):
        run(resume="saved/a")
    with pytest.raises(UserError, match="not those the run was trained on"):
        load_model("saved/a")
    with pytest.raises(UserError, match="no run directory"):
        run(resume="saved")


def test_load_model_gives_the_run_back(tastes):
    outcome = run("VBPR", config_dict=tastes)
    config, model, dataset, train, valid, test = load_model(outcome["run_dir"])
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(train)
    assert trainer.evaluate(test, load_best_model=False) == outcome["test_result"]
    assert config["embedding_size"] == 8 and dataset.item_num - 1 == outcome["record"]["data"]["items"]


def test_gradient_accumulation_equals_the_large_batch(tastes):
    """Two half batches with averaged gradients move the weights like one batch of twice the size (BPR's loss is a mean)."""
    _, train, _, _ = trainer_for(tastes, "BPR", train_batch_size=64)
    large = [batch for batch in train if len(batch) == 64]
    halves = [part for batch in large for part in (batch[:32], batch[32:])]
    states = []
    for batches, accumulate in ((large, 1), (halves, 2)):
        trainer, *_ = trainer_for(tastes, "BPR", gradient_accumulation=accumulate, learner="sgd", learning_rate=1.0)
        trainer._train_epoch(batches, 0)
        states.append(trainer.model.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name])


def test_the_last_short_group_of_batches_is_averaged_over_its_own_length(tastes):
    moved = []
    for accumulate in (1, 5):
        trainer, train, _, _ = trainer_for(tastes, "BPR", gradient_accumulation=accumulate, learner="sgd", learning_rate=1.0)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer._train_epoch([next(iter(train))], 0)
        moved.append({k: v - before[k] for k, v in trainer.model.state_dict().items()})
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lr_schedule": None}, [1, 1, 1]),
        ({"lr_schedule": "step", "lr_gamma": 0.5, "lr_step_epochs": 2}, [1, 1, 0.5]),
        ({"lr_schedule": "exponential", "lr_gamma": 0.25, "lr_step_epochs": 2}, [1, 0.5, 0.25]),
        ({"lr_schedule": "linear", "epochs": 4}, [1, 0.75, 0.5]),
        ({"lr_schedule": "cosine", "epochs": 4}, [1, 0.5 + math.sqrt(0.125), 0.5]),
        ({"warmup_epochs": 3}, [0.25, 0.5, 0.75]),
    ],
)
def test_learning_rate_schedules(settings, expected):
    config = {"warmup_epochs": 0, "lr_schedule": None, "lr_gamma": 0.5, "lr_step_epochs": 1, "epochs": 10, **settings}
    np.testing.assert_allclose([learning_rate_factor(config, epoch) for epoch in range(3)], expected)


def test_the_schedule_reaches_the_optimizer(tastes):
    trainer, train, valid, _ = trainer_for(tastes, lr_schedule="step", lr_gamma=0.1, lr_step_epochs=1, epochs=3)
    trainer.fit(train, valid, saved=False)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**2)


def test_stop_on_loss_keeps_the_epoch_of_the_smallest_validation_loss(tastes):
    outcome = run("VBPR", config_dict={**tastes, "stop_on": "loss", "epochs": 40, "stopping_step": 2, "learning_rate": 0.05})
    losses = [epoch["valid"]["loss"] for epoch in outcome["record"]["epochs"]]
    assert outcome["best_valid_score"] == min(losses)
    assert outcome["record"]["best_epoch"] == int(np.argmin(losses))
    assert len(losses) == int(np.argmin(losses)) + 4, "two more epochs are allowed, the third without progress stops the run"


def test_the_validation_loss_repeats_and_disturbs_no_random_state(tastes):
    trainer, _, valid, _ = trainer_for(tastes)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = trainer._validation_loss(valid)
    assert torch.equal(torch.rand(3), expected)
    assert trainer._validation_loss(valid) == first


def test_a_diverged_loss_is_explained(tastes):
    trainer, train, _, _ = trainer_for(tastes)
    trainer.model.calculate_loss = lambda batch: trainer.model.item_embedding.sum() * math.nan
    with pytest.raises(UserError, match="no longer a number.*learning_rate"):
        trainer._train_epoch(train, 0)


def test_bf16_autocast_trains(tastes):
    exact, half = (run("VBPR", config_dict={**tastes, "amp": amp})["record"]["epochs"][0]["train_loss"] for amp in (None, "bf16"))
    assert half == pytest.approx(exact, rel=0.02) and half != exact


def test_hooks_are_called_where_their_names_say(tastes):
    trainer, train, valid, _ = trainer_for(tastes, epochs=2)
    calls = []
    for hook in ("before_epoch", "before_batch", "after_backward", "after_step", "before_evaluation"):
        setattr(trainer.model, hook, lambda *args, hook=hook: calls.append(hook))
    trainer.fit(train, valid, saved=False)
    batch = ["before_batch", "after_backward", "after_step"]
    assert calls == (["before_epoch", *batch * len(train), "before_evaluation"]) * 2


def test_recboles_own_trainers_run_on_top_of_ours(tastes):
    trainer, *_ = trainer_for(tastes, "RecVAE")
    assert isinstance(trainer, Trainer) and type(trainer).__name__ == "RecVAETrainer"
    assert not trainer.resumable, "two optimizers: last.pt would hold one"
    assert trainer_for(tastes, "BPR")[0].resumable


def test_two_runs_in_the_same_second_do_not_meet(tastes, monkeypatch):
    monkeypatch.setattr("recbole_mm.record.time.strftime", lambda *args: "20260101-000000")
    first, second = (run("BPR", config_dict={**tastes, "epochs": 1})["run_dir"] for _ in range(2))
    assert first != second
    with pytest.raises(UserError, match="exists already"):
        run("BPR", config_dict={**tastes, "run_name": Path(first).name})


def test_result_json_says_what_was_run(tastes):
    outcome = run("VBPR", config_dict=tastes)
    record = json.loads((Path(outcome["run_dir"]) / "result.json").read_text())
    assert record == outcome["record"]
    assert record["status"] == "finished" and record["model"] == "VBPR" and record["modalities"] == ["textual", "visual"]
    assert record["settings"]["embedding_size"] == 8 and record["data"]["interactions"] == 600 and record["data"]["users"] == 40
    assert len(record["epochs"]) == 4 and record["memory"]["peak_rss_mb"] > 50
    assert set(record["test_groups"]) >= {"cold", "warm"}
    with np.load(Path(outcome["run_dir"]) / "per_user.npz") as values:
        assert len(values["users"]) == 40
        assert values["recall@5"].mean() == pytest.approx(record["test"]["recall@5"], abs=1e-4)
