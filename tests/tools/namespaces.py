"""Two "machines" in network namespaces of this one, and a stand-in for ssh that runs a command in one of them.

Each has a host name and an address of its own (10.77.0.1 and .2, on a cable between the two that leads nowhere else).
Needs `ip` and the right to make namespaces.
"""

import os
import shutil
import subprocess
from pathlib import Path

SSH = """#!/bin/bash
# As ssh would be called: options, the machine, the command.
name="${{@: -2:1}}"
exec ip netns exec "{prefix}-$name" unshare --uts --mount bash -c '
  mount --bind {folder}/hosts /etc/hosts && hostname "$1" && exec bash -c "$2"' _ "$name" "${{@: -1}}"
"""


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def refused():
    """Why there can be no namespaces here, or nothing."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no `ip` or `unshare` here; on Debian or Ubuntu: make slurm"
    name = f"thrift-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "exec", name, "unshare", "--uts", "--mount", "true")
    except subprocess.CalledProcessError as error:
        return f"this machine allows no network namespaces: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Machines:
    """nodeA and nodeB, joined by one cable. `folder` holds `ssh` for the path, and `hosts` for thriftlab launch."""

    def __init__(self, folder: Path):
        self.prefix, self.folder = f"thrift-{os.getpid()}", folder
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 nodeA\n10.77.0.2 nodeB\n")
        (folder / "ssh").write_text(SSH.format(prefix=self.prefix, folder=folder))
        (folder / "ssh").chmod(0o755)

    def __enter__(self):
        for side in "AB":
            ip("netns", "add", f"{self.prefix}-node{side}")
        ends = [(f"{self.prefix}-node{side}", f"eth{side}") for side in "AB"]
        (a, cable), (b, other) = ends
        ip("-n", a, "link", "add", cable, "type", "veth", "peer", "name", other, "netns", b)
        for number, (space, end) in enumerate(ends, 1):
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", end, "up")
        return self

    def pull_the_plug(self):
        """nodeB is there and not to be reached; connections to it stay open and silent."""
        ip("-n", f"{self.prefix}-nodeB", "link", "set", "ethB", "down")

    def plug_in(self):
        ip("-n", f"{self.prefix}-nodeB", "link", "set", "ethB", "up")

    def __exit__(self, *_):
        for side in "AB":
            for process in ip("netns", "pids", f"{self.prefix}-node{side}").split():
                subprocess.run(["kill", "-9", process], capture_output=True)
            ip("netns", "del", f"{self.prefix}-node{side}")
