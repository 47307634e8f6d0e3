"""Write xtalfast/report/uglymol/: the map viewer of the phasing report, as published on the npm registry (MIT).

UglyMol draws electron density in the browser with WebGL; the report holds it whole, so that it opens without a
network. Run with npm on PATH and commit the result:

    python tools/fetch_uglymol.py
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.7.2"
INTEGRITY = "sha512-PXnTxiPMHOAzUKgU/WhJMzcmawjTJyQLeae7XcmOxOxOrxCgC02hY9IkIDPQ7oa5ajNiRCLzZeA202faR75v3w=="
OUTPUT = Path(__file__).parents[1] / "xtalfast" / "report" / "uglymol"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"uglymol@{VERSION}"], cwd=folder, check=True)
        archive = Path(folder) / f"uglymol-{VERSION}.tgz"
        digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != INTEGRITY:
            raise SystemExit(f"{archive.name} has {digest}, wanted {INTEGRITY}")
        OUTPUT.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:

            def read(name: str) -> str:
                member = tar.extractfile(f"package/{name}")
                assert member is not None
                return member.read().decode()

            # UglyMol contains a part of three.js, which has a licence of its own.
            licences = [f"UglyMol {VERSION}, https://github.com/uglymol/uglymol", read("LICENSE")]
            licences += ["three.js, a part of which UglyMol contains, https://threejs.org", read("src/uthree/LICENSE")]
            (OUTPUT / "LICENSE").write_text("\n".join(licences), encoding="utf-8")
            (OUTPUT / "uglymol.js").write_text(read("uglymol.js"), encoding="utf-8")


if __name__ == "__main__":
    main()
