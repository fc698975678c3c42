"""How well the face finder finds people it has not seen: python tests/bench_faces.py DIR

DIR is a dataset of face tracks of real people. The finder is trained on three people in four. Faces
of the others are pasted at 15 to 60 % of the height of pictures of 640 x 360, whose backgrounds it
has not seen either: ffmpeg's test sources, and what surrounds these people, enlarged. A face counts
as found if the most certain box overlaps with it by .6. Prints both figures; fails below 95 %.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import metrics  # noqa: E402

WIDTH = 640
HEIGHT = 360
SOURCES = (
    "testsrc2",
    "mandelbrot",
    "gradients=n=4:seed=1",
    "cellauto",
    "smptehdbars",
    "sierpinski",
)


def make_test_pictures():
    """Return ffmpeg's test pictures uint8 [n 360 640 3], eight of each source."""
    pictures = []
    for source in SOURCES:
        inputs = ["-f", "lavfi", "-i", source, "-frames:v", 8]
        scale = ["-vf", f"scale={WIDTH}:{HEIGHT}", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        _, output, _ = data.run_ffmpeg(*inputs, *scale)
        pictures.append(np.frombuffer(output, np.uint8).reshape(-1, HEIGHT, WIDTH, 3))
    return np.concatenate(pictures)


def enlarge_edge(face, rng):
    """Return a piece of the edge of a face track uint8 [s s 3] as a picture [360 640 3]."""
    s = len(face)
    width = int(rng.integers(s // 11, s // 4))
    height = width * HEIGHT // WIDTH
    left = int(rng.choice([0, s - width]))
    top = int(rng.choice([0, s - height]))
    piece = Image.fromarray(face).crop((left, top, left + width, top + height))
    return np.asarray(piece.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def paste(background, face, rng):
    """Return a picture with the face, and the box where it is."""
    side = int(HEIGHT * 0.15 * 4 ** rng.random())
    left = int(rng.integers(WIDTH - side))
    top = int(rng.integers(HEIGHT - side))
    picture = Image.fromarray(background)
    small = Image.fromarray(face).resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(small, (left, top))
    return np.asarray(picture), np.array([left, top, left + side, top + side])


def measure(finder, faces, backgrounds, num_pictures, seed=0):
    """Return the share of pictures whose face is found, and of those without one that are refused.

    `faces` are uint8 [s s 3]; to `backgrounds` [n 360 640 3] come edges of the faces.
    """
    rng = np.random.default_rng(seed)
    found = []
    refused = []
    for i in range(num_pictures):
        background = backgrounds[rng.integers(len(backgrounds))]
        if rng.random() < 0.5:
            background = enlarge_edge(faces[rng.integers(len(faces))], rng)
        picture, box = paste(background, faces[i % len(faces)], rng)
        boxes = finder.find(data.channels_first(picture)).numpy()
        found.append(len(boxes) > 0 and data.box_overlap(boxes[0], box) >= 0.6)
        refused.append(not len(finder.find(data.channels_first(background))))
    return np.mean(found), np.mean(refused)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("root", help="a dataset of face tracks of real people")
    parser.add_argument(
        "--steps", type=int, default=1200, help="backbone.finder_steps of the preset"
    )
    parser.add_argument("--pictures", type=int, default=400)
    args = parser.parse_args()
    if not Path(args.root).is_dir():
        print(f"skipped: no dataset of real people at {args.root}")
        return 0
    torch.set_num_threads(1)
    dataset = data.TalkingHeads(args.root)
    tested = sorted(dataset.people)[::4]
    trained = {name: own for name, own in dataset.people.items() if name not in tested}
    started = time.process_time()
    finder = metrics.train_finder(trained, args.steps)
    print(f"trained on {len(trained)} people in {time.process_time() - started:.0f} s of CPU time")
    rng = np.random.default_rng(0)
    faces = []
    for name in tested:
        own = dataset.people[name]
        for i in rng.permutation(len(own))[:10]:
            frames, _ = data.read_video(own[i].path)
            faces += [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in frames[::25][:3]]
    rng.shuffle(faces)
    found, refused = measure(finder, faces, make_test_pictures(), args.pictures)
    print(f"{len(tested)} other people, {args.pictures} pictures: {found:.1%} found")
    print(f"{args.pictures} pictures without a face: {refused:.1%} refused")
    return int(min(found, refused) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
