"""Client-level differential privacy, secure aggregation, and an audit of both.

Protects against an honest-but-curious server with some curious clients, and against all who see released models; not
against a server that deviates (forged rosters, Sybils, unequal survivor lists), poisoned updates, timing side channels,
sums of overlapping cohorts (only noise covers those), or what leaves a client outside the masked vector. The server and
the clients of a round know who took part: amplification by sampling holds only against others.

    python privacy.py --clients 1000 --rate 0.01 --noise 1.1 --rounds 1000 --delta 1e-6    (or --target-epsilon 8)
    python privacy.py --clients 1000 --rate 0.01 --noise 1.1 --skellam 100000              (Skellam's epsilon beside it)
"""
import argparse
import functools
import hashlib
import hmac
import math
import os
import secrets
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy import optimize, special, stats

def require(condition, message, error=ValueError):
    if not condition:
        raise error(message)

# ---- accounting -----------------------------------------------------------------------------------------

ORDERS = (1.01, 1.02, 1.05, *(1 + i / 10 for i in range(1, 100)), *range(11, 64),
          *(round(2 ** (i / 8)) for i in range(48, 81)))  # up to 1024
ADJACENCY = {"poisson": "add or remove one client", "fixed": "replace one client by another"}

def release_rdp(orders, z, skellam=None):
    """RDP of one unsampled release at each order; z = noise_multiplier, skellam = (L1, L2) integer sensitivities."""
    rdp = orders / (2 * z ** 2)  # Gaussian: Mironov 2017, Prop. 7, arXiv:1702.07476
    if skellam is None:
        return rdp
    (l1, l2), variance = skellam, (z * skellam[1]) ** 2  # Agarwal et al. 2021, Cor. 4.1, arXiv:2110.04995
    return rdp + np.minimum(((2 * orders - 1) * l2 ** 2 + 6 * l1) / (4 * variance ** 2), 1.5 * l1 / variance)

def _integer_moment(q, z, orders, skellam):
    """(order - 1) * RDP, Poisson-sampled, at integer orders, a sum of positive terms: nothing cancels.

    Exact for Gaussian noise (Mironov et al. 2019, Sec. 3.3, arXiv:1908.10530); Skellam pays a factor 3 from the third
    moment on (Zhu and Wang 2019, Thm. 5, proceedings.mlr.press/v97/zhu19c).
    """
    unsampled = (orders - 1) * release_rdp(orders, z, skellam)
    if q == 1 or not len(orders):
        return unsampled
    k, log_factorial = np.arange(2, orders.max() + 1), special.gammaln(np.arange(orders.max() + 1) + 1)
    moment, factor = (k - 1) * release_rdp(k, z, skellam), np.where((k > 2) & (skellam is not None), 3.0, 1.0)
    log_gain = moment + np.log(factor - np.exp(-moment)) + k * math.log(q) - log_factorial[k]
    rest = orders[:, None] - k
    log_terms = log_gain + rest * math.log1p(-q) + log_factorial[orders][:, None] - log_factorial[np.maximum(rest, 0)]
    log_terms = np.where(rest >= 0, log_terms, -math.inf)
    return np.minimum(np.logaddexp.reduce(log_terms, axis=-1, initial=0.0), unsampled)  # initial: log(1 + their sum)

def _fractional_rdp(q, z, orders):
    """Poisson-sampled Gaussian RDP at any order (Mironov et al. 2019, Thm. 4): log E[(1 + u)^order] / (order - 1).

    u = q (p1(x) / p0(x) - 1) has mean 0, so the sum is over (1 + u)^order - 1 - order u >= 0: nothing cancels. The
    integrand is analytic within pi z^2 of the real line, where the trapezoid rule converges exponentially.
    """
    width = z * min(1, z) / 2
    x = np.arange(-10 * z, orders.max() + 10 * z, width)
    log_ratio, order = (2 * x - 1) / (2 * z ** 2), orders[:, None]
    u = q * np.expm1(np.minimum(log_ratio, 700))
    power = order * np.where(log_ratio < 700, np.log1p(u), math.log(q) + log_ratio)
    low, high = np.minimum(power, 1), np.maximum(power, 1)
    excess = np.where(power > 1, high + np.log1p(-(1 + order * np.maximum(u, 0)) * np.exp(-high)),
                      np.log(np.maximum(np.expm1(low) - order * u, 1e-300)))
    log_weight = -0.5 * (x / z) ** 2 + math.log(width / (z * math.sqrt(2 * math.pi)))
    return np.logaddexp.reduce(excess + log_weight, axis=-1, initial=0.0) / (orders - 1)

@functools.lru_cache(maxsize=64)
def _round_rdp(q, z, orders, skellam):
    orders = np.asarray(orders, float)
    if q == 0 or z == 0:
        return np.full(len(orders), 0.0 if q == 0 else math.inf)
    knots = np.unique(np.maximum(np.concatenate((np.floor(orders), np.ceil(orders))), 2)).astype(int)
    # Two blocks of integer orders, as most of the triangle is empty. Between integers the moment is below its chord
    # (it is convex in the order): what Skellam's bound, which holds at integers, gives a fractional order.
    moments = [_integer_moment(q, z, part, skellam) for part in (knots[knots <= 64], knots[knots > 64])]
    rdp = np.interp(orders, (1, *knots), (0, *np.concatenate(moments))) / (orders - 1)
    fractional = orders != np.rint(orders)
    if skellam is None and fractional.any() and (q == 1 or z > 0.1):  # below, with epsilon in the thousands, the chord
        rdp[fractional] = release_rdp(orders[fractional], z) if q == 1 else _fractional_rdp(q, z, orders[fractional])
    return rdp

