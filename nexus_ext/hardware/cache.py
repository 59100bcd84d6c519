"""Profiles that were measured before, one JSON file for each host and disk.

Only the measured rates of a stored profile are worth keeping; how much memory is available is
asked again each time (see `probe`). A file that cannot be read or understood is as good as none,
and a directory that cannot be written costs a new measurement next time: both are logged, neither
is an error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Final

from nexus_ext.errors import FormatError
from nexus_ext.formats.new_file import replace_whole
from nexus_ext.hardware.profile import HardwareProfile

_log = logging.getLogger("nexus_ext.hardware")

MAX_AGE_S: Final = 30 * 86400


def default_cache_dir(
    environ: Mapping[str, str], home: str, *, platform: str = sys.platform
) -> str:
    """Return the directory of this user's caches for nexus_ext; it may not exist yet.

    NEXUS_CACHE_DIR is taken as it is; else $XDG_CACHE_HOME/nexus_ext, ~/Library/Caches/nexus_ext
    on macOS, and ~/.cache/nexus_ext.
    """
    own = environ.get("NEXUS_CACHE_DIR", "")
    if own:
        return own
    xdg = environ.get("XDG_CACHE_HOME", "")
    if xdg.startswith("/"):  # the specification says to ignore relative ones
        return os.path.join(xdg, "nexus_ext")
    caches = ("Library", "Caches") if platform == "darwin" else (".cache",)
    return os.path.join(home, *caches, "nexus_ext")


def cache_file(cache_dir: str, host: str, disk_identity: str) -> str:
    """Return the path of the file for one disk of one host."""
    digest = hashlib.sha256(f"{host}\0{disk_identity}".encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]", "_", host)[:40]
    return os.path.join(cache_dir, f"hardware-{readable}-{digest}.json")


def load_cached(
    file: str, *, host: str, now_unix_s: int, max_age_s: int = MAX_AGE_S
) -> HardwareProfile | None:
    """Return the stored profile, or None when it is absent, broken, too old or of another host."""
    try:
        with open(file, encoding="utf-8") as stream:
            profile = HardwareProfile.from_json(stream.read(), source=file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, FormatError) as error:
        _log.warning("the stored hardware profile is ignored: %s", error)
        return None
    age_s = now_unix_s - profile.created_unix_s
    # A profile from the future tells that a clock was wrong, so its age is not known.
    if profile.host != host or not 0 <= age_s <= max_age_s:
        _log.info("the stored hardware profile %s is %d s old and is not used", file, age_s)
        return None
    return profile


def store(file: str, profile: HardwareProfile) -> bool:
    """Write the profile and return whether that worked.

    Readers see the old file or the whole new one, never a part.
    """
    try:
        replace_whole(file, profile.to_json().encode())
    except OSError as error:
        _log.warning("the hardware profile is not stored, the next run measures again: %s", error)
        return False
    return True
