"""What an encoder is worth to a recommender on the bundled shop: random weights, pre-trained by finetune, trained end to end.

    python benchmarks/quality_encoders.py [--seeds 1 2 3] [--models VBPR SLMRec] [--part frozen|end2end|all] [--out benchmarks/quality/encoders.json]

Frozen part: tiny-clip with random weights and after `finetune` on the shop's pairs from those weights, features of pictures (V), texts (T) and
both (V&T), for VBPR and SLMRec. End-to-end part: a still smaller CLIP from random weights, frozen against trained with the recommender.
Each seed draws the encoder's weights, the held-out pairs, the recommender's weights and its batches. Validation chooses the epoch.
Cold items have no training interaction: only their features can rank them. Half of the test items are cold.
"""

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from recbole_mm import run
from recbole_mm.config import Config
from recbole_mm.encoder.extract import extract
from recbole_mm.encoder.finetune import Finetuner
from recbole_mm.files import write_json, write_text
from recbole_mm.paths import bundled_dataset_dir

MODELS = ("VBPR", "SLMRec")  # with the settings of their property files for the shop
MODALITIES = {"V&T": ["visual", "textual"], "V": ["visual"], "T": ["textual"]}
SMALL = {
    "joint_width": 32, "width": 64, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 64,
    "text_width": 32, "text_layers": 1, "text_heads": 2, "context": 40,
}  # fmt: skip
END2END = {  # large batches: a step encodes each distinct item of its batch
    "VBPR": {"train_batch_size": 2048, "learning_rate": 0.01, "epochs": 14, "stopping_step": 14},
    "SLMRec": {"train_batch_size": 1024, "learning_rate": 0.003, "epochs": 20, "stopping_step": 20},
}
ENCODER_RATE = 0.001
NOTES = Path(__file__).parent / "quality" / "encoders.notes.md"


def measure(model: str, **settings) -> dict:
    """Test values of one run: Recall@20 and NDCG@20 on all items, Recall@20 on cold and warm ones."""
    record = run(
        model, "shop", config_dict={"show_progress": False, "tensorboard": False, "state": "error", "save_last": False, **settings}
    )["record"]
    groups = record["test_groups"]
    return {
        "recall": record["test"]["recall@20"],
        "ndcg": record["test"]["ndcg@20"],
        "cold": groups["cold"]["recall@20"],
        "warm": groups["warm"]["recall@20"],
        "epochs": len(record["epochs"]),
        "seconds": record["time"]["total_s"],
    }


def frozen(base: dict, seed: int, models: list[str], keep) -> None:
    encoders = {}
    common = {**base, "dataset": "shop", "encoder": "tiny-clip", "seed": seed}
    encoders["random"] = {"feature_set": f"random-{seed}", "encoder": "tiny-clip"}
    extract(Config("BPR", config_dict={**common, "feature_set": f"random-{seed}"}), progress=False)
    tuner = Finetuner(Config("BPR", config_dict=common), Path(base["checkpoint_dir"]) / f"tuned-{seed}", common)
    tuner.fit()
    weights = str(tuner.finish())
    keep(
        "finetune",
        {"seed": seed, "best_valid_loss": tuner.best, "epochs": len(tuner.history), "seconds": sum(h["time_s"] for h in tuner.history)},
    )
    encoders["pre-trained"] = {"feature_set": f"tuned-{seed}", "encoder": "tiny-clip"}
    extract(Config("BPR", config_dict={**common, "pretrained": weights, "feature_set": f"tuned-{seed}"}), progress=False)
    for model in models:
        for short, modalities in MODALITIES.items():
            for name, source in encoders.items():
                values = measure(model, **base, **source, modalities=modalities, seed=seed)
                keep("frozen", {"model": model, "modalities": short, "encoder": name, "seed": seed, **values})


