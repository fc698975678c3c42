"""The study: tables of ordinary runs of train.py that differ in a few settings.

    python tests/study.py [TABLE ...] [--seeds 1] [--jobs 2] [--gpus cpu] [--set KEY=VALUE ...]

Without a name it makes every table but those whose cells train other backbones (BACKBONES). A cell
is one run, `python train.py --preset ... --set ...`, in runs/study. It is skipped if its report is
there, so that the study can be interrupted; all cells share one cached backbone, and once it is
there --jobs cells run at once.
`fed.seed` differs between the seeds of a cell: batches, cohorts and noise change, people and
backbone stay. Writes the tables into their sections of tests/results/study.md, above the words there:
means with 95 % intervals over people and seeds (`crossed_ci`), and differences to the table's
reference row, pair by pair (same person, same seed), which are drawn in tests/results/study/ as well.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics
import variants

RUNS = ROOT / "runs" / "study"
METRICS = (
    "unexplained",
    "mouth_correlation*",
    "mouth_std_ratio*",
    "jitter_ratio",
    "jitter_error",  # |jitter_ratio - 1|
    "psnr",
)
DRAWN = {  # metrics of the pictures, with their titles
    "mouth_correlation*": "mouth opening: r",
    "unexplained": "motion left unexplained",
    "jitter_error": "jitter: distance from the truth's",
}
# Tables whose cells train a backbone each.
BACKBONES = ("parts", "unseen")
# Without personal adapters there is time to look at more people.
NO_PERSONAL = ["personal.steps=0", "personal.clients=30"]


@dataclass(frozen=True)
class Cell:
    """One row of a table: presets and overrides of a run, the method of its report that is looked
    at, and which part of the code is exchanged.
    """

    label: str
    presets: tuple = ()
    overrides: tuple = ()
    method: str = "global adapter"
    variant: tuple = ()  # arguments of variants.py


@dataclass
class Table:
    """Rows, the first of which is the one that the others are compared with."""

    question: str
    cells: list = field(default_factory=list)


def make_tables():
    """Return {name: Table}."""
    backbone = Cell("backbone", ("plain",), method="backbone")
    plain = Cell("ISFA, no noise", ("plain",))
    private = Cell("ISFA, epsilon 2.0")  # the default run
    methods = [backbone, Cell("FedAvg", ("plain", "fedavg")), Cell("FedProx", ("plain", "fedprox"))]
    methods += [Cell("SCAFFOLD", ("plain", "scaffold")), plain, private]
    methods.append(Cell("centralized", ("centralized",)))
    everything = (
        "lora.train=AB",
        "lora.layers=''",
        "lora.rank=4",
        "lora.alpha=8.0",
        "fed.lr=0.005",
    )
    methods.append(Cell("centralized, A and B of all layers", ("centralized",), everything))

    bare = (
        "fed.gamma=0.0",
        *(f"loss.{name}=0.0" for name in ("tdc", "identity", "perceptual", "sync")),
    )
    full = Cell("full, no noise", ("plain",))
    alone = Cell("bare: FedAvg, L_diff only", ("plain",), bare)
    ablation = [full, alone]
    for name in ("tdc", "identity", "perceptual", "sync"):
        without = (f"loss.{name}=0.0",)
        added = tuple(item for item in bare if item not in without)
        ablation.append(Cell(f"full without {name}", ("plain",), without))
        ablation.append(Cell(f"bare with {name}", ("plain",), added))
    ablation.append(Cell("full without ISFA", ("plain",), ("fed.gamma=0.0",)))
    ablation.append(Cell("bare with ISFA", ("plain",), bare[1:]))

    epsilons = [backbone, plain, private]
    for epsilon in (1.0, 0.5):
        label = f"ISFA, epsilon {epsilon}"
        epsilons.append(Cell(label, (), (f"privacy.target_epsilon={epsilon}",)))
    of_300 = ("data.root=datasets/synthetic-300", "data.clients=300")
    epsilons_300 = [replace(cell, overrides=(*cell.overrides, *of_300)) for cell in epsilons]

    adapters = [plain, private]  # R, rank 6, the layer where speech enters
    places = {"speech_in": "where speech enters", "speech": "layers with speech inputs"}
    places[""] = "all layers"
    # clipped to about the norm of the updates that they give
    for layers, factors, rank, alpha, lr, clip_norm in (
        ("speech_in", "R", 4, 4.0, 0.2, 1.8),
        ("speech_in", "R", 8, 8.0, 0.2, 3.5),
        ("speech_in", "R", 12, 12.0, 0.2, 5.1),
        ("speech", "R", 2, 2.0, 0.2, 3.0),
        ("speech", "R", 8, 8.0, 0.2, 10.7),
        ("", "B", 4, 16.0, 0.003, 1.25),
        ("", "AB", 4, 16.0, 0.01, 5.4),
    ):
        where = places[layers]
        overrides = (f"lora.layers='{layers}'", f"lora.train={factors}", f"lora.rank={rank}")
        overrides += (f"lora.alpha={alpha}", f"fed.lr={lr}", f"privacy.clip_norm={clip_norm}")
        adapters.append(Cell(f"{factors}, rank {rank}, {where}, no noise", ("plain",), overrides))
        adapters.append(Cell(f"{factors}, rank {rank}, {where}, epsilon 2", (), overrides))

    participation = [plain]
    for share in (0.5, 0.25):
        label = f"{share} of the clients in each round"
        participation.append(Cell(label, ("plain",), (f"fed.sample_rate={share}",)))

    reliability = {}  # share of faulty clients -> cells
    for share in (0.25, 0.5):
        spoiled = "--fault", "other sound", "--share", str(share)
        cells = [Cell("FedAvg", ("plain", "fedavg"), variant=spoiled)]
        cells.append(Cell("FedAvg, no faults", ("plain", "fedavg")))
        for label, variant in (
            ("ISFA", spoiled),
            ("r = gain", (*spoiled, "--reliability", "gain")),
            ("r = sync", (*spoiled, "--reliability", "sync")),
            ("r = sync, no faults", ("--reliability", "sync")),
        ):
            cells.append(Cell(f"{label}, gamma 5", ("plain",), ("fed.gamma=5.0",), variant=variant))
        reliability[share] = cells

    clipped = Cell("clipped", (), ("privacy.target_epsilon=0.0",))  # without noise
    poisoned = [replace(plain, label="not clipped"), clipped]
    attacks = {}  # label -> variant
    for fault in ("sign changed", "tenfold", "backdoor"):
        attacks[f"10 % {fault}"] = "--fault", fault, "--share", "0.1"
    attacks["10 % backdoor, tone"] = *attacks["10 % backdoor"], "--tone"
    attacks["tone"] = ("--tone",)
    for label, variant in attacks.items():
        poisoned.append(Cell(f"{label}, not clipped", ("plain",), variant=variant))
        poisoned.append(replace(clipped, label=f"{label}, clipped", variant=variant))

    thirty = "personal.clients=30"  # twelve cannot tell a jitter nearer to 1 from one as far off
    tdc = [Cell("no TDC", ("plain",), ("loss.tdc=0.0", thirty), "personal adapter")]
    forms = {"eps": (0.05, 5.0), "x0": (5.0,), "v": (5.0,), "size": (0.5,)}
    for quantity, weights in forms.items():
        variant = () if quantity == "eps" else ("--tdc", quantity)
        for weight in weights:
            label = f"TDC of {quantity}, lambda {weight}"
            settings = (f"loss.tdc={weight}", thirty)
            tdc.append(Cell(label, ("plain",), settings, "personal adapter", variant))

    own = ("personal.steps=50", "personal.train=AB")
    personal = [Cell("global adapter", ("plain",), own)]
    for factors, steps in (("R", 50), ("B", 50), ("AB", 10), ("AB", 50), ("AB", 150)):
        overrides = (f"personal.steps={steps}", f"personal.train={factors}")
        label = f"{factors}, {steps} steps"
        personal.append(Cell(label, ("plain",), overrides, "personal adapter"))
    for coefficient in ("0.5", "1.0"):
        label = f"AB, 50 steps, {coefficient} of the way"
        variant = "--mixing-coefficient", coefficient
        personal.append(Cell(label, ("plain",), own, "personal adapter", variant))

    parts = [Cell("all parts", ("plain",))]
    parts.append(Cell("without guidance", ("plain",), ("sampling.guidance=1.0",)))
    for part in variants.PARTS:
        parts.append(Cell(f"without {part}", ("plain",), variant=("--without", part)))
    unseen_parts = [replace(cell, method="unseen: backbone") for cell in parts]

    return {
        "parts": Table("What does each part of the backbone add for clients?", parts),
        "unseen": Table("... and for people whom nothing trained on?", unseen_parts),
        "methods": Table("Which method learns most from the clients?", methods),
        "ablation": Table("What does each part of Eq. 12 and of the aggregation add?", ablation),
        "privacy": Table("What does privacy cost?", epsilons),
        "privacy of 300": Table("... with three hundred clients?", epsilons_300),
        "adapters": Table("What should be trained and sent?", adapters),
        "participation": Table("How many clients have to take part?", participation),
        "reliability": Table("Who is protected if a quarter is faulty?", reliability[0.25]),
        "half faulty": Table("... and if a half is?", reliability[0.5]),
        "poisoned": Table("What do poisoned updates do, and what does clipping leave?", poisoned),
        "tdc": Table("What does TDC change in a personal adapter?", tdc),
        "personalization": Table("What should a personal adapter train?", personal),
    }


def describe_run(cell, seed, settings):
    """Return the overrides of a cell's run and its name, which follows from all that makes it."""
    overrides = [*cell.overrides, *settings, f"fed.seed={seed}"]
    personal = any(item.startswith("personal.") for item in cell.overrides)
    if cell.method != "personal adapter" and not personal:
        given = {item.partition("=")[0] for item in settings}  # which win
        overrides += [item for item in NO_PERSONAL if item.partition("=")[0] not in given]
    recipe = json.dumps([cell.presets, overrides, *cell.variant])
    return overrides, hashlib.sha256(recipe.encode()).hexdigest()[:12]


