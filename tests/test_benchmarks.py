"""Benchmarks that nothing else runs: what they time has been compared, and what they count is what they have recorded."""

import json
import sys

import pytest
import torch

from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import agreement  # noqa: E402
import loss_memory  # noqa: E402
import search  # noqa: E402

CPU = torch.device("cpu")


# ----------------------------------- steps beside other libraries -----------------------------------
@pytest.fixture(scope="module")
def side_by_side():
    for name in ("lightly.loss", "open_clip", "transformers"):
        pytest.importorskip(name)
    import side_by_side

    return side_by_side


@pytest.fixture
def small(side_by_side, monkeypatch):
    """-> rows of moco for four pictures of 32 px."""
    monkeypatch.setattr(side_by_side, "pair", lambda batch_size, device: torch.rand(2, batch_size, 3, 32, 32, device=device))
    torch.manual_seed(0)
    return lambda batch_size, device, compiled: side_by_side.moco_rows(4, device, compiled)


def test_rows_compute_the_same(side_by_side, small):
    losses = side_by_side.step.check(small, [("lightly", "here")], CPU)
    assert losses["lightly"] == pytest.approx(losses["here"], rel=1e-6)
    assert abs(losses["here"][0] - losses["here"][1]) > 1e-3


def test_rows_that_compute_something_else_are_not_timed(side_by_side, small, monkeypatch):
    monkeypatch.setattr(side_by_side.moco.MoCo, "enqueue", lambda *_: None)
    with pytest.raises(SystemExit, match="not the same computation: lightly has losses"):
        side_by_side.step.check(small, [("lightly", "here")], CPU)


def test_nan_is_not_the_same(side_by_side):
    rows = {name: side_by_side.Row(None, torch.optim.SGD([w], 0.1), lambda _, w=w: w * float("nan"))
            for name in ("lightly", "here") for w in [torch.ones((), requires_grad=True)]}  # fmt: skip
    with pytest.raises(SystemExit, match="not the same computation: lightly has losses .nan"):
        side_by_side.step.check(lambda *_, **__: (rows, "nothing"), [("lightly", "here")], CPU)


def test_step_compares_what_it_times(side_by_side, monkeypatch, tmp_path):
    """All rows of clip, with a smaller network of the same form: that of transformers too."""
    step = side_by_side.step
    monkeypatch.setitem(step.clip.ARCHS, "vit_small", (64, 2, 128, 64))

    def ones(batch_size, device, compiled):
        names = "lightly", "here, one view at a time", "lightly, views in one batch", "here"
        weights = [torch.ones((), requires_grad=True) for _ in names]
        return {n: step.Row(None, torch.optim.SGD([w], 0.1), lambda _, w=w: 1 * w) for n, w in zip(names, weights)}, "one number"

    monkeypatch.setattr(step, "simclr_rows", ones)
    check, compared = step.check, []
    monkeypatch.setattr(step, "check", lambda make, pairs, device: compared.append(pairs) or check(make, pairs, device))
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "1", "--clip-batch", "2", "--out", str(tmp_path / "out.json")])
    step.main()
    rows = json.loads((tmp_path / "out.json").read_text())["results"]["clip"]["rows"]
    assert list(rows) == ["open_clip", "open_clip, fused AdamW", "transformers", "here, 77 tokens", "here"]
    assert {name for pair in compared[0] for name in pair} == set(rows)
    for row in rows.values():
        assert row["first_two_losses"] == pytest.approx(rows["here"]["first_two_losses"], rel=1e-4)


def test_memory_of_a_step_is_what_it_adds(side_by_side, monkeypatch):
    """The weights of all rows are there before it."""
    step, there, peak = side_by_side.step, 3 * 2**30, [9 * 2**30]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: there)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.append(there))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[-1])
    weight = torch.ones((), requires_grad=True)
    row = step.Row(None, torch.optim.SGD([weight], 0.1), lambda _: peak.append(there + 2**29) or 1 * weight)
    assert step.peak_gib(row, "fp32") == 0.5 and weight < 1


def test_whole_loops_and_steps_warn_of_an_uncommitted_tree(side_by_side, tmp_path, monkeypatch, capsys):
    """As record.py does: their numbers are of a tree that nobody else has."""
    import end_to_end

    for module, owner in ((side_by_side, side_by_side.step), (end_to_end, end_to_end)):
        monkeypatch.setattr(owner, "environment", lambda: {"commit": "abc-dirty"})
        monkeypatch.setattr(module, "compare", lambda *_: {"rows": {}})
        monkeypatch.setattr(sys, "argv", ["x.py", "--methods", "byol", "--out", str(tmp_path / f"{module.__name__}.json")])
        module.main()
        assert capsys.readouterr().err == "warning: recorded from commit abc-dirty, which others do not have\n"
        assert "abc-dirty" in (tmp_path / f"{module.__name__}.json").read_text()


