"""The generator against closed forms, oracles and formulas written a second time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as talking

SMALL = {
    "size": 32,
    "latent_channels": 4,
    "autoencoder_channels": [8, 16],
    "channels": [16, 32],
}  # latents of 4 x 4 cells, 6 channels of motion


def wake_up(module):
    """Draw the parameters that are zero, so that every layer has an effect; return the module."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def small_model():
    """Return a random TalkingHead for pictures of 32 pixels in which every layer has an effect."""
    torch.manual_seed(0)
    return wake_up(talking.TalkingHead(**SMALL)).eval()


def inputs(num_frames=9):
    """Return xt, mel windows, reference pictures and word ids of two clips."""
    generator = torch.Generator().manual_seed(1)
    xt = torch.randn(2, num_frames, 6, 4, 4, generator=generator)
    mel = torch.randn(2, num_frames, 20, 40, generator=generator)
    reference = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    words = torch.tensor([[1, 2, 0], [3, 0, 0]])
    return xt, mel, reference, words


@torch.no_grad()
def predict_x0(model, xt, mel, reference, words, t=((400,), (800,)), **scales):
    conditions = model.encode_conditions(mel, reference, words, scales)
    moving = reference if reference.dim() == 4 else reference[:, 0]
    t = torch.as_tensor(t).expand(xt.shape[:2])  # b f
    return model(xt, t, conditions, model.autoencoder.encode(moving))


# ---------------------------------------------------------------- diffusion


def test_the_forward_process_has_the_moments_of_eq_4():
    diffusion = talking.Diffusion()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((200_000, 1), 0.7)
    for step in (0, 300, 700, 999):
        t = torch.full((len(x0),), step)
        xt = diffusion.add_noise(x0, t, torch.randn(x0.shape, generator=generator))
        alpha_bar = float(diffusion.alpha_bar[step])
        assert abs(float(xt.mean()) - math.sqrt(alpha_bar) * 0.7) < 0.01
        assert abs(float(xt.var()) - (1 - alpha_bar)) < 0.01


def test_the_schedule_is_the_published_one():
    # Nichol & Dhariwal 2021, Eq. 17, with betas of at most 0.999
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    # Lin et al. 2024, Algorithm 1: shift the last root to 0, keep the first.
    root = np.sqrt(np.cumprod(1 - betas))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    found = talking.noise_schedule(1000).numpy()
    assert np.allclose(found, expected, atol=1e-12)
    assert found[-1] == 0.0
    assert (np.diff(found) < 0).all()


def test_the_implied_noise_is_the_noise_that_was_added():
    diffusion = talking.Diffusion()
    x0 = torch.randn(2, 4, 3)
    eps = torch.randn(2, 4, 3)
    t = torch.tensor([[10, 200, 600, 999], [-1, -1, 50, 900]])
    xt = diffusion.add_noise(x0, t, eps)
    assert torch.equal(xt[1, :2], x0[1, :2])  # t = -1 is without noise
    found = diffusion.implied_eps(x0, xt, t)
    assert torch.allclose(found[t >= 0], eps[t >= 0], atol=1e-4)
    assert not found[t < 0].any()
    one_t = torch.tensor([200, 900])  # of a clip
    assert torch.equal(
        diffusion.add_noise(x0, one_t, eps),
        diffusion.add_noise(x0, one_t[:, None].expand(2, 4), eps),
    )


@pytest.mark.parametrize("num_steps", [1, 2, 8, 50])
def test_sampling_returns_what_an_oracle_predicts(num_steps):
    x0 = torch.randn(2, 5, 3)

    def oracle(xt, t):
        return x0

    found = talking.Diffusion().sample(oracle, torch.randn(2, 5, 3), num_steps)
    assert torch.allclose(found, x0, atol=1e-5)


def test_sampling_reaches_a_known_gaussian_with_second_order():
    diffusion = talking.Diffusion()
    mean = 1.5
    std = 0.6
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    # For x0 ~ N(mean, std^2) the probability-flow ODE maps noise to mean + std noise.
    exact = mean + std * noise

    def posterior_mean(xt, t):
        signal, noise = diffusion.coefficients(torch.as_tensor(t), xt)
        return (mean * noise**2 + signal * std**2 * xt) / (signal**2 * std**2 + noise**2)

    def ddim_error(num_steps):  # Song et al. 2021, Eq. 12 with sigma = 0, of first order
        xt = noise
        times = [*diffusion.timesteps(num_steps).tolist(), -1]
        for now, following in zip(times, times[1:]):
            t = torch.full((len(xt),), now)
            x0 = posterior_mean(xt, now)
            eps = diffusion.implied_eps(x0, xt, t)
            xt = diffusion.add_noise(x0, torch.full_like(t, following), eps)
        return float((xt - exact).abs().mean())

    def error(num_steps):
        found = diffusion.sample(posterior_mean, noise, num_steps)
        return float((found - exact).abs().mean())

    assert error(2) == pytest.approx(ddim_error(2), rel=1e-4)
    assert error(10) < 0.3 * ddim_error(10)
    assert error(40) < 0.1 * ddim_error(40)
    assert error(40) < 1e-3


def test_sampling_starts_at_pure_noise_and_takes_no_step_twice():
    diffusion = talking.Diffusion()
    assert diffusion.timesteps(2).tolist() == [999, 353]
    assert diffusion.timesteps(4).tolist() == [999, 649, 353, 124]
    for num_steps in (1, 3, 37, 300, 999, 1000):
        times = diffusion.timesteps(num_steps)
        assert times[0] == 999 and times[-1] >= 0 and (times.diff() < 0).all()


# ---------------------------------------------------------------- the Gaussian prior


def known_prior():
    """Return a prior and its covariance of x0 of four frames of six values, flattened."""
    torch.manual_seed(0)
    prior = talking.GaussianPrior(num_values=6, num_modes=3, num_lags=4)
    modes, _ = torch.linalg.qr(torch.randn(6, 3))
    prior.modes.copy_(modes)
    prior.variance.copy_(torch.tensor([3.0, 1.0, 0.5]))
    prior.residual_variance.fill_(0.1)
    prior.autocorrelation.copy_(torch.tensor([1.0, 0.8, 0.5, 0.3]))
    places = modes @ prior.variance.diag() @ modes.T + 0.1 * (torch.eye(6) - modes @ modes.T)
    frame = torch.arange(4)
    times = prior.autocorrelation[(frame[None] - frame[:, None]).abs()]
    return prior, torch.kron(times, places)


