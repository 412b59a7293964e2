"""Every adaptation of RecBole to today's libraries, each with a test that fails when it is taken out (`test_each_adaptation_is_needed`, slow)."""

import importlib.util
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import recbole_mm
from recbole_mm import compat
from recbole_mm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write_dataset(folder: Path, sequences: bool = False) -> dict:
    """Write a dataset of five users and five items, with missing attributes, and return settings for it."""
    target = folder / "tiny"
    target.mkdir(parents=True)
    if sequences:
        rows = ["u1\ta\tb c", "u1\tb\tb c a", "u2\tc\ta", "u2\td\ta c", "u3\ta\td"]
        (target / "tiny.inter").write_text("user_id:token\titem_id:token\titem_id_list:token_seq\n" + "\n".join(rows) + "\n")
    else:
        rows = [f"u{u}\t{i}\t{3 + (u + ord(i)) % 3}\t{10 * u + ord(i)}" for u in range(1, 6) for i in "abcde" if ord(i) % 5 != u - 1]
        (target / "tiny.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows) + "\n")
    items = ["a\tred\tx y\t1.0", "b\t\tx\t", "c\tblue\t\t3.0", "d\tred\ty z x\t5.0", "e\t\tz\t"]
    (target / "tiny.item").write_text("item_id:token\tcolour:token\ttags:token_seq\tprice:float\n" + "\n".join(items) + "\n")
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {
            "inter": ["user_id", "item_id", "item_id_list"] if sequences else ["user_id", "item_id", "rating", "timestamp"],
            "item": "*",
        },
        "epochs": 1,
        "topk": [2],
        "valid_metric": "MRR@2",
        "show_progress": False,
        "train_batch_size": 8,
        "device": "cpu",
        "use_gpu": False,
    }


def recbole_config(folder: Path, model: str, monkeypatch, **settings):
    from recbole.config import Config

    monkeypatch.setattr(sys, "argv", ["pytest"])
    return Config(model=model, dataset="tiny", config_dict={**write_dataset(folder, settings.pop("sequences", False)), **settings})


def recbole_trainer(folder: Path, model: str, monkeypatch, **settings):
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = recbole_config(folder, model, monkeypatch, **settings)
    logging.getLogger().setLevel(logging.ERROR)
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    net = get_model(model)(config, train._dataset)
    return get_trainer(config["MODEL_TYPE"], model)(config, net), train, valid, test


def test_numpy_aliases(tmp_path, monkeypatch):
    """The Config of RecBole reads np.float_; its Interaction and metrics read np.float."""
    from recbole.data.interaction import Interaction

    assert recbole_config(tmp_path, "BPR", monkeypatch)["model"] == "BPR"
    assert Interaction({"a": np.array([1.0, 2.0])})["a"].dtype == torch.float32
    assert (np.float, np.int, np.object, np.str, np.unicode) == (np.float64, np.int_, np.object_, np.str_, np.str_)


def test_property_files_in_lower_case(monkeypatch):
    """XGBoost gets its defaults; the model is a stand-in, so that the package is not needed."""
    from recbole.config import Config
    from recbole.utils import InputType, ModelType

    monkeypatch.setattr(sys, "argv", ["pytest"])
    stand_in = type("XGBoost", (), {"type": ModelType.DECISIONTREE, "input_type": InputType.POINTWISE})
    assert Config(model=stand_in, dataset="tiny")["xgb_params"]["max_depth"] == 3


def test_scipy_dok_update(tmp_path, monkeypatch):
    """LightGCN's propagation matrix, against the formula D^-1/2 A D^-1/2 (RecBole adds 1e-7 to the degrees)."""
    trainer, train, *_ = recbole_trainer(tmp_path, "LightGCN", monkeypatch)
    r = train._dataset.inter_matrix(form="coo").toarray()
    a = np.block([[np.zeros((len(r), len(r))), r], [r.T, np.zeros((r.shape[1], r.shape[1]))]])
    scale = (a.sum(1) + 1e-7) ** -0.5
    np.testing.assert_allclose(trainer.model.norm_adj_matrix.to_dense().numpy(), scale[:, None] * a * scale, rtol=1e-5)


