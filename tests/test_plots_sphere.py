"""Posterior caps: the geometry against brute force, the picture's content, and the page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline

from pyro_contrastive import diagnostics
from pyro_contrastive.diagnostics import _globe, plots_sphere
from pyro_contrastive.distributions import VonMisesFisher

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_front_regions_hold_the_points_that_the_caps_hold():
    """200 random caps of every size: points of the near side, judged by their cosine."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        centre, radius = unit(rng, 3), rng.uniform(0.05, 3.05)
        z = unit(rng, 300, 3)
        z[:, 2] = np.abs(z[:, 2])
        clear = (np.abs(np.arccos(z @ centre) - radius) > 0.02) & (z[:, 2] > 0.1)  # polygons have corners
        inside = np.zeros(len(z), dtype=bool)
        for outline in _globe.front_region(centre, radius, num=400):
            inside ^= Outline(outline).contains_points(z[:, :2])  # the even-odd rule
        np.testing.assert_array_equal(inside[clear], (z @ centre >= np.cos(radius))[clear])


@pytest.mark.parametrize("point", [(0, 0, 1), (0, 0, -1), (1, 0, 0), (0, -1, 0)])
@pytest.mark.parametrize("radius", [1e-6, 1.0, np.pi / 2, 2.0, 3.1])
def test_front_regions_at_poles_and_limb_are_finite(point, radius):
    for outline in _globe.front_region(np.array(point, dtype=float), radius):
        assert np.isfinite(outline).all() and np.all(np.hypot(*outline.T) <= 1 + 1e-9)


@pytest.mark.parametrize("dim", [4, 10, 64])
@pytest.mark.parametrize("ratio", [1.0, 20.0])
def test_regions_of_two_coordinates_hold_their_level(dim, ratio):
    """8 posteriors, 4,000 draws each: standard error of the mean below .0013, of one share .0034."""
    mean = torch.nn.functional.normalize(torch.randn(8, dim, dtype=torch.float64), dim=-1)
    law = VonMisesFisher(mean, torch.full((8,), ratio * dim, dtype=torch.float64))
    content = _globe.globe(mean, law.concentration)
    z = law.sample((4000,)).numpy() @ content.frame[:, :2]
    shares = []
    for index, (centre, across, along) in enumerate(content.ellipse):
        p = content.points[index, :2]
        outer = np.outer(p, p)
        spread = np.linalg.inv(across * (np.eye(2) - outer) + along * outer)
        offset = z[:, index] - centre * p
        shares.append((np.einsum("ni,ij,nj->n", offset, spread, offset) <= 1).mean())
    assert 0.94 < np.mean(shares) < 0.965
    assert min(shares) > 0.92 and max(shares) < 0.98


def test_ellipses_of_the_2_sphere_are_the_boundaries_of_the_caps():
    rng = np.random.default_rng(1)
    content = _globe.globe(unit(rng, 5, 3), [3.0, 10.0, 30.0, 100.0, 1e4], view=(10.0, 20.0))
    for point, radius, shape in zip(content.points, content.radius, content.ellipse, strict=True):
        across = np.linalg.svd(point[None])[2][1:]  # two tangents
        t = rng.uniform(0, 2 * np.pi, 50)[:, None]
        boundary = np.cos(radius) * point + np.sin(radius) * (np.cos(t) * across[0] + np.sin(t) * across[1])
        offset = boundary[:, :2] - shape[0] * point[:2]
        outer = np.outer(point[:2], point[:2])
        spread = np.linalg.inv(shape[1] * (np.eye(2) - outer) + shape[2] * outer)
        np.testing.assert_allclose(np.einsum("ni,ij,nj->n", offset, spread, offset), 1.0, rtol=1e-6)


def test_limits_of_the_concentration():
    content = _globe.globe(np.eye(6)[:3], [0.0, np.inf, 1e12])
    np.testing.assert_allclose(content.ellipse[0, 1:], _chi2(0.95) / 6)  # uniform: every coordinate has variance 1 / d
    np.testing.assert_allclose(content.ellipse[1], [1.0, 0.0, 0.0])
    assert content.radius[1] == 0 and content.ellipse[2, 1] < 1e-10
    assert diagnostics.plot_sphere_caps(np.eye(6)[:3], [0.0, np.inf, 1e12]).has_data()
    assert diagnostics.plot_sphere_caps(np.eye(3), [0.0, np.inf, 5.0]).has_data()


