"""Adapters against Eq. 7 in numpy, what is frozen, public directions, merging, the vector."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NAMES = ("0", "2", "4", "6")  # of the layers with adapters
TARGETS = [torch.float64, torch.bfloat16] + ["cuda"] * torch.cuda.is_available()
SHAPES = {"0": (8, 27), "2": (6, 8), "4": (10, 96), "6": (4, 10)}  # out, (in k k)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(96, 10, bias=False),
        nn.SiLU(),
        nn.Linear(10, 4),
    )


def adapted(train="R", **kwargs):
    net = network()
    assert lora.inject_lora(net, rank=2, alpha=6, train=train, **kwargs) == 4
    return net


def randomize(net, seed=0):
    """Load a random vector into the adapters and return it."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(lora.adapter_vector(net)), generator=generator)
    lora.load_adapter_vector(net, vector)
    return vector


def weights(net):
    """Return the merged weight of every adapted layer as one vector in float64."""
    merged = lora.merge_lora(net)
    return torch.cat([merged.get_submodule(name).weight.flatten() for name in NAMES]).double()


# ---------------------------------------------------------------- the adapter


@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_an_adapter_starts_as_zero(train):
    assert torch.equal(adapted(train)(X), network()(X))


def eq_7(layer):
    """Return W + (alpha / rank) B R A, with the identity as R where there is none."""
    W = layer.base.weight.numpy()
    R = np.eye(2) if layer.R is None else layer.R.numpy()
    update = np.einsum("or,rs,s...->o...", layer.B.numpy(), R, layer.A.numpy())
    return torch.from_numpy(W + 6 / 2 * update).float()


@torch.no_grad()
@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_an_adapted_linear_layer_is_eq_7(train):
    net = adapted(train)
    randomize(net)
    x = torch.randn(4, 3, 10)
    expected = x @ eq_7(net[6]).T + net[6].base.bias
    assert torch.allclose(net[6](x), expected, atol=1e-4)
    assert not torch.allclose(net[6].base(x), expected, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_an_adapted_convolution_is_eq_7(train):
    net = adapted(train)
    randomize(net)
    expected = F.conv2d(X, eq_7(net[0]), net[0].base.bias, stride=2, padding=1)
    assert torch.allclose(net[0](X), expected, atol=1e-4)
    assert not torch.allclose(net[0].base(X), expected, atol=0.1)


@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_nothing_else_is_trained(train):
    net = adapted(train)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in NAMES for factor in train}


def test_only_the_layers_asked_for_are_adapted():
    net = network()
    assert lora.inject_lora(net, 2, 6.0, layers="4") == 1
    assert [n for n, m in net.named_modules() if isinstance(m, lora.LoRALayer)] == ["4"]
    assert len(lora.adapter_vector(net)) == 4
    randomize(net)
    output = net(X)
    assert torch.allclose(lora.merge_lora(net)(X), output, atol=1e-5)
    assert not torch.allclose(network()(X), output, atol=1e-3)


@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_a_step_changes_the_trained_factors_of_every_layer_and_nothing_else(train):
    net = adapted(train)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(X).square().sum().backward()  # from the start: no factor of a zero product may be stuck
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    first = train.replace("A", "")  # A has no gradient as long as B is zero
    assert moved == {f"{name}.{first}" for name in NAMES}


@torch.no_grad()
@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_the_layer_of_the_mean_adapter_is_the_mean_of_the_layers_unless_a_and_b_are_trained(train):
    layers = []
    vectors = []
    for seed in range(3):
        net = adapted(train)
        vectors.append(randomize(net, seed))
        layers.append(weights(net))
    net = adapted(train)
    lora.load_adapter_vector(net, torch.stack(vectors).mean(0))
    error = (weights(net) - torch.stack(layers).mean(0)).abs().max()
    if train == "AB":
        assert float(error) > 0.1
    else:
        assert float(error) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_merged_equals_unmerged(train):
    net = adapted(train)
    randomize(net)
    expected = net(X)
    merged = lora.merge_lora(net)
    assert not any(isinstance(layer, lora.LoRALayer) for layer in merged.modules())
    assert torch.allclose(merged(X), expected, atol=1e-3)
    assert not torch.allclose(merged(X), network()(X), atol=1e-1)


