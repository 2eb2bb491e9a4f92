"""The workloads: programs nobody here wrote, what they are told and what they must leave."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parts.workload_bare import run_chroot
from benchmarks.parts.workload_images import LIBRARIES, MEDIA, SCIENCE, TOOLS, Built, Recipe
from lumaris_protocol.limits import MIB

_NUMBERS = """\
import numpy
random = numpy.random.default_rng(7)
a = random.random((1000, 1000))
b = a @ a.T
for _ in range(4):
    b = b @ a / 1000
s = numpy.fft.fft(random.random(1 << 20))
for _ in range(5):
    s = numpy.fft.fft(numpy.fft.ifft(s) * 1.5)
open("/out/numbers.bin", "wb").write(b[:64].tobytes() + s[:65536].tobytes())
print(f"trace {numpy.trace(b):.5e}")
"""
_FIT = """\
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
x, y = load_digits(return_X_y=True)
x = x / 16.0
line = LogisticRegression(C=0.1, max_iter=300, tol=1e-6).fit(x[:1200], y[:1200])
wood = RandomForestClassifier(n_estimators=300, random_state=0, n_jobs=1).fit(x[:1200], y[:1200])
found = [model.predict(x[1200:]) for model in (line, wood)]
with open("/out/model.bin", "wb") as file:
    file.write(line.coef_.tobytes())
    for labels in found:
        file.write(labels.astype("<i4").tobytes())
print("accuracy", *(f"{(labels == y[1200:]).mean():.3f}" for labels in found))
"""
_CLIP = (
    "ffmpeg -nostdin -v error -f lavfi -i testsrc2=size=1280x720:rate=25:duration=8"
    " -c:v mpeg2video -q:v 4 -threads 1 -bitexact /out/clip.mpg"
)
_FRAME = (
    "ffmpeg -nostdin -v error -f lavfi -i testsrc2=size=1600x1000 -frames:v 1 -bitexact"
    " /out/frame.png"
)
_TRANSCODE = (
    "ffmpeg -nostdin -v error -threads 1 -i /in/clip.mpg -c:v libx264 -preset veryfast -threads 1"
    " -fflags +bitexact -flags +bitexact /out/clip.mp4"
)
_SWIRL = "convert -limit thread 1 /in/frame.png -blur 0x6 -swirl 90 rgb:/out/frame"
_SPEED = "openssl speed -mr -seconds 2 -bytes 16384 sha256"
_SCIENCE_WASM = "python:3.15-science-wasi"


@dataclass(frozen=True)
class Workload:
    """One program and its input. `result` is the file compared; "" when its speed is the result.

    `make` puts the input into a folder, with the programs of the image where they are needed.
    """

    name: str
    recipe: Recipe
    command: tuple[str, ...]
    result: str = ""
    input: str = ""
    make: Callable[[Built, Path], None] | None = None
    wasm: str = ""  # the catalog image that runs the same script


def _by_ffmpeg(command: str) -> Callable[[Built, Path], None]:
    def make(image: Built, target: Path) -> None:
        ended = run_chroot(image.root, tuple(command.split()), {}, MEDIA.environment)
        shutil.copyfile(ended.outputs[target.name], target)

    return make


def _by_text(text: str) -> Callable[[Built, Path], None]:
    def make(_: Built, target: Path) -> None:
        target.write_text(text)

    return make


def _by_library(size_bytes: int) -> Callable[[Built, Path], None]:
    """A real program's machine code: the libraries that the image itself is made of."""

    def make(image: Built, target: Path) -> None:
        data = bytearray()
        for file in sorted((image.root / LIBRARIES).glob("lib*.so.*")):
            if not file.is_symlink() and len(data) < size_bytes:
                data += file.read_bytes()
        target.write_bytes(bytes(data[:size_bytes]))

    return make


def _xz(recipe: Recipe, size_bytes: int) -> Workload:
    return Workload(
        "xz -6",
        recipe,
        ("sh", "-c", "xz -6 -T1 -c /in/data.bin > /out/data.xz"),
        "data.xz",
        "data.bin",
        _by_library(size_bytes),
    )


# What costs only the start: of a sandbox, and of an interpreter in one.
NOTHING = (
    Workload("true", TOOLS, ("true",)),
    Workload("nothing", TOOLS, ("true",), "", "nothing.py", _by_text("")),
)
# The smallest of them, for a test.
XZ_ALONE = _xz(TOOLS, MIB)
WORKLOADS = (
    Workload(
        "ffmpeg x264",
        MEDIA,
        tuple(_TRANSCODE.split()),
        "clip.mp4",
        "clip.mpg",
        _by_ffmpeg(_CLIP),
    ),
    _xz(MEDIA, 8 * MIB),
    Workload(
        "ImageMagick",
        MEDIA,
        tuple(_SWIRL.split()),
        "frame",
        "frame.png",
        _by_ffmpeg(_FRAME),
    ),
    Workload(
        "openssl sha256",
        MEDIA,
        tuple(_SPEED.split()),
    ),
    Workload(
        "numpy",
        SCIENCE,
        ("python3", "/in/numeric.py"),
        "numbers.bin",
        "numeric.py",
        _by_text(_NUMBERS),
        _SCIENCE_WASM,
    ),
    Workload(
        "scikit-learn",
        SCIENCE,
        ("python3", "/in/fit.py"),
        "model.bin",
        "fit.py",
        _by_text(_FIT),
        _SCIENCE_WASM,
    ),
)


def speed_of(stdout: bytes) -> float:
    """MB/s of what `openssl speed -mr` says of one size."""
    for line in stdout.decode(errors="replace").splitlines():
        if line.startswith("+F:"):
            return float(line.split(":")[3]) / 1e6
    raise ValueError(stdout[-200:])
