"""Metrics of talking heads, the standard networks that they use, the small judges in place of these
networks, and the face finder that cuts faces out of clips.

Frames are floating-point tensors in [0, 1] at 25 fps: pictures `n c h w`, clips `f c h w`, batches
`b f c h w`. Sound is int16 at 16 kHz. Metrics with a star are computed by `Judges`, which
`train_judges` trains on public people; the other networks read the published files
(`load_standard`). `METRICS` lists what each metric needs.

    python metrics.py real/ fake/ --weights DIR --judges runs/NAME/backbone.pt --json out.json
    python metrics.py --list
"""

import argparse
import hashlib
import json
import math
import sys
import unicodedata
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from scipy import stats
from torch import nn
from torchvision.models import inception
from torchvision.ops import Conv2dNormActivation, Conv3dNormActivation
from torchvision.ops import box_iou, nms, roi_align, sigmoid_focal_loss
from torchvision.transforms.functional import normalize, resize
from tqdm import tqdm

import data

# ---------------------------------------------------------------- frames and clips


def check_frames(*clips):
    """Raise ValueError unless all clips have one shape and floating-point values in [0, 1]."""
    for clip in clips:
        if not clip.is_floating_point():
            raise ValueError(f"frames must be floating-point numbers in [0, 1], not {clip.dtype}")
        if clip.shape != clips[0].shape or not clip.numel():
            shapes = " and ".join(str(list(clip.shape)) for clip in clips)
            raise ValueError(f"frames to compare must have one shape, not {shapes}")
        low, high = (float(value) for value in clip.detach().aminmax())
        if math.isnan(low):
            raise ValueError("frames must be finite: did a training diverge? Lower its lr")
        if not (low > -1e-3 and high < 1 + 1e-3):
            raise ValueError(f"frames must lie in [0, 1], not {low:.3g} ... {high:.3g}")


def unit_frames(frames):
    """Return uint8 frames as a float32 tensor in [0, 1]."""
    return torch.from_numpy(np.array(frames, dtype=np.float32)).div_(255)


