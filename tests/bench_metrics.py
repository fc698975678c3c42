"""Speed and validity of metrics.py.

python tests/bench_metrics.py                  speed beside public packages, if installed
python tests/bench_metrics.py --validity DIR   train both sets of judges on a dataset's public
                                               people, score them on other people, corrupt clips
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import metrics  # noqa: E402


def seconds(function, repeats=1):
    """Return the shortest time that a call takes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------- speed


def bench_frechet():
    """Time the Frechet distance beside scipy's square root of a matrix."""

    def by_square_root(x, y):
        s, t = np.cov(x.T), np.cov(y.T)
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)

    print("| Frechet distance of | seconds | by scipy | relative difference |\n|---|---|---|---|")
    for n, d in ((3000, 240), (3000, 512), (3000, 2048)):
        x, y = np.random.default_rng(0).normal(size=(2, n, d)) * [[[1.0]], [[1.1]]]
        row = f"| {n} x {d} | {seconds(lambda: metrics.frechet_distance(x, y)):.2f} |"
        if d < 2048:
            found, expected = metrics.frechet_distance(x, y), by_square_root(x, y)
            row += (
                f" {seconds(lambda: by_square_root(x, y)):.2f} | {abs(found / expected - 1):.1e} |"
            )
        print(row, flush=True)


def find_peers(inception):
    """Return the same metrics of public packages by name, or none where these are not installed."""
    try:
        import lpips
        import pytorch_fid.inception
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        print(f"no peers: {error}")
        return {}
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: inception.state_dict()
    options = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "data_range": 1}

    def psnr(x, y):
        return [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(x.numpy(), y.numpy())]

    def ssim(x, y):
        return [structural_similarity(a, b, **options) for a, b in zip(x.numpy(), y.numpy())]

    return {
        "PSNR": psnr,
        "SSIM": ssim,
        "LPIPS": lpips.LPIPS(pnet_rand=True, verbose=False).eval(),
        "Inception": lambda x, y, network=pytorch_fid.inception.InceptionV3().eval(): network(x),
    }


@torch.no_grad()
def bench_frames(num_frames=16, size=64):
    """Time metrics of frames beside those of public packages."""
    x, y = torch.rand(2, num_frames, 3, size, size)
    inception, lpips = metrics.InceptionFID(), metrics.LPIPS()
    for value in lpips.state_dict().values():
        value.normal_(0, 0.02).abs_()
    ours = {"PSNR": metrics.psnr, "SSIM": metrics.ssim, "LPIPS": lpips}
    ours["Inception"] = lambda x, y: inception(x)
    peers = find_peers(inception)
    print(
        f"| {num_frames} frames of {size} px | ms per frame | peer, ms per frame |\n|---|---|---|"
    )
    for name, function in ours.items():
        row = [1000 * seconds(lambda: function(x, y), 3) / num_frames]
        if name in peers:
            row.append(1000 * seconds(lambda: peers[name](x, y), 3) / num_frames)
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)


# ---------------------------------------------------------------- validity


def blur(frames, other, strength, rng):
    return gaussian_blur(frames, 4 * int(np.ceil(strength)) + 1, strength)


def add_noise(frames, other, strength, rng):
    noise = torch.from_numpy(rng.normal(size=frames.shape).astype(np.float32))
    return (frames + strength * noise).clamp(0, 1)


def shuffle(frames, other, strength, rng):
    """Permute a share of the frames."""
    chosen = np.sort(rng.permutation(len(frames))[: round(strength * len(frames))])
    mixed = frames.clone()
    mixed[chosen] = frames[rng.permutation(chosen)]
    return mixed


def swap_person(frames, other, strength, rng):
    """Take the first share of the frames from another person."""
    n = round(strength * len(frames))
    return torch.cat([other[:n], frames[n:]])


def close_mouth(frames, other, strength, rng):
    """Move the mouth less: blend its region with its mean over time."""
    mixed = frames.clone()
    mouth = metrics.mouth_region(mixed)
    mouth.lerp_(mouth.mean(0, keepdim=True), strength)
    return mixed


