"""Does a group's own adapter help? PerPEFT against Global PEFT against frozen features on a shop with planted taste groups.

All scopes start from the same small CLIP, made by `recbole-mm finetune` from the shop's own pictures and texts (one for each seed), and train
for the same number of epochs; the epoch that is best on validation is tested. `planted` is PerPEFT with the planted groups in place of
KMeans': how much groups could help at all. SASRec is RecBole's, with the user's history masked as for the others.

Every finished run is kept in <results>/perpeft.json, so the script can be interrupted and goes on where it was.

Usage: python benchmarks/quality_perpeft.py --work FOLDER [--seeds 11,12,13] [--variants none,global,personalized,global_negatives,planted,SASRec]
       [--users 1000 --items 1000 --interactions 20000 (other sizes make a new shop)] [--kind iisan] [--settings '{"epochs": 60}']
       [--probe 8,16,32,64 (in place of runs: what a linear classifier reads in the CLIPs of these joint widths)]
"""

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recbole_mm.config import Config
from recbole_mm.data.synthetic import ATTRIBUTES, VERSION, make_shop, write_shop
from recbole_mm.encoder.finetune import main as finetune
from recbole_mm.files import write_json, write_text
from recbole_mm.model.perpeft.model import PerPEFTSASRec, build_items, hidden_states
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import bundled_dataset_dir, properties_dir
from recbole_mm.quick_start import _prepare, run

