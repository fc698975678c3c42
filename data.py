"""Clips of talking people: reading files, assigning people, splits, batches, synthetic talkers.

A clip has 25 frames per second, sound at 16 kHz (frame i spans samples 640 i .. 640 (i + 1)) and a
log-mel spectrogram of four steps per frame. Every file is decoded once, into a cache, by the ffmpeg
that comes with `imageio_ffmpeg`.
"""

import argparse
import colorsys
import contextlib
import ctypes
import difflib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from string import digits
from subprocess import PIPE
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from einops import rearrange
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms, ImageDraw, ImageOps
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d, laplace
from tqdm.contrib.concurrent import thread_map

FPS = 25
SAMPLE_RATE = 16000
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640
MELS_PER_FRAME = 4
NUM_MELS = 40
AUDIO_WINDOW = 5  # video frames in a frame's window of sound (model.SpeechEncoder, judges)
MIN_FRAMES = 10  # of a usable clip

VIDEO_SUFFIXES = tuple(
    ".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .mpe .m2v .flv .f4v .wmv .asf .3gp .3g2 .ts .mts "
    ".m2ts .ogv .ogm .mxf .vob .dv .divx .qt .rm .rmvb .nut .y4m .gif .mod .3gpp".split()
)
SOUND_SUFFIXES = tuple(
    ".wav .m4a .mp3 .flac .aac .ogg .oga .opus .wma .aif .aiff .ac3 .amr .caf .mka .mp2".split()
)
PICTURE_SUFFIXES = tuple(".png .jpg .jpeg .bmp .webp .tif .tiff .avif .ppm .jp2".split())


# ---------------------------------------------------------------- processes


def die_with_parent(parent):
    """Let the kernel kill this process as soon as its parent, whose process id is `parent`, ends
    for any reason or has ended already. Linux only (prctl PR_SET_PDEATHSIG).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def set_up_process():
    """Let a cluster's signals end this process as Ctrl-C does: half-written files are deleted. Print
    letters that the terminal's encoding lacks as escapes, and warnings as one line. Exempt what is
    imported from garbage collection.
    """
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed, but tqdm needs one
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    # Clusters send SIGUSR1 or SIGUSR2 before a job's time ends, SIGXCPU when it has ended.
    for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        if signal.getsignal(kind) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(kind, signal.default_int_handler)
    gc.freeze()  # to search torch's 300,000 objects once more at the end would take a second


def refuse(message):
    """Print one line and end with status 2."""
    print("error:", " ".join(str(message).split())[:900], file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def errors_in_one_line(interrupted="interrupted"):
    """End the process with one line and status 2 at a user's error, lack of memory or processes, or
    Ctrl-C.
    """
    try:
        yield
    except (ValueError, OSError, OverflowError, MemoryError, RuntimeError) as error:
        # a limit of processes: Python has no error class for it either
        short = is_short_of_memory(error) or "can't start new thread" in str(error)
        if isinstance(error, RuntimeError) and not short:
            raise  # a bug: the traceback says where
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # rank 0 may fail for the same reason, and then ends this process
        refuse(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        if "RANK" in os.environ:  # one of several workers: their launcher prints it
            sys.exit(2)
        refuse(interrupted)


def is_short_of_memory(error):
    """Return whether an error means too little memory: a failed allocation, or a data-loading
    process that the kernel killed. torch has no error class for either.
    """
    messages = "(out of|allocate) memory|^DataLoader worker"
    return isinstance(error, MemoryError) or bool(re.search(messages, str(error)))


def is_first_worker():
    """Return whether this is a run's first process on this machine; the others do not print."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_threads(function, items, title):
    """Return [function(item) for item in items], computed with a progress bar by one thread per
    CPU, and one more, as some threads wait for ffmpeg to start.
    """
    disable = None if items else True  # None: no bar unless there is a terminal
    return thread_map(function, items, desc=title, max_workers=num_cpus() + 1, disable=disable)


def num_cpus():
    """Return the number of CPUs that this process may use, as limited by Slurm or a container."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# ---------------------------------------------------------------- clips


class CachedArray:
    """Descriptor of a `Clip` field: holds an array, or the `CacheFile` that it is read from."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, clip, owner=None):
        if clip is None:
            raise AttributeError(self.name)  # so that dataclass finds a field without default
        value = clip.__dict__["_" + self.name]
        return value if isinstance(value, np.ndarray) else value.arrays()[self.name]

    def __set__(self, clip, value):
        clip.__dict__["_" + self.name] = value


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """One decoded clip of f frames; its arrays are read from the cache at each access."""

    person: str
    name: str
    path: str
    frames: np.ndarray = CachedArray()  # uint8 [f 3 size size]
    audio: np.ndarray = CachedArray()  # int16 [640 f]
    mel: np.ndarray = CachedArray()  # float32 [4 f, 40]
    prompt: str = ""
    opening: np.ndarray | None = None  # of a synthetic mouth, float32 [f] in [0, 1]
    fingerprint: int = 0  # checksum of the frames and sound of the whole file

    @property
    def num_frames(self):
        """Return f, without opening the cache."""
        return len(self.__dict__["_frames"])

    @functools.cached_property
    def liveliness(self):
        """Return the standard deviation of the picture over time: RMS over 16 x 16 grey cells, at
        least .002.

        It differs by a factor of ten between people, so the model divides motion by it.
        """
        cells = []
        for start in range(0, self.num_frames, 512):  # an hour at once would take gigabytes
            frames = to_unit(to_float(self.frames[start : start + 512]))  # k 3 H W
            cells.append(F.adaptive_avg_pool2d(frames.mean(1, keepdim=True), 16))  # k 1 16 16
        deviation = torch.cat(cells).var(0, correction=0).mean().sqrt()
        # The floor keeps a nearly still clip's motion, which is divided by it, finite.
        return max(0.002, float(deviation))


def slice_clip(clip, start, stop, **changes):
    """Return frames `start` to `stop` of a clip, with their sound; `changes` replaces fields."""
    return replace(
        clip,
        frames=clip.frames[start:stop],
        audio=clip.audio[SAMPLES_PER_FRAME * start : SAMPLES_PER_FRAME * stop],
        mel=clip.mel[MELS_PER_FRAME * start : MELS_PER_FRAME * stop],
        opening=None if clip.opening is None else clip.opening[start:stop],
        **changes,
    )


def to_float(frames, device="cpu"):
    """Return uint8 frames [... 3 h w] as a float32 tensor in [-1, 1]; else raises TypeError."""
    # torch warns of read-only memory and refuses negative strides.
    frames = np.require(frames, requirements="CW").astype(np.uint8, casting="safe", copy=False)
    frames = torch.from_numpy(frames)
    return frames.to(device).float().mul_(1 / 127.5).sub_(1)


def to_unit(frames):
    """Return frames in [-1, 1] as frames in [0, 1], clamped."""
    return ((frames + 1) / 2).clamp(0, 1)


def to_int16(audio):
    """Return int16 sound unchanged; raises TypeError for floats, which would become silence."""
    return np.asarray(audio).astype(np.int16, casting="safe", copy=False)


# ---------------------------------------------------------------- spectrograms

# Constants, not statistics of a dataset: speech has about zero mean and unit variance.
MEL_STD = 3.5  # of log power
SILENCE = -1.5  # lowest value, 23 dB below the mean of speech
QUIETEST = -8.0  # mean log power; softer recordings are not raised to the level of speech
HOP = SAMPLES_PER_FRAME // MELS_PER_FRAME  # 160 samples
FFT = 512
MEL = torchaudio.transforms.MelSpectrogram(
    SAMPLE_RATE, FFT, 400, HOP, f_min=60, f_max=7600, n_mels=NUM_MELS, center=False
)


def log_mel(audio, chunk_seconds=60):
    """Return the log-mel spectrogram float32 [4 f, 40] of int16 audio [640 f]; its louder half has
    the mean 0.

    The loudness of a recording is removed. It has no information on the mouth, and a network would
    learn to recognise microphones by it. Raises ValueError if there is no audio.
    """
    if not len(audio):
        raise ValueError("there is no sound")
    # Step j is centred on samples 160 j .. 160 (j + 1), so a sound is strongest in its own frame.
    margin = (FFT - HOP) // 2
    # Pad to a whole frame, so that f frames always have 4 f steps.
    rest = -len(audio) % SAMPLES_PER_FRAME
    padded = np.pad(to_int16(audio), (margin, margin + rest))
    steps = []
    chunk = chunk_seconds * SAMPLE_RATE  # samples
    for start in range(0, len(audio), chunk):  # an hour at once would take gigabytes
        piece = torch.from_numpy(padded[start : start + chunk + 2 * margin]) / 32768
        steps.append(MEL(piece).clamp_min(1e-10).log())  # m t
    log_power = torch.cat(steps, 1).T.contiguous()  # 4f m
    loudness = log_power.mean(1)  # 4f
    louder_half = loudness[loudness >= loudness.median()]  # pauses don't count
    level = louder_half.mean().clamp_min(QUIETEST)
    return ((log_power - level) / MEL_STD).clamp_min(SILENCE).numpy()


