"""The command line: one-line errors, and the whole path on a handful of tiny talkers."""

import ast
import contextlib
import errno
import inspect
import json
import math
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data
import fed
import lora
import metrics
import privacy
import train
from test_data import sound_offset, write_clip

ROOT = Path(train.__file__).parent
TINY = [
    "data.size=32",
    "data.clients=5",
    "data.unseen=1",
    "model.autoencoder_channels=[8, 16]",
    "model.channels=[16]",
    "backbone.judge_steps=2",
    "backbone.finder_steps=0",
    "backbone.autoencoder_steps=2",
    "backbone.steps=2",
    "backbone.batch_size=2",
    "fed.local_epochs=0.2",
    "privacy.num_curious=1",
    "personal.clients=2",
    "personal.steps=1",
    "personal.batch_size=2",
    "sampling.num_steps=1",
    "evaluate.num_frames=10",
]


def fails(capsys, *arguments):
    """Return the one line that the command line ends with, at exit status 2."""
    device = [] if "--gpus" in arguments else ["--gpus", "cpu"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*device, *arguments])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "fed.ronds=3"], "did you mean 'rounds'"),
        (["--set", "lora.rank=0"], "lora.rank must lie in 1"),
        (["--set", "lora.rank=two"], "lora.rank must be int"),
        (["--set", "lora.rank=17"], "at most 16"),
        (["--set", "lora.train=C"], "lora.train must be one of R, B, AB"),
        (["--set", "fed=3"], "is a section"),
        (["--set", "seed"], "key=value"),
        (["--set", "fed.rounds=[1"], "is not valid YAML"),
        (["--set", "name="], "name must be str"),
        (["--set", "fed.lr=*a"], "is not valid YAML"),
        (["--set", "fed.lr=nan"], "fed.lr"),
        (["--set", "fed.lr=.inf"], "fed.lr"),
        (["--set", "fed.lr=-1"], "fed.lr must lie in 0"),
        (["--set", "fed.sample_rate=1.5"], "must lie in 1e-06 ... 1,"),
        (["--set", "fed.batch_size=0"], "fed.batch_size must lie in 1"),
        (["--set", "fed.algorithm=fedsgd"], "isfa, scaffold, centralized"),
        (["--set", "fed.algorithm=scaffold"], "fed.gamma=0"),
        (["--set", "fed.algorithm=centralized"], "privacy.enabled=false"),
        (["--set", "model.channels=[]"], "channels"),
        (["--set", "model.channels=[20]"], "channels"),
        (["--set", "data.find_faces=true", "backbone.finder_steps=0"], "finder_steps above 0"),
        (["--set", "data.size=60"], "data.size"),
        (["--set", "privacy.delta=0"], "delta"),
        (["--set", "privacy.delta=0.5"], "delta"),
        (["--set", "privacy.survivor_share=0.3"], "survivor_share"),
        (["--set", "privacy.num_curious=90"], "num_curious"),
        (["--set", "privacy.clip_norm=0"], "clip_norm"),
        (["--preset", "fedavgg"], "did you mean 'fedavg'"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "tests"], "tests"),
        (["--gpus", "333"], "--gpus 333"),
        (["--gpus", "one"], "--gpus one"),
        (["--gpus", "cpu:0"], "--gpus cpu:0"),
        (["--resume", "nowhere"], "nowhere"),
        (["--action", "evaluate"], "--resume"),
        (["--action", "evaluate", "--resume", "nowhere"], "nowhere"),
        (["--action", "generate"], "--reference"),
        (["--set", "data.root=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(arguments, words, capsys, tmp_path):
    directory = f"runtime.directory={tmp_path / 'runs'}"
    if "--set" in arguments:
        arguments = [*arguments, directory]
    elif "--resume" not in arguments:
        arguments = [*arguments, "--set", directory]
    assert words in fails(capsys, *arguments)
    assert not (tmp_path / "runs").exists() and not Path("nowhere").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--action", "trian"], "invalid choice"),
        (["--seed", "3"], "--seed is for --action generate"),
        (["--action", "generate", "--seconds", "nan"], "--seconds must lie in"),
        (["--action", "generate", "--text-scale", "1e30"], "--text-scale must lie in"),
        (["--gpus", "cpu:"], "--gpus cpu:"),
        (["--gpus", "²"], "--gpus ²: give CUDA indices"),
        (["--resume", "nowhere", "--config", "config.yaml"], "leave out --config"),
        (["--resume", str(ROOT)], "no run is there"),
        (["--preset", "a\nb"], "--preset a b"),
        (["--set", "fed.lr=!!bool x"], "--set fed.lr is not valid YAML"),
        (["--set", "fed.lr=" + "[" * 3000], "--set fed.lr is not valid YAML"),
        (["--set", "data={size: 32, size: 64}"], "stands twice"),
        (["--set", "fed.rounds=010"], "010 is no decimal number"),
        (["--set", "fed.lr=1:30.5"], "1:30.5 is no decimal number"),
        (["--set", f"model.channels={[8] * 9}"], "1 to 8 numbers"),
        (["--set", "model.channels=[]", "model.channels=[64]"], "1 to 8 numbers"),
        (["--set", "lora.train=B", "lora.rank=17"], "lora.rank must be at most 16"),
        (["--preset", "centralized", "--set", "fed.sample_rate=0.5"], "centralized needs"),
        (["--preset", "centralized", "--set", "fed.dropout_rate=0.5"], "centralized needs"),
        (["--set", "model.channels=[0]"], "model.channels must lie in 8"),
        (["--set", "personal.rank=0"], "personal.rank must lie in 1"),
        (["--set", "personal.train=C"], "personal.train must be one of R, B, AB"),
        (["--set", "sampling.num_steps=1001"], "sampling.num_steps must lie in 1 ... 1000"),
        (["--set", "privacy.noise_multiplier=1.0"], "privacy.target_epsilon chooses the noise"),
        (["--set", "privacy.enabled=false", "privacy.delta=0.0"], "delta"),
        (["--set", "privacy.clip_norm=1e-320"], "privacy.clip_norm must lie in"),
        (["--set", "privacy.num_curious=0", "fed.sample_rate=0.01"], "2 have to stay"),
        (["--set", "privacy.num_curious=0", "fed.dropout_rate=0.3"], "70 would"),
        (["--set", "name=a/b"], "name becomes"),
        (["--set", 'name="a\\nb"'], "name becomes"),
        (["--set", f"name={'a' * 300}"], "name becomes"),
        (["--set", "name=run #2"], "--set name: ' #' begins a comment"),
        (["--config", ""], "--config is empty"),
        (["--action", "generate", "--adapter", ""], "--adapter is empty"),
        (["--action", "personalize", "--output", ""], "--output is empty"),
        (["--action", "personalize", "--look", ""], "--look is empty"),
        (["--set", "weights=nowhere"], "no such folder of weights: nowhere"),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(train, "run_action", lambda *args: None)
    assert words in fails(capsys, *arguments)


def test_a_fuzz_of_settings_and_flags_finds_no_fault(tmp_path):
    from fuzz_config import fuzz  # which imports this file

    counts, faults = fuzz(200, 0, tmp_path)
    assert not faults
    assert min(counts.values()) >= 10


def test_ranges_and_choices_are_of_keys_that_exist():
    from fuzz_config import KEYS

    for name in [*train.RANGES, *train.CHOICES]:
        assert name in KEYS, name


def test_a_value_in_quotes_may_have_a_hash():
    assert train.load_config(train.DEFAULTS, overrides=["name='run #2'"])["name"] == "run #2"
    assert train.load_config(train.DEFAULTS, overrides=["name=run#2"])["name"] == "run#2"


def test_settings_may_be_taken_back_and_shared(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "fed: &fed {rounds: 3, lr: 0.01}\npresets: {slow: {fed: {<<: *fed, rounds: 9}}}\n"
    )
    config = train.load_config(own, ["slow"], ["privacy.seed=5", "privacy.seed=-1"])
    assert config["fed"]["rounds"] == 9 and config["fed"]["lr"] == 0.01
    assert config["privacy"]["seed"] == -1


def test_settings_given_in_two_places_all_count(capsys):
    args = train.parse_arguments(["--set", "seed=2", "--preset", "plain", "--set", "fed.rounds=3"])
    assert args.set == ["seed=2", "fed.rounds=3"] and args.preset == ["plain"]


def test_too_little_memory_is_a_users_error_and_other_faults_are_ours(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(train, "run_action", fail)
    allocation = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    for message in (allocation, "can't start new thread"):
        assert message in fails(capsys, "--action", "dry-run")
    message = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="shapes"):
        train.main(["--gpus", "cpu", "--action", "dry-run"])


def test_where_a_run_cannot_work_is_said_before_clips_are_decoded(monkeypatch, capsys):
    monkeypatch.setattr(train, "load_people", None)
    error = fails(capsys, "--set", "runtime.directory=/proc/runs")
    assert "/proc/runs/config.yaml cannot be written" in error
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 71 * "x")
    assert "TMPDIR must have at most 75 letters" in fails(capsys)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(train.fcntl, "flock", flock)
    with pytest.raises(ValueError, match="cannot lock files .* another runtime.directory"):
        with train.run_lock(tmp_path):
            pass


def test_the_folder_of_a_run_may_be_the_working_folder(tmp_path, monkeypatch):
    caches = []

    def pretrain(config, public, cache, device, workers):
        caches.append(cache)
        raise InterruptedError

    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(train, "pretrain", pretrain)
    config = train.load_config(train.DEFAULTS)
    with pytest.raises(InterruptedError):
        train.load_or_pretrain(config, {}, Path("."), "cpu", fed.Workers())
    assert caches == [tmp_path / "backbones" / train.backbone_key(config, {})]


def test_personal_adapters_have_a_batch_size_of_their_own():
    config = train.load_config(train.DEFAULTS, (), ["fed.batch_size=3", "personal.batch_size=5"])
    for section, size in (("fed", 3), ("personal", 5)):
        assert train.training_kwargs(config, section, torch.device("cpu"))["batch_size"] == size


def test_broken_yaml_is_named(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("fed: [1, 2")
    assert "mine.yaml" in fails(capsys, "--config", str(path))


def test_later_presets_and_settings_win(tmp_path):
    path = tmp_path / "mine.yaml"
    own = {"fed": {"rounds": 7}, "presets": {1: {"fed": {"rounds": 8, "gamma": 1}}}}
    path.write_text(yaml.safe_dump(own))
    config = train.load_config(path, ["fedavg", "1"], ["fed.lr=1e-3", "data.root=~/people"])
    assert config["data"]["root"] == str(Path.home() / "people")
    settings = config["fed"]
    assert (settings["rounds"], settings["gamma"], settings["lr"]) == (8, 1.0, 0.001)
    assert set(config) == set(train.load_config(train.DEFAULTS))


def test_every_preset_is_valid():
    for name in train.read_yaml(train.DEFAULTS)["presets"]:
        train.load_config(train.DEFAULTS, [name])


def test_the_target_epsilon_chooses_noise_that_keeps_it():
    config = train.load_config(train.DEFAULTS, overrides=["fed.rounds=7"])
    mechanism = train.make_mechanism(config, 100)
    assert privacy.gaussian_epsilon(mechanism.noise_multiplier / 7**0.5, 1e-5) <= 2.0
    assert privacy.gaussian_epsilon(mechanism.noise_multiplier / 7**0.5, 1e-5) > 1.99


def test_a_round_done_four_times_is_reported_with_one_draw_of_its_cohort():
    settings = ["privacy.target_epsilon=0.0", "privacy.noise_multiplier=1.0"]
    config = train.load_config(train.DEFAULTS, overrides=[*settings, "fed.sample_rate=0.4"])
    state = {"adapter": torch.zeros(64), "round": 1, "sampling_key": "00" * 32}
    report = train.describe_privacy(config, state | {"accountant": [[0.4, 1.0, 4]]})
    # the hockey-stick divergence of one sample at rate 0.4, released four times, is 1e-5 at 8.652
    assert report["epsilon_with_sampling"] > 8.652


# ---------------------------------------------------------------- files


def test_json_has_no_infinity():
    tree = {"a": [float("inf"), 1.0], "b": (float("nan"), "x")}
    assert train.finite(tree) == {"a": [None, 1.0], "b": [None, "x"]}


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    state = {"adapter": torch.arange(4.0), "accountant": [[1.0, 2.0, 3]]}
    train.save_checkpoint(path, "global adapter", state)
    assert torch.equal(train.load_checkpoint(path, "global adapter")["adapter"], state["adapter"])
    with pytest.raises(ValueError, match="holds a global adapter, not a backbone"):
        train.load_checkpoint(path, "backbone")
    content = torch.load(path, weights_only=True)
    content["state"]["adapter"][2] = 7
    torch.save(content, path)
    with pytest.raises(ValueError, match="damaged"):
        train.load_checkpoint(path, "global adapter")
    train.save_checkpoint(path, "global adapter", state)
    content = torch.load(path, weights_only=True)
    content.pop("version")
    torch.save(content, path)
    with pytest.raises(ValueError, match="another version of this code"):
        train.load_checkpoint(path, "global adapter")
    torch.save({"adapter": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of PrivFedTalk"):
        train.load_checkpoint(path, "global adapter")
    path.write_text("text")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.load_checkpoint(path, "global adapter")
    with pytest.raises(ValueError, match="cannot be read .Is a directory.$"):  # and no "delete it"
        train.load_checkpoint(tmp_path, "global adapter")


def test_the_checksum_tells_any_difference():
    states = [
        {"a": torch.zeros(2)},
        {"a": torch.zeros(3)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"b": torch.zeros(2)},
        {"a": [0.0, 0.0]},
        {"a": [0.0], "b": 0.0},
    ]
    assert len({train.checksum(state) for state in states}) == len(states)


# ---------------------------------------------------------------- the whole path


def places(folder):
    """Overrides that keep everything in a test's own folder."""
    names = {"data.root": "people", "runtime.directory": "runs", "runtime.cache": "cache"}
    return [f"{key}={folder / name}" for key, name in names.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the run of the whole path at the smallest size."""
    folder = tmp_path_factory.mktemp("path")
    data.make_synthetic(folder / "people", 8, 5, 2, 2, 4, 0.8, 32)
    train.main(["--gpus", "cpu", "--set", *TINY, *places(folder)])
    return folder, next((folder / "runs").glob("*-talkers"))


def read_json(path):
    return json.loads(path.read_text())


def read_rounds(run):
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished):
    _, run = finished
    names = "config.yaml log.txt rounds.jsonl backbone.pt last.pt report.json report.md"
    names += " curves.png grid.png samples personal"
    assert set(names.split()) <= {path.name for path in run.iterdir()}
    report = read_json(run / "report.json")
    rows = report["rows"]
    assert list(rows) == [*train.BASELINES, *train.TRAINED]
    assert rows["truth"]["psnr"]["mean"] == 100
    assert rows["copy reference"]["temporal_jitter"]["mean"] == 0
    assert rows["truth"]["jitter_ratio"]["mean"] == pytest.approx(1)
    assert len(rows["backbone"]["psnr"]["values"]) == 2
    for row in rows.values():
        for cell in row.values():
            assert cell["mean"] is not None or cell["reason"]
    unexplained = report["unexplained"]
    assert unexplained["no motion"]["mean"] == 1 and len(unexplained["backbone"]["by_level"]) == 4
    assert unexplained["backbone"]["ratio_to_backbone"]["mean"] == 1
    assert set(report["unseen"]) == {"truth", "backbone", "global adapter"}
    assert (run / "report.md").read_text().startswith("# talkers")
    people = sorted(path.stem for path in (run / "personal").iterdir())
    assert people == ["client-000", "client-001"]
    assert data.read_speech(next((run / "samples").glob("*.mp4"))).any()


@pytest.fixture(scope="module")
def rebuilt(finished):
    """The config of the run, its people and clients, its model without adapters, with the global
    one and with each client's own, and the judges of the tables, from the run's files.
    """
    _, run = finished
    config = train.load_config(run / "config.yaml")
    people = train.load_people(config)
    backbone, model, judges, state = train.load_run(config, run, torch.device("cpu"))
    own = train.personal_model(config, model, state["adapter"], backbone["directions"])
    models = {"backbone": train.merged_copy(model, torch.zeros_like(state["adapter"]))}
    models["global adapter"] = train.merged_copy(model, state["adapter"])
    for path in (run / "personal").iterdir():
        adapter = train.load_checkpoint(path, "personal adapter")["adapter"]
        models[path.stem] = train.merged_copy(own, adapter)
    clients = train.make_clients(config, people, run)[: config["personal"]["clients"]]
    return config, people, clients, models, judges["table"]


@torch.no_grad()
def assert_is_row_of(rows, method, case, frames, judges):
    """Whether a method's row holds the scores of these frames."""
    similarity = (judges.identity(frames) * judges.identity(case.frames)).sum(-1)
    expected = {"psnr": metrics.psnr(frames, case.frames), "id_similarity*": similarity}
    for metric, values in expected.items():
        found = rows[method][metric]["values"][case.key]
        assert found == pytest.approx(float(values.mean()), rel=1e-5), (method, metric)


def test_each_row_of_a_report_is_of_its_method_and_person(finished, rebuilt):
    _, run = finished
    config, people, clients, models, judges = rebuilt
    report = read_json(run / "report.json")
    for client in clients:
        (case,) = metrics.make_cases({client.name: client.split}, 10, 1)
        rows = report["rows"]
        assert len({rows[method]["psnr"]["values"][case.key] for method in rows}) == len(rows)
        for method in train.TRAINED:
            used = models[client.name if "personal" in method else method]
            mel = case.other_mel if method.endswith("other speech") else case.mel
            frames = train.generate_case(used, case, mel, config)
            assert_is_row_of(rows, method, case, frames, judges)
        for method in ("copy reference", "autoencoder ceiling"):
            frames = train.baseline_frames(method, case, models["backbone"])
            assert_is_row_of(rows, method, case, frames, judges)
    assert rows["autoencoder ceiling"]["psnr"]["mean"] > rows["copy reference"]["psnr"]["mean"]
    ((name, clips),) = people.unseen.items()
    (case,) = metrics.make_cases({name: {"train": clips[:-1], "test": clips[-1:]}}, 10, 1)
    for method in ("backbone", "global adapter"):
        frames = train.generate_case(models[method], case, case.mel, config)
        assert_is_row_of(report["unseen"], method, case, frames, judges)
    assert report["judges"]["scores"] == judges.scores


def test_each_share_of_motion_in_a_report_is_of_its_method_and_person(finished, rebuilt):
    _, run = finished
    config, _, clients, models, _ = rebuilt
    found = read_json(run / "report.json")["unexplained"]
    methods = ("linear denoiser", "backbone", "global adapter", "personal adapter")
    for k, client in enumerate(clients):
        (clip,) = client.split["test"]
        own = {"linear denoiser": "backbone", "personal adapter": client.name}
        for method in methods:
            used = models[own.get(method, method)]
            batch = fed.fixed_batch(used, [clip], client.split["train"], 10)
            seed = fed.derive_seed(config["seed"], k)
            use_unet = method != "linear denoiser"
            share = float(fed.unexplained_variance(used, batch, seed, use_unet=use_unet).mean())
            key = f"{client.name}/{clip.name}"
            assert found[method]["values"][key] == pytest.approx(share, rel=1e-5), method
    assert len({found[method]["mean"] for method in methods}) == len(methods)


def test_shares_of_motion_are_means_over_people_and_by_noise_level(monkeypatch):
    def person(name, *tests):
        clips = [SimpleNamespace(name=test) for test in tests]
        return SimpleNamespace(name=name, split={"train": [], "test": clips})

    shares = {"1": 0.5, "2": 0.8, "3": 0.8, "4": 0.8}
    levels = torch.tensor([[1.2], [0.8]])  # of each share, by noise level

    def unexplained_variance(model, clips, seed, use_unet):
        own = [shares[clip.name] if model == "ours" else 2.0 for clip in clips]
        return levels * torch.tensor(own)

    monkeypatch.setattr(fed, "fixed_batch", lambda model, clips, *rest: clips)
    monkeypatch.setattr(fed, "unexplained_variance", unexplained_variance)
    clients = [person("a", "1"), person("b", "2", "3", "4")]
    config = train.load_config(train.DEFAULTS)
    models = {"backbone": "before", "global adapter": "ours"}
    table = train.unexplained_table(config, models, None, {}, clients, fed.Workers())
    row = table["global adapter"]
    assert row["mean"] == pytest.approx(0.65) and row["groups"] == 2
    ratio = row["ratio_to_backbone"]
    assert ratio["mean"] == pytest.approx(0.325) and ratio["groups"] == 2
    assert row["by_level"] == pytest.approx([1.2 * 0.725, 0.8 * 0.725])


def test_differences_are_of_the_later_method_minus_the_one_before_it(finished):
    _, run = finished
    report = read_json(run / "report.json")
    for before, method in zip(train.TRAINED, train.TRAINED[1:]):
        found = report["paired"][f"{method} - {before}"]["psnr"]["mean"]
        later, earlier = (report["rows"][name]["psnr"]["mean"] for name in (method, before))
        assert found == pytest.approx(later - earlier) and abs(found) > 1e-6
    backbone, adapter = (report["unexplained"][name] for name in train.TRAINED[:2])
    ratios = [adapter["values"][key] / value for key, value in backbone["values"].items()]
    assert adapter["ratio_to_backbone"]["mean"] == pytest.approx(np.mean(ratios))


def test_the_tables_of_a_report_stand_under_their_titles(finished):
    _, run = finished
    report = read_json(run / "report.json")
    sections = (run / "report.md").read_text().split("\n## ")
    tables = dict(section.split("\n", 1) for section in sections[1:])
    for title, rows in (
        ("generated clips", report["rows"]),
        ("paired differences", report["paired"]),
        ("people that nothing was trained on", report["unseen"]),
    ):
        for method, row in rows.items():
            cell = metrics.markdown_table({method: row}, ("psnr",)).splitlines()[2].split("|")[2]
            (line,) = re.findall(rf"^\| {re.escape(method)} \|.*", tables[title], re.M)
            assert f"|{cell}|" in line, (title, method)


def picture_case(name, loudness=1000):
    """A case of ten frames whose mouth is widest open in frame 6."""
    noise = np.random.default_rng(0).normal(size=6400) * loudness
    return SimpleNamespace(
        person="anna",
        clip=SimpleNamespace(name=name),
        frames=torch.zeros(10, 3, 32, 32),
        opening=torch.eye(10)[6],
        reference=np.full((3, 32, 32), 250, np.uint8),
        audio=noise.astype(np.int16),
    )


def test_each_picture_stands_under_the_name_of_its_method(tmp_path):
    times = np.arange(10, dtype=np.uint8)[:, None, None, None]
    clips = {"truth": 50 + times, "backbone": 150 + times}
    clips = {name: np.broadcast_to(clip, (10, 3, 32, 32)) for name, clip in clips.items()}
    titles = []
    for first, second in (("truth", "backbone"), ("backbone", "truth")):
        shown = {first: clips[first], second: clips[second]}
        train.save_pictures(tmp_path, [(picture_case("1"), shown)])
        sheet = np.asarray(Image.open(tmp_path / "grid.png"))
        columns = np.split(sheet, 3, axis=1)
        levels = [int(column[48, 32, 0]) for column in columns]
        assert levels == [250, int(clips[first][6, 0, 0, 0]), int(clips[second][6, 0, 0, 0])]
        titles.append([column[:16].tobytes() for column in columns])
    (reference, *names), again = titles
    assert len({reference, *names}) == 3 and again == [reference, *names[::-1]]


def test_each_sample_has_its_own_sound(tmp_path):
    clip = {"truth": np.full((10, 3, 32, 32), 90, np.uint8)}
    cases = [picture_case(str(i), 1000 * (1 + i)) for i in range(3)]
    train.save_pictures(tmp_path, [(case, clip) for case in cases])
    loudness = [data.read_speech(tmp_path / f"samples/anna-{i}.mp4").std() for i in (0, 2)]
    assert loudness[1] > 2 * loudness[0]


def test_the_curve_of_the_loss_is_a_mean_of_its_steps(tmp_path, monkeypatch, capsys):
    drawn = []

    def draw_curve(title, values):
        drawn.extend(values)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(train, "draw_curve", draw_curve)
    tables = ("rows", "paired", "unseen", "unexplained")
    sections = ("privacy", "communication", "seconds", "hardware", "speed")
    report = {"name": "talkers"} | {name: {} for name in (*tables, *sections)}
    train.write_report(tmp_path, report, [2.0] * 60)
    assert drawn == pytest.approx([2.0] * len(drawn)) and drawn


def test_a_run_keeps_its_promise_of_privacy(finished):
    _, run = finished
    report = read_json(run / "report.json")["privacy"]
    rounds = read_rounds(run)
    assert report["private"] and 1.99 < report["epsilon"] <= 2.0
    assert [r["round"] for r in rounds] == [0, 1]
    terms = {"diffusion", "tdc", "identity", "perceptual", "sync"}  # of Eq. 12
    assert terms <= rounds[0]["simulation"].keys()
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"] == report["epsilon"]
    assert privacy.main(["--verify", str(run)]) in (0, None)


def test_nothing_private_is_pretrained_on(finished, monkeypatch):
    """The backbone is the same whatever the clients' clips are."""
    folder, run = finished
    overrides = [*TINY, *places(folder)]
    config = train.load_config(train.DEFAULTS, overrides=overrides)
    people = train.load_people(config)
    names = {name for name in people.public}
    assert not names & set(people.clients) and not names & set(people.unseen)
    seen = set()
    real = data.sample_batch
    judges = []
    train_judges = metrics.train_judges
    measured = []
    identity_threshold = metrics.identity_threshold

    def watched(people, *args, **kwargs):
        seen.update(clip.person for clips in people.values() for clip in clips)
        return real(people, *args, **kwargs)

    def watched_judges(people, *args, **kwargs):
        judges.append((set(people), train_judges(people, *args, **kwargs)))
        return judges[-1][1]

    def watched_threshold(judges, people):
        measured.extend(people)
        return identity_threshold(judges, people)

    def loader(batches, first, stop):  # in this process, where they are watched
        return [batches[step] for step in range(first, stop)]

    monkeypatch.setattr(data, "sample_batch", watched)
    monkeypatch.setattr(fed.Batches, "loader", loader)
    monkeypatch.setattr(metrics, "train_judges", watched_judges)
    monkeypatch.setattr(metrics, "identity_threshold", watched_threshold)
    monkeypatch.setitem(config["runtime"], "directory", str(folder / "other"))
    run = folder / "other" / "run"
    cpu = torch.device("cpu")
    backbone = train.load_or_pretrain(config, people.public, run, cpu, fed.Workers())
    assert seen == names
    own = train.load_checkpoint(run / "backbone.pt", "backbone")
    assert train.checksum(backbone["model"]) == train.checksum(own["model"])
    # Judges of losses and of tables know other halves, and strangers are told by neither's own.
    (one, of_losses), (other, of_tables) = judges
    assert one | other == names and not one & other and set(measured) == other
    for kind, trained in (("loss", of_losses), ("table", of_tables)):
        assert train.checksum(backbone["judges"][kind]) == train.checksum(trained.state_dict())


def test_other_words_and_sound_make_another_backbone(finished):
    folder, _ = finished
    config = train.load_config(train.DEFAULTS, [], [*TINY, *places(folder)])
    public = train.load_people(config).public
    key = train.backbone_key(config, public)
    assert train.backbone_key(config, train.load_people(config).public) == key
    name, (clip, *others) = next(iter(public.items()))
    # another fingerprint: of other pictures or other sound
    for change in ({"prompt": "angry"}, {"opening": None}, {"fingerprint": 1}):
        changed = public | {name: [replace(clip, **change), *others]}
        assert train.backbone_key(config, changed) != key, list(change)


def test_a_backbone_that_another_run_makes_is_waited_for(tmp_path, monkeypatch):
    # The cache lies beside the run, wherever the folder of new runs is.
    config = train.load_config(train.DEFAULTS, overrides=places(tmp_path / "elsewhere"))
    cache = tmp_path / "runs" / "backbones" / train.backbone_key(config, {})
    half_written = cache / ".0123456789abcdef.pt"
    monkeypatch.setattr(train, "pretrain", None)  # not to be called
    arguments = config, {}, tmp_path / "runs" / "new", torch.device("cpu"), fed.Workers()
    with ThreadPoolExecutor() as other:
        with train.run_lock(cache):
            waiting = other.submit(train.load_or_pretrain, *arguments)
            half_written.touch()
            assert not wait([waiting], timeout=1).done
            train.save_checkpoint(cache / "backbone.pt", "backbone", {"losses": [1.0]})
        assert waiting.result() == {"losses": [1.0]} and not half_written.exists()


def test_comments_do_not_retrain_a_backbone_and_code_does(monkeypatch):
    config = train.load_config(train.DEFAULTS)
    getsource = inspect.getsource

    def key_with(module=None, old="", new=""):
        def changed(item):
            text = getsource(item)
            assert item is not module or text.count(old) == 1
            return text.replace(old, new) if item is module else text

        monkeypatch.setattr(train.inspect, "getsource", changed)
        train.source_code.cache_clear()
        return train.backbone_key(config, {})

    key = key_with()
    assert (
        key_with(
            data,
            'def by_person(clips, min_frames=0):\n    """',
            'def by_person(clips, min_frames=0):\n    # !\n    """!',
        )
        == key
    )
    assert key_with(train, "def write_report(", "def write_reports(") == key
    # the backbone is trained without Eq. 9-11
    assert key_with(fed, '"perceptual": distance.mean()', '"perceptual": distance.sum()') == key
    # what trains, what that uses, and what this uses, constants, too
    assert key_with(train, "(step + 1) / 50", "(step + 1) / 60") != key
    assert key_with(metrics, "nn.Linear(96 * 4 * 4, 128)", "nn.Linear(96 * 4 * 4, 129)") != key
    assert key_with(metrics, "FACE_SIDES = (20, 48)", "FACE_SIDES = (20, 47)") != key
    assert (
        key_with(data, "def typical_liveliness(clips):", "def typical_liveliness(clips, x):") != key
    )
    train.source_code.cache_clear()


def generate(run, speech, output, *arguments):
    picture = str(run / "grid.png")
    base = ["--gpus", "cpu", "--action", "generate", "--resume", str(run), "--speech", str(speech)]
    train.main([*base, "--reference", picture, "--output", str(output), *arguments])


def first_clip(folder, person="client-000"):
    return next((folder / "people" / person).glob("*.mp4"))


def test_a_finished_run_speaks_in_step_with_the_sound(
    finished, rebuilt, tmp_path, monkeypatch, capsys
):
    folder, run = finished
    clip = first_clip(folder)
    adapter = run / "personal" / "client-000.pt"
    whole = tmp_path / "whole.mp4"
    spoken = []
    stream = train.talking.TalkingHead.stream

    def watched(model, reference, mel, words, generator, **sampling):
        spoken.append((model, words, generator.initial_seed(), sampling))
        return stream(model, reference, mel, words, generator, **sampling)

    monkeypatch.setattr(train.talking.TalkingHead, "stream", watched)
    prompt = "furious" + 9 * " smiling"
    generate(run, clip, whole, "--adapter", str(adapter), "--prompt", prompt)
    printed = capsys.readouterr().out
    assert "ignored furious" in printed and "more than 8 words, cut off: smiling\n" in printed
    assert "20 frames" in printed
    frames, _ = data.read_video(whole, 32)
    assert frames.shape == (20, 3, 32, 32)
    assert abs(sound_offset(whole, data.read_speech(clip))) < 0.02
    assert b"synthetic" in whole.read_bytes()
    short = tmp_path / "short.mp4"
    scales = ["--speech-scale", "0.5", "--identity-scale", "0.25"]
    numbers = ["--seconds", "0.5", "--set", "sampling.num_steps=3", "--seed", "7"]
    generate(run, clip, short, *numbers, *scales, "--no-watermark")
    assert len(data.read_video(short, 32)[0]) == 12
    # What speaks has the adapters that it ought to have, and what was asked for reaches it.
    config, *_, models, _ = rebuilt
    (own, words, seed, plain), (shared, no_words, own_seed, changed) = spoken
    for used, name in ((own, "client-000"), (shared, "global adapter")):
        state = models[name].state_dict()
        assert all(
            torch.equal(value, state[key])
            for key, value in used.state_dict().items()
            if torch.is_tensor(value)
        )
    assert torch.equal(words, own.text_encoder.ids([8 * "smiling "])) and not no_words.any()
    assert (seed, plain["num_steps"]) == (config["seed"], 1)
    assert (own_seed, changed["num_steps"]) == (7, 3)
    assert plain["scales"] == {"speech": 1.0, "identity": 1.0, "text": 2.0}
    assert changed["scales"] == {"speech": 0.5, "identity": 0.25, "text": 2.0}


def test_the_watermark_is_in_the_corner_and_nowhere_else():
    frames = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    change = (train.add_watermark(frames) - frames).amax((0, 1))
    assert float(change[-12:, -16:].max()) > 0.3
    assert float(change[:-12].max()) == float(change[:, :-20].max()) == 0


def test_own_videos_become_an_adapter_that_only_its_run_accepts(
    finished, rebuilt, tmp_path, monkeypatch, capsys
):
    folder, run = finished
    # So small a run is mostly noise, which may explain less of a clip than nothing does.
    *_, models, _ = rebuilt
    shared = train.checksum(models["global adapter"].state_dict())
    measured = []
    fixed_batch = fed.fixed_batch

    def share(model, *args):
        return torch.tensor([0.2 if train.checksum(model.state_dict()) == shared else 0.1])

    def watched(model, clips, training_clips, num_frames):
        measured.extend([clips, training_clips])
        return fixed_batch(model, clips, training_clips, num_frames)

    monkeypatch.setattr(fed, "unexplained_variance", share)
    monkeypatch.setattr(fed, "fixed_batch", watched)
    output = tmp_path / "me.pt"
    clips = ["--clips", str(folder / "people" / "client-001"), "--output"]
    personalize = ["--action", "personalize", "--resume", str(run), *clips]
    assert "must end in .pt" in fails(capsys, *personalize, str(tmp_path / "me"))
    train.main(["--gpus", "cpu", *personalize, str(output)])
    printed = capsys.readouterr().out
    assert "held-out pieces, personal adapter: 0.1000" in printed
    assert "held-out pieces, global adapter: 0.2000" in printed
    tested, trained_on = ({clip.name for clip in clips} for clips in measured)
    assert len(tested) == 1 and len(trained_on) == 2 and not tested & trained_on
    generate(run, first_clip(folder, "client-001"), tmp_path / "talk.mp4", "--adapter", str(output))
    base = ["--action", "generate", "--resume", str(run), "--reference", str(run / "grid.png")]
    base += ["--speech", str(first_clip(folder)), "--output", str(tmp_path / "no.mp4")]
    error = fails(capsys, *base, "--adapter", str(run / "backbone.pt"))
    assert "holds a backbone, not a personal adapter" in error
    # It speaks whatever `personal` says now.
    generate(
        *(run, first_clip(folder, "client-001"), tmp_path / "2.mp4", "--adapter", str(output)),
        *("--set", "personal.rank=2", "personal.train=R"),
    )
    assert (tmp_path / "2.mp4").read_bytes() == (tmp_path / "talk.mp4").read_bytes()
    content = train.load_checkpoint(output, "personal adapter")
    content["description"]["origin"] = "another adapter"
    train.save_checkpoint(output, "personal adapter", content)
    assert "another global adapter than the run has now" in fails(
        capsys, *base, "--adapter", str(output)
    )
    assert not (tmp_path / "no.mp4").exists()


def test_a_personal_adapter_goes_part_of_the_way_that_its_clips_lead(
    finished, tmp_path, monkeypatch
):
    _, run = finished
    config = train.load_config(run / "config.yaml")
    cpu = torch.device("cpu")
    backbone, model, judges, state = train.load_run(config, run, cpu)
    model = train.personal_model(config, model, state["adapter"], backbone["directions"])
    client = train.make_clients(config, train.load_people(config), run)[0]
    start = lora.adapter_vector(model)
    kwargs = train.training_kwargs(config, "personal", cpu)
    seed = fed.derive_seed(config["fed"]["seed"], 0)
    trained, _ = fed.train_adapter(model, judges["loss"], client, start, seed, **kwargs)
    assert (trained - start).abs().max() > 1e-4
    copied = copy_run(run, tmp_path)
    path = copied / "personal" / f"{client.name}.pt"
    saved = train.load_checkpoint(path, "personal adapter")["adapter"]
    expected = start + 0.8 * (trained - start)
    torch.testing.assert_close(saved, expected, atol=1e-6, rtol=1e-4)
    # Those of another coefficient are trained anew.
    monkeypatch.setattr(train, "MIXING_COEFFICIENT", 0.5)
    train.main(["--gpus", "cpu", "--resume", str(copied)])
    saved = train.load_checkpoint(path, "personal adapter")["adapter"]
    expected = start + 0.5 * (trained - start)
    torch.testing.assert_close(saved, expected, atol=1e-6, rtol=1e-4)


def test_own_videos_are_cut_into_pieces_as_long_as_a_training_window(
    finished, tmp_path, monkeypatch, capsys
):
    _, run = finished
    config = train.load_config(run / "config.yaml")
    cpu = torch.device("cpu")
    loaded = train.load_run(config, run, cpu)
    monkeypatch.setattr(train, "load_run", lambda *args: loaded)
    config["backbone"]["num_frames"] = 60
    write_clip(tmp_path / "short.mp4", num_frames=120)
    write_clip(tmp_path / "long.mp4", num_frames=180)
    arguments = ["--action", "personalize", "--resume", str(run), "--clips"]
    output = ["--output", str(tmp_path / "me.pt")]
    args = train.parse_arguments([*arguments, str(tmp_path / "short.mp4"), *output])
    with pytest.raises(ValueError, match="three pieces of 2.4 s are needed, there are 2"):
        train.personalize_own(args, config, cpu)
    args = train.parse_arguments([*arguments, str(tmp_path / "long.mp4"), *output])
    train.personalize_own(args, config, cpu)
    assert "made of 1 pieces of video" in capsys.readouterr().out


class FixedFinder:
    """A face finder that finds the same boxes in every picture."""

    drawings = True

    def __init__(self, *boxes):
        self.boxes = torch.tensor(boxes).reshape(-1, 4)

    def fingerprint(self):
        return str(self.boxes)

    def find(self, picture, usual):
        return self.boxes


def test_a_picture_without_a_face_is_refused_and_what_is_used_can_be_seen(
    finished, tmp_path, monkeypatch, capsys
):
    folder, run = finished
    look = ["--look", str(tmp_path / "look")]
    base = ["--action", "generate", "--resume", str(run), "--reference", str(run / "grid.png")]
    base += ["--speech", str(first_clip(folder)), "--output", str(tmp_path / "talk.mp4")]
    monkeypatch.setattr(train, "load_finder", lambda *args: FixedFinder())
    error = fails(capsys, *base, *look)
    assert "grid.png: no face found in it (the face finder has seen drawings only)" in error
    assert not (tmp_path / "talk.mp4").exists() and not (tmp_path / "look").exists()
    monkeypatch.setattr(train, "load_finder", lambda *args: FixedFinder([10.0, 20.0, 50.0, 60.0]))
    train.main(["--gpus", "cpu", *base, *look])
    assert "this backbone has seen drawings only" in capsys.readouterr().out
    with Image.open(tmp_path / "look" / "reference.png") as seen:
        assert seen.size == (32, 32)


def test_people_move_as_lively_as_in_their_own_clips(finished, tmp_path, monkeypatch):
    folder, run = finished
    people = train.load_people(train.load_config(run / "config.yaml"))
    name = "client-000"
    split = data.split_clips(people.clients[name], 1)
    own = data.typical_liveliness(split["train"])
    adapter = run / "personal" / f"{name}.pt"
    assert train.load_checkpoint(adapter, "personal adapter")["liveliness"] == pytest.approx(own)
    used = []
    decode = train.talking.TalkingHead.decode

    def watched(model, x0, reference, liveliness):
        used.append(float(liveliness))
        return decode(model, x0, reference, liveliness)

    monkeypatch.setattr(train.talking.TalkingHead, "decode", watched)
    generate(run, first_clip(folder), tmp_path / "own.mp4", "--adapter", str(adapter))
    assert used == pytest.approx([own] * len(used)) and used
    used.clear()
    generate(run, first_clip(folder), tmp_path / "public.mp4")
    config = train.load_config(run / "config.yaml")
    _, model, _, _ = train.load_run(config, run, torch.device("cpu"))
    typical = float(model.typical_liveliness)
    assert used == pytest.approx([typical] * len(used)) and used
    assert typical != pytest.approx(own)
    used.clear()
    case = train.metrics.make_cases({name: split}, 10, 1)[0]
    train.generate_case(model, case, case.mel, config)
    assert used == pytest.approx([own] * len(used)) and used


def test_test_clips_have_noise_of_their_own_which_methods_share(finished, monkeypatch):
    folder, run = finished
    config = train.load_config(run / "config.yaml")
    _, model, _, _ = train.load_run(config, run, torch.device("cpu"))
    clients = list(train.load_people(config).clients.items())[:2]
    splits = {name: data.split_clips(own, config["seed"]) for name, own in clients}
    cases = train.metrics.make_cases(splits, 10, 1)
    seeds = []
    generate = train.talking.TalkingHead.generate

    def watched(model, reference, mel, words, generator, **kwargs):
        seeds.append(generator.initial_seed())
        return generate(model, reference, mel, words, generator, **kwargs)

    monkeypatch.setattr(train.talking.TalkingHead, "generate", watched)
    for case in (cases[0], cases[0], cases[1]):
        train.generate_case(model, case, case.mel, config)
    train.generate_case(model, cases[0], cases[0].mel, config | {"seed": config["seed"] + 1})
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_clients_are_measured_with_noise_of_their_own_which_methods_share(finished):
    _, run = finished
    config = train.load_config(run / "config.yaml")
    _, model, _, _ = train.load_run(config, run, torch.device("cpu"))
    clients = train.make_clients(config, train.load_people(config), run)[:1]
    twin = fed.Client("twin", clients[0].split, clients[0].num_frames)
    methods = {"backbone": model, "global adapter": model}
    workers = fed.Workers()
    table = train.unexplained_table(config, methods, model, {}, [*clients, twin], workers)
    first, second = table["backbone"]["values"].values()
    assert first != second and table["backbone"] == table["global adapter"]


def test_the_limit_is_that_of_the_public_clip_that_is_explained_worst(monkeypatch):
    shares = {("a2", "a1"): 0.3, ("b2", "b1"): 0.8, ("c2", "c1"): 0.5}  # clip, reference's clip

    def unexplained_variance(model, batch, seed, use_unet):
        assert not use_unet
        return torch.tensor([shares[batch]])

    monkeypatch.setattr(fed, "fixed_batch", lambda model, clips, own, num: (*clips, *own))
    monkeypatch.setattr(fed, "unexplained_variance", unexplained_variance)
    public = {"a": ["a1", "a2"], "b": ["b1", "b2", "b3"], "c": ["c1", "c2"], "d": ["d1"]}
    assert train.public_unexplained(None, public) == pytest.approx(0.8)
    assert train.public_unexplained(None, {"d": ["d1"]}) is None


def test_clips_that_the_model_cannot_explain_and_strangers_are_named(finished, tmp_path, capsys):
    folder, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    backbone = train.load_checkpoint(copy / "backbone.pt", "backbone")
    assert 0 < backbone["public_unexplained"] and 0 < backbone["identity_threshold"] < 2
    backbone |= {"public_unexplained": 1e-6, "identity_threshold": -1.0}
    train.save_checkpoint(copy / "backbone.pt", "backbone", backbone)
    clips = folder / "people" / "client-001"
    arguments = ["--clips", str(clips), "--output", str(tmp_path / "me.pt")]
    arguments += ["--look", str(tmp_path / "look")]
    train.main(["--gpus", "cpu", "--action", "personalize", "--resume", str(copy), *arguments])
    printed = capsys.readouterr().out
    assert "the model does not explain these clips" in printed and "0.0000 of the w" in printed
    assert "held-out pieces" not in printed
    assert "another person" in printed and first_clip(folder, "client-001").name in printed
    assert len(list((tmp_path / "look").glob("*.png"))) == len(list(clips.glob("*.mp4")))


def test_own_clips_are_used_however_they_are_named(finished, tmp_path, capsys):
    folder, run = finished
    first, second, third = sorted((folder / "people" / "client-001").glob("*.mp4"))[:3]
    for source, name in (
        (first, "trip/day1/birthday_1.mp4"),
        (second, "trip/day2/anna_2.mp4"),
        (third, "bob_1.mp4"),
    ):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "mine" / name)
    base = ["--action", "personalize", "--resume", str(run), "--output", str(tmp_path / "me.pt")]
    train.main(["--gpus", "cpu", *base, "--clips", str(tmp_path / "mine")])
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "me.pt: made of" in printed


@pytest.fixture(scope="module")
def faces_cut(finished, tmp_path_factory):
    """The config of a run with a new cache, its people before and after their faces are cut out,
    and the files that were decoded for that.
    """
    _, run = finished
    config = train.load_config(run / "config.yaml")
    people = train.load_people(config)
    config["runtime"]["cache"] = str(tmp_path_factory.mktemp("faces"))
    decoded = []
    decode = data.CacheFile.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data.CacheFile, "write", lambda file: (decoded.append(file.source), decode(file))
        )
        cut = train.find_faces(config, people, FixedFinder([0.0, 0.0, 20.0, 20.0]))
    return config, people, cut, decoded


def test_faces_are_cut_out_of_private_clips_only(faces_cut):
    config, people, cut, _ = faces_cut
    assert cut.public is people.public
    for before, after in ((people.clients, cut.clients), (people.unseen, cut.unseen)):
        assert list(before) == list(after)
        for name in before:
            assert len(before[name]) == len(after[name])
            assert not np.array_equal(before[name][0].frames, after[name][0].frames)
    with pytest.raises(ValueError, match="no face found"):
        train.find_faces(config, people._replace(clients={}), FixedFinder())


def test_public_clips_are_not_decoded_again_to_find_faces(faces_cut):
    _, people, _, decoded = faces_cut
    private = [clip for role in people[1:] for own in role.values() for clip in own]
    assert sorted(decoded) == sorted(str(clip.path) for clip in private)


def test_generation_refuses_what_it_cannot_use(finished, capsys, tmp_path):
    folder, run = finished
    clip = str(first_clip(folder))
    text = tmp_path / "face.png"
    text.write_text("no picture")
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    base = ["--action", "generate", "--resume", str(run)]
    output = ["--output", str(tmp_path / "talk.mp4")]
    picture = ["--reference", str(run / "grid.png")]
    assert "face.png" in fails(capsys, *base, *output, "--reference", str(text), "--speech", clip)
    assert "empty.wav" in fails(capsys, *base, *output, *picture, "--speech", str(empty))
    own = [*base, *output, *picture, "--speech", clip]
    assert "face.png" in fails(capsys, *own, "--adapter", str(text))
    assert str(tmp_path) in fails(
        capsys, *base, *picture, "--speech", clip, "--output", str(tmp_path)
    )
    assert not (tmp_path / "talk.mp4").exists()


# ---------------------------------------------------------------- resume and workers


def snapshot(run):
    """Return the contents of every file of a run but the log, which may grow."""
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.name not in ("log.txt", ".lock")}


def test_a_refused_resume_changes_nothing(finished, capsys):
    _, run = finished
    before = snapshot(run)
    error = fails(capsys, "--resume", str(run), "--set", "lora.rank=3")
    assert "lora.rank=6" in error
    assert "fed.algorithm" in fails(capsys, "--resume", str(run), "--preset", "scaffold", "plain")
    assert "is a section" in fails(capsys, "--resume", str(run), "--set", "fed=1")
    moved = str(run.parent / "synthetic-moved")  # new talkers of that name would be other people
    error = fails(capsys, "--resume", str(run), "--set", f"data.root={moved}")
    assert f"no dataset at {moved}: --set data.root=DIR" in error and not Path(moved).exists()
    with train.run_lock(run):
        assert "another process is at work" in fails(capsys, "--resume", str(run))
    assert snapshot(run) == before


@pytest.fixture(scope="module")
def evaluated(finished):
    """The files of a run before and after it is evaluated again, and which cases were generated
    with which adapters: [(person, vector)], and whose judges each part of the run was given.
    """
    _, run = finished
    before = snapshot(run)
    (run / "samples" / "of-another-client.mp4").write_bytes(b"")
    used = []
    judged = {}
    merged_copy = train.merged_copy
    generate_case = train.generate_case

    def recorded(name):
        function = getattr(train, name)

        def call(*args):
            (judges,) = (arg for arg in args if isinstance(arg, metrics.Judges))
            judged[name] = train.checksum(judges.state_dict())
            return function(*args)

        return call

    def merged_with_vector(model, vector):
        merged = merged_copy(model, vector)
        merged.vector = vector
        return merged

    def watched(model, case, mel, config):
        used.append((case.person, model.vector))
        return generate_case(model, case, mel, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "merged_copy", merged_with_vector)
        patch.setattr(train, "generate_case", watched)
        for name in ("federate", "personalize", "evaluate"):
            patch.setattr(train, name, recorded(name))
        train.main(["--gpus", "cpu", "--action", "evaluate", "--resume", str(run)])
    return before, snapshot(run), used, judged


def test_what_trains_is_judged_by_others_than_what_is_reported(finished, evaluated):
    _, run = finished
    states = train.load_checkpoint(run / "backbone.pt", "backbone")["judges"]
    of_losses, of_tables = (train.checksum(states[kind]) for kind in ("loss", "table"))
    expected = {"federate": of_losses, "personalize": of_losses, "evaluate": of_tables}
    assert evaluated[3] == expected and of_losses != of_tables


def test_evaluating_repeats_nothing(evaluated):
    before, after, *_ = evaluated
    assert after.keys() == before.keys()
    unchanged = ("last.pt", "backbone.pt", "rounds.jsonl", "config.yaml", "client-000.pt")
    for path, content in before.items():
        if path.name in unchanged:
            assert after[path] == content, path


def test_a_run_whose_rounds_were_all_aborted_says_that_nothing_was_learned(finished, capsys):
    folder, _ = finished
    settings = [*TINY, *places(folder), "name=aborted", "fed.sample_rate=0.3"]
    settings += ["privacy.num_curious=0", "privacy.seed=5"]  # draws cohorts of 1, 0, 2 clients

    error = last_line(capsys, "--set", *settings)
    (run,) = (folder / "runs").glob("*-aborted")
    assert error.startswith(
        "error: nothing was learned, as every round failed: the last one was aborted"
    )
    assert "the cohort has 0 clients, 2 are needed" in error and str(run) in error
    assert not (run / "report.json").exists()
    assert last_line(capsys, "--resume", str(run)) == error  # it repeats nothing
    assert len(read_rounds(run)) == 2
    train.main(["--gpus", "cpu", "--resume", str(run), "--set", "fed.rounds=3"])
    assert (run / "report.json").exists()


def test_a_run_in_whose_rounds_nobody_trained_says_that_nothing_was_learned(tmp_path):
    rounds = [{"round": 0, "aborted": None, "cohort_size": 2}]
    rounds[0]["simulation"] = {"failures": ["a: ill", "b: ill"]}
    train.write_text(tmp_path / "rounds.jsonl", json.dumps(rounds[0]) + "\n")
    with pytest.raises(
        ValueError, match="nothing was learned.* had no client that trained: a: ill"
    ):
        train.check_learned(tmp_path, fed.Workers())
    rounds.append(rounds[0] | {"round": 1, "simulation": {"failures": ["a: ill"]}})
    train.write_text(tmp_path / "rounds.jsonl", "".join(json.dumps(r) + "\n" for r in rounds))
    train.check_learned(tmp_path, fed.Workers())


def last_line(capsys, *arguments):
    """Return the error of a command line that fails, below its progress bars."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--gpus", "cpu", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def copy_run(run, folder):
    """Return a copy of a run, for a test that changes it."""
    return Path(shutil.copytree(run, folder / "run"))


def test_a_resumed_run_is_of_the_same_people(finished, tmp_path, capsys):
    """With one clip more, a clip that was trained on might be tested on."""
    folder, run = finished
    copied = copy_run(run, tmp_path)
    before = snapshot(copied)
    added = folder / "people" / "client-001" / "00009.mp4"
    write_clip(added)
    try:
        error = fails(capsys, "--resume", str(copied), "--set", "fed.rounds=3")
    finally:
        added.unlink()
    assert "the clips or the role of client-001 have changed" in error
    assert snapshot(copied) == before


@pytest.fixture(scope="module")
def longer(finished, tmp_path_factory):
    """A copy of the run that was continued for a round, with its people in another place."""
    folder, run = finished
    copied = copy_run(run, tmp_path_factory.mktemp("longer"))
    lose_people(copied, folder)
    moved = copied.parent / "moved"
    moved.symlink_to(folder / "people")
    more = ["--resume", str(copied), "--set", "fed.rounds=3", f"data.root={moved}"]
    with open(copied.parent / "stderr", "w") as file, contextlib.redirect_stderr(file):
        train.main(["--gpus", "cpu", *more])
    return copied


def lose_people(run, folder):
    """Let the run's config.yaml name a place where its people are not."""
    text = (run / "config.yaml").read_text()
    gone = text.replace(str(folder / "people"), str(run.parent / "gone"))
    (run / "config.yaml").write_text(gone)


def test_a_run_goes_on_where_its_people_have_moved(finished, longer, tmp_path, capsys):
    folder, run = finished
    copied = copy_run(run, tmp_path)
    lose_people(copied, folder)
    more = ["--resume", str(copied), "--set", "fed.rounds=3"]
    assert "no dataset at" in fails(capsys, *more)
    assert len(read_rounds(longer)) == 3


def test_what_a_run_has_spent_cannot_be_lost_or_edited(finished, tmp_path, capsys):
    _, run = finished
    copied = copy_run(run, tmp_path)
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("clip_norm: 2.65", "clip_norm: 5.0"))
    assert "config.yaml was changed" in fails(capsys, "--resume", str(copied))
    (copied / "config.yaml").write_text(text.replace("  tdc: 0.05\n", ""))
    error = fails(capsys, "--resume", str(copied))
    assert "config.yaml has no loss.tdc: the run was made by another version" in error
    (copied / "config.yaml").write_text(text)
    (copied / "last.pt").write_bytes(b"")
    assert "delete it" not in fails(capsys, "--resume", str(copied))
    (copied / "last.pt").unlink()
    assert "last.pt is lost" in fails(capsys, "--resume", str(copied))


def test_what_a_killed_first_round_has_spent_cannot_be_lost(finished, tmp_path, capsys):
    """Before the end of round 0, last.pt alone holds what was charged."""
    copied = copy_run(finished[1], tmp_path)
    for path in (*copied.glob("personal/*"), copied / "rounds.jsonl", copied / "report.json"):
        path.unlink()
    state = train.load_checkpoint(copied / "last.pt", "global adapter")
    state |= {"round": 0, "accountant": [[1.0, 3.0, 1]]}
    train.save_state(copied, state, fed.Workers())
    (copied / "last.pt").unlink()
    assert "last.pt is lost" in fails(capsys, "--resume", str(copied))


@pytest.mark.parametrize("lines", [b"{}\n{}\n", b"1\n2\n", b"\xff\n\xff\n"])
def test_a_log_of_other_things_than_rounds_is_refused(finished, tmp_path, capsys, lines):
    copied = copy_run(finished[1], tmp_path)
    (copied / "rounds.jsonl").write_bytes(lines)
    assert "rounds.jsonl: damaged" in fails(capsys, "--resume", str(copied))


@pytest.mark.parametrize("num_lines", [0, 1, 4])
def test_a_log_of_other_rounds_than_last_pt_is_refused(finished, tmp_path, capsys, num_lines):
    copied = copy_run(finished[1], tmp_path)
    lines = 2 * (copied / "rounds.jsonl").read_text().splitlines(keepends=True)
    (copied / "rounds.jsonl").write_text("".join(lines[:num_lines]))
    before = snapshot(copied)
    error = last_line(capsys, "--resume", str(copied), "--set", "fed.rounds=3")
    assert f"last.pt is an older one: {num_lines} rounds are not 2" in error
    assert snapshot(copied) == before


def test_a_last_pt_of_the_round_before_is_refused(finished, longer, tmp_path, capsys):
    copied = copy_run(longer, tmp_path)
    shutil.copy(finished[1] / "last.pt", copied)
    error = last_line(capsys, "--resume", str(copied), "--set", "fed.rounds=3")
    assert "last.pt is an older one: 3 rounds are not 2" in error


@pytest.fixture(scope="module")
def controlled(finished):
    """A run of SCAFFOLD's first round."""
    folder, _ = finished
    settings = [*TINY, *places(folder), "name=controlled", "fed.rounds=1", "personal.steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        skip_evaluation(patch)
        train.main(["--gpus", "cpu", "--preset", "scaffold", "--set", *settings])
    return next((folder / "runs").glob("*-controlled"))


def test_no_round_is_spent_without_a_clients_c_i(controlled, tmp_path, capsys):
    copied = copy_run(controlled, tmp_path)
    path = copied / "clients" / "client-004.pt"
    own = torch.load(path, weights_only=True)["controls"]
    assert list(own) == [0, 1] and not own[0].any() and own[1].any()
    before = snapshot(copied)

    def refusal():
        return last_line(capsys, "--resume", str(copied), "--set", "fed.rounds=2")

    torch.save({"client": "client-004", "controls": {2: own[1]}}, path)
    assert "client-004.pt: the client's c_i is newer than last.pt" in refusal()
    for wrong in (own[1][:5], own[1] * math.nan):
        torch.save({"client": "client-004", "controls": {1: wrong}}, path)
        assert "client-004.pt: damaged, or of another run" in refusal()
    shutil.copy(path.with_name("client-003.pt"), path)
    assert "client-004.pt: lost or damaged" in refusal()
    path.write_bytes(b"broken")
    assert "client-004.pt: lost or damaged, and with it the client's c_i" in refusal()
    path.unlink()
    assert "client-004.pt: lost or damaged, and with it the client's c_i" in refusal()
    before.pop(path)
    assert snapshot(copied) == before


def test_a_backbone_of_another_version_is_refused(finished, tmp_path, capsys):
    folder, run = finished
    copied = copy_run(run, tmp_path)
    backbone = train.load_checkpoint(copied / "backbone.pt", "backbone")
    backbone["model"].pop("motion_std")
    train.save_checkpoint(copied / "backbone.pt", "backbone", backbone)
    assert "made by another version" in fails(capsys, "--resume", str(copied))


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / "personal").mkdir()
    rest = tmp_path / "personal" / ".0123456789abcdef.pt"
    kept = tmp_path / ".hidden"
    for path in (rest, kept):
        path.touch()
    with train.run_lock(tmp_path):
        assert not rest.exists() and kept.exists()


def test_a_checkpoint_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "full")
    (tmp_path / ".full.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(tmp_path / "a.pt", "backbone", {"a": torch.zeros(9)})
    assert not (tmp_path / "a.pt").exists()


def test_weights_are_read_before_the_training_that_they_judge(finished, tmp_path, capsys):
    folder, run = finished
    (tmp_path / "syncnet_v2.model").write_text("garbage")
    before = snapshot(run)
    weights = ["--set", f"weights={tmp_path}"]
    assert "not a file of weights" in fails(capsys, "--resume", str(run), *weights)
    assert snapshot(run) == before


def test_an_output_does_not_replace_an_input(finished, tmp_path, capsys):
    folder, run = finished
    speech = tmp_path / "speech.mp4"
    shutil.copy(first_clip(folder), speech)
    before = speech.read_bytes()
    base = ["--action", "generate", "--resume", str(run), "--reference", str(run / "grid.png")]
    error = fails(capsys, *base, "--speech", str(speech), "--output", str(speech))
    assert "would be replaced" in error and speech.read_bytes() == before
    look = tmp_path / "look"
    look.mkdir()
    shutil.copy(run / "grid.png", look / "reference.png")
    before = snapshot(look)
    base[-1] = str(look / "reference.png")
    error = fails(capsys, *base, "--speech", str(speech), "--look", str(look))
    assert "would be replaced" in error and snapshot(look) == before


def test_an_own_adapter_is_not_measured_on_copies(finished, tmp_path, capsys):
    folder, run = finished
    for name in ("phone", "backup"):
        shutil.copytree(folder / "people" / "client-000", tmp_path / "mine" / name)
    base = ["--action", "personalize", "--resume", str(run), "--output", str(tmp_path / "me.pt")]
    pieces = []
    for clips in (tmp_path / "mine", tmp_path / "mine" / "phone"):
        train.main(["--gpus", "cpu", *base, "--clips", str(clips)])
        out = capsys.readouterr().out
        pieces.append(re.findall(r"made of \d+ pieces", out))
        copies = len(list((tmp_path / "mine" / "phone").glob("*.mp4")))
        assert out.count("the same picture and sound as") == copies * (clips.name == "mine")
    assert pieces[0] == pieces[1] != []


def test_an_own_adapter_does_not_replace_a_file_of_the_run(finished, tmp_path, capsys):
    folder, run = finished
    copied = copy_run(run, tmp_path)
    before = snapshot(copied)
    base = ["--action", "personalize", "--resume", str(copied)]
    base += ["--clips", str(folder / "people" / "client-000"), "--output", str(copied / "last.pt")]
    assert "holds a global adapter, not a personal adapter" in fails(capsys, *base)
    assert "personal.steps is 0" in fails(capsys, *base, "--set", "personal.steps=0")
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    "name, content", [("people.json", "{}"), ("people.json", "[1"), ("rounds.jsonl", "{\n")]
)
def test_a_damaged_file_of_a_run_is_named(finished, tmp_path, capsys, name, content):
    _, run = finished
    copied = copy_run(run, tmp_path)
    (copied / name).write_text(content)
    assert f"{name}: damaged" in last_line(capsys, "--resume", str(copied))


