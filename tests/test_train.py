"""The command line: one-line errors, and the whole path on a handful of tiny talkers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import data
import fed
import privacy
import train

TINY = ["runtime.threads=1", "data.size=32", "data.clients=3", "data.unseen=1", "judges.steps=2", "model.unet.channels=[16]",
        "model.autoencoder.block_out_channels=[8, 16]", "model.prior_modes=8", "backbone.autoencoder_steps=2",
        "backbone.speech_steps=2", "backbone.steps=2", "backbone.batch_size=2", "lora.rank=1", "fed.rounds=2",
        "fed.sample_rate=1.0", "fed.local_epochs=0.2", "personal.steps=1", "sampling.num_steps=1", "evaluate.num_frames=10",
        "evaluate.clips_per_client=1", "privacy.clip_quantile=0.5"]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        train.main([*([] if "--gpus" in arguments else ["--gpus", "cpu"]), *arguments])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize("arguments, words", [
    (["--set", "fed.ronds=3"], "did you mean 'rounds'"),
    (["--set", "lora.rank=0"], "lora.rank must lie in 1"),
    (["--set", "lora.rank=two"], "lora.rank must be int"),
    (["--set", "sampling.solver=euler"], "one of dpm, ddim"),
    (["--set", "fed=3"], "is a section"),
    (["--set", "seed"], "key=value"),
    (["--preset", "fedavgg"], "did you mean 'fedavg'"),
    (["--config", "missing.yaml"], "missing.yaml"),
    (["--gpus", "333"], "--gpus 333"),
    (["--gpus", "one"], "--gpus one"),
    (["--gpus", "cpu:0"], "--gpus cpu:0"),
    (["--set", "fed.algorithm=scaffold"], "fed.optimizer=sgd"),
    (["--resume", "nowhere"], "nowhere"),
    (["--action", "audit", "--resume", "nowhere"], "nowhere"),
    (["--action", "evaluate"], "--resume"),
    (["--set", "data.root=nowhere"], "nowhere"),
])
def test_a_mistake_gets_one_line_and_leaves_nothing(arguments, words, capsys, tmp_path):
    directory = [] if "--resume" in arguments else ["--set", f"runtime.directory={tmp_path / 'runs'}"]
    if arguments[0] == "--set" and directory:
        arguments, directory = arguments + directory[1:], []
    assert words in fails(capsys, *arguments, *directory)
    assert not (tmp_path / "runs").exists()


def test_broken_yaml_is_named(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("fed: [1, 2")
    assert "mine.yaml" in fails(capsys, "--config", str(path))


def test_later_presets_and_settings_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"fed": {"rounds": 7}, "presets": {"mine": {"fed": {"rounds": 8, "gamma": 1}}}}))
    config = train.load_config(path, ["fedavg", "mine"], ["fed.lr=1e-3"])
    assert (config["fed"]["rounds"], config["fed"]["gamma"], config["fed"]["lr"]) == (8, 1.0, 0.001)
    defaults = train.load_config(train.DEFAULTS)
    assert "presets" not in config and set(config) == set(defaults)


def test_every_preset_is_valid():
    for name in train.read_yaml(train.DEFAULTS)["presets"]:
        train.load_config(train.DEFAULTS, [name])


def test_every_limit_names_a_key_and_holds_for_the_default():
    config = train.load_config(train.DEFAULTS)
    for name in train.LIMITS:
        value = config
        for part in name.split("."):
            value = value[part]
        assert train.checked(name, value, value, "default") == value


def test_a_target_epsilon_chooses_the_noise():
    config = train.load_config(train.DEFAULTS, overrides=["privacy.target_epsilon=8", "fed.rounds=20"])
    mechanism, accountant = train.make_mechanism(config, 100), privacy.Accountant()
    accountant.spend(**mechanism.spending(0.75), rounds=20)
    assert 7.9 < accountant.epsilon(1e-5) <= 8.0
    assert accountant.would_exceed(8.0, 1e-5, **mechanism.spending(0.75))
    config["privacy"]["enabled"] = False
    assert train.make_mechanism(config, 100) is None


def test_skellam_meets_its_target_with_more_noise():
    targets = ["privacy.target_epsilon=8", "fed.rounds=20"]
    gaussian, skellam = (train.make_mechanism(train.load_config(train.DEFAULTS, overrides=targets + more), 100)
                         for more in ([], ["privacy.mechanism=skellam"]))
    accountant = privacy.Accountant()
    accountant.spend(**skellam.spending(0.75), rounds=20)
    assert 7.9 < accountant.epsilon(1e-5) <= 8.0
    assert gaussian.noise_multiplier <= skellam.noise_multiplier < 1.5 * gaussian.noise_multiplier


def test_json_has_no_infinity():
    assert train.finite({"a": [float("inf"), 1.0], "b": (float("nan"), "x")}) == {"a": [None, 1.0], "b": [None, "x"]}


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(RuntimeError):
        with train.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    train.save_text("whole", path)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the whole path at the smallest size."""
    folder = tmp_path_factory.mktemp("path")
    data.make_synthetic(folder / "people", 4, 3, 1, 2, 4, 0.8, size=32)
    settings = TINY + [f"data.root={folder / 'people'}", f"runtime.directory={folder / 'runs'}"]
    train.main(["--gpus", "cpu", "--set", *settings])
    return folder, next((folder / "runs").glob("*-talkers"))


