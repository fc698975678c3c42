"""LoRA: identity at the start, the formula of Eq. 7, a frozen base, merging, and the flat vector."""

import pytest
import torch
from torch import nn

import lora


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.Flatten(),
                         nn.Linear(96, 10, bias=False), nn.SiLU(), nn.Linear(10, 4))


def adapted(dropout=0.0):
    net = network()
    lora.inject_lora(net, rank=2, alpha=6, dropout=dropout, targets=["0", "2", "4"])
    return net.eval()


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_identity_at_the_start():
    assert torch.equal(adapted()(X), network()(X))


def test_linear_is_eq_7():
    layer = lora.LoRALayer(nn.Linear(7, 5), rank=3, alpha=6, dropout=0.0)
    nn.init.normal_(layer.B)
    x = torch.randn(4, 7)
    expected = x @ (layer.base.weight + 6 / 3 * layer.B @ layer.A).T + layer.base.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_merged_equals_unmerged():
    net = adapted()
    lora.load_adapter_vector(net, torch.randn(len(lora.adapter_vector(net))))
    before = net(X)
    merged = lora.merge_lora(net)
    assert not any(isinstance(m, lora.LoRALayer) for m in merged.modules())
    assert torch.allclose(merged(X), before, atol=1e-4)
    assert not torch.allclose(merged(X), network()(X), atol=1e-2)


def test_only_adapters_learn():
    net = adapted()
    lora.load_adapter_vector(net, torch.randn(len(lora.adapter_vector(net))))
    base = {n: p.clone() for n, p in net.named_parameters() if not n.endswith((".A", ".B"))}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    before = lora.adapter_vector(net)
    net(X).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(dict(net.named_parameters())[n], p) for n, p in base.items())
    assert (lora.adapter_vector(net) != before).float().mean() > 0.9


def test_vector_round_trip_and_its_length():
    net = adapted()
    size = 2 * (3 * 9 + 8) + 2 * (8 + 6) + 2 * (96 + 10)
    vector = torch.arange(size, dtype=torch.float32)
    lora.load_adapter_vector(net, vector)
    assert torch.equal(lora.adapter_vector(net), vector)
    with pytest.raises(ValueError, match=f"{size} numbers"):
        lora.load_adapter_vector(net, vector[:-1])


def test_dropout_acts_only_in_training():
    net = adapted(dropout=0.5)
    lora.load_adapter_vector(net, torch.ones(len(lora.adapter_vector(net))))
    assert torch.equal(net(X), net(X))
    net.train()
    assert not torch.equal(net(X), net(X))


def test_targets_by_name():
    net = nn.ModuleDict({"up": nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2)}), "upper": nn.Linear(2, 2)})
    assert lora.inject_lora(net, 1, 1, 0.0, ["up"]) == 2  # whole pieces: "upper" is another name
    assert isinstance(net["up"]["to_q"], lora.LoRALayer) and not isinstance(net["upper"], lora.LoRALayer)
    with pytest.raises(ValueError, match="did you mean 'to_q'"):
        lora.inject_lora(nn.ModuleDict({"to_q": nn.Linear(2, 2)}), 1, 1, 0.0, ["to_qq"])
    with pytest.raises(ValueError, match="rank"):
        lora.inject_lora(network(), 0, 1, 0.0, ["0"])