def end2end(base: dict, seed: int, models: list[str], keep) -> None:
    common = {**base, "encoder": "tiny-clip", "encoder_sizes": SMALL, "modalities": ["visual", "textual"], "seed": seed}
    extract(Config("BPR", config_dict={**common, "dataset": "shop", "feature_set": f"small-{seed}"}), progress=False)
    for model in models:
        settings = END2END[model]
        values = measure(model, **common, **settings, feature_set=f"small-{seed}")
        keep("end2end", {"model": model, "training": "frozen random", "seed": seed, **values})
        learned = {"encoder_training": "end2end", "encoder_learning_rate": ENCODER_RATE, "encoder_micro_batch": 256}
        values = measure(model, **common, **settings, **learned)
        keep("end2end", {"model": model, "training": "end2end", "seed": seed, **values})


def cell(rows: list[dict], key: str) -> str:
    values = np.array([row[key] for row in rows])
    spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():.4f} ± {spread:.4f}" if len(values) > 1 else f"{values.mean():.4f}"


def tables(results: dict) -> str:
    lines = [
        "# Encoders on the shop",
        "",
        "Made by `python benchmarks/quality_encoders.py`. Test set; mean over seeds ± standard error.",
        "",
    ]

    def table(rows, names, title, note):
        lines.extend([f"## {title}", "", note, "", f"| {' | '.join(names)} | seeds | Recall@20 | NDCG@20 | cold items | warm items |"])
        lines.append("|" + "---|" * (len(names) + 5))
        groups: dict[tuple, list] = {}
        for row in rows:
            groups.setdefault(tuple(row[n] for n in names), []).append(row)
        for group, found in groups.items():
            cells = [cell(found, key) for key in ("recall", "ndcg", "cold", "warm")]
            lines.append(f"| {' | '.join(group)} | {len(found)} | {' | '.join(cells)} |")
        lines.append("")

    if results.get("frozen"):
        rows = sorted(
            results["frozen"], key=lambda r: ([*MODELS].index(r["model"]), [*MODALITIES].index(r["modalities"]), r["encoder"] != "random")
        )
        note = "tiny-clip, random weights against the same weights pre-trained by `finetune` on the shop's 900 pairs."
        table(rows, ("model", "modalities", "encoder"), "Pre-trained against random weights", note)
    if results.get("finetune"):
        took = ", ".join(
            f"{r['epochs']} epochs in {r['seconds']:.0f} s (validation loss {r['best_valid_loss']:.3f})" for r in results["finetune"]
        )
        lines.extend([f"Pre-training on one core of a shared machine: {took}.", ""])
    if results.get("end2end"):
        rows = sorted(results["end2end"], key=lambda r: ([*END2END].index(r["model"]), r["training"] == "end2end"))
        note = f"A CLIP of two layers and width {SMALL['width']} from random weights, V&T: frozen, or trained by the recommender's loss (rate {ENCODER_RATE})."
        table(rows, ("model", "training"), "End to end against frozen random features", note)
    notes = NOTES.read_text(encoding="utf-8") if NOTES.is_file() else ""
    return "\n".join(lines) + "\n" + notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--part", choices=["frozen", "end2end", "all"], default="all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quality" / "encoders.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    def keep(part: str, row: dict) -> None:
        """Add a row to the file at once; what earlier calls measured for other seeds or parts stays."""
        results = json.loads(args.out.read_text()) if args.out.is_file() else {}
        same = [k for k in ("model", "modalities", "encoder", "training", "seed") if k in row]
        results[part] = [r for r in results.get(part, []) if any(r.get(k) != row[k] for k in same)] + [row]
        write_json(args.out, results)
        write_text(args.out.with_suffix(".md"), tables(results))
        print(part, row, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(bundled_dataset_dir() / "shop", Path(folder) / "data" / "shop", ignore=shutil.ignore_patterns("features", ".cache"))
        base = {"data_path": str(Path(folder) / "data"), "checkpoint_dir": str(Path(folder) / "saved"), "use_gpu": False}
        for seed in args.seeds:
            if args.part in ("frozen", "all"):
                frozen(base, seed, args.models, keep)
            if args.part in ("end2end", "all"):
                end2end(base, seed, args.models, keep)


if __name__ == "__main__":
    main()
