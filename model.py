"""The talking-head generator: autoencoder, condition encoders, spatio-temporal UNet, diffusion,
sampler.

A frame is the reference picture, warped by a coarse flow, plus a residual: the latents of the frame
minus those of the warped picture. Two channels of flow and c of residual on the latent grid,
divided by the clip's liveliness, are its *motion*. Divided by their standard deviations, too, they
are x0 of the diffusion, so that the network need not draw the face, which the reference shows.

Before any network, x0 is modelled as a Gaussian N(0, S) whose covariance S = K (x) (U diag(v) U^T +
r (I - U U^T)) is measured on public clips (K: correlation of frames; U: leading modes of a frame;
v: their variances; r: variance in all other directions). The best linear denoiser of a Gaussian is
    D(xt) = E[x0 | xt] = a S (a^2 S + s^2 I)^-1 xt,
    a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar).
With the posterior standard deviation d_t at each place, the network corrects it: x0_hat = D(xt) +
d_t * UNet(D(xt), t, c). With S = sigma_data^2 I this is the preconditioning of Karras et al. 2022
(EDM), Eq. 7 and Table 1: c_skip xt is D(xt) and c_out is d_t. The linear part needs no training;
the network only has to learn what depends on speech and identity.

A direct path leads from the embedding of time, speech and prompt to the UNet's output. It predicts
the motion that speech causes in all faces alike. It is trained first, in pure noise, at a twentieth
of the UNet's cost per frame.

Axes: b clips, f frames, n pictures, tokens or mel steps, c channels, h w pixels or latent grid, m
motion channels (the bands of a mel spectrogram; keys in attention), d features. Pixels are in
[-1, 1].
"""

import math
import unicodedata
from collections import Counter

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

CONDITIONS = ("speech", "identity", "text")
LATENT_CHANNELS = 16
KNOWN_FRAMES = 4  # frames that a window of a long clip shares with the window before
# Channels of each group in every GroupNorm. With a number that is no multiple of 8, torch's kernel
# for channels_last takes 10 to 40 times as long on CPUs.
GROUP_CHANNELS = 8


# ---------------------------------------------------------------- autoencoder


def group_norm(channels):
    """Return a GroupNorm (Wu & He 2018) of groups of GROUP_CHANNELS channels."""
    return nn.GroupNorm(channels // GROUP_CHANNELS, channels, eps=1e-6)


def zeroed(layer):
    """Set weight and bias to zero, so that the block or path that ends in this layer outputs zero
    at the start of training; return the layer.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU, convolution, with a shortcut; `temb` scales and shifts after the
    second norm.
    """

    def __init__(self, in_channels, out_channels, temb_channels=0):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        if temb_channels:
            self.time_projection = nn.Linear(temb_channels, 2 * out_channels)

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))  # n i h w -> n o h w
        h = self.norm2(h)
        if temb is not None:
            scale, shift = self.time_projection(temb)[:, :, None, None].chunk(2, dim=1)  # n o 1 1
            h = h * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class AutoencoderKL(nn.Module):
    """KL-regularised convolutional autoencoder (Rombach et al. 2022) added to a linear one.

    The linear path starts at the principal components of the data's blocks of pixels; the
    convolutions start as a zero residual and learn what it misses. Each side of a picture shrinks
    by `factor`, 4 (pixel unshuffle) times 2 for each width after the first.
    """

    def __init__(self, latent_channels, channels):
        super().__init__()
        if latent_channels < 1 or not channels or any(width % GROUP_CHANNELS for width in channels):
            raise ValueError(
                "the autoencoder needs latent channels and widths that are multiples of "
                f"{GROUP_CHANNELS}, not {latent_channels} and {list(channels)}"
            )
        patch = 4
        self.factor = patch * 2 ** (len(channels) - 1)
        if latent_channels > 3 * self.factor**2:  # the linear path has no more components
            raise ValueError(
                f"a block of pixels has {3 * self.factor**2} values: too few for {latent_channels} "
                "latent channels"
            )
        # The encoder only corrects a linear projection: half as wide as the decoder.
        slim = [max(1, width // 2 // GROUP_CHANNELS) * GROUP_CHANNELS for width in channels]
        encoder = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch**2, slim[0], 3, padding=1),
            ResnetBlock(slim[0], slim[0]),
        ]
        for narrow, wide in zip(slim, slim[1:]):
            encoder += [
                nn.Conv2d(narrow, narrow, 3, stride=2, padding=1),
                ResnetBlock(narrow, wide),
            ]
        encoder += [
            ResnetBlock(slim[-1], slim[-1]),
            group_norm(slim[-1]),
            nn.SiLU(),
            zeroed(nn.Conv2d(slim[-1], 2 * latent_channels, 3, padding=1)),
        ]
        decoder = [nn.Conv2d(latent_channels, channels[-1], 3, padding=1)]
        decoder += [ResnetBlock(channels[-1], channels[-1]) for _ in range(3)]
        for wide, narrow in zip(channels[::-1], channels[-2::-1]):
            decoder += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(wide, wide, 3, padding=1),
                ResnetBlock(wide, narrow),
                ResnetBlock(narrow, narrow),
            ]
        decoder += [
            group_norm(channels[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1)),
            nn.PixelShuffle(patch),
        ]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.linear_in = nn.Conv2d(3, latent_channels, self.factor, stride=self.factor)
        self.linear_out = nn.ConvTranspose2d(latent_channels, 3, self.factor, stride=self.factor)
        self.encoder[-1].bias.data[latent_channels:] = -6.0  # log variance of nearly exact latents

    @torch.no_grad()
    def init_linear_path(self, frames):
        """Set the linear path to the principal components of the blocks of pixels of frames [n 3 H
        W].
        """
        p = self.factor
        num_latents = self.linear_in.out_channels
        blocks = rearrange(frames, "n c (h p) (w q) -> (n h w) (c p q)", p=p, q=p).double()
        mean = blocks.mean(0)
        variance, axes = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        basis = axes.flip(1)[:, :num_latents].T  # c (3 p p), largest variance first
        # One scale for all keeps the ratios of the components' variances.
        scale = variance.flip(0)[:num_latents].mean().sqrt()
        self.linear_in.weight.copy_((basis / scale).view(num_latents, 3, p, p))
        self.linear_in.bias.copy_(-(basis @ mean) / scale)
        self.linear_out.weight.copy_((basis * scale).view(num_latents, 3, p, p))
        # The bias has one number per colour: the mean block is replaced by its mean colour.
        self.linear_out.bias.copy_(mean.view(3, -1).mean(1))

    def moments(self, frames):
        """Return mean and log variance [n c h w] of q(z | frames [n 3 H W])."""
        mean, log_variance = self.encoder(frames).chunk(2, dim=1)
        return mean + self.linear_in(frames), log_variance.clamp(-30, 20)

    def encode(self, frames):
        """Return the mean latents [n c h w] of frames [n 3 H W] in [-1, 1]."""
        return self.moments(frames)[0]

    def decode(self, latents):
        """Return frames [n 3 H W], about in [-1, 1], of latents [n c h w]."""
        return self.decoder(latents) + self.linear_out(latents)


