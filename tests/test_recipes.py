"""Every named dataset with every method, flags as they are without any of the user's: a run has steps, and its warm-up is a
sensible part of it."""

import pytest

from runs import METHODS, module_of

LANGUAGE = ["clip", "slip", "declip", "align"]
CAPTIONED = {"shapes": 20_000, "flickr8k": 6_000, "flickr30k": 29_000, "coco": 118_287, "cc3m": 2_900_000,
             "cc12m": 10_900_000, "yfcc15m": 14_700_000, "redcaps": 12_000_000}  # fmt: skip
LABELLED = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 105_000, "food101": 75_750, "imagenet": 1_281_167}
CASES = [(method, data) for method in METHODS for data in CAPTIONED]
CASES += [(method, data) for method in METHODS if method not in LANGUAGE for data in LABELLED]


def schedule(method, data):
    """-> steps of the whole run, steps of its warm-up, its arguments."""
    module = module_of(method)
    args = module.parse_args(module.Args, module.RECIPES, ["--data", data])
    epoch = (CAPTIONED | LABELLED)[data] // args.batch_size
    return args.epochs * epoch, round(args.warmup_epochs * epoch), args


@pytest.mark.parametrize("method, data", CASES)
def test_the_warm_up_is_a_sensible_part_of_the_run(method, data):
    """CLIP's own is the shortest: 2,000 of 390,000 steps. None at all is right where a recipe says so."""
    steps, warmup, args = schedule(method, data)
    assert steps >= 100
    if args.warmup_epochs or method in LANGUAGE:
        assert 0.005 * steps <= warmup <= 0.2 * steps and warmup >= 5, (warmup, steps)


@pytest.mark.parametrize("method", LANGUAGE)
def test_every_captioned_set_has_an_entry(method):
    """The defaults are the paper's run on hundreds of millions of pairs: their warm-up is no fraction of an epoch of another set.
    DeCLIP's are those of YFCC15M."""
    assert set(CAPTIONED) <= set(module_of(method).RECIPES)
