"""Quality of a small VIP5 from scratch: on the bundled shop with and without visual tokens, on amazon-beauty with text only.

    python benchmarks/quality_vip5.py --seeds=1,2,3                        # shop: train what is not there yet, then write the table
    python benchmarks/quality_vip5.py --sasrec --seeds=1,2,3               # RecBole's SASRec on the shop, same split, history not masked
    python benchmarks/quality_vip5.py --dataset=amazon-beauty --seeds=1    # 45 minutes on one core; --data says where it lies
    python benchmarks/quality_vip5.py --table                              # only the table, from what is there

One raw file per run in benchmarks/quality/vip5/, the table in benchmarks/quality/vip5.md. Beside VIP5: RecBole's Pop and SASRec, and drawing
at random, on the same targets and, but for SASRec, the same candidate lists. Remove the files of a shop that has changed.
"""

import argparse
import json
import math
import os
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
SHOWN = (
    "sequential/ndcg@10",
    "sequential/hit@10",
    "direct/hit@1",
    "direct/ndcg@10",
    "explanation/feature_word",
    "explanation/bleu4",
    "explanation/rouge1",
)


SASREC = {"hidden_size": 64, "loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 20, "epochs": 40, "stopping_step": 5, "topk": [1, 5, 10], "metrics": ["NDCG", "Hit"], "valid_metric": "NDCG@10"}  # fmt: skip
DATA = os.environ.get("RECBOLE_MM_DATA", str(Path(__file__).resolve().parent.parent.parent / "shared" / "data"))


def train(file: Path, model: str, dataset: str, settings: dict, place: dict) -> None:
    """Train one run and write its raw file, its baselines with it where the data lie elsewhere; nothing where the file is there."""
    if file.is_file():
        return
    begin, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"use_gpu": False, "show_progress": False, "tensorboard": False, "checkpoint_dir": folder, **place}
        record = run(model, dataset, config_dict={**settings, **fixed})["record"]
    kept = raw(record, settings, time.time() - begin, time.process_time() - cpu)
    write_json(file, {**kept, "baselines": baselines(dataset, place)} if place else kept)


def raw(record: dict, settings: dict, seconds: float, cpu: float) -> dict:
    """What is kept of a run. CPU seconds are those of the whole process: data, training, every validation and the test."""
    shown = (*SHOWN, *(name.split("/")[1] for name in SHOWN))
    return {
        "settings": settings,
        "test": record["test"],
        "valid": [[e["epoch"], e["train_loss"], {k: e["valid"][k] for k in shown if k in e["valid"]}] for e in record["epochs"] if e["valid"]],
        "best_epoch": record["best_epoch"],
        "protocol": record.get("extra", {}).get("protocol", record["protocol"]),
        "parameters": record["parameters"],
        "data": record["data"],
        "seconds": round(seconds),
        "cpu_seconds": round(cpu),
        "epoch_seconds": record["time"]["epoch_s"],
    }  # fmt: skip


def one(seed: int, visual: int, epochs: int) -> None:
    """One run of VIP5 on the shop, evaluated once."""
    settings = {**SETTINGS, "visual_tokens": visual, "seed": seed, "epochs": epochs, "eval_step": epochs}
    train(OUT / "vip5" / f"shop-visual{visual}-seed{seed}-epochs{epochs}.json", "VIP5", "shop", settings, {})


def beauty(seed: int, data: str) -> None:
    """One run of VIP5 on amazon-beauty with what a user gets there; its baselines are kept beside it, so that the table needs no data."""
    train(OUT / "vip5" / f"amazon-beauty-seed{seed}.json", "VIP5", "amazon-beauty", {**SETTINGS, "seed": seed}, {"data_path": data})


def baselines(dataset: str = "shop", place: dict | None = None) -> dict[str, dict[str, float]]:
    """Pop and chance on the test part: next item among all items, and among each user's 100 candidates."""
    config = Config("VIP5", dataset, config_dict={**SETTINGS, **(place or {}), "use_gpu": False, "state": "ERROR"})
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


def stats(runs: list[dict], metric: str) -> tuple[float, float]:
    """Mean and standard error over runs; the latter is nan for one run."""
    values = np.array([r[metric] for r in runs])
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def row_of(label: str, runs: list[dict], metrics: tuple[str, ...]) -> str:
    """A row of the table; cells of metrics that the runs lack stay empty."""
    found = [stats(runs, metric) if metric in runs[0] else None for metric in metrics]
    cells = ["" if f is None else f"{f[0]:.4f} ± {f[1]:.4f}" if f[1] == f[1] else f"{f[0]:.4f} (one seed)" for f in found]
    return f"| {label} | " + " | ".join(cells) + " |"


