"""The study: which cells there are, that none is worked out twice, and what its tables say of them."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import data
import lora
import metrics
import train
from test_train import TINY, fails

SMALL = TINY + ["study.seeds=2", "study.validation_clips=1", "study.ranks=[1]", "study.unreliable=[0.34]",
                "study.gammas=[1.0]", "study.personal_clients=2", "study.seconds=[0.8]", "study.steps=[1]",
                "fed.rounds=1"]


def untrained_backbone(config, *_):
    return {"model": train.build_model(config).state_dict(), "judges": metrics.Judges().state_dict()}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A small study, gone on with further tables: its directory, the cells worked out, and those of its first part."""
    folder, patch, worked = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch(), []
    data.make_synthetic(folder / "people", 4, 3, 1, 2, 4, 0.8, size=32)
    settings = SMALL + [f"data.root={folder / 'people'}", f"runtime.directory={folder / 'runs'}"]
    run_cell = train.run_cell
    patch.setattr(train, "run_cell", lambda cell, *rest: worked.append(cell.label) or run_cell(cell, *rest))
    patch.setattr(train, "backbone", untrained_backbone)
    patch.setattr(train, "LAYERS", {"whole UNet, no LoRA": []})
    train.main(["--gpus", "cpu", "--action", "study", "--tables", "rank", "communication", "--set", *settings])
    run = next((folder / "runs").glob("*-study"))
    first = {path: path.stat().st_mtime_ns for path in (run / "cells").glob("*.json")}
    train.main(["--gpus", "cpu", "--action", "study", "--tables", "participation", "rank", "reliability", "personalization",
                "--resume", str(run), "--set", "study.sample_rates=[1.0]"])
    patch.undo()
    return run, worked, first


def test_going_on_repeats_no_cell(studied):
    run, worked, first = studied
    assert worked[:2] == ["rank 1"] * 2 and len(first) == 2 and "rank 1" not in worked[2:]
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert "rate 1" not in worked  # is what rank 1 is, at this rank
    assert len(worked) == len(list((run / "cells").glob("*.json"))) == 2 + 2 * 2 + 1 + 2 * 2
    assert not list((run / "cells").rglob("*.pt"))


def test_the_tables_say_what_the_cells_found(studied):
    run, *_ = studied
    tables = json.loads((run / "study.json").read_text())
    rows = {table: {row["label"]: row for row in own} for table, own in tables.items()}
    assert list(rows) == ["rank", "communication", "participation", "reliability", "personalization"]
    config = train.load_config(run / "config.yaml", overrides=["study.sample_rates=[1.0]"])
    cell = train.study_cells("rank", config)[0]
    found = [json.loads((run / "cells" / f"{key}.json").read_text()) for key in train.keys_of_cell(cell, config)]
    assert [c["seed"] for c in found] == [0, 1] and found[0]["people"] != found[1]["people"]
    row = rows["rank"]["rank 1"]
    for metric in ("validation_loss", "psnr", "excess_jitter"):
        mean = np.mean([np.mean([np.mean(p[metric]) for p in c["people"].values()]) for c in found])
        assert row["metrics"][metric]["mean"] == pytest.approx(mean) and row["metrics"][metric]["n"] == 3
    assert row["also"]["bytes down"] == 4 * found[0]["parameters"]
    assert rows["participation"]["rate 1"]["metrics"] == row["metrics"]
    unreliable = rows["reliability"]["34% unreliable, ISFA 1, generated"]
    assert unreliable["metrics"]["psnr"]["n"] == 2 and unreliable["versus"] == {}  # FedAvg is not in the table
    assert 0 <= unreliable["also"]["AUC of reliability"]["mean"] <= 1
    explained = rows["reliability"]["34% unreliable, ISFA 1, explained"]["also"]
    assert "AUC of fit" in explained and "AUC of identity" not in explained
    own = rows["personalization"]
    labels = ("0.8 s, 1 steps", "0.8 s, 1 steps, whole UNet, no LoRA")
    assert np.diff([own[label]["also"]["parameters"] for label in labels]) > 0
    assert own["0.8 s, 1 steps"]["metrics"]["psnr"]["n"] == 2 and own["backbone only"]["metrics"]["psnr"]["seeds"] == 1
    versus = own["0.8 s, 1 steps, whole UNet, no LoRA"]["versus"]
    assert set(versus) == {"backbone only", "0.8 s, 1 steps"} and versus["backbone only"]["loss ratio"]["seeds"] == 2
    assert "minus 0.8 s, 1 steps:" in (run / "study.md").read_text() and (run / "study.png").exists()


def test_only_reliable_clients_are_scored(studied):
    run, *_ = studied
    cells = [json.loads(path.read_text()) for path in (run / "cells").glob("*.json")]
    faulty = {r["client"] for cell in cells for r in cell["reliability"] if r["fault"]}
    assert len(faulty) == 1
    assert {len(c["people"]) for c in cells if any(r["fault"] for r in c["reliability"])} == {2}
    assert all(not faulty & set(c["people"]) for c in cells if any(r["fault"] for r in c["reliability"]))


