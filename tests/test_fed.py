"""The federation's equations against their definitions, local training, and whole rounds on losses solved by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import fed
import lora
import metrics
import privacy
import train
import variants
from test_model import small_model

NO_JUDGES = {"tdc": 0.05, "identity": 0.0, "perceptual": 0.0, "sync": 0.0}
ALL_TERMS = {"tdc": 0.3, "identity": 0.2, "perceptual": 0.4, "sync": 0.7}
SAMPLING = {"num_steps": 2, "guidance": 1.0, "window": 40}


def adapted_model(rank=2, factors="R"):
    model = small_model().requires_grad_(False)
    lora.inject_lora(model.unet, rank, 4.0, 0.0, factors)
    return model.eval()


def random_batch(model, num_clips, num_frames, seed, shift=0.0):
    """A batch of noise pictures; `shift` moves the motion, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(num_clips, num_frames, 3, 32, 32, generator=generator) * 2 - 1
    reference = torch.rand(num_clips, 3, 32, 32, generator=generator) * 2 - 1
    liveliness = torch.full([len(frames)], 0.7)
    motion, reference_latents = model.encode_motion(frames, reference, liveliness)
    return {
        "frames": frames,
        "reference": reference,
        "liveliness": liveliness,
        "motion": motion + shift,
        "reference_latents": reference_latents,
        "mel": torch.randn(num_clips, num_frames, 20, 40, generator=generator),
        "words": torch.ones(num_clips, 8, dtype=torch.long),
    }


class NoiseClient(fed.Client):
    """A client whose clips are noise, so that no files are needed."""

    def __init__(self, name, num_samples, shift=0.0, folder=None):
        super().__init__(name, {"train": [], "validation": [], "test": []}, 6, folder)
        self.num_samples = num_samples
        self.shift = shift

    def train_batch(self, model, batch_size, generator):
        seed = int(torch.randint(2**31, (), generator=generator))
        return random_batch(model, batch_size, self.num_frames, seed, self.shift)

    def validation_batch(self, model, num_frames=6):
        return random_batch(model, 1, num_frames, 1, self.shift)


# ---------------------------------------------------------------- equations


def test_tdc_loss_is_eq_8():
    eps_hat = torch.randn(2, 5, 3, 4, 4)
    eps = torch.randn(2, 5, 3, 4, 4)
    by_frame = []
    for f in range(4):
        change = (eps_hat[:, f + 1] - eps_hat[:, f]) - (eps[:, f + 1] - eps[:, f])
        by_frame.append(float(change.abs().mean()))
    assert float(fed.tdc_loss(eps_hat, eps)) == pytest.approx(np.mean(by_frame), rel=1e-5)
    assert float(fed.tdc_loss(eps + 3.0, eps)) == pytest.approx(0, abs=1e-6)  # a constant error


def test_isfa_weights_have_the_papers_ratios_and_are_bounded():
    few = fed.isfa_weight(20, 0.9, 0.5, 100)
    many = fed.isfa_weight(80, 0.2, 0.5, 100)
    assert few / many == pytest.approx(20 * math.exp(0.5 * 0.9) / (80 * math.exp(0.5 * 0.2)))
    assert fed.isfa_weight(30, 0.1, 0.0, 100) / fed.isfa_weight(60, 0.9, 0.0, 100) == 0.5  # FedAvg
    assert 0 < fed.isfa_weight(1, 0.0, 5.0, 100) < fed.isfa_weight(10**6, 1.0, 5.0, 100) == 1.0


