"""The study behind a sweep: how workers share it, and survive one another's end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from optuna.trial import TrialState

from context_pythia.sweep import study as study_module
from context_pythia.sweep.study import JOURNAL, Queue, open_storage

WORKER = """
import os, random, sys, time
from pathlib import Path
sys.argv[0] = "context-pythia"  # without torch, which would take a second to load
from context_pythia.sweep.study import Queue, open_storage, require_optuna
require_optuna()
folder = Path(%r)
queue = Queue(open_storage(None, folder), "study", folder)
with queue.exclusive:
    held = {trial.user_attrs["identity"] for trial in queue.trials()}
    for i in range(12):
        if str(i) not in held:
            queue.add(str(i), 0, {}, {})
while queue.unfinished():
    claim = queue.take()
    if claim is None:
        time.sleep(0.01)
        continue
    with claim:
        time.sleep(random.uniform(0, 0.08))
        with open(folder / "ended", "a") as file:
            claim.end([1.0, 2.0], {}) and file.write(f"{claim.trial.number}\\n")
"""


def test_every_trial_ends_exactly_once_though_workers_are_killed(tmp_path):
    dice = random.Random(0)

    def start():
        return subprocess.Popen([sys.executable, "-c", WORKER % str(tmp_path)], stderr=subprocess.PIPE, text=True)

    workers = [start(), start()]
    deadline = time.monotonic() + 60
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for kill in range(4):
        time.sleep(dice.uniform(0, 0.15))
        os.kill(workers[kill % 2].pid, signal.SIGKILL)
        workers[kill % 2].communicate()
        workers[kill % 2] = start()
    for process in workers:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    entries = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    created = [entry for entry in entries if entry["op_code"] == 4]
    ends = Counter(entry["trial_id"] for entry in entries if entry["op_code"] == 6 and entry["state"] in (1, 2, 3))
    assert len(created) == 12
    assert ends == dict.fromkeys(range(12), 1)
    storage = open_storage(None, tmp_path)
    trials = Queue(storage, "study", tmp_path).study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12


def waiting_queue(folder, storage=None, names=("a", "b"), limit=None) -> Queue:
    folder.mkdir(exist_ok=True)
    queue = Queue(storage or open_storage(None, folder), "study", folder, limit)
    for name in names:
        queue.add(name, 0, {}, {})
    return queue


def test_a_line_that_was_cut_off_is_dropped_and_nothing_else(tmp_path):
    queue = waiting_queue(tmp_path)
    whole = (tmp_path / JOURNAL).read_bytes()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"' + b"x" * 9000)
    assert len(Queue(open_storage(None, tmp_path), "study", tmp_path).trials()) == 2
    queue.add("c", 0, {}, {})
    content = (tmp_path / JOURNAL).read_bytes()
    assert content.startswith(whole) and b"xxx" not in content
    assert len(Queue(open_storage(None, tmp_path), "study", tmp_path).trials()) == 3


def test_an_interrupted_trial_waits_again(tmp_path):
    queue = waiting_queue(tmp_path, names=("a",))
    with pytest.raises(KeyboardInterrupt), queue.take():
        assert queue.study.trials[0].state == TrialState.RUNNING
        assert queue.take() is None
        raise KeyboardInterrupt
    assert queue.study.trials[0].state == TrialState.WAITING
    with queue.take() as claim:
        assert claim.end([1.0, 2.0], {})
    assert queue.take() is None and not queue.unfinished()


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"])
def test_workers_that_share_no_folder_are_judged_by_their_signs_of_life(tmp_path, monkeypatch, url):
    """Two machines: one storage, a folder each; the trial of a dead one is taken after the grace, not before."""
    monkeypatch.setattr(study_module, "GRACE", 0.2)
    monkeypatch.setattr(study_module, "BEAT", 0.05)
    url = url and url.format(tmp_path)
    here = waiting_queue(tmp_path / "here", open_storage(url, tmp_path), names=("a",))
    there = waiting_queue(tmp_path / "there", open_storage(url, tmp_path), names=())
    with here.take() as alive:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert there.take() is None
            time.sleep(0.02)
        alive._stop.set()  # as if the machine were gone
        until = time.monotonic() + 5
        while (taken := there.take()) is None and time.monotonic() < until:
            time.sleep(0.02)
        with taken:
            assert taken.end([1.0, 2.0], {})
        # It was not dead after all: the first end stands.
        assert not alive.end([3.0, 4.0], {})
    assert [trial.values for trial in here.study.trials] == [[1.0, 2.0]]


def test_what_two_machines_added_at_one_moment_is_run_once(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    queue = waiting_queue(tmp_path / "here", open_storage(url, tmp_path), names=("a", "b", "a", "c"), limit=2)
    ended = []
    while claim := queue.take():
        with claim:
            claim.end([1.0, 2.0], {})
        ended.append(claim.trial.user_attrs["identity"])
    assert ended == ["a", "b"] and not queue.unfinished() and len(queue.trials()) == 2
    assert [trial.state.name for trial in queue.study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]


def test_machines_that_open_a_new_database_at_one_moment_share_it(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    with ThreadPoolExecutor() as pool:
        storages = list(pool.map(lambda _: open_storage(url, tmp_path), range(4)))
    waiting_queue(tmp_path / "here", storages[0])
    assert len(waiting_queue(tmp_path / "there", storages[3], names=()).trials()) == 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host", "--storage redis: Optuna unpickles what it finds there"),
        ("nonsense", "--storage nonsense: cannot be opened"),
        ("bad://me:secret@host/db", r"--storage bad://me:\*\*\*@host/db: cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(tmp_path, url, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)


def test_what_was_too_much_for_a_smaller_limit_is_added_anew_for_a_larger_one(tmp_path):
    queue = waiting_queue(tmp_path, names=("a", "b"), limit=1)
    while claim := queue.take():
        with claim:
            claim.end([1.0, 2.0], {})
    larger = Queue(open_storage(None, tmp_path), "study", tmp_path, limit=2)
    assert [trial.user_attrs["identity"] for trial in larger.trials()] == ["a"] and larger.take() is None
    larger.add("b", 0, {}, {})
    with larger.take() as claim:
        assert claim.end([3.0, 4.0], {})
    assert [(trial.user_attrs["identity"], trial.values[0]) for trial in larger.trials()] == [("a", 1.0), ("b", 3.0)]
    assert not larger.unfinished()
