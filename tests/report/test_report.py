"""The report: what is on the page, and that data cannot become code."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recbole_mm import cli, run
from recbole_mm.report.collect import Gathered, gather
from recbole_mm.report.page import render

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def runs(tastes):
    folder = Path("dataset/tastes")
    (folder / "images").mkdir()
    for item in range(1, 101):
        Image.new("RGB", (40, 30), (item * 2, 100, 50)).save(folder / "images" / f"i{item}.jpg")
    lines = (folder / "tastes.item").read_text().splitlines()
    (folder / "tastes.item").write_text("\n".join(lines[:1] + [f"{line.split(chr(9))[0]}\t{EVIL}" for line in lines[1:]]) + "\n")
    small = {"hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 10}
    for seed in (1, 2):
        run("VBPR", config_dict={**tastes, "seed": seed, "run_name": f"v{seed}"})
    run("VBPR", config_dict={**tastes, "modalities": ["visual"], "run_name": "v3"})
    run("SASRec", config_dict={**tastes, **small, "run_name": "s1"})
    Path("saved/broken").mkdir()
    Path("saved/broken/result.json").write_text(json.dumps({"status": "failed", "error": EVIL}))
    return tastes


def data_of(html):
    return json.loads(re.search(r"const known = (\{.*?\});\n", html, re.S)[1])


def test_page(runs, capsys):
    assert cli.main(["report", "saved", "--out=r.html", "--users=3", "--topk=5"]) == 0
    assert "4 runs, 0 searches, 1 failures" in capsys.readouterr().out
    html = Path("r.html").read_text()
    assert len(html) < 20 * 2**20
    for text in (
        "VBPR, features",
        "VBPR, features, visual",
        "SASRec",
        "Learning curves",
        "Cold and warm items",
        "Modalities",
        "Quality against time",
    ):
        assert text in html, text
    data = data_of(html)
    assert len(data["users"]) == 3
    for user in data["users"]:
        assert [m["label"] for m in user["models"]] == ["SASRec", "VBPR, features", "VBPR, features, visual"]
        assert len(user["targets"]) == 1 and user["history"]
        for model in user["models"]:
            assert len(model["list"]) == 5
            assert all(entry["hit"] == (entry["item"] in user["targets"]) for entry in model["list"])
            assert not {entry["item"] for entry in model["list"]} & set(user["history"]), "what a user has is not recommended"
    assert all(item["picture"].startswith("data:image/jpeg;base64,") for item in data["items"].values())


def test_data_cannot_become_code(runs):
    html = render(gather(["saved"], EVIL, users=2, topk=3))
    assert EVIL not in html and "<img src=x" not in html and 'alert("x")</script>' not in html
    assert EVIL in {item["title"] for item in data_of(html)["items"].values()}, "it is shown, as text"
    assert html.count("<script>") == 2 and "Content-Security-Policy" in html


def test_nothing_is_loaded_from_elsewhere(runs):
    html = render(gather(["saved"], "t", users=1, topk=2))
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.findall(r"""<\w+[^<>]*\s(?:src|href)="(?!#|data:)[^"]*""", own)


def figures_of(html):
    return json.loads(re.search(r"const figures = (\[.*?\]);\n", html, re.S)[1])


def drawn(html, title):
    place = re.findall(r'<h2 id="figure\d+-title">(.*?)</h2>', html).index(title)
    return figures_of(html)[place]["data"]


def test_what_stands_beside_cold_and_warm(runs):
    html = render(gather(["saved"], "t", users=0))
    bars = {trace["name"] for trace in drawn(html, "Rare and popular items")}
    assert bars and bars <= {"rare items", "middling items", "popular items"}
    assert {t["name"] for t in drawn(html, "Cold and warm items")} == {"cold items", "warm items"}
    with np.load("saved/v1/per_user.npz") as arrays:
        values = np.sort(arrays["recall@5"])
    curve = next(trace for trace in drawn(html, "Spread over users") if trace["name"] == "VBPR, features")
    assert len(curve["y"]) == 101 and curve["y"][0] == values[0] and curve["y"][-1] == values[-1]


def test_the_data_are_drawn(runs):
    html = render(gather(["saved"], "t", users=0))
    users, items = drawn(html, "Data: interactions per user and item")
    counts = pd.read_csv("dataset/tastes/tastes.inter", sep="\t").iloc[:, 0].value_counts()
    assert users["median"] == [counts.median()] and users["upperfence"] == [counts.max()] and items["name"] == "items"
    (coverage,) = drawn(html, "Data: what items come with")
    shares = dict(zip(coverage["y"], coverage["x"]))
    assert shares["pictures"] == 100 and shares["text: title"] == 100 and 0 < shares["without training interaction"] < 100
    shutil.rmtree("dataset/tastes")
    page = gather(["saved"], "t", users=0)
    assert not page.cards and "no card of the data" in page.notes[0] and "Rare and popular items" in render(page), "the rest needs no data"


def test_explanations_and_figures_of_runs(runs):
    lines = [f"text {n} {EVIL}\tlonger reference {n}\tword{n}" for n in range(40)]
    Path("saved/v1/explanations-C-3.tsv").write_text("generated\treference\tfeature_word\n" + "\n".join(lines) + "\n")
    Path("saved/v1/figures").mkdir()
    Image.new("RGB", (4, 4)).save("saved/v1/figures/perpeft_attention_i7.png")
    html = render(gather(["saved"], "t", users=0))
    section = re.search(r'<section id="explanations".*?</section>', html, re.S)[0]
    assert "prompt C-3 (12 of 40)" in section and section.count("longer reference") == 12 and "word39" in section
    assert EVIL not in section and "&lt;/script&gt;" in section
    assert 'alt="VBPR, features: perpeft_attention_i7"' in html


def test_mean_and_spread_over_seeds(runs):
    html = render(gather(["saved"], "t", users=0))
    row = re.search(r"<td>VBPR, features</td>.*?</tr>", html, re.S)[0]
    values = [json.loads((Path("saved") / n / "result.json").read_text())["test"]["recall@5"] for n in ("v1", "v2")]
    assert f"{sum(values) / 2:.4f}" in row and "±" in row and '<td data-value="2">2</td>' in row


def test_missing_is_shown_as_missing():
    record = {"label": "A", "dataset": "d", "test": {"m": None}, "time": {"total_s": 1.0}, "memory": {"peak_rss_mb": 1.0}, "epochs": []}
    html = render(Gathered("t", runs=[record]))
    assert ">–<" in html.replace("\n", "") or "–</td>" in html


def test_wrong_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bench" / "cells").mkdir(parents=True)
    (tmp_path / "bench" / "cells" / "a.json").write_text("{")
    for words, says in (
        ([], "at least one folder"),
        (["none"], "is no folder"),
        (["empty"], "no finished run"),
        (["empty", "--usres=3"], "Did you mean users"),
        (["empty", "--users=900"], "from 0 to 200"),
        (["empty", "--users=many"], "users"),
        (["empty", "--topk=0"], "--topk from 1 to 100"),
        (["empty", "--out"], "out"),
        (["--out=r.html"], "at least one folder"),
        (["bench"], "is broken"),
    ):
        assert cli.main(["report", *words]) == 2
        assert says in capsys.readouterr().err
