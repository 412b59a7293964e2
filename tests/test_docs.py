"""What the documentation tells people to type works."""

import re
from pathlib import Path

import pytest

from recbole_mm import cli
from recbole_mm.model import MODELS
from recbole_mm.paths import bundled_dataset_dir
from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_adding_a_model(tmp_path, monkeypatch):
    """The guide's model, its settings, its registration and its checks, in the order of the page."""
    page = ROOT / "docs" / "adding-a-model.md"
    code = blocks(page, "python")
    assert len(code[0].splitlines()) <= 42
    (tmp_path / "GateFuse.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    (tmp_path / "dataset").symlink_to(bundled_dataset_dir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recbole_mm.model.MODELS", dict(MODELS))
    quick = {"use_gpu": False, "show_progress": False, "state": "error", "tensorboard": False}
    code[1] = code[1].replace('{"epochs": 2}', repr({"epochs": 1, **quick}))
    assert "epochs': 1" in code[1]
    space: dict = {}
    for block in code:
        exec(compile(block, str(page), "exec"), space)
    assert space["model"].n_items == 101


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_docs_exist(page):
    """A renamed command or option would leave the page wrong: every `recbole-mm <word>` names a command, every page's links lead somewhere."""
    text = page.read_text(encoding="utf-8")
    for word in re.findall(r"(?:recbole-mm|run_recbole_mm\.py) ([a-z][a-z-]+)\b", text):
        assert word in cli.COMMANDS, f"{page.name}: {word}"
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not link.startswith(("http", "mailto")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