# ---------------------------------------------------------------- condition encoders


class SpeechEncoder(nn.Module):
    """Tokens of the sound around each frame: one per video frame in the window, and a summary of
    the window.
    """

    def __init__(self, dim, dropout=0.0, window=5, num_mels=40, mels_per_frame=4):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv1d(num_mels, dim, 3, padding=1),
            nn.SiLU(),
            nn.Conv1d(dim, dim, mels_per_frame, stride=mels_per_frame),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        self.position = nn.Parameter(torch.randn(window, dim) * 0.02)
        self.summary = nn.Linear(window * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel):
        """Return tokens [b f window+1 d] of mel windows [b f n m]; the last one is the summary."""
        h = self.conv(rearrange(mel, "b f n m -> (b f) m n"))  # (b f) d window
        tokens = rearrange(h, "n d w -> n w d") + self.position
        summary = self.summary(rearrange(tokens, "n w d -> n 1 (w d)"))
        tokens = self.norm(torch.cat([tokens, summary], dim=1))  # (b f) window+1 d
        return rearrange(tokens, "(b f) w d -> b f w d", b=len(mel))


class IdentityEncoder(nn.Module):
    """Tokens of a reference picture: a 4 x 4 grid of them at any picture size."""

    def __init__(self, dim):
        super().__init__()
        layers = []
        channels = 3
        for width in (24, 48, 96):
            layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=1))
            layers += [group_norm(width), nn.SiLU()]
            channels = width
        self.conv = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Conv2d(channels, dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, reference):
        """Return tokens [b (n 16) d] of reference [b 3 H W], or [b n 3 H W] for n pictures of the
        person.
        """
        h = self.conv(reference.flatten(0, -4))  # (b n) d 4 4
        return self.norm(rearrange(h, "(b n) d h w -> b (n h w) d", b=len(reference)))


MAX_WORDS = 8  # known words of a prompt that are used; further ones are cut off


class TextEncoder(nn.Module):
    """Tokens of a prompt of a few words: one for each known word, and a summary.

    The vocabulary is that of the public captions (`learn_words`); it is saved with the weights.
    """

    def __init__(self, dim, num_words=256):
        super().__init__()
        self.words = []  # word i has row i + 1 of the table; row 0 is padding
        self.table = nn.Embedding(num_words, dim, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)

    def get_extra_state(self):
        return self.words

    def set_extra_state(self, words):
        self.words = list(words)

    def learn_words(self, prompts):
        """Take the most frequent words of `prompts` as the vocabulary."""
        counts = Counter(word for prompt in prompts for word in split_words(prompt))
        by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
        self.words = by_frequency[: self.table.num_embeddings - 1]

    def ids(self, prompts):
        """Return table rows [b MAX_WORDS] of the words of each prompt; unknown words are left out,
        0 pads.
        """
        rows = []
        for prompt in prompts:
            known = [self.words.index(w) + 1 for w in split_words(prompt) if w in self.words]
            padded = known + [0] * MAX_WORDS
            rows.append(padded[:MAX_WORDS])
        return torch.tensor(rows)

    def forward(self, ids):
        """Return tokens [b MAX_WORDS+1 d] of table rows [b MAX_WORDS]; the last is the summary."""
        # Padding is not masked: its token is the norm's bias, the same for every prompt.
        words = self.table(ids)  # b MAX_WORDS d
        summary = self.mlp(words.sum(1, keepdim=True))  # b 1 d
        return self.norm(torch.cat([words, summary], dim=1))  # b MAX_WORDS+1 d


def split_words(prompt):
    """Return the words of a prompt in lower case: letters of any script with their marks, and
    apostrophes.
    """
    prompt = unicodedata.normalize("NFC", prompt.lower()).replace("\u2019", "'")  # as phones write
    kept = [c if c == "'" or unicodedata.category(c)[0] in "LM" else " " for c in prompt]
    return "".join(kept).split()


# ---------------------------------------------------------------- UNet


def attend(q, k, v, heads, bias=None):
    """Return multi-head attention [b n d] of queries q [b n d] to keys and values k, v [b m d];
    `bias` [1 heads n m] is added to the scores.
    """
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return rearrange(out, "b heads n d -> b n (heads d)")


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention of x [b n d] with a residual, zero at the start."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = zeroed(nn.Linear(dim, dim))

    def forward(self, x, bias=None):
        h = self.norm(x)
        return x + self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads, bias))


class CrossAttention(nn.Module):
    """Decoupled cross-attention (Ye et al. 2023, Eq. 5): one query projection; each condition
    has its own keys, values and scale.

    Scale 0 drops the condition, as condition dropout does in training. Zero at the start.
    """

    def __init__(self, dim, heads, condition_dim):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.ModuleDict(
            {n: nn.Linear(condition_dim, dim, bias=False) for n in CONDITIONS}
        )
        self.to_v = nn.ModuleDict(
            {n: nn.Linear(condition_dim, dim, bias=False) for n in CONDITIONS}
        )
        self.to_out = zeroed(nn.Linear(dim, dim))

    def forward(self, x, conditions, num_frames):
        """Return x [(b f) n c] plus its attention to the conditions {name: (tokens [b m d] of a
        clip or [b f m d] of each frame, scale [b])}.
        """
        q = self.to_q(self.norm(x))  # (b f) n c
        total = 0.0
        for name in CONDITIONS:
            tokens, scale = conditions[name]
            queries = q
            if tokens.dim() == 4:  # of each frame
                tokens = rearrange(tokens, "b f m d -> (b f) m d")
            else:  # of the clip: all its frames attend as one long sequence of queries
                queries = rearrange(q, "(b f) n c -> b (f n) c", f=num_frames)
            h = attend(queries, self.to_k[name](tokens), self.to_v[name](tokens), self.heads)
            h = h.reshape(q.shape)  # (b f) n c
            total = total + scale.repeat_interleave(num_frames)[:, None, None] * h
        return x + self.to_out(total)


