"""Forward and backward of a micro-batch as one recorded CUDA graph (--cuda-graph).

A GPU runs kernels, and the host asks for each of them. A ViT-B step has a few thousand, of which
many take microseconds: then the GPU waits for the host. A CUDA graph is a recording of such
requests. It is made once; to replay it, the host asks for a single thing.

A replay runs the same kernels on the same addresses. Four things follow:

* shapes are the same in each call;
* inputs are copied to where the recording read them, results are copied from where it wrote them;
* gradients stay where they are: optimizer.zero_grad(set_to_none=False) writes zeros, and a backward
  adds to them. So a batch of several micro-batches replays one graph several times;
* nothing inside may wait for the GPU (.item(), a tensor made from Python numbers), and what is
  printed or counted inside happens while it is recorded and never again.

The first calls run as they are: torch.compile compiles in them, libraries choose their kernels, and
gradients are made. (torchtitan records its steps alike, in distributed/cudagraph.py; PyTorch's
"CUDA graphs" notes explain the rules.)

This file needs torch alone.
"""

import torch


class CUDAGraph:
    """A function of CUDA tensors, run as it is `warm_up` times, then recorded, then replayed.

    function   takes tensors and returns a tensor; it may add to the .grad of parameters
    warm_up    how often it is run before it is recorded (2: ours)

    Raises RuntimeError when an input has another shape or dtype than the recorded one.
    """

    def __init__(self, function, warm_up=2):
        self.function, self.warm_up = function, warm_up
        self.graph, self.inputs, self.output = None, None, None
        self.stream = torch.cuda.Stream()  # the default stream cannot be recorded

    def __call__(self, *inputs):
        if self.warm_up > 0:
            self.warm_up -= 1
            return self.run_beside(*inputs)
        if self.graph is None:
            self.record(*inputs)
        for recorded, given in zip(self.inputs, inputs, strict=True):
            if (recorded.shape, recorded.dtype) != (given.shape, given.dtype):
                raise RuntimeError(
                    f"the CUDA graph was recorded for {tuple(recorded.shape)} {recorded.dtype}, "
                    f"not for {tuple(given.shape)} {given.dtype}: leave --cuda-graph out"
                )
            recorded.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes to the same place

    def run_beside(self, *inputs):
        """A call on the stream that will be recorded: autograd remembers on which one it ran."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, *inputs):
        """Nothing is computed here: what the function asks for is written down."""
        self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: the loader's pins memory, which "global" would forbid.
        mode = {"stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graph, **mode):
            self.output = self.function(*self.inputs)