def test_settings_are_kept_only_when_the_runs_files_are_whole(finished, tmp_path, capsys):
    _, run = finished
    copied = copy_run(run, tmp_path)
    before = (copied / "config.yaml").read_bytes()
    broken = copied / "backbone.pt"
    broken.write_bytes(broken.read_bytes()[:-1000])
    changes = ["--set", "fed.rounds=3", "sampling.num_steps=2"]
    assert "backbone.pt: " in fails(capsys, "--resume", str(copied), *changes)
    assert (copied / "config.yaml").read_bytes() == before


def test_evaluating_does_not_train_a_lost_adapter_where_another_lies(finished, tmp_path, capsys):
    _, run = finished
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "personal" / "client-001.pt").rename(copied / "personal" / "me.pt")
    assert "evaluate trains nothing" in last_line(
        capsys, "--action", "evaluate", "--resume", str(copied)
    )
    assert not (copied / "personal" / "client-001.pt").exists()
    assert (copied / "report.json").exists()


def test_training_that_diverges_is_one_line(finished, capsys):
    folder, _ = finished
    settings = [*TINY, *places(folder), "name=diverged", "backbone.lr=1e9", "backbone.steps=20"]
    assert "lower backbone.lr" in last_line(capsys, "--set", *settings)


def test_all_workers_draw_the_cohorts_with_the_key_of_rank_0(finished, monkeypatch, capsys):
    """A new run's key is random: each worker that reads the state draws another."""
    folder, _ = finished
    keys = []

    def follow(workers, value):  # as a worker of rank 1, which is sent what rank 0 has
        is_state = isinstance(value, dict) and "sampling_key" in value
        return value | {"sampling_key": "11" * 32} if is_state else value

    def stop(config, model, judges, clients, state, *args):
        keys.append(state["sampling_key"])
        raise KeyboardInterrupt

    monkeypatch.setattr(fed.Workers, "broadcast", follow)
    monkeypatch.setattr(train, "federate", stop)
    settings = [*TINY, *places(folder), "name=followed"]
    assert "interrupted" in last_line(capsys, "--set", *settings)
    assert keys == ["11" * 32]


