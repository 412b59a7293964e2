"""CLIP through our wrapper against open_clip's and transformers' own code, from a JPEG file to the feature."""

import io
import warnings

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from recbole_mm.encoder import clip, weights
from recbole_mm.encoder.clip import CLIPEncoder, build_sizes, trim
from recbole_mm.errors import UserError

SIZES = {
    "joint_width": 24, "width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32,
    "text_width": 16, "text_layers": 2, "text_heads": 2, "context": 20,
}  # fmt: skip
TEXTS = ["a red cotton shirt", "Blue running shoes, size 42: light & breathable!", "", "mug " * 60]


def settings(**changes):
    return {"encoder_library": "open_clip", "encoder_sizes": SIZES, "pretrained": None, "feature": "projected", **changes}


def build(**changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLIPEncoder(settings(**changes)).eval()


@pytest.fixture
def pictures(tmp_path):
    """JPEG files of several shapes, one of them grey."""
    draw = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(48, 48, 3), (40, 90, 3), (61, 33, 3), (50, 50)]):
        smooth = np.kron(draw.integers(0, 256, (5, 5, *shape[2:])), np.ones((20, 20, *[1] * len(shape[2:]))))[: shape[0], : shape[1]]
        paths.append(tmp_path / f"{i}.jpg")
        Image.fromarray(smooth.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def ours(encoder, paths):
    images = torch.stack([encoder.preprocess(Image.open(p)) for p in paths])
    with torch.no_grad():
        return encoder.encode(images, encoder.tokenize(TEXTS))


def open_clip_model(encoder):
    model = open_clip.CLIP(**build_sizes(SIZES, None)).eval()
    model.load_state_dict(encoder.network.model.state_dict())
    return model


def open_clip_inputs(paths):
    transform = open_clip.image_transform(32, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    return torch.stack([transform(Image.open(p)) for p in paths]), open_clip.SimpleTokenizer()(TEXTS, context_length=SIZES["context"])


def test_projected_features_equal_open_clip(pictures):
    torch.manual_seed(0)
    encoder = build()
    got, model = ours(encoder, pictures), open_clip_model(encoder)
    images, ids = open_clip_inputs(pictures)
    with torch.no_grad():
        torch.testing.assert_close(got["visual"], model.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["textual"], model.encode_text(ids, normalize=True), rtol=1e-5, atol=1e-6)
    assert encoder.feature_dims == {"textual": 24, "visual": 24}


def test_class_token_features_equal_open_clip_without_projections(pictures):
    torch.manual_seed(0)
    encoder = build(feature="cls")
    got, model = ours(encoder, pictures), open_clip_model(encoder)
    model.visual.proj = None
    model.text_projection = None
    images, ids = open_clip_inputs(pictures)
    with torch.no_grad():
        torch.testing.assert_close(got["visual"], model.encode_image(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["textual"], model.encode_text(ids), rtol=1e-5, atol=1e-5)
    assert encoder.feature_dims == {"textual": 16, "visual": 32}


@pytest.mark.parametrize("more", [{}, {"ls_init_value": 0.5}, {"final_ln_after_pool": True}, {"no_ln_pre": True}])
@pytest.mark.parametrize("feature", ["projected", "cls", "raw"])
def test_last_block_for_the_class_token_only(feature, more):
    """Without gradients the last block sees one query; the features are those of the whole forward, which runs with gradients."""
    torch.manual_seed(0)
    encoder = build(feature=feature)
    if more:
        config = build_sizes(SIZES, None)
        config["vision_cfg"].update(more)
        encoder.network.model = open_clip.CLIP(**config).eval()
    last, rows = encoder.network.model.visual.transformer.resblocks[-1], []
    last.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        short = encoder.encode(images)["visual"]
    whole = encoder.encode(images)["visual"]
    assert rows == [1, 17] and whole.requires_grad and not short.requires_grad
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-6)
    if feature == "projected":
        torch.testing.assert_close(short, encoder.network.model.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6)
    encoder.bfloat16()
    with torch.inference_mode():
        assert torch.nn.functional.cosine_similarity(encoder.encode(images)["visual"].float(), whole).min() > 0.999


@pytest.mark.parametrize(
    "tower",
    [
        {"pool_type": "avg"},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        {"block_type": "custom"},
        {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None},  # the ResNet of CLIP
    ],
)
def test_other_picture_towers_run_whole(monkeypatch, tower):
    """Averages, attention pooling, blocks of another kind and convolutions need every row: open_clip's own forward."""
    monkeypatch.setattr(clip, "class_token", lambda *_: pytest.fail("a shortcut for plain transformers only"))
    torch.manual_seed(0)
    encoder, config = build(), build_sizes(SIZES, None)
    config["vision_cfg"].update(tower)
    encoder.network.model = open_clip.CLIP(**config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(images)["visual"], encoder.network.model.encode_image(images, normalize=True))


def test_raw_features_are_those_before_the_final_norm(pictures):
    for library in ("open_clip", "transformers"):
        torch.manual_seed(0)
        raw = build(feature="raw", encoder_library=library)
        torch.manual_seed(0)
        cls = build(feature="cls", encoder_library=library)
        network = raw.network.model
        norms = (
            (network.ln_final, network.visual.ln_post)
            if library == "open_clip"
            else (network.text_model.final_layer_norm, network.vision_model.post_layernorm)
        )
        a, b = ours(raw, pictures), ours(cls, pictures)
        for m, norm in zip(("textual", "visual"), norms):
            torch.testing.assert_close(norm(a[m]), b[m], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(a[m], b[m])


@pytest.mark.parametrize("feature", ["projected", "cls"])
def test_features_equal_transformers(pictures, tmp_path, feature):
    """Weights in Hugging Face's layout, pictures through its own processor, ids of the same vocabulary."""
    torch.manual_seed(0)
    build(encoder_library="transformers").save(tmp_path / "clip")
    encoder = build(encoder_library="transformers", pretrained=str(tmp_path / "clip"), feature=feature)
    reference = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    images = processor([Image.open(p).convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
    ids = open_clip.SimpleTokenizer()(TEXTS, context_length=20)
    mask = torch.stack([(torch.arange(20) <= row.argmax()).long() for row in ids])
    with torch.no_grad():
        image = reference.get_image_features(pixel_values=images)
        text = reference.get_text_features(input_ids=ids, attention_mask=mask)
        if feature == "cls":
            image, text = reference.vision_model(images).pooler_output, reference.text_model(ids, mask).pooler_output
        else:
            image, text = (torch.nn.functional.normalize(x.pooler_output, dim=-1) for x in (image, text))
    got = ours(encoder, pictures)
    torch.testing.assert_close(got["textual"], text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["visual"], image, rtol=1e-4, atol=1e-5)


def test_both_libraries_build_networks_of_the_same_size():
    a, b = build(), build(encoder_library="transformers")
    assert {m: w for m, w in a.feature_dims.items()} == b.feature_dims
    assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())


def test_padding_columns_do_not_matter():
    torch.manual_seed(0)
    for library in ("open_clip", "transformers"):
        encoder = build(feature="cls", encoder_library=library)
        ids = encoder.tokenize(["red shirt", "a mug"])
        assert trim(ids, 49407).shape[1] == 4
        with torch.no_grad():
            short = encoder.encode(texts=ids)["textual"]
            beside_a_long_one = encoder.encode(texts=torch.cat([ids, encoder.tokenize(["mug " * 60])]))["textual"][:2]
        torch.testing.assert_close(short, beside_a_long_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_saved_weights_come_back(tmp_path, pictures, library):
    torch.manual_seed(0)
    encoder = build(encoder_library=library)
    encoder.save(tmp_path / "own")
    again = build(encoder_library=library, pretrained=str(tmp_path / "own"), encoder_sizes=SIZES if library == "transformers" else None)
    for m, x in ours(encoder, pictures).items():
        assert torch.equal(x, ours(again, pictures)[m])
    if library == "transformers":
        with pytest.raises(UserError, match="encoder_library: transformers"):
            build(pretrained=str(tmp_path / "own"))


def test_a_released_name_loads_a_state_dictionary_file(tmp_path):
    """A file of the layout that open_clip's checkpoints have: below state_dict, with the prefix of a parallel wrapper."""
    torch.manual_seed(0)
    encoder = build()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in encoder.network.model.state_dict().items()}}, tmp_path / "own.pt")
    again = build(pretrained=str(tmp_path / "own.pt"))
    for a, b in zip(encoder.parameters(), again.parameters()):
        assert torch.equal(a, b)
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="are missing"):
        build(pretrained=str(tmp_path / "wrong.pt"))
    (tmp_path / "broken.pt").write_bytes(b"not a file of torch")
    with pytest.raises(UserError, match="broken.pt"):
        build(pretrained=str(tmp_path / "broken.pt"))


def test_openai_weights_get_their_activation(tmp_path, monkeypatch):
    """OpenAI's weights need QuickGELU although the plain model name builds the exact one."""
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    small = open_clip.get_model_config("ViT-B-16")
    small = {**small, "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    small["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {k: dict(v) if isinstance(v, dict) else v for k, v in small.items()})
    model = open_clip.CLIP(**small, quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "ViT-B-16-openai.pt")
    encoder = build(encoder_sizes=None, encoder_model="ViT-B-16", pretrained="openai")
    assert any(type(m).__name__ == "QuickGELU" for m in encoder.modules())
    encoder.network.transform.mean, encoder.network.saved["image"] = (0.5,) * 3, {**encoder.transform.describe(), "mean": [0.5] * 3}
    encoder.save(tmp_path / "tuned")
    again = build(encoder_sizes=None, pretrained=str(tmp_path / "tuned"))  # a saved model keeps activation and preparation of pictures
    assert any(type(m).__name__ == "QuickGELU" for m in again.modules()) and again.transform.mean == (0.5,) * 3
    plain = build(encoder_sizes=None, encoder_model="ViT-B-16", pretrained=None)
    assert not any(type(m).__name__ == "QuickGELU" for m in plain.modules())


def test_missing_weights_say_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(weights, "online", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="download them from https://huggingface.co/.* and save them as .*ViT-B-32-openai"):
        build(encoder_sizes=None, encoder_model="ViT-B-32", pretrained="openai")
    with pytest.raises(UserError, match="https://huggingface.co/openai/clip-vit-base-patch32"):
        build(encoder_sizes=None, encoder_library="transformers", pretrained="openai/clip-vit-base-patch32")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder_library": "openclip"}, "open_clip or transformers"),
        ({"feature": "pooled"}, "cls, raw, projected"),
        ({"encoder_sizes": None, "encoder_model": "ViT-B16"}, "Did you mean ViT-B-16"),
        ({"encoder_sizes": None, "encoder_model": "ViT-B-16", "pretrained": "opnai"}, "Did you mean openai"),
        ({"encoder_sizes": {**SIZES, "depth": 3}}, "unknown entry 'depth'"),
        ({"encoder_sizes": {"width": 3}}, "expected also"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_random_weights_say_so():
    with pytest.warns(UserWarning, match="random weights"):
        CLIPEncoder(settings())


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_frozen_blocks_and_checkpointing(library):
    torch.manual_seed(0)
    images, texts = torch.randn(2, 3, 32, 32), torch.tensor([[49406, 5, 49407], [49406, 7, 49407]])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build(encoder_library=library, feature="cls").train()
        encoder.freeze(1)
        encoder.set_checkpointing(checkpointing)
        out = encoder.encode(images, texts)
        (out["visual"][:, 0].sum() + out["textual"][:, 0].sum()).backward()
        named = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        gradients.append(named)
        for tower in encoder.towers():
            assert not any(p.requires_grad for module in tower[:2] for p in module.parameters())
            assert all(p.grad is not None for p in tower[2].parameters())
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name])


def test_broken_preprocessing_would_be_seen():
    """The parity tests go through a picture that is not square: squashing it instead of cropping changes the feature."""
    image = Image.open(io.BytesIO(_jpeg(40, 90)))
    encoder = build()
    crop = encoder.preprocess(image)
    encoder.transform.mode = "squash"
    assert (crop - encoder.preprocess(image)).abs().max() > 0.1


def _jpeg(height, width):
    stream = io.BytesIO()
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
    Image.fromarray(np.stack([ramp, ramp[:, ::-1], ramp], axis=-1)).save(stream, "JPEG")
    return stream.getvalue()
