"""Oracles, closed forms and attacks for privacy.py; peers (opacus, dp_accounting) are compared where installed."""
import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, special, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import privacy
from privacy import AggregationAborted, SecureAggregationClient, SecureAggregationServer, Terms
from proof_dropouts import check, every_fate, every_subset, toy_agreement

BASE = (9).to_bytes(32, "little")


# ---- accounting ------------------------------------------------------------------------------------------

def quadrature_rdp(q, z, order):
    """log E_{x ~ p0}[(p/p0)^order] / (order - 1) by adaptive quadrature in log space, in pieces of one z."""
    def integrand(x):
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z))
        return np.exp(order * ratio - x * x / (2 * z * z) - shift) / (z * math.sqrt(2 * math.pi))
    grid = np.linspace(-12 * z, order + 12 * z, 4001)
    shift = max(0.0, max(order * np.logaddexp(math.log1p(-q), math.log(q) + (2 * grid - 1) / (2 * z * z)) - grid ** 2 / (2 * z * z)))
    pieces = np.arange(-12 * z, order + 12 * z + z, z)
    total = sum(integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in zip(pieces, pieces[1:]))
    return (math.log(total) + shift) / (order - 1)


@pytest.mark.parametrize("q, z", [(0.01, 1.1), (0.2, 0.5), (0.5, 2.0), (0.9, 0.3), (0.1, 5.0)])
def test_rdp_against_quadrature(q, z):
    orders = (1.5, 2.0, 3.7, 8.0, 10.9, 20.0)
    ours = privacy._round_rdp(q, z, orders, None)
    assert ours == pytest.approx([quadrature_rdp(q, z, a) for a in orders], rel=1e-6)


def test_fractional_orders_continue_integer_ones():
    for q, z, a in itertools.product((1e-3, 0.05, 0.7), (0.3, 1.0, 20.0), (2, 5, 64, 300, 1024)):
        near = privacy._round_rdp(q, z, (a - 1e-7, float(a), a + 1e-7), None)
        assert near[[0, 2]] == pytest.approx([near[1]] * 2, rel=1e-5)


def test_full_participation_is_the_closed_form():
    orders = np.array(privacy.ORDERS)
    assert privacy._round_rdp(1.0, 1.7, privacy.ORDERS, None) == pytest.approx(orders / (2 * 1.7 ** 2))
    assert privacy._round_rdp(1 - 1e-12, 1.7, privacy.ORDERS, None) == pytest.approx(orders / (2 * 1.7 ** 2), rel=1e-6)


def test_conversion_written_out():
    expected = 3 * 5 / (2 * 2.0 ** 2) + math.log(1 - 1 / 5) - math.log(1e-5 * 5) / 4
    assert privacy.compute_epsilon(1.0, 2.0, 3, 1e-5, orders=(5.0,)) == pytest.approx(expected, rel=1e-12)


def test_exact_gaussian_epsilon_is_below_the_accountant():
    for z in (0.3, 1.0, 4.0, 20.0):
        exact = privacy.gaussian_epsilon(z, 1e-6)
        delta = special.ndtr(0.5 / z - exact * z) - math.exp(exact + special.log_ndtr(-0.5 / z - exact * z))
        assert delta == pytest.approx(1e-6, rel=1e-6)
        assert exact <= privacy.compute_epsilon(1.0, z, 1, 1e-6) <= 1.35 * exact + 0.02


GRID = list(itertools.product((1e-3, 1e-2, 0.1, 0.5, 1.0), (0.3, 0.7, 1.1, 4.0, 20.0), (1, 100, 10_000)))


def test_opacus():
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp", exc_type=ImportError)
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    for q, z in itertools.product((1e-3, 0.03, 1.0), (0.3, 1.1, 20.0)):
        rdp = analysis.compute_rdp(q=q, noise_multiplier=z, steps=1, orders=orders)
        for rounds in (1, 100, 10_000):
            with warnings.catch_warnings(action="ignore"):
                theirs = analysis.get_privacy_spent(orders=orders, rdp=rdp * rounds, delta=1e-5)[0]
            ours = privacy.compute_epsilon(q, z, rounds, 1e-5, orders=orders)
            assert ours == pytest.approx(max(theirs, 0), rel=1e-6), (q, z, rounds)


def test_dp_accounting_rdp_is_never_smaller():
    dp, rdp = pytest.importorskip("dp_accounting"), pytest.importorskip("dp_accounting.rdp")
    for q, z, rounds in GRID[::4]:
        event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), rounds)
        theirs = rdp.RdpAccountant().compose(event).get_epsilon(1e-6)
        assert privacy.compute_epsilon(q, z, rounds, 1e-6) <= theirs * (1 + 1e-9), (q, z, rounds)


def test_dp_accounting_pld_is_never_larger():
    dp, pld = pytest.importorskip("dp_accounting"), pytest.importorskip("dp_accounting.pld")
    interval = 1e-3
    for q, z, rounds in [(0.01, 1.1, 1000), (0.1, 1.1, 100), (0.5, 4.0, 100), (1.0, 20.0, 1000), (0.001, 0.7, 1000)]:
        event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), rounds)
        accountant = pld.PLDAccountant(value_discretization_interval=interval)
        theirs = accountant.compose(event).get_epsilon(1e-6)
        assert privacy.compute_epsilon(q, z, rounds, 1e-6) >= theirs - interval * math.sqrt(rounds), (q, z, rounds)


