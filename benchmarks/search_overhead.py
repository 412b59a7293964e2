"""What a search costs beside its trials: a study of 200 trials against the bare runs inside it.

    python benchmarks/search_overhead.py [--trials 200] [--compare 3] [--out FOLDER]

A study (TPE, median pruner switched off, SQLite) runs 200 short trials of VBPR on a dataset of 1,000 interactions in one process. Of each trial the time
inside run() is taken, less the time that run() spends in the study's own callback (reporting a validation result, asking the pruner); all the rest
of the study's time is overhead: drawing settings, reading and writing the storage, heartbeats, keeping the best weights. So both times come from the same
seconds of the same process, whatever else the machine does.

Trials of that dataset are shorter than any in earnest, so the overhead of a trial (the mean, and that of the last 20, when the study is largest) is put against
bare runs of VBPR on the bundled shop with its own settings, measured between parts of the same study. Printed: both ratios. Expected: below 2 % of the shop's trials.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

import recbole_mm.tuning.search as search_module
from recbole_mm import run
from recbole_mm.tuning.space import Parameter

HERE = Path(__file__).parent
SPACE = [
    Parameter("learning_rate", low=1e-4, high=1e-1, log=True),
    Parameter("embedding_size", choices=(4, 8, 16)),
    Parameter("reg_weight", low=1e-6, high=1e-1, log=True),
]
QUIET = {"use_gpu": False, "show_progress": False, "state": "error", "tensorboard": False, "save_last": False, "checkpoint_seconds": 3600}


def write_small(folder: Path) -> dict:
    """100 users with 10 interactions each, 60 items with features; returns the settings of a short trial on it."""
    draw = np.random.default_rng(0)
    target = folder / "small"
    target.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"u{u}\ti{i}\t{t}" for u in range(100) for t, i in enumerate(draw.choice(60, 10, replace=False))]
    (target / "small.inter").write_text("\n".join(lines) + "\n")
    np.save(target / "visual.npy", draw.standard_normal((60, 16)).astype(np.float32))
    (target / "item_ids.txt").write_text("".join(f"i{i}\n" for i in range(60)))
    return {
        **QUIET, "data_path": str(folder), "epochs": 2, "stopping_step": 100, "train_batch_size": 512, "topk": [5], "metrics": ["Recall", "NDCG"],
        "valid_metric": "NDCG@5", "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--compare", type=int, default=3, help="bare runs on the shop")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where search_overhead.md and .json go")
    args = parser.parse_args()
    inside: list[float] = []

    def timed(*positions, callback=None, **more):
        spent = 0.0

        def counted(*values):
            nonlocal spent
            begin = time.perf_counter()
            try:
                callback(*values)
            finally:
                spent += time.perf_counter() - begin

        begin = time.perf_counter()
        try:
            return run(*positions, callback=counted, **more)
        finally:
            inside.append(time.perf_counter() - begin - spent)

    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        search_module.quiet()
        search_module.run = timed
        study = search_module.Search(
            "VBPR", "small", SPACE, work / "search", trials=args.trials, pruner="none",
            settings={**write_small(work), "model": "VBPR", "dataset": "small"},
        )  # fmt: skip
        overhead, shop = [], []
        marks = np.linspace(0, args.trials, args.compare, endpoint=False).astype(int)
        while len(inside) < args.trials:
            if len(inside) in marks and len(shop) < args.compare and len(inside) >= marks[len(shop)]:
                begin = time.perf_counter()
                run("VBPR", "shop", config_dict={**QUIET, "checkpoint_dir": str(work / "bare"), "seed": len(shop) + 1})
                shop.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            study._put_back()
            study.study.get_trials(deepcopy=False)
            study._counted()
            study._one()
            overhead.append(time.perf_counter() - begin - inside[-1])
    trial, cost = np.array(inside), np.array(overhead)
    last = cost[-20:].mean()
    rows = [
        (
            "the study's own trials (1,000 interactions, 2 epochs)",
            float(trial.mean()),
            float(cost.sum() / trial.sum()),
            float(last / trial.mean()),
        ),
        ("VBPR on the shop, its own settings", float(np.mean(shop)), float(cost.mean() / np.mean(shop)), float(last / np.mean(shop))),
    ]
    lines = [
        f"# Overhead of a study of {args.trials} trials",
        "",
        f"Overhead of a trial: {1000 * cost.mean():.0f} ms on average, {1000 * last:.0f} ms for the last 20 (median {1000 * np.median(cost):.0f} ms). {os.cpu_count()} cores.",
        "",
        "| trials | seconds of a bare run | overhead | overhead of the last 20 |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {seconds:.2f} | {ratio:.2%} | {end:.2%} |" for name, seconds, ratio, end in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "search_overhead.md").write_text(text, encoding="utf-8")
    facts = {"trials": args.trials, "trial_s": trial.tolist(), "overhead_s": cost.tolist(), "shop_s": shop, "platform": platform.platform()}
    (args.out / "search_overhead.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
