"""Extraction: the same file whatever happens on the way; nothing missing in silence."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import recbole_mm.encoder.extract as module
from recbole_mm import cli, run
from recbole_mm.config import Config
from recbole_mm.data.features import load_feature_set
from recbole_mm.encoder.extract import batch_size, extract, fast_bf16
from recbole_mm.errors import UserError
from recbole_mm.paths import bundled_dataset_dir


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A few items of the shop, to be written to; the working directory holds ``dataset/shop``."""
    source, target = bundled_dataset_dir() / "shop", tmp_path / "dataset" / "shop"
    (target / "images").mkdir(parents=True)
    for name in ("shop.inter", "shop.item", "shop.user"):
        shutil.copy(source / name, target)
    tokens = [line.split("\t")[0] for line in (source / "shop.item").read_text().splitlines()[1:41]]
    lines = (source / "shop.item").read_text().splitlines()
    (target / "shop.item").write_text("\n".join(lines[:41]) + "\n")
    for token in tokens:
        shutil.copy(source / "images" / f"{token}.jpg", target / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "PART", 8)
    return target


def config(**more):
    return Config(
        "VBPR", "shop", config_dict={"encoder": "classic", "use_gpu": False, "encoder_workers": 0, "encoder_batch_size": 4, **more}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))} | {"ids": (folder / "item_ids.txt").read_bytes()}


def test_a_feature_set_with_its_record(shop):
    folder = extract(config(), progress=False)
    assert folder == shop / "features" / "classic"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["encoder"]["encoder"] == "classic" and meta["precision"] == "fp32" and meta["versions"]["recbole_mm"]
    assert meta["inputs"]["visual"]["items"] == 40 and meta["missing"] == {"textual": [], "visual": []}
    assert set(meta["outputs"]) == {"textual", "visual"}
    assert not list(shop.glob("features/.*")), "nothing is left of the parts"


def test_duplicates_are_encoded_once_and_workers_change_nothing(shop):
    images = sorted((shop / "images").iterdir())
    shutil.copy(images[0], images[1])
    first = files(extract(config(), progress=False))
    meta = json.loads((shop / "features/classic/meta.json").read_text())
    assert meta["inputs"]["visual"] == {**meta["inputs"]["visual"], "items": 40, "distinct": 39}
    assert first == files(extract(config(encoder_workers=2), shop / "features" / "again", progress=False))


def test_a_broken_and_a_missing_picture_are_listed(shop):
    images = sorted((shop / "images").iterdir())
    images[0].write_bytes(b"not a picture")
    images[1].unlink()
    folder = extract(config(), progress=False)
    meta = json.loads((folder / "meta.json").read_text())
    assert sorted(meta["missing"]["visual"]) == sorted([images[0].stem, images[1].stem])
    assert list(meta["broken"]["visual"]) == [images[0].stem] and "no picture that can be read" in meta["broken"]["visual"][images[0].stem]
    tokens = ["[PAD]", images[0].stem, images[1].stem, images[2].stem]
    assert not load_feature_set(folder, tokens, ["visual"], "zero")["visual"][:3].any()
    with pytest.raises(UserError, match="2 of 3 items have no row"):
        load_feature_set(folder, tokens, ["visual"], "error")


def test_an_interrupted_extraction_continues(shop, monkeypatch):
    whole = files(extract(config(), shop / "features" / "whole", progress=False))
    real, calls = module._encode, []

    def stop_after(limit):
        def encode(*args):
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return real(*args)

        return encode

    for limit in (3, 5, 7):
        calls.clear()
        monkeypatch.setattr(module, "_encode", stop_after(limit))
        with pytest.raises(KeyboardInterrupt):
            extract(config(), progress=False)
        assert not (shop / "features" / "classic" / "meta.json").exists()
    calls.clear()
    monkeypatch.setattr(module, "_encode", lambda *args: calls.append(1) or real(*args))
    assert files(extract(config(), progress=False)) == whole
    assert len(calls) < 20, "finished parts are not made again"