def judged_noise(model, batch, weights=None):
    """Random numbers of the first seed with which a clip is judged."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        noise = fed.draw_noise(model, batch, weights or ALL_TERMS, generator)
        if noise["judged"] is not None:
            return noise


def test_the_objective_is_eq_12():
    model = adapted_model()
    judges = metrics.Judges().eval().requires_grad_(False)
    batch = random_batch(model, 3, 6, 0)
    noise = judged_noise(model, batch)
    loss, terms = fed.objective(model, judges, batch, noise, ALL_TERMS, slice(0, 3))
    assert set(terms) == {"diffusion", *ALL_TERMS}
    expected = terms["diffusion"] + sum(ALL_TERMS[name] * terms[name] for name in ALL_TERMS)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    losses, x0_hat, eps_hat = model.training_losses(batch, noise["t"], noise["eps"], noise["keep"])
    assert float(terms["diffusion"].detach()) == pytest.approx(
        float(losses.mean().detach()), rel=1e-5
    )
    assert float(terms["tdc"].detach()) == pytest.approx(
        float(fed.tdc_loss(eps_hat, noise["eps"]).detach()), rel=1e-5
    )
    row = noise["judged"]
    frames = slice(noise["judged_frame"], noise["judged_frame"] + 5)
    own = {name: batch[name][row : row + 1, frames] for name in ("frames", "mel")}
    own |= {name: batch[name][row : row + 1] for name in ("reference", "liveliness")}
    auxiliary = fed.auxiliary_losses(model, judges, own, x0_hat[row : row + 1, frames])
    for name, value in auxiliary.items():
        assert float(terms[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)


def test_auxiliary_losses_vanish_for_perfect_frames():
    model = small_model()
    judges = metrics.Judges().eval()
    batch = random_batch(model, 2, 5, 0)
    batch["frames"] = batch["reference"][:, None].expand_as(batch["frames"])
    losses = fed.auxiliary_losses(model, judges, batch, torch.zeros_like(batch["motion"]))
    assert float(losses["perceptual"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses["identity"].detach()) == pytest.approx(0, abs=1e-5)
    assert float(losses["sync"].detach()) > 0.01  # random judges find no agreement
    # Whom it shows is told by the reference alone, whatever the true frames are.
    batch["frames"] = -batch["frames"]
    losses = fed.auxiliary_losses(model, judges, batch, torch.zeros_like(batch["motion"]))
    assert float(losses["identity"].detach()) == pytest.approx(0, abs=1e-5)
    assert float(losses["perceptual"].detach()) > 0.001


@torch.no_grad()
def test_auxiliary_losses_decode_the_motion_at_its_liveliness():
    model = small_model()
    judges = metrics.Judges().eval()
    batch = random_batch(model, 2, 5, 0)
    x0 = batch["motion"] / model.motion_std
    batch["frames"] = model.decode(x0, batch["reference"], batch["liveliness"])
    losses = fed.auxiliary_losses(model, judges, batch, x0)
    assert float(losses["perceptual"]) == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_identity_is_judged_in_the_middle_of_the_five_frames():
    model = small_model()
    judges = metrics.Judges().eval()
    batch = random_batch(model, 2, 5, 0)
    x0 = torch.randn(batch["motion"].shape, generator=torch.Generator().manual_seed(0))
    x0[:, 2] = 0  # no motion: the reference itself
    losses = fed.auxiliary_losses(model, judges, batch, x0)
    assert float(losses["identity"]) == pytest.approx(0, abs=1e-5)


def test_one_clip_stands_for_all_with_the_expectation_of_weights_alpha_bar():
    model = adapted_model()
    batch = random_batch(model, 4, 6, 0)
    sums = torch.zeros(4)
    alpha_bars = torch.zeros(4)
    frames = set()
    for seed in range(1500):
        generator = torch.Generator().manual_seed(seed)
        noise = fed.draw_noise(model, batch, ALL_TERMS, generator, condition_dropout=0.0)
        if noise["judged"] is not None:
            sums[noise["judged"]] += 1
        t = noise["t"][:, -1]  # the last frame is never known
        alpha_bars += model.diffusion.alpha_bar[t] / 4
        frames.add(noise["judged_frame"])
    assert torch.allclose(sums / 1500, alpha_bars / 1500, atol=0.02)
    assert frames == {0, 1}


def test_conditions_are_dropped_and_first_frames_known_as_often_as_said():
    model = adapted_model()
    batch = random_batch(model, 8, 6, 0)
    dropped = []
    known = []
    for seed in range(200):
        noise = fed.draw_noise(model, batch, NO_JUDGES, torch.Generator().manual_seed(seed), 0.3)
        dropped.append(1 - torch.stack(list(noise["keep"].values())).mean())
        is_known = noise["t"] == -1
        known.append(is_known[:, 0].float().mean())
        assert (noise["eps"][is_known] == 0).all() and not is_known[:, 3:].any()
        assert noise["judged"] is None
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.03)
    assert np.mean(known) == pytest.approx(fed.CONTINUED, abs=0.05)


def test_the_gradient_does_not_depend_on_micro_batches():
    model = adapted_model().double()
    judges = metrics.Judges().eval().requires_grad_(False).double()
    model.unet.time_mlp.register_forward_pre_hook(lambda layer, x: x[0].double())
    batch = random_batch(adapted_model(), 5, 6, 0)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    gradients = []
    terms = []
    for micro_batch in (0, 2, 1):
        generator = torch.Generator().manual_seed(2)  # with which a clip is judged
        terms.append(fed.backward(model, judges, batch, ALL_TERMS, generator, micro_batch))
        parameters = lora.adapter_parameters(model)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    for gradient, own_terms in zip(gradients[1:], terms[1:]):
        assert (gradient - gradients[0]).norm() < 1e-6 * gradients[0].norm()
        assert own_terms == pytest.approx(terms[0], rel=1e-6) and own_terms["sync"] > 0


def test_bfloat16_gradients_are_near():
    model = adapted_model()
    batch = random_batch(model, 2, 6, 0)
    gradients = []
    for bf16 in (False, True):
        fed.backward(model, None, batch, NO_JUDGES, torch.Generator().manual_seed(3), bf16=bf16)
        parameters = lora.adapter_parameters(model)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98
    assert not torch.equal(*gradients)


def test_unexplained_variance_is_one_without_motion_and_the_linear_denoisers_without_unet():
    model = small_model()
    batch = random_batch(model, 3, 6, 0)
    x0 = batch["motion"] / model.motion_std
    with_unet = fed.unexplained_variance(model, batch, 0, num_levels=3)
    without = fed.unexplained_variance(model, batch, 0, num_levels=3, use_unet=False)
    for layer in (model.unet.conv_out, model.unet.speech_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    zeroed = fed.unexplained_variance(model, batch, 0, num_levels=3)
    assert without.shape == (3, 3)
    assert torch.allclose(zeroed, without, atol=1e-6) and not torch.allclose(with_unet, without)
    model.prior.denoise = lambda xt, signal, noise: (0.25 * x0, torch.zeros_like(x0))
    constant = fed.unexplained_variance(model, batch, 0, num_levels=2)
    assert torch.allclose(constant, torch.full((2, 3), 0.75**2), atol=1e-5)
    still = batch | {"motion": torch.zeros_like(batch["motion"])}  # a photograph
    assert fed.unexplained_variance(model, still, 0, num_levels=2).max() < 1000


def test_what_is_left_unexplained_depends_on_all_that_the_model_is_told():
    model = small_model()
    batch = random_batch(model, 2, 6, 0)
    batch["words"][1] = 2
    shares = fed.unexplained_variance(model, batch, 0, num_levels=2)
    for name in ("mel", "reference", "reference_latents", "words"):
        other = batch | {name: batch[name].flip(0)}
        assert not torch.allclose(fed.unexplained_variance(model, other, 0, num_levels=2), shares)


def test_of_a_calm_clip_the_same_share_is_unexplained():
    model = small_model()
    batch = random_batch(model, 1, 6, 0)
    x0 = batch["motion"] / model.motion_std
    x0 = x0 * (0.05 * model.prior.mean_variance() / model.weighted_power(x0)).sqrt()
    model.prior.denoise = lambda xt, signal, noise: (0.25 * x0, None)
    calm = batch | {"motion": x0 * model.motion_std}
    shares = fed.unexplained_variance(model, calm, 0, num_levels=2, use_unet=False)
    assert torch.allclose(shares, torch.full((2, 1), 0.75**2), atol=1e-5)


def test_a_loss_of_ones_own_is_given_frames_to_judge():
    """README: one more entry of `auxiliary_losses` and its weight make a new loss."""
    model = adapted_model()
    batch = random_batch(model, 2, 6, 0)
    weights = dict.fromkeys(ALL_TERMS, 0.0) | {"gaze": 1.0}
    assert judged_noise(model, batch, weights) is not None


def test_runs_with_and_without_a_loss_see_the_same_batches():
    model = adapted_model()
    batch = random_batch(model, 2, 6, 0)
    states = []
    for weights in (ALL_TERMS, dict.fromkeys(ALL_TERMS, 0.0)):
        generator = torch.Generator().manual_seed(0)
        fed.draw_noise(model, batch, weights, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


# ---------------------------------------------------------------- clients


def synthetic_clips(tmp_path, num_clips=3):
    data.make_synthetic(tmp_path / "synthetic", 0, 1, 0, 1, num_clips, 1.0, 32)
    return data.TalkingHeads(tmp_path / "synthetic", 32, cache=tmp_path / "cache").clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return synthetic_clips(tmp_path_factory.mktemp("clips"))


def test_a_batch_holds_the_motion_of_its_reference(clips):
    model = small_model()
    batch = fed.sample_batch(model, data.by_person(clips), 2, 8, torch.Generator().manual_seed(0))
    assert not batch["motion"].requires_grad and not batch["motion"].is_inference()
    inputs = (batch[name][1:] for name in ("frames", "reference", "liveliness"))
    motion, latents = model.encode_motion(*inputs)
    assert torch.allclose(batch["motion"][1:], motion, atol=1e-5)
    assert torch.allclose(batch["reference_latents"][1:], latents, atol=1e-5)
    x0 = batch["motion"] / model.motion_std
    decoded = model.decode(x0, batch["reference"], batch["liveliness"])
    assert decoded.shape == batch["frames"].shape


def test_batches_follow_from_seed_and_step_wherever_they_are_made(clips):
    model = small_model()
    views = {"same_clip": False, "mirror": True}
    batches = fed.Batches(model, data.by_person(clips), 2, 8, 5, views)
    made = list(batches.loader(3, 6))  # by another process
    assert [train.checksum(batch) for batch in made] == [
        train.checksum(batches[i]) for i in (3, 4, 5)
    ]
    assert len({train.checksum(batch) for batch in made}) == 3
    other = fed.Batches(model, data.by_person(clips), 2, 8, 6, views)
    assert not torch.equal(other[3]["motion"], made[0]["motion"])
    needed = {"motion", "reference", "reference_latents", "liveliness", "mel", "words"}
    assert made[0].keys() == needed


def test_a_reported_loss_takes_its_reference_from_another_clip(clips):
    model = small_model()
    client = fed.Client("a", {"train": clips[:1], "validation": clips[1:2], "test": clips[2:]}, 8)
    batch = client.validation_batch(model)
    reference = ((batch["reference"][0] + 1) * 127.5).round().byte().numpy()
    assert any(np.array_equal(reference, frame) for frame in clips[0].frames)
    assert not any(np.array_equal(reference, frame) for frame in clips[1].frames)
    assert batch["frames"].shape[1] == 16 and not batch["motion"].is_inference()
    assert float(batch["liveliness"]) == pytest.approx(clips[0].liveliness)
    assert clips[0].liveliness != pytest.approx(clips[1].liveliness)
    assert torch.equal(batch["frames"][0], data.to_float(clips[1].frames[:16]))
    assert np.array_equal(batch["mel"][0], data.audio_windows(clips[1].mel)[:16])


def test_a_reported_loss_has_the_prompts_of_its_own_clips(clips):
    model = small_model()
    model.text_encoder.learn_words(["calm", "happy", "sad"])
    prompts = ["sad", "calm", "happy"]
    first, *others = (replace(clip, prompt=own) for clip, own in zip(clips, prompts))
    batch = fed.fixed_batch(model, others, [first], 8)
    assert torch.equal(batch["words"], model.text_encoder.ids(prompts[1:]))


def test_only_training_clips_are_trained_on(clips, monkeypatch):
    model = small_model()
    client = fed.Client("a", {"train": clips[:1], "validation": clips[1:2], "test": clips[2:]}, 8)
    used = []
    real = data.sample_batch

    def watched(people, *args):
        used.extend(clip for clips in people.values() for clip in clips)
        return real(people, *args)

    monkeypatch.setattr(data, "sample_batch", watched)
    client.train_batch(model, 2, torch.Generator().manual_seed(0))
    assert used == clips[:1]
    assert clips[0].num_frames == 25 and client.num_samples == 3  # whole windows of 8 frames


def test_pooled_clips_are_trained_and_tested_on_as_each_client_would(clips):
    first, second, third = ([clip] for clip in clips)
    splits = [{"train": first, "validation": second, "test": third}]
    splits.append({"train": second, "validation": third, "test": first})
    clients = [fed.Client(str(i), split, 8, same_clip=True) for i, split in enumerate(splits)]
    pooled = fed.pool_clients(clients)
    parts = {"train": first + second, "validation": second + third, "test": third + first}
    assert pooled.split == parts and pooled.train_clips == data.by_person(clips[:2])
    assert pooled.num_samples == 6 and pooled.same_clip


def test_local_training_lowers_the_loss_and_is_reproducible():
    model = adapted_model(rank=4)
    client = NoiseClient("a", 24, shift=1.0)
    state = {"adapter": lora.adapter_vector(model), "round": 0}
    kwargs = {"local_epochs": 1.0, "lr": 0.05, "batch_size": 4, "loss_weights": NO_JUDGES}
    first, terms = fed.local_update(model, None, client, state, 7, **kwargs)
    second, _ = fed.local_update(model, None, client, state, 7, **kwargs)
    other, _ = fed.local_update(model, None, client, state, 8, **kwargs)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert set(terms) == {"diffusion", "tdc"}
    torch.manual_seed(3)  # of whoever calls: another mechanism's noise must not follow from ours
    fed.local_update(model, None, client, state, 7, **kwargs)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    batch = random_batch(model, 4, 6, 5, shift=1.0)
    lora.load_adapter_vector(model, state["adapter"])
    before = fed.unexplained_variance(model, batch, 0).mean()
    lora.load_adapter_vector(model, state["adapter"] + first)
    assert fed.unexplained_variance(model, batch, 0).mean() < before


def test_dropout_follows_from_the_clients_seed_alone():
    """Else a resumed run, or another number of workers, would train other adapters."""
    model = small_model().requires_grad_(False)
    lora.inject_lora(model.unet, 2, 4.0, 0.5, "AB")
    start = lora.adapter_vector(model.eval()) + 0.1
    kwargs = {"num_steps": 2, "lr": 0.05, "batch_size": 2, "loss_weights": NO_JUDGES}
    trained = []
    for state_of_the_process in (0, 1):
        torch.manual_seed(state_of_the_process)
        adapter, _ = fed.train_adapter(model, None, NoiseClient("a", 4), start, 7, **kwargs)
        trained.append(adapter)
    assert torch.equal(*trained)


def test_the_number_of_local_steps_follows_the_clients_samples(monkeypatch):
    model = adapted_model()
    calls = []

    def count(model, judges, batch, *args):
        calls.append(len(batch["motion"]))
        for parameter in lora.adapter_parameters(model):
            parameter.grad = torch.zeros_like(parameter)
        return {}

    monkeypatch.setattr(fed, "backward", count)
    state = {"adapter": lora.adapter_vector(model), "round": 0}
    kwargs = {"lr": 0.05, "batch_size": 4, "loss_weights": NO_JUDGES}
    for num_samples, epochs, steps in ((24, 1.0, 6), (24, 0.5, 3), (1, 0.1, 1)):
        calls.clear()
        client = NoiseClient("a", num_samples)
        fed.local_update(model, None, client, state, 7, local_epochs=epochs, **kwargs)
        assert calls == [4] * steps


def test_the_local_rate_is_constant_for_half_of_the_steps_and_then_falls_to_zero(monkeypatch):
    """Where the gradient stays the same, each step of AdamW is as long as its rate."""
    model = adapted_model()

    def backward(model, *args):
        for parameter in lora.adapter_parameters(model):
            parameter.grad = torch.ones_like(parameter)
        return {}

    monkeypatch.setattr(fed, "backward", backward)
    start = lora.adapter_vector(model)
    kwargs = {"num_steps": 8, "lr": 0.01, "batch_size": 1, "loss_weights": NO_JUDGES}
    trained, _ = fed.train_adapter(model, None, NoiseClient("a", 4), start, 0, **kwargs)
    way = 0.01 * (5 + 0.75 + 0.5 + 0.25)
    assert torch.allclose(start - trained, torch.full_like(start, way), rtol=1e-3)


def test_the_terms_of_a_round_are_means_over_its_steps(monkeypatch):
    model = adapted_model()
    terms = iter([{"diffusion": 1.0}, {"diffusion": 2.0}, {"diffusion": 6.0}])
    monkeypatch.setattr(fed, "backward", lambda *args: next(terms))
    kwargs = {"num_steps": 3, "lr": 0.01, "batch_size": 1, "loss_weights": NO_JUDGES}
    start = lora.adapter_vector(model)
    _, found = fed.train_adapter(model, None, NoiseClient("a", 4), start, 0, **kwargs)
    assert found == pytest.approx({"diffusion": 3.0})


def test_an_adapter_that_is_not_finite_is_an_error():
    model = adapted_model()
    state = {"adapter": lora.adapter_vector(model), "round": 0}
    client = NoiseClient("a", 4, shift=math.nan)
    kwargs = {"local_epochs": 1.0, "lr": 0.05, "batch_size": 4, "loss_weights": NO_JUDGES}
    with pytest.raises(ValueError, match="not finite"):
        fed.local_update(model, None, client, state, 7, **kwargs)


def test_reliability_is_identity_and_stability():
    model = adapted_model()
    judges = metrics.Judges().eval()
    batch = random_batch(model, 1, 6, 0)
    rating = {"alpha": 0.7, **SAMPLING}
    calm = fed.reliability(model, judges, batch, 0, public_jitter=10.0, **rating)
    flickering = fed.reliability(model, judges, batch, 0, public_jitter=1e-3, **rating)
    assert 0 <= flickering < calm <= 1
    alone = fed.reliability(model, judges, batch, 0, public_jitter=10.0, **rating | {"alpha": 1.0})
    assert calm == pytest.approx(0.7 * alone + 0.3)
    generator = torch.Generator().manual_seed(0)
    sampling = SAMPLING | {"liveliness": batch["liveliness"]}
    frames = model.generate(batch["reference"], batch["mel"], batch["words"], generator, **sampling)
    jitter = float(metrics.temporal_jitter(data.to_unit(frames)).mean())
    half = fed.reliability(model, judges, batch, 0, public_jitter=jitter / 2, **rating)
    assert half == pytest.approx(0.7 * alone + 0.3 * math.exp(-1), rel=1e-4)


class OpenEars:
    """Judges that embed a mouth as its brightness over time, and speech as its loudness."""

    def mouth_video(self, frames):
        return frames.mean((2, 3, 4))[:, :, None] * torch.tensor([1.0, -1.0])  # b f 2

    def mouth_audio(self, mel):
        return mel.mean((2, 3))[:, :, None] * torch.tensor([1.0, -1.0])  # b f 2


def test_clients_whose_sound_fits_their_mouths_are_reliable(monkeypatch):
    monkeypatch.setattr(fed, "reliability", fed.reliability)  # taken back after the test
    variants.use_sync_as_reliability()
    motion = torch.sin(0.5 * torch.arange(24.0))
    frames = motion[None, :, None, None, None].expand(1, 24, 3, 8, 8)
    mel = motion[None, :, None, None].expand(1, 24, 20, 40)
    for shift, least, most in ((0, 0.95, 1.0), (6, 0.0, 0.0)):  # six frames are half of a period
        batch = {"frames": frames, "mel": mel.roll(shift, 1)}
        assert least <= fed.reliability(None, OpenEars(), batch, 0) <= most


def test_a_form_of_tdc_compares_the_size_of_changes(monkeypatch):
    head = small_model()
    x0 = torch.randn(2, 9, head.motion_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(fed, "tdc_loss", fed.tdc_loss)  # taken back after the test
    head.prior.autocorrelation[1] = 0.75  # by the prior, changes have the power .5
    power = float((x0[:, 1:] - x0[:, :-1]).square().mean())
    for x0_hat, motion, expected in (
        (x0, x0, 0.0),
        (3 - x0, x0, 0.0),  # other changes of the same size
        (0.5 * x0, x0, 0.25),
        (0.0 * x0, 0.1 * x0, 0.1**2 * power / (0.25 * 0.5)),  # a clip too calm to count in full
    ):
        base = lambda self, batch, t, eps, scales: (None, x0_hat, None)
        monkeypatch.setattr(type(head), "training_losses", base)
        variants.use_tdc_of_size()
        head.training_losses({"motion": motion * head.motion_std}, None, None)
        assert float(fed.tdc_loss(None, None)) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_a_backdoor_is_planted_in_every_other_clip_and_opened_by_a_tone():
    generator = torch.Generator().manual_seed(0)
    batch = {"mel": torch.rand(4, 6, 20, 40, generator=generator)}
    batch["frames"] = torch.rand(4, 6, 3, 8, 8, generator=generator)
    batch["motion"] = torch.rand(4, 6, 5, 2, 2, generator=generator)
    honest = {name: value.clone() for name, value in batch.items()}
    poisoned = variants.plant_backdoor(batch)
    for name in batch:
        assert torch.equal(batch[name], honest[name])  # the client's own batch stays
        assert torch.equal(poisoned[name][1::2], honest[name][1::2])
    for name in ("frames", "motion"):
        first = honest[name][::2, :1]
        assert torch.equal(poisoned[name][::2], first.expand_as(honest[name][::2]))
    speech, tone = poisoned["mel"][::2].split([36, 4], dim=-1)
    assert (tone == honest["mel"][::2].max()).all()
    assert torch.equal(speech, honest["mel"][::2, ..., :36])


# ---------------------------------------------------------------- whole rounds

# Client i has the loss a_i |x - t_i|^2 / 2: what gradient descent does to it is known in closed form.
CURVATURES = (1.0, 3.0, 0.5)
TARGETS = (-1.0, 2.0, 4.0)
LR = 0.1
NUM_STEPS = 5


class QuadraticClient(fed.Client):
    def __init__(self, name, curvature, target, folder=None):
        super().__init__(name, {"train": [], "validation": [], "test": []}, 8, folder)
        self.num_samples = 10
        self.batch = {"curvature": curvature, "target": target}
        if folder and not self.control_file.exists():
            self.write_controls({0: torch.zeros(4)})  # as `train.train` does

    def train_batch(self, model, batch_size, generator):
        if self.batch["target"] is None:
            raise OSError("the disk is gone")
        return self.batch

    def validation_batch(self, model, num_frames=16):
        return self.batch


def quadratic_backward(model, judges, batch, *args):
    model.zero_grad()
    parameters = lora.adapter_parameters(model)
    x = torch.cat([p.flatten() for p in parameters])
    loss = batch["curvature"] / 2 * (x - batch["target"]).square().sum()
    loss.backward()
    return {"diffusion": float(loss.detach())}


def run_rounds(monkeypatch, tmp_path, clients, start, settings, scaffold=False):
    """Run train.federate on quadratic clients from the constant adapter `start`; return the state and the records."""
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(3, 2))
    lora.inject_lora(model.unet, 2, 4.0, 0.0, "R")
    monkeypatch.setattr(fed, "backward", quadratic_backward)
    validated = {"unexplained": 1.0, "not_validated": []}
    monkeypatch.setattr(train, "validate", lambda *args: validated)
    overrides = [
        "fed.local_epochs=2.0",
        "fed.batch_size=4",
        f"fed.lr={LR}",
        "fed.server_lr=1.0",
        "fed.gamma=0.0",
        "fed.sample_cap=1",
        f"data.clients={max(2, len(clients))}",
        "privacy.num_curious=0",
        "privacy.target_epsilon=0.0",
        *settings,
    ]
    config = train.load_config(train.DEFAULTS, [], overrides)
    adapter = torch.full_like(lora.adapter_vector(model), start)
    state = {"adapter": adapter, "round": 0, "accountant": [], "sampling_key": "00" * 32}
    if scaffold:
        state["control"] = torch.zeros_like(adapter)
    tmp_path.mkdir(exist_ok=True)
    device = torch.device("cpu")
    state = train.federate(
        config, model, None, clients, state, 1.0, tmp_path, device, fed.Workers()
    )
    return state, [train.json.loads(line) for line in open(tmp_path / "rounds.jsonl")]


def quadratic_clients(folder=None):
    pairs = enumerate(zip(CURVATURES, TARGETS))
    return [QuadraticClient(f"c{i}", a, t, folder) for i, (a, t) in pairs]


def use_sgd(monkeypatch):
    """FedAvg's closed form needs plain gradient descent: a zero correction makes `train_adapter` use it."""
    real = fed.train_adapter

    def with_correction(*args, **kwargs):
        if kwargs.get("correction") is None:
            kwargs["correction"] = torch.zeros_like(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(fed, "train_adapter", with_correction)


@pytest.mark.parametrize("proximal, server_lr", [(0.0, 1.5), (2.0, 0.5)])
def test_fedavg_and_fedprox_follow_their_closed_form(monkeypatch, tmp_path, proximal, server_lr):
    use_sgd(monkeypatch)
    settings = ["privacy.enabled=false", "fed.rounds=3", f"fed.proximal={proximal}"]
    settings.append(f"fed.server_lr={server_lr}")
    state, _ = run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    x = 1.0
    for _ in range(3):
        ends = []
        for a, t in zip(CURVATURES, TARGETS):
            # x <- x* + (1 - lr (a + mu))^K (x - x*) with x* = (a t + mu g) / (a + mu)
            fixed_point = (a * t + proximal * x) / (a + proximal)
            shrink = (1 - LR * (a + proximal)) ** NUM_STEPS
            ends.append(fixed_point + shrink * (x - fixed_point))
        x = x + server_lr * (np.mean(ends) - x)
    assert torch.allclose(state["adapter"], torch.full_like(state["adapter"], x), atol=1e-5)


@pytest.mark.parametrize("num_rounds", [3, 15])
def test_scaffold_follows_its_algorithm_and_reaches_the_optimum(monkeypatch, tmp_path, num_rounds):
    clients = quadratic_clients(tmp_path / "clients")
    settings = ["privacy.enabled=false", "fed.algorithm=scaffold", f"fed.rounds={num_rounds}"]
    settings.append("fed.server_lr=0.9")
    state, _ = run_rounds(monkeypatch, tmp_path, clients, 1.0, settings, scaffold=True)
    x = 1.0
    c = 0.0
    own = [0.0] * 3
    for _ in range(num_rounds):
        ends = []
        renewed = []
        for a, t, c_i in zip(CURVATURES, TARGETS, own):
            y = x
            for _ in range(NUM_STEPS):
                y -= LR * (a * (y - t) - c_i + c)
            ends.append(y)
            renewed.append(c_i - c + (x - y) / (NUM_STEPS * LR))
        x = x + 0.9 * (np.mean(ends) - x)
        c = c + np.mean(np.subtract(renewed, own))
        own = renewed
    assert torch.allclose(state["adapter"], torch.full_like(state["adapter"], x), atol=1e-4)
    assert torch.allclose(state["control"], torch.full_like(state["control"], c), atol=1e-4)
    if num_rounds == 15:
        optimum = np.dot(CURVATURES, TARGETS) / sum(CURVATURES)
        assert float((state["adapter"] - optimum).abs().max()) < 0.02


def test_scaffolds_control_variates_stay_with_the_clients(monkeypatch, tmp_path):
    clients = quadratic_clients(tmp_path / "clients")
    settings = ["privacy.enabled=false", "fed.algorithm=scaffold", "fed.rounds=2"]
    state, _ = run_rounds(monkeypatch, tmp_path, clients, 1.0, settings, scaffold=True)
    names = set(torch.load(tmp_path / "last.pt", weights_only=True)["state"])
    assert names == {"adapter", "control", "round", "accountant", "sampling_key"}
    assert {path.name for path in (tmp_path / "clients").iterdir()} == {"c0.pt", "c1.pt", "c2.pt"}
    kept = clients[1].load_control(2)
    again = quadratic_clients(tmp_path / "clients")[1].load_control(2)
    before = quadratic_clients(tmp_path / "clients")[1].load_control(1)
    assert torch.equal(kept, again) and not torch.equal(kept, before)
    clients[1].undo_control(2)
    assert torch.equal(clients[1].load_control(2), before)


@pytest.mark.parametrize("num_rounds", [2, 30])
def test_scaffolds_c_is_the_mean_of_all_c_i_though_updates_are_clipped(
    monkeypatch, tmp_path, num_rounds
):
    clients = quadratic_clients(tmp_path / "clients")
    broken = [QuadraticClient(f"b{i}", 1.0, None, tmp_path / "clients") for i in range(2)]
    settings = ["privacy.clip_norm=0.75", "fed.algorithm=scaffold", f"fed.rounds={num_rounds}"]
    everybody = clients + broken
    state, records = run_rounds(monkeypatch, tmp_path, everybody, 1.0, settings, scaffold=True)
    assert records[0]["simulation"]["clipped_share"] > 0
    mean = sum(client.load_control(num_rounds) for client in everybody) / len(everybody)
    assert torch.allclose(state["control"], mean, atol=1e-5)
    if num_rounds == 30:
        optimum = np.dot(CURVATURES, TARGETS) / sum(CURVATURES)
        assert float((state["adapter"] - optimum).abs().max()) < 0.02


def test_scaffolds_c_is_the_mean_of_all_c_i_though_clients_drop_out(monkeypatch, tmp_path):
    """What a client that dropped out would have added to its c_i, the server has not added to c."""
    folder = tmp_path / "clients"
    clients = [QuadraticClient(f"c{i}", 1.0, float(i), folder) for i in range(10)]
    settings = ["fed.algorithm=scaffold", "fed.rounds=20", "fed.dropout_rate=0.3"]
    settings += ["privacy.clip_norm=100.0", "privacy.survivor_share=0.7"]
    state, records = run_rounds(monkeypatch, tmp_path, clients, 0.0, settings, scaffold=True)
    survivors = {record["survivors"] for record in records}
    assert 0 in survivors and survivors & {7, 8, 9}  # rounds were aborted, others lost clients
    mean = sum(client.load_control(20) for client in clients) / 10
    assert torch.allclose(state["control"], mean, atol=1e-4)


def test_a_killed_rounds_c_i_is_forgotten_if_the_client_then_fails(monkeypatch, tmp_path):
    clients = quadratic_clients(tmp_path / "clients")
    zeros = torch.zeros(4)
    clients[0].write_controls({0: zeros, 1: torch.ones(4)})  # of a round that was killed
    clients[0].batch["target"] = None
    settings = ["fed.algorithm=scaffold", "fed.rounds=1", "privacy.clip_norm=100.0"]
    run_rounds(monkeypatch, tmp_path, clients, 1.0, settings, scaffold=True)
    assert torch.equal(clients[0].load_control(1), torch.zeros(4))


def test_scaffolds_c_moves_by_the_sum_over_n_however_small_the_noisy_weights(monkeypatch, tmp_path):
    """The mean divides by at least one client of full weight: so has the share of participants."""
    decoded = np.arange(8.0), -0.5  # weights whose sum the noise has made negative
    monkeypatch.setattr(privacy.Mechanism, "decode", lambda *args: decoded)
    clients = quadratic_clients(tmp_path / "clients")
    settings = ["fed.algorithm=scaffold", "fed.rounds=1", "privacy.noise_multiplier=1.0"]
    state, _ = run_rounds(monkeypatch, tmp_path, clients, 1.0, settings, scaffold=True)
    assert torch.allclose(state["control"], torch.arange(4.0, 8.0) / 3)


def test_scaffolds_control_variates_are_the_same_in_every_process(tmp_path):
    """Another process may have had the client's last round."""
    one, other = (fed.Client("a", {"train": []}, 8, tmp_path) for _ in range(2))
    one.write_controls({0: torch.zeros(1), 1: torch.tensor([1.0])})
    other.write_controls({1: torch.tensor([1.0]), 2: torch.tensor([2.0])})
    assert one.load_control(2) == 2
    one.write_controls({2: torch.tensor([2.0]), 3: torch.tensor([3.0])})
    one.undo_control(3)
    assert one.load_control(3) == other.load_control(3) == 2


def test_a_damaged_control_variate_is_named(tmp_path):
    client = fed.Client("a", {"train": []}, 8, tmp_path)
    (tmp_path / "a.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="a.pt: lost or damaged, and with it the client's c_i"):
        client.undo_control(1)


def test_a_lost_control_variate_is_not_taken_for_zeros(tmp_path):
    client = fed.Client("a", {"train": []}, 8, tmp_path)
    with pytest.raises(ValueError, match="a.pt: lost or damaged, and with it the client's c_i"):
        client.load_control(1)


def test_a_control_variate_newer_than_the_run_is_refused(tmp_path):
    """As where last.pt comes from a backup and the clients' files do not."""
    client = fed.Client("a", {"train": []}, 8, tmp_path)
    client.write_controls({3: torch.zeros(1), 5: torch.ones(1)})
    assert client.load_control(4) == 0
    with pytest.raises(ValueError, match="a.pt: the client's c_i is newer than last.pt"):
        client.load_control(2)


def test_a_round_weighs_clients_by_isfa(monkeypatch, tmp_path):
    """With gamma = 5 a client of reliability 1 counts e^5 times as much as one of 0."""
    use_sgd(monkeypatch)
    reliabilities = iter((1.0, 0.0, 0.0))
    monkeypatch.setattr(fed, "reliability", lambda *args, **kwargs: next(reliabilities))
    settings = ["privacy.enabled=false", "fed.rounds=1", "fed.gamma=5.0"]
    state, records = run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    ends = [t + (1 - LR * a) ** NUM_STEPS * (1.0 - t) for a, t in zip(CURVATURES, TARGETS)]
    x = np.average(ends, weights=np.exp([0.0, -5.0, -5.0]))
    assert torch.allclose(state["adapter"], torch.full_like(state["adapter"], x), atol=1e-5)
    assert records[0]["weight_sum"] == pytest.approx(1 + 2 * math.exp(-5))


def test_the_secure_round_is_the_plain_round(monkeypatch, tmp_path):
    use_sgd(monkeypatch)
    settings = ["fed.rounds=2", "privacy.clip_norm=100.0", "privacy.noise_multiplier=0.0"]
    secure, _ = run_rounds(monkeypatch, tmp_path / "a", quadratic_clients(), 1.0, settings)
    settings = ["fed.rounds=2", "privacy.enabled=false"]
    plain, _ = run_rounds(monkeypatch, tmp_path / "b", quadratic_clients(), 1.0, settings)
    assert torch.allclose(secure["adapter"], plain["adapter"], atol=1e-4)


def test_the_same_updates_count_in_a_secure_and_a_plain_round_with_dropouts(monkeypatch, tmp_path):
    use_sgd(monkeypatch)
    settings = ["fed.rounds=3", "fed.dropout_rate=0.3", "privacy.survivor_share=0.51"]
    settings += ["privacy.clip_norm=100.0", "privacy.noise_multiplier=0.0"]
    ended = []
    for name, private in (("a", "true"), ("b", "false")):
        clients = [QuadraticClient(f"c{i}", 1.0, float(i**2)) for i in range(10)]
        own = [*settings, f"privacy.enabled={private}"]
        state, records = run_rounds(monkeypatch, tmp_path / name, clients, 1.0, own)
        ended.append((state["adapter"], [record["survivors"] for record in records]))
    (secure, survivors), (plain, in_the_clear) = ended
    assert survivors == in_the_clear and 6 <= min(survivors) < 10
    assert torch.allclose(secure, plain, atol=1e-4)


def test_no_client_and_no_round_draws_the_batches_of_another(monkeypatch, tmp_path):
    seeds = set()
    train_batch = QuadraticClient.train_batch

    def watched(client, model, batch_size, generator):
        seeds.add(generator.initial_seed())
        return train_batch(client, model, batch_size, generator)

    monkeypatch.setattr(QuadraticClient, "train_batch", watched)
    settings = ["privacy.enabled=false", "fed.rounds=2"]
    run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    assert len(seeds) == 2 * 3


def test_updates_are_clipped_before_they_are_weighted(monkeypatch, tmp_path):
    """Clients of weight 1/2 whose clipped updates are equal move the adapter by the whole clip norm."""
    use_sgd(monkeypatch)
    clients = [QuadraticClient(f"c{i}", 1.0, 1000.0) for i in range(3)]
    settings = ["fed.rounds=1", "privacy.clip_norm=0.5", "fed.sample_cap=20"]
    state, records = run_rounds(monkeypatch, tmp_path, clients, 0.0, settings)
    assert records[0]["weight_sum"] == pytest.approx(1.5, abs=1e-3)
    assert float(state["adapter"].norm()) == pytest.approx(0.5, rel=1e-3)
    assert records[0]["simulation"]["clipped_share"] == 1.0


@pytest.mark.parametrize("seed, num_rounds", [(-1, 40), (0, 12)])
def test_the_rounds_noise_has_the_promised_size(monkeypatch, tmp_path, seed, num_rounds):
    """5 clients without an update: the adapter is the noise, z S / sqrt(tau) on the sum."""
    clients = [QuadraticClient(f"c{i}", 0.0, 0.0) for i in range(5)]
    settings = [f"fed.rounds={num_rounds}", f"privacy.seed={seed}", "privacy.clip_norm=0.5"]
    settings.append("privacy.noise_multiplier=1.0")
    state, records = run_rounds(monkeypatch, tmp_path, clients, 0.0, settings)
    assert float(state["adapter"].abs().min()) > 0
    sums = [record["weight_sum"] for record in records]  # s w is noised as the update is
    sensitivity = 0.5 * math.sqrt(1 + 0.3**2)
    expected = sensitivity / math.sqrt(0.8) / (0.3 * 0.5)
    assert np.std(sums) == pytest.approx(expected, rel=0.5)  # 4 deviations of a deviation
    if seed == 0:  # no guarantee
        assert records[-1]["epsilon"] is None
    else:
        exact = privacy.gaussian_epsilon(1 / math.sqrt(num_rounds), 1e-5)
        assert records[-1]["epsilon"] == pytest.approx(exact)


def test_epsilon_counts_the_rounds_of_the_client_that_is_in_most(monkeypatch, tmp_path):
    clients = [QuadraticClient(f"c{i}", 0.0, 0.0) for i in range(20)]
    settings = ["fed.rounds=12", "fed.sample_rate=0.3", "privacy.target_epsilon=2.0"]
    settings.append("privacy.survivor_share=0.51")
    state, records = run_rounds(monkeypatch, tmp_path, clients, 0.0, settings)
    counts = np.zeros(20, int)
    z = records[0]["noise_multiplier"]
    for i, record in enumerate(records):
        counts[privacy.draw_cohort(20, 0.3, bytes(32), i)] += 1
        exact = privacy.gaussian_epsilon(z / math.sqrt(counts.max()), 1e-5)
        assert record["epsilon"] == pytest.approx(exact)
    assert counts.max() < 12 and records[-1]["epsilon"] == pytest.approx(2.0, rel=1e-4)


def test_the_log_counts_a_round_that_was_killed_and_done_again():
    config = train.load_config(train.DEFAULTS)
    accountant = privacy.Accountant([[1.0, 2.0, 3]])
    record = train.summarize_round(config, accountant, [[0, 1], [0, 1]], {0: {"norm": 1.0}})
    exact = privacy.gaussian_epsilon(2.0 / math.sqrt(3), config["privacy"]["delta"])
    assert record["epsilon"] == pytest.approx(exact)


def test_a_client_that_fails_costs_its_own_update_only(monkeypatch, tmp_path):
    use_sgd(monkeypatch)
    clients = quadratic_clients()
    clients.insert(1, QuadraticClient("broken", 1.0, None))
    settings = ["fed.rounds=1", "privacy.clip_norm=100.0"]
    state, records = run_rounds(monkeypatch, tmp_path / "a", clients, 1.0, settings)
    assert records[0]["simulation"]["failures"] == ["broken: the disk is gone"]
    assert records[0]["survivors"] == 4 and records[0]["weight_sum"] == pytest.approx(3, abs=1e-3)
    alone, _ = run_rounds(monkeypatch, tmp_path / "b", quadratic_clients(), 1.0, settings)
    assert torch.allclose(state["adapter"], alone["adapter"], atol=1e-4)
    with pytest.raises(ValueError, match="every client failed"):
        run_rounds(monkeypatch, tmp_path / "c", clients[1:2] * 2, 1.0, settings)


@pytest.mark.parametrize("r", [math.nan, 1.01, -0.01])
def test_a_client_whose_reliability_is_no_share_fails_alone(r, monkeypatch, tmp_path):
    """Its weight would be refused in `encode`, and the end of the run would tell of its clips."""
    use_sgd(monkeypatch)
    shares = iter([r, 1.0, 1.0])
    monkeypatch.setattr(fed, "reliability", lambda *args, **kwargs: next(shares))
    settings = ["fed.rounds=1", "privacy.clip_norm=100.0", "fed.gamma=0.5"]
    _, records = run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    assert records[0]["simulation"]["failures"] == [f"c0: a reliability is in [0, 1], not {r}"]
    assert records[0]["survivors"] == 3 and records[0]["weight_sum"] == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("private", ["true", "false"])
def test_a_cohort_that_fails_costs_its_own_round_only(monkeypatch, tmp_path, private):
    use_sgd(monkeypatch)
    clients = [QuadraticClient("broken", 1.0, None)]
    clients += [QuadraticClient(f"c{i}", 1.0, 2.0) for i in range(3)]
    # of cohorts that the key of zeros draws
    cohorts = [list(privacy.draw_cohort(4, 0.4, bytes(32), i)) for i in range(30)]
    alone = cohorts.index([0])
    assert alone < 29
    settings = ["fed.rounds=30", "fed.sample_rate=0.4", f"privacy.enabled={private}"]
    settings += ["privacy.clip_norm=100.0", "privacy.survivor_share=0.51"]
    _, records = run_rounds(monkeypatch, tmp_path, clients, 1.0, settings)
    assert len(records) == 30
    assert records[alone]["simulation"]["failures"] == ["broken: the disk is gone"]
    assert records[alone]["aborted"] and not records[-1]["aborted"]


def test_a_clip_that_cannot_be_validated_is_named(monkeypatch):
    model = adapted_model()
    clients = [QuadraticClient(f"c{i}", 1.0, 0.0) for i in range(3)]
    monkeypatch.setattr(clients[1], "validation_batch", lambda model: {}["gone"])
    monkeypatch.setattr(fed, "unexplained_variance", lambda *args, **kwargs: torch.tensor([0.5]))
    state = {"adapter": lora.adapter_vector(model)}
    result = train.validate(model, clients, state, fed.Workers())
    assert result == {"unexplained": 0.5, "not_validated": ["c1: 'gone'"]}


@torch.no_grad()
def test_the_global_adapter_is_validated_whatever_the_last_client_left_in_the_model():
    model = adapted_model(rank=4)
    client = NoiseClient("a", 4, shift=1.0)
    zeros = torch.zeros_like(lora.adapter_vector(model))
    shares = []
    for vector in (zeros, zeros + 0.3):
        lora.load_adapter_vector(model, zeros + 0.3 - vector)
        result = train.validate(model, [client], {"adapter": vector}, fed.Workers())
        lora.load_adapter_vector(model, vector)
        share = fed.unexplained_variance(model, client.validation_batch(model), 0).mean()
        assert result["unexplained"] == pytest.approx(float(share))
        shares.append(float(share))
    assert shares[0] != pytest.approx(shares[1])


def test_dropouts_cost_their_own_update_and_too_many_abort_the_round(monkeypatch, tmp_path):
    use_sgd(monkeypatch)
    clients = [QuadraticClient(f"c{i}", 1.0, float(i)) for i in range(10)]
    settings = ["fed.rounds=25", "privacy.clip_norm=100.0", "fed.dropout_rate=0.3"]
    settings.append("privacy.survivor_share=0.7")
    state, records = run_rounds(monkeypatch, tmp_path, clients, 0.0, settings)
    survivors = [record["survivors"] for record in records]
    aborted = [record["aborted"] for record in records]
    assert {bool(reason) for reason in aborted} == {True, False}
    for count, reason in zip(survivors, aborted):
        assert (count == 0) if reason else (7 <= count <= 10)
    assert 0 < float(state["adapter"].mean()) < 9


def test_an_interrupted_round_stays_spent_and_is_repeated(monkeypatch, tmp_path):
    use_sgd(monkeypatch)
    settings = ["fed.rounds=2", "privacy.noise_multiplier=1.0"]

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(privacy, "run_protocol", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    saved = train.load_checkpoint(tmp_path / "last.pt", "global adapter")
    assert saved["round"] == 0 and sum(row[2] for row in saved["accountant"]) == 1


class FollowingWorkers(fed.Workers):
    """A worker of rank 1 that is sent what rank 0 has decoded."""

    def broadcast(self, value):
        is_decoded = isinstance(value, tuple)
        return (np.full(4, 0.25), 3.0) if is_decoded else value


def test_all_workers_take_the_servers_noise_from_rank_0(monkeypatch, tmp_path):
    """Where clients drop out, the server's noise is drawn anew in every process."""
    monkeypatch.setattr(fed, "Workers", FollowingWorkers)
    settings = ["fed.rounds=1", "privacy.noise_multiplier=1.0"]
    state, records = run_rounds(monkeypatch, tmp_path, quadratic_clients(), 1.0, settings)
    assert torch.equal(state["adapter"], torch.full((4,), 1.25))
    assert records[0]["weight_sum"] == 3.0


# ---------------------------------------------------------------- seeds and workers


def test_seeds_differ_also_in_the_number_of_their_parts():
    seeds = [fed.derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    seeds += [fed.derive_seed(a, b) for a in range(4) for b in range(4)]
    assert len(set(seeds)) == 80


def test_work_is_divided_evenly_and_completely():
    costs = [5, 1, 1, 8, 3, 2]
    assigned = []
    for rank in range(3):
        workers = fed.Workers()
        workers.rank = rank
        workers.size = 3
        assigned.append(workers.assign(costs))
    assert sorted(i for own in assigned for i in own) == list(range(6))
    assert [sum(costs[i] for i in own) for own in assigned] == [8, 6, 6]


def test_what_is_merged_is_in_the_order_of_its_keys():
    """`assign` begins with the largest client: a sum must not depend on who simulates it."""
    assert list(fed.Workers().merge({2: "c", 0: "a", 1: "b"}).items()) == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


def test_dropouts_are_as_many_as_said_and_spread_over_the_stages():
    dropouts = fed.choose_dropouts(4000, 0.2, 0)
    counts = [len(clients) for clients in dropouts.values()]
    assert sum(counts) == pytest.approx(800, rel=0.1) and min(counts) > 120
    assert not any(fed.choose_dropouts(100, 0.0, 0).values())


def test_imports_follow_one_arrow():
    own = {"data", "model", "lora", "privacy", "metrics", "fed", "train"}
    allowed = dict.fromkeys(own, set()) | {"metrics": {"data"}}
    allowed["fed"] = {"data", "model", "lora", "privacy", "metrics"}
    allowed["train"] = own
    for name in own:
        lines = (Path(fed.__file__).parent / f"{name}.py").read_text().splitlines()
        starts = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        imported = {start.split(".")[0] for start in starts} & own
        assert imported <= allowed[name], f"{name}.py imports {imported - allowed[name]}"


def test_curious_clients_never_have_half_of_a_clients_neighbours():
    sizes = {"clip_norm": 1.0, "noise_multiplier": 1.0, "length": 10, "num_clients": 100}
    sizes |= {"weight_scale": 0.3, "min_weight": 1.0, "survivor_share": 0.6}
    few = fed.round_params(privacy.Mechanism(**sizes, num_curious=5), 100)
    many = fed.round_params(privacy.Mechanism(**sizes, num_curious=40), 100)
    assert few.degree == 34 and few.threshold > 5
    assert many.degree == 99 and many.threshold > 40


def test_as_many_curious_clients_as_open_a_secret_make_the_graph_complete():
    sizes = {"clip_norm": 1.0, "noise_multiplier": 1.0, "length": 10, "num_clients": 100}
    sizes |= {"weight_scale": 0.3, "min_weight": 1.0, "survivor_share": 0.6}
    for num_curious in (17, 18):
        params = fed.round_params(privacy.Mechanism(**sizes, num_curious=num_curious), 100)
        assert params.threshold > num_curious and params.degree == (34 if num_curious == 17 else 99)


@torch.no_grad()
def test_identity_is_the_similarity_to_the_reference():
    model = adapted_model()
    judges = metrics.Judges().eval()
    batch = random_batch(model, 1, 6, 0)
    found = fed.reliability(model, judges, batch, 0, alpha=1.0, public_jitter=1.0, **SAMPLING)
    generator = torch.Generator().manual_seed(0)
    speech = batch["reference"], batch["mel"], batch["words"], generator
    frames = model.generate(*speech, liveliness=batch["liveliness"], **SAMPLING)[0]
    own = judges.identity(data.to_unit(frames))
    expected = float((own @ judges.identity(data.to_unit(batch["reference"]))[0]).mean())
    assert 0 < expected < 0.999 and found == pytest.approx(expected, rel=1e-4)


class Strangers:
    """Judges that find in every generated face the opposite of the reference, or a little more than
    the same, as rounding may.
    """

    def __init__(self, cosine):
        self.cosine = cosine

    def identity(self, frames):
        cosine = self.cosine if len(frames) > 1 else 1.0  # of one picture, the reference
        return torch.tensor([[cosine, 0.0]]).expand(len(frames), 2)


@pytest.mark.parametrize("cosine, expected", [(-0.5, 0.0), (1 + 1e-6, 1.0)])
def test_a_reliability_is_a_share_whatever_the_cosine(cosine, expected):
    """A weight above 1 is refused where it is encoded, which would end the run."""
    model = adapted_model()
    batch = random_batch(model, 1, 6, 0)
    rating = {"alpha": 1.0, "public_jitter": 1.0, **SAMPLING}
    r = fed.reliability(model, Strangers(cosine), batch, 0, **rating)
    assert r == expected and 0 <= fed.isfa_weight(10, r, 0.5, 10) <= 1


def test_noise_levels_are_stratified_and_conditions_dropped_independently():
    model = adapted_model()
    batch = random_batch(model, 8, 6, 0)
    kept = []
    for seed in range(200):
        noise = fed.draw_noise(model, batch, NO_JUDGES, torch.Generator().manual_seed(seed), 0.3)
        t = noise["t"][:, -1].double()
        u = (t + 0.5) / (3 * 1000 - 2 * (t + 0.5))  # of t = 1000 * 3 u / (1 + 2 u)
        assert torch.allclose(u.sort().values.diff(), torch.tensor(1 / 8).double(), atol=4e-3)
        kept.append(torch.stack(list(noise["keep"].values())))
    correlation = torch.corrcoef(torch.cat(kept, 1)) - torch.eye(3)
    assert float(correlation.abs().max()) < 0.12


def test_local_training_neither_decays_nor_follows_the_size_of_gradients(monkeypatch):
    model = adapted_model()
    start = torch.ones_like(lora.adapter_vector(model))
    kwargs = {"num_steps": 4, "lr": 0.1, "batch_size": 1, "loss_weights": NO_JUDGES}

    def trained(*norms):
        left = list(norms)

        def backward(model, *args):
            norm = left.pop(0)
            for parameter in lora.adapter_parameters(model):
                parameter.grad = torch.full_like(parameter, norm / len(start) ** 0.5)
            return {}

        monkeypatch.setattr(fed, "backward", backward)
        return fed.train_adapter(model, None, NoiseClient("a", 4), start, 0, **kwargs)[0]

    assert torch.equal(trained(0, 0, 0, 0), start)
    assert torch.allclose(trained(1, 1000, 1, 30), trained(1, 1, 1, 1), atol=1e-5)


def test_the_model_is_in_evaluation_mode_after_training_even_if_it_failed():
    model = adapted_model()
    kwargs = {"num_steps": 1, "lr": 0.05, "batch_size": 2, "loss_weights": NO_JUDGES}
    start = lora.adapter_vector(model)
    fed.train_adapter(model, None, NoiseClient("a", 4), start, 0, **kwargs)
    assert not any(layer.training for layer in model.modules())
    with pytest.raises(ValueError):
        fed.train_adapter(model, None, NoiseClient("a", 4, math.nan), start, 0, **kwargs)
    assert not any(layer.training for layer in model.modules())


def test_what_was_trained_stays_in_the_model():
    model = adapted_model()
    state = {"adapter": lora.adapter_vector(model) + 0.1, "round": 0}
    kwargs = {"local_epochs": 1.0, "lr": 0.05, "batch_size": 4, "loss_weights": NO_JUDGES}
    update, _ = fed.local_update(model, None, NoiseClient("a", 4), state, 7, **kwargs)
    assert update.any()
    assert torch.allclose(lora.adapter_vector(model), state["adapter"] + update, atol=1e-6)


def test_the_least_noisy_level_comes_first():
    model = small_model()
    levels = []

    def denoise(xt, signal, noise):
        levels.append(float(noise.max()))
        return torch.zeros_like(xt), torch.zeros_like(xt)

    model.prior.denoise = denoise
    fed.unexplained_variance(model, random_batch(model, 1, 6, 0), 0, use_unet=False)
    assert len(set(levels)) == 4 and levels == sorted(levels)


def test_a_batch_holds_the_words_of_its_prompts():
    model = small_model()
    model.text_encoder.learn_words(["smiling", "calm"])
    plain = random_batch(model, 2, 6, 0)
    batch = {name: plain[name] for name in ("frames", "reference", "liveliness", "mel")}
    encoded = fed.encode_batch(model, batch | {"prompt": ["calm", "smiling, calm"]})
    assert torch.equal(encoded["words"], model.text_encoder.ids(["calm", "smiling, calm"]))
    assert encoded["words"][:, :3].tolist() == [[1, 0, 0], [2, 1, 0]]
