"""metrics.py against closed forms, definitions, and outputs of public packages that are frozen here
as constants.
"""

import copy
import json
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from scipy import stats
from scipy.linalg import sqrtm

import data
import metrics
import study


def noise(*shape, seed=0):
    """Reproducible frames in [0, 1)."""
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape).astype(np.float32))


def fill(network):
    """Fill a network with weights that are the same everywhere and keep activations at a natural
    size.
    """
    offset = 0
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        bits = np.arange(offset, offset + value.numel(), dtype=np.uint32) * np.uint32(2654435761)
        bits = (bits ^ (bits >> 15)) * np.uint32(2246822519)  # an integer hash
        uniform = torch.from_numpy((bits ^ (bits >> 13)).astype(np.float64) / 2**32 - 0.5)
        uniform = uniform.view(value.shape)
        if value.ndim > 1:
            value.copy_(uniform * (24 / value[0].numel()) ** 0.5)
        elif "running_var" in name or "weight" in name:
            value.copy_(1 + 0.3 * uniform)
        else:
            value.copy_(0.3 * uniform)
        offset += value.numel()
    return network.eval()


# ---------------------------------------------------------------- frames and clips


def test_psnr_is_its_definition_and_100_for_equal_frames():
    x = torch.full((2, 3, 8, 8), 0.5)
    np.testing.assert_allclose(metrics.psnr(x, x + 0.1), [20, 20], atol=1e-5)
    assert metrics.psnr(x, x).tolist() == [100, 100]


def test_ssim_is_its_definition_in_a_single_window():
    x, y = noise(1, 1, 11, 11).double(), noise(1, 1, 11, 11, seed=1).double()
    g = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = torch.from_numpy(np.outer(g, g) / g.sum() ** 2)
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    covariance = (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    assert metrics.ssim(x, y).item() == pytest.approx(expected.item(), abs=1e-12)


def test_psnr_and_ssim_agree_with_public_packages():
    x = noise(3, 40, 37)
    y = (x + 0.2 * noise(3, 40, 37, seed=1)).clamp(0, 1)
    # scikit-image 0.26.0: structural_similarity(x, y, channel_axis=0, gaussian_weights=True,
    # sigma=1.5, use_sample_covariance=False, data_range=1), peak_signal_noise_ratio(x, y);
    # piq 0.8.0: ssim and psnr give the same
    assert metrics.ssim(x, y).item() == pytest.approx(0.965659874, abs=1e-8)
    assert metrics.psnr(x, y).item() == pytest.approx(19.226984402, abs=1e-6)


def test_per_frame_metrics_keep_leading_axes_and_bound_their_chunks():
    x, y = noise(2, 35, 3, 12, 13), noise(2, 35, 3, 12, 13, seed=1)
    one_by_one = [[metrics.ssim(a, b).item() for a, b in zip(*clips)] for clips in zip(x, y)]
    np.testing.assert_allclose(metrics.ssim(x, y), one_by_one, atol=1e-12)
    for shape, largest in (((70, 3, 8, 8), 32), ((5, 3, 256, 256), 4), ((3, 1, 1024, 1024), 1)):
        sizes = []

        def mean(frames):
            sizes.append(len(frames))
            return frames.mean((1, 2, 3))

        metrics.per_frame(mean, torch.zeros(shape))
        assert max(sizes) == largest and sum(sizes) == shape[0]


def test_jitter_is_the_mean_absolute_change():
    ramp = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 4) / 10
    assert metrics.temporal_jitter(ramp).tolist() == pytest.approx([0.1, 0.1])
    assert metrics.jitter_ratio(ramp * 2, ramp).tolist() == pytest.approx([2, 2])
    for slow in (0 * ramp, 1e-5 * ramp):
        assert metrics.jitter_ratio(slow, slow).tolist() == [1, 1]
    clips = [SimpleNamespace(frames=np.full((2, 3, 4, 4), [[[[0]]], [[[51]]]], np.uint8))]
    assert metrics.mean_jitter(clips) == pytest.approx(0.2)


def test_tlp_is_the_difference_of_the_changes():
    ramp = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4) / 20
    distances, changes = metrics.perceptual_distances(lambda x: x[:, 0, 0, :1], ramp * 3, ramp)
    assert distances.tolist() == pytest.approx([0, 0.01, 0.04, 0.09, 0.16])
    assert changes.tolist() == pytest.approx([0.15**2 - 0.05**2] * 4)


@torch.no_grad()
def test_perceptual_distances_are_those_of_pairs_of_frames_whatever_the_chunks():
    judges = metrics.Judges().eval()
    x, y = noise(2, 40, 3, 32, 32)  # two chunks
    distances, changes = metrics.perceptual_distances(judges.embed, x, y)
    assert torch.allclose(distances, judges.perceptual(x, y), rtol=1e-5)
    of_pairs = judges.perceptual(x[:-1], x[1:]) - judges.perceptual(y[:-1], y[1:])
    assert torch.allclose(changes, of_pairs.abs(), atol=1e-7)
    distances, changes = metrics.perceptual_distances(judges.embed, x[:1], y[:1])
    assert len(distances) == 1 and not len(changes)


def test_mouth_correlation_is_pearsons_and_0_for_a_still_mouth():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert metrics.mouth_correlation(a, b).item() == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.mouth_correlation(3 * a + 1, a).item() == pytest.approx(1)
    assert metrics.mouth_correlation(torch.ones(50), b).item() == 0
    rounded = torch.full((40,), 0.3)
    rounded[32:] = torch.nextafter(rounded[0], torch.tensor(1.0))  # as of two batch sizes
    step = torch.arange(40) >= 32
    assert abs(metrics.mouth_correlation(rounded, step.float()).item()) < 0.01


def test_the_mouth_region_is_below_the_middle():
    frames = torch.zeros(1, 64, 64)
    frames[:, 44:52, 26:38] = 1
    assert metrics.mouth_region(frames).shape == (1, 28, 28)
    assert metrics.mouth_region(frames).sum() == frames.sum()


REFUSED = {
    "uint8": torch.zeros(7, 3, 64, 64, dtype=torch.uint8),
    "in -1 ... 1": noise(7, 3, 64, 64) * 2 - 1,
    "of 255": noise(7, 3, 64, 64) * 255,
    "NaN": noise(7, 3, 64, 64).log() * float("nan"),
    "infinite": noise(7, 3, 64, 64) / 0,
}


@pytest.mark.parametrize("frames", REFUSED.values(), ids=REFUSED)
def test_frames_out_of_range_are_refused_everywhere(frames):
    judges = metrics.Judges().eval()
    judges.has_opening = True
    calls = [
        lambda: metrics.psnr(frames, frames),
        lambda: metrics.ssim(frames, frames),
        lambda: metrics.temporal_jitter(frames),
        lambda: metrics.perceptual_distances(judges.embed, frames, frames),
        lambda: metrics.LPIPS()(frames, frames),
        lambda: judges.identity(frames),
        lambda: judges.perceptual(frames, frames),
        lambda: judges.features(frames),
        lambda: judges.opening(frames),
        lambda: judges.mouth_video(frames[None]),
    ]
    with torch.device("meta"):  # weights without values: the frames are looked at first
        networks = [metrics.InceptionFID(), metrics.ArcFace()]
        syncnet = metrics.SyncNet()
    calls += [lambda network=network: network(frames) for network in networks]
    calls += [lambda: syncnet(frames, torch.zeros(28, 13))]
    for call in calls:
        with pytest.raises(ValueError, match="frames must"):
            call()


def test_white_in_bfloat16_is_in_range():
    white = torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)
    assert metrics.psnr(white, white) == 100


