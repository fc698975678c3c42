"""An independent witness of talking heads: dlib's face detector, landmarks and face embedding.

python tests/witness.py TRUTH.mp4 FAKE.mp4      one video against its truth
python tests/witness.py runs/NAME/samples       strips of square panels, each against the first

dlib has seen none of this project's people, pictures or code. Needs `dlib-bin` and
`face-recognition-models`, which carry their weights. Faces need about 80 pixels: frames are
enlarged to 320.
"""

import argparse
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402

SIZE = 320  # pixels of the frames' width
LEAST_SCORE = -0.3  # of dlib's detector, whose own limit of 0 misses small and turned faces
EMBED_EVERY = 5  # frames
# Landmarks (of 68) that the mouth and the eyelids do not move: nose and corners of the eyes.
RIGID = [27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45]
EYES = (36, 42)  # the first of six landmarks around each
LIPS = ((61, 67), (62, 66), (63, 65))  # upper and lower inner lip
BLINK = 0.7  # of the median eye opening; below it an eye is closed
SILENT = 0.01  # of full scale: RMS of a frame's sound


@functools.cache
def load_dlib():
    """Return dlib's detector, landmark predictor and face embedding."""
    import dlib

    package = importlib.util.find_spec("face_recognition_models")
    models = Path(package.submodule_search_locations[0]) / "models"
    return (
        dlib.get_frontal_face_detector(),
        dlib.shape_predictor(str(models / "shape_predictor_68_face_landmarks.dat")),
        dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat")),
    )


def trace(frames):
    """Return what is seen in frames uint8 [f 3 h w], NaN where no face is found.

    {"mouth" [f]: gap of the inner lips over face height, "eyes" [f]: height over width,
    "head" [f 3]: x and y of the nose in face heights and roll in radians, "identity" [128]: mean
    embedding, "found": share of frames with a face}.
    """
    import dlib

    detector, predictor, embedder = load_dlib()
    frames = frames.transpose(0, 2, 3, 1)  # f h w 3
    scale = max(1, SIZE / frames.shape[2])
    size = round(frames.shape[2] * scale), round(frames.shape[1] * scale)
    resample = Image.Resampling.BICUBIC
    frames = [np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames]
    boxes = np.full((len(frames), 4), np.nan)
    for i, frame in enumerate(frames):
        found, scores, _ = detector.run(frame, 0, LEAST_SCORE)
        if found:
            box = found[int(np.argmax(scores))]
            boxes[i] = box.left(), box.top(), box.right(), box.bottom()
    seen = np.flatnonzero(np.isfinite(boxes[:, 0]))
    points = np.full((len(frames), 68, 2), np.nan)
    embeddings = []
    # A trembling box makes trembling landmarks.
    smooth = gaussian_filter1d(boxes[seen], 2, axis=0) if len(seen) else []
    for num, (i, box) in enumerate(zip(seen, smooth)):
        shape = predictor(frames[i], dlib.rectangle(*(round(side) for side in box)))
        points[i] = [(point.x, point.y) for point in shape.parts()]
        if num % EMBED_EVERY == 0:
            embeddings.append(np.array(embedder.compute_face_descriptor(frames[i], shape)))
    identity = np.mean(embeddings, 0) if embeddings else np.full(128, np.nan)
    return measure(points) | {"identity": identity, "found": len(seen) / len(frames)}


def measure(points):
    """Return mouth, eyes and head, as in `trace`, of landmarks [f 68 2]."""

    def gap(a, b):
        return np.linalg.norm(points[:, a] - points[:, b], axis=-1)

    # Eyes to chin, from the landmarks that do not move: the chin falls as the mouth opens.
    rigid = points[:, RIGID]
    spread = np.sqrt(np.square(rigid - rigid.mean(1, keepdims=True)).sum(2).mean(1))  # f
    eyes_to_chin = np.linalg.norm(points[:, 8] - points[:, 36:48].mean(1), axis=-1)
    height = spread * median(eyes_to_chin / spread)
    mouth = sum(gap(upper, lower) for upper, lower in LIPS) / 3 / height
    eyes = [(gap(o + 1, o + 5) + gap(o + 2, o + 4)) / 2 / gap(o, o + 3) for o in EYES]
    x, y = (points[:, 30] / median(height)).T
    across = points[:, 45] - points[:, 36]  # outer corners of the eyes
    roll = np.arctan2(across[:, 1], across[:, 0])
    return {"mouth": mouth, "eyes": np.mean(eyes, 0), "head": np.stack([x, y, roll], 1)}


