"""Oracles, closed forms and attacks for privacy.py."""

import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import privacy
import train
from privacy import (
    AggregationAborted,
    Mechanism,
    RoundParams,
    SecureAggregationClient,
    SecureAggregationServer,
)
from proof_dropouts import check, every_fate, every_subset, toy_agreement

# ---------------------------------------------------------------- accounting


def quadrature_rdp(q, z, order):
    """log E_{x ~ p0}[(p / p0)^order] / (order - 1) by adaptive quadrature, in pieces of one z."""

    def log_integrand(x):
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z))
        return order * ratio - x * x / (2 * z * z)

    def integrand(x):
        return np.exp(log_integrand(x) - shift) / (z * math.sqrt(2 * math.pi))

    shift = max(0.0, log_integrand(np.linspace(-12 * z, order + 12 * z, 4001)).max())
    pieces = np.arange(-12 * z, order + 12 * z + z, z)
    total = 0.0
    for low, high in itertools.pairwise(pieces):
        total += integrate.quad(integrand, low, high, epsabs=0, epsrel=1e-12)[0]
    return (math.log(total) + shift) / (order - 1)


def binomial_rdp(q, z, order):
    """Mironov et al. 2019, Sec. 3.3: the exact sum at a whole order."""
    k = np.arange(order + 1)
    log_binomial = special.gammaln(order + 1) - special.gammaln(k + 1)
    log_binomial = log_binomial - special.gammaln(order - k + 1)
    terms = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q)
    return special.logsumexp(terms + k * (k - 1) / (2 * z * z)) / (order - 1)


@pytest.mark.parametrize("q, z", [(0.01, 1.1), (0.2, 0.5), (0.5, 2.0), (0.9, 0.3), (0.1, 5.0)])
def test_renyi_divergence_equals_adaptive_quadrature(q, z):
    for order in (1.01, 1.5, 3.7, 10.9):
        assert privacy.sampled_rdp(q, z, order) == pytest.approx(
            quadrature_rdp(q, z, order), rel=1e-6
        )


def test_renyi_divergence_equals_the_binomial_sum_at_whole_orders():
    for q, z in itertools.product((1e-3, 0.05, 0.5, 0.99), (0.01, 0.05, 0.3, 1.0, 4.0, 20.0)):
        for order in (2, 5, 17, 64, 300, 1024):
            if order < 2000 * z:
                exact = binomial_rdp(q, z, order)
                assert privacy.sampled_rdp(q, z, order) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_full_participation_is_the_closed_form():
    closed = np.array(privacy.ORDERS) / (2 * 1.7**2)
    assert privacy.round_rdp(1.0, 1.7, privacy.ORDERS) == pytest.approx(closed)
    assert privacy.round_rdp(1 - 1e-12, 1.7, privacy.ORDERS) == pytest.approx(closed, rel=1e-6)


def test_conversion_to_epsilon_written_out():
    expected = 3 * 5 / (2 * 2.0**2) + math.log(1 - 1 / 5) - math.log(1e-5 * 5) / 4
    assert privacy.compute_epsilon(1.0, 2.0, 3, 1e-5, orders=(5.0,)) == pytest.approx(expected)


# Rate, noise, rounds and epsilon at delta 1e-5 by opacus 1.6.0, accountants.analysis.rdp:
# get_privacy_spent(orders, compute_rdp(q, noise_multiplier, steps, orders), delta)
OPACUS_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
OPACUS = [
    (0.001, 0.3, 100, 14.236016518088931),
    (0.001, 1.1, 10000, 0.6321381775209115),
    (0.03, 0.01, 1, 5573.206120708341),
    (0.03, 0.05, 10, 1926.0568901505037),
    (0.03, 0.3, 1, 14.121413678275445),
    (0.03, 1.1, 1000, 5.615002153021959),
    (0.3, 0.02, 4, 5558.803454188519),
    (0.3, 0.7, 50, 31.2135193110688),
    (0.3, 20, 10000, 7.5977259659885705),
    (0.75, 0.1, 2, 163.542288977065),
    (1.0, 0.27, 2, 37.394854156230465),
    (1.0, 4, 100, 14.132226163159334),
]


def test_epsilon_equals_opacus_at_its_orders():
    for q, z, rounds, theirs in OPACUS:
        ours = privacy.compute_epsilon(q, z, rounds, 1e-5, OPACUS_ORDERS)
        assert ours == pytest.approx(theirs, rel=1e-9), (q, z, rounds)


# Rate, noise, rounds and epsilon at delta 1e-5 by dp-accounting 0.6.0 for the event
# SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), rounds): by
# rdp.RdpAccountant() and by pld.PLDAccountant(value_discretization_interval), and this interval.
DP_ACCOUNTING = [
    (0.001, 0.3, 100, 14.23672175172381, 11.040556373245085, 0.0001),
    (0.001, 1.1, 10000, 0.6321381775209215, 0.4025987263519395, 0.0001),
    (0.01, 0.01, 1, 5561.121385532992, 5304.399999998416, 0.1),
    (0.01, 0.03, 1, 672.2324966441028, 653.0021528392684, 0.1),
    (0.03, 0.05, 1, 273.8219126877334, 263.6291579022061, 0.01),
    (0.03, 0.3, 1, 14.121413825605941, 12.707024981802524, 0.0001),
    (0.01, 1.1, 1000, 1.7117701662429012, 1.5153702481094293, 0.0001),
    (0.1, 0.5, 20, 18.156030500467466, 15.596764378082387, 0.0001),
    (0.3, 0.02, 1, 1473.5345567312752, 1448.2000000001776, 0.1),
    (0.3, 0.7, 50, 31.65517455917027, 28.39095749158069, 0.0001),
    (0.5, 4, 100, 6.370823946010939, 5.868720578133993, 0.0001),
    (0.3, 20, 1000, 2.04905118572254, 1.8843055306983, 0.0001),
    (0.75, 0.1, 2, 163.54228897706497, 157.02048032057823, 0.01),
    (1.0, 0.27, 2, 37.394854156230465, 35.326972544335895, 0.01),
    (1.0, 4, 100, 14.132226163159334, 13.206712467449256, 0.0001),
]


def test_epsilon_is_between_dp_accountings_two_bounds():
    for q, z, rounds, renyi, loss_distribution, interval in DP_ACCOUNTING:
        ours = privacy.compute_epsilon(q, z, rounds, 1e-5)
        assert loss_distribution - interval <= ours <= renyi * (1 + 1e-9), (q, z, rounds)


def test_gaussian_epsilon_solves_its_equation():
    for z in (0.001, 0.01, 0.3, 1.0, 4.0, 20.0):
        exact = privacy.gaussian_epsilon(z, 1e-6)
        second = math.exp(exact + special.log_ndtr(-0.5 / z - exact * z))
        delta = special.ndtr(0.5 / z - exact * z) - second
        assert delta == pytest.approx(1e-6, rel=1e-3)
        assert exact <= privacy.compute_epsilon(1.0, z, 1, 1e-6, privacy.ORDERS)
    # total variation 2 Phi(1 / 2z) - 1 below delta: nothing else is needed
    assert privacy.gaussian_epsilon(1e7, 1e-6) == privacy.gaussian_epsilon(math.inf, 1e-6) == 0
    assert privacy.gaussian_epsilon(0.0, 1e-6) == math.inf


def test_epsilon_is_monotone_in_every_argument():
    draw = random.Random(0)
    for _ in range(30):
        q = 10 ** draw.uniform(-3, -0.01)
        z = 10 ** draw.uniform(-2.3, 1.3)  # 0.005 to 20
        rounds = draw.randint(1, 5000)
        delta = 10 ** draw.uniform(-9, -3)
        epsilon = privacy.compute_epsilon(q, z, rounds, delta)
        assert 0 <= epsilon <= privacy.compute_epsilon(min(1, q * 1.1), z, rounds, delta)
        assert epsilon >= privacy.compute_epsilon(q, z * 1.1, rounds, delta)
        assert epsilon <= privacy.compute_epsilon(q, z, rounds + 1, delta)
        assert epsilon >= privacy.compute_epsilon(q, z, rounds, delta * 1.1)


def test_sampling_never_costs_epsilon_and_little_noise_is_not_overstated():
    for q, z, rounds in itertools.product((0.1, 0.75, 0.999), (0.005, 0.02, 0.1, 1.0), (1, 4, 500)):
        unsampled = privacy.gaussian_epsilon(z / math.sqrt(rounds), 1e-5)
        assert privacy.compute_epsilon(q, z, rounds, 1e-5) <= unsampled * (1 + 1e-12)
        exact = pytest.approx(unsampled, rel=1e-12)
        assert privacy.compute_epsilon(1.0, z, rounds, 1e-5) == exact
    assert privacy.compute_epsilon(0.75, 0.005, 4, 1e-5) == pytest.approx(81_705, rel=1e-5)


def test_known_cohorts_compose_to_one_gaussian():
    accountant = privacy.Accountant([[0.1, 2.0, 5], [0.2, 1.0, 3], [0.0, 0.0, 9]])
    everything = privacy.gaussian_epsilon((5 / 4 + 3) ** -0.5, 1e-5)
    assert accountant.epsilon_known_cohorts(1e-5) == pytest.approx(everything)
    # at most 4 rounds of one client: the three with the least noise and one more
    some = privacy.gaussian_epsilon((1 / 4 + 3) ** -0.5, 1e-5)
    assert accountant.epsilon_known_cohorts(1e-5, participations=4) == pytest.approx(some)
    assert accountant.epsilon_known_cohorts(1e-5, participations=0) == 0
    assert accountant.epsilon(1e-5) < everything


