"""Draw the staircase that quantization makes of a loss of one weight, and what a noise law smooths it to.

The weight shares its block with another one, which holds the block's scale. Above: the loss, the quantized loss, the
smoothed one (the exact expectation) and the minima of both. Below: the smoothed loss's slope, and the second-order one
that training follows.

    python examples/landscape.py                                  # INT4, randomized rounding
    python examples/landscape.py --fmt fp4 --noise smoothstep
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from lotion_fx.examples.options import Json, ReportTo, a_picture, known_format, print_rows, start
from lotion_fx.examples.reproduce.page import Report
from lotion_fx.numerics import rounding
from lotion_fx.numerics.formats import Format, resolve
from lotion_fx.numerics.noise import NoiseLaw, resolve_noise

AMAX = 1.0  # the other weight of the block
POINTS = 4000
PLOT = Path("landscape.png")


def loss(w: Tensor) -> Tensor:
    """A smooth loss with several minima, elementwise."""
    return 0.9 * (w - 0.15) ** 2 + 0.12 * torch.cos(11 * w + 0.6)


@dataclass
class Curves:
    """The curves over one weight, float64, all of one length: at even steps and at every level.

    Args:
        w: the latent weight.
        quantized: the loss at the nearest level.
        smoothed: the loss expected under the noise law.
        slope: of the smoothed loss, by differences.
        trained: the slope of ``L(mean) + L''(mean) / 2 sigma^2``, in closed form.
        levels: the values that the weight can be rounded to.
    """

    w: Tensor
    quantized: Tensor
    smoothed: Tensor
    slope: Tensor
    trained: Tensor
    levels: Tensor


@dataclass
class Minimum:
    """A local minimum, of the quantized or the smoothed loss or of both."""

    w: float
    quantized: float
    smoothed: float
    of_quantized: bool
    of_smoothed: bool


def in_block(w: Tensor, other: float) -> Tensor:
    """[n, 2]: each weight and the other weight of its block."""
    return torch.stack([w, torch.full_like(w, other)], 1)


def curves(fmt: Format, law: NoiseLaw) -> Curves:
    """All curves from the lowest level to the highest."""
    scale = rounding.scale(torch.tensor([[0.0, AMAX]], dtype=torch.float64), fmt).flatten()[-1]
    levels = torch.tensor(fmt.grid.levels, dtype=torch.float64) * scale
    levels = levels[levels.abs() <= AMAX]  # a larger weight would be the one that makes the scale
    even = torch.linspace(levels[0].item(), levels[-1].item(), POINTS, dtype=torch.float64)
    off_levels = (even[:, None] - levels).abs().amin(1) > 1e-6  # nearer than that, losses differ by rounding only
    w = torch.cat([even[off_levels], levels]).sort().values
    block = in_block(w, AMAX)
    values, odds = rounding.outcomes(block, fmt, law=law)
    smoothed = (odds * loss(values)).sum(0)[:, 0]
    mean = rounding.mean(block, fmt, law=law)[:, 0]
    slope_of = torch.func.grad(loss)
    first, second = torch.func.vmap(slope_of)(mean), torch.func.vmap(torch.func.grad(slope_of))(mean)
    shift = rounding.mean_vjp(block, in_block(first, 0.0), fmt, law=law, scale_grad=False)[:, 0]
    spread = rounding.variance_vjp(block, in_block(second, 0.0), fmt, law=law, scale_grad=False)[:, 0]
    (slope,) = torch.gradient(smoothed, spacing=(w,))
    return Curves(w, loss(rounding.rtn(block, fmt)[:, 0]), smoothed, slope, shift + spread / 2, levels)


def lowest(values: Tensor) -> Tensor:
    """Which elements are local minima; of a run of equal ones the first."""
    first = torch.cat([torch.ones(1, dtype=torch.bool), values.diff() != 0])
    padded = torch.nn.functional.pad(values[first], (1, 1), value=torch.inf)
    found = torch.zeros_like(first)
    found[first] = (padded[1:-1] < padded[:-2]) & (padded[1:-1] < padded[2:])
    return found


def minima(found: Curves) -> list[Minimum]:
    """The local minima of both losses, by place. A stair's place is that of its level."""
    of_quantized = set(found.levels[lowest(loss(found.levels))].tolist())
    of_smoothed = set(found.w[lowest(found.smoothed)].tolist())
    return [
        Minimum(w, quantized, smoothed, w in of_quantized, w in of_smoothed)
        for w, quantized, smoothed in torch.stack([found.w, found.quantized, found.smoothed], 1).tolist()
        if w in of_quantized | of_smoothed
    ]


def best(rows: list[Minimum]) -> tuple[Minimum, Minimum]:
    """The global minimum of the quantized loss, and that of the smoothed one."""
    return (
        min((row for row in rows if row.of_quantized), key=lambda row: row.quantized),
        min((row for row in rows if row.of_smoothed), key=lambda row: row.smoothed),
    )


