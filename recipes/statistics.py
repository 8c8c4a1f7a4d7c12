"""Running statistics of batch norms when a batch is split into micro-batches."""

from __future__ import annotations

import torch
from torch import nn

from recipes import distributed
from recipes.plan import Plan


class Statistics:
    """Updates the running statistics once per step, to the mean of the updates of all micro-batches.

    Momentum is then per step, and the result does not depend on which process does which micro-batch, or in which
    order. With a single one the norms update themselves.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        kind = nn.modules.batchnorm._NormBase  # of batch norms, synchronised or not, timm's as well
        # norms that are not in training mode are frozen
        norms = [m for m in model.modules() if isinstance(m, kind) and m.training and m.running_mean is not None]
        self.turns = plan.accumulate
        norms = norms if plan.micro_batches > 1 else []
        self.tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        counts = [norm.num_batches_tracked for norm in norms]
        self.counts = [count for count in counts if count is not None]
        self.before = [tensor.clone() for tensor in self.tensors]
        self.sums = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        if self.tensors:
            torch._foreach_copy_(self.before, self.tensors)
            torch._foreach_zero_(self.sums)

    @torch.no_grad()
    def collect(self) -> None:
        """After each micro-batch: add its statistics to the sums, and restore those from before the step."""
        if self.tensors:
            torch._foreach_add_(self.sums, self.tensors)
            torch._foreach_copy_(self.tensors, self.before)
        if self.counts:
            torch._foreach_sub_(self.counts, 1)

    @torch.no_grad()
    def settle(self) -> None:
        """After the last micro-batch, on all processes."""
        if self.tensors:
            means = distributed.mean(torch.cat(self.sums) / self.turns)
            torch._foreach_copy_(self.tensors, means.split([tensor.numel() for tensor in self.tensors]))
        if self.counts:
            torch._foreach_add_(self.counts, 1)
