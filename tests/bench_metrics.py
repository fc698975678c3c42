"""Speed, memory and validity of metrics.py, each beside a peer or a controlled corruption.

    python tests/bench_metrics.py                   Frechet distance and table throughput beside the public packages
    python tests/bench_metrics.py --full            also scipy's square root in 2048 dimensions, 100,000 streamed rows
    python tests/bench_metrics.py --validity DIR [DIR ...]
                                                    train the judges on a dataset's public people, corrupt others' clips
    python tests/bench_metrics.py --sync DIR        the sync judge on people it never saw
"""
import argparse
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import metrics  # noqa: E402


def seconds(work, repeats=1):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------- speed and memory


def bench_frechet(full):
    from scipy.linalg import sqrtm

    def square_root(x, y):
        s, t = np.cov(x.T), np.cov(y.T)
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    print("| Frechet distance of | seconds | by scipy's matrix square root | relative difference |\n|---|---|---|---|")
    for n, d in ((200, 512), (3000, 512), (200, 2048), (3000, 2048)):
        x, y = np.random.default_rng(0).normal(size=(2, n, d))
        ours = seconds(lambda: metrics.frechet_distance(x, y * 1.1), 3)
        row = f"| {n} x {d} | {ours:.2f} |"
        if d < 2048 or full and n == 200:
            peer = seconds(lambda: square_root(x, y * 1.1))
            a, b = metrics.frechet_distance(x, y * 1.1), square_root(x, y * 1.1)
            row += f" {peer:.1f} | {abs(a - b) / b:.1e} |"
        print(row if row.count("|") > 3 else row + " – | – |", flush=True)