@pytest.mark.parametrize("killed_in", ["log_round", "summarize_round"])
def test_a_first_round_in_the_clear_that_is_killed_is_done_again(
    killed_in, finished, tmp_path, monkeypatch, capsys
):
    folder, _ = finished
    runs = tmp_path / "runs"
    shutil.copytree(folder / "runs" / "backbones", runs / "backbones")
    settings = [*TINY, *places(folder), f"runtime.directory={runs}", "personal.steps=0"]
    settings += ["privacy.enabled=false", "fed.sample_rate=0.6", "fed.rounds=1"]
    called = getattr(train, killed_in)

    def stop(*args):
        called(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, killed_in, stop)
    assert "interrupted" in last_line(capsys, "--set", *settings)
    monkeypatch.undo()
    run = next(runs.glob("*-talkers"))
    key = train.load_checkpoint(run / "last.pt", "global adapter")["sampling_key"]
    train.main(["--gpus", "cpu", "--resume", str(run)])
    state = train.load_checkpoint(run / "last.pt", "global adapter")
    assert state["sampling_key"] == key and state["round"] == len(read_rounds(run)) == 1


def test_a_run_without_rounds_can_be_used(finished, tmp_path):
    folder, _ = finished
    settings = [*TINY, *places(folder), "name=roundless", "fed.rounds=0", "personal.steps=0"]
    train.main(["--gpus", "cpu", "--set", *settings])
    run = next((folder / "runs").glob("*-roundless"))
    assert train.load_checkpoint(run / "last.pt", "global adapter")["round"] == 0
    train.main(["--gpus", "cpu", "--action", "evaluate", "--resume", str(run)])
    assert privacy.verify_run(run)["epsilon"] == 0


