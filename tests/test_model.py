"""The generator against closed forms, oracles and independent formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import metrics
import model as talking

SMALL_AE = dict(latent_channels=4, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
                scaling_factor=1.0, patch=4, mid_attention=False, linear_path=True)
SD_AE = dict(latent_channels=4, block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32,
             scaling_factor=0.18215, patch=1, mid_attention=True, linear_path=False)


def small_model(prediction="v"):
    torch.manual_seed(0)
    model = talking.TalkingHead(SMALL_AE, dict(channels=[16, 32], heads=2, reach=3), dict(num_mels=40, window=5, dim=16),
                                dict(num_steps=100, schedule="cosine", prediction=prediction,
                                     zero_terminal_snr=prediction != "eps"), size=32, prior_modes=8)
    for parameter in model.parameters():  # wake up the layers that start at zero
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return model.eval()


def diffusion(prediction="v", zero=True, schedule="cosine"):
    return talking.Diffusion(1000, schedule, prediction, zero)


# ------------------------------------------------------------------------------------------------ diffusion


def test_forward_process_has_the_moments_of_eq_4():
    d, generator = diffusion(), torch.Generator().manual_seed(0)
    x0 = torch.full((200_000, 1), 0.7)
    for step in (0, 300, 700, 999):
        t = torch.full((len(x0),), step)
        xt = d.add_noise(x0, t, torch.randn(x0.shape, generator=generator))
        alpha_bar = float(d.alpha_bar[step])
        assert abs(float(xt.mean()) - math.sqrt(alpha_bar) * 0.7) < 0.01
        assert abs(float(xt.var()) - (1 - alpha_bar)) < 0.01


def test_schedules_are_the_published_ones():
    betas = np.linspace(1e-4, 0.02, 1000)
    assert np.allclose(talking.noise_schedule(1000, "linear", False), np.cumprod(1 - betas), atol=1e-12)
    zero = talking.noise_schedule(1000, "linear", True)
    assert float(zero[-1]) == 0.0 and abs(float(zero[0]) - (1 - 1e-4)) < 1e-12
    assert (np.diff(zero.numpy()) < 0).all()
    with pytest.raises(ValueError, match="zero SNR"):
        diffusion("eps", True)


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_split_inverts_target(prediction):
    d = diffusion(prediction, prediction != "eps")
    x0, eps, t = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([0, 200, 600, 900])
    x0_hat, eps_hat = d.split(d.target(x0, t, eps), d.add_noise(x0, t, eps), t)
    assert torch.allclose(x0_hat, x0, atol=1e-4) and torch.allclose(eps_hat, eps, atol=1e-4)


def oracle(d, denoise):
    """A network that states E[x0 | xt] = denoise(xt, signal, noise) in the parametrisation of `d`."""

    def network(xt, t):
        signal, noise = d.coefficients(t, xt)
        x0 = denoise(xt, signal, noise)
        eps = (xt - signal * x0) / noise
        return d.target(x0, t, eps)

    return network


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 50])
def test_samplers_recover_x0_from_an_oracle(prediction, solver, num_steps):
    d, x0 = diffusion(prediction, prediction != "eps"), torch.randn(2, 5, 3)
    out = d.sample(oracle(d, lambda xt, a, s: x0.expand_as(xt)), torch.randn(2, 5, 3), num_steps, solver)
    assert torch.allclose(out, x0, atol=1e-6 / float(d.alpha_bar[-1].sqrt()) + 1e-4 if prediction == "eps" else 1e-4)


def test_samplers_reach_a_known_gaussian_and_dpm_is_of_higher_order():
    d, mean, std = diffusion(), 1.5, 0.6
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    # x0 ~ N(mean, std^2): E[x0 | xt] is linear, and the ODE carries N(0, 1) to it by the affine map noise -> mean + std noise.
    network = oracle(d, lambda xt, a, s: (mean * s**2 + a * std**2 * xt) / (a**2 * std**2 + s**2))
    exact = mean + std * noise
    error = {(solver, n): float((d.sample(network, noise, n, solver) - exact).abs().mean())
             for solver in ("ddim", "dpm") for n in (10, 40)}
    assert error["dpm", 40] < error["ddim", 40] / 2 and error["dpm", 10] < error["ddim", 10]
    assert error["dpm", 40] < 0.02


@pytest.mark.parametrize("levels", [(0.6, 0.6, 0.6, 0.6), (1.0, 1.0, 0.6, 0.0), (1.0, 0.0, 0.0, 0.0)])
def test_prior_is_the_conditional_mean_of_a_gaussian(levels):
    torch.manual_seed(0)
    prior = talking.GaussianPrior(num_values=6, num_modes=3, num_words=2, num_sounds=2, num_lags=4)
    modes, _ = torch.linalg.qr(torch.randn(6, 3))
    prior.modes.copy_(modes), prior.variance.copy_(torch.tensor([3.0, 1.0, 0.5])), prior.rest.fill_(0.1)
    prior.correlation.copy_(torch.tensor([1.0, 0.8, 0.5, 0.3]))
    places = modes @ torch.diag(prior.variance) @ modes.T + 0.1 * (torch.eye(6) - modes @ modes.T)
    times = prior.correlation[(torch.arange(4)[None] - torch.arange(4)[:, None]).abs()]
    covariance = torch.kron(times, places)  # of x0 flattened as (f, values)
    xt, signal = torch.randn(1, 4, 6, 1, 1), torch.tensor(levels)
    noise = (1 - signal**2).sqrt()
    S, N = (torch.diag(c.repeat_interleave(6)) for c in (signal, noise))
    gain = covariance @ S @ torch.linalg.inv(S @ covariance @ S + N**2)
    mean = torch.randn(1, 4, 6)
    guess, deviation = prior.denoise(xt, signal.view(1, 4, 1, 1, 1), noise.view(1, 4, 1, 1, 1), mean)
    expected = mean.flatten()
    assert torch.allclose(guess.flatten(), expected + gain @ (xt.flatten() - S @ expected), atol=1e-4)
    left = covariance - gain @ S @ covariance
    assert torch.allclose(deviation.flatten() ** 2, left.diagonal(), atol=1e-5)


def test_prior_finds_the_covariance_that_made_the_data():
    torch.manual_seed(0)
    modes, _ = torch.linalg.qr(torch.randn(8, 2))
    walk = torch.randn(4000, 2, 2).cumsum(1) / torch.tensor([1.0, 2.0**0.5])[:, None]  # two frames, correlation 1 / sqrt 2
    x0 = (walk * torch.tensor([2.0, 1.0])) @ modes.T + 0.1 * torch.randn(4000, 2, 8)
    prior = talking.GaussianPrior(8, 2, 2, 2, num_lags=2)
    prior.fit(x0.view(4000, 2, 8, 1, 1))
    assert torch.allclose(prior.variance, torch.tensor([4.01, 1.01]), rtol=0.06)
    assert float(prior.rest) == pytest.approx(0.01, rel=0.06) and float(prior.correlation[1]) == pytest.approx(0.70, abs=0.03)
    assert float(prior.mean_variance()) == pytest.approx(float(x0.square().mean()), rel=1e-3)
    assert float((prior.modes.T @ modes).square().sum()) == pytest.approx(2, rel=1e-3)


def test_words_are_found_where_they_act_and_nowhere_else():
    torch.manual_seed(0)
    prior, effects = talking.GaussianPrior(4, 3, 5, 2), torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0]])
    words, shown = torch.randint(0, 4, (400, 2)), torch.randint(0, 4, (400, 1))  # word 4 is never said
    means = effects[words].sum(1) - effects[shown].sum(1) + 0.5 * torch.randn(400, 3)
    prior.fit_words(F.pad(means, (0, 1))[:, :, None, None], words, shown, metrics.shrunk_ridge)
    assert torch.allclose(prior.said[1:4, :2], effects[1:4, :2], atol=0.12) and not prior.said[[0, 4]].any()
    assert prior.said[:, 2].abs().max() < 0.03  # where words do nothing, chance is not taken for an effect
    _, expected = prior.means(torch.zeros(2, 1, 2, 8), torch.tensor([[1, 2], [0, 0]]))
    assert torch.equal(expected[:, 0], torch.stack([prior.said[1] + prior.said[2], torch.zeros(3)]) @ prior.modes.T)
    nothing = torch.zeros(100, 1, dtype=torch.long)
    prior.fit_words(torch.randn(100, 4, 1, 1), words[:100], nothing, metrics.shrunk_ridge)  # says nothing of words
    assert prior.said.abs().max() < 0.25


def test_what_speech_moves_is_found_in_its_modes_and_no_longer_left_to_chance():
    torch.manual_seed(0)
    prior, effect = talking.GaussianPrior(4, 3, 1, 10), torch.zeros(10, 3)
    effect[4, 0], effect[7, 1] = 0.8, -0.6
    mel = torch.randn(200, 12, 4, 20) + torch.randn(200, 1, 1, 1)  # windows of clips that differ in level
    sounds = talking.sounds_of(mel)
    x0 = sounds @ (effect / sounds.std()) + 3 * torch.randn(200, 1, 3) + 0.5 * torch.randn(200, 12, 3)
    prior.modes.copy_(torch.eye(4, 3))
    prior.variance.copy_(x0.square().mean((0, 1)))
    before = prior.variance.clone()
    prior.fit_speech(F.pad(x0, (0, 1))[..., None, None], mel, metrics.swift, metrics.shrunk_ridge)
    spoken = prior.means(mel, torch.zeros(200, 1, dtype=torch.long))[0][..., :3]
    true = sounds @ (effect / sounds.std())
    assert torch.allclose(spoken, true - true.mean((0, 1)), atol=0.35) and spoken[..., 2].abs().max() < 0.05
    explained = torch.stack([metrics.swift(clip) for clip in true]).square().mean((0, 1))
    assert torch.allclose(before - prior.variance, explained, rtol=0.1, atol=0.01)


def test_sampling_starts_at_the_noisiest_step():
    d = diffusion()
    assert d.timesteps(4).tolist() == [999, 749, 499, 249]


# ------------------------------------------------------------------------------------------------ autoencoder


def conv_by_hand(x, weight, bias, pad):
    patches = F.unfold(F.pad(x, (pad,) * 4), weight.shape[-1])
    return (weight.flatten(1) @ patches).view(len(x), -1, *x.shape[2:]) + bias[:, None, None]


def norm_by_hand(x, groups, weight, bias):
    g = x.reshape(len(x), groups, -1)
    g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return g.view_as(x) * weight[:, None, None] + bias[:, None, None]


def test_resnet_block_is_its_formula():
    torch.manual_seed(0)
    block, x = talking.ResnetBlock(32, 64, 32), torch.randn(2, 32, 6, 6)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    h = norm_by_hand(x, 32, block.norm1.weight, block.norm1.bias)
    h = conv_by_hand(h * torch.sigmoid(h), block.conv1.weight, block.conv1.bias, 1)
    h = norm_by_hand(h, 32, block.norm2.weight, block.norm2.bias)
    h = conv_by_hand(h * torch.sigmoid(h), block.conv2.weight, block.conv2.bias, 1)
    expected = h + conv_by_hand(x, block.conv_shortcut.weight, block.conv_shortcut.bias, 0)
    assert torch.allclose(block(x), expected, atol=1e-4)


def test_stable_diffusion_architecture_by_config():
    with torch.device("meta"):
        sd = talking.AutoencoderKL(**SD_AE)
    assert sum(p.numel() for p in sd.parameters()) == 83_653_863  # the published autoencoder's
    names = set(sd.state_dict())
    assert {"encoder.down_blocks.0.resnets.1.conv2.weight", "encoder.down_blocks.2.downsamplers.0.conv.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.mid_block.attentions.0.to_out.0.weight",
            "encoder.mid_block.attentions.0.group_norm.weight", "encoder.conv_norm_out.weight", "quant_conv.weight",
            "post_quant_conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.weight", "decoder.mid_block.resnets.1.norm1.bias",
            "decoder.up_blocks.3.resnets.2.conv1.weight", "decoder.conv_out.weight"} <= names
    assert len(names) == 248 and sd.factor == 8
    assert all(m.eps == 1e-6 and m.num_groups == 32 for m in sd.modules() if isinstance(m, torch.nn.GroupNorm))


def test_downsampling_pads_right_and_below_only():
    down, x = talking.Resample(1, up=False), torch.zeros(1, 1, 4, 4)
    torch.nn.init.ones_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    x[0, 0, 0, 0] = 1
    assert down(x)[0, 0].tolist() == [[1, 0], [0, 0]]


def test_linear_path_starts_at_the_principal_components():
    torch.manual_seed(0)
    frames = F.interpolate(torch.randn(64, 3, 4, 4), size=32, mode="bicubic").clamp(-1, 1)
    ae = talking.AutoencoderKL(**SMALL_AE)
    ae.init_linear_path(frames)
    blocks = frames.view(64, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double().numpy()
    centred = blocks - blocks.mean(0)
    energy = np.linalg.svd(centred, compute_uv=False) ** 2
    squared_error = float((ae.linear_out(ae.linear_in(frames)) - frames).detach().double().square().sum())
    residual = energy[4:].sum() + 16 * 64 * ((blocks.mean(0) - blocks.mean(0).reshape(3, 64).mean(1).repeat(64)) ** 2).sum()
    assert squared_error == pytest.approx(residual, rel=1e-3)  # Eckart-Young, but for a mean that is flat in a block


def test_latents_are_scaled_by_the_factor():
    torch.manual_seed(0)
    ae = talking.AutoencoderKL(**SMALL_AE | {"linear_path": False, "scaling_factor": 0.18215}).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(ae.encode(x), ae.moments(x)[0] * 0.18215)
    assert torch.allclose(ae.decode(ae.encode(x)),
                          F.pixel_shuffle(ae.decoder(ae.post_quant_conv(ae.moments(x)[0])), 4), atol=1e-5)


# ------------------------------------------------------------------------------------------------ conditions, UNet


def inputs(f=9):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, f, 6, 4, 4, generator=g), torch.randn(2, f, 20, 40, generator=g),
            torch.rand(2, 3, 32, 32, generator=g) * 2 - 1, torch.tensor([[1, 2, 0], [3, 0, 0]]))


def output(model, xt, mel, reference, words, t=None, **scales):
    conditions, first = model.conditions(mel, reference, words, scales), reference if reference.dim() == 4 else reference[:, 0]
    with torch.no_grad():
        return model(xt, torch.tensor([40, 80]) if t is None else t, conditions, model.autoencoder.encode(first))


@pytest.mark.parametrize("name", ["speech", "identity", "text"])
def test_a_scale_of_zero_removes_one_condition_and_no_other(name):
    model, (xt, mel, reference, words) = small_model(), inputs()
    changed = {"speech": (mel + 1, reference, words), "identity": (mel, -reference, words), "text": (mel, reference, words + 1)}
    plain, without = (output(model, xt, mel, reference, words, **s) for s in ({}, {name: 0.0}))
    for other, arguments in changed.items():
        assert not torch.allclose(output(model, xt, *arguments), plain, atol=1e-4)
        assert torch.equal(output(model, xt, *arguments, **{name: 0.0}), without) == (other == name)


def test_scales_may_differ_by_clip_and_half_a_scale_is_between():
    model, (xt, *rest) = small_model(), inputs()
    none, half, whole = (output(model, xt, *rest, speech=s) for s in (0.0, 0.5, 1.0))
    mixed = output(model, xt, *rest, speech=torch.tensor([1.0, 0.0]))
    assert torch.allclose(mixed[0], whole[0], atol=1e-6) and torch.allclose(mixed[1], none[1], atol=1e-6)
    assert float((half - none).norm()) < float((whole - none).norm())


def test_a_clip_without_words_has_no_text():
    model, (xt, mel, reference, words) = small_model(), inputs()
    nothing = torch.zeros_like(words)
    assert torch.equal(output(model, xt, mel, reference, nothing), output(model, xt, mel, reference, words, text=0.0))


def test_what_words_let_expect_has_their_scale():
    model, (xt, mel, reference, words) = small_model("x0"), inputs()
    model.prior.said[1:].normal_()
    (whole, mean), (half, same) = (model.conditions(mel, reference, words, s)["text"][1:] for s in (None, {"text": 0.5}))
    assert mean.shape == (2, 1, xt[0, 0].numel()) and (whole[:, None, None] * mean).abs().amax() > 0.1
    assert torch.equal(half[:, None, None] * same, 0.5 * whole[:, None, None] * mean)
    without = output(model, xt, mel, reference, words, text=0.0)
    assert torch.equal(without, output(model, xt, mel, reference, torch.zeros_like(words)))
    assert not torch.allclose(without, output(model, xt, mel, reference, words), atol=1e-2)


def test_words_are_those_of_the_captions_and_others_are_left_out():
    text = talking.TextEncoder(16, num_words=4, max_words=2)
    text.learn_words(["Smiling, calm", "calm", "calm brows", "raised brows"])
    assert text.words == ["calm", "brows", "raised"]  # three fit beside "no word"
    assert text.ids(["CALM! brows raised", "furious", ""]).tolist() == [[1, 2], [0, 0], [0, 0]]
    again = talking.TextEncoder(16, num_words=4, max_words=2)
    again.load_state_dict(text.state_dict())
    assert again.words == text.words


def test_several_references_are_more_identity_tokens():
    model, (xt, mel, reference, words) = small_model(), inputs()
    two = torch.stack([reference, reference], dim=1)
    assert model.identity_encoder(two).shape == (2, 32, 16)  # the same picture twice says the same
    assert torch.allclose(output(model, xt, mel, two, words), output(model, xt, mel, reference, words), atol=1e-5)


def test_speech_acts_on_its_own_frame_first():
    model, (xt, mel, *rest) = small_model(), inputs(f=25)
    changed = mel.clone()
    changed[:, 0] += 1.0
    difference = (output(model, xt, mel, *rest) - output(model, xt, changed, *rest)).abs().mean((0, 2, 3, 4))
    assert int(difference.argmax()) == 0


def test_identity_and_reference_matter():
    model, (xt, mel, reference, words) = small_model(), inputs()
    plain = output(model, xt, mel, reference, words)
    assert not torch.allclose(plain, output(model, xt, mel, -reference, words), atol=1e-3)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_frames_without_noise_stay_and_inform_the_others(prediction):
    model, (xt, *rest) = small_model(prediction), inputs()
    t = torch.full((2, 9), 99)
    t[:, :3] = -1
    stated = output(model, xt, *rest, t=t)
    x0, _ = model.diffusion.split(stated, xt, t)
    assert torch.allclose(x0[:, :3], xt[:, :3], atol=1e-4)
    other = xt.clone()
    other[:, 2] += 1.0
    assert not torch.allclose(output(model, other, *rest, t=t)[:, 3:], stated[:, 3:], atol=1e-3)


def test_temporal_attention_reaches_so_far_and_no_farther():
    torch.manual_seed(0)
    layer = talking.TemporalAttention(8, 2, reach=3)
    torch.nn.init.normal_(layer.attention.to_out.weight)
    x = torch.randn(12, 5, 8)  # one clip of 12 frames
    changed = x.clone()
    changed[0] += torch.randn(5, 8)
    moved = (layer(x, 12) - layer(changed, 12)).abs().amax((1, 2)) > 1e-6
    assert moved[:4].all() and not moved[4:].any()


def test_long_clips_look_to_each_frame_like_short_ones():
    torch.manual_seed(0)
    layer = talking.TemporalAttention(8, 2, reach=2)
    torch.nn.init.normal_(layer.attention.to_out.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(20, 3, 8)
    assert torch.allclose(layer(x, 20)[6:10], layer(x[4:12], 8)[2:6], atol=1e-6)


def generated(model, *conditions, steps=3, **kwargs):
    return model.generate(*conditions, torch.Generator().manual_seed(0), steps, **kwargs)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_generation_is_deterministic_and_in_range(solver):
    model, (_, mel, reference, words) = small_model(), inputs()
    frames = generated(model, reference, mel, words, solver=solver)
    assert frames.shape == (2, 9, 3, 32, 32) and float(frames.abs().max()) <= 1
    assert torch.equal(frames, generated(model, reference, mel, words, solver=solver))


def test_guidance_zero_ignores_speech_and_one_is_plain():
    model, (_, mel, reference, words) = small_model(), inputs()
    silent = [generated(model, reference, m, words, guidance=0.0) for m in (mel, mel + 1)]
    assert torch.allclose(*silent, atol=1e-5)
    near_one = generated(model, reference, mel, words, guidance=1.0 + 1e-6)
    assert torch.allclose(generated(model, reference, mel, words), near_one, atol=1e-3)


def test_among_many_steps_every_second_one_is_guided_by_the_step_before(monkeypatch):
    model, (_, mel, reference, words), clips = small_model("x0"), inputs(), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, xt, *rest: clips.append(len(xt)) or forward(self, xt, *rest))
    plain, guided, _ = (generated(model, reference, mel, words, guidance=g, steps=n) for g, n in ((1.0, 6), (1.5, 6), (1.5, 2)))
    assert clips == [2] * 6 + [4, 2] * 3 + [4, 4] and not torch.allclose(plain, guided, atol=1e-3)


def test_a_long_clip_comes_in_windows_that_go_on_from_each_other(monkeypatch):
    model, (_, mel, reference, words) = small_model("x0"), inputs(f=26)
    seen, sample = [], talking.TalkingHead.sample

    def watch(self, conditions, latents, noise, known, *rest):
        seen.append((noise.shape[1], known, sample(self, conditions, latents, noise, known, *rest)))
        return seen[-1][2]

    monkeypatch.setattr(talking.TalkingHead, "sample", watch)
    generator = torch.Generator().manual_seed(0)
    blocks = [block.shape[1] for block in model.stream(reference, mel, words, generator, 2, window=12)]
    assert blocks == [6, 8, 8, 4] and [f for f, *_ in seen] == [6, 12, 12, 8]
    for (_, _, before), (_, known, after) in zip(seen, seen[1:]):
        assert torch.equal(known, before[:, -talking.KNOWN_FRAMES:]) and torch.equal(after[:, :4], known)


# ------------------------------------------------------------------------------------------------ motion


def blobs(num=3, size=64):
    """Smooth random pictures [n 3 size size] in [-1, 1]."""
    noise = torch.randn(num, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(size, size), mode="bicubic").tanh()


def test_warp_takes_each_pixel_from_where_the_flow_points():
    pictures = blobs()
    flow = torch.tensor([4.0, -2.0]).view(1, 2, 1, 1) / 32  # 4 pixels to the right, 2 up, in half sides of 64 pixels
    warped = talking.warp(pictures, flow.expand(3, 2, 8, 8))
    assert torch.allclose(warped[:, :, 2:, :-4], pictures[:, :, :-2, 4:], atol=1e-5)
    assert torch.allclose(talking.warp(pictures, torch.zeros(3, 2, 8, 8)), pictures, atol=1e-5)


@pytest.mark.parametrize("pixels", [0.4, 1.5, 4.0])
def test_flow_is_recovered(pixels):
    source, flow = blobs(), torch.zeros(3, 2, 8, 8)
    flow[:, 0], flow[:, 1] = pixels / 32, -pixels / 64
    flow[2] *= torch.linspace(0, 1, 8)  # a part that stays and a part that moves
    target = talking.warp(source, flow)
    inner = (..., slice(1, -1), slice(1, -1))  # what came from outside of the picture cannot be known
    found = talking.estimate_flow(source, target, 8)
    assert float((found - flow)[inner].abs().mean()) < 0.12 * pixels / 32
    assert float((talking.warp(source, found) - target).square().mean()) < 0.05 * float((source - target).square().mean())
    assert float(talking.estimate_flow(source, source, 8).abs().max()) < 1e-6


def test_decode_inverts_motion_where_the_autoencoder_is_exact():
    model, (_, _, reference, _) = small_model(), inputs()
    frames = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    model.spread.copy_(torch.rand(model.motion_channels, 1, 1) + 0.5)
    motion = torch.stack([model.motion(f, model.autoencoder.encode(f), r) for f, r in zip(frames, reference)])
    decoded, flow = model.decode(motion / model.spread, reference), motion[:, :, :2]
    for b in range(2):
        warped = talking.warp(reference[b].expand_as(frames[b]), flow[b])
        rebuilt = lambda x: model.autoencoder.decode(model.autoencoder.encode(x))
        # What is lost of the frame is what the autoencoder loses of the frame, less what it loses of the warped reference.
        assert torch.allclose(decoded[b] - frames[b], rebuilt(frames[b]) - frames[b] + warped - rebuilt(warped), atol=1e-4)
    still = model.decode(torch.zeros_like(motion), reference)
    assert torch.allclose(still, reference[:, None].expand_as(still), atol=1e-5)  # no motion: the reference itself, exactly


def test_ema_is_the_weighted_mean_of_what_it_saw():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema, expected = talking.EMA(layer, 0.9), 0.0
    for step in range(1, 60):
        torch.nn.init.constant_(layer.weight, float(step))
        ema.update(layer)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.module.weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_flow_that_diverged_does_not_crash(value):
    flow = torch.full((2, 2, 4, 4), value, requires_grad=True)
    picture = talking.warp(torch.rand(2, 3, 16, 16), flow)
    picture.sum().backward()
    assert picture.isfinite().all()


def test_new_frames_glide_on_from_the_last_and_soon_keep_to_themselves():
    walk = torch.randn(2, 30, 3, 1, 1, generator=torch.Generator().manual_seed(0)).cumsum(1)
    last = torch.full((2, 1, 3, 1, 1), 7.0)
    new = talking.glide(last, walk)
    assert torch.allclose(new[:, 0] - last[:, 0], walk[:, 1] - walk[:, 0], atol=1e-5)
    away = (new - walk).abs().amax((2, 3, 4))
    assert (away.diff(dim=1) <= 0).all() and away[:, -1].max() < 1e-4
    assert torch.allclose(talking.glide(last, walk[:, :1]), last)  # one frame alone stays


def test_emphasis_exaggerates_what_the_mean_takes_from_speech_and_nothing_else():
    model, (_, mel, reference, words) = small_model("x0"), inputs(f=12)
    how = dict(num_steps=2, window=8)

    def frames(**change):
        return model.generate(reference, mel, words, torch.Generator().manual_seed(0), **how, **change)

    assert torch.equal(frames(), frames(emphasis=5.0))  # no speech in the mean, nothing to exaggerate
    model.prior.heard.normal_(std=0.02)
    plain, much = frames(), frames(emphasis=3.0)
    spoken = model.prior.means(mel, words)[0]
    assert not torch.allclose(plain, much, atol=1e-3)
    assert torch.equal(frames(scales={"speech": 0.0}), frames(scales={"speech": 0.0}, emphasis=3.0))
    seen, decode = [], model.decode
    model.decode = lambda x0, picture: seen.append(x0) or decode(x0, picture)
    frames(), frames(emphasis=3.0)
    change = torch.cat(seen[len(seen) // 2:], 1) - torch.cat(seen[:len(seen) // 2], 1)
    assert torch.allclose(change.flatten(2), 2 * (spoken - spoken.mean(1, keepdim=True)), atol=1e-4)
