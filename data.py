"""Clips of people who talk, in LRS3's layout, and the synthetic talkers that stand in for them.

A clip has 25 frames a second, sound at 16 kHz (frame i spans samples 640 i .. 640 (i + 1)) and a log-mel spectrogram
of four frames a video frame.  Each file is decoded once and memory-mapped afterwards.
"""
import argparse
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageOps
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.signal import correlate, correlation_lags
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

SAMPLE_RATE, FPS, MEL_HZ, NUM_MELS = 16000, 25, 100, 40
SAMPLES_PER_FRAME, MELS_PER_FRAME = SAMPLE_RATE // FPS, MEL_HZ // FPS          # 640, 4
MEL_FLOOR, MEL_MEAN, MEL_STD = 1e-4, -4.0, 3.5          # fixed, so that speech looks the same in every dataset
SILENCE = (float(np.log(MEL_FLOOR)) - MEL_MEAN) / MEL_STD
ROLES = ('public', 'client', 'unseen')


@dataclass(frozen=True, eq=False)
class Clip:
    """One decoded clip of f frames."""
    person: str
    name: str
    path: Path
    frames: np.ndarray              # uint8 [f, 3, size, size]
    audio: np.ndarray               # int16 [640 f]
    mel: np.ndarray                 # float32 [4 f, 40]
    prompt: str                     # '' where the .txt gives none
    opening: np.ndarray | None      # float32 [f] in [0, 1], the true mouth opening of synthetic talkers


# ---- sound

@functools.cache
def _mel_transform():
    return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=512, win_length=400, hop_length=SAMPLE_RATE // MEL_HZ,
                                                f_min=60, f_max=7600, n_mels=NUM_MELS, center=False)


def log_mel(audio):
    """Log-mel spectrogram float32 [4 f, 40] of int16 audio [640 f] at 16 kHz, about zero mean and unit variance."""
    wave = torch.from_numpy(np.asarray(audio, np.float32) / 32768)
    # Window j is centred on the middle of samples 160 j .. 160 (j + 1), so every sound peaks in its own frame.
    wave = pad(wave, (176, 176 + -len(wave) % SAMPLES_PER_FRAME))
    return ((_mel_transform()(wave).clamp_min(MEL_FLOOR).log() - MEL_MEAN) / MEL_STD).T.contiguous().numpy()


def audio_windows(mel, window=5):
    """Windows float32 [f, 4 window, 40] of `window` (odd) video frames centred on each frame of mel [4 f, 40]."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f'an audio window must be an odd number of frames, not {window}')
    edge = MELS_PER_FRAME * (window // 2)
    padded = pad(torch.as_tensor(mel), (0, 0, edge, edge), value=SILENCE)
    return padded.unfold(0, MELS_PER_FRAME * window, MELS_PER_FRAME).transpose(1, 2).numpy()


# ---- files

SOUND = ['-map', '0:a:0', '-ac', 1, '-af', f'aresample={SAMPLE_RATE}:async=1:first_pts=0', '-f', 's16le']


def _ffmpeg(*arguments, blocks=()):
    """Run ffmpeg on `blocks` of input and return what it printed; ValueError with the first line of its complaint."""
    command = [get_ffmpeg_exe(), '-v', 'error', '-xerror', '-y', '-nostdin', *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            with contextlib.suppress(BrokenPipeError):                 # it stopped reading: its complaint says why
                for block in blocks:
                    process.stdin.write(block)
            output, complaint = process.communicate()
        except BaseException:                                          # whoever makes the blocks failed
            process.kill()
            raise
    if process.returncode:
        lines = complaint.decode(errors='replace').strip().splitlines() or ['ffmpeg failed']
        raise ValueError('no sound' if 'matches no streams' in lines[0] else re.sub(r'^\[[^]]*\] *', '', lines[0]))
    return output


def _decode(path, size, crop):
    """Frames uint8 [f, 3, size, size], the middle `crop` of each side, and audio int16 [640 f] of a video file; ValueError
    with the reason."""
    whole = round(size / crop)
    scale = f'scale={whole}:{whole}:force_original_aspect_ratio=increase:flags=area+accurate_rnd+full_chroma_int'
    picture = ['-vf', f'fps={FPS}:start_time=0,{scale},crop={size}:{size}', '-pix_fmt', 'rgb24', '-f', 'rawvideo']
    with tempfile.TemporaryDirectory() as folder:
        video, sound = Path(folder, 'video'), Path(folder, 'sound')
        _ffmpeg('-threads', 1, '-i', f'file:{path}', '-map', '0:v:0', *picture, video, *SOUND, sound)
        frames = np.fromfile(video, np.uint8).reshape(-1, size, size, 3).transpose(0, 3, 1, 2)
        audio = np.fromfile(sound, np.int16)
    if not len(audio) or not len(frames):
        raise ValueError('no sound' if len(frames) else 'no frames')
    # Containers round the two lengths differently: two frames of silence may be missing, more is cut off the video.
    num_frames = min(len(frames), len(audio) // SAMPLES_PER_FRAME + 2)
    audio = np.pad(audio, (0, 3 * SAMPLES_PER_FRAME))[:num_frames * SAMPLES_PER_FRAME]
    return frames[:num_frames], audio


def load_speech(path):
    """Sound int16 [n] at 16 kHz, mono, of any file that ffmpeg reads; ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f'no such sound file: {path}')
    try:
        audio = np.frombuffer(_ffmpeg('-i', f'file:{path}', *SOUND, '-'), np.int16)
    except ValueError as error:
        raise ValueError(f'no sound could be read from {path} ({error})') from None
    if not len(audio):
        raise ValueError(f'the sound of {path} has zero length')
    return audio