def test_a_personal_adapter_that_diverged_replaces_none(finished, tmp_path, capsys):
    folder, run = finished
    copied = copy_run(run, tmp_path)
    diverging = "--set", "personal.lr=1000000"
    before = snapshot(copied / "personal")
    whole = snapshot(copied)
    error = last_line(capsys, "--resume", str(copied), *diverging)
    assert "client-000's adapter diverged: lower personal.lr" in error
    assert snapshot(copied / "personal") == before
    assert snapshot(copied) == whole  # the old report and its settings, too
    output = tmp_path / "me.pt"
    shutil.copy(copied / "personal" / "client-000.pt", output)
    before = output.read_bytes()
    base = ["--action", "personalize", "--resume", str(run), "--output", str(output)]
    base += ["--clips", str(folder / "people" / "client-000")]
    assert "lower personal.lr" in last_line(capsys, *base, *diverging)
    assert output.read_bytes() == before


@pytest.mark.parametrize("change", ["steps=2", "lr=0.001", "batch_size=3"])
def test_personal_adapters_are_trained_anew_with_other_settings(
    change, finished, monkeypatch, capsys
):
    _, run = finished

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_personal", stop)
    error = last_line(capsys, "--resume", str(run), "--set", f"personal.{change}")
    assert "interrupted" in error


