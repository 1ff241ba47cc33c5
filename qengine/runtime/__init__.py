"""From a checkpoint to a running model: loader, planner, KV tensors, sampler, runner, executor."""
