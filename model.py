"""The talking-head generator: autoencoder, condition encoders, spatio-temporal UNet, diffusion and samplers.

Axes: b clips, f frames, n images or tokens, c channels, h w pixels or latent grid, d features. Pixels are in [-1, 1].
"""

import copy
import functools
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

CONDITIONS = ("speech", "identity", "text")
KNOWN_FRAMES = 4  # that a window of a long clip takes over from the window before


# ---------------------------------------------------------------------------------------------- autoencoder


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice with a shortcut; `temb` [n, temb_channels] scales and shifts the second norm."""

    def __init__(self, in_channels, out_channels, groups, temb_channels=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.time_emb_proj = nn.Linear(temb_channels, 2 * out_channels) if temb_channels else None

    def forward(self, x, temb=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if temb is not None:
            scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map (the SD autoencoder's middle)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](h), "n 1 (h w) c -> n c h w", h=x.shape[2])


class MidBlock(nn.Module):
    def __init__(self, channels, groups, attention):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2 if attention else 1))

    def forward(self, x):
        x = self.resnets[0](x)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = resnet(attention(x))
        return x


class Resample(nn.Module):
    """Halve a feature map (strided conv, padded right and below only, as in SD) or double it (nearest, then conv)."""

    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """One resolution of the encoder or decoder: resnets, then a resampler named `resampler` unless it is None."""

    def __init__(self, in_channels, out_channels, layers, groups, resampler):
        super().__init__()
        channels = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in zip(channels, channels[1:]))
        self.resampler = resampler
        if resampler:
            self.add_module(resampler, nn.ModuleList([Resample(out_channels, up=resampler == "upsamplers")]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.resampler)[0](x) if self.resampler else x


class Encoder(nn.Module):
    def __init__(self, in_channels, out_channels, widths, layers, groups, attention):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], w, layers, groups, "downsamplers" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, in_channels, out_channels, widths, layers, groups, attention):
        super().__init__()
        widths = list(reversed(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], w, layers + 1, groups, "upsamplers" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder (Rombach et al. 2022); diffusers' state-dict names.

    With patch=1, linear_path=False and SD's widths this is the Stable Diffusion autoencoder. The small one works on
    `patch` x `patch` pixel blocks and adds a linear path that starts at the principal components of the data.
    """

    def __init__(self, latent_channels, block_out_channels, layers_per_block, norm_num_groups, scaling_factor,
                 patch, mid_attention, linear_path):
        super().__init__()
        self.patch, self.scaling_factor = patch, scaling_factor
        self.factor = patch * 2 ** (len(block_out_channels) - 1)
        shape = (block_out_channels, layers_per_block, norm_num_groups, mid_attention)
        pixels = 3 * patch**2
        self.encoder = Encoder(pixels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, pixels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.linear_in = self.linear_out = None
        if linear_path:
            self.linear_in = nn.Conv2d(3, latent_channels, self.factor, stride=self.factor)
            self.linear_out = nn.ConvTranspose2d(latent_channels, 3, self.factor, stride=self.factor)
            for conv in (self.quant_conv, self.decoder.conv_out):  # the convolutions start as a zero residual
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)
            self.quant_conv.bias.data[latent_channels:] = -6.0  # log variance of nearly exact latents

    @torch.no_grad()
    def init_linear_path(self, frames):
        """Start the linear path at the principal components of the `factor` x `factor` blocks of frames [n 3 H W]."""
        p, c = self.factor, self.linear_in.out_channels
        blocks = rearrange(frames, "n c (h p) (w q) -> (n h w) (c p q)", p=p, q=p).double()
        mean = blocks.mean(0)
        variance, axes = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        basis = axes.flip(1)[:, :c].T  # [c, 3 p p], largest variance first
        scale = variance.flip(0)[:c].mean().sqrt()  # one scale for all: the spectrum keeps its decay
        self.linear_in.weight.copy_((basis / scale).view(c, 3, p, p))
        self.linear_in.bias.copy_(-(basis @ mean) / scale)
        self.linear_out.weight.copy_((basis * scale).view(c, 3, p, p))
        self.linear_out.bias.copy_(mean.view(3, -1).mean(1))

    def moments(self, frames):
        """Mean and log variance [n c h w] of q(z | frames), before the scaling factor."""
        blocks = F.pixel_unshuffle(frames, self.patch) if self.patch > 1 else frames
        mean, log_variance = self.quant_conv(self.encoder(blocks)).chunk(2, dim=1)
        if self.linear_in is not None:
            mean = mean + self.linear_in(frames)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, frames):
        """Frames [n 3 H W] in [-1, 1] -> mean latents [n c h w], scaled."""
        return self.moments(frames)[0] * self.scaling_factor

    def decode(self, latents):
        """Latents [n c h w] -> frames [n 3 H W] in about [-1, 1]."""
        z = latents / self.scaling_factor
        h = self.decoder(self.post_quant_conv(z))
        frames = F.pixel_shuffle(h, self.patch) if self.patch > 1 else h
        return frames if self.linear_out is None else frames + self.linear_out(z)


