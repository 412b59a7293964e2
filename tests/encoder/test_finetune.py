"""Fine-tuning: the cached gradient, the losses, stopping, resume, and the command from pictures to a feature set."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm import checkpoint
from recbole_mm.cli import main
from recbole_mm.config import Config
from recbole_mm.encoder import finetune
from recbole_mm.encoder.finetune import Finetuner, cached_step, random_crops
from recbole_mm.errors import UserError
from tests.encoder.support import TINY_CLIP, TINY_VLMO, WORDS, quiet

CLIP = {"encoder": "tiny-clip", "encoder_sizes": TINY_CLIP["encoder_sizes"]}
VLMO = {"encoder": "vlmo", **{k: v for k, v in TINY_VLMO.items() if k != "feature"}}


@pytest.fixture
def shop(tmp_path):
    """A dataset of 24 items on disk: colour as picture and as word; item 5 has no picture."""
    folder = tmp_path / "data" / "mini"
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = ["item_id:token\ttitle:token_seq"]
    for i in range(1, 25):
        lines.append(f"i{i}\t{WORDS[i % 3]} {WORDS[3 + i % 2]} number{i}")
        pixels = draw.integers(0, 60, (20, 20, 3))
        pixels[:, :, i % 3] += 150
        if i != 5:
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"i{i}.png")
    (folder / "mini.item").write_text("\n".join(lines) + "\n")
    (folder / "mini.inter").write_text("user_id:token\titem_id:token\nu1\ti1\nu2\ti2\n")
    return tmp_path


def settings(shop, base=CLIP, **changes):
    given = {
        "dataset": "mini", "data_path": str(shop / "data"), "use_gpu": False, "seed": 1, "checkpoint_dir": str(shop / "saved"),
        "finetune_epochs": 3, "finetune_batch_size": 9, "finetune_micro_batch": 4, "finetune_valid_share": 0.2, "finetune_patience": 9,
        "finetune_learning_rate": 0.003, "finetune_crop": 0.8, "finetune_mirror": True, "finetune_word_dropout": 0.2,
    }  # fmt: skip
    return {**given, **base, **changes}


def tuner(shop, base=CLIP, folder="run", **changes):
    given = settings(shop, base, **changes)
    return quiet(Finetuner, Config("BPR", config_dict=given), shop / folder, given)


def test_cached_step_gives_the_gradient_of_the_whole_batch():
    """Also with dropout: both passes see the same draws."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4))
    scale = torch.nn.Parameter(torch.tensor(1.0))
    table = torch.randn(10, 5)
    parts = torch.arange(10).split(4)

    def features(items):
        return [net(table[items]), net(table[items] + 1)]

    def loss(found):
        return finetune.vlmo.contrast(scale * found[0] @ found[1].t())

    torch.manual_seed(1)
    value, found = cached_step(parts, features, loss)
    got = [p.grad.clone() for p in (*net.parameters(), scale)]
    net.zero_grad()
    scale.grad = None
    torch.manual_seed(1)
    whole = [torch.cat(column) for column in zip(*(features(p) for p in parts))]
    want = loss(whole)
    want.backward()
    assert value == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(found[0], whole[0].detach())
    for a, b in zip(got, (*net.parameters(), scale)):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", [CLIP, VLMO], ids=["clip", "vlmo"])
def test_micro_batches_do_not_change_the_step(shop, base):
    """Contrast, matching and masked words over 8 pairs, encoded 3 at a time or all at once, with the same draws of negatives and masks."""
    gradients = []
    for micro in (3, 8):
        t = tuner(shop, base, finetune_micro_batch=micro, finetune_crop=1.0, finetune_mirror=False, finetune_word_dropout=0.0)
        t.encoder.train()
        torch.manual_seed(5)
        total = t.losses.backward(t.train_items[:8])
        gradients.append((total, {n: p.grad for n, p in t.encoder.named_parameters() if p.grad is not None}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-4)
    assert gradients[0][1].keys() == gradients[1][1].keys()
    for name, g in gradients[0][1].items():
        assert (g - gradients[1][1][name]).abs().max() <= 1e-4 * max(1.0, g.abs().max().item()), name


def test_vlmo_loss_has_three_parts(shop):
    t = tuner(shop, VLMO)
    t.encoder.train()
    t.losses.backward(t.train_items[:8])
    for head in ("itc_image_proj", "itc_vl_text_proj", "itm_score", "mlm_score", "logit_vl_scale"):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in t.encoder.named_parameters() if head in n), head


@pytest.mark.parametrize("base", [CLIP, VLMO], ids=["clip", "vlmo"])
def test_a_resumed_run_ends_where_the_unbroken_one_ends(shop, base):
    whole = tuner(shop, base, "whole")
    whole.fit()
    broken = tuner(shop, base, "broken")
    save = broken._save

    def save_and_die():
        save()
        if broken.epoch == 2:
            raise KeyboardInterrupt

    broken._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    torch.rand(7)  # whatever else has drawn in between
    again = tuner(shop, base, "broken")
    left = again.folder / ".last.ab12cd34.pt"  # what a kill in the midst of writing leaves
    left.write_bytes(b"half")
    again.resume()
    again.fit()
    assert not left.exists()
    for (name, a), b in zip(whole.encoder.state_dict().items(), again.encoder.state_dict().values()):
        assert torch.equal(a, b), name
    drop = [{k: v for k, v in h.items() if k != "time_s"} for h in whole.history]
    assert drop == [{k: v for k, v in h.items() if k != "time_s"} for h in again.history]


