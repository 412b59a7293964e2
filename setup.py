"""Packaging. Settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "recbole_mm" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
README = HERE / "README.md"

# What RecBole 1.2.1 needs at run time, without ray (see below) and without its exact pins, of which recbole_mm is tested to need none.
RECBOLE_NEEDS = [
    "colorama>=0.4.4",
    "colorlog>=4.7.2",
    "numpy>=1.26",
    "pandas>=2.2",
    "plotly>=5.24",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "tabulate>=0.9",
    "tensorboard>=2.16",
    "texttable>=1.7",
    "thop>=0.1.1.post2207130030",
    "tqdm>=4.66",
]


def data_files(folder: str) -> list[str]:
    """Return the files below `folder` relative to it; both folders lie beside the package and are shipped inside it."""
    return [str(path.relative_to(HERE / folder)) for path in sorted((HERE / folder).rglob("*")) if path.is_file()]


setup(
    name="recbole-mm",
    version=VERSION,
    description="Multimodal recommendation for RecBole: models, encoders and benchmarks over item pictures and texts",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["recbole_mm", "recbole_mm.*"]), "recbole_mm.properties", "recbole_mm.dataset"],
    package_dir={"recbole_mm.properties": "properties", "recbole_mm.dataset": "dataset"},
    package_data={
        "recbole_mm.properties": data_files("properties"),
        "recbole_mm.dataset": data_files("dataset"),
        "recbole_mm.report": ["page.html"],
    },
    install_requires=[
        # RecBole pins ray <= 2.6.3, which has no wheel for Python >= 3.12; there one installs it by `pip install --no-deps recbole==1.2.1`.
        'recbole==1.2.1; python_version < "3.12"',
        *RECBOLE_NEEDS,
        "torch>=2.6",  # the first whose restricted reader of checkpoints is safe (CVE-2025-32434)
        "torchvision>=0.21",
        "torch-geometric>=2.6",
        "transformers>=4.48",
        "open_clip_torch>=2.30",
        "peft>=0.14",
        "optuna>=4.0",
        "sqlalchemy>=2.0",  # comes with optuna; a search on SQLite sets how its transactions begin
        "pillow>=10.3",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.27",
        "tokenizers>=0.21",
        "timm>=1.0.12",
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
        "pyarrow>=17",
        "jinja2>=3.1",
    ],
    extras_require={
        "test": ["pytest>=8.0", "hypothesis>=6.100", "packaging>=23.0", "ruff>=0.9", "faiss-cpu>=1.8", "statsmodels>=0.14"],
        "approximate": ["faiss-cpu>=1.8"],  # item graphs of catalogues too large for exact neighbours; RecBole's NCL
        "all-models": [
            "faiss-cpu>=1.8",
            "kmeans-pytorch>=0.3",
            "lightgbm>=4.0",
            "xgboost>=2.0",
        ],  # RecBole's NCL, LDiffRec, LightGBM, XGBoost
        "services": ["selenium>=4.20", "psycopg[binary]>=3.1"],  # tests in a real browser and on a real database; searches on PostgreSQL
        "docs": ["mkdocs-material>=9.5"],
    },
    entry_points={"console_scripts": ["recbole-mm = recbole_mm.cli:entry"]},
)
