"""One HTML file that can be mailed: verdict first, then the numbers with their intervals, figures, cards and provenance.

No script, no network, no font: figures are inline SVG drawn by matplotlib whose colours are style-sheet variables, so the
page follows the reader's light or dark theme and prints on white.
"""

from metarec_gym.evaluation.report.cards import cautions
from metarec_gym.evaluation.report.page import ReportData, render

__all__ = ["ReportData", "cautions", "render"]
