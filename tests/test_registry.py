"""The registry of models."""

import subprocess
import sys

import pytest

from recbole_mm.errors import UserError
from recbole_mm.model import MODELS, ModelEntry, find_model, get_model, recbole_model_names, register_model


def test_our_names_and_aliases():
    assert {"VBPR", "MMGCN", "MMGCL", "SLMRec", "LATTICE", "PerPEFTSASRec", "VIP5"} <= set(MODELS)
    assert find_model("PerPEFT-SASRec")[0] == "PerPEFTSASRec"
    assert get_model("slmrec").__name__ == "SLMRec"


def test_every_registered_model_can_be_imported():
    for name, entry in MODELS.items():
        assert entry.load().__name__ == entry.class_name, name


def test_recboles_models_are_found():
    names = recbole_model_names()
    assert {"BPR", "LightGCN", "SASRec", "FM", "KGAT", "EASE", "NeuMF"} <= set(names)
    assert get_model("bpr").__name__ == "BPR"


def test_unknown_model():
    with pytest.raises(UserError, match=r"Unknown model 'VBRP'. Did you mean .*VBPR"):
        find_model("VBRP")


def test_register_model(monkeypatch, tmp_path):
    monkeypatch.setattr("recbole_mm.model.MODELS", dict(MODELS))
    file = tmp_path / "own.yaml"
    file.write_text("# own\nembedding_size: 8\n", encoding="utf-8")
    register_model("Own", "recbole_mm.model.vbpr:VBPR", aliases=["My-Own"], summary="mine", property_file=file)
    name, entry = find_model("my-own")
    assert name == "Own" and entry.load().__name__ == "VBPR" and entry.property_file == str(file)
    for taken in ("Own", "vbpr", "BPR", "my-own"):
        with pytest.raises(UserError, match="is taken"):
            register_model(taken, "x:Y")
    with pytest.raises(UserError, match="does not exist"):
        register_model("Other", "x:Y", property_file=tmp_path / "none.yaml")


def test_entry_points_of_other_packages(monkeypatch):
    import recbole_mm.model as registry

    class Point:
        @staticmethod
        def load():
            return lambda: register_model("FromOutside", "recbole_mm.model.vbpr:VBPR")

    monkeypatch.setattr(registry, "MODELS", dict(MODELS))
    monkeypatch.setattr(registry, "_entry_points_read", False)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Point] if group == "recbole_mm.models" else [])
    assert find_model("fromoutside") == ("FromOutside", ModelEntry("recbole_mm.model.vbpr", "VBPR"))


def test_importing_the_registry_imports_no_encoder_library():
    code = "import sys, recbole_mm, recbole_mm.model; print(sorted({'transformers', 'open_clip', 'peft', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_looking_up_a_sequential_model_leaves_anomaly_detection_off():
    code = "import torch, recbole_mm.model as m; m.get_model('SASRec'); print(torch.is_anomaly_enabled())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
