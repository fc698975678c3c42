"""Runs of several processes: workers, machines, and what happens when one of them is lost."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import run as torchrun

import data
import fed
import train
from test_train import ROOT, TINY, fails, places, read_rounds, skip_evaluation

SCRIPT = str(ROOT / "train.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with people, decoded, so that ffmpeg is no run's child, and the runs' backbones."""
    folder = tmp_path_factory.mktemp("workers")
    data.make_synthetic(folder / "people", 8, 5, 2, 2, 4, 0.8, 32)
    data.TalkingHeads(folder / "people", 32, cache=folder / "cache")
    return folder


@pytest.fixture(scope="module")
def context():
    """Forks processes off one that has imported everything, which takes 4 s of CPU time.

    Not off this one: torch refuses a backward pass in a fork of a process that has made one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_workers"])
    variables = {"PYTHONPATH": os.pathsep.join(sys.path)}
    # A terminal that has no letters but ASCII must not end a run.
    variables |= {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(context, tmp_path):
    """Return a function that starts a process and returns it and the file that it prints into."""
    processes = []

    def start(function, *arguments, folder=ROOT, **variables):
        output = tmp_path / f"output-{len(processes)}.txt"
        process = context.Process(target=act, args=(output, folder, variables, function, arguments))
        process.start()
        processes.append(process)
        return process, output

    yield start
    for process in processes:
        process.kill()


def act(output, folder, variables, function, arguments):
    """Call a function in a process of its own, with its folder and environment variables."""
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # not the server's, which leaves locks
    function(*arguments)


def run_script(*arguments):
    """Do what `python train.py` does with these arguments."""
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_node(rank, num_workers, port, *arguments):
    """Do what `torchrun` does on one of two machines of a run; the workers are forks of it."""
    options = {"nnodes": 2, "node-rank": rank, "nproc-per-node": num_workers}
    options |= {"master-addr": "127.0.0.1", "master-port": port, "start-method": "fork"}
    options = [f"--{name}={value}" for name, value in options.items()]
    torchrun.main([*options, "--run-path", SCRIPT, "--gpus", "cpu", *arguments])


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid):
    """Return whether a process runs; one that has ended but was not waited for does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_two_workers_one_of_them_killed_make_the_same_run_as_one(
    folder, start, monkeypatch, capsys
):
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
        workers.append(start(run_script, *arguments, **variables))
    (first, output), (second, _) = workers
    while first.is_alive() and not list((folder / "runs").glob("*-two/rounds.jsonl")):
        time.sleep(0.02)
    second.kill()
    first.join()
    output = output.read_text()
    assert "error: another worker has ended: continue with --resume" in output, output
    assert first.exitcode == 2 and "Traceback" not in output
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
    assert "client-000.pt: lost or damaged, and with it the client's c_i" in error


def test_two_machines_that_share_no_disk_make_the_run_of_one_process(
    folder, start, tmp_path, monkeypatch
):
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
    nodes = [start(run_node, 0, 1, port, *settings, folder=folder)]
    nodes.append(start(run_node, 1, 2, port, *settings, folder=tmp_path))
    for node, output in nodes:
        node.join()
        assert node.exitcode == 0, output.read_text()
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


def test_workers_do_not_inherit_what_torchrun_told_their_launcher(monkeypatch):
    """With TORCHELASTIC_USE_AGENT_STORE they would wait for a server that nobody starts."""
    started = []

    def start(command, env, preexec_fn):
        started.append(env)
        return SimpleNamespace(
            poll=lambda: 0, terminate=lambda: None, wait=lambda *args: 0, kill=lambda: None
        )

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(train.subprocess, "Popen", start)
    assert train.launch(["--gpus", "cpu:2"], 2) == 0
    assert [env["RANK"] for env in started] == ["0", "1"]
    assert not any(name.startswith("TORCHELASTIC") for env in started for name in env)


def test_machines_with_other_code_are_refused():
    workers = fed.Workers()
    workers.merge = lambda own: own | {1: "another checksum"}
    args = SimpleNamespace(action="train", resume="runs/x")
    with pytest.raises(ValueError, match="the machines have different versions of this code"):
        train.run_action(args, train.load_config(train.DEFAULTS), ["cpu"], workers)


def test_one_process_speaks_for_all(monkeypatch):
    said = []
    monkeypatch.setattr(train, "generate", lambda *args: said.append(args))
    for rank in (0, 1):
        args = SimpleNamespace(action="generate")
        train.run_action(args, {}, ["cpu"], SimpleNamespace(rank=rank))
    assert len(said) == 1


def test_a_lost_worker_ends_the_run():
    command = [sys.executable, SCRIPT, "--gpus", "cpu:2", "--set", *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as parent:
        while len(workers := children_of(parent.pid)) < 2:
            assert parent.poll() is None
            time.sleep(0.01)
        os.kill(int(workers[1]), signal.SIGKILL)
        output = parent.communicate()[0]
    assert "error: worker 1 was ended by SIGKILL: continue with --resume" in output, output
    assert parent.returncode == 2 and "Traceback" not in output
    assert not any(alive(pid) for pid in workers)


def test_ctrl_c_leaves_nothing_half_written_and_is_one_line(tmp_path):
    settings = [f"data.root={tmp_path / 'synthetic'}", f"runtime.directory={tmp_path / 'runs'}"]
    settings += [f"runtime.cache={tmp_path / 'cache'}", "data.clients=60"]
    command = [sys.executable, SCRIPT, "--gpus", "cpu:2", "--set", *TINY, *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as parent:
        while not list(tmp_path.glob(".synthetic-*/new/public-*/*.mp4")):
            assert parent.poll() is None
            time.sleep(0.01)
        for pid in children_of(parent.pid):  # or tidying up would be interrupted, too
            (ignored,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            assert int(ignored, 16) & 1 << signal.SIGINT - 1
        os.killpg(parent.pid, signal.SIGINT)
        output = parent.communicate()[0]
    assert parent.returncode == 2 and output.count("error: interrupted") == 1, output
    assert "Traceback" not in output and not list(tmp_path.glob(".synthetic-*"))


# The launcher's children are workers, a worker's child makes batches for the backbone.
@pytest.mark.parametrize("gpus, num_children", [("cpu:2", 2), ("cpu", 1)])
def test_processes_end_with_their_parent(folder, start, gpus, num_children):
    settings = [*TINY, *places(folder), "fed.rounds=400", "backbone.steps=100"]
    parent, _ = start(run_script, "--gpus", gpus, "--set", *settings, "name=end")
    while len(children := children_of(parent.pid)) < num_children:
        assert parent.is_alive()
        time.sleep(0.01)
    # torch would look for the parent between two batches, but not while none is asked for.
    os.kill(parent.pid, signal.SIGSTOP)
    time.sleep(0.3)
    parent.kill()
    parent.join()
    deadline = time.time() + 3  # torch alone would look for the parent every 5 s
    while any(alive(pid) for pid in children) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
