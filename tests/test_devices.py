"""The whole path on a GPU that is not there, and on the CPU beside it.

`PretendGPU` makes tensors whose device is cuda:0 and whose numbers lie in the CPU's memory. What a
GPU refuses is refused, numbers can be read (`float(loss)`), and every result has to equal the CPU's
bit by bit. torch's own FakeTensorMode holds shapes only: a run would end where the first loss is
read, and without a driver its backward pass raises.

Not covered, because it needs hardware: CUDA's kernels, their rounding, memory and speed, several
GPUs. Inception, ArcFace and SyncNet are replaced by small networks, as theirs are large. In whole runs
the judges are random, and their training has a test of its own.
"""

import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fed
import lora
import metrics
import train

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SECOND_CPU = torch.device("cpu", 1)  # what torch's C++ takes the GPU for; nothing else is there
SMALLEST = [
    "data.size=32",
    "data.clients=2",
    "data.unseen=1",
    "model.autoencoder_channels=[8, 8]",
    "model.channels=[8]",
    "backbone.finder_steps=0",
    "backbone.autoencoder_steps=1",
    "backbone.steps=2",
    "backbone.batch_size=2",
    "backbone.num_frames=6",
    "backbone.compile=true",
    "lora.rank=2",
    "fed.rounds=1",
    "fed.local_epochs=0.1",
    "fed.batch_size=2",
    "privacy.num_curious=0",
    "privacy.seed=3",
    "personal.clients=1",
    "personal.steps=1",
    "personal.batch_size=2",
    "sampling.num_steps=1",
    "sampling.window=24",
    "evaluate.num_frames=10",
]
LOSS_WEIGHTS = {"tdc": 0.3, "identity": 0.2, "perceptual": 0.4, "sync": 0.7}


# ---------------------------------------------------------------- the pretended GPU


