"""What these tests print at their end: the divergence between the engines, for every variant."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "divergence"
    ]
    if found:
        terminalreporter.write_sep(
            "-", "divergence in bfloat16, nats per token: the noise floor of comparisons across engines"
        )
    for node, value in found:
        terminalreporter.write_line(f"{node.rpartition('[')[2].rstrip(']'):<28} {value}")
