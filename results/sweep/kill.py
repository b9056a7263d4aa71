"""A sweep of twelve trainings by two workers, one of which is killed with SIGKILL twenty times while it trains.

    python results/sweep/kill.py FOLDER

Writes the sweep into FOLDER/study, what each worker said and killed.json (when each kill came, and how the trials
ended) into FOLDER. A kill comes at a random moment after the worker has begun a training. Fails unless each setting was
trained once to its end and the report has all of them.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

KILLS, TRIALS = 20, 12
SWEEP = [
    sys.executable, "-m", "context_pythia", "sweep", "quick", "--models", "Pythia,layer",
    "--over", "learning_rate=1e-3,2e-3", "--seeds", "0,1,2", "--samples", "240", "--epochs", "2",
    "--set", "train.checkpoint_steps=2", "--quiet",
]  # fmt: skip


def start(folder: Path, number: int) -> tuple[subprocess.Popen, Path]:
    log = folder / f"worker-{number}.log"
    with log.open("w") as file:
        command = [*SWEEP, "--out", str(folder / "study")]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True), log


def wait_until_it_trains(worker: subprocess.Popen, log: Path) -> None:
    while worker.poll() is None and not re.search(r"_seed=\d$", log.read_text(), re.MULTILINE):
        time.sleep(0.1)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    study, dice, kills = folder / "study", random.Random(0), []
    workers, began = [start(folder, 0), start(folder, 1)], time.monotonic()
    while len(kills) < KILLS:
        victim, (worker, log) = len(kills) % 2, workers[len(kills) % 2]
        wait_until_it_trains(worker, log)
        time.sleep(dice.uniform(0, 8))
        running = worker.poll() is None
        worker.kill()
        worker.communicate()
        kills.append({"seconds": round(time.monotonic() - began, 1), "worker": victim, "was_running": running})
        workers[victim] = start(folder, len(kills) + 1)
    codes = [(worker.communicate()[1], worker.returncode) for worker, _ in workers]
    said = "\n".join(path.read_text() for path in folder.glob("worker-*.log"))
    ends = Counter(re.findall(r"^(\S+_seed=\d): perplexity", said, re.MULTILINE))
    epochs = [
        [entry["epoch"] for entry in json.loads(path.read_text())["models"][0]["history"]]
        for path in study.glob("trials/*/metrics.json")
    ]
    trials = json.loads((study / "metrics.json").read_text())["trials"]
    report = (study / "report.md").read_text() if (study / "report.md").exists() else ""
    figures = {
        "commit": json.loads((study / "provenance.json").read_text())["commit"],
        "kills": kills,
        "while_running": sum(kill["was_running"] for kill in kills),
        "seconds": round(time.monotonic() - began, 1),
        "trials": dict(Counter(trial["state"] for trial in trials)),
        "run_folders": len(epochs),
        "trained_to_the_end": sorted(ends.values()),
        "report_counts": next((line for line in report.splitlines() if line.startswith("> ")), None),
        "last_workers": [{"returncode": code, "stderr": error if code else ""} for error, code in codes],
    }
    (folder / "killed.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "kills"}, indent=1))
    # A worker that is killed between a training's record and this line does not say so.
    assert epochs == [[1, 2]] * TRIALS and set(ends.values()) == {1} and len(ends) <= TRIALS
    assert all(code == 0 for _, code in codes) and f"{TRIALS} with a result, 0 failed" in report


if __name__ == "__main__":
    main()
