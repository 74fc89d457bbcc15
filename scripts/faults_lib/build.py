"""The programs under test."""

import json
import os
import subprocess
import tempfile
from pathlib import Path


def build():
    """FAULTS_BINARIES names a folder with both programs; without it they are built."""
    if "FAULTS_BINARIES" in os.environ:
        return
    root = Path(__file__).resolve().parent.parent.parent
    words = ["cargo", "build", "--release", "--locked", "--message-format", "json-render-diagnostics"]
    words += ["--manifest-path", root / "Cargo.toml", "-p", "c1000k-server", "-p", "c1000k-client"]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    os.environ["FAULTS_BINARIES"] = str(folder_of("c1000k-server", said))


def folder_of(program, said):
    """Where cargo says that it put the program, whatever target folder or triple is set."""
    paths = [json.loads(line).get("executable") for line in said.splitlines()]
    return next(Path(path).parent for path in paths if path and Path(path).name == program)


class Compiled:
    """A program made of one C file, for as long as this lives."""

    def __init__(self, source):
        self.folder = tempfile.TemporaryDirectory(prefix="faults-")
        self.path = Path(self.folder.name) / source.stem
        subprocess.run(["cc", "-O2", "-o", self.path, source], check=True)
