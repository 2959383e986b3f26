"""Forward and backward of a micro-batch as one recorded CUDA graph (--cuda-graph).

The host launches each kernel that a GPU runs. A ViT-B step has a few thousand kernels, many
of which take microseconds: then the GPU waits for the host. A CUDA graph is a recording of
such launches, made once. To replay it is a single launch.

A replay runs the same kernels on the same addresses. Four things follow:

* shapes are the same in each call;
* inputs are copied to where the recording read them, results from where it wrote them;
* gradients stay where they are: optimizer.zero_grad(set_to_none=False) writes zeros, and
  backward adds to them. So several micro-batches replay one graph several times;
* nothing inside may wait for the GPU (.item(), a tensor made from Python numbers), and what
  is printed or counted inside happens once, while it is recorded.

The first calls are not recorded: torch.compile compiles in them, libraries choose kernels,
and gradients are allocated. See PyTorch's "CUDA graphs" notes and torchtitan's
distributed/cudagraph.py. This file needs torch alone.
"""

import torch


class CUDAGraph:
    """A function of CUDA tensors, run `warm_up` times, then recorded, then replayed.

    function   takes tensors and returns a tensor; it may add to the .grad of parameters
    warm_up    number of calls before the recording (2: our choice)

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
                found = f"{tuple(given.shape)} {given.dtype}"
                wanted = f"{tuple(recorded.shape)} {recorded.dtype}"
                raise RuntimeError(
                    f"the CUDA graph was recorded for {wanted}, not for {found}: "
                    "leave --cuda-graph out"
                )
            recorded.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes to the same place

    def run_beside(self, *inputs):
        """Run on the stream that will be recorded: autograd keeps the stream of a call."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, *inputs):
        """Record the function: nothing is computed here."""
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # "global" would forbid the loader's thread to pin memory meanwhile.
        mode = {"stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graph, **mode):
            self.output = self.function(*self.inputs)
