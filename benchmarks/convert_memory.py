"""Peak memory and rate of the Amazon converter on a made-up reviews file of a given size.

python benchmarks/convert_memory.py [--reviews 1000000] [--out benchmarks/results]
"""

import argparse
import gzip
import json
import os
import resource
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "reviews.json.gz"
        write_reviews(source, args.reviews)
        code = f"from recbole_mm.data.convert import main; main(['amazon', '--src', {str(source)!r}, '--out', {folder + '/d'!r}, '--no-progress'])"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        about = json.loads((Path(folder) / "d" / "convert.json").read_text())
        with gzip.open(source) as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(1 << 22), b""))
    result = {
        "reviews": args.reviews,
        "uncompressed_mb": round(size / 1e6),
        "written": about["written"],
        "peak_rss_mb": round(peak),
        "seconds": round(seconds, 1),
        "reviews_per_second": round(args.reviews / seconds),
    }
    write_json(args.out / "convert_memory.json", result)
    write_text(
        args.out / "convert_memory.md",
        "# Amazon converter: memory\n\nMade by `python benchmarks/convert_memory.py`: 5-core, texts kept.\n\n| | |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in result.items()),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
