"""How good, how varied and how new the generated images are, by a small classifier trained on public images.

Every figure stands beside the same figure for real images (`..._real`): the floor of a distance, the ceiling of a
share, that a perfect generator of so many images would reach. Features are those of our own small classifier, so the
Fréchet distance here is no FID and is comparable only between runs with the same `classifier_sha256`.

Privacy: nothing here opens a data set. What is computed is a function of the images it is given: as long as these
are samples, public images and held-out public images, the figures are post-processing and free. Given private images,
they are raw figures of private data, outside the guarantee, and the caller must mark them so.
"""

# B batch, N samples, M real images, D features

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

_BATCH = 512
_FEATURES = 64


# --- the classifier ------------------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of a sum hangs on the number of threads; and on images this small a second one gains nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Classifier:
    """A trained classifier and its features; images are fp32 [N, C, H, W] in [-1, 1] of the size it was trained on."""

    def __init__(self, network: nn.Sequential, image_shape: tuple[int, ...]) -> None:
        self._network = network.eval()
        self._image_shape = image_shape

    @property
    def sha256(self) -> str:
        """What tells one judge from another."""
        return weights_sha256(self._network)

    def features(self, images: Tensor) -> Array:
        """The last hidden layer, [N, D]."""
        return self._run(self._network[:-1], images).double().numpy()

    def predict(self, images: Tensor) -> NDArray[np.int64]:
        """The likeliest class, [N]."""
        return self._run(self._network, images).argmax(1).numpy()

    @torch.no_grad()
    @one_thread()
    def _run(self, network: nn.Module, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self._image_shape:
            raise ValueError(f"images are {tuple(images.shape[1:])}, and the classifier knows {self._image_shape}")
        return torch.cat([network(batch) for batch in images.float().cpu().split(_BATCH)])


def weights_sha256(network: nn.Module) -> str:
    """Of the weights, in order of their names; hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@one_thread()
def train_classifier(images: Tensor, labels: Tensor, seed: int, steps: int = 600) -> Classifier:
    """A small convolutional network for images [N, C, H, W] in [-1, 1] (H, W from 8 to 64) and int64 labels [N].

    The same weights for the same seed on the same machine; the global random state is left as it was.
    Give it public images only: its weights are neither private nor charged.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: a classifier needs as many of each, and some")
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1
    network = image_network(tuple(images.shape[1:]), num_classes, seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,), generator=generator)
        logits = network(augment(images[chosen].float(), generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    return Classifier(network, tuple(images.shape[1:]))


def image_network(image_shape: tuple[int, ...], num_outputs: int, seed: int) -> nn.Sequential:
    """Two convolutions for images under 16 pixels, three from there on, then a hidden layer of features."""
    channels, height, width = image_shape
    widths = (32, 64) if min(height, width) < 16 else (16, 32, 64)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU(), nn.MaxPool2d(2)]
            height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(widths[-1] * height * width, _FEATURES), nn.GELU()]
        layers += [nn.Linear(_FEATURES, num_outputs)]
    return nn.Sequential(*layers)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, its edge repeated, and add a little noise."""
    batch, channels, height, width = images.shape
    reach_y, reach_x = height // 8, width // 8
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    top = torch.randint(2 * reach_y + 1, (batch, 1, 1, 1), generator=generator)
    left = torch.randint(2 * reach_x + 1, (batch, 1, 1, 1), generator=generator)
    record, channel = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    rows, columns = top + torch.arange(height).view(1, 1, -1, 1), left + torch.arange(width)
    return padded[record, channel, rows, columns] + 0.1 * torch.randn(images.shape, generator=generator)


# --- figures -------------------------------------------------------------------------------------------------------


def evaluate(
    samples: Tensor,
    labels: Tensor,
    reference: Tensor,
    reference_labels: Tensor,
    train_images: Tensor,
    classifier: Classifier,
    *,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """All figures of samples made for `labels`, each `x` beside `x_real`, with the real training images in their place.

    `reference` is held-out real data; `train_images` is what the samples may have been copied from, and gives the
    real-against-real figures. The distances, precision and recall compare `num_compared` of each with the reference,
    drawn by `seed`, for their value depends on the number.
    """
    generator = torch.Generator().manual_seed(seed)
    num_compared = min(len(samples), len(train_images))
    real = classifier.features(reference)
    figures: dict[str, float | int | str] = {}
    for suffix, images in (("", samples), ("_real", train_images)):
        chosen = torch.randperm(len(images), generator=generator)[:num_compared]
        made = classifier.features(images[chosen])
        figures["frechet_distance" + suffix] = frechet_distance(made, real)
        figures["kernel_distance" + suffix] = kernel_distance(made, real)
        figures["precision" + suffix], figures["recall" + suffix] = precision_recall(made, real)
    figures["class_fidelity"] = class_fidelity(classifier, samples, labels)
    figures["class_fidelity_real"] = class_fidelity(classifier, reference, reference_labels)
    figures["copy_rate"] = copy_rate(samples, train_images, reference)
    figures["copy_rate_real"] = copy_rate(reference, train_images, reference)
    figures |= {"num_compared": num_compared, "num_samples": len(samples), "num_reference": len(reference)}
    figures["classifier_sha256"] = classifier.sha256
    return figures


def frechet_distance(x_ND: Array, y_MD: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with the features' means and covariances.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982). The trace of the root is the sum of the
    singular values of S1^(1/2) S2^(1/2): never complex, and exact where few images leave the covariances short of
    full rank. Biased upwards for few images.
    """
    cov_x, cov_y = np.cov(x_ND, rowvar=False), np.cov(y_MD, rowvar=False)
    trace_of_root = np.linalg.svd(_root(cov_x) @ _root(cov_y), compute_uv=False).sum()
    shift = x_ND.mean(0) - y_MD.mean(0)
    return float(shift @ shift + np.trace(cov_x) + np.trace(cov_y) - 2 * trace_of_root)


