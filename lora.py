"""Low-rank adapters (Hu et al. 2022) on Linear and Conv2d layers; their values as a flat vector.

    train = "R":   W' = W + (alpha / rank) B R A    A, B frozen, R [rank, rank] trained
    train = "B":   W' = W + (alpha / rank) B A      A frozen, B trained
    train = "AB":  W' = W + (alpha / rank) B A      both trained (Eq. 7, the paper's)

Training R alone has the form of LoRA-XS (Balazy et al. 2024), here with A and B computed from
gradients, as in LoRA-SB (Ponkshe et al. 2024); its federated form is Fed-SB (Singhal et al. 2025).
Training B alone is FFA-LoRA (Sun et al. 2024).

With A frozen the mean of the clients' adapted layers is exactly the layer of the mean adapter; with
A and B trained it is not, as mean(B_k) mean(A_k) differs from mean(B_k A_k). R has rank^2 numbers
per layer, whatever the layer's width. This keeps the noise for differential privacy small, whose
norm grows with the square root of the count of numbers sent.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TRAIN_CHOICES = ("R", "B", "AB")


class LoRALayer(nn.Module):
    """A frozen Linear or Conv2d layer W and its adapter (Eq. 7), which starts at zero.

    A is [rank, in] ([rank, in, k, k] for a convolution, with the stride and padding of W), R is
    [rank, rank] and B is [out, rank]. Dropout acts on the adapter's input.
    """

    def __init__(self, base, A, B, alpha, dropout, train):
        super().__init__()
        rank = len(A)
        self.base = base
        self.scaling = alpha / rank
        self.dropout = dropout
        self.A = nn.Parameter(A, requires_grad=train == "AB")
        self.R = nn.Parameter(A.new_zeros(rank, rank)) if train == "R" else None
        # The product starts at zero; with two zero factors it would never get a gradient. The zero
        # factor is R if there is one, else B.
        self.B = nn.Parameter(
            B if train == "R" else torch.zeros_like(B), requires_grad=train != "R"
        )

    @property
    def weight(self):
        """Return W' of Eq. 7 in the shape of W, for modules that read the weight of a layer without
        calling it, such as nn.MultiheadAttention.
        """
        update = self.scaling * self.output_factor() @ self.A.flatten(1)  # out (in k k)
        return self.base.weight + update.view_as(self.base.weight)

    @property
    def bias(self):
        return self.base.bias

    def output_factor(self):
        """Return B R, or B if there is no R, [out, rank]."""
        return self.B if self.R is None else self.B @ self.R

    def forward(self, x):
        h = F.dropout(x, self.dropout, self.training)
        if isinstance(self.base, nn.Conv2d):
            h = F.conv2d(h, self.A, None, self.base.stride, self.base.padding)  # n rank h w
            h = F.conv2d(h, self.output_factor()[:, :, None, None])  # n out h w
        else:
            h = F.linear(F.linear(h, self.A), self.output_factor())  # ... in -> ... rank -> ... out
        return self.base(x) + self.scaling * h


def adaptable_layers(module):
    """Return {name: layer} of all Linear and Conv2d layers of `module`, sorted by name."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return dict(sorted(layers.items()))


def inject_lora(module, rank, alpha, dropout=0.0, train="R", directions=None, seed=0, layers=""):
    """Freeze `module`, put an adapter on each of its Linear and Conv2d layers whose name contains
    `layers`, and return the number of adapters.

    `directions` {layer name: (A [r, in...], B [out, r])} with r >= rank (`leading_directions`)
    gives A and, for "R", B. Without it, and for "AB", they are random, drawn on the CPU so that
    every device starts from the same numbers. Raises ValueError for a rank, alpha or dropout out of
    range, an unknown `train`, `layers` that no name contains, a layer without directions, a
    convolution with groups, dilation or padding other than zeros, or a module that has adapters
    already.
    """
    if train not in TRAIN_CHOICES:
        raise ValueError(f"lora.train must be one of {', '.join(TRAIN_CHOICES)}, not {train!r}")
    if rank < 1:
        raise ValueError(f"lora.rank must be at least 1, not {rank}")
    if not alpha > 0:
        raise ValueError(f"lora.alpha must be above 0, not {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora.dropout must be at least 0 and below 1, not {dropout}")
    use_directions = directions is not None and train != "AB"  # the paper's A starts random
    kept = min((len(A) for A, _ in directions.values()), default=rank) if use_directions else rank
    if kept < rank:
        raise ValueError(f"lora.rank must be at most {kept}, the directions kept, not {rank}")
    generator = torch.Generator().manual_seed(seed)
    adapted = {n: layer for n, layer in adaptable_layers(module).items() if layers in n}
    if not adapted:
        words = {word for name in adaptable_layers(module) for word in name.split(".")}
        known = ", ".join(sorted(word for word in words if not word.isdigit()))
        raise ValueError(f"lora.layers: no layer has {layers!r} in its name; in names are {known}")
    if any(isinstance(layer, LoRALayer) for layer in module.modules()):
        raise ValueError("the module has adapters already: merge_lora folds them in")
    for name, layer in adapted.items():
        if use_directions and name not in directions:
            raise ValueError(f"{name}: there are no directions for it")
        if isinstance(layer, nn.Conv2d):  # the adapter copies its stride and padding only
            if (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), "zeros"):
                raise ValueError(f"{name}: has groups, dilation or a padding that is not of zeros")
    module.requires_grad_(False)
    for name, layer in adapted.items():
        if use_directions:
            A, B = (factor.to(layer.weight) for factor in directions[name])
            A, B = A[:rank].clone(), B[:, :rank].clone()
        else:
            A, B = random_directions(layer, rank, generator)
        adapter = LoRALayer(layer, A, B, alpha, dropout, train)
        module.set_submodule(name, adapter.train(module.training))
    return len(adapted)