class GPUTensor(torch.Tensor):
    """A tensor on cuda:0 whose numbers are those of the CPU tensor `values`.

    To torch's C++ it is on cpu:1, so that autograd needs no driver, and what C++ allocates beside
    it can be told from the CPU tensors of the project.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)

    @staticmethod
    def __new__(cls, values):
        layout = values.shape, values.stride(), values.storage_offset()
        options = {"dtype": values.dtype, "device": SECOND_CPU}
        tensor = torch.Tensor._make_wrapper_subclass(cls, *layout, **options)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: there is no GPU outside of PretendGPU")

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)  # files are loaded with map_location="cpu"

    def __format__(self, specification):
        return format(self.item(), specification)

    def __repr__(self, **kwargs):
        return f"GPUTensor({self.values})"

    def new_tensor(self, numbers):
        return torch.tensor(numbers, dtype=self.dtype, device=GPU)


class PretendGPU(TorchDispatchMode):
    """Every operation runs on the CPU, and its result is on cuda:0 if an argument is.

    Raises RuntimeError for arguments on two devices, but for copies and for scalars from the CPU,
    and where a CPU generator is to draw on the GPU. CPU indices into GPU tensors are refused, too:
    a GPU would accept them, but wait for their copy. `drawn` are the names of the operations that
    drew random numbers on the GPU.
    """

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that torch looks for no driver
    copies = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to)

    def __init__(self):
        super().__init__()
        self.drawn = set()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # skipping wraps every call, which takes as long as the call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = []
        devices = []
        collect(args, tensors, devices)
        collect(kwargs.values(), tensors, devices)
        some_on_gpu = any(isinstance(x, GPUTensor) for x in tensors)
        to_gpu = some_on_gpu
        if devices:
            to_gpu = devices[0] == SECOND_CPU or devices[0].type == "cuda"
        elif func.overloadpacket == torch.ops.aten.copy_:
            to_gpu = isinstance(args[0], GPUTensor)
        if not some_on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if some_on_gpu and func.overloadpacket not in self.copies:
            others = [list(x.shape) for x in tensors if x.dim() and not isinstance(x, GPUTensor)]
            if others:
                raise RuntimeError(f"{func}: some tensors are on cuda:0, but on cpu: {others}")
        if torch.is_inference_mode_enabled():  # torch would refuse views of wrapped tensors
            with torch.inference_mode(False), torch.no_grad():
                return self.compute(func, args, kwargs, tensors, to_gpu)
        return self.compute(func, args, kwargs, tensors, to_gpu)

    def compute(self, func, args, kwargs, tensors, to_gpu):
        """Return the results of func on the CPU, placed on cuda:0 if `to_gpu`."""
        random = to_gpu and torch.Tag.nondeterministic_seeded in func.tags
        if random and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a CPU generator cannot draw on cuda:0")
        state = torch.get_rng_state() if random else None
        kwargs = {name: to_cpu(value) for name, value in kwargs.items()}
        results = func(*to_cpu(args), **kwargs)
        if random and not torch.equal(state, torch.get_rng_state()):
            self.drawn.add(func.overloadpacket.__name__)
        given = {id(to_cpu(x)): x for x in tensors}

        def place(result):
            if isinstance(result, (list, tuple)):
                return type(result)([place(part) for part in result])
            if not isinstance(result, torch.Tensor):
                return result
            source = given.get(id(result))
            if source is not None and isinstance(source, GPUTensor) == to_gpu:
                return source  # changed in place
            if source is not None:
                result = result.clone()  # two devices share no memory
            return GPUTensor(result) if to_gpu else result

        return place(results)


def collect(items, tensors, devices):
    """Append the tensors and devices in nested lists and tuples."""
    for item in items:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, (list, tuple)):
            collect(item, tensors, devices)
        elif isinstance(item, torch.device):
            devices.append(item)


def to_cpu(item):
    """Return `item` with GPU tensors as CPU tensors and the GPU as the CPU, also in nested lists
    and tuples.
    """
    if isinstance(item, GPUTensor):
        return item.values
    if isinstance(item, (list, tuple)):
        return type(item)([to_cpu(part) for part in item])
    if isinstance(item, torch.device) and item.type != "meta":
        return CPU
    return item


@contextlib.contextmanager
def pretend(bf16=False):
    """Yield a PretendGPU, within which modules can be moved to cuda:0.

    With `bf16` autocast computes in bfloat16 there. Without it, it has no effect, so that results
    are the CPU's.
    """
    autocast = torch.autocast

    def autocast_on_gpu(device_type, *args, **kwargs):
        if bf16 and device_type == "cuda":
            return autocast("cpu", *args, **kwargs)  # which covers cpu:1
        return contextlib.nullcontext()

    torch.autocast = autocast_on_gpu
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `to` makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) copies from the CPU
    try:
        with PretendGPU() as gpu:
            yield gpu
    finally:
        torch.autocast = autocast
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)


def on_both(function, drawn=()):
    """Return function(device) on the CPU and on the pretended GPU, which may draw random numbers
    with the operations `drawn` only.
    """
    on_cpu = function(CPU)
    with pretend() as gpu:
        on_gpu = function(GPU)
    assert gpu.drawn == set(drawn)
    return on_cpu, on_gpu


@pytest.mark.parametrize(
    "refused, reason",
    [
        (lambda x, y: x + y, "aten.add"),
        (lambda x, y: y.copy_(x) * x, "aten.mul"),
        (lambda x, y: x[y.long()], "aten.index"),
        (lambda x, y: y[x.long()], "aten.index"),
        (lambda x, y: torch.cat([x, y]), "aten.cat"),
        (lambda x, y: torch.stack([x, y]), "aten.stack"),
        (lambda x, y: torch.where(x > 0, x, y), "aten.where"),
        (lambda x, y: nn.Linear(3, 2)(x), "aten"),
        (lambda x, y: x.normal_(generator=torch.Generator()), "generator"),
        (lambda x, y: torch.randn(3, device=GPU, generator=torch.Generator()), "generator"),
        (lambda x, y: x.numpy(), "numpy"),
        (lambda x, y: np.asarray(x), "numpy"),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(refused, reason):
    with pretend(), pytest.raises((RuntimeError, TypeError), match=reason):
        refused(torch.zeros(3, device=GPU), torch.ones(3))


def test_the_pretended_gpu_computes_what_the_cpu_computes():
    def gradient(device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)).to(device)
        x = torch.linspace(-1, 1, 6).view(2, 3).to(device)
        rows = x.new_zeros(3, 3)
        rows[1:] = x
        rows[0] = torch.ones(3)  # a copy from the CPU
        (copy.deepcopy(net)(rows) * torch.tensor(2.0)).sum().backward()
        net(rows).square().sum().backward()
        with torch.inference_mode():
            output = net(rows[1:]).to(CPU)
        assert net[0].weight.device == net[0].weight.grad.device == device
        return net[0].weight.grad.cpu().numpy(), output.numpy()

    for one, other in zip(*on_both(gradient)):
        assert np.array_equal(one, other)


# ---------------------------------------------------------------- a whole run on either device


def noise_clips(folder, person, num_clips, num_frames=12):
    """Return clips of coarse noise about a person's face, and with noise for speech; their files
    are empty.
    """
    rng = data.rng_of(person)
    face = rng.uniform(50, 200, (3, 4, 4))
    clips = []
    for i in range(num_clips):
        path = folder / f"{person}-{i}.mp4"
        path.touch()
        cells = face + rng.normal(0, 20, (num_frames, 3, 4, 4))
        frames = cells.clip(0, 255).astype(np.uint8).repeat(8, 2).repeat(8, 3)  # f 3 32 32
        audio = rng.normal(0, 3000, num_frames * data.SAMPLES_PER_FRAME).astype(np.int16)
        opening = rng.uniform(0, 1, num_frames).astype(np.float32)
        prompt = "smiling" if i % 2 else "calm"
        arrays = frames, audio, data.log_mel(audio)
        clips.append(data.Clip(person, f"clip{i}", path, *arrays, prompt, opening))
    return clips


def random_judges(*args, **kwargs):
    torch.manual_seed(0)
    judges = metrics.Judges().eval().requires_grad_(False)
    judges.has_opening = True
    return judges


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    overrides = [*SMALLEST, f"runtime.directory={folder}"]
    return train.load_config(train.DEFAULTS, overrides=overrides)


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Folders of one run on the CPU and on the pretended GPU, what drew numbers on the GPU, and
    which modules were compiled there.

    The second is interrupted in the middle of its backbone, and continued.
    """
    folder = tmp_path_factory.mktemp("runs")
    public = {name: noise_clips(folder, name, 1) for name in ("p0", "p1")}
    clients = {name: noise_clips(folder, name, 4) for name in ("c0", "c1")}
    people = data.People(public, clients, {"u0": noise_clips(folder, "u0", 2)})
    save_checkpoint = train.save_checkpoint
    sample_batch = data.sample_batch

    def sample_few(people, batch_size, num_frames, *args, **kwargs):
        few = batch_size if num_frames == 1 else min(batch_size, 4)
        return sample_batch(people, few, num_frames, *args, **kwargs)

    def run(device):
        own = folder / device.type
        (own / "run").mkdir(parents=True, exist_ok=True)
        runtime = config["runtime"] | {"directory": str(own)}
        train.train(config | {"runtime": runtime}, people, own / "run", device, fed.Workers())

    def interrupt(path, kind, state):
        save_checkpoint(path, kind, state)
        if kind == "partial backbone":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "sample_batch", sample_few)  # as the statistics take 256 clips
        patch.setattr(metrics, "train_judges", random_judges)
        patch.setattr(data, "write_video", lambda *args: None)
        patch.setattr(train, "backbone_key", lambda *args: "key")
        patch.setattr(train, "BASELINES", ("truth", "autoencoder ceiling"))
        patch.setattr(train, "TRAINED", ("backbone", "personal adapter"))
        compiled = []
        patch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled.append((self, mode)))
        run(CPU)
        assert not compiled  # takes two minutes there and gains nothing
        with pretend() as gpu:
            patch.setattr(train, "SAVE_EVERY", 1)
            patch.setattr(train, "save_checkpoint", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(GPU)
            patch.setattr(train, "save_checkpoint", save_checkpoint)
            torch.rand(3)  # whatever was drawn before
            run(GPU)
    return folder / "cpu" / "run", folder / "cuda" / "run", gpu.drawn, compiled


@pytest.mark.parametrize(
    "file, kind",
    [
        ("backbone.pt", "backbone"),
        ("last.pt", "global adapter"),
        ("personal/c0.pt", "personal adapter"),
    ],
)
def test_a_run_on_the_gpu_makes_the_files_of_a_run_on_the_cpu(runs, file, kind):
    states = [train.load_checkpoint(run / file, kind) for run in runs[:2]]
    for state in states:
        state.pop("seconds", None)
        state.pop("training", None)  # says whether bfloat16 was asked for
    assert train.checksum(states[0]) == train.checksum(states[1])


def test_a_run_on_the_gpu_reports_what_a_run_on_the_cpu_reports(runs):
    ours, theirs = (json.loads((run / "report.json").read_text()) for run in runs[:2])
    for section in ("rows", "paired", "unseen", "unexplained"):
        assert ours[section] == theirs[section]
    ours, theirs = ((run / "rounds.jsonl").read_text() for run in runs[:2])
    assert ours == theirs and json.loads(ours)["simulation"]["failures"] == []


def test_a_run_draws_no_random_numbers_on_the_gpu(runs):
    assert runs[2] == set()


def test_the_unet_of_a_run_is_compiled_on_the_gpu_again_where_it_continues(runs):
    modules = [(type(module), mode) for module, mode in runs[3]]
    assert modules == 2 * [(train.talking.TalkingUNet, "reduce-overhead")]


def test_a_finished_run_speaks_on_the_gpu(runs, config, tmp_path, monkeypatch):
    run = str(runs[0])
    picture = np.arange(3 * 32 * 32).astype(np.uint8).reshape(3, 32, 32)
    audio = np.arange(20 * data.SAMPLES_PER_FRAME).astype(np.int16)
    spoken = []
    monkeypatch.setattr(data, "read_image", lambda *args: picture)
    monkeypatch.setattr(data, "read_speech", lambda path: audio)
    monkeypatch.setattr(data, "write_video", lambda path, blocks, *args: spoken.extend(blocks))
    arguments = ["--action", "generate", "--resume", run, "--output", str(tmp_path / "talk.mp4")]
    arguments += ["--adapter", f"{run}/personal/c0.pt", "--prompt", "calm"]
    arguments += ["--speech", "a.wav", "--reference", "a.png", "b.png"]

    in_windows = config | {"sampling": {"num_steps": 3, "guidance": 1.5, "window": 16}}

    def speak(device):
        spoken.clear()
        train.generate(train.parse_arguments(arguments), in_windows, device)
        return np.concatenate(spoken)

    ours, theirs = on_both(speak)
    assert ours.shape == (20, 3, 32, 32) and np.array_equal(ours, theirs)


def test_a_person_gets_an_own_adapter_on_the_gpu(runs, config, tmp_path, monkeypatch, capsys):
    clips = noise_clips(tmp_path, "me", 4)
    dataset = SimpleNamespace(clips=clips, people={"me": clips}, skipped=[], notes=[])
    monkeypatch.setattr(data, "TalkingHeads", lambda *args, **kwargs: dataset)
    output = tmp_path / "me.pt"
    arguments = ["--action", "personalize", "--resume", str(runs[0]), "--clips", "me"]
    arguments += ["--output", str(output)]

    def personalize(device):
        train.personalize_own(train.parse_arguments(arguments), config, device)
        adapter = train.load_checkpoint(output, "personal adapter")["adapter"]
        return train.checksum(adapter), capsys.readouterr().out

    ours, theirs = on_both(personalize)
    assert ours == theirs


def test_a_dry_run_is_made_on_the_gpu(config, capsys):
    with pretend():
        train.dry_run(train.parse_arguments(["--action", "dry-run"]), config, GPU)
    assert "epsilon" in capsys.readouterr().out


# ---------------------------------------------------------------- settings that the run lacks


def with_two_levels(config):
    return config | {"model": config["model"] | {"channels": [8, 16]}}


def adapted_model(config, device, directions=None, **settings):
    """Return an untrained model of two levels with adapters; every layer has an effect."""
    torch.manual_seed(0)
    model = train.build_model(with_two_levels(config))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model = model.to(device).eval().requires_grad_(False)
    config = config | {"lora": config["lora"] | settings}
    return train.add_adapter(config, model, directions, "lora")


@pytest.mark.parametrize("factors", lora.TRAIN_CHOICES)
def test_adapters_start_equally_on_both_devices(factors, config):
    def vectors(device):
        directions = None
        if factors == "B":
            moments = {}
            unet = train.build_model(with_two_levels(config)).to(device).unet
            for seed, layer in enumerate(lora.adaptable_layers(unet).values()):
                generator = torch.Generator().manual_seed(seed)
                gradient = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.grad = gradient.to(device)
            lora.add_gradient_moments(unet, moments)
            directions = lora.leading_directions(unet, moments, 4)
        model = adapted_model(config, device, directions, train=factors)
        start = lora.adapter_vector(model)
        lora.load_adapter_vector(model, torch.linspace(-1, 1, len(start)))
        loaded = lora.adapter_vector(model)
        merged = lora.merge_lora(model)
        weights = torch.cat([parameter.flatten() for parameter in merged.parameters()])
        assert start.device == CPU and weights.device == device
        return start, loaded, weights.cpu()

    for one, other in zip(*on_both(vectors)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "dropout, options, drawn",
    [
        # masks are drawn where they are used, as nothing starts from them
        (0.2, {"proximal": lambda d: 0.1}, ["bernoulli_"]),
        (0.0, {"correction": lambda d: torch.linspace(-1, 1, d)}, []),  # SCAFFOLD's
    ],
)
def test_a_client_trains_equally_on_both_devices(dropout, options, drawn, config, tmp_path):
    split = data.split_clips(noise_clips(tmp_path, "c0", 4), 0)

    def update(device):
        model = adapted_model(config, device, dropout=dropout)
        judges = random_judges().to(device)
        start = lora.adapter_vector(model)
        kwargs = {"num_steps": 2, "lr": 0.01, "batch_size": 2, "loss_weights": LOSS_WEIGHTS}
        kwargs |= {name: option(len(start)) for name, option in options.items()}
        client = fed.Client("c0", split, 6)
        trained, terms = fed.train_adapter(model, judges, client, start, 0, **kwargs)
        assert trained.device == CPU and not torch.equal(trained, start)
        return train.checksum(trained), terms

    ours, theirs = on_both(update, drawn)
    assert ours == theirs and set(ours[1]) == {"diffusion", *LOSS_WEIGHTS}


def test_a_training_step_in_bfloat16(config, tmp_path):
    clips = noise_clips(tmp_path, "c0", 4)
    computed = []

    def step(device, micro_batch, bf16):
        computed.clear()
        model = adapted_model(config, device)
        model.unet.conv_in.register_forward_hook(lambda *call: computed.append(call[2].dtype))
        judges = random_judges().to(device)
        batch = fed.sample_batch(model, {"c0": clips}, 3, 6, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        terms = fed.backward(model, judges, batch, LOSS_WEIGHTS, generator, micro_batch, bf16)
        gradients = [p.grad.cpu().flatten() for p in lora.adapter_parameters(model)]
        return terms, torch.cat(gradients)

    terms, gradient = step(CPU, 0, bf16=False)
    assert computed == [torch.float32]
    for micro_batch, num_parts in ((0, 1), (2, 2)):
        with pretend(bf16=True):
            rounded_terms, rounded = step(GPU, micro_batch, bf16=True)
        assert computed == [torch.bfloat16] * num_parts and rounded.dtype == torch.float32
        assert rounded_terms == pytest.approx(terms, rel=0.05)
        assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.98


class Embedder(nn.Module):
    """A small network in place of ArcFace, Inception and SyncNet."""

    def __init__(self):
        super().__init__()
        self.of_video = nn.Linear(3 * 64 * 64, 8)
        self.of_sound = nn.Linear(13, 8)

    def forward(self, frames, cepstra=None):
        video = self.of_video(frames.flatten(1))  # f 8
        if cepstra is None:
            return video
        return video[4:], self.of_sound(cepstra.float().unfold(0, 20, 4).mean(-1))  # f-4 8


def test_clips_are_scored_equally_on_both_devices(tmp_path):
    splits = {}
    for name in ("c0", "c1"):
        clips = noise_clips(tmp_path, name, 3, metrics.LEAST_FOR_SYNC)
        splits[name] = {"train": clips[:1], "validation": clips[1:2], "test": clips[2:]}

    def scores(device):
        torch.manual_seed(0)
        networks = {name: Embedder() for name in ("arcface", "inception", "syncnet")}
        networks["lpips"] = metrics.LPIPS()
        for parameter in networks["lpips"].parameters():
            nn.init.uniform_(parameter, 0, 0.01)
        cases = metrics.make_cases(splits, metrics.LEAST_FOR_SYNC, 1)
        for case in cases:
            case.frames = nn.functional.interpolate(case.frames, (64, 64))
        evaluation = metrics.Evaluation(cases, random_judges(), networks, device)
        evaluation.add("mirrored", cases[0], cases[0].frames.flip(-1))
        assert len(evaluation.features) == 4  # two networks, real and mirrored
        assert all(rows.device == CPU for rows in evaluation.features.values())
        scores = {metric: value for (_, metric, _), value in evaluation.scores.items()}
        return scores, train.checksum(evaluation.features)

    ours, theirs = on_both(scores)
    assert ours == theirs
    of_others = {"kid", "kid*", "fid", "fid*", "lpips_vgg", "tlp_vgg", "id_similarity_r100"}
    assert set(metrics.METRICS) - set(ours[0]) <= of_others


def test_judges_are_trained_equally_on_both_devices(tmp_path):
    people = {f"p{i}": noise_clips(tmp_path, f"p{i}", 2) for i in range(5)}

    def train_judges(device):
        judges = metrics.train_judges(people, steps=2, batch_size=2, num_frames=10, device=device)
        weights = [value.cpu() for value in judges.parameters()]
        assert all(parameter.device == device for parameter in judges.parameters())
        return train.checksum(weights), judges.scores

    ours, theirs = on_both(train_judges, ["bernoulli_"])  # dropout's masks
    assert ours == theirs
