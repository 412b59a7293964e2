"""Speed of PerPEFT-SASRec on ViT-B/32 with random weights, batch 16, length 10, against a loop that prepares every picture per batch.

Parts (`--parts`, all by default; each compares only what it measured itself):

* lora, ia3: one training step of (a) the straightforward loop in fp32, which opens, resizes and tokenises the batch's items each time,
  in sub-batches of 64 as the published code does; (b) our step in fp32; (c) our step with the frozen base in bf16. For (b) and (c) the
  share of the step that is the encoder's own forward and backward is taken inside the step: the rest is pictures, texts, negatives,
  SASRec, optimizer and bookkeeping.
* iisan: our step from cached hidden states against the straightforward loop, which runs CLIP forward for the batch's items.
* evaluation: the table of 2,000 items against the encoder's forward pass alone on the same inputs, prepared beforehand.

Usage: python benchmarks/perpeft_speed.py [--parts lora,ia3,iisan,evaluation] [--results benchmarks/results] [--batch 16]
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch
from PIL import Image

from recbole_mm.config import Config
from recbole_mm.files import write_json, write_text
from recbole_mm.model.perpeft.encoder import CLIPItems, spread_layers
from recbole_mm.quick_start import _build_model, _prepare
from recbole_mm.trainer.perpeft import PerPEFTTrainer

N_ITEMS, N_USERS, BATCH, LENGTH, EDGE = 2000, 64, 16, 10, 400
WORDS = "golf travel bag with wheels waterproof camping tent for two people red cotton garden chair steel bottle kids summer winter".split()


def write_data(folder: Path) -> None:
    """Pictures of 400 pixels, titles of 8 to 18 words, users with 13 items."""
    draw = np.random.default_rng(0)
    (folder / "bench" / "images").mkdir(parents=True)
    for item in range(N_ITEMS):
        small = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        small.resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(folder / "bench" / "images" / f"i{item}.jpg", quality=85)
    titles = [" ".join(draw.choice(WORDS, draw.integers(8, 19))) for _ in range(N_ITEMS)]
    table = pd.DataFrame({"item_id:token": [f"i{i}" for i in range(N_ITEMS)], "title:token_seq": titles})
    table.to_csv(folder / "bench" / "bench.item", sep="\t", index=False)
    items = np.concatenate([draw.choice(N_ITEMS, LENGTH + 3, replace=False) for _ in range(N_USERS)])
    inter = pd.DataFrame(
        {
            "user_id:token": np.repeat([f"u{u}" for u in range(N_USERS)], LENGTH + 3),
            "item_id:token": [f"i{i}" for i in items],
            "timestamp:float": np.tile(np.arange(LENGTH + 3), N_USERS),
        }
    )
    inter.to_csv(folder / "bench" / "bench.inter", sep="\t", index=False)


def build(folder: Path, **settings):
    """The model on the written data, and its trainer."""
    given = {
        "data_path": str(folder), "use_gpu": torch.cuda.is_available(), "tensorboard": False, "show_progress": False, "load_col": None,
        "checkpoint_dir": str(folder / "saved"), "pretrained": None, "MAX_ITEM_LIST_LENGTH": LENGTH, "train_batch_size": BATCH,
        "n_groups": 2, "epochs": 2, "global_epochs": 1, "state": "WARNING", **settings,
    }  # fmt: skip
    config = Config("PerPEFTSASRec", "bench", config_dict=given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, train, _, _ = _prepare(config)
        model = _build_model(config, train)
    return model, PerPEFTTrainer(config, model), dataset.content


class StraightforwardItems(CLIPItems):
    """Opens, resizes and tokenises what a batch needs, each time, in sub-batches."""

    def images(self, items):
        pictures = torch.stack([self.transform(self.content.image(item)) for item in items.tolist()])
        return pictures.to(self.pixel_scale.device, self.dtype)

    def text_chunks(self, items):
        for place in torch.arange(len(items), device=items.device).split(self.chunk):
            ids = self.tokenizer(self.content.texts(items[place].tolist()), context_length=77)
            longest = int((ids == self.tokenizer.eot_token_id).int().argmax(1).max()) + 1
            yield place, ids[:, :longest].to(items.device)


def straightforward(model, content) -> None:
    """Turn the model's encoder into the loop of the published code, in place."""
    import open_clip

    from recbole_mm.encoder.clip import MEAN, STD
    from recbole_mm.encoder.image import ImageTransform

    items = model.network.encoder.items
    items.__class__ = StraightforwardItems
    items.content, items.tokenizer = content, open_clip.SimpleTokenizer()
    items.transform = ImageTransform(items.config.vision_config.image_size, MEAN, STD)


