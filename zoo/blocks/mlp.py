"""The feed-forward half of a block."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(act(fc1(x))) over the last axis; `hidden` units in between. Raises ValueError if there are none."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"an MLP for {dim} channels has {hidden} hidden units: expected 1 or more")
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return self.fc2(self.act(self.fc1(x)))
