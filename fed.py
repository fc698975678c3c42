"""The federation: Eq. 12, one client's local training, reliability and ISFA weight, the server's
update, the workers.

A batch is a dict of tensors: frames [b f 3 H W] and reference [b 3 H W] in [-1, 1], mel [b f n m],
motion [b f m h w] divided by liveliness [b], reference_latents [b c h w], words [b n] (token ids of
the prompt).
"""

import contextlib
import functools
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import data
import lora
import metrics
import model as talking
import privacy

# Share of training clips whose first frames are known, for the model to learn continuing a window.
CONTINUED = 0.25
JUDGED_FRAMES = 5  # frames that Eq. 9-11 decode: a window of the sync network
VALIDATION_FRAMES = 16


# ---------------------------------------------------------------- Eq. 12


def tdc_loss(eps_hat, eps):
    """Return the temporal-denoising consistency (Eq. 8) of eps_hat and eps [b f c h w].

    mean |(eps_hat_{f+1} - eps_hat_f) - (eps_{f+1} - eps_f)|
    """
    return (eps_hat - eps).diff(dim=1).abs().mean()


def auxiliary_losses(model, judges, batch, x0_hat):
    """Return L_id, L_perc and L_sync (Eq. 9-11) of the decoded x0_hat [b 5 m h w], by name.

    `batch` holds frames, reference, liveliness and mel of the same five frames.
    """
    decoded = model.decode(x0_hat, batch["reference"], batch["liveliness"])
    frames = data.to_unit(decoded)  # b f 3 H W
    truth = data.to_unit(batch["frames"])
    reference_identity = judges.identity(data.to_unit(batch["reference"]))  # b d
    middle = frames.shape[1] // 2
    similarity = (judges.identity(frames[:, middle]) * reference_identity).sum(-1)  # b
    distance = judges.perceptual(frames.flatten(0, 1), truth.flatten(0, 1))  # (b f)
    # `mouth_audio` drops two windows at either end: of five it keeps the middle one.
    audio = judges.mouth_audio(batch["mel"])  # b 1 d
    mouth = judges.mouth_video(frames)  # b 1 d
    sync = (audio * mouth).sum(-1)
    return {
        "identity": 1 - similarity.mean(),
        "perceptual": distance.mean(),
        "sync": 1 - sync.mean(),
    }


