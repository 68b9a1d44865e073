"""The list of wrong lines holds together, and a sample of them is noticed; `python tests/mutants.py` tries them all."""

import random

import pytest

import mutants

LISTED = mutants.mutants()
SAMPLE = random.Random(11).sample(LISTED, 10)


def test_every_wrong_line_can_be_applied():
    assert mutants.problems(LISTED) == []
    assert len(LISTED) >= 150
    assert {mutant.file for mutant in LISTED} == set(mutants.TESTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in LISTED}) == len(LISTED)


def test_problems_are_found():
    line = mutants.Mutant("byol.py", "        scaler.update()\n", "", "")
    assert not mutants.problems([line])
    for wrong in (line._replace(old="no such line"), line._replace(old="\n"), line._replace(new="(:\n"),
                  line._replace(new=line.old)):  # fmt: skip
        assert len(mutants.problems([wrong])) == 1


def test_a_line_that_is_right_survives():
    """Otherwise a copy of the project in which nothing runs would count as noticed."""
    right = mutants.Mutant("byol.py", "chance = 4.0", "chance = 8.0 / 2", "tests/test_policies.py -k byol")
    seen, output = mutants.noticed(right)
    assert not seen, output


@pytest.mark.parametrize("mutant", SAMPLE, ids=lambda m: f"{m.file}: {m.old.strip()[:40]}")
def test_a_sample_is_noticed(mutant):
    seen, output = mutants.noticed(mutant)
    assert seen, output
