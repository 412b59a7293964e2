"""The feature bank: frozen tables, and rows that an encoder fills and learns from."""

import pytest
import torch
from torch import nn

from recbole_mm.encoder.clip import CLIPEncoder
from recbole_mm.encoder.inputs import CatalogueInputs
from recbole_mm.encoder.vlmo import VLMoEncoder
from recbole_mm.errors import UserError
from recbole_mm.model.bank import EncoderBank, FeatureBank, build_bank
from recbole_mm.model.live import LiveTable
from recbole_mm.testing import TwoTastes, array_dataset, test_config, total_loss
from recbole_mm.trainer import Trainer
from tests.encoder.support import TINY_CLIP, TINY_VLMO, Catalogue, encode_catalogue, quiet

SETTINGS = {
    "encoder_micro_batch": 3, "bank_refresh_epochs": 1, "encoder_learning_rate": 1e-3, "encoder_weight_decay": 0.1,
    "encoder_freeze_blocks": 0, "encoder_gradient_checkpointing": False, "missing_modality": "mean", "amp": None,
}  # fmt: skip


def build(kind="clip", content=None, names=("visual", "textual"), settings=None, others=None, **changes):
    torch.manual_seed(0)
    content = content or Catalogue()
    base, encoder_class = (TINY_CLIP, CLIPEncoder) if kind == "clip" else (TINY_VLMO, VLMoEncoder)
    encoder = quiet(encoder_class, {**base, **changes})
    encoder.fit(content)
    inputs = CatalogueInputs(encoder, content)
    return EncoderBank(encoder, inputs, names, {**SETTINGS, **(settings or {})}, ["item_id", "neg_item_id"], others), content


def loss_of(bank, weights):
    """Some loss that uses rows, a linear map of whole tables, and the relation between two modalities."""
    total = 0
    for m, w in zip(bank, weights):
        table = bank[m]
        total = total + (table @ w)[torch.tensor([3, 5, 6, 1])].pow(2).sum() + torch.nn.functional.normalize(table[1:], dim=1)[4].sum()
    return total


def test_frozen_bank_is_a_mapping_of_buffers():
    bank = FeatureBank({"visual": torch.ones(4, 3), "dotted.name": torch.zeros(4, 2)})
    assert list(bank) == bank.keys() == ["visual", "dotted.name"] and len(bank) == 2 and "visual" in bank
    assert bank.dims == {"visual": 3, "dotted.name": 2} and not bank.state_dict() and not bank.trainable
    with pytest.raises(KeyError):
        bank["smell"]


def test_all_rows_are_the_encoders():
    bank, content = build()
    bank.eval()
    for m in bank:
        torch.testing.assert_close(bank[m][1:], encode_catalogue(bank.encoder, content, m), rtol=1e-4, atol=1e-5)
        assert (bank[m][0] == 0).all()


