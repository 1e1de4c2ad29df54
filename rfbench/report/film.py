"""Moving pictures for a page: sprite sheets that a canvas plays, strips of stills, and one animation for a README.

All are WebP, from the recorded videos, for a few prompts only and with a limit on their size. Clips narrower than SHEET
pixels are enlarged before they are compressed: WebP halves the resolution of colour, which a 64 pixel clip can't spare.
Shapes: T frames, H rows, W columns.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rfbench.errors import UserError
from rfbench.records import Clip
from rfbench.report.leaderboard import Board
from rfbench.scorers.base import Pixels

SHEET = 128  # width of a frame in a sprite sheet, pixels
FRAMES = 160  # most frames of a sheet; longer clips are thinned out
STILLS = 8  # frames of a strip
SCENES = {True: 6, False: 3}  # prompts shown per suite, by whether a clip is SHORT
SHORT = 10.0  # seconds
BUDGET = 3_000_000  # bytes of all sheets together


@dataclass(frozen=True)
class Film:
    """One clip of one row."""

    row: str
    run: str
    sheet: bytes  # WebP, frames row by row
    strip: bytes  # WebP, STILLS frames side by side
    columns: int
    frames: int
    fps: float  # of the sheet
    width: int
    height: int
    video: Path  # all frames at full size


@dataclass(frozen=True)
class Scene:
    """The same clip (prompt and sample) of every row that has it."""

    suite: str
    clip: str
    prompt: str
    seconds: float
    fps: float  # of its videos
    times: tuple[float, ...]  # of the strip's stills, seconds
    films: tuple[Film, ...]


def scenes(board: Board, *, budget: int = BUDGET) -> tuple[Scene, ...]:
    """Films of evenly spread prompts of every suite; of each row its first run. Scenes that would pass `budget` are left out.

    None where a board was read from records: they have no videos.

    Raises:
        UserError: a video cannot be read (code 1).
    """
    made: list[Scene] = []
    spent = 0
    if any(bench.kept is not None for bench in board.benches.values()):
        return ()
    for suite, clip_id in _chosen(board):
        scene = _scene(board, suite, clip_id)
        spent += sum(len(film.sheet) + len(film.strip) for film in scene.films)
        if made and spent > budget:
            break
        made.append(scene)
    order = {suite: number for number, suite in enumerate(board.suites)}
    return tuple(sorted(made, key=lambda scene: (order[scene.suite], scene.clip)))


def _chosen(board: Board) -> list[tuple[str, str]]:
    """Suite and clip id of what is shown, most wanted first: the suites take turns."""
    queues = []
    for suite in board.suites:
        clips = next((bench.clips for (_, name), bench in board.benches.items() if name == suite), ())
        firsts = [clip for clip in clips if clip.sample == 0]
        count = min(len(firsts), SCENES[bool(firsts) and firsts[0].frames <= SHORT * firsts[0].fps])
        places = sorted({int(place) for place in np.linspace(0, len(firsts) - 1, count).round()})
        queues.append([(suite, firsts[place].id) for place in places])
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _scene(board: Board, suite: str, clip_id: str) -> Scene:
    work = []
    for row in board.rows:
        run = next((run for run in row.runs if (run, suite) in board.benches), None)
        if run is None:
            continue
        bench = board.benches[run, suite]
        work.append((row.name, run, bench.directory, next(clip for clip in bench.clips if clip.id == clip_id)))
    with ThreadPoolExecutor() as pool:  # most of it is decoding and compressing, which needs no interpreter
        films = tuple(pool.map(film, *zip(*work, strict=True)))
    shown = work[0][-1]
    times = tuple(float(place) / shown.fps for place in _stills(shown.frames))
    return Scene(suite, clip_id, shown.prompt, shown.frames / shown.fps, shown.fps, times, films)


def film(row: str, run: str, directory: Path, clip: Clip) -> Film:
    """Sheet and strip of one clip.

    Raises:
        UserError: the video has another number of frames than its row says (code 1).
    """
    step = -(-clip.frames // FRAMES)
    stills = _stills(clip.frames)
    pixels = decode(directory / clip.file, clip, sorted({*range(0, clip.frames, step), *stills}))
    frames = np.stack([pixels[place] for place in range(0, clip.frames, step)])
    count, height, width, _ = frames.shape
    columns = max(1, round((count * height / width) ** 0.5))
    padded = np.zeros((-(-count // columns) * columns, height, width, 3), np.uint8)
    padded[:count] = frames
    sheet = padded.reshape(-1, columns, height, width, 3).swapaxes(1, 2).reshape(-1, columns * width, 3)
    strip = _strip(np.stack([pixels[place] for place in stills]))
    return Film(row, run, webp(sheet, quality=75), webp(strip, quality=80), columns, count, clip.fps / step, width, height, directory / clip.file)


def decode(path: Path, clip: Clip, places: Sequence[int]) -> dict[int, Pixels]:
    """Some frames of a video as RGB, about SHEET pixels wide: place -> uint8 [H, W, 3].

    Only these are converted, and converted and scaled at once: that is most of a report's time. The bytes of the file have
    been checked where its run was read.

    Raises:
        UserError: it has another number of frames than its row says, or cannot be decoded (code 1).
    """
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    factor = max(1, round(SHEET / clip.width)) if clip.width < SHEET else min(1.0, 1.5 * SHEET / clip.width)
    size = {"width": round(clip.width * factor), "height": round(clip.height * factor)}
    how = Interpolation.BICUBIC if factor > 1 else Interpolation.AREA
    found: dict[int, Any] = {}
    reformatter, wanted, count = VideoReformatter(), set(places), 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if count in wanted:
                    found[count] = reformatter.reformat(frame, **size, format="rgb24", interpolation=how).to_ndarray()
                count += 1
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"clip {clip.id}: {path} is not a video that can be decoded ({error})", code=1) from None
    if count != clip.frames:
        raise UserError(f"clip {clip.id}: {path} has {count} frames, its row says {clip.frames}; generate it again", code=1)
    return found


def _stills(frames: int) -> list[int]:
    return [int(place) for place in np.linspace(0, frames - 1, STILLS).round()]


def _strip(frames_THWC: Pixels, gap: int = 4) -> Any:
    """Stills side by side with clear gaps between them: uint8 [H, W', 4]."""
    count, height, width, _ = frames_THWC.shape
    strip = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for number, frame in enumerate(frames_THWC):
        begin = number * (width + gap)
        strip[:, begin : begin + width, :3] = frame
        strip[:, begin : begin + width, 3] = 255
    return strip


def webp(picture: Any, *, quality: int) -> bytes:
    """A uint8 [H, W, 3 or 4] array as lossy WebP; the same bytes for the same library."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "webp", quality=quality, method=2)
    return out.getvalue()


def animation(board: Board, shown: Sequence[Scene], *, rows: int = 4, columns: int = 5) -> bytes:
    """The first suite's scenes beside each other, a row per contender, as an animated WebP for a README."""
    from PIL import Image, ImageDraw, ImageFont

    first = [scene for scene in shown if scene.suite == shown[0].suite][:columns]
    names = [row.name for row in board.rows if all(any(film.row == row.name for film in scene.films) for scene in first)][:rows]
    grid = [[next(film for film in scene.films if film.row == name) for scene in first] for name in names]
    width, height = grid[0][0].width, grid[0][0].height
    gap, head = 6, 20
    size = (len(first) * (width + gap) - gap, len(names) * (height + head) + 4)
    font = ImageFont.truetype(str(_font()), 12)
    sheets = [[Image.open(io.BytesIO(film.sheet)).convert("RGB") for film in films] for films in grid]
    pictures = []
    for number in range(grid[0][0].frames):
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        for i, films in enumerate(grid):
            top = i * (height + head)
            draw.text((0, top + 2), names[i], fill="black", font=font)
            for j, one in enumerate(films):
                left, up = number % one.columns * width, number // one.columns * height
                picture.paste(sheets[i][j].crop((left, up, left + width, up + height)), (j * (width + gap), top + head))
        pictures.append(picture)
    out = io.BytesIO()
    pictures[0].save(out, "webp", save_all=True, append_images=pictures[1:], duration=round(1000 / grid[0][0].fps), loop=0, quality=60, method=2)
    return out.getvalue()


def _font() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