def test_pandas_frames_fill_missing_values(tmp_path, monkeypatch):
    """Missing token: 0; missing number: the mean of the others; missing sequence: empty. Sequences keep their lengths."""
    from recbole.data import create_dataset

    dataset = create_dataset(recbole_config(tmp_path, "FM", monkeypatch, normalize_all=False))
    names = list(dataset.field2id_token["item_id"])
    item = {name: names.index(name) for name in "abcde"}
    colour, tags, price = (dataset.item_feat[field] for field in ("colour", "tags", "price"))
    assert colour[item["b"]] == 0 and colour[item["a"]] == colour[item["d"]] != 0
    token = dataset.field2id_token["tags"]
    assert [[token[t] for t in tags[item[name]] if t] for name in "abcde"] == [["x", "y"], ["x"], [], ["y", "z", "x"], ["z"]]
    assert price[item["b"]] == pytest.approx(3.0)


def test_pandas_frames_count_the_entries_of_ready_sequences(tmp_path, monkeypatch):
    """With ready splits RecBole takes the lengths of the item lists by ``agg(len)``; pandas 3 would give the number of rows, without an error."""
    from recbole.data import create_dataset

    config = recbole_config(tmp_path, "SASRec", monkeypatch, sequences=True, alias_of_item_id=["item_id_list"], train_neg_sample_args=None)
    config["benchmark_filename"] = ["part1", "part2", "part3"]
    source = tmp_path / "tiny" / "tiny.inter"
    for part in config["benchmark_filename"]:
        source.with_name(f"tiny.{part}.inter").write_text(source.read_text())
    dataset = create_dataset(config)
    assert dataset.inter_feat[dataset.item_list_length_field].tolist() == 3 * [2, 3, 1, 2, 1]


def test_pandas_frames_leave_pandas_alone():
    import recbole.data.dataset.dataset as module

    frame = module.pd.DataFrame({"a": [1.0, None]})
    frame["a"].fillna(0.0, inplace=True)
    assert frame["a"].tolist() == [1.0, 0.0] and isinstance(frame[frame["a"] > 0].merge(frame, on="a"), type(frame))
    assert module.pd is not pd and pd.DataFrame({"a": [1]})["a"].agg(len) in (1, [1])
    assert type(pd.read_csv(io.StringIO("a\nx"))) is pd.DataFrame


@pytest.mark.parametrize("model", ["BPR", "ItemKNN", "EASE"])
def test_torch_checkpoints(tmp_path, monkeypatch, model):
    """Save, load and evaluate: the loaded model scores as the saved one, and the loaded settings are those saved."""
    trainer, train, valid, test = recbole_trainer(tmp_path, model, monkeypatch)
    trainer.fit(train, valid, verbose=False)
    result = trainer.evaluate(test, load_best_model=True)
    assert result == trainer.evaluate(test, load_best_model=False)
    if model == "BPR":
        trainer.resume_checkpoint(trainer.saved_model_file)
        assert trainer.start_epoch == 1


def test_torch_load_functions(tmp_path, monkeypatch):
    from recbole.quick_start import load_data_and_model

    trainer, train, valid, _ = recbole_trainer(tmp_path, "BPR", monkeypatch)
    trainer.fit(train, valid, verbose=False)
    config, model, *_ = load_data_and_model(trainer.saved_model_file)
    assert config["train_batch_size"] == 8 and config["no such key"] is None
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_models_with_a_pretraining_stage_load_their_checkpoints(tmp_path, monkeypatch):
    first, train, *_ = recbole_trainer(tmp_path / "1", "RaCT", monkeypatch, train_stage="actor_pretrain", pretrain_epochs=1, save_step=1)
    first.fit(train, verbose=False)
    path = first.saved_model_file
    second, *_ = recbole_trainer(tmp_path / "2", "RaCT", monkeypatch, train_stage="finetune", pre_model_path=str(path))
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


def test_plain_other_parameters(tmp_path, monkeypatch):
    trainer, train, valid, test = recbole_trainer(
        tmp_path, "GRU4RecF", monkeypatch, selected_features=["colour"], train_neg_sample_args=None
    )
    assert trainer.model.other_parameter() == {}
    assert any(name.startswith("feature_embed_layer.") for name in trainer.model.state_dict())
    trainer.fit(train, valid, verbose=False)
    assert trainer.evaluate(test, load_best_model=True) == trainer.evaluate(test, load_best_model=False)


