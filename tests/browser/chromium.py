"""Finds a Chromium for the tests; as a command, installs one with the system's package manager if it may."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium: tests in a browser were NOT RUN (apt-get install chromium, or install Chrome)"


def find() -> str | None:
    """The path of a Chromium that starts. (Ubuntu's package of that name only asks to install a snap.)"""
    for name in NAMES:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


def install() -> None:
    """Installs Chromium with apt-get, as root only; the tests report a failure."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(MISSING, file=sys.stderr)
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", *step], env=environment, check=False)


if __name__ == "__main__" and find() is None:
    install()