class Clock:
    """Seconds that the encoder's forward and backward take inside a training step, and the distinct items it got."""

    def __init__(self, model):
        self.forward = self.inputs = self.backward = 0.0
        self.items = 0
        items = model.network.encoder.items
        encode, images = items.forward, items.images

        def timed_images(part):
            begin = time.perf_counter()
            out = images(part)
            self.inputs += time.perf_counter() - begin
            return out

        def timed(part):
            begin = time.perf_counter()
            out = encode(part)
            self.forward += time.perf_counter() - begin
            self.items = len(part)
            out.register_hook(self._arrived)
            return out

        items.images, items.forward = timed_images, timed

    def _arrived(self, gradient):
        self._begin = time.perf_counter()

    def after_backward(self):
        self.backward += time.perf_counter() - self._begin

    @property
    def encoder(self) -> float:
        return self.forward - self.inputs + self.backward


def step(model, trainer, clock=None) -> float:
    """Seconds of one training step as the trainer makes it, on 16 users."""
    users = model.training_users()[:BATCH]
    model.training_users = lambda: users
    if clock is not None:
        model.after_backward = clock.after_backward
    begin = time.perf_counter()
    trainer._train_epoch(None, 0)
    return time.perf_counter() - begin


def training(folder: Path, kind: str) -> dict:
    out = {}
    model, trainer, content = build(folder, peft_kind=kind, encoder_precision="fp32", peft_scope="global")
    content.image_tensor([1], _transform(model))  # the memory map is made once, before training
    clock = Clock(model)
    seconds = step(model, trainer, clock)
    out["ours_fp32"] = {
        "step_s": seconds,
        "items": clock.items,
        "items_per_s": clock.items / seconds,
        "encoder_share": clock.encoder / seconds,
    }
    del model, trainer, clock
    model, trainer, content = build(folder, peft_kind=kind, encoder_precision="fp32", peft_scope="global")
    straightforward(model, content)
    seconds = step(model, trainer)
    items = out["ours_fp32"]["items"]
    out["straightforward_fp32"] = {"step_s": seconds, "items": items, "items_per_s": items / seconds}
    del model, trainer
    model, trainer, _ = build(folder, peft_kind=kind, encoder_precision="bf16", peft_scope="global")
    clock = Clock(model)
    seconds = step(model, trainer, clock)
    out["ours_bf16"] = {
        "step_s": seconds,
        "items": clock.items,
        "items_per_s": clock.items / seconds,
        "encoder_share": clock.encoder / seconds,
    }
    out["speedup_bf16_over_straightforward"] = out["straightforward_fp32"]["step_s"] / seconds
    out["speedup_bf16_over_fp32"] = out["ours_fp32"]["step_s"] / seconds
    return out


def _transform(model):
    from recbole_mm.encoder.clip import MEAN, STD
    from recbole_mm.encoder.image import ImageTransform

    return ImageTransform(model.network.encoder.items.config.vision_config.image_size, MEAN, STD)


def iisan(folder: Path) -> dict:
    """The straightforward loop runs CLIP forward on the batch's items; the rest of its step is IISAN's, as ours."""
    model, trainer, content = build(folder, peft_kind="lora", encoder_precision="fp32", peft_scope="global")
    content.image_tensor([1], _transform(model))
    straightforward(model, content)
    users = model.training_users()[:BATCH]
    rows = model.sequences[users]
    negatives = model.sample_negatives(users, LENGTH)
    distinct = torch.cat((rows.flatten(), negatives.flatten())).unique()
    items = model.network.encoder.items
    depth = {"visual": items.config.vision_config.num_hidden_layers, "textual": items.config.text_config.num_hidden_layers}
    layers = {tower: spread_layers(n, 7) for tower, n in depth.items()}
    for layer in model.network.encoder.layers:
        layer.enable_adapters(False)
    begin = time.perf_counter()
    items.hidden_states(distinct[distinct > 0], layers)
    forward = time.perf_counter() - begin
    del model, trainer
    begin = time.perf_counter()
    model, trainer, _ = build(folder, peft_kind="iisan", encoder_precision="bf16", peft_scope="global")
    built = time.perf_counter() - begin
    step(model, trainer)
    seconds = float(np.median([step(model, trainer) for _ in range(20)]))
    return {
        "ours_step_s": seconds,
        "straightforward_step_s": forward + seconds,
        "items": int((distinct > 0).sum()),
        "speedup": (forward + seconds) / seconds,
        "build_with_cache_of_all_items_s": built,
    }


