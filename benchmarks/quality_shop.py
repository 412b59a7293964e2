"""VBPR against BPR on the bundled shop: which clue helps whom, on all and on cold items, over seeds.

    python benchmarks/quality_shop.py [--seeds 3] [--out benchmarks/quality/shop.json]

Rows: BPR (ids only), VBPR with pictures, texts, both, and both with every feature row moved to the next item. Writes the values of every
seed, and beside them a table with means, standard errors and the differences that the project claims.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from recbole_mm import run
from recbole_mm.paths import bundled_dataset_dir

ROWS = {
    "BPR": ("BPR", {"learning_rate": 0.003, "epochs": 200, "stopping_step": 20}),
    "VBPR, pictures": ("VBPR", {"modalities": ["visual"]}),
    "VBPR, texts": ("VBPR", {"modalities": ["textual"]}),
    "VBPR, both": ("VBPR", {}),
    "VBPR, both, rows shifted by one": ("VBPR", {"feature_set": "shifted"}),
}
CLAIMS = [
    ("VBPR, both", "VBPR, pictures"), ("VBPR, both", "VBPR, texts"), ("VBPR, pictures", "BPR"), ("VBPR, texts", "BPR"),
    ("VBPR, both", "VBPR, both, rows shifted by one"),
]  # fmt: skip


def shift_features(folder: Path) -> None:
    """A copy of the classic feature set with every row moved by one item."""
    target = folder.parent / "shifted"
    target.mkdir(exist_ok=True)
    for path in folder.glob("*.npy"):
        np.save(target / path.name, np.roll(np.load(path), 1, axis=0))
    (target / "item_ids.txt").write_text((folder / "item_ids.txt").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quality" / "shop.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "dataset"
        data.mkdir()
        import shutil

        shutil.copytree(bundled_dataset_dir() / "shop", data / "shop", ignore=shutil.ignore_patterns("features", ".cache"))
        for name, (model, settings) in ROWS.items():
            if settings.get("feature_set") == "shifted":
                shift_features(data / "shop" / "features" / "classic")
            for seed in range(1, args.seeds + 1):
                fixed = {
                    "data_path": str(data),
                    "checkpoint_dir": f"{folder}/saved",
                    "state": "error",
                    "show_progress": False,
                    "tensorboard": False,
                }
                record = run(model, "shop", config_dict={**fixed, **settings, "seed": seed}, saved=True)["record"]
                groups = record["test_groups"]
                row = {"all": record["test"]["recall@20"], "cold": groups["cold"]["recall@20"], "warm": groups["warm"]["recall@20"]}
                results[name].append({**row, "seed": seed, "epochs": len(record["epochs"])})
                print(name, results[name][-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def values(rows: list[dict], group: str) -> np.ndarray:
    return np.array([row[group] for row in rows])


def table(results: dict[str, list[dict]]) -> str:
    seeds = len(next(iter(results.values())))
    lines = [
        f"# The shop: Recall@20, mean of {seeds} seeds ± standard error",
        "",
        "| | all items | cold items | warm items |",
        "|---|---|---|---|",
    ]
    for name, rows in results.items():
        cells = [f"{values(rows, g).mean():.4f} ± {values(rows, g).std(ddof=1) / seeds**0.5:.4f}" for g in ("all", "cold", "warm")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| difference of means | all items | cold items | (more than twice its standard error on cold items) |",
        "|---|---|---|---|",
    ]
    for better, worse in CLAIMS:
        cells, sure = [], ""
        for group in ("all", "cold"):
            a, b = values(results[better], group), values(results[worse], group)
            error = (a.var(ddof=1) / seeds + b.var(ddof=1) / seeds) ** 0.5
            cells.append(f"{a.mean() - b.mean():+.4f} ± {error:.4f}")
            sure = "yes" if a.mean() - b.mean() > 2 * error else "no"
        lines.append(f"| {better} − {worse} | " + " | ".join(cells) + f" | {sure} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
