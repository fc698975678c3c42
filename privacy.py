"""Client-level differential privacy, secure aggregation, and an audit of both.

Threat model: an honest-but-curious server together with up to `num_curious` clients, dropouts at
every stage, and everybody who sees released models. Not covered: a server that deviates from the
protocol (invented clients, different rosters or survivor lists for different clients), poisoned
updates, side channels such as timing, and whatever leaves a client outside of the masked vector.

Adjacency is zero-out: one client's vector, or zeros in its place. Who takes part in a round is
public; what a participant sends is protected. So the size of a cohort, the variance of the noise
and an abort may be public, as none of them depends on a client's data.

    python privacy.py --clients 100 200 400 --rate 1 --rounds 2 --noise 2.83 --delta 1e-5
    python privacy.py --clients 1000 --rate 0.01 --rounds 1000 --target-epsilon 8 --delta 1e-6
    python privacy.py --clients 100 --noise 2.83 --audit
    python privacy.py --verify runs/NAME
"""

import argparse
import collections
import copy
import functools
import hashlib
import hmac
import itertools
import json
import math
import os
import random
import secrets
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

# ---------------------------------------------------------------- accounting
# One client's vector moves the sum by at most the sensitivity S; in units of S the noise has the
# standard deviation z = noise_multiplier. A client joins a round with probability q = sample_rate.
# With its vector the sum is distributed as (1 - q) N(0, z^2) + q N(1, z^2); with zeros in place of
# the vector, as N(0, z^2). Add-or-remove adjacency has the same pair of distributions. The larger
# of their two divergences is that of the mixture from the Gaussian (Mironov, Talwar and Zhang 2019,
# Thm. 4 and 5, arXiv:1908.10530).

ORDERS = (
    *(1.01, 1.02, 1.05),
    *(1 + i / 10 for i in range(1, 100)),
    *range(11, 64),
    *(round(2 ** (i / 8)) for i in range(48, 81)),  # 64 to 1024
)
LEAST_NOISE = 1e-6  # a smaller noise_multiplier counts as none: epsilon would exceed 1e11


def check_delta(delta, num_clients=1):
    """Raise ValueError unless 0 < delta < 1 / num_clients.

    At delta = 1 / num_clients, publishing one random client's data would count as private.
    """
    if not 0 < delta < 1 / num_clients:
        raise ValueError(f"delta is above 0 and below {1 / num_clients:g}, not {delta}.")


def gaussian_epsilon(z, delta):
    """Return the exact epsilon of one unsampled Gaussian release of noise multiplier z.

    Balle and Wang 2018, Thm. 8, arXiv:1805.06530. Raises ValueError unless 0 < delta < 1.
    """
    check_delta(delta)
    if z < LEAST_NOISE:
        return math.inf

    def excess(epsilon):
        second = math.exp(min(0.0, epsilon + special.log_ndtr(-0.5 / z - epsilon * z)))
        return special.ndtr(0.5 / z - epsilon * z) - second - delta

    if z == math.inf or excess(0.0) <= 0:
        return 0.0
    upper = 0.5 / z**2 - special.ndtri(delta) / z  # here the first term of excess is delta
    return float(optimize.brentq(excess, 0.0, upper))


def sampled_rdp(q, z, order):
    """Return the Renyi DP of one Poisson-sampled Gaussian round at an order > 1, by quadrature.

    log E[(1 + u)^order] / (order - 1) with x ~ N(0, z^2) and u = q (r - 1), where r is the ratio of
    the densities of N(1, z^2) and N(0, z^2) at x (Mironov et al. 2019, Thm. 4). As u has mean 0,
    E[(1 + u)^order] - 1 is the mean of (1 + u)^order - 1 - order u, which is nowhere negative, so
    that no digits cancel in the sum. Its branch points lie at a distance of pi z^2 from the real
    line, at the x where the two parts of the mixture are equal. A sinh substitution places the
    points densely near this x and sparsely elsewhere, which keeps the exponential convergence of
    the trapezoid rule.
    """
    crossing = 0.5 + z**2 * (math.log1p(-q) - math.log(q))
    low = -10 * z - crossing
    high = order + 10 * z - crossing
    width = math.pi * z**2
    step = min(0.3, 0.8 * z / math.hypot(width, max(-low, high)))  # at most 0.8 z between points
    t = np.arange(math.asinh(low / width), math.asinh(high / width) + step, step)  # [points]
    x = crossing + width * np.sinh(t)
    spacing = width * np.cosh(t) * step  # dx
    log_weight = np.log(spacing / (z * math.sqrt(2 * math.pi))) - 0.5 * (x / z) ** 2
    log_ratio = (2 * x - 1) / (2 * z**2)  # log r; exp overflows beyond 700: there 1 + u = q r
    u = q * np.expm1(np.minimum(log_ratio, 700))
    # log (1 + u)^order
    power = order * np.where(log_ratio < 700, np.log1p(u), math.log(q) + log_ratio)
    excess = np.expm1(np.minimum(power, 700)) - order * u
    # where that overflows, (1 + u)^order alone, a close upper bound
    log_integrand = np.where(power < 700, np.log(np.maximum(excess, 1e-300)), power)
    # initial = 0 is log 1: it adds the 1 that was subtracted from the integrand
    return np.logaddexp.reduce(log_integrand + log_weight, initial=0.0) / (order - 1)


@functools.lru_cache(maxsize=64)
def round_rdp(q, z, orders):
    """Return the Renyi DP of one Poisson-sampled Gaussian round, [orders]."""
    if q == 0:
        return np.zeros(len(orders))
    if z < LEAST_NOISE:
        return np.full(len(orders), math.inf)
    rdp = np.array(orders) / (2 * z**2)  # not sampled: Mironov 2017, Prop. 7, arXiv:1702.07476
    for k, order in enumerate(orders):
        # At other orders the bound without sampling stays, which is valid, too.
        if q < 1 and order < 2000 * z and z >= 0.01:
            rdp[k] = min(rdp[k], sampled_rdp(q, z, order))
    return rdp


@dataclass
class Accountant:
    """The rounds spent so far as rows [sample_rate, noise_multiplier, rounds], for checkpoints.

    Raises ValueError for rows out of range. After a round without noise epsilon stays infinite.
    """

    history: list = field(default_factory=list)

    def __post_init__(self):
        rows = self.history  # of a checkpoint: checked like new ones
        self.history = []
        for row in rows:
            self.spend(*row)

    def spend(self, sample_rate, noise_multiplier, rounds=1):
        """Add rounds; call it before they start, as they count even if their sum never arrives."""
        if not 0 <= sample_rate <= 1:
            raise ValueError(f"sample_rate is a probability in [0, 1], not {sample_rate}.")
        if not 0 <= noise_multiplier < 1e100:
            raise ValueError(f"noise_multiplier is from 0 to 1e100, not {noise_multiplier}.")
        if not (0 <= rounds <= 1e12 and rounds == int(rounds)):
            raise ValueError(f"rounds is a whole number up to 1e12, not {rounds}.")
        row = [float(sample_rate), float(noise_multiplier), int(rounds)]
        if self.history and self.history[-1][:2] == row[:2]:
            self.history[-1][2] += row[2]
        else:
            self.history.append(row)

    @property
    def num_rounds(self):
        return sum(rounds for _, _, rounds in self.history)

    def epsilon(self, delta, orders=None):
        """Return epsilon against an adversary who does not know which clients joined, or how many.

        (If it knows that p of n clients joined, the result for rate p / n is too small, because
        without this client another one would have joined. Account with rate 1 then, as for fixed
        cohorts.)
        orders > 1: the least Renyi bound at these orders; None: the least of the Renyi bounds at
        ORDERS and the exact bound without sampling. Raises ValueError unless 0 < delta < 1.
        """
        unsampled = self.epsilon_known_cohorts(delta) if orders is None else math.inf
        orders = ORDERS if orders is None else tuple(orders)
        if not orders or not all(1 < order < math.inf for order in orders):
            raise ValueError("orders are one or more finite numbers above 1.")
        check_delta(delta)
        rdp = np.zeros(len(orders))
        for sample_rate, noise_multiplier, rounds in self.history:
            if rounds:
                rdp = rdp + rounds * round_rdp(sample_rate, noise_multiplier, orders)
        order = np.asarray(orders, float)
        # Canonne, Kamath and Steinke 2020, Prop. 12, arXiv:2004.00010
        epsilon = rdp + np.log1p(-1 / order) - np.log(delta * order) / (order - 1)
        return float(max(0.0, min(epsilon.min(), unsampled)))

    def epsilon_known_cohorts(self, delta, participations=None):
        """Return epsilon against an adversary who knows every cohort, as server and clients do.

        A round reveals something only about the clients in it. participations = the most rounds
        that any client is in (None: all), assumed to be the rounds with the least noise. Gaussian
        releases compose to one Gaussian, so this is exact (Dong, Roth and Su 2019, Cor. 3.3,
        arXiv:1905.02383).
        """
        left = math.inf if participations is None else participations
        precision = 0.0  # sum of 1 / z^2
        for sample_rate, z, rounds in sorted(self.history, key=lambda row: row[1]):
            taken = min(rounds, left) if sample_rate > 0 else 0  # at rate 0 nobody takes part
            left -= taken
            if taken:
                precision += taken / z**2 if z >= LEAST_NOISE else math.inf
        return gaussian_epsilon(precision**-0.5 if precision else math.inf, delta)