def run_cell(cell, seed, args):
    """Return the report of a cell's run, made now if it is not there."""
    overrides, name = describe_run(cell, seed, args.set)
    found = sorted(RUNS.glob(f"*-{name}/report.json"))
    if not found:
        arguments = []
        if cell.presets:
            arguments += ["--preset", *cell.presets]
        arguments += ["--set", *overrides, f"name={name}", f"runtime.directory={RUNS}"]
        unfinished = sorted(RUNS.glob(f"*-{name}"))
        if unfinished:
            arguments = ["--resume", str(unfinished[-1])]
        arguments += ["--gpus", args.gpus]
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        if cell.variant:
            command = [sys.executable, variants.__file__, *cell.variant, "--", *arguments]
        print(f"{cell.label}, seed {seed}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # cells run side by side
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        found = sorted(RUNS.glob(f"*-{name}/report.json"))
    return json.loads(found[-1].read_text())


def start_runs(cells, args, pool):
    """Return {name of a run: Future of its report} for the cells of all seeds, which run in the
    pool; the first one is run alone before, as it makes the backbone.
    """
    run_cell(cells[0], 0, args)
    runs = {}
    for seed in range(args.seeds):
        for cell in cells:
            _, name = describe_run(cell, seed, args.set)
            if name not in runs:  # several rows of the tables may be of one run
                runs[name] = pool.submit(run_cell, cell, seed, args)
    return runs


def by_person(report, method, metric):
    """Return {person: mean over the person's clips} of a metric; the method "unseen: NAME" is NAME
    for the people whom nothing trained on.
    """
    rows = report["rows"]
    if method.startswith("unseen: "):
        rows = report["unseen"]
        method = method.removeprefix("unseen: ")
        unexplained = {}  # is measured for clients only
    else:
        unexplained = report["unexplained"][method]
    cell = unexplained if metric == "unexplained" else rows[method][metric]
    people = {}
    for name, value in cell.get("values", {}).items():
        people.setdefault(name.split("/")[0], []).append(value)
    return {person: float(np.mean(values)) for person, values in people.items()}


def collect(reports, method, metric):
    """Return a metric as an array [seeds, people], people in the order of their names; None if it
    was not measured.
    """
    if metric == "jitter_error":
        ratios = collect(reports, method, "jitter_ratio")
        return None if ratios is None else np.abs(ratios - 1)
    rows = [by_person(report, method, metric) for report in reports]
    if not rows[0]:
        return None
    return np.array([[row[person] for person in sorted(rows[0])] for row in rows])


def crossed_ci(values):
    """Return the mean and 95 % t interval over seeds and people [s p], both random and crossed.

    The variance of the mean is (MS_s + MS_p - MS_e) / (s p), from the mean squares of the two-way
    table, but at least what seeds alone or people alone give. Its degrees of freedom are
    Satterthwaite's (1946), but at least those of the fewer. With one seed or one person the
    interval is over the others. With few seeds that differ much it covers a little less than 95 %
    (simulated, three seeds: 92 %).
    """
    values = np.asarray(values, dtype=np.float64)
    s, p = values.shape
    if min(s, p) == 1:
        return metrics.mean_ci(values) | {"n": p, "seeds": s}
    mean = float(values.mean())
    seeds = values.mean(1)
    people = values.mean(0)
    residual = values - seeds[:, None] - people + mean
    squares = np.array([p * seeds.var(ddof=1), s * people.var(ddof=1), 0.0])
    freedom = np.array([s - 1, p - 1, (s - 1) * (p - 1)])
    squares[2] = np.square(residual).sum() / freedom[2]
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    denominator = (squares**2 / freedom).sum()
    degrees = min(freedom)
    if denominator > 0:
        degrees = max(degrees, total**2 / denominator)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(total / (s * p))
    interval = [float(mean - half), float(mean + half)]
    return {"mean": mean, "ci95": interval, "n": p, "seeds": s}


def write_interval(values):
    """Return the mean and its interval over seeds and people as text."""
    if values is None:
        return "-"
    result = crossed_ci(values)
    if result["ci95"] is None:
        return f"{result['mean']:.3f}"
    low, high = result["ci95"]
    return f"{result['mean']:.3f} [{low:.3f}, {high:.3f}]"


def subtract_first(values):
    """Return {row: {metric: [seeds, people]}} less its first row, for the others; None where they
    cannot be compared.
    """
    (_, reference), *others = values.items()
    differences = {}
    for label, row in others:
        differences[label] = {}
        for metric, own in row.items():
            other = reference[metric]
            comparable = own is not None and other is not None and own.shape == other.shape
            differences[label][metric] = own - other if comparable else None
    return differences


def describe_cost(reports):
    """Return how long the runs of a table took, and on what, as text."""
    runs = {report["name"]: report for report in reports}
    stages = ("rounds", "personal adapters", "evaluation")
    seconds = [sum(run["seconds"][stage] for stage in stages) for run in runs.values()]
    hardware = reports[0]["hardware"]
    device = hardware["gpu"] or f"{hardware['machine']}, threads: {hardware['threads']}"
    return f"{len(runs)} runs, the median of {np.median(seconds) / 60:.1f} min ({device})"


def make_table(name, table, commit, args, runs):
    """Return a table's section as lines of Markdown, values and differences to its first row, and
    the picture of these, which the section shows. Waits for those of the `runs` that it needs.
    """
    values = {}
    epsilons = {}
    all_reports = []
    for cell in table.cells:
        names = [describe_run(cell, seed, args.set)[1] for seed in range(args.seeds)]
        reports = [runs[own].result() for own in names]  # raises what a run has raised
        all_reports += reports
        values[cell.label] = {metric: collect(reports, cell.method, metric) for metric in METRICS}
        epsilon = reports[0]["privacy"]["epsilon"]
        unknown = epsilon is None or cell.method == "backbone"
        epsilons[cell.label] = "-" if unknown else f"{epsilon:.2f}"
    reference = table.cells[0].label
    differences = subtract_first(values)
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
    lines = [f"## {name}", ""]
    lines += [f"{table.question} Commit {commit}, {seeds}; {describe_cost(all_reports)}.", ""]
    lines += [f"![{name}](study/{picture_name(name)})", ""]
    lines += ["| | epsilon | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for label, row in values.items():
        intervals = " | ".join(write_interval(row[metric]) for metric in METRICS)
        lines.append(f"| {label} | {epsilons[label]} | {intervals} |")
    lines += ["", f"Minus {reference}:", ""]
    lines += ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for label, row in differences.items():
        intervals = " | ".join(write_interval(row[metric]) for metric in METRICS)
        lines.append(f"| {label} | {intervals} |")
    return lines, draw_differences(reference, differences)


def picture_name(table):
    """Return the file name of a table's picture."""
    return table.replace(" ", "-") + ".png"


def draw_differences(reference, differences):
    """Return a picture of differences {row: {metric: [seeds, people]}} to the row `reference`: means
    as dots, 95 % intervals as lines, blue where 0 is outside. What is beyond the scale is a ring at
    its end.
    """
    label_width, panel_width, row_height, margin = 560, 400, 40, 40
    font = ImageFont.load_default(22)
    size = label_width + panel_width * len(DRAWN), row_height * (len(differences) + 2)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((label_width, row_height / 2), f"minus {reference}", "#888888", font, "rm")
    for i, label in enumerate(differences, start=1):
        pen.text((label_width, row_height * (i + 0.5)), label, "black", font, "rm")
    for j, (metric, title) in enumerate(DRAWN.items()):
        results = {}
        for i, row in enumerate(differences.values(), start=1):
            if row[metric] is not None:
                result = crossed_ci(row[metric])
                results[i] = result["mean"], *(result["ci95"] or [result["mean"]] * 2)
        values = [0.0, *(value for result in results.values() for value in result)]
        # Noise wrecks some rows, at whose scale all others would be one point; and a difference of
        # a thousandth is to look like one.
        low, high = np.clip(min(values), -0.5, -0.02), np.clip(max(values), 0.02, 0.5)
        left = label_width + j * panel_width + margin
        scale = (panel_width - 2 * margin) / (high - low)
        bottom = size[1] - row_height
        pen.text((left + panel_width / 2 - margin, row_height / 2), title, "black", font, "mm")
        ends = [end for end in (low, high) if abs(end) > 0.15 * (high - low)]  # not upon the 0
        for x in (*ends, 0.0):
            at = left + (x - low) * scale
            pen.line((at, row_height, at, bottom), "#888888" if x == 0 else "#dddddd", 2)
            pen.text((at, bottom + row_height / 2), f"{x:.2g}", "#888888", font, "mm")
        for i, result in results.items():
            y = row_height * (i + 0.5)
            color = "#888888" if result[1] <= 0 <= result[2] else "#1f77b4"
            at, begin, end = (left + (np.clip(x, low, high) - low) * scale for x in result)
            pen.line((begin, y, end, y), color, 4)
            inside = low <= result[0] <= high
            pen.ellipse((at - 8, y - 8, at + 8, y + 8), color if inside else "white", color, 3)
    return sheet


def update_page(page, name, lines):
    """Return a page with `lines` as the section `name`: they replace as many of its paragraphs as
    they have, and the words below these stay.
    """
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    new = "\n".join(lines)
    num_paragraphs = len(new.split("\n\n"))
    for i, section in enumerate(sections):
        if section.startswith(f"## {name}\n"):
            words = section.split("\n\n", num_paragraphs)[num_paragraphs:]
            sections[i] = "\n\n".join([new, *words]) if words else new + "\n"
            return head + "".join(sections)
    return page.rstrip("\n") + "\n\n" + new + "\n"


def main():
    tables = make_tables()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = [name for name in tables if name not in BACKBONES]
    parser.add_argument("tables", nargs="*", default=default, metavar="TABLE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cells that run at once")
    parser.add_argument("--gpus", default="cpu", help="of each cell: cpu, or the index of a GPU")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every cell")
    args = parser.parse_args()
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f"unknown tables {', '.join(sorted(unknown))}; known: {', '.join(tables)}")
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    # of the code that is about to run; hours later it may be another
    command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    path = ROOT / "tests" / "results" / "study.md"
    pictures = path.with_suffix("")
    pictures.mkdir(exist_ok=True)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        runs = start_runs([cell for name in args.tables for cell in tables[name].cells], args, pool)
        for name in args.tables:
            lines, picture = make_table(name, tables[name], commit, args, runs)
            picture.quantize(32).save(pictures / picture_name(name))
            print("\n".join(lines), end="\n\n")
            path.write_text(update_page(path.read_text("utf-8"), name, lines), "utf-8")
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
