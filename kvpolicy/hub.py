"""Whether the Hugging Face hub can be asked."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

__all__ = ["unreachable"]


def unreachable() -> str:
    """Return why the hub cannot be asked, or nothing; its own client would try for half a minute."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():
        return ""
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (443 if hub.scheme == "https" else 80)
        socket.create_connection((hub.hostname or "", port), timeout=5).close()
    except OSError as error:
        return f"{hub.hostname} cannot be reached ({error.strerror or error})"
    return ""