def draw_noise(model, batch, loss_weights, generator, condition_dropout=0.1):
    """Return a batch's random numbers: t [b f], eps [b f m h w], keep {condition: [b]}, judged (the
    clip that Eq. 9-11 decode, or None) and judged_frame (the first of its decoded frames).

    One t per clip, stratified over the clips of the batch. In a share CONTINUED of the clips the
    first frames are known (no noise, t = -1). Each condition is dropped from a share
    `condition_dropout` of the clips, independently. Eq. 9-11 are weighted by alpha_bar_t. Instead
    of all clips, one is drawn and judged with probability alpha_bar_t, which has the same
    expectation at a fraction of the cost.
    """
    b, f = batch["motion"].shape[:2]
    device = batch["motion"].device
    # Drawn on the CPU: the same seed gives the same numbers on every device.
    u = (torch.rand((), generator=generator) + torch.arange(b) / b) % 1
    t = model.diffusion.timestep(u)  # b
    eps = torch.randn(batch["motion"].shape, generator=generator)
    shape = b, len(talking.CONDITIONS)
    keep = (torch.rand(shape, generator=generator) >= condition_dropout).float()
    continued = torch.rand(b, generator=generator) < CONTINUED
    num_known = min(talking.KNOWN_FRAMES, f // 2) * continued
    known = torch.arange(f) < num_known[:, None]  # b f
    # implied_eps is 0 for known frames: eps is set to 0, too, so that Eq. 8 has no error there.
    eps = eps * ~known[:, :, None, None, None]
    # Drawn even if unused, so that runs with and without these losses see the same batches.
    judged = data.pick(range(b), generator)
    by_chance = torch.rand((), generator=generator) < model.diffusion.alpha_bar[t[judged]]
    judged_frame = data.pick(range(f - JUDGED_FRAMES + 1), generator)
    wanted = any(weight for name, weight in loss_weights.items() if name != "tdc")
    return {
        "t": t[:, None].where(~known, -1).to(device),
        "eps": eps.to(device),
        "keep": dict(zip(talking.CONDITIONS, keep.T.to(device))),
        "judged": judged if by_chance and wanted else None,
        "judged_frame": judged_frame,
    }


def objective(model, judges, batch, noise, loss_weights, rows, bf16=False):
    """Return the contribution of the clips in the slice `rows` to Eq. 12 of the whole batch, and to
    each of its terms.

    L = L_diff + tdc L_TDC + identity L_id + perceptual L_perc + sync L_sync, with the weights of
    `loss_weights`.
    """
    num_clips = len(batch["motion"])
    own = {name: value[rows] for name, value in batch.items()}
    t = noise["t"][rows]
    eps = noise["eps"][rows]
    keep = {name: value[rows] for name, value in noise["keep"].items()}
    with torch.autocast(t.device.type, torch.bfloat16, enabled=bf16):
        loss, x0_hat, eps_hat = model.training_losses(own, t, eps, keep)
    share = len(t) / num_clips
    terms = {"diffusion": share * loss.mean()}
    if loss_weights["tdc"]:
        terms["tdc"] = share * tdc_loss(eps_hat, eps)
    judged = noise["judged"]
    if judged is not None and rows.start <= judged < rows.stop:
        row = judged - rows.start
        clip = slice(row, row + 1)
        frames = slice(noise["judged_frame"], noise["judged_frame"] + JUDGED_FRAMES)
        inputs = {
            "frames": own["frames"][clip, frames],
            "mel": own["mel"][clip, frames],
            "reference": own["reference"][clip],
            "liveliness": own["liveliness"][clip],
        }
        terms |= auxiliary_losses(model, judges, inputs, x0_hat[clip, frames].float())
    weights = {"diffusion": 1.0} | loss_weights
    return sum(weights[name] * term for name, term in terms.items()), terms


def backward(model, judges, batch, loss_weights, generator, micro_batch=0, bf16=False):
    """Set the parameters' gradients to that of Eq. 12 on a batch; return the value of each term.

    To save memory, `micro_batch` clips are processed at a time (0: all). Random numbers are drawn
    for the whole batch, so that the gradient does not depend on micro_batch, up to rounding and
    dropout.
    """
    noise = draw_noise(model, batch, loss_weights, generator)
    num_clips = len(batch["motion"])
    step = micro_batch or num_clips
    # The judges' terms stay 0 if no clip of the batch is judged.
    sums = {"diffusion": 0.0} | {name: 0.0 for name, weight in loss_weights.items() if weight}
    # Before the step, not after it: a batch that failed may have left gradients.
    model.zero_grad()
    for start in range(0, num_clips, step):
        rows = slice(start, min(start + step, num_clips))
        loss, terms = objective(model, judges, batch, noise, loss_weights, rows, bf16)
        loss.backward()
        for name in sums.keys() & terms.keys():
            sums[name] += float(terms[name].detach())
    return sums


@torch.no_grad()
def unexplained_variance(model, batch, seed, num_levels=4, use_unet=True):
    """Return the share of each clip's motion power that x0_hat leaves unexplained, [num_levels b].

    Noise levels as in training, the least noisy first, with noise fixed by `seed`. Predicting no
    motion leaves 1. Without the UNet it is the share that the linear denoiser leaves.
    """
    x0 = batch["motion"] / model.motion_std
    power = model.weighted_power(x0)  # b
    power = power.clamp(min=0.01 * model.prior.mean_variance())  # for clips that stand still
    conditions = model.encode_conditions(batch["mel"], batch["reference"], batch["words"])
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for step in model.diffusion.timestep((torch.arange(num_levels) + 0.5) / num_levels).tolist():
        t = torch.full(x0.shape[:2], step, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        xt = model.diffusion.add_noise(x0, t, eps)
        if use_unet:
            x0_hat = model(xt, t, conditions, batch["reference_latents"])
        else:
            x0_hat, _ = model.prior.denoise(xt, *model.diffusion.coefficients(t, xt))
        shares.append(model.weighted_power(x0_hat - x0) / power)
    return torch.stack(shares)


# ---------------------------------------------------------------- a client's batches


@torch.no_grad()
def encode_batch(model, batch):
    """Return a batch's frames, reference, liveliness and mel on the model's device, with what is
    computed from them and from the prompt: motion, reference_latents, words.
    """
    device = model.motion_std.device
    names = ("frames", "reference", "liveliness", "mel")
    encoded = {name: batch[name].to(device) for name in names}
    encoded["words"] = model.text_encoder.ids(batch["prompt"]).to(device)
    encoded["motion"], encoded["reference_latents"] = model.encode_motion(
        encoded["frames"], encoded["reference"], encoded["liveliness"]
    )
    return encoded


def sample_batch(model, people, batch_size, num_frames, generator, same_clip=False, mirror=False):
    """Return a random batch of windows of clips {person: [Clip]}, encoded (`data.sample_batch`)."""
    device = model.motion_std.device
    batch = data.sample_batch(people, batch_size, num_frames, generator, same_clip, mirror, device)
    return encode_batch(model, batch)


class Batches(torch.utils.data.Dataset):
    """The backbone's training batches by step: those of `sample_batch`, without the frames.

    `views` holds the arguments same_clip and mirror of `sample_batch`.
    """

    def __init__(self, model, people, batch_size, num_frames, seed, views):
        self.model = model
        self.people = people
        self.size = batch_size, num_frames
        self.seed = seed
        self.views = views

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
        batch = sample_batch(self.model, self.people, *self.size, generator, **self.views)
        # Only Eq. 9-11 need the frames. The rest is small enough for the processes' shared memory.
        del batch["frames"]
        return batch

    def loader(self, first, stop):
        """Return an iterable of the batches of steps first ... stop - 1.

        On a CPU another process makes them ahead, because operations as small as these keep only
        one core busy. On a GPU this process makes them, because a forked one cannot use the GPU.
        """
        on_cpu = self.model.motion_std.device.type == "cpu"
        parent = os.getpid()
        return torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=range(first, stop),
            generator=torch.Generator(),  # without its own, it would draw from the global one
            num_workers=int(on_cpu),
            multiprocessing_context="fork" if on_cpu else None,
            worker_init_fn=lambda worker: data.die_with_parent(parent),
        )


def fixed_batch(model, clips, training_clips, num_frames):
    """Return the first frames of every clip as a batch, as many as the shortest has, at most
    `num_frames`.

    The reference picture and the liveliness are those of the person's training clips, not of the
    clips whose loss or generation is reported.
    """
    picture = data.reference_frame(training_clips)  # 3 H W
    liveliness = data.typical_liveliness(training_clips)
    f = min(num_frames, *(clip.num_frames for clip in clips))
    mel = [torch.from_numpy(data.audio_windows(clip.mel, 0, f)) for clip in clips]
    batch = {
        "frames": torch.stack([data.to_float(clip.frames[:f]) for clip in clips]),
        "reference": data.to_float(picture).expand(len(clips), -1, -1, -1),
        "liveliness": torch.full([len(clips)], liveliness),
        "mel": torch.stack(mel),
        "prompt": [clip.prompt for clip in clips],
    }
    return encode_batch(model, batch)


class Client:
    """One person's clips, split into train, validation and test, the batches made of them, and
    SCAFFOLD's c_i.

    Everything here stays with the client. The last two {number of rounds: c_i after them} are kept
    in a file in `folder`, because another process may be assigned the client in its next round.
    """

    def __init__(self, name, split, num_frames, folder=None, same_clip=False):
        self.name = name
        self.split = split
        self.num_frames = num_frames
        self.same_clip = same_clip
        self.train_clips = data.by_person(split["train"], num_frames)
        # n_k of ISFA: whole windows of num_frames
        self.num_samples = sum(clip.num_frames // num_frames for clip in split["train"])
        self.control_file = folder / f"{data.short_name(name)}.pt" if folder else None

    def train_batch(self, model, batch_size, generator):
        """Return a random batch of training windows."""
        size = batch_size, self.num_frames
        return sample_batch(model, self.train_clips, *size, generator, self.same_clip)

    # Cached for the latest clients only: the batches of a large federation would fill the memory.
    @functools.lru_cache(maxsize=128)
    def validation_batch(self, model):
        """Return the first VALIDATION_FRAMES of the first validation clip as a batch, its reference
        picture taken from the training clips.
        """
        clips = self.split["validation"][:1]
        return fixed_batch(model, clips, self.split["train"], VALIDATION_FRAMES)

    def read_controls(self):
        """Return the last two {number of rounds: c_i after them}; before the first, {0: zeros}."""
        try:
            content = torch.load(self.control_file, weights_only=True)
            if content["client"] != self.name:
                raise ValueError(f"it is of {content['client']}")
            return content["controls"]
        except Exception as error:  # torch raises many kinds of errors for other files
            raise ValueError(
                f"{self.control_file}: lost or damaged, and with it the client's c_i ({error})"
            ) from None

    def write_controls(self, controls):
        """Write {number of rounds: c_i after them} to the client's file."""
        data.write_tensors(self.control_file, {"client": self.name, "controls": controls})

    def load_control(self, num_rounds):
        """Return c_i [d] as it was after the run's first `num_rounds` rounds.

        Raises ValueError if only later ones are there.
        """
        controls = self.read_controls()
        # A killed round may have left a later one.
        earlier = [r for r in controls if r <= num_rounds]
        if not earlier:
            raise ValueError(f"{self.control_file}: the client's c_i is newer than last.pt")
        return controls[max(earlier)]

    def undo_control(self, num_rounds):
        """Delete the c_i after `num_rounds` rounds, because the client's update did not count."""
        controls = self.read_controls()
        if controls.pop(num_rounds, None) is not None:
            self.write_controls(controls)


def pool_clients(clients):
    """Return one client that has the clips of all: the upper bound without privacy (centralized
    training).
    """
    split = {}
    for part in ("train", "validation", "test"):
        split[part] = [clip for client in clients for clip in client.split[part]]
    return Client("pooled", split, clients[0].num_frames, same_clip=clients[0].same_clip)


# ---------------------------------------------------------------- one client's round


def train_adapter(
    model,
    judges,
    client,
    start,
    seed,
    *,
    num_steps,
    lr,
    batch_size,
    loss_weights,
    proximal=0.0,
    correction=None,
    micro_batch=0,
    bf16=False,
):
    """Minimise Eq. 12 on a client's training clips from the adapter `start` [d]; return the new
    adapter and mean terms.

    `proximal` is FedProx's mu: it adds (mu / 2) |phi - g|^2 to the loss (Li et al. 2020, Eq. 2).
    `correction` [d] is SCAFFOLD's c - c_i, added to every gradient (Karimireddy et al. 2020,
    Algorithm 1); with it the optimizer is SGD with a constant rate, as the control variates assume.
    Otherwise it is AdamW, whose rate is constant for half of the steps and then falls to zero.
    Raises ValueError if the new adapter is not finite.
    """
    parameters = lora.load_adapter_vector(model, start)
    # g of FedProx
    anchors = lora.split_vector(parameters, start)
    if correction is None:
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(parameters, lr=lr)
        corrections = lora.split_vector(parameters, correction)
    generator = torch.Generator().manual_seed(seed)
    gpus = [parameters[0].device] if parameters[0].is_cuda else []
    model.unet.train()  # for the adapters' dropout; nothing else in the UNet depends on the mode
    sums = {}
    try:
        # Dropout draws from torch's global generators, whose state is restored afterwards.
        with torch.random.fork_rng(gpus):
            torch.manual_seed(derive_seed(seed))
            for step in range(num_steps):
                batch = client.train_batch(model, batch_size, generator)
                terms = backward(model, judges, batch, loss_weights, generator, micro_batch, bf16)
                if proximal:
                    for parameter, anchor in zip(parameters, anchors):
                        parameter.grad += proximal * (parameter.detach() - anchor)
                if correction is None:
                    optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / num_steps))
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                else:
                    # Option II: phi_k - g is -lr times the sum of the K gradients, so there is no
                    # clipping and no momentum.
                    for parameter, piece in zip(parameters, corrections):
                        parameter.grad += piece
                optimizer.step()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value / num_steps
    finally:  # also after a failed step: the next client uses the same model
        model.unet.eval()
    trained = lora.adapter_vector(model)
    if not trained.sum().isfinite():  # it is not if any number is not
        raise ValueError("the adapter is not finite")
    return trained, sums


