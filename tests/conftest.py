"""Fixtures that several test files use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm.testing import TwoTastes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the tests are small; threads only wait for each other


def write_tastes(folder: Path, name: str = "tastes") -> Path:
    """Write :class:`~recbole_mm.testing.TwoTastes` as a dataset on disk, with times, and unseen items as each user's last ones."""
    world = TwoTastes()
    draw = np.random.default_rng(1)
    target = folder / name
    target.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in world.users:
        seen = world.interactions[world.interactions[:, 0] == user, 1]
        liked = world.unseen[world.likes[user - 1]]
        for when, item in enumerate([*draw.permutation(seen), *draw.choice(liked, size=3, replace=False)]):
            lines.append(f"u{user}\ti{item}\t{when}")
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = [f"i{item}\titem number {item}" for item in range(1, world.n_items)]
    (target / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(items) + "\n", encoding="utf-8")
    for modality, table in world.features.items():
        np.save(target / f"{modality}.npy", table[1:])
    (target / "item_ids.txt").write_text("\n".join(f"i{item}" for item in range(1, world.n_items)) + "\n", encoding="utf-8")
    return target


@pytest.fixture
def tastes(tmp_path, monkeypatch):
    """A folder to work in, with the dataset ``tastes`` under ``dataset/``; returns the settings that make runs on it quick."""
    write_tastes(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    return {
        "dataset": "tastes",
        "use_gpu": False,
        "show_progress": False,
        "tensorboard": False,
        "state": "error",
        "epochs": 4,
        "train_batch_size": 128,
        "embedding_size": 8,
        "learning_rate": 0.01,
        "topk": [5],
        "valid_metric": "Recall@5",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    }
