"""End-to-end training from files to result: the encoder learns, a killed run resumes, a saved run comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm import load_model, run
from tests.encoder.support import TINY_CLIP, quiet


class Killed(BaseException):
    pass


@pytest.fixture
def pictured(tastes):
    """The dataset ``tastes`` with a picture for every item: the taste is its colour. Settings of a short end-to-end run on it."""
    folder = Path("dataset/tastes")
    (folder / "images").mkdir()
    table = np.load(folder / "visual.npy")
    draw = np.random.default_rng(0)
    for i, row in enumerate(table, start=1):
        pixels = draw.integers(0, 80, (16, 16, 3))
        pixels[:, :, int(row[0] > 0)] += 20  # weak beside the noise: random weights hardly see it
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"i{i}.png")
    end2end = {"encoder": "tiny-clip", "encoder_training": "end2end", "encoder_sizes": TINY_CLIP["encoder_sizes"], "modalities": ["visual"]}
    return {**tastes, **end2end, "text_fields": ["title"], "encoder_learning_rate": 0.003, "train_batch_size": 256, "epochs": 3}


def test_a_resumed_run_ends_where_the_unbroken_one_does(pictured):
    settings = {**pictured, "checkpoint_seconds": 0}
    whole = quiet(run, "VBPR", config_dict=settings)

    def kill(epoch, score):
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        quiet(run, "VBPR", config_dict={**settings, "run_name": "broken"}, callback=kill)
    resumed = quiet(run, resume="saved/broken")
    assert [e["train_loss"] for e in resumed["record"]["epochs"]] == [e["train_loss"] for e in whole["record"]["epochs"]]
    assert resumed["test_result"] == whole["test_result"]
    states = [torch.load(Path(r["run_dir"]) / "best.pt", weights_only=True)["state_dict"] for r in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_saved_run_comes_back_with_its_encoder(pictured):
    outcome = quiet(run, "VBPR", config_dict=pictured)
    record = json.loads((Path(outcome["run_dir"]) / "result.json").read_text())
    assert record["encoder_training"] == "end2end" and record["modalities"] == ["visual"]
    loaded = quiet(load_model, outcome["run_dir"])
    loaded.model.eval()
    names = loaded.model.state_dict()
    assert any(n.startswith("features.encoder.") for n in names) and not any("table" in n for n in names)
    from recbole_mm.trainer import Trainer

    metrics = Trainer(loaded.config, loaded.model).evaluate(loaded.test_data, load_best_model=False)
    assert dict(metrics) == dict(outcome["test_result"])


def test_the_recommenders_loss_teaches_the_encoder(pictured):
    """Unseen items are ranked by their pictures: after training the encoder separates the two colours better than at its random start."""

    clue = dict(zip(Path("dataset/tastes/item_ids.txt").read_text().split(), np.load("dataset/tastes/visual.npy")[:, 0] > 0))

    def separation(bank):
        bank.eval()
        x = bank["visual"][1:]
        x = (x - x.mean(0)) / (x - x.mean(0)).norm(dim=1).mean()
        taste = torch.tensor([bool(clue[token]) for token in bank._inputs.content.tokens[1:]])
        return (x[taste].mean(0) - x[~taste].mean(0)).norm().item()

    values = []
    for epochs in (0, 12):
        outcome = quiet(
            run, "VBPR", config_dict={**pictured, "epochs": epochs, "stopping_step": 99, "reg_weight": 0.0, "run_name": f"r{epochs}"}
        )
        values.append(separation(quiet(load_model, outcome["run_dir"]).model.features))
    assert values[1] > values[0] + 0.1
