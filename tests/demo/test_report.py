"""The demo's report leaves the backend of matplotlib alone; its page is tested with the other pages."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import ROOT


def test_the_report_does_not_import_pyplot() -> None:
    code = (
        "import sys; from datamerge.runtime.pages.charts import Series, draw; import datamerge.demo.report; "
        "assert draw([Series('a', [0], [1])], x_label='', y_label=''); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
