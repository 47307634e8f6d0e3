"""The likelihood inside torch.compile: encoder, ELBO and all gradients in one graph, for batches of any size.

The network and the spots are those of own_encoder.py.
"""

import torch
from own_encoder import Encoder, spots

from xtalfast.ops import SoftmaxProfile, gamma_from_log_mean_cv, poisson_gamma_elbo

encoder = Encoder()


def mean_loss(counts: torch.Tensor) -> torch.Tensor:
    """Nats a reflection of a batch [N, P]."""
    heads, logits = encoder(counts)
    q_i = gamma_from_log_mean_cv(heads[:, 0] + 4, heads[:, 1] - 1)
    q_bg = gamma_from_log_mean_cv(heads[:, 2], heads[:, 3] - 2)
    return poisson_gamma_elbo(counts, None, SoftmaxProfile(logits), q_i, q_bg, (1.0, 0.01), (1.0, 1.0)).mean()


def main(steps: int = 60) -> float:
    """Train with the compiled loss, and return how far it ends from the same loss computed without the compiler."""
    compiled = torch.compile(mean_loss, fullgraph=True, dynamic=True)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for step in range(steps):
        counts, _ = spots(256 if step % 2 else 200)  # no second compilation
        loss = compiled(counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts, _ = spots(1000)
    with torch.no_grad():
        difference = abs(float(compiled(counts) - mean_loss(counts)))
    print(f"loss {loss.item():.2f} nats a reflection; compiled and plain differ by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
