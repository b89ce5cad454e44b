"""lbproxy from an image's file system instead of from the checkout, for tests that can do either.

LBPROXY_ROOTFS names the folder where the image is mounted (`buildah mount`, or what `docker export`
has packed). What runs there finds it read-only, as deploy/'s containers do, with the machine's /proc,
/sys, /dev, /tmp and /run/netns in it, and neither the checkout nor its Python.
"""

import os
import sys
import typing

ROOTFS: typing.Final = os.environ.get("LBPROXY_ROOTFS", "")
_BORROWED: typing.Final = "/proc /sys /dev /tmp /run/netns"
_SCRIPT: typing.Final = f"""\
set -e
root=$0
mount --bind "$root" "$root"
for each in {_BORROWED}; do mount --rbind $each "$root$each"; done
mount -o remount,bind,ro "$root"
exec chroot "$root" env -u PYTHONPATH -u VIRTUAL_ENV PYTHONDONTWRITEBYTECODE=1 \\
    PATH=/opt/lbproxy/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""


def enter() -> list[str]:
    """What is to stand before a command, so that it runs in the image; nothing without one."""
    if not ROOTFS:
        return []
    return ["unshare", "--mount", "--propagation", "private", "bash", "-c", _SCRIPT, ROOTFS]


def lbproxy() -> list[str]:
    """The lbproxy of the image, or of the checkout."""
    return ["lbproxy"] if ROOTFS else [sys.executable, "-m", "lbproxy"]
