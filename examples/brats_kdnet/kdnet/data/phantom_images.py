"""One synthetic patient: brain, tumour, things that look like tumour, and the scanner.

Shapes are signed distance fields (voxels, negative inside). A distance turns into a partial volume
by clipping it around zero, so borders are smooth without supersampling. Nothing here is fitted to
patients: the contrasts only have the signs and the rough sizes that textbooks give.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Field = NDArray[np.float32]

MODALITIES = ("flair", "t1", "t1ce", "t2")

#: Intensity of each tissue, white matter on T1 being 1, in the order of `MODALITIES`. Oedema shows
#: on FLAIR and T2 and hardly on T1ce; the rim shows on T1ce. NaN leaves what lies beneath, so that
#: vessels and "enhancing" blobs are bright on T1ce like the rim, and nothing on FLAIR and T2.
_NAN = float("nan")
CONTRASTS: dict[str, tuple[float, float, float, float]] = {
    "white": (0.62, 1.00, 1.00, 0.56),
    "grey": (0.82, 0.70, 0.76, 0.82),
    "fluid": (0.22, 0.30, 0.32, 1.50),
    "hyperintensity": (1.15, 0.92, 0.95, 0.95),
    "oedema": (1.22, 0.84, 0.93, 1.18),
    "core": (1.02, 0.62, 0.66, 1.12),
    "rim": (1.02, 0.70, 1.60, 0.92),
    "necrosis": (0.70, 0.44, 0.46, 1.38),
    "blob": (_NAN, _NAN, 1.50, _NAN),
    "blob centre": (_NAN, _NAN, 0.60, _NAN),
    "vessel": (0.45, 0.62, 1.60, 0.34),
}

#: Label values of BraTS 2021.
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4


@dataclass(frozen=True)
class PhantomImages:
    """A synthetic patient.

    Attributes:
        images: Modality name to volume, (X, Y, Z) int16; 0 outside the brain, positive inside.
        segmentation: (X, Y, Z) uint8 with the label values of BraTS 2021.
    """

    images: dict[str, NDArray[np.int16]]
    segmentation: NDArray[np.uint8]


def make_phantom(seed: int, index: int, size: int) -> PhantomImages:
    """Make one subject; the same arguments give the same voxels wherever it is made."""
    space = _Space(np.random.default_rng([seed, index]), size)
    # One core in ten takes up no contrast agent, as in low-grade glioma.
    enhancing = (index + seed) % 10 != 7
    head, layers = _anatomy(space)
    tumour = _tumour(space, layers, enhancing=enhancing)
    layers |= _hyperintensities(space, layers)
    layers |= tumour
    layers |= _mimics(space, head, tumour["core"])
    mask = head < 0
    segmentation = _label(tumour, mask, enhancing=enhancing)
    clean = _paint(space, layers)
    images = {
        name: _scan(space, image, mask) for name, image in zip(MODALITIES, clean, strict=True)
    }
    return PhantomImages(images, segmentation)


class _Space:
    """Coordinates of one head and the random numbers that shape it."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        #: Voxels per unit of length; the head reaches from about -0.8 to 0.8.
        self.unit = size / 2
        axis = (np.arange(size, dtype=np.float32) + 0.5) / self.unit - 1
        straight = np.meshgrid(axis, axis, axis, indexing="ij")
        self.x, self.y, self.z = (c + 0.03 * self.noise(3) for c in straight)

    def noise(self, cells: int) -> Field:
        """Smooth noise with about `cells` bumps along each axis, mean 0, deviation 1."""
        coarse = self.rng.standard_normal((cells + 3,) * 3).astype(np.float32)
        basis = _spline_basis(self.size, cells)
        # Plain sums, no BLAS: the result must not depend on the number of threads.
        field = np.einsum("xa,abc->xbc", basis, coarse)
        field = np.einsum("yb,xbc->xyc", basis, field)
        field = np.einsum("zc,xyc->xyz", basis, field)
        return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        bend: Field | None = None,
    ) -> Field:
        """Distance to an ellipsoid, voxels, exact to first order at its surface."""
        x = self.x if bend is None else self.x - bend
        scaled = [(c - m) / r for c, m, r in zip((x, self.y, self.z), centre, radii, strict=True)]
        steep = [s / radius for s, radius in zip(scaled, radii, strict=True)]
        norm = np.sqrt(sum(s * s for s in scaled))
        slope = np.sqrt(sum(s * s for s in steep)) + 1e-6
        return np.asarray(norm * (norm - 1) / slope * self.unit, dtype=np.float32)


