"""A small dataset on disk for VIP5's tests: every user likes one colour, only the visual feature shows it, reviews name it."""

from pathlib import Path

import numpy as np

from recbole_mm.config import Config
from recbole_mm.quick_start import create_dataset

COLOURS = ("red", "green", "blue")

SMALL = {
    "network": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1},
    "encoder": None,
    "sequential_samples": 2,
    "direct_samples": 2,
    "candidates": 9,
    "beams": 10,
    "topk": [1, 5],
    "epochs": 1,
    "vocabulary": 300,
    "valid_metric": "sequential/NDCG@5",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "use_gpu": False,
    "show_progress": False,
    "tensorboard": False,
    "state": "ERROR",
}


def write_dataset(root: Path, name: str = "tiny", users: int = 30, items: int = 45, reviews: bool = True, features: bool = True) -> Path:
    """Write ``root/name`` and return `root`."""
    folder = root / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colour = np.arange(items) % 3
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    header += ["rating:float", "feature_word:token", "summary:token_seq", "review:token_seq"] if reviews else []
    lines = ["\t".join(header)]
    for user in range(users):
        liked = np.flatnonzero(colour == user % 3)
        for time, item in enumerate(rng.permutation(liked)[:8]):
            row = [f"u{user}", f"i{item}", str(time)]
            if reviews:
                row += [str(3 + user % 3), COLOURS[user % 3], "Very nice", f"I like the {COLOURS[user % 3]} colour of it"]
            lines.append("\t".join(row))
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n")
    if reviews:
        titles = [f"i{i}\tNice thing number {i}" for i in range(items)]
        (folder / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(titles) + "\n")
        people = [f"u{u}\tAnn Person{u}" if u else "u0\t" for u in range(users)]
        (folder / f"{name}.user").write_text("user_id:token\tname:token_seq\n" + "\n".join(people) + "\n")
    if features:
        table = rng.normal(0, 0.1, (items, 6)).astype(np.float32)
        table[np.arange(items), colour] += 1
        np.save(folder / "visual.npy", table)
        (folder / "item_ids.txt").write_text("\n".join(f"i{i}" for i in range(items)) + "\n")
    return root


def build(root: Path, name: str = "tiny", seed: int = 0, **settings):
    """Config, model and the three built parts of the dataset at `root`."""
    import torch

    config = Config("VIP5", name, config_dict={**SMALL, "data_path": str(root), "seed": seed, **settings})
    parts = create_dataset(config).build()
    torch.manual_seed(seed)
    from recbole_mm.model.vip5 import VIP5

    return config, VIP5(config, parts[0]), parts
