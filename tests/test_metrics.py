"""metrics.py against closed forms, definitions and, where they are installed, the public packages."""
import copy
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import metrics  # noqa: E402

torch.set_num_threads(1)


def frames(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(network, seed=0):
    """Weights that keep activations at a natural size, so that a wrong layer shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator))
            if value.ndim > 1:
                value.mul_((2 / value[0].numel()) ** 0.5)
            elif "running_var" in name or "weight" in name:
                value.mul_(0.1).add_(1)
            else:
                value.mul_(0.1)
    return network.eval()


# ---------------------------------------------------------------- pictures and clips


def test_psnr_is_its_definition():
    x = torch.full((2, 3, 8, 8), 0.5)
    np.testing.assert_allclose(metrics.psnr(x, x + 0.1), [20, 20], atol=1e-5)
    assert metrics.psnr(x, x).tolist() == [100, 100]


def test_ssim_is_its_definition():
    x, y = frames(1, 1, 11, 11).double(), frames(1, 1, 11, 11, seed=1).double()
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    w = torch.from_numpy(np.outer(g, g) / g.sum() ** 2)                  # an 11 x 11 frame has a single valid window
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4))
    assert abs(metrics.ssim(x, y).item() - expected.item()) < 1e-12
    assert metrics.ssim(frames(2, 5, 3, 16, 17), frames(2, 5, 3, 16, 17)).allclose(torch.ones(2, 5).double())


def test_ssim_against_scikit_image():
    peer = pytest.importorskip("skimage.metrics").structural_similarity
    x, y = frames(3, 40, 37), (frames(3, 40, 37) + 0.2 * frames(3, 40, 37, seed=1)).clamp(0, 1)
    expected = peer(x.double().numpy(), y.double().numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
                    use_sample_covariance=False, data_range=1)
    assert abs(metrics.ssim(x, y).item() - expected) < 1e-6


def test_psnr_and_ssim_against_piq():
    peer = pytest.importorskip("piq")
    x, y = frames(2, 3, 40, 37).double(), frames(2, 3, 40, 37, seed=1).double()
    assert metrics.psnr(x, y).allclose(peer.psnr(x, y, data_range=1.0, reduction="none"), atol=1e-5)
    assert (metrics.ssim(x, y) - peer.ssim(x, y, downsample=False, reduction="none")).abs().max() < 1e-6


def test_jitter_flicker_and_correlation():
    ramp = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 4) / 10
    assert metrics.temporal_jitter(ramp).tolist() == pytest.approx([0.1, 0.1])
    assert metrics.jitter_ratio(ramp * 2, ramp).tolist() == pytest.approx([2, 2])
    change = lambda x, y: (x - y).abs().mean((1, 2, 3))
    assert metrics.tlp(change, ramp[0] * 3, ramp[0]).item() == pytest.approx(0.2)
    t = torch.linspace(0, 6, 50)
    assert metrics.mouth_correlation(3 * t.sin() + 1, t.sin()).item() == pytest.approx(1)
    assert metrics.mouth_correlation(torch.ones(50), t.sin()).item() == 0
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert metrics.mouth_correlation(a, b).item() == pytest.approx(np.corrcoef(a, b)[0, 1])
    still = torch.zeros(1, 4, 3, 64, 64)
    moved = still.clone()
    moved[:, 2, :, 50, 32] = 1
    assert metrics.mouth_motion(still).sum() == 0
    assert (metrics.mouth_motion(moved)[0] > 0).tolist() == [False, True, True]


def test_mean_ci_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = metrics.mean_ci(rng.normal(3, 2, 40), seed, num_resamples=500)["ci95"]
        hits += low <= 3 <= high
    assert 0.89 <= hits / 300 <= 0.98
    assert metrics.mean_ci([2.0]) == {"mean": 2.0, "ci95": None, "n": 1}


@pytest.mark.parametrize("x, y, says", [
    (frames(2, 3, 16, 16), frames(2, 3, 16, 17), "differ in shape"),
    (frames(2, 3, 16, 16), frames(2, 3, 16, 16) * float("nan"), "NaN"),
    (frames(2, 3, 9, 16), frames(2, 3, 9, 16), "at least 11")])
def test_frames_that_cannot_be_compared(x, y, says):
    with pytest.raises(ValueError, match=says):
        metrics.ssim(x, y)
    for one_frame in (metrics.temporal_jitter, lambda z: metrics.tlp(None, z, z)):
        with pytest.raises(ValueError, match="two frames"):
            one_frame(torch.zeros(1, 3, 16, 16))


# ---------------------------------------------------------------- distributions


def rows_with(mean, covariance, n, seed):
    """n rows whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    a, b = np.diag([1.0, 4, 9]), np.diag([4.0, 1, 16])
    real, fake = rows_with(np.zeros(3), a, 50, 0), rows_with(np.array([1.0, 2, 0]), b, 80, 1)
    assert metrics.frechet_distance(real, fake) == pytest.approx(5 + 1 + 1 + 1, abs=1e-6)


def test_frechet_distance_of_few_rows_equals_the_matrix_square_root():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    for n, m in ((12, 9), (12, 200), (200, 300)):
        x, y = rng.normal(size=(n, 30)), rng.normal(size=(m, 30)) * 1.5 + 0.3
        s, t = np.cov(x.T), np.cov(y.T)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
        assert len(caught) == (min(n, m) < 30)                           # fewer rows than dimensions: said loudly


def test_streamed_statistics_equal_those_of_all_rows():
    x = np.random.default_rng(0).normal(size=(500, 6)) + 1e4
    stream = metrics.FeatureStatistics(capacity=50)
    for part in np.array_split(x, 13):
        stream.update(part)
    np.testing.assert_allclose(stream.covariance(), np.cov(x.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stream.mean, x.mean(0), rtol=1e-12)
    kept = {tuple(row) for row in stream.sample.tolist()}
    assert len(kept) == 50 and kept <= {tuple(row) for row in x.tolist()}
    order = {tuple(row): i for i, row in enumerate(x.tolist())}
    assert 180 < np.mean([order[row] for row in kept]) < 320             # a uniform sample, not the first or last rows


def test_kernel_distance_is_the_unbiased_mmd():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)), rng.normal(size=(20, 5)) + 0.5
    k = lambda a, b: (a @ b / 5 + 1) ** 3
    expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(20) for j in range(20) if i != j) / 380
                - 2 * sum(k(a, b) for a in x for b in y) / 400)
    mean, deviation = metrics.kernel_distance(x, y, subset_size=20)
    assert mean == pytest.approx(expected, abs=1e-9) and deviation < 1e-12
    with pytest.warns(UserWarning, match="KID from 20 frames only"):
        assert metrics.kernel_distance(x, y)[1] > 0
    with pytest.raises(ValueError, match="at least two"):
        metrics.frechet_distance(x[:1], y)


