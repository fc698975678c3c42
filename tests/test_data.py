"""Files of every kind, layouts, splits and batches, and the truth of synthetic talkers."""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.signal import correlate, correlation_lags
from PIL import Image, ImageCms

import data
import train
from data import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, TalkingHeads, get_ffmpeg_exe

REAL_FACES = Path(__file__).resolve().parents[2] / "shared" / "real_faces"


def ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def load(root, **options):
    """A dataset whose cache lies beside it."""
    options = {"size": 32, "cache": Path(root).parent / "cache"} | options
    return TalkingHeads(root, **options)


def reasons(dataset):
    return {Path(path).name: reason for path, reason in dataset.skipped}


def flash_and_click(num_frames=40, at=17, size=32):
    """A dark video, white in one frame, and silence with a click in the middle of that frame."""
    frames = np.zeros((num_frames, 3, size, size), np.uint8)
    frames[at] = 255
    audio = np.zeros(num_frames * SAMPLES_PER_FRAME, np.int16)
    audio[at * SAMPLES_PER_FRAME + 300 : at * SAMPLES_PER_FRAME + 340] = 20000
    return frames, audio


def tone(num_frames=16):
    return (8000 * np.sin(np.arange(num_frames * SAMPLES_PER_FRAME) / 5)).astype(np.int16)


def write_clip(path, num_frames=16, level=100, size=32):
    data.write_video(path, np.full((num_frames, 3, size, size), level, np.uint8), tone(num_frames))


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory):
    """A small grey video with a tone, to be copied."""
    path = tmp_path_factory.mktemp("one") / "clip.mp4"
    write_clip(path)
    return path


@pytest.fixture(scope="module")
def grey_clips(tmp_path_factory):
    """Four different clips, to be copied."""
    folder = tmp_path_factory.mktemp("grey")
    for level in (40, 80, 120, 160):
        write_clip(folder / f"{level}.mp4", level=level)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def mute_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("mute") / "clip.mp4"
    data.write_video(path, np.full((16, 3, 32, 32), 100, np.uint8))
    return path


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "people"
    people = {"num_public": 3, "num_clients": 2, "num_unseen": 1}
    data.make_synthetic(root, **people, clips_per_client=3, seed=3, accent=0.0)
    return load(root, size=64)


def copy(source, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)


# ---------------------------------------------------------------- spectrograms


@pytest.mark.parametrize("second", [0.0, 0.3999, 0.4, 0.7777, 1.1999])
def test_an_impulse_is_strongest_in_the_frame_of_its_second(second):
    audio = np.zeros(30 * SAMPLES_PER_FRAME, np.int16)
    sample = int(second * SAMPLE_RATE)
    audio[sample] = 30000
    mel = data.log_mel(audio)
    frame = int(FPS * second)
    assert mel.shape == (120, 40)
    assert mel.sum(1).argmax() == sample // 160 and mel.sum(1).argmax() // 4 == frame
    windows = data.audio_windows(mel)
    assert windows.shape == (30, 20, 40)
    np.testing.assert_array_equal(
        windows[frame, 8:12], mel[4 * frame : 4 * frame + 4]
    )  # its own, in the middle
    np.testing.assert_array_equal(data.audio_windows(mel, 1, 29), windows[1:29])


def test_windows_are_padded_with_silence():
    mel = np.ones((4 * 6, 40), np.float32)
    windows = data.audio_windows(mel)
    assert (windows[0, :8] == np.float32(data.SILENCE)).all() and (windows[0, 8:] == 1).all()
    assert (windows[5, :12] == 1).all() and (windows[5, 12:] == np.float32(data.SILENCE)).all()


def test_a_long_spectrogram_is_made_in_pieces_without_seams():
    audio = np.random.default_rng(0).integers(-9999, 9999, 90 * SAMPLES_PER_FRAME).astype(np.int16)
    whole = data.log_mel(audio)
    np.testing.assert_allclose(data.log_mel(audio, chunk_seconds=1), whole, atol=1e-5)
    with pytest.raises(ValueError, match="no sound"):
        data.log_mel(audio[:0])


@pytest.mark.parametrize("gain", [0.1, 0.3, 3.0])
def test_a_spectrogram_says_nothing_of_how_loud_the_recording_is(gain):
    audio = 2000 * np.random.default_rng(0).standard_normal(30 * SAMPLES_PER_FRAME)
    audio[: 4 * SAMPLES_PER_FRAME] /= 5  # a softer part
    mel = data.log_mel(audio.astype(np.int16))
    np.testing.assert_allclose(data.log_mel((gain * audio).astype(np.int16)), mel, atol=0.05)
    assert mel[:12].mean() < mel[20:].mean() - 0.5
    pause = np.zeros(20 * SAMPLES_PER_FRAME)
    with_pause = data.log_mel(np.concatenate([gain * audio, pause]).astype(np.int16))
    assert abs(with_pause[20:116].mean() - mel[20:116].mean()) < 0.15
    assert (with_pause[130:] == np.float32(data.SILENCE)).all()


def test_silence_is_not_made_loud():
    hiss = np.random.default_rng(0).integers(-1, 2, 30 * SAMPLES_PER_FRAME).astype(np.int16)
    assert data.log_mel(hiss).mean() < data.SILENCE + 0.3


# ---------------------------------------------------------------- picture and sound together


def test_flash_and_click_share_a_frame_through_a_real_file(tmp_path):
    data.write_video(tmp_path / "anna" / "1.mp4", *flash_and_click())
    clip = load(tmp_path / "anna").clips[0]
    assert clip.person == "anna" and clip.name == "1"
    assert clip.num_frames == len(clip.frames) == 40
    assert len(clip.audio) == 40 * SAMPLES_PER_FRAME and len(clip.mel) == 160
    assert clip.frames.mean((1, 2, 3)).argmax() == 17
    assert (
        np.abs(clip.audio).argmax() // SAMPLES_PER_FRAME == 17
        and clip.mel.sum(1).argmax() // 4 == 17
    )


WHITE_AND_TONE_AT_ONE_SECOND = (
    "-f lavfi -i color=black:s=50x38:r={rate}:d=2,drawbox=c=white:t=fill:enable='gte(t,1)' "
    "-f lavfi -i aevalsrc=0.5*sin(6283*t)*gte(t\\,1)|0.5*sin(6283*t)*gte(t\\,1):s=44100:d=2 "
    "-pix_fmt yuv420p -c:a aac"
)


def onset(frames, audio):
    """Seconds at which the picture turns white and the tone begins."""
    white = np.flatnonzero(frames.mean((1, 2, 3)) > 128)[0] / FPS
    return white, np.flatnonzero(np.abs(audio.astype(int)) > 3000)[0] / SAMPLE_RATE


@pytest.mark.parametrize("rate", ["10", "24000/1001", "30", "60000/1001"])
def test_other_rates_and_sizes_are_resampled_in_time(tmp_path, rate):
    ffmpeg(*WHITE_AND_TONE_AT_ONE_SECOND.format(rate=rate).split(), tmp_path / "1.mp4")
    frames, audio = data.read_video(tmp_path / "1.mp4", 24)
    assert frames.shape[1:] == (3, 24, 24) and abs(len(frames) - 50) <= 2
    assert len(audio) == len(frames) * SAMPLES_PER_FRAME
    white, sound = onset(frames, audio)
    assert abs(white - 1) <= 1 / FPS and abs(sound - 1) < 0.015
    spectrum = np.abs(np.fft.rfft(audio[18000:28000].astype(float)))
    assert abs(spectrum.argmax() * SAMPLE_RATE / 10000 - 1000) < 3


def test_late_sound_an_edit_list_and_a_changing_rate_keep_their_time(tmp_path):
    ffmpeg(*WHITE_AND_TONE_AT_ONE_SECOND.format(rate=25).split(), tmp_path / "1.mp4")
    source = tmp_path / "1.mp4"
    ffmpeg(
        "-i",
        source,
        "-itsoffset",
        0.4,
        "-i",
        source,
        *"-map 0:v -map 1:a -c copy".split(),
        tmp_path / "late.mp4",
    )
    ffmpeg("-ss", 0.52, "-i", source, "-c", "copy", tmp_path / "edited.mp4")
    varied = "select='lt(t,0.5)+gte(t,0.5)*not(mod(n,3))'"
    ffmpeg("-i", source, "-vf", varied, "-fps_mode", "vfr", "-c:a", "copy", tmp_path / "varied.mp4")
    assert onset(*data.read_video(tmp_path / "late.mp4")) == pytest.approx((1, 1.4), abs=0.02)
    assert onset(*data.read_video(tmp_path / "edited.mp4")) == pytest.approx((0.48, 0.48), abs=0.03)
    assert onset(*data.read_video(tmp_path / "varied.mp4")) == pytest.approx((1.08, 1), abs=0.02)
    opposite = "-af pan=stereo|c0=c0|c1=-1*c0 -c:a s302m -strict -2 -c:v copy".split()
    ffmpeg("-i", tmp_path / "late.mp4", *opposite, tmp_path / "late.ts")
    assert onset(*data.read_video(tmp_path / "late.ts")) == pytest.approx((1, 1.4), abs=0.02)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_late_picture_is_not_filled_with_its_first_frame(tmp_path, suffix):
    """So a copied cut begins: with sound at once, with picture at the next key frame."""
    source = tmp_path / "1.mp4"
    ffmpeg(*WHITE_AND_TONE_AT_ONE_SECOND.format(rate=25).split(), source)
    late = tmp_path / f"late.{suffix}"
    twice = ["-itsoffset", 0.4, "-i", source, "-i", source]
    ffmpeg(*twice, *"-map 0:v -map 1:a -c copy".split(), late)
    frames, audio = data.read_video(late)
    assert abs(len(frames) - 41) <= 1 and len(audio) == len(frames) * SAMPLES_PER_FRAME
    assert onset(frames, audio) == pytest.approx((1, 0.6), abs=0.02)


def test_a_piece_of_a_longer_matroska_file_is_used_whole(tmp_path):
    source = "-f lavfi -i testsrc2=s=32x32:r=25:d=4 -f lavfi -i sine=d=4 -g 25".split()
    ffmpeg(*source, *"-f segment -segment_time 2".split(), tmp_path / "%d.mkv")
    assert data.probe(tmp_path / "1.mkv").seconds == pytest.approx(2, abs=0.1)
    frames, _ = data.read_video(tmp_path / "1.mkv")
    assert len(frames) == 50


def test_a_hole_in_the_sound_stays_where_it_is(tmp_path):
    ffmpeg(*WHITE_AND_TONE_AT_ONE_SECOND.format(rate=25).split(), tmp_path / "1.mp4")
    lost = "noise=drop='between(pts*tb,0.3,0.375)'"  # four packets
    coding = "-c:v copy -c:a libopus -frame_duration 20 -bsf:a".split()
    ffmpeg("-i", tmp_path / "1.mp4", *coding, lost, tmp_path / "hole.mkv")
    assert onset(*data.read_video(tmp_path / "hole.mkv")) == pytest.approx((1, 1), abs=0.015)


def test_a_picture_that_changes_size_is_refused(tmp_path):
    for size in (32, 64):
        source = f"-f lavfi -i color=s={size}x{size}:r=25:d=1 -f lavfi -i sine=d=1".split()
        ffmpeg(*source, tmp_path / f"{size}.ts")
    parts = [(tmp_path / name).read_bytes() for name in ("32.ts", "64.ts")]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="both.ts: its picture changes size or colours midway"):
        data.read_video(tmp_path / "both.ts", 24)


def test_a_source_of_the_kind_that_is_written_has_its_own_size(tmp_path):
    raw = "-f lavfi -i testsrc=s=64x48:d=1 -c:v rawvideo -pix_fmt gbrp".split()
    ffmpeg(*raw, tmp_path / "raw.nut")
    assert data.read_video(tmp_path / "raw.nut", 16)[0].shape == (25, 3, 16, 16)


def test_a_video_written_in_blocks_is_the_same_and_a_failing_writer_leaves_nothing(tmp_path):
    frames, audio = flash_and_click()
    data.write_video(tmp_path / "whole.mp4", frames, audio)
    data.write_video(tmp_path / "blocks.mp4", iter([frames[:7], frames[7:]]), audio)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "blocks.mp4").read_bytes()

    def fails():
        yield frames
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        data.write_video(tmp_path / "half.mp4", fails(), audio)
    with pytest.raises(ValueError, match="no frames"):
        data.write_video(tmp_path / "none.mp4", iter([]), audio)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks.mp4", "whole.mp4"]


