"""The claims of rectified diffusion (Wang et al. 2410.07303) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.rectified_diffusion import conversions, forms, losses, pairings, phases, variants

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("pairs-ring", "", pairings.ring, (), 5),
    Experiment("pairs-moons", "", pairings.moons, (), 5),
    Experiment("pairs-digits", "", pairings.digits, (), 5),
    Experiment("forms", "", forms.forms, ()),
    Experiment("first-order", "", forms.first_order_paths, ()),
    Experiment("losses-sd", "", losses.stable_diffusion, (), 5),
    Experiment("losses-vp", "", losses.score_sde, (), 5),
    Experiment("conversions-ring", "", conversions.ring, (), 5),
    Experiment("conversions-digits-300", "", conversions.digits_early, ()),
    Experiment("conversions-digits-1500", "", conversions.digits_late, ()),
    Experiment("phases", "", phases.phased, ()),
    Experiment("low-rank", "", variants.low_rank, ()),
    Experiment("anchors", "", variants.anchors, ()),
)
