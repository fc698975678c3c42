"""The federation: Eq. 12 on each client, reliability, and the private, secure, identity-stable mean at the server.

A batch is a dict: frames [b f 3 H W] and reference [b 3 H W] in [-1, 1], mel [b f n m], motion [b f m h w],
reference_latents [b c h w], words [b n] of the prompt. Clients draw their own; nothing here reads files.
"""

import contextlib
import math
import signal
import time
import warnings
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange

import lora
import metrics
import privacy
from model import CONDITIONS, KNOWN_FRAMES

CONTINUED = 0.25  # share of training clips that go on from frames without noise


@dataclass(frozen=True)
class Client:
    """One person: `draw(batch_size, num_frames, generator)` gives training batches, `validation()` one fixed batch.

    That batch also has other_reference [b 3 H W], pictures from training clips: to generate, a clip's own won't do.
    """

    name: str
    num_samples: int
    draw: Callable
    validation: Callable


# ---------------------------------------------------------------------------------------------- the objective


def tdc_loss(eps_hat, eps):
    """Temporal-denoising consistency of b f c h w (Eq. 8): mean |(eps_hat_{f+1} - eps_hat_f) - (eps_{f+1} - eps_f)|."""
    error = eps_hat - eps
    return (error[:, 1:] - error[:, :-1]).abs().mean()


def noised(model, batch, t, eps, scales=None, bf16=False):
    """Network output, its target, and the implied x0 and eps, for a batch at timesteps t [b] or, by frame, [b f]; with
    `bf16` the network multiplies in bfloat16."""
    x0 = batch["motion"] / model.spread
    xt = model.diffusion.add_noise(x0, t, eps)
    with torch.autocast(xt.device.type, torch.bfloat16, enabled=bf16):
        conditions = model.conditions(batch["mel"], batch["reference"], batch["words"], scales)
        output = model(xt, t, conditions, batch["reference_latents"])
    return output, model.diffusion.target(x0, t, eps), *model.diffusion.split(output, xt, t)


def stratified_timesteps(model, num, generator):
    """Integer timesteps [num], one in each of `num` equal strata: an unbiased mean over t of less variance."""
    u = (torch.rand((), generator=generator) + torch.arange(num) / num) % 1
    return (u * model.diffusion.num_steps).long()


