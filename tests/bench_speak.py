"""How a run speaks for people whom nothing was trained on: python tests/bench_speak.py runs/NAME
[--seconds 300 --people 3]

Drift over one long speech and jitter at the borders of windows; what each condition's scale and
each prompt does; solver steps against quality and speed. Synthetic people get new speech with a
known mouth opening, real ones their own clips, repeated; prompts are measured on drawn expressions.
Writes tests/results/speak.md.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import metrics
import train

FRAMES_OF_TEN_SECONDS = 10 * data.FPS


def long_speech(name, clips, seconds, config):
    """Return audio int16 [640 f] and the true mouth opening [f], None for real people."""
    num_frames = round(seconds * data.FPS)
    if clips[0].opening is None:
        audio = np.concatenate([clip.audio for clip in clips])
        return np.resize(audio, num_frames * data.SAMPLES_PER_FRAME), None
    seed = config["seed"]
    person = data.make_person(seed, name, accent=1.0)
    rng = np.random.default_rng([seed, *name.encode()])  # other words for each person
    curve = data.speech_curve(rng, seconds, person.mouths)
    motion = data.make_motion(rng, person, curve, num_frames, "")
    return data.synthesize(rng, person, curve), motion.opening.flatten()


class Speaker:
    """A run's model with the global adapter, ready to speak."""

    def __init__(self, run):
        self.config = train.load_config(run / "config.yaml")
        backbone, model, judges, state = train.load_run(self.config, run, torch.device("cpu"))
        self.model = train.merged_copy(model, state["adapter"])
        self.judges = judges["table"]

    def speak(self, picture, audio, prompt="", **changes):
        """Return frames [f 3 H W] in [0, 1], the seconds they took, and the seconds until the first
        window.
        """
        mel = data.audio_windows(data.log_mel(audio))
        words = self.model.text_encoder.ids([prompt])
        generator = torch.Generator().manual_seed(0)
        settings = self.config["sampling"] | changes
        started = time.perf_counter()
        stream = self.model.stream(
            data.to_float(picture)[None], torch.from_numpy(mel)[None], words, generator, **settings
        )
        blocks = []
        first = None
        for block in stream:
            blocks.append(data.to_unit(block)[0])
            first = first or time.perf_counter() - started
        return torch.cat(blocks), time.perf_counter() - started, first

    @torch.inference_mode()
    def measure(self, frames, picture, audio, opening):
        """Return identity, sharpness, jitter, agreement with the sound and with the true opening of
        a stretch of frames.
        """
        identity = self.judges.identity(data.to_unit(data.to_float(picture))[None])[0]
        laplace = torch.tensor([[[[0, 1.0, 0], [1, -4, 1], [0, 1, 0]]]])
        mouth = self.judges.mouth_video(metrics.resize(frames, 64)[None])[0]
        windows = torch.from_numpy(data.audio_windows(data.log_mel(audio)))[: len(frames)]
        speech = self.judges.mouth_audio(windows[None])[0]
        found = {
            "id_similarity*": float((self.judges.identity(frames) @ identity).mean()),
            "sharpness": float(F.conv2d(frames.mean(1, keepdim=True), laplace).std()),
            "temporal_jitter": float(metrics.temporal_jitter(frames)),
            "sync*": float(metrics.sync_scores(mouth, speech)["sync"]),
        }
        if opening is not None:
            seen = self.judges.opening(frames)
            found["mouth_correlation*"] = float(metrics.mouth_correlation(seen, opening))
        return found


def mean_rows(rows):
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def measure_drift(speaker, people, seconds):
    """Compare the first ten seconds of a long speech with the last ten, and borders of windows with
    the rest.
    """
    parts = {"first 10 s": [], "last 10 s": []}
    borders = []
    for picture, name, clips in tqdm(people, "drift"):
        audio, opening = long_speech(name, clips, seconds, speaker.config)
        frames, taken, first = speaker.speak(picture, audio)
        starts = {"first 10 s": 0, "last 10 s": len(frames) - FRAMES_OF_TEN_SECONDS}
        for part, start in starts.items():
            stop = start + FRAMES_OF_TEN_SECONDS
            sound = audio[start * data.SAMPLES_PER_FRAME : stop * data.SAMPLES_PER_FRAME]
            own = None if opening is None else opening[start:stop]
            parts[part].append(speaker.measure(frames[start:stop], picture, sound, own))
        change = frames.diff(dim=0).abs().mean((1, 2, 3)).numpy()
        window = speaker.config["sampling"]["window"]
        seams = np.arange(window // 2, len(frames), window - train.talking.KNOWN_FRAMES) - 1
        ratio = change[seams].mean() / np.delete(change, seams).mean()
        rates = {"jitter at borders / elsewhere": ratio, "frames a second": len(frames) / taken}
        borders.append(rates | {"seconds until the first frame": first})
    tables = {part: mean_rows(rows) for part, rows in parts.items()}
    return tables, {"long speech": mean_rows(borders)}


def measure_changes(speaker, people, changes, seconds=4):
    """Return {label: mean measurements} for each {label: changed sampling arguments}."""
    rows = {label: [] for label in changes}
    for picture, name, clips in tqdm(people, "changes"):
        audio, opening = long_speech(name, clips, seconds, speaker.config)
        plain, _, _ = speaker.speak(picture, audio)
        for label, arguments in changes.items():
            frames, taken, _ = speaker.speak(picture, audio, **arguments)
            found = speaker.measure(frames, picture, audio, opening)
            found["frames a second"] = len(frames) / taken
            found["change of the picture"] = float((frames - plain).abs().mean())
            rows[label].append(found)
    return {label: mean_rows(own) for label, own in rows.items()}


def train_expression_judge(clips, steps=300):
    """Return a network [n 3 64 64] -> logits [n prompts], trained on clips of drawn expressions."""
    expressions = list(data.PROMPTS)
    labels = torch.tensor([expressions.index(clip.prompt) for clip in clips])
    frames = torch.stack([data.to_float(clip.frames[::5][:10]) for clip in clips])  # n 10 3 H W
    torch.manual_seed(0)
    judge = nn.Sequential(
        Conv2dNormActivation(3, 32, stride=2),
        Conv2dNormActivation(32, 64, stride=2),
        Conv2dNormActivation(64, 96, stride=2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.LazyLinear(len(expressions)),
    )
    judge(metrics.resize(frames[0], 64))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), "expression judge"):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        chosen = torch.randint(len(clips), (64,))
        moments = torch.randint(frames.shape[1], (64,))
        logits = judge(metrics.resize(frames[chosen, moments], 64))
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge.eval().requires_grad_(False)


