"""Metrics for talking heads, the standard networks that judge, and the small judges that are trained here.

Frames are float tensors in [0, 1] at 25 Hz, clips `b f c h w` and pictures `n c h w`; speech is 16 kHz. No network
judges before it is trained: the standard ones read the standard files (`load_standard`), and `train_judges` makes the
stand-ins, which tables mark with a star.

    python metrics.py real/ fake/ --weights DIR --judges runs/NAME/backbone.pt --json out.json
"""
import argparse
import hashlib
import json
import math
import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
import torchaudio
import torchvision
from einops import rearrange
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from scipy import stats
from scipy.ndimage import gaussian_filter1d
from torch import nn
from torchvision.models import inception
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

# ---------------------------------------------------------------- pictures and clips

def _check(x, y):
    if x.shape != y.shape:
        raise ValueError(f"the frames to compare differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the frames hold NaN or infinite pixels")


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each frame [..., c, h, w] -> [...]; equal frames give 100, a finite cap."""
    _check(x, y)
    return -10 * torch.log10((x - y).square().mean((-3, -2, -1), dtype=torch.float64).clamp(min=1e-10))


def _gaussian(n, device):
    """Matrix [n - 10, n] that weighs every valid run of 11 pixels with a Gaussian of sigma 1.5."""
    distance = torch.arange(n, device=device) - torch.arange(5, n - 5, device=device)[:, None]
    weights = torch.exp(-distance.double().square() / (2 * 1.5 ** 2)) * (distance.abs() <= 5)
    return weights / weights.sum(1, keepdim=True)


def ssim(x, y):
    """Structural similarity of each frame [..., c, h, w] -> [...] (Wang et al. 2004): 11 x 11 Gaussian of sigma 1.5,
    valid region, population covariance, data range 1, mean over channels; ValueError below 11 pixels."""
    _check(x, y)
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, not {tuple(x.shape[-2:])}")
    # float64: E[x^2] - E[x]^2 would cancel in flat regions
    a, b = (v.double().reshape(-1, 1, *v.shape[-2:]) for v in (x, y))                     # [(n c), 1, h, w]
    moments = torch.cat([a, b, a * a, b * b, a * b], dim=1)                               # [(n c), 5, h, w]
    moments = _gaussian(a.shape[-2], a.device) @ moments @ _gaussian(a.shape[-1], a.device).T
    mean_a, mean_b, aa, bb, ab = moments.unbind(1)                                        # [(n c), h - 10, w - 10]
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    score = score / ((mean_a ** 2 + mean_b ** 2 + c1) * (aa - mean_a ** 2 + bb - mean_b ** 2 + c2))
    return score.mean((-2, -1)).view(x.shape[:-2]).mean(-1)


def _changes(frames):
    """Mean absolute difference of consecutive frames [..., f, c, h, w] -> [..., f - 1]; ValueError for one frame."""
    if frames.shape[-4] < 2:
        raise ValueError("motion needs at least two frames")
    return frames.diff(dim=-4).abs().mean((-3, -2, -1))


def temporal_jitter(frames):
    """Mean absolute difference of consecutive frames [..., f, c, h, w] -> [...], in units of the pixel range."""
    return _changes(frames).mean(-1)


def jitter_ratio(generated, truth):
    """Temporal jitter of generated clips over that of the true ones, [..., f, c, h, w] -> [...]; 1 is best."""
    return temporal_jitter(generated) / temporal_jitter(truth).clamp(min=1e-8)


def tlp(distance, generated, truth):
    """Flow-free flicker of a clip [f, c, h, w] -> scalar (tLP, Chu et al. 2020): mean difference between the perceptual
    `distance(x, y) -> [n]` of consecutive generated frames and that of the true ones; ValueError for one frame."""
    _check(generated, truth)
    if len(truth) < 2:
        raise ValueError("motion needs at least two frames")
    return (distance(generated[:-1], generated[1:]) - distance(truth[:-1], truth[1:])).abs().mean()


def mouth_region(frames):
    """The middle of face tracks [..., h, w] below the centre, where the mouth is: 7/16 of the height and the width."""
    h, w = frames.shape[-2:]
    return frames[..., 13 * h // 32:27 * h // 32, 9 * w // 32:23 * w // 32]


def mouth_motion(frames):
    """Mean absolute change of the mouth region, [..., f, c, h, w] -> [..., f - 1]; no network, no landmarks."""
    return _changes(mouth_region(frames))


def mouth_correlation(predicted, true):
    """Pearson correlation over time [..., f] -> [...] in [-1, 1]; a mouth that never moves gives 0."""
    p, t = (torch.as_tensor(v).double() for v in (predicted, true))
    p, t = (v - v.mean(-1, keepdim=True) for v in (p, t))
    return (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1)).clamp(min=1e-12)


def mean_ci(values, seed=0, num_resamples=2000):
    """Mean over clips [n] with its 95 % percentile-bootstrap interval: {"mean", "ci95": [low, high], "n"}; `ci95` is
    None for a single clip; ValueError for none."""
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("a mean needs at least one value, all of them finite")
    picks = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    interval = np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist()
    return {"mean": float(values.mean()), "ci95": interval if len(values) > 1 else None, "n": len(values)}


def crossed_ci(values):
    """Mean over seeds and people [s, p], both drawn at random and each seed with each person, with its 95 % t interval.

    The variance of the mean is (MS_s + MS_p - MS_e) / (s p), the mean squares being those of the two-way table, but not
    less than what seeds alone or people alone would give; its degrees of freedom are Satterthwaite's (1946), but not
    less than those of the fewer. One seed or one person says nothing of others: the interval is then over the rest.
    """
    values = np.asarray(values, dtype=np.float64)
    (s, p), mean, seeds, people = values.shape, values.mean(), values.mean(1), values.mean(0)
    if min(s, p) == 1:
        squares, freedom = [values.var(ddof=1) if s * p > 1 else math.nan], [s * p - 1]
    else:
        residual = values - seeds[:, None] - people + mean
        squares = [p * seeds.var(ddof=1), s * people.var(ddof=1), np.square(residual).sum() / ((s - 1) * (p - 1))]
        freedom = [s - 1, p - 1, (s - 1) * (p - 1)]
    total = max(sum(squares[:2]) - sum(squares[2:]), *squares[:2], 0.0)
    table = {"mean": float(mean), "ci95": None, "n": p, "seeds": s}
    if s * p > 1:
        spread = sum(m ** 2 / f for m, f in zip(squares, freedom))
        degrees = max(total ** 2 / spread, min(freedom)) if spread else math.inf
        half = stats.t.ppf(0.975, degrees) * math.sqrt(total / (s * p))
        table["ci95"] = [float(mean - half), float(mean + half)]
    return table


def auc(high, low):
    """How often one of `high` [n] is above one of `low` [m], ties counting half: 1 where they separate, 0.5 by chance."""
    high, low = np.asarray(high, dtype=np.float64)[:, None], np.asarray(low, dtype=np.float64)
    return float(((high > low) + 0.5 * (high == low)).mean())


# ---------------------------------------------------------------- distributions of features

class FeatureStatistics:
    """Features of any number of frames in bounded memory: float64 sums for the Frechet distance, and a uniform sample
    of at most `capacity` rows (Vitter 1985, Algorithm R), which holds all of them while they are few."""

    def __init__(self, capacity=5000, seed=0):
        self.n, self.capacity, self.generator = 0, capacity, torch.Generator().manual_seed(seed)

    def update(self, features):
        """Add the features [n, d] of some frames; ValueError if they are not finite."""
        features = torch.as_tensor(features).detach().cpu().double()
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError("features must be a finite matrix [n, d]")
        if self.n == 0:
            d = features.shape[1]
            self.shift = features.mean(0)            # sums about a point near the mean lose no digits
            self.sum, self.outer = features.new_zeros(d), features.new_zeros(d, d)
            self.rows = features.new_empty(self.capacity, d)
        centred = features - self.shift
        self.sum += centred.sum(0)
        self.outer.addmm_(centred.T, centred)
        place = torch.arange(self.n, self.n + len(features))
        draws = (torch.rand(len(features), generator=self.generator, dtype=torch.float64) * (place + 1)).long()
        for row, place in enumerate(torch.where(place < self.capacity, place, draws).tolist()):
            if place < self.capacity:
                self.rows[place] = features[row]
        self.n += len(features)
        self.sample = self.rows[:self.n]                                                   # [min(n, capacity), d]
        self.mean = self.shift + self.sum / self.n
        return self

    def covariance(self):
        """Unbiased covariance [d, d] (n - 1)."""
        return (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)

    def factor(self):
        """A matrix M with M^T M = covariance: the centred features [n, d] while they are few, else [d, d]."""
        if self.n <= min(self.capacity, len(self.mean)):
            return (self.sample - self.mean) / (self.n - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance())
        return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _two_sides(*sides):
    sides = [s if isinstance(s, FeatureStatistics) else FeatureStatistics(len(s)).update(s) for s in sides]
    if min(side.n for side in sides) < 2:
        raise ValueError("a distance of distributions needs at least two frames on each side")
    return sides


def frechet_distance(real_features, fake_features):
    """Frechet distance (FID, Heusel et al. 2017) of two feature matrices [n, d] or FeatureStatistics -> float; warns
    where frames are fewer than dimensions, ValueError below two."""
    real, fake = _two_sides(real_features, fake_features)
    if min(real.n, fake.n) < len(real.mean):
        warnings.warn(f"FID of {min(real.n, fake.n)} frames in {len(real.mean)} dimensions is biased upwards: "
                      "compare only values of equal n")
    # tr (S1 S2)^(1/2) is the nuclear norm of M1 M2^T: exact, and a small matrix where frames are few
    cross = torch.linalg.svdvals(real.factor() @ fake.factor().T).sum()
    trace = real.covariance().trace() + fake.covariance().trace() - 2 * cross
    return max(0.0, float((real.mean - fake.mean).square().sum() + trace))


def kernel_distance(real_features, fake_features, num_subsets=100, subset_size=1000, seed=0):
    """Kernel distance (KID, Binkowski et al. 2018) of [n, d] features or FeatureStatistics -> (mean, deviation) over
    subsets of the unbiased squared MMD, kernel (x.y/d + 1)^3; below `subset_size` frames it warns and takes half."""
    sides = [side.sample for side in _two_sides(real_features, fake_features)]
    fewest = min(map(len, sides))
    if fewest < subset_size:
        subset_size = max(2, fewest // 2)
        warnings.warn(f"KID from {fewest} frames only, in subsets of {subset_size}")
    generator = torch.Generator().manual_seed(seed)
    picks = [[torch.randperm(len(s), generator=generator)[:subset_size] for s in sides] for _ in range(num_subsets)]
    scores = torch.zeros(num_subsets, dtype=torch.float64)
    for a, b in ((0, 0), (1, 1), (0, 1)):            # one kernel matrix at a time bounds the memory
        kernel = (sides[a] @ sides[b].T / sides[a].shape[1] + 1) ** 3
        weight = -2 / subset_size ** 2
        if a == b:                                   # unbiased: no pair of a frame with itself
            kernel.fill_diagonal_(0)
            weight = 1 / (subset_size * (subset_size - 1))
        scores += weight * torch.stack([kernel[pick[a]][:, pick[b]].sum() for pick in picks])
    return float(scores.mean()), float(scores.std(correction=0))


# ---------------------------------------------------------------- the standard networks

def squared_distance(x, y):
    """Squared Euclidean distance of rows, [n, d] twice -> [n]."""
    return (x - y).square().sum(1)


def _resize(frames, size):
    if frames.shape[-2:] == (size, size):
        return frames
    return F.interpolate(frames, (size, size), mode="bilinear", align_corners=False, antialias=True)


def _sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _load_file(path):
    """The dict in a file of weights; ValueError if the file is none."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a file of weights ({type(error).__name__})") from None


