"""The picture of `plot_sphere_caps` as one self-contained page: turn it by dragging or by the arrow keys."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from pyro_contrastive.diagnostics._globe import globe
from pyro_contrastive.diagnostics.calibration import Family
from pyro_contrastive.diagnostics.plots_sphere import cap_colours

__all__ = ["sphere_html"]


def sphere_html(
    mean_direction: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    truth: ArrayLike | torch.Tensor | None = None,
    labels: Sequence[object] | None = None,
    frame: ArrayLike | None = None,
    view: tuple[float, float] | None = None,
    family: Family = "vmf",
    title: str | None = None,
) -> str:
    """Posterior caps on a globe that turns: a page of about 10 kB plus 150 bytes per posterior, no request, no library.

    The arguments are those of `plot_sphere_caps` and mean the same. The pointer names the nearest posterior: its label,
    concentration and cap radius. Dragging and the arrow keys turn the globe, 0 turns it back.

    Args:
        mean_direction: Unit vectors, shape (N, d), d >= 3.
        concentration: Concentrations, >= 0, shape (N,).
        level: Probability of each cap, in (0, 1).
        truth: True latent points, shape (N, d).
        labels: Name of each posterior, N of them; None numbers them.
        frame: Orthonormal columns (d, 3), the axes shown at first.
        view: Elevation and azimuth of the viewer at first, for d = 3.
        family: As in `plot_sphere_caps`.
        title: Title of the page; None says what is drawn.

    Returns:
        An HTML document. `Path("caps.html").write_text(page, "utf-8")` makes a file of it; in another page or a
        notebook it goes into the `srcdoc` of an iframe (escaped by `html.escape`).

    Raises:
        ValueError: If a shape or a value is out of range, or d = 2.

    Example:
        >>> page = sphere_html([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [50.0, 5.0], labels=["a clear 7", "1 or 7?"])
        >>> "1 or 7?" in page, "http" in page
        (True, False)
    """
    from matplotlib.colors import to_hex

    content = globe(mean_direction, concentration, level=level, truth=truth, frame=frame, view=view, family=family)
    count = len(content.points)
    if content.dim < 3:
        raise ValueError("a globe needs d >= 3, got d = 2; `plot_sphere_caps` draws the circle")
    names = [f"posterior {index}" for index in range(count)] if labels is None else [str(name) for name in labels]
    if len(names) != count:
        raise ValueError(f"`labels` must have {count} entries as `mean_direction` has, got {len(names)}")
    colours, mappable = cap_colours(content.concentration)
    items = [
        {
            "p": content.points[index].round(5).tolist(),
            "e": content.ellipse[index].round(6).tolist(),
            "r": round(float(content.radius[index]), 5),
            "k": f"{content.concentration[index]:.3g}",
            "c": to_hex(colours[index]),
            "n": names[index],
            **({} if content.truth is None else {"t": content.truth[index].round(5).tolist()}),
            **({} if content.inside is None else {"in": bool(content.inside[index])}),
        }
        for index in np.argsort(-content.radius, kind="stable")  # the small ones are drawn last
    ]
    data = {"d": content.dim, "frame": content.frame.round(6).tolist() if content.dim == 3 else None, "items": items}
    if mappable is None:
        legend = ""
    else:
        low, high = mappable.get_clim()
        stops = ", ".join(to_hex(mappable.to_rgba(low * (high / low) ** f)) for f in np.linspace(0, 1, 9))
        legend = (
            f'<span>concentration κ</span><span>{low:.3g}</span><span class="bar" style="background:'
            f'linear-gradient(to right, {stops})"></span><span>{high:.3g}</span>'
        )
    if content.inside is not None:
        legend += f"<span>✕ truth: {content.inside.sum()} of {count} in their caps, the others red</span>"
    caption = content.caption.replace("\n", " ")
    script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    fill = {
        "TITLE": html.escape(caption if title is None else title),
        "CAPTION": html.escape(caption),
        "LEGEND": legend,
        "DATA": script,
    }
    return re.sub("@([A-Z]+)@", lambda place: fill[place[1]], _PAGE)  # in one pass: what is filled in is not read again


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #222; --dim: #6e6e6e; --ball: #f4f4f4; --line: #ffffff; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --dim: #a0a0a0; --ball: #2b2b2b; --line: #3a3a3a; --page: #181818; }
}
body { margin: 0; padding: 12px; font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--page); }
main { max-width: 620px; margin: 0 auto; }
h1 { font-size: 1.1rem; margin: 0 0 4px; }
p { margin: 4px 0; }
canvas { display: block; width: 100%; aspect-ratio: 1; cursor: grab; touch-action: none; }
canvas:active { cursor: grabbing; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; }
.bar { width: 120px; height: 12px; }
.dim { color: var(--dim); font-size: 0.9em; }
#told { min-height: 1.4em; }
</style>
</head>
<body>
<main>
<h1>@TITLE@</h1>
<canvas id="globe" tabindex="0" role="img" aria-label="@CAPTION@" aria-describedby="how"></canvas>
<p id="told" aria-live="polite"></p>
<p class="legend">@LEGEND@</p>
<p class="dim" id="how">Drag or use the arrow keys to turn, 0 to turn back. Dashed and pale: the far side.</p>
<noscript>This picture needs JavaScript to be drawn.</noscript>
</main>
<script>
"use strict";
const DATA = @DATA@;
const canvas = document.getElementById("globe"), told = document.getElementById("told");
const TAU = 2 * Math.PI, TRUTH = "#D55E00";
let turn = [[1, 0, 0], [0, 1, 0], [0, 0, 1]], chosen = -1;
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const apply = (m, v) => m.map(row => dot(row, v));
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name);

// Outlines of the part of a cap on the viewer's side, to be filled by the even-odd rule.
function frontRegion([x, y, z], radius) {
  const c = Math.cos(radius), s = Math.sin(radius), q = Math.hypot(x, y), n = 60;
  const disc = Array.from({length: n}, (_, i) => [Math.cos(TAU * i / n), Math.sin(TAU * i / n)]);
  const e1 = q > 1e-12 ? [-x * z / q, -y * z / q, q] : [1, 0, 0];
  const e2 = [y * e1[2] - z * e1[1], z * e1[0] - x * e1[2]];
  const clip = v => Math.max(-1, Math.min(1, v));
  const crosses = q > Math.abs(c);
  const half = crosses ? Math.acos(clip(-c * z / (s * q))) : Math.PI;
  const edge = [];
  for (let i = 0; i <= n; i++) {
    const t = half * (2 * i / n - 1), a = s * Math.cos(t), b = s * Math.sin(t);
    edge.push([c * x + a * e1[0] + b * e2[0], c * y + a * e1[1] + b * e2[1]]);
  }
  if (!crosses) {
    if (c * z > 0) return c > 0 ? [edge] : [disc, edge];
    return c > 0 ? [] : [disc];
  }
  const centre = Math.atan2(y, x), reach = Math.acos(clip(c / q)), last = edge[edge.length - 1];
  const side = Math.sin(Math.atan2(last[1], last[0]) - centre) < 0 ? -1 : 1;
  for (let i = 0; i <= n; i++) {
    const t = centre + side * reach * (1 - 2 * i / n);
    edge.push([Math.cos(t), Math.sin(t)]);
  }
  return [edge];
}

// d > 3: centre e[0] p, matrix e[1] (I - p p') + e[2] p p' in the two coordinates of the picture.
function ellipse([x, y], [centre, across, along]) {
  const q = Math.hypot(x, y), u = q > 1e-12 ? [x / q, y / q] : [1, 0], outline = [];
  const a = Math.sqrt(Math.max(across * (1 - q * q) + along * q * q, 0)), b = Math.sqrt(across);
  for (let i = 0; i < 96; i++) {
    const f = a * Math.cos(TAU * i / 96), g = b * Math.sin(TAU * i / 96);
    const px = centre * x + f * u[0] - g * u[1], py = centre * y + f * u[1] + g * u[0];
    const out = Math.max(1, Math.hypot(px, py));
    outline.push([px / out, py / out]);
  }
  return [outline];
}

function draw() {
  const size = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(size * ratio)) canvas.width = canvas.height = Math.round(size * ratio);
  const ctx = canvas.getContext("2d"), unit = 0.46 * size;
  const place = p => [size / 2 + unit * p[0], size / 2 - unit * p[1]];
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, size, size);
  ctx.beginPath();
  ctx.arc(size / 2, size / 2, unit, 0, TAU);
  ctx.fillStyle = style("--ball"); ctx.fill();
  ctx.strokeStyle = style("--dim"); ctx.lineWidth = 1; ctx.stroke();
  if (DATA.frame) graticule(ctx, place);
  const items = DATA.items.map(item => ({...item, p: apply(turn, item.p), t: item.t && apply(turn, item.t)}));
  const fill = (outlines, colour, near, bold) => {
    if (!outlines.length) return;
    ctx.beginPath();
    for (const outline of outlines) {
      outline.forEach((p, i) => i ? ctx.lineTo(...place(p)) : ctx.moveTo(...place(p)));
      ctx.closePath();
    }
    ctx.fillStyle = ctx.strokeStyle = colour;
    ctx.globalAlpha = near ? 0.3 : 0.08; ctx.fill("evenodd");
    ctx.globalAlpha = near ? 1 : 0.55; ctx.lineWidth = bold ? 3 : near ? 1.5 : 0.8;
    ctx.setLineDash(near ? [] : [4, 4]); ctx.stroke();
    ctx.setLineDash([]); ctx.globalAlpha = 1;
  };
  for (const near of [false, true]) items.forEach((item, i) => {
    const p = item.p, bold = i === chosen;
    if (DATA.frame && item.r > 0) fill(frontRegion(near ? p : [p[0], p[1], -p[2]], item.r), item.c, near, bold);
    else if (!DATA.frame && (p[2] >= 0) === near) fill(ellipse(p, item.e), item.c, near, bold);
  });
  for (const item of items) {
    ctx.beginPath();
    ctx.arc(...place(item.p), 4, 0, TAU);
    ctx.strokeStyle = item.c; ctx.lineWidth = 1.5;
    ctx.fillStyle = item.p[2] >= 0 ? item.c : style("--page");
    ctx.fill(); ctx.stroke();
    if (!item.t) continue;
    const [x, y] = place(item.t);
    ctx.globalAlpha = item.t[2] >= 0 ? 1 : 0.45;
    ctx.strokeStyle = item.in ? style("--ink") : TRUTH;
    ctx.beginPath();
    ctx.moveTo(x - 4, y - 4); ctx.lineTo(x + 4, y + 4); ctx.moveTo(x - 4, y + 4); ctx.lineTo(x + 4, y - 4);
    ctx.stroke(); ctx.globalAlpha = 1;
  }
}

function graticule(ctx, place) {
  const columns = [0, 1, 2].map(k => DATA.frame.map(row => row[k]));
  const show = v => apply(turn, columns.map(column => dot(column, v)));
  ctx.strokeStyle = style("--line"); ctx.lineWidth = 1;
  const circle = f => {
    ctx.beginPath();
    let pen = false;
    for (let t = 0; t <= 360; t += 4) {
      const p = show(f(t * TAU / 360));
      if (p[2] >= 0) pen ? ctx.lineTo(...place(p)) : ctx.moveTo(...place(p));
      pen = p[2] >= 0;
    }
    ctx.stroke();
  };
  for (let a = 0; a < 180; a += 30) {
    const c = Math.cos(a * TAU / 360), s = Math.sin(a * TAU / 360);
    circle(t => [Math.cos(t) * c, Math.cos(t) * s, Math.sin(t)]);
    const b = (a - 90) * TAU / 360;
    if (a) circle(t => [Math.cos(t) * Math.cos(b), Math.sin(t) * Math.cos(b), Math.sin(b)]);
  }
  ctx.fillStyle = style("--dim"); ctx.font = "13px system-ui, sans-serif"; ctx.textAlign = "center";
  [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((v, k) => {
    const p = show(v);
    if (p[2] >= 0) ctx.fillText("e" + "₁₂₃"[k], ...place([1.04 * p[0], 1.04 * p[1]]));
  });
}

function rotate(dx, dy) {
  const [cx, sx, cy, sy] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)];
  const step = [[cx, 0, sx], [sx * sy, cy, -cx * sy], [-sx * cy, sy, cx * cy]];
  const columns = [0, 1, 2].map(k => turn.map(row => row[k]));
  turn = step.map(row => columns.map(column => dot(row, column)));
  for (let i = 0; i < 3; i++) {  // stays orthogonal however long one drags
    for (let j = 0; j < i; j++) {
      const f = dot(turn[i], turn[j]);
      turn[i] = turn[i].map((v, k) => v - f * turn[j][k]);
    }
    const length = Math.hypot(...turn[i]);
    turn[i] = turn[i].map(v => v / length);
  }
  draw();
}

let held = null;
canvas.addEventListener("pointerdown", event => {
  held = [event.clientX, event.clientY];
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("pointercancel", () => { held = null; });
canvas.addEventListener("pointermove", event => {
  if (held) {
    const scale = 0.46 * canvas.clientWidth;
    rotate((event.clientX - held[0]) / scale, (event.clientY - held[1]) / scale);
    held = [event.clientX, event.clientY];
  } else choose(event);
});
canvas.addEventListener("keydown", event => {
  const steps = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1]};
  if (event.key in steps) rotate(...steps[event.key]);
  else if (event.key === "0") { turn = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]; draw(); }
  else return;
  event.preventDefault();
});

function choose(event) {
  const box = canvas.getBoundingClientRect(), unit = 0.46 * box.width;
  const x = (event.clientX - box.left - box.width / 2) / unit, y = (box.top + box.height / 2 - event.clientY) / unit;
  let best = -1, least = 0.06;
  DATA.items.forEach((item, i) => {
    const p = apply(turn, item.p), far = Math.hypot(p[0] - x, p[1] - y) + (p[2] < 0 ? 0.01 : 0);
    if (far < least) { least = far; best = i; }
  });
  if (best === chosen) return;
  chosen = best;
  const item = DATA.items[best];
  told.textContent = item ? `${item.n}: κ ${item.k}, cap ${(item.r * 360 / TAU).toFixed(1)}°` : "";
  draw();
}

new ResizeObserver(draw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""