def compute_epsilon(sample_rate, noise_multiplier, rounds, delta, orders=None):
    """Return the epsilon of equal rounds; arguments, ranges and errors as in `Accountant`."""
    accountant = Accountant([[sample_rate, noise_multiplier, rounds]])
    return accountant.epsilon(delta, orders)


def find_noise_multiplier(target_epsilon, delta, sample_rate, rounds):
    """Return the least noise_multiplier, from 0.01 on, whose epsilon is at most target_epsilon.

    It is exact to 1e-5 relative. With sample_rate 1 the target also holds against an adversary who
    knows the cohorts. Raises ValueError unless target_epsilon is finite, above 0 and reached by a
    noise_multiplier of 1e5.
    """
    low = 1e-2
    high = 1e5
    least = compute_epsilon(sample_rate, high, rounds, delta)
    if not (0 < target_epsilon < math.inf and least <= target_epsilon):
        raise ValueError(f"No noise keeps epsilon {target_epsilon} at delta {delta}.")
    while high / low > 1 + 1e-5:  # bisection on a log scale: epsilon falls with the noise
        middle = math.sqrt(low * high)
        if compute_epsilon(sample_rate, middle, rounds, delta) <= target_epsilon:
            high = middle
        else:
            low = middle
    return high


def new_sampling_key():
    """Return 32 random bytes; sampling amplifies privacy only while they are secret."""
    return secrets.token_bytes(32)


def draw_cohort(num_clients, sample_rate, key, round_index, fixed_size=False):
    """Return the sorted indices [k] of the clients in a round.

    Each joins with probability sample_rate, independently (Poisson sampling). With fixed_size
    exactly that share of the clients joins, at least one. Account for fixed cohorts with rate 1:
    `Accountant` has amplification for Poisson sampling only.
    """
    if not (isinstance(key, bytes) and len(key) == 32):
        raise ValueError("key is 32 bytes from new_sampling_key().")
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"sample_rate is in [0, 1], not {sample_rate}.")
    stream = hashlib.shake_256(b"cohort|%d|" % round_index + key).digest(8 * num_clients)
    uniform = (np.frombuffer(stream, "<u8") >> np.uint64(11)) * 2.0**-53  # [clients] in [0, 1)
    if fixed_size:
        size = max(1, round(sample_rate * num_clients))
        return np.sort(np.argsort(uniform, kind="stable")[:size])
    return np.flatnonzero(uniform < sample_rate)


def most_participations(cohorts, num_spent=0):
    """Return an upper bound of the number of rounds that any one client was in.

    That is its rounds in `cohorts` [[k]], plus all rounds that were spent beyond them: it is not
    recorded which of the rounds were killed and repeated.
    """
    counts = np.bincount(np.concatenate([np.zeros(0, int), *cohorts]).astype(int))
    return int(counts.max(initial=0)) + max(0, num_spent - len(cohorts))


def likely_participations(num_clients, sample_rate, rounds):
    """Return a number of rounds that, with a probability of at least 0.99, no client exceeds under
    Poisson sampling (union bound).
    """
    return int(stats.binom.isf(0.01 / num_clients, rounds, sample_rate))


# ---------------------------------------------------------------- clip, weight, noise

NOISE_TAIL = 12  # room for the noise in standard deviations; one value in 3e32 wraps around


def clip_update(update, clip_norm):
    """Return the update [d], scaled down to an L2 norm of at most clip_norm.

    Raises ValueError if it is not finite.
    """
    update = np.asarray(update, np.float64)
    norm = float(np.linalg.norm(update))
    if not math.isfinite(norm):
        raise ValueError("The update's norm is not finite.")
    return update * min(1.0, clip_norm / max(norm, 1e-300))


def gaussian_noise(std, count, key=None):
    """Return `count` values of N(0, std^2), rounded to whole numbers; std up to 2^31.

    The random bits are the operating system's, or follow from a key (bytes) in a run without
    privacy. Of 64 bits one is the sign and 63 choose the magnitude, so that the tails reach 9
    standard deviations, and a float64 (exact below 2^53) still resolves the lowest bit of the
    result.
    """
    data = os.urandom(8 * count) if key is None else hashlib.shake_128(key).digest(8 * count)
    words = np.frombuffer(data, np.uint64)
    tail = ((words >> np.uint64(1)) + 0.5) * 2.0**-64  # uniform on (0, 1/2)
    sign = np.where(words & np.uint64(1), 1.0, -1.0)
    return np.rint(std * sign * special.ndtri(tail))


