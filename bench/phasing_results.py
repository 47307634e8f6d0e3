"""The section `phasing` of the results: how often the solver finds phases, how fast, and what it says itself.

Every fragment sits in its tight P1 cell; amplitudes (B = 20) are all the solver gets: no solvent fraction, 60 s of one
core's time. `bench/phasing_fragments.txt` names the 200 fragments, drawn from the test split of the shared structures
with seed 0 (`python bench/phasing_results.py SET/test.safetensors` draws them again). Rows are appended as they come;
none is computed twice in a working directory: `python bench/results.py --data DATA --work DIR --only phasing` goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gemmi
import numpy as np
import torch

from xtalfast.density.cells import solvent_fraction
from xtalfast.density.conformers import mass_of
from xtalfast.density.fragment_set import make_fragments
from xtalfast.density.store import Fragment, FragmentStore
from xtalfast.phasing import density_modify, match, solve

LIST = Path(__file__).with_name("phasing_fragments.txt")
N_FRAGMENTS, N_SWEEP, N_MODIFY = 200, 20, 50
SECONDS, SWEEP_SECONDS = 60.0, 20.0
RECOVERED = 0.8
SOLVENT_BINS = (0.0, 0.6, 0.7, 0.8, 1.0)


@dataclass(frozen=True)
class Condition:
    """What is done to the amplitudes: resolution (A), noise (fraction of F), missing reflections."""

    d_min: float
    noise: float = 0.0
    missing: float = 0.0  # fraction of all reflections, at random
    d_max: float = float("inf")

    @property
    def name(self) -> str:
        """As it stands in tables."""
        parts = [f"{self.d_min:.2f} A"]
        if self.noise:
            parts.append(f"{self.noise:.0%} noise")
        if self.missing:
            parts.append(f"{self.missing:.0%} missing")
        if np.isfinite(self.d_max):
            parts.append(f"nothing above {self.d_max:.0f} A")
        return ", ".join(parts)


MAIN = (Condition(1.5), Condition(2.0))
SWEEPS = (
    *(Condition(d) for d in (1.5, 1.75, 2.0, 2.25, 2.5, 3.0)),
    *(Condition(2.0, noise=noise) for noise in (0.05, 0.1, 0.2)),
    *(Condition(2.0, missing=missing) for missing in (0.1, 0.3)),
    Condition(2.0, d_max=15.0),
    Condition(2.0, noise=0.1, d_max=15.0),
)


def structure_factors(fragment: Fragment, d_min: float, b_iso: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Indices [N, 3] and structure factors [N] (e), by gemmi, which shares no code with the solver."""
    structure = gemmi.Structure()
    residue = gemmi.Residue()
    residue.name, residue.seqid = "UNL", gemmi.SeqId("1")
    for number, position in zip(fragment.element.tolist(), fragment.coords.tolist()):
        atom = gemmi.Atom()
        atom.element, atom.pos, atom.b_iso, atom.occ = gemmi.Element(number), gemmi.Position(*position), b_iso, 1.0
        residue.add_atom(atom)
    chain = gemmi.Chain("A")
    chain.add_residue(residue)
    model = gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*fragment.cell), "P 1"
    structure.setup_cell_images()
    calculator = gemmi.DensityCalculatorX()
    calculator.d_min = d_min
    calculator.set_refmac_compatible_blur(structure[0])
    calculator.grid.setup_from(structure)
    calculator.put_model_density_on_grid(structure[0])
    asu = gemmi.transform_map_to_f_phi(calculator.grid, half_l=True).prepare_asu_data(
        dmin=d_min, unblur=calculator.blur
    )
    return np.array(asu.miller_array), np.array(asu.value_array).astype(np.complex128)


def fragments(path: Path) -> Iterator[Fragment]:
    """The listed fragments of a set, in the order of the list."""
    store = FragmentStore.open(path)
    rows = {store.id(row): row for row in range(len(store))}
    for name in LIST.read_text().split():
        yield store[rows[name]]


def draw(path: Path) -> None:
    """Write the list: N_FRAGMENTS of the set, drawn with seed 0."""
    store = FragmentStore.open(path)
    rows = np.random.default_rng(0).choice(len(store), N_FRAGMENTS, replace=False)
    LIST.write_text("".join(f"{store.id(int(row))}\n" for row in rows))


def solvent_of(fragment: Fragment) -> float:
    """Solvent fraction of a fragment's cell."""
    return float(solvent_fraction(mass_of(fragment.residue_ids), fragment.cell))


