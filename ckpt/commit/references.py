"""Images that one attempt refers to and another one wrote: how the two are kept from missing each other.

In: manifests, as bytes, and the small records that a save and gc leave for each other. Out: which images are needed, or the error
that a save may not be published. Never removes an image, never follows a reference further than one step: a manifest names the
image in which the bytes are.

A save that refers to images of earlier attempts (the committer, between steps 4 and 5 of publish.py):

    a. its `references.json` is durable: the images that it is going to refer to
    b. it looks at each of these attempts: every image is there, and none is named by a `removing.json`
    c. it publishes; from now on its manifest says what it needs

gc, for images that nothing needs (gc.py):

    a. the `removing.json` of their attempts are durable
    b. it looks at all manifests, forgotten ones too, and at the `references.json` of all attempts that may still be published
    c. it removes what is still needed by none, then `removing.json`

Each writes its own record before it looks at the other's, so at least one of the two gives way: gc keeps the image, or the save
fails before it is published. No clock is involved. A committer that slept until gc called its attempt dead is fenced by
`aborted.json` as ever, and its `references.json` no longer counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.receipts import read_record
from ckpt.errors import DamagedError, NotFoundError, RankFailedError, StoreError, VersionError
from ckpt.format import manifest
from ckpt.store.base import Store

_LOOKS_AT_ONCE = 8


def needed_by(data: bytes, *, name: str) -> dict[str, int]:
    """Keys of the images of other attempts that a manifest refers to, and their sizes.

    DamagedError or VersionError when that cannot be known: then no image of the run may be removed.
    """
    record = read_record(data)
    if not record:
        raise DamagedError(f"`{name}` is damaged: not a JSON object")
    version = record.get("version", manifest.FORMAT_VERSION)
    if not record.get("requires") and manifest.REFERENCES not in record and version == manifest.FORMAT_VERSION:
        return {}
    found = manifest.unpack(data, name=name).references
    if not all(names.is_image(one.step, one.attempt, one.file) for one in found):
        raise DamagedError(f"`{name}` is damaged: it refers to what is no image", kind="bad-names")
    return {f"{names.attempt_folder(one.step, one.attempt)}/{one.file}": one.nbytes for one in found}


def pin(store: Store, step: int, attempt: str, data: bytes) -> None:
    """Steps a and b of a save, with its manifest. Nothing to do when it refers to nothing.

    RankFailedError (`base-removed`): an image is gone or about to go. Nothing was published; a save that refers to nothing works.
    """
    needed = needed_by(data, name=names.manifest_key(step))
    if not needed:
        return
    failpoints.hit("references.before-pin")
    store.put(names.pins_key(step, attempt), json.dumps({"images": sorted(needed)}).encode())
    failpoints.hit("references.after-pin")
    folders = sorted({key.rsplit("/", 1)[0] for key in needed})
    with ThreadPoolExecutor(min(_LOOKS_AT_ONCE, len(folders)), thread_name_prefix="ckpt-references") as pool:
        sizes = {
            key: n for found in pool.map(lambda folder: _files(store, folder), folders) for key, n in found.items()
        }
    for key, nbytes in sorted(needed.items()):
        if sizes.get(key) != nbytes:
            raise RankFailedError(
                f"step {step} refers to `{key}`, which was removed while it was being saved",
                kind="base-removed",
                hints=("the next save refers to nothing and writes everything",),
            )


def unpin(store: Store, step: int, attempt: str, data: bytes) -> None:
    """After the attempt is published: its manifest says it now. What cannot be removed means nothing any more."""
    with contextlib.suppress(StoreError):
        if needed_by(data, name=names.manifest_key(step)):
            store.delete([names.pins_key(step, attempt)])


def pinned(store: Store, step: int, attempt: str) -> set[str]:
    """Keys of the images that the unpublished `attempt` is going to refer to."""
    try:
        return _keys_in(store.read(names.pins_key(step, attempt)))
    except NotFoundError:
        return set()


def mark_removing(store: Store, step: int, attempt: str, keys: Iterable[str]) -> None:
    """Step a of gc."""
    store.put(names.removing_key(step, attempt), json.dumps({"images": sorted(keys)}).encode())


def unmark_removing(store: Store, step: int, attempt: str) -> None:
    """The images are gone, or stay."""
    store.delete([names.removing_key(step, attempt)])


def manifests(store: Store, step: int) -> list[tuple[str, bytes]]:
    """What the manifest and the forgotten manifest of a step say now, with their keys.

    Forgotten, complete, forgotten: `forget` and `unforget` write the new one before they delete the old one, so a step that
    changes from one to the other meanwhile is seen as at least one of them.
    """
    found: dict[str, bytes] = {}
    for key in (names.forgotten_key(step), names.manifest_key(step), names.forgotten_key(step)):
        try:
            found.setdefault(key, store.read(key))
        except NotFoundError:
            continue
    return sorted(found.items())


def needed_in(store: Store, steps: Sequence[int]) -> set[str] | None:
    """Step b of gc: keys of all images that something refers to, or is going to; None when a manifest cannot be read.

    Args:
        steps: every step that has a folder, listed after step a.
    """
    needed: set[str] = set()
    try:
        with ThreadPoolExecutor(_LOOKS_AT_ONCE, thread_name_prefix="ckpt-references") as pool:
            # Pins first: one that is gone by now was replaced by a manifest, and that is read later.
            for keys in pool.map(lambda step: _pinned_at(store, step), steps):
                needed |= keys
            for found in pool.map(lambda step: manifests(store, step), steps):
                for name, data in found:
                    needed |= needed_by(data, name=name).keys()
    except (DamagedError, VersionError):
        return None
    return needed


def _pinned_at(store: Store, step: int) -> set[str]:
    """What the attempts at a step that are not aborted are going to refer to."""
    keys = {entry.key for entry in store.list(names.step_folder(step) + "/")}
    attempts = {key.split("/")[1] for key in keys if key.count("/") == 2 and key.endswith("/" + names.PINS)}
    alive = [attempt for attempt in attempts if names.is_attempt(attempt)]
    alive = [attempt for attempt in alive if names.aborted_key(step, attempt) not in keys]
    return {key for attempt in alive for key in pinned(store, step, attempt)}


def _files(store: Store, folder: str) -> dict[str, int]:
    """Sizes of the files of an attempt, without those that gc is about to remove."""
    sizes = {entry.key: entry.nbytes for entry in store.list(folder + "/")}
    mark = f"{folder}/{names.REMOVING}"
    if mark not in sizes:
        return sizes
    try:
        going = _keys_in(store.read(mark))
    except NotFoundError:  # that gc is through: what it removed is no longer there
        return {entry.key: entry.nbytes for entry in store.list(folder + "/")}
    return {key: n for key, n in sizes.items() if key not in going}


def _keys_in(data: bytes) -> set[str]:
    images = read_record(data).get("images")
    if not isinstance(images, list):
        raise DamagedError("a list of images is damaged")
    return {str(key) for key in images}