# ----------------------------------- without other libraries -----------------------------------
def test_views_and_losses_warn_of_an_uncommitted_tree(tmp_path, monkeypatch, capsys):
    """And without git their commit is unknown, as in results.jsonl."""
    pytest.importorskip("sklearn", reason="the two photos are its own")
    import augment

    ways = dict.fromkeys(("pil", "worker", "device", "worker+device"), (1.0, 2.0))
    monkeypatch.setattr(augment, "measure", lambda *_: ways)
    monkeypatch.setattr(loss_memory, "LOSSES", {})
    monkeypatch.setenv("PATH", "")
    for module in (augment, loss_memory):
        monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path / "out.json")])
        with torch.enable_grad():  # main() may turn it off
            module.main()
        assert capsys.readouterr().err == "warning: recorded from commit unknown, which others do not have\n"
        assert json.loads((tmp_path / "out.json").read_text())["commit"] == ""


def test_a_profile_has_every_operation_of_a_view(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the two photos are its own")
    import augment

    before = augment.slip.color_jitter
    monkeypatch.setattr(sys, "argv", ["augment.py", "--profile", "--rounds", "1", "--batch-size", "16"])
    with torch.enable_grad():  # main() turns it off
        augment.main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    shares = {name: int(share[:-1]) for name, (ms, share) in rows.items() if float(ms) > 0}
    assert len(shares) == 7 and shares["shift_hue"] < shares["color_jitter"] < 100
    assert sum(shares.values()) - shares["shift_hue"] == pytest.approx(100, abs=3)
    assert augment.slip.color_jitter is before


def test_logistic_regressions_that_are_timed_find_the_same(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="its fits are beside ours")
    import logreg

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", "logreg.py --samples 80 --dim 16 --rounds 1".split())
    logreg.main()
    torch.set_num_threads(threads)
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["one, here", "one, scikit-learn", "one, scikit-learn to 1e-9", "search, here", "search, scikit-learn"]
    near, same = (float(rows[name].split()[-1]) for name in ("one, scikit-learn", "one, scikit-learn to 1e-9"))
    assert same < near < 1e-2 and same < 1e-5
    assert all(" C = " in rows[name] for name in rows if name.startswith("search"))


@pytest.mark.parametrize("name", loss_memory.LOSSES)
def test_losses_keep_what_is_recorded(name):
    recorded = json.loads((ROOT / "results/loss_memory.json").read_text())["results"][name]
    row = next(row for row in recorded if row["processes"] == 2)
    found = loss_memory.kept_bytes(loss_memory.LOSSES[name], row["local_batch"], 2)
    assert found == (row["feature_bytes"], row["matrix_bytes"])


def test_views_that_differ_less_agree_more():
    """Two views of a picture agree more than two pictures of a class, and these more than others, whose mean is taken out."""
    dataset, found = agreement.open_dataset("flocks", ""), []
    for look in (["--crop-min", "0.9", "--jitter-strength", "0"], ["--crop-min", "0.2", "--jitter-strength", "1"]):
        flags = ["--batch-size", "64", "--arch", "resnet10", "--no-zero-init-residual", "--no-blur", *look]
        args = agreement.moco.parse_args(agreement.moco.Args, agreement.moco.RECIPES, flags)
        found.append(agreement.agreement(dataset, args))
    alike, different = found
    assert alike[0] > different[0] and alike[3] > different[3] > 100 / 64, found
    assert alike[0] > alike[1] > alike[2] and max(abs(alike[2]), abs(different[2])) < 5, found


def test_the_better_half_of_a_search_goes_on(tmp_path, monkeypatch, capsys):
    """Four runs, two of them with twice the steps, one with four times; a run that fails is in the record and goes no further."""
    told = []

    def train(method, flags, directory, steps):
        rate = float(flags[-1].removeprefix("--lr="))
        told.append((rate, steps))
        if rate < 9:
            directory.mkdir(exist_ok=True)
            (directory / "args.json").write_text('{"seed": 3}')
            rows = [{"step": 0, "knn_top1": 10.0}, {"step": 1, "loss": 2.0}, {"step": steps, "knn_top1": 10 * rate + steps / 100}]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 1.5

    monkeypatch.setattr(search, "ROOT", tmp_path)
    monkeypatch.setattr(search, "train", train)
    out = tmp_path / "out.jsonl"
    flags = ["byol", "--try", "lr=1,3,9,2", "--steps", "100", "--rounds", "3", "--out", str(out), "--", "--eval-every", "40"]
    monkeypatch.setattr(sys, "argv", ["search.py", *flags])
    search.main()
    assert told == [(1, 100), (3, 100), (9, 100), (2, 100), (3, 200), (2, 200), (3, 400)]
    rows = {row["flags"]["lr"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert [rows[lr]["knn"][-1:] for lr in "1392"] == [[[100, 11.0]], [[400, 34.0]], [], [[200, 22.0]]]
    assert [rows[lr]["cpu_seconds"] for lr in "1392"] == [2, 4, 2, 3]  # of all parts, rounded
    assert all(row["method"] == "byol" and row["rest"] == ["--eval-every", "40"] for row in rows.values())
    assert rows["3"]["seed"] == 3 and rows["9"]["seed"] is None
    monkeypatch.setattr(sys, "argv", ["search.py", "dino", "--try", "lr=9,10", "--out", str(out)])
    with pytest.raises(SystemExit, match="no run of dino.py reached an evaluation"):
        search.main()
    monkeypatch.setattr(sys, "argv", ["search.py", "moco", "--try", "lr"])
    with pytest.raises(SystemExit):
        search.main()
    assert "--try lr has no values: --try FLAG=VALUE,VALUE" in capsys.readouterr().err
