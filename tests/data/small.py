"""A small RecBole dataset on disk and loaders of it, for tests of data and evaluation."""

from pathlib import Path

import numpy as np

from recbole_mm.config import Config

USERS, ITEMS = 30, 80
COLORS = ("red", "green", "blue")


def write_small(folder: Path, seed: int = 0, users: int = USERS, items: int = ITEMS, name: str = "small") -> Path:
    """Write ``<folder>/small/small.inter`` and ``.item``: 5 to 20 distinct items for each user, popular ones more often, in random order of time."""
    random = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    weight = 1 / np.arange(1, items + 1) ** 0.7
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        chosen = random.choice(items, random.integers(5, 21), replace=False, p=weight / weight.sum())
        lines += [f"u{user}\ti{item}\t{random.integers(1, 6)}\t{1000 * user + place}" for place, item in enumerate(chosen)]
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n")
    rows = [f"i{item}\t{COLORS[item % 3]}\tw{item} w{item % 7}" for item in range(items)]
    (folder / name / f"{name}.item").write_text("\n".join(["item_id:token\tcolor:token\twords:token_seq", *rows]) + "\n")
    return folder


def small_config(folder: Path, model: str = "BPR", name: str = "small", **settings) -> Config:
    """Settings of `model` on the dataset that `write_small` wrote to `folder`."""
    given = {
        "data_path": str(folder), "use_gpu": False, "show_progress": False, "tensorboard": False, "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "topk": [1, 5, 10],
        "eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "user", "order": "RO", "mode": "full"}, "train_batch_size": 64,
        **settings,
    }  # fmt: skip
    if model in ("SASRec", "GRU4Rec", "BERT4Rec"):
        given["eval_args"] = {**given["eval_args"], "split": {"LS": "valid_and_test"}, "order": "TO"}
        given["eval_args"].update(settings.get("eval_args", {}))
        given.setdefault("MAX_ITEM_LIST_LENGTH", 8)
    return Config(model, name, config_dict=given)