def chunk_size(frames):
    """Return how many frames [... h w] are processed together: at most 32 and 2^18 pixels (one
    frame of 512 x 512), but at least one.
    """
    return max(1, min(32, 2**18 // (frames.shape[-2] * frames.shape[-1])))


def per_frame(function, *clips):
    """Apply a function of frames [n c h w] to clips [... c h w], `chunk_size` frames at a time."""
    shape = clips[0].shape
    size = chunk_size(clips[0])
    clips = [clip.reshape(-1, *shape[-3:]) for clip in clips]
    results = None
    for start in range(0, len(clips[0]), size):
        part = function(*(clip[start : start + size] for clip in clips))
        if results is None:  # written in place, as a list of parts would fragment the memory
            results = part.new_empty(len(clips[0]), *part.shape[1:])
        results[start : start + size] = part
    return results.reshape((*shape[:-3], *results.shape[1:]))


def psnr(x, y):
    """Return the peak signal-to-noise ratio in dB of each frame, [... c h w] twice -> [...].

    Equal frames give 100. Raises ValueError for frames that `check_frames` refuses, as all metrics
    of frames do.
    """
    check_frames(x, y)
    return per_frame(_psnr, x, y)


def _psnr(x, y):
    error = (x - y).square().mean((-3, -2, -1), dtype=torch.float64)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(x, y):
    """Return the structural similarity of each frame, [... c h w] twice -> [...].

    Wang et al. 2004: Gaussian window of 11 x 11 pixels with sigma 1.5, valid region, population
    covariance, mean over the channels. Raises ValueError for fewer than 11 pixels a side.
    """
    check_frames(x, y)
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, not {list(x.shape[-2:])}")
    return per_frame(_ssim, x, y)


def _ssim(x, y):
    x = x.double()  # float32 would lose E[x^2] - E[x]^2 in flat regions
    y = y.double()
    moments = torch.stack([x, y, x * x, y * y, x * y])  # 5 n c h w
    rows = _gaussian_windows(x.shape[-2], x.device)
    columns = _gaussian_windows(x.shape[-1], x.device)
    mean_x, mean_y, xx, yy, xy = rows @ moments @ columns.T  # n c h-10 w-10 each
    c1 = 0.01**2
    c2 = 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = xx - mean_x**2 + yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * structure).mean((-3, -2, -1))


def _gaussian_windows(size, device):
    """Return the matrix [size - 10, size] whose rows are the Gaussian windows of SSIM."""
    centers = torch.arange(5, size - 5, device=device)
    distance = torch.arange(size, device=device) - centers[:, None]
    weights = torch.exp(-distance.double().square() / (2 * 1.5**2)) * (distance.abs() <= 5)
    return weights / weights.sum(1, keepdim=True)


def temporal_jitter(frames):
    """Return the mean absolute difference of consecutive frames, [... f c h w] -> [...].

    Raises ValueError for a single frame.
    """
    check_frames(frames)
    if frames.shape[-4] < 2:
        raise ValueError("jitter needs at least two frames")
    before = frames[..., :-1, :, :, :]
    after = frames[..., 1:, :, :, :]
    return per_frame(_mean_difference, before, after).mean(-1)


def _mean_difference(x, y):
    return (x - y).abs().mean((-3, -2, -1))


def jitter_ratio(generated, truth):
    """Return the temporal jitter of generated clips over that of the true ones; 1 is best.

    Jitter below 1e-4 counts as 1e-4: two clips that stand still have equal jitter.
    """
    still = 1e-4
    return temporal_jitter(generated).clamp(min=still) / temporal_jitter(truth).clamp(min=still)


def mean_jitter(clips):
    """Return the mean temporal jitter of a list of data.Clip, of at most 20 s of each."""
    most = 20 * data.FPS
    jitter = [float(temporal_jitter(unit_frames(clip.frames[:most]))) for clip in clips]
    return float(np.mean(jitter))


def perceptual_distances(embed, generated, truth):
    """Return LPIPS [f] of two clips [f c h w] and the terms [f - 1] whose mean is tLP (Chu et al.
    2020), for `embed(frames) -> [n d]` whose squared distances are LPIPS.

    A term of tLP is the absolute difference between the LPIPS of two consecutive generated frames
    and that of the two true frames.
    """
    check_frames(generated, truth)
    distances = []
    changes = []
    size = chunk_size(truth)
    last = []  # [2 1 d], of the last frames of the chunk before
    for x, y in zip(generated.split(size), truth.split(size)):
        vectors = torch.stack([embed(x), embed(y)])  # 2 n d
        distances.append(squared_distance(*vectors))
        vectors = torch.cat([*last, vectors], 1)
        step_x, step_y = [squared_distance(clip[:-1], clip[1:]) for clip in vectors]
        changes.append((step_x - step_y).abs())
        last = [vectors[:, -1:]]
    return torch.cat(distances), torch.cat(changes)


def mouth_region(frames):
    """Return the mouth's part of face tracks [... h w]: 7/16 of each side, below the centre."""
    h, w = frames.shape[-2:]
    return frames[..., 13 * h // 32 : 27 * h // 32, 9 * w // 32 : 23 * w // 32]


def mouth_correlation(predicted, true):
    """Return Pearson's correlation of mouth openings, [... f] twice -> [...]; 0 if one is still."""
    p = torch.as_tensor(predicted).double()
    t = torch.as_tensor(true).double()
    p = p - p.mean(-1, keepdim=True)
    t = t - t.mean(-1, keepdim=True)
    # A deviation of 1e-4 at least: equal frames differ by rounding, which is not motion.
    return F.cosine_similarity(p, t, dim=-1, eps=1e-4 * p.shape[-1] ** 0.5)


# ---------------------------------------------------------------- means and their intervals


def mean_ci(values, groups=None):
    """Return {"mean", "ci95", "n"} of `values` [n]: ci95 is the 95 % t interval of the mean, None
    for a single value or group.

    With `groups` [n], for example the person of each clip, mean and interval are those of the
    groups' means, since the values of one group are not independent; "groups" is their number.
    Raises ValueError for no or infinite values.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    result = {"n": len(values)}
    units = values
    if groups is not None:
        groups = np.asarray(groups)
        units = np.array([values[groups == group].mean() for group in np.unique(groups)])
        result["groups"] = len(units)
    mean = float(units.mean())
    interval = None
    if len(units) > 1:
        half = stats.t.ppf(0.975, len(units) - 1) * units.std(ddof=1) / math.sqrt(len(units))
        interval = [float(mean - half), float(mean + half)]
    return {"mean": mean, "ci95": interval} | result


def auc(high, low):
    """Return how often one of `high` [n] is above one of `low` [m]; ties count half."""
    wins = stats.mannwhitneyu(high, low, method="asymptotic").statistic
    return float(wins / (len(high) * len(low)))


# ---------------------------------------------------------------- distributions of features


def _feature_rows(features):
    features = torch.as_tensor(features).double()
    if len(features) < 2:
        raise ValueError("a distance of distributions needs at least two frames on each side")
    return features


def frechet_distance(real_features, fake_features):
    """Return the Frechet distance (FID, Heusel et al. 2017) of two matrices [n d].

    Warns where there are fewer frames than dimensions: the distance is then mostly bias. Raises
    ValueError below two.
    """
    real = _feature_rows(real_features)
    fake = _feature_rows(fake_features)
    n = min(len(real), len(fake))
    d = real.shape[1]
    if n < d:
        warnings.warn(f"FID of {n} frames in {d} dimensions is biased: compare equal n only")
    # R1^T R1 = S1 and R2^T R2 = S2, so that tr (S1 S2)^(1/2) is the nuclear norm of R1 R2^T
    r1, r2 = [
        torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (real, fake)
    ]
    trace = r1.square().sum() + r2.square().sum() - 2 * torch.linalg.svdvals(r1 @ r2.T).sum()
    return max(0.0, float((real.mean(0) - fake.mean(0)).square().sum() + trace))


def kernel_distance(real_features, fake_features, subset_size=1000):
    """Return mean and std over 100 subsets of the kernel distance (KID, Binkowski et al. 2018).

    It is the squared MMD with the kernel (x.y/d + 1)^3 of two matrices [n d], of at most 5,000 rows
    each, unbiased for independent rows. Frames of a clip are not independent: compare methods on
    the same clips only, where the truth itself may be below 0. With fewer than `subset_size` rows a
    subset holds half of them; with hardly more, subsets are nearly the same and their std has no
    meaning.
    """
    generator = torch.Generator().manual_seed(0)
    real = _feature_rows(real_features)
    fake = _feature_rows(fake_features)
    # The kernel of all pairs is computed once; this bounds its memory.
    real = real[torch.randperm(len(real), generator=generator)[:5000]]
    fake = fake[torch.randperm(len(fake), generator=generator)[:5000]]
    n = min(len(real), len(fake))
    m = subset_size if n >= subset_size else max(2, n // 2)
    rows = torch.cat([real, fake])
    kernel = (rows @ rows.T).div_(rows.shape[1]).add_(1).pow_(3)
    kernel.fill_diagonal_(0)  # unbiased: without the pairs of a frame and itself
    reals = kernel.new_zeros(100, len(rows))  # one subset per row: 1 for each of its members
    fakes = torch.zeros_like(reals)
    for one, other in zip(reals, fakes):
        one[torch.randperm(len(real), generator=generator)[:m]] = 1
        other[torch.randperm(len(fake), generator=generator)[:m] + len(real)] = 1
    to_reals = reals @ kernel  # [subsets, rows]: a row's kernel, summed over a subset
    to_fakes = fakes @ kernel
    within = (to_reals * reals + to_fakes * fakes).sum(1)  # 100
    across = (to_reals * fakes).sum(1)
    distances = within / (m * (m - 1)) - 2 * across / m**2
    return float(distances.mean()), float(distances.std(correction=0))


# ---------------------------------------------------------------- the standard networks
# Their weights are random or unset until `load_standard` reads the published files.


def squared_distance(x, y):
    """Return the squared Euclidean distance of rows, [n d] twice -> [n]."""
    return (x - y).square().sum(1)


class _FIDPool:
    """The pooling branch of the published graph (2015-12-05): its averages exclude the padding."""

    def _forward(self, x):
        return super()._forward(x)[:-1] + [self.branch_pool(self.pool(x))]

    def pool(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(_FIDPool, inception.InceptionA):
    pass


class _BlockC(_FIDPool, inception.InceptionC):
    pass


class _BlockE(_FIDPool, inception.InceptionE):
    pass


class _LastBlock(_BlockE):
    def pool(self, x):  # only here the published graph takes the maximum
        return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionFID(inception.Inception3):
    """FID's Inception: frames [n 3 h w] -> features [n 2048] of its last pooling layer."""

    def __init__(self):
        blocks = [
            inception.BasicConv2d,
            _BlockA,
            inception.InceptionB,
            _BlockC,
            inception.InceptionD,
            _BlockE,
            None,  # no auxiliary classifier
        ]
        super().__init__(1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c = _LastBlock(2048)
        self.eval().to(memory_format=torch.channels_last)  # 1.5 times faster on CPUs

    def forward(self, frames):
        check_frames(frames)
        x = frames.contiguous(memory_format=torch.channels_last)
        x = F.interpolate(x, (299, 299), mode="bilinear")  # published without antialiasing
        x = 2 * x - 1
        for layer in list(self.children())[:-3]:  # without avgpool, dropout and fc
            x = layer(x)
        return x.mean((-2, -1))  # n 2048


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018) of `net` alex or vgg: frames [n 3 h w] twice -> distance [n].

    `features` is for torchvision's file of the backbone, `lins` for LPIPS's alex.pth or vgg.pth.
    """

    def __init__(self, net="alex"):
        super().__init__()
        if net not in ("alex", "vgg"):
            raise ValueError(f"LPIPS has the nets alex and vgg, not {net!r}")
        self.compared = (1, 4, 7, 9, 11) if net == "alex" else (3, 8, 15, 22, 29)  # ReLU layers
        with torch.device("meta"):  # no random initialisation, as the files replace all weights
            backbone = torchvision.models.alexnet() if net == "alex" else torchvision.models.vgg16()
        # without the last pooling, which is not compared
        self.features = backbone.features[:-1].to_empty(device="cpu")
        self.lins = nn.ModuleDict()
        for i, layer in enumerate(self.compared):
            channels = self.features[layer - 1].out_channels
            lin = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.lins[f"lin{i}"] = nn.ModuleDict({"model": lin})
        self.eval()

    def embed(self, frames):
        """Return the vectors [n d] whose squared distance LPIPS is, of frames [n 3 h w]."""
        check_frames(frames)
        x = normalize(2 * frames - 1, mean=[-0.030, -0.088, -0.188], std=[0.458, 0.448, 0.450])
        parts = []
        for i, layer in enumerate(self.features):
            x = layer(x)  # n c h w
            if i in self.compared:
                weight = self.lins[f"lin{len(parts)}"]["model"][1].weight  # 1 c 1 1, never negative
                weight = weight / x[0, 0].numel()
                parts.append((F.normalize(x, eps=1e-10) * weight.sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, x, y):
        return squared_distance(self.embed(x), self.embed(y))


class _FaceBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride == 2:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.conv1(self.bn1(x))
        y = self.conv2(self.prelu(self.bn2(y)))
        return self.bn3(y) + self.downsample(x)


class ArcFace(nn.Module):
    """ArcFace's iresnet50 or iresnet100 (Deng et al. 2019): faces [n 3 h w] -> unit [n 512].

    Published similarities are of faces aligned by five landmarks to 112 x 112 pixels. Nothing here
    finds landmarks: the whole frame is resized. On face tracks that are cut alike, methods can be
    compared with one another, but not with published values.
    """

    def __init__(self, depth=50):
        super().__init__()
        if depth not in (50, 100):
            raise ValueError(f"ArcFace has depth 50 or 100, not {depth!r}")
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        num_blocks = (3, 4, 14, 3) if depth == 50 else (3, 13, 30, 3)
        inputs = 64
        for i, num in enumerate(num_blocks):
            c = 64 * 2**i
            blocks = [_FaceBlock(inputs, c, 2)] + [_FaceBlock(c, c, 1) for _ in range(num - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = c
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)
        self.eval()

    def forward(self, frames):
        check_frames(frames)
        x = 2 * resize(frames, [112, 112]) - 1
        x = self.prelu(self.bn1(self.conv1(x)))  # n 64 112 112
        x = self.layer2(self.layer1(x))  # n 128 28 28
        x = self.layer4(self.layer3(x))  # n 512 7 7
        x = self.fc(self.bn2(x).flatten(1))
        return F.normalize(self.features(x), dim=-1)  # n 512


def mfcc(audio):
    """Return 13 MFCC at 100 Hz, float64 [t 13], of sound [n] at 16 kHz on the scale of int16.

    As python_speech_features does: pre-emphasis, rectangular windows of 25 ms, 26 triangular mel
    filters between whole FFT bins, liftering by 22, and the log energy in place of the first
    coefficient.
    """
    audio = np.asarray(audio, dtype=np.float64)
    audio = np.append(audio[:1], audio[1:] - 0.97 * audio[:-1])
    audio = np.pad(audio, (0, max(400 - len(audio), -(len(audio) - 400) % 160)))
    windows = np.lib.stride_tricks.sliding_window_view(audio, 400)[::160]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512  # t 257
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    edges = np.floor(513 * 700 * (10 ** (mels / 2595) - 1) / 16000)
    triangles = [np.interp(np.arange(257), edges[i : i + 3], [0, 1, 0]) for i in range(26)]
    smallest = np.finfo(float).eps  # in place of zeros
    bands = power @ np.array(triangles).T  # t 26
    energy = power.sum(1)
    cepstra = scipy.fft.dct(np.log(np.where(bands == 0, smallest, bands)), norm="ortho")[:, :13]
    cepstra *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    cepstra[:, 0] = np.log(np.where(energy == 0, smallest, energy))
    return cepstra


def _sync_head():
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """SyncNet v2 (Chung & Zisserman 2016)."""

    def __init__(self):
        super().__init__()
        # Convolution (inputs, outputs, kernel 3, stride 1), padded by half a kernel, norm and ReLU.
        conv2d = partial(Conv2dNormActivation, bias=True)
        conv3d = partial(Conv3dNormActivation, bias=True)
        self.netcnnaud = nn.Sequential(
            *conv2d(1, 64),
            nn.Identity(),  # a pooling of 1 x 1 in the published graph
            *conv2d(64, 192),
            nn.MaxPool2d(3, (1, 2)),
            *conv2d(192, 384),
            *conv2d(384, 256),
            *conv2d(256, 256),
            nn.MaxPool2d(3, 2),
            *conv2d(256, 512, (5, 4), padding=0),
        )
        self.netcnnlip = nn.Sequential(
            *conv3d(3, 96, (5, 7, 7), (1, 2, 2), padding=0),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *conv3d(96, 256, (1, 5, 5), (1, 2, 2), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *conv3d(256, 256, (1, 3, 3)),
            *conv3d(256, 256, (1, 3, 3)),
            *conv3d(256, 256, (1, 3, 3)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *conv3d(256, 512, (1, 6, 6), padding=0),
        )
        self.netfcaud = _sync_head()
        self.netfclip = _sync_head()
        self.eval()

    def forward(self, frames, cepstra):
        """Return embeddings [f-4 1024] of the video and of the sound in windows of 5 frames.

        Takes frames [f 3 h w] and their MFCC [4f 13].
        """
        check_frames(frames)
        x = 255 * resize(frames, [224, 224]).flip(1)  # BGR
        x = rearrange(x, "f c h w -> 1 c f h w")
        x = self.netcnnlip(x)  # 1 512 f-4 1 1: the first layer sees 5 frames, the others one
        video = self.netfclip(rearrange(x, "1 c t 1 1 -> t c"))
        windows = cepstra.unfold(0, 20, 4)[:, None]  # f-4 1 13 20
        audio = self.netfcaud(self.netcnnaud(windows).flatten(1))
        return video, audio


MAX_SHIFT = 15  # frames by which the sound is moved to find the best match
LEAST_FOR_SYNC = 2 * MAX_SHIFT + 5  # with fewer frames, most shifts compare with padding


def sync_offset(video, audio):
    """Return {"lse_d", "lse_c", "offset"} of embeddings [t d] twice (Chung & Zisserman 2016).

    LSE-D is the mean distance at the best shift of the sound within 15 frames, LSE-C the median
    over the shifts minus LSE-D. The offset is the number of frames by which the sound has to be
    moved (below 0: it is late). The audio embeddings are zero beyond the clip.
    """
    t = len(video)
    padded = F.pad(audio[:t], (0, 0, MAX_SHIFT, MAX_SHIFT))
    distances = []
    for shift in range(2 * MAX_SHIFT + 1):
        distances.append(F.pairwise_distance(video, padded[shift : shift + t]).mean())
    return _best_shift(torch.stack(distances))


def _best_shift(distance):
    best = int(distance.argmin())
    smallest = float(distance[best])
    return {
        "lse_d": smallest,
        "lse_c": float(distance.median()) - smallest,
        "offset": MAX_SHIFT - best,
    }


@torch.no_grad()
def lse(syncnet, frames, audio):
    """Return `sync_offset` of frames [f 3 h w] at 25 fps and int16 sound [n] at 16 kHz.

    Raises ValueError below 35 frames with sound.
    """
    num_frames = min(len(frames), len(audio) // data.SAMPLES_PER_FRAME)
    if num_frames < LEAST_FOR_SYNC:
        raise ValueError(f"LSE needs {LEAST_FOR_SYNC} frames with sound, not {num_frames}")
    num_windows = num_frames - 5  # the published script leaves the last one out
    cepstra = torch.from_numpy(mfcc(data.to_int16(audio))).to(frames)
    cepstra = F.pad(cepstra, (0, 0, 0, max(0, 4 * (num_windows + 4) - len(cepstra))))
    parts = []
    for start in range(0, num_windows, 20):  # bounds the memory
        stop = min(start + 20, num_windows) + 4
        parts.append(syncnet(frames[start:stop], cepstra[4 * start : 4 * stop]))
    video, sound = [torch.cat(side) for side in zip(*parts)]
    return sync_offset(video, sound)


# ---------------------------------------------------------------- metrics and their files

# A new metric needs a row here, its value in `Evaluation.add` and, to be in report.md, a column in
# `train.write_report`.
METRICS_TABLE = """\
| metric | network | file | crop | resize | fps | least |
|---|---|---|---|---|---|---|
| psnr | – | – | none | none | any | 1 frame |
| mouth_psnr | – | – | mouth region | none | any | 1 frame |
| ssim | – | – | none | none | any | 1 frame of 11 x 11 pixels |
| lpips | lpips | alexnet-owt-7be5be79.pth, alex.pth | none | none | any | 31 x 31 pixels |
| lpips_vgg | lpips_vgg | vgg16-397923af.pth, vgg.pth | none | none | any | 31 x 31 pixels |
| lpips* | judges | backbone.pt | none | 64 x 64 | any | 1 frame |
| tlp | lpips | alexnet-owt-7be5be79.pth, alex.pth | none | none | 25 | 2 frames, 31 x 31 pixels |
| tlp_vgg | lpips_vgg | vgg16-397923af.pth, vgg.pth | none | none | 25 | 2 frames, 31 x 31 pixels |
| tlp* | judges | backbone.pt | none | 64 x 64 | 25 | 2 frames |
| kid | inception | pt_inception-2015-12-05-6726825d.pth | none | 299 x 299 | any | 50 in all |
| kid* | judges | backbone.pt | none | 64 x 64 | any | 50 in all |
| fid | inception | pt_inception-2015-12-05-6726825d.pth | none | 299 x 299 | any | 2048 in all |
| fid* | judges | backbone.pt | none | 64 x 64 | any | 960 in all |
| id_similarity | arcface | r50/backbone.pth | as given | 112 x 112 | any | 1 frame |
| id_similarity_r100 | arcface_r100 | r100/backbone.pth | as given | 112 x 112 | any | 1 frame |
| id_similarity* | judges | backbone.pt | as given | 64 x 64 | any | 1 frame |
| right_person* | judges | backbone.pt | as given | 64 x 64 | any | 2 people in training clips |
| temporal_jitter | – | – | none | none | 25 | 2 frames |
| jitter_ratio | – | – | none | none | 25 | 2 frames |
| lse_c | syncnet | syncnet_v2.model | as given | 224 x 224 | 25 | 35 frames with sound |
| lse_d | syncnet | syncnet_v2.model | as given | 224 x 224 | 25 | 35 frames with sound |
| offset_found | syncnet | syncnet_v2.model | as given | 224 x 224 | 25 | 35 frames with sound |
| lse_c* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 35 frames with sound |
| lse_d* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 35 frames with sound |
| offset_found* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 35 frames with sound |
| sync* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 35 frames with sound |
| right_speech* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 35 frames, other speech |
| mouth_correlation* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 2 frames, openings |
| mouth_std_ratio* | judges | backbone.pt | mouth region | 64 x 64 | 25 | 2 frames, openings |"""

_COLUMNS, _, *_ROWS = [line[2:-2].split(" | ") for line in METRICS_TABLE.split("\n")]
METRICS = {cells[0]: dict(zip(_COLUMNS, cells)) for cells in _ROWS}  # metric -> column -> cell

# network -> class and files. For each file: patterns of its path in public repositories, the module
# whose weights it holds, and the prefix of its keys.
NETWORKS = {
    "inception": (InceptionFID, [(["*inception-2015-12-05*.pth"], "", "")]),
    "lpips": (
        LPIPS,
        [
            (["alexnet-owt-*.pth"], "features", "features."),
            (["alex.pth", "*lpips*alex*.pth"], "lins", ""),
        ],
    ),
    "lpips_vgg": (
        partial(LPIPS, "vgg"),
        [
            (["vgg16-*.pth"], "features", "features."),
            (["vgg.pth", "*lpips*vgg*.pth"], "lins", ""),
        ],
    ),
    "arcface": (ArcFace, [(["*r50*.pth", "*r50*/backbone.pth", "iresnet50*.pth"], "", "")]),
    "arcface_r100": (
        partial(ArcFace, 100),
        [(["*r100*.pth", "*r100*/backbone.pth", "iresnet100*.pth"], "", "")],
    ),
    "syncnet": (SyncNet, [(["syncnet_v2*"], "", "")]),
}


def _load_file(path):
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are none of its own
        reason = type(error).__name__
        raise ValueError(f"{path} is not a file of weights ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a file of weights (it holds no dict)")
    return content


def _sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_weights(module, path, prefix=""):
    """Load a published file's tensors below `prefix`, unchanged, and return the file's SHA-256.

    Raises ValueError for a file that is no state dict or whose tensors do not fit; it names the
    first key that does not.
    """
    own = module.state_dict()
    # older files lack these counters
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    for key, value in _load_file(path).items():
        if not isinstance(key, str) or not torch.is_tensor(value):
            raise ValueError(f"{path} is no state dict: {key!r} does not name a tensor")
        key = key.removeprefix("module.")  # of DataParallel
        if key.startswith(prefix):
            state[key.removeprefix(prefix)] = value
    for key in own | state:
        if key not in state or key not in own or state[key].shape != own[key].shape:
            raise ValueError(f"{path} does not fit its network: first misfit {prefix}{key}")
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    return _sha256(path)


def _find_file(folder, patterns):
    found = [path for pattern in patterns for path in Path(folder).rglob(pattern)]
    return max(found, default=None)  # the last by name: LPIPS's v0.1, not v0.0


def load_standard(folder=""):
    """Return (networks, sources): the standard networks whose files lie in or below a folder.

    `networks` {key of NETWORKS: module} is for `Evaluation`. `sources` holds for each metric of a
    standard network {"network": class, "weights": {file: SHA-256}}, or {"network": None, "reason":
    the files that it needs}. Raises ValueError for a folder that does not exist and for a file that
    does not fit its network.
    """
    if folder and not Path(folder).is_dir():
        raise ValueError(f"no such folder of weights: {folder}")
    networks = {}
    sources = {}
    for name, (make_network, files) in NETWORKS.items():
        paths = [_find_file(folder, patterns) if folder else None for patterns, _, _ in files]
        source = None
        if all(paths):
            network = make_network()
            weights = {}
            for path, (_, module, prefix) in zip(paths, files):
                filled = network.get_submodule(module)
                weights[str(path.relative_to(folder))] = load_weights(filled, path, prefix)
            networks[name] = network
            source = {"network": type(network).__name__, "weights": weights}
        for metric, needs in METRICS.items():
            if needs["network"] == name:
                missing = {"network": None, "reason": f"needs {needs['file']}"}
                sources[metric] = source or missing
    return networks, sources


# ---------------------------------------------------------------- the small judges

NUM_VIEWS = 10  # of data.VIEW_NAMES, all but the mirror


def _mouth_net(inputs, outputs):
    return nn.Sequential(
        Conv2dNormActivation(inputs, 24, stride=2),  # 24 14 14
        Conv2dNormActivation(24, 48, stride=2),  # 48 7 7
        Conv2dNormActivation(48, 96, stride=2),  # 96 4 4
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96 * 4 * 4, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


class Judges(nn.Module):
    """Small networks in place of the standard ones; `train_judges` trains them on public people.

    A face network embeds identities, and its layers give the perceptual distance and the features
    of FID* and KID*; a pair of networks embeds mouth motion and speech; one estimates the mouth
    opening. All see 64 x 64 pixels; frames of another size are resampled. `scores` says how well
    they do on people they were not trained on, `has_opening` whether the openings of their training
    clips were known.
    """

    def __init__(self):
        super().__init__()
        dim = 64  # of the embeddings
        self.face = nn.Sequential(
            Conv2dNormActivation(3, 16, stride=2),  # 16 32 32
            Conv2dNormActivation(16, 32, stride=2),  # 32 16 16
            Conv2dNormActivation(32, 64, stride=2),  # 64 8 8
            Conv2dNormActivation(64, 128, stride=2),  # 128 4 4
        )
        self.face_head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 4 * 4, dim),
            nn.BatchNorm1d(dim),
        )
        # For training only; its inputs are the channels of all four stages.
        self.view_head = nn.Linear(16 + 32 + 64 + 128, NUM_VIEWS)
        self.lips = _mouth_net(6, dim)
        self.mouth = _mouth_net(3, 1)
        self.speech = nn.Sequential(
            nn.BatchNorm1d(40),
            nn.Conv1d(40, 96, 4, 2, 1),  # 96 10
            nn.BatchNorm1d(96),
            nn.ReLU(),
            nn.Conv1d(96, 128, 4, 2, 1),  # 128 5
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 5, dim),
        )
        self.to(memory_format=torch.channels_last)  # faster on CPUs
        self.scores = {}
        self.has_opening = False

    def get_extra_state(self):
        return {"scores": self.scores, "has_opening": self.has_opening}

    def set_extra_state(self, state):
        self.scores = state["scores"]
        self.has_opening = state["has_opening"]

    def layers(self, frames):
        """Return the outputs of the face network's four stages for frames [n 3 h w]."""
        check_frames(frames)
        x = resize(frames, [64, 64]) - 0.5
        outputs = []
        for stage in self.face:
            x = stage(x)
            outputs.append(x)
        return outputs

    def identity(self, frames):
        """Return unit face embeddings, [n 3 h w] -> [n d]; similarity is their inner product."""
        return F.normalize(self.face_head(self.layers(frames)[-1]), dim=-1)

    def embed(self, frames):
        """Return the vectors [n d] whose squared distance `perceptual` is, of frames [n 3 h w]."""
        parts = []
        for x in self.layers(frames):
            unit = F.normalize(x, eps=1e-4)  # n c h w
            parts.append((unit / (4 * x[0, 0].numel()) ** 0.5).flatten(1))
        return torch.cat(parts, 1)

    def perceptual(self, x, y):
        """Return LPIPS*, a distance [n] of frames [n 3 h w] twice.

        It is the squared difference of features of unit norm, averaged over the picture and the
        four stages of the face network (after Zhang et al. 2018).
        """
        return squared_distance(self.embed(x), self.embed(y))

    def features(self, frames):
        """Return the features for FID* and KID*, the mean of every channel: [n 3 h w] -> [n d]."""
        return torch.cat([x.mean((-2, -1)) for x in self.layers(frames)], dim=1)

    def opening(self, frames):
        """Return the mouth opening [n] of frames [n 3 h w], in the unit of the training clips.

        Raises ValueError if the training clips had none.
        """
        if not self.has_opening:
            raise ValueError("these judges were trained on clips without known mouth opening")
        check_frames(frames)
        return self.mouth(mouth_region(resize(frames, [64, 64])) - 0.5).squeeze(-1)

    def mouth_video(self, frames):
        """Return unit embeddings of the mouth in windows of 5 frames, [b f 3 h w] -> [b f-4 d]."""
        check_frames(frames)
        b = len(frames)
        mouth = mouth_region(resize(frames.flatten(0, 1), [64, 64])).mean(1)  # (b f) 28 28, grey
        windows = mouth.unflatten(0, (b, -1)).unfold(1, 5, 1)  # b f-4 28 28 5
        windows = rearrange(windows, "b t h w k -> (b t) k h w")
        # The mean picture is separated from the motion, or the network would memorise faces.
        still = windows.mean(1, keepdim=True)
        x = torch.cat([still - 0.5, 4 * (windows - still)], 1)  # (b t) 6 28 28
        return F.normalize(self.lips(x), dim=-1).unflatten(0, (b, -1))

    def mouth_audio(self, mel):
        """Return unit embeddings of speech, [b f 20 40] of data.audio_windows -> [b f-4 d].

        Its windows are those of `mouth_video`.
        """
        mel = mel[:, 2:-2]  # b f-4 20 40, around the middles of the mouth's windows
        x = self.speech(rearrange(mel, "b t n m -> (b t) m n"))
        return F.normalize(x, dim=-1).unflatten(0, mel.shape[:2])


def sync_scores(video, audio):
    """Return {"sync", "lse_d", "lse_c", "offset"} of embeddings [t d] of a mouth and its speech.

    `sync` is their correlation over time, 0 for a still mouth; the others are as in `sync_offset`,
    with the distance (2 - 2 r)^(1/2) of the correlation r at each shift.
    """
    t = min(len(video), len(audio))
    video = video[:t] - video[:t].mean(0)  # the constant part has no information on sync
    audio = audio[:t] - audio[:t].mean(0)
    shifted = F.pad(audio, (0, 0, MAX_SHIFT, MAX_SHIFT)).unfold(0, 2 * MAX_SHIFT + 1, 1)  # t d s
    # At least 0.1, so that a mouth that hardly moves does not correlate by chance.
    norms = (video.norm() * audio.norm()).clamp(min=0.1)
    r = torch.einsum("t d, t d s -> s", video, shifted) / norms
    return {"sync": float(r[MAX_SHIFT])} | _best_shift((2 - 2 * r).clamp(min=0).sqrt())


def right_speech(video, own, other):
    """Return whether a mouth [t d] fits its own speech better than other speech; 0.5 if equal."""
    video = video[: min(len(own), len(other))]  # the shortest of the three decides
    r_own, r_other = (sync_scores(video, speech)["sync"] for speech in (own, other))
    return 0.5 + 0.5 * float(np.sign(round(r_own - r_other, 3)))  # rounded: 0.5 for a still mouth


# ---------------------------------------------------------------- training the judges


def split_for_judges(public, seed):
    """Return two halves of the public people {name: clips}, drawn by `seed`.

    Judges of the first half are for the losses (Eq. 9-11), those of the second for the tables: no
    model is scored by the judges that it was trained with.
    """
    names = np.random.default_rng(seed).permutation(sorted(public)).tolist()
    middle = len(names) // 2
    halves = names[:middle], names[middle:]
    return tuple({name: public[name] for name in sorted(half)} for half in halves)


def train_judges(people, steps=150, seed=0, batch_size=8, num_frames=28, device="cpu"):
    """Return Judges trained on people {name: [data.Clip]}; every eighth is held out to score them.

    Each step sees `batch_size` windows of `num_frames` frames, or of the clips' median length if
    that is less. Raises ValueError for fewer than four people, or windows below ten frames.
    """
    names = sorted(people)
    trained = [name for i, name in enumerate(names) if i % 8]
    clips = [(label, clip) for label, name in enumerate(trained) for clip in people[name]]
    lengths = [clip.num_frames for _, clip in clips]
    num_frames = min(num_frames, int(np.median(lengths or [0])))
    clips = [(label, clip) for label, clip in clips if clip.num_frames >= num_frames]
    if len(names) < 4 or num_frames < 10:
        raise ValueError(
            f"judges need four people and clips of ten frames, not {len(names)} people and "
            f"{num_frames} frames"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judges = Judges().to(device)  # drawn on the CPU: a GPU starts from the same weights
        judges.has_opening = all(clip.opening is not None for _, clip in clips)
        prototypes = torch.randn(len(trained), judges.face_head[-1].num_features)
        prototypes = nn.Parameter(prototypes.to(device))
        optimizer = torch.optim.AdamW([*judges.parameters(), prototypes], weight_decay=0.05)
        for step in tqdm(range(steps), "judges", mininterval=1):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            batch = draw_windows(clips, batch_size, num_frames, generator)
            loss = judge_loss(judges, prototypes, *batch, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    judges.eval().requires_grad_(False)
    judges.scores = score_judges(judges, {name: people[name] for name in names[::8]}, device)
    return judges


def draw_windows(clips, batch_size, num_frames, generator):
    """Return random windows of [(label, clip)]: labels [b]; frames, mel, opening [b f ...]."""
    rows = []
    for index in torch.randint(len(clips), (batch_size,), generator=generator).tolist():
        label, clip = clips[index]
        start = data.pick(range(clip.num_frames - num_frames + 1), generator)
        window = data.slice_clip(clip, start, start + num_frames)
        frames = resize(unit_frames(window.frames), [64, 64])
        mel = torch.as_tensor(data.audio_windows(window.mel))  # f 20 40
        opening = np.zeros(num_frames) if window.opening is None else window.opening
        opening = torch.tensor(opening, dtype=torch.float32)
        rows.append((torch.tensor(label), frames, mel, opening))
    return [torch.stack(column) for column in zip(*rows)]


def judge_loss(judges, prototypes, labels, frames, mel, opening, generator):
    """Return the sum of all judges' losses on a batch of windows, each seen in a random view."""
    b, f = frames.shape[:2]
    device = prototypes.device
    view = torch.rand(b, len(data.VIEW_NAMES), generator=generator) * 2 - 1
    frames = data.augment(frames, view, generator).to(device)  # b f 3 64 64
    labels, mel, opening, view = (x.to(device) for x in (labels, mel, opening, view))
    # -- identity: cosine softmax with a margin (CosFace, Wang et al. 2018), on a few frames
    faces = frames[:, :: f // 4]  # b k 3 64 64
    labels = labels.repeat_interleave(faces.shape[1])
    layers = judges.layers(faces.flatten(0, 1))
    embedding = F.normalize(judges.face_head(layers[-1]), dim=-1)
    cosine = embedding @ F.normalize(prototypes, dim=-1).T  # (b k) people
    margin = 0.25 * F.one_hot(labels, len(prototypes))
    loss = F.cross_entropy(16 * (cosine - margin), labels)
    # -- view: the layers have to represent light, blur and noise, too
    pooled = torch.cat([x.mean((-2, -1)) for x in layers], dim=1)
    target = view[:, :NUM_VIEWS].repeat_interleave(faces.shape[1], 0)
    loss = loss + F.mse_loss(judges.view_head(pooled), target)
    # -- sync: InfoNCE both ways, each window against all windows of the batch
    video = judges.mouth_video(frames).flatten(0, 1)  # (b t) d
    audio = judges.mouth_audio(mel).flatten(0, 1)
    logits = 12 * video @ audio.T  # (b t) (b t)
    target = torch.arange(len(logits), device=device)
    loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    # -- opening: its changes count more than its mean
    if judges.has_opening:
        error = judges.opening(frames[:, ::2].flatten(0, 1)).view(b, -1) - opening[:, ::2]  # b f/2
        level = error.mean(1, keepdim=True)
        loss = loss + 30 * (error - level).square().mean() + 3 * level.square().mean()
    return loss


def mean_identity(judges, clips):
    """Return the unit mean [d] of the face embeddings of every fifth frame of the clips, or of
    fewer.
    """
    # About 500 frames of an hour; of a short video every fifth.
    step = max(5, sum(clip.num_frames for clip in clips) // 500)
    frames = np.concatenate([clip.frames[::step] for clip in clips])
    device = judges.view_head.weight.device
    identity = per_frame(judges.identity, unit_frames(frames).to(device))  # f d
    return F.normalize(identity.mean(0), dim=0)


def identity_distances(judges, clips):
    """Return the cosine distance of the faces in each pair of clips, [n n]."""
    embeddings = torch.stack([mean_identity(judges, [clip]) for clip in clips]).cpu()  # n d
    return 1 - embeddings @ embeddings.T


def identity_threshold(judges, people):
    """Return the 99th percentile of the identity distances between two clips of one person.

    The judges must not have been trained on the people {name: clips}; at most 8 clips of each are
    compared.
    """
    distances = []
    for clips in people.values():
        pairs = identity_distances(judges, clips[:8])
        distances += pairs[tuple(torch.triu_indices(len(pairs), len(pairs), 1))].tolist()
    # Where nobody has two clips: 2, the greatest cosine distance, so that nobody is a stranger.
    return float(np.quantile(distances or [2.0], 0.99))


def find_strangers(judges, clips, threshold):
    """Return the clips whose face is farther than `threshold` from the most typical clip's.

    If there are only two clips, and they differ, the second one is returned.
    """
    distances = identity_distances(judges, clips)
    typical = distances.median(1).values.argmin()
    return [clip for clip, far in zip(clips, distances[typical] > threshold) if far]


def load_judges(path):
    """Return the frozen Judges of the tables in a run's backbone.pt.

    Raises ValueError if the file holds none of this version, or untrained ones.
    """
    judges = Judges()
    content = _load_file(path)
    try:
        judges.load_state_dict(content.get("state", content)["judges"]["table"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path} holds no judges of this version") from None
    if not judges.scores:
        raise ValueError(f"the judges in {path} were never trained")
    return judges.eval().requires_grad_(False)


# ---------------------------------------------------------------- finding faces

PATCH = 64  # pixels a side of the pictures that the finder learns from
STRIDE = 8  # pixels between the places at which it looks for a face
MARGIN = 32  # pixels around a picture, repeated from its edge
FACE_SIDES = (20, 48)  # pixels: least and greatest side of the faces that it learns to find
LEVELS = (192, 136, 96, 68, 48, 34)  # pixels: shorter sides at which it looks at a picture
LEAST_SCORE = 0.6  # of a face, somewhere in a picture
LEAST_SCORE_USUAL = 0.4  # of a face where tracks have it: at one place fewer detections are false
# (x, y, side) in pixels of a detected face in the patches that are cut around it for a second look.
SECOND_LOOK = ((32, 32, 32), (28, 32, 27), (36, 32, 27), (32, 28, 38), (32, 36, 38))


class FaceFinder(nn.Module):
    """Finds faces, as boxes (left, top, right, bottom) cut like the tracks it was trained on.

    For every eighth pixel the network predicts whether a face is centred there, the offset of its
    centre and its size. It learns faces of sizes FACE_SIDES only, so pictures are scaled to several
    sizes (LEVELS). `drawings` says whether it was trained on synthetic talkers only.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2dNormActivation(3, 24, stride=2),  # 24 h/2 w/2
            Conv2dNormActivation(24, 48, stride=2),  # 48 h/4 w/4
            Conv2dNormActivation(48, 96, stride=2),  # 96 h/8 w/8
            Conv2dNormActivation(96, 96),
            Conv2dNormActivation(96, 96, dilation=2),
            Conv2dNormActivation(96, 96),
            nn.Conv2d(96, 4, 1),
        )
        nn.init.zeros_(self.layers[-1].bias)
        self.to(memory_format=torch.channels_last)
        self.drawings = False

    def get_extra_state(self):
        return {"drawings": self.drawings}

    def set_extra_state(self, state):
        self.drawings = state["drawings"]

    def fingerprint(self):
        """Return the SHA-256 of the weights."""
        tensors = (*self.parameters(), *self.buffers())
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    def forward(self, pictures):
        """Return the logit, x and y offset / 32 and log(side / 32), [n 3 h w] -> [n 4 h/8 w/8]."""
        return self.layers(2 * pictures.contiguous(memory_format=torch.channels_last) - 1)

    def boxes(self, pictures):
        """Return boxes [n p 4] and scores [n p] of all places p in pictures [n 3 h w]."""
        logit, x, y, log_side = self(pictures).unbind(1)  # n h/8 w/8
        x = 32 * x + STRIDE * (torch.arange(x.shape[2]) + 0.5)
        y = 32 * y + STRIDE * (torch.arange(y.shape[1])[:, None] + 0.5)
        half = 16 * log_side.clamp(-1.5, 1.5).exp()
        boxes = torch.stack([x - half, y - half, x + half, y + half], -1)
        return boxes.flatten(1, 2), logit.sigmoid().flatten(1)

    @torch.no_grad()
    def find(self, picture, usual=None):
        """Return the boxes [n 4] of the faces in a picture uint8 [3 h w], the best score first.

        If a face fills about the `usual` box [4], that box alone is returned.
        """
        picture = unit_frames(picture)[None]
        shorter = min(picture.shape[2:])
        # The margin is for faces at the edge; the sides are multiples of the stride.
        pyramid = {}  # pixels of the picture per pixel of the level -> level [1 3 h w]
        for level in [level for level in LEVELS if level <= 2 * shorter] or LEVELS[-1:]:
            h, w = [round(side * level / shorter) for side in picture.shape[2:]]
            small = resize(picture, [h, w])
            margins = (MARGIN, MARGIN + -w % STRIDE, MARGIN, MARGIN + -h % STRIDE)
            pyramid[shorter / level] = F.pad(small, margins, mode="replicate")
        if usual is not None:
            usual = torch.as_tensor(usual, dtype=torch.float32)
            if self._look_again(pyramid, usual) > LEAST_SCORE_USUAL:
                return usual[None]
        boxes = []
        scores = []
        for scale, level in pyramid.items():
            found, score = self.boxes(level)
            boxes.append((found[0] - MARGIN) * scale)
            scores.append(score[0])
        boxes = torch.cat(boxes)
        scores = torch.cat(scores)
        # Average each detection with the boxes that overlap it; score the mean by a second look.
        merged = []
        merged_scores = []
        for i in nms(boxes, scores, 0.3)[:6]:
            near = box_iou(boxes[i : i + 1], boxes)[0] > 0.5
            weights = scores * near
            box = weights @ boxes / weights.sum()
            merged.append(box)
            merged_scores.append((scores[i] + 2 * self._look_again(pyramid, box)) / 3)
        boxes = torch.stack(merged)
        scores = torch.stack(merged_scores)
        kept = nms(boxes, scores, 0.3)
        boxes = boxes[kept[scores[kept] > LEAST_SCORE]]
        sides = boxes[:, 2] - boxes[:, 0]
        # A box whose centre lies in a box of more than twice its side is a part of that face.
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        # i j 2: the center of box j lies in box i
        inside = (centers > boxes[:, None, :2]) & (centers < boxes[:, None, 2:])
        is_part = inside.all(2) & (sides < sides[:, None] / 2)
        return boxes[~is_part.any(0)]

    def _look_again(self, pyramid, box):
        """Return the mean score of a box [4] in patches around it (SECOND_LOOK) and their mirror
        images.
        """
        center = (box[:2] + box[2:]) / 2
        side = box[2] - box[0]
        scale = min(pyramid, key=lambda scale: abs(math.log(side / scale / 32)))
        looks = torch.tensor(SECOND_LOOK)  # v 3
        pixel = side / looks[:, 2:]  # of a patch, in the picture
        corner = center - looks[:, :2] * pixel  # v 2, the left upper ones of the patches
        cut = torch.cat([corner, corner + PATCH * pixel], 1) / scale + MARGIN  # v 4, in the level
        patches = roi_align(pyramid[scale], [cut], PATCH, sampling_ratio=1, aligned=True)
        boxes, scores = self.boxes(torch.cat([patches, patches.flip(-1)]))  # 2v p 4, 2v p
        mirrored = boxes[len(looks) :]
        mirrored[..., [0, 2]] = PATCH - mirrored[..., [2, 0]]  # left and right
        boxes = boxes * pixel.repeat(2, 1)[:, None] + corner.repeat(2, 2)[:, None]
        near = box_iou(box[None], boxes.flatten(0, 1)).view_as(scores) > 0.4
        return (scores * near).amax(1).mean()


def train_finder(people, steps, seed=0):
    """Return a FaceFinder trained on people {name: [data.Clip]}, pasted into backgrounds."""
    batch_size = 48
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        finder = FaceFinder()
    finder.drawings = all(clip.opening is not None for own in people.values() for clip in own)
    frames = []
    for own in list(people.values())[:1024]:  # 8 frames of each are 400 MB
        for _ in range(max(8, 1024 // len(people))):
            clip = data.pick(own, generator)
            frame = data.pick(clip.frames, generator)
            frames.append(resize(unit_frames(frame), [PATCH, PATCH]))
    frames = torch.stack(frames)
    optimizer = torch.optim.AdamW(finder.parameters(), weight_decay=0.01)
    for step in tqdm(range(steps), "face finder", mininterval=1):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(frames), (2, batch_size), generator=generator)
        pictures, box, is_face = paste_faces(frames[chosen[0]], frames[chosen[1]], generator)
        loss = finder_loss(finder(pictures), box, is_face)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return finder.eval().requires_grad_(False)


def finder_loss(outputs, box, is_face):
    """Return the loss of outputs [n 4 h w] for faces (x, y, side) [n 3]; `is_face` [n] says which
    pictures have one.

    Focal loss (Lin et al. 2017) of the logits, except in a ring around a face's centre, where the
    label is ambiguous, and L1 of the other outputs at the centre.
    """
    centers = STRIDE * (torch.arange(outputs.shape[-1]) + 0.5)
    x, y, side = box[:, :, None, None].unbind(1)  # n 1 1
    x = x - centers  # n 1 w
    y = y - centers[:, None]  # n h 1
    distance = torch.maximum(x.abs(), y.abs())  # n h w
    is_face = is_face[:, None, None]
    inside = is_face & (distance < (0.16 * side).clamp_min(0.55 * STRIDE))
    unclear = is_face & (distance < 0.5 * side) & ~inside
    focal = sigmoid_focal_loss(outputs[:, 0], inside.float(), alpha=-1)  # n h w
    focal = focal[~unclear].sum() / inside.sum().clamp_min(1)
    target = torch.broadcast_tensors(x / 32, y / 32, (side / 32).log())
    error = (outputs[:, 1:] - torch.stack(target, 1)).abs().sum(1)
    return focal + error[inside].sum() / inside.sum().clamp_min(1)


def paste_faces(faces, others, generator):
    """Return pictures [n 3 64 64], boxes (x, y, side) [n 3] and where there is a face to find [n].

    Faces [n 3 64 64] of any size are pasted into backgrounds. 5 in 12 are to be found; the others
    are too small, too large, absent, or replaced by a background, by the face upside down, or by
    the face blurred beyond recognition.
    """
    n = len(faces)
    uniform = partial(draw_uniform, (n, 1, 1), generator)  # -> n 1 1
    # Faces as other cameras see them, but without zoom and shift: at the place that tracks have.
    view = 2 * torch.rand(n, len(data.VIEW_NAMES), generator=generator) - 1
    view[:, : data.VIEW_NAMES.index("roll")] = 0
    faces = data.augment(faces[:, None], view, generator)[:, 0]
    faces = faces * uniform(0.4, 1)[:, None]  # darker rooms
    kind = torch.multinomial(torch.tensor([5.0, 1, 1, 3, 2]), n, True, generator=generator)
    kind = kind.view(n, 1, 1)
    is_face, too_small, too_large, replaced, absent = (kind == i for i in range(5))  # n 1 1
    scenery = make_backgrounds(others, generator)
    # Hard negatives: otherwise anything round and shaded would be taken for a face.
    upside_down = faces.flip(2)
    featureless = F.interpolate(F.avg_pool2d(faces, 16), PATCH, mode="bilinear")
    which = torch.randint(3, (n,), generator=generator)
    replacement = torch.stack([scenery.flip(0), upside_down, featureless])[which, torch.arange(n)]
    pasted = torch.where(replaced[:, None], replacement, faces)
    # Place and size.
    low, high = FACE_SIDES
    side = low * (high / low) ** uniform(0, 1)
    side = torch.where(too_small, uniform(6, 13), torch.where(too_large, uniform(75, 150), side))
    room = torch.where(too_large, PATCH, PATCH - 0.8 * side)
    x = PATCH / 2 + room * uniform(-0.5, 0.5)
    y = PATCH / 2 + room * uniform(-0.5, 0.5)
    pixels = torch.arange(PATCH) + 0.5
    u = (pixels - x) * 2 / side  # n 1 64, -1 to 1 inside
    v = (pixels[:, None] - y) * 2 / side  # n 64 1
    u, v = torch.broadcast_tensors(u, v)
    blurred = F.avg_pool2d(pasted, 3, 1, 1, count_include_pad=False)  # before it is made smaller
    pasted = torch.where((side < 32)[:, None], blurred, pasted)
    grid = torch.stack([u, v], -1)
    pasted = F.grid_sample(pasted, grid, padding_mode="border", align_corners=False)
    # The edge: a sharp square, or a soft shape between circle and square; one in five fills the
    # picture.
    power = 2 * 10 ** uniform(0, 1)
    distance = (u.abs() ** power + v.abs() ** power) ** (1 / power)
    softness = uniform(0.01, 0.1)
    opacity = ((uniform(0.85, 1.15) - distance) / softness).sigmoid()
    square = torch.maximum(u.abs(), v.abs()) < 1
    opacity = torch.where(uniform(0, 1) < 0.5, square, opacity)
    opacity = opacity.masked_fill(uniform(0, 1) < 0.2, 1).masked_fill(absent, 0)
    pictures = torch.lerp(scenery, pasted, opacity[:, None])
    # 28 % are blurred, 42 % noisy.
    view = torch.zeros_like(view)
    degradation = uniform(-0.67, 1).where(uniform(0, 1) < 0.7, 0)
    view[:, data.VIEW_NAMES.index("degradation")] = degradation.flatten()
    pictures = data.augment(pictures[:, None], view, generator)[:, 0]
    return pictures, torch.cat([x, y, side], 1).flatten(1), is_face.flatten()


def make_backgrounds(frames, generator):
    """Return pictures [n 3 64 64] without a face, from frames [n 3 64 64]; n is 5 or more.

    Each shows two of five kinds side by side: noise, drawn figures, surroundings of faces, parts of
    faces, and faces whose blocks are shuffled.
    """
    n = len(frames)
    noise, drawn, around, parts, blocks = frames.tensor_split(5)
    pictures = [
        make_noise(len(noise), generator),
        draw_figures(len(drawn), generator),
        enlarge(around, generator, edges=True),
        enlarge(parts, generator, edges=False),
        shuffle_blocks(blocks, generator),
    ]
    pictures = torch.cat(pictures)
    uniform = partial(draw_uniform, (n, 1, 1), generator)
    angle = uniform(0, 2 * math.pi)
    shift = uniform(-0.4, 1.2)
    line = torch.linspace(-1, 1, PATCH)
    side = line * angle.cos() + line[:, None] * angle.sin() - shift  # n 64 64
    others = pictures[torch.randperm(n, generator=generator)]
    return torch.lerp(pictures, others, (10 * side).sigmoid()[:, None])


def draw_uniform(shape, generator, low, high):
    """Return random numbers between low and high, of this shape."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def make_noise(n, generator):
    """Return noise [n 3 64 64], from clouds to grain."""
    pictures = torch.rand(n, 3, 1, 1, generator=generator)
    for size in (2, 4, 8, 16, 32, 64):
        grey = 2 * torch.rand(n, 1, size, size, generator=generator) - 1
        grain = grey + torch.rand(n, 3, size, size, generator=generator) - 0.5
        grain = F.interpolate(grain, (PATCH, PATCH), mode="bilinear")
        pictures = pictures + torch.rand(n, 1, 1, 1, generator=generator) ** 3 * grain
    return pictures.clamp(0, 1)


def draw_figures(n, generator):
    """Return stripes, checks, bars and rings in two colours, blurred or sharp, [n 3 64 64]."""
    uniform = partial(draw_uniform, (n, 1, 1), generator)
    angle = uniform(0, math.pi)
    x = torch.arange(PATCH) - uniform(0, PATCH)  # n 1 64
    y = torch.arange(PATCH)[:, None] - uniform(0, PATCH)  # n 64 1
    period = 2 ** uniform(2, 5.5)  # pixels
    across = (x * angle.cos() + y * angle.sin()) / period  # n 64 64
    along = (y * angle.cos() - x * angle.sin()) / period / uniform(0.5, 2)
    waves = [across, along, torch.hypot(across, along)]
    stripes, others, rings = (torch.sin(2 * math.pi * wave) for wave in waves)
    figures = [stripes, stripes * others, torch.maximum(stripes, others), rings]
    chosen = torch.randint(4, (n,), generator=generator)
    figure = torch.stack(figures, 1)[torch.arange(n), chosen]
    weight = (figure * uniform(1, 20)).clamp(-1, 1) / 2 + 0.5
    first, second = torch.rand(2, n, 3, 1, 1, generator=generator)
    return torch.lerp(first, second, weight[:, None])


def enlarge(frames, generator, edges):
    """Return parts of frames [n 3 64 64], turned and enlarged to full size.

    With `edges` they are from the border, where hair, clothes and walls are, else from anywhere.
    """
    n = len(frames)
    uniform = partial(draw_uniform, n, generator)
    size = uniform(0.1, 0.25) if edges else uniform(0.12, 0.4)
    x = uniform(-0.9, 0.9)
    y = uniform(-0.9, 0.9)
    if edges:
        outward = (1 - size) * (2 * torch.randint(2, (n,), generator=generator) - 1)
        sideways = uniform(0, 1) < 0.5
        x = torch.where(sideways, outward, x)
        y = torch.where(sideways, y, outward)
    angle = uniform(-1, 1)
    sine = size * angle.sin()
    cosine = size * angle.cos()
    affine = torch.stack([cosine, -sine, x, sine, cosine, y], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, frames.shape, align_corners=False)
    return F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)


def shuffle_blocks(frames, generator):
    """Return frames [n 3 64 64] with their blocks, 4 x 4 or 8 x 8 of them, in a random order."""
    blocks = data.pick((4, 8), generator)  # a side
    parts = rearrange(frames, "n c (i h) (j w) -> n (i j) c h w", i=blocks, j=blocks)
    order = torch.rand(parts.shape[:2], generator=generator).argsort(1)
    parts = parts[torch.arange(len(frames))[:, None], order]
    return rearrange(parts, "n (i j) c h w -> n c (i h) (j w)", i=blocks)


# ---------------------------------------------------------------- scoring generated clips

LEAST_FOR_LPIPS = 31  # pixels a side, of AlexNet
LEAST_FOR_KID = 50  # frames
LEAST_FOR_FID = {"": 2048, "*": 960}  # frames: 1 for each feature, 4 for each of the judges'


@dataclass(eq=False)
class Case:
    """A test clip, with the data that are needed to generate and to score it."""

    clip: data.Clip
    frames: torch.Tensor  # f 3 h w in [0, 1], the truth
    audio: np.ndarray  # int16 [640 f]
    speeches: list  # log-mel [4f 40] of the clip, then of the person's other clips, maybe shorter
    opening: torch.Tensor | None = None  # f
    training_clips: list = field(default_factory=list)  # of the person
    reference: np.ndarray | None = None  # uint8 [3 h w], of a training clip
    mel: torch.Tensor | None = None  # f n m, windows of the clip's speech
    other_mel: torch.Tensor | None = None  # f n m, of other speech of the person

    @property
    def person(self):
        return self.clip.person

    @property
    def key(self):
        """Return "person/clip", the name under which scores are kept."""
        return f"{self.person}/{self.clip.name}"


def make_cases(splits, num_frames, clips_per_person):
    """Return Cases of each person's first test clips.

    `splits` is {person: {"train", "validation", "test": [data.Clip]}}. A case has at most
    `num_frames` frames. Other speech is that of the person's longest other clip, repeated if it is
    shorter.
    """
    cases = []
    for split in splits.values():
        reference = data.reference_frame(split["train"])
        clips = [clip for part in split.values() for clip in part]
        for clip in split["test"][:clips_per_person]:
            cut = data.slice_clip(clip, 0, num_frames)
            others = [other for other in clips if other is not clip]
            others.sort(key=lambda other: -other.num_frames)
            speeches = [cut.mel, *(other.mel[: len(cut.mel)] for other in others[:20])]
            other_mel = np.resize(speeches[1], cut.mel.shape)
            case = Case(
                clip=clip,
                frames=unit_frames(cut.frames),
                audio=cut.audio,
                speeches=speeches,
                opening=None if cut.opening is None else torch.tensor(cut.opening),
                training_clips=split["train"],
                reference=reference,
                mel=torch.as_tensor(data.audio_windows(cut.mel)),
                other_mel=torch.as_tensor(data.audio_windows(other_mel)),
            )
            cases.append(case)
    return cases


class Evaluation:
    """Scores of generated clips by method; frames are scored when added, and not kept.

    `cases` give the people among whom `right_person*` chooses; `networks` are those of
    `load_standard`. Everything is computed on `device`.
    """

    def __init__(self, cases, judges=None, networks=None, device="cpu"):
        self.device = device
        self.judges = judges
        # "lpips", "arcface", "inception" or "syncnet" -> ending of the metrics' names -> network
        self.networks = defaultdict(dict)
        for name, network in (networks or {}).items():
            kind, underscore, variant = name.partition("_")
            self.networks[kind][underscore + variant] = network.to(device)
        self.gallery = {}  # person -> identity [d] in the training clips
        if judges:
            judges.to(device)
            self.networks["lpips"]["*"] = judges
            self.networks["arcface"]["*"] = judges.identity
            self.networks["inception"]["*"] = judges.features
            for case in cases:
                if case.person not in self.gallery:
                    self.gallery[case.person] = mean_identity(judges, case.training_clips)
        self.methods = []
        self.people = {}  # "person/clip" -> person
        self.scores = {}  # (method, metric, "person/clip") -> value
        # for KID and FID: (method, ending of their names, "person/clip") -> features [f d]
        self.features = {}
        self.speech = {}  # "person/clip" -> the judges' embeddings of Case.speeches

    @torch.no_grad()
    def add(self, method, case, frames):
        """Score frames [f 3 h w] in [0, 1] that a method generated, by all metrics that apply.

        Raises ValueError for frames out of this range or of another shape than the truth.
        """
        key = case.key
        frames = frames.to(self.device)
        truth = case.frames.to(self.device)
        found = {"psnr": psnr(frames, truth)}
        found["mouth_psnr"] = psnr(mouth_region(frames), mouth_region(truth))
        if min(frames.shape[-2:]) >= 11:
            found["ssim"] = ssim(frames, truth)
        if len(frames) > 1:
            found["temporal_jitter"] = temporal_jitter(frames)
            found["jitter_ratio"] = jitter_ratio(frames, truth)
        for ending, network in self.networks["lpips"].items():
            if ending == "*" or min(frames.shape[-2:]) >= LEAST_FOR_LPIPS:
                distances, changes = perceptual_distances(network.embed, frames, truth)
                found["lpips" + ending] = distances
                if len(changes):
                    found["tlp" + ending] = changes
        for ending, embed in self.networks["arcface"].items():
            identity = per_frame(embed, frames)  # f d
            found["id_similarity" + ending] = (identity * per_frame(embed, truth)).sum(-1)
            if ending == "*" and len(self.gallery) > 1:
                likeness = {p: float(identity.mean(0) @ own) for p, own in self.gallery.items()}
                found["right_person*"] = max(likeness, key=likeness.get) == case.person
        if min(len(frames), len(case.audio) // data.SAMPLES_PER_FRAME) >= LEAST_FOR_SYNC:
            found |= self._sync_scores(case, frames)
        if self.judges and self.judges.has_opening and len(frames) > 1:
            opening = per_frame(self.judges.opening, frames).cpu()  # f
            true = per_frame(self.judges.opening, truth).cpu()
            known = true if case.opening is None else case.opening
            found["mouth_correlation*"] = mouth_correlation(opening, known)
            found["mouth_std_ratio*"] = opening.std() / true.std().clamp(min=1e-3)
        features = {}
        for ending, extract in self.networks["inception"].items():
            features[method, ending, key] = per_frame(extract, frames).cpu()
            if key not in self.people:
                features["", ending, key] = per_frame(extract, truth).cpu()
        if unknown := found.keys() - METRICS.keys():
            raise KeyError(f"METRICS_TABLE has no row for {', '.join(sorted(unknown))}")
        # Only now, when nothing can fail any more: a clip counts in all metrics or in none.
        self.features |= features
        self.people[key] = case.person
        if method not in self.methods:
            self.methods.append(method)
        for metric, value in found.items():
            value = torch.as_tensor(value, dtype=torch.float64).mean()
            self.scores[method, metric, key] = float(value)

    def merge(self, workers):
        """Add the scores of other processes (`fed.Workers`), of the same methods on other cases."""
        self.people = workers.merge(self.people)
        self.scores = workers.merge(self.scores)
        self.features = workers.merge(self.features)

    def _sync_scores(self, case, frames):
        """Return the metrics of lip sync of a case that is long enough."""
        found = {}
        sync = {}  # ending -> scores
        for ending, network in self.networks["syncnet"].items():
            sync[ending] = lse(network, frames, case.audio)
        if self.judges:
            small = per_frame(partial(resize, size=[64, 64]), frames)
            mouth = self.judges.mouth_video(small[None])[0]  # f-4 d
            if case.key not in self.speech:  # the same for every method
                self.speech[case.key] = self._embed_speeches(case)
            own, *others = self.speech[case.key]
            sync["*"] = sync_scores(mouth, own)
            found["sync*"] = sync["*"]["sync"]
            if others:
                wins = [right_speech(mouth, own, other) for other in others]
                found["right_speech*"] = np.mean(wins)
        for ending, scores in sync.items():
            found["lse_c" + ending] = scores["lse_c"]
            found["lse_d" + ending] = scores["lse_d"]
            found["offset_found" + ending] = abs(scores["offset"]) <= 1
        return found

    def _embed_speeches(self, case):
        """Return the judges' embeddings [t d] of a case's speech and of other speech."""
        # Shorter speech has too few windows to compare; the case's own is long enough (`add`).
        least = LEAST_FOR_SYNC * data.MELS_PER_FRAME
        mels = [mel for mel in case.speeches if len(mel) >= least]
        windows = [torch.as_tensor(data.audio_windows(mel)) for mel in mels]
        return [self.judges.mouth_audio(mel[None].to(self.device))[0] for mel in windows]

    def rows(self):
        """Return {method: {metric: row}} for all METRICS.

        A row is {"mean", "ci95", "n", "groups", "values": {"person/clip": value}} with the interval
        over people; of KID and FID {"mean", "ci95": None, "n": frames}, and "std" over KID's
        subsets; or {"mean": None, "reason"}.
        """
        rows = {}
        for method in self.methods:
            rows[method] = {}
            for metric, needs in METRICS.items():
                file = "" if needs["file"] == "–" else f" and {needs['file']}"
                row = {"mean": None, "reason": f"needs {needs['least']}{file}"}
                if values := select(self.scores, method, metric):
                    row = self.row(values)
                rows[method][metric] = row
            for ending in self.networks["inception"]:
                real = torch.cat(list(select(self.features, "", ending).values()))
                fake = torch.cat(list(select(self.features, method, ending).values()))
                row = {"ci95": None, "n": min(len(real), len(fake))}
                if row["n"] >= LEAST_FOR_KID:
                    mean, std = kernel_distance(real, fake)
                    rows[method]["kid" + ending] = {"mean": mean, "std": std} | row
                if row["n"] >= LEAST_FOR_FID[ending]:
                    rows[method]["fid" + ending] = {"mean": frechet_distance(real, fake)} | row
        return rows

    def paired(self, method, baseline):
        """Return {metric: row} of method minus baseline, on the clips that both generated."""
        rows = {}
        for metric in METRICS:
            others = select(self.scores, baseline, metric)
            own = select(self.scores, method, metric)
            differences = {key: own[key] - others[key] for key in own if key in others}
            if differences:
                rows[metric] = self.row(differences)
        return rows

    def row(self, values):
        """Return the row of {"person/clip": value}, as in `rows`."""
        groups = [self.people[key] for key in values]
        return mean_ci(list(values.values()), groups) | {"values": values}


def select(table, method, name):
    """Return {"person/clip": value} of a table {(method, name, "person/clip"): value}."""
    return {key: value for (*row, key), value in table.items() if row == [method, name]}


def score_judges(judges, people, device="cpu"):
    """Return scores of judges on true clips of people {name: [data.Clip]} they never trained on.

    These are the metrics with a star that can be compared with chance, and the AUC of identity
    verification. Each person's first clip is the training clip; up to four others are tested.
    """
    splits = {
        name: {"train": clips[:1], "test": clips[1:]}
        for name, clips in people.items()
        if len(clips) > 1
    }
    cases = make_cases(splits, num_frames=100, clips_per_person=4)
    evaluation = Evaluation(cases, judges, device=device)
    right = []
    wrong = []
    for case in cases:
        evaluation.add("truth", case, case.frames)
        identity = per_frame(judges.identity, case.frames.to(device)).mean(0)
        for person, own in evaluation.gallery.items():
            similarity = float(F.cosine_similarity(identity, own, dim=0))
            (right if person == case.person else wrong).append(similarity)
    scores = {"people": len(splits), "clips": len(cases)}
    if wrong:
        scores["verification_auc"] = auc(right, wrong)
    for metric in ("right_person*", "offset_found*", "right_speech*", "mouth_correlation*"):
        if values := select(evaluation.scores, "truth", metric):
            scores[metric] = evaluation.row(values)["mean"]
    return scores


def markdown_table(rows, columns):
    """Return {method: {metric: row}} as a Markdown table of the metrics `columns`.

    A metric that no method has, or that is the same for all of several methods, is left out.
    """
    kept = []
    for metric in columns:
        cells = [_format_cell(row.get(metric, {"mean": None})) for row in rows.values()]
        means = {cell.split(" ")[0] for cell in cells}
        if means != {"–"} and (len(means) > 1 or len(rows) == 1):
            kept.append((metric, cells))
    lines = [f"| method | {' | '.join(metric for metric, _ in kept)} |"]
    lines.append("|---" * (len(kept) + 1) + "|")
    for i, method in enumerate(rows):
        lines.append(f"| {method} | {' | '.join(cells[i] for _, cells in kept)} |")
    return "\n".join(lines)


def _format_cell(row):
    if row["mean"] is None:
        return "–"
    text = f"{row['mean']:.4g}"
    if row.get("ci95"):
        text += " [{:.4g}, {:.4g}]".format(*row["ci95"])
    return text


# ---------------------------------------------------------------- command line


def list_files(folder):
    """Return {name without suffix: path} of the pictures and videos below a folder, and [(path,
    reason)] of folders that cannot be read.

    A single file is named "clip". Raises ValueError for two files of one name, and for none.
    """
    if Path(folder).is_file():
        return {"clip": Path(folder)}, []
    files = {}
    paths, left_out = data.find_files(folder, data.PICTURE_SUFFIXES + data.VIDEO_SUFFIXES)
    for path in map(Path, paths):
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = unicodedata.normalize("NFC", name)  # macOS writes accents as signs of their own
        if name in files:
            raise ValueError(f"two files of one name in {folder}: {files[name].name}, {path.name}")
        files[name] = path
    if not files:
        raise ValueError(f"no pictures or videos in {folder}")
    return files, left_out


def read_file(path, size):
    """Return frames [f 3 h w] in [0, 1] and int16 sound of a picture or video."""
    if path.suffix.lower() in data.PICTURE_SUFFIXES:
        return unit_frames(data.read_image(path, size)[None]), np.zeros(0, np.int16)
    frames, audio = data.read_video(path, size)
    return unit_frames(frames), audio


def compare(real_folder, fake_folder, networks, judges=None, device="cpu", size=None):
    """Score two folders of videos or pictures, pairs by name.

    Returns {metric: row} as in `Evaluation.rows`, and notes on what was not scored. Frames are as
    large as in the files, or their central squares are scaled to `size` x `size` pixels. Intervals
    are over people, taken to be the subfolders; a file in no subfolder is a person of its own.
    Raises ValueError if nothing can be scored.
    """
    notes = defaultdict(list)  # note -> names
    real_files, left_out = list_files(real_folder)
    fake_files, left_out_fakes = list_files(fake_folder)
    for path, reason in left_out + left_out_fakes:
        notes[reason].append(path)
    evaluation = Evaluation([], judges, networks, device)
    for name in tqdm(sorted(real_files | fake_files), unit="file", disable=None):
        try:
            if name not in real_files or name not in fake_files:
                raise ValueError("no partner of that name")
            with warnings.catch_warnings(record=True) as caught:
                truth, _ = read_file(real_files[name], size)
                frames, audio = read_file(fake_files[name], size)
            for warning in caught:  # of files that end early
                notes[str(warning.message)].append(name)
            if truth.shape[2:] != frames.shape[2:]:
                raise ValueError("the two differ in size: choose one by --size")
            f = min(len(truth), len(frames))
            if len(truth) != len(frames):
                note = f"{len(truth)} and {len(frames)} frames, of which the first {f} are compared"
                notes[note].append(name)
            person, _, stem = name.rpartition("/")
            person = person or stem  # without a folder, a person of its own
            none = np.zeros(0)
            if f"{person}/{stem}" in evaluation.people:
                raise ValueError("two files, one of them in a folder of its own name")
            clip = data.Clip(person, stem, fake_files[name], none, audio, none)
            speeches = [data.log_mel(audio[: f * data.SAMPLES_PER_FRAME])] if len(audio) else []
            evaluation.add("fake", Case(clip, truth[:f], audio, speeches), frames[:f])
        except ValueError as error:
            notes[str(error)].append(name)
        except (MemoryError, RuntimeError) as error:
            if not data.is_short_of_memory(error):
                raise
            notes["too large for the memory: choose a smaller --size"].append(name)
    rows = evaluation.rows().get("fake", {})
    unscored = defaultdict(list)  # (clips, what they lack) -> metrics
    for metric, row in rows.items():
        clips = sorted(set(evaluation.people) - set(row.get("values", evaluation.people)))
        if clips:
            unscored[tuple(clips), METRICS[metric]["least"]].append(metric)
    for (clips, least), names in unscored.items():
        notes[f"not in {', '.join(names)}, which needs {least}"] += clips
    if judges or any(name.startswith(("arcface", "syncnet")) for name in networks):
        note = "faces are neither cropped nor aligned: compare with files that are cut alike"
        notes[note].append("ArcFace, SyncNet and judges")
    notes = [f"{', '.join(names)}: {note}" for note, names in notes.items()]
    if not rows:
        raise ValueError(f"nothing could be scored: {'; '.join(notes)}")
    return rows, notes


def print_weights(sources):
    """Print the files of weights in `sources` with their SHA-256."""
    files = {}
    for source in sources.values():
        files |= source.get("weights", {})
    for name, digest in files.items():
        print(f"{name}: SHA-256 {digest}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Compare two folders of videos or pictures by name."
    )
    parser.add_argument("real", nargs="?", help="folder or file")
    parser.add_argument("fake", nargs="?", help="folder or file")
    parser.add_argument("--list", action="store_true", help="print what each metric needs")
    parser.add_argument("--weights", metavar="DIR", help="folder of the standard networks' files")
    parser.add_argument("--judges", metavar="FILE", help="a run's backbone.pt, for metrics with *")
    parser.add_argument("--size", type=int, help="pixels a side; left out: as in the files")
    parser.add_argument("--device", default="cpu", help="such as cuda:0")
    parser.add_argument("--json", metavar="FILE", help="write the table with values per clip")
    parser.error = data.refuse
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":  # as an unset variable of a script is
            positional = name in ("real", "fake")
            parser.error(f"{name if positional else '--' + name} is empty")
    if args.list and (args.real or args.judges or args.json):
        parser.error("--list compares nothing: only --weights goes with it")
    with data.errors_in_one_line():
        networks, sources = load_standard(args.weights)
        if args.list:
            print(METRICS_TABLE)
            print_weights(sources)
            return
        check_arguments(args)
        judges = load_judges(args.judges) if args.judges else None
        rows, notes = compare(args.real, args.fake, networks, judges, args.device, args.size)
        if judges:
            weights = {Path(args.judges).name: _sha256(args.judges)}
            sources["*"] = {"network": "Judges", "weights": weights, "scores": judges.scores}
        if args.json:
            report = {"rows": rows, "sources": sources, "notes": notes}
            with data.atomic_write(args.json) as path:
                path.write_text(json.dumps(report, indent=1))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print_rows(rows)
        print_weights(sources)
        sys.stdout.flush()  # raises OSError here if the reader of a pipe has ended


def print_rows(rows):
    """Print {metric: row} as a Markdown table."""
    print("| metric | mean | 95 % interval | n | |\n|---|---|---|---|---|")
    for metric, row in rows.items():
        mean, _, interval = _format_cell(row).partition(" ")
        print(f"| {metric} | {mean} | {interval} | {row.get('n', 0)} | {row.get('reason', '')} |")


def check_arguments(args):
    """Raise ValueError for arguments that cannot work, before the work begins."""
    if not args.fake:
        raise ValueError("two folders are needed: real and fake")
    for path in (args.real, args.fake):
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file or folder")
    if args.size is not None and not 11 <= args.size <= 4096:
        raise ValueError(f"--size must lie in 11 ... 4096, not {args.size}")
    if args.json:
        data.check_output(args.json, (".json",))
    try:
        # float64, which Apple's GPUs lack, and a value, which the device "meta" lacks
        torch.zeros(1, dtype=torch.float64, device=args.device).item()
    except (RuntimeError, AssertionError, TypeError, ImportError):
        raise ValueError(f"--device {args.device}: torch cannot use it") from None


if __name__ == "__main__":
    data.set_up_process()
    main()
