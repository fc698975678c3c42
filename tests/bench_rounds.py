"""What a round costs beyond the model's own work, and with how many clients it grows.

    python tests/bench_rounds.py [overhead] [cohort] [thousands]

overhead: ten clients, each with one step on a linear layer whose adapter has d numbers, against a
plain loop that takes the same steps: in the clear, and with the secure sum and noise. cohort: a
small talking head, ISFA, secure sum and noise, ten clients in a round on average, of 12 and of
1,000. thousands: the linear layer at d = 1,024 with secure sum and noise, ten clients in a round on
average, of 1,000 and of 10,000. Times are processor times of one process on one core, which
simulates all clients and the server. The table goes to tests/results/rounds.md.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import data
import fed
import lora
import metrics
import train
from test_devices import noise_clips
from test_fed import adapted_model

BATCH_SIZE = 8
CPU = torch.device("cpu")
SMALL = [
    f"fed.batch_size={BATCH_SIZE}",
    "privacy.num_curious=0",
    "privacy.target_epsilon=0.0",
    "privacy.noise_multiplier=1.0",
    "privacy.survivor_share=0.51",
    "sampling.num_steps=1",
    "sampling.window=24",
]


def resident_mebibytes():
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


class LinearClient(fed.Client):
    """A client with one fixed batch of a linear regression."""

    def __init__(self, name, num_inputs, generator):
        super().__init__(name, {"train": [], "validation": [], "test": []}, 8)
        self.num_samples = BATCH_SIZE
        x = torch.randn(BATCH_SIZE, num_inputs, generator=generator)
        self.batch = {"x": x, "y": torch.randn(BATCH_SIZE, 1, generator=generator)}

    def train_batch(self, model, batch_size, generator):
        return self.batch


def squared_error(model, judges, batch, *args):
    """In the place of `fed.backward`."""
    model.zero_grad()
    loss = (model.unet(batch["x"]) - batch["y"]).square().mean()
    loss.backward()
    return {"diffusion": float(loss.detach())}


def linear_model(d, num_clients):
    """Return a linear layer whose adapter (A and B, rank 8) has about d numbers, and clients."""
    num_inputs = d // 8 - 1
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(num_inputs, 1))
    lora.inject_lora(model.unet, 8, 1.0, 0.0, "AB")
    generator = torch.Generator().manual_seed(0)
    return model, [LinearClient(str(i), num_inputs, generator) for i in range(num_clients)]


def run_rounds(num_rounds, model, judges, clients, cohort, *settings):
    """Run the federation; return the seconds, the cohort's size and the MiB after each round."""
    overrides = [*SMALL, f"data.clients={len(clients)}", f"fed.rounds={num_rounds}"]
    overrides += [f"fed.sample_rate={cohort / len(clients)}", *settings]
    config = train.load_config(train.DEFAULTS, [], overrides)
    adapter = lora.adapter_vector(model)
    state = {"adapter": adapter, "round": 0, "accountant": [], "sampling_key": os.urandom(32).hex()}
    times = [time.process_time()]
    sizes = []
    memory = []
    log_round = train.log_round

    def measure(run, record, workers):
        log_round(run, record, workers)
        assert not record["aborted"] and not record["simulation"]["failures"], record
        times.append(time.process_time())
        sizes.append(record["cohort_size"])
        memory.append(resident_mebibytes())

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(patch.object(train, "log_round", measure))
        stack.enter_context(contextlib.redirect_stderr(open(os.devnull, "w")))
        train.federate(config, model, judges, clients, state, 1.0, folder, CPU, fed.Workers())
    return np.diff(times), np.array(sizes), np.array(memory)


def run_linear(num_rounds, d, num_clients, *settings):
    """`run_rounds` of linear layers, ten clients in a round."""
    torch.set_num_threads(1)
    with (
        patch.object(fed, "backward", squared_error),
        patch.object(train, "validate", lambda *a: {"unexplained": 1.0, "not_validated": []}),
    ):
        model, clients = linear_model(d, num_clients)
        settings = "fed.gamma=0.0", "fed.sample_cap=1", *settings
        return run_rounds(num_rounds, model, None, clients, 10, *settings)


