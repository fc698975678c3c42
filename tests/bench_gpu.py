"""What a GPU does with the project: `python tests/bench_gpu.py [PART ...] [--people ROOT]`, every
part by default.

    equality    the same step and clip on CPU and GPU; adapters before the first round
    steps       clips a second, share of the UNet and memory of a training step, by preset and size
    compiled    a training step with `backbone.compile` and without, by turns
    speaking    generated frames a second, by preset and size
    runs        the default run with two workers on the GPU
    workers     a short run with one worker and with two: is the adapter the same?
    dry-run     what a dry run of `faces` and `lrs3` expects there, by size
    people      with --people: the preset `faces` on the real people in ROOT, by size

Each part that ends is written to tests/results/gpu.md; `runs`, `workers` and `people` need ffmpeg.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import fed
import metrics
import train

RESULTS = ROOT / "tests" / "results" / "gpu.md"
GPU = torch.device("cuda", 0)
SIZES = (("talkers", 64), ("faces", 64), ("faces", 128), ("faces", 256))
SIZES += (("lrs3", 64), ("lrs3", 128), ("lrs3", 256))
SPOKEN_SECONDS = 20


def load_preset(preset, *overrides):
    """Return the config of a preset; "talkers" is the default."""
    return train.load_config(train.DEFAULTS, [] if preset == "talkers" else [preset], overrides)


def make_batch(config, batch_size, num_frames, seed=0):
    """Return random clips, the condition of a batch from `data.sample_batch`."""
    generator = torch.Generator().manual_seed(seed)
    size = config["data"]["size"]
    mels = data.MELS_PER_FRAME * data.AUDIO_WINDOW, data.NUM_MELS
    picture = torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1
    moving = 0.1 * torch.randn(batch_size, num_frames, 3, size, size, generator=generator)
    return {
        "frames": (picture[:, None] + moving).clamp(-1, 1),
        "reference": picture,
        "mel": torch.randn(batch_size, num_frames, *mels, generator=generator),
        "liveliness": torch.ones(batch_size),
        "prompt": [""] * batch_size,
    }


def make_model(config, device):
    """Return the model of a config with random weights that follow from its seed, none of them
    zero.
    """
    torch.manual_seed(config["seed"])
    model = train.build_model(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def distance(x, y):
    """Return |x - y| / |y|."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    return float((x - y).norm() / y.norm())


def compare():
    """Return lines of a table: how far the GPU's numbers are from the CPU's."""
    config = load_preset("talkers")
    batch = make_batch(config, 4, config["backbone"]["num_frames"])
    no_judges = dict.fromkeys(config["loss"], 0.0)
    results = {}
    adapters = {}
    for name, device in {"cpu": torch.device("cpu"), "exact": GPU, "gpu": GPU, "bf16": GPU}.items():
        torch.backends.cudnn.allow_tf32 = name != "exact"
        model = make_model(config, device)
        encoded = fed.encode_batch(model, batch)
        generator = torch.Generator().manual_seed(1)
        fed.backward(model, None, encoded, no_judges, generator, bf16=name == "bf16")
        gradient = torch.cat([p.grad.flatten() for p in model.unet.parameters()])
        words = model.text_encoder.ids([""] * 4).to(device)
        spoken = encoded["reference"], encoded["mel"], words, torch.Generator().manual_seed(2)
        frames = model.eval().generate(*spoken, num_steps=2, guidance=2.5, window=40)
        results[name] = encoded["motion"], gradient, frames
        train.add_adapter(config, model.requires_grad_(False), None, "lora")
        adapters[name] = torch.cat([p.cpu().flatten() for p in model.unet.parameters()])
    lines = ["| GPU against CPU, relative distance | motion | gradient | generated frames |"]
    lines.append("|---|---|---|---|")
    titles = {"exact": "float32", "gpu": "float32, convolutions in TF32 (PyTorch's default)"}
    titles["bf16"] = "training in bfloat16"
    for name, title in titles.items():
        cells = [f"{distance(x, y):.1e}" for x, y in zip(results[name], results["cpu"])]
        if name == "bf16":
            cells = ["–", cells[1], "–"]  # for the network in training only
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    same = torch.equal(adapters["gpu"], adapters["cpu"])
    lines += ["", f"Weights and adapters before the first step: {'equal' if same else 'DIFFER'}."]
    return lines


def measure_seconds(function, least=10, seconds=2.0):
    """Return the median seconds of calls of a function on the GPU, after two for nothing."""
    times = []
    while len(times) < least + 2 or sum(times) < seconds:
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))


