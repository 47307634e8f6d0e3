"""Your own map-to-map network of our modules, in plain PyTorch: a map with wrong phases in, a better one out.

Gaussian atoms are put into a small periodic cell at random and the phases of its structure factors are spoilt; the
network learns what a density looks like.
"""

import torch
from torch import nn

from xtalfast.nn import CircularPatchEmbed3d, NystromAttention, PeriodicConv3d

torch.manual_seed(0)
GRID = (8, 8, 12)
PATCH = 4


class MapNetwork(nn.Module):
    """[B, 1, X, Y, Z] -> [B, 1, X, Y, Z]; a map moved by one patch gives a density moved by one patch."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = CircularPatchEmbed3d(1, dim, kernel=5)
        self.attention = NystromAttention(dim, heads=4, dim_head=16, landmarks=8, residual_taps=0)
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, 4 * PATCH**3))
        self.decode = PeriodicConv3d(5, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Density of the maps."""
        tokens = self.embed(x)
        patches = self.mix(tokens + self.attention(tokens))
        n = [size // PATCH for size in x.shape[2:]]
        voxels = patches.unflatten(2, (4, PATCH, PATCH, PATCH)).unflatten(1, n).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return self.decode(torch.cat([x, voxels.reshape(len(x), 4, *x.shape[2:])], 1))


def examples(n: int, atoms: int = 6, error_deg: float = 50.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps with phase errors of this sd, and densities, [n, 1, X, Y, Z] each; the density's sd is about 1."""
    axes = torch.meshgrid(*(torch.fft.fftfreq(size) for size in GRID), indexing="ij")
    blur = torch.exp(-8 * sum(f**2 for f in axes))
    points = torch.zeros(n, *GRID).flatten(1)
    points.scatter_(1, torch.randint(points.shape[1], (n, atoms)), 40.0)
    factors = torch.fft.fftn(points.unflatten(1, GRID), dim=(1, 2, 3)) * blur
    noise = torch.fft.fftn(torch.randn(n, *GRID), dim=(1, 2, 3)).angle()  # of a real map, so that maps stay real
    spoilt = factors * torch.exp(1j * torch.deg2rad(torch.tensor(error_deg)) * noise / noise.std())
    return tuple(torch.fft.ifftn(f, dim=(1, 2, 3)).real[:, None] for f in (spoilt, factors))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, over all voxels."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def main(steps: int = 150) -> tuple[float, float]:
    """Train; return the correlation with the truth before and after, of maps never seen."""
    network = MapNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        maps, density = examples(16)
        loss = (network(maps) - density).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    maps, density = examples(64)
    with torch.no_grad():
        before, after = correlation(maps, density), correlation(network(maps), density)
    print(f"correlation with the true density: {before:.3f} before, {after:.3f} after the network")
    return before, after


if __name__ == "__main__":
    main()
