"""What a round costs beside the model: python tests/bench_rounds.py

Ten clients, a linear layer with an adapter of d numbers, one SGD step on a batch of 8, against a plain loop that does
the same steps in the same run.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fed
import lora
import privacy

CLIENTS, BATCH = 10, 8


def linear_model(d):
    """A linear layer n -> 1 whose adapter of rank 8 has 8 (n + 1) = d numbers."""
    n = d // 8 - 1
    model = torch.nn.Module()
    model.unet = torch.nn.Sequential(torch.nn.Linear(n, 1))
    lora.inject_lora(model, 8, 1, 0.0, ["unet"])
    return model, n


def squared_error(model, batch):
    loss = (model.unet(batch["x"]) - batch["y"]).square().mean()
    loss.backward()
    return {"diffusion": float(loss.detach())}


def accumulate(model, batch, *_, **__):
    """In the place of `fed.accumulate`."""
    model.zero_grad()
    return squared_error(model, batch), 0


def plain_round(model, batches, start, lr):
    """The same steps and the same mean, by hand."""
    total, parameters = torch.zeros_like(start), lora.adapter_parameters(model)
    for batch in batches:
        lora.load_adapter_vector(model, start)
        squared_error(model, batch)
        with torch.no_grad():
            for p in parameters:
                p -= lr * p.grad
                p.grad = None
        total += lora.adapter_vector(model) - start
    return start + total / len(batches)


def bench(d, rounds=25):
    model, n = linear_model(d)
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(BATCH, n, generator=generator), "y": torch.randn(BATCH, 1)} for _ in range(CLIENTS)]
    clients = [fed.Client(str(i), BATCH, lambda *_, b=b: b, None) for i, b in enumerate(batches)]
    train = dict(lr=0.1, batch_size=BATCH, num_frames=1, proximal=0.0, optimizer="sgd", loss_weights={}, condition_dropout=0.0)
    settings = dict(algorithm="isfa", sample_rate=1.0, local_epochs=1.0, server_lr=1.0, gamma=0.0, reliability_alpha=0.7,
                    sample_cap=BATCH, train=train, sampling={}, reliability="generated", public=1.0, dropout_rate=0.0,
                    client_timeout_seconds=0.0)
    mechanism = privacy.Mechanism(1.0, 0.01, d, CLIENTS, CLIENTS)
    state = {"adapter": lora.adapter_vector(model)}
    plain = lambda i: plain_round(model, batches, state["adapter"], 0.1)
    for kind, private in (("round", None), ("round, secure sum and noise", mechanism)):
        seconds = {"plain loop": [], kind: []}
        for index in range(rounds + 2):  # in turn, so that a busy machine slows both
            for name, work in (("plain loop", plain),
                               (kind, lambda i: fed.run_round(model, None, clients, state, i, 0, private, settings))):
                started = time.perf_counter()
                work(index)
                seconds[name].append(time.perf_counter() - started)
        base, own = (float(np.median(taken[2:])) for taken in seconds.values())
        print(f"d = {d:9,}: {kind:28} {1e3 * own:8.1f} ms, {own / base:6.2f} times the plain loop's {1e3 * base:.1f} ms")


if __name__ == "__main__":
    fed.accumulate = accumulate
    for d in (1_000, 1_000_000):
        bench(d)
