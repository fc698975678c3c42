"""The witness against landmarks whose mouth, eyes and head are known, and dlib itself if it is there."""

import numpy as np
import pytest

import witness


def face(opening, eyes=1.0, shift=0.0):
    """Landmarks [f 68 2] of a plain face whose mouth opens by `opening` [f]."""
    f = len(opening)
    points = np.random.default_rng(0).uniform(-0.02, 0.02, (f, 68, 2))
    points[:] = points[0]
    points[:, 27:36, 1] += np.linspace(0, 1, 9)  # nose
    points[:, 8, 1] += 2.5 + 0.5 * opening  # the chin falls
    for first, x in ((36, -1), (42, 0.4)):
        points[:, first : first + 6, 0] += x + np.array([0, 0.2, 0.4, 0.6, 0.4, 0.2])
        points[:, [first + 1, first + 2], 1] -= 0.15 * np.reshape(eyes, (-1, 1))
        points[:, [first + 4, first + 5], 1] += 0.15 * np.reshape(eyes, (-1, 1))
    points[:, 61:64, 1] += 1.6
    points[:, 65:68, 1] += 1.6 + opening[:, None]
    points[..., 0] += np.reshape(shift, (-1, 1))
    return points


def test_mouth_eyes_and_head_are_read_off_the_landmarks():
    t = np.arange(100)
    opening = 0.2 + 0.2 * np.sin(t / 5)
    blinking = np.where(t % 25 < 2, 0.1, 1.0)
    truth = witness.measure(face(opening, blinking, 0.1 * np.sin(t / 9)))
    fake = witness.measure(face(opening / 2, np.ones(100), 0.05 * np.sin(t / 9)))
    for seen in (truth, fake):
        seen["identity"] = np.zeros(128)
    fake["identity"] = np.full(128, 0.1)
    scores = witness.compare(truth, fake, opening < 0.1)
    assert scores["mouth_r"] > 0.999
    assert scores["mouth_std_ratio"] == pytest.approx(0.5, abs=0.02)
    assert 0.4 < scores["silence_ratio"] < 1
    assert scores["true_blinks"] == pytest.approx(3 * 60 / 4)  # the first began before the clip
    assert scores["blinks"] == 0
    assert scores["head_variance_ratio"] == pytest.approx(0.25, abs=0.02)
    assert scores["identity_distance"] == pytest.approx(0.1 * 128**0.5)


def test_silence_is_found_in_the_frame_of_its_sound():
    audio = np.zeros(640 * 10, np.int16)
    audio[640 * 4 : 640 * 6] = 3000
    silent = witness.find_silence(audio, 8)
    assert silent.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert not witness.find_silence(audio[:0], 3).any()


def test_without_a_face_nothing_is_compared():
    pytest.importorskip("dlib")
    pytest.importorskip("face_recognition_models")
    seen = witness.trace(np.full((3, 3, 120, 160), 90, np.uint8))
    assert seen["found"] == 0 and np.isnan(seen["mouth"]).all() and seen["mouth"].shape == (3,)
    with pytest.raises(ValueError, match="less than two frames"):
        witness.compare(seen, seen, np.ones(3, bool))
