"""Write xtalfast/density/conformers.json: the ideal coordinates of the 20 standard residues.

Source: wwPDB Chemical Component Dictionary (CC0 1.0) as packaged by biotite. Hydrogens and OXT are left out; atoms keep
the order of the dictionary. Run with `pip install biotite` and commit the result:

    python tools/make_conformers.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from biotite.structure import info

RESIDUES = (
    "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()
)  # their order is the residue id
OUTPUT = Path(__file__).parents[1] / "xtalfast" / "density" / "conformers.json"


def main() -> None:
    lines = []
    for name in RESIDUES:
        atoms = info.residue(name)
        atoms = atoms[(atoms.element != "H") & (atoms.atom_name != "OXT")]
        record = {
            "atoms": atoms.atom_name.tolist(),
            "elements": atoms.element.tolist(),
            "coords": np.round(atoms.coord.astype(float), 3).tolist(),
        }
        lines.append(f"  {json.dumps(name)}: {json.dumps(record, separators=(',', ':'))}")
    source = f"wwPDB Chemical Component Dictionary, ideal coordinates (CC0 1.0), through biotite {version('biotite')}"
    text = f'{{\n  "source": {json.dumps(source)},\n' + ",\n".join(lines) + "\n}\n"
    OUTPUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
