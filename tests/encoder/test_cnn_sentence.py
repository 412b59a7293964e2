"""The modality-specific baseline against timm's and transformers' own code with the same random weights."""

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from recbole_mm.encoder import cnn
from recbole_mm.encoder import sentence as sentence_module
from recbole_mm.encoder.cnn import CNNEncoder
from recbole_mm.encoder.sentence import SentenceEncoder
from recbole_mm.encoder.wordpiece import WordPieces
from recbole_mm.errors import UserError
from tests.encoder.support import Catalogue, quiet

TEXTS = ["red shirt", "a blue steel mug of wood", "lamp " * 40]


@pytest.fixture
def picture(tmp_path):
    draw = np.random.default_rng(0)
    Image.fromarray(np.kron(draw.integers(0, 256, (8, 9, 3)), np.ones((40, 40, 1))).astype(np.uint8)).save(tmp_path / "p.jpg")
    return Image.open(tmp_path / "p.jpg")


def network(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pt")
    return model


def test_cnn_features_equal_timm(tmp_path, picture):
    """From a JPEG through timm's own evaluation transform; the file holds the classifier, which is dropped."""
    model = network(tmp_path)
    encoder = CNNEncoder({"encoder_model": "resnet18", "pretrained": str(tmp_path / "resnet18.pt")}).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        want = model.forward_head(model.forward_features(transform(picture)[None]), pre_logits=True)
        got = encoder.encode(encoder.preprocess(picture)[None])["visual"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert encoder.feature_dims == {"visual": 512} and encoder.modalities == ("visual",)


@pytest.mark.parametrize("layer, width", [(1, 64), (-1, 512)])
def test_cnn_layer_choice(tmp_path, picture, layer, width):
    model = network(tmp_path)
    encoder = CNNEncoder({"encoder_model": "resnet18", "pretrained": str(tmp_path / "resnet18.pt"), "encoder_layer": layer}).eval()
    image = encoder.preprocess(picture)[None]
    with torch.no_grad():
        x = model.maxpool(model.act1(model.bn1(model.conv1(image))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4)[: 1 if layer == 1 else 4]:
            x = stage(x)
        torch.testing.assert_close(encoder.encode(image)["visual"], x.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    assert encoder.feature_dims == {"visual": width}


def test_cnn_batch_statistics_stay_in_training(tmp_path, picture):
    encoder = quiet(CNNEncoder, {"encoder_model": "resnet18", "pretrained": None}).train()
    before = encoder.network.bn1.running_mean.clone()
    encoder.encode(torch.randn(2, 3, 64, 64))["visual"].sum().backward()
    assert torch.equal(before, encoder.network.bn1.running_mean)
    assert encoder.network.conv1.weight.grad is not None
    encoder.freeze(1)
    assert not encoder.network.layer1[0].conv1.weight.requires_grad and encoder.network.layer2[0].conv1.weight.requires_grad


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"encoder_model": "resnet5"}, "Did you mean"),
        ({"encoder_model": "resnet18", "encoder_layer": 9}, "0 to 4"),
        ({"encoder_model": "resnet18", "feature": "projected"}, "encoder_layer"),
    ],
)
def test_cnn_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        quiet(CNNEncoder, {"pretrained": None, **settings})


def test_cnn_missing_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(cnn, "hub_file", lambda *args: None)
    with pytest.raises(UserError, match="download them from https://huggingface.co/timm/resnet18.*save them as .*resnet18.*safetensors"):
        CNNEncoder({"encoder_model": "resnet18", "pretrained": "timm"})


def sentence_folder(tmp_path):
    """A small BERT with its tokenizer as sentence-transformers would publish it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    model = transformers.BertModel(config).eval()
    folder = tmp_path / "minilm"
    model.save_pretrained(folder)
    WordPieces.learn(Catalogue().texts(range(1, 25)), 300).tokenizer.save_pretrained(folder)
    return folder, model


def test_sentence_features_equal_mean_pooling(tmp_path):
    folder, model = sentence_folder(tmp_path)
    encoder = SentenceEncoder({"pretrained": str(folder), "encoder_text_length": 16}).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        got = encoder.encode(texts=encoder.tokenize(TEXTS))["textual"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    plain = SentenceEncoder({"pretrained": str(folder), "encoder_text_length": 16, "encoder_normalize": False}).eval()
    with torch.no_grad():
        assert not torch.allclose(plain.encode(texts=plain.tokenize(TEXTS))["textual"], want)


def test_sentence_from_random_weights_learns_its_vocabulary_and_saves_it(tmp_path):
    sizes = {"width": 32, "layers": 1, "heads": 2}
    encoder = quiet(SentenceEncoder, {"pretrained": None, "encoder_sizes": sizes, "encoder_vocab_size": 200}).eval()
    with pytest.raises(UserError, match="vocabulary"):
        encoder.tokenize(["mug"])
    encoder.fit(Catalogue())
    encoder.save(tmp_path / "own")
    again = SentenceEncoder({"pretrained": str(tmp_path / "own")}).eval()
    ids = encoder.tokenize(TEXTS)
    assert torch.equal(again.tokenize(TEXTS), ids)
    with torch.no_grad():
        assert torch.equal(again.encode(texts=ids)["textual"], encoder.encode(texts=ids)["textual"])


def test_sentence_missing_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(sentence_module, "hub_or_path", lambda name: None)
    with pytest.raises(UserError, match="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 .*save them as"):
        SentenceEncoder({"pretrained": "sentence-transformers/all-MiniLM-L6-v2"})
