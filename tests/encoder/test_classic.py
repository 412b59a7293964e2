"""classic: what the bundled shop plants in pictures and texts can be read off its features."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from recbole_mm.data.content import ItemContent
from recbole_mm.encoder import build_encoder
from recbole_mm.encoder.classic import ClassicEncoder, describe_picture
from recbole_mm.errors import UserError
from recbole_mm.paths import bundled_dataset_dir


@pytest.fixture(scope="module")
def shop():
    truth = np.load(bundled_dataset_dir() / "shop" / "truth.npz")
    content = ItemContent(bundled_dataset_dir() / "shop", ["[PAD]", *truth["item_tokens"]])
    encoder = ClassicEncoder({})
    encoder.fit(content)
    pictures = torch.stack([encoder.preprocess(content.image(i)) for i in range(1, len(content.tokens))])
    texts = encoder.tokenize(content.texts(range(1, len(content.tokens))))
    return truth, content, encoder, encoder.encode(pictures, texts)


@pytest.mark.parametrize("modality, names", [("visual", ["colour", "pattern", "shape"]), ("textual", ["material", "occasion", "brand"])])
def test_attributes_can_be_read_linearly(shop, modality, names):
    truth, _, _, features = shop
    table = StandardScaler().fit_transform(features[modality].numpy())
    for name in names:
        label = truth["attributes"][:, list(truth["attribute_names"]).index(name)]
        model = LogisticRegression(max_iter=300, C=0.3).fit(table[:600], label[:600])
        assert model.score(table[600:], label[600:]) > 0.9, f"{name} from {modality}"


def test_widths_and_lengths(shop):
    _, _, encoder, features = shop
    assert encoder.modalities == ("textual", "visual")
    for name, table in features.items():
        assert table.shape == (1000, encoder.feature_dims[name]) and table.dtype == torch.float32
        torch.testing.assert_close(table.norm(dim=1), torch.full((1000,), table.shape[1] ** 0.5))


def test_the_same_catalogue_gives_the_same_features(shop):
    _, content, encoder, features = shop
    again = ClassicEncoder({})
    again.fit(content)
    torch.testing.assert_close(again.encode(texts=again.tokenize(content.texts(range(1, 50))))["textual"], features["textual"][:49])


def test_only_what_the_catalogue_has(tmp_path):
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\n1\tred mug\n2\tblue mug\n3\tred lamp\n", encoding="utf-8")
    content = ItemContent(tmp_path, ["[PAD]", "1", "2", "3"], name="x")
    encoder = build_encoder("classic", {"encoder_text_dim": 64})
    encoder.fit(content)
    assert encoder.modalities == ("textual",) and encoder.feature_dims["textual"] <= 3


def test_grey_and_tiny_pictures():
    for picture in (Image.new("L", (1, 1)), Image.new("RGB", (3, 200), "white")):
        assert np.isfinite(describe_picture(picture)).all()


def test_wrong_settings():
    with pytest.raises(UserError, match="at least 1"):
        ClassicEncoder({"encoder_text_dim": -3})
    with pytest.raises(UserError, match="Unknown encoder 'clsic'"):
        build_encoder("clsic", {})
