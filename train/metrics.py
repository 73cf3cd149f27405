"""What a training stage shows of itself: `metrics.jsonl` always, Weights & Biases by choice, curves as PNG, throughput.

`metrics.jsonl` has one JSON object a line, `{"step": 7, "loss": 0.31, ...}`, in order of steps, whatever happened to
the run in between. Rows with `"operator_only": true` hold raw figures of private data: they are outside the privacy
guarantee, stay in this file, and go neither to Weights & Biases nor into a picture. Names used throughout:

    loss              mean squared error an element, of the batch (in a private stage: released with noise)
    epsilon           spent so far, at the ledger's delta
    text_loss, patches_loss     of a unified model: nats a text token, squared error an element of a noised patch
    expert_load_cv    coefficient of variation of the experts' load, a mean over layers
    images_per_s      over all ranks;  tflops: model TFLOP/s over all ranks;  mfu: share of the peak, null where unknown
                      (in a private stage: of the whole stage, at its end, for a step's time tells its true batch size)
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

import numpy as np

from checkpointing.store import write_durably

METRICS = "metrics.jsonl"
WandbMode = Literal["offline", "online", "disabled"]
Value = SupportsFloat | str | None
_MOST_LABELLED = 64  # cells of a picture that have their number in them


class MetricsLogger:
    """The stage's metrics; one process a stage has one (rank 0).

    Guarantee: after a restart with `resume_step` the file holds each step once: rows of steps that will be taken
    again are dropped, and so is a last line torn by the crash. A row is readable by others as soon as `log` returns,
    and on the disk when the logger is closed.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        config: dict[str, Any],
        *,
        wandb_mode: WandbMode = "offline",
        resume_step: int = 0,
        operator: bool = False,
    ) -> None:
        """`resume_step` is the step the run goes on with; `operator` allows `log_operator_only`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.operator = stage, operator
        path = folder / METRICS
        kept = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] < resume_step]
        write_durably(path, "".join(kept).encode())
        self._wandb = None if wandb_mode == "disabled" else _start_wandb(folder, stage, config, wandb_mode)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, **values: Value) -> None:
        """Append one row of values that may be published."""
        row = self._write(step, {}, values)
        if self._wandb is not None:
            self._wandb.log({f"{self.stage}/{name}": value for name, value in row.items() if name != "step"}, step=step)

    def log_operator_only(self, step: int, **values: Value) -> None:
        """Append one row of raw figures of private data, marked as outside the guarantee; it stays in the file."""
        if not self.operator:
            raise ValueError(
                f"{', '.join(values)} of stage {self.stage} would show raw private data: "
                "set privacy.operator_metrics: true to log such values, marked as outside the guarantee"
            )
        self._write(step, {"operator_only": True}, values)

    def _write(self, step: int, mark: dict[str, bool], values: dict[str, Value]) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step, **mark}
        row |= {name: _plain(value) for name, value in values.items()}
        if non_finite := [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
            row |= dict.fromkeys(non_finite) | {"non_finite": non_finite}  # JSON knows no NaN
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        return row

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: Value) -> float | int | str | bool | None:
    """A JSON value of what was given: zero-dimensional arrays and tensors become floats."""
    return value if value is None or isinstance(value, bool | int | float | str) else float(value)


def _start_wandb(folder: Path, stage: str, config: dict[str, Any], mode: Literal["offline", "online"]) -> Any:
    """A run whose files lie in the stage's folder and which tells nothing of the machine, its user or its code.

    `offline` opens no connection. A restarted stage goes on with the same run.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # else even an offline run calls Sentry
    import wandb

    run_id = folder / "wandb-run-id"
    if not run_id.exists():
        write_durably(run_id, secrets.token_hex(4).encode())
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_viewer=True,  # else even an offline run asks the server whose key it has
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=30,
    )
    try:
        return wandb.init(
            project="sfumato",
            name=stage,
            id=run_id.read_text(),
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            mode=mode,
            config=config,
            settings=settings,
        )
    except wandb.Error as error:
        raise ValueError(
            f"wandb is {mode}, but no run could be started: {error}. "
            "Set wandb: offline (and run `wandb sync` on its folder later) or wandb: disabled"
        ) from error


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the folder's metrics.jsonl, none if there is no such file; a torn last line is passed over."""
    path = folder / METRICS
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        yield row


# --- throughput ----------------------------------------------------------------------------------------------------


