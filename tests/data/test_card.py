import numpy as np
import pytest
from PIL import Image

from recbole_mm.data.card import card_text, describe, main
from recbole_mm.errors import UserError
from recbole_mm.paths import bundled_dataset_dir


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "toy"
    (folder / "images").mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"a\t{i}\t{t}" for t, i in enumerate("xyz")] + [f"b\t{i}\t{t}" for t, i in enumerate("xyw")]
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")
    (folder / "toy.item").write_text("item_id:token\ttitle:token_seq\nx\tone\ny\ttwo words\nz\t\nq\tnot in the interactions\n")
    Image.new("RGB", (8, 4)).save(folder / "images" / "x.png")
    (folder / "images" / "y.png").write_text("broken")
    np.save(folder / "visual.npy", np.ones((2, 3), np.float16))
    (folder / "item_ids.txt").write_text("x\nz\n")
    return folder


def test_figures_worked_out_by_hand(folder):
    card = describe(folder)
    assert (card["users"], card["items"], card["interactions"]) == (2, 4, 6)
    assert card["density"] == 6 / 8
    assert card["cold"] == {"split": "leave-one-out by time", "items": 3, "test_share": 1.0}  # only x is in training
    assert card["per_item"]["max"] == 2 and card["per_user"]["mean"] == 3
    assert card["texts"]["title"]["items"] == 2 and card["texts"]["title"]["words"]["max"] == 2
    assert (card["pictures"]["items"], card["pictures"]["broken"], card["pictures"]["width"]["max"]) == (2, 1, 8)
    assert card["features"]["(dataset folder)"]["visual"] == {"columns": 3, "type": "float16", "items": 2}
    assert "| items without training interaction (leave-one-out by time) | 3 (75.0%) |" in card_text(card)


def test_ready_splits(folder):
    head, *lines = (folder / "toy.inter").read_text().splitlines()
    (folder / "toy.inter").unlink()
    for part, rows in (("train", lines[:4]), ("valid", lines[4:5]), ("test", lines[5:])):
        (folder / f"toy.{part}.inter").write_text("\n".join([head, *rows]) + "\n")
    card = describe(folder)
    assert card["parts"] == {"train": 4, "valid": 1, "test": 1}
    assert card["cold"] == {"split": "the ready split", "items": 1, "test_share": 1.0}


def test_names_from_data_stay_text(folder):
    (folder / "toy.item").write_text("item_id:token\t<script>|x:token_seq\nx\tone\n")
    text = card_text(describe(folder))
    assert "<script>" not in text and "&lt;script&gt;\\|x" in text


def test_the_command_writes_and_prints(folder, capsys):
    assert main(["--dataset", "toy", "--data_path", str(folder.parent)]) == 0
    assert (folder / "card.md").read_text() in capsys.readouterr().out
    with pytest.raises(UserError, match="Unknown dataset"):
        main(["--dataset", "none", "--data_path", str(folder.parent)])
    with pytest.raises(UserError, match="nothing to describe"):
        (folder / "toy.inter").unlink()
        describe(folder)


def test_the_shop_has_cold_items():
    card = describe(bundled_dataset_dir() / "shop")
    assert card["users"] == 1000 and 0.35 < card["cold"]["test_share"] < 0.55
    assert card["pictures"]["broken"] == 0 and card["pictures"]["items"] == card["items"]
