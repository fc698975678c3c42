"""How the system speaks, on people whom nothing trained on: python tests/bench_speak.py runs/NAME [--seconds 300]

Drift and seams over one long speech, what each condition's scale does, solver steps against quality and speed, several
references. Writes runs/NAME/speak/: speak.json, speak.md, a grid of expressions, and videos with sound.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import fed
import metrics
import train

SCALES = (0.0, 0.5, 1.5)


def long_speech(person, config, seconds):
    """(audio int16 [640 f], true opening [f] or None): an unseen person talks for `seconds`; a real one's own clips."""
    clips, num_frames = person["clips"], round(seconds * data.FPS)
    if not person["synthetic"]:
        audio = np.concatenate([clip.audio for clip in clips])
        return np.resize(audio, num_frames * data.SAMPLES_PER_FRAME), None  # again and again
    looks = data._person(config["seed"], person["name"])
    rng = np.random.default_rng([config["seed"], *person["name"].encode()])  # other words for each: some are harder
    _, curve = data._speech_plan(rng, seconds)
    moves = data._motion(rng, looks, curve, num_frames, "")
    return data._speak(rng, curve, looks), moves.opening.flatten().numpy()


class Speaker:
    """The model of a run, ready to speak for one person; measures what comes out."""

    def __init__(self, run, device):
        self.config = train.load_config(run / "config.yaml")
        arguments = argparse.Namespace(resume=run, adapter=None)
        self.model, self.judges = train.speaker(arguments, self.config, device)
        self.device = device

    def speak(self, pictures, audio, prompt="", seed=0, **changes):
        """Frames [f 3 H W] in [0, 1], the seconds that they took, and the seconds until the first."""
        mel = torch.from_numpy(data.audio_windows(data.log_mel(audio), self.config["data"]["window"])).to(self.device)
        reference = torch.stack([train.pixels(picture, self.device) for picture in pictures])[None]
        words = self.model.text_encoder.ids([prompt]).to(self.device)
        started, blocks, first = time.perf_counter(), [], None
        for block in self.model.stream(reference, mel[None], words, torch.Generator().manual_seed(seed),
                                       **self.config["sampling"] | changes):
            first = first or time.perf_counter() - started
            blocks.append(fed.unit_range(block)[0].cpu())
        return torch.cat(blocks), time.perf_counter() - started, first

    @torch.inference_mode()
    def measure(self, frames, picture, audio, opening=None):
        """Identity to the picture, agreement with the sound, sharpness, jitter of frames [f 3 H W] in [0, 1]."""
        person = self.judges.identity(fed.unit_range(train.pixels(picture, self.device))[None])[0]
        edges = F.conv2d(frames.mean(1, keepdim=True), torch.tensor([[[[0, 1.0, 0], [1, -4, 1], [0, 1, 0]]]]))
        found = {"id_similarity*": float((self.judges.identity(frames.to(self.device)) @ person).mean()),
                 "sync*": self.judges.lip_sync(frames.to(self.device), torch.from_numpy(data.log_mel(audio)))["sync"],
                 "sharpness": float(edges.std()),
                 "temporal_jitter": float(metrics.temporal_jitter(frames))}
        if opening is not None and self.judges.has_opening:
            said = self.judges.opening(frames.to(self.device)).cpu()
            found["mouth_correlation*"] = float(metrics.mouth_correlation(said, torch.from_numpy(opening)))
        return found