COMMON = {
    "use_gpu": False, "show_progress": False, "tensorboard": False, "state": "WARNING", "save_last": False, "stopping_step": 10_000,
    "metrics": ["Hit", "NDCG"], "topk": [10, 20, 30], "valid_metric": "NDCG@20", "mask_history": True, "metric_decimal_place": 7,
    "MAX_ITEM_LIST_LENGTH": 10, "negative_items": "train", "encoder": None,
}  # fmt: skip
# what is shipped for the shop, for shops of any name and size; every fourth epoch is evaluated
_SHOP = load_yaml(properties_dir() / "model" / "PerPEFTSASRec.yaml")["per_dataset"]["shop"]
_TRAINING = (
    "l2_emb", "standardise_features", "weight_scalar", "MAX_ITEM_LIST_LENGTH", "hidden_dropout_prob", "attn_dropout_prob", "train_batch_size",
    "learning_rate", "epochs", "global_epochs", "hidden_size", "iisan_hidden",
)  # fmt: skip
SHIPPED = {**{key: _SHOP[key] for key in _TRAINING}, "eval_step": 4}
SIZES, CLIP_EPOCHS = _SHOP["encoder_sizes"], 30
SHIPPED_CLIP = {"sizes": SIZES, "epochs": CLIP_EPOCHS}
FIRST_CLIP = {"sizes": {**SIZES, "joint_width": 64}, "epochs": 80}  # of runs that do not say: one for all seeds
VARIANTS = {
    "none": {"peft_scope": "none"},
    "global": {"peft_scope": "global"},
    "personalized": {"peft_scope": "personalized"},
    "global_negatives": {"peft_scope": "personalized", "group_negatives": False},
    "planted": {"peft_scope": "personalized"},
    "SASRec": {"stopping_step": 10, "learning_rate": 1e-3, "train_batch_size": 512, "hidden_size": 32, "inner_size": 32, "n_heads": 4, "hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.3},
}  # fmt: skip
PLANTED = PerPEFTSASRec.assign_groups


def prepare(work: Path, args) -> tuple[Path, str, dict[str, int]]:
    """Folder and name of the shop, and each user's planted group."""
    sizes = (args.users, args.items, args.interactions)
    if sizes == (1000, 1000, 20000):
        root, name = bundled_dataset_dir(), "shop"
    else:
        root, name = work / "data", f"shop-{args.users}-{args.items}-{args.interactions}"
        if not (root / name / "shop.json").is_file():
            write_shop(make_shop(*sizes, reviews=False), root / name)
    truth = np.load(root / name / "truth.npz")
    return root, name, dict(zip(truth["user_tokens"].tolist(), truth["group"].tolist()))


def small_clip(work: Path, root: Path, name: str, seed: int, sizes: dict = SIZES) -> tuple[Path, dict]:
    """The CLIP that all scopes of one seed start from, and what to record of it."""
    folder = work / f"clip-{name}-joint{sizes['joint_width']}-epochs{CLIP_EPOCHS}-seed{seed}"
    if not (folder / "finetune.json").is_file():
        words = [
            f"--dataset={name}",
            f"--data_path={root}",
            "--encoder=tiny-clip",
            f"--output={folder}",
            "--use_gpu=false",
            f"--seed={seed}",
        ]
        words += [f"--finetune_epochs={CLIP_EPOCHS}", "--finetune_batch_size=64", "--finetune_patience=100", "--finetune_crop=0.9"]
        words += ["--finetune_mirror=false", "--finetune_word_dropout=0.0", "--text_fields=[title,description]"]
        finetune([*words, f"--encoder_sizes={json.dumps(sizes)}"])
    valid_loss = json.loads((folder / "finetune.json").read_text())["best_valid_loss"]
    return folder / "encoder", {"sizes": sizes, "epochs": CLIP_EPOCHS, "seed": seed, "valid_loss": valid_loss}


def settings_for(pretrained: Path, root: Path) -> dict:
    """What every run on a shop has in common."""
    return {
        **COMMON, "data_path": str(root), "pretrained": str(pretrained), "iisan_states": 3, "n_groups": 6,
        "text_fields": ["title", "description"], "encoder_text_length": 24, "encoder_precision": "fp32", **SHIPPED,
    }  # fmt: skip


def readable(pretrained: Path, root: Path, name: str) -> dict[str, dict[str, float]]:
    """Share of the items whose planted attribute a ridge classifier names, from the joint space and from IISAN's hidden states; five folds."""
    dataset = _prepare(Config("PerPEFTSASRec", name, config_dict=settings_for(pretrained, root)))[0]
    items = build_items(dataset.config, dataset, torch.device("cpu"))
    every = torch.arange(1, dataset.item_num)
    with torch.no_grad():
        features = {"joint": items(every), "hidden": torch.cat([s[1:].flatten(1).float() for s in hidden_states(items, every, 3)], dim=1)}
    truth = np.load(root / name / "truth.npz")
    row = {token: i for i, token in enumerate(truth["item_tokens"].tolist())}
    rows = [row[token] for token in dataset.id2token(dataset.iid_field, every).tolist()]
    planted = {**dict(zip(ATTRIBUTES, truth["attributes"][rows].T)), "kind": truth["kind"][rows]}
    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100.0))
    folds = KFold(5, shuffle=True, random_state=0)
    return {
        what: {attribute: float(cross_val_score(classifier, x, y, cv=folds).mean()) for attribute, y in planted.items()}
        for what, x in ((what, x.numpy()) for what, x in features.items())
    }


def probe_table(rows: list[dict]) -> list[str]:
    """What a linear classifier reads, as Markdown."""
    lines = ["## What a linear classifier reads in the CLIP", ""]
    lines += [f"| joint width | loss on kept pairs | read from | {' | '.join(rows[0]['joint'])} | mean |", f"|---:|---:|---|{'---:|' * 8}"]
    for row in rows:
        for what in ("joint", "hidden"):
            shares = [*row[what].values(), np.mean(list(row[what].values()))]
            name = {"joint": "joint space", "hidden": "hidden states"}[what]
            lines.append(f"| {row['joint_width']} | {row['valid_loss']:.2f} | {name} | {' | '.join(f'{x:.2f}' for x in shares)} |")
    return [*lines, ""]


