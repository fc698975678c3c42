"""Train, evaluate and use PrivFedTalk: `python train.py --config config.yaml`. See README.md."""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import signal
import socket
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import fed
import lora
import metrics
import model as talking
import privacy

DEFAULTS = Path(__file__).with_name("config.yaml")
SAVE_EVERY = 100  # steps of the backbone
NUM_REFERENCES = 3  # frames of each training clip that serve as its reference picture, in turn

# What a key may hold, where its type does not say it: (least, greatest) or the choices.
LIMITS = {
    "data.size": (16, 1024), "data.crop": (0.1, 1), "data.window": (5, 25), "data.clients": (2, 10**6),
    "data.unseen": (0, 10**6), "data.synthetic.seconds": (0.8, 60), "data.synthetic.unreliable": (0, 1),
    "data.synthetic.clips_per_client": (3, 10**4), "data.synthetic.public_people": (2, 10**6),
    "data.synthetic.clips_per_public": (1, 10**4), "model.diffusion.num_steps": (2, 10**5),
    "model.diffusion.schedule": ("cosine", "linear"), "model.diffusion.prediction": ("x0", "v", "eps"),
    "judges.steps": (1, 10**7), "backbone.autoencoder_steps": (0, 10**7), "backbone.steps": (1, 10**7),
    "backbone.speech_steps": (0, 10**6), "model.prior_modes": (1, 4096), "backbone.num_frames": (5, 10**4),
    "backbone.batch_size": (1, 10**4), "backbone.ema_decay": (0, 1), "backbone.condition_dropout": (0, 1),
    "lora.rank": (1, 4096), "lora.dropout": (0, 0.99), "loss.tdc": (0, 1e3), "loss.identity": (0, 1e3),
    "loss.perceptual": (0, 1e3), "loss.sync": (0, 1e3), "fed.rounds": (0, 10**7), "fed.sample_rate": (0, 1),
    "fed.local_epochs": (0, 10**4), "fed.batch_size": (1, 10**4), "fed.num_frames": (5, 10**4), "fed.lr": (0, 10),
    "fed.server_lr": (0, 100), "fed.gamma": (0, 100), "fed.reliability_alpha": (0, 1), "fed.sample_cap": (1, 10**9),
    "fed.min_weight": (1e-6, 1e9), "fed.proximal": (0, 1e3), "privacy.clip_norm": (1e-9, 1e9),
    "privacy.noise_multiplier": (0, 1e3), "privacy.target_epsilon": (0, 1e6), "privacy.weight_scale": (0, 1e3),
    "privacy.delta": (1e-300, 0.5), "privacy.noise": ("distributed", "server", "local"),
    "privacy.min_honest": (1, 10**6), "privacy.mechanism": ("gaussian", "skellam"), "privacy.clip_quantile": (0, 1),
    "privacy.clip_rate": (0, 10), "personal.steps": (0, 10**6), "sampling.num_steps": (1, 1000),
    "sampling.solver": ("dpm", "ddim"), "sampling.window": (8, 10**5), "sampling.guidance": (0, 100),
    "sampling.emphasis": (0, 1000), "evaluate.num_frames": (6, 10**5),
    "evaluate.clips_per_client": (1, 10**4), "runtime.threads": (0, 1024),
    "fed.algorithm": ("isfa", "scaffold", "centralized"), "fed.reliability": ("generated", "explained"),
    "fed.optimizer": ("adamw", "sgd"),
    "fed.dropout_rate": (0, 1), "fed.client_timeout_seconds": (0, 10**7), "runtime.memory_gb": (0, 10**5),
    "study.seeds": (1, 10**4), "study.personal_clients": (0, 10**6), "study.train_seconds": (0, 10**6),
    "study.validation_clips": (1, 10**4), "study.noise_multipliers": (1e-6, 1e3), "study.sample_rates": (0.01, 1),
    "study.ranks": (1, 4096), "study.unreliable": (0, 0.99), "study.gammas": (0, 100), "study.tdc": (0, 1e3),
    "study.tdc_num_steps": (1, 1000),
    "study.seconds": (0.4, 10**6), "study.steps": (1, 10**6), "study.full_lr": (0, 10),
}


# ---------------------------------------------------------------------------------------------- configuration


def load_config(path, presets=(), overrides=()):
    """Defaults, then the file at `path`, then its presets, then `key=value` overrides; ValueError names what is wrong."""
    config = read_yaml(DEFAULTS)
    known_presets = config.pop("presets")
    if Path(path).resolve() != DEFAULTS:
        own = read_yaml(path)
        known_presets |= own.pop("presets", {})
        merge(config, own, str(path))
    for name in presets:
        if name not in known_presets:
            raise ValueError(f"--preset {name}: no such preset{nearest(name, known_presets)}")
        merge(config, known_presets[name], f"preset {name}")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write key=value")
        nested = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(config, nested, f"--set {item}")
    return config


def read_yaml(path):
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values")
    return content


