"""A few of the catalogue through the real program: exit code, stderr and what is left, as a shell sees them."""

import os
import resource
import subprocess
import sys
import time

import pytest

from tests.robustness.test_catalogue import CATALOGUE, bpr
from tests.robustness.test_catalogue import world as world  # the fixture
from tests.robustness.world import check_refusal, check_whole
from tests.support import ROOT

PROGRAM = [sys.executable, str(ROOT / "run_recbole_mm.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "name", ["a foreign pickle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("YAML with code", "NaN in a feature"))]
)
def test_bad_input(name, world):
    case = next(case for case in CATALOGUE if case.name == name)
    case.prepare(world)
    done = subprocess.run([*PROGRAM, *case.words], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    check_refusal(done.returncode, done.stderr, case.says)
    assert not (world.root / "owned").exists()


def test_full_disk(world):
    """RLIMIT_FSIZE stands in for a full disk: the first file that grows beyond it cannot be written."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    words = bpr("--embedding_size=64", "--state=error")
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=200, preexec_fn=limit)
    check_refusal(done.returncode, done.stderr, "cannot be written|File too large")
    check_whole(world.root, set())


@pytest.mark.slow
def test_two_runs_in_one_second_and_one_folder(world):
    """Both programs wait for the same moment; each has a directory of its own and the same numbers."""
    words = [word for word in bpr() if not word.startswith("--run_name")]
    code = f"import time, sys; from recbole_mm import cli; import recbole_mm.quick_start; time.sleep(max(0, {time.time() + 25} - time.time())); sys.exit(cli.main({words}))"
    code = code.replace("import time, sys;", "import time, sys; sys.path.insert(0, sys.argv[1]);")
    both = [subprocess.Popen([sys.executable, "-c", code, str(ROOT)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    folders = {text.strip().rsplit(" ", 1)[-1] for text in outputs}
    tables = {text.partition("epochs,")[0].rpartition("metric")[2].rpartition("\n\n")[0] for text in outputs}
    assert len(folders) == 2 and len(tables) == 1
    check_whole(world.root, set())
