"""What setup.py declares is what the code needs and what RecBole needs, and the CI runs what the README says."""

import ast
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEST_COMMAND = 'pip install -e ".[test]" && python -m pytest'
OPTIONAL = {
    "faiss",
    "lightgbm",
    "xgboost",
    "wandb",
    "ray",
    "matplotlib",
}  # imported inside functions, with a sentence when they are missing


@pytest.fixture(scope="module")
def declared() -> dict:
    with mock.patch("setuptools.setup") as setup, mock.patch.object(sys, "argv", ["setup.py"]):
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def names(requirements) -> set[str]:
    return {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in requirements}


def third_party(folder: Path) -> dict[str, str]:
    """Return top-level module -> a file below `folder` that imports it, without the standard library and ourselves."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module)
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ("recbole_mm", "tests"):
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    "folder, unknown", [("layer", ("config", "model", "trainer", "data")), ("data", ("model", "trainer")), ("model", ("trainer",))]
)
def test_which_part_knows_which(folder, unknown):
    """docs/architecture.md: a layer knows no settings, data no model, a model no trainer."""
    for path in (ROOT / "recbole_mm" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for module in named:
                    assert not module.startswith(tuple(f"recbole_mm.{part}" for part in unknown)), f"{path}: {module}"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell which distribution a module is of")
@pytest.mark.parametrize("folder, extras", [("recbole_mm", []), ("tests", ["test"])])
def test_every_import_is_declared(declared, folder, extras):
    available = names([*declared["install_requires"], *(r for e in extras for r in declared["extras_require"][e])])
    distributions = metadata.packages_distributions()
    for module, file in third_party(ROOT / folder).items():
        if module in ("recbole_mm", "benchmarks"):  # this repository's
            continue
        owners = names(distributions.get(module, [module]))
        assert module in OPTIONAL or owners & available, f"{file} imports {module} ({owners}), which setup.py does not declare"


def test_all_that_recbole_needs_is_declared_without_ray(declared):
    """On Python 3.12 and later recbole itself is installed with --no-deps."""
    needs = [r for r in metadata.requires("recbole") if "extra ==" not in r]
    assert names(needs) - {"ray"} <= names(declared["install_requires"])
    recbole = next(Requirement(r) for r in declared["install_requires"] if r.startswith("recbole"))
    applies = {v: recbole.marker.evaluate({**default_environment(), "python_version": v}) for v in ("3.10", "3.11", "3.12", "3.13")}
    assert applies == {"3.10": True, "3.11": True, "3.12": False, "3.13": False} and str(recbole.specifier) == "==1.2.1"


def test_what_is_installed_here_satisfies_what_is_declared(declared):
    for requirement in map(Requirement, declared["install_requires"]):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement


def test_properties_and_data_ship_inside_the_package(declared):
    for folder in ("properties", "dataset"):
        assert declared["package_dir"][f"recbole_mm.{folder}"] == folder
        listed = set(declared["package_data"][f"recbole_mm.{folder}"])
        assert listed == {str(p.relative_to(ROOT / folder)) for p in (ROOT / folder).rglob("*") if p.is_file()}
    assert "overall.yaml" in declared["package_data"]["recbole_mm.properties"]
    assert {"recbole_mm", "recbole_mm.properties", "recbole_mm.dataset", "recbole_mm.model"} <= set(declared["packages"])
    for folder in (ROOT / "recbole_mm").rglob("*/"):
        if folder.name != "__pycache__" and any(folder.glob("*.py")):
            package = ".".join(folder.relative_to(ROOT).parts)
            assert package in declared["packages"], f"{package} has no __init__.py, so the wheel would lack it"


def test_ci_runs_the_test_command_of_the_readme():
    for file in (ROOT / ".ci" / "run", ROOT / "README.md"):
        assert TEST_COMMAND in file.read_text(encoding="utf-8"), file
    assert all(os.access(path, os.X_OK) for path in (ROOT / ".ci").iterdir())