def nearest(name, names):
    near = difflib.get_close_matches(name, names, 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def merge(config, changes, where, prefix=""):
    """Write `changes` over `config`, in place; every key must exist and every value be of its kind and in its range."""
    for key, value in changes.items():
        name = prefix + str(key)
        if key not in config:
            raise ValueError(f"{where}: no key {name!r}{nearest(str(key), config)}")
        if isinstance(config[key], dict):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a section: set one of {', '.join(config[key])}")
            merge(config[key], value, where, name + ".")
        else:
            config[key] = checked(name, value, config[key], where)


def checked(name, value, default, where):
    """`value` if it is of the default's kind and inside its limits; an int will do for a float."""
    if isinstance(default, float) and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # also of 1e-3, which YAML 1.1 reads as a word
    if isinstance(default, list) and isinstance(value, list) and default:
        return [checked(name, item, default[0], where) for item in value]
    if type(value) is not type(default):
        raise ValueError(f"{where}: {name} must be {type(default).__name__}, not {value!r}")
    limits = LIMITS.get(name)
    if limits and isinstance(limits[0], str) and value not in limits:
        raise ValueError(f"{where}: {name} must be one of {', '.join(limits)}, not {value!r}")
    if limits and not isinstance(limits[0], str) and not limits[0] <= value <= limits[1]:
        raise ValueError(f"{where}: {name} must lie in {limits[0]} ... {limits[1]}, not {value}")
    return value


def choose_devices(gpus):
    """The devices that `--gpus` names, a worker each: `0,1` (CUDA indices, also `0,0`), `cpu`, or `cpu:2`, two on the CPU.

    Without it every GPU, or else two on the CPU: networks as small as these train faster side by side than on two cores.
    """
    if gpus is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"] * min(2, os.cpu_count())
    kind, _, number = gpus.partition(":")
    if kind == "cpu" and (number or "1").isdigit() and 1 <= int(number or 1) <= 64:
        return ["cpu"] * int(number or 1)
    if not all(index.isdigit() for index in gpus.split(",")):
        raise ValueError(f"--gpus {gpus}: give CUDA indices such as 0,1, or cpu, or cpu:2")
    if max(int(index) for index in gpus.split(",")) >= torch.cuda.device_count():
        raise ValueError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()} GPUs")
    return [f"cuda:{int(index)}" for index in gpus.split(",")]


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path):
    """A temporary file beside `path` that takes its place when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(state, path):
    with replacing(path) as temporary:
        torch.save(state, temporary)


def save_text(text, path):
    with replacing(path) as temporary:
        temporary.write_text(text)


def finite(tree):
    """The same nested dicts and lists with null for what JSON has no number for: an infinite epsilon, a missing mean."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def say(run, text):
    """Print a line beside the progress bars and keep it in log.txt."""
    tqdm.write(text)
    with open(run / "log.txt", "a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def save_image(picture, path):
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------- data


def load_people(config):
    """The dataset as {role: {person: [clip]}} for public, clients and unseen; datasets/synthetic... is made first."""
    settings, root = config["data"], Path(config["data"]["root"])
    if not root.exists() and str(root).startswith("datasets/synthetic"):
        s = settings["synthetic"]
        data.make_synthetic(root, s["public_people"], settings["clients"], settings["unseen"], s["clips_per_public"],
                            s["clips_per_client"], s["seconds"], settings["size"], s["unreliable"], config["seed"],
                            progress=True)
    dataset = data.TalkingHeads(root, settings["size"], progress=True, crop=settings["crop"])
    for path, reason in dataset.skipped:
        tqdm.write(f"skipped {path}: {reason}")
    roles = data.split_people(list(dataset.people), settings["clients"], settings["unseen"], config["seed"])
    if len(roles[0]) < 4:
        raise ValueError(f"{root}: {len(roles[0])} public people are left beside data.clients and data.unseen, "
                         "4 are needed")
    return {role: {name: dataset.people[name] for name in names}
            for role, names in zip(("public", "clients", "unseen"), roles)}


@torch.inference_mode()
def encode_clips(model, clips, device, num_references=1):
    """Each clip as the motion of several reference pictures, {path: [data.View]}.

    They are `num_references` of its own frames and, where these are several, for a clip with a prompt a frame of another
    clip of the person, counted as often: in its own frames, what the prompt says can be seen. With one reference,
    adapters learn the clips by heart. The autoencoder is frozen by then, so once is enough.
    """
    views = {}
    for clip in tqdm(clips, "motion", leave=False, mininterval=1):
        frames = pixels(clip.frames, device)
        latents = model.autoencoder.encode(frames)
        moments = [int((i + 0.5) / num_references * len(frames)) for i in range(num_references)]
        references = [(clip.frames[m], m, "", "") for m in moments]
        others = [c for c in clips if c.person == clip.person and c.prompt != clip.prompt]
        if clip.prompt and others and num_references > 1:
            references.append((others[0].frames[len(others[0].frames) // 2], -1, clip.prompt, others[0].prompt))
        views[clip.path] = []
        for picture, moment, prompt, shown in references:
            reference = pixels(picture, device)
            view = data.View(picture, moment, model.motion(frames, latents, reference).cpu(),
                             model.autoencoder.encode(reference[None])[0].cpu(), prompt, shown)
            views[clip.path] += [view] * (num_references if prompt else 1)  # as often as all of its own
    return views


def pixels(frames, device):
    """uint8 [... 3 h w] -> float32 in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).to(device).float() / 127.5 - 1


def drawer(model, clips, views, device):
    """A function (batch_size, num_frames, generator) -> batch on the device."""

    def draw(batch_size, num_frames, generator):
        batch = data.draw_batch(clips, views, batch_size, num_frames, generator, model.speech_encoder.window)
        batch["words"] = model.text_encoder.ids(batch["prompt"])
        return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}

    return draw


def clip_batch(model, clips, config, device):
    """One window of every clip, as a batch: as long as the shortest of them, at most evaluate.num_frames."""
    num_frames = min(config["evaluate"]["num_frames"], *(len(clip.frames) for clip in clips))
    views, generator = encode_clips(model, clips, device), torch.Generator().manual_seed(config["seed"])
    return fed.join_batches([drawer(model, [clip], views, device)(1, num_frames, generator) for clip in clips])


# ---------------------------------------------------------------------------------------------- backbone


def augment(frames, generator):
    """Zoom, brighten, tint and light frames [n 3 h w] at random, so that the autoencoder meets cameras it has not seen."""
    n = len(frames)

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    zoom = 1 / (1 + 0.3 * torch.rand(n, generator=generator))
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - zoom)[:, None]
    grid = F.affine_grid(theta, frames.shape, align_corners=False).to(frames.device)
    x = F.grid_sample((frames + 1) / 2, grid, padding_mode="border", align_corners=False)
    ramp = torch.linspace(-1, 1, frames.shape[-1])
    light = torch.exp(0.25 * normal(1, 1, 1) + 0.1 * normal(3, 1, 1))
    light = light * (1 + 0.25 * normal(1, 1, 1) * ramp + 0.15 * normal(1, 1, 1) * ramp[:, None])
    x = x.clamp(min=1e-3) ** torch.exp(0.2 * normal(1, 1, 1)).to(x.device) * light.to(x.device)
    return x.clamp(0, 1) * 2 - 1


def schedule(step, num_steps, lr):
    """Warm-up over 50 steps, then a cosine to zero."""
    return lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def descend(optimizer, lr):
    """One clipped optimizer step at learning rate `lr` along the gradients that are there, which it clears."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_autoencoder(autoencoder, clips, settings, seed, device):
    """Reconstruction (L1 + L2) and a small KL on single public frames."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num):
        picks = torch.randint(len(clips), (num,), generator=generator)
        frames = [clips[i].frames[int(torch.randint(len(clips[i].frames), (), generator=generator))] for i in picks]
        return augment(pixels(np.stack(frames), device), generator)

    if autoencoder.linear_in is not None:
        autoencoder.init_linear_path(draw(512))
    optimizer = torch.optim.AdamW(autoencoder.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    bar = tqdm(range(settings["autoencoder_steps"]), "autoencoder", mininterval=1)
    for step in bar:
        frames = draw(settings["autoencoder_batch"])
        mean, log_variance = autoencoder.moments(frames)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        error = autoencoder.decode((mean + noise * (log_variance / 2).exp()) * autoencoder.scaling_factor) - frames
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = error.abs().mean() + error.square().mean() + settings["kl_weight"] * kl
        loss.backward()
        descend(optimizer, schedule(step, settings["autoencoder_steps"], settings["autoencoder_lr"]))
        if step % 10 == 0:
            bar.set_postfix(psnr=f"{10 * np.log10(4 / error.detach().square().mean().item()):.1f} dB")


def train_speech(model, batches, settings, generator):
    """Warm the speech encoder up: regress how the lower half of the face differs from its mean over the clip."""
    motion = torch.cat([b["motion"] - b["motion"].mean(1, keepdim=True) for b in batches])[:, :, 2:]
    motion = motion.flatten(0, 1)  # n c h w
    target = motion[:, :, motion.shape[2] // 2:].flatten(1)
    target, mel = target / target.std(), torch.cat([b["mel"] for b in batches]).flatten(0, 1)
    head = torch.nn.Linear(model.speech_encoder.proj.out_features, target.shape[1]).to(target.device)
    optimizer = torch.optim.AdamW([*model.speech_encoder.parameters(), *head.parameters()], weight_decay=0.01)
    for step in tqdm(range(settings["speech_steps"]), "speech", mininterval=1):
        picks = torch.randint(len(target), (256,), generator=generator)
        summary = model.speech_encoder(mel[picks][None])[0, :, -1]
        loss = (head(summary) - target[picks]).square().mean()
        loss.backward()
        descend(optimizer, schedule(step, settings["speech_steps"], settings["lr"]))


def train_unet(model, public, config, device, partial):
    """Diffusion loss on public clips; returns the moving average of the model and the loss curve.

    Every SAVE_EVERY steps all of it goes to the file `partial`, from which a run that was cut off goes on."""
    settings, seed = config["backbone"], config["seed"]
    torch.manual_seed(seed)
    clips = [clip for own in public.values() for clip in own]
    model.text_encoder.learn_words(clip.prompt for clip in clips)
    views = encode_clips(model, clips, device, NUM_REFERENCES)
    draw = drawer(model, clips, views, device)
    generator, losses = torch.Generator().manual_seed(seed), []
    state = load_state(partial, device) if partial.exists() else None
    if state is None:
        batches = [draw(32, min(24, min(len(c.frames) for c in clips)), generator) for _ in range(16)]
        model.set_statistics(*(torch.cat([b[k] for b in batches]) for k in ("motion", "reference_latents")))
        if config["model"]["prior_speech"]:
            some, window = clips[::max(1, len(clips) // 512)], model.speech_encoder.window
            model.learn_speech([views[clip.path][0].motion for clip in some],
                               [torch.from_numpy(data.audio_windows(clip.mel, window)) for clip in some],
                               metrics.swift, metrics.shrunk_ridge)
        model.learn_expressions([own[-1] for own in views.values() if own[-1].prompt], metrics.shrunk_ridge)
        train_speech(model, batches, settings, generator)
        del batches  # of many more clips than a step
    model.autoencoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    average = talking.EMA(model, settings["ema_decay"])
    if state is not None:
        for part, name in ((model, "model"), (average.module, "average"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
        generator.set_state(state["generator"].cpu())
        losses, average.step = state["losses"], len(state["losses"])
    first, how = len(losses), how_to_step(model, None, config, "backbone")
    bar = tqdm(range(first, settings["steps"]), "backbone", mininterval=1, initial=first, total=settings["steps"])
    for step in bar:
        batch = draw(settings["batch_size"], settings["num_frames"], generator)
        terms, how["micro_batch"] = fed.accumulate(model, batch, None, generator, **how)
        descend(optimizer, schedule(step, settings["steps"], settings["lr"]))
        average.update(model)
        losses.append(terms["diffusion"])
        if step % 10 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            save_torch({"model": model.state_dict(), "average": average.module.state_dict(), "losses": losses,
                        "optimizer": optimizer.state_dict(), "generator": generator.get_state()}, partial)
    return average.module, losses


def train_backbone(config, people, device, path):
    """The judges, the autoencoder and the model, into the file `path`; what is finished of them is kept beside it."""
    public, seed, settings = people["public"], config["seed"], config["backbone"]
    kept = path.with_suffix(".finished")
    done = load_state(kept, device) if kept.exists() else {"seconds": {}}

    def stage(name, work):
        if name not in done:
            started = time.perf_counter()
            done[name] = work()
            done["seconds"][name] = time.perf_counter() - started
            save_torch(done, kept)
        return done[name]

    def judges():
        with tqdm(total=100, desc="judges", unit="%") as bar:
            return metrics.train_judges(public, config["judges"]["steps"], seed, progress=lambda share, _:
                                        bar.update(round(100 * share) - bar.n)).state_dict()

    def autoencoder():
        train_autoencoder(model.autoencoder, [clip for own in public.values() for clip in own], settings, seed, device)
        return model.autoencoder.state_dict()

    def unet():
        average, losses = train_unet(model, public, config, device, path.with_suffix(".partial"))
        return {"model": average.state_dict(), "losses": losses}

    path.parent.mkdir(parents=True, exist_ok=True)
    judges = stage("judges", judges)
    torch.manual_seed(seed)
    model = build_model(config).to(device)
    model.autoencoder.load_state_dict(stage("autoencoder", autoencoder))
    save_torch(stage("backbone", unet) | {"judges": judges, "seconds": done["seconds"]}, path)
    for leftover in (kept, path.with_suffix(".partial")):
        leftover.unlink(missing_ok=True)


def backbone(config, people, device, cache):
    """Judges and pretrained model as a dict of states, from the cache if the same public data and settings made them."""
    recipe = {k: config[k] for k in ("seed", "model", "judges", "backbone")}
    recipe["data"] = {k: config["data"][k] for k in ("size", "crop", "window")}  # not what the clients are like
    clips = [(c.path.name, c.path.stat().st_size) for own in people["public"].values() for c in own]
    code = "".join(Path(module.__file__).read_text() for module in (talking, metrics))
    key = hashlib.sha256(json.dumps([recipe, clips, code], sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache) / f"backbone-{key}.pt"
    if not path.exists():
        train_backbone(config, people, device, path)
    return load_state(path)


def restore(config, state, device):
    """Model and judges, frozen, from what `backbone` gave."""
    model, judges = build_model(config).to(device), metrics.Judges().to(device)
    model.load_state_dict(state["model"])
    judges.load_state_dict(state["judges"])
    return model.eval().requires_grad_(False), judges.eval().requires_grad_(False)


def build_model(config):
    m = config["model"]
    speech = m["speech"] | {"window": config["data"]["window"]}
    unet = m["unet"] | {"checkpointing": config["runtime"]["checkpointing"]}
    model = talking.TalkingHead(m["autoencoder"], unet, speech, m["diffusion"], config["data"]["size"], m["prior_modes"])
    return model.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- memory


def how_to_step(model, judges, config, section):
    """What `fed.accumulate` is told in `section`, backbone or fed: what to minimise, and how much at a time."""
    runtime = config["runtime"]
    how = {"loss_weights": config["loss"] if section == "fed" else dict.fromkeys(config["loss"], 0.0),
           "condition_dropout": config["backbone"]["condition_dropout"], "bf16": runtime["bf16"] and model.spread.is_cuda}
    if runtime["memory_gb"]:
        held, each = step_memory(model, judges, config, section, how)
        how["micro_batch"] = int((1e9 * runtime["memory_gb"] - held) // each)
        if how["micro_batch"] < 1:
            raise ValueError(f"runtime.memory_gb {runtime['memory_gb']}: a {section} step on one clip takes "
                             f"{(held + each) / 1e9:.3f}")
    return how


def step_memory(model, judges, config, section, how):
    """Bytes of a training step on no clip and of each clip: of the models, the optimizer and, as seen on two clips and
    on four, of all that a gradient takes."""
    def gradient(b):
        f, size, device = config[section]["num_frames"], config["data"]["size"], model.spread.device
        c, side, mels = model.motion_channels, model.side, data.MELS_PER_FRAME * config["data"]["window"]
        shapes = {"frames": (f, 3, size, size), "reference": (3, size, size), "motion": (f, c, side, side),
                  "mel": (f, mels, config["model"]["speech"]["num_mels"]), "reference_latents": (c - 2, side, side)}
        batch = {name: torch.zeros(b, *shape, device=device) for name, shape in shapes.items()}
        batch["words"] = model.text_encoder.ids([""] * b).to(device)
        fed.accumulate(model, batch, judges, torch.Generator(), **how)

    def peak(b):
        model.zero_grad()
        return peak_bytes(lambda: gradient(b))

    models = [model, model] if section == "backbone" else [model, judges]  # with its moving average
    held = sum(t.nbytes for m in models if m is not None for t in [*m.parameters(), *m.buffers()])
    held += 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's moments
    model.unet.train()
    two, four = peak(2), peak(4)
    model.unet.train(section == "backbone")
    model.zero_grad()
    return held + 2 * two - four, (four - two) / 2


def peak_bytes(work):
    """The most memory that the tensors which work() makes take at a time, on the GPU if there is one in use."""
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler complains that there is no GPU
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


# ---------------------------------------------------------------------------------------------- evaluation


def test_case(model, clip, reference, settings, device):
    """A batch of one: the first frames of a test clip, its speech and prompt, and a picture from a training clip."""
    f = min(len(clip.frames), settings["num_frames"])
    mel = torch.from_numpy(data.audio_windows(clip.mel, model.speech_encoder.window)[:f]).to(device)
    return {"frames": pixels(clip.frames[:f], device)[None], "mel": mel[None], "reference": pixels(reference, device)[None],
            "words": model.text_encoder.ids([clip.prompt]).to(device)}


def portrait(clips):
    """The frame uint8 [3 H W] of a person's clips that is most like their mean: a typical pose, with open eyes."""
    mean = np.mean([clip.frames.mean(0) for clip in clips], axis=0)
    frames = np.concatenate([clip.frames[::2] for clip in clips])
    return frames[np.argmin(np.square(frames - mean).mean((1, 2, 3)))]


def generate(model, case, seed, sampling, mel=None):
    """Frames [f 3 H W] in [0, 1] for a test case; `mel` speaks other words than the case's own."""
    mel = case["mel"] if mel is None else mel
    return fed.unit_range(model.generate(case["reference"], mel, case["words"], torch.Generator().manual_seed(seed),
                                         **sampling))[0]


@torch.inference_mode()
def score(judges, networks, frames, case, gallery):
    """Every per-clip metric of generated frames, `metrics.Seen`: ({metric: value}, {metric: why it has none}).

    gallery [p d] holds each client's identity, the case's in row `own`. The right speech competes with other speech of
    the same person: another voice could be told from the face alone.
    """
    values, reasons = metrics.score_clip(frames, case["truth"], case["audio"], networks, judges)
    values["id_accuracy*"] = float(int((gallery @ frames.by(judges.identity).mean(0)).argmax()) == case["own"])
    own, *others = case["spoken"]
    leads = [np.subtract(*(judges.lip_sync(frames.by(judges.watch), mel[:len(other)])["sync"] for mel in (own, other)))
             for other in others]
    values["sync_accuracy*"] = float(np.mean(0.5 + 0.5 * np.sign(np.round(leads, 3))))  # a still mouth is guessed about
    if judges.has_opening and case["opening"] is not None:
        values["mouth_correlation*"] = float(metrics.mouth_correlation(frames.by(judges.opening), case["opening"]))
    return values, reasons


def adapted(model, vector):
    """A copy of the adapted `model` with the adapter `vector` folded into its weights: no slower than the backbone."""
    twin = copy.deepcopy(model)
    lora.load_adapter_vector(twin, vector)
    return lora.merge_lora(twin)


def test_cases(model, judges, clients, config, device):
    """What is to be generated: a `test_case` for each test clip of `clients` {name: {"train", "validation", "test":
    [clip]}}, with what `score` asks for; and gallery [p d], each client's identity."""
    settings, window, cases = config["evaluate"], model.speech_encoder.window, []
    with torch.inference_mode():
        known = [np.concatenate([clip.frames[::5] for clip in split["train"]]) for split in clients.values()]
        faces = [judges.identity(fed.unit_range(pixels(frames, device))).mean(0) for frames in known]
    for own, (name, split) in enumerate(clients.items()):
        reference = portrait(split["train"])
        for clip in split["test"][:settings["clips_per_client"]]:
            case = test_case(model, clip, reference, settings, device) | {"clip": clip, "name": name, "own": own}
            length = case["mel"].shape[1]
            case["audio"] = clip.audio[:length * data.SAMPLES_PER_FRAME]
            case["opening"] = None if clip.opening is None else torch.from_numpy(clip.opening[:length])
            others = sorted((c for part in split.values() for c in part if c is not clip), key=lambda c: -len(c.frames))
            case["spoken"] = [c.mel[:4 * length] for c in (clip, *others)]
            rival = np.resize(others[0].mel, clip.mel[:4 * length].shape)  # again from its start where it is shorter
            case["rival"] = torch.from_numpy(data.audio_windows(rival, window)).to(device)[None]
            case["truth"] = metrics.Seen(fed.unit_range(case["frames"])[0])
            cases.append(case)
    return cases, F.normalize(torch.stack(faces), dim=1)


def untrained_methods(model, clients, device):
    """What trained methods are compared with, {method: case -> frames [f 3 H W] in [0, 1]}."""
    def still(case):
        return fed.unit_range(case["reference"])[0].expand(case["mel"].shape[1], -1, -1, -1)

    def mean_frame(case):
        mean = np.mean([c.frames.mean(0) for c in clients[case["name"]]["train"]], axis=0) / 255
        return torch.from_numpy(mean).float().to(device).expand(case["mel"].shape[1], -1, -1, -1)

    def ceiling(case):
        with torch.inference_mode():
            frames = case["frames"][0]
            motion = model.motion(frames, model.autoencoder.encode(frames), case["reference"][0])
            return fed.unit_range(model.decode(motion[None] / model.spread, case["reference"]))[0]

    return {"truth": lambda case: fed.unit_range(case["frames"])[0], "copy reference": still, "mean frame": mean_frame,
            "autoencoder ceiling": ceiling}


def evaluate(model, judges, clients, twins, config, device):
    """Score every method on the clients' test clips; returns rows, pictures to show and frames generated a second.

    `clients` is {name: {"train", "validation", "test": [clip]}}; `twins` is {method: {name: model}} of `adapted` ones.
    """
    networks, sources = metrics.load_standard(config["weights"] or None)
    networks = {name: network.to(device) for name, network in networks.items()}
    extractors = {"*": judges.features} | ({"": networks["fid"]} if "fid" in networks else {})
    cases, gallery = test_cases(model, judges, clients, config, device)
    methods = untrained_methods(model, clients, device)
    for method, own in twins.items():
        methods[method] = lambda case, own=own: generate(own[case["name"]], case, case["own"], config["sampling"])
    methods["personal adapter, other speech"] = lambda case: generate(
        own[case["name"]], case, case["own"], config["sampling"], case["rival"])
    rows, shown, seconds, num_frames, truth = {}, {}, 0.0, 0, None
    missing = {name: source["reason"] for name, source in sources.items() if not source["network"]}
    missing["mouth_correlation"] = "needs landmarks; mouth_correlation* is measured by the judge that trained here"
    for method, make in methods.items():
        scores, statistics = [], {star: metrics.FeatureStatistics() for star in extractors}
        for case in tqdm(cases, method, leave=False):
            started, clip = time.perf_counter(), case["clip"]
            frames = make(case)
            if method in twins:
                seconds, num_frames = seconds + time.perf_counter() - started, num_frames + len(frames)
            seen = metrics.Seen(frames)
            scores.append((*score(judges, networks, seen, case, gallery), len(frames)))
            with torch.inference_mode():
                for star, extract in extractors.items():
                    statistics[star].update(seen.by(extract))
            shown.setdefault(clip.path, {"clip": clip, "reference": fed.unit_range(case["reference"])[0]})[method] = frames
        truth = truth or statistics  # the first method's
        rows[method] = metrics.summarise(COLUMNS, scores, {s: (truth[s], statistics[s]) for s in statistics}, missing)
    return rows, sources, shown, num_frames / seconds


# What a row of the report holds; a star is a judge that trained here.
COLUMNS = ("psnr", "ssim", "lpips", "lpips*", "tlp*", "fid", "fid*", "kid", "kid*", "id_similarity", "id_similarity*",
           "id_accuracy*", "temporal_jitter", "jitter_ratio", "lse_c", "lse_c*", "lse_d", "lse_d*", "sync*",
           "sync_accuracy*", "mouth_correlation", "mouth_correlation*")


# ---------------------------------------------------------------------------------------------- pictures and report


def to_image(frames):
    """Frames [f 3 H W] in [0, 1] -> one strip [H, f W, 3] uint8."""
    return (rearrange(frames.cpu(), "f c h w -> h (f w) c") * 255).round().byte().numpy()


def draw_grid(shown, methods, path, num_rows=8, zoom=2):
    """One row a clip: reference, then every method at a moment when the mouth is open widest (or in the middle)."""
    columns = ["reference", *methods]
    size = next(iter(shown.values()))["reference"].shape[-1] * zoom
    sheet = Image.new("RGB", (size * len(columns), 16 + size * min(num_rows, len(shown))), "white")
    for j, name in enumerate(columns):
        ImageDraw.Draw(sheet).text((j * size + 4, 3), name, "black")
    for i, entry in enumerate(list(shown.values())[:: max(1, len(shown) // num_rows)][:num_rows]):
        opening, length = entry["clip"].opening, len(entry["truth"])
        moment = length // 2 if opening is None else int(np.argmax(opening[:length]))
        for j, name in enumerate(columns):
            picture = entry[name] if name == "reference" else entry[name][moment]
            tile = Image.fromarray(to_image(picture[None])).resize((size, size), Image.LANCZOS)
            sheet.paste(tile, (j * size, 16 + i * size))
    save_image(sheet, path)


def draw_curves(panels, path, width=420, height=260):
    """Line plots side by side: {title: {label: [(x, y)]}}."""
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (title, lines) in enumerate(panels.items()):
        points = np.array([p for line in lines.values() for p in line], dtype=float)
        low, high = points.min(0), points.max(0)
        scale = np.array([width - 80, height - 70]) / np.maximum(high - low, 1e-12)
        pen.text((k * width + 50, 6), title, "black")
        pen.rectangle((k * width + 50, 30, k * width + width - 30, height - 40), outline="#888888")
        for value, y in ((high[1], 26), (low[1], height - 48)):
            pen.text((k * width + 4, y), f"{value:.4g}", "black")
        for value, x in ((low[0], 50), (high[0], width - 60)):
            pen.text((k * width + x, height - 36), f"{value:.4g}", "black")
        for color, (label, line) in zip(colors, lines.items()):
            xy = (np.array(line, dtype=float) - low) * scale
            pen.line([(k * width + 50 + x, height - 40 - y) for x, y in xy], fill=color, width=2)
            pen.text((k * width + 60 + 120 * list(lines).index(label), height - 20), label, color)
    save_image(sheet, path)


def write_samples(shown, methods, folder, num_clips=4):
    """Side-by-side videos with sound of the first clips: truth and every method, left to right."""
    folder.mkdir(exist_ok=True)
    for entry in list(shown.values())[:: max(1, len(shown) // num_clips)][:num_clips]:
        clip, length = entry["clip"], len(entry["truth"])
        strips = np.stack([to_image(torch.stack([entry[m][f] for m in methods])) for f in range(length)])
        strips = strips.repeat(2, 1).repeat(2, 2)
        data.write_video(folder / f"{clip.person}-{clip.name}.mp4", strips, clip.audio[:length * 640],
                         {"comment": "synthetic: " + " | ".join(methods)})


def written(cell):
    """A mean and its interval, as far as there are any."""
    if cell["mean"] is None:
        return "–"
    return f"{cell['mean']:.3f}" + (" [{:.3f}, {:.3f}]".format(*cell["ci95"]) if cell.get("ci95") else "")


def report_tables(report):
    """report.json as Markdown."""
    names = [k for k in COLUMNS if any(row[k]["mean"] is not None for row in report["rows"])]
    lines = [f"# {report['name']}", "", "| method | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in report["rows"]:
        lines.append("| " + " | ".join([row["name"], *(written(row[name]) for name in names)]) + " |")
    for section in ("validation_loss", "judges", "privacy", "communication", "seconds", "hardware", "speed"):
        lines += ["", f"## {section}", "", "| | |", "|---|---|"]
        lines += [f"| {k} | {json.dumps(v) if isinstance(v, (dict, list)) else v} |" for k, v in report[section].items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- the run


def split_clients(people, config):
    return {name: data.split_clips(own, config["seed"]) for name, own in people["clients"].items()}


def make_clients(model, splits, config, device):
    """A fed.Client for each of `splits`. What it trains on is made when it is first asked for: a process of several
    needs only its own clients'."""
    f = config["fed"]["num_frames"]

    @functools.cache
    def draw(name):
        views = encode_clips(model, splits[name]["train"], device, NUM_REFERENCES)
        return drawer(model, splits[name]["train"], views, device)

    @functools.cache
    def validation(name):
        batch = clip_batch(model, splits[name]["validation"], config, device)
        picture = pixels(portrait(splits[name]["train"])[None], device)
        return batch | {"other_reference": picture.expand_as(batch["reference"])}

    def client(name):
        num_samples = sum(len(c.frames) // f for c in splits[name]["train"])
        return fed.Client(name, num_samples, lambda *args: draw(name)(*args), lambda: validation(name))

    return {name: client(name) for name in splits}


def settings_of(config, public, how):
    """What fed.run_round needs, from the config, `public_standard` and `how_to_step`."""
    f = config["fed"]
    if f["algorithm"] == "scaffold" and (f["optimizer"] != "sgd" or f["proximal"]):
        raise ValueError("fed.algorithm scaffold: its control variates are means of plain gradients: set "
                         "fed.optimizer=sgd and fed.proximal=0")
    train = {k: f[k] for k in ("lr", "batch_size", "num_frames", "proximal", "optimizer")}
    names = ("algorithm", "sample_rate", "local_epochs", "server_lr", "gamma", "reliability", "reliability_alpha",
             "sample_cap", "dropout_rate", "client_timeout_seconds")
    return {k: f[k] for k in names} | {"train": train | how, "sampling": config["sampling"], "public": public}


def make_mechanism(config, length):
    """The DP mechanism for adapters of `length` numbers, or None; `target_epsilon`, if any, chooses its noise."""
    p, f = config["privacy"], config["fed"]
    if not p["enabled"] or f["algorithm"] == "centralized":
        return None
    length *= 2 if f["algorithm"] == "scaffold" else 1  # the update of the control variate is clipped with the other
    mechanism = privacy.Mechanism(p["clip_norm"], p["noise_multiplier"], length, config["data"]["clients"], p["min_honest"],
                                  p["weight_scale"], f["min_weight"], bit_scale=0.5 if p["clip_quantile"] else 0.0,
                                  noise=p["noise"], mechanism=p["mechanism"])
    for _ in range(3 if p["target_epsilon"] else 0):  # Skellam's sensitivities depend a little on the noise
        z = privacy.find_noise_multiplier(p["target_epsilon"], p["delta"], f["sample_rate"], f["rounds"],
                                          skellam=mechanism.spending(f["sample_rate"])["skellam"])
        mechanism = dataclasses.replace(mechanism, noise_multiplier=z)
    return mechanism


def mean_validation_loss(model, clients, adapter, seed, workers):
    """Validation loss of the global adapter, in the mean over one clip of every client, by the same noise each round."""
    def loss(client):
        return float(fed.validation_loss(model, {k: v[:1] for k, v in client.validation().items()}, seed, num_levels=2))

    lora.load_adapter_vector(model, adapter)
    own = {i: loss(clients[i]) for i in workers.share([1] * len(clients))}
    return workers.ask(own, lambda parts: float(np.mean(list(fed.union(parts).values()))))


def initial_state(model, config):
    """What the rounds start from: round 0 of `last.pt`."""
    start = lora.adapter_vector(model)
    state = {"adapter": start, "round": 0, "accountant": [], "best": float("inf"),
             "clip_norm": config["privacy"]["clip_norm"]}
    if config["fed"]["algorithm"] == "scaffold":
        zeros = torch.zeros_like(start)
        state |= {"control": zeros, "controls": {i: zeros for i in range(config["data"]["clients"])}}
    return state


def federate(model, judges, clients, config, run, public, workers):
    """All rounds, resumed from `last.pt` where there is one; writes rounds.jsonl, last.pt and best.pt."""
    p, lead = config["privacy"], workers.rank == 0
    path = run / "last.pt"
    state = workers.ask(None, lambda _: load_state(path) if path.exists() else initial_state(model, config))
    how = workers.ask(None, lambda _: how_to_step(model, judges, config, "fed"))
    clients, settings = list(clients.values()), settings_of(config, public, how)
    mechanism, num_rounds = make_mechanism(config, len(state["adapter"])), config["fed"]["rounds"]
    accountant = privacy.Accountant(state["accountant"])
    if lead:
        forget_rounds(run, state["round"])
    bar = tqdm(range(state["round"], num_rounds), "rounds", initial=state["round"], total=num_rounds)
    for index in bar:
        if mechanism:  # spent before the round, so that a round cut off after its upload stays spent
            mechanism = dataclasses.replace(mechanism, clip_norm=state["clip_norm"])
            spending = mechanism.spending(settings["sample_rate"])
            if p["target_epsilon"] and accountant.would_exceed(p["target_epsilon"], p["delta"], **spending):
                if lead:
                    say(run, f"stopped before round {index}: it would pass epsilon {p['target_epsilon']} "
                             f"at delta {p['delta']}")
                break
            accountant.spend(**spending)
            if lead:
                save_torch(state | {"accountant": accountant.history}, path)
        state, record = fed.run_round(model, judges, clients, state, index, config["seed"], mechanism, settings, workers)
        started = time.perf_counter()
        record["validation_loss"] = mean_validation_loss(model, clients, state["adapter"], config["seed"], workers)
        record["epsilon"] = accountant.epsilon(p["delta"]) if mechanism else None
        record["seconds"]["validation"] = time.perf_counter() - started
        state |= {"round": index + 1, "accountant": accountant.history,
                  "best": min(state["best"], record["validation_loss"])}
        if record.get("unclipped_fraction") is not None:
            state["clip_norm"] = privacy.next_clip_norm(mechanism.clip_norm, record["unclipped_fraction"],
                                                        p["clip_quantile"], p["clip_rate"])
        if lead:
            write_round(record, state, run)
        bar.set_postfix(validation=f"{record['validation_loss']:.4f}",
                        epsilon=f"{record['epsilon']:.4g}" if mechanism else "none")
    return state["adapter"]  # the last: choosing the best would look at the clients' losses outside of the guarantee


def forget_rounds(run, num_rounds):
    """Take from rounds.jsonl what a run that was cut off had written of the round to be done again."""
    log = run / "rounds.jsonl"
    if log.exists():
        save_text("".join(log.read_text().splitlines(keepends=True)[:num_rounds]), log)


def write_round(record, state, run):
    """Log a round, and keep the state that it ended in."""
    for gone in record["dropouts"]:
        say(run, f"round {record['round']}: {gone['client']} dropped out: {gone['reason']}")
    if "skipped" in record:
        say(run, f"round {record['round']}: nothing aggregated: {record['skipped']}")
    with open(run / "rounds.jsonl", "a") as log:
        log.write(json.dumps(finite(record)) + "\n")
    save_torch(state, run / "last.pt")
    if state["best"] == record["validation_loss"]:
        save_torch(state, run / "best.pt")


def personal_settings(model, judges, config):
    """What `fed.train_adapter` needs for a personal adapter: as in the rounds, but by AdamW at its own rate."""
    train = settings_of(config, None, how_to_step(model, judges, config, "fed"))["train"]
    return train | {"lr": config["personal"]["lr"], "proximal": 0.0, "optimizer": "adamw"}


def personalize(model, judges, clients, adapter, config, run, workers):
    """Each client's own adapter, trained on from the global one on its own clips; kept in personal/<client>.pt."""
    train = workers.ask(None, lambda _: personal_settings(model, judges, config))
    (run / "personal").mkdir(exist_ok=True)
    names, vectors = list(clients), {}
    for number in tqdm(workers.share([client.num_samples for client in clients.values()]), "personal adapters"):
        name, path = names[number], run / "personal" / f"{names[number]}.pt"
        if not path.exists():
            seed = fed.derived_seed(config["seed"], 10**6, number)
            vector, _ = fed.train_adapter(model, judges, clients[name].draw, adapter, config["personal"]["steps"], seed,
                                          **train)
            save_torch({"adapter": vector}, path)
        vectors[name] = load_state(path)["adapter"]
    return workers.ask(vectors, fed.union)


def load_state(path, device="cpu"):
    """A checkpoint of ours; ValueError if the file is none."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__})") from None


def add_adapters(model, config):
    """Adapters in the frozen model, or, where lora.targets is empty, none: the whole UNet is trained then."""
    torch.manual_seed(config["seed"])  # A is random: every party must start from the same
    a = config["lora"]
    if not a["targets"]:
        model.unet.requires_grad_(True)
        return
    lora.inject_lora(model, a["rank"], a["alpha"], a["dropout"], a["targets"], a["freeze_a"])
    model.eval()


def train(config, device, run, workers):
    """The whole path: data, backbone, rounds, personal adapters, evaluation, report."""
    seconds, clock, lead = {}, time.perf_counter(), workers.rank == 0

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()
        if lead:
            say(run, f"{name}: {seconds[name]:.0f} s")

    people = workers.in_turn(lambda: load_people(config))  # refuses what it must before anything is written
    run.mkdir(parents=True, exist_ok=True)
    warnings.showwarning = lambda message, *_, **__: say(run, f"warning: {message}")
    with claimed(run) if lead else contextlib.nullcontext():
        lap("data")
        trained = workers.ask(None, lambda _: starting_point(config, people, device, run))
        seconds |= trained["seconds"]  # of the run that trained it, should this one have found it in the cache
        model, judges = restore(config, trained, device)
        add_adapters(model, config)
        splits = split_clients(people, config)
        clients = make_clients(model, splits, config, device)
        untouched, clock = lora.adapter_vector(model), time.perf_counter()
        public = public_standard(config["fed"]["reliability"], model, people["public"], config, device)
        shared = federate(model, judges, clients, config, run, public, workers)
        lap("rounds")
        own = personalize(model, judges, clients, shared, config, run, workers)
        lap("personal adapters")
        if lead:
            twins = {"backbone only": dict.fromkeys(clients, adapted(model, untouched)),
                     "global adapter": dict.fromkeys(clients, adapted(model, shared)),
                     "personal adapter": {name: adapted(model, vector) for name, vector in own.items()}}
            with every_core(config):
                rows, sources, shown, speed = evaluate(model, judges, splits, twins, config, device)
                losses = test_losses(model, splits, twins, config, device)
                lap("evaluation")
                publish(make_report(config, rows, sources, losses, judges, seconds, speed, model, run), shown, run)
            draw_history(run, trained["losses"])
            print(f"report, pictures and videos: {run}")


@contextlib.contextmanager
def every_core(config):
    """For work of the first worker alone: all CPU threads, while the others wait, unless runtime.threads fixes them."""
    before = torch.get_num_threads()
    torch.set_num_threads(config["runtime"]["threads"] or os.cpu_count())
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def claimed(run):
    """This process's claim on a run's directory, which ends with it; ValueError if another holds it."""
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{run}: another process is at work there") from None
        for half_written in run.rglob(".[0-9]*-*"):  # by one that was killed: see `replacing`
            half_written.unlink()
        yield


def starting_point(config, people, device, run):
    """The run's own backbone.pt, which its adapters were trained on, or what `backbone` gives; the config beside it."""
    path = run / "backbone.pt"
    save_text(yaml.safe_dump(config, sort_keys=False), run / "config.yaml")
    if not path.exists():
        with every_core(config):
            save_torch(backbone(config, people, device, Path(config["runtime"]["directory"]) / "backbones"), path)
    return load_state(path)


def publish(report, shown, run):
    """Write the report, the pictures and the videos, and print the tables."""
    save_text(json.dumps(finite(report), indent=1), run / "report.json")
    save_text(report_tables(report), run / "report.md")
    pictured = [row["name"] for row in report["rows"] if row["name"] not in ("mean frame", "copy reference")]
    draw_grid(shown, pictured, run / "grid.png")
    write_samples(shown, [m for m in pictured if "other" not in m], run / "samples")
    print(report_tables(report))


def public_standard(kind, model, public, config, device, num_clips=12):
    """What a client's reliability of this kind is held against: the public clips' mean temporal jitter (generated), or
    how well the backbone explains a few of them (explained)."""
    if kind == "generated":
        return float(np.mean([float(metrics.temporal_jitter(torch.from_numpy(c.frames / np.float32(255))))
                              for own in public.values() for c in own]))
    clips = [own[0] for own in public.values()][:num_clips]
    return fed.unexplained(model, clip_batch(model, clips, config, device), config["seed"])


def test_losses(model, splits, twins, config, device):
    """Validation loss on every client's test clips under every method, {method: {mean, ci95, n}}; clip by clip, the
    difference to the method before and the ratio to the first, from which what clips differ in is gone."""
    losses, batches = {}, {name: clip_batch(model, split["test"], config, device) for name, split in splits.items()}
    for method, own in twins.items():
        losses[method] = []
        for name, batch in batches.items():
            losses[method] += fed.validation_loss(own[name], batch, config["seed"], 4).tolist()
    table = {m: metrics.mean_ci(v) for m, v in losses.items()}
    methods = list(losses)
    for better, worse in zip(methods[1:], methods):
        table[f"{better} minus {worse}, paired"] = metrics.mean_ci(np.subtract(losses[better], losses[worse]))
        table[f"{better} / {methods[0]}, paired"] = metrics.mean_ci(np.divide(losses[better], losses[methods[0]]))
    return table


def make_report(config, rows, sources, losses, judges, seconds, speed, model, run):
    """report.json as DESIGN describes it."""
    table = [{"name": name} | row for name, row in rows.items()]
    d, whole = len(lora.adapter_vector(model)), sum(p.numel() for p in model.parameters())
    mechanism = make_mechanism(config, d)
    reason = "the clients' clips are pooled" if config["fed"]["algorithm"] == "centralized" else "privacy.enabled is false"
    guarantee = {"private": False, "epsilon": None, "reason": reason}
    if mechanism:
        accountant = privacy.Accountant(load_state(run / "last.pt")["accountant"])
        guarantee = privacy.privacy_report(mechanism, accountant, config["privacy"]["delta"], config["fed"]["rounds"])
    judged = sources | {name: "self-trained on the public split" for name in COLUMNS if name.endswith("*")}
    judged |= {"self-trained, scores on held-out public people": judges.scores}
    return {"name": config["name"], "rows": table, "validation_loss": losses, "judges": judged, "privacy": guarantee,
            "communication": {"adapter_parameters": d, "model_parameters": whole, "bytes_up_plain": 4 * (d + 1),
                              "bytes_up_secure": mechanism and mechanism.num_bytes, "bytes_down": 4 * d},
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
            "speed": {"generated_frames_per_second": round(speed, 1)},
            "hardware": {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                         "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                         "torch": torch.__version__}}


def draw_history(run, backbone_losses):
    log = run / "rounds.jsonl"
    rounds = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    smooth = np.convolve(backbone_losses, np.ones(25) / 25, "valid")
    panels = {"backbone: diffusion loss by step": {"training": list(enumerate(smooth))}}
    if rounds:
        panels["validation loss by round"] = {"global adapter": [(r["round"] + 1, r["validation_loss"]) for r in rounds]}
        if all(r["epsilon"] is not None for r in rounds):
            panels["epsilon spent by round"] = {"epsilon": [(r["round"] + 1, r["epsilon"]) for r in rounds]}
    draw_curves(panels, run / "curves.png")


def audit(config, device, run):
    """--action audit: is the noise there, and what does an update tell of the clips behind it? Writes audit.json."""
    people = load_people(config)
    model, judges = restore(config, load_state(run / "backbone.pt"), device)
    add_adapters(model, config)
    splits = split_clients(people, config)
    clients = make_clients(model, splits, config, device)
    start, delta, f = lora.adapter_vector(model), config["privacy"]["delta"], config["fed"]
    mechanism = make_mechanism(config, len(start))
    if mechanism is None:
        raise ValueError("--action audit: privacy.enabled is false: there is no noise to audit")
    canaries = {str(defect or "no defect"): privacy.canary_audit(mechanism, delta, defect=defect)
                for defect in privacy.DEFECTS}
    z = privacy.find_noise_multiplier(8, delta, f["sample_rate"], f["rounds"])
    protected = dataclasses.replace(mechanism, noise_multiplier=z)
    settings = settings_of(config, None, how_to_step(model, judges, config, "fed")) | {"gamma": 0.0}
    local = [fed.client_update(model, judges, client, start, fed.derived_seed(config["seed"], 2 * 10**6, i), settings)
             for i, client in enumerate(tqdm(clients.values(), "local updates"))]
    uploads = {i: (update, weight) for i, (update, weight, _) in enumerate(local)}
    released = {"released mean": fed.aggregate(uploads, list(uploads), mechanism, 0)[0],
                "released mean, noise for epsilon 8": fed.aggregate(uploads, list(uploads), protected, 0)[0]}
    attack = {"one client's update, unprotected": []} | {name: [] for name in released}
    for split, (update, _) in zip(splits.values(), uploads.values()):
        for name, auc in zip(attack, membership_auc(model, split, start, (update, *released.values()), config, device)):
            attack[name].append(auc)
    result = {"canaries": canaries, "membership_auc": {name: metrics.mean_ci(values) for name, values in attack.items()}}
    save_text(json.dumps(finite(result), indent=1), run / "audit.json")
    for name, c in canaries.items():
        print(f"canaries, {name}: epsilon {c['measured_epsilon']:.4g} [{c['epsilon_lower_bound']:.4g}, "
              f"{c['epsilon_upper_bound']:.4g}], accounted {c['accounted_epsilon']:.4g}: "
              f"{'FLAGGED, ' + c['why'] if c['flagged'] else 'as accounted'}")
    for name, auc in result["membership_auc"].items():
        print(f"membership of clips by {name}: AUC {written(auc)}")


def membership_auc(model, split, start, updates, config, device):
    """How well each of `updates` tells a client's training clips from its others (`fed.membership_gains`); 0.5: a guess."""
    clips = split["train"] + split["validation"] + split["test"]
    gains = fed.membership_gains(model, clip_batch(model, clips, config, device), start, updates, config["seed"])
    return [metrics.auc(own[:len(split["train"])], own[len(split["train"]):]) for own in gains]


def dry_run(config, device):
    """--action dry-run: what the run is, takes, sends and spends, without doing it."""
    model, judges = build_model(config).to(device), metrics.Judges().to(device).eval().requires_grad_(False)
    whole, memory = sum(p.numel() for p in model.parameters()), {}
    for section, prepare in (("backbone", lambda: model.autoencoder.requires_grad_(False)),
                             ("fed", lambda: add_adapters(model, config))):
        prepare()
        how = how_to_step(model, judges, config, section)
        held, each = step_memory(model, judges, config, section, how)
        memory[section] = min(how.get("micro_batch") or math.inf, config[section]["batch_size"]), held, each
    d = len(lora.adapter_vector(model))
    mechanism = make_mechanism(config, d)
    print(yaml.safe_dump(config, sort_keys=False))
    print(f"parameters: model {whole:,}, adapter {d:,}")
    print(f"bytes a client and round: down {4 * d:,}, up {mechanism.num_bytes if mechanism else 4 * (d + 1):,} "
          f"(the whole model: {4 * whole:,})")
    for section, (clips, held, each) in memory.items():
        print(f"memory of a {section} step: {(held + clips * each) / 1e9:.3f} GB on {device}, {clips} clips at a time "
              f"({held / 1e9:.3f} and {each / 1e9:.3f} a clip)")
    if mechanism:
        accountant = privacy.Accountant()
        accountant.spend(**mechanism.spending(config["fed"]["sample_rate"]), rounds=config["fed"]["rounds"])
        print(f"epsilon {accountant.epsilon(config['privacy']['delta']):.4g} at delta {config['privacy']['delta']}")


# ---------------------------------------------------------------------------------------------- speaking


def speak(args, config, device):
    """--action generate: a portrait and a voice become a talking video with sound."""
    for flag in ("reference", "speech"):
        if not getattr(args, flag):
            raise ValueError(f"--action generate needs --{flag}")
    output = args.output or "talk.mp4"
    model, judges = speaker(args, config, device)
    unknown = set(talking.split_words(args.prompt)).difference(model.text_encoder.words)
    if unknown:
        print(f"--prompt: not known and ignored: {', '.join(sorted(unknown))}; "
              f"known: {', '.join(model.text_encoder.words) or 'none, the dataset had no prompts'}")
    case = {"reference": torch.stack([pixels(p, device) for p in see(args.reference, config["data"])])[None],
            "words": model.text_encoder.ids([args.prompt]).to(device)} | hear(args, config, device)
    sampling = config["sampling"] | {"num_steps": args.steps or config["sampling"]["num_steps"]}
    sampling["scales"] = {name: getattr(args, f"{name}_scale") for name in talking.CONDITIONS}
    seed = config["seed"] if args.seed is None else args.seed
    started, times, num_frames = time.perf_counter(), [], case["mel"].shape[1]

    def blocks():
        stream = model.stream(case["reference"], case["mel"], case["words"], torch.Generator().manual_seed(seed),
                              **sampling)
        with tqdm(total=num_frames, desc="speaking", unit=" frames") as bar:
            for block in stream:
                frames = fed.unit_range(block)[0]
                times.append(time.perf_counter() - started)
                yield (frames if args.no_watermark else marked(frames)).mul(255).round().byte().cpu().numpy()
                bar.update(len(frames))

    data.write_video(output, blocks(), case["audio"], {"comment": "synthetic: generated by PrivFedTalk"})
    seconds, lag = time.perf_counter() - started, data.sound_lag(output, case["audio"])
    if abs(lag) > 0.5 / data.FPS and case["audio"].any():
        raise ValueError(f"{output}: its sound comes {1000 * lag:.0f} ms late: the encoder shifted it")
    print(f"{output}: {num_frames} frames in {seconds:.1f} s ({num_frames / seconds:.0f} frames a second, file "
          f"included), the first after {times[0]:.2f} s; sound {1000 * lag:+.1f} ms")
    if len(args.reference) > 1:
        print(compare_references(model, judges, case, seed, config["sampling"]))


def speaker(args, config, device):
    """The model of --resume with the adapter that it is to speak with in its weights, and the judges."""
    run = Path(args.resume or ".")
    if not (run / "backbone.pt").exists():
        raise ValueError(f"--resume {run}: no backbone.pt there; give the directory of a finished run")
    model, judges = restore(config, load_state(run / "backbone.pt"), device)
    adapter = args.adapter or (run / "last.pt" if (run / "last.pt").exists() else None)
    if adapter:
        add_adapters(model, config)
        lora.load_adapter_vector(model, load_state(adapter, device)["adapter"])
        model = lora.merge_lora(model)
    return model, judges


def see(paths, settings):
    """The pictures at `paths`, uint8 [3 H W]; says which ones lost their sides."""
    for path in paths:
        picture, cropped = data.load_image(path, settings["size"], settings["crop"])
        if cropped:
            print(f"{path}: not square: its centre is used; crop it around the face if that is elsewhere")
        yield picture


def hear(args, config, device):
    """The sound of --speech, at most --seconds of it, in whole frames: audio int16 [640 f] and mel [1 f n m]."""
    audio = data.load_speech(args.speech)
    audio = audio[:round(args.seconds * data.SAMPLE_RATE)] if args.seconds else audio
    num_frames = max(6, len(audio) // data.SAMPLES_PER_FRAME)
    audio = np.pad(audio, (0, num_frames * data.SAMPLES_PER_FRAME))[:num_frames * data.SAMPLES_PER_FRAME]
    mel = data.audio_windows(data.log_mel(audio), config["data"]["window"])
    return {"audio": audio, "mel": torch.from_numpy(mel)[None].to(device)}


def marked(frames):
    """Frames [f 3 H W] in [0, 1] with the letters AI in a corner."""
    height, width = frames.shape[-2:]
    stamp = Image.new("L", (width, height))
    font = ImageFont.load_default(max(8, height // 9))
    ImageDraw.Draw(stamp).text((width - 2, height - 1), "AI", 160, font, anchor="rs")
    return torch.lerp(frames, torch.ones_like(frames), torch.from_numpy(np.array(stamp)).to(frames.device) / 255)


def compare_references(model, judges, case, seed, sampling):
    """What several pictures of a person do for identity, in a sentence, from the first window."""
    pictures, similarity = case["reference"], []
    person = F.normalize(judges.identity(fed.unit_range(pictures[0])).mean(0), dim=0)
    for some in (pictures[:, :1], pictures):
        first = next(model.stream(some, case["mel"], case["words"], torch.Generator().manual_seed(seed), **sampling))
        similarity.append(float((judges.identity(fed.unit_range(first)[0]) @ person).mean()))
    alone, together = similarity
    return (f"identity similarity* with the first picture alone {alone:.3f}, with all {pictures.shape[1]} {together:.3f}: "
            f"more pictures {'help' if together > alone else 'do not help'}")


def personalize_own(args, config, device):
    """--action personalize: a person's own videos become an adapter; what it gains is measured on a held-out fifth."""
    if not args.clips or not args.resume:
        raise ValueError("--action personalize needs --clips FOLDER and --resume runs/NAME")
    run = Path(args.resume)
    dataset = data.TalkingHeads(args.clips, config["data"]["size"], progress=True, crop=config["data"]["crop"])
    for path, reason in dataset.skipped:
        print(f"skipped {path}: {reason}")
    clips = data.cut([dataclasses.replace(clip, person="me") for clip in dataset.clips], 2.0)
    split = data.split_clips(clips, config["seed"])
    split["train"] += split["validation"]
    model, judges = restore(config, load_state(run / "backbone.pt"), device)
    add_adapters(model, config)
    start = load_state(run / "last.pt")["adapter"]
    draw = drawer(model, split["train"], encode_clips(model, split["train"], device, NUM_REFERENCES), device)
    own, _ = fed.train_adapter(model, judges, draw, start, config["personal"]["steps"], config["seed"],
                               **personal_settings(model, judges, config))
    output = args.output or "me.pt"
    save_torch({"adapter": own}, output)
    twins = {"global adapter": {"me": adapted(model, start)}, "personal adapter": {"me": adapted(model, own)}}
    losses = test_losses(model, {"me": split}, twins, config, device)
    for name, loss in losses.items():
        print(f"validation loss on {loss['n']} held-out pieces, {name}: {written(loss)}")
    print(f"{output}: the adapter of {len(split['train'])} pieces of 2 s; --action generate --adapter {output} speaks with it")


# ---------------------------------------------------------------------------------------------- the study


TABLES = ("methods", "ablation", "privacy", "participation", "communication", "rank", "reliability", "tdc",
          "personalization")
LAYERS = {"attention": ["to_q", "to_k", "to_v", "to_out"], "modulation": ["time_emb_proj"],
          "convolutions": ["unet.conv_in", "resnet.conv1", "resnet.conv2", "unet.conv_out"], "whole UNet, no LoRA": []}
RELIABILITY = ("reliability", "identity", "stability", "speech", "fit")  # r and the parts of either kind
STUDY_METRICS = ("validation_loss", "psnr", "lpips", "lpips*", "id_similarity", "id_similarity*", "sync*",
                 "mouth_correlation*", "jitter_ratio", "excess_jitter")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of a table, to be worked out for each seed. `changes`: presets and settings over the config. `against`:
    rows that it is compared with, pair by pair. `work`: rounds, personal (adapters trained from the backbone on) or the
    name of an untrained method. `seconds` of each client's video are trained on, 0: all, None: study.train_seconds.
    `unreliable`: share of the clients whose clips are broken."""

    label: str
    changes: tuple = ()
    against: tuple = ()
    work: str = "rounds"
    seconds: float | None = None
    unreliable: float = 0.0


def study_cells(table, config):
    """The rows of a table. All but those of DP itself do without it: its noise would hide everything else."""
    s, own, both = config["study"], config["lora"], ("FedAvg", "centralized")
    nothing = Cell("backbone only", ("plain", {"fed": {"rounds": 0}}), both if table == "methods" else ())
    if table == "methods":
        return [*(Cell(name, work=name) for name in ("copy reference", "autoencoder ceiling")), nothing,
                *(Cell(name, ("plain", name.lower()), both) for name in (*both[::-1], "FedProx", "SCAFFOLD")),
                Cell("PrivFedTalk without DP", ("plain",), both), Cell("PrivFedTalk", (), both)]
    if table == "ablation":
        rows = {"adapters-only": ("adapters-only",), "+ DP": ("plus-dp",), "+ ISFA": ("plus-isfa",),
                "+ TDC": ("plus-tdc",), "+ ISFA + TDC": ("plain",), "full": ()}
        return [Cell(label, changes, ("adapters-only",)) for label, changes in rows.items()]
    if table == "privacy":
        noisy = [(f"z = {z:g}", {"privacy": {"noise_multiplier": z}}) for z in s["noise_multipliers"]]
        return [Cell("without DP", ("plain",)), *(Cell(label, (change,), ("without DP",)) for label, change in noisy)]
    if table == "participation":
        rate = config["fed"]["sample_rate"]
        return swept("rate", s["sample_rates"], lambda value: {"fed": {"sample_rate": value}}, rate)
    if table == "rank":
        scaling = own["alpha"] / own["rank"]  # is kept
        return swept("rank", s["ranks"], lambda rank: {"lora": {"rank": rank, "alpha": max(1, round(scaling * rank))}},
                     own["rank"])
    if table == "tdc":  # of FedAvg: ISFA's r would change with the sampling
        return [Cell(f"lambda {weight:g}, {n} steps", ("plus-tdc", {"loss": {"tdc": weight}, "sampling": {"num_steps": n}}),
                     (f"lambda 0, {n} steps",)) for n in s["tdc_num_steps"] for weight in s["tdc"]]
    if table == "reliability":
        return reliability_cells(s)
    if table == "personalization":
        return [nothing, *personal_cells(config)]
    return []


def swept(name, values, change, usual):
    """A row for each value, compared with that of the usual one."""
    return [Cell(f"{name} {value:g}", ("plain", change(value)), (f"{name} {usual:g}",)) for value in values]


def reliability_cells(s):
    """FedAvg against FedAvg of reliable clients; ISFA, by each gamma and kind of r, against FedAvg of the same clients."""
    names, cells = {share: f"{share:.0%} unreliable, " for share in s["unreliable"]}, []
    for share, gamma in itertools.product(names, s["gammas"]):
        for kind in ("generated", "explained") if gamma else ("generated",):
            label = names[share] + (f"ISFA {gamma:g}, {kind}" if gamma else "FedAvg")
            against = names[share if gamma else s["unreliable"][0]] + "FedAvg"
            change = {"fed": {"gamma": gamma, "reliability": kind}}
            cells.append(Cell(label, ("plain", change), (against,), unreliable=share))
    return cells


def personal_cells(config):
    """Seconds of own video by steps of training; then, with the most of both, other layers and all of the UNet."""
    s, untrained = config["study"], "backbone only"
    cells = [Cell(f"{seconds:g} s, {steps} steps", ({"personal": {"steps": steps}},), (untrained,), "personal", seconds)
             for seconds in s["seconds"] for steps in s["steps"]]
    for kind, targets in LAYERS.items() if cells else ():
        lr = config["personal"]["lr"] if targets else s["full_lr"]
        other = {"lora": {"targets": targets}, "personal": {"lr": lr}}
        most = next(cell for cell in reversed(cells) if cell.against == (untrained,))
        cells.append(dataclasses.replace(most, label=f"{most.label}, {kind}", against=(untrained, most.label),
                                         changes=(*most.changes, other)))
    return cells


@functools.cache
def presets_of_defaults():
    return read_yaml(DEFAULTS)["presets"]


def settings_of_cell(cell, seed, config):
    """The config that a cell runs with; its seed is that of the federation only: data and backbone stay the same."""
    settings = copy.deepcopy(config) | {"seed": seed}
    for change in cell.changes:
        merge(settings, presets_of_defaults()[change] if isinstance(change, str) else change, cell.label)
    return settings


def keys_of_cell(cell, config):
    """{key: seed} of a cell; cells that do the same have the same key."""
    untrained = cell.work not in ("rounds", "personal") or {"fed": {"rounds": 0}} in cell.changes  # no seed matters
    keys, s = {}, config["study"]
    for seed in range(config["seed"], config["seed"] + (1 if untrained else s["seeds"])):
        settings = settings_of_cell(cell, seed, config)
        recipe = {k: v for k, v in settings.items() if k not in ("name", "runtime", "study")}
        recipe |= {k: s[k] for k in ("train_seconds", "validation_clips", "personal_clients")}
        recipe |= {"cell": [cell.work, cell.seconds, cell.unreliable, config["seed"]]}
        keys[hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]] = seed
    return keys


def study_splits(people, config, seconds=None, unreliable=0.0):
    """The clips that every client trains on, is validated and tested with; and {client: fault} of the unreliable."""
    s, splits = config["study"], split_clients(people, config)
    faults = data.choose_faults(list(splits), unreliable, config["seed"])
    seconds = s["train_seconds"] if seconds is None else seconds
    for name, split in splits.items():
        split["train"] = data.first_seconds(split["train"], seconds) if seconds else split["train"]
        split["validation"] = split["validation"][:s["validation_clips"]]
        split["test"] = split["test"][:config["evaluate"]["clips_per_client"]]
        for part in split if name in faults else ():
            split[part] = [data.spoil(clip, faults[name], config["seed"]) for clip in split[part]]
    return splits, faults


def make_bench(config, people, trained, device):
    """What all cells share: frozen model and judges, test cases and batches, clients by how much video they have."""
    model, judges = restore(config, trained, device)

    @functools.cache
    def clients(seconds, unreliable):
        splits, faults = study_splits(people, config, seconds, unreliable)
        return make_clients(model, splits, config, device), faults

    splits, _ = study_splits(people, config)
    cases, gallery = test_cases(model, judges, splits, config, device)
    networks, _ = metrics.load_standard(config["weights"] or None)
    return types.SimpleNamespace(
        config=config, device=device, model=model, judges=judges, clients=clients, splits=splits,
        networks={name: network.to(device) for name, network in networks.items()},
        cases=cases, gallery=gallery,
        standard=functools.cache(lambda kind: public_standard(kind, model, people["public"], config, device)),
        batches={name: clip_batch(model, split["test"], config, device) for name, split in splits.items()})


def run_cell(cell, seed, bench, folder):
    """A cell's figures: every metric by person and test clip, what it took, and each reliability of its rounds."""
    started, settings = time.perf_counter(), settings_of_cell(cell, seed, bench.config)
    people, length, trained, log = {name: {} for name in bench.splits}, 0, 0.0, folder / "rounds.jsonl"
    if cell.work in ("rounds", "personal"):
        model = copy.deepcopy(bench.model)
        add_adapters(model, settings)
        vectors, trained = train_cell(cell, settings, model, bench, folder)
        length, twin = len(next(iter(vectors.values()))), functools.lru_cache(1)(lambda vector: adapted(model, vector))
        people, loss = {}, functools.partial(fed.validation_loss, seed=bench.config["seed"], num_levels=4)
        for name, vector in vectors.items():
            people[name] = {"validation_loss": loss(twin(vector), bench.batches[name]).tolist()}
        make = lambda case: generate(twin(vectors[case["name"]]), case, case["own"], settings["sampling"])
    else:
        make = untrained_methods(bench.model, bench.splits, bench.device)[cell.work]
    for case in (case for case in bench.cases if case["name"] in people):
        values, _ = score(bench.judges, bench.networks, metrics.Seen(make(case)), case, bench.gallery)
        values |= {"excess_jitter": abs(values["jitter_ratio"] - 1)} if "jitter_ratio" in values else {}
        for metric in set(STUDY_METRICS) & set(values):
            people[case["name"]].setdefault(metric, []).append(values[metric])
    rounds = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    faults, kept = bench.clients(cell.seconds, cell.unreliable)[1], ("client", *RELIABILITY)
    reliability = [{k: c[k] for k in kept if k in c} | {"fault": faults.get(c["client"])}
                   for r in rounds for c in r["clients"]] if settings["fed"]["gamma"] else []
    return {"seed": seed, "people": people, "parameters": length, "epsilon": rounds[-1]["epsilon"] if rounds else None,
            "reliability": reliability, "training_seconds": trained, "seconds": time.perf_counter() - started}


def train_cell(cell, settings, model, bench, folder):
    """{client: adapter} of reliable clients: the global one, or, of the first few, their own; and seconds a client."""
    (clients, faults), alone = bench.clients(cell.seconds, cell.unreliable), fed.Workers(alone=True)
    names = [name for name in clients if name not in faults]
    if cell.work == "personal":
        clients = {name: clients[name] for name in names[:settings["study"]["personal_clients"] or None]}
        for client in clients.values():  # makes what they train on, which the first cell should not be charged for
            client.draw(1, settings["fed"]["num_frames"], torch.Generator())
    started = time.perf_counter()
    if cell.work == "personal":
        vectors = personalize(model, bench.judges, clients, lora.adapter_vector(model), settings, folder, alone)
    else:
        standard = bench.standard(settings["fed"]["reliability"])
        shared = federate(model, bench.judges, clients, settings, folder, standard, alone)
        vectors = dict.fromkeys(names, shared)
    return vectors, (time.perf_counter() - started) / len(clients)


def finish_cell(key, cell, seed, bench, run):
    """Leave cells/<key>.json, unless it is there or another worker is at it."""
    path, folder = run / "cells" / f"{key}.json", run / "cells" / key
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder))
        except ValueError:
            return
        if not path.exists():
            result = run_cell(cell, seed, bench, folder)
            save_text(json.dumps(finite(result)), path)
            say(run, f"{cell.label}, seed {seed}: {result['seconds']:.0f} s")
            for state in folder.rglob("*.pt"):
                state.unlink()


def study(config, tables, device, run, workers):
    """--action study: every cell of the tables that is not there yet; then study.json, study.md and study.png."""
    for table in tables:
        if table not in TABLES:
            raise ValueError(f"--tables {table}: no such table{nearest(table, TABLES)}")
    cells = {table: study_cells(table, config) for table in tables}
    jobs = [(cell, *job) for own in cells.values() for cell in own for job in keys_of_cell(cell, config).items()]
    people = workers.in_turn(lambda: load_people(config))
    for seconds in {cell.seconds for cell, *_ in jobs}:  # refuses what it must before anything is written
        study_splits(people, config, seconds)
    run.mkdir(parents=True, exist_ok=True)
    with claimed(run) if workers.rank == 0 else contextlib.nullcontext():
        if jobs:
            trained = workers.ask(None, lambda _: starting_point(config, people, device, run))
            bench = make_bench(config, people, trained, device)
        for cell, key, seed in tqdm(jobs, "cells"):
            finish_cell(key, cell, seed, bench, run)
        workers.ask(None, lambda _: write_study(cells, config, run))


def write_study(cells, config, run):
    """study.json, study.md and study.png of cells that are there, beside tables of earlier calls; and the config."""
    save_text(yaml.safe_dump(config, sort_keys=False), run / "config.yaml")
    path, tables = run / "study.json", {}
    for table, own in cells.items():
        paths = {cell.label: [run / "cells" / f"{key}.json" for key in keys_of_cell(cell, config)] for cell in own}
        found = {label: [json.loads(path.read_text()) for path in seeds] for label, seeds in paths.items()}
        tables[table] = [study_row(table, cell, found, config) for cell in own] or communication_rows(config)
    tables = (json.loads(path.read_text()) if path.exists() else {}) | finite(tables)
    save_text(json.dumps(tables, indent=1), path)
    save_text(study_text(tables, config), run / "study.md")
    if panels := study_panels(tables):
        draw_curves(panels, run / "study.png")
    print(study_text(tables, config))


def by_person(results, metric, people):
    """A metric [seeds, people], each the mean over a person's test clips; None where one has no value."""
    values = [[r["people"][name].get(metric) for name in people] for r in results]
    return np.array([[np.mean(v) for v in row] for row in values]) if all(v for row in values for v in row) else None


def study_row(table, cell, found, config):
    """Each metric's mean; its difference, pair by pair (same seed, same clips), to the rows that this one is held
    against, and the loss also as a ratio; and what else the table asks for."""
    mine, row = found[cell.label], {"label": cell.label, "metrics": {}, "versus": {}}
    for metric in STUDY_METRICS:
        values = by_person(mine, metric, mine[0]["people"])
        if values is not None:
            row["metrics"][metric] = metrics.crossed_ci(values)
    for other in (label for label in cell.against if label in found and label != cell.label):
        versus = row["versus"].setdefault(other, {})
        both = [name for name in mine[0]["people"] if name in found[other][0]["people"]]
        for metric in row["metrics"]:
            a, b = (by_person(results, metric, both) for results in (mine, found[other]))
            if a is not None and b is not None:
                versus[metric] = metrics.crossed_ci(a - b)
            if metric == "validation_loss":
                versus["loss ratio"] = metrics.crossed_ci(a / b)
    return row | {"also": table_columns(table, cell, mine, settings_of_cell(cell, config["seed"], config))}


def table_columns(table, cell, mine, settings):
    """The columns of one table only: what a cell spent, sent or took; whether its reliabilities tell good from bad."""
    p, f = settings["privacy"], settings["fed"]
    if table == "privacy" and p["enabled"]:
        return privacy_columns(settings, mine[0]["epsilon"])
    if table == "participation":
        epsilon = privacy.compute_epsilon(f["sample_rate"], p["noise_multiplier"], f["rounds"], p["delta"])
        return {"clients a round": f["sample_rate"] * settings["data"]["clients"],
                f"epsilon if z = {p['noise_multiplier']:g}": epsilon}
    if table == "rank":
        return {"rank": settings["lora"]["rank"]} | byte_columns(settings, mine[0]["parameters"])
    if table == "reliability" and mine[0]["reliability"]:
        return reliability_columns(mine)
    if table == "personalization" and cell.work == "personal":
        longest = max(r["training_seconds"] for r in mine)  # one that was cut off took less the second time
        return {"parameters": mine[0]["parameters"], "seconds of training": longest}
    return {}


def privacy_columns(settings, epsilon, audit_length=8192):
    """Epsilon of the run, and of larger federations: at the same z with as large a cohort, or with as much noise on the
    mean. Then that of one round and what canaries measure of it, in updates of `audit_length`: the noise on each number
    is the same as in longer ones."""
    p, f, n = settings["privacy"], settings["fed"], settings["data"]["clients"]
    z, rounds = p["noise_multiplier"], f["rounds"]
    columns = {"z": z, f"epsilon, {n} clients": epsilon}
    for many in (1000, 10000):
        few = min(1.0, f["sample_rate"] * n / many)
        columns[f"{many:,} clients, same cohort"] = privacy.compute_epsilon(few, z, rounds, p["delta"])
        columns[f"{many:,} clients, same noise on the mean"] = privacy.compute_epsilon(
            f["sample_rate"], z * many / n, rounds, p["delta"])
    found = privacy.canary_audit(make_mechanism(settings, audit_length), p["delta"])
    measured = {"mean": found["measured_epsilon"], "ci95": [found["epsilon_lower_bound"], found["epsilon_upper_bound"]]}
    return columns | {"epsilon of one round": found["accounted_epsilon"], "as canaries measure it (99 %)": measured}


def reliability_columns(mine):
    """How well r and its parts tell good clients from bad ones, over the rounds; and the mean r by fault."""
    columns = {}
    for part in (part for part in RELIABILITY if part in mine[0]["reliability"][0]):
        sides = [[[c[part] for c in r["reliability"] if bool(c["fault"]) == bad] for bad in (0, 1)] for r in mine]
        if all(good and bad for good, bad in sides):
            columns[f"AUC of {part}"] = metrics.crossed_ci([[metrics.auc(good, bad)] for good, bad in sides])
    for fault in (None, "shifted sound", "flicker", "noise"):
        found = [c["reliability"] for r in mine for c in r["reliability"] if c["fault"] == fault]
        columns |= {f"mean r, {fault or 'good'}": float(np.mean(found))} if found else {}
    return columns


def byte_columns(settings, length):
    """What a client sends and is sent in a round; the keys and shares of secure aggregation come on top."""
    secure = make_mechanism(settings | {"privacy": settings["privacy"] | {"enabled": True}}, length)
    return {"parameters": length, "bytes down": 4 * length, "bytes up, plain": 4 * (length + 1),
            "bytes up, secure": secure.num_bytes}


def communication_rows(config):
    """Bytes of adapters of every rank, of B alone, of the UNet, and of the whole model."""
    whole, own, lengths = sum(p.numel() for p in build_model(config).parameters()), config["lora"], {}
    changes = {f"rank {rank}": {"rank": rank} for rank in config["study"]["ranks"]}
    changes |= {f"rank {own['rank']}, B only": {"freeze_a": True}, "whole UNet, no LoRA": {"targets": []}}
    for label, change in changes.items():
        model = build_model(config).requires_grad_(False)
        add_adapters(model, config | {"lora": own | change})
        lengths[label] = len(lora.adapter_vector(model))
    lengths["whole model"] = whole
    return [{"label": label, "metrics": {}, "versus": {}, "also": byte_columns(config, n) | {"of the model": n / whole}}
            for label, n in lengths.items()]


def study_text(tables, config):
    """study.json as Markdown."""
    e, s, d = config["evaluate"], config["study"], config["data"]
    lines = ["# The study", "", (
        f"{s['seeds']} seeds, {d['clients']} clients, {e['clips_per_client']} test clips of {e['num_frames']} frames "
        "each; mean [95 % interval] over people and seeds (`metrics.crossed_ci`). Differences are taken pair by pair: "
        "same seed, same clips.")]
    for table, rows in tables.items():
        lines += ["", f"## {table}", *markdown({row["label"]: row["metrics"] | row["also"] for row in rows})]
        for other in dict.fromkeys(other for row in rows for other in row["versus"]):
            lines += ["", f"minus {other}:"]
            lines += markdown({row["label"]: row["versus"][other] for row in rows if other in row["versus"]})
    return "\n".join(lines) + "\n"


def markdown(rows):
    """{label: {column: value}} as the lines of a table."""
    def text(value):
        if isinstance(value, dict):
            return text(value["mean"]) + (f" [{', '.join(map(text, value['ci95']))}]" if value["ci95"] else "")
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"

    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return ["", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
            *(f"| {label} | " + " | ".join(text(row.get(c)) for c in columns) + " |" for label, row in rows.items())]


def study_panels(tables):
    """Epsilon and quality, own video and identity, rank, quality and bytes, as `draw_curves` takes them."""
    panels, loss = {}, lambda row: row["metrics"]["validation_loss"]["mean"]
    for row in tables.get("privacy", [])[1:]:
        lines = panels.setdefault("validation loss by log10 epsilon", {})
        for name in (name for name in row["also"] if name.endswith((" clients", "on the mean"))):
            label = name.removeprefix("epsilon, ").split(", same")[0]
            lines.setdefault(label, []).append((math.log10(row["also"][name]), loss(row)))
    for row in tables.get("personalization", []):
        seconds, _, steps = row["label"].partition(" s, ")
        if steps.endswith(" steps"):
            for metric in ("id_similarity*", "validation_loss"):
                lines = panels.setdefault(f"{metric} by seconds of own video", {})
                lines.setdefault(steps, []).append((float(seconds), row["metrics"][metric]["mean"]))
    for row in tables.get("rank", []):
        rank, sent = math.log2(row["also"]["rank"]), row["also"]
        panels.setdefault("validation loss by log2 rank", {}).setdefault("without DP", []).append((rank, loss(row)))
        lines = panels.setdefault("kilobytes up by log2 rank", {})
        lines.setdefault("secure", []).append((rank, sent["bytes up, secure"] / 1000))
    return panels


# ---------------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="config.yaml", help="YAML file; what it leaves out has the default")
    parser.add_argument("--preset", nargs="*", default=[], help="named sets of overrides from the config's `presets`")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="single overrides, e.g. fed.rounds=20")
    parser.add_argument("--gpus", help="a worker on each: CUDA indices such as 0,1, or cpu, or cpu:2; left out: every "
                                       "GPU there is, else cpu:2")
    parser.add_argument("--resume", metavar="RUN", help="go on in this run directory, with its own config")
    parser.add_argument("--action", default="train",
                        choices=["train", "evaluate", "generate", "personalize", "study", "audit", "dry-run"])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), metavar="TABLE", help="study: which of its tables")
    parser.add_argument("--reference", nargs="+", help="generate: a picture of a face, or several; the first one moves")
    parser.add_argument("--speech", help="generate: a sound or video file")
    parser.add_argument("--prompt", default="", help="generate: expression in a few words, such as smiling")
    parser.add_argument("--seconds", type=positive, help="generate: at most this much of the speech")
    parser.add_argument("--steps", type=int, choices=range(1, 1001), metavar="1..1000",
                        help="generate: solver steps; left out: sampling.num_steps")
    parser.add_argument("--seed", type=int, help="generate: of the noise; left out: the config's")
    for name in talking.CONDITIONS:
        parser.add_argument(f"--{name}-scale", type=float, default=1.0, help=f"generate: weight of {name}; 0 leaves it out")
    parser.add_argument("--no-watermark", action="store_true", help="generate: without the letters AI in the corner")
    parser.add_argument("--adapter", help="generate: personal/<client>.pt of the person")
    parser.add_argument("--clips", help="personalize: a folder of videos of one person")
    parser.add_argument("--output", help="generate: the video to write (talk.mp4); personalize: the adapter (me.pt)")
    return parser.parse_args(argv)


def positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def act(args, config, devices, workers):
    """Do what the command line asks for, in this process."""
    device = torch.device(devices[int(os.environ.get("LOCAL_RANK", 0)) % len(devices)])
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config["runtime"]["threads"] or max(1, os.cpu_count() // neighbours))
    if args.action == "generate":
        return speak(args, config, device)
    if args.action == "personalize":
        return personalize_own(args, config, device)
    if args.action == "dry-run":
        return dry_run(config, device)
    if args.action in ("evaluate", "audit") and not args.resume:
        raise ValueError(f"--action {args.action}: give the run with --resume runs/NAME")
    if args.action == "audit":
        return audit(config, device, Path(args.resume))
    title = "study" if args.action == "study" else config["name"]
    name = f"{config['runtime']['directory']}/{time.strftime('%Y%m%d-%H%M%S')}-{title}"
    run = workers.ask(None, lambda _: Path(args.resume or name))
    study(config, args.tables, device, run, workers) if args.action == "study" else train(config, device, run, workers)


def launch(argv, num_workers):
    """One process a device, which find each other as under torchrun; a worker that dies ends the run with one line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it says whom it ends with the others
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # while they start, for them: `worker` heeds it
    try:
        context = torch.multiprocessing.start_processes(worker, (argv, num_workers, port), num_workers, join=False,
                                                        daemon=True, start_method="spawn")
        signal.signal(signal.SIGINT, interrupt)
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name:
            raise ValueError(f"worker {error.error_index} was ended by {error.signal_name}: go on with --resume") from None
        sys.exit(error.exit_code)


def worker(rank, argv, num_workers, port):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an end without words: `launch` has them
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which outlives who is killed
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers),
                   "LOCAL_WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(argv)


def main(argv=None):
    args, rank, size = parse(argv), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        devices = choose_devices(args.gpus)
        config = load_config(Path(args.resume) / "config.yaml" if args.resume else args.config, args.preset, args.set)
        settings_of(config, None, {})  # refuses what does not go together
        if size == 1 and len(devices) > 1 and args.action in ("train", "evaluate", "study"):
            return launch(sys.argv[1:] if argv is None else argv, len(devices))
        if size > 1:  # workers wait for each other as long as it takes to train a backbone
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        if rank > 0:  # one process's bars are enough; TQDM_DISABLE would be read at import only
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        act(args, config, devices, fed.Workers())
        if size > 1:
            torch.distributed.destroy_process_group()
    except (ValueError, FileNotFoundError, ConnectionError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if rank == 0 or isinstance(error, ConnectionError):  # else the first met the same error
            print(f"error: {str(error) or 'interrupted: go on with --resume'}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
