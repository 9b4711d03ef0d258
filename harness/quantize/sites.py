"""What calibration knows of the inputs of a fused group, and the group's scales and codes chosen from that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.errors import BadWeightError, UserError
from harness.formats.format import Format, Rounding
from harness.quantize import gptq
from harness.quantize.encode import by_rows
from harness.quantize.recipes import Method


@dataclass
class Site:
    """One input that several linear layers read, and what calibration found out about it. Statistics have a leading
    dimension of `num` experts; `rounding` is the kernel's, with the largest input seen so far."""

    form: Format
    num: int = 1
    amax: Tensor | None = None
    moments: Tensor | None = None
    shift: Tensor | None = None
    settled: bool = False
    """Whether amax is final: the inputs have been seen once."""

    def observe(self, x: Tensor, index: int = 0) -> None:
        """Takes inputs `[tokens, in]` (of expert `index`) into account for the scale."""
        if self.settled or not self.form.needs_calibration or not x.numel():
            return
        if self.amax is None:
            self.amax = torch.zeros(self.num, device=x.device)
        self.amax[index] = torch.maximum(self.amax[index], x.abs().amax().float())

    def input_scales(self) -> Tensor:
        """The stored scale of every expert's inputs, `[num]`; `UserError` where no input was ever seen, or one that is
        NaN or infinite and has no scale."""
        if self.amax is None:
            raise UserError("No calibration token reached a layer whose inputs are quantized.", "Give more samples.")
        _check_finite(self.amax)
        return torch.cat([self.form.input_scale(amax) for amax in self.amax])

    def rounding(self, index: int = 0) -> Rounding | None:
        """What happens to an input now; None for a format that leaves inputs alone."""
        if not self.form.needs_calibration:
            return self.form.rounding_in_calibration()

        def rounded(x: Tensor) -> Tensor:
            assert self.amax is not None
            rounding = self.form.rounding_in_calibration(self.form.input_scale(self.amax[index]))
            assert rounding is not None
            return rounding(x)

        return rounded

    def accumulate(self, x: Tensor, reference: Tensor | None, index: int = 0) -> None:
        """Adds inputs `x [tokens, in]` to the moments, as the kernel rounds them, and their distance from
        `reference [tokens, in]` to the shift; without a reference only the moments' diagonal is kept."""
        self.observe(x, index)
        rounding = self.rounding(index)
        rounded = (x if rounding is None else rounding(x)).float()
        width = x.shape[-1]
        if reference is None:
            if self.moments is None:
                self.moments = torch.zeros(self.num, width, device=x.device)
            self.moments[index] += rounded.square().sum(0)
            return
        if self.moments is None or self.shift is None:
            self.moments = torch.zeros(self.num, width, width, device=x.device)
            self.shift = torch.zeros_like(self.moments)
        self.moments[index].addmm_(rounded.T, rounded)
        self.shift[index].addmm_(rounded.T, reference.float() - rounded)

    def part(self, first: int, last: int) -> "Site":
        """The site of some of the experts; itself where all share one input."""
        if self.num == 1:
            return self
        moments = None if self.moments is None else self.moments[first:last]
        shift = None if self.shift is None else self.shift[first:last]
        return Site(self.form, last - first, moments=moments, shift=shift)

    def importance(self) -> Tensor | None:
        """The second moment of every input, `[num, in]`."""
        if self.moments is None or self.moments.dim() == 2:
            return self.moments
        return self.moments.diagonal(dim1=1, dim2=2)

    def forget(self) -> None:
        """Frees what is only needed to choose codes."""
        self.moments = self.shift = None
        self.settled = self.amax is not None


def _check_finite(statistics: Tensor) -> None:
    if not bool(torch.isfinite(statistics).all()):
        raise BadWeightError(
            "The inputs of a layer overflow on the calibration samples: they hold NaN or infinity.",
            "Run the 16-bit source on these samples; if it gives NaN too, it cannot be quantized.",
        )


@dataclass(frozen=True)
class GroupReport:
    """What became of one fused group (of all experts' together): its error on the calibration inputs, with these codes
    and rounded to nearest, and its output, in the output's own unit squared; None where no moments were taken."""

    group: str
    format: str
    num_weights: int
    error: float | None = None
    rtn_error: float | None = None
    output: float | None = None
    num_rows_rtn: int = 0
    damping: float | None = None


def quantize_matrices(
    name: str, w: Tensor, site: Site, method: Method
) -> tuple[dict[str, Tensor], Tensor, GroupReport]:
    """Stores `w [n, rows, in]` in the site's format: tensors `[n, …]` by suffix, the decoded weights and a report. Each
    of the n matrices gets its own shared scale; the site's statistics are one for all of them, or one for each."""
    form = site.form
    num, rows, width = w.shape
    report = GroupReport(name, form.name, w.numel())
    shared = w.reshape(site.num, -1, width)
    target = shared
    importance = site.importance()
    if importance is not None:
        _check_finite(importance)
    if site.moments is not None and site.shift is not None:
        target = gptq.aimed(shared, site.moments, site.shift, method.damping)
    amax = target.reshape(num, -1).abs().amax(1)
    shared_scales = torch.cat([form.shared_scale(one) for one in amax])
    per_row = shared_scales.repeat_interleave(rows).view(-1, 1)
    row_scales = per_row.view(site.num, -1, 1)

    def chosen(n: int, rows: slice) -> Tensor:
        weighted = None if importance is None else importance[n]
        return form.choose_scales(target[n, rows], row_scales[n, rows], method.scales, weighted)

    scales = torch.cat([by_rows(partial(chosen, n), part) for n, part in enumerate(target)])
    if site.moments is not None and site.shift is not None:
        decode_scales = form.decode_scales(scales, per_row).view(*shared.shape[:2], -1)
        rounded = gptq.gptq(form, shared, target, decode_scales, site.moments, method.damping, method.sweeps)
        codes = rounded.codes.view(-1, width)
        report = replace(report, **{name: value for name, value in vars(rounded).items() if name != "codes"})
    else:
        flat = w.view(-1, width)
        codes = by_rows(lambda rows: form.encode(flat[rows], scales[rows], per_row[rows]), flat)
    tensors = form.pack(codes, scales)

    def decoded(rows: slice) -> Tensor:
        stored = {suffix: tensor[rows] for suffix, tensor in tensors.items()}
        if form.shared_scale_name is not None:
            stored[form.shared_scale_name] = per_row[rows]
        return form.decode(stored, torch.float32)

    weights = by_rows(decoded, codes).view(w.shape)
    tensors = {suffix: tensor.view(num, rows, -1) for suffix, tensor in tensors.items()}
    if form.shared_scale_name is not None:
        tensors[form.shared_scale_name] = shared_scales.view(num, 1)
    return tensors, weights, report


def merged(reports: Sequence[GroupReport]) -> GroupReport:
    """One report for the parts of a group."""

    def total(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return GroupReport(
        group=reports[0].group,
        format=reports[0].format,
        num_weights=sum(report.num_weights for report in reports),
        error=total(report.error for report in reports),
        rtn_error=total(report.rtn_error for report in reports),
        output=total(report.output for report in reports),
        num_rows_rtn=sum(report.num_rows_rtn for report in reports),
        damping=max((report.damping for report in reports if report.damping is not None), default=None),
    )