# ---------------------------------------------------------------------------------------------- conditions


class SpeechEncoder(nn.Module):
    """Log-mel windows around each frame -> one token for every frame's worth of sound in the window."""

    def __init__(self, num_mels, window, dim, mels_per_frame=4):
        super().__init__()
        self.window = window  # video frames
        self.conv = nn.Sequential(
            nn.Conv1d(num_mels, dim, 3, padding=1), nn.SiLU(),
            nn.Conv1d(dim, dim, mels_per_frame, stride=mels_per_frame), nn.SiLU(),
        )
        self.position = nn.Parameter(torch.randn(window, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(window * dim, dim)

    def forward(self, mel):
        """mel [b f n m] -> tokens [b f window+1 d], the last a summary."""
        h = self.conv(rearrange(mel, "b f n m -> (b f) m n"))  # (b f) d window
        tokens = rearrange(h, "n d w -> n w d") + self.position
        summary = self.proj(rearrange(tokens, "n w d -> n 1 (w d)"))  # a token that sees the whole window
        return rearrange(self.norm(torch.cat([tokens, summary], dim=1)), "(b f) w d -> b f w d", b=len(mel))


class IdentityEncoder(nn.Module):
    """Reference picture -> identity tokens, a 4 x 4 grid of them at any picture size."""

    def __init__(self, dim, widths=(24, 48, 96)):
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.conv = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Conv2d(channels, dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, reference):
        """reference [b 3 H W], or [b n 3 H W] of n pictures of the person -> tokens [b (n 16) d]."""
        pictures = reference.flatten(0, -4)
        return self.norm(rearrange(self.conv(pictures), "(b n) d h w -> b (n h w) d", b=len(reference)))


class TextEncoder(nn.Module):
    """Prompts of a few words -> a token for each word and a summary; the words are those of the public captions."""

    def __init__(self, dim, num_words=256, max_words=8):
        super().__init__()
        self.words, self.max_words = [], max_words  # word i of the list is row i + 1; row 0 is no word
        self.table = nn.Embedding(num_words, dim, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)

    def get_extra_state(self):
        return self.words

    def set_extra_state(self, words):
        self.words = list(words)

    def learn_words(self, prompts):
        """Know the words of `prompts`, the most frequent first, as many as the table has rows for."""
        counts = Counter(word for prompt in prompts for word in split_words(prompt))
        self.words = sorted(counts, key=lambda word: (-counts[word], word))[:self.table.num_embeddings - 1]

    def ids(self, prompts):
        """Words [b max_words] of prompts as rows of the table, 0 where there is none; unknown words are left out."""
        rows = torch.zeros(len(prompts), self.max_words, dtype=torch.long)
        for row, prompt in zip(rows, prompts):
            known = [self.words.index(word) + 1 for word in split_words(prompt) if word in self.words][:self.max_words]
            row[:len(known)] = torch.tensor(known)
        return rows

    def forward(self, ids):
        """ids [b max_words] -> tokens [b max_words+1 d], the last a summary."""
        words = self.table(ids)
        return self.norm(torch.cat([words, self.mlp(words.sum(1, keepdim=True))], dim=1))


def split_words(prompt):
    return re.findall(r"[a-z']+", prompt.lower())


# ---------------------------------------------------------------------------------------------- UNet


def attend(q, k, v, heads, bias=None):
    """Multi-head attention of q [b n c] to k, v [b m c]."""
    q, k, v = (rearrange(x, "b n (k d) -> b k n d", k=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b k n d -> b n (k d)")


def zero_linear(dim):
    """A linear layer that starts at zero: what it closes starts as no more than its residual."""
    linear = nn.Linear(dim, dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Attention(nn.Module):
    """Pre-norm multi-head self-attention of b n d with a residual; zero at the start."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = zero_linear(dim)

    def forward(self, x, bias=None):
        h = self.norm(x)
        return x + self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads, bias))


class CrossAttention(nn.Module):
    """Decoupled cross-attention (Ye et al. 2023, Eq. 5): one query; every condition has its own keys, values and scale.

    A condition of scale 0 is one that is not there, also in training. Zero at the start.
    """

    def __init__(self, dim, heads, condition_dim, names):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.ModuleDict({name: nn.Linear(condition_dim, dim, bias=False) for name in names})
                                for _ in range(2))
        self.to_out = zero_linear(dim)

    def forward(self, x, conditions, num_frames):
        """x [(b f) n c]; conditions {name: (tokens, scale [b], ...)}, tokens b m d for the clip or b f m d by frame."""
        q, found = self.to_q(self.norm(x)), 0.0
        for name in self.to_k:
            tokens, scale, _ = conditions[name]
            shared = num_frames if tokens.dim() == 3 else 1  # frames that look at the same tokens
            tokens = tokens.flatten(0, -3)
            h = attend(rearrange(q, "(b f) n c -> b (f n) c", f=shared), self.to_k[name](tokens), self.to_v[name](tokens),
                       self.heads)
            h = rearrange(h, "b (f n) c -> (b f) n c", f=shared)
            found = found + scale.repeat_interleave(num_frames)[:, None, None] * h
        return x + self.to_out(found)


class TemporalAttention(nn.Module):
    """Attention along time at every position, with a learned bias by distance and a reach of `reach` frames.

    Only distances matter, so a clip longer than those of training is no different to any of its frames.
    """

    def __init__(self, dim, heads, reach):
        super().__init__()
        self.reach = reach
        self.attention = Attention(dim, heads)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * reach + 1))

    def forward(self, x, num_frames):
        """x [(b f) n d] -> the same shape."""
        frame = torch.arange(num_frames, device=x.device)
        distance = frame[None] - frame[:, None]
        bias = self.bias[:, distance.clamp(-self.reach, self.reach) + self.reach]
        bias = bias.masked_fill(distance.abs() > self.reach, -math.inf)[None]  # 1 h f f: fused if nothing is trained
        h = rearrange(x, "(b f) n d -> (b n) f d", f=num_frames)
        return rearrange(self.attention(h, bias), "(b n) f d -> (b f) n d", n=x.shape[1])


class TalkingBlock(nn.Module):
    """Convolve, then attend to space, to the conditions and to time."""

    def __init__(self, in_channels, channels, temb_channels, condition_dim, heads, reach, spatial):
        super().__init__()
        self.resnet = ResnetBlock(in_channels, channels, 8, temb_channels)
        self.space = Attention(channels, heads) if spatial else None
        self.conditions = CrossAttention(channels, heads, condition_dim, CONDITIONS)
        self.time = TemporalAttention(channels, heads, reach)

    def forward(self, x, temb, conditions, num_frames):
        x = self.resnet(x, temb)  # (b f) c h w
        height = x.shape[2]
        x = rearrange(x, "n c h w -> n (h w) c")
        if self.space is not None:
            x = self.space(x)
        x = self.conditions(x, conditions, num_frames)
        x = self.time(x, num_frames)
        return rearrange(x, "n (h w) c -> n c h w", h=height)


class TalkingUNet(nn.Module):
    """Denoise motion clips given speech, identity and text tokens and the reference latent."""

    def __init__(self, motion_channels, latent_channels, channels, condition_dim, heads, reach, checkpointing=False):
        super().__init__()
        temb = 4 * channels[0]
        self.frequencies, self.checkpointing = channels[0], checkpointing
        self.time_mlp = nn.Sequential(nn.Linear(channels[0], temb), nn.SiLU(), nn.Linear(temb, temb))
        self.modulation = nn.ModuleDict({name: nn.Linear(condition_dim, temb, bias=False) for name in ("speech", "text")})
        self.position = nn.Parameter(torch.randn(1, channels[0], 8, 8) * 0.02)
        self.conv_in = nn.Conv2d(motion_channels + latent_channels, channels[0], 3, padding=1)

        def block(i, o, level):
            return TalkingBlock(i, o, temb, condition_dim, heads, reach, spatial=level > 0)

        self.down = nn.ModuleList(block(channels[max(i - 1, 0)], c, i) for i, c in enumerate(channels))
        self.shrink = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.middle = block(channels[-1], channels[-1], len(channels))
        self.grow = nn.ModuleList(nn.Conv2d(channels[i + 1], c, 1) for i, c in reversed(list(enumerate(channels[:-1]))))
        self.up = nn.ModuleList(block(c, c, i) for i, c in reversed(list(enumerate(channels[:-1]))))
        self.norm_out = nn.GroupNorm(8, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], motion_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def embed(self, t, conditions):
        """What scales and shifts each frame [(b f) d]: its time t [b f] in [0, 1], and the summaries of speech and text."""
        temb = self.time_mlp(sinusoid(1000 * t.flatten(), self.frequencies)).unflatten(0, t.shape)  # b f d
        for name, layer in self.modulation.items():
            tokens, scale, _ = conditions[name]
            summary = layer(tokens[..., -1, :]) * scale.view(-1, *[1] * (tokens.dim() - 2))
            temb = temb + (summary if summary.dim() == 3 else summary[:, None])
        return F.silu(temb.flatten(0, 1))

    def forward(self, xt, t, conditions, reference_latents):
        """xt [b f m h w], t [b f] in [0, 1], conditions as in `CrossAttention`, reference [b c h w] -> [b f m h w]."""
        num_frames = xt.shape[1]
        temb = self.embed(t, conditions)
        reference = repeat(reference_latents, "b c h w -> b f c h w", f=num_frames)
        x = self.conv_in(rearrange(torch.cat([xt, reference], dim=2), "b f c h w -> (b f) c h w"))
        x = x + F.interpolate(self.position, size=x.shape[-2:], mode="bilinear", align_corners=False)

        def run(block, x):  # checkpointing keeps a block's input only, and works the rest out again on the way back
            again = self.checkpointing and self.training
            how = functools.partial(checkpoint, block, use_reentrant=False) if again else block
            return how(x, temb, conditions, num_frames)

        skips = []
        for block, shrink in zip(self.down, self.shrink):
            skips.append(run(block, x))
            x = shrink(skips[-1])
        x = run(self.middle, run(self.down[-1], x))
        for grow, block in zip(self.grow, self.up):
            x = run(block, skips.pop() + F.interpolate(grow(x), scale_factor=2.0))
        return rearrange(self.conv_out(F.silu(self.norm_out(x))), "(b f) c h w -> b f c h w", f=num_frames)


def sinusoid(t, dim):
    """Sinusoidal embedding [b, dim] of t [b] (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ---------------------------------------------------------------------------------------------- diffusion


class Diffusion:
    """The forward process q (Eq. 2-4), the two parametrisations of its inverse, and two samplers."""

    def __init__(self, num_steps, schedule, prediction, zero_terminal_snr):
        if prediction == "eps" and zero_terminal_snr:
            raise ValueError("diffusion.prediction: eps says nothing about x0 at zero SNR; use v, "
                             "or zero_terminal_snr: false")
        self.num_steps, self.prediction = num_steps, prediction
        self.alpha_bar = noise_schedule(num_steps, schedule, zero_terminal_snr).float()

    def coefficients(self, t, like):
        """sqrt(alpha_bar), sqrt(1 - alpha_bar) at integer t [b] or, by frame, [b f], shaped to multiply `like` [b f ...].

        t = -1 is a frame without noise.
        """
        alpha_bar = self.alpha_bar.to(like.device)[t].where(t >= 0, 1.0).view(*t.shape, *[1] * (like.dim() - t.dim()))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0, t, eps):
        """q(x_t | x_0): sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Eq. 4)."""
        signal, noise = self.coefficients(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0, t, eps):
        """What the network is to say: eps (Eq. 5), x0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans &
        Ho 2022)."""
        signal, noise = self.coefficients(t, x0)
        return {"eps": eps, "x0": x0}.get(self.prediction, signal * eps - noise * x0)

    def split(self, output, xt, t):
        """Network output -> (x0, eps), the same statement in the two other coordinates."""
        signal, noise = self.coefficients(t, xt)
        if self.prediction == "eps":
            return (xt - noise * output) / signal, output
        if self.prediction == "x0":
            return output, (xt - signal * output) / noise.clamp(min=1e-3)  # without noise both are zero
        return signal * xt - noise * output, noise * xt + signal * output

    def timesteps(self, num_steps):
        """Trailing timesteps T-1 ... (Lin et al. 2024, Tab. 2): sampling starts at the noisiest step of training."""
        return torch.linspace(self.num_steps, 0, num_steps + 1)[:-1].round().long() - 1

    def sample(self, network, noise, num_steps, solver="dpm"):
        """Solve the probability-flow ODE from `noise` [b ...]; `network(xt, t)` returns its output for t [b].

        solver "ddim" (Song et al. 2021, eta = 0) or "dpm" (DPM-Solver++(2M), Lu et al. 2022, Algorithm 2).
        """
        xt, previous_x0, previous_h = noise, None, None
        times = self.timesteps(num_steps)
        alpha_bar = torch.cat([self.alpha_bar[times], torch.ones(1)]).double()
        log_snr = (alpha_bar.log() - (1 - alpha_bar).log()) / 2  # lambda = log(signal / noise); -inf ... +inf
        for i, step in enumerate(times):
            t = torch.full((len(xt),), int(step), device=xt.device)
            x0, _ = self.split(network(xt, t), xt, t)
            h = log_snr[i + 1] - log_snr[i]
            guess = x0
            if solver == "dpm" and i > 0 and i + 1 < len(times):  # first and last step are of first order
                guess = x0 + (x0 - previous_x0) * float(h / previous_h / 2)
            signal, ratio = alpha_bar[i + 1].sqrt(), ((1 - alpha_bar[i + 1]) / (1 - alpha_bar[i])).sqrt()
            xt = float(ratio) * xt + float(signal * -torch.expm1(-h)) * guess
            previous_x0, previous_h = x0, h
        return xt


def noise_schedule(num_steps, schedule, zero_terminal_snr):
    """alpha_bar [T] in float64: `linear` betas (Ho et al. 2020) or `cosine` (Nichol & Dhariwal 2021)."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64) * (1000 / num_steps)
        alpha_bar = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
    else:
        root = torch.cos((torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2)
        alpha_bar = torch.cumprod((root[1:] / root[:-1]).square().clamp(min=1e-3), dim=0)  # betas of at most 0.999
    if zero_terminal_snr:  # Lin et al. 2024, Algorithm 1: shift the last root to 0, keep the first
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


# ---------------------------------------------------------------------------------------------- the whole


def warp(pictures, flow):
    """Pictures [n c H W] with pixel p taken from p + flow(p); flow [n 2 h w] is (x, y) in half sides, on any grid."""
    flow = flow.nan_to_num()  # of a network that diverged: grid_sample's backward pass would crash the process
    flow = F.interpolate(flow, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
    identity = torch.eye(2, 3, device=flow.device).expand(len(flow), 2, 3)
    grid = F.affine_grid(identity, pictures.shape, align_corners=False) + rearrange(flow, "n k h w -> n h w k")
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def estimate_flow(source, target, side, damping=0.05):
    """Flow [n 2 side side] for which warp(source [1 3 H W], flow) is like target [n 3 H W]: Lucas & Kanade (1981), coarse
    to fine.

    Every cell solves its 2 x 2 normal equations over itself and its neighbours; between steps the flow is smoothed.
    """
    flow = target.new_zeros(len(target), 2, side, side)
    for shrink, iterations in ((4, 3), (2, 4), (1, 1)):
        size = max(source.shape[-1] // shrink, side)
        small, aim = (F.avg_pool2d(x, source.shape[-1] // size) for x in (source, target))
        small = small.expand_as(aim)
        for _ in range(iterations):
            warped = warp(small, flow)
            error = aim - warped
            across = F.pad(warped[..., 2:] - warped[..., :-2], (1, 1, 0, 0)) * size / 4  # per half side
            down = F.pad(warped[..., 2:, :] - warped[..., :-2, :], (0, 0, 1, 1)) * size / 4
            pairs = ((across, across), (across, down), (down, down), (across, error), (down, error))
            products = [(x * y).sum(1) for x, y in pairs]
            a, b, c, p, q = neighbourly(F.avg_pool2d(torch.stack(products, 1), size // side)).unbind(1)
            a, c = a + damping, c + damping
            step = torch.stack([c * p - b * q, a * q - b * p], 1) / (a * c - b * b)[:, None]
            flow = (flow + step + neighbourly(flow + step)) / 2
    return flow


def neighbourly(x):
    """Mean of each cell of x [n c h w] and its eight neighbours."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def sounds_of(mel):
    """What a linear model hears: levels of a quarter as many bands, every 20 ms, mel [... f n m] -> [... f d]."""
    return F.avg_pool2d(mel, (2, 4)).flatten(-2)


class GaussianPrior(nn.Module):
    """Clips x0 [b f c h w] as a Gaussian: how x0 varies together over places and times, what speech and words add to its
    mean, which is zero without, and the best linear denoiser that follows from it.

    Cov = K (x) (modes diag(variance) modes^T + rest (I - modes modes^T)), K the autocorrelation over frames.
    """

    def __init__(self, num_values, num_modes, num_words, num_sounds, num_lags=25):
        super().__init__()
        self.register_buffer("heard", torch.zeros(num_sounds + 1, num_values))  # the last row is a constant
        self.register_buffer("said", torch.zeros(num_words, num_modes))  # row 0 is no word
        self.register_buffer("modes", torch.eye(num_values, num_modes))
        self.register_buffer("variance", torch.ones(num_modes))
        self.register_buffer("rest", torch.ones(()))
        self.register_buffer("correlation", torch.ones(num_lags))

    @torch.no_grad()
    def fit(self, x0):
        """Measure the covariance on clips x0 [b f c h w] of at least two frames."""
        flat = rearrange(x0, "b f c h w -> (b f) (c h w)")
        _, scale, modes = torch.pca_lowrank(flat, q=self.modes.shape[1], center=False, niter=4)
        self.modes.copy_(modes)
        self.variance.copy_(scale**2 / len(flat))
        left = flat.square().sum() / len(flat) - self.variance.sum()
        self.rest.copy_((left / max(1, flat.shape[1] - len(scale))).clamp(min=1e-6))
        lags = [(x0[:, lag:] * x0[:, :x0.shape[1] - lag]).mean() / x0.square().mean() for lag in range(x0.shape[1])]
        lags += [lags[-1]] * len(self.correlation)  # slower than a window: as if it stayed
        self.correlation.copy_(torch.stack(lags[: len(self.correlation)]))

    @torch.no_grad()
    def fit_speech(self, clips, mels, swift, regress):
        """Measure what speech adds: to each value of clips x0 [f c h w], from what each frame hears, mels [f n m].

        `swift` takes away slow changes, which say nothing of speech, and `regress` tells values from sounds, lists of [f d]
        (`metrics.swift`, `metrics.shrunk_ridge`). What speech explains is no longer left to chance.
        """
        sounds, values = [sounds_of(mel) for mel in mels], [swift(x0.flatten(1)) for x0 in clips]
        average, sounds = torch.cat(sounds).mean(0), [swift(sound) for sound in sounds]
        told = regress([x.double() for x in sounds], [y.double() for y in values]).to(average)
        self.heard.copy_(torch.cat([told, -average[None] @ told]))
        true, said = torch.cat(values) @ self.modes, torch.cat(sounds) @ told @ self.modes
        self.variance.sub_((true.square() - (true - said).square()).mean(0).clamp(min=0)).clamp_(min=1e-6)

    @torch.no_grad()
    def fit_words(self, means, words, reference_words, regress):
        """Measure what words add: means [n c h w] over time of clips whose prompts are `words` [n k], as seen from pictures
        out of clips whose prompts are `reference_words` [n k]; `regress` as in `fit_speech`."""
        said, shown = (F.one_hot(ids, len(self.said)).sum(1)[:, 1:].double() for ids in (words, reference_words))
        values = means.flatten(1) @ self.modes  # n modes
        self.said[1:] = regress(list((said - shown)[:, None]), list(values.double()[:, None]))

    def means(self, mel, words):
        """What speech mel [b f n m] and words [b n] add to the mean: [b f d] and [b 1 d]."""
        return (sounds_of(mel) @ self.heard[:-1] + self.heard[-1], self.said[words].sum(1, keepdim=True) @ self.modes.T)

    def mean_variance(self):
        """Variance of x0, averaged over places."""
        num_values, num_modes = self.modes.shape
        return (self.variance.sum() + (num_values - num_modes) * self.rest) / num_values

    def denoise(self, xt, signal, noise, mean):
        """E[x0 | xt] for xt = signal x0 + noise eps (coefficients [b f 1 1 1]: frames of less noise inform the others), of
        clips whose mean is `mean` [b f d], and the deviation [b f c h w] that it leaves at each place.

        In a mode of variance v, frames less their mean are N(0, v K): the gain is v K S (v S K S + N^2)^-1, with S and N the
        coefficients. With N^-1 S K S N^-1 = U diag(snr) U^T it is K S N^-1 U diag(v / (v snr + 1)) U^T N^-1: one
        decomposition serves all modes. In float64, frames without noise may be said to have 1e-5.
        """
        between = self.between_frames(xt.shape[1])
        shape, signal, noise = signal.shape, signal.flatten(1).double(), noise.flatten(1).double().clamp(min=1e-5)  # b f
        ratio = signal / noise
        snr, axes = torch.linalg.eigh(ratio[:, :, None] * between * ratio[:, None])
        apart = axes.mT / noise[:, None]  # U^T N^-1: into coordinates that no mode mixes
        back = between * signal[:, None] @ apart.mT  # b f g: and out of them
        variance = torch.cat([self.variance, self.rest[None]]).double()
        shrink = variance / (variance * snr.clamp(min=0)[..., None] + 1)  # b g k+1
        left = (between.diagonal()[:, None] * variance - back.square() @ (variance * shrink)).clamp(min=0)  # b f k+1
        signal, apart, back, shrink, left = (x.to(xt) for x in (signal.view(shape), apart, back, shrink, left))
        mean = mean.view_as(xt)
        flat = apart @ (xt - signal * mean).flatten(2)  # b g d
        guess = (flat @ self.modes * (shrink[..., :-1] - shrink[..., -1:])) @ self.modes.T + flat * shrink[..., -1:]
        deviation = (left[..., -1:] + (left[..., :-1] - left[..., -1:]) @ (self.modes**2).T).clamp(min=0).sqrt()  # b f d
        return mean + (back @ guess).view_as(xt), deviation.view_as(xt)

    def between_frames(self, num_frames):
        """The correlation matrix K [f f] of frames by their distance, made positive definite, in float64."""
        frame = torch.arange(num_frames, device=self.correlation.device)
        lag = (frame[None] - frame[:, None]).abs().clamp(max=len(self.correlation) - 1)
        slowness, times = torch.linalg.eigh(self.correlation[lag].double())
        return times * slowness.clamp(min=1e-3) @ times.T


class TalkingHead(nn.Module):
    """Autoencoder, condition encoders, UNet and diffusion in one: what is pretrained, adapted and sampled.

    A frame is the reference picture, warped, and what its latent then lacks. x0 [b f m h w] holds both: two channels of
    flow and the latent's channels of residual, on the latent grid, each divided by its spread.
    """

    def __init__(self, autoencoder, unet, speech, diffusion, size, prior_modes):
        super().__init__()
        self.autoencoder = AutoencoderKL(**autoencoder)
        self.speech_encoder = SpeechEncoder(**speech)
        self.identity_encoder = IdentityEncoder(speech["dim"])
        self.text_encoder = TextEncoder(speech["dim"])
        latent_channels = autoencoder["latent_channels"]
        self.motion_channels = 2 + latent_channels
        self.unet = TalkingUNet(self.motion_channels, latent_channels, **unet, condition_dim=speech["dim"])
        self.diffusion = Diffusion(**diffusion)
        self.side = size // self.autoencoder.factor
        num_values = self.motion_channels * self.side**2
        num_sounds = 2 * speech["window"] * (speech["num_mels"] // 4)
        self.prior = GaussianPrior(num_values, min(prior_modes, num_values), self.text_encoder.table.num_embeddings,
                                   num_sounds)
        self.register_buffer("spread", torch.ones(self.motion_channels, 1, 1))
        self.register_buffer("reference_spread", torch.ones(latent_channels, 1, 1))

    @torch.no_grad()
    def set_statistics(self, motion, reference_latents):
        """Measure spread and prior on motion [b f m h w], not yet spread, and reference latents [b c h w].

        The spread is that of a typical mode, not of a typical number: numbers that move together outshout the noise
        together, and half of the noise levels would find nothing left to say (Hoogeboom et al. 2023, Sec. 3.1).
        """
        self.reference_spread.copy_(reference_latents.std(dim=(0, 2, 3))[:, None, None])
        for part in (slice(0, 2), slice(2, None)):
            flat = rearrange(motion[:, :, part], "b f m h w -> (b f) (m h w)")
            variance = torch.pca_lowrank(flat, q=min(64, *flat.shape), center=False, niter=4)[1] ** 2 / len(flat)
            self.spread[part] = (variance.square().sum() / variance.sum()).sqrt()
        self.prior.fit(motion / self.spread)

    def learn_speech(self, motions, mels, swift, regress):
        """Measure what the sound of each clip, a list of [f n m], adds to its motion [f m h w], not yet spread
        (`GaussianPrior.fit_speech`)."""
        self.prior.fit_speech([motion.to(self.spread) / self.spread for motion in motions],
                              [mel.to(self.spread) for mel in mels], swift, regress)

    def learn_expressions(self, views, regress):
        """Measure what each word of a prompt adds to the mean motion, on views of clips that do not show it (data.View;
        `GaussianPrior.fit_words`)."""
        if views:
            device, (prompts, shown) = self.spread.device, zip(*((v.prompt, v.shown) for v in views))
            means = torch.stack([v.motion.mean(0) for v in views]).to(device) / self.spread
            words, shown = (self.text_encoder.ids(said).to(device) for said in (prompts, shown))
            self.prior.fit_words(means, words, shown, regress)

    @torch.no_grad()
    def motion(self, frames, latents, reference):
        """Frames [f 3 H W], whose latents are [f c h w], as the motion of reference [3 H W]: flow and latent residual
        [f m h w], not yet spread."""
        flow = estimate_flow(reference[None], frames, self.side)
        residual = latents - self.autoencoder.encode(warp(reference.expand_as(frames), flow))
        return torch.cat([flow, residual], dim=1)

    def decode(self, x0, reference):
        """x0 [b f m h w], reference [b 3 H W] -> frames [b f 3 H W] in about [-1, 1].

        The residual enters as the difference that it makes to the decoded picture: what the autoencoder loses of the
        reference (a pattern, a strand of hair) is not lost where nothing but the flow is needed. Gradients reach the flow
        through the warped picture only: through the two decodings they cancel, but for terms of the residual's size.
        """
        flow, residual = rearrange(x0 * self.spread, "b f m h w -> (b f) m h w").split([2, self.motion_channels - 2], 1)
        warped = warp(repeat(reference, "b c h w -> (b f) c h w", f=x0.shape[1]), flow)
        with torch.no_grad():
            latents = self.autoencoder.encode(warped)
            without = self.autoencoder.decode(latents)
        frames = warped + self.autoencoder.decode(latents + residual) - without
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(x0))

    def conditions(self, mel, reference, words, scales=None):
        """{name: (tokens, scale [b], mean [b 1 d] or [b f d])} of mel [b f n m], reference [b 3 H W] or several
        [b n 3 H W], and words [b n]: mean is what the condition adds to the prior's.

        `scales` {name: number or [b]} are 1 where not given; a clip without words has none of text's.
        """
        said = (words > 0).any(1).float()
        scale = {name: torch.ones_like(said) * (scales or {}).get(name, 1.0) for name in CONDITIONS}
        spoken, worded = self.prior.means(mel, words)
        return {"speech": (self.speech_encoder(mel), scale["speech"], spoken),
                "identity": (self.identity_encoder(reference), scale["identity"], torch.zeros_like(worded)),
                "text": (self.text_encoder(words), scale["text"] * said, worded)}

    def forward(self, xt, t, conditions, reference_latents):
        """What the network states, in the diffusion's parametrisation, for integer t [b] or, by frame, [b f].

        For x0 the UNet sees the prior's linear guess and corrects it, by as much as the prior leaves open at each place
        (Karras et al. 2022, Sec. 5, with the data's covariance for sigma_data). At pure noise the guess is what speech and
        words let expect, zero without any, and frames without noise (t = -1) are as given: the others go on from them.
        """
        t = t if t.dim() == 2 else t[:, None].expand(xt.shape[:2])
        guess, deviation = xt, None
        if self.diffusion.prediction == "x0":
            with torch.autocast(xt.device.type, enabled=False):  # bfloat16 is for what corrects the guess
                mean = sum(scale[:, None, None] * mean for _, scale, mean in conditions.values()).expand(*xt.shape[:2], -1)
                guess, deviation = self.prior.denoise(xt, *self.diffusion.coefficients(t, xt), mean)
        shown = conditions["identity"][1].view(-1, 1, 1, 1)  # identity of scale 0 hides the picture, too
        output = self.unet(guess, (t.float() + 1) / self.diffusion.num_steps, conditions,
                           shown * reference_latents / self.reference_spread)
        return output if deviation is None else guess + deviation * output

    def loss(self, output, target, t):
        """Squared error [b] at t [b f]; that of x0 as a share of the clip's own x0, so that calm clips count as much as
        lively ones, times 1 / (1 - alpha_bar), as if v had been said."""
        error = (output - target).square().flatten(2).mean(2)  # b f
        if self.diffusion.prediction == "x0":
            _, noise = self.diffusion.coefficients(t, target)
            own = target.square().flatten(1).mean(1, keepdim=True).clamp(min=0.25 * self.prior.mean_variance())
            error = error / own / noise.flatten(1).square().clamp(min=0.05)
        return error.mean(1)

    def sample(self, conditions, reference_latents, noise, known, num_steps, guidance, solver):
        """x0 [b f m h w] from `noise`; its first frames are those of `known` [b k m h w].

        With `guidance` the network says more of what tells a clip with its speech from one without (Ho & Salimans 2022);
        among many steps every second one takes that difference from the step before.
        """
        k, speech, lead = known.shape[1], conditions["speech"], 0.0
        silent = conditions | {"speech": (speech[0], torch.zeros_like(speech[1]), speech[2])}
        both = {name: tuple(torch.cat(pair) for pair in zip(conditions[name], silent[name])) for name in CONDITIONS}
        every = 2 if guidance > 1 and num_steps > 3 else 1
        compared = self.diffusion.timesteps(num_steps)[::every].tolist() if guidance != 1.0 else []

        def network(xt, t):
            nonlocal lead
            step, t = int(t[0]), t[:, None].repeat(1, xt.shape[1])
            t[:, :k] = -1
            inputs = [torch.cat([known, xt[:, k:]], dim=1), t, conditions, reference_latents]
            if step not in compared:
                return self(*inputs) + (guidance - 1) * lead
            said, unsaid = self(*(both if x is conditions else torch.cat([x, x]) for x in inputs)).chunk(2)
            lead = said - unsaid
            return unsaid + guidance * lead

        new = self.diffusion.sample(network, noise, num_steps, solver)[:, k:]
        return torch.cat([known, glide(known[:, -1:], new)], dim=1) if k else new

    @torch.inference_mode()
    def stream(self, reference, mel, words, generator, num_steps, guidance=1.0, solver="dpm", scales=None, window=None,
               emphasis=1.0):
        """Frames [b w 3 H W] in [-1, 1], a window at a time, of `reference` [b 3 H W] speaking `mel` [b f n m].

        The first of several references [b n 3 H W] is the one that moves; words [b n] are the prompt's; guidance > 1
        exaggerates the effect of speech (Ho & Salimans 2022) at twice the cost; emphasis > 1 how far what the prior's mean
        takes from speech is from its average, after sampling and at no cost. Every window goes on from the last
        KNOWN_FRAMES of the one before and is anchored on the reference again: memory does not grow with the clip, and
        neither does what goes wrong. The first is half as long, so that its frames come sooner.
        """
        first = reference if reference.dim() == 4 else reference[:, 0]
        latents, (num_clips, num_frames) = self.autoencoder.encode(first), mel.shape[:2]
        known, start = latents.new_zeros(num_clips, 0, self.motion_channels, *latents.shape[2:]), 0
        average, _ = self.prior.means(mel.mean(1, keepdim=True), words)
        while start < num_frames:
            heard = mel[:, start - known.shape[1]:][:, :window if start or not window else window // 2]
            noise = torch.randn(num_clips, heard.shape[1], *known.shape[2:], generator=generator).to(latents.device)
            conditions = self.conditions(heard, reference, words, scales)
            x0 = self.sample(conditions, latents, noise, known, num_steps, guidance, solver)
            new = x0[:, known.shape[1]:]
            _, scale, spoken = conditions["speech"]
            more = (emphasis - 1) * scale[:, None, None] * (spoken[:, known.shape[1]:] - average)
            yield self.decode(new + more.view_as(new), first).clamp(-1, 1)
            known, start = x0[:, -KNOWN_FRAMES:], start + new.shape[1]

    def generate(self, *args, **kwargs):
        """The whole of `stream` [b f 3 H W]; without `window`, in one."""
        return torch.cat(list(self.stream(*args, **kwargs)), dim=1)


def glide(last, new):
    """New frames [b n ...] that go on from `last` [b 1 ...]: the first is moved to where the second's step leads, and the
    others by ever less of that (inertialisation, Bollo 2018)."""
    gap = last + new[:, :2][:, -1:] - 2 * new[:, :1]
    return new + gap * (0.6 ** torch.arange(new.shape[1], device=new.device)).view(1, -1, *[1] * (new.dim() - 2))


class EMA:
    """Exponential moving average of a module's parameters, with the warm-up (1 + step) / (10 + step)."""

    def __init__(self, module, decay):
        self.module, self.decay, self.step = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module):
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for average, current in zip(self.module.parameters(), module.parameters()):
            average.lerp_(current, 1 - decay)