def test_frames_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(noise(2, 3, 16, 16), noise(2, 3, 16, 17))
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(noise(0, 3, 16, 16), noise(0, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(noise(2, 3, 9, 16), noise(2, 3, 9, 16))
    with pytest.raises(ValueError, match="two frames"):
        metrics.temporal_jitter(noise(1, 3, 16, 16))


# ---------------------------------------------------------------- means and their intervals


def test_the_interval_of_a_mean_is_students():
    values = [1.0, 2.0, 4.0, 9.0]
    found = metrics.mean_ci(values)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found == {"mean": 4.0, "ci95": pytest.approx(list(expected)), "n": 4}
    assert metrics.mean_ci([2.0]) == {"mean": 2.0, "ci95": None, "n": 1}
    for values in ([], [1, np.nan], [1, np.inf]):
        with pytest.raises(ValueError, match="at least one value"):
            metrics.mean_ci(values)


def test_with_groups_the_mean_and_interval_are_those_of_the_groups_means():
    found = metrics.mean_ci([1, 3, 5, 7, 7, 7], ["a", "a", "b", "c", "c", "c"])
    expected = metrics.mean_ci([2, 5, 7])
    assert found == expected | {"n": 6, "groups": 3}
    assert metrics.mean_ci([1, 2], ["a", "a"]) == {"mean": 1.5, "ci95": None, "n": 2, "groups": 1}


def test_intervals_over_people_cover_where_those_over_clips_do_not():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 2)
    hits = {"people": 0, "clips": 0}
    for _ in range(1000):
        values = rng.normal(size=12)[people] + 0.5 * rng.normal(
            size=24
        )  # clips of a person correlate
        for name, groups in (("people", people), ("clips", None)):
            low, high = metrics.mean_ci(values, groups)["ci95"]
            hits[name] += low <= 0 <= high
    assert 0.93 < hits["people"] / 1000 < 0.97
    assert hits["clips"] / 1000 < 0.88


def test_crossed_interval_is_students_where_only_people_or_only_seeds_differ():
    people = np.array([1.0, 2.0, 4.0, 9.0])
    seeds = np.array([0.0, 1.0, 5.0])
    tables = (np.tile(people, (3, 1)), people), (np.tile(seeds[:, None], (1, 4)), seeds)
    for values, units in (*tables, (people[None], people), (seeds[:, None], seeds)):
        found = study.crossed_ci(values)
        expected = metrics.mean_ci(units)
        assert found["mean"] == pytest.approx(expected["mean"])
        assert found["ci95"] == pytest.approx(expected["ci95"])
        assert (found["seeds"], found["n"]) == values.shape
    assert study.crossed_ci(np.full((3, 4), 2.0))["ci95"] == [2, 2]
    assert study.crossed_ci([[1.0]])["ci95"] is None


@pytest.mark.parametrize("seed_std, person_std", [(0.0, 0.0), (0.0, 2.0), (1.0, 1.0), (2.0, 0.0)])
def test_crossed_interval_covers_the_truth(seed_std, person_std):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        values = rng.normal(0, seed_std, (3, 1)) + rng.normal(0, person_std, (1, 12))
        low, high = study.crossed_ci(values + rng.normal(0, 1, (3, 12)))["ci95"]
        hits += low <= 0 <= high
    assert hits / 600 > 0.93


def test_the_study_renews_a_table_and_keeps_the_words_below_it():
    words = "Words.\n\n| a table of theirs |\n\nMore words.\n"
    page = f"# Study\n\n## a\n\n| 1 |\n\nMinus x:\n\n| 2 |\n\n{words}\n## b\n\n| 3 |\n"
    renewed = study.update_page(page, "a", ["## a", "", "| 4 |", "", "Minus y:", "", "| 5 |"])
    assert renewed == page.replace("1", "4").replace("x", "y").replace("2", "5")
    assert study.update_page(page, "b", ["## b", "", "| 6 |"]) == page.replace("3", "6")
    assert study.update_page(page, "c", ["## c", "", "| 7 |"]) == page + "\n## c\n\n| 7 |\n"


def test_the_studys_settings_win_in_every_cell():
    settings = ["personal.clients=5", "personal.steps=3"]
    for table in study.make_tables().values():
        for cell in table.cells:
            overrides, _ = study.describe_run(cell, 0, settings)
            last = dict(item.split("=", 1) for item in overrides)
            assert last["personal.clients"] == "5" and last["personal.steps"] == "3", cell


def test_the_study_draws_in_blue_what_differs_from_0():
    people = np.linspace(-0.1, 0.1, 9)[None]  # 1 9
    values = {
        "first": people,
        "alike": people[:, ::-1],
        "better": people + 0.3,
        "worse": people - 9,
    }
    values = {row: dict.fromkeys(study.DRAWN, x) for row, x in values.items()}
    differences = study.subtract_first(values)
    assert list(differences) == ["alike", "better", "worse"]
    np.testing.assert_allclose(differences["better"]["unexplained"], np.full((1, 9), 0.3))
    picture = np.asarray(study.draw_differences("first", differences)).astype(int)  # h w 3
    blue = (picture[..., 2] - picture[..., 0] > 100).sum(1)  # of each line
    rows = blue.reshape(5, -1).sum(1)  # title, three rows, scale
    assert rows[0] == rows[1] == rows[4] == 0
    assert rows[2] > rows[3] > 200  # a ring at the end of the scale is not filled
    # Of people whom nothing was trained on the motion is not measured.
    unmeasured = {row: dict.fromkeys(study.DRAWN) for row in values}
    nothing = np.asarray(study.draw_differences("first", study.subtract_first(unmeasured)))
    assert nothing.shape == picture.shape


def test_auc_counts_ties_half_and_is_that_of_two_gaussians():
    assert metrics.auc([3, 4], [1, 2]) == 1 and metrics.auc([1, 2], [3, 4]) == 0
    assert metrics.auc([1, 1], [1]) == 0.5 and metrics.auc([2, 0], [1]) == 0.5
    low, high = np.random.default_rng(0).normal(size=(2, 20000))
    assert metrics.auc(high + 2, low) == pytest.approx(stats.norm.cdf(2**0.5), abs=0.01)


# ---------------------------------------------------------------- distributions of features


def rows_with(mean, covariance, n, seed):
    """n rows whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    real = rows_with(np.zeros(3), np.diag([1.0, 4, 9]), 50, 0)
    fake = rows_with(np.array([1.0, 2, 0]), np.diag([4.0, 1, 16]), 80, 1)
    assert metrics.frechet_distance(real, fake) == pytest.approx(5 + 1 + 1 + 1, abs=1e-6)


@pytest.mark.parametrize("n, m", [(12, 9), (12, 200), (200, 300)])
def test_frechet_distance_equals_the_matrix_square_root_and_warns_of_few_rows(n, m):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 30)), rng.normal(size=(m, 30)) * 1.5 + 0.3
    s, t = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert len(caught) == (n < 30)


def test_kernel_distance_is_the_unbiased_mmd():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)), rng.normal(size=(20, 5)) + 0.5

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    expected = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 380
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 400
    mean, std = metrics.kernel_distance(x, y, subset_size=20)
    assert mean == pytest.approx(expected, abs=1e-9) and std < 1e-12
    assert metrics.kernel_distance(x, y)[1] > 0  # subsets of ten
    with pytest.raises(ValueError, match="at least two"):
        metrics.kernel_distance(x[:1], y)


def test_distances_agree_with_public_packages():
    rng = np.random.RandomState(0)
    x = rng.randn(60, 16)
    y = rng.randn(60, 16) * 1.2 + 0.3
    # pytorch-fid 0.3.0: calculate_frechet_distance of means and covariances
    assert metrics.frechet_distance(x, y) == pytest.approx(5.957672537, abs=1e-7)
    # torch-fidelity 0.4.0: kernel_mmd(x, y) with poly, degree 3, coef0 1;
    # clean-fid 0.1.35: kernel_distance(x, y, num_subsets=1) gives the same
    kid, _ = metrics.kernel_distance(x, y, subset_size=60)
    assert kid == pytest.approx(0.535626674, abs=1e-8)


# ---------------------------------------------------------------- the standard networks


@torch.no_grad()
def test_inception_agrees_with_pytorch_fid():
    found = fill(metrics.InceptionFID())(noise(1, 3, 64, 80))[0]
    assert found.shape == (2048,)
    # pytorch-fid 0.3.0: InceptionV3() with these weights, last block: norm and first features
    assert found.norm().item() == pytest.approx(46.302417755, rel=1e-4)
    np.testing.assert_allclose(found[:4], [1.56085634, 0, 0, 1.49839425], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "net, expected", [("alex", [0.255417943, 0.254389733]), ("vgg", [0.193110332, 0.191715986])]
)
@torch.no_grad()
def test_lpips_agrees_with_lpips(net, expected):
    network = fill(metrics.LPIPS(net))
    for lin in network.lins.values():
        lin["model"][1].weight.abs_()  # as in the published files
    x, y = noise(2, 3, 64, 70), noise(2, 3, 64, 70, seed=1)
    # lpips 0.1.4: LPIPS(net=net, pnet_rand=True, pretrained=False) with these weights,
    # of 2 x - 1 and 2 y - 1
    np.testing.assert_allclose(network(x, y), expected, rtol=1e-4)
    assert network(x, x).tolist() == [0, 0]
    with pytest.raises(ValueError, match="alex and vgg"):
        metrics.LPIPS("squeeze")


@torch.no_grad()
def test_arcface_agrees_with_insightface():
    network = fill(metrics.ArcFace(50))
    x = noise(1, 3, 112, 112)
    # insightface, recognition/arcface_torch/backbones/iresnet.py at 04a433f: iresnet50() with
    # these weights of 2 x - 1, normalized
    expected = [-0.038972255, 0.036915362, 0.102647878, -0.014263775, 0.02344479]
    np.testing.assert_allclose(network(x)[0, :5], expected, rtol=1e-3)
    assert network(x).norm().item() == pytest.approx(1, abs=1e-5)


def test_arcface_has_the_published_sizes_and_names():
    for depth, published in ((50, 43.59e6), (100, 65.16e6)):
        with torch.device("meta"):
            network = metrics.ArcFace(depth)
        num_parameters = sum(p.numel() for p in network.parameters())
        assert num_parameters == pytest.approx(published, abs=1e4)
    keys = network.state_dict()
    assert keys["layer3.29.conv2.weight"].shape == (256, 256, 3, 3)
    assert "layer2.0.downsample.1.running_mean" in keys
    assert "layer2.1.downsample.1.running_mean" not in keys
    with pytest.raises(ValueError, match="depth"):
        metrics.ArcFace(34)


def test_mfcc_agrees_with_python_speech_features():
    audio = (np.random.RandomState(0).randn(1000) * 3000).astype(np.int16)
    found = metrics.mfcc(audio)
    # python_speech_features 0.6: mfcc(audio, 16000), first and last of five rows
    first = [21.973782929, -34.613645043, -5.389782413, -9.169847265, 4.134178995, -2.258609598]
    first += [-9.575036952, -4.321544948, -2.349553403, -7.925172837, 3.314126436, 0.764012743]
    first += [-10.203469101]
    last = [21.853983497, -34.881941122, -4.818784108, -9.213586857, -2.86044791, 2.910899414]
    last += [4.062347438, 7.456128018, -3.183156217, -6.748717016, 2.05056214, -3.79990964]
    last += [-9.277815333]
    assert found.shape == (5, 13)
    np.testing.assert_allclose(found[[0, -1]], [first, last], atol=1e-7)


def test_mfcc_holds_the_log_energy_at_100_hz():
    audio = np.zeros(16000)
    audio[8000] = 1000  # after pre-emphasis 1000, then -970
    cepstra = metrics.mfcc(audio)
    assert cepstra.shape == (99, 13) and cepstra[:, 0].argmax() in (48, 49, 50)
    spectrum = np.abs(np.fft.rfft([1000, -970], 512)) ** 2 / 512
    assert cepstra[49, 0] == pytest.approx(np.log(spectrum.sum()))


@pytest.fixture(scope="module")
def syncnet():
    return fill(metrics.SyncNet())


@torch.no_grad()
def test_syncnet_agrees_with_syncnet_python(syncnet):
    frames = noise(6, 3, 224, 224)
    audio = (np.random.RandomState(0).randn(640 * 6) * 3000).astype(np.int16)
    cepstra = torch.from_numpy(metrics.mfcc(audio)).float()
    lips, sound = syncnet(frames, F.pad(cepstra, (0, 0, 0, 1)))
    # syncnet_python, SyncNetModel.S with these weights: forward_lip of 255 x BGR frames and
    # forward_aud of MFCC in windows 0 and 1; norm of both windows, first values of the second
    assert lips.shape == sound.shape == (2, 1024)
    assert lips.norm().item() == pytest.approx(20485.33, rel=1e-4)
    np.testing.assert_allclose(lips[1, :3], [388.28235, 872.26471, -360.42429], rtol=1e-3)
    assert sound.norm().item() == pytest.approx(1764.7246, rel=1e-4)
    np.testing.assert_allclose(sound[1, :3], [-4.98766, 11.96498, 28.36613], rtol=1e-3)


def test_sync_offset_agrees_with_syncnet_python():
    video = torch.from_numpy(np.random.RandomState(0).randn(40, 8)).float()
    late = torch.roll(video, 3, 0)  # the sound comes three frames late
    audio = late + 0.5 * torch.from_numpy(np.random.RandomState(1).randn(40, 8)).float()
    # syncnet_python, SyncNetInstance: calc_pdist(video, audio, vshift=15), mean, minimum, median
    expected = {"lse_d": pytest.approx(1.344652891, abs=1e-5), "offset": -3}
    assert metrics.sync_offset(video, audio) == expected | {
        "lse_c": pytest.approx(2.418558598, abs=1e-5)
    }


@pytest.mark.parametrize("shift", [-7, 0, 4])
def test_both_sync_scores_find_a_shift(shift):
    video = F.normalize(torch.from_numpy(np.random.RandomState(0).randn(60, 16)).float(), dim=-1)
    audio = torch.roll(video, shift, 0)
    assert metrics.sync_offset(video, audio)["offset"] == -shift
    assert metrics.sync_scores(video, audio)["offset"] == -shift


def test_sync_is_the_correlation_over_time_and_0_for_a_still_mouth():
    video, audio = torch.from_numpy(np.random.RandomState(0).randn(2, 40, 4)).float()
    found = metrics.sync_scores(video + 3, 2 * audio - 1)
    x, y = video - video.mean(0), audio - audio.mean(0)
    r = ((x * y).sum() / (x.norm() * y.norm())).item()
    assert found["sync"] == pytest.approx(r, abs=1e-6)
    assert metrics.sync_scores(video, 2 * video + 1)["lse_d"] == pytest.approx(0, abs=1e-3)
    still = metrics.sync_scores(torch.ones(40, 4), audio)
    assert still["sync"] == pytest.approx(0, abs=1e-6)
    assert metrics.right_speech(torch.ones(40, 4), audio, video) == 0.5
    assert metrics.right_speech(video, video, audio) == 1
    assert metrics.right_speech(video, audio, video) == 0


class BrightnessSyncNet(torch.nn.Module):
    """A stand-in that embeds the brightness of five frames, and the log energy of their sound."""

    def forward(self, frames, cepstra):
        brightness = frames.mean((1, 2, 3)).unfold(0, 5, 1)  # f-4 5
        energy = cepstra[:, 0].unfold(0, 20, 4)  # f-4 20
        return brightness, energy[:, ::4]


def test_lse_needs_35_frames_and_does_not_depend_on_its_chunks():
    frames = noise(50, 3, 8, 8)
    audio = (np.random.RandomState(0).randn(640 * 50) * 3000).astype(np.int16)
    cepstra = F.pad(torch.from_numpy(metrics.mfcc(audio)).float(), (0, 0, 0, 1))
    sides = BrightnessSyncNet()(frames, cepstra[:200])
    whole = metrics.sync_offset(
        *(side[:45] for side in sides)
    )  # the published script drops the last
    found = metrics.lse(BrightnessSyncNet(), frames, audio)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}
    for num_frames, num_sounds in ((34, 50), (50, 34)):
        with pytest.raises(ValueError, match="35 frames with sound, not 34"):
            metrics.lse(BrightnessSyncNet(), frames[:num_frames], audio[: 640 * num_sounds])
    with pytest.raises(TypeError, match="float64.*int16"):
        metrics.lse(BrightnessSyncNet(), frames, audio / 32768)


# ---------------------------------------------------------------- files of weights


def test_weights_are_loaded_unchanged(tmp_path):
    network = fill(metrics.LPIPS())
    state = {
        f"module.features.{key}": value for key, value in network.features.state_dict().items()
    }
    torch.save(
        state | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "alexnet-owt-7be5be79.pth"
    )
    for version, factor in (("v0.0", 2), ("v0.1", 1)):  # as in LPIPS's repository
        (tmp_path / version).mkdir()
        lins = {key: factor * value for key, value in network.lins.state_dict().items()}
        torch.save(lins, tmp_path / version / "alex.pth")
    networks, sources = metrics.load_standard(tmp_path)
    assert list(networks) == ["lpips"]
    found = networks["lpips"].state_dict()
    assert all(torch.equal(value, found[key]) for key, value in network.state_dict().items())
    assert sources["tlp"] == sources["lpips"]
    assert sources["lpips"]["network"] == "LPIPS"
    assert list(sources["lpips"]["weights"]) == ["alexnet-owt-7be5be79.pth", "v0.1/alex.pth"]
    assert all(len(digest) == 64 for digest in sources["lpips"]["weights"].values())
    assert sources["lse_c"] == {"network": None, "reason": "needs syncnet_v2.model"}


@pytest.mark.parametrize(
    "name",
    [
        "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid
        "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity
        "ms1mv3_arcface_r50_fp16/backbone.pth",  # insightface
        "glint360k_cosface_r100_fp16_0.1/backbone.pth",
        "iresnet50-7f187506.pth",  # pytorch-insightface
        "syncnet_v2.model",  # syncnet_python
        "auxiliary/syncnet_v2.model",
    ],
)
def test_files_are_found_under_the_names_of_public_repositories(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match=f"{Path(name).name} is not a file of weights"):
        metrics.load_standard(tmp_path)


def test_files_that_are_no_weights_are_refused_with_a_sentence(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    state = network.state_dict()
    older = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(older, tmp_path / "good")
    assert len(metrics.load_weights(network, tmp_path / "good")) == 64
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    (tmp_path / "text").write_text("no weights")
    files = {
        "missing key": {key: value for key, value in older.items() if key != "0.bias"},
        "other shape": older | {"0.bias": torch.zeros(3)},
        "surplus key": older | {"0.scale": torch.zeros(3)},
        "number as key": {1: torch.zeros(3)},
        "no tensor": {"0.bias": 0},
        "a list": [torch.zeros(3)],
    }
    reasons = ["first misfit 0.bias", "first misfit 0.bias", "first misfit 0.scale"]
    reasons += ["1 does not name a tensor", "'0.bias' does not name a tensor", "no dict"]
    for (name, content), reason in zip(files.items(), reasons):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=reason):
            metrics.load_weights(network, tmp_path / name)
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match="not a file of weights"):
            metrics.load_weights(network, tmp_path / name)


def test_the_table_of_metrics_fits_the_code():
    for metric, needs in metrics.METRICS.items():
        assert needs["network"] in ("–", "judges", *metrics.NETWORKS), metric
        assert metric.endswith("*") == (needs["network"] == "judges"), metric
    _, sources = metrics.load_standard()
    assert set(sources) == {
        m for m in metrics.METRICS if metrics.METRICS[m]["network"] in metrics.NETWORKS
    }
    num_features = metrics.Judges().eval().features(noise(1, 3, 64, 64)).shape[1]
    assert metrics.METRICS["fid*"]["least"] == f"{4 * num_features} in all"
    assert metrics.LEAST_FOR_FID == {"": 2048, "*": 4 * num_features}


# ---------------------------------------------------------------- the small judges


def make_clip(person, name, rng, colour, num_frames=44):
    """A clip of a plain face whose dark mouth opens as loud as its speech is."""
    opening = np.convolve(rng.normal(size=num_frames + 4), np.ones(5) / 2, "valid").clip(0, 1)
    frames = np.tile(np.uint8(colour)[:, None, None], (num_frames, 1, 64, 64))
    for t, amount in enumerate(opening):
        frames[t, :, 44 : 46 + int(12 * amount), 24:40] = 20
    audio = np.int16(rng.normal(size=640 * num_frames) * 3000 * np.repeat(opening, 640))
    mel = np.float32(np.repeat(opening, 4)[:, None] * np.ones(40))
    return data.Clip(person, name, Path(name), frames, audio, mel, "", np.float32(opening))


@pytest.fixture(scope="module")
def people():
    found = {}
    for p in range(6):
        rng = np.random.default_rng(p)
        colour = rng.integers(60, 255, 3)
        found[f"p{p}"] = [make_clip(f"p{p}", f"c{c}", rng, colour) for c in range(3)]
    return found


@pytest.fixture(scope="module")
def judges(people):
    return metrics.train_judges(people, steps=8, batch_size=4, num_frames=16)


def test_judges_have_the_right_shapes_norms_and_gradients(judges):
    for size in (64, 128):
        clip = noise(2, 7, 3, size, size).requires_grad_()
        mouth = judges.mouth_video(clip)
        speech = judges.mouth_audio(noise(2, 7, 20, 40))
        faces = judges.identity(clip[0])
        assert mouth.shape == speech.shape == (2, 3, 64)
        assert judges.features(clip[0]).shape[0] == 7
        for embedding in (mouth, speech, faces):
            np.testing.assert_allclose(embedding.detach().norm(dim=-1), 1, atol=1e-5)
        distance = judges.perceptual(clip[0], clip[1])
        assert distance.shape == (7,) and (distance > 0).all()
        assert judges.perceptual(clip[0], clip[0]).max() < 1e-6
        (mouth.sum() + faces.sum() + distance.sum() + judges.opening(clip[0]).sum()).backward()
        assert clip.grad.isfinite().all() and clip.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in judges.parameters()) and not judges.training


def test_mouth_windows_see_their_own_five_frames_only(judges):
    clip = noise(1, 9, 3, 64, 64)
    changed = clip.clone()
    changed[:, 5] = 0
    moved = (judges.mouth_video(clip) - judges.mouth_video(changed)).abs().sum(-1)[0] > 1e-6
    assert moved.tolist() == [False, True, True, True, True]  # windows 1 ... 4 hold frame 5


def test_mouth_audio_sees_the_same_five_frames(judges):
    mel = np.random.RandomState(0).randn(36, 40).astype(np.float32)
    changed = mel.copy()
    changed[20:24] += 1  # frame 5
    windows = [torch.as_tensor(data.audio_windows(part))[None] for part in (mel, changed)]
    difference = judges.mouth_audio(windows[0]) - judges.mouth_audio(windows[1])
    assert (difference.abs().sum(-1)[0] > 1e-6).tolist() == [False, True, True, True, True]


def test_training_is_reproducible_and_leaves_the_global_generator_alone(people, judges):
    torch.manual_seed(5)
    again = metrics.train_judges(people, steps=8, batch_size=4, num_frames=16)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())
    assert all(torch.equal(a, b) for a, b in zip(judges.parameters(), again.parameters()))
    other = metrics.train_judges(people, steps=1, seed=1, batch_size=4, num_frames=16)
    assert not torch.equal(other.face_head[2].weight, again.face_head[2].weight)
    fresh = metrics.Judges()
    fresh.load_state_dict(copy.deepcopy(judges.state_dict()))
    assert fresh.scores == judges.scores and fresh.has_opening
    assert judges.scores["people"] == 1 and judges.scores["clips"] == 2  # the held-out person


def test_every_eighth_person_is_held_out(people, judges):
    changed = people | {"p0": people["p1"]}
    others = metrics.train_judges(changed, steps=8, batch_size=4, num_frames=16)
    assert torch.equal(judges.face_head[2].weight, others.face_head[2].weight)
    assert judges.scores != others.scores


def test_judges_are_trained_on_random_views(people, monkeypatch):
    views = []
    augment = data.augment

    def record(clips, view, generator):
        views.append(view)
        return augment(clips, view, generator)

    monkeypatch.setattr(data, "augment", record)
    metrics.train_judges(people, steps=4, batch_size=8, num_frames=10)
    views = torch.cat(views)
    assert views.shape == (32, len(data.VIEW_NAMES)) and views.abs().max() <= 1
    assert (views.std(0) > 0.3).all()


def test_each_face_is_learned_as_that_of_its_own_clip(monkeypatch):
    monkeypatch.setattr(data, "augment", lambda frames, view, generator: frames)
    judges = metrics.Judges().eval()
    pictures = noise(2, 3, 64, 64)
    clips = pictures[:, None].expand(-1, 12, -1, -1, -1), torch.zeros(2, 12, 20, 40)
    losses = []
    for labels in ([0, 1], [1, 0]):
        generator = torch.Generator().manual_seed(0)
        arguments = torch.tensor(labels), *clips, torch.zeros(2, 12), generator
        loss = metrics.judge_loss(judges, judges.identity(pictures), *arguments)
        losses.append(float(loss.detach()))
    assert losses[0] < losses[1] - 0.1


def test_judges_learn_opening_and_sync(people):
    trained = metrics.train_judges(people, 40, batch_size=4, num_frames=16)
    rng = np.random.default_rng(9)
    strangers = {}
    for p in range(2):
        clips = [
            make_clip(f"s{p}", f"c{c}", rng, 100 + 100 * np.array([p, 0, 1 - p])) for c in range(3)
        ]
        strangers[f"s{p}"] = clips
    found = metrics.score_judges(trained, strangers)
    assert found["mouth_correlation*"] > 0.6
    assert found["right_speech*"] > 0.7
    assert found["verification_auc"] > 0.7
    assert found["people"] == 2 and found["clips"] == 4


def test_judges_learn_no_opening_where_one_is_unknown(people):
    first, *others = people["p1"]
    mixed = people | {"p1": [replace(first, opening=None), *others]}
    trained = metrics.train_judges(mixed, steps=1, batch_size=2, num_frames=10)
    assert not trained.has_opening


def test_judges_refuse_too_little(people):
    with pytest.raises(ValueError, match="four people"):
        metrics.train_judges({name: people[name] for name in ("p0", "p1", "p2")})
    short = {name: [data.slice_clip(clips[0], 0, 9)] for name, clips in people.items()}
    with pytest.raises(ValueError, match="ten frames"):
        metrics.train_judges(short)
    with pytest.raises(ValueError, match="opening"):
        metrics.Judges().opening(noise(1, 3, 64, 64))


def test_the_judges_of_losses_and_tables_share_no_person(people):
    losses, tables = metrics.split_for_judges(people, seed=0)
    assert len(losses) == len(tables) == 3
    assert losses | tables == people and not losses.keys() & tables.keys()
    again, _ = metrics.split_for_judges(dict(reversed(people.items())), seed=0)
    assert again.keys() == losses.keys()
    assert any(metrics.split_for_judges(people, s)[0].keys() != losses.keys() for s in (1, 2, 3))


def test_judges_are_loaded_from_a_run(tmp_path, judges):
    states = {"loss": metrics.Judges().state_dict(), "table": judges.state_dict()}
    torch.save({"kind": "backbone", "state": {"judges": states}}, tmp_path / "backbone.pt")
    loaded = metrics.load_judges(tmp_path / "backbone.pt")
    assert loaded.scores == judges.scores and not loaded.training
    torch.save({"judges": {"table": states["loss"]}}, tmp_path / "untrained.pt")
    with pytest.raises(ValueError, match="never trained"):
        metrics.load_judges(tmp_path / "untrained.pt")
    for content in ({}, {"judges": states["table"]}, {"state": 1}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="no judges of this version"):
            metrics.load_judges(tmp_path / "other.pt")


# ---------------------------------------------------------------- finding faces


def draw_talkers(names):
    """Return {name: [data.Clip]} of synthetic talkers with four frames each."""
    talkers = {}
    for name in names:
        person = data.make_person(0, name)
        rng = np.random.default_rng([*name.encode()])
        curve = data.speech_curve(rng, 1.0, person.mouths)
        motion = data.make_motion(rng, person, curve, 20, "")
        frames = data.draw(person, motion, 64)[::5]
        none = np.zeros(0)
        talkers[name] = [data.Clip(name, "1", Path(name), frames, none, none, "", np.zeros(4))]
    return talkers


def test_the_face_finder_learns_where_unseen_faces_are():
    """After 60 of the default's 400 steps; `bench_faces.py` finds .96 of the faces after all."""
    state = torch.get_rng_state()
    finder = metrics.train_finder(draw_talkers(f"public-{i:03d}" for i in range(32)), 60)
    assert torch.equal(torch.get_rng_state(), state) and finder.drawings
    others = draw_talkers(f"unseen-{i:03d}" for i in range(10))
    faces = [metrics.unit_frames(clips[0].frames[0]) for clips in others.values()]
    faces = torch.stack(faces * 25)  # 250 3 64 64
    generator = torch.Generator().manual_seed(1)
    pictures, box, is_face = metrics.paste_faces(faces, faces.flip(0), generator)
    boxes, scores = finder.boxes(pictures)
    score, place = scores.max(1)
    assert metrics.auc(score[is_face].numpy(), score[~is_face].numpy()) > 0.65
    x, y, side = box.unbind(1)
    right = torch.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], 1)
    found = boxes[torch.arange(len(boxes)), place]
    pairs = zip(found[is_face].numpy(), right[is_face].numpy())
    assert np.median([data.box_overlap(*pair) for pair in pairs]) > 0.5


