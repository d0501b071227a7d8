"""Measurements that need a process of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from jdsi.errors import JdsiError

_WORKER = Path(__file__).with_name("worker.py")


def ask(job: str, **settings: Any) -> dict[str, Any]:
    """Runs a job of `worker.py` in a fresh process and returns its answer.

    Raises:
        JdsiError: the process failed; the message holds its last words.
    """
    # -P: the worker's folder, with names as common as `start`, must not be where its imports are looked for first.
    command = [sys.executable, "-P", str(_WORKER), json.dumps({"job": job, **settings}, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JdsiError(f"the process measuring {job!r} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
