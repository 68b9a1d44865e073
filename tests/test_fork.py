"""A method can be carried away: its file and the shared flat files, in an empty folder, train, evaluate, save and resume.

Importing torch takes longer than a tiny run, so one process outside of this checkout imports what comes from PyPI, and
forks for every run. The fork enters the folder and runs the script there as `python slip.py` would.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from runs import COMMON, FLAGS, METHODS, ROOT, rows

SHARED = ["common.py", "data.py", "layouts.py", "monitor.py", "pictures.py", "run.py", "scenes.py", "sources.py", "trouble.py"]
MORE = dict.fromkeys(["simclr", "moco", "mocov3", "byol", "simsiam", "dino", "ibot", "dinov2", "simclrv2"], ["knn.py"])
MORE["declip"] = ["synonyms.py"]
INIT = ["init.py", "recognise.py", "names.py"]  # for --init alone
NAMES = [*METHODS, "simclrv2"]
STEPS = ["--data", "shapes", "--max-steps", "4", "--eval-every", "2", "--save-every", "2"]
FINETUNE = ["--checkpoint", "../simclr/whole", "--label-fraction", "0.5", "--warmup-epochs", "0", "--base-lr", "0.003"]

# A job is [folder, script, arguments, step after which the process kills itself (0: none)]. In the fork nothing of the
# project is imported yet. SIGKILL comes between the log and the evaluation of a step, and nothing can be saved then.
SERVER = """
import json, os, runpy, signal, sys
import torch, torch._dynamo, torchvision, PIL.Image, tokenizers

sys.modules["matplotlib"] = None  # curves.png takes longer than the runs

def run_script(folder, script, arguments, kill_at):
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    import run, scenes
    for drawn in scenes.SETS.values():
        drawn.__len__ = lambda self: 32  # so that an evaluation takes a fraction of a second
    end_step = run.Run.end_step
    def end_step_or_die(self, *terms, **numbers):
        end_step(self, *terms, **numbers)
        if self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    run.Run.end_step = end_step_or_die
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    files = [m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)]
    with open("loaded.json", "w") as file:
        json.dump(files, file)
    sys.stdout.flush()
    os._exit(0)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run_script(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """-> function(folder, script, arguments, kill_at) that waits for the run and returns its exit status."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-I", "-c", SERVER]  # -I: neither this folder nor the environment adds to the path
    process = subprocess.Popen(argv, cwd=tmp_path_factory.mktemp("server"), env=env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def run(*job):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def fork(server, tmp_path_factory):
    """-> function from a method to the folder of its fork, in which one run of four steps is finished."""
    root, made = tmp_path_factory.mktemp("forks"), {}

    def make(name):
        if name not in made:
            made[name] = folder = root / name
            folder.mkdir()
            for file in [f"{name}.py", *SHARED, *MORE.get(name, [])]:
                shutil.copy(ROOT / file, folder)
            assert run_in(server, folder, "whole") == 0, (folder / "out.txt").read_text()[-2000:]
        return made[name]

    return make


def run_in(server, folder, directory, *more, kill_at=0):
    name = folder.name
    flags = [*COMMON, *FINETUNE] if name == "simclrv2" else FLAGS[name]
    return server(str(folder), f"{name}.py", [*flags, *STEPS, "--output-dir", directory, *more], kill_at)


@pytest.mark.parametrize("name", NAMES)
def test_carried_away(server, fork, name):
    if name == "simclrv2":
        fork("simclr")  # it starts from a run of that
    folder = fork(name)
    whole = rows(folder / "whole")
    assert [row["step"] for row in whole if "loss" in row] == [1, 2, 3, 4]
    scores = [row for row in whole if "loss" not in row]
    random = [] if name == "simclrv2" else [0]  # that starts from trained weights
    assert [row["step"] for row in scores] == [*random, 2, 4] and any("top1" in key for row in scores for key in row)
    assert {"views.png", "checkpoint.pt", "args.json", "env.json"} <= {p.name for p in (folder / "whole").iterdir()}
    loaded = json.loads((folder / "loaded.json").read_text())
    there = {os.path.relpath(path, folder) for path in loaded if os.path.abspath(path).startswith(f"{folder}/")}
    needed = {*SHARED, *MORE.get(name, [])}
    if name != "align":  # which filters files, so that it knows their keys
        needed -= {"layouts.py"}  # only data that is not drawn needs it
    assert there == needed  # the script itself is __main__
    assert not [path for path in loaded if path.startswith(f"{ROOT}/")]

    assert run_in(server, folder, "killed", kill_at=3) == -9
    assert rows(folder / "killed")[-1]["step"] == 3  # from a checkpoint of step 2
    assert run_in(server, folder, "killed") == 0, (folder / "out.txt").read_text()[-2000:]
    assert "continued at 2" in (folder / "out.txt").read_text()
    assert rows(folder / "killed") == whole


def test_weights_to_start_from_need_three_files_more(server, fork):
    folder = fork("moco")
    assert run_in(server, folder, "more", "--init", "whole") == 2
    assert "--init needs init.py, recognise.py and names.py beside run.py" in (folder / "out.txt").read_text()
    for file in INIT:
        shutil.copy(ROOT / file, folder)
    assert run_in(server, folder, "more", "--init", "whole") == 0, (folder / "out.txt").read_text()[-2000:]
    assert "--init whole: a run of moco.py" in (folder / "out.txt").read_text()
    loaded = json.loads((folder / "loaded.json").read_text())
    assert {os.path.relpath(path, folder) for path in loaded} >= set(INIT)
    for file in INIT:
        (folder / file).unlink()  # other tests look at what a run without the flag loads
