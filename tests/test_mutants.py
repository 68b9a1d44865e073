"""The list of wrong lines holds together, and a sample of them is noticed; `python tests/mutants.py` tries them all."""

import json
import random
import subprocess
import sys

import mutants
from runs import environment
from wrong_lines import COMMON, DISTILLED, JOINT, LANGUAGE

LISTED = mutants.mutants()
SAMPLE = random.Random(11).sample(LISTED, 10)


def test_every_wrong_line_can_be_applied():
    assert mutants.problems(LISTED) == []
    assert len(LISTED) >= 150
    assert {mutant.file for mutant in LISTED} == set(mutants.TESTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in LISTED}) == len(LISTED)


def test_every_common_line_stands_somewhere():
    """It is tried in the files in which it stands once, so one that stands nowhere would be left out without a word."""
    texts = [(mutants.ROOT / file).read_text() for file in [*LANGUAGE, *JOINT, *DISTILLED]]
    assert not [old for old, _ in COMMON if all(text.count(old) != 1 for text in texts)]


def test_problems_are_found():
    line = mutants.Mutant("byol.py", "        scaler.update()\n", "", "")
    assert not mutants.problems([line])
    for wrong in (line._replace(old="no such line"), line._replace(old="\n"), line._replace(new="(:\n"),
                  line._replace(new=line.old)):  # fmt: skip
        assert len(mutants.problems([wrong])) == 1


TRY = """
import json, sys, mutants
listed = [mutants.Mutant(*fields) for fields in json.loads(sys.argv[1])]
mutants.load_packages(" ".join(mutant.tests for mutant in listed))
print(json.dumps([[mutant, by, output[-800:]] for mutant, by, output in mutants.try_all(listed)]))
"""


def test_a_sample_is_noticed():
    """And a line that is as right as the one it replaces is not: a copy in which nothing runs would notice it too."""
    right = mutants.Mutant("byol.py", "chance = 4.0", "chance = 8.0 / 2", "tests/test_policies.py -k byol")
    argv = [sys.executable, "-c", TRY, json.dumps([right, *SAMPLE])]  # its own process, since this one has threads
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    (_, by_right, output), *others = json.loads(done.stdout)
    assert not by_right, output
    assert len(others) == len(SAMPLE)
    for mutant, by, output in others:
        assert by not in ("", mutants.LATE), (mutant, output)


def test_the_packages_of_all_tests_are_found():
    """None of them is a file of this project, which each fork has to import from its own copy."""
    code = "import mutants, sys; mutants.load_packages(' '.join(m.tests for m in mutants.mutants())); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(done.stdout.split())
    assert {"torch", "numpy", "PIL", "tokenizers"} < loaded and not {"slip", "common", "ablations"} & loaded
