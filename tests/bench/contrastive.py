"""Memory and time of the contrastive loss, forward and backward, beside one on the whole matrix.

    python tests/bench/contrastive.py [--batches 4096,8192,32768] [--width 512] [--whole 8192]

Each in a process of its own: the memory is what its peak rose by over the embeddings' own.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks import lit


def whole_matrix(images, texts, scale, weight):
    logits = scale * images @ texts.T
    answers = torch.arange(len(logits))
    return (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2


def measure(batch, width, whole, answer):
    torch.manual_seed(0)
    pairs = [F.normalize(torch.randn(batch, width), dim=1).requires_grad_() for _ in range(2)]
    scale, before = torch.tensor([14.0], requires_grad=True), peak()
    began = time.perf_counter()
    loss = (whole_matrix if whole else lit.contrastive_loss)(*pairs, scale, torch.ones(batch))
    loss.backward()
    answer.put((time.perf_counter() - began, peak() - before, loss.item()))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", default="4096,8192,32768")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--whole", type=int, default=8192, help="largest batch for the matrix")
    run = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{torch.get_num_threads()} threads, width {run.width}")
    print("   batch   loss         seconds   GiB")
    for batch in map(int, run.batches.split(",")):
        for whole in (False, True):
            if whole and batch > run.whole:
                continue
            answer = context.Queue()
            process = context.Process(target=measure, args=(batch, run.width, whole, answer))
            process.start()
            seconds, memory, loss = answer.get()
            process.join()
            name = "whole matrix" if whole else "in rows"
            print(f"{batch:8}   {name:12} {seconds:7.1f} {memory:6.2f}   {loss:.6f}")


if __name__ == "__main__":
    main()
