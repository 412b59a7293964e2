"""VLMo's network, losses and loader against the official code's numbers, and what the numbers cannot show."""

import json
from dataclasses import replace

import pytest
import torch

from recbole_mm.encoder import vlmo_losses as losses
from recbole_mm.encoder.vlmo_module import (
    VARIANTS,
    VLMo,
    VLMoSizes,
    drop_path,
    image_index,
    joint_index,
    load_vlmo,
    resize_table,
    text_index,
)
from recbole_mm.errors import UserError
from tests.support import golden_params, load_golden

TOLERANCE = 3e-5  # largest difference over max(1, largest reference value), see the golden README
GRADIENT_TOLERANCE = 2e-4
FAMILIES = ["abs", "rel"]


def check(got, want, tolerance=TOLERANCE):
    want = torch.as_tensor(want)
    got = got.detach().to(want.dtype)
    assert got.shape == want.shape
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= tolerance, error


class Golden:
    """One family of a golden file: sizes, weights, inputs, outputs."""

    def __init__(self, path, family):
        prefix = "rel/" if family == "rel" else ""
        values = load_golden(path)
        c = json.loads(str(values["config_json"]))[family]
        self.config = c
        self.sizes = VLMoSizes(
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            first_vl_block=c["vlffn_start_layer_index"],
            relative_positions=c["need_relative_position_embed"],
            layer_scale=c["layer_scale"],
            image_size=c["img_size"],
            patch_size=c["patch_size"],
            channels=c["in_chans"],
            mlp_ratio=c["mlp_ratio"],
            vocab_size=c["vocab_size"],
            text_length=c["max_text_len"],
            table_text_length=c["max_text_len_of_initckpt"],
        )
        part = {k[len(prefix) :]: torch.as_tensor(v) for k, v in values.items() if k != "config_json" and k.startswith(prefix)}
        self.weights = {k[2:]: v for k, v in part.items() if k.startswith("w/")}
        self.inputs = {k[3:]: v for k, v in part.items() if k.startswith("in/")}
        self.out = {k[4:]: v for k, v in part.items() if k.startswith("out/")}

    def model(self, **changes):
        model = VLMo(replace(self.sizes, **changes)).eval()
        assert load_vlmo(model, self.weights, "golden") == []
        return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=golden_params("vlmo"))
def golden(request, family):
    return Golden(request.param, family)


def test_golden_image_path(golden):
    out, x = golden.out, golden.inputs
    model = golden.model()
    got = model.image(x["image"], vl_branch=True)
    check(model.embed_image(x["image"]), out["embed/visual"])
    check(torch.stack(got["hidden"]), out["image/hidden"])
    check(torch.stack(got["vl_hidden"]), out["image/vl_hidden"])
    check(got["feats"], out["image/feats"])
    check(got["feats"][:, 0], out["image/cls_normed"])
    for name in ("vl_cls_normed", "raw_cls_feats", "cls_feats", "cls_vlffn_feats"):
        check(got[name], out[f"image/{name}"])


def test_golden_text_path(golden):
    out, x = golden.out, golden.inputs
    model = golden.model()
    got = model.text(x["text_ids"], x["text_masks"], vl_branch=True)
    check(model.embed_text(x["text_ids"]), out["embed/text"])
    check(torch.stack(got["hidden"]), out["text/hidden"])
    check(torch.stack(got["vl_hidden"]), out["text/vl_hidden"])
    check(got["feats"], out["text/feats"])
    check(got["feats"][:, 0], out["text/cls_normed"])
    for name in ("vl_cls_normed", "raw_cls_feats", "cls_feats", "cls_vlffn_feats"):
        check(got[name], out[f"text/{name}"])


def test_golden_joint_path(golden):
    out, x = golden.out, golden.inputs
    model = golden.model()
    got = model.joint(x["image"], x["text_ids"], x["text_masks"])
    check(torch.stack(got["hidden"]), out["joint/hidden"])
    for name in ("text_feats", "image_feats", "cls_feats", "raw_cls_feats"):
        check(got[name], out[f"joint/{name}"])
    check(model.itm_score(got["cls_feats"]), out["joint/itm_logits"])