def test_epsilon_is_monotone():
    draw = random.Random(0)
    for _ in range(40):
        q, z = 10 ** draw.uniform(-3, -0.01), 10 ** draw.uniform(math.log10(0.3), math.log10(20))
        rounds, delta = draw.randint(1, 5000), 10 ** draw.uniform(-9, -3)
        epsilon = privacy.compute_epsilon(q, z, rounds, delta)
        assert privacy.compute_epsilon(min(1, q * 1.1), z, rounds, delta) >= epsilon >= 0
        assert privacy.compute_epsilon(q, z * 1.1, rounds, delta) <= epsilon
        assert privacy.compute_epsilon(q, z, rounds + 1, delta) >= epsilon
        assert privacy.compute_epsilon(q, z, rounds, delta * 1.1) <= epsilon
        assert privacy.compute_epsilon(q, z, rounds, delta, sampling="fixed") >= epsilon


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0, 50.0])
def test_find_noise_multiplier(target):
    z = privacy.find_noise_multiplier(target, 1e-6, 0.01, 1000)
    assert target * (1 - 1e-3) <= privacy.compute_epsilon(0.01, z, 1000, 1e-6) <= target


def test_edges_of_the_accountant():
    assert privacy.compute_epsilon(0.01, 0, 1, 1e-6) == math.inf
    assert privacy.compute_epsilon(0, 0, 10, 1e-6) == 0
    assert privacy.compute_epsilon(0, 0, 10, 1e-6, sampling="fixed") == 0
    assert privacy.compute_epsilon(0.5, 0, 0, 1e-6) == 0
    assert privacy.Accountant().epsilon(1e-6) == 0
    assert privacy.compute_epsilon(0.01, 2.0, 10, 1e-6, sampling="fixed") == privacy.compute_epsilon(1, 2.0, 10, 1e-6)
    for bad in [(-0.1, 1, 1, 1e-6), (1.1, 1, 1, 1e-6), (0.1, -1, 1, 1e-6), (0.1, math.nan, 1, 1e-6), (0.1, 1, 0.5, 1e-6),
                (0.1, 1, -1, 1e-6), (0.1, 1, 1, 0), (0.1, 1, 1, 1), (math.nan, 1, 1, 1e-6), (0.1, 1, math.inf, 1e-6)]:
        with pytest.raises(ValueError):
            privacy.compute_epsilon(*bad)
    for bad in [(0, 1e-6), (-1, 1e-6), (1e-9, 1e-6), (math.nan, 1e-6)]:
        with pytest.raises(ValueError):
            privacy.find_noise_multiplier(*bad, 0.5, 1000)
    with pytest.raises(ValueError):
        privacy.compute_epsilon(0.1, 1, 1, 1e-6, orders=(1.0, 2.0))


def test_accountant_history():
    accountant = privacy.Accountant()
    for _ in range(7):
        accountant.spend(0.1, 1.3)
    assert accountant.history == [[0.1, 1.3, 7, "poisson", None]]
    accountant.spend(0.2, 1.0, 3, skellam=[900.0, 30.0])
    resumed = privacy.Accountant(json.loads(json.dumps(accountant.history)))
    assert resumed.epsilon(1e-5) == accountant.epsilon(1e-5) > privacy.compute_epsilon(0.1, 1.3, 7, 1e-5)
    before = json.dumps(accountant.history)
    epsilon = accountant.epsilon(1e-5)
    assert accountant.would_exceed(epsilon, 1e-5, sample_rate=0.1, noise_multiplier=1.3)
    assert not accountant.would_exceed(epsilon * 1.5, 1e-5, sample_rate=0.1, noise_multiplier=1.3)
    assert json.dumps(accountant.history) == before


def test_skellam_bound_covers_the_exact_divergence():
    """One dimension, shift 1: the divergence of Sk(mu) + 1 from Sk(mu), summed over the integers."""
    for z in (3.0, 8.0):
        k = np.arange(-80, 81)
        p, shifted = np.log(special.ive(abs(k), z * z)), np.log(special.ive(abs(k - 1), z * z))  # log pmf

        def divergence(a, b):
            return special.logsumexp(order * a + (1 - order) * b) / (order - 1)
        for order in (2, 5, 16):
            exact = divergence(shifted, p)
            bound = privacy.release_rdp(np.array([order]), z, (1.0, 1.0))[0]
            assert order / (2 * z * z) * 0.7 < exact <= bound
            for q in (0.01, 0.3):
                mixed = np.logaddexp(math.log(q) + shifted, math.log(1 - q) + p)
                assert max(divergence(mixed, p), divergence(p, mixed)) <= privacy._round_rdp(q, z, (order,), (1.0, 1.0))[0]


def test_skellam_bounds_written_out():
    """Agarwal et al. 2021, Cor. 4.1, and Zhu and Wang 2019, Thm. 5, at order 4."""
    q, (l1, l2), variance = 0.3, (3.0, 2.0), 16.0
    epsilon = {a: a * l2 ** 2 / (2 * variance) + min(((2 * a - 1) * l2 ** 2 + 6 * l1) / (4 * variance ** 2), 3 * l1 / (2 * variance))
               for a in (2, 3, 4)}
    assert privacy.release_rdp(np.array([2, 3, 4]), 2.0, (l1, l2)) == pytest.approx(list(epsilon.values()))
    total = ((1 - q) ** 3 * (3 * q + 1) + 6 * q ** 2 * (1 - q) ** 2 * math.exp(epsilon[2])
             + 3 * (4 * q ** 3 * (1 - q) * math.exp(2 * epsilon[3]) + q ** 4 * math.exp(3 * epsilon[4])))
    assert privacy._round_rdp(q, 2.0, (4,), (l1, l2)) == pytest.approx(min(math.log(total) / 3, epsilon[4]))