def test_an_adapter_that_begins_on_noise_has_not_diverged(monkeypatch):
    """A global adapter that noise has drowned is the report's matter, not personal.lr's."""
    monkeypatch.setattr(train, "merged_copy", lambda model, share: share)
    monkeypatch.setattr(fed, "unexplained_variance", lambda share, *_: torch.tensor([share]))

    def check(before, after):
        return train.check_converged(None, before, after, None, "a")

    assert check(200.0, 1900.0) == (200.0, 1900.0)
    check(float("nan"), 9.0)
    for before, after in ((0.7, 11.0), (200.0, 2100.0), (0.7, float("nan"))):
        with pytest.raises(ValueError, match="a's adapter diverged"):
            check(before, after)


def test_runs_that_begin_in_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    names = iter(["20261129-120000", "20261129-120000", "20261129-120000", "20261129-120001"])
    monkeypatch.setattr(train.time, "strftime", lambda pattern: next(names))
    config = train.load_config(train.DEFAULTS, overrides=[f"runtime.directory={tmp_path}"])
    first = train.make_run_folder(config)
    second = train.make_run_folder(config)
    assert first.name == "20261129-120000-talkers" and second.name == "20261129-120001-talkers"


def test_an_interrupted_evaluation_leaves_settings_and_report(
    finished, tmp_path, monkeypatch, capsys
):
    copied = copy_run(finished[1], tmp_path)
    before = snapshot(copied)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", stop)
    again = ["--action", "evaluate", "--resume", str(copied), "--set", "sampling.num_steps=2"]
    assert "interrupted" in last_line(capsys, *again)
    after = snapshot(copied)
    assert all(after[path] == before[path] for path in before if path.name != "log.txt")