def test_kernel_distance_against_torch_fidelity():
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 16)), rng.normal(size=(60, 16)) + 0.3
    expected = peer.kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                               kid_kernel_poly_coef0=1)
    assert metrics.kernel_distance(x, y, subset_size=60)[0] == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("peer", ["cleanfid", "piq"])
def test_distances_against_clean_fid_and_piq(peer):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 16)), rng.normal(size=(60, 16)) * 1.2 + 0.3
    if peer == "cleanfid":
        peer = pytest.importorskip("cleanfid.fid")
        fid = peer.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        kid = peer.kernel_distance(x, y, num_subsets=1, max_subset_size=60)
    else:
        peer, (a, b) = pytest.importorskip("piq"), map(torch.from_numpy, (x, y))
        fid, kid = peer.FID().compute_metric(a, b), peer.KID(subset_size=60).compute_metric(a, b)
    assert metrics.frechet_distance(x, y) == pytest.approx(float(fid), abs=1e-3)
    assert metrics.kernel_distance(x, y, subset_size=60)[0] == pytest.approx(float(kid), abs=1e-9)


# ---------------------------------------------------------------- the standard networks


def test_inception_against_pytorch_fid(monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    ours = randomise(metrics.InceptionFID())
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: ours.state_dict())
    theirs, x = peer.InceptionV3().eval(), frames(1, 3, 64, 80)
    with torch.no_grad():
        expected, got = theirs(x)[0].flatten(1), ours(x)
    assert got.shape == (1, 2048) and (got - expected).norm() / expected.norm() < 1e-4


