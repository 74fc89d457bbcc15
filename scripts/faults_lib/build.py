"""The programs under test."""

import os
import subprocess
import tempfile
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


class Compiled:
    """A program made of one C file, for as long as this lives."""

    def __init__(self, source):
        self.folder = tempfile.TemporaryDirectory(prefix="faults-")
        self.path = Path(self.folder.name) / source.stem
        subprocess.run(["cc", "-O2", "-o", self.path, source], check=True)
