"""`coserve fetch` against a local server: right files appear whole, wrong ones not at all."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sim.fetch import main
from sim.workload.files import find_file
from sim.workload.public import PUBLIC_FILES, PublicFile

BODY = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000] if self.path == "/broken" else BODY)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """The address of a server that is not there: its port is taken, so that nobody else listens on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COSERVE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "data"


def registry(url: str, sha256: str = SHA256, size_bytes: int = len(BODY)) -> tuple[PublicFile, ...]:
    return (
        PublicFile(
            name="small", url=url, path="azure/small.csv", licence="CC0", sha256=sha256, size_bytes=size_bytes
        ),
    )


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_a_trace_is_fetched_checked_and_found(
    server: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["small"], registry(f"{server}/small.csv")) == 0
    assert (data / "azure" / "small.csv").read_bytes() == BODY
    assert files_below(data) == [data / "azure" / "small.csv"]
    out = capsys.readouterr().out
    assert SHA256 in out
    assert "CC0" in out


def test_a_file_that_is_right_is_not_fetched_again_and_a_wrong_one_is(
    server: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "azure" / "small.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert main(["small"], registry(f"{server}/missing")) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["small", "--force"], registry(f"{server}/missing")) == 2
    assert path.read_bytes() == BODY
    path.write_bytes(b"half")
    assert main(["small"], registry(f"{server}/small.csv")) == 0
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("page", "change", "says"),
    [
        ("small.csv", {"sha256": "0" * 64}, f"expected sha256 {'0' * 64}, got {SHA256}"),
        ("small.csv", {"size_bytes": 7}, f"expected 7 bytes, got {len(BODY)}"),
        ("missing", {}, "the server answered 404"),
        ("broken", {}, f"broke off after 1000 of {len(BODY)} bytes"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(
    server: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    page: str,
    change: dict[str, object],
    says: str,
) -> None:
    assert main(["small"], registry(f"{server}/{page}", **change)) == 2
    assert says in one_line(capsys)
    assert files_below(data) == []


def test_a_bad_download_leaves_the_old_file(server: str, data: Path) -> None:
    path = data / "azure" / "small.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    assert main(["small", "--force"], registry(f"{server}/broken")) == 2
    assert path.read_bytes() == b"old"


def test_a_server_that_is_not_there(nobody: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["small"], registry(f"{nobody}/x")) == 2
    told = one_line(capsys)
    assert f"{nobody}/x: cannot reach the server" in told
    there = data / "azure" / "small.csv"
    assert told.endswith(
        f"; fetched by hand it goes to {there}, or COSERVE_DATA names a folder that has azure/small.csv\n"
    )


def test_a_folder_that_has_the_file_is_taken(
    nobody: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the error of a server that is not there says."""
    there = tmp_path / "elsewhere" / "azure" / "small.csv"
    there.parent.mkdir(parents=True)
    there.write_bytes(BODY)
    monkeypatch.setenv("COSERVE_DATA", str(tmp_path / "elsewhere"))
    assert main(["small"], registry(f"{nobody}/x")) == 0
    assert capsys.readouterr().out == f"{there} is already there\n"
    assert find_file("azure/small.csv") == there


def test_an_unknown_name_gets_the_nearest(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["azure_con"]) == 2
    assert "did you mean 'azure_conv'?" in one_line(capsys)
    assert main([]) == 2
    assert "name a trace" in one_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(server: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.mkdir(mode=0o500)
    assert main(["small"], registry(f"{server}/small.csv")) == 2
    assert "cannot write" in one_line(capsys)


def test_a_data_folder_that_is_a_file(server: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text("")
    assert main(["small"], registry(f"{server}/small.csv")) == 2
    assert f"cannot write {data}" in one_line(capsys)


def test_any_url_with_or_without_a_checksum(
    server: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server}/any"
    assert main(["--url", url, "--sha256", SHA256.upper(), "mooncake/x.jsonl"]) == 0
    assert (data / "mooncake" / "x.jsonl").read_bytes() == BODY
    capsys.readouterr()
    assert main(["--url", url, "y.csv"]) == 0
    assert f"{SHA256} (not checked" in capsys.readouterr().out
    assert main(["--url", url, "--sha256", "1" * 64, "z.csv"]) == 2
    assert main(["--url", f"{server}/broken", "z.csv"]) == 2
    assert not (data / "z.csv").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--url", "file:///etc/hosts", "x"], "must begin with http"),
        (["--url", "http://x", "../x"], "below the data folder"),
        (["--url", "http://x", "/x"], "below the data folder"),
        (["--url", "http://x", "--sha256", "12", "x"], "64 hexadecimal digits"),
        (["--sha256", "1" * 64, "azure_conv"], "goes with --url"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert main(argv) == 2
    assert says in one_line(capsys)


def test_the_list_shows_what_is_here(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(file.name in out for file in PUBLIC_FILES)
    assert str(data) in out


@pytest.mark.parametrize("file", PUBLIC_FILES, ids=lambda f: f.name)
def test_the_registry_agrees_with_the_files_here(file: PublicFile) -> None:
    folder = Path(os.environ.get("COSERVE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    assert file.url.startswith("https://")
    assert file.sha256 is not None
    assert len(file.sha256) == 64
    if not (folder / file.path).is_file():
        pytest.skip(f"{file.path} is not here")
    content = (folder / file.path).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.size_bytes)
