"""Kill -9 at random moments, and two processes at once: studies must end with the records of one that was left alone.

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
import torch._dynamo  # which optimizers import
from rich.console import Console

from benchmarks import runner, session
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
    session.report = lambda *_: None  # figures take longer than the runs
    runner.CHECKPOINT_SECONDS = 0.05
    began = time.monotonic()
    assert os.waitpid(launch(options.folder / "whole", options.steps), 0)[1] == 0
    whole = time.monotonic() - began
    expected = numbers(options.folder / "whole")
    generator, kills, rounds, equal = random.Random(0), 0, 0, True
    while kills < options.kills:
        folder, rounds, status = options.folder / f"killed-{rounds}", rounds + 1, -1
        while kills < options.kills and status != 0:
            pid = launch(folder, options.steps)
            time.sleep(whole * generator.uniform(0.02, 0.4))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            kills += os.WIFSIGNALED(status)
        assert os.waitpid(launch(folder, options.steps), 0)[1] == 0
        equal = equal and numbers(folder) == expected
    together = [launch(options.folder / "together", options.steps) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in together] == [0, 0]
    lines = len(Results(options.folder / "together").file.read_bytes().splitlines())
    equal = equal and numbers(options.folder / "together") == expected and lines == len(expected)
    verdict = "equal" if equal else "different"
    sys.stdout.write(
        f"{kills} kills in {rounds} studies, and two processes at once: {len(expected)} records, {verdict}\n"
    )
    return 0 if equal else 1


def numbers(folder: Path) -> dict[str, object]:
    """What must not depend on kills."""
    return {record.spec.key: record.reproducible() for record in Results(folder).records()}


if __name__ == "__main__":
    sys.exit(main())
