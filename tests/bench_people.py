"""Real people as an independent witness sees them: `python tests/bench_people.py ROOT`.

Trains the autoencoder and the UNet of the preset `faces` on the people in the folder ROOT (about
40 minutes on two cores), but for every fourth of those with eight clips or more, whom nothing
trains on, and for six clips of the person with most clips. Then lets them speak and measures by
`witness.py`. Prints a table of means with 95 % intervals; numbers only are kept. What is trained
stays in --work and is used again.

`--curve RUN` instead takes the backbone of a finished run of the preset `faces` and its client with
most clips: what do personal adapters of 5, 15, 60 and 300 seconds of own video add? `--methods RUN
...` takes finished runs on one backbone: the global adapter of each on the clients' test clips.
"""

import argparse
import copy
import sys
from dataclasses import replace
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
SECONDS = (5, 15, 60, 300)  # ... and of the curve
COLUMNS = {
    "mouth_r": "mouth r",
    "mouth_std_ratio": "its deviation ÷ truth's",
    "silence_ratio": "opening in silence ÷ truth's",
    "blinks": "blinks a minute",
    "true_blinks": "truth's",
    "head_variance_ratio": "head variance ÷ truth's",
    "identity_distance": "identity distance",
}


def pick(clips, count):
    """Return so many clips, spread over all."""
    return clips[:: max(1, len(clips) // count)][:count]


def split_people(people):
    """Return the public people and, for the person with most clips and for the unseen, their clips
    {name: {"train", "test"}}.
    """
    most = max(people, key=lambda name: len(people[name]))
    several = sorted(name for name in people if len(people[name]) >= 8 and name != most)
    unseen = several[::4]
    test = pick(people[most], NUM_TESTS)
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
        state, _ = train.train_unet(config, autoencoder, public, device, partial)
        model = train.build_model(config)
        model.load_state_dict(state)
        directions = train.find_directions(config, model.eval(), public)
        train.save_checkpoint(path, "UNet", {"model": state, "directions": directions})
    content = train.load_checkpoint(path, "UNet")
    model = train.build_model(config)
    model.load_state_dict(content["model"])
    return model.eval().requires_grad_(False), content["directions"]


def first_seconds(clips, seconds):
    """Return the first clips, of so many seconds in all."""
    own = []
    left = round(seconds * data.FPS)
    for clip in clips:
        if left > 0:
            own.append(data.slice_clip(clip, 0, min(left, clip.num_frames)))
            left -= clip.num_frames
    return own


def varied_seconds(clips, seconds):
    """Return so many pieces of a second, each with the sound most unlike that of those before."""
    pieces = [piece for piece in data.segment(clips, 1.0) if piece.num_frames == data.FPS]
    sounds = np.stack([piece.mel.mean(0) for piece in pieces])  # n 40
    chosen = [int(np.square(sounds - sounds.mean(0)).sum(1).argmax())]
    while len(chosen) < seconds:
        distance = np.square(sounds[:, None] - sounds[chosen]).sum(2).min(1)
        chosen.append(int(distance.argmax()))
    return [pieces[i] for i in chosen]


def with_own_adapter(config, model, directions, name, own):
    """Return the model with an adapter trained on a person's clips `own`."""
    adapted = train.add_adapter(config, copy.deepcopy(model), directions, "personal")
    split = {"train": own, "validation": [], "test": []}
    same_clip = config["data"]["in_the_wild"]
    client = fed.Client(name, split, config["backbone"]["num_frames"], same_clip=same_clip)
    kwargs = train.training_kwargs(config, "personal", torch.device("cpu"))
    kwargs["loss_weights"] = dict.fromkeys(config["loss"], 0.0)  # there are no judges
    start = lora.adapter_vector(adapted)
    trained = train.train_personal(adapted, None, client, start, config["seed"], **kwargs)
    return train.merged_copy(adapted, trained)


def measure(config, models, split, all_speech):
    """Return {method: [scores of each test clip]} of a person; other speech is the next of
    `all_speech`. The reference picture is of another clip, but for the one method that says so.
    """
    backbone = models["backbone"]
    scores = {}
    cases = metrics.make_cases({"": split}, NUM_FRAMES, NUM_TESTS)
    for case in tqdm(cases, cases[0].person, leave=False):
        mel = case.speeches[0]  # 4f 40
        other = all_speech[(all_speech.index(case.clip) + NUM_TESTS) % len(all_speech)]
        other_mel = data.audio_windows(np.resize(other.mel, mel.shape))
        ceiling = train.baseline_frames("autoencoder ceiling", case, backbone)
        generated = {"autoencoder ceiling": ceiling}
        for name, model in models.items():
            generated[name] = train.generate_case(model, case, case.mel, config)
        from_first = replace(case, reference=case.clip.frames[0])
        generated["backbone, first frame"] = train.generate_case(
            backbone, from_first, case.mel, config
        )
        generated["other speech"] = train.generate_case(backbone, case, other_mel, config)
        truth = witness.trace(train.to_pixels(case.frames))
        silent = witness.find_silence(case.audio, len(case.frames))
        for name, frames in generated.items():
            try:
                score = witness.compare(truth, witness.trace(train.to_pixels(frames)), silent)
            except ValueError:  # dlib sees hardly any face
                score = dict.fromkeys(COLUMNS, np.nan)
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


def draw_curve(run):
    """Return a table of the run's client with most clips by seconds of own video."""
    config = train.load_config(run / "config.yaml")
    people = train.load_people(config)
    backbone = train.load_checkpoint(run / "backbone.pt", "backbone")
    model, _ = train.restore_backbone(config, backbone, torch.device("cpu"))
    name = max(people.clients, key=lambda client: len(people.clients[client]))
    split = data.split_clips(people.clients[name], config["seed"])
    split["test"] = pick(split["test"], NUM_TESTS)
    own = {f"first {seconds} s": first_seconds(split["train"], seconds) for seconds in SECONDS}
    own[f"{SECONDS[0]} s of varied sound"] = varied_seconds(split["train"], SECONDS[0])
    models = {"backbone": model}
    for title, clips in own.items():
        models[title] = with_own_adapter(config, model, backbone["directions"], name, clips)
    all_speech = split["test"] + split["validation"][:NUM_TESTS]
    return table("own video", {name: measure(config, models, split, all_speech)})


def compare_methods(runs, num_clips=3):
    """Return a table of the global adapters of runs on one backbone, over the clients' test clips."""
    models = {}
    origins = set()  # checksums of the runs' backbones
    for run in runs:
        config = train.load_config(run / "config.yaml")
        _, model, _, state = train.load_run(config, run, torch.device("cpu"))
        if not models:
            models["backbone"] = train.merged_copy(model, torch.zeros_like(state["adapter"]))
        models[config["name"]] = train.merged_copy(model, state["adapter"])
        origins.add(state["description"]["origin"])
    if len(origins) > 1 or len(models) <= len(runs):
        raise ValueError("--methods needs runs on one backbone, each with a name of its own")
    clients = train.load_people(config).clients
    splits = {name: data.split_clips(own, config["seed"]) for name, own in clients.items()}
    for split in splits.values():
        split["test"] = pick(split["test"], num_clips)
    all_speech = [clip for split in splits.values() for clip in split["test"]]
    by_person = {}
    for name, split in splits.items():
        by_person[name] = measure(config, models, split, all_speech)
    return table("clients", by_person)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("root", nargs="?", help="folder of people, as data.root")
    parser.add_argument("--curve", type=Path, metavar="RUN", help="a finished run, instead")
    parser.add_argument(
        "--methods", type=Path, nargs="+", metavar="RUN", help="finished runs, instead"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/people"))
    parser.add_argument(
        "--set", nargs="*", default=[], help="changes of the preset, as in train.py"
    )
    args = parser.parse_args(argv)
    if args.curve:
        print("\n".join(draw_curve(args.curve)))
        return
    if args.methods:
        print("\n".join(compare_methods(args.methods)))
        return
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
                own = first_seconds(split["train"], OWN_SECONDS)
                adapted = with_own_adapter(config, model, directions, name, own)
                models[f"own adapter, {OWN_SECONDS} s"] = adapted
            by_person[name] = measure(config, models, split, all_speech)
        results[title] = table(title, by_person)
        print("\n".join(results[title]) + "\n", flush=True)


if __name__ == "__main__":
    main()
