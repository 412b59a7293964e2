"""A handful of benchmarks/kills.py: killed at a random moment, resumed, equal to the unbroken job to the last bit."""

import random

import pytest

from benchmarks import kills


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    kills.load_libraries()
    folder = tmp_path_factory.mktemp("kills") / "source"
    kills.prepare(folder, reviews=8_000)
    return folder


def check(source, tmp_path, kind: str, times: int) -> None:
    mine = [job for job in kills.jobs() if job.kind == kind]
    for number in range(times):
        job = mine[number % len(mine)]
        if not job.unbroken:
            kills.unbroken(source, tmp_path, job)
            assert job.unbroken
        row = kills.kill_once(source, tmp_path, job, random.Random(f"{kind}/{number}"))
        assert row["kills"] >= 1 and row["equal"] and not row["left"], {key: value for key, value in row.items() if key != "log"}


@pytest.mark.parametrize("kind", ["training", "conversion"])
def test_one_kill(source, tmp_path, kind):
    check(source, tmp_path, kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "extraction", "fine-tuning", "search", "conversion"])
def test_kills(source, tmp_path, kind):
    check(source, tmp_path, kind, 3)


def test_the_table_counts_what_is_not_equal():
    """A table that says yes to everything would prove nothing."""
    row = {"number": 1, "kind": "search", "job": "x", "after_s": 1, "of_s": 2, "there": "nothing", "kills": 1, "exit": 0}
    text = kills.table([{**row, "equal": True}, {**row, "number": 2, "equal": False, "differs": ["test"]}], 2, 0)
    assert "1 resumed" in text and "1 did not" in text and "NO (exit 0) test" in text


def test_a_difference_is_seen(source, tmp_path):
    """A resumed job that ends with other numbers is not called equal."""
    job = next(job for job in kills.jobs() if job.kind == "conversion")
    kills.unbroken(source, tmp_path, job)
    job.unbroken = {**job.unbroken, "new.inter": "0"}
    row = kills.kill_once(source, tmp_path, job, random.Random(3))
    assert not row["equal"] and row["differs"] == ["new.inter"]
