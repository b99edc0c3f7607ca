"""Pictures, and lighter copies of them."""

import base64
import io
import re
from urllib.parse import quote

from PIL import Image as Picture


def inches(data):
    """The width of a bitmap, as its own resolution has it."""
    found = Picture.open(io.BytesIO(data))
    return found.width / (float(found.info.get("dpi", (96, 96))[0]) or 96)


def fewer_colors(data):
    """A PNG of 256 colors, where that is smaller."""
    found = Picture.open(io.BytesIO(data))
    opaque = found.convert("RGBA").getextrema()[3][0] == 255
    if opaque:
        found = found.convert("RGB").quantize(256)
    else:
        method = Picture.Quantize.FASTOCTREE
        found = found.convert("RGBA").quantize(256, method)
    buffer = io.BytesIO()
    found.save(buffer, "png", optimize=True)
    return min(data, buffer.getvalue(), key=len)


def fewer_digits(data):
    """An SVG of paths to a hundredth, of pixels in 256 colors."""

    def pixels(match):
        lighter = fewer_colors(base64.b64decode(match[2]))
        return match[1] + base64.b64encode(lighter).decode()

    text = re.sub(
        r' d="[^"]*"',
        lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]),
        data.decode(),
    )
    png = r"(data:image/png;base64,)\s*([\w+/=\s]+)"
    return re.sub(png, pixels, text).encode()


def lighter(data, kind):
    """The same picture to the eye in fewer bytes."""
    lightest = {"svg": fewer_digits, "png": fewer_colors}
    return lightest.get(kind, bytes)(data)


def data_uri(data, kind):
    if kind == "svg":  # as text, which is shorter than its base 64
        text = quote(" ".join(data.decode().split()), safe=" ,;:=/+()@!$*?")
        return f"data:image/svg+xml,{text}"
    mime = {"png": "image/png", "jpg": "image/jpeg"}[kind]
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