@pytest.mark.parametrize(
    "levels", [(0.6, 0.6, 0.6, 0.6), (1.0, 1.0, 0.6, 0.0), (1.0, 0.0, 0.0, 0.0)]
)
def test_the_prior_is_the_conditional_mean_of_a_gaussian(levels):
    """`levels` is sqrt(alpha_bar) of each frame: 1 is without noise, 0 is pure noise."""
    prior, covariance = known_prior()
    xt = torch.randn(1, 4, 6, 1, 1)
    signal = torch.tensor(levels)
    noise = (1 - signal**2).sqrt()
    S = signal.repeat_interleave(6).diag()
    N = noise.repeat_interleave(6).diag()
    gain = covariance @ S @ torch.linalg.inv(S @ covariance @ S + N**2)
    mean, std = prior.denoise(xt, signal.view(1, 4, 1, 1, 1), noise.view(1, 4, 1, 1, 1))
    assert torch.allclose(mean.flatten(), gain @ xt.flatten(), atol=1e-4)
    posterior = covariance - gain @ S @ covariance
    assert torch.allclose(std.flatten() ** 2, posterior.diagonal(), atol=1e-5)


@pytest.mark.parametrize("num_known", (0, 1, 3))
def test_a_sample_of_the_prior_has_the_covariance_that_known_frames_leave(num_known):
    prior, covariance = known_prior()
    root = prior.sample(torch.eye(24).view(24, 4, 6, 1, 1), num_known).view(24, 24)  # linear
    known = slice(0, 6 * num_known)
    left = torch.zeros(24, 24)  # the Schur complement of the known frames
    inverse = torch.linalg.inv(covariance.double()).float()
    left[known.stop :, known.stop :] = torch.linalg.inv(inverse[known.stop :, known.stop :])
    assert torch.allclose(root.T @ root, left, atol=1e-5)


def test_the_prior_finds_the_covariance_that_made_the_data():
    torch.manual_seed(0)
    modes, _ = torch.linalg.qr(torch.randn(8, 2))
    # A random walk of two frames, each divided by its standard deviation: correlation 1 / sqrt(2).
    walk = torch.randn(4000, 2, 2).cumsum(1) / torch.tensor([1.0, 2.0**0.5])[:, None]
    x0 = (walk * torch.tensor([2.0, 1.0])) @ modes.T + 0.1 * torch.randn(4000, 2, 8)
    prior = talking.GaussianPrior(num_values=8, num_modes=2, num_lags=4)
    prior.fit(x0.view(4000, 2, 8, 1, 1))
    assert torch.allclose(prior.variance, torch.tensor([4.01, 1.01]), rtol=0.06)
    assert float(prior.residual_variance) == pytest.approx(0.01, rel=0.06)
    assert float((prior.modes.T @ modes).square().sum()) == pytest.approx(2, rel=1e-3)
    assert float(prior.mean_variance()) == pytest.approx(float(x0.square().mean()), rel=1e-3)
    first, second, *beyond = prior.autocorrelation.tolist()
    assert first == pytest.approx(1)
    assert second == pytest.approx(0.70, abs=0.03)
    assert beyond == [second, second]  # longer lags than the clips have: as the longest of theirs


def test_a_prior_of_fewer_frames_than_modes_is_that_of_as_many_modes():
    # so small that the least residual variance, 1e-6, is seen
    x0 = 1e-3 * torch.randn(2, 3, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    xt = 1e-3 * torch.randn(1, 3, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    levels = torch.ones(1, 3, 1, 1, 1), torch.full((1, 3, 1, 1, 1), 1e-3)
    found = []
    for num_modes in (6, 8):
        torch.manual_seed(0)
        prior = talking.GaussianPrior(num_values=8, num_modes=num_modes, num_lags=2)
        prior.fit(x0)
        mean, std = prior.denoise(xt, *levels)
        found.append((mean, std, prior.sample(xt, 0), prior.mean_variance()))
    for few, many in zip(*found):
        assert torch.allclose(few, many, rtol=1e-3, atol=1e-9)


def test_the_correlation_of_frames_is_positive_definite_at_any_length():
    prior = talking.GaussianPrior(num_values=6, num_modes=3, num_lags=4)
    prior.autocorrelation.copy_(torch.tensor([1.0, 0.9, -0.5, 0.8]))  # of no stationary process
    correlation = prior.frame_correlation(30)
    assert float(torch.linalg.eigvalsh(correlation)[0]) > 9e-4
    prior.autocorrelation.copy_(0.5 ** torch.arange(4))  # of one: it stays as it is
    correlation = prior.frame_correlation(4)
    assert torch.allclose(correlation[0], 0.5 ** torch.arange(4).double(), atol=1e-6)


def test_flow_and_residual_are_scaled_by_their_typical_mode():
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    motion = torch.zeros(300, 4, 6, 4, 4)
    # Flow: one mode of standard deviation 2 over 32 values. Residual: white of deviation 3.
    motion[:, :, :2] = 2 * torch.randn(300, 4, 1, 1, 1, generator=generator) / 32**0.5
    motion[:, :, 2:] = 3 * torch.randn(300, 4, 4, 4, 4, generator=generator)
    reference_std = torch.tensor([1.0, 2.0, 3.0, 4.0])
    latents = torch.randn(500, 4, 4, 4, generator=generator) * reference_std[:, None, None]
    mel = torch.randn(300, 4, 20, 40, generator=generator)
    liveliness = torch.cat([torch.full([250], 0.02), torch.full([50], 5.0)])
    model.fit_statistics(motion, latents, mel, liveliness)
    assert float(model.typical_liveliness) == pytest.approx(0.02)  # the median
    assert torch.allclose(model.motion_std[:2], torch.tensor(2.0), rtol=0.06)
    assert torch.allclose(model.motion_std[2:], torch.tensor(3.0), rtol=0.06)
    assert torch.allclose(model.reference_std.flatten(), reference_std, rtol=0.06)
    power = (motion / model.motion_std).square().mean()
    assert float(model.prior.mean_variance()) == pytest.approx(float(power), rel=1e-3)


def test_most_of_the_loss_weighs_places_by_what_speech_explains():
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(64, 24, 20, 40, generator=generator)
    x0 = 3 * torch.randn(64, 24, 2, 2, 2, generator=generator)  # moves more, without speech
    loudness = mel[:, :, 8:12].mean((2, 3)) * (4 * 40) ** 0.5  # of unit variance
    x0[:, :, 0, 1, 1] = loudness + 0.5 * torch.randn(64, 24, generator=generator)
    x0[:, :, 1] += torch.randn(64, 1, 2, 2, generator=generator)  # of the reference: no motion
    weights = talking.speech_weights(x0, mel)
    power = x0.square().mean((0, 1))
    assert float((weights * power).sum() / power.sum()) == pytest.approx(1, abs=0.02)
    others = torch.ones(2, 2, 2, dtype=torch.bool)
    others[0, 1, 1] = False
    assert torch.allclose(weights[others], torch.tensor(0.25), atol=0.1)
    assert float((weights * power)[0, 1, 1] / power.sum()) == pytest.approx(0.75, abs=0.05)
    lively = talking.speech_weights(x0 * torch.linspace(0.1, 10, 64).view(64, 1, 1, 1, 1), mel)
    assert torch.allclose(lively, weights)  # every clip counts the same
    x0[:, :, 1, 1, 1] = x0[:, :, 0, 1, 1] + 3 * torch.randn(64, 1, generator=generator)
    weights = talking.speech_weights(x0, mel)  # motion is what changes over time
    assert float(weights[1, 1, 1]) == pytest.approx(float(weights[0, 1, 1]), rel=0.1)
    silence = talking.speech_weights(x0, torch.zeros_like(mel))
    assert torch.allclose(silence, torch.tensor(0.25))


# ---------------------------------------------------------------- autoencoder


def conv_by_hand(x, conv):
    patches = F.unfold(x, conv.kernel_size, padding=conv.padding)
    return (conv.weight.flatten(1) @ patches).unflatten(2, x.shape[2:]) + conv.bias[:, None, None]


def norm_by_hand(x, norm):
    groups = x.unflatten(1, (-1, talking.GROUP_CHANNELS)).flatten(2)
    centred = groups - groups.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled.view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_every_group_norm_has_the_groups_that_are_fast_on_cpus():
    model = talking.TalkingHead(**SMALL)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) > 20
    for norm in norms:
        assert norm.num_channels == 8 * norm.num_groups


def test_a_resnet_block_is_its_formula():
    torch.manual_seed(0)
    block = talking.ResnetBlock(16, 32, temb_channels=8)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 6, 6)
    temb = torch.randn(2, 8)
    scale, shift = (temb @ block.time_projection.weight.T + block.time_projection.bias).split(32, 1)
    h = norm_by_hand(x, block.norm1)
    h = conv_by_hand(h * h.sigmoid(), block.conv1)
    h = norm_by_hand(h, block.norm2) * (1 + scale[..., None, None]) + shift[..., None, None]
    h = conv_by_hand(h * h.sigmoid(), block.conv2)
    assert torch.allclose(block(x, temb), h + conv_by_hand(x, block.shortcut), atol=1e-4)


