"""The page of results says what its tables hold."""

import csv
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "results.md").read_text()
# An estimate with its interval, such as "97.7 [94.2, 99.3]" or "x at least 1.63 [1.30, -]".
NUMBER = r"[-+]?\d+(?:\.\d+)?"
END = rf"(?:[a-z]+ )*{NUMBER}|-"
INTERVAL = re.compile(
    rf"(?P<estimate>(?:at least |at most |below )?{NUMBER})(?: %| points)?\s\[(?P<low>{END}),\s(?P<high>{END})\]"
)
TRIPLES = {
    "curve": [("ratio", "ci_low", "ci_high", 100), ("emm", "emm_low", "emm_high", 1)],
    "effects": [
        ("difference", "low", "high", 100),
        ("emm_ratio", "emm_ratio_low", "emm_ratio_high", 1),
    ],
}


def bounded(least: str, most: str) -> str:
    """The factor on EMM, known or bounded from one side."""
    return least if least == most else f"at least {least}" if most == "inf" else f"at most {most}"


def tables_of(text: str) -> list[Path]:
    """The tables that a part of the page names: itself, by its figure (results-NAME.png), or beside it (-effects)."""
    names = set(re.findall(r"[\w-]+", text))
    names |= {name.removeprefix("results-") for name in names}
    found = [path for path in sorted((DOCS / "results").glob("*.csv")) if path.stem.removesuffix("-effects") in names]
    return found + [path for path in sorted((DOCS / "results").glob("*-effects.csv")) if path.stem in names]


def sections() -> dict[str, str]:
    """Title and text of the page's parts; the overview, before the first title, is ""."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def tabulated(paths: list[Path]) -> set[tuple[str, str, str]]:
    """Cells (estimate, low, high) of some tables, ratios in percent."""
    found = set()
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if "emm_ratio_least" in row:
                    row["emm_ratio"] = bounded(row["emm_ratio_least"], row["emm_ratio_most"])
                for *names, scale in TRIPLES["effects" if "difference" in row else "curve"]:
                    if all(name in row for name in names):
                        cells = [row[name] for name in names]
                        found.add(tuple(str(scale * float(c)) if re.fullmatch(r"[-+.\de]+", c) else c for c in cells))
    return found


def agrees(shown: str, cell: str) -> bool:
    """Whether the page shows a cell, rounded as the page rounds; "-" is for what the table does not know."""
    if shown == "-":
        return cell in ("", "inf") or cell.startswith("at least")
    words, number = re.fullmatch(rf"(\D*?)({NUMBER})", shown).groups()
    match = re.fullmatch(rf"(\D*?)({NUMBER}(?:e-?\d+)?)", cell)
    decimals = len(number.partition(".")[2])
    return bool(match) and match[1] == words and abs(float(number) - float(match[2])) <= 0.501 * 10**-decimals


def test_the_page_has_intervals():
    assert len(INTERVAL.findall(PAGE)) > 150


@pytest.mark.parametrize("title", sections())
def test_every_interval_stands_in_a_table(title):
    text = sections()[title]
    tables = tabulated(tables_of(text) if title else sorted((DOCS / "results").glob("*.csv")))
    missing = []
    for found in INTERVAL.finditer(text):
        estimate, low, high = found.group("estimate", "low", "high")
        if not any(agrees(estimate, e) and agrees(low, lo) and agrees(high, hi) for e, lo, hi in tables):
            missing.append(found.group())
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    "shown, cell, right",
    [
        ("97.7", "97.65", True),
        ("97.7", "97.78", False),
        ("-2.7", "2.7", False),
        ("below 20", "below 20.0", True),
        ("below 20", "20.0", False),
        ("-", "", True),
        ("-", "3.1", False),
    ],
)
def test_a_wrong_digit_is_seen(shown, cell, right):
    assert agrees(shown, cell) is right


def test_tables_are_the_ratios_of_their_runs():
    """Each line and size of which results/runs.csv has the runs has their mean ratio, and no other number of runs."""
    counts: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    with open(DOCS / "results/runs.csv", newline="") as file:
        for row in csv.DictReader(file):
            line = row["folder"], row["run"].rpartition("/")[0], row["size"]
            counts.setdefault(line, []).append((int(row["num_memorized"]), int(row["num_samples"])))
    assert len(counts) > 80
    for (table, line, size), runs in counts.items():
        memorized, samples = map(sum, zip(*runs, strict=True))
        with open(DOCS / f"results/{table}.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["size"] == size]
        found = [float(row["ratio"]) for row in rows if row["runs"] == str(len(runs))]
        assert any(abs(ratio - memorized / samples) < 1e-9 for ratio in found), f"{table}: {line}, |D| = {size}"


def test_every_table_is_on_the_page():
    mentioned = PAGE + (DOCS / "outliers.md").read_text() + (DOCS / "time-scales.md").read_text()
    mentioned += (DOCS / "agreement.md").read_text()
    names = {path.name.removesuffix("-effects.csv").removesuffix(".csv") for path in (DOCS / "results").glob("*.csv")}
    assert {name for name in names if name not in mentioned} == set()