def solve_one(fragment: Fragment, condition: Condition, seconds: float) -> dict:
    """One row: the verdict without truth, and what the truth says about it."""
    cell = gemmi.UnitCell(*fragment.cell)
    hkl, truth = structure_factors(fragment, condition.d_min)
    rng = np.random.default_rng(0)
    measured = abs(truth) * abs(1 + condition.noise * rng.standard_normal(len(truth)))
    keep = (rng.random(len(truth)) >= condition.missing) & (cell.calculate_d_array(hkl) <= condition.d_max)
    found = solve(measured[keep], hkl[keep], cell, "P 1", max_seconds=seconds, clock=time.process_time)
    matched = match(truth[keep][found.rows], found.F, found.hkl, cell)
    return {
        **asdict(condition),
        "id": fragment.id,
        "solvent": solvent_of(fragment),
        "solved": found.solved,
        "recovered": matched.map_cc > RECOVERED,
        "r": found.r,
        "r_free": found.r_free,
        "assumed": found.solvent,
        "map_cc": matched.map_cc,
        "phase_error": matched.statistics.overall.phase_error,
        "fom": float(found.fom.mean()),
        "cos_error": matched.statistics.overall.cos_error,
        "seconds": found.seconds,
        "starts": found.n_starts,
        "hand": found.hand.choice,
        "hand_right": not matched.inverted,
        "hand_confidence": found.hand.confidence,
    }


def modify_one(fragment: Fragment, start: str) -> dict:
    """Phase error before and after density modification, from random or model-like errors."""
    cell = gemmi.UnitCell(*fragment.cell)
    rng = np.random.default_rng(0)
    hkl, truth = structure_factors(fragment, 2.0)
    kind, size = start.split()
    if kind == "random":
        # Normal errors; the sd is what gives this mean |error|.
        wrong = truth * np.exp(1j * np.radians(float(size) * np.sqrt(np.pi / 2)) * rng.standard_normal(len(truth)))
    else:
        keep = np.ones(len(fragment.element), bool)
        shift = np.zeros((len(keep), 3))
        if kind == "jitter":
            shift = float(size) * rng.standard_normal(shift.shape)
        else:
            keep = np.arange(len(keep)) < float(size) * len(keep)
        model = Fragment(
            fragment.id,
            fragment.parent,
            (fragment.coords + shift)[keep].astype(np.float32),
            fragment.element[keep],
            fragment.b_iso[keep],
            fragment.residue_ids,
            fragment.cell,
        )
        wrong = structure_factors(model, 2.0)[1]
    before = match(truth, abs(truth) * np.exp(1j * np.angle(wrong)), hkl, cell, hand=False).statistics.overall
    modified = density_modify(abs(truth), np.degrees(np.angle(wrong)), hkl, cell, "P 1")
    after = match(truth, modified.F, hkl, cell, hand=False).statistics.overall
    return {
        "id": fragment.id,
        "start": start,
        "solvent": solvent_of(fragment),
        "before": before.phase_error,
        "after": after.phase_error,
        "cc_before": before.map_cc,
        "cc_after": after.map_cc,
        "fom": float(modified.fom.mean()),
        "cos_error": after.cos_error,
    }


MODIFY = ("random 40", "random 60", "random 80", "jitter 0.6", "jitter 0.9", "part 0.5", "part 0.3")


def share(rows: list[dict], key: str) -> str:
    """How many of the rows have `key`."""
    return f"{sum(row[key] for row in rows) / len(rows):.1%}" if rows else "-"


