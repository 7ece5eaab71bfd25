"""No link within the site is broken, and no anchor is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_no_link_is_broken(site: str) -> None:
    command = [sys.executable, "-m", "linkcheck", "-f", str(Path(__file__).with_name("linkcheckerrc")), f"{site}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 errors found" in done.stdout


def test_machines_find_the_pages(site: str) -> None:
    from urllib.request import urlopen

    with urlopen(f"{site}/llms.txt") as found:
        index = found.read().decode()
    for page in ("ten-minutes", "concepts", "api/stages"):
        assert f"/{page}/index.md)" in index
        with urlopen(f"{site}/{page}/index.md") as found:
            assert found.read().startswith(b"# ")