def all_losses(golden, model):
    out, x = golden.out, golden.inputs
    image = model.image(x["image"], vl_branch=True)
    text = model.text(x["text_ids"], x["text_masks"], vl_branch=True)
    plain = losses.similarities(image["cls_feats"], text["cls_feats"], model.logit_scale)
    vl = losses.similarities(image["cls_vlffn_feats"], text["cls_vlffn_feats"], model.logit_vl_scale)
    itc = (losses.contrast(plain) + losses.contrast(vl)) / 2
    drawn, texts = out["itm/neg_image_idx"], out["itm/neg_text_idx"]
    negatives = (x["text_ids"][texts], x["text_masks"][texts])
    itm = losses.matching(model, x["image"], x["text_ids"], x["text_masks"], x["image"][drawn], negatives)
    mlm = losses.masked_words(model, x["image"], x["text_ids_mlm"], x["text_masks"], x["text_labels_mlm"])
    return plain, vl, itc, itm, mlm


def test_golden_losses_and_gradients(golden):
    out = golden.out
    model = golden.model()
    plain, vl, itc, itm, mlm = all_losses(golden, model)
    check(mlm[0], out["mlm/loss"])
    check(mlm[0] / losses.MLM_WEIGHT, out["mlm/ce"])
    check(mlm[1], out["mlm/logits"])
    check(plain, out["itc/i2t_logits"])
    check(vl, out["itc/vl_i2t_logits"])
    check(model.logit_scale.exp(), out["itc/scale"])
    check(model.logit_vl_scale.exp(), out["itc/vl_scale"])
    check(losses.contrast(plain), (out["itc/ce_i2t"] + out["itc/ce_t2i"]) / 2)
    check(losses.contrast(vl), (out["itc/ce_vl_i2t"] + out["itc/ce_vl_t2i"]) / 2)
    check(itc, out["itc/loss"])
    i2t, t2i = losses.matching_weights(plain, len(plain))
    check(i2t, out["itm/weights_i2t"])
    check(t2i, out["itm/weights_t2i"])
    check(itm[0], out["itm/loss"])
    check(itm[1], out["itm/logits"])
    check(itm[2], out["itm/labels"])
    total = itc + itm[0] + mlm[0]
    check(total, out["total_loss"])
    total.backward()
    names = [k for k in out if k.startswith("grad_norm/")]
    assert {k.removeprefix("grad_norm/") for k in names} == {n for n, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        norm = torch.zeros(()) if p.grad is None else p.grad.norm()
        check(norm, out[f"grad_norm/{name}"], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("rank", [0, 1])
def test_golden_two_processes(golden, rank):
    """Own pairs first, with gradient; the other process's behind, without."""
    x = golden.inputs
    batches = [{k: x[p + k] for k in ("image", "text_ids", "text_masks")} for p in ("", "rank1/")]
    out = {k.removeprefix(f"two_ranks/{rank}/"): v for k, v in golden.out.items() if k.startswith(f"two_ranks/{rank}/")}
    model = golden.model()

    def features(batch):
        image, text = model.image(batch["image"], vl_branch=True), model.text(batch["text_ids"], batch["text_masks"], vl_branch=True)
        return image, text

    image, text = features(batches[rank])
    other_image, other_text = features(batches[1 - rank])
    plain = losses.similarities(
        image["cls_feats"], text["cls_feats"], model.logit_scale, (other_image["cls_feats"], other_text["cls_feats"])
    )
    vl = losses.similarities(
        image["cls_vlffn_feats"],
        text["cls_vlffn_feats"],
        model.logit_vl_scale,
        (other_image["cls_vlffn_feats"], other_text["cls_vlffn_feats"]),
    )
    check(plain, out["itc/i2t_logits"])
    check(vl, out["itc/vl_i2t_logits"])
    itc = (losses.contrast(plain) + losses.contrast(vl)) / 2
    check(itc, out["itc/loss"])
    i2t, t2i = losses.matching_weights(plain, len(image["cls_feats"]))
    check(i2t, out["itm/weights_i2t"])
    check(t2i, out["itm/weights_t2i"])
    everything = {k: torch.cat([batches[rank][k], batches[1 - rank][k]]) for k in batches[0]}
    texts = out["itm/neg_text_idx"]
    loss, logits, labels = losses.matching(
        model,
        *batches[rank].values(),
        everything["image"][out["itm/neg_image_idx"]],
        (everything["text_ids"][texts], everything["text_masks"][texts]),
    )
    check(logits, out["itm/logits"])
    check(labels, out["itm/labels"])
    check(loss, out["itm/loss"])
    itc.backward()
    for name in ("logit_scale", "logit_vl_scale", "transformer.norm.weight"):
        check(dict(model.named_parameters())[name].grad, out[f"itc_grad/{name}"], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_golden_other_image_size(golden, direction):
    x, out = golden.inputs, golden.out
    model = golden.model(image_size=golden.config[f"resize_{direction}_img_size"])
    name = "relative_position_bias_table" if golden.sizes.relative_positions else "transformer.pos_embed"
    check(dict(model.named_parameters())[name], out[f"resize_{direction}/{name}"])
    images = x[f"resize_{direction}/image"]
    check(model.image(images)["cls_feats"], out[f"resize_{direction}/image/cls_feats"])
    check(model.joint(images, x["text_ids"], x["text_masks"])["cls_feats"], out[f"resize_{direction}/joint/cls_feats"])


def test_golden_shorter_text(golden):
    x, out = golden.inputs, golden.out
    length = golden.config["text_trunc_max_text_len"]
    model = golden.model(text_length=length)
    ids, mask = x["text_ids"][:, :length], x["text_masks"][:, :length]
    check(model.text(ids, mask)["cls_feats"], out["text_trunc/text/cls_feats"])
    check(model.joint(x["image"], ids, mask)["cls_feats"], out["text_trunc/joint/cls_feats"])


def test_golden_indices(golden):
    """The surplus matrices in the relative files are the reference for the construction."""
    if not golden.sizes.relative_positions:
        pytest.skip("absolute family")
    s = golden.sizes
    assert torch.equal(image_index(s.grid), golden.weights["relative_position_index"])
    assert torch.equal(text_index(s.grid, s.text_length, s.table_text_length), golden.weights["text_relative_position_index"])
    assert torch.equal(joint_index(s.grid, s.text_length, s.table_text_length), golden.weights["text_imag_relative_position_index"])


def test_golden_text_may_be_trimmed_in_both_families(golden):
    """Length buckets: columns of padding do not change the features of the text-only path."""
    x = golden.inputs
    model = golden.model()
    longest = int(x["text_masks"][1:].sum(1).max())
    full = model.text(x["text_ids"][1:], x["text_masks"][1:])["cls_feats"]
    check(model.text(x["text_ids"][1:, :longest], x["text_masks"][1:, :longest])["cls_feats"], full.detach())
    joint = model.joint(x["image"][1:], x["text_ids"][1:], x["text_masks"][1:])["cls_feats"]
    trimmed = model.joint(x["image"][1:], x["text_ids"][1:, :longest], x["text_masks"][1:, :longest])["cls_feats"]
    assert torch.equal(joint, trimmed)  # padded back to the full length, because the experts split there


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"module": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model": w},
        lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
    ],
    ids=["state_dict", "module", "model", "half"],
)
def test_golden_nestings_load(golden, wrap):
    model = VLMo(golden.sizes)
    assert load_vlmo(model, wrap(golden.weights), "file") == []
    own = model.state_dict()["transformer.norm.weight"]
    assert own.dtype == torch.float32
    check(own, golden.weights["transformer.norm.weight"], 1e-3)


def test_golden_missing_and_surplus_heads(golden):
    """Text-only files lack contrastive heads and vision-language experts; VQA adds a classifier, NLVR2 a third token type."""
    weights = {k: v for k, v in golden.weights.items() if not k.startswith("itc_") and "_vl" not in k}
    weights["vqa_classifier.0.weight"] = torch.zeros(2, 2)
    types = weights["token_type_embeddings.weight"]
    weights["token_type_embeddings.weight"] = torch.cat([types, types[1:]])
    model = VLMo(golden.sizes)
    missing = load_vlmo(model, weights, "file")
    assert missing and all(k.startswith("itc_") or "_vl" in k for k in missing)
    del weights["transformer.norm.weight"]
    with pytest.raises(UserError, match="transformer.norm.weight"):
        load_vlmo(model, weights, "file")


def test_golden_wrong_family_is_named(golden):
    other = replace(golden.sizes, relative_positions=not golden.sizes.relative_positions, layer_scale=not golden.sizes.layer_scale)
    with pytest.raises(UserError, match="not a checkpoint of this VLMo"):
        load_vlmo(VLMo(other), golden.weights, "file")


@pytest.mark.parametrize(
    "grid, sums", [(14, (14270119, 1500246, 27314565)), (24, (368828259, 3868246, 474825505)), (30, (1415670183, 5903446, 1672736389))]
)
def test_index_sums_of_the_published_sizes(grid, sums):
    assert (image_index(grid).sum(), text_index(grid, 40, 196).sum(), joint_index(grid, 40, 196).sum()) == sums


def test_index_entries_at_224():
    image, text, joint = image_index(14), text_index(14, 40, 196), joint_index(14, 40, 196)
    assert [image[i].item() for i in ((1, 1), (1, 2), (2, 1), (1, 15), (15, 1), (0, 1), (1, 0), (0, 0))] == [
        *(364, 363, 365, 337, 391, 729, 730, 731)
    ]
    assert [text[i].item() for i in ((1, 1), (1, 2), (2, 1), (1, 39), (0, 1), (1, 0), (0, 0))] == [928, 929, 927, 966, 1123, 1124, 1125]
    assert (joint[0, 40], joint[40, 0]) == (732, 733)


@pytest.mark.parametrize("variant, parameters, entries", [("base", 202.4e6, 293), ("base_plus", 185.0e6, 503), ("large", 599.1e6, 551)])
def test_published_sizes(variant, parameters, entries):
    """Parameter and entry counts of the released files (with all pre-training heads), without allocating them."""
    with torch.device("meta"):
        model = VLMo(VARIANTS[variant])
    assert abs(sum(p.numel() for p in model.parameters()) - parameters) < 1e5
    assert len(model.state_dict()) == entries


def test_table_of_a_wrong_length_is_refused():
    with pytest.raises(UserError, match="196"):
        resize_table(torch.zeros(100, 4), 4, 196)


def test_start_values():
    torch.manual_seed(0)
    model = VLMo(replace(VARIANTS["tiny"], vocab_size=50, layer_scale=True))
    assert model.transformer.blocks[0].mlp_imag.fc1.bias.abs().max() == 0
    assert model.transformer.blocks[0].gamma_1.unique().item() == pytest.approx(0.1)
    assert 0.015 < model.text_embeddings.word_embeddings.weight.std() < 0.025
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)


