"""The report page, its CSV files and the terminal's tables."""

import csv
import html.parser
import io
import math
import re
import shutil
import subprocess

import pytest
from made_up import diverged, record
from rich.console import Console

from benchmarks.compare import compare
from benchmarks.page import Cell, page, table
from benchmarks.records import RecordError, Results
from benchmarks.report import write_report
from benchmarks.study import Chosen
from benchmarks.terminal import show

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tree(html.parser.HTMLParser):
    """Checks that every element is closed in order, and gathers what a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.names, self.tables = [], [], set(), 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in _VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.tables += tag == "table"
        if "id" in given and "svg" not in self.open:
            assert given["id"] not in self.names, given["id"]
            self.names.add(given["id"])

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("href", "src") or (name == "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def study():
    return [
        *(record("mbf", seed, (3, 0.5, 0.05 + seed / 100), metric=(0.1, 0.9, 0.97)) for seed in range(3)),
        *(record("adam", seed, (3, 1.0, 0.2), metric=(0.1, 0.8, 0.95)) for seed in range(3)),
        record(
            "torch.optim:AdamW<b>",
            0,
            (3, 1.0, 0.09),
            metric=(0.1, 0.8, 0.96),
            settings={"lr": 0.1, "betas": (0.9, 0.99)},
        ),
        diverged("sgd"),
        record("mbf", problem="of & somebody", train=(3, 2, 1), note="Generated: no file <found>."),
    ]


def tuning():
    return [record("adam", 100, (3, 0.4 + lr), settings={"lr": lr}) for lr in (0.1, 0.2, 0.3)]


def written(records, folder, tuned=()):
    file = write_report(records, folder, "A <title>", tuned)
    text = file.read_text()
    return text, Tree(text)


def lines(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of a study with tuning, in which both lie in one list: (folder, text, tree)."""
    folder = tmp_path_factory.mktemp("report")
    return folder, *written([*study(), *tuning()], folder, tuning())


def test_the_page_stands_alone_and_is_well_formed(whole):
    tmp_path, text, tree = whole
    assert "A &lt;title&gt;" in text
    assert "AdamW&lt;b&gt;" in text
    outside = [one for one in tree.references if not one.startswith("#")]
    assert all((tmp_path / one).is_file() for one in outside)
    assert {"index.html", *outside} == {file.name for file in tmp_path.iterdir()}
    assert {one[1:] for one in tree.references if one.startswith("#") and not one.startswith("#m")} <= tree.names | set(
        re.findall(r'id="([^"]+)"', text)
    )
    assert not re.search(r"""@import|url\((?!#)|(?:src|href)\s*=\s*["'](?:https?:)?//""", text)
    assert tree.tables == 6


def test_the_top_says_who_was_first_and_what_the_data_are(whole):
    _, text, _ = whole
    top = text[: text.index('<h2 id="digits-cnn">')]
    assert "Small CNN on digits, training loss ≤ 0.1: reached by 2 of 4 methods, first" in top
    assert "Missed by Adam, SGD-m." in top
    assert '<p class="note" role="note">of &amp; somebody: Generated: no file &lt;found&gt;.</p>' in top
    assert "No target" in text


def test_tuning_is_told_apart_from_results(whole):
    folder, text, _ = whole
    assert "3 trials, seeds 100" in text
    (adam,) = (row for row in lines(folder / "summary.csv") if row["method"] == "adam")
    assert (adam["runs"], adam["train_median"]) == ("3", "0.2")
    uses = [row["use"] for row in lines(folder / "runs.csv")]
    assert (uses.count("report"), uses.count("tuning")) == (9, 3)
    assert len(lines(folder / "curves.csv")) == 8 * 3 + 2 + 3 * 2
    assert (folder / "digits-cnn-best-of-k.pdf").is_file()


def test_the_page_shows_what_was_chosen_and_what_was_not(tmp_path):
    chosen = [
        Chosen("digits-cnn", "adam", {"lr": 0.1}, 3, 0, ("lr",)),
        Chosen("digits-cnn", "muon", None, 4, 0, ()),
    ]
    file = write_report([record(settings={"lr": 0.1})], tmp_path, "x", tuning(), chosen)
    text = file.read_text()
    assert "Settings, and how they were chosen" in text
    assert "best of 3 trials; lr at the end of what was tried" in text
    assert "none of 4 trials finished" in text


def test_a_note_on_several_problems_is_told_once(tmp_path):
    records = [record(problem=name, note="Made up.", settings={"lr": 0.1}) for name in ("digits-cnn", "elsewhere")]
    text, _ = written(records, tmp_path)
    assert '<p class="note" role="note">Small CNN on digits, elsewhere: Made up.</p>' in text


def test_tuning_alone_is_reported(tmp_path):
    text, _ = written([], tmp_path, tuning())
    assert "3 trials" in text