def test_torch_scatter_functions():
    """MCCLK's layer averages neighbours, weighted by a softmax over each node's edges; node 2 has none."""
    from recbole.model.knowledge_aware_recommender.mcclk import Aggregator

    generator = torch.Generator().manual_seed(0)
    entities, relations = torch.randn(4, 3, generator=generator), torch.randn(2, 3, generator=generator)
    edges, kinds = torch.tensor([[0, 0, 1, 3, 0], [1, 2, 3, 3, 3]]), torch.tensor([0, 1, 1, 0, 1])
    layer = Aggregator(item_only=True, attention=True)
    with torch.no_grad():
        result = layer(entities, None, relations, edges, kinds, None)
        weights = layer.calculate_sim_hrt(entities[edges[0]], entities[edges[1]], relations[kinds]).reshape(-1)
    for node in range(4):
        mine = (edges[0] == node).nonzero().flatten()
        messages = entities[edges[1, mine]] * relations[kinds[mine]]
        expected = (weights[mine].softmax(0)[:, None] * messages).mean(0) if len(mine) else torch.zeros(3)
        torch.testing.assert_close(result[node], expected)
    assert "torch_scatter" not in sys.modules


def test_dgl_graph(tmp_path, monkeypatch):
    """KGAT's first attention: for each relation a matrix of rows that sum to one, all added up."""
    write_dataset(tmp_path / "kg")
    triples = ["x\tr1\ty", "y\tr1\tz", "x\tr2\tz", "x\tr1\tz", "w\tr2\tv"]
    (tmp_path / "kg" / "tiny" / "tiny.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\n" + "\n".join(triples) + "\n")
    (tmp_path / "kg" / "tiny" / "tiny.link").write_text("item_id:token\tentity_id:token\na\tx\nb\ty\nc\tz\nd\tw\ne\tv\n")
    columns = {"inter": ["user_id", "item_id"], "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    settings = {"load_col": columns, "data_path": str(tmp_path / "kg")}
    trainer, train, *_ = recbole_trainer(tmp_path / "unused", "KGAT", monkeypatch, **settings)
    graph = train._dataset.ckg_graph(form="coo", value_field="relation_id")
    expected = np.zeros(graph.shape)
    for relation in set(graph.data):
        counts = np.zeros(graph.shape)
        np.add.at(counts, (graph.row[graph.data == relation], graph.col[graph.data == relation]), 1)
        expected += counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(trainer.model.A_in.to_dense().numpy(), expected, rtol=1e-6)
    assert "dgl" not in sys.modules and expected.sum() > 0


def test_ksr_precision(tmp_path, monkeypatch):
    """KSR trains on preloaded vectors of entities and relations, which RecBole reads in double precision."""
    settings = write_dataset(tmp_path / "kg")
    folder = tmp_path / "kg" / "tiny"
    (folder / "tiny.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\nx\tr1\ty\ny\tr2\tz\nw\tr1\tv\n")
    (folder / "tiny.link").write_text("item_id:token\tentity_id:token\na\tx\nb\ty\nc\tz\nd\tw\ne\tv\n")
    for kind, names in (("ent", "xyzwv"), ("rel", ("r1", "r2"))):
        rows = [f"{name}\t0.{i} 0.5" for i, name in enumerate(names)]
        (folder / f"tiny.{kind}").write_text(f"{kind}_id:token\t{kind}_emb:float_seq\n" + "\n".join(rows) + "\n")
    columns = {
        "inter": settings["load_col"]["inter"],
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
        **{kind: [f"{kind}_id", f"{kind}_emb"] for kind in ("ent", "rel")},
    }
    own = {
        "load_col": columns, "data_path": str(tmp_path / "kg"), "additional_feat_suffix": ["ent", "rel"], "alias_of_entity_id": ["ent_id"],
        "alias_of_relation_id": ["rel_id"], "preload_weight": {"ent_id": "ent_emb", "rel_id": "rel_emb"}, "kg_embedding_size": 2,
        "train_neg_sample_args": None, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    }  # fmt: skip
    trainer, train, *_ = recbole_trainer(tmp_path / "unused", "KSR", monkeypatch, **own)
    np.testing.assert_allclose(trainer.model.relation_Matrix, [[0, 0], [0, 0.5], [0.1, 0.5]])
    assert np.isfinite(trainer._train_epoch(train, 0))


class Harm:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_checkpoints_that_run_code_are_refused(tmp_path, monkeypatch):
    """Among them one that calls RecBole's Config, which evaluates the strings that it gets; outside RecBole nothing is allowed."""
    import recbole.trainer.trainer as module
    from recbole.config import Config

    monkeypatch.setattr(sys, "argv", ["pytest"])
    mark = tmp_path / "harmed"
    for harm in (Harm(Path.touch, mark), Harm(eval, "1"), Harm(Config, "BPR", "tiny", None, {"x": f"open({str(mark)!r}, 'w')"})):
        torch.save({"config": harm}, tmp_path / "bad.pth")
        with pytest.raises(pickle.UnpicklingError):
            module.torch.load(tmp_path / "bad.pth")
    assert not mark.exists()
    torch.save({"matrix": scipy.sparse.csr_matrix(np.eye(2))}, tmp_path / "matrix.pth")
    assert module.torch.load(tmp_path / "matrix.pth")["matrix"].sum() == 2
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "matrix.pth")


