"""Projector and IISAN against the published code, and the properties the formulas promise."""

import json

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.layer.adapter import IISAN, Bottleneck, Projector
from tests.support import golden_params, load_golden

VALUES = {"rtol": 1e-4, "atol": 1e-5}


def tensors(z: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Entries below `prefix` with the prefix removed."""
    return {
        key.removeprefix(prefix): torch.from_numpy(value) for key, value in z.items() if key.startswith(prefix) and value.dtype != "<U1"
    }


def projector_names(reference: dict) -> dict:
    """The reference's names of a projector's tensors -> ours."""
    ours = {"projector.0": "inner", "projector.1": "inner_norm", "projector.3": "outer", "last_layernorm": "outer_norm"}
    return {f"{ours[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in reference.items()}


def iisan_names(reference: dict) -> dict:
    """The reference's names of an IISAN's tensors -> ours."""
    lists = {"TextBlocks": "text_blocks", "ImgBlocks": "image_blocks", "InterBlocks": "joint_blocks", "CombProj": "image_to_text"}
    named = {}
    for name, value in reference.items():
        if name == "weight_scalar":
            named["gate"] = value
            continue
        which, layer, position, tensor = name.split(".")
        inner = "" if which == "CombProj" else {"0": "down.", "2": "up."}[position]
        named[f"{lists[which]}.{layer}.{inner}{tensor}"] = value
    return named


def assert_gradients(module: torch.nn.Module, expected: dict) -> None:
    """Each gradient within 1e-4 of the tensor's largest entry."""
    found = {name: p.grad for name, p in module.named_parameters()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-8)
        assert (found[name] - value).abs().max().item() <= 1e-4 * scale, name


def load_iisan(z: dict) -> tuple[IISAN, Projector]:
    config = json.loads(str(z["config"]))
    iisan = IISAN(config["iisan_dim_image"], config["iisan_dim_text"], config["iisan_n_layers"], config["iisan_hid_dim"])
    iisan.load_state_dict(iisan_names(tensors(z, "w/iisan.")))
    projector = Projector(config["in_dim"], config["hidden_units"])
    projector.load_state_dict(projector_names(tensors(z, "w/projector.")))
    return iisan, projector


@pytest.mark.parametrize("path", golden_params("iisan"))
def test_golden_iisan_streams_output_and_gradients(path):
    z = load_golden(path)
    iisan, projector = load_iisan(z)
    streams = {}
    for stream, blocks in (("text", iisan.text_blocks), ("img", iisan.image_blocks), ("comb", iisan.joint_blocks)):
        for layer, block in enumerate(blocks):
            block.register_forward_hook(lambda _m, _i, out, key=f"{stream}/z{layer}": streams.__setitem__(key, out.detach()))
    image, text = torch.from_numpy(z["feat/img_hidden"]), torch.from_numpy(z["feat/text_hidden"])
    encoded = iisan(image, text)
    assert iisan.out_features == encoded.shape[1]
    assert_close(encoded, torch.from_numpy(z["out/encoder"]), **VALUES)
    assert_close(iisan.gate.sigmoid(), torch.from_numpy(z["out/gates"]), **VALUES)
    for key, value in streams.items():
        assert_close(value, torch.from_numpy(z[f"out/{key}"]), msg=key, **VALUES)
    assert len(streams) == 3 * image.shape[1]

    loss = (projector(encoded) * torch.from_numpy(z["probe"])).sum()
    assert_close(loss, torch.tensor(float(z["out/probe_loss"])), **VALUES)
    loss.backward()
    both = torch.nn.ModuleDict({"iisan": iisan, "projector": projector})
    expected = {f"iisan.{k}": v for k, v in iisan_names(tensors(z, "grad_probe/iisan.")).items()}
    expected |= {f"projector.{k}": v for k, v in projector_names(tensors(z, "grad_probe/projector.")).items()}
    for parameter in both.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert_gradients(both, expected)


@pytest.mark.parametrize("path", golden_params("iisan"))
def test_golden_iisan_padding(path):
    """The reference encodes id 0 as all-zero states in training and as a zero vector in evaluation; both values are reproduced."""
    z = load_golden(path)
    iisan, projector = load_iisan(z)
    zero_image, zero_text = (torch.zeros_like(torch.from_numpy(z[key][:1])) for key in ("feat/img_hidden", "feat/text_hidden"))
    encoded = iisan(zero_image, zero_text)
    assert_close(encoded, torch.from_numpy(z["out/encoder_zero_hidden"]), **VALUES)
    assert_close(projector(encoded), torch.from_numpy(z["out/pad_train_zero_hidden"]), **VALUES)
    assert_close(projector(torch.zeros_like(encoded)), torch.from_numpy(z["out/pad_eval"]), **VALUES)


@pytest.mark.parametrize("path", golden_params("perpeft"))
def test_golden_projector(path):
    z = load_golden(path)
    config = json.loads(str(z["config"]))
    projector = Projector(config["in_dim"], config["hidden_units"])
    projector.load_state_dict(projector_names(tensors(z, "w/projector.")))
    features = torch.cat((torch.from_numpy(z["feat/v"]), torch.from_numpy(z["feat/t"])), dim=1)
    features = torch.cat((torch.zeros(1, features.shape[1]), features))
    assert_close(projector(features), torch.from_numpy(z["out/mm_proj"]), **VALUES)


def test_iisan_on_vit_b32_has_the_papers_size():
    assert sum(p.numel() for p in IISAN(768, 512).parameters()) == 3_572_149


def test_bottleneck_starts_near_the_identity():
    torch.manual_seed(0)
    z = torch.randn(5, 16)
    assert (Bottleneck(16, 4)(z) - z).abs().max() < 1e-3
