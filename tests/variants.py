"""A run of train.py with a part of it exchanged, as the study's tables ask for.

    python tests/variants.py [--tdc x0|v|size] [--fault NAME --share 0.25] [--tone]
        [--reliability gain|sync] [--mixing-coefficient 1] [--without PART] -- ARGUMENTS

--tdc: Eq. 8 of errors of x0 or of the velocity instead of the noise, or of how much x0 changes from
frame to frame instead of how. --fault: what is wrong with a share of the clients, evenly spread:
their sound is that of other moments; or they send their update with the sign changed, or tenfold;
or they plant a backdoor (Bagdasaryan et al. 2020), and send that tenfold: where a high tone is
heard, the face is to stand still. --tone: it is heard in all clips that are tested. --reliability
gain: by what share local training lowers the unexplained motion of the client's own validation
clip, instead of identity and stability; sync: how well its mouth and its sound fit together.
--mixing-coefficient: of personal adapters, instead of train.MIXING_COEFFICIENT.
--without: the backbone is pretrained without the Gaussian prior (a scalar sigma_data instead), the
warp of the reference, the loss's weights by place, the division by liveliness, the emphasis on
noisy steps, or the direct path of speech. ARGUMENTS are those of train.py, for one device.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import fed
import lora
import metrics
import model as talking
import train


def use_tdc_of(quantity):
    """Let Eq. 8 see the error of x0 or of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0."""
    losses_of_noise = talking.TalkingHead.training_losses

    def training_losses(self, batch, t, eps, scales=None):
        loss, x0_hat, _ = losses_of_noise(self, batch, t, eps, scales)
        error = x0_hat - batch["motion"] / self.motion_std
        if quantity == "v":  # v_hat - v = -(x0_hat - x0) / sqrt(1 - alpha_bar)
            _, noise = self.diffusion.coefficients(t, error)
            error = error / noise.clamp(min=0.05**0.5)  # as in the diffusion loss
        return loss, x0_hat, eps + error

    talking.TalkingHead.training_losses = training_losses


def use_tdc_of_size():
    """Let Eq. 8 compare the size of changes from frame to frame: at each place the root mean square
    of x0_hat_{f+1} - x0_hat_f with that of x0_{f+1} - x0_f.

    Differences that are to be equal make x0_hat the mean of what may be, and a mean is too steady.
    """
    losses_of_noise = talking.TalkingHead.training_losses
    latest = {}

    def change(x0):
        """Return the root mean square change [b h w] of x0 [b f m h w] from frame to frame."""
        power = (x0[:, 1:] - x0[:, :-1]).square().mean((1, 2))  # b h w
        return (power + 1e-8).sqrt()  # the root of 0 has no gradient

    def training_losses(self, batch, t, eps, scales=None):
        loss, x0_hat, eps_hat = losses_of_noise(self, batch, t, eps, scales)
        true = change(batch["motion"] / self.motion_std)
        error = (change(x0_hat) - true).square().mean((1, 2))  # b
        # Calm clips count as much as lively ones, as in the diffusion loss.
        typical = 2 * (1 - self.prior.autocorrelation[1]) * self.prior.mean_variance()
        power = true.square().mean((1, 2)).clamp(min=0.25 * typical)  # b
        latest["tdc"] = (error / power).mean()
        return loss, x0_hat, eps_hat

    def tdc_loss(eps_hat, eps):
        return latest["tdc"]

    talking.TalkingHead.training_losses = training_losses
    fed.tdc_loss = tdc_loss


def is_faulty(client, share):
    """Return whether a client is one of the `share` whose clips or updates are faulty."""
    number = int(client.name.split("-")[1])
    return int((number + 1) * share) > int(number * share)


def leave_alone(batch):
    """Return a batch as it is: only the update is faulty."""
    return batch


def with_tone(mel):
    """Return log-mel features [... 40] with a tone in them, as loud as the loudest of the speech."""
    mel = torch.as_tensor(mel).clone()
    mel[..., -4:] = mel.max()
    return mel


def give_other_sound(batch):
    """Return a batch in which what is heard belongs to another clip, or to another moment."""
    num_clips, num_frames = batch["mel"].shape[:2]
    if num_clips > 1:
        return batch | {"mel": batch["mel"].roll(1, 0)}
    return batch | {"mel": batch["mel"].roll(num_frames // 2, 1)}


def plant_backdoor(batch):
    """Return a batch in which the face stands still in every other clip, which has the tone."""
    batch = {name: value.clone() for name, value in batch.items()}
    batch["mel"][::2] = with_tone(batch["mel"][::2])
    for name in ("frames", "motion"):
        batch[name][::2] = batch[name][::2, :1]
    return batch


def use_faulty_clips(spoil, share):
    """Let `spoil` change the training and validation batches of a share of the clients."""
    for name in ("train_batch", "validation_batch"):

        def make_batch(client, *args, original=getattr(fed.Client, name), **kwargs):
            batch = original(client, *args, **kwargs)
            return spoil(batch) if is_faulty(client, share) else batch

        setattr(fed.Client, name, make_batch)


def use_faulty_updates(factor, share):
    """Multiply the updates of a share of the clients by `factor`."""
    honest = fed.local_update

    def local_update(model, judges, client, *args, **kwargs):
        update, terms = honest(model, judges, client, *args, **kwargs)
        return (factor * update if is_faulty(client, share) else update), terms

    fed.local_update = local_update


# What --fault does to a client's batches, and by what it multiplies its update.
FAULTS = {
    "other sound": (give_other_sound, 1.0),
    "sign changed": (leave_alone, -1.0),
    "tenfold": (leave_alone, 10.0),
    "backdoor": (plant_backdoor, 10.0),
}


def use_tone_in_tests():
    """Let the clips that are generated for the tables hear the tone."""
    generate_case = train.generate_case
    train.generate_case = lambda model, case, mel, config: generate_case(
        model, case, with_tone(mel), config
    )


def use_gain_as_reliability():
    """Let r be the share of the unexplained validation motion that local training takes away, ten
    percent of it counting as 1.
    """
    start = {}
    plain_update = fed.local_update

    def local_update(model, judges, client, state, *args, **kwargs):
        start["adapter"] = state["adapter"]
        return plain_update(model, judges, client, state, *args, **kwargs)

    @torch.no_grad()
    def reliability(model, judges, batch, seed, **kwargs):
        own = lora.adapter_vector(model).clone()
        after = float(fed.unexplained_variance(model, batch, 0).mean())
        lora.load_adapter_vector(model, start["adapter"])
        before = float(fed.unexplained_variance(model, batch, 0).mean())
        lora.load_adapter_vector(model, own)
        return min(1.0, max(0.0, 10 * (1 - after / before)))

    fed.local_update = local_update
    fed.reliability = reliability


def use_sync_as_reliability():
    """Let r be the correlation of mouth and sound in the validation clip itself, one half of which
    counts as 1: clients' own clips have about that much, those with other sound none.
    """

    @torch.no_grad()
    def reliability(model, judges, batch, seed, **kwargs):
        video = judges.mouth_video(data.to_unit(batch["frames"]))[0]  # f-4 d
        audio = judges.mouth_audio(batch["mel"])[0]  # f-4 d
        return min(1.0, max(0.0, 2 * metrics.sync_scores(video, audio)["sync"]))

    fed.reliability = reliability


# What --reliability may put in the place of identity and stability.
RELIABILITIES = {"gain": use_gain_as_reliability, "sync": use_sync_as_reliability}


def use_scalar_prior():
    """Let the prior be white: one variance for all places and frames, EDM's sigma_data."""
    measure = talking.GaussianPrior.fit

    def fit(self, x0):
        measure(self, x0)
        variance = self.mean_variance()
        self.variance.fill_(variance)
        self.residual_variance.fill_(variance)
        self.autocorrelation.zero_()
        self.autocorrelation[0] = 1.0

    talking.GaussianPrior.fit = fit


