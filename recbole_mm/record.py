"""The record of a run: its directory, result.json and per-user values."""

import hashlib
import importlib.metadata
import platform
import resource
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_mm.distributed import is_main
from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path, write_json

SCHEMA = 1
_LIBRARIES = ("recbole_mm", "recbole", "torch", "numpy", "scipy", "pandas", "torch-geometric", "transformers", "open_clip_torch", "peft")


def new_run_dir(checkpoint_dir: str | Path, name: str | None, prefix: str) -> Path:
    """Make a run directory that no other run has, also when two start in the same second.

    Args:
        checkpoint_dir: the folder of all runs.
        name: the user's name for it (``run_name``), or None for ``<prefix>-<time>-<random>``.
        prefix: ``<model>-<dataset>``.

    Raises:
        UserError: when `name` exists, is no plain folder name, or the folder cannot be written.
    """
    root = Path(checkpoint_dir)
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(f"run_name: expected a plain folder name, got {name!r}. Set --checkpoint_dir for the folder of all runs.")
    while True:
        path = root / (name or f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if name is None and root.is_dir():
                continue
            raise UserError(f"{path} exists already. Choose another run_name, or continue that run with --resume={path}.") from None
        except OSError as error:
            raise UserError(
                f"The run directory {path} cannot be made: {error.strerror}. Set --checkpoint_dir to a folder that can be written."
            ) from None
        return path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "recbole_mm" not in found:
        from recbole_mm import __version__

        found["recbole_mm"] = __version__
    return found


def data_fingerprint(dataset) -> str:
    """SHA-256 over the interactions as loaded (ids and tokens), and over the item features where the dataset has them loaded."""
    digest = hashlib.sha256()
    for field in (dataset.uid_field, dataset.iid_field):
        digest.update("\n".join(map(str, dataset.field2id_token[field])).encode())
        column = dataset.inter_feat[field]
        digest.update(np.ascontiguousarray(np.asarray(column, dtype=np.int64)).tobytes())
    digest.update(str(getattr(dataset, "feature_fingerprint", "") or "").encode())
    return digest.hexdigest()


def peak_memory() -> dict[str, float | None]:
    """Peak resident memory of this process and of the GPU in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"peak_rss_mb": round(peak, 1), "peak_gpu_mb": None if gpu is None else round(gpu, 1)}


def plain_metrics(metrics: Any) -> dict[str, float | None]:
    """Metric values as JSON has them: NaN (no user in the group) becomes null."""
    return {key: None if value is None or np.isnan(value) else float(value) for key, value in (metrics or {}).items()}


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write result.json; of several processes the first one does."""
    if is_main():
        write_json(run_dir / "result.json", result)


def write_per_user(run_dir: Path, values: dict[str, np.ndarray]) -> None:
    """Write per-user test values (``users``, ``targets_hash`` and one array per metric) to per_user.npz."""
    with atomic_path(run_dir / "per_user.npz") as temporary:
        np.savez_compressed(temporary, **values)