def test_inception_pools_leave_the_padding_out():
    block = randomise(metrics._BlockA(8, pool_features=4))
    x = torch.ones(1, 8, 5, 5)
    pooled = block(x)[:, -4:]
    assert pooled.allclose(pooled[..., 2:3, 2:3].expand_as(pooled), atol=1e-6)     # constant at the rim too


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_against_lpips(net, tmp_path):
    peer = pytest.importorskip("lpips")
    theirs = peer.LPIPS(net=net, pnet_rand=True, verbose=False).eval()              # carries the true linear layers
    backbone = {"features." + key.split(".", 1)[1]: value for key, value in theirs.net.state_dict().items()}
    torch.save(backbone | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    ours = metrics.LPIPS(net)
    metrics.load_weights(ours.features, tmp_path / "backbone.pth", "features.")
    metrics.load_weights(ours.lins, Path(peer.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    x, y = frames(2, 3, 64, 70), frames(2, 3, 64, 70, seed=1)
    with torch.no_grad():
        assert (ours(x, y) - theirs(2 * x - 1, 2 * y - 1).flatten()).abs().max() < 1e-5


def test_lpips_by_hand():
    ours = randomise(metrics.LPIPS("alex"))
    for lin in ours.lins.values():
        lin["model"][1].weight.data.abs_()                               # as in the true files
    x, y = frames(1, 3, 64, 64), frames(1, 3, 64, 64, seed=1)
    shift, scale = torch.tensor([-.030, -.088, -.188]).view(3, 1, 1), torch.tensor([.458, .448, .450]).view(3, 1, 1)
    with torch.no_grad():
        total = 0
        for i, tap in enumerate((2, 5, 8, 10, 12)):
            a, b = (ours.features[:tap]((2 * v - 1 - shift) / scale) for v in (x, y))
            difference = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2
            total += (ours.lins[f"lin{i}"]["model"][1].weight * difference).sum(1).mean()
        assert ours(x, y).item() == pytest.approx(total.item(), rel=1e-4)
        assert ours(x, x).item() == 0


def test_mfcc_against_python_speech_features():
    peer = pytest.importorskip("python_speech_features")
    for n in (100, 400, 401, 16000):
        audio = (np.random.default_rng(n).normal(size=n) * 3000).astype(np.int16)
        assert np.abs(peer.mfcc(audio, 16000) - metrics.mfcc(audio)).max() < 1e-4


def test_mfcc_energy_and_rate():
    audio = np.zeros(16000)
    audio[8000] = 1000                                                   # after pre-emphasis: 1000, then -970
    cepstra = metrics.mfcc(audio)
    assert cepstra.shape == (99, 13) and cepstra[:, 0].argmax() in (48, 49, 50)
    # half the spectrum's energy: Parseval, with the ends counted once
    spectrum = np.abs(np.fft.rfft([1000, -970], 512)) ** 2 / 512
    assert cepstra[49, 0] == pytest.approx(np.log(spectrum.sum()))


def test_syncnet_windows_and_arcface_names():
    syncnet, clip = randomise(metrics.SyncNet()), frames(7, 3, 224, 224)
    cepstra = torch.randn(28, 13, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lips, sound = syncnet(clip, cepstra)
        bgr = (clip[1:6, [2, 1, 0]] * 255).transpose(0, 1)[None]                       # window 1 alone
        alone = syncnet.netfclip(syncnet.netcnnlip(bgr).flatten(1))
        np.testing.assert_allclose(alone[0], lips[1], rtol=1e-3, atol=1e-2)
        alone = syncnet.netfcaud(syncnet.netcnnaud(cepstra[4:24].T[None, None]).flatten(1))
        np.testing.assert_allclose(alone[0], sound[1], rtol=1e-4, atol=1e-4)
    assert lips.shape == sound.shape == (3, 1024)
    for depth, published in ((50, 43.59e6), (100, 65.16e6)):
        with torch.device("meta"):
            assert sum(p.numel() for p in metrics.ArcFace(depth).parameters()) == pytest.approx(published, abs=1e4)
    keys = metrics.ArcFace(50).state_dict()
    assert keys["layer3.13.conv2.weight"].shape == (256, 256, 3, 3) and keys["fc.weight"].shape == (512, 25088)
    assert "layer2.0.downsample.1.running_mean" in keys and "layer2.1.downsample.1.running_mean" not in keys


def test_sync_offset_finds_a_shift_and_follows_syncnet():
    video = F.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for shift in (-7, 0, 4):
        audio = torch.roll(video, shift, 0)                              # the sound comes `shift` frames late
        for scores in (metrics.sync_offset, metrics.sync_scores):
            assert scores(video, audio)["offset"] == -shift
    padded = F.pad(audio, (0, 0, 15, 15))
    mean = torch.stack([F.pairwise_distance(video, padded[k:k + 60]) for k in range(31)], 1).mean(0)
    scores = metrics.sync_offset(video, audio)
    assert scores["lse_d"] == pytest.approx(mean.min().item(), abs=1e-6)
    assert scores["lse_c"] == pytest.approx((mean.median() - mean.min()).item(), abs=1e-6)


def test_ridge_is_as_strong_as_what_it_explains_beyond_chance():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(60, 50, 12, generator=generator).double(), torch.randn(60, 50, 3, generator=generator).double()
    noise[..., 1:] = noise[..., 1:].cumsum(1) / 5                                          # slow: chance explains more of it
    truth = torch.zeros(12, 3, dtype=torch.float64)
    truth[2, 0], truth[5, 1] = 0.5, 0.5
    found = metrics.shrunk_ridge(list(x), list(x @ truth + noise))
    assert torch.allclose(found[:, :2], truth[:, :2], atol=0.08) and found[:, 2].abs().max() < 0.02
    # every clip by itself: nothing tells what repeats from what does not
    alone = metrics.shrunk_ridge(list(torch.eye(400, dtype=torch.float64)[:, None]), list(noise.view(-1, 1, 1)[:400]))
    assert not alone.any()


def test_a_still_mouth_has_no_sync():
    generator = torch.Generator().manual_seed(0)
    still = metrics.sync_scores(torch.ones(40, 4), torch.randn(40, 4, generator=generator))
    assert abs(still["sync"]) < 1e-3


def test_wrong_weight_files_are_refused(tmp_path):
    network = metrics.SyncNet()
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "good")
    assert len(metrics.load_weights(network, tmp_path / "good")) == 64
    torch.save(state | {"netcnnaud.4.weight": torch.zeros(3)}, tmp_path / "bad")
    (tmp_path / "text").write_text("no weights")
    for name, says in (("bad", "netcnnaud.4.weight"), ("text", "not a file of"), ("none", "not a file of weights")):
        with pytest.raises(ValueError, match=says):
            metrics.load_weights(network, tmp_path / name)
    with pytest.raises(ValueError, match="first misfit conv1.weight"):
        metrics.load_weights(metrics.ArcFace(50), tmp_path / "good")


# ---------------------------------------------------------------- the small judges


def talkers(num_people=4, num_clips=2, num_frames=44):
    """People of plain colours whose dark mouth opens as loud as the mel is."""
    people = {}
    for p in range(num_people):
        rng = np.random.default_rng(p)
        for c in range(num_clips):
            opening = np.convolve(rng.normal(size=num_frames + 4), np.ones(5) / 2, "valid").clip(0, 1).astype("float32")
            clip = np.tile(rng.integers(60, 255, (1, 3, 1, 1), dtype=np.uint8), (num_frames, 1, 64, 64))
            for t, o in enumerate(opening):
                clip[t, :, 44:46 + int(12 * o), 24:40] = 20
            mel = np.repeat(opening, 4)[:, None] * np.ones((1, 40), np.float32)
            people.setdefault(f"p{p}", []).append(SimpleNamespace(frames=clip, mel=mel, opening=opening))
    return people


@pytest.fixture(scope="module")
def judges():
    return metrics.train_judges(talkers(), steps=8, batch_size=4, num_frames=16)


def test_judges_shapes_norms_and_gradients(judges):
    for size in (64, 128):
        clip = frames(2, 7, 3, size, size).requires_grad_()
        seen = judges.mouth_video(clip)
        heard = judges.mouth_audio(torch.randn(2, 7, 20, 40))
        faces = judges.identity(clip[0])
        assert seen.shape == heard.shape == (2, 3, 64) and judges.features(clip[0]).shape[0] == 7
        for embedding in (seen, heard, faces):
            assert embedding.norm(dim=-1).allclose(torch.ones(()), atol=1e-5)
        distance = judges.perceptual(clip[0], clip[1])
        assert distance.shape == (7,) and (distance > 0).all() and judges.perceptual(clip[0], clip[0]).max() < 1e-6
        (seen.sum() + faces.sum() + distance.sum() + judges.opening(clip[0]).sum()).backward()
        assert clip.grad.isfinite().all() and clip.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in judges.parameters()) and not judges.training


def test_mouth_windows_see_their_five_frames_only(judges):
    clip = frames(1, 9, 3, 64, 64)
    changed = clip.clone()
    changed[:, 5] = 0
    moved = (judges.mouth_video(clip) - judges.mouth_video(changed)).abs().sum(-1)[0] > 1e-6
    assert moved.tolist() == [False, True, True, True, True]              # windows 1..4 hold frame 5
    mel = np.arange(24.0)[:, None] * np.ones(40)
    assert metrics._windows(mel)[1, :, 0].tolist() == list(range(4, 24))  # 20 mel frames around frame 3


def test_training_is_reproducible_and_leaves_the_global_generator_alone(judges):
    torch.manual_seed(5)
    again = metrics.train_judges(talkers(), steps=8, batch_size=4, num_frames=16)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())
    assert all(torch.equal(a, b) for a, b in zip(judges.parameters(), again.parameters()))
    fresh = metrics.Judges()
    fresh.load_state_dict(copy.deepcopy(judges.state_dict()))
    assert fresh.scores == judges.scores and fresh.has_opening
    assert judges.scores["people"] == 1 and judges.scores["clips"] == 2    # the held-out person


def test_judges_learn():
    losses = []
    metrics.train_judges(talkers(), 45, batch_size=4, num_frames=16, progress=lambda share, x: losses.append(x))
    first, last = ({k: np.mean([x[k] for x in part]) for k in losses[0]} for part in (losses[:5], losses[-5:]))
    assert last["opening"] < 0.5 * first["opening"] and last["view"] < first["view"]


def test_judges_refuse_too_little():
    with pytest.raises(ValueError, match="four people"):
        metrics.train_judges(talkers(2))
    with pytest.raises(ValueError, match="opening"):
        metrics.Judges().opening(frames(1, 3, 64, 64))


# ---------------------------------------------------------------- command line


DESIGNED = ("psnr", "ssim", "lpips", "fid", "kid", "id_similarity", "temporal_jitter", "jitter_ratio", "lse_c", "lse_d",
            "mouth_correlation*")


def save_picture(path, mode="RGB", size=(20, 24), seed=0):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path)


