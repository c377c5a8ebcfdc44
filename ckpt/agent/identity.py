"""What an agent is for, and where its files lie.

In: the URL of a run, rank and world size, options. Out: a frozen record and paths in folders of this user only. A folder that is
a link, that others may enter or that belongs to somebody else is refused, never repaired.

    <runtime>/<run id>/00003.sock      what its trainer connects to
    <runtime>/<run id>/00003.lock      locked by the agent while it lives, holds its pid
    <runtime>/<run id>/00003.json      its incarnation and the newest epoch it saw
    <runtime>/<run id>/00003.log       its events (and 00003.log.1, those before)
    <runtime>/<run id>/00003.err       its stderr
    <memory>/ckpt-<uid>/<run id>-00003-<token>.seg            its shared memory
    <memory>/ckpt-<uid>-parity/<run id>-00003-<token>.seg     the parity that it holds
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from ckpt.config import WORLD_MAX, Options
from ckpt.errors import InvalidInputError

PROTOCOL = (1, 0)  # major, minor, of the local socket
SOCKET_PATH_BYTES_MAX = 107  # sun_path of sockaddr_un, without its zero
_RUN_FOLDER = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose snapshots an agent holds. `world` is that of the trainer that started it."""

    run_id: uuid.UUID
    rank: int
    world: int
    protocol: tuple[int, int] = PROTOCOL
    incarnation: int = 0  # of the agent, higher at each start; 0 for who only asks for one

    def __post_init__(self) -> None:
        if not 1 <= self.world <= WORLD_MAX or not 0 <= self.rank < self.world:
            raise InvalidInputError(f"rank must be in [0, world), found rank {self.rank} of world {self.world}")

    @property
    def label(self) -> str:
        """`00003-of-00008`, for messages."""
        return f"{self.rank:05d}-of-{self.world:05d}"


def run_id_of(url: str) -> uuid.UUID:
    """The id of a run by its URL; a local path counts as absolute, with links followed. Equal on all nodes for equal URLs."""
    if "://" not in url:
        url = Path(url).resolve().as_uri()
    return uuid.uuid5(uuid.NAMESPACE_URL, url.rstrip("/"))


@dataclass(frozen=True, kw_only=True)
class Places:
    """The files of one agent; see above."""

    folder: Path
    rank: int

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / f"{self.rank:05d}.sock"

    @property
    def lock(self) -> Path:
        """What it locks."""
        return self.folder / f"{self.rank:05d}.lock"

    @property
    def state(self) -> Path:
        """What the next one has to know."""
        return self.folder / f"{self.rank:05d}.json"

    @property
    def log(self) -> Path:
        """What happened."""
        return self.folder / f"{self.rank:05d}.log"

    @property
    def stderr(self) -> Path:
        """What nobody expected."""
        return self.folder / f"{self.rank:05d}.err"


def places(identity: Identity, options: Options) -> Places:
    """The files of an agent; makes its folder. InvalidInputError (`unsafe-folder`, `long-path`) where that cannot be."""
    runtime = runtime_folder(options)
    out = Places(folder=runtime / identity.run_id.hex, rank=identity.rank)
    if len(os.fsencode(out.socket)) > SOCKET_PATH_BYTES_MAX:
        raise InvalidInputError(
            f"socket path `{out.socket}` has {len(os.fsencode(out.socket))} bytes, at most {SOCKET_PATH_BYTES_MAX} are possible",
            kind="long-path",
            hints=("set CKPT_AGENT_RUNTIME_FOLDER to a folder with a short name",),
        )
    make_private(runtime)
    make_private(out.folder)
    return out


def runtime_folder(options: Options) -> Path:
    """The folder of this user's sockets and locks; may be missing."""
    if options.agent_runtime_folder:
        return Path(options.agent_runtime_folder).absolute()
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and Path(given).is_dir() and Path(given).stat().st_uid == os.geteuid():
        return Path(given).absolute() / "ckpt"
    return _by_user(Path("/tmp"))


def runtime_folders(options: Options) -> list[Path]:
    """Every folder in which an agent of this user may have been started, whatever XDG_RUNTIME_DIR was then."""
    if options.agent_runtime_folder:
        return [runtime_folder(options)]
    return list(
        dict.fromkeys([runtime_folder(options), Path(f"/run/user/{os.geteuid()}/ckpt"), _by_user(Path("/tmp"))])
    )


def memory_folder(options: Options) -> Path:
    """The folder of this user's segments; may be missing."""
    return _by_user(Path(options.agent_memory_folder).absolute())


def parity_folder(options: Options) -> Path:
    """The folder of this user's segments of parity; may be missing."""
    folder = memory_folder(options)
    return folder.with_name(f"{folder.name}-parity")


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter, or check that it is one. Never follows a link in its last component."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise InvalidInputError(f"folder `{folder}` cannot be made: {error.strerror}", kind="unsafe-folder") from error
    check_private(folder)


def check_private(folder: Path) -> None:
    """InvalidInputError (`unsafe-folder`) unless it is a folder, not a link to one, of this user, closed to all others."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is a link or no folder"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, not to {os.geteuid()}"
    elif stat.S_IMODE(found.st_mode) & 0o077:
        wrong = f"has mode {stat.S_IMODE(found.st_mode):04o}, expected 0700"
    else:
        return
    raise InvalidInputError(
        f"folder `{folder}` {wrong}",
        kind="unsafe-folder",
        hints=(f"look at it with ls -ld {folder}; remove it if you may",),
    )


def private_folders(runtime: Path) -> list[Path]:
    """The folders of runs in a runtime folder, as far as both are this user's alone; none where there are none."""
    out = []
    try:
        check_private(runtime)
        found = sorted(path for path in runtime.iterdir() if _RUN_FOLDER.fullmatch(path.name))
    except (OSError, InvalidInputError):
        return []
    for folder in found:
        try:
            check_private(folder)
        except (OSError, InvalidInputError):
            continue
        out.append(folder)
    return out


def _by_user(folder: Path) -> Path:
    return folder / f"ckpt-{os.geteuid()}"
