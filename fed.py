"""The federation: Eq. 12 on each client, reliability, and the private, secure, identity-stable mean at the server.

A batch is a dict: frames [b f 3 H W] and reference [b 3 H W] in [-1, 1], mel [b f n m], motion [b f m h w],
reference_latents [b c h w]. Clients draw their own; nothing here reads files.
"""

import math
import time
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from einops import rearrange

import lora
import metrics
import privacy


@dataclass(frozen=True)
class Client:
    """One person: `draw(batch_size, num_frames, generator)` gives training batches, `validation` is one fixed batch.

    That batch also has other_reference [b 3 H W], pictures from training clips: to generate, a clip's own won't do.
    """

    name: str
    num_samples: int
    draw: Callable
    validation: dict


# ---------------------------------------------------------------------------------------------- the objective


def tdc_loss(eps_hat, eps):
    """Temporal-denoising consistency of b f c h w (Eq. 8): mean |(eps_hat_{f+1} - eps_hat_f) - (eps_{f+1} - eps_f)|."""
    error = eps_hat - eps
    return (error[:, 1:] - error[:, :-1]).abs().mean()


def noised(model, batch, t, eps, keep_speech=None):
    """Network output, its target, and the implied x0 and eps, for a batch at timesteps t [b]."""
    x0 = batch["motion"] / model.spread
    xt = model.diffusion.add_noise(x0, t, eps)
    speech, identity = model.conditions(batch["mel"], batch["reference"], keep_speech)
    output = model(xt, t, speech, identity, batch["reference_latents"])
    return output, model.diffusion.target(x0, t, eps), *model.diffusion.split(output, xt, t)


def stratified_timesteps(model, num, generator):
    """Integer timesteps [num], one in each of `num` equal strata: an unbiased mean over t of less variance."""
    u = (torch.rand((), generator=generator) + torch.arange(num) / num) % 1
    return (u * model.diffusion.num_steps).long()


def objective(model, batch, weights, judges, generator, speech_dropout):
    """Eq. 12: the loss to minimise and its terms by name.

    L_diff is the squared error of what the network states (`TalkingHead.loss`). For v and x0 this is Eq. 6 divided by
    alpha_bar_t, which keeps the step of pure noise in the loss. `weights` holds tdc, identity, perceptual and sync.
    """
    device = batch["motion"].device
    t = stratified_timesteps(model, len(batch["motion"]), generator).to(device)
    eps = torch.randn(batch["motion"].shape, generator=generator).to(device)
    keep = torch.rand(len(t), generator=generator).to(device) >= speech_dropout
    output, target, x0_hat, eps_hat = noised(model, batch, t, eps, keep)
    terms = {"diffusion": model.loss(output, target, t).mean()}
    if weights["tdc"]:
        terms["tdc"] = tdc_loss(eps_hat, eps)
    if weights["identity"] or weights["perceptual"] or weights["sync"]:
        # One clip, drawn with probability ~ alpha_bar: the expectation of weighting all by it, at a fraction of the cost.
        alpha_bar = model.diffusion.alpha_bar[t.cpu()]
        picks = torch.multinomial(alpha_bar, 1, generator=generator).to(device)
        first = int(torch.randint(x0_hat.shape[1] - 4, (), generator=generator))
        picked = {key: batch[key][picks] for key in ("frames", "reference", "mel")}
        terms |= judged_terms(model, judges, picked, x0_hat[picks], float(alpha_bar.mean()), slice(first, first + 5))
    loss = terms["diffusion"] + sum(weights[name] * term for name, term in terms.items() if name != "diffusion")
    return loss, {name: float(term.detach()) for name, term in terms.items()}


def judged_terms(model, judges, batch, x0_hat, weight, window):
    """L_id, L_perc and L_sync (Eq. 9-11) on five decoded frames of x0_hat, times `weight`."""
    frames = unit_range(model.decode(x0_hat[:, window], batch["reference"]))  # b 5 3 H W
    truth = unit_range(batch["frames"][:, window])
    flat = rearrange(frames, "b f c h w -> (b f) c h w")
    person = judges.identity(unit_range(batch["reference"]))  # b d
    similarity = (judges.identity(frames[:, 2]) * person).sum(-1)
    distance = judges.perceptual(flat, rearrange(truth, "b f c h w -> (b f) c h w")).view(len(frames), -1).mean(1)
    heard, seen = judges.mouth_audio(batch["mel"][:, window]), judges.mouth_video(frames)  # b 1 d
    sync = (heard * seen).sum(-1).mean(1)
    return {"identity": weight * (1 - similarity).mean(), "perceptual": weight * distance.mean(),
            "sync": weight * (1 - sync).mean()}


