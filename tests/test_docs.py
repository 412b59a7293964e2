"""What the documentation tells people to type works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recbole_mm import cli
from recbole_mm.data.features import write_feature_set
from recbole_mm.launch import free_port
from recbole_mm.model import MODELS
from recbole_mm.paths import bundled_dataset_dir
from tests.robustness.world import check_refusal
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
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).is_file(), f"{page.name}: {script}"


# every command of every page

#: `<!-- needs WHAT: TEXT -->` on a page: its commands that contain TEXT need something a test has not. What they then must say:
SENTENCES = {
    "weights": "weights|does not exist|not found|download|folder|offline|no such|cannot",  # downloaded weights: the sentence says which and from where
    "data": "Unknown dataset|there is no|no such|lack something",
    "service": "cannot be opened",
}
#: how a program of the docs is started; anything else in a code block is no command of ours
PROGRAMS = ("recbole-mm", "python run_recbole_mm.py", "torchrun")
RUN = "VBPR-shop-20260101-120000-0a1b2c"
RUNS = (RUN, "LATTICE-shop-20260101-120000-0a1b2c", "LATTICE-tiktok-20260101-120000-0a1b2c")
#: names that stand for the reader's own. `<run>`, `<run directory>` and `<another>` are the last two runs, see `latest_runs`
STAND_INS = {
    "<name>": "mine", "<format>": "mmrec", "<run directory>": RUN, "<run>": RUN, "<another>": RUNS[1], "VBPR-shop-...": RUN,
    "LATTICE-shop-...": RUNS[1], "--data_path=...": "--data_path=dataset", "<folder that holds tiktok/>": "dataset",
}  # fmt: skip
#: the same for a single page
PAGE_STAND_INS = {
    "encoders.md": {"<folder>": "saved/mine-clip"},
    "report.md": {"--run=<run>": "--run=saved/<run>"},
    "search.md": {"<folder>": "saved/search-LATTICE-tiktok"},
    "troubleshooting.md": {"<folder>": "data/rows", "<name>": "rows"},
}
#: what a reader has done before the page begins: each page is tested in a folder of its own
BEFORE = {
    "encoders.md": ["recbole-mm finetune --dataset=mine --encoder=tiny-clip --output=saved/mine-clip"],
    "report.md": ["recbole-mm benchmark shop", "recbole-mm --model=PerPEFT-SASRec --dataset=shop --peft_kind=lora"],
}
#: what makes a command small enough for a test; a value given in the docs is replaced
SMALL = {
    "train": {"epochs": "1", "use_gpu": "False", "show_progress": "False", "tensorboard": "False", "state": "error", "encoder_workers": "0"},
    "search": {"epochs": "1", "use_gpu": "False", "trials": "2"},
    "benchmark": {"epochs": "1", "use_gpu": "False", "seeds": "1,2", "jobs": "1"},
    "extract": {"use_gpu": "False", "encoder_workers": "0"},
    "finetune": {"finetune_epochs": "1", "use_gpu": "False"},
    "synthetic": {"users": "60", "items": "60", "interactions": "900"},
}  # fmt: skip
SMALL_MODELS = {"PerPEFT-SASRec": {"epochs": "2", "global_epochs": "1"}}
#: replaced where the docs give it
FEWER = {"nproc": "2", "jobs": "2", "nproc_per_node": "2"}
#: a page's code: fenced blocks, indented lines, and commands with options within a sentence
CODE = re.compile(r"```(\w*)\n(.*?)```|^ {4}([^\n]+)$|`((?:recbole-mm|python run_recbole_mm\.py) [^`\n]*--[^`\n]*)`", re.S | re.M)


def markers(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"(?m)^<!-- needs (\w+): (.*?) -->$", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments. A command in a sentence that leaves words out (...) is a form, not a command."""
    found = []
    for language, block, indented, inline in CODE.findall(page.read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh", "console") else []
        lines += [word for word in (indented, inline if "..." not in inline else "") if word]
        for line in lines:
            line = re.sub(r"\s{2,}#.*$", "", line).strip()
            if line.startswith(PROGRAMS):
                found.append(line)
    return found


def words_of(line: str, page: str, runs: tuple[str, str] = RUNS[:2]) -> list[str]:
    """The words of a command line with the reader's own names filled in; `runs` are the last run and the one before."""
    own = {"<run directory>": runs[0], "<run>": runs[0], "<another>": runs[1]}
    for name, value in [*PAGE_STAND_INS.get(page, {}).items(), *{**STAND_INS, **own}.items()]:
        line = line.replace(name, value)
    return shlex.split(line.removeprefix("recbole-mm").removeprefix("python run_recbole_mm.py"))


def small(words: list[str]) -> list[str]:
    """The same command on less data, in fewer processes."""
    command = words[0] if words and not words[0].startswith("-") else "train"
    changes = dict(SMALL.get(command, {}))
    for word in words:
        changes |= SMALL_MODELS.get(word.removeprefix("--model="), {})
        if word.startswith(("--help", "--list", "--version", "--resume", "--check")):
            changes = {}
            break
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].replace("-", "_")
            skipping = key in changes
            if key in FEWER and not skipping:
                word = f"--{key}={FEWER[key]}"
        if not skipping:
            kept.append(word)
    return kept + [f"--{key.replace('_', '-') if command == 'synthetic' else key}={value}" for key, value in changes.items()]