@dataclass
class Mechanism:
    """Encodes a client's update as a vector of 32-bit integers; decodes the mean from their sum.

    A client's vector is [w clip(u), s w] with weight w in [0, 1] and s = weight_scale * clip_norm,
    so its norm is at most S = sqrt(clip_norm^2 + s^2), which is the sensitivity. Rounding to the
    integer grid may lengthen it by sqrt(length + 1) / 2 steps, which are added to S for the noise.

    Noise, with tau = survivor_share: each of p clients of a cohort adds N(0, z^2 S^2 / (tau p)),
    and for m survivors the server adds N(0, z^2 S^2 (p - m) / (tau p)). So the noise on the sum
    always has the variance z^2 S^2 / tau, which does not reveal how many clients stayed. The server
    knows its own part. The variance unknown to it is z^2 S^2 m / (tau p), minus the parts of
    num_curious clients that may help it; with at least tau p + num_curious survivors it is z^2 S^2
    or more. Raises ValueError for settings that are out of range or do not fit 32 bits. To change a
    setting, make a new mechanism with `replace`, as step and noise are computed once.
    """

    clip_norm: float  # largest L2 norm of an update in the sum
    noise_multiplier: float  # z = standard deviation of the noise unknown to the server / S
    length: int  # values of an update
    num_clients: int  # of the federation: all of them may be in one sum
    weight_scale: float  # s / clip_norm
    min_weight: float  # lower limit of the sum of weights that the mean divides by
    survivor_share: float  # tau, in (1/2, 1]
    num_curious: int = 0  # clients that may help the server
    seed: int | None = None  # reproducible noise; the run then has no privacy

    def __post_init__(self):
        for name in ("clip_norm", "weight_scale", "min_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is finite and above 0, not {getattr(self, name)}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is finite and >= 0, not {self.noise_multiplier}.")
        if not 0.5 < self.survivor_share <= 1:
            raise ValueError(f"survivor_share is in (0.5, 1], not {self.survivor_share}.")
        if not (self.length >= 1 and self.num_clients >= 1 and self.num_curious >= 0):
            raise ValueError("length and num_clients are at least 1, num_curious at least 0.")
        self.sensitivity = self.clip_norm * math.hypot(1, self.weight_scale)
        # The finest step, in units of an update, at which the sum of num_clients vectors and all
        # noise fit in 32 bits: num_clients (largest / step + 1) + tail (S / step + rounding)
        # is below 2^31.
        rounding = math.sqrt(self.length + 1) / 2  # in steps
        largest = self.clip_norm * max(1.0, self.weight_scale)  # of an upload's coordinates
        # Standard deviation of the sum's noise / S.
        relative_std = self.noise_multiplier / math.sqrt(self.survivor_share)
        tail = NOISE_TAIL * relative_std
        room = 2.0**31 - 1 - self.num_clients - tail * rounding
        if not room > 0:
            raise ValueError(f"{self.num_clients} clients with this noise overflow 32 bits.")
        self.step = (self.num_clients * largest + tail * self.sensitivity) / room
        self.total_std = relative_std * (self.sensitivity / self.step + rounding)  # in steps
        # Up to an error of exp(-pi^2 4^2) < 1e-68 (Poisson summation), the sum of n rounded
        # Gaussians of std >= 4 steps is distributed as the rounded sum of n Gaussians and n - 1
        # uniform numbers in +-1/2. This is post-processing of the Gaussian sum, so its guarantee
        # holds.
        if 0 < self.total_std < 4 * math.sqrt(self.num_clients):
            raise ValueError(
                f"With {self.num_clients} clients 32 bits are too coarse for the noise."
            )

    def min_survivors(self, cohort_size):
        """Return how many clients of a cohort must survive for their sum to be opened."""
        # 1e-9: 0.55 * 100 is a little more than 55 in floating point
        return math.ceil(self.survivor_share * cohort_size - 1e-9) + self.num_curious

    def noise_std(self, cohort_size):
        """Return the standard deviation of one client's noise, in units of an update."""
        return self.total_std * self.step / math.sqrt(cohort_size)

    def encode(self, update, weight, cohort_size, context=None):
        """Return one client's upload, uint32 [length + 1]: clipped, weighted, rounded, with noise.

        A client whose training failed sends zeros with weight 0. In a seeded run each context
        (round, client) has noise of its own. Raises ValueError for an update that is not finite or
        a weight outside of [0, 1], for which the sensitivity would not hold.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"A weight is in [0, 1], not {weight}.")
        if np.shape(update) != (self.length,):
            raise ValueError(f"An update has {self.length} values, not {np.shape(update)}.")
        if not 1 <= cohort_size <= self.num_clients:
            raise ValueError(f"A cohort has 1 to {self.num_clients} clients, not {cohort_size}.")
        clipped = clip_update(update, self.clip_norm)
        scaled_weight = self.weight_scale * self.clip_norm * weight
        vector = np.append(weight * clipped, scaled_weight)  # [length + 1]
        noise = self._noise(self.total_std / math.sqrt(cohort_size), context)
        steps = np.rint(vector / self.step) + noise  # whole numbers, exact in float64
        return steps.astype(np.int64).astype("<u4")  # negative numbers as 2^32 - |number|

    def decode(self, total, cohort_size, num_survivors, context=None):
        """Return (mean update float64 [length], sum of weights) from the sum uint32 [length + 1].

        Adds the server's share of the noise; all else is post-processing of the noisy sum. Raises
        ValueError for fewer survivors than `min_survivors`.
        """
        if not self.min_survivors(cohort_size) <= num_survivors <= cohort_size:
            raise ValueError(f"{num_survivors} survivors of {cohort_size} add too little noise.")
        top_up = self.total_std * math.sqrt((cohort_size - num_survivors) / cohort_size)
        total = np.asarray(total).astype("<u4")  # of wider integers the lowest 32 bits count
        values = (total.view("<i4") + self._noise(top_up, context)) * self.step  # [length + 1]
        weight = float(values[-1]) / (self.weight_scale * self.clip_norm)
        # the noisy sum of weights may be close to 0 or below
        return values[:-1] / max(weight, self.min_weight), weight

    def _noise(self, std, context):
        if std == 0:
            return np.zeros(self.length + 1)
        if self.seed is None:
            return gaussian_noise(std, self.length + 1)
        if context is None:
            raise ValueError("A seeded mechanism needs a context, or it repeats its noise.")
        return gaussian_noise(std, self.length + 1, repr((self.seed, context)).encode())


# ---------------------------------------------------------------- secure aggregation: tools
# Bonawitz et al. 2017 (doi:10.1145/3133956.3133982, Fig. 4: double masking) on the k-regular graph
# of Bell et al. 2020 (doi:10.1145/3372297.3417885), with two changes. (1) There, for the case that
# it drops out, a client shares a second private key. Here it gives the server a sealed list of its
# pair seeds and shares the key of this list. If it drops out, the server learns the same seeds and
# nothing else, and half as many key agreements are needed. (2) Each client commits to its two
# secrets, so that the server notices wrong shares. Keys, seeds and tags have 128-bit strength, like
# Curve25519.

STAGES = ("advertise", "share", "mask", "unmask")
PRIME = 2**255 - 19  # of Curve25519
FIELD = 2**128 - 159  # the largest prime of 128 bits, for Shamir's shares
SECRET = 16  # bytes of a secret, a share of it, a seed or a tag
SMALL_ORDER = (  # points of order 1, 2, 4 and 8, of the curve and of its twist
    *(0, 1, PRIME - 1),
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
BASE_POINT = (9).to_bytes(32, "little")


class AggregationAborted(RuntimeError):
    """Too few clients are left to finish a round safely."""


def x25519(scalar, point):
    """Return the X25519 product of a scalar and a point, 32-byte strings (RFC 7748, Sec. 5).

    Raises ValueError for a point of small order. Not constant-time, as Python's integers are not.
    """
    k = int.from_bytes(scalar, "little") & (2**254 - 8) | 2**254
    low = 2**255 - 1
    u = int.from_bytes(point, "little") & low
    x2, z2 = 1, 0  # 0 times the point: coordinates are x / z
    x3, z3 = u, 1  # 1 times the point; always (x2, z2) plus the point
    last = "0"
    for bit in f"{k:b}":  # the last bit is 0, as k is a multiple of 8: no swap is left over
        if bit != last:
            x2, x3 = x3, x2
            z2, z3 = z3, z2
            last = bit
        a = x2 + z2
        b = x2 - z2
        da = (x3 - z3) * a  # names as in RFC 7748
        cb = (x3 + z3) * b
        # 2^255 = 19 mod PRIME: folding the high bits costs less than % and leaves few of them.
        aa = a * a
        aa = (aa & low) + 19 * (aa >> 255)
        bb = b * b
        bb = (bb & low) + 19 * (bb >> 255)
        s = abs(da + cb)  # squared below: the sign does not matter, and & is slow on negatives
        s = (s & low) + 19 * (s >> 255)
        d = abs(da - cb)
        d = (d & low) + 19 * (d >> 255)
        dd = d * d
        dd = (dd & low) + 19 * (dd >> 255)
        x3 = s * s % PRIME
        z3 = u * dd % PRIME
        e = aa - bb
        x2 = aa * bb % PRIME
        z2 = e * (aa + 121665 * e) % PRIME
    if z2 == 0:
        raise ValueError("A public key of small order was refused.")
    return (x2 * pow(z2, -1, PRIME) % PRIME).to_bytes(32, "little")


def check_public_key(key):
    """Raise ValueError unless key is 32 bytes, canonical and not of small order."""
    if not (isinstance(key, bytes) and len(key) == 32):
        raise ValueError("A public key is 32 bytes.")
    point = int.from_bytes(key, "little")
    if point >= PRIME or point in SMALL_ORDER:
        raise ValueError("A public key is out of range or of small order.")


def derive_key(secret, params, purpose, *clients):
    """Return 64 bytes for one round, purpose and ordered clients: HKDF-SHA512 (RFC 5869)."""
    info = b"PrivFedTalk secure aggregation 2|" + purpose + b"".join(b"|%d" % i for i in clients)
    pseudorandom_key = hmac.digest(params.session, secret, "sha512")
    return hmac.digest(pseudorandom_key, info + b"\x01", "sha512")


def commit(secret, params, owner):
    """Return a commitment of 16 bytes, with which the server recognises this client's secret."""
    return derive_key(secret, params, b"commitment", owner)[:SECRET]


def expand(seed, params):
    """Return a mask, uniform on uint32 [length], from a 16-byte seed by SHAKE-128."""
    assert len(seed) == SECRET
    return np.frombuffer(hashlib.shake_128(seed).digest(4 * params.length), "<u4")


def _xor(key, message):
    stream = hashlib.shake_256(key).digest(len(message))
    return bytes(a ^ b for a, b in zip(message, stream))


