"""The claims of rectified diffusion (Wang et al. 2410.07303) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.rectified_diffusion import conversions, forms, losses, pairings, phases, variants

RING_TEACHER = (
    "Ring of eight modes. Teacher: noise prediction on Stable Diffusion's linear schedule (perceptron of 3 x 128, 3,000 "
    "Adam steps of batch 256); 10,000 pairs of it (40 steps of EDM's Heun sampler). "
)
DIGITS_TEACHER = (
    "8x8 digits. Teacher: noise prediction on Stable Diffusion's linear schedule (U-Net of 0.4 million weights, 1,500 Adam "
    "steps of batch 64); 4,096 pairs of it (12 steps of EDM's Heun sampler). "
)
ERROR = (
    "One-step error: mean squared distance to the finely solved teacher's samples of the same fresh noise, over their "
    "variance. "
)
PAIRINGS_ABOUT = (
    "The student starts from the teacher's weights and trains with the elementwise pseudo-Huber loss of the data estimate "
    "on (i) these pairs, (ii) the same samples with shuffled noise, (iii) real data with fresh noise. "
)
CONVERSIONS_ABOUT = (
    "Three students from the same weights and pairs, in as many steps: the form is kept (pseudo-Huber loss of the data "
    "estimate); the weights are reused as a velocity network of the linear path, unconverted; the exact conversion to the "
    "linear path (reused and converted with the squared error of the velocity). Errors of 1, 2 and 8 DDIM steps (Euler's "
    "on the linear path) against the finely solved teacher, over the variance of its samples. "
)
UNMATCHED = "error of the better unmatched student / of the matched one"


def _pairings_claims(what: str) -> tuple[Claim, ...]:
    return (
        Claim(f"The gain comes from matched pairs ({what})", "matched_gain", UNMATCHED, "at least", 3),
        Claim(
            f"Without matching, the one-step error does not fall ({what})",
            "unmatched_over_teacher",
            "error of the better unmatched student / of the teacher",
            "at least",
            1,
        ),
    )


PAIRINGS = (
    Experiment(
        "pairs-ring",
        RING_TEACHER + PAIRINGS_ABOUT + "500 steps. " + ERROR,
        pairings.ring,
        _pairings_claims("ring"),
        seeds=5,
        pictures={
            "pairings-eight_gaussians.png": "The solved teacher, and one step of it and of the students (seed 0)."
        },
    ),
    Experiment(
        "pairs-moons",
        RING_TEACHER.replace("Ring of eight modes", "Two moons") + PAIRINGS_ABOUT + "500 steps. " + ERROR,
        pairings.moons,
        _pairings_claims("two moons"),
        seeds=5,
        pictures={"pairings-two_moons.png": "The solved teacher, and one step of it and of the students (seed 0)."},
    ),
    Experiment(
        "pairs-digits",
        DIGITS_TEACHER + PAIRINGS_ABOUT + "500 steps. " + ERROR,
        pairings.digits,
        _pairings_claims("digits"),
        seeds=5,
        pictures={
            "pairings-digits.png": "Rows: the solved teacher; one step of the teacher, of the student of matched pairs, of "
            "shuffled pairs, and of real data (seed 0)."
        },
    ),
)
FORMS = (
    Experiment(
        "forms",
        "Ring of eight modes, 10,000 pairs of the exact flow (50 Heun steps): perceptrons of 3 x 128 from scratch, 1,500 "
        "Adam steps of batch 256 on these pairs with the pseudo-Huber loss of the data estimate; linear, VP, sub-VP and EDM "
        "paths with velocity-type output (velocity, v, v, EDM's), and linear, VP and sub-VP with the data as output. Exact "
        "2-Wasserstein distance of 2,000 one-step samples to fresh data; the floor is that of two fresh data sets. "
        "Unrectified: the same networks and steps on independent noise.",
        forms.forms,
        (
            Claim(
                "The form does not matter once the pairs are fixed (all seven)",
                "worst_over_best_all",
                "one-step distance, worst / best form",
                "at most",
                1.2,
            ),
            Claim(
                "The form does not matter once the pairs are fixed (velocity-type outputs)",
                "worst_over_best_velocity",
                "one-step distance, worst / best of four paths",
                "at most",
                1.2,
            ),
        ),
    ),
    Experiment(
        "first-order",
        "The flows of the experiment `forms`, velocity-type outputs: a VP flow before rectification, and VP, sub-VP and "
        "linear flows after it, along trajectories of 64 Heun steps from 512 draws. Spread of the data estimate over a "
        "trajectory; squared distance of 1 DDIM step to 32, over the variance; straightness S over E|x1 - x0|^2, of the "
        "states as they are and after the exact change to the linear path.",
        forms.first_order_paths,
        (
            Claim(
                "Rectification makes paths first-order (VP)",
                "spread_gain",
                "spread of the data estimate, before / after",
                "at least",
                100,
            ),
            Claim(
                "One step does what 32 do",
                "worst_gap_1_to_32",
                "relative squared distance, worst of VP, sub-VP, linear",
                "at most",
                0.01,
            ),
            Claim(
                "First-order paths of VP and sub-VP are not straight",
                "least_raw_straightness",
                "S of the states as they are, least",
                "at least",
                0.5,
            ),
            Claim(
                "On the linear path they are",
                "worst_mapped_straightness",
                "S after the change of path, worst of three",
                "at most",
                0.05,
            ),
        ),
        pictures={
            "first-order-vp-plain-raw.png": "VP before rectification: paths of 150 draws (seed 0).",
            "first-order-vp-plain-mapped.png": "The same flow on the linear path.",
            "first-order-vp-raw.png": "VP after rectification: elliptic arcs.",
            "first-order-vp-mapped.png": "The same flow on the linear path: nearly straight.",
        },
    ),
)


def _losses_claims(what: str) -> tuple[Claim, ...]:
    claims = [
        Claim(
            f"v-prediction is not needed ({what}, {budget} steps)",
            f"huber_over_v_{budget}",
            "one-step distance, noise prediction with data loss / v-prediction",
            "at most",
            1.5,
        )
        for budget in losses.BUDGETS
    ]
    claims += [
        Claim(
            f"Warning: with the plain squared error of the noise it is ({what}, {budget} steps)",
            f"mse_over_v_{budget}",
            "one-step distance, noise prediction with noise loss / v-prediction",
            "at least",
            1.5,
        )
        for budget in losses.BUDGETS
    ]
    return tuple(claims)


LOSSES_ABOUT = (
    "Ring of eight modes; two teachers of 3,000 Adam steps of batch 256 (perceptron of 3 x 128), noise and v-prediction, "
    "10,000 pairs each. The noise teacher goes on training with the pseudo-Huber loss of the data estimate (the published "
    "code), the squared error of the noise (the paper's Algorithm 4), or that of the path's velocity; the v teacher with "
    "the first. 300 and 1,500 steps; exact 2-Wasserstein distance of 2,000 one-step samples to fresh data, and error "
    "against the own teacher. "
)
LOSSES = (
    Experiment(
        "losses-sd",
        LOSSES_ABOUT + "Stable Diffusion's linear schedule (alpha = 0.040 in the noisiest state).",
        losses.stable_diffusion,
        _losses_claims("Stable Diffusion's schedule"),
        seeds=5,
        pictures={"losses-sd.png": "One step of the students after 300 and 1,500 steps (seed 0)."},
    ),
    Experiment(
        "losses-vp",
        LOSSES_ABOUT + "The score SDE's VP schedule (alpha = 0.0066 there).",
        losses.score_sde,
        _losses_claims("score SDE's schedule"),
        seeds=5,
        pictures={"losses-score-sde.png": "One step of the students after 300 and 1,500 steps (seed 0)."},
    ),
)


def _conversion_claims(what: str, *budgets: int) -> tuple[Claim, ...]:
    paper = {1: "FID at one step, COCO: 27.26 against 47.91", 8: "FID at 25 steps, COCO: 21.28 against 21.65"}
    return tuple(
        Claim(
            f"Keeping the form is ahead at {steps} step{'s' if steps > 1 else ''} ({what}, {budget} iterations)",
            f"kept_over_reused_{budget}_{steps}",
            "error, form kept / weights reused for the linear path",
            "at most",
            1,
            paper[steps],
        )
        for budget in budgets
        for steps in (1, 8)
    )


CONVERSIONS = (
    Experiment(
        "conversions-ring",
        RING_TEACHER + CONVERSIONS_ABOUT + "300 and 1,500 iterations.",
        conversions.ring,
        _conversion_claims("ring", 300, 1500),
        seeds=5,
    ),
    Experiment(
        "conversions-digits-300",
        DIGITS_TEACHER + CONVERSIONS_ABOUT + "300 iterations.",
        conversions.digits_early,
        _conversion_claims("digits", 300),
        pictures={
            "conversions-300.png": "Rows: the solved teacher; one step of the students: form kept, weights reused, "
            "converted exactly (seed 0)."
        },
    ),
    Experiment(
        "conversions-digits-1500",
        DIGITS_TEACHER + CONVERSIONS_ABOUT + "1,500 iterations.",
        conversions.digits_late,
        _conversion_claims("digits", 1500),
        pictures={"conversions-1500.png": "The same rows after 1,500 iterations (seed 0)."},
    ),
)
VARIANTS = (
    Experiment(
        "phases",
        RING_TEACHER.partition("; ")[0]
        + ". Students of 1, 2 and 4 phases (even in the schedule's number, 16 DDIM steps of "
        "the teacher over all of them), 800 Adam steps each on real data, by first-order segments and by chords in t (as "
        "piecewise rectified flow has them; sampled by Euler). Squared distance of one step a phase to the finely solved "
        "teacher, over the variance; also of the one-phase student in 2 and 4 steps.",
        phases.phased,
        (
            Claim("Two phases are nearer to the teacher than one", "gain_2", "error, 1 phase / 2", "at least", 1),
            Claim("Four phases are nearer than two", "gain_4", "error, 2 phases / 4", "at least", 1),
            Claim(
                "First-order segments are better than chords",
                "least_chords_over_first_order",
                "error, chords / first-order, least of 1, 2, 4 phases",
                "at least",
                1,
                "FID at 4 steps, COCO: PeRFlow 22.97 / 20.64",
            ),
        ),
        pictures={"phases.png": "The solved teacher, and students of 1, 2 and 4 phases in one step a phase (seed 0)."},
    ),
    Experiment(
        "low-rank",
        RING_TEACHER
        + "Rectified with all weights, and with additions of rank 4 to them (7 % of the numbers), 1,500 Adam "
        "steps each; errors of one step against the solved teacher, and distances to the data.",
        variants.low_rank,
        (
            Claim(
                "Additions of rank 4 reach at least half of the gain",
                "share_of_gain_error",
                "share of the fall of the one-step error",
                "at least",
                0.5,
            ),
        ),
    ),
    Experiment(
        "anchors",
        "Ring of eight modes, teachers on Stable Diffusion's two schedules, which leave data in the noisiest state (alpha = "
        "0.040 linear, 0.068 scaled linear). A pair's x0 is the noise in that state, as published, or that state itself, as "
        "the sampler has it; 1,500 Adam steps; errors of 1, 2 and 4 steps against the solved teacher, and distances.",
        variants.anchors,
        (),
    ),
)
EXPERIMENTS = (*PAIRINGS, *FORMS, *LOSSES, *CONVERSIONS, *VARIANTS)