def _spline_basis(size: int, cells: int) -> Field:
    """Cubic B-splines over `cells` intervals, (size, cells + 3)."""
    place = (np.arange(size) + 0.5) / size * cells
    first = np.floor(place).astype(int)
    t = place - first
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((size, cells + 3), dtype=np.float32)
    for offset, weight in enumerate(weights):
        basis[np.arange(size), first + offset] = weight / 6
    return basis


def _anatomy(space: _Space) -> tuple[Field, dict[str, Field]]:
    """Distance to the surface of the brain, and its tissues in painting order."""
    # Lengths below are voxels of a head of 64.
    scale = space.unit / 32
    radii = (space.between(0.74, 0.80), space.between(0.88, 0.94), space.between(0.70, 0.78))
    # The forehead is narrower than the back of the head.
    head = space.ellipsoid((0.0, 0.0, 0.0), radii) + (3.0 * space.y + 0.5 * space.noise(5)) * scale
    outer = _outer_fluid(space, head, scale)
    ventricles = _ventricles(space)
    # Deep grey matter of both halves.
    sides = [space.ellipsoid((side * 0.29, 0.04, -0.06), (0.11, 0.20, 0.15)) for side in (-1, 1)]
    grey = np.minimum(outer - 2.7 * scale, np.minimum(*sides))
    white = np.full_like(head, -np.inf)
    return head, {"white": white, "grey": grey, "fluid": np.minimum(outer, ventricles)}


def _outer_fluid(space: _Space, head: Field, scale: float) -> Field:
    """Fluid around the brain, in its folds and between its halves."""
    folds = space.noise(15)
    slope = np.sqrt(sum(g * g for g in np.gradient(folds))) + 0.05
    # The zero set of smooth noise is a set of winding sheets, much like sulci.
    sulci = np.maximum(np.abs(folds) / slope - 0.45 * scale, -head - 6.0 * scale)
    reach = np.minimum(0.2 - space.z, 0.5 - np.abs(space.y)) * space.unit
    fissure = np.maximum(np.abs(space.x) * space.unit - 0.6 * scale, reach)
    surface = -head - 0.7 * scale
    return np.asarray(np.minimum(np.minimum(sulci, fissure), surface), dtype=np.float32)


def _ventricles(space: _Space) -> Field:
    width = space.between(0.07, 0.11)
    bend = 0.09 + 0.25 * np.abs(space.y) ** 1.5
    third = space.ellipsoid((0.0, -0.02, -0.16), (0.03, 0.16, 0.12))
    radii = (width, 0.40, 0.15)
    lateral = [space.ellipsoid((0.0, -0.03, 0.08), radii, side * bend) for side in (-1, 1)]
    return _joined(third, *lateral)


def _tumour(space: _Space, layers: dict[str, Field], *, enhancing: bool) -> dict[str, Field]:
    """Oedema around a core; an enhancing rim around necrosis, unless the core takes up nothing."""
    centre = _place(space)
    radius = space.between(0.13, 0.24)
    ratios = space.rng.uniform(0.8, 1.25, size=3) * radius
    smooth = space.ellipsoid(centre, (float(ratios[0]), float(ratios[1]), float(ratios[2])))
    core = smooth + 0.17 * radius * space.unit * (space.noise(8) + 0.6 * space.noise(16))
    margin = space.between(0.07, 0.20) * space.unit
    oedema = smooth - margin * (1 + 0.4 * space.noise(8) + 0.4 * space.noise(15))
    # Oedema follows white matter: grey matter holds it back, fluid stops it.
    oedema = oedema + 2.0 * _partial_volume(layers["grey"])
    tumour = {"oedema": np.maximum(oedema, -layers["fluid"]), "core": core}
    if enhancing:
        # At least a voxel, or the rim would have gaps.
        thickness = space.between(0.05, 0.09) * space.unit * (1 + 0.4 * space.noise(12))
        tumour |= {"rim": core, "necrosis": core + np.maximum(thickness, 1.0)}
    return tumour


def _place(space: _Space) -> tuple[float, float, float]:
    """A point in the white matter of either half."""
    side = float(space.rng.choice([-1.0, 1.0]))
    return side * space.between(0.24, 0.40), space.between(-0.42, 0.42), space.between(-0.2, 0.32)


def _hyperintensities(space: _Space, layers: dict[str, Field]) -> dict[str, Field]:
    """Bright spots of white matter on FLAIR and T2 that are not tumour."""
    spots = [space.ellipsoid(_place(space), _round(space, 0.03, 0.06)) for _ in range(3)]
    caps = _ventricle_caps(space)
    spots_in_white = np.maximum(_joined(*spots, caps), -layers["grey"])
    return {"hyperintensity": np.maximum(spots_in_white, -layers["fluid"])}