def save_video(path, num_frames=12, size=64, seed=0):
    rng = np.random.default_rng(seed)
    sound = (rng.normal(size=640 * num_frames) * 3000).astype(np.int16)
    data.write_video(path, rng.integers(0, 256, (num_frames, 3, size, size), dtype=np.uint8), sound)


def run(*arguments):
    """The exit code of the command line and the rows of its report."""
    out = Path(arguments[0]).parent / "out.json"
    code = metrics.main([*map(str, arguments), "--json", str(out)])
    return code, json.loads(out.read_text())


def test_pictures_in_table_out(tmp_path, capsys):
    real, fake = tmp_path / "real", tmp_path / "fake"
    for name, mode, size in (("grey", "L", (20, 24)), ("alpha", "RGBA", (20, 24)), ("odd", "RGB", (21, 13))):
        save_picture(real / f"{name}.png", mode, size)
        save_picture(fake / f"{name}.png", mode, size)
    save_picture(real / "alone.png")
    save_picture(real / "small.png", size=(8, 8)), save_picture(fake / "small.png", size=(8, 8))
    save_picture(real / "unequal.png", size=(20, 20)), save_picture(fake / "unequal.png", size=(20, 22))
    save_picture(real / "corrupt.png"), (fake / "corrupt.png").write_bytes(b"no picture")
    code, report = run(real, fake)
    rows, (out, err) = report["rows"], capsys.readouterr()
    assert code == 0 and rows["psnr"]["n"] == rows["psnr"]["frames"] == 4 and rows["ssim"]["n"] == 3
    assert "| psnr | 100.0000 |" in out and "| ssim | 1.0000 |" in out
    for name in DESIGNED:                                                # every metric has its row, scored or not
        assert f"| {name} |" in out and {"mean", "n", "frames"} <= rows[name].keys()
        assert rows[name]["mean"] is not None or rows[name]["reason"]
    assert "syncnet_v2.model in --weights" in rows["lse_c"]["reason"] and "two frames" in rows["jitter_ratio"]["reason"]
    assert rows["fid*"]["reason"] == "needs --judges FILE"
    for says in ("alone: it has no partner", "small: SSIM needs", "corrupt: cannot read", "unequal: the frames to"):
        assert err.count(says) >= 1


