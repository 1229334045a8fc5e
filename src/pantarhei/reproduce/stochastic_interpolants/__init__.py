"""The claims of stochastic interpolants (Albergo et al. 2303.08797) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.stochastic_interpolants import bridges, conditioned, exact, learned

EXACT = (
    Experiment(
        "densities",
        "Two modes to three on the line, linear path, gamma = sqrt(t (1 - t)), exact fields, 20,000 points: ODE, "
        "forward SDE and backward SDE (epsilon 0.5, 60 Heun steps between two times). KL from the exact density to "
        "the histogram (160 bins) at five times, over that of as many exact draws (the floor).",
        exact.any_two_densities,
        (
            Claim("The ODE bridges any two densities", "ode_worst_ratio", "worst KL / floor", "at most", 2),
            Claim("The forward SDE does", "forward_worst_ratio", "worst KL / floor", "at most", 2),
            Claim("The backward SDE does", "backward_worst_ratio", "worst KL / floor", "at most", 2),
        ),
        pictures={"densities.png": "Histograms on the exact density (line) at five times (seed 0)."},
    ),
    Experiment(
        "equations",
        "Residuals of the transport equation and of both Fokker-Planck equations (epsilon 0.5) for the same bridge, "
        "by fourth-order differences in float64 at five random times, relative to the norm of d rho / dt.",
        exact.equations,
        (Claim("The density obeys all three equations", "worst", "worst relative residual", "at most", 1e-4),),
    ),
    Experiment(
        "control",
        "N(0, 1) to three modes on the line; A sin(w x + 3 t) is added to the exact velocity (fast: A = 1.5, w = 6; "
        "slow: A = 1, w = 2), and 0.5 sin(2 x) to the score (fast and score). 20,000 points, 150 Euler-Maruyama "
        "steps. KL from the exact density to the histogram, in nats, by epsilon; and the bound int E|error of the "
        "drift|^2 / (4 epsilon).",
        exact.control,
        (
            Claim(
                "Noise at sampling repairs an error of the velocity",
                "gain",
                "KL of the ODE / KL at epsilon 3 (fast)",
                "at least",
                50,
            ),
            Claim(
                "The losses bound the KL of the SDE",
                "largest_share_of_bound",
                "largest (KL - floor) / bound of 12 cases",
                "at most",
                1,
            ),
            Claim(
                "They do not bound that of the ODE",
                "ode_over_bound",
                "KL of the ODE / bound at epsilon 0.5 (fast)",
                "at least",
                1,
            ),
        ),
        pictures={"control.png": "KL by the amount of noise, for four errors (seed 0)."},
    ),
    Experiment(
        "smoothing",
        "Two narrow modes to three: modes of the density at t = 1/2, and the steepest slope of the velocity there "
        "(where the density is above 1/1000 of its maximum), without latent, with gamma = sqrt(2 t (1 - t)), and "
        "encoding-decoding.",
        exact.smoothing,
        (
            Claim("The latent merges spurious modes", "modes_gone", "modes fewer than without", "at least", 1),
            Claim("The latent smooths the velocity", "slope_ratio", "steepest slope, with / without", "at most", 0.5),
        ),
    ),
)
LEARNED = (
    Experiment(
        "minimisers",
        "Two modes to three in the plane, perceptron of 3 x 256, 2,000 Adam steps of batch 512 (each pair with z "
        "and -z): relative L2 errors of velocity and score over x_t, t in [0.02, 0.98], for the four pairs of "
        "fields. And the deviation of the gradient at t = 0.001 over 64 batches, two independent latents over an "
        "antithetic pair.",
        learned.minimisers,
        (
            Claim(
                "The velocity is the minimiser",
                "velocity+latent_velocity",
                "relative L2, velocity+latent",
                "at most",
                0.1,
            ),
            Claim(
                "The score is the minimiser", "velocity+latent_score", "relative L2, velocity+latent", "at most", 0.1
            ),
            Claim(
                "Antithetic latents tame the velocity's gradient",
                "antithetic_velocity",
                "deviation without / with",
                "at least",
                10,
            ),
            Claim(
                "Antithetic latents tame the score's gradient",
                "antithetic_score",
                "deviation without / with",
                "at least",
                10,
            ),
        ),
    ),
    Experiment(
        "amounts",
        "Noise to a checkerboard, one network of two fields (3 x 256, 3,000 Adam steps of batch 500, each with z "
        "and -z), epsilon chosen afterwards; 100 Euler-Maruyama steps, 10,000 points: sliced 2-Wasserstein distance "
        "to fresh data, and share outside of the dark squares. Cross-entropy above the data's own entropy on 400 "
        "points: by the ODE (dopri5), and by 32 guided random paths of 100 steps.",
        learned.amounts,
        (
            Claim(
                "Some noise is nearer to the data than the ODE",
                "gain_distance",
                "distance of the ODE / best SDE",
                "at least",
                1.2,
            ),
            Claim(
                "Some noise leaves fewer points outside than the ODE",
                "gain_outside",
                "share outside, ODE / best SDE",
                "at least",
                1.2,
            ),
            Claim("The SDE has the lower cross-entropy", "entropy_gain", "nats, ODE less SDE at 0.5", "at least", 0.0),
        ),
        pictures={"amounts.png": "Data, and samples by the amount of noise (seed 0)."},
    ),
    Experiment(
        "likelihoods",
        "Two modes to three in the plane, exact fields, 500 points: log-likelihood by the ODE (dopri5, 1e-6), with "
        "16 probes instead of the exact divergence, and by 64 random paths of the SDE (epsilon 0.1, 100 steps), "
        "plain as in the paper and guided by the score.",
        learned.likelihoods,
        (
            Claim("The ODE's likelihood is exact", "ode_error", "mean |error|, nats", "at most", 1e-3),
            Claim("Probes are unbiased", "probes_standard_errors", "mean error in standard errors", "at most", 2),
            Claim("Random paths give the SDE's", "plain_mean_error", "bias (mean signed error), nats", "at most", 0.05),
            Claim("Guided random paths give it point by point", "guided_error", "mean |error|, nats", "at most", 0.05),
        ),
    ),
    Experiment(
        "contained",
        "Exact fields: the score-based diffusion of the path alpha = t, sigma = sqrt(1 - t^2) is the SDE with its "
        "own epsilon; the denoising sampler is DDIM. Learned: 20,000 pairs of a bridge's ODE teach a "
        "straight flow (perceptron of 3 x 256, 3,000 Adam steps); 2-Wasserstein distance of 2,000 points over that "
        "of two fresh data sets.",
        learned.contained,
        (
            Claim("Diffusion is contained", "diffusion_error", "relative error of the drift", "at most", 1e-6),
            Claim("DDIM is contained", "ddim_error", "relative difference after ten steps", "at most", 1e-6),
            Claim("Rectification keeps the law", "rectified_over_floor", "distance / floor", "at most", 1.5),
            Claim("Rectification straightens", "straighter", "bend before / after", "at least", 2),
        ),
    ),
)
CONDITIONED = (
    Experiment(
        "correlated-ends",
        "Gaussians in eight dimensions, x1 = x0 + shift + noise: paths and dopri5 calls (1e-6) of the exact flow, "
        "when x0 is paired with its own x1 and when it is not.",
        conditioned.correlated_ends,
        (
            Claim("Coupled ends shorten paths", "length_ratio", "length, coupled / independent", "at most", 1),
            Claim("Coupled ends take fewer calls", "calls_ratio", "calls, independent / coupled", "at least", 1.5),
        ),
    ),
    Experiment(
        "inpainting",
        "8x8 digits with a hidden rectangle (side 0.4 to 0.7), the same network (32 channels, 1,500 Adam steps of "
        "batch 64) from noise in the hole alone, and from noise everywhere; held-out digits, Euler; sliced "
        "2-Wasserstein distance of the completed images to the true ones.",
        conditioned.inpainting,
        (
            Claim("Starting from what is known shortens paths", "length_ratio", "coupled / independent", "at most", 1),
            Claim(
                "Starting from what is known takes fewer steps to the same distance",
                "calls_ratio",
                "steps, independent / coupled (median over goals both reach)",
                "at least",
                1.5,
            ),
        ),
        pictures={
            "inpainting.png": "Rows: digits, what is known, completed from the coupled source, and from noise (32 steps)."
        },
    ),
    Experiment(
        "double-well",
        "A point in a double well under noise (512 series of 40 states, a fifth held out): the bridge from the "
        "present state to the law of the next (perceptron of 3 x 128, 3,000 Adam steps of batch 256, 25 steps, 32 "
        "members) against a regressor of the same network and training, and persistence; 512 held-out states.",
        conditioned.forecast_double_well,
        (
            Claim(
                "The forecast wins in energy score (double well)", "energy_ratio", "bridge / best other", "at most", 1
            ),
            Claim("The forecast wins in CRPS (double well)", "crps_ratio", "bridge / best other", "at most", 1),
        ),
        pictures={"double-well.png": "1,000 members from four present states (seed 0)."},
    ),
    Experiment(
        "kolmogorov",
        "Vorticity of a stirred two-dimensional fluid on 32x32 points (64 series of 40 states, a fifth held out): "
        "the bridge (U-Net of 24 channels, 700 Adam steps of batch 32, 25 steps, 16 members) against a regressor of "
        "the same network and training, and persistence; 64 held-out states.",
        conditioned.forecast_kolmogorov,
        (
            Claim("The forecast wins in energy score (fluid)", "energy_ratio", "bridge / best other", "at most", 1),
            Claim("The forecast wins in CRPS (fluid)", "crps_ratio", "bridge / best other", "at most", 1),
        ),
        pictures={"kolmogorov.png": "Rows: cases; columns: present state, next state, four members (seed 0)."},
    ),
)
BRIDGES = (
    Experiment(
        "bridge-gaussians",
        "N(0, 1) to N(1, 4), epsilon 0.5: Schroedinger bridges by iterated Markovian fitting (IMF) and by max-min "
        "over the interpolant. Relative L2 error of the forward drift over the exact bridge's marginals, t from "
        "0.05 to 0.9, against the closed form; E|x1 - x0|^2 of the simulated coupling and int E|drift|^2 over those "
        "of the linear interpolant with the same latent, whose exact drift is simulated.",
        bridges.gaussians,
        (
            Claim("IMF recovers the bridge (Gaussians)", "imf_drift_error", "relative L2 of the drift", "at most", 0.1),
            Claim(
                "IMF couples at lower cost (Gaussians)",
                "imf_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
            Claim(
                "Max-min recovers the bridge (Gaussians)",
                "maxmin_drift_error",
                "relative L2 of the drift",
                "at most",
                0.1,
            ),
            Claim(
                "Max-min couples at lower cost (Gaussians)",
                "maxmin_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
        ),
        pictures={"bridge-gaussians.png": "The forward drift at t = 0.5 (seed 0)."},
    ),
    Experiment(
        "bridge-modes",
        "N(0, 1) to two modes, and two modes to two others (both), epsilon 0.5, against the drift of Sinkhorn's "
        "plan between quadrature rules of the densities.",
        bridges.two_modes,
        (
            Claim("IMF recovers the bridge (two modes)", "imf_drift_error", "relative L2 of the drift", "at most", 0.1),
            Claim(
                "IMF couples at lower cost (two modes)",
                "imf_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
            Claim("IMF, two modes to two", "both_imf_drift_error", "relative L2 of the drift", "at most", 0.1),
            Claim(
                "Max-min recovers the bridge (two modes)",
                "maxmin_drift_error",
                "relative L2 of the drift",
                "at most",
                0.1,
            ),
            Claim(
                "Max-min couples at lower cost (two modes)",
                "maxmin_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
        ),
        pictures={"bridge-modes.png": "The forward drift at t = 0.3, from N(0, 1) (seed 0)."},
    ),
    Experiment(
        "bridge-moons",
        "N(0, I) to two moons in the plane, epsilon 0.3, against Sinkhorn's plan between quadrature rules.",
        bridges.moons,
        (
            Claim("IMF recovers the bridge (two moons)", "imf_drift_error", "relative L2 of the drift", "at most", 0.1),
            Claim(
                "IMF couples at lower cost (two moons)",
                "imf_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
            Claim(
                "Max-min recovers the bridge (two moons)",
                "maxmin_drift_error",
                "relative L2 of the drift",
                "at most",
                0.1,
            ),
            Claim(
                "Max-min couples at lower cost (two moons)",
                "maxmin_cost_over_linear",
                "cost / linear interpolant's",
                "at most",
                1,
            ),
        ),
        pictures={"bridge-moons.png": "Paths of the bridge (seed 0)."},
    ),
)
EXPERIMENTS = (*EXACT, *LEARNED, *CONDITIONED, *BRIDGES)