def unit_range(frames):
    """[-1, 1] -> [0, 1], clamped as a screen would."""
    return ((frames + 1) / 2).clamp(0, 1)


@torch.no_grad()
def validation_loss(model, batch, seed, num_levels=8):
    """The share of each clip's own motion that stays unexplained [b], in the mean over evenly spaced timesteps, with
    noise fixed by `seed`. A network that always says "as in the reference" has 1."""
    x0 = batch["motion"] / model.spread
    generator, errors = torch.Generator().manual_seed(seed), []
    for level in range(num_levels):
        t = torch.full((len(x0),), int((level + 0.5) / num_levels * model.diffusion.num_steps), device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        _, _, x0_hat, _ = noised(model, batch, t, eps)
        errors.append((x0_hat - x0).square().flatten(1).mean(1))
    return torch.stack(errors).mean(0) / x0.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------- one client


def train_adapter(model, judges, draw, start, num_steps, seed, *, lr, batch_size, num_frames, loss_weights,
                  speech_dropout, proximal=0.0, on_step=None):
    """Train the adapter from the vector `start` [d] for `num_steps`; returns the new vector and the mean loss terms.

    `proximal` is FedProx's mu: it adds (mu / 2) |phi - g|^2 to the loss (Li et al. 2020, Eq. 2).
    """
    lora.load_adapter_vector(model, start)
    parameters = lora.adapter_parameters(model)
    anchors = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator, sums = torch.Generator().manual_seed(seed), {}
    torch.manual_seed(seed)  # adapter dropout draws from the global generator
    model.unet.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - step / num_steps))  # constant, then linear to zero
        loss, terms = objective(model, draw(batch_size, num_frames, generator), loss_weights, judges, generator,
                                speech_dropout)
        if proximal:
            loss = loss + proximal / 2 * sum((p - a).square().sum() for p, a in zip(parameters, anchors))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sums = {name: sums.get(name, 0.0) + value / num_steps for name, value in terms.items()}
        if on_step:
            on_step(terms)
    model.unet.eval()
    return lora.adapter_vector(model), sums