def _chi2(level: float) -> float:
    return -2.0 * np.log1p(-level)


def test_principal_axes_and_share_are_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(2)
    mean = unit(rng, 40, 7) * np.array([3, 2, 1.5, 1, 1, 1, 1])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    content = _globe.globe(mean, np.full(40, 20.0))
    singular = np.linalg.svd(mean, compute_uv=False) ** 2
    assert content.share == pytest.approx(singular[:3].sum() / singular.sum(), abs=1e-12)
    title = diagnostics.plot_sphere_caps(mean, np.full(40, 20.0)).get_title()
    assert "principal axes 1 to 3 of 7" in title and f"{100 * content.share:.0f} %" in title
    title = diagnostics.plot_sphere_caps(mean, np.full(40, 20.0), frame=np.eye(7)[:, :3]).get_title()
    assert "3 chosen axes of 7" in title and f"{100 * (mean[:, :3] ** 2).sum() / 40:.0f} %" in title


def test_marks_lie_where_the_directions_and_truths_are():
    view = _globe.view_frame(30.0, 40.0)
    mean, truth = np.eye(3), np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    ax = diagnostics.plot_sphere_caps(mean, [50.0, 50.0, 50.0], truth=truth, view=(30.0, 40.0))
    dots = np.array([line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"])
    np.testing.assert_allclose(np.sort(dots, axis=0), np.sort(mean @ view[:, :2], axis=0), atol=1e-12)
    red = [line for line in ax.lines if line.get_marker() == "x" and line.get_color() == "#D55E00"]
    missed = np.concatenate([line.get_xydata() for line in red])
    np.testing.assert_allclose(missed, (truth @ view[:, :2])[1:2], atol=1e-12)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["truth in its cap: 2", "outside: 1"]
    assert np.linalg.det(view) == pytest.approx(1.0)  # no mirror image


def test_arcs_of_the_circle_have_the_radius_of_the_caps():
    ax = diagnostics.plot_sphere_caps([[1.0, 0.0], [0.0, 1.0]], [20.0, 4.0])
    arcs = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 91]
    for arc, centre, kappa in zip(arcs, (0.0, np.pi / 2), (20.0, 4.0), strict=True):
        angle = np.arctan2(arc[:, 1], arc[:, 0])
        radius = diagnostics.cap_radius(0.95, kappa, 2)
        np.testing.assert_allclose([angle.min(), angle.max()], [centre - radius, centre + radius], atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concentration": [1.0]}, r"`concentration` \(N,\).*got shapes \(2, 3\) and \(1,\)"),
        ({"concentration": [1.0, -1.0]}, "`concentration` must be >= 0"),
        ({"mean_direction": [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]}, "`mean_direction` must hold unit vectors"),
        ({"level": 1.0}, r"`level` must lie in \(0, 1\), got 1.0"),
        ({"truth": [[1.0, 0.0, 0.0]]}, r"`truth` must have shape \(2, 3\)"),
        ({"frame": np.ones((3, 3))}, "`frame` must hold 3 orthonormal columns of length d = 3.*qr"),
        ({"mean_direction": np.eye(4)[:2], "view": (0.0, 0.0)}, "`view` is for d = 3, got d = 4; choose axes by"),
        ({"mean_direction": np.eye(4)[:2], "family": "power_spherical"}, 'family "vmf", got'),
        ({"mean_direction": np.zeros((0, 3)), "concentration": []}, "N >= 1"),
    ],
)
@pytest.mark.parametrize("draw", [diagnostics.plot_sphere_caps, diagnostics.sphere_html])
def test_bad_input_is_told_the_way_out(draw, change, message):
    good = {"mean_direction": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], "concentration": [5.0, 7.0]}
    with pytest.raises(ValueError, match=message):
        draw(**{**good, **change})


