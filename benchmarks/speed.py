"""Speed of training and evaluation against RecBole, as ratios measured in one run.

    python benchmarks/speed.py --data=../shared/data --repetitions=7

Every repetition runs all variants one after the other, so a disturbance of the machine hits them alike; a ratio is formed within each repetition, and its
median and range over the repetitions are reported, beside the ratio of the fastest times. RecBole's side is RecBole's Config, loaders, sampler, Trainer and
evaluator on today's libraries through `recbole_mm.compat`; ours is what ``recbole-mm`` runs. Same data (tiktok, 59,541 training
interactions, 3,051 validation users, 6,710 items), batch 2048, embedding size 64, no progress bar.

"everything but model and optimizer" is an epoch of our Trainer on a model whose loss is one parameter and whose optimizer steps that parameter: batching,
shuffling, negative sampling, checks and logging, and a little more than that.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recbole
import torch

import recbole_mm
from recbole_mm.files import write_json, write_text

EVERY_USER_AT_ONCE = 3051 * 6711
SETTINGS = {
    "benchmark_filename": ["train", "valid", "test"], "load_col": {"inter": ["user_id", "item_id"]}, "train_batch_size": 2048, "embedding_size": 64,
    "metrics": ["Recall", "MRR", "NDCG", "Hit", "Precision"], "topk": [10, 20], "valid_metric": "Recall@20", "show_progress": False, "use_gpu": False,
    "eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": "user", "order": "RO", "mode": "full"}, "seed": 1,
}  # fmt: skip


def recbole_side(model: str, data: str, folder: str, **more):
    """(trainer, train, valid) made of nothing but RecBole."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    arguments, sys.argv = sys.argv, sys.argv[:1]  # RecBole's Config reads the command line
    config = Config(model, "tiktok", config_dict={**SETTINGS, "data_path": data, "checkpoint_dir": folder, **more})
    sys.argv = arguments
    init_seed(config["seed"], True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    network = get_model(model)(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    trainer.eval_collector.data_collect(train)
    return trainer, train, valid


def our_side(model, data: str, folder: str, **more):
    """(trainer, train, valid) as `recbole_mm.run` makes them."""
    from recbole.utils import init_seed

    from recbole_mm.config import Config
    from recbole_mm.data.loader import data_preparation
    from recbole_mm.quick_start import create_dataset
    from recbole_mm.trainer import trainer_class_for

    config = Config(model, "tiktok", config_dict={**SETTINGS, "data_path": data, "checkpoint_dir": folder, "tensorboard": False, **more})
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    from recbole_mm.model import get_model

    network_class = get_model(model) if isinstance(model, str) else model
    network = network_class(config, train.dataset).to(config["device"])
    trainer = trainer_class_for(network_class, config)(config, network)
    trainer.eval_collector.data_collect(train)
    return trainer, train, valid


def nothing_model():
    """A model that does nothing: what remains of its epoch is the trainer and the loader."""
    from recbole.model.abstract_recommender import GeneralRecommender
    from recbole.utils import InputType

    class Nothing(GeneralRecommender):
        input_type = InputType.PAIRWISE

        def __init__(self, config, dataset):
            super().__init__(config, dataset)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def calculate_loss(self, interaction):
            return self.weight.sum()

    return Nothing


def seconds(function) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call."""
    begin, busy = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begin, time.process_time() - busy


def epoch(side):
    trainer, train, _ = side

    def one():
        loss = trainer._train_epoch(train, 0)
        trainer.logger.info(trainer._generate_train_loss_output(0, 0.0, 0.0, loss))

    return one


def measure(data: str, repetitions: int, folder: str) -> dict:
    """Times of every variant in every repetition."""
    lightgcn, bpr = (recbole_side(model, data, folder) for model in ("LightGCN", "BPR"))
    ours = {model: our_side(model, data, folder) for model in ("BPR", "VBPR", "LightGCN")}
    nothing = our_side("BPR", data, folder)
    network = nothing_model()(nothing[0].config, nothing[1].dataset)
    nothing = (type(nothing[0])(nothing[0].config, network), nothing[1], None)

    evaluated, _, valid = ours["BPR"]
    theirs = bpr[0]
    theirs.model = evaluated.model
    loaders = {"default": recbole_side("BPR", data, folder)[2]}
    for name, size in (("large (every user at once)", EVERY_USER_AT_ONCE), ("large (256 users)", 256 * 6711)):
        loaders[name] = recbole_side("BPR", data, folder, eval_batch_size=size)[2]
    results = {}

    def evaluate_theirs(name):
        def one():
            results[name] = theirs.evaluate(loaders[name], load_best_model=False)

        return one

    def evaluate_ours():
        results["ours"] = evaluated.evaluate(valid, load_best_model=False)

    variants = {
        "RecBole LightGCN epoch": epoch(lightgcn),
        "RecBole BPR epoch": epoch((recbole_side("BPR", data, folder)[0], bpr[1], None)),
        "our BPR epoch": epoch(ours["BPR"]),
        "our VBPR epoch": epoch(ours["VBPR"]),
        "our LightGCN epoch": epoch(ours["LightGCN"]),
        "our epoch without model and optimizer": epoch(nothing),
        **{f"RecBole evaluation, {name}": evaluate_theirs(name) for name in loaders},
        "our evaluation": evaluate_ours,
    }
    for function in variants.values():  # warm up
        function()
    times, processor = {name: [] for name in variants}, {name: [] for name in variants}
    for _ in range(repetitions):
        for name, function in variants.items():
            wall, busy = seconds(function)
            times[name].append(wall)
            processor[name].append(busy)
    if any(result != results["ours"] for result in results.values()):
        raise SystemExit(f"The metrics differ: {results}")
    return {"times_s": times, "processor_s": processor, "metrics": {k: float(v) for k, v in results["ours"].items()}}


def ratios(times: dict[str, list[float]], processor: dict[str, list[float]]) -> list[dict]:
    """The claims of issue 2 with what was measured."""
    large = min((name for name in times if "large" in name), key=lambda name: min(times[name]))
    claims = [
        ("full-sort evaluation, times faster than RecBole's default", "RecBole evaluation, default", "our evaluation", ">= 6"),
        (f"full-sort evaluation, times faster than RecBole {large.split(', ')[1]}", large, "our evaluation", ">= 1.5"),
        (
            "epoch without model and optimizer / RecBole LightGCN epoch",
            "our epoch without model and optimizer",
            "RecBole LightGCN epoch",
            "< 0.03",
        ),
        ("our BPR epoch / RecBole BPR epoch", "our BPR epoch", "RecBole BPR epoch", "<= 1"),
        ("our VBPR epoch / RecBole LightGCN epoch", "our VBPR epoch", "RecBole LightGCN epoch", "<= 0.25"),
        ("our LightGCN epoch / RecBole LightGCN epoch", "our LightGCN epoch", "RecBole LightGCN epoch", "-"),
    ]
    table = []
    for what, above, below, target in claims:
        each = [a / b for a, b in zip(times[above], times[below])]
        relation, _, limit = target.partition(" ")
        median = statistics.median(each)
        held = {">=": median >= float(limit or 0), "<=": median <= float(limit or 0), "<": median < float(limit or 0)}.get(relation)
        row = {"what": what, "target": target, "median": median, "min": min(each), "max": max(each), "holds": held}
        row["of_minima"] = min(times[above]) / min(times[below])
        row["of_processor_time"] = statistics.median(a / b for a, b in zip(processor[above], processor[below]))
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("RECBOLE_MM_DATA", "../shared/data"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "results" / "speed"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments.data, arguments.repetitions, folder)
    table = ratios(measured["times_s"], measured["processor_s"])
    machine = {
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_before": load, "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__, "python": platform.python_version(), "recbole": recbole.__version__, "date": date.today().isoformat(),
    }  # fmt: skip
    write_json(arguments.out + ".json", {"machine": machine, "repetitions": arguments.repetitions, "ratios": table, **measured})
    lines = [
        "# Speed against RecBole 1.2.1", "",
        f"tiktok, {machine['threads']} thread(s) of {machine['cores']} cores, {arguments.repetitions} interleaved repetitions, torch {torch.__version__}, {machine['date']}; "
        f"load of the machine before the run {load:.1f}" + (" (NOT quiet: trust the column of processor time, which other programs disturb less)." if load > 1 else "."), "",
        "Repeat with `python benchmarks/speed.py`; every repetition is in speed.json.", "",
        "| ratio | target | median | min | max | of the fastest | of processor time | holds |", "|---|---|---|---|---|---|---|---|",
        *(f"| {r['what']} | {r['target']} | {r['median']:.3f} | {r['min']:.3f} | {r['max']:.3f} | {r['of_minima']:.3f} | {r['of_processor_time']:.3f} "
          f"| {'' if r['holds'] is None else 'yes' if r['holds'] else 'NO'} |" for r in table),
        "", "| seconds | fastest | median | slowest |", "|---|---|---|---|",
        *(f"| {name} | {min(t):.4f} | {statistics.median(t):.4f} | {max(t):.4f} |" for name, t in measured["times_s"].items()),
    ]  # fmt: skip
    write_text(arguments.out + ".md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    recbole_mm.compat  # noqa: B018  importing it is what makes RecBole run
    main()