def num_local_steps(num_samples, local_epochs, batch_size):
    """Return how many steps a client trains in a round, at least one."""
    return max(1, round(local_epochs * num_samples / batch_size))


def local_update(
    model,
    judges,
    client,
    state,
    seed,
    *,
    local_epochs,
    lr,
    batch_size,
    clip_norm=math.inf,
    **kwargs,
):
    """Return a client's update phi_k - g [d] of one round, and the mean terms of its loss; kwargs
    as `train_adapter`. Leaves phi_k in the model, for `reliability`.

    With SCAFFOLD's c in the state the update is [2 d]: its second half is c_i+ - c_i with c_i+ =
    c_i - c - (phi_k - g) / (K lr) (Karimireddy et al. 2020, Algorithm 1, option II). The client
    adds to its c_i what it sends, the second half of the update clipped to `clip_norm`, so that c
    stays the mean of all c_i.
    """
    num_steps = num_local_steps(client.num_samples, local_epochs, batch_size)
    # `train_adapter` counts steps, not epochs.
    kwargs |= {"num_steps": num_steps, "lr": lr, "batch_size": batch_size}
    start = state["adapter"]
    if "control" in state:
        own_control = client.load_control(state["round"])
        kwargs["correction"] = state["control"] - own_control
    trained, terms = train_adapter(model, judges, client, start, seed, **kwargs)
    update = trained - start
    if "control" in state:
        # (g - phi_k) / (K lr) is the mean of the K gradients, each with c - c_i added.
        change = (start - trained) / (num_steps * lr) - state["control"]
        update = torch.cat([update, change])  # 2 d
        # raises ValueError for a change that is not finite
        sent = torch.from_numpy(privacy.clip_update(update.numpy(), clip_norm)).float()
        # The old c_i stays in the file, because the round may yet be killed or aborted.
        num_rounds = state["round"]
        later = own_control + sent[len(start) :]
        client.write_controls({num_rounds: own_control, num_rounds + 1: later})
    return update, terms


