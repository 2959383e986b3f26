"""Memory and time of the contrastive loss, forward and backward, beside one on the whole matrix.

    python tests/bench/contrastive.py [--batches 4096,8192,32768] [--whole 8192]

Each runs in a process of its own: the memory is the growth of its peak beyond the
embeddings.
"""

import common
import torch
import torch.nn.functional as F

from support.launch import peak_memory
from tasks.lit import contrastive_loss

WIDTH = 512  # of the embeddings


def whole_matrix(images, texts, scale, weight):
    logits = scale * images @ texts.T
    answers = torch.arange(len(logits))
    return (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2


def measure(function, batch):
    """(seconds, GiB, loss)"""
    torch.manual_seed(0)
    pairs = [F.normalize(torch.randn(batch, WIDTH), dim=1).requires_grad_() for _ in range(2)]
    scale, cpu = torch.tensor([14.0], requires_grad=True), torch.device("cpu")
    before, losses = peak_memory(cpu), []

    def step():
        losses.append(function(*pairs, scale, torch.ones(batch)))
        losses[0].backward()

    return common.timed(step), peak_memory(cpu) - before, losses[0].item()


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--batches", default="4096,8192,32768", help="numbers of pairs")
    parser.add_argument("--whole", type=int, default=8192, help="largest batch for the matrix")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, width {WIDTH}")
    print("   batch   loss         seconds   GiB")
    for batch in map(int, options.batches.split(",")):
        for name, function in {"in rows": contrastive_loss, "whole matrix": whole_matrix}.items():
            if function is contrastive_loss or batch <= options.whole:
                seconds, memory, loss = common.in_new_process(measure, function, batch)
                print(f"{batch:8}   {name:12} {seconds:7.1f} {memory:6.2f}   {loss:.6f}")


if __name__ == "__main__":
    main()
