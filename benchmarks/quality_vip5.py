"""Quality of a small VIP5 from scratch on the bundled shop, with and without visual tokens, several seeds.

    python benchmarks/quality_vip5.py --seeds=1,2,3        # train what is not there yet, then write the table
    python benchmarks/quality_vip5.py --table              # only the table, from what is there

One raw file per run in benchmarks/quality/vip5/, the table in benchmarks/quality/vip5.md. Beside VIP5: RecBole's Pop, and drawing at random,
on the same targets and the same candidate lists.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.config import Config
from recbole_mm.files import write_json, write_text
from recbole_mm.model.vip5.samples import candidate_lists
from recbole_mm.quick_start import create_dataset, run

OUT = Path(__file__).resolve().parent / "quality"
SETTINGS = {"stopping_step": 100}  # beside those of properties/model/VIP5.yaml for the shop
TEXT_ONLY = {"number_dropout": 0.0}  # without pictures an item without a number is nothing at all
SHOWN = (
    "sequential/ndcg@10",
    "sequential/hit@10",
    "direct/hit@1",
    "direct/ndcg@10",
    "explanation/feature_word",
    "explanation/bleu4",
    "explanation/rouge1",
)


def one(seed: int, visual: int, epochs: int) -> None:
    """Train one run and write its raw file."""
    file = OUT / "vip5" / f"shop-visual{visual}-seed{seed}-epochs{epochs}.json"
    if file.is_file():
        return
    begin, cpu = time.time(), time.process_time()
    settings = {**SETTINGS, "visual_tokens": visual, "seed": seed, "epochs": epochs, "eval_step": epochs, **({} if visual else TEXT_ONLY)}
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"use_gpu": False, "show_progress": False, "tensorboard": False, "checkpoint_dir": folder}
        record = run("VIP5", "shop", config_dict={**settings, **fixed})["record"]
    write_json(
        file,
        {
            "settings": settings,
            "test": record["test"],
            "valid": [[e["epoch"], e["train_loss"], {k: e["valid"][k] for k in SHOWN if k in e["valid"]}] for e in record["epochs"] if e["valid"]],
            "protocol": record["extra"]["protocol"],
            "parameters": record["parameters"],
            "data": record["data"],
            "seconds": round(time.time() - begin),
            "cpu_seconds": round(time.process_time() - cpu),
        },
    )  # fmt: skip


def baselines() -> dict[str, dict[str, float]]:
    """Pop and chance on the test part: next item among all items, and among each user's 100 candidates."""
    config = Config("VIP5", "shop", config_dict={**SETTINGS, "use_gpu": False, "state": "ERROR"})
    train, _, test = create_dataset(config).build()
    popularity = torch.bincount(train.inter_feat["item_id"], minlength=train.item_num).numpy().astype(float)
    users, targets = test.inter_feat["user_id"].numpy(), test.inter_feat["item_id"].numpy()
    lists = candidate_lists(test.whole_sequences, users, targets, test.item_num, config["candidates"], config["candidate_seed"])
    everything = np.argsort(-popularity[1:], kind="stable")[:10] + 1

    def ndcg(rank: int) -> float:
        return 1 / math.log2(rank + 2) if rank < 10 else 0.0

    places = [int(np.flatnonzero(everything == t)[0]) if t in everything else 10 for t in targets]
    direct = [int((popularity[row[row > 0]] > popularity[t]).sum()) for row, t in zip(lists, targets)]
    mean = float(np.mean([ndcg(rank) for rank in range(len(lists[0]))]))
    return {
        "Pop": {
            "sequential/ndcg@10": float(np.mean([ndcg(p) for p in places])),
            "sequential/hit@10": float(np.mean([p < 10 for p in places])),
            "direct/hit@1": float(np.mean([p == 0 for p in direct])),
            "direct/ndcg@10": float(np.mean([ndcg(p) for p in direct])),
        },
        "random": {
            "sequential/ndcg@10": sum(ndcg(r) for r in range(10)) / (train.item_num - 1),
            "sequential/hit@10": 10 / (train.item_num - 1),
            "direct/hit@1": 1 / len(lists[0]),
            "direct/ndcg@10": mean,
        },
    }


def table(epochs: int) -> str:
    """The page: mean and standard error per setting, and the difference that visual tokens make."""
    runs: dict[int, list[dict]] = {}
    for visual in (0, 1):
        files = sorted((OUT / "vip5").glob(f"shop-visual{visual}-seed*-epochs{epochs}.json"))
        runs[visual] = [json.loads(f.read_text())["test"] for f in files]
    lines = [
        "# VIP5 on the bundled shop", "",
        f"A small model from scratch with the settings of `properties/model/VIP5.yaml` for the shop, {epochs} epochs, test part; mean ± standard error. `python benchmarks/quality_vip5.py --epochs={epochs}`", "",
        "| | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|",
    ]  # fmt: skip
    for name, values in baselines().items():
        lines.append(f"| {name} | " + " | ".join(f"{values[m]:.4f}" if m in values else "" for m in SHOWN) + " |")

    def stats(visual: int, metric: str) -> tuple[float, float]:
        values = np.array([r[metric] for r in runs[visual]])
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    for visual, label in ((0, "VIP5, text only"), (1, "VIP5, one visual token")):
        if runs[visual]:
            cells = [f"{m:.4f} ± {e:.4f}" if e == e else f"{m:.4f} (one seed)" for m, e in (stats(visual, metric) for metric in SHOWN)]
            lines.append(f"| {label}, {len(runs[visual])} seeds | " + " | ".join(cells) + " |")
    if all(len(r) > 1 for r in runs.values()):
        cells = []
        for metric in SHOWN:
            (a, ea), (b, eb) = stats(1, metric), stats(0, metric)
            cells.append(f"{a - b:+.4f} ({(a - b) / max(math.hypot(ea, eb), 1e-12):.1f} s.e.)")
        lines.append("| difference | " + " | ".join(cells) + " |")
    notes = OUT / "vip5.notes.md"
    return "\n".join(lines) + "\n" + ("\n" + notes.read_text(encoding="utf-8") if notes.is_file() else "")


def main() -> None:
    """Train what is missing and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--visual", default="1,0")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        for seed in map(int, options.seeds.split(",")):
            for visual in map(int, options.visual.split(",")):
                one(seed, visual, options.epochs)
    page = table(options.epochs)
    write_text(OUT / "vip5.md", page)
    print(page)


if __name__ == "__main__":
    main()