def test_videos_with_judges_and_weights(tmp_path, judges, capsys):
    for i, name in enumerate(("a", "b")):
        save_video(tmp_path / "real" / f"{name}.mp4", 12, seed=i)
        save_video(tmp_path / "fake" / f"{name}.mp4", 10, seed=i)
    save_video(tmp_path / "real" / "still.mp4", 1), save_video(tmp_path / "fake" / "still.mp4", 1)
    torch.save({"judges": judges.state_dict(), "losses": [0.1]}, tmp_path / "backbone.pt")
    (tmp_path / "weights").mkdir()
    torch.save(randomise(metrics.SyncNet()).state_dict(), tmp_path / "weights" / "syncnet_v2.model")
    code, report = run(tmp_path / "real", tmp_path / "fake", "--judges", tmp_path / "backbone.pt",
                       "--weights", tmp_path / "weights")
    rows, (out, err) = report["rows"], capsys.readouterr()
    assert code == 0 and (rows["psnr"]["n"], rows["psnr"]["frames"]) == (3, 21)
    assert (rows["lse_c"]["n"], rows["lse_c"]["frames"]) == (rows["sync*"]["n"], rows["sync*"]["frames"]) == (2, 20)
    for name in metrics.SELF_TRAINED:
        assert np.isfinite(rows[name]["mean"]), name
    assert "FID of 21 frames" in rows["fid*"]["warning"] and "KID from 21 frames only" in out
    assert "a: 12 and 10 frames" in err
    assert "still: motion needs at least two frames (not in temporal_jitter, jitter_ratio, " in err
    assert list(report["judges"]["lse_c"]["weights"]) == ["syncnet_v2.model"]
    assert len(report["judges"]["lse_c"]["weights"]["syncnet_v2.model"]) == 64
    assert report["judges"]["fid"]["network"] is None
    assert report["judges"]["id_similarity*"]["network"] == "self-trained on the public split"


