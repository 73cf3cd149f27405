"""How a model is spread over ranks: single | ddp | fsdp2 | zero1 | zero2 | zero3, behind one interface.

A step asks a backend for three things only: a context for each microbatch, a `backward`, and an `update` that shows
every owned gradient shard to a callback just before AdamW reads it. Whatever the sharding, the sum of gradients over
ranks and microbatches has then been reduced in fp32, and each element is shown on every rank that holds it.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import use_triton
from kernels.noisy_adamw import add_noise_
from privacy.mechanism import Release
from train.config import Optim, Parallel
from train.expert_parallel import ExpertParallel, spread_experts, spread_layers
from train.optim import ExponentialMovingAverage, step_in_one_pass


@dataclass(frozen=True)
class World:
    """This process's place among its peers."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: object) -> list[Any]:
        """Every rank's `value`, in order of rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def min(self, values: list[float]) -> list[float]:
        """The least of every rank's values, place by place."""
        least = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())


def join_world() -> World:
    """Join the process group that a launcher set up in the environment; alone, make one of one rank."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _keep_freed_memory()
    if not dist.is_initialized():
        process_group = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
        dist.init_process_group(process_group, store=store, rank=rank, world_size=size)
    return World(rank, size, device)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees. Handed back to the system, each step would have all its pages zeroed again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have their own ways
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_threshold, 2**30)


@dataclass(frozen=True, eq=False)
class Shard:
    """The elements [offset, offset + numel) of one parameter, flattened, that this rank's optimizer updates."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    holder: Tensor  # the tensor AdamW steps: the parameter, its DTensor, or ZeRO's flat fp32 partition
    start: int  # where the shard begins in the holder's local elements

    def of(self, tensor: Tensor) -> Tensor:
        """The shard's flat view of a tensor laid out like the holder: itself, its gradient, its AdamW state."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.view(-1)[self.start : self.start + self.numel]

    @property
    def value(self) -> Tensor:
        return self.of(self.holder.detach())


Transform = Callable[[Shard, Tensor], None]


class Backend:
    """One process on its own (`single`), and what all backends share."""

    forward_once = True  # one forward serves several backwards
    loss_scale = 1.0  # what `backward` multiplies gradients by, and a later division undoes
    steps_by_itself = False  # the engine calls AdamW, on tensors of its own

    def __init__(
        self,
        module: nn.Module,
        world: World,
        optim: Optim,
        max_grad_norm: float | None,
        experts: ExpertParallel | None = None,
    ) -> None:
        self.module, self.world, self.max_grad_norm, self.experts = module, world, max_grad_norm, experts
        self.names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.shapes = {name: _whole_shape(parameter) for parameter, name in self.names.items()}
        self.shapes |= {} if experts is None else experts.shapes
        self.num_updates = 0  # that AdamW has made, those before a resume among them
        self.before_update: Callable[[], None] | None = None  # called before anything of the state changes
        self.before_backward: Callable[[], None] | None = None  # called before ranks wait for each other's gradients
        self._transform: Transform | None = None
        self._refused: list[tuple[list[Shard], Tensor]] = []  # what kernels would not release; not looked at yet
        self._updated = False
        self._wrap(partial(_adamw, optim))
        self.optimizer.register_step_pre_hook(self._before_adamw)
        self.shards = [shard for shard in self._list_shards() if shard.numel]
        self._make_optimizer_states()

    # What a backend decides for itself.
    def _wrap(self, make_optimizer: Callable[[Any], torch.optim.AdamW]) -> None:
        self.model = self.module
        self.optimizer = make_optimizer(self.module.parameters())

    def _list_shards(self) -> Iterator[Shard]:
        for parameter, name in self.names.items():
            yield Shard(name, self.shapes[name], self._offset(name), parameter.numel(), parameter, 0)

    def _offset(self, name: str) -> int:
        """Where what this rank's model has of a parameter begins in the whole."""
        return 0 if self.experts is None else self.experts.offset(name)

    @property
    def norm_model(self) -> nn.Module:
        """What the norm pass runs forward through; where `forward_once`, the gradient pass uses the same forward."""
        return self.model

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of one microbatch's forward and backward; gradients are reduced over ranks at the last one."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, summed over ranks, to what the step has accumulated."""
        if self.before_backward is not None:
            self.before_backward()
        self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _clip(self) -> None:
        if self.max_grad_norm is None:
            return
        if self.experts is None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
            return
        # the same, of gradients that not all ranks share: each element counts on the rank that stores it, once
        gradients, squares = list[Tensor](), torch.zeros((), device=self.world.device)
        for shard in self.shards:
            assert shard.holder.grad is not None, f"{shard.name} has no gradient"
            gradients.append(shard.of(shard.holder.grad))
            start, stop = self.stored_range(shard)
            squares += gradients[-1][start:stop].square().sum()
        norm = self.world.sum(squares).sqrt()
        torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def _step(self) -> None:
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # What all backends share.
    def update(
        self, learning_rate: float, transform: Transform | None = None, average: ExponentialMovingAverage | None = None
    ) -> None:
        """One AdamW step on the accumulated gradients, and one of the average with the new weights.

        `transform(shard, gradient)` may first change each gradient in place. Where kernels run, a `Release`, AdamW and
        the average are one pass over memory; then `check_released` must follow before the step is built upon.

        Guarantee: no parameter and no state of AdamW changes before `before_update` has returned, nor where it raises.
        """
        if self.before_update is not None:
            self.before_update()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if average is not None and self._takes_one_pass(transform):
            assert transform is None or isinstance(transform, Release)
            self._clip()
            self.num_updates += 1
            refused = step_in_one_pass(self.optimizer, self.shards, self.num_updates, transform, average)
            if transform is not None:
                self._refused.append((self.shards, refused))
            return
        self._transform, self._updated = transform, False
        try:
            self._step()
        finally:
            self._transform = None
        if not self._updated:
            raise RuntimeError("the engine skipped the step, as DeepSpeed does where a gradient is not finite")
        self.num_updates += 1
        if average is not None:
            average.update(self.num_updates)

    def check_released(self, step: int) -> None:
        """Raise ValueError where a kernel met a sum that is not finite: the step must then be given up.

        The host's path raises by itself, before anything changes. A kernel only tells, and this waits for it.
        """
        refused, self._refused = self._refused, []
        for shards, flags in refused:
            for shard, flag in zip(shards, flags.tolist(), strict=True):
                if flag:
                    raise ValueError(
                        f"the sum of {shard.name} at step {step} is not finite, which clipped terms cannot make it: it "
                        "was not released; look for an overflow after clipping"
                    )

    def _takes_one_pass(self, transform: Transform | None) -> bool:
        if self.steps_by_itself or not self.shards or not use_triton(self.shards[0].value):
            return False
        return transform is None or (isinstance(transform, Release) and transform.for_kernels(()) is not None)

    def _before_adamw(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._updated = True
        if self._transform is None:
            return
        stepped = {id(holder) for group in optimizer.param_groups for holder in group["params"]}
        shards, gradients = list[Shard](), list[Tensor]()
        for shard in self.shards:
            if id(shard.holder) in stepped:
                assert shard.holder.grad is not None, f"{shard.name} reached the optimizer without a gradient"
                shards.append(shard)
                gradients.append(shard.of(shard.holder.grad))
        on_kernels = bool(gradients) and isinstance(self._transform, Release) and use_triton(gradients[0])
        noise = self._transform.for_kernels(shards) if on_kernels else None  # type: ignore[union-attr]
        if noise is not None:
            self._refused.append((shards, add_noise_(gradients, noise)))
            torch._foreach_div_(gradients, float(self._transform.divisor))  # type: ignore[union-attr]
            return
        for shard, gradient in zip(shards, gradients, strict=True):
            self._transform(shard, gradient)

    @property
    def num_elements(self) -> int:
        """Trainable elements of the whole model."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def stored_range(self, shard: Shard) -> tuple[int, int]:
        """The part [start, stop) of the shard that this rank writes to a checkpoint: replicas share the writing."""
        return 0, shard.numel

    def optimizer_tensors(self) -> Iterator[tuple[Literal["exp_avg", "exp_avg_sq"], Shard, Tensor]]:
        """("exp_avg" | "exp_avg_sq", shard, its flat fp32 state) for every shard."""
        for shard in self.shards:
            state = self.optimizer.state[shard.holder]
            yield "exp_avg", shard, shard.of(state["exp_avg"])
            yield "exp_avg_sq", shard, shard.of(state["exp_avg_sq"])

    def restore_optimizer(self, num_updates: int) -> None:
        """Have AdamW go on from `num_updates` updates, with the states that `optimizer_tensors` are filled with."""
        self.num_updates = num_updates
        for state in self.optimizer.state.values():
            state["step"].fill_(num_updates)

    def _make_optimizer_states(self) -> None:
        """AdamW's states as it would make them itself at its first step: there from the start, a save finds them."""
        for holder in {id(shard.holder): shard.holder for shard in self.shards}.values():
            zeros = partial(torch.zeros_like, holder, memory_format=torch.preserve_format)
            self.optimizer.state[holder] = {
                "step": torch.tensor(0.0),
                "exp_avg": zeros().detach(),
                "exp_avg_sq": zeros().detach(),
            }

    def publish(self) -> None:
        """Have the model compute with what was written into the shards' values. A collective: every rank calls it."""


class DistributedDataParallel(Backend):
    """Every rank holds the whole model; gradients are summed by all-reduce."""

    def _wrap(self, make_optimizer: Callable[[Any], torch.optim.AdamW]) -> None:
        if self.experts is not None:  # whose gradients are not all ranks' to sum
            ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.module, list(self.experts.shapes))
        # The weights are the same on every rank already, or are filled in later: there is nothing to broadcast.
        self.model = nn.parallel.DistributedDataParallel(self.module, init_sync=False)
        self.model.register_comm_hook(None, _sum_gradients)
        self.optimizer = make_optimizer(self.module.parameters())

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with nullcontext() if last else self.model.no_sync():
            yield
        if last and self.experts is not None:
            self.experts.sum_over_replicas(self.module)

    def stored_range(self, shard: Shard) -> tuple[int, int]:
        rank, size = self.world.rank, self.world.size
        if self.experts is not None and shard.name in self.experts.shapes:
            rank, size = self.experts.replicas.get_local_rank(), self.experts.replicas.size()
        return shard.numel * rank // size, shard.numel * (rank + 1) // size


