"""The page in a real browser engine: it loads nothing, the console stays empty, and genes can be looked up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import anndata as ad
import pytest

import invirtuo as iv

pytestmark = pytest.mark.slow
pytest.importorskip("PyQt6.QtWebEngineCore", reason="needs a browser engine: pip install PyQt6-WebEngine")

# opens a page at a width, runs a script, prints what came of it
BROWSER = """
import json, sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

class Page(QWebEnginePage):
    said = []
    def javaScriptConsoleMessage(self, level, message, line, source):
        self.said.append(message)

path, width, script = sys.argv[1:]
app = QApplication(["page", "--no-sandbox"])
view = QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(int(width), 1600)

def done(result):
    print(json.dumps({"said": page.said, "result": result}))
    app.quit()

page.loadFinished.connect(lambda _: QTimer.singleShot(1000, lambda: page.runJavaScript(script, done)))
view.load(QUrl.fromLocalFile(path))
view.show()
QTimer.singleShot(60_000, app.quit)
app.exec()
"""

SEARCH = """(() => {
const find = (selector) => document.querySelector(selector);
const heads = () => [...document.querySelectorAll("#genes tbody th")].map((head) => head.textContent);
const input = find("#genes input");
input.value = "GENE_NAME";
input.dispatchEvent(new Event("input"));
const found = heads(), gene = find("[data-role=gene]").textContent;
input.value = "";
input.dispatchEvent(new Event("input"));
find("th[data-column=gene] button").click();
return {
  found, gene, sorted: heads(), order: find("th[data-column=gene]").getAttribute("aria-sort"),
  requests: performance.getEntriesByType("resource").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    toy = iv.datasets.toy()
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"], val_fraction=0.0)
    out = tmp_path_factory.mktemp("page")
    iv.compare(toy, design, "ridge", split=split, out=out, n_cells=50)
    return out


@pytest.mark.parametrize("width", [1280, 390])
def test_a_gene_is_looked_up(page, width):
    gene = ad.read_h5ad(page / "predicted.h5ad", backed="r").var_names[3]
    script = SEARCH.replace("GENE_NAME", gene.lower())
    environment = os.environ | {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu",
    }
    command = [sys.executable, "-c", BROWSER, str(page / "report.html"), str(width), script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["said"] == []
    result = answer["result"]
    assert gene in result["found"] and result["gene"] == f"Distribution of {gene}"
    assert result["sorted"] == sorted(result["sorted"]) and result["order"] == "ascending"
    assert result["requests"] == 0
    assert result["overflow"] <= 0