class TemporalAttention(nn.Module):
    """Self-attention along time at every position, within `radius` frames, with a learned bias by
    distance.

    Only distances of frames enter, so that the length of the clip does not matter.
    """

    def __init__(self, dim, heads, radius):
        super().__init__()
        self.radius = radius
        self.attention = SelfAttention(dim, heads)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * radius + 1))

    def forward(self, x, num_frames):
        frame = torch.arange(num_frames, device=x.device)
        distance = frame[None] - frame[:, None]  # f f
        bias = self.bias[:, distance.clamp(-self.radius, self.radius) + self.radius]  # heads f f
        bias = bias.masked_fill(distance.abs() > self.radius, -math.inf)[None]
        h = rearrange(x, "(b f) n d -> (b n) f d", f=num_frames)
        h = self.attention(h, bias)
        return rearrange(h, "(b n) f d -> (b f) n d", n=x.shape[1])


class TalkingBlock(nn.Module):
    """Convolution, then attention over space (below the finest level), to conditions, over time."""

    def __init__(self, in_channels, channels, temb_channels, condition_dim, heads, radius, spatial):
        super().__init__()
        self.resnet = ResnetBlock(in_channels, channels, temb_channels)
        self.space = SelfAttention(channels, heads) if spatial else nn.Identity()
        self.conditions = CrossAttention(channels, heads, condition_dim)
        self.time = TemporalAttention(channels, heads, radius)

    def forward(self, x, temb, conditions, num_frames):
        x = self.resnet(x, temb)  # (b f) c h w
        height = x.shape[2]
        x = rearrange(x, "n c h w -> n (h w) c")
        x = self.space(x)
        x = self.conditions(x, conditions, num_frames)
        x = self.time(x, num_frames)
        return rearrange(x, "n (h w) c -> n c h w", h=height)