@pytest.fixture(scope="module", autouse=True)
def on_two_workers(finished):
    """The settings of a run with dropouts, SCAFFOLD and secure sums without noise, and how two workers do it, meanwhile."""
    folder, _ = finished
    settings = TINY + [f"data.root={folder / 'people'}", f"runtime.directory={folder / 'runs'}", "fed.algorithm=scaffold",
                       "fed.optimizer=sgd", "fed.gamma=0.0", "fed.dropout_rate=0.1", "privacy.noise_multiplier=0.0",
                       "privacy.clip_quantile=0.0", "privacy.min_honest=2"]
    with ThreadPoolExecutor(1) as background:
        yield settings, background.submit(killed_run, ["--set", *settings, "name=on-two"], folder / "runs")


def killed_run(arguments, runs):
    """The status and output of a run on two workers, one of which is killed once there is a personal adapter."""
    with subprocess.Popen([sys.executable, Path(train.__file__), "--gpus", "cpu:2", *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as child:
        while child.poll() is None and not list(runs.glob("*-on-two/personal/*.pt")):
            time.sleep(0.05)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        output = child.communicate()[0]
    assert not any(Path(f"/proc/{pid}/status").exists() for pid in workers[-2:]), "a worker is left"
    return child.returncode, output


def test_the_whole_path_leaves_what_it_promises(finished):
    _, run = finished
    assert {"config.yaml", "log.txt", "rounds.jsonl", "backbone.pt", "last.pt", "best.pt", "report.json", "report.md",
            "curves.png", "grid.png", "samples", "personal"} <= {p.name for p in run.iterdir()}
    report = json.loads((run / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names[:4] == ["truth", "copy reference", "mean frame", "autoencoder ceiling"]
    assert {"backbone only", "global adapter", "personal adapter"} <= set(names)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["truth"]["psnr"]["mean"] == 100 and rows["copy reference"]["temporal_jitter"]["mean"] == 0
    assert rows["truth"]["jitter_ratio"]["mean"] == pytest.approx(1)
    cells = [cell for row in report["rows"] for cell in row.values() if isinstance(cell, dict)]
    assert all(cell["reason"] if cell["mean"] is None else cell["n"] >= 3 for cell in cells)
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert rounds[1]["clip_norm"] == pytest.approx(3.0 * math.exp(-0.2 * (rounds[0]["unclipped_fraction"] - 0.5)))
    assert [r["round"] for r in rounds] == [0, 1] and rounds[0]["epsilon"] < rounds[1]["epsilon"] == report["privacy"]["epsilon"]
    assert sorted(p.stem for p in (run / "personal").iterdir()) == ["client-000", "client-001", "client-002"]
    video = next((run / "samples").glob("*.mp4"))
    assert data.load_speech(video).any()  # with sound


def speak(run, speech, output, *arguments):
    train.main(["--gpus", "cpu", "--action", "generate", "--resume", str(run), "--reference", str(run / "grid.png"),
                "--speech", str(speech), "--output", str(output), *arguments])


def decoded(video):
    """The frames of a video file, and all that ffmpeg has to say about it."""
    (folder := video.parent / video.stem / "somebody").mkdir(parents=True)
    (folder / "1.mp4").write_bytes(video.read_bytes())
    clip = data.TalkingHeads(folder.parent, 32, cache=folder.parent / "cache").clips[0]
    about = subprocess.run([data.get_ffmpeg_exe(), "-i", str(video)], capture_output=True, text=True).stderr
    return clip.frames.astype(int), clip.audio, about


def test_a_finished_run_speaks_in_windows_and_in_step_with_the_sound(finished, tmp_path, capsys):
    folder, run = finished
    clip = next((folder / "people" / "client-000").glob("*.mp4"))
    speak(run, clip, tmp_path / "whole.mp4", "--adapter", str(run / "personal" / "client-000.pt"), "--prompt", "furious")
    said = capsys.readouterr().out
    assert "ignored: furious" in said and "20 frames" in said and "its centre is used" in said
    speak(run, clip, tmp_path / "short.mp4", "--seconds", "0.5", "--steps", "3", "--seed", "7", "--no-watermark")
    frames, audio, about = decoded(tmp_path / "whole.mp4")
    assert frames.shape == (20, 3, 32, 32) and abs(data.sound_lag(tmp_path / "whole.mp4", data.load_speech(clip))) < 0.02
    assert "synthetic" in about and len(decoded(tmp_path / "short.mp4")[0]) == 12


def test_a_video_without_a_name_is_called_talk(finished, tmp_path, monkeypatch):
    folder, run = finished
    clip = next((folder / "people" / "client-000").glob("*.mp4"))
    reference, run = (run / "grid.png").resolve(), run.resolve()
    monkeypatch.chdir(tmp_path)
    train.main(["--gpus", "cpu", "--action", "generate", "--resume", str(run), "--reference", str(reference), "--speech",
                str(clip.resolve())])
    assert [path.name for path in tmp_path.iterdir()] == ["talk.mp4"]


def test_the_mark_is_in_the_corner_and_nowhere_else(finished, tmp_path):
    frames = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    change = (train.marked(frames) - frames).amax((0, 1))
    assert float(change[-12:, -16:].max()) > 0.3 and float(change[:-12].max()) == float(change[:, :-20].max()) == 0


def test_own_videos_become_an_adapter_that_speaks(finished, tmp_path, capsys):
    folder, run = finished
    train.main(["--gpus", "cpu", "--action", "personalize", "--resume", str(run), "--clips",
                str(folder / "people" / "client-001"), "--output", str(tmp_path / "me.pt")])
    assert "personal adapter / global adapter, paired" in capsys.readouterr().out
    assert not torch.equal(train.load_state(tmp_path / "me.pt")["adapter"], train.load_state(run / "last.pt")["adapter"])
    clip = next((folder / "people" / "client-001").glob("*.mp4"))
    speak(run, clip, tmp_path / "talk.mp4", "--adapter", str(tmp_path / "me.pt"), "--reference", *[str(run / "grid.png")] * 2)
    assert "more pictures do not help" in capsys.readouterr().out  # the same one twice


def test_the_audit_flags_every_defect_and_writes_what_it_found(finished, capsys):
    _, run = finished
    train.main(["--gpus", "cpu", "--action", "audit", "--resume", str(run)])
    found = json.loads((run / "audit.json").read_text())
    assert {name for name, canary in found["canaries"].items() if canary["flagged"]} == set(privacy.DEFECTS) - {None}
    assert all(0 <= auc["mean"] <= 1 and auc["n"] == 3 for auc in found["membership_auc"].values())
    assert "weights uncapped" in capsys.readouterr().out


def test_generation_refuses_what_it_cannot_use(finished, capsys, tmp_path):
    folder, run = finished
    clip = str(next((folder / "people" / "client-000").glob("*.mp4")))
    text, empty = tmp_path / "face.png", tmp_path / "empty.wav"
    text.write_text("no picture"), empty.write_bytes(b"")
    base = ["--gpus", "cpu", "--action", "generate", "--resume", str(run), "--output", str(tmp_path / "talk.mp4")]
    assert "face.png" in fails(capsys, *base, "--reference", str(text), "--speech", clip)
    assert "empty.wav" in fails(capsys, *base, "--reference", str(run / "grid.png"), "--speech", str(empty))
    assert "face.png" in fails(capsys, *base, "--reference", str(run / "grid.png"), "--speech", clip, "--adapter", str(text))
    assert not (tmp_path / "talk.mp4").exists()


def test_resuming_a_finished_run_repeats_no_round_and_changes_nothing(finished):
    _, run = finished
    adapter, history = train.load_state(run / "last.pt")["adapter"], (run / "rounds.jsonl").read_text()
    train.main(["--gpus", "cpu", "--action", "evaluate", "--resume", str(run)])
    assert torch.equal(train.load_state(run / "last.pt")["adapter"], adapter) and (run / "rounds.jsonl").read_text() == history


def test_a_run_has_one_process_at_work_and_loses_its_half_written_files(finished, capsys):
    _, run = finished
    with train.claimed(run):
        assert "another process is at work" in fails(capsys, "--gpus", "cpu", "--resume", str(run))
    (run / "personal" / ".123-client-000.pt").write_text("half")
    with train.claimed(run):
        assert not list(run.rglob(".[0-9]*"))


def test_a_clip_with_a_prompt_is_also_seen_from_another_clip():
    model = train.build_model(train.load_config(train.DEFAULTS, overrides=TINY))
    pictures = np.random.default_rng(0).integers(0, 255, (3, 12, 3, 32, 32), dtype=np.uint8)
    clips = [data.Clip("anna", str(i), Path(str(i)), frames, None, None, prompt, None)
             for i, (frames, prompt) in enumerate(zip(pictures, ("smiling", "", "smiling")))]
    views = train.encode_clips(model, clips, torch.device("cpu"), 3)
    moments, own = [[view.moment for view in views[clip.path]] for clip in clips], [2, 6, 10]
    assert moments == [own + [-1] * 3, own, own + [-1] * 3]
    assert all(any(np.array_equal(view.picture, frame) for frame in pictures[1]) for view in views[Path("0")][3:])
    assert [(v.prompt, v.shown) for v in views[Path("0")][2:4]] == [("", ""), ("smiling", "")]
    assert [view.moment for view in train.encode_clips(model, clips[:1], torch.device("cpu"))[Path("0")]] == [6]


def test_a_backbone_that_is_cut_off_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    folder, _ = finished
    settings = [*TINY, f"data.root={folder / 'people'}", "backbone.steps=4", "model.prior_speech=true"]
    config = train.load_config(train.DEFAULTS, overrides=settings)
    people, cpu = train.load_people(config), torch.device("cpu")
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    train.train_backbone(config, people, cpu, tmp_path / "whole.pt")
    calls, update = [], train.talking.EMA.update

    def cut_off(self, module):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(self, module)

    monkeypatch.setattr(train.talking.EMA, "update", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.train_backbone(config, people, cpu, tmp_path / "cut.pt")
    train.train_backbone(config, people, cpu, tmp_path / "cut.pt")
    whole, cut = (train.load_state(tmp_path / name) for name in ("whole.pt", "cut.pt"))
    assert len(calls) == 5 and whole["losses"] == cut["losses"] and len(cut["losses"]) == 4
    words = "text_encoder._extra_state"
    assert whole["model"].pop(words) == cut["model"].pop(words)
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    assert whole["model"]["prior.heard"].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "whole.pt"]


def test_one_person_is_no_dataset(tmp_path, capsys):
    data.make_synthetic(tmp_path / "one", 1, 0, 0, 3, 3, 0.8, size=32)
    assert "1 people" in fails(capsys, "--set", f"data.root={tmp_path / 'one'}", f"runtime.directory={tmp_path / 'runs'}")
    data.make_synthetic(tmp_path / "few", 3, 2, 1, 2, 3, 0.8, size=32)
    few = [f"data.root={tmp_path / 'few'}", "data.clients=1", "data.unseen=1", f"runtime.directory={tmp_path / 'runs'}"]
    assert "data.clients must lie in 2" in fails(capsys, "--set", *few)
    assert "3 public people are left" in fails(capsys, "--set", *few[:1], "data.clients=2", *few[2:])
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_what_a_run_takes_sends_and_spends(capsys):
    train.main(["--gpus", "cpu", "--action", "dry-run", "--set", *TINY])
    said = capsys.readouterr().out
    assert all(word in said for word in ("epsilon", "adapter", "memory of a fed step", "memory of a backbone step"))


def test_a_step_takes_the_memory_that_was_foretold_and_no_more_than_it_may(monkeypatch):
    config = train.load_config(train.DEFAULTS, overrides=TINY)
    model = train.build_model(config)
    model.autoencoder.requires_grad_(False)
    batch = {"frames": torch.zeros(12, 8, 3, 32, 32), "reference": torch.zeros(12, 3, 32, 32),
             "mel": torch.zeros(12, 8, 20, 40), "motion": torch.zeros(12, 8, 18, 4, 4),
             "reference_latents": torch.zeros(12, 16, 4, 4), "words": model.text_encoder.ids([""] * 12)}
    how = train.how_to_step(model, None, config, "backbone")
    held, each = train.step_memory(model, None, config, "backbone", how)

    def taken(how):  # beside what is there before and after
        model.zero_grad()
        return train.peak_bytes(lambda: fed.accumulate(model, batch, None, torch.Generator(), **how)) + held_before

    parameters, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad or all_) for all_ in (True, False))
    held_before = 2 * (parameters + sum(b.nbytes for b in model.buffers())) + 2 * trained
    assert taken(how) == pytest.approx(held + 12 * each, rel=0.15)
    monkeypatch.setattr(train, "step_memory", lambda *_: (held, each))
    config["runtime"]["memory_gb"] = (held + 5 * each) / 1e9
    how = train.how_to_step(model, None, config, "backbone")
    assert 4 <= how["micro_batch"] <= 5 and taken(how) < 1.15e9 * config["runtime"]["memory_gb"]
    config["runtime"]["memory_gb"] = held / 1e9
    with pytest.raises(ValueError, match="on one clip takes"):
        train.how_to_step(model, None, config, "backbone")


def test_two_workers_one_of_them_killed_make_the_same_run_as_one(finished, on_two_workers):
    folder, (settings, meanwhile) = finished[0], on_two_workers
    train.main(["--gpus", "cpu", "--set", *settings, "name=on-one"])
    status, output = meanwhile.result()
    assert output.endswith("error: worker 1 was ended by SIGKILL: go on with --resume\n"), output  # maybe after a bar
    assert status == 2 and "Traceback" not in output
    one, two = (next((folder / "runs").glob(f"*-on-{workers}")) for workers in ("one", "two"))
    assert not (two / "report.json").exists()
    train.main(["--gpus", "cpu", "--resume", str(two)])
    for name in ("last.pt", "personal/client-000.pt", "personal/client-002.pt"):
        assert torch.equal(*(train.load_state(run / name)["adapter"] for run in (one, two)))
    states = [train.load_state(run / "last.pt") for run in (one, two)]
    assert states[0]["control"].norm() > 0 and torch.equal(states[0]["control"], states[1]["control"])
    assert all(torch.equal(states[0]["controls"][i], states[1]["controls"][i]) for i in range(3))
    losses = [json.loads((run / "report.json").read_text())["validation_loss"] for run in (one, two)]
    assert losses[0] == losses[1]
