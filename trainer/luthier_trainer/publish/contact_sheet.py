"""The contact sheet of a dataset of images: a page of HTML beside it that shows the first outputs.

The page is complete in itself. Thumbnails are in it as JPEG, it loads nothing, and its size is bounded by the number of
images (`hub.contactSheet`) and by how much of a text is shown.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template

from luthier_api.generate import CONTACT_SHEET
from luthier_api.run import GenerateRun
from luthier_trainer.generation.records import Line
from luthier_trainer.publish.first_outputs import first_outputs, makes_images, shortened
from luthier_trainer.runtime.notices import notice

FILE = "contact-sheet.html"
SIDE, QUALITY = 256, 80  # pixels of the longer side of a thumbnail; 10 to 20 KB each
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; background: #fff; color: #111; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); gap: 1.5em; }
figure { margin: 0; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; }
p { margin: .4em 0; }
.less { color: #666; font-size: 12px; }
.error { color: #b00; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$about</p>
<main>
$figures
</main>
</body>
</html>
"""
)


def page(run: GenerateRun, result: Path) -> str | None:
    """Return the page of the outputs in `result`; None if the job has none, or wants no page."""
    wanted = run.spec.hub.contact_sheet if run.spec.hub else 0
    count = CONTACT_SHEET if wanted is None else wanted
    if not makes_images(run) or not count:
        return None
    try:
        shown = first_outputs(run, result, count)
    except FileNotFoundError as error:
        notice(f"spec.hub.contactSheet: {error.filename} is not there, so there is no contact sheet")
        return None
    title = (run.spec.hub and run.spec.hub.repo) or run.name
    about = f"The first {len(shown)} outputs of the GenerateJob {run.name}, made with Luthier."
    figures = "\n".join(figure(line, file) for line, file in shown)
    return PAGE.substitute(title=escape(title), about=escape(about), figures=figures)


def figure(line: Line, file: Path | None) -> str:
    """Return what the page shows of an output."""
    prompt = shortened(line.get("prompt") or "")
    own = {"row": line["row"], "sample": line["sample"] or None, "id": line["id"], "seed": line["seed"]}
    told = ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)
    below = [f"<p>{escape(prompt)}</p>"]
    if line.get("negativePrompt"):
        below.append(f'<p class="less">not: {escape(shortened(line["negativePrompt"]))}</p>')
    below.append(f'<p class="less">{escape(shortened(told))}</p>')
    if line.get("settings"):
        settings = json.dumps(line["settings"], ensure_ascii=False)
        below.append(f'<p class="less">{escape(shortened(settings))}</p>')
    caption = f"<figcaption>{''.join(below)}</figcaption>"
    return f"<figure>{picture(line, file, prompt)}{caption}</figure>"


def picture(line: Line, file: Path | None, prompt: str) -> str:
    """Return the thumbnail of an output, or why there is none."""
    if file is None:
        return f'<p class="error">{escape(shortened(line["error"] or ""))}</p>'
    try:
        content, width, height = thumbnail(file)
    except OSError as error:
        return f'<p class="error">{escape(shortened(f"cannot be shown: {error.strerror or type(error).__name__}"))}</p>'
    source = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(prompt)}">'


def thumbnail(file: Path) -> tuple[bytes, int, int]:
    """Return a small JPEG of an image, its width and its height. Raises OSError if it cannot be read."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(file) as image:
        image.thumbnail((SIDE, SIDE))
        small = image.convert("RGB")
        small.save(content, "jpeg", quality=QUALITY)
    return content.getvalue(), *small.size
