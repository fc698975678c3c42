"""Random configurations and command lines: each is refused by one line, or makes a dry run of finite
numbers.

    python tests/fuzz_config.py --cases 1000 --seed 0
"""

import argparse
import contextlib
import io
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from unittest import mock

import yaml

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import train
from test_train import TINY

SMALLEST = [*TINY, "backbone.num_frames=5", "backbone.batch_size=1", "fed.batch_size=1"]
SECONDS = 30  # of CPU time, after which a case counts as hung
SECTIONS = ("data", "model", "fed", "lora", "privacy", "runtime", "presets")
# Never valid for any key, but for a name or a folder.
WRONG = (
    *("", "nan", ".nan", ".inf", "-.inf", "1e400", "-1e9", "-2", "9" * 400, "9" * 5000, "1e-3x"),
    *("null", "[]", "[[8]]", "{}", "{a: 1}", "{1: {2: 3}}", "[8, nan]", "[-8]", "[8, a]", "[16.5]"),
    *("*a", "&a [*a]", "&a {fed: *a}", "[" * 500, "{a: " * 500, "!!bool x", "!!timestamp x"),
    *("!!int x", "!!python/none x", "2020-13-45", "2020-12-24", "'", "\ud800", "\x07", "? [a]"),
    "[" + "8, " * 50 + "8]",
    "[&a [x, x, x, x, x, x, x, x, x, x]"
    + "".join(
        f", &{new} [" + ", ".join([f"*{old}"] * 10) + "]"
        for old, new in zip("abcdefgh", "bcdefghi")
    )
    + "]",
)
TEXTS = ("ä€😀", "a\nb", "x" * 300, "../up", "a/b", "", "line\u2028break", "\udcff", "%s{0}", "-1")
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 16, 17, 33, 1000, 10**6, 10**9, 10**12)
FACTORS = (0, 0.01, 0.5, 0.9, 1.1, 2.0, 100.0, 1e-9, 1e-320, 1e6, 1e9)
FOLDERS = ("data.root", "runtime.directory", "runtime.cache", "weights")
# Larger values are slow without being wrong: left to those that are far too large.
SMALL = (
    "data.size",
    "data.clients",
    "model",
    "backbone.num_frames",
)


def flat(config, prefix=""):
    """Return {dotted key: value} of nested dicts."""
    pairs = {}
    for key, value in config.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs


DEFAULTS = train.read_yaml(train.DEFAULTS)
PRESETS = list(DEFAULTS.pop("presets"))
KEYS = flat(DEFAULTS)


# ---------------------------------------------------------------- cases
# Each function returns (arguments, whether they have to be refused).


def wrong_value(rng, folder):
    """A key with a value that no key of its kind accepts."""
    key = rng.choice([key for key in KEYS if key != "name" and key not in FOLDERS])
    value = rng.choice(WRONG)
    return ["--set", f"{key}={value}"], True


def bad_number(rng, folder):
    """A number that is none, not finite, or below all that is allowed."""
    key = rng.choice([key for key, value in KEYS.items() if type(value) in (int, float)])
    return [
        "--set",
        f"{key}={rng.choice(('nan', '.nan', '.inf', '-.inf', '1e400', -1e9, -2))}",
    ], True


def odd_text(rng, folder):
    """A key with a text, which only names and folders accept."""
    key = rng.choice(list(KEYS))
    return ["--set", f"{key}={rng.choice(TEXTS)}"], False


def unknown_key(rng, folder):
    """A key that does not exist, or a section in a value's place."""
    key = rng.choice(list(KEYS))
    place = rng.randrange(len(key) + 1)
    choices = (
        key[:place] + rng.choice("xyzß .=") + key[place:],
        key + ".x",
        key.split(".")[0] + "s",
    )
    key = rng.choice((*choices, *SECTIONS, "", ".", "seed seed"))
    return ["--set", rng.choice((f"{key}=1", key))], True