class Throughput:
    """Images and model FLOPs a second since the last reading.

    A training step is counted as three forwards (the backward costs two), by convention: recomputation, further passes
    for clipping and noise are overhead, and lower the utilisation rather than raise the FLOPs (Chowdhery et al. 2022,
    appendix B).
    `peak_flops` is what all devices together could do in the data type used, or None where the hardware has no entry.
    """

    def __init__(self, peak_flops: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.peak_flops = peak_flops
        self._clock = clock
        self._since, self._images, self._forward_flops = clock(), 0, 0.0

    def count(self, images: int, forward_flops: float) -> None:
        """Add a step's images and the FLOPs of their forward, of all ranks together."""
        self._images += images
        self._forward_flops += forward_flops

    def read(self) -> dict[str, float | None]:
        """`images_per_s`, `tflops` and `mfu` (None where the peak is unknown) since the last reading."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        images_per_s, flops = self._images / seconds, 3 * self._forward_flops / seconds
        self._since, self._images, self._forward_flops = now, 0, 0.0
        mfu = None if self.peak_flops is None else flops / self.peak_flops
        return {"images_per_s": images_per_s, "tflops": flops / 1e12, "mfu": mfu}


def format_mfu(mfu: float | None) -> str:
    """For tables: "41.3%", or "n/a" where the hardware has no entry in configs/hardware/."""
    return "n/a" if mfu is None else f"{mfu:.1%}"


# --- curves --------------------------------------------------------------------------------------------------------

_CURVES = {
    "loss": ("Loss", "mean squared error", "#1f6f8b"),
    "epsilon": ("Privacy spent", "ε at the ledger's δ", "#b5452c"),
    "images_per_s": ("Throughput", "images / s", "#5a7d2a"),
}


def plot_curves(folder: Path) -> Path | None:
    """Draw loss, epsilon and throughput against steps into `curves.png`; those of no two steps are left out.

    Returns the picture, or None where there is nothing to draw. Operator-only rows are not drawn.
    """
    rows = [row for row in read_metrics(folder) if not row.get("operator_only")]
    curves = {
        name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)] for name in _CURVES
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    # the object interface and not pyplot: no global state, and no display is ever looked for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(folder.name, x=0.01, ha="left", fontweight="bold")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        title, unit, colour = _CURVES[name]
        steps, values = zip(*points, strict=True)
        _draw_curve(axes, steps, values, colour, smooth=name == "loss" and len(values) >= 20)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if name != "loss":
            axes.set_ylim(bottom=0)
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    return path


def plot_expert_load(folder: Path, load_LE: Sequence[Sequence[float]], modalities: Sequence[str]) -> Path:
    """Draw each layer's choices by expert, as shares of an even load within its modality, and how their variation went.

    A layer's experts are equally many of each modality, in the modalities' order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{folder.name}: expert load", x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2)
    load_LME = np.reshape(load_LE, (len(load_LE), len(modalities), -1))
    shares_LME = load_LME.shape[2] * load_LME / np.maximum(1, load_LME.sum(2, keepdims=True))
    shares_LE = shares_LME.reshape(len(load_LE), -1)
    image = left.imshow(shares_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    figure.colorbar(image, ax=left)
    left.set_title("Share of an even load, at the end", loc="left", fontsize=10)
    names = [f"{modality} {number}" for modality in modalities for number in range(load_LME.shape[2])]
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(shares_LE)))
    left.set_ylabel("layer")
    if shares_LE.size <= _MOST_LABELLED:
        for (layer, expert), share in np.ndenumerate(shares_LE):
            left.text(expert, layer, f"{share:.2f}", ha="center", va="center", fontsize=9)
    points = [(row["step"], row["expert_load_cv"]) for row in read_metrics(folder) if "expert_load_cv" in row]
    if points:
        steps, values = zip(*points, strict=True)
        _draw_curve(right, steps, values, "#1f6f8b", smooth=False)
    right.set_title("Coefficient of variation, mean over layers", loc="left", fontsize=10)
    right.set_xlabel("step")
    right.set_ylim(bottom=0)
    path = folder / "expert_load.png"
    figure.savefig(path, dpi=150)
    return path


def _draw_curve(axes: Any, steps: tuple[int, ...], values: tuple[float, ...], colour: str, *, smooth: bool) -> None:
    """One line, pale under its running mean where it is to be smoothed."""
    marker = "o" if len(values) < 3 else None  # one point makes no line
    axes.plot(steps, values, color=colour, marker=marker, linewidth=0.8 if smooth else 1.6, alpha=0.3 if smooth else 1)
    if smooth:
        axes.plot(steps, _running_mean(values, span=len(values) / 40), color=colour, linewidth=1.8, label="smoothed")
        axes.legend(frameon=False, fontsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _running_mean(values: tuple[float, ...], span: float) -> list[float]:
    """Exponential mean over about `span` values, corrected for its start (Kingma & Ba 2015, section 3)."""
    decay, mean, smoothed = math.exp(-1 / span), 0.0, []
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**count))
    return smoothed
