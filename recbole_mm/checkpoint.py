"""Checkpoints of tensors and plain values only: loading one can run no code."""

import os
import random
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path

FORMAT = "recbole_mm checkpoint 1"


def save(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write `state` atomically. Besides tensors and plain values, NumPy arrays and scipy CSR/CSC matrices are kept (as tensors).

    Raises:
        TypeError: for any other object; it would have to be pickled.
    """
    encoded = {"format": FORMAT, **{key: _encode(value, key) for key, value in state.items()}}
    with atomic_path(path) as temporary:
        try:
            torch.save(encoded, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise UserError(
                f"The checkpoint {path} cannot be written; as a rule the disk is full. Make room, then go on with --resume={Path(path).parent}."
            ) from None


def load(path: str | os.PathLike, device: torch.device | str = "cpu", needs: Collection[str] = ()) -> dict[str, Any]:
    """Read a checkpoint that :func:`save` wrote; tensors go to `device`.

    Raises:
        UserError: when the file is missing, damaged, not one of ours, without one of the entries it `needs`, or holds anything but tensors
            and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The checkpoint {path} does not exist. A run writes best.pt and last.pt into its run directory.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        raise UserError(
            f"{path} is no checkpoint of recbole_mm, or only a part of one. Expected best.pt or last.pt from a run directory."
        ) from None
    if damaged:
        raise UserError(f"The checkpoint {path} is damaged (checksum of {damaged} does not match). Use another one, or train again.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises pickle, runtime, key and attribute errors here, depending on where the file is foreign
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The checkpoint {path} is refused: it holds something other than tensors and plain values, which could run code ({reason}). "
            "Only load checkpoints that recbole_mm wrote."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version of recbole_mm (expected format {FORMAT!r}).")
    absent = [key for key in needs if key not in state]
    if absent:
        raise UserError(
            f"The checkpoint {path} is not whole: it has no {', '.join(absent)}. Somebody has changed it; use another one, or train again."
        )
    return {key: _decode(value, device) for key, value in state.items() if key != "format"}


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, (bool, str)):
        return value.detach() if isinstance(value, torch.Tensor) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"__numpy__": torch.from_numpy(np.ascontiguousarray(value))}
    if scipy.sparse.issparse(value) and value.format in ("csr", "csc"):
        parts = {"data": value.data, "indices": value.indices, "indptr": value.indptr}
        return {"__scipy__": value.format, "shape": list(value.shape), **{k: torch.from_numpy(np.array(v)) for k, v in parts.items()}}
    if isinstance(value, Mapping):
        return {key if isinstance(key, (str, int)) else str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"checkpoint: {where} is a {type(value).__module__}.{type(value).__name__}; checkpoints hold tensors and plain values only."
    )


def _decode(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        if "__numpy__" in value:
            return value["__numpy__"].cpu().numpy()
        if "__scipy__" in value:
            parts = (value["data"].cpu().numpy(), value["indices"].cpu().numpy(), value["indptr"].cpu().numpy())
            kind = scipy.sparse.csr_matrix if value["__scipy__"] == "csr" else scipy.sparse.csc_matrix
            return kind(parts, shape=tuple(value["shape"]))
        return {key: _decode(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_decode(item, device) for item in value)
    return value


def random_state() -> dict[str, Any]:
    """State of every global random generator (Python, NumPy, torch, CUDA) as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every global random generator back to what :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def load_weights(model: torch.nn.Module, state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Put the weights of a checkpoint into `model`.

    Raises:
        UserError: when names or shapes differ, which means other data or other settings.
    """
    try:
        model.load_state_dict(state["state_dict"])
    except (RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(
            f"The checkpoint {path} does not fit the model: {' '.join(lines[1:4]) or lines[0]} The dataset or the settings differ from those of the run."
        ) from None
    model.load_other_parameter(state.get("other_parameter"))
