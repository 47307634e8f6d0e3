"""`xtalfast doctor`: what is installed, what runs, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import typer

EXTRAS = {
    "io": ("msgpack", "h5py", "hdf5plugin", "fabio"),
    "train": ("lightning", "tensorboard"),
    "cli": ("typer", "rich"),
    "report": ("jinja2",),
    "gpu": ("triton",),
    "refine": ("servalcat",),
}


def doctor() -> None:
    """Say which versions, kernels and extras this installation has. Paste its output into a bug report."""
    import torch

    import xtalfast
    from xtalfast import _native

    def line(name: str, value: object) -> None:
        typer.echo(f"{name:<12} {value}")

    line("xtalfast", xtalfast.__version__)
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    line("torch", torch.__version__)
    if _native.C is None:
        line("extension", f"NOT LOADED ({_native.why}); ops fall back to plain torch; reinstall: pip install .")
    else:
        matching = "" if _native.C.version == xtalfast.__version__ else f" != package {xtalfast.__version__}: reinstall"
        cuda = "with CUDA kernels" if _native.C.with_cuda else "CPU only"
        line("extension", f"{_native.C.version}, {cuda}{matching}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            line(f"cuda:{index}", torch.cuda.get_device_name(index))
    else:
        line("cuda", "no GPU seen by torch; everything runs on the CPU")
    for extra, packages in EXTRAS.items():
        found = [f"{p} {importlib.metadata.version(p)}" for p in packages if importlib.util.find_spec(p)]
        missing = [p for p in packages if not importlib.util.find_spec(p)]
        remedy = f"missing {', '.join(missing)}: pip install 'xtalfast[{extra}]'" if missing else ""
        line(f"[{extra}]", ", ".join([*found, *([remedy] if remedy else [])]))