def test_a_round_without_noise_makes_epsilon_infinite_for_good():
    accountant = privacy.Accountant()
    accountant.spend(0.5, 0.0)
    accountant.spend(0.5, 100.0, 50)
    assert accountant.epsilon(1e-5) == accountant.epsilon_known_cohorts(1e-5, 1) == math.inf


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0, 50.0])
def test_the_noise_found_is_the_least_that_keeps_epsilon(target):
    for q, rounds in ((0.01, 100), (1.0, 2)):
        z = privacy.find_noise_multiplier(target, 1e-6, q, rounds)
        assert target * (1 - 1e-3) <= privacy.compute_epsilon(q, z, rounds, 1e-6) <= target


def test_the_accountant_takes_only_what_is_in_range():
    assert privacy.compute_epsilon(0.01, 0, 1, 1e-6) == math.inf
    assert privacy.compute_epsilon(0, 0, 10, 1e-6) == 0
    assert privacy.compute_epsilon(0.5, 0, 0, 1e-6) == 0
    assert privacy.Accountant().epsilon(1e-6) == 0
    good = [0.1, 1, 1, 1e-6]
    bad = {
        0: (-0.1, 1.1, math.nan),
        1: (-1, math.nan, math.inf),
        2: (0.5, -1, math.inf, 1e13),
        3: (0, 1, math.nan),
    }
    for place, values in bad.items():
        for value in values:
            with pytest.raises(ValueError):
                privacy.compute_epsilon(*good[:place], value, *good[place + 1 :])
    for target, delta in [(0, 1e-6), (-1, 1e-6), (1e-9, 1e-6), (math.nan, 1e-6), (1, 0)]:
        with pytest.raises(ValueError):
            privacy.find_noise_multiplier(target, delta, 0.5, 1000)
    for order in (1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite numbers above 1"):
            privacy.compute_epsilon(0.1, 1, 1, 1e-6, orders=(order, 2.0))
    with pytest.raises(ValueError):
        privacy.Accountant([[0.1, -1.0, 3]])


def test_the_history_survives_a_checkpoint():
    accountant = privacy.Accountant()
    for _ in range(7):
        accountant.spend(0.1, 1.3)
    assert accountant.history == [[0.1, 1.3, 7]]
    accountant.spend(0.2, 1.0, 3)
    resumed = privacy.Accountant(json.loads(json.dumps(accountant.history)))
    assert resumed.history == accountant.history
    assert resumed.epsilon(1e-5) == accountant.epsilon(1e-5)
    assert resumed.epsilon(1e-5) > privacy.compute_epsilon(0.1, 1.3, 7, 1e-5)


def test_cohorts_need_the_secret_key_and_nothing_else():
    key = privacy.new_sampling_key()
    assert key != privacy.new_sampling_key() and len(key) == 32
    cohort = privacy.draw_cohort(1000, 0.3, key, 5).tolist()
    assert cohort == privacy.draw_cohort(1000, 0.3, key, 5).tolist()
    assert cohort != privacy.draw_cohort(1000, 0.3, key, 6).tolist()
    assert cohort != privacy.draw_cohort(1000, 0.3, privacy.new_sampling_key(), 5).tolist()
    for wrong in (0, 1234, "0" * 32, b"", b"0" * 31):  # the config's seed is no key
        with pytest.raises(ValueError):
            privacy.draw_cohort(1000, 0.3, wrong, 5)
    for rate in (10, -0.1, math.nan):  # a number of clients is no rate
        with pytest.raises(ValueError, match="sample_rate is in"):
            privacy.draw_cohort(1000, rate, key, 5)


def test_every_client_joins_independently_with_the_sample_rate():
    joins = np.zeros((2000, 20))
    for round in range(2000):
        joins[round, privacy.draw_cohort(20, 0.3, bytes(32), round)] = 1
    assert abs(joins.mean(0) - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / 2000)
    correlation = np.corrcoef(joins.T) - np.eye(20)
    assert abs(correlation).max() < 4.5 / math.sqrt(2000)
    assert privacy.draw_cohort(20, 1.0, bytes(32), 0).tolist() == list(range(20))
    assert privacy.draw_cohort(20, 0.0, bytes(32), 0).tolist() == []


def test_cohorts_of_a_fixed_size_take_all_clients_alike():
    joins = np.zeros((2000, 20))
    for round in range(2000):
        joins[round, privacy.draw_cohort(20, 0.3, bytes(32), round, fixed_size=True)] = 1
    assert (joins.sum(1) == 6).all()
    assert abs(joins.mean(0) - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / 2000)
    assert privacy.draw_cohort(1, 0.1, bytes(32), 0, fixed_size=True).tolist() == [0]
    # 0.29 * 100 is a little less than 29 in floating point
    assert len(privacy.draw_cohort(100, 0.29, bytes(32), 0, fixed_size=True)) == 29


# ---------------------------------------------------------------- clip, weight, noise


def mechanism(**changes):
    settings = dict(
        clip_norm=2.0,
        noise_multiplier=1.0,
        length=400,
        num_clients=20,
        weight_scale=0.5,
        min_weight=1.0,
        survivor_share=0.8,
    )
    return Mechanism(**(settings | changes))


def in_steps(upload):
    return upload.view(np.int32).astype(np.int64)


def test_clipping_bounds_the_norm_and_keeps_short_updates():
    update = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    clipped = privacy.clip_update(update, 1.5)
    assert np.linalg.norm(clipped) == pytest.approx(1.5, rel=1e-12)
    assert np.array_equal(privacy.clip_update(update, 1e3), update)
    assert not privacy.clip_update(np.zeros(5), 1.0).any()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError):
            privacy.clip_update(np.array([0.0, bad]), 1.0)


@pytest.mark.parametrize("weight_scale", [0.2, 0.5, 3.0])
def test_no_upload_is_longer_than_the_sensitivity(weight_scale):
    m = mechanism(weight_scale=weight_scale, noise_multiplier=0.0)
    direction = np.random.default_rng(1).standard_normal(m.length)
    direction = direction / np.linalg.norm(direction)
    norms = []
    for scale, weight in itertools.product((0, 0.1, -1, 1 - 1e-9, 1e6), (0.0, 0.3, 1.0)):
        upload = m.encode(scale * m.clip_norm * direction, weight, 20)
        norms.append(np.linalg.norm(in_steps(upload)) * m.step)
    assert m.sensitivity == pytest.approx(2.0 * math.sqrt(1 + weight_scale**2))
    assert m.sensitivity * 0.99 < max(norms) <= m.sensitivity + m.step * math.sqrt(401) / 2


def test_rounding_is_part_of_the_sensitivity():
    """A vector that rounding lengthens as much as it can: half a step in each coordinate."""
    m = mechanism(num_clients=10**7, length=10**5, noise_multiplier=60.0)
    vector = m.step * 0.501 * np.ones(m.length)
    silent = copy.copy(m)
    silent.total_std = 0.0
    upload = in_steps(silent.encode(vector, 1.0, m.num_clients))[:-1]
    grown = np.linalg.norm(upload) - np.linalg.norm(vector / m.step)
    counted = m.total_std * math.sqrt(0.8) / 60.0 - m.sensitivity / m.step
    assert 0.9 * math.sqrt(m.length) / 2 < grown <= counted


def test_updates_and_weights_out_of_range_are_refused():
    m = mechanism()
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            m.encode(np.ones(400), weight, 20)
    for update in (np.ones(399), np.ones((400, 1)), np.full(400, math.nan)):
        with pytest.raises(ValueError):
            m.encode(update, 1.0, 20)
    for roster_size in (0, 21):
        with pytest.raises(ValueError):
            m.encode(np.ones(400), 1.0, roster_size)


def test_a_client_whose_training_failed_sends_zeros():
    m = mechanism(noise_multiplier=0.0)
    assert not m.encode(np.zeros(400), 0.0, 20).any()


def test_a_sum_in_wider_integers_is_decoded_as_that_in_32_bits():
    m = mechanism(noise_multiplier=0.0)
    uploads = [m.encode(np.full(400, x), 1.0, 20) for x in (-0.1, 0.01)]
    expected = m.decode(np.sum(uploads, axis=0, dtype=np.uint32), 20, 20)
    found = m.decode(np.sum(uploads, axis=0), 20, 20)  # uint64
    assert np.array_equal(found[0], expected[0]) and found[1] == expected[1]


def test_the_noise_has_the_same_variance_whoever_stays():
    m = mechanism(length=20_000, noise_multiplier=1.5, seed=0)
    zeros = np.zeros(m.length)
    target = 1.5 * m.sensitivity / math.sqrt(0.8)
    for roster_size, survivors in ((20, 20), (20, 18), (20, 16), (5, 5), (5, 4), (1, 1)):
        uploads = [m.encode(zeros, 0.0, roster_size, (roster_size, k)) for k in range(survivors)]
        total = np.sum(uploads, axis=0, dtype=np.uint32)
        mean, weight_sum = m.decode(total, roster_size, survivors, (roster_size, survivors))
        noise = mean * max(weight_sum, 1.0)
        assert np.std(noise) == pytest.approx(target, rel=0.02), (roster_size, survivors)
        assert stats.kstest(noise / target, "norm").pvalue > 1e-3


def test_the_noise_that_curious_clients_do_not_know_covers_the_sensitivity():
    for num_curious, share, p in itertools.product((0, 1, 5), (0.51, 0.8, 1.0), (1, 3, 12, 20)):
        m = mechanism(num_curious=num_curious, survivor_share=share, noise_multiplier=4.17)
        honest = m.min_survivors(p) - num_curious
        assert math.sqrt(honest) * m.noise_std(p) >= 4.17 * m.sensitivity
        assert honest > p / 2
        if m.min_survivors(p) <= p:  # one survivor fewer, and the sum stays closed
            total = np.zeros(401, np.uint32)
            m.decode(total, p, m.min_survivors(p))
            with pytest.raises(ValueError, match="too little noise"):
                m.decode(total, p, m.min_survivors(p) - 1)


