"""Seconds of privacy.py on one core: python tests/bench_privacy.py

The protocol's figures are those of one process that simulates all clients and the server. A real
client computes all of its own key agreements, of which the simulation spares one end of each pair.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import privacy


def accountant():
    for q, z in ((1e-3, 0.3), (0.01, 1.1), (0.3, 0.7), (0.5, 20.0), (1.0, 0.3)):
        privacy.round_rdp.cache_clear()
        start = time.process_time()
        epsilon = privacy.compute_epsilon(q, z, 1000, 1e-6)
        seconds = time.process_time() - start
        print(f"epsilon of 1000 rounds at rate {q}, noise {z}: {epsilon:.4f} in {seconds:.3f} s")


def key_agreement():
    start = time.process_time()
    for _ in range(100):
        privacy.x25519(os.urandom(32), privacy.BASE_POINT)
    print(f"x25519: {(time.process_time() - start) * 10:.2f} ms")


def protocol(n, length, neighbors, num_dropped=0):
    params = privacy.RoundParams(n, length, None, neighbors)
    vectors = {i: np.full(length, i, np.uint32) for i in range(n)}
    dropped = list(range(0, n, n // num_dropped))[:num_dropped] if num_dropped else []
    start = time.process_time()
    total, survivors = privacy.run_protocol(params, vectors, {"mask": dropped})
    seconds = time.process_time() - start
    assert len(survivors) == n - num_dropped and (total == sum(survivors)).all()
    print(
        f"{n} clients, {length} values, degree {params.degree}, {num_dropped} dropped out: "
        f"{seconds:.2f} s, {params.num_bytes() / 1000:.1f} kB a client"
    )


if __name__ == "__main__":
    accountant()
    key_agreement()
    protocol(100, 2000, 34)
    protocol(100, 2000, 34, num_dropped=20)
    protocol(100, 2000, None)
    protocol(100, 100_000, 34)
    protocol(750, 2000, privacy.choose_neighbors(750))