def _ventricle_caps(space: _Space) -> Field:
    places = [(sx * 0.19, sy * 0.36, 0.07) for sx in (-1, 1) for sy in (-1, 1)]
    return _joined(*(space.ellipsoid(place, _round(space, 0.03, 0.07)) for place in places))


def _round(space: _Space, low: float, high: float) -> tuple[float, float, float]:
    radius = space.between(low, high)
    return radius, radius * space.between(0.8, 1.25), radius * space.between(0.8, 1.25)


def _mimics(space: _Space, head: Field, core: Field) -> dict[str, Field]:
    """What T1ce alone cannot tell from an enhancing rim: vessels, blobs, rings without oedema."""
    blobs = [
        space.ellipsoid(_place(space), _round(space, 0.045, 0.085))
        for _ in range(int(space.rng.integers(2, 5)))
    ]
    rings = [
        space.ellipsoid(_place(space), _round(space, 0.10, 0.16)) + 0.7 * space.noise(13)
        for _ in range(int(space.rng.integers(1, 3)))
    ]
    wall = space.between(0.05, 0.08) * space.unit
    return {
        "blob": np.maximum(_joined(*blobs, *rings), 1 - core),
        "blob centre": np.maximum(_joined(*rings) + wall, 1 - core),
        "vessel": np.maximum(_vessels(space), head + 1.0),
    }


def _vessels(space: _Space) -> Field:
    """Winding tubes."""
    open_voxels = np.ones((space.size,) * 3, dtype=bool)
    for _ in range(int(space.rng.integers(7, 12))):
        places = _vessel_path(space)
        open_voxels[tuple(places[np.all((places >= 0) & (places < space.size), axis=1)].T)] = False
    tubes = ndimage.distance_transform_edt(open_voxels) - space.between(0.5, 0.9) * space.unit / 32
    return np.asarray(tubes, dtype=np.float32)


def _vessel_path(space: _Space) -> NDArray[np.int64]:
    """Voxels of a random walk whose direction changes slowly."""
    position = space.rng.uniform(-0.55, 0.55, size=3)
    direction = space.rng.standard_normal(3)
    steps = []
    for turn in space.rng.standard_normal((int(2.0 * space.unit), 3)):
        direction = direction / np.linalg.norm(direction) + 0.25 * turn
        position = position + direction / np.linalg.norm(direction) / space.unit * 0.7
        steps.append(position)
    return np.asarray((np.array(steps) + 1) * space.unit, dtype=np.int64)


def _partial_volume(distance: Field) -> Field:
    """Share of each voxel inside a surface."""
    return np.asarray(np.clip(0.5 - distance, 0, 1), dtype=np.float32)


def _joined(*distances: Field) -> Field:
    """Distance to the nearest of several surfaces."""
    return np.asarray(np.minimum.reduce(distances), dtype=np.float32)


def _paint(space: _Space, layers: dict[str, Field]) -> list[Field]:
    """Noise-free images: tissues laid over one another with their partial volumes."""
    images = [np.zeros_like(space.x) for _ in MODALITIES]
    for tissue, distance in layers.items():
        share = _partial_volume(distance)
        texture = 1 + 0.03 * space.noise(16)
        values = np.array(CONTRASTS[tissue]) * space.rng.normal(1, 0.04, size=len(MODALITIES))
        for channel, value in enumerate(values):
            if np.isfinite(value):
                images[channel] += share * (value * texture - images[channel])
    return images


def _scan(space: _Space, image: Field, mask: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Blur, bias field, Rician noise, skull stripping, and the arbitrary scale of a scanner."""
    # The order of a scanner: the point spread, the coil, then noise on both channels.
    blurred = ndimage.gaussian_filter(image, 0.45 * space.unit / 32)
    biased = blurred * np.exp(0.08 * space.noise(1))
    sigma = space.between(0.025, 0.045)
    real, imaginary = space.rng.normal(0, sigma, size=(2, *image.shape))
    magnitude = np.hypot(biased + real, imaginary) * space.between(300, 900)
    # From 1 up inside, as 0 is what tells background.
    return np.where(mask, np.clip(np.rint(magnitude), 1, 32767), 0).astype(np.int16)


def _label(
    tumour: dict[str, Field], mask: NDArray[np.bool_], *, enhancing: bool
) -> NDArray[np.uint8]:
    """Label map of the voxels' centres, in the values of BraTS 2021."""
    label = np.zeros(mask.shape, dtype=np.uint8)
    label[tumour["oedema"] < 0] = OEDEMA
    label[tumour["core"] < 0] = ENHANCING if enhancing else NECROSIS
    if enhancing:
        label[tumour["necrosis"] < 0] = NECROSIS
    return np.where(mask, label, 0).astype(np.uint8)
