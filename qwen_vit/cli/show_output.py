"""Write the output of `show`: a page, one picture, or a folder with a page and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vit.cli.checks import check_not_input, check_one_picture, check_output
from qwen_vit.cli.console import print_log
from qwen_vit.cli.show_input import ShowInput
from qwen_vit.common.atomic_file import atomic_file, cannot_write
from qwen_vit.errors import ExportError, display_name, plural
from qwen_vit.features import UNKNOWN_SIZE
from qwen_vit.show.draw import sheet_png
from qwen_vit.show.page import PageText, feature_page
from qwen_vit.show.sheets import panel_titles
from qwen_vit.show.views import FeatureViews

__all__ = ["check_target", "older_pictures", "write"]

PAGE, PICTURE, FOLDER_PAGE = ".html", ".png", "index.html"
PICTURE_NAME = re.compile(r"\d{2,}-[A-Za-z0-9_-]{0,40}\.png")  # as `_file_name` returns it


def check_target(out: Path, overwrite: bool) -> None:
    suffix = out.suffix.lower()
    if out.is_dir():
        # check that the folder is writable
        check_output(out / f"01{PICTURE}", overwrite=True, suffix=PICTURE)
        if any(out.iterdir()) and not overwrite:
            raise ExportError(
                "the folder already contains files",
                name=str(out),
                expected="a new or empty folder",
                remedy="pass --overwrite to write into this folder",
            )
    elif not suffix and out.is_file():
        raise ExportError(
            "an existing file without a suffix",
            name=str(out),
            expected=f"{PAGE} for a page, {PICTURE} for a picture, or a folder",
            remedy=f"pass --out {out.with_suffix(PAGE)}",
        )
    elif suffix in ("", PAGE, PICTURE):
        check_output(out, overwrite, suffix=suffix)
    else:
        raise ExportError(
            f"its suffix is {out.suffix}",
            name=str(out),
            expected=f"{PAGE} for a page, {PICTURE} for a picture, or a folder",
            remedy=f"pass --out {out.with_suffix(PAGE)}",
        )


def write(
    out: Path, views: FeatureViews, given: ShowInput, command: str, layer: int | None = None
) -> tuple[list[Path], dict[str, Any]]:
    """Write the output of `show`. Return the written files and a JSON report."""
    suffix = out.suffix.lower()
    if suffix == PAGE and not out.is_dir():
        files, contents = [out], [feature_page(views, _text(views, given, command, layer))]
    elif suffix == PICTURE and not out.is_dir():
        check_one_picture(out, len(views.views))
        files, contents = [out], _sheets(views)
    else:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from None
        names = [_file_name(i, view.id) for i, view in enumerate(views.views, start=1)]
        files = [out / FOLDER_PAGE, *(out / name for name in names)]
        contents = [feature_page(views, _text(views, given, command, layer)), *_sheets(views)]
    missing = sum(view.picture is None and view.n_frames == 1 for view in views.views)
    if missing and not given.has_images:
        whose, s = ("its", "") if missing == 1 else ("their", "s")
        drew = f"drew {plural(missing, 'image')} without {whose} picture{s}"
        print_log(f"{drew}; pass the original{s} as --images")
    sources = [each for each in given.pictures.values() if isinstance(each, str)]
    for path in files:
        check_not_input(path, (*sources, *(view.id for view in views.views)))
    for path, content in zip(files, contents, strict=True):
        with atomic_file(path) as file:
            file.write(content)
    return files, _report(out, files, views, given, layer)


def older_pictures(out: Path, files: Sequence[Path]) -> list[str]:
    """Return the names of a folder's pictures that earlier runs of `show` wrote."""
    if not out.is_dir():
        return []
    names = {path.name for path in out.iterdir()} - {file.name for file in files}
    return sorted(filter(PICTURE_NAME.fullmatch, names))


def _sheets(views: FeatureViews) -> list[bytes]:
    return [sheet_png(view, views, panel_titles(view, views)) for view in views.views]


def _file_name(number: int, name: str) -> str:
    """Return a file name of characters that every operating system accepts."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(name).stem)[:40]
    return f"{number:02}-{stem}{PICTURE}"


def _text(views: FeatureViews, given: ShowInput, command: str, layer: int | None) -> PageText:
    notices = []
    if given.is_random:
        notices.append(
            f"The weights of {given.model} are random: they were never trained. These maps show "
            "colour and texture, not meaning."
        )
    if any(view.n_frames > 1 for view in views.views):
        notices.append(
            "For a video, the pictures show the features of its first two sampled frames, without "
            "the frames themselves."
        )
    changed = [view.id for view in views.views if view.is_changed]
    if changed:
        first = f"{plural(len(changed), 'picture')}, first {display_name(changed[0])},"
        notices.append(
            f"{first} may not match the features, because the file is not the encoded one, or has "
            "changed since."
        )
    view = views.views[0]
    px = given.patch_px * view.w // view.colours.shape[1]
    what, whats = "merged token", "merged tokens"
    if px == given.patch_px:
        what, whats = "patch", "patches"
    source = whats if layer is None else f"the residual stream after block {layer}"
    window_px = views.window * given.patch_px
    return PageText(
        title=f"Features of {plural(len(views.views), 'image')}",
        facts={"model": given.source, "features": f"{source}, a cell of {px} x {px} pixels"},
        notices=tuple(notices),
        cell=what,
        cell_px=px,
        window_px=f"{window_px} x {window_px} pixels",
        full_attention=_full_attention(given),
        command=command,
    )


def _full_attention(given: ShowInput) -> str:
    if given.full_attention is None:
        return "The few blocks with full attention attend to the whole image."
    if not given.full_attention:
        return "No block attends to the whole image."
    blocks = ", ".join(map(str, given.full_attention))
    return (
        f"Of {given.depth} blocks, {len(given.full_attention)} attend to the whole image, "
        f"with full attention: {blocks} (counted from 0)."
    )


def _report(
    out: Path, files: list[Path], views: FeatureViews, given: ShowInput, layer: int | None
) -> dict[str, Any]:
    return {
        "out": str(out),
        "files": [str(file) for file in files],
        "model": given.model,
        "layer": layer,
        "window_px": views.window * given.patch_px,
        "full_attention_blocks": given.full_attention,
        "explained_variance": [round(share, 6) for share in views.explained],
        "similarity_range": views.span,
        "images": [
            {
                "id": view.id,
                "size_px": None if view.size_px == UNKNOWN_SIZE else view.size_px,
                "grid_hw": (view.h, view.w),
                "frame_pairs": view.n_frames,
                "cells_hw": view.colours.shape[:2],
                "windows": view.n_windows(views.window),
                "has_picture": view.picture is not None,
                "marked_patch_xy": view.mark,
            }
            for view in views.views
        ],
        "failed": [
            {"id": each.id, "code": each.code, "message": each.message} for each in given.failed
        ],
    }