def with_chance(model, batch, weights, generator, condition_dropout):
    """The batch with what Eq. 12 leaves to chance: t [b f], eps as motion, kept [b 3], and what the judges see.

    Speech, identity and text are each withheld from a share `condition_dropout` of the clips (kept 0); a share CONTINUED
    knows its first frames, without noise (t = -1), as the windows of a long clip do. The judges see one clip, drawn with
    probability ~ alpha_bar: the expectation of weighting all by it, at a fraction of the cost. `judged` [b], on the CPU,
    is the weight of their terms, zero but for that clip; `first` [b] its first frame.
    """
    b, f = batch["motion"].shape[:2]
    t, eps = stratified_timesteps(model, b, generator), torch.randn(batch["motion"].shape, generator=generator)
    kept = (torch.rand(b, 3, generator=generator) >= condition_dropout).float()
    num_known = min(KNOWN_FRAMES, f // 2) * (torch.rand(b, generator=generator) < CONTINUED)
    known = torch.arange(f) < num_known[:, None]  # b f
    chance = {"t": t[:, None].where(~known, -1), "eps": eps * ~known[:, :, None, None, None], "kept": kept}
    chance = {name: value.to(batch["motion"].device) for name, value in chance.items()}
    judged, first = torch.zeros(b), torch.zeros(b, dtype=torch.long)
    if weights["identity"] or weights["perceptual"] or weights["sync"]:
        alpha_bar = model.diffusion.alpha_bar[t]
        judged[torch.multinomial(alpha_bar, 1, generator=generator)] = alpha_bar.mean()
        first += torch.randint(f - 4, (), generator=generator)
    return batch | chance | {"judged": judged, "first": first}


def objective(model, batch, weights, judges, share=1.0, bf16=False):
    """Eq. 12 of clips that are `share` of a batch, `with_chance`: the loss to minimise and its terms by name.

    L_diff is the squared error of what the network states (`TalkingHead.loss`). For v and x0 this is Eq. 6 divided by
    alpha_bar_t, which keeps the step of pure noise in the loss. `weights` holds tdc, identity, perceptual and sync.
    """
    t, eps, scales = batch["t"], batch["eps"], dict(zip(CONDITIONS, batch["kept"].T))
    output, target, x0_hat, eps_hat = noised(model, batch, t, eps, scales, bf16)
    terms = {"diffusion": share * model.loss(output, target, t).mean()}
    if weights["tdc"]:
        terms["tdc"] = share * tdc_loss(eps_hat, eps)
    for i in batch["judged"].nonzero().flatten().tolist():
        picked, first = {key: batch[key][i:i + 1] for key in ("frames", "reference", "mel")}, int(batch["first"][i])
        weight, window = float(batch["judged"][i]), slice(first, first + 5)
        terms |= judged_terms(model, judges, picked, x0_hat[i:i + 1], weight, window)
    loss = terms["diffusion"] + sum(weights[name] * term for name, term in terms.items() if name != "diffusion")
    return loss, {name: float(term.detach()) for name, term in terms.items()}


def accumulate(model, batch, judges, generator, *, loss_weights, condition_dropout, micro_batch=0, bf16=False):
    """Leave the gradient of Eq. 12 on a batch in the parameters, `micro_batch` clips at a time (0: all at once).

    Returns its terms and the micro-batch that fitted: half as many clips each time that CUDA runs out of memory. Chance
    is drawn for the whole batch, so that its gradient is the same up to rounding, however it is cut.
    """
    batch, num = with_chance(model, batch, loss_weights, generator, condition_dropout), len(batch["motion"])
    micro_batch, terms = min(micro_batch or num, num), None
    while terms is None:
        model.zero_grad()
        try:
            terms = {}
            for i in range(0, num, micro_batch):
                part = {k: v[i:i + micro_batch] for k, v in batch.items() if torch.is_tensor(v)}
                loss, own = objective(model, part, loss_weights, judges, len(part["t"]) / num, bf16)
                loss.backward()
                terms = {name: terms.get(name, 0.0) + own.get(name, 0.0) for name in terms | own}
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
            terms, micro_batch = None, (micro_batch + 1) // 2
            warnings.warn(f"CUDA ran out of memory: micro-batches of {micro_batch} clips from here on")
    return terms, micro_batch


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
def validation_loss(model, batch, seed, num_levels=8, scales=None):
    """The share of each clip's own motion that stays unexplained [b], in the mean over evenly spaced timesteps, with
    noise fixed by `seed`. A network that always says "as in the reference" has 1. `scales` as in `TalkingHead.conditions`."""
    x0 = batch["motion"] / model.spread
    generator, errors = torch.Generator().manual_seed(seed), []
    for level in range(num_levels):
        t = torch.full((len(x0),), int((level + 0.5) / num_levels * model.diffusion.num_steps), device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        _, _, x0_hat, _ = noised(model, batch, t, eps, scales)
        errors.append((x0_hat - x0).square().flatten(1).mean(1))
    return torch.stack(errors).mean(0) / x0.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------- one client


def train_adapter(model, judges, draw, start, num_steps, seed, *, lr, batch_size, num_frames, optimizer="adamw",
                  proximal=0.0, correction=None, micro_batch=0, **terms_of):
    """Train the adapter from the vector `start` [d] for `num_steps`; returns the new vector and the mean loss terms.

    `proximal` is FedProx's mu: it adds (mu / 2) |phi - g|^2 to the loss (Li et al. 2020, Eq. 2). `correction` [d] is
    SCAFFOLD's c - c_i, added to every gradient (Karimireddy et al. 2020, Alg. 1); `optimizer` sgd is plain, of constant
    rate, as its control variates ask. The rest goes to `accumulate`.
    """
    parameters = lora.load_adapter_vector(model, start)
    anchors = [p.detach().clone() for p in parameters] if proximal else []
    corrections = lora.split_vector(parameters, correction) if correction is not None else []
    if optimizer == "adamw":
        adamw = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator, sums = torch.Generator().manual_seed(seed), {}
    torch.default_generator.manual_seed(seed)  # adapter dropout draws from the global one, of the CPU or of the GPU;
    if torch.cuda.is_initialized():  # torch.manual_seed does both, in a millisecond where there is no GPU
        torch.cuda.manual_seed_all(seed)
    model.unet.train()
    try:
        for step in range(num_steps):
            batch = draw(batch_size, num_frames, generator)
            terms, micro_batch = accumulate(model, batch, judges, generator, micro_batch=micro_batch, **terms_of)
            with torch.no_grad():
                for p, anchor in zip(parameters, anchors):
                    p.grad += proximal * (p - anchor)
                for p, c in zip(parameters, corrections):
                    p.grad += c
                if optimizer == "sgd":
                    for p in parameters:
                        p.add_(p.grad, alpha=-lr)
                else:
                    adamw.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / num_steps))  # constant, then to zero
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    adamw.step()
            sums = {name: sums.get(name, 0.0) + value / num_steps for name, value in terms.items()}
    finally:
        model.unet.eval()
    return lora.join_vector(parameters), sums