@torch.no_grad()
def test_a_weight_that_two_layers_share_is_merged_into_the_adapted_one_alone():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    net[1].weight = net[0].weight
    embedded = net[0](torch.arange(9))
    lora.inject_lora(net, rank=2, alpha=6, train="B")
    randomize(net)
    expected = net(torch.arange(9))
    assert torch.allclose(lora.merge_lora(net)(torch.arange(9)), expected, atol=1e-5)
    assert torch.equal(net[0](torch.arange(9)), embedded)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_attention_that_reads_its_layers_weights_is_adapted_too(training):
    """nn.MultiheadAttention never calls its out_proj, and in evaluation nn.TransformerEncoderLayer
    none of its layers.
    """
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    plain = net(x)
    assert lora.inject_lora(net, rank=2, alpha=6, train="AB") == 3
    assert torch.allclose(net(x), plain, atol=1e-5)
    randomize(net)
    expected = net(x)
    assert not torch.allclose(expected, plain, atol=1e-1)
    assert torch.allclose(lora.merge_lora(net)(x), expected, atol=1e-5)


def test_dropout_acts_on_the_adapter_in_training_only():
    net = network().eval()
    lora.inject_lora(net, rank=2, alpha=6, dropout=0.5)
    net[0].train()
    assert torch.equal(net(X), network()(X))  # a zero adapter: the layer itself has no dropout
    net[0].eval()
    randomize(net)
    assert torch.equal(net(X), net(X))  # in a network in evaluation mode adapters are, too
    net.train()
    assert not torch.equal(net(X), net(X))
    assert adapted()[0].training


def test_the_mean_under_dropout_is_the_layer_without():
    net = adapted(dropout=0.25)
    randomize(net)
    x = torch.randn(1, 10).expand(20_000, 10)
    torch.manual_seed(0)
    mean = net[6](x).mean(0)
    assert torch.allclose(mean, net[6].eval()(x[0]), atol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "lora.rank must be at least 1, not 0"),
        ({"layers": "speach"}, "no layer has 'speach' in its name"),
        ({"alpha": 0}, "lora.alpha must be above 0, not 0"),
        ({"alpha": float("nan")}, "lora.alpha must be above 0, not nan"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "lora.dropout must be at least 0"),
        ({"train": "A"}, "lora.train must be one of R, B, AB, not 'A'"),
        ({"directions": {"0": (X, X)}}, "2: there are no directions for it"),
    ],
)
def test_values_out_of_range_raise_and_leave_the_network_alone(change, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(net, **{"rank": 2, "alpha": 6} | change)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(isinstance(layer, lora.LoRALayer) for layer in net.modules())


def test_a_wrong_word_for_layers_is_answered_with_those_in_their_names():
    net = torch.nn.ModuleDict({"attention": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    with pytest.raises(
        ValueError, match="no layer has 'attn' in its name; in names are attention$"
    ):
        lora.inject_lora(net, rank=1, alpha=1.0, train="R", layers="attn")


def test_a_network_that_has_adapters_gets_others_once_they_are_merged():
    net = adapted()
    vector = randomize(net)
    with pytest.raises(ValueError, match="has adapters already"):
        lora.inject_lora(net, rank=2, alpha=6)
    assert torch.equal(lora.adapter_vector(net), vector)
    assert lora.inject_lora(lora.merge_lora(net), rank=2, alpha=6) == 4


# ---------------------------------------------------------------- the frozen factors


def factors(net):
    """Return A and B of every layer as one list."""
    layers = [net.get_submodule(name) for name in NAMES]
    return [layer.A for layer in layers] + [layer.B for layer in layers]


@pytest.mark.parametrize(
    "settings",
    [{"groups": 3}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}],
    ids=lambda settings: list(settings)[-1],
)
def test_a_convolution_that_an_adapter_would_not_follow_is_refused(settings):
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 6, 3, **settings))
    with pytest.raises(ValueError, match="1: has groups, dilation or a padding"):
        lora.inject_lora(net, rank=2, alpha=6)
    assert type(net[0]) is nn.Linear and net[0].weight.requires_grad