def test_clips_exchanged_under_their_names_and_a_lost_list_of_people_are_noticed(
    finished, tmp_path, capsys
):
    folder, run = finished
    copied = copy_run(run, tmp_path)
    people = Path(shutil.copytree(folder / "people", tmp_path / "people"))
    first, second = people / "client-000" / "00000.mp4", people / "client-000" / "00001.mp4"
    first.rename(tmp_path / "third.mp4")
    second.rename(first)
    (tmp_path / "third.mp4").rename(second)
    resume = ["--resume", str(copied), "--set", f"data.root={people}"]
    assert "the clips or the role of client-000 have changed" in fails(capsys, *resume)
    (copied / "people.json").unlink()
    assert "people.json: lost" in fails(capsys, *resume[:2])


def test_each_algorithms_preset_undoes_the_others():
    of_one = train.load_config(train.DEFAULTS, ["fedavg"])["fed"]
    of_two = train.load_config(train.DEFAULTS, ["fedprox", "fedavg"])["fed"]
    assert of_one == of_two
    assert train.load_config(train.DEFAULTS, ["scaffold", "fedprox"])["fed"]["algorithm"] == "isfa"


def test_evaluating_trains_nothing(finished, tmp_path, capsys):
    folder, run = finished
    again = ["--action", "evaluate", "--resume", str(run)]
    for change in ("fed.rounds=3", "fed.rounds=1", "personal.steps=2"):
        assert "evaluate trains nothing" in fails(capsys, *again, "--set", change)
    unfinished = copy_run(run, tmp_path)
    (unfinished / "personal" / "client-000.pt").unlink()
    assert "evaluate trains nothing" in last_line(capsys, *again[:-1], str(unfinished))
    # nor does it accept another client's, or one of other settings
    personal = run / "personal"
    shutil.copy(personal / "client-001.pt", unfinished / "personal" / "client-000.pt")
    error = last_line(capsys, *again[:-1], str(unfinished))
    assert "no personal adapter of these settings for client-000" in error
    shutil.copy(personal / "client-000.pt", unfinished / "personal" / "client-000.pt")
    config = yaml.safe_load((unfinished / "config.yaml").read_text())
    config["personal"]["lr"] *= 2
    train.save_config(unfinished, config)
    before = snapshot(unfinished)
    assert "evaluate trains nothing" in last_line(capsys, *again[:-1], str(unfinished))
    assert snapshot(unfinished) == before
    (unfinished / "report.json").unlink()
    assert "no report.json there" in fails(capsys, *again[:-1], str(unfinished))