def tables(rows: list[dict]) -> str:
    """Markdown of all that was measured."""
    lines = [
        "| data | n | solved | recovered | false solved | CC of recovered | median s | 95 % s |",
        "|---|" + "---|" * 7,
    ]
    solving = [row for row in rows if "recovered" in row]
    for condition in dict.fromkeys((*MAIN, *SWEEPS)):
        for budget in (SECONDS, SWEEP_SECONDS):
            mine = [
                r
                for r in solving
                if Condition(**{k: r[k] for k in asdict(condition)}) == condition and r["budget"] == budget
            ]
            if not mine:
                continue
            good = [r["map_cc"] for r in mine if r["recovered"]]
            wrong = [{"false": r["solved"] and not r["recovered"]} for r in mine]
            mean_cc = np.mean(good) if good else float("nan")
            seconds = np.percentile([r["seconds"] for r in mine], (50, 95))
            lines.append(
                f"| {condition.name} ({budget:.0f} s) | {len(mine)} | {share(mine, 'solved')}"
                f" | {share(mine, 'recovered')} | {share(wrong, 'false')} | {mean_cc:.3f}"
                f" | {seconds[0]:.1f} | {seconds[1]:.1f} |"
            )
    lines += ["", "| solvent | data | n | recovered |", "|---|---|---|---|"]
    for condition in MAIN:
        mine = [r for r in solving if r["d_min"] == condition.d_min and r["budget"] == SECONDS]
        for low, high in itertools.pairwise(SOLVENT_BINS):
            binned = [r for r in mine if low <= r["solvent"] < high]
            lines.append(f"| {low:.0%}-{high:.0%} | {condition.name} | {len(binned)} | {share(binned, 'recovered')} |")
    lines += ["", "| data | within 2 s | 5 s | 10 s | 20 s | 60 s |", "|---|---|---|---|---|---|"]
    for condition in MAIN:
        mine = [r for r in solving if r["d_min"] == condition.d_min and r["budget"] == SECONDS]
        reached = [share([{"r": r["recovered"] and r["seconds"] <= s} for r in mine], "r") for s in (2, 5, 10, 20, 60)]
        lines.append(f"| {condition.name} | {' | '.join(reached)} |")
    hands = [r for r in solving if r["solved"] and r["recovered"]]
    decided = [r for r in hands if r["hand"] != "undecided"]
    lines += ["", f"Hand decided for {len(decided)} of {len(hands)} solved, right in {share(decided, 'hand_right')}."]
    lines += ["", "| start | n | phase error before | after | CC before | after |", "|---|---|---|---|---|---|"]
    for start in MODIFY:
        mine = [r for r in rows if r.get("start") == start]
        if mine:
            figures = [
                f"{np.mean([r[k] for r in mine]):.{n}f}"
                for k, n in (("before", 1), ("after", 1), ("cc_before", 3), ("cc_after", 3))
            ]
            lines.append(f"| {start} | {len(mine)} | {' | '.join(figures)} |")
    return "\n".join(lines)


JOBS: dict[str, list[tuple[object, float, int]]] = {
    "solve": [(condition, SECONDS, N_FRAGMENTS) for condition in MAIN],
    "modify": [(start, 0.0, N_MODIFY) for start in MODIFY],
    "sweeps": [(condition, SWEEP_SECONDS, N_SWEEP) for condition in SWEEPS],
}


def rows_of(name: str, path: Path, output: Path) -> list[dict]:
    """The rows of one kind of job; those that are missing in `output` are computed."""
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {row["key"] for row in rows}
    with output.open("a") as file:
        # Fragment by fragment, so that an unfinished run is a fair sample of all conditions.
        for number, fragment in enumerate(fragments(path)):
            for what, seconds, n in JOBS[name]:
                key = f"{fragment.id}|{what}|{seconds}"
                if number >= n or key in done:
                    continue
                found = (
                    solve_one(fragment, what, seconds)
                    if isinstance(what, Condition)
                    else modify_one(fragment, str(what))
                )
                rows.append({"key": key, "budget": seconds, **found})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    return rows


def section(data: Path, work: Path) -> str:
    """Solve, modify and sweep; see the head of this file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    split = work / "set" / "test.safetensors"
    if not split.exists():
        make_fragments([data / "structures" / "dev_chains.tar.xz"], split.parent)
    rows = [row for name in JOBS for row in rows_of(name, split, work / f"{name}.jsonl")]
    torch.set_num_threads(threads)
    return (
        "## Phases without a network\n\n"
        "Fragments of 15 residues from parents of the test split, alone in tight P1 cells; amplitudes only, solvent "
        f"not given; seconds of one core's time. bench/phasing_fragments.txt lists the {N_FRAGMENTS} fragments; "
        f"sweeps take the first {N_SWEEP} of them with {SWEEP_SECONDS:.0f} s each, density modification the first "
        f"{N_MODIFY}. `solved` is called without truth, `recovered` is a map CC above {RECOVERED} to the truth. "
        "Search settings came from fragments of the training split; how the threshold of the call was set is told in "
        "[phasing.md](phasing.md).\n\n" + tables(rows)
    )


def main() -> None:
    """Draw the list of fragments again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="test.safetensors of the shared structures")
    draw(parser.parse_args().set)


if __name__ == "__main__":
    main()
