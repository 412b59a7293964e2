"""Several processes: the same results as one, for every way of training; the launcher; what happens when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recbole_mm import cli, distributed, launch, run
from recbole_mm.config import Config
from recbole_mm.distributed import Share
from recbole_mm.errors import UserError
from tests import distributed_cases as cases

ROOT = Path(__file__).resolve().parent.parent


def start_workers(folder: Path, names: list[str], processes: int = 2) -> list[subprocess.Popen]:
    """The workers of `cases`, as torchrun would start them."""
    common = {
        **os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch.free_port()), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    program = [sys.executable, "-m", "tests.distributed_cases", str(folder), *names]
    return [
        subprocess.Popen(program, cwd=ROOT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]


def in_one_and_two(folder: Path, names: list[str]) -> dict[str, tuple[dict, dict]]:
    """Each case's values in one process (here) and in two."""
    cases.prepare(folder)
    workers = start_workers(folder, names)
    one = cases.run_cases(folder, names)
    errors = [worker.communicate(timeout=500)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), errors[0][-3000:] + errors[1][-3000:]
    two = json.loads((folder / "found.json").read_text())
    return {name: (one[name], two[name]) for name in names}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return {**in_one_and_two(folder, list(cases.CASES)), "folder": folder}


def assert_same(one, two, tolerance: float = 1e-5, where: str = "") -> None:
    """Equal structures whose numbers agree within `tolerance`, relative to the larger."""
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], tolerance, f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for place, (a, b) in enumerate(zip(one, two)):
            assert_same(a, b, tolerance, f"{where}[{place}]")
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance), where
    else:
        assert one == two, where


@pytest.mark.parametrize("name", [*cases.MODELS, "PerPEFTSASRec", "VIP5", "end2end", "finetune"])
def test_two_processes_train_like_one(results, name):
    """Losses of every epoch, and the metrics: batches of 101 (25, 17) rows cannot be shared equally, and dropout is on where a model has it."""
    one, two = results[name]
    assert_same(one["loss"], two["loss"])
    assert_same(one, two, tolerance=1e-4)
    assert len(set(one["loss"])) == len(one["loss"]) > 1, "a curve that stands still shows nothing"


@pytest.mark.slow
def test_more_ways_to_train(tmp_path):
    for name, (one, two) in in_one_and_two(tmp_path, list(cases.SLOW_CASES)).items():
        assert_same(one, two, tolerance=1e-4, where=name)


def test_a_resumed_run_ends_where_the_unbroken_one_does(results):
    one, two = results["resumed"]
    assert_same(one, two)
    assert_same(results["SASRec"][0], two)


def test_another_number_of_processes_may_continue(results, monkeypatch):
    """A run of two processes, broken off, is continued by one."""
    monkeypatch.chdir(results["folder"])
    record = json.loads(Path("saved/left-2/result.json").read_text())
    assert record["status"] == "failed" and record["processes"] == 2
    whole = cases.train("VBPR", **cases.TASTES)
    assert_same(whole, cases.values(run(resume="saved/left-2")["record"]))


def test_only_one_process_writes(results):
    runs = [json.loads(p.read_text()) for p in (results["folder"] / "saved").glob("*/result.json")]
    per_model = [r for r in runs if r["model"] == "MMGCN"]
    assert sorted(r["processes"] for r in per_model) == [1, 2], "one folder for one process and one for two"
    folder = next(p.parent for p in (results["folder"] / "saved").glob("*/result.json") if json.loads(p.read_text()) in per_model)
    assert {p.name for p in folder.iterdir()} == {
        "best.pt", "last.pt", "given.yaml", "settings.yaml", "run.log", "result.json", "per_user.npz"
    }  # fmt: skip


def test_refusals_reach_all_processes(results):
    messages = results["refused"][1]
    assert "NCLTrainer" in messages["NCL"] and "runs in one process" in messages["NCL"]
    assert "left-2 exists already" in messages["VBPR"], "the first process makes the folder, and all hear why it cannot"


