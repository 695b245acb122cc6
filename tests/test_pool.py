"""Processes for runs side by side end with whoever asked for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from gossipfl.scenario.interrupts import interrupts_held, terminate_is_interrupt

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


LOCKS = """
import os, signal, sys, threading, time
from gossipfl.scenario.pool import processes

def wait_long(number):
    time.sleep(600)

def interrupt(frame, event, argument):
    if event == "line":
        interrupt.left -= 1
        if interrupt.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return interrupt

if __name__ == "__main__":
    interrupt.left = int(sys.argv[1])
    with processes(1) as pool:
        pool.submit(wait_long, 0)
        late = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))  # where there are fewer lines
        late.daemon = True
        late.start()
        sys.settrace(interrupt)
        pool.next_done()
"""


@pytest.mark.processes
@pytest.mark.parametrize("line", [1, 2, 3])
def test_an_interrupt_at_any_line_of_the_waiting_leaves_nothing_locked_that_the_end_waits_for(line, tmp_path):
    script = tmp_path / "locks.py"
    script.write_text(LOCKS)
    with subprocess.Popen([sys.executable, str(script), str(line)], stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.wait(60) == -signal.SIGINT
            assert parent.stderr is not None and "KeyboardInterrupt" in parent.stderr.read()
        finally:
            parent.kill()


RUNS = """
import os, sys
from gossipfl import run
from gossipfl.scenario.pool import processes
from gossipfl.scenario.results import Observer

class Tells(Observer):
    def event(self, event, alive):
        if event["event"] == "round" and event["round"] == 1:
            print("ready", flush=True)

def run_long(folder):
    run("quickstart", overrides=["rounds=1000000", "evaluate_every=0"], clock="virtual", out=folder, observer=Tells())

if __name__ == "__main__":
    with processes(1) as pool:
        pool.submit(run_long, sys.argv[1]).result()
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_runs_of_a_pool_end_with_a_signal_to_all_as_a_terminal_sends_it(number, tmp_path):
    script = tmp_path / "runs.py"
    script.write_text(RUNS)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            children = psutil.Process(parent.pid).children(recursive=True)
            os.killpg(parent.pid, number)
            parent.wait(20)
            assert psutil.wait_procs(children, timeout=20)[1] == []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_reproduction_says_so_and_ends(number, tmp_path):
    command = [sys.executable, "-m", "gossipfl", "reproduce", "epidemic", "--jobs", "2", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "GOSSIPFL_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment) as parent:
        try:
            assert parent.stderr is not None
            assert parent.stderr.readline() == f"18 arms, 2 at once, records in {tmp_path / 'out'}/\n"
            os.killpg(parent.pid, number)
            told = f"interrupted: 0 of 18 arms are done, with records in {tmp_path / 'out'}/; "
            assert parent.stderr.read() == f"{told}the same command goes on from there\n"
            assert parent.wait(20) == 130
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupt_that_another_thread_takes_waits_as_well(number):
    is_over, (told, tell) = threading.Event(), os.pipe()
    other = threading.Thread(target=is_over.wait)  # which lets it through
    other.start()
    os.set_blocking(tell, False)
    before, has_waited = signal.set_wakeup_fd(tell), False
    try:
        with terminate_is_interrupt(), pytest.raises(KeyboardInterrupt), interrupts_held():
            signal.pthread_kill(other.ident, number)
            assert os.read(told, 1) == bytes([number]), "it has been taken"
            has_waited = True
    finally:
        signal.set_wakeup_fd(before)
        is_over.set()
        other.join()
        os.close(told)
        os.close(tell)
    assert has_waited
