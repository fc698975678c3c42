"""Real people as an independent witness sees them: `python tests/bench_people.py ROOT`.

Trains the autoencoder and the UNet of the preset `faces` on the people in the folder ROOT (about
20 minutes on two cores), but for every fourth of those with eight clips or more, whom nothing
trains on, and for six clips of the person with most clips. Then lets them speak and measures by
`witness.py`. Prints a table of means with 95 % intervals; numbers only are kept. What is trained
stays in --work and is used again.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import fed  # noqa: E402
import lora  # noqa: E402
import metrics  # noqa: E402
import train  # noqa: E402
import witness  # noqa: E402

NUM_FRAMES = 100
NUM_TESTS = 6  # clips of a person
OWN_SECONDS = 60  # of video for a personal adapter
COLUMNS = {
    "mouth_r": "mouth r",
    "mouth_std_ratio": "its deviation ÷ truth's",
    "silence_ratio": "opening in silence ÷ truth's",
    "blinks": "blinks a minute",
    "true_blinks": "truth's",
    "head_variance_ratio": "head variance ÷ truth's",
    "identity_distance": "identity distance",
}


def split_people(people):
    """Return the public people and, for the person with most clips and for the unseen, their clips
    {name: {"train", "test"}}.
    """
    most = max(people, key=lambda name: len(people[name]))
    several = sorted(name for name in people if len(people[name]) >= 8 and name != most)
    unseen = several[::4]
    step = len(people[most]) // NUM_TESTS
    test = people[most][::step][:NUM_TESTS]
    known = {"test": test, "train": [clip for clip in people[most] if clip not in test]}
    public = {name: clips for name, clips in people.items() if name not in unseen}
    public[most] = known["train"]
    splits = {name: {"test": people[name][1 : 1 + NUM_TESTS]} for name in unseen}
    for name, split in splits.items():
        split["train"] = [clip for clip in people[name] if clip not in split["test"]]
    return public, {most: known}, splits


def pretrain(config, public, work):
    """Return the pretrained model and the directions of its adapters, from `work` if they are
    there.
    """
    device = torch.device("cpu")
    work.mkdir(parents=True, exist_ok=True)
    key = train.backbone_key(config, public)
    path = work / f"autoencoder-{key}.pt"
    if not path.exists():
        train.save_checkpoint(path, "autoencoder", train.train_autoencoder(config, public, device))
    autoencoder = train.load_checkpoint(path, "autoencoder")
    path = work / f"unet-{key}.pt"
    if not path.exists():
        partial = work / f"partial-{key}.pt"
        state, _, directions = train.train_unet(config, autoencoder, public, device, partial)
        content = {"model": state, "directions": directions}
        train.save_checkpoint(path, "UNet", content)
    content = train.load_checkpoint(path, "UNet")
    model = train.build_model(config)
    model.load_state_dict(content["model"])
    return model.eval().requires_grad_(False), content["directions"]


def with_own_adapter(config, model, directions, name, clips):
    """Return the model with an adapter of at most OWN_SECONDS of a person's clips."""
    own = []
    for clip in clips:
        if sum(other.num_frames for other in own) < OWN_SECONDS * data.FPS:
            own.append(clip)
    adapted = train.add_adapter(config, copy.deepcopy(model), directions, "personal")
    split = {"train": own, "validation": [], "test": []}
    same_clip = config["data"]["same_clip_reference"]
    client = fed.Client(name, split, config["backbone"]["num_frames"], same_clip=same_clip)
    settings = config["personal"]
    kwargs = {"num_steps": settings["steps"], "lr": settings["lr"]}
    kwargs |= {"batch_size": config["fed"]["batch_size"]}
    kwargs |= {"loss_weights": dict.fromkeys(config["loss"], 0.0)}
    start = lora.adapter_vector(adapted)
    trained, _ = fed.train_adapter(adapted, None, client, start, config["seed"], **kwargs)
    lora.load_adapter_vector(adapted, trained)
    return lora.merge_lora(adapted)


