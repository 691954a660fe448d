"""What the client of the Hub says when something goes wrong, as one line that says what to do."""

from __future__ import annotations

from sinktrain.data.hub import unsigned_line

_AGAIN = "run the same command again, and it continues"


def explanation(error: BaseException, subject: str, endpoint: str) -> str:
    """The line for any error of the client; a token may still be in it.

    Args:
        subject: repository, or what else was asked for.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    error = _deepest(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and publishing needs the network; unset it"
    if isinstance(error, GatedRepoError):
        return f"{subject} is gated; ask for access at {endpoint}/{subject}, then {_AGAIN}"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error.response.status_code, error.server_message, subject, endpoint)
    if "xet" in str(error).lower():
        problem = f"{endpoint} does not take {subject} by Xet: {unsigned_line(error)}"
        return f"{problem}; set HF_HUB_DISABLE_XET=1, then {_AGAIN}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; mend that, then {_AGAIN}"
    return f"{endpoint} cannot be reached, or broke off: {unsigned_line(error)}; {_AGAIN}"


def _deepest(error: BaseException) -> BaseException:
    """What the client wraps in advice of its own."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


_REMEDIES = {
    401: "the Hub does not know the token; log in again: hf auth login (HF_TOKEN, if set, comes first)",
    403: "the token may not write there; use one that may, or another --repo-id",
    404: "the Hub has it not, or hides it from this token; mend the name, or log in as who may see it",
    409: "something of this name is there already; choose another",
    412: f"its branch moved meanwhile; see who else publishes there, then {_AGAIN}",
    413: "the Hub finds it too large; publish it in parts",
    429: f"the Hub asks for a pause; wait some minutes, then {_AGAIN}",
}


def _refusal(status: int, says: str | None, subject: str, endpoint: str) -> str:
    remedy = _REMEDIES.get(status)
    if remedy is None:
        remedy = (
            f"{endpoint} has a problem of its own; {_AGAIN}" if status >= 500 else "mend that, and try again"
        )
    reason = f' "{" ".join(says.split())}"' if says else ""
    return f"{subject}: refused ({status}){reason}; {remedy}"