@torch.no_grad()
def reliability(model, judges, batch, alpha, public_jitter, seed, **sampling):
    """The paper's r = alpha ID + (1 - alpha) TS in [0, 1], from clips generated for held-out samples.

    ID is the cosine to the reference's identity, TS = exp(-max(0, jitter / public_jitter - 1)): a client whose
    clips shake no more than public people's is fully stable, whatever its own clips look like.
    """
    reference = batch["other_reference"]
    frames = unit_range(model.generate(reference, batch["mel"], batch["words"], torch.Generator().manual_seed(seed),
                                       **sampling))
    person = judges.identity(unit_range(reference))
    similarity = judges.identity(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    identity = float((similarity * person[:, None]).sum(-1).mean().clamp(0, 1))
    jitter = float(np.mean([metrics.temporal_jitter(clip) for clip in frames]))
    stability = within(jitter, public_jitter)
    return alpha * identity + (1 - alpha) * stability, {"identity": identity, "stability": stability}


def within(value, public):
    """1 for a value up to that of public people, falling exponentially with its excess over it."""
    return math.exp(-max(0.0, value / public - 1))


def unexplained(model, batch, seed):
    """Shares of the clips' motion that stay unexplained, in their mean: with their speech, and without."""
    return [float(validation_loss(model, batch, seed, 4, scales).mean()) for scales in (None, {"speech": 0.0})]


def explained_reliability(model, batch, alpha, public, seed):
    """r = alpha SP + (1 - alpha) FIT in [0, 1], from how the model explains the motion u of held-out clips themselves.

    It sees what generated clips do not show, as the model makes clean ones from a poor client's speech all the same:
    FIT = exp(-max(0, u / u_public - 1)) falls with flicker and noise, which nothing explains; SP, the part that speech
    has in the explanation over that of public people's, is 0 where the sound is not that of the picture.
    """
    (heard, silent), (public_heard, public_silent) = unexplained(model, batch, seed), public
    speech = min(1.0, max(0.0, (silent - heard) / max(public_silent - public_heard, 1e-6)))
    fit = within(heard, public_heard)
    return alpha * speech + (1 - alpha) * fit, {"speech": speech, "fit": fit}


def isfa_weight(num_samples, reliability, gamma, cap):
    """w = min(n, cap) / cap * exp(gamma (r - 1)), in (0, 1]: ISFA's ratios n exp(gamma r), bounded. gamma = 0: FedAvg."""
    return min(num_samples, cap) / cap * math.exp(gamma * (reliability - 1))


def num_steps(client, settings):
    """Gradient steps of one client in one round."""
    return max(1, round(settings["local_epochs"] * client.num_samples / settings["train"]["batch_size"]))


def client_update(model, judges, client, adapter, seed, settings, control=None, own_control=None):
    """One client's share of a round: (update [d], weight, record).

    With SCAFFOLD's control variates c and c_i [d] the update is [2 d]: that of the adapter, then that of c_i, which is
    c_i+ - c_i = (x - y_i) / (K lr) - c (option II of Karimireddy et al. 2020, Alg. 1).
    """
    started, steps, train = time.perf_counter(), num_steps(client, settings), settings["train"]
    correction = None if control is None else control - own_control
    trained, terms = train_adapter(model, judges, client.draw, adapter, steps, seed, **train, correction=correction)
    update = trained.sub_(adapter)
    if control is not None:
        update = torch.cat([update, -update / (steps * train["lr"]) - control])
    r, parts = 1.0, {}
    if settings["gamma"]:
        held_out, alpha, public = client.validation(), settings["reliability_alpha"], settings["public"]
        r, parts = (reliability(model, judges, held_out, alpha, public, seed, **settings["sampling"])
                    if settings["reliability"] == "generated" else
                    explained_reliability(model, held_out, alpha, public, seed))
    weight = isfa_weight(client.num_samples, r, settings["gamma"], settings["sample_cap"])
    record = {"client": client.name, "steps": steps, "terms": terms, "reliability": r, **parts, "weight": weight,
              "seconds": time.perf_counter() - started}
    return update.numpy(), weight, record


def membership_gains(model, batch, adapter, updates, seed):
    """How much better [u b] each of `updates` [u d] denoises each clip of a batch: evidence that it was trained on.

    The loss-threshold attack of Yeom et al. (2018), with the model before the update as the reference.
    """
    losses = []
    for vector in (adapter, *(adapter + torch.as_tensor(update).float() for update in updates)):
        lora.load_adapter_vector(model, vector)
        losses.append(validation_loss(model, batch, seed))
    return losses[0] - torch.stack(losses[1:])


# ---------------------------------------------------------------------------------------------- one round


def poisson_cohort(num_clients, sample_rate, round_index, seed):
    """Client indices of a round: each joins independently with probability `sample_rate`."""
    draws = torch.rand(num_clients, generator=torch.Generator().manual_seed(derived_seed(seed, round_index)))
    return torch.nonzero(draws < sample_rate).flatten().tolist()


def derived_seed(*parts):
    """One 63-bit seed from several integers, the same in every process and order."""
    return int(np.random.SeedSequence([int(p) for p in parts]).generate_state(1, np.uint64)[0] >> 1)


class Workers:
    """The processes of a run: one a device, each with its own model. Rank 0 is also the server.

    They are those of torch.distributed where it is initialised, else (or if asked for) this process alone. All that
    travels between them goes through `ask`: adapters, records, protocol messages.
    """

    def __init__(self, alone=False):
        alone = alone or not dist.is_initialized()
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def ask(self, item, answer):
        """`answer` of every process's `item`, worked out at the server and given to all; so is an error of it."""
        if self.size == 1:
            return answer([item])
        items, reply = [None] * self.size if self.rank == 0 else None, [None]
        with still_there():
            dist.gather_object(item, items)
        if self.rank == 0:
            try:
                reply = [(answer(items), None)]
            except (ValueError, OSError, RuntimeError) as error:
                reply = [(None, error)]
        with still_there():
            dist.broadcast_object_list(reply)
        result, error = reply[0]
        if error is not None:
            raise error
        return result

    def in_turn(self, make):
        """make() in every process, first at the server: the files that it makes are there for the others."""
        first = []
        self.ask(None, lambda _: first.append(make()))
        return first[0] if first else make()

    def share(self, loads):
        """The indices of `loads` that fall to this process: heaviest first, each to whom has least to do (Graham 1969)."""
        busy, own = [0.0] * self.size, []
        for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
            rank = busy.index(min(busy))
            busy[rank] += loads[i]
            own += [i] if rank == self.rank else []
        return own


@contextlib.contextmanager
def still_there():
    """ConnectionError where another process is gone; a while later, as who started this one may end it and say more."""
    try:
        yield
    except RuntimeError:
        time.sleep(5)
        raise ConnectionError("another worker is gone: go on with --resume") from None


def union(parts):
    """One dict of the processes' dicts, in the order of its keys: no sum depends on who worked out what."""
    return dict(sorted((key, value) for part in parts for key, value in part.items()))


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError in this block after `seconds`; 0 is no limit. Main thread only."""
    if not seconds:
        yield
        return

    def expire(*_):
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def dropout_stage(rate, *seeds):
    """The stage before which a client leaves its round: training or one of the protocol's; None for 1 - rate of them."""
    if not rate:
        return None
    u, stages = np.random.default_rng(derived_seed(*seeds)).random(2), ("training", *privacy.STAGES)
    return stages[int(u[1] * len(stages))] if u[0] < rate else None


def train_cohort(model, judges, clients, cohort, state, round_index, seed, settings, workers):
    """This process's clients of the cohort: ({client: (update, weight)}, {client: record}). One that throws, hangs past
    its time or returns what is not finite loses its own update only: its record has a reason instead."""
    updates, records = {}, {}
    for position in workers.share([clients[i].num_samples for i in cohort]):
        i = cohort[position]
        stage = dropout_stage(settings["dropout_rate"], seed, round_index, i, 1)
        try:
            if stage == "training":
                raise RuntimeError("left before training")
            with time_limit(settings["client_timeout_seconds"]):
                control = (state["control"], state["controls"][i]) if "control" in state else ()
                update, weight, about = client_update(model, judges, clients[i], state["adapter"],
                                                      derived_seed(seed, round_index, i), settings, *control)
            norm = float(np.linalg.norm(update))
            if not math.isfinite(norm):
                raise ValueError("update is not finite")
            updates[i], records[i] = (update, weight), about | {"norm": norm, "leaves": stage}
        except Exception as error:  # whatever a client does, the round goes on
            reason = str(error) if type(error) in (ValueError, RuntimeError, TimeoutError) else repr(error)
            records[i] = {"client": clients[i].name, "reason": reason}
    return updates, records


def run_round(model, judges, clients, state, round_index, seed, mechanism, settings, workers=None):
    """Algorithm 1, one round: (new state, record). `mechanism` None aggregates in the clear, unclipped.

    `state` holds the global adapter [d] and, for SCAFFOLD, control [d] and controls {client: [d]}. A cohort too small
    to aggregate leaves it as it was. The same state comes out whatever the number of processes: a client's randomness
    follows from (seed, round, client), and the sum is one of integers, or taken in the clients' order.
    """
    workers, clock = workers or Workers(), time.perf_counter
    started, cohort = clock(), poisson_cohort(len(clients), settings["sample_rate"], round_index, seed)
    if settings["algorithm"] == "centralized":
        return centralized_round(model, judges, clients, cohort, state, round_index, seed, settings, workers)
    updates, own = train_cohort(model, judges, clients, cohort, state, round_index, seed, settings, workers)
    busy, trained = clock() - started, clock()
    records, busy = workers.ask((own, busy), lambda parts: (union(p[0] for p in parts), [p[1] for p in parts]))
    record = {"round": round_index, "cohort": [clients[i].name for i in cohort],
              "dropouts": [{"client": r["client"], "reason": r["reason"]} for r in records.values() if "reason" in r]}
    present = [i for i, r in records.items() if "reason" not in r]
    drop = {stage: [i for i in present if records[i]["leaves"] == stage] for stage in privacy.STAGES}
    record["seconds"] = {"clients": trained - started, "waiting": max(busy) - min(busy)}
    mean, survivors, about = aggregate(updates, present, mechanism, round_index, drop, workers)
    record["dropouts"] += [{"client": clients[i].name, "reason": f"left before {records[i]['leaves']}"}
                           for i in present if records[i]["leaves"] and i not in survivors]
    record["clients"] = [records[i] for i in survivors]
    record["idle"] = 1 - sum(busy) / (len(busy) * max(busy))
    record |= about | summary(record["clients"], mechanism)
    if mean is not None:
        state = move(state, torch.from_numpy(mean).float(), updates, survivors, len(clients), settings, workers)
    record["seconds"]["aggregation"] = clock() - trained
    return state, record


def move(state, mean, updates, survivors, num_clients, settings, workers):
    """The server's step: x += eta mean(dx), and for SCAFFOLD c += |S| / N mean(dc), c_i += dc_i of the survivors."""
    d = len(state["adapter"])
    after = state | {"adapter": torch.add(state["adapter"], mean[:d], alpha=settings["server_lr"])}
    if "control" in state:
        after["control"] = state["control"] + len(survivors) / num_clients * mean[d:]
        own = {i: state["controls"][i] + torch.from_numpy(updates[i][0][d:]) for i in updates if i in survivors}
        after["controls"] = state["controls"] | workers.ask(own, union)
    return after


def centralized_round(model, judges, clients, cohort, state, round_index, seed, settings, workers):
    """As many gradient steps as the cohort would take, on all clients' pooled clips: the upper bound without privacy."""
    def draw(batch_size, num_frames, generator):
        picks = torch.randint(len(clients), (batch_size,), generator=generator).tolist()
        return join_batches([clients[i].draw(1, num_frames, generator) for i in picks])

    def train(_):
        return train_adapter(model, judges, draw, state["adapter"], steps, derived_seed(seed, round_index, 0),
                             **settings["train"])

    started, steps = time.perf_counter(), sum(num_steps(clients[i], settings) for i in cohort)
    adapter, terms = workers.ask(None, train)
    return state | {"adapter": adapter}, {
        "round": round_index, "cohort": [clients[i].name for i in cohort], "dropouts": [], "clients": [], "steps": steps,
        "terms": terms, "bytes_up": 0, "seconds": {"clients": time.perf_counter() - started}}


def join_batches(parts):
    """Batches as one; only their tensors."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if torch.is_tensor(parts[0][key])}


def aggregate(updates, present, mechanism, round_index, drop=None, workers=None):
    """The ISFA mean [d] of the updates, or None where too few clients are left; the survivors; and what to say of it.

    `updates` {client: (update, weight)} are this process's, `present` names all that arrived. `drop` as in
    `privacy.run_protocol`. Without a mechanism every client of `drop` is just left out.
    """
    workers, drop = workers or Workers(), drop or {}
    if mechanism is None:
        survivors = sorted(set(present).difference(*drop.values()))
        return clear_mean({i: updates[i] for i in updates if i in survivors}, survivors, workers)
    least = max(2, mechanism.min_honest)
    if len(present) < least:
        return None, [], {"skipped": f"{len(present)} clients are left, {least} are needed"}
    threshold, place = len(present) // 2 + 1, {i: k for k, i in enumerate(present)}

    def upload(k):  # leaves the client as integers on the ring, clipped, weighted, noised; masked by the protocol
        contribution, _ = mechanism.contribution(*updates[present[k]])
        return mechanism.encode(contribution, round_index, present[k])

    try:
        terms = workers.ask(None, lambda _: privacy.Terms(
            len(present), mechanism.coordinates, threshold, min_survivors=max(threshold, mechanism.min_honest),
            largest=mechanism.largest, ring=mechanism.ring))
        total, survivors = privacy.run_protocol(terms, upload, {s: [place[i] for i in who] for s, who in drop.items()},
                                                [place[i] for i in updates], workers.ask)
    except privacy.AggregationAborted as error:
        return None, [], {"skipped": str(error)}
    # The server's noise, if there is one, is drawn once.
    mean, weight_sum, unclipped = workers.ask(None, lambda _: mechanism.decode(total, len(survivors), round_index))
    return mean, [present[k] for k in survivors], {
        "weight_sum": weight_sum, "bytes_up": mechanism.num_bytes, "clip_norm": mechanism.clip_norm,
        "unclipped_fraction": unclipped}


def clear_mean(updates, survivors, workers):
    """`aggregate` without a mechanism: the server sees every update."""
    if not survivors:
        return None, [], {"skipped": "no client is left"}

    def weighted_mean(parts):
        pairs = union(parts).values()
        mean, total = torch.zeros(len(next(iter(pairs))[0])), sum(weight for _, weight in pairs)
        for update, weight in pairs:
            mean.add_(torch.from_numpy(update), alpha=weight / total)
        return mean.numpy(), total

    mean, weight_sum = workers.ask(updates, weighted_mean)
    return mean, survivors, {"weight_sum": weight_sum, "bytes_up": 4 * (len(mean) + 1)}


def summary(clients, mechanism):
    """Loss terms averaged over a round's clients, and how large their updates were."""
    if not clients:
        return {}
    terms = {name: float(np.mean([c["terms"][name] for c in clients])) for name in clients[0]["terms"]}
    norms = [c["norm"] for c in clients]
    clipped = float(np.mean([n > mechanism.clip_norm for n in norms])) if mechanism else 0.0
    return {"terms": terms, "clipped_fraction": clipped,
            "update_norm": {"min": min(norms), "median": float(np.median(norms)), "max": max(norms)}}