@dataclass
class Accountant:
    """Rounds spent so far, plain rows [sample_rate, noise_multiplier, rounds, sampling, skellam] for checkpoints.

    noise_multiplier = noise / sensitivity under the adjacency of `sampling`. Fixed-size cohorts get no amplification.
    """
    history: list = field(default_factory=list)

    def spend(self, sample_rate, noise_multiplier, rounds=1, sampling="poisson", skellam=None):
        """Add rounds, whether or not their sum arrived; sample_rate in [0, 1], noise_multiplier >= 0; ValueError."""
        require(0 <= sample_rate <= 1, f"sample_rate is a probability in [0, 1], not {sample_rate}.")
        require(0 <= noise_multiplier < math.inf, f"noise_multiplier is finite and >= 0, not {noise_multiplier}.")
        require(0 <= rounds <= 1e12 and rounds == int(rounds), f"rounds is a whole number up to 1e12, not {rounds}.")
        require(sampling in ADJACENCY, f"sampling is 'poisson' or 'fixed', not {sampling!r}.")
        row = [float(sample_rate), float(noise_multiplier), int(rounds), sampling, skellam and list(skellam)]
        if self.history and self.history[-1][:2] + self.history[-1][3:] == row[:2] + row[3:]:
            self.history[-1][2] += row[2]
        else:
            self.history.append(row)

    def epsilon(self, delta, orders=ORDERS):
        """Epsilon of all rounds at delta in (0, 1), the best over orders > 1; ValueError."""
        require(0 < delta < 1, f"delta is a probability in (0, 1), not {delta}.")
        require(len(orders) and min(orders) > 1, "orders are one or more numbers above 1.")
        rdp, a = np.zeros(len(orders)), np.asarray(orders, float)
        for sample_rate, noise_multiplier, rounds, sampling, skellam in self.history:
            amplified = sample_rate if sampling == "poisson" else float(sample_rate > 0)
            one = _round_rdp(amplified, noise_multiplier, tuple(orders), skellam and tuple(skellam)) if rounds else 0
            rdp += rounds * one
        epsilon = rdp + np.log1p(-1 / a) - np.log(delta * a) / (a - 1)  # Canonne et al. 2020, Prop. 12, 2004.00010
        # Total variation is at most sqrt(1 - exp(-KL)) (Bretagnolle-Huber), and KL no larger than any RDP.
        return float(max(0.0, np.where(-np.expm1(-rdp) < delta ** 2, 0.0, epsilon).min()))

    def would_exceed(self, target_epsilon, delta, **spending):
        """Whether spending (arguments of `spend`) would pass target_epsilon at delta."""
        ahead = Accountant([list(row) for row in self.history])
        ahead.spend(**spending)
        return ahead.epsilon(delta) > target_epsilon

def compute_epsilon(sample_rate, noise_multiplier, rounds, delta, orders=ORDERS, sampling="poisson", skellam=None):
    """Epsilon at delta of equal rounds; arguments, ranges and errors as in `Accountant`."""
    accountant = Accountant()
    accountant.spend(sample_rate, noise_multiplier, rounds, sampling, skellam)
    return accountant.epsilon(delta, orders)

def find_noise_multiplier(target_epsilon, delta, sample_rate, rounds, sampling="poisson", skellam=None):
    """The least noise_multiplier (to 1e-5 relative) that keeps target_epsilon > 0; ValueError if 1e5 does not."""
    def keeps(z):
        return compute_epsilon(sample_rate, z, rounds, delta, sampling=sampling, skellam=skellam) <= target_epsilon
    low, high = 1e-2, 1e5
    require(0 < target_epsilon < math.inf and keeps(high), f"No noise keeps epsilon {target_epsilon} at delta {delta}.")
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high

# ---- clip, weight, noise ---------------------------------------------------------------------------------

NOISE_TAIL = 12  # standard deviations of room on the ring; beyond (once in 1e33) a sum wraps and stays private
TRUSTED = {"distributed": "nobody alone: min_honest survivors of each round add their noise and keep it to themselves, "
                          "and fewer of a client's share holders than the threshold help a curious server",
           "server": "the server, which sees the exact sum and adds the noise",
           "local": "nobody: every client adds all of the noise"}

def clip_update(update, clip_norm):
    """(update scaled to L2 norm <= clip_norm, its norm before); ValueError if it is not finite."""
    update = np.asarray(update, np.float64)
    norm = float(np.linalg.norm(update))
    require(math.isfinite(norm), "The update holds NaN or infinity: this client drops out of the round.")
    return update * min(1.0, clip_norm / max(norm, 1e-300)), norm

def _random_words(count, key):
    """uint64 words of the operating system's randomness, or of SHAKE-128 for an insecure seeded run."""
    data = os.urandom(8 * count) if key is None else hashlib.shake_128(key).digest(8 * count)
    return np.frombuffer(data, np.uint64)

def gaussian_noise(std, count, key=None):
    """N(0, std^2) in grid steps, rounded; tails reach 9 standard deviations."""
    words = _random_words(count, key)
    magnitude = special.ndtri(((words >> np.uint64(1)) + 0.5) * 2.0 ** -64)  # the lower half; the last bit is the sign
    return np.rint(std * np.where(words & np.uint64(1), magnitude, -magnitude))