def load_weights(module, path, prefix=""):
    """Load the tensors below `prefix` of a standard weight file, unchanged -> the file's SHA-256; ValueError for a file
    that is none, or naming the first key that does not fit."""
    state, own = _load_file(path), module.state_dict()
    state = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
    for key in [*own, *state]:
        if key not in state and key.endswith("num_batches_tracked"):               # older files lack these counters
            state[key] = own[key]
        if key not in state or key not in own or state[key].shape != own[key].shape:
            raise ValueError(f"{path} does not fit {type(module).__name__}: first misfit {prefix}{key}")
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    return _sha256(path)


class _FIDPool:
    """Pooled branches of the 2015-12-05 graph: averages leave the padding out."""
    pool = staticmethod(partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False))

    def _forward(self, x):
        return super()._forward(x)[:-1] + [self.branch_pool(self.pool(x))]


class _BlockA(_FIDPool, inception.InceptionA): pass
class _BlockC(_FIDPool, inception.InceptionC): pass
class _BlockE(_FIDPool, inception.InceptionE): pass


class InceptionFID(inception.Inception3):
    """FID's Inception: frames [n, 3, h, w] -> pool3 features [n, 2048]; reads pt_inception-2015-12-05-6726825d.pth."""

    def __init__(self):
        blocks = [inception.BasicConv2d, _BlockA, inception.InceptionB, _BlockC, inception.InceptionD, _BlockE, None]
        super().__init__(1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)     # the graph's own oddity
        self.eval().to(memory_format=torch.channels_last)                                  # 1.5 times faster on a CPU

    def forward(self, frames):
        x = F.interpolate(frames.contiguous(memory_format=torch.channels_last), (299, 299), mode="bilinear") * 2 - 1
        for name, layer in self.named_children():
            if name == "avgpool":
                return x.mean((-2, -1))
            x = layer(x)


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018), net "alex" or "vgg": frames [n, 3, h, w] twice -> distance [n]; torchvision's
    backbone file goes into `features` (prefix "features."), LPIPS's own alex.pth or vgg.pth into `lins`."""

    taps = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}                   # the ReLUs that are compared
    channels = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}

    def __init__(self, net="alex"):
        super().__init__()
        with torch.device("meta"):                   # no time on random numbers that the files replace
            backbone = torchvision.models.alexnet() if net == "alex" else torchvision.models.vgg16()
        self.tapped, self.features = self.taps[net], backbone.features.to_empty(device="cpu")
        self.lins = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": nn.Sequential(
            nn.Dropout(), nn.Conv2d(c, 1, 1, bias=False))}) for i, c in enumerate(self.channels[net])})
        self.eval()

    def embed(self, frames):
        """Frames [n, 3, h, w] -> [n, d], between which LPIPS is the squared Euclidean distance."""
        shift, scale = (frames.new_tensor(v).view(3, 1, 1) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
        x, parts = (2 * frames - 1 - shift) / scale, []
        for i, layer in enumerate(self.features[:self.tapped[-1] + 1]):
            x = layer(x)
            if i in self.tapped:
                weight = self.lins[f"lin{len(parts)}"]["model"][1].weight / x[0, 0].numel()   # [1, c, 1, 1], never < 0
                parts.append((F.normalize(x, eps=1e-10) * weight.sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, x, y):
        return squared_distance(self.embed(x), self.embed(y))


class _FaceBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(outputs), nn.PReLU(outputs)
        self.conv2, self.bn3 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = shortcut if stride == 2 else nn.Identity()

    def forward(self, x):
        return self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))) + self.downsample(x)


