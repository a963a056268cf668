"""One run, one folder: config.json, metrics.jsonl, TensorBoard events, checkpoints, summary.json.

Checkpoints hold what a trainer's state dict holds (`dllm_gym.agents.trainers.state_files`). They are written under a
temporary name and renamed, so that a killed run leaves whole checkpoints only.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dllm_gym import __version__
from dllm_gym.agents.terminal import progress_bar
from dllm_gym.agents.trainers.configs import completed, read_config, refuse_nan, stored_settings
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.agents.trainers.sharding import ShardFiles, shard_file
from dllm_gym.agents.trainers.state_files import pack, unpack
from dllm_gym.files import append, held, in_one_line, remove_unfinished, unfinished, write_text, written
from dllm_gym.types import Indices

KEPT = 2
"""Newest checkpoints that a run keeps."""
PATIENCE = 2.0
"""Seconds after which a second Ctrl-C ends a run at once; a launcher passes the first one on to its processes."""


class Run:
    """A run's folder, its log and its checkpoints; a context manager that turns SIGTERM and Ctrl-C into a last save.

    Where one of the two is ignored when the run starts (nohup, a job in the background), it stays ignored.

    Args:
        algorithm: the subcommand that trains.
        config: a dataclass instance. Its ``run_dir`` says where (None: ``runs/<algorithm>-<date>-<time>``), its
            ``resume`` names the folder to continue.
        processes: of the training; only the main one writes. None: this one alone.
        totals: metrics of a step that add up over the run; their sums are logged in their place.

    Raises:
        ValueError: ``resume`` names a run of another algorithm or config, or one without a readable checkpoint.
        FileExistsError: ``run_dir`` holds a run already.
    """

    def __init__(
        self,
        algorithm: str,
        config: Any,
        processes: Processes | None = None,
        totals: Sequence[str] = ("forwards", "seconds"),
    ):
        self.config = config
        self.processes = processes or Processes()
        self.main = main = self.processes.main
        self.totals: dict[str, float] = dict.fromkeys(totals, 0)
        self._step = 0
        self._bar: Callable[[int, dict], None] = lambda done, metrics: None
        self._writer: Any = None
        record = {"algorithm": algorithm} | stored_settings(config)
        refuse_nan(record)
        if config.resume:
            self.folder = Path(config.resume)
            stored = completed(read_config(self.folder), config)
            keys = record.keys() | stored.keys()
            different = sorted(key for key in keys - {"report"} if record.get(key) != stored.get(key))
            if different:
                nothing = "nothing (another version's run)"
                changes = ", ".join(f"{key}: {stored.get(key, nothing)!r} -> {record.get(key)!r}" for key in different)
                raise ValueError(f"resume={config.resume!r}: the config differs from the run's own ({changes}).")
        else:
            self.folder = Path(config.run_dir or f"runs/{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.processes.agree({"dllm_gym": __version__, "torch": torch.__version__, "settings": record})
        self._held = ExitStack()
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held(self.folder / ".lock", f"run {str(self.folder)!r}"))
            remove_unfinished(self.folder)
        if main and not config.resume:
            if (self.folder / "config.json").exists():
                raise FileExistsError(f"run_dir={str(self.folder)!r} holds a run already: resume it, or name another.")
            write_text(self.folder / "config.json", json.dumps(record, indent=2) + "\n")
        self.stop_requested = False
        self._signal, self._asked = signal.SIGTERM, math.inf

    def __enter__(self) -> Run:
        self._signals = handled(self._request_stop, signal.SIGTERM, signal.SIGINT)
        self._signals.__enter__()
        return self

    def __exit__(self, kind, error, _) -> None:
        self._signals.__exit__(None, None, None)
        if self._writer:
            with suppress(OSError) if kind else nullcontext():  # a full disk has been said already
                self._writer.close()
        self._held.close()
        if kind is None and self.stop_requested:
            raise self._stopped()
        if isinstance(error, RuntimeError) and self.processes.lost(error):
            raise RuntimeError(
                f"process {self.processes.rank} of {self.processes.count} has lost the others: one of them has ended, "
                f"and said why if it could. Continue with --resume {self.folder}"
            ) from None

    def _stopped(self) -> SystemExit:
        if self.main:
            print(f"stopped; continue with --resume {self.folder}")
        return SystemExit(128 + self._signal)

    def _request_stop(self, number, _frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._asked > PATIENCE:  # asked again: does not want to wait
            raise KeyboardInterrupt
        self.stop_requested, self._signal, self._asked = True, number, min(self._asked, now)

    def steps(
        self,
        total: int,
        parts: dict[str, Any],
        *,
        forwards: int | None = None,
        show: bool = True,
        saved: Callable[[int], None] = lambda done: None,
    ) -> Iterator[int]:
        """Yield the numbers of the steps that are left to do, from 0; call `record` in each.

        A resumed run begins after its newest checkpoint. After a step, a checkpoint is written if one is due; if a
        process was asked to stop, all of them do, by SystemExit.

        Args:
            total: steps of the whole run.
            parts: what a checkpoint holds: objects with ``state_dict`` and ``load_state_dict``, or lists of them.
            forwards: end when the total of this name has come to so much, instead of after ``total`` steps.
            show: a progress bar.
            saved: called with the number of steps done, beside each checkpoint, in the main process.
        """
        done = self.restore(parts)

        def over() -> bool:
            return done >= total if forwards is None else self.totals["forwards"] >= forwards

        with progress_bar(total if forwards is None else None, done, show=show and self.main) as self._bar:
            while not over():
                self._step = done
                yield done
                done += 1
                self.stop_requested = self.processes.any(self.stop_requested)
                if done % self.config.checkpoint_every == 0 or over() or self.stop_requested:
                    if self.main:
                        saved(done)
                    self.save(done, _states(parts) | {"totals": self.totals})
                if self.stop_requested:
                    self.processes.wait()  # where one process ends, a launcher soon kills the others
                    raise self._stopped()

    def record(self, metrics: dict[str, float], problems: Indices = (), prefix: str = "") -> None:
        """Log the metrics of a step, names after ``prefix``, with the totals so far, and show them on the bar."""
        self.totals = {name: total + metrics[name] for name, total in self.totals.items()}
        named = {f"{prefix}{name}": value for name, value in metrics.items()}
        self.log(self._step + 1, named | self.totals, problems)
        self._bar(self._step + 1, metrics)

    def restore(self, parts: dict[str, Any]) -> int:
        """Load the newest checkpoint of a resumed run into its parts. Returns the steps that are done: 0 if fresh."""
        loaded = self.load()
        if loaded is None:
            return 0
        done, state = loaded
        for name, part in parts.items():
            for one, its in zip(part, state[name], strict=True) if isinstance(part, list) else [(part, state[name])]:
                one.load_state_dict(its)
        sums = state.get("totals", state)  # Stable-Baselines3's trainer keeps them beside its parts
        self.totals = {name: sums[name] for name in self.totals}
        return done

    def log(self, step: int, metrics: dict[str, float], problems: Indices = ()) -> None:
        """Write metrics to TensorBoard and metrics.jsonl.

        Raises:
            FloatingPointError: a metric is not finite; it is logged first, and the batch's problems are named.
        """
        if self.main:
            append(self.folder / "metrics.jsonl", json.dumps({"step": step} | metrics))
            if self._writer is None:  # a checkpoint that cannot be read leaves the folder as it was
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self.folder)
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            indices = [int(i) for i in problems]
            raise FloatingPointError(f"step {step}: {', '.join(broken)} not finite; problems {indices}.")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write checkpoint ``step`` and drop the oldest. Of sharded tensors, each process writes its part.

        Raises:
            OSError: it cannot be written; those before it are whole, and the run continues from them.
        """
        tensors: dict[str, torch.Tensor] = {}
        shards: dict[str, torch.Tensor] = {}
        content: dict[str, Any] = {"step": step, "state": pack(state, "", tensors, shards)}
        final = self.folder / f"checkpoint-{step:06d}"
        if shards:
            content["shards"] = self.processes.count
        if not self.main:
            if shards:
                self._write_shard(unfinished(final), shards, None)
            return
        with written(final) as temporary:
            failed = None
            try:
                temporary.mkdir()
                save_file(tensors, temporary / "state.safetensors")
                (temporary / "state.json").write_text(json.dumps(content))
            except Exception as error:
                failed = error
            if shards:
                self._write_shard(temporary, shards, failed)
            elif failed:
                raise failed
            shutil.rmtree(final, ignore_errors=True)
        for old in _checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(old)

    def _write_shard(self, folder: Path, shards: dict[str, torch.Tensor], failed: Exception | None) -> None:
        """This process's part of a checkpoint, into a folder that the main process has made; all come here.

        Raises:
            Exception: ``failed``, or what went wrong here; OSError if it went wrong in another process.
        """
        self.processes.wait()
        try:
            if not failed:
                with in_one_line(folder):
                    save_file(shards, folder / shard_file(self.processes.rank, self.processes.count))
        except Exception as error:
            failed = error
        if self.processes.any(failed is not None):
            raise failed or OSError(f"{folder.name}: another process could not write its part of it.")

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint, None for a fresh run. Later lines of metrics.jsonl are dropped."""
        if not self.config.resume:
            return None
        found = _checkpoints(self.folder)
        if not found:
            raise ValueError(f"resume={self.config.resume!r}: the run has no checkpoint.")
        try:
            content = json.loads((found[-1] / "state.json").read_text())
            tensors = load_file(found[-1] / "state.safetensors")
            count = content.get("shards")
            shards = ShardFiles(found[-1], count, self.processes.mesh) if count else None
            state = unpack(content["state"], tensors, shards)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"resume={self.config.resume!r}: {found[-1].name} cannot be read ({error}). "
                f"Remove it to continue from {found[-2].name if len(found) > 1 else 'nothing: start a new run'}."
            ) from None
        path = self.folder / "metrics.jsonl"
        if self.main and path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= content["step"]))
        return content["step"], state

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, and say where the run is."""
        self.stop_requested = False  # too late
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"run folder: {self.folder}")


@contextmanager
def handled(handler: Callable, *numbers: int):
    """Signals go to ``handler`` inside, and to whom they went before afterwards.

    What is ignored stays ignored, as in a job in the background, and what a handler outside Python takes stays with it.
    """
    taken = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _states(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [one.state_dict() for one in part] if isinstance(part, list) else part.state_dict()
        for name, part in parts.items()
    }


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))
