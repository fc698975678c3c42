"""Runs of several processes: workers, machines, and what happens when one of them is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
from test_train import ROOT, TINY, fails, places, read_rounds, skip_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with people, decoded, so that ffmpeg is no run's child, and the runs' backbones."""
    folder = tmp_path_factory.mktemp("workers")
    data.make_synthetic(folder / "people", 8, 5, 2, 2, 4, 0.8, 32)
    data.TalkingHeads(folder / "people", 32, cache=folder / "cache")
    return folder


def run_command(*arguments, **kwargs):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_node(rank, num_workers, port, folder, *arguments):
    """Start one of two machines of a run by torchrun, with `folder` for its disk."""
    options = {"nnodes": 2, "node-rank": rank, "nproc-per-node": num_workers}
    options |= {"master-addr": "127.0.0.1", "master-port": port}
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [str(ROOT / "train.py"), "--gpus", "cpu", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A terminal that has no letters but ASCII must not end a run.
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.Popen(command, cwd=folder, env=os.environ | ascii_only, **pipes)


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid):
    """Return whether a process runs; one that has ended but was not waited for does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_two_workers_one_of_them_killed_make_the_same_run_as_one(folder, monkeypatch, capsys):
    skip_evaluation(monkeypatch)
    settings = [*TINY, *places(folder)]
    settings += [
        "fed.dropout_rate=0.1",
        "privacy.noise_multiplier=0.0",
        "privacy.target_epsilon=0.0",
    ]
    settings += ["privacy.survivor_share=0.55", "privacy.num_curious=0", "privacy.seed=0"]
    scaffold = ["--preset", "scaffold", "--set", *settings, "fed.sample_rate=0.9"]
    train.main(["--gpus", "cpu", *scaffold, "name=one"])
    port = str(free_port())
    workers = []
    for rank in ("0", "1"):  # as torchrun starts them
        variables = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}
        arguments = ["--gpus", "cpu", *scaffold, "name=two"]
        workers.append(run_command(*arguments, env=os.environ | variables))
    while workers[0].poll() is None and not list((folder / "runs").glob("*-two/rounds.jsonl")):
        time.sleep(0.02)
    workers[1].kill()
    output, _ = [worker.communicate()[0] for worker in workers]
    assert "error: another worker has ended: continue with --resume" in output, output
    assert workers[0].returncode == 2 and "Traceback" not in output
    one = next((folder / "runs").glob("*-one"))
    two = next((folder / "runs").glob("*-two"))
    train.main(["--gpus", "cpu", "--resume", str(two)])
    states = [train.load_checkpoint(run / "last.pt", "global adapter") for run in (one, two)]
    for name in ("adapter", "control", "round"):
        assert train.checksum(states[0][name]) == train.checksum(states[1][name]), name
    spent = [sum(row[2] for row in state["accountant"]) for state in states]
    assert spent[0] == 2 <= spent[1] <= 3  # the killed round may have been seen
    for name in ("client-000", "client-001"):
        paths = [run / "personal" / f"{name}.pt" for run in (one, two)]
        own = [train.load_checkpoint(path, "personal adapter")["adapter"] for path in paths]
        assert torch.equal(*own)
    shutil.rmtree(two / "clients")
    error = fails(capsys, "--resume", str(two), "--set", "fed.rounds=3")
    assert "clients: lost or not shared, and with it the clients' c_i" in error


def test_two_machines_that_share_no_disk_make_the_run_of_one_process(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "people", tmp_path / "people")
    places = ["data.root=people", "runtime.directory=runs", "runtime.cache=cache"]
    settings = ["--set", *TINY, *places, "privacy.seed=0", "privacy.num_curious=0"]
    settings += ["fed.sample_rate=0.8", "fed.fixed_cohorts=true"]
    train.main(["--gpus", "cpu", *settings, "name=alone"])
    alone = next((folder / "runs").glob("*-alone"))
    for record in read_rounds(alone):
        assert (record["cohort_size"], record["sample_rate"]) == (4, 1.0)  # of five clients

    port = free_port()
    settings.append("name=nodes")
    nodes = [run_node(0, 1, port, folder, *settings), run_node(1, 2, port, tmp_path, *settings)]
    for node in nodes:
        output = node.communicate()[0]
        assert node.returncode == 0, output
    together = next((folder / "runs").glob("*-nodes"))
    for name in ("last.pt", "personal/client-000.pt", "personal/client-001.pt"):
        kind = "global adapter" if name == "last.pt" else "personal adapter"
        states = [train.load_checkpoint(run / name, kind)["adapter"] for run in (alone, together)]
        assert torch.equal(*states), name
    reports = [json.loads((run / "report.json").read_text()) for run in (alone, together)]
    for section in ("rows", "paired", "unseen", "unexplained"):
        assert reports[0][section] == reports[1][section], section
    for picture in ("grid.png", "curves.png"):
        assert (alone / picture).read_bytes() == (together / picture).read_bytes()


def test_a_port_in_use_is_one_line(folder, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        variables = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        variables["MASTER_PORT"] = other.getsockname()[1]
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        assert "the workers cannot meet" in fails(capsys, "--set", *TINY, *places(folder))


def test_a_lost_worker_ends_the_run():
    with run_command("--gpus", "cpu:2", "--set", *TINY) as parent:
        while len(workers := children_of(parent.pid)) < 2:
            assert parent.poll() is None
            time.sleep(0.01)
        os.kill(int(workers[1]), signal.SIGKILL)
        output = parent.communicate()[0]
    assert "error: worker 1 was ended by SIGKILL: continue with --resume" in output, output
    assert parent.returncode == 2 and "Traceback" not in output
    assert not any(alive(pid) for pid in workers)


# The launcher's children are workers, a worker's child makes batches for the backbone.
@pytest.mark.parametrize("gpus, num_children", [("cpu:2", 2), ("cpu", 1)])
def test_processes_end_with_their_parent(folder, gpus, num_children):
    settings = [*TINY, *places(folder), "fed.rounds=400", "backbone.steps=100"]
    with run_command("--gpus", gpus, "--set", *settings, "name=end") as parent:
        while len(children := children_of(parent.pid)) < num_children:
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
        parent.wait()  # not for what the children print, which ends with them at the latest
        deadline = time.time() + 3  # torch alone would look for the parent every 5 s
        while any(alive(pid) for pid in children) and time.time() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in children)