class FullySharded(Backend):
    """FSDP2: parameters, gradients and states are sharded by rows and gathered a block at a time."""

    def __init__(self, *args: Any, bf16: bool) -> None:
        self.bf16 = bf16
        super().__init__(*args)

    def _wrap(self, make_optimizer: Callable[[Any], torch.optim.AdamW]) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        # fp32 reduction always: a bf16 sum over ranks would lose clipped gradients and blur the sensitivity bound.
        # Inputs stay as they are: bf16 timesteps would merge.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if self.experts is not None:
            for layer in spread_layers(self.module).values():
                fully_shard(layer, mesh=self.experts.replicas, mp_policy=policy)
        for block in self.module.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        if _on_meta(self.module):
            self.module.to_empty(device=self.world.device)  # this rank's shards, and nothing else
        super()._wrap(make_optimizer)
        self.names = {parameter: name for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def _list_shards(self) -> Iterator[Shard]:
        for parameter, name in self.names.items():
            assert isinstance(parameter, DTensor)
            mesh, num_rows = parameter.device_mesh, parameter.shape[0]
            rows_a_rank = -(-num_rows // mesh.size())  # torch.chunk: equal chunks, the last ones short or empty
            row_numel = parameter.numel() // num_rows
            offset = self._offset(name) + min(mesh.get_local_rank() * rows_a_rank, num_rows) * row_numel
            yield Shard(name, self.shapes[name], offset, parameter.to_local().numel(), parameter, 0)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield


class Zero(Backend):
    """DeepSpeed ZeRO 1 to 3. Its own clipping, loss scaling and overflow skips are off; its average is undone."""

    steps_by_itself = True

    def __init__(self, *args: Any, stage: int, microbatch_size: int) -> None:
        self.stage, self.microbatch_size = stage, microbatch_size
        # ZeRO-3 releases each gathered weight after its backward, so the gradient pass needs a forward of its own.
        self.forward_once = stage < 3
        super().__init__(*args)
        self.loss_scale = float(self.world.size)

    @staticmethod
    def config(stage: int, microbatch_size: int, max_grad_norm: float | None) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        clipping = max_grad_norm or 0.0  # DeepSpeed's default of 1.0 would clip the noised sum
        return {
            "train_micro_batch_size_per_gpu": microbatch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clipping,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                # an invalid norm would make DeepSpeed skip the step in silence; ZeRO-3 insists on the norm
                "compute_grad_norm": clipping > 0 or stage == 3,
                # fixed order of reduction and of parameters: a resumed run repeats the sums bit by bit
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
            },
            "steps_per_print": 2**31,
        }

    def _wrap(self, make_optimizer: Callable[[Any], torch.optim.AdamW]) -> None:
        deepspeed = _deepspeed()
        optimizer = make_optimizer(self.module.parameters())
        config = self.config(self.stage, self.microbatch_size, self.max_grad_norm)
        engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        self.engine: Any = engine
        self.model, self.optimizer = self.engine, optimizer

    @property
    def norm_model(self) -> nn.Module:
        # Through the engine, the norm pass would set off its gradient hooks.
        return self.engine.module

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.loss_scale)

    def _step(self) -> None:
        self.engine.step()

    def publish(self) -> None:
        # The model's own weights are copies of the fp32 partitions, which AdamW steps and the shards are views of.
        zero = self.engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)

    def _list_shards(self) -> Iterator[Shard]:
        if self.stage == 3:
            zero = self.engine.optimizer
            for parameter, name in self.names.items():
                group, start, width = zero.grad_position[zero.get_param_id(parameter)]
                offset = self.world.rank * width
                numel = max(0, min(width, parameter.ds_numel - offset))  # type: ignore[attr-defined]
                yield Shard(name, self.shapes[name], offset, numel, zero.fp32_partitioned_groups_flat[group], start)
            return
        for parameter, name in self.names.items():
            fragment = parameter._hp_mapping  # type: ignore[attr-defined]
            if fragment is not None:
                holder = self.engine.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
                address, start = fragment.lp_fragment_address, fragment.hp_fragment_address.start
                yield Shard(name, self.shapes[name], address.start, address.numel, holder, start)


