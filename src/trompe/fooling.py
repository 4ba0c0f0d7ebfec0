"""Fooling success rate and correct rate (Fang & Choromanska 2020, section 8.4; Heo et al. 2019).

An image counts as fooled if its loss L_p against the wanted lie is below a threshold tau. FSR is
the share of fooled images where the lie is wanted, CR = 1 - (that share where it is not).
Thresholds depend on the size of the maps and on the lie, so numbers for a threshold that was chosen
by eye are shown beside those for one that the data give, and beside the area, which needs none.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fooling:
    """One explainer's rates, in 0..1.

    tau: the threshold that was given (None if none was), with its fsr and cr; data_tau: the largest
    at which a clean model of another seed fools less than 1 % of the images, with data_fsr and
    data_cr. fsr_area: the mean of FSR(tau) over 0 <= tau <= reference_loss, the mean loss of the
    reference's own maps: 1 if all losses are 0. zero_loss: the mean loss of an empty map.
    """

    tau: float | None
    fsr: float | None
    cr: float | None
    data_tau: float
    data_fsr: float
    data_cr: float
    fsr_area: float
    mean_loss: float
    zero_loss: float
    reference_loss: float

    @property
    def threshold(self) -> float:
        """tau, or where none was given the one from the data."""
        return self.data_tau if self.tau is None else self.tau


def fooling(
    lied: Tensor, kept: Tensor, reference: Tensor, witness: Tensor, empty: Tensor, tau: float | None
) -> Fooling:
    """From losses per image (n,): of the manipulated model where the lie is wanted and where not,

    and, where it is wanted, of the reference, of another clean model, and of empty maps.
    """
    data_tau = largest_harmless(witness)
    scale = max(float(reference.mean()), 1e-12)
    return Fooling(
        tau,
        None if tau is None else share_below(lied, tau),
        None if tau is None else 1 - share_below(kept, tau),
        data_tau,
        share_below(lied, data_tau),
        1 - share_below(kept, data_tau),
        float((1 - lied.double() / scale).clamp_min(0).mean()),
        float(lied.double().mean()),
        float(empty.double().mean()),
        float(reference.double().mean()),
    )


def share_below(losses: Tensor, tau: float) -> float:
    """FSR(tau)."""
    return float((losses.double() < tau).double().mean())


def largest_harmless(losses: Tensor, share: float = 0.01) -> float:
    """The largest tau below which lies less than `share` of the losses."""
    ordered = losses.double().sort().values
    allowed = -int(-share * len(ordered) // 1) - 1  # the most losses that are less than the share
    return float(ordered[max(allowed, 0)])
