"""Layers, types and checks of the settings."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from recbole.utils import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

import recbole_mm
from recbole_mm.config import Config, _recbole_folder, is_known, listed_keys
from recbole_mm.errors import UserError
from recbole_mm.model import MODELS, recbole_model_names
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import PACKAGE, properties_dir


def config(*arguments, model="BPR", dataset="ml-100k", **keywords):
    return Config(model, dataset, arguments=list(arguments), **keywords)


def test_later_layers_win(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 0.2\nepochs: 7\nseed: 1\n", encoding="utf-8")
    c = config("--learning_rate=0.4", config_file_list=[str(tmp_path / "a.yaml")], config_dict={"learning_rate": 0.3, "epochs": 8})
    assert (c["learning_rate"], c["epochs"], c["seed"]) == (0.4, 8, 1)
    assert c["valid_metric"] == "Recall@20", "our overall.yaml comes after RecBole's"
    assert config(model="VBPR", dataset="shop")["use_bias"] is load_yaml(properties_dir() / "model" / "VBPR.yaml")["use_bias"]


def test_per_dataset_values_stand_between_property_files_and_the_user(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(
        "depth_of_mine: 2\nper_dataset:\n  ml-100k: {depth_of_mine: 5, learning_rate: 0.07}\n", encoding="utf-8"
    )
    monkeypatch.setitem(
        MODELS,
        "Mine",
        recbole_mm.model.ModelEntry("recbole.model.general_recommender.bpr", "BPR", property_file=str(tmp_path / "own.yaml")),
    )
    monkeypatch.setattr("recbole_mm.config.listed_keys", lambda: listed_keys() | {"depth_of_mine"})
    c = config(model="mine")
    assert (c["depth_of_mine"], c["learning_rate"]) == (5, 0.07)
    assert config("--depth_of_mine=9", model="Mine")["depth_of_mine"] == 9


@pytest.mark.parametrize("words", [["--epochs=3", "--learning_rate=1e-4"], ["--epochs", "3", "--learning_rate", "1e-4"]])
def test_both_forms_of_the_command_line(words):
    c = config(*words)
    assert c["epochs"] == 3 and c["learning_rate"] == 1e-4 and isinstance(c["learning_rate"], float)


def test_lists_and_mappings_on_the_command_line():
    c = config(
        "--topk",
        "5",
        "10",
        "--metrics=Recall,MRR",
        "--valid_metric=MRR@5",
        "--eval_args={'split': {'RS': [0.7, 0.2, 0.1]}}",
        "--modalities=visual",
    )
    assert c["topk"] == [5, 10] and c["metrics"] == ["Recall", "MRR"] and c["modalities"] == ["visual"]
    assert c["eval_args"]["split"] == {"RS": [0.7, 0.2, 0.1]} and c["eval_args"]["mode"] == {"valid": "full", "test": "full"}


def test_a_library_call_does_not_read_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs=77", "--nonsense"])
    assert config()["epochs"] == 300


def test_recbole_global_lists_stay_as_they_are():
    before = list(dataset_arguments)
    config()
    assert dataset_arguments == before


@pytest.mark.parametrize(
    "words, says",
    [
        (["--epoch=3"], "Unknown key 'epoch'.*Did you mean epochs"),
        (["--learner=adm"], "Unknown learner 'adm'.*adam"),
        (["--metrics=Recal"], "Unknown metric 'Recal'.*recall"),
        (["--valid_metric=Recall@7"], "valid_metric"),
        (["--eval_mask=trian"], "eval_mask.*train"),
        (["--encoder_training=frozn"], "encoder_training.*frozen"),
        (["--missing_modality=drop"], "missing_modality"),
        (["--encoder=clipp"], "Unknown encoder 'clipp'"),
        (["--encoder_training=end2end"], "none is named"),
        (["--epochs=x"], "epochs: expected a whole number"),
        (["--epochs=-1"], "at least 0"),
        (["--learning_rate=0"], "learning_rate: expected a number above 0"),
        (["--topk=0"], "topk"),
        (["--topk=[5,'a']"], "topk"),
        (["--train_neg_sample_args={'distribution': 'zipf'}"], "zipf"),
        (["--eval_args={'mode': 'ful'}"], "ful"),
        (["--metrics=Recall,AUC", "--valid_metric=AUC"], "Ranking metrics and value metrics"),
    ],
)
def test_wrong_settings_stop_the_run(words, says):
    with pytest.raises(UserError, match=says):
        config(*words)


def test_unknown_names():
    with pytest.raises(UserError, match="Unknown model 'LatticeX'.*LATTICE"):
        config(model="LatticeX")
    with pytest.raises(UserError, match="Unknown dataset 'shopp'.*shop"):
        config(dataset="shopp")
    with pytest.raises(UserError, match="Expected a model and a dataset"):
        Config()
    with pytest.raises(UserError, match="name of a dataset"):
        config(dataset="../shop")


def test_aliases_and_case():
    assert config(model="vbpr", dataset="shop").model == "VBPR"
    assert config(model="lightgcn").model == "LightGCN"


def test_extra_keys_are_the_way_out():
    assert config(config_dict={"extra_keys": ["my_own"], "my_own": 3})["my_own"] == 3
    with pytest.raises(UserError, match="extra_keys"):
        config(config_dict={"my_own": 3})


def test_changed_metrics_take_the_default_valid_metric_along():
    assert config("--metrics=MRR", "--topk=5")["valid_metric"] == "MRR@5"
    c = config("--metrics=AUC", "--eval_args={'mode': 'labeled'}", model="BPR")
    assert c["valid_metric"] == "AUC"


def test_settings_give_the_same_run_again():
    for model in ("BPR", "SASRec"):
        first = config("--learning_rate=0.5", "--topk=3", "--valid_metric=NDCG@3", model=model)
        again = Config(config_dict=yaml.safe_load(yaml.safe_dump(first.settings())))
        assert again.settings() == first.settings()
        assert again["train_neg_sample_args"] == first["train_neg_sample_args"]
    assert first.user_settings["learning_rate"] == 0.5


def keys_read_by(path: Path) -> set[str]:
    return set(re.findall(r"""config\[\s*["'](\w+)["']\s*\]""", path.read_text(encoding="utf-8")))


def test_every_key_of_recboles_models_is_known():
    files = list((_recbole_folder() / "model").rglob("*.py")) + list((_recbole_folder() / "trainer").rglob("*.py"))
    assert len(files) > 90 and len(recbole_model_names()) > 85
    unknown = {path.name: {key for key in keys_read_by(path) if not is_known(key)} for path in files}
    assert not {name: keys for name, keys in unknown.items() if keys}


def test_every_key_our_sources_read_stands_in_a_list():
    for path in PACKAGE.rglob("*.py"):
        keys = keys_read_by(path)
        if path.parent.name == "encoder" and path.stem not in (
            "extract",
            "finetune",
        ):  # there `config` is another library's; ours is `settings`
            keys = set(re.findall(r"""settings(?:\.get\(|\[)\s*["'](\w+)["']""", path.read_text(encoding="utf-8")))
        unknown = {key for key in keys if key not in listed_keys() and key not in {*recbole_mm.config.COMPUTED, "key"}}
        assert not unknown, f"{path.name} reads {unknown}, which no property file explains"


def test_every_key_of_our_model_files_is_read():
    """A value that stands in a property file and that nobody reads would be a setting without effect."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    shared = set(load_yaml(properties_dir() / "overall.yaml")) | {"per_dataset"}
    shared |= {*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments}
    for path in (properties_dir() / "model").glob("*.yaml"):
        if path.stem not in MODELS:
            continue
        for key in load_yaml(path):
            assert key in shared or re.search(rf"""["']{key}["']""", sources), f"{path.name}: nobody reads {key}"


def test_property_files_explain_every_key():
    for path in properties_dir().rglob("*.yaml"):
        if path.parent.name not in ("model", "encoder") and path.name != "overall.yaml":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("#"), f"{path.name} begins with a line about what it is"
