"""Download public traces into the data folder, where the workload configs find them.

    coserve fetch azure_conv
    coserve fetch --list
    coserve fetch --url URL [--sha256 HEX] PATH

A file appears under its name only once its size and checksum are right: it is written beside its place
and moved there. The data folder is `COSERVE_DATA`, else `coserve` in the user's cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from sim.arguments import Parser
from sim.errors import report
from sim.workload.files import data_dir
from sim.workload.public import PUBLIC_FILES, PublicFile, find_public

BLOCK_BYTES = 1 << 16
TIMEOUT_S = 60


def main(argv: Sequence[str], files: tuple[PublicFile, ...] = PUBLIC_FILES) -> int:
    """Run the program; 0, or 2 after one line on stderr that says what is wrong."""
    options = _parser(files).parse_args(argv)
    try:
        if options.list:
            _print_list(files)
            return 0
        file = _wanted(options, files)
        path = data_dir() / file.path
        if path.is_file() and not options.force and _is_right(path, file):
            print(f"{path} is already there")
            return 0
        try:
            sha256 = download(file, path)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise ConnectionError(
                f"{file.url}: {_missed(error)}; fetched by hand it goes to {path}, or COSERVE_DATA names a folder "
                f"that has {file.path}"
            ) from None
        unchecked = "" if file.sha256 is not None else " (not checked against anything)"
        print(f"{path}\nsha256 {sha256}{unchecked}\nlicence: {file.licence}")
        return 0
    except (ValueError, OSError) as error:
        return report("coserve fetch", error, _reason(error))


def download(file: PublicFile, path: Path) -> str:
    """Fetch `file` to `path` and return its SHA-256. ValueError on a wrong size or sum; nothing stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            size_bytes, sha256 = _copy(file, out)
        if file.size_bytes is not None and size_bytes != file.size_bytes:
            raise ValueError(f"{file.url}: expected {file.size_bytes} bytes, got {size_bytes}; nothing kept")
        if file.sha256 is not None and sha256 != file.sha256.lower():
            raise ValueError(f"{file.url}: expected sha256 {file.sha256}, got {sha256}; nothing kept")
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return sha256


def _copy(file: PublicFile, out: BinaryIO) -> tuple[int, str]:
    """Bytes and SHA-256 of what `file.url` gave."""
    digest, size_bytes = hashlib.sha256(), 0
    with urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as response:
        stated = response.headers.get("Content-Length")
        total = int(stated) if stated is not None else file.size_bytes
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, unit="B", unit_scale=True, desc=file.name, disable=quiet) as bar:
            while block := response.read(BLOCK_BYTES):
                out.write(block)
                digest.update(block)
                size_bytes += len(block)
                bar.update(len(block))
    if stated is not None and size_bytes != int(stated):
        raise ValueError(
            f"{file.url}: the download broke off after {size_bytes} of {stated} bytes; nothing kept"
        )
    return size_bytes, digest.hexdigest()


def _is_right(path: Path, file: PublicFile) -> bool:
    """Whether what is there is the file; without a known sum any file is."""
    return file.sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256.lower()


def _parser(files: tuple[PublicFile, ...]) -> Parser:
    parser = Parser(prog="coserve fetch", description="Download a public trace.")
    known = ", ".join(file.name for file in files)
    parser.add_argument("name", nargs="?", help=f"one of {known}; with --url a path below the data folder")
    parser.add_argument("--force", action="store_true", help="download again even if the file is there")
    parser.add_argument("--list", action="store_true", help="list the known traces")
    parser.add_argument("--url", help="download this URL instead of a known trace")
    parser.add_argument("--sha256", metavar="HEX", help="checksum of the file at --url")
    return parser


def _wanted(options: argparse.Namespace, files: tuple[PublicFile, ...]) -> PublicFile:
    name, url, sha256 = options.name, options.url, options.sha256
    if name is None:
        raise ValueError("name a trace, or see `coserve fetch --list`")
    if url is None:
        if sha256 is not None:
            raise ValueError("--sha256 goes with --url; known traces have their checksums")
        return find_public(name, files)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url must begin with http:// or https://, got {url}")
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise ValueError(f"--sha256 must be 64 hexadecimal digits, got {sha256}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the path must lie below the data folder, got {name}")
    return PublicFile(
        name=path.name, url=url, path=name, licence="see its source", sha256=sha256, size_bytes=None
    )


def _print_list(files: tuple[PublicFile, ...]) -> None:
    for file in files:
        here = "here" if (data_dir() / file.path).is_file() else "not fetched"
        size = "?" if file.size_bytes is None else f"{file.size_bytes / 1e6:.1f} MB"
        print(f"{file.name:<12} {size:>8}  {here:<12} {file.licence}")
    print(f"data folder: {data_dir()}")


def _missed(error: Exception) -> str:
    """Why nothing, or not all, came from the server."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"cannot reach the server: {getattr(error.reason, 'strerror', None) or error.reason}"
    return f"the download broke off: {error or type(error).__name__}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot write {error.filename}: {error.strerror}"
    return str(error).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
