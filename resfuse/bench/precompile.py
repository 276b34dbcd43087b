"""torch.compile in a process of its own, which can be stopped at a deadline; what it compiled stays in Inductor's
cache, where this process then finds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch

from ..kernels.interface import Reason
from .implementations import IMPLEMENTATIONS
from .workloads import make


def precompile(
    subject: str, mode: str, batch: int, implementation: str, device: torch.device | str, seconds: float
) -> float | Reason:
    """Seconds that the first step took, compilation included, or the reason why there was none."""
    arguments = [subject, mode, str(batch), implementation, str(device), str(torch.get_num_threads())]
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its compilers are in its group and stop with it
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Reason("compile_budget", f"torch.compile had not ended after {seconds:.0f} s")
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        return Reason("compile_failed", (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return float(out.split()[-1])


def main(subject: str, mode: str, batch: str, implementation: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    runner = make(subject, mode, int(batch), device).runner(IMPLEMENTATIONS[implementation])
    began = time.perf_counter()
    runner.step()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