def numbers(rng, folder):
    """Several numbers in and out of their ranges."""
    changes = []
    for key in rng.sample(
        [k for k, v in KEYS.items() if type(v) in (int, float)], rng.randint(1, 6)
    ):
        default = KEYS[key]
        value = rng.choice(NUMBERS)
        if type(default) is float:
            value = float(rng.choice((value, default * rng.choice(FACTORS))))
        if key.startswith(SMALL) and 17 < value < 10**9:
            value = 10**9
        changes.append(f"{key}={value}")
    return ["--set", *changes], False


def sizes(rng, folder):
    """A model of random small sizes."""
    widths = (0, 4, 8, 16, 20, 24, 32)
    lists = {
        f"model.{name}": [rng.choice(widths) for _ in range(rng.randint(0, 3))]
        for name in ("channels", "autoencoder_channels")
    }
    ints = {
        "data.size": rng.choice((1, 4, 8, 16, 20, 32, 36, 40, 48, 64)),
        "backbone.num_frames": rng.choice((1, 4, 5, 6, 9)),
        "lora.rank": rng.choice((0, 1, 4, 16, 17, 300, 10**8)),
        "personal.rank": rng.choice((0, 1, 4, 16, 17, 300, 10**8)),
    }
    words = {
        "lora.train": rng.choice(("R", "B", "AB", "C")),
        "personal.train": rng.choice(("R", "B", "AB", "A")),
        "fed.algorithm": rng.choice(("isfa", "scaffold", "centralized", "isfaa")),
    }
    chosen = lists | ints | words
    names = rng.sample(list(chosen), rng.randint(1, 3))
    return ["--set", *(f"{name}={chosen[name]}" for name in names)], False


def protections(rng, folder):
    """Values of the privacy mechanism and of the cohorts, in and out of their ranges."""
    choices = {
        "data.clients": (0, 1, 2, 5, 40, 10**6),
        "fed.rounds": (0, 1, 3, 10**6),
        "fed.sample_rate": (0.0, 1e-9, 0.1, 0.5, 1.0, 1.1),
        "fed.dropout_rate": (0.0, 0.1, 0.5, 1.0),
        "privacy.enabled": ("true", "false", "1"),
        "privacy.target_epsilon": (0.0, 1e-12, 0.1, 8.0, 1e9),
        "privacy.noise_multiplier": (0.0, 1e-300, 1e-3, 1.0, 1e9),
        "privacy.delta": (0.0, 1e-320, 1e-30, 1e-5, 0.1, 1.0),
        "privacy.clip_norm": (0.0, 1e-320, 1e-30, 1.0, 1e9),
        "privacy.survivor_share": (0.0, 0.5, 0.51, 1.0, 1.5),
        "privacy.num_curious": (0, 1, 4, 10**9),
        "privacy.seed": (-2, -1, 0, 5),
    }
    names = rng.sample(list(choices), rng.randint(1, 6))
    return ["--set", *(f"{name}={rng.choice(choices[name])}" for name in names)], False


def presets(rng, folder):
    """Presets in any combination, some of them misspelt."""
    names = rng.sample(PRESETS, rng.randint(1, 4))
    misspelt = rng.random() < 0.4
    if misspelt:
        names.insert(0, rng.choice(("fedavgg", "", "a\nb", "fed", "😀", "0")))
    return ["--preset", *names, "--set", *SMALLEST], misspelt


