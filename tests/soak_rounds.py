"""Rounds that are killed and resumed again and again: python tests/soak_rounds.py [ROUNDS KILLS]

20 clients with R-only adapters of 4 numbers, of whom 90 % are in a round: 20 % drop out at random
stages of the secure sum, on a graph of degree 8, and 5 % fail. Once undisturbed in one process; once
in two, of which one is killed again and again with SIGKILL, and the run resumed (300 rounds and 10
kills by default). Both have to end with the same adapter, bit for bit, and the same log. Every
round, killed or not, counts in epsilon. Memory and open files have to stay flat.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fed
import lora
import privacy
import train
from bench_rounds import resident_mebibytes
from test_fed import QuadraticClient, quadratic_backward

NUM_CLIENTS = 20
DEGREE = 8  # of a graph on which some rounds are aborted
OVERRIDES = [
    f"data.clients={NUM_CLIENTS}",
    "fed.sample_rate=0.9",
    "fed.dropout_rate=0.2",
    "fed.gamma=0.0",
    "fed.server_lr=0.1",
    "privacy.seed=0",  # noise that can be repeated
    "privacy.target_epsilon=0.0",
    "privacy.noise_multiplier=1.0",
    "privacy.num_curious=0",
    "privacy.survivor_share=0.55",
]


class FailingClient(QuadraticClient):
    """A client one in twenty of whose rounds ends in a disk error; which ones follows from the
    round's seed.
    """

    def train_batch(self, model, batch_size, generator):
        if generator.initial_seed() % 20 == 0:
            raise OSError("a clip is gone")
        return super().train_batch(model, batch_size, generator)


class SameCircles:
    """Stands in for `fed.round_params`: the graph of a round follows from its dropouts' seed.

    Who drops out next to whom decides whether a round is aborted, so that it has to be the same in
    both runs. Keys and masks stay random.
    """

    def __init__(self):
        self.choose_dropouts = fed.choose_dropouts
        self.round_params = fed.round_params

    def dropouts(self, num_clients, rate, seed):
        self.session = hashlib.sha256(str(seed).encode()).digest()
        return self.choose_dropouts(num_clients, rate, seed)

    def params(self, mechanism, cohort_size):
        with patch.object(privacy.secrets, "token_bytes", lambda size: self.session[:size]):
            return self.round_params(mechanism, cohort_size)


def run_rounds(rank, size, port, folder, num_rounds):
    """Run the rounds in `folder` from where they stopped, as one of `size` workers.

    Rank 0 writes its memory and open files after each round to usage.jsonl.
    """
    torch.set_num_threads(1)
    if size > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", address, rank=rank, world_size=size)
    workers = fed.Workers()
    config = train.load_config(train.DEFAULTS, [], [*OVERRIDES, f"fed.rounds={num_rounds}"])
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(3, 2))
    lora.inject_lora(model.unet, 2, 4.0, 0.0, "R")
    clients = [FailingClient(f"c{i}", 1 + i % 3, i / 10) for i in range(NUM_CLIENTS)]
    adapter = lora.adapter_vector(model)
    state = {"adapter": adapter, "round": 0, "accountant": [], "sampling_key": "07" * 32}
    if rank == 0 and (folder / "last.pt").exists():
        state = train.load_checkpoint(folder / "last.pt", "global adapter")
        train.forget_rounds(folder, state)
    state = workers.broadcast(state)
    log_round = train.log_round

    def log_usage(run, record, workers):
        log_round(run, record, workers)
        if rank == 0:
            usage = [resident_mebibytes(), len(os.listdir("/proc/self/fd"))]
            with open(folder / "usage.jsonl", "a") as file:
                file.write(json.dumps(usage) + "\n")

    circles = SameCircles()
    fed.choose_dropouts = circles.dropouts
    fed.round_params = circles.params
    privacy.choose_neighbors = lambda num_clients: DEGREE
    fed.backward = quadratic_backward
    train.validate = lambda *args: {"unexplained": 1.0, "not_validated": []}
    train.log_round = log_usage
    device = torch.device("cpu")
    train.federate(config, model, None, clients, state, 1.0, folder, device, workers)


def run_with_kills(folder, num_rounds, num_kills, num_workers):
    """Run the rounds in `num_workers` processes, kill one `num_kills` times at random moments."""
    context = multiprocessing.get_context("fork")
    generator = random.Random(0)
    log = folder / "rounds.jsonl"
    targets = sorted(generator.sample(range(1, num_rounds), num_kills))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = []
        for rank in range(num_workers):
            arguments = rank, num_workers, port, folder, num_rounds
            workers.append(context.Process(target=run_rounds, args=arguments))
            workers[-1].start()
        while targets and all(worker.is_alive() for worker in workers):
            if log.exists() and len(log.read_text().splitlines()) >= targets[0]:
                time.sleep(generator.random() * 0.2)
                os.kill(generator.choice(workers).pid, signal.SIGKILL)
                del targets[0]
                break
            time.sleep(0.01)
        else:
            for worker in workers:
                worker.join()
                assert worker.exitcode == 0, f"the rounds ended with {worker.exitcode}"
            return
        for worker in workers:
            worker.kill()  # as train.launch does
            worker.join()


def main(num_rounds=300, num_kills=10):
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "plain"), Path(folder, "disturbed")
        for run in runs:
            run.mkdir()
        run_with_kills(runs[0], num_rounds, 0, num_workers=1)
        run_with_kills(runs[1], num_rounds, num_kills, num_workers=2)
        states = [train.load_checkpoint(run / "last.pt", "global adapter") for run in runs]
        assert torch.equal(states[0]["adapter"], states[1]["adapter"]), "the adapters differ"
        logs = []
        for run in runs:
            records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
            epsilons = [record.pop("epsilon") for record in records]
            logs.append(records)
        assert logs[0] == logs[1] and len(logs[0]) == num_rounds
        spent = [sum(rounds for *_, rounds in state["accountant"]) for state in states]
        assert spent[0] == num_rounds <= spent[1] <= num_rounds + num_kills, spent
        assert epsilons[-1] is None  # as the noise follows from a seed
        usage = np.array([json.loads(line) for line in open(runs[0] / "usage.jsonl")])
    early, late = usage[num_rounds // 3], usage[-1]
    assert late[0] < 1.05 * early[0] and late[1] <= early[1], "memory or files grow"
    aborted = sum(bool(record["aborted"]) for record in logs[0])
    failures = sum(len(record["simulation"]["failures"]) for record in logs[0])
    print(
        f"{num_rounds} rounds, {num_kills} kills of one of two workers: same adapter and log; "
        f"{aborted} rounds aborted, {failures} updates failed; rounds counted in epsilon "
        f"{spent[0]} and {spent[1]}; memory {early[0]:.0f} to {late[0]:.0f} MiB; "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
