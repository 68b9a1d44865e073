"""How long `evaluate.py logreg` fits, beside scikit-learn: CPU seconds, in turn.

    python benchmarks/logreg.py                    # 600 x 512 features, ten classes, one thread

one     the minimum for one C, as --C does: here to a gradient of 1e-9, in scikit-learn to its
        default of 1e-4 and to 1e-9
search  CLIP's search for C on a held-out tenth, both to 1e-4

The features are drawn: directions at random, variances that fall as 1 / rank^2, as networks have
them, and labels that a linear classifier finds with some noise. What the fits say of new features
is compared. Needs scikit-learn (pip install -r requirements-test.txt).
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from evaluation.probes import best_exponent, logistic_regression, split_off_tenth  # noqa: E402
from evaluation.protocols import chosen_C  # noqa: E402

CLASSES = 10


def draw(samples, dim):
    """-> float64 features (samples, dim) and labels."""
    generator = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(n, m, generator=generator, dtype=torch.float64)
                   for n, m in ((samples, dim), (dim, CLASSES), (samples, CLASSES)))  # fmt: skip
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    x = x / torch.arange(1, dim + 1)
    return x @ turn, (x @ w + 0.3 * noise).argmax(1)


def theirs(x, y, C, tolerance):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at CLIP's 1,000 iterations
        model = LogisticRegression(C=C, tol=tolerance, max_iter=1000).fit(x.numpy(), y.numpy())
    return lambda new: torch.from_numpy(model.predict_proba(new.numpy()))


def their_search(x, y):
    held_out, rest = split_off_tenth(len(y), 0)

    def score(exponent):
        found = theirs(x[rest], y[rest], 10**exponent, 1e-4)(x[held_out]).argmax(1)
        return (found == y[held_out]).double().mean().item()

    return 10 ** best_exponent(score)


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--C", type=float, default=0.316)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = draw(2 * args.samples, args.dim)
    x, new, y = x[: args.samples], x[args.samples :], y[: args.samples]
    ways = {
        "one, here": lambda: logistic_regression(x, y, args.C, CLASSES),
        "one, scikit-learn": lambda: theirs(x, y, args.C, 1e-4),
        "one, scikit-learn to 1e-9": lambda: theirs(x, y, args.C, 1e-9),
        "search, here": lambda: chosen_C(x, y, CLASSES, 0),
        "search, scikit-learn": lambda: their_search(x, y),
    }
    seconds, found = {name: [] for name in ways}, {}
    for i in range(args.rounds + 1):
        for name in list(ways)[:: 1 if i % 2 else -1]:  # nobody always follows the same
            begin = time.process_time()
            found[name] = ways[name]()
            if i:  # the first round warms up
                seconds[name].append(time.process_time() - begin)
    ours = found["one, here"](new).softmax(1)
    for name, spent in seconds.items():
        text = f"C = {found[name]:.3g}" if name.startswith("search") else ""
        if "scikit" in name and name.startswith("one"):
            text = f"probabilities differ by up to {(found[name](new) - ours).abs().max():.0e}"
        print(f"{name:27}{min(spent):8.3f} s, median {statistics.median(spent):8.3f} s  {text}")


if __name__ == "__main__":
    main()