def load_image(path, size, crop=1.0):
    """Picture uint8 [3, size, size], the middle `crop` of its central square, and whether the picture was far from square;
    ValueError if the file is no picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith('I'):                           # 16 bits a pixel, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert('RGBA')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = 'no such image' if isinstance(error, FileNotFoundError) else 'not an image that can be read'
        raise ValueError(f'{reason}: {path}') from None
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'grey'), image).convert('RGB')
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, bleed=(1 - crop) / 2)
    return np.asarray(square).transpose(2, 0, 1).copy(), max(image.size) > 1.1 * min(image.size)


def write_video(path, frames, audio=None, metadata=None, crf=16):
    """Write uint8 frames [f, 3, h, w] or [f, h, w, 3], or an iterator of such blocks, and int16 audio [640 f] (16 kHz) as
    25 fps mp4, whole or not at all."""
    path, sound = Path(path), []
    blocks = map(_rows_of_pixels, [frames] if isinstance(frames, np.ndarray) else frames)
    first = next(blocks)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.video-', dir=path.parent) as folder:
        if audio is not None:
            audio.astype(np.int16).tofile(Path(folder, 'sound'))
            sound = ['-f', 's16le', '-ar', SAMPLE_RATE, '-ac', 1, '-i', Path(folder, 'sound')]
        tags = [part for key, value in (metadata or {}).items() for part in ('-metadata', f'{key}={value}')]
        _ffmpeg('-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{first.shape[2]}x{first.shape[1]}', '-r', FPS,
                '-i', 'pipe:0', *sound, '-vf', 'pad=ceil(iw/2)*2:ceil(ih/2)*2', '-c:v', 'libx264', '-crf', crf,
                '-preset', 'veryfast', '-pix_fmt', 'yuv420p', '-threads', 1, '-c:a', 'aac', '-b:a', '96k', '-movflags',
                '+faststart+use_metadata_tags', *tags, Path(folder, 'new.mp4'), blocks=itertools.chain([first], blocks))
        Path(folder, 'new.mp4').replace(path)


def _rows_of_pixels(frames):
    """uint8 frames [f, h, w, 3] of either order of axes."""
    if frames.ndim != 4 or frames.dtype != np.uint8 or not len(frames) or 3 not in frames.shape[1::2]:
        raise ValueError(f'a video needs uint8 frames [f, 3, h, w], not {frames.dtype} {list(frames.shape)}')
    return np.ascontiguousarray(frames if frames.shape[3] == 3 else frames.transpose(0, 2, 3, 1))


def sound_lag(path, audio):
    """Seconds by which the sound of a video file comes later than int16 `audio` [n] at 16 kHz."""
    heard, said = load_speech(path).astype(np.float32), np.asarray(audio, np.float32)
    lags = correlation_lags(len(heard), len(said))
    return float(lags[np.argmax(correlate(heard, said, method='fft'))]) / SAMPLE_RATE


# ---- datasets

class TalkingHeads:
    """All usable clips below `root`, the middle `crop` of each side at `size` pixels, by person; ValueError when there is
    no dataset or nothing usable."""

    def __init__(self, root, size=64, min_frames=10, max_frames=None, cache=None, progress=False, crop=1.0):
        self.root, self.size, self.min_frames, self.max_frames = Path(root), size, min_frames, max_frames
        self.crop = crop
        if not self.root.is_dir():
            siblings = [p.name for p in self.root.parent.glob('*') if p.is_dir()]
            near = difflib.get_close_matches(self.root.name, siblings, 1, 0)
            raise ValueError(f'no dataset at {root}' + (f'; did you mean {self.root.parent / near[0]}?' if near else ''))
        self.cache = Path(cache) if cache else self._default_cache()
        self.cache.mkdir(parents=True, exist_ok=True)
        paths = sorted(self.root / p for p in glob('**/*.mp4', root_dir=self.root, recursive=True))   # nothing hidden
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            loaded = list(tqdm(pool.map(self._load, paths), 'reading clips', len(paths), disable=None if progress else True))
        self.clips = sorted((c for c in loaded if isinstance(c, Clip)), key=lambda c: (c.person, c.name))
        self.skipped = [(path, reason) for path, reason in zip(paths, loaded) if isinstance(reason, str)]
        self.people = _by_person(self.clips)
        if not self.clips:
            first = f', the first for: {self.skipped[0][1]}' if self.skipped else ''
            raise ValueError(f'no usable clip in {root}: {len(self.skipped)} of {len(paths)} mp4 files skipped{first}')

    def _default_cache(self):
        # The mode is asked too: the superuser may write anywhere, but a read-only dataset should stay as it is.
        if os.access(self.root, os.W_OK) and self.root.stat().st_mode & 0o222:
            return self.root / '.cache'
        return Path(__file__).resolve().parent / 'datasets' / '.cache' / _digest(self.root.resolve())

    def _load(self, path):
        """The clip, or the reason why it cannot be used."""
        try:
            mel, audio, frames = self._arrays(path)
        except ValueError as error:
            return str(error)
        if len(frames) < self.min_frames:
            return f'only {len(frames)} frames long, {self.min_frames} are needed'
        text = path.with_suffix('.txt').read_text(errors='replace') if path.with_suffix('.txt').is_file() else ''
        notes = dict(re.findall(r'^(\w+):[ \t]*(.*?)[ \t]*$', text, re.M))
        opening = np.array(notes['Opening'].split(), np.float32)[:len(frames)] if 'Opening' in notes else None
        if opening is not None and len(opening) != len(frames):
            return f'its .txt gives {len(opening)} mouth openings for {len(frames)} frames'
        person, name = _person_and_name(path.relative_to(self.root))
        return Clip(person, name, path, frames, audio, mel, notes.get('Prompt', ''), opening)

    def _arrays(self, path):
        """Log-mel, audio and frames out of the cache, where one file a clip holds them in this order."""
        status, owner = path.stat(), f'{_digest(path.resolve())}-{self.size}-{self.crop:g}'
        state = _digest((status.st_mtime_ns, status.st_size, MEL_FLOOR, MEL_MEAN, MEL_STD))
        cached = self.cache / f'{owner}-{state}.clip'
        if not cached.exists():
            frames, audio = _decode(path, self.size, self.crop)
            for stale in self.cache.glob(f'{owner}-*.clip'):
                stale.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.cache, delete=False) as file:
                file.write(log_mel(audio).tobytes() + audio.tobytes() + frames.tobytes())
            os.replace(file.name, cached)
        # torch maps the file without holding it open; numpy's maps would run into the limit on open files.
        length, lengths = cached.stat().st_size, (4 * MELS_PER_FRAME * NUM_MELS, 2 * SAMPLES_PER_FRAME, 3 * self.size ** 2)
        raw, n = torch.from_file(str(cached), False, length, dtype=torch.uint8).numpy(), length // sum(lengths)
        mel, audio, frames = np.split(raw, np.cumsum(lengths)[:2] * n)
        keep = slice(self.max_frames)
        return (mel.view(np.float32).reshape(n, MELS_PER_FRAME, NUM_MELS)[keep].reshape(-1, NUM_MELS),
                audio.view(np.int16).reshape(n, -1)[keep].reshape(-1), frames.reshape(n, 3, self.size, self.size)[keep])


def _digest(key):
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _rng(*keys):
    return np.random.default_rng(int(_digest(keys), 16))


def _by_person(clips):
    people = {}
    for clip in clips:
        people.setdefault(clip.person, []).append(clip)
    return people


def _person_and_name(relative):
    """('anna', '1') of anna/1.mp4, ('id7', 'test-1') of LRS3's test/id7/1.mp4, ('A_Bo', 'A_Bo_3') of HDTF's A_Bo_3.mp4."""
    *folders, stem = relative.with_suffix('').parts
    if not folders:
        return re.sub(r'[_-]?\d+$', '', stem) or stem, stem
    at = int(folders[0] in ('pretrain', 'trainval', 'test') and len(folders) > 1)
    return folders[at], '-'.join(folders[:at] + folders[at + 1:] + [stem])


def split_people(names, num_clients, num_unseen, seed):
    """Disjoint lists (public, clients, unseen); names that begin with a role keep it; ValueError if people are too few."""
    if num_clients < 1 or num_unseen < 0:
        raise ValueError(f'at least 1 client and 0 unseen people are needed, not {num_clients} and {num_unseen}')
    public, clients, unseen = (sorted(n for n in names if n.startswith(role)) for role in ROLES)
    free = sorted(n for n in names if not n.startswith(ROLES))
    _rng('people', seed).shuffle(free)
    for chosen, wanted in ((clients, num_clients), (unseen, num_unseen)):
        missing = max(0, wanted - len(chosen))
        chosen[wanted:], free = free[:missing], free[missing:]
    if len(clients) < num_clients or len(unseen) < num_unseen or not public + free:
        raise ValueError(f'{len(names)} people cannot be split into {num_clients} clients, {num_unseen} unseen people '
                         'and at least one public person')
    return sorted(public + free), sorted(clients), sorted(unseen)


def split_clips(clips, seed):
    """Dict of train, validation and test clips: of each person's, about a fifth in either of the last two, never none."""
    parts = dict(train=[], validation=[], test=[])
    for person, own in _by_person(clips).items():
        if len(own) < 3:
            raise ValueError(f'{person} has {len(own)} usable clips; train, validation and test need at least 3')
        order, held = _rng('clips', seed, person).permutation(len(own)), max(1, round(len(own) / 5))
        for part, chosen in zip(('validation', 'test', 'train'), np.split(order, [held, 2 * held])):
            parts[part] += [own[i] for i in sorted(chosen)]
    return parts


