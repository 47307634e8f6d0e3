"""Your own network with our likelihood: twenty lines of plain PyTorch, no file format, no trainer.

Spots of known intensity are drawn, a small network learns q(I), q(Bg) and the spot shape from the pixels alone.
"""

import torch
from torch import nn

from xtalfast.ops import SoftmaxProfile, gamma_from_log_mean_cv, poisson_gamma_elbo

torch.manual_seed(0)
BOX = (3, 9, 9)
P = BOX[0] * BOX[1] * BOX[2]


class Encoder(nn.Module):
    """Counts [N, P] -> log mean and log cv of q(I) and q(Bg), and profile logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(P, 128), nn.ReLU(), nn.Linear(128, 4))
        self.logits = nn.Parameter(torch.zeros(P))

    def forward(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads [N, 4] and logits [N, P]."""
        return self.body(2 * torch.sqrt(counts + 0.375)), self.logits.expand(len(counts), -1)


def spots(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [n, P] of Gaussian spots on a flat background of 1, and their true intensities [n]."""
    z, y, x = torch.meshgrid(*(torch.arange(s) - s // 2 for s in BOX), indexing="ij")
    profile = torch.exp(-(z**2) / 0.5 - (y**2 + x**2) / 3.0).flatten()
    intensity = torch.distributions.Exponential(0.01).sample((n,))
    return torch.poisson(intensity[:, None] * profile / profile.sum() + 1.0), intensity


def main(steps: int = 300) -> float:
    """Train, and return the correlation of E_q[I] with the true intensities of spots never seen."""
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for _ in range(steps):
        counts, _ = spots(256)
        heads, logits = encoder(counts)
        q_i = gamma_from_log_mean_cv(heads[:, 0] + 4, heads[:, 1] - 1)
        q_bg = gamma_from_log_mean_cv(heads[:, 2], heads[:, 3] - 2)
        mask = torch.ones_like(counts, dtype=torch.bool)
        loss = poisson_gamma_elbo(counts, mask, SoftmaxProfile(logits), q_i, q_bg, (1.0, 0.01), (1.0, 1.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts, intensity = spots(1000)
    heads, _ = encoder(counts)
    shape, rate = gamma_from_log_mean_cv(heads[:, 0] + 4, heads[:, 1] - 1)
    correlation = float(torch.corrcoef(torch.stack([shape / rate, intensity]).detach())[0, 1])
    print(f"loss {loss.item():.2f} nats a reflection, correlation of E_q[I] with the truth {correlation:.3f}")
    return correlation


if __name__ == "__main__":
    main()
