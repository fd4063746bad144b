"""Looks at pages in a headless Chromium: look.py SCREENSHOTS PAGE..."""

import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTHS = {"phone": 375, "desktop": 1280}

# What a person would see as wrong, as lines of text.
FAULTS = """() => {
    const faults = [];
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) faults.push(`wider than the window: ${root.scrollWidth} > ${root.clientWidth}`);
    for (const img of document.images)
        if (!img.complete || img.naturalWidth === 0) faults.push(`a picture does not load: ${img.alt}`);
    for (const img of document.images) if (!img.alt) faults.push("a picture without a description");
    for (const e of document.querySelectorAll("body *")) {
        const box = e.getBoundingClientRect();
        if (box.width === 0 || e.closest(".scroll, pre, svg, details:not([open])")) continue;
        if (box.right > root.clientWidth + 1) faults.push(`beyond the edge: <${e.tagName}> ${e.className}`);
    }
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
    for (const e of document.querySelectorAll("p, li, td, th, h1, h2, summary, figcaption, a, caption, pre")) {
        if (!e.textContent.trim() || e.getBoundingClientRect().width === 0) continue;
        const ratio = contrast(rgb(getComputedStyle(e).color), behind(e));
        if (ratio < 4.5) faults.push(`faint (${ratio.toFixed(1)}): <${e.tagName}> ${e.textContent.slice(0, 40)}`);
    }
    for (const text of document.querySelectorAll("svg text")) {
        const svg = text.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        const size = parseFloat(getComputedStyle(text).fontSize) * scale;
        if (size < 8) faults.push(`small (${size.toFixed(1)} px): ${text.textContent}`);
        const box = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
        if (box.left < all.left - 2 || box.right > all.right + 2 || box.top < all.top - 2 || box.bottom > all.bottom + 2)
            faults.push(`clipped: ${text.textContent}`);
    }
    for (const line of document.querySelectorAll("polyline")) if (!line.getAttribute("points")) faults.push("an empty curve");
    for (const svg of document.querySelectorAll("svg")) if (!svg.getAttribute("aria-label")) faults.push("a drawing without a name");
    const ids = [...document.querySelectorAll("nav a")].map((a) => a.hash.slice(1));
    for (const id of ids) if (!document.getElementById(id)) faults.push(`a link that leads nowhere: ${id}`);
    return [...new Set(faults)];
}"""


def main(out, pages):
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    with sync_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=os.environ.get("VITRUM_CHROMIUM") or None, args=["--no-sandbox"])
        for number, path in enumerate(pages):
            for width_name, width in WIDTHS.items():
                for scheme in ("light", "dark"):
                    where = f"{path}, {width_name}, {scheme}"
                    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    said = []
                    page.on("console", lambda message: said.append(f"console: {message.text}"))
                    page.on("pageerror", lambda error: said.append(f"error: {error}"))
                    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or said.append(f"request: {r.url}"))
                    page.goto(Path(path).resolve().as_uri())
                    # Folded tables are looked at as well.
                    said += page.evaluate(FAULTS)
                    name = f"{number}-{Path(path).parent.name}-{width_name}-{scheme}.png"
                    page.screenshot(path=out / name, full_page=True)
                    page.evaluate("() => document.querySelectorAll('details').forEach((d) => { d.open = true; })")
                    said += [f"{fault} (unfolded)" for fault in page.evaluate(FAULTS)]
                    faults += [f"{where}: {fault}" for fault in said]
                    page.close()
        browser.close()
    print(f"page: {len(pages)} pages at {len(WIDTHS)} widths in 2 schemes, {len(faults)} faults")
    print("\n".join(faults[:60]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