def test_the_same_seed_draws_the_same_factors_and_another_seed_others():
    first = factors(adapted(seed=5))
    net = network()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    lora.inject_lora(net, rank=2, alpha=6, seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used
    assert all(torch.equal(a, b) for a, b in zip(first, factors(net)))
    other = factors(adapted(seed=6))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("target", TARGETS)
def test_the_factors_are_drawn_on_the_cpu_in_float32_and_moved_to_the_layer(target):
    net = network().to(target)
    lora.inject_lora(net, rank=2, alpha=6)
    for found, drawn in zip(factors(net), factors(adapted())):
        assert found.dtype == net[0].base.weight.dtype
        assert found.device == net[0].base.weight.device
        assert torch.equal(found, drawn.to(target))


def test_random_factors_have_the_scales_of_their_papers():
    layer = nn.Linear(300, 200)
    A, B = lora.random_directions(layer, 50, torch.Generator().manual_seed(0))
    assert A.shape == (50, 300) and B.shape == (200, 50)
    # Kaiming uniform with a = sqrt(5) is uniform in +-1 / sqrt(in), as LoRA's own code has it.
    assert float(A.abs().max()) == pytest.approx(300**-0.5, rel=0.01)
    assert float(A.std()) == pytest.approx((3 * 300) ** -0.5, rel=0.05)
    assert torch.allclose(B.norm(dim=0), torch.ones(50), rtol=0.2)  # columns of length 1


# ---------------------------------------------------------------- directions from public gradients


def set_gradients(net, generator, planted=None):
    """Give each layer a gradient: noise, or along planted {name: (U [out 2], V [in 2])}."""
    for name in NAMES:
        weight = net.get_submodule(name).weight
        gradient = torch.randn(weight.flatten(1).shape, generator=generator)
        if planted is not None:
            U, V = planted[name]
            strength = torch.tensor([3.0, 1.5])  # the first direction is the stronger one
            signs = torch.randn(2, generator=generator).sign()
            gradient = 0.01 * gradient + U @ (strength * signs).diag() @ V.T
        weight.grad = gradient.view_as(weight)


def planted_directions(generator):
    planted = {}
    for name, (num_outputs, num_inputs) in SHAPES.items():
        U, _ = torch.linalg.qr(torch.randn(num_outputs, 2, generator=generator))
        V, _ = torch.linalg.qr(torch.randn(num_inputs, 2, generator=generator))
        planted[name] = U, V
    return planted


def test_moments_are_the_sums_of_normalised_products():
    net = network()
    generator = torch.Generator().manual_seed(0)
    moments = {}
    expected = 0.0
    for _ in range(3):
        set_gradients(net, generator)
        lora.add_gradient_moments(net, moments)
        G = net[0].weight.grad.numpy().reshape(8, 27)
        expected = expected + G @ G.T / (G**2).sum()
    left, right = moments["0"]
    assert set(moments) == set(NAMES)
    assert np.allclose(left, expected, atol=1e-6)
    assert left.shape == (8, 8) and right.shape == (27, 27)
    assert float(right.trace()) == pytest.approx(3)


def test_people_count_the_same_however_large_their_gradient_is():
    net = network()
    generator = torch.Generator().manual_seed(0)
    plain = {}
    scaled = {}
    for factor in (1.0, 1000.0, 1e-3):
        set_gradients(net, generator)
        lora.add_gradient_moments(net, plain)
        for name in NAMES:
            net.get_submodule(name).weight.grad *= factor
        lora.add_gradient_moments(net, scaled)
    for name in NAMES:
        for one, other in zip(plain[name], scaled[name]):
            assert torch.allclose(one, other, atol=1e-5)


def test_the_leading_directions_are_those_that_were_planted():
    net = network()
    generator = torch.Generator().manual_seed(0)
    planted = planted_directions(generator)
    moments = {}
    for _ in range(6):
        set_gradients(net, generator, planted)
        lora.add_gradient_moments(net, moments)
    directions = lora.leading_directions(net, moments, rank=2)
    for name, (A, B) in directions.items():
        U, V = planted[name]
        assert A.shape == (2, *net.get_submodule(name).weight.shape[1:])
        rows = A.flatten(1)
        columns = B / B.norm(dim=0)
        # Cosines with the planted directions, the stronger one first.
        assert torch.allclose((rows @ V).abs(), torch.eye(2), atol=0.05)
        assert torch.allclose((columns.T @ U).abs(), torch.eye(2), atol=0.05)
        assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)