def test_skellam_costs_little_more_than_gaussian():
    for q, z in ((0.01, 1.1), (1.0, 40.0)):
        sensitivities = mechanism(noise_multiplier=z, mechanism="skellam").spending(q)["skellam"]
        skellam, gaussian = (privacy.compute_epsilon(q, z, 1000, 1e-6, skellam=s) for s in (tuple(sensitivities), None))
        assert gaussian <= skellam < 1.2 * gaussian


# ---- clip, weight, noise ---------------------------------------------------------------------------------

def mechanism(**changes):
    return privacy.Mechanism(**{**dict(clip_norm=2.0, noise_multiplier=1.0, length=400, num_clients=20, min_honest=11), **changes})


def test_clip():
    update = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    clipped, norm = privacy.clip_update(update, 1.5)
    assert np.linalg.norm(clipped) <= 1.5 * (1 + 1e-12) and norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
    assert np.array_equal(privacy.clip_update(update, 1e3)[0], update)
    assert not privacy.clip_update(np.zeros(5), 1.0)[0].any()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError):
            privacy.clip_update(np.array([0.0, bad]), 1.0)


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("bit_scale", [0.0, 0.7])
def test_sensitivity_bounds_every_client(sampling, bit_scale):
    m, draw = mechanism(sampling=sampling, bit_scale=bit_scale, num_clients=10_000, min_honest=9000), np.random.default_rng(1)
    vectors = []
    direction = draw.standard_normal(m.length)
    for scale, weight in itertools.product((0.0, 0.1, 1 - 1e-9, 1e6), (0.0, 0.3, 1.0)):
        for sign in (1, -1):
            vectors.append(m.contribution(sign * scale * m.clip_norm * direction / np.linalg.norm(direction), weight)[0])
    pairs = [(v, np.zeros_like(v)) for v in vectors] if sampling == "poisson" else list(itertools.combinations(vectors, 2))
    distances = [np.linalg.norm(a - b) for a, b in pairs]
    assert m.sensitivity * 0.95 < max(distances) <= m.sensitivity * (1 + 1e-9)
    rounded = [np.linalg.norm(np.rint(a / m.step) - np.rint(b / m.step)) for a, b in pairs]
    assert max(rounded) <= m.grid_sensitivity


def test_rounding_is_counted():
    """Half a step more in each coordinate: a vector that rounding makes as much longer as it can."""
    m = mechanism(noise_multiplier=0.0, num_clients=10 ** 8, min_honest=1, length=10 ** 4)
    vector = m.step * 0.501 * np.ones(m.coordinates)
    grown = np.linalg.norm(np.rint(vector / m.step)) - np.linalg.norm(vector / m.step)
    assert 0.95 * math.sqrt(m.coordinates) / 2 < grown <= m.grid_sensitivity - m.sensitivity / m.step + 1e-6


def test_weight_outside_the_unit_interval_is_refused():
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            mechanism().contribution(np.ones(400), weight)


@pytest.mark.parametrize("kind", ["gaussian", "skellam"])
@pytest.mark.parametrize("place, clients, expected", [("distributed", 11, 1.0), ("server", 11, 1.0), ("local", 1, 1.0)])
def test_fewest_honest_survivors_carry_all_the_noise(kind, place, clients, expected):
    m = mechanism(length=40_000, noise=place, mechanism=kind, noise_multiplier=1.5)
    zeros = np.zeros(m.coordinates)
    total = sum(m.encode(zeros, 0, k).view(np.int32).astype(np.int64) for k in range(clients))
    noise = total + m._noise(m.server_std, ())
    target = m.noise_multiplier * m.grid_sensitivity
    assert np.std(noise) == pytest.approx(expected * target, rel=0.02)
    assert stats.kstest(noise / target, "norm").pvalue > 1e-4
    assert target * m.step > m.noise_multiplier * m.sensitivity


def test_noise_is_fresh_unless_seeded():
    fresh, seeded, zeros = mechanism(), mechanism(insecure_seed=3), np.zeros(401)
    assert not np.array_equal(fresh.encode(zeros, 0, 0), fresh.encode(zeros, 0, 0))
    for kind in ("gaussian", "skellam"):
        seeded = mechanism(insecure_seed=3, mechanism=kind)
        assert np.array_equal(seeded.encode(zeros, 0, 0), seeded.encode(zeros, 0, 0))
        others = [seeded.encode(zeros, *context) for context in ((0, 1), (1, 0))] + [replace(seeded, insecure_seed=4).encode(zeros, 0, 0)]
        assert not any(np.array_equal(seeded.encode(zeros, 0, 0), other) for other in others)


