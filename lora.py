"""Low-rank adapters (Hu et al. 2022) on Linear and Conv2d layers, and their one flat vector."""

import difflib
import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALayer(nn.Module):
    """A frozen Linear or Conv2d W and its adapter: W' = W + (alpha / rank) B A (Eq. 7).

    A is [rank, in] (for a convolution [rank, in, k, k]: it moves over the picture as W does), B is [out, rank] and
    zero at the start, so that the adapted layer begins as the layer itself. Dropout acts on the adapter's input.
    """

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, dropout
        weight = base.weight
        self.A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A.flatten(1), a=math.sqrt(5))

    def forward(self, x):
        h = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if isinstance(self.base, nn.Conv2d):
            h = F.conv2d(h, self.A, None, self.base.stride, self.base.padding)
            return self.base(x) + self.scaling * F.conv2d(h, self.B[:, :, None, None])
        return self.base(x) + self.scaling * F.linear(F.linear(h, self.A), self.B)

    @torch.no_grad()
    def merged(self):
        """The base layer with the adapter added to its weight (in place)."""
        update = self.scaling * self.B @ self.A.flatten(1)
        self.base.weight += update.view_as(self.base.weight)
        return self.base


def inject_lora(module, rank, alpha, dropout, targets, freeze_a=False):
    """Freeze `module` and put adapters on its Linear and Conv2d layers that a target names; returns how many.

    A target is a dotted piece of a layer's name: `unet`, `unet.up`, `to_q`. With `freeze_a` only B is trained and sent:
    the mean of B_k A is (mean B_k) A, while mean B_k mean A_k is not the mean of B_k A_k (Sun et al. 2024, FFA-LoRA).
    Raises ValueError for a target that names no layer and for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"lora.rank must be at least 1, not {rank}")
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    chosen = {n for target in targets for n in named_by(target, layers)}
    module.requires_grad_(False)
    for name in sorted(chosen):
        parent, _, child = name.rpartition(".")
        layer = LoRALayer(layers[name], rank, alpha, dropout)
        layer.A.requires_grad_(not freeze_a)
        setattr(module.get_submodule(parent), child, layer)
    return len(chosen)


def named_by(target, names):
    """The names that hold `target` as whole dotted pieces."""
    found = [n for n in names if f".{target}." in f".{n}."]
    if not found:
        pieces = {piece for n in names for piece in n.split(".")}
        near = difflib.get_close_matches(target, pieces, 1)
        raise ValueError(f"lora.targets: no layer is called {target!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return found


def adapter_parameters(module):
    """All that is not frozen, by name: A and B of each adapted layer, or, without adapters, what is fine-tuned instead."""
    return [p for _, p in sorted(module.named_parameters()) if p.requires_grad]


def adapter_vector(module):
    """All adapters of `module` as one float32 vector [d] on the CPU, a copy."""
    return join_vector(adapter_parameters(module))


def join_vector(parameters):
    """The parameters as one float32 vector [d] on the CPU, a copy."""
    return torch.cat([p.detach().float().flatten().cpu() for p in parameters])


def split_vector(parameters, vector):
    """A vector [d] as one tensor a parameter, in their shapes and on their device. ValueError where the length differs."""
    sizes = [p.numel() for p in parameters]
    if len(vector) != sum(sizes):
        raise ValueError(f"the adapter has {sum(sizes)} numbers and the vector {len(vector)}: rank or targets differ")
    return [piece.view_as(p).to(p) for p, piece in zip(parameters, torch.as_tensor(vector).split(sizes))]


@torch.no_grad()
def load_adapter_vector(module, vector):
    """Write a vector [d] back into the adapters; returns their parameters. ValueError where the length does not fit."""
    parameters = adapter_parameters(module)
    for parameter, piece in zip(parameters, split_vector(parameters, vector)):
        parameter.copy_(piece)
    return parameters


def merge_lora(module):
    """Fold every adapter into its layer, in place, and return `module` without adapters: same output, less work."""
    for name, layer in [(n, m) for n, m in module.named_modules() if isinstance(m, LoRALayer)]:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.merged())
    return module
