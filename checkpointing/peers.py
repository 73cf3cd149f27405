"""Shards between nodes' memories, over a gloo group of its own: what one node loses, its partner holds."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK_BYTES = 1 << 26  # a message, so that a time-out is about one and not about a whole shard


def partner(rank: int, nodes: Sequence[int]) -> int:
    """The rank that keeps a copy of this rank's shard: its counterpart on the next node.

    nodes: each rank's node. Where nodes have equally many ranks, this is a shift by one node's ranks.
    """
    numbers = sorted(set(nodes))
    following = numbers[(numbers.index(nodes[rank]) + 1) % len(numbers)]
    here = [r for r, node in enumerate(nodes) if node == nodes[rank]]
    there = [r for r, node in enumerate(nodes) if node == following]
    return there[here.index(rank) % len(there)]


class PeerLink:
    """Point-to-point messages between ranks on different nodes, beside whatever the training step sends.

    One thread a rank may use it at a time. A peer that is gone ends in RuntimeError within the time-out.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, nodes: Sequence[int]) -> None:
        self.group, self.rank, self.nodes = group, rank, tuple(nodes)
        self.partner = partner(rank, nodes)
        self.sources = [r for r in range(len(nodes)) if partner(r, nodes) == rank]  # whose copies this rank keeps

    @classmethod
    def join(cls, rank: int, world_size: int, node: int, timeout_s: float = 60.0) -> PeerLink | None:
        """Collective over the default group. None, on every rank, where all are on one node."""
        timeout = datetime.timedelta(seconds=timeout_s)
        group: Any = dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportUnknownMemberType]
        nodes = _gather(node, world_size, group)
        return cls(group, rank, nodes) if len(set(nodes)) > 1 else None

    def gather_sizes(self, size_bytes: int) -> list[int]:
        """Collective: the size of every rank's shard."""
        return _gather(size_bytes, len(self.nodes), self.group)

    def exchange(self, shard: memoryview | None, index: bytes, received: dict[int, memoryview]) -> dict[int, bytes]:
        """Send this rank's shard to its partner, and receive those of `sources` into `received`, whole and in place.

        Returns the index that came with each. A rank that has none to give sends None, and its partner gets no index.
        Every rank of the group must call it, in the same order of saves.
        """
        mine = [len(shard), len(index)] if shard is not None else [0, 0]
        sending = [self._send(torch.tensor(mine), self.partner)]
        sizes = {source: torch.zeros(2, dtype=torch.int64) for source in self.sources}
        for source, size in sizes.items():
            self._receive(size, source)
        if shard is not None:
            sending += [
                self._send(block, self.partner) for block in _blocks(torch.frombuffer(shard, dtype=torch.uint8))
            ]
            sending.append(self._send(torch.frombuffer(bytearray(index), dtype=torch.uint8), self.partner))
        indexes: dict[int, bytes] = {}
        for source, size in sizes.items():
            length, index_length = (int(count) for count in size)
            if not index_length:
                continue
            if length != len(received[source]):
                raise RuntimeError(f"rank {source} sends {length:,} bytes, and {len(received[source]):,} were agreed")
            indexes[source] = self._receive_shard(source, received[source], index_length)
        for work in sending:
            work.wait()
        return indexes

    def send(self, shard: Tensor, to: int) -> None:
        """One shard, for a `receive` of the same length over there."""
        for work in [self._send(block, to) for block in _blocks(shard)]:
            work.wait()

    def receive(self, out: memoryview, source: int) -> None:
        for block in _blocks(torch.frombuffer(out, dtype=torch.uint8)):
            self._receive(block, source)

    def _receive_shard(self, source: int, out: memoryview, index_length: int) -> bytes:
        self.receive(out, source)
        index = torch.empty(index_length, dtype=torch.uint8)
        self._receive(index, source)
        return index.numpy().tobytes()

    def _send(self, tensor: Tensor, to: int) -> Any:
        return dist.isend(tensor, group=self.group, group_dst=to)

    def _receive(self, tensor: Tensor, source: int) -> None:
        dist.recv(tensor, group=self.group, group_src=source)


def _blocks(whole: Tensor) -> list[Tensor]:
    return [whole[begin : begin + _BLOCK_BYTES] for begin in range(0, len(whole), _BLOCK_BYTES)]


def _gather(item: int, world_size: int, group: Any) -> list[int]:
    items: list[Any] = [None] * world_size
    dist.all_gather_object(items, item, group=group)  # pyright: ignore[reportUnknownMemberType]
    return items
