"""A sweep of twelve trainings by two workers, one of which is killed with SIGKILL twenty times at random moments.

    python results/sweep/kill.py FOLDER

Writes the sweep into FOLDER/study, what the workers said and killed.json (when each kill came, and how the trials
ended) into FOLDER; fails unless each setting was trained once to its end and the report has all of them.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna

KILLS, TRIALS = 20, 12
SWEEP = [
    sys.executable, "-m", "context_pythia", "sweep", "quick", "--models", "Pythia,layer",
    "--over", "learning_rate=1e-3,2e-3", "--seeds", "0,1,2", "--samples", "240", "--epochs", "2",
    "--set", "train.checkpoint_steps=2", "--quiet",
]  # fmt: skip


def start(folder: Path) -> subprocess.Popen:
    with (folder / "workers.log").open("a") as log:
        return subprocess.Popen([*SWEEP, "--out", str(folder / "study")], stdout=log, stderr=subprocess.PIPE, text=True)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    study, dice, kills = folder / "study", random.Random(0), []
    workers, began = [start(folder), start(folder)], time.monotonic()
    while len(kills) < KILLS:
        time.sleep(dice.uniform(1, 12))
        victim = len(kills) % 2
        running = workers[victim].poll() is None
        workers[victim].kill()
        workers[victim].communicate()
        kills.append({"seconds": round(time.monotonic() - began, 1), "worker": victim, "was_running": running})
        workers[victim] = start(folder)
    codes = [(worker.communicate()[1], worker.returncode) for worker in workers]
    said = (folder / "workers.log").read_text()
    ends = Counter(re.findall(r"^(\S+_seed=\d): perplexity", said, re.MULTILINE))
    epochs = [
        [entry["epoch"] for entry in json.loads(path.read_text())["models"][0]["history"]]
        for path in study.glob("trials/*/metrics.json")
    ]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{study}/study.db").trials
    report = (study / "report.md").read_text() if (study / "report.md").exists() else ""
    figures = {
        "commit": json.loads((study / "provenance.json").read_text())["commit"],
        "kills": kills,
        "while_running": sum(kill["was_running"] for kill in kills),
        "seconds": round(time.monotonic() - began, 1),
        "trials": dict(Counter(trial.state.name for trial in trials)),
        "run_folders": len(epochs),
        "trained_to_the_end": sorted(ends.values()),
        "report_counts": next((line for line in report.splitlines() if line.startswith("> ")), None),
        "last_workers": [{"returncode": code, "stderr": error} for error, code in codes],
    }
    (folder / "killed.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "kills"}, indent=1))
    # A worker that is killed between a training's record and this line does not say so.
    assert epochs == [[1, 2]] * TRIALS and set(ends.values()) == {1} and len(ends) <= TRIALS
    assert all(code == 0 for _, code in codes) and f"{TRIALS} with a result, 0 failed" in report


if __name__ == "__main__":
    main()
