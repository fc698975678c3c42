"""Attacks on persons, against updates in the clear and against what the mechanism releases.

    python tests/bench_attacks.py --run runs/NAME [--people 40] [--trials 50] [--output FILE]

Three questions about the clients of a finished run with synthetic people. Was this person in the
federation? Are two releases of the same person? Which person is it, by the face or the motion that
an adapter generates? Every person's clips are split: the training clips make the update that the
person sends; from the other clips the attacker computes one. Cohorts are drawn anew in each trial.

The protected releases come from one round that spends the epsilon of the whole run, with weight 1
for every client: the largest that reliability can give. Writes tests/results/attacks.md, and ends
with status 1 if an attack succeeds more often than the guarantee allows.
"""

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import fed
import lora
import metrics
import privacy
import train

SIZES = (1, 5, 20)  # clients in a mean
NUM_FRAMES = 40  # of each clip that is generated or whose loss is measured
NUM_LEVELS = 2  # noise levels of that loss


# ---------------------------------------------------------------- what is released


def release(updates, mechanism=None, context=None):
    """Return the mean [d] of updates [m d] that all have weight 1: plain, or as a round with this
    seeded mechanism opens it.

    `context` separates the noise of different releases.
    """
    if mechanism is None:
        return updates.mean(0)
    m = len(updates)
    total = np.zeros(mechanism.length + 1, "<u4")
    for i, update in enumerate(updates):
        total = total + mechanism.encode(update, 1.0, m, (context, i))
    mean, _ = mechanism.decode(total, m, m, context)
    return mean


def share_of_noise(mechanism, num_clients):
    """Return a mechanism whose whole noise is the share that one of `num_clients` clients adds."""
    noise_multiplier = mechanism.noise_multiplier / math.sqrt(num_clients)
    return replace(mechanism, noise_multiplier=noise_multiplier)


# ---------------------------------------------------------------- how well an attack does


def auc_over_people(inside, outside):
    """Return {"mean", "ci95"} of the AUC of scores [people trials] with and without the person.

    The AUC is a mean over pairs of people. The interval is that of one value per person: its part
    as the first of a pair and as the second (Obuchowski 1997, Biometrics 53).
    """
    # metrics.auc of each pair, all in one call, as there are many
    wins = stats.mannwhitneyu(inside[:, None], outside, axis=2, method="asymptotic").statistic
    wins = wins / (inside.shape[1] * outside.shape[1])
    values = wins.mean(0) + wins.mean(1) - wins.mean()
    result = metrics.mean_ci(values)
    return {"mean": result["mean"], "ci95": np.clip(result["ci95"], 0, 1).tolist()}


def auc_bound(mu):
    """Return the largest AUC against a mu-GDP mechanism: no ROC curve lies above Phi(Phi^-1(x) +
    mu) (Dong, Roth and Su 2022, Def. 2.6, arXiv:1905.02383).
    """
    return float(stats.norm.cdf(mu / math.sqrt(2)))


def advantage_bound(mu):
    """Return the largest true positive rate minus false positive rate of the same curve."""
    return float(2 * stats.norm.cdf(mu / 2) - 1)


def hit_bound(chance, mu):
    """Return the largest share of right guesses where guessing blindly gives `chance`.

    With zeros in the person's place a guess is right by chance: that is the false positive rate.
    """
    return float(stats.norm.cdf(stats.norm.ppf(chance) + mu))


def hit_rate(ranks, best):
    """Return {"mean", "ci95"}: the share of ranks below `best`, with the exact binomial interval
    (Clopper and Pearson 1934).
    """
    test = stats.binomtest(int(np.sum(np.array(ranks) < best)), len(ranks))
    interval = test.proportion_ci(0.95)
    return {"mean": test.statistic, "ci95": [interval.low, interval.high]}


def owner_rank(scores, owner):
    """Return how many of scores [people] are above the owner's; ties count half."""
    ties = np.sum(scores == scores[owner]) - 1
    return float(np.sum(scores > scores[owner]) + ties / 2)


# ---------------------------------------------------------------- attacks on updates


def cosine(x, y):
    """Return the cosine of vectors x and y [d]."""
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-12))


