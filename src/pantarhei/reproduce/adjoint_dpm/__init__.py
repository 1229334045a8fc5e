"""The claims of AdjointDPM (Pan et al. 2307.10711) on a CPU."""

from pantarhei.reproduce.adjoint_dpm import exact, tasks
from pantarhei.reproduce.claims import Claim, Experiment

FIELD = "Perceptron of 3 x 256 with random weights, 64 dimensions, batch 64, a condition of 8. "
DIGITS = (
    "8x8 digits without the 7: rectified flow (U-Net of 0.4 million weights, 1,500 iterations of batch 64), 20 "
    "Euler steps, exact "
    "gradients; a classifier trained on all digits. "
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
)