def bench_stream(num_rows=100_000, d=2048):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream, generator = metrics.FeatureStatistics(), torch.Generator().manual_seed(0)
    taken = seconds(lambda: [stream.update(torch.randn(500, d, generator=generator)) for _ in range(num_rows // 500)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{num_rows} rows of {d} features streamed in {taken:.0f} s; the process peaked at {peak / 2 ** 20:.2f} GiB, "
          f"{before / 2 ** 20:.2f} GiB before")


def bench_table(num_frames=16, size=64):
    """Seconds a frame of the paired metrics and of FID's features, the same frames and weights on both sides."""
    x, y = torch.rand(2, num_frames, 3, size, size, generator=torch.Generator().manual_seed(0))
    inception, lpips = metrics.InceptionFID(), metrics.LPIPS()
    for network in (inception, lpips):
        for value in network.state_dict().values():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5)
    table = {"PSNR": lambda: metrics.psnr(x, y), "SSIM": lambda: metrics.ssim(x, y), "LPIPS": lambda: lpips(x, y),
             "Inception": lambda: inception(x)}
    try:
        import lpips as lpips_package
        import pytorch_fid.inception as peer_inception
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
        peer_inception.load_state_dict_from_url = lambda *a, **k: inception.state_dict()
        theirs = peer_inception.InceptionV3().eval()
        distance = lpips_package.LPIPS(pnet_rand=True, verbose=False).eval()
        peers = [lambda: peak_signal_noise_ratio(x, y, data_range=1.0, reduction=None, dim=(1, 2, 3)),
                 lambda: structural_similarity_index_measure(x, y, data_range=1.0, reduction="none"),
                 lambda: distance(x, y, normalize=True), lambda: theirs(x)]
    except ImportError as error:
        print(f"no peers: {error}")
        peers = [None] * 4
    print(f"\n| {num_frames} frames of {size} px | ms a frame | peer, ms a frame |\n|---|---|---|")
    total = np.zeros(2)
    with torch.no_grad():
        for (name, ours), peer in zip(table.items(), peers):
            ours(), peer and peer()
            # turn by turn: a fair share of a busy machine
            rounds = [(seconds(ours), seconds(peer) if peer else np.nan) for _ in range(3)]
            best = np.min(rounds, axis=0) * 1000 / num_frames
            total += best
            print(f"| {name} | {best[0]:.2f} | {best[1]:.2f} |", flush=True)
    print(f"| the table | {total[0]:.2f} | {total[1]:.2f} |")


# ---------------------------------------------------------------- validity


def blur(x, rivals, strength, generator):
    return gaussian_blur(x, 4 * int(np.ceil(strength)) + 1, strength)


def noise(x, rivals, strength, generator):
    return (x + strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def shuffle(x, rivals, strength, generator):
    chosen = torch.randperm(len(x), generator=generator)[:round(strength * len(x))].sort().values
    mixed = x.clone()
    mixed[chosen] = x[chosen[torch.randperm(len(chosen), generator=generator)]]
    return mixed


def swap(x, rivals, strength, generator):
    """The first frames, in share `strength`, are another person's."""
    n = round(strength * len(x))
    return torch.cat([rivals[:n], x[n:]])


def shift(x, rivals, strength, generator):
    return x                                         # the sound is moved instead


CORRUPTIONS = {  # strengths, and which way each metric must go
    "blur, σ 0.5–4 px": (blur, (0.5, 1, 2, 4), {"psnr": -1, "ssim": -1, "lpips*": 1, "fid*": 1, "kid*": 1, "id*": -1}),
    "noise, σ 0.02–0.2": (noise, (0.02, 0.05, 0.1, 0.2), {
        "psnr": -1, "ssim": -1, "lpips*": 1, "tlp*": 1, "fid*": 1, "kid*": 1, "jitter": 1}),
    "25–100 % of frames shuffled": (shuffle, (0.25, 0.5, 1), {
        "psnr": -1, "ssim": -1, "tlp*": 1, "jitter": 1, "sync*": -1, "mouth motion": -1, "mouth opening*": -1}),
    # not FID* and KID*: swapped whole, the clips show the same set of people again
    "25–100 % another person": (swap, (0.25, 0.5, 1), {
        "psnr": -1, "ssim": -1, "lpips*": 1, "id*": -1, "sync*": -1, "mouth motion": -1, "mouth opening*": -1}),
    "sound 1–10 frames late": (shift, tuple(range(1, 11)), {"sync*": -1})}


@torch.no_grad()
def measure(judges, clips, corrupt, strength, generator):
    rows, features, truths = [], [], []
    frames = [torch.from_numpy(np.array(clip.frames)) / 255 for clip in clips]
    for i, (clip, truth) in enumerate(zip(clips, frames)):
        rival = next(frames[j % len(clips)] for j in range(i + 1, i + len(clips))
                     if clips[j % len(clips)].person != clip.person)
        rival = rival.repeat(-(-len(truth) // len(rival)), 1, 1, 1)[:len(truth)]
        x = corrupt(truth, rival, strength, generator)
        late = int(strength) if corrupt is shift else 0
        sync = judges.lip_sync(x, np.roll(clip.mel, 4 * late, 0))
        error = abs(sync["offset"] + late)
        few, some = slice(0, 16), slice(None, None, 4)           # the face network is the dear part
        row = {"psnr": metrics.psnr(x, truth).mean(), "ssim": metrics.ssim(x, truth).mean(),
               "jitter": metrics.jitter_ratio(x, truth),
               "sync*": sync["sync"], "lse_d*": sync["lse_d"], "lse_c*": sync["lse_c"],
               "offset error*": error, "offset found*": 100.0 * (error <= 1),
               "mouth motion": metrics.mouth_correlation(metrics.mouth_motion(x), metrics.mouth_motion(truth))}
        if judges.scores:                                        # the networks were trained
            own = judges.identity(truth[some]).mean(0)[None]
            row |= {"lpips*": judges.perceptual(x[some], truth[some]).mean(),
                    "tlp*": metrics.tlp(judges.perceptual, x[few], truth[few]),
                    "id*": F.cosine_similarity(judges.identity(x[some]), own).mean()}
            features.append(judges.features(x[some])), truths.append(judges.features(truth[some]))
        if judges.has_opening:
            row["mouth opening*"] = metrics.mouth_correlation(judges.opening(x), np.array(clip.opening))
        rows.append({name: float(value) for name, value in row.items()})
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    if not features:
        return means
    features, truths = torch.cat(features), torch.cat(truths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return means | {
            "fid*": metrics.frechet_distance(truths, features), "kid*": metrics.kernel_distance(truths, features)[0]}


def validity(root, steps, max_clips):
    """Train the judges on a dataset's public people and corrupt clips of others: a cell a metric and corruption."""
    cache = Path(__file__).resolve().parents[1] / "datasets" / ".cache" / "bench"
    talkers = data.TalkingHeads(root, size=64, cache=cache)
    names = sorted(talkers.people)
    public = [n for n in names if n.startswith("public")]
    public = public or np.random.default_rng(1).permutation(names)[:2 * len(names) // 3].tolist()
    start = time.perf_counter()
    if not steps:
        judges = metrics.Judges().eval()
        metrics._fit_sync(judges, [clip for n in public for clip in talkers.people[n]])
    else:
        with tqdm(total=100, desc="training the judges", disable=None) as bar:
            judges = metrics.train_judges({n: talkers.people[n] for n in public}, steps,
                                          progress=lambda share, losses: bar.update(int(100 * share) - bar.n))
    start = time.perf_counter() - start
    clips = [clip for n in names if n not in set(public) for clip in talkers.people[n]]
    clips = [clips[i] for i in np.linspace(0, len(clips) - 1, min(max_clips, len(clips))).astype(int)]
    scores = ", ".join(f"{k} {v:.3g}" for k, v in judges.scores.items()) or "not scored, no network was trained"
    print(f"\n**{Path(root).name}**: judges trained on {len(public)} public people in {start:.0f} s; on those held "
          f"out: {scores}. Below: {len(clips)} clips of {len({c.person for c in clips})} unseen people; untouched → "
          "strongest corruption, ✓ where every strength moves the metric the right way, ✗ where one does not.\n")
    generator = torch.Generator().manual_seed(0)
    untouched = measure(judges, clips, shift, 0, generator)
    tables = [[untouched] + [measure(judges, clips, corrupt, strength, generator) for strength in strengths]
              for corrupt, strengths, _ in tqdm(CORRUPTIONS.values(), "corrupting", disable=None)]
    print(f"| metric | {' | '.join(CORRUPTIONS)} |\n|{'---|' * (len(CORRUPTIONS) + 1)}")
    for metric in untouched:
        cells = []
        for (_, _, directions), table in zip(CORRUPTIONS.values(), tables):
            values = [row[metric] for row in table]
            way = directions.get(metric)
            sign = "" if not way else " ✓" if (way * np.diff(values) > 0).all() else " ✗"
            cells.append(f"{values[0]:.3g} → {values[-1]:.3g}{sign}")
        print(f"| {metric} | {' | '.join(cells)} |")
    found = np.mean([row["offset found*"] for row in tables[-1]])
    print(f"\nThe offset is found to within one frame in {found:.1f} % of the clips (guessing: 10 %), mean over "
          f"0–10 frames: the bar of 90 % is {'met' if found >= 90 else 'not met'}.", flush=True)


@torch.no_grad()
def sync_on_strangers(root, num_clients=8, num_unseen=5, num_folds=3):
    """How the sync judge does on people it never saw: folds of the public ones, then all of them against the others."""
    people = data.TalkingHeads(root, size=64).people
    public, clients, unseen = data.split_people(list(people), num_clients, num_unseen, 0)
    order = sorted(public, key=lambda name: (-len(people[name]), name))
    folds = [order[i::num_folds] for i in range(num_folds)]
    trained = [name for i, name in enumerate(public) if i % 8]                             # as `train_judges` holds out
    splits = {f"public, fold {i + 1}": ([n for n in order if n not in fold], fold) for i, fold in enumerate(folds)}
    print("| people | clips | right speech of the person's | offset found, of -10..10 |\n|---|---|---|---|")
    for name, (known, strangers) in (splits | {"clients": (trained, clients), "unseen": (trained, unseen)}).items():
        judges = metrics.Judges().eval()
        metrics._fit_sync(judges, [clip for n in known for clip in people[n]])
        wins, found = [], []
        for own in (people[n] for n in strangers):
            seen = [judges.watch(torch.from_numpy(np.array(clip.frames)) / 255) for clip in own]
            for i, video in enumerate(seen):
                match = lambda j, t: judges.lip_sync(video[:t], own[j].mel)["sync"]
                spans = [(j, min(len(video), len(seen[j]))) for j in range(len(own)) if j != i]
                wins.append(np.mean([match(i, t) > match(j, t) for j, t in spans]))
                found += [abs(judges.lip_sync(video[max(0, -k):], own[i].mel[4 * max(0, k):])["offset"] - k) <= 1
                          for k in range(-10, 11)]
        print(f"| {name} | {len(wins)} | {np.mean(wins):.3f} | {np.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--validity", metavar="DIR", nargs="+")
    parser.add_argument("--steps", type=int, default=320, help="of the judges' training; 0: judge without networks")
    parser.add_argument("--clips", type=int, default=32, help="at most, to corrupt")
    parser.add_argument("--sync", metavar="DIR", help="how the sync judge does on people it never saw")
    args = parser.parse_args()
    if args.sync:
        sync_on_strangers(args.sync)
    elif args.validity:
        for root in args.validity:
            validity(root, args.steps, args.clips)
    else:
        bench_frechet(args.full)
        bench_table()
        if args.full:
            bench_stream()