def seal(key, message):
    """Return the message encrypted, then authenticated, with a 64-byte key for one message only."""
    sealed = _xor(key[:32], message)
    return sealed + hmac.digest(key[32:], sealed, "sha256")[:SECRET]


def unseal(key, sealed):
    """Return the message that `seal` sealed.

    Raises ValueError if it was sealed with another key or has changed since.
    """
    tag = hmac.digest(key[32:], sealed[:-SECRET], "sha256")[:SECRET]
    if not hmac.compare_digest(tag, sealed[-SECRET:]):
        raise ValueError("A sealed message was forged, reflected, misdirected or damaged.")
    return _xor(key[:32], sealed[:-SECRET])


def new_secret():
    """Return 16 random bytes that represent a number below FIELD."""
    return secrets.randbelow(FIELD).to_bytes(SECRET, "big")


def split_secret(secret, threshold, clients):
    """Return Shamir's shares (1979), {client: value at client + 1 of a random polynomial}."""
    coefficients = [secrets.randbelow(FIELD) for _ in range(threshold - 1)]  # of degree >= 1
    shares = {}
    for i in clients:
        value = 0  # at i + 1, by Horner's rule, modulo FIELD
        for coefficient in (*coefficients, int.from_bytes(secret, "big")):
            value = (value * (i + 1) + coefficient) % FIELD
        shares[i] = value.to_bytes(SECRET, "big")
    return shares


@functools.lru_cache(maxsize=256)
def _lagrange(clients):
    """Return the weights that interpolate a polynomial at 0 from its values at client + 1."""
    weights = []
    for i in clients:
        numerator = math.prod(j + 1 for j in clients if j != i)
        denominator = math.prod(j - i for j in clients if j != i)
        weights.append(numerator * pow(denominator, -1, FIELD) % FIELD)
    return weights


def join_secret(shares, threshold):
    """Yield candidates of the secret, from subsets of the shares {client: share}; the caller keeps
    the one that fits the commitment.

    One subset is enough unless somebody sent a wrong share. Then 1000 random subsets find the
    secret with probability 0.999 if, for example, 6 of 35 shares are wrong at a threshold of 18.
    Raises AggregationAborted for too few shares.
    """
    if len(shares) < threshold:
        raise AggregationAborted(f"{len(shares)} shares arrived, {threshold} are needed.")
    clients = sorted(shares)
    draw = random.Random(0)  # every process must try the same subsets
    for _ in range(1000 if len(clients) > threshold else 1):
        subset = tuple(draw.sample(clients, threshold))
        value = 0
        for weight, i in zip(_lagrange(subset), subset):
            value += weight * int.from_bytes(shares[i], "big")
        yield (value % FIELD).to_bytes(SECRET, "big")


def check_parts(message, sizes, complete=True):
    """Raise ValueError unless message is {client: bytes} with sizes {client: number of bytes}.

    complete: every client in sizes must have a part.
    """
    fits = isinstance(message, dict) and all(
        isinstance(part, bytes) and len(part) == sizes.get(i) for i, part in message.items()
    )
    if not fits or (complete and len(message) != len(sizes)):
        raise ValueError("A message has the wrong form.")


def check_vector(vector, params):
    """Raise ValueError unless vector is uint32 [length]."""
    fits = isinstance(vector, np.ndarray) and vector.shape == (params.length,)
    if not fits or vector.dtype != "<u4":
        raise ValueError("A vector has the wrong form.")


# ---------------------------------------------------------------- secure aggregation: protocol