def test_cells_that_do_the_same_have_the_same_key():
    config = train.load_config(train.DEFAULTS)
    keys = {table: {cell.label: tuple(train.keys_of_cell(cell, config)) for cell in train.study_cells(table, config)}
            for table in train.TABLES}
    plain = keys["methods"]["PrivFedTalk without DP"]
    assert plain == keys["ablation"]["+ ISFA + TDC"] == keys["rank"]["rank 4"] == keys["participation"]["rate 0.75"]
    assert plain == keys["privacy"]["without DP"]
    assert plain == keys["reliability"]["0% unreliable, ISFA 0.5, generated"]
    assert keys["methods"]["PrivFedTalk"] == keys["ablation"]["full"] == keys["privacy"]["z = 0.005"] != plain
    assert keys["methods"]["FedAvg"] == keys["ablation"]["+ TDC"] == keys["reliability"]["0% unreliable, FedAvg"]
    assert keys["ablation"]["+ TDC"] == keys["tdc"]["lambda 0.05, 2 steps"] != keys["tdc"]["lambda 0.05, 8 steps"]
    assert keys["ablation"]["adapters-only"] == keys["tdc"]["lambda 0, 2 steps"]
    assert keys["methods"]["backbone only"] == keys["personalization"]["backbone only"] and len(plain) == 3
    for own in keys.values():
        every = [key for seeds in own.values() for key in seeds]
        assert len(set(every)) == len(every)  # no two rows of a table, and no two seeds, are the same


def test_every_cell_of_every_preset_is_a_valid_config():
    layers = train.build_model(train.load_config(train.DEFAULTS))
    for preset in ([], ["study"], ["study-small"]):
        config = train.load_config(train.DEFAULTS, preset)
        for table in train.TABLES:
            labels = {cell.label for cell in train.study_cells(table, config)}
            for cell in train.study_cells(table, config):
                train.settings_of(train.settings_of_cell(cell, 5, config), 1.0, {})
                train.make_mechanism(train.settings_of_cell(cell, 5, config), 93328)
                assert set(cell.against) <= labels
    for targets in filter(None, train.LAYERS.values()):
        adapted = copy.deepcopy(layers)
        assert lora.inject_lora(adapted, 1, 1, 0.0, targets) >= 4
        assert all(name.startswith("unet.") for name, p in adapted.named_parameters() if p.requires_grad)


def test_epsilon_in_the_table_is_the_accountants():
    config = train.load_config(train.DEFAULTS, overrides=["privacy.noise_multiplier=0.5"])
    columns = train.privacy_columns(config, 3.0)
    assert columns["epsilon, 12 clients"] == 3.0
    assert columns["1,000 clients, same cohort"] == train.privacy.compute_epsilon(0.009, 0.5, 4, 1e-5)
    larger = train.privacy.compute_epsilon(0.75, 0.5 * 10000 / 12, 4, 1e-5)
    assert columns["10,000 clients, same noise on the mean"] == larger
    low, high = columns["as canaries measure it (99 %)"]["ci95"]
    assert low < columns["epsilon of one round"] * 1.05 < 1.5 * high


def test_differences_are_taken_pair_by_pair():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 100, (2, 5))  # seeds and people differ widely; the pairs by 1 exactly
    found = {label: [{"people": {str(i): {"psnr": [v + shift]} for i, v in enumerate(row)}, "reliability": []}
                     for row in base] for label, shift in (("a", 0.0), ("b", 1.0))}
    config = train.load_config(train.DEFAULTS)
    row = train.study_row("tdc", train.Cell("b", (), ("a", "absent")), found, config)
    difference = row["versus"]["a"]["psnr"]
    assert difference["mean"] == pytest.approx(1) and difference["ci95"] == pytest.approx([1, 1])
    assert row["metrics"]["psnr"]["ci95"][0] < -20 and list(row["versus"]) == ["a"]


def test_auc_of_reliabilities():
    cells = [{"reliability": [{"reliability": r, "identity": r, "stability": 0.5, "fault": fault}
                              for r, fault in ((0.9, None), (0.8, None), (0.85, "noise"), (0.1, "flicker"))]}] * 2
    columns = train.reliability_columns(cells)
    assert columns["AUC of reliability"]["mean"] == 0.75 and columns["AUC of stability"]["mean"] == 0.5
    assert columns["mean r, good"] == pytest.approx(0.85) and columns["mean r, noise"] == pytest.approx(0.85)
    assert math.isclose(columns["mean r, flicker"], 0.1) and "mean r, shifted sound" not in columns


def test_without_adapters_the_whole_unet_is_trained():
    config = train.load_config(train.DEFAULTS, overrides=[*TINY, "lora.targets=[]"])
    model = train.build_model(config).requires_grad_(False)
    train.add_adapters(model, config)
    vector = lora.adapter_vector(model)
    assert len(vector) == sum(p.numel() for p in model.unet.parameters())
    lora.load_adapter_vector(model, vector + 1)
    assert torch.equal(lora.adapter_vector(lora.merge_lora(model)), vector + 1)


@pytest.mark.parametrize("arguments, words", [
    (["--tables", "method"], "did you mean 'methods'"),
    (["--set", "study.ranks=[1, two]"], "study.ranks must be int"),
    (["--set", "study.unreliable=[2.0]"], "study.unreliable must lie in 0"),
])
def test_a_mistake_gets_one_line_and_leaves_nothing(arguments, words, capsys, tmp_path):
    directory = f"runtime.directory={tmp_path / 'runs'}"
    arguments = [*arguments, directory] if arguments[0] == "--set" else [*arguments, "--set", directory]
    assert words in fails(capsys, "--action", "study", *arguments)
    assert not (tmp_path / "runs").exists()


def test_more_video_than_there_is_gets_one_line(studied, capsys, tmp_path):
    settings = [f"data.root={studied[0].parents[1] / 'people'}", f"runtime.directory={tmp_path / 'runs'}"]
    study = ["--action", "study", "--tables", "personalization", "--set", *SMALL, *settings, "study.seconds=[60.0]"]
    assert "not 60" in fails(capsys, *study) and not (tmp_path / "runs").exists()
