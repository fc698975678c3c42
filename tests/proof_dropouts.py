"""Every way to drop out: the sum is exactly the survivors', or the round aborts.

    python tests/proof_dropouts.py

With up to 6 clients, each stays or drops out before any stage: all 5^n assignments. With up to 12,
every subset drops out before every stage, on complete and on regular graphs (10 minutes in all).
`test_privacy.py` runs the small cases.
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
    """A stand-in for x25519, not secret but 1000 times faster: both ends get scalar * scalar * 9."""
    product = int.from_bytes(scalar, "little") * int.from_bytes(point, "little")
    return (product % privacy.PRIME).to_bytes(32, "little")


def every_fate(n):
    """Each of n clients stays or drops out before one of the stages."""
    for fates in itertools.product((None, *STAGES), repeat=n):
        yield {stage: [i for i in range(n) if fates[i] == stage] for stage in STAGES}


def every_subset(n, sizes):
    """Every subset of n clients of these sizes drops out before every stage."""
    for stage, size in itertools.product(STAGES, sizes):
        for clients in itertools.combinations(range(n), size):
            yield {stage: clients}


def expected_survivors(params, drop):
    """Who is in the sum, or None for an abort: the protocol's rules, written independently of it."""
    clients = range(params.num_clients)
    holders = {i: {i, *params.neighbors_of(i)} for i in clients}
    reach = params.degree // 2
    rows = []  # with all of one row absent, the rest of the circle may be in two parts
    if params.degree < params.num_clients - 1:
        for start in clients:
            places = [(start + k) % params.num_clients for k in range(reach)]
            rows.append({params.circle[place] for place in places})

    def may_go_on(present):
        return len(present) >= params.min_survivors and all(row & present for row in rows)

    present = set(clients) - set(drop.get("advertise", ()))
    for stage in STAGES[1:]:
        if not may_go_on(present):
            return None
        # a client with too few share holders among those who are left leaves, too
        enough = {i for i in present if len(holders[i] & present) >= params.threshold}
        if stage == "mask":
            shared = present
        if stage == "unmask":
            masked = present
        present = enough - set(drop.get(stage, ()))
    recoverable = all(len(holders[i] & present) >= params.threshold for i in shared)
    return sorted(masked) if recoverable else None


def check(n, drop, neighbors=None):
    """One round with these dropouts; AssertionError unless it ends as it must.

    Returns whether it gave a sum.
    """
    params = privacy.RoundParams(n, 3, None, neighbors)
    vectors = np.random.default_rng(0).integers(0, 2**32, (n, 3), dtype=np.uint32)
    expected = expected_survivors(params, drop)
    try:
        total, survivors = privacy.run_protocol(params, dict(enumerate(vectors)), drop)
    except privacy.AggregationAborted:
        assert expected is None, f"{n} clients, {drop}: aborted without need"
        return False
    assert survivors == expected, f"{n} clients, {drop}: {survivors}, not {expected}"
    assert np.array_equal(total, vectors[survivors].sum(0, dtype=np.uint32)), (n, drop)
    return True


def check_all(title, n, drops, neighbors=None):
    start = time.perf_counter()
    finished = [check(n, drop, neighbors) for drop in drops]
    assert any(finished) and not all(finished)
    aborts = len(finished) - sum(finished)
    seconds = time.perf_counter() - start
    print(
        f"{n:2d} clients, {title}: {len(finished)} rounds, {sum(finished)} exact sums, "
        f"{aborts} aborts, {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    privacy.x25519 = toy_agreement
    for n in range(2, 7):
        check_all("every fate of each", n, every_fate(n))
    for n in range(2, 13):
        check_all("every subset at every stage", n, every_subset(n, range(n + 1)))
    for n, neighbors in ((6, 4), (9, 4), (12, 6)):
        title = f"every subset at every stage, {neighbors} neighbours"
        check_all(title, n, every_subset(n, range(n + 1)), neighbors)