def build_model(
    make: Callable[[], nn.Module],
    world: World,
    parallel: Parallel,
    optim: Optim,
    *,
    microbatch_size: int,
    bf16: bool,
    max_grad_norm: float | None = None,
) -> Backend:
    """The model that `make` builds, under its backend, with room for its weights and nothing in it yet.

    Fill it in through `train.state`: `initialise`, `load_weights` or `restore`. `make` must build on the meta device,
    too, and its model must have `init_buffers`, `initial_value` and `blocks`, and train all its parameters.

    Guarantee: under fsdp2 and zero3 no rank ever holds more of the weights than its own shards and one layer's.
    """
    if parallel.backend == "zero3":
        module = _partitioned(make, Zero.config(3, microbatch_size, max_grad_norm))
    else:
        with torch.device("meta"):
            module = make()
    if frozen := [name for name, parameter in module.named_parameters() if not parameter.requires_grad]:
        raise ValueError(f"{frozen[0]} does not train, so no checkpoint has it: build the model whole, by shard_model")
    backend = shard_model(
        module, world, parallel, optim, microbatch_size=microbatch_size, bf16=bf16, max_grad_norm=max_grad_norm
    )
    backend.module.init_buffers()  # type: ignore[operator]
    return backend


def shard_model(
    module: nn.Module,
    world: World,
    parallel: Parallel,
    optim: Optim,
    *,
    microbatch_size: int,
    bf16: bool,
    max_grad_norm: float | None = None,
) -> Backend:
    """Put `module` (fp32, the same on every rank) under the backend that `parallel` names, with its AdamW."""
    experts = None
    if parallel.expert_parallel > 1:
        experts = spread_experts(module, world.device.type, parallel.expert_parallel)
    if not _on_meta(module):
        module.to(world.device)
    elif parallel.backend != "fsdp2":  # which cuts the model up before there is any memory to it
        module.to_empty(device=world.device)
    for block in module.blocks:  # type: ignore[union-attr]
        if parallel.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if parallel.compile:
            block.compile()
    arguments = (module, world, optim, max_grad_norm, experts)
    if parallel.backend == "single":
        if world.size != 1:
            raise ValueError(f"parallel.backend is single, but {world.size} processes were started: choose ddp")
        return Backend(*arguments)
    if parallel.backend == "ddp":
        return DistributedDataParallel(*arguments)
    if parallel.backend == "fsdp2":
        return FullySharded(*arguments, bf16=bf16)
    return Zero(*arguments, stage=int(parallel.backend[-1]), microbatch_size=microbatch_size)


def _deepspeed() -> Any:
    """DeepSpeed without its collectives over shared memory, which serve inference only.

    It would compile them at the first start on a machine, under a lock file that outlives whoever is killed meanwhile:
    every later start, of any run, would wait for it for ever.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _partitioned(make: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    """`make()` with each layer cut up among the ranks as soon as it stands; what it initialised is arbitrary."""
    deepspeed = _deepspeed()
    # Without DeepSpeed's replacements of torch.empty and its kin, which turn float64 buffers to fp32; its `dtype` stays
    # unset, for where fp16 is not supported 0.19 reads any value of it as bf16.
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=()):
        return make()


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape before it was cut up: under `zero.Init` it has none of its own left."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _adamw(optim: Optim, parameters: Any) -> torch.optim.AdamW:
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        trainable,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        # elsewhere its default is one pass, too, or the kernels' (`step_in_one_pass`)
        fused=all(parameter.device.type == "cpu" for parameter in trainable),
    )


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: all-reduce by sum, where DDP's own would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