def median(values):
    """Return the median of the known values, or NaN."""
    return np.nanmedian(values) if np.isfinite(values).any() else np.nan


def blinks_per_minute(eyes):
    """Return how often eyes [f] close."""
    eyes = eyes[np.isfinite(eyes)]
    if not len(eyes):
        return np.nan
    closed = eyes < BLINK * np.median(eyes)
    return float((closed[1:] & ~closed[:-1]).sum() * 60 * data.FPS / len(eyes))


def compare(truth, fake, silent):
    """Compare two traces of clips of one length; `silent` [f] says in which frames nobody speaks.

    Returns {"mouth_r": Pearson's correlation of the mouth openings, "mouth_std_ratio",
    "silence_ratio": mean opening in silence over the truth's, "blinks" and "true_blinks" a minute,
    "head_variance_ratio", "identity_distance": Euclidean, below about 0.6 for one person}.
    """
    both = np.isfinite(truth["mouth"]) & np.isfinite(fake["mouth"])
    quiet = both & silent
    if both.sum() < 2:
        raise ValueError("dlib finds a face in less than two frames of both")
    t = truth["mouth"][both]
    f = fake["mouth"][both]
    silence = np.nan
    if quiet.any():
        silence = fake["mouth"][quiet].mean() / max(truth["mouth"][quiet].mean(), 1e-3)
    variances = [each["head"][both].var(0).sum() for each in (fake, truth)]
    covariance = np.mean((t - t.mean()) * (f - f.mean()))
    return {
        "mouth_r": float(covariance / max(t.std() * f.std(), 1e-12)),
        "mouth_std_ratio": float(f.std() / max(t.std(), 1e-6)),
        "silence_ratio": float(silence),
        "blinks": blinks_per_minute(fake["eyes"]),
        "true_blinks": blinks_per_minute(truth["eyes"]),
        "head_variance_ratio": float(variances[0] / max(variances[1], 1e-12)),
        "identity_distance": float(np.linalg.norm(fake["identity"] - truth["identity"])),
    }


def find_silence(audio, num_frames):
    """Return in which frames [f] int16 audio [640 f] is silent."""
    if not len(audio):
        return np.zeros(num_frames, bool)
    frames = audio.reshape(-1, data.SAMPLES_PER_FRAME)[:num_frames] / 32768
    return np.sqrt(np.square(frames).mean(1)) < SILENT


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("truth", type=Path, help="a video, or a folder of strips of panels")
    parser.add_argument("fake", type=Path, nargs="?", help="a video")
    args = parser.parse_args(argv)
    pairs = []  # name, frames of the truth and of the fake [f 3 h w], audio
    try:
        if args.fake:
            true_frames, audio = data.read_video(args.truth)
            frames, _ = data.read_video(args.fake)
            pairs.append((args.fake.name, true_frames, frames, audio))
        else:
            for path in sorted(args.truth.glob("*.mp4")):
                strip, audio = data.read_video(path)
                panels = np.split(strip, strip.shape[3] // strip.shape[2], 3)
                for i, panel in enumerate(panels[1:]):
                    pairs.append((f"{path.name}, panel {i + 2}", panels[0], panel, audio))
        if not pairs:
            raise ValueError(f"{args.truth}: no .mp4 there")
        for name, true_frames, frames, audio in pairs:
            num = min(len(true_frames), len(frames))
            traces = [trace(side[:num]) for side in (true_frames, frames)]
            scores = compare(*traces, find_silence(audio, num))
            print(f"{name}:", ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    except (ValueError, OSError, ImportError) as error:
        print(f"witness.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