def test_parts_of_other_settings_are_not_used(shop, monkeypatch):
    real = module._merge
    monkeypatch.setattr(module, "_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(config(encoder_image_dim=5), progress=False)
    monkeypatch.setattr(module, "_merge", real)
    assert np.load(extract(config(encoder_image_dim=7), progress=False) / "visual.npy").shape == (40, 7)


def test_kill_9_of_the_real_program(shop):
    whole = files(extract(config(), shop / "features" / "whole", progress=False))
    code = (
        "import time, sys, recbole_mm.encoder.extract as m; m.PART = 8; real = m._encode\n"
        "def slow(*a):\n    time.sleep(0.2); return real(*a)\n"
        "m._encode = slow; m.main(['--dataset=shop', '--encoder=classic', '--use_gpu=False', '--encoder_workers=0', '--encoder_batch_size=4'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = shop / "features" / ".classic.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.npy")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not (shop / "features" / "classic").exists()
    assert files(extract(config(), progress=False)) == whole


def test_two_processes_give_the_same_file(shop):
    """The parts are shared out by rank under torchrun; 40 inputs are one part, so both modalities fall to one process unless PART is small."""
    whole = files(extract(config(), shop / "features" / "whole", progress=False))
    code = "import sys, recbole_mm.encoder.extract as m; m.PART = 8; m.main(sys.argv[1:])"
    (shop.parent.parent / "go.py").write_text(code)
    words = ["--dataset=shop", "--encoder=classic", "--use_gpu=False", "--encoder_workers=0", "--encoder_batch_size=4"]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "go.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(shop / "features" / "classic") == whole


def test_a_run_makes_its_missing_features_first(shop, capsys):
    settings = {"use_gpu": False, "epochs": 1, "state": "error", "show_progress": False, "tensorboard": False, "encoder_workers": 0}
    outcome = run("VBPR", "shop", config_dict={**settings, "modalities": ["visual"]})
    assert outcome["record"]["modalities"] == ["visual"]
    outcome = run("VBPR", "shop", config_dict=settings)
    assert outcome["record"]["modalities"] == ["textual", "visual"], (
        "the set holds all that the encoder gives, whatever the first run wanted"
    )
    assert (shop / "features" / "classic" / "meta.json").is_file()
    (shop / "features" / "classic").rename(shop / "features" / "kept")
    run("BPR", "shop", config_dict=settings)
    assert not (shop / "features" / "classic").exists(), "a model that reads no features needs none"
    with pytest.raises(UserError, match="was made with encoder_image_dim=64, this run asks for 9"):
        (shop / "features" / "kept").rename(shop / "features" / "classic")
        run("VBPR", "shop", config_dict={**settings, "encoder_image_dim": 9})


def test_runs_of_several_seeds_share_random_weights_if_told(shop):
    settings = {"use_gpu": False, "epochs": 1, "state": "error", "show_progress": False, "tensorboard": False, "encoder_workers": 0}
    settings |= {"encoder": "tiny-clip", "modalities": ["visual"]}
    run("VBPR", "shop", config_dict={**settings, "seed": 1})
    before = files(shop / "features" / "tiny-clip")
    with pytest.raises(UserError, match="was made with seed=1, this run asks for 2.*--encoder_seed=1"):
        run("VBPR", "shop", config_dict={**settings, "seed": 2})
    assert run("VBPR", "shop", config_dict={**settings, "seed": 2, "encoder_seed": 1})["record"]["status"] == "finished"
    assert files(shop / "features" / "tiny-clip") == before


def test_the_command(shop, capsys):
    words = [
        "extract",
        "--dataset=shop",
        "--encoder=classic",
        "--use_gpu=False",
        "--modalities=visual",
        "--feature_set=pictures",
        "--encoder_workers=0",
    ]
    assert cli.main(words) == 0
    assert "visual: 40 items x" in capsys.readouterr().out and [p.name for p in (shop / "features/pictures").glob("*.npy")] == [
        "visual.npy"
    ]
    assert cli.main(words) == 0
    assert "Already there" in capsys.readouterr().out
    assert cli.main([*words, "--overwrite"]) == 0
    assert "Written" in capsys.readouterr().out
    for bad, says in (
        (["--encoder=clasic"], "Unknown encoder"),
        (["--encoder_precision=fp8"], "encoder_precision"),
        (["--modalities=acoustic"], "cannot encode acoustic"),
    ):
        assert cli.main([*words[:2], *bad, "--feature_set=x", *([] if "encoder=" in bad[0] else ["--encoder=classic"])]) == 2
        assert says in capsys.readouterr().err


def test_nothing_to_encode(tastes, capsys):
    shutil.rmtree("dataset/tastes/images", ignore_errors=True)
    Path("dataset/tastes/tastes.item").unlink()
    with pytest.raises(UserError, match="neither pictures .* nor texts"):
        extract(Config("VBPR", config_dict={**tastes, "encoder": "classic"}), progress=False)


def test_an_encoder_with_weights_runs_in_bf16_where_the_processor_is_made_for_it():
    import torch
    from torch import nn

    assert module.choose_precision(nn.Linear(2, 2), "auto", torch.device("cpu")) == ("bf16" if fast_bf16(torch.device("cpu")) else "fp32")
    assert module.choose_precision(nn.Linear(2, 2), "fp32", torch.device("cpu")) == "fp32"
    assert module.choose_precision(nn.Identity(), "bf16", torch.device("cpu")) == "fp32"


def test_pictures_of_several_sizes(shop):
    Image.new("RGB", (300, 20), "red").save(sorted((shop / "images").iterdir())[0])
    assert np.isfinite(np.load(extract(config(), progress=False) / "visual.npy")).all()


def test_a_dataset_with_texts_but_without_features_gets_classic(tastes):
    """Nobody named an encoder; pictures or texts are there. Features that lie in the folder come first."""
    assert run("VBPR", config_dict={**tastes, "epochs": 1})["record"]["encoder"] is None
    for path in [*Path("dataset/tastes").glob("*.npy"), Path("dataset/tastes/item_ids.txt")]:
        path.unlink()
    items = [f"i{item}\t{'red blue green tall wide'.split()[item % 5]} mug {item}" for item in range(1, 40)]
    Path("dataset/tastes/tastes.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(items) + "\n")
    record = run("VBPR", config_dict={**tastes, "epochs": 1})["record"]
    assert record["encoder"] == "classic" and record["modalities"] == ["textual"]


def test_a_set_grows_by_the_modality_that_is_asked_for(shop):
    whole = files(extract(config(), shop / "features" / "whole", progress=False))
    folder = extract(config(modalities=["visual"]), progress=False)
    assert [path.name for path in folder.glob("*.npy")] == ["visual.npy"]
    run_config = config(modalities=["textual"])
    module.ensure_features(run_config)
    assert files(folder) == whole
    with pytest.raises(UserError, match="classic cannot encode acoustic"):
        module.ensure_features(config(modalities=["visual", "acoustic"]))
    np.save(shop / "acoustic.npy", np.ones((1, 1)))
    module.ensure_features(config(modalities=["visual", "acoustic"]))
    assert files(folder) == whole


def test_two_programs_at_once_make_one_set(shop):
    """The second waits for the first and finds the set made."""
    code = "import sys, recbole_mm.encoder.extract as m; m.PART = 8; m.main(sys.argv[1:])"
    words = ["--dataset=shop", "--encoder=classic", "--use_gpu=False", "--encoder_workers=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    programs = [
        subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    assert [program.wait(120) for program in programs] == [0, 0]
    assert not list((shop / "features").glob(".*")) and (shop / "features" / "classic" / "meta.json").is_file()
    for program in programs:
        program.stdout.close()


def test_tokens_that_cannot_be_written_are_refused_before_the_work(shop):
    with open(shop / "shop.item", "a", encoding="utf-8") as file:
        file.write(" x \tmug\n")
    with pytest.raises(UserError, match="item token ' x '"):
        extract(config(), progress=False)


def test_batch_size_suits_modality_and_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [batch_size(None, m, cpu) for m in ("visual", "joint", "textual")] == [16, 16, 32]
    assert batch_size(None, "visual", gpu) == 256 and batch_size(7, "textual", cpu) == 7
