"""Every registered general model keeps the contract of recbole_mm.testing; a new model gets this by being in the registry."""

import pytest

from recbole_mm.model import MODELS
from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.testing import CONTRACT


def general_models() -> list[str]:
    return [name for name, entry in MODELS.items() if issubclass(entry.load(), MultimodalRecommender)]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("model", general_models())
def test_contract(model, check):
    check(model)