def make_prompted(speaker, people, seconds=2):
    """Yield (label, prompt, frames [f 3 H W], picture, audio, opening) of people's true clips, and
    of clips generated with each prompt at several scales of it.

    Everybody starts from a calm picture, as a prompt is for what the picture does not show.
    """
    for name, clips in tqdm(people.items(), "prompts"):
        for clip in clips:
            if clip.prompt:
                frames = data.to_unit(data.to_float(clip.frames))
                picture = clip.frames[0]
                yield "true clips", clip.prompt, frames, picture, clip.audio, clip.opening
        calm = [clip for clip in clips if clip.prompt in ("", "calm")]
        if not calm:
            continue
        picture = data.reference_frame(calm)
        audio, opening = long_speech(name, clips, seconds, speaker.config)
        for prompt in data.PROMPTS:
            for scale in (0.0, 1.0, 2.0, 3.0, 5.0):
                frames, _, _ = speaker.speak(picture, audio, prompt, scales={"text": scale})
                label = f"generated, text scale {scale}"
                yield label, prompt, frames, picture, audio, opening


def measure_prompts(speaker, judge, people):
    """Return {label: measurements} of `make_prompted`: the share of clips whose expression the
    judge recognises, by prompt and of all, identity and mouth.
    """
    expressions = list(data.PROMPTS)
    found = {}  # label -> [measurements of each clip]
    for label, prompt, frames, *rest in make_prompted(speaker, people):
        logits = judge(metrics.resize(2 * frames - 1, 64)).mean(0)
        row = speaker.measure(frames, *rest) | {"prompt": prompt}
        row["all"] = float(logits.argmax() == expressions.index(prompt))
        found.setdefault(label, []).append(row)
    table = {}
    for label, rows in found.items():
        table[label] = {}
        for name in expressions:
            own = [row["all"] for row in rows if row["prompt"] == name]
            table[label][name] = float(np.mean(own))
        for column in ("all", "id_similarity*", "mouth_correlation*"):
            table[label][column] = float(np.mean([row[column] for row in rows]))
        table[label]["clips"] = len(rows)
    return table


def write_table(title, rows):
    columns = list(next(iter(rows.values())))
    lines = ["", f"## {title}", "", "| | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[c]:.4g}" for c in columns) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--people", type=int, default=3)
    args = parser.parse_args()
    # of the code that is about to run; later it may be another
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    speaker = Speaker(args.run)
    everybody = train.load_people(speaker.config)
    people = []
    for name, clips in list(everybody.unseen.items())[: args.people]:
        people.append((data.reference_frame(clips), name, clips))
    drift, borders = measure_drift(speaker, people, args.seconds)
    scales = {}
    for condition in ("speech", "identity"):  # of text, which has prompts, see below
        for scale in (0.0, 0.5, 1.5):
            scales[f"{condition} {scale}"] = {"scales": {condition: scale}}
    steps = {f"{n} steps": {"num_steps": n} for n in (1, 2, 4, 8)}
    lines = ["# Speaking", "", f"{len(people)} unseen people, {args.seconds:g} s; commit {commit}."]
    lines += write_table("drift", drift) + write_table("windows", borders)
    lines += write_table("scales of the conditions", measure_changes(speaker, people, scales))
    lines += write_table("solver steps", measure_changes(speaker, people, steps))
    # The backbone has seen no client; half of them teach the judge, too.
    clients = list(everybody.clients)
    taught = everybody.public | {name: everybody.clients[name] for name in clients[::2]}
    others = everybody.unseen | {name: everybody.clients[name] for name in clients[1::2]}
    drawn = [clip for own in taught.values() for clip in own if clip.prompt in data.PROMPTS]
    if drawn:
        judge = train_expression_judge(drawn)
        lines += write_table("prompts", measure_prompts(speaker, judge, others))
    (ROOT / "tests" / "results").mkdir(exist_ok=True)
    (ROOT / "tests" / "results" / "speak.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
