"""Adapters in one frozen CLIP: sizes, switching, precision, cached states."""

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.encoder.clip import VOCABULARY, TransformersNetwork, transformers_sizes
from recbole_mm.errors import UserError
from recbole_mm.model.perpeft.encoder import CLIPItems, IISANEncoder, PeftEncoder, attach_adapters, fingerprint, peft_config, spread_layers
from recbole_mm.model.perpeft.model import hidden_states

SIZES = {
    "joint_width": 8, "width": 16, "layers": 3, "heads": 2, "patch_size": 8, "image_size": 16,
    "text_width": 12, "text_layers": 3, "text_heads": 2, "context": 10,
}  # fmt: skip
N_ITEMS = 12
LORA = {"r": 2, "lora_alpha": 4}


def build_items(dtype=torch.float32, chunk=5, seed=0) -> CLIPItems:
    """A tiny CLIP on random pictures and texts of 1 to 6 words."""
    torch.manual_seed(seed)
    with pytest.warns(UserWarning, match="random weights"):
        network = TransformersNetwork({"encoder_sizes": SIZES})
    pictures = torch.randint(0, 256, (N_ITEMS, 3, 16, 16), dtype=torch.uint8)
    texts = ["", *(" ".join(["lamp"] * (1 + (5 * i) % 6)) for i in range(N_ITEMS - 1))]
    items = CLIPItems(network, lambda ids: pictures[ids], network.tokenizer(texts, context_length=10), dtype, chunk)
    items.source = network, pictures  # in a tuple, to stay no submodule
    return items.eval()


EVERY = torch.arange(1, N_ITEMS)


def randomise(parameters, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))


@pytest.fixture(scope="module")
def vit_b32():
    """The architecture of openai/clip-vit-base-patch32 without storage: only sizes are looked at."""
    from transformers import CLIPConfig, CLIPModel

    def build():
        with torch.device("meta"):
            return CLIPModel(CLIPConfig())

    return build