def _part(clip, start, stop):
    """Frames `start` to `stop` of a clip, with their sound."""
    part = lambda values, each: values[each * start:each * stop]
    return replace(clip, frames=part(clip.frames, 1), audio=part(clip.audio, SAMPLES_PER_FRAME),
                   mel=part(clip.mel, MELS_PER_FRAME), opening=None if clip.opening is None else part(clip.opening, 1))


def cut(clips, seconds):
    """The clips in pieces of `seconds`; of what is left over, a piece that is at least half as long."""
    pieces, length = [], max(1, round(seconds * FPS))
    for clip in clips:
        for number, start in enumerate(range(0, max(1, len(clip.frames) - length // 2 + 1), length)):
            pieces.append(replace(_part(clip, start, start + length), name=f'{clip.name}-{number}',
                                  path=clip.path / str(number)))
    return pieces


def first_seconds(clips, seconds):
    """The clips up to `seconds` in all, the last of them cut (or left out: nothing is cut to less than ten frames)."""
    left, kept = round(seconds * FPS), []
    for clip in clips:
        n = min(left, len(clip.frames))
        left -= n
        if n >= 10:
            kept.append(_part(clip, 0, n))
    if left:
        raise ValueError(f'{clips[0].person} has {seconds - left / FPS:g} s of video to train on, not {seconds:g}')
    return kept


class View(NamedTuple):
    """A clip as the motion of one picture [3, h, w], frame `moment` of its own or another clip's (-1)."""

    picture: np.ndarray
    moment: int
    motion: torch.Tensor    # f, m, y, x
    latents: torch.Tensor   # c, y, x, of the picture
    prompt: str             # of the clip, where the picture does not show it already
    shown: str              # of the picture, if it has one of its own


def draw_batch(clips, views, batch_size, num_frames, generator, window=5):
    """Random windows: frames [b, f, 3, h, w] and reference [b, 3, h, w] in [-1, 1], mel [b, f, 4 window, 40], opening
    [b, f] (NaN where unknown), person, and out of `views` {path: [View]} motion [b, f, m, y, x], reference_latents
    [b, c, y, x] and prompt of one picture, the reference. A window does not hold it where there is room beside it."""
    people = _by_person(clip for clip in clips if len(clip.frames) >= num_frames)
    if not people:
        raise ValueError(f'no clip has the {num_frames} frames that a training window needs')
    pick = lambda options: options[int(torch.randint(len(options), (), generator=generator))]
    names, rows, drawn = sorted(people), [], []
    for _ in range(batch_size):
        clip = pick(people[pick(names)])
        view = pick(views[clip.path])
        starts = range(len(clip.frames) - num_frames + 1)
        start = pick([s for s in starts if not s <= view.moment < s + num_frames] or starts)
        span = slice(start, start + num_frames)
        opening = np.full(num_frames, np.nan, np.float32) if clip.opening is None else clip.opening[span]
        rows.append((clip.frames[span], audio_windows(clip.mel, window)[span], view.picture, opening))
        drawn.append((clip.person, view.prompt, view.motion[span], view.latents))
    frames, mel, reference, opening = (torch.from_numpy(np.stack(a)) for a in zip(*rows))
    frames, reference = (t.float().mul_(1 / 127.5).sub_(1) for t in (frames, reference))
    person, prompt, motion, latents = zip(*drawn)
    return dict(frames=frames, mel=mel, reference=reference, opening=opening, person=person, prompt=prompt,
                motion=torch.stack(motion), reference_latents=torch.stack(latents))


# ---- synthetic talkers

# Vowel: mouth opening, lip width (0 rounded .. 1 spread), first and second formant in Hz.
VOWELS = {'a': (1.0, .55, 850, 1300), 'ae': (.82, .85, 720, 1750), 'e': (.58, .8, 540, 1950),
          'i': (.32, 1.0, 320, 2400), 'o': (.66, .15, 580, 950), 'u': (.3, .0, 340, 780)}
# Consonant: mouth opening, voicing, hiss.
CONSONANTS = {'b': (0, .15, 0), 'm': (0, .25, 0), 'p': (0, 0, .1), 'f': (.08, 0, .5), 's': (.14, 0, 1),
              'd': (.2, .2, .1), 'l': (.3, .35, 0), 'k': (.25, .05, .3)}
REST = (0, .5, 500, 1500, 0, 0)
CONTROL_HZ = 200                    # of the speech plan
# Expression: smile, brow lift, brow slant, eye opening.
PROMPTS = {'calm': (0, 0, 0, 1), 'smiling': (1, .3, 0, .9), 'surprised, raised brows': (.1, 2.2, .3, 1.3),
           'sad': (-.8, .3, 1.2, .85), 'stern, lowered brows': (-.3, -1.2, -1.2, .85)}
SKINS = [(255, 224, 196), (198, 134, 90), (241, 194, 160), (100, 62, 44), (224, 172, 125), (150, 95, 62), (250, 210, 185)]
HAIRS = [(28, 22, 22), (70, 42, 26), (150, 150, 155), (120, 72, 36), (196, 150, 84), (150, 58, 28), (232, 205, 140)]
STYLES = ['bald', 'short', 'parted', 'long', 'bob', 'curly', 'bun']
EYES = [(70, 45, 25), (60, 110, 170), (70, 130, 80), (120, 90, 50), (35, 25, 20)]
GLASSES = [None, None, None, (25, 22, 25), (120, 40, 35), (60, 70, 95)]


def _person(seed, name):
    """Looks, voice and habits; clients are another distribution: close, dim, warm, side-lit pictures, livelier heads."""
    rng, (role, number) = _rng(seed, name), name.split('-')
    client, index, start = role == 'client', int(number), _rng(seed, role)
    u, choose = rng.uniform, lambda options: options[rng.integers(len(options))]
    # Neighbours in number get different looks, so that even a dozen people cover the range.
    spread = lambda options, step: options[(index * step + index // 7 + start.integers(7)) % 7]
    skin, hair, style, hue = spread(SKINS, 1), spread(HAIRS, 5), spread(STYLES, 3), index * .618 + start.random()
    man = style in ('bald', 'short', 'parted', 'curly')
    p = SimpleNamespace(
        client=client, style=style, skin=np.add(skin, u(-10, 10)), eyes=choose(EYES), volume=u(.5, 2.5),
        hair=np.add(hair if sum(skin) > 320 else HAIRS[index % 3], u(-8, 8)), hairline=u(-15, -11), part=u(-1, 1),
        width=u(15.5, 19), height=u(20, 23), taper=u(0, .2), gap=u(6.3, 7.8), eye=(u(2.9, 3.8), u(1.8, 2.6)),
        brow=(u(.5, 1.2), u(-.08, .12), u(5.2, 6.6)), nose=(u(2, 3.4), u(3.5, 6)), lips=(u(1, 1.9), u(.9, 1.12)),
        lip_colour=(u(.72, .95), u(.5, .66), u(.5, .68)), glasses=choose(GLASSES), moustache=man * u() > .75,
        beard=man * choose([0, 0, .4, .8, .9]), collar=u() < .5, pitch=90 * 2.5 ** u(), tract=u(.9, 1.12),
        background=_hue(hue, u(.1, .35), u(.75, .95)), clothes=_hue(u(), u(.3, .75), u(.5, .9)), zoom=u(.95, 1.03),
        light=(u(-.3, .3), -.3), motion=u(.7, 1.1), tempo=1, nod=u(.3, 1), articulation=u(.82, .92), smile=u(-.1, .25),
        spread=1, blinks=u(.3, .5))
    if client:
        p.background, p.clothes, p.zoom = _hue(hue, u(.35, .6), u(.4, .6)), _hue(u(), u(.5, .8), u(.3, .5)), u(1.02, 1.08)
        p.light, p.motion, p.tempo, p.nod = (choose([-1, 1]) * u(.5, .9), u(-.5, 0)), u(.9, 1.5), u(.7, 1.3), u(.3, 1.4)
        p.articulation, p.smile, p.spread, p.blinks = u(.78, 1.1), u(-.3, .7), u(.6, 1.5), u(.2, .9)
    return p


def _hue(hue, saturation, value):
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation * (1 - wheel))


def _speech_plan(rng, seconds):
    """The syllables, and the curve [200 Hz, 6] of opening, lip width, formants, voicing and hiss that all follows."""
    keys, said, t = [(-2.0, REST)], [], -rng.uniform(.05, 1.2)
    while t < seconds + .5:
        for _ in range(rng.integers(4, 10)):                           # one phrase, then a pause
            c, v, length = rng.choice(list(CONSONANTS)), rng.choice(list(VOWELS)), 1 / rng.uniform(3, 5)
            (gap, voicing, hiss), (opening, *vowel) = CONSONANTS[c], VOWELS[v]
            opening *= rng.uniform(.85, 1)
            keys += [(t + at * length, (gap, *vowel, voicing, hiss)) for at in (.05, .25)]
            keys += [(t + at * length, (opening, *vowel, .15 + .85 * opening, 0)) for at in (.5, .82)]
            said += [c + v] * (0 <= t < seconds)
            t += length
        keys += [(t + .1, REST), (t + rng.uniform(.2, .45), REST)]
        t = keys[-1][0]
    times, values = zip(*keys)
    curve = PchipInterpolator(times, np.array(values))(np.arange(round(seconds * CONTROL_HZ) + 1) / CONTROL_HZ)
    return ' '.join(said).upper(), gaussian_filter1d(curve, .02 * CONTROL_HZ, axis=0)


def _speak(rng, curve, p):
    """Formant synthesis, int16 at 16 kHz: harmonics of a gliding pitch weighted by three resonances, and hiss."""
    num_samples = (len(curve) - 1) * SAMPLE_RATE // CONTROL_HZ
    stretch = lambda control: interpolate(control[None], num_samples, mode='linear', align_corners=True)[0]
    _, _, f1, f2, voicing, hiss = torch.from_numpy(curve.T).float()
    glide = torch.from_numpy(p.pitch * (1 + .08 * _wander(rng, len(curve), CONTROL_HZ))).float()[None]
    harmonic = torch.arange(1, int(5000 / p.pitch) + 1)[:, None]
    gain, f = voicing / harmonic, harmonic * glide                     # [k, t]: a glottal pulse falls off with 1 / k
    for centre, bandwidth in ((f1, 90), (f2, 120), (torch.tensor(2700), 180)):
        square = (centre * p.tract) ** 2
        gain = gain * square / ((square - f ** 2) ** 2 + (bandwidth * f) ** 2).sqrt()
    turns = stretch(glide).double().cumsum(1) / SAMPLE_RATE
    voice = (stretch(gain) * torch.sin(2 * torch.pi * (harmonic * turns % 1).float())).sum(0)
    white = torch.from_numpy(rng.standard_normal(num_samples + 2)).float()
    sound = .035 * voice + .02 * stretch(hiss[None])[0] * white.diff(n=2) + (.002 if p.client else .0005) * white[2:]
    return (sound.clamp(-1, 1) * 32767).numpy().astype(np.int16)


def _wander(rng, num, hz, tempo=1.0):
    """A smooth random walk [num] of unit deviation with periods of 1 to 4 seconds, faster by `tempo`."""
    periods, phases = np.exp(rng.uniform(0, np.log(4), 5)) / tempo, rng.uniform(0, 2 * np.pi, 5)
    return np.sin(2 * np.pi * np.arange(num)[:, None] / hz / periods + phases).sum(1) / np.sqrt(2.5)


def _motion(rng, p, curve, num_frames, prompt):
    """Everything that moves, each float32 [f, 1, 1]: head, eyes, brows, and the mouth as the speech plan says."""
    smile, lift, slant, wide = PROMPTS[prompt or 'calm']
    wander = lambda amplitude: amplitude * _wander(rng, num_frames, FPS, p.tempo)
    t, lids = (np.arange(num_frames) + .5) / FPS, np.ones(num_frames)
    opening, spread, voicing = curve[(t * CONTROL_HZ).astype(int)][:, [0, 1, 4]].T
    stress, blink = gaussian_filter1d(voicing, .15 * FPS) - .4, rng.exponential(1 / p.blinks)
    while blink < t[-1] + .2:
        lids *= 1 - np.exp(-((t - blink) / .06) ** 2)
        blink += .4 + rng.exponential(1 / p.blinks)
    # Small movements: face tracks, as LRS3 cuts them, follow the head.
    m = dict(x=wander(.35 * p.motion), y=wander(.25 * p.motion) + .35 * p.nod * stress, roll=wander(.012 * p.motion),
             yaw=wander(.5 * p.motion), gaze=.9 * np.tanh(wander(1.2)), lids=lids * wide, slant=slant + 0 * t,
             brows=lift + wander(.25) + .6 * stress, smile=.8 * smile + p.smile + wander(.08),
             opening=np.clip(opening * p.articulation, 0, 1), spread=.5 + (spread - .5) * p.spread + .25 * max(smile, 0))
    return SimpleNamespace(**{key: torch.from_numpy(value).float()[:, None, None] for key, value in m.items()})


class _Painter:
    """Paints person p in motion m by signed distances; lengths are in 64ths of the picture, y points down."""

    def __init__(self, p, m, size):
        self.p, self.m, self.axis = p, m, (torch.arange(size) + .5) * 64 / size - 32
        self.soft, row, column = 83 / size / p.zoom, self.axis, self.axis[:, None]
        px, py, cos, sin = row - m.x, column - m.y, torch.cos(m.roll), torch.sin(m.roll)
        self.x, self.y = (cos * px + sin * py) / p.zoom, (cos * py - sin * px) / p.zoom + 1      # the head's own axes
        self.bx, self.by = (row - .4 * m.x) / p.zoom, (column - .3 * m.y) / p.zoom + 1           # the body's
        self.turned = self.x - m.yaw
        self.bumps = .9 * torch.sin(9 * torch.atan2(self.y + 6, self.x)) * (p.style == 'curly')
        self.image = (self.rgb(p.background) * (1.08 - .006 * (column + .5 * row))).repeat(len(m.x), 1, 1, 1)

    def rgb(self, colour):
        return torch.tensor(np.clip(colour, 0, 255), dtype=torch.float32).view(3, 1, 1)

    def paint(self, distance, colour, opacity=1.0, blur=1.0):
        alpha = (.5 - distance / (self.soft * blur)).clamp(0, 1) * opacity
        rows = alpha.amax((0, 2)).nonzero().flatten().tolist() or [-1]                # most shapes are small
        rows = slice(rows[0], rows[-1] + 1)
        self.image[:, :, rows].lerp_(self.rgb(colour), alpha[:, None, rows])

    def frames(self):
        """The pictures, uint8 [f, 3, size, size]."""
        self.body()
        self.head()
        if self.p.style != 'bald':
            self.hair()
        if self.p.client:                                              # a webcam in the evening
            row, column = self.axis, self.axis[:, None]
            vignette = 1 - .15 * (column ** 2 + row ** 2) / 1024 + .18 * self.p.light[0] * row / 32
            self.image *= vignette * torch.tensor([.95, .82, .66]).view(3, 1, 1)
        return self.image.clamp(0, 255).round().byte().numpy()

    def body(self):
        """What is behind the face: neck and clothes, and the back of the hair."""
        p, x, y, bx, by = self.p, self.x, self.y, self.bx, self.by
        if p.style in ('long', 'bob'):
            back = _ellipse(x, (y + 4).clamp_max(0), p.width + 2 + p.volume, p.height - 1 + p.volume)
            self.paint(_both(back, y - (40 if p.style == 'long' else 15)), p.hair * .75)
        self.paint(_ellipse(bx, by - 44, 30, 19), p.clothes)
        self.paint(_both(bx.abs() - .52 * p.width, (by - 19).abs() - 9), p.skin * (.7, .6, .57))
        self.paint(_ellipse(bx, by - 26, .52 * p.width, 3.5), p.skin * (.75, .65, .62))
        if p.collar:
            self.paint(_both(_ellipse(bx, by - 26, .62 * p.width, 5).abs() - 1, 25 - by), p.clothes * 1.4)
        if p.style == 'curly':
            self.paint(_ellipse(x, y + 6, p.width + 2.5 + p.volume, p.height - 3 + p.volume) - self.bumps, p.hair * .8)
        if p.style == 'bun':
            self.paint(_ellipse(x, y + p.height + 2.5, 6, 5), p.hair * .9)

    def head(self):
        p, m, x, y, turned, dark = self.p, self.m, self.x, self.y, self.turned, self.p.skin * (.7, .6, .57)
        jaw = y / (1 + .1 * m.opening * (y > 0))                                      # it drops with the mouth
        jaw_x = x / (1 - p.taper * (jaw / p.height).clamp(0, 1) ** 2)
        head = _ellipse(jaw_x, jaw, p.width, p.height)
        for side in (-1, 1):
            self.paint(_ellipse(x - side * (p.width - .3) + .5 * m.yaw, y + 1, 2.4, 4), p.skin * .88)
        self.paint(head, p.skin)
        around = _ellipse(turned, y - 11.5 - 2 * m.opening, 7.5, 3.5 + 4 * m.opening)
        self.paint(_both(head - .6, 8.5 - y - .025 * turned ** 2, -around), p.hair * .9, p.beard, 2)
        for side in (-1, 1):
            self.eye(turned - side * p.gap, y + 3, side)
        if p.glasses:
            self.paint(_both((y + 3.5).abs() - .5, turned.abs() - (p.gap - 5)), p.glasses)
        (wide, long), nose = p.nose, turned - .5 * m.yaw
        self.paint(_ellipse(nose + p.light[0] * 1.2 + .8, y - long / 2 + 1.5, 1, long), dark, .4, 2.5)
        self.paint(_ellipse(nose, y - long, wide, 1.8), p.skin * 1.06, .8, 2)
        self.paint(_ellipse(nose, y - long - 1.5, wide * .9, .5), dark * .75, .7, 1.5)
        self.mouth(turned, y - 11.2)
        # A round head: lit from one side, darker towards its rim.
        nx, ny = jaw_x / p.width, jaw / p.height
        shade = .04 - .2 * (nx ** 2 + ny ** 2) ** 2 + (.1 + .1 * p.client) * (nx * p.light[0] + ny * p.light[1])
        self.image *= 1 + ((.5 - head / self.soft).clamp(0, 1) * shade)[:, None]

    def eye(self, x, y, side):
        p, m, (rx, ry), (thick, tilt, high), look = self.p, self.m, self.p.eye, self.p.brow, x - self.m.gaze
        self.paint(_ellipse(x, y + .3, rx + 1.6, ry + 1.6), p.skin * .82, .55, 3)
        eye = _both(_ellipse(x, y, rx, ry * m.lids.clamp(.12, 2)), x.abs() - rx)                  # no streaks when closed
        self.paint(eye - .7, p.skin * (.38, .32, .3), .9)
        self.paint(eye, (248, 246, 242), (m.lids * 2 - .4).clamp(0, 1))
        self.paint(_both(_ellipse(look, y, 1.9, 1.9), eye), p.eyes)
        self.paint(_both(_ellipse(look, y, .95, .95), eye), (12, 10, 12))
        self.paint(_both(_ellipse(look + .6, y + .7, .5, .5), eye), (255, 255, 255), .9)
        arch = y + high + m.brows + (tilt - .13 * m.slant) * side * x - .06 * (rx ** 2 - x ** 2)
        self.paint(_both(arch.abs() - thick, x.abs() - rx - 1), p.hair * .7)
        if p.glasses:
            self.paint(_ellipse(x, y, 5.3, 4.6).abs() - .45, p.glasses)

    def mouth(self, x, y):
        """Lips around a dark interior with teeth and tongue; the interior is 9 units high at full opening."""
        p, m, full = self.p, self.m, self.p.lips[0]
        u2 = (x / ((5.2 + 1.7 * m.spread) * p.lips[1] * (1 + .1 * m.smile))) ** 2     # 1 at the corners
        arc, rim, y = 1 - u2, full * (1.15 - u2), y + .9 * m.smile * (u2 - .3)        # a smile lifts the corners
        top, bottom = -2.2 * m.opening * arc, 6.8 * m.opening * arc
        inside, lips = _both(top - y, y - bottom), _both(top - y - .9 * rim, y - bottom - 1.3 * rim)
        colour, ajar = p.skin * p.lip_colour, (4 * m.opening).clamp(0, 1)
        self.paint(lips - 1.2, p.skin * .9, .4, 2)
        if p.moustache:
            self.paint(_both((y - top + 2.9 * full).abs() - 1.8 + u2, 12 * (u2 - 1.2)), p.hair, .9, 1.5)
        self.paint(lips, colour)
        self.paint(_both(lips, bottom - y), colour * 1.12, .6)
        self.paint(y.abs() - .5 + 6 * (u2 - .95).clamp_min(0), colour * .45, 1 - ajar)
        self.paint(inside, (52, 14, 18), ajar)
        self.paint(_both(inside, y - top - 2.1 * arc), (240, 236, 226), ajar * .95)
        self.paint(_both(inside, 1.2 - y + .62 * bottom - .8 * arc), (176, 74, 76), ajar * .9)

    def hair(self):
        p, side, fall = self.p, self.turned + .3 * self.m.yaw, .06 if self.p.style in ('long', 'bob') else .034
        line = self.y - p.hairline - .5 * p.part * side * (p.style == 'parted') - fall * side ** 2 + .6 * self.bumps
        line = line / (1 + (2 * fall * side) ** 2).sqrt()              # steep at the sides: keep it a distance
        cap = _ellipse(self.x, self.y + .6 * p.volume, p.width + 1 + .4 * p.volume, p.height + .7 * p.volume) - self.bumps
        self.paint(_both(cap, line), p.hair)
        self.paint(_both(_ellipse(self.x + 4 * p.light[0] - 3, self.y + p.height - 3, 7, 2.5), cap), p.hair + 35, .5, 4)


def _ellipse(x, y, rx, ry):
    """Signed distance to an ellipse at the origin, to first order."""
    near, slope = ((x / rx) ** 2 + (y / ry) ** 2).sqrt(), ((x / rx ** 2) ** 2 + (y / ry ** 2) ** 2).sqrt()
    return near * (near - 1) / slope.clamp_min(1e-4)


def _both(*distances):
    return functools.reduce(torch.maximum, distances)


def choose_faults(names, share, seed):
    """{name: fault} of the `share` of clients that are unreliable; a greater share has the same ones and more."""
    broken = _rng(seed, 'faults').permutation(len(names))[:round(share * len(names))].tolist()
    return {names[i]: ('shifted sound', 'flicker', 'noise')[at % 3] for at, i in enumerate(broken)}


def _broken(rng, frames, audio, fault):
    if fault == 'shifted sound':
        audio = np.roll(audio, int(rng.choice([-1, 1]) * rng.integers(8, 13)) * SAMPLES_PER_FRAME)
    elif fault == 'flicker':
        frames = (frames * rng.uniform(.5, 1, (len(frames), 1, 1, 1))).astype(np.uint8)
    elif fault == 'noise':
        frames = (frames + rng.normal(0, 30, frames.shape)).clip(0, 255).astype(np.uint8)
    return frames, audio


def spoil(clip, fault, seed):
    """The clip with a fault of `choose_faults`."""
    frames, audio = _broken(_rng(seed, clip.person, clip.name, fault), clip.frames, clip.audio, fault)
    return replace(clip, frames=frames, audio=audio, mel=log_mel(audio))


def _make_clip(folder, name, index, seconds, size, fault, seed):
    p, rng, num_frames = _person(seed, name), _rng(seed, name, index), round(seconds * FPS)
    prompt = str(rng.choice(list(PROMPTS))) if rng.random() < .75 else ''
    text, curve = _speech_plan(rng, num_frames / FPS)
    motion = _motion(rng, p, curve, num_frames, prompt)
    frames, audio = _Painter(p, motion, size).frames(), _speak(rng, curve, p)
    frames, audio = _broken(rng, frames, audio, fault)
    opening = ' '.join(f'{o:.3f}' for o in motion.opening.flatten().tolist())
    notes = dict(Text=text, Conf='1', Prompt=prompt, Opening=opening, Fault=fault)
    write_video(folder / name / f'{index:05d}.mp4', frames, audio, crf=11)
    (folder / name / f'{index:05d}.txt').write_text(''.join(f'{k}:  {v}\n' for k, v in notes.items() if v))


def make_synthetic(root, num_public=96, num_clients=12, num_unseen=8, clips_per_public=2, clips_per_client=10, seconds=2.0,
                   size=64, unreliable=0.0, seed=0, progress=False):
    """Write a dataset of synthetic talkers, whole or not at all; `unreliable` is the share of clients with broken clips."""
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f'{root} exists already; remove it to make it anew')
    if not 0 <= unreliable <= 1 or seconds < .4 or size < 16 or size % 2 or num_public + num_clients + num_unseen < 1:
        raise ValueError('synthetic talkers need people, unreliable in 0..1, 0.4 seconds or more and an even size from 16')
    faults = choose_faults([f'client-{i:03d}' for i in range(num_clients)], unreliable, seed)
    plan = zip(ROLES, (num_public, num_clients, num_unseen), (clips_per_public, clips_per_client, clips_per_public))
    jobs = [(f'{role}-{i:03d}', clip) for role, people, clips in plan for i in range(people) for clip in range(clips)]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as folder:
        work = lambda job: _make_clip(Path(folder, 'new'), *job, seconds, size, faults.get(job[0], ''), seed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(tqdm(pool.map(work, jobs), 'making talkers', len(jobs), disable=None if progress else True))
        Path(folder, 'new').replace(root)


# ---- command line

def check(root):
    """Print a table of the people, clips and seconds in a dataset, and what was skipped and why."""
    data = TalkingHeads(root, progress=True)
    for person, clips in [*data.people.items(), (f'{len(data.people)} people', data.clips)]:
        print(f'{person:24} {len(clips):6} clips {sum(len(c.frames) for c in clips) / FPS:8.1f} seconds')
    print(f'{len(data.skipped)} clips skipped', *(f'{path}: {reason}' for path, reason in data.skipped), sep='\n  ')


def look(root, output, rows=12, columns=10, size=96):
    """Write a contact sheet: a row a person, from every role in turn, and frames over one clip's time."""
    people = TalkingHeads(root, progress=True).people
    chosen = sorted(people, key=lambda name: (re.sub(r'\D', '', name), name))[:rows]
    sheet = Image.new('RGB', (columns * size, len(chosen) * (size + 14)), 'white')
    for top, name in zip(range(0, sheet.height, size + 14), chosen):
        clip = people[name][-1]
        ImageDraw.Draw(sheet).text((2, top), f'{name}/{clip.name}  {clip.prompt}', 'black')
        for column, i in enumerate(np.linspace(0, len(clip.frames) - 1, columns).astype(int)):
            picture = Image.fromarray(clip.frames[i].transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * size, top + 14))
    sheet.save(output)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Make, check and look at a dataset of talking heads.')
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument('--make', metavar='DIR', help='write the synthetic talkers there')
    task.add_argument('--check', metavar='DIR', help='decode it; print people, clips, seconds, what was skipped and why')
    task.add_argument('--look', nargs=2, metavar=('DIR', 'PNG'), help='write a contact sheet of a dataset')
    options = {k: v.default for k, v in inspect.signature(make_synthetic).parameters.items() if k not in ('root', 'progress')}
    for key, default in options.items():
        parser.add_argument('--' + key.replace('_', '-'), type=type(default), default=default, help=f'of --make: {default}')
    args = parser.parse_args(argv)
    try:
        if args.make:
            make_synthetic(args.make, progress=True, **{key: getattr(args, key) for key in options})
        elif args.check:
            check(args.check)
        else:
            look(*args.look)
    except (ValueError, OSError) as error:
        print(f'data.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
