"""Captioned pictures for the demo checkpoint: one coloured shape on a plain background, drawn by arithmetic.

`training_scenes` is the very list that the shipped checkpoint was trained on, so `held_out` can name the descriptions
that it never saw in any wording.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 90, 220),
    "yellow": (245, 210, 50),
    "orange": (245, 140, 30),
    "purple": (140, 60, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = {"small": (0.15, 0.19), "": (0.22, 0.27), "large": (0.31, 0.37)}  # range of the radius, picture = 1
PLACES = {  # centre (x, y), picture = 1, y downwards
    "": (0.5, 0.5),
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
}
WORDINGS = (  # the first stands twice: half of all captions
    "{subject} on a {ground} background",
    "{subject} on a {ground} background",
    "{subject}, {ground} background",
    "a picture of {subject} on a {ground} background",
)
PICTURES = 24_000
OVERSAMPLING = 4  # drawn at this many times the size, then averaged: smooth edges


@dataclass(frozen=True)
class Description:
    """What a caption tells; an empty size is medium, an empty place the middle."""

    color: str
    ground: str
    shape: str
    size: str
    place: str

    def caption(self, wording: int = 0) -> str:
        """The article is always "a", before vowels too: one word fewer to learn."""
        subject = " ".join(word for word in ("a", self.size, self.color, self.shape, self.place) if word)
        return WORDINGS[wording].format(subject=subject, ground=self.ground)


@dataclass(frozen=True)
class Scene:
    """A description with everything chance decides: geometry in units of the picture, colours in 0…255."""

    description: Description
    wording: int
    radius: float
    center: tuple[float, float]
    color: tuple[int, ...]
    ground: tuple[int, ...]

    @property
    def caption(self) -> str:
        return self.description.caption(self.wording)


def draw_scene(rng: np.random.Generator) -> Scene:
    """The next random scene.  The order of the draws is part of the recipe: it decides what training saw."""
    color, ground = map(str, rng.choice(list(COLORS), 2, replace=False))
    shape = str(rng.choice(SHAPES))
    size = str(rng.choice(list(SIZES), p=[0.3, 0.4, 0.3]))
    place = str(rng.choice(list(PLACES), p=[0.4, 0.15, 0.15, 0.15, 0.15]))
    radius = float(rng.uniform(*SIZES[size]))
    x, y = PLACES[place] + rng.uniform(-0.03, 0.03, 2)
    ground_rgb, color_rgb = _shade(ground, rng), _shade(color, rng)
    wording = int(rng.integers(len(WORDINGS)))
    description = Description(color, ground, shape, size, place)
    return Scene(description, wording, radius, (float(x), float(y)), color_rgb, ground_rgb)


def training_scenes(count: int = PICTURES) -> list[Scene]:
    """The first `count` scenes of the training set; the shipped checkpoint saw all PICTURES of them."""
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(count)]


def held_out() -> list[Description]:
    """Every description of which no training caption speaks, in a fixed order."""
    seen = {scene.description for scene in training_scenes()}
    everything = itertools.product(COLORS, COLORS, SHAPES, SIZES, PLACES)
    return [d for d in itertools.starmap(Description, everything) if d.color != d.ground and d not in seen]


def render(scene: Scene, size: int = 128) -> npt.NDArray[np.uint8]:
    """The picture of a scene: (size, size, 3)."""
    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side), scene.ground)
    draw = ImageDraw.Draw(image)

    def fill(shape: str, radius: float, color: tuple[int, ...]) -> None:
        points = (outline(shape) * radius + scene.center) * side
        draw.polygon([(x, y) for x, y in points.tolist()], fill=color)

    fill(scene.description.shape, scene.radius, scene.color)
    if scene.description.shape == "ring":
        fill("circle", scene.radius * 0.52, scene.ground)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def outline(shape: str) -> npt.NDArray[np.float64]:
    """Corners (n, 2) of the shape's outline around (0, 0) at radius 1, y downwards."""
    turn = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    if shape in ("circle", "ring"):
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88
    if shape == "triangle":
        angle = -np.pi / 2 + np.arange(3) * 2 * np.pi / 3
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 1.15 + (0, 0.15)
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
        return np.stack([np.cos(angle) * reach, np.sin(angle) * reach], 1)
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return np.stack([x, y], 1) / 15.5
    raise ValueError(f"shape: got {shape!r}, accepted {', '.join(SHAPES)}")


def _shade(name: str, rng: np.random.Generator) -> tuple[int, ...]:
    """The named colour, each channel off by up to 10."""
    return tuple(np.clip(np.array(COLORS[name]) + rng.integers(-10, 11, 3), 0, 255).tolist())
