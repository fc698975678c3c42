"""Every way to drop out, tried: the sum is exactly that of the survivors, or the round aborts: python tests/proof_dropouts.py

Up to 6 clients: each stays or drops before any stage, all 5^n assignments. Up to 12 clients: every subset drops before
every stage, on complete and on regular graphs. `test_privacy.py` runs the small cases.
"""
import itertools
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import privacy
from privacy import STAGES


def toy_agreement(scalar, point):
    """A stand-in for x25519 a thousand times faster and not secret at all: both sides get scalar * scalar * 9."""
    return (int.from_bytes(scalar, "little") * int.from_bytes(point, "little") % privacy._P).to_bytes(32, "little")


def every_fate(n):
    """Each of n clients stays or drops before one of the stages."""
    for fates in itertools.product((None, *STAGES), repeat=n):
        yield {stage: [i for i in range(n) if fates[i] == stage] for stage in STAGES}


def every_subset(n, sizes):
    """Every subset of n clients of these sizes drops before every stage."""
    for stage, size in itertools.product(STAGES, sizes):
        for clients in itertools.combinations(range(n), size):
            yield {stage: clients}


def can_finish(terms, keyed, shared, masked, unmasked):
    """What must hold of those who are left after each stage, written down independently of the protocol's own checks."""
    enough = len(masked) >= terms.min_survivors
    recoverable = all(len({i, *terms.neighbours(i)} & unmasked) >= terms.threshold for i in shared)
    if terms.degree == terms.num_clients - 1:
        return enough and recoverable
    reach = terms.degree // 2  # with as many absent in a row, the rest of the ring may be in two parts
    rows = [{terms.ring[(start + k) % terms.num_clients] for k in range(reach)} for start in range(terms.num_clients)]
    return enough and recoverable and all(row & masked for row in rows)


def check(n, drop, neighbors=None):
    """One round with these dropouts; AssertionError unless it ends as it must. Returns whether it gave a sum."""
    degree = n - 1 if neighbors is None else neighbors
    terms = privacy.Terms(n, 3, (degree + 1) // 2 + 1, neighbors, largest=2 ** 20)
    values = np.random.default_rng(0).integers(0, 2 ** 32, (n, 3), dtype=np.uint32)
    left, alive = [], set(range(n))
    for stage in STAGES:
        alive = alive - set(drop.get(stage, ()))
        left.append(alive)
    try:
        total, survivors = privacy.run_protocol(terms, values.__getitem__, drop)
    except privacy.AggregationAborted:
        assert not can_finish(terms, *left), f"{n} clients, {drop}: aborted without need"
        return False
    assert can_finish(terms, *left), f"{n} clients, {drop}: went on with too few"
    assert survivors == sorted(left[2]) and np.array_equal(total, values[survivors].sum(0, dtype=np.uint32)), (n, drop)
    return True


def check_all(title, n, drops, neighbors=None):
    start = time.perf_counter()
    finished = [check(n, drop, neighbors) for drop in drops]
    assert any(finished) and not all(finished)
    print(f"{n:2d} clients, {title}: {len(finished)} rounds, {sum(finished)} exact sums, {len(finished) - sum(finished)} "
          f"aborts, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    privacy.x25519 = toy_agreement
    for n in range(2, 7):
        check_all("every fate of each", n, every_fate(n))
    for n in range(2, 13):
        check_all("every subset at every stage", n, every_subset(n, range(n + 1)))
    for n, neighbors in ((6, 4), (9, 4), (12, 6)):
        check_all(f"every subset at every stage, {neighbors} neighbours", n, every_subset(n, range(n + 1)), neighbors)
