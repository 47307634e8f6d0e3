"""`xtalfast patterson`: amplitudes -> Patterson map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption


def patterson(
    data: Annotated[Path, typer.Argument(metavar="DATA.mtz", help="Merged amplitudes.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MAP.ccp4", help="The map of the whole cell.")],
    labels: Annotated[
        str | None, typer.Option(metavar="F,SIGF", help="Columns, when not found by their types.")
    ] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Resolution limit. [that of the data]")] = None,
    rate: Annotated[float, typer.Option(metavar="N", help="Grid points per d_min, at least.")] = 3.0,
    paper_grids: Annotated[bool, typer.Option("--paper-grids", help="Grid sizes as in the density paper.")] = False,
    remove_origin: Annotated[bool, typer.Option("--remove-origin", help="Take the origin peak away.")] = False,
    sharpen: Annotated[bool, typer.Option("--sharpen", help="From normalised amplitudes E.")] = False,
    sequence: Annotated[
        str | None,
        typer.Option(
            metavar="LETTERS", help="Residues in the asymmetric unit: puts amplitudes on the absolute scale, B = 20."
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="K,B", help="Scale and B of the amplitudes, instead of a Wilson fit.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page with the map to turn, its sections and peaks.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Calculate the Patterson map of measured amplitudes, in any space group; reflections not measured count as 0.

    Example: `xtalfast patterson data.mtz -o patterson.ccp4 --remove-origin --report patterson.html`
    """
    import numpy as np

    from xtalfast.density.calculate import patterson_of_amplitudes
    from xtalfast.density.conformers import element_of, ids_from_sequence
    from xtalfast.density.scale import AmplitudeScale, fit_wilson
    from xtalfast.io.ccp4 import write_ccp4
    from xtalfast.io.mtz_phases import read_amplitudes

    read = read_amplitudes(data, labels.split(",") if labels else None)
    hkl, amplitudes = np.ascontiguousarray(read.hkl, np.int32), read.F
    fitted = AmplitudeScale.parse(scale) if scale else None
    if fitted is None and sequence:
        element = element_of(ids_from_sequence(sequence))
        fitted = fit_wilson(hkl, amplitudes, read.cell, element, space_group=read.space_group)
    if fitted is not None:
        amplitudes = fitted.apply(amplitudes, read.cell.calculate_1_d2_array(hkl))
        typer.echo(f"scale K = {fitted.k:.4g}, B = {fitted.b:.2f} A^2; now K = 1, B = 20 A^2")
    values = patterson_of_amplitudes(
        hkl,
        amplitudes,
        read.cell,
        space_group=read.space_group,
        d_min=d_min,
        rate=rate,
        paper_grid=paper_grids,
        remove_origin=remove_origin,
        sharpen=sharpen,
    )
    write_ccp4(output, values.numpy(), read.cell)
    if report is not None:
        from xtalfast.report.phasing import write_patterson_page

        facts = {
            "data": str(data),
            "origin peak": "removed" if remove_origin else "kept",
            "amplitudes": "normalised (E)" if sharpen else "as measured" if fitted is None else "absolute, B = 20 A^2",
            "grid points per d_min": rate,
        }
        write_patterson_page(report, values.numpy(), read, data.name, facts)
        typer.echo(f"wrote {report}")
    typer.echo(f"wrote {output}: {' x '.join(map(str, values.shape))} grid points from {len(hkl)} amplitudes")