def drift(speaker, people, seconds):
    """One long speech of each: the first and last ten seconds, and jitter at the borders of windows and elsewhere; and
    the frames and the sound of the first one's."""
    rows, shown = {}, None
    for person in tqdm(people, "drift"):
        audio, opening = long_speech(person, speaker.config, seconds)
        frames, taken, first = speaker.speak([person["portrait"]], audio)
        ten, spf = 10 * data.FPS, data.SAMPLES_PER_FRAME
        parts = {"first 10 s": slice(0, ten), "last 10 s": slice(len(frames) - ten, len(frames))}
        for name, part in parts.items():
            said, true = audio[spf * part.start:spf * part.stop], None if opening is None else opening[part]
            rows.setdefault(name, []).append(speaker.measure(frames[part], person["portrait"], said, true))
        change = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).numpy()
        window, known = speaker.config["sampling"]["window"], train.talking.KNOWN_FRAMES
        seams = np.arange(window // 2, len(frames), window - known) - 1
        rows.setdefault("seams", []).append({
            "jitter at borders / elsewhere": float(change[seams].mean() / np.delete(change, seams).mean()),
            "seconds until the first frame": first, "frames a second": len(frames) / taken})
        shown = shown or (frames, audio)
    slowest = max(row["seconds until the first frame"] for row in rows["seams"])  # of the first, which warms up
    found = {name: mean_rows(own) for name, own in rows.items()}
    return found | {"seams": found["seams"] | {"seconds until the first frame": slowest}}, *shown


def scales(speaker, people, seconds=4):
    """Every condition's scale: agreement with the sound, identity, and how far the picture is from that at scale 1."""
    rows = {}
    for person in people:
        audio, opening = long_speech(person, speaker.config, seconds)
        prompt = next((clip.prompt for clip in person["clips"] if clip.prompt), "")
        plain = speaker.speak([person["portrait"]], audio, prompt)[0]
        for name in train.talking.CONDITIONS:
            for scale in SCALES:
                frames = speaker.speak([person["portrait"]], audio, prompt, scales={name: scale})[0]
                rows.setdefault(f"{name} {scale}", []).append(
                    speaker.measure(frames, person["portrait"], audio, opening)
                    | {"change of the picture": float((frames - plain).abs().mean())})
    return {name: mean_rows(own) for name, own in rows.items()}


def mean_rows(rows):
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def steps(speaker, people, seconds=4):
    """Solver steps: quality beside frames a second."""
    found = {}
    for num_steps in (2, 4, 8, 50):
        rows = []
        for person in people:
            audio, opening = long_speech(person, speaker.config, seconds)
            frames, taken, _ = speaker.speak([person["portrait"]], audio, num_steps=num_steps)
            rows.append(speaker.measure(frames, person["portrait"], audio, opening)
                        | {"frames a second": len(frames) / taken})
        found[f"{num_steps} steps"] = mean_rows(rows)
    return found


def references(speaker, people, seconds=4):
    """One picture of the person against three from as many moments."""
    found = {}
    for number in (1, 3):
        rows = []
        for person in people:
            audio, opening = long_speech(person, speaker.config, seconds)
            others = [clip.frames[len(clip.frames) // 2] for clip in person["clips"]][:number - 1]
            frames, *_ = speaker.speak([person["portrait"], *others], audio)
            rows.append(speaker.measure(frames, person["portrait"], audio, opening))
        found[f"{number} references"] = mean_rows(rows)
    return found


def expressions(speaker, people):
    """Does a prompt change a face as it would change that person's? Which of the painter's changes is the generated one
    most like, by the cosine of mean pictures; and a grid to look at: a row a person, a column a prompt."""
    prompts, right, grid, rng_seed = [p for p in data.PROMPTS if p != "calm"], [], [], 0
    for person in people:
        audio, _ = long_speech(person, speaker.config, 2)
        made = {p: speaker.speak([person["portrait"]], audio, p)[0].mean(0) for p in ["calm", *prompts]}
        grid.append(torch.stack(list(made.values())))
        looks, true = data._person(speaker.config["seed"], person["name"]), {}
        for prompt in ["calm", *prompts]:
            rng = np.random.default_rng(rng_seed)
            _, curve = data._speech_plan(rng, 2)
            moves = data._motion(rng, looks, curve, 2 * data.FPS, prompt)
            painted = data._Painter(looks, moves, speaker.config["data"]["size"]).frames()
            true[prompt] = torch.from_numpy(painted).float().mean(0)
        changes = torch.stack([(true[p] - true["calm"]).flatten() for p in prompts])
        right += [int(F.cosine_similarity((made[p] - made["calm"]).flatten()[None], changes).argmax()) == i
                  for i, p in enumerate(prompts)]
    return {f"right one of {len(prompts)} prompts": metrics.mean_ci(right)}, torch.stack(grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--seconds", type=float, default=300, help="of each long speech")
    parser.add_argument("--people", type=int, default=4, help="unseen people, at most")
    args = parser.parse_args()
    speaker = Speaker(args.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    unseen = train.load_people(speaker.config)["unseen"]
    people = [{"name": name, "clips": clips, "portrait": train.portrait(clips),
               "synthetic": clips[0].opening is not None} for name, clips in list(unseen.items())[:args.people]]
    folder = args.run / "speak"
    folder.mkdir(exist_ok=True)
    found, frames, audio = drift(speaker, people, args.seconds)
    data.write_video(folder / "long.mp4", train.marked(frames).mul(255).byte().numpy(), audio, {"comment": "synthetic"})
    result = {"drift": found}
    for part in tqdm((scales, steps, references), "tables"):
        result[part.__name__] = part(speaker, people)
    if people[0]["synthetic"]:
        result["expressions"], grid = expressions(speaker, people)
        picture = train.Image.fromarray(np.concatenate([train.to_image(row) for row in grid]))
        train.save_image(picture.resize((2 * picture.width, 2 * picture.height)), folder / "expressions.png")
    for person in people[:3]:
        audio, _ = long_speech(person, speaker.config, 6)
        frames, *_ = speaker.speak([person["portrait"]], audio)
        data.write_video(folder / f"{person['name']}.mp4", train.marked(frames).mul(255).byte().numpy(), audio,
                         {"comment": "synthetic"})
    train.save_text(json.dumps(result, indent=1), folder / "speak.json")
    def line(row):
        return ", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())

    lines = [f"{part}: {name}: {line(row)}" for part, rows in result.items() for name, row in rows.items()]
    train.save_text("\n".join(lines) + "\n", folder / "speak.md")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
