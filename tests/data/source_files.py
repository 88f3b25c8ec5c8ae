"""Small data sources as JSONL files, with two questions about each image."""

import io
import json
from pathlib import Path

from PIL import Image


def png(seed: int) -> bytes:
    """Encode an image of 5 x 4 pixels in one color, different for each seed."""
    sink = io.BytesIO()
    Image.new("RGB", (5, 4), (seed % 256, seed // 256, 7)).save(sink, "PNG")
    return sink.getvalue()


def records(count: int, **columns: str) -> list[dict]:
    """Make rows with these further columns; two rows in a row share an image."""
    return [
        {"id": f"q{i}", "image": f"images/{i // 2}.png", "question": f"what is {i}?", "answer": str(i)} | columns
        for i in range(count)
    ]


def write_jsonl(folder: Path, rows: list[dict]) -> Path:
    """Write the rows, and an image for every two of them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(-(-len(rows) // 2)):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