def planted_groups(model: PerPEFTSASRec, truth: dict[str, int]) -> torch.Tensor:
    """PerPEFT's step from one adapter to many, with the planted groups."""
    PLANTED(model)
    tokens = model.dataset.id2token(model.dataset.uid_field, range(1, model.n_users))
    model.user_group.copy_(torch.tensor([0, *(truth[str(token)] for token in tokens)]))
    model._reset()
    return model.user_group


def one(variant: str, seed: int, kind: str, root: Path, name: str, truth: dict, settings: dict, work: Path) -> dict:
    clip = SHIPPED_CLIP  # SASRec reads none, but stands in the table of those that do
    if variant == "SASRec":
        given = {
            **COMMON,
            "data_path": str(root),
            "epochs": settings.get("epochs", 50),
            "MAX_ITEM_LIST_LENGTH": SHIPPED["MAX_ITEM_LIST_LENGTH"],
        }
        given["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}
    else:
        pretrained, clip = small_clip(work, root, name, seed)
        given = {**settings_for(pretrained, root), "peft_kind": kind, **settings}
    given = {**given, **VARIANTS[variant], "seed": seed, "checkpoint_dir": str(work / "runs")}
    PerPEFTSASRec.assign_groups = (lambda model: planted_groups(model, truth)) if variant == "planted" else PLANTED
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run("SASRec" if variant == "SASRec" else "PerPEFTSASRec", name, config_dict=given)
    record = result["record"]
    out = {
        "variant": variant, "seed": seed, "kind": kind, "dataset": name, "version": VERSION, "settings": settings, "clip": clip,
        "valid": record["best_valid_score"],
        "best_epoch": record["best_epoch"], "test": record["test"], "groups": record["test_groups"], "parameters": record["parameters"],
        "epochs": len(record["epochs"]), "epoch_s": float(np.median([e["time_s"] for e in record["epochs"]])),
        "total_s": time.perf_counter() - begin, "valid_curve": [e["valid"]["ndcg@20"] for e in record["epochs"] if e["valid"]],
    }  # fmt: skip
    file = Path(result["run_dir"]) / "groups.csv"
    if file.is_file():
        with open(file, newline="") as stream:
            rows = list(csv.DictReader(stream))
        out["ari"] = adjusted_rand_score([truth[row["user"]] for row in rows], [row["group"] for row in rows])
    return out


def compare(a: list[float], b: list[float]) -> tuple[float, float]:
    """Difference of means and its standard error."""
    return float(np.mean(a) - np.mean(b)), float(np.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)))


def setting_of(run: dict) -> tuple:
    """What runs of one table have in common; runs without a version are of the first one."""
    clip = run.get("clip", FIRST_CLIP)
    return run["dataset"], run.get("version", 1), run["kind"], json.dumps(run["settings"], sort_keys=True), describe(clip)


def describe(clip: dict) -> str:
    """Sizes and training of a CLIP, without what differs from seed to seed."""
    sizes = clip["sizes"]
    towers = f"towers {sizes['width']} and {sizes['text_width']} wide, {sizes['layers']} and {sizes['text_layers']} deep"
    return f"CLIP with {towers}, joint space {sizes['joint_width']} wide, {clip['epochs']} epochs"


