"""The names of everything in a run folder, and their strict parsing.

In: steps, attempts, ranks. Out: keys, or None for a name that is not one of ours. Pure. Never guesses: a name that
would not be written by this module is not read by it.

    step-000000001000/manifest.json                                 the commit point
    step-000000001000/forgotten.json                                what was the manifest, until `gc` or `unforget`
    step-000000001000/claims/<attempt>.json                         only on stores without conditional writes
    step-000000001000/<attempt>/00003-of-00128.safetensors          an image
    step-000000001000/<attempt>/aborted.json                        this attempt will never be published
    step-000000001000/<attempt>/references.json                     images of other attempts that this one will refer to
    step-000000001000/<attempt>/removing.json                       images that gc is about to remove
    step-000000001000/<attempt>/merge/...                           what the workers of a merge tell each other
    step-000000001000/<attempt>/receipts/00003-of-00128.receipt     a rank's vote
    step-000000001000/<attempt>/receipts/00003-of-00128.failed.json a rank's reason
    events/...                                                      what happened (observe/log.py); no part of a checkpoint
    pins/<name>.json                                                which steps retention leaves, and for whom (pins.py)
"""

from __future__ import annotations

import re
import secrets

from ckpt.errors import InvalidInputError

STEP_MAX = 10**12 - 1
MANIFEST = "manifest.json"
FORGOTTEN = "forgotten.json"
ABORTED = "aborted.json"
PINS = "references.json"
REMOVING = "removing.json"
EVENTS = "events/"

_STEP = re.compile(r"step-([0-9]{12})")
_ATTEMPT = re.compile(r"[0-9a-z-]{8,64}")
_RANKED = re.compile(r"([0-9]{5,9})-of-([0-9]{5,9})\.(.+)", re.DOTALL)


def step_folder(step: int) -> str:
    """Name of the folder of `step`."""
    if not 0 <= step <= STEP_MAX:
        raise InvalidInputError(f"step must be 0 to {STEP_MAX}, found {step}")
    return f"step-{step:012d}"


def parse_step_folder(name: str) -> int | None:
    """The step of a step folder, None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def new_attempt() -> str:
    """An attempt id that nobody else has. One rank makes it, all ranks of the save use it."""
    return secrets.token_hex(16)


def is_attempt(name: str) -> bool:
    """Whether `name` can be an attempt id."""
    return _ATTEMPT.fullmatch(name) is not None


def attempt_folder(step: int, attempt: str) -> str:
    """Key prefix of an attempt, without the final slash."""
    if not is_attempt(attempt):
        raise InvalidInputError(f"not an attempt id (8 to 64 of 0-9, a-z, -): {attempt!r}")
    return f"{step_folder(step)}/{attempt}"


def manifest_key(step: int) -> str:
    """Key whose existence makes `step` a complete checkpoint."""
    return f"{step_folder(step)}/{MANIFEST}"


def forgotten_key(step: int) -> str:
    """Key of the manifest of a forgotten step."""
    return f"{step_folder(step)}/{FORGOTTEN}"


def aborted_key(step: int, attempt: str) -> str:
    """Key whose existence says that `attempt` will never be published."""
    return f"{attempt_folder(step, attempt)}/{ABORTED}"


def pins_key(step: int, attempt: str) -> str:
    """Key of the list of images that the unpublished `attempt` is going to refer to."""
    return f"{attempt_folder(step, attempt)}/{PINS}"


def removing_key(step: int, attempt: str) -> str:
    """Key of the list of images of `attempt` that gc is about to remove."""
    return f"{attempt_folder(step, attempt)}/{REMOVING}"


def claims_prefix(step: int) -> str:
    """Prefix of the claims on `step`."""
    return f"{step_folder(step)}/claims/"


def claim_key(step: int, attempt: str) -> str:
    """Key of the claim of `attempt` on `step`."""
    attempt_folder(step, attempt)  # checks the attempt
    return f"{claims_prefix(step)}{attempt}.json"


def parse_claim(name: str) -> str | None:
    """The attempt of the file `name` in the claims folder, None for any other name."""
    attempt = name.removesuffix(".json")
    return attempt if name.endswith(".json") and is_attempt(attempt) else None


def ranked_name(rank: int, world: int, suffix: str) -> str:
    """`00003-of-00128.<suffix>`."""
    if not 0 <= rank < world < 10**9:
        raise InvalidInputError(f"rank {rank} of {world} is not a rank")
    return f"{rank:05d}-of-{world:05d}.{suffix}"


def parse_ranked(name: str, suffix: str) -> tuple[int, int] | None:
    """Rank and world of a name that `ranked_name` made with this suffix, None for any other."""
    match = _RANKED.fullmatch(name)
    if match is None or match[3] != suffix:
        return None
    rank, world = int(match[1]), int(match[2])
    if not rank < world or ranked_name(rank, world, suffix) != name:
        return None
    return rank, world


def image_name(rank: int, world: int) -> str:
    """File name of the image of `rank`."""
    return ranked_name(rank, world, "safetensors")


def is_image(step: int, attempt: str, file: str) -> bool:
    """Whether these can be the step, the attempt and the name of an image."""
    return 0 <= step <= STEP_MAX and is_attempt(attempt) and parse_ranked(file, "safetensors") is not None


def receipts_prefix(step: int, attempt: str) -> str:
    """Prefix of the receipts of an attempt."""
    return f"{attempt_folder(step, attempt)}/receipts/"


def receipt_key(step: int, attempt: str, rank: int, world: int) -> str:
    """Key of the vote of `rank`."""
    return receipts_prefix(step, attempt) + ranked_name(rank, world, "receipt")


def merge_prefix(step: int, attempt: str) -> str:
    """Prefix of what the workers of a merge leave for each other (ckpt/merge/job.py), until it is published."""
    return f"{attempt_folder(step, attempt)}/merge/"


def failure_key(step: int, attempt: str, rank: int, world: int) -> str:
    """Key of the failure of `rank`."""
    return receipts_prefix(step, attempt) + ranked_name(rank, world, "failed.json")