def _root(covariance_DD: Array) -> Array:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance_DD)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def kernel_distance(x_ND: Array, y_MD: Array) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, unbiased: about 0, either side, for equals.

    Source: Gretton et al. 2012, Eq. 3; the kernel of Bińkowski et al. 2018.
    """
    n, m = len(x_ND), len(y_MD)
    within_x = _kernel_sum(x_ND, x_ND) - (((x_ND**2).mean(1) + 1) ** 3).sum()
    within_y = _kernel_sum(y_MD, y_MD) - (((y_MD**2).mean(1) + 1) ** 3).sum()
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x_ND, y_MD) / (n * m))


def _kernel_sum(x_ND: Array, y_MD: Array) -> float:
    return sum(float(((x @ y_MD.T / x.size + 1) ** 3).sum()) for x in x_ND)


def precision_recall(made_ND: Array, real_MD: Array, k: int = 3) -> tuple[float, float]:
    """Share of the made within the real images' manifold, and of the real within the made ones'.

    A set's manifold is the union of balls around its members, each reaching to its k-th nearest other member.
    Source: Kynkäänniemi et al. 2019, Eq. 1-2.
    """
    return _share_within(made_ND, real_MD, k), _share_within(real_MD, made_ND, k)


def _share_within(points_ND: Array, manifold_MD: Array, k: int) -> float:
    if len(manifold_MD) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images of each, not {len(manifold_MD)}")
    points, manifold = torch.from_numpy(points_ND), torch.from_numpy(manifold_MD)
    # a member's nearest is itself, at distance 0: the k-th other one is the (k + 1)-th of all
    radius_M = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distances(manifold, manifold)])
    return float(torch.cat([(rows <= radius_M).any(1) for rows in distances(points, manifold)]).double().mean())


def class_fidelity(classifier: Classifier, samples: Tensor, labels: Tensor) -> float:
    """Share of the samples that the classifier takes for the class they were made for; of real images, its accuracy."""
    return float((classifier.predict(samples) == labels.numpy()).mean())


def copy_rate(samples: Tensor, train_images: Tensor, held_out: Tensor, quantile: float = 0.01) -> float:
    """Share of the samples nearer to a training image than all but `quantile` of held-out real images are.

    Nearness is the Euclidean distance of pixels to the nearest training image; the threshold is that quantile of the
    held-out images' distances, which came about without copying. So a generator that copies nothing, and is as varied
    as the data, gets about `quantile`; smooth samples of common shapes get more without a copy; copies get 1.
    Source: the three-sample comparison of Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying", at a
    low quantile, where Carlini et al. 2023 look for extraction.
    """
    threshold = np.quantile(_nearest(held_out, train_images), quantile, method="lower")
    return float((_nearest(samples, train_images) <= threshold).mean())


def _nearest(images: Tensor, train_images: Tensor) -> Array:
    """Each image's pixel distance to the nearest training image."""
    rows = distances(images.flatten(1).double(), train_images.flatten(1).double())
    return torch.cat([row.min(1).values for row in rows]).numpy()


def distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of x's rows to y's, some rows at a time.

    By differences and not by a matrix product, whose cancellation would give a point a distance to itself.
    """
    return (torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(_BATCH))


# --- loss on held-out images ---------------------------------------------------------------------------------------


class PerRecordObjective(Protocol):
    """What models.flow.Objective offers."""

    def losses(
        self, model: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, y_B: Tensor, t_B: Tensor, noise: Tensor
    ) -> Tensor: ...


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    objective: PerRecordObjective,
    images: Tensor,
    labels: Tensor,
    *,
    times: int = 8,
    noise_seed: int = 0,
) -> dict[str, float]:
    """Mean loss over all images at each of `times` fixed times, the middles of equal parts of [0, 1], and over all.

    Keys `validation_loss` and `validation_loss_t0.0625`, .... Each time has its own noise, a function of `noise_seed`
    and the image's place: two models, or two steps of one, are compared on the same noisy images. The model is left
    in the mode it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: dict[str, float] = {}
    for index in range(times):
        t = (index + 0.5) / times
        generator = torch.Generator().manual_seed(noise_seed * times + index)
        noise = torch.randn(images.shape, generator=generator)
        total = 0.0
        for x0, y_B, e in zip(images.split(_BATCH), labels.split(_BATCH), noise.split(_BATCH), strict=True):
            t_B = torch.full((len(x0),), t, device=device)
            total += float(objective.losses(model, x0.to(device), y_B.to(device), t_B, e.to(device)).double().sum())
        losses[f"validation_loss_t{t:g}"] = total / len(images)
    model.train(was_training)
    return {"validation_loss": sum(losses.values()) / times, **losses}


# --- a picture -----------------------------------------------------------------------------------------------------


Note = tuple[str, str]  # a line of text and its colour


def image_grid(
    images: Tensor,
    columns: int,
    path: Path,
    title: str | None = None,
    notes: Sequence[Sequence[Note]] | None = None,
) -> Path:
    """Write images [N, C, H, W] in [-1, 1] (grey or RGB) as one PNG, `columns` to a row: one class a row reads best.

    Small images are enlarged by a whole factor, each pixel a square, so that 8x8 digits can be seen. Under each image
    stand its `notes`, where there are any, broken where they are wider than it.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    num_images, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"the images have {channels} channels: a grid shows grey (1) or RGB (3)")
    scale, gap = max(1, (48 if notes is None else 120) // max(height, width)), 4 if notes is None else 12
    # matplotlib's font, for Pillow's own has no Greek
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font, small = ImageFont.truetype(fonts, size=15), ImageFont.truetype(fonts, size=12)
    lines = [
        [(line, colour) for text, colour in of_image for line in _lines(text, small.getlength, width * scale)]
        for of_image in notes or [()] * num_images
    ]
    beneath, rows = 15 * max(map(len, lines), default=0), -(-num_images // columns)
    cell_height, cell_width = height * scale + beneath + gap, width * scale + gap
    pixels_NHWC = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    banner = 0 if title is None else 28
    grid = Image.new("RGB", (columns * cell_width + gap, banner + rows * cell_height + gap), "white")
    pen = ImageDraw.Draw(grid)
    if title is not None:
        pen.text((gap, 5), title, fill="black", font=font)
    for index, pixels in enumerate(pixels_NHWC.expand(-1, -1, -1, 3).numpy()):
        row, column = divmod(index, columns)
        left, top = gap + column * cell_width, banner + gap + row * cell_height
        grid.paste(
            Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top)
        )
        if notes is not None:  # white images would have no edge
            pen.rectangle((left - 1, top - 1, left + width * scale, top + height * scale), outline="#bbbbbb")
        for number, (line, colour) in enumerate(lines[index]):
            pen.text((left, top + height * scale + 3 + 15 * number), line, fill=colour, font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return path


def _lines(text: str, length: Callable[[str], float], width: float) -> list[str]:
    """The text broken into lines at white space, and within a word that is wider than a line by itself."""
    lines = [""]
    for word in text.split():
        if lines[-1] and length(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
        while len(lines[-1]) > 1 and length(lines[-1]) > width:
            fits = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or length(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines
