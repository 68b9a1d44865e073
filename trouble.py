"""When something is wrong that is neither a UserError nor a mistake in this project: a machine with
too little memory, a full disk, processes that were started in a way that cannot work, nobody who
reads what is printed. Used by user_errors and init_distributed (common.py), by Loader (data.py) and
by all loader workers, those of monitor.py too."""

import contextlib
import errno
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

MEMORY = "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
MEMORY += "|numel: integer multiplication overflow|Unable to allocate|buffer size"
FILES = "Too many open files|items of ancdata"  # the second where one is received
ENDED = "gloo.*(Connection (closed|reset) by peer|Broken pipe)"


def sentence(error):
    """One line that says what to do, or "" for an error that should show its traceback."""
    if type(error).__name__ == "UserError":  # one that a loader worker raised has a traceback in it
        return str(error).split("UserError: ")[-1].strip()
    lines = str(error).strip().splitlines() or [""]
    first = lines[0]
    if "Original Traceback" in str(error):  # a loader worker raised it: its reason is the last line
        first = re.sub(r"^[\w.]*Error(: |$)", "", lines[-1])
    if isinstance(error, OSError | RuntimeError) and re.search(FILES, str(error)):
        return "too many files are open at once: raise `ulimit -n` or lower --workers"
    cut_off = isinstance(error, EOFError | ConnectionError)  # it died while it handed on a batch
    if cut_off or (isinstance(error, RuntimeError) and "DataLoader worker (pid" in first):
        why = first or "its connection ended"
        spent = "as memory or open files may be used up"
        return f"a loader worker died ({why}): lower --workers, {spent}"
    if isinstance(error, ModuleNotFoundError):
        return f"{first}; `pip install {error.name}` or leave its flag out"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"{first.split('. ')[0] or 'out of memory'}: lower {smaller()}"
    if isinstance(error, RuntimeError) and re.search(MEMORY, str(error)):
        return f"{re.sub(r'^.*?(DefaultCPUAllocator: |$)', '', first) or first}: lower {smaller()}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = ", free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{where}{error.strerror}{full}"
    if isinstance(error, RuntimeError) and re.search(ENDED, first):
        return "another process has ended, so this one ends too: see what the other one says"
    if isinstance(error, ValueError) and first.endswith("expected, but not set"):
        return f"{first}: start with torchrun"
    if isinstance(error, dist.DistError):
        last = lines[-1].strip()  # where NCCL says what is wrong
        also = f" ({last})" if last != first else ""
        return f"the processes cannot exchange data: {first}{also}"
    return ""


def let_go(error):
    """Frees what the frames that an error passed through hold, as the iterator of a DataLoader: its
    workers end with it."""
    traceback.clear_frames(error.__traceback__)


def let_the_first_report(error):
    """Most mistakes occur in all processes alike. The first process of a machine reports one, and
    torchrun then ends the others while they wait here. Without torchrun, ten seconds are enough."""
    if getattr(error, "alone", type(error).__name__ != "UserError"):
        return  # others may not have it
    if "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)


def smaller():
    """The flags of this script that say how much memory it takes."""
    Args = getattr(sys.modules["__main__"], "Args", None)
    names = ["batch_size", "train_batch", "size", "image_size", "embed_dim", "vocab_size"]
    flags = ["--" + name.replace("_", "-") for name in names if hasattr(Args, name)]
    return " or ".join(flags[:3]) or "--batch-size"


def launched(environ):
    """One line on variables that speak of several processes without what torchrun sets, or "".
    Called when RANK or MASTER_ADDR is missing."""
    how = "start with torchrun (docs/running.md), or unset it for one process"
    lacks = "RANK" if "MASTER_ADDR" in environ else "MASTER_ADDR"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name in environ:
            return f"{name} is set without {lacks}: {how}"
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "1") != "1":
            each = f"{name} is {environ[name]}, and each of these processes"
            how = "start one torchrun on each machine (docs/running.md), or unset it"
            return f"{each} would train the whole run alone: {how}"
    return ""


def ignore_signals():
    """Ctrl-C and a job's SIGTERM reach workers too, but only the main process is to end them."""

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


def end_where_a_batch_is_lost():
    """Two threads of a worker hand on a batch: one sends it, the other the files of its tensors.
    The main process hears of none of their errors, and would wait for ever: the worker ends."""

    def failed_to_give(kind, error, trace):
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):  # it would try for ever
            os._exit(1)
        # else nobody takes the tensors any more, because all is about to end

    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    sys.excepthook = failed_to_give


class Stream:
    """stdout or stderr. Once nobody reads it (| head, a closed terminal), it leads nowhere."""

    def __init__(self, number, stream):
        self.number, self.stream = number, stream
        if stream is None:  # closed before Python began
            self._lead_nowhere()
            self.stream = open(number, "w", encoding="utf-8", closefd=False)
        with contextlib.suppress(AttributeError, OSError):  # not a stream of text, as in a notebook
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._or_nowhere(self.stream.write, text)

    def flush(self):
        return self._or_nowhere(self.stream.flush)

    def _or_nowhere(self, do, *args):
        try:
            return do(*args)
        except OSError:
            return self._lead_nowhere()

    def _lead_nowhere(self):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.number)
        if nowhere != self.number:
            os.close(nowhere)
