"""perpeft-analysis: counts of the paper, times from records, attention that is attention, pictures on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm.errors import UserError
from recbole_mm.model.perpeft.encoder import PeftEncoder
from recbole_mm.report.perpeft_analysis import attention_maps, draw_bars, heat_colours, main
from tests.model.test_perpeft_encoder import EVERY, LORA, build_items, randomise


def test_parameters_of_the_paper(tmp_path, capsys):
    assert main(["parameters", f"--output={tmp_path}"]) == 0
    table = json.loads((tmp_path / "perpeft_parameters.json").read_text())
    assert table["clip"] == 151_277_313
    rows = {row["kind"]: row for row in table["kinds"]}
    assert rows["lora"]["per_group"] == 245_760 and f"{rows['lora']['share']:.2%}" == "1.30%"
    assert rows["ia3"]["per_group"] == 46_080
    assert rows["iisan"]["per_group"] == 3_572_149
    assert "1.30%" in capsys.readouterr().out
    assert Image.open(tmp_path / "perpeft_parameters.png").size[0] > 300


def fake_run(folder: Path, name: str, scope: str, seconds: list[float], global_epochs=2) -> str:
    run = folder / name
    run.mkdir()
    settings = {"model": "PerPEFTSASRec", "peft_scope": scope, "peft_kind": "lora", "global_epochs": global_epochs}
    (run / "settings.yaml").write_text(json.dumps(settings))
    (run / "result.json").write_text(json.dumps({"epochs": [{"time_s": s} for s in seconds]}))
    return str(run)


def test_time_is_compared_with_global_peft(tmp_path):
    runs = [fake_run(tmp_path, "a", "personalized", [2.0, 2.0, 3.0, 3.0, 9.0]), fake_run(tmp_path, "b", "none", [0.5])]
    main(["time", f"--runs={','.join(runs)}"])
    rows = json.loads((tmp_path / "a" / "figures" / "perpeft_time.json").read_text())
    assert [(r["part"], r["median_s"], r["against_global"]) for r in rows] == [
        ("global", 2.0, 1.0),
        ("personalized", 3.0, 1.5),
        ("frozen", 0.5, None),
    ]
    assert (tmp_path / "a" / "figures" / "perpeft_time.png").is_file()


def test_attention_sums_to_one_differs_by_group_and_leaves_the_encoder_as_it_was():
    encoder = PeftEncoder(build_items(), "lora", 2, None, LORA).eval()
    for group in range(2):
        randomise(encoder.group_parameters(group), seed=group)
    before = encoder(EVERY, 1).detach()
    maps = {group: attention_maps(encoder, EVERY, group) for group in (None, 0, 1)}
    for patches, words in maps.values():
        assert patches.shape == (len(EVERY), 2, 2)
        torch.testing.assert_close(patches.sum((1, 2)), torch.ones(len(EVERY)))
        assert [len(w) for w in words] == (encoder.items.length[EVERY] - 2).tolist()
        assert all(abs(float(w.sum()) - 1) < 1e-5 for w in words)
    assert not torch.allclose(maps[0][0], maps[1][0], atol=1e-4) and not torch.allclose(maps[None][0], maps[0][0], atol=1e-4)
    torch.testing.assert_close(encoder(EVERY, 1).detach(), before)
    assert all(p.requires_grad for g in range(2) for p in encoder.group_parameters(g))


def test_heat_colours_run_from_cold_to_hot(tmp_path):
    colours = heat_colours(np.array([0.0, 0.5, 1.0]))
    assert colours.shape == (3, 3) and (np.diff(colours.sum(1)) > 0).all()
    draw_bars(tmp_path / "bars.png", "title", [("a", 1.0), ("b", 2.0)], "{:.1f}")
    pixels = np.asarray(Image.open(tmp_path / "bars.png")).astype(int)
    blue = (pixels == (58, 110, 165)).all(-1)
    one, two = blue[38:56].sum(1).max(), blue[66:84].sum(1).max()
    assert abs(two - 2 * one) <= 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["atention"], "Did you mean attention"),
        (["time"], "--runs"),
        (["attention"], "--run"),
        (["parameters", "--kind=lora"], "Did you mean kinds"),
    ],
)
def test_wrong_use_is_explained(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
