"""The VLMo encoder: choice of feature, tokenizer, saving, missing weights. The network's numbers are in test_vlmo_module.py."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm.encoder import wordpiece
from recbole_mm.encoder.vlmo import VLMoEncoder
from recbole_mm.encoder.vlmo_module import VLMoSizes
from recbole_mm.encoder.wordpiece import WordPieces
from recbole_mm.errors import UserError
from recbole_mm.files import write_json
from tests.encoder.support import TINY_VLMO, Catalogue, quiet


def build(**changes):
    torch.manual_seed(0)
    encoder = quiet(VLMoEncoder, {**TINY_VLMO, **changes}).eval()
    encoder.fit(Catalogue())
    return encoder


@pytest.mark.parametrize("feature, name", [("cls", None), ("raw", "raw_cls_feats"), ("projected", "cls_feats")])
def test_feature_is_the_vector_named(feature, name):
    encoder = build(feature=feature, encoder_joint=True)
    images, ids = torch.randn(2, 3, 32, 32), encoder.tokenize(["red shirt", "blue steel mug"])
    out = encoder.encode(images, ids)
    image, text = encoder.network.image(images), encoder.network.text(ids, (ids > 0).long())
    joint = encoder.network.joint(images, ids, (ids > 0).long())
    torch.testing.assert_close(out["visual"], image["feats"][:, 0] if name is None else image[name])
    torch.testing.assert_close(out["textual"], text["feats"][:, 0] if name is None else text[name], rtol=1e-5, atol=1e-5)
    want = {"cls": joint["raw_cls_feats"], "raw": joint["hidden"][-1][:, 0], "projected": joint["cls_feats"]}[feature]
    torch.testing.assert_close(out["joint"], want)
    assert encoder.feature_dims == {m: out[m].shape[1] for m in out}
    assert "joint" not in encoder.encode(images=images)


def test_joint_is_off_by_default():
    encoder = build()
    assert encoder.modalities == ("textual", "visual")
    assert "joint" not in encoder.encode(torch.randn(1, 3, 32, 32), encoder.tokenize(["mug"]))


def test_pictures_are_squashed_and_scaled_to_minus_one_and_one():
    picture = Image.fromarray(np.concatenate([np.zeros((30, 20, 3)), np.full((30, 40, 3), 255)], axis=1).astype(np.uint8))
    pixels = build().preprocess(picture)
    assert pixels.shape == (3, 32, 32)
    assert pixels.min() == -1 and pixels.max() == 1
    assert pixels[0, 16, 4] == -1 and pixels[0, 16, 20] == 1  # the dark third stays a third


def test_learned_vocabulary_knows_the_catalogue_and_spells_the_rest():
    pieces = WordPieces.learn(["Red shirt", "red mug", "Lamp"], 40)
    ids = pieces(["red lamp xyz prim"], 12)[0].tolist()
    words = {i: w for w, i in pieces.vocabulary.items()}
    assert [words[i] for i in ids] == ["[CLS]", "red", "lamp", "[UNK]", "p", "##r", "##i", "##m", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert [words[i] for i in pieces(["red " * 30], 5)[0].tolist()] == ["[CLS]", "red", "red", "red", "[SEP]"]
    assert pieces.continues(50).sum() == sum(w.startswith("##") for w in pieces.vocabulary)
    with pytest.raises(UserError, match="different characters"):
        WordPieces.learn(["abcdefghij"], 12)


def test_published_vocabulary_from_a_file(tmp_path, monkeypatch):
    """The ids of the released models come from the line numbers of bert-base-uncased's vocab.txt."""
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    lines = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##dish", "mug"]
    (tmp_path / "bert-base-uncased-vocab.txt").write_text("\n".join(lines) + "\n")
    pieces = WordPieces.load("bert-base-uncased")
    assert pieces(["Reddish mug"], 6).tolist() == [[101, 104, 105, 106, 102, 0]]
    assert (pieces.pad, pieces.unk, pieces.cls, pieces.sep, pieces.mask) == (0, 100, 101, 102, 103)


def test_missing_vocabulary_and_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(wordpiece, "hub_file", lambda *args: None)
    with pytest.raises(UserError, match="download https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt and save"):
        WordPieces.load("bert-base-uncased")
    with pytest.raises(UserError, match="microsoft/unilm.*save them as .*vlmo_base_plus_patch16_224.pt"):
        build(pretrained="vlmo_base_plus_patch16_224.pt")


def test_saved_encoder_comes_back_with_its_vocabulary(tmp_path):
    encoder = build()
    encoder.save(tmp_path / "own")
    again = quiet(VLMoEncoder, {"pretrained": str(tmp_path / "own")}).eval()
    ids = encoder.tokenize(["green cotton mug"])
    assert torch.equal(again.tokenize(["green cotton mug"]), ids)
    with torch.no_grad():
        assert torch.equal(again.encode(texts=ids)["textual"], encoder.encode(texts=ids)["textual"])


def test_a_file_without_the_head_that_the_feature_reads_is_refused(tmp_path):
    encoder = build()
    state = {k: v for k, v in encoder.network.state_dict().items() if "itc_" not in k and "_vl." not in k}
    folder = tmp_path / "text_only"
    encoder.save(folder)
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    write_json(folder / "vlmo_config.json", asdict(VLMoSizes(**{**asdict(encoder.sizes)})))
    quiet(VLMoEncoder, {"pretrained": str(folder), "feature": "cls"})
    with pytest.raises(UserError, match="itc_text_proj"):
        quiet(VLMoEncoder, {"pretrained": str(folder), "feature": "projected"})
    with pytest.raises(UserError, match="mlp_vl|norm2_vl"):
        quiet(VLMoEncoder, {"pretrained": str(folder), "encoder_joint": True})


def test_frozen_blocks():
    encoder = build()
    encoder.freeze(2)
    network = encoder.network
    assert not any(p.requires_grad for b in network.transformer.blocks[:2] for p in b.parameters())
    assert all(p.requires_grad for b in network.transformer.blocks[2:] for p in b.parameters())
    assert not network.transformer.cls_token.requires_grad and not network.text_embeddings.word_embeddings.weight.requires_grad


def test_unknown_variant_is_named():
    with pytest.raises(UserError, match="base, base_plus, large"):
        build(encoder_variant="huge")