def audio_windows(mel, start=0, stop=None):
    """Return windows float32 [f 20 40] of mel, AUDIO_WINDOW frames each, around frames `start` to
    `stop`.

    Silence pads both ends.
    """
    stop = len(mel) // MELS_PER_FRAME if stop is None else stop
    first = MELS_PER_FRAME * (start - AUDIO_WINDOW // 2)
    last = MELS_PER_FRAME * (stop + AUDIO_WINDOW // 2)
    piece = torch.tensor(mel[max(first, 0) : last])  # not all of it: a clip may be an hour long
    piece = F.pad(piece, (0, 0, max(-first, 0), max(last - len(mel), 0)), value=SILENCE)
    # (4 (f + 4)) m -> f 20 m
    return piece.unfold(0, MELS_PER_FRAME * AUDIO_WINDOW, MELS_PER_FRAME).mT.numpy()


# ---------------------------------------------------------------- ffmpeg

# Sound that begins late, and gaps in it, are kept if they last half a frame or more.
RESAMPLE = f"aresample={SAMPLE_RATE}:async=1:min_hard_comp={0.5 / FPS}:first_pts=0"
# A discarded output of all streams: in a .ts file time begins with the first stream that is read.
EVERYTHING = "-map 0:V? -map 0:a? -c copy -f null -".split()
AS_SAMPLES = "-ac 1 -f s16le -".split()
# PQ or HLG to SDR: 203 nits become white (ITU-R BT.2408), brighter parts are clipped.
TONE_MAPPING = (
    "zscale=transfer=linear:npl=203,format=gbrpf32le,zscale=primaries=bt709,"
    "tonemap=clip:desat=0,zscale=transfer=bt709:matrix=gbr:range=pc"
)


def run_ffmpeg(*arguments, blocks=(), watched=False):
    """Run ffmpeg with `blocks` of bytes as its input; return (exit status, output bytes, log).

    If this process is killed, ffmpeg ends when its pipes close. A call that uses neither input nor
    output must be `watched` (`die_with_parent`), which makes its start slow.

    Raises ValueError if the file makes ffmpeg crash, OSError if the disk or the memory is full, and
    KeyboardInterrupt if ffmpeg was stopped, as by a Ctrl-C that reaches it before this process.
    """
    command = [get_ffmpeg_exe(), *"-hide_banner -nostats -nostdin -y -v level+info".split()]
    command += map(str, arguments)
    die = functools.partial(die_with_parent, os.getpid()) if watched else None
    with subprocess.Popen(command, preexec_fn=die, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        try:
            # While these are written nobody reads the log, which is then short enough for its pipe.
            with contextlib.suppress(BrokenPipeError):  # ffmpeg ended: its log says why
                for block in blocks:
                    process.stdin.write(block)
            output, log = process.communicate()
        except BaseException:  # making the blocks failed
            process.kill()
            raise
    text = log.decode(errors="replace")
    # The output looks like a whole file, but is not. Status 255 alone does not show this, as some
    # damaged files cause it, too.
    if "Exiting normally, received signal" in text:  # Ctrl-C
        raise KeyboardInterrupt("ffmpeg was stopped")
    if process.returncode < 0:
        raise ValueError("ffmpeg crashed")
    shortage = "No space left|quota exceeded|Cannot allocate memory"
    if short := re.search(rf"\[(?:error|fatal)\] .*({shortage})", text):
        number = errno.ENOMEM if "memory" in short[1] else errno.ENOSPC
        raise OSError(number, f"ffmpeg was stopped: {short[1]}")
    return process.returncode, output, text


def first_error(log):
    """Return the first error in ffmpeg's log, or ''."""
    # Messages on the output, or on its absence in `probe`, are no errors of the file.
    ours = "At least one output|Application provided invalid"
    errors = re.findall(rf"^.*\[(?:error|fatal)\] (?!{ours})(.*)", log, re.MULTILINE)
    return errors[0] if errors else ""


def file_state(path):
    """Return (size, time of the last change) of a file; raises ValueError if it is not regular."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ValueError("a link to nothing" if os.path.islink(path) else "no such file") from None
    except OSError as error:
        raise ValueError(error.strerror) from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise ValueError("not a regular file")
    return status.st_size, status.st_mtime_ns


def explain(path):
    """Return why neither ffmpeg nor PIL can read a file and what to do about it, or ''."""
    try:
        file_state(path)
        with open(path, "rb") as file:
            head = file.read(1024)
    except (OSError, ValueError) as error:
        return str(error)
    if not head:
        return "the file is empty: copy or download it again"
    if not head.strip(b"\0"):
        return "the file begins with nothing but zeros: its download did not finish"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        return "a web page, not the file itself: its download failed, download it again"
    if re.match(rb"....ftyp(hei|hev|mif1|msf1)", head, re.DOTALL):
        return "HEIC pictures cannot be read: save it as JPEG or PNG"
    if re.fullmatch(rb"([\t\n\r -~]|[\xc2-\xf4][\x80-\xbf]*)*", head):
        return "a text file"
    return ""


class Streams(NamedTuple):
    """The streams of a media file."""

    video: str | None  # in ffmpeg's words: codec, pixel format (colours), size, ...
    sounds: list  # indices of the sound tracks, the default one first
    late: int  # frames of 1 / FPS by which the picture begins after the file
    seconds: float  # 0 if unknown


def probe(path):
    """Return the `Streams` of a file. Raises ValueError with the reason if it cannot be read."""
    file_state(path)
    _, _, log = run_ffmpeg("-i", f"file:{path}")
    videos, sounds = [], []
    for index, kind, text in re.findall(r"Stream #0:(\d+).*?: (Video|Audio): (?!none)(.*)", log):
        if kind == "Audio":
            sounds.append(("(default)" not in text, int(index)))
        elif "(attached pic)" not in text:  # the cover of a song
            videos.append(text)
    if not videos and not sounds:
        reason = first_error(log)
        if "moov atom not found" in reason:
            reason = "the file's end, and its index with it, is missing: copy or download it again"
        raise ValueError(explain(path) or reason or "no picture and no sound in it")
    duration = re.search(r"Duration: (\d+):(\d+):([\d.]+)", log)
    hours, minutes, seconds = map(float, duration.groups()) if duration else (0, 0, 0)
    begins = re.search(r"Duration: .*start: (-?[\d.]+)", log)
    begin = float(begins[1]) if begins else 0.0
    picture_begins = videos and re.search(r", start (-?[\d.]+)", videos[0])
    late = float(picture_begins[1]) - begin if picture_begins else 0.0
    if "Input #0, matroska" in log:  # its duration counts from time 0
        seconds -= begin
    return Streams(
        video=videos[0] if videos else None,
        sounds=[index for _, index in sorted(sounds)],
        late=max(0, round(FPS * late)),
        seconds=3600 * hours + 60 * minutes + seconds,
    )


CAMERA_ANGLE = r"(front|left|right|top|down)(_\d+)?"  # of MEAD: views of one recording


def find_sounds(folder):
    """Return {name without suffix: sound file} for the videos in `folder`, an absolute path.

    A sound file has the name of its video. It lies beside the video, or in a folder for sound that
    stands beside the folder for videos, as in VoxCeleb2 (aac for mp4), MEAD (audio/angry for
    video/front/angry) and HDTF.
    """
    folders = [folder]
    parts = folder.split(os.sep)
    for i, part in enumerate(parts):
        if part.lower() in ("mp4", "video", "videos", "clips"):
            below = parts[i + 1 :]
            angleless = [part for part in below if not re.fullmatch(CAMERA_ANGLE, part)]
            for sound in ("aac", "m4a", "wav", "audio"):
                for rest in (below, angleless):
                    folders.append(os.sep.join([*parts[:i], sound, *rest]))
    sounds = {}
    for place in dict.fromkeys(folders):  # each once
        found = []
        with contextlib.suppress(OSError):  # there is no such folder, or it cannot be read
            for file in Path(place).iterdir():
                suffix = file.suffix.lower()
                if suffix in SOUND_SUFFIXES:  # .wav before .Wav and .WAV
                    found.append((SOUND_SUFFIXES.index(suffix), file.suffix.swapcase(), file))
        for *_, file in sorted(found):
            if os.path.isfile(file):
                # macOS writes accents as signs of their own
                name = unicodedata.normalize("NFC", file.stem)
                sounds.setdefault(name, os.fspath(file))
    return sounds


def find_sound(path, known):
    """Return the sound file of a video, or None; `known` keeps {folder: find_sounds(folder)}."""
    folder, name = os.path.split(path)
    if folder not in known:
        known[folder] = find_sounds(os.path.abspath(folder))
    return known[folder].get(unicodedata.normalize("NFC", os.path.splitext(name)[0]))


def probe_sound(path):
    """Return the `Streams` of a file; raises ValueError, which names it, if it has no sound."""
    try:
        streams = probe(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not streams.sounds:
        raise ValueError(f"{path}: no sound in it")
    return streams


def is_silent(audio):
    """Return whether int16 audio spans fewer than 66 of its 65,536 levels, whatever its offset."""
    return not len(audio) or int(audio.max()) - int(audio.min()) < 66


def decode_sound(inputs, tracks, *picture):
    """Decode the first of the sound `tracks` that is not silent, or else the last one, and in the
    same run `picture` (output options); return (audio, log).
    """
    for track in tracks:  # a screen recording may have a silent one of the system's own sound
        audio, log = decode_track(inputs, f"0:{track}", *picture)
        if not is_silent(audio):
            break
    return audio, log


def decode_track(inputs, track, *picture):
    """Decode a sound track, and in the same run `picture` (output options); return (audio, log)."""
    others = picture or EVERYTHING
    _, output, log = run_ffmpeg(*inputs, *others, "-map", track, "-af", RESAMPLE, *AS_SAMPLES)
    if "audio parameters changed" in log:
        # At a change ffmpeg begins new filters at time 0, which pad with silence up to the change.
        # So the sound is first converted to one format.
        with tempfile.NamedTemporaryFile(suffix=".nut") as uniform:
            coding = f"-ac 1 -ar {SAMPLE_RATE} -c:a pcm_s16le".split()
            run_ffmpeg(*inputs, *EVERYTHING, "-map", track, *coding, uniform.name)
            late = ["-copyts", "-i", uniform.name]  # keeps the time at which the sound begins
            _, output, _ = run_ffmpeg(*late, "-af", RESAMPLE, *AS_SAMPLES)
    audio = np.frombuffer(output, np.int16)
    # Left and right may cancel each other, and of some layouts ffmpeg makes no mono sound, which
    # ends the picture, too: try the left channel alone.
    if is_silent(audio):
        left = f"pan=mono|c0=c0,{RESAMPLE}"
        _, output, log = run_ffmpeg(*inputs, *others, "-map", track, "-af", left, *AS_SAMPLES)
        audio = np.frombuffer(output, np.int16)
    return audio, log


def picture_filters(streams, shorter=None, fps=FPS):
    """Return ffmpeg's filters from the picture of `Streams` to planar G, B, R with square pixels.

    The shorter side gets `shorter` pixels, by default as many as in the file. Time 0 is where the
    picture begins.
    """
    # Interlaced: yuv420p(tv, bottom coded first (swapped)), 720x576
    parts = re.search(r", \w+(?:\(((?:[^()]|\([^()]*\))*)\))?, (\d+)x(\d+)", streams.video)
    if not parts:
        raise ValueError("its picture has no known size: the file is cut off or damaged")
    tags = parts[1] or ""  # range, matrix/primaries/transfer, scan: (tv, bt709, progressive)
    sides = sorted((int(parts[2]), int(parts[3])))
    scale = "scale='round(iw*sar)':ih"  # sar: the aspect ratio of a pixel, dar: of the picture
    if shorter:
        scale = f"scale='max({shorter},round({shorter}*dar))':'max({shorter},round({shorter}/dar))'"
    scale += ":flags=area+accurate_rnd+full_chroma_int"
    has_matrix = re.search("bt|smpte|fcc|gbr|ycgco|ictcp", tags.split("/")[0])
    if not has_matrix and (sides[0] > 576 or sides[1] > 1024):
        scale += ":in_color_matrix=bt709"  # as players assume for HD; ffmpeg assumes SD's matrix
    begin = streams.late / FPS
    filters = [
        "yadif=deint=interlaced",  # only frames that are marked as interlaced
        # The filter fps fills gaps with repeated frames. A gap of more than a minute comes from a
        # wrong time and might fill the disk: the video ends there, or up to a minute later.
        f"select='lt(t-if(isnan(prev_selected_t),{begin},prev_selected_t),60)'",
        f"setpts='min(PTS,if(isnan(PREV_OUTPTS),{begin}/TB,PREV_OUTPTS)+60/TB)'",
        f"fps={fps}:start_time={begin}",
        "setpts=PTS-STARTPTS",
        scale,
    ]
    if "smpte2084" in tags or "arib-std-b67" in tags:  # PQ or HLG
        if not can_tone_map():
            raise ValueError(
                "HDR video, which this ffmpeg cannot convert: export it as SDR, or use a full "
                f'ffmpeg -i IN -vf "{TONE_MAPPING},format=yuv420p" OUT.mp4'
            )
        if not has_matrix:  # the filters refuse to guess
            filters.append("setparams=color_primaries=bt2020:colorspace=bt2020nc")
        filters.append(TONE_MAPPING)
    return [*filters, "format=gbrp"]


@functools.cache
def can_tone_map():
    _, output, _ = run_ffmpeg("-filters")
    return b" zscale " in output and b" tonemap " in output


def decode_video(path, size, crop, output, sound_file=None, finder=None):
    """Write a video's frames, uint8 [f 3 h w], to the file `output`; return ((h, w), audio, note).

    Audio is int16 [640 f], from `sound_file` if the video has none or is silent; without either it
    is empty. The note says how much of a damaged file is used, and how many faces were found.
    Raises ValueError with the reason if there are no frames, or if `finder` finds no face.
    """
    streams = probe(path)
    if streams.video is None:
        raise ValueError("it has sound, but no picture")
    # Packets known to be damaged are dropped; the filter fps repeats the frame before them.
    inputs = ["-threads", 1, "-fflags", "+discardcorrupt", "-i", f"file:{path}"]
    faces = ""
    filters = picture_filters(streams, size and round(size / crop))
    if size:
        filters.append(f"crop={size}:{size}")
    with tempfile.NamedTemporaryFile("w", suffix=".commands") as commands:
        if finder:
            crops, faces = find_track(inputs, streams, crop, output, finder)
            if crops:  # the video is not a face track already
                commands.write(crops)
                commands.flush()
                moving = [f"sendcmd=filename={escape(commands.name)}", "crop=exact=1"]
                square = f"scale={size}:{size}:flags=area+accurate_rnd"
                filters = [*picture_filters(streams), *moving, square]
        picture = raw_picture(filters, output)
        if streams.sounds:
            audio, log = decode_sound(inputs, streams.sounds, *picture)
        else:
            audio = np.zeros(0, np.int16)
            _, _, log = run_ffmpeg(*inputs, *picture, watched=True)
    if "video parameters changed" in log:  # at a change new filters begin, again at time 0
        raise ValueError(
            "its picture changes size or colours midway: ffmpeg -i IN OUT.mp4 mends it"
        )
    if sound_file and is_silent(audio):
        tracks = probe_sound(sound_file).sounds
        audio, sound_log = decode_sound(["-i", f"file:{sound_file}"], tracks)
        log += sound_log
    height, width = raw_shape(log, output)
    num_frames = os.path.getsize(output) // (3 * height * width)
    audio = audio[streams.late * SAMPLES_PER_FRAME :]  # a picture that stands still is none
    if len(audio):
        # Containers round the lengths of sound and picture differently. If the sound is shorter, up
        # to two frames of silence are added; if that is not enough, the picture is cut off.
        num_frames = min(num_frames, len(audio) // SAMPLES_PER_FRAME + 2)
        # 3: two frames of silence, and the rest of a frame that has some sound.
        audio = np.pad(audio, (0, 3 * SAMPLES_PER_FRAME))[: num_frames * SAMPLES_PER_FRAME]
    os.truncate(output, num_frames * 3 * height * width)
    used = num_frames / FPS
    whole = streams.seconds - streams.late / FPS
    damage = first_error(log)
    if re.search("Packet corrupt|corrupt input packet", log):
        damage = damage or "damaged packets"
    if used < whole - 0.5:
        damage = damage or "picture or sound ends there"
    notes = [faces] if faces else []
    if damage:
        notes.append(f"{used:.1f} of {max(used, whole):.1f} s are used ({damage})")
    return (height, width), audio, "; ".join(notes)


def escape(path):
    """Return a path escaped for ffmpeg's filters: as an option's value, then for their list."""
    value = re.sub(r"([\\':])", r"\\\1", path)
    return re.sub(r"([\\'\[\],;])", r"\\\1", value)


def raw_picture(filters, output):
    """Return ffmpeg's options that write the filtered picture, planar R, G, B, to `output`."""
    filters = ",".join([*filters, "shuffleplanes=2:0:1"])  # from G, B, R to R, G, B
    return ["-map", "0:V:0", "-vf", filters, "-pix_fmt", "gbrp", "-f", "rawvideo", f"file:{output}"]


def raw_shape(log, output):
    """Return (h, w) of the frames that ffmpeg wrote to the file `output`, from its log.

    Raises ValueError with ffmpeg's reason if there are none.
    """
    shapes = re.findall(r"Video: rawvideo .*?, gbrp.*?, (\d+)x(\d+)", log)
    if not shapes or not os.path.getsize(output):
        raise ValueError(first_error(log) or "it has no frames")
    width, height = map(int, shapes[-1])  # the last: the source may be raw video, too
    return height, width


# ---------------------------------------------------------------- cutting faces out

LOOK_HZ = 5  # frames per second in which a face is looked for
LOOK_SIZE = 256  # pixels of their shorter side
STEADY = 0.4  # seconds: sigma of the Gaussian that smooths the path of a face
ALREADY_CUT = 0.5  # overlap with the middle of the picture above which nothing is cut


def find_track(inputs, streams, crop, output, finder):
    """Return commands for ffmpeg's filter crop that follow the face in a video, and a note.

    The commands are '' if the face already fills the middle `crop` of the picture. `output` names a
    temporary file for frames. Raises ValueError if the face is in too few frames (`follow_face`).
    """
    filters = picture_filters(streams, LOOK_SIZE, LOOK_HZ)
    picture = raw_picture(filters, output)
    _, _, log = run_ffmpeg(*inputs, *EVERYTHING, *picture, watched=True)
    height, width = raw_shape(log, output)
    frames = np.memmap(output, np.uint8, "r").reshape(-1, 3, height, width)
    times, boxes, note = follow_face(frames, crop, finder)
    usual = middle(height, width, crop)
    # in 95 % of the frames: a face that swings from side to side is in the middle on average
    if np.quantile([box_overlap(box, usual) for box in boxes], 0.05) > ALREADY_CUT:
        return "", note
    side = min(np.median(boxes[:, 2] - boxes[:, 0]), width, height)
    num_frames = len(frames) * FPS // LOOK_HZ
    seen_at = (times + 0.5) / LOOK_HZ - 0.5 / FPS  # the middle of each fifth of a second
    path = []  # of the left upper corner, as a share of width and height
    for axis, whole in enumerate((width, height)):
        middles = boxes[:, axis::2].mean(1)
        at = np.interp(np.arange(num_frames) / FPS, seen_at, middles)  # num_frames
        at = gaussian_filter1d(at, STEADY * FPS, mode="nearest") - side / 2
        path.append(at.clip(0, whole - side) / whole)
    size = f"min(iw,ih)*{side / min(width, height):.5f}"
    lines = [f"0 crop w '{size}', crop h '{size}';"]
    for i, (x, y) in enumerate(zip(*path)):
        lines.append(f"{max(0, i - 0.5) / FPS:.3f} crop x 'iw*{x:.5f}', crop y 'ih*{y:.5f}';")
    return "\n".join(lines), note


def follow_face(frames, crop, finder):
    """Return the largest face in frames uint8 [f 3 h w]: indices [k] of frames, boxes [k 4], a
    note.

    A face in the middle `crop`, where training clips have it, is accepted at a lower score. Raises
    ValueError if the largest face is found in less than four fifths of the frames.
    """
    tracks = []  # {frame: box} of one face
    for i, frame in enumerate(frames):
        for box in finder.find(frame, middle(*frame.shape[1:], crop)).numpy():
            # A track's last box may be old: a face that is missed for a while keeps its track.
            near = [
                track
                for track in tracks
                if i not in track and box_overlap(list(track.values())[-1], box) > 0.3
            ]
            if near:
                max(near, key=len)[i] = box
            else:
                tracks.append({i: box})
    if not tracks:
        drawings = " (the face finder has seen drawings only)" if finder.drawings else ""
        raise ValueError(f"no face found in it{drawings}")
    most = max(map(len, tracks))
    faces = [track for track in tracks if len(track) >= most / 2]  # rare ones may be no faces
    largest = max(faces, key=lambda track: np.median([box[2] - box[0] for box in track.values()]))
    if len(largest) < 0.8 * len(frames):
        share = len(largest) / len(frames)
        raise ValueError(f"its face is found in only {share:.0%} of it: cut out the rest")
    note = f"{len(faces)} faces are found in it, the largest is used" if len(faces) > 1 else ""
    return np.array(list(largest)), np.array(list(largest.values())), note


def box_overlap(a, b):
    """Return the intersection over union of two boxes (left, top, right, bottom)."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])  # 2
    shared = np.prod(sides.clip(0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def middle(height, width, crop):
    """Return the box of the middle `crop` of a picture's central square."""
    center = np.array([width, height]) / 2
    half = min(width, height) * crop / 2
    return np.concatenate([center - half, center + half])


# ---------------------------------------------------------------- reading and writing files


def read_video(path, size=None, crop=1.0, finder=None):
    """Decode a video; return (frames uint8 [f 3 h w] at 25 per second, audio int16 [640 f]).

    Frames are `size` pixels square, the middle `crop` of each side, or the face that `finder`
    finds; with size None they are as large as in the file. Audio is empty if there is none. Raises
    ValueError with the reason; warns if only part of the file, or one of several faces, is used.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "frames")
        try:
            shape, audio, note = decode_video(
                path, size, crop, output, find_sound(path, {}), finder
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        frames = np.fromfile(output, np.uint8).reshape(-1, 3, *shape)
    if note:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return frames, audio


def read_speech(path):
    """Return the sound int16 [n] at 16 kHz, mono, of a sound or video file.

    Raises ValueError if there is none or it is silent; warns if only a part of it can be read.
    """
    streams = probe_sound(path)
    audio, log = decode_sound(["-i", f"file:{path}"], streams.sounds)
    damage = first_error(log)
    if is_silent(audio):
        raise ValueError(f"{path}: {damage or 'its sound is silent'}")
    seconds = len(audio) / SAMPLE_RATE
    if damage or seconds < streams.seconds - 0.5:
        used = f"{seconds:.1f} of {streams.seconds:.1f} s are used"
        warnings.warn(f"{path}: {used} ({damage or 'its sound ends there'})", stacklevel=2)
    return audio


def note_other_pictures(path, num_pictures):
    """Warn if only the first of a file's pictures is used."""
    if num_pictures > 1:
        note = f"{path}: only the first of its {num_pictures} pictures is used"
        warnings.warn(note, stacklevel=3)


def read_image(path, size=None, crop=1.0, finder=None):
    """Return a picture uint8 [3 size size]: the middle `crop` of its central square, or the face in
    it.

    With size None it is as large as in the file. Transparent parts become grey. Raises ValueError
    with the reason if it cannot be read, or if `finder` finds no face; warns if it finds several.
    """
    try:
        file_state(path)  # PIL would wait for a pipe
        with Image.open(path) as file:
            # The second picture in a phone's .jpg (MPO) is for the phone's own use.
            num_pictures = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            image = to_srgb(to_8_bits(ImageOps.exif_transpose(file))).convert("RGBA")
    except Exception as error:  # PIL raises many kinds, struct.error for odd EXIF among them
        reason = explain(path)
        if "truncated" in str(error).lower():
            reason = "the picture is cut off: copy or download it again"
        if isinstance(error, Image.DecompressionBombError):
            reason = "the picture is too large: make it smaller"
        if reason:
            raise ValueError(f"{path}: {reason}") from None
        # ffmpeg reads more kinds: RGB of floats, EXR, ...
        frames, _ = read_video(path, size, crop, finder)
        note_other_pictures(path, len(frames))
        return frames[0]
    note_other_pictures(path, num_pictures)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "grey"), image).convert("RGB")
    if finder:
        whole = image.size
        scale = max(1, min(whole) / LOOK_SIZE)
        small = image.resize([max(1, round(side / scale)) for side in whole], Image.Resampling.BOX)
        try:
            _, boxes, note = follow_face([channels_first(small)], crop, finder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if note:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        box = boxes[0] * scale
        if box_overlap(box, middle(whole[1], whole[0], crop)) <= ALREADY_CUT:
            side = min(box[2] - box[0], *whole)
            corner = ((box[:2] + box[2:] - side) / 2).clip(0, np.array(whole) - side)
            square = (*corner, *(corner + side))
            return channels_first(image.resize((size, size), Image.Resampling.LANCZOS, square))
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, bleed=(1 - crop) / 2)
    return channels_first(image)


def channels_first(image):
    """Return an RGB picture as uint8 [3 h w]."""
    return np.asarray(image).transpose(2, 0, 1).copy()


def to_srgb(image):
    """Return a picture of 8 bits in sRGB, if it has a colour profile that can be read."""
    if image.mode != "CMYK":
        image = image.convert("RGBA")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        mode = "RGB" if image.mode == "CMYK" else "RGBA"
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image


def to_8_bits(image):
    """Return a picture of 16 bits or floats as one of 8 bits; `convert` would make it white."""
    if image.mode[0] not in "IF":
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    white = 65535
    if image.mode in ("I", "F") and values.max() <= 255:
        white = 1 if image.mode == "F" and values.max() <= 1 else 255
    return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path of the same suffix; it replaces `path` unless the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk: say which
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, content):
    """Write `content` with torch.save, whole or not at all."""
    buffer = io.BytesIO()  # written by torch itself, a full disk would be a RuntimeError
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def check_output(path, suffixes=(".mp4", ".m4v", ".mov")):
    """Raise ValueError unless a file with one of `suffixes` can be written; call it before work."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: its name must end in {' or '.join(suffixes)}")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:  # the mode of a folder does not say whether it can be written
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {folder}: {error.strerror}") from None


def write_video(path, frames, audio=None, comment="", crf=16, sound_codec="aac"):
    """Write a video at 25 frames per second with int16 audio [640 f], whole or not at all.

    `frames` is uint8 [f 3 h w], or an iterator of such blocks. Raises ValueError where
    `check_output` does, before the first block is made.
    """
    check_output(path)
    blocks = map(channels_last, [frames] if isinstance(frames, np.ndarray) else frames)
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    height, width = first.shape[1:3]
    inputs = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FPS} -i pipe:0".split()
    coding = f"-c:v libx264 -preset veryfast -crf {crf} -pix_fmt yuv420p -threads 1".split()
    coding += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]  # yuv420p has even sides
    coding += f"-c:a {sound_codec} -b:a 96k -movflags +faststart+use_metadata_tags".split()
    if comment:
        coding += ["-metadata", f"comment={comment}"]
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as temporary:
        if audio is not None:  # ffmpeg has one standard input, and the frames are on it
            sound = Path(folder, "sound")
            with atomic_write(sound) as new:  # names the disk if it is full
                new.write_bytes(to_int16(audio).tobytes())
            inputs += [*f"-f s16le -ar {SAMPLE_RATE} -ac 1 -i".split(), sound]
        blocks = itertools.chain([first], blocks)
        # file: for names such as a:b, which would be a protocol
        status, _, log = run_ffmpeg(*inputs, *coding, f"file:{temporary}", blocks=blocks)
        if status:
            raise ValueError(f"{path} cannot be written: {first_error(log)}")


def channels_last(frames):
    """Return uint8 frames [f 3 h w] as [f h w 3]; raises ValueError for others."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"a video needs uint8 frames [f 3 h w], not {frames.dtype} {frames.shape}")
    return np.ascontiguousarray(rearrange(frames, "f c h w -> f h w c"))


