"""LATTICE at sizes where n x n matrices die: memory by number of items, the large synthetic set, and recall of the approximate index.

    python benchmarks/graph_memory.py                      # memory over items, recall of faiss against the exact search
    python benchmarks/graph_memory.py --large              # one epoch of 192k users x 63k items x 1.69M interactions, two 128-wide modalities

Each size runs in a process of its own, whose peak resident memory is reported. Data are random arrays; a dense code needs at least four n x n float matrices (two similarities,
the fused graph and its gradient), which the table shows beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from recbole_mm.files import write_json, write_text

RESULTS = Path(__file__).resolve().parent / "results"


def one(users: int, items: int, pairs: int, batches: int, batch_size: int, threads: int) -> dict:
    """Build LATTICE on random data, train `batches` batches (0: an epoch), evaluate once; times and peak memory."""
    import recbole_mm  # noqa: F401  adapts RecBole to today's libraries
    from recbole_mm.testing import make_model

    torch.set_num_threads(threads)
    draw = np.random.default_rng(0)
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    inter = np.stack([draw.integers(1, users + 1, pairs), draw.integers(1, items + 1, pairs)], 1)
    features = {name: draw.standard_normal((items + 1, 128), dtype=np.float32) for name in ("visual", "acoustic")}
    clock = time.perf_counter()
    model = make_model("LATTICE", inter, users + 1, items + 1, features, train_batch_size=batch_size)
    built = time.perf_counter() - clock
    del features
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    model.train()
    model.before_epoch(0)
    inter = torch.from_numpy(inter)[torch.randperm(pairs)]
    total = -(-pairs // batch_size)
    times = []
    for step in range(min(batches or total, total)):
        clock = time.perf_counter()
        rows = inter[step * batch_size : (step + 1) * batch_size]
        batch = {"user_id": rows[:, 0], "item_id": rows[:, 1], "neg_item_id": torch.randint(1, items + 1, (len(rows),))}
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - clock)
    model.eval()
    clock = time.perf_counter()
    with torch.no_grad():
        finite = all(bool(x.isfinite().all()) for x in model.forward())
    return {
        "users": users, "items": items, "interactions": pairs, "batch_size": batch_size, "batches": len(times), "batches_per_epoch": total, "loss": float(loss.detach()),
        "finite": finite, "build_s": built, "first_batch_s": times[0], "batch_s": float(np.median(times[1:])) if len(times) > 1 else None, "trained_s": sum(times),
        "forward_s": time.perf_counter() - clock, "start_mb": begin, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "dense_mb": 4 * 4 * items * items / 2**20,
    }  # fmt: skip


def recall(items: int, k: int = 10) -> list[dict]:
    """Of the exact neighbours, the share that the approximate index finds, and both times; clustered features as encoders give them."""
    from recbole_mm.layer.graph import approximate_cosine_neighbours, cosine_neighbours

    torch.manual_seed(0)
    x = torch.randn(200, 128)[torch.randint(200, (items,))] + 0.7 * torch.randn(items, 128)
    clock = time.perf_counter()
    exact = cosine_neighbours(x, k)
    exact_s = time.perf_counter() - clock
    rows = []
    for search in (32, 128, 256):
        clock = time.perf_counter()
        found = approximate_cosine_neighbours(x, k, search=search)
        spent = time.perf_counter() - clock
        hits = (found[:, :, None] == exact[:, None, :]).any(1).float().mean()
        rows.append({"items": items, "k": k, "search": search, "recall": float(hits), "faiss_s": spent, "exact_s": exact_s})
    return rows


def in_process(arguments: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--batches", type=int, default=0, help="with --large: stop after so many batches; 0: the whole epoch")
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    parser.add_argument("--one", type=int, nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.threads)))
        return
    name = "graph_memory_large" if arguments.large else "graph_memory"
    more = ["--threads", str(arguments.threads)]
    if arguments.large:
        runs = [in_process(["--one", "192000", "63000", "1690000", str(arguments.batches), str(arguments.batch_size), *more])]
        recalls = []
    else:
        runs = [in_process(["--one", "10000", str(items), "100000", "3", "2048", *more]) for items in (4000, 8000, 16000, 32000)]
        recalls = recall(20000)
    write_json(RESULTS / f"{name}.json", {"date": date.today().isoformat(), "threads": arguments.threads, "runs": runs, "recall": recalls})
    lines = [
        "# LATTICE: memory" + (" and time on the large synthetic set" if arguments.large else " by number of items"), "",
        f"{date.today().isoformat()}, {arguments.threads} thread(s), beside other work unless said otherwise. Repeat with `python benchmarks/graph_memory.py{' --large' if arguments.large else ''}`.", "",
        "| users | items | interactions | batches trained | build, s | first batch, s | another batch, s | in all, s | full forward, s | peak, MB | of it model and data, MB | four dense n x n, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {r['users']} | {r['items']} | {r['interactions']} | {r['batches']} of {r['batches_per_epoch']} (of {r['batch_size']}) | {r['build_s']:.1f} | {r['first_batch_s']:.1f} | {r['batch_s'] or 0:.2f} | {r['trained_s']:.0f} | {r['forward_s']:.1f} | {r['peak_mb']:.0f} | {r['peak_mb'] - r['start_mb']:.0f} | {r['dense_mb']:.0f} |" for r in runs),
    ]  # fmt: skip
    if recalls:
        lines += ["", "| items | k | efSearch | recall of the exact neighbours | faiss, s | exact, s |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {r['items']} | {r['k']} | {r['search']} | {r['recall']:.4f} | {r['faiss_s']:.1f} | {r['exact_s']:.1f} |" for r in recalls
        ]
    write_text(RESULTS / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