def test_an_output_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "unmounted").symlink_to(tmp_path / "nothing")

    def work():
        raise AssertionError("nothing should be asked of the writer")
        yield

    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "t.gif", "must end in .mp4"),
        (tmp_path / "t", "must end in"),
        (tmp_path / "file" / "t.mp4", "cannot be written"),
        (tmp_path / "unmounted" / "t.mp4", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            data.check_output(path)
        with pytest.raises(ValueError, match=words):
            data.write_video(path, work())
    data.check_output(tmp_path / "new folder" / "T.MP4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "unmounted"]


def sound_offset(path, audio):
    """Seconds by which the sound of a file comes later than int16 `audio`."""
    late, early = data.read_speech(path).astype(float), np.asarray(audio, float)
    lags = correlation_lags(len(late), len(early))
    return lags[np.argmax(correlate(late, early, method="fft"))] / SAMPLE_RATE


@pytest.mark.parametrize("late", [0, 1600])
def test_sound_is_written_in_step(tmp_path, late):
    frames, audio = flash_and_click()
    data.write_video(tmp_path / "a.mp4", frames, np.roll(audio, late))
    assert sound_offset(tmp_path / "a.mp4", audio) == pytest.approx(late / SAMPLE_RATE, abs=0.005)


# ---------------------------------------------------------------- kinds of sound


def test_speech_of_any_format_and_none(tmp_path, mute_clip):
    ffmpeg("-f", "lavfi", "-i", "sine=f=500:r=44100:d=1", "-ac", 2, tmp_path / "a.wav")
    ffmpeg("-i", tmp_path / "a.wav", tmp_path / "a.ogg")
    for name in ("a.wav", "a.ogg"):
        assert abs(len(data.read_speech(tmp_path / name)) - SAMPLE_RATE) < 20
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:78])
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "folder.wav").mkdir()
    ffmpeg("-f", "lavfi", "-i", "anullsrc=d=1", tmp_path / "silent.wav")
    copy(mute_clip, tmp_path / "mute.mp4")
    for name, reason in (
        ("cut.wav", "cut.wav"),
        ("text.wav", "text file"),
        ("none.wav", "no such file"),
        ("folder.wav", "not a regular file"),
        ("silent.wav", "silent"),
        ("mute.mp4", "no sound"),
    ):
        with pytest.raises(ValueError, match=reason):
            data.read_speech(tmp_path / name)


