"""Train, kill a rank in the middle of a save, resume on three other layouts, and compare with an undisturbed run.

In: `--out FOLDER` and `--quick`. Out: a table on stdout; `loss.png`, `report.json`, the jobs' logs and the run's
checkpoints in the folder. Exit code 0: everything held; 1: something did not, and the message says what.
`make demo` runs it; what each file of the example shows is in examples/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the root of the repository

from examples.rehearsal.launch import ROOT, DemoError, Outcome, run_phase
from examples.rehearsal.phases import Script, script
from examples.rehearsal.report import draw, judge, print_table, write_json
from examples.rehearsal.screen import Screen

COMMAND_LINE_S = 120.0  # the longest that `ckpt ls` may take
PRODUCTS = ("runs", "logs", "loss.png", "report.json")


def main() -> int:
    """Run all phases; the exit code."""
    options = _parse_options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # so that its jobs end with it
    out: Path = options.out.resolve()
    start_s = time.monotonic()
    try:
        _clear(out)
        verdicts = judge(_run_all(script(quick=options.quick), out))
        draw(verdicts, out / "loss.png")
        write_json(verdicts, out / "report.json")
        print_table(verdicts)
        _show_run(out / "runs" / "gpt")
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no process is left", file=sys.stderr)
        return 130
    violated = [verdict for verdict in verdicts if not verdict.holds]
    for verdict in violated:
        print(
            f"error: phase `{verdict.outcome.phase.name}`: losses should be {verdict.bound_text} from the undisturbed"
            f" run's, found {verdict.worst:.3e}",
            file=sys.stderr,
        )
    print(f"{out / 'loss.png'}: the curves; {time.monotonic() - start_s:.0f} s in all")
    return 1 if violated else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_all(plan: Script, out: Path) -> list[Outcome]:
    outcomes = []
    with Screen() as screen:
        for phase in plan.phases:
            screen.begin(phase)
            outcome = run_phase(phase, plan, out, screen.update)
            screen.end(outcome)
            outcomes.append(outcome)
    return outcomes


def _clear(out: Path) -> None:
    """Remove what an earlier demo left; DemoError for a folder that is somebody else's."""
    out.mkdir(parents=True, exist_ok=True)
    foreign = [entry.name for entry in out.iterdir() if entry.name not in PRODUCTS]
    if foreign:
        raise DemoError(f"{out} should be empty or hold an earlier demo, found `{sorted(foreign)[0]}`")
    for name in PRODUCTS:
        entry = out / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _show_run(run: Path) -> None:
    """What the command line says of the interrupted run."""
    if importlib.util.find_spec("ckpt.__main__") is None:
        return
    for words in (["ls", str(run)], ["show", f"{run}@latest"]):
        print(f"\n$ ckpt {' '.join(words)}", flush=True)
        try:
            code = subprocess.run([sys.executable, "-m", "ckpt", *words], cwd=ROOT, timeout=COMMAND_LINE_S).returncode
        except subprocess.TimeoutExpired:
            raise DemoError(f"`ckpt {words[0]}` took longer than {COMMAND_LINE_S:.0f} s") from None
        if code != 0:
            raise DemoError(f"`ckpt {words[0]}` ended with exit code {code}")
    print()


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything it makes")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps, for the tests")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