def test_the_linear_path_starts_at_the_principal_components():
    torch.manual_seed(0)
    frames = F.interpolate(torch.randn(64, 3, 4, 4), size=32, mode="bicubic").clamp(-1, 1)
    autoencoder = talking.AutoencoderKL(4, [8, 16])
    autoencoder.init_linear_path(frames)
    blocks = frames.view(64, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    blocks = blocks.double().numpy()
    mean = blocks.mean(0)
    energy = np.linalg.svd(blocks - mean, compute_uv=False) ** 2
    # Eckart & Young 1936, but the decoder's bias is one colour for a whole block.
    flat_mean = mean.reshape(3, 64).mean(1).repeat(64)
    expected = energy[4:].sum() + len(blocks) * ((mean - flat_mean) ** 2).sum()
    with torch.no_grad():
        latents = autoencoder.encode(frames)
        error = (autoencoder.decode(latents) - frames).double().square().sum()
    assert float(error) == pytest.approx(expected, rel=1e-3)
    assert float(latents.square().mean()) == pytest.approx(1, rel=1e-3)


def test_the_convolutions_of_the_autoencoder_start_as_a_zero_residual():
    torch.manual_seed(0)
    autoencoder = talking.AutoencoderKL(4, [8, 16])
    frames = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, log_variance = autoencoder.moments(frames)
    assert mean.shape == (2, 4, 4, 4)
    assert torch.equal(mean, autoencoder.linear_in(frames))
    assert (log_variance == -6).all()
    assert torch.equal(autoencoder.decode(mean), autoencoder.linear_out(mean))


@pytest.mark.parametrize("widths, factor", [([8], 4), ([8, 16], 8), ([8, 16, 16], 16)])
def test_each_width_after_the_first_halves_the_latents(widths, factor):
    autoencoder = wake_up(talking.AutoencoderKL(4, widths))
    latents = autoencoder.encode(torch.rand(1, 3, 32, 48))
    assert autoencoder.factor == factor
    assert latents.shape == (1, 4, 32 // factor, 48 // factor)
    assert autoencoder.decode(latents).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 40}, "size must be a multiple of 16 pixels, not 40"),
        ({"size": 0}, "size must be a multiple of 16 pixels, not 0"),
        ({"latent_channels": 0}, "needs latent channels"),
        ({"autoencoder_channels": [12]}, "widths that are multiples of 8, .*12"),
        ({"autoencoder_channels": []}, "widths"),
        ({"channels": [20]}, "channels must be multiples of .*20"),
        ({"channels": []}, "channels must be multiples of"),
    ],
)
def test_impossible_sizes_raise(change, message):
    with pytest.raises(ValueError, match=message):
        talking.TalkingHead(**SMALL | change)


def test_a_unet_needs_channels():
    with pytest.raises(ValueError, match="channels must be multiples of"):
        talking.TalkingUNet(6, 4, [], 24)


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize("name", talking.CONDITIONS)
def test_scale_zero_drops_one_condition_and_no_other(name):
    model = small_model()
    xt, mel, reference, words = inputs()
    changed = {
        "speech": (mel + 1, reference, words),
        "identity": (mel, -reference, words),
        "text": (mel, reference, words + 1),
    }
    plain = predict_x0(model, xt, mel, reference, words)
    dropped = predict_x0(model, xt, mel, reference, words, **{name: 0.0})
    for other, arguments in changed.items():
        assert not torch.allclose(predict_x0(model, xt, *arguments), plain, atol=1e-4)
        same = torch.equal(predict_x0(model, xt, *arguments, **{name: 0.0}), dropped)
        assert same == (other == name)


def test_a_scale_of_an_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="conditions are speech, identity, text, not audio"):
        predict_x0(small_model(), *inputs(), audio=0.0)


def test_scales_may_differ_by_clip_and_half_a_scale_is_between():
    model = small_model()
    arguments = inputs()
    none, half, whole = (predict_x0(model, *arguments, speech=s) for s in (0.0, 0.5, 1.0))
    mixed = predict_x0(model, *arguments, speech=torch.tensor([1.0, 0.0]))
    assert torch.allclose(mixed[0], whole[0], atol=1e-6)
    assert torch.allclose(mixed[1], none[1], atol=1e-6)
    assert float((half - none).norm()) < float((whole - none).norm())
    assert float((half - whole).norm()) < float((whole - none).norm())