# ---------------------------------------------------------------- the cache of decoded clips

CACHE_VERSION = 5  # raise it when files are decoded in another way
DAYS_KEPT = 30  # days after which an unused dataset's clips are deleted from the cache


def digest(key):
    """Return the first 16 hexadecimal digits of the SHA-256 of a key's repr."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def short_name(name):
    """Return a name short enough for a file's: if it is long, its first 30 letters and a hash."""
    return name if len(name) <= 40 else f"{name[:30]}-{digest(name)[:8]}"


def rng_of(*keys):
    """Return a random generator for these keys."""
    return np.random.default_rng(int(digest(keys), 16))


def open_cache(cache, root, size, crop, finder):
    """Return the folder for the decoded clips of a dataset, in `cache`.

    It is beside this module by default, or in the user's cache if that cannot be written. Clips of
    datasets that are no longer used are deleted. Raises ValueError if no folder can be written.
    """
    places = [Path(__file__).resolve().parent / "datasets" / ".cache"]
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(user_cache):  # without a home it stays ~/.cache
        places.append(Path(user_cache, "privfedtalk"))
    fingerprint = finder and finder.fingerprint()
    key = os.path.realpath(root), CACHE_VERSION, MEL_STD, SILENCE, QUIETEST, fingerprint
    for place in [Path(cache)] if cache else places:
        folder = place / f"{short_name(root.name)}-{digest(key)}-{size}-{crop:g}.clips"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # This also sets the folder's time, which keeps it from being deleted below.
            tempfile.NamedTemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"{place}: {error.strerror}"
            continue
        for other in place.glob("*-????????????????-*.clips"):
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - other.stat().st_mtime > 86400 * DAYS_KEPT:
                    shutil.rmtree(other)
        return folder
    raise ValueError(
        f"no cache for decoded clips can be written ({reason}): name another folder, by runtime.cache "
        "or XDG_CACHE_HOME"
    )


