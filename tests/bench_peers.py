"""The same linear task here, in Flower's simulation, in pfl-research and in a bare loop.

    pip install "flwr[simulation]" pfl psutil
    python tests/bench_peers.py

100 clients with a batch of 8 rows each, 10 of them in a round, 100 rounds, one local step on the
same adapter of 1,024 numbers: AdamW, its gradient clipped. Each system runs in processes of its
own, one after another, once without privacy and once with all of secure sum and noise that it has.
PrivFedTalk saves its state after each round and before each one with noise, pfl-research after each
where it is "resumable", the others never. The script writes tests/results/peers.md: the median of a
round by the clock, the processor time of the whole run, and the largest memory of all its processes
together.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora

NUM_CLIENTS = 100
COHORT = 10
NUM_ROUNDS = 100
NUM_INPUTS = 127  # of a linear layer with one output; rank 8
CLIP_NORM = 2.6
SYSTEMS = {
    "bare loop": ("loop", False, "–"),
    "PrivFedTalk": ("ours", False, "–"),
    "Flower": ("flower", False, "–"),
    "pfl-research": ("pfl", False, "–"),
    "pfl-research, resumable": ("resumable pfl", False, "–"),
    "PrivFedTalk, private": ("ours", True, "secure sum, noise of the clients"),
    "Flower, private": ("flower", True, "secure sum (SecAgg+), noise of the server"),
    "pfl-research, private": ("pfl", True, "noise of the server"),
}


def make_batch(client):
    """Return a client's x [8 127] and y [8 1]."""
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(8, NUM_INPUTS, generator=generator)
    return x, torch.randn(8, 1, generator=generator)


