"""`xtalfast fragments`: protein structures -> training examples for density prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, ProgressBars, QuietOption, SeedOption, logging_to


def fragments(
    structures: Annotated[
        list[Path], typer.Argument(metavar="STRUCTURES...", help="PDB or mmCIF files, directories or tar archives.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The fragment set, made if needed.")],
    preset: Annotated[
        str, typer.Option(metavar="paper|dipeptide", help="15 residues sharing at most 5, or 2 sharing none.")
    ] = "paper",
    length: Annotated[int | None, typer.Option(metavar="N", help="Residues in a fragment.")] = None,
    overlap: Annotated[int | None, typer.Option(metavar="N", help="Residues that neighbours may share.")] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="Turn each fragment at random before its cell.")] = False,
    copies: Annotated[bool, typer.Option("--copies", help="Cut every copy of a chain, not only the first.")] = False,
    paper_criteria: Annotated[
        bool,
        typer.Option(
            "--paper-criteria",
            help="X-ray, after 1995, 40 residues or more, to 2.75 A or better, R-free to 0.28; what a file does not "
            "state is counted and passes.",
        ),
    ] = False,
    clusters: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Sequence clusters, one a line or as pairs: kept in one split."),
    ] = None,
    test_fraction: Annotated[float, typer.Option(metavar="X", help="Part of the structures kept for testing.")] = 0.1,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes. [as many as processors]")] = 0,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut protein structures into fragments in tight P1 cells, split into training and test set by structure.

    Writes `train.safetensors` and `test.safetensors` (about 2 kB a fragment; maps are made on the fly from them) and
    `set.json` (what was rejected and why, solvent content, scale of the maps). Interrupted, the same command resumes.

    Example: `xtalfast fragments structures.tar.xz -o set`
    """
    from xtalfast.density.fragment_set import make_fragments
    from xtalfast.density.fragments import FragmentSettings
    from xtalfast.density.split import Clusters

    changes = {"length": length, "overlap": overlap}
    settings = FragmentSettings.preset(
        preset,
        **{name: value for name, value in changes.items() if value is not None},
        rotate=rotate,
        copies=copies,
        criteria=paper_criteria,
        test_fraction=test_fraction,
        seed=seed,
    )
    with logging_to(None, quiet), ProgressBars(quiet) as progress:
        made = make_fragments(
            structures,
            output,
            settings,
            clusters=Clusters.read(clusters) if clusters else None,
            jobs=jobs or os.cpu_count() or 1,
            progress=progress,
        )
    statistics, tally = made.statistics, made.tally
    for split, n in statistics["fragments"].items():
        typer.echo(f"{split:<10} {n:>8} fragments of {statistics['parents'][split]} structures")
    for title, counts in (
        ("rejected structures or chains", tally.rejected_structures),
        ("rejected fragments", tally.rejected_fragments),
        ("not stated in the files", tally.absent),
    ):
        for reason, n in counts.most_common():
            typer.echo(f"{title}: {n} {reason}")
    low, median, high = statistics["solvent_5_50_95"]
    typer.echo(f"solvent content 5/50/95 %: {low:.0%} / {median:.0%} / {high:.0%} (the density paper: about 80 %)")
    bins = statistics["grids_at_1.5"]["multiple_of_4"]
    typer.echo(
        f"grids at 1.5 A: {bins['bins']} sizes; {bins['in_bins_of_20']:.0%} of fragments share theirs with 19 others"
    )
    typer.echo(f"wrote {output}: {statistics['bytes_per_fragment']} bytes a fragment")