def test_poisson_sampler():
    """Against scipy's distribution, bin by bin, at the smallest mean and, by its moments, at a huge one."""
    draws = privacy._poisson(512.0, 200_000, None)
    edges = stats.poisson.ppf(np.linspace(0, 1, 41)[1:-1], 512)
    observed = np.bincount(np.searchsorted(edges, draws), minlength=40)
    expected = np.diff(np.concatenate(([0], stats.poisson.cdf(edges, 512), [1]))) * len(draws)
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    z = (privacy._poisson(1e12, 100_000, None) - 1e12) / 1e6
    assert stats.kstest(z, "norm").pvalue > 1e-4


def test_gaussian_noise_reaches_its_tails_symmetrically(monkeypatch):
    words = np.array([0, 1, 2 ** 64 - 2, 2 ** 64 - 1], np.uint64)
    monkeypatch.setattr(privacy, "_random_words", lambda count, key: words)
    noise = privacy.gaussian_noise(1e6, 4)
    assert noise[0] == -noise[1] > 8.9e6 and abs(noise[2:]).max() < 1


def test_decode_is_the_weighted_mean():
    m = mechanism(noise_multiplier=0.0, bit_scale=0.5)
    draw = np.random.default_rng(2)
    updates, weights = draw.standard_normal((8, 400)) * 0.05, draw.uniform(0.2, 1, 8)
    updates[0] *= 100
    total = sum(m.encode(m.contribution(u, w)[0]) for u, w in zip(updates, weights))
    mean, weight, fraction = m.decode(total, 8)
    clipped = [privacy.clip_update(u, 2.0)[0] for u in updates]
    assert mean == pytest.approx(np.average(clipped, axis=0, weights=weights), abs=1e-6)
    assert weight == pytest.approx(weights.sum(), rel=1e-6) and fraction == pytest.approx(7 / 8, abs=1e-6)
    empty, weight, _ = m.decode(np.zeros(m.coordinates, np.uint32), 0)
    assert not empty.any() and weight == 0


def test_adaptive_clipping_finds_the_quantile_and_pays_for_its_bit():
    updates = np.random.default_rng(3).lognormal(0, 0.5, (100, 1)) * np.eye(4)[0]
    m = mechanism(length=4, bit_scale=0.5, clip_norm=10.0, num_clients=100, min_honest=51)
    clip_norms = []
    for _ in range(80):
        total = sum(m.encode(m.contribution(update, 1.0)[0]) for update in updates)
        fraction = m.decode(total, len(updates))[2]
        m = replace(m, clip_norm=privacy.next_clip_norm(m.clip_norm, fraction, 0.5, 0.2))
        clip_norms.append(m.clip_norm)
    assert np.mean(clip_norms[40:]) == pytest.approx(np.median(updates[:, 0]), rel=0.1)
    plain, adaptive = mechanism(), mechanism(bit_scale=0.5)
    assert adaptive.sensitivity == pytest.approx(math.hypot(plain.sensitivity, 0.5 * 2.0 / 2))
    assert adaptive.client_std * adaptive.step > plain.client_std * plain.step
    assert adaptive.spending(0.1) == plain.spending(0.1)
    skellam = mechanism(mechanism="skellam", bit_scale=0.5)
    assert replace(skellam, clip_norm=0.3).spending(0.1)["skellam"] == pytest.approx(skellam.spending(0.1)["skellam"])


def test_unsafe_mechanisms_are_refused():
    for changes in (dict(noise="nowhere"), dict(mechanism="laplace"), dict(sampling="shuffle"), dict(ring=16), dict(clip_norm=0),
                    dict(min_honest=0), dict(min_honest=21), dict(noise_multiplier=-1), dict(weight_scale=0),
                    dict(num_clients=2 ** 30), dict(noise_multiplier=1e7), dict(clip_norm=math.nan), dict(length=0)):
        with pytest.raises(ValueError):
            mechanism(**changes)


# ---- secure aggregation: pieces --------------------------------------------------------------------------

def test_x25519_published_vectors():
    vectors = [("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
                "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
                "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"),
               ("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
                "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
                "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957")]  # RFC 7748, Sec. 5.2
    for scalar, point, result in vectors:
        assert privacy.x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == result
    k = u = BASE
    for i in range(1000):
        k, u = privacy.x25519(k, u), k
        if i == 0:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


SMALL_ORDER = [0, 1, 2 ** 255 - 20, 325606250916557431795983626356110631294008115727848805560023387167927233504,
               39382357235489614581723060781553021112529911719440698176882885853963445705823]


def test_public_keys_are_checked():
    for point in SMALL_ORDER:
        with pytest.raises(ValueError, match="small order"):
            privacy.x25519(bytes(range(32)), point.to_bytes(32, "little"))
    clients, roster = advertised(Terms(4, 5, 3))
    for bad in [p.to_bytes(32, "little") for p in SMALL_ORDER] + [(2 ** 255 - 19 + 9).to_bytes(32, "little"), b"\xff" * 32,
                BASE[:31], roster[2], roster[0]]:
        client = advertised(clients[0].terms)[0][0]
        with pytest.raises(ValueError):
            client.share({**roster, 0: client._public, 1: bad if bad != roster[0] else client._public})