def detach(tree):
    """Return nested tuples and dicts of tensors without what their gradients need."""
    if isinstance(tree, dict):
        return {name: detach(value) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(detach(value) for value in tree)
    return tree.detach()


def make_step(config, model, encode):
    """Return a function that makes a training step of the backbone on the batch from `encode()`."""
    model.autoencoder.requires_grad_(False)
    optimizer = train.make_optimizer([p for p in model.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(1)
    step_kwargs = train.backward_kwargs(config, GPU, judged=False)

    def step():
        fed.backward(model, None, encode(), generator=generator, **step_kwargs)
        train.optimizer_step(optimizer, 1e-4)

    return step


def measure_step(preset, size):
    """Return a line of a table: a training step of the backbone and one of a client."""
    config = load_preset(preset, f"data.size={size}")
    model = make_model(config, GPU)
    b, num_frames = config["backbone"]["batch_size"], config["backbone"]["num_frames"]
    batch = make_batch(config, b, num_frames)
    step = make_step(config, model, lambda: fed.encode_batch(model, batch))
    inputs = []
    hook = model.unet.register_forward_pre_hook(lambda unet, args: inputs.append(detach(args)))
    step()
    hook.remove()
    torch.cuda.reset_peak_memory_stats()
    whole = measure_seconds(step)
    peak = torch.cuda.max_memory_allocated() / 2**30

    def unet_step():
        with torch.autocast("cuda", torch.bfloat16):
            model.unet(*inputs[0]).square().mean().backward()

    unet = measure_seconds(unet_step)
    encoding = measure_seconds(lambda: fed.encode_batch(model, batch))
    train.add_adapter(config, model.eval().requires_grad_(False), None, "lora")
    judges = metrics.Judges().to(GPU).eval().requires_grad_(False)
    own = make_batch(config, config["fed"]["batch_size"], num_frames)
    generator = torch.Generator().manual_seed(1)
    client_kwargs = train.backward_kwargs(config, GPU, judged=True)

    def client_step():
        encoded = fed.encode_batch(model, own)
        fed.backward(model, judges, encoded, generator=generator, **client_kwargs)

    client = measure_seconds(client_step)
    return (
        f"| {preset}, {size} px | {b} × {num_frames} | {1e3 * whole:.1f} | {b / whole:.0f} | "
        f"{unet / whole:.0%} | {encoding / whole:.0%} | {peak:.2f} | {1e3 * client:.1f} |"
    )


def measure_steps():
    """Return lines of a table of training steps."""
    lines = ["| training | clips × frames | ms a step | clips a second | UNet | encoding | GiB |"]
    lines[0] += " ms of a client's step |"
    lines.append("|---" * 8 + "|")
    for preset, size in SIZES:
        lines.append(measure_step(preset, size))
        print(lines[-1], flush=True)
    return lines


def measure_compiled():
    """Return lines of a table: a step on an encoded batch with the UNet as it is and compiled."""
    lines = ["| a step | as it is, ms | compiled, ms | first compiled step, s |", "|---" * 4 + "|"]
    for preset, size in (("talkers", 64), ("lrs3", 128)):
        config = load_preset(preset, f"data.size={size}")
        plain, compiled = (make_model(config, GPU) for _ in range(2))
        b, num_frames = config["backbone"]["batch_size"], config["backbone"]["num_frames"]
        encoded = fed.encode_batch(plain, make_batch(config, b, num_frames))
        compiled.unet.compile(mode="reduce-overhead")  # as train.train_unet does
        steps = [make_step(config, model, lambda: encoded) for model in (plain, compiled)]
        started = time.perf_counter()
        steps[1]()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        turns = [[measure_seconds(step, least=1, seconds=0) for step in steps] for _ in range(15)]
        before, after = 1e3 * np.median(turns, axis=0)
        lines.append(f"| {preset}, {size} px | {before:.1f} | {after:.1f} | {first:.0f} |")
        print(lines[-1], flush=True)
    return lines


def measure_speaking():
    """Return lines of a table of generation, one clip at a time as `--action generate` does."""
    lines = ["| speaking | ms until the first frames | frames a second | × real time |"]
    lines.append("|---|---|---|---|")
    for preset, size in SIZES:
        config = load_preset(preset, f"data.size={size}")
        model = make_model(config, GPU).eval().requires_grad_(False)
        batch = make_batch(config, 1, 1)
        num_frames = SPOKEN_SECONDS * data.FPS
        mel = torch.randn(1, num_frames, *batch["mel"].shape[2:], device=GPU)
        words = model.text_encoder.ids([""]).to(GPU)
        reference = batch["reference"].to(GPU)

        def speak(first_only=False):
            generator = torch.Generator().manual_seed(0)
            for frames in model.stream(reference, mel, words, generator, **config["sampling"]):
                frames.cpu()
                if first_only:
                    return

        first = measure_seconds(lambda: speak(first_only=True), seconds=0.5)
        rate = num_frames / measure_seconds(speak, least=3, seconds=0.5)
        cells = f"{1e3 * first:.0f} | {rate:.0f} | {rate / data.FPS:.0f}"
        lines.append(f"| {preset}, {size} px | {cells} |")
        print(lines[-1], flush=True)
    return lines


def run_train(folder, gpus, *arguments):
    """Run train.py in a folder; return the folder of the run and its seconds."""
    places = {"runtime.cache": "cache", "runtime.directory": "runs"}
    places = [f"{key}={folder / name}" for key, name in places.items()]
    command = [sys.executable, ROOT / "train.py", "--gpus", gpus, *arguments, *places]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    run = next((folder / "runs").glob("2*"))
    return run.rename(run.with_name(f"done-{len(list(run.parent.iterdir()))}")), seconds


def describe_run(title, run, whole):
    """Return a line of a table of whole runs, which took `whole` seconds."""
    report = json.loads((run / "report.json").read_text())
    seconds = report["seconds"]
    laps = [seconds[n] for n in ("backbone", "rounds", "personal adapters", "evaluation")]
    r = report["unseen"]["backbone"]["mouth_correlation*"]["mean"]
    cells = [f"{value:.0f}" for value in (whole, whole - sum(laps), *laps)]
    cells += [f"{report['hardware']['gpu_gib']:.2f}", "–" if r is None else f"{r:.2f}"]
    return f"| {title} | " + " | ".join(cells) + " |"


RUN_HEADER = ["| run | s | data | backbone | rounds | personal | evaluation | GiB | mouth r |"]
RUN_HEADER.append("|---" * 9 + "|")


def run_whole():
    """Return a table of the default run."""
    with tempfile.TemporaryDirectory() as folder:
        root = f"data.root={folder}/synthetic"
        run, whole = run_train(Path(folder), "0,0", "--set", root)
        return [*RUN_HEADER, describe_run("default, --gpus 0,0", run, whole)]


def compare_workers():
    """Return a line that says how far the adapters of a short run with one and with two workers
    are apart.
    """
    few = ["data.clients=12", "privacy.num_curious=1"]
    few += ["backbone.steps=50", "backbone.autoencoder_steps=50", "backbone.judge_steps=20"]
    few += ["backbone.finder_steps=0", "personal.steps=0", "privacy.seed=1"]
    adapters = []
    with tempfile.TemporaryDirectory() as folder:
        data.make_synthetic(Path(folder, "synthetic"), num_public=24, num_clients=12)
        for gpus in ("0,0", "0"):  # the second takes over the first one's backbone
            root = f"data.root={folder}/synthetic"
            run, _ = run_train(Path(folder), gpus, "--set", *few, root)
            adapters.append(train.load_checkpoint(run / "last.pt", "global adapter")["adapter"])
    apart = distance(adapters[1], adapters[0])
    return [
        f"Two rounds of 12 clients, by one worker and by two: adapters {apart:.1e} of their"
        " length apart."
    ]


def run_people(people):
    """Return a table of the preset `faces` on real people, without private noise."""
    lines = list(RUN_HEADER)
    for size in (64, 128):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--preset", "faces", "--set", f"data.root={people}", f"data.size={size}"]
            run, whole = run_train(Path(folder), "0,0", *arguments)
            lines.append(describe_run(f"faces, {size} px", run, whole))
            print(lines[-1], flush=True)
    return lines


def run_dry():
    """Return a table of what dry runs expect on this GPU."""
    lines = ["| dry run | ms of a step | ms of a client's step | hours | GB |", "|---" * 5 + "|"]
    for preset, size in SIZES[1:]:
        command = [sys.executable, ROOT / "train.py", "--action", "dry-run", "--gpus", "0"]
        command += ["--preset", preset, "--set", f"data.size={size}"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        step, client = re.search("takes (.*) s in the backbone and (.*) s at", output).groups()
        backbone, rounds = re.search("backbone ([^,]*), rounds (.*)", output).groups()
        memory = re.search("as timed: (.*) GB", output)[1]
        cells = [f"{1e3 * float(step):.0f}", f"{1e3 * float(client):.0f}"]
        cells += [f"backbone {backbone}, rounds {rounds}", memory]
        lines.append(f"| {preset}, {size} px | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


PARTS = {
    "equality": compare,
    "steps": measure_steps,
    "compiled": measure_compiled,
    "speaking": measure_speaking,
    "runs": run_whole,
    "workers": compare_workers,
    "dry-run": run_dry,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--people", type=Path, help="folder of real people, as data.root")
    args = parser.parse_args()
    parts = {name: PARTS[name] for name in args.parts or PARTS}
    if args.people:
        parts["people"] = partial(run_people, args.people)
    header = ["# On a GPU", "", "`python tests/bench_gpu.py` on one "]
    header[-1] += f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}."
    text = "\n".join(header) + "\n"
    for part, function in parts.items():
        started = time.perf_counter()
        lines = function()
        text += "\n" + "\n".join(lines) + "\n"
        RESULTS.write_text(text, "utf-8")
        print("\n".join(lines), f"\n{part}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
