"""The papers' experiments: what their files consist of, that every cell has settings a run accepts, and what is said to be missing."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recbole_mm import cli
from recbole_mm.benchmark.needs import blocked, combine, describe, needs_of
from recbole_mm.benchmark.plan import read_plan
from recbole_mm.benchmark.runner import run_benchmark
from recbole_mm.benchmark.tables import all_tests, collect, markdown
from recbole_mm.config import Config
from recbole_mm.data.features import feature_files, load_feature_set, write_feature_set
from recbole_mm.paths import properties_dir

DATASETS = {
    "encoder-study": ["amazon-sports", "amazon-clothing", "amazon-baby"],
    "vip5": ["vip5-sports", "vip5-beauty", "vip5-clothing", "vip5-toys"],
    "perpeft": ["sports_outdoors", "toys_games", "beauty_care", "arts"],
}


def plan_of(name):
    return read_plan(properties_dir() / "benchmark" / f"{name}.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write_dataset(name, split=False, pictures=True, texts=True):
    """The files that a conversion writes, with a handful of interactions."""
    folder = Path("dataset") / name
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{u}\ti{i}\t5\t{i}" for u in range(6) for i in range(6)]
    for part in ("train.", "valid.", "test.") if split else ("",):
        (folder / f"{name}.{part}inter").write_text("\n".join(lines) + "\n")
    if texts:
        (folder / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "".join(f"i{i}\titem {i}\n" for i in range(6)))
    if pictures:
        (folder / "images").mkdir()
        for item in range(6):
            Image.new("RGB", (8, 8), (40 * item, 0, 0)).save(folder / "images" / f"i{item}.png")
    return folder


def test_the_encoder_study_is_the_papers_480_cases():
    plan = plan_of("encoder-study")
    first = [cell for cell in plan.cells if cell.seed == 1]
    rows = {
        title: {(c.dataset, c.group) for t in plan.tables if t.title.startswith(title) for c in t.cells} for title in ("table 3", "table 4")
    }
    numbers = 4  # Recall and NDCG at 10 and 20
    multimodal = sum("cnn" not in group for _, group in rows["table 3"]) * numbers
    end2end = sum("end2end" in group for _, group in rows["table 4"]) * numbers
    assert multimodal == 120 and end2end == 120 and len(rows["table 4"]) * numbers - end2end == 240
    assert multimodal + 240 + end2end == 480
    assert len(first) == 129 and len(plan.cells) == 3 * 129, "105 runs of tables 3 and 4, 24 with one modality of tables 1 and 5"
    assert all(cell.settings["eval_args"]["split"] == {"RS": [0.8, 0.1, 0.1]} for cell in first)


def test_vip5_has_the_papers_rows():
    plan = plan_of("vip5")
    by_title = {}
    for table in plan.tables:
        by_title.setdefault(table.title.rpartition(": ")[0], []).append(table)
    assert [len(by_title[t]) for t in ("tables 2 to 4", "figure 3, text against pictures")] == [4, 4]
    counts = {title.partition(",")[0]: len(tables[0].cells) for title, tables in by_title.items()}
    assert counts["figure 4 and table 5"] == 3 and counts["figure 5"] == 5 and counts["figure 6"] == 4 and counts["figure 7"] == 5
    factors = [c.settings["reduction_factor"] for c in by_title["figure 5, reduction of the adapters"][0].cells]
    assert factors == [2, 4, 8, 16, 32]
    assert [c.settings["visual_tokens"] for c in by_title["figure 6, number of image tokens"][0].cells] == [1, 2, 3, 5]
    models = [c.settings["encoder_model"] for c in by_title["figure 7, visual encoder"][0].cells]
    assert models == ["RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14"]


def test_perpeft_has_the_papers_comparisons():
    plan = plan_of("perpeft")
    main = [c for t in plan.tables if t.title == "main comparison: toys_games" for c in t.cells if c.seed == 1]
    assert len(main) == 7 and {c.settings["peft_scope"] for c in main} == {"none", "global", "personalized"}
    decay = {c.variant: c.settings.get("weight_decay") for c in main}
    assert decay["ia3 global"] == 1e-4 and decay["lora global"] is None, "LoRA's stands in the model's property file"
    negatives = [c for t in plan.tables if t.title.startswith("negatives") and t.dataset == "arts" for c in t.cells if c.seed == 1]
    assert [c.settings.get("group_negatives", True) for c in negatives] == [True, False] * 3
    assert {c.settings.get("n_groups", 8) for t in plan.tables if t.title.startswith("scal") for c in t.cells} == {2, 4, 8, 16}


@pytest.mark.parametrize("name", DATASETS)
def test_every_cell_has_settings_that_a_run_accepts(here, name):
    for dataset in DATASETS[name]:
        write_dataset(dataset, split=name == "encoder-study")
    plan = plan_of(name)
    for cell in {(c.dataset, c.group): c for c in plan.cells}.values():
        config = Config(config_dict=cell.settings)
        for key, value in cell.settings.items():
            if key not in ("dataset", "eval_args") and not isinstance(value, dict):
                assert config[key] == value, key
    assert {table.dataset for table in plan.tables} == set(DATASETS[name])


@pytest.mark.parametrize("name", DATASETS)
def test_without_data_everything_missing_is_said_at_once(here, name, capsys):
    assert cli.main(["benchmark", name, "--check"]) == 1
    said = capsys.readouterr().out
    for dataset in DATASETS[name]:
        assert f"the dataset {dataset}: no folder dataset/{dataset}" in said and f"--out dataset/{dataset}" in said
    weights = {
        "encoder-study": ["ViT-B-16 (openai)", "vlmo_base_plus_patch16_224.pt", "resnet50", "all-MiniLM-L6-v2", "bert-base-uncased"],
        "vip5": ["weights/p5-small", "RN50 (openai)", "RN101 (openai)", "ViT-B-32 (openai)", "ViT-B-16 (openai)", "ViT-L-14 (openai)"],
        "perpeft": ["openai/clip-vit-base-patch32"],
    }[name]
    for text in weights:
        assert len(re.findall(rf"\* .*{re.escape(text)}.*cells\)", said)) == 1, text
    assert not Path("saved").exists(), "a check leaves nothing"


def missing(name, dataset, choose):
    plan = plan_of(name)
    cell = next(c for c in plan.cells if c.dataset == dataset and choose(c))
    return [need.what for need in needs_of(plan, [cell])[cell]]


def test_each_missing_file_is_named(here):
    folder = write_dataset("amazon-sports", split=True, pictures=False, texts=False)
    (folder / "amazon-sports.test.inter").unlink()
    vbpr = {k: (lambda c, k=k: c.model == "VBPR" and c.encoder == "clip" and c.paradigm == k) for k in ("frozen", "finetuned", "end2end")}
    assert missing("encoder-study", "amazon-sports", vbpr["frozen"]) == [
        "the interactions dataset/amazon-sports/amazon-sports.test.inter",
        "item pictures in dataset/amazon-sports/images",
        "item texts in dataset/amazon-sports/amazon-sports.item",
        "the weights of CLIP ViT-B-16 (openai)",
    ]
    (folder / "amazon-sports.test.inter").write_text("user_id:token\tasin:token\n")
    assert (
        missing("encoder-study", "amazon-sports", vbpr["frozen"])[0]
        == "the column item_id in dataset/amazon-sports/amazon-sports.test.inter"
    )
    (folder / "images.csv").write_text("item,url\n")
    plan = plan_of("encoder-study")
    cell = next(c for c in plan.cells if c.dataset == "amazon-sports" and vbpr["frozen"](c))
    assert "recbole-mm convert pictures --src dataset/amazon-sports" in describe({cell: needs_of(plan, [cell])[cell]})


def test_what_is_there_is_not_asked_for(here):
    folder = write_dataset("amazon-sports", split=True)
    rows = np.ones((6, 4), np.float32)
    write_feature_set(folder / "features" / "clip", {"visual": rows, "textual": rows}, [f"i{i}" for i in range(6)], {})

    def vbpr(paradigm):
        return lambda c: c.model == "VBPR" and c.encoder == "clip" and c.paradigm == paradigm

    assert missing("encoder-study", "amazon-sports", vbpr("frozen")) == [], "features are enough; neither pictures nor weights are read"
    assert missing("encoder-study", "amazon-sports", vbpr("end2end")) == ["the weights of CLIP ViT-B-16 (openai)"]
    finetuned = missing("encoder-study", "amazon-sports", vbpr("finetuned"))
    assert finetuned[0] == "the feature set dataset/amazon-sports/features/clip-finetuned"
    Path("weights").mkdir()
    Path("weights/ViT-B-16-openai.safetensors").write_bytes(b"")
    assert missing("encoder-study", "amazon-sports", vbpr("end2end")) == []


def test_cells_that_can_run_do_and_the_others_say_what_they_lack(tastes):
    body = {
        "models": ["BPR", "VBPR"], "datasets": ["tastes", "elsewhere"], "seeds": [1], "metric": "Recall@5", "settings": {**tastes, "epochs": 1},
        "protocol": {"eval_args": tastes["eval_args"]}, "sources": {"elsewhere": "recbole-mm convert csv --src sales.csv --out dataset/elsewhere"},
    }  # fmt: skip
    body["settings"].pop("dataset")
    plan, lines = read_plan(body), []
    failed = run_benchmark(plan, Path("b"), 1, lines.append)
    assert {cell.dataset for cell in failed} == {"elsewhere"} and sum(line.startswith("finished") for line in lines) == 2
    assert "2 that lack something" in lines[0] and "recbole-mm convert csv --src sales.csv" in lines[1]
    tables = collect(plan, Path("b"))
    text = markdown(tables, plan, all_tests(plan, tables))
    assert "missing: the dataset elsewhere" in text and "| VBPR | 0." in text.replace("**", "")


def test_one_encoder_per_modality(here):
    """cnn+sentence: pictures by one encoder, texts by another, in one feature set."""
    folder = write_dataset("d")
    small = {"model": "VBPR", "dataset": "d", "text_fields": ["title"], "use_gpu": False, "state": "error", "show_progress": False}
    ids = [f"i{i}" for i in range(6)]
    write_feature_set(folder / "features" / "cnn", {"visual": np.eye(6, 3, dtype=np.float32)}, ids, {})
    write_feature_set(folder / "features" / "sentence", {"textual": np.eye(5, 2, dtype=np.float32)}, ids[1:], {})
    combine({**small, "feature_set": "cnn+sentence"})
    made = folder / "features" / "cnn+sentence"
    assert set(feature_files(made)) == {"visual", "textual"}
    table = load_feature_set(made, ["[PAD]", *ids], missing="zero")
    np.testing.assert_array_equal(table["visual"][1:], np.eye(6, 3))
    np.testing.assert_array_equal(table["textual"][1], 0)
    np.testing.assert_array_equal(table["textual"][2:], np.eye(5, 2))


def test_blocks_share_rows_and_refuse_two_meanings(tastes):
    body = {
        "models": ["VBPR"], "datasets": ["tastes"], "seeds": [1],
        "blocks": {"a": {"variants": {"x": {"embedding_size": 4}, "y": {"embedding_size": 8}}}, "b": {"variants": {"x": {"embedding_size": 4}}}},
    }  # fmt: skip
    plan = read_plan(body)
    assert [cell.group for cell in plan.cells] == ["VBPR, x", "VBPR, y"] and [t.title for t in plan.tables] == ["a: tastes", "b: tastes"]
    assert read_plan(body, {"epochs": 3}).cells[0].settings["epochs"] == 3
    body["blocks"]["b"]["variants"]["x"] = {"embedding_size": 16}
    for wrong, overrides, says in (
        (body, {}, "embedding_size=4, here with 16"),
        ({**body, "blocks": {"a": {"variants": {"x": {"embeding_size": 4}}}}}, {}, "Did you mean embedding_size"),
        ({**body, "blocks": {"a": {"modles": ["BPR"]}}}, {}, "Did you mean models"),
        ({**body, "blocks": {"a": {"variants": {"x": {"embedding_size": 4}}}}}, {"embedding_size": 2}, "would make the variants equal"),
        ({**body, "blocks": {"a": {"within": "dataset"}}}, {}, "within: expected model"),
        ({**body, "blocks": {"a": {"encoders": ["cnn+sentence"], "paradigms": ["end2end"]}}}, {}, "can only be frozen together"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            read_plan(wrong, overrides)


def test_rows_are_compared_within_their_model(tastes):
    body = {
        "models": ["BPR", "VBPR"], "datasets": ["tastes"], "seeds": [1], "metric": "Recall@5", "within": "model", "baseline": "plain",
        "settings": {**tastes, "epochs": 1}, "protocol": {"eval_args": tastes["eval_args"]},
        "variants": {"plain": {}, "wide": {"embedding_size": 12}},
    }  # fmt: skip
    body["settings"].pop("dataset")
    plan = read_plan(body)
    assert not run_benchmark(plan, Path("b"), 1, lambda line: None)
    tables = collect(plan, Path("b"))
    (tests,) = all_tests(plan, tables).values()
    assert [(c.first, c.second) for c in tests] == [("BPR, wide", "BPR, plain"), ("VBPR, wide", "VBPR, plain")]
    lines = markdown(tables, plan, {}).splitlines()
    assert all(sum("**" in line for line in lines if line.startswith(f"| {model}")) for model in ("BPR,", "VBPR,")), (
        "the best of each model is bold"
    )


def test_blocked_needs(here):
    plan = plan_of("perpeft")
    assert all(blocked(needs) for needs in needs_of(plan, list(plan.cells[:3])).values())
