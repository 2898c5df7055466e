"""Drawn chest X-rays (phantoms) for the quickstart, tests and scale runs, without a download.

They show no patient and teach nothing about real ones.
"""

from xrai.phantom.anatomy import Phantom, plan
from xrai.phantom.draw import draw_phantom
from xrai.phantom.findings import FINDINGS, plan_findings
from xrai.phantom.folder import encode, make_phantoms

__all__ = [
    "FINDINGS",
    "Phantom",
    "draw_phantom",
    "encode",
    "make_phantoms",
    "plan",
    "plan_findings",
]