def test_every_derived_key_is_separate_and_uses_every_bit():
    terms, other, secret = Terms(4, 5, 3), Terms(4, 5, 3), bytes(range(32))
    keys = [privacy.derive_key(s, t, p, *c) for s, t, p, c in [
        (secret, terms, b"pair", (0, 1)), (secret, other, b"pair", (0, 1)), (secret, terms, b"self", (0, 1)),
        (secret, terms, b"pair", (1, 0)), (secret, terms, b"pair", (0, 2)), (secret, terms, b"pair", (0,)),
        (secret, terms, b"pair", (1, 11)), (secret, terms, b"pair", (11, 1)), (secret, terms, b"shares", (0, 1))]]
    masks = [privacy.expand(key[:32], terms).tobytes() for key in keys]
    for bit in range(256):
        flipped = (int.from_bytes(secret, "big") ^ 1 << bit).to_bytes(32, "big")
        masks.append(privacy.expand(flipped, terms).tobytes())
        keys.append(privacy.derive_key(flipped, terms, b"pair", 0, 1))
    assert len(set(masks)) == len(masks) and len(set(keys)) == len(keys)
    prk = privacy.hmac.digest(terms.session, secret, "sha512")  # HKDF-Expand's first block, written out
    assert keys[0] == privacy.hmac.digest(prk, b"PrivFedTalk secure aggregation 1|pair|0|1\x01", "sha512")


def chi_square(residues, bins):
    return stats.chisquare(np.bincount(residues, minlength=bins)).pvalue


