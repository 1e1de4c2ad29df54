"""The pictures of the page that the README shows, from the committed records of the toy study: python -m tests.screenshots"""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path

from PIL import Image

from rfbench import report
from rfbench.settings import HOME
from tests import browser

WIDTH, HEIGHT = 1180, 1330
CLAIM = "claim-redmd-fidelity"  # shown, opened, and no other


def main() -> None:
    records = sorted((HOME / "reports" / "records").rglob("*.json"))
    with tempfile.TemporaryDirectory() as name:
        page = report.report(records, study="toy", out=Path(name) / "toy")
        with browser.tab(Path(name) / "profile") as tab:
            for scheme in ("light", "dark"):
                tab.open(page, width=WIDTH, height=HEIGHT, scheme=scheme)
                tab.js(f"document.querySelectorAll('.finding:not(#{CLAIM})').forEach(one => one.remove())")
                tab.js(f"document.querySelector('#{CLAIM} details').open = true")
                clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
                shot = tab.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
                picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
                picture.save(HOME / "reports" / f"page-{scheme}.webp", "webp", quality=82, method=6)


if __name__ == "__main__":
    main()
