"""A study of twelve trials by two workers, one of which is killed with SIGKILL twenty times at random moments.

    python results/sweep/kill.py FOLDER

Writes the study into FOLDER/study and killed.json (when each kill came, and how each trial ended) into FOLDER; fails
unless every trial ended exactly once and the report has all of them.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

KILLS, TRIALS = 20, 12
COMPLETE, FAILED = 1, 3  # Optuna's states of a trial
SWEEP = [
    sys.executable, "-m", "context_pythia", "sweep", "quick", "--models", "Pythia,layer",
    "--over", "learning_rate=1e-3,2e-3", "--seeds", "0,1,2", "--samples", "240", "--epochs", "2",
    "--set", "train.checkpoint_steps=2", "--quiet",
]  # fmt: skip


def start(study: Path) -> subprocess.Popen:
    return subprocess.Popen([*SWEEP, "--out", str(study)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    study, dice, kills = folder / "study", random.Random(0), []
    workers, began = [start(study), start(study)], time.monotonic()
    while len(kills) < KILLS:
        time.sleep(dice.uniform(1, 12))
        victim = len(kills) % 2
        running = workers[victim].poll() is None
        workers[victim].kill()
        workers[victim].communicate()
        kills.append({"seconds": round(time.monotonic() - began, 1), "worker": victim, "was_running": running})
        workers[victim] = start(study)
    ends = [(worker.communicate()[1], worker.returncode) for worker in workers]
    entries = [json.loads(line) for line in (study / "journal.log").read_text().splitlines()]
    ended = Counter(e["trial_id"] for e in entries if e["op_code"] == 6 and COMPLETE <= e["state"] <= FAILED)
    complete = Counter(e["trial_id"] for e in entries if e["op_code"] == 6 and e["state"] == COMPLETE)
    runs = [json.loads(path.read_text())["models"][0] for path in study.glob("trials/*/metrics.json")]
    report = (study / "report.md").read_text() if (study / "report.md").exists() else ""
    figures = {
        "commit": json.loads((study / "provenance.json").read_text())["commit"],
        "kills": kills,
        "while_running": sum(kill["was_running"] for kill in kills),
        "seconds": round(time.monotonic() - began, 1),
        "trials_ended": sorted(ended.values()),
        "trials_complete": len(complete),
        "run_folders": len(runs),
        "report_counts": next((line for line in report.splitlines() if line.startswith("> ")), None),
        "last_workers": [{"returncode": code, "stderr": error} for error, code in ends],
    }
    (folder / "killed.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "kills"}, indent=1))
    assert ended == complete == dict.fromkeys(range(TRIALS), 1) and len(runs) == TRIALS
    assert all(code == 0 for _, code in ends) and f"{TRIALS} with a result, 0 failed" in report


if __name__ == "__main__":
    main()