def assert_uniform(values):
    bits = 8 * values.dtype.itemsize
    for shift in (bits - 8, bits - 16, 8, 0):
        assert chi_square((values >> values.dtype.type(shift) & values.dtype.type(255)).astype(int), 256) > 1e-5
    top, bottom = np.iinfo(values.dtype).max - values, values
    for tail in (top, bottom):  # the residues next to the ring's two ends are reached
        assert abs(np.sum(tail < np.iinfo(values.dtype).max // 1000) - len(values) / 1000) < 6 * math.sqrt(len(values) / 1000)


@pytest.mark.parametrize("ring", [32, 64])
def test_masks_are_uniform_on_the_ring(ring):
    terms = Terms(3, 200_000, 2, ring=ring)
    assert_uniform(privacy.expand(bytes(32), terms))
    with pytest.raises(AssertionError):
        privacy.expand(bytes(4), terms)


def test_sealing():
    key = hashlib.sha512(b"key").digest()
    for size in (0, 1, 66, 5000):
        message = bytes(i % 251 for i in range(size))
        sealed = privacy.seal(key, message)
        assert privacy.unseal(key, sealed) == message and len(sealed) == size + 32
        assert size < 32 or message[:32] not in sealed
        for damaged in (sealed[:-1], sealed + b"0", bytes([sealed[0] ^ 1]) + sealed[1:], sealed[:-1] + bytes([sealed[-1] ^ 1]), b""):
            with pytest.raises(ValueError):
                privacy.unseal(key, damaged)


def test_shamir():
    p, draw = privacy._FIELD, random.Random(0)
    assert p > 2 ** 256 and all(pow(a, p - 1, p) == 1 for a in (2, 3, 5, 7, 11, 13))
    for secret in (bytes(32), b"\xff" * 32, bytes(range(32))):
        shares = privacy.split_secret(secret, 4, [0, 2, 3, 7, 9, 30])
        for chosen in itertools.combinations(shares, 4):
            assert privacy.join_secret({i: shares[i] for i in chosen}, 4) == secret
        with pytest.raises(AggregationAborted):
            privacy.join_secret({i: shares[i] for i in (0, 2, 3)}, 4)
        assert privacy.split_secret(secret, 4, [0])[0] != privacy.split_secret(secret, 4, [0])[0]
    firsts = [int.from_bytes(privacy.split_secret(bytes(32), 2, [0])[0], "big") for _ in range(3000)]
    assert chi_square([f * 16 // p for f in firsts], 16) > 1e-5  # one share of a fixed secret is uniform on the field


def test_unsafe_terms_are_refused():
    for bad in [dict(threshold=4), dict(threshold=9), dict(threshold=3, neighbors=5), dict(threshold=3, neighbors=8),
                dict(threshold=2, neighbors=4), dict(threshold=6, neighbors=4), dict(threshold=5, largest=2 ** 28),
                dict(threshold=5, ring=16), dict(threshold=5, length=0)]:
        with pytest.raises(ValueError):
            Terms(**{**dict(num_clients=8, length=5), **bad})
    with pytest.raises(ValueError, match="overflow"):
        privacy.secure_sum(np.zeros((1100, 2)), 551, bits=22)
    Terms(1000, 2, 501, largest=2 ** 21)
    Terms(1100, 2, 551, largest=2 ** 22, ring=64)


def test_graph():
    for n, degree in ((9, 4), (20, 6), (7, 6)):
        terms = Terms(n, 1, degree // 2 + 1, degree)
        for i in range(n):
            assert len(set(terms.neighbours(i)) - {i}) == degree and all(i in terms.neighbours(j) for j in terms.neighbours(i))
    terms = Terms(8, 1, 5)
    assert all(terms.neighbours(i) == [j for j in range(8) if j != i] for i in range(8))
    terms = Terms(9, 1, 2, 2)
    with pytest.raises(AggregationAborted, match="gap"):
        terms.check_present(set(range(9)) - set(terms.ring[2:3]) - set(terms.ring[6:7]))
    assert Terms(50, 1, 3, 4).ring != Terms(50, 1, 3, 4).ring


# ---- secure aggregation: the protocol --------------------------------------------------------------------

@pytest.fixture
def toy_group(monkeypatch):
    """A fast key agreement, for tests of everything around it."""
    monkeypatch.setattr(privacy, "x25519", toy_agreement)


def advertised(terms):
    clients = [SecureAggregationClient(terms, i) for i in range(terms.num_clients)]
    return clients, {i: key for c in clients for i, key in c.advertise().items()}


def advance(terms, stage):
    """(clients, server, messages of this stage, not yet received), everybody honest and present."""
    clients, server, answer = [SecureAggregationClient(terms, i) for i in range(terms.num_clients)], SecureAggregationServer(terms), None
    for name in privacy.STAGES:
        arguments = {"advertise": lambda i: (), "share": lambda i: (answer,), "unmask": lambda i: (answer,),
                     "mask": lambda i: (np.full(terms.length, i, terms.dtype), answer[i])}[name]
        messages = {i: getattr(c, name)(*arguments(i)) for i, c in enumerate(clients)}
        if name == stage:
            return clients, server, messages
        for i, message in messages.items():
            server.receive(name, i, message)
        answer = server.close(name)


def test_every_way_to_drop_out(toy_group):
    """The short form of `proof_dropouts.py`."""
    for n, drops, neighbors in ((3, every_fate(3), None), (5, every_subset(5, range(6)), None), (6, every_subset(6, range(4)), 4),
                                (12, every_subset(12, (1,)), None)):
        assert any([check(n, drop, neighbors) for drop in drops])


@pytest.mark.parametrize("neighbors, threshold", [(None, 5), (4, 3)])
@pytest.mark.parametrize("ring, bits", [(32, None), (32, 20), (64, None)])
def test_sum_is_exactly_that_of_the_quantized_inputs(neighbors, threshold, ring, bits):
    draw = np.random.default_rng(4)
    vectors = draw.standard_normal((8, 100)) * draw.uniform(0, 1, (8, 1))  # unequal weights
    bound = 1.5
    largest = 2 ** (bits - 1) if bits else min((2 ** (ring - 1) - 1) // 8, 2 ** 50)
    steps = np.rint(np.clip(vectors / (bound / largest), -largest, largest)).astype(np.int64)
    ours = privacy.secure_sum(vectors, threshold, neighbors, {"mask": [2], "unmask": [5]}, bound, bits, ring)
    assert np.array_equal(ours, np.delete(steps, 2, 0).sum(0) * (bound / largest))
    assert ours == pytest.approx(np.delete(np.clip(vectors, -bound, bound), 2, 0).sum(0), abs=8 * bound / largest)


def test_secure_sum_edges():
    assert not privacy.secure_sum(np.zeros((3, 4)), 2).any()
    with pytest.raises(ValueError):
        privacy.secure_sum(np.array([[0, math.nan]] * 3), 2)
    with pytest.raises(ValueError):
        privacy.secure_sum(np.zeros((3, 4)), 2, drop={"lunch": [0]})
    with pytest.raises(AggregationAborted, match="2 clients are left, 3 are needed"):
        privacy.secure_sum(np.zeros((4, 4)), 3, drop={"share": [0, 1]})


def test_keys_masks_and_shares_are_fresh_each_round(toy_group):
    terms = Terms(4, 1000, 3)
    (_, _, first), (_, _, second) = advance(terms, "mask"), advance(terms, "mask")
    assert not any(np.array_equal(first[i], second[i]) for i in range(4))
    keys = [SecureAggregationClient(terms, 0) for _ in range(5)]
    for name in ("_private", "_self_seed", "_escrow", "_public"):
        assert len({getattr(c, name) for c in keys}) == 5
    seeds = [list(seed) for c in advance(Terms(12, 1, 7), "mask")[0] for seed in c._pair.values()]
    assert all(len({seed[byte] for seed in seeds}) > 30 for byte in range(32))  # all 256 bits of a pair's seed vary


def test_server_holds_nothing_unmasked(toy_group):
    """What the server adds up is uniform, also when it knows every pair mask of a client: the self mask remains."""
    terms = Terms(5, 50_000, 3)
    clients, server, messages = advance(terms, "mask")
    for i, message in messages.items():
        server.receive("mask", i, message)
        assert_uniform(server._total)
        assert_uniform(message)
    client, without_pairs = clients[2], messages[2].copy()
    for i, seed in client._pair.items():
        (np.subtract if 2 < i else np.add)(without_pairs, privacy.expand(seed, terms), out=without_pairs)
    assert_uniform(without_pairs)
    without_self = messages[2] - privacy.expand(privacy.derive_key(client._self_seed, terms, b"self", 2)[:32], terms)
    assert_uniform(without_self)  # and the other way round: its self mask known, the pair masks remain
    assert not any(isinstance(v, np.ndarray) and v is not server._total for v in vars(server).values())
    assert all(v is None for v in server._arrived.values())


def test_shares_are_bound_to_sender_receiver_and_round(toy_group):
    terms = Terms(4, 5, 3)
    values = np.zeros(5, np.uint32)
    for tamper in ("reflected", "other sender", "other receiver", "other round", "damaged"):
        clients, roster = advertised(terms)
        sent = {c.index: c.share(roster) for c in clients}
        inbox = {j: sent[j][0] for j in (1, 2, 3)}
        inbox[1] = {"reflected": sent[0][1], "other sender": sent[2][0], "other receiver": sent[1][2],
                    "damaged": sent[1][0][:-1] + bytes([sent[1][0][-1] ^ 1]), "other round": None}[tamper]
        if tamper == "other round":  # the same key pairs, another session
            again = Terms(4, 5, 3)
            for c in clients:
                c.terms, c._stages = again, ["share"]
            inbox[1] = {c.index: c.share(roster) for c in clients}[1][0]
            clients[0].terms, clients[0]._stages = terms, ["mask"]
            clients[0]._inbound = {j: privacy.derive_key(privacy.x25519(clients[0]._private, roster[j]), terms, b"shares", j, 0) for j in (1, 2, 3)}
        with pytest.raises(ValueError, match="forged"):
            clients[0].mask(values, inbox)
    assert sent[1][0] != sent[1][2] and not set(sent[1][0][:33]) == {0}


def test_client_refuses_to_betray(toy_group):
    terms = Terms(6, 5, 4)
    def client():
        return advance(terms, "mask")[0][0]
    good = client()
    shares = good.unmask([0, 1, 2, 3])
    assert all(shares[i] == good._held[i][0 if i < 4 else 1] for i in range(6))  # one of the two, never both
    with pytest.raises(ValueError, match="twice"):
        good.unmask([0, 1, 2, 3, 4, 5])
    for survivors in ([0, 1, 2, 3, 3], [1, 2, 3, 4], [0, 1, 2, 99], [0, 1, 2, 3, -1]):
        with pytest.raises(ValueError):
            client().unmask(survivors)
    with pytest.raises(AggregationAborted):
        client().unmask([0, 1, 2])
    clients, server, messages = advance(terms, "share")
    for i in range(5):
        server.receive("share", i, messages[i])
    inboxes = server.close("share")
    clients[0].mask(np.zeros(5, np.uint32), inboxes[0])
    with pytest.raises(ValueError, match="no shares"):
        clients[0].unmask([0, 1, 2, 3, 5])


def test_client_refuses_unfit_messages(toy_group):
    terms = Terms(4, 5, 3)
    for roster_change in ({0: b"\x05" * 32}, {1: b""}):
        clients, roster = advertised(terms)
        with pytest.raises(ValueError):
            clients[0].share({**roster, **roster_change})
    clients, roster = advertised(terms)
    with pytest.raises(AggregationAborted):
        clients[0].share({0: roster[0], 1: roster[1]})
    with pytest.raises(ValueError, match="order"):
        clients[1].mask(np.zeros(5, np.uint32), {})
    with pytest.raises(ValueError, match="order"):
        clients[1].share(roster)  # a client that refused once is out
    for values in (np.zeros(4, np.uint32), np.zeros(5, np.uint64), np.zeros((5, 1), np.uint32)):
        clients, _, _ = advance(terms, "share")
        with pytest.raises(ValueError, match="form"):
            clients[0].mask(values, {})
    clients, _, _ = advance(terms, "share")
    with pytest.raises(AggregationAborted):
        clients[0].mask(np.zeros(5, np.uint32), {})
    clients, _, _ = advance(terms, "share")
    with pytest.raises(ValueError, match="neighbour"):
        clients[0].mask(np.zeros(5, np.uint32), {9: b""})


def test_server_refuses_unfit_messages(toy_group):
    terms = Terms(4, 5, 3)
    for stage in privacy.STAGES:
        _, server, messages = advance(terms, stage)
        with pytest.raises(ValueError, match="unknown"):
            server.receive(stage, 4, messages[0])
        for other in set(privacy.STAGES) - {stage}:
            with pytest.raises(ValueError, match="late or early"):
                server.receive(other, 0, messages[0])
        bad = messages[0][:-1] if stage == "mask" else {i: m[:-1] for i, m in messages[0].items()}
        before = server._total.copy()
        for form in (bad, messages[0].astype(np.uint64) if stage == "mask" else {**messages[0], 9: b""}):
            with pytest.raises(ValueError, match="form"):
                server.receive(stage, 0, form)
        server.receive(stage, 0, messages[0])
        once = server._total.copy()
        with pytest.raises(ValueError, match="twice"):
            server.receive(stage, 0, messages[0])
        assert np.array_equal(server._total, once) and (stage == "mask" or np.array_equal(once, before))
        with pytest.raises(AggregationAborted):
            server.close(stage)
        with pytest.raises(ValueError):
            server.receive(stage, 1, messages[1])
        with pytest.raises(ValueError, match="not open"):
            server.close(stage)


# ---- audit, report, command line -------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(noise_multiplier=0.02, sampling="fixed", weight_scale=2.0), dict(mechanism="skellam")])
def test_audit_flags_every_defect_and_no_sound_run(changes):
    for seed in range(2):
        m = mechanism(length=700, insecure_seed=seed, **changes)
        for defect in privacy.DEFECTS:
            result = privacy.canary_audit(m, 1e-5, defect=defect, seed=seed)
            assert result["flagged"] == (defect is not None), result
            assert result["epsilon_lower_bound"] <= result["measured_epsilon"] <= result["epsilon_upper_bound"]
            assert result["expected_epsilon"] <= result["accounted_epsilon"] == privacy.gaussian_epsilon(m.noise_multiplier, 1e-5)
            assert (result["epsilon_lower_bound"] > result["expected_epsilon"]) == result["flagged"]
            assert "too few" not in result["why"] and "must add" in result["why"] and json.loads(json.dumps(result)) == result


def test_audit_with_few_canaries_says_so():
    assert "too few" in privacy.canary_audit(mechanism(insecure_seed=0), 1e-5, num_canaries=2, seed=0)["why"]
    for bad in (dict(num_canaries=201), dict(num_canaries=1), dict(defect="cosmic rays")):
        with pytest.raises(ValueError):
            privacy.canary_audit(mechanism(), 1e-5, **bad)


@pytest.mark.parametrize("z", [0.02, 1.0, 3.0])
def test_audit_bounds_hold_as_often_as_promised(z):
    """False alarms of a sound mechanism at 90 % confidence, and detection of half the noise at 99 %, in 400 audits each."""
    draw, n = np.random.default_rng(5), max(256, math.ceil(300 * z ** 2))

    def bounds(noise, confidence):
        return privacy.measured_noise(draw.normal(1, noise, n), draw.normal(0, noise, n), confidence)
    outside = np.array([(low > z, high < z) for low, _, high in (bounds(z, 0.9) for _ in range(400))]).mean(0)
    assert outside.max() <= 0.05 + 0.02
    assert np.mean([bounds(z / 2, 0.99)[2] < z for _ in range(400)]) > 0.95
    assert np.median([bounds(z, 0.99)[1] for _ in range(100)]) == pytest.approx(z, rel=0.03)
    assert privacy.gaussian_epsilon(privacy.measured_noise(draw.normal(-9, 1, 50), draw.normal(0, 1, 50), 0.99)[0], 1e-5) == 0


def test_report_says_everything():
    for kind in ("gaussian", "skellam"):
        m, accountant = mechanism(mechanism=kind), privacy.Accountant()
        for _ in range(5):
            accountant.spend(**m.spending(0.1))
        report, skellam = privacy.privacy_report(m, accountant, 1e-5, participations=2), m.spending(0.1)["skellam"]
        assert json.loads(json.dumps(report)) == report
        assert report["epsilon"] == privacy.compute_epsilon(0.1, 1.0, 5, 1e-5, skellam=skellam)
        assert report["epsilon"] == privacy.compute_epsilon(0.1, 1.0, 5, 1e-5, orders=(report["best_order"],), skellam=skellam)
        assert report["epsilon_known_cohorts"] == privacy.compute_epsilon(1.0, 1.0, 2, 1e-5, skellam=skellam)
        assert report["sample_rate"] == 0.1 and report["rounds"] == 5 and report["private"] is True
        for key in ("clip_norm", "noise_multiplier", "sampling", "history", "accountant", "orders", "best_order", "adjacency", "unit",
                    "delta", "trusted", "not_covered", "noise", "mechanism", "min_honest", "rounded_sensitivity"):
            assert report[key], key
    for place in privacy.TRUSTED:
        report = privacy.privacy_report(mechanism(noise=place), accountant, 1e-5, 2)
        assert ("server" in report["epsilon_known_cohorts_protects_from"]) == (place != "server")
    noiseless = privacy.Accountant([[0.1, 0.0, 1, "poisson", None]])
    for m, spent in ((mechanism(insecure_seed=1), accountant), (mechanism(noise_multiplier=0.0), noiseless), (mechanism(), noiseless)):
        report = privacy.privacy_report(m, spent, 1e-5, 2)
        assert report["epsilon"] is report["epsilon_known_cohorts"] is None and not report["private"] and report["no_privacy_because"]


def run(*arguments):
    return subprocess.run([sys.executable, privacy.__file__, *arguments], capture_output=True, text=True)


def test_command_line(capsys):
    privacy.main("--clients 1000 --rate 0.01 --noise 1.1 --rounds 1000 --delta 1e-6".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(r[0]) for r in rows][-1] == 1000
    assert float(rows[-1][1]) == pytest.approx(privacy.compute_epsilon(0.01, 1.1, 1000, 1e-6), abs=1e-4)
    privacy.main("--target-epsilon 8 --rate 0.01 --rounds 1000 --delta 1e-6".split())
    z = float(capsys.readouterr().out.split()[2].strip(","))
    privacy.main("--noise 1.1 --rounds 100 --skellam 100000".split())
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert table[0] == ["round", "epsilon", "skellam"] and all(float(g) <= float(s) < 2 * float(g) for _, g, s in table[1:])
    assert privacy.compute_epsilon(0.01, z, 1000, 1e-6) == pytest.approx(8, rel=1e-3)
    for bad in ("--noise -1", "--noise x", "--noise 1 --rate 2", "--noise 1 --delta 0", "--noise 1 --delta 0.1", "--noise 1 --rounds 0",
                "--target-epsilon 0", "--target-epsilon nan", "--noise 1 --target-epsilon 8", "", "--nose 1", "--noise 1 --clients 0",
                "--noise 1 --sampling all", "--noise nan", "--noise 1 --skellam 0",
                "--noise 1 --clients 99999999 --delta 1e-9 --skellam 9", "--noise 1 --rounds 9" + "9" * 400):
        with pytest.raises(SystemExit) as stop:
            privacy.main(bad.split())
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and not printed.out, bad
    result = run("--noise", "-1")
    assert result.returncode == 2 and "Traceback" not in result.stderr
