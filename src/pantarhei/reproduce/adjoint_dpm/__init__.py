"""The claims of AdjointDPM (Pan et al. 2307.10711) on a CPU."""

from pantarhei.reproduce.adjoint_dpm import exact, measurements, tasks
from pantarhei.reproduce.claims import Claim, Experiment

FIELD = "Perceptron of 3 x 256 with random weights, 64 dimensions, batch 64, a condition of 8. "
DIGITS = (
    "8x8 digits without the 7: rectified flow (U-Net of 0.4 million weights, 1,500 iterations of batch 64), 20 "
    "Euler steps, exact "
    "gradients; a classifier trained on all digits. "
)
SPREAD = (
    "Spread: the samples' deviation, against the error of their mean, which is as large if the truth is one of them."
)

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "gradients",
        FIELD + "Gradients with respect to state, condition and weights in double precision, 8 to 128 steps, by every "
        "way back: "
        "relative difference to backpropagation through the same steps, and that of a directional derivative to "
        "a difference.",
        exact.gradients,
        (
            Claim(
                "Checkpointed, symplectic and reversible gradients are exact",
                "exact_worst",
                "worst relative error over methods and steps",
                "at most",
                1e-5,
            ),
            Claim(
                "Backpropagation agrees with differences",
                "difference_worst",
                "worst relative error of a directional derivative",
                "at most",
                1e-5,
            ),
            Claim(
                "The continuous adjoint converges with its method's order (Euler)",
                "order_euler_over_nominal",
                "order between 64 and 128 steps / 1",
                "at least",
                0.8,
            ),
            Claim(
                "The continuous adjoint converges with its method's order (midpoint)",
                "order_midpoint_over_nominal",
                "order between 64 and 128 steps / 2",
                "at least",
                0.8,
            ),
            Claim("At 128 Euler steps it is as good as exact", "adjoint_euler_128", "relative error", "at most", 0.01),
        ),
        pictures={"errors.png": "Error of gradients against backpropagation (seed 0)."},
    ),
    Experiment(
        "memory",
        FIELD + "Midpoint method, single precision: peak of allocations beyond parameters and their gradients, 8 to "
        "128 steps.",
        exact.memory,
        (
            Claim(
                "Backpropagation's memory grows with the steps",
                "backprop_growth",
                "growth from 8 to 128 steps, over 16",
                "at least",
                0.8,
            ),
            Claim(
                "That of all others grows by a state a step at most",
                "worst_states_a_step",
                "growth a step, in states",
                "at most",
                1.1,
            ),
            Claim(
                "At 128 steps a checkpointed gradient needs a fraction",
                "checkpoint_over_backprop",
                "memory, checkpoint / backprop",
                "at most",
                0.1,
            ),
        ),
        pictures={"memory.png": "Memory beyond parameters and gradients against the number of steps (seed 0)."},
    ),
    Experiment(
        "variables",
        "Exact mixture of 4 Gaussians in 8 dimensions on the VP, cosine and linear paths; 20 steps of Euler, "
        "Heun and RK4 on three "
        "grids, in the path's own variables, rho and flow. Errors of samples, and of continuous adjoints, "
        "against a fine solve; "
        "gains are medians over VP and cosine, grids and methods.",
        exact.variables,
        (
            Claim("rho makes samples better", "rho_sample_gain", "error none / rho, median", "at least", 1),
            Claim("rho makes adjoints better", "rho_adjoint_gain", "error none / rho, median", "at least", 1),
            Claim("flow makes samples better", "flow_sample_gain", "error none / flow, median", "at least", 1),
            Claim("flow makes adjoints better", "flow_adjoint_gain", "error none / flow, median", "at least", 1),
        ),
        seeds=5,
    ),
    Experiment(
        "vocabulary",
        DIGITS + "30 AdamW updates of 64 noises (each kept on its sphere), and of one row of the class embedding (then "
        "fresh noise), "
        "for the classifier's chance of a 7. Control: the best of 31 noises. Distance: sliced Wasserstein to "
        "held-out sevens.",
        tasks.vocabulary,
        (
            Claim(
                "Noise is found for a class that the flow never saw",
                "chance_noise",
                "chance of a 7, mean",
                "at least",
                0.9,
            ),
            Claim("A class is found for it", "chance_row", "chance of a 7 from fresh noise, mean", "at least", 0.9),
            Claim(
                "These look like sevens (noise)",
                "distance_noise_over_before",
                "distance to sevens, after / before",
                "at most",
                0.8,
            ),
            Claim(
                "These look like sevens (class)",
                "distance_row_over_before",
                "distance to sevens, after / before",
                "at most",
                0.8,
            ),
        ),
        pictures={
            "vocabulary.png": "Without and with the search for noise, from the new class, and held-out sevens (seed 0)."
        },
    ),
    Experiment(
        "embedding",
        DIGITS + "One sample of a hidden row of the class embedding and its noise; 150 AdamW updates of a row. Errors: "
        "mean squared "
        "difference to samples of the hidden row from 64 new noises.",
        tasks.embedding,
        (
            Claim(
                "One pair gives an embedding for new noise",
                "gain",
                "error of the empty row / of the found one",
                "at least",
                5,
            ),
        ),
    ),
    Experiment(
        "style",
        DIGITS + "60 updates of all weights, or of additions of rank 4, until samples have half the brightness; then "
        "256 fresh ones. "
        "C2ST: a classifier's accuracy at telling tuned from untuned samples by features of equally bright images.",
        tasks.style,
        (
            Claim("A statistic is learned (all weights)", "fall_weights", "fall of its error", "at least", 0.8),
            Claim("A statistic is learned (rank 4)", "fall_low_rank", "fall of its error", "at least", 0.8),
            Claim(
                "What is drawn stays (all weights)",
                "accuracy_weights",
                "share that is still classified as asked for",
                "at least",
                0.8,
            ),
        ),
        pictures={"style.png": "Samples, tuned by all weights, tuned by additions of rank 4 (seed 0)."},
    ),
    Experiment(
        "audit",
        DIGITS + "128 samples; 30 normalised steps of length 0.3 within 0.1 of each element of the noise; images "
        "rounded to 8 bits.",
        tasks.security,
        (
            Claim(
                "It fools the classifier more often than random noise",
                "rate_over_control",
                "rate / control (at least one)",
                "at least",
                2,
            ),
        ),
    ),
    Experiment(
        "images",
        DIGITS
        + "16 held-out digits, of no label, without the 4 x 4 pixels in their middle, with 30 % of their pixels, "
        "and blurred by 1 pixel, each with noise of 0.05; 16 posterior samples of each, 40 steps of Heun. Linear: the best "
        "estimate by the data's mean and covariance. " + SPREAD,
        measurements.images,
        (
            Claim(
                "Samples agree with what was measured", "worst_misfit", "misfit / noise, worst of three", "at most", 2
            ),
            Claim(
                "Their mean is as near to the truth as the best linear estimate",
                "worst_error_over_linear",
                "error / linear, worst of three",
                "at most",
                1,
            ),
            Claim(
                "Their spread tells how far off they are",
                "worst_spread_off",
                "spread / error or its inverse, worst of three",
                "at most",
                1.5,
            ),
        ),
        pictures={
            "images.png": "Held-out digits; of box, mask and blur: what is measured, one sample, mean of 16 (seed 0)."
        },
    ),
    Experiment(
        "fields",
        "Velocities of a stirred two-dimensional fluid, 16 x 16, in units of their deviation: rectified flow (U-Net of 0.4 "
        "million weights, 2,000 iterations of batch 64). 8 fields of other trajectories seen by 24 sensors with noise of "
        "0.05, by both components or by their speed only; 16 posterior samples of each, 40 steps of Heun. " + SPREAD,
        measurements.fields,
        (
            Claim("Samples agree with the sensors", "misfit", "misfit / noise", "at most", 2),
            Claim(
                "Their mean is as near to the truth as the best linear estimate",
                "error_over_linear",
                "error / linear (kriging)",
                "at most",
                1,
            ),
            Claim(
                "Their spread tells how far off they are", "spread_off", "spread / error or its inverse", "at most", 1.5
            ),
            Claim(
                "It pays to measure how sure an estimate is",
                "error_over_fixed_spread",
                "error / that with one variance for all",
                "at most",
                0.8,
            ),
            Claim("Samples are as lively as the fluid", "energy_over_truth", "energy / truth's", "at least", 0.9),
            Claim("Samples agree with sensors of speed", "misfit_of_speeds", "misfit / noise", "at most", 2),
            Claim(
                "Speeds tell of speeds elsewhere",
                "speed_error_over_mean",
                "error of the speed everywhere / that of the mean speed",
                "at most",
                0.9,
            ),
        ),
        pictures={
            "fields.png": "Truth, one sample, the mean of 16, and a sample from speeds only; sensors are marked (seed 0)."
        },
    ),
)