def test_a_report_does_not_outlive_what_it_tells_of(finished, tmp_path, monkeypatch, capsys):
    _, run = finished

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    for name, changes in (
        ("federate", ["fed.rounds=3"]),
        ("save_checkpoint", ["personal.lr=0.001"]),  # of the first adapter that is replaced
    ):
        copied = copy_run(run, tmp_path / name)
        monkeypatch.setattr(f"train.{name}", stop)
        assert "interrupted" in last_line(capsys, "--resume", str(copied), "--set", *changes)
        monkeypatch.undo()
        assert not (copied / "report.json").exists() and not (copied / "report.md").exists()
        again = ["--action", "evaluate", "--resume", str(copied)]
        assert "no report.json there" in fails(capsys, *again)


def test_rounds_that_were_done_cannot_be_taken_back(finished, tmp_path, capsys):
    copied = copy_run(finished[1], tmp_path)
    before = snapshot(copied)
    error = fails(capsys, "--resume", str(copied), "--set", "fed.rounds=1")
    assert "fed.rounds: the run has had 2 rounds already" in error
    assert snapshot(copied) == before


def test_personal_adapters_do_not_depend_on_the_device(finished, tmp_path, monkeypatch):
    _, run = finished
    skip_evaluation(monkeypatch)
    copied = copy_run(run, tmp_path)
    before = snapshot(copied / "personal")
    train.main(["--gpus", "cpu", "--resume", str(copied), "--set", "runtime.micro_batch=1"])
    assert snapshot(copied / "personal") == before


def test_more_rounds_make_new_personal_adapters(finished, longer):
    _, run = finished
    before, after = (path / "personal" / "client-000.pt" for path in (run, longer))
    assert after.read_bytes() != before.read_bytes()
    rounds = read_rounds(longer)
    assert len(rounds) == 3
    assert rounds[2]["epsilon"] > rounds[1]["epsilon"] == read_rounds(run)[1]["epsilon"]
    bars = (longer.parent / "stderr").read_text()
    assert "| 2/3 " in bars and "| 3/3 " in bars and "| 1/3 " not in bars


def test_the_rate_of_the_backbone_rises_for_50_steps_and_then_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert (
        np.argmax(rates) == 49 and 0 < rates[0] < 0.05 and max(rates) == pytest.approx(2, rel=0.01)
    )
    assert (np.diff(rates[49:]) < 0).all() and rates[500] == pytest.approx(1) and rates[-1] < 1e-4


def test_a_step_is_of_a_gradient_of_norm_1_and_leaves_none():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=9.0)
    (weight * torch.tensor([30.0, 40.0])).sum().backward()
    train.optimizer_step(optimizer, 0.5)
    assert weight.tolist() == pytest.approx([-0.3, -0.4]) and weight.grad is None
    (weight * torch.tensor([0.3, 0.4])).sum().backward()
    train.optimizer_step(optimizer, 1.0)
    assert weight.tolist() == pytest.approx([-0.6, -0.8])


def test_the_autoencoder_sees_frames_as_the_model_does():
    dark = np.full((4, 3, 16, 16), 10, np.uint8)
    clip = data.Clip("a", "1", "", dark, np.zeros(0), np.zeros((16, 40), np.float32))
    frames = train.sample_frames({"a": [clip]}, 8, torch.Generator().manual_seed(0))
    assert frames.shape == (8, 3, 16, 16) and frames.min() >= -1 and frames.max() < -0.6


def test_the_autoencoder_is_to_paint_what_the_warp_cannot_show(monkeypatch):
    generator = np.random.default_rng(0)
    clips = []
    for name in "ab":
        frames = np.full((20, 3, 32, 32), 100, np.uint8)
        frames[:, :, 16:24, 8:16] = generator.integers(0, 255, (20, 1, 1, 1))  # a flashing square
        mel = np.zeros((80, 40), np.float32)
        clips.append(data.Clip(name, "1", "", frames, np.zeros(0), mel))
    public = {clip.person: [clip] for clip in clips}
    config = train.load_config(train.DEFAULTS, (), ["data.size=32", "backbone.autoencoder_steps=1"])
    error = train.warp_error(config, public, 4, torch.Generator().manual_seed(0))  # 1 1 H W
    assert error.shape == (1, 1, 32, 32) and error.mean().item() == pytest.approx(1, rel=1e-3)
    assert error[0, 0, 20, 12] > 5 and error[0, 0, :8].max() < 0.01
    for error in (-1.0, 1.0):  # weights of 0 and 1
        monkeypatch.setattr(train, "warp_error", lambda *args: torch.full((1, 1, 32, 32), error))
        state = train.train_autoencoder(config, public, torch.device("cpu"))
        last = [name for name in state if name.startswith("decoder")][-2]  # starts as zero
        assert state[last].any() == (error > 0)


@pytest.mark.parametrize("in_the_wild", [False, True])
def test_recordings_in_the_wild_have_their_own_reference_pictures(
    in_the_wild, tmp_path, monkeypatch
):
    clips = []
    for name in "12345":
        frames = np.full((30, 3, 8, 8), 40 * int(name), np.uint8)
        mel = np.zeros((120, 40), np.float32)
        clips.append(data.Clip("a", name, "", frames, np.zeros(0), mel))
    overrides = [f"data.in_the_wild={str(in_the_wild).lower()}"]
    config = train.load_config(train.DEFAULTS, [], overrides)
    (client,) = train.make_clients(config, data.People({}, {"a": clips}, {}), tmp_path)
    monkeypatch.setattr(fed, "encode_batch", lambda model, batch: batch)
    model = SimpleNamespace(motion_std=torch.ones(1))  # which tells the device
    batch = client.train_batch(model, 16, torch.Generator().manual_seed(0))
    same = batch["frames"][:, 0, 0, 0, 0] == batch["reference"][:, 0, 0, 0]
    assert same.all() == in_the_wild


def test_speech_is_learned_before_the_unet_is_trained(finished, tmp_path, monkeypatch):
    folder, _ = finished
    overrides = [*TINY, *places(folder), "backbone.steps=500"]
    config = train.load_config(train.DEFAULTS, overrides=overrides)
    public = train.load_people(config).public
    train_speech_path = train.train_speech_path
    calls = []

    def recorded(*args):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_speech_path", recorded)
    cpu = torch.device("cpu")
    with pytest.raises(KeyboardInterrupt):
        autoencoder = train.train_autoencoder(config, public, cpu)
        train.train_unet(config, autoencoder, public, cpu, tmp_path / "partial.pt")
    [(_, batches, num_steps, lr)] = calls
    assert (len(batches), num_steps, lr) == (6, 50, config["backbone"]["lr"])
    torch.manual_seed(0)
    model = train.build_model(config)
    rest = train.checksum([model.unet.conv_in.weight, model.unet.conv_out.weight])
    before = model.speech_loss(batches[0]).mean().item()
    train_speech_path(model, batches, 60, 0.01)
    assert model.speech_loss(batches[0]).mean().item() < 0.9 * before
    assert train.checksum([model.unet.conv_in.weight, model.unet.conv_out.weight]) == rest


