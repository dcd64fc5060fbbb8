"""benchmarks/bench_gpu.py, which has to run where someone has little more than torch and a GPU."""

import json
import subprocess
import sys

import click
import pytest
from conftest import ROOT

from benchmarks import bench_gpu


def test_every_row_runs_and_is_exact(tmp_path, run_cli):
    out = run_cli(bench_gpu.main, [f"--out={tmp_path}", "--device=cpu", "--tiny"]).output
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    written = (tmp_path / "bench_gpu.txt").read_text().splitlines()
    assert out.splitlines() == written[: len(out.splitlines())] and written[-1].startswith("exact, sample: ")
    kinds = [row["row"] for row in found["rows"]]
    assert kinds == ["optimum"] * 2 + ["neighbours"] * 3 + ["train"] * 2 + ["sample"] * 2
    assert found["limits"]["fp32"] > 0 and found["limits"]["copy"] > 0
    for row in found["rows"]:
        assert row["plain"] > 0 and row["ours"] > 0 and row["limit"] > 0 and row["setting"] in out
        speed = row["plain"] / row["ours"] if row["unit"] == "s" else row["ours"] / row["plain"]
        assert row["ratio"] == pytest.approx(speed)
        fp32 = "bf16" not in row["setting"]
        most = dict(optimum=1e-4, neighbours=1e-12, train=1e-5 if fp32 else 0.05, sample=0.01 if fp32 else 5)
        assert row["exact"] <= most[row["row"]], row
        assert row.get("wrong", 0) == 0


def test_rows_are_written_as_soon_as_they_are_measured(tmp_path, monkeypatch):
    """A row that fails is named, and the run goes on; an interrupted one leaves what it has."""

    def rows(sizes, device, limits):
        yield from list(optimum(sizes, device, limits))[:1]
        yield lambda: int("no")

        def interrupted():
            seen.append(json.loads((tmp_path / "bench_gpu.json").read_text())["rows"])
            raise KeyboardInterrupt

        yield interrupted

    optimum, seen = bench_gpu.optimum_rows, []
    monkeypatch.setattr(bench_gpu, "optimum_rows", rows)
    with pytest.raises((click.Abort, KeyboardInterrupt)):
        bench_gpu.main.main([f"--out={tmp_path}", "--device=cpu", "--tiny", "--rows=optimum"], standalone_mode=False)
    assert seen[0] == json.loads((tmp_path / "bench_gpu.json").read_text())["rows"]
    assert seen[0][0]["exact"] < 1e-4 and seen[0][1]["error"].startswith("failed: invalid literal")


def test_unknown_rows_and_no_time(tmp_path, run_cli):
    out = run_cli(bench_gpu.main, [f"--out={tmp_path}", "--rows=optimum,toast"], code=2).output
    assert "--rows=optimum,toast names other rows than optimum, neighbours, train, sample" in out
    run_cli(bench_gpu.main, [f"--out={tmp_path}", "--device=cpu", "--tiny", "--minutes=0"])
    rows = json.loads((tmp_path / "bench_gpu.json").read_text())["rows"]
    assert len(rows) == 9 and all("0 minutes were over" in row["error"] for row in rows)


@pytest.mark.slow
def test_it_needs_neither_lmdb_nor_submitit(tmp_path):
    """From any folder, without an installation."""
    script = f"""if True:
        import runpy, sys
        sys.modules["lmdb"] = sys.modules["submitit"] = None  # importing them is an error
        sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
        sys.argv[1:] = ["--out={tmp_path}", "--device=cpu", "--tiny", "--minutes=0"]
        runpy.run_path({str(ROOT / "benchmarks" / "bench_gpu.py")!r}, run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "not measured" in done.stdout, done.stderr
