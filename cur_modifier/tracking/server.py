"""Whether a tracking server answers."""

from __future__ import annotations

import re

# The probe may block longer than this where a name does not resolve; callers bound it themselves.
PROBE_WAIT_S = 3.0


def is_remote(uri: str) -> bool:
    """Whether ``uri`` names a server that can be asked over HTTP."""
    return uri.startswith(("http://", "https://"))


def without_passwords(message: str) -> str:
    """``message`` with ``user:password@`` taken out of the URIs in it."""
    return re.sub(r"//[^@/\s]*@", "//", message)


def unreachable(uri: str) -> str | None:
    """Why the server at ``uri`` cannot be used, or None if it answers (or is not HTTP).

    Any answer below 500 counts, also a refused login: MLflow has the credentials, this has not.
    """
    if not is_remote(uri):
        return None
    # MLflow's own HTTP library, so that proxies are found as MLflow finds them.
    import requests

    try:
        answer = requests.get(
            uri.rstrip("/") + "/health", timeout=PROBE_WAIT_S, allow_redirects=False
        )
    except requests.exceptions.SSLError:
        return None  # something answers; MLflow has its own settings for certificates
    except requests.exceptions.RequestException as error:
        return str(error)
    if answer.status_code >= 500:
        return f"the server answers with HTTP {answer.status_code}"
    return None
