"""The programs under test."""

import os
import subprocess
from pathlib import Path


def build():
    """FAULTS_BINARIES names a folder with both programs; without it they are built."""
    if "FAULTS_BINARIES" in os.environ:
        return
    root = Path(__file__).resolve().parent.parent.parent
    packages = ["-p", "c1000k-server", "-p", "c1000k-client"]
    subprocess.run(["cargo", "build", "--release", "--locked", *packages], cwd=root, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", root / "target"))
    os.environ["FAULTS_BINARIES"] = str(target / "release")