# shares


@pytest.mark.parametrize("rows, blocks, processes", [(7, 1, 2), (8, 3, 3), (3, 2, 4)])
def test_shares_are_a_partition(monkeypatch, rows, blocks, processes):
    whole = torch.arange(rows * blocks)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, processes))
        share = Share.of(rows, blocks)
        if rows < processes:
            assert share is None, "fewer rows than processes: everybody computes them all"
            return
        part = share.take(whole)
        assert len(part) == share.size and len(part) % blocks == 0
        own = part.view(blocks, -1) - rows * torch.arange(blocks)[:, None]
        assert (own == own[0]).all(), "a positive and its negatives stay together"
        parts.append((share.scale, part))
    assert torch.cat([part for _, part in parts]).sort().values.equal(whole)
    values = torch.rand(rows * blocks)
    mean = sum(scale * values[part].mean() for scale, part in parts) / processes
    torch.testing.assert_close(mean, values.mean())


def test_one_process_is_left_alone():
    assert distributed.world() == (0, 1) and distributed.is_main() and Share.of(8) is None
    x = torch.ones(3, requires_grad=True)
    assert distributed.sum_rows(x) is x and distributed.count_rows(x) is x and distributed.gather_rows(x)[0] is x
    with distributed.sharing(None):
        assert distributed.active() is None
    distributed.barrier()
    assert distributed.on_main(lambda: 5) == 5 and distributed.own_part(5) == slice(0, 5)


def test_dropout_of_a_share_is_that_of_the_batch(monkeypatch):
    """The masks of the shares, one below the other, are the mask that one process would have drawn; other tensors are left alone."""
    x = torch.rand(5, 4)
    torch.manual_seed(3)
    want = torch.nn.functional.dropout(x, 0.5)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 2))
        share = Share.of(5)
        torch.manual_seed(3)
        with distributed.sharing(share):
            parts.append(torch.nn.Dropout(0.5)(share.take(x)))
            after = torch.rand(1)
            assert torch.nn.functional.dropout(torch.ones(50), 0.5).mean() > 0
        torch.manual_seed(3)
        torch.nn.functional.dropout(x, 0.5)
        assert torch.equal(after, torch.rand(1)), "the generators stay in step"
    torch.testing.assert_close(torch.cat(parts), want)