class ArcFace(nn.Module):
    """ArcFace's iresnet (Deng et al. 2019), depth 50 or 100: faces [n, 3, h, w] -> [n, 512] of unit norm.

    Published similarities are of faces aligned by five landmarks to 112 x 112 pixels; nothing here finds landmarks, so
    the whole frame counts, resized: loose face tracks, cut alike on both sides, keep the order of methods, not the
    published scale. Frames that were aligned to 112 x 112 beforehand are taken as they are and give the standard value.
    """

    def __init__(self, depth=50):
        super().__init__()
        self.conv1, self.bn1, self.prelu = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        for i, blocks in enumerate({50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}[depth]):
            c = 64 * 2 ** i
            layer = [_FaceBlock(max(64, c // 2), c, 2), *(_FaceBlock(c, c, 1) for _ in range(blocks - 1))]
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        self.bn2, self.fc, self.features = nn.BatchNorm2d(512), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)
        self.eval()

    def forward(self, frames):
        x = self.prelu(self.bn1(self.conv1(2 * _resize(frames, 112) - 1)))
        x = self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(x)))))                # [n, 512, 7, 7]
        return F.normalize(self.features(self.fc(x.flatten(1))), dim=-1)


def mfcc(audio):
    """13 MFCC at 100 Hz of 16 kHz samples on the int16 scale, [n] -> float64 [t, 13] (python_speech_features' ways:
    rectangular 25 ms frames, 26 HTK-mel triangles on whole FFT bins, lifter 22, log energy first)."""
    audio = np.asarray(audio, dtype=np.float64)
    audio = np.append(audio[:1], audio[1:] - 0.97 * audio[:-1])
    audio = np.pad(audio, (0, max(400 - len(audio), -(len(audio) - 400) % 160)))
    frames = np.lib.stride_tricks.sliding_window_view(audio, 400)[::160]
    power = np.abs(np.fft.rfft(frames, 512)) ** 2 / 512                                    # [t, 257]
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    edges = np.floor(513 * 700 * (10 ** (mels / 2595) - 1) / 16000)
    low, peak, high = (edges[i:i + 26, None] for i in range(3))
    bins = np.arange(257)
    rising, falling = (bins - low) / np.maximum(peak - low, 1), (high - bins) / np.maximum(high - peak, 1)
    triangles = np.where(bins < peak, rising, falling).clip(0)                             # [26, 257]
    bank, energy = power @ triangles.T, power.sum(1)
    floor = lambda x: np.log(np.where(x == 0, np.finfo(float).eps, x))
    cepstra = scipy.fft.dct(floor(bank), norm="ortho")[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = floor(energy)
    return cepstra


def sync_offset(video, audio):
    """LSE of window embeddings [t, d] -> {"lse_d", "lse_c", "offset"} (Chung & Zisserman 2016): mean distance at the
    best of all shifts within +-15, median minus that minimum, and by how many frames the sound must move to fit; beyond
    the clip the audio counts as 0."""
    shifted = F.pad(audio[:len(video)], (0, 0, 15, 15)).unfold(0, 31, 1).mT                # [t, shifts, d]
    distance = (video[:, None] - shifted + 1e-6).norm(dim=-1).mean(0)         # 1e-6: as torch's pairwise_distance
    return _best_shift(distance)


def _best_shift(distance):
    best = int(distance.argmin())
    return {"lse_d": float(distance[best]), "lse_c": float(distance.median() - distance[best]), "offset": 15 - best}


class SyncNet(nn.Module):
    """SyncNet v2 (Chung & Zisserman 2016); reads syncnet_v2.model."""

    def __init__(self):
        super().__init__()
        unit = lambda conv, norm: (conv, norm(conv.weight.shape[0]), nn.ReLU())
        sound = lambda i, o, *k: unit(nn.Conv2d(i, o, *k), nn.BatchNorm2d)
        sight = lambda i, o, *k: unit(nn.Conv3d(i, o, *k), nn.BatchNorm3d)
        pool = lambda pad=0: nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, pad, pad))
        head = lambda: nn.Sequential(*unit(nn.Linear(512, 512), nn.BatchNorm1d), nn.Linear(512, 1024))
        self.netcnnaud = nn.Sequential(
            *sound(1, 64, 3, 1, 1), nn.Identity(), *sound(64, 192, 3, 1, 1), nn.MaxPool2d(3, (1, 2)),
            *sound(192, 384, 3, 1, 1), *sound(384, 256, 3, 1, 1), *sound(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2),
            *sound(256, 512, (5, 4)))
        self.netcnnlip = nn.Sequential(
            *sight(3, 96, (5, 7, 7), (1, 2, 2)), pool(), *sight(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), pool(1),
            *(layer for _ in range(3) for layer in sight(256, 256, (1, 3, 3), 1, (0, 1, 1))), pool(),
            *sight(256, 512, (1, 6, 6)))
        self.netfcaud, self.netfclip = head(), head()
        self.eval()

    def forward(self, frames, cepstra):
        """Frames [f, 3, h, w] and their MFCC [4 f, 13] -> embeddings of picture and sound, [f - 4, 1024] each."""
        x = 255 * _resize(frames, 224).flip(1)[None].transpose(1, 2)                       # BGR, [1, 3, f, 224, 224]
        lips = self.netcnnlip(x)[0, :, :, 0, 0].T        # later layers see single times: every window in one pass
        windows = cepstra.unfold(0, 20, 4)[:, None]                                        # [f - 4, 1, 13, 20]
        return self.netfclip(lips), self.netfcaud(self.netcnnaud(windows).flatten(1))


