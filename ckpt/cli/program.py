"""The `ckpt` program: parse the arguments, run one command, turn every outcome into an exit code.

In: arguments. Out: an exit code; `main` ends the process with it. Every error passes through `run` and nowhere else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from ckpt.cli.agent import agent
from ckpt.cli.copy import copy
from ckpt.cli.delta import delta
from ckpt.cli.diff import diff
from ckpt.cli.doctor import doctor
from ckpt.cli.exit_codes import BUG, DONE, FAILED, INTERRUPTED, USAGE, epilog
from ckpt.cli.explain import explain
from ckpt.cli.export import export
from ckpt.cli.forget import forget
from ckpt.cli.gc import gc
from ckpt.cli.lora import lora
from ckpt.cli.ls import ls
from ckpt.cli.merge import merge
from ckpt.cli.plan import plan
from ckpt.cli.printer import Printer, describe
from ckpt.cli.recover import recover
from ckpt.cli.report import report
from ckpt.cli.reshard import reshard
from ckpt.cli.search import search
from ckpt.cli.show import show
from ckpt.cli.simulate import simulate
from ckpt.cli.tensors import tensors
from ckpt.cli.unforget import unforget
from ckpt.cli.unmerge import unmerge
from ckpt.cli.verify import verify
from ckpt.cli.watch import watch
from ckpt.commit.complete import PROGRAM
from ckpt.errors import CheckpointError


@click.group(name="ckpt", epilog=epilog(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(PROGRAM.split()[1], "--version", prog_name="ckpt", message="%(prog)s %(version)s")
def ckpt() -> None:
    """Look after the checkpoints of a training run.

    URL is a folder or an fsspec URL such as s3://bucket/run. URL@STEP, URL@latest and URL@A..B name checkpoints in it.
    """


for _command in (
    ls,
    show,
    tensors,
    verify,
    diff,
    plan,
    reshard,
    copy,
    merge,
    search,
    watch,
    delta,
    lora,
    explain,
    unmerge,
    export,
    report,
    forget,
    unforget,
    gc,
    simulate,
    agent,
    recover,
    doctor,
):
    ckpt.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Says everything itself, raises nothing."""
    flags = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    # Looked at here as well, so that an error in the arguments themselves is told in the form asked for.
    printer = Printer(json="--json" in flags, traceback="--traceback" in flags)
    try:
        code = ckpt.main(args=list(arguments), prog_name="ckpt", standalone_mode=False, obj=printer)
        return code if isinstance(code, int) else DONE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else "", err=True)
        return USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hints = (f"{context.command_path} --help",) if context is not None else ("ckpt --help",)
        printer.error(error.format_message(), kind="usage", exit_code=USAGE, hints=hints)
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        printer.trace()
        printer.error("interrupted", kind="interrupted", exit_code=INTERRUPTED)
        return INTERRUPTED
    except CheckpointError as error:
        printer.trace()
        describe(error, printer)
        return error.exit_code
    except BrokenPipeError:
        _leave_stdout()
        return FAILED
    except Exception as error:  # the last line of defence: whatever comes here is our bug
        printer.trace()
        hints = ("please report this, with what `--traceback` adds and what `ckpt doctor` prints",)
        printer.error(f"a bug in ckpt: {type(error).__name__}: {error}", kind="bug", exit_code=BUG, hints=hints)
        return BUG


def main() -> None:
    """The entry point of the `ckpt` command."""
    sys.exit(run(sys.argv[1:]))


def _leave_stdout() -> None:
    """Whoever read our output has gone (`| head`): the interpreter must not fail again when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