class TalkingUNet(nn.Module):
    """Spatio-temporal UNet: motion, time, conditions and the reference latent -> the correction of
    the linear denoiser.
    """

    def __init__(
        self, motion_channels, latent_channels, channels, condition_dim, heads=4, radius=8
    ):
        super().__init__()
        if not channels or any(width % GROUP_CHANNELS or width % heads for width in channels):
            raise ValueError(
                f"the UNet's channels must be multiples of {GROUP_CHANNELS} and of {heads} "
                f"heads, not {list(channels)}"
            )
        temb_channels = 4 * channels[0]
        sizes = temb_channels, condition_dim, heads, radius
        self.num_frequencies = channels[0]
        self.time_mlp = nn.Sequential(
            nn.Linear(channels[0], temb_channels),
            nn.SiLU(),
            nn.Linear(temb_channels, temb_channels),
        )
        # Identity has no summary: the reference's latents enter at conv_in instead.
        self.speech_in = nn.Linear(condition_dim, temb_channels, bias=False)
        self.text_in = nn.Linear(condition_dim, temb_channels, bias=False)
        self.position = nn.Parameter(torch.randn(1, channels[0], 8, 8) * 0.02)
        self.conv_in = nn.Conv2d(motion_channels + latent_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.upsample = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, width in enumerate(channels):
            narrower = channels[max(level - 1, 0)]
            self.down.append(TalkingBlock(narrower, width, *sizes, spatial=level > 0))
        for level in range(len(channels) - 1):
            width, wider = channels[level : level + 2]
            self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            self.upsample.insert(0, nn.Conv2d(wider, width, 1))
            self.up.insert(0, TalkingBlock(width, width, *sizes, spatial=level > 0))
        self.middle = TalkingBlock(channels[-1], channels[-1], *sizes, spatial=True)
        self.norm_out = group_norm(channels[0])
        self.conv_out = zeroed(nn.Conv2d(channels[0], motion_channels, 3, padding=1))
        # The direct path of speech leads from speech_in to here.
        self.speech_out = zeroed(nn.Linear(temb_channels, motion_channels * 8 * 8))

    def embed_time(self, time, conditions):
        """Return the embedding [(b f) d] of time [b f] in [0, 1] and the summaries of speech and
        text; each block projects it to its scale and shift.
        """
        temb = self.time_mlp(sinusoid(1000 * time, self.num_frequencies))  # b f d
        for name, layer in (("speech", self.speech_in), ("text", self.text_in)):
            tokens, scale = conditions[name]
            summary = layer(tokens[..., -1, :])  # b d or b f d
            if summary.dim() == 2:
                summary = summary[:, None]  # b 1 d
            temb = temb + scale[:, None, None] * summary
        return F.silu(temb.flatten(0, 1))

    def direct_path(self, temb, grid):
        """Return the direct path's output for embeddings [n d] of time, speech and text, [n m h w]
        on a grid (h, w): a map of 8 x 8, interpolated. It does not depend on the face.
        """
        x = rearrange(self.speech_out(temb), "n (m h w) -> n m h w", h=8, w=8)
        return F.interpolate(x, grid, mode="bilinear")

    def forward(self, x, time, conditions, reference_latents):
        """Return the correction [b f m h w] for x [b f m h w] at time [b f] in [0, 1], conditions
        as in `CrossAttention`, reference_latents [b c h w].
        """
        num_frames, _, *grid = x.shape[1:]
        temb = self.embed_time(time, conditions)  # (b f) d
        reference = repeat(reference_latents, "b c h w -> b f c h w", f=num_frames)
        x = rearrange(torch.cat([x, reference], dim=2), "b f c h w -> (b f) c h w")
        x = self.conv_in(x)  # (b f) c0 h w
        # A learned map of 8 x 8, interpolated: the parts of a face have about fixed places.
        x = x + F.interpolate(self.position, grid, mode="bilinear")
        skips = []
        for block, downsample in zip(self.down, self.downsample):
            x = block(x, temb, conditions, num_frames)
            skips.append(x)
            x = downsample(x)  # (b f) c h/2 w/2
        x = self.down[-1](x, temb, conditions, num_frames)
        x = self.middle(x, temb, conditions, num_frames)
        for upsample, block in zip(self.upsample, self.up):
            x = skips.pop() + F.interpolate(upsample(x), scale_factor=2.0)  # (b f) c 2h 2w
            x = block(x, temb, conditions, num_frames)
        x = self.conv_out(F.silu(self.norm_out(x))) + self.direct_path(temb, grid)  # (b f) m h w
        return rearrange(x, "(b f) m h w -> b f m h w", f=num_frames)


def sinusoid(t, dim):
    """Return the sinusoidal embedding [... dim] of t [...] (Vaswani et al. 2017, Sec. 3.5)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[..., None] * frequencies  # ... dim/2
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---------------------------------------------------------------- diffusion


class Diffusion:
    """Forward process q(xt | x0) (Eq. 2-4) and a sampler that reverses it. The network predicts
    x0.
    """

    def __init__(self, num_steps=1000):
        self.num_steps = num_steps
        self.alpha_bar = noise_schedule(num_steps).float()  # T

    def timestep(self, u):
        """Return integer timesteps t [n] for uniform u [n] in [0, 1). t / T has three times the
        odds of u (Esser et al. 2024, Eq. 23): noisy steps are drawn more often, as the linear
        denoiser leaves little to learn at the others.
        """
        t = (3 * u / (1 + 2 * u) * self.num_steps).long()
        return t.clamp(max=self.num_steps - 1)  # for u = 1 - 3 * 2^-24 the quotient rounds to 1

    def coefficients(self, t, like):
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at integer t [b] or, by frame, [b f],
        shaped to multiply `like`.

        t = -1 is a frame without noise.
        """
        # Index -1 reads the last step, which `where` replaces.
        alpha_bar = self.alpha_bar.to(like.device)[t].where(t >= 0, 1.0)
        alpha_bar = alpha_bar.view(*t.shape, *[1] * (like.dim() - t.dim()))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0, t, eps):
        """Return xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Eq. 4)."""
        signal, noise = self.coefficients(t, x0)
        return signal * x0 + noise * eps

    def implied_eps(self, x0_hat, xt, t):
        """Return the eps_hat that the prediction x0_hat implies (Eq. 5); zero for frames without
        noise.
        """
        signal, noise = self.coefficients(t, xt)
        # The clamp avoids 0 / 0, whose gradient would be NaN although `where` drops the value.
        return ((xt - signal * x0_hat) / noise.clamp(min=1e-3)).where(noise > 0, 0.0)

    def timesteps(self, num_steps):
        """Return the timesteps T (1 - i / num_steps)^1.5 - 1 for i = 0, 1, ... [num_steps]: from
        pure noise (Lin et al. 2024, Table 2) on, closer to one another where there is less noise.

        If they were evenly spaced, the second of two steps would see as much noise as motion, and
        remove much of the motion as noise.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(
                f"sampling.num_steps must be from 1 to {self.num_steps}, not {num_steps}"
            )
        left = torch.arange(num_steps, 0, -1)  # number of steps left
        times = self.num_steps * (left / num_steps) ** 1.5
        # With many steps the last ones would round to the same timestep: they get one each.
        return torch.maximum(times.round().long(), left) - 1

    def sample(self, predict_x0, noise, num_steps):
        """Return x0: the probability-flow ODE solved from `noise` [b ...] in `num_steps` steps.

        `predict_x0(xt, t)` is the network, with one t for all clips. The solver is
        DPM-Solver++(2M), Lu et al. 2022, Algorithm 2; with one step it is DDIM.
        """
        xt = noise
        times = self.timesteps(num_steps)
        alpha_bar = torch.cat([self.alpha_bar[times], torch.ones(1)]).double()
        log_snr = (alpha_bar.log() - (1 - alpha_bar).log()) / 2  # lambda_t, from -inf to +inf
        previous_x0 = None
        previous_h = None
        for i, t in enumerate(times.tolist()):
            x0 = predict_x0(xt, t)
            h = log_snr[i + 1] - log_snr[i]
            estimate = x0
            # First and last step are of first order; so is the second: previous_h is infinite.
            if 0 < i < num_steps - 1:
                estimate = x0 + (x0 - previous_x0) * float(h / previous_h / 2)
            ratio = ((1 - alpha_bar[i + 1]) / (1 - alpha_bar[i])).sqrt()
            gain = alpha_bar[i + 1].sqrt() * -torch.expm1(-h)
            xt = float(ratio) * xt + float(gain) * estimate
            previous_x0 = x0
            previous_h = h
        return xt


def noise_schedule(num_steps):
    """Return alpha_bar [T] in float64: the cosine schedule (Nichol & Dhariwal 2021, Eq. 17),
    rescaled so that the last step is pure noise (Lin et al. 2024, Algorithm 1).
    """
    s = 0.008
    time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # the last becomes 0, the first stays
    return root.square()


# ---------------------------------------------------------------- warp and flow


def warp(pictures, flow):
    """Return pictures [n c H W] with pixel p taken from p + flow(p); flow [n 2 h w] is (x, y) in
    half picture sides.
    """
    # A diverged network gives NaN, on which grid_sample's backward pass crashes the process.
    flow = flow.nan_to_num()
    flow = F.interpolate(flow, pictures.shape[-2:], mode="bilinear")
    identity = torch.eye(2, 3, device=flow.device)[None]
    grid = F.affine_grid(identity, (1, *pictures.shape[1:]), align_corners=False)  # 1 H W 2
    grid = grid + rearrange(flow, "n k h w -> n h w k")
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def estimate_flow(source, target, size):
    """Return flow [n 2 size size] for which warp(source [n 3 H W], flow) resembles target [n 3 H
    W].

    Lucas & Kanade (1981), in grey and coarse to fine: each cell solves its 2 x 2 normal equations
    over itself and its neighbours; between steps the flow is smoothed.
    """
    damping = 0.02
    source = source.mean(1, keepdim=True)  # n 1 H W
    target = target.mean(1, keepdim=True)
    flow = target.new_zeros(len(target), 2, size, size)
    for reduction, iterations in ((4, 3), (2, 6), (1, 2)):
        coarse_source = F.avg_pool2d(source, reduction)
        coarse_target = F.avg_pool2d(target, reduction)  # n 1 pixels pixels
        pixels = coarse_source.shape[-1]
        for _ in range(iterations):
            warped = warp(coarse_source, flow)
            error = coarse_target - warped
            # central differences per half side, zero at the border
            dx = F.pad(warped[..., 2:] - warped[..., :-2], (1, 1, 0, 0)) * pixels / 4
            dy = F.pad(warped[..., 2:, :] - warped[..., :-2, :], (0, 0, 1, 1)) * pixels / 4
            products = torch.cat([dx * dx, dx * dy, dy * dy, dx * error, dy * error], 1)
            cells = box_blur(F.avg_pool2d(products, pixels // size))  # n 5 size size
            xx, xy, yy, xe, ye = cells.unbind(1)
            xx = xx + damping
            yy = yy + damping
            determinant = (xx * yy - xy * xy)[:, None]
            step = torch.stack([yy * xe - xy * ye, xx * ye - xy * xe], 1) / determinant
            flow = (flow + step + box_blur(flow + step)) / 2
    return flow


def box_blur(x):
    """Return the mean of each cell of x [n c h w] and its eight neighbours."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


