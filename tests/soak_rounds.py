"""Rounds that are killed and resumed, again and again: python tests/soak_rounds.py [ROUNDS KILLS]

A tiny model on 8 clients, 20 % dropouts at random stages, 5 % throwing clients, secure sums: once undisturbed, once
killed with SIGKILL and resumed (300 rounds and 10 times by default). Both must end with the same adapter, bit for bit,
the same log, and neither may leak memory, file descriptors or processes.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fed
import train
from test_fed import SAMPLING, adapted_model, clients_of

CLIENTS = 8


def throwing(client, number):
    """`client`, but that every twentieth of its batches is a disk error; which ones follows from the round's seed."""
    def draw(batch_size, num_frames, generator):
        if generator.initial_seed() % 20 == 0:
            raise OSError(f"clip {number} is gone")
        return client.draw(batch_size, num_frames, generator)

    return dataclasses.replace(client, draw=draw)


def run_rounds(folder, num_rounds):
    """The federated stage in `folder`, from where it stopped; returns what a probe of memory and files saw each round."""
    torch.set_num_threads(1)
    config = train.load_config(train.DEFAULTS, [], [
        f"fed.rounds={num_rounds}", f"data.clients={CLIENTS}", "fed.dropout_rate=0.2", "fed.local_epochs=0.2",
        "fed.batch_size=1", "fed.num_frames=6", "fed.gamma=0.0", "privacy.noise_multiplier=0.0", "privacy.min_honest=2",
        "loss.identity=0.0", "loss.perceptual=0.0", "loss.sync=0.0"])
    config["sampling"] = SAMPLING
    model, usage, write_round = adapted_model(), [], train.write_round
    clients = {c.name: throwing(c, i) for i, c in enumerate(clients_of(model, CLIENTS))}

    def watched(record, state, run):  # resident memory [MiB] and open files
        write_round(record, state, run)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        usage.append([pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd"))])

    train.write_round = watched
    with train.claimed(folder):
        train.federate(model, None, clients, config, folder, 1.0, fed.Workers())
    train.write_round = write_round
    return np.array(usage)


def killed_rounds(folder, num_rounds, stops, rng):
    """The same in child processes, killed when the log has as many lines as each of `stops`, and resumed."""
    log = folder / "rounds.jsonl"
    for stop in [*stops, None]:
        child = multiprocessing.get_context("fork").Process(target=run_rounds, args=(folder, num_rounds))
        child.start()
        while child.is_alive():
            if stop and log.exists() and len(log.read_text().splitlines()) >= stop:
                time.sleep(rng.uniform(0, 0.2))  # anywhere in a round, also while a checkpoint is written
                child.kill()
                break
            time.sleep(0.01)
        child.join()
        assert child.exitcode == (-signal.SIGKILL if stop else 0), f"exit {child.exitcode}"


def soak(num_rounds, num_kills):
    """Run both, compare, and return the undisturbed run's usage [rounds, 2]."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        calm, hurt = Path(temporary) / "calm", Path(temporary) / "hurt"
        calm.mkdir(), hurt.mkdir()
        killed_rounds(hurt, num_rounds, sorted(rng.choice(np.arange(1, num_rounds), num_kills, replace=False)), rng)
        usage = run_rounds(calm, num_rounds)  # last: what is forked has started no thread yet
        states = [torch.load(folder / "last.pt", weights_only=True) for folder in (calm, hurt)]
        assert not list(hurt.glob(".[0-9]*")), "a half-written file was left"
        assert states[0]["round"] == states[1]["round"] == num_rounds
        assert torch.equal(states[0]["adapter"], states[1]["adapter"]), "the adapters differ"
        logs = [[json.loads(line) for line in (f / "rounds.jsonl").read_text().splitlines()] for f in (calm, hurt)]
        for a, b in zip(*logs, strict=True):
            assert (a["round"], a["dropouts"], a["validation_loss"]) == (b["round"], b["dropouts"], b["validation_loss"])
        reasons = [gone["reason"] for record in logs[0] for gone in record["dropouts"]]
        print(f"{num_rounds} rounds, {num_kills} kills: same adapter, {len(reasons)} dropouts of which "
              f"{sum('is gone' in r for r in reasons)} threw, {sum('skipped' in r for r in logs[0])} rounds skipped")
    return usage


if __name__ == "__main__":
    rounds, kills = (int(n) for n in sys.argv[1:]) if len(sys.argv) > 1 else (300, 10)
    memory, files = soak(rounds, kills).T
    first, last = memory[len(memory) // 20:len(memory) // 4], memory[-len(memory) // 4:]
    print(f"memory: {np.median(first):.0f} MiB in the first quarter, {np.median(last):.0f} in the last; "
          f"open files: {files[0]:.0f} at first, {files[-1]:.0f} at last")
    assert np.median(last) < 1.05 * np.median(first) and files[-1] <= files[0]
