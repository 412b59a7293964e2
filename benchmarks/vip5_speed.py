"""Speed of VIP5 at T5-small size against plain transformers, both measured in this run, on the bundled shop.

    python benchmarks/vip5_speed.py            # all parts, one thread, about three minutes
    python benchmarks/vip5_speed.py --part=table5

training: the same samples with the same network. Plain: one sample at a time is rendered as text and tokenised, the feature of every
item is read from a file of its own, batches are drawn at random and padded to their longest. Ours: the loader of recbole_mm.
search: the best 20 items of a user. Plain: transformers' ``generate`` with 20 beams and ``prefix_allowed_tokens_fn``. Ours: ``VIP5.rank``.
table5: trainable share, time and memory of a step for the three ways of fine-tuning, as table 5 of the paper.

Weights are random (speed does not depend on them); vocabulary 32,100, feature width that of the data. Writes benchmarks/results/vip5_speed.json and .md.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.config import Config
from recbole_mm.encoder.extract import ensure_features
from recbole_mm.files import write_json, write_text
from recbole_mm.model.vip5 import VIP5
from recbole_mm.model.vip5.network import NetworkSettings, VIP5Network, per_token_loss, training_loss
from recbole_mm.model.vip5.prompts import load_prompts
from recbole_mm.model.vip5.samples import EpochLoader, sequential_sample
from recbole_mm.model.vip5.tokenizer import PHOTO, train_tokenizer
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import properties_dir
from recbole_mm.quick_start import create_dataset

RESULTS = Path(__file__).resolve().parent / "results"


def t5_small(folder: Path) -> None:
    """A checkpoint of T5-small's size and a tokenizer with 32,100 pieces, in which item numbers are several pieces as in T5's."""
    texts = [f"{p.source} {p.target}" for p in load_prompts().values()]
    small = train_tokenizer(texts, [], 1500)
    filler = [str(10_000_000 + i) for i in range(32_100 - small.size)]
    pieces = train_tokenizer(texts, filler, 1500)
    assert pieces.size == 32_100, pieces.size
    pieces.tokenizer.save(str(folder / "tokenizer.json"))
    network = VIP5Network(NetworkSettings(n_vis_tokens=0, use_adapter=False))
    torch.save(
        {n: v for n, v in network.state_dict().items() if "whole_word" not in n and "category" not in n}, folder / "pytorch_model.bin"
    )


def build(folder: Path, **settings):
    """VIP5 on the shop from the checkpoint in `folder`, with the general settings, not those of a small network for the shop."""
    general = load_yaml(properties_dir() / "model" / "VIP5.yaml")
    config = Config(
        "VIP5",
        "shop",
        config_dict={**{key: general[key] for key in general["per_dataset"]["shop"]}, "language_model": str(folder), "use_gpu": False, "state": "ERROR", "show_progress": False, "tensorboard": False, "seed": 1, **settings},
    )  # fmt: skip
    ensure_features(config)
    train = create_dataset(config).build()[0]
    torch.manual_seed(0)
    return VIP5(config, train)


class PlainLoader:
    """What the release's loader does for given samples: text, tokenizer, one feature file per item, padding to the longest of the batch."""

    def __init__(self, model, folder: Path):
        self.model, self.folder = model, folder
        table = next(iter(model.features.values())).numpy()
        for item in range(1, model.n_items):
            np.save(folder / f"{item}.npy", table[item])

    def sample(self, prompt, slots):
        """Ids, whole-word ids, mask of visual places, features and target of one sample."""
        tokenizer = self.model.pieces.tokenizer
        source, target = self.model.renderer.text(prompt, slots)
        encoding = tokenizer.encode(source)
        ids, words, count = [*encoding.ids[:1023], 1], [], 0
        for piece in encoding.tokens[:1023]:
            count += piece.startswith("▁") or piece == PHOTO
            words.append(count)
        items = list(slots.items) if {"candidates", "purchase_history"} & set(prompt.source_args) else []
        items += [slots.item] if "item_photo" in prompt.source_args else []
        features = [np.load(self.folder / f"{item}.npy") for item in items] or [np.zeros(self.model.network.settings.feat_dim, np.float32)]
        return ids, [*words, 0], [i == self.model.pieces.photo for i in ids], np.stack(features), [*tokenizer.encode(target).ids[:63], 1]

    def batch(self, samples):
        """Tensors of one batch, padded."""
        rows = [self.sample(*s) for s in samples]
        size, width, rows_v = max(len(r[0]) for r in rows), max(len(r[4]) for r in rows), max(len(r[3]) for r in rows)
        ids, words = torch.zeros(len(rows), size, dtype=torch.long), torch.zeros(len(rows), size, dtype=torch.long)
        place, labels = torch.zeros(len(rows), size, dtype=torch.bool), torch.full((len(rows), width), -100)
        visual = torch.zeros(len(rows), rows_v, rows[0][3].shape[1])
        for i, (a, b, c, d, e) in enumerate(rows):
            ids[i, : len(a)], words[i, : len(b)], place[i, : len(c)] = torch.tensor(a), torch.tensor(b), torch.tensor(c)
            visual[i, : len(d)], labels[i, : len(e)] = torch.from_numpy(d), torch.tensor(e)
        return ids, words, place, visual, labels

    def encode(self, ids, words, place, visual):
        """Encoder states of a padded batch: the visual map runs over every row, padding included."""
        network, k = self.model.network, self.model.k
        tokens = network.visual_tokens(visual.flatten(0, 1))
        index = place.long().cumsum(1) - 1 + torch.arange(len(ids))[:, None] * visual.shape[1] * k
        mask = (ids != 0).long()
        return network.encode(network.embed(ids, words, tokens, torch.where(place, index, -1)), mask), mask

    def loss(self, samples):
        """Loss of the given samples."""
        ids, words, place, visual, labels = self.batch(samples)
        encoded, mask = self.encode(ids, words, place, visual)
        return training_loss(per_token_loss(self.model.network.logits(encoded, mask, labels), labels), labels, "sample")


