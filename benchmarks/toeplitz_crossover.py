"""Where the FFT overtakes the dense product for triangular Toeplitz matrices, by size and columns.

Interleaved medians of processor time, float32. Writes the CSV of this name in
``benchmarks/results``:

    python -m benchmarks.toeplitz_crossover --threads 1
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch.fft import irfft, rfft

from structured import toeplitz
from structured._transforms.autocorrelation import diagonal_sums

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
COLUMNS = (1, 16, 256, 1024)


def fft_apply(t, X):
    length = toeplitz.fft_length(t.shape[-1])
    return irfft(rfft(t, length) * rfft(X.mT, length), length)[..., : t.shape[-1]].mT


def dense_apply(t, X):
    return toeplitz.lower(t) @ X


def fft_gram(t, X):
    n = t.shape[-1]
    length = toeplitz.fft_length(n)
    F = rfft(X.mT, length)
    return irfft((F.real.square() + F.imag.square()).sum(-2), length)[..., :n]


def dense_gram(t, X):
    return diagonal_sums(X @ X.mT)


OPERATIONS = {"apply": (fft_apply, dense_apply), "project_gram": (fft_gram, dense_gram)}


def seconds(function, *args, repeat):
    start = time.process_time()
    for _ in range(repeat):
        function(*args)
    return (time.process_time() - start) / repeat


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = Path(__file__).parent / "results" / "toeplitz_crossover.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("operation", "n", "m", "fft_us", "dense_us", "faster"))
        for name, (fft, dense) in OPERATIONS.items():
            for n in SIZES:
                for m in COLUMNS:
                    t, X = torch.randn(n), torch.randn(n, m)
                    times = {fft: [], dense: []}
                    once = max(seconds(f, t, X, repeat=2) for f in times)
                    repeat = max(1, min(200, int(0.01 / once)))
                    for _ in range(options.rounds):
                        for function, found in times.items():
                            found.append(1e6 * seconds(function, t, X, repeat=repeat))
                    a, b = (statistics.median(found) for found in times.values())
                    row = (name, n, m, f"{a:.1f}", f"{b:.1f}", "fft" if a < b else "dense")
                    writer.writerow(row)
                    print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