# ---------------------------------------------------------------- the Gaussian prior


def principal_components(flat, num):
    """Return the variance about zero [k] along the leading k <= `num` principal components of the
    rows of flat [n d], and their directions [d k].
    """
    # On the CPU, as it draws random numbers: every device gets the same components.
    k = min(num, *flat.shape)
    _, scale, directions = torch.pca_lowrank(flat.cpu(), q=k, center=False, niter=4)
    return scale**2 / len(flat), directions


class GaussianPrior(nn.Module):
    """The Gaussian model of clips x0 [b f m h w] and its linear denoiser (formula at the top of
    this file).
    """

    def __init__(self, num_values, num_modes=256, num_lags=25):
        super().__init__()
        num_modes = min(num_modes, num_values)
        self.register_buffer("modes", torch.eye(num_values, num_modes))  # U, orthonormal columns
        self.register_buffer("variance", torch.ones(num_modes))  # v
        self.register_buffer("residual_variance", torch.ones(()))  # r
        self.register_buffer("autocorrelation", torch.ones(num_lags))  # of x0 over frames

    @torch.no_grad()
    def fit(self, x0):
        """Measure the covariance on clips x0 [b f m h w] of at least two frames."""
        flat = rearrange(x0, "b f m h w -> (b f) (m h w)")
        num_values, num_modes = self.modes.shape
        variance, modes = principal_components(flat, num_modes)
        num_modes = len(variance)
        remaining = flat.square().sum() / len(flat) - variance.sum()
        remaining = remaining / max(1, num_values - num_modes)
        self.residual_variance.copy_(remaining.clamp(min=1e-6))
        self.modes[:, :num_modes] = modes
        self.variance[:num_modes] = variance
        self.variance[num_modes:] = self.residual_variance  # unused modes: as outside the modes
        num_frames = x0.shape[1]
        power = x0.square().mean()
        for lag in range(len(self.autocorrelation)):
            # Lags beyond the clips' length get the value of the longest lag.
            lag_measured = min(lag, num_frames - 1)
            product = x0[:, lag_measured:] * x0[:, : num_frames - lag_measured]
            self.autocorrelation[lag] = product.mean() / power

    def mean_variance(self):
        """Return the variance of x0, averaged over places."""
        num_values, num_modes = self.modes.shape
        residual = (num_values - num_modes) * self.residual_variance
        return (self.variance.sum() + residual) / num_values

    def frame_correlation(self, num_frames):
        """Return the correlation matrix K [f f] of frames in float64, made positive definite."""
        frame = torch.arange(num_frames, device=self.autocorrelation.device)
        lag = (frame[None] - frame[:, None]).abs().clamp(max=len(self.autocorrelation) - 1)
        values, vectors = torch.linalg.eigh(self.autocorrelation[lag].double())
        return (vectors * values.clamp(min=1e-3)) @ vectors.T

    def sample(self, noise, num_known):
        """Return a sample [b f m h w] of x0 minus its mean, given the first `num_known` frames,
        where it is 0. It is computed from white `noise` [b f m h w].
        """
        K = self.frame_correlation(noise.shape[1])
        # The lower right block of K's Cholesky factor is the Cholesky factor of the covariance
        # given the known frames (the Schur complement).
        root = torch.linalg.cholesky(K)  # f f
        root[:, :num_known] = 0
        h = root.to(noise) @ noise.flatten(2)  # b f (m h w)
        residual_std = self.residual_variance.sqrt()
        in_modes = (h @ self.modes) * (self.variance.sqrt() - residual_std)  # b f k
        return (in_modes @ self.modes.T + residual_std * h).view_as(noise)

    def denoise(self, xt, signal, noise):
        """Return E[x0 | xt] and the posterior standard deviation, both [b f m h w], for xt = signal
        x0 + noise eps.

        signal and noise [b f 1 1 1] may differ by frame: frames of less noise inform the others. In
        a mode of variance v the frames have covariance v K. With A, N the diagonal matrices of
        signal and noise the gain is v K A (v A K A + N^2)^-1. Let N^-1 A K A N^-1 = Q diag(snr)
        Q^T: then the gain is K A N^-1 Q diag(v / (v snr + 1)) Q^T N^-1, and one decomposition
        serves all modes.
        """
        K = self.frame_correlation(xt.shape[1])
        A = signal.flatten(1).double()  # b f
        N = noise.flatten(1).double().clamp(min=1e-5)  # frames without noise: nearly none
        snr, Q = torch.linalg.eigh((A / N)[:, :, None] * K * (A / N)[:, None])  # b f; b f f
        to_basis = Q.mT / N[:, None]  # Q^T N^-1
        from_basis = (K * A[:, None]) @ to_basis.mT  # b f f, K A N^-1 Q
        variance = torch.cat([self.variance, self.residual_variance[None]]).double()  # k+1
        shrink = variance / (variance * snr.clamp(min=0)[..., None] + 1)  # b f k+1
        # The posterior covariance is v K - gain A v K; only its diagonal is needed.
        posterior = K.diagonal()[:, None] * variance - from_basis.square() @ (variance * shrink)
        posterior = posterior.clamp(min=0).to(xt)  # b f k+1, the variance left in each mode
        shrink = shrink.to(xt)
        h = to_basis.to(xt) @ xt.flatten(2)  # b f (m h w)
        in_modes = (h @ self.modes) * (shrink[..., :-1] - shrink[..., -1:])  # b f k
        h = in_modes @ self.modes.T + h * shrink[..., -1:]
        mean = from_basis.to(xt) @ h  # b f (m h w)
        excess = (posterior[..., :-1] - posterior[..., -1:]) @ self.modes.square().T
        std = (posterior[..., -1:] + excess).clamp(min=0).sqrt()
        return mean.view_as(xt), std.view_as(xt)