def similarity_scores(first, second, sizes, mechanisms, trials, seed=0):
    """Return two arrays [people trials]: the similarity of releases of first and second updates
    [people d] that have a person in common, and of those that have not.

    The first release is the mean over the person and sizes[0] - 1 others, the second over sizes[1]
    people: the person, or somebody else, and again others. Who is in neither is a stranger. A size
    of 1 without a mechanism is an update that the attacker has computed. `mechanisms` has that of
    either release, or None. Similarity is the cosine after the strangers' mean has been taken away:
    what all people's updates share says nothing about one of them (Dwork et al. 2015, Robust
    traceability from trace amounts).
    """
    num_people = len(first)
    num_others = sizes[0] + sizes[1] - 1
    if num_people < num_others + 3:
        raise ValueError(f"{num_people} people are too few for sums of {sizes} of them.")
    rng = np.random.default_rng(seed)
    scores = np.zeros((2, num_people, trials))
    for person in range(num_people):
        others = np.delete(np.arange(num_people), person)
        for trial in range(trials):
            order = rng.permutation(others)
            companions, rest = order[: sizes[0] - 1], order[sizes[0] - 1 :]
            others_of_second, instead, strangers = np.split(rest, [sizes[1] - 1, sizes[1]])
            context = (seed, person, trial)
            one = release(first[[person, *companions]], mechanisms[0], (context, "first"))
            one = one - first[strangers].mean(0)
            for kind, member in enumerate((person, *instead)):
                members = [member, *others_of_second]
                two = release(second[members], mechanisms[1], (context, kind))
                two = two - second[strangers].mean(0)
                scores[kind, person, trial] = cosine(one, two)
    return scores


def worst_case_scores(updates, mechanism, trials):
    """Return two arrays [people trials]: scores of sums with and without a person's update, by an
    attacker who knows all clips and the updates of all others.

    It subtracts what it knows. What is left is the person's vector or zeros, and noise: the two
    neighbours of the definition, between which the inner product is the most powerful test.
    """
    scores = np.zeros((2, len(updates), trials))
    for person, update in enumerate(updates):
        own = privacy.clip_update(update, mechanism.clip_norm)
        vector = np.append(own, mechanism.weight_scale * mechanism.clip_norm)
        for trial in range(trials):
            for kind, sent in enumerate((update, np.zeros_like(update))):
                weight = 1.0 - kind
                total = mechanism.encode(sent, weight, 1, ("worst case", person, trial, kind))
                scores[kind, person, trial] = total.view("<i4") @ vector
    return scores


def match_scores(first, second):
    """Return similarities [people people] of each person's first update and everybody's second."""
    first = first - first.mean(0)
    second = second - second.mean(0)
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return first @ second.T


# ---------------------------------------------------------------- people of a run


@dataclass
class Person:
    """One client of the run, with the update that it sends and what the attacker has of it."""

    name: str
    sent: np.ndarray  # [d], of the training clips
    again: np.ndarray  # [d], of the same clips in other batches
    other: np.ndarray  # [d], of the attacker's clips
    batch: dict  # one of the attacker's clips, as motion of a picture from another


