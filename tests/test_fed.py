"""The federation's equations against their definitions, and rounds against the plain weighted mean."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fed
import lora
import metrics
import privacy
from test_model import small_model

NO_JUDGES = dict(tdc=0.05, identity=0.0, perceptual=0.0, sync=0.0)
SAMPLING = dict(num_steps=2, guidance=1.0, solver="dpm")


def adapted_model():
    model = small_model("x0")
    torch.manual_seed(1)
    lora.inject_lora(model, 2, 4, 0.0, ["to_q", "to_v"])
    return model


def drawer(model, shift=0.0):
    def draw(batch_size, num_frames, generator):
        frames = torch.rand(batch_size, num_frames, 3, 32, 32, generator=generator) * 2 - 1
        reference = torch.rand(batch_size, 3, 32, 32, generator=generator) * 2 - 1
        with torch.no_grad():
            motion = torch.stack([model.motion(f, model.autoencoder.encode(f), r) for f, r in zip(frames, reference)]) + shift
            reference_latents = model.autoencoder.encode(reference)
        mel = torch.randn(batch_size, num_frames, 20, 40, generator=generator)
        return dict(frames=frames, reference=reference, motion=motion, reference_latents=reference_latents, mel=mel,
                    other_reference=reference.flip(-1))

    return draw


def clients_of(model, num):
    return [fed.Client(f"c{i}", 4 + i, drawer(model, i / 10), drawer(model)(1, 6, torch.Generator().manual_seed(i)))
            for i in range(num)]


def settings(**changes):
    train = dict(lr=1e-2, batch_size=2, num_frames=6, proximal=0.0, loss_weights=NO_JUDGES, speech_dropout=0.1)
    return dict(sample_rate=1.0, local_epochs=0.5, server_lr=0.5, gamma=0.0, reliability_alpha=0.7, sample_cap=100,
                train=train, sampling=SAMPLING, public_jitter=0.1) | changes


def test_tdc_is_eq_8():
    eps_hat, eps = torch.randn(2, 5, 3, 4, 4), torch.randn(2, 5, 3, 4, 4)
    by_frame = [((eps_hat[:, f + 1] - eps_hat[:, f]) - (eps[:, f + 1] - eps[:, f])).abs().mean() for f in range(4)]
    assert float(fed.tdc_loss(eps_hat, eps)) == pytest.approx(float(sum(by_frame) / 4), rel=1e-5)
    assert float(fed.tdc_loss(eps + 3.0, eps)) == pytest.approx(0, abs=1e-6)  # a constant error is no flicker


def test_isfa_weights_have_the_ratios_of_the_paper_and_are_bounded():
    w = [fed.isfa_weight(n, r, 0.5, 100) for n, r in ((20, 0.9), (80, 0.2))]
    assert w[0] / w[1] == pytest.approx(20 * math.exp(0.5 * 0.9) / (80 * math.exp(0.5 * 0.2)))
    assert fed.isfa_weight(30, 0.1, 0.0, 100) / fed.isfa_weight(60, 0.9, 0.0, 100) == 0.5  # gamma = 0 is FedAvg
    assert 0 < fed.isfa_weight(1, 0.0, 5.0, 100) < fed.isfa_weight(10**6, 1.0, 5.0, 100) == 1.0


def test_poisson_cohorts():
    sizes = [len(fed.poisson_cohort(1000, 0.3, r, seed=4)) for r in range(40)]
    assert abs(np.mean(sizes) - 300) < 5 and np.std(sizes) > 5  # sizes vary: it is no fixed-size sample
    assert fed.poisson_cohort(50, 0.5, 3, 4) == fed.poisson_cohort(50, 0.5, 3, 4) != fed.poisson_cohort(50, 0.5, 2, 4)


def test_seeds_are_told_apart():
    assert len({fed.derived_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_objective_is_the_weighted_sum_of_its_terms():
    model, judges = adapted_model(), metrics.Judges().eval()
    weights = dict(tdc=0.3, identity=0.2, perceptual=0.4, sync=0.7)
    batch = drawer(model)(3, 6, torch.Generator().manual_seed(0))
    loss, terms = fed.objective(model, batch, weights, judges, torch.Generator().manual_seed(0), 0.1)
    assert set(terms) == {"diffusion", "tdc", "identity", "perceptual", "sync"} and min(terms.values()) > 0
    assert float(loss.detach()) == pytest.approx(terms["diffusion"] + sum(weights[k] * terms[k] for k in weights), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.adapter_parameters(model) if p.shape[-1] == 2)


def test_judged_terms_are_zero_for_perfect_frames_without_speech_and_weighted_by_alpha_bar():
    model, judges = small_model("x0"), metrics.Judges().eval()
    batch = drawer(model)(2, 6, torch.Generator().manual_seed(0))
    x0 = torch.zeros_like(batch["motion"])  # nothing moves: every frame is the reference
    window = slice(0, 5)
    batch["frames"] = batch["reference"][:, None].expand_as(batch["frames"])
    full = fed.judged_terms(model, judges, batch, x0, 1.0, window)
    half = fed.judged_terms(model, judges, batch, x0, 0.5, window)
    assert float(full["perceptual"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(full["identity"].detach()) == pytest.approx(0, abs=1e-5)
    assert float(half["sync"].detach()) == pytest.approx(float(full["sync"].detach()) / 2, rel=1e-5)


def test_judged_terms_are_weighted_by_alpha_bar_on_average(monkeypatch):
    """With a judge that gives clip i the loss i, the mean term is the mean of alpha_bar_i i."""
    model, seen = adapted_model(), []
    monkeypatch.setattr(fed, "judged_terms", lambda model, judges, batch, x0, weight, window: seen.append(
        weight * batch["reference"].flatten(1).mean(1).mean()) or {"sync": torch.zeros(())})
    t = torch.tensor([10, 40, 70, 95])
    monkeypatch.setattr(fed, "stratified_timesteps", lambda *_: t)
    batch = drawer(model)(4, 6, torch.Generator().manual_seed(0))
    batch["reference"] = torch.arange(4.0).view(4, 1, 1, 1).expand_as(batch["reference"])
    for seed in range(300):
        fed.objective(model, batch, dict(NO_JUDGES, sync=1.0), None, torch.Generator().manual_seed(seed), 0.0)
    expected = (model.diffusion.alpha_bar[t] * torch.arange(4.0)).mean()
    assert float(torch.stack(seen).mean()) == pytest.approx(float(expected), rel=0.1)


def test_validation_loss_is_the_share_left_unexplained(monkeypatch):
    model = small_model("x0")
    batch = drawer(model)(3, 6, torch.Generator().manual_seed(0))
    truth = batch["motion"] / model.spread
    for share in (0.0, 0.5, 1.0):  # a network that always says `share` of the truth leaves (1 - share)^2 of it
        monkeypatch.setattr(model, "forward", lambda xt, *conditions: share * truth)
        assert torch.allclose(fed.validation_loss(model, batch, 0), torch.full((3,), (1 - share) ** 2), atol=1e-5)


def test_local_training_lowers_the_loss_reproducibly():
    model = adapted_model()
    start = lora.adapter_vector(model)
    batch = drawer(model, 1.0)(4, 6, torch.Generator().manual_seed(5))
    before = fed.validation_loss(model, batch, 0).mean()
    fixed = dict(lr=2e-2, batch_size=4, num_frames=6, loss_weights=NO_JUDGES, speech_dropout=0.0)
    runs = [fed.train_adapter(model, None, drawer(model, 1.0), start, 12, 7, **fixed)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert fed.validation_loss(model, batch, 0).mean() < before
    near, _ = fed.train_adapter(model, None, drawer(model, 1.0), start, 12, 7, **fixed, proximal=1e4)
    assert (near - start).norm() < (runs[0] - start).norm() / 2


def test_reliability_is_a_share_and_falls_with_shaking():
    model, judges = adapted_model(), metrics.Judges().eval()
    batch = drawer(model)(1, 6, torch.Generator().manual_seed(0))
    calm, parts = fed.reliability(model, judges, batch, 0.7, public_jitter=10.0, seed=0, **SAMPLING)
    shaky, _ = fed.reliability(model, judges, batch, 0.7, public_jitter=1e-3, seed=0, **SAMPLING)
    assert 0 <= shaky < calm <= 1 and parts["stability"] == 1.0
    assert calm == pytest.approx(0.7 * parts["identity"] + 0.3)


def test_secure_round_is_the_plain_weighted_mean():
    updates = [np.random.default_rng(i).normal(size=50).astype(np.float32) * 0.05 for i in range(5)]
    weights = [0.2, 1.0, 0.5, 0.7, 0.9]
    mechanism = privacy.Mechanism(1.0, 0.0, 50, 5, 2, min_weight=0.1)
    plain, _ = fed.aggregate(updates, weights, None, 0)
    secure, about = fed.aggregate(updates, weights, mechanism, 0)
    assert np.abs(secure - plain).max() < 1e-6
    assert about["weight_sum"] == pytest.approx(sum(weights), rel=1e-6) and about["bytes_up"] == 4 * 51


def test_noise_and_clipping_reach_the_sum():
    updates, weights = [np.full(2000, 1.0, np.float32)] * 4, [1.0] * 4
    mechanism = privacy.Mechanism(0.5, 0.1, 2000, 4, 2, weight_scale=5.0)  # so that the sum of weights is nearly exact
    mean, _ = fed.aggregate(updates, weights, mechanism, 0)
    assert mean.mean() == pytest.approx(0.5 / math.sqrt(2000), abs=0.02)
    # four clients add N(0, z^2 S^2 / 2) each: more than z S because dropouts must never leave too little
    expected = 0.1 * mechanism.sensitivity * math.sqrt(4 / 2) / 4
    assert mean.std() == pytest.approx(expected, rel=0.1)


def test_the_unclipped_share_comes_out_of_the_secure_sum():
    updates, weights = [np.full(100, size, np.float32) for size in (0.001, 0.01, 1.0, 2.0)], [1.0] * 4
    mechanism = privacy.Mechanism(0.5, 0.01, 100, 4, 2, bit_scale=0.5, mechanism="skellam")
    _, about = fed.aggregate(updates, weights, mechanism, 0)
    assert about["unclipped_fraction"] == pytest.approx(0.5, abs=0.1) and about["clip_norm"] == 0.5


def test_an_update_tells_of_its_members():
    model = adapted_model()
    start = lora.adapter_vector(model)
    seen, unseen = (drawer(model, shift)(4, 6, torch.Generator().manual_seed(5)) for shift in (1.0, -1.0))
    fixed = dict(lr=2e-2, batch_size=4, num_frames=6, loss_weights=NO_JUDGES, speech_dropout=0.0)
    trained, _ = fed.train_adapter(model, None, lambda *_: seen, start, 20, 7, **fixed)
    gains = [fed.membership_gains(model, batch, start, trained - start, 0).mean() for batch in (seen, unseen)]
    assert gains[0] > max(0, gains[1])


def test_rounds_move_the_adapter_and_survive_a_client_that_fails():
    model = adapted_model()
    clients, start = clients_of(model, 4), lora.adapter_vector(model)
    after, record = fed.run_round(model, None, clients, start, 0, 3, None, settings())
    again, _ = fed.run_round(model, None, clients, start, 0, 3, None, settings())
    assert torch.equal(after, again) and not torch.equal(after, start)
    assert [c["client"] for c in record["clients"]] == record["cohort"] == ["c0", "c1", "c2", "c3"]

    def broken(batch_size, num_frames, generator):
        return drawer(model, float("nan"))(batch_size, num_frames, generator)

    hurt = clients[:3] + [fed.Client("c3", 7, broken, clients[3].validation)]
    without, record = fed.run_round(model, None, hurt, start, 0, 3, None, settings())
    assert record["dropouts"] == [{"client": "c3", "reason": "update is not finite"}]
    assert without.isfinite().all() and not torch.equal(without, after)


def test_a_cohort_too_small_leaves_the_adapter_as_it_was():
    model = adapted_model()
    start = lora.adapter_vector(model)
    mechanism = privacy.Mechanism(1.0, 0.1, len(start), 4, 3)
    after, record = fed.run_round(model, None, clients_of(model, 2), start, 0, 3, mechanism, settings())
    assert torch.equal(after, start) and "2 clients are left, 3 are needed" in record["skipped"]


def test_imports_follow_one_arrow():
    allowed = {"model": set(), "lora": set(), "privacy": set(), "metrics": set(), "data": set(),
               "fed": {"lora", "privacy", "metrics", "model"}}
    own = set(allowed) | {"train"}
    for name, may in allowed.items():
        lines = (Path(fed.__file__).parent / f"{name}.py").read_text().splitlines()
        imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        assert imported & own <= may, f"{name}.py imports {imported & own - may}"