def random_directions(layer, rank, generator):
    """Return random A [rank, in...] (Kaiming uniform, as in the code of Hu et al. 2022) and B [out,
    rank] for a layer.
    """
    weight = layer.weight
    A = torch.empty(rank, *weight.shape[1:])
    nn.init.kaiming_uniform_(A.flatten(1), a=math.sqrt(5), generator=generator)
    B = torch.randn(weight.shape[0], rank, generator=generator) * weight.shape[0] ** -0.5
    return A.to(weight), B.to(weight)


# ---------------------------------------------------------------- directions from public gradients


@torch.no_grad()
def add_gradient_moments(module, moments):
    """Add G G^T / |G|^2 and G^T G / |G|^2 of each layer's gradient G [out, in k k] to `moments`
    {name: [left, right]}.

    Call it once per public person. Gradients are divided by their norms, so all people count alike.
    """
    for name, layer in adaptable_layers(module).items():
        gradient = layer.weight.grad.flatten(1)  # out (in k k)
        gradient = gradient / gradient.norm().clamp(min=1e-12)
        left, right = moments.get(name, (0.0, 0.0))  # out out; (in k k) (in k k)
        moments[name] = [left + gradient @ gradient.T, right + gradient.T @ gradient]


@torch.no_grad()
def leading_directions(module, moments, rank):
    """Return {layer name: (A [rank, in...], B [out, rank])}: the directions that people's gradients
    share.

    A's rows and B's columns are the leading eigenvectors of the summed moments: the singular
    directions in which a person's gradient is largest. B is scaled to the root mean square singular
    value of W, so that R with entries of order one changes W by about one typical singular value.
    Layers narrower than `rank` get zero rows and columns.
    """
    directions = {}
    for name, layer in adaptable_layers(module).items():
        left, right = moments[name]
        B = torch.linalg.eigh(left)[1].flip(1)[:, :rank]  # out rank, largest eigenvalue first
        A = torch.linalg.eigh(right)[1].flip(1)[:, :rank].T  # rank (in k k)
        weight = layer.weight
        scale = weight.norm() / min(weight.flatten(1).shape) ** 0.5
        A = F.pad(A, (0, 0, 0, rank - len(A)))
        B = F.pad(B * scale, (0, rank - B.shape[1]))
        directions[name] = A.reshape(rank, *weight.shape[1:]).cpu(), B.cpu()
    return directions


# ---------------------------------------------------------------- adapter <-> vector


def adapter_parameters(module):
    """Return the trained parameters in the order of their names: R, B, or A and B of each adapted
    layer.
    """
    return [p for _, p in sorted(module.named_parameters()) if p.requires_grad]


def adapter_vector(module):
    """Return a copy of the trained numbers of `module` as one float32 vector [d] on the CPU."""
    return torch.cat([p.detach().float().flatten().cpu() for p in adapter_parameters(module)])


def split_vector(parameters, vector):
    """Return the vector [d] as one tensor per parameter, in its shape and on its device.

    Raises ValueError where the length differs.
    """
    sizes = [p.numel() for p in parameters]
    if len(vector) != sum(sizes):
        raise ValueError(
            f"the adapter has {sum(sizes)} numbers and the vector {len(vector)}: "
            "rank or trained factors differ"
        )
    pieces = torch.as_tensor(vector).split(sizes)
    return [piece.view_as(p).to(p) for p, piece in zip(parameters, pieces)]


@torch.no_grad()
def load_adapter_vector(module, vector):
    """Write the vector [d] into the adapters of `module` and return their parameters."""
    parameters = adapter_parameters(module)
    for parameter, piece in zip(parameters, split_vector(parameters, vector)):
        parameter.copy_(piece)
    return parameters


def merge_lora(module):
    """Fold every adapter into its layer and return `module` without adapters. The output stays the
    same up to rounding.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoRALayer):
            # a new parameter: another layer may share the old one
            layer.base.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
            module.set_submodule(name, layer.base)
    return module
