"""Channels on a fixed graph: propagated features are the propagated maps, and follow the feature bank."""

import numpy as np
import pytest
import torch

from recbole_mm.layer.fusion import ChannelEncoder, FixedGraphEncoder
from recbole_mm.model.bank import FeatureBank
from tests.layer.test_graph import M, N, example


def encoders(kind="sym", limit=16):
    torch.manual_seed(0)
    bank = FeatureBank({"visual": torch.randn(M, 5), "odd.name": torch.randn(M, 3)})
    encoder = ChannelEncoder(N, M, bank, 2)
    operator = example().operator(kind)
    return bank, encoder, operator, FixedGraphEncoder(encoder, operator, 3, limit)


@pytest.mark.parametrize("kind", ["sym", "row_loop"])
@pytest.mark.parametrize("limit", [16, 1])
@pytest.mark.parametrize("some", [False, True])
def test_fixed_graph_gives_the_same_channels_and_gradients(kind, limit, some):
    _, encoder, operator, fixed = encoders(kind, limit)
    rows = (torch.tensor([1, 5]), torch.tensor([2, 3, 11])) if some else (None, None)
    plain, quick = encoder(operator, 3, None, *rows), fixed(*rows)
    weights = [torch.randn_like(x) for x in plain]
    found = []
    for out in (plain, quick):
        encoder.zero_grad()
        sum((x * w).sum() for x, w in zip(out, weights)).backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(plain, quick):
        torch.testing.assert_close(a, b)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_changed_features_are_propagated_again():
    bank, encoder, operator, fixed = encoders()
    before = fixed()[1].detach()
    bank["visual"][3] += 1.0
    after = fixed()[1]
    assert not np.allclose(before, after.detach())
    torch.testing.assert_close(after, encoder(operator, 3)[1])