def _poisson(mean, count, key):
    """Poisson variates of mean >= 500 by transformed rejection (Hormann 1993, PTRS, without its shortcuts)."""
    b = 0.931 + 2.53 * math.sqrt(mean)
    a, scale = -0.059 + 0.02483 * b, 1.1239 + 1.1328 / (b - 3.4)
    out, todo = np.empty(count), np.arange(count)
    while todo.size:
        u, v = (_random_words(2 * todo.size, key).reshape(2, -1) >> np.uint64(11)) * 2.0 ** -53 + 2.0 ** -54
        room = 0.5 - np.abs(u - 0.5)
        k = np.maximum(np.floor((2 * a / room + b) * (u - 0.5) + mean + 0.43), 1)
        # log of the probability by Stirling around the mean: k log(mean) - log k! would lose nine digits at 1e9.
        log_pmf = (k - mean - k * np.log1p((k - mean) / mean)
                   - np.log(2 * np.pi * k) / 2 - 1 / (12 * k) + 1 / (360 * k ** 3))
        accept = np.log(v * scale / (a / room ** 2 + b)) <= log_pmf
        out[todo[accept]] = k[accept]
        todo, key = todo[~accept], key and key + b"+"
    return out

def skellam_noise(std, count, key=None):
    """The difference of two Poisson variates of mean std^2 / 2; std >= 32 grid steps."""
    return _poisson(std ** 2 / 2, count, key and key + b"1") - _poisson(std ** 2 / 2, count, key and key + b"2")

@dataclass
class Mechanism:
    """From a client's update to a vector on the ring, and from the ring's sum to the mean; ValueError if unsafe.

    clip_norm = C (L2); noise_multiplier = z; length of an update; num_clients = most clients in a sum; min_honest =
    fewest honest survivors; weight_scale = s / C; min_weight = floor of the sum of weights; noise in TRUSTED; sampling
    in ADJACENCY; ring of 32 or 64 bits. mechanism = "skellam" is exact on the ring and needs nothing else:
    `spending` carries its sensitivities. bit_scale > 0 (say 0.5) adds adaptive clipping's bit to the noised vector and
    to the sensitivity: after a round, `decode` gives the fraction of unclipped updates, and the next round's mechanism
    is replace(mechanism, clip_norm=next_clip_norm(clip_norm, fraction, quantile, rate)).
    """
    clip_norm: float
    noise_multiplier: float
    length: int
    num_clients: int
    min_honest: int
    weight_scale: float = 0.5
    min_weight: float = 1.0
    bit_scale: float = 0.0
    noise: str = "distributed"
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    ring: int = 32
    insecure_seed: int | None = None

    def __post_init__(self):
        require(self.noise in TRUSTED, f"noise is one of {', '.join(TRUSTED)}, not {self.noise!r}.")
        require(self.mechanism in ("gaussian", "skellam"), f"mechanism is gaussian or skellam, not {self.mechanism!r}.")
        require(self.sampling in ADJACENCY and self.ring in (32, 64), "sampling is poisson or fixed, ring 32 or 64.")
        require(1 <= self.min_honest <= self.num_clients, f"min_honest is from 1 to {self.num_clients} clients.")
        require(self.length >= 1, f"An update has 1 value or more, not {self.length}.")
        require(min(self.clip_norm, self.weight_scale, self.min_weight) > 0
                and min(self.noise_multiplier, self.bit_scale) >= 0,
                "clip_norm, weight_scale and min_weight are above 0, noise_multiplier and bit_scale not below.")
        self.coordinates = self.length + 1 + (self.bit_scale > 0)
        self.num_bytes = self.coordinates * self.ring // 8  # of an upload
        # [w clip(u), s w, bit_scale C (b - 1/2)]: one vector is added, or one replaced (Andrew et al. 2021, Sec. 2).
        swapped = self.sampling == "fixed"
        added = 1 + self.weight_scale ** 2  # replacing, the worst weights are (1, 1) or (1, 0)
        self.sensitivity = self.clip_norm * (math.sqrt(max(4, added) + self.bit_scale ** 2) if swapped
                                             else math.sqrt(added + self.bit_scale ** 2 / 4))
        rounding = math.sqrt(self.coordinates) * (1 if swapped else 0.5)  # in steps: half of one, each coordinate
        client, server = {"distributed": (self.min_honest ** -0.5, 0), "local": (1, 0), "server": (0, 1)}[self.noise]
        # The finest step for which num_clients times the largest value, noise tails included, stays on the ring.
        tails = NOISE_TAIL * self.noise_multiplier * (client * self.num_clients + server)
        room = 2.0 ** (self.ring - 1) - self.num_clients - tails * rounding
        require(room > 0, f"{self.num_clients} clients with this noise overflow a ring of {self.ring} bits.")
        largest = self.clip_norm * max(1.0, self.weight_scale, self.bit_scale / 2)
        self.step = max((self.num_clients * largest + tails * self.sensitivity) / room, largest * 2.0 ** -50)  # float64
        self.grid_sensitivity = self.sensitivity / self.step + rounding  # what the noise is calibrated to, in steps
        std = self.noise_multiplier * self.grid_sensitivity
        self.client_std, self.server_std = client * std, server * std
        # Rounded Gaussian noise of std >= 4 steps is, to exp(-2 pi^2 4^2) < 1e-137, the Gaussian plus independent
        # rounding noise (Poisson summation), which is post-processing. The Poisson sampler needs 32.
        require(std == 0 or self.client_std + self.server_std >= 32, "The grid is too coarse for the noise: ring 64.")
        self.largest = (2 ** (self.ring - 1) - 1) // self.num_clients  # of a client's values, for `Terms`

    def spending(self, sample_rate):
        """What `Accountant.spend` needs for one round of this mechanism."""
        l2 = self.grid_sensitivity
        l1 = min(math.sqrt(self.coordinates), l2) * l2  # integer vectors: |x| <= x^2
        return {"sample_rate": sample_rate, "noise_multiplier": self.noise_multiplier, "sampling": self.sampling,
                "skellam": [l1, l2] if self.mechanism == "skellam" else None}

    def contribution(self, update, weight):
        """([weight * clip(update), s * weight, (bit)], norm of update); ValueError if weight is not in [0, 1]."""
        require(0 <= weight <= 1, f"A weight is in [0, 1], or the sensitivity would not hold, not {weight}.")
        clipped, norm = clip_update(update, self.clip_norm)
        bit = [self.bit_scale * self.clip_norm * ((norm <= self.clip_norm) - 0.5)] if self.bit_scale else []
        return np.concatenate((weight * clipped, [self.weight_scale * self.clip_norm * weight], bit)), norm

    def _noise(self, std, context):
        key = None if self.insecure_seed is None else repr((self.insecure_seed, context)).encode()
        draw = gaussian_noise if self.mechanism == "gaussian" else skellam_noise
        return draw(std, self.coordinates, key) if std else 0.0

    def encode(self, vector, *context):
        """A contribution rounded to the ring, plus the client's noise; context (round, client) keys seeded noise."""
        values = np.rint(vector / self.step) + self._noise(self.client_std, context)
        return values.astype(np.int64).astype(f"<u{self.ring // 8}")

    def decode(self, total, num_survivors, *context):
        """(mean update, sum of weights, unclipped fraction or None) from the ring's sum: post-processing of it."""
        values = (total.view(f"<i{self.ring // 8}") + self._noise(self.server_std, context)) * self.step
        weight, fraction = float(values[self.length] / (self.weight_scale * self.clip_norm)), None
        if self.bit_scale:
            bits = values[-1] / (self.bit_scale * self.clip_norm)
            fraction = float(np.clip(bits / max(num_survivors, 1) + 0.5, 0, 1))
        return values[:self.length] / max(weight, self.min_weight), weight, fraction

