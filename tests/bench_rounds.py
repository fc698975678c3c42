"""What a round costs beside the model's own work: python tests/bench_rounds.py [CLIENTS ROUNDS]

First ten clients, each with one SGD step on a linear layer whose adapter has d numbers, against a
plain loop that takes the same steps: in the clear, and with the secure sum and noise. Then, if
asked for, CLIENTS clients with ten of them in a round on average, d = 1,024, secure sum and noise,
for ROUNDS rounds: seconds a round and memory.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fed
import lora
import train

BATCH_SIZE = 8


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


def linear_model(d):
    """Return a linear layer whose adapter (A and B, rank 8) has about d numbers, and its inputs."""
    num_inputs = d // 8 - 1
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(num_inputs, 1))
    lora.inject_lora(model.unet, 8, 1.0, 0.0, "AB")
    return model, num_inputs


def make_config(num_clients, sample_rate, num_rounds, private):
    overrides = [f"data.clients={num_clients}", f"fed.rounds={num_rounds}", "fed.gamma=0.0"]
    overrides += [
        f"fed.batch_size={BATCH_SIZE}",
        f"fed.sample_rate={sample_rate}",
        "fed.sample_cap=1",
    ]
    overrides += [
        "privacy.num_curious=0",
        "privacy.target_epsilon=0.0",
        "privacy.noise_multiplier=1.0",
    ]
    overrides += [f"privacy.enabled={str(private).lower()}"]
    return train.load_config(train.DEFAULTS, [], overrides)


def run_rounds(config, model, clients, folder):
    """Run the federation and return the seconds of each round."""
    folder = Path(folder)
    adapter = lora.adapter_vector(model)
    state = {"adapter": adapter, "round": 0, "accountant": [], "sampling_key": os.urandom(32).hex()}
    times = [time.perf_counter()]

    def log_time(run, record, workers):
        times.append(time.perf_counter())

    train.log_round = log_time
    device = torch.device("cpu")
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        train.federate(config, model, None, clients, state, 1.0, folder, device, fed.Workers())
    return np.diff(times)


def plain_loop(model, clients, num_rounds):
    """Take the same steps and the same mean by hand; return the seconds of each round."""
    start = lora.adapter_vector(model)
    seconds = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        total = torch.zeros_like(start)
        for client in clients:
            parameters = lora.load_adapter_vector(model, start)
            optimizer = torch.optim.AdamW(parameters, lr=0.01)
            squared_error(model, None, client.batch)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total += lora.adapter_vector(model) - start
        start = start + total / len(clients)
        seconds.append(time.perf_counter() - started)
    return seconds


def main(num_clients=0, num_rounds=100):
    torch.set_num_threads(1)
    fed.backward = squared_error
    train.validate = lambda *args: 1.0
    with tempfile.TemporaryDirectory() as folder:
        for d in (1_000, 1_000_000):
            model, num_inputs = linear_model(d)
            generator = torch.Generator().manual_seed(0)
            clients = [LinearClient(str(i), num_inputs, generator) for i in range(10)]
            plain = np.median(plain_loop(model, clients, 20))
            for name, private in (("in the clear", False), ("secure sum and noise", True)):
                config = make_config(10, 1.0, 20, private)
                own = np.median(run_rounds(config, model, clients, folder))
                print(
                    f"d = {d:9,}, {name:20}: {1e3 * own:7.1f} ms a round, plain loop {1e3 * plain:.1f} ms"
                )
        if num_clients:
            model, num_inputs = linear_model(1_024)
            generator = torch.Generator().manual_seed(0)
            clients = [LinearClient(str(i), num_inputs, generator) for i in range(num_clients)]
            config = make_config(num_clients, 10 / num_clients, num_rounds, True)
            config["privacy"]["survivor_share"] = 0.51
            seconds = run_rounds(config, model, clients, folder)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGESIZE") / 2**20
            print(
                f"{num_clients:,} clients, 10 a round: {1e3 * np.median(seconds):.1f} ms a round, "
                f"{seconds.sum():.0f} s in all, {memory:.0f} MiB"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