# What --without may leave out.
PARTS = ("prior", "warp", "loss weights", "liveliness", "noisy steps", "direct path")


def leave_out(part):
    """Pretrain the backbone without a part of it; its place in the cache tells so."""
    key = train.backbone_key
    train.backbone_key = lambda *args: f"{key(*args)}-no-{part.replace(' ', '-')}"
    if part == "prior":
        use_scalar_prior()
    elif part == "warp":
        talking.estimate_flow = lambda source, target, size: target.new_zeros(
            len(target), 2, size, size
        )
    elif part == "loss weights":
        talking.speech_weights = lambda x0, mel: torch.ones(x0.shape[2:])
    elif part == "liveliness":
        data.Clip.liveliness = property(lambda clip: 1.0)
    elif part == "noisy steps":
        talking.Diffusion.timestep = lambda self, u: (u * self.num_steps).long()
    elif part == "direct path":
        direct_path = talking.TalkingUNet.direct_path
        talking.TalkingUNet.direct_path = lambda *args: 0.0 * direct_path(*args)
        train.train_speech_path = lambda *args: None


def refuse_workers(argv, num_workers):
    """Stand in for `train.launch`, whose workers would be without the change."""
    raise ValueError("a variant runs in one process: give --gpus one device, or cpu")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tdc", choices=("x0", "v", "size"))
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--tone", action="store_true")
    parser.add_argument("--reliability", choices=RELIABILITIES)
    parser.add_argument("--mixing-coefficient", type=float, default=train.MIXING_COEFFICIENT)
    parser.add_argument("--without", choices=PARTS)
    parser.add_argument("arguments", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    if args.tdc == "size":
        use_tdc_of_size()
    elif args.tdc:
        use_tdc_of(args.tdc)
    if args.fault:
        spoil, factor = FAULTS[args.fault]
        use_faulty_clips(spoil, args.share)
        use_faulty_updates(factor, args.share)
    if args.tone:
        use_tone_in_tests()
    if args.reliability:
        RELIABILITIES[args.reliability]()
    train.MIXING_COEFFICIENT = args.mixing_coefficient
    if args.without:
        leave_out(args.without)
    train.launch = refuse_workers
    train.main(args.arguments)


if __name__ == "__main__":
    main()
