"""Quality on real data with the shipped settings: runs the command line for every model and seed, then writes the table.

    python benchmarks/quality_graph.py --data=../shared/data --runs=saved/quality                       # tiktok, all models, seeds 1 2 3
    python benchmarks/quality_graph.py --dataset=amazon-baby --models=LightGCN
    python benchmarks/quality_graph.py --dataset=amazon-beauty --models=SASRec --metric=hit@10
    python benchmarks/quality_graph.py --collect                                                        # table of what is there

Selection is on validation (the models' property files say which metric stops), the test set is looked at once. tiktok and amazon-baby run under ``eval_mask: train``. A run that is
there and finished is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("BPR", "LightGCN", "VBPR", "MMGCN", "SLMRec", "LATTICE", "MMGCL")
SHOWN = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


def finished(folder: Path) -> dict | None:
    file = folder / "result.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record if record["status"] == "finished" else None


def start(model: str, dataset: str, seed: int, data: str, runs: Path) -> None:
    """One run of the command line."""
    name = f"{model}-{dataset}-{seed}"
    mask = [] if dataset == "amazon-beauty" else ["--eval_mask=train"]
    subprocess.run(
        [sys.executable, str(ROOT / "run_recbole_mm.py"), f"--model={model}", f"--dataset={dataset}", f"--seed={seed}", f"--data_path={data}", "--use_gpu=False",
         "--tensorboard=False", "--show_progress=False", "--save_last=False", f"--run_name={name}", f"--checkpoint_dir={runs}", *mask],
        check=True,
    )  # fmt: skip


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("RECBOLE_MM_DATA", str(ROOT.parent / "shared" / "data")))
    parser.add_argument("--dataset", default="tiktok")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--metric", default="recall@20", help="also shown for validation, cold and warm items")
    parser.add_argument("--runs", default="saved/quality")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    runs, models, seeds = Path(arguments.runs), arguments.models.split(","), [int(s) for s in arguments.seeds.split(",")]
    found: dict[str, list[dict]] = {model: [] for model in models}
    for seed in seeds:
        for model in models:
            folder = runs / f"{model}-{arguments.dataset}-{seed}"
            if finished(folder) is None and not arguments.collect:
                start(model, arguments.dataset, seed, arguments.data, runs)
            record = finished(folder)
            if record is not None:
                found[model].append(record)
    metric = arguments.metric
    shown = [m for m in (*SHOWN, "hit@5", "hit@10", "ndcg@5") if any(m in r["test"] for records in found.values() for r in records)]
    lines = [
        f"# Quality on {arguments.dataset}", "",
        f"Shipped property files, {', '.join(map(str, seeds))} as seeds, mean ± standard deviation over the runs that finished, {date.today().isoformat()}. Selection on validation; "
        f"{'RecBole convention for sequential models' if arguments.dataset == 'amazon-beauty' else 'all items ranked under `eval_mask: train`'}. Repeat with `python benchmarks/quality_graph.py --dataset={arguments.dataset} --models={','.join(models)}`.", "",
        f"| model | runs | validation {metric} | " + " | ".join(f"test {m}" for m in shown) + f" | {metric}, cold items | {metric}, warm items | best epoch | epoch, s |",
        "|---" * (len(shown) + 7) + "|",
    ]  # fmt: skip
    for model, records in found.items():
        groups = [
            spread([r["test_groups"][g][metric] for r in records if (r.get("test_groups") or {}).get(g, {}).get(metric) is not None])
            for g in ("cold", "warm")
        ]
        cells = [spread([r["valid"][metric] for r in records if metric in r["valid"]])]
        cells += [spread([r["test"][m] for r in records if m in r["test"]]) for m in shown]
        epochs = ", ".join(str(r["best_epoch"]) for r in records) or "-"
        seconds = f"{statistics.median(t for r in records for t in r['time']['epoch_s']):.2f}" if records else "-"
        lines.append(f"| {model} | {len(records)} | " + " | ".join([*cells, *groups]) + f" | {epochs} | {seconds} |")
    name = arguments.dataset
    write_text(ROOT / "benchmarks" / "quality" / f"{name}.md", "\n".join(lines) + "\n" + note(name))
    kept = ("seed", "settings", "protocol", "valid", "test", "test_groups", "best_epoch", "best_valid_score", "parameters", "time")
    raw = {model: [{key: r.get(key) for key in kept} for r in records] for model, records in found.items()}
    write_json(ROOT / "benchmarks" / "quality" / f"{name}.json", raw)
    print("\n".join(lines))


def note(dataset: str) -> str:
    """What was tried, kept beside the table."""
    file = ROOT / "benchmarks" / "quality" / f"{dataset}.notes.md"
    return "\n" + file.read_text(encoding="utf-8") if file.is_file() else ""


if __name__ == "__main__":
    main()