class Run:
    """A finished run: its model with the adapters of the federation, judges and clients."""

    def __init__(self, folder):
        self.folder = folder
        self.config = train.load_config(folder / "config.yaml")
        if self.config["fed"]["algorithm"] != "isfa":
            raise ValueError("the attacks are on runs with fed.algorithm isfa")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = train.load_run(self.config, folder, self.device)
        self.backbone, self.model, self.judges, self.state = loaded
        self.people = train.load_people(self.config)
        self.splits = {}
        for name, clips in self.people.clients.items():
            self.splits[name] = data.split_clips(clips, self.config["seed"])

    def mechanism(self):
        """Return the run's mechanism as a single round that spends all of the run's epsilon.

        Gaussian releases of noise multipliers z_i compose to one of (sum 1 / z_i^2)^(-1/2) (Dong,
        Roth and Su 2022, Cor. 3.3). Nobody drops out or colludes.
        """
        mechanism = train.make_mechanism(self.config, len(self.state["adapter"]))
        rows = self.state["accountant"]
        if mechanism is None or not rows or min(z for _, z, _ in rows) == 0:
            raise ValueError(f"{self.folder}: a run without noise has no guarantee to attack")
        noise_multiplier = sum(rounds / z**2 for _, z, rounds in rows) ** -0.5
        return replace(mechanism, noise_multiplier=noise_multiplier, num_curious=0, seed=0)

    def update(self, client, num_epochs, seed):
        """Return a client's update [d] of the first round."""
        state = {"adapter": torch.zeros_like(self.state["adapter"]), "round": 0}
        kwargs = train.training_kwargs(self.config, "fed", self.device)
        kwargs["local_epochs"] = num_epochs
        judges = self.judges["loss"]
        update, _ = fed.local_update(self.model, judges, client, state, seed, **kwargs)
        return update.double().numpy()

    def person(self, name, index):
        """Return a client with its updates, all of as many steps."""
        split = self.splits[name]
        num_frames = self.config["backbone"]["num_frames"]
        sender = fed.Client(name, split, num_frames)
        attacker_split = {"train": split["validation"] + split["test"]}
        attacker = fed.Client(name, attacker_split | {"validation": [], "test": []}, num_frames)
        num_epochs = self.config["fed"]["local_epochs"]
        as_many_steps = num_epochs * sender.num_samples / attacker.num_samples
        seeds = [fed.derive_seed(self.config["fed"]["seed"], i, index) for i in range(3)]
        sent = self.update(sender, num_epochs, seeds[0])  # the seed of the first round
        again = self.update(sender, num_epochs, seeds[1])
        other = self.update(attacker, as_many_steps, seeds[2])
        batch = fed.fixed_batch(self.model, split["test"], split["validation"], NUM_FRAMES)
        return Person(name, sent, again, other, batch)

    def loss(self, model, person):
        """Return the unexplained variance of the attacker's clip."""
        shares = fed.unexplained_variance(model, person.batch, seed=0, num_levels=NUM_LEVELS)
        return float(shares.mean())

    def personal_adapters(self, names):
        """Return {name: personal adapter} of those who have one."""
        found = {}
        for name in names:
            path = self.folder / "personal" / f"{name}.pt"
            if path.exists():
                found[name] = train.load_checkpoint(path, "personal adapter")["adapter"]
        return found


def loss_scores(run, people, before, size, mechanism=None, seed=0):
    """Return two arrays [people 1]: how much a global adapter lowers the loss of the attacker's
    clip, with the person among the `size` clients that made it, and with somebody else instead.

    before [people]: the losses of the backbone (Yeom et al. 2018, arXiv:1709.01604).
    """
    rng = np.random.default_rng(seed)
    updates = np.stack([person.sent for person in people])
    scores = np.zeros((2, len(people), 1))
    for k, person in enumerate(tqdm(people, f"loss, {size} clients", leave=False)):
        order = rng.permutation(np.delete(np.arange(len(people)), k))
        for kind, member in enumerate((k, order[size - 1])):
            members = [member, *order[: size - 1]]
            mean = release(updates[members], mechanism, ("loss", seed, k, kind))
            adapter = torch.from_numpy(run.config["fed"]["server_lr"] * mean)
            lora.load_adapter_vector(run.model, adapter)
            scores[kind, k] = before[k] - run.loss(run.model, person)
    return scores


# ---------------------------------------------------------------- attacks with generated faces