def test_a_backbone_that_was_cut_off_is_continued_to_the_same(finished, tmp_path, monkeypatch):
    folder, _ = finished
    chance = "model.speech_dropout=0.2", "data.in_the_wild=true"
    overrides = [*TINY, *places(folder), "backbone.steps=4", *chance]
    config = train.load_config(train.DEFAULTS, overrides=overrides)
    public = train.load_people(config).public
    cpu = torch.device("cpu")
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    autoencoder = train.train_autoencoder(config, public, cpu)
    whole = train.train_unet(config, autoencoder, public, cpu, tmp_path / "whole.pt")
    real = fed.backward
    calls = []

    def cut_off(*args, generator, **kwargs):
        calls.append(generator.initial_seed())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, generator=generator, **kwargs)

    monkeypatch.setattr(fed, "backward", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.train_unet(config, autoencoder, public, cpu, tmp_path / "cut.pt")
    cut = train.train_unet(config, autoencoder, public, cpu, tmp_path / "cut.pt")
    assert len(calls) == 5 and whole[1] == cut[1] and len(cut[1]) == 4
    # From a batch's own seed its first person would decide the noise levels.
    assert not set(calls) & {fed.derive_seed(config["seed"], step) for step in range(4)}
    assert train.checksum(whole[0]) == train.checksum(cut[0])
    directions = []
    for state, _ in (whole, cut):
        model = train.build_model(config)
        model.load_state_dict(state)
        directions.append(train.find_directions(config, model.eval(), public))
    assert train.checksum(directions[0]) == train.checksum(directions[1])


def skip_evaluation(monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: {})
    monkeypatch.setattr(train, "write_report", lambda *args: None)


# ---------------------------------------------------------------- other


def test_too_few_people_are_refused_before_anything_is_written(tmp_path, capsys):
    data.make_synthetic(tmp_path / "few", 3, 2, 1, 2, 3, 0.4, 32)
    directory = f"runtime.directory={tmp_path / 'runs'}"
    settings = [*TINY, f"data.root={tmp_path / 'few'}", directory, "privacy.enabled=false"]
    assert "people" in fails(capsys, "--set", *settings, "data.clients=5")
    assert "to be public" in fails(capsys, "--set", *settings, "data.clients=2")
    assert not (tmp_path / "runs").exists()


def test_the_mechanism_is_checked_for_as_many_numbers_as_are_sent(monkeypatch, capsys):
    lengths = []
    make_mechanism = train.make_mechanism

    def recorded(config, length, *args):
        lengths.append(length)
        return make_mechanism(config, length, *args)

    monkeypatch.setattr(train, "make_mechanism", recorded)
    train.main(["--gpus", "cpu", "--action", "dry-run", "--set", *TINY])
    assert len(lengths) > 1 and len(set(lengths)) == 1
    assert f"sent by a client: {lengths[0]:,}" in capsys.readouterr().out


def test_a_dry_run_prints_what_a_run_sends_and_spends(capsys):
    train.main(["--gpus", "cpu", "--action", "dry-run", "--set", *TINY])
    printed = capsys.readouterr().out
    for words in ("epsilon 2 at delta 1e-05", "trained and sent by a client", "bytes"):
        assert words in printed, words


def test_a_dry_run_counts_what_a_run_has_spent(finished, monkeypatch, capsys):
    _, run = finished
    monkeypatch.setattr(train, "time_step", lambda *args: 1.0)
    train.main(["--action", "dry-run", "--resume", str(run), "--set", "fed.rounds=4"])
    config = train.load_config(run / "config.yaml", overrides=["fed.rounds=4"])
    state = train.load_checkpoint(run / "last.pt", "global adapter")
    cohorts = train.draw_cohorts(config, state["sampling_key"], config["data"]["clients"], 4)
    participations = privacy.most_participations(cohorts)
    mechanism = train.make_mechanism(config, len(state["adapter"]), participations)
    spent = privacy.Accountant(state["accountant"])
    spent.spend(train.accounted_rate(config["fed"]), mechanism.noise_multiplier, 2)
    epsilon = spent.epsilon_known_cohorts(config["privacy"]["delta"], participations)
    printed = capsys.readouterr().out
    assert epsilon > 2.1 and f"epsilon {epsilon:.4g} at" in printed
    assert "2 rounds" in printed  # that are left


def test_a_dry_run_multiplies_timed_steps(monkeypatch, capsys):
    """Steps of an hour: 2 of the backbone; 2 rounds of 5 clients with 3 clips of 50 frames each."""
    monkeypatch.setattr(train, "time_step", lambda *args: 3600.0)
    settings = [*TINY, "fed.rounds=2", "fed.local_epochs=2.0"]  # 18 windows, batches of 4
    settings += ["personal.clients=3", "personal.steps=7"]
    train.main(["--gpus", "cpu", "--action", "dry-run", "--set", *settings])
    hours = "hours on one cpu: backbone's UNet 2, 2 rounds 90, personal adapters 21;"
    assert hours in capsys.readouterr().out


def test_a_timed_step_is_the_mean_of_three_after_one(monkeypatch):
    config = train.load_config(train.DEFAULTS, overrides=TINY)
    clock = {0: 0.0, 1: 10.0, 4: 16.0}  # seconds after so many steps
    calls = []

    def backward(model, judges, batch, *args, **kwargs):
        assert batch["motion"].isfinite().all()
        calls.append(len(batch["frames"]))

    monkeypatch.setattr(fed, "backward", backward)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[len(calls)])
    seconds = train.time_step(config, train.build_model(config), None, 16)
    assert calls == [4] * 4 and seconds == 2.0 * 16 / 4


def test_a_dry_run_counts_scaffolds_second_vector(monkeypatch, capsys):
    monkeypatch.setattr(train, "time_step", lambda *args: 1.0)
    sent = []
    for presets in (["plain"], ["plain", "scaffold"]):
        train.main(["--gpus", "cpu", "--action", "dry-run", "--preset", *presets, "--set", *TINY])
        printed = capsys.readouterr().out
        assert "epsilon inf: privacy.enabled is false" in printed
        sent.append(int(re.search(r"round: ([\d,]+) up", printed)[1].replace(",", "")))
    assert sent[1] == 2 * sent[0]


def test_a_dry_run_of_pooled_clips_counts_no_bytes_of_adapters(monkeypatch, capsys):
    monkeypatch.setattr(train, "time_step", lambda *args: 1.0)
    arguments = ["--action", "dry-run", "--preset", "centralized", "--set", *TINY]
    train.main(["--gpus", "cpu", *arguments])
    printed = capsys.readouterr().out
    assert "clips are pooled: all of them are sent" in printed and "bytes per" not in printed
    windows = 18 * int(re.search(r"data.clients=(\d+)", " ".join(TINY))[1])
    assert f"if they have {windows} windows each" in printed and "\n1 clients a round" in printed


def test_a_dry_run_counts_the_noise_on_all_that_is_sent(monkeypatch, capsys):
    monkeypatch.setattr(train, "time_step", lambda *args: 1.0)
    noise = []
    for presets in (["fedavg"], ["scaffold"]):
        train.main(["--gpus", "cpu", "--action", "dry-run", "--preset", *presets, "--set", *TINY])
        noise.append(float(re.search(r"mean is ([\d.]+) times", capsys.readouterr().out)[1]))
    assert noise[1] / noise[0] == pytest.approx(2**0.5, rel=0.01)  # SCAFFOLD sends two vectors


def test_the_sync_loss_hears_the_sound_of_its_five_frames():
    torch.manual_seed(0)
    mel = np.random.default_rng(0).standard_normal((80, 40)).astype(np.float32)
    judges = train.metrics.Judges().eval()
    model = train.build_model(train.load_config(train.DEFAULTS, overrides=TINY))
    windows = torch.from_numpy(data.audio_windows(mel, 8, 13))[None]
    clip = {"mel": windows, "frames": torch.zeros(1, 5, 3, 32, 32)}
    x0_hat = torch.zeros(1, 5, model.motion_channels, model.latent_size, model.latent_size)
    clip["reference"] = torch.zeros(1, 3, 32, 32)
    clip["liveliness"] = torch.ones(1)
    loss = fed.auxiliary_losses(model, judges, clip, x0_hat)["sync"].item()
    # a speech network hears frames 8 ... 12, which are 20 steps
    own = torch.from_numpy(mel[4 * 8 : 4 * 13])[None, None].expand(1, 5, -1, -1)
    heard = judges.mouth_audio(own)
    seen = judges.mouth_video(train.data.to_unit(clip["frames"]))
    assert loss == pytest.approx(1 - (heard * seen).sum().item(), abs=0.02)


def test_a_personal_adapter_belongs_to_its_person(finished, evaluated):
    """Evaluation generates each case with the adapter of the case's own person."""
    _, run = finished
    _, _, used, _ = evaluated
    own = {}
    for path in (run / "personal").iterdir():
        own[path.stem] = train.load_checkpoint(path, "personal adapter")["adapter"]
    personal = [(person, v) for person, v in used if len(v) == len(own["client-000"])]
    assert {person for person, _ in personal} == set(own)
    for person, vector in personal:
        assert torch.equal(vector, own[person])
    assert not np.array_equal(own["client-000"], own["client-001"])


def test_personal_adapters_are_scaled_as_the_global_one():
    settings = [*TINY, "lora.rank=6", "lora.alpha=3.0", "personal.rank=4"]
    config = train.load_config(train.DEFAULTS, overrides=settings)
    for section, rank in (("lora", 6), ("personal", 4)):
        model = train.add_adapter(config, train.build_model(config), None, section)
        layers = [m for m in model.unet.modules() if isinstance(m, lora.LoRALayer)]
        assert layers and all(len(layer.A) == rank for layer in layers)
        assert all(layer.scaling == 0.5 for layer in layers)


def test_adapters_of_two_devices_start_from_the_same_numbers():
    config = train.load_config(train.DEFAULTS, overrides=[*TINY, "lora.train=AB"])
    vectors = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        model = train.add_adapter(config, train.build_model(config), None, "lora")
        vectors.append(lora.adapter_vector(model.unet))
    assert torch.equal(*vectors)


# ---------------------------------------------------------------- scripts and README


def test_what_a_client_sends_and_receives_is_counted():
    config = train.load_config(train.DEFAULTS)
    about = train.describe_communication(config, torch.nn.Linear(3, 4), 64)
    # up: key, shares, sums and noise; down: the others' keys, shares, who survived, the adapter
    counts = {"numbers": 64, "model_parameters": 16, "bytes_up": 3076, "bytes_down": 5101}
    assert about == counts
    clear = train.load_config(train.DEFAULTS, ["plain"])
    about = train.describe_communication(clear, torch.nn.Linear(3, 4), 64)
    assert about["bytes_up"] == about["bytes_down"] == 256
    pooled = train.load_config(train.DEFAULTS, ["centralized"])
    about = train.describe_communication(pooled, torch.nn.Linear(3, 4), 64)
    assert about == {"numbers": 64, "model_parameters": 16}


def test_readme_counts_the_numbers_of_the_adapters():
    config = train.load_config(train.DEFAULTS, ["paper"])
    model = train.build_model(config).requires_grad_(False)
    numbers = len(lora.adapter_vector(train.add_adapter(config, model, None, "lora")))
    text = (ROOT / "README.md").read_text()
    assert f"are {numbers:,} (`--preset paper`)" in text
    config = train.load_config(train.DEFAULTS)
    model = train.build_model(config).requires_grad_(False)
    numbers = len(lora.adapter_vector(train.add_adapter(config, model, None, "lora")))
    assert f"{numbers:,} numbers each" in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/[!t]*.py")), ids=lambda path: path.stem)
def test_a_script_calls_what_is_there(path):
    """Benchmarks and proofs take too long for the suite, but a name or argument that is gone ought
    to be noticed.
    """
    modules = {"data": data, "fed": fed, "lora": lora, "metrics": metrics, "privacy": privacy}
    modules |= {"train": train, "talking": train.talking}
    for node in ast.walk(ast.parse(path.read_text())):
        used = node.func if isinstance(node, ast.Call) else node
        if not isinstance(used, ast.Attribute) or ast.unparse(used.value) not in modules:
            continue
        item = getattr(modules[used.value.id], used.attr)
        if node is not used:
            keywords = {keyword.arg: None for keyword in node.keywords}
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            if not starred and None not in keywords:  # None: of **
                inspect.signature(item).bind(*node.args, **keywords)


def test_the_readme_shows_algorithm_1_as_it_stands():
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert code == inspect.getsource(train.federate)


def test_the_readmes_map_of_equations_holds():
    text = (ROOT / "README.md").read_text().split("## Equations", 1)[1].split("\n## ", 1)[0]
    modules = {"model": train.talking, "lora": lora, "fed": fed, "train": train}
    rows = re.findall(
        r"^\| (\d[-\d]*|Algorithm 1|ISFA weight)[^|]*\| `(\w+)\.([\w.]+)` \|", text, re.M
    )
    assert len(rows) == 8
    for number, module, name in rows:
        item = modules[module]
        for part in name.split("."):
            item = getattr(item, part)
        source = inspect.getsource(item)
        if number[0].isdigit():
            last = number.split("-")[-1]
            assert re.search(rf"Eq\. (\d+-)?{last}\b", source), (
                f"{module}.{name} names no Eq. {last}"
            )


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and text.count("![") >= 1