def test_b_is_scaled_to_the_root_mean_square_singular_value_of_the_weight():
    net = network()
    moments = {}
    set_gradients(net, torch.Generator().manual_seed(0))
    lora.add_gradient_moments(net, moments)
    for name, (_, B) in lora.leading_directions(net, moments, rank=3).items():
        weight = net.get_submodule(name).weight.detach().numpy().reshape(SHAPES[name])
        singular_values = np.linalg.svd(weight, compute_uv=False)
        expected = float(np.sqrt((singular_values**2).mean()))
        assert torch.allclose(B.norm(dim=0), torch.tensor(expected), rtol=1e-4)


def test_layers_narrower_than_the_rank_get_zero_directions():
    net = network()
    moments = {}
    set_gradients(net, torch.Generator().manual_seed(0))
    lora.add_gradient_moments(net, moments)
    A, B = lora.leading_directions(net, moments, rank=12)["6"]  # 10 inputs, 4 outputs
    assert A.shape == (12, 10) and B.shape == (4, 12)
    assert A[:10].norm(dim=1).min() > 0.9 and not A[10:].any()
    assert B[:, :4].norm(dim=0).min() > 0.1 and not B[:, 4:].any()


@pytest.mark.parametrize("train", lora.TRAIN_CHOICES)
def test_directions_become_the_frozen_factors(train):
    net = network()
    moments = {}
    set_gradients(net, torch.Generator().manual_seed(0))
    lora.add_gradient_moments(net, moments)
    directions = lora.leading_directions(net, moments, rank=4)
    net = adapted(train, directions=directions)  # rank 2: the first two of four
    randomly = adapted(train)
    for name in NAMES:
        layer = net.get_submodule(name)
        A, B = directions[name]
        if train == "AB":  # nothing is frozen: random, as in the paper
            A = randomly.get_submodule(name).A
        assert torch.equal(layer.A, A[:2])
        if train == "R":
            assert torch.equal(layer.B, B[:, :2])
    assert torch.equal(net(X), network()(X))
    net[0].A.data.zero_()
    assert directions["0"][0][:2].any()  # the adapter has copies
    with pytest.raises(ValueError, match="lora.rank must be at most 4, .* not 5"):
        lora.inject_lora(network(), rank=5, alpha=6, train="R", directions=directions)


# ---------------------------------------------------------------- adapter <-> vector


@pytest.mark.parametrize(
    "train, length",
    [("R", 4 * 4), ("B", 2 * (8 + 6 + 10 + 4)), ("AB", 2 * (8 + 6 + 10 + 4 + 27 + 8 + 96 + 10))],
)
def test_a_vector_comes_back_as_it_was_loaded(train, length):
    net = adapted(train)
    vector = torch.arange(length, dtype=torch.float32)
    parameters = lora.load_adapter_vector(net, vector)
    assert [id(p) for p in parameters] == [id(p) for p in lora.adapter_parameters(net)]
    found = lora.adapter_vector(net)
    assert found.dtype == torch.float32 and torch.equal(found, vector)
    in_order = [getattr(net.get_submodule(n), factor) for n in NAMES for factor in train]
    assert torch.equal(torch.cat([p.detach().flatten() for p in in_order]), vector)
    found.zero_()  # copies in both directions
    loaded = vector.clone()
    lora.load_adapter_vector(net, loaded)
    loaded.zero_()
    assert torch.equal(lora.adapter_vector(net), vector)
    with pytest.raises(ValueError, match=f"{length} numbers and the vector {length - 1}"):
        lora.load_adapter_vector(net, vector[:-1])
    twin = adapted(train)
    lora.load_adapter_vector(twin, vector.double().numpy())  # as the mechanism returns it
    assert torch.equal(twin(X), net(X))


def test_a_person_without_a_gradient_adds_nothing():
    net = network()
    moments = {}
    set_gradients(net, torch.Generator().manual_seed(0))
    lora.add_gradient_moments(net, moments)
    before = [moment.clone() for moment in moments["0"]]
    for name in NAMES:
        net.get_submodule(name).weight.grad.zero_()
    lora.add_gradient_moments(net, moments)
    assert all(torch.equal(*pair) for pair in zip(before, moments["0"]))
