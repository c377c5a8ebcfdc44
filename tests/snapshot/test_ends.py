"""A process that is told to end finishes its saves within the grace time, or gives them up cleanly.

Method: a real process that trains and gets a real SIGTERM.
"""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys

from ckpt.commit import find
from ckpt.config import Options
from ckpt.store.open import open_store

ROOT = pathlib.Path(__file__).resolve().parents[2]

JOB = """
import sys, time, torch, ckpt
net = torch.nn.Linear(400, 400)
optimizer = torch.optim.AdamW(net.parameters())
state = {"net": net, "optimizer": optimizer}
with ckpt.Checkpointer("run", every=1, options=ckpt.Options(chunk_bytes=65536, terminate_grace_s=float(sys.argv[1]))) as c:
    for step in range(1000):
        net(torch.randn(8, 400)).square().mean().backward()
        optimizer.step()
        c.step(step, state)
        print(step, flush=True)
        time.sleep(0.2)
"""


def terminated_job(folder: pathlib.Path, grace_s: float, failpoint: str) -> tuple[int, list[int], str]:
    """Exit code, complete steps, stderr of a job that gets SIGTERM after its third step."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(grace_s)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CKPT_FAILPOINT": failpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.strip() == "2":
            break
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    return job.returncode, find.steps(open_store(folder / "run", options=Options())), errors


def test_sigterm_finishes_the_saves_on_their_way(tmp_path: pathlib.Path) -> None:
    code, steps, errors = terminated_job(tmp_path, 30.0, "save.before-image:delay=0.5")

    assert (code, steps) == (143, [0, 1, 2]), errors


def test_sigterm_gives_up_what_the_grace_time_does_not_suffice_for(tmp_path: pathlib.Path) -> None:
    """What was given up says so in the store: nobody waits for it, nobody takes it for a checkpoint, gc may have it."""
    code, steps, errors = terminated_job(tmp_path, 0.3, "save.before-image:delay=2")

    left = [json.loads(file.read_text()) for file in (tmp_path / "run").rglob("aborted.json")]
    assert (code, "was given up" in str(left), len(steps) < 3) == (143, True, True), (steps, left, errors)


FORKS = """
import multiprocessing, torch, ckpt
state = {"w": torch.arange(3_000_000)}
checkpointer = ckpt.Checkpointer("run", every=1)
checkpointer.step(1, state)
child = multiprocessing.get_context("fork").Process(target=int)
child.start()
child.join(20)
print("child", child.exitcode, flush=True)
checkpointer.close()
"""


def test_a_forked_child_ends_by_itself_and_takes_no_save_with_it(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CKPT_FAILPOINT": "save.before-image:delay=2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    steps = find.steps(open_store(tmp_path / "run", options=Options()))
    assert ("child 0" in done.stdout, done.returncode, steps) == (True, 0, [1]), (done.stdout, done.stderr)