def checksum(path, length=None):
    """Return the CRC-32 of the first `length` bytes of a file, by default of all."""
    return zlib.crc32(np.memmap(path, np.uint8, "r")[:length])


@dataclass(eq=False)
class CacheFile:
    """A decoded clip in the cache: frames, audio, mel, and a last line of JSON about them."""

    path: Path
    source: str
    size: int
    crop: float
    finder: object = None
    sounds: dict = field(default_factory=dict)  # {folder: `find_sounds`} of those known already
    info: dict | None = None  # {"frames": number, "checksum", "note", "sound": {path: state}}
    verified: bool = False

    def load_info(self):
        """Read `info`; return whether that worked and its sound file has not changed."""
        try:
            with open(self.path, "rb") as file:
                # The line may hold a path of 4096 bytes, which JSON makes longer.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
                self.info = json.loads(file.read().rpartition(b"\n")[2])
            return all(list(file_state(path)) == at for path, at in self.info["sound"].items())
        except (OSError, ValueError, KeyError, TypeError):  # TypeError: JSON, but no dict
            return False

    def ends(self):
        """Return the bytes of the file after which frames, audio and mel end."""
        per_frame = [3 * self.size**2, 2 * SAMPLES_PER_FRAME, 4 * MELS_PER_FRAME * NUM_MELS]
        return [self.info["frames"] * end for end in itertools.accumulate(per_frame)]

    def write(self):
        """Decode the source. Raises ValueError with the reason if it is no usable clip."""
        sound = find_sound(self.source, self.sounds)
        sound_state = {sound: file_state(sound)} if sound else {}  # before decoding: it may change
        with atomic_write(self.path) as temporary:
            _, audio, note = decode_video(
                self.source, self.size, self.crop, temporary, sound, self.finder
            )
            num_frames = len(audio) // SAMPLES_PER_FRAME
            if not num_frames:
                raise ValueError("no sound, in it or in a file beside it")
            if is_silent(audio):
                raise ValueError("its sound is silent")
            if num_frames < MIN_FRAMES:
                raise ValueError(f"only {num_frames} frames long, {MIN_FRAMES} are needed")
            content = audio.tobytes() + log_mel(audio).tobytes()
            self.info = {
                "frames": num_frames,
                "note": note[:1000],
                "checksum": zlib.crc32(content, checksum(temporary)),
                "sound": sound_state,
            }
            with open(temporary, "ab") as file:
                file.writelines([content, b"\n", json.dumps(self.info).encode()])

    # 1024 maps at a time: Linux allows about 65,000, LRS3 has 150,000 clips.
    @functools.lru_cache(maxsize=1024)
    def arrays(self):
        """Return {"frames", "audio", "mel"}, memory-mapped; a damaged or lost file is made anew."""
        whole = self.load_info()
        if whole and not self.verified:  # once in a process
            whole = checksum(self.path, self.ends()[-1]) == self.info["checksum"]
        if not whole:
            try:
                self.write()
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from None
        self.verified = True
        # torch does not keep the file open, as numpy does, and so meets no limit on open files.
        *ends, end = self.ends()
        data = torch.from_file(str(self.path), False, end, dtype=torch.uint8).numpy()
        frames, audio, mel = np.split(data, ends)
        return {
            "frames": frames.reshape(-1, 3, self.size, self.size),
            "audio": audio.view(np.int16),
            "mel": mel.view(np.float32).reshape(-1, NUM_MELS),
        }

    def __len__(self):
        return self.info["frames"]


# ---------------------------------------------------------------- whose clip is it?

# Layouts that the end of a path, without suffix, shows. The group is the person. The path begins
# with the dataset's own folder, as the folders above it say nothing about the person.
LAYOUTS = re.compile(
    r"""
    /(id\d{5})[/\#][\w-]{11}[/\#][^/]+$         # VoxCeleb: id00012/21Uxsk56VDQ/00001, or with #
    | /([MW]\d{3})/video/(?:[^/]+/){3}[^/]+$    # MEAD: M003/video/front/angry/level_1/001
    | /(s\d{1,2})/video/[^/]+/[^/]+$            # GRID: s1/video/mpg_6000/bbaf2n
    | /(\d{4})_[A-Z]{3}_[A-Z]{3}_[A-Z]{1,2}$    # CREMA-D: 1001_DFA_ANG_XX
    | /(?:\d\d-){6}(\d\d)$                     # RAVDESS: 01-01-03-01-02-01-12
    | /W[DR]A_([^/_]+?)\d*_\d+(?:_\w+)?$       # HDTF: WDA_Name0_000 and WRA_Name1_003_25fps
    | /(RD_Radio\d+)_\d+(?:_\w+)?$             # HDTF
    | /Clip\+([\w-]{11})\+P\d+\+C\d+[^/]*$      # VFHQ: Clip+2A5tWbHxc3k+P0+C0+F1537-1825
    """,
    re.VERBOSE,
)
# The name of a video of YouTube, cut into <video>_0 (CelebV-HQ) or <video>_12.5_15 (AVSpeech). It
# has both cases, and is not words with numbers (JohnSmith01); that leaves out 1 % of random names.
VIDEO = r"((?=.*[a-z])(?=.*[A-Z])(?!(?:[A-Z]?[a-z]{2,}\d*[-_]?)+_\d+$)[\w-]{11})"
# Layouts that are looked for only below the deepest folder that holds all clips.
LAYOUTS_BELOW = re.compile(
    rf"""
    /(?:pretrain|trainval|train|valid|val|dev|test|main)/([^/]+)/[^/]+$  # LRS2, LRS3
    | ^/{VIDEO}_\d+$  # CelebV-HQ, all in one folder
    """,
    re.VERBOSE,
)
# Names of folders that say nothing about who is in them.
NOT_A_PERSON = re.compile(
    r"(?i)(pre)?train(val)?|val(id(ation)?)?|dev|test|main|mp4|mpg|aac|wav|videos?|audios?|clips?"
    r"|frames|faces|media|files|data(sets?)?|dcim|camera|downloads?|pictures|movies"
    rf"|{CAMERA_ANGLE}|level_\d|(19|20)\d\d[-_.]?\d\d([-_.]?\d\d)?"
    r"|(session|take|part|day|week|batch|cam|group|fold)[-_ ]?\d+|raw|cut|cropped|real|fake"
)
# Beginnings of file names that say nothing about who is in them. "" is a number without its digits.
NOT_A_NAME = frozenset(
    "img vid video videos mov movie pxl dsc dscf dscn mvi gopr gh gx clip clips take rec record "
    "recording screen whatsapp signal win photo film trim part segment scene session c p mah dji "
    "gmt zoom meeting teams telegram snapchat tiktok facetime untitled copy new at on".split()
) | {""}
# The first word of a file name; after a word for any person (speaker_12) the next one, too.
FIRST_WORD = re.compile(
    r"(?i)((speaker|spk|subject|subj|sub|user|person|actor|id|p|s)[\W_])?[^\W_]*"
)
# File names that are people: a piece of a video, and a word for any person with a number and
# nothing else (P01, subject_3).
PERSON_NAMES = (
    rf"{VIDEO}_\d",
    r"(?i)((?:speaker|spk|subject|subj|sub|user|person|participant|actor|p(?=\d\d))[\W_]?\d+)$",
)


def person_of(above, below, owner, refusal):
    """Return the person whose clip lies at the path `above` + `below`, without suffix.

    `above` leads from the dataset's folder to the deepest folder that holds all clips. A known
    layout is recognised at any depth of the dataset. Otherwise `below` must be /<person>/<clip>; a
    mere /<clip> belongs to `owner`, or is refused with the reason `refusal`. Raises ValueError if
    it is unclear who the person is.
    """
    match = LAYOUTS.search(above + below) or LAYOUTS_BELOW.search(below)
    if match:
        person = match[match.lastindex]  # one of its groups matched
        if not NOT_A_PERSON.fullmatch(person):
            return person
    folders = below.split("/")[1:-1]
    if not folders:
        if refusal:
            raise ValueError(refusal)
        return owner
    if len(folders) == 1 and not NOT_A_PERSON.fullmatch(folders[0]):
        return folders[0]
    raise ValueError(
        f"it is unclear who the person in {'/'.join(folders)} is: put (or link) all clips of a "
        "person into one folder that is named after the person, <dataset>/<person>/<clip>"
    )


def several_people(names):
    """Return the words at the beginning of names that suggest two people or more, or []."""
    for pattern in PERSON_NAMES:
        people = {match[1] for name in names if (match := re.match(pattern, name))}
        if len(people) > 1:
            return sorted(people)
    if len({name.rstrip(digits) for name in names}) < 2:  # they differ in a number: 00001, 00002
        return []
    # Dates at the beginning are no names: 20240105_1.mp4.
    dateless = [re.sub(r"(19|20)\d\d[-_.]?\d\d[-_.]?\d\d", "", name) for name in names]
    first_words = [FIRST_WORD.match(name)[0] for name in dateless]
    # The first word that may be a person's name, in file names with a number or letter at the end
    # or a number at the beginning: anna in session1_anna_01, 1-anna, clip_anna_a.
    numbered = []
    numbers = []
    for name in dateless:
        words = [
            word
            for word in re.split(r"[\W_]+", name)
            if word.rstrip(digits).lower() not in NOT_A_NAME
        ]
        count = re.search(r"\d+$|[\W_][a-z]$", name) or re.match(r"\d+", name)
        is_counted = count or name[-1:].isdigit()  # ² is a digit, but no \d
        if words and is_counted and re.fullmatch(r"[^\W\d]{2,}\d*", words[0]):
            numbered.append(words[0])
            numbers.append(count[0] if count else "")
    # All have the same number: the first clips of several people (anna_1, bob_1). Clips of one
    # person would have different numbers.
    all_first = len(set(numbers)) == 1
    # A word counts if two names have it; in numbered names (anna_1, anna_2, bob_1) one is enough.
    for beginnings, least in ((first_words, 2), (numbered, 1)):
        # Once with numbers (sub01-a, sub01-b, sub02-a), once without (anna1, anna2, bob1).
        for tried in (beginnings, [word.rstrip(digits) for word in beginnings]):
            counts = Counter(word for word in tried if word.lower() not in NOT_A_NAME)
            people = sorted(word for word, count in counts.items() if count >= least)
            if len(people) > 1 and (all_first or max(counts.values()) > 1):
                return people
    return []


