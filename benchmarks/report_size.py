"""The report of a run with 100,000 users: its size, the time to make it, and the time until a browser has drawn it.

    python benchmarks/report_size.py [--users 100000] [--items 20000] [--work FOLDER]

A shop of that size is written with a picture for each of the first 2,000 items, BPR and VBPR are trained on it for one epoch, and two reports
are made: one with the default options, one with 200 sampled users and 20 items of each model. Each is opened five times in headless Chromium from
disk; the time is from the request until the page's load event and two further frames, by when the scripts have drawn every chart (their number is checked).
Beside it stand the seconds of processor time that the page's main thread took, which other work on the machine lengthens little; the first opening compiles
the scripts, the others find them compiled.
It prints a table and writes benchmarks/results/report_size.md and .json. Expected: under 20 MB and under 3 s.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from recbole_mm import run
from recbole_mm.report.collect import gather
from recbole_mm.report.page import render

HERE = Path(__file__).parent
LIMIT_MB, LIMIT_S = 20.0, 3.0


def write_shop(folder: Path, users: int, items: int, pictures: int = 2000, seed: int = 0) -> None:
    """A dataset with popular and rare items: each user has 6 to 14 interactions."""
    draw = np.random.default_rng(seed)
    target = folder / "big"
    (target / "images").mkdir(parents=True)
    weights = 1 / np.arange(1, items + 1) ** 0.7
    lengths = draw.integers(6, 15, users)
    chosen = draw.choice(items, size=int(lengths.sum()), p=weights / weights.sum())
    user = np.repeat(np.arange(users), lengths)
    pairs = np.unique(np.stack([user, chosen], 1), axis=0)
    when = draw.integers(0, 10**6, len(pairs))
    with open(target / "big.inter", "w", encoding="utf-8") as stream:
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        stream.writelines(f"u{u}\ti{i}\t{t}\n" for (u, i), t in zip(pairs.tolist(), when.tolist()))
    with open(target / "big.item", "w", encoding="utf-8") as stream:
        stream.write("item_id:token\ttitle:token_seq\n")
        stream.writelines(f"i{i}\tThing number {i} with a title of ordinary length for a shop\n" for i in range(items))
    for item in range(pictures):  # noise: pictures that compress badly
        Image.fromarray(draw.integers(0, 256, (112, 112, 3), np.uint8)).save(target / "images" / f"i{item}.jpg", quality=80)
    features = target / "features" / "drawn"
    features.mkdir(parents=True)
    np.save(features / "visual.npy", draw.standard_normal((items, 32)).astype(np.float16))
    (features / "item_ids.txt").write_text("".join(f"i{i}\n" for i in range(items)))


def open_page(path: Path, times: int) -> tuple[list[float], list[float], int]:
    """Seconds until the page is drawn and of processor time, for each opening, and the number of charts."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    seconds, busy = [], []
    try:
        for _ in range(times):
            driver.get("about:blank")
            driver.execute_cdp_cmd("Performance.disable", {})
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            begin = time.perf_counter()
            driver.get(path.resolve().as_uri())  # returns after the load event
            driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()));")
            seconds.append(time.perf_counter() - begin)
            metrics = {m["name"]: m["value"] for m in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
            busy.append(metrics["TaskDuration"])
        charts = len(driver.find_elements("css selector", ".figure .main-svg"))
        wanted = len(driver.find_elements("css selector", ".figure"))
        assert charts >= wanted > 0, f"{charts} of {wanted} charts are drawn"
    finally:
        driver.quit()
    return seconds, busy, wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for data and runs, kept (default: a temporary one)")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="report-size-"))
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    if not (work / "dataset" / "big").is_dir():
        write_shop(work / "dataset", args.users, args.items)
    settings = {
        "dataset": "big", "data_path": str(work / "dataset"), "checkpoint_dir": str(work / "saved"), "epochs": 1, "show_progress": False,
        "state": "error", "tensorboard": False, "save_last": False, "train_batch_size": 16384, "embedding_size": 16, "topk": [10, 20], "feature_set": "drawn",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "valid_metric": "NDCG@10", "metrics": ["Recall", "NDCG"], "text_fields": ["title"],
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}, "mask_history": True,
    }  # fmt: skip
    for model in ("BPR", "VBPR"):
        if not (work / "saved" / model / "result.json").is_file():
            run(model, config_dict={**settings, "run_name": model})
    rows = []
    for name, users, topk in (("default: 8 users, 10 items", 8, 10), ("largest: 200 users, 20 items", 200, 20)):
        begin = time.perf_counter()
        page = gather([work / "saved"], "100,000 users", users, topk)
        path = work / f"report-{users}.html"
        path.write_text(render(page), encoding="utf-8")
        made = time.perf_counter() - begin
        assert not page.notes, page.notes
        seconds, busy, charts = open_page(path, args.openings)
        size = path.stat().st_size / 1e6
        row = {"report": name, "mb": size, "made_s": made, "opened_s": seconds, "processor_s": busy, "charts": charts}
        rows.append({**row, "median_s": float(np.median(seconds))})
    facts = {
        "users": args.users,
        "items": args.items,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "limits": [LIMIT_MB, LIMIT_S],
    }
    lines = [
        f"# Report of a run with {args.users:,} users and {args.items:,} items",
        "",
        f"BPR and VBPR, headless Chromium, {facts['cores']} cores. Limits: {LIMIT_MB:.0f} MB, {LIMIT_S:.0f} s.",
        "",
        "| report | MB | made in, s | opened in, s (median of openings) | fastest | slowest | processor, s: first opening, median | charts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        opened, busy = r["opened_s"], r["processor_s"]
        lines.append(
            f"| {r['report']} | {r['mb']:.1f} | {r['made_s']:.1f} | {r['median_s']:.2f} | {min(opened):.2f} | {max(opened):.2f} "
            f"| {busy[0]:.2f}, {np.median(busy):.2f} | {r['charts']} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (HERE / "results" / "report_size.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "report_size.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