class Identifier:
    """Names the person behind an adapter from what the model then generates or explains."""

    def __init__(self, run):
        self.run = run
        self.judge = run.judges["table"]
        pictures = []
        for split in run.splits.values():
            pictures.append(data.reference_frame(split["validation"] + split["test"]))
        self.gallery = self.embed(np.stack(pictures))  # people e
        public = [data.reference_frame(clips) for clips in run.people.public.values()]
        distances = np.square(np.stack(public) - np.mean(public, 0)).mean((1, 2, 3))
        # the public person who looks most like all of them
        self.neutral = public[distances.argmin()]
        self.speech = list(run.people.public.values())[distances.argmin()][0]

    def embed(self, pictures):
        """Return the judge's embeddings [n e] of uint8 pictures [n 3 H W]."""
        frames = data.to_unit(data.to_float(pictures, self.run.device))
        with torch.no_grad():
            return self.judge.identity(frames).cpu().numpy()

    def compare(self, embedding, origin):
        """Return the similarity [people] of an embedding and everybody's, both seen from where
        they would be without a person in them.
        """
        return (self.gallery - self.gallery.mean(0)) @ (embedding - origin)

    @torch.no_grad()
    def generated(self, model):
        """Return the mean embedding [e] of the neutral picture, as the model makes it speak."""
        config = self.run.config
        mel = data.audio_windows(self.speech.mel)[:NUM_FRAMES]
        reference = data.to_float(self.neutral, self.run.device)[None]
        words = model.text_encoder.ids([""]).to(self.run.device)
        generator = torch.Generator().manual_seed(0)
        speech = torch.from_numpy(mel)[None].to(self.run.device)
        frames = model.generate(reference, speech, words, generator, **config["sampling"])
        return self.judge.identity(data.to_unit(frames)[0]).mean(0).cpu().numpy()

    def picture_ranks(self):
        """Return each client's rank by a picture of its training clips: what the judge can do."""
        ranks = []
        for k, split in enumerate(self.run.splits.values()):
            picture = data.reference_frame(split["train"])
            scores = self.compare(self.embed(picture[None])[0], self.gallery.mean(0))
            ranks.append(owner_rank(scores, k))
        return ranks

    def face_ranks(self, model, adapters):
        """Return the rank of each adapter's client, {name: vector}, by the generated face."""
        names = list(self.run.splits)
        zero = torch.zeros_like(lora.adapter_vector(model))
        lora.load_adapter_vector(model, zero)
        origin = self.generated(model)
        ranks = []
        for name, vector in tqdm(adapters.items(), "faces", leave=False):
            lora.load_adapter_vector(model, torch.as_tensor(vector))
            scores = self.compare(self.generated(model), origin)
            ranks.append(owner_rank(scores, names.index(name)))
        return ranks

    def motion_ranks(self, model, adapters, people):
        """Return the rank of each adapter's client among `people`, by whose loss falls most.

        From each person's gain its mean over all adapters is taken: some clips gain by any.
        """
        names = [person.name for person in people]
        zero = torch.zeros_like(lora.adapter_vector(model))
        losses = []
        for vector in tqdm([zero, *adapters.values()], "motion", leave=False):
            lora.load_adapter_vector(model, torch.as_tensor(vector))
            losses.append([self.run.loss(model, person) for person in people])
        gains = 1 - np.array(losses[1:]) / np.array(losses[0])  # adapters people
        gains = gains - gains.mean(0)
        return [owner_rank(row, names.index(name)) for row, name in zip(gains, adapters)]


# ---------------------------------------------------------------- tables


def write_interval(result):
    """Return a mean and its interval as text."""
    low, high = result["ci95"]
    return f"{result['mean']:.2f} [{low:.2f}, {high:.2f}]"


class Report:
    """Lines of Markdown, and the attacks that did better than their bound."""

    def __init__(self):
        self.lines = []
        self.violations = []

    def table(self, title, columns):
        """Begin a table."""
        self.lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |"]
        self.lines.append("|---" * len(columns) + "|")

    def check(self, label, result, bound):
        """Remember an attack whose whole interval lies above the bound."""
        if result["ci95"][0] > bound:
            self.violations.append(f"{label}: {write_interval(result)}, at most {bound:.2f}")

    def add_auc(self, label, size, clear, protected, bound):
        """Add a row of AUCs from pairs of score arrays [people trials]."""
        clear = auc_over_people(*clear)
        protected = auc_over_people(*protected)
        self.check(label, protected, bound)
        cells = [label, str(size), write_interval(clear), write_interval(protected), f"{bound:.2f}"]
        self.lines.append("| " + " | ".join(cells) + " |")

    def add_hits(self, label, ranks, num_candidates, mu=None):
        """Add a row of hit rates, with their bounds for a release that is mu-GDP."""
        cells = [label, str(len(ranks)), str(num_candidates)]
        for best in (1, 10):
            chance = min(1.0, best / num_candidates)
            rate = hit_rate(ranks, best)
            cells += [write_interval(rate), f"{chance:.2f}"]
            if mu is None:
                cells.append("-")
            else:
                bound = hit_bound(chance, mu)
                self.check(label, rate, bound)
                cells.append(f"{bound:.2f}")
        self.lines.append("| " + " | ".join(cells) + " |")


