"""Pictures of pages, and what must hold of each: texts can be read, and nothing is wider than the window."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.integration.browser import Page

WIDE, PHONE = (1200, 760), (360, 640)
# What a browser says itself of requests that failed: in these tests on purpose.
EXPECTED = re.compile(r"Failed to load resource|net::ERR_|WebSocket connection to")

# The least contrast of any text in sight with what is behind it, and which text that is; and what is wider than the
# window. Colours that a filter or opacity changes are looked at in the states without.
LOOK = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const bytes = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = bytes(color).map((part) => {
            const value = part / 255;
            return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return bytes(color)[3] === 255 || !element.parentElement ? color : ground(element.parentElement);
    };
    const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const worst = [...document.querySelectorAll("body *")]
        .filter((element) => own(element) && element.checkVisibility() && !element.matches("option, :disabled"))
        .map((element) => {
            const [one, other] = [light(getComputedStyle(element).color), light(ground(element))];
            return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), element.textContent.slice(0, 80)];
        })
        .sort((one, other) => one[0] - other[0])[0];
    return { worst, wide: document.documentElement.scrollWidth - document.documentElement.clientWidth };
})()"""


def directory_of_pictures(otherwise: Path) -> Path:
    """Where pictures go: the directory that ``SCREENSHOTS`` names, else this one."""
    directory = Path(os.environ.get("SCREENSHOTS") or otherwise)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def unexpected(page: Page) -> list[str]:
    """What the browser complained of, without failed requests."""
    return [problem for problem in page.problems if not EXPECTED.search(problem)]


async def shoot(page: Page, picture: Path, *, schemes: tuple[str, ...] = ("light", "dark")) -> None:
    """Take a picture, wide and on a phone, light and dark; texts must be readable and fit (WCAG 2.1, 1.4.3, 1.4.10)."""
    for name, (width, height) in (("wide", WIDE), ("phone", PHONE)):
        for scheme in schemes:
            await page.look(width=width, height=height, scheme=scheme)
            # Two frames: sizes are noticed in one and drawn in the next.
            await page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            picture.with_name(f"{picture.name}-{name}-{scheme}.png").write_bytes(await page.screenshot())
            look = await page.run(LOOK)
            assert look["wide"] <= 0, (name, scheme)
            assert look["worst"][0] >= 4.5, (name, scheme, look["worst"])
    await page.look(width=WIDE[0], height=WIDE[1])
    assert unexpected(page) == []