def printable(text):
    """Return a text with \\xe9 for each byte that is not UTF-8, which `print` refuses."""
    return os.fsencode(text).decode(errors="backslashreplace")


def assign_people(paths, root, everybody=None):
    """Return {path: (person, clip name)} of the videos of the dataset `root`, and [(path, reason)]
    of the others.

    Paths are absolute. All clips are of the person `everybody`, if it is given.
    """
    # macOS may write an accent as a sign of its own: the same name, in other bytes.
    root, *composed = (unicodedata.normalize("NFC", path) for path in [root, *paths])
    base = os.path.commonpath({os.path.dirname(path) for path in composed}).rstrip("/")
    above = base[len(os.path.dirname(root).rstrip("/")) :]
    stems = [os.path.splitext(path)[0][len(base) + 1 :] for path in composed]
    refusal = ""
    if any("/" in stem for stem in stems):
        refusal = "it lies beside the folders of people: put it into the folder of its person"
    elif any(LAYOUTS.search("/" + stem) or LAYOUTS_BELOW.search("/" + stem) for stem in stems):
        refusal = "its name does not tell whose it is, as others' here do: put it into a folder"
    elif names := several_people(stems):
        people = ", ".join(names[:5])
        refusal = f"the names suggest several people ({people} ...): put each one's into one folder"
        refusal += "; if it is one person, rename them"
    owner = os.path.basename(base)
    assigned, left_out, taken = {}, [], {}
    origins = {}  # person -> {folders above the person's, without those of NOT_A_PERSON}
    for path, stem in zip(paths, stems):
        try:
            person = everybody or person_of(above, "/" + stem, owner, refusal)
            # pretrain/anna/1 -> anna, pretrain-1
            *folders, name = stem.split("/")
            name = "-".join([folder for folder in folders if folder != person] + [name])
            clip = printable(person), printable(name)
            if clip in taken:
                raise ValueError(
                    f"it is named as {taken[clip]}: left out; rename it if it is no copy"
                )
        except ValueError as error:
            left_out.append((path, str(error)))
        else:
            assigned[path] = clip
            taken[clip] = path
            all_folders = above.split("/") + folders
            if person in all_folders:
                outer = all_folders[: all_folders.index(person)]
            else:  # the person is a part of the file's name, and maybe of its folder's: Actor_01
                outer = [folder for folder in all_folders if not folder.endswith(person)]
            origin = "/".join([name for name in outer if not NOT_A_PERSON.fullmatch(name)])
            origins.setdefault(clip[0], set()).add(origin)
    for path, (person, _) in list(assigned.items()):
        # `indoor` in anna/test/indoor and bob/test/indoor is no person.
        if len(origins[person]) > 1 and not everybody:
            reason = f"it is unclear who {person} is, in several folders: rename them"
            left_out.append((path, reason))
            del assigned[path]
    return assigned, left_out


# ---------------------------------------------------------------- datasets


def find_files(root, suffixes):
    """Return the paths of the files in a folder whose names end in one of `suffixes`, and [(path,
    reason)] of folders left out.

    Hidden files are ignored. Linked folders are read last, and only if they were not read before,
    so that circular links end, no file is found twice, and files keep their true folder.
    """
    found, left_out, seen = [], [], set()
    starts = [os.fspath(root)]

    def leave_out(error):
        left_out.append((error.filename, str(error)))

    for start in starts:  # to which linked folders are added when they are found
        for folder, subfolders, files in os.walk(start, onerror=leave_out):
            true_folder = os.path.realpath(folder)
            if true_folder in seen:
                left_out.append((folder, "a link to a folder that is read already"))
                subfolders.clear()
                continue
            seen.add(true_folder)
            # macOS puts ._1.mp4 beside 1.mp4
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            paths = [os.path.join(folder, name) for name in subfolders]
            starts += [path for path in paths if os.path.islink(path)]
            for name in sorted(files):
                if name.lower().endswith(suffixes) and not name.startswith("."):
                    found.append(os.path.join(folder, name))
    return found, left_out


def find_videos(root):
    """Return the paths of the video files of a dataset, and [(path, reason)] of folders left out.

    Raises ValueError if there is no video.
    """
    if not root.exists():
        names = os.listdir(root.parent) if root.parent.is_dir() else []
        near = difflib.get_close_matches(root.name, names, 1)
        hint = f"; did you mean {root.parent / near[0]}?" if near else ""
        raise ValueError(f"no dataset at {root}{hint}")
    if not root.is_dir():
        return [os.fspath(root)], []
    videos, left_out = find_files(root, VIDEO_SUFFIXES)
    if not videos:
        why = f": {left_out[0][1]}" if left_out else ""
        raise ValueError(f"no video (.mp4, .mov, .mkv, .webm, .avi, ...) in {root}{why}")
    return videos, left_out


class TalkingHeads:
    """All usable clips of a dataset, which is a folder or one video file.

    `clips` are sorted by person and name; `people` is {person: [Clip]}; `skipped` holds (path,
    reason) of files that cannot be used, `notes` (path, note) of files that are used in part, of
    copies across people and of doubtful names. `owners` is {(num_frames, fingerprint) of a clip:
    {person: the first path of it}}. `size` is in pixels, `crop` the share of each side that is
    kept, from the middle; `finder` cuts out the face where the middle does not show it. Only people
    in `names`, by default all, are read. All clips are of the person `everybody`, if it is given,
    and not of those whom their names suggest. Raises ValueError if there is no dataset or nothing
    usable in it.
    """

    def __init__(self, root, size=64, crop=1.0, cache="", finder=None, names=None, everybody=None):
        self.root = Path(os.path.abspath(root))
        self.notes = []
        self.owners = {}
        videos, self.skipped = find_videos(self.root)
        assigned, left_out = assign_people(videos, os.fspath(self.root), everybody)
        self.skipped += left_out
        if names is not None:
            assigned = {path: own for path, own in assigned.items() if own[0] in names}
        folder = open_cache(cache, self.root, size, crop, finder)
        files = self.open_files(assigned, folder, size, crop, finder)
        if names is None:  # else other people's clips stay in the cache
            delete_unused(folder, {file.path for file in files.values()})
        # Decode what is not in the cache; a clip that cannot be used is skipped.
        missing = [file for file in dict.fromkeys(files.values()) if not file.load_info()]
        results = in_threads(decode_into_cache, missing, "reading clips")
        self.clips = self.make_clips(assigned, files, dict(zip(missing, results)))
        if not self.clips:
            examples = "; ".join(
                f"{os.path.basename(path)}: {reason}" for path, reason in self.skipped[:3]
            )
            raise ValueError(f"no usable clip in {root}, {len(self.skipped)} skipped: {examples}")
        self.clips.sort(key=attrgetter("person", "name"))
        self.people = by_person(self.clips)
        self.note_names()
        self.note_subsets()

    def open_files(self, videos, folder, size, crop, finder):
        """Return {path: `CacheFile` in the cache's `folder`} of the `videos` that are files."""
        files = {}
        distinct = {}  # links to one file share its cached clip
        # Each folder is resolved only once, as there may be hundreds of thousands of files.
        true_folder = functools.cache(os.path.realpath)
        sounds = {}
        for path in videos:
            try:
                state = file_state(path)
                if os.path.islink(path):
                    true_path = os.path.realpath(path)
                    # The sound lies beside the link, not beside the file that it leads to.
                    sound = find_sound(path, sounds)
                else:
                    parent, name = os.path.split(path)
                    true_path = os.path.join(true_folder(parent), name)
                    sound = None
                key = digest((true_path, *state, sound))
            except ValueError as error:
                self.skipped.append((path, str(error)))
                continue
            file = CacheFile(folder / f"{key}.clip", path, size, crop, finder, sounds)
            files[path] = distinct.setdefault(key, file)
        return files

    def make_clips(self, assigned, files, reasons):
        """Return [Clip] of `files` {path: CacheFile}, each with the prompt and opening in its .txt,
        and note copies across people.

        Files that cannot be used, for `reasons` {CacheFile: reason or ""}, are left out, as are
        further copies of a person's clip.
        """
        clips = []
        for path, file in files.items():
            if reasons.get(file):
                self.skipped.append((path, reasons[file]))
                continue
            person, name = assigned[path]
            fingerprint = file.info["checksum"]
            owners = self.owners.setdefault((file.info["frames"], fingerprint), {})
            # A copy might be for training, and its original for the test.
            original = owners.setdefault(person, path)
            if original != path:
                self.skipped.append((path, f"the same picture and sound as {original}"))
                continue
            elsewhere = next(iter(owners.values()))
            copied = ""
            if elsewhere != path:
                copied = f"the same picture and sound as {elsewhere}, of another person"
            text = os.path.splitext(path)[0] + ".txt"
            prompt, opening, trouble = read_notes(text, file.info["frames"])
            clips.append(Clip(person, name, path, file, file, file, prompt, opening, fingerprint))
            for note in filter(None, (copied, file.info["note"], trouble)):
                self.notes.append((path, note))
        return clips

    def note_names(self):
        """Note people whose names look alike, and folders that may hold several people."""
        spelled = {}
        for person, clips in self.people.items():
            folder = os.path.dirname(clips[0].path)
            looks = unicodedata.normalize("NFKC", person).casefold().strip()
            other = spelled.setdefault(looks, person)
            if other != person:
                note = f"{person} and {other} are taken for two people, though they look alike"
                self.notes.append((folder, note))
            names = [os.path.splitext(os.path.basename(clip.path))[0] for clip in clips]
            if suspects := ", ".join(several_people(names)[:5]):
                note = f"the names suggest several people ({suspects} ...), taken for one"
                self.notes.append((folder, note))

    def note_subsets(self):
        """Note folders that may be one person's although their subfolders are taken for people:
        anna/test/kitchen has the layout of lrs3/test/anna.
        """
        places = {(os.path.dirname(clip.path), clip.person) for clip in self.clips}
        base = Path(os.path.commonpath([folder for folder, _ in places]))
        subsets = {}  # folder above one such as `test` -> people in it
        for folder, person in places:
            split = Path(folder).parent
            above = split.parent
            in_a_split = os.path.basename(folder) == person and NOT_A_PERSON.fullmatch(split.name)
            if in_a_split and base in above.parents and not NOT_A_PERSON.fullmatch(above.name):
                subsets.setdefault(os.fspath(above), set()).add(person)
        for above, people in sorted(subsets.items()):
            names = ", ".join(sorted(people)[:5])
            note = f"the folders in it are taken for people of their own ({names} ...)"
            self.notes.append((above, note))


def delete_unused(folder, used):
    """Delete the clips in the cache's `folder` that are not `used`: of deleted or changed files."""
    for path in folder.glob("*.clip"):
        if path in used:
            continue
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            # A hidden file is being written now, or was when its process was killed.
            if not path.name.startswith(".") or time.time() - path.stat().st_mtime > 86400:
                path.unlink()


def decode_into_cache(file):
    """Write a `CacheFile`; return '', or the reason why its source cannot be used.

    Raises OSError where the disk is full.
    """
    try:
        file.write()
    except ValueError as error:
        return str(error)
    return ""


def read_notes(path, num_frames):
    """Return the prompt ('' if none) and the opening (None if none) in a .txt file, and a text on
    what is wrong with the file, or ''.
    """
    if not os.path.isfile(path):
        return "", None, ""
    try:
        text = Path(path).read_text("utf-8-sig", "replace")
    except OSError as error:
        return "", None, f"its .txt cannot be read ({error.strerror})"
    notes = dict(re.findall(r"^(\w+):[ \t]*(.*?)[ \t]*$", text, re.MULTILINE))
    prompt = notes.get("Prompt", "")
    if "\0" in text or "\ufffd" in prompt:
        return "", None, "its .txt is not in UTF-8: save it so"
    if "Opening" not in notes:
        return prompt, None, ""
    with contextlib.suppress(ValueError):  # no numbers
        opening = np.array(notes["Opening"].split()[:num_frames], np.float32)
        if len(opening) == num_frames and opening.min() >= 0 and opening.max() <= 1:
            return prompt, opening, ""
    return prompt, None, f"its .txt does not give {num_frames} mouth openings in 0..1"


