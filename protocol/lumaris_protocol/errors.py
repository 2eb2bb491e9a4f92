"""Errors of the protocol. Their text is what a user reads.

    LumarisError                 what a user can act on: code, message, hint, whether money moved
    +-- LocalError               our own misuse: a bug on this side
    |   +-- InvalidTransition    a machine was given a fact that its state forbids
    +-- RemoteError              the other side broke a rule, or refused us
        +-- EnvelopeError        bytes that are not a valid signed document
        +-- ViolationError       a valid document that breaks the session's rules
        +-- RefusedError         the other side said no, with its code

Each code stands in `codes.py` with its meaning, its hint and the exit code of the command.
"""

from __future__ import annotations

from lumaris_protocol import codes


class LumarisError(Exception):
    """A failure with a stable code, a cause, whether money moved, and the next step."""

    def __init__(
        self, code: str, message: str = "", *, hint: str = "", money_moved: bool = False
    ) -> None:
        entry = codes.CODES[code]
        self.code = code
        self.message = message or entry.meaning
        self.hint = hint or entry.hint
        self.money_moved = money_moved
        super().__init__(f"{code}: {self.message}")

    @property
    def exit_code(self) -> int:
        """Exit status of the `lumaris` command for this failure."""
        return codes.CODES[self.code].exit_code

    def to_json(self) -> dict[str, object]:
        """The error as the `error` member of JSON output and of refusals on the wire."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "money_moved": self.money_moved,
        }


class LocalError(LumarisError):
    """Our own misuse of the protocol: a bug on this side, never the peer's doing."""


class InvalidTransition(LocalError):  # noqa: N818 - the name the field uses
    """A machine was given a fact that its state forbids. Carries the last facts for a replay."""

    def __init__(self, machine: str, state: str, fact: str, story: tuple[str, ...] = ()) -> None:
        self.machine, self.state, self.fact, self.story = machine, state, fact, story
        trail = f" (after {', '.join(story)})" if story else ""
        super().__init__("invalid_transition", f"{machine} in {state} cannot take {fact}{trail}")


class RemoteError(LumarisError):
    """The other side broke a rule or refused."""


class EnvelopeError(RemoteError):
    """Bytes that are not a valid signed document: malformed, forged, foreign, stale or oversize."""


class ViolationError(RemoteError):
    """A validly signed document that breaks the rules of its session. It is evidence."""


class RefusedError(RemoteError):
    """The other side said no."""