def next_clip_norm(clip_norm, fraction, quantile, rate):
    """Adaptive clipping towards a quantile of the norms (Andrew et al. 2021, Alg. 1, arXiv:1905.03871)."""
    return clip_norm * math.exp(-rate * (fraction - quantile))

# ---- secure aggregation ----------------------------------------------------------------------------------
# Bonawitz et al. 2017 (doi:10.1145/3133956.3133982, Fig. 4: double masking) on the k-regular graph of Bell et al. 2020
# (doi:10.1145/3372297.3417885). One change: what the others share in case a client drops out is not its second
# private key but the key of a sealed list of its pair seeds, left with the server. Opening it shows the server the
# same seeds and nothing else, for half of the key agreements.

STAGES = ("advertise", "share", "mask", "unmask")
_P = 2 ** 255 - 19
_FIELD = 2 ** 256 + 297  # the smallest prime above every 256-bit secret
_SHARE = 33  # bytes of a field element

class AggregationAborted(RuntimeError):
    """Too few clients are left to finish a round safely."""

def x25519(scalar, point):
    """Curve25519 key agreement on 32-byte strings (RFC 7748, Sec. 5); ValueError for a point of small order."""
    k, low = int.from_bytes(scalar, "little") & (2 ** 254 - 8) | 2 ** 254, 2 ** 255 - 1
    u = int.from_bytes(point, "little") & low
    x2, z2, x3, z3, last = 1, 0, u, 1, "0"
    for bit in bin(k)[2:]:  # ends in 0, as does the ladder's last swap: k is a multiple of 8
        if bit != last:
            x2, x3, z2, z3, last = x3, x2, z3, z2, bit
        a, b = x2 + z2, x2 - z2
        da, cb, aa, bb = (x3 - z3) * a, (x3 + z3) * b, a * a, b * b
        s, d = da + cb, da - cb
        # 2^255 = 19: folding is three times cheaper than %, and leaves % little to do.
        s, d = (s & low) + 19 * (s >> 255), (d & low) + 19 * (d >> 255)
        aa, bb = (aa & low) + 19 * (aa >> 255), (bb & low) + 19 * (bb >> 255)
        x3, z3, x2, e = s * s, d * d, aa * bb, aa - bb
        z3, z2 = u * ((z3 & low) + 19 * (z3 >> 255)), e * (aa + 121665 * e)
        x2, z2 = ((x2 & low) + 19 * (x2 >> 255)) % _P, ((z2 & low) + 19 * (z2 >> 255)) % _P
        x3, z3 = ((x3 & low) + 19 * (x3 >> 255)) % _P, ((z3 & low) + 19 * (z3 >> 255)) % _P
    require(z2, "A public key of small order was refused.")
    return (x2 * pow(z2, -1, _P) % _P).to_bytes(32, "little")

def derive_key(secret, terms, purpose, *clients):
    """64 bytes for one protocol, round, purpose and ordered clients: one block of HKDF-SHA512 (RFC 5869)."""
    info = b"PrivFedTalk secure aggregation 1|" + purpose + b"".join(b"|%d" % i for i in clients)
    return hmac.digest(hmac.digest(terms.session, secret, "sha512"), info + b"\x01", "sha512")

def expand(seed, terms):
    """A mask uniform on the ring from a 256-bit seed, by SHAKE-128: as strong as X25519, faster than SHAKE-256."""
    assert len(seed) == 32
    return np.frombuffer(hashlib.shake_128(seed).digest(terms.length * terms.dtype.itemsize), terms.dtype)