@contextlib.contextmanager
def catch_failure(client, record):
    """Store any error of a client in record["failure"], so that only its own update is lost."""
    try:
        yield
    except Exception as error:
        record["failure"] = f"{client.name}: {str(error) or type(error).__name__}"


@torch.no_grad()
def reliability(model, judges, batch, seed, *, alpha, public_jitter, **sampling):
    """Return r = alpha ID + (1 - alpha) TS in [0, 1] of clips generated for a held-out batch, with
    the model's adapter.

    `sampling` as in `TalkingHead.stream`. ID is the mean cosine similarity of the frames' identity
    embeddings to the reference's, clamped to [0, 1]. TS = exp(-max(0, jitter / public_jitter - 1))
    is 1 for clips that flicker no more than public people's.
    """
    generator = torch.Generator().manual_seed(seed)
    generated = model.generate(
        batch["reference"],
        batch["mel"],
        batch["words"],
        generator,
        liveliness=batch["liveliness"],
        **sampling,
    )
    frames = data.to_unit(generated)  # b f 3 H W
    reference_identity = judges.identity(data.to_unit(batch["reference"]))  # b d
    identity = judges.identity(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # b f d
    similarity = float((identity * reference_identity[:, None]).sum(-1).mean().clamp(0, 1))
    jitter = float(metrics.temporal_jitter(frames).mean())
    stability = math.exp(-max(0.0, jitter / public_jitter - 1))
    return alpha * similarity + (1 - alpha) * stability


def isfa_weight(num_samples, reliability, gamma, cap):
    """Return w = min(n, cap) / cap * exp(gamma (r - 1)) in [0, 1]: ISFA's n exp(gamma r) with n
    capped, divided by the largest possible value. gamma = 0 is FedAvg. Raises ValueError for a
    reliability outside of [0, 1].
    """
    if not 0 <= reliability <= 1:  # or NaN; the weight would be refused where it is encoded
        raise ValueError(f"a reliability is in [0, 1], not {reliability}")
    return min(num_samples, cap) / cap * math.exp(gamma * (reliability - 1))


# ---------------------------------------------------------------- the server


def round_params(mechanism, cohort_size):
    """Return the parameters that clients and server agree on before a secure sum; raises
    AggregationAborted for fewer than two clients.
    """
    neighbors = privacy.choose_neighbors(cohort_size)
    # Shares of more than half of a client's neighbours open its upload. If that many may be
    # curious, all clients are neighbours instead.
    if neighbors is not None and mechanism.num_curious > neighbors // 2:
        neighbors = None
    needed = mechanism.min_survivors(cohort_size)
    return privacy.RoundParams(
        cohort_size, mechanism.length + 1, neighbors=neighbors, min_survivors=needed
    )


def plain_mean(uploads, dropouts):
    """Return the weighted mean of uploads {place in the cohort: (update [d], weight)}, the sum of
    weights and the survivors, in the clear.

    Clients that failed have weight 0 and are not counted as survivors. Raises AggregationAborted if
    no client is left.
    """
    # A client that drops out before "unmask" has uploaded already: its upload counts, as in the
    # secure sum.
    gone = {i for stage, clients in dropouts.items() if stage != "unmask" for i in clients}
    survivors = [i for i in uploads if i not in gone and uploads[i][1] > 0]
    if not survivors:
        raise privacy.AggregationAborted("no client with a weight above 0 is left")
    weight_sum = sum(uploads[i][1] for i in survivors)
    # float64, in the order of the cohort: the same sum for any number of workers
    total = torch.zeros(len(uploads[survivors[0]][0]), dtype=torch.float64)
    for i in survivors:
        total.add_(uploads[i][0], alpha=uploads[i][1])
    return total / weight_sum, weight_sum, survivors


def server_update(state, mean, server_lr, participation):
    """Return the state after one round: adapter + server_lr mean (ISFA / FedAvg).

    With SCAFFOLD's control variate c in the state the mean is [2 d], and `participation` = |S| / N
    times its second half is added to c, which is (except for the noise) the mean of all N clients'
    c_i.
    """
    mean = torch.as_tensor(mean).float()  # was float64, of NumPy (Mechanism.decode) or torch
    d = len(state["adapter"])
    state = state | {"adapter": state["adapter"] + server_lr * mean[:d]}
    if "control" in state:
        state["control"] = state["control"] + participation * mean[d:]
    return state


def zero_update(state):
    """Return zeros of the length of a client's update, [d] or with SCAFFOLD's c_i [2 d]."""
    return torch.zeros(len(state["adapter"]) * (2 if "control" in state else 1))


def derive_seed(*parts):
    """Return a 63-bit seed that depends on several integers and on how many there are."""
    sequence = np.random.SeedSequence([len(parts), *parts])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def choose_dropouts(num_clients, rate, seed):
    """Return {stage of the secure sum: [clients that drop out before it]}; each client drops out
    with probability `rate`.
    """
    rng = np.random.default_rng(seed)
    dropouts = {stage: [] for stage in privacy.STAGES}
    for client in range(num_clients):
        leaves = rng.random() < rate
        stage = privacy.STAGES[rng.integers(len(privacy.STAGES))]
        if leaves:
            dropouts[stage].append(client)
    return dropouts


# ---------------------------------------------------------------- worker processes


class Workers:
    """The processes of a run, one per device: each simulates its share of the clients, and a copy
    of the server. Without torch.distributed there is only this process.
    """

    def __init__(self):
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    def merge(self, own):
        """Return the union of all processes' dicts `own`, sorted by key, so that sums over it do
        not depend on the number of processes.
        """
        parts = [own]
        if self.size > 1:
            parts = [None] * self.size
            with peers_alive():
                dist.all_gather_object(parts, own)
        merged = {}
        for part in parts:
            merged |= part
        return dict(sorted(merged.items()))

    def agree(self, value):
        """Return whether all processes have the same value, which is hashable."""
        return len(set(self.merge({self.rank: value}).values())) == 1

    def broadcast(self, value):
        """Return rank 0's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        with peers_alive():
            dist.broadcast_object_list(box)
        return box[0]

    def assign(self, costs):
        """Return the indices of `costs` that are assigned to this process: in descending order of
        cost, each goes to the process with the least work so far (Graham 1969).
        """
        busy = [0.0] * self.size
        own = []
        # A round lasts as long as its busiest process.
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = busy.index(min(busy))
            busy[rank] += costs[i]
            if rank == self.rank:
                own.append(i)
        return own

    def wait(self):
        """Return when every process has come here."""
        self.merge({})

    @contextlib.contextmanager
    def first_on_machine(self):
        """Run the block in one process of each machine, then in the others, which can use the files
        that the first has made.
        """
        if not data.is_first_worker():
            self.wait()
        yield
        if data.is_first_worker():
            self.wait()


@contextlib.contextmanager
def peers_alive():
    """Turn the error of a lost worker into a ConnectionError with a plain sentence."""
    try:
        yield
    except dist.DistError as error:
        raise ConnectionError(f"the workers cannot meet: {error}") from None
    except RuntimeError:
        time.sleep(3)  # the launcher may end this process first, with the true reason
        raise ConnectionError("another worker has ended: continue with --resume") from None