@torch.inference_mode()
def ceiling(model, clip, picture):
    """Return frames uint8 [f H W 3] of the clip's true motion, decoded from the picture."""
    frames = data.to_float(clip.frames[:NUM_FRAMES])[None]
    reference = data.to_float(picture)[None]
    whole = torch.ones(1)
    motion, _ = model.encode_motion(frames, reference, whole)
    return train.to_pixels(
        data.to_unit(model.decode(motion / model.motion_std, reference, whole))[0]
    )


def speak(config, model, mel, picture, liveliness):
    """Return frames uint8 [f H W 3] of the picture speaking log-mel [4f 40]."""
    windows = torch.from_numpy(data.audio_windows(mel, config["data"]["window"]))[None]
    words = model.text_encoder.ids([""])
    generator = torch.Generator().manual_seed(config["seed"])
    reference = data.to_float(picture)[None]
    settings = config["sampling"] | {"liveliness": torch.tensor([liveliness])}
    frames = model.generate(reference, windows, words, generator, **settings)
    return train.to_pixels(data.to_unit(frames)[0])


def measure(config, models, split, all_speech):
    """Return {method: [scores of each test clip]} of a person; other speech is the next of
    `all_speech`.
    """
    picture = data.reference_frame(split["train"])
    liveliness = data.typical_liveliness(split["train"])
    scores = {}
    for clip in tqdm(split["test"], split["test"][0].person, leave=False):
        num_frames = min(clip.num_frames, NUM_FRAMES)
        mel = clip.mel[: num_frames * data.MELS_PER_FRAME]
        other = all_speech[(all_speech.index(clip) + NUM_TESTS) % len(all_speech)]
        generated = {"autoencoder ceiling": ceiling(models["backbone"], clip, picture)}
        for name, model in models.items():
            generated[name] = speak(config, model, mel, picture, liveliness)
        other_mel = np.resize(other.mel, mel.shape)
        generated["other speech"] = speak(
            config, models["backbone"], other_mel, picture, liveliness
        )
        truth = witness.trace(clip.frames[:num_frames].transpose(0, 2, 3, 1))
        silent = witness.find_silence(clip.audio, num_frames)
        for name, frames in generated.items():
            score = witness.compare(truth, witness.trace(frames), silent)
            scores.setdefault(name, []).append(score)
    return scores


def table(title, by_person):
    """Return lines of a table of {person: {method: [scores]}}: means and intervals over people, or
    over the clips of one person.
    """
    lines = [
        f"| {title} | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for method in next(iter(by_person.values())):
        cells = []
        for column in COLUMNS:
            values = []
            groups = []
            for person, scores in by_person.items():
                known = [s[column] for s in scores[method] if np.isfinite(s[column])]
                values += known
                groups += [person] * len(known)
            if not values:
                cells.append("-")
                continue
            summary = metrics.mean_ci(values, groups if len(by_person) > 1 else None)
            low, high = summary["ci95"] or (np.nan, np.nan)
            cells.append(f"{summary['mean']:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("root", help="folder of people, as data.root")
    parser.add_argument("--work", type=Path, default=Path("runs/people"))
    parser.add_argument(
        "--set", nargs="*", default=[], help="changes of the preset, as in train.py"
    )
    args = parser.parse_args(argv)
    config = train.load_config(train.DEFAULTS, ["faces"], [f"data.root={args.root}", *args.set])
    d = config["data"]
    dataset = data.TalkingHeads(args.root, d["size"], d["crop"], config["runtime"]["cache"] or None)
    public, known, unseen = split_people(data.by_person(dataset.clips))
    model, directions = pretrain(config, public, args.work)
    all_speech = [clip for split in (known | unseen).values() for clip in split["test"]]
    results = {}
    for title, splits in (("known speaker", known), ("unseen people", unseen)):
        by_person = {}
        for name, split in splits.items():
            models = {"backbone": model}
            if title == "unseen people":
                own = with_own_adapter(config, model, directions, name, split["train"])
                models[f"own adapter, {OWN_SECONDS} s"] = own
            by_person[name] = measure(config, models, split, all_speech)
        results[title] = table(title, by_person)
        print("\n".join(results[title]) + "\n", flush=True)


if __name__ == "__main__":
    main()