def test_attention_of_a_share_is_the_formula(monkeypatch):
    """Written out where dropout needs it: with next to no dropout, the kernel's values; with rows that see nothing, zeros."""
    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    q, k, v = (torch.rand(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask[0, 0, 2] = False
    attention = torch.nn.functional.scaled_dot_product_attention
    for given in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": torch.rand(6, 6), "scale": 0.7}):
        want = attention(q, k, v, **given)
        with distributed.sharing(Share(4, 0, 2)):
            got = attention(q, k, v, dropout_p=1e-7, **given)
        torch.testing.assert_close(got, want)
    got.sum().backward()
    assert torch.isfinite(q.grad).all()


# starting processes


@pytest.mark.parametrize("words", [["--nproc=0"], ["--nproc=two"], ["--nproc", "2", "--nproc=3"], ["--nproc"]])
def test_a_wrong_number_of_processes(words, capsys):
    assert cli.main([*words, "--model=VBPR"]) == 2
    assert "--nproc: expected one whole number of at least 1" in capsys.readouterr().err


def test_nproc_is_taken_out():
    assert launch.take_nproc(["--a=1", "--nproc", "3", "--b"]) == (3, ["--a=1", "--b"])
    assert launch.take_nproc(["--nproc=1"]) == (1, [])


def test_nproc_in_settings_says_what_to_do(tastes):
    with pytest.raises(UserError, match="--nproc=2 of the command line, or torchrun"):
        Config("VBPR", config_dict={**tastes, "nproc": 2})


def test_commands_for_one_process_refuse_several(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["search", "--model=VBPR"]) == 2
    assert "`search` runs in one process; several work together in train, extract, finetune" in capsys.readouterr().err


def test_missing_meeting_place(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        distributed.start(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="must be whole numbers"):
        distributed.planned()


STAND_IN = """
import os, pathlib, signal, sys, time
rank, reports = int(os.environ["RANK"]), pathlib.Path(os.environ["RECBOLE_MM_REPORTS"])
if rank == 0:
    (reports / "run_dir").write_text("saved/mine")
{}
"""


def launched(tmp_path, monkeypatch, code: str) -> int:
    """Launch two stand-ins of the program; they import nothing."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(code))
    monkeypatch.setattr(launch, "_PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(launch, "_GRACE_S", 0.5)
    return launch.launch("train", ["--model=VBPR"], 2)


def test_the_launcher_names_the_worker_that_was_killed(tmp_path, monkeypatch, capfd):
    code = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.3)\nsys.exit(75)"
    assert launched(tmp_path, monkeypatch, code) == 1
    said = capfd.readouterr().err
    assert "Worker 1 of 2" in said and "SIGKILL" in said and "memory" in said and "--resume=saved/mine --nproc=2" in said


def test_the_launcher_stops_who_waits_for_ever(tmp_path, monkeypatch, capfd):
    begin = time.monotonic()
    assert launched(tmp_path, monkeypatch, "if rank == 0: sys.exit(1)\ntime.sleep(600)") == 1
    assert time.monotonic() - begin < 30
    assert "Worker 0 of 2 (counted from 0) failed with exit code 1; its traceback is above" in capfd.readouterr().err


def test_wrong_input_is_told_once(tmp_path, monkeypatch, capfd):
    code = "(reports / f'error-{rank}').write_text('topk: too large.')\nsys.exit(2)"
    assert launched(tmp_path, monkeypatch, code) == 2
    assert capfd.readouterr().err.count("topk: too large.") == 1


def test_the_launcher_ends_well(tmp_path, monkeypatch, capfd):
    assert launched(tmp_path, monkeypatch, "assert sys.argv[1:] == ['train', '--model=VBPR']") == 0
    assert capfd.readouterr().err == ""


def test_workers_do_not_outlive_their_launcher(tmp_path):
    """A launcher that is killed cannot stop them; they notice."""
    child = "import time; from recbole_mm import launch; launch.watch_launcher(); print('there', flush=True); time.sleep(600)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert parent.stdout.readline() == "there\n"
    parent.kill()
    assert parent.stdout.read() == "", "the pipe is closed when the child is gone too"
    parent.wait()


@pytest.mark.slow
def test_a_worker_of_the_real_program_is_killed(tastes):
    """The run ends with a message, an exit code and a checkpoint; `--resume --nproc=2` ends where one process does."""
    settings = {**tastes, "epochs": 40, "stopping_step": 40, "checkpoint_seconds": 0}
    whole = run("VBPR", config_dict=settings)["record"]
    words = [f"--{key}={value}" for key, value in settings.items()]
    program = [sys.executable, str(ROOT / "run_recbole_mm.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*program, "--model=VBPR", *words, "--run_name=broken", "--nproc=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    last = Path("saved/broken/last.pt")
    deadline = time.monotonic() + 300
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "was ended by SIGKILL" in said and "--resume=saved/broken --nproc=2" in said, said[-2000:]
    record = json.loads(Path("saved/broken/result.json").read_text())
    assert record["status"] == "failed" or children[-1] == children[0]
    done = subprocess.run([*program, "--resume=saved/broken", "--nproc=2"], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "40 epochs" in done.stdout
    resumed = json.loads(Path("saved/broken/result.json").read_text())
    assert_same([e["train_loss"] for e in whole["epochs"]], [e["train_loss"] for e in resumed["epochs"]], 1e-4)
    assert_same(whole["test"], resumed["test"], 1e-4)