@pytest.mark.parametrize("kind", ["clip", "vlmo"])
@pytest.mark.parametrize("micro", [2, 100])
def test_gradient_is_that_of_encoding_the_whole_batch_at_once(kind, micro):
    """Cached gradients in micro-batches against plain autograd through one batch."""
    joint = {"encoder_joint": True} if kind == "vlmo" else {}
    names = ("visual", "textual", "joint") if joint else ("visual", "textual")
    bank, content = build(kind, names=names, settings={"encoder_micro_batch": micro}, **joint)
    weights = [torch.randn(bank.dims[m], 2) for m in bank]
    items = torch.tensor([5, 1, 3, 9, 3, 0, 12])
    bank.train()
    bank.encode_all()
    before = {m: bank._table(m).clone() for m in bank}
    bank.refresh(items)
    loss_of(bank, weights).backward()
    bank.after_backward()
    got = {n: p.grad.clone() for n, p in bank.encoder.named_parameters() if p.grad is not None}

    bank.encoder.zero_grad()
    ids = torch.tensor([1, 3, 5, 9, 12])
    out = bank.encoder.encode(bank._inputs.images(ids), bank._inputs.texts(ids))
    loss_of({m: before[m].index_copy(0, ids, out[m]) for m in bank}, weights).backward()
    want = {n: p.grad for n, p in bank.encoder.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and got
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-4 * max(1.0, want[name].abs().max().item()), name


def test_second_pass_repeats_the_random_draws_of_the_first():
    """With dropped branches, the gradient must be that of the very features the loss saw."""
    bank, _ = build("vlmo", names=("visual",), encoder_drop_path=0.5)
    bank.train()
    bank.encode_all()
    torch.manual_seed(3)
    bank.refresh(torch.tensor([1, 2, 4, 7, 8]))
    bank["visual"][torch.tensor([1, 4, 8])].pow(2).sum().backward()
    ahead = torch.get_rng_state()
    bank.after_backward()
    assert torch.equal(ahead, torch.get_rng_state())
    got = bank.encoder.network.transformer.cls_token.grad.clone()
    bank.encoder.zero_grad()
    torch.manual_seed(3)
    rows = [bank.encoder.encode(images=bank._inputs.images(torch.tensor(ids)))["visual"] for ids in ([1, 2, 4], [7, 8])]
    torch.cat(rows)[[0, 2, 4]].pow(2).sum().backward()
    torch.testing.assert_close(got, bank.encoder.network.transformer.cls_token.grad, rtol=1e-4, atol=1e-6)
    assert got.abs().max() > 0


def step(bank, items=(1, 2, 3)):
    """One optimiser step on the encoder through the bank."""
    optimizer = torch.optim.SGD(bank.encoder.parameters(), lr=0.1)
    bank.train()
    bank.refresh(torch.tensor(items))
    optimizer.zero_grad()
    sum(bank[m][torch.tensor(items)].pow(2).sum() for m in bank).backward()
    bank.after_backward()
    optimizer.step()


def test_other_rows_are_the_last_known_values_in_training():
    bank, _ = build()
    bank.train()
    start = bank["visual"].clone()
    step(bank)
    after = bank["visual"]
    assert type(after) is torch.Tensor and not after.requires_grad
    torch.testing.assert_close(after, start)  # the rows of the batch were encoded before the step
    bank.refresh(torch.tensor([2]))
    now = bank["visual"]
    assert isinstance(now, LiveTable)
    changed = ((now.table - start).abs() > 1e-4).any(dim=1).nonzero().squeeze(1)
    assert changed.tolist() == [2]


@pytest.mark.parametrize("reader", ["evaluation", "checkpoint", "epoch", "other weights"])
def test_what_is_read_is_never_older_than_the_weights(reader):
    bank, content = build()
    step(bank)
    if reader == "evaluation":
        bank.eval()
    elif reader == "checkpoint":
        bank.state_dict()
    elif reader == "epoch":
        bank.before_epoch(2)
    else:
        bank.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in bank.state_dict().items()})
    got = bank["visual"][1:].clone()
    torch.testing.assert_close(got, encode_catalogue(bank.encoder, content, "visual"), rtol=1e-4, atol=1e-5)


def test_refresh_every_other_epoch():
    bank, _ = build(settings={"bank_refresh_epochs": 2})
    step(bank)
    before = bank["visual"].clone()
    bank.before_epoch(1)
    assert torch.equal(before, bank["visual"])
    bank.before_epoch(2)
    assert not torch.equal(before, bank["visual"])


def test_checkpoint_holds_the_encoder_and_no_table():
    bank, _ = build()
    names = bank.state_dict().keys()
    assert names and all(n.startswith("encoder.") for n in names)


def test_the_encoder_sees_no_more_than_a_micro_batch(monkeypatch):
    """What bounds the memory: batch and catalogue do not change the size of one pass through the encoder."""
    bank, _ = build(content=Catalogue(items=40), settings={"encoder_micro_batch": 4})
    sizes = []
    encode = bank.encoder.encode
    monkeypatch.setattr(
        bank.encoder,
        "encode",
        lambda images=None, texts=None: sizes.append(len(images if texts is None else texts)) or encode(images, texts),
    )
    step(bank, items=tuple(range(1, 31)))
    assert max(sizes) == 4 and len(sizes) == 2 * (10 + 8 + 8)


def test_missing_content():
    content = Catalogue(without_picture=[2, 7], without_text=[3])
    bank, _ = build(content=content)
    bank.eval()
    full = encode_catalogue(bank.encoder, content, "visual")
    have = torch.tensor([i not in (2, 7) for i in range(1, 25)])
    torch.testing.assert_close(bank["visual"][2], full[have].mean(0), rtol=1e-4, atol=1e-5)
    step(bank, items=(2, 3, 4))  # 2 has no picture, 3 no text
    zero, _ = build(content=content, settings={"missing_modality": "zero"})
    zero.eval()
    assert (zero["visual"][[2, 7]] == 0).all() and (zero["textual"][3] == 0).all() and (zero["textual"][2] != 0).any()
    with pytest.raises(UserError, match="2 of 24 items have no content for visual"):
        build(content=content, settings={"missing_modality": "error"})
    with pytest.raises(UserError, match="no item has a picture"):
        build(content=Catalogue(without_picture=range(25)))