def test_training_learns_the_pairs_and_keeps_the_best_weights(shop):
    """Colour is all that picture and text share: held-out pictures find a text of their colour."""
    t = tuner(shop, finetune_epochs=40, finetune_batch_size=16, finetune_micro_batch=16, finetune_crop=1.0)
    first = t.validate()
    t.fit()
    best = min(t.history, key=lambda h: h["valid_loss"])
    assert best["valid_loss"] < first["valid_loss"] - 0.2
    from recbole_mm.encoder.clip import CLIPEncoder

    kept = CLIPEncoder({**CLIP, "encoder_library": "transformers", "pretrained": str(t.finish())})
    t.encoder.load_state_dict(kept.state_dict())
    assert t.validate()["valid_loss"] == pytest.approx(best["valid_loss"], abs=1e-5)


def test_training_stops_when_validation_no_longer_improves(shop):
    t = tuner(shop, finetune_epochs=30, finetune_patience=2)
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    t.validate = lambda: {"valid_loss": next(losses), "recall@1": 0.0}
    t.fit()
    assert len(t.history) == 4 and t.best == 2.0


def test_rate_warms_up_and_falls_to_zero(shop):
    t = tuner(shop, finetune_epochs=50, finetune_warmup=0.1)
    rates = []
    for step in range(t.steps + 1):
        t.step = step
        rates.append(t._rate())
    warm = round(0.1 * t.steps)
    assert rates[0] == pytest.approx(1 / warm) and max(rates) == 1 and rates[warm - 1] == 1 and rates[-1] == 0
    assert all(a < b for a, b in zip(rates[: warm - 1], rates[1:warm])) and all(a > b for a, b in zip(rates[warm:], rates[warm + 1 :]))


def test_scale_of_clip_is_clipped_at_100(shop):
    t = tuner(shop)
    with torch.no_grad():
        t.encoder.logit_scale.fill_(7.0)
    t.losses.after_step()
    assert t.encoder.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)


def test_validation_items_are_not_trained_on_and_follow_the_seed(shop):
    a, b, c = tuner(shop), tuner(shop), tuner(shop, seed=2)
    assert not set(a.valid_items.tolist()) & set(a.train_items.tolist())
    assert len(a.valid_items) + len(a.train_items) == 23  # item 5 has no picture
    assert torch.equal(a.valid_items, b.valid_items) and not torch.equal(a.valid_items, c.valid_items)


def test_word_dropout_blanks_words_only_and_only_in_training(shop):
    for base, specials in ((CLIP, (49406, 49407)), (VLMO, None)):
        t = tuner(shop, base, finetune_word_dropout=0.5)
        items = t.train_items
        t.encoder.eval()
        plain = t.texts(items)
        t.encoder.train()
        blanked = t.texts(items)
        changed = blanked != plain
        specials = specials or (t.encoder.pieces.cls, t.encoder.pieces.sep)
        assert 0.3 < changed.sum() / t.encoder.is_word(plain).sum() < 0.7
        assert (blanked[changed] == t.encoder.blank).all()
        assert not any((plain[changed] == s).any() for s in specials)


def test_random_crops_stay_inside_and_keep_the_size():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    crops = random_crops(ramp, 0.5)
    spread = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert crops.shape == ramp.shape and crops.min() >= 0 and crops.max() <= 1
    assert spread.min() > 0.5**0.5 - 0.08 and spread.max() > 0.9
    torch.testing.assert_close(random_crops(ramp, 1.0), ramp, rtol=1e-4, atol=1e-4)


def test_command_makes_a_feature_set_that_clipmodel_can_load(shop, capsys):
    words = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in settings(shop, finetune_epochs=2).items()]
    assert quiet(main, ["finetune", *words]) == 0
    folder = shop / "saved" / "finetune-tiny-clip-mini"
    made = shop / "data" / "mini" / "features" / "tiny-clip-finetuned"
    meta = json.loads((made / "meta.json").read_text())
    assert np.load(made / "visual.npy").shape == (24, 32) and np.load(made / "textual.npy").shape == (24, 16)
    assert meta["missing"]["visual"] == ["i5"] and meta["settings"]["pretrained"] == str(folder / "encoder")
    record = json.loads((folder / "finetune.json").read_text())
    assert record["pairs"] == {"train": 18, "valid": 5} and len(record["epochs"]) == 2
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / "encoder")
    assert model.config.vision_config.hidden_size == 32
    last = checkpoint.load(folder / "last.pt")
    assert last["epoch"] == 2
    assert quiet(main, ["finetune", f"--resume={folder}"]) == 0  # nothing left to train: extraction again
    assert "feature set in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"finetune_valid_share": 0.99}, "finetune_valid_share"),
        ({"finetune_batch_size": 1}, "finetune_batch_size"),
        ({"encoder": "cnn", "pretrained": None}, "no joint space"),
        ({"encoder": "classic"}, "no joint space"),
        ({"image_folder": "nowhere"}, "both a picture and a text"),
    ],
)
def test_wrong_settings_are_named(shop, changes, message):
    with pytest.raises(UserError, match=message):
        tuner(shop, **changes)


def test_command_needs_a_dataset_and_an_encoder(capsys):
    assert main(["finetune", "--encoder=tiny-clip"]) == 2
    assert "--dataset" in capsys.readouterr().err
