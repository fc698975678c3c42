"""Speed of privacy.py on one core: python tests/bench_privacy.py [accountant complete regular dropouts thousand skellam]

Client seconds are one client's share + mask + unmask; server seconds are everything that the server object does.
"""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import privacy


class Stopwatch:
    """Adds up the CPU seconds of every call to the methods of one class."""

    def __init__(self, owner, names):
        self.seconds, self.calls = 0.0, defaultdict(float)
        self.saved = {name: getattr(owner, name) for name in names}
        self.owner = owner

    def __enter__(self):
        for name, method in self.saved.items():
            setattr(self.owner, name, self._timed(name, method))
        return self

    def __exit__(self, *_):
        for name, method in self.saved.items():
            setattr(self.owner, name, method)

    def _timed(self, name, method):
        def timed(*args):
            start = time.process_time()
            try:
                return method(*args)
            finally:
                self.calls[name] += time.process_time() - start
                self.seconds += time.process_time() - start
        return timed


def aggregate(n, length, threshold, neighbors=None, dropped=0):
    """One round of n clients with the same vector, so that memory holds one; prints seconds a client and server."""
    terms = privacy.Terms(n, length, threshold, neighbors, min_survivors=n // 2 + 1, largest=2 ** 20)
    vector = np.arange(length, dtype=np.uint32) % 1000
    drop = {"mask": [i * n // dropped for i in range(dropped)] if dropped else []}
    stages = ("__init__", "advertise", "share", "mask", "unmask")
    start = time.perf_counter()
    with (Stopwatch(privacy.SecureAggregationClient, stages) as client,
          Stopwatch(privacy.SecureAggregationServer, ("receive", "close")) as server):
        total, survivors = privacy.run_protocol(terms, lambda i: vector, drop)
    assert len(survivors) == n - dropped and (total == np.uint32(len(survivors)) * vector).all()
    print(f"n={n} d={length} neighbors={neighbors or n - 1} dropped={dropped}: client {client.seconds / n:.3f} s "
          f"({', '.join(f'{k} {v / n * 1e3:.0f} ms' for k, v in client.calls.items())}), server {server.seconds:.2f} s, "
          f"all {time.perf_counter() - start:.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def accountant():
    for q, z in ((1e-3, 0.3), (1e-3, 1.1), (0.01, 0.3), (0.01, 1.1), (0.3, 0.7), (0.5, 20.0)):
        seconds = []
        for repeat in range(20):
            privacy._round_rdp.cache_clear()
            start = time.process_time()
            epsilon = privacy.compute_epsilon(q, z, 1000, 1e-6)
            seconds.append(time.process_time() - start)
        print(f"compute_epsilon q={q} z={z}: epsilon {epsilon:.4f}, median {np.median(seconds) * 1e3:.1f} ms, "
              f"best {min(seconds) * 1e3:.1f} ms")


def skellam():
    for n in (16, 100, 1000):
        settings = dict(clip_norm=1.0, noise_multiplier=1.1, length=100_000, num_clients=n, min_honest=n // 2 + 1)
        for name in ("gaussian", "skellam"):
            mechanism = privacy.Mechanism(mechanism=name, **settings)
            spending = mechanism.spending(0.01)
            accountant = privacy.Accountant()
            accountant.spend(rounds=1000, **spending)
            start = time.process_time()
            mechanism.encode(np.zeros(mechanism.coordinates))
            print(f"{name} n={n} z=1.1 q=0.01 1000 rounds: epsilon {accountant.epsilon(1e-6):.4f}, noise "
                  f"{mechanism.client_std:.0f} steps a client, encoding 1e5 values {time.process_time() - start:.3f} s")


BENCHES = {
    "accountant": accountant,
    "skellam": skellam,
    "complete": lambda: aggregate(100, 100_000, 51),
    "regular": lambda: aggregate(100, 1_000_000, 11, 20),
    "dropouts": lambda: aggregate(100, 1_000_000, 11, 20, dropped=10),
    "thousand": lambda: aggregate(1000, 10_000, 33, 64),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()
