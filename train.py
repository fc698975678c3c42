"""Train, evaluate and use PrivFedTalk: `python train.py --config config.yaml`. See README.md."""

import argparse
import ast
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import reprlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
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
MAX_RANK = 16  # directions of each layer that backbone.pt keeps (lora.leading_directions)
SAVE_EVERY = 100  # steps of the backbone between two partial checkpoints
CHECKPOINT_VERSION = 2  # raise it with every change that would misread older files


# ---------------------------------------------------------------- configuration

# Keys that may differ when a run is resumed. Whatever depends on them is made again, except
# finished rounds, whose reliabilities used the sampling settings of that time.
RESUMABLE = (
    "name",
    "data.root",  # of the same people, see check_people
    "fed.rounds",
    "personal",
    "sampling",
    "evaluate",
    "weights",
    "runtime",
)
NO_TRAINING = "--action evaluate trains nothing: continue with --resume alone"
# Least and greatest value. Other numbers lie in 0 ... 1e9.
RANGES = {
    "data.size": (32, 1024),
    "data.crop": (0.1, 1),
    "data.clients": (2, 100_000),
    "model.autoencoder_channels": (8, 4096),
    "model.channels": (8, 4096),
    "model.speech_dropout": (0, 0.9),
    "backbone.judge_steps": (1, 1e9),
    "backbone.steps": (1, 1e9),
    "backbone.batch_size": (1, 1024),
    "backbone.num_frames": (fed.JUDGED_FRAMES, 250),
    "lora.rank": (1, 256),
    "fed.rounds": (0, 1e5),
    "fed.sample_rate": (1e-6, 1),
    "fed.batch_size": (1, 1024),
    "fed.reliability_alpha": (0, 1),
    "fed.sample_cap": (1, 1e9),
    "fed.dropout_rate": (0, 0.9),
    "privacy.clip_norm": (1e-6, 1e6),
    "privacy.seed": (-1, 1e9),
    "personal.clients": (1, 100_000),
    "personal.rank": (1, 256),
    "personal.batch_size": (1, 1024),
    "sampling.num_steps": (1, 1000),
    "sampling.guidance": (0, 100),
    "sampling.window": (2 * talking.KNOWN_FRAMES, 1000),
    "evaluate.num_frames": (6, 1e9),  # two windows of the sync judges
}
CHOICES = {
    "fed.algorithm": ("isfa", "scaffold", "centralized"),
    "lora.train": lora.TRAIN_CHOICES,
    "personal.train": lora.TRAIN_CHOICES,
}


def load_config(path, presets=(), overrides=()):
    """Return the defaults, changed by the file at `path`, then by presets, then by `key=value`
    overrides.

    Raises ValueError with a sentence that names what is wrong and the nearest right name.
    """
    config = read_yaml(DEFAULTS)
    known_presets = config.pop("presets")
    own = read_yaml(path)
    own_presets = own.pop("presets", {})
    if not isinstance(own_presets, dict):
        raise ValueError(f"{path}: presets is a section of names and settings")
    known_presets |= {str(name): changes for name, changes in own_presets.items()}
    merge(config, own, str(path))
    for name in presets:
        if name not in known_presets:
            raise ValueError(f"--preset {name}: no such preset{nearest(name, known_presets)}")
        merge(config, known_presets[name], f"preset {name}")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write key=value")
        if re.search(r"\s#", value) and value[0] not in "'\"":  # a comment of YAML
            raise ValueError(f"--set {key}: ' #' begins a comment: put quotes around the value")
        nested = parse_yaml(value, f"--set {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(config, nested, "--set")
    check_config(config)
    return config


def read_yaml(path):
    """Return the dict in a YAML file; raises ValueError if there is none."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values")
    return content


class YamlLoader(yaml.SafeLoader):
    """Loader that refuses a key that is twice in a section (PyYAML would drop the first), and
    numbers that YAML 1.1 reads in another way than people do.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        if len({str(key.value) for key, _ in node.value}) < len(node.value):
            raise ValueError(f"one key stands twice in a section{node.start_mark}")
        return node

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        # YAML 1.1 takes 010 for 8 and 1:30 for 90.
        if node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0\d|.*:", node.value):
            raise ValueError(f"{node.value} is no decimal number{node.start_mark}")
        return node


def parse_yaml(text, where):
    """Return the content of a YAML text; raises ValueError if it is not valid."""
    try:
        return yaml.load(text, YamlLoader)
    except Exception as error:  # PyYAML raises many kinds, such as KeyError and RecursionError
        raise ValueError(f"{where} is not valid YAML: {error}") from None


def nearest(name, names):
    """Return a hint at the most similar of `names`, or at all of them."""
    similar = difflib.get_close_matches(name, names, 1, 0.4)
    return f"; did you mean {similar[0]!r}?" if similar else f"; known: {', '.join(names)}"


def merge(config, changes, where, prefix=""):
    """Write `changes` over `config`, in place; every key has to exist and to keep its type."""
    if not isinstance(changes, dict):
        section = prefix.rstrip(".") or "it"
        raise ValueError(f"{where}: {section} is a section: set one of {', '.join(config)}")
    for key, value in changes.items():
        name = prefix + str(key)
        if key not in config:
            raise ValueError(f"{where}: no key {name!r}{nearest(str(key), config)}")
        if isinstance(config[key], dict):
            merge(config[key], value, where, name + ".")
        else:
            config[key] = convert(value, config[key], name, where)


def convert(value, default, name, where):
    """Return the value of key `name` in the type of its default.

    Raises ValueError for another type, a number out of RANGES, or an unknown choice.
    """
    if isinstance(default, float) and type(value) in (int, str):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # also of 1e-3, which YAML 1.1 reads as a word
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        raise ValueError(f"{where}: {name} must be {kind}, not {reprlib.repr(value)}")
    if isinstance(default, list):
        if not 1 <= len(value) <= 8:
            raise ValueError(f"{where}: {name} must have 1 to 8 numbers, not {len(value)}")
        return [convert(item, default[0], name, where) for item in value]
    if isinstance(default, (int, float)):
        least, most = RANGES.get(name, (0, 1e9))
        if not least <= value <= most:
            raise ValueError(f"{where}: {name} must lie in {least:g} ... {most:g}, not {value}")
    if name in CHOICES and value not in CHOICES[name]:
        choices = ", ".join(CHOICES[name])
        raise ValueError(f"{where}: {name} must be one of {choices}, not {value!r}")
    return value


def check_config(config):
    """Raise ValueError for settings that do not fit together; the model is built on torch's meta
    device, where its weights need no memory.
    """
    f = config["fed"]
    p = config["privacy"]
    name = config["name"]
    if Path(name).name != name or not name.isprintable() or len(name.encode()) > 200:
        raise ValueError(f"name becomes the end of a folder's name, not {reprlib.repr(name)}")
    if f["algorithm"] == "scaffold" and (f["gamma"] or f["sample_cap"] > 1 or f["proximal"]):
        raise ValueError("fed.algorithm scaffold needs fed.gamma=0, sample_cap=1 and proximal=0")
    if f["algorithm"] == "centralized":  # one participant with the clips of all clients
        if p["enabled"]:
            raise ValueError("fed.algorithm centralized pools the clips: set privacy.enabled=false")
        if f["gamma"] or f["dropout_rate"] or f["sample_rate"] < 1:
            raise ValueError(
                "fed.algorithm centralized needs fed.gamma=0, dropout_rate=0 and sample_rate=1"
            )
    if config["data"]["find_faces"] and not config["backbone"]["finder_steps"]:
        raise ValueError("data.find_faces needs a face finder: set backbone.finder_steps above 0")
    if p["target_epsilon"] and p["noise_multiplier"]:
        raise ValueError("privacy.target_epsilon chooses the noise: set it or noise_multiplier 0")
    with torch.device("meta"):
        model = build_model(config).requires_grad_(False)
    model = add_adapter(config, model, None, "lora")
    for section in ("lora", "personal"):
        if config[section]["train"] != "AB" and config[section]["rank"] > MAX_RANK:
            raise ValueError(f"{section}.rank must be at most {MAX_RANK} where A is not trained")
    length = sum(p.numel() for p in lora.adapter_parameters(model))
    mechanism = make_mechanism(config, length)
    num_clients = config["data"]["clients"]
    privacy.check_delta(p["delta"], num_clients if mechanism else 1)
    cohort = f["sample_rate"] * num_clients
    survivors = round(cohort * (1 - f["dropout_rate"]))
    needed = max(2, mechanism.min_survivors(round(cohort))) if mechanism else 1
    if survivors < needed:
        raise ValueError(
            f"of a cohort of {cohort:g} clients, {needed} have to stay and {survivors} would: see "
            "fed.sample_rate, fed.dropout_rate, privacy.survivor_share and privacy.num_curious"
        )


def build_model(config):
    """Return an untrained TalkingHead of the configured sizes."""
    model = talking.TalkingHead(config["data"]["size"], **config["model"])
    return model.to(memory_format=torch.channels_last)  # faster convolutions on CPUs


def make_mechanism(config, length, participations=None):
    """Return the DP mechanism for adapters of `length` numbers, or None.

    privacy.target_epsilon, if set, determines the noise for a client in `participations` rounds; by
    default a number of rounds that hardly any client exceeds (`privacy.likely_participations`).
    """
    p = config["privacy"]
    f = config["fed"]
    if not p["enabled"]:
        return None
    noise_multiplier = p["noise_multiplier"]
    if p["target_epsilon"] and f["rounds"]:
        if participations is None:
            participations = privacy.likely_participations(
                config["data"]["clients"], f["sample_rate"], f["rounds"]
            )
        # Rate 1: the server knows the cohorts and gets no amplification by subsampling.
        noise_multiplier = privacy.find_noise_multiplier(
            p["target_epsilon"], p["delta"], 1.0, max(1, participations)
        )
    return privacy.Mechanism(
        clip_norm=p["clip_norm"],
        noise_multiplier=noise_multiplier,
        length=length * (2 if f["algorithm"] == "scaffold" else 1),
        num_clients=config["data"]["clients"],
        # In clip norms. So small a scale adds little to the sensitivity, but the noise on the sum
        # of weights is still small compared with the sum.
        weight_scale=0.3,
        min_weight=1.0,  # the noisy mean is never divided by less than one client of full weight
        survivor_share=p["survivor_share"],
        num_curious=p["num_curious"],
        seed=p["seed"] if p["seed"] >= 0 else None,
    )


def accounted_rate(f):
    """Return the sampling rate to account with: 1 for fixed cohorts, which are not amplified."""
    return 1.0 if f["fixed_cohorts"] else f["sample_rate"]


def draw_cohorts(config, sampling_key, num_clients, num_rounds):
    """Return the clients [[k]] of each of the first `num_rounds` rounds, drawn with the key."""
    f = config["fed"]
    key = bytes.fromhex(sampling_key)
    return [
        privacy.draw_cohort(num_clients, f["sample_rate"], key, i, f["fixed_cohorts"])
        for i in range(num_rounds)
    ]


def fixed_settings(config, prefix=""):
    """Return {name: value} of the settings that a resumed run may not change."""
    fixed = {}
    for key, value in config.items():
        name = prefix + key
        if name in RESUMABLE:
            continue
        if isinstance(value, dict):
            fixed |= fixed_settings(value, name + ".")
        else:
            fixed[name] = value
    return fixed


# ---------------------------------------------------------------- files


def checksum(state):
    """Return the SHA-256 of nested dicts and lists of tensors, numbers and strings."""
    digest = hashlib.sha256()

    def add(item):
        if torch.is_tensor(item):
            digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(item, dict):
            for key, value in item.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(item, (list, tuple)):
            digest.update(repr(len(item)).encode())
            for value in item:
                add(value)
        else:
            digest.update(repr(item).encode())

    add(state)
    return digest.hexdigest()


def save_checkpoint(path, kind, state):
    """Write a checkpoint {"kind", "version", "state", "checksum"}, whole or not at all."""
    content = {"kind": kind, "version": CHECKPOINT_VERSION, "state": state}
    data.write_tensors(path, content | {"checksum": checksum(state)})


def load_checkpoint(path, kind):
    """Return the state in a checkpoint of this kind; raises ValueError for a missing, foreign or
    damaged file.
    """
    # A global adapter cannot be made again without loss: it holds what was spent.
    advice = "" if kind == "global adapter" else "; delete it, if it can be made again"
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__}){advice}") from None
    if not isinstance(content, dict) or not {"kind", "state", "checksum"} <= set(content):
        raise ValueError(f"{path}: not a checkpoint of PrivFedTalk")
    if content["kind"] != kind:
        raise ValueError(f"{path}: holds a {content['kind']}, not a {kind}")
    if content.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path}: was made by another version of this code")
    if content["checksum"] != checksum(content["state"]):
        raise ValueError(f"{path}: damaged, its checksum does not match{advice}")
    return content["state"]


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with data.atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def finite(tree):
    """Return nested dicts and lists with None in place of infinity and NaN, which JSON lacks."""
    return json.loads(json.dumps(tree), parse_constant=lambda name: None)


