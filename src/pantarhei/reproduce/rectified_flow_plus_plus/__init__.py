"""The claims of rectified flow++ (Lee, Lin, Fanti 2405.20320) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.rectified_flow_plus_plus import chain, recipe, rounds, sampling, start

CHAIN = (
    Experiment(
        "one-step",
        "8x8 digits, a teacher on EDM's path (U-Net of 96,000 parameters, 2,000 Adam steps of batch 64) and 4,096 of "
        "its pairs (35 evaluations each). Vanilla 2-RF (uniform times, squared error, random weights) against "
        "rectified flow++ (teacher's weights, U-shaped times, pseudo-Huber), 800 steps each on the same pairs, "
        "learning rates scanned for both on seeds 100 and 101. Frechet distance of 2,000 samples to the 359 held-out "
        "digits in 32 principal components of the training digits. The floor is the training digits' own distance, and "
        "students learn to copy their teacher, so the distance above the teacher's is shown as well. Error: mean "
        "squared distance to what the finely solved teacher makes of the same noise.",
        chain.headline,
        (
            Claim(
                "Better in one step",
                "frechet_ratio",
                "one-step Frechet distance, ++ / vanilla",
                "at most",
                0.7,
                "FID 12.21 to 3.38 (CIFAR-10), up to 72 % less",
            ),
            Claim(
                "Better in one step, above the teacher's own distance",
                "excess_ratio",
                "(one-step Frechet distance - teacher's), ++ / vanilla",
                "at most",
                0.7,
            ),
            Claim(
                "One step is nearer to where the teacher leads",
                "error_ratio",
                "one-step error, ++ / vanilla",
                "at most",
                0.7,
            ),
        ),
        seeds=5,
        pictures={
            "one-step.png": "Rows: held-out digits; the teacher, finely solved; vanilla in 1, 2 and 4 steps; rectified "
            "flow++ in 1, 2 and 4 steps from the same noise (seed 0)."
        },
    ),
    Experiment(
        "chain",
        "The paper's configurations on the same digits, pairs and steps: A vanilla; B the teacher's weights (the paper "
        "also enlarges the batch, which stays here); C U-shaped times; D pseudo-Huber; E with a perceptual term; F "
        "that term divided by 1 - t; G = F and 200 steps on real digits with the noise that they invert to. The "
        "perceptual term is a surrogate: LPIPS' arithmetic on random VGG features (an eighth of the channels, images "
        "at 16 x 16), which shows that the parts work together and says nothing about LPIPS. Frechet distances and "
        "errors as above; surrogate: its mean distance to the teacher's samples.",
        chain.chain,
        (
            Claim(
                "U-shaped times lower the one-step error (digits)",
                "u_error_1_ratio",
                "one-step error, C / B",
                "at most",
                1.0,
                "FID 7.14 to 5.17",
            ),
            Claim(
                "Pseudo-Huber lowers it further (digits)",
                "huber_error_1_ratio",
                "one-step error, D / C",
                "at most",
                1.0,
                "FID 5.17 to 5.24",
            ),
            Claim(
                "What is trained is loss E",
                "E_loss_off",
                "relative difference to the paper's formula",
                "at most",
                1e-4,
            ),
            Claim(
                "What is trained is loss F",
                "F_loss_off",
                "relative difference to the paper's formula",
                "at most",
                1e-4,
            ),
            Claim(
                "The perceptual term (surrogate) does what it says",
                "e_surrogate_1_ratio",
                "one-step surrogate distance to the teacher, E / D",
                "at most",
                1.0,
                "FID 5.24 to 3.42 with LPIPS",
            ),
            Claim(
                "So does the divided one (surrogate)",
                "f_over_d_surrogate_1",
                "one-step surrogate distance to the teacher, F / D",
                "at most",
                1.0,
                "FID 3.42 to 3.38 with LPIPS",
            ),
        ),
        seeds=5,
        pictures={"chain.png": "Rows: the teacher, finely solved; A to G in one step from the same noise (seed 0)."},
    ),
    Experiment(
        "real-data",
        "Configuration D of these digits goes on for 200 steps on three kinds of pairs: the 1,438 training digits with "
        "the noise that the teacher inverts them to (35 evaluations), made pairs only, and half of each.",
        chain.real_data,
        (
            Claim(
                "Real data improve one step",
                "real_over_made_1",
                "one-step Frechet distance, inverted real data / made pairs",
                "at most",
                1.0,
                "FID 3.38 to 3.07",
            ),
            Claim(
                "So do real data mixed with made pairs",
                "mixed_over_made_1",
                "one-step Frechet distance, half of each / made pairs",
                "at most",
                1.0,
            ),
        ),
        seeds=5,
    ),
)
PARTS = (
    Experiment(
        "recipe",
        "Noise to a ring of eight modes: a teacher on EDM's path (perceptron of 3 x 128, 2,000 Adam steps of batch "
        "256), 10,000 of its pairs, and students of 2,000 steps that differ in one part each, at the best learning "
        "rate of a scan up to 0.032 on seeds 100 and 101 (the same for all). One-step errors on 2,000 fresh noises; "
        "the transition is the median length of the velocity's error in units of c D, above 1 where pseudo-Huber acts "
        "as a norm.",
        recipe.ring,
        (
            Claim(
                "U-shaped times lower the one-step error (vanilla, ring)",
                "u_vanilla_error_ratio",
                "one-step error, U-shaped / uniform, random weights",
                "at most",
                1.0,
                "FID 7.14 to 5.17",
            ),
            Claim(
                "U-shaped times lower the one-step error (teacher's weights, ring)",
                "u_error_ratio",
                "one-step error, C / B",
                "at most",
                1.0,
                "FID 7.14 to 5.17",
            ),
            Claim(
                "Pseudo-Huber lowers it further (ring)",
                "huber_error_ratio",
                "one-step error, D / C",
                "at most",
                1.0,
                "FID 5.17 to 5.24",
            ),
        ),
        seeds=5,
    ),
    Experiment(
        "profile",
        "Loss of the vanilla 2-RF by time, on fresh pairs, in 20 bins: the mean of the first and the last over that of "
        "the four in the middle.",
        rounds.profile,
        (
            Claim(
                "The loss is higher at the ends (ring)",
                "ring_ends_over_middle",
                "mean of both ends / middle",
                "at least",
                2.0,
            ),
            Claim(
                "The loss is higher at the ends (digits)",
                "digits_ends_over_middle",
                "mean of both ends / middle",
                "at least",
                2.0,
            ),
            Claim(
                "So it is at each of them (ring)", "ring_lower_end_over_middle", "lower end / middle", "at least", 1.0
            ),
            Claim(
                "So it is at each of them (digits)",
                "digits_lower_end_over_middle",
                "lower end / middle",
                "at least",
                1.0,
            ),
        ),
        seeds=5,
        pictures={"profile.png": "Held-out loss of the vanilla 2-RF by t, over its value in the middle (seed 0)."},
    ),
)
ROUNDS = (
    Experiment(
        "one-round",
        "V / E|Z1 - Z0|^2 of the coupling after no, one and two rounds, with the network of the next round, on pairs "
        "that it has not seen: an upper bound, because it holds the network's error. A 2-RF trained twice as long "
        "against a 3-RF whose two rounds cost as many steps together (configuration D, made anew from the 2-RF's own "
        "pairs of 40 evaluations).",
        rounds.one_round,
        (
            Claim("After one round paths hardly cross (ring)", "ring_fall", "V before / after", "at least", 20.0),
            Claim("After one round paths hardly cross (digits)", "digits_fall", "V before / after", "at least", 20.0),
            Claim(
                "Another round is not better (ring)",
                "ring_third_over_second",
                "one-step error, 3-RF / 2-RF",
                "at least",
                0.95,
            ),
            Claim(
                "Another round is not better (digits)",
                "digits_third_over_second",
                "one-step error, 3-RF / 2-RF",
                "at least",
                0.95,
            ),
        ),
    ),
    Experiment(
        "geometry",
        "No training: two straight paths that meet half way start at z and z + (x' - x''). Of 10,000 pairs among 1,000 "
        "real images (digits; patches of 32 x 32 pixels from scikit-learn's two photographs), how many such starts lie "
        "outside the central 99.9 % of noise by length or by correlation with neighbouring pixels (99.95 % for each of "
        "the two). Crossings nearer to the noise, at t = 0.3 and 0.1, need less and are counted as well: these are the "
        "exceptions that the authors name.",
        rounds.geometry,
        (
            Claim("Where paths would cross is no noise (digits)", "digits_outside", "share outside", "at least", 0.99),
            Claim(
                "Where paths would cross is no noise (patches)", "patches_outside", "share outside", "at least", 0.99
            ),
        ),
        pictures={"geometry.png": "Length and autocorrelation of noise and of would-be starts (seed 0)."},
    ),
)
START = (
    Experiment(
        "start-exact",
        "The EDM ODE and the converted linear one from the same noisiest state, solved with error control in double "
        "precision: the exact denoiser of three modes in the plane (1,000 points), and a SongUNet of random weights on "
        "8x8 images. Figures as sampled: both flows from the same unit noise.",
        start.exact,
        (
            Claim(
                "The teacher is a flow, exactly (analytic denoiser)",
                "analytic_difference",
                "largest difference of ends",
                "at most",
                1e-4,
            ),
            Claim(
                "The teacher is a flow, exactly (random SongUNet)",
                "network_difference",
                "largest difference of ends",
                "at most",
                1e-3,
            ),
        ),
    ),
    Experiment(
        "start-shorter",
        "Digits, squared error and uniform times at a constant learning rate: iterations until the averaged weights' "
        "held-out loss reaches that of 800 iterations from random weights (the better of two networks: one that "
        "predicts the velocity, and one in EDM's preconditioning).",
        start.shorter,
        (
            Claim(
                "The teacher's weights save training",
                "share",
                "iterations to the same loss, teacher's weights / random",
                "at most",
                0.5,
            ),
        ),
        pictures={"start.png": "Held-out loss of the averaged weights (seed 0)."},
    ),
)
SAMPLING = (
    Experiment(
        "update-rule",
        "Configuration D trained half as long: re-interpolation with the first noise against Euler's steps, by the "
        "squared distance to the finely solved teacher. With two steps the rules are the same (the second step leaves "
        "no noise), so three and four decide; also shown for the full training.",
        sampling.update_rule,
        (
            Claim(
                "The new update rule is better (ring)",
                "ring_worst_ratio",
                "error, new / Euler, worse of 3 and 4 steps",
                "at most",
                1.0,
            ),
            Claim(
                "The new update rule is better (digits)",
                "digits_worst_ratio",
                "error, new / Euler, worse of 3 and 4 steps",
                "at most",
                1.0,
            ),
            Claim(
                "With two steps it is Euler's",
                "two_steps_differ",
                "relative difference of errors",
                "at most",
                1e-3,
            ),
        ),
    ),
    Experiment(
        "inversion",
        "Held-out digits to noise and back with 4 + 4 and 8 + 8 evaluations: configuration D with Euler's steps "
        "against its teacher with Euler's (the best of EDM's own grid, even steps on the linear path and a grid tuned "
        "to the teacher) and with Heun's (the better of EDM's grid and even steps on the linear path). Shell: "
        "Kolmogorov-Smirnov distance of |z|^2 to its law for true noise, the baseline's again the best of its grids.",
        sampling.inversion,
        tuple(
            claim
            for count in (4, 8)
            for kind in ("euler", "heun")
            for claim in (
                Claim(
                    f"Inversion in {count} + {count} evaluations is better than the teacher's ({kind.capitalize()})",
                    f"{kind}_{count}_gain",
                    "reconstruction error, teacher / student",
                    "at least",
                    3.0,
                ),
                Claim(
                    f"Its noise is nearer to noise ({kind.capitalize()}, {count})",
                    f"{kind}_{count}_shell_ratio",
                    "distance of |z|^2 to its law, student / teacher",
                    "at most",
                    1.0,
                ),
            )
        ),
        pictures={
            "inversion.png": "Rows: held-out digits; there and back in 4 + 4 by the teacher's Euler, its Heun and the "
            "student; the same in 8 + 8 (seed 0)."
        },
    ),
)
EXPERIMENTS = (*CHAIN, *PARTS, *ROUNDS, *START, *SAMPLING)