def _xor(key, message):
    stream = hashlib.shake_256(key).digest(len(message))
    return (int.from_bytes(message, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(message), "big")

def seal(key, message):
    """Encrypt, then authenticate, under a 64-byte key made for this one message."""
    sealed = _xor(key[:32], message)
    return sealed + hmac.digest(key[32:], sealed, "sha256")

def unseal(key, sealed):
    """The message of `seal`; ValueError if it was not sealed, whole, under this key."""
    require(hmac.compare_digest(hmac.digest(key[32:], sealed[:-32], "sha256"), sealed[-32:]),
            "A sealed message was forged, reflected, misdirected or damaged.")
    return _xor(key[:32], sealed[:-32])

def split_secret(secret, threshold, clients):
    """Shamir's shares (1979) of 32 bytes, {client: value at client + 1 of a random polynomial}."""
    coefficients = [secrets.randbelow(_FIELD) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    return {i: functools.reduce(lambda value, c: (value * (i + 1) + c) % _FIELD, coefficients).to_bytes(_SHARE, "big")
            for i in clients}

@functools.lru_cache(maxsize=8)
def _lagrange(clients):
    """Weights that interpolate at 0 from the points client + 1."""
    return [math.prod(j + 1 for j in clients if j != i)
            * pow(math.prod(j - i for j in clients if j != i), -1, _FIELD) % _FIELD for i in clients]

def join_secret(shares, threshold):
    """The 32 bytes behind threshold or more shares {client: share}; AggregationAborted if they are fewer."""
    require(len(shares) >= threshold, f"{len(shares)} shares arrived, {threshold} are needed.", AggregationAborted)
    clients = tuple(sorted(shares)[:threshold])
    value = sum(w * int.from_bytes(shares[i], "big") for w, i in zip(_lagrange(clients), clients)) % _FIELD
    require(value < 2 ** 256, "The shares of a secret do not fit together.", AggregationAborted)
    return value.to_bytes(32, "big")

class Terms:
    """What all parties of a round agree on: a new session, a random graph, sizes; ValueError if that is unsafe.

    length and ring (bits) of the vectors; threshold = shares that open a secret; neighbors = even degree of the graph
    (None: complete); min_survivors = fewest clients in a sum; largest = magnitude of one client's values.
    """

    def __init__(self, num_clients, length, threshold, neighbors=None, min_survivors=0, largest=1, ring=32):
        self.degree = degree = num_clients - 1 if neighbors is None else neighbors
        require(num_clients >= 2 and length >= 1 and ring in (32, 64), "A sum takes 2 clients, 1 value, ring 32 or 64.")
        require(neighbors is None or 2 <= degree < num_clients and degree % 2 == 0,
                f"neighbors is even, from 2 to {num_clients - 1}, not {neighbors}.")
        require(degree + 1 < 2 * threshold <= 2 * (degree + 1),
                f"threshold is more than half of {degree + 1} share holders, not {threshold}.")
        require(num_clients * largest < 2 ** (ring - 1),
                f"{num_clients} clients with values up to {largest} overflow a ring of {ring} bits.")
        self.num_clients, self.length, self.threshold = num_clients, length, threshold
        self.min_survivors = max(min_survivors, threshold, num_clients // 2 + 1)
        self.dtype, self.session = np.dtype(f"<u{ring // 8}"), secrets.token_bytes(32)
        self.ring = sorted(range(num_clients), key=lambda i: derive_key(b"", self, b"place", i))
        self.place = {client: place for place, client in enumerate(self.ring)}

    def neighbours(self, client):
        """The clients that share masks and secrets with this one: the nearest on a random ring (Bell et al.)."""
        reach = [*range(-(self.degree // 2), 0), *range(1, self.degree - self.degree // 2 + 1)]
        return sorted(self.ring[(self.place[client] + offset) % self.num_clients] for offset in reach)

    def check_present(self, present, client=None):
        """AggregationAborted for too few clients or share holders, or a gap that may cut the graph in two."""
        require(len(present) >= self.min_survivors,
                f"{len(present)} clients are left, {self.min_survivors} are needed.", AggregationAborted)
        holders = [i for i in ([] if client is None else self.neighbours(client)) if i in present]
        require(client is None or len(holders) + 1 >= self.threshold,
                f"{len(holders) + 1} share holders are left, {self.threshold} are needed.", AggregationAborted)
        places = sorted(self.place[i] for i in present)
        require(max(np.diff(places + [places[0] + self.num_clients])) <= max(1, self.degree // 2)
                or self.degree == self.num_clients - 1, "A gap may cut the graph in two.", AggregationAborted)

class SecureAggregationClient:
    """One client in one round: advertise, share, mask, unmask, once each; a refused message ends its round."""

    def __init__(self, terms, index):
        self.terms, self.index, self._stages = terms, index, list(STAGES)
        self._private, self._self_seed, self._escrow = (secrets.token_bytes(32) for _ in range(3))
        self._public = x25519(self._private, (9).to_bytes(32, "little"))

    def _enter(self, stage):
        in_order, self._stages = self._stages[:1] == [stage], self._stages[1:]
        self._stages = self._stages if in_order else []
        require(in_order, f"{stage!r} came twice or out of order: client {self.index} leaves the round.")

    def advertise(self):
        """{self: public key of this round}."""
        self._enter("advertise")
        return {self.index: self._public}

    def share(self, roster):
        """{self: sealed pair seeds, neighbour: sealed shares} from the roster {client: public key}."""
        self._enter("share")
        me, terms = self.index, self.terms
        terms.check_present(roster, me)
        self._peers = [i for i in terms.neighbours(me) if i in roster]
        keys = {roster[i] for i in self._peers} | {self._public}
        require(roster.get(me) == self._public and len(keys) == len(self._peers) + 1,
                "A public key was changed, repeated or reflected.")
        in_range = all(len(key) == 32 and int.from_bytes(key, "little") < _P for key in keys)
        require(in_range, "A public key is out of range.")
        secret = {i: x25519(self._private, roster[i]) for i in self._peers}
        self._pair = {i: derive_key(secret[i], terms, b"pair", min(i, me), max(i, me))[:32] for i in self._peers}
        self._inbound = {i: derive_key(secret[i], terms, b"shares", i, me) for i in self._peers}
        mine, escrow = (split_secret(s, terms.threshold, [me, *self._peers]) for s in (self._self_seed, self._escrow))
        self._held = {me: (mine[me], escrow[me])}
        return {me: seal(derive_key(self._escrow, terms, b"escrow", me), b"".join(self._pair.values()))} | {
            i: seal(derive_key(secret[i], terms, b"shares", me, i), mine[i] + escrow[i]) for i in self._peers}

    def mask(self, values, inbox):
        """The ring vector plus our self mask and a pair mask for each neighbour in inbox {sender: sealed shares}."""
        self._enter("mask")
        me, terms = self.index, self.terms
        require(values.shape == (terms.length,) and values.dtype == terms.dtype, "The vector has the wrong form.")
        require(set(inbox) <= set(self._peers), "Shares came from somebody who is no neighbour.")
        for i, sealed in inbox.items():
            shares = unseal(self._inbound[i], sealed)
            self._held[i] = (shares[:_SHARE], shares[_SHARE:])
        require(len(self._held) >= terms.threshold, "Too few neighbours hold our shares.", AggregationAborted)
        masked = values + expand(derive_key(self._self_seed, terms, b"self", me)[:32], terms)
        for i in inbox:
            (np.add if me < i else np.subtract)(masked, expand(self._pair[i], terms), out=masked)
        return masked

    def unmask(self, survivors):
        """{owner: share} of a survivor's self seed or a dropout's escrow key: of one client never both."""
        self._enter("unmask")
        present = set(survivors)
        require(len(present) == len(survivors) and self.index in present, "The survivors repeat somebody or miss us.")
        require(present <= set(self.terms.place) and present & set(self._peers) <= set(self._held),
                "The survivors include a stranger, or somebody who sent no shares.")
        self.terms.check_present(present, self.index)
        return {i: shares[0 if i in present else 1] for i, shares in self._held.items()}

class SecureAggregationServer:
    """The server in one round: `receive` each message, `close` each stage. It only ever adds masked vectors."""

    def __init__(self, terms):
        self.terms, self._stages, self._arrived = terms, list(STAGES), {}
        self._expected, self._total = set(terms.place), np.zeros(terms.length, terms.dtype)

    def _fits(self, stage, client, message):
        """Whether a message is one vector, or {client: its own part, neighbour: a part} of the right sizes."""
        if stage == "mask":
            return (message.shape, message.dtype) == ((self.terms.length,), self.terms.dtype)
        known = {"advertise": (), "share": self._expected, "unmask": self._shared if stage == "unmask" else ()}[stage]
        peers = [i for i in self.terms.neighbours(client) if i in known]
        own, other = {"advertise": (32, 0), "share": (32 * len(peers) + 32, 2 * _SHARE + 32),
                      "unmask": (_SHARE, _SHARE)}[stage]
        return {i: len(part) for i, part in message.items()} == {client: own} | dict.fromkeys(peers, other)

    def receive(self, stage, client, message):
        """Take one message; ValueError if it is late, early, unknown, a duplicate or mis-sized."""
        require(self._stages[:1] == [stage], f"{stage!r} of client {client} came late or early.")
        require(client in self._expected, f"Client {client} is unknown at {stage!r}.")
        require(client not in self._arrived, f"{stage!r} of client {client} came twice.")
        require(self._fits(stage, client, message), f"{stage!r} of client {client} has the wrong form.")
        if stage == "mask":
            self._total += message
        self._arrived[client] = None if stage == "mask" else message

    def close(self, stage):
        """End a stage: roster, inboxes, survivors or, at last, the sum; AggregationAborted when too few answered."""
        require(self._stages[:1] == [stage], f"{stage!r} is not open.")
        following, self._stages = self._stages[1:], []  # an abort leaves no stage open
        arrived, self._arrived, self._expected = self._arrived, {}, set(self._arrived)
        if stage == "unmask":
            return self._unmask(arrived)
        self.terms.check_present(arrived)
        self._stages = following
        if stage == "advertise":
            self._keys = {i: message[i] for i, message in arrived.items()}
            return self._keys
        if stage == "share":
            self._shared = arrived
            return {i: {j: arrived[j][i] for j in message if j != i and j in arrived} for i, message in arrived.items()}
        self._survivors = sorted(arrived)
        return self._survivors

    def _unmask(self, revealed):
        """Take off every survivor's self mask, and every mask that a survivor shares with a dropout."""
        terms, total = self.terms, self._total
        for owner, message in self._shared.items():
            holders = {owner, *terms.neighbours(owner)} & set(revealed)
            secret = join_secret({i: revealed[i][owner] for i in holders}, terms.threshold)
            if owner in self._survivors:
                total -= expand(derive_key(secret, terms, b"self", owner)[:32], terms)
                continue
            seeds = unseal(derive_key(secret, terms, b"escrow", owner), message[owner])
            for k, i in enumerate(i for i in terms.neighbours(owner) if i in self._keys):
                if i in self._survivors:  # i added this mask if i < owner, else it subtracted it
                    (np.subtract if i < owner else np.add)(total, expand(seeds[32 * k:32 * k + 32], terms), out=total)
        return total

def run_protocol(terms, values, drop=None, mine=None, ask=lambda messages, answer: answer([messages])):
    """(ring sum, survivors) of a round; values(client) gives its ring vector.

    drop = {stage: clients that vanish before it}; mine = the clients of this process (None: all), and ask(messages,
    answer) gives every process what `answer` makes of all their messages at the server's. Raises AggregationAborted
    when too few are left.
    """
    drop = drop or {}
    require(set(drop) <= set(STAGES), f"Clients drop at one of {', '.join(STAGES)}.")
    server = SecureAggregationServer(terms)  # takes messages in one process only: where `ask` calls `answer`
    clients = {i: SecureAggregationClient(terms, i) for i in (terms.place if mine is None else mine)}

    def run(stage, reply):
        def answer(parts):
            for messages in parts:
                for i, message in messages.items():
                    server.receive(stage, i, message)
            return server.close(stage)

        for i in drop.get(stage, ()):
            clients.pop(i, None)
        return ask({i: reply(client, i) for i, client in clients.items()}, answer)
    roster = run("advertise", lambda client, i: client.advertise())
    inboxes = run("share", lambda client, i: client.share(roster))
    survivors = run("mask", lambda client, i: client.mask(values(i), inboxes[i]))
    return run("unmask", lambda client, i: client.unmask(survivors)), survivors

def secure_sum(vectors, threshold, neighbors=None, drop=None, bound=None, bits=None, ring=32):
    """Sum of the surviving rows of vectors [n, d], each value clamped to +-bound and rounded, by the whole protocol.

    bound = largest magnitude, public (None: measured, for tests); bits = signed width of a client's values (None: all
    that fit); drop as in `run_protocol`. ValueError if the sum may overflow the ring or a value is not finite.
    """
    vectors = np.asarray(vectors)
    require(vectors.ndim == 2 and np.isfinite(vectors).all(), "vectors is a finite array [clients, values].")
    bound = np.abs(vectors).max() if bound is None else bound
    largest = 2 ** (bits - 1) if bits else min((2 ** (ring - 1) - 1) // len(vectors), 2 ** 50)
    terms = Terms(*vectors.shape, threshold, neighbors, largest=largest, ring=ring)
    step = float(bound) / largest or 1.0

    def quantized(i):
        return np.rint(np.clip(vectors[i] / step, -largest, largest)).astype(np.int64).astype(terms.dtype)
    return run_protocol(terms, quantized, drop)[0].view(f"<i{ring // 8}") * step

# ---- audit and report ------------------------------------------------------------------------------------

DEFECTS = (None, "noise off", "half the noise", "clipping bypassed", "weights uncapped")

def gaussian_epsilon(z, delta):
    """Exact epsilon of one unsampled Gaussian release (Balle and Wang 2018, Thm. 8, arXiv:1805.06530)."""
    def excess(e):
        return special.ndtr(0.5 / z - e * z) - math.exp(min(e + special.log_ndtr(-0.5 / z - e * z), 0)) - delta
    if z < 1e-3:
        return math.inf
    return 0.0 if excess(0) <= 0 else float(optimize.brentq(excess, 0, 0.5 / z ** 2 + 40 / z))

def measured_noise(observed, unobserved, confidence):
    """(lower bound, estimate, upper bound) of noise / sensitivity, from canaries' scores in and out of the data.

    Andrew et al. 2024 (arXiv:2302.03098), Sec. 4: both are Gaussian, so their spread over their distance is a noise
    multiplier; its bounds join Student's interval for the distance and a chi-square one for the spread.
    """
    n, m = len(observed), len(unobserved)
    shift, freedom, tail = np.mean(observed) - np.mean(unobserved), n + m - 2, (1 - confidence) / 4
    spread = math.sqrt((n * np.var(observed) + m * np.var(unobserved)) / freedom)
    margin = stats.t.isf(tail, freedom) * spread * math.sqrt(1 / n + 1 / m)
    low, high = (spread * math.sqrt(freedom / stats.chi2.ppf(p, freedom)) for p in (1 - tail, tail))
    distances = shift + margin, shift, shift - margin
    return tuple(float(s / max(d, 1e-100)) for s, d in zip((low, spread, high), distances))

def canary_audit(mechanism, delta, num_canaries=None, confidence=0.99, defect=None, seed=None):
    """One round of canaries, huge updates with the largest weight, through the mechanism or one with a defect.

    Flagged: with this confidence, the noise beside a canary is less than the mechanism must add. A canary is a random
    direction, disjoint from the others so that they do not disturb each other; num_canaries (None: about 300 z^2, from
    256 to 4096) go in and as many stay out, or, for fixed-size cohorts, have their opposite in. ValueError if an update
    is too short. Epsilons are of this one round, without sampling; what is `expected` of a canary is below `accounted`,
    which also covers weights and rounding.
    """
    z, swapped = mechanism.noise_multiplier, mechanism.sampling == "fixed"
    n = num_canaries or min(max(256, math.ceil(300 * z ** 2)), 4096, mechanism.length // 2)
    require(defect in DEFECTS, f"defect is one of {DEFECTS}.")
    require(2 <= n <= mechanism.length // 2, f"{n} canaries do not fit an update of {mechanism.length} values.")
    audited = replace(mechanism, num_clients=n * (1 + swapped), min_honest=n * (1 + swapped))
    real = replace(audited, noise_multiplier=z * {"noise off": 0.0, "half the noise": 0.5}.get(defect, 1.0))
    client = replace(real, clip_norm=mechanism.clip_norm * (10 if defect == "clipping bypassed" else 1))
    rng = np.random.default_rng(seed)
    signs, total = rng.choice((-1.0, 1.0), mechanism.length), 0
    places = np.array_split(rng.permutation(mechanism.length), 2 * n)  # of each canary's values
    for k in range(audited.num_clients):
        update = np.zeros(mechanism.length)
        update[places[k]] = 1e3 * mechanism.clip_norm * signs[places[k]] * (1 if k < n else -1)
        vector, _ = client.contribution(update, 1.0)
        total = total + real.encode(vector * (5 if defect == "weights uncapped" else 1), "audit", k)
    mean, weight, _ = real.decode(total, audited.num_clients, "audit")
    released = mean * max(weight, mechanism.min_weight) / mechanism.clip_norm
    scores = [released[place] @ signs[place] / math.sqrt(len(place)) for place in places]
    low, noise, high = measured_noise(scores[:n], scores[n:], confidence)
    expected = z * audited.grid_sensitivity * audited.step / (mechanism.clip_norm * (1 + swapped))
    why = (f"noise is {low:.4g} to {high:.4g} of a canary's norm, the mechanism must add {expected:.4g}"
           + ("; too few canaries to notice half of it" if high > 4 * expected else ""))
    return {"defect": defect, "num_canaries": n, "confidence": confidence, "delta": delta,
            "accounted_epsilon": gaussian_epsilon(z, delta), "expected_epsilon": gaussian_epsilon(expected, delta),
            "measured_epsilon": gaussian_epsilon(noise, delta), "epsilon_lower_bound": gaussian_epsilon(high, delta),
            "epsilon_upper_bound": gaussian_epsilon(low, delta), "flagged": high < expected, "why": why}

def privacy_report(mechanism, accountant, delta, participations):
    """The report's privacy section, plain values; participations = most rounds that one client took part in."""
    epsilon = accountant.epsilon(delta)
    # Who knows the cohorts is not held up by sampling, but learns only from the rounds that a client was in.
    known = Accountant([[1.0, z, min(rounds, participations), *rest] for _, z, rounds, *rest in accountant.history])
    reason = ("the noise is seeded" if mechanism.insecure_seed is not None
              else "a round had no noise" if epsilon == math.inf else None)
    best_order = min(ORDERS, key=lambda order: accountant.epsilon(delta, (order,)))
    fields = {k: v for k, v in asdict(mechanism).items() if k not in ("bit_scale", "insecure_seed")}
    return {**fields, "adaptive_clipping": mechanism.bit_scale > 0, "sensitivity": mechanism.sensitivity,
            "rounded_sensitivity": mechanism.grid_sensitivity * mechanism.step,
            "rounds": sum(row[2] for row in accountant.history), "history": accountant.history,
            "sample_rate": max((row[0] for row in accountant.history), default=0.0), "accountant": "Renyi DP",
            "orders": f"{len(ORDERS)} from {min(ORDERS)} to {max(ORDERS)}", "best_order": best_order,
            "adjacency": ADJACENCY[mechanism.sampling], "unit": "one client with all of its clips", "delta": delta,
            "trusted": TRUSTED[mechanism.noise], "private": reason is None, "no_privacy_because": reason,
            "epsilon": epsilon if reason is None else None,
            "epsilon_protects_from": "whoever sees released models, but not who or how many took part in a round",
            "epsilon_known_cohorts": known.epsilon(delta) if reason is None else None,
            "epsilon_known_cohorts_protects_from": "whoever also knows who took part, as the clients of a round do"
                                                   + (" and the server" if mechanism.noise != "server" else ""),
            "known_cohorts_adjacency": "one client's vectors, or zeros in their place",
            "not_covered": ["personal adapters, which stay with the client and are trained without noise",
                            "logs and figures that leave a client outside of the masked vector: losses, norms, timing",
                            "a malicious server: forged rosters, invented clients, unequal survivor lists",
                            "poisoned updates", "what the public pretraining split reveals"]}

# ---- command line ----------------------------------------------------------------------------------------

def main(arguments=None):
    parser = argparse.ArgumentParser(prog="privacy.py", description="Epsilon by round, or the noise for an epsilon.")
    parser.error = lambda message: parser.exit(2, f"privacy.py: {message}\n")
    parser.add_argument("--clients", type=int, default=1000, help="clients in the federation")
    parser.add_argument("--rate", type=float, default=0.01, help="probability that a client joins a round")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=1e-6, help="below 1 / clients")
    parser.add_argument("--sampling", choices=ADJACENCY, default="poisson")
    parser.add_argument("--skellam", type=int, metavar="LENGTH", help="also Skellam noise, for updates of this length")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--noise", type=float, help="noise multiplier z = noise / sensitivity")
    choice.add_argument("--target-epsilon", type=float, help="print the smallest z that keeps it (Gaussian noise)")
    args = parser.parse_args(arguments)
    try:
        require(args.clients >= 1 and args.rounds >= 1, "--clients and --rounds are at least 1.")
        require(args.delta < 1 / args.clients, f"--delta must be below 1 / clients = {1 / args.clients:g}.")
        z = args.noise if args.target_epsilon is None else find_noise_multiplier(
            args.target_epsilon, args.delta, args.rate, args.rounds, args.sampling)
        columns = {"epsilon": None}
        if args.skellam is not None:
            skellam = Mechanism(1.0, z, args.skellam, args.clients, max(1, round(args.clients * args.rate / 2)),
                                mechanism="skellam", sampling=args.sampling)  # half of a mean cohort survives
            columns["skellam"] = tuple(skellam.spending(args.rate)["skellam"])
        table = [f"{n:8d} " + " ".join(f"{compute_epsilon(args.rate, z, n, args.delta, ORDERS, args.sampling, c):10.4f}"
                                       for c in columns.values())
                 for n in sorted({max(1, args.rounds * i // 10) for i in range(11)})]
    except ValueError as error:
        parser.error(str(error))
    print(f"noise multiplier {z:.4f}, {args.clients * args.rate:g} of {args.clients} clients a round ({args.sampling}: "
          f"{ADJACENCY[args.sampling]}), delta {args.delta:g}\n   round " + " ".join(f"{c:>10}" for c in columns),
          *table, sep="\n")

if __name__ == "__main__":
    main()