def test_other_backends_are_refused_and_given_axes_are_used():
    with pytest.raises(ValueError, match="`backend` must be \"matplotlib\".*got 'bokeh'"):
        diagnostics.plot_sphere_caps(np.eye(3), [1.0, 2.0, 3.0], backend="bokeh")
    ax = Figure().add_subplot()
    assert diagnostics.plot_sphere_caps(np.eye(3), [1.0, 2.0, 3.0], ax=ax) is ax
    small = diagnostics.plot_sphere_caps(np.eye(3), [1.0] * 3, figsize=(3.0, 2.0))
    assert tuple(small.figure.get_size_inches()) == (3, 2)


def test_one_concentration_needs_no_colour_bar():
    colours, bar = plots_sphere.cap_colours(np.array([5.0, 5.0]))
    assert bar is None and (colours[0] == colours[1]).all()
    colours, bar = plots_sphere.cap_colours(np.array([1.0, 10.0, np.inf, 0.0]))
    assert bar.get_clim() == (1.0, 10.0)
    np.testing.assert_array_equal(colours[[1, 0]], colours[[2, 3]])  # the infinite as the largest, 0 as the smallest


# --- the page ---------------------------------------------------------------------------------------------------------


def page(dim: int = 3, **change) -> str:
    rng = np.random.default_rng(3)
    mean = unit(rng, 12, dim)
    return diagnostics.sphere_html(mean, np.geomspace(2, 300, 12), truth=unit(rng, 12, dim), **change)


def test_page_asks_for_nothing_and_escapes_what_it_is_told():
    evil = "</script><script>alert(1)</script>"
    text = page(labels=[evil] + ["@CAPTION@"] * 11, title="<b>a & b</b> @DATA@")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", text)
    assert evil not in text and "<b>" not in text and html.escape("<b>a & b</b>") in text
    (data,) = re.findall(r"^const DATA = (.*);$", text, re.MULTILINE)
    names = [item["n"] for item in json.loads(data.replace("<\\/", "</"))["items"]]
    assert sorted(names) == sorted([evil] + ["@CAPTION@"] * 11)
    assert len(text) < 20_000


def test_page_needs_a_sphere_and_a_label_each():
    with pytest.raises(ValueError, match="needs d >= 3, got d = 2; `plot_sphere_caps` draws the circle"):
        diagnostics.sphere_html([[1.0, 0.0]], [2.0])
    with pytest.raises(ValueError, match="`labels` must have 12 entries"):
        page(labels=["one"])


PROBE = """
<script>
window.onerror = (message) => { document.title = "ERROR " + message; };
</script>
"""
CHECK = """
<script>
const key = k => canvas.dispatchEvent(new KeyboardEvent("keydown", {key: k, cancelable: true}));
for (const radius of [0.3, 1.2, 2.0, 3.0]) for (const p of [[0,0,1],[0,0,-1],[1,0,0],[.6,0,.8],[.6,0,-.8]]) {
  for (const o of frontRegion(p, radius)) for (const q of o) if (!(Math.hypot(...q) < 1.001)) throw "outline";
}
const before = canvas.toDataURL();
for (let i = 0; i < 200; i++) { key("ArrowLeft"); key("ArrowDown"); }
const gram = [0, 1, 2].map(i => [0, 1, 2].map(j => Math.round(1e9 * dot(turn[i], turn[j])) / 1e9));
const turned = canvas.toDataURL();
key("0");
const drawn = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(v => v);
document.title = JSON.stringify({drawn, turns: before !== turned, back: canvas.toDataURL() === before, gram,
  overflow: document.documentElement.scrollWidth > innerWidth});
</script>
</body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("dim", [3, 8])
def test_page_draws_and_turns_in_a_browser(dim, tmp_path):
    text = page(dim).replace("<head>", "<head>" + PROBE).replace("</body>", CHECK)
    file = tmp_path / "page.html"
    file.write_text(text, "utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=600,800", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (title,) = re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)
    found = json.loads(html.unescape(title))
    assert found == {"drawn": True, "turns": True, "back": True, "overflow": False,
                     "gram": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}  # fmt: skip
