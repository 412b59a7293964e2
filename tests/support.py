"""What several test files need: where the golden vectors and the real data are."""

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("RECBOLE_MM_GOLDEN", ROOT.parent / "shared" / "golden"))
DATA = Path(os.environ.get("RECBOLE_MM_DATA", ROOT.parent / "shared" / "data"))


def golden_params(prefix: str) -> list:
    """One pytest parameter for each golden file whose name starts with `prefix`, or a single skipped one with the reason."""
    paths = sorted(GOLDEN.glob(f"{prefix}*.npz"))
    if paths:
        return [pytest.param(path, id=path.stem) for path in paths]
    reason = f"no {prefix}*.npz in {GOLDEN} (set RECBOLE_MM_GOLDEN)"
    return [pytest.param(None, id=f"{prefix}-absent", marks=pytest.mark.skip(reason=reason))]


def load_golden(path: Path) -> dict[str, np.ndarray]:
    """All entries of a golden file."""
    with np.load(path, allow_pickle=False) as z:
        return {key: z[key] for key in z.files}


def needs_data(name: str):
    """Skip mark for tests that read the real dataset `name`."""
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {name} in {DATA} (set RECBOLE_MM_DATA)")
