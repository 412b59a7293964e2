"""Which models may share a batch by rows: two epochs in one process and in two, with the same settings; the difference of the loss curves.

    python benchmarks/distribution.py                    # all of RecBole's; models with a result in --work are skipped
    python benchmarks/distribution.py --models BPR FM    # some
    python benchmarks/distribution.py --table FILE       # where the table goes besides the console

Each model trains with its rows shared out, whatever `recbole_mm/trainer/parallel.py` says. Where the curve is that of one process to 1e-6, its loss is a mean
over rows (or a norm that is treated as such) and the model belongs into `parallel.ROWS`; all others (contrast within the batch, batch normalisation, noise per
row, sums) compute whole batches in every process. The data is a
slice of the ml-100k of RecBole's package: 50 users, 200 items. Every model runs with its defaults, dropout included, in batches of 255 rows, which
two processes cannot share equally.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recbole_models  # beside this file

from recbole_mm.files import write_json, write_text
from recbole_mm.launch import free_port

SKIPPED = {  # trainers of their own (decision trees, NCL), stages that need files of the one before, and what does not run in one process
    "XGBoost": "a trainer of its own, refused", "LightGBM": "a trainer of its own, refused", "NCL": "a trainer of its own, refused",
    "KSR": "does not run on today's libraries",
}  # fmt: skip
SETTINGS = {
    "epochs": 2, "train_batch_size": 255, "eval_step": 2, "use_gpu": False, "show_progress": False, "tensorboard": False, "state": "critical",
    "topk": [10], "metrics": ["Recall", "NDCG"], "valid_metric": "Recall@10", "metric_decimal_place": 9,
}  # fmt: skip
LABELED = {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC"}
STUCK_S = 300
LIMIT = 1e-6  # sums of 32-bit numbers in another order differ by 3e-7 here, batch normalisation by 7e-5


def settings_of(name: str, family: str, work: Path) -> dict:
    given = {**SETTINGS, **recbole_models.SETTINGS[family], **recbole_models.MODEL_SETTINGS.get(name, {})}
    if family in ("context-aware", "external"):
        given |= LABELED
    if name in ("S3Rec", "RaCT"):
        stage = "pretrain" if name == "S3Rec" else "actor_pretrain"
        given |= {"train_stage": stage, "pretrain_epochs": 2, "save_step": 9}
    if family == "sequential":
        given["MAX_ITEM_LIST_LENGTH"] = 10
        if "CE" in recbole_models.recbole_properties(name) or name in ("SASRec", "GRU4Rec"):
            given["train_neg_sample_args"] = None
    return {**given, "data_path": str(work / "data"), "checkpoint_dir": str(work / "saved")}


def train(name: str, family: str, work: Path) -> dict:
    """Losses of the epochs and the validation metrics of one run in this process group."""
    from recbole_mm import run
    from recbole_mm.trainer import trainer

    trainer.mode_of = lambda model: "rows"
    given = settings_of(name, family, work)
    try:
        record = run(name, recbole_models.DATASET, config_dict=given, saved=False, test=False)["record"]
    except Exception as error:  # a model that fails is a result
        if "train_neg_sample_args" not in str(error):
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        given.pop("train_neg_sample_args", None)
        try:
            record = run(name, recbole_models.DATASET, config_dict=given, saved=False, test=False)["record"]
        except Exception as again:
            return {"error": f"{type(again).__name__}: {again}".splitlines()[0][:300]}
    return {"loss": [e["train_loss"] for e in record["epochs"]], "valid": record["valid"]}


def worker(names: list[str], work: Path) -> None:
    """Run the models one after another; the first process writes what it finds."""
    warnings.simplefilter("ignore")
    import torch

    from recbole_mm.distributed import is_main, world

    torch.set_num_threads(1)
    every = recbole_models.models()
    for name in names:
        found = train(name, every[name], work)
        if is_main():
            write_json(work / f"{name}-{os.environ.get('WORLD_SIZE', 1)}.json", found)
        if "error" in found and world()[1] > 1:
            os._exit(3)  # the other process may wait for us: start again with the next model


def run_all(names: list[str], processes: int, work: Path) -> None:
    """Start the workers, again and again where one gets stuck or fails, until each model has a result."""

    def lacking() -> list[str]:
        return [n for n in names if not (work / f"{n}-{processes}.json").is_file()]

    while left := lacking():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        port = str(free_port())
        program = [sys.executable, __file__, "--work", str(work), "--worker", "--models", *left]
        started = [
            subprocess.Popen(program, stderr=subprocess.DEVNULL, env={
                **environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            })
            for rank in range(processes)
        ]  # fmt: skip
        moved, count = time.monotonic(), len(left)
        while all(p.poll() is None for p in started) and time.monotonic() - moved < STUCK_S:
            time.sleep(0.5)
            if len(lacking()) < count:
                moved, count = time.monotonic(), len(lacking())
        stuck = any(p.poll() is None for p in started)
        for p in started:
            p.kill()
            p.wait()
        still = lacking()
        if still and (stuck or len(still) == len(left)):
            write_json(work / f"{still[0]}-{processes}.json", {"error": "stuck or ended without a word"})


def difference(one: dict, two: dict) -> float:
    """Largest relative difference of the losses and of the validation metrics."""
    pairs = list(zip(one["loss"], two["loss"])) + [(one["valid"][k], two["valid"][k]) for k in one["valid"] or {}]
    return max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=math.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("/tmp/recbole-mm-distribution"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return worker(options.models, options.work)
    recbole_models.USERS, recbole_models.ITEMS = 50, 200
    recbole_models.make_data(options.work / "data")
    every = recbole_models.models()
    names = [n for n in options.models or every if n not in SKIPPED]
    for processes in (1, 2):
        run_all(names, processes, options.work)
    lines, rows = ["| model | family | largest difference | shared by rows |", "| --- | --- | ---: | --- |"], []
    for name in [*names, *(SKIPPED if not options.models else ())]:
        one, two = (json.loads(f.read_text()) if (f := options.work / f"{name}-{n}.json").is_file() else {} for n in (1, 2))
        reason = SKIPPED.get(name) or one.get("error") or two.get("error")
        if reason or not one.get("loss"):
            lines.append(f"| {name} | {every.get(name, '')} | - | no: {reason or 'no loss curve'} |")
            continue
        gap = difference(one, two)
        if not any(one["loss"]):
            lines.append(f"| {name} | {every[name]} | - | no: it counts, and has no loss |")
            continue
        if gap < LIMIT:
            rows.append(name)
        lines.append(f"| {name} | {every[name]} | {gap:.0e} | {'yes' if gap < LIMIT else 'no'} |")
    text = "\n".join(lines)
    print(text)
    print("\nROWS = {" + ", ".join(f'"{n}"' for n in sorted(rows)) + "}")
    if options.table:
        write_text(
            options.table,
            f"# Sharing batches by rows: RecBole's models\n\nMade by `python benchmarks/distribution.py`. {__doc__.split(chr(10) * 2)[2]}\n\n{text}\n",
        )


if __name__ == "__main__":
    main()
