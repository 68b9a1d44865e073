"""Every self-supervised file learns, here and now: kNN after half an epoch of its demo is well above that of the same
network with random weights. Whole demos are recorded and asked for in test_readme.py, which no wrong line turns red."""

from unittest import mock

import pytest

import pictures
from runs import module_of, rows

# Half of the points of kNN that each gained when this was written: 39, 16, 27, 13, 27, 19, 26 and 15
GAINS = {"simclr": 19, "moco": 8, "mocov3": 13, "byol": 6, "simsiam": 13, "dino": 9, "ibot": 13, "dinov2": 7}


@pytest.mark.parametrize("name", GAINS)
def test_knn_rises(name, tmp_path):
    module = module_of(name)
    flags = ["--max-steps", "78", "--eval-every", "78", "--log-every", "78", "--workers", "0", "--output-dir", str(tmp_path)]
    with mock.patch.object(pictures, "save_curves"):  # it takes long to draw
        module.train(module.parse_args(module.Args, module.RECIPES, flags))
    first, last = (row["knn_top1"] for row in rows(tmp_path) if "knn_top1" in row)
    assert last > first + GAINS[name]
