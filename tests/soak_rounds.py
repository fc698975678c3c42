"""Rounds that are killed and resumed again and again: python tests/soak_rounds.py [ROUNDS KILLS]

A tiny model on 8 clients, 20 % dropouts at random stages, 5 % failing clients, secure sums: once
undisturbed, once killed with SIGKILL and resumed (300 rounds and 10 times by default). Both have to
end with the same adapter, bit for bit, and the same log. Every round, killed or not, counts in
epsilon. Memory and open files have to stay flat.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fed
import lora
import train
from test_fed import NoiseClient, adapted_model

NUM_CLIENTS = 8
OVERRIDES = [
    f"data.clients={NUM_CLIENTS}",
    "fed.dropout_rate=0.2",
    "fed.local_epochs=0.2",
    "fed.batch_size=1",
    "fed.gamma=0.0",
    "fed.sample_rate=0.9",
    "privacy.target_epsilon=0.0",  # without noise, which nobody could repeat
    "privacy.num_curious=0",
    "privacy.survivor_share=0.55",
    "loss.identity=0.0",
    "loss.perceptual=0.0",
    "loss.sync=0.0",
]


class FailingClient(NoiseClient):
    """A client one in twenty of whose rounds ends in a disk error; which ones follows from the
    round's seed.
    """

    def train_batch(self, model, batch_size, generator):
        if generator.initial_seed() % 20 == 0:
            raise OSError("a clip is gone")
        return super().train_batch(model, batch_size, generator)


def run_rounds(folder, num_rounds):
    """Run the rounds in `folder` from where they stopped, and write memory and open files after
    each to usage.jsonl.
    """
    torch.set_num_threads(1)
    config = train.load_config(train.DEFAULTS, [], [*OVERRIDES, f"fed.rounds={num_rounds}"])
    model = adapted_model()
    clients = [FailingClient(f"c{i}", 4 + i, i / 10) for i in range(NUM_CLIENTS)]
    adapter = lora.adapter_vector(model)
    state = {"adapter": adapter, "round": 0, "accountant": [], "sampling_key": "07" * 32}
    if (folder / "last.pt").exists():
        state = train.load_checkpoint(folder / "last.pt", "global adapter")
        train.forget_rounds(folder, state["round"])
    log_round = train.log_round

    def log_usage(run, record, workers):
        log_round(run, record, workers)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mebibytes = pages * os.sysconf("SC_PAGESIZE") / 2**20
        with open(folder / "usage.jsonl", "a") as file:
            file.write(json.dumps([mebibytes, len(os.listdir("/proc/self/fd"))]) + "\n")

    train.log_round = log_usage
    device = torch.device("cpu")
    train.federate(config, model, None, clients, state, 1.0, folder, device, fed.Workers())


def run_with_kills(folder, num_rounds, num_kills):
    """Run the rounds in child processes, kill `num_kills` of them at random moments, and return how
    many were killed.
    """
    context = multiprocessing.get_context("fork")
    generator = random.Random(0)
    targets = sorted(generator.sample(range(1, num_rounds), num_kills))
    killed = 0
    while True:
        child = context.Process(target=run_rounds, args=(folder, num_rounds))
        child.start()
        while child.is_alive():
            done = (
                len((folder / "rounds.jsonl").read_text().splitlines())
                if (folder / "rounds.jsonl").exists()
                else 0
            )
            if killed < num_kills and done >= targets[killed]:
                time.sleep(generator.random() * 0.2)
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        child.join()
        if child.exitcode == 0:
            return killed
        assert child.exitcode == -signal.SIGKILL, f"the rounds ended with {child.exitcode}"


def main(num_rounds=300, num_kills=10):
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain")
        disturbed = Path(folder, "disturbed")
        plain.mkdir()
        disturbed.mkdir()
        run_with_kills(plain, num_rounds, 0)
        killed = run_with_kills(disturbed, num_rounds, num_kills)
        states = [
            train.load_checkpoint(run / "last.pt", "global adapter") for run in (plain, disturbed)
        ]
        assert torch.equal(states[0]["adapter"], states[1]["adapter"]), "the adapters differ"
        logs = [(run / "rounds.jsonl").read_text().splitlines() for run in (plain, disturbed)]
        for a, b in zip(*(map(json.loads, log) for log in logs)):
            assert {k: v for k, v in a.items() if k != "epsilon"} == {
                k: v for k, v in b.items() if k != "epsilon"
            }
        spent = [sum(rounds for *_, rounds in state["accountant"]) for state in states]
        assert spent[0] == num_rounds <= spent[1] <= num_rounds + killed, spent
        usage = np.array([json.loads(line) for line in open(plain / "usage.jsonl")])
        early, late = usage[num_rounds // 3], usage[-1]
        assert late[0] < 1.2 * early[0] + 20 and late[1] <= early[1], "memory or files grow"
        outcomes = [bool(json.loads(line)["aborted"]) for line in logs[0]]
        print(
            f"{num_rounds} rounds, {killed} kills: same adapter; {sum(outcomes)} rounds aborted; "
            f"rounds counted in epsilon {spent[0]} and {spent[1]}; "
            f"memory {early[0]:.0f} to {late[0]:.0f} MiB"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
