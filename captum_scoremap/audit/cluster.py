"""The same work on Ray Data: shards as rows, actors that hold the model, results back to the one who writes.

A row is the number of a shard; an actor turns it into that shard's tables, just as a single process does. Only the
program that started the audit writes, so that workers need the images but not the output folder. A worker that dies is
replaced and its shard computed anew.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import pyarrow as pa

from captum_scoremap.audit.schema import TABLES
from captum_scoremap.audit.worker import Worker
from captum_scoremap.data.extras import import_extra

__all__ = ["on_ray"]


def on_ray(
    worker: Worker, numbers: Sequence[int], address: str, actors: int, done: Callable[[int], None]
) -> Generator[tuple[int, dict[str, pa.Table]], None, None]:
    """Compute shards on a Ray cluster.

    Args:
        worker: What computes a shard; a copy goes to every actor.
        numbers: Numbers of the shards.
        address: Of the cluster: ``local`` starts one on this machine, ``auto`` finds the running one,
            ``ray://HOST:PORT`` is another machine's.
        actors: Number of actors, each with a copy of the model.
        done: Told the number of images of every shard that is done.

    Yields:
        Number and tables of each shard, in the order in which they are done.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
    """
    ray = import_extra("ray", "ray")
    import_extra("ray.data", "ray")
    if not numbers:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
        results = shards.map_batches(
            _Actor,
            fn_constructor_args=(ray.put(worker),),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
        )
        for row in results.iter_rows():
            done(worker.plan.size(row["shard"]))
            yield row["shard"], {name: pa.ipc.open_file(row[name]).read_all() for name in TABLES}
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """Holds the model of one worker process."""

    def __init__(self, worker: Any) -> None:
        import ray

        self.worker: Worker = ray.get(worker) if isinstance(worker, ray.ObjectRef) else worker

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn shard numbers into shards, each table as the bytes of an Arrow file."""
        rows = []
        for number, tables in self.worker.results(batch["shard"].to_pylist()):
            rows.append({"shard": number, **{name: _packed(table) for name, table in tables.items()}})
        return pa.Table.from_pylist(
            rows, schema=pa.schema([("shard", pa.int64()), *((name, pa.large_binary()) for name in TABLES)])
        )


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