def measure_training(folder: Path, n_batches: int, batch_size: int) -> dict:
    """Seconds per sample of both ways on the same samples of one epoch."""
    model = build(folder, train_batch_size=batch_size)
    model.train()
    plain = PlainLoader(model, folder)
    loader = EpochLoader(model.sequences, model.records, model.train_prompts, model.renderer, model.negative_pool, model.sampling, 0)
    rng = np.random.default_rng(0)
    loader.batches = [loader.batches[i] for i in rng.permutation(len(loader.batches))[:n_batches]]  # an even share of all lengths
    samples = [s for b in range(n_batches) for s in loader.samples(b)]
    mixed = [samples[i] for i in rng.permutation(len(samples))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step(plain.loss(mixed[:2]))  # warm-up
    begin = time.perf_counter()
    tokens = 0
    for batch in loader:
        step(model.calculate_loss(batch))
        tokens += batch.input_ids.numel()
    ours = time.perf_counter() - begin
    begin = time.perf_counter()
    padded = 0
    for at in range(0, len(mixed), batch_size):
        step(plain.loss(mixed[at : at + batch_size]))
        padded += 0
    theirs = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in loader:
        pass
    load = time.perf_counter() - begin
    begin = time.perf_counter()
    for at in range(0, len(mixed), batch_size):
        padded += plain.batch(mixed[at : at + batch_size])[0].numel()
    return {
        "samples": len(samples),
        "ours_ms_per_sample": 1e3 * ours / len(samples),
        "plain_ms_per_sample": 1e3 * theirs / len(samples),
        "ratio": theirs / ours,
        "loading_ours_ms_per_sample": 1e3 * load / len(samples),
        "loading_plain_ms_per_sample": 1e3 * (time.perf_counter() - begin) / len(samples),
        "tokens_ours": tokens,
        "tokens_plain": padded,
    }


def measure_search(folder: Path, users: int, repetitions: int) -> dict:
    """Seconds for the best 20 items of `users` users."""
    model = build(folder, eval_batch_size=users)
    model.eval()
    plain = PlainLoader(model, folder)
    prompt = model.all_prompts["A-3"]
    samples = [sequential_sample(prompt, u, model.sequences.of(u)[-12:-1]) for u in range(1, users + 1)]
    follow: dict = {}
    name = {}
    for item in range(1, model.n_items):
        tokens = [*model.pieces.ids(str(model.facts.item_number[item])).tolist(), 1]
        name[tuple(tokens)] = item
        for i in range(len(tokens)):
            follow.setdefault(tuple(tokens[:i]), set()).add(tokens[i])
    follow = {prefix: sorted(tokens) for prefix, tokens in follow.items()}

    @torch.no_grad()
    def theirs():
        ids, words, place, visual, _ = plain.batch(samples)
        encoded, mask = plain.encode(ids, words, place, visual)
        out = model.network.generate(
            encoder_outputs=model.network.encoder_outputs(encoded), attention_mask=mask, num_beams=20, num_return_sequences=20, max_length=10,
            do_sample=False, early_stopping=True, prefix_allowed_tokens_fn=lambda b, s: follow.get(tuple(s[1:].tolist()), [1]),
        )  # fmt: skip
        return [name.get(tuple([*[t for t in row[1:] if t > 1], 1])) for row in out.tolist()]

    times: dict = {"ours": [], "plain": []}
    model.rank(samples, 20)
    theirs()
    for _ in range(repetitions):
        begin = time.perf_counter()
        items, _ = model.rank(samples, 20)
        times["ours"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        named = theirs()
        times["plain"].append(time.perf_counter() - begin)
    assert all(named) and (items > 0).all()
    ours, plain_s = (float(np.median(times[n])) for n in ("ours", "plain"))
    return {
        "users": users, "source_tokens": len(model.renderer.source(*samples[0])), "ours_s": ours, "plain_s": plain_s, "ratio": plain_s / ours,
        "answer_tokens": int(model.trie.lengths.max()),
    }  # fmt: skip


def measure_mode(folder: Path, mode: str, steps: int) -> dict:
    """One way of fine-tuning, alone in its process: batch of 8 x 128 tokens, one visual token."""
    model = build(folder, fine_tuning=mode, visual_tokens=1)
    model.train()
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (8, 128))
    index = torch.full((8, 128), -1)
    index[:, 10:20] = torch.arange(10)
    labels = torch.randint(3, 1000, (8, 8))
    network = model.network
    table = next(iter(model.features.values()))[1:11]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        mask = torch.ones_like(ids)
        encoded = network.encode(network.embed(ids, ids % 100, network.visual_tokens(table), index), mask)
        training_loss(per_token_loss(network.logits(encoded, mask, labels), labels), labels, "sample").backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {
        "mode": mode, "trainable": trainable, "total": total, "share_percent": 100 * trainable / total, "step_s": float(np.median(times[1:])),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "gradients_and_optimizer_mb": (state + gradients) / 2**20,
    }  # fmt: skip


def markdown(result: dict) -> str:
    """The result as a page."""
    lines = ["# VIP5 at T5-small size", "", f"{result['machine']}; one thread; `python benchmarks/vip5_speed.py`", ""]
    if "training" in result:
        t = result["training"]
        lines += [
            "| | plain transformers | recbole_mm | ratio |", "|---|---|---|---|",
            f"| training, ms per sample (with loading) | {t['plain_ms_per_sample']:.0f} | {t['ours_ms_per_sample']:.0f} | {t['ratio']:.2f} |",
            f"| loading alone, ms per sample | {t['loading_plain_ms_per_sample']:.2f} | {t['loading_ours_ms_per_sample']:.2f} | {t['loading_plain_ms_per_sample'] / t['loading_ours_ms_per_sample']:.1f} |",
            f"| source tokens with padding, {t['samples']} samples | {t['tokens_plain']} | {t['tokens_ours']} | {t['tokens_plain'] / t['tokens_ours']:.2f} |",
        ]  # fmt: skip
    if "search" in result:
        s = result["search"]
        lines += [f"| constrained top 20, {s['users']} users, s | {s['plain_s']:.2f} | {s['ours_s']:.2f} | {s['ratio']:.2f} |"]
    if "table5" in result:
        lines += ["", "| fine-tuning | trainable % (paper) | step, s | gradients + optimizer, MB | peak RSS, MB |", "|---|---|---|---|---|"]
        paper = {"self_attn": 2.97, "self_and_cross_attn": 3.58, "full": 100}
        lines += [
            f"| {m['mode']} | {m['share_percent']:.2f} ({paper[m['mode']]}) | {m['step_s']:.2f} | {m['gradients_and_optimizer_mb']:.0f} | {m['peak_rss_mb']:.0f} |"
            for m in result["table5"]
        ]
        lines += ["", "(The paper's shares are for features of width 512; the shop's have another width.)"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the parts asked for and add them to the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["all", "training", "search", "table5"], default="all")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mode", help="internal: measure one way of fine-tuning and print it")
    parser.add_argument("--folder", help="internal: folder with the checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.mode:
        print(json.dumps(measure_mode(Path(options.folder), options.mode, options.repetitions)))
        return
    file = RESULTS / "vip5_speed.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    result["machine"] = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        t5_small(folder)
        if options.part in ("all", "search"):
            result["search"] = measure_search(folder, options.users, options.repetitions)
        if options.part in ("all", "training"):
            result["training"] = measure_training(folder, options.batches, options.batch_size)
        if options.part in ("all", "table5"):
            result["table5"] = []
            for mode in ("self_attn", "self_and_cross_attn", "full"):
                command = [sys.executable, __file__, f"--mode={mode}", f"--folder={folder}", f"--repetitions={options.repetitions}"]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                result["table5"].append(json.loads(out.strip().splitlines()[-1]))
    write_json(file, result)
    write_text(file.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