def test_further_modalities_stay_fixed():
    sound = torch.randn(25, 3)
    bank, _ = build(names=("visual", "acoustic"), others={"acoustic": sound})
    step_items = torch.tensor([1, 2])
    bank.train()
    bank.refresh(step_items)
    assert torch.equal(bank["acoustic"], sound) and isinstance(bank["visual"], LiveTable)


def test_own_learning_rate_and_no_decay_of_norms():
    bank, _ = build(settings={"encoder_freeze_blocks": 1})
    other = nn.Linear(2, 2)
    model = nn.Module()
    model.features, model.other = bank, other
    for groups in (list(model.parameters()), [{"params": list(model.parameters()), "weight_decay": 0.5}]):
        split = bank.own_groups(groups)
        assert {id(p) for p in split[0]["params"]} == {id(p) for p in other.parameters()}
        assert [g["lr"] for g in split[1:]] == [1e-3, 1e-3] and [g["weight_decay"] for g in split[1:]] == [0.1, 0.0]
        assert all(p.requires_grad for g in split[1:] for p in g["params"])
        assert all(p.dim() >= 2 for p in split[1]["params"])
    assert not bank.encoder.towers()[0][1].mlp.c_fc.weight.requires_grad


def test_a_models_initialisation_leaves_the_encoder_alone():
    bank, _ = build()
    model = nn.Module()
    model.features, model.other = bank, nn.Linear(2, 2)
    before = [p.clone() for p in bank.parameters()]
    model.apply(lambda module: [nn.init.zeros_(p) for p in module.parameters(recurse=False)])
    assert all(torch.equal(a, b) for a, b in zip(before, bank.parameters())) and model.other.weight.abs().sum() == 0


def end2end(model, content=None, **settings):
    world = TwoTastes()
    sizes = TINY_CLIP["encoder_sizes"]
    given = {"encoder": "tiny-clip", "encoder_training": "end2end", "encoder_sizes": sizes, "encoder_micro_batch": 16, **settings}
    config = test_config(model, **given)
    dataset = array_dataset(config, world.interactions, world.n_users, world.n_items)
    dataset.content = content or Catalogue(items=world.n_items - 1)
    from recbole_mm.model import get_model

    torch.manual_seed(0)
    return quiet(get_model(model), config, dataset), world, config


@pytest.mark.parametrize("model", ["VBPR", "MMGCN", "MMGCL", "SLMRec", "LATTICE"])
def test_every_general_model_trains_its_encoder(model):
    """No model has a line for it: the loss reaches the encoder, a step changes it, scores follow the new weights."""
    built, world, config = end2end(model)
    trainer = Trainer(config, built)
    built.train()
    trainer._hook("before_epoch", 0)
    batch = world.batch(built, rows=torch.arange(40).numpy())
    before = {n: p.detach().clone() for n, p in built.features.encoder.named_parameters()}
    trainer.optimizer.zero_grad()
    trainer._hook("before_batch", batch)
    loss = total_loss(built.calculate_loss(batch))
    loss.backward()
    trainer._hook("after_backward")
    assert torch.isfinite(loss)
    reached = {n for n, p in built.features.encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n in before if "projection" not in n and "logit_scale" not in n}
    trainer.optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in built.features.encoder.named_parameters())
    built.eval()
    torch.testing.assert_close(
        built.features["visual"][1:9], encode_catalogue(built.features.encoder, built.features._inputs.content, "visual")[:8]
    )


def test_modalities_select_what_the_encoder_gives():
    built, _, _ = end2end("VBPR", modalities=["visual"])
    assert built.features.keys() == ["visual"]


def test_wrong_settings_are_named():
    world = TwoTastes()
    config = test_config("VBPR", encoder="classic", encoder_training="end2end")
    dataset = array_dataset(config, world.interactions, world.n_users, world.n_items)
    dataset.content = Catalogue(items=world.n_items - 1)
    with pytest.raises(UserError, match="classic has none"):
        build_bank(config, dataset, list)