class SquareFinder(metrics.FaceFinder):
    """A finder whose network is written by hand: it knows white squares on black."""

    def forward(self, pictures):
        white = pictures.mean(1, keepdim=True)  # n 1 h w
        h, w = white.shape[2:]
        x = torch.arange(w).expand(h, w) + 0.5
        y = torch.arange(h)[:, None].expand(h, w) + 0.5
        around = F.pad(torch.cat([white, white * x, white * y], 1), (28, 28, 28, 28))
        area, x_sum, y_sum = (64**2 * F.avg_pool2d(around, 64, 8)).unbind(1)  # n h/8 w/8
        area = area.clamp(min=1e-3)
        x = x_sum / area - 8 * (torch.arange(w // 8) + 0.5)
        y = y_sum / area - 8 * (torch.arange(h // 8)[:, None] + 0.5)
        side = area.sqrt()
        low, high = metrics.FACE_SIDES
        near = (x.abs() < 5) & (y.abs() < 5) & (low < side) & (side < high)
        return torch.stack([torch.where(near, 5.0, -5.0), x / 32, y / 32, (side / 32).log()], 1)


def test_nothing_is_found_where_the_finders_network_knows_nothing():
    assert len(SquareFinder().find(np.zeros((3, 360, 640), np.uint8))) == 0


@pytest.mark.parametrize("side", (54, 110, 216))
@pytest.mark.parametrize("left, top", ((12, 12), (412, 132), (211, 60)))
def test_what_the_finders_network_knows_is_found_at_any_size_and_place(side, left, top):
    picture = np.zeros((3, 360, 640), np.uint8)
    finder = SquareFinder()
    picture[:, top : top + side, left : left + side] = 255
    right = np.array([left, top, left + side, top + side])
    [box] = finder.find(picture).numpy()
    assert data.box_overlap(box, right) > 0.85
    [box] = finder.find(picture, right + 3).numpy()  # as face tracks are cut
    assert np.array_equal(box, right + 3)


def test_faces_are_pasted_where_the_boxes_say():
    white = torch.ones(400, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    pictures, box, is_face = metrics.paste_faces(white, torch.zeros_like(white), generator)
    assert 0.4 < is_face.float().mean() < 0.6
    assert pictures.shape == (400, 3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    low, high = metrics.FACE_SIDES
    assert ((box[is_face, 2] >= low) & (box[is_face, 2] <= high)).all()


def test_the_loss_of_the_finder_wants_its_boxes():
    """Outputs that state the box everywhere, and the face where it is, have next to no loss."""
    finder = metrics.FaceFinder()
    box = torch.tensor([[30.0, 20.0, 24.0], [0.0, 0.0, 1.0]])
    is_face = torch.tensor([True, False])
    outputs = torch.zeros(2, 4, 8, 8)
    centers = 8 * (torch.arange(8) + 0.5)
    outputs[0, 1] = (30 - centers) / 32
    outputs[0, 2] = (20 - centers[:, None]) / 32
    outputs[0, 3] = np.log(24 / 32)
    outputs[:, 0] = -9
    outputs[0, 0, 2, 3] = 9  # the place at (28, 20)
    right = metrics.finder_loss(outputs, box, is_face)
    assert right < 0.01
    finder.forward = lambda pictures: outputs
    boxes, scores = finder.boxes(torch.zeros(2, 3, 64, 64))
    np.testing.assert_allclose(boxes[0, scores[0].argmax()], [18, 8, 42, 32], atol=1e-4)
    for row, column in ((6, 6), (0, 3)):
        wrong = outputs.clone()
        wrong[0, 0, 2, 3] = -9
        wrong[0, 0, row, column] = 9
        assert metrics.finder_loss(wrong, box, is_face) > 1
    assert metrics.finder_loss(outputs + torch.eye(4)[1][:, None, None], box, is_face) > 0.9


def test_a_second_person_among_clips_is_named(people, judges):
    own = people["p0"]
    threshold = metrics.identity_threshold(judges, people)
    assert metrics.find_strangers(judges, own, threshold) == []
    # embeddings that the colour of the frames decides
    plain = copy.deepcopy(judges)
    plain.identity = lambda x: F.normalize(x.mean((-2, -1)) - 0.4, dim=-1)
    within = metrics.identity_threshold(plain, people)
    across = metrics.identity_distances(plain, [people["p0"][0], people["p1"][0]])[0, 1]
    assert 0 <= within < across
    clips = [*own, people["p1"][0]]
    assert metrics.find_strangers(plain, clips, within) == clips[3:]


def test_hardly_any_clips_of_one_person_are_strange():
    judges = PlainJudges()
    greys = np.full((7, 12, 3, 8, 8), 200, np.uint8)
    red = np.full((12, 3, 8, 8), [[[200]], [[60]], [[60]]], np.uint8)
    clips = [SimpleNamespace(frames=frames, num_frames=12) for frames in [*greys, red]]
    far = float(metrics.identity_distances(judges, clips[6:])[0, 1])
    threshold = metrics.identity_threshold(judges, {"a": clips})
    assert threshold == pytest.approx(far) and far > 0.5


def test_of_an_hour_a_few_hundred_faces_are_looked_at(monkeypatch):
    counts = []
    judges = metrics.Judges()
    monkeypatch.setattr(
        judges, "identity", lambda x: counts.append(len(x)) or torch.ones(len(x), 2)
    )
    for num_frames, least, most in ((100, 20, 20), (90_000, 450, 550)):
        frames = np.zeros((num_frames, 3, 2, 2), np.uint8)
        clip = data.Clip("me", "1", "", frames, np.zeros(0), np.zeros((0, 40)))
        counts.clear()
        metrics.mean_identity(judges, [clip])
        assert least <= sum(counts) <= most


# ---------------------------------------------------------------- scoring generated clips


class PlainJudges(metrics.Judges):
    """Judges whose answers are known: mean colour is identity, a dark mouth is open, speech is as
    loud as the mel.
    """

    def __init__(self):
        super().__init__()
        self.has_opening = True

    def identity(self, frames):
        return F.normalize(frames.mean((-2, -1)) - 0.5, dim=-1)

    def embed(self, frames):
        return frames.flatten(1) / frames[0].numel() ** 0.5

    def features(self, frames):
        return frames.mean((-2, -1))

    def opening(self, frames):
        return 1 - metrics.mouth_region(frames).mean((1, 2, 3))

    def mouth_video(self, frames):
        return self.opening(frames[0]).unfold(0, 5, 1)[None]

    def mouth_audio(self, mel):
        return mel[:, 2:-2, ::4].mean(-1)


@pytest.fixture(scope="module")
def splits(people):
    parts = ("train", "validation", "test")
    return {
        name: {part: [clip] for part, clip in zip(parts, clips)} for name, clips in people.items()
    }


@pytest.fixture(scope="module")
def cases(splits):
    return metrics.make_cases(splits, num_frames=40, clips_per_person=2)


@pytest.fixture(scope="module")
def evaluation(cases):
    """Truth, a late copy, a copy that is darker, a still frame, and the next person's clip, scored
    by PlainJudges.
    """
    found = metrics.Evaluation(cases, PlainJudges(), {"syncnet": BrightnessSyncNet()})
    for case, other in zip(cases, cases[1:] + cases[:1]):
        found.add("truth", case, case.frames)
        found.add("late", case, torch.roll(case.frames, 3, 0))
        found.add("darker", case, case.frames - 0.05)
        found.add("still", case, case.frames[:1].expand_as(case.frames))
        found.add("other person", case, other.frames)
    return found


def test_a_case_holds_what_generation_and_scoring_need(cases, splits):
    assert [case.person for case in cases] == list(splits)
    case, split = cases[0], splits["p0"]
    clip = split["test"][0]
    assert case.clip is clip and case.training_clips is split["train"]
    assert torch.equal(case.frames, torch.from_numpy(clip.frames[:40]) / 255)
    assert np.array_equal(case.audio, clip.audio[: 40 * 640])
    assert case.mel.shape == case.other_mel.shape == (40, 20, 40)
    assert torch.equal(case.mel, torch.as_tensor(data.audio_windows(clip.mel[:160])))
    assert len(case.speeches) == 3 and np.array_equal(case.speeches[0], clip.mel[:160])
    longest = split["train"][0].mel[:160]
    assert torch.equal(case.other_mel, torch.as_tensor(data.audio_windows(longest)))
    assert (case.reference == split["train"][0].frames).all((1, 2, 3)).any()
    np.testing.assert_allclose(case.opening, clip.opening[:40])
    # The picture that is to be animated is of none of the clips that are held out.
    held_out = {
        part: [replace(split[part][0], frames=split[part][0].frames // 2)]
        for part in ("validation", "test")
    }
    (case,) = metrics.make_cases({"p0": split | held_out}, 40, 1)
    assert (case.reference == split["train"][0].frames).all((1, 2, 3)).any()


def test_rows_hold_every_metric_with_values_or_a_reason(evaluation, cases):
    rows = evaluation.rows()
    for method, row in rows.items():
        assert list(row) == list(metrics.METRICS), method
        for metric, cell in row.items():
            if cell["mean"] is None:
                assert cell["reason"].startswith("needs "), metric
            elif not metric.startswith(("kid", "fid")):
                assert list(cell["values"]) == [f"{case.person}/c2" for case in cases]
                assert cell["mean"] == pytest.approx(np.mean(list(cell["values"].values())))
                assert cell["n"] == cell["groups"] == 6
    reason = "needs 2048 in all and pt_inception-2015-12-05-6726825d.pth"
    assert rows["truth"]["fid"]["reason"] == reason
    assert rows["truth"]["fid*"]["reason"].startswith("needs 960 in all")  # here are 240
    assert rows["truth"]["lpips"]["mean"] is None


def test_scores_are_those_of_the_functions(evaluation, cases):
    rows = evaluation.rows()["darker"]
    case = cases[2]
    frames = case.frames - 0.05
    key = "p2/c2"
    mouths = metrics.mouth_region(frames), metrics.mouth_region(case.frames)
    expected = {
        "psnr": metrics.psnr(frames, case.frames).mean(),
        "mouth_psnr": metrics.psnr(*mouths).mean(),
        "ssim": metrics.ssim(frames, case.frames).mean(),
        "temporal_jitter": metrics.temporal_jitter(case.frames),
        "jitter_ratio": 1,
        "lpips*": 0.05**2,
        "tlp*": 0,
        "mouth_correlation*": metrics.mouth_correlation(
            PlainJudges().opening(frames), case.opening
        ),
        "mouth_std_ratio*": 1,
    }
    for metric, value in expected.items():
        assert rows[metric]["values"][key] == pytest.approx(float(value), abs=1e-5), metric


def test_starred_metrics_know_the_right_clip(evaluation):
    rows = evaluation.rows()
    expected = {
        "truth": {"right_person*": 1, "right_speech*": 1, "sync*": 1, "offset_found*": 1},
        "late": {"right_person*": 1, "offset_found*": 0},
        "still": {"sync*": 0, "right_speech*": 0.5, "mouth_correlation*": 0, "mouth_std_ratio*": 0},
        "other person": {"right_person*": 0},
    }
    for method, values in expected.items():
        for metric, value in values.items():
            found = rows[method][metric]["mean"]
            assert found == pytest.approx(value, abs=0.08), (method, metric)
    assert rows["truth"]["id_similarity*"]["mean"] == pytest.approx(1, abs=1e-5)
    assert rows["truth"]["lse_d*"]["mean"] < rows["late"]["lse_d*"]["mean"] < 1
    assert rows["truth"]["lse_c*"]["mean"] > 0.5
    assert rows["other person"]["right_speech*"]["mean"] < 0.7
    assert rows["truth"]["kid*"]["mean"] < rows["darker"]["kid*"]["mean"]
    assert rows["truth"]["kid*"]["n"] == 240


def test_a_metric_without_a_row_in_the_table_is_not_dropped(cases, monkeypatch):
    monkeypatch.delitem(metrics.METRICS, "mouth_psnr")
    evaluation = metrics.Evaluation(cases)
    with pytest.raises(KeyError, match="METRICS_TABLE has no row for mouth_psnr"):
        evaluation.add("new", cases[0], cases[0].frames)
    assert not evaluation.people


@pytest.mark.parametrize("shift, found", [(1, 1), (2, 0)])
def test_sound_is_in_sync_within_one_frame(cases, shift, found):
    evaluation = metrics.Evaluation(cases, PlainJudges())
    evaluation.add("late", cases[0], torch.roll(cases[0].frames, shift, 0))
    assert evaluation.rows()["late"]["offset_found*"]["mean"] == found


def test_people_are_known_by_their_training_clips(evaluation, splits):
    frames = torch.from_numpy(splits["p3"]["train"][0].frames[::5]) / 255
    expected = F.normalize(PlainJudges().identity(frames).mean(0), dim=0)
    assert evaluation.gallery["p3"].allclose(expected, atol=1e-6)
    assert list(evaluation.gallery) == list(splits)


def test_judges_are_scored_by_clips_that_they_have_not_seen_of_a_person(people):
    """Where each person's second clip shows the other person, nobody is recognised."""
    first, second = (people[name][:1] for name in ("p0", "p1"))
    exchanged = {"a": [*first, *second], "b": [*second, *first]}
    scores = metrics.score_judges(PlainJudges(), exchanged)
    assert scores["right_person*"] == scores["verification_auc"] == 0


def test_memory_does_not_grow_with_the_clip():
    def resident_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    clip = torch.zeros(60, 3, 512, 512)
    before = resident_pages()
    metrics.psnr(clip, clip)
    metrics.temporal_jitter(clip)
    assert (resident_pages() - before) * 4096 < 60e6  # a copy of the clip would take 189 MB


def test_the_lse_of_syncnet_is_that_of_the_function(evaluation, cases):
    rows = evaluation.rows()["truth"]
    expected = metrics.lse(BrightnessSyncNet(), cases[1].frames, cases[1].audio)
    assert rows["lse_d"]["values"]["p1/c2"] == pytest.approx(expected["lse_d"])
    assert rows["lse_c"]["values"]["p1/c2"] == pytest.approx(expected["lse_c"])
    assert rows["offset_found"]["values"]["p1/c2"] == (abs(expected["offset"]) <= 1)


def test_paired_differences_are_taken_clip_by_clip_and_over_people(people):
    cases = metrics.make_cases(
        {name: {"train": clips[:1], "test": clips[1:]} for name, clips in people.items()}, 40, 2
    )
    evaluation = metrics.Evaluation(cases)
    for case in cases:
        evaluation.add("a", case, (case.frames + 0.1).clamp(0, 1))
        if case.person != "p5":
            evaluation.add("b", case, case.frames - 0.07)
    a, b = (metrics.select(evaluation.scores, method, "psnr") for method in "ab")
    assert len(a) == 12 and len(b) == 10
    found = evaluation.paired("a", "b")["psnr"]
    expected = metrics.mean_ci([a[key] - b[key] for key in b], [key[:2] for key in b])
    assert {name: found[name] for name in expected} == expected
    assert found["values"].keys() == b.keys() and found["groups"] == 5
    assert "lpips" not in evaluation.paired("a", "b")


def test_clips_too_short_for_sync_have_no_sync_scores(splits):
    cases = metrics.make_cases(splits, num_frames=34, clips_per_person=1)
    evaluation = metrics.Evaluation(cases, PlainJudges(), {"syncnet": BrightnessSyncNet()})
    evaluation.add("truth", cases[0], cases[0].frames)
    row = evaluation.rows()["truth"]
    for metric in (
        "lse_c",
        "lse_d",
        "offset_found",
        "lse_c*",
        "offset_found*",
        "sync*",
        "right_speech*",
    ):
        assert row[metric]["reason"].startswith("needs 35 frames"), metric
    assert row["mouth_correlation*"]["mean"] is not None


def test_fid_is_given_from_enough_frames_only(people):
    clip = people["p0"][0]
    frames = noise(480, 3, 11, 11)
    evaluation = metrics.Evaluation([], PlainJudges())
    case = metrics.Case(clip, frames, clip.audio[:0], [])
    evaluation.add("a", case, frames.flip(0))
    row = evaluation.rows()["a"]
    assert "960 in all" in row["fid*"]["reason"]
    assert row["kid*"]["n"] == 480 and row["kid*"]["std"] > 0
    other = metrics.Case(people["p1"][0], frames, clip.audio[:0], [])
    evaluation.add("a", other, frames.flip(0))
    row = evaluation.rows()["a"]
    assert row["fid*"]["n"] == row["kid*"]["n"] == 960
    assert row["fid*"]["mean"] == pytest.approx(0, abs=1e-9)


def test_frames_that_do_not_fit_a_case_are_refused_and_leave_no_trace(cases):
    evaluation = metrics.Evaluation(cases, PlainJudges())
    for frames in (cases[0].frames[:39], cases[0].frames * 255, cases[0].frames * float("nan")):
        with pytest.raises(ValueError, match="frames"):
            evaluation.add("a", cases[0], frames)
    assert evaluation.rows() == {}


def test_the_table_leaves_out_what_nobody_has_and_what_is_the_same_for_all():
    def cell(mean, ci95=None):
        return {"mean": mean, "ci95": ci95}

    rows = {
        "a": {"psnr": cell(20.123, [19.5, 20.75]), "right_person*": cell(1.0), "fid": cell(None)},
        "b": {
            "psnr": cell(21.0),
            "right_person*": cell(1.0),
            "fid": cell(None),
            "kid": cell(0.00123),
        },
    }
    table = metrics.markdown_table(rows, ("psnr", "right_person*", "fid", "kid"))
    assert table.splitlines() == [
        "| method | psnr | kid |",
        "|---|---|---|",
        "| a | 20.12 [19.5, 20.75] | – |",
        "| b | 21 | 0.00123 |",
    ]
    assert "right_person*" in metrics.markdown_table({"a": rows["a"]}, ("right_person*",))


# ---------------------------------------------------------------- command line


def save_picture(path, mode="RGB", size=(20, 24), seed=0):
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)


def moving_frames(num_frames=40, size=64):
    """A dark mouth that moves smoothly over a plain face, uint8 [f 3 h w]."""
    frames = np.full((num_frames, 3, size, size), 180, np.uint8)
    for t in range(num_frames):
        top = int(8 + 16 * np.sin(0.35 * t) ** 2)
        frames[t, :, 40 : 40 + top, 20:44] = 40
    return frames


def hiss(num_frames):
    return np.int16(3000 * np.random.default_rng(0).normal(size=640 * num_frames))


def run(*arguments):
    """Return the exit status of the command line and its report."""
    out = Path(arguments[0]).parent / "out.json"
    try:
        metrics.main([*map(str, arguments), "--json", str(out)])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, json.loads(out.read_text()) if out.exists() else None


def test_pictures_in_table_out(tmp_path, capsys):
    real, fake = tmp_path / "real", tmp_path / "fake"
    for name, mode, size in (
        ("grey", "L", (20, 24)),
        ("odd", "RGB", (21, 13)),
        ("p/alpha", "RGBA", (20, 24)),
    ):
        save_picture(real / f"{name}.png", mode, size)
        save_picture(fake / f"{name}.PNG", mode, size)
    save_picture(real / "alone.png")
    save_picture(real / "small.png", size=(8, 8)), save_picture(fake / "small.png", size=(8, 8))
    (
        save_picture(real / "unequal.png", size=(20, 20)),
        save_picture(fake / "unequal.png", size=(20, 22)),
    )
    save_picture(real / "corrupt.png"), (fake / "corrupt.png").write_bytes(b"no picture")
    (real / "notes.txt").write_text("x"), (fake / "p" / "x.npy").write_text("x")
    (real / ".thumbnail.png").write_text("x")
    save_picture(real / ".cache" / "a.png")
    status, report = run(real, fake)
    out, err = capsys.readouterr()
    rows = report["rows"]
    assert status == 0 and list(rows) == list(metrics.METRICS)
    assert "thumbnail" not in err and "cache" not in err
    assert rows["psnr"]["values"] == {
        "grey/grey": 100,
        "odd/odd": 100,
        "p/alpha": 100,
        "small/small": 100,
    }
    assert rows["ssim"]["n"] == 3 and rows["psnr"]["groups"] == 4
    assert (
        "| psnr | 100 | [100, 100] | 4 |" in out
        and "| jitter_ratio | – |  | 0 | needs 2 frames" in out
    )
    for note in (
        "alone: no partner of that name",
        "small/small: not in ssim, which needs 1 frame of 11 x 11 pixels",
        "unequal: the two differ in size: choose one by --size",
        "corrupt: ",
    ):
        assert err.count(note) == 1, note
    status, report = run(real, fake, "--size", 16)
    assert status == 0 and "unequal/unequal" in report["rows"]["psnr"]["values"]
    assert report["rows"]["ssim"]["n"] == 5


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    save_picture(tmp_path / "real" / "a.png")
    save_picture(tmp_path / "fake" / "a.png")
    save_picture(tmp_path / "fake" / "a.jpg")
    status, report = run(tmp_path / "real", tmp_path / "fake")
    assert (status, report) == (2, None)
    assert "a.jpg, a.png" in capsys.readouterr().err


def test_pictures_are_read_as_the_training_reads_them(tmp_path):
    pixels = np.tile(np.linspace(0, 255, 48).astype(np.uint8)[:, None, None], (1, 32, 3))
    (tmp_path / "real").mkdir(), (tmp_path / "fake").mkdir()
    for name in ("turned", "deep"):
        Image.fromarray(pixels).save(tmp_path / "real" / f"{name}.png")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees when shown
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "fake" / "turned.png", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "fake" / "deep.png")
    _, report = run(tmp_path / "real", tmp_path / "fake")
    assert min(report["rows"]["psnr"]["values"].values()) > 45


def test_a_video_equals_its_copy_at_30_frames_per_second(tmp_path):
    (tmp_path / "real").mkdir(), (tmp_path / "fake").mkdir()
    data.write_video(tmp_path / "real" / "a.mp4", moving_frames(), hiss(40), crf=4)
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        tmp_path / "real" / "a.mp4",
        "-r",
        "30",
        "-crf",
        "4",
    ]
    subprocess.run([*command, tmp_path / "fake" / "a.mp4"], check=True)
    _, report = run(tmp_path / "real", tmp_path / "fake")
    frames = torch.from_numpy(moving_frames()) / 255
    one_frame_late = metrics.psnr(frames[1:], frames[:-1]).mean().item()
    assert report["rows"]["psnr"]["mean"] > one_frame_late + 6


def test_videos_with_judges_and_weights(tmp_path, people, judges, capsys):
    for i, name in enumerate(("anna/1", "anna/2", "bo/1")):
        clip = people[f"p{i}"][0]
        data.write_video(tmp_path / "real" / f"{name}.mp4", clip.frames[:40], hiss(40))
        data.write_video(
            tmp_path / "fake" / f"{name}.mp4", clip.frames[: 40 - 3 * i], hiss(40 - 3 * i)
        )
    states = {"table": judges.state_dict(), "loss": judges.state_dict()}
    torch.save({"judges": states}, tmp_path / "backbone.pt")
    (tmp_path / "weights").mkdir()
    network = fill(metrics.LPIPS())
    features = {f"features.{key}": value for key, value in network.features.state_dict().items()}
    torch.save(features, tmp_path / "weights" / "alexnet-owt-7be5be79.pth")
    lins = {key: value.abs() for key, value in network.lins.state_dict().items()}
    torch.save(lins, tmp_path / "weights" / "alex.pth")
    options = "--judges", tmp_path / "backbone.pt", "--weights", tmp_path / "weights"
    status, report = run(tmp_path / "real", tmp_path / "fake", *options, "--device", "cpu")
    out, err = capsys.readouterr()
    rows = report["rows"]
    assert status == 0
    for metric, row in rows.items():
        available = metrics.METRICS[metric]["network"] in ("–", "judges", "lpips")
        known = metric not in ("right_person*", "right_speech*", "fid*")
        assert (row["mean"] is not None) == (available and known), metric
    assert rows["psnr"]["n"] == 3 and rows["psnr"]["groups"] == 2
    assert list(rows["sync*"]["values"]) == ["anna/1", "anna/2"]  # bo/1 has 34 frames
    lacking = "lse_c*, lse_d*, offset_found*, sync*"
    assert f"bo/1: not in {lacking}, which needs 35 frames with sound" in err
    assert "anna/2: 40 and 37 frames, of which the first 37 are compared" in err
    assert report["sources"]["*"]["scores"] == judges.scores
    assert len(report["sources"]["*"]["weights"]["backbone.pt"]) == 64
    assert report["sources"]["lpips"]["weights"].keys() == {"alexnet-owt-7be5be79.pth", "alex.pth"}
    assert f"alex.pth: SHA-256 {report['sources']['lpips']['weights']['alex.pth']}" in out
    assert len(report["notes"]) == err.count("note: ")


def test_a_note_says_that_faces_are_not_aligned_and_single_files_are_compared(tmp_path):
    data.write_video(tmp_path / "a.mp4", moving_frames(), hiss(40))
    data.write_video(tmp_path / "b.mp4", moving_frames(), hiss(40))
    files = tmp_path / "a.mp4", tmp_path / "b.mp4"
    rows, notes = metrics.compare(*files, {"syncnet": BrightnessSyncNet()})
    assert rows["lse_c"]["n"] == 1 and rows["psnr"]["mean"] == 100
    assert any("neither cropped nor aligned" in note for note in notes)
    _, notes = metrics.compare(*files, {})
    assert not notes


def test_linked_folders_and_accents_written_in_two_ways_are_compared(tmp_path):
    save_picture(tmp_path / "store" / "1.png")
    for side, name in (("real", "Zo\u00e9"), ("fake", "Zoe\u0301")):
        save_picture(tmp_path / side / name / "1.png")
        (tmp_path / side / "anna").symlink_to(tmp_path / "store")
        files, left_out = metrics.list_files(tmp_path / side)
        assert set(files) == {"Zo\u00e9/1", "anna/1"} and not left_out


def test_of_a_moving_picture_the_first_is_compared_and_that_is_noted(tmp_path):
    first, *others = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (9, 99, 199)]
    for name in ("a.webp", "b.webp"):
        first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    _, notes = metrics.compare(tmp_path / "a.webp", tmp_path / "b.webp", {})
    assert any("a.webp: only the first of its 3 pictures is used" in note for note in notes)


def test_a_video_that_ends_early_is_compared_as_far_as_it_goes(tmp_path):
    clip = noise(60, 3, 64, 64).numpy() * 255
    data.write_video(tmp_path / "a.mp4", clip.astype(np.uint8), hiss(60))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    rows, notes = metrics.compare(tmp_path / "a.mp4", tmp_path / "b.mp4", {})
    assert rows["psnr"]["n"] == 1
    assert any("b.mp4" in note for note in notes)
    assert any("60 and " in note for note in notes)


def test_too_little_memory_costs_a_video_and_other_faults_are_ours(tmp_path, monkeypatch):
    data.write_video(tmp_path / "a.mp4", moving_frames())

    def fail(x, y):
        raise RuntimeError(message)

    monkeypatch.setattr(metrics, "psnr", fail)
    for message in ("CUDA out of memory. Tried to ...", "can't allocate memory: you tried to ..."):
        with pytest.raises(ValueError, match="choose a smaller --size"):
            metrics.compare(tmp_path / "a.mp4", tmp_path / "a.mp4", {})
    for message in ("mat1 and mat2 shapes cannot be multiplied", "can't start new thread"):
        with pytest.raises(RuntimeError, match=message):
            metrics.compare(tmp_path / "a.mp4", tmp_path / "a.mp4", {})


def test_a_video_without_sound_is_scored_without_it(tmp_path):
    data.write_video(tmp_path / "a.mp4", moving_frames())
    rows, _ = metrics.compare(tmp_path / "a.mp4", tmp_path / "a.mp4", {}, PlainJudges())
    assert rows["psnr"]["mean"] == 100
    assert rows["mouth_correlation*"]["mean"] == pytest.approx(1)
    assert rows["sync*"]["mean"] is None


def test_generated_videos_are_judged_with_their_own_sound(tmp_path):
    mute, loud = tmp_path / "mute.mp4", tmp_path / "loud.mp4"
    data.write_video(mute, moving_frames())
    data.write_video(loud, moving_frames(), hiss(40))
    for real, fake in ((mute, loud), (loud, mute)):
        rows, _ = metrics.compare(real, fake, {}, PlainJudges())
        assert (rows["sync*"]["mean"] is not None) == (fake == loud)


def test_the_list_of_metrics_is_a_markdown_table(capsys):
    metrics.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| metric | network | file | crop | resize | fps | least |"
    assert len(lines) == len(metrics.METRICS) + 2
    assert all(line.count("|") == 8 for line in lines)


@pytest.mark.parametrize("name", ["real", "fake", "--weights", "--judges", "--json", "--device"])
def test_an_empty_argument_is_named(name, tmp_path, capsys):
    save_picture(tmp_path / "a.png")
    folders = {"real": str(tmp_path), "fake": str(tmp_path)}
    arguments = [*folders.values(), name, ""]
    if name in folders:
        arguments = (folders | {name: ""}).values()
    with pytest.raises(SystemExit) as stop:
        metrics.main([*arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {name} is empty\n"


@pytest.mark.parametrize("arguments", [["a", "b"], ["--judges", "a.pt"], ["--json", "a.json"]])
def test_the_list_of_metrics_takes_no_arguments_that_it_would_ignore(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        metrics.main(["--list", *arguments])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == "error: --list compares nothing: only --weights goes with it\n"
    )


def test_user_errors_are_one_line_and_status_2(tmp_path, capsys):
    for name in ("empty", "weights", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "weights" / "syncnet_v2.model").write_text("no")
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    save_picture(tmp_path / "full" / "a.png")
    torch.save({"judges": {"table": metrics.SyncNet().state_dict()}}, tmp_path / "others.pt")
    torch.save({"judges": {"table": metrics.Judges().state_dict()}}, tmp_path / "random.pt")
    for arguments, reason in (
        ("empty full", "no pictures or videos in"),
        ("full absent", "no such file or folder"),
        ("full full --device meta", "torch cannot use it"),
        ("full", "two folders are needed"),
        ("broken broken", "nothing could be scored"),
        ("full full --weights absent", "no such folder of weights"),
        ("full full --weights weights", "not a file of weights"),
        ("full full --judges absent", "not a file of weights"),
        ("full full --judges others.pt", "no judges of this version"),
        ("full full --judges random.pt", "never trained"),
        ("full full --size 3", "--size must lie in 11 ... 4096"),
        ("full full --device tpu", "torch cannot use it"),
        ("full full --device hpu", "torch cannot use it"),  # ModuleNotFoundError
    ):
        words = arguments.split()
        plain = ("--size", "3", "--device", "tpu", "hpu", "meta")
        words = [w if w in plain or w.startswith("--") else str(tmp_path / w) for w in words]
        with pytest.raises(SystemExit) as stop:
            metrics.main(words)
        assert stop.value.code == 2, arguments
        error = capsys.readouterr().err.strip()
        assert reason in error and len(error.splitlines()) == 1, (arguments, error)