@pytest.mark.parametrize(
    "kind, arguments, expected", [("lora", {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, 245_760), ("ia3", {}, 46_080)]
)
def test_adapters_of_vit_b32_have_the_papers_sizes(vit_b32, kind, arguments, expected):
    clip = vit_b32()
    total = sum(p.numel() for p in clip.parameters())
    attach_adapters(clip, kind, [f"group_{g}" for g in range(8)], None, arguments)
    for g in range(8):
        assert sum(p.numel() for name, p in clip.named_parameters() if f"group_{g}" in name) == expected
    if kind == "lora":
        assert f"{8 * expected / total:.2%}" == "1.30%"


def test_features_are_unit_vectors_in_item_order_and_trimming_changes_nothing():
    items = build_items()
    found = items(EVERY)
    assert found.shape == (N_ITEMS - 1, 16) and found.dtype == torch.float32
    network, pictures = items.source
    pixels = network.transform.normalize(pictures[EVERY])
    expected = torch.cat((network.image(pixels, "projected"), network.text(items.tokens[EVERY].long(), "projected")), dim=1)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(items(EVERY.flip(0)), found.flip(0), rtol=1e-4, atol=1e-5)
    assert int(items.length.max()) < items.tokens.shape[1]  # something is cut off at all


@pytest.mark.parametrize(
    "kind, arguments", [("lora", LORA), ("ia3", {}), ("lokr", {"r": 2}), ("vera", {"r": 2}), ("lora", {**LORA, "use_dora": True})]
)
def test_new_adapters_leave_features_alone_and_learn_apart(kind, arguments):
    items = build_items()
    before = items(EVERY)
    encoder = PeftEncoder(items, kind, 3, None, arguments).eval()
    if kind != "lokr":  # starts at random
        assert_close(encoder(EVERY, 1), before, rtol=1e-4, atol=1e-5)
    assert all(encoder.group_parameters(g) for g in range(3))

    frozen = {name: p.clone() for name, p in items.clip.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    start = [[p.detach().clone() for p in encoder.group_parameters(g)] for g in range(3)]
    torch.manual_seed(2)
    for _ in range(3):  # lora's first matrix has no gradient in the first step
        optimizer.zero_grad()
        encoder(EVERY, 1)[:, ::3].sum().backward()
        optimizer.step()
    for g in range(3):
        moved = [not torch.equal(a, b) for a, b in zip(start[g], encoder.group_parameters(g))]
        assert all(moved) if g == 1 else not any(moved)
    named = dict(items.clip.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in frozen.items())
    assert not torch.allclose(encoder(EVERY, 1), before, atol=1e-3)
    if kind != "lokr":
        assert_close(encoder(EVERY, 0), before, rtol=1e-4, atol=1e-5)
    encoder.copy_group(1, 2)
    assert_close(encoder(EVERY, 2), encoder(EVERY, 1))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(encoder.group_parameters(1), encoder.group_parameters(2)))


def test_switching_moves_no_weights_and_keeps_all_trainable():
    encoder = PeftEncoder(build_items(), "lora", 4, None, LORA)
    places = [p.data_ptr() for p in encoder.parameters()]
    trainable = [p.requires_grad for p in encoder.parameters()]
    for group in (3, 0, 2):
        encoder.activate(group)
        assert [p.data_ptr() for p in encoder.parameters()] == places
        assert [p.requires_grad for p in encoder.parameters()] == trainable
    assert sum(trainable) == sum(len(encoder.group_parameters(g)) for g in range(4))


def test_bfloat16_base_with_float32_adapters():
    exact = PeftEncoder(build_items(), "lora", 2, None, LORA).eval()
    coarse = PeftEncoder(build_items(torch.bfloat16), "lora", 2, None, LORA).eval()
    assert coarse.items.fingerprint == exact.items.fingerprint  # of the weights as they were given
    for encoder in (exact, coarse):
        randomise(encoder.group_parameters(1))
    assert all(p.dtype == torch.float32 for g in range(2) for p in coarse.group_parameters(g))
    assert all(p.dtype == torch.bfloat16 for p in coarse.items.clip.parameters() if not p.requires_grad)
    a, b = exact(EVERY, 1), coarse(EVERY, 1)
    assert b.dtype == torch.float32 and (a * b)[:, :8].sum(1).min() > 0.99 and (a * b)[:, 8:].sum(1).min() > 0.99
    for features in (a, b):
        features[:, ::3].sum().backward()
    for p, q in zip(exact.group_parameters(1), coarse.group_parameters(1)):
        assert q.grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.95


def test_dropout_of_adapters_acts_in_training_only():
    encoder = PeftEncoder(build_items(), "lora", 1, None, {**LORA, "lora_dropout": 0.5})
    randomise(encoder.group_parameters(0))
    encoder.train()
    assert not torch.allclose(encoder(EVERY, 0), encoder(EVERY, 0))
    encoder.eval()
    assert_close(encoder(EVERY, 0), encoder(EVERY, 0))


def test_hidden_states_are_those_of_the_towers():
    items = build_items()
    image, text = hidden_states(items, EVERY, 4)
    assert image.shape == (N_ITEMS, 4, 16) and text.shape == (N_ITEMS, 4, 12) and image.dtype == torch.float16
    assert not image[0].any() and not text[0].any()
    clip = items.clip
    found_image = clip.visual_projection(clip.vision_model.post_layernorm(image[1:, -1].float()))
    found_text = clip.text_projection(clip.text_model.final_layer_norm(text[1:, -1].float()))
    expected = items(EVERY)
    assert_close(torch.nn.functional.normalize(found_image, dim=1), expected[:, :8], rtol=1e-2, atol=3e-3)
    assert_close(torch.nn.functional.normalize(found_text, dim=1), expected[:, 8:], rtol=1e-2, atol=3e-3)
    embedded = clip.vision_model.pre_layrnorm(clip.vision_model.embeddings(items.images(EVERY)))[:, 0]
    assert_close(image[1:, 0].float(), embedded, rtol=1e-2, atol=3e-3)


def test_iisan_groups_are_separate():
    states = torch.randn(6, 3, 8), torch.randn(6, 3, 5)
    encoder = IISANEncoder(*states, 2, 4)
    items = torch.arange(1, 6)
    encoder(items, 1).sum().backward()
    assert all(p.grad is None for p in encoder.group_parameters(0))
    encoder.copy_group(0, 1)
    assert_close(encoder(items, 0), encoder(items, 1))


def test_twelve_layers_give_the_states_of_the_original():
    assert spread_layers(12, 7) == [0, 2, 4, 6, 8, 10, 12]


def test_unknown_kinds_and_arguments_are_explained():
    with pytest.raises(UserError, match="Did you mean .*lora"):
        peft_config("lorra", None, None)
    with pytest.raises(UserError, match="no argument 'lora_alfa'.*lora_alpha"):
        peft_config("lora", None, {"lora_alfa": 3})
    with pytest.raises(UserError, match="prefix_tuning"):
        attach_adapters(build_items().clip, "prefix_tuning", ["group"])
    with pytest.raises(UserError, match="nowhere"):
        attach_adapters(build_items().clip, "lora", ["group"], ["nowhere"])


def test_fingerprint_sees_every_weight():
    a, b = build_items().clip, build_items().clip
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.text_projection.weight[0, 0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


def test_vocabulary_of_the_small_model_is_clips():
    assert transformers_sizes(SIZES, None).text_config.vocab_size == VOCABULARY
