"""What tests/test_distributed.py runs in one process and in two: each case gives plain values that have to agree.

As a program (``python -m tests.distributed_cases <folder> <case>...``) it is one of two workers, and the first writes the values. Starting Python and PyTorch takes
seconds, so one pair of workers runs all cases.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from tests.conftest import write_tastes
from tests.encoder.support import TINY_CLIP, TINY_VLMO, WORDS

QUIET = {"use_gpu": False, "show_progress": False, "tensorboard": False, "state": "error", "metric_decimal_place": 9}
#: 101 rows: two processes cannot share a batch equally
TASTES = {
    **QUIET, "dataset": "tastes", "epochs": 3, "train_batch_size": 101, "embedding_size": 8, "learning_rate": 0.01, "topk": [5],
    "valid_metric": "Recall@5", "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}  # fmt: skip
SASREC = {"hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 10}
MODELS = {
    "BPR": {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 2, "alpha": 1.0, "dynamic": False, "candidate_num": 0}},
    "LightGCN": {},
    "SASRec": SASREC,  # dropout 0.5
    "VBPR": {"gradient_accumulation": 2, "clip_grad_norm": {"max_norm": 0.1}},
    "MMGCN": {},
    "MMGCL": {},
    "SLMRec": {"distinct_items": True},
    "LATTICE": {"cf_model": "ngcf"},
    "MultiDAE": {},  # computed whole by every process
}
PERPEFT = {
    **QUIET, "model": "PerPEFTSASRec", "dataset": "small", "pretrained": "clip", "encoder_precision": "fp32", "train_batch_size": 17,
    "n_groups": 3, "epochs": 3, "global_epochs": 1, "peft_rank": 2, "peft_dropout": 0.0, "MAX_ITEM_LIST_LENGTH": 5, "hidden_size": 8,
    "n_heads": 2, "n_layers": 1, "learning_rate": 0.01, "metrics": ["Hit"], "topk": [10], "valid_metric": "Hit@10", "encoder_text_length": 8,
}  # fmt: skip
END2END = {
    **TASTES, "encoder": "tiny-clip", "encoder_training": "end2end", "encoder_sizes": TINY_CLIP["encoder_sizes"],
    "modalities": ["visual", "textual"], "text_fields": ["title"], "encoder_learning_rate": 0.003, "encoder_micro_batch": 16,
}  # fmt: skip
FINETUNE = {
    **QUIET, "dataset": "tastes", "seed": 1, "checkpoint_dir": "saved", "finetune_epochs": 2, "finetune_batch_size": 27,
    "finetune_micro_batch": 9, "finetune_valid_share": 0.2, "finetune_patience": 9, "finetune_learning_rate": 0.003, "finetune_crop": 0.8,
    "finetune_mirror": True, "finetune_word_dropout": 0.2, "text_fields": ["title"],
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the datasets of all cases, and a CLIP, into `folder`."""
    import torch
    from PIL import Image

    from recbole_mm.data.synthetic import make_shop, write_shop
    from recbole_mm.encoder.clip import TransformersNetwork
    from tests.model.test_perpeft_encoder import SIZES
    from tests.model.vip5_data import write_dataset

    tastes = write_tastes(folder / "dataset")
    draw = np.random.default_rng(0)
    (tastes / "images").mkdir()
    table = np.load(tastes / "visual.npy")
    for i, row in enumerate(table, start=1):
        pixels = draw.integers(0, 80, (16, 16, 3))
        pixels[:, :, int(row[0] > 0)] += 20
        Image.fromarray(pixels.astype(np.uint8)).save(tastes / "images" / f"i{i}.png")
    titles = [f"i{i}\t{WORDS[int(row[0] > 0)]} {WORDS[3 + i % 2]} number{i}" for i, row in enumerate(table, start=1)]
    (tastes / "tastes.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(titles) + "\n", encoding="utf-8")
    write_dataset(folder / "dataset")
    write_shop(make_shop(60, 60, 480, seed=3, reviews=False), folder / "dataset" / "small")
    torch.manual_seed(0)
    TransformersNetwork({"encoder_sizes": SIZES}).save(folder / "clip")


def values(record: dict) -> dict:
    """What two runs must agree in."""
    return {
        "loss": [e["train_loss"] for e in record["epochs"]],
        "valid": [e["valid"] for e in record["epochs"]],
        "test": record["test"],
        "groups": record["test_groups"],
        "best_epoch": record["best_epoch"],
    }


def train(model=None, **settings) -> dict:
    from recbole_mm import run

    return values(run(model, config_dict=settings)["record"])


def finetune(base: dict, folder: str) -> dict:
    from recbole_mm.config import Config
    from recbole_mm.distributed import world
    from recbole_mm.encoder.finetune import Finetuner

    given = {**FINETUNE, **base}
    tuner = Finetuner(Config("BPR", config_dict=given), Path("saved") / f"{folder}-{world()[1]}", given)
    tuner.fit()
    assert (tuner.finish()).is_dir()
    return {"loss": [e["train_loss"] for e in tuner.history], "valid": [e["valid_loss"] for e in tuner.history]}


class Killed(BaseException):
    pass


def resumed() -> dict:
    """A run that is broken off after its second epoch, and continued."""
    from recbole_mm import run
    from recbole_mm.distributed import world

    def kill(epoch, score):
        if epoch == 1:
            raise Killed

    name = f"broken-{world()[1]}"
    settings = {**TASTES, "checkpoint_seconds": 0, "run_name": name, **SASREC}
    try:
        run("SASRec", config_dict=settings, callback=kill)
    except Killed:
        pass
    return values(run(resume=f"saved/{name}")["record"])


def left_broken() -> dict:
    """A run that is broken off and left for another number of processes."""
    from recbole_mm import run
    from recbole_mm.distributed import world

    def kill(epoch, score):
        if epoch == 1:
            raise Killed

    settings = {**TASTES, "checkpoint_seconds": 0, "run_name": f"left-{world()[1]}"}
    try:
        run("VBPR", config_dict=settings, callback=kill)
    except Killed:
        pass
    return {}


def refused() -> dict:
    """Messages of runs that cannot work in several processes; in one they are none."""
    from recbole_mm import run
    from recbole_mm.distributed import world
    from recbole_mm.errors import UserError

    if world()[1] == 1:
        return {}
    found = {}
    for model, settings in (("NCL", {}), ("VBPR", {"run_name": "left-2"})):
        try:
            run(model, config_dict={**TASTES, **settings})
        except UserError as error:
            found[model] = str(error)
    return found


CASES = {
    **{name: lambda name=name, more=more: train(name, **{**TASTES, **more}) for name, more in MODELS.items()},
    "PerPEFTSASRec": lambda: train(**PERPEFT),
    "VIP5": lambda: vip5(),
    "end2end": lambda: train("VBPR", **END2END),
    "finetune": lambda: finetune({"encoder": "tiny-clip", "encoder_sizes": TINY_CLIP["encoder_sizes"]}, "clip"),
    "resumed": resumed,
    "left_broken": left_broken,
    "refused": refused,
}
#: for the slow suite
SLOW_CASES = {
    "MMGCL published": lambda: train("MMGCL", **TASTES, published=True, resample="epoch"),
    "SLMRec counted": lambda: train("SLMRec", **TASTES),
    "LATTICE lightgcn": lambda: train("LATTICE", **{**TASTES, "stop_on": "loss"}),
    "VIP5 token": lambda: vip5(loss_weighting="token", fine_tuning="full", dropout=0.0),
    "PerPEFTSASRec iisan": lambda: train(**{**PERPEFT, "peft_kind": "iisan", "iisan_states": 3, "stop_on": "loss"}),
    "end2end LATTICE": lambda: train("LATTICE", **END2END),
    "end2end SLMRec": lambda: train("SLMRec", **END2END, bank_refresh_epochs=1, gradient_accumulation=2),
    "finetune vlmo": lambda: finetune({"encoder": "vlmo", **{k: v for k, v in TINY_VLMO.items() if k != "feature"}}, "vlmo"),
    "uni100": lambda: train("BPR", **{**TASTES, "eval_args": {**TASTES["eval_args"], "mode": "uni20"}}),
}


def vip5(**settings) -> dict:
    from tests.model.vip5_data import SMALL

    return train("VIP5", **{**SMALL, **QUIET, "dataset": "tiny", "epochs": 2, "train_batch_size": 25, **settings})


def run_cases(folder: Path, names: list[str]) -> dict:
    """The values of the cases, computed in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return json.loads(json.dumps({name: {**CASES, **SLOW_CASES}[name]() for name in names}))
    finally:
        os.chdir(before)


def main(folder: str, *names: str) -> None:
    import torch

    torch.set_num_threads(1)
    found = run_cases(Path(folder), list(names))
    from recbole_mm.distributed import is_main

    if is_main():
        (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