def config_file(rng, folder):
    """A configuration file that is none, or holds nested nonsense."""
    path = folder / "mine.yaml"
    contents = {
        b"": True,
        b"\x00\xff\xfe": True,
        b"fed: [1, 2": True,
        b"- 1\n- 2\n": True,
        b"fed: 3\n": True,
        b"fed: {rounds: {rounds: 3}}\n": True,
        b"fed: {rounds: 3}\nfed: {lr: 0.1}\n": True,  # YAML keeps the last of the two
        b"? {a: 1}\n: 2\n": True,
        b"1: 2\nnull: 3\n": True,
        b"presets: 3\n": True,
        b"presets: [mine]\n": True,
        b"presets: {mine: {fed: {rounds: x}}}\n": "mine",
        b"presets: {mine: 3}\n": "mine",
        b"presets: {1: {}, null: {}}\n": "mine",
        b"presets: {mine: {presets: {}}}\n": "mine",
        b"presets: {mine: {fed: {rounds: 1}}}\n": False,
        b"a" * 10**5: True,
        b"[" * 500: True,
        "nämé: ä\n".encode(): True,
        "fed: {lr: 0.1}\n".encode("utf-16"): True,
    }
    content, refused = rng.choice(list(contents.items()))
    path.write_bytes(content)
    arguments = ["--config", str(path)]
    if refused == "mine":
        arguments += ["--preset", "mine"]
    if not refused:
        path.write_bytes(content + (folder / "tiny.yaml").read_bytes())
    if rng.random() < 0.2:
        places = (folder, folder / "missing", folder / "loop", Path("/dev/null"), Path("x" * 300))
        return ["--config", str(rng.choice(places))], True
    return arguments, bool(refused)


def flags(rng, folder):
    """Flags of any action with any values."""
    values = ("nan", "inf", "-1", "0", "1e400", "1e308", "", "two", "9" * 500, "²", "😀", "a\nb")
    numeric = (
        "--seconds",
        "--seed",
        "--speech-scale",
        "--text-scale",
        "--identity-scale",
    )
    arguments = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(5)
        if kind == 0:
            arguments += [rng.choice(numeric), rng.choice(values)]
        elif kind == 1:
            gpus = (
                "cpu:0",
                "cpu:65",
                "cpu:",
                "cuda:0",
                "0,0",
                "-1",
                "99",
                "²",
                "cpu:²",
                ",",
                "٣" * 3,
            )
            arguments += ["--gpus", rng.choice((*gpus, *values))]
        elif kind == 2:
            arguments += ["--action", rng.choice(("trian", "", "a\nb", "generate", "personalize"))]
        elif kind == 3:
            arguments += [
                rng.choice(("--nothing", "--se", "extra", "--set", "--", "a\nb", "--resume"))
            ]
        else:
            name = rng.choice(("--reference", "--speech", "--adapter", "--clips", "--output"))
            arguments += [name, rng.choice((*values, str(folder), str(folder / "missing")))]
    return arguments, True


def resumed(rng, folder):
    """A run that is missing, broken, or resumed with settings that contradict it."""
    runs = [
        folder / name for name in ("missing", "loop", "run", "run", "run", "broken", "mine.yaml")
    ]
    run = rng.choice(runs)
    action = rng.choice(("train", "evaluate", "generate", "personalize", "dry-run"))
    arguments = ["--resume", str(run), "--action", action]
    files = [str(folder / name) for name in ("missing", "text.png", "run", "loop")]
    if action == "generate":
        arguments += ["--reference", rng.choice(files), "--speech", rng.choice(files)]
    if action == "personalize":
        arguments += ["--clips", rng.choice(files)]
    changes = ("lora.rank=3", "seed=9", "data.clients=6", "fed.lr=0.5", "model.channels=[24]")
    refused = action != "dry-run" or run.name != "run"
    if rng.random() < 0.5:
        arguments += ["--set", rng.choice(changes)]
        refused = True
    elif rng.random() < 0.5:
        arguments += rng.choice((["--preset", "scaffold"], ["--config", str(train.DEFAULTS)]))
        refused = True
    return arguments, refused


KINDS = (
    wrong_value,
    bad_number,
    odd_text,
    unknown_key,
    numbers,
    sizes,
    protections,
    presets,
    config_file,
    flags,
)
KINDS += (resumed,)