def test_checkpointed_blocks_give_the_same_gradient():
    torch.manual_seed(0)
    model = VLMo(replace(VARIANTS["tiny"], vocab_size=50, width=32, image_size=32))
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model.image(images)["cls_feats"][:, 0].sum().backward()
        gradients.append(model.transformer.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    x = torch.ones(4000, 2)
    y = drop_path(x, 0.25, training=True)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop_path(x, 0.25, training=False) is x


def test_matching_draws_never_take_the_own_pair_and_survive_underflow():
    torch.manual_seed(0)
    logits = torch.full((4, 4), -200.0) + 400 * torch.eye(4)  # softmax leaves nothing beside the own pair
    i2t, t2i = losses.matching_weights(logits, 4)
    assert i2t.sum() == 0 and t2i.sum() == 0
    for _ in range(20):
        assert (losses.draw(i2t) != torch.arange(4)).all()
    drawn = torch.stack([losses.draw(torch.tensor([[0.0, 3.0, 1.0]])) for _ in range(400)])
    assert (drawn == 1).float().mean().item() == pytest.approx(0.75, abs=0.08)


def test_no_masked_word_gives_zero_loss():
    torch.manual_seed(0)
    model = VLMo(replace(VARIANTS["tiny"], vocab_size=50, width=32, image_size=32, text_length=6))
    ids = torch.tensor([[1, 5, 2, 0, 0, 0]])
    loss, _ = losses.masked_words(model, torch.randn(1, 3, 32, 32), ids, (ids > 0).long(), torch.full_like(ids, losses.IGNORE))
    assert loss.item() == 0


def test_whole_words_are_masked_together():
    torch.manual_seed(0)
    specials = {"cls": 1, "sep": 2, "pad": 0, "mask": 3}
    continues = torch.zeros(50, dtype=torch.bool)
    continues[10] = True
    ids = torch.tensor([[1, 20, 10, 21, 10, 22, 10, 23, 10, 2, 0, 0]]).repeat(2000, 1)
    masked, labels = losses.mask_words(ids, continues, 12, specials)
    taken = labels != losses.IGNORE
    assert not taken[:, [0, 9, 10, 11]].any()
    assert (taken[:, 1:9:2] == taken[:, 2:9:2]).all()  # pieces go with their word
    assert (labels[taken] == ids[taken]).all() and (masked[~taken] == ids[~taken]).all()
    assert (masked[taken] == 3).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (masked[taken] == ids[taken]).float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.03)


@pytest.mark.parametrize("words", [8, 20, 36])
def test_share_of_masked_words_does_not_depend_on_the_length(words):
    torch.manual_seed(0)
    ids = torch.zeros(1500, 40, dtype=torch.long)
    ids[:, 0], ids[:, 1 : words + 1], ids[:, words + 1] = 1, 7, 2
    _, labels = losses.mask_words(ids, torch.zeros(50, dtype=torch.bool), 40, {"cls": 1, "sep": 2, "pad": 0, "mask": 3})
    assert (labels != losses.IGNORE).sum().item() / (1500 * words) == pytest.approx(0.158, abs=0.01)