def cells(rows: list[Minimum]) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line a minimum; the global ones are marked."""
    quantized, smoothed = best(rows)
    lines = [
        [f"{row.w:.4f}", f"{row.quantized:.4f}", f"{row.smoothed:.4f}",
         ("global" if row is quantized else "local") if row.of_quantized else "",
         ("global" if row is smoothed else "local") if row.of_smoothed else ""]
        for row in rows
    ]  # fmt: skip
    return ["weight", "quantized loss", "smoothed loss", "minimum of quantized", "minimum of smoothed"], lines


def table(rows: list[Minimum]) -> str:
    """`cells` as text."""
    headers, lines = cells(rows)
    return tabulate(lines, headers, disable_numparse=True, colalign=("right", "right", "right", "left", "left"))


def verdict(rows: list[Minimum]) -> str:
    """Whether the two global minima are one."""
    quantized, smoothed = best(rows)
    if quantized is smoothed:
        return f"The global minima agree: weight {quantized.w:.4f}, loss {quantized.quantized:.4f} in both."
    return f"The global minima differ: weight {quantized.w:.4f} quantized, {smoothed.w:.4f} smoothed."


def plot(found: Curves, rows: list[Minimum], fmt: Format, law: NoiseLaw, path: Path) -> Figure:
    """Losses above, slopes below."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    if len(found.levels) <= 32:
        for axes in (above, below):
            for level in found.levels:
                axes.axvline(level, color="0.9", linewidth=0.8, zorder=0)
    above.plot(found.w, loss(found.w), color="0.6", linestyle=":", label="loss, not quantized")
    above.plot(found.w, found.quantized, color="tab:blue", linewidth=1.2, label="quantized (to nearest)")
    above.plot(found.w, found.smoothed, color="tab:orange", linewidth=1.8, label=f"smoothed ({law.name})")
    for of, name, style in (
        ("quantized", "minima, quantized", {"marker": "o", "s": 70, "facecolors": "none", "edgecolors": "tab:blue"}),
        ("smoothed", "minima, smoothed", {"marker": "x", "s": 40, "color": "tab:red"}),
    ):
        chosen = [row for row in rows if getattr(row, f"of_{of}")]
        above.scatter([row.w for row in chosen], [getattr(row, of) for row in chosen], zorder=3, label=name, **style)
    lowest_row = best(rows)[1]
    above.annotate(
        "global", (lowest_row.w, lowest_row.smoothed), (0, -16), textcoords="offset points", ha="center", fontsize=9
    )
    above.margins(y=0.12)
    above.set(ylabel="loss", title=f"{fmt.name}, {law.name}")
    below.axhline(0, color="0.4", linewidth=0.8)
    below.plot(found.w, found.slope, color="tab:orange", linewidth=1.8, label="slope of the smoothed loss, exact")
    below.plot(found.w, found.trained, color="tab:green", linewidth=1, label="second order, as trained")
    below.set(xlabel=f"weight (the block's scale is held by another weight of {AMAX:g})", ylabel="slope")
    above.legend(fontsize=8, ncols=2, loc="upper center")
    below.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)
    return figure


# ------------------------------------------------------------------ command line
def _shared_scale(fmt: str) -> str:
    if resolve(known_format(fmt)).block == 1:
        raise typer.BadParameter(f"{fmt!r} gives every weight a scale of its own, and no rounding error")
    return fmt


def _known_noise(noise: str) -> str:
    try:
        resolve_noise(noise)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return noise


def main(
    fmt: Annotated[str, typer.Option(callback=_shared_scale, help="Number format of the weight.")] = "int4",
    noise: Annotated[str, typer.Option(callback=_known_noise, help="Noise law that smooths the loss.")] = "randomized",
    plot_to: Annotated[Path, typer.Option("--plot", callback=a_picture, help="Write the curves.")] = PLOT,
    report_to: ReportTo = None,
    as_json: Json = False,
) -> None:
    """Draw a quantized loss of one weight, the smoothed loss, its slope and the minima of both.

    lotion-fx reproduce landscape --fmt fp4 --noise smoothstep

    lotion-fx reproduce landscape --plot curves.svg --json
    """
    found = curves(resolve(fmt), resolve_noise(noise))
    rows = minima(found)
    typer.echo(table(rows) + "\n\n" + verdict(rows), err=as_json)
    figure = plot(found, rows, resolve(fmt), resolve_noise(noise), plot_to)
    typer.echo(f"curves: {plot_to}", err=as_json)
    if report_to is not None:
        command = f"lotion-fx reproduce landscape --fmt {fmt} --noise {noise}"
        told = {"format": fmt, "noise": noise, "the block's other weight": AMAX}
        report = Report("A quantized loss of one weight, and the smoothed one", verdict(rows), command, told, ())
        report.table(*cells(rows), "The local minima of both losses")
        report.figure(figure, "Quantized, the loss is flat between jumps; its expectation under random rounding is not")
        report.write(report_to)
        typer.echo(f"report: {report_to}", err=as_json)
    if as_json:
        print_rows(rows)


if __name__ == "__main__":
    start(main)
