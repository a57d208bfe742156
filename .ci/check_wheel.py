"""Fail if a wheel contains anything but the package: python .ci/check_wheel.py scbin-*.whl."""

from __future__ import annotations

import sys
import zipfile
from pathlib import PurePosixPath

with zipfile.ZipFile(sys.argv[1]) as wheel:
    files = [PurePosixPath(name) for name in wheel.namelist()]
    size = sum(entry.file_size for entry in wheel.infolist())
alien = [
    str(file)
    for file in files
    if not (file.parts[0] == "scbin" and (file.suffix == ".py" or file.name == "py.typed"))
    and not file.parts[0].endswith(".dist-info")
]
alien += [str(file) for file in files if "tests" in file.parts or file.name.startswith("test_")]
if alien:
    sys.exit(f"the wheel contains files that are not part of the package: {alien}")
print(f"{len(files)} files, {size:,} bytes, all of them part of the package")
