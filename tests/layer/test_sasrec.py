"""The sequence encoder: what it may and may not see (its numbers are compared with the published code in tests/model/test_perpeft.py)."""

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.layer.sasrec import SequenceEncoder, xavier_normal_matrices


def encoder(mask_padding: bool = False, dropout: float = 0.0) -> SequenceEncoder:
    torch.manual_seed(3)
    model = SequenceEncoder(6, 8, n_layers=2, n_heads=2, hidden_dropout=dropout, attention_dropout=dropout, mask_padding=mask_padding)
    xavier_normal_matrices(model)
    return model


def batch(lengths=(6, 4, 1)):
    torch.manual_seed(4)
    padding = torch.arange(6)[None] < 6 - torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 6, 8), padding


def test_no_position_sees_the_future():
    model, (items, padding) = encoder(), batch()
    changed = items.clone()
    changed[:, 4:] = torch.randn(3, 2, 8)
    before, after = model(items, padding), model(changed, padding)
    assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("mask_padding", [False, True])
def test_padding_is_seen_unless_masked(mask_padding):
    """The reference lets padded positions be attended to; `mask_padding` must cut them off and leave no NaN in rows of padding alone."""
    model, (items, padding) = encoder(mask_padding), batch((6, 3, 0))
    changed = torch.where(padding[..., None], torch.randn(3, 6, 8), items)
    before, after = model(items, padding), model(changed, padding)
    assert torch.isfinite(before).all()
    assert torch.allclose(before[~padding], after[~padding], atol=1e-6) == mask_padding


def test_padding_has_no_position_and_gets_no_gradient():
    model, (items, padding) = encoder(), batch()
    embedded = model.embed(items, padding)
    assert_close(embedded[padding], items[padding] * 8**0.5)
    assert not torch.allclose(embedded[~padding], items[~padding] * 8**0.5)
    model(items, padding).square().sum().backward()
    assert model.position_embedding.weight.grad[0].abs().sum() == 0
    assert model.position_embedding.weight.grad[1:].abs().sum(1).gt(0).all()


def test_dropout_acts_in_training_only():
    model, (items, padding) = encoder(dropout=0.5), batch()
    assert not torch.allclose(model(items, padding), model(items, padding))
    model.eval()
    assert_close(model(items, padding), model(items, padding))
