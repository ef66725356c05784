"""Kill -9 at random moments: a study is run in a process that is killed again and again, and compared with one that is not.

    python -m tests.benchmarks.killing FOLDER --kills 20 --steps 400

Nothing is computed before the forks, so that a child finds torch as a fresh process would.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401  so that no child spends its time on it
import torch
from rich.console import Console

from benchmarks import runner
from benchmarks.records import Results
from benchmarks.session import run_study
from benchmarks.study import Budget, Study, Tuning


def study(steps: int) -> Study:
    methods = ("mbf", "kfac", "Other=torch.optim:AdamW")
    tuning = Tuning("grid", 2, (100,))
    return Study("Killed", ("digits-cnn",), methods, (0,), Budget(steps=steps), tuning=tuning, threads=1)


def child(folder: Path, steps: int) -> None:
    """Run the study, and nothing of this process's own."""
    status = 1
    try:
        with open(os.devnull, "w") as nowhere:
            run_study(study(steps), folder, None, Console(file=nowhere))
        status = 0
    finally:
        os._exit(status)


def launch(folder: Path, steps: int) -> int:
    pid = os.fork()
    if pid == 0:
        child(folder, steps)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runner.CHECKPOINT_SECONDS = 0.05
    began = time.monotonic()
    assert os.waitpid(launch(options.folder / "whole", options.steps), 0)[1] == 0
    whole = time.monotonic() - began
    generator, kills, torn = random.Random(0), 0, 0
    while kills < options.kills:
        pid = launch(options.folder / "killed", options.steps)
        time.sleep(whole * generator.uniform(0.02, 1.2) / (1 + options.kills / 5))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break  # it was done before
        kills += 1
        torn += bool(list((options.folder / "killed").rglob("*.partial")))
    assert os.waitpid(launch(options.folder / "killed", options.steps), 0)[1] == 0
    one, other = (
        {record.spec.key: record.reproducible() for record in Results(options.folder / name).records()}
        for name in ("whole", "killed")
    )
    verdict = "equal" if one == other else "different"
    sys.stdout.write(f"{kills} kills, {torn} with a half-written checkpoint left: {len(other)} records, {verdict}\n")
    return 0 if verdict == "equal" else 1


if __name__ == "__main__":
    sys.exit(main())
