"""Reports as one HTML file each: text, tables, curves and pictures; a browser loads nothing else.

from datamerge.runtime.pages import Section, Table, render

html = render("Evaluation", "Two encoders.", [Section("Scores", table=Table(["arm", "top-1"], [["A", "93.1"]]))])
"""

from datamerge.runtime.pages.page import Chart, Folded, Section, Strip, Table, Tile, render, table_html

__all__ = ["Chart", "Folded", "Section", "Strip", "Table", "Tile", "render", "table_html"]