def sasrec_row(runs: list[dict], metrics: tuple[str, ...]) -> str:
    """SASRec knows one task, so its metrics do not name it."""
    return row_of(f"RecBole's SASRec, {len(runs)} seeds", [{f"sequential/{k}": v for k, v in r.items()} for r in runs], metrics)


def beauty_table() -> list[str]:
    """The part of the page on amazon-beauty; empty without a run. SASRec's figures are those of quality_graph.py."""
    files = sorted((OUT / "vip5").glob("amazon-beauty-seed*.json"))
    runs = [json.loads(f.read_text()) for f in files]
    if not runs:
        return []
    metrics = tuple(m for m in SHOWN if m in runs[0]["test"])
    lines = [
        "", "## amazon-beauty, text only", "",
        "A small model from scratch with the settings of `properties/model/VIP5.yaml` for amazon-beauty, leave one out, history not masked, test part, best epoch by validation. "
        f"VIP5: {', '.join(str(r['cpu_seconds']) for r in runs)} CPU seconds on one core, validation and test included. `python benchmarks/quality_vip5.py --dataset=amazon-beauty --seeds={','.join(str(r['settings']['seed']) for r in runs)}`", "",
        "| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|",
    ]  # fmt: skip
    for name, values in runs[0]["baselines"].items():
        lines.append(f"| {name} | " + " | ".join(f"{values[m]:.4f}" for m in metrics) + " |")
    sasrec = [r["test"] for r in json.loads((OUT / "amazon-beauty.json").read_text())["SASRec"]]
    lines.append(sasrec_row(sasrec, metrics))
    lines.append(row_of("VIP5, text only" + (f", {len(runs)} seeds" if len(runs) > 1 else ""), [r["test"] for r in runs], metrics))
    curve = "; ".join(", ".join(f"{epoch + 1}: {values['sequential/hit@10']:.4f}" for epoch, _, values in r["valid"]) for r in runs)
    lines += ["", f"Validation sequential HR@10 after so many epochs: {curve}.", ""]
    notes = OUT / "vip5.amazon-beauty.notes.md"
    return [*lines, notes.read_text(encoding="utf-8").rstrip()] if notes.is_file() else lines


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

    sasrec = [json.loads(f.read_text())["test"] for f in sorted((OUT / "vip5").glob("shop-SASRec-seed*.json"))]
    if sasrec:
        lines.append(sasrec_row(sasrec, SHOWN))
    for visual, label in ((0, "VIP5, text only"), (1, "VIP5, one visual token")):
        if runs[visual]:
            lines.append(row_of(f"{label}, {len(runs[visual])} seeds", runs[visual], SHOWN))
    if all(len(r) > 1 for r in runs.values()):
        cells = []
        for metric in SHOWN:
            (a, ea), (b, eb) = stats(runs[1], metric), stats(runs[0], metric)
            cells.append(f"{a - b:+.4f} ({(a - b) / max(math.hypot(ea, eb), 1e-12):.1f} s.e.)")
        lines.append("| difference | " + " | ".join(cells) + " |")
    notes = OUT / "vip5.notes.md"
    return "\n".join([*lines, *beauty_table()]) + "\n" + ("\n" + notes.read_text(encoding="utf-8") if notes.is_file() else "")


def main() -> None:
    """Train what is missing and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="shop", choices=("shop", "amazon-beauty"))
    parser.add_argument("--data", default=DATA, help="folder of amazon-beauty")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--visual", default="1,0", help="shop: runs with 1 and 0 visual tokens")
    parser.add_argument("--epochs", type=int, default=8, help="shop: epochs of VIP5")
    parser.add_argument("--sasrec", action="store_true", help="shop: run RecBole's SASRec instead")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if options.table else map(int, options.seeds.split(",")):
        if options.dataset == "amazon-beauty":
            beauty(seed, options.data)
        elif options.sasrec:
            train(OUT / "vip5" / f"shop-SASRec-seed{seed}.json", "SASRec", "shop", {**SASREC, "seed": seed}, {})
        else:
            for visual in map(int, options.visual.split(",")):
                one(seed, visual, options.epochs)
    page = table(options.epochs)
    write_text(OUT / "vip5.md", page)
    print(page)


if __name__ == "__main__":
    main()
