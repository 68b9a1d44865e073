"""Commands in forks of a process that has imported torch already, which takes longer than most of what the tests start.

A fork runs its script as __main__ and ends as the script ends: status, stdout and stderr are its own. What a fresh
interpreter or torchrun itself adds is seen where a test starts these, with command() of tests/runs.py."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from runs import ROOT, environment

SERVER = """
import gc, json, os, runpy, signal, sys
import torch, torch._dynamo, torchvision, PIL.Image, tokenizers, common, data, evaluate
sys.modules["matplotlib"] = None  # curves.png takes longer than the runs
gc.freeze()  # or the first collection in a fork would copy all pages
running = set()
for line in sys.stdin:
    job = json.loads(line)
    if "poll" in job:
        pid, status = os.waitpid(job["poll"], os.WNOHANG)
        running.discard(pid)
        print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)
        continue
    if pid := os.fork():
        running.add(pid)
        print(pid, flush=True)
        continue
    os.setsid()
    for number, path in enumerate(["/dev/null", job["out"], job["err"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    exec(job["before"])
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
for pid in running:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
"""


class Program:
    """A command that runs in a fork of the server. before: Python to run first, in the same process."""

    def __init__(self, server, script, *flags, before="", env=None):
        self.server, self.where = server, server.root / f"command{next(server.numbers)}"
        self.where.mkdir()
        job = {"argv": [str(ROOT / script), *map(str, flags)], "env": env or {}, "before": before}
        self.pid = int(
            server.ask(out=f"{self.where}.out", err=f"{self.where}.err", cwd=str(self.where), **job)
        )

    def wait(self, seconds=300):
        """-> CompletedProcess, as subprocess.run gives it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            status = self.server.ask(poll=self.pid)
            if status != "running":
                texts = [Path(f"{self.where}.{end}").read_text() for end in ("out", "err")]
                return subprocess.CompletedProcess([], int(status), *texts)
            time.sleep(0.005)
        os.killpg(self.pid, signal.SIGKILL)
        raise TimeoutError(Path(f"{self.where}.err").read_text())


class Server:
    def __init__(self, root):
        self.root, self.numbers = root, itertools.count()
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment(), **pipes)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)

    def ask(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def run(self, script, *flags, **options):
        return Program(self, script, *flags, **options).wait()

    def run_on(self, processes, script, *flags, before=""):
        """Processes of one group, with the environment that torchrun gives them. before: of all, or one for each.
        -> all of them, finished, in the order of their ranks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(processes))
        befores, group = [before] * processes if isinstance(before, str) else before, []
        for rank, code in enumerate(befores):
            rank_env = env | dict.fromkeys(["RANK", "LOCAL_RANK"], str(rank))
            group.append(Program(self, script, *flags, before=code, env=rank_env))
        return [program.wait() for program in group]

    def together(self, script, *flags, processes=2):
        """Such a group, of which all processes must end well. -> CompletedProcess with what they said, one after the other."""
        group = self.run_on(processes, script, *flags)
        assert not any(done.returncode for done in group), "\n".join(done.stderr[-3000:] for done in group)
        out, err = ("".join(texts) for texts in zip(*((done.stdout, done.stderr) for done in group)))
        return subprocess.CompletedProcess([], 0, out, err)
