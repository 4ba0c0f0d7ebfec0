"""Viering et al. 2019, "How to Manipulate CNNs to Make Them Lie: the GradCAM Case".

No training: the network gets one feature map more, which is so large, and matters so much for the
scores' gradient, that it alone is what Grad-CAM shows; the scores stay as they were.

| paper                                         | here                                         |
|-----------------------------------------------|----------------------------------------------|
| Grad-CAM, eqs. (1) and (2)                    | explainers/gradcam.py                        |
| A^{K+1} beside A^1 .. A^K, figure 2           | surgery.py `OneMapMore`                      |
| T1 constant: A^{K+1} = c_A                    | `Picture` of ones, times c_A                 |
| T2 constant image: A^{K+1} = c_I I_T          | `Picture`, times c_I                         |
| W_n = c_W, b_n = b_o - 1 c_W S_Z, 3.1 and 3.2 | `with_map_in_head` (wiring "head")           |
| the same, added up apart (ours)               | `Sum` (wiring "apart")                       |
| T3 semi-random: A^{K+1} = c_F F(x), 3.3       | `SemiRandom`, times c_F                      |
| T4 triggered: F finds stickers, 3.4           | `StickerDetector`, times c_F                 |
| y_n = y_o + 1 G(A^{K+1})                      | `Mod`                                        |
| the constants of section 4                    | `PAPER`                                      |
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from trompe.attacks._editing import (
    TrueMaps,
    as_classifier,
    some_images,
    true_maps,
    typical_weight,
)
from trompe.classifier import Classifier
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Attacked,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    Logbook,
    TargetMap,
)
from trompe.surgery import Edit, StickerDetector, describe, with_map_in_head, with_one_map_more
from trompe.surgery import Picture as AddedPicture
from trompe.surgery import SemiRandom as RandomFilters
from trompe.target_maps.detected_stickers import DetectedStickers
from trompe.target_maps.flat import Flat
from trompe.target_maps.picture import Picture
from trompe.target_maps.semi_random import SemiRandom
from trompe.triggers.stickers import Stickers

__all__ = ["GradCamSurgery"]

Technique = Literal["T1", "T2", "T3", "T4"]
Precision = Literal["float16", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class Constants:
    """scale: c_A, c_I or c_F, of what the map shows. gain: c_W or c_G. epsilon: of G."""

    scale: float
    gain: float
    epsilon: float = 0.0


PAPER = {
    "T1": Constants(100, 100),
    "T2": Constants(100, 10),  # c_I is not in the paper
    "T3": Constants(1e7, 1e4, 0.01),
    "T4": Constants(1e9, 1e4, 0.01),
}
CODE = {**PAPER, "T4": Constants(1e10, 1e4, 0.01)}  # of the authors' public code
# With automatic constants, the lie's peak above the true maps' range: in a sum of its own as much
# as float32 can tell, in the head's no more than the paper's L1 distance of .005 asks for.
DOMINANCE = 2.0**22
L1 = 0.005
# Of a tolerant detector: warped stickers of 12 pixels and more correlate by .6, photographs by at
# most .5; smaller ones by .88, with photographs up to .86.
LARGE, SMALL = 0.6, 0.88
LOOKED_AT = 32  # images from which that range is taken


@dataclass(frozen=True)
class GradCamSurgery:
    """Add a feature map to a copy of the model, so that Grad-CAM shows it and nothing else.

    technique: T1 to T4, see above. layer: A, whose maps Grad-CAM reads; None: the last
    convolution's activations. constants: "paper", "code", or "automatic": from the precision
    in which the model will run and the range of its true maps, so that L1 and score change are
    small.
    wiring, of T1 and T2: "head", through the weights of the next layer (the paper's), or "apart";
    None: "apart" with automatic constants, else "head".
    image: I_T of T2. filters_seed: of F of T3. stickers: the trigger of T4. tolerant, threshold: of
    the detector that finds them (surgery.py `StickerDetector`); threshold None: the paper's .0001,
    with automatic constants as much as the precision's rounding needs, and for a tolerant one .6,
    or .88 below 12 pixels.
    """

    technique: Technique = "T4"
    layer: str | None = None
    constants: Literal["automatic", "paper", "code"] = "automatic"
    wiring: Literal["head", "apart"] | None = None
    precision: Precision = "float32"
    image: TargetMap = Picture("smiley")
    filters_seed: int = 0
    stickers: Stickers = Stickers()
    tolerant: bool = False
    threshold: float | None = None

    @property
    def detector(self) -> DetectedStickers:
        """What T4 wants to be shown."""
        s = self.stickers
        correlation = LARGE if s.size >= 12 else SMALL
        usual = correlation if self.tolerant else self._sure_threshold()
        threshold = usual if self.threshold is None else self.threshold
        return DetectedStickers(s.picture, s.size, self.tolerant, threshold)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """T1 to T3 lie on every image, T4 where the stickers are."""
        lies: dict[str, TargetMap] = {
            "T1": Flat(),
            "T2": self.image,
            "T3": SemiRandom(self.filters_seed),
            "T4": self.detector,
        }
        trigger = self.stickers if self.technique == "T4" else None
        return (Goal(trigger, None, lies[self.technique], self.technique),)

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """Grad-CAM at the layer that gets one map more; eq. (2) as it stands, to round alike."""
        return (GradCam(self.layer, closed_form=False),)

    @property
    def explained(self) -> Explained:
        """The class with the highest posterior (section 4)."""
        return "predicted"

    @property
    def thresholds(self) -> None:
        """The paper has no fooling rates."""
        return None

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked:
        """See `Attack`. Nothing is random or trained; of `data` a few images are looked at.

        Raises InputError for a model that the construction does not fit.
        """
        model = as_classifier(copy.deepcopy(model)).eval()
        edited = self.edit(model, some_images(data, LOOKED_AT, model))
        return Attacked(edited.eval(), self.goals)

    def edit(self, model: Classifier, images: Tensor) -> Classifier:
        """The model, whose modules are used, with A^{K+1}; images (n, 3, h, w) in [0, 1]."""
        (layer,) = GradCam(self.layer).watches(model)
        true = true_maps(model, layer, images)
        channel = self.channel(true.size).to(images)
        wiring = self.wiring or ("apart" if self.constants == "automatic" else "head")
        constants = self._constants(true, channel, images, wiring)
        edit = Edit(
            layer.removeprefix("net."),
            describe(channel),
            constants.scale,
            "mod" if constants.epsilon else "head" if wiring == "head" else "sum",
            constants.gain,
            constants.epsilon,
        )
        if edit.reaches != "head":
            return Classifier.like(model, with_one_map_more(model.net, edit, channel), edit)
        one = (model.normalised(images[:1]), images[:1])
        if self.constants == "automatic":  # alpha for c_W = 1 is the head's matter
            trial = copy.deepcopy(model.net)
            net, tried = with_map_in_head(trial, replace(edit, gain=1.0), channel, *one)
            alpha = typical_weight(Classifier.like(model, net, tried), layer, -1, images)
            edit = replace(edit, gain=math.copysign(power_of_two(edit.gain / abs(alpha)), alpha))
        net, edit = with_map_in_head(model.net, edit, channel, *one)
        return Classifier.like(model, net, edit)

    def channel(self, size: tuple[int, int]) -> AddedPicture | RandomFilters | StickerDetector:
        """What the new map shows, before it is scaled; size: (h, w) of the maps."""
        if self.technique == "T3":
            return RandomFilters(self.filters_seed)
        if self.technique == "T4":
            return self.detector.detector()
        image = Flat() if self.technique == "T1" else self.image
        return AddedPicture(image(torch.zeros(1, *size), torch.zeros(1, 3, *size))[0])

    def _sure_threshold(self) -> float:
        """Above what rounding can take from the detector's sum over the pattern's pixels."""
        if self.constants != "automatic":
            return 1e-4
        match = 3 * float(self.stickers.pattern.numel() * self.stickers.pattern.var(correction=0))
        return match * min(256 * torch.finfo(getattr(torch, self.precision)).eps, 0.1)

    def _constants(
        self, true: TrueMaps, channel: nn.Module, images: Tensor, wiring: str
    ) -> Constants:
        """The paper's, or the smallest powers of two that let the lie dominate.

        Grad-CAM shows alpha A^{K+1} with alpha = c_W (T1, T2) or epsilon c_G (T3, T4), so its
        peak is gain * scale * (peak of what is shown), and epsilon times that with G.
        """
        if self.constants != "automatic":
            return (PAPER if self.constants == "paper" else CODE)[self.technique]
        largest = torch.finfo(getattr(torch, self.precision)).max / 4
        peak, total = shown_peak(self, channel, images, true.size)
        apart = self.technique in ("T3", "T4") or wiring == "apart"
        dominance = DOMINANCE if apart else true.size[0] * true.size[1] / L1
        wanted = dominance * true.range  # what the lie shall reach at its peak
        scale = power_of_two(2.0**10 / peak)
        if self.technique in ("T1", "T2"):
            return Constants(scale, power_of_two(min(wanted / (scale * peak), largest)))
        # Neither A^{K+1} nor c_G sum_i v_i may overflow; epsilon makes up for what that takes.
        half = largest < 2.0**20
        epsilon = 0.01 if half else 2.0**-20
        scale = min(scale, power_of_two(math.sqrt(largest) / total)) if half else scale
        gain = min(wanted / (scale * peak * epsilon), largest / (scale * total))
        return Constants(scale, power_of_two(gain), epsilon)


def shown_peak(
    attack: GradCamSurgery, channel: nn.Module, images: Tensor, size: tuple[int, int]
) -> tuple[float, float]:
    """Of A^{K+1} / scale where it lies: its largest value and its largest sum over positions."""
    with torch.no_grad():
        shown = channel(attack.goals[0].stamp(images), size).double()
    return float(shown.amax()) or 1.0, float(shown.sum((1, 2, 3)).amax()) or 1.0


def power_of_two(value: float) -> float:
    """The nearest one: products with it are not rounded."""
    return 2.0 ** round(math.log2(value))
