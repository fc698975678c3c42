"""Where the default run's time goes: python tests/bench_default.py [RUN COMMIT]

Runs the default from nothing, or reads the report of a finished RUN that was made at COMMIT and
trained its backbone itself. It adds a row to tests/results/clock.md, above all minutes until a face
talks, which is the time of judges and backbone, if the backbone alone then opens the mouths of
people whom nothing was trained on as the truth does (r of at least 0.8), and moves as steadily
(jitter 0.8 to 1.25 of the truth's). The time to draw the synthetic talkers is not in it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).parent / "results" / "clock.md"
HEADER = """# The clock

`python tests/bench_default.py` appends a row: minutes until a face talks, on people whom nothing was
trained on (mouth opening r of at least 0.8 and jitter of 0.8 to 1.25 of the truth's, both of the
backbone), and minutes of the whole run.

| commit | machine | until a face talks | mouth opening r | jitter ÷ truth's | whole run |
|---|---|---|---|---|---|
"""


def run_default(folder):
    """Run the default in an empty folder and return its run."""
    places = {"data.root": "synthetic", "runtime.directory": "runs", "runtime.cache": "cache"}
    overrides = [f"{key}={folder / name}" for key, name in places.items()]
    subprocess.run([sys.executable, ROOT / "train.py", "--set", *overrides], check=True)
    return next((folder / "runs").glob("*-talkers"))


def describe(run, commit):
    """Print where the time of a run went and return its row of the table."""
    report = json.loads((run / "report.json").read_text())
    seconds = report["seconds"]
    if seconds["backbone"] < seconds["UNet"]:
        sys.exit(f"error: {run} took its backbone from an earlier run")
    laps = "backbone", "rounds", "personal adapters", "evaluation"
    whole = sum(seconds[name] for name in laps)
    for name in laps:
        print(f"{name:20} {seconds[name]:6.0f} s {seconds[name] / whole:5.0%}")
        if name == "backbone":  # its stages: the UNet, with the autoencoder, beside the others
            for stage in ("UNet", "loss judges", "table judges", "face finder"):
                print(f"    {stage:16} {seconds[stage]:6.0f} s")
    row = report["unseen"]["backbone"]
    r = row["mouth_correlation*"]["mean"]
    jitter = row["jitter_ratio"]["mean"]
    talks = r >= 0.8 and 0.8 <= jitter <= 1.25
    minutes = f"{seconds['backbone'] / 60:.1f} min"
    hardware = report["hardware"]
    machine = f"{hardware['gpu'] or hardware['machine']}, {hardware['threads']} threads"
    talking = minutes if talks else f"not within {minutes}"
    return f"| {commit} | {machine} | {talking} | {r:.2f} | {jitter:.2f} | {whole / 60:.1f} min |"


def main(run=None, commit=None):
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            run = run_default(Path(folder))
        row = describe(Path(run), commit)
    print(row)
    text = TABLE.read_text("utf-8") if TABLE.exists() else HEADER
    end = text.rindex("|\n") + 2  # of the table; notes follow
    TABLE.write_text(text[:end] + row + "\n" + text[end:], "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