def test_a_clip_without_words_has_no_text():
    model = small_model()
    xt, mel, reference, words = inputs()
    without = predict_x0(model, xt, mel, reference, torch.zeros_like(words))
    assert torch.equal(without, predict_x0(model, xt, mel, reference, words, text=0.0))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("Smiling, don't blink!", ["smiling", "don't", "blink"]),
        ("Lächelnd", ["lächelnd"]),
        ("la\u0308chelnd", ["lächelnd"]),  # the same, decomposed
        ("हँसना 2x", ["हँसना", "x"]),
        ("don\u2019t", ["don't"]),
        ("微笑，平静", ["微笑", "平静"]),
    ],
)
def test_prompts_are_split_into_words_of_any_script(prompt, words):
    assert talking.split_words(prompt) == words


def test_words_are_the_most_frequent_of_the_captions_and_others_are_left_out():
    text = talking.TextEncoder(16, num_words=4)
    text.learn_words(["Smiling, calm", "calm", "calm brows", "raised brows"])
    assert text.words == ["calm", "brows", "raised"]  # three rows beside the padding
    prompts = ["CALM! furious raised brows", "furious", ""]
    ids = text.ids(prompts)
    assert ids[:, :4].tolist() == [[1, 3, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert ids.shape == (3, talking.MAX_WORDS) and not ids[:, 4:].any()
    cut = text.ids(["calm " * 5 + "raised " * 5])
    assert cut.tolist() == [[1] * 5 + [3] * 3]
    loaded = talking.TextEncoder(16, num_words=4)
    loaded.load_state_dict(text.state_dict())
    assert loaded.words == text.words


def test_several_references_are_more_identity_tokens():
    model = small_model()
    xt, mel, reference, words = inputs()
    other = reference.flip(-1)
    two = model.identity_encoder(torch.stack([reference, other], dim=1))
    one_by_one = [model.identity_encoder(reference), model.identity_encoder(other)]
    assert torch.allclose(two, torch.cat(one_by_one, dim=1), atol=1e-6)  # b (n 16) d
    plain = predict_x0(model, xt, mel, reference, words)
    twice = predict_x0(model, xt, mel, torch.stack([reference, reference], dim=1), words)
    assert torch.allclose(twice, plain, atol=1e-5)  # attention to the same picture twice


def test_speech_acts_most_on_its_own_frame():
    model = small_model()
    xt, mel, reference, words = inputs(num_frames=25)
    for frame in (0, 12):
        changed = mel.clone()
        changed[:, frame] += 1.0
        difference = predict_x0(model, xt, mel, reference, words)
        difference = difference - predict_x0(model, xt, changed, reference, words)
        assert int(difference.abs().mean((0, 2, 3, 4)).argmax()) == frame


# ---------------------------------------------------------------- UNet


def attention_by_hand(q, k, v, heads):
    """Return attention [n d] of q [n d] to k, v [m d], head by head."""
    out = []
    for own in torch.arange(q.shape[1]).chunk(heads):  # the features of a head
        weights = torch.softmax(q[:, own] @ k[:, own].T / len(own) ** 0.5, dim=1)
        out.append(weights @ v[:, own])
    return torch.cat(out, dim=1)


@torch.no_grad()
def test_cross_attention_is_the_scaled_sum_over_conditions():
    """Ye et al. 2023, Eq. 5, for tokens of each frame (speech) and of the clip (identity, text)."""
    torch.manual_seed(0)
    layer = wake_up(talking.CrossAttention(8, heads=2, condition_dim=6))
    tokens = {
        "speech": torch.randn(2, 3, 5, 6),
        "identity": torch.randn(2, 4, 6),
        "text": torch.randn(2, 2, 6),
    }
    scales = {name: torch.rand(2) for name in tokens}
    x = torch.randn(2, 3, 7, 8)  # b f n c
    conditions = {name: (tokens[name], scales[name]) for name in tokens}
    found = layer(x.flatten(0, 1), conditions, num_frames=3).view_as(x)
    for clip in range(2):
        for frame in range(3):
            q = layer.to_q(layer.norm(x[clip, frame]))
            total = 0.0
            for name in tokens:
                own = tokens[name][clip, frame] if name == "speech" else tokens[name][clip]
                k = layer.to_k[name](own)
                v = layer.to_v[name](own)
                total = total + scales[name][clip] * attention_by_hand(q, k, v, heads=2)
            expected = x[clip, frame] + layer.to_out(total)
            assert torch.allclose(found[clip, frame], expected, atol=1e-5)


def test_temporal_attention_reaches_its_radius_and_no_farther():
    torch.manual_seed(0)
    layer = wake_up(talking.TemporalAttention(8, heads=2, radius=3))
    x = torch.randn(12, 5, 8)  # one clip of 12 frames
    changed = x.clone()
    changed[0] += torch.randn(5, 8)
    moved = (layer(x, 12) - layer(changed, 12)).abs().amax((1, 2)) > 1e-6
    assert moved[:4].all() and not moved[4:].any()


def test_a_frame_of_a_long_clip_is_treated_as_one_of_a_short_clip():
    torch.manual_seed(0)
    layer = wake_up(talking.TemporalAttention(8, heads=2, radius=2))
    nn.init.normal_(layer.bias)
    x = torch.randn(20, 3, 8)
    assert torch.allclose(layer(x, 20)[6:10], layer(x[4:12], 8)[2:6], atol=1e-6)


def test_clips_of_a_batch_do_not_mix():
    model = small_model()
    xt, mel, reference, words = inputs()
    both = predict_x0(model, xt, mel, reference, words)
    for clip in range(2):
        own = slice(clip, clip + 1)
        t = ((400,), (800,))[own]
        alone = predict_x0(model, xt[own], mel[own], reference[own], words[own], t=t)
        assert torch.allclose(alone[0], both[clip], atol=1e-5)


# ---------------------------------------------------------------- x0_hat and the loss


def test_x0_hat_is_the_linear_denoiser_plus_std_times_the_unet():
    torch.manual_seed(0)
    model = talking.TalkingHead(**SMALL)  # its UNet starts at zero
    model.prior.variance.copy_(torch.linspace(5.0, 2.0, 96))
    model.prior.autocorrelation.copy_(0.9 ** torch.arange(25))
    xt, mel, reference, words = inputs()
    t = torch.randint(0, 1000, (2, 9))
    t[0, :2] = -1
    linear, std = model.prior.denoise(xt, *model.diffusion.coefficients(t, xt))
    assert torch.equal(predict_x0(model, xt, mel, reference, words, t=t), linear)
    nn.init.constant_(model.unet.conv_out.bias, 0.5)  # now the UNet is 0.5 everywhere
    found = predict_x0(model, xt, mel, reference, words, t=t)
    assert torch.allclose(found, linear + 0.5 * std, atol=1e-6)
    assert float((found - linear).abs().amax((2, 3, 4))[t >= 0].min()) > 0.01


def test_the_unet_sees_the_linear_denoiser_the_time_and_the_normalised_reference():
    model = small_model()
    model.reference_std.fill_(2.0)
    xt, mel, reference, words = inputs()
    t = torch.tensor([[-1, 0, 100, 300, 500, 700, 900, 998, 999]] * 2)
    conditions = model.encode_conditions(mel, reference, words, {"identity": 0.5})
    latents = model.autoencoder.encode(reference)
    linear, std = model.prior.denoise(xt, *model.diffusion.coefficients(t, xt))
    correction = model.unet(linear, (t + 1) / 1000, conditions, 0.5 * latents / 2.0)
    found = predict_x0(model, xt, mel, reference, words, t=t, identity=0.5)
    assert torch.allclose(found, linear + std * correction, atol=1e-6)


def test_frames_without_noise_stay_and_inform_the_others():
    model = small_model()
    xt, *rest = inputs()
    t = torch.full((2, 9), 999)
    t[:, :3] = -1
    x0 = predict_x0(model, xt, *rest, t=t)
    assert torch.allclose(x0[:, :3], xt[:, :3], atol=1e-4)
    other = xt.clone()
    other[:, 2] += 1.0
    assert not torch.allclose(predict_x0(model, other, *rest, t=t)[:, 3:], x0[:, 3:], atol=1e-3)


def loss_inputs():
    """Return a model, a batch of a lively and a calm clip, its x0, t [b f] and eps."""
    model = small_model()
    eps, mel, reference, words = inputs(num_frames=4)
    motion_std = torch.linspace(0.5, 1.5, 6)[:, None, None]
    model.motion_std.copy_(motion_std)
    x0 = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    x0 = x0 * torch.tensor([3.0, 0.1])[:, None, None, None, None]
    batch = {
        "motion": x0 * motion_std,
        "mel": mel,
        "reference": reference,
        "reference_latents": model.autoencoder.encode(reference).detach(),
        "words": words,
    }
    model.place_weights.copy_(torch.rand(model.place_weights.shape) + 0.5)
    t = torch.tensor([[-1, 20, 300, 999], [20, 300, 600, 900]])
    return model, batch, x0, t, eps


def weighted_power(x, weights):
    """Return the mean square [b] of x [b f m h w], of which the mean over frames counts a tenth."""
    still = x.mean(1, keepdims=True)
    return (weights * ((x - still) ** 2 + 0.1 * still**2)).mean((1, 2, 3, 4))


@torch.no_grad()
def test_the_loss_is_divided_by_the_clips_power_and_by_the_noise():
    model, batch, x0, t, eps = loss_inputs()
    loss, x0_hat, eps_hat = model.training_losses(batch, t, eps)
    alpha_bar = torch.where(t < 0, 1.0, model.diffusion.alpha_bar[t]).numpy()
    assert (1 - alpha_bar)[0, 1] < 0.05  # below it the noise counts as 0.05
    signal = torch.from_numpy(np.sqrt(alpha_bar))[:, :, None, None, None]
    noise = torch.from_numpy(np.sqrt(1 - alpha_bar))[:, :, None, None, None]
    xt = signal * x0 + noise * eps
    arguments = batch["mel"], batch["reference"], batch["words"]
    weights = model.place_weights.numpy()
    assert torch.allclose(x0_hat, predict_x0(model, xt, *arguments, t=t), atol=1e-5)
    assert torch.allclose(signal * x0_hat + noise * eps_hat, xt, atol=1e-4)
    noise_level = np.sqrt(np.maximum(1 - alpha_bar, 0.05))[..., None, None, None]
    error = weighted_power((x0_hat - x0).numpy() / noise_level, weights)
    power = weighted_power(x0.numpy(), weights)
    assert power[0] > 5
    # A calm clip counts as one with a quarter of the prior's variance, which is 1.
    assert power[1] < 0.25
    expected = error / np.array([power[0], 0.25])
    assert np.allclose(loss.numpy(), expected, rtol=1e-4)


@torch.no_grad()
def test_the_loss_is_the_error_of_v_and_eq_6_divided_by_alpha_bar():
    model, batch, x0, _, eps = loss_inputs()
    t = torch.tensor([[300, 500, 700, 900]] * 2)
    loss, x0_hat, eps_hat = model.training_losses(batch, t, eps)
    signal, noise = model.diffusion.coefficients(t, x0)
    weights = model.place_weights.numpy()
    power = weighted_power(x0.numpy(), weights)[0]
    eq_6 = weighted_power(((eps - eps_hat) / signal).numpy(), weights)[0]
    assert float(loss[0]) == pytest.approx(eq_6 / power, rel=1e-4)
    v_error = (signal * eps - noise * x0) - (signal * eps_hat - noise * x0_hat)
    v_error = weighted_power(v_error.numpy(), weights)[0]
    assert float(loss[0]) == pytest.approx(v_error / power, rel=1e-4)


@torch.no_grad()
def test_the_speech_loss_is_that_of_pure_noise_without_the_rest_of_the_unet():
    model, batch, x0, _, eps = loss_inputs()
    nn.init.zeros_(model.unet.conv_out.weight)
    nn.init.zeros_(model.unet.conv_out.bias)
    pure_noise = torch.full(x0.shape[:2], 999)
    loss, _, _ = model.training_losses(batch, pure_noise, eps)
    assert torch.allclose(model.speech_loss(batch), loss, rtol=1e-5)
    other = batch | {"mel": batch["mel"] + 1}
    assert not torch.allclose(model.speech_loss(other), loss, rtol=1e-3)


@torch.no_grad()
def test_the_direct_path_hears_the_whole_window_and_reads_every_word():
    model, batch, *_ = loss_inputs()
    loss = model.speech_loss(batch)
    for step in range(20):  # of five frames
        mel = batch["mel"].clone()
        mel[:, :, step] += 1
        assert (model.speech_loss(batch | {"mel": mel}) != loss).all()
    words = batch["words"].clone()
    words[0, 1] = 5  # the second word of the first clip
    changed = model.speech_loss(batch | {"words": words})
    assert changed[0] != loss[0] and changed[1] == loss[1]


@torch.no_grad()
def test_the_layer_that_adapters_change_acts_by_speech_alone():
    model = small_model()
    arguments = inputs()

    def without(name):
        return predict_x0(model, *arguments, **{name: 0.0})

    before = {name: without(name) for name in talking.CONDITIONS}
    model.unet.speech_in.weight += 0.1
    for name in talking.CONDITIONS:
        assert torch.equal(without(name), before[name]) == (name == "speech")


@torch.no_grad()
def test_the_time_is_told_in_steps():
    model = small_model()
    seen = []
    model.unet.time_mlp.register_forward_pre_hook(lambda layer, arguments: seen.extend(arguments))
    predict_x0(model, *inputs(), t=((400,), (401,)))
    # sinusoids of 401 and 402, the fastest of a period of 2 pi steps
    expected = torch.tensor([401.0, 402.0]).cos()[:, None].expand(2, 9)
    assert torch.allclose(seen[0][..., 0], expected, atol=1e-3)


@torch.no_grad()
def test_the_loss_drops_conditions_by_their_scales():
    model, batch, _, t, eps = loss_inputs()
    other = batch | {"mel": batch["mel"] + 1}
    keep = {"speech": torch.tensor([0.0, 1.0])}
    loss, _, _ = model.training_losses(batch, t, eps, keep)
    changed, _, _ = model.training_losses(other, t, eps, keep)
    assert loss[0] == changed[0] and loss[1] != changed[1]


# ---------------------------------------------------------------- generation


def generate(model, reference, mel, words, num_steps=3, guidance=1.0, window=40, **kwargs):
    generator = torch.Generator().manual_seed(0)
    speech = reference, mel, words
    return model.generate(*speech, generator, num_steps, guidance, window, **kwargs)


@torch.no_grad()
def test_liveliness_scales_the_motion():
    model = small_model()
    _, _, reference, _ = inputs()
    mel = torch.randn(2, 9, 20, 40, generator=torch.Generator().manual_seed(2))
    words = torch.zeros(2, 8, dtype=torch.long)
    model.typical_liveliness.fill_(0.01)
    typical = generate(model, reference, mel, words)
    lively = torch.tensor([0.01, 0.02])
    own = generate(model, reference, mel, words, liveliness=lively)
    assert torch.equal(own[0], typical[0])
    assert (own[1] - reference[1]).std() > 1.5 * (typical[1] - reference[1]).std()


@torch.no_grad()
def test_speech_is_left_out_by_chance_in_training_only():
    encoder = talking.SpeechEncoder(16, dropout=0.5)
    mel = torch.ones(1, 2, 20, 40)
    assert not torch.equal(encoder(mel), encoder(mel))
    assert torch.equal(encoder.eval()(mel), encoder(mel))


@torch.no_grad()
def test_chance_moves_what_speech_does_not_explain(monkeypatch):
    model = small_model()
    flow, residual = model.chance_by_place().split([2, model.motion_channels - 2])
    assert (flow == 1).all() and (residual == 0).all()
    model.place_weights[:, 2, 1] = 3.0
    model.place_weights[:, 3, 1] = 2.0
    model.prior.autocorrelation[1:] = 0
    drawn = []  # noise and chance of each window

    def sample(conditions, reference_latents, noise, chance, *rest):
        drawn.append(torch.stack([noise, chance]))
        return noise

    monkeypatch.setattr(model, "sample", sample)
    _, mel, reference, words = inputs()
    generate(model, reference, mel, words)
    # The prior as it is built has unit variance: both have the same spread.
    for x in torch.cat(drawn, dim=2):  # b f m h w
        assert not x[:, :, 2:].any()
        spread = x[:, :, :2].flatten(0, 2).std(0)  # h w
        assert spread[2, 1] == 0
        assert 0.35 < spread[3, 1] < 0.7  # half of the chance elsewhere
        assert 0.8 < spread[0, 0] < 1.3
    noise, chance = torch.cat(drawn, dim=2)
    assert not torch.equal(noise, chance)


def test_generation_is_deterministic_and_in_range():
    model = small_model()
    _, mel, reference, words = inputs()
    frames = generate(model, reference, mel, words)
    assert frames.shape == (2, 9, 3, 32, 32)
    assert float(frames.abs().max()) <= 1
    assert torch.equal(frames, generate(model, reference, mel, words))


def test_guidance_zero_ignores_speech_and_one_is_plain():
    model = small_model()
    _, mel, reference, words = inputs()
    silent = generate(model, reference, mel, words, num_steps=1, guidance=0.0)
    other = generate(model, reference, mel + 1, words, num_steps=1, guidance=0.0)
    assert torch.allclose(other, silent)
    no_speech = generate(model, reference, mel, words, num_steps=1, scales={"speech": 0.0})
    assert torch.allclose(no_speech, silent, atol=1e-5)
    plain = generate(model, reference, mel, words)
    near_one = generate(model, reference, mel, words, guidance=1.0 + 1e-6)
    assert torch.allclose(plain, near_one, atol=1e-3)
    assert not torch.allclose(plain, silent, atol=1e-3)


def test_the_odds_of_a_timestep_are_three_times_those_of_u():
    u = torch.tensor([0.0, 0.25, 0.5, 0.9])
    odds = 3 * u / (1 - u)
    expected = 1000 * odds / (1 + odds)
    t = talking.Diffusion().timestep(u)
    assert (t - expected).abs().max() < 1
    assert int(talking.Diffusion(50).timestep(torch.tensor([1 - 1e-6]))) == 49
    # where the quotient rounds to 1
    assert int(talking.Diffusion().timestep(torch.tensor([1 - 3 * 2**-24]))) == 999


@torch.no_grad()
def test_guidance_acts_in_pure_noise_only():
    model = small_model()
    noise, mel, reference, words = inputs()
    conditions = model.encode_conditions(mel, reference, words)
    latents = model.autoencoder.encode(reference)
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[1].max().item()))
    model.sample(conditions, latents, noise, torch.zeros_like(noise), noise[:, :0], 3, 2.0)
    assert calls == [999, 999, 543, 191]


