"""Compiled images on disk, so that a machine compiles a source once. Standard library alone.

An entry is one file, named by everything that its bytes depend on: source, architecture, options and compiler version.
It is written under a name of its own and renamed, so several processes may write the same one. Whatever is wrong with
an entry or with the folder, the caller compiles again.

    magic, 8 bytes | sha256 of the rest, 32 bytes | length of the header, 4 bytes, little-endian | header, JSON | image
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distill_pretrain.kernels.cuda.nvrtc import Image

MAGIC = b"DPIMAGE1"
FOLDER_VARIABLE = "DISTILL_PRETRAIN_KERNEL_CACHE"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Images that came with the package; see prebuild.py."""

_DIGEST_BYTES = 32
_LENGTH = struct.Struct("<I")


def image_key(
    source: str, architecture: str, options: Sequence[str], version: tuple[int, int] | None
) -> str:
    """Name of an entry: hexadecimal.

    Args:
        source: `KernelSource.digest()`.
        architecture: such as "sm_90".
        options: of the compiler.
        version: of the compiler; None for any, as images that come with the package are named.
    """
    parts = json.dumps([source, architecture, list(options), version])
    return hashlib.sha256(parts.encode()).hexdigest()[:40]


def user_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where this user's images are kept: what the variable names, else the user's cache folder, if any."""
    named = environment.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    caches = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Never a folder that others may write to, or the working folder: what is in it is run.
    return Path(caches) / "distill-pretrain" / "kernels" if os.path.isabs(caches) else None


def read_image(folder: Path, key: str) -> Image | None:
    """Read the entry; None where there is none that is whole and carries this key."""
    try:
        entry = _path(folder, key).read_bytes()
    except OSError:
        return None
    start = len(MAGIC) + _DIGEST_BYTES
    digest, body = entry[len(MAGIC) : start], entry[start:]
    if not entry.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        return None
    (length,) = _LENGTH.unpack_from(body)
    header = json.loads(body[_LENGTH.size : _LENGTH.size + length])
    if header["key"] != key:
        return None
    return Image(data=body[_LENGTH.size + length :], names=header["names"])


def write_image(folder: Path, key: str, image: Image) -> bool:
    """Write the entry; False where the folder cannot be written to."""
    header = json.dumps({"key": key, "names": dict(image.names)}).encode()
    body = _LENGTH.pack(len(header)) + header + image.data
    target = _path(folder, key)
    temporary = target.with_name(f".{key}.{secrets.token_hex(8)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(temporary, target)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.image"
