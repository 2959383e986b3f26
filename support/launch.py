"""What the processes of a run settle with each other, and what is said when it ends early."""

from datetime import timedelta

import torch.distributed as dist


def not_finite(model, step, batch_size, loss, norm, lr):
    """What to say of a step (from 0) whose loss or gradient is not finite. All must call it."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    full = lambda found: found.full_tensor() if hasattr(found, "full_tensor") else found  # sharded
    names = [name for name, grad in gradients.items() if not full(grad.isfinite().all())]
    what = f"step {step + 1}: loss {loss}, gradient norm {norm}, lr {lr:.2e}; it was not saved. "
    what += f"Positions {step * batch_size} to {(step + 1) * batch_size - 1}. "
    return f"{what}Gradients not finite: {' '.join(names) or 'none'}"


def check_agreement(facts):
    """ValueError where a process sees other facts (a JSON-able dict) than the first one."""
    seen = [facts]
    if dist.is_initialized():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, facts)
    for process, others in enumerate(seen):
        for name, fact in seen[0].items():
            if others[name] != fact:
                where = f"process {process} finds {name} {others[name]}, the first one {fact}"
                raise ValueError(f"{where}: all nodes want the same command, --data and --out")


def set_timeouts(minutes):
    """Give up on a process that has not answered for so long. (One that dies is noticed at once.)

    As they start, some compile or read weights while others wait; after that, it has to be longer
    than the data's patience. There is no public name for this in PyTorch.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc != "checkpoints":  # which may take their time
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def last_line(error):
    """What an error says, in one line: DCP's hold a whole traceback, some others nothing.

    After what it has to say, torch's C++ code may list its own frames.
    """
    said = str(error).partition("\nException raised from ")[0].strip()
    return (said or type(error).__name__).splitlines()[-1]


def is_lost(error):
    """Whether an error says that another process has died, or was never met."""
    said = isinstance(error, RuntimeError) and "gloo" in str(error)  # it has no class of its own
    return said or isinstance(error, dist.DistError)


def verdict(error):
    """(what to say, exit status, whether this process alone knows) of what ended a run.

    What is neither in what was given nor in the machine is a mistake of ours, and raised again.
    """
    if is_lost(error):
        why = f"another process is gone, or was never met ({last_line(error):.120})"
        return f"{why}: the same command goes on from the last checkpoint", 1, False
    if isinstance(error, ValueError | OSError):
        return error, 2 if isinstance(error, ValueError) else 1, isinstance(error, OSError)
    raise error