def plain_loop(num_rounds, d):
    """Take the same steps and the same mean by hand; return the seconds of each round."""
    model, clients = linear_model(d, 10)
    start = lora.adapter_vector(model)
    seconds = []
    for _ in range(num_rounds):
        started = time.process_time()
        total = torch.zeros_like(start)
        for client in clients:
            parameters = lora.load_adapter_vector(model, start)
            optimizer = torch.optim.AdamW(parameters, lr=0.01)
            squared_error(model, None, client.batch)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total += lora.adapter_vector(model) - start
        start = start + total / len(clients)
        seconds.append(time.process_time() - started)
    return seconds


def overhead():
    for d in (1_000, 1_000_000):
        seconds = {"plain": [], "clear": [], "private": []}
        for _ in range(3):  # by turns
            seconds["plain"] += plain_loop(7, d)
            seconds["clear"] += list(run_linear(7, d, 10, "privacy.enabled=false")[0])
            seconds["private"] += list(run_linear(7, d, 10)[0])
        ms = {name: 1e3 * np.median(values) for name, values in seconds.items()}
        yield f"plain loop of ten clients, d = {d:,}", f"{ms['plain']:.1f} ms"
        yield "the same in the clear, minus the plain loop", f"{ms['clear'] - ms['plain']:.1f} ms"
        difference = ms["private"] - ms["clear"]
        yield "secure sum and noise, minus that in the clear", f"{difference:.1f} ms"


def cohort():
    """Seconds of a round of ten, by turns, as the cohorts' sizes are random."""
    torch.set_num_threads(1)
    model = adapted_model()
    judges = metrics.Judges().eval().requires_grad_(False)
    seconds = {12: 0.0, 1000: 0.0}
    trained = dict.fromkeys(seconds, 0)
    with tempfile.TemporaryDirectory() as folder:
        split = data.split_clips(noise_clips(Path(folder), "a", 5), 0)
        clients = [fed.Client(f"c{i}", split, 6) for i in range(1000)]
        for _ in range(3):
            for num_clients in seconds:
                times, sizes, _ = run_rounds(3, model, judges, clients[:num_clients], 10)
                seconds[num_clients] += times.sum()
                trained[num_clients] += sizes.sum()
    means = {n: 10 * seconds[n] / trained[n] for n in seconds}
    for n, mean in means.items():
        yield f"a round of 10 of {n:,} clients, small talking head", f"{mean:.2f} s"
    yield "1,000 clients ÷ 12 clients", f"{means[1000] / means[12]:.2f}"


def thousands():
    for num_clients, num_rounds in ((1_000, 100), (10_000, 20)):
        started = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # with a memory of its own
            arguments = num_rounds, 1_024, num_clients
            seconds, _, memory = pool.apply(run_linear, arguments)
        name = f"{num_rounds} rounds of 10 of {num_clients:,} clients, d = 1,024"
        yield name, f"{1e3 * np.median(seconds):.0f} ms a round, {seconds.sum():.0f} s"
        yield "its memory after 10 rounds and at the end", f"{memory[9]:.0f}, {memory[-1]:.0f} MiB"
        yield "its whole time by the clock", f"{time.perf_counter() - started:.0f} s"


def main(*names):
    lines = [
        "# What a round costs",
        "",
        __doc__.split("\n\n", 2)[2].strip(),
        "",
        "| | |",
        "|---|---|",
    ]
    parts = {"overhead": overhead, "cohort": cohort, "thousands": thousands}
    for name in names or parts:
        for label, value in parts[name]():
            lines.append(f"| {label} | {value} |")
            print(lines[-1], flush=True)
    if not names:
        path = Path(__file__).parent / "results" / "rounds.md"
        path.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