def test_scores_of_a_clip_with_nan_pixels_and_no_sound(judges):
    clip = frames(8, 3, 64, 64)
    values, reasons = metrics.score_clip(clip, clip, np.zeros(0, np.int16), {}, judges)
    assert values["psnr"] == 100 and values["id_similarity*"] == pytest.approx(1) and values["tlp*"] == 0
    assert "sync*" not in values and reasons["lse_c*"] == "there is no sound"
    values, reasons = metrics.score_clip(clip * float("nan"), clip, np.zeros(6400, np.int16), {}, judges)
    assert not values and all("NaN" in reason for reason in reasons.values())


def test_log_mel_is_that_of_the_training_clips():
    audio = (np.random.default_rng(0).normal(size=640 * 9) * 3000).astype(np.int16)
    np.testing.assert_allclose(metrics.log_mel(audio), data.log_mel(audio), atol=1e-6)


def test_what_cannot_be_scored_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "weights").mkdir(), (tmp_path / "broken").mkdir()
    (tmp_path / "weights" / "syncnet_v2.model").write_text("no")
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    save_picture(tmp_path / "full" / "a.png")
    torch.save({"judges": metrics.SyncNet().state_dict()}, tmp_path / "others.pt")
    torch.save({"judges": metrics.Judges().state_dict()}, tmp_path / "random.pt")
    for arguments, says in (("empty full", "no pictures or videos"), ("full absent", "no such folder"),
                            ("broken broken", "nothing could be scored"),
                            ("full full --weights absent", "no such folder"),
                            ("full full --weights weights", "not a file of weights"),
                            ("full full --judges absent", "not a file of weights"),
                            ("full full --judges others.pt", "no judges of this version"),
                            ("full full --judges random.pt", "never trained")):
        assert metrics.main([a if a[0] == "-" else str(tmp_path / a) for a in arguments.split()]) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and len(error.splitlines()) == 1, arguments


