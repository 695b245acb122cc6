"""Processes for runs side by side end with whoever asked for them."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

WAITS = """
import os, sys, time
from gossipfl.scenario.pool import processes

def wait_long(number):
    time.sleep(600)

if __name__ == "__main__":
    with processes(2) as pool:
        pids = [pool.submit(os.getpid).result() for _ in range(1)]
        waiting = [pool.submit(wait_long, number) for number in range(2)]
        print("ready", flush=True)
        waiting[0].result()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_of_a_pool_outlives_its_parent(number, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
        parent.send_signal(number)
        parent.wait(20)
        assert psutil.wait_procs(children, timeout=20)[1] == []
    finally:
        parent.kill()
        parent.stdout.close()
