"""What approximations lose, as a table that prints, and exports CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TOTAL = "all layers"


@dataclass(frozen=True)
class Row:
    """One approximation of one layer, or of all layers together, at one damping λ.

    With E the exact curvature of the layer, A the approximate one, P what the structure applies for (E + λI)⁻¹, g the
    gradient, d* = (E + λI)⁻¹g and d the structure's direction. Of all layers together, E and A are block-diagonal.

    Attributes:
        layer: its name, or ``"all layers"``.
        approximation: its name.
        family: of its structure, see :mod:`curvlib.analysis.family`.
        damping: λ.
        parameters: how many.
        frobenius: ‖A - E‖_F / ‖E‖_F.
        spectral: ‖A - E‖₂ / ‖E‖₂.
        inverse_frobenius: ‖P - (E + λI)⁻¹‖_F / ‖(E + λI)⁻¹‖_F.
        inverse_spectral: likewise, of spectral norms.
        cosine: between d and d*.
        norm_ratio: ‖d‖ / ‖d*‖.
        decrease: the decrease gᵀd - ½ dᵀ(E + λI)d of the quadratic model by the step d, over that by d*; may be negative.
        best_decrease: the same for the best step along d, (gᵀd)² / (gᵀd* · dᵀ(E + λI)d); at most 1.
        condition: largest over smallest eigenvalue of P.
        statistics_bytes: of what is averaged.
        roots_bytes: of what is solved for.
        statistics_ms: milliseconds to take in the data (moments of examples) or one gradient, without backward passes.
        refresh_ms: to solve the roots.
        apply_ms: for one direction.
    """

    layer: str
    approximation: str
    family: str
    damping: float
    parameters: int
    frobenius: float
    spectral: float
    inverse_frobenius: float
    inverse_spectral: float
    cosine: float
    norm_ratio: float
    decrease: float
    best_decrease: float
    condition: float
    statistics_bytes: int
    roots_bytes: int
    statistics_ms: float
    refresh_ms: float
    apply_ms: float


COLUMNS = tuple(field.name for field in fields(Row))
_HEADINGS = {
    "approximation": "",
    "damping": "λ",
    "frobenius": "Frobenius",
    "spectral": "spectral",
    "inverse_frobenius": "inv. Frob.",
    "inverse_spectral": "inv. spec.",
    "cosine": "cosine",
    "norm_ratio": "norm",
    "decrease": "decrease",
    "best_decrease": "best",
    "condition": "condition",
    "statistics_bytes": "stat. kB",
    "roots_bytes": "roots kB",
    "statistics_ms": "stat. ms",
    "refresh_ms": "refresh ms",
    "apply_ms": "apply ms",
}


@dataclass(frozen=True)
class Comparison:
    """Rows, by layer, approximation and damping.

    Attributes:
        rows: all of them; those of all layers together last.
        about: what was compared with what, in a line.
    """

    rows: tuple[Row, ...]
    about: str

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, **wanted: Any) -> Comparison:
        """The rows whose columns have these values, as in ``select(layer="all layers", damping=1e-2)``.

        Raises:
            ValueError: for an unknown column, or where nothing is left, naming the values that there are.
        """
        rows: Sequence[Row] = self.rows
        for name, value in wanted.items():
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}; there are {', '.join(COLUMNS)}")
            there = list(dict.fromkeys(getattr(row, name) for row in rows))
            rows = [row for row in rows if getattr(row, name) == value]
            if not rows:
                raise ValueError(f"no row has {name}={value!r}; there are {', '.join(map(repr, there))}")
        return Comparison(tuple(rows), self.about)

    def __str__(self) -> str:
        """A table for each layer; relative errors and shares to three digits, sizes in kB, times in ms."""
        blocks = [self.about]
        for layer in dict.fromkeys(row.layer for row in self.rows):
            mine = [row for row in self.rows if row.layer == layer]
            cells = [list(_HEADINGS.values())] + [
                [_cell(name, getattr(row, name)) for name in _HEADINGS] for row in mine
            ]
            widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
            lines = [
                "  ".join(
                    cell.ljust(width) if not column else cell.rjust(width)
                    for column, (cell, width) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in cells
            ]
            blocks.append("\n".join([f"{layer}, {mine[0].parameters:,} parameters", *lines]))
        return "\n\n".join(blocks)

    def to_csv(self, file: Path | str | None = None) -> str:
        """The rows as CSV, also written to a file where one is named."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return _written(buffer.getvalue(), file)

    def to_json(self, file: Path | str | None = None) -> str:
        """``{"about": …, "rows": […]}``, also written to a file where one is named."""
        content = {"about": self.about, "rows": [asdict(row) for row in self.rows]}
        return _written(json.dumps(content, indent=1), file)


def _written(text: str, file: Path | str | None) -> str:
    if file is not None:
        Path(file).write_text(text)
    return text


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return f"{value / 1e3:.1f}"
    if name.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:.3g}"