def by_person(clips, min_frames=0):
    """Return {person: [Clip of at least `min_frames`]}, in the order of the clips."""
    people = {}
    for clip in clips:
        if clip.num_frames >= min_frames:
            people.setdefault(clip.person, []).append(clip)
    return people


# ---------------------------------------------------------------- people and splits

ROLES = ("public", "client", "unseen")  # with which the names of synthetic talkers begin
MIN_PUBLIC = 8  # two halves of four, the fewest people that judges can be trained on


class People(NamedTuple):
    """{person: [Clip]} of the people whom the backbone is trained on, of clients, and of people
    whom nothing is trained on.
    """

    public: dict
    clients: dict
    unseen: dict


def load_people(root, size, crop, num_clients, num_unseen, seed, cache="", min_frames=0):
    """Return the people of a dataset by role, with clips of at least `min_frames`; print which
    files are not used, and why.

    If `root` does not exist and its name begins with "synthetic", the dataset is made first, by
    `make_synthetic`. Raises ValueError if it was made with other settings.
    """
    root = Path(root)
    if root.name.startswith("synthetic"):
        options = {"num_clients": num_clients, "num_unseen": num_unseen, "size": size, "seed": seed}
        record = root / "options.json"
        if not root.exists():
            try:
                make_synthetic(root, **options)
            except ValueError:
                if not record.exists():  # it does if another run was faster
                    raise
        if record.exists():
            try:
                made = {key: float(value) for key, value in json.loads(record.read_text()).items()}
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{record} is not what made the talkers: remove {root}") from None
            other = []
            for key, value in options.items():
                enough = key.startswith("num_") and made.get(key, 0) >= value
                if not enough and made.get(key) != value:
                    other.append(key)
            if other:
                raise ValueError(
                    f"{root} was made with another {', '.join(other)}: remove it, or set another "
                    "data.root"
                )
    dataset = TalkingHeads(root, size, crop, cache)
    usable = []
    for clip in dataset.clips:
        owners = dataset.owners[clip.num_frames, clip.fingerprint]
        if clip.num_frames < min_frames:
            reason = f"only {clip.num_frames} frames long, backbone.num_frames needs {min_frames}"
            dataset.skipped.append((clip.path, reason))
        elif len(owners) > 1:
            # One person might be trained on a clip that another is tested on.
            names = ", ".join(sorted(owners)[:5])
            dataset.skipped.append((clip.path, f"the same picture and sound are of {names}"))
        else:
            usable.append(clip)
    print_troubles(dataset, most=20)
    people = by_person(usable)
    # Clients need a take each for training, validation and testing; unseen people one for the
    # reference picture and one to be measured on.
    num_takes = {name: len(by_take(clips)) for name, clips in people.items()}
    few = {name for name, num in num_takes.items() if num < 3}
    single = {name for name, num in num_takes.items() if num < 2}
    roles = split_people(list(people), num_clients, num_unseen, seed, few, single)
    if len(roles[0]) < MIN_PUBLIC:
        raise ValueError(
            f"{root}: {len(roles[0])} people are left to be public, at least {MIN_PUBLIC} are needed"
        )
    lone = [name for name in roles[2] if name in single]
    if lone and is_first_worker():
        names = ", ".join(lone[:5])
        print(f"note: {len(lone)} unseen people have one clip only and are not measured: {names}")
    return People(*({name: people[name] for name in names} for names in roles))


def print_troubles(dataset, most=None):
    """Print up to `most` skipped files with the reasons, and up to `most` notes on files."""
    if not is_first_worker():
        return
    for title, files in (("skipped", dataset.skipped), ("note", dataset.notes)):
        for path, text in files[:most]:
            print(printable(f"{title}: {path}: {text}"))
        if most and len(files) > most:
            print(f"{title}: {len(files) - most} more (python data.py --check {dataset.root})")


def split_people(names, num_clients, num_unseen, seed, no_clients=(), last_unseen=()):
    """Return disjoint sorted lists of public people, clients and unseen people.

    Names such as client-003 keep their role. But people in `no_clients`, who have too few clips,
    are never clients (a client-003 among them gets no role at all: it is never public), and people
    in `last_unseen` are unseen only if there are no others. Raises ValueError if there are too few
    people.
    """
    if num_clients < 1 or num_unseen < 0:
        raise ValueError(f"{num_clients} clients and {num_unseen} unseen people: 1 and 0 at least")
    roles = {role: sorted(name for name in names if name.startswith(role + "-")) for role in ROLES}
    # Everybody else may get any role.
    free = sorted(set(names).difference(*roles.values()))
    roles["client"] = [name for name in roles["client"] if name not in no_clients]
    rng_of("people", seed).shuffle(free)
    fit = [name for name in free if name not in no_clients]
    clients = (roles["client"] + fit)[:num_clients]
    free = [name for name in free if name not in clients]
    free.sort(key=lambda name: name in last_unseen)
    unseen = (roles["unseen"] + free)[:num_unseen]
    public = sorted(set(roles["public"] + free).difference(unseen))
    if len(clients) < num_clients or len(unseen) < num_unseen or not public:
        few = f" ({len(no_clients)} with fewer than 3 clips)" if no_clients else ""
        raise ValueError(
            f"{len(names)} people{few} cannot be split into {num_clients} clients, {num_unseen} "
            "unseen people and at least one public person"
        )
    return public, sorted(clients), sorted(unseen)


def by_take(clips):
    """Return one person's clips by take [[Clip]]; MEAD's camera views are one take."""
    takes = {}
    for clip in clips:
        takes.setdefault(re.sub(rf"^(video-)?{CAMERA_ANGLE}-", "", clip.name), []).append(clip)
    return list(takes.values())


def num_held_out(num_takes):
    """Return how many of a person's takes are for validation; as many are for testing."""
    return max(1, round(num_takes / 5))


def split_clips(clips, seed):
    """Return {"train", "validation", "test": clips} of one person, with a fifth of the takes each
    for validation and test.

    Raises ValueError for fewer than three takes.
    """
    person = clips[0].person
    takes = by_take(clips)
    if len(takes) < 3:
        raise ValueError(
            f"{person} has {len(takes)} usable clips; train, validation and test need at least 3 "
            "(views of one take are one)"
        )
    # A person's split does not depend on who else is there.
    order = rng_of("clips", seed, person).permutation(len(takes))
    held_out = num_held_out(len(takes))
    validation, test, train = np.split(order, [held_out, 2 * held_out])
    parts = {"train": train, "validation": validation, "test": test}
    return {part: [clip for i in sorted(own) for clip in takes[i]] for part, own in parts.items()}


