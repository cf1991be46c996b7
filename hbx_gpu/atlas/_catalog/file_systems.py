"""On which file systems a lock of one machine (flock) keeps out writers of all machines."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
# File systems of one machine, and those of clusters whose locks hold on all machines. Of any other, such as
# NFS, SMB, 9p, BeeGFS and everything in user space, that depends on a server that nobody can ask.
_SAFE = {
    "bcachefs",
    "btrfs",
    "ceph",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "gpfs",
    "jfs",
    "overlay",
    "ramfs",
    "reiserfs",
    "tmpfs",
    "xfs",
    "zfs",
}


def locks_hold(folder: Path) -> bool:
    """Whether locks of files in a folder keep out the writers of all machines that see it.

    Parameters
    ----------
    folder
        An existing folder. Systems without a list of mounts (all but Linux) are taken for single machines.
    """
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return True
    return holds(mounts, os.path.realpath(folder))


def holds(mounts: str, folder: str) -> bool:
    """Whether locks hold in a folder, by the text of ``/proc/self/mountinfo``; see proc(5)."""
    kind, options = "", set[str]()
    longest = -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(described) < 3:
            continue
        place = _unescaped(fields[4])
        inside = folder == place or folder.startswith(place.rstrip("/") + "/")
        # The last of several file systems at one place is the one that is seen.
        if inside and len(place) >= longest:
            longest, kind = len(place), described[0]
            options = {*fields[5].split(","), *described[2].split(",")}
    # Lustre has locks of the whole cluster where it is mounted with -o flock.
    return kind in _SAFE or (kind == "lustre" and "flock" in options) or not kind


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
