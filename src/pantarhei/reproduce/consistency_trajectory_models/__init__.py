"""The claims of consistency trajectory models (Kim et al. 2310.02279) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.consistency_trajectory_models import jumps, quality

RING = (
    "Ring of eight Gaussians (radius 0.7, deviation 0.03), exact teacher on EDM's path, grid of 18 noise levels. Students: "
    "perceptrons of 3 x 128 from random weights, 2,500 Adam steps of batch 256, squared distance at the data end, "
    "denoising term with the fixed weight 0.2. "
)
DISTANCE = "Sliced 1-Wasserstein distance of 8,000 samples to fresh data. "

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "jumps",
        RING
        + "Jumps between all pairs of 9 levels from 2,000 exact states; error: root mean square, over that of the way. "
        "Denoiser at s = t on the same states, over the size of the data.",
        jumps.jumps,
        (
            Claim(
                "It jumps from anywhere to anywhere",
                "jump_error_median",
                "median error of a jump, over the way",
                "at most",
                0.1,
            ),
            Claim(
                "So it does for every pair of times",
                "jump_error_worst",
                "worst error of a jump, over the way",
                "at most",
                0.1,
            ),
            Claim(
                "At s = t it is the denoiser",
                "denoiser_error_mean",
                "error of the data estimate over the data's size, mean over levels",
                "at most",
                0.1,
            ),
        ),
        pictures={"jumps.png": "Error of the jump from each noise level to each smaller one, over the way (seed 0)."},
    ),
    Experiment(
        "steps",
        RING.replace("3 x 128", "3 x 64, 3 x 128 and 4 x 256").replace("2,500", "1,000 and 4,000")
        + DISTANCE
        + "From the same noise with 1, 2, 4, 8 and 16 jumps.",
        quality.steps,
        tuple(
            Claim(
                f"Without noise, 16 jumps are not worse than one ({network} network, {iterations:,} iterations)",
                f"{network}_{iterations}_0_16_over_1",
                "distance of 16 jumps / of 1, gamma 0",
                "at most",
                1,
                "FID 4.1 to 2.25 over 35 evaluations",
            )
            for network in ("small", "middle", "large")
            for iterations in quality.LENGTHS
        )
        + tuple(
            Claim(
                f"With all noise they are ({network} network, 4,000 iterations)",
                f"{network}_4000_1_16_over_1",
                "distance of 16 jumps / of 1, gamma 1",
                "at least",
                1,
                "FID about 10.5 at gamma 1",
            )
            for network in ("small", "middle", "large")
        ),
        pictures={"steps.png": "Distance to the data against the number of jumps (seed 0)."},
    ),
    Experiment(
        "distillation",
        RING
        + DISTANCE
        + "Consistency distillation of the same grid, loss and network, in as many iterations and in as much "
        "time (the ratio of times is measured first). Teacher: DDIM and Heun steps.",
        quality.distillation,
        (
            Claim(
                "One jump is better than consistency distillation's (equal iterations)",
                "equal_iterations",
                "one-step distance, CD / CTM",
                "at least",
                1.5,
                "FID 1.98 against 3.55 (CD), with a GAN",
            ),
            Claim(
                "So it is in equal time",
                "equal_time",
                "one-step distance, CD / CTM, equal training time",
                "at least",
                1,
            ),
            Claim(
                "It is nearer to where the teacher leads (equal iterations)",
                "error_equal_iterations",
                "one-step error, CD / CTM",
                "at least",
                1.5,
            ),
            Claim(
                "So it is in equal time (error)",
                "error_equal_time",
                "one-step error, CD / CTM, equal training time",
                "at least",
                1,
            ),
        ),
    ),
    Experiment(
        "terms",
        RING
        + DISTANCE
        + "Left out or added: the denoising term; the matching; adaptive weights (denoising weight 1); a small adversarial "
        "term in the second half. Score: error of the data estimate at s = t over the data's size, mean over 8 levels.",
        quality.terms,
        (
            Claim(
                "Without the denoising term the score is worse",
                "no_denoising_over_full_score",
                "score error, without / with",
                "at least",
                1.5,
            ),
            Claim(
                "And so are many jumps",
                "no_denoising_over_full_16",
                "distance of 16 jumps, without / with",
                "at least",
                1.5,
            ),
            Claim(
                "And so is the ODE of its score",
                "no_denoising_over_full_ode",
                "distance of 18 Heun steps, without / with",
                "at least",
                1.5,
            ),
            Claim(
                "Without the matching one jump is worse",
                "no_matching_over_full_1",
                "one-step distance, denoising term alone / both",
                "at least",
                3,
            ),
            Claim(
                "The adversarial term improves one jump",
                "adversarial_over_full_1",
                "one-step distance, with / without (fixed weights)",
                "at most",
                1,
                "FID 2.28 against 5.19, with features of ImageNet",
            ),
            Claim(
                "Adaptive weights are as good as a fixed one",
                "adaptive_over_full_1",
                "one-step distance, adaptive / fixed",
                "at most",
                1.2,
            ),
        ),
    ),
    Experiment(
        "spans",
        RING + DISTANCE + "The teacher goes one interval (local), some (soft) or all the way (global).",
        quality.spans,
        (
            Claim("Soft is better than local", "local_over_soft", "one-step distance, local / soft", "at least", 1),
            Claim("And as good as global", "global_over_soft", "one-step distance, global / soft", "at least", 0.8),
        ),
    ),
    Experiment(
        "kinds",
        RING
        + DISTANCE
        + "Its own average in place of the teacher; consistency training, improved consistency training, "
        "mean velocities (from the teacher, and from data), all in as many iterations with the same optimiser.",
        quality.kinds,
        (
            Claim(
                "No teacher is needed",
                "alone_over_taught",
                "one-step distance, without / with teacher",
                "at most",
                2,
                "FID 2.39 against 1.98",
            ),
            Claim(
                "No teacher is needed (error)",
                "alone_over_taught_error",
                "one-step error, without / with teacher",
                "at most",
                2,
            ),
        ),
    ),
    Experiment(
        "likelihood",
        RING + "500 fresh points, adaptive Runge-Kutta (1e-3), nats per dimension.",
        jumps.likelihood,
        (
            Claim(
                "Its likelihood is right (denoising weight 0.2)",
                "model_gap",
                "difference to the exact NLL, nats per dimension",
                "at most",
                0.02,
                "NLL 2.43 against the teacher's 2.56 bits",
            ),
            Claim(
                "Its likelihood is right (adaptive weights)",
                "adaptive_gap",
                "difference to the exact NLL, nats per dimension",
                "at most",
                0.02,
            ),
        ),
    ),
    Experiment(
        "guidance",
        RING
        + "16 jumps with 10 Langevin steps after each, along the score and (scale 1 or 3 times) the exact slope of "
        "log p(mode | x_t). Purity: "
        "share of samples nearest to the wanted mode. Spread: deviation within modes, over the data's.",
        jumps.guidance,
        (
            Claim(
                "A classifier steers it",
                "purity_gain",
                "purity, guided / free (scale 1, gamma 0.5)",
                "at least",
                3,
            ),
        ),
        pictures={"guidance.png": "Jumps that are to end in the upper right mode (seed 0)."},
    ),
    Experiment(
        "digits",
        "8x8 digits. Teacher: a denoiser in EDM's form (U-Net of 0.4 million weights, 1,500 Adam steps of batch 64), whose "
        "weights the students start from; 500 RAdam steps of batch 64 with pseudo-Huber distance; CTM (adaptive weights) "
        "and consistency distillation on 9 levels. Error: mean squared distance to the teacher's samples of the same noise, "
        "over their variance. Distance: sliced 2-Wasserstein to held-out digits.",
        quality.images,
        (
            Claim(
                "One jump is nearer to the teacher than consistency distillation's",
                "cd_over_ctm",
                "one-step error, CD / CTM, equal iterations",
                "at least",
                1,
            ),
            Claim(
                "One jump is nearer than two DDIM steps of the teacher",
                "ctm_over_two_steps",
                "error, one jump of CTM / two evaluations of the teacher",
                "at most",
                1,
            ),
            Claim(
                "The adversarial term improves one jump",
                "adversarial_over_plain",
                "one-step distance to data, with / without",
                "at most",
                1,
            ),
        ),
        pictures={
            "digits.png": "Rows: the solved teacher; one jump of CTM, of CTM with an adversarial term, of consistency "
            "distillation, of the mean velocity (seed 0)."
        },
    ),
)