def test_no_more_survivors_are_needed_than_the_share_says():
    """0.55 * 100 is 55.00000000000001 in floating point, which does not ask for 56."""
    for share, p, needed in ((0.55, 100, 55), (0.8, 15, 12), (0.8, 16, 13)):
        assert mechanism(survivor_share=share, num_clients=200).min_survivors(p) == needed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_noise_does_not_tell_whether_a_client_takes_part(seed):
    """Forty coin tosses, as in the audit's experiment, where all 40 guesses were right."""
    m = mechanism(length=2000, seed=seed)
    flagged, why = privacy.presence_audit(m, 12, seed=seed)
    assert 13 <= int(why.split()[0]) <= 27 and not flagged
    if seed == 1:
        flagged, why = privacy.presence_audit(m, 12, fixed_noise=True, seed=seed)
        assert int(why.split()[0]) >= 38 and flagged


def test_the_noise_is_fresh_unless_it_is_seeded():
    m = mechanism()
    zeros = np.zeros(400)
    assert not np.array_equal(m.encode(zeros, 0, 20), m.encode(zeros, 0, 20))
    seeded = mechanism(seed=3)
    first = seeded.encode(zeros, 0, 20, (0, 0))
    assert np.array_equal(first, mechanism(seed=3).encode(zeros, 0, 20, (0, 0)))
    others = [seeded.encode(zeros, 0, 20, context) for context in ((0, 1), (1, 0))]
    others.append(mechanism(seed=4).encode(zeros, 0, 20, (0, 0)))
    assert not any(np.array_equal(first, other) for other in others)
    with pytest.raises(ValueError, match="repeats"):
        seeded.encode(zeros, 0, 20)


def test_the_noise_reaches_its_tails_symmetrically(monkeypatch):
    words = np.array([0, 1, 2**64 - 2, 2**64 - 1], np.uint64)
    monkeypatch.setattr(privacy.os, "urandom", lambda count: words.tobytes())
    noise = privacy.gaussian_noise(1e6, 4)
    assert noise[0] == -noise[1]
    assert abs(noise[0]) > 8.9e6 and abs(noise[2:]).max() < 1


@pytest.mark.parametrize("z", [0.02, 1.0, 1e3, 1e6])
def test_the_noise_keeps_its_lowest_bit_at_every_size(z):
    m = mechanism(noise_multiplier=z, length=10_000, num_clients=5, seed=0)
    upload = in_steps(m.encode(np.zeros(m.length), 0.0, 5, 0))
    assert not privacy.lattice_audit(upload)[0]
    assert 12 * m.total_std < 2**31  # far below 2^53, where a float64 ends to hold odd numbers