@pytest.mark.parametrize("length", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_streamed_wav_is_read_whatever_length_its_header_gives(tmp_path, length):
    ffmpeg("-f", "lavfi", "-i", "sine=r=22050:d=1", "-fflags", "+bitexact", tmp_path / "a.wav")
    wav = bytearray((tmp_path / "a.wav").read_bytes())
    at = wav.index(b"data") + 4
    wav[4:8] = wav[at : at + 4] = length.to_bytes(4, "little")
    (tmp_path / "stream.wav").write_bytes(wav)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audio = data.read_speech(tmp_path / "stream.wav")
    assert abs(len(audio) - SAMPLE_RATE) < 20


def test_the_default_track_is_used_and_channels_that_cancel_are_not_mixed(tmp_path, mute_clip):
    tones = "-f lavfi -i sine=f=400:d=0.64 -f lavfi -i sine=f=2000:d=0.64".split()
    tracks = "-map 0:v -map 1:a -map 2:a -disposition:a:0 0 -disposition:a:1 default".split()
    ffmpeg("-i", mute_clip, *tones, *tracks, "-c:v", "copy", tmp_path / "two.mkv")
    against = [
        "-f",
        "lavfi",
        "-i",
        "aevalsrc=0.5*sin(2513*t)|-0.5*sin(2513*t):d=0.64",
        "-c:v",
        "copy",
    ]
    ffmpeg("-i", mute_clip, *against, tmp_path / "cancel.mov")
    silence = "-f lavfi -i anullsrc=d=0.64 -map 0:v -map 2:a -map 1:a".split()
    speech = ["-i", mute_clip, "-i", tmp_path / "two.mkv"]
    first = "-disposition:a:0 default -disposition:a:1 0".split()
    ffmpeg(*speech, *silence, *first, "-c:v", "copy", tmp_path / "silent first.mkv")
    nine = "pan=9 channels|" + "|".join(
        f"c{i}=c0" for i in range(9)
    )  # of which ffmpeg makes no mono
    coding = "-c:v copy -c:a pcm_s16le".split()
    ffmpeg("-i", tmp_path / "cancel.mov", "-af", nine, *coding, tmp_path / "nine.mov")
    for name, hz in (
        ("two.mkv", 2000),
        ("cancel.mov", 400),
        ("nine.mov", 400),
        ("silent first.mkv", 2000),
    ):
        frames, audio = data.read_video(tmp_path / name, 16)
        assert len(frames) == 16
        spectrum = np.abs(np.fft.rfft(audio[1000:9000].astype(float)))
        assert abs(2 * spectrum.argmax() - hz) <= 4
        assert np.array_equal(audio[:9000], data.read_speech(tmp_path / name)[:9000])


def test_sound_in_a_file_beside_a_mute_video_is_found(tmp_path, mute_clip):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.64", tmp_path / "tone.wav")
    ffmpeg("-i", tmp_path / "tone.wav", tmp_path / "tone.m4a")
    for video, sound in (
        ("HDTF/WDA_Name0_000.mp4", "HDTF/WDA_Name0_000.WAV"),
        ("vox/dev/mp4/id00012/21Uxsk56VDQ/00001.mp4", "vox/dev/aac/id00012/21Uxsk56VDQ/00001.m4a"),
        ("MEAD/M003/video/front/angry/level_1/001.mp4", "MEAD/M003/audio/angry/level_1/001.m4a"),
        ("own/anna/none.mp4", "own/anna/other.wav"),
    ):
        copy(mute_clip, tmp_path / video)
        copy(tmp_path / ("tone" + sound[-4:].lower()), tmp_path / sound)
    for root, person in (("HDTF", "Name"), ("vox/dev/mp4", "id00012"), ("MEAD", "M003")):
        clip = load(tmp_path / root).clips[0]
        assert clip.person == person and len(clip.frames) == 16 and np.abs(clip.audio).max() > 1000
    with pytest.raises(ValueError, match="no sound, in it or in a file beside it"):
        load(tmp_path / "own")
    copy(mute_clip, tmp_path / "cross" / "videos" / "anna" / "1.mp4")
    copy(tmp_path / "tone.wav", tmp_path / "cross" / "audio" / "1.wav")  # it may be anybody's
    with pytest.raises(ValueError, match="no sound, in it or in a file beside it"):
        load(tmp_path / "cross" / "videos")
    copy(tmp_path / "tone.wav", tmp_path / "own" / "anna" / "none.flac")  # whatever is in it
    assert len(load(tmp_path / "own").clips) == 1
    for name in ("none.WAV", "none.Wav", "none.wav"):  # whatever its case, and before the flac
        copy(tmp_path / "tone.wav", tmp_path / "own" / "anna" / name)
        assert data.find_sound(tmp_path / "own/anna/none.mp4", {}) == f"{tmp_path}/own/anna/{name}"
    composed, decomposed = "zo\u00e9", "zoe\u0301"  # \u00e9 as one sign and as two
    for video, sound in ((composed, decomposed), (decomposed, composed)):
        copy(tmp_path / "tone.wav", tmp_path / video / f"{sound}.wav")
        found = data.find_sound(tmp_path / video / f"{video}.mp4", {})
        assert found == f"{tmp_path}/{video}/{sound}.wav"


def test_of_a_video_the_first_picture_is_used_and_that_is_said(one_clip):
    with pytest.warns(UserWarning, match="only the first of its [0-9]+ pictures is used"):
        picture = data.read_image(one_clip)
    assert np.array_equal(picture, data.read_video(one_clip)[0][0])


def test_a_silent_track_does_not_hide_the_sound_beside_the_video(tmp_path, mute_clip):
    silence = "-f lavfi -i anullsrc=d=0.64 -c:v copy".split()
    (tmp_path / "anna").mkdir()
    ffmpeg("-i", mute_clip, *silence, tmp_path / "anna" / "1.mkv")
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.64", tmp_path / "anna" / "1.wav")
    clip = load(tmp_path / "anna").clips[0]
    assert clip.num_frames == 16 and np.abs(clip.audio).max() > 1000


@pytest.mark.parametrize("late", [0, 0.5])
def test_sound_keeps_its_time_where_its_channels_change(tmp_path, late):
    picture = "-f lavfi -i color=s=32x32:r=25:d=1 -f lavfi".split()
    ffmpeg(*picture, "-itsoffset", late, "-i", f"sine=d={1 - late}", tmp_path / "mono.ts")
    ffmpeg(*picture, "-i", "aevalsrc=0|sin(3000*t)*gte(t\\,0.5):d=1", tmp_path / "stereo.ts")
    parts = [(tmp_path / name).read_bytes() for name in ("mono.ts", "stereo.ts")]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.warns(UserWarning, match="2.0 of 2.0 s are used .damaged packets"):  # at the seam
        _, audio = data.read_video(tmp_path / "both.ts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speech = data.read_speech(tmp_path / "both.ts")
    for audio in (audio, speech):
        assert len(audio) == pytest.approx(2 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
        loud = np.flatnonzero(np.abs(audio.astype(int)) > 8000)
        assert loud[0] / SAMPLE_RATE == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_changed_sound_file_is_read_again(tmp_path, mute_clip, monkeypatch, meanwhile):
    copy(mute_clip, tmp_path / "anna" / "1.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.64", tmp_path / "anna" / "1.wav")
    change = "-f", "lavfi", "-i", "sine=f=3000:d=0.64", tmp_path / "anna" / "1.wav"
    decode = data.decode_video

    def decode_and_change(*args):
        decoded = decode(*args)
        ffmpeg(*change)
        return decoded

    if meanwhile:  # while the clip is decoded
        monkeypatch.setattr(data, "decode_video", decode_and_change)
    load(tmp_path / "anna")
    monkeypatch.undo()
    if not meanwhile:
        ffmpeg(*change)
    audio = load(tmp_path / "anna").clips[0].audio
    hz = np.abs(np.fft.rfft(audio)).argmax() * SAMPLE_RATE / len(audio)
    assert hz == pytest.approx(3000, abs=10)


# ---------------------------------------------------------------- kinds of video


def test_every_container_is_read_whatever_the_case_of_its_suffix(tmp_path, one_clip):
    copy(one_clip, tmp_path / "in" / "a" / "1.MP4")
    for name in ("b/1.MOV", "c/1.m4v", "d/1.mkv", "e/1.ts", "f/1.3gp"):
        (tmp_path / "in" / name).parent.mkdir()
        ffmpeg("-i", one_clip, "-c", "copy", tmp_path / "in" / name)
    for name in ("g/1.avi", "h/1.mpg", "i/1.WMV", "j/1.flv", "k/1.webm"):
        (tmp_path / "in" / name).parent.mkdir()
        ffmpeg(
            "-i", one_clip, "-ar", 48000 if name.endswith("webm") else 44100, tmp_path / "in" / name
        )
    dataset = load(tmp_path / "in")
    assert "".join(sorted(dataset.people)) == "abcdefghijk" and dataset.skipped == []
    assert all(14 <= len(clip.frames) <= 18 for clip in dataset.clips)
    assert all(abs(clip.frames.mean() - 100) < 8 for clip in dataset.clips)
    write_clip(tmp_path / "in" / "a" / "2.mp4", level=50)
    alone = load(tmp_path / "in" / "a" / "1.MP4")
    assert [(clip.person, clip.name) for clip in alone.clips] == [("a", "1")]


def colour_of(path, **options):
    frames, _ = data.read_video(path, **options)
    return frames[0, :, 8, 8].astype(int)


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    """A square of 24 x 24 on the screen, stored as 18 x 24 pixels of 4:3."""
    box = "color=black:s=48x64:d=0.2,drawbox=x=15:y=20:w=18:h=24:c=white:t=fill,setsar=4/3"
    ffmpeg("-f", "lavfi", "-i", box, "-pix_fmt", "yuv444p", "-crf", 1, tmp_path / "a.mp4")
    for size in (None, 64):
        frames, _ = data.read_video(tmp_path / "a.mp4", size)
        assert frames.shape[2:] == (64, 64)
        bright = frames[0, 1] > 128
        assert abs(bright.any(0).sum() - 24) <= 1 and abs(bright.any(1).sum() - 24) <= 1


def test_rotation_and_mirror_flags_are_obeyed(tmp_path):
    box = "color=black:s=64x32:d=0.2,drawbox=w=20:h=10:c=white:t=fill"  # at the top left
    ffmpeg("-f", "lavfi", "-i", box, "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    ffmpeg("-display_hflip", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "mirrored.mp4")
    turned, _ = data.read_video(tmp_path / "turned.mp4")
    mirrored, _ = data.read_video(tmp_path / "mirrored.mp4")
    assert turned.shape[2:] == (64, 32) and turned[0, 1, -8, 3] > 200 > 50 > turned[0, 1, 8, 3]
    assert (
        mirrored.shape[2:] == (32, 64) and mirrored[0, 1, 3, -8] > 200 > 50 > mirrored[0, 1, 3, 8]
    )


def test_interlaced_video_shows_no_combs(tmp_path):
    """A bar that moves by its width from field to field: rows of one picture must agree."""
    bar = "color=black:s=64x64:r=50:d=0.4,geq=lum=255*between(X\\,4*N\\,4*N+4):cb=128:cr=128"
    coding = "-flags +ildct+ilme -c:v mpeg2video -q:v 1".split()
    ffmpeg("-f", "lavfi", "-i", bar + ",interlace", *coding, tmp_path / "1.mpg")
    frames, _ = data.read_video(tmp_path / "1.mpg")
    assert frames[:, 1].max() > 200 and frames[:, 1, 8:-8].std(1).mean() < 2
    # ffmpeg says "top coded first (swapped)" of it
    fields = ["-vf", "setfield=tff", "-c:v", "prores_ks", tmp_path / "2.mov"]
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=1", *fields)
    frames, _ = data.read_video(tmp_path / "2.mov")
    assert frames.shape == (25, 3, 120, 160)


def test_frames_that_are_not_interlaced_keep_every_line(tmp_path):
    frames = np.random.default_rng(0).integers(0, 2, (12, 1, 16, 1), np.uint8) * np.uint8(200)
    frames = frames.repeat(3, 1).repeat(32, 3).repeat(2, 2)
    data.write_video(tmp_path / "lines.mp4", frames, crf=1)
    read, _ = data.read_video(tmp_path / "lines.mp4")
    assert abs(read.astype(int) - frames).mean() < 5


def test_a_frame_with_a_wrong_time_does_not_fill_the_disk(tmp_path):
    late = "setpts='PTS+gt(N,10)*600/TB'"
    coding = ["-fps_mode", "passthrough", tmp_path / "1.mkv"]
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=16x16:r=25:d=1", "-vf", late, *coding)
    with pytest.warns(UserWarning, match="60.4 of 601.0 s are used"):
        frames, _ = data.read_video(tmp_path / "1.mkv")
    assert len(frames) == 60 * FPS + 10


def test_untagged_hd_is_read_with_the_matrix_of_hd(tmp_path):
    for name, size, matrix in (("hd.mp4", "1280x720", "bt709"), ("sd.mp4", "320x240", "bt601")):
        make = f"color=0xDC1E1E:s={size}:d=0.1,scale=out_color_matrix={matrix},format=yuv420p"
        ffmpeg(
            "-f",
            "lavfi",
            "-i",
            make + ",setparams=colorspace=unknown",
            "-preset",
            "ultrafast",
            tmp_path / name,
        )
        assert np.abs(colour_of(tmp_path / name, size=16) - (220, 30, 30)).max() <= 4


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
@pytest.mark.parametrize("tags", ["all", "transfer"])
def test_hdr_is_tone_mapped_or_refused_by_a_line_that_helps(tmp_path, monkeypatch, transfer, tags):
    if not data.can_tone_map():
        pytest.skip("this ffmpeg cannot make HDR")
    make = (
        "color=0xDC1E1E:s=64x64:d=0.1,format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr,"
        "zscale=t=linear:npl=203,format=gbrpf32le,"
        f"zscale=p=bt2020:t={transfer}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
    )
    if tags == "transfer":
        make += ",setparams=color_primaries=unknown:colorspace=unknown"
    ffmpeg("-f", "lavfi", "-i", make, "-c:v", "libx264", tmp_path / "a.mp4")
    assert np.abs(colour_of(tmp_path / "a.mp4", size=16) - (220, 30, 30)).max() <= 5
    monkeypatch.setattr(data, "can_tone_map", lambda: False)
    with pytest.raises(ValueError, match="HDR video.*export it as SDR.*ffmpeg -i IN -vf .*tonemap"):
        data.read_video(tmp_path / "a.mp4")


def test_crop_keeps_the_middle_of_clips_and_pictures_alike(tmp_path):
    """Red in the middle 32 of 64 pixels, blue around: half of each side is all red."""
    frames = np.zeros((12, 64, 64, 3), np.uint8)
    frames[..., 2] = 255
    frames[:, 16:48, 16:48] = (255, 0, 0)
    data.write_video(tmp_path / "anna" / "1.mp4", frames.transpose(0, 3, 1, 2), tone(12), crf=1)
    Image.fromarray(frames[0]).resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    for crop, blue in ((1.0, 192), (0.5, 0)):
        picture = data.read_image(tmp_path / "a.png", 16, crop)
        for image in (picture, load(tmp_path / "anna", size=16, crop=crop).clips[0].frames[5]):
            assert image.shape == (3, 16, 16) and abs(int((image[2] > image[0]).sum()) - blue) <= 4


# ---------------------------------------------------------------- kinds of pictures


MODES = ["L", "RGBA", "P", "RGB", "1", "I;16", "CMYK", "F", "float 0..1", "16-bit RGB", "float RGB"]


# ---------------------------------------------------------------- faces


class RedFinder:
    """A finder whose faces are the bright red squares of a picture."""

    drawings = False

    def fingerprint(self):
        return "red"

    def find(self, picture, usual):
        r, g, b = picture.astype(int)
        labels, _ = ndimage.label((r > 150) & (g < 90) & (b < 90))
        boxes = [
            (x.start, y.start, x.stop, y.stop)
            for y, x in ndimage.find_objects(labels)
            if x.stop - x.start > 8
        ]
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def red_squares(*squares, width=320, height=180):
    """A grey picture uint8 [3 h w] with red squares (left, top, side), each with a green middle."""
    picture = np.full((3, height, width), 128, np.uint8)
    for left, top, side in squares:
        picture[:, top : top + side, left : left + side] = np.uint8([200, 20, 20])[:, None, None]
        quarter = side // 4
        inside = slice(top + quarter, top + 3 * quarter), slice(left + quarter, left + 3 * quarter)
        picture[:, *inside] = np.uint8([20, 200, 20])[:, None, None]
    return picture


def is_framed(frames):
    """Whether frames [f 3 32 32] show one red square with its green middle, and nothing else."""
    expected = red_squares((0, 0, 32), width=32, height=32)
    return np.abs(frames[..., 2:-2, 2:-2] - expected[:, 2:-2, 2:-2].astype(int)).mean() < 25


def test_a_moving_face_is_followed_in_a_video(tmp_path, monkeypatch):
    frames = [red_squares((20 + 2 * i, 60 - i // 2, 64)) for i in range(100)]
    root = tmp_path / "Mum's, 1:2;[3]"  # what means something to ffmpeg's filters
    root.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    data.write_video(root / "p" / "walk.mp4", np.stack(frames), tone(100))
    found, _ = data.read_video(root / "p" / "walk.mp4", 32, finder=RedFinder())
    assert found.shape == (100, 3, 32, 32)
    assert all(is_framed(frame[None]) for frame in found[15:-15])  # the ends are smoothed
    green = found[30:70, 1].astype(int) - found[30:70, 0] > 60
    assert np.nonzero(green)[2].mean() == pytest.approx(15.5, abs=0.5)  # neither ahead nor behind
    clip = load(root, finder=RedFinder()).clips[0]
    assert np.array_equal(clip.frames, found)
    uncut = load(root).clips[0]  # another entry in the cache
    assert not is_framed(uncut.frames)


def test_a_face_is_followed_where_the_picture_begins_late(tmp_path):
    frames = [red_squares((20 + 2 * i, 60 - i // 2, 64)) for i in range(100)]
    data.write_video(tmp_path / "walk.mp4", np.stack(frames), tone(100))
    twice = ["-itsoffset", 0.6, "-i", tmp_path / "walk.mp4", "-i", tmp_path / "walk.mp4"]
    ffmpeg(*twice, *"-map 0:v -map 1:a -c copy".split(), tmp_path / "late.ts")
    found, _ = data.read_video(tmp_path / "late.ts", 32, finder=RedFinder())
    assert all(is_framed(frame[None]) for frame in found[35:85])


def test_a_face_that_swings_about_the_middle_is_followed(tmp_path):
    left = 90 + 70 * np.sin(np.arange(300) / 30)
    frames = [red_squares((int(x), 20, 140)) for x in left]
    data.write_video(tmp_path / "swing.mp4", np.stack(frames), tone(300))
    found, _ = data.read_video(tmp_path / "swing.mp4", 32, finder=RedFinder())
    green = found[..., 1, :, :].astype(int) - found[..., 0, :, :] > 60  # f h w
    middles = [np.nonzero(frame)[1].mean() for frame in green[15:-15]]
    assert np.abs(np.array(middles) - 15.5).max() < 3


def test_a_video_that_fails_while_its_face_is_cut_leaves_nothing(tmp_path, monkeypatch):
    frames = [red_squares((20 + 2 * i, 60 - i // 2, 64)) for i in range(20)]
    data.write_video(tmp_path / "walk.mp4", np.stack(frames), tone(20))

    def fail(*args):
        raise ValueError("no room on the disk")

    monkeypatch.setattr(data, "decode_sound", fail)
    output = tmp_path / "decoded" / "frames"
    output.parent.mkdir()
    with pytest.raises(ValueError, match="no room"):
        data.decode_video(tmp_path / "walk.mp4", 32, 1.0, output, finder=RedFinder())
    assert [path.name for path in output.parent.iterdir() if path != output] == []


def test_what_is_cut_as_in_training_stays_as_it_is(tmp_path):
    picture = red_squares((6, 4, 92), width=100, height=100)
    data.write_video(tmp_path / "a.mp4", np.stack([picture] * 20), tone(20))
    expected, _ = data.read_video(tmp_path / "a.mp4", 32)
    assert np.array_equal(data.read_video(tmp_path / "a.mp4", 32, finder=RedFinder())[0], expected)
    Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    assert np.array_equal(data.read_image(path, 32, 1.0, RedFinder()), data.read_image(path, 32))
    halves = [data.read_image(path, 32, 0.5, finder) for finder in (None, RedFinder())]
    assert not np.array_equal(*halves)


def test_the_largest_face_is_used_and_the_others_are_noted(tmp_path):
    picture = red_squares((20, 90, 60), (150, 20, 120))
    picture[:, 105:135, 35:65] = np.uint8([20, 20, 200])[:, None, None]  # another middle
    for name in ("a.png", "a.mp4"):
        path = tmp_path / name
        if name == "a.png":
            Image.fromarray(picture.transpose(1, 2, 0)).save(path)
            read = lambda: data.read_image(path, 32, 1.0, RedFinder())[None]  # noqa: E731
        else:
            data.write_video(path, np.stack([picture] * 30), tone(30))
            read = lambda: data.read_video(path, 32, 1.0, RedFinder())[0]  # noqa: E731
        with pytest.warns(UserWarning, match=f"{name}: 2 faces are found in it, the largest"):
            assert is_framed(read())


def test_without_a_face_in_most_of_it_a_file_is_refused_by_name(tmp_path):
    empty = red_squares()
    Image.fromarray(empty.transpose(1, 2, 0)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: no face found in it$"):
        data.read_image(tmp_path / "a.png", 32, 1.0, RedFinder())
    face = red_squares((20, 60, 64))
    data.write_video(tmp_path / "half.mp4", np.stack([face] * 50 + [empty] * 50), tone(100))
    with pytest.raises(ValueError, match="half.mp4: its face is found in only 50% of it"):
        data.read_video(tmp_path / "half.mp4", 32, finder=RedFinder())
    data.write_video(tmp_path / "none.mp4", np.stack([empty] * 50), tone(50))
    drawn = RedFinder()
    drawn.drawings = True
    with pytest.raises(ValueError, match="none.mp4: no face found in it .* drawings only"):
        data.read_video(tmp_path / "none.mp4", 32, finder=drawn)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode(tmp_path, mode):
    grey = np.full((30, 50), 200, np.uint8)
    path = tmp_path / "a.tiff"
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "F":
        Image.fromarray(grey.astype(np.float32)).save(path)
    elif mode == "float 0..1":
        Image.fromarray(grey.astype(np.float32) / 255).save(path)
    elif mode == "16-bit RGB":
        path = tmp_path / "a.png"
        ffmpeg("-f", "lavfi", "-i", "color=0xC8C8C8:s=50x30,format=rgb48", "-frames:v", 1, path)
    elif mode == "float RGB":  # which PIL cannot read
        path = tmp_path / "a.exr"
        ffmpeg("-f", "lavfi", "-i", "color=0xC8C8C8:s=50x30,format=gbrpf32", "-frames:v", 1, path)
    else:
        Image.fromarray(grey).convert(mode).save(path)
    picture = data.read_image(path, 16)
    assert picture.shape == (3, 16, 16) and picture.dtype == np.uint8
    if mode != "1":
        assert np.abs(picture.astype(int) - 200).max() <= 3
    assert data.read_image(path).shape == (3, 30, 50)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_the_colour_profile_of_a_picture_is_obeyed_where_it_can_be_read(
    tmp_path, monkeypatch, mode
):
    monkeypatch.setattr(data, "read_video", None)  # which knows no profiles
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    # A profile whose red is green, and whose green is red.
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    image = Image.new("RGB", (20, 20), (204, 102, 51)).convert(mode)
    for profile, expected in (
        (srgb, (204, 102, 51)),
        (swapped, (102, 204, 51)),
        (lab, (204, 102, 51)),
        (swapped[:300], (204, 102, 51)),
        (b"no profile", (204, 102, 51)),
    ):
        image.save(tmp_path / "a.png", icc_profile=profile)
        colour = data.read_image(tmp_path / "a.png")[:, 9, 9]
        assert np.abs(colour.astype(int) - expected).max() <= 2


def test_a_picture_is_turned_as_its_camera_was(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste("white", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    image.save(tmp_path / "a.jpg", exif=exif)
    picture = data.read_image(tmp_path / "a.jpg")
    assert picture.shape == (3, 40, 20) and picture[:, 4].mean() > 200 > 50 > picture[:, 30].mean()


def test_a_picture_whose_exif_cannot_be_written_again_is_read(tmp_path):
    entries = struct.pack("<HHI4s", 0xFE, 1, 1, b"\xff") + struct.pack("<HHI4s", 0x112, 3, 1, b"\6")
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + bytes(4)
    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(tmp_path / "a.jpg").shape == (3, 40, 20)


def test_a_picture_that_would_fill_the_memory_is_said_to_be_too_large(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    with pytest.raises(ValueError, match="large.png: the picture is too large"):
        data.read_image(tmp_path / "large.png", 16)


def test_a_picture_that_cannot_be_read_is_named_with_its_reason(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>")
    (tmp_path / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("text.png", "text file"),
        ("page.jpg", "web page"),
        ("empty.png", "empty"),
        ("cut.png", "cut off"),
        ("cut.jpg", "cut off"),
        ("a.heic", "save it as JPEG"),
        ("pipe.png", "not a regular file"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            data.read_image(tmp_path / name, 16)


# ---------------------------------------------------------------- bad files


def test_bad_files_cost_only_themselves_and_their_reasons_help(tmp_path, one_clip, mute_clip):
    folder = tmp_path / "anna"
    copy(one_clip, folder / "good.mp4", folder / "late.mp4")
    write_clip(folder / "short.mp4", num_frames=2)
    copy(mute_clip, folder / "mute.mp4")
    ffmpeg(
        "-i",
        mute_clip,
        "-f",
        "lavfi",
        "-i",
        "anullsrc=d=0.64",
        "-c:v",
        "copy",
        folder / "silent.mkv",
    )
    ffmpeg("-i", one_clip, "-vn", "-c", "copy", folder / "sound.m4v")
    (folder / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    ffmpeg("-i", folder / "a.srt", folder / "words.mkv")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=320x240:d=1", "-g", 99, folder / "sizeless.ts")
    packets = (folder / "sizeless.ts").read_bytes()
    (folder / "sizeless.ts").write_bytes(packets[: 3 * 188] + packets[200 * 188 :])
    (folder / "text.mp4").write_text("I am not a video.\n")
    (folder / "page.mp4").write_text("<html><body>404</body></html>")
    (folder / "pointer.mov").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
    )
    (folder / "zeros.mp4").write_bytes(bytes(9999))
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(9999))
    (folder / "empty.mp4").touch()
    (folder / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "itself.mp4").symlink_to(folder / "itself.mp4")
    os.mkfifo(folder / "pipe.mp4")
    ffmpeg("-i", one_clip, "-c", "copy", folder / "late.mp4")  # its index comes last
    (folder / "late.mp4").write_bytes((folder / "late.mp4").read_bytes()[:-2000])
    dataset = load(tmp_path / "anna")
    assert [clip.name for clip in dataset.clips] == ["good"]
    found = reasons(dataset)
    for name, words in {
        "short.mp4": "2 frames",
        "mute.mp4": "no sound",
        "silent.mkv": "silent",
        "sound.m4v": "no picture",
        "words.mkv": "no picture and no sound in it",
        "sizeless.ts": "no known size: the file is cut off or damaged",
        "text.mp4": "text file",
        "page.mp4": "web page",
        "pointer.mov": "git lfs pull",
        "zeros.mp4": "download did not finish",
        "noise.mp4": "",
        "empty.mp4": "empty: copy or download it again",
        "dangling.mp4": "link to nothing",
        "itself.mp4": "symbolic links",
        "pipe.mp4": "not a regular file",
        "late.mp4": "the file's end, and its index with it, is missing: copy or download it again",
    }.items():
        assert re.search(words, found[name]) and "\n" not in found.pop(name)
    assert not found
    (folder / "good.mp4").unlink()
    with pytest.raises(ValueError, match="no usable clip in .*, 16 skipped: "):
        load(tmp_path / "anna")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_what_there_is_of_a_file_that_ends_early_is_used_and_said(tmp_path, suffix):
    path = tmp_path / "anna" / f"1{suffix}"
    path.parent.mkdir()
    source = "-f lavfi -i testsrc2=s=320x240:r=25:d=3 -f lavfi -i sine=d=3"
    source += " -pix_fmt yuv420p -bf 0 -movflags +faststart"
    ffmpeg(*source.split(), path)
    whole, _ = data.read_video(path, 32)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset = load(tmp_path / "anna")
    clip = dataset.clips[0]
    assert 20 < len(clip.frames) < 60 and len(clip.audio) == len(clip.frames) * SAMPLES_PER_FRAME
    difference = np.abs(clip.frames.astype(int) - whole[: len(clip.frames)]).mean((1, 2, 3))
    assert difference.max() < 1  # no picture is damaged
    ((noted, note),) = dataset.notes
    assert noted == str(path) and note.startswith(f"{len(clip.frames) / FPS:.1f} of ")
    assert load(tmp_path / "anna").notes == dataset.notes  # out of the cache, too
    with pytest.warns(UserWarning, match="s are used"):
        data.read_video(path, 32)


def test_why_a_sound_is_used_in_part_is_said(tmp_path):
    path = tmp_path / "cut.wav"
    ffmpeg("-f", "lavfi", "-i", "sine=d=2", path)
    path.write_bytes(path.read_bytes()[:99_999])
    with pytest.warns(UserWarning, match=r"cut.wav: 1\.\d of .* s are used \(.+\)"):
        data.read_speech(path)


def test_the_text_beside_a_clip_may_be_wrong_but_costs_only_itself(tmp_path, one_clip):
    texts = {
        "good": "Text:  HELLO\nPrompt:  sad\nOpening:  " + "0.5 " * 16 + "0.9",  # one too many
        "words": "Prompt: sad\nOpening:  a b c\n",
        "few": "Opening:  0.1 0.2\n",
        "large": "Opening: " + "7 " * 16,
        "latin": "Prompt: stern, fatigu\udce9",
        "binary": "\udcff\udcfe",
    }
    for name, text in texts.items():
        copy(one_clip, tmp_path / "in" / name / f"{name}.mp4")
        (tmp_path / "in" / name / f"{name}.txt").write_text(text, errors="surrogateescape")
    copy(one_clip, *(tmp_path / "in" / name / f"{name}.mp4" for name in ("none", "pipe", "wide")))
    (tmp_path / "in" / "wide" / "wide.txt").write_text("Prompt: sad\n", "utf-16")
    os.mkfifo(tmp_path / "in" / "pipe" / "pipe.txt")
    dataset = load(tmp_path / "in")
    clips = {clip.person: clip for clip in dataset.clips}
    assert len(clips) == 9 and dataset.skipped == [] and clips["latin"].prompt == ""
    assert clips["good"].prompt == clips["words"].prompt == "sad" and clips["none"].prompt == ""
    np.testing.assert_array_equal(clips["good"].opening, np.full(16, 0.5, np.float32))
    assert all(clips[name].opening is None for name in clips if name != "good")
    notes = [Path(path).stem for path, note in dataset.notes if "the same picture" not in note]
    assert sorted(notes) == ["few", "large", "latin", "wide", "words"]


def test_a_clip_is_not_kept_where_ffmpeg_was_stopped(tmp_path, one_clip, monkeypatch):
    """Ctrl-C reaches ffmpeg, too, which then ends its output as if the file ended there."""
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    whole = get_ffmpeg_exe()
    ctrl_c = 'echo "Exiting normally, received signal 2." >&2; exit 255'
    for status, error in (("kill -9 $$", ValueError), (ctrl_c, KeyboardInterrupt)):
        script = tmp_path / "ffmpeg"
        script.write_text(f'#!/bin/sh\n{whole} "$@"\ncase "$*" in *rawvideo*) {status};; esac\n')
        script.chmod(0o755)
        monkeypatch.setattr(data, "get_ffmpeg_exe", lambda: str(script))
        with pytest.raises(error, match="ffmpeg (was stopped|crashed)"):
            load(tmp_path / "anna")
    monkeypatch.undo()
    assert len(load(tmp_path / "anna").clips) == 1


def test_a_damaged_file_with_which_ffmpeg_ends_as_after_ctrl_c_costs_only_itself(
    tmp_path, one_clip, monkeypatch
):
    for name in ("good", "bad"):
        copy(one_clip, tmp_path / "anna" / f"{name}.mp4")
    script = tmp_path / "ffmpeg"
    failure = 'echo "[error] Operation not permitted" >&2; exit 255'
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *bad.mp4*) {failure};; esac\n{get_ffmpeg_exe()} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(data, "get_ffmpeg_exe", lambda: str(script))
    dataset = load(tmp_path / "anna")
    assert [clip.name for clip in dataset.clips] == ["good"]
    assert "Operation not permitted" in reasons(dataset)["bad.mp4"]


def test_names_that_look_like_something_else_do_no_harm(tmp_path, one_clip, monkeypatch):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    (tmp_path / "anna" / ".wav").write_bytes(b"x")  # no suffix: a hidden file
    monkeypatch.chdir(tmp_path)
    for cache in ("-i", "http:cache"):
        assert len(load("anna", cache=cache).clips) == 1


def test_what_others_have_in_the_cache_stays(tmp_path, one_clip):
    for person in ("anna", "bob"):
        copy(one_clip, tmp_path / "people" / person / "1.mp4")
    load(tmp_path / "people")
    cached = set((tmp_path / "cache").rglob("*.clip"))
    assert cached
    load(tmp_path / "people", names={"anna"})
    assert set((tmp_path / "cache").rglob("*.clip")) == cached


def test_signals_end_a_process_tidily_but_for_those_that_nohup_ignores(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as they are where the shell has closed them
    monkeypatch.setattr(sys, "stderr", None)
    kinds = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
    before = [signal.getsignal(kind) for kind in kinds]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        data.set_up_process()
        after = [signal.getsignal(kind) for kind in kinds]
        ending = signal.default_int_handler
        assert after == [ending, signal.SIG_IGN, ending, ending, ending]
        for stream in (sys.stdout, sys.stderr):  # which progress bars need
            stream.write("nobody reads this")
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def test_a_full_disk_is_not_taken_for_the_end_of_a_file(tmp_path, one_clip):
    with pytest.raises(OSError, match="ffmpeg was stopped: No space left"):
        data.decode_video(one_clip, 32, 1.0, "/dev/full")


def test_a_full_disk_of_temporary_files_is_not_taken_for_the_outputs(tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def write(path, content):
        if path.is_relative_to(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(path, content)

    (tmp_path / "full").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    monkeypatch.setattr(Path, "write_bytes", write)
    frames = np.zeros((10, 3, 32, 32), np.uint8)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full/"):
        data.write_video(tmp_path / "out.mp4", frames, np.zeros(6400, np.int16))
    assert not list(tmp_path.glob("*.mp4")) and not list((tmp_path / "full").iterdir())


def test_a_warning_is_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # is set back
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    data.set_up_process()
    note = "a.gif: only the first of its 3 pictures is used"
    assert warnings.formatwarning(note, UserWarning, "train.py", 1) == f"warning: {note}\n"


def test_a_full_disk_for_temporary_files_does_not_cost_the_clip(one_clip, monkeypatch):
    class Full(io.FileIO):
        def __init__(self):
            super().__init__("/dev/full", "w")

        def read(self):
            return b""

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    streams = data.probe(one_clip)
    assert streams.video and streams.sounds


def test_of_a_full_disk_it_is_said_which(tmp_path):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/here.pt'"):
        with data.atomic_write(tmp_path / "here.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_cache_ends_the_reading_and_does_not_cost_the_clip(tmp_path, one_clip, monkeypatch):
    copy(one_clip, tmp_path / "anna" / "1.mp4")

    def fail(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.CacheFile, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        load(tmp_path / "anna")


def test_links_in_a_circle_neither_hang_nor_make_copies(tmp_path, one_clip):
    root = tmp_path / "people"
    for person in ("anna", "bob"):
        copy(one_clip, root / person / "1.mp4")
        (root / person / "loop").symlink_to("..")
    (root / "anna" / "friend").symlink_to("../bob")
    (root / "anna" / "itself.mp4").symlink_to("itself.mp4")
    copy(one_clip, tmp_path / "elsewhere" / "1.mp4")
    (root / "carl").symlink_to(tmp_path / "elsewhere")
    dataset = load(root)
    assert {name: [clip.name for clip in clips] for name, clips in dataset.people.items()} == {
        name: ["1"] for name in ("anna", "bob", "carl")
    }
    assert reasons(dataset).keys() == {"loop", "friend", "itself.mp4"}


def test_a_missing_dataset_names_its_neighbour(tmp_path):
    (tmp_path / "synthetic").mkdir()
    with pytest.raises(ValueError, match="no dataset at .*sinthetic; did you mean .*synthetic"):
        load(tmp_path / "sinthetic")
    with pytest.raises(ValueError, match="no video .* in "):
        load(tmp_path / "synthetic")


# ---------------------------------------------------------------- whose clip is it?


LAYOUTS = {  # {person: paths of clips}
    "LRS3": {"id1": "pretrain/id1/00001.mp4 test/id1/00001.mp4", "id2": "trainval/id2/50001.mp4"},
    "LRS2": {"553541569906": "main/553541569906/00001.mp4", "633155": "main/633155/00002.mp4"},
    "LRS2 with two parts": {"55": "mvlrs_v1/main/55/1.mp4 mvlrs_v1/pretrain/55/1.mp4"},
    "VoxCeleb2": {
        "id00012": ("dev/mp4/id00012/21Uxsk56VDQ/00001.mp4 dev/mp4/id00012/--cL39MXZ9g/00001.mp4"),
        "id00017": "test/mp4/id00017/2A5tWbHxc3k/00001.mp4",
    },
    "VoxCeleb, cut": {
        "id10281": "id10281#21Uxsk56VDQ#001.mp4 id10281#--cL39MXZ9g#001.mp4",
        "id10282": "id10282#2A5tWbHxc3k#001.mp4",
    },
    "HDTF": {
        "RD_Radio1": "RD_Radio1_000.mp4 RD_Radio1_001.mp4",
        "RD_Radio10": "RD_Radio10_000.mp4",
        "Some": "WDA_Some1_000.mp4 WRA_Some2_003.mp4",
    },
    "HDTF, resampled": {
        "RD_Radio1": "RD_Radio1_000_25fps.mp4",
        "Some": "WDA_Some1_000_25fps.mp4 WRA_Some2_003_25fps.mp4",
    },
    "VFHQ": {
        "2A5tWbHxc3k": "Clip+2A5tWbHxc3k+P0+C0+F1537-1825.mp4 Clip+2A5tWbHxc3k+P0+C1+F10-99.mp4",
        "--cL39MXZ9g": "Clip+--cL39MXZ9g+P1+C0+F1-200.mp4",
    },
    "CREMA-D": {
        "1001": "1001_DFA_ANG_XX.flv 1001_ITH_SAD_X.flv",
        "1002": "1002_DFA_HAP_HI.flv",
    },
    "CREMA-D in a folder": {
        "1001": "VideoFlash/1001_DFA_ANG_XX.flv",
        "1002": "VideoFlash/1002_DFA_ANG_XX.flv",
    },
    "GRID": {"s1": "s1/bbaf2n.mpg s1/bbaf3s.mpg", "s2": "s2/bbaf2n.mpg"},
    "GRID with its folders": {
        "s1": "s1/video/mpg_6000/bbaf2n.mpg",
        "s2": "s2/video/mpg_6000/bbaf2n.mpg",
    },
    "MEAD": {
        "M003": "M003/video/front/angry/level_1/001.mp4 M003/video/left_30/sad/level_1/001.mp4",
        "W009": "W009/video/front/angry/level_2/001.mp4",
    },
    "RAVDESS": {"01": "Actor_01/01-01-01-01-01-01-01.mp4", "02": "01-01-01-01-01-01-02.mp4"},
    "CelebV-HQ": {
        "2A5tWbHxc3k": "2A5tWbHxc3k_0.mp4 2A5tWbHxc3k_1.mp4",
        "--cL39MXZ9g": "--cL39MXZ9g_0.mp4",
    },
    "a folder per person": {"anna": "anna/1.mp4 anna/holiday.mov", "bob": "bob/anna_1.mp4"},
    "one person": {
        "me": "IMG_1234.MOV IMG_1235.MOV VID_20240105_1.mp4 VID_20240106_2.mp4 talk.mp4 x.mp4"
    },
    "one person, two cameras": {"me": "C0001.MP4 C0002.MP4 DJI_0001.MP4 DJI_0002.MP4"},
    "one person, parts": {
        "me": "IMG_12_1.mp4 IMG_12_2.mp4 IMG_13_1.mp4 GX07_1.mp4 GX07_2.mp4 GX08_1.mp4"
    },
    "one person, two programs": {
        "me": "WhatsApp_at_10.11.12.mp4 WhatsApp_at_10.11.13.mp4 Movie_on_05.01.24.mp4 IMG_E12.MOV"
    },
    "one person, titles": {"me": "hello_1.mp4 talk_2.mp4 holiday_2.mp4"},
    "words in no pattern": {"me": "talk_1.mp4 talk_2.mp4 holiday.mp4 001.mp4 002.mp4"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("above", ["me", "lrs3_v0.4/me", "data/test/me", "id00012/me"])
def test_people_of_known_layouts_are_found_at_any_depth(layout, above):
    expected = {}
    for person, paths in LAYOUTS[layout].items():
        expected |= {f"/d/{above}/{path}": person for path in paths.split()}
    assigned, left_out = data.assign_people(list(expected), f"/d/{above}")
    assert {path: person for path, (person, _) in assigned.items()} == expected
    assert left_out == [] and len(set(assigned.values())) == len(assigned)


KNOWN = ["LRS3", "LRS2", "VoxCeleb2", "HDTF", "CREMA-D", "MEAD", "GRID", "a folder per person"]


@pytest.mark.parametrize("layout", KNOWN)
def test_one_person_alone_has_the_same_name(layout):
    for person, paths in LAYOUTS[layout].items():
        assigned, _ = data.assign_people([f"/d/{path}" for path in paths.split()], "/d")
        assert {name for name, _ in assigned.values()} == {person}


@pytest.mark.parametrize(
    "paths, words",
    [
        (
            "corpus1/anna/1.mp4 corpus2/anna/1.mp4 corpus2/bob/1.mp4",
            "unclear who the person in corpus1/anna",
        ),
        ("train/1.mp4 test/2.mp4", "unclear who the person in train is: .* named after the person"),
        ("2024-01-05/1.mp4 2024-01-06/1.mp4", "unclear who the person in 2024-01-05"),
        ("ABOUT/train/ABOUT_00001.mp4 AFTER/train/AFTER_00001.mp4", "unclear"),
        ("anna_1.mp4 anna_2.mp4 bob_1.mp4 bob_2.mp4", "several people .anna, bob"),
        ("anna1.mp4 anna2.mp4 bob1.mp4 bob2.mp4", "several people .anna, bob"),
        ("anna_1.mp4 bob_1.mp4 cara_1.mp4", "several people .anna, bob, cara"),
        ("anna².mp4 bob².mp4", "several people .anna², bob²"),
        ("sub01-a.mp4 sub01-b.mp4 sub02-a.mp4 sub02-b.mp4", "several people .sub01, sub02"),
        (
            "speaker_01_1.mp4 speaker_01_2.mp4 speaker_02_1.mp4 speaker_02_2.mp4",
            "several people .speaker_01, speaker_02 .* if it is one person, rename them",
        ),
        ("spk-1-a.mp4 spk-1-b.mp4 spk-2-a.mp4 spk-2-b.mp4", "several people .spk-1, spk-2"),
        ("conference1_0.mp4 conference1_1.mp4 conference2_0.mp4", "conference1, conference2"),
        ("JohnSmith01_1.mp4 JohnSmith01_2.mp4 JannetDoe01_1.mp4", "JannetDoe01, JohnSmith01"),
        ("b1-take-one_1.mp4 b1-take-one_2.mp4 b2-take-one_1.mp4 b2-take-one_2.mp4", "b1, b2"),
        ("john_smith_01.mp4 john_smith_02.mp4 jane_doe_1.mp4", "several people .jane, john"),
        ("rec_anna_1.mp4 rec_anna_2.mp4 session2_bob_1.mp4", "several people .anna, bob"),
        ("1-anna.mp4 2-anna.mp4 3-bob.mp4", "several people .anna, bob"),
        ("3-anna-1.mp4 4-bob-1.mp4", "several people .anna, bob"),
        ("clip_anna_a.mp4 clip_anna_b.mp4 clip_bob_a.mp4", "several people .anna, bob"),
        ("train/real/1.mp4 train/fake/2.mp4", "unclear who the person in real"),
        ("batch_1/1.mp4 batch_2/1.mp4", "unclear who the person in batch_1"),
        ("day1/1.mp4 day2/1.mp4", "unclear who the person in day1"),
        ("cam-2/1.mp4 raw/1.mp4", "unclear who the person in cam-2"),
        ("anna/test/in/1.mp4 anna/train/in/2.mp4 bob/test/in/3.mp4", "unclear who in is"),
        ("anna/main/english/1.mp4 bob/main/english/2.mp4", "unclear who english is"),
        # times of day that look like RAVDESS's names, and dates like CREMA-D's
        ("anna/24-01-05-12-30-45-01.mp4 bob/24-02-05-12-30-45-01.mp4", "unclear who 01 is"),
        ("anna/2023_DEC_NYC_A.mp4 bob/2023_DEC_NYC_B.mp4", "unclear who 2023 is"),
        ("here/M001/video/a/b/c/1.mp4 there/M001/video/a/b/c/2.mp4", "unclear who M001 is"),
    ],
)
def test_where_people_may_be_mixed_up_clips_are_refused(paths, words):
    assigned, left_out = data.assign_people([f"/d/{path}" for path in paths.split()], "/d")
    assert assigned == {} and re.search(words, left_out[0][1])


def test_folders_above_the_dataset_tell_nothing_about_people():
    for above in ("id00012", "s1/video", "M003/video/front/angry", "main", "train/x"):
        paths = [f"/d/{above}/{name}/00001.mp4" for name in ("anna", "bob")]
        assigned, _ = data.assign_people(paths, f"/d/{above}")
        assert list(assigned.values()) == [("anna", "00001"), ("bob", "00001")]


def test_an_accent_written_in_two_ways_is_one_name():
    paths = ["/d/Jos\u00e9/1.mp4", "/d/Jose\u0301/2.mp4", "/d/Jose\u0301/1.mp4", "/d/bob/1.mp4"]
    assigned, left_out = data.assign_people(paths, "/d")
    assert list(assigned.values()) == [("Jos\u00e9", "1"), ("Jos\u00e9", "2"), ("bob", "1")]
    assert left_out[0][0] == paths[2] and "rename it if it is no copy" in left_out[0][1]


@pytest.mark.parametrize(
    "known, strange",
    [
        ("2A5tWbHxc3k_0", "ABCDEFGHIJK_0 zyxwvutsrqp_0"),
        ("WDA_Name0_000", "WDA_AOC_Test_000 talk"),
        ("1001_DFA_ANG_XX", "intro"),
    ],
)
def test_files_of_a_known_layout_leave_strange_names_to_nobody(known, strange):
    paths = [f"/d/set/{name}.mp4" for name in [known, *strange.split()]]
    assigned, left_out = data.assign_people(paths, "/d")
    assert list(assigned) == paths[:1] and [path for path, _ in left_out] == paths[1:]
    assert all("its name does not tell whose it is" in reason for _, reason in left_out)


def test_clips_beside_the_folders_of_people_and_copies_are_left_out():
    paths = ["/d/anna/1.mp4", "/d/anna/1.MOV", "/d/bob/1.mp4", "/d/stray.mp4"]
    assigned, left_out = data.assign_people(paths, "/d")
    assert assigned == {"/d/anna/1.mp4": ("anna", "1"), "/d/bob/1.mp4": ("bob", "1")}
    assert [(Path(path).name, reason.split(":")[0]) for path, reason in left_out] == [
        ("1.MOV", "it is named as /d/anna/1.mp4"),
        ("stray.mp4", "it lies beside the folders of people"),
    ]


def test_a_file_has_its_own_name_even_if_it_is_the_name_of_its_person():
    paths = ["/d/me/me.mp4", "/d/me/me/2.mp4", "/d/me/anna/anna.mp4"]
    assigned, _ = data.assign_people(paths, "/d/me")
    assert assigned["/d/me/me/2.mp4"] == ("me", "2")
    assert assigned["/d/me/anna/anna.mp4"] == ("anna", "anna")
    assert data.assign_people(paths[:1], "/d/me")[0] == {"/d/me/me.mp4": ("me", "me")}


def test_names_that_are_not_utf8_can_be_printed(tmp_path, one_clip, capsys):
    folder = os.fsdecode(b"Andr\xe9")
    copy(one_clip, tmp_path / "in" / folder / "1.mp4", tmp_path / "in" / "anna" / "1.mp4")
    (tmp_path / "in" / folder / os.fsdecode(b"\xe9.mp4")).touch()
    dataset = load(tmp_path / "in")
    assert sorted(dataset.people) == [r"Andr\xe9", "anna"] and len(dataset.clips) == 2
    data.print_troubles(dataset)
    assert r"Andr\xe9/\xe9.mp4: the file is empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["anna", "Anna ", "\uff21nna"])  # a full-width A
def test_people_whose_names_look_alike_are_noted(tmp_path, grey_clips, name):
    for source, person in zip(grey_clips, ("Anna", name, "bob")):
        copy(source, tmp_path / "in" / person / "1.mp4")
    ((path, note),) = load(tmp_path / "in").notes
    assert path == str(tmp_path / "in" / name)
    assert note == f"{name} and Anna are taken for two people, though they look alike"


def test_a_name_that_is_only_a_date_is_nobodys():
    assert data.several_people(["20240105", "20240106_2"]) == []
    assert data.several_people(["20240105", "anna_1", "anna_2", "bob_1"]) == ["anna", "bob"]


def test_numbered_people_and_videos_are_people():
    assert data.several_people(["P01", "P02", "P03"]) == ["P01", "P02", "P03"]
    assert data.several_people(["subject_1", "subject_2"]) == ["subject_1", "subject_2"]
    assert data.several_people(["p1", "p2"]) == []  # pages or parts
    assert data.several_people(["1Ab-dEfGhIj_0", "1Ab-dEfGhIj_1"]) == []
    cut = ["1Ab-dEfGhIj_12.5_15.1", "zZ9_dEfGhIj_3.0_6.4"]  # AVSpeech
    assert data.several_people(cut) == ["1Ab-dEfGhIj", "zZ9_dEfGhIj"]


def test_folders_whose_names_suggest_several_people_are_noted(tmp_path, grey_clips):
    names = ("anna_1", "anna_2", "bob_1", "bob_2")
    copy(grey_clips[0], tmp_path / "in" / "dora" / "1.mp4")
    for source, name in zip(grey_clips, names):
        copy(source, tmp_path / "in" / "group" / f"{name}.mp4")
    dataset = load(tmp_path / "in")
    (_, copied), (path, note) = dataset.notes
    assert "the same picture and sound as" in copied and copied.endswith("of another person")
    assert path == str(tmp_path / "in" / "group")
    assert note == "the names suggest several people (anna, bob ...), taken for one"


def test_folders_that_may_be_of_one_person_are_noted(tmp_path, grey_clips):
    root = tmp_path / "in"
    paths = ["anna/test/kitchen", "anna/train/garden", "lrs3/test/bob", "lrs3/trainval/cara"]
    for source, path in zip(grey_clips, paths):
        copy(source, root / path / "1.mp4")
    note = "the folders in it are taken for people of their own"
    assert sorted(load(root).notes) == [
        (str(root / "anna"), f"{note} (garden, kitchen ...)"),
        (str(root / "lrs3"), f"{note} (bob, cara ...)"),
    ]
    shutil.rmtree(root / "anna")
    assert load(root).notes == []
    # Here the file's name tells the person, in whatever folders it lies.
    copy(grey_clips[0], root / "crema" / "actors" / "1001" / "1001_DFA_ANG_XX.mp4")
    # Here a folder above does (GRID).
    copy(grey_clips[1], root / "s1" / "video" / "mpg_6000" / "bbaf2n.mp4")
    assert load(root).notes == [(str(root / "lrs3"), f"{note} (bob, cara ...)")]


# ---------------------------------------------------------------- the cache


def count_decoding(monkeypatch):
    decoded = []
    decode = data.decode_video

    def counted(path, *arguments):
        decoded.append(Path(path).name)
        return decode(path, *arguments)

    monkeypatch.setattr(data, "decode_video", counted)
    return decoded


def test_a_file_is_decoded_once_until_it_changes_and_nothing_is_written_beside_it(
    tmp_path, monkeypatch
):
    decoded = count_decoding(monkeypatch)
    root = tmp_path / "people"
    write_clip(root / "anna" / "1.mp4", level=90)
    write_clip(root / "anna" / "2.mp4", level=50)
    load(root)
    first = load(root)
    assert sorted(decoded) == ["1.mp4", "2.mp4"] and abs(first.clips[1].frames.mean() - 50) < 4
    write_clip(root / "anna" / "2.mp4", level=200)
    second = load(root)
    assert decoded[2:] == ["2.mp4"] and abs(second.clips[1].frames.mean() - 200) < 4
    assert len(list((tmp_path / "cache").rglob("*.clip"))) == 2  # the stale one is gone
    load(root, size=16)
    assert len(list((tmp_path / "cache").rglob("*.clip"))) == 4
    (root / "anna" / "1.mp4").unlink()
    load(root, size=16)
    assert len(list((tmp_path / "cache").rglob("*.clip"))) == 3
    assert sorted(p.name for p in root.rglob("*")) == ["2.mp4", "anna"]


def test_a_dataset_opened_through_a_link_is_not_decoded_again(tmp_path, one_clip, monkeypatch):
    decoded = count_decoding(monkeypatch)
    copy(one_clip, tmp_path / "people" / "anna" / "1.mp4")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "people").symlink_to(tmp_path / "people")
    cache = tmp_path / "cache"
    for root in (tmp_path / "people", tmp_path / "elsewhere" / "people"):
        assert len(load(root, cache=cache).clips) == 1
    assert decoded == ["1.mp4"]


def damage_end(content):
    return content[:-1000]


def damage_records(content):
    """A whole number of frames less, with their sound and spectrogram."""
    return content[: -3 * (3 * 32 * 32 + 1280 + 640)]


def damage_middle(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def damage_all(content):
    return b"something else\n{}"


@pytest.mark.parametrize("damage", [damage_end, damage_records, damage_middle, damage_all])
def test_a_damaged_cache_file_is_made_anew(tmp_path, one_clip, damage):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    clip = load(tmp_path / "anna").clips[0]
    frames, audio, mel = clip.frames.copy(), clip.audio.copy(), clip.mel.copy()
    cached = next((tmp_path / "cache").rglob("*.clip"))
    content = cached.read_bytes()
    cached.write_bytes(damage(content))
    again = load(tmp_path / "anna").clips[0]
    assert np.array_equal(again.frames, frames) and np.array_equal(again.audio, audio)
    assert np.array_equal(again.mel, mel) and cached.read_bytes() == content


def test_a_cache_that_disappears_while_it_is_used_is_made_anew(tmp_path, one_clip):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    clip = load(tmp_path / "anna").clips[0]
    shutil.rmtree(tmp_path / "cache")
    assert clip.frames.shape == (16, 3, 32, 32) and clip.mel.shape == (64, 40)


def test_caches_that_nobody_uses_are_deleted_but_no_other_folder(tmp_path, one_clip):
    copy(one_clip, tmp_path / "anna" / "1.mp4", tmp_path / "bob" / "1.mp4")
    load(tmp_path / "bob")
    old = next((tmp_path / "cache").iterdir())
    mine = tmp_path / "cache" / "mine.clips"
    mine.mkdir()
    for folder in (old, mine):
        os.utime(folder, (0, time.time() - 31 * 86400))
    load(tmp_path / "anna")
    assert not old.exists() and mine.exists() and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", ["CACHE_VERSION", "MEL_STD", "SILENCE", "QUIETEST"])
def test_what_was_decoded_otherwise_is_not_used(tmp_path, monkeypatch, name):
    before = data.open_cache(tmp_path, tmp_path / "people", 64, 1.0, None)
    assert data.open_cache(tmp_path, tmp_path / "people", 64, 1.0, None) == before
    monkeypatch.setattr(data, name, getattr(data, name) + 1)
    assert data.open_cache(tmp_path, tmp_path / "people", 64, 1.0, None) != before


def test_clips_of_another_crop_or_face_finder_are_not_used(tmp_path):
    finders = [None] + [SimpleNamespace(fingerprint=lambda own=own: own) for own in "ab"]
    settings = [(crop, finder) for crop in (1.0, 0.9) for finder in finders]
    folders = [data.open_cache(tmp_path, tmp_path / "people", 64, *own) for own in settings]
    assert len(set(folders)) == 6
    assert data.open_cache(tmp_path, tmp_path / "people", 64, *settings[-1]) == folders[-1]


def test_what_killed_runs_left_in_the_cache_is_deleted_after_a_day(tmp_path, one_clip):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    load(tmp_path / "anna")
    folder = next((tmp_path / "cache").iterdir())
    old, new = folder / ".0123456789abcdef.clip", folder / ".fedcba9876543210.clip"
    old.touch()
    new.touch()
    os.utime(old, (0, time.time() - 25 * 3600))
    load(tmp_path / "anna")
    assert not old.exists() and new.exists()


def test_a_cache_that_cannot_be_written_is_refused_or_replaced(tmp_path, one_clip, monkeypatch):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no cache .* can be written .*: name another folder"):
        load(tmp_path / "anna", cache=tmp_path / "file")
    monkeypatch.setattr(
        data, "__file__", str(tmp_path / "file" / "data.py")
    )  # as if it could not be written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert len(TalkingHeads(tmp_path / "anna", 16).clips) == 1
    assert list((tmp_path / "user" / "privfedtalk").rglob("*.clip"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # who has no home either
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no cache"):
        TalkingHeads(tmp_path / "anna", 16)
    assert not Path("~").exists()


def test_thousands_of_links_are_decoded_once_and_opened_one_at_a_time(
    tmp_path, grey_clips, monkeypatch
):
    decoded = count_decoding(monkeypatch)
    for i in range(3):
        copy(grey_clips[i], tmp_path / "files" / f"{i}.mp4")
    for i in range(1500):
        person = tmp_path / "people" / f"p{i // 3:03d}"
        person.mkdir(parents=True, exist_ok=True)
        (person / f"{i}.mp4").symlink_to(f"../../files/{i % 3}.mp4")
    dataset = load(tmp_path / "people")
    assert len(dataset.clips) == 1500 and len(dataset.people) == 500 and len(decoded) == 3
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or real(folder))
    started = time.process_time()
    dataset = load(tmp_path / "people")
    assert len(dataset.clips) == 1500 and time.process_time() - started < 2
    assert len(listed) == 500  # each folder once, for the sound beside its links
    assert len({id(clip.frames) for clip in dataset.clips}) <= 3


def test_copies_of_a_clip_count_once_for_a_person(tmp_path, one_clip):
    copy(one_clip, *(tmp_path / "in" / name for name in ("a/1.mp4", "a/1 (1).mp4", "b/1.mp4")))
    (tmp_path / "in" / "a" / "2.mp4").symlink_to("1.mp4")
    write_clip(tmp_path / "in" / "a" / "3.mp4", level=50)
    dataset = load(tmp_path / "in")
    assert [(clip.person, clip.name) for clip in dataset.clips] == [
        ("a", "1 (1)"),
        ("a", "3"),
        ("b", "1"),
    ]
    first = tmp_path / "in" / "a" / "1 (1).mp4"
    same = f"the same picture and sound as {first}"
    assert reasons(dataset) == {"1.mp4": same, "2.mp4": same}


def test_a_link_is_heard_with_the_sound_beside_it(tmp_path, mute_clip):
    copy(mute_clip, tmp_path / "raw.mp4")
    for person, hz in (("anna", 300), ("bob", 3000)):
        folder = tmp_path / "in" / person
        folder.mkdir(parents=True)
        (folder / "1.mp4").symlink_to(tmp_path / "raw.mp4")
        ffmpeg("-f", "lavfi", "-i", f"sine=f={hz}:d=0.64", folder / "1.wav")
    anna, bob = load(tmp_path / "in").clips
    assert not np.array_equal(anna.audio, bob.audio)
    assert anna.fingerprint != bob.fingerprint  # which makes another backbone


def test_more_clips_than_memory_maps_are_kept(tmp_path, one_clip):
    copy(one_clip, tmp_path / "anna" / "1.mp4")
    file = load(tmp_path / "anna").clips[0].__dict__["_frames"]
    data.CacheFile.arrays.cache_clear()
    for _ in range(1500):
        twin = data.CacheFile(file.path, file.source, file.size, file.crop)
        twin.verified = True
        twin.arrays()
    assert data.CacheFile.arrays.cache_info().currsize == 1024


# ---------------------------------------------------------------- people, splits and batches


def test_people_are_disjoint_and_keep_their_roles():
    names = [f"speaker{i}" for i in range(20)]
    public, clients, unseen = data.split_people(names, 6, 4, seed=1)
    assert (len(clients), len(unseen)) == (6, 4) and sorted(public + clients + unseen) == sorted(
        names
    )
    assert data.split_people(names[::-1], 6, 4, seed=1) == (public, clients, unseen)
    assert data.split_people(names, 6, 4, seed=2) != (public, clients, unseen)
    roles = ["public-0", "public-1", "client-0", "client-1", "client-2", "unseen-0"]
    assert data.split_people(roles, 2, 1, 0) == (
        ["public-0", "public-1"],
        ["client-0", "client-1"],
        ["unseen-0"],
    )
    assert "unseen-1" not in data.split_people([*roles, "unseen-1"], 2, 1, 0)[0]
    for few in (["anna"], roles):
        with pytest.raises(ValueError, match="cannot be split"):
            data.split_people(few, 4, 1, 0)


def test_who_has_too_few_clips_to_split_is_no_client(tmp_path, monkeypatch):
    names = [f"speaker{i}" for i in range(8)] + ["client-0", "unseen-0"]
    few = {"speaker0", "speaker1", "client-0", "unseen-0"}
    public, clients, unseen = data.split_people(names, 4, 1, seed=1, no_clients=few)
    assert len(clients) == 4 and not few & set(clients)
    # nothing is trained in the clear on somebody who is named a client
    assert unseen == ["unseen-0"] and "client-0" not in public
    single = {*names[:7], "client-0"}
    unseen = data.split_people(names, 1, 2, 1, few | {"speaker7"}, single)[2]
    assert unseen == ["speaker7", "unseen-0"]
    assert len(data.split_people(names, 1, 3, 1, few | {"speaker7"}, single)[2]) == 3
    for i in range(10, 22):
        for k in range(2 if i < 19 else 3):
            write_clip(tmp_path / "in" / f"p{i}" / f"{k}.mp4", level=3 * (3 * i + k))
    people = data.load_people(tmp_path / "in", 16, 1.0, 3, 1, 0, cache=tmp_path / "cache")
    assert set(people.clients) == {"p19", "p20", "p21"}
    with pytest.raises(ValueError, match="12 people .9 with fewer than 3 clips. cannot be split"):
        data.load_people(tmp_path / "in", 16, 1.0, 4, 1, 0, cache=tmp_path / "cache")
    monkeypatch.setattr(data, "by_take", lambda clips: [clips])  # all of one take
    with pytest.raises(ValueError, match="12 people .12 with fewer than 3 clips. cannot be split"):
        data.load_people(tmp_path / "in", 16, 1.0, 3, 1, 0, cache=tmp_path / "cache")


def test_a_clip_that_two_people_have_trains_and_tests_nobody(tmp_path, capsys):
    for i in range(12):
        for k in range(4):
            write_clip(tmp_path / "in" / f"p{i}" / f"{k}.mp4", level=4 * (4 * i + k))
    shutil.copy(tmp_path / "in" / "p3" / "1.mp4", tmp_path / "in" / "p7" / "another.mp4")
    roles = data.load_people(tmp_path / "in", 16, 1.0, 2, 1, 0, cache=tmp_path / "cache")
    people = roles.public | roles.clients | roles.unseen
    assert [clip.name for clip in people["p3"]] == ["0", "2", "3"]
    assert [clip.name for clip in people["p7"]] == ["0", "1", "2", "3"]
    assert capsys.readouterr().out.count("the same picture and sound are of p3, p7") == 2


def test_clients_with_too_few_clips_of_their_face_are_named(monkeypatch):
    everybody = {
        name: [clip_of(name, str(i)) for i in range(3)] for name in ("anna", "bob", "carl")
    }
    people = data.People(
        {}, {name: everybody[name] for name in ("anna", "bob")}, {"carl": everybody["carl"][:1]}
    )
    found = SimpleNamespace(clips=[*everybody["anna"], *everybody["bob"], everybody["carl"][0]])
    monkeypatch.setattr(train, "read_clips", lambda *arguments: found)
    config = {"data": {"root": "in"}, "backbone": {"num_frames": 8}}
    assert len(train.find_faces(config, people, None).unseen["carl"]) == 1
    # what two people have was left out before, and stays so
    found.clips.append(clip_of("anna", "7"))
    assert len(train.find_faces(config, people, None).clients["anna"]) == 3
    found.clips.remove(everybody["bob"][0])
    with pytest.raises(ValueError, match="face is found in fewer than 3 clips of bob$"):
        train.find_faces(config, people, None)


def test_prompts_that_are_cut_off_are_counted(monkeypatch, capsys):
    prompts = ("a b c d e f g h", "a b c d e f g h i", "")
    clips = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    monkeypatch.setattr(data, "load_people", lambda *_: data.People({}, {"anna": clips}, {}))
    train.load_people(train.load_config(train.DEFAULTS))
    assert capsys.readouterr().out == "note: prompts of 1 clips are cut off after 8 words\n"


def test_talkers_that_another_run_was_faster_to_make_are_used(tmp_path, monkeypatch):
    few = partial(data.make_synthetic, num_public=8, clips_per_client=3, seconds=0.4)
    draw = data.in_threads

    def draw_twice(*arguments):
        monkeypatch.setattr(data, "in_threads", draw)
        few(tmp_path / "synthetic-small", num_clients=made, num_unseen=0, size=16, seed=0)
        return draw(*arguments)

    monkeypatch.setattr(data, "make_synthetic", few)
    options = {"size": 16, "crop": 1.0, "num_unseen": 0, "seed": 0, "cache": tmp_path / "cache"}
    for made, error in ((2, None), (1, "was made with another num_clients")):
        monkeypatch.setattr(data, "in_threads", draw_twice)
        with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
            people = data.load_people(tmp_path / "synthetic-small", num_clients=2, **options)
        assert len(people.clients) == 2
        assert [path.name for path in tmp_path.glob("*synthetic*")] == ["synthetic-small"]
        shutil.rmtree(tmp_path / "synthetic-small")


def test_people_are_loaded_by_role_and_the_synthetic_ones_made_first(tmp_path, capsys, monkeypatch):
    few = partial(
        data.make_synthetic, num_public=8, clips_per_public=1, clips_per_client=3, seconds=0.4
    )
    monkeypatch.setattr(data, "make_synthetic", few)
    cache = tmp_path / "cache"
    options = {"size": 16, "crop": 1.0, "num_unseen": 1, "seed": 0, "cache": cache}
    people = data.load_people(tmp_path / "synthetic-small", num_clients=2, **options)
    assert [len(role) for role in people] == [8, 2, 1] and set(people.clients) == {
        "client-000",
        "client-001",
    }
    assert people.unseen["unseen-000"][0].frames.shape == (10, 3, 16, 16)
    (tmp_path / "synthetic-small" / "public-000" / "bad.mp4").write_text("text")
    capsys.readouterr()
    data.load_people(tmp_path / "synthetic-small", num_clients=2, **options)
    printed = capsys.readouterr().out
    assert "public-000/bad.mp4: a text file" in printed
    assert "note: 1 unseen people have one clip only and are not measured: unseen-000" in printed
    with pytest.raises(ValueError, match="synthetic-small was made with another num_clients: rem"):
        data.load_people(tmp_path / "synthetic-small", num_clients=3, **options)
    people = data.load_people(tmp_path / "synthetic-small", num_clients=1, **options)
    assert [len(role) for role in people] == [8, 1, 1]  # fewer can be used
    changed = options | {"seed": 1, "size": 32}
    with pytest.raises(ValueError, match="made with another size, seed: "):
        data.load_people(tmp_path / "synthetic-small", num_clients=2, **changed)
    with pytest.raises(ValueError, match="cannot be split into 2 clients"):
        data.load_people(tmp_path / "synthetic-small", num_clients=2, **options, min_frames=11)
    assert "only 10 frames long, backbone.num_frames needs 11" in capsys.readouterr().out
    record = tmp_path / "synthetic-small" / "options.json"
    for nonsense in ("", "[1, 2]", '{"seed": "x"}', '{"seed": null}'):
        record.write_text(nonsense)
        with pytest.raises(ValueError, match="options.json is not what made the talkers: remove"):
            data.load_people(tmp_path / "synthetic-small", num_clients=2, **options)
    record.write_text("{}")  # of another version
    with pytest.raises(ValueError, match="made with another num_clients, num_unseen, size, "):
        data.load_people(tmp_path / "synthetic-small", num_clients=2, **options)
    record.unlink()  # as if somebody else had made it
    with pytest.raises(ValueError, match="cannot be split into 3 clients"):
        data.load_people(tmp_path / "synthetic-small", num_clients=3, **options)
    with pytest.raises(ValueError, match="no dataset"):
        data.load_people(tmp_path / "other", num_clients=2, **options)


def test_talkers_made_by_hand_are_not_mistaken_for_others(tmp_path):
    root = tmp_path / "synthetic-own"
    people = "--num-public 8 --num-clients 2 --num-unseen 0 --clips-per-public 1"
    people += " --clips-per-client 3 --size 16 --seconds 0.4"
    assert data.main(["--make", str(root), *people.split()]) is None
    with pytest.raises(ValueError, match="made with another num_unseen, seed: "):
        data.load_people(root, 16, 1.0, 2, 1, 0, tmp_path / "cache")
    assert len(data.load_people(root, 16, 1.0, 2, 0, 1, tmp_path / "cache").public) == 8


def test_long_names_become_different_short_ones():
    titles = ["\u4e00" * 100 + end for end in ("a", "b")]
    names = {data.short_name(title) for title in titles}
    assert len(names) == 2 and all(len(os.fsencode(name)) < 160 for name in names)
    assert data.short_name("client-000-00001") == "client-000-00001"


def test_one_worker_of_a_machine_prints(tmp_path, monkeypatch, capsys):
    troubles = SimpleNamespace(skipped=[(Path("a.mp4"), "is empty")], notes=[], root=tmp_path)
    for rank, printed in (("0", "skipped: a.mp4: is empty\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        data.print_troubles(troubles)
        assert capsys.readouterr().out == printed


def clip_of(person, name, num_frames=30):
    """A clip whose pixels give its name (red) and the time (green)."""
    frames = np.zeros((num_frames, 3, 8, 8), np.uint8)
    frames[:, 0] = int(name)
    frames[:, 1] = np.arange(num_frames)[:, None, None]
    mel = np.repeat(np.arange(4 * num_frames, dtype=np.float32)[:, None], 40, 1)
    return data.Clip(
        person, name, Path(person, name), frames, np.zeros(num_frames * 640, np.int16), mel
    )


def test_the_clips_of_a_person_are_split():
    for num_clips, expected in ((8, [4, 2, 2]), (10, [6, 2, 2]), (3, [1, 1, 1])):
        clips = [clip_of("a", str(i)) for i in range(num_clips)]
        parts = data.split_clips(clips, seed=0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == expected
        assert sorted(id(c) for part in parts.values() for c in part) == sorted(map(id, clips))
    with pytest.raises(ValueError, match="dora has 2 usable clips"):
        data.split_clips([clip_of("dora", "1"), clip_of("dora", "2")], 0)


def test_another_seed_and_another_person_have_another_split():
    clips = [clip_of("a", str(i)) for i in range(30)]
    others = [clip_of("b", str(i)) for i in range(30)]
    splits = [data.split_clips(clips, 0), data.split_clips(clips, 1), data.split_clips(others, 0)]
    names = [tuple(clip.name for clip in split["test"]) for split in splits]
    assert len(set(names)) == 3


@pytest.mark.parametrize("above", ["video-", ""])  # "" of a dataset of one person
def test_what_several_cameras_saw_at_once_is_on_one_side_of_a_split(above):
    clips = []
    for angle in ("front", "left_30", "top"):
        for i in range(5):
            clips.append(replace(clip_of("M003", str(i)), name=f"{above}{angle}-sad-level_1-{i}"))
    parts = data.split_clips(clips, 0).values()
    assert [len(part) for part in parts] == [9, 3, 3]
    assert [len({clip.name[-1] for clip in part}) for part in parts] == [3, 1, 1]
    with pytest.raises(ValueError, match="M003 has 1 usable clips"):
        data.split_clips(clips[::5], 0)


def test_pieces_of_a_clip_stay_aligned():
    clip = clip_of("a", "1")  # of 30 frames
    pieces = data.segment([clip], 0.48)
    assert [len(p.frames) for p in pieces] == [12, 12, 6] and len({p.path for p in pieces}) == 3
    for number, piece in enumerate(pieces):
        start = 12 * number
        assert np.array_equal(piece.frames, clip.frames[start : start + 12])
        assert len(piece.audio) == 640 * len(piece.frames)
        assert np.array_equal(piece.mel, clip.mel[4 * start : 4 * start + 48])
    assert [len(p.frames) for p in data.segment([clip], 2.0)] == [30]
    assert [len(p.frames) for p in data.segment([clip], 1.0)] == [25]


def test_a_batch_is_aligned_and_its_reference_is_outside_of_the_window():
    people = {"a": [clip_of("a", str(i)) for i in range(3)], "b": [clip_of("b", "7")]}

    def level(values):
        return ((values + 1) * 127.5).round()

    batch = data.sample_batch(people, 64, 8, torch.Generator().manual_seed(0))
    assert batch["frames"].shape == (64, 8, 3, 8, 8) and batch["mel"].shape == (64, 8, 20, 40)
    name, time_of = level(batch["frames"][:, 0, 0, 0, 0]), level(batch["frames"][:, :, 1, 0, 0])
    torch.testing.assert_close(batch["mel"][:, :, 8, 0], 4 * time_of)  # frame i and mel 4 i
    assert set(name.tolist()) == {0, 1, 2, 7}
    other, index = level(batch["reference"][:, :2, 0, 0]).T
    assert torch.equal(other == 7, name == 7)  # of the same person
    assert {(a, b) for a, b in zip(name.tolist(), other.tolist()) if a < 7} == {
        (a, b) for a in range(3) for b in range(3)
    }  # and of any of that person's clips
    inside = (index[:, None] == time_of).any(1)
    assert inside[other != name].any() and not inside[other == name].any()
    assert (time_of[:, 0] < 5).any() and (time_of[:, 0] > 15).any()
    again = data.sample_batch(people, 64, 8, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[k], again[k]) for k in ("frames", "mel", "reference"))
    whole = data.sample_batch(people, 4, 30, torch.Generator().manual_seed(0))  # no room beside it
    assert whole["frames"].shape == (4, 30, 3, 8, 8)
    with pytest.raises(ValueError, match="31 frames"):
        data.sample_batch(data.by_person(people["a"], 31), 2, 31, torch.Generator())
    with pytest.raises(ValueError, match="8 frames"):
        data.sample_batch({"a": []}, 2, 8, torch.Generator())


def test_a_batch_holds_the_liveliness_of_its_windows_not_of_its_references():
    calm = clip_of("a", "1")
    lively = replace(calm, frames=calm.frames * np.uint8(3))
    batch = data.sample_batch({"a": [calm, lively]}, 32, 8, torch.Generator().manual_seed(0))
    name = batch["frames"][:, 0, 0, 0, 0]
    expected = torch.where(name > name.min(), lively.liveliness, calm.liveliness)
    assert lively.liveliness > 2 * calm.liveliness and len(name.unique()) == 2
    torch.testing.assert_close(batch["liveliness"], expected)


def test_sound_and_pictures_in_floats_are_refused(tmp_path):
    """Of sound in [-1, 1], as torchaudio reads it, silence would be left; of pictures in [0, 1] black."""
    sound = np.random.RandomState(0).uniform(-1, 1, 640).astype(np.float32)
    frames = np.zeros((1, 3, 8, 8), np.uint8)
    with pytest.raises(TypeError, match="float32.*int16"):
        data.log_mel(sound)
    with pytest.raises(TypeError, match="float32.*int16"):
        data.write_video(tmp_path / "a.mp4", frames, sound)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="float32.*uint8"):
        data.to_float(frames.astype(np.float32))


def test_references_of_the_same_clip_and_people_by_the_root_of_their_clips():
    people = {"a": [clip_of("a", str(i)) for i in range(4)], "b": [clip_of("b", "7")]}
    generator = torch.Generator().manual_seed(0)
    batch = data.sample_batch(people, 600, 8, generator, same_clip=True)
    red = batch["frames"][:, 0, 0, 0, 0]
    assert torch.equal(batch["reference"][:, 0, 0, 0], red)
    assert 370 < (red < red.max()).sum() < 430  # 2 of 3: of four clips and of one


def test_half_of_the_windows_are_mirrored_with_their_reference():
    frames = np.broadcast_to(np.arange(8, dtype=np.uint8), (30, 3, 8, 8))  # grows to the right
    mel = np.zeros((120, 40), np.float32)
    clip = data.Clip("a", "1", Path("1"), frames, np.zeros(0), mel)
    generator = torch.Generator().manual_seed(0)
    batch = data.sample_batch({"a": [clip]}, 64, 8, generator, same_clip=True, mirror=True)
    rising = batch["frames"].diff(dim=-1).flatten(1) > 0
    assert 20 < rising.all(1).sum() < 44
    assert torch.equal(rising.any(1), rising.all(1))
    in_reference = batch["reference"].diff(dim=-1).flatten(1) > 0
    assert torch.equal(in_reference.any(1), rising.all(1))
    plain = data.sample_batch({"a": [clip]}, 64, 8, generator)
    assert (plain["frames"].diff(dim=-1) > 0).all()


def test_liveliness_is_the_deviation_over_time_of_grey_places():
    frames = np.full((8, 3, 32, 32), 100, np.uint8)
    frames[::2, :, :16] = 151  # the upper half, by a fifth of the range
    clip = replace(clip_of("a", "1"), frames=frames)
    assert clip.liveliness == pytest.approx(0.1 * 0.5**0.5, rel=0.01)
    still = replace(clip_of("a", "2"), frames=frames[:1].repeat(8, 0))
    assert still.liveliness == 0.002
    assert data.typical_liveliness([clip, still, still]) == 0.002


def test_the_liveliness_of_a_long_clip_takes_little_memory(monkeypatch):
    clip = clip_of("a", "1", num_frames=1200)
    expected = clip.liveliness
    lengths = []
    to_float = data.to_float
    monkeypatch.setattr(data, "to_float", lambda x: lengths.append(len(x)) or to_float(x))
    assert replace(clip).liveliness == pytest.approx(expected)
    assert sum(lengths) == 1200 and max(lengths) <= 512


def test_a_prompt_is_left_out_where_the_reference_shows_it():
    sad = [replace(clip_of("a", "1"), prompt="sad"), replace(clip_of("a", "2"), prompt="sad")]
    generator = torch.Generator().manual_seed(0)
    assert set(data.sample_batch({"a": sad}, 16, 8, generator)["prompt"]) == {""}
    calm = replace(sad[0], prompt="calm")
    both = data.sample_batch({"a": [calm, sad[1]]}, 64, 8, generator)
    assert set(both["prompt"]) == {"", "sad", "calm"}


def test_frames_become_tensors_and_back():
    frames = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    torch.testing.assert_close(data.to_float(frames).flatten(), torch.tensor([-1, -0.6, 1]))
    torch.testing.assert_close(
        data.to_unit(data.to_float(frames)).flatten(), torch.tensor([0, 0.2, 1])
    )
    torch.testing.assert_close(data.to_unit(torch.tensor([-3.0, 3.0])), torch.tensor([0.0, 1.0]))


def test_the_reference_frame_is_a_sharp_view_from_the_front():
    """It is none that faces left or right, is pale and blurred, glaring, or has its eyes closed."""
    face = np.full((64, 64), 60.0)
    face[12:56, 16:48] = 180  # the head
    face[44:48, 26:38] = 90  # a mouth
    closed = face.copy()
    closed[44:48, 26:38] = 60  # more detail where the eyes are not
    face[24:28, 22:28] = face[24:28, 36:42] = 20  # eyes
    pale = 120 + 0.3 * (ndimage.gaussian_filter(face, 2) - 120)
    glaring = 120 + 1.3 * (np.roll(face, 3, 1) - 120)
    others = np.roll(face, 9, 1), np.roll(face, -9, 1), pale, glaring.clip(0, 255)
    frames = np.stack([*others * 20, closed, face])
    frames = frames.repeat(2, 0)  # every second one is looked at
    clip = replace(clip_of("a", "1"), frames=frames[:, None].repeat(3, 1).astype(np.uint8))
    found = data.reference_frame([clip])
    assert (found == face).all()


def test_each_column_of_a_view_changes_what_it_should():
    generator = torch.Generator().manual_seed(0)
    clips = (
        torch.rand(2, 3, 3, 8, 8, generator=generator)
        .repeat_interleave(4, 3)
        .repeat_interleave(4, 4)
    )  # 32 x 32

    def seen(**columns):
        view = torch.zeros(2, 11)
        for name, value in columns.items():
            view[1, data.VIEW_NAMES.index(name)] = value
        return data.augment(clips, view, generator)

    torch.testing.assert_close(seen(), clips, atol=1e-5, rtol=0)
    for name in data.VIEW_NAMES:
        for value in (-1.0, 1.0):
            x = seen(**{name: value})
            assert x.shape == clips.shape and 0 <= x.min() and x.max() <= 1
            torch.testing.assert_close(x[0], clips[0], atol=1e-5, rtol=0)
            assert (name == "mirror" and value > 0) != bool((x[1] - clips[1]).abs().max() > 0.05)
    torch.testing.assert_close(seen(mirror=-1.0)[1], clips[1].flip(-1), atol=1e-5, rtol=0)
    assert seen(brightness=1.0)[1].mean() > clips[1].mean() > seen(brightness=-1.0)[1].mean()
    warm, cold = seen(warmth=1.0)[1].mean((0, 2, 3)), seen(warmth=-1.0)[1].mean((0, 2, 3))
    assert warm[0] / warm[2] > cold[0] / cold[2]
    lit = seen(light_x=1.0)[1] - clips[1]
    assert lit[..., 16:].mean() > 0 > lit[..., :16].mean()


# ---------------------------------------------------------------- synthetic talkers


def test_sound_and_picture_follow_the_true_opening(synthetic):
    """The opening follows loudness and picture; other speech says nothing about it."""
    by_sound, by_picture, by_other = [], [], []
    for clip, next_clip in zip(synthetic.clips, synthetic.clips[1:] + synthetic.clips[:1]):
        loudness, other = (
            c.mel.reshape(len(c.frames), 4, 40)[:, :, :25].mean((1, 2)) for c in (clip, next_clip)
        )
        mouth = clip.frames[:, :, 36:58, 16:48].astype(float)
        change = np.abs(mouth - mouth[clip.opening.argmin()]).mean((1, 2, 3))
        by_sound.append(np.corrcoef(loudness, clip.opening)[0, 1])
        by_other.append(np.corrcoef(other, clip.opening)[0, 1])
        by_picture.append(np.corrcoef(change, clip.opening)[0, 1])
        assert 0 <= clip.opening.min() < 0.1 and clip.opening.max() <= 1
    assert np.mean(by_sound) > 0.8 and np.mean(by_picture) > 0.8 and abs(np.mean(by_other)) < 0.3


def draw_vowel(person, opening, width):
    curve = np.tile([opening, width, 500, 1500, 1, 0], (60, 1))
    motion = data.make_motion(np.random.default_rng(0), person, curve, 5, "calm")
    return data.draw(person, motion, 64)[2, :, 34:58, 18:46].astype(int)


def test_every_vowel_has_a_mouth_of_its_own():
    person = data.make_person(0, "public-000")
    mouths = [draw_vowel(person, *person.mouths[vowel]) for vowel in data.VOWELS]
    for i, mouth in enumerate(mouths):
        for other in mouths[:i]:
            assert np.abs(mouth - other).mean() > 3


def test_an_accent_moves_mouths_but_not_their_sound(tmp_path):
    options = {"num_public": 1, "num_clients": 1, "num_unseen": 0, "seconds": 4, "size": 16}
    options |= {"clips_per_public": 1, "clips_per_client": 1}
    plain, accented = tmp_path / "plain", tmp_path / "accented"
    data.make_synthetic(plain, **options, accent=0.0)
    data.make_synthetic(accented, **options)
    for one, other in zip(load(plain).clips, load(accented).clips):
        assert np.array_equal(one.audio, other.audio)
        assert not np.array_equal(one.opening, other.opening)


def test_clients_share_an_accent_and_everybody_has_one_of_their_own():
    def openings(role, accent):
        people = [data.make_person(0, f"{role}-{i:03d}", accent) for i in range(20)]
        return np.array([[mouth[0] for mouth in p.mouths.values()] for p in people])

    usual = np.array([shape[0] for shape in data.VOWELS.values()])
    assert np.allclose(openings("client", 0.0), usual) and np.allclose(
        openings("public", 0.0), usual
    )
    for role, relation in (("public", 1), ("unseen", 1), ("client", -1)):
        mouths = openings(role, 0.7)
        assert mouths.std(0).min() > 0.02 and mouths.min() >= 0.3 and mouths.max() <= 1
        assert relation * np.corrcoef(mouths.mean(0), usual)[0, 1] > 0.7


def test_the_same_seed_makes_the_same_frames(tmp_path, synthetic):
    data.make_synthetic(
        tmp_path / "again", num_public=1, num_clients=0, num_unseen=0, seed=3, accent=0.0
    )
    data.make_synthetic(tmp_path / "other", num_public=1, num_clients=0, num_unseen=0, seed=4)
    again, other = (load(tmp_path / name, size=64).clips[0] for name in ("again", "other"))
    assert np.array_equal(again.frames, synthetic.people["public-000"][0].frames)
    assert not np.array_equal(again.frames, other.frames)


def test_talkers_are_made_in_an_empty_folder_by_a_thread_for_each_cpu_and_one_more(
    tmp_path, monkeypatch
):
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    threads = []
    thread_map = data.thread_map

    def counted(*args, max_workers, **kwargs):
        threads.append(max_workers)
        return thread_map(*args, max_workers=max_workers, **kwargs)

    monkeypatch.setattr(data, "thread_map", counted)
    data.make_synthetic(".", 1, 0, 0, clips_per_public=1, seconds=0.4, size=16)
    assert len(load(tmp_path / "new").clips) == 1 and threads == [4, 4]


def test_synthetic_talkers_refuse_bad_numbers(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("a file of the user's")
    for options in (
        {},
        {"num_public": -1},
        {"accent": 1.5},
        {"size": 33},
        {"seconds": 0.1},
    ):
        with pytest.raises(ValueError):
            data.make_synthetic(tmp_path / ("e" if options else "d"), **options)
    assert not (tmp_path / "e").exists()


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))  # for its cache
    few = "--num-public 1 --num-clients 1 --num-unseen 1 --clips-per-client 2 --seconds 0.5"
    assert not data.main(["--make", str(tmp_path / "people"), *few.split(), "--size", "32"])
    assert not data.main(["--check", str(tmp_path / "people")])
    out = capsys.readouterr().out
    assert (
        "client-000                    2 clips" in out
        and "3 people                      6 clips" in out
    )
    assert not data.main(["--look", str(tmp_path / "people"), str(tmp_path / "look.png")])
    assert Image.open(tmp_path / "look.png").size == (960, 3 * 110)
    for arguments in (
        ["--check", str(tmp_path / "nowhere")],
        ["--make", str(tmp_path / "people")],
        ["--look", str(tmp_path / "people"), str(tmp_path / "look.gif")],
        ["--check", ""],
        ["--make", str(tmp_path / "new"), "--num-public", "abc"],
        ["--make", str(tmp_path / "new"), "--seconds", "inf"],
        ["--make", str(tmp_path / "new"), "--seconds", "1e12"],
        ["--check", str(tmp_path / "people"), "--clips-per-public", "3"],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            data.main(arguments)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        assert ("is empty" in error) == ("" in arguments)


def test_a_process_whose_parent_has_ended_already_ends():
    for parent, signal_number in ((os.getpid(), 0), (os.getpid() + 1, 9)):
        child = os.fork()
        if child == 0:
            data.die_with_parent(parent)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal_number


@pytest.mark.skipif(not REAL_FACES.is_dir(), reason="../shared/real_faces is not there")
def test_real_faces_load(tmp_path):
    for person in sorted(p for p in REAL_FACES.iterdir() if p.is_dir())[:3]:
        (tmp_path / "in" / person.name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / person.name).symlink_to(person.resolve())
    dataset = load(tmp_path / "in", size=64)
    assert len(dataset.people) == 3 and len(dataset.clips) >= 9 and dataset.skipped == []
    assert all(c.frames.std() > 10 and np.abs(c.audio).max() > 300 for c in dataset.clips)
