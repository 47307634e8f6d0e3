"""`xtalfast sfcalc`: a structure -> structure factors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption


def sfcalc(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="PDB or mmCIF file with a unit cell.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.mtz", help="FC and PHIC. [MODEL.mtz]")
    ] = None,
    d_min: Annotated[float, typer.Option(metavar="A", help="Resolution limit.")] = 1.5,
    b_iso: Annotated[float | None, typer.Option("--b-iso", metavar="A2", help="One B factor for all atoms.")] = None,
    hydrogens: Annotated[bool, typer.Option(help="Keep hydrogens that are in the file.")] = True,
    map_file: Annotated[Path | None, typer.Option("--map", metavar="FILE.ccp4", help="Write the density too.")] = None,
    bulk_solvent: Annotated[
        str | None,
        typer.Option(
            "--bulk-solvent", metavar="K,B", help="Add a flat solvent of K e/A^3 and B A^2; 0.35,46 is usual. [none]"
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Calculate structure factors of a structure in any space group: FC, PHIC to d_min.

    Example: `xtalfast sfcalc model.pdb -o model.mtz --d-min 2`
    """
    import numpy as np

    from xtalfast.density.calculate import (
        bulk_solvent_structure_factors,
        calculate_structure_factors,
        map_of_structure_factors,
    )
    from xtalfast.density.scale import AmplitudeScale
    from xtalfast.errors import InputError
    from xtalfast.io.ccp4 import write_ccp4
    from xtalfast.io.mtz_phases import write_phases
    from xtalfast.io.structure import read_atoms

    atoms = read_atoms(model, hydrogens=hydrogens)
    if b_iso is not None:
        if b_iso < 0:
            raise InputError(f"--b-iso must be 0 A^2 or more, got {b_iso:g}")
        atoms.b_iso = np.full(len(atoms), b_iso)
    solvent = AmplitudeScale.parse(bulk_solvent, "--bulk-solvent") if bulk_solvent else None
    hkl, f = calculate_structure_factors(atoms, d_min)
    if solvent is not None:
        f = f + bulk_solvent_structure_factors(atoms, hkl, d_min, k=solvent.k, b=solvent.b)
    output = output or Path(model.name.split(".")[0] + ".mtz")
    write_phases(
        output,
        hkl,
        f,
        cell=atoms.cell,
        space_group=atoms.space_group,
        labels=("FC", "PHIC"),
        title="xtalfast calculated structure factors",
    )
    typer.echo(f"wrote {output}: {len(hkl)} structure factors of {len(atoms)} atoms to {d_min:g} A")
    if map_file is not None:
        density = map_of_structure_factors(hkl, f, atoms.cell, space_group=atoms.space_group, d_min=d_min)
        write_ccp4(map_file, density.numpy(), atoms.cell, atoms.space_group)
        typer.echo(f"wrote {map_file}: {' x '.join(map(str, density.shape))} grid points")
