"""How many of the best items a beam search of VIP5 finds, against scoring every item.

    python benchmarks/vip5_beams.py [--epochs 2] [--users 100]

A small model from scratch learns the sequential task on the bundled shop, once with every number as one piece, once with digits. For the
first users of the test part, the ten best items by the search are compared with the ten best of all items scored one by one.
Writes benchmarks/quality/vip5_beams.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.files import write_text
from recbole_mm.model.vip5.samples import make_batch, sequential_sample
from recbole_mm.model.vip5.search import beam_search, score_items
from recbole_mm.quick_start import load_model, run

COMMON = {
    "tasks": ["sequential"], "train_prompts": ["A-3"], "eval_prompts": ["A-3"], "valid_metric": "sequential/NDCG@10", "visual_tokens": 0,
    "network": {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 2, "embedding_std": 0.5, "copying": True},
    "matching_start": 0, "collaborative_start": 8, "choice_softmax": "items", "learning_rate": 3.0e-3,
    "seed": 1, "use_gpu": False, "show_progress": False, "tensorboard": False, "state": "ERROR",
}  # fmt: skip
NUMBERS = {
    "whole": {},
    "digits": {"number_tokens": "digits", "collaborative_start": 0},
}


@torch.no_grad()
def recall(model, users: int, k: int = 10) -> list[tuple[str, float]]:
    """Share of the k best items of all that a search of so many beams names."""
    model.eval()
    prompt = model.eval_prompts["sequential"][0]
    samples = [sequential_sample(prompt, u, model.sequences.of(u)[:-1][-model.max_seq_length :]) for u in range(1, users + 1)]
    rows = [model.renderer.source(*sample) for sample in samples]
    encoded, mask = model.encode(make_batch(rows, None, [0] * len(rows), model.k))
    items = torch.arange(1, model.n_items).expand(len(rows), -1)
    exact = torch.cat(
        [score_items(model.network, encoded[i : i + 1], mask[i : i + 1], model.trie, items[i : i + 1]) for i in range(len(rows))]
    )
    best = exact.topk(k, 1).indices + 1
    out = []
    for beams in (10, 20, 50, max(model.trie.widest, k)):
        found, _ = beam_search(model.network, encoded, mask, model.trie, beams, k)
        share = (found[:, :, None] == best[:, None]).any(1).float().mean()
        out.append((f"{beams}" + (" (widest level)" if beams == max(model.trie.widest, k) else ""), float(share)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--users", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# VIP5's search against scoring every item", "",
        f"Share of the ten best of all items that the search names, {args.users} users of the shop, {args.epochs} epochs of the sequential task. "
        f"`python benchmarks/vip5_beams.py --epochs={args.epochs} --users={args.users}`", "",
        "| numbers | beams | recall of the ten best |", "|---|---|---|",
    ]  # fmt: skip
    for name, settings in NUMBERS.items():
        with tempfile.TemporaryDirectory() as folder:
            result = run(
                "VIP5",
                "shop",
                config_dict={**COMMON, **settings, "epochs": args.epochs, "eval_step": args.epochs, "checkpoint_dir": folder},
            )
            model = load_model(result["run_dir"]).model
            lines += [f"| {name} | {beams} | {share:.4f} |" for beams, share in recall(model, args.users)]
            print("\n".join(lines[6:]), flush=True)
    lines += [
        "",
        "With whole numbers the search is one step and exact whatever the beams. The model with digits is trained briefly, so its best items begin alike;",
        "one that has learned tastes in digits spreads more, and its recall can be lower.",
    ]
    write_text(Path(__file__).resolve().parent / "quality" / "vip5_beams.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
