"""The likelihood under DistributedDataParallel: two processes, each with half of every batch, one network.

The network and the spots are those of own_encoder.py. Gradients are averaged by gloo on the CPU (nccl on GPUs).
"""

import tempfile

import torch
import torch.distributed
from own_encoder import Encoder, spots
from torch.nn.parallel import DistributedDataParallel

from xtalfast.ops import SoftmaxProfile, gamma_from_log_mean_cv, poisson_gamma_elbo


def train(rank: int, n_processes: int, meeting_point: str, steps: int = 50) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=n_processes
    )
    torch.manual_seed(0)  # the same network everywhere; DDP would send that of the first process
    encoder = DistributedDataParallel(Encoder())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    torch.manual_seed(rank + 1)  # but other spots
    for _ in range(steps):
        counts, _ = spots(128)
        heads, logits = encoder(counts)
        q_i = gamma_from_log_mean_cv(heads[:, 0] + 4, heads[:, 1] - 1)
        q_bg = gamma_from_log_mean_cv(heads[:, 2], heads[:, 3] - 2)
        loss = poisson_gamma_elbo(counts, None, SoftmaxProfile(logits), q_i, q_bg, (1.0, 0.01), (1.0, 1.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
    both = [torch.empty_like(weights) for _ in range(n_processes)]
    torch.distributed.all_gather(both, weights)
    assert torch.equal(both[0], both[1]), "the processes ended with different networks"
    if rank == 0:
        print(f"{n_processes} processes, one network: loss {loss.item():.2f} nats a reflection")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Start two processes and wait for them."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(train, args=(2, f"{directory}/meeting"), nprocs=2)


if __name__ == "__main__":
    main()