def segment(clips, seconds):
    """Return clips cut into pieces of `seconds`; a rest of at least half of that is another one."""
    pieces = []
    length = max(1, round(seconds * FPS))
    for clip in clips:
        starts = range(0, max(1, clip.num_frames - length // 2 + 1), length)
        for number, start in enumerate(starts):
            changes = {"name": f"{clip.name}-{number}", "path": f"{clip.path}/{number}"}
            pieces.append(slice_clip(clip, start, start + length, **changes))
    return pieces


# ---------------------------------------------------------------- batches


def pick(options, generator):
    """Return one of the options, drawn at random."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def sample_batch(
    people, batch_size, num_frames, generator, same_clip=False, mirror=False, device="cpu"
):
    """Return windows of clips {person: [Clip of at least num_frames]}, drawn at random, each with a
    reference picture: a frame of any of the person's clips, or of the same one, outside of the
    window where there is room. With `mirror` half of the windows, drawn at random, are mirrored
    with their reference.

    A person is drawn in proportion to the square root of the number of clips: drawn uniformly,
    people with one clip would be memorised; in proportion, a person with 300 would dominate.
    Returns a dict of tensors on `device`, frames [b f 3 H W] and reference [b 3 H W] in [-1, 1],
    mel [b f 20 40], liveliness [b], and the list prompt. If the reference comes from a clip with
    the same prompt, it shows the expression already, and the prompt becomes "". Raises ValueError
    if nobody has a clip (`by_person` leaves out those that are too short).
    """
    if not any(people.values()):
        raise ValueError(f"no clip has the {num_frames} frames that a training window needs")
    names = sorted(people)
    probability = torch.tensor([float(len(people[name])) for name in names]).sqrt()  # people
    rows = []
    drawn = torch.multinomial(probability, batch_size, replacement=True, generator=generator)
    for i in drawn.tolist():
        own = people[names[i]]
        clip = pick(own, generator)
        start = pick(range(clip.num_frames - num_frames + 1), generator)
        stop = start + num_frames
        other = clip if same_clip else pick(own, generator)
        indices = range(other.num_frames)
        if other is clip and clip.num_frames > num_frames:
            indices = [*range(start), *range(stop, clip.num_frames)]
        row = {
            "frames": clip.frames[start:stop],  # f 3 H W
            "reference": other.frames[pick(indices, generator)],  # 3 H W
            "mel": audio_windows(clip.mel, start, stop),  # f 20 40
            "liveliness": np.float32(clip.liveliness),
            "prompt": clip.prompt if clip.prompt != other.prompt else "",
        }
        if mirror and pick((False, True), generator):
            row["frames"] = row["frames"][..., ::-1]
            row["reference"] = row["reference"][..., ::-1]
        rows.append(row)
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    for key in ("frames", "reference"):
        # bytes, not floats, are copied to the device
        batch[key] = to_float(np.stack(batch[key]), device)
    for key in ("mel", "liveliness"):
        batch[key] = torch.from_numpy(np.stack(batch[key])).to(device)
    return batch


def typical_liveliness(clips):
    """Return the median of the clips' liveliness."""
    return float(np.median([clip.liveliness for clip in clips]))


def reference_frame(clips):
    """Return the frame uint8 [3 H W] of a person's clips for use as reference picture: a typical
    view from the front.

    Of the three percent of frames most like the person's mean and their own mirror image, it is the
    one with most detail in its upper half: sharp, the eyes open.
    """
    # About 500 frames, and at most every second: neighbours hardly differ.
    step = max(2, sum(clip.num_frames for clip in clips) // 500)
    frames = np.concatenate([clip.frames[::step] for clip in clips])  # n 3 H W
    grey = frames.mean(1, dtype=np.float32)  # n H W
    grey -= grey.mean((1, 2), keepdims=True)
    # Equal contrast, which has no information on the pose; + 1: a uniform frame has no contrast.
    grey /= grey.std((1, 2), keepdims=True) + 1
    likeness = (grey * grey.mean(0)).mean((1, 2)) + 0.5 * (grey * grey[:, :, ::-1]).mean((1, 2))
    best = np.argsort(-likeness, kind="stable")[: max(1, len(frames) * 3 // 100)]
    upper = grey[best, : grey.shape[1] // 2]
    detail = [np.square(laplace(picture)).mean() for picture in upper]
    return frames[best[np.argmax(detail)]]


# A view is how another camera sees a clip. Each column is in [-1, 1], and 0 changes nothing.
VIEW_NAMES = (
    "zoom",
    "shift_x",
    "shift_y",
    "roll",
    "brightness",
    "gamma",
    "warmth",
    "light_x",
    "light_y",
    "degradation",  # below 0 blurred, above 0 noisy
    "mirror",  # below 0 mirrored
)


def augment(clips, view, generator):
    """Return clips [b f 3 h w] in [0, 1] as other cameras see them; view [b 11]: VIEW_NAMES."""
    b, f, _, h, w = clips.shape
    zoom, shift_x, shift_y, roll, brightness, gamma, warmth, *rest = view.to(clips.device).T  # b
    light_x, light_y, degradation, mirror = rest  # b
    scale = torch.exp(-0.3 * zoom.clamp_min(0) - 0.1 * zoom.clamp_max(0))  # 0.74 (closer) to 1.1
    across = torch.where(mirror < 0, -scale, scale)
    cos, sin = torch.cos(0.15 * roll), torch.sin(0.15 * roll)
    affine = [across * cos, -scale * sin, 0.1 * shift_x, across * sin, scale * cos, 0.1 * shift_y]
    affine = torch.stack(affine, 1).view(b, 2, 3)  # b 2 3
    grid = F.affine_grid(affine, (b, 3, h, w), align_corners=False)  # b h w 2
    x = rearrange(clips, "b f c h w -> b (f c) h w")  # all frames of a clip move alike
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = x + 0.6 * gamma.view(b, 1, 1, 1) * x * (1 - x)  # 0 and 1 stay
    tint = torch.tensor([0.2, 0.0, -0.2]) + 0.08 * torch.randn(b, 3, generator=generator)
    colour = torch.exp(0.3 * brightness[:, None] + warmth[:, None] * tint.to(x.device))  # b c
    grid_x, grid_y = grid.unbind(-1)  # b h w, from -1 to 1
    light = 1 + 0.35 * light_x.view(b, 1, 1) * grid_x + 0.2 * light_y.view(b, 1, 1) * grid_y
    gain = torch.einsum("b c, b h w -> b c h w", colour, light)
    x = rearrange(x, "b (f c) h w -> b f c h w", f=f) * gain[:, None]  # b f c h w
    for clip, amount in zip(x, degradation.tolist()):  # f c h w
        if amount < 0:
            blurred = F.avg_pool2d(clip, 3, 1, 1, count_include_pad=False)
            clip.lerp_(blurred, min(1, -1.5 * amount))
        elif amount > 0:
            noise = torch.rand(clip.shape, generator=generator) - 0.5
            clip.add_(noise.to(x.device), alpha=0.2 * amount)
    return x.clamp(0, 1)


# ---------------------------------------------------------------- synthetic talkers: people

# Vowel: mouth opening, mouth width (0 round .. 1 spread), first and second formant in Hz.
VOWELS = {
    "a": (1.0, 0.55, 850, 1300),
    "ae": (0.82, 0.85, 720, 1750),
    "o": (0.66, 0.15, 580, 950),
    "e": (0.58, 0.8, 540, 1950),
    "i": (0.32, 1.0, 320, 2400),
    "u": (0.3, 0.0, 340, 780),
}
# Consonant: mouth opening, voicing, hiss.
CONSONANTS = {
    "b": (0, 0.15, 0),
    "m": (0, 0.25, 0),
    "p": (0, 0, 0.1),
    "f": (0.08, 0, 0.5),
    "s": (0.14, 0, 1),
    "d": (0.2, 0.2, 0.1),
    "l": (0.3, 0.35, 0),
    "k": (0.25, 0.05, 0.3),
}
# Prompt: smile, brow lift, brow slant, eye opening.
PROMPTS = {
    "calm": (0, 0, 0, 1),
    "smiling": (1, 0.3, 0, 0.9),
    "surprised, raised brows": (0.1, 2.2, 0.3, 1.3),
    "sad": (-0.8, 0.3, 1.2, 0.85),
    "stern, lowered brows": (-0.3, -1.2, -1.2, 0.85),
}
STYLES = ("bald", "short", "long", "bun")
SKINS = "ffe0c4 c6865a f1c2a0 643e2c e0ac7d 965f3e fad2b9".split()  # hexadecimal RGB
HAIRS = "1c1616 462a1a 96969b 784824 c49654 963a1c e8cd8c".split()
EYES = "462d19 3c6eaa 468250 785a32 231914".split()
GLASSES = ["", "", "", "191619", "782923"]
# Ranges of what differs between people; lengths are in 64ths of the picture.
LOOKS = {
    "width": (15.5, 19),
    "height": (20, 23),
    "eye_gap": (6.3, 7.8),
    "eye_width": (2.9, 3.8),
    "eye_height": (1.8, 2.6),
    "brow": (0.5, 1.2),
    "nose": (3.5, 6),
    "lips": (1, 1.9),
    "hairline": (-15, -11),
    "parting": (-0.4, 0.4),
    "volume": (0.5, 2.5),  # of the hair
    "pitch": (90, 225),  # Hz
    "tract": (0.9, 1.12),  # scales the formants
}
# Two ranges each: of public and unseen people, and of clients, who are closer, livelier, and in dim
# warm light from a side.
HABITS = {
    "zoom": ((0.95, 1.03), (1.02, 1.08)),
    "brightness": ((0.75, 0.95), (0.4, 0.6)),
    "warmth": ((0, 0), (0.25, 0.35)),
    "light": ((0, 0.3), (0.5, 0.9)),
    "motion": ((0.7, 1.1), (0.9, 1.5)),
    "articulation": ((0.82, 0.92), (0.78, 1.1)),
    "smile": ((-0.1, 0.25), (-0.3, 0.7)),
    "blinks": ((0.3, 0.5), (0.2, 0.9)),  # per second
}


def rgb(colour):
    return np.frombuffer(bytes.fromhex(colour), np.uint8).astype(np.float32)


def random_colour(rng, value):
    hue, saturation = rng.uniform((0, 0.1), (1, 0.5))
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def make_person(seed, name, accent=0.0):
    """Return looks, voice, habits and camera of the synthetic person called <role>-<number>."""
    rng = rng_of(seed, name)
    role, number = name.split("-")
    is_client = role == "client"
    ranges = LOOKS | {key: limits[is_client] for key, limits in HABITS.items()}
    p = SimpleNamespace(**{key: rng.uniform(*limits) for key, limits in ranges.items()})
    p.light *= rng.choice([-1, 1])
    p.background = random_colour(rng, p.brightness)
    p.clothes = random_colour(rng, 0.9 * p.brightness)
    # Neighbours in number get different looks, so that even a dozen people cover the range. Roles
    # start at looks 37 apart, whatever the seed.
    i = int(number) + 37 * ROLES.index(role) + int(rng_of(seed).integers(100))
    dark = i % 7 in (3, 5)
    p.skin = rgb(SKINS[i % 7])
    p.hair = rgb(HAIRS[i % 3 if dark else (5 * i + i // 7) % 7])
    p.style = STYLES[(i + i // 4) % 4]
    p.beard = rng.choice([0, 0.5, 0.9]) if p.style in ("bald", "short") else 0
    p.lips_colour = p.skin * rng.uniform((0.72, 0.5, 0.5), (0.95, 0.66, 0.68)).astype(np.float32)
    p.eyes = rgb(rng.choice(EYES))
    p.glasses = rgb(rng.choice(GLASSES))
    # Accent: a vowel sounds the same for everybody, but opens the mouth as another vowel does. Each
    # person has an accent. Clients' accents are three times as strong, and all clients have three
    # quarters of theirs in common.
    usual = np.array([shape[:2] for shape in VOWELS.values()])  # v 2
    other = rng.permutation(usual)  # v 2
    if is_client:
        other = 0.75 * usual[::-1] + 0.25 * other
    mouths = usual + (accent if is_client else accent / 3) * (other - usual)
    p.mouths = dict(zip(VOWELS, mouths))
    return p


# ---------------------------------------------------------------- synthetic talkers: speech

CONTROL_HZ = 200  # of the curves that sound and picture follow
REST = (0, 0.5, 500, 1500, 0, 0)  # mouth opening and width, two formants, voicing, hiss


def speech_curve(rng, seconds, mouths):
    """Return the curve float64 [t 6] at 200 Hz of what `REST` lists, for random syllables."""
    keys = [(-2.0, *REST)]  # (seconds, values), between which the curve is smooth
    t = -rng.uniform(0.05, 1.2)
    while t < seconds + 0.5:
        for _ in range(rng.integers(4, 10)):  # one phrase
            consonant, vowel = rng.choice(list(CONSONANTS)), rng.choice(list(VOWELS))
            length = 1 / rng.uniform(3, 5)
            stress = rng.uniform(0.85, 1)
            narrow, voicing, hiss = CONSONANTS[consonant]
            usual, _, *formants = VOWELS[vowel]
            opening, width = mouths[vowel]
            loudness = 0.15 + 0.85 * stress * usual  # an accent does not change it
            for at in (0.05, 0.25):
                keys.append((t + at * length, narrow, width, *formants, voicing, hiss))
            for at in (0.5, 0.82):
                keys.append((t + at * length, stress * opening, width, *formants, loudness, 0))
            t += length
        pause = rng.uniform(0.2, 0.45)
        keys += [(t + 0.1, *REST), (t + pause, *REST)]
        t += pause
    times, *values = np.array(keys).T
    # PCHIP does not overshoot: a closed mouth stays closed.
    curve = PchipInterpolator(times, values, axis=1)(np.arange(0, seconds, 1 / CONTROL_HZ)).T
    return gaussian_filter1d(curve, 0.02 * CONTROL_HZ, axis=0)


def synthesize(rng, p, curve):
    """Return int16 sound at 16 kHz: harmonics weighted by three resonances (formants), and hiss."""
    _, _, formant1, formant2, voicing, hiss = curve.T
    pitch = p.pitch * (1 + 0.08 * wander(rng, len(curve), CONTROL_HZ))
    harmonic = np.arange(1, int(5000 / p.pitch) + 1)[:, None]
    frequency = harmonic * pitch  # k t
    gain = voicing / harmonic  # a glottal pulse falls off with 1 / k
    for centre, bandwidth in ((formant1, 90), (formant2, 120), (2700, 180)):
        square = (centre * p.tract) ** 2
        gain = gain * square / np.hypot(square - frequency**2, bandwidth * frequency)
    controls = torch.from_numpy(np.vstack([gain, hiss, pitch])).float()[None]  # 1 (k + 2) t
    controls = F.interpolate(controls, scale_factor=SAMPLE_RATE // CONTROL_HZ, mode="linear")
    *gain, hiss, pitch = controls[0].numpy()
    turns = harmonic * (np.cumsum(pitch, dtype=np.float64) / SAMPLE_RATE)  # k n
    phase = (turns - np.floor(turns)).astype(np.float32)  # % 1 would take six times as long
    voice = (gain * np.sin(2 * np.pi * phase)).sum(0)  # n
    white = rng.standard_normal(len(voice) + 2)
    sound = 0.035 * voice + 0.02 * hiss * np.diff(white, 2) + 0.001 * white[2:]
    return (sound.clip(-1, 1) * 32767).astype(np.int16)


def wander(rng, num, hz, tempo=1.0):
    """Return a smooth random curve [num] of unit variance: five sines with periods of 1 to 4 s at
    tempo 1.
    """
    periods = np.exp(rng.uniform(0, np.log(4), 5)) / tempo
    phases = rng.uniform(0, 2 * np.pi, 5)
    t = np.arange(num)[:, None] / hz
    return np.sin(2 * np.pi * t / periods + phases).sum(1) / np.sqrt(2.5)


# ---------------------------------------------------------------- synthetic talkers: pictures


def make_motion(rng, p, curve, num_frames, prompt):
    """Return motion, each float32 [f 1 1]: head, eyes, brows, and the speech curve's mouth."""
    smile, lift, slant, eye_opening = PROMPTS[prompt or "calm"]
    t = (np.arange(num_frames) + 0.5) / FPS
    opening, width, _, _, voicing, _ = curve[(t * CONTROL_HZ).astype(int)].T  # f
    stress = gaussian_filter1d(voicing, 0.15 * FPS) - 0.4
    lids = np.full(num_frames, float(eye_opening))  # 0 closed, 1 open
    blink = rng.exponential(1 / p.blinks)
    while blink < t[-1] + 0.2:
        lids *= 1 - np.exp(-(((t - blink) / 0.06) ** 2))
        blink += 0.4 + rng.exponential(1 / p.blinks)
    x, y, yaw, gaze, brows = (wander(rng, num_frames, FPS, p.motion) for _ in range(5))
    motion = {  # small movements: face tracks, as LRS3 cuts them, follow the head
        "x": 0.4 * p.motion * x,
        "y": 0.25 * p.motion * (y + stress),
        "yaw": 0.5 * p.motion * yaw,
        "gaze": 0.9 * np.tanh(1.2 * gaze),
        "brows": lift + 0.25 * brows + 0.6 * stress,
        "slant": np.full(num_frames, slant),
        "lids": lids,
        "smile": np.full(num_frames, 0.8 * smile + p.smile),
        "opening": (opening * p.articulation).clip(0, 1),
        "width": width + 0.25 * max(smile, 0),
    }
    motion = {key: value.astype(np.float32)[:, None, None] for key, value in motion.items()}
    return SimpleNamespace(**motion)


def ellipse(x, y, rx, ry):
    """Return the signed distance to an ellipse at the origin, to first order."""
    slope = 2 * np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2)
    return ((x / rx) ** 2 + (y / ry) ** 2 - 1) / np.maximum(slope, 1e-3)


def overlap(*distances):
    """Return the signed distance to the intersection of several shapes."""
    return functools.reduce(np.maximum, distances)


def draw(p, m, size):
    """Return pictures uint8 [f 3 size size] of person `p` in motion `m`.

    Shapes are signed distances, negative inside, in 64ths of the picture; y points down.
    """
    across = (np.arange(size, dtype=np.float32) + 0.5) * 64 / size - 32  # w
    down = across[:, None]  # h 1
    image = np.empty((3, len(m.x), size, size), np.float32)  # 3 f h w
    image[:] = p.background[:, None, None, None] * (1.08 - 0.006 * (down + 0.5 * across))

    def paint(distance, colour, opacity=1.0, blur=1.0):
        # Edges are about a pixel wide.
        alpha = (0.5 - distance * (p.zoom * size / 83 / blur)).clip(0, 1) * opacity
        for channel, value in zip(image, colour):
            channel += alpha * (value - channel)

    # Behind the face: hair, neck, clothes. The body moves less than the head.
    x = (across - m.x) / p.zoom  # f 1 w
    y = (down - m.y) / p.zoom + 1
    body = x + 0.6 * m.x
    shaded_skin = p.skin * np.array([0.7, 0.6, 0.57], np.float32)
    if p.style == "long":
        paint(ellipse(x, np.minimum(y + 4, 0), p.width + 2 + p.volume, p.height + 1), p.hair * 0.75)
    if p.style == "bun":
        paint(ellipse(x, y + p.height + 2.5, 6, 5), p.hair * 0.9)
    paint(ellipse(body, y - 44, 30, 19), p.clothes)
    paint(ellipse(body, y - 20, 0.52 * p.width, 10), shaded_skin)

    # Head: the jaw drops with the mouth.
    paint(ellipse(np.abs(x + 0.5 * m.yaw) - p.width, y + 1, 2.4, 4), p.skin * 0.88)  # ears
    jaw = y / (1 + 0.1 * m.opening * (y > 0))  # f h 1
    face = ellipse(x, jaw, p.width, p.height)  # f h w
    paint(face, p.skin)
    turned = x - m.yaw
    if p.beard:
        mouth = ellipse(turned, y - 11.5 - 2 * m.opening, 7.5, 3.5 + 4 * m.opening)
        beard = overlap(face - 0.6, 8.5 - y - 0.025 * turned**2, -mouth)
        paint(beard, p.hair * 0.9, p.beard, blur=2)

    # Both eyes at once: `outward` is the distance from the middle of an eye, away from the nose.
    outward = np.abs(turned) - p.eye_gap
    height = y + 3
    lids = ellipse(outward, height, p.eye_width, p.eye_height * m.lids.clip(0.12, 2))
    eye = overlap(lids, np.abs(outward) - p.eye_width)
    iris = outward - m.gaze * np.sign(turned)
    arch = 0.13 * m.slant * outward + 0.06 * (p.eye_width**2 - outward**2)
    paint(eye - 0.7, p.skin * 0.35, 0.9)
    paint(eye, (248, 246, 242), (2 * m.lids - 0.4).clip(0, 1))
    paint(overlap(ellipse(iris, height, 1.9, 1.9), eye), p.eyes)
    paint(overlap(ellipse(iris, height, 0.95, 0.95), eye), (12, 10, 12))
    brow = np.abs(height + 6 + m.brows - arch) - p.brow
    paint(overlap(brow, np.abs(outward) - p.eye_width - 1), p.hair * 0.7)
    if len(p.glasses):
        paint(np.abs(ellipse(outward, height, 5.3, 4.6)) - 0.45, p.glasses)
        paint(overlap(np.abs(height + 0.5) - 0.5, outward + 5), p.glasses)  # the bridge

    # Nose: the shadows beside it and below it.
    nose = turned - 0.5 * m.yaw
    paint(ellipse(nose + p.light, y - p.nose / 2, 1, p.nose), shaded_skin, 0.4, blur=2.5)
    paint(ellipse(nose, y - p.nose - 1.5, p.nose / 2, 0.5), shaded_skin, 0.8, blur=2)

    # Mouth: lips around a dark inside with teeth and tongue, 9 units high at full opening.
    corner = (turned / ((3.8 + 3.2 * m.width) * (1 + 0.1 * m.smile))) ** 2  # 1 at the corners
    height = y - 11.2 + 0.9 * m.smile * (corner - 0.3)  # a smile lifts the corners
    top = -2.2 * m.opening * (1 - corner) - height
    bottom = height - 6.8 * m.opening * (1 - corner)
    inside = overlap(top, bottom)
    rim = p.lips * (1.25 - 0.25 * m.width) * (1.15 - corner)  # round lips are full
    line = np.abs(height) - 0.5 + 6 * np.maximum(corner - 0.95, 0)  # between closed lips
    teeth = -top - (1 + 1.3 * m.width) * (1 - corner)
    ajar = (4 * m.opening).clip(0, 1)
    paint(overlap(top - 0.9 * rim, bottom - 1.3 * rim), p.lips_colour)
    paint(line, p.lips_colour * 0.45, 1 - ajar)
    paint(inside, (52, 14, 18), ajar)
    paint(overlap(inside, teeth), (240, 236, 226), ajar)
    paint(overlap(inside, 0.5 - bottom - 2.6 * m.opening), (176, 74, 76), ajar)  # tongue

    # The head is round: lit from one side, darker towards its edge.
    light = 0.2 * p.light * x / p.width - 0.06 * jaw / p.height
    edge = (x / p.width) ** 2 + (jaw / p.height) ** 2
    image *= 1 + (0.5 - face).clip(0, 1) * (0.04 + light - 0.2 * edge**2)
    if p.style != "bald":
        side = turned + 0.3 * m.yaw
        fall = 0.06 if p.style == "long" else 0.034  # how far it comes down at the sides
        front = y - p.hairline - p.parting * side - fall * side**2
        top = p.height + 0.7 * p.volume
        cap = ellipse(x, y + 0.6 * p.volume, p.width + 1 + 0.4 * p.volume, top)
        paint(overlap(cap, front / np.sqrt(1 + (2 * fall * side) ** 2)), p.hair)
    tint = 1 - p.warmth * np.array([0.15, 0.55, 1], np.float32)
    image *= tint[:, None, None, None] * (1 + 0.006 * p.light * across)
    return rearrange(image.clip(0, 255).round().astype(np.uint8), "c f h w -> f c h w")


# ---------------------------------------------------------------- synthetic talkers: files

CLIPS_PER_CLIENT = 5
CLIP_SECONDS = 2.0


def make_clip(stem, seed, seconds, size, accent):
    """Write <stem>.mp4 and <stem>.txt of the synthetic person named as the folder of `stem`."""
    name = stem.parent.name
    person = make_person(seed, name, accent)
    rng = rng_of(seed, name, stem.name)
    num_frames = round(seconds * FPS)
    prompt = str(rng.choice(["", *PROMPTS]))
    curve = speech_curve(rng, num_frames / FPS, person.mouths)
    motion = make_motion(rng, person, curve, num_frames, prompt)
    audio = synthesize(rng, person, curve)
    frames = draw(person, motion, size)
    # AAC would take longer than all the rest.
    write_video(stem.with_suffix(".mp4"), frames, audio, crf=11, sound_codec="libmp3lame")
    openings = " ".join(f"{opening:.3f}" for opening in motion.opening.flat)
    notes = f"Prompt:  {prompt}\nOpening:  {openings}\n"
    stem.with_suffix(".txt").write_text(notes)


def make_synthetic(
    root,
    num_public=96,
    num_clients=100,
    num_unseen=8,
    clips_per_public=2,
    clips_per_client=CLIPS_PER_CLIENT,
    seconds=CLIP_SECONDS,
    size=64,
    seed=1,
    accent=1.0,
):
    """Write a dataset of synthetic talkers, whole or not at all.

    `accent` in [0, 1] is how far mouths differ for the same sound (`make_person`). Raises
    ValueError for values out of range, and if `root` is not empty.
    """
    root = Path(os.path.abspath(root))  # nothing can be moved to "."
    if os.path.lexists(root) and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} exists already: remove it first")
    if min(num_public, num_clients, num_unseen, clips_per_public - 1, clips_per_client - 1) < 0:
        raise ValueError("numbers of people must be at least 0, and of clips at least 1")
    if not 0 <= accent <= 1:
        raise ValueError(f"accent must lie in 0 ... 1, not {accent}")
    if not MIN_FRAMES / FPS <= seconds <= 3600 or size < 16 or size % 2:
        raise ValueError("synthetic talkers need 0.4 to 3600 seconds and an even size from 16 on")
    people = {f"public-{i:03d}": clips_per_public for i in range(num_public)}
    people |= {f"client-{i:03d}": clips_per_client for i in range(num_clients)}
    people |= {f"unseen-{i:03d}": clips_per_public for i in range(num_unseen)}
    options = {"seed": seed, "seconds": seconds, "size": size, "accent": accent}
    made = {"num_clients": num_clients, "num_unseen": num_unseen}  # load_people compares these
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        new = Path(folder, "new")
        new.mkdir()
        Path(new, "options.json").write_text(json.dumps(made | options))
        stems = [new / name / f"{i:05d}" for name, clips in people.items() for i in range(clips)]
        in_threads(functools.partial(make_clip, **options), stems, "making talkers")
        try:
            new.replace(root)
        except OSError as error:  # another process has made it meanwhile, or it is a mount point
            raise ValueError(f"{root} cannot be put in its place: {error.strerror}") from None


# ---------------------------------------------------------------- command line


def check(root):
    """Print the people, clips and seconds of a dataset, and which files are not used and why."""
    dataset = TalkingHeads(root)
    everybody = {f"{len(dataset.people)} people": dataset.clips}
    for person, clips in (dataset.people | everybody).items():
        seconds = sum(clip.num_frames for clip in clips) / FPS
        print(f"{person:24} {len(clips):6} clips {seconds:8.1f} seconds")
    print_troubles(dataset)


def contact_sheet(root, output, rows=12, columns=10, size=96):
    """Write a picture of a dataset: for each of at most `rows` people a row of frames of a clip."""
    check_output(output, (".png",))
    people = TalkingHeads(root).people
    places = np.unique(np.linspace(0, len(people) - 1, rows).astype(int))
    names = [sorted(people)[i] for i in places]
    sheet = Image.new("RGB", (columns * size, len(names) * (size + 14)), "white")
    for row, name in enumerate(names):
        top = row * (size + 14)
        clip = people[name][-1]
        ImageDraw.Draw(sheet).text((2, top), f"{name}/{clip.name}  {clip.prompt}", "black")
        for column, i in enumerate(np.linspace(0, len(clip.frames) - 1, columns).astype(int)):
            picture = Image.fromarray(rearrange(clip.frames[i], "c h w -> h w c"))
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * size, top + 14))
    with atomic_write(output) as temporary:
        sheet.save(temporary)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Make, check and look at talking heads.", argument_default=argparse.SUPPRESS
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--make", metavar="DIR", help="write synthetic talkers to DIR")
    task.add_argument(
        "--check", metavar="DIR", help="print each person's clips and seconds, and skipped files"
    )
    task.add_argument("--look", nargs=2, metavar=("DIR", "PNG"), help="write a contact sheet")
    people = ("num-public", "num-clients", "num-unseen", "clips-per-public", "clips-per-client")
    for name in (*people, "size", "seed"):
        parser.add_argument(f"--{name}", type=int, help="for --make")
    for name in ("seconds", "accent"):
        parser.add_argument(f"--{name}", type=float, help="for --make")
    parser.error = refuse
    options = vars(parser.parse_args(argv))  # only those that were given
    chosen = next(name for name in ("make", "check", "look") if name in options)
    place = options.pop(chosen)
    if options and chosen != "make":
        refuse(f"--{next(iter(options)).replace('_', '-')} is for --make")
    if not all([place] if isinstance(place, str) else place):  # "$DIR", if DIR is not set
        refuse(f"--{chosen} is empty")
    with errors_in_one_line():
        if chosen == "make":
            make_synthetic(place, **options)
        elif chosen == "check":
            check(place)
        else:
            contact_sheet(*place)


if __name__ == "__main__":
    set_up_process()
    main()