@torch.no_grad()
def test_chance_is_added_in_pure_noise_only(monkeypatch):
    model = small_model()
    noise, mel, reference, words = inputs()
    conditions = model.encode_conditions(mel, reference, words)
    latents = model.autoencoder.encode(reference)
    chance = torch.randn_like(noise)
    for t, added in ((999, chance), (499, torch.zeros_like(chance))):
        monkeypatch.setattr(model.diffusion, "sample", lambda predict, xt, _: predict(xt, t))
        with_chance, without = (
            model.sample(conditions, latents, noise, x, noise[:, :0], 2, 1.0)
            for x in (chance, torch.zeros_like(chance))
        )
        assert torch.allclose(with_chance - without, added, atol=1e-5)


@torch.no_grad()
def test_more_guidance_moves_x0_away_from_the_speechless_one():
    model = small_model()
    noise, mel, reference, words = inputs()
    conditions = model.encode_conditions(mel, reference, words)
    latents = model.autoencoder.encode(reference)
    known = torch.full((2, 3, 6, 4, 4), 0.5)
    chance = torch.zeros_like(noise)
    without, plain, guided = (
        model.sample(conditions, latents, noise, chance, known, 1, guidance)
        for guidance in (0.0, 1.0, 2.5)
    )
    assert torch.allclose(guided - without, 2.5 * (plain - without), atol=1e-4)
    # Without guidance one step is one prediction, in which the known frames are without noise.
    xt = torch.cat([known, noise[:, 3:]], dim=1)
    t = torch.tensor([[-1] * 3 + [999] * 6] * 2)
    expected = predict_x0(model, xt, mel, reference, words, t=t)
    assert torch.allclose(plain[:, 3:], expected[:, 3:], atol=1e-6)
    # What the mean leaves open is added to it, not guided.
    chance = torch.randn_like(noise)
    moved = model.sample(conditions, latents, noise, chance, known, 1, 2.5)
    assert torch.allclose(moved[:, 3:], guided[:, 3:] + chance[:, 3:], atol=1e-5)
    assert all(torch.equal(x0[:, :3], known) for x0 in (without, plain, guided))


