"""support/cuda_graph.py, with a stand-in for what a GPU does: a replay runs on the recorded inputs.

The recording itself needs a GPU: tests/bench/gpu.py compares losses of runs with and without it.
"""

import contextlib

import pytest
import torch

from support.cuda_graph import CUDAGraph


@pytest.fixture
def recorder(monkeypatch):
    """A CUDAGraph of (x * weight).sum() and its backward, the weight, and what has been run."""
    weight, ran = torch.tensor([1.0, 2.0], requires_grad=True), []

    def function(x):
        ran.append("recorded" if recording else "run")
        loss = (x * weight).sum()
        loss.backward()
        return loss.detach()

    recording = []

    class Graph:
        def replay(self):
            recorder.output.copy_(function(*recorder.inputs))

    @contextlib.contextmanager
    def graph(_, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # the loader's threads go on
        before = weight.grad.clone()
        recording.append(stream)
        yield
        recording.clear()
        weight.grad.copy_(before)  # a recording computes nothing

    class Stream:
        def wait_stream(self, other):
            ran.append("wait")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorder = CUDAGraph(function)
    return recorder, weight, ran


def test_calls_are_run_then_recorded_then_replayed(recorder):
    recorder, weight, ran = recorder
    outputs, place = [], None
    for step in range(1, 5):
        weight.grad = None if weight.grad is None else weight.grad.zero_()
        for micro_batch in (1.0, 10.0):  # whose gradients add up, in one place
            x = torch.tensor([micro_batch, step])
            outputs.append((recorder(x), micro_batch + 2 * step))
            x.fill_(-1.0)  # the caller may use its tensor again
        assert weight.grad.tolist() == [11.0, 2.0 * step]
        place = place or weight.grad.data_ptr()
        assert weight.grad.data_ptr() == place
    # A result stays what it was when the next replay writes.
    assert [output.item() for output, _ in outputs] == [expected for _, expected in outputs]
    assert ran[:6] == 2 * ["wait", "run", "wait"]
    assert ran[6:] == ["recorded"] + 6 * ["run"]


def test_another_shape_is_refused(recorder):
    recorder, *_ = recorder
    for _ in range(3):
        recorder(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"recorded for \(2,\) .*, not for \(1,\)"):
        recorder(torch.ones(1))  # copy_ would have broadcast it
    with pytest.raises(RuntimeError, match="not for .* torch.float64"):
        recorder(torch.ones(2, dtype=torch.float64))