def make_net():
    """Return a linear layer that is frozen, with an adapter of 1,024 numbers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(NUM_INPUTS, 1))
    lora.inject_lora(net, 8, 1.0, 0.0, "AB")
    return net


def train_step(net, start, x, y):
    """Return the adapter [1024] after one local step from `start`, as `fed.train_adapter` takes it."""
    parameters = lora.load_adapter_vector(net, start)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    net.zero_grad()
    (net(x) - y).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return lora.adapter_vector(net)


def run_loop(private):
    """Return the moments at which rounds ended, in seconds."""
    batches = [make_batch(client) for client in range(NUM_CLIENTS)]
    net = make_net()
    start = lora.adapter_vector(net)
    rng = np.random.default_rng(0)
    moments = [time.perf_counter()]
    for _ in range(NUM_ROUNDS):
        total = torch.zeros_like(start)
        for client in rng.choice(NUM_CLIENTS, COHORT, replace=False).tolist():
            total += train_step(net, start, *batches[client])
        start = total / COHORT
        moments.append(time.perf_counter())
    return moments


def run_ours(private):
    """Return the moments at which rounds ended."""
    from bench_rounds import run_linear

    settings = [] if private else ["privacy.enabled=false"]
    clock = time.process_time
    time.process_time = time.perf_counter  # run_linear counts processor time
    seconds, _, _ = run_linear(NUM_ROUNDS, 8 * (NUM_INPUTS + 1), NUM_CLIENTS, *settings)
    time.process_time = clock
    return np.cumsum([0, *seconds]).tolist()


def run_flower(private):
    """Return the moments at which rounds ended."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.client.mod import fixedclipping_mod, secaggplus_mod
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerApp, ServerConfig
    from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
    from flwr.simulation import run_simulation

    class Client(NumPyClient):
        def __init__(self, number):
            self.number = number

        def fit(self, parameters, config):
            (start,) = parameters
            x, y = make_batch(self.number)
            trained = train_step(make_net(), torch.tensor(start), x, y)
            return [trained.numpy()], len(x), {}

    class Timed(FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            assert len(results) == COHORT and not failures, failures[:1]
            moments.append(time.perf_counter())
            return super().aggregate_fit(server_round, results, failures)

    moments = []
    start = lora.adapter_vector(make_net())
    strategy = Timed(
        fraction_fit=COHORT / NUM_CLIENTS,
        fraction_evaluate=0.0,
        min_fit_clients=COHORT,  # while clients still sign in, a tenth is fewer
        min_available_clients=NUM_CLIENTS,
        initial_parameters=ndarrays_to_parameters([start.numpy()]),
    )
    fit = None
    mods = []
    if private:
        strategy = DifferentialPrivacyClientSideFixedClipping(strategy, 1.0, CLIP_NORM, COHORT)
        fit = SecAggPlusWorkflow(num_shares=COHORT, reconstruction_threshold=COHORT // 2 + 1)
        mods = [secaggplus_mod, fixedclipping_mod]
    server = ServerApp()

    @server.main()
    def main(grid, context):
        config = ServerConfig(num_rounds=NUM_ROUNDS)
        context = LegacyContext(context=context, config=config, strategy=strategy)
        DefaultWorkflow(fit_workflow=fit)(grid, context)

    def make_client(context):
        return Client(int(context.node_config["partition-id"])).to_client()

    run_simulation(
        server_app=server,
        client_app=ClientApp(client_fn=make_client, mods=mods),
        num_supernodes=NUM_CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )
    return moments


def run_pfl(private, folder=None):
    """Return the moments at which rounds ended; with a folder the state is saved there each time."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.callback.restore_training import RestoreTrainingCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make_net()

        def forward(self, x):
            return self.layers(x)

        def loss(self, x, y, eval=False):
            return (self(x) - y).square().mean()

        def metrics(self, x, y, eval=False):
            return {}

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            moments.append(time.perf_counter())
            return False, Metrics()

    moments = []
    batches = [make_batch(client) for client in range(NUM_CLIENTS)]
    users = FederatedDataset(
        lambda user: PyTorchTensorDataset(batches[user]),
        get_user_sampler("random", list(range(NUM_CLIENTS))),
    )
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIP_NORM, 1.0))
    backend = SimulatedBackend(users, users, [mechanism] if private else [])
    net = Net()
    central_optimizer = torch.optim.SGD(lora.adapter_parameters(net), lr=1.0)
    model = PyTorchModel(net, torch.optim.AdamW, central_optimizer)
    algorithm = FederatedAveraging()
    callbacks = [Clock()]
    if folder:
        callbacks.insert(0, RestoreTrainingCallback([model, algorithm], folder))
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=NUM_ROUNDS,
            evaluation_frequency=10**6,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=0.01,
            local_batch_size=None,
            local_max_grad_norm=1.0,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks,
    )
    return moments


def watch(function, private):
    """Run one system in a process of its own; return its figures, or why it did not run."""
    import psutil

    peak = 0
    spent = {}  # process -> processor time
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "moments.json")
        command = [sys.executable, __file__, function, str(int(private)), str(output)]
        with open(Path(folder, "log"), "w+") as log:
            # Ray's workers import `lora`, too.
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            tree = psutil.Process(process.pid)
            while process.poll() is None:
                memory = 0
                try:
                    for member in [tree, *tree.children(recursive=True)]:
                        memory += member.memory_info().rss
                        times = member.cpu_times()
                        spent[member.pid] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue
                peak = max(peak, memory)
                time.sleep(0.1)
            log.seek(0)
            lines = log.read().strip().splitlines()
        if process.returncode or not output.exists():
            return None, (lines or ["no output"])[-1]
        moments = json.loads(output.read_text())
    median = 1e3 * np.median(np.diff(moments))
    return (median, sum(spent.values()), peak / 2**20), None


def main():
    packages = {"flwr": "Flower", "pfl": "pfl-research"}
    versions = [
        f"{title} {importlib.metadata.version(name)}"
        for name, title in packages.items()
        if importlib.util.find_spec(name)
    ]
    lines = ["# Compared with other simulators", "", __doc__.strip().split("\n\n", 2)[2], ""]
    lines += [f"{', '.join(versions)}; {os.cpu_count()} cores.", ""]
    lines += ["| system | privacy | ms a round | processor s | MiB |", "|---|---|---|---|---|"]
    for name, (function, private, privacy) in SYSTEMS.items():
        figures, reason = watch(function, private)
        if figures:
            cells = "{:.1f} | {:.0f} | {:.0f}".format(*figures)
        else:
            cells = f"did not run: {reason} | |"
        lines.append(f"| {name} | {privacy} | {cells} |")
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "peers.md"
    path.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        _, function, private, output = sys.argv
        runs = {"loop": run_loop, "ours": run_ours, "flower": run_flower, "pfl": run_pfl}
        runs["resumable pfl"] = functools.partial(run_pfl, folder=str(Path(output).parent))
        moments = runs[function](private == "1")
        Path(output).write_text(json.dumps(moments))
    else:
        main()