@torch.no_grad()
def test_a_long_clip_comes_in_windows_that_continue_each_other():
    model = small_model()
    _, mel, reference, words = inputs(num_frames=26)
    generator = torch.Generator().manual_seed(0)
    blocks = list(model.stream(reference, mel, words, generator, 2, 1.0, window=12))
    assert [block.shape[1] for block in blocks] == [6, 8, 8, 4]
    assert torch.equal(torch.cat(blocks, 1), generate(model, reference, mel, words, 2, window=12))
    # The same, window by window: each begins with the last four frames of the one before.
    generator = torch.Generator().manual_seed(0)
    latents = model.autoencoder.encode(reference)
    known = torch.zeros(2, 0, 6, 4, 4)
    for block, (first, end) in zip(blocks, [(0, 6), (2, 14), (10, 22), (18, 26)]):
        noise, chance = torch.randn(2, 2, end - first, 6, 4, 4, generator=generator)
        chance = model.prior.sample(chance, known.shape[1])
        for x in (noise, chance):
            x[:, :, 2:] = 0  # of the residual
        conditions = model.encode_conditions(mel[:, first:end], reference, words)
        x0 = model.sample(conditions, latents, noise, chance, known, 2, 1.0)
        assert torch.equal(x0[:, : known.shape[1]], known)
        new = x0[:, known.shape[1] :]
        assert torch.allclose(
            block, model.decode(new, reference, torch.ones(len(new))).clamp(-1, 1), atol=1e-5
        )
        if known.shape[1]:
            shifted = model.sample(conditions, latents, noise, chance, known + 1, 2, 1.0)
            assert not torch.allclose(shifted[:, 4:], new, atol=1e-2)
        known = x0[:, -4:]