def markdown(runs: list[dict], notes: str = "", probed: Sequence[dict] = ()) -> str:
    """One table per shop, kind and settings, with the comparisons that the paper makes."""
    lines = ["# PerPEFT-SASRec on the shop", "", __doc__.split("\n\n")[1], ""]
    lines += [notes.strip(), ""] if notes else []
    lines += probe_table(probed) if probed else []
    for key in sorted(dict.fromkeys(map(setting_of, runs)), key=lambda key: key[-1] != describe(SHIPPED_CLIP)):
        dataset, version, kind, settings, clip = key
        mine = [r for r in runs if setting_of(r) == key]
        lines += [
            f"## {dataset} (generator version {version}), {kind}, {settings if settings != '{}' else 'shipped settings'}",
            "",
            f"{clip}.",
            "",
        ]
        lines += [
            "| variant | seeds | NDCG@20 | HR@20 | NDCG@20 valid | ARI of the groups | parameters | s/epoch |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        scores = {}
        for variant in VARIANTS:
            of = [r for r in mine if r["variant"] == variant]
            if not of:
                continue
            scores[variant] = [r["test"]["ndcg@20"] for r in of]

            def cell(values, digits=4):
                spread = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
                return f"{np.mean(values):.{digits}f}{spread}"

            ari = [r["ari"] for r in of if "ari" in r and variant != "planted"]
            lines.append(
                f"| {variant} | {len(of)} | {cell(scores[variant])} | {cell([r['test']['hit@20'] for r in of])} | {cell([r['valid'] for r in of])} | "
                f"{cell(ari, 3) if ari else '-'} | {of[0]['parameters']:,} | {np.median([r['epoch_s'] for r in of]):.2f} |"
            )
        lines.append("")
        pairs = (
            ("personalized", "global"),
            ("global", "none"),
            ("personalized", "global_negatives"),
            ("global_negatives", "global"),
            ("planted", "global"),
        )
        for a, b in pairs:
            if len(scores.get(a, ())) > 1 and len(scores.get(b, ())) > 1:
                difference, error = compare(scores[a], scores[b])
                verdict = "more than" if difference > 2 * error else "not more than"
                lines.append(f"* {a} - {b}: {difference:+.4f}, standard error {error:.4f} ({verdict} twice).")
        lines.append("")
    return "\n".join(lines)


def write_page(folder: Path, runs: list[dict]) -> None:
    """perpeft.md from the runs and, where there are such, perpeft.notes.md and perpeft_probe.json."""
    notes, probed = folder / "perpeft.notes.md", folder / "perpeft_probe.json"
    text = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    write_text(folder / "perpeft.md", markdown(runs, text, json.loads(probed.read_text()) if probed.is_file() else ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only write the page again")
    parser.add_argument("--seeds", default="11,12,13")
    parser.add_argument("--variants", default="none,global,personalized,global_negatives,planted,SASRec")
    parser.add_argument("--kind", default="iisan")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--interactions", type=int, default=20000)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--probe", default="", help="joint widths of CLIPs to look into, with the first of the seeds")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "quality")
    args = parser.parse_args()
    if args.table:
        write_page(args.results, json.loads((args.results / "perpeft.json").read_text()))
        return
    root, name, truth = prepare(args.work, args)
    file = args.results / "perpeft.json"
    if args.probe:
        seed, rows = int(args.seeds.split(",")[0]), []
        for width in map(int, args.probe.split(",")):
            pretrained, clip = small_clip(args.work, root, name, seed, {**SIZES, "joint_width": width})
            rows.append({"joint_width": width, "seed": seed, "valid_loss": clip["valid_loss"], **readable(pretrained, root, name)})
        write_json(args.results / "perpeft_probe.json", rows)
        write_page(args.results, json.loads(file.read_text()) if file.is_file() else [])
        return
    for seed in map(int, args.seeds.split(",")):
        for variant in args.variants.split(","):
            runs = json.loads(file.read_text()) if file.is_file() else []
            key = (variant, seed, (name, VERSION, args.kind, json.dumps(args.settings, sort_keys=True), describe(SHIPPED_CLIP)))
            if any((r["variant"], r["seed"], setting_of(r)) == key for r in runs):
                continue
            done = one(variant, seed, args.kind, root, name, truth, args.settings, args.work)
            runs = json.loads(file.read_text()) if file.is_file() else []
            write_json(file, [*runs, done])
            write_page(args.results, [*runs, done])
            print(
                variant,
                seed,
                {k: round(v, 4) for k, v in done["test"].items()},
                f"ARI {done.get('ari')}",
                f"{done['total_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