def attack_membership(report, run, people, mechanism, mu, trials):
    """Add the table of attacks on the released mean."""
    sent = np.stack([person.sent for person in people])
    again = np.stack([person.again for person in people])
    other = np.stack([person.other for person in people])
    columns = ["the attacker has", "clients", "in the clear", "protected", "at most"]
    report.table("Is this person in the federation?", columns)
    bound = auc_bound(2 * mu)  # somebody else in the person's place is two steps
    largest = max(1, len(people) // 2)
    sizes = sorted({min(size, largest) for size in SIZES})
    lora.load_adapter_vector(run.model, torch.zeros_like(run.state["adapter"]))
    before = [run.loss(run.model, person) for person in people]
    for size in sizes:
        label = "other clips: does the global adapter lower their loss?"
        scores = [loss_scores(run, people, before, size, m) for m in (None, mechanism)]
        report.add_auc(label, size, *scores, bound)
    for label, known in (
        ("other clips: is the mean like their update?", other),
        ("the very clips: is the mean like their update?", again),
        ("the very clips and batches: is the mean like their update?", sent),
    ):
        for size in tqdm(sizes, "membership", leave=False):
            scores = []
            for m in (None, mechanism):
                scores.append(similarity_scores(known, sent, (1, size), (None, m), trials))
            report.add_auc(label, size, *scores, bound)
    label = "all clips and all other updates (the attacker of the definition)"
    certain = np.ones((len(people), 1)), np.zeros((len(people), 1))  # nothing is left to guess
    protected = worst_case_scores(sent, mechanism, 10 * trials)
    report.add_auc(label, "any", certain, protected, auc_bound(mu))


def attack_linkage(report, people, mechanism, mu, trials):
    """Add the table of attacks on pairs of releases."""
    sent = np.stack([person.sent for person in people])
    again = np.stack([person.again for person in people])
    other = np.stack([person.other for person in people])
    columns = ["what the attacker sees twice", "clients", "in the clear", "protected", "at most"]
    report.table("Are two releases of the same person?", columns)
    num_clients = mechanism.num_clients
    share = share_of_noise(mechanism, num_clients)
    largest = max(1, len(people) // 4)
    sizes = sorted({min(size, largest) for size in SIZES})
    for clips, second in (("the same clips", again), ("other clips", other)):
        scores = []
        for m in (None, share):
            scores.append(similarity_scores(sent, second, (1, 1), (m, m), trials))
        label = f"an upload without secure aggregation, of {clips}"
        report.add_auc(label, 1, *scores, auc_bound(2 * mu * math.sqrt(num_clients)))
        for size in tqdm(sizes, "linkage", leave=False):
            scores = []
            for m in (None, mechanism):
                scores.append(similarity_scores(sent, second, (size, size), (m, m), trials))
            report.add_auc(f"the sum of uploads, of {clips}", size, *scores, auc_bound(2 * mu))


def attack_identity(report, run, people, mechanism, mu):
    """Add the table of attacks that name the person."""
    sent = {person.name: person.sent for person in people}
    other = np.stack([person.other for person in people])
    protected = {}
    for k, (name, update) in enumerate(sent.items()):
        protected[name] = release(update[None], mechanism, ("identity", k))
    columns = ["from what, by what", "people", "of"]
    columns += ["first", "chance", "at most", "among ten", "chance", "at most"]
    report.table("Which person is it?", columns)
    identifier = Identifier(run)
    everybody = len(run.splits)
    report.add_hits("a picture, by the face (control)", identifier.picture_ranks(), everybody)
    # With its noise a sum is many times as long as an update: an attacker would shorten it.
    usual = float(np.median(np.linalg.norm(np.stack(list(sent.values())), axis=1)))
    model = run.model
    for label, releases, bound in (
        ("update in the clear", sent, None),
        ("protected sum with nobody else in it", protected, mu),
    ):
        scores = match_scores(np.stack(list(releases.values())), other)
        ranks = [owner_rank(row, k) for k, row in enumerate(scores)]
        report.add_hits(f"{label}, by updates of other clips", ranks, len(people), bound)
        vectors = {n: usual / np.linalg.norm(v) * v for n, v in releases.items()}
        adapters = {n: torch.from_numpy(v).float() for n, v in vectors.items()}
        ranks = identifier.face_ranks(model, adapters)
        report.add_hits(f"{label}, by the generated face", ranks, everybody, bound)
        if bound is None:  # of the protected sum the table of members has the loss
            few = dict(list(adapters.items())[:12])
            ranks = identifier.motion_ranks(model, few, people)
            report.add_hits(f"{label}, by the loss of other clips", ranks, len(people))
    adapters = run.personal_adapters(sent)
    if adapters:
        adapter = run.state["adapter"]
        directions = run.backbone["directions"]
        model = train.personal_model(run.config, run.model, adapter, directions)
        ranks = identifier.face_ranks(model, adapters)
        report.add_hits("personal adapter, by the generated face", ranks, everybody)
        ranks = identifier.motion_ranks(model, adapters, people)
        report.add_hits("personal adapter, by the loss of other clips", ranks, len(people))


def describe(run, mechanism, mu, num_people, trials):
    """Return the lines above the tables."""
    delta = run.config["privacy"]["delta"]
    epsilon = privacy.gaussian_epsilon(1 / mu, delta)
    # Kairouz, Oh and Viswanath 2015, arXiv:1311.0776: where both error rates are the same
    coarse = 1 - 2 * (1 - delta) / (1 + math.exp(epsilon))
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    title = f"`python tests/bench_attacks.py --run {run.folder} --people {num_people} "
    title += f"--trials {trials}`, commit {commit}. Mean [95 % interval over people]."
    noise = f"{mechanism.noise_multiplier:.2f}"
    guarantee = f"If the run's whole ε = {epsilon:.2f} at δ = {delta:g} is spent in one round, as "
    guarantee += "in these tests, the noise is Gaussian with a standard deviation of at least "
    guarantee += f"{noise} sensitivities: μ-GDP with μ = {mu:.3f}. (If nobody "
    guarantee += "drops out or colludes, as here, the noise is larger by the factor 1 / √"
    guarantee += f"{mechanism.survivor_share:g}.) Zeros in the place of "
    guarantee += f"a person's update: AUC at most Φ(μ/√2) = {auc_bound(mu):.3f}, true minus false "
    guarantee += f"positive rate at most 2Φ(μ/2) - 1 = {advantage_bound(mu):.3f} (ε and δ alone "
    guarantee += f"would allow {coarse:.3f}). Another person in its place: AUC at most Φ(√2 μ) = "
    guarantee += f"{auc_bound(2 * mu):.3f}."
    setting = f"An update has {mechanism.length} numbers, and every client weight 1. Attackers "
    setting += "know the backbone. An attacker's other clips of a person are clips that this "
    setting += "person's client does not train on. AUC: 0.5 is a blind guess, 1 certainty."
    return ["# Attacks on persons", "", title, "", guarantee, "", setting]


CLOSING = """
In the clear: plain means of updates, as a federation without secure aggregation and noise shows
them. Protected: one round of the mechanism. An upload without secure aggregation has only its own
share of the noise: its bound is no protection, only the sum protects. A personal adapter is trained
without noise and has no bound: whoever publishes it reveals at least what the last rows show. If an
attack fails in the clear, it is too weak to say anything about the protection; the bounds hold for
every attack, also for stronger ones.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--people", type=int, default=40, help="clients that are attacked")
    parser.add_argument("--trials", type=int, default=50, help="releases per person and attack")
    output = ROOT / "tests" / "results" / "attacks.md"
    parser.add_argument("--output", type=Path, default=output)
    args = parser.parse_args()
    if args.people < 8:
        parser.error(f"--people must be at least 8, not {args.people}")
    run = Run(args.run)
    mechanism = run.mechanism()
    mu = 1 / mechanism.noise_multiplier
    names = list(run.splits)[: args.people]
    report = Report()
    report.lines = describe(run, mechanism, mu, len(names), args.trials)
    people = []
    for index, name in enumerate(tqdm(names, "updates")):
        people.append(run.person(name, index))
    attack_membership(report, run, people, mechanism, mu, args.trials)
    attack_linkage(report, people, mechanism, mu, args.trials)
    attack_identity(report, run, people, mechanism, mu)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(report.lines) + "\n" + CLOSING
    args.output.write_text(text, "utf-8")
    print(text)
    if report.violations:
        print("above the bound:", *report.violations, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