def test_ray_optional():
    """`recbole.quick_start` is imported without ray, leaves no stand-in behind, and says so when ray is really needed."""
    script = (
        "import sys, recbole_mm\n"
        "sys.modules['pkg_resources'] = None\n"
        "from recbole.quick_start import objective_function\n"
        "import recbole.quick_start.quick_start as q\n"
        "assert 'ray' not in sys.modules\n"
        "sys.modules['ray'] = None\n"
        "try:\n    q.tune.report(a=1)\n"
        "except recbole_mm.errors.UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", "import recbole_mm.errors\n" + script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "ray" in done.stdout and "recbole-mm search" in done.stdout


def test_missing_recbole_names_the_command(monkeypatch):
    """Without RecBole `import recbole_mm` works and the import of RecBole says what to type; it is an ImportError and a UserError."""
    finder = next(f for f in sys.meta_path if isinstance(f, compat._Finder))
    monkeypatch.setattr(sys, "meta_path", [finder])
    with pytest.raises(ImportError, match="pip install --no-deps recbole==1.2.1") as caught:
        finder.find_spec("recbole")
    assert isinstance(caught.value, UserError) and finder.find_spec("recbole.utils", ["/nowhere"]) is None


def test_apply_is_idempotent_and_import_is_light():
    before = list(sys.meta_path)
    compat.apply()
    assert sys.meta_path == before
    script = "import sys, recbole_mm.compat; print(sorted({'torch', 'numpy', 'pandas', 'scipy', 'recbole'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert importlib.util.find_spec("recbole") is not None and recbole_mm.__version__


NEEDED = {  # adaptation -> test that fails without it
    "numpy_aliases": "test_numpy_aliases",
    "property_files_in_lower_case": "test_property",
    "scipy_dok_update": "test_scipy_dok_update",
    "pandas_frames": "test_pandas_frames",
    "torch_checkpoints": "test_torch_checkpoints and BPR",
    "torch_load_functions": "test_torch_load_functions or pretraining",
    "plain_other_parameters": "test_plain or ItemKNN",
    "torch_scatter_functions": "test_torch_scatter",
    "dgl_graph": "test_dgl",
    "ksr_precision": "test_ksr",
    "ray_optional": "test_ray_optional",
}


def test_every_adaptation_is_listed():
    used = {adapt.__name__ for adaptations in compat.AFTER_IMPORT.values() for adapt in adaptations}
    assert set(NEEDED) == used | {context.__name__ for context in compat.AROUND_IMPORT.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_each_adaptation_is_needed(name, tmp_path):
    """Take the adaptation out and watch its tests fail."""
    plugin = (
        "import sys, recbole_mm\nfrom recbole_mm import compat\n"
        f"for module, adaptations in compat.AFTER_IMPORT.items():\n"
        f"    compat.AFTER_IMPORT[module] = tuple(a for a in adaptations if a.__name__ != {name!r})\n"
        f"for module in [m for m, context in compat.AROUND_IMPORT.items() if context.__name__ == {name!r}]:\n    del compat.AROUND_IMPORT[module]\n"
    )
    (tmp_path / "without.py").write_text(plugin)
    (tmp_path / "sitecustomize.py").write_text("import sys\nif sys.argv[0] == '-c':\n    import without\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:cacheprovider", str(Path(__file__)), "-k", NEEDED[name], "-x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
