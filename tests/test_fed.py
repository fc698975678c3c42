"""The federation's equations against their definitions, and rounds against the plain weighted mean."""

import dataclasses
import math
import subprocess
import sys
import time
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
                    words=torch.ones(batch_size, 8, dtype=torch.long), other_reference=reference.flip(-1))

    return draw


def clients_of(model, num):
    held_out = [drawer(model)(1, 6, torch.Generator().manual_seed(i)) for i in range(num)]
    return [fed.Client(f"c{i}", 4 + i, drawer(model, i / 10), lambda i=i: held_out[i]) for i in range(num)]


def settings(**changes):
    train = dict(lr=1e-2, batch_size=2, num_frames=6, proximal=0.0, loss_weights=NO_JUDGES, condition_dropout=0.1)
    return dict(algorithm="isfa", sample_rate=1.0, local_epochs=0.5, server_lr=0.5, gamma=0.0, reliability_alpha=0.7,
                sample_cap=100, train=train, sampling=SAMPLING, reliability="generated", public=0.1, dropout_rate=0.0,
                client_timeout_seconds=0.0) | changes


@pytest.fixture(scope="module", autouse=True)
def soaked():
    """The long proof, shortened, beside the other tests."""
    script = Path(__file__).with_name("soak_rounds.py")
    with subprocess.Popen([sys.executable, script, "6", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as child:
        yield child
        child.kill()


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
    batch = fed.with_chance(model, batch, weights, torch.Generator().manual_seed(0), 0.1)
    loss, terms = fed.objective(model, batch, weights, judges)
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
    model, t = adapted_model(), torch.tensor([10, 40, 70, 95])
    monkeypatch.setattr(fed, "stratified_timesteps", lambda *_: t)
    batch, generator = drawer(model)(4, 6, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    drawn = [fed.with_chance(model, batch, dict(NO_JUDGES, sync=1.0), generator, 0.0) for _ in range(1000)]
    judged = torch.stack([one["judged"] for one in drawn])
    assert (judged > 0).sum(1).eq(1).all() and {int(one["first"][0]) for one in drawn} == {0, 1}
    assert torch.allclose(judged.mean(0), model.diffusion.alpha_bar[t] / 4, atol=0.02)


def test_gradient_and_terms_do_not_depend_on_micro_batches(monkeypatch):
    model, judges, objective, calls = adapted_model(), metrics.Judges().eval().requires_grad_(False), fed.objective, []
    batch, weights = drawer(model)(5, 6, torch.Generator().manual_seed(0)), dict(tdc=0.3, identity=0.2, perceptual=0.4, sync=0.7)
    model, judges, batch = model.double(), judges.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    model.unet.time_mlp.register_forward_pre_hook(lambda layer, inputs: inputs[0].to(layer[0].weight))

    def gradient(**how):
        terms, used = fed.accumulate(model, batch, judges, torch.Generator().manual_seed(3), loss_weights=weights,
                                     condition_dropout=0.3, **how)
        return torch.cat([p.grad.flatten() for p in lora.adapter_parameters(model)]), terms, used

    whole, terms, _ = gradient()
    for size in (5, 2, 1):
        cut, own, used = gradient(micro_batch=size)
        assert used == size and (cut - whole).norm() < 1e-9 * whole.norm() and own == pytest.approx(terms, rel=1e-9)
    model.unet.train(), setattr(model.unet, "checkpointing", True)
    assert torch.equal(gradient()[0], whole)
    model.unet.checkpointing = False

    def small(model, part, *rest):  # a device on which the third clip does not fit
        calls.append(len(part["t"]))
        if len(part["t"]) > 2:
            raise torch.OutOfMemoryError
        return objective(model, part, *rest)

    monkeypatch.setattr(fed, "objective", small)
    with pytest.warns(UserWarning, match="micro-batches of 2 clips"):
        cut, _, used = gradient()
    assert calls == [5, 3, 2, 2, 1] and used == 2 and (cut - whole).norm() < 1e-9 * whole.norm()


def test_bfloat16_is_near():
    model, gradients = adapted_model(), []
    batch = drawer(model)(2, 6, torch.Generator().manual_seed(0))
    for bf16 in (False, True):
        fed.accumulate(model, batch, None, torch.Generator().manual_seed(3), loss_weights=NO_JUDGES, condition_dropout=0.0,
                       bf16=bf16)
        gradients.append(torch.cat([p.grad.flatten() for p in lora.adapter_parameters(model)]))
    assert 0.99 < float(torch.cosine_similarity(*gradients, dim=0)) and not torch.equal(*gradients)
    assert gradients[1].dtype == torch.float32


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
    fixed = dict(lr=2e-2, batch_size=4, num_frames=6, loss_weights=NO_JUDGES, condition_dropout=0.0)
    runs = [fed.train_adapter(model, None, drawer(model, 1.0), start, 6, 7, **fixed)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert fed.validation_loss(model, batch, 0).mean() < before
    near, _ = fed.train_adapter(model, None, drawer(model, 1.0), start, 6, 7, **fixed, proximal=1e4)
    assert (near - start).norm() < (runs[0] - start).norm() / 2


def test_reliability_is_a_share_and_falls_with_shaking():
    model, judges = adapted_model(), metrics.Judges().eval()
    batch = drawer(model)(1, 6, torch.Generator().manual_seed(0))
    calm, parts = fed.reliability(model, judges, batch, 0.7, 10.0, seed=0, **SAMPLING)
    shaky, _ = fed.reliability(model, judges, batch, 0.7, 1e-3, seed=0, **SAMPLING)
    assert 0 <= shaky < calm <= 1 and parts["stability"] == 1.0
    assert calm == pytest.approx(0.7 * parts["identity"] + 0.3)


def test_explained_reliability_falls_with_what_nothing_explains_and_with_useless_speech(monkeypatch):
    model, batch = adapted_model(), drawer(adapted_model())(2, 6, torch.Generator().manual_seed(0))
    heard, silent = fed.unexplained(model, batch, 0)
    assert heard != silent and heard == float(fed.validation_loss(model, batch, 0, 4).mean())
    for own, speech, fit in (((0.4, 0.6), 1, 1), ((0.3, 0.6), 1, 1), ((0.5, 0.6), 0.5, math.exp(-0.25)),
                             ((0.4, 0.3), 0, 1), ((0.8, 0.8), 0, math.exp(-1))):
        monkeypatch.setattr(fed, "unexplained", lambda *_, own=own: own)
        r, parts = fed.explained_reliability(model, batch, 0.7, (0.4, 0.6), 0)
        assert parts == pytest.approx({"speech": speech, "fit": fit}) and r == pytest.approx(0.7 * speech + 0.3 * fit)


def test_secure_round_is_the_plain_weighted_mean():
    updates = [np.random.default_rng(i).normal(size=50).astype(np.float32) * 0.05 for i in range(5)]
    weights = [0.2, 1.0, 0.5, 0.7, 0.9]
    mechanism = privacy.Mechanism(1.0, 0.0, 50, 5, 2, min_weight=0.1)
    uploads = dict(enumerate(zip(updates, weights)))
    plain, _, _ = fed.aggregate(uploads, list(uploads), None, 0)
    secure, survivors, about = fed.aggregate(uploads, list(uploads), mechanism, 0)
    assert np.abs(secure - plain).max() < 1e-6 and survivors == [0, 1, 2, 3, 4]
    assert about["weight_sum"] == pytest.approx(sum(weights), rel=1e-6) and about["bytes_up"] == 4 * 51


def test_noise_and_clipping_reach_the_sum():
    updates, weights = [np.full(2000, 1.0, np.float32)] * 4, [1.0] * 4
    mechanism = privacy.Mechanism(0.5, 0.1, 2000, 4, 2, weight_scale=5.0)  # so that the sum of weights is nearly exact
    mean, _, _ = fed.aggregate(dict(enumerate(zip(updates, weights))), range(4), mechanism, 0)
    assert mean.mean() == pytest.approx(0.5 / math.sqrt(2000), abs=0.02)
    # four clients add N(0, z^2 S^2 / 2) each: more than z S because dropouts must never leave too little
    expected = 0.1 * mechanism.sensitivity * math.sqrt(4 / 2) / 4
    assert mean.std() == pytest.approx(expected, rel=0.1)


def test_the_unclipped_share_comes_out_of_the_secure_sum():
    updates, weights = [np.full(100, size, np.float32) for size in (0.001, 0.01, 1.0, 2.0)], [1.0] * 4
    mechanism = privacy.Mechanism(0.5, 0.01, 100, 4, 2, bit_scale=0.5, mechanism="skellam")
    _, _, about = fed.aggregate(dict(enumerate(zip(updates, weights))), range(4), mechanism, 0)
    assert about["unclipped_fraction"] == pytest.approx(0.5, abs=0.1) and about["clip_norm"] == 0.5


def test_an_update_tells_of_its_members():
    model = adapted_model()
    start = lora.adapter_vector(model)
    seen, unseen = (drawer(model, shift)(4, 6, torch.Generator().manual_seed(5)) for shift in (1.0, -1.0))
    fixed = dict(lr=2e-2, batch_size=4, num_frames=6, loss_weights=NO_JUDGES, condition_dropout=0.0)
    trained, _ = fed.train_adapter(model, None, lambda *_: seen, start, 20, 7, **fixed)
    gains = [fed.membership_gains(model, batch, start, [trained - start], 0).mean() for batch in (seen, unseen)]
    assert gains[0] > max(0, gains[1])


def test_rounds_move_the_adapter_and_survive_clients_that_fail():
    model = adapted_model()
    clients, start = clients_of(model, 5), {"adapter": lora.adapter_vector(model)}
    after, record = fed.run_round(model, None, clients, start, 0, 3, None, settings())
    again, _ = fed.run_round(model, None, clients, start, 0, 3, None, settings())
    assert torch.equal(after["adapter"], again["adapter"]) and not torch.equal(after["adapter"], start["adapter"])
    assert [c["client"] for c in record["clients"]] == record["cohort"] == ["c0", "c1", "c2", "c3", "c4"]

    def broken(*_):
        raise KeyError("disk")

    def endless(*_):
        while True:
            time.sleep(0.01)

    draws = {2: broken, 3: lambda *a: drawer(model, float("nan"))(*a), 4: endless}
    hurt = [dataclasses.replace(c, draw=draws.get(i, c.draw)) for i, c in enumerate(clients)]
    without, record = fed.run_round(model, None, hurt, start, 0, 3, None, settings(client_timeout_seconds=3.0))
    assert record["dropouts"] == [{"client": "c2", "reason": "KeyError('disk')"},
                                  {"client": "c3", "reason": "update is not finite"},
                                  {"client": "c4", "reason": "took longer than 3 s"}]
    two, _ = fed.run_round(model, None, clients[:2], start, 0, 3, None, settings())
    assert torch.equal(without["adapter"], two["adapter"])  # the survivors' mean, and theirs only


def test_a_cohort_too_small_leaves_the_adapter_as_it_was():
    model = adapted_model()
    start = {"adapter": lora.adapter_vector(model)}
    mechanism = privacy.Mechanism(1.0, 0.1, len(start["adapter"]), 4, 3)
    after, record = fed.run_round(model, None, clients_of(model, 2), start, 0, 3, mechanism, settings())
    assert after == start and "2 clients are left, 3 are needed" in record["skipped"]


def test_simulated_dropouts_leave_at_every_stage_and_cost_their_own_update_only(monkeypatch):
    updates = [np.random.default_rng(i).normal(size=20).astype(np.float32) for i in range(8)]
    clients = [fed.Client(str(i), 4 + i, None, None) for i in range(8)]
    monkeypatch.setattr(fed, "client_update", lambda model, judges, client, *_: (
        updates[int(client.name)], client.num_samples / 20, {"client": client.name, "terms": {}}))
    mechanism, start = privacy.Mechanism(100.0, 0.0, 20, 8, 2, min_weight=0.01), {"adapter": torch.zeros(20)}
    stages, skipped = set(), 0
    for seed in range(30):
        after, record = fed.run_round(None, None, clients, start, 0, seed, mechanism, settings(dropout_rate=0.3, server_lr=1.0))
        stages |= {gone["reason"].split()[-1] for gone in record["dropouts"]}
        if "skipped" in record:
            assert torch.equal(after["adapter"], start["adapter"]) and "needed" in record["skipped"]
            skipped += 1
            continue
        left = [int(gone["client"]) for gone in record["dropouts"]]
        summed = [int(c["client"]) for c in record["clients"]]  # with who left before unmask: its update had arrived
        assert sorted(left + summed) == list(range(8))
        mean = np.average([updates[i] for i in summed], axis=0, weights=[clients[i].num_samples for i in summed])
        assert np.abs(after["adapter"].numpy() - mean).max() < 1e-5
    assert stages >= {"training", "advertise", "share", "mask"} and 0 < skipped < 20


def test_shares_are_whole_and_balanced():
    loads = [5, 1, 1, 8, 3, 2]
    workers = [fed.Workers() for _ in range(3)]
    for rank, worker in enumerate(workers):
        worker.rank, worker.size = rank, 3
    shares = [worker.share(loads) for worker in workers]
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sum(loads[i] for i in share) for share in shares] == [8, 6, 6]


# Client i has the loss a_i |x - t_i|^2 / 2: what K steps of gradient descent do to it is known.
CURVATURES, TARGETS, RATE, STEPS = (1.0, 3.0, 0.5), (-1.0, 2.0, 4.0), 0.1, 5


def quadratic_federation(monkeypatch, **train):
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(3, 2))
    lora.inject_lora(model, 2, 4, 0.0, ["unet"])

    def accumulate(model, batch, *_, **__):
        model.zero_grad()
        x = torch.cat([p.flatten() for p in lora.adapter_parameters(model)])
        (batch["a"] / 2 * (x - batch["t"]).square().sum()).backward()
        return {"diffusion": 0.0}, 0

    monkeypatch.setattr(fed, "accumulate", accumulate)
    clients = [fed.Client(f"c{i}", 10, lambda *_, a=a, t=t: dict(a=a, t=t), dict)
               for i, (a, t) in enumerate(zip(CURVATURES, TARGETS))]
    fixed = settings(local_epochs=STEPS * 2 / 10, server_lr=1.0)
    fixed["train"] |= {"lr": RATE, "optimizer": "sgd"} | train
    return model, clients, fixed, torch.zeros_like(lora.adapter_vector(model))


@pytest.mark.parametrize("proximal", [0.0, 2.0])
def test_fedavg_and_fedprox_on_quadratics(monkeypatch, proximal):
    model, clients, fixed, zero = quadratic_federation(monkeypatch, proximal=proximal)
    x, state = 1.0, {"adapter": zero + 1.0}
    for index in range(3):
        state, _ = fed.run_round(model, None, clients, state, index, 0, None, fixed)
        ends = []
        for a, t in zip(CURVATURES, TARGETS):  # x <- x* + (1 - lr (a + mu))^K (x - x*), x* = (a t + mu g) / (a + mu)
            still = (a * t + proximal * x) / (a + proximal)
            ends.append(still + (1 - RATE * (a + proximal)) ** STEPS * (x - still))
        x = sum(ends) / 3
        assert torch.allclose(state["adapter"], zero + x, atol=1e-5)


def test_scaffold_on_quadratics_reaches_the_optimum_that_fedavg_misses(monkeypatch):
    model, clients, fixed, zero = quadratic_federation(monkeypatch)
    fixed["algorithm"] = "scaffold"
    state = {"adapter": zero + 1.0, "control": zero, "controls": dict.fromkeys(range(3), zero)}
    x, c, own = 1.0, 0.0, [0.0] * 3
    for index in range(15):
        state, _ = fed.run_round(model, None, clients, state, index, 0, None, fixed)
        ends, renewed = [], []
        for a, t, c_i in zip(CURVATURES, TARGETS, own):
            y = x
            for _ in range(STEPS):
                y -= RATE * (a * (y - t) - c_i + c)
            ends.append(y), renewed.append(c_i - c + (x - y) / (STEPS * RATE))
        x, c, own = sum(ends) / 3, c + sum(n - o for n, o in zip(renewed, own)) / 3, renewed
        if index in (0, 1, 5):
            assert torch.allclose(state["adapter"], zero + x, atol=1e-4)
            assert torch.allclose(state["control"], zero + c, atol=1e-4)
    optimum = sum(a * t for a, t in zip(CURVATURES, TARGETS)) / sum(CURVATURES)
    assert float((state["adapter"] - optimum).abs().max()) < 0.02
    plain = {"adapter": zero + 1.0}
    for index in range(15):
        plain, _ = fed.run_round(model, None, clients, plain, index, 0, None, fixed | {"algorithm": "isfa"})
    assert float((plain["adapter"] - optimum).abs().min()) > 0.05


def test_scaffold_clips_both_updates_as_one_vector(monkeypatch):
    model, clients, fixed, zero = quadratic_federation(monkeypatch)
    fixed["algorithm"], d = "scaffold", len(zero)
    state = {"adapter": zero + 1.0, "control": zero, "controls": dict.fromkeys(range(3), zero)}
    free, _ = fed.run_round(model, None, clients, state, 0, 0, None, fixed)
    mechanism = privacy.Mechanism(1e-3, 0.0, 2 * d, 3, 2, weight_scale=1.0, min_weight=1e-6)
    bound, record = fed.run_round(model, None, clients, state, 0, 0, mechanism, fixed)
    moved = torch.cat([bound["adapter"] - state["adapter"], bound["control"]])
    assert 0 < float(moved.norm()) < 1.1e-3 and record["clipped_fraction"] == 1.0
    assert float(free["control"].norm()) > 1


def test_centralized_takes_the_cohorts_steps_on_everyones_clips(monkeypatch):
    model, clients, fixed, zero = quadratic_federation(monkeypatch)
    fixed |= {"algorithm": "centralized"}
    fixed["train"]["batch_size"] = 3
    monkeypatch.setattr(fed, "join_batches", lambda parts: {k: sum(p[k] for p in parts) / len(parts) for k in parts[0]})
    state, record = fed.run_round(model, None, clients, {"adapter": zero}, 0, 0, None, fixed)
    assert record["steps"] == 3 * round(STEPS * 2 / 3) and TARGETS[0] < float(state["adapter"].mean()) < TARGETS[2]


def test_killed_rounds_resume_to_the_same_adapter(soaked):
    output = soaked.communicate()[0]
    assert soaked.returncode == 0 and "6 rounds, 1 kills: same adapter" in output, output


def test_imports_follow_one_arrow():
    allowed = {"model": set(), "lora": set(), "privacy": set(), "metrics": set(), "data": set(),
               "fed": {"lora", "privacy", "metrics", "model"}}
    own = set(allowed) | {"train"}
    for name, may in allowed.items():
        lines = (Path(fed.__file__).parent / f"{name}.py").read_text().splitlines()
        imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        assert imported & own <= may, f"{name}.py imports {imported & own - may}"
