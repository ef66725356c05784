"""Other projects' tests of optimizers, run against every method: ``python tests/suites/run.py FOLDER``.

FOLDER holds what is there of ``pytorch`` (its ``test/test_optim.py``), ``timm`` (``tests``), ``accelerate`` (``tests``) and
``lightning`` (``src`` and ``tests``), each as its project has it; suites whose files are absent are left out, saying so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from curvlib.optimizers.catalogue import methods  # noqa: E402


@dataclass(frozen=True)
class Suite:
    """Somebody's tests, and how they meet the subject.

    Args:
        name: the project.
        folder: where they are run, below the given one.
        files: of them.
        plugin: of this folder.
        chosen: the expression that picks tests.
        paths: what else is importable, below the project's folder.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    plugin: str
    chosen: str = ""
    paths: tuple[str, ...] = ()


SUITES = (
    Suite("pytorch", "pytorch/test", ("test_optim.py",), "subject_torch", "TestOptimRenewed", ("test",)),
    Suite("timm", "timm", ("tests/test_optim.py",), "subject_timm", "test_optim_factory and subject"),
    Suite(
        "accelerate",
        "accelerate",
        tuple(f"tests/test_{name}.py" for name in ("optimizer", "scheduler", "state_checkpointing", "accelerator")),
        "subject_swapped",
    ),
    Suite(
        "lightning",
        "lightning/tests/tests_pytorch",
        ("core/test_lightning_optimizer.py", "trainer/optimization/test_optimizers.py"),
        "subject_swapped",
        paths=("src", "tests"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one suite with one method.

    Attributes:
        passed, skipped, failed: how many tests; an error counts as a failure.
        names: of the failed ones.
    """

    passed: int
    skipped: int
    failed: int
    names: tuple[str, ...]


def run(suite: Suite, method: str, folder: Path, plugins: Sequence[str]) -> Outcome:
    """One suite with one method; where a test fails, twice, since one of them looks at the free memory of the machine."""
    first = run_once(suite, method, folder, plugins)
    if not first.failed:
        return first
    second = run_once(suite, method, folder, plugins)
    names = tuple(name for name in first.names if name in second.names)
    return Outcome(first.passed + first.failed - len(names), first.skipped, len(names), names)


def run_once(suite: Suite, method: str, folder: Path, plugins: Sequence[str]) -> Outcome:
    """One suite with one method, in a process of its own."""
    paths = [ROOT, HERE, *(folder / suite.name / path for path in suite.paths)]
    environment = {
        **os.environ,
        "CURVLIB_SUBJECT": method,
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, f"--junit-xml={report}"]
        command += [word for plugin in [*plugins, suite.plugin] for word in ("-p", plugin)]
        command += ["-k", suite.chosen] if suite.chosen else []
        done = subprocess.run(
            [*command, *suite.files], cwd=folder / suite.folder, env=environment, capture_output=True, text=True
        )
        if not report.is_file():
            raise SystemExit(f"{suite.name} with {method} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case.get("name", "?") for case in cases if any(part.tag in ("failure", "error") for part in case)]
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return Outcome(len(cases) - len(bad) - skipped, skipped, len(bad), tuple(bad))


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """A row for every method: passed, and failed if any; tests that a suite skips are the same for all."""
    suites = sorted({name for row in found.values() for name in row})
    lines = ["| method | " + " | ".join(suites) + " |", "|---|" + "---|" * len(suites)]
    for method, row in found.items():
        cells = [
            f"{one.passed}" + (f", {one.failed} failed" if one.failed else "") for one in map(row.get, suites) if one
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what is there; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="further pytest plugins")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for suites.json and README.md")
    options = parser.parse_args(None if arguments is None else list(arguments))
    names = options.methods or [kind.__name__ for kind in methods().values()]
    folder = options.folder.resolve()
    there = [suite for suite in SUITES if all((folder / suite.folder / file).is_file() for file in suite.files)]
    for suite in SUITES:
        if suite not in there:
            sys.stdout.write(f"{suite.name}: left out, {folder / suite.folder} has not {', '.join(suite.files)}\n")
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        jobs = {
            (name, suite.name): pool.submit(run, suite, name, folder, options.plugins)
            for name in names
            for suite in there
        }
        found: dict[str, dict[str, Outcome]] = {name: {} for name in names}
        for (name, suite), job in jobs.items():
            found[name][suite] = job.result()
            sys.stdout.write(f"{name:18} {suite:10} {found[name][suite]}\n")
    if not there:
        sys.stdout.write(f"nothing was run, and nothing is written: {folder} has no suite\n")
        return 2
    if options.out:
        write(options.out, found)
    return int(any(one.failed for row in found.values() for one in row.values()))


_REMARKS = """These suites hand over parameters, not models: methods that hear layers use gradients here, and NGD, FOOF,
TKFAC, Eva, SINGD and KBFGS follow their momentum. TNT and SophiaG have `labels="data"`; a decay that is a method's default is
zero. Methods that differentiate the loss once more (AdaHessian, SophiaH and the layerwise ones) run with
`backward(create_graph=True)`; of PyTorch's suite four tests that set gradients by hand, which have no graph, are
expected failures for them and count as skipped."""


def write(out: Path, found: dict[str, dict[str, Outcome]]) -> None:
    """Put the counts with versions into a folder; those of other methods and suites stay."""
    file = out / "suites.json"
    known = json.loads(file.read_text())["methods"] if file.is_file() else {}
    for name, row in known.items():
        old = {suite: Outcome(**{**one, "names": tuple(one["names"])}) for suite, one in row.items()}
        found[name] = {**old, **found.get(name, {})}
    packages = {name: metadata.version(name) for name in ("torch", "timm", "accelerate", "lightning") if _has(name)}
    content = {
        "python": platform.python_version(),
        "packages": packages,
        "methods": {name: {suite: asdict(one) for suite, one in row.items()} for name, row in found.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "suites.json").write_text(json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    (out / "README.md").write_text(
        "# Other projects' tests\n\nTests passed with each method in the place of the project's own optimizer, by "
        f"`make suites`; {versions}. A test counts as failed where it failed twice.\n\n{table(found)}\n\n{_REMARKS}\n"
    )


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