def test_crossed_interval_is_students_where_only_people_or_only_seeds_differ():
    people, seeds = np.array([1.0, 2.0, 4.0, 9.0]), np.array([[0.0], [1.0], [5.0]])
    for values, along in ((np.tile(people, (3, 1)), people), (np.tile(seeds, (1, 4)), seeds.ravel()), (people[None], people)):
        found = metrics.crossed_ci(values)
        low, high = stats.t.interval(0.95, len(along) - 1, along.mean(), stats.sem(along))
        assert found["mean"] == pytest.approx(along.mean()) and found["ci95"] == pytest.approx([low, high])
    assert metrics.crossed_ci(np.full((3, 4), 2.0))["ci95"] == [2, 2] and metrics.crossed_ci([[1.0]])["ci95"] is None


@pytest.mark.parametrize("seed_std, person_std", [(0.0, 0.0), (0.0, 2.0), (1.0, 1.0), (2.0, 0.0)])
def test_crossed_interval_covers_the_truth(seed_std, person_std):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        values = rng.normal(0, seed_std, (3, 1)) + rng.normal(0, person_std, (1, 12)) + rng.normal(0, 1, (3, 12))
        low, high = metrics.crossed_ci(values)["ci95"]
        hits += low <= 0 <= high
    assert hits / 600 > 0.93


def test_auc_counts_ties_half():
    assert metrics.auc([3, 4], [1, 2]) == 1 and metrics.auc([1, 2], [3, 4]) == 0 and metrics.auc([1, 1], [1]) == 0.5
    assert metrics.auc([2, 0], [1]) == 0.5