def choose_neighbors(num_clients):
    """Return the even degree of the graph on which clients share masks; None: complete graph.

    It is the least degree for which three events together have a probability below 1e-4 per round
    (union bound; Bell et al. 2020, Sec. 3.3), if a fifth of the clients drops out and another fifth
    is curious: (a) some client has too few share holders left, so that the round aborts; (b) enough
    of a client's share holders are curious to open both of its secrets; (c) a gap on the circle is
    as wide as half a neighbourhood, which may cut the graph in two. For 100 clients the degree is
    34, and (b) and (c) contribute 2.4e-6. The graph is complete if that degree would save less than
    half of the pairs, which is so below about 50 clients.
    """
    fifth = math.ceil(num_clients / 5)
    for degree in range(4, num_clients // 2, 2):
        threshold = degree // 2 + 1
        others = num_clients - 1
        starved = stats.hypergeom.sf(degree - threshold, others, fifth, degree)  # (a)
        opened = stats.hypergeom.sf(threshold - 1, others, fifth, degree)  # (b)
        cut = stats.hypergeom.pmf(degree // 2, num_clients, 2 * fifth, degree // 2)  # (c)
        if num_clients * (starved + opened + cut) < 1e-4:
            return degree
    return None


class RoundParams:
    """What all parties of a round agree on: a new session, a random graph, sizes.

    The clients are 0 to num_clients - 1. length = values of a vector; threshold = shares that open
    a secret (None: the least majority); neighbors = even degree of the graph (None: complete);
    min_survivors = fewest clients in a sum. Raises ValueError if that is unsafe, and
    AggregationAborted for fewer than two clients.
    """

    def __init__(self, num_clients, length, threshold=None, neighbors=None, min_survivors=0):
        if num_clients < 2:
            raise AggregationAborted(f"the cohort has {num_clients} clients, 2 are needed")
        self.degree = num_clients - 1 if neighbors is None else neighbors
        # More than half of a client's share holders, itself included. Each holder reveals its share
        # of only one of the client's two secrets, so that only one of them can be opened, unless
        # the server tells different holders of different survivors.
        majority = (self.degree + 1) // 2 + 1
        if length < 1:
            raise ValueError("A vector has 1 value or more.")
        if neighbors is not None and not (2 <= neighbors < num_clients and neighbors % 2 == 0):
            raise ValueError(f"neighbors is even, from 2 to {num_clients - 1}, not {neighbors}.")
        if threshold is not None and not majority <= threshold <= self.degree + 1:
            raise ValueError(f"threshold is {majority} to {self.degree + 1}, not {threshold}.")
        self.num_clients = num_clients
        self.length = length
        self.threshold = majority if threshold is None else threshold
        # More than half, so that no two disjoint sets of survivors can both be summed.
        self.min_survivors = max(min_survivors, self.threshold, num_clients // 2 + 1)
        self.session = secrets.token_bytes(32)
        # The circle is random, so that it does not depend on who drops out or is curious.
        self.circle = sorted(
            range(num_clients), key=lambda client: derive_key(b"", self, b"place", client)
        )
        self.place = {client: place for place, client in enumerate(self.circle)}

    def neighbors_of(self, client):
        """Return the nearest clients on the circle, with whom this one shares masks and secrets."""
        first = self.place[client] - self.degree // 2
        nearest = {self.circle[(first + k) % self.num_clients] for k in range(self.degree + 1)}
        return sorted(nearest - {client})

    def num_bytes(self):
        """Return the number of bytes that one client sends in a round without dropouts."""
        shares = self.degree * 3 * SECRET  # of its two secrets, sealed, for each neighbour
        sealed_seeds = self.degree * SECRET + SECRET
        commitments = 2 * SECRET
        opened_shares = (self.degree + 1) * SECRET
        return 32 + shares + sealed_seeds + commitments + 4 * self.length + opened_shares

    def num_bytes_received(self):
        """Return the number of bytes that one client receives in a round without dropouts."""
        shares = self.degree * 3 * SECRET
        survivors = math.ceil(self.num_clients / 8)  # one bit each
        return 32 * self.num_clients + shares + survivors

    def check_present(self, present, client=None):
        """Raise AggregationAborted if too few clients, or share holders of `client`, are present,
        or if a gap on the circle may cut the graph in two.
        """
        if len(present) < self.min_survivors:
            raise AggregationAborted(
                f"{len(present)} clients are left, {self.min_survivors} are needed."
            )
        if client is not None:
            holders = 1 + sum(i in present for i in self.neighbors_of(client))
            if holders < self.threshold:
                raise AggregationAborted(
                    f"{holders} share holders are left, {self.threshold} are needed."
                )
        places = sorted(self.place[i] for i in present)
        gaps = np.diff([*places, places[0] + self.num_clients])
        if self.degree < self.num_clients - 1 and max(gaps) > self.degree // 2:
            raise AggregationAborted("A gap may cut the graph in two.")


class SecureAggregationClient:
    """One client in one round: advertise, share, mask, unmask, once each, in this order.

    A client that refuses a message leaves the round. Raises ValueError for messages that a correct
    server would not send, AggregationAborted if too few other clients are left. `agreed` {pair of
    public keys: secret} is a cache for simulations: both clients of a pair compute the same secret,
    and where one process simulates both, the second looks it up. A real client has no such table.
    """

    def __init__(self, params, index, agreed=None):
        self.params = params
        self.index = index
        self._stages = list(STAGES)
        self._agreed = {} if agreed is None else agreed
        self._self_seed = new_secret()
        self._escrow = new_secret()  # key of the sealed list of our pair seeds
        self._private = secrets.token_bytes(32)
        self._public = x25519(self._private, BASE_POINT)

    def _enter(self, stage):
        in_order = self._stages[:1] == [stage]
        self._stages = self._stages[1:] if in_order else []
        if not in_order:
            raise ValueError(f"{stage!r} came twice or out of order: client {self.index} leaves.")

    def _agree(self, public):
        pair = frozenset((self._public, public))
        if pair not in self._agreed:
            self._agreed[pair] = x25519(self._private, public)
        return self._agreed[pair]

    def advertise(self):
        """Return {self: public key of this round}."""
        self._enter("advertise")
        return {self.index: self._public}

    def share(self, roster):
        """Return {self: sealed pair seeds, two commitments; neighbour: sealed shares of secrets}.

        roster: {client: public key}.
        """
        self._enter("share")
        me = self.index
        params = self.params
        check_parts(roster, dict.fromkeys(params.circle, 32), complete=False)
        params.check_present(roster, me)
        self._roster = set(roster)
        self._peers = [i for i in params.neighbors_of(me) if i in roster]
        keys = {self._public, *(roster[i] for i in self._peers)}
        if roster.get(me) != self._public or len(keys) != len(self._peers) + 1:
            raise ValueError("A public key was changed, repeated or reflected.")
        self_shares = split_secret(self._self_seed, params.threshold, [me, *self._peers])
        escrow_shares = split_secret(self._escrow, params.threshold, [me, *self._peers])
        self._held = {me: (self_shares[me], escrow_shares[me])}  # shares that we hold for others
        self._pair_seeds = {}  # {neighbour: seed of the mask that we share}
        self._inbound = {}  # {neighbour: key that unseals the shares it sends us}
        outbox = {}
        for i in self._peers:
            check_public_key(roster[i])
            secret = self._agree(roster[i])
            ends = min(i, me), max(i, me)  # a pair has one seed, but a key for each direction
            self._pair_seeds[i] = derive_key(secret, params, b"pair", *ends)[:SECRET]
            self._inbound[i] = derive_key(secret, params, b"shares", i, me)
            outbound = derive_key(secret, params, b"shares", me, i)
            outbox[i] = seal(outbound, self_shares[i] + escrow_shares[i])
        escrow_key = derive_key(self._escrow, params, b"escrow", me)
        sealed_seeds = seal(escrow_key, b"".join(self._pair_seeds.values()))
        outbox[me] = sealed_seeds + commit(self._self_seed, params, me)
        outbox[me] += commit(self._escrow, params, me)
        return outbox

    def mask(self, vector, inbox):
        """Return the vector plus our self mask and a pair mask for each neighbour in the inbox.

        inbox {sender: sealed shares}. Of a pair the lower index adds the mask, the higher subtracts
        it.
        """
        self._enter("mask")
        me = self.index
        params = self.params
        check_vector(vector, params)
        # two shares and a tag; neighbours that dropped out sent none
        check_parts(inbox, dict.fromkeys(self._peers, 3 * SECRET), complete=False)
        for i, sealed in inbox.items():
            shares = unseal(self._inbound[i], sealed)
            self._held[i] = (shares[:SECRET], shares[SECRET:])
        if len(self._held) < params.threshold:
            raise AggregationAborted("Too few neighbours hold our shares.")
        masked = vector + expand(derive_key(self._self_seed, params, b"self", me)[:SECRET], params)
        for i in inbox:
            pair_mask = expand(self._pair_seeds[i], params)
            masked = masked + pair_mask if me < i else masked - pair_mask
        return masked

    def unmask(self, survivors):
        """Return {owner: share} of a survivor's self seed or a dropout's escrow key, never both."""
        self._enter("unmask")
        fits = isinstance(survivors, list) and all(isinstance(i, int) for i in survivors)
        if not fits or len(set(survivors)) != len(survivors) or self.index not in survivors:
            raise ValueError("The survivors repeat somebody or miss us.")
        present = set(survivors)
        # Both secrets of a client together unmask its vector. A client answers only once, so the
        # whole request is checked before.
        strangers = present - self._roster
        silent = (present & set(self._peers)) - set(self._held)
        if strangers or silent:
            raise ValueError("The survivors include a stranger, or somebody who sent no shares.")
        self.params.check_present(present, self.index)
        return {i: pair[0 if i in present else 1] for i, pair in self._held.items()}


class SecureAggregationServer:
    """The server in one round: `receive` each message, `close` each stage.

    It only adds up masked vectors. It draws no random numbers, so that all processes that pass it
    the same messages get the same answers.
    """

    def __init__(self, params):
        self.params = params
        self._stages = list(STAGES)
        self._arrived = {}
        self._expected = set(params.place)  # clients that may answer in this stage
        self._total = np.zeros(params.length, "<u4")

    def receive(self, stage, client, message):
        """Accept one message. Raises ValueError if it is late, early, repeated, malformed or from
        an unknown client, or if its public key is unsafe or repeated.
        """
        if self._stages[:1] != [stage]:
            raise ValueError(f"{stage!r} of client {client} came late or early.")
        if not isinstance(client, int) or client not in self._expected:
            raise ValueError(f"Client {client} is unknown at {stage!r}.")
        if client in self._arrived:
            raise ValueError(f"{stage!r} of client {client} came twice.")
        neighbors = self.params.neighbors_of(client)
        if stage == "advertise":
            check_parts(message, {client: 32})
            check_public_key(message[client])
            if any(message[client] == other[i] for i, other in self._arrived.items()):
                raise ValueError("A public key was repeated.")
        elif stage == "share":
            peers = [i for i in neighbors if i in self._expected]
            own = {client: SECRET * (len(peers) + 3)}  # seeds, a tag, two commitments
            check_parts(message, dict.fromkeys(peers, 3 * SECRET) | own)
        elif stage == "mask":
            check_vector(message, self.params)
            self._total = self._total + message
            message = None  # it is in the sum, and is not kept
        else:
            peers = [i for i in neighbors if i in self._shared]
            check_parts(message, dict.fromkeys([client, *peers], SECRET))
        self._arrived[client] = message

    def close(self, stage):
        """End a stage; return the roster, the inboxes, the survivors or, at last, the sum.

        Raises AggregationAborted, which ends the round, if too few clients answered.
        """
        if self._stages[:1] != [stage]:
            raise ValueError(f"{stage!r} is not open.")
        following = self._stages[1:]
        self._stages = []  # stays so if an abort is raised below
        arrived = self._arrived
        self._arrived = {}
        self._expected = set(arrived)
        if stage == "unmask":
            return self._unmask(arrived)
        self.params.check_present(arrived)
        self._stages = following
        if stage == "advertise":
            self._keys = {i: message[i] for i, message in arrived.items()}
            return self._keys
        if stage == "share":
            self._shared = arrived
            inboxes = {i: {} for i in arrived}
            for sender, message in arrived.items():
                for i in message.keys() & inboxes.keys() - {sender}:
                    inboxes[i][sender] = message[i]
            return inboxes
        self._survivors = sorted(arrived)
        return self._survivors

    def _recover(self, owner, revealed, commitment):
        """Return the owner's secret, recovered from its shares, some of which may be wrong."""
        shares = {i: parts[owner] for i, parts in revealed.items() if owner in parts}
        for secret in join_secret(shares, self.params.threshold):
            if commit(secret, self.params, owner) == commitment:
                return secret
        raise AggregationAborted(f"The shares of client {owner}'s secret do not fit together.")

    def _unmask(self, revealed):
        """Return the sum minus the survivors' self masks and their pair masks with dropouts."""
        params = self.params
        total = self._total
        for owner, message in self._shared.items():
            sealed_seeds = message[owner][: -2 * SECRET]
            if owner in self._survivors:
                secret = self._recover(owner, revealed, message[owner][-2 * SECRET : -SECRET])
                self_seed = derive_key(secret, params, b"self", owner)[:SECRET]
                total = total - expand(self_seed, params)
                continue
            secret = self._recover(owner, revealed, message[owner][-SECRET:])
            try:
                seeds = unseal(derive_key(secret, params, b"escrow", owner), sealed_seeds)
            except ValueError as error:
                raise AggregationAborted(
                    f"Client {owner} left pair seeds that do not open."
                ) from error
            peers = [i for i in params.neighbors_of(owner) if i in self._keys]
            for k, i in enumerate(peers):
                if i in self._survivors:  # i added this mask if i < owner, else it subtracted it
                    pair_mask = expand(seeds[SECRET * k : SECRET * (k + 1)], params)
                    total = total - pair_mask if i < owner else total + pair_mask
        return total


def run_protocol(params, vectors, drop=None, workers=None):
    """Return (sum uint32 [length], survivors) of a round; vectors {client: uint32 [length]}.

    drop = {stage: clients that drop out before it}. workers (`fed.Workers` or None) connects the
    processes: each simulates its own clients, and a copy of the server that gets all messages.
    Raises AggregationAborted, in every process, when too few clients are left.
    """
    drop = drop or {}
    if not set(drop) <= set(STAGES):
        raise ValueError(f"Clients drop out before one of {', '.join(STAGES)}.")
    if workers is not None:
        params = workers.broadcast(params)  # one session for all
    if not set(vectors).union(*drop.values()) <= set(params.place):
        raise ValueError(f"The clients of a round are 0 to {params.num_clients - 1}.")
    for vector in vectors.values():
        check_vector(vector, params)
    server = SecureAggregationServer(params)
    agreed = {}
    clients = {i: SecureAggregationClient(params, i, agreed) for i in vectors}
    answer = None
    for stage in STAGES:
        messages = {}
        for i, client in clients.items():
            if i in drop.get(stage, ()) or (answer is not None and i not in answer):
                continue  # it dropped out, or the server refused its last message
            try:
                if stage == "advertise":
                    messages[i] = client.advertise()
                elif stage == "share":
                    messages[i] = client.share(answer)
                elif stage == "mask":
                    messages[i] = client.mask(vectors[i], answer[i])
                else:
                    messages[i] = client.unmask(answer)
            except (ValueError, AggregationAborted):
                pass  # only this client leaves; the server counts those that are left
        clients = {i: clients[i] for i in messages}
        if workers is not None:
            messages = workers.merge(messages)
        for i, message in messages.items():
            try:
                server.receive(stage, i, message)
            except ValueError:
                pass  # the sender is out; a bad seal is noticed by its receivers, which then leave
        answer = server.close(stage)
        if stage == "mask":
            survivors = answer
    return answer, survivors


def secure_sum(vectors, threshold, neighbors=None, drop=None, bound=None):
    """Return the sum float64 [d] of the surviving rows of vectors [n, d], from the full protocol.

    Each value is clamped to +-bound and rounded to a multiple of bound n / 2^31. bound is public
    (None: the largest magnitude, for tests); drop as in `run_protocol`. Raises ValueError for
    vectors that are not finite real numbers, or a bound that is not between 1e-290 and 1e290.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind not in "biuf" or not np.isfinite(vectors).all():
        raise ValueError("vectors is an array [clients, values] of finite real numbers.")
    vectors = vectors.astype(np.float64)  # a float32 cannot hold 2^31 - 1
    params = RoundParams(*vectors.shape, threshold, neighbors)
    if bound is None:
        bound = np.abs(vectors).max() or 1.0
    if not 1e-290 < bound < 1e290:
        raise ValueError(f"bound is between 1e-290 and 1e290, not {bound}.")
    largest = (2**31 - 1) // len(vectors)
    step = float(bound) / largest
    steps = np.rint(np.clip(vectors / step, -largest, largest))  # [n, d]
    steps = steps.astype(np.int64).astype("<u4")  # negative numbers as 2^32 - |number|
    total, _ = run_protocol(params, dict(enumerate(steps)), drop)
    return total.view("<i4") * step


# ---------------------------------------------------------------- audit

DEFECTS = {  # by which factors a broken client changes noise, clip norm and largest weight
    None: (1, 1, 1),
    "noise off": (0, 1, 1),
    "half the noise": (0.5, 1, 1),
    "clipping bypassed": (1, 10, 1),
    "weights uncapped": (1, 5, 5),
}
# The plain values that a server's checkpoint may hold beside the vectors adapter and control.
SERVER_VALUES = (
    "kind",
    "version",
    "checksum",
    "description",
    "settings",
    "round",
    "accountant",
    "sampling_key",
)


def measured_noise(inside, outside, confidence):
    """Return (lower bound, upper bound) of the noise multiplier that scores of canaries show.

    Andrew et al. 2024, Sec. 4, arXiv:2302.03098: the scores of canaries inside and outside of the
    data are Gaussian, so their standard deviation divided by the distance of their means is a noise
    multiplier. The bounds combine Student's interval for the distance with a chi-square interval
    for the standard deviation.
    """
    n = len(inside)
    m = len(outside)
    freedom = n + m - 2
    tail = (1 - confidence) / 4
    squares = n * np.var(inside) + m * np.var(outside)
    distance = np.mean(inside) - np.mean(outside)
    margin = stats.t.isf(tail, freedom) * math.sqrt(squares / freedom * (1 / n + 1 / m))
    low = math.sqrt(squares / stats.chi2.isf(tail, freedom)) / max(distance + margin, 1e-100)
    high = math.sqrt(squares / stats.chi2.ppf(tail, freedom)) / max(distance - margin, 1e-100)
    return float(low), float(high)


def canary_audit(mechanism, delta, defect=None, seed=None):
    """Return (flagged, why) of rounds with canaries: huge updates from which noise is measured.

    Each canary is a random direction on coordinates of its own; half of the canaries are in the
    data. Flags a mechanism whose noise on updates or on the sum of weights is, with 99.9 %
    confidence, less than it must be. A defect (of DEFECTS) breaks the clients' copy of the
    mechanism, which must then be flagged. seed: of the directions. Raises ValueError for an update
    shorter than 4 values, and for noise that would take too many rounds to measure.
    """
    if defect not in DEFECTS:
        raise ValueError(f"defect is one of {list(DEFECTS)}, not {defect!r}.")
    n = min(256, mechanism.length // 2)
    if n < 2:
        raise ValueError("An update of fewer than 4 values has no room for canaries.")
    server = replace(mechanism, num_clients=n, num_curious=0)  # a client for each canary inside
    client = copy.copy(server)  # a defect does not change the integer grid
    noise_factor, clip_factor, weight_factor = DEFECTS[defect]
    client.total_std *= noise_factor
    client.clip_norm *= clip_factor
    client.weight_scale *= weight_factor / clip_factor
    rng = np.random.default_rng(seed)
    due = server.noise_std(1) / server.clip_norm  # std of the sum's noise, for any cohort size
    rounds = math.ceil(300 * max(1.0, due) ** 2 / n)  # enough to notice that half is missing
    if rounds > 3000:
        raise ValueError(f"{due:.3g} clip norms of noise on {n} canaries take too long to measure.")
    inside = []
    outside = []
    weight_sums = []
    for r in range(rounds):
        signs = rng.choice((-1.0, 1.0), server.length)
        places = np.array_split(rng.permutation(server.length), 2 * n)  # each canary's coordinates
        total = np.zeros(server.length + 1, "<u4")
        for k in range(n):  # the other n canaries stay out
            update = np.zeros(server.length)
            update[places[k]] = 1e3 * client.clip_norm * signs[places[k]]
            total = total + client.encode(update, 1.0, n, ("audit", r, k))
        mean, weight_sum = server.decode(total, n, n, ("audit", r))
        # back to the sum, in clip norms [length]; a canary inside scores 1 on average, outside 0
        released = mean * max(weight_sum, server.min_weight) / server.clip_norm
        scores = [released[place] @ signs[place] / math.sqrt(len(place)) for place in places]
        inside += scores[:n]
        outside += scores[n:]
        weight_sums.append(weight_sum)
    low, high = measured_noise(inside, outside, 0.999)
    why = f"noise is {low:.3g} to {high:.3g} of a canary's norm, {due:.3g} is due; "
    why += f"epsilon is at least {gaussian_epsilon(high, delta):.3g}"
    deviations = (np.array(weight_sums) - n) * server.weight_scale / max(due, 1e-100)
    weights_bare = np.square(deviations).sum() < stats.chi2.ppf(0.001, rounds)
    if weights_bare:
        why += "; the sum of weights lacks noise"
    return high < due or weights_bare, why


def lattice_audit(noise):
    """Return (flagged, why) of noise in steps: flagged if some whole numbers never occur, or odd
    ones more or less often than even ones.
    """
    noise = np.asarray(noise, np.int64)
    spacing = int(np.gcd.reduce(noise - noise[0]))  # 1 on all whole numbers
    odd = float(np.mean(noise % 2))
    flagged = spacing != 1 or abs(odd - 0.5) > 2.5 / math.sqrt(len(noise))  # 5 standard deviations
    return flagged, f"the values have spacing {spacing}, {odd:.1%} of them are odd"


def presence_audit(mechanism, cohort_size, fixed_noise=False, seed=None):
    """Return (flagged, why): flagged if the noise reveals whether a client with zeros takes part.

    In each of 40 trials a coin (of `seed`) decides whether this client joins the cohort, and an
    attacker guesses it from the mean square of the released values. Without information half of the
    guesses are right. fixed_noise: a defect, a client's noise does not depend on the cohort size.
    """
    zeros = np.zeros(mechanism.length)
    rounds = math.ceil(20_000 / mechanism.length)  # enough to distinguish 11 clients from 12
    # halfway between the mean squares of p and p - 1 clients with fixed noise
    middle = mechanism.noise_std(1) ** 2 * (1 - 0.5 / cohort_size)
    found = 0
    for trial, joins in enumerate(np.random.default_rng(seed).random(40) < 0.5):
        size = cohort_size if joins else cohort_size - 1  # nobody drops out
        calibrated_to = cohort_size if fixed_noise else size
        mean_square = 0.0
        for r in range(rounds):
            uploads = [
                mechanism.encode(zeros, 0.0, calibrated_to, (trial, r, k)) for k in range(size)
            ]
            mean, weight_sum = mechanism.decode(sum(uploads), size, size, (trial, r))
            released = mean * max(weight_sum, mechanism.min_weight)
            mean_square += np.mean(released**2) / rounds
        found += int((mean_square > middle) == joins)
    return found > 31, f"{found} of 40 guesses were right"  # 31: 3.5 standard deviations


def checkpoint_audit(state, length):
    """Return (flagged, why) of a server's checkpoint: flagged if it holds more than a server may.

    Allowed are the vectors adapter and control of `length` numbers, SERVER_VALUES of at most 500
    characters each, and rows of 3 numbers for the accountant. This finds vectors that are kept by
    mistake, but not a short one that is hidden on purpose in those characters or rows.
    """
    bad = []
    for key, value in state.items():
        if key in ("adapter", "control"):
            if np.shape(value) != (length,):
                bad.append(f"{key!r} has the shape {np.shape(value)}")
        elif key not in SERVER_VALUES:
            bad.append(f"{key!r} is nothing that a server needs")
        elif key == "accountant":
            if any(np.shape(row) != (3,) for row in value):
                bad.append("'accountant' holds more than rows of 3 numbers")
        elif len(str(value)) > 500:
            bad.append(f"{key!r} is {len(str(value))} characters long")
    return bool(bad), "; ".join(bad) or "only the server's own vectors"


# ---------------------------------------------------------------- report

NOT_COVERED = [
    "that a client took part in a round: only what it sent is protected",
    "personal adapters, which stay with their client and are trained without noise",
    "what leaves a client outside of the masked vector, all of which a simulation writes into one "
    "run: losses, norms, failures and timing in logs, figures and pictures of the report, names and "
    "sizes of clips in people.json, and the c_i of SCAFFOLD's clients in the folder clients",
    "who is a client, and which clips are left out because another person has the same: both are "
    "decided beforehand, from everybody's clips",
    "that a run has ended because all of its clients failed",
    "a server that deviates from the protocol: invented clients, different rosters or survivor "
    "lists for different clients",
    "malicious clients: one can move the sum by as much as 32 bits hold, or make rounds abort",
    "what the public people's data reveal about themselves",
    "other runs on the same clients: their epsilons add up",
]


def privacy_report(mechanism, accountant, delta, cohorts):
    """Return the report's privacy section, plain values for JSON; epsilon None: no guarantee.

    `cohorts` [[k]] are those of the finished rounds. The rounds spent beyond these were killed and
    repeated with the same cohort. Raises ValueError unless 0 < delta < 1 / num_clients.
    """
    check_delta(delta, mechanism.num_clients)
    participations = most_participations(cohorts, accountant.num_rounds)
    repeated = accountant.num_rounds - len(cohorts)
    known = accountant.epsilon_known_cohorts(delta, participations)
    spent = Accountant(accountant.history)  # a copy
    if repeated > 0:  # the cohort was not drawn again: its second sum gets no amplification
        least_noise = min(noise_multiplier for _, noise_multiplier, _ in spent.history)
        spent.spend(1.0, least_noise, repeated)
    sampled = min(known, spent.epsilon(delta))  # an adversary who knows less learns no more
    reason = None
    if mechanism.seed is not None:
        reason = "the noise is seeded"
    elif known == math.inf:
        reason = "a round had no noise"
    return {
        **asdict(mechanism),
        "sensitivity": mechanism.sensitivity,
        "rounds": accountant.num_rounds,
        "most_rounds_of_a_client": participations,
        "history": accountant.history,
        "delta": delta,
        "private": reason is None,
        "no_privacy_because": reason,
        "epsilon": known if reason is None else None,
        "epsilon_holds_against": "the server, up to num_curious of the clients and everybody who "
        "sees released models, all of whom may know who took part in every round",
        "epsilon_with_sampling": sampled if reason is None else None,
        "epsilon_with_sampling_holds_against": "those who see released models but know neither who "
        "nor how many took part in a round, nor which rounds were aborted, nor the noise where "
        "target_epsilon chose it by the busiest client's rounds: last.pt, rounds.jsonl and this "
        "report tell them",
        "accountant": "known cohorts: exact Gaussian composition of the busiest client's rounds; "
        "with sampling: the least of this, the same of all rounds, and Renyi DP of sampled rounds "
        f"at {len(ORDERS)} orders from {min(ORDERS)} to {max(ORDERS)}",
        "adjacency": "one client's vectors, or zeros in their place (zero-out)",
        "unit": "one client with all of its clips",
        "trusted": "no single party: a sum is opened only if survivor_share of the cohort plus "
        "num_curious clients remain, so that the noise of the honest ones reaches what is claimed",
        "not_covered": NOT_COVERED,
    }


def verify_run(folder):
    """Return the privacy section of a run's report as it follows from the run's own record.

    Reads report.json; config.yaml, whose settings must be those of which last.pt holds the
    checksum; rounds.jsonl, one JSON object per line with round, cohort_size, survivors, aborted,
    sample_rate, noise_multiplier and epsilon (against known cohorts, of all rounds so far);
    people.json, which lists the clients; and last.pt, whose state holds adapter, round, accountant,
    sampling_key and settings. Raises ValueError for a damaged last.pt, for rounds that ran but were
    not spent, for vectors of single clients in the checkpoint, and for a claim in the log or report
    that does not follow from the record. last.pt is believed: who rewrites it with its checksums
    can claim anything. A report that claims no privacy is returned unchanged.
    """
    import torch  # the rest of this file does not need it
    import train  # not above, as it imports this file

    folder = Path(folder)
    claimed = json.loads((folder / "report.json").read_text())["privacy"]
    if not claimed["private"]:
        if any(claimed.get(name) is not None for name in ("epsilon", "epsilon_with_sampling")):
            raise ValueError("report.json gives an epsilon for a run that is not private.")
        return claimed
    checkpoint = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    state = checkpoint.pop("state")
    if checkpoint["checksum"] != train.checksum(state):
        raise ValueError("last.pt is damaged: its checksum does not match.")
    config = train.read_yaml(folder / "config.yaml")
    if state["settings"] != train.checksum(train.fixed_settings(config)):
        raise ValueError("config.yaml was changed since the run was made.")
    people = train.read_people(folder)
    if others := people["clients"].keys() & (people["public"] | people["unseen"]).keys():
        raise ValueError(f"people.json: {min(others)} is not only a client.")
    num_clients = len(people["clients"])
    if num_clients != config["data"]["clients"]:
        raise ValueError(f"people.json: {num_clients} clients, not {config['data']['clients']}.")
    length = len(state["adapter"])
    mechanism = train.make_mechanism(config, length)
    if mechanism is None:
        raise ValueError("config.yaml: privacy is not enabled.")
    log = train.read_rounds(folder)
    if len(log) != state["round"]:
        raise ValueError(f"rounds.jsonl does not list the {state['round']} rounds of last.pt.")

    logged = Accountant()
    ran = collections.Counter()
    cohorts = train.draw_cohorts(config, state["sampling_key"], num_clients, state["round"])
    for index, row in enumerate(log):
        if row["cohort_size"] != len(cohorts[index]):
            raise ValueError(f"rounds.jsonl: the key draws other clients in round {index}.")
        if row["sample_rate"] != train.accounted_rate(config["fed"]):
            raise ValueError(f"rounds.jsonl: round {index} has another sample_rate.")
        needed = mechanism.min_survivors(row["cohort_size"])
        if row["aborted"] is None and not needed <= row["survivors"] <= row["cohort_size"]:
            raise ValueError(f"rounds.jsonl: the sum of round {index} should not be opened.")
        logged.spend(row["sample_rate"], row["noise_multiplier"])
        ran[row["sample_rate"], row["noise_multiplier"]] += 1
        participations = most_participations(cohorts[: index + 1])
        so_far = logged.epsilon_known_cohorts(config["privacy"]["delta"], participations)
        # null: a round without a guarantee
        if row["epsilon"] is None or not row["epsilon"] >= so_far * (1 - 1e-6):
            raise ValueError(f"rounds.jsonl: round {index} claims another epsilon.")
    spent = collections.Counter()
    for sample_rate, noise_multiplier, count in state["accountant"]:
        spent[sample_rate, noise_multiplier] += count
    # A crash may make a round count twice, so more rounds may be spent than ran, never fewer.
    if not ran <= spent:
        raise ValueError("More rounds ran (rounds.jsonl) than were accounted for (last.pt).")

    flagged, why = checkpoint_audit(checkpoint | state, length)
    if flagged:
        raise ValueError(f"last.pt holds vectors of single clients: {why}.")
    expected = train.describe_privacy(config, state)
    for key, value in expected.items():
        if isinstance(value, (str, list)):
            continue  # texts, which other versions of this file may word differently
        same = claimed.get(key) == value
        if isinstance(value, float) and isinstance(claimed.get(key), float):
            same = math.isclose(claimed[key], value, rel_tol=1e-6)
        if not same:
            raise ValueError(f"report.json: {key} is {claimed.get(key)}, but {value} follows.")
    return expected  # not what is claimed: its texts and further entries were not checked


# ---------------------------------------------------------------- command line


def print_table(args, z):
    """Print epsilon for each number of clients and rounds, at the same noise on the mean."""
    lines = [
        f"delta {args.delta:g}; epsilon of known cohorts: for all clients, with probability 0.99",
        "clients  cohort  rounds  noise multiplier     epsilon  epsilon with sampling",
    ]
    for n, rounds in itertools.product(args.clients, args.rounds):
        # The mean is the sum divided by the cohort size: noise on the sum may grow with it.
        noise = z * n / min(args.clients)
        accountant = Accountant([[args.rate, noise, rounds]])
        # Once, if at all: whoever takes part has no less to lose because others hardly ever do.
        participations = max(1, likely_participations(n, args.rate, rounds))
        known = accountant.epsilon_known_cohorts(args.delta, participations)
        sampled = accountant.epsilon(args.delta)
        cohort = n * args.rate
        lines.append(f"{n:7d} {cohort:7g} {rounds:7d} {noise:17.4f} {known:11.4f} {sampled:22.4f}")
    print("\n".join(lines))


def print_audit(args, z):
    """Print one line for each check of a mechanism and of broken copies.

    Return whether each check flagged the broken copies and nothing else.
    """
    num_clients = min(args.clients)  # to which z belongs, as in the table
    mechanism = Mechanism(
        clip_norm=1.0,
        noise_multiplier=z,
        length=args.length,
        num_clients=num_clients,
        weight_scale=0.5,
        min_weight=1.0,
        survivor_share=0.8,
    )
    if num_clients < 2:
        raise ValueError("--audit needs 2 clients or more.")
    cohort_size = min(12, num_clients)
    zeros = np.zeros(args.length)
    num_uploads = math.ceil(64 / args.length)  # a few numbers might all be even by chance
    uploads = [mechanism.encode(zeros, 0.0, cohort_size).view("<i4") for _ in range(num_uploads)]
    upload = np.concatenate(uploads)
    state = {"round": 1, "adapter": zeros, "control": zeros}
    leaking_state = state | {"controls": {"client 1": zeros}}
    checks = [("canaries", name, canary_audit(mechanism, args.delta, name)) for name in DEFECTS]
    checks += [
        ("lattice", None, lattice_audit(upload)),
        ("lattice", "noise on a lattice", lattice_audit(upload // 2 * 2)),
        ("presence", None, presence_audit(mechanism, cohort_size)),
        ("presence", "noise of one size", presence_audit(mechanism, cohort_size, True)),
        ("checkpoint", None, checkpoint_audit(state, args.length)),
        ("checkpoint", "c_i of a client", checkpoint_audit(leaking_state, args.length)),
    ]
    for check, defect, (flagged, why) in checks:
        verdict = "flagged" if flagged else "passed"
        print(f"{check:11} {defect or 'as it is':19} {verdict:8} {why}")
    return all(flagged == (defect is not None) for _, defect, (flagged, _) in checks)


def run(args):
    """Do what the command line asks for."""
    if args.verify:
        try:
            report = json.dumps(verify_run(args.verify), indent=2)
        except Exception as error:  # whatever makes the record unreadable
            refuse(f"{args.verify} is refused: {type(error).__name__}: {error}")
        print(report)
        return
    if (args.noise is None) == (args.target_epsilon is None):
        raise ValueError("Give one of --noise, --target-epsilon and --verify.")
    if min(args.clients + args.rounds) < 1:
        raise ValueError("--clients and --rounds are at least 1.")
    check_delta(args.delta, max(args.clients))
    z = args.noise
    if z is None:
        z = find_noise_multiplier(args.target_epsilon, args.delta, args.rate, max(args.rounds))
    if not args.audit:
        print_table(args, z)
    elif not print_audit(args, z):
        sys.exit(1)


def refuse(message):
    """Print one line and leave with status 2."""
    print(f"privacy.py: {message}".splitlines()[0], file=sys.stderr)
    sys.stdout = None  # else Python would try again to write to a full disk
    sys.exit(2)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="privacy.py", description=__doc__.splitlines()[0])
    parser.error = refuse
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[100], help="clients in the federation")
    add("--rate", type=float, default=1.0, help="probability that a client joins a round")
    add("--rounds", type=int, nargs="+", default=[2])
    add("--delta", type=float, default=1e-5, help="below 1 / clients")
    add("--noise", type=float, help="noise multiplier z for the smallest number of --clients")
    add(
        "--target-epsilon",
        type=float,
        help="instead of --noise: the least z with at most this epsilon if cohorts are secret",
    )
    add("--audit", action="store_true", help="check the mechanism, by canaries and other tests")
    add("--length", type=int, default=36, help="values of an update, for --audit")
    add("--verify", metavar="RUN", help="recompute a run's epsilon from its record")
    args = parser.parse_args(arguments)
    try:
        if args.verify and args != parser.parse_args(["--verify", args.verify]):
            raise ValueError("--verify stands alone.")
        run(args)
        print(end="", flush=True)  # raises OSError here if the disk is full
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("interrupted")


if __name__ == "__main__":
    main()