@torch.no_grad()
def lse(syncnet, video_frames, audio):
    """LSE-D, LSE-C and AV offset of frames [f, 3, h, w] at 25 Hz and int16 audio [n] at 16 kHz -> as `sync_offset`;
    ValueError below 6 frames with sound."""
    num_windows = min(len(video_frames), len(audio) // 640) - 5                            # SyncNet leaves out the last
    if num_windows < 1:
        raise ValueError("lip sync needs at least 6 frames with their sound")
    cepstra = torch.from_numpy(mfcc(audio)).to(video_frames)
    cepstra = F.pad(cepstra, (0, 0, 0, max(0, 4 * (num_windows + 4) - len(cepstra))))
    spans = [(i, min(i + 20, num_windows) + 4) for i in range(0, num_windows, 20)]         # bounds the memory
    sides = zip(*(syncnet(video_frames[i:j], cepstra[4 * i:4 * j]) for i, j in spans))
    return sync_offset(*(torch.cat(side) for side in sides))


# ---------------------------------------------------------------- the small judges that train here

def _conv(inputs, outputs, stride=2):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _mouth_net(channels, outputs, width=24):
    return nn.Sequential(_conv(channels, width), _conv(width, 2 * width), _conv(2 * width, 4 * width), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(4 * width * 16, 128), nn.BatchNorm1d(128), nn.ReLU(),
                         nn.Linear(128, outputs)).to(memory_format=torch.channels_last)


class Judges(nn.Module):
    """Small networks, trained by `train_judges` on public people only, that stand in for the standard ones: a face
    embedder, whose layers also give the perceptual distance and the features of FID* and KID*, a sync network
    for the training loss, axes that judge sync (less than a network can learn by heart) and a judge of the mouth's
    opening. They see 64 x 64 pixels; other sizes are resampled.

    `scores` says how well they judge people they never saw; `has_opening` whether openings were known."""

    def __init__(self, width=16, dim=64):
        super().__init__()
        w = width
        self.face = nn.ModuleList([
            _conv(3, w), nn.Sequential(_conv(w, 2 * w), _conv(2 * w, 2 * w, 1)), _conv(2 * w, 4 * w),
            nn.Sequential(_conv(4 * w, 8 * w), _conv(8 * w, 8 * w, 1))])
        self.face_head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * w * 16, dim), nn.BatchNorm1d(dim))
        self.view_head = nn.Linear(15 * w, 10)                        # training only: which view `_augment` made
        self.lips, self.mouth = _mouth_net(6, dim), _mouth_net(3, 1)
        self.speech = nn.Sequential(nn.BatchNorm1d(40), nn.Conv1d(40, 96, 4, 2, 1), nn.BatchNorm1d(96), nn.ReLU(),
                                    nn.Conv1d(96, 128, 4, 2, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Flatten(),
                                    nn.Dropout(0.2), nn.Linear(128 * 5, dim))
        self.trace_head = nn.Linear(dim, 5)                           # training only: the opening over a window
        self.register_buffer("mouth_axes", torch.zeros(80, 16))       # of `_fit_sync`
        self.register_buffer("speech_axes", torch.zeros(244, 16))
        self.scores, self.has_opening = {}, False

    def get_extra_state(self):
        return {"scores": self.scores, "has_opening": self.has_opening}

    def set_extra_state(self, state):
        self.scores, self.has_opening = state["scores"], state["has_opening"]

    def _layers(self, frames):
        x, layers = _resize(frames, 64) - 0.5, []
        for stage in self.face:
            layers.append(x := stage(x))            # [n, w, 32, 32], [n, 2w, 16, 16], [n, 4w, 8, 8], [n, 8w, 4, 4]
        return layers

    def identity(self, frames):
        """Face embeddings of unit norm: frames [n, 3, h, w] -> [n, d]; their inner product is the similarity."""
        return F.normalize(self.face_head(self._layers(frames)[-1]), dim=-1)

    def perceptual(self, x, y):
        """LPIPS*: distance [n] >= 0 of frames [n, 3, h, w]: squared difference of unit-normalised features, averaged
        over the picture and the face network's four scales (after Zhang et al. 2018)."""
        return squared_distance(self.embed(x), self.embed(y))

    def embed(self, frames):
        """Frames [n, 3, h, w] -> [n, d], between which `perceptual` is the squared Euclidean distance."""
        unit = lambda layer: layer / (4 * layer[0, 0].numel() * (layer.square().sum(1, keepdim=True) + 1e-8)).sqrt()
        return torch.cat([unit(layer).flatten(1) for layer in self._layers(frames)], 1)

    def features(self, frames):
        """Features for FID* and KID*: frames [n, 3, h, w] -> [n, d], the mean activation of every channel."""
        return torch.cat([layer.mean((-2, -1)) for layer in self._layers(frames)], dim=1)

    def opening(self, frames):
        """Mouth opening, in the unit of the training clips: frames [n, 3, h, w] -> [n]; ValueError if unknown."""
        if not self.has_opening:
            raise ValueError("these judges saw no clips whose mouth opening is known")
        return self.mouth(mouth_region(_resize(frames, 64)) - 0.5).squeeze(-1)

    def mouth_video(self, frames):
        """Mouth motion in windows of 5 frames: [b, f, 3, h, w] -> [b, f - 4, d] of unit norm."""
        return self._motion(mouth_region(_resize(frames.flatten(0, 1), 64)).unflatten(0, frames.shape[:2]))

    def _motion(self, mouths):
        grey = rearrange(mouths.mean(2).unfold(1, 5, 1), "b t h w k -> (b t) k h w")
        still = grey.mean(1, keepdim=True)          # motion stands apart, or the faces would be learned by heart
        x = self.lips(torch.cat([still - 0.5, 4 * (grey - still)], 1))
        return F.normalize(x, dim=-1).unflatten(0, (len(mouths), -1))

    def mouth_audio(self, mel):
        """Speech in those windows: log-mel [b, f, 20, 40], 20 steps of 10 ms around each frame, -> [b, f - 4, d]."""
        return self._speech(mel[:, 2:-2])

    def _speech(self, windows):
        x = self.speech(rearrange(windows, "b t n m -> (b t) m n"))
        return F.normalize(x, dim=-1).unflatten(0, windows.shape[:2])

    def watch(self, frames):
        """How a clip's mouth moves, along the axes that sync is judged by: [f, 3, h, w] -> [f - 4, 16]."""
        if len(frames) < 6:
            raise ValueError("lip sync needs at least 6 frames with their sound")
        return _mouth_features(frames) @ self.mouth_axes

    def lip_sync(self, frames, mel):
        """`sync_scores` of a clip, frames [f, 3, h, w] or what `watch` made of them, with its log-mel [4 f, 40];
        ValueError below 6 frames with sound."""
        video = frames if frames.ndim == 2 else self.watch(frames)
        t = min(len(video), len(mel) // 4 - 4)
        if t < 2:
            raise ValueError("lip sync needs at least 6 frames with their sound")
        return sync_scores(video[:t], _speech_features(_windows(mel)[:t].to(video)) @ self.speech_axes)


def _mouth_features(frames):
    """What each of 4 x 4 places does: how bright it is, and log of how much it changes within windows of 5 frames, in a
    picture so smooth that little but the jaw's and the lips' movement is left: [f, 3, h, w] -> [f - 4, 80]."""
    grey = gaussian_blur(_resize(frames, 64).mean(1), 17, 4.0)
    places = lambda x: F.avg_pool2d(mouth_region(x), 7).flatten(1)
    energy = torch.log(0.005 + places(grey.diff(dim=0).abs())).unfold(0, 4, 1).flatten(1)
    return torch.cat([30 * swift(places(grey)[2:-2]), 0.3 * energy], 1)                   # of about the same spread


def _speech_features(windows):
    """Levels of 10 bands every 20 ms, then of 8 bands with how much they change in 40 ms: [t, 20, 40] -> [t, 244]."""
    bands = F.avg_pool1d(windows, 5)                                                       # [t, 20, 8]
    changes = (bands[:, 4:] - bands[:, :-4]).abs()
    return torch.cat([swift(F.avg_pool2d(windows, (2, 4)).flatten(1)),
                      *(F.avg_pool1d(x.mT, 2).flatten(1) for x in (bands, changes))], 1)


def swift(x):
    """What is left of [t, d] without its slow changes: heads turn and lights shift, but mouths are faster."""
    return x - torch.from_numpy(gaussian_filter1d(x.detach().cpu().numpy(), 8, axis=0)).to(x)


def shrunk_ridge(x, y):
    """Matrix [d, k] that best tells y from x, ridge regression over clips, x a list of [t, d], y of [t, k], centred.

    Each column is as strong as what x explains there beyond chance asks for (empirical Bayes by moments): with X^T X =
    V s V^T and z = V^T X^T y, E z^2 = s^2 real + chance. Of chance only that clips are independent is assumed: it is the
    sum of the clips' own squares (the clustered covariance of Liang & Zeger 1986), however slowly x and y change.
    """
    whole = torch.cat(x)
    strength, axes = torch.linalg.eigh(whole.T @ whole)
    strength, z, chance = strength.clamp(min=0)[:, None], 0.0, 0.0
    for a, b in zip(x, y):
        own = axes.T @ (a.T @ b)
        z, chance = z + own, chance + own.square()
    real = ((z.square() - chance).sum(0) / strength.square().sum()).clamp(min=0)
    noise = chance.sum(0) / strength.sum()
    return axes @ (z * real / (strength * real + noise).clamp(min=1e-12))


@torch.no_grad()
def _fit_sync(judges, clips):
    """Fit the axes that sync is judged by: what the speech of clips tells of their mouths, whitened, along the directions
    of which it tells most (reduced-rank regression, Izenman 1975)."""
    mouths, speeches, num_axes = [], [], judges.mouth_axes.shape[1]
    for clip in clips:
        frames = torch.from_numpy(np.array(clip.frames)) / 255
        for side, features in ((mouths, _mouth_features(frames)), (speeches, _speech_features(_windows(clip.mel)))):
            side.append(features.double() - features.double().mean(0))
    values, vectors = torch.linalg.eigh(torch.cat(mouths).T.cov(correction=0))
    white = vectors / (values + values.mean()).sqrt() @ vectors.T
    told = shrunk_ridge(speeches, [mouth @ white for mouth in mouths])                     # [244, 80]
    u, size, vt = torch.linalg.svd(told, full_matrices=False)
    judges.mouth_axes.copy_(white @ vt[:num_axes].T * size[:num_axes].sqrt())
    judges.speech_axes.copy_(u[:, :num_axes] * size[:num_axes].sqrt())


def sync_scores(video, audio):
    """Sync of a mouth and its speech [t, d] -> {"sync", "lse_d", "lse_c", "offset"}: their correlation over time r, 0
    for a still mouth, then as `sync_offset` with (2 - 2 r)^(1/2) for the distance at each shift."""
    video, audio = (x - x.mean(0) for x in (video, audio))      # what a face or a voice always has says nothing of sync
    shifted = F.pad(audio, (0, 0, 15, 15)).unfold(0, 31, 1)                                # [t, d, shifts]
    r = torch.einsum("t d, t d s -> s", video, shifted) / (video.norm() * audio.norm()).clamp(min=0.1)
    return {"sync": float(r[15])} | _best_shift((2 - 2 * r).clamp(min=0).sqrt())


def _augment(clips, view, mirror, generator, region=lambda x: x):
    """Clips [b, f, 3, h, w], each zoomed, moved, mirrored, lit, tinted, blurred or made noisy as its `view` [b, 10] in
    [-1, 1] says, and cut to a region."""
    zoom, dx, dy, roll, bright, gamma, warm, side, top, spoilt = view.T
    scale, angle = torch.exp(-0.1 - 0.2 * zoom), 0.15 * roll
    theta = torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), 0.1 * dx,
                         scale * mirror * angle.sin(), scale * angle.cos(), 0.1 * dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(clips), 3, *clips.shape[-2:]), align_corners=False)
    grid = region(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                            # [b, h, w, 2]
    x = F.grid_sample(clips.flatten(1, 2), grid, padding_mode="reflection", align_corners=False)
    light = 1 + 0.35 * side.view(-1, 1, 1) * grid[..., 0] + 0.2 * top.view(-1, 1, 1) * grid[..., 1]
    tint = 0.08 * torch.randn(len(clips), 3, generator=generator) + 0.2 * warm[:, None] * torch.tensor([1.0, 0, -1])
    gain = torch.exp(0.3 * bright[:, None] + tint)[..., None, None] * light[:, None]       # [b, 3, h, w]
    x = torch.addcmul(x, 0.6 * gamma.view(-1, 1, 1, 1) * x, 1 - x)
    x = rearrange(x, "b (f c) h w -> b f c h w", c=3) * gain[:, None]
    for clip, amount in zip(x, spoilt.tolist()):    # half of the clips blurred, the others noisy
        if amount < 0:
            clip.lerp_(F.avg_pool2d(clip, 3, 1, 1, count_include_pad=False), min(1, -1.5 * amount))
        else:
            clip.add_(torch.rand(clip.shape, generator=generator) - 0.5, alpha=0.2 * amount)
    return x.clamp_(0, 1)


def _windows(mel):
    """The 20 mel steps around each video frame but the outer two: [4 f, m] -> [f - 4, 20, m]."""
    return torch.from_numpy(np.array(mel)).unfold(0, 20, 4).mT


def _draw(clips, batch_size, num_frames, generator):
    """Random stretches: labels [b], frames [b, f, 3, 64, 64], mel windows [b, f - 4, 20, 40], opening [b, f] or NaN."""
    batch = []
    for index in torch.randint(len(clips), (batch_size,), generator=generator).tolist():
        label, clip = clips[index]
        first = int(torch.randint(len(clip.frames) - num_frames + 1, (), generator=generator))
        frames, mel = clip.frames[first:first + num_frames], clip.mel[4 * first:4 * (first + num_frames)]
        opening = np.full(len(clip.frames), np.nan) if clip.opening is None else np.array(clip.opening)
        batch.append((torch.tensor(label), _resize(torch.from_numpy(np.array(frames)) / 255, 64), _windows(mel),
                      torch.from_numpy(opening[first:first + num_frames]).float()))
    return [torch.stack(part) for part in zip(*batch)]


def _sync_loss(video, audio):
    """Which sound belongs to which mouth, window by window and over whole stretches: [b, t, d] twice -> scalar."""
    b, t, _ = video.shape
    # InfoNCE both ways: each window against all times of all clips in the batch
    logits, target = 12 * video.flatten(0, 1) @ audio.flatten(0, 1).T, torch.arange(b * t)
    windows = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    # what `sync_offset` asks: the right shift against all others within 15 frames, and against other clips
    within, reach = video @ audio.mT, min(15, t // 2)                                      # [b, t, t]
    shifts = torch.stack([within.diagonal(k, 1, 2).mean(1) for k in range(-reach, reach + 1)], 1)
    others = torch.einsum("i t d, j t d -> i j", video, audio) / t
    logits = 48 * torch.cat([shifts, others.masked_fill(torch.eye(b, dtype=torch.bool), -1)], 1)
    return windows + F.cross_entropy(logits, torch.full((b,), reach))


def _losses(judges, prototypes, labels, faces, mouths, windows, opening, view):
    """The training losses; `faces` [b, k, 3, 64, 64] and `mouths` [b, f, 3, 28, 28] are views of the same clips."""
    layers, k = judges._layers(faces.flatten(0, 1)), faces.shape[1]
    cosine = F.normalize(judges.face_head(layers[-1]), dim=-1) @ F.normalize(prototypes, dim=-1).T     # [(b k), people]
    person = labels.repeat_interleave(k)
    margin = 0.25 * F.one_hot(person, len(prototypes))                                     # CosFace (Wang et al. 2018)
    pooled = torch.cat([layer.mean((-2, -1)) for layer in layers], dim=1)
    video, audio = judges._motion(mouths), judges._speech(windows)
    losses = {"identity": F.cross_entropy(16 * (cosine - margin), person),
              "view": F.mse_loss(judges.view_head(pooled), view.repeat_interleave(k, 0)),
              "sync": _sync_loss(video, audio)}
    known = ~opening.isnan().any(1)
    if known.any():
        opening, mouths = opening[known], mouths[known, ::2]
        error = judges.mouth(mouths.flatten(0, 1) - 0.5).view(mouths.shape[:2]) - opening[:, ::2]
        trace = opening.unfold(1, 5, 1)                                                    # [b, f - 4, 5]
        level = error.mean(1, keepdim=True)         # how it moves counts more than where the lips rest
        # sound and mouth meet much sooner when both must also tell the opening
        traces = sum((judges.trace_head(side[known]) - trace).square().mean() for side in (video, audio))
        losses["opening"] = 30 * (error - level).square().mean() + 3 * level.square().mean() + 10 * traces
    return losses


def train_judges(people, steps=320, seed=0, num_frames=40, batch_size=8, progress=None):
    """Train Judges on public people {name: [clip, ...]} and score them on every eighth person, who is held out.

    A clip has `frames` uint8 [f, 3, h, w], `mel` [4 f, 40] and `opening` [f] or None. Each step sees stretches of
    `num_frames` frames, fewer where half of the clips are shorter; `progress(share, losses)` is called after it.
    ValueError with fewer than four people or no clip of ten frames."""
    trained = {name: label for label, name in enumerate(name for i, name in enumerate(sorted(people)) if i % 8)}
    clips = [(label, clip) for name, label in trained.items() for clip in people[name]]
    num_frames = min(num_frames, int(np.median([len(clip.frames) for _, clip in clips] or [0])))
    clips = [(label, clip) for label, clip in clips if len(clip.frames) >= num_frames]
    if len(people) < 4 or num_frames < 10:
        raise ValueError(f"the judges need four people with clips of ten frames; here are {len(people)} people")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judges = Judges()
        prototypes = nn.Parameter(torch.randn(len(trained), judges.face_head[-1].num_features))
        optimiser = torch.optim.AdamW([*judges.parameters(), prototypes], weight_decay=0.05)
        for step in range(steps):
            share = step / steps
            optimiser.param_groups[0]["lr"] = 2e-3 * min(1, 20 * share + 0.05) * (1 - share)
            labels, frames, windows, opening = _draw(clips, batch_size, num_frames, generator)
            view = torch.rand(batch_size, 10, generator=generator) * 2 - 1
            mirror = torch.where(torch.rand(batch_size, generator=generator) < 0.5, -1.0, 1.0)
            faces = _augment(frames[:, ::num_frames // 5], view, mirror, generator)
            mouths = _augment(frames, view, mirror, generator, mouth_region)
            losses = _losses(judges, prototypes, labels, faces, mouths, windows, opening, view)
            optimiser.zero_grad()
            sum(losses.values()).backward()
            optimiser.step()
            if progress:
                progress(share, {name: loss.item() for name, loss in losses.items()})
    _fit_sync(judges, [clip for _, clip in clips])
    judges.eval().requires_grad_(False)
    judges.has_opening = any(clip.opening is not None for _, clip in clips)
    judges.scores = score_judges(judges, {name: own for name, own in people.items() if name not in trained})
    return judges


@torch.no_grad()
def score_judges(judges, people, num_windows=38):
    """How well judges do on people they never saw {name: [clip, ...]} -> dict: identity verification (AUC, accuracy)
    and rank-1 between clips, right against the person's other speech over 1.5 s, AV offset of sound moved by up to 10
    frames found to within one, opening correlation."""
    clips = [(name, clip) for name in sorted(people) for clip in people[name] if len(clip.frames) >= num_windows + 4]
    owner = np.array([name for name, _ in clips])
    scores = {"people": len(set(owner)), "clips": len(clips)}
    if len(clips) < 2:
        return scores
    frames = [torch.from_numpy(np.array(clip.frames)) / 255 for _, clip in clips]
    faces = F.normalize(torch.stack([judges.identity(x[::5]).mean(0) for x in frames]), dim=-1)
    same, other = (torch.from_numpy(m) for m in (owner[:, None] == owner, owner[:, None] != owner))
    similarity = (faces @ faces.T).fill_diagonal_(-2)
    right, wrong = similarity[same.fill_diagonal_(False)], similarity[other]
    if len(right) and len(wrong):
        rates = [(right >= cut).float().mean() + (wrong < cut).float().mean() for cut in torch.cat([right, wrong])]
        nearest = similarity.argmax(1)[same.any(1)].numpy()
        scores |= {"verification_auc": float((right[:, None] > wrong).float().mean()),
                   "verification_accuracy": float(max(rates)) / 2,
                   "rank1": float((owner[nearest] == owner[same.any(1).numpy()]).mean())}
    seen, mels = [judges.watch(x) for x in frames], [clip.mel for _, clip in clips]
    match = lambda i, j: judges.lip_sync(seen[i][:num_windows], mels[j])["sync"]
    wins = [match(i, i) > match(i, j) for i, j in same.nonzero().tolist()]
    if wins:
        scores["sync_accuracy"] = float(np.mean(wins))
    errors = [judges.lip_sync(video[max(0, -late):], mel[4 * max(0, late):])["offset"] - late
              for video, mel in zip(seen, mels) for late in range(-10, 11, 2)]
    scores["offset_accuracy"] = float(np.mean(np.abs(errors) <= 1))
    known = [(x, clip.opening) for x, (_, clip) in zip(frames, clips) if clip.opening is not None]
    if judges.has_opening and known:
        traces = [mouth_correlation(judges.opening(x), np.array(opening)) for x, opening in known]
        scores["opening_correlation"] = float(np.mean(traces))
    return scores


def load_judges(path):
    """Judges out of a run's backbone.pt (or any file that keeps their state under "judges"), frozen; ValueError if they
    are not there, were never trained or belong to another version of this file."""
    judges = Judges()
    try:
        judges.load_state_dict(_load_file(path)["judges"])
    except (KeyError, RuntimeError):
        raise ValueError(f"{path} holds no judges of this version") from None
    if not judges.scores:
        raise ValueError(f"the judges in {path} were never trained")
    return judges.eval().requires_grad_(False)


# ---------------------------------------------------------------- command line: two folders in, one table out

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
STANDARD = {  # metrics: their network and its files, each with the part that it fills and the prefix of its keys
    ("fid", "kid"): (InceptionFID, {"pt_inception-2015-12-05*.pth": ("", "")}),
    ("lpips", "tlp"): (LPIPS, {"alexnet-owt-*.pth": ("features", "features."), "alex.pth": ("lins", "")}),
    ("id_similarity",): (ArcFace, {"*r50*.pth": ("", "")}),
    ("id_similarity_r100",): (partial(ArcFace, 100), {"*r100*.pth": ("", "")}),
    ("lse_d", "lse_c", "av_offset"): (SyncNet, {"syncnet_v2.model": ("", "")})}
SELF_TRAINED = ("fid*", "kid*", "lpips*", "tlp*", "id_similarity*", "sync*", "lse_d*", "lse_c*", "av_offset*",
                "mouth_correlation*")
UNJUDGED = ("psnr", "ssim", "temporal_jitter", "jitter_ratio", "mouth_motion_correlation")


def load_standard(folder=None):
    """The standard networks whose files lie in a folder -> (networks, sources).

    `networks` goes into `score_clip`, and networks["fid"], if it is there, makes the features [n, 2048] of a clip's
    frames for FID and KID. `sources` tells who judges each standard metric: {"network": class, "weights": {file name:
    SHA-256}}, or {"network": None, "reason": the missing files}. ValueError for a folder that is not there, and for a
    file that does not fit its network, with the first key that differs."""
    if folder and not Path(folder).is_dir():
        raise ValueError(f"no such folder of weights: {folder}")
    networks, sources = {}, {}
    for metrics, (make, files) in STANDARD.items():
        paths = {pattern: min(Path(folder).glob(pattern), default=None) if folder else None for pattern in files}
        missing = [pattern for pattern, path in paths.items() if path is None]
        source = {"network": None, "reason": f"needs {' and '.join(missing)} in --weights"}
        if not missing:
            networks[metrics[0]] = network = make()
            source = {"network": type(network).__name__, "weights": {
                paths[pattern].name: load_weights(network.get_submodule(part), paths[pattern], prefix)
                for pattern, (part, prefix) in files.items()}}
        sources |= dict.fromkeys(metrics, source)
    return networks, sources


def log_mel(audio):
    """The judges' log-mel spectrogram [4 f, 40] of int16 audio [640 f] at 16 kHz, as in the training clips; ValueError
    without a frame's sound."""
    if len(audio) < 640:
        raise ValueError("there is no sound")
    wave = F.pad(torch.from_numpy(np.asarray(audio, np.float32) / 32768), (176, 176 + -len(audio) % 640))
    mel = torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, 60, 7600, n_mels=40, center=False)(wave)
    return ((mel.clamp_min(1e-4).log() + 4) / 3.5).T.numpy()


class Seen:
    """A clip's frames [f, 3, h, w], and what networks made of them: each looks once."""

    def __init__(self, frames):
        self.frames, self.made = frames, {}

    def by(self, look):
        if look not in self.made:
            self.made[look] = look(self.frames)
        return self.made[look]


@torch.no_grad()
def score_clip(fake, real, audio, networks, judges=None):
    """Every metric of a clip against its truth, [f, 3, h, w] each or `Seen`, that needs no network, that the networks
    of `load_standard` tell, or the judges (starred); audio int16 at 16 kHz -> ({metric: value}, {metric: why not})."""
    fake, real = (x if isinstance(x, Seen) else Seen(x) for x in (fake, real))
    x, y = fake.frames, real.frames

    def perceptual(embed, compare):
        _check(x, y)
        return compare(fake.by(embed), real.by(embed))

    def pictures(embed, star=""):
        return {"lpips" + star: lambda: perceptual(embed, squared_distance).mean(),
                "tlp" + star: lambda: perceptual(embed, partial(tlp, squared_distance))}

    def similarity(embed):
        return lambda: (fake.by(embed) * real.by(embed)).sum(-1).mean()

    jobs = {"psnr": lambda: psnr(x, y).mean(), "ssim": lambda: ssim(x, y).mean(),
            "temporal_jitter": lambda: temporal_jitter(x), "jitter_ratio": lambda: jitter_ratio(x, y),
            "mouth_motion_correlation": lambda: mouth_correlation(mouth_motion(x), mouth_motion(y))}
    if "lpips" in networks:
        jobs |= pictures(networks["lpips"].embed)
    jobs |= {name: similarity(embed) for name, embed in networks.items() if name.startswith("id_similarity")}
    if "lse_d" in networks:
        jobs["lse_d lse_c av_offset"] = lambda: [*lse(networks["lse_d"], x, audio).values()]
    if judges:
        jobs |= pictures(judges.embed, "*") | {
            "id_similarity*": similarity(judges.identity),
            "sync* lse_d* lse_c* av_offset*":
                lambda: [*judges.lip_sync(fake.by(judges.watch), log_mel(audio)).values()],
            "mouth_correlation*": lambda: mouth_correlation(fake.by(judges.opening), real.by(judges.opening))}
    values, reasons = {}, {}
    for names, job in jobs.items():
        try:
            found = np.atleast_1d(job())
            if not np.isfinite(found).all():
                raise ValueError("the score is NaN or infinite")
            values |= zip(names.split(), found.tolist())
        except ValueError as error:
            reasons |= dict.fromkeys(names.split(), str(error))
    return values, reasons


def summarise(metrics, clips, statistics, missing):
    """A row of the table for each of the `metrics`: out of [(values, reasons, frames)] of the clips its `mean_ci` and
    number of frames, out of `statistics` {star: (real, fake FeatureStatistics)} FID and KID, with what they warn of;
    {"mean": None, "reason": why} where there is none, for which `missing` {metric: reason} comes first."""
    rows = {}
    for metric in metrics:
        kind, star = metric.rstrip("*"), "*" * metric.endswith("*")
        scored = [(values[metric], frames) for values, _, frames in clips if metric in values]
        why = missing.get(metric) or next((reasons[metric] for _, reasons, _ in clips if metric in reasons),
                                          "nothing could be scored")
        if scored:
            rows[metric] = mean_ci([value for value, _ in scored]) | {"frames": sum(frames for _, frames in scored)}
        elif kind in ("fid", "kid") and star in statistics and min(side.n for side in statistics[star]) > 1:
            n = min(side.n for side in statistics[star])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                distance = (frechet_distance if kind == "fid" else kernel_distance)(*statistics[star])
            mean, *deviation = np.atleast_1d(distance).tolist()
            rows[metric] = {"mean": mean, "ci95": None, "n": n, "frames": n} | {"deviation": d for d in deviation} | {
                "warning": str(warning.message) for warning in caught}
        else:
            rows[metric] = {"mean": None, "reason": why, "n": 0, "frames": 0}
    return rows


def _read(path):
    """Frames [f, 3, h, w] in [0, 1] at 25 Hz and int16 audio at 16 kHz, none of a picture; ValueError if unreadable."""
    try:
        if path.suffix.lower() in PICTURES:
            with Image.open(path) as picture:
                frames, audio = np.asarray(picture.convert("RGB"))[None], np.zeros(0, np.int16)
        else:
            frames = imageio.imread(path, plugin="FFMPEG", fps=25)                         # [f, h, w, 3]
            command = [get_ffmpeg_exe(), "-v", "error", "-i", path, "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]
            audio = np.frombuffer(subprocess.run(command, capture_output=True).stdout, np.int16)
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} ({type(error).__name__})") from None
    return rearrange(torch.from_numpy(frames.copy()), "f h w c -> f c h w").float() / 255, audio


def _files(folder):
    files = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in PICTURES | VIDEOS]
    if not files:
        raise ValueError(f"no pictures or videos in {folder}" if Path(folder).is_dir() else f"no such folder: {folder}")
    return {str(path.relative_to(folder).with_suffix("")): path for path in files}


@torch.no_grad()
def compare(real_folder, fake_folder, networks, sources, judges=None):
    """Score two folders of videos or pictures, pairs by name, FID and KID over all frames -> (rows, notes on what was
    left out). A row is `mean_ci` of a metric and the number of frames, or {"mean": None, "reason": why, ...}."""
    folders, clips, notes = [_files(real_folder), _files(fake_folder)], {}, []
    extractors = {"": networks.get("fid"), "*": judges and judges.features}
    extractors = {star: extract for star, extract in extractors.items() if extract}
    statistics = {star: (FeatureStatistics(), FeatureStatistics(seed=1)) for star in extractors}
    for name in tqdm(sorted(folders[0] | folders[1]), unit="file", disable=None):
        pair = []
        try:
            for side, files in enumerate(folders):
                if name in files:
                    pair.append(_read(files[name]))
                    for star, extract in extractors.items():
                        for batch in pair[-1][0].split(32):
                            statistics[star][side].update(extract(batch))
            if len(pair) < 2:
                raise ValueError("it has no partner of that name")
            (real, _), (fake, audio) = pair
            n = min(len(real), len(fake))
            if len(real) != len(fake):
                notes.append(f"{name}: {len(real)} and {len(fake)} frames, of which the first {n} are compared")
            clips[name] = (*score_clip(fake[:n], real[:n], audio, networks, judges), n)
        except ValueError as error:
            notes.append(f"{name}: {error}")
    missing = {metric: source["reason"] for metric, source in sources.items() if not source["network"]}
    missing |= {} if judges else dict.fromkeys(SELF_TRAINED, "needs --judges FILE")
    rows = summarise((*UNJUDGED, *sources, *SELF_TRAINED), clips.values(), statistics, missing)
    if all(row["mean"] is None for row in rows.values()):
        raise ValueError("nothing could be scored: " + "; ".join(notes))
    left_out = defaultdict(list)
    for name, (_, reasons, _) in clips.items():
        for metric, why in reasons.items():
            if rows[metric]["mean"] is not None:
                left_out[name, why].append(metric)
    return rows, notes + [f"{name}: {why} (not in {', '.join(names)})" for (name, why), names in left_out.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare two folders of videos or pictures, pairs by name.")
    parser.add_argument("real")
    parser.add_argument("fake")
    wanted = ", ".join(pattern for _, files in STANDARD.values() for pattern in files)
    parser.add_argument("--weights", metavar="DIR", help=f"folder with any of {wanted}")
    parser.add_argument("--judges", metavar="FILE", help="a run's backbone.pt, whose judges fill the rows with a star")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    try:
        networks, sources = load_standard(args.weights)
        judges = load_judges(args.judges) if args.judges else None
        rows, notes = compare(args.real, args.fake, networks, sources, judges)
        if judges:
            source = {"network": "self-trained on the public split", "held-out people": judges.scores,
                      "weights": {Path(args.judges).name: _sha256(args.judges)}}
            sources |= dict.fromkeys(SELF_TRAINED, source)
        if args.json:
            half_written = Path(f"{args.json}.part")
            half_written.write_text(json.dumps({"rows": rows, "judges": sources, "notes": notes}, indent=1))
            half_written.replace(args.json)
    except (ValueError, OSError) as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print("| metric | mean | 95 % interval | n | frames | |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        mean = "–" if row["mean"] is None else f"{row['mean']:.4f}"
        interval = "{:.4f} .. {:.4f}".format(*row["ci95"]) if row.get("ci95") else "–"
        print(f"| {name} | {mean} | {interval} | {row['n']} | {row['frames']} | "
              f"{row.get('reason') or row.get('warning', '')} |")
    for weights in {json.dumps(source["weights"]) for source in sources.values() if source["network"]}:
        print(f"judged with {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