def test_the_first_of_several_references_is_the_one_that_moves(monkeypatch):
    torch.manual_seed(0)
    model = talking.TalkingHead(**SMALL)  # its UNet is zero: but for chance nothing moves
    monkeypatch.setattr(model, "chance_by_place", lambda: torch.zeros_like(model.place_weights))
    _, mel, reference, words = inputs()
    several = torch.stack([reference, -reference], dim=1)  # b n 3 H W
    frames = generate(model, several, mel, words, num_steps=1)
    assert torch.allclose(frames, reference[:, None].expand_as(frames), atol=1e-5)


# ---------------------------------------------------------------- motion


def blobs(num=3, size=64):
    """Return smooth random pictures [num 3 size size] in [-1, 1]."""
    noise = torch.randn(num, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(size, size), mode="bicubic").tanh()


def test_warp_takes_each_pixel_from_where_the_flow_points():
    pictures = blobs()
    # 4 pixels to the right and 2 up; 32 pixels are half a side.
    flow = torch.tensor([4.0, -2.0]).view(1, 2, 1, 1) / 32
    warped = talking.warp(pictures, flow.expand(3, 2, 8, 8))
    assert torch.allclose(warped[:, :, 2:, :-4], pictures[:, :, :-2, 4:], atol=1e-5)
    still = talking.warp(pictures, torch.zeros(3, 2, 8, 8))
    assert torch.allclose(still, pictures, atol=1e-5)


@pytest.mark.parametrize("pixels", [0.4, 1.5, 4.0])
def test_flow_is_recovered(pixels):
    source = blobs()
    flow = torch.zeros(3, 2, 8, 8)
    flow[:, 0] = pixels / 32
    flow[:, 1] = -pixels / 64
    flow[2] *= torch.linspace(0, 1, 8)  # one side stays, the other moves
    target = talking.warp(source, flow)
    found = talking.estimate_flow(source, target, 8)
    error = (found - flow)[:, :, 1:-1, 1:-1].abs().mean()  # border: taken from outside the picture
    assert float(error) < 0.03 * pixels / 32
    before = (source - target).square().mean()
    assert float((talking.warp(source, found) - target).square().mean()) < 0.005 * float(before)


def test_flow_is_recovered_where_most_edges_are_oblique():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    stripes = torch.stack([torch.sin(9 * (x + y) + phase) for phase in (0, 2, 4)])
    source = (stripes + 0.2 * torch.sin(7 * (x - y)))[None]  # horizontal and vertical change agree
    flow = torch.tensor([1.5, -0.75]).view(1, 2, 1, 1).expand(1, 2, 8, 8) / 32
    found = talking.estimate_flow(source, talking.warp(source, flow), 8)
    assert float((found - flow)[:, :, 1:-1, 1:-1].abs().mean()) < 0.1 * 1.5 / 32


def test_equal_pictures_have_no_flow_and_each_has_its_own():
    source = blobs()
    assert float(talking.estimate_flow(source, source, 8).abs().max()) < 1e-6
    together = talking.estimate_flow(source, source.flip(0), 8)
    alone = talking.estimate_flow(source[2:], source[:1], 8)
    assert torch.allclose(together[2:], alone, atol=1e-5)