# ---------------------------------------------------------------- the whole


class TalkingHead(nn.Module):
    """The whole generator: autoencoder, condition encoders, prior, UNet and diffusion.

    size: pixels a side; latent_channels, autoencoder_channels: `AutoencoderKL`; channels: widths of
    the UNet; speech_dropout: dropout rate of the mel spectrogram and of the speech features.
    """

    def __init__(
        self,
        size,
        autoencoder_channels,
        channels,
        speech_dropout=0.0,
        latent_channels=LATENT_CHANNELS,
    ):
        super().__init__()
        self.autoencoder = AutoencoderKL(latent_channels, autoencoder_channels)
        coarsest = self.autoencoder.factor * 2 ** (len(channels) - 1)
        if size < coarsest or size % coarsest:
            raise ValueError(f"data.size must be a multiple of {coarsest} pixels, not {size}")
        self.latent_size = size // self.autoencoder.factor
        self.motion_channels = 2 + latent_channels
        if not channels:
            raise ValueError(f"channels must be multiples of {GROUP_CHANNELS}, one or more")
        dim = 3 * channels[0] // 2  # of the condition tokens
        self.speech_encoder = SpeechEncoder(dim, speech_dropout)
        self.identity_encoder = IdentityEncoder(dim)
        self.text_encoder = TextEncoder(dim)
        self.unet = TalkingUNet(self.motion_channels, latent_channels, channels, dim)
        self.diffusion = Diffusion()
        self.prior = GaussianPrior(self.motion_channels * self.latent_size**2)
        self.register_buffer("motion_std", torch.ones(self.motion_channels, 1, 1))
        self.register_buffer("typical_liveliness", torch.ones(()))
        self.register_buffer("reference_std", torch.ones(latent_channels, 1, 1))
        grid = self.latent_size, self.latent_size
        self.register_buffer("place_weights", torch.ones(self.motion_channels, *grid))

    @torch.no_grad()
    def fit_statistics(self, motion, reference_latents, mel, liveliness):
        """Measure standard deviations, prior and loss weights on motion [b f m h w], reference
        latents [b c h w], mel windows [b f n m] and liveliness [b] of public clips.

        The standard deviations of flow and residual are those of a typical principal component, not
        of a single value: correlated values have a higher SNR than their per-value variance
        suggests, and half of the noise levels would teach nothing (Hoogeboom et al. 2023, Sec.
        3.1).
        """
        std = reference_latents.std(dim=(0, 2, 3))[:, None, None]  # c 1 1
        self.reference_std.copy_(std.clamp(min=1e-6))
        self.typical_liveliness.copy_(liveliness.median())
        for part in (slice(0, 2), slice(2, None)):  # flow, residual
            flat = rearrange(motion[:, :, part], "b f m h w -> (b f) (m h w)")
            variance, _ = principal_components(flat, 64)
            typical = variance.square().sum() / variance.sum().clamp(min=1e-12)
            self.motion_std[part] = typical.sqrt().clamp(min=1e-6)
        x0 = motion / self.motion_std
        self.prior.fit(x0)
        self.place_weights.copy_(speech_weights(x0, mel))

    @torch.no_grad()
    def encode_motion(self, frames, reference, liveliness):
        """Return the motion [b f m h w] of frames [b f 3 H W] from reference [b 3 H W], divided by
        the clip's liveliness [b] (`data.Clip.liveliness`), and the reference's latents [b c h w].

        After this division one Gaussian fits calm and lively clips. Without it the Gaussian would
        be too narrow for lively clips and too wide for calm ones, whose samples would be noise.
        """
        target = frames.flatten(0, 1)  # (b f) 3 H W
        source = repeat(reference, "b c h w -> (b f) c h w", f=frames.shape[1])  # (b f) 3 H W
        flow = estimate_flow(source, target, self.latent_size)  # (b f) 2 h w
        warped = warp(source, flow)  # (b f) 3 H W
        residual = self.autoencoder.encode(target) - self.autoencoder.encode(warped)
        motion = torch.cat([flow, residual], dim=1).unflatten(0, frames.shape[:2])
        motion = motion / liveliness[:, None, None, None, None]
        return motion, self.autoencoder.encode(reference)

    def decode(self, x0, reference, liveliness):
        """Return frames [b f 3 H W], about in [-1, 1], of normalised motion x0 [b f m h w],
        reference [b 3 H W] and liveliness [b].

        The warped picture is kept, and the difference between decoding it with and without the
        residual is added, so that details of the reference which the autoencoder would lose (a
        pattern, a strand of hair) stay. They are covered where the residual changes the picture:
        closed lips would shine through an open mouth. Gradients reach the flow through the warped
        picture only: those through the two decodings cancel, up to terms of the residual's size.
        """
        motion = x0 * self.motion_std * liveliness[:, None, None, None, None]  # b f m h w
        motion = rearrange(motion, "b f m h w -> (b f) m h w")
        flow, residual = motion.split([2, self.motion_channels - 2], dim=1)
        warped = warp(repeat(reference, "b c h w -> (b f) c h w", f=x0.shape[1]), flow)
        with torch.no_grad():
            latents = self.autoencoder.encode(warped)  # (b f) c h w
            without_residual = self.autoencoder.decode(latents)  # (b f) 3 H W
        decoded = self.autoencoder.decode(latents + residual)
        with torch.no_grad():
            change = (decoded - without_residual).square().mean(1, keepdim=True)  # (b f) 1 H W
            # Black and white differ by 2: a change of 0.2 covers two thirds (ablations.md).
            covered = 1 - torch.exp(-box_blur(change) / 0.2**2)  # (b f) 1 H W, 0 to 1
            covered_details = covered * (warped - without_residual)
        frames = warped + decoded - without_residual - covered_details
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(x0))

    def encode_conditions(self, mel, reference, words, scales=None):
        """Return {name: (tokens, scale [b])} of mel [b f n m], reference [b 3 H W] or [b n 3 H W],
        and word ids [b MAX_WORDS].

        `scales` {name: number or [b]} are weights of the conditions, by default 1; text has weight
        0 in clips without words.
        """
        scales = scales or {}
        if not scales.keys() <= set(CONDITIONS):
            raise ValueError(f"conditions are {', '.join(CONDITIONS)}, not {', '.join(scales)}")
        has_words = (words > 0).any(1).float()  # b
        scale = {name: torch.ones_like(has_words) * scales.get(name, 1.0) for name in CONDITIONS}
        return {
            "speech": (self.speech_encoder(mel), scale["speech"]),  # b f window+1 d
            "identity": (self.identity_encoder(reference), scale["identity"]),  # b (n 16) d
            "text": (self.text_encoder(words), scale["text"] * has_words),  # b MAX_WORDS+1 d
        }

    def forward(self, xt, t, conditions, reference_latents):
        """Return x0_hat [b f m h w] for xt at integer t [b f]: linear denoiser plus correction.

        Frames without noise (t = -1) are known; the others continue from them.
        """
        with torch.autocast(xt.device.type, enabled=False):  # bfloat16 is for the network only
            linear, std = self.prior.denoise(xt, *self.diffusion.coefficients(t, xt))
        _, identity_scale = conditions["identity"]
        reference = identity_scale.view(-1, 1, 1, 1) * reference_latents / self.reference_std
        time = (t.float() + 1) / self.diffusion.num_steps
        return linear + std * self.unet(linear, time, conditions, reference)

    def weighted_power(self, x):
        """Return the weighted mean square [b] of x [b f m h w]: `speech_weights` weight its places,
        and 0.1 its mean over the frames.

        This mean is how the window's pose and light differ from the reference's, which cannot be
        predicted from the network's inputs.
        """
        still = x.mean(1, keepdim=True)  # b 1 m h w
        square = (x - still).square() + 0.1 * still.square()
        return (self.place_weights * square).flatten(2).mean(2).mean(1)

    def diffusion_loss(self, x0_hat, x0, noise):
        """Return the diffusion loss [b] of x0_hat for x0 [b f m h w], where noise is sqrt(1 -
        alpha_bar).

        The squared error of x0 is divided by the clip's own power, so that calm clips count as much
        as lively ones. (Power below a quarter of the prior's variance, as in about two fifths of
        the windows of 8 frames, counts as a quarter: the calmest windows count for less.) The error
        is also divided by 1 - alpha_bar (at least .05), which makes it the error of v (Salimans &
        Ho 2022). This is Eq. 6 divided by alpha_bar; Eq. 6 itself is always 0 in pure noise.
        """
        smallest_power = 0.25 * self.prior.mean_variance()
        power = self.weighted_power(x0).clamp(min=smallest_power)  # b
        error = (x0_hat - x0) / noise.square().clamp(min=0.05).sqrt()  # b f m h w
        return self.weighted_power(error) / power

    def training_losses(self, batch, t, eps, scales=None):
        """Return the diffusion loss [b] (Eq. 6), x0_hat and eps_hat [b f m h w] of a batch.

        t [b f] are the noise levels, eps [b f m h w] is the noise.
        """
        x0 = batch["motion"] / self.motion_std
        xt = self.diffusion.add_noise(x0, t, eps)
        conditions = self.encode_conditions(
            batch["mel"], batch["reference"], batch["words"], scales
        )
        x0_hat = self(xt, t, conditions, batch["reference_latents"])
        _, noise = self.diffusion.coefficients(t, x0)
        loss = self.diffusion_loss(x0_hat, x0, noise)
        return loss, x0_hat, self.diffusion.implied_eps(x0_hat, xt, t)

    def speech_loss(self, batch):
        """Return the diffusion loss [b] of the UNet's direct path alone, in pure noise, where the
        linear denoiser predicts 0.

        In its own training the UNet sees too few frames of pure noise to learn from speech.
        """
        x0 = batch["motion"] / self.motion_std
        pure_noise = torch.full(x0.shape[:2], self.diffusion.num_steps - 1, device=x0.device)
        signal, noise = self.diffusion.coefficients(pure_noise, x0)
        # The posterior standard deviation is the same for every clip: one is enough.
        _, std = self.prior.denoise(torch.zeros_like(x0[:1]), signal[:1], noise[:1])  # 1 f m h w
        conditions = self.encode_conditions(batch["mel"], batch["reference"], batch["words"])
        latest = torch.ones(x0.shape[:2], device=x0.device)  # b f
        temb = self.unet.embed_time(latest, conditions)  # (b f) d
        correction = self.unet.direct_path(temb, x0.shape[3:])  # (b f) m h w
        x0_hat = std * correction.unflatten(0, x0.shape[:2])  # b f m h w
        return self.diffusion_loss(x0_hat, x0, noise)

    def sample(self, conditions, reference_latents, noise, chance, known, num_steps, guidance):
        """Return x0 [b f m h w] sampled from `noise` [b f m h w] in `num_steps` steps.

        conditions: of `encode_conditions`; reference_latents [b c h w]. x0 begins with the frames
        `known` [b k m h w]. In pure noise the network can predict only the mean of x0; steps that
        continue from this mean would lack all variation around it, such as the head's motion.
        Therefore `chance` [b f m h w], a sample of the prior, is added to it: Bao et al. 2022
        (Analytic-DPM), Theorem 1, where the noise added has the variance alpha_bar Cov(x0).

        Classifier-free guidance on speech (Ho & Salimans 2022, Eq. 6, with guidance = 1 + w): x0 =
        x0_without + guidance (x0_with - x0_without). It acts in pure noise only, where x0_hat
        depends on nothing but the conditions and the known frames.
        """
        num_known = known.shape[1]
        tokens, scale = conditions["speech"]
        without_speech = conditions | {"speech": (tokens, torch.zeros_like(scale))}

        def predict_x0(xt, step):
            t = torch.full(xt.shape[:2], step, device=xt.device)  # b f
            t[:, :num_known] = -1
            xt = torch.cat([known, xt[:, num_known:]], dim=1)
            x0 = self(xt, t, conditions, reference_latents)
            if step == self.diffusion.num_steps - 1:  # pure noise
                if guidance != 1.0:
                    x0_without = self(xt, t, without_speech, reference_latents)
                    x0 = x0_without + guidance * (x0 - x0_without)
                x0 = x0 + chance
            return x0

        x0 = self.diffusion.sample(predict_x0, noise, num_steps)
        return torch.cat([known, x0[:, num_known:]], dim=1)

    def chance_by_place(self):
        """Return the share [m h w] of the motion's standard deviation that is drawn at random: for
        flow, from 1 where speech explains least to 0 where it explains most; for the residual, 0.

        If speech predicts the mouth's motion with correlation r, a true random sample has a
        correlation of only r squared with the real motion. So the mouth gets no randomness: its
        motion is the mean given speech. The head's motion, which speech hardly predicts, is random
        as in the training clips. A random residual would give blotches on the skin after few solver
        steps.
        """
        explained = self.place_weights.mean(0)  # h w
        explained = explained - explained.min()
        share = torch.zeros_like(self.place_weights)
        share[:2] = 1 - explained / explained.max().clamp(min=1e-6)
        return share

    @torch.inference_mode()
    def stream(
        self,
        reference,
        mel,
        words,
        generator,
        num_steps,
        guidance,
        window,
        scales=None,
        liveliness=None,
    ):
        """Yield frames [b w 3 H W] in [-1, 1], one window after another, of `reference` speaking
        `mel` [b f n m].

        reference: [b 3 H W], or several pictures [b n 3 H W], the first of which is animated;
        words [b n]: of the prompt; num_steps, guidance: as in `sample`; window: frames generated at
        once, known ones included; scales: as in `encode_conditions`; liveliness [b]: how much the
        person moves, by default as much as a typical public person. Each window continues from the
        last KNOWN_FRAMES frames of the one before, but warps the reference again, so that neither
        memory nor errors grow with the length of the clip. The first window is half as long, so
        that the first frames come sooner.
        """
        # The first window, half as long, has to hold the KNOWN_FRAMES that the second starts with.
        if window < 2 * KNOWN_FRAMES:
            raise ValueError(f"sampling.window must be at least {2 * KNOWN_FRAMES}, not {window}")
        moving = reference if reference.dim() == 4 else reference[:, 0]  # b 3 H W
        latents = self.autoencoder.encode(moving)  # b c h w
        num_clips, num_frames = mel.shape[:2]
        if liveliness is None:
            liveliness = self.typical_liveliness.expand(num_clips)
        known = latents.new_zeros(num_clips, 0, self.motion_channels, *latents.shape[2:])
        share = self.chance_by_place()  # m h w
        start = 0
        while start < num_frames:
            length = window if start else window // 2
            first = start - known.shape[1]
            mel_window = mel[:, first : first + length]  # b w n m
            shape = (num_clips, mel_window.shape[1], *known.shape[2:])
            noise, chance = torch.randn(2, *shape, generator=generator).to(latents.device)
            # Without the factor, the few solver steps would leave visible noise in other places.
            noise = share * noise
            chance = share * self.prior.sample(chance, known.shape[1])
            conditions = self.encode_conditions(mel_window, reference, words, scales)
            x0 = self.sample(conditions, latents, noise, chance, known, num_steps, guidance)
            new = x0[:, known.shape[1] :]
            yield self.decode(new, moving, liveliness).clamp(-1, 1)
            known = x0[:, -KNOWN_FRAMES:]
            start += new.shape[1]

    def generate(self, *args, **kwargs):
        """Return all frames [b f 3 H W] of `stream`, with the same arguments."""
        return torch.cat(list(self.stream(*args, **kwargs)), dim=1)


