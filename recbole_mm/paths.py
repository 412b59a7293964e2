"""Where the shipped files are: beside the package in a checkout, inside it when installed from a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def properties_dir() -> Path:
    """Folder with ``overall.yaml``, ``model/``, ``dataset/``, ``encoder/``, ``tuning/`` and ``benchmark/``."""
    beside = CHECKOUT / "properties"
    return beside if (beside / "overall.yaml").is_file() else PACKAGE / "properties"


def bundled_dataset_dir() -> Path:
    """Folder that holds the bundled sample datasets (``shop``)."""
    beside = CHECKOUT / "dataset"
    return beside if (beside / "shop").is_dir() and (CHECKOUT / "properties").is_dir() else PACKAGE / "dataset"