def make_folder(folder):
    """Fill a folder with the files that the cases name."""
    settings = [f"data.root={folder / 'missing'}", f"runtime.directory={folder / 'runs'}"]
    config = train.load_config(train.DEFAULTS, overrides=[*SMALLEST, *settings])
    tiny = {}
    for setting in [*SMALLEST, *settings]:
        section, _, key = setting.partition("=")[0].rpartition(".")
        tiny.setdefault(section, {})[key] = config[section][key]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    for name in ("run", "broken"):
        (folder / name).mkdir()
        for file in ("backbone.pt", "last.pt", "personal.pt"):
            (folder / name / file).write_bytes(b"no checkpoint")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "broken" / "config.yaml").write_text("fed: {rounds: [1")
    (folder / "text.png").write_text("no picture")
    (folder / "loop").symlink_to(folder / "loop")


def make_case(seed, folder):
    """Return the arguments of a case, whether they have to be refused, and its kind."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    arguments, refused = kind(rng, folder)
    if "--action" not in arguments:
        action = "dry-run"
        if kind is not odd_text and rng.random() < 0.1:  # data.root is missing
            action, refused = "train", True
        arguments = ["--action", action, *arguments]
    if "--gpus" not in arguments:
        arguments = ["--gpus", "cpu", *arguments]
    if "--resume" not in arguments and "--config" not in arguments:
        arguments = ["--config", str(folder / "tiny.yaml"), *arguments]
    return arguments, refused, kind.__name__


# ---------------------------------------------------------------- one case


def call(arguments):
    """Return exit status (None for a traceback or a hang), stdout and stderr of the command line."""

    def hung(*_):
        raise RuntimeError(f"hung for {SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    status = 0
    before = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                train.main(arguments)
            except SystemExit as stop:
                status = stop.code or 0
            except Exception:
                status = None
                traceback.print_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, before)
    return status, out.getvalue(), err.getvalue()


def fault_of(arguments, refused, folder):
    """Return what is wrong with how the command line takes these arguments, or an empty string."""
    status, out, err = call(arguments)
    lines = err.splitlines()
    if status is None:
        return "traceback: " + " | ".join(lines[-5:])[-700:]
    if (folder / "runs").exists():
        return "something was written"
    if status:
        if status != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            return f"status {status}, {len(lines)} lines: {err[:500]!r}"
        if len(lines[0]) > 1000 or len(lines[0]) < 15:
            return f"a line of {len(lines[0])} characters: {lines[0][:100]!r}"
        return ""
    if refused:
        return "nonsense was accepted"
    if lines:
        return f"accepted, but: {err[:300]!r}"
    config, _, numbers = out.partition("\nparameters:")
    if "hours" not in numbers or re.search(r"\bnan\b", numbers, re.IGNORECASE):
        return f"no dry run: {numbers!r}"
    if re.search(r"\binf", numbers.replace("\nepsilon inf: ", ""), re.IGNORECASE):
        return f"infinity: {numbers!r}"
    path = folder / "again.yaml"
    path.write_text(config)
    with mock.patch.object(train, "check_config"):  # which has passed it already
        again = train.load_config(path)
    if again != yaml.safe_load(config):
        return "its config.yaml does not load to the same"
    return ""


def fuzz(num_cases, seed, folder, report=print):
    """Return how many cases each kind had, and the faults [(seed, arguments, fault)]."""
    make_folder(folder)
    counts = {kind.__name__: 0 for kind in KINDS}
    faults = []
    for i in range(seed, seed + num_cases):
        arguments, refused, kind = make_case(i, folder)
        fault = fault_of(arguments, refused, folder)
        counts[kind] += 1
        if fault:
            short = [argument[:100] for argument in arguments]
            report(f"case {i} ({kind}): {short}: {fault}")
            faults.append((i, short, fault))
    return counts, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, faults = fuzz(args.cases, args.seed, Path(folder))
    print(f"{args.cases} cases ({counts}), {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