def speech_weights(x0, mel):
    """Return weights [m h w] of the squared error by place: a quarter everywhere, and more where
    speech explains more of the motion's variance. Their mean, weighted by the power of x0
    [b f m h w], is 1 if speech explains any of it.

    Heads, eyes and cameras move more than mouths: without weights, speech could lower only a few
    hundredths of the loss. What speech explains is the share of the variance over time that a ridge
    regression on mel windows [b f n m], fitted to one half of the clips, explains in the other half
    (a person may be in both). As in the loss, a calm clip counts as much as a lively one.
    """
    share = 0.75
    shape = x0.shape[2:]
    x0 = x0.flatten(2).double()  # b f (m h w)
    x0 = x0 / x0.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    motion = x0 - x0.mean(1, keepdim=True)  # over time
    speech = mel.unflatten(2, (-1, 4)).mean(3).flatten(2).double()  # b f d, four mel steps a frame
    speech = speech - speech.mean(1, keepdim=True)
    half = len(x0) // 2
    s, x = speech[:half].flatten(0, 1), motion[:half].flatten(0, 1)  # (b f) ...
    gram = s.T @ s  # d d
    gram.diagonal().add_(gram.diagonal().mean().clamp(min=1e-6))  # damping
    coefficients = torch.linalg.solve(gram, s.T @ x)  # d (m h w)
    s, x = speech[half:].flatten(0, 1), motion[half:].flatten(0, 1)
    error = (x - s @ coefficients).square().mean(0)  # (m h w)
    explained = (1 - error / x.square().mean(0).clamp(min=1e-12)).clamp(min=0)
    power = x0.square().mean((0, 1))
    by_speech = explained / ((explained * power).sum() / power.sum()).clamp(min=1e-6)
    return (1 - share + share * by_speech).view(shape).float()