def typed(words: list[str], capfd) -> tuple[int, str, str]:
    """Run one command in this process; exit code and what it printed."""
    capfd.readouterr()
    code = cli.main(small(words))
    return code, *capfd.readouterr()


def torchrun(lines: list[list[str]], capfd) -> tuple[int, str, str]:
    """Run torchrun as the lines say, one for each machine, with two processes in all; the machines are this one."""
    port, several, started = str(free_port()), len(lines) > 1, []
    for words in lines:
        where = words.index("run_recbole_mm.py")
        launcher = [re.sub("^--nproc_per_node=.*", f"--nproc_per_node={1 if several else 2}", word) for word in words[1:where]]
        launcher = [re.sub("^--master_addr=.*", "--master_addr=127.0.0.1", word) for word in launcher]
        launcher = [re.sub("^--master_port=.*", f"--master_port={port}", word) for word in launcher]
        launcher += [] if several else [f"--master_port={port}"]
        program = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "run_recbole_mm.py"), *small(words[where + 1 :])]
        started.append(subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    codes = [process.wait(timeout=300) for process in started]
    return max(map(abs, codes)), *capfd.readouterr()


def latest_runs() -> tuple[str, str]:
    """The run directory that was finished last, and the one before."""
    files = sorted(Path("saved").glob("*/result.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    found = [path.parent.name for path in files if json.loads(path.read_text(encoding="utf-8")).get("status") == "finished"]
    return found[0], found[1]


def test_every_command_is_found_and_every_marker_means_something():
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert sum(counts.values()) >= 55 and counts["README.md"] >= 5 and counts["encoders.md"] >= 5, counts
    for page in PAGES:
        for kind, text in markers(page):
            assert kind in SENTENCES, f"{page.name}: {kind}"
            assert any(text in line for line in commands(page)), f"{page.name}: no command contains {text!r}"
        for line in commands(page):
            assert not set("<>") & set("".join(words_of(line, page.name))), (
                f"{page.name}: {line}: say in STAND_INS what stands for the name"
            )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader's folder: small datasets under the names the pages use, sources to convert, finished runs. Nobody writes there later."""
    folder = tmp_path_factory.mktemp("reader")
    draw = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(ROOT / "properties", folder / "properties")
        for name, users, items, rows in (("shop", 120, 130, 1500), ("mine", 60, 60, 900)):
            words = ["--users", str(users), "--items", str(items), "--interactions", str(rows), "--out", f"dataset/{name}"]
            assert cli.main(["synthetic", *words]) == 0
        (folder / "dataset/mine/images.csv").write_text("item_id,url\n")
        tokens = [line.split("\t")[0] for line in (folder / "dataset/mine/mine.item").read_text().splitlines()[1:]]
        table = draw.normal(size=(len(tokens), 6)).astype(np.float32)
        write_feature_set(folder / "dataset/mine/features/my-encoder", {"visual": table}, tokens, {"encoder": "drawn"})
        tiktok = folder / "dataset/tiktok"  # as it is published: a fixed split, two kinds of features, no times
        tiktok.mkdir()
        for part, begin, end in (("train", 0, 8), ("valid", 8, 9), ("test", 9, 10)):
            rows = [f"{user}\t{(user * 7 + k * k) % 50}" for user in range(60) for k in range(begin, end)]
            (tiktok / f"tiktok.{part}.inter").write_text("user_id:token\titem_id:token\n" + "\n".join(rows) + "\n")
        (tiktok / "item_ids.txt").write_text("".join(f"{item}\n" for item in range(50)))
        for name in ("visual", "acoustic"):
            np.save(tiktok / f"{name}.npy", draw.normal(size=(50, 6)).astype(np.float32))
        (folder / "data/baby").mkdir(parents=True)
        lines = [f"{u}\t{(u * 7 + k) % 20}\t{0 if k < 6 else k - 5}" for u in range(20) for k in range(8)]
        (folder / "data/baby/baby.inter").write_text("userID\titemID\tx_label\n" + "\n".join(lines) + "\n")
        for name in ("image_feat", "text_feat"):
            np.save(folder / "data/baby" / f"{name}.npy", draw.normal(size=(20, 6)).astype(np.float32))
        shutil.copytree(folder / "dataset/mine", folder / "data/rows", ignore=shutil.ignore_patterns("features", "images", "*.user"))
        for path in (folder / "data/rows").glob("mine.*"):
            path.rename(path.with_name(path.name.replace("mine", "rows")))
        for name in RUNS:
            model, dataset = name.split("-")[:2]
            assert cli.main(small([f"--model={model}", f"--dataset={dataset}", f"--run_name={name}"])) == 0
        (folder / "a.yaml").write_text("seed: 3\n")
    return folder


@pytest.fixture
def own_folder(reader, tmp_path, monkeypatch):
    """A copy of the reader's folder to work in: no page depends on what another one did."""
    shutil.copytree(reader, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "reader"


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if commands(page)])
def test_every_command_works_or_says_what_is_missing(page, own_folder, capfd):
    """Typed in the order of the page, made small. Where weights, data or a service are needed, the command says so in one sentence."""
    for line in BEFORE.get(page.name, ()):
        assert typed(words_of(line, page.name), capfd)[0] == 0, line
    wrong, machines = [], []
    for line in commands(page):
        words = words_of(line, page.name, latest_runs())
        need = next((kind for kind, text in markers(page) if text in line), None)
        if words[:1] == ["torchrun"]:
            machines.append(words)
            total = next((int(word.partition("=")[2]) for word in words if word.startswith("--nnodes=")), 1)
            if len(machines) < total:
                continue
            code, out, err = torchrun(machines, capfd)
            machines = []
        else:
            code, out, err = typed(words, capfd)
        if need is not None and "--check" in words:
            assert code == 1 and re.search(SENTENCES[need], out), f"{line}\n  exit {code}: {out[-600:]}{err[-600:]}"
        elif need is not None:
            check_refusal(code, err, SENTENCES[need])
        elif code != 0:
            wrong.append(f"{line}\n  as {words}\n  exit {code}: {err.strip()[-600:] or out.strip()[-600:]}")
    assert not wrong, "\n".join(wrong)
    assert not machines, f"one command for each machine: {machines}"
    for record in own_folder.glob("saved/*/result.json"):
        assert json.loads(record.read_text())["schema"] == 1
