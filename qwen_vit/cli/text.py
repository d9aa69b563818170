"""Format the output of the commands: tables and lists for people, and the JSON of `encode`."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vit.common.store_path import AnyPath
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import display_name, one_line, plural
from qwen_vit.export.estimate import Estimate
from qwen_vit.export.result import ExportReport
from qwen_vit.features import UNKNOWN_SIZE, FailedImage, ImageFeatures, dtype_name

__all__ = [
    "counts_text",
    "encoded_json",
    "encoded_table",
    "estimate_text",
    "export_text",
    "facts_text",
    "features_text",
    "size_text",
    "table",
    "unfinished_text",
    "waits_text",
]

COUNTS = {"parameters", "patches", "tensors", "tokens"}  # printed as 1,000,000
ROWS_OF = {"merged": "tokens", "patch": "patches", "mean": "rows"}


def estimate_text(estimate: Estimate, folder: AnyPath) -> str:
    seconds = estimate.seconds
    duration = "unknown"
    if seconds is not None:
        duration = f"about {_duration(seconds)}, estimated from a few images"
    duration = duration if estimate.to_do else "none: nothing is left to do"
    unfit = [
        f"{count:,} {what}"
        for count, what in (
            (estimate.missing, "missing"), (estimate.unreadable, "that cannot be encoded")
        )
        if count
    ]  # fmt: skip
    images = [
        f"{estimate.done:,} done" * bool(estimate.done),
        unfinished_text(estimate.saved, estimate.to_do) + f" ({', '.join(unfit)})" * bool(unfit),
        f"{estimate.failed:,} failed earlier" * bool(estimate.failed),
    ]
    return facts_text(
        {
            "images": ", ".join(filter(None, images)),
            "rows": f"{estimate.rows:,}",
            **_where(size_text(estimate.bytes), folder),
            "time": duration,
        }
    )


def size_text(n_bytes: int) -> str:
    """Return a number of bytes in a suitable unit.

    >>> size_text(16_500_000_000_000), size_text(300_000)
    ('16,500.0 GB', '0.3 MB')
    """
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.1f} MB"


def _where(size: str, folder: AnyPath) -> dict[str, str]:
    if not isinstance(folder, Path):
        return {"in the store": size}
    parents = (folder, *folder.absolute().parents)
    free = shutil.disk_usage(next(each for each in parents if each.exists())).free
    return {"on the disk": f"{size}, where {size_text(free)} are free"}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7_200 else f"{seconds / 3600:,.1f} hours"


def unfinished_text(saved: int, to_do: int) -> str:
    """Return the numbers of saved and remaining images of an unfinished export, as text.

    >>> unfinished_text(58, 142)
    '58 saved in an open shard, 142 to do'
    """
    return f"{saved:,} saved in an open shard, " * bool(saved) + f"{to_do:,} to do"


def counts_text(done: int, to_do: int, failed: int, failed_earlier: int = 0, saved: int = 0) -> str:
    """Return the number of an export's images in each state, as text.

    >>> counts_text(497, 0, 0, 3)
    '497 done, 0 to do, 3 failed earlier'
    """
    now = f", {failed:,} failed" * bool(failed)
    return f"{done:,} done, {unfinished_text(saved, to_do)}{now}" + (
        f", {failed_earlier:,} failed earlier" * bool(failed_earlier)
    )


def export_text(done: ExportReport) -> str:
    failed = sum(done.failed.values())
    to_do = done.images - done.exported - failed
    counts = counts_text(done.exported, to_do, failed - done.failed_earlier, done.failed_earlier)
    lines = [
        f"{counts}: {plural(done.rows, 'row')}, {done.bytes / 1e6:,.1f} MB, {done.seconds:,.1f} s",
        f"manifest: {display_name(str(done.manifest))}",
    ]
    if done.resumed and (new := done.images - done.resumed):
        lines.insert(1, f"{plural(new, 'image')} in this run, {done.resumed:,} in earlier ones")
    if done.failed:
        reasons = ", ".join(f"{count:,} {code}" for code, count in done.failed.items())
        lines.insert(1, f"failed: {reasons}; --retry-failed tries them again")
    if done.shards_missing:
        finished = done.shards - done.shards_missing
        lines.append(f"a part: {finished:,} of the folder's {plural(done.shards, 'shard')} exist")
    return "\n".join(lines)


def waits_text(done: ExportReport) -> str:
    total = sum(done.waits.values()) or 1.0
    shares = (f"{stage} {seconds / total:.0%}" for stage, seconds in done.waits.items())
    return f"waited for: {', '.join(shares)}"


def encoded_table(
    features: Sequence[ImageFeatures | FailedImage], milliseconds: Sequence[float]
) -> str:
    good = next((each for each in features if isinstance(each, ImageFeatures)), None)
    counted = ROWS_OF["merged" if good is None else good.output]
    rows = [("file", "size", "grid (t, h, w)", counted, "width", "ms", "notes")]
    for feature, duration in zip(features, milliseconds, strict=True):
        height, width = feature.size_px
        size = f"{width} x {height}" if feature.size_px != UNKNOWN_SIZE else "-"
        facts = ("-", "-", "-", "-", f"skipped: {feature.code}") if isinstance(
            feature, FailedImage
        ) else (
            str(feature.grid_thw), str(len(feature.embeds)), str(feature.embeds.shape[1]),
            f"{duration:.0f}", ", ".join(feature.notes),
        )  # fmt: skip
        rows.append((display_name(feature.id), size, *facts))
    return table(rows, left=("file", "notes"))


def table(rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """Return rows under their heading, with the columns in `left` aligned to the left.

    >>> print(table([("a", "b"), ("x", "10")], left=["a"]))
    a   b
    -  --
    x  10

    The function omits a column that has only a heading.
    """
    heading, *rest = rows
    columns = [i for i in range(len(heading)) if any(row[i] for row in rest)]
    widths = [max(len(row[i]) for row in rows) for i in columns]
    lines = [
        "  ".join(
            row[i].ljust(width) if heading[i] in left else row[i].rjust(width)
            for i, width in zip(columns, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def encoded_json(
    features: Sequence[ImageFeatures | FailedImage], milliseconds: Sequence[float], out: Path,
    encoder: VisionEncoder, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "out": str(out),
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "device": str(encoder.device),
        "dtype": dtype_name(encoder.dtype),
        **options,
        "images": [
            {**_image_json(feature, encoder.config.merge_unit), "ms": round(duration, 3)}
            for feature, duration in zip(features, milliseconds, strict=True)
        ],
    }


def _image_json(feature: ImageFeatures | FailedImage, merge_unit: int) -> dict[str, Any]:
    size_px = feature.size_px if feature.size_px != UNKNOWN_SIZE else None
    facts: dict[str, Any] = {"id": feature.id, "size_px": size_px}
    if isinstance(feature, FailedImage):
        nothing = {"grid_thw": None, "tokens": None, "rows": None, "width": None, "notes": ()}
        return facts | nothing | {"error": {"code": feature.code, "message": feature.message}}
    rows, width = feature.embeds.shape
    return facts | {
        "grid_thw": feature.grid_thw, "tokens": math.prod(feature.grid_thw) // merge_unit,
        "rows": rows, "width": width, "notes": feature.notes,
        "error": None,
    }  # fmt: skip


def facts_text(facts: dict[str, Any]) -> str:
    """Return a line for each fact that has a value. A dictionary's facts follow its name."""
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append((name, ""))
            lines += [
                (f"  {key}", _value_text(key, each))
                for key, each in value.items()
                if each not in (None, "", [])
            ]
        elif value not in (None, "", []):
            lines.append((name, _value_text(name, value)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in lines)


def features_text(facts: dict[str, Any]) -> str:
    rest = dict(facts)
    head = {"kind": rest.pop("kind"), "path": rest.pop("path")}
    done = rest.pop("images_done")
    if facts["kind"] == "export folder":
        failed, to_do = rest.pop("images_failed"), rest.pop("images_to_do")
        saved = rest.pop("images_saved")
        head["images"] = counts_text(done, to_do, sum(failed.values()), saved=saved)
        head["failed"] = ", ".join(f"{count:,} {code}" for code, count in failed.items())
        missing = rest.pop("shards_missing")
        head["shards"] = f"{rest.pop('shards'):,}" + f", {missing:,} missing" * bool(missing)
    else:
        head["images"] = f"{done:,}"
    width, dtype = rest.pop("width"), rest.pop("dtype")
    of_values = f" of {width} values, {dtype}" if width is not None else ""
    head["rows"] = f"{rest.pop('rows'):,}{of_values}"
    head["bytes"] = f"{rest.pop('bytes'):,}"
    return facts_text(head | rest)


def _value_text(name: str, value: Any) -> str:
    if name == "size_px":
        height, width = value
        return f"{width} x {height}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if name in COUNTS or name.endswith("_bytes") else one_line(str(value))