@torch.inference_mode()
def evaluation(folder: Path) -> dict:
    out = {}
    model, _, _ = build(folder, peft_kind="lora", encoder_precision="bf16", peft_scope="global")
    model.eval()
    items = model.network.encoder.items
    every = torch.arange(1, N_ITEMS + 1)
    items(every[: items.chunk])  # warm-up, and the memory map
    prepared = [items.images(part) for part in every.split(items.chunk)]
    texts = [ids for _, ids in items.text_chunks(every)]
    begin = time.perf_counter()
    for images in prepared:
        items._unit(items.clip.vision_model, items.clip.visual_projection, images)
    for ids in texts:
        items._unit(items.clip.text_model, items.clip.text_projection, ids)
    out["forward_alone_items_per_s"] = N_ITEMS / (time.perf_counter() - begin)
    del prepared, texts
    begin = time.perf_counter()
    model.before_evaluation()
    out["evaluation_items_per_s"] = N_ITEMS / (time.perf_counter() - begin)
    out["evaluation_of_forward"] = out["evaluation_items_per_s"] / out["forward_alone_items_per_s"]
    return out


def markdown(results: dict) -> str:
    lines = ["# PerPEFT-SASRec: speed", "", f"{results['machine']}; ViT-B/32 with random weights, batch {BATCH}, length {LENGTH}.", ""]
    rows = ["| kind | step | seconds | items/s | encoder's share |", "|---|---|---:|---:|---:|"]
    for kind in ("lora", "ia3"):
        for name in ("straightforward_fp32", "ours_fp32", "ours_bf16"):
            if kind in results:
                r = results[kind][name]
                share = f"{r['encoder_share']:.1%}" if "encoder_share" in r else "-"
                rows.append(f"| {kind} | {name.replace('_', ', ')} | {r['step_s']:.2f} | {r['items_per_s']:.1f} | {share} |")
    if len(rows) > 2:
        lines += [*rows, ""]
    for kind in ("lora", "ia3"):
        if kind in results:
            r = results[kind]
            lines.append(
                f"{kind}: our step in bf16 is {r['speedup_bf16_over_straightforward']:.2f} times as fast as the straightforward loop in fp32, "
                f"{r['speedup_bf16_over_fp32']:.2f} times as our own in fp32."
            )
    if "iisan" in results:
        r = results["iisan"]
        lines.append(
            f"iisan: {r['ours_step_s'] * 1000:.0f} ms a step from cached states, {r['straightforward_step_s']:.2f} s with CLIP in the loop: "
            f"{r['speedup']:.0f} times."
        )
    if "evaluation" in results:
        r = results["evaluation"]
        lines.append(
            f"evaluation of {N_ITEMS} items: {r['evaluation_items_per_s']:.1f} items/s, {r['evaluation_of_forward']:.1%} of the encoder's forward "
            f"alone ({r['forward_alone_items_per_s']:.1f})."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="lora,ia3,iisan,evaluation")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--batch", type=int, default=BATCH, help="users per step; fewer need less memory (16: up to 10 GB in fp32)")
    args = parser.parse_args()
    globals()["BATCH"] = args.batch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = args.results / "perpeft_speed.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results["machine"] = (
        f"{os.cpu_count()} x {platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for part in args.parts.split(","):
            results[part] = (
                iisan(Path(folder))
                if part == "iisan"
                else evaluation(Path(folder))
                if part == "evaluation"
                else training(Path(folder), part)
            )
            print(part, json.dumps(results[part], indent=1), flush=True)
            write_json(file, results)
            write_text(args.results / "perpeft_speed.md", markdown(results))


if __name__ == "__main__":
    main()
