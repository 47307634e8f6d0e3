"""The whole integration job as library calls: simulate a small wedge, integrate it, compare with its truth.

python examples/integrate_wedge.py [directory]
"""

import sys
import tempfile
from pathlib import Path

import xtalfast
from xtalfast.integration.simulate import SimulationConfig
from xtalfast.metrics.truth import truth_table


def main(directory: Path) -> None:
    """Everything is written below `directory`."""
    simulated = xtalfast.simulate(directory / "data", SimulationConfig.tiny(seed=1))
    result = xtalfast.integrate(simulated.expt, simulated.refl, directory / "integrated", epochs=2)
    print(result.summary())
    print(truth_table(result.table, simulated.truth))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