DOWN = "psnr ssim mouth_psnr id_similarity* sync* right_speech* mouth_correlation*".split()
UP = "lpips* tlp* kid* jitter_ratio".split()
# name: function, strengths, metrics that every step has to make worse
CORRUPTIONS = {
    "blur, σ .5-4 px": (blur, (0.5, 1, 2, 4), ["psnr", "ssim", "lpips*", "kid*"]),
    "noise, σ .02-.2": (add_noise, (0.02, 0.05, 0.1, 0.2), ["psnr", "ssim", *UP]),
    "25-100 % of frames shuffled": (
        shuffle,
        (0.25, 0.5, 1),
        ["psnr", "tlp*", "jitter_ratio", "sync*", "mouth_correlation*"],
    ),
    "25-100 % another person": (
        swap_person,
        (0.25, 0.5, 1),
        ["psnr", "ssim", "lpips*", "id_similarity*", "sync*", "mouth_correlation*"],
    ),
    "mouth 25-100 % less": (close_mouth, (0.25, 0.5, 1), ["mouth_psnr", "mouth_std_ratio*"]),
    "sound 1-3 frames late": (None, (1, 2, 3), ["sync*"]),
}


def validity(root, steps, max_people):
    """Print the scores of both sets of judges on unseen people, and what corruptions do to the
    metrics.
    """
    people = data.TalkingHeads(root, size=64).people
    names = sorted(people)
    public = [name for name in names if name.startswith("public")]
    public = public or names[: 2 * len(names) // 3]
    halves = metrics.split_for_judges({name: people[name] for name in public}, 0)
    strangers = [name for name in names if name not in public and len(people[name]) > 2]
    strangers = {name: people[name] for name in strangers[:max_people]}
    for name, half, other in zip(("losses", "tables"), halves, halves[::-1]):
        start = time.perf_counter()
        judges = metrics.train_judges(half, steps)
        taken = time.perf_counter() - start
        print(f"\njudges of the {name}: {len(half)} people, {steps} steps, {taken:.0f} s")
        for group, unknown in (("the other half", other), ("clients", strangers)):
            scores = metrics.score_judges(judges, unknown)
            print(f"on {group}: " + ", ".join(f"{k} {v:.3g}" for k, v in scores.items()))
    splits = {name: data.split_clips(clips, 0) for name, clips in strangers.items()}
    cases = metrics.make_cases(splits, num_frames=50, clips_per_person=2)
    evaluation = metrics.Evaluation(cases, judges)
    rng = np.random.default_rng(0)
    for name, (corrupt, strengths, _) in tqdm(CORRUPTIONS.items(), "corrupting"):
        for case, other in zip(cases, cases[2:] + cases[:2]):
            other = torch.cat([other.frames] * 2)[: len(case.frames)]
            evaluation.speech.clear()  # that of the last clip may be late
            evaluation.add("truth", case, case.frames)
            for strength in strengths:
                changed = copy.copy(case)
                frames = case.frames
                if corrupt:
                    frames = corrupt(frames, other, strength, rng)
                else:
                    late = np.roll(case.speeches[0], 4 * strength, 0)
                    changed.speeches = [late, *case.speeches[1:]]
                    evaluation.speech.clear()  # of the sound in time
                evaluation.add(f"{name} {strength}", changed, frames)
    rows = evaluation.rows()
    shown = [
        m
        for m in (*DOWN, *UP, "mouth_std_ratio*", "offset_found*")
        if rows["truth"][m]["mean"] is not None
    ]
    print(f"\n{len(cases)} clips of {len(splits)} people; untouched → strongest corruption,")
    print("✓ where every step is worse\n")
    print(f"| | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 1)}")
    for name, (_, strengths, worse) in CORRUPTIONS.items():
        cells = []
        for metric in shown:
            methods = ["truth", *(f"{name} {strength}" for strength in strengths)]
            values = [rows[method][metric]["mean"] for method in methods]
            sign = 1 if metric in UP else -1
            mark = ""
            if metric in worse:
                mark = " ✓" if (sign * np.diff(values) > 0).all() else " ✗"
            cells.append(f"{values[0]:.3g} → {values[-1]:.3g}{mark}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--validity", metavar="DIR", help="a dataset")
    parser.add_argument("--steps", type=int, default=150, help="of the judges' training")
    parser.add_argument("--people", type=int, default=20, help="whose clips are corrupted, at most")
    args = parser.parse_args()
    if args.validity:
        validity(args.validity, args.steps, args.people)
    else:
        bench_frechet()
        bench_frames()