@torch.no_grad()
def test_decode_inverts_encode_motion_where_the_autoencoder_is_exact():
    model = small_model()
    _, _, reference, _ = inputs()
    frames = torch.rand(2, 3, 3, 32, 32) * 2 - 1  # b f 3 H W
    frames[:, 0] = reference
    model.motion_std.copy_(torch.rand(6, 1, 1) + 0.5)
    autoencoder = model.autoencoder
    liveliness = torch.tensor([0.5, 2.0])
    motion, _ = model.encode_motion(frames, reference, liveliness)
    decoded = model.decode(motion / model.motion_std, reference, liveliness)

    def autoencoder_error(pictures):
        return autoencoder.decode(autoencoder.encode(pictures)) - pictures

    for clip in range(2):
        flow = liveliness[clip] * motion[clip, :, :2]
        warped = talking.warp(reference[clip].expand_as(frames[clip]), flow)
        # The error is the autoencoder's for the frame, less its error for the warped reference
        # where the two look alike.
        change = autoencoder_error(frames[clip]) + frames[clip] - autoencoder_error(warped) - warped
        change = F.pad(change.square().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        alike = torch.exp(-F.conv2d(change, torch.full((1, 1, 3, 3), 1 / 9)) / 0.04)
        assert alike.min() < 0.1 < 0.9 < alike.max()
        expected = autoencoder_error(frames[clip]) - alike * autoencoder_error(warped)
        assert torch.allclose(decoded[clip] - frames[clip], expected, atol=1e-4)


@torch.no_grad()
def test_no_motion_is_the_reference_itself():
    _, _, reference, _ = inputs()
    still = small_model().decode(torch.zeros(2, 3, 6, 4, 4), reference, torch.ones(2))
    assert torch.allclose(still, reference[:, None].expand_as(still), atol=1e-5)


def test_gradients_reach_the_residual_and_through_the_warped_picture_the_flow():
    model = small_model()
    _, _, reference, _ = inputs()
    x0 = 0.1 * torch.randn(2, 1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    x0.requires_grad_(True)
    weights = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (weights * model.decode(x0, reference, torch.ones(len(x0)))[:, 0]).sum().backward()
    assert x0.grad.abs().amax((0, 1, 3, 4)).min() > 0  # of every channel
    flow = x0.detach()[:, 0, :2].requires_grad_(True)
    (weights * talking.warp(reference, flow)).sum().backward()
    assert torch.allclose(x0.grad[:, 0, :2], flow.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_flow_that_diverged_does_not_crash(value):
    flow = torch.full((2, 2, 4, 4), value, requires_grad=True)
    picture = talking.warp(torch.rand(2, 3, 16, 16), flow)
    picture.sum().backward()
    assert picture.isfinite().all()


def test_the_weights_by_place_are_those_of_the_scaled_motion():
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(16, 6, 20, 40, generator=generator)
    motion = torch.randn(16, 6, 6, 4, 4, generator=generator)
    motion[:, :, :2] = 0.01 * mel[:, :, 8:12].mean((2, 3))[:, :, None, None, None]
    latents = torch.randn(16, 4, 4, 4, generator=generator)
    model.fit_statistics(motion, latents, mel, torch.ones(16))
    expected = talking.speech_weights(motion / model.motion_std, mel)
    assert expected.std() > 0.1 and torch.allclose(model.place_weights, expected)


@torch.no_grad()
def test_the_unet_is_its_blocks_with_skip_connections_and_a_learned_map():
    model = small_model()
    unet = model.unet
    xt, mel, reference, words = inputs(num_frames=3)
    conditions = model.encode_conditions(mel, reference, words)
    latents = torch.randn(2, 4, 4, 4)
    time = torch.full((2, 3), 0.4)
    temb = unet.embed_time(time, conditions)
    both = torch.cat([xt, latents[:, None].expand(-1, 3, -1, -1, -1)], 2).flatten(0, 1)
    place = nn.functional.interpolate(unet.position, (4, 4), mode="bilinear")
    fine = unet.down[0](unet.conv_in(both) + place, temb, conditions, 3)
    coarse = unet.down[1](unet.downsample[0](fine), temb, conditions, 3)
    coarse = unet.middle(coarse, temb, conditions, 3)
    wide = unet.upsample[0](coarse).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = unet.norm_out(unet.up[0](fine + wide, temb, conditions, 3))
    expected = unet.conv_out(h * h.sigmoid()) + unet.direct_path(temb, (4, 4))
    found = unet(xt, time, conditions, latents)
    assert torch.allclose(found, expected.unflatten(0, (2, 3)), atol=1e-5)
    temb = talking.sinusoid(torch.tensor([0.5]), 4)
    expected = [math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)]
    assert temb[0].tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_a_talking_block_is_convolution_space_conditions_and_time():
    torch.manual_seed(0)
    block = wake_up(talking.TalkingBlock(8, 16, 12, 6, heads=2, radius=2, spatial=True))
    conditions = {name: (torch.randn(2, 5, 6), torch.ones(2)) for name in talking.CONDITIONS}
    x, temb = torch.randn(6, 8, 4, 4), torch.randn(6, 12)
    h = block.resnet(x, temb).flatten(2).mT  # (b f) (h w) c
    h = block.time(block.conditions(block.space(h), conditions, 3), 3)
    assert torch.allclose(block(x, temb, conditions, 3), h.mT.unflatten(2, (4, 4)), atol=1e-5)
    narrow = talking.TalkingBlock(8, 16, 12, 6, heads=2, radius=2, spatial=False)
    assert isinstance(narrow.space, nn.Identity)


@torch.no_grad()
def test_self_attention_is_its_formula_and_starts_as_nothing():
    torch.manual_seed(0)
    layer = talking.SelfAttention(8, heads=2)
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), x)
    wake_up(layer)
    nn.init.normal_(layer.norm.weight)
    bias = torch.randn(1, 2, 5, 5)
    h = layer.norm(x)
    q, k, v = (
        f(h).unflatten(2, (2, 4)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v)
    )
    weights = (q @ k.mT / 4**0.5 + bias).softmax(-1)
    expected = x + layer.to_out((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x, bias), expected, atol=1e-5)


@torch.no_grad()
def test_the_bias_of_temporal_attention_is_by_distance():
    torch.manual_seed(0)
    layer = wake_up(talking.TemporalAttention(8, heads=2, radius=3))
    x = torch.randn(12, 5, 8)
    layer.bias[:, 3] = 100.0  # of distance 0: each frame attends to itself alone
    alone = torch.cat([layer(frame[None], 1) for frame in x])
    assert torch.allclose(layer(x, 12), alone, atol=1e-5)