def test_csv_keeps_every_number(whole):
    tmp_path, *_ = whole
    mbf = lines(tmp_path / "summary.csv")[0]
    assert (mbf["method"], float(mbf["train_median"]), float(mbf["train_low"])) == ("mbf", 0.060000000000000005, 0.05)
    assert float(mbf["steps_to_target_median"]) == 20
    lost = next(row for row in lines(tmp_path / "summary.csv") if row["method"] == "sgd")
    assert math.isinf(float(lost["train_median"]))
    assert lost["diverged"] == "1"


@pytest.mark.parametrize(
    "records",
    [
        [record()],
        [diverged("adam"), diverged("mbf")],
        [record(metric=(math.nan, 0.5, math.nan))],
        [record(settings={"lr": 0.1}), record(settings={"lr": 0.2})],
        [record("nobody:Knows", problem="unknown")],
        [record(step_seconds=math.nan, environment={}, parts={}, peak=0)],
        [record("mbf", train=(3, 2, 1)), record("mbf", 1, train=(3, 2, 1), settings={})],
    ],
    ids=["single", "diverged", "nan metrics", "settings", "unknown", "nothing measured", "one method"],
)
def test_odd_studies_are_reported(tmp_path, records):
    written(records, tmp_path)
    console = Console(record=True, width=150, file=io.StringIO())
    show(records, console, "[odd]")
    assert "[odd]" in console.export_text()


def test_budgets_are_not_mixed(tmp_path):
    text, _ = written([record(), record(seed=1, budget={"epochs": 9})], tmp_path)
    assert "Small CNN on digits, 5 epochs</h2>" in text
    assert "Small CNN on digits, 9 epochs</h2>" in text
    assert [row["runs"] for row in lines(tmp_path / "summary.csv")] == ["1", "1"]
    console = Console(record=True, width=120, file=io.StringIO())
    show([record(), record(seed=1, budget={"epochs": 9})], console, "x")
    assert "Small CNN on digits, 5 epochs (target" in console.export_text()


def test_nothing_to_report_is_an_error_in_one_line(tmp_path):
    with pytest.raises(RecordError, match=r"holds no finished run to report; run the study first$"):
        write_report([], tmp_path, "x")


def test_the_terminal_shows_medians_intervals_and_divergence():
    console = Console(record=True, width=180, file=io.StringIO())
    show(study(), console, "A study")
    text = console.export_text()
    assert "Small CNN on digits, 5 epochs (target: training loss ≤ 0.1)" in text
    assert "0.06000 (0.05000 to 0.07000)" in text
    assert "1 (1 diverged)" in text
    assert "Note: Generated: no file <found>." in text


def folder_of(records, folder):
    results = Results(folder)
    for one in records:
        results.add(one)
    return folder


def compared(tmp_path, first, second):
    console = Console(record=True, width=150, file=io.StringIO())
    compare(folder_of(first, tmp_path / "old"), folder_of(second, tmp_path / "new"), console)
    return console.export_text()


def test_folders_are_compared_run_by_run(tmp_path):
    first = [record("mbf", seed, (3, 2, 1 + seed)) for seed in range(3)]
    second = [record("mbf", seed, (3, 2, 0.5 + seed / 2), pace=0.3) for seed in range(4)]
    text = compared(tmp_path, first, second)
    (row,) = (line for line in text.splitlines() if "MBF" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["MBF", "3", "0", "× 0.500", "× 0.500", "× 3.000", "× 1.000"]
    assert re.search(r"Only in \S+old: 0 runs; only in \S+new: 1", " ".join(text.split()))


def test_folders_with_nothing_in_common_cannot_be_compared(tmp_path):
    with pytest.raises(RecordError, match="have no run in common: they must agree in problem"):
        compared(tmp_path, [record("mbf")], [record("adam")])


def test_comparison_survives_divergence(tmp_path):
    text = compared(tmp_path, [diverged("mbf"), record("mbf", 1)], [diverged("mbf"), diverged("mbf", 1)])
    assert "× ∞ (1.000 to ∞)" in text


def sortable():
    rows = [("b", 2.0), ("a", math.nan), ("d", math.inf), ("c", -1.5)]
    cells = [[Cell(name, order=name), Cell(str(value), order=value)] for name, value in rows]
    return page("x", "y", table([("Name", "a name"), ("Value", "a value")], cells, "A table"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_headings_sort_in_a_browser(tmp_path):
    probe = """<script>
      const seen = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent).join("");
      const buttons = document.querySelectorAll("th button"), found = [];
      for (const place of [1, 1, 0, 0]) {
        buttons[place].focus();
        document.activeElement.click();
        found.push(seen() + [...document.querySelectorAll("th")].map(one => one.getAttribute("aria-sort")).join());
      }
      document.title = found.join(" ");
    </script></body>"""
    file = tmp_path / "x.html"
    file.write_text(sortable().replace("</body>", probe))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    shown = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=60).stdout
    (title,) = re.findall("<title>(.*)</title>", shown)
    assert title.split() == ["cbda,ascending", "dbca,descending", "abcdascending,", "dcbadescending,"]