def log(run, text):
    """Print a line, without breaking progress bars, and append it to log.txt."""
    tqdm.write(text)
    with open(run / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@contextlib.contextmanager
def run_lock(folder, wait=False):
    """Hold the folder's lock while the block runs; if another process has it, wait for that one or
    raise ValueError.

    Half-written files of processes that were killed there are deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(f"{folder}: another process is at work there") from None
            print(f"{folder}: waiting for another process that is at work there")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{folder}: its file system cannot lock files ({error.strerror}): choose another "
                "runtime.directory"
            ) from None
        for path in folder.rglob(".*"):
            if re.fullmatch(r"\.[0-9a-f]{16}(\.\w+)?", path.name):  # of data.atomic_write
                path.unlink()
        yield


# ---------------------------------------------------------------- pretraining on public people


def learning_rate(step, num_steps, lr):
    """Return the learning rate of a step: a cosine from `lr` to zero over all steps, times a linear
    warm-up over the first 50.
    """
    return lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def make_optimizer(parameters):
    """Return AdamW for training from scratch; `optimizer_step` sets its rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def optimizer_step(optimizer, lr):
    """Clip gradients to norm 1, step at `lr`, zero the gradients."""
    optimizer.param_groups[0]["lr"] = lr
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def sample_frames(public, num_frames, generator):
    """Return single public frames [n 3 H W] in [-1, 1], zoomed, shifted and lit at random
    (`data.augment`).
    """
    frames = data.sample_batch(public, num_frames, 1, generator)["frames"]  # n 1 3 H W
    # views of half the range that the judges are trained on
    view = torch.rand(num_frames, len(data.VIEW_NAMES), generator=generator) - 0.5
    # Heads are upright, and blur and noise are not to be learned.
    for name in ("roll", "degradation"):
        view[:, data.VIEW_NAMES.index(name)] = 0
    return 2 * data.augment(data.to_unit(frames), view, generator)[:, 0] - 1


def warp_error(config, public, num_cells, generator):
    """Return the squared error [1 1 H W] of a warped reference picture, by place, relative to its
    mean over places: the median over public frames, in num_cells x num_cells cells, interpolated.
    """
    batch = data.sample_batch(public, 256, 1, generator, **training_views(config))
    frames = batch["frames"][:, 0]  # n 3 H W
    flow = talking.estimate_flow(batch["reference"], frames, num_cells)
    square = (frames - talking.warp(batch["reference"], flow)).square()  # n 3 H W
    # The median: few pictures whose pose or background changed would outweigh all mouths.
    cells = F.adaptive_avg_pool2d(square, num_cells).mean(1).median(0).values  # h w
    cells = cells / cells.mean().clamp(min=1e-9)  # still pictures have no error
    return F.interpolate(cells[None, None], frames.shape[2:], mode="bilinear")


def train_autoencoder(config, public, device):
    """Return the state of an AutoencoderKL trained on public frames: L1 + L2 + a small KL. Half of
    the weight of L1 and L2 lies where the warp fails, as there a frame is what the decoder paints.
    """
    settings = config["backbone"]
    torch.manual_seed(config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    channels = config["model"]["autoencoder_channels"]
    autoencoder = talking.AutoencoderKL(talking.LATENT_CHANNELS, channels)
    autoencoder.to(device, memory_format=torch.channels_last)
    autoencoder.init_linear_path(sample_frames(public, 512, generator).to(device))
    num_cells = config["data"]["size"] // autoencoder.factor
    weights = 0.5 + 0.5 * warp_error(config, public, num_cells, generator).to(device)  # 1 1 H W
    optimizer = make_optimizer(autoencoder.parameters())
    bar = tqdm(range(settings["autoencoder_steps"]), "autoencoder", mininterval=1)
    for step in bar:
        frames = sample_frames(public, 24, generator).to(device)
        mean, log_variance = autoencoder.moments(frames)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        error = autoencoder.decode(mean + noise * (log_variance / 2).exp()) - frames
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = (weights * (error.abs() + error.square())).mean() + 1e-4 * kl
        loss.backward()
        optimizer_step(optimizer, learning_rate(step, len(bar), settings["lr"]))
        if step % 10 == 0:
            bar.set_postfix(
                psnr=f"{10 * math.log10(4 / float(error.detach().square().mean())):.1f} dB"
            )
    return autoencoder.state_dict()


def train_speech_path(model, batches, num_steps, lr):
    """Train the speech encoder and the UNet's direct path on `TalkingHead.speech_loss`."""
    parts = (
        model.speech_encoder,
        model.unet.time_mlp,
        model.unet.speech_in,
        model.unet.text_in,
        model.unet.speech_out,
    )
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = make_optimizer(parameters)
    for step in tqdm(range(num_steps), "speech", mininterval=1):
        model.speech_loss(batches[step % len(batches)]).mean().backward()
        optimizer_step(optimizer, learning_rate(step, num_steps, lr))


def train_unet(config, autoencoder, public, device, partial):
    """Return the state of a TalkingHead trained on public people and its loss by step.

    Every SAVE_EVERY steps the whole state is written to the file `partial`, from which an
    interrupted run continues.
    """
    settings = config["backbone"]
    seed = config["seed"]
    num_steps = settings["steps"]
    clips = [clip for own in public.values() for clip in own]
    views = training_views(config)
    torch.manual_seed(seed)
    model = build_model(config).to(device)
    model.autoencoder.load_state_dict(autoencoder)
    model.autoencoder.requires_grad_(False)
    model.text_encoder.learn_words(clip.prompt for clip in clips)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)
    losses = []
    if partial.exists():
        state = load_checkpoint(partial, "partial backbone")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    else:
        num_frames = min(24, min(clip.num_frames for clip in clips))
        windows = fed.Batches(model, public, 32, num_frames, seed, views)
        # The statistics use at most eight of these batches, the speech path all: it needs more.
        num_batches = min(40, 1 + num_steps // 100)
        batches = [windows[i] for i in tqdm(range(num_batches), "statistics", mininterval=1)]
        names = ("motion", "reference_latents", "mel", "liveliness")
        model.fit_statistics(*(torch.cat([batch[name] for batch in batches[:8]]) for name in names))
        train_speech_path(model, batches, num_steps // 10, settings["lr"])
    if settings["compile"] and device.type == "cuda":
        # with CUDA graphs, as a step of small operations waits for kernel launches (gpu.md)
        model.unet.compile(mode="reduce-overhead")
    step_kwargs = backward_kwargs(config, device, judged=False)
    first = len(losses)
    size = settings["batch_size"], settings["num_frames"]
    batches = fed.Batches(model, public, *size, seed, views)
    bar = tqdm(batches.loader(first, num_steps), "backbone", initial=first, total=num_steps)
    generator = torch.Generator()
    for step, batch in enumerate(bar, first):
        # Noise and dropout are seeded by the step, to be the same after an interruption. The seed
        # differs from the batch's, or one random number would choose its first person and its t.
        step_seed = fed.derive_seed(seed, step, 1)
        torch.manual_seed(step_seed)
        generator.manual_seed(step_seed)
        terms = fed.backward(model, None, batch, generator=generator, **step_kwargs)
        optimizer_step(optimizer, learning_rate(step, num_steps, settings["lr"]))
        losses.append(terms["diffusion"])
        if step % 10 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            }
            save_checkpoint(partial, "partial backbone", state)
    return model.state_dict(), losses


def backward_kwargs(config, device, judged):
    """Return the keyword arguments of `fed.backward`: if `judged` for Eq. 12, as on clients, else
    for L_diff alone.
    """
    weights = config["loss"] if judged else dict.fromkeys(config["loss"], 0.0)
    bf16 = device.type == "cuda"
    return {"loss_weights": weights, "micro_batch": config["runtime"]["micro_batch"], "bf16": bf16}


def training_views(config):
    """Return the keyword arguments same_clip and mirror of `fed.sample_batch` for public clips."""
    in_the_wild = config["data"]["in_the_wild"]
    return {"same_clip": in_the_wild, "mirror": in_the_wild}


def find_directions(config, model, public, num_people=48):
    """Return the directions of the adapters (`lora.leading_directions`): those in which the trained
    model's loss on public people falls fastest, measured on one batch of each person.
    """
    generator = torch.Generator().manual_seed(config["seed"])
    views = training_views(config)
    step_kwargs = backward_kwargs(config, model.motion_std.device, judged=False)
    model.requires_grad_(True)
    moments = {}
    for name, own in tqdm(list(public.items())[:num_people], "directions", mininterval=1):
        size = min(8, 4 * len(own)), config["backbone"]["num_frames"]
        batch = fed.sample_batch(model, {name: own}, *size, generator, **views)
        fed.backward(model, None, batch, generator=generator, **step_kwargs)
        lora.add_gradient_moments(model.unet, moments)
    return lora.leading_directions(model.unet, moments, MAX_RANK)


def public_unexplained(model, public, num_people=48):
    """Return the greatest share of a public clip's motion that the linear denoiser leaves
    unexplained, or None without a clip to measure.

    The second clips of at most `num_people` people are measured, with reference pictures of their
    first. The UNet is left out: it was trained on these clips and explains them too well.
    """
    shares = []
    for first, *others in list(public.values())[:num_people]:
        if others:
            batch = fed.fixed_batch(model, others[:1], [first], 50)
            share = fed.unexplained_variance(model, batch, 0, use_unet=False).mean()
            shares.append(float(share))
    return max(shares, default=None)


@functools.cache
def source_code(*roots, unused=()):
    """Return the code of functions (module, name) and of all functions, classes and constants of
    this project that they use, without comments, docstrings and the functions `unused`.
    """
    modules = {"train": sys.modules[__name__], "data": data, "fed": fed}
    modules |= {"lora": lora, "metrics": metrics, "model": talking}
    defined = {}  # (module, name) -> node
    for module, own in modules.items():
        for node in ast.parse(inspect.getsource(own)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[module, node.name] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    defined[module, ast.unparse(target)] = node
    code = dict.fromkeys(unused, "")  # as if read already
    todo = list(roots)
    while todo:
        module, name = todo.pop()
        if (module, name) in code or (module, name) not in defined:
            continue
        tree = defined[module, name]
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                node.body.pop(0)
            if isinstance(node, ast.Name):
                todo.append((module, node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = getattr(modules[module], node.value.id, None)
                if inspect.ismodule(owner):
                    todo.append((owner.__name__, node.attr))
        code[module, name] = ast.dump(tree)
    return "".join(code[key] for key in sorted(code))


def backbone_key(config, public):
    """Return a hash of all that a backbone depends on: settings, public clips, and the code that
    trains it.
    """
    settings = [config[name] for name in ("seed", "model", "backbone")]
    settings += [config["data"][name] for name in ("size", "crop", "in_the_wild")]
    clips = []
    for own in public.values():
        for clip in own:
            opening = data.digest(None if clip.opening is None else clip.opening.tobytes())
            clips.append((clip.person, clip.name, clip.fingerprint, clip.prompt, opening))
    # A new term of Eq. 9-11 makes no new backbone, which is trained without them.
    judged = ("fed", "auxiliary_losses")
    code = source_code(("train", "pretrain"), ("data", "log_mel"), unused=(judged,))
    return data.digest([settings, data.CACHE_VERSION, clips, code])


def load_or_pretrain(config, public, run, device, workers):
    """Return the backbone's state: judges, model, directions of the adapters; the run's own, a
    cached one, or a new one.

    Only rank 0 reads and writes files.
    """
    own = run / "backbone.pt"
    runs = Path(os.path.abspath(run)).parent  # also of "."
    cache = runs / "backbones" / backbone_key(config, public)
    # A cached backbone is read without a lock, which would need a writable folder.
    if not workers.broadcast(own.exists() or (cache / "backbone.pt").exists()):
        lock = run_lock(cache, wait=True) if workers.rank == 0 else contextlib.nullcontext()
        try:
            with lock:  # another run may be making the same backbone
                if not workers.broadcast((cache / "backbone.pt").exists()):
                    pretrain(config, public, cache, device, workers)
        except torch.linalg.LinAlgError:  # of numbers that are not finite
            raise ValueError("the backbone's training diverged: lower backbone.lr") from None
    backbone = None
    if workers.rank == 0:
        if not own.exists():
            save_checkpoint(own, "backbone", load_checkpoint(cache / "backbone.pt", "backbone"))
        backbone = load_checkpoint(own, "backbone")
    return workers.broadcast(backbone)


def pretrain(config, public, cache, device, workers):
    """Train autoencoder, UNet, judges and face finder into cache/backbone.pt.

    Rank 0 trains the autoencoder and the UNet, which takes longest; the small networks are shared
    out among the other processes, if any. For the case of an interruption, networks that rank 0 has
    finished stay in the cache until all are finished.
    """
    clips = [clip for own in public.values() for clip in own]
    for_losses, for_tables = metrics.split_for_judges(public, config["seed"])
    b = config["backbone"]
    # `Workers.assign` gives the costliest to rank 0.
    costs = {"UNet": 10.0, "loss judges": 1.0, "table judges": 1.0, "face finder": 1.0}
    finished = {}
    if workers.rank == 0:
        cache.mkdir(parents=True, exist_ok=True)
        paths = {name: cache / f"{name}.pt" for name in costs}
        finished = {n: load_checkpoint(path, n) for n, path in paths.items() if path.exists()}
    missing = workers.broadcast([name for name in costs if name not in finished])
    for i in workers.assign([costs[name] for name in missing]):
        name = missing[i]
        started = time.perf_counter()
        if name == "UNet":
            path = cache / "autoencoder.pt"
            if not path.exists():
                save_checkpoint(path, "autoencoder", train_autoencoder(config, public, device))
            autoencoder = load_checkpoint(path, "autoencoder")
            partial = cache / "partial.pt"
            trained = train_unet(config, autoencoder, public, device, partial)
        elif name == "face finder":
            finder = metrics.train_finder(public, b["finder_steps"], config["seed"])
            trained = finder.state_dict()
        else:
            people = for_losses if name == "loss judges" else for_tables
            judges = metrics.train_judges(people, b["judge_steps"], config["seed"], device=device)
            trained = judges.state_dict()
        finished[name] = {"trained": trained, "seconds": time.perf_counter() - started}
        if workers.rank == 0:
            save_checkpoint(paths[name], name, finished[name])
    finished = workers.merge(finished)
    trained = {name: content["trained"] for name, content in finished.items()}
    state, losses = trained["UNet"]
    backbone = {
        "model": state,
        "losses": losses,
        "finder": trained["face finder"],
        "judges": {kind: trained[f"{kind} judges"] for kind in ("loss", "table")},
        "seconds": {name: round(content["seconds"], 1) for name, content in finished.items()},
    }
    model, judges = restore_backbone(config, backbone, device)
    backbone["public_jitter"] = metrics.mean_jitter(clips)
    measured = {}
    own = workers.assign([2.0, 1.0])  # directions, which take longer, and limits
    if 0 in own:
        measured["directions"] = find_directions(config, model, public)
    if 1 in own:  # beyond these limits personalize warns of a stranger, or of clips without a face
        measured["identity_threshold"] = metrics.identity_threshold(judges["loss"], for_tables)
        measured["public_unexplained"] = public_unexplained(model, public)
    backbone |= workers.merge(measured)
    if workers.rank > 0:
        return
    save_checkpoint(cache / "backbone.pt", "backbone", backbone)
    for name in (*costs, "autoencoder", "partial"):
        (cache / f"{name}.pt").unlink(missing_ok=True)


def restore_backbone(config, backbone, device):
    """Return the pretrained model and the two sets of judges {"loss", "table"}, frozen."""
    model = build_model(config).to(device)
    judges = {name: metrics.Judges().to(device) for name in backbone["judges"]}
    try:
        model.load_state_dict(backbone["model"])
        for name, state in backbone["judges"].items():
            judges[name].load_state_dict(state)
            judges[name].eval().requires_grad_(False)
    except RuntimeError:  # keys or shapes
        raise ValueError("the run's backbone.pt was made by another version of this code") from None
    return model.eval().requires_grad_(False), judges


def load_finder(config, backbone):
    """Return the backbone's face finder, or None if the config says that it was not trained."""
    if not config["backbone"]["finder_steps"]:
        return None
    finder = metrics.FaceFinder()
    finder.load_state_dict(backbone["finder"])
    return finder.eval().requires_grad_(False)


def add_adapter(config, model, directions, section):
    """Put the adapters of config section `lora` or `personal` into a frozen model; return it."""
    lora.inject_lora(
        model.unet,
        **adapter_shape(config, section),
        dropout=config["lora"]["dropout"],
        directions=directions,
        seed=config["seed"],
    )
    return model


def adapter_shape(config, section):
    """Return the arguments of `lora.inject_lora` on which the numbers of an adapter depend, from
    config section `lora` or `personal` (whose adapters are in all layers).
    """
    settings = config[section]
    scaling = config["lora"]["alpha"] / config["lora"]["rank"]  # of both sections' adapters
    return {
        "train": settings["train"],
        "rank": settings["rank"],
        "layers": settings.get("layers", ""),
        "alpha": scaling * settings["rank"],
    }


# ---------------------------------------------------------------- the whole path, and Algorithm 1


def train(config, people, run, device, workers, may_train=True):
    """Train the backbone, run the rounds, train personal adapters and report, all in `run`.

    Raises ValueError if something would have to be trained and may not.
    """
    stopwatch = Stopwatch(run, workers)
    # -- on public people's clips: backbone, judges, the directions of the adapters
    backbone = load_or_pretrain(config, people.public, run, device, workers)
    if config["data"]["find_faces"]:
        with workers.first_on_machine():
            people = find_faces(config, people, load_finder(config, backbone))
    model, judges = restore_backbone(config, backbone, device)
    add_adapter(config, model, backbone["directions"], "lora")  # Eq. 7; the rest is frozen
    stopwatch.lap("backbone")
    # -- between clients and server: Algorithm 1
    clients = make_clients(config, people, run)
    state = workers.broadcast(load_or_initialize(config, model, backbone, run))
    if state["round"] != config["fed"]["rounds"] and not may_train:
        raise ValueError(f"{NO_TRAINING} ({state['round']} rounds are done)")
    if state["round"] > config["fed"]["rounds"]:
        raise ValueError(f"fed.rounds: the run has had {state['round']} rounds already")
    if workers.rank == 0:
        # Only now, as the run's files have been read without errors.
        forget_rounds(run, state)
        if state["round"] < config["fed"]["rounds"]:
            if "control" in state:
                check_controls(clients, state)
            begin_training(run, config)
        if not (run / "last.pt").exists():
            save_state(run, state, workers)  # the sampling key is drawn once
    workers.wait()  # for the clients' first c_i
    # SCAFFOLD needs a shared disk for its c_i. Rank 0's config.yaml is there only if it is shared.
    if "control" in state and not (run / "config.yaml").exists():
        raise ValueError(f"{run / 'clients'}: all machines have to share it, for SCAFFOLD's c_i")
    jitter = backbone["public_jitter"]
    state = federate(config, model, judges["loss"], clients, state, jitter, run, device, workers)
    stopwatch.lap("rounds")
    check_learned(run, workers)
    # -- on each client: personal adapters, which never leave it
    clients = clients[: config["personal"]["clients"]]
    directions = backbone["directions"]
    personal = personalize(
        config, model, judges["loss"], clients, state, directions, run, device, workers, may_train
    )
    stopwatch.lap("personal adapters")
    report = evaluate(
        config, model, judges["table"], people, clients, state, personal, backbone, run, workers
    )
    stopwatch.lap("evaluation")
    if workers.rank == 0:
        report["seconds"] = backbone["seconds"] | stopwatch.seconds
        save_config(run, config)  # only now, as the old report belongs to the old settings
        write_report(run, report, backbone["losses"])
    workers.wait()  # until the report is written


def federate(config, model, judges, clients, state, public_jitter, run, device, workers):
    """Run the rounds that `state` still lacks (Algorithm 1); return the state after the last."""
    f = config["fed"]
    population = [fed.pool_clients(clients)] if f["algorithm"] == "centralized" else clients
    cohorts = draw_cohorts(config, state["sampling_key"], len(population), f["rounds"])
    participations = privacy.most_participations(cohorts)
    mechanism = make_mechanism(config, len(state["adapter"]), participations)
    accountant = privacy.Accountant(state["accountant"])
    training = training_kwargs(config, "fed", device)
    reliability_kwargs = {"alpha": f["reliability_alpha"], "public_jitter": public_jitter}
    reliability_kwargs |= config["sampling"]
    bar_kwargs = {"initial": state["round"], "total": f["rounds"], "disable": workers.rank > 0}
    for index in tqdm(range(state["round"], f["rounds"]), "rounds", **bar_kwargs):
        cohort = cohorts[index]
        # Charged and saved first: if the run is killed, what was sent already may have been seen.
        accountant.spend(accounted_rate(f), mechanism.noise_multiplier if mechanism else 0.0)
        state["accountant"] = accountant.history
        if mechanism:
            save_state(run, state, workers)
        uploads = {}
        diagnostics = {}
        # i is a client's place in the cohort, its name in the secure sum.
        for i in workers.assign([population[k].num_samples for k in cohort]):
            # -- on client k: only uploads[i] is sent; diagnostics are the simulation's
            k = cohort[i]
            client = population[k]
            seed = fed.derive_seed(f["seed"], index, k)
            # A client that fails still sends, with weight 0: its silence could reveal its data.
            update = fed.zero_update(state)
            weight = 0.0
            diagnostics[i] = {}
            with fed.catch_failure(client, diagnostics[i]):
                # Eq. 12
                update, terms = fed.local_update(model, judges, client, state, seed, **training)
                r = 1.0
                if f["gamma"]:
                    # rates clips of phi_k, left in the model by local_update
                    batch = client.validation_batch(model)
                    r = fed.reliability(model, judges, batch, seed, **reliability_kwargs)
                weight = fed.isfa_weight(client.num_samples, r, f["gamma"], f["sample_cap"])
                diagnostics[i] |= terms | {"reliability": r, "norm": float(update.norm())}
            uploads[i] = update, weight
            if mechanism:
                # clip, weight, quantise, add the client's share of the noise
                uploads[i] = mechanism.encode(update.numpy(), weight, len(cohort), (index, i))

        # -- between clients and server
        # Dropouts are simulated, the same ones on all workers.
        dropout_seed = fed.derive_seed(f["seed"], index)
        dropouts = fed.choose_dropouts(len(cohort), f["dropout_rate"], dropout_seed)
        survivors = []
        aborted = None
        try:
            if mechanism:  # masks cancel, only the sum is seen
                params = fed.round_params(mechanism, len(cohort))
                total, survivors = privacy.run_protocol(params, uploads, dropouts, workers)
                decoded = mechanism.decode(total, len(cohort), len(survivors), index)
                # The server's noise for dropouts is random: all workers take that of rank 0.
                mean, weight_sum = workers.broadcast(decoded)
            else:
                mean, weight_sum, survivors = fed.plain_mean(workers.merge(uploads), dropouts)
        except privacy.AggregationAborted as error:
            aborted = str(error)

        # -- on the server (run by every worker); an aborted round leaves the adapter as it was
        if survivors:
            # |S| / N: SCAFFOLD's weights are 1, or 0 after a failure; a noisy sum may be near 0
            participation = max(1.0, weight_sum) / len(population)
            state = fed.server_update(state, mean, f["server_lr"], participation)
        if "control" in state:  # undo the c_i of updates that did not count
            for i in uploads:
                if i not in survivors or "failure" in diagnostics[i]:
                    population[cohort[i]].undo_control(index + 1)
        state["round"] = index + 1
        record = {"round": index, "cohort_size": len(cohort), "survivors": len(survivors)}
        record |= {"aborted": aborted, "weight_sum": weight_sum if survivors else 0.0}
        diagnostics = workers.merge(diagnostics)
        record |= summarize_round(config, accountant, cohorts[: index + 1], diagnostics)
        record["simulation"] |= validate(model, clients, state, workers)
        # The log first: after a crash in between, `forget_rounds` drops the surplus line.
        log_round(run, record, workers)
        save_state(run, state, workers)
    return state


class Stopwatch:
    """Seconds between laps, by name; each lap is logged."""

    def __init__(self, run, workers):
        self.run = run
        self.rank = workers.rank
        self.seconds = {}
        self.started = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name] = round(now - self.started, 1)
        self.started = now
        if self.rank == 0:
            log(self.run, f"{name}: {self.seconds[name]:.0f} s")


def load_people(config):
    """Return the public people, the clients and the unseen people: {name: [clip]} each."""
    d = config["data"]
    people = data.load_people(
        d["root"],
        d["size"],
        d["crop"],
        d["clients"],
        d["unseen"],
        config["seed"],
        config["runtime"]["cache"],
        config["backbone"]["num_frames"],
    )
    prompts = [clip.prompt for role in people for own in role.values() for clip in own]
    long = sum(len(talking.split_words(prompt)) > talking.MAX_WORDS for prompt in prompts)
    if long and data.is_first_worker():
        print(f"note: prompts of {long} clips are cut off after {talking.MAX_WORDS} words")
    return people


def find_faces(config, people, finder):
    """Return the people with the faces of clients and unseen people cut out of their clips.

    Raises ValueError if a face is found in too few clips of a person.
    """
    private = people.clients | people.unseen  # public clips are not decoded again
    used = {clip.path for own in private.values() for clip in own}
    found = read_clips(config, config["data"]["root"], finder, set(private))
    found = [clip for clip in found.clips if clip.path in used]
    found = data.by_person(found, config["backbone"]["num_frames"])
    roles = []
    for role, least in ((people.clients, 3), (people.unseen, 1)):
        lost = ", ".join(sorted(name for name in role if len(found.get(name, ())) < least))
        if lost:
            raise ValueError(
                f"data.find_faces: a face is found in fewer than {least} clips of {lost}"
            )
        roles.append({name: found[name] for name in role})
    return data.People(people.public, *roles)


def read_clips(config, root, finder, names=None, everybody=None):
    """Return the data.TalkingHeads of a folder or video, faces cut out; prints what is not used."""
    d = config["data"]
    cache = config["runtime"]["cache"]
    dataset = data.TalkingHeads(root, d["size"], d["crop"], cache, finder, names, everybody)
    data.print_troubles(dataset)
    return dataset


def make_clients(config, people, run):
    """Return a fed.Client for each private person."""
    num_frames = config["backbone"]["num_frames"]
    same_clip = config["data"]["in_the_wild"]
    clients = []
    for name, clips in people.clients.items():
        split = data.split_clips(clips, config["seed"])
        clients.append(fed.Client(name, split, num_frames, run / "clients", same_clip))
    return clients


def training_kwargs(config, section, device):
    """Return the keyword arguments of `fed.local_update` (config section `fed`) or of
    `fed.train_adapter` (`personal`).
    """
    kwargs = backward_kwargs(config, device, judged=True)
    kwargs |= {key: config[section][key] for key in ("lr", "batch_size")}
    if section == "fed":
        kwargs |= {key: config["fed"][key] for key in ("local_epochs", "proximal")}
        if config["privacy"]["enabled"]:
            kwargs["clip_norm"] = config["privacy"]["clip_norm"]
    else:
        kwargs["num_steps"] = config["personal"]["steps"]
    return kwargs


def describe_personal(config, state):
    """Return the description that a personal adapter is checked against: its shape, and the
    checksum of the global adapter on top of which it was trained.
    """
    origin = checksum([state["description"], state["adapter"]])
    return adapter_shape(config, "personal") | {"origin": origin}


def load_or_initialize(config, model, backbone, run):
    """Return the state of the rounds: that in last.pt, or the one before round 0.

    It holds the global adapter [d], the number of rounds done, the accountant's history, the
    sampling key, `description` and `settings`, which are checked here when a run is resumed, and,
    for SCAFFOLD alone, c under the name "control". Raises ValueError for an adapter of another
    backbone or shape, changed settings, or a lost last.pt.
    """
    description = adapter_shape(config, "lora") | {"origin": checksum(backbone["model"])}
    settings = checksum(fixed_settings(config))
    if (run / "last.pt").exists():
        state = load_checkpoint(run / "last.pt", "global adapter")
        if state["description"] != description:
            raise ValueError(f"{run / 'last.pt'}: the adapter belongs to another backbone or shape")
        if state["settings"] != settings:
            raise ValueError(f"{run / 'config.yaml'} was changed since the run was made")
        return state
    if (run / "rounds.jsonl").exists():
        raise ValueError(f"{run}: last.pt is lost, and with it what the rounds have spent")
    adapter = lora.adapter_vector(model)
    state = {
        "description": description,
        "settings": settings,
        "adapter": adapter,
        "round": 0,
        "accountant": [],
        "sampling_key": sampling_key(config).hex(),
    }
    if config["fed"]["algorithm"] == "scaffold":
        state["control"] = torch.zeros_like(adapter)
    return state


def sampling_key(config):
    """Return the key with which cohorts are drawn: random bytes of the operating system, or those
    that follow from privacy.seed in a reproducible study.
    """
    seed = config["privacy"]["seed"]
    if seed < 0:
        return privacy.new_sampling_key()
    return hashlib.sha256(f"cohorts {seed}".encode()).digest()


def save_state(run, state, workers):
    """Write last.pt at rank 0, and an empty rounds.jsonl before round 0, whose presence tells a lost
    last.pt from a run that has not begun.
    """
    if workers.rank == 0:
        save_checkpoint(run / "last.pt", "global adapter", state)
        (run / "rounds.jsonl").touch()


def save_config(run, config):
    """Write the settings of a run into its config.yaml."""
    write_text(run / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def begin_training(run, config):
    """Save the settings with which a run is trained further, and delete its report, which no longer
    describes it.
    """
    save_config(run, config)
    for name in ("report.json", "report.md"):
        (run / name).unlink(missing_ok=True)


def check_controls(clients, state):
    """Write SCAFFOLD's first c_i, zeros, before round 0; raise ValueError if one is lost or wrong."""
    for client in clients:
        if state["round"] == 0:
            client.write_controls({0: torch.zeros_like(state["control"])})
        control = client.load_control(state["round"])
        if control.shape != state["control"].shape or not control.isfinite().all():
            raise ValueError(f"{client.control_file}: damaged, or of another run")


def forget_rounds(run, state):
    """Drop the line of a round that was logged but is not in last.pt; this round is repeated.

    Raises ValueError for any other number of lines, where last.pt lacks what rounds have spent, and
    for lines that are no records of rounds.
    """
    path = run / "rounds.jsonl"
    text = path.read_text("utf-8", "backslashreplace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    num_rounds = state["round"]
    most = num_rounds + 1
    if any(noise for _, noise, _ in state["accountant"]):  # rounds were charged before they ran
        most = min(most, privacy.Accountant(state["accountant"]).num_rounds)
    if not num_rounds <= len(lines) <= most:
        raise ValueError(
            f"{path}: damaged, or last.pt is an older one: {len(lines)} rounds are not {num_rounds}"
        )
    if len(lines) > num_rounds:
        write_text(path, "".join(lines[:num_rounds]))
    read_rounds(run)


def read_rounds(run):
    """Return the record of each round of a run (`log_round`)."""
    path = run / "rounds.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        rounds = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    for i, record in enumerate(rounds):
        if not isinstance(record, dict) or record.get("round") != i or "simulation" not in record:
            raise ValueError(f"{path}: damaged, line {i + 1} is not the record of round {i}")
    return rounds


def check_learned(run, workers):
    """Raise ValueError if every round of the run was aborted, or none of its clients trained."""
    rounds = workers.broadcast(read_rounds(run) if workers.rank == 0 else None)
    reasons = []
    for record in rounds:
        failures = record["simulation"]["failures"]
        if record["aborted"]:
            reasons.append(f"was aborted: {record['aborted']}")
        elif len(failures) == record["cohort_size"]:
            reasons.append(f"had no client that trained: {failures[0]}")
    if rounds and len(reasons) == len(rounds):
        raise ValueError(
            f"nothing was learned, as every round failed: the last one {reasons[-1]}. "
            f"Add rounds: --resume {run} --set fed.rounds={2 * len(rounds)}"
        )


def summarize_round(config, accountant, cohorts, diagnostics):
    """Return the rest of a round's record: the guarantee of the rounds of `cohorts`, and under
    "simulation" what only a simulation can log.

    Raises ValueError if everybody takes part in each round and every client failed.
    """
    # Only a simulation sees failures: a server could not, as clients that fail send zeros.
    failures = [d["failure"] for d in diagnostics.values() if "failure" in d]
    trained = [d for d in diagnostics.values() if "failure" not in d]
    # With sampling the run goes on: this round counts, and the next cohort has other clients.
    if failures and not trained and config["fed"]["sample_rate"] == 1:
        raise ValueError(f"every client failed, the first with: {failures[0]}")
    simulation = {"failures": failures}
    for name in trained[0] if trained else ():
        simulation[name] = float(np.mean([d[name] for d in trained if name in d]))
    if trained and config["privacy"]["enabled"]:
        clipped = [d["norm"] > config["privacy"]["clip_norm"] for d in trained]
        simulation["clipped_share"] = float(np.mean(clipped))
    rate, noise_multiplier, _ = accountant.history[-1]
    participations = privacy.most_participations(cohorts, accountant.num_rounds)
    epsilon = accountant.epsilon_known_cohorts(config["privacy"]["delta"], participations)
    return {
        "sample_rate": rate,
        "noise_multiplier": noise_multiplier,
        "epsilon": math.inf if config["privacy"]["seed"] >= 0 else epsilon,  # seeded: no guarantee
        "simulation": simulation,
    }


def validate(model, clients, state, workers):
    """Return {"unexplained": mean unexplained variance of a validation clip of each of the first 12
    clients with the global adapter, "not_validated": [the error of each client that failed]}.
    """
    lora.load_adapter_vector(model, state["adapter"])
    sample = clients[:12]
    results = {}
    for k in workers.assign([1.0] * len(sample)):
        results[k] = {}
        with fed.catch_failure(sample[k], results[k]):
            batch = sample[k].validation_batch(model)
            share = fed.unexplained_variance(model, batch, seed=0).mean()
            results[k]["unexplained"] = float(share)
    results = workers.merge(results).values()
    shares = [result["unexplained"] for result in results if "unexplained" in result]
    failures = [result["failure"] for result in results if "failure" in result]
    mean = float(np.mean(shares)) if shares else math.nan
    return {"unexplained": mean, "not_validated": failures}


def log_round(run, record, workers):
    """Append a record to rounds.jsonl at rank 0, and log failures and aborts."""
    if workers.rank > 0:
        return
    if record["aborted"]:
        log(run, f"round {record['round']} was aborted: {record['aborted']}")
    simulation = record["simulation"]
    for failure in simulation["failures"] + simulation["not_validated"]:
        log(run, f"round {record['round']}: {failure}")
    with open(run / "rounds.jsonl", "a") as file:
        file.write(json.dumps(finite(record)) + "\n")


def describe_communication(config, model, numbers):
    """Return how many numbers and bytes a client sends and receives in a round with a cohort of
    expected size and no dropouts; no bytes if clips are pooled.
    """
    about = {"numbers": numbers, "model_parameters": sum(p.numel() for p in model.parameters())}
    if config["fed"]["algorithm"] == "centralized":
        return about
    num_vectors = 2 if config["fed"]["algorithm"] == "scaffold" else 1  # with c, and c_i's change
    mechanism = make_mechanism(config, numbers)
    about["bytes_up"] = about["bytes_down"] = 4 * numbers * num_vectors
    if mechanism:
        cohort_size = round(config["fed"]["sample_rate"] * config["data"]["clients"])
        params = fed.round_params(mechanism, cohort_size)
        about["bytes_up"] = params.num_bytes()  # keys and shares, too
        about["bytes_down"] += params.num_bytes_received()
    return about


def describe_privacy(config, state):
    """Return the privacy section of the report."""
    mechanism = make_mechanism(config, len(state["adapter"]))
    if mechanism is None:
        pooled = config["fed"]["algorithm"] == "centralized"
        reason = "the clients' clips are pooled" if pooled else "privacy.enabled is false"
        return {"private": False, "epsilon": None, "no_privacy_because": reason}
    accountant = privacy.Accountant(state["accountant"])
    if accountant.history:  # a resumed run may have changed fed.rounds, which chooses the noise
        _, noise_multiplier, _ = accountant.history[-1]
        mechanism = dataclasses.replace(mechanism, noise_multiplier=noise_multiplier)
    num_clients = config["data"]["clients"]
    cohorts = draw_cohorts(config, state["sampling_key"], num_clients, state["round"])
    return privacy.privacy_report(mechanism, accountant, config["privacy"]["delta"], cohorts)


# ---------------------------------------------------------------- personal adapters

# Weight of what is trained on a client's own clips in a personal adapter; 0 is the global adapter
# alone, and 1 forgets mouth shapes that the client's few seconds do not show
# (tests/results/ablations.md).
MIXING_COEFFICIENT = 0.8


def merged_copy(model, vector):
    """Return a copy of the adapted `model` with the adapter `vector` folded into its weights."""
    merged = copy.deepcopy(model)
    lora.load_adapter_vector(merged, vector)
    return lora.merge_lora(merged)


def personal_model(config, model, adapter, directions):
    """Return the model with the global adapter folded in and a personal adapter, still zero, on
    top.
    """
    return add_adapter(config, merged_copy(model, adapter), directions, "personal")


def personal_file(run, name):
    """Return the path of a client's personal adapter in a run."""
    return run / "personal" / f"{data.short_name(name)}.pt"


def train_personal(model, judges, client, start, seed, **kwargs):
    """Return a personal adapter [d], trained on a client's own clips from `start` [d] and mixed
    with `start` (Deng et al. 2020, APFL; Wortsman et al. 2022, WiSE-FT); kwargs as
    `fed.train_adapter`.
    """
    trained, _ = fed.train_adapter(model, judges, client, start, seed, **kwargs)
    return torch.lerp(start, trained, MIXING_COEFFICIENT)


def personalize(
    config, model, judges, clients, state, directions, run, device, workers, may_train=True
):
    """Return {client name: personal adapter}, trained on each client's own clips and kept in
    personal/<client>.pt; {} without steps.

    Raises ValueError if one would have to be trained and may not.
    """
    if not config["personal"]["steps"]:
        return {}
    model = personal_model(config, model, state["adapter"], directions)
    start = lora.adapter_vector(model)
    kwargs = training_kwargs(config, "personal", device)
    recipe = {key: kwargs[key] for key in ("num_steps", "lr", "batch_size", "loss_weights")}
    recipe["mixing_coefficient"] = MIXING_COEFFICIENT
    made_by = {"description": describe_personal(config, state), "training": checksum(recipe)}
    paths = {client.name: personal_file(run, client.name) for client in clients}
    finished = {}
    for name, path in paths.items():
        if workers.rank == 0 and path.exists():
            content = load_checkpoint(path, "personal adapter")
            # Otherwise it belongs to another client, to an earlier global adapter or to other
            # training settings.
            if (made_by | {"client": name}).items() <= content.items():
                finished[name] = content
    finished = workers.broadcast(finished)
    todo = [k for k, client in enumerate(clients) if client.name not in finished]
    if todo and not may_train:
        names = ", ".join(clients[k].name for k in todo[:5])
        raise ValueError(f"{NO_TRAINING} (no personal adapter of these settings for {names})")
    own = {}
    mine = workers.assign([1.0] * len(todo))
    for i in tqdm(mine, "personal adapters", disable=workers.rank > 0):
        client = clients[todo[i]]
        seed = fed.derive_seed(config["fed"]["seed"], todo[i])
        trained = train_personal(model, judges, client, start, seed, **kwargs)
        batch = client.validation_batch(model)
        check_converged(model, start, trained, batch, client.name)
        if workers.rank == 0 and not own:  # only once an adapter was trained with these settings
            begin_training(run, config)
        liveliness = data.typical_liveliness(client.split["train"])
        content = made_by | {"client": client.name, "adapter": trained, "liveliness": liveliness}
        save_checkpoint(paths[client.name], "personal adapter", content)
        own[client.name] = content
    finished |= workers.merge(own)
    if workers.rank == 0:
        others = {clients[k].name for k in todo} - own.keys()
        for name in others:  # these may be on the disk of another machine
            save_checkpoint(paths[name], "personal adapter", finished[name])
    return {name: content["adapter"] for name, content in finished.items()}


def check_converged(model, start, trained, batch, name):
    """Return the mean unexplained variance of a batch with the adapters `start` [d], from which the
    training started, and `trained` [d].

    Raises ValueError if the trained one leaves ten times as much as predicting no motion does, and
    ten times as much as `start`.
    """
    models = [merged_copy(model, vector) for vector in (start, trained)]
    before, after = [float(fed.unexplained_variance(m, batch, 0).mean()) for m in models]
    if not after < 10 * max(1.0, before):  # or NaN
        raise ValueError(f"the training of {name}'s adapter diverged: lower personal.lr")
    return before, after


# ---------------------------------------------------------------- evaluation and report

BASELINES = ("truth", "copy reference", "autoencoder ceiling")
TRAINED = ("backbone", "global adapter", "personal adapter", "personal adapter, other speech")


def evaluate(config, model, judges, people, clients, state, personal, backbone, run, workers):
    """Generate and score every method on up to two test clips of each client, and on unseen people;
    write pictures and videos. Each worker does so for a share of the clips; return the report at
    rank 0.
    """
    device = model.motion_std.device
    backbone_model = merged_copy(model, torch.zeros_like(state["adapter"]))
    global_model = merged_copy(model, state["adapter"])
    adaptable = personal_model(config, model, state["adapter"], backbone["directions"])
    networks, sources = metrics.load_standard(config["weights"])
    splits = {client.name: client.split for client in clients}
    cases = metrics.make_cases(splits, config["evaluate"]["num_frames"], 2)
    evaluation = metrics.Evaluation(cases, judges, networks, device)
    examples = cases[:: max(1, len(cases) // 8)][:8]  # in pictures and videos
    pictures = {}  # place in `examples` -> method -> uint8 [f 3 H W]
    models = {"backbone": backbone_model, "global adapter": global_model}
    seconds = 0.0
    num_frames = 0
    trained = TRAINED if personal else TRAINED[:2]
    own_cases = [cases[i] for i in workers.assign([1.0] * len(cases))]
    for method in BASELINES + trained:
        for case in tqdm(own_cases, method, leave=False, disable=workers.rank > 0):
            if method in BASELINES:
                frames = baseline_frames(method, case, backbone_model)
            else:
                used = models.get(method) or merged_copy(adaptable, personal[case.person])
                mel = case.other_mel if method.endswith("other speech") else case.mel
                started = time.perf_counter()
                frames = generate_case(used, case, mel, config)
                seconds += time.perf_counter() - started
                num_frames += len(frames)
            evaluation.add(method, case, frames)
            if case in examples:
                pictures.setdefault(examples.index(case), {})[method] = to_pixels(frames)
    evaluation.merge(workers)
    pictures = workers.merge(pictures)
    speeds = workers.merge({workers.rank: num_frames / seconds if seconds else 0.0})
    unexplained = unexplained_table(config, models, adaptable, personal, clients, workers)
    unseen = evaluate_unseen(config, people.unseen, models, judges, networks, workers)
    if workers.rank > 0:
        return None
    save_pictures(run, list(zip(examples, pictures.values())))
    paired = {}
    for before, method in zip(trained, trained[1:]):
        paired[f"{method} - {before}"] = evaluation.paired(method, before)
    small = {"*": "small networks trained on half of the public people", "scores": judges.scores}
    return {
        "name": config["name"],
        "rows": evaluation.rows(),
        "paired": paired,
        "unexplained": unexplained,
        "unseen": unseen,
        "judges": sources | small,
        "privacy": describe_privacy(config, state),
        "communication": describe_communication(config, backbone_model, len(state["adapter"])),
        "speed": {"generated_frames_per_second": round(sum(speeds.values()), 1)},
        "hardware": describe_hardware(device),
    }


def describe_hardware(device):
    """Return what a run's times depend on, and for a GPU the peak memory of rank 0."""
    hardware = {
        "machine": platform.processor() or platform.machine(),
        "gpu": None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device.type == "cuda" and torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return hardware


@torch.inference_mode()
def baseline_frames(method, case, model):
    """Return frames [f 3 H W] in [0, 1] of a method that needs no trained UNet."""
    if method == "truth":
        return case.frames
    if method == "copy reference":
        return metrics.unit_frames(case.reference).expand_as(case.frames)
    device = model.motion_std.device
    frames = (2 * case.frames - 1).to(device)
    reference = data.to_float(case.reference, device)
    whole = torch.ones(1, device=device)  # liveliness 1: decoding would undo any other
    motion, _ = model.encode_motion(frames[None], reference[None], whole)  # 1 f m h w
    decoded = model.decode(motion / model.motion_std, reference[None], whole)[0]
    return data.to_unit(decoded).cpu()


def generate_case(model, case, mel, config):
    """Return generated frames [f 3 H W] in [0, 1] of a test case that speaks `mel` [f n m]."""
    device = model.motion_std.device
    reference = data.to_float(case.reference, device)[None]
    words = model.text_encoder.ids([case.clip.prompt]).to(device)
    # Every clip has noise of its own, the same for all methods.
    clip = zlib.crc32(case.key.encode())
    generator = torch.Generator().manual_seed(fed.derive_seed(config["seed"], clip))
    mel = torch.as_tensor(mel)[None].to(device)
    liveliness = data.typical_liveliness(case.training_clips)
    liveliness = torch.full([1], liveliness, device=device)
    sampling = config["sampling"]
    frames = model.generate(reference, mel, words, generator, liveliness=liveliness, **sampling)
    return data.to_unit(frames)[0].cpu()


def unexplained_table(config, models, adaptable, personal, clients, workers):
    """Return the unexplained variance of test clips, {method: {mean, ci95, by noise level, ratio to
    the backbone}}.

    The reference picture is of a training clip. Predicting no motion leaves 1; the linear denoiser
    is the model without its UNet.
    """
    num_frames = config["evaluate"]["num_frames"]
    models = {"linear denoiser": models["backbone"]} | models
    methods = [*models, "personal adapter"] if personal else list(models)
    shares = {}  # (client's place, method) -> [levels clips]
    for k in workers.assign([1.0] * len(clients)):
        split = clients[k].split
        batch = fed.fixed_batch(adaptable, split["test"], split["train"], num_frames)
        # Every client has noise of its own, the same for all methods.
        seed = fed.derive_seed(config["seed"], k)
        for method in methods:
            model = models.get(method) or merged_copy(adaptable, personal[clients[k].name])
            use_unet = method != "linear denoiser"
            share = fed.unexplained_variance(model, batch, seed, use_unet=use_unet)
            shares[k, method] = share.cpu().numpy()
    shares = workers.merge(shares)
    groups = [client.name for client in clients for _ in client.split["test"]]
    names = [f"{client.name}/{clip.name}" for client in clients for clip in client.split["test"]]
    by_method = {  # [levels clips]
        method: np.hstack([shares[k, method] for k in range(len(clients))]) for method in methods
    }
    table = {"no motion": {"mean": 1.0}}
    for method, values in by_method.items():
        mean = values.mean(0)  # clips
        ratio = mean / by_method["backbone"].mean(0)
        table[method] = metrics.mean_ci(mean, groups) | {
            "by_level": values.mean(1).tolist(),
            "values": dict(zip(names, mean.tolist())),
            "ratio_to_backbone": metrics.mean_ci(ratio, groups),
        }
    return table


def evaluate_unseen(config, unseen, models, judges, networks, workers):
    """Return the rows of backbone and global adapter for people that nothing was trained on."""
    splits = {
        name: {"train": clips[:-1], "test": clips[-1:]}
        for name, clips in unseen.items()
        if len(clips) > 1
    }
    cases = metrics.make_cases(splits, config["evaluate"]["num_frames"], 1)
    evaluation = metrics.Evaluation(cases, judges, networks, models["backbone"].motion_std.device)
    for case in [cases[i] for i in workers.assign([1.0] * len(cases))]:
        evaluation.add("truth", case, case.frames)
        for method in ("backbone", "global adapter"):
            frames = generate_case(models[method], case, case.mel, config)
            evaluation.add(method, case, frames)
    evaluation.merge(workers)
    return evaluation.rows()


def save_pictures(run, pairs, zoom=2):
    """Write grid.png, a row for each case at the frame with the mouth widest open, and
    samples/*.mp4 of every second case, with sound, with the methods side by side.

    `pairs` is [(case, {method: uint8 [f 3 H W]})].
    """
    methods = [m for m in pairs[0][1] if m != "copy reference"]
    rows = []
    for case, clips in pairs:
        moment = len(case.frames) // 2 if case.opening is None else int(case.opening.argmax())
        tiles = [case.reference, *(clips[m][moment] for m in methods)]
        rows.append(np.concatenate(tiles, axis=2))  # 3 H (methods W)
    grid = Image.fromarray(rearrange(rows, "n c h w -> (n h) w c"))
    grid = grid.resize((zoom * grid.width, zoom * grid.height), Image.LANCZOS)
    sheet = Image.new("RGB", (grid.width, 16 + grid.height), "white")
    sheet.paste(grid, (0, 16))
    pen = ImageDraw.Draw(sheet)
    for column, method in enumerate(["reference", *methods]):
        title = method.removeprefix("personal adapter, ")  # the whole name is too wide
        pen.text((column * grid.width // (1 + len(methods)) + 4, 3), title, "black")
    save_picture(run / "grid.png", sheet)
    samples = run / "samples"
    samples.mkdir(exist_ok=True)
    for video in samples.glob("*.mp4"):
        video.unlink()  # an earlier evaluation may have shown other clips
    in_videos = [m for m in methods if "other" not in m]
    comment = "synthetic: " + " | ".join(in_videos)
    for case, clips in pairs[::2]:
        strip = np.concatenate([clips[m] for m in in_videos], axis=3)  # f 3 H (methods W)
        strip = strip.repeat(zoom, 2).repeat(zoom, 3)
        name = data.short_name(f"{case.person}-{case.clip.name}")
        data.write_video(samples / f"{name}.mp4", strip, case.audio, comment)


def to_pixels(frames):
    """Return frames [f 3 H W] in [0, 1] as uint8."""
    return (frames * 255).round().byte().cpu().numpy()


def save_picture(path, picture):
    """Write a PNG, whole or not at all."""
    with data.atomic_write(path) as temporary:
        picture.save(temporary)


def draw_curve(title, values, width=420, height=260):
    """Return a plot of values over their index as a picture."""
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    low, high = min(values), max(values)
    pen.text((50, 6), title, "black")
    pen.text((4, 26), f"{high:.4g}", "black")
    pen.text((4, height - 48), f"{low:.4g}", "black")
    pen.text((width - 60, height - 36), str(len(values)), "black")
    pen.rectangle((50, 30, width - 30, height - 40), outline="#888888")
    x = np.linspace(50, width - 30, len(values))
    y = height - 40 - (np.array(values) - low) / max(high - low, 1e-12) * (height - 70)
    pen.line(list(zip(x, y)), fill="#1f77b4", width=2)
    return sheet


def write_report(run, report, losses):
    """Write report.json, report.md and curves.png, and print the tables."""
    columns = (
        "mouth_correlation*",
        "mouth_std_ratio*",
        "mouth_psnr",
        "psnr",
        "jitter_ratio",
        "id_similarity*",
        "right_person*",
        "right_speech*",
        "sync*",
        "kid*",
    )
    unexplained = {}
    for name, row in report["unexplained"].items():
        ratio = row.get("ratio_to_backbone", {"mean": None})
        unexplained[name] = {"unexplained variance": row, "ratio to backbone": ratio}
    tables = {
        "generated clips": (report["rows"], columns),
        "paired differences": (report["paired"], columns),
        "people that nothing was trained on": (report["unseen"], columns),
        "motion of test clips": (unexplained, ("unexplained variance", "ratio to backbone")),
    }
    lines = [f"# {report['name']}", "", "Mean [95 % interval over people]."]
    for title, (rows, names) in tables.items():
        if rows:
            lines += ["", f"## {title}", "", metrics.markdown_table(rows, names)]
    for section in ("privacy", "communication", "seconds", "hardware", "speed"):
        lines += ["", f"## {section}", ""]
        if section == "seconds":
            lines += ["Of the last call, and of the training of what the backbone holds.", ""]
        lines += ["| | |", "|---|---|"]
        for key, value in report[section].items():
            lines.append(f"| {key} | {json.dumps(finite(value))} |")
    write_text(run / "report.json", json.dumps(finite(report), indent=1))
    write_text(run / "report.md", "\n".join(lines) + "\n")
    smooth = np.convolve(losses, np.ones(25) / 25, "valid") if len(losses) > 50 else losses
    panels = [draw_curve("backbone: loss by step", smooth)]
    by_round = [record["simulation"]["unexplained"] for record in read_rounds(run)]
    if len(by_round) > 1 and None not in by_round:
        panels.append(draw_curve("global adapter: unexplained variance by round", by_round))
    curves = np.concatenate([np.asarray(panel) for panel in panels], axis=1)
    save_picture(run / "curves.png", Image.fromarray(curves))
    print("\n".join(lines))
    print(f"\nreport, pictures and videos: {run}")


# ---------------------------------------------------------------- speaking and one's own adapter


def load_run(config, run, device):
    """Return backbone, model with adapters, judges and the state of a run's rounds so far."""
    backbone = load_checkpoint(run / "backbone.pt", "backbone")
    model, judges = restore_backbone(config, backbone, device)
    add_adapter(config, model, backbone["directions"], "lora")
    state = load_or_initialize(config, model, backbone, run)
    if judges["loss"].has_opening:  # which is known of synthetic talkers only
        print("this backbone has seen drawings only: expect little of it on real people")
    return backbone, model, judges, state


def save_crops(folder, name, frames):
    """Write frames [n 3 h w] side by side to FOLDER/NAME.png, to show the user what is used."""
    strip = rearrange(frames, "n c h w -> h (n w) c")
    save_picture(Path(folder, f"{name}.png"), Image.fromarray(strip))


def generate(args, config, device):
    """--action generate: a portrait and a voice become a video with sound."""
    output = Path(args.output or "talk.mp4")
    data.check_output(output)
    outputs = [output, Path(args.look, "reference.png")] if args.look else [output]
    for written in outputs:
        for path in (*args.reference, args.speech):
            if written.exists() and os.path.exists(path) and written.samefile(path):
                raise ValueError(f"{written} is --reference or --speech, and would be replaced")
    backbone, model, _, state = load_run(config, Path(args.resume), device)
    model = merged_copy(model, state["adapter"])
    liveliness = None  # as public people
    if args.adapter:
        content = load_checkpoint(args.adapter, "personal adapter")
        if content["description"]["origin"] != describe_personal(config, state)["origin"]:
            raise ValueError(
                f"{args.adapter}: was trained on another global adapter than the run has now"
            )
        config = config | {"personal": content["description"]}  # its own rank and factors
        model = add_adapter(config, model, backbone["directions"], "personal")
        model = merged_copy(model, content["adapter"])
        liveliness = torch.full([1], content["liveliness"], device=device)
    known = model.text_encoder.words
    words = talking.split_words(args.prompt)
    unknown = sorted(set(words) - set(known))
    if unknown:
        print(f"--prompt: ignored {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    if rest := [word for word in words if word in known][talking.MAX_WORDS :]:
        print(f"--prompt: more than {talking.MAX_WORDS} words, cut off: {' '.join(rest)}")

    d = config["data"]
    finder = load_finder(config, backbone)
    pictures = [data.read_image(path, d["size"], d["crop"], finder) for path in args.reference]
    if args.look:
        save_crops(args.look, "reference", pictures)
    reference = torch.stack([data.to_float(picture, device) for picture in pictures])[None]
    audio = data.read_speech(args.speech)
    if args.seconds:
        # 1e-6: 4.6 * 25 is a little less than 115 in floating point
        audio = audio[: int(args.seconds * data.FPS + 1e-6) * data.SAMPLES_PER_FRAME]
    mel = torch.from_numpy(data.audio_windows(data.log_mel(audio)))[None]
    scales = {name: getattr(args, f"{name}_scale") for name in talking.CONDITIONS}
    generator = torch.Generator().manual_seed(config["seed"] if args.seed is None else args.seed)
    words = model.text_encoder.ids([args.prompt]).to(device)
    sampling = config["sampling"] | {"scales": scales, "liveliness": liveliness}
    # reference 1 n 3 H W, mel 1 f n m
    stream = model.stream(reference, mel.to(device), words, generator, **sampling)
    started = time.perf_counter()
    # Closing ends the progress bar before an error is printed.
    with contextlib.closing(speaking_blocks(stream, mel.shape[1], not args.no_watermark)) as blocks:
        data.write_video(output, blocks, audio, "synthetic: generated by PrivFedTalk")
    seconds = time.perf_counter() - started
    print(
        f"{output}: {mel.shape[1]} frames in {seconds:.1f} s ({mel.shape[1] / seconds:.0f} a second)"
    )


def speaking_blocks(stream, num_frames, watermark):
    """Yield uint8 blocks [f 3 H W] of a stream of frames, with a progress bar and, if asked, the
    letters AI in a corner.
    """
    with tqdm(total=num_frames, desc="speaking", unit=" frames") as bar:
        for block in stream:
            frames = data.to_unit(block)[0]  # f 3 H W
            if watermark:
                frames = add_watermark(frames)
            yield to_pixels(frames)
            bar.update(len(frames))


def add_watermark(frames):
    """Return frames [f 3 H W] in [0, 1] with the letters AI in the lower right corner."""
    height, width = frames.shape[-2:]
    stamp = Image.new("L", (width, height))
    font = ImageFont.load_default(max(8, height // 9))
    ImageDraw.Draw(stamp).text((width - 2, height - 1), "AI", 160, font, anchor="rs")
    opacity = torch.from_numpy(np.array(stamp)).to(frames.device) / 255
    return torch.lerp(frames, torch.ones_like(frames), opacity)


def personalize_own(args, config, device):
    """--action personalize: train an adapter on a person's videos; measure it on other pieces."""
    output = Path(args.output or "me.pt")
    data.check_output(output, (".pt",))
    if not config["personal"]["steps"]:
        raise ValueError("personal.steps is 0: nothing would be trained")
    if output.exists():  # only a personal adapter may be overwritten
        load_checkpoint(output, "personal adapter")
    backbone, model, judges, state = load_run(config, Path(args.resume), device)
    dataset = read_clips(config, args.clips, load_finder(config, backbone), everybody="me")
    if args.look:
        for clip in dataset.clips:
            indices = np.linspace(0, clip.num_frames - 1, 8).astype(int)
            save_crops(args.look, data.short_name(clip.name), clip.frames[indices])
    others = metrics.find_strangers(judges["loss"], dataset.clips, backbone["identity_threshold"])
    if others:
        names = ", ".join(clip.path for clip in others[:5])
        print(f"--clips: another person may be in {len(others)} of {len(dataset.clips)}: {names}")
    num_frames = config["backbone"]["num_frames"]
    seconds = max(2.0, num_frames / data.FPS)
    pieces = data.segment(dataset.clips, seconds)
    if len(pieces) < 3:
        raise ValueError(
            f"--clips: three pieces of {seconds:g} s are needed, there are {len(pieces)}"
        )
    split = data.split_clips(pieces, config["seed"])
    model = personal_model(config, model, state["adapter"], backbone["directions"])
    start = lora.adapter_vector(model)
    same_clip = config["data"]["in_the_wild"]
    client = fed.Client("me", split, num_frames, same_clip=same_clip)
    kwargs = training_kwargs(config, "personal", device)
    trained = train_personal(model, judges["loss"], client, start, config["seed"], **kwargs)
    batch = fed.fixed_batch(model, split["test"], split["train"], 50)
    before, after = check_converged(model, start, trained, batch, "the person")
    content = {
        "adapter": trained,
        "description": describe_personal(config, state),
        "liveliness": data.typical_liveliness(split["train"]),
    }
    save_checkpoint(output, "personal adapter", content)
    limit = backbone["public_unexplained"]
    if limit and not before <= limit:  # or NaN, if nothing moves
        print(
            f"the model does not explain these clips: it leaves {before:.4f} of "
            f"their motion unexplained; without any training {limit:.4f} of the worst public clip's "
            "is left. Is there a talking face in them (--look FOLDER shows what was used)?"
        )
    else:
        pieces = f"{len(split['test'])} held-out pieces"
        for name, share in (("global adapter", before), ("personal adapter", after)):
            print(f"unexplained variance of {pieces}, {name}: {share:.4f}")
    print(
        f"{output}: made of {len(split['train'])} pieces of video; "
        f"--action generate --adapter {output}"
    )


def dry_run(args, config, device):
    """--action dry-run: print a run's settings, bytes sent, epsilon, and time from timed steps."""
    print(yaml.safe_dump(config, sort_keys=False))
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    b, f, p = config["backbone"], config["fed"], config["personal"]
    model = build_model(config).to(device)
    model.autoencoder.requires_grad_(False)
    num_parameters = sum(p.numel() for p in model.parameters())
    backbone_step = time_step(config, model, None, b["batch_size"])
    add_adapter(config, model.eval().requires_grad_(False), None, "lora")
    judges = metrics.Judges().to(device).eval().requires_grad_(False)
    client_step = time_step(config, model, judges, f["batch_size"])
    adapter = lora.adapter_vector(model)
    adapted = personal_model(config, model, adapter, None)
    personal_step = time_step(config, adapted, judges, p["batch_size"])
    sent = describe_communication(config, model, len(adapter))
    print(f"parameters: {num_parameters:,}; trained and sent by a client: {len(adapter):,}")
    if "bytes_up" in sent:
        print(f"bytes per client and round: {sent['bytes_up']:,} up, {sent['bytes_down']:,} down")
    else:
        print("the clients' clips are pooled: all of them are sent, and this is one client")

    state = {"round": 0, "accountant": [], "sampling_key": sampling_key(config).hex()}
    if args.resume and (Path(args.resume) / "last.pt").exists():
        state = load_checkpoint(Path(args.resume) / "last.pt", "global adapter")
    accountant = privacy.Accountant(state["accountant"])
    num_clients = config["data"]["clients"]
    cohorts = draw_cohorts(config, state["sampling_key"], num_clients, f["rounds"])
    mechanism = make_mechanism(config, len(adapter), privacy.most_participations(cohorts))
    noise_multiplier = mechanism.noise_multiplier if mechanism else 0.0
    rounds_left = max(0, f["rounds"] - state["round"])
    accountant.spend(accounted_rate(f), noise_multiplier, rounds_left)
    num_rounds = state["round"] + rounds_left
    state |= {"adapter": adapter, "accountant": accountant.history, "round": num_rounds}
    report = describe_privacy(config, state)
    epsilon = f"inf: {report['no_privacy_because']}"
    if report["private"]:
        epsilon = f"{report['epsilon']:.4g} at delta {report['delta']:g} if cohorts are known, "
        epsilon += f"{report['epsilon_with_sampling']:.4g} if they are not"
    print(f"epsilon {epsilon}; noise multiplier {noise_multiplier:.4g}")
    cohort = f["sample_rate"] * num_clients
    if mechanism:
        noise = mechanism.noise_std(1) * math.sqrt(mechanism.length)
        noise /= cohort * mechanism.clip_norm
        print(f"the noise on a round's mean is {noise:.3g} times the longest possible update")

    # as many clips, and as long, as a synthetic client has
    num_clips = data.CLIPS_PER_CLIENT - 2 * data.num_held_out(data.CLIPS_PER_CLIENT)
    windows = num_clips * int(data.CLIP_SECONDS * data.FPS / b["num_frames"])
    if f["algorithm"] == "centralized":  # one participant with all windows
        windows *= num_clients
        cohort = 1
    local_steps = fed.num_local_steps(windows, f["local_epochs"], f["batch_size"])
    backbone_hours = b["steps"] * backbone_step / 3600
    rounds_hours = rounds_left * cohort * local_steps * client_step / 3600
    personal_hours = min(p["clients"], num_clients) * p["steps"] * personal_step / 3600
    print(f"a step takes {backbone_step:.3g} s in the backbone and {client_step:.3g} s at a client")
    print("(3 were timed, on a CPU of at most 4 clips, and multiplied up to the batch)")
    print(f"{cohort:g} clients a round of {local_steps} steps, if they have {windows} windows each")
    hours = f"hours on one {device.type}: backbone's UNet {backbone_hours:.3g}, "
    hours += f"{rounds_left} rounds {rounds_hours:.3g}, personal adapters {personal_hours:.3g}"
    print(f"{hours}; with autoencoder, judges, face finder and evaluation it is more")
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    print(f"peak memory of a step as timed: {peak / 1e9:.3g} GB")


def time_step(config, model, judges, batch_size):
    """Return the seconds of a training step on a clip of noise, the mean of three after a warm-up.

    The timed batch has as many clips as go through the network at once, on a CPU at most 4; its
    time is scaled to `batch_size`. Without judges it is a step of the backbone.
    """
    device = model.motion_std.device
    at_once = config["runtime"]["micro_batch"] or batch_size
    b = min(batch_size, at_once, 4 if device.type == "cpu" else batch_size)
    f = config["backbone"]["num_frames"]
    shape = f, 3, config["data"]["size"], config["data"]["size"]
    frames = np.random.default_rng(config["seed"]).integers(256, size=shape, dtype=np.uint8)
    mel = np.zeros((data.MELS_PER_FRAME * f, data.NUM_MELS), np.float32)
    people = {"noise": [data.Clip("noise", "1", "", frames, np.zeros(0), mel)]}
    step_kwargs = backward_kwargs(config, device, judged=judges is not None)
    generator = torch.Generator().manual_seed(config["seed"])
    for step in range(4):
        if step == 1:
            started = time.perf_counter()
        batch = fed.sample_batch(model, people, b, f, generator)
        fed.backward(model, judges, batch, generator=generator, **step_kwargs)
    return (time.perf_counter() - started) / 3 * batch_size / b


# ---------------------------------------------------------------- command line and workers


def parse_arguments(argv):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    parser.error = data.refuse
    add("--config", help="YAML file; keys that it lacks have their default, as in config.yaml")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--preset", **several, help="sets of overrides from the config's `presets`")
    add("--set", **several, metavar="KEY=VALUE", help="overrides, e.g. fed.rounds=20")
    add("--gpus", help="0,1: one worker each; cpu:2: two on the CPU; default: all GPUs, else cpu:2")
    add("--resume", metavar="RUN", help="continue or use the run in this folder")
    actions = ("train", "evaluate", "generate", "personalize", "dry-run")
    add("--action", default="train", choices=actions)
    add("--reference", nargs="+", help="generate: pictures of a face; the first one is animated")
    add("--speech", help="generate: a sound or video file")
    add("--prompt", default="", help="generate: expression in a few words, such as smiling")
    add("--seconds", type=float, help="generate: at most this much of the speech")
    add("--seed", type=int, help="generate: seed of the noise, instead of the config's seed")
    # With weight 1, as in training, a prompt has little visible effect (tests/results/speak.md).
    for name, default in zip(talking.CONDITIONS, (1.0, 1.0, 2.0)):
        explanation = f"generate: weight of {name} ({default:g}); 0: none"
        add(f"--{name}-scale", type=float, default=default, help=explanation)
    add("--no-watermark", action="store_true", help="generate: no letters AI in the corner")
    add("--adapter", help="generate: a personal adapter, personal/<client>.pt")
    add("--clips", help="personalize: a folder of videos of one person, or one video")
    add("--look", metavar="FOLDER", help="generate, personalize: write used pictures to FOLDER")
    add("--output", help="generate: the video (talk.mp4); personalize: the adapter (me.pt)")
    args = parser.parse_args(argv)
    ranges = {"seconds": (0.04, 86400), "seed": (0, 2**63 - 1)}
    ranges |= {f"{name}_scale": (-100, 100) for name in talking.CONDITIONS}
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"{flag(name)} must lie in {least} ... {most}, not {value}")
    for name in ("config", "adapter", "look", "output"):  # as an unset variable of a script is
        if getattr(args, name) == "":
            parser.error(f"{flag(name)} is empty")
    generating = (*ranges, "reference", "speech", "prompt", "no_watermark", "adapter")
    users = dict.fromkeys(generating, ["generate"]) | {"clips": ["personalize"]}
    users |= dict.fromkeys(("output", "look"), ["generate", "personalize"])
    for name, actions in users.items():
        if args.action not in actions and getattr(args, name) != parser.get_default(name):
            parser.error(f"{flag(name)} is for --action {' or '.join(actions)}, not {args.action}")
    needed = {"evaluate": ["resume"], "personalize": ["clips", "resume"]}
    needed["generate"] = ["reference", "speech", "resume"]
    for name in needed.get(args.action, []):
        if not getattr(args, name):
            parser.error(f"--action {args.action} needs --{name}")
    return args


def flag(name):
    """Return the command line's flag for the name of an argument."""
    return "--" + name.replace("_", "-")


def choose_devices(gpus):
    """Return the devices that --gpus names, one worker each. Without it: every GPU, else two
    workers on the CPU.

    Two, as such small networks train faster in two processes of one thread than with two threads.
    """
    if gpus is None:
        cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return cuda or ["cpu"] * min(2, data.num_cpus())
    kind, colon, number = gpus.partition(":")
    number = number if colon else "1"
    if kind == "cpu" and number.isdecimal() and 1 <= int(number) <= 64:
        return ["cpu"] * int(number)
    indices = gpus.split(",")
    if not all(index.isdecimal() for index in indices):
        raise ValueError(f"--gpus {gpus}: give CUDA indices such as 0,1, or cpu, or cpu:2")
    if max(map(int, indices)) >= torch.cuda.device_count():
        raise ValueError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()} GPUs")
    return [f"cuda:{int(index)}" for index in indices]


def launch(argv, num_workers):
    """Run this script once per worker, with the variables that torchrun sets; when one fails, end
    the others. Return the exit status.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "WORLD_SIZE": num_workers,
        "LOCAL_WORLD_SIZE": num_workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_WAIT_POLICY": "passive",  # waiting threads must not hold the other workers' cores
    }
    # What torchrun tells its own worker of their meeting does not hold for these.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    launcher = os.getpid()

    def set_up_worker():
        data.die_with_parent(launcher)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the launcher ends them

    processes = []
    try:
        for rank in range(num_workers):
            own = variables | {"RANK": rank, "LOCAL_RANK": rank}
            environment = inherited | {name: str(value) for name, value in own.items()}
            command = [sys.executable, __file__, *argv]
            processes.append(subprocess.Popen(command, env=environment, preexec_fn=set_up_worker))
        while None in [p.poll() for p in processes] and not any(p.poll() for p in processes):
            time.sleep(0.05)
        time.sleep(0.2)  # for workers that are about to print an error
        codes = [p.poll() for p in processes]
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        if killed:
            name = signal.Signals(-codes[killed[0]]).name
            raise ValueError(f"worker {killed[0]} was ended by {name}: continue with --resume")
        return max(code or 0 for code in codes)
    finally:
        for process in processes:
            process.terminate()  # it deletes its half-written files
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def check_machines(args, config, workers):
    """Raise ValueError for what would end a run, or spoil it, after hours: a folder that cannot be
    written, a name too long for the data loader's sockets, machines with different code.
    """
    if not args.resume and workers.rank == 0:
        data.check_output(Path(config["runtime"]["directory"], "config.yaml"), (".yaml",))
    if len(tempfile.gettempdir()) > 75:  # a socket has 107: /pymp-12345678/listener-12345678
        raise ValueError("TMPDIR must have at most 75 letters: sockets need short names")
    files = sorted(DEFAULTS.parent.glob("*.py"))
    code = [torch.__version__, *(file.read_bytes() for file in files)]
    if not workers.agree(checksum(code)):
        raise ValueError("the machines have different versions of this code or of torch")


def run_action(args, config, devices, workers):
    """Do what the command line asks for, in this process."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(devices[rank % len(devices)])
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, data.num_cpus() // neighbors))
    if args.action not in ("train", "evaluate") and workers.rank > 0:
        return  # one process does it
    if args.action == "generate":
        generate(args, config, device)
    elif args.action == "personalize":
        personalize_own(args, config, device)
    elif args.action == "dry-run":
        dry_run(args, config, device)
    else:
        check_machines(args, config, workers)
        with workers.first_on_machine():
            people = load_people(config)  # its errors come before anything is written
        clips = [
            (c.person, c.name, c.num_frames) for p in people for own in p.values() for c in own
        ]
        if not workers.agree(checksum(clips)):
            raise ValueError(f"{config['data']['root']}: its clips differ between the machines")
        run = None
        if workers.rank == 0:
            run = Path(args.resume) if args.resume else make_run_folder(config)
        run = workers.broadcast(run)
        with run_lock(run) if workers.rank == 0 else contextlib.nullcontext():
            if workers.rank == 0:
                check_people(run, people)
                if not (run / "config.yaml").exists():
                    save_config(run, config)
                log(run, f"run: {run}")
            train(config, people, run, device, workers, args.action == "train")


def make_run_folder(config):
    """Make the folder of a new run and return it; each run of the same second gets its own."""
    while True:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config['name']}"
        run = Path(config["runtime"]["directory"], name)
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            time.sleep(0.1)


def check_people(run, people):
    """Write the people by role and their clips to people.json.

    Raises ValueError if a resumed run had other ones, compared by name and file size: a client
    might be public now, or be tested on clips that it was trained on.
    """
    path = run / "people.json"
    roles = {}
    for role, members in people._asdict().items():
        roles[role] = {}
        for name, own in members.items():
            roles[role][name] = [[clip.name, os.path.getsize(clip.path)] for clip in own]
    if not path.exists() and not (run / "last.pt").exists():
        write_text(path, json.dumps(roles))
        return
    before = read_people(run)
    changed = {
        name
        for role in roles
        for name in roles[role] | before[role]
        if roles[role].get(name) != before[role].get(name)
    }
    if changed:
        names = ", ".join(sorted(changed)[:5])
        raise ValueError(f"--resume: the clips or the role of {names} have changed ({path})")


def read_people(run):
    """Return the people of a run, {role: {name: clips}}; raises ValueError if people.json is lost
    or damaged.
    """
    path = run / "people.json"
    try:
        roles = json.loads(path.read_text())
        return {role: dict(roles[role]) for role in data.People._fields}
    except FileNotFoundError:
        raise ValueError(f"{path}: lost: who was a client is not known any more") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: damaged: who was a client is not known any more") from None


def configure(args):
    """Return the config of the command line, checked against that of the run that it resumes."""
    if args.resume is None:
        return load_config(args.config or DEFAULTS, args.preset, args.set)
    if args.config is not None:
        raise ValueError("--resume reads the run's own config.yaml: leave out --config")
    run = Path(args.resume)
    saved = read_yaml(run / "config.yaml")
    if "presets" in saved:
        raise ValueError(f"--resume {run}: no run is there, but a config.yaml with presets")
    own = load_config(run / "config.yaml")
    made_with = fixed_settings(own)
    lacking = made_with.keys() - fixed_settings(saved).keys()
    if lacking:
        raise ValueError(
            f"{run / 'config.yaml'} has no {', '.join(sorted(lacking))}: the run was made by another "
            "version of this code"
        )
    config = load_config(run / "config.yaml", args.preset, args.set)
    fixed = fixed_settings(config)
    for name, value in made_with.items():
        if value != fixed[name]:
            raise ValueError(f"--resume: the run was made with {name}={value}, not {fixed[name]}")
    root = Path(config["data"]["root"])
    if args.action in ("train", "evaluate") and not root.exists():  # new talkers would be others
        raise ValueError(f"no dataset at {root.absolute()}: --set data.root=DIR")
    needed = []
    if args.action in ("evaluate", "generate", "personalize"):
        needed = ["backbone.pt", "last.pt"]
    if args.action == "evaluate":  # it trains nothing: the run must be finished
        needed.append("report.json")
    for name in needed:
        if not (run / name).exists():
            raise ValueError(f"--resume {run}: no {name} there: the run has not come that far")
    if args.action == "evaluate" and config["personal"] != own["personal"]:
        raise ValueError(NO_TRAINING)
    return config


def main(argv=None):
    """Run the command line; a user's error is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    resumable = "; a run that has begun continues with --resume" if args.action == "train" else ""
    with data.errors_in_one_line("interrupted" + resumable):
        size = int(os.environ.get("WORLD_SIZE", 1))
        devices = choose_devices(args.gpus)
        if size > 1:
            data.die_with_parent(os.getppid())  # torchrun's workers, too
            # The other workers wait while rank 0 trains the backbone.
            timeout = datetime.timedelta(days=30)
            with fed.peers_alive():
                torch.distributed.init_process_group("gloo", timeout=timeout)
        workers = fed.Workers()
        config = None
        if workers.rank == 0:  # the folder of a run need not be there on every machine
            config = configure(args)
            if args.action in ("train", "evaluate"):
                metrics.load_standard(config["weights"])  # raises now what would fail at the end
        config = workers.broadcast(config)
        if size == 1 and len(devices) > 1 and args.action in ("train", "evaluate"):
            sys.exit(launch(argv, len(devices)))
        run_action(args, config, devices, workers)
        if size > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.set_up_process()
    main()
