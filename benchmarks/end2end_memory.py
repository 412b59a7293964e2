"""Memory of end-to-end training above a frozen run of the same model: by number of items and batch size.

    python benchmarks/end2end_memory.py [--model VBPR SLMRec] [--items 1000 20000] [--batch 32 256] [--out benchmarks/results/end2end_memory.json]

Each cell is a process of its own that builds the model, trains a few steps with Adam and encodes the catalogue; its figure is the peak of
its resident memory. Pictures are computed from the item's number, so that no cache of pictures counts. Besides the peak, the largest
number of inputs that ever went through the encoder at once is recorded.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

STEPS = 4
SIZES = {
    "joint_width": 64, "width": 128, "layers": 2, "heads": 4, "patch_size": 16, "image_size": 64,
    "text_width": 64, "text_layers": 1, "text_heads": 4, "context": 16,
}  # fmt: skip


class Catalogue:
    """Items whose pictures and texts follow from their number."""

    has_images, has_texts = True, True

    def __init__(self, items: int):
        self.tokens = range(items + 1)

    def image_path(self, i: int):
        return "computed"

    def texts(self, ids) -> list[str]:
        return [f"red mug number {i % 100} of good steel" for i in ids]

    def image_tensor(self, items, transform) -> torch.Tensor:
        edge = transform.size
        ramp = torch.arange(3 * edge * edge, dtype=torch.int64).view(3, edge, edge)
        return torch.stack([((ramp * (i + 1)) % 251).to(torch.uint8) for i in items])


def cell(model: str, items: int, batch: int, training: str) -> dict:
    """Train a few steps and report this process's peak memory."""
    import open_clip  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401 -- what both runs import counts for both
    from recbole.data.interaction import Interaction

    from recbole_mm.model import get_model
    from recbole_mm.testing import array_dataset, test_config, total_loss
    from recbole_mm.trainer import Trainer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    users = 2000
    draw = np.random.default_rng(0)
    pairs = np.unique(np.stack([draw.integers(1, users, 40_000), draw.integers(1, items + 1, 40_000)], axis=1), axis=0)
    settings = {"encoder": "tiny-clip", "encoder_training": training, "encoder_sizes": SIZES} if training == "end2end" else {}
    config = test_config(model, train_batch_size=batch, **settings)
    features = None
    if training == "frozen":
        features = {"visual": torch.randn(items + 1, SIZES["width"]), "textual": torch.randn(items + 1, SIZES["text_width"])}
    dataset = array_dataset(config, pairs, users, items + 1, features)
    dataset.content = Catalogue(items)
    largest = [0]
    built = get_model(model)(config, dataset)
    if training == "end2end":
        encode = built.features.encoder.encode

        def watched(images=None, texts=None):
            largest[0] = max(largest[0], *(len(x) for x in (images, texts) if x is not None))
            return encode(images, texts)

        built.features.encoder.encode = watched
    trainer = Trainer(config, built)
    built.train()
    trainer._hook("before_epoch", 0)
    for _ in range(STEPS):
        rows = pairs[draw.integers(0, len(pairs), batch)]
        columns = {built.USER_ID: torch.from_numpy(rows[:, 0].copy()), built.ITEM_ID: torch.from_numpy(rows[:, 1].copy())}
        if "neg_" in built.NEG_ITEM_ID and config["train_neg_sample_args"]["distribution"] != "none":
            columns[built.NEG_ITEM_ID] = torch.from_numpy(draw.integers(1, items + 1, batch))
        interaction = Interaction(columns)
        trainer.optimizer.zero_grad()
        trainer._hook("before_batch", interaction)
        total_loss(built.calculate_loss(interaction)).backward()
        trainer._hook("after_backward")
        trainer.optimizer.step()
    built.eval()
    built.evaluation_vectors()
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "largest_pass": largest[0]}


def table(rows: list[dict]) -> str:
    names = ("model", "items", "batch", "frozen_mb", "end2end_mb", "above_mb", "largest_pass")
    lines = [
        "# Peak memory of end-to-end training (MiB)", "", "Made by `python benchmarks/end2end_memory.py`: one process per cell, peak of resident memory.",
        "`above_mb` is the encoder with its gradient and Adam state, and one micro-batch of 32; `largest_pass` the most inputs encoded at once.", "",
        f"| {' | '.join(names)} |", "|" + "---|" * len(names),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"| {' | '.join(str(row[n]) for n in names)} |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["VBPR", "SLMRec"])
    parser.add_argument("--items", nargs="+", type=int, default=[1000, 20000])
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 256])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "end2end_memory.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(**json.loads(args.cell))))
        return
    rows = []
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    for model in args.model:
        for items in args.items:
            for batch in args.batch:
                peaks = {}
                for training in ("frozen", "end2end"):
                    wanted = json.dumps({"model": model, "items": items, "batch": batch, "training": training})
                    done = subprocess.run(
                        [sys.executable, __file__, "--cell", wanted], env=environment, capture_output=True, text=True, check=True
                    )
                    peaks[training] = json.loads(done.stdout.splitlines()[-1])
                rows.append(
                    {
                        "model": model, "items": items, "batch": batch, "frozen_mb": round(peaks["frozen"]["peak_mb"], 1),
                        "end2end_mb": round(peaks["end2end"]["peak_mb"], 1),
                        "above_mb": round(peaks["end2end"]["peak_mb"] - peaks["frozen"]["peak_mb"], 1),
                        "largest_pass": peaks["end2end"]["largest_pass"],
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
    from recbole_mm.files import write_json, write_text

    write_text(args.out.with_suffix(".md"), table(rows))
    write_json(args.out, {"encoder_sizes": SIZES, "micro_batch": 32, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
