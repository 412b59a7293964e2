"""Peak memory and rate of the Amazon converter on a made-up reviews file of a given size.

python benchmarks/convert_memory.py [--reviews 250000 1000000] [--rows 4000000 32000000] [--out benchmarks/results]
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from recbole_mm.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent


def write_reviews(path: Path, n: int) -> None:
    """n reviews of 500 to 700 characters; most users write one or two, as on Amazon."""
    rng = np.random.default_rng(0)
    text = "this is a review with a few words about the thing that was bought and what became of it " * 6
    users, items = rng.zipf(1.3, n) % (n // 2), (rng.pareto(0.9, n) * 50).astype(np.int64) % (n // 8)
    with gzip.open(path, "wt", compresslevel=1) as stream:
        for k in range(n):
            row = {"reviewerID": f"A{users[k]:012d}", "asin": f"B{items[k]:09d}", "overall": 4.0, "unixReviewTime": 1_400_000_000 + k}
            stream.write(json.dumps({**row, "reviewText": text[k % 80 :], "summary": "good", "reviewerName": f"Name {users[k]}"}) + "\n")


def convert(reviews: int) -> dict:
    """Peak memory and rate of the whole converter on `reviews` made-up reviews."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "reviews.json.gz"
        write_reviews(source, reviews)
        code = f"from recbole_mm.data.convert import main; main(['amazon', '--src', {str(source)!r}, '--out', {folder + '/d'!r}, '--no-progress'])"
        seconds, peak = measured(code)
        about = json.loads((Path(folder) / "d" / "convert.json").read_text())
        with gzip.open(source) as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(1 << 22), b""))
    written = about["written"]
    return {"reviews": reviews, "uncompressed_mb": round(size / 1e6), "kept": written["inter"], "users_kept": written["users"], "peak_rss_mb": peak,
            "seconds": seconds, "reviews_per_second": round(reviews / seconds)}  # fmt: skip


def core(rows: int) -> dict:
    """Peak memory of the filter alone, on `rows` pairs nearly all of which stay: the worst case, and the part that grows with what stays."""
    code = f"""
import numpy as np, tempfile
from recbole_mm.data.convert.core import PAIR, choose
rng = np.random.default_rng(0)
with tempfile.NamedTemporaryFile() as file:
    for start in range(0, {rows}, 1 << 20):
        part = np.empty(min(1 << 20, {rows} - start), PAIR)
        for key, n in (("user", {rows} // 14), ("item", {rows} // 40)):
            part[key] = rng.integers(0, n, len(part)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        file.write(part.data)
    file.flush()
    kept = choose(np.memmap(file.name, PAIR, "r"), 5)[0]
    print(len(kept))
"""
    seconds, peak, printed = measured(code, output=True)
    return {"rows": rows, "kept": int(printed), "peak_rss_mb": peak, "seconds": seconds}


def measured(code: str, output: bool = False):
    """Seconds, peak of the memory that is the process's own (a memory-mapped file is not, and the system takes its pages back), and the output."""
    watch = "\nimport resource, re\nprint('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + watch],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    seconds = round(time.perf_counter() - start, 1)
    printed, _, peak = done.stdout.rpartition("PEAK ")
    return (seconds, int(peak), printed) if output else (seconds, int(peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[4_000_000, 16_000_000, 32_000_000], help="for the filter alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    result = {"converter": [convert(n) for n in args.reviews], "filter": [core(n) for n in args.rows]}
    low, high = result["filter"][0], result["filter"][-1]
    per_row = (high["peak_rss_mb"] - low["peak_rss_mb"]) * 2**20 / (high["kept"] - low["kept"]) if high is not low else float("nan")
    result["bytes_per_kept_row"] = round(per_row, 1)
    write_json(args.out / "convert_memory.json", result)
    lines = [
        "# Amazon converter: memory",
        "",
        "Made by `python benchmarks/convert_memory.py`. The whole converter, 5-core, texts kept; most users of the made-up",
        "reviews write one or two, as on Amazon:",
        "",
    ]
    for part in ("converter", "filter"):
        if part == "filter":
            lines += [
                "",
                "The filter alone, on pairs nearly all of which stay (the file of pairs is memory-mapped and counts here although the system may take it back):",
                "",
            ]
        rows = result[part]
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(f"{value:,}" for value in row.values()) + " |" for row in rows]
    lines += [
        "",
        f"So each row that stays takes {per_row:.0f} bytes at the peak of the filter, 16 of them the mapped file. See docs/convert.md for what that means for 10 GB.",
    ]
    write_text(args.out / "convert_memory.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
