"""The page that benchmarks/quality_vip5.py writes from its raw files."""

import json

import pytest

from benchmarks import quality_vip5


@pytest.fixture
def out(tmp_path, monkeypatch):
    (tmp_path / "vip5").mkdir()
    monkeypatch.setattr(quality_vip5, "OUT", tmp_path)
    return tmp_path


def test_beauty_stands_beside_sasrec_and_pop(out):
    assert quality_vip5.beauty_table() == []
    sasrec = [{"test": {"ndcg@10": 0.03, "hit@10": h}} for h in (0.06, 0.08)]
    (out / "amazon-beauty.json").write_text(json.dumps({"SASRec": sasrec}))
    run = {
        "settings": {"seed": 1}, "cpu_seconds": 3600, "test": {"sequential/ndcg@10": 0.02, "sequential/hit@10": 0.05, "direct/hit@1": 0.1, "direct/ndcg@10": 0.2},
        "valid": [[3, 9.0, {"sequential/hit@10": 0.06}]], "baselines": {"Pop": {"sequential/ndcg@10": 0.005, "sequential/hit@10": 0.01, "direct/hit@1": 0.03, "direct/ndcg@10": 0.1}},
    }  # fmt: skip
    (out / "vip5" / "amazon-beauty-seed1.json").write_text(json.dumps(run))
    page = "\n".join(quality_vip5.beauty_table())
    assert "| Pop | 0.0050 | 0.0100 | 0.0300 | 0.1000 |" in page
    assert "| RecBole's SASRec, 2 seeds | 0.0300 ± 0.0000 | 0.0700 ± 0.0100 |  |  |" in page
    assert "| VIP5, text only | 0.0200 (one seed) | 0.0500 (one seed) | 0.1000 (one seed) | 0.2000 (one seed) |" in page
    assert "4: 0.0600" in page and "3600 CPU seconds" in page


def test_the_shop_has_a_row_of_sasrec_once_it_was_run(out, monkeypatch):
    monkeypatch.setattr(quality_vip5, "baselines", lambda: {})
    assert "SASRec" not in quality_vip5.table(5)
    record = {
        "test": {"ndcg@10": 0.04, "hit@10": 0.08}, "epochs": [{"epoch": 0, "train_loss": 5.0, "valid": {"ndcg@10": 0.05}}], "best_epoch": 0,
        "protocol": {"history_masked": False}, "parameters": 7, "data": {}, "time": {"epoch_s": [1.0]},
    }  # fmt: skip
    calls = []

    def run(model, dataset, config_dict):
        calls.append((model, dataset, config_dict["seed"]))
        return {"record": record}

    monkeypatch.setattr(quality_vip5, "run", run)
    for argv in (["--sasrec", "--seeds=1"], ["--sasrec", "--seeds=1,2"]):  # what is there is not run again
        monkeypatch.setattr("sys.argv", ["quality_vip5.py", *argv])
        quality_vip5.main()
    assert calls == [("SASRec", "shop", 1), ("SASRec", "shop", 2)]
    page = (out / "vip5.md").read_text()
    assert "| RecBole's SASRec, 2 seeds | 0.0400 ± 0.0000 | 0.0800 ± 0.0000 |" in page