def reliability(model, judges, batch, alpha, public_jitter, seed, **sampling):
    """r = alpha ID + (1 - alpha) TS in [0, 1], from clips generated for held-out samples.

    ID is the cosine to the reference's identity, TS = exp(-max(0, jitter / public_jitter - 1)): a client whose
    clips shake no more than public people's is fully stable, whatever its own clips look like.
    """
    noise = torch.randn(batch["motion"].shape, generator=torch.Generator().manual_seed(seed))
    reference = batch["other_reference"]
    frames = unit_range(model.generate(reference, batch["mel"], noise.to(reference.device), **sampling))
    person = judges.identity(unit_range(reference))
    similarity = judges.identity(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    identity = float((similarity * person[:, None]).sum(-1).mean().clamp(0, 1))
    jitter = float(np.mean([metrics.temporal_jitter(clip) for clip in frames]))
    stability = math.exp(-max(0.0, jitter / public_jitter - 1))
    return alpha * identity + (1 - alpha) * stability, {"identity": identity, "stability": stability}


def isfa_weight(num_samples, reliability, gamma, cap):
    """w = min(n, cap) / cap * exp(gamma (r - 1)), in (0, 1]: ISFA's ratios n exp(gamma r), bounded. gamma = 0: FedAvg."""
    return min(num_samples, cap) / cap * math.exp(gamma * (reliability - 1))


def client_update(model, judges, client, adapter, seed, settings):
    """One client's share of a round: (update [d], weight, record)."""
    started = time.perf_counter()
    steps = max(1, round(settings["local_epochs"] * client.num_samples / settings["train"]["batch_size"]))
    trained, terms = train_adapter(model, judges, client.draw, adapter, steps, seed, **settings["train"])
    r, parts = 1.0, {}
    if settings["gamma"]:
        r, parts = reliability(model, judges, client.validation, settings["reliability_alpha"],
                               settings["public_jitter"], seed, **settings["sampling"])
    weight = isfa_weight(client.num_samples, r, settings["gamma"], settings["sample_cap"])
    record = {"client": client.name, "steps": steps, "terms": terms, "reliability": r, **parts, "weight": weight,
              "seconds": time.perf_counter() - started}
    return (trained - adapter).numpy(), weight, record


def membership_gains(model, batch, adapter, update, seed):
    """How much better [b] `update` [d] denoises each clip of a batch: an attacker's evidence that it was trained on.

    The loss-threshold attack of Yeom et al. (2018), with the model before the update as the reference.
    """
    losses = []
    for vector in (adapter, adapter + update):
        lora.load_adapter_vector(model, vector)
        losses.append(validation_loss(model, batch, seed))
    return losses[0] - losses[1]


# ---------------------------------------------------------------------------------------------- one round


def poisson_cohort(num_clients, sample_rate, round_index, seed):
    """Client indices of a round: each joins independently with probability `sample_rate`."""
    draws = torch.rand(num_clients, generator=torch.Generator().manual_seed(derived_seed(seed, round_index)))
    return torch.nonzero(draws < sample_rate).flatten().tolist()


def derived_seed(*parts):
    """One 63-bit seed from several integers, the same in every process and order."""
    return int(np.random.SeedSequence([int(p) for p in parts]).generate_state(1, np.uint64)[0] >> 1)


def run_round(model, judges, clients, adapter, round_index, seed, mechanism, settings, on_client=None):
    """Algorithm 1, one round: (new global adapter [d], record). `mechanism` None aggregates in the clear, unclipped.

    A client whose update is not finite drops out; a cohort too small to aggregate leaves the adapter as it was.
    """
    started = time.perf_counter()
    cohort = poisson_cohort(len(clients), settings["sample_rate"], round_index, seed)
    record = {"round": round_index, "cohort": [clients[i].name for i in cohort], "dropouts": [], "clients": []}
    updates, weights = [], []
    for i in cohort:
        update, weight, about = client_update(model, judges, clients[i], adapter, derived_seed(seed, round_index, i),
                                              settings)
        if np.isfinite(update).all():
            updates.append(update), weights.append(weight), record["clients"].append(about)
        else:
            record["dropouts"].append({"client": clients[i].name, "reason": "update is not finite"})
        if on_client:
            on_client(about)
    norms = [float(np.linalg.norm(u)) for u in updates]
    record["seconds"] = {"clients": time.perf_counter() - started}
    mean, about = aggregate(updates, weights, mechanism, round_index)
    record |= about | summary(record["clients"], norms, mechanism)
    record["seconds"]["aggregation"] = time.perf_counter() - started - record["seconds"]["clients"]
    return adapter + settings["server_lr"] * torch.from_numpy(mean).float() if mean is not None else adapter, record


def aggregate(updates, weights, mechanism, round_index):
    """The ISFA mean [d] of the updates, or None where too few clients are left, and what there is to say of it."""
    if mechanism is None:
        if not updates:
            return None, {"skipped": "no client took part"}
        total = sum(w * u.astype(np.float64) for w, u in zip(weights, updates))
        return total / sum(weights), {"weight_sum": sum(weights), "bytes_up": 4 * (len(updates[0]) + 1)}
    if len(updates) < max(2, mechanism.min_honest):
        return None, {"skipped": f"{len(updates)} clients are left, {max(2, mechanism.min_honest)} are needed"}
    threshold = len(updates) // 2 + 1
    terms = privacy.Terms(len(updates), mechanism.coordinates, threshold,
                          min_survivors=max(threshold, mechanism.min_honest), largest=mechanism.largest,
                          ring=mechanism.ring)

    def upload(index):  # leaves the client as integers on the ring, clipped, weighted, noised; masked by the protocol
        contribution, _ = mechanism.contribution(updates[index], weights[index])
        return mechanism.encode(contribution, round_index, index)

    total, survivors = privacy.run_protocol(terms, upload)
    mean, weight_sum, unclipped = mechanism.decode(total, len(survivors), round_index)
    return mean, {"weight_sum": weight_sum, "bytes_up": mechanism.coordinates * mechanism.ring // 8,
                  "clip_norm": mechanism.clip_norm, "unclipped_fraction": unclipped}


def summary(clients, norms, mechanism):
    """Loss terms averaged over a round's clients, and how large their updates were."""
    if not clients:
        return {}
    terms = {name: float(np.mean([c["terms"][name] for c in clients])) for name in clients[0]["terms"]}
    clipped = float(np.mean([n > mechanism.clip_norm for n in norms])) if mechanism else 0.0
    return {"terms": terms, "update_norm": dict(zip(("min", "median", "max"), np.quantile(norms, (0, 0.5, 1)).tolist())),
            "clipped_fraction": clipped}
