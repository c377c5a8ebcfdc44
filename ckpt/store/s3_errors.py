"""Say what a failed S3 request means.

In: the exception of s3fs or botocore. Out: a `ckpt.errors` class with a hint. Pure. Never shows a credential: messages
are built from codes, and from the server's own text only.
"""

from __future__ import annotations

import asyncio
from typing import Any

import botocore.exceptions
from fsspec.exceptions import FSTimeoutError

from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, NotFoundError, StoreError

_DENIED = {
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "Forbidden", "InvalidAccessKeyId",
    "InvalidSecurity", "InvalidToken", "NotSignedUp", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "UnauthorizedAccess", "401", "403",
}  # fmt: skip
_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "409", "412"}
_BUSY = {
    "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "TooManyRequests", "429", "500",
    "502", "503", "504",
}  # fmt: skip
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}
_UNSUPPORTED = {"MethodNotAllowed", "NotImplemented", "405", "501"}
_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.TokenRetrievalError,
)
_UNREACHABLE = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,
    FSTimeoutError,
    TimeoutError,
    asyncio.TimeoutError,
    ConnectionError,
)
_CREDENTIAL_HINT = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or the profile, and what they may do"
)
_ADDRESS_HINT = "check AWS_ENDPOINT_URL, the network, and that the server runs"


def code_of(error: BaseException) -> str:
    """The S3 error code, or the HTTP status where the answer had no body; empty for anything else."""
    response: Any = None
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None) or response
    if not isinstance(response, dict):
        return ""
    code = str(response.get("Error", {}).get("Code", ""))
    return code or str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def error_of(error: BaseException, *, url: str, key: str, verb: str) -> CheckpointError | None:
    """The `ckpt` error for `error`; None when it is none of S3 (then it is a bug of ours and should pass)."""
    place = f"`{key}` in {url}" if key else url
    code = code_of(error)
    reason = f"{code}: {error}" if code and code not in str(error) else str(error) or type(error).__name__
    text = f"cannot {verb} {place}: {reason}"
    if code == "NoSuchBucket":
        return StoreError(f"no such bucket: {place}", kind="no-bucket", hints=("make the bucket, or check its name",))
    if code in ("NoSuchKey", "404") or (not code and isinstance(error, FileNotFoundError)):
        return NotFoundError(f"no object {place}", kind="no-object")
    if code == "NoSuchUpload":
        return NotFoundError(f"no such upload of {place}", kind="no-object")
    if code in ("InvalidRange", "416"):
        return DamagedError(f"{place} is truncated: it ends before the bytes wanted", kind="truncated")
    if code in _REFUSED:
        return AlreadyExistsError(f"{place} exists already, or is being written ({code})")
    if code in _DENIED or isinstance(error, (*_NO_CREDENTIALS, PermissionError)):
        return StoreError(text, kind="denied", hints=(_CREDENTIAL_HINT,))
    if code in _FULL:
        return StoreError(text, kind="full")
    if code in _UNSUPPORTED:
        return StoreError(text, kind="unsupported")
    if code in _REGION:
        return StoreError(text, kind="wrong-region", hints=("set AWS_REGION to the region of the bucket",))
    if code in _BUSY or isinstance(error, _UNREACHABLE):
        return StoreError(text, kind="unreachable", hints=(_ADDRESS_HINT,))
    if isinstance(error, botocore.exceptions.ParamValidationError) or "Invalid endpoint" in str(error):
        return InvalidInputError(text, hints=(_ADDRESS_HINT,))
    if code or isinstance(error, botocore.exceptions.BotoCoreError | botocore.exceptions.ClientError | OSError):
        return StoreError(text, kind="io")
    return None
