"""How a network's answers curve with the weights of each layer, without a Hessian ever being written out.

The loss is the divergence of the answers from the network's own, so that no labels are needed, the gradient is zero and
the Hessian is positive semi-definite (departure: HAWQ takes the training loss). A product with it is a gradient of a
gradient; the largest eigenvalue comes from products alone by power iteration (HAWQ: Dong et al., 2019,
arXiv:1905.03696), and so does the trace, E[vᵀHv] over random signs v (Hutchinson; HAWQ-V2: arXiv:1911.03852)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.vision.network import logits

#: power iteration ends when the eigenvalue moves by less than this share of it, or after so many products
SETTLED, MOST_PRODUCTS = 1e-3, 100
#: vectors of random signs that a trace is averaged over
PROBES = 64


class Curvature:
    """The Hessian of E[KL(answers ‖ answers now)] with respect to some weights, at the weights they have.

    Args:
        module: in evaluation mode.
        names: of its layers; each has a ``weight``.
        x: (N, C, H, W) images that the mean is over.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], x: Tensor) -> None:
        own = [module.get_submodule(name).get_parameter("weight") for name in names]
        self.weights = [w.detach().clone().requires_grad_() for w in own]
        given = dict(zip((f"{name}.weight" for name in names), self.weights, strict=True))
        with torch.enable_grad():
            said = logits(cast(nn.Module, partial(functional_call, module, given)), x).log_softmax(1)
            loss = -(said.detach().exp() * said).sum() / len(x)
            self._gradients = torch.autograd.grad(
                loss, self.weights, create_graph=True, allow_unused=True, materialize_grads=True
            )

    def product(self, layer: int, v: Tensor) -> Tensor:
        """H v of one layer's own weights, of their shape."""
        return self._products([self._gradients[layer]], [self.weights[layer]], [v])[0]

    def _products(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        alive = [(g, u) for g, u in zip(gradients, v, strict=True) if g.requires_grad]
        if not alive:  # nothing depends on these weights
            return [torch.zeros_like(w) for w in weights]
        outputs, vectors = zip(*alive, strict=True)
        return list(
            torch.autograd.grad(outputs, weights, vectors, retain_graph=True, allow_unused=True, materialize_grads=True)
        )

    def top_eigenvalues(self, seed: int) -> list[float]:
        """The largest eigenvalue of each layer's own block of the Hessian."""
        return [self._top_eigenvalue(layer, seed) for layer in range(len(self.weights))]

    def _top_eigenvalue(self, layer: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.weights[layer].shape, generator=generator)
        v, value = v / v.norm(), 0.0
        for _ in range(MOST_PRODUCTS):
            Hv = self.product(layer, v)
            before, value = value, float((v * Hv).sum())
            norm = Hv.norm()
            if float(norm) == 0 or abs(value - before) <= SETTLED * abs(value):
                break
            v = Hv / norm
        return value

    def traces(self, seed: int, probes: int = PROBES) -> list[float]:
        """The trace of each layer's block, from products with all layers at once: what the blocks between layers add
        has no mean."""
        generator, totals = torch.Generator().manual_seed(seed), [0.0] * len(self.weights)
        for _ in range(probes):
            v = [torch.randint(0, 2, w.shape, generator=generator).float() * 2 - 1 for w in self.weights]
            Hv = self._products(self._gradients, self.weights, v)
            totals = [t + float((a * b).sum()) for t, a, b in zip(totals, v, Hv, strict=True)]
        return [total / probes for total in totals]
