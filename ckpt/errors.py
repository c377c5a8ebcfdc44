"""Every error that ckpt raises, grouped by what its handler can do.

In: nothing. Out: exception classes with a stable `kind` and a command-line exit code. Never imports another part of ckpt.

    CheckpointError
      InvalidInputError (ValueError)   the caller passed something that cannot work; fix the call
        MismatchError                  checkpoint and target differ in names, shapes or dtypes
      NotFoundError (LookupError)      no such run or no such step
      AlreadyExistsError               the step exists, or another writer holds it; nothing was touched
      DamagedError                     stored bytes are not what was written
      VersionError                     written by a newer program
      StoreError (OSError)             the store refused or could not be reached
      PeerError                        another agent could not be reached, refused, or sent something wrong
      RankFailedError                  other ranks failed, disagree or are missing
      SaveFailedError                  a background save failed earlier
      AgentError                       the agent of a rank refused, went away or could not be reached
      BudgetError                      not enough free memory for what was asked; nothing was taken
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of all errors of ckpt.

    Args:
        message: one line: the object, the place, what was expected and what was found.
        kind: a stable kebab-case code, for programs. Append-only.
        hints: what to do, one sentence each, with the command to try where there is one.
    """

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, *, kind: str | None = None, hints: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind
        self.hints = hints

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"hint: {hint}" for hint in self.hints)])

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.kind, self.hints))


def _rebuild(cls: type[CheckpointError], message: str, kind: str, hints: tuple[str, ...]) -> CheckpointError:
    return cls(message, kind=kind, hints=hints)


class InvalidInputError(CheckpointError, ValueError):
    """The caller passed something that cannot work. Nothing was changed."""

    kind = "invalid-input"
    exit_code = 2


class MismatchError(InvalidInputError):
    """Checkpoint and target differ. Raised before a byte of the target changes; lists every difference."""

    kind = "mismatch"
    exit_code = 1


class NotFoundError(CheckpointError, LookupError):
    """No such run (`no-run`) or no such checkpoint in it (`no-checkpoint`)."""

    kind = "no-checkpoint"

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 10 if self.kind == "no-run" else 11


class AlreadyExistsError(CheckpointError):
    """The step exists, or another writer is committing it. Nothing was touched."""

    kind = "already-exists"
    exit_code = 12


class DamagedError(CheckpointError):
    """Stored bytes are not the bytes that were written, or not a checkpoint at all."""

    kind = "damaged"
    exit_code = 13


class StoreError(CheckpointError, OSError):
    """The store refused (`denied`, `full`) or could not be reached (`unreachable`)."""

    kind = "store"
    exit_code = 14


class VersionError(CheckpointError):
    """The checkpoint was written in a format newer than this program reads."""

    kind = "newer-format"
    exit_code = 15


class PeerError(CheckpointError):
    """Another agent could not be reached, refused, or sent something wrong; memory that was to be filled is void.

    Kinds: `peer-unreachable`, `peer-stalled`, `peer-late`, `peer-truncated`, `peer-damaged`, `peer-busy`, `peer-refused`,
    `peer-untrusted`, `peer-wrong-version`, `peer-not-held`, `peer-failed`, `peer-replayed`, `peer-no-session`,
    `peer-stopped`; and kinds of the peer's own errors.
    """

    kind = "peer"

    @property
    def retryable(self) -> bool:
        """Whether the same call may work a little later."""
        return self.kind in _RETRYABLE


_RETRYABLE = frozenset(("peer-unreachable", "peer-stalled", "peer-late", "peer-truncated", "peer-damaged", "peer-busy"))


class RankFailedError(CheckpointError):
    """Other ranks failed (`rank-failed`), are missing (`rank-missing`) or disagree (`rank-disagrees`)."""

    kind = "rank-failed"


class SaveFailedError(CheckpointError):
    """A background save failed; raised at the next call. `__cause__` is the first error."""

    kind = "save-failed"


class AgentError(CheckpointError):
    """The agent of a rank refused (`other-run`, `stale-epoch`, `held`, ...), went away or could not be reached (`agent-gone`)."""

    kind = "agent"


class BudgetError(CheckpointError):
    """Not enough free memory for what was asked, with all figures. Nothing was taken."""

    kind = "budget"


def first_line(error: BaseException) -> str:
    """What an error says, without hints; of one that is not ckpt's, its class as well."""
    return error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