def test_lattices_are_flagged():
    noise = privacy.gaussian_noise(1e5, 4000, b"key").astype(np.int64)
    assert not privacy.lattice_audit(noise)[0]
    beyond = privacy.gaussian_noise(2.0**56, 4000, b"key").astype(np.int64)
    partly = np.where(np.arange(4000) < 2000, noise, noise // 2 * 2)
    for bad in (noise * 3, noise * 7 + 1, noise // 2 * 2, beyond, partly):
        assert privacy.lattice_audit(bad)[0]


def test_sums_of_the_largest_uploads_and_noise_do_not_wrap():
    for z, num_clients, weight_scale in ((0.0, 20, 0.5), (1.0, 20, 3.0), (300.0, 1000, 0.5)):
        m = mechanism(noise_multiplier=z, num_clients=num_clients, weight_scale=weight_scale)
        largest = m.clip_norm * max(1.0, weight_scale) / m.step + 1
        assert num_clients * largest + privacy.NOISE_TAIL * m.total_std < 2**31
        assert num_clients * largest + privacy.NOISE_TAIL * m.total_std > 0.99 * 2**31


def test_the_mean_is_weighted_and_clipped():
    m = mechanism(noise_multiplier=0.0)
    draw = np.random.default_rng(2)
    updates = draw.standard_normal((8, 400)) * 0.05
    updates[0] *= 100
    weights = draw.uniform(0.2, 1, 8)
    total = np.sum([m.encode(u, w, 8) for u, w in zip(updates, weights)], 0, dtype=np.uint32)
    mean, weight_sum = m.decode(total, 8, 8)
    clipped = [privacy.clip_update(update, 2.0) for update in updates]
    assert mean == pytest.approx(np.average(clipped, axis=0, weights=weights), abs=1e-6)
    assert weight_sum == pytest.approx(weights.sum(), rel=1e-6)
    light, _ = m.decode(m.encode(updates[1], 0.25, 1), 1, 1)
    assert light == pytest.approx(0.25 * updates[1], abs=1e-6)  # by min_weight, not by 0.25


@pytest.mark.parametrize(
    "changes",
    [
        dict(clip_norm=0),
        dict(clip_norm=math.nan),
        dict(noise_multiplier=-1),
        dict(noise_multiplier=math.inf),
        dict(noise_multiplier=1e9),  # overflows 32 bits
        dict(num_clients=2**31),
        dict(num_clients=10**8),  # too coarse for the noise
        dict(num_clients=10**6),  # 2.7 steps of noise a client, 4 are needed
        dict(weight_scale=0),
        dict(min_weight=0),
        dict(survivor_share=0.5),
        dict(survivor_share=1.1),
        dict(num_curious=-1),
        dict(length=0),
    ],
)
def test_unsafe_mechanisms_are_refused(changes):
    with pytest.raises(ValueError):
        mechanism(**changes)


# ---------------------------------------------------------------- secure aggregation: tools


def test_x25519_published_vectors():
    vectors = [  # RFC 7748, Sec. 5.2
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ]
    for scalar, point, result in vectors:
        assert privacy.x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == result
    k = u = privacy.BASE_POINT
    for i in range(1000):
        k, u = privacy.x25519(k, u), k
        if i == 0:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_x25519_is_symmetric():
    """On values near the ends of the field, where lazy reductions would show."""
    draw = random.Random(1)
    for _ in range(30):
        a, b = draw.randbytes(32), draw.choice([b"\xff" * 32, bytes(32), draw.randbytes(32)])
        public_a = privacy.x25519(a, privacy.BASE_POINT)
        public_b = privacy.x25519(b, privacy.BASE_POINT)
        assert privacy.x25519(a, public_b) == privacy.x25519(b, public_a)
    # on the twist and next to p, against the ladder of RFC 7748 written with % alone
    for point in (2, 3, privacy.PRIME - 2, privacy.PRIME - 3, 2**254, draw.getrandbits(254)):
        a, x = draw.randbytes(32), point.to_bytes(32, "little")
        assert int.from_bytes(privacy.x25519(a, x), "little") == plain_ladder(a, point)


def plain_ladder(scalar, u):
    k = int.from_bytes(scalar, "little") & (2**254 - 8) | 2**254
    p = privacy.PRIME
    x2, z2, x3, z3 = 1, 0, u, 1
    for t in reversed(range(255)):
        if k >> t & 1:
            x2, x3, z2, z3 = x3, x2, z3, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = pow(d * a + c * b, 2, p), u * pow(d * a - c * b, 2, p) % p
        e = a * a - b * b
        x2, z2 = a * a * b * b % p, e * (a * a + 121665 * e) % p
        if k >> t & 1:
            x2, x3, z2, z3 = x3, x2, z3, z2
    return x2 * pow(z2, -1, p) % p


BAD_KEYS = [point.to_bytes(32, "little") for point in privacy.SMALL_ORDER]
BAD_KEYS += [(privacy.PRIME + 9).to_bytes(32, "little"), b"\xff" * 32, privacy.BASE_POINT[:31]]
BAD_KEYS += [b"", None, 9, "9" * 32, [9] * 32]


def test_points_of_small_order_are_refused():
    for point in BAD_KEYS[:5]:
        with pytest.raises(ValueError, match="small order"):
            privacy.x25519(bytes(range(32)), point)
    for key in BAD_KEYS:
        with pytest.raises(ValueError):
            privacy.check_public_key(key)
    privacy.check_public_key(privacy.BASE_POINT)


def test_every_derived_key_is_separate_and_uses_every_bit():
    one, other = RoundParams(4, 5), RoundParams(4, 5)
    secret = bytes(range(32))
    purposes = [
        (secret, one, b"pair", 0, 1),
        (secret, other, b"pair", 0, 1),
        (secret, one, b"self", 0, 1),
        (secret, one, b"pair", 1, 0),
        (secret, one, b"pair", 0, 2),
        (secret, one, b"pair", 0),
        (secret, one, b"pair", 1, 11),
        (secret, one, b"pair", 11, 1),
        (secret, one, b"shares", 0, 1),
    ]
    keys = [privacy.derive_key(*purpose) for purpose in purposes]
    masks = [privacy.expand(key[:16], one).tobytes() for key in keys]
    for bit in range(256):
        flipped = (int.from_bytes(secret, "big") ^ 1 << bit).to_bytes(32, "big")
        keys.append(privacy.derive_key(flipped, one, b"pair", 0, 1))
    for bit in range(128):
        masks.append(privacy.expand((1 << bit).to_bytes(16, "big"), one).tobytes())
    assert len(set(keys)) == len(keys) and len(set(masks)) == len(masks)
    extracted = privacy.hmac.digest(
        one.session, secret, "sha512"
    )  # HKDF's first block, written out
    info = b"PrivFedTalk secure aggregation 2|pair|0|1\x01"
    assert keys[0] == privacy.hmac.digest(extracted, info, "sha512")


def chi_square(residues, bins):
    return stats.chisquare(np.bincount(residues, minlength=bins)).pvalue


def assert_uniform(values):
    """Each byte of the uint32, and the share of values near both ends of the range."""
    for shift in (24, 16, 8, 0):
        assert chi_square((values >> np.uint32(shift) & np.uint32(255)).astype(int), 256) > 1e-7
    expected = len(values) / 1000
    for tail in (values, np.uint32(2**32 - 1) - values):
        assert abs(np.sum(tail < 2**32 // 1000) - expected) < 6 * math.sqrt(expected)


def test_masks_are_uniform():
    params = RoundParams(3, 200_000)
    assert_uniform(privacy.expand(bytes(16), params))
    with pytest.raises(AssertionError):
        privacy.expand(bytes(4), params)


def test_a_sealed_message_opens_whole_or_not_at_all():
    key = bytes(range(64))
    for size in (0, 1, 32, 5000):
        message = bytes(i % 251 for i in range(size))
        sealed = privacy.seal(key, message)
        assert privacy.unseal(key, sealed) == message and len(sealed) == size + 16
        assert size < 32 or message[:32] not in sealed
        last = bytes([sealed[-1] ^ 1])
        first = bytes([sealed[0] ^ 1])
        for damaged in (sealed[:-1], sealed + b"0", first + sealed[1:], sealed[:-1] + last, b""):
            with pytest.raises(ValueError):
                privacy.unseal(key, damaged)


def test_any_threshold_of_shares_opens_a_secret_and_fewer_tell_nothing():
    p = privacy.FIELD
    assert 2**128 - 200 < p < 2**128 and all(pow(a, p - 1, p) == 1 for a in (2, 3, 5, 7, 11, 13))
    for secret in (bytes(16), (p - 1).to_bytes(16, "big"), bytes(range(16))):
        shares = privacy.split_secret(secret, 4, [0, 2, 3, 7, 9, 30])
        for chosen in itertools.combinations(shares, 4):
            assert next(privacy.join_secret({i: shares[i] for i in chosen}, 4)) == secret
        with pytest.raises(AggregationAborted):
            next(privacy.join_secret({i: shares[i] for i in (0, 2, 3)}, 4))
    firsts = [privacy.split_secret(bytes(16), 2, [0])[0] for _ in range(3000)]
    sixteenths = [int.from_bytes(first, "big") * 16 // p for first in firsts]
    assert chi_square(sixteenths, 16) > 1e-7  # one share of a fixed secret is uniform
    assert len({privacy.new_secret() for _ in range(10)}) == 10


@pytest.mark.parametrize("num_wrong", [1, 2, 6])
def test_wrong_shares_are_passed_over_if_enough_right_ones_are_there(num_wrong):
    secret = privacy.new_secret()
    shares = privacy.split_secret(secret, 18, range(35))
    for i in random.Random(0).sample(range(35), num_wrong):
        shares[i] = privacy.new_secret()
    assert secret in privacy.join_secret(shares, 18)


# ---------------------------------------------------------------- secure aggregation: graph


def test_unsafe_rounds_are_refused():
    for bad in [
        dict(threshold=4),
        dict(threshold=9),
        dict(threshold=3, neighbors=5),
        dict(threshold=3, neighbors=8),
        dict(threshold=2, neighbors=4),
        dict(threshold=6, neighbors=4),
        dict(length=0),
    ]:
        with pytest.raises(ValueError):
            RoundParams(**(dict(num_clients=8, length=5) | bad))
    for num_clients in (0, 1):
        with pytest.raises(AggregationAborted):
            RoundParams(num_clients, 5)


def test_the_graph_is_regular_symmetric_and_random():
    for n, degree in ((9, 4), (20, 6), (7, 6)):
        params = RoundParams(n, 1, None, degree)
        for i in range(n):
            assert len(set(params.neighbors_of(i)) - {i}) == degree
            assert all(i in params.neighbors_of(j) for j in params.neighbors_of(i))
    complete = RoundParams(8, 1)
    assert all(complete.neighbors_of(i) == [j for j in range(8) if j != i] for i in range(8))
    params = RoundParams(9, 1, None, 2)
    with pytest.raises(AggregationAborted, match="gap"):
        params.check_present({*range(9)} - {params.circle[2], params.circle[6]})
    with pytest.raises(AggregationAborted, match="10 clients are left, 11 are needed"):
        RoundParams(20, 1, None, 4).check_present(range(10))  # the other ten could be summed, too
    assert RoundParams(50, 1, None, 4).circle != RoundParams(50, 1, None, 4).circle


def test_the_degree_keeps_rounds_alive_and_secrets_closed():
    """Against the three tail probabilities, counted with binomial coefficients."""

    def at_least(k, population, marked, drawn):
        ways = [
            math.comb(marked, i) * math.comb(population - marked, drawn - i)
            for i in range(k, drawn + 1)
        ]
        return sum(ways) / math.comb(population, drawn)

    def failure(n, degree):
        fifth = math.ceil(n / 5)
        threshold = RoundParams(n, 1, None, degree).threshold
        starved = at_least(degree - threshold + 1, n - 1, fifth, degree)
        opened = at_least(threshold, n - 1, fifth, degree)
        cut = math.comb(2 * fifth, degree // 2) / math.comb(n, degree // 2)
        return n * (starved + opened + cut)

    assert privacy.choose_neighbors(100) == 34
    for n in (100, 250, 750):
        degree = privacy.choose_neighbors(n)
        assert degree % 2 == 0 and failure(n, degree) < 1e-4 <= failure(n, degree - 2)
        assert degree <= 10 * math.log2(n)
    assert privacy.choose_neighbors(12) is privacy.choose_neighbors(30) is None


# ---------------------------------------------------------------- secure aggregation: protocol


@pytest.fixture
def toy_group(monkeypatch):
    """A fast key agreement, for tests of everything around it."""
    monkeypatch.setattr(privacy, "x25519", toy_agreement)


def advertised(params):
    clients = [SecureAggregationClient(params, i) for i in range(params.num_clients)]
    roster = {}
    for client in clients:
        roster |= client.advertise()
    return clients, roster


def advance(params, stage):
    """(clients, server, messages of this stage, not yet received), everybody honest and present."""
    clients = [SecureAggregationClient(params, i) for i in range(params.num_clients)]
    server = SecureAggregationServer(params)
    answer = None
    for name in privacy.STAGES:
        messages = {}
        for i, client in enumerate(clients):
            if name == "advertise":
                messages[i] = client.advertise()
            elif name == "mask":
                messages[i] = client.mask(np.full(params.length, i, np.uint32), answer[i])
            else:
                messages[i] = getattr(client, name)(answer)
        if name == stage:
            return clients, server, messages
        for i, message in messages.items():
            server.receive(name, i, message)
        answer = server.close(name)


def test_every_way_to_drop_out_gives_the_exact_sum_or_an_abort(toy_group):
    """The short form of `proof_dropouts.py`."""
    cases = [
        (3, every_fate(3), None),
        (5, every_subset(5, range(6)), None),
        (6, every_subset(6, range(4)), 4),
        (12, every_subset(12, (1,)), None),
    ]
    for n, drops, neighbors in cases:
        assert any([check(n, drop, neighbors) for drop in drops])


def test_random_dropouts_on_the_regular_graph_of_a_hundred_clients(toy_group):
    draw = random.Random(3)
    for _ in range(3):
        gone = draw.sample(range(100), 20)
        drop = dict(zip(privacy.STAGES, (gone[:5], gone[5:10], gone[10:15], gone[15:])))
        assert check(100, drop, privacy.choose_neighbors(100))


@pytest.mark.parametrize("neighbors, threshold", [(None, 5), (4, 3)])
def test_the_sum_is_exactly_that_of_the_rounded_inputs(neighbors, threshold):
    draw = np.random.default_rng(4)
    vectors = draw.standard_normal((8, 100)) * draw.uniform(0, 1, (8, 1))
    step = 1.5 / ((2**31 - 1) // 8)
    steps = np.rint(np.clip(vectors, -1.5, 1.5) / step).astype(np.int64)
    drop = {"mask": [2], "unmask": [5]}
    ours = privacy.secure_sum(vectors, threshold, neighbors, drop, bound=1.5)
    assert np.array_equal(ours, np.delete(steps, 2, 0).sum(0) * step)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u2", "i8", "?", np.longdouble])
def test_secure_sum_is_exact_for_every_real_dtype(dtype, toy_group):
    ones = np.ones((3, 4), dtype)
    assert privacy.secure_sum(ones, 2) == pytest.approx(np.full(4, 3.0), abs=1e-8)
    mixed = (np.random.default_rng(0).integers(0, 100, (3, 4)) % 50).astype(dtype)
    assert privacy.secure_sum(mixed, 2) == pytest.approx(mixed.sum(0, dtype=float), abs=1e-6)


def test_secure_sum_refuses_what_it_cannot_add():
    assert not privacy.secure_sum(np.zeros((3, 4)), 2).any()
    ones = np.ones((3, 4))
    for bad in (ones + 1j, ones.astype(str), ones.astype(object), ones[0], ones * math.nan):
        with pytest.raises(ValueError):
            privacy.secure_sum(bad, 2)
    for bound in (0, -1.0, math.inf, math.nan, 1e-320, 1e305):
        with pytest.raises(ValueError, match="bound"):
            privacy.secure_sum(ones, 2, bound=bound)
    with pytest.raises(ValueError, match="bound is between 1e-290 and 1e290, not 1e\\+300"):
        privacy.secure_sum(1e300 * ones, 2)
    with pytest.raises(ValueError):
        privacy.secure_sum(ones, 2, drop={"lunch": [0]})
    with pytest.raises(AggregationAborted, match="2 clients are left, 3 are needed"):
        privacy.secure_sum(np.zeros((4, 4)), 3, drop={"share": [0, 1]})


def test_run_protocol_refuses_vectors_of_the_wrong_form():
    good = np.zeros(5, np.uint32)
    for bad in (np.zeros(4, np.uint32), np.zeros(5), np.zeros((5, 1), np.uint32), [0] * 5, None):
        with pytest.raises(ValueError):
            privacy.run_protocol(RoundParams(2, 5), {0: good, 1: bad})
    with pytest.raises(ValueError, match="0 to 1"):
        privacy.run_protocol(RoundParams(2, 5), {0: good, 2: good})
    with pytest.raises(ValueError, match="0 to 1"):
        privacy.run_protocol(RoundParams(2, 5), {0: good, 1: good}, {"mask": [2]})


class ThreadWorkers:
    """`fed.Workers` for threads: the same merge and broadcast."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.parts = {}

    def broadcast(self, value):
        return self.merge({threading.current_thread().name: value})["0"]

    def merge(self, own):
        self.barrier.wait(20)
        self.parts = {}
        self.barrier.wait(20)
        self.parts.update(own)
        self.barrier.wait(20)
        return {key: self.parts[key] for key in sorted(self.parts)}


@pytest.mark.parametrize("num_dropped", [2, 5])
def test_every_process_computes_the_same_sum_or_abort(num_dropped, toy_group):
    vectors = np.random.default_rng(0).integers(0, 2**32, (9, 7), dtype=np.uint32)
    workers = ThreadWorkers(3)
    results = {}

    def process(rank):
        own = {i: vectors[i] for i in range(9) if i % 3 == rank}
        drop = {"mask": range(num_dropped)}
        try:
            results[rank] = privacy.run_protocol(RoundParams(9, 7), own, drop, workers)
        except AggregationAborted as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=process, args=(r,), name=str(r)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if num_dropped == 5:
        assert set(results.values()) == {"4 clients are left, 5 are needed."} and len(results) == 3
        return
    for total, survivors in (results[rank] for rank in range(3)):
        assert survivors == list(range(2, 9))
        assert np.array_equal(total, vectors[2:].sum(0, dtype=np.uint32))


def test_keys_masks_and_shares_are_fresh_each_round(toy_group):
    params = RoundParams(4, 1000)
    first, second = advance(params, "mask")[2], advance(params, "mask")[2]
    assert not any(np.array_equal(first[i], second[i]) for i in range(4))
    clients = [SecureAggregationClient(params, 0) for _ in range(5)]
    for name in ("_private", "_self_seed", "_escrow", "_public"):
        assert len({getattr(client, name) for client in clients}) == 5
    clients = advance(RoundParams(12, 1), "mask")[0]
    seeds = [list(seed) for client in clients for seed in client._pair_seeds.values()]
    assert all(len({seed[byte] for seed in seeds}) > 30 for byte in range(16))


def test_the_server_holds_nothing_unmasked(toy_group):
    """A vector stays uniform to who learns all of its pair masks, or its self mask."""
    params = RoundParams(5, 50_000)
    clients, server, messages = advance(params, "mask")
    for i, message in messages.items():
        server.receive("mask", i, message)
        assert_uniform(server._total)
        assert_uniform(message)
    client = clients[2]
    without_pairs = messages[2].copy()
    for i, seed in client._pair_seeds.items():
        mask = privacy.expand(seed, params)
        without_pairs = without_pairs - mask if 2 < i else without_pairs + mask
    assert_uniform(without_pairs)
    self_seed = privacy.derive_key(client._self_seed, params, b"self", 2)[:16]
    assert_uniform(messages[2] - privacy.expand(self_seed, params))
    assert all(value is None for value in server._arrived.values())
    arrays = [value for value in vars(server).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 1 and arrays[0] is server._total


def test_shares_are_bound_to_sender_receiver_and_round(toy_group):
    params = RoundParams(4, 5)
    vector = np.zeros(5, np.uint32)
    for tamper in ("reflected", "other sender", "other receiver", "other round", "damaged"):
        clients, roster = advertised(params)
        sent = {client.index: client.share(roster) for client in clients}
        inbox = {j: sent[j][0] for j in (1, 2, 3)}
        if tamper == "reflected":
            inbox[1] = sent[0][1]
        elif tamper == "other sender":
            inbox[1] = sent[2][0]
        elif tamper == "other receiver":
            inbox[1] = sent[1][2]
        elif tamper == "damaged":
            inbox[1] = sent[1][0][:-1] + bytes([sent[1][0][-1] ^ 1])
        else:  # the same key pair in another session
            clients[1].params = RoundParams(4, 5)
            clients[1]._stages = ["share"]
            inbox[1] = clients[1].share(roster)[0]
        with pytest.raises(ValueError, match="forged"):
            clients[0].mask(vector, inbox)


def test_a_client_opens_one_of_two_secrets_and_only_once(toy_group):
    def client():
        return advance(RoundParams(6, 5), "mask")[0][0]

    good = client()
    shares = good.unmask([0, 1, 2, 3])
    assert all(shares[i] == good._held[i][0 if i < 4 else 1] for i in range(6))
    with pytest.raises(ValueError, match="twice"):
        good.unmask([0, 1, 2, 3, 4, 5])
    for survivors in ([0, 1, 2, 3, 3], [1, 2, 3, 4], [0, 1, 2, 99], [0, 1, 2, 3, -1]):
        with pytest.raises(ValueError):
            client().unmask(survivors)
    with pytest.raises(AggregationAborted):
        client().unmask([0, 1, 2])
    clients, server, messages = advance(RoundParams(6, 5), "share")
    for i in range(5):
        server.receive("share", i, messages[i])
    inboxes = server.close("share")
    clients[0].mask(np.zeros(5, np.uint32), inboxes[0])
    with pytest.raises(ValueError, match="no shares"):
        clients[0].unmask([0, 1, 2, 3, 5])
    clients, roster = advertised(RoundParams(6, 5))
    roster.pop(5)  # it never came
    sent = [client.share(roster) for client in clients[:5]]
    clients[0].mask(np.zeros(5, np.uint32), {i: sent[i][0] for i in range(1, 5)})
    with pytest.raises(ValueError, match="stranger"):
        clients[0].unmask([0, 1, 2, 3, 5])


def test_a_client_refuses_unfit_messages(toy_group):
    params = RoundParams(4, 5)
    vector = np.zeros(5, np.uint32)
    for change in ({0: b"\x05" * 32}, {1: b""}, {1: bytes(32)}, {9: b"\x05" * 32}):
        clients, roster = advertised(params)
        with pytest.raises(ValueError):
            clients[0].share(roster | change)
    for copied in (0, 2):  # our own key reflected, or another's repeated
        clients, roster = advertised(params)
        with pytest.raises(ValueError):
            clients[0].share(roster | {1: roster[copied]})
    clients, roster = advertised(params)
    with pytest.raises(AggregationAborted):
        clients[0].share({0: roster[0], 1: roster[1]})
    with pytest.raises(ValueError, match="order"):
        clients[1].mask(vector, {})
    with pytest.raises(ValueError, match="order"):
        clients[1].share(roster)  # a client that refused once is out
    for bad in (np.zeros(4, np.uint32), np.zeros(5, np.uint64), np.zeros((5, 1), np.uint32)):
        with pytest.raises(ValueError, match="form"):
            advance(params, "share")[0][0].mask(bad, {})
    with pytest.raises(AggregationAborted):
        advance(params, "share")[0][0].mask(vector, {})
    with pytest.raises(ValueError, match="form"):
        advance(params, "share")[0][0].mask(vector, {9: b""})


def test_the_server_refuses_unfit_messages(toy_group):
    params = RoundParams(4, 5)
    for stage in privacy.STAGES:
        _, server, messages = advance(params, stage)
        with pytest.raises(ValueError, match="unknown"):
            server.receive(stage, 4, messages[0])
        for other in set(privacy.STAGES) - {stage}:
            with pytest.raises(ValueError, match="late or early"):
                server.receive(other, 0, messages[0])
        if stage == "mask":
            bad = [messages[0][:-1], messages[0].astype(np.uint64)]
        else:
            short = {i: part[:-1] for i, part in messages[0].items()}
            bad = [short, messages[0] | {9: b""}, dict(list(messages[0].items())[1:])]
        before = server._total.copy()
        for message in bad:
            with pytest.raises(ValueError, match="form"):
                server.receive(stage, 0, message)
        assert np.array_equal(server._total, before)
        server.receive(stage, 0, messages[0])
        once = server._total.copy()
        with pytest.raises(ValueError, match="twice"):
            server.receive(stage, 0, messages[0])
        assert np.array_equal(server._total, once)
        with pytest.raises(AggregationAborted):
            server.close(stage)
        with pytest.raises(ValueError):
            server.receive(stage, 1, messages[1])
        with pytest.raises(ValueError, match="not open"):
            server.close(stage)


ODD = [None, True, 5, 1.5, "text", b"", b"0" * 32, [], [1, 2], (), {}, {0}, object(), 1j]
ODD += [{0: None}, {None: b""}, {0: "0" * 32}, {0: 32}, {"0": b"0" * 32}, {0: [b"0"]}, {0: {}}]
ODD += [np.zeros(5), np.zeros(5, object), np.zeros(0, np.uint32), np.array(3), np.array([0, 1])]


@pytest.mark.parametrize("stage", privacy.STAGES)
def test_messages_of_any_type_raise_only_value_error(stage, toy_group):
    clients, server, messages = advance(RoundParams(4, 5), stage)
    for sender in (None, "0", 0.0, 7, -1, [0], {}, (0,), object(), np.array(0), np.array([0, 1])):
        with pytest.raises(ValueError):
            server.receive(stage, sender, messages[0])
    for odd in ODD:
        with pytest.raises(ValueError):
            server.receive(stage, 0, odd)
        with pytest.raises(ValueError):
            server.receive(odd, 0, messages[0])
        if stage == "advertise" or (stage == "mask" and isinstance(odd, dict) and not odd):
            continue  # nothing comes in; an empty inbox is of the right form
        client = copy.deepcopy(clients[0])
        client._stages = [stage]
        with pytest.raises((ValueError, AggregationAborted)):
            if stage == "mask":
                client.mask(np.zeros(5, np.uint32), odd)
            else:
                getattr(client, stage)(odd)


def test_a_bad_public_key_costs_its_sender_and_nobody_else(monkeypatch):
    honest = SecureAggregationClient.advertise
    for bad in (BAD_KEYS[0], BAD_KEYS[-1], "copied"):

        def advertise(client, bad=bad):
            message = honest(client)
            if client.index == 3:
                message[3] = first[0] if bad == "copied" else bad
            first.append(message[client.index])
            return message

        first = []
        monkeypatch.setattr(SecureAggregationClient, "advertise", advertise)
        vectors = {i: np.full(5, 10**i, np.uint32) for i in range(5)}
        total, survivors = privacy.run_protocol(RoundParams(5, 5), vectors)
        assert survivors == [0, 1, 2, 4] and (total == 10111).all()


@pytest.mark.parametrize("dropped", [(), (4,)])
@pytest.mark.parametrize("liars", [(1,), (1, 3), (0, 1, 2, 3, 5)])
def test_wrong_shares_give_the_exact_sum_or_an_abort(dropped, liars, toy_group, monkeypatch):
    """Liars change the shares that they hold of others' self seeds and escrow keys."""
    honest = SecureAggregationClient.unmask

    def unmask(client, survivors):
        shares = honest(client, survivors)
        if client.index in liars:
            shares = {i: share if i == client.index else bytes(16) for i, share in shares.items()}
        return shares

    monkeypatch.setattr(SecureAggregationClient, "unmask", unmask)
    vectors = np.random.default_rng(0).integers(0, 2**32, (9, 6), dtype=np.uint32)
    params = RoundParams(9, 6)  # 5 shares of 9 open a secret
    if len(liars) == 5:
        with pytest.raises(AggregationAborted, match="do not fit"):
            privacy.run_protocol(params, dict(enumerate(vectors)), {"mask": dropped})
        return
    total, survivors = privacy.run_protocol(params, dict(enumerate(vectors)), {"mask": dropped})
    assert survivors == [i for i in range(9) if i not in dropped]
    assert np.array_equal(total, vectors[survivors].sum(0, dtype=np.uint32))


def test_a_dropout_that_left_no_pair_seeds_aborts_the_round(toy_group):
    clients, server, messages = advance(RoundParams(5, 5), "share")
    messages[4][4] = bytes(48) + messages[4][4][48:]
    for i, message in messages.items():
        server.receive("share", i, message)
    inboxes = server.close("share")
    for i in range(4):
        server.receive("mask", i, clients[i].mask(np.zeros(5, np.uint32), inboxes[i]))
    survivors = server.close("mask")
    for i in survivors:
        server.receive("unmask", i, clients[i].unmask(survivors))
    with pytest.raises(AggregationAborted, match="do not open"):
        server.close("unmask")


def test_bytes_are_counted_and_few(toy_group):
    params = RoundParams(100, 1301, None, privacy.choose_neighbors(100))
    sent = 0
    received = 0
    for stage in privacy.STAGES:
        clients, server, messages = advance(params, stage)
        message = messages[7]
        sent += message.nbytes if stage == "mask" else sum(map(len, message.values()))
        if stage != "unmask":
            for i, sent_by_i in messages.items():
                server.receive(stage, i, sent_by_i)
            answer = server.close(stage)
        if stage == "advertise":
            received += sum(map(len, answer.values()))
        elif stage == "share":
            received += sum(map(len, answer[7].values()))
        elif stage == "mask":
            assert len(answer) == 100
            received += 13  # who survived: 100 bits
    assert sent == params.num_bytes() <= 10_000
    assert received == params.num_bytes_received() <= 10_000


# ---------------------------------------------------------------- audit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(noise_multiplier=0.02, weight_scale=2.0, num_curious=2),
        dict(length=40, noise_multiplier=2.8),
    ],
)
def test_the_canaries_flag_every_defect_and_no_sound_mechanism(changes):
    for seed in range(2):
        m = mechanism(**(dict(length=700, seed=seed) | changes))
        for defect in privacy.DEFECTS:
            flagged, why = privacy.canary_audit(m, 1e-5, defect, seed=seed)
            assert flagged == (defect is not None), why
            due = m.noise_std(1) / m.clip_norm
            bound = float(why.split("epsilon is at least ")[1].split(";")[0])
            assert (bound > privacy.gaussian_epsilon(due, 1e-5)) == flagged, why
    with pytest.raises(ValueError):
        privacy.canary_audit(m, 1e-5, "cosmic rays")
    with pytest.raises(ValueError):
        privacy.canary_audit(mechanism(length=3), 1e-5)
    with pytest.raises(ValueError, match="too long to measure"):
        privacy.canary_audit(mechanism(length=8, noise_multiplier=20.0), 1e-5)


def test_the_canaries_flag_a_sum_of_weights_without_noise(monkeypatch):
    m = mechanism(length=40)
    draw = Mechanism._noise

    def bare_weights(self, std, context):
        noise = draw(self, std, context)
        noise[-1] = 0
        return noise

    monkeypatch.setattr(Mechanism, "_noise", bare_weights)
    flagged, why = privacy.canary_audit(m, 1e-5, seed=0)
    assert flagged and "the sum of weights lacks noise" in why


@pytest.mark.parametrize("z", [0.02, 1.0, 3.0])
def test_the_canaries_bounds_hold_as_often_as_promised(z):
    """False alarms at 90 % confidence and detection of half the noise at 99 %, in 400 audits."""
    draw = np.random.default_rng(5)
    n = max(256, math.ceil(300 * z**2))

    def bounds(noise, confidence):
        inside = draw.normal(1, noise, n)
        outside = draw.normal(0, noise, n)
        return privacy.measured_noise(inside, outside, confidence)

    sound = np.array([bounds(z, 0.9) for _ in range(400)])
    assert max(np.mean(sound[:, 0] > z), np.mean(sound[:, 1] < z)) <= 0.05 + 0.02
    assert np.median(sound.prod(1)) == pytest.approx(z**2, rel=0.06)
    assert np.mean([bounds(z / 2, 0.99)[1] < z for _ in range(400)]) > 0.95


def state_of_a_run(length=1232, **changes):
    state = {
        "round": 3,
        "adapter": torch.zeros(length),
        "control": torch.zeros(length),
        "accountant": [[1.0, 4.0, 3]],
        "sampling_key": "00" * 32,
        "description": {"rank": 4, "alpha": 8.0, "train": "R"},
    }
    return state | changes


@pytest.mark.parametrize(
    "extra",
    [
        dict(controls={0: torch.zeros(1232)}),
        dict(controls={"a": {"layer": torch.zeros(600)}, "b": {"layer": torch.zeros(700)}}),
        dict(controls=[torch.zeros(1232)]),
        dict(controls=[[0.0] * 1232]),
        dict(updates=np.zeros((12, 1232))),
        dict(half=torch.zeros(1232, dtype=torch.float16)),
        dict(adapter=torch.zeros(2, 1232)),
        dict(control=torch.zeros(2464)),
        dict(uploads=torch.zeros(1232, dtype=torch.int64)),
        dict(update=torch.zeros(40)),
        dict(accountant=[[1.0, 4.0, 3], [0.0] * 40]),
        dict(description={"origin": "0" * 1000}),
        dict(sampling_key="00" * 1232),
    ],
)
def test_a_checkpoint_with_vectors_of_clients_is_flagged(extra):
    many_rows = [[1.0, 4.0 + i, 1] for i in range(100)]
    for honest in (state_of_a_run(), state_of_a_run(accountant=many_rows)):
        assert not privacy.checkpoint_audit(honest, 1232)[0]
    assert privacy.checkpoint_audit(state_of_a_run(**extra), 1232)[0]
    assert privacy.checkpoint_audit(state_of_a_run(40, update=torch.zeros(40)), 40)[0]


def test_only_the_rounds_of_the_busiest_client_count():
    """1,000 clients, 10 a round, 100 rounds: z is chosen for the handful that a client joins."""
    key = bytes(32)
    for fixed in (False, True):
        cohorts = [privacy.draw_cohort(1000, 0.01, key, i, fixed) for i in range(100)]
        counts = np.zeros(1000, int)
        for cohort in cohorts:
            counts[cohort] += 1
        most = privacy.most_participations(cohorts)
        assert most == counts.max() <= privacy.likely_participations(1000, 0.01, 100) < 10
        assert privacy.most_participations(cohorts, 103) == most + 3  # rounds of killed runs
    assert privacy.most_participations([]) == 0
    assert privacy.likely_participations(100, 1.0, 7) == 7


# ---------------------------------------------------------------- report


def test_the_headline_holds_against_who_knows_the_cohorts():
    m = mechanism(noise_multiplier=2.0)
    accountant = privacy.Accountant([[0.1, 2.0, 5]])
    report = privacy.privacy_report(m, accountant, 1e-5, [[0]] * 5)
    exact = privacy.gaussian_epsilon(2.0 / math.sqrt(5), 1e-5)
    assert report["epsilon"] == pytest.approx(exact)
    assert report["epsilon_with_sampling"] == privacy.compute_epsilon(0.1, 2.0, 5, 1e-5)
    assert report["private"] is True and report["rounds"] == 5
    assert json.loads(json.dumps(report)) == report
    # sampling is never an obstacle
    often = privacy.privacy_report(m, privacy.Accountant([[0.99, 2.0, 5]]), 1e-5, [[0]] * 5)
    assert often["epsilon_with_sampling"] <= often["epsilon"]
    # of fixed cohorts all rounds are spent, but the busiest client was in seven of them
    cohorts = [[0]] * 7 + [[]] * 43
    fixed = privacy.privacy_report(m, privacy.Accountant([[1.0, 2.0, 50]]), 1e-5, cohorts)
    assert fixed["epsilon_with_sampling"] <= fixed["epsilon"]


def test_a_round_done_twice_is_not_amplified_twice():
    """One draw of the cohort and two sums: sampling hides neither from who has seen the other."""
    m = mechanism(noise_multiplier=1.0)
    accountant = privacy.Accountant([[0.1, 1.0, 2]])
    report = privacy.privacy_report(m, accountant, 1e-5, [[0]])
    # the sampled Gaussian of rate 0.1 and noise 1 / sqrt(2), in closed form: delta of 1e-5 at 3.498
    epsilon = 3.498
    z = 2**-0.5

    def hockey_stick(upper, lower):
        x = np.linspace(-30, 30, 600_001)
        p = stats.norm.pdf(x, scale=z)
        q = 0.9 * p + 0.1 * stats.norm.pdf(x, 1, z)
        p, q = (q, p) if upper == "mixture" else (p, q)
        return np.maximum(0, p - math.exp(lower) * q).sum() * (x[1] - x[0])

    exact = max(hockey_stick("mixture", epsilon), hockey_stick("one", epsilon))
    assert exact == pytest.approx(1e-5, rel=1e-2)
    assert epsilon <= report["epsilon_with_sampling"] <= report["epsilon"]
    once = privacy.privacy_report(m, accountant, 1e-5, [[0]] * 2)
    assert once["epsilon_with_sampling"] < epsilon
    # Which round was done twice is not known: it may be the one with the least noise.
    accountant.spend(0.1, 8.0)
    later = privacy.privacy_report(mechanism(noise_multiplier=8.0), accountant, 1e-5, [[0]] * 2)
    assert later["epsilon_with_sampling"] >= epsilon


def test_a_run_without_noise_or_with_seeded_noise_reports_no_epsilon():
    spent = privacy.Accountant([[0.1, 1.0, 5]])
    clear = privacy.Accountant([[0.1, 0.0, 1], [0.1, 1.0, 5]])
    for m, accountant in ((mechanism(seed=1), spent), (mechanism(), clear)):
        report = privacy.privacy_report(m, accountant, 1e-5, [[0]] * 5)
        assert report["epsilon"] is report["epsilon_with_sampling"] is None
        assert report["private"] is False and report["no_privacy_because"]


def test_delta_is_below_one_over_the_number_of_clients():
    for delta in (0.05, 0.5, 0.0, math.nan):
        with pytest.raises(ValueError):
            privacy.privacy_report(mechanism(), privacy.Accountant(), delta, [])


def config_of_a_run(rate=1.0, algorithm="isfa"):
    """Settings of 20 clients and noise of 4; adapters have 1232 numbers."""
    config = train.read_yaml(train.DEFAULTS)
    del config["presets"]
    config["data"]["clients"] = 20
    config["fed"] |= dict(sample_rate=rate, algorithm=algorithm, rounds=3)
    config["privacy"] |= dict(target_epsilon=0.0, noise_multiplier=4.0, clip_norm=2.0)
    config["privacy"]["num_curious"] = 1
    return config


def write_run(folder, log=None, state=None, config=None, **claims):
    """A run of 3 rounds and its honest report, with claims changed."""
    config = config or config_of_a_run()
    state = state_of_a_run() if state is None else state
    state["settings"] = train.checksum(train.fixed_settings(config))
    if log is None:
        cohorts = train.draw_cohorts(config, "00" * 32, 20, 3)
        log = []
        for r in range(3):
            most = privacy.most_participations(cohorts[: r + 1])
            row = dict(round=r, cohort_size=len(cohorts[r]), survivors=len(cohorts[r]))
            row |= dict(aborted=None, simulation={}, sample_rate=config["fed"]["sample_rate"])
            epsilon = privacy.gaussian_epsilon(4.0 / math.sqrt(most), 1e-5)
            log.append(row | dict(noise_multiplier=4.0, epsilon=epsilon))
    spent = sum(rounds for _, _, rounds in state["accountant"])
    history = [[config["fed"]["sample_rate"], 4.0, spent]]
    report = train.describe_privacy(config, state_of_a_run(accountant=history))
    train.save_checkpoint(folder / "last.pt", "global adapter", state)
    train.save_config(folder, config)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "report.json").write_text(json.dumps({"privacy": report | claims}))
    people = {"public": {}, "clients": {f"client {i}": [] for i in range(20)}, "unseen": {}}
    (folder / "people.json").write_text(json.dumps(people))
    return log


def test_an_honest_report_is_verified(tmp_path):
    write_run(tmp_path)
    verified = privacy.verify_run(tmp_path)
    assert verified["epsilon"] == pytest.approx(privacy.gaussian_epsilon(4 / math.sqrt(3), 1e-5))
    # a crash between spending and finishing: one round more was spent than ran
    write_run(tmp_path, state=state_of_a_run(accountant=[[1.0, 4.0, 4]]))
    assert privacy.verify_run(tmp_path)["epsilon"] == privacy.gaussian_epsilon(2.0, 1e-5)
    write_run(tmp_path, private=False, epsilon=None, epsilon_with_sampling=None)
    assert privacy.verify_run(tmp_path)["private"] is False


def test_a_report_has_to_count_repeated_rounds_without_sampling(tmp_path):
    config = config_of_a_run(rate=0.9)
    history = [[0.9, 4.0, 9]]  # six rounds were killed and done again
    write_run(tmp_path, state=state_of_a_run(accountant=history), config=config)
    honest = privacy.verify_run(tmp_path)
    once = privacy.Accountant(history).epsilon(1e-5)
    assert once < honest["epsilon_with_sampling"]
    state = state_of_a_run(accountant=history)
    write_run(tmp_path, state=state, config=config, epsilon_with_sampling=once)
    with pytest.raises(ValueError, match="epsilon_with_sampling"):
        privacy.verify_run(tmp_path)


def test_a_report_that_does_not_follow_is_refused(tmp_path):
    log = write_run(tmp_path)
    clear = log[0] | dict(noise_multiplier=0.0, epsilon=None)
    silent = [[1.0, 0.0, 1], [1.0, 4.0, 2]]
    per_client = {"a": torch.zeros(1232)}
    lies = {
        "a smaller epsilon": dict(epsilon=1.0),
        "a smaller epsilon of outsiders": dict(epsilon_with_sampling=0.5),
        "another delta": dict(delta=1e-6),
        "a delta that means nothing": dict(delta=0.4),
        "a round in the clear": dict(log=[clear, *log[1:]]),
        "a round that is not listed": dict(log=log[1:]),
        "a round that was not spent": dict(
            log=[*log, log[2] | dict(round=3, epsilon=None)], state=state_of_a_run(round=4)
        ),
        "a round in the clear that was spent": dict(
            log=[clear, *(row | dict(epsilon=None) for row in log[1:])],
            state=state_of_a_run(accountant=silent),
        ),
        "a log with a smaller epsilon": dict(log=[*log[:2], log[2] | dict(epsilon=1.0)]),
        "a log with a round for nothing": dict(
            log=[*log[:2], log[2] | dict(epsilon=log[1]["epsilon"])]
        ),
        "a log without a guarantee": dict(log=[*log[:2], log[2] | dict(epsilon=None)]),
        "a log with NaN": dict(log=[*log[:2], log[2] | dict(epsilon=math.nan)]),
        "cohorts that the key does not draw": dict(
            log=[row | dict(sample_rate=0.5, cohort_size=1) for row in log],
            state=state_of_a_run(accountant=[[0.5, 4.0, 3]]),
        ),
        "less noise than was spent": dict(state=state_of_a_run(accountant=[[1.0, 3.0, 3]])),
        "more noise than was spent": dict(noise_multiplier=30.0),
        "vectors of clients": dict(state=state_of_a_run(controls=per_client)),
        "another adapter": dict(state=state_of_a_run(length=1000)),
        "seeded noise": dict(seed=1),
        "an epsilon without privacy": dict(private=False),
        "another mechanism": dict(noise_multiplier=5.0, epsilon=1.0),
        "more curious clients": dict(num_curious=4),
        "fewer survivors": dict(survivor_share=0.51),
        "a sum of too few": dict(log=[log[0] | dict(survivors=16), *log[1:]]),
        "an epsilon of outsiders without privacy": dict(private=False, epsilon=None),
    }
    for name, lie in lies.items():
        write_run(tmp_path, **lie)
        with pytest.raises(ValueError):
            privacy.verify_run(tmp_path)
            pytest.fail(name)


def test_smaller_cohorts_than_the_run_had_are_refused(tmp_path):
    """Of one client each, the three cohorts would be of others each time, at half the epsilon."""
    log = write_run(tmp_path)
    small = [privacy.draw_cohort(20, 0.05, bytes(32), r, True) for r in range(3)]
    most = privacy.most_participations(small)
    assert most < 3
    epsilon = privacy.gaussian_epsilon(4 / math.sqrt(most), 1e-5)
    lie = dict(epsilon=epsilon, epsilon_with_sampling=epsilon, most_rounds_of_a_client=most)
    write_run(tmp_path, log=[row | dict(cohort_size=1) for row in log], **lie)
    with pytest.raises(ValueError, match="other clients"):
        privacy.verify_run(tmp_path)


def test_settings_that_the_run_did_not_have_are_refused(tmp_path):
    write_run(tmp_path)
    for section, change in (("fed", {"sample_rate": 0.05}), ("privacy", {"num_curious": 4})):
        config = config_of_a_run()
        config[section] |= change
        train.save_config(tmp_path, config)
        with pytest.raises(ValueError, match="config.yaml was changed"):
            privacy.verify_run(tmp_path)
    train.save_config(tmp_path, config_of_a_run())
    people = {"public": {}, "clients": {f"client {i}": [] for i in range(1000)}, "unseen": {}}
    (tmp_path / "people.json").write_text(json.dumps(people))
    with pytest.raises(ValueError, match="1000 clients, not 20"):
        privacy.verify_run(tmp_path)
    people["clients"] = {f"client {i}": [] for i in range(20)}
    people["public"] = {"client 3": []}
    (tmp_path / "people.json").write_text(json.dumps(people))
    with pytest.raises(ValueError, match="client 3 is not only a client"):
        privacy.verify_run(tmp_path)


def test_only_what_follows_is_returned(tmp_path):
    """Texts and further entries of the report are not checked: they are not passed on."""
    write_run(tmp_path, unit="one person of a million", epsilon_of_a_clip=0.01, not_covered=[])
    verified = privacy.verify_run(tmp_path)
    assert verified["unit"].startswith("one client") and "epsilon_of_a_clip" not in verified
    assert verified["not_covered"] == privacy.NOT_COVERED


def test_a_checkpoint_that_was_changed_is_refused(tmp_path):
    write_run(tmp_path)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content["state"]["adapter"] += 1
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt is damaged"):
        privacy.verify_run(tmp_path)


def test_vectors_of_clients_beside_the_state_are_found_in_a_run(tmp_path):
    write_run(tmp_path)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(content | {"uploads": torch.zeros(3, 1232)}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="single clients: 'uploads'"):
        privacy.verify_run(tmp_path)


def test_scaffolds_control_variates_of_clients_are_found_in_a_run(tmp_path):
    """With SCAFFOLD an upload is twice as long as the adapter, and c_i as long as the adapter."""
    config = config_of_a_run(algorithm="scaffold")
    write_run(tmp_path, config=config)
    assert privacy.verify_run(tmp_path)["length"] == 2464
    write_run(tmp_path, config=config, state=state_of_a_run(controls={0: torch.zeros(1232)}))
    with pytest.raises(ValueError, match="single clients"):
        privacy.verify_run(tmp_path)


# ---------------------------------------------------------------- command line


def test_the_table_prints_epsilon_by_clients_at_the_same_noise_on_the_mean(capsys):
    privacy.main("--clients 100 200 --rate 1 --rounds 1 2 --noise 1.5 --delta 1e-5".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["100", "100", "200", "200"]
    for row, (z, rounds) in zip(rows, itertools.product((1.5, 3.0), (1, 2))):
        exact = privacy.gaussian_epsilon(z / math.sqrt(rounds), 1e-5)
        assert float(row[3]) == z
        assert float(row[4]) == float(row[5]) == pytest.approx(exact, abs=1e-4)
    privacy.main("--clients 1000 --rate 0.1 --rounds 50 --target-epsilon 8 --delta 1e-6".split())
    z, known, sampled = map(float, capsys.readouterr().out.splitlines()[2].split()[3:])
    assert sampled == pytest.approx(8, rel=1e-3) and known > sampled
    participations = int(stats.binom.isf(0.01 / 1000, 50, 0.1))
    exact = privacy.gaussian_epsilon(z / math.sqrt(participations), 1e-6)
    assert known == pytest.approx(exact, rel=1e-3)


def test_a_table_of_rare_rounds_counts_one_round_of_a_client(capsys):
    privacy.main("--clients 50 --rate 1e-5 --rounds 3 --noise 0".split())
    assert capsys.readouterr().out.splitlines()[2].split()[4] == "inf"
    privacy.main("--clients 50 --rate 0 --rounds 3 --noise 0".split())
    assert capsys.readouterr().out.splitlines()[2].split()[4] == "0.0000"


def test_the_fewest_clients_keep_the_target_wherever_they_stand(capsys):
    privacy.main("--clients 200 100 --rounds 1 --target-epsilon 1".split())
    epsilons = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert epsilons[0] < epsilons[1] == pytest.approx(1, abs=1e-4)


def test_the_most_rounds_keep_the_target_wherever_they_stand(capsys):
    privacy.main("--rounds 4 1 --target-epsilon 1".split())
    epsilons = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert epsilons[1] < epsilons[0] == pytest.approx(1, abs=1e-4)


def test_the_audit_prints_a_table_and_finds_every_defect(capsys):
    privacy.main("--clients 100 --noise 0.27 --length 1232 --audit".split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(privacy.DEFECTS) + 6
    assert all(("as it is" in line) == (" passed " in line) for line in lines)


@pytest.mark.parametrize(
    "arguments",
    ["", "--noise -1", "--noise x", "--noise nan", "--noise 1 --rate 2", "--noise 1 --delta 0"]
    + ["--noise 1 --delta 0.1", "--noise 1 --rounds 0", "--noise 1 --clients 0", "--nose 1"]
    + ["--target-epsilon 0", "--target-epsilon nan", "--noise 1 --target-epsilon 8"]
    + ["--noise 1 --audit --length 0", "--noise 1 --audit --clients 1"]
    + ["--noise 1 --clients 100 200000"]
    + ["--noise 1 --audit --length 100000000000", "--noise 1 --audit --clients 100 1"]
    + ["--noise 1 --rounds " + "9" * 400, "--verify /nowhere", "--verify . --audit"],
)
def test_errors_are_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        privacy.main(arguments.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.count("\n") == 1 and not printed.out


def test_verify_on_the_command_line(tmp_path, capsys):
    write_run(tmp_path)
    privacy.main(["--verify", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["private"]
    write_run(tmp_path, epsilon=1.0)
    with pytest.raises(SystemExit) as stop:
        privacy.main(["--verify", str(tmp_path)])
    assert stop.value.code == 2
    write_run(tmp_path)
    others = ["--audit", "--noise 3", "--target-epsilon 2", "--delta 1e-12", "--rounds 9"]
    others += ["--clients 7", "--rate 0.1", "--length 7"]
    for arguments in map(str.split, others):
        with pytest.raises(SystemExit):
            privacy.main(["--verify", str(tmp_path), *arguments])
        assert "--verify stands alone" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--noise 1", "--verify ."])
def test_a_full_disk_is_one_line(arguments, tmp_path):
    write_run(tmp_path)
    command = [sys.executable, privacy.__file__, *arguments.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # as people's, in which it is not set
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
    assert ended.returncode == 2
    assert ended.stderr == "privacy.py: [Errno 28] No space left on device\n"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(privacy, "print_audit", stop)
    with pytest.raises(SystemExit) as ended:
        privacy.main(["--noise", "1", "--audit"])
    assert ended.value.code == 2 and capsys.readouterr().err == "privacy.py: interrupted\n"


# ---------------------------------------------------------------- attacks on persons


def planted_updates(num_people, length=77):
    """Updates of two sets of clips of each person, [people length] each, at the clip norm: a part
    that all people share, the person's own part and the clips'.
    """
    rng = np.random.default_rng(0)
    person = rng.normal(size=(num_people, length))
    shared = 2 * rng.normal(size=length)
    both = shared + person + 0.7 * rng.normal(size=(2, num_people, length))
    return 1.4 * both / np.linalg.norm(both, axis=2, keepdims=True)


def test_attacks_on_persons_succeed_in_the_clear_and_stay_below_the_bound_under_noise():
    import bench_attacks  # here, as it imports every module

    z = privacy.find_noise_multiplier(2.0, 1e-5, 1.0, 1)
    protected = Mechanism(1.4, z, 77, 100, 0.3, 1.0, survivor_share=0.8, seed=0)
    sent, other = planted_updates(16)
    # An update that the attacker computes and a mean of 1 or 4 clients; then two uploads.
    for size, first in ((1, None), (4, None), (1, protected)):
        attacked = bench_attacks.similarity_scores(other, sent, (1, size), (None, None), 20)
        assert bench_attacks.auc_over_people(*attacked)["mean"] > 0.95
        attacked = bench_attacks.similarity_scores(other, sent, (1, size), (first, protected), 20)
        auc = bench_attacks.auc_over_people(*attacked)
        assert auc["mean"] < 0.65 and auc["ci95"][1] < bench_attacks.auc_bound(2 / z) < 0.77
    # The share that a client adds hides it no longer, without the sum.
    share = bench_attacks.share_of_noise(protected, 100)
    attacked = bench_attacks.similarity_scores(other, sent, (1, 1), (None, share), 20)
    assert bench_attacks.auc_over_people(*attacked)["mean"] > 0.75
    # An attacker who knows everything else comes as close to the bound as tau lets it.
    weighty = Mechanism(1.4, z, 77, 100, 1.0, 1.0, survivor_share=0.8, seed=0)
    attacked = bench_attacks.worst_case_scores(sent, weighty, 200)
    auc = bench_attacks.auc_over_people(*attacked)["mean"]
    assert auc == pytest.approx(bench_attacks.auc_bound(0.8**0.5 / z), abs=0.02)
    assert auc < bench_attacks.auc_bound(1 / z) < 0.64


def test_the_interval_of_an_auc_over_people_covers_it():
    import bench_attacks

    rng = np.random.default_rng(0)
    exact = bench_attacks.auc_bound(0.5)  # of N(0, 1) and N(0.5, 1)
    covered = 0
    for _ in range(100):
        inside = rng.normal(size=(15, 2)) + 0.5
        outside = rng.normal(size=(15, 2))
        result = bench_attacks.auc_over_people(inside, outside)
        covered += result["ci95"][0] <= exact <= result["ci95"][1]
    assert 88 <= covered <= 99


def test_a_commitment_tells_nothing_that_unmasks():
    params = privacy.RoundParams(4, 5)
    secret = bytes(range(16))
    commitment = privacy.commit(secret, params, 1)
    for purpose in (b"self", b"escrow"):
        assert commitment not in privacy.derive_key(secret, params, purpose, 1)
    assert commitment != secret
